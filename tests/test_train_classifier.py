"""train_classifier.py as a user runs it, on small drawn pictures and a small network."""

import csv
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import checkpoint
import data
import metrics
import predict
import report
import train_classifier
import train_continual
from conftest import MODEL, SMALL, changed, command_line, draw, draw_folder, read
from model import rebuild
from test_data import wrong_folders
from test_model import Payload

TIMING = ("seconds", "images_per_second", "texts_per_second", "words_per_second")
SGD = {"optimizer": "sgd", "momentum": 0, "wd": 0, "schedule": "constant", "warmup_epochs": 0, "lr": 0.5}


def history(run):
    with open(run / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def equal(a, b):
    """Deep equality, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


# ---- frozen means frozen


def test_a_frozen_backbone_is_bit_identical_after_20_steps(train, weights):
    run = train("--freeze", "backbone", weights=weights, batch_size=2, epochs=2)
    before, state = read(weights), read(run / "last.pt")
    assert state["step"] == 20
    after = state["model"]
    for key in before:  # running_mean, running_var and num_batches_tracked included
        if not key.startswith("fc."):
            assert torch.equal(after[key], before[key]), key
    assert any("num_batches_tracked" in k for k in before)
    untrained = read(train("--freeze", "backbone", weights=weights, lr=0, batch_size=2) / "last.pt")["model"]
    assert changed(untrained, after) == {"fc.weight", "fc.bias"}


def test_exactly_the_named_layers_thaw(train, weights):
    run = train("--freeze", "backbone", "--unfreeze", "1:stage4,conv5.1", weights=weights, epochs=2)
    before, after = read(weights), read(run / "last.pt")["model"]
    at_the_thaw = read(run / "before_unfreeze_1.pt")["model"]
    moved = {k for k in before if not k.startswith("fc.") and not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith(("stage4.", "conv5.1."))}
    assert {k for k in changed(at_the_thaw, after)} == moved | {"fc.weight", "fc.bias"}


def test_without_freeze_everything_moves(train, weights):
    before, after = read(weights), read(train(weights=weights) / "last.pt")["model"]
    assert {k for k in before if not k.startswith("fc.") and torch.equal(before[k], after[k])} == set()


# ---- resume


def interrupted(train, monkeypatch, tmp_path, *options, after, **replaced):
    """Train until `after` epochs are saved, then as if Ctrl-C had been pressed. Returns the run folder."""
    real, epochs = checkpoint.save, []

    def save(state, folder, **kwargs):
        real(state, folder, **kwargs)
        epochs.append(state["epoch"])
        if state["epoch"] == after and kwargs["name"] == "last.pt":
            raise KeyboardInterrupt

    output = replaced.pop("output", tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(SystemExit) as stopped:
            train(*options, output=output, **replaced)
    assert stopped.value.code == 130
    return output


@pytest.mark.parametrize("case", ["frozen", "thawed", "dropout and fp16"])
def test_resume_is_bit_identical(train, monkeypatch, tmp_path, weights, case, capsys):
    options, replaced = ["--freeze", "backbone"], {"weights": weights, "epochs": 3}
    if case == "thawed":
        options += ["--unfreeze", "1:stage4", "--unfreeze", "2:conv5", "--accumulate", "2", "--l1", "1e-5", "--clip-grad", "1"]
    if case == "dropout and fp16":
        options = ["--optimizer", "sgd"]
        replaced |= {"weights": "none", "model": "mobilenet_v3_small", "amp": "fp16"}
    whole = train(*options, **replaced)
    broken = interrupted(train, monkeypatch, tmp_path, *options, after=2, **replaced)
    capsys.readouterr()
    train_classifier.main(["--resume", str(broken / "last.pt"), "--workers", "2"])  # another number of workers too
    assert "at epoch 2" in capsys.readouterr().out
    for name in ("last.pt", "best.pt"):
        a, b = read(whole / name), read(broken / name)
        for key in ("model", "optimizer", "scaler", "rng", "best", "best_epoch", "epoch", "step"):
            assert equal(a[key], b[key]), key
        assert equal(untimed(a["history"]), untimed(b["history"]))
    assert untimed(history(whole)) == untimed(history(broken))
    assert [row["epoch"] for row in history(broken)] == ["0", "1", "2"]
    assert (whole / "test_predictions.csv").read_text() == (broken / "test_predictions.csv").read_text()


def test_the_same_command_goes_on_by_itself(train, monkeypatch, pictures, tmp_path):
    options = ["--resume", "--freeze", "backbone", "--unfreeze", "1:stage4"]
    output = interrupted(train, monkeypatch, tmp_path, *options, after=1, epochs=2, output=tmp_path / "again")
    assert output == tmp_path / "again"
    train(*options, epochs=2, output=output)
    assert [row["epoch"] for row in history(output)] == ["0", "1"]
    train(*options, epochs=2, output=output)  # complete: it scores once more and ends
    assert len(history(output)) == 2


def test_resume_may_change_some_options_and_refuses_the_others(train, weights, error_of, pictures, tmp_path):
    run = train("--freeze", "backbone", "--unfreeze", "1:stage4", weights=weights, epochs=2)
    last = run / "last.pt"
    before = last.read_bytes()

    def resume(*options):
        return error_of(train_classifier.main, ["--resume", str(last), *map(str, options)])

    assert "--model is resnet18 but the run was started with " + MODEL in resume("--model", "resnet18")
    assert "--seed is 3 but the run was started with 0" in resume("--seed", 3)
    assert "--image-size is 64" in resume("--image-size", 64)
    assert "--freeze is none" in resume("--freeze", "none")
    assert "--batch-size times --accumulate is 4 but the run was started with 8" in resume("--batch-size", 4)
    assert "is a folder: give the file" in error_of(train_classifier.main, ["--resume", str(run)])
    assert "what thawed before epoch 2 cannot be changed: that was 1:stage4" in resume("--unfreeze", "1:conv5", "--epochs", 3)
    other = draw_folder(tmp_path / "other", train=3, val=1)
    words = resume("--data", other)
    assert "other pictures (train 6, val 2, " in words and "started with (train 20, val 8, " in words
    second = train()
    assert "already holds a run" in resume("--output", second)
    assert last.read_bytes() == before

    shutil.copytree(pictures, tmp_path / "moved")
    train_classifier.main(["--resume", str(last), "--epochs", "4", "--unfreeze", "3:all", "--lr", "0.01", "--wd", "0.5",
                           "--batch-size", "4", "--accumulate", "2", "--data", str(tmp_path / "moved")])
    state = read(last)
    assert state["epoch"] == 4 and state["options"]["unfreeze"] == ["1:stage4", "3:all"] and state["step"] == 12
    assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0.5, 0.0}
    assert float(history(run)[-1]["lr"]) < 0.01 * 0.5 and len(history(run)) == 4


def test_going_back_before_a_thaw(train, weights, tmp_path, capsys, monkeypatch):
    accuracies = iter([0.75, 0.5, 0.25])

    def falling(*_):
        return {"accuracy": next(accuracies), "balanced_accuracy": 0.5, "macro_f1": 0.5}

    with monkeypatch.context() as patch:  # the first epoch is the best
        patch.setattr(metrics, "class_scores", falling)
        run = train("--freeze", "backbone", "--unfreeze", "1:stage4", weights=weights, epochs=2)
    train_classifier.main(["--resume", str(run / "before_unfreeze_1.pt"), "--unfreeze", "1:conv5", "--output", str(run) + "b"])
    before, after = read(weights), read(Path(str(run) + "b") / "last.pt")["model"]
    moved = {k for k in before if not k.startswith("fc.") and not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith("conv5.")}
    # the run goes on without its best.pt too, and says so
    shutil.copytree(run, tmp_path / "alone", ignore=shutil.ignore_patterns("best.pt"))
    capsys.readouterr()
    monkeypatch.setattr(metrics, "class_scores", falling)
    train_classifier.main(["--resume", str(tmp_path / "alone" / "last.pt"), "--epochs", "3", "--lr", "0"])
    assert "last.pt is best.pt for now" in capsys.readouterr().out
    assert read(tmp_path / "alone" / "last.pt")["best_epoch"] == 1


def test_going_back_in_the_same_folder_keeps_what_is_left_behind(train, weights):
    """Monitored by the loss at a high rate, so that the epochs left behind hold the best.pt."""
    options = ["--freeze", "backbone", "--unfreeze", "1:stage4", "--monitor", "val_loss", "--lr", "0.003"]
    run = train(*options, weights=weights, epochs=4)
    behind = {name: read(run / f"{name}.pt") for name in ("best", "last")}
    assert behind["best"]["epoch"] > 1
    train_classifier.main(["--resume", str(run / "before_unfreeze_1.pt"), "--epochs", "2", "--lr", "0"])
    for name in ("best", "last"):
        kept = read(run / f"{name}_until_4.pt")
        assert kept["epoch"] == behind[name]["epoch"] and not changed(kept["model"], behind[name]["model"])
    assert [row["epoch"] for row in history(run)] == ["0", "1"]
    assert read(run / "best.pt")["epoch"] in (1, 2)  # of the epochs of this run alone
    # a second time: the way back is as it was, and what was kept is kept
    kept = read(run / "last_until_4.pt")["model"]
    train_classifier.main(["--resume", str(run / "before_unfreeze_1.pt")])
    assert read(run / "last.pt")["epoch"] == 4 and read(run / "last.pt")["options"]["lr"] == 0.003
    assert not changed(read(run / "last.pt")["model"], behind["last"]["model"])
    assert not changed(read(run / "last_until_4.pt")["model"], kept)
    train_classifier.main(["--resume", str(run / "before_unfreeze_1.pt"), "--epochs", "4", "--lr", "0"])
    assert not changed(read(run / "last_until_4_2.pt")["model"], kept)


# ---- compiled


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_compiled_the_weights_keep_their_plain_names(request, kind, weights, monkeypatch):
    """With a stand-in for torch.compile that, like it, holds the network as _orig_mod. (The real one takes a minute.)"""
    run, calls = request.getfixturevalue({"classifier": "train", "regressor": "regress"}[kind]), []

    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            calls.append(len(x))
            return self._orig_mod(x)

    options = ["--freeze", "backbone", "--unfreeze", "1:stage4"]
    plain = run(*options, weights=weights, epochs=2)
    monkeypatch.setattr(torch, "compile", Compiled)
    compiled = run(*options, "--compile", weights=weights, epochs=2)
    assert len(calls) > 8
    assert not changed(read(plain / "last.pt")["model"], read(compiled / "last.pt")["model"])
    assert untimed(history(plain)) == untimed(history(compiled))


# ---- what is saved


def test_what_best_holds_loads_into_plain_torchvision(train):
    run = train(epochs=2)
    state = read(run / "best.pt")
    plain = torchvision.models.get_model(MODEL, weights=None, num_classes=2)
    assert plain.load_state_dict(state["model"], strict=True)
    assert state["classes"] == ["cat", "dog"]
    assert sorted(os.listdir(run)) == ["args.json", "best.pt", "history.csv", "last.pt", "test_predictions.csv"]
    assert json.loads((run / "args.json").read_text())["model"] == MODEL
    row = history(run)[0]
    assert list(row) == ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_balanced_accuracy",
                         "val_macro_f1", "lr", "grad_norm", "loss_scale", "skipped_steps", "unreadable", "seconds",
                         "images_per_second"]
    assert 0 <= float(row["val_accuracy"]) <= 1


@pytest.mark.parametrize("monitor, better", [("val_loss", min), ("val_accuracy", max), ("val_balanced_accuracy", max)])
def test_best_is_the_epoch_of_the_best_monitored_value(train, monitor, better):
    run = train("--monitor", monitor, epochs=4, lr=0.01)
    values = [float(row[monitor]) for row in history(run)]
    state = read(run / "best.pt")
    equal_ones = {float(row["val_loss"]): int(row["epoch"]) for row in history(run) if float(row[monitor]) == better(values)}
    assert state["best"] == better(values) and state["best_epoch"] == equal_ones[min(equal_ones)]
    assert state["epoch"] == state["best_epoch"] + 1


def test_of_equal_scores_the_lowest_val_loss_is_the_best_and_no_gain(train, monkeypatch, capsys):
    """Also when the run was stopped between the epochs; patience counts from the first of the equal ones."""
    monkeypatch.setattr(metrics, "class_scores", lambda *_: {"accuracy": 0.75, "macro_f1": 0.7})
    options, lr = ["--schedule", "constant", "--augment", "none"], 0.003

    def states(run):
        return read(run / "last.pt"), read(run / "best.pt")

    run = train(*options, lr=lr, epochs=5)
    losses_of_epochs = [float(row["val_loss"]) for row in history(run)]
    best = losses_of_epochs.index(min(losses_of_epochs))
    assert best > 0
    last, saved = states(run)
    assert (last["best"], last["best_epoch"], last["epochs_without_gain"]) == (0.75, best, 4)
    assert saved["epoch"] == best + 1 and report.best_row(last["history"], "val_accuracy") == best
    assert f"best.pt: epoch {best}, val_accuracy 0.7500" in capsys.readouterr().out

    broken = train(*options, lr=lr, epochs=1)
    for epochs in (2, 5):
        train("--resume", "--epochs", epochs, output=broken, **dict.fromkeys(SMALL), data=None)
    resumed = states(broken)
    assert [s["best_epoch"] for s in resumed] == [s["best_epoch"] for s in (last, saved)]
    assert equal(resumed[1]["model"], saved["model"])

    run = train(*options, "--patience", 3, lr=lr, epochs=9)
    assert len(history(run)) == 4


def test_early_stopping(train, capsys):
    run = train("--patience", 2, "--monitor", "val_loss", "--freeze", "backbone", lr=0, epochs=9)  # cannot get better
    assert len(history(run)) == 3 and read(run / "last.pt")["best_epoch"] == 0
    assert "stopped early: no better val_loss for 2 epochs" in capsys.readouterr().out


def test_the_predictions_are_those_of_best_on_test(train, pictures, capsys):
    run = train(epochs=2)
    out = capsys.readouterr().out
    with open(run / "test_predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(r["file"] for r in rows) == sorted(str(p) for p in (pictures / "test").rglob("*.png"))
    accuracy = sum(r["truth"] == r["prediction"] for r in rows) / len(rows)
    assert f"accuracy {accuracy:.4f} on the 6 pictures of test" in out
    # another route: plain torchvision, PIL and the preset transform
    plain = torchvision.models.get_model(MODEL, weights=None, num_classes=2).eval()
    plain.load_state_dict(read(run / "best.pt")["model"])
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=37)
    for row in rows:
        p = plain(preset(data.decode(row["file"]))[None]).softmax(1)[0]
        assert p.max().item() == pytest.approx(float(row["probability"]), abs=0.02)  # resized as floats there, as uint8 here


def test_a_class_that_val_lacks_and_a_test_folder_without_labels(train, capsys, tmp_path):
    root = draw_folder(tmp_path / "data", train=4, val=2)
    for i in range(4):
        draw(root / f"train/rare/{i}.png", "cat", i)
        draw(root / f"test/{i}.png", "cat", i)
    run = train(data=root)
    said = capsys.readouterr().out
    assert "note: val/ has no pictures of rare: trained, but not scored\n" in said
    assert f"best.pt {root}/test\n" in said and "accuracy" in said and "on the 4 pictures of val, which chose best.pt" in said
    assert not (run / "test_predictions.csv").exists()
    with open(run / "val_predictions.csv", newline="") as file:
        rows = [(row["truth"], row["prediction"]) for row in csv.DictReader(file)]
    hits = [sum(pair == (name, name) for pair in rows) for name in ("cat", "dog", "rare")]
    both = [sum(name in pair for pair in rows) for name in ("cat", "dog", "rare")]  # in the truth, the prediction, or both
    f1 = [2 * hit / (hit + n) for hit, n in zip(hits, both, strict=True) if n]
    assert float(history(run)[-1]["val_macro_f1"]) == pytest.approx(sum(f1) / len(f1))
    assert float(history(run)[-1]["val_balanced_accuracy"]) == pytest.approx(sum(hits) / 4)


def test_pictures_that_have_moved(train, error_of, tmp_path):
    root = draw_folder(tmp_path / "data", train=3, val=2)
    run = train(data=root)
    root.rename(tmp_path / "moved")
    resume = ["--resume", str(run / "last.pt"), "--epochs", "2"]
    assert f"no such folder: {root}: see how it is spelled; if the pictures have moved, say where" in error_of(train_classifier.main, resume)
    train_classifier.main([*resume, "--data", str(tmp_path / "moved")])
    assert len(history(run)) == 2


def test_the_test_split_is_read_once_and_last(train, monkeypatch):
    read_splits, real = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *a: (read_splits.append(Path(path).parts[-3]), real(path, *a))[1])
    train(epochs=2)
    assert read_splits.count("test") == 6 and set(read_splits[-6:]) == {"test"}
    assert read_splits.count("train") == 40 and read_splits.count("val") == 16


# ---- what each option does, by another route


def test_one_sgd_step_by_hand(train, weights, pictures):
    """The whole chain (order, augmentation, normalization, frozen statistics, weighted loss, L1) in ten plain lines."""
    options = ["--freeze", "backbone", "--class-weights", "dog=3", "--label-smoothing", "0.1", "--l1", "0.01", "--seed", "4"]
    run = train(*options, weights=weights, batch_size=32, **SGD)
    start = read(train(*options, weights=weights, batch_size=32, **SGD | {"lr": 0}) / "last.pt")["model"]

    model = torchvision.models.get_model(MODEL, num_classes=2).eval()
    model.load_state_dict(start)
    samples = [(p, y) for y, c in enumerate(("cat", "dog")) for p in sorted((pictures / "train" / c).iterdir())]
    listed = data.ImageList([(str(p), y) for p, y in samples], data.train_transform(32), seed=4)
    order = data.SeededBatches(20, 32, seed=4, shuffle=True)
    keys = next(iter(order))
    x = torch.stack([listed[key][0] for key in keys]).float() / 255
    y = torch.tensor([samples[i][1] for _, i in keys])
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), label_smoothing=0.1)(model(x), y)
    loss += 0.01 * model.fc.weight.abs().sum()
    loss.backward()
    after = read(run / "last.pt")["model"]
    for name, parameter in model.fc.named_parameters():
        torch.testing.assert_close(after[f"fc.{name}"], parameter.detach() - 0.5 * parameter.grad, rtol=1e-4, atol=1e-6)
    assert float(history(run)[0]["train_loss"]) == pytest.approx(loss.item() - 0.01 * model.fc.weight.abs().sum().item(), rel=1e-4)


def test_accumulated_batches_are_one_large_batch(train, weights):
    """20 pictures as 12 + 8, the second step incomplete: in batches of 4 by three, of 2 by six, and whole. And in one step:
    in batches of 8, 8 and 4, which count by their pictures.
    """
    whole, cut = (train("--freeze", "backbone", "--accumulate", n, weights=weights, batch_size=size, **SGD)
                  for size, n in ((32, 1), (8, 3)))
    a, b = (read(run / "last.pt")["model"]["fc.weight"] for run in (whole, cut))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    found = []
    for batch_size, accumulate in ((12, 1), (4, 3), (2, 6)):
        run = train("--freeze", "backbone", "--accumulate", accumulate, weights=weights, batch_size=batch_size, **SGD)
        found.append(read(run / "last.pt"))
    assert [f["step"] for f in found] == [2, 2, 2]
    for other in found[1:]:
        torch.testing.assert_close(other["model"]["fc.weight"], found[0]["model"]["fc.weight"], rtol=1e-4, atol=1e-6)


def one_step(train, weights, *options, **replaced):
    """What one SGD step changes, by parameter name."""
    runs = [train(*options, weights=weights, batch_size=32, **SGD | replaced | lr) for lr in ({"lr": 0}, {})]
    before, after = (read(run / "last.pt")["model"] for run in runs)
    names = dict(torchvision.models.get_model(MODEL, num_classes=2).named_parameters())
    return {k: after[k] - before[k] for k in names}, history(runs[1])[0]


def test_a_weight_of_ten_makes_a_gradient_ten_times_as_large_in_the_plain_mean(train, weights):
    """Ten cats of weight 1 and ten dogs of weight 3: divided by 20 in place of 40, the step is twice as long."""
    options = ["--freeze", "backbone", "--class-weights", "dog=3", "--label-smoothing", "0.1"]
    weighted, row = one_step(train, weights, *options)
    plain, plain_row = one_step(train, weights, *options, "--class-weight-mean", "plain")
    torch.testing.assert_close(plain["fc.weight"], 2 * weighted["fc.weight"], rtol=1e-4, atol=1e-6)
    assert float(plain_row["train_loss"]) == pytest.approx(2 * float(row["train_loss"]), rel=1e-5)


@pytest.mark.parametrize("mixing, loss", [
    (["--mixup", 0.5], ["--class-weights", "dog=3", "--label-smoothing", "0.1"]),
    (["--cutmix", 1, "--mixup", 0.5], ["--loss", "focal", "--focal-gamma", "1.5"]),
    ([], ["--loss", "soft-f1"]), ([], ["--loss", "cost", "--costs", "dog:cat=10"]),
    (["--cutmix", 1], ["--loss", "cost", "--costs", "dog:cat=10"]),
])
def test_mixing_and_the_losses_reach_the_step(train, weights, pictures, mixing, loss):
    """The training loss of the first batch, from data.mix and the formula of the loss written out again."""
    run = train("--freeze", "backbone", *mixing, *loss, "--seed", 4, weights=weights, batch_size=32, **SGD | {"lr": 0})
    model = torchvision.models.get_model(MODEL, num_classes=2).eval()
    model.load_state_dict(read(run / "last.pt")["model"])
    samples = data.find_images(pictures).splits["train"]
    listed = data.ImageList(samples, data.train_transform(32), seed=4)
    keys = next(iter(data.SeededBatches(20, 32, seed=4, shuffle=True)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = data.to_input(torch.stack([listed[key][0] for key in keys]), mean, std)
    labels = torch.tensor([samples[i][1] for _, i in keys])
    alphas = {k.strip("-"): float(v) for k, v in zip(mixing[::2], mixing[1::2], strict=True)}
    x, shares = data.mix(x, labels, data.mixer(2, **alphas), 4, 0, 0)
    if not mixing:
        shares = torch.eye(2)[labels]
    p = model(x).detach().softmax(1)
    if "--class-weights" in loss:
        w = torch.tensor([1.0, 3.0])
        expected = -(w * (0.9 * shares + 0.05) * p.log()).sum() / (w * shares).sum()
    elif "focal" in loss:
        expected = -(shares * (1 - p) ** 1.5 * p.log()).sum() / 20
    elif "soft-f1" in loss:
        expected = 1 - (2 * (shares * p).sum(0) / (p.sum(0) + shares.sum(0))).mean()
    else:  # a dog called a cat: 10 * -log(1 - p_cat)
        expected = -(shares[:, 1] * 10 * (1 - p[:, 0]).log() + shares[:, 0] * (1 - p[:, 1]).log()).mean()
    assert float(history(run)[0]["train_loss"]) == pytest.approx(expected.item(), rel=1e-4)
    assert ("val_cost" in history(run)[0]) == ("cost" in loss)


def test_train_accuracy_of_mixed_pictures_counts_the_larger_share(train, monkeypatch):
    """Fifteen pictures with 0.6 of the first class and five with 0.4, against the network's outputs."""
    shares, seen = torch.tensor([[0.6, 0.4]] * 15 + [[0.4, 0.6]] * 5), []
    real = torch.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(data, "mix", lambda x, y, *rest: (x, shares))
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", lambda self, x, y: (seen.append(x), real(self, x, y))[1])
    row = history(train(lr=0, freeze="backbone", batch_size=20))[0]
    expected = (seen[0].argmax(1) == torch.tensor([0] * 15 + [1] * 5)).double().mean().item()
    assert float(row["train_accuracy"]) == expected != 0.5


def test_every_batch_is_mixed_by_numbers_of_its_own(train, monkeypatch):
    seen, real = [], data.mix
    monkeypatch.setattr(data, "mix", lambda x, y, mixer, *numbers: (seen.append(numbers), real(x, y, mixer, *numbers))[1])
    train("--mixup", 0.2, "--seed", 4, epochs=2)
    assert seen == [(4, epoch, batch) for epoch in (0, 1) for batch in range(3)]


def test_rates_of_stages_and_layer_decay_reach_the_step(train, weights):
    """One SGD step is the rate times the gradient; the gradients are the same in all three runs."""
    base = ["--freeze", "to:stage2", "--backbone-lr-scale", 1]
    whole, _ = one_step(train, weights, *base)
    decay, _ = one_step(train, weights, *base, "--layer-decay", 0.5)
    stage = read(train(*base, "--unfreeze", "0:stage3@0.125", weights=weights, batch_size=32, **SGD) / "last.pt")["model"]
    start = read(train(*base, weights=weights, batch_size=32, **SGD | {"lr": 0}) / "last.pt")["model"]
    for key, step in whole.items():
        expected = step * (0.25 if key.startswith("stage3.") else 1.0)
        torch.testing.assert_close(stage[key] - start[key], expected, rtol=1e-3, atol=1e-6)
        scale = {"conv5": 1.0, "stage4": 0.5, "stage3": 0.25}.get(key.split(".")[0], 1.0)
        torch.testing.assert_close(decay[key], step * scale, rtol=1e-3, atol=1e-6)
    assert whole["stage3.0.branch1.0.weight"].abs().max() > 1e-4


def test_a_rate_of_a_past_stage_is_kept_and_may_change_on_resume(train, weights):
    run = train("--freeze", "backbone", "--unfreeze", "1:stage4@0.0005", weights=weights, epochs=2)

    def rates():
        return {g["layer"]: g["peak_lr"] for g in read(run / "last.pt")["optimizer"]["param_groups"]}

    before = rates()
    assert (before["stage4"], before["stage3"], before["fc"]) == pytest.approx((0.0005, 0.0003, 0.003))
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "3"])
    assert rates() == before
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "4", "--lr", "0.001", "--unfreeze", "1:stage4@0.0002"])
    assert rates() == pytest.approx(dict.fromkeys(before, 0.0001) | {"stage4": 0.0002, "fc": 0.001})


