"""train_token_classifier.py as a user runs it, on a tiny BERT; predict_text.py and report.py on what it has learned."""

import csv
import json
import re

import pytest
import torch
import transformers

import predict_text
import report
import tiny_bert as tiny
import train_token_classifier
import words
from conftest import changed, command_line, read
from test_interruptions import assert_the_same_run, stop_at
from test_train_classifier import history

# ---- training


def test_cached_features_change_nothing(tag_words):
    """Also of sentences that are longer than a window."""
    options = {"freeze": "backbone", "epochs": 2, "max_length": 12, "lr": 0.01}
    plain, cached = (tag_words(cache_features=views, **options) for views in (0, 1))
    a, b = read(plain / "last.pt"), read(cached / "last.pt")
    assert not changed(a["model"], b["model"]) and a["history"][1]["val_loss"] == b["history"][1]["val_loss"]
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    assert (plain / "test_predictions.csv").read_text() == (cached / "test_predictions.csv").read_text()
    assert (cached / "features_train_0.bin").exists()


def test_a_frozen_encoder_is_bit_identical_and_thaws(tag_words, tiny_bert):
    from safetensors.torch import load_file

    before = load_file(tiny_bert / "model.safetensors")
    run = tag_words("--freeze", "backbone", "--unfreeze", "1:bert.encoder.layer.1", epochs=2, lr=0.01, keep_every=1)
    first, last = read(run / "epoch_0.pt")["model"], read(run / "last.pt")["model"]
    kept = [name for name in before if "pooler" not in name]
    assert kept and all(torch.equal(first[f"bert.{name}"], before[name]) for name in kept)
    assert changed(first, last) == {n for n in last if n.startswith(("bert.encoder.layer.1.", "classifier."))}


def test_stopped_and_gone_on_with_it_is_the_same_run(tag_words, monkeypatch, capsys):
    options = ["--freeze", "to:bert.encoder.layer.0", "--unfreeze", "1:all", "--accumulate", "2", "--l1", "1e-6",
               "--class-weights", "balanced", "--l2-sp", "0.01", "--loss", "focal"]
    settings = {"epochs": 2, "batch_size": 3, "max_length": 12, "lr": 0.02}
    whole = tag_words(*options, **settings)
    broken = whole.with_name("broken")
    for workers, moment in ((0, 1), (1, 3), (0, 2), (0, 2)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment)
            tag_words(*options, "--resume", output=broken, workers=workers, **settings)
        assert stopped.value.code == 130
    assert f"python train_token_classifier.py --resume {broken}/last.pt" in capsys.readouterr().err
    train_token_classifier.main(["--resume", str(broken / "last.pt")])
    assert_the_same_run(whole, broken)


