"""The demo: what it draws, what it claims, and that its table is that of the runs."""

import csv
import importlib.util
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torchvision
from PIL import Image, ImageChops

import checkpoint
import data
import demo
import train_classifier
from conftest import MODEL, ROOT, draw


def pictures_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jpg")}


# ---- drawing


def test_the_same_pictures_on_every_run(tmp_path, monkeypatch, error_of):
    monkeypatch.setattr(demo, "EASY", {"train": 2, "val": 1, "test": 1})
    demo.main(["--draw", str(tmp_path / "a")])
    first = pictures_in(tmp_path / "a")
    assert len(first) == len(set(first.values())) == 8
    demo.main(["--draw", str(tmp_path / "a")])  # again, over itself
    assert pictures_in(tmp_path / "a") == first
    images = data.find_images(tmp_path / "a")
    assert images.classes == ["cat", "dog"] and [len(images.splits[s]) for s in ("train", "val", "test")] == [4, 2, 2]
    (tmp_path / "a/train/cat/.DS_Store").write_text("")
    demo.main(["--draw", str(tmp_path / "a")])
    draw(tmp_path / "a/train/cat/my.png", "cat", 1)
    assert "my.png is no picture of the demo" in error_of(demo.main, ["--draw", str(tmp_path / "a")])


def test_the_splits_share_no_picture_and_hard_ones_are_others(tmp_path):
    counts = {"train": 12, "val": 6, "test": 12}
    demo.draw_folder(tmp_path / "hard", ["cat", "owl"], counts, hard=True)
    demo.draw_folder(tmp_path / "easy", ["cat", "owl"], counts, hard=False)
    hard, easy = pictures_in(tmp_path / "hard"), pictures_in(tmp_path / "easy")
    assert hard.keys() == easy.keys() and len({*hard.values(), *easy.values()}) == 2 * len(hard) == 120


def test_all_animals_differ_though_drawn_from_the_same_numbers():
    faces = [demo.draw_face(kind, random.Random(3)) for kind in demo.KINDS]
    assert {face.size for face in faces} == {(demo.SIDE, demo.SIDE)}
    for i, face in enumerate(faces):
        for other in faces[:i]:
            assert ImageChops.difference(face, other).getbbox() is not None


def test_parts_stand_on_both_sides(monkeypatch):
    """A face without tilt, in the middle of a picture of one colour, is its own mirror image."""

    class Still(random.Random):
        def uniform(self, a, b):
            return (a + b) / 2

        def randint(self, a, b):
            return (a + b) // 2

        def randrange(self, n):
            return n // 2  # the clutter: behind the face, but for circles of the ground's colour

    for kind in demo.KINDS:
        face = demo.draw_face(kind, Still())
        difference = ImageChops.difference(face, face.transpose(Image.FLIP_LEFT_RIGHT)).convert("L")
        assert sum(difference.histogram()[40:]) < 0.02 * demo.SIDE**2, kind


# ---- whose folder


@pytest.mark.parametrize("option", ["--draw", "--pets", "--output"])
@pytest.mark.parametrize("taken", ["file", "folder"])
def test_never_writes_over_something_else(tmp_path, monkeypatch, error_of, taken, option):
    monkeypatch.setattr(demo, "draw_folder", None)
    target = tmp_path / "x"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.jpg").write_text("mine")
    assert "holds something else" in error_of(demo.main, [option, str(target)])
    assert "mine" in (target if taken == "file" else target / "mine.jpg").read_text()
    assert taken == "file" or len(list(target.iterdir())) == 1


def test_a_folder_is_for_one_purpose(tmp_path, monkeypatch, error_of):
    monkeypatch.setattr(demo, "EASY", {"train": 1})
    demo.main(["--draw", str(tmp_path / "a")])
    for option in (["--pets"], ["--breeds", "--pets"], ["--output"]):
        assert "holds something else" in error_of(demo.main, [*option, str(tmp_path / "a")])
    (tmp_path / "file").write_text("")
    assert "cannot write into" in error_of(demo.main, ["--draw", str(tmp_path / "file" / "b")])


