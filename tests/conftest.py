"""Shared by all tests: small drawn pictures, a small network's weights, and ways to run a script and catch its error.

torch is imported within: pytest -n 2 reads this file before it starts the two processes that run tests, and runs none.
"""

import os
import random
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny pictures gain nothing by more threads, which wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where there are more, without spinning, as in the scripts

import pytest
from lives import Lives
from PIL import Image, ImageDraw

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would every script

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MODEL = "shufflenet_v2_x0_5"  # 0.3 million parameters, with BatchNorm; layers conv1, stage2-4, conv5, fc


def draw(path, shape, seed, size=40):
    """A white ellipse (class "cat") or rectangle (class "dog") on a coloured ground."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (size, size), tuple(rng.randrange(160) for _ in range(3)))
    x, y, r = rng.randint(12, 28), rng.randint(12, 28), rng.randint(7, 11)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "cat" else pen.rectangle)((x - r, y - r, x + r, y + r), fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def draw_folder(root, **per_class):
    """draw_folder(root, train=8, val=3) draws root/train/cat/cat.0.png ..."""
    for split, count in per_class.items():
        for shape in ("cat", "dog"):
            for i in range(count):
                draw(root / split / shape / f"{shape}.{i}.png", shape, f"{split}{shape}{i}")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """10 / 4 / 3 pictures per class in train/, val/, test/. Not to be changed by a test."""
    return draw_folder(tmp_path_factory.mktemp("pictures"), train=10, val=4, test=3)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file with the weights of a 7-class network whose BatchNorms have seen some data."""
    import torch
    import torchvision

    torch.manual_seed(1)
    model = torchvision.models.get_model(MODEL, num_classes=7).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def lives(tmp_path_factory):
    """lives.start(script, *argv) runs script.main(argv) in a process of its own; see lives.py."""
    lives = Lives(tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()


SMALL = {"model": MODEL, "weights": "none", "image_size": 32, "epochs": 1, "batch_size": 8, "workers": 0, "amp": "off",
         "no_report": True}  # a report takes longer than this training


def command_line(options, named):
    """{"batch_size": 8, ...} and further options as the words of a command; None leaves one out, True gives no value."""
    words = [word for name, value in named.items() if value is not None
             for word in (f"--{name.replace('_', '-')}", value) if word is not True]
    return [str(word) for word in [*words, *options]]


@pytest.fixture
def train(pictures, tmp_path, monkeypatch):
    """train("--epochs", 2, ...) runs train_classifier.main in this process on small pictures and returns the run
    folder. Options given replace these; None leaves one out."""
    import train_classifier

    runs = iter(range(100))

    def run(*options, data=pictures, output=None, **replaced):
        output = output or tmp_path / f"run{next(runs)}"
        train_classifier.main(command_line(options, {"data": data, "output": output} | SMALL | replaced))
        return output

    return run


def draw_discs(root, scale=1.0, **per_split):
    """draw_discs(root, train=8, val=3) draws white discs on a dark ground and writes root/labels.csv: the radius times
    `scale`, twice the horizontal position, and a weight of 1 or 2.
    """
    rows = ["file,radius,place,weight,split"]
    for split, count in per_split.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = random.Random(f"{split}{i}")
            r, x, y = rng.uniform(4, 14), rng.uniform(15, 25), rng.uniform(15, 25)
            picture = Image.new("RGB", (40, 40), tuple(rng.randrange(100) for _ in range(3)))
            ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill="white")
            picture.save(root / split / f"{i}.png")
            rows.append(f"{split}/{i}.png,{r * scale!r},{2 * x!r},{1 + i % 2},{split}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def discs(tmp_path_factory):
    """20 / 8 / 6 discs of known radius in labels.csv. Not to be changed by a test."""
    return draw_discs(tmp_path_factory.mktemp("discs"), train=20, val=8, test=6)


@pytest.fixture
def regress(discs, tmp_path):
    """As `train`, for train_regressor.main, with --target radius."""
    import train_regressor

    runs = iter(range(100))

    def run(*options, data=discs, output=None, **replaced):
        output = output or tmp_path / f"regression{next(runs)}"
        train_regressor.main(command_line(options, {"data": data, "output": output, "target": "radius"} | SMALL | replaced))
        return output

    return run


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """20 / 8 / 6 discs in labels.csv with 1, 0 or nothing for large, right, heavy, and the same in the names of tags.csv,
    where what is not known is 0. Not to be changed by a test."""
    root = draw_discs(tmp_path_factory.mktemp("labelled"), train=20, val=8, test=6)
    rows = [line.split(",") for line in (root / "labels.csv").read_text().splitlines()[1:]]
    labels, tags = ["file,large,right,heavy,split"], ["file,tags,split"]
    for i, (file, radius, place, weight, split) in enumerate(rows):
        cells = [int(float(radius) > 9), int(float(place) > 40), int(weight == "2")]
        tags.append(f"{file},{' '.join(name for name, yes in zip(('large', 'right', 'heavy'), cells, strict=True) if yes)},{split}")
        cells[i % 3] = "" if i % 4 == 0 else cells[i % 3]
        labels.append(",".join(map(str, [file, *cells, split])))
    (root / "labels.csv").write_text("\n".join(labels) + "\n")
    (root / "tags.csv").write_text("\n".join(tags) + "\n")
    return root


@pytest.fixture
def label(labelled, tmp_path):
    """As `train`, for train_multilabel.main, with --target large,right."""
    import train_multilabel

    runs = iter(range(100))

    def run(*options, data=labelled, output=None, **replaced):
        output = output or tmp_path / f"labels{next(runs)}"
        settings = {"data": data, "output": output, "target": "large,right"}
        train_multilabel.main(command_line(options, settings | SMALL | replaced))
        return output

    return run


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a BERT of two layers with random weights; see tiny_bert.py. Not to be changed by a test."""
    import tiny_bert

    return tiny_bert.make(tmp_path_factory.mktemp("models") / "tiny_bert")


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A CSV of 26 / 10 / 8 texts, positive or negative. Not to be changed by a test."""
    import tiny_bert

    return tiny_bert.write_reviews(tmp_path_factory.mktemp("texts") / "reviews.csv", train=26, val=10, test=8)


@pytest.fixture
def classify_text(reviews, tiny_bert, tmp_path):
    """As `train`, for train_text_classifier.main."""
    import train_text_classifier

    runs = iter(range(100))

    def run(*options, data=reviews, output=None, **replaced):
        output = output or tmp_path / f"texts{next(runs)}"
        settings = {"data": data, "output": output, "model": tiny_bert, "epochs": 1, "batch_size": 4, "amp": "off",
                    "no_report": True}
        train_text_classifier.main(command_line(options, settings | replaced))
        return output

    return run


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """A folder of CoNLL files with 20 / 6 / 6 sentences. Not to be changed by a test."""
    import tiny_bert

    return tiny_bert.write_tagged(tmp_path_factory.mktemp("tagged"), train=20, dev=6, test=6)


@pytest.fixture
def tag_words(tagged, tiny_bert, tmp_path):
    """As `train`, for train_token_classifier.main."""
    import train_token_classifier

    runs = iter(range(100))

    def run(*options, data=tagged, output=None, **replaced):
        output = output or tmp_path / f"words{next(runs)}"
        settings = {"data": data, "output": output, "model": tiny_bert, "epochs": 1, "batch_size": 4, "amp": "off",
                    "no_report": True}
        train_token_classifier.main(command_line(options, settings | replaced))
        return output

    return run


@pytest.fixture
def error_of(capsys):
    """error_of(function, ...) calls it, demands exit status 2 and exactly one line `error: ...` on stderr, and returns
    that line."""

    def call(function, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            function(*args, **kwargs)
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err.strip()

    return call


def read(file):
    import torch

    return torch.load(file, weights_only=True)


def changed(before, after):
    """The keys of two state_dicts whose tensors are not bit-identical."""
    import torch

    assert before.keys() == after.keys()
    return {k for k in before if not torch.equal(before[k], after[k])}