@pytest.mark.parametrize("model", [MODEL, "squeezenet1_1"])
def test_mlp_head_trains_resumes_and_predicts(train, monkeypatch, tmp_path, model, pictures, error_of):
    options = ["--head", "mlp", "--hidden", 6, "--dropout", 0.25]
    whole = train(*options, model=model, epochs=2)
    broken = interrupted(train, monkeypatch, tmp_path, *options, after=1, model=model, epochs=2)
    train_classifier.main(["--resume", str(broken / "last.pt")])
    state = read(whole / "last.pt")
    assert not changed(state["model"], read(broken / "last.pt")["model"])
    assert state["hidden"] == 6 and state["model"][f"{state['head']}.0.weight"].shape[0] == 6
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(whole / "best.pt"), str(pictures / "test"), "--csv", str(tmp_path / "x.csv")])
    with open(tmp_path / "x.csv", newline="") as again, open(whole / "test_predictions.csv", newline="") as first:
        assert [r["probability"] for r in csv.DictReader(again)] == [r["probability"] for r in csv.DictReader(first)]
    assert "--hidden is 7 but the run was started with 6" in error_of(
        train_classifier.main, ["--resume", str(whole / "last.pt"), "--hidden", "7"])


def test_dropout_reaches_the_networks_own(train, monkeypatch):
    """The probability that nn.functional.dropout is called with, while training."""
    seen, real = set(), nn.functional.dropout
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, training=True, inplace=False: (
        seen.add(p) if training else None, real(x, p, training, inplace))[1])
    train("--freeze", "backbone", model="mobilenet_v3_small")
    assert seen == {0.2}
    seen.clear()
    train("--freeze", "backbone", "--dropout", 0.375, model="mobilenet_v3_small")
    assert seen == {0.375}


