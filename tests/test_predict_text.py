"""predict_text.py as a user runs it, on a checkpoint of a tiny BERT; its answers by way of transformers alone."""

import csv
import functools
import io
import json
import os
import sys

import pytest
import torch
import transformers

import checkpoint
import predict
import predict_text
import report
import text
import tiny_bert as tiny
import train_classifier
import train_continual
import train_text_classifier
from conftest import command_line, read

LONG = "the plot is very good and " * 20  # of more pieces than the network takes
LINES = ["a good film", "the plot is dull and the actor awful and a bad scene is really not a nice film", LONG, "bad"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return tiny.write_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv", train=200, val=20, test=12)


@pytest.fixture(scope="module")
def run(reviews, tiny_bert, tmp_path_factory):
    """The folder of a training, which tells good from bad. Not to be changed by a test."""
    output = tmp_path_factory.mktemp("predict_text") / "run"
    train_text_classifier.main(command_line(["--no-report"], {
        "data": reviews, "output": output, "model": tiny_bert, "weights": "none", "dropout": 0, "lr": 0.003,
        "epochs": 5, "batch_size": 16, "amp": "off", "max_length": 40}))
    return output


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """That network as a folder of transformers. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("saved") / "new" / "folder"
    predict_text.main(["--checkpoint", str(run / "best.pt"), "--save-pretrained", str(folder)])
    return folder


@pytest.fixture
def predicted(run, tmp_path, capsys):
    """predicted(*options, checkpoint=...) predicts; what is written into the CSV, and what is printed."""

    def call(*argv, checkpoint=run / "best.pt"):
        capsys.readouterr()
        file = tmp_path / "predicted.csv"
        file.unlink(missing_ok=True)
        predict_text.main([str(word) for word in ["--checkpoint", checkpoint, "--csv", file, *argv]])
        with open(file, newline="") as lines:
            return list(csv.DictReader(lines)), capsys.readouterr()

    return call


@functools.lru_cache
def loaded(folder):
    return (transformers.AutoModelForSequenceClassification.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder))


def of_transformers(folder, *words):
    """Logits (C,) of one text, or of a pair, by transformers alone."""
    network, tokenizer = loaded(folder)
    x = tokenizer(*words, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return network(**x).logits[0]


def probabilities(rows, classes=("negative", "positive")):
    return torch.tensor([[float(row[f"p_{name}"]) for name in classes] for row in rows])


def test_the_probabilities_are_those_of_transformers(run, folder, predicted):
    """One text at a time, where predict_text.py pads texts of like length to batches; in the order of the input."""
    argv = [word for line in LINES for word in ("--text", line)]
    rows, said = predicted(*argv, "--all-probabilities", "--batch-size", 2, "--top-k", 2)
    assert [row["text"] for row in rows] == LINES
    columns = ["text", "prediction", "probability", "prediction_2", "probability_2"]
    assert list(rows[0]) == [*columns, "p_negative", "p_positive"]
    expected = torch.stack([of_transformers(folder, line) for line in LINES]).softmax(1)
    torch.testing.assert_close(probabilities(rows), expected, rtol=0, atol=1e-6)
    assert expected[0, 1] > 0.9 and expected[3, 0] > 0.9  # they are not all alike
    assert [row["prediction"] for row in rows][::3] == ["positive", "negative"]
    for row in rows:
        assert float(row["probability"]) == max(float(row["p_negative"]), float(row["p_positive"]))
        assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-6)
    assert said.err == ("note: 1 text longer than the 40 pieces of the training (--max-length): what is behind them is "
                        "not read\n")
    shown = said.out.splitlines()
    assert shown[0].split() == columns and "accuracy" not in said.out
    assert shown[3].startswith(f"{LONG[:57]}...  ") and f"{expected[0, 1]:.4f}" in shown[1] and len(shown) == 5


def test_the_saved_folder_is_the_network(run, folder, predicted, capsys):
    state = read(run / "best.pt")
    config = transformers.BertConfig(**json.loads(state["build"]["config"]) | {"num_labels": 2})
    network = transformers.BertForSequenceClassification(config).eval()
    network.load_state_dict(state["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 40
    for line in LINES:
        x = tokenizer(line, truncation=True, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(of_transformers(folder, line), network(**x).logits[0], rtol=0, atol=1e-6)
    rows, _ = predicted(*(word for line in LINES for word in ("--text", line)))
    answers = transformers.pipeline("text-classification", str(folder), truncation=True)(LINES)
    assert [answer["label"] for answer in answers] == [row["prediction"] for row in rows]
    found = [float(row["probability"]) for row in rows]
    assert [answer["score"] for answer in answers] == pytest.approx(found, abs=1e-5)
    # The tokenizer's file would cut texts off at 8 pieces, and pad all to as many.
    plain = json.loads((folder / "tokenizer.json").read_text())
    assert plain["truncation"] is None and plain["padding"] is None
    assert len(tokenizer("good " * 30)["input_ids"]) == 32 and len(tokenizer(LONG, truncation=True)["input_ids"]) == 40
    saved = json.loads((folder / "config.json").read_text())
    assert saved["id2label"] == {"0": "negative", "1": "positive"}
    assert saved["label2id"] == {"negative": 0, "positive": 1}
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_saving_writes_over_nothing_and_leaves_nothing_half(run, folder, tmp_path, capsys, error_of, monkeypatch):
    argv = ["--checkpoint", str(run / "best.pt"), "--save-pretrained"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    said = error_of(predict_text.main, [*argv, str(full)])
    assert said == f"error: {full} exists and is no empty folder: it was left as it is, give another name"
    assert "is no empty folder" in error_of(predict_text.main, [*argv, str(full / "mine")])
    assert os.listdir(full) == ["mine"] and (full / "mine").read_text() == "x"
    # The disk is full behind the weights; or what was written has other outputs.
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        full_disk = raises(OSError(28, "No space left on device"))
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full_disk)
        for name in ("empty", "below/new"):
            said = error_of(predict_text.main, [*argv, str(tmp_path / name)])
            assert said == (f"error: could not write {tmp_path / name} (No space left on device): make room there, or "
                            "write elsewhere")
    with monkeypatch.context() as patch:
        real = transformers.BertForSequenceClassification.forward

        def other(self, **x):
            found = real(self, **x)
            found.logits = found.logits + (self.config.name_or_path != "")
            return found

        patch.setattr(transformers.BertForSequenceClassification, "forward", other)
        assert "makes something else of this BertForSequenceClassification" in error_of(
            predict_text.main, [*argv, str(tmp_path / "empty")])
    assert os.listdir(tmp_path / "empty") == [] and not (tmp_path / "below/new").exists()
    predict_text.main([*argv, str(tmp_path / "empty"), "--text", "a good film"])
    said = capsys.readouterr().out
    assert f'transformers.pipeline("text-classification", "{tmp_path}/empty", truncation=True)' in said
    assert "outputs: negative, positive\n" in said and "a good film  positive" in said
    assert (tmp_path / "empty/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def raises(error):
    def function(*args, **how):
        raise error
    return function


def test_tables_are_scored(run, reviews, predicted):
    rows, said = predicted(reviews, "--split", "test")
    with open(reviews, newline="") as lines:
        expected = [row for row in csv.DictReader(lines) if row["split"] == "test"]
    assert [(row["text"], row["truth"]) for row in rows] == [(row["text"], row["label"]) for row in expected]
    with open(run / "test_predictions.csv", newline="") as lines:
        before = {row["text"]: row for row in csv.DictReader(lines)}
    for row in rows:
        assert row["prediction"] == before[row["text"]]["prediction"]
        assert float(row["probability"]) == pytest.approx(float(before[row["text"]]["probability"]), abs=1e-6)
    right = sum(row["truth"] == row["prediction"] for row in rows)
    assert f"\naccuracy {right / 12:.4f} on 12 texts of test\n" in said.out and "macro mean" in said.out
    assert said.err == ""
    rows, said = predicted(reviews)
    assert len(rows) == 232 and "on 232 texts, those it was trained on perhaps among them\n" in said.out


def test_what_is_not_scored(predicted, tmp_path):
    file = tmp_path / "new.csv"
    file.write_text("id;words;mood\n1;a good film;positive\n2;a bad film;\n3;the film;mixed\n4;dull;positive\n")
    rows, said = predicted(file, "--text-column", "words", "--target", "mood")
    assert [row["truth"] for row in rows] == ["positive", "", "", "positive"]
    right = sum(rows[i]["prediction"] == "positive" for i in (0, 3))
    assert (f"accuracy {right / 2:.4f} on 2 texts, those it was trained on perhaps among them, balanced accuracy "
            f"{right / 2:.4f} over the 1 of 2 classes that have any\n") in said.out
    assert (f"note: 1 text of a class that the model does not know (mixed): predicted, not scored ({file}, line 4)\n"
            f"note: 1 text of 4 without a class: predicted, not scored ({file}, line 3)\n") in said.err
    rows, said = predicted(file, "--text-column", "words")
    assert "truth" not in rows[0] and "accuracy" not in said.out
    assert f"note: {file} has no column 'label': nothing to score by" in said.err


def test_every_kind_of_input_in_its_order(predicted, tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("\ufeffa good film\r\nbad\r\n\r\n", encoding="utf-8")
    (tmp_path / "table.tsv").write_text("text\tlabel\tsplit\na nice plot\tpositive\ttest\ndull\tnegative\ttrain\n")
    (tmp_path / "table.jsonl").write_text('{"text": "not a\\n\\"good\\" film", "label": "negative"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("pi\u00f1ata\npoor".encode())))
    files = [tmp_path / name for name in ("table.tsv", "lines.txt", "table.jsonl")]
    rows, said = predicted(files[1], "-", *files[::2], "--text", "an end")
    found = ["a good film", "bad", "pi\u00f1ata", "poor", "a nice plot", "dull", 'not a\n"good" film', "an end"]
    assert [row["text"] for row in rows] == found
    assert [row["truth"] for row in rows] == ["", "", "", "", "positive", "negative", "negative", ""]
    assert "\nnot a \"good\" film  negative" in said.out


def test_folders(predicted, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in ("test", "val"):
        (tables / f"{name}.csv").write_text(f"text,label\n{name} good,positive\n{name} bad,negative\n")
    (tables / "train.csv").write_text("other\ncolumns\n")  # of another split, so it is not looked at
    rows, said = predicted(tables, "--split", "val")
    assert [row["text"] for row in rows] == ["val good", "val bad"] and "on 2 texts of val\n" in said.out
    (tables / "train.csv").unlink()
    rows, said = predicted(tables)
    assert len(rows) == 4 and "on 4 texts\n" in said.out  # it was not trained on these
    for name, words in (("positive/1", "nice"), ("negative/2", "poor\nplot"), ("rather/3", "a film")):
        (tmp_path / "mine/test" / name).parent.mkdir(parents=True)
        (tmp_path / "mine/test" / f"{name}.txt").write_text(f"{words}\n")
    rows, said = predicted(tmp_path / "mine/test")
    found = [(row["text"], row["truth"]) for row in rows]
    assert found == [("poor\nplot", "negative"), ("nice", "positive"), ("a film", "")]
    assert "a class that the model does not know (rather)" in said.err


@pytest.fixture
def variant(run, tmp_path):
    """variant("name", pool="mean", ...) writes the checkpoint with other entries. Returns the file."""

    def make(name, **entries):
        torch.save(read(run / "best.pt") | entries, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt"

    return make


def test_pairs(run, folder, predicted, variant, tmp_path, error_of):
    options = read(run / "best.pt")["options"] | {"text_column": ["premise", "hypothesis"], "target": "relation"}
    pairs = variant("pairs", options=options)
    halves = ("a good film", "the plot is bad")
    (tmp_path / "pairs.csv").write_text(f"relation,hypothesis,premise\npositive,{halves[1]},{halves[0]}\n")
    argv = ["--all-probabilities", tmp_path / "pairs.csv", "--text", halves[1], "--text-2", halves[0]]
    rows, _ = predicted(*argv, checkpoint=pairs)
    assert [(row["text"], row["text_2"], row["truth"]) for row in rows] == [(*halves, "positive"), (*halves[::-1], "")]
    expected = torch.stack([of_transformers(folder, *halves), of_transformers(folder, *halves[::-1])]).softmax(1)
    torch.testing.assert_close(probabilities(rows), expected, rtol=0, atol=1e-6)
    # Which text is which half matters, so the other order would be seen.
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    (tmp_path / "lines.txt").write_text("a good film\n")
    for argv, words in (
        (["--text", "a"], "takes pairs: each --text needs a --text-2, and there are 1 and 0"),
        (["--text", "a", "--text", "b", "--text-2", "c"], "there are 2 and 1"),
        (["--text", "a", "--text-2", " "], "--text number 1: an empty text"),
        ([tmp_path / "lines.txt"], "lines.txt holds single texts, and {} takes pairs: give a table with the columns "
                                   "premise and hypothesis, or --text and --text-2"),
        ([tmp_path / "pairs.csv", "--text-column", "premise"], "takes pairs: name two columns"),
        (["--checkpoint", run / "best.pt", "--text", "a"], "one takes pairs and one takes single texts"),
    ):
        said = error_of(predict_text.main, ["--checkpoint", str(pairs), *map(str, argv)])
        assert words.format(pairs) in said


def test_the_mean_of_two(run, folder, predicted, variant, error_of):
    """The second one knows the classes in another order, and has other weights."""
    model = read(run / "best.pt")["model"]
    model |= {name: -0.5 * tensor.flip(0) for name, tensor in model.items() if name.startswith("classifier")}
    other = variant("other", classes=["positive", "negative"], model=model)
    rows, _ = predicted("--checkpoint", other, "--all-probabilities", "--text", LINES[0], "--text", LINES[3])
    first = torch.stack([of_transformers(folder, LINES[i]) for i in (0, 3)])
    expected = (first.softmax(1) + (-0.5 * first).softmax(1)) / 2
    torch.testing.assert_close(probabilities(rows), expected, rtol=0, atol=1e-6)
    third = variant("third", classes=["negative", "neutral"])
    argv = ["--checkpoint", str(run / "best.pt"), "--checkpoint", str(third)]
    assert "third.pt predicts negative, neutral and " in error_of(predict_text.main, [*argv, "--text", "a"])
    assert "one --checkpoint" in error_of(predict_text.main, [*argv, "--save-pretrained", "x"])


def test_pool_mean(run, folder, predicted, variant, tmp_path, error_of):
    model = {name: tensor for name, tensor in read(run / "best.pt")["model"].items() if "pooler" not in name}
    mean = variant("mean", pool="mean", model=model)
    rows, _ = predicted("--all-probabilities", *(word for line in LINES for word in ("--text", line)), checkpoint=mean)
    encoder = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for line, found in zip(LINES, probabilities(rows), strict=True):
        with torch.no_grad():
            hidden = encoder(**tokenizer(line, truncation=True, return_tensors="pt")).last_hidden_state[0]
        logits = hidden.mean(0) @ model["classifier.weight"].T + model["classifier.bias"]
        torch.testing.assert_close(found, logits.softmax(0), rtol=0, atol=1e-6)
    said = error_of(predict_text.main, ["--checkpoint", str(mean), "--save-pretrained", str(tmp_path / "x")])
    assert "predict with predict_text.py, or train with --pool head" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize("argv, words", [
    ([], 'name files of texts to predict, or - for standard input, or give --text "A SENTENCE"'),
    (["--text", ""], "--text number 1: an empty text"),
    (["--text", "a", "--text", "caf\udce9"], "--text number 2: the character 4 is half of one"),
    (["--text", "a", "--text-2", "b"], "takes single texts: leave it out"),
    (["a good film"], "no such file or folder: a good film: name a file of texts, or give a text itself by --text"),
    (["gap.txt"], "gap.txt, line 2: an empty text"),
    (["blank.txt"], "blank.txt is empty"),
    (["gap.csv"], "gap.csv, line 3: an empty text"),
    (["other.csv"], "other.csv has no column 'text': there are words, label"),
    (["other.csv", "--text-column", "words", "--target", "mood"], "other.csv has no column 'mood'"),
    (["other.csv", "--text-column", "words,label"], "takes single texts: name one column"),
    (["other.csv", "--text-column", "words", "--split", "test"], "other.csv has no texts of the split test"),
    (["binary.txt"], "binary.txt is no UTF-8 text (byte 0)"),
    (["nul.txt"], "nul.txt holds NUL bytes"),
    (["binary.csv"], "binary.csv is a picture"),
    (["best.pt"], "best.pt"),
    (["folder"], "folder holds no table of texts"),
    (["gap.txt", "--split", "test"], "--split is for tables and folders"),
    (["--text", "a", "--target", "label"], "--target is for tables and folders"),
    (["--text", "a", "--csv", "nowhere/x.csv"], "there is no folder for nowhere/x.csv"),
    (["--text", "a", "--csv", "other.csv"], "other.csv exists with other columns: it was left as it is"),
    (["other.csv", "--text-column", "words", "--csv", "other.csv"], "would write over the texts"),
    (["--text", "a", "--all-probabilities"], "into --csv FILE: name one"),
    (["-"], "- is standard input, and nothing is led into it"),
    (["-", "-"], "name it once"),
])
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, error_of, argv, words):
    """All of them before anything is predicted."""
    monkeypatch.setattr(predict_text, "run_network", raises(AssertionError("predicted")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    (tmp_path / "folder").mkdir()
    png, start = b"\x89PNG\r\n\x1a\n", (run / "best.pt").read_bytes()[:2000]
    for name, content in (
        ("gap.txt", b"a\n\nb\n"), ("blank.txt", b" \n\n"), ("gap.csv", b"text,label\na,positive\n,negative\n"),
        ("other.csv", b"words,label\na,positive\n"), ("nul.txt", b"a\0b"), ("binary.txt", png), ("binary.csv", png),
        ("best.pt", start),
    ):
        (tmp_path / name).write_bytes(content)
    before = (tmp_path / "other.csv").read_bytes()
    assert words in error_of(predict_text.main, ["--checkpoint", str(run / "best.pt"), *argv])
    assert (tmp_path / "other.csv").read_bytes() == before


def test_pictures_and_texts_are_not_mixed_up(run, pictures, tmp_path, error_of):
    best = run / "best.pt"
    said = f"{best} takes texts, train_text_classifier.py wrote it"
    assert error_of(predict.main, ["--checkpoint", str(best), str(pictures)]) == (
        f"error: {said}, and here only a network for pictures can be used: predict_text.py is for this one")
    argv = ["--data", str(pictures), "--output", str(tmp_path / "run")]
    assert said in error_of(train_continual.main, ["--from", str(best), *argv])
    found = error_of(train_classifier.main, ["--weights", str(best), *argv])
    assert found == f"error: {said}: --weights takes those of a network for pictures"
    found = error_of(train_classifier.main, ["--resume", str(best)])
    assert "was written by train_text_classifier.py, not by train_classifier.py" in found
    of_pictures = tmp_path / "p.pt"
    names = (*checkpoint.NEEDED, "model", "options")
    torch.save(dict.fromkeys(names) | {"script": "train_classifier"}, of_pictures)
    assert error_of(predict_text.main, ["--checkpoint", str(of_pictures), "--text", "a"]) == (
        f"error: {of_pictures} takes pictures, train_classifier.py wrote it, and here only a network for texts can be "
        "used: predict.py is for this one")


def test_what_comes_next_after_a_training(run):
    last = report.sum_up(run, read(run / "best.pt")["history"], "val_accuracy", False).splitlines()[-1]
    assert last == f"next: python predict_text.py --checkpoint {run}/best.pt TEXTS"


def test_weights_that_do_not_fit_are_one_line(variant, run, error_of):
    model = {name: tensor for name, tensor in read(run / "best.pt")["model"].items() if "pooler" not in name}
    said = error_of(predict_text.main, ["--checkpoint", str(variant("less", model=model)), "--text", "a"])
    assert "the weights of the checkpoint do not fit its network" in said
    assert text.network_of(read(run / "best.pt")).config.id2label == {0: "negative", 1: "positive"}
