"""train_continual.py as a user runs it: what it keeps, what it pulls, what it replays, and going on after a stop."""

import csv
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms import v2

import checkpoint
import data
import freeze
import losses
import metrics
import model as models
import predict
import train_classifier
import train_continual
from all_models import QuickInit
from conftest import MODEL, SMALL, changed, command_line, draw, read
from test_interruptions import STATE, stop_at
from test_train_classifier import equal, history, untimed


@pytest.fixture(scope="module")
def begun(pictures, weights, tmp_path_factory):
    """The best.pt of a classifier of cats and dogs."""
    folder = tmp_path_factory.mktemp("begun")
    options = SMALL | {"data": pictures, "output": folder, "weights": weights, "epochs": 1, "no_test": True}
    train_classifier.main(command_line([], options))
    return folder / "best.pt"


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """New pictures: 6 and 3 of birds, 6 and 1 of dogs, which are known. On drawn pictures, a bird is a cat."""
    root = tmp_path_factory.mktemp("more")
    for split, counts in (("train", (6, 6)), ("val", (3, 1))):
        for name, shape, count in (("bird", "cat", counts[0]), ("dog", "dog", counts[1])):
            for i in range(count):
                draw(root / split / name / f"{name}.{i}.png", shape, f"more{split}{name}{i}")
    return root


@pytest.fixture
def go_on(begun, more, pictures, tmp_path):
    """go_on("--method", "ewc", ...) runs train_continual.main in this process and returns the run folder."""
    runs = iter(range(100))

    def run(*options, output=None, **replaced):
        output = output or tmp_path / f"continued{next(runs)}"
        usual = {"from": begun, "data": more, "old_data": pictures, "output": output, "epochs": 1, "batch_size": 4,
                 "optimizer": "sgd", "workers": 0, "amp": "off", "no_report": True, "no_test": True}
        train_continual.main(command_line(options, usual | replaced))
        return output

    return run


def outputs_of(saved, x):
    with torch.inference_mode():
        return models.rebuild(saved).eval()(x)


# ---- classes