def test_top_5_accuracy_with_more_than_five_classes(train, tmp_path):
    for split, count in (("train", 2), ("val", 2)):
        for kind in "abcdef":
            for i in range(count):
                draw(tmp_path / "six" / split / kind / f"{i}.png", "cat", f"{split}{kind}{i}")
    row = history(train("--freeze", "backbone", data=tmp_path / "six"))[0]
    assert float(row["val_accuracy"]) <= float(row["val_top5_accuracy"]) <= 1 and float(row["val_top5_accuracy"]) > 0.5
    assert "val_top5_accuracy" not in history(train())[0]


def test_backbone_lr_scale(train, weights):
    full, _ = one_step(train, weights, "--backbone-lr-scale", 1)
    half, _ = one_step(train, weights, "--backbone-lr-scale", 0.5)
    for key, step in full.items():
        torch.testing.assert_close(half[key], step * (1.0 if key.startswith("fc.") else 0.5), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("amp", ["off", "fp16"])  # with the scaler: clipped after unscaling
def test_clip_grad_and_the_recorded_norm(train, weights, amp, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=256.0, **k))  # no overflow
    free, row = one_step(train, weights, "--backbone-lr-scale", 1, amp=amp)
    norm = torch.cat([v.flatten() for v in free.values()]).norm().item() / 0.5
    assert norm > 0.1
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    clipped, row = one_step(train, weights, "--backbone-lr-scale", 1, "--clip-grad", norm / 4, amp=amp)
    assert torch.cat([v.flatten() for v in clipped.values()]).norm().item() / 0.5 == pytest.approx(norm / 4, rel=1e-3)
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-3)  # before clipping


