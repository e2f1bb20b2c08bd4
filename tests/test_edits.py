"""The edits that docs/editing.md shows, applied to a copy of train_classifier.py as a reader would, at the places that its
comments name, and run. None goes silently wrong: it works, or one line says what else to change.
"""

import functools
import importlib.util
import itertools
import math
import signal
import sys

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import lr_finder
import metrics
import model as models
import pages
import predict
import train_classifier
from conftest import ROOT, read
from test_distributed import together  # noqa: F401
from test_interruptions import assert_the_same_run, stop_at
from test_train_classifier import SGD, history
from test_train_regressor import rows_of

numbers = itertools.count()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited((lines there now, lines that take their place), ...), as pages.edits gives them, makes a copy of the script
    and lets `train` run it; returns the module."""

    def edit(*hunks):
        lines = pages.edit((ROOT / "train_classifier.py").read_text().splitlines(), hunks)
        name = f"train_edited{next(numbers)}"  # a file, as a reader has one
        file = tmp_path / f"{name}.py"
        file.write_text("\n".join(lines) + "\n")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(train_classifier, "main", module.main)
        return module

    return edit


def test_a_run_in_bf16_goes_on_with_more_gpus(edited, train, monkeypatch, tmp_path, capsys):
    """DataParallel cannot use bf16; on a CPU it hands on to the network itself."""
    monkeypatch.setattr(models, "auto_precision", lambda *a: ("bf16", "so says the test"))
    run = train("--freeze", "backbone", amp="auto", output=tmp_path / "run")
    edited((["gpus = torch.cuda.device_count() if all_gpus else 1"], ["gpus = 2"]))
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert "precision fp16 (DataParallel's threads know no other)" in capsys.readouterr().out
    assert [float(row["loss_scale"]) > 1 for row in history(run)] == [False, True]  # with a scaler, now
    monkeypatch.undo()  # and with one again: it stays with fp16
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "3"])
    assert read(run / "last.pt")["precision"] == "fp16"


def stopped_and_resumed(train, *options, moment=2, **named):
    """A run that is stopped at its second step and goes on."""
    output = named.pop("output")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, moment, signal.SIGTERM)
        train(*options, output=output, **named)
    assert read(output / "last.pt")["step"] == moment
    return train(*options, "--resume", output=output, **named)


def in_lines(hunks, old, new):
    """The edits with other words in their new lines."""
    assert any(old in line for _, lines in hunks for line in lines), old
    return [(there, [line.replace(old, new) for line in lines]) for there, lines in hunks]


def test_a_plain_function_as_the_loss(edited, train, error_of, tmp_path):
    edited(*pages.edits("plain_function"))
    run = train(lr=0, batch_size=20, freeze="backbone", augment="none")
    state, images = read(run / "last.pt"), data.find_images(read(run / "last.pt")["options"]["data"])
    for split, name in (("train", "train_loss"), ("val", "val_loss")):
        pairs = images.splits[split]
        x = torch.stack([data.eval_transform(32, resize_size=37)(pil_to_tensor(data.decode(path))) for path, _ in pairs])
        x = data.to_input(x, *(torch.tensor(state["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std")))
        with torch.no_grad():
            logits, labels = models.rebuild(state).eval()(x), torch.tensor([label for _, label in pairs])
        right = logits.gather(1, labels[:, None])
        by_hand = (1 - right + logits).clamp(min=0).scatter(1, labels[:, None], 0).sum(1).mean() / 2
        assert float(history(run)[0][name]) == pytest.approx(by_hand.item(), rel=1e-4)
    # options that it does not know of are no longer accepted in silence
    words = "the loss of section 6, multi_margin_loss, takes no class weights: leave --class-weights out"
    assert words in error_of(train, "--class-weights", "dog=3", output=tmp_path / "x")
    assert "multi_margin_loss, knows no label smoothing" in error_of(train, "--label-smoothing", 0.1, output=tmp_path / "x")
    # nor does a run go on with another loss than it began with
    error = error_of(edited().main, ["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert "the run was begun with the loss multi_margin_loss, and this script has CrossEntropyLoss" in error
    # nor is a parameter of its own that is called weight taken for the class weights, nor a module hidden in a partial
    own = functools.partial(in_lines, pages.edits("plain_function"), "nn.functional.multi_margin_loss")
    edited(*own("nn.CrossEntropyLoss(); criterion.weight = nn.Parameter(torch.ones(2))"))
    assert "CrossEntropyLoss, takes no class weights" in error_of(train, "--class-weights", "dog=3", output=tmp_path / "x")
    edited(*own("partial(nn.CrossEntropyLoss())"))
    assert "functools.partial hides the CrossEntropyLoss within" in error_of(train, output=tmp_path / "x")


def test_a_loss_with_parameters_is_trained_saved_and_resumed(edited, train, together, error_of, tmp_path):  # noqa: F811
    plain = train("--freeze", "backbone", "--no-test")
    script = edited(*pages.edits("learned_scale"))
    options, named = ["--accumulate", "2", "--clip-grad", "0.1"], {"batch_size": 4, "epochs": 2, "lr": 0.01}
    whole = train(*options, **named)
    scale = read(whole / "last.pt")["criterion"]["scale"]
    still = read(train(*options, **named | {"lr": 0}) / "last.pt")["criterion"]["scale"]
    assert 0.001 < abs(scale - still) < 0.5
    broken = stopped_and_resumed(train, *options, output=tmp_path / "broken", **named)
    assert_the_same_run(whole, broken)
    assert torch.equal(read(broken / "last.pt")["criterion"]["scale"], scale)
    # two processes train the one that one process does
    options = ["--freeze", "backbone", "--optimizer", "sgd", "--log-every", "1"]
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    kind = script.__name__.removeprefix("train_")
    _, one = together(1, kind, *options, batch_size=6, epochs=2, before={0: before})
    _, two = together(2, kind, *options, batch_size=3, epochs=2, before={0: before, 1: before})
    one, two = (read(run / "last.pt")["criterion"]["scale"] for run in (one, two))
    # random at the start, where two processes draw unlike numbers: those of the first count
    assert two.item() == pytest.approx(one.item(), abs=1e-6)
    # and a run that began without it
    error = error_of(script.main, ["--resume", str(plain / "last.pt"), "--epochs", "2"])
    assert "the run was begun with the loss CrossEntropyLoss, and this script has LearnedScale" in error


def test_kappa_as_a_metric_that_is_no_number_in_the_first_epoch(edited, train, error_of, tmp_path):
    choice, *kappa = in_lines(pages.edits("kappa"), ".item()", ".item() if epoch else math.nan")
    edited(*kappa)
    assert "argument --monitor: invalid choice: 'val_kappa'" in error_of(train, "--monitor", "val_kappa", output=tmp_path / "x")
    edited(choice, *kappa)
    run = train("--monitor", "val_kappa", epochs=5, lr=0.01)
    values = [float(row["val_kappa"]) for row in history(run)]
    losses_of_epochs = [float(row["val_loss"]) for row in history(run)]
    best = max(range(1, 5), key=lambda e: (values[e], -losses_of_epochs[e]))
    assert math.isnan(values[0]) and (read(run / "best.pt")["epoch"], read(run / "last.pt")["best_epoch"]) == (best + 1, best)
    original = edited()  # does not know it
    assert "--monitor is val_kappa in the checkpoint, and this script knows val_accuracy" in error_of(
        original.main, ["--resume", str(run / "last.pt"), "--epochs", "6"])
    # its value, by hand: 4 of 5 agree, 2/5 * 1/5 + 3/5 * 4/5 of them by chance
    labels, given, scores = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1]), {}
    names = {"outputs": nn.functional.one_hot(given), "labels": labels, "classes": "ab", "scores": scores, "epoch": 1}
    exec("\n".join(kappa[0][1][:-1]), {"metrics": metrics, "math": math, **names})
    assert scores["val_kappa"] == pytest.approx((0.8 - 0.56) / (1 - 0.56))
    # where it is never one, the first epoch's checkpoint stands in, and patience ends the run
    edited(choice, *in_lines(kappa, ".item() if epoch", ".item() * math.nan if epoch"))
    run = train("--monitor", "val_kappa", "--patience", 2, epochs=5)
    assert len(history(run)) == 3 and read(run / "best.pt")["epoch"] == 1


def test_a_schedule_of_pytorchs(edited, train, error_of, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(lr_finder, "range_test", functools.partial(lr_finder.range_test, steps=8, high=1e-4))
    monkeypatch.setattr(lr_finder, "suggest", lambda rates, values: (losses_of_trials.append(values), (1, ""))[1])
    losses_of_trials = []
    train("--find-lr", weights=weights, output=tmp_path / "a")

    made, saved, *stepped = pages.edits("one_cycle")
    edited(made, *stepped)  # and forgets to save it
    error = error_of(train, output=tmp_path / "x")
    assert 'a PyTorch schedule that is not among the parts of the run' in error and '"scheduler": scheduler' in error
    edited(made, saved, *stepped)
    options, named = ["--accumulate", "2"], {"batch_size": 4, "epochs": 2, "lr": 0.02, "weights": weights}
    whole = train(*options, **named)
    broken = stopped_and_resumed(train, *options, output=tmp_path / "broken", **named)
    assert_the_same_run(whole, broken)
    a, b = (read(run / "last.pt") for run in (whole, broken))
    assert [g["betas"] for g in a["optimizer"]["param_groups"]] == [g["betas"] for g in b["optimizer"]["param_groups"]]
    # by another route: what PyTorch sets, for the head and the backbone, at the last step of each epoch
    alone = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.02, 0.002)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(alone, [0.02, 0.002], total_steps=6)
    rates = []
    for _ in range(6):
        rates.append(alone.param_groups[0]["lr"])
        alone.step()
        schedule.step()
    assert [float(row["lr"]) for row in history(whole)] == [pytest.approx(rates[3]), pytest.approx(schedule.get_last_lr()[0])]
    # --find-lr does not take its first rate for the peak: its losses are those of the schedule that it replaced
    edited(*in_lines([made], "steps_per_epoch)", "steps_per_epoch, cycle_momentum=False)"), saved, *stepped)
    train("--find-lr", weights=weights, output=tmp_path / "b")
    assert losses_of_trials[0] == losses_of_trials[1] and len(losses_of_trials[0]) == 8
    # what it does not know of, or what sets the rates beside it
    refused = functools.partial(error_of, train, "--freeze", "backbone", output=tmp_path / "y", epochs=2)
    assert "--unfreeze 1:stage4@0.001: a PyTorch schedule sets the rates of this optimizer" in refused(unfreeze="1:stage4@0.001")
    edited(made, saved, stepped[-1])
    assert 'something else sets it, too; drop the lines of the loop that set group["lr"]' in refused()
    # one that has an end cannot go on behind it
    again = edited(made, saved, *stepped)
    error = error_of(again.main, ["--resume", str(whole / "last.pt"), "--lr", "0.01"])
    assert "--lr is 0.01 but the run's OneCycleLR was made for 0.02: it stays, or start a new run" in error
    error = error_of(again.main, ["--resume", str(whole / "last.pt"), "--epochs", "3"])
    assert "--epochs is 3 but the run's OneCycleLR was made for 2: it stays, or start a new run" in error


def test_a_second_view_with_a_consistency_term(edited, train, error_of, tmp_path):
    edited(*pages.edits("two_views"))
    named = {"batch_size": 20, "freeze": "backbone", **SGD, "lr": 0}
    run = train(**named)
    state = read(run / "last.pt")
    images = data.find_images(state["options"]["data"])
    listed = data.ImageList(images.splits["train"], data.train_transform(32), seed=0)
    order = data.SeededBatches(20, 20, 0, shuffle=True)
    views, labels = [], []
    for key in next(iter(order)):  # two draws, one after the other, from the seed of the picture
        path, label = listed.samples[key[1]]
        with torch.random.fork_rng():
            torch.manual_seed(data.mix_seed(0, *key))
            picture = pil_to_tensor(data.decode(path, 64))
            views.append(torch.stack([listed.transform(picture), listed.transform(picture)]))
        labels.append(label)
    views = torch.stack(views)
    assert not torch.equal(views[:, 0], views[:, 1])
    mean, std = (torch.tensor(state["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        model = models.rebuild(state).eval()
        one, other = (model(data.to_input(views[:, i], mean, std)) for i in (0, 1))
    expected = nn.functional.cross_entropy(one, torch.tensor(labels))
    expected += 10 * (one.softmax(1) - other.softmax(1)).square().mean()
    assert float(history(run)[0]["train_loss"]) == pytest.approx(expected.item(), rel=1e-4)

    whole = train(epochs=2, batch_size=6)
    assert_the_same_run(whole, stopped_and_resumed(train, epochs=2, batch_size=6, output=tmp_path / "broken"))
    # what cannot go with it says so
    flatten = "a batch of pictures is (N, 3, H, W), not (20, 2, 3, 32, 32)"
    assert flatten in error_of(train, "--cache-features", 1, output=tmp_path / "x", **named)
    assert "40 pictures and 20 labels cannot be mixed" in error_of(train, "--mixup", 0.2, output=tmp_path / "y", **named)


def test_features_of_a_changed_function_transform(edited, train, monkeypatch, tmp_path):
    """Changed in its code, in what it closes over, in a constant of its file: computed anew. Unchanged: used again."""
    options = ["--freeze", "backbone", "--cache-features", 1, "--no-test"]
    dark = in_lines(in_lines(pages.edits("darker"), "* strength", "* strength * factor"), "strength = augment, 0.5",
                    "strength, factor = augment, 0.5, FACTOR")

    def constant(value):
        return [INTERRUPTIONS], [INTERRUPTIONS, f"FACTOR = {value}"]

    edited(*dark, constant(0.9))
    run = train(*options, output=tmp_path / "run")
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *a: (decoded.append(path), decode(path, *a))[1])
    for epochs, function, factor, again in (
        (2, dark, 0.9, 0), (3, in_lines(dark, ".float()", ".double()"), 0.9, 28), (4, in_lines(dark, "0.5", "0.25"), 0.9, 28),
        (5, dark, 0.8, 28),
    ):
        decoded.clear()
        script = edited(*function, constant(factor))
        script.main(["--resume", str(run / "last.pt"), "--epochs", str(epochs)])
        assert len(decoded) == again, (function, factor)


def test_another_mean_and_std_are_those_of_predict_py(edited, train, pictures, tmp_path):
    edited(*pages.edits("mean_and_std"))
    run = train()
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(run / "best.pt"), str(pictures / "test"), "--csv", str(tmp_path / "x.csv")])
    rows = rows_of(tmp_path / "x.csv")
    assert rows == rows_of(run / "test_predictions.csv")
    prepare = data.eval_transform(32, resize_size=37)
    x = torch.stack([prepare(pil_to_tensor(data.decode(row["file"]))) for row in rows]) / 255
    probabilities = models.rebuild(read(run / "best.pt")).eval()((x - 0.5) / 0.25).softmax(1).amax(1)
    assert probabilities.tolist() == pytest.approx([float(row["probability"]) for row in rows], abs=1e-5)


def test_an_augmentation_that_normalizes_itself(edited, train, error_of, tmp_path):
    """Validation would see other numbers than training."""
    edited(*in_lines(pages.edits("darker"), ".to(torch.uint8)", "/ 255"))
    error = error_of(train, output=tmp_path / "x")
    assert "pictures have come as torch.float32: leave ToDtype and Normalize out of your augmentation" in error


INTERRUPTIONS = "INTERRUPTIONS = (ending.Stopped, data.DataError, distributed.ProcessError)"


def test_a_head_of_ones_own_in_all_that_build_it(train, pictures, monkeypatch):
    """The edit of model.py, which training and predict.py both call."""
    lines = pages.edit((ROOT / "model.py").read_text().splitlines(), pages.edits("gelu_head"))
    edited_model = {}
    exec(compile("\n".join(lines), "model.py", "exec"), edited_model)
    monkeypatch.setattr(train_classifier, "mlp_head", edited_model["mlp_head"])
    monkeypatch.setattr(models, "mlp_head", edited_model["mlp_head"])
    state = read(train("--head", "mlp", "--hidden", 5) / "best.pt")
    head = models.rebuild(state).get_submodule(state["head"])
    assert [type(layer) for layer in head] == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear] and head[0].out_features == 5
    with pytest.raises(models.ModelError, match="do not fit its network, shufflenet_v2_x0_5: a head of your own belongs into mlp_head"):
        models.rebuild(state | {"hidden": 0})  # as one that was written into the script