@pytest.mark.parametrize("words", ["--breeds", "--draw x --breeds", "--draw x --pets y", "--draw x --output y", "x",
                                   "--pets x --seed 1", "--seed -1"])
def test_options_that_do_not_go_together(tmp_path, monkeypatch, error_of, words):
    monkeypatch.chdir(tmp_path)
    error_of(demo.main, words.split())
    assert list(tmp_path.iterdir()) == []


# ---- the whole story


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo with few pictures and one epoch, its scripts run in this process; returns the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "KINDS", {kind: demo.KINDS[kind] for kind in ("cat", "dog", "owl", "pig")})
    monkeypatch.setattr(demo, "MANY", {"train": 3, "val": 2})
    monkeypatch.setattr(demo, "FEW", {"train": 3, "val": 2, "test": 5})
    monkeypatch.setattr(demo, "SETTINGS", f"--model {MODEL} --image-size 32 --workers 0 --no-report --device cpu")
    monkeypatch.setattr(demo, "FIRST", "--epochs 1 --batch-size 4")
    monkeypatch.setattr(demo, "THEN", "--epochs 2 --batch-size 4")
    commands = []

    def run(command, log):
        train_classifier.main(command[1:])
        commands.append(command)
        file = Path(command[-1], "test_predictions.csv")
        if file.exists():  # so short a training leaves all four at chance: let 7, 8, 9 and 10 of 10 be right
            rows = enumerate(demo.read_csv(file), start=1)
            right = [row | {"prediction": row["truth"] if i <= 5 + len(commands) else "?"} for i, row in rows]
            checkpoint.write_csv(right, file)

    monkeypatch.setattr(demo, "run_script", run)
    monkeypatch.setitem(demo.STRATEGIES, "gradual unfreezing",  # the names of another network, and within two epochs
                        "--weights {weights} --freeze backbone --unfreeze 1:conv5 --unfreeze 1:all")
    return commands


def test_predictions_of_names_that_are_not_utf8(tmp_path):
    row = {"file": "caf\udce9/Á.png", "truth": "cat"}
    checkpoint.write_csv([row], tmp_path / "x.csv")
    assert demo.read_csv(tmp_path / "x.csv") == [row]