@pytest.mark.parametrize("schedule, options, expected", [
    ("constant", [], [1, 1, 1, 1]),
    ("step", ["--step-epochs", 2, "--gamma", 0.5], [1, 1, 0.5, 0.5]),
    # lr at the last of the 3 steps of each epoch, 12 in all
    ("cosine", [], [(1 + math.cos(math.pi * s / 12)) / 2 for s in (2, 5, 8, 11)]),
    ("cosine", ["--warmup-epochs", 2], [3 / 6, 6 / 6, (1 + math.cos(math.pi * 2 / 6)) / 2, (1 + math.cos(math.pi * 5 / 6)) / 2]),
])
def test_schedules(train, schedule, options, expected):
    base = [] if "--warmup-epochs" in options else ["--warmup-epochs", 0]
    run = train("--freeze", "backbone", "--schedule", schedule, *base, *options, lr=0.01, epochs=4)
    assert [float(row["lr"]) / 0.01 for row in history(run)] == pytest.approx(expected)


def test_plateau_cuts_the_rate_when_nothing_gets_better(train, monkeypatch, tmp_path):
    """The network is scored by its all-frozen backbone at a rate of almost zero: the accuracy cannot get better."""
    options = ["--schedule", "plateau", "--plateau-epochs", 2, "--gamma", 0.5, "--warmup-epochs", 0, "--freeze", "backbone"]
    run = train(*options, lr=1e-12, epochs=6)
    assert [float(row["lr"]) / 1e-12 for row in history(run)] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25])
    broken = interrupted(train, monkeypatch, tmp_path, *options, after=4, lr=1e-12, epochs=6)
    train_classifier.main(["--resume", str(broken / "last.pt")])
    assert untimed(history(broken)) == untimed(history(run))