def test_known_classes_keep_their_outputs_and_new_ones_come_behind(go_on, begun, more, capsys):
    run = go_on("--method", "freeze", lr=0, no_test=None)
    old, new = read(begun), read(run / "best.pt")
    assert old["classes"] == ["cat", "dog"] and new["classes"] == ["cat", "dog", "bird"]  # not the order of the folders
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(outputs_of(old, x), outputs_of(new, x)[:, :2])
    with open(run / "val_predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["truth"] for row in rows] == [Path(row["file"]).parent.name for row in rows]
    assert {row["truth"] for row in rows} == {"bird", "dog"}
    with open(run / "old_test_predictions.csv", newline="") as file:
        old_rows = list(csv.DictReader(file))
    assert len(old_rows) == 6 and all(row["truth"] == Path(row["file"]).parent.name for row in old_rows)
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        predict.main(["--checkpoint", str(run / "best.pt"), str(more / "val"), "-j", "0"])
    assert done.value.code == 0 and "on 4 pictures" in capsys.readouterr().out


def test_labels_are_learned_under_their_names(go_on, pictures, monkeypatch):
    """Each picture of a training batch with the label of its folder, old and new."""
    seen, real = [], data.ImageList.__getitem__
    monkeypatch.setattr(data.ImageList, "__getitem__", lambda self, key: (
        seen.append((self.samples[key[1]], self.transform)), real(self, key))[1])
    go_on("--method", "replay", augment="strong")
    trained = [sample for sample, transform in seen if len(getattr(transform, "transforms", [])) == 4]
    names = ["cat", "dog", "bird"]
    assert all(Path(path).parent.name == names[label] for path, label in trained)
    assert {(str(pictures) in path, names[label]) for path, label in trained} == {
        (False, "bird"), (False, "dog"), (True, "cat"), (True, "dog")}


@pytest.mark.parametrize("name, heads, hidden", [
    ("googlenet", ["fc", "aux1.fc2", "aux2.fc2"], 0), ("squeezenet1_1", ["classifier.1"], 0), (MODEL, ["fc.3"], 8)])
def test_every_kind_of_head_grows(go_on, tmp_path, begun, more, name, heads, hidden):
    options = models.build_options(name, 32, auxiliary=True)
    with QuickInit(fill=True):
        model = models.build(name, num_classes=2, **options)
        head = freeze.find_head(model)
        if hidden:
            model.set_submodule(head, models.mlp_head(model.get_submodule(head), 2, hidden))
        state = read(begun) | {"model": model.state_dict(), "build": {"name": name, "options": options}, "head": head,
                               "hidden": hidden}
        torch.save(state, tmp_path / "from.pt")
        run = go_on(lr=0, wd=0, batch_size=12, old_data=None, **{"from": tmp_path / "from.pt"})
    after = read(run / "last.pt")
    for layer in heads:
        for part in ("weight", "bias"):
            old, new = state["model"][f"{layer}.{part}"], after["model"][f"{layer}.{part}"]
            assert len(new) == 3 and torch.equal(new[:2], old) and not torch.equal(new[2], old[0])
    models.rebuild(after)  # strictly


def test_a_single_new_class_and_a_second_continuation(go_on, pictures, tmp_path):
    for split in ("train", "val"):
        for i in range(3):
            draw(tmp_path / "fox" / split / "fox" / f"{i}.png", "cat", f"fox{i}")
    run = go_on("--method", "replay", data=tmp_path / "fox")
    assert read(run / "last.pt")["classes"] == ["cat", "dog", "fox"]
    again = go_on("--method", "replay", **{"from": run / "last.pt"})
    assert read(again / "last.pt")["classes"] == ["cat", "dog", "fox", "bird"]


# ---- methods


def test_a_pull_of_zero_and_a_replay_of_nothing_change_no_bit(go_on):
    plain = read(go_on() / "last.pt")
    for options in (["--method", "ewc", "--ewc", 0, "--fisher-size", 3], ["--method", "replay", "--replay-fraction", 0]):
        other = read(go_on(*options) / "last.pt")
        assert not changed(plain["model"], other["model"]) and equal(plain["rng"], other["rng"])
        assert equal(plain["before"], other["before"])


def distance(saved, start, weights):
    """Half the squared distance of the parameters from where they began (known classes alone), weighted."""
    pairs = [(saved["model"][n][: len(start[n])] - start[n], w[: len(start[n])]) for n, w in weights.items()]
    return sum((d.square() * w).sum().item() / 2 for d, w in pairs)


def test_a_strong_pull_keeps_the_old_weights(go_on, begun, weights, train, error_of):
    sgd = {"optimizer": "sgd", "momentum": 0, "schedule": "constant", "warmup_epochs": 0, "lr": 0.3, "freeze": "bn"}
    start, plain = read(begun)["model"], read(go_on("--method", "freeze", **sgd, epochs=2) / "last.pt")
    ewc = read(go_on("--method", "freeze+ewc", "--ewc", 10, "--fisher-size", 6, **sgd, epochs=2) / "last.pt")
    assert 0 < distance(ewc, start, ewc["fisher"]) < 0.3 * distance(plain, start, ewc["fisher"])
    l2_sp = read(go_on("--method", "freeze+l2-sp", "--l2-sp", 20, **sgd, epochs=2) / "last.pt")
    same = {name: torch.ones_like(value) for name, value in l2_sp["anchor"].items()}
    assert 0 < distance(l2_sp, start, same) < 0.3 * distance(plain, start, same)
    for saved, decays in ((plain, True), (l2_sp, False)):  # not the backbone towards zero, but the head
        of_backbone = [group["weight_decay"] for group in saved["optimizer"]["param_groups"]][:-2]
        assert any(of_backbone) == decays and saved["optimizer"]["param_groups"][-2]["weight_decay"] > 0
    assert "fc.weight" in ewc["anchor"] and "fc.weight" not in l2_sp["anchor"]
    assert ewc["fisher"]["fc.weight"][:2].any() and not ewc["fisher"]["fc.weight"][2].any()  # a bird is of no old task

    free, pulled = (read(train(*options, weights=weights, **sgd, batch_size=4, epochs=2) / "last.pt")
                    for options in ([], ["--l2-sp", 20]))
    assert 0 < distance(pulled, read(weights), same) < 0.3 * distance(free, read(weights), same)
    assert [group["weight_decay"] > 0 for group in pulled["optimizer"]["param_groups"]].count(True) == 1
    last = str(Path(pulled["options"]["output"], "last.pt"))
    train_classifier.main(["--resume", last, "--epochs", "3"])  # still towards the pretrained weights
    pretrained = read(weights)
    assert all(torch.equal(value, pretrained[name]) for name, value in read(last)["anchor"].items())
    for options in ({}, {"weights": weights, "freeze": "backbone"}):
        assert "--l2-sp only has a meaning with a pretrained backbone that trains" in error_of(train, l2_sp=1, **options)


def test_the_fisher_information_is_that_of_the_model_it_began_from(go_on, begun, pictures):
    """Computed here from the checkpoint, with its two classes alone, on the plain old training pictures."""
    run = read(go_on("--method", "ewc", "--fisher", "empirical", "--fisher-size", 4, "--lr", 0) / "last.pt")
    saved, images = read(begun), data.find_images(pictures)
    plain = data.ImageList(data.balanced(images.splits["train"], 4), data.eval_transform(32), size=64)
    mean, std = (torch.tensor(saved["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    x = data.to_input(torch.stack([plain[i][0] for i in range(4)]), mean, std)
    expected = losses.fisher_diagonal(models.rebuild(saved), [(x, plain.labels())], "empirical")
    for name, value in expected.items():
        found = run["fisher"][name]
        torch.testing.assert_close(found[: len(value)] if name.startswith("fc.") else found, value, rtol=1e-3, atol=1e-7)
    assert sorted(plain.labels().tolist()) == [0, 0, 1, 1]


def test_white_shape_and_flips_are_those_of_the_model_it_began_from(go_on, begun, tmp_path, monkeypatch, capsys):
    saved = read(begun)
    saved["preprocessing"] |= {"resize": "squash", "white": 4095.0, "flip": False}
    torch.save(saved, other := tmp_path / "other.pt")
    lists, real = [], data.ImageList.__init__
    monkeypatch.setattr(data.ImageList, "__init__", lambda self, *a, **k: (lists.append(self), real(self, *a, **k))[1])
    run = go_on(**{"from": other, "method": "replay", "no_test": None})
    assert "augment: standard (random crop)\n" in capsys.readouterr().out
    assert read(run / "best.pt")["preprocessing"] == saved["preprocessing"]
    assert len(lists) >= 3 and all(listed.white == 4095 for listed in lists)
    assert all(isinstance(listed.transform.transforms[0], v2.Resize | v2.Compose) for listed in lists)
    # --no-flip also where it began with flips
    assert read(go_on("--no-flip") / "best.pt")["preprocessing"] == read(begun)["preprocessing"] | {"flip": False}


def test_freezing_keeps_running_statistics(go_on, begun):
    before = read(begun)["model"]
    frozen = read(go_on("--method", "freeze") / "last.pt")["model"]
    assert {k for k in before if not torch.equal(before[k], frozen[k])} == {"fc.weight", "fc.bias"} & set(before)
    norms = read(go_on("--method", "freeze", "--freeze", "bn") / "last.pt")["model"]
    moved = {k for k in before if not torch.equal(before[k], norms[k])}
    assert not any("running" in k or "num_batches" in k for k in moved) and "conv1.0.weight" in moved


def test_a_replay_buffer_is_balanced_and_each_batch_has_its_share(go_on, pictures, monkeypatch):
    seen, real = [], data.ImageList.__getitem__
    monkeypatch.setattr(data.ImageList, "__getitem__", lambda self, key: (
        seen.append((key, self.samples[key[1]][0], len(self))), real(self, key))[1])
    run = go_on("--method", "replay", "--replay-size", 6, "--replay-fraction", 0.25, monitor="old_val_loss", epochs=2)
    trained = [(key, path) for key, path, count in seen if count == 12 + 6]
    old = [path for _, path in trained if str(pictures) in path]
    assert [str(pictures) in path for _, path in trained] == 8 * [False, False, False, True]  # 2 epochs of 4 steps
    assert len(set(old[:6])) == 6 and {old.count(path) for path in old} == {1, 2}  # all before any comes again
    assert sorted(Path(path).parent.name for path in old[:6]) == 3 * ["cat"] + 3 * ["dog"]
    assert read(run / "last.pt")["step"] == 8
    assert read(run / "last.pt")["best"] == min(float(row["old_val_loss"]) for row in history(run))  # a loss: the least


# ---- what is scored


def test_the_old_validation_split_is_scored_beside_the_new(go_on, pictures, more):
    run = go_on(epochs=2, no_report=None)
    rows, saved = history(run), read(run / "last.pt")
    kinds = ("loss", "accuracy", "balanced_accuracy", "macro_f1")
    assert list(rows[0])[3:12] == [*(f"val_{k}" for k in kinds), *(f"old_val_{k}" for k in kinds), "mean_accuracy"]
    for row in rows:
        assert row["val_accuracy"] != row["old_val_accuracy"]
        assert float(row["mean_accuracy"]) == (float(row["val_accuracy"]) + float(row["old_val_accuracy"])) / 2
    for folder, prefix in ((more, "val"), (pictures, "old_val")):
        images = data.relabel(data.find_images(folder), saved["classes"])
        plain = data.ImageList(images.splits["val"], data.eval_transform(32), size=64)
        mean, std = (torch.tensor(saved["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
        outputs = outputs_of(saved, data.to_input(torch.stack([plain[i][0] for i in range(len(plain))]), mean, std))
        assert float(rows[-1][f"{prefix}_accuracy"]) == (outputs.argmax(1) == plain.labels()).float().mean().item()
        assert float(rows[-1][f"{prefix}_loss"]) == pytest.approx(
            torch.nn.functional.cross_entropy(outputs, plain.labels()).item(), rel=1e-3)
    best = max(range(2), key=lambda i: (float(rows[i]["mean_accuracy"]), -float(rows[i]["val_loss"])))
    assert saved["best"] == float(rows[best]["mean_accuracy"]) and read(run / "best.pt")["epoch"] == best + 1
    page = (run / "report.html").read_text()
    assert re.search(rf"<td>best epoch</td><td>{best}, mean_accuracy", page) and "method none" in page
    alone = go_on(old_data=None)
    assert not any("old" in k or "mean" in k for k in history(alone)[0])
    assert read(alone / "last.pt")["options"]["monitor"] == "val_accuracy"


def test_old_pictures_of_which_none_can_be_read(go_on, pictures, tmp_path, error_of):
    shutil.copytree(pictures, tmp_path / "old")
    for picture in (tmp_path / "old/val").rglob("*.png"):
        picture.write_bytes(b"no picture")
    assert "no picture of this split can be read" in error_of(go_on, "--on-bad-image", "skip", old_data=tmp_path / "old")


def test_of_equal_scores_the_lowest_val_loss_is_the_best_and_no_gain(go_on, monkeypatch):
    monkeypatch.setattr(metrics, "class_scores", lambda *_: {"accuracy": 0.5})
    run = go_on(epochs=4, lr=0.0003)
    losses_of_epochs, last = [float(row["val_loss"]) for row in history(run)], read(run / "last.pt")
    assert last["best_epoch"] == losses_of_epochs.index(min(losses_of_epochs)) > 0 and last["epochs_without_gain"] == 3
    assert read(run / "best.pt")["epoch"] == last["best_epoch"] + 1


def test_the_page_has_both_tests_and_the_options_that_count(go_on):
    run = go_on("--method", "replay", "--replay-size", 4, no_report=None, no_test=None)
    with open(run / "old_test_predictions.csv", newline="") as file:
        right = sum(row["truth"] == row["prediction"] for row in csv.DictReader(file))
    page = (run / "report.html").read_text()
    assert f"<td>old pictures</td><td>accuracy {right / 6:.4f} on test ({right} of 6)</td>" in page
    assert "method replay, replay_fraction 0.5, replay_size 4, augment" in page  # no l2_sp, ewc, freeze: of other methods


def test_an_average_with_the_classifier_it_began_from(go_on, begun, pictures, capsys):
    run = go_on(data=pictures)
    with pytest.raises(SystemExit) as done:
        predict.main(["--checkpoint", str(begun), "--checkpoint", str(run / "best.pt"), str(pictures / "val"), "-j", "0"])
    assert done.value.code == 0


# ---- going on


def assert_the_same_run(one, other):
    for file in ("last.pt", "best.pt"):
        a, b = read(one / file), read(other / file)
        for key in (*STATE, "anchor", "fisher", "before", "classes", "known"):
            assert equal(a[key], b[key]), (file, key)
    assert untimed(history(one)) == untimed(history(other))


@pytest.mark.parametrize("method, options, lives", [
    ("freeze+ewc+replay", ["--freeze", "bn", "--ewc", 10, "--fisher-size", 3, "--replay-fraction", 0.3, "--accumulate", 2], 4),
    ("l2-sp+replay", ["--replay-size", 4, "--schedule", "plateau", "--plateau-epochs", 1], 2)])
def test_stopped_anywhere_it_ends_as_an_undisturbed_run(go_on, method, options, lives, tmp_path, capsys):
    """After a step, within the old validation, at the end of an epoch, after the first step of the next one."""
    settings = {"method": method, "epochs": 2}
    whole, broken, places = go_on(*options, **settings), tmp_path / "broken", []
    steps = read(whole / "last.pt")["step"] // 2
    for moment in (1, steps + 1, 4, 1)[:lives]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment, signal.SIGTERM)
            go_on(*options, "--resume", **settings, output=broken)
        assert stopped.value.code == 143
        assert f"go on with: python train_continual.py --resume {broken}/last.pt\n" in capsys.readouterr().err
        saved = read(broken / "last.pt")
        places.append((saved["epoch"], saved["step"]))
    assert places == [(0, 1), (0, steps), (1, steps), (1, steps + 1)][:lives]
    train_continual.main(["--resume", str(broken / "last.pt"), "--workers", "1"])
    assert_the_same_run(whole, broken)


# ---- errors


def test_what_makes_no_sense_is_refused_in_one_line(go_on, error_of, begun, tmp_path, monkeypatch):
    bare = tmp_path / "bare.pt"
    torch.save(torchvision.models.get_model(MODEL).state_dict(), bare)
    for split in ("train", "val"):
        draw(tmp_path / "strange" / split / "wolf" / "1.png", "cat", 1)
    saved = read(begun) | {"script": "train_regressor", "outputs": ["price"]}
    del saved["classes"]
    torch.save(saved, of_numbers := tmp_path / "numbers.pt")
    for words, options in (
        ("--from is needed: best.pt", {"from": None}), ("--data is needed: the new pictures", {"data": None}),
        ("no such checkpoint", {"from": "nowhere.pt"}), ("holds no run, perhaps bare weights", {"from": bare}),
        ("was written by train_regressor.py: --from takes a classifier", {"from": of_numbers}),
        ("--old-data is needed: --method ewc learns from old pictures", {"method": "ewc", "old_data": None}),
        ("--old-data is needed: --method replay+freeze", {"method": "replay+freeze", "old_data": None}),
        ("--method knows no 'magic': there are none, freeze", {"method": "magic"}),
        ("each name once, and none alone", {"method": "none+ewc"}), ("each name once", {"method": "ewc+ewc"}),
        ("l2-sp and ewc pull towards the same point", {"method": "l2-sp+ewc"}),
        ("all of it is frozen: freeze less", {"method": "l2-sp+freeze"}),
        ("has nothing to pull", {"method": "freeze+l2-sp", "freeze": "conv1,stage2,stage3,stage4,conv5"}),
        ("--ewc only has a meaning with --method ewc", {"ewc": 3}),
        ("--freeze only has a meaning with --method freeze", {"freeze": "bn"}),
        ("--replay-size only has a meaning with --method replay", {"replay_size": 3}),
        ("--backbone-lr-scale only has a meaning", {"method": "freeze", "backbone_lr_scale": 1}),
        ("--monitor only has a meaning with --old-data", {"monitor": "mean_accuracy", "old_data": None}),
        ("has the class 'wolf', which the model of", {"old_data": tmp_path / "strange"}),
        ("makes 0 old pictures in a batch of 4", {"method": "replay", "replay_fraction": 0.1}),
        ("makes 4 old pictures in a batch of 4", {"method": "replay", "replay_fraction": 0.9}),
    ):
        assert words in error_of(go_on, **options), words
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process: start it without torchrun" in error_of(go_on)


def test_what_may_change_when_it_goes_on(go_on, error_of, tmp_path):
    last = str(go_on("--method", "replay") / "last.pt")
    assert "--batch-size is 2 but the run was started with 4: it stays" in error_of(
        train_continual.main, ["--resume", last, "--batch-size", "2", "--accumulate", "2"])
    assert "--method is ewc but the run was started with replay" in error_of(
        train_continual.main, ["--resume", last, "--method", "ewc"])
    draw(tmp_path / "other" / "train" / "cat" / "1.png", "cat", 1)
    draw(tmp_path / "other" / "val" / "cat" / "1.png", "cat", 2)
    assert "--old-data holds other pictures" in error_of(
        train_continual.main, ["--resume", last, "--old-data", str(tmp_path / "other")])
    train_continual.main(["--resume", last, "--epochs", "2", "--lr", "0.001"])
    assert read(last)["epoch"] == 2 and checkpoint.load(last, "train_continual")