def test_the_whole_story(small, tmp_path, monkeypatch, capsys, error_of):
    demo.main(["--output", "my demo", "--seed", "3"])
    folder = tmp_path / "my demo"
    said = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in said.partition("\nstrategy")[2].splitlines()[1:5]}
    assert list(rows) == list(demo.STRATEGIES)
    for name, (accuracy, seconds) in rows.items():
        with open(folder / "runs" / name.replace(" ", "_") / "test_predictions.csv", newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == 10 and float(seconds) >= 0
        assert accuracy == f"{sum(row['truth'] == row['prediction'] for row in found) / 10:.3f}"
    assert [row[0] for row in rows.values()] == ["0.700", "0.800", "0.900", "1.000"]
    assert Image.open(folder / "demo.png").size == (1200, 480)
    assert sorted(p.name for p in folder.iterdir()) == [
        demo.MARKER, "cats_and_dogs", "demo.png", "log.txt", "other_animals", "runs"]
    assert [p.name for p in tmp_path.iterdir()] == ["my demo"]
    source = data.find_images(folder / "other_animals")
    assert source.classes == ["owl", "pig"] and "test" not in source.splits
    # the weights of the first training in three of four, and the same settings in all
    assert [command[0] for command in small] == ["train_classifier.py"] * 5
    weights = [command[command.index("--weights") + 1] for command in small]
    assert weights == ["none", "none", *["my demo/runs/other_animals/best.pt"] * 3]
    for command in small[1:]:
        assert f" {demo.THEN} {demo.SETTINGS} --seed 3 --output " in f" {' '.join(command)} "
        assert command[command.index("--data") + 1] == "my demo/cats_and_dogs"
    assert sorted(p.name for p in folder.rglob("*.pt")) == ["best.pt"] * 5
    # what it says to type next is understood
    for line in said.splitlines():
        if line.strip().startswith("python train_classifier.py"):
            train_classifier.build_parser().parse_args(shlex.split(line)[2:])

    # again, over itself, with a file of the user's among the runs
    (folder / "runs/head_only/mine.txt").write_text("mine")
    before = pictures_in(folder)
    monkeypatch.setattr(demo, "STRATEGIES", {"head only": demo.STRATEGIES["head only"]})
    monkeypatch.setattr(demo, "draw_results", lambda *_: None)
    demo.main(["--output", "my demo"])
    assert (folder / "runs/head_only/mine.txt").read_text() == "mine" and pictures_in(folder) == before
    draw(folder / "cats_and_dogs/train/cat/my.png", "cat", 1)
    assert "my.png is no picture of the demo" in error_of(demo.main, ["--output", "my demo"])


def test_the_strategies_are_those_of_the_benchmark():
    spec = importlib.util.spec_from_file_location("strategies", ROOT / "benchmarks/strategies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert list(demo.STRATEGIES.values()) == list(module.STRATEGIES.values())


def test_the_picture_can_be_told_apart_in_grey(tmp_path):
    demo.draw_results({name: (0.6 + i / 10, [0.5, 0.6 + i / 10], 1.0) for i, name in enumerate(demo.STRATEGIES)},
                      tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png").convert("RGB")
    assert all(max(c) - min(c) < 8 for _, c in picture.getcolors(2**24))  # no colour
    middle = picture.crop((800, 0, 1100, 480))  # the bars
    greys = [grey for number, (grey, _, _) in middle.getcolors(2**24) if number > 3000 and grey < 250]
    assert len(greys) == 4 and len(set(greys)) == 4


# ---- the scripts that it starts


def run_fake(tmp_path, monkeypatch, text):
    (tmp_path / "fake.py").write_text(text)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    demo.run_script(["fake.py", "--data", "two words"], tmp_path / "log.txt")


def test_epochs_are_shown_and_all_is_logged(tmp_path, monkeypatch, capfd):
    run_fake(tmp_path, monkeypatch,
             "import sys\nprint('table')\nprint('epoch   0  x', flush=True)\nprint(sys.argv[1:], file=sys.stderr)")
    assert capfd.readouterr() == ("$ python fake.py --data 'two words'\n  epoch   0  x\n", "")
    assert (tmp_path / "log.txt").read_text().splitlines() == ["table", "epoch   0  x", "['--data', 'two words']"]


def test_a_script_that_fails_is_named(tmp_path, monkeypatch, error_of):
    def fail():
        with demo.ending.tidy(demo.DemoError):
            run_fake(tmp_path, monkeypatch, "print('a\\nerror: no such folder: x')\nraise SystemExit(2)")

    assert error_of(fail) == f"error: fake.py has failed: no such folder: x (its output is in {tmp_path / 'log.txt'})"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_demo_and_its_script(tmp_path, number):
    (tmp_path / "train_classifier.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nprint('epoch   0', flush=True)\ntime.sleep(60)")
    program = ("import sys, demo, pathlib\ndemo.ROOT = pathlib.Path.cwd()\ndemo.MANY = demo.FEW = {'train': 1}\n"
               "demo.main(['--output', 'x'])")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
    for line in process.stdout:
        if line.startswith("  epoch"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ---- photographs

BREEDS = {"Abyssinian": 1, "american_bulldog": 2, "Bengal": 3}  # a capital letter: a cat


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Archives in the formats of the real ones, where the download would be: ten pictures of each of three breeds for
    trainval and four for test."""
    folder = tmp_path / "pets/.pets/oxford-iiit-pet"
    folder.mkdir(parents=True)
    (tmp_path / "pets" / demo.MARKER).write_text("The Oxford-IIIT Pet set by cat and dog, laid out by demo.py.\n")
    lists = {"trainval": [], "test": []}
    with tarfile.open(folder / "images.tar.gz", "w:gz") as images:
        for breed, number in BREEDS.items():
            cat = breed[0].isupper()
            for i in range(14):
                draw(tmp_path / "now.jpg", "cat" if cat else "dog", f"{breed}{i}")
                images.add(tmp_path / "now.jpg", f"images/{breed}_{i}.jpg")
                lists["trainval" if i < 10 else "test"].append(f"{breed}_{i} {number} {1 if cat else 2} 1")
    (tmp_path / "now.jpg").unlink()
    with tarfile.open(folder / "annotations.tar.gz", "w:gz") as annotations:
        lists["list"] = ["#Image CLASS-ID SPECIES BREED ID", *lists["trainval"], *lists["test"]]
        for name, lines in lists.items():
            info = tarfile.TarInfo(f"annotations/{name}.txt")
            text = "\n".join(lines).encode() + b"\n"
            info.size = len(text)
            annotations.addfile(info, io.BytesIO(text))
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda file, md5: tarfile.is_tarfile(file))
    return folder


def names(images, split):
    return {path.rpartition("/")[2]: images.classes[label] for path, label in images.splits[split]}


def test_pets_are_laid_out_from_the_archives(tmp_path, archives, capsys):
    demo.main(["--pets", str(tmp_path / "pets")])
    said = capsys.readouterr().out
    assert "42 photographs are in" in said
    images = data.find_images(tmp_path / "pets")
    assert images.classes == ["cat", "dog"] and images.ignored == {".pets/": 42, ".txt": 1}
    found = {split: names(images, split) for split in ("train", "val", "test")}
    for split, per_breed in (("train", 8), ("val", 2), ("test", 4)):
        for breed in BREEDS:
            of_it = [label for name, label in found[split].items() if name.startswith(breed)]
            assert of_it == ["cat" if breed[0].isupper() else "dog"] * per_breed
    assert {int(name.split("_")[-1][:-4]) for name in found["test"]} == {10, 11, 12, 13}
    assert len({*found["train"], *found["val"], *found["test"]}) == 42
    for path, _ in images.splits["val"]:  # the files themselves
        with open(path, "rb") as file:
            assert file.read() == (archives / "images" / path.rpartition("/")[2]).read_bytes()

    # an interrupted unpacking and half a copy are made good
    (archives.parent / "complete").unlink()
    (archives / "annotations/test.txt").unlink()
    victim = next((tmp_path / "pets/train/cat").iterdir())
    whole = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(whole[:100])
    demo.main(["--pets", str(tmp_path / "pets")])
    assert victim.read_bytes() == whole
    assert {split: names(data.find_images(tmp_path / "pets"), split) for split in found} == found


def test_pets_by_breed(tmp_path, archives, monkeypatch):
    (tmp_path / "pets" / demo.MARKER).write_text("The Oxford-IIIT Pet set by breed, laid out by demo.py.\n")
    monkeypatch.setattr(demo.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    demo.main(["--pets", str(tmp_path / "pets"), "--breeds"])
    images = data.find_images(tmp_path / "pets")
    assert images.classes == ["abyssinian", "american_bulldog", "bengal"]
    assert [len(images.splits[split]) for split in ("train", "val", "test")] == [24, 6, 12]
    assert all(name.lower().startswith(label) for name, label in names(images, "train").items())


def test_pets_without_the_network_names_the_way_out(tmp_path, monkeypatch, error_of):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", refuse)
    error = error_of(demo.main, ["--pets", str(tmp_path / "pets")])
    assert "Name or service not known" in error and "images.tar.gz" in error and "annotations.tar.gz" in error
    assert f"into {tmp_path / 'pets/.pets/oxford-iiit-pet'}" in error
    assert error_of(demo.main, ["--pets", str(tmp_path / "pets")]) == error  # and the folder stays usable