@pytest.mark.parametrize("name, kind", [
    ("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("rmsprop", "RMSprop"), ("adagrad", "Adagrad"),
])
def test_every_optimizer_is_pytorchs_with_its_decay(train, monkeypatch, name, kind):
    made = []
    for other, real in train_classifier.OPTIMIZERS.items():
        monkeypatch.setitem(train_classifier.OPTIMIZERS, other,
                            lambda *a, real=real, **k: (made.append(real(*a, **k)), made[-1])[1])
    train("--freeze", "backbone", optimizer=name)
    train("--freeze", "backbone", "--wd", "0.25", optimizer=name)
    assert [type(o).__name__ for o in made] == [kind, kind]
    assert {g["weight_decay"] for g in made[0].param_groups} == {0.01 if name == "adamw" else 0.0001, 0}
    for group in made[1].param_groups:
        assert group["weight_decay"] == (0.25 if all(p.ndim > 1 for p in group["params"]) else 0)
        assert group.get("momentum", 0) == (0.9 if name == "sgd" else 0)
    assert sum(g["weight_decay"] == 0.25 for g in made[1].param_groups) == 6  # of each of the six layer groups


@pytest.mark.parametrize("script", ["train", "regress", "continue_with"])
def test_a_first_step_of_sgd_that_overflows_is_passed_over_whole(request, script, monkeypatch):
    """As if it had never been: nothing of it is in the momentum. (So it often is where a GPU has fp16 alone.)"""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**60, **k))
    run = request.getfixturevalue(script)("--optimizer", "sgd", "--freeze", "backbone", amp="fp16")
    state = read(run / "last.pt")
    assert [row["skipped_steps"] for row in state["history"]] == [state["step"]] and state["step"] > 1
    assert state["scaler"]["scale"] == 2.0 ** (60 - state["step"])
    assert state["optimizer"]["state"] == {}


@pytest.fixture
def continue_with(train, weights, pictures, tmp_path):
    """continue_with(...) is train_continual.main on the same pictures."""
    def run(*options, amp):
        start, output = train(weights=weights), tmp_path / "continual"
        train_continual.main(["--from", str(start / "best.pt"), "--data", str(pictures), "--output", str(output), "--epochs", "1",
                              "--batch-size", "8", "--workers", "0", "--amp", amp, "--no-report", "--method", "freeze", *options])
        return output

    return run


def test_sgd_goes_on_when_a_part_of_a_layer_thaws(train, regress):
    for script in (train, regress):
        run = script("--optimizer", "sgd", "--freeze", "stage4.0", "--unfreeze", "1:all", epochs=2)
        assert len(history(run)) == 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_float32_weights(train, amp):
    run = train(amp=amp, epochs=2, lr=0.01)
    state = read(run / "last.pt")
    assert state["precision"] == amp
    assert all(v.dtype == torch.float32 for v in state["model"].values() if v.is_floating_point())
    assert bool(state["scaler"]) == (amp == "fp16")  # a scaler for fp16 only


def test_an_overflow_in_fp16_skips_the_step(train, weights, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**120, **k))
    run = train("--freeze", "backbone", weights=weights, amp="fp16", lr=0.1, batch_size=32)
    start = train("--freeze", "backbone", weights=weights, amp="fp16", lr=0, batch_size=32)
    assert not changed(read(run / "last.pt")["model"], read(start / "last.pt")["model"])
    assert read(run / "last.pt")["scaler"]["scale"] == 2.0**119


def test_learns_from_scratch(train, tmp_path, capsys):
    """Reddish against bluish pictures: every test picture right."""
    rng = random.Random(0)
    for split, count in (("train", 20), ("val", 5), ("test", 10)):
        for name, low in (("red", (120, 0, 0)), ("blue", (0, 0, 120))):
            (tmp_path / "colours" / split / name).mkdir(parents=True)
            for i in range(count):
                colour = tuple(v + rng.randrange(100) for v in low)
                Image.new("RGB", (40, 40), colour).save(tmp_path / "colours" / split / name / f"{i}.png")
    train(data=tmp_path / "colours", model="squeezenet1_1", epochs=5, batch_size=4)

    assert "accuracy 1.0000 on the 20 pictures of test" in capsys.readouterr().out