@pytest.mark.parametrize("weights", [None, "O=0.2,B-place=4"])
def test_the_loss_is_a_mean_over_words_however_batches_are_cut_up(tag_words, weights):
    """Batches of 4, of 2 and 2, of 1 four times: the same steps. Their words differ in number."""
    options = {"dropout": 0, "freeze": "backbone", "optimizer": "sgd", "lr": 0.1, "momentum": 0, "no_test": True,
               "class_weights": weights}
    runs = [tag_words(batch_size=4 // n, accumulate=n, **options) for n in (1, 2, 4)]
    one, *others = (read(run / "last.pt") for run in runs)
    for other in others:
        torch.testing.assert_close(other["model"], one["model"], rtol=0, atol=1e-6)
        assert other["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], abs=1e-5)


def test_weights_and_the_divisor_by_hand(tag_words, tagged, monkeypatch):
    """The gradient of a step of all sentences: that of the weighted mean over the words."""
    sums = []
    real = torch.nn.functional.cross_entropy

    def seen(logits, labels, weight=None, **how):
        if logits.requires_grad:
            sums.append((logits, labels, weight))
        return real(logits, labels, weight, **how)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", seen)
    run = tag_words(batch_size=20, class_weights="B-place=4", dropout=0, no_test=True)
    (logits, labels, weight), = sums
    count = sum(len(s.words) for s in words.read(tagged / "train.conll").sentences)
    assert len(labels) == count and weight[labels].mean().item() == pytest.approx(1)
    plain = torch.tensor([1.0, 1, 1, 4, 1])  # O, B-person, I-person, B-place, I-place
    losses = real(logits, labels, reduction="none")
    by_hand = (plain[labels] * losses).sum() / plain[labels].sum()
    assert read(run / "last.pt")["history"][0]["train_loss"] == pytest.approx(by_hand.item(), abs=1e-5)


def test_a_rate_is_suggested_and_layers_are_listed(tag_words, tiny_bert, capsys):
    run = tag_words("--find-lr")
    assert "suggested: --lr" in capsys.readouterr().out and (run / "find_lr.png").exists()
    train_token_classifier.main(["--model", str(tiny_bert), "--list-layers", "--freeze", "backbone"])
    said = capsys.readouterr().out
    assert "bert.encoder.layer.1" in said and "pooler" not in said


def test_odd_words_and_one_file(tag_words, tmp_path, capsys):
    """No piece, emoji, marks of direction, a sentence of 1,000 words; a share is set aside."""
    sentences = tiny.sentences(12, "odd")
    sentences[0][0][:], sentences[0][1][:] = ["good", "a"] * 500, ["S-person", "O"] * 500
    sentences[1][0][:2], sentences[1][1][:2] = ["\u200e", "\U0001f600"], ["S-person", "O"]
    lines = [json.dumps({"tokens": of, "tags": [tag.replace("B-", "S-").replace("I-", "E-") for tag in tags]})
             for of, tags in sentences]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    run = tag_words(data=tmp_path / "all.jsonl", val_split=0.3)
    said = capsys.readouterr().out
    assert "tags are BIOES" in said and "sentences" in said and "tags against BIOES" in said
    assert "1 sentence longer than the 64 pieces of --max-length: read in windows" in said
    assert r"1 word without a piece ('\u200e'): predicted as O" in said
    assert "on val, which chose best.pt" in said and re.search(r"^val: precision \d", said, re.M)
    assert (run / "val_predictions.csv").exists()


@pytest.mark.parametrize("options, said", [
    ({"data": None}, "--data is needed"),
    ({"data": "nowhere"}, "no such file or folder: nowhere"),
    ({"max_length": 65}, "--max-length 65: this bert has positions for 64 pieces"),
    ({"cache_features": 1}, "--cache-features only has a meaning with a frozen encoder"),
    ({"class_weights": "person=3"}, "person"),
    ({"weights": "none", "l2_sp": 0.1}, "--l2-sp only has a meaning with a pretrained encoder"),
    ({"freeze": "bert.layer"}, "'bert.layer' matches no layer"),
])
def test_mistakes_are_one_line(tag_words, error_of, options, said):
    assert said in error_of(tag_words, **options)


def test_a_file_that_is_broken_names_its_line(tag_words, error_of, tmp_path):
    (tmp_path / "train.conll").write_text("good\tB-person\na\n")
    assert "train.conll, line 2: 'a' has no tag" in error_of(tag_words, data=tmp_path)


# ---- what was learned, and its use


@pytest.fixture(scope="module")
def learned(tiny_bert, tmp_path_factory):
    """(data, run, what it said) of a training that has learned the names. Not to be changed by a test."""
    import contextlib
    import io

    data = tiny.write_tagged(tmp_path_factory.mktemp("tagged"), train=150, val=20, test=30)
    run = tmp_path_factory.mktemp("learned") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_token_classifier.main(command_line(["--no-report"], {
            "data": data, "output": run, "model": tiny_bert, "weights": "none", "epochs": 5, "batch_size": 8,
            "lr": 0.003, "dropout": 0, "amp": "off", "max_length": 40}))
    return data, run, said.getvalue()


def test_names_are_learned_and_the_log_says_so(learned):
    data, run, said = learned
    rows = list(history(run))
    assert float(rows[-1]["val_f1"]) > 0.9 and float(rows[-1]["words_per_second"]) > 0
    assert {"val_precision", "val_recall", "val_macro_f1", "val_accuracy"} <= rows[0].keys()
    last = [line for line in said.splitlines() if line.startswith("test")][-1]
    found = re.fullmatch(r"test: precision (\d\.\d{4})  recall (\d\.\d{4})  f1 (\d\.\d{4})", last)
    assert found and float(found[3]) > 0.9
    assert "tags are IOB2" in said and "by always saying O" in said and "next: python predict_text.py" in said
    state = read(run / "best.pt")
    assert state["classes"] == ["O", "B-person", "I-person", "B-place", "I-place"]


def test_a_column_more_and_the_same_scores(learned, tmp_path, capsys):
    """The third column, read again, gives the scores that the training has printed."""
    data, run, said = learned
    predict_text.main(["--checkpoint", str(run / "best.pt"), str(data / "test.conll"), "--conll", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    test = next(line for line in said.splitlines() if line.startswith("test: "))
    assert printed.splitlines()[-1] == f"{test.removeprefix('test: ')} on 30 sentences"
    before, after = (path.read_text().split("\n") for path in (data / "test.conll", tmp_path / "out"))
    assert [line.rpartition("\t")[0] for line in after] == before
    sentences = words.read(data / "test.conll").sentences
    given = [s.tags for s in words.read(tmp_path / "out").sentences]
    assert f"test: {words.describe_scores(words.count(sentences, given))}" == test


TEXTS = ["a good xu film, not awful!", "the plot", "nice", "was great xu xu and a poor yo actor"]


def test_the_pipeline_of_transformers_finds_the_same(learned, tmp_path, capsys):
    _, run, _ = learned
    folder = tmp_path / "saved"
    predict_text.main(["--checkpoint", str(run / "best.pt"), "--save-pretrained", str(folder)])
    assert "token-classification" in capsys.readouterr().out
    predict_text.main(command_line([word for line in TEXTS for word in ("--text", line)], {
        "checkpoint": run / "best.pt", "csv": tmp_path / "found.csv"}))
    shown = capsys.readouterr().out
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["text", "start", "end", "entity", "prediction", "probability"]
    pipeline = transformers.pipeline("token-classification", str(folder), aggregation_strategy="first", device="cpu")
    for line in TEXTS:
        expected = [(e["start"], e["end"], e["entity_group"], pytest.approx(float(e["score"]), abs=1e-5))
                    for e in pipeline(line)]
        own = [(int(row["start"]), int(row["end"]), row["prediction"], float(row["probability"]))
               for row in rows if row["text"] == line and row["entity"]]
        assert own == expected and all(line[start:end] for start, end, *_ in own)
    assert [row["entity"] for row in rows][:4] == ["good xu", "awful", "", "nice"]
    assert "good xu" in shown and "person" in shown


def test_texts_of_all_kinds_are_predicted(learned, tmp_path, capsys):
    """Lines, long ones, of marks alone; the mean of two checkpoints is that of one."""
    _, run, _ = learned
    (tmp_path / "lines.txt").write_text("\u200e\n" + "the plot is good xu and " * 30 + "\n")
    options = {"checkpoint": run / "best.pt", "csv": tmp_path / "one.csv"}
    predict_text.main(command_line([tmp_path / "lines.txt"], options))
    assert "read in windows" in capsys.readouterr().err
    predict_text.main(command_line([tmp_path / "lines.txt", "--checkpoint", run / "best.pt"],
                                   options | {"csv": tmp_path / "two.csv"}))
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    with open(tmp_path / "one.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["entity"] == "" and [row["entity"] for row in rows[1:]] == ["good xu"] * 30
    assert [int(row["start"]) for row in rows[1:]] == [24 * i + 12 for i in range(30)]


@pytest.mark.parametrize("options, said", [
    (["x.conll", "--conll", "x.conll"], "--conll x.conll exists"),
    (["x.conll", "--conll", "no/where"], "there is no folder for --conll no/where"),
    (["x.jsonl", "--conll", "y"], "is called one of JSON"),
    (["--text", "a", "--conll", "y"], "name one file"),
    (["--text", "a", "--top-k", "2"], "--top-k is for classes of texts"),
    (["--text", "a", "--text-2", "b"], "--text-2 is for classes of texts"),
    (["broken.conll"], "broken.conll, line 1: the tag 'B-' has no type"),
])
def test_what_is_for_classes_of_texts_alone(learned, error_of, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.conll").write_text("a\tO\n")
    (tmp_path / "broken.conll").write_text("a\tB-\n")
    assert said in error_of(predict_text.main, ["--checkpoint", str(learned[1] / "best.pt"), *options])
    assert (tmp_path / "x.conll").read_text() == "a\tO\n"


def test_the_page_names_mistakes_in_their_sentences(learned, tmp_path):
    """On predictions with one mistake of each kind."""
    _, run, _ = learned
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("history.csv", "args.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    rows = [["Eve in Rome", 0, 3, "Eve", "person", "person", 0.9], ["Eve in Rome", 7, 11, "Rome", "place", "person", 0.8],
            ["to Oslo", 3, 7, "Oslo", "place", "", 0.7], ["<b>now</b>", 0, 3, "<b>", "", "place", 0.6]]
    with open(folder / "test_predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "start", "end", "entity", "truth", "prediction", "probability"], *rows])
    assert [path.name for path in report.write_report(folder)] == ["curves.png", "report.html"]
    page = (folder / "report.html").read_text()
    assert "0.3333, 0.3333, 0.3333" in page and "1 missed, 1 invented, 1 of the wrong type" in page
    cells = [re.findall("<td>(.*?)</td>", line) for line in page.splitlines()]
    assert ["person", "0.5000", "1.0000", "0.6667", "1", "2"] in cells and ["to Oslo", "Oslo", "place", "-", "70.0%"] in cells
    assert ["Eve in Rome", "Rome", "place", "person", "80.0%"] in cells
    assert ["&lt;b&gt;now&lt;/b&gt;", "&lt;b&gt;", "-", "place", "60.0%"] in cells
