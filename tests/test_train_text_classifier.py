"""train_text_classifier.py as a user runs it, on a tiny BERT with random weights."""

import importlib
import json
import shutil

import pytest
import torch
import transformers

import pages
import tiny_bert as tiny
import train_text_classifier
from conftest import ROOT, changed, read
from test_interruptions import assert_the_same_run, stop_at
from test_train_classifier import history


def test_cached_features_change_nothing(classify_text):
    plain, cached = (classify_text(freeze="backbone", pool="mean", epochs=2, cache_features=views) for views in (0, 1))
    a, b = read(plain / "last.pt"), read(cached / "last.pt")
    assert not changed(a["model"], b["model"]) and a["history"][1]["val_loss"] == b["history"][1]["val_loss"]
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    assert (plain / "test_predictions.csv").read_text() == (cached / "test_predictions.csv").read_text()
    assert (cached / "features_train_0.bin").exists()


def test_a_frozen_encoder_is_bit_identical_and_thaws(classify_text, tiny_bert):
    from safetensors.torch import load_file

    before = load_file(tiny_bert / "model.safetensors")
    run = classify_text("--freeze", "backbone", "--unfreeze", "1:bert.encoder.layer.1", epochs=2, lr=0.01, keep_every=1)
    first, last = read(run / "epoch_0.pt")["model"], read(run / "last.pt")["model"]
    assert {name for name in before if not torch.equal(first[f"bert.{name}"], before[name])} == set()
    moved = changed(first, last)
    assert moved == {name for name in last if name.startswith(("bert.encoder.layer.1.", "classifier."))}


def test_stopped_and_gone_on_with_it_is_the_same_run(classify_text, monkeypatch, capsys):
    options = ["--freeze", "to:bert.encoder.layer.0", "--unfreeze", "1:all", "--accumulate", "2", "--l1", "1e-6",
               "--class-weights", "balanced", "--l2-sp", "0.01"]
    whole = classify_text(*options, epochs=2, batch_size=3)
    broken = whole.with_name("broken")
    for workers, moment in ((0, 1), (1, 3), (0, 2), (0, 2)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment)
            classify_text(*options, "--resume", epochs=2, batch_size=3, output=broken, workers=workers)
        assert stopped.value.code == 130
    assert f"python train_text_classifier.py --resume {broken}/last.pt" in capsys.readouterr().err
    train_text_classifier.main(["--resume", str(broken / "last.pt")])
    assert_the_same_run(whole, broken)


def test_what_the_words_say_is_learned(classify_text, tmp_path, capsys):
    """By a tiny network from random weights; in best.pt is all that is needed to use it."""
    data = tiny.write_reviews(tmp_path / "many.csv", train=300, val=40, test=40)
    run = classify_text(data=data, weights="none", epochs=6, batch_size=16, lr=0.003, dropout=0)
    assert "pieces per text: median" in capsys.readouterr().out
    rows = list(history(run))
    assert float(rows[-1]["val_accuracy"]) > 0.9 and float(rows[-1]["texts_per_second"]) > 0
    state = read(run / "best.pt")
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**json.loads(state["build"]["config"]) | {"num_labels": 2}))
    model.load_state_dict(state["model"])
    assert state["classes"] == ["negative", "positive"] and "tokenizer.json" in state["build"]["tokenizer"]


def test_pairs_in_json_lines_and_files_for_each_split(classify_text, tmp_path):
    for split, count in (("train", 24), ("dev", 8)):
        lines = [json.dumps({"premise": words, "hypothesis": "a film", "relation": name}) for words, name in tiny.rows(count, split)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    run = classify_text(data=tmp_path, text_column="premise,hypothesis", target="relation")
    rows = (run / "val_predictions.csv").read_text().splitlines()
    assert rows[0] == "text,text_2,truth,prediction,probability" and len(rows) == 9 and ",a film,positive," in "\n".join(rows)


def test_layers_without_weights_train_with_the_head(classify_text, tiny_bert, tmp_path, capsys):
    """The file lacks the pooler: left frozen, it would be noise in silence."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    run = classify_text(model=folder, freeze="backbone")
    said = capsys.readouterr().out
    assert "new: classifier, bert.pooler.dense" in said
    assert read(run / "best.pt")["fresh"] == ["bert.pooler.dense"]
    train_text_classifier.main(["--model", str(folder), "--list-layers", "--freeze", "backbone"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bert.pooler"))
    assert "trains" in line


def test_the_edits_of_the_pages_work_here_too(classify_text, monkeypatch, tmp_path):
    """docs/editing.md: a loss with a parameter of its own, a schedule of PyTorch's, a metric; all at once."""
    hunks = [*pages.edits("learned_scale"), *pages.edits("one_cycle"), *pages.edits("kappa")[1:]]
    lines = pages.edit((ROOT / "train_text_classifier.py").read_text().splitlines(), hunks)
    (tmp_path / "train_edited_texts.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train_text_classifier, "main", importlib.import_module("train_edited_texts").main)
    state = read(classify_text(epochs=2) / "last.pt")
    assert state["loss"] == "LearnedScale" and state["scheduler"]["last_epoch"] == state["step"] == 14
    assert "val_kappa" in state["history"][1] and "scale" in state["criterion"]


def test_a_rate_is_suggested_and_a_page_is_written(classify_text, tmp_path, capsys):
    data = tiny.write_reviews(tmp_path / "many.csv", train=300, val=4)
    run = classify_text("--find-lr", data=data, weights="none", batch_size=16, dropout=0)
    assert "suggested: --lr" in capsys.readouterr().out and (run / "find_lr.png").exists()
    run = classify_text(no_report=None)
    said = capsys.readouterr().out
    assert "look at " in said and "next: python predict_text.py" in said
    assert "texts" in (run / "report.html").read_text()


@pytest.mark.parametrize("options, words", [
    ({"text_column": "words"}, "has no column 'words'"),
    ({"target": "sentiment"}, "has no column 'sentiment'"),
    ({"max_length": 65}, "--max-length 65: this bert has positions for 64 pieces"),
    ({"max_length": 2}, "leaves no room for a text"),
    ({"cache_features": 1}, "--cache-features only has a meaning with a frozen encoder"),
    ({"cache_features": 2, "freeze": "backbone"}, "2 is out of range"),
    ({"freeze": "bert.layer"}, "'bert.layer' matches no layer"),
    ({"weights": "none", "l2_sp": 0.1}, "--l2-sp only has a meaning with a pretrained encoder"),
    ({"data": "nowhere.csv"}, "no such file or folder: nowhere.csv"),
    ({"data": None}, "--data is needed"),
    ({"text_column": "text,label,split"}, "--text-column names one column, or the two of a pair"),
])
def test_mistakes_are_one_line(classify_text, error_of, options, words):
    assert words in error_of(classify_text, **options)


@pytest.mark.parametrize("content, words", [
    ("text,label\n,a\nx,b\ny,a\nz,b\n", "line 2: an empty text"),
    ("text,label\nx,a\ny,a\n", "all texts of train are of the class 'a'"),
    ("text,label\nx,a\ny,\n", "line 3: label is empty"),
    ("\0\1\2", "NUL bytes"),
    ("", ""),
])
def test_tables_that_cannot_be_learned(classify_text, error_of, tmp_path, content, words):
    (tmp_path / "t.csv").write_text(content)
    assert words in error_of(classify_text, data=tmp_path / "t.csv")