def test_starting_from_our_own_checkpoint_keeps_a_head_of_the_same_classes(train, capsys, tmp_path):
    first = train(epochs=1)
    capsys.readouterr()
    second = train("--freeze", "backbone", weights=first / "best.pt", lr=0, image_size=None)
    assert "head fc kept" in capsys.readouterr().out
    assert not changed(read(first / "best.pt")["model"], read(second / "last.pt")["model"])
    assert read(second / "last.pt")["preprocessing"]["image_size"] == 32
    for kind, name in (("cat", "ant"), ("dog", "bee")):
        for split, n in (("train", 4), ("val", 2)):
            for i in range(n):
                draw(tmp_path / "insects" / split / name / f"{i}.png", kind, f"{split}{i}")
    train(data=tmp_path / "insects", weights=first / "best.pt")
    assert "head fc left out, it was trained for other outputs" in capsys.readouterr().out  # as many classes, but others


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Wide pictures of 12 bits in 16: of class "first" the first half is bright, of "last" the last one."""
    root = tmp_path_factory.mktemp("deep")
    for split, count in (("train", 6), ("val", 3)):
        for name, place in (("first", 0), ("last", 48)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                levels = np.random.default_rng([i, place, count]).integers(0, 2000, (24, 96)).astype(np.uint16)
                levels[:, place : place + 48] += 2000
                Image.fromarray(levels).save(root / split / name / f"{name}.{i}.png")
    return root


def test_white_shape_and_flips_are_kept_and_the_same_everywhere(train, deep, tmp_path, capsys, error_of, monkeypatch):
    lists, real = [], data.ImageList.__init__
    monkeypatch.setattr(data.ImageList, "__init__", lambda self, *a, **k: (lists.append(self), real(self, *a, **k))[1])
    run = train("--no-flip", "--resize", "pad", "--white", 4095, data=deep, no_test=None)
    said = capsys.readouterr().out
    assert "augment: standard (random crop)\n" in said and "hint:" not in said
    state = read(run / "best.pt")
    assert {k: state["preprocessing"][k] for k in ("resize", "white", "flip")} == {"resize": "pad", "white": 4095, "flip": False}
    assert len(lists) == 3 and all(listed.white == 4095 for listed in lists)
    # the training's evaluation, by hand, and predict.py's
    network, x = rebuild(state).eval(), []
    for file in sorted((deep / "val").rglob("*.png")):
        levels = (np.asarray(Image.open(file)) / 4095 * 255).round().clip(0, 255).astype(np.uint8)
        picture = torch.from_numpy(levels).expand(3, -1, -1)
        x.append(v2.Compose([v2.Resize((8, 32), antialias=True), v2.Pad((0, 12))])(picture))
    mean, std = (torch.tensor(state["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = network((torch.stack(x) / 255 - mean) / std).softmax(1).max(1).values
    predict_argv = ["--checkpoint", str(run / "best.pt"), str(deep / "val"), "-j", "0", "--csv", str(tmp_path / "x.csv")]
    with pytest.raises(SystemExit, match="0"):
        predict.main(predict_argv)
    for file in (run / "val_predictions.csv", tmp_path / "x.csv"):
        found = sorted((row["file"], float(row["probability"])) for row in csv.DictReader(file.open()))
        np.testing.assert_allclose([p for _, p in found], expected.detach(), atol=1e-4)
    assert "was trained with --no-flip" in error_of(predict.main, [*predict_argv, "--tta"])
    # a resumed run cannot change them
    for option in (["--flip"], ["--resize", "crop"], ["--white", "255"]):
        assert "leave it out to go on" in error_of(train_classifier.main, ["--resume", str(run / "last.pt"), "--epochs", "2", *option])
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert read(run / "last.pt")["preprocessing"] == state["preprocessing"]
    # another one that starts from the weights has them, unless it is told otherwise
    other = read(train("--flip", data=deep, weights=run / "best.pt", image_size=None) / "last.pt")["preprocessing"]
    assert other == state["preprocessing"] | {"flip": True}


def test_what_is_said_of_dark_and_long_pictures_at_the_start(train, deep, capsys):
    train(data=deep, augment="none")
    said = capsys.readouterr().out.splitlines()
    assert said.index("augment: none") < next(i for i, line in enumerate(said) if line.startswith("epoch"))
    assert [line.rpartition(": ")[2] for line in said if line.startswith("hint:")] == [
        "if 4095 is white in them, train with --white 4095",
        "train with --resize squash or pad to see the whole"]


def test_a_checkpoint_from_before_white_and_shapes_goes_on(train, pictures, capsys, error_of):
    run, whole = train(epochs=1), train(epochs=2)
    state = read(run / "last.pt")
    for name in ("resize", "white", "flip"):
        del state["preprocessing"][name], state["options"][name]
    torch.save(state, run / "last.pt")
    typed = ["--resume", str(run / "last.pt"), "--epochs", "2"]
    assert "was started by a version that did not know it" in error_of(train_classifier.main, [*typed, "--no-flip"])
    train_classifier.main(typed)
    assert not changed(read(whole / "last.pt")["model"], read(run / "last.pt")["model"])
    torch.save(state, run / "old.pt")
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--checkpoint", str(run / "old.pt"), "--tta", str(pictures / "test"), "-j", "0"])


def test_floats_without_a_white_are_an_error_that_names_the_way_out(train, tmp_path, error_of):
    for split, count in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8), i / 3 + 0.35, dtype=np.float32)).save(tmp_path / split / name / f"{i}.tif")
    said = error_of(train, data=tmp_path, output=tmp_path / "run")
    assert said == f"error: cannot read {tmp_path}/train/a/0.tif (its grey levels are floating-point numbers, up to 0.35: say " \
                   "which level is white, such as --white 1 in training)"
    assert not (tmp_path / "run").exists()
    assert "has the disk gone away" in error_of(train, "--on-bad-image", "skip", data=tmp_path)
# ---- classes from a table


def write_table(pictures, file, change=lambda name: name):
    """A CSV of the pictures in class folders, in any order, with their names without endings."""
    files = sorted(pictures.rglob("*.png"))
    random.Random(4).shuffle(files)
    lines = [f"{path.relative_to(pictures).with_suffix('')},{change(path.parts[-2])},{path.parts[-3]}\n" for path in files]
    file.parent.mkdir(exist_ok=True)
    file.write_text("image,kind,split\n" + "".join(lines))
    return {"labels": file, "target": "kind", "file_column": "image"}


def test_a_table_trains_as_class_folders_do(train, monkeypatch, pictures, tmp_path, capsys, error_of):
    """Bit for bit, although its rows are shuffled, it is moved, and the run is resumed."""
    options = ["--class-weights", "cat=2", "--mixup", "0.2"]
    folders, table = train(*options, epochs=2), write_table(pictures, tmp_path / "t/labels.csv")
    run = interrupted(train, monkeypatch, tmp_path, *options, after=1, epochs=2, **table)
    (tmp_path / "t").rename(tmp_path / "u")
    resume, moved = ["--resume", str(run / "last.pt")], ["--labels", str(tmp_path / "u/labels.csv")]
    assert "cannot read the labels" in error_of(train_classifier.main, resume)
    assert "--target is split but the run was started with kind" in error_of(train_classifier.main, [*resume, "--target", "split"])
    assert "--file-column is x but" in error_of(train_classifier.main, [*resume, "--file-column", "x"])
    capsys.readouterr()
    train_classifier.main([*resume, *moved, "--target", "kind"])
    out = capsys.readouterr().out
    assert "cat        10       4       3" in out and out.count("34 pictures found under another name") == 1
    for name in ("last.pt", "best.pt"):
        a, b = read(folders / name), read(run / name)
        for key in ("model", "optimizer", "rng", "data", "classes", "best", "epoch", "step"):
            assert equal(a[key], b[key]), key
    assert untimed(history(folders)) == untimed(history(run))
    assert (folders / "test_predictions.csv").read_text() == (run / "test_predictions.csv").read_text()
    write_table(pictures, tmp_path / "u/labels.csv", {"cat": "dog", "dog": "cat"}.get)
    error = error_of(train_classifier.main, [*resume, "--epochs", "3"])  # which knows where the table is
    assert error.startswith(f"error: {moved[1]} holds other pictures (train 20, val 8, names")


def test_what_a_table_has_taught_goes_on_with_folders_and_the_other_way(train, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(pictures, tmp_path / "labels.csv")
    first = train(**table)
    for more in ({}, table):
        capsys.readouterr()
        again = train("--freeze", "backbone", weights=first / "best.pt", lr=0, **more)
        assert "head fc kept" in capsys.readouterr().out
        assert not changed(read(first / "best.pt")["model"], read(again / "last.pt")["model"])
        first = again
    argv = {"from": first / "best.pt", "data": pictures, "output": tmp_path / "on", "epochs": 1, "workers": 0, "no_report": True}
    train_continual.main(command_line([], argv))
    assert read(tmp_path / "on/last.pt")["classes"] == ["cat", "dog"]


@pytest.mark.parametrize("options, words", [
    ({"labels": None}, "--target only has a meaning with --labels, a CSV"),
    ({"labels": None, "target": None}, "--file-column only has a meaning with --labels, a CSV"),
    ({"target": None}, "--labels only has a meaning with --data and --target, the column to learn"),
    ({"data": None, "list_layers": True}, "--labels only has a meaning with --data and --target"),
    ({"target": "sort"}, "labels.csv has no column 'sort': there are image, kind, split"),
    ({"target": "image"}, "labels.csv: the column image holds another name in each of its 34 rows"),
    ({"file_column": None}, "labels.csv has no column 'file': there are image, kind, split; --file-column says which"),
    ({"file_column": "kind"}, "labels.csv, line 2: no such picture: "), ({"data": "nowhere"}, "no such folder: nowhere"),
    ({"labels": "labels.csv"}, "there is no {data}/labels.csv: --labels is relative to --data: type --labels"),
])
def test_tables_that_do_not_fit_their_options(train, pictures, tmp_path, error_of, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    table = write_table(pictures, tmp_path / "labels.csv")
    assert words.format(data=pictures) in error_of(train, output=tmp_path / "out", **table | options)
    assert not (tmp_path / "out").exists()


def test_list_layers_counts_the_classes_of_a_table(pictures, tmp_path, capsys):
    table = write_table(pictures, tmp_path / "labels.csv", {"cat": "a b", "dog": "c"}.get)
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text().replace("cat.1,a b", "cat.1,third"))
    train_classifier.main(command_line(["--list-layers"], {"data": pictures, "model": MODEL} | table))
    assert "3,075" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fc (head)"))


def test_list_layers_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_classifier.main(["--list-layers", "--model", MODEL, "--freeze", "to:stage3"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "frozen" in rows["stage3"] and "trains" in rows["stage4"] and "1,025,000" in rows["fc"]
    assert os.listdir(tmp_path) == []


def test_warnings(train, tmp_path, capsys):
    root = draw_folder(tmp_path / "twins", train=3, val=2, test=2)
    shutil.copy(root / "train/cat/cat.0.png", root / "val/cat/twin.png")
    train("--freeze", "backbone", data=root)
    out = capsys.readouterr().out
    assert "warning: the same picture twice" in out and "twin.png" in out
    assert "--freeze with --weights none keeps random layers as they are" in out


# ---- bad input: one line, exit status 2, nothing on disk


@pytest.mark.parametrize("options, words", [
    ({"data": "nowhere"}, "no such folder"),
    ({"model": "resnet19"}, "did you mean"),
    ({"weights": "missing.pth"}, "no such file: missing.pth"),
    ({"weights": "README"}, "has no weights 'README'"),
    ({"lr": -1}, "argument --lr: -1 is out of range: it must be 0 or above"),
    ({"lr": "nan"}, "argument --lr: nan is out of range"),
    ({"lr": "inf"}, "argument --lr: inf is out of range: it must be from 0 to 1000000000"),
    ({"epochs": "1" + "0" * 400}, "argument --epochs: 1000"),
    ({"freeze": "to:"}, "'to:' matches no layer"),
    ({"freeze": "fc"}, "'fc' is the head fc, which always trains"),
    ({"device": "meta"}, "--device meta cannot be used here"),
    ({"lr": "fast"}, "argument --lr: invalid float value: 'fast'"),
    ({"batch_size": 0}, "argument -b/--batch-size: 0 is out of range"),
    ({"epochs": 0}, "argument --epochs: 0 is out of range"),
    ({"class_weights": "bird=3"}, "unknown class 'bird'; the classes are cat, dog"),
    ({"image_size": 32, "model": "alexnet"}, "cannot take images of 32 x 32 pixels"),
    ({"image_size": 100, "model": "vit_b_32"}, "vit_b_32 cannot be built"),
    ({"freeze": "layer1"}, "'layer1' matches no layer"),
    ({"freeze": "backbone", "unfreeze": "0:layer1"}, "'layer1' matches no layer"),
    ({"freeze": "backbone", "unfreeze": "7:stage4"}, "never happens: the last epoch is 0"),
    ({"freeze": "backbone", "unfreeze": "stage4"}, "is not EPOCH:NAMES"),
    ({"unfreeze": "0:stage4"}, "--unfreeze only has a meaning with something frozen"),
    ({"batch_size": 2, "on_bad_image": "skip"}, "--on-bad-image only has a meaning with a --batch-size of 3 or more"),
    ({"momentum": 0.5}, "--momentum only has a meaning with --optimizer sgd"),
    ({"gamma": 0.5}, "--gamma only has a meaning with --schedule step"),
    ({"class_weight_mean": "plain"}, "--class-weight-mean only has a meaning with --class-weights"),
    ({"device": "gpu9"}, "--device gpu9 cannot be used here"),
    ({"resume": "missing.pt"}, "no such checkpoint: missing.pt"),
    ({"optimizer": "lion"}, "argument --optimizer: invalid choice"),
    ({"data": None}, "--data is needed"),
    ({"colour": "blue"}, "unrecognized arguments"),
    ({"dropout": 0.5}, "has no dropout before its head: --dropout needs --head mlp here"),
    ({"dropout": 1}, "argument --dropout: 1 is out of range"),
    ({"hidden": 5}, "--hidden only has a meaning with --head mlp"),
    ({"augment": "wild"}, "argument --augment: invalid choice"),
    ({"loss": "cost"}, "--costs '' is not like cat:dog=10,dog:cat=2"),
    ({"costs": "dog:cat=10"}, "--costs only has a meaning with --loss cost"),
    ({"loss": "cost", "costs": "dog:wolf=2"}, "unknown class 'wolf'"),
    ({"focal_gamma": 1}, "--focal-gamma only has a meaning with --loss focal"),
    ({"loss": "soft-f1", "mixup": 0.2}, "--mixup only has a meaning with a --loss that can blend"),
    ({"freeze": "backbone", "layer_decay": 0.5}, "--layer-decay only has a meaning with a backbone that trains or thaws"),
    ({"freeze": "backbone", "unfreeze": "0:fc@1e-4"}, "the head learns at --lr"),
    ({"hidden": 10**9, "head": "mlp"}, "--hidden: 1000000000 is out of range: it must be from 1 to 65536"),
    ({"seed": 2**32}, "--seed: 4294967296 is out of range: it must be from 0 to 4294967295"),
    ({"loss": "soft-f1", "class_weights": "balanced"}, "--class-weights only has a meaning with --loss cross-entropy"),
    ({"freeze": "backbone", "unfreeze": "0:stage4@fast"}, "'fast' is no learning rate"),
    ({"freeze": "backbone", "unfreeze": "0:stage4.0@1e-4"}, "write stage4@RATE"),
    ({"layer_decay": 1.5}, "argument --layer-decay: 1.5 is out of range"),
])
def test_bad_input(train, error_of, tmp_path, options, words):
    if options.get("data", "") is None:
        call = lambda: train_classifier.main(["--output", str(tmp_path / "out")])  # noqa: E731
    else:
        call = lambda: train(output=tmp_path / "out", **options)  # noqa: E731
    assert words in error_of(call)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_too_long(train, error_of):
    assert "File name too long" in (error := error_of(train, output=300 * "x")) and error.endswith("give a shorter path")


@pytest.mark.parametrize("case, words", [
    ("missing", "no such folder"), ("no class folders", "no class folders in"), ("empty class", "holds no pictures"),
    ("one class", "one class only"), ("different classes", "/train lacks: wolf"),
])
def test_bad_folders(train, error_of, tmp_path, case, words):
    assert words in error_of(train, data=wrong_folders(tmp_path / "data", case), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["weights", "resume"])
@pytest.mark.parametrize("content", ["text", "payload"])
def test_files_that_are_no_weights(train, error_of, tmp_path, option, content):
    (tmp_path / "x.pth").write_text("not weights")
    if content == "payload":
        torch.save({"model": {}, "script": "train_classifier", "options": Payload(tmp_path / "executed")}, tmp_path / "x.pth")
    words = {"text": "", "payload": "nothing in it was executed"}[content]
    assert f"{tmp_path / 'x.pth'}" in (error := error_of(train, **{option: tmp_path / "x.pth"})) and words in error
    assert not (tmp_path / "executed").exists()


def test_a_damaged_picture_ends_the_run_and_the_saved_state_stays(train, error_of, tmp_path):
    root = draw_folder(tmp_path / "data", train=4, val=2)
    run = train(data=root, epochs=1)
    whole = shutil.copytree(run, tmp_path / "whole")
    good = (root / "train/cat/cat.1.png").read_bytes()
    (root / "train/cat/cat.1.png").write_bytes(b"not a picture")
    error = error_of(train_classifier.main, ["--resume", str(run / "last.pt"), "--epochs", "3"])
    assert "cannot read" in error and "cat.1.png" in error
    assert error.endswith(f"; go on with: python train_classifier.py --resume {run}/last.pt")
    (root / "train/cat/cat.1.png").write_bytes(good)  # with a good one in its place: as if nothing had been
    train_classifier.main(["--resume", str(run / "last.pt")])
    train_classifier.main(["--resume", str(whole / "last.pt"), "--epochs", "3"])
    assert not changed(read(whole / "last.pt")["model"], read(run / "last.pt")["model"])


def test_a_damaged_test_picture_may_be_removed(train, error_of, tmp_path):
    root = draw_folder(tmp_path / "data", train=4, val=2, test=2)
    (root / "test/cat/cat.0.png").write_bytes(b"")
    assert "test/cat/cat.0.png" in error_of(train, data=root, output=tmp_path / "run")
    (root / "test/cat/cat.0.png").unlink()
    train_classifier.main(["--resume", str(tmp_path / "run" / "last.pt")])
    assert (tmp_path / "run" / "test_predictions.csv").read_text().count("\n") == 4


def test_a_run_that_diverges_saves_nothing_broken_and_says_how_to_go_on(train, error_of, tmp_path):
    run = train(output=tmp_path / "run", **SGD | {"lr": 0.1})
    before = (run / "last.pt").read_bytes()
    error = error_of(train_classifier.main, ["--resume", str(run / "last.pt"), "--epochs", "5", "--lr", "1e9"])
    assert "the training loss of epoch" in error and f"python train_classifier.py --resume {run / 'last.pt'} --lr 5e+08" in error
    assert (run / "last.pt").read_bytes() == before


def test_a_validation_loss_that_is_not_finite_is_not_saved(train, error_of, monkeypatch, tmp_path):
    real = nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda x, *a, **k: real(x, *a, **k) * (1 if x.requires_grad else math.nan))
    assert "the validation loss of epoch 0 is nan" in error_of(train, output=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_batch_of_one_that_batchnorm_cannot_train_on(train, error_of):
    assert "--batch-size 2 or more" in error_of(train, model="resnet18", batch_size=1)
    train("--freeze", "backbone", model=MODEL, batch_size=1)  # frozen BatchNorms can


@pytest.mark.parametrize("model, size", [("squeezenet1_1", 32), ("maxvit_t", 224), ("googlenet", 32)])
def test_networks_with_odd_heads(train, model, size, tmp_path):
    """What is saved loads strictly into the torchvision network of the same class count."""
    root = draw_folder(tmp_path / "few", train=2, val=1)
    run = train("--freeze", "backbone", model=model, image_size=size, data=root)
    state = read(run / "best.pt")
    options = {} if model != "googlenet" else {"init_weights": False}
    plain = torchvision.models.get_model(model, num_classes=2, **options, **state["build"]["options"])
    plain.load_state_dict(state["model"], strict=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(train, error_of):
    run = train()
    before = (run / "last.pt").read_bytes()
    assert "already holds a run: go on with it by --resume" in error_of(train, output=run)
    assert (run / "last.pt").read_bytes() == before
    assert "--resume without a file needs --output" in error_of(train_classifier.main, ["--data", "x", "--resume"])


def test_an_output_that_cannot_be_written(train, error_of, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in error_of(train, output=tmp_path / "file" / "run")
