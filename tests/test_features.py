"""--cache-features: pictures go through a frozen backbone once, and the run ends with the weights of one without it."""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

import all_models
import data
import features
import freeze
import model as models
import train_classifier
from conftest import SMALL, changed, command_line, draw_folder, read
from test_interruptions import assert_the_same_run, stop_at
from test_train_classifier import equal, history, untimed

CACHED = ["--freeze", "backbone", "--cache-features"]
FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t",
            "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
            "swin_v2_t", "vit_b_32"]


@pytest.fixture
def decoded(monkeypatch):
    """The splits of all pictures that are decoded, in this process."""
    seen, real = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *a: (seen.append(Path(path).parts[-3]), real(path, *a))[1])
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone_and_head_side_are_the_whole_network(name):
    """One of each family; python benchmarks/all_models.py --features does it for all."""
    assert all_models.features_are_exact(name)


@pytest.mark.parametrize("model, options, precision", [
    ("shufflenet_v2_x0_5", ["--accumulate", "2"], "off"), ("mobilenet_v3_small", ["--head", "mlp"], "bf16"),
    ("squeezenet1_1", [], "off"), ("googlenet", [], "fp16"), ("mobilenet_v3_small", ["--freeze", "features"], "off"),
])
def test_with_a_view_for_every_epoch_the_weights_are_the_same(train, model, options, precision):
    """Dropout on the head's side lives on: squeezenet, mobilenet and googlenet have some of their own there. With
    `--freeze features`, a layer of the mobilenet's before the head trains, too.
    """
    settings = {"model": model, "epochs": 2, "amp": precision, "lr": 0.01}
    plain = train("--freeze", "backbone", *options, **settings)
    cached = train(*CACHED, 2, *options, **settings)
    a, b = read(plain / "last.pt"), read(cached / "last.pt")
    for key in ("model", "optimizer", "rng", "best", "best_epoch"):
        assert equal(a[key], b[key]), key
    assert untimed(history(plain)) == untimed(history(cached))
    assert (plain / "test_predictions.csv").read_text() == (cached / "test_predictions.csv").read_text()


def test_the_regressor_too(regress, weights):
    options = ["--quantiles", "0.1,0.5,0.9", "--sample-weight", "weight", "--augment", "light", "--freeze", "backbone"]
    plain, cached = (regress(*options, "--cache-features", k, weights=weights, epochs=2) for k in (0, 3))
    assert not changed(read(plain / "last.pt")["model"], read(cached / "last.pt")["model"])
    assert untimed(history(plain)) == untimed(history(cached))


def test_each_view_is_computed_once(train, decoded):
    """Two views in five epochs; the validation once; the test pictures at the end, by the whole network."""
    run = train(*CACHED, 2, epochs=5)
    assert [decoded.count(split) for split in ("train", "val", "test")] == [40, 8, 6]
    names = ["features_train_0.bin", "features_train_1.bin", "features_val_0.bin"]
    assert sorted(p.name for p in run.glob("features*")) == names
    # the views alternate, and are those of the epochs 0 and 1
    one, other = (data.SeededBatches(20, 8, 0, shuffle=True, epoch=e) for e in (0, 2))
    views = [torch.load(run / name, weights_only=True) for name in names[:2]]
    assert views[0]["numbers"].tolist() == [i for batch in one for _, i in batch]
    assert not torch.equal(views[0]["features"].sort(0).values, views[1]["features"].sort(0).values)
    by_number = {n: row for n, row in zip(views[0]["numbers"].tolist(), views[0]["features"], strict=True)}
    labels = torch.arange(20)
    for (x, y, bad), keys in zip(features.FeatureBatches(views[0], labels, other), other, strict=True):
        assert y.tolist() == [i for _, i in keys] and not bad
        assert torch.equal(x, torch.stack([by_number[i] for i in y.tolist()]))


def test_stopped_while_features_are_computed(train, decoded, pictures):
    """At the second of three batches; the view is begun again. One that is there is used again."""
    whole = train(*CACHED, 2, epochs=3)
    broken = whole.with_name("broken")
    for moment in (2, 3 + 3 + 1 + 1 + 2):  # the second batch of view 0; of view 1 in epoch 1
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment, signal.SIGTERM)
            train(*CACHED, 2, "--resume", epochs=3, output=broken)
        assert stopped.value.code == 143
    state = read(broken / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 3) and len(list(broken.glob("features_train_*.bin"))) == 1
    decoded.clear()
    train(*CACHED, 2, "--resume", epochs=3, workers=0, output=broken)
    assert [decoded.count(split) for split in ("train", "val")] == [20, 0]
    assert_the_same_run(whole, broken)


@pytest.mark.parametrize("change, again", [
    ("nothing", 0), ("a picture", 28), ("the workers", 0), ("the batch size", 28), ("a damaged file", 20),
])
def test_features_are_used_again_unless_what_they_depend_on_has_changed(train, decoded, pictures, tmp_path, change, again):
    shutil.copytree(pictures, tmp_path / "data")
    run = train(*CACHED, 1, data=tmp_path / "data")
    more = {"the workers": ["--workers", "0"], "the batch size": ["--batch-size", "4", "--accumulate", "2"]}.get(change, [])
    if change == "a picture":
        os.utime(tmp_path / "data/train/cat/cat.1.png", (1, 1))
    if change == "a damaged file":
        (run / "features_train_0.bin").write_bytes(b"no features")
    decoded.clear()
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "2", *more])
    assert len(decoded) - 6 == again  # 6 of the test split


def test_features_are_used_again_by_another_process(lives, decoded, pictures, tmp_path):
    """In which every function lies at another address."""
    words = command_line([*CACHED, 1], SMALL | {"data": pictures, "output": tmp_path / "run"})
    assert lives.start("train_classifier", *words).wait() == 0
    train_classifier.main(["--resume", str(tmp_path / "run/last.pt"), "--epochs", "2"])
    assert len(decoded) == 6  # of the test split


def test_the_first_thaw_drops_them(train, weights, capsys, decoded):
    options = ["--freeze", "backbone", "--unfreeze", "2:stage4"]
    plain = train(*options, weights=weights, epochs=4)
    cached = train(*options, "--cache-features", 2, weights=weights, epochs=4)
    assert capsys.readouterr().out.count("the backbone trains: the cached features are dropped") == 1
    assert not list(cached.glob("features*"))
    assert not changed(read(plain / "last.pt")["model"], read(cached / "last.pt")["model"])
    assert untimed(history(plain)) == untimed(history(cached))
    # back to before it: computed again
    train_classifier.main(["--resume", str(cached / "before_unfreeze_2.pt"), "--unfreeze", "3:stage4"])
    assert not list(cached.glob("features*")) and len(history(cached)) == 4


def test_unreadable_pictures_are_left_out_of_them(train, tmp_path):
    root = draw_folder(tmp_path / "data", train=10, val=4, test=3)
    for name in ("train/cat/cat.3.png", "val/dog/dog.2.png"):
        (root / name).write_bytes(b"")
    plain = train("--freeze", "backbone", "--on-bad-image", "skip", data=root, epochs=2)
    cached = train(*CACHED, 2, "--on-bad-image", "skip", data=root, epochs=2)
    assert not changed(read(plain / "last.pt")["model"], read(cached / "last.pt")["model"])
    assert untimed(history(plain)) == untimed(history(cached)) and history(cached)[1]["unreadable"] == "2"


@pytest.mark.parametrize("options, words", [
    ([], "--cache-features needs a frozen backbone, such as --freeze backbone: conv1.0.weight trains"),
    (["--freeze", "to:stage3"], "stage4.0.branch1.0.weight trains"),
    (["--freeze", "backbone", "--mixup", "0.2"], "--cache-features only has a meaning with neither --mixup nor --cutmix"),
    (["--freeze", "backbone", "--unfreeze", "0:all", "--model", "googlenet"], "aux1.conv.conv.weight trains"),
])
def test_refused_where_it_cannot_be_right(train, error_of, tmp_path, options, words):
    model = {"model": None} if "--model" in options else {}
    assert words in error_of(train, "--cache-features", 1, *options, output=tmp_path / "run", **model)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_while_features_are_computed_is_no_disk_error(train, monkeypatch):
    monkeypatch.setattr(features, "head_input", lambda *a: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        train(*CACHED, 1)


def test_a_disk_that_is_full(train, error_of, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run = train("--freeze", "backbone")
    before = (run / "last.pt").read_bytes()
    monkeypatch.setattr(torch, "from_file", refuse)
    error = error_of(train, *CACHED, 1, output=run.with_name("full"))
    assert "features_train_0.bin" in error and "No space left on device" in error and "leave out --cache-features" in error
    assert not list(run.with_name("full").glob("features*")) and (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_as_they_were(tmp_path, shape, dtype):
    layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    rows = torch.randn(7, *shape).to(dtype).contiguous(memory_format=layout)
    features.write_features(tmp_path / "x.bin", "key", ((rows[i : i + 3], torch.arange(i, min(i + 3, 7)) * 2) for i in (0, 3, 6)))
    assert os.listdir(tmp_path) == ["x.bin"]
    assert features.read_features(tmp_path / "x.bin", "other key") is None and features.read_features(tmp_path / "y.bin", "key") is None
    order = data.SeededBatches(14, 5, seed=1, shuffle=True)
    for x, y, _ in features.FeatureBatches(features.read_features(tmp_path / "x.bin", "key"), torch.arange(14), order):
        assert all(n % 2 == 0 for n in y.tolist()) and x.is_contiguous(memory_format=layout)  # the odd ones were not read
        assert x.dtype == dtype and torch.equal(x, rows[y // 2])


def test_what_trains_beyond_the_head_side():
    model = models.build("mobilenet_v3_small", num_classes=2)
    head = freeze.find_head(model)
    side = features.head_side(model, head)
    freeze.freeze(model, "features", head)
    assert features.trains_beyond(model, side) == ""
    freeze.freeze(model, "to:features.3", head)
    assert features.trains_beyond(model, side).startswith("features.")


def key_of(folder, code, constant="STRENGTH = 1", helper="def half(x): return x / 2\nGAIN = 1", make="transform"):
    """The key of features with a transform that is made in a file of these contents, beside another file."""
    folder.mkdir(exist_ok=True)
    name = f"transform{len(list(folder.iterdir()))}"
    (folder / f"{name}_helper.py").write_text(helper)
    (folder / f"{name}.py").write_text(f"import functools\nimport {name}_helper as other\nfrom {name}_helper import GAIN\n{constant}\n{code}\n")
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
    listed = data.ImageList([], v2.Compose([eval(make, vars(module)), v2.Resize(8)]))
    return features.features_key({}, "fc", listed)


def test_the_key_knows_what_is_white():
    keys = [features.features_key({}, "fc", data.ImageList([], v2.Resize(8), white=white)) for white in (None, 255.0, 4095.0, None)]
    assert keys[0] == keys[3] and len(set(keys)) == 3


FUNCTION = "def transform(x, gain=2):\n    return other.half(x) * STRENGTH * gain * GAIN"
CLASS = "class Views:\n    def __init__(self, n): self.n = n\n    def __call__(self, x): return x * self.n"


def test_the_key_says_what_a_transform_does(tmp_path):
    """Whatever of it is edited makes another key; the same, in files of the same content, the same."""
    before = key_of(tmp_path, FUNCTION)
    edits = {"its code": {"code": FUNCTION.replace("*", "+")}, "a default": {"code": FUNCTION.replace("gain=2", "gain=3")},
             "a constant": {"constant": "STRENGTH = 2"}, "another file": {"helper": "def half(x): return x / 3\nGAIN = 1"},
             "a constant of another file": {"helper": "def half(x): return x / 2\nGAIN = 2"},
             "a partial": {"make": "functools.partial(transform, gain=3)"}, "a lambda": {"make": "lambda x: transform(x)"}}
    keys = {what: key_of(tmp_path, **({"code": FUNCTION} | edit)) for what, edit in edits.items()}
    assert len({before, *keys.values()}) == 1 + len(edits)
    assert keys["a partial"] != key_of(tmp_path, FUNCTION, make="functools.partial(transform, gain=4)")
    # a class's own values, a static method, and what a repr leaves out of an array or orders by chance
    for code, new in (("class T:\n    k = 1\n    def __call__(self, x): return x", ("k = 1", "k = 2")),
                      ("class T:\n    @staticmethod\n    def f(x): return x + 1\n    def __call__(self, x): return self.f(x)", ("+", "-"))):
        assert key_of(tmp_path, code, make="T()") != key_of(tmp_path, code.replace(*new), make="T()")
    table = "TABLE = torch.zeros(5000); TABLE[2500] = 1"
    code = "def transform(x): return x + TABLE if x.mode in {'a', 'b', 'c'} else x"
    keys = [key_of(tmp_path, code, constant=f"import torch\n{t}") for t in (table, table.replace("2500", "2501"), table)]
    assert keys[0] == keys[2] != keys[1]
    views = [key_of(tmp_path, CLASS, make=make) for make in ("Views(2)", "Views(3)", "Views(2).__call__", "Views(3).__call__")]
    assert len(set(views)) == 4 and len({key_of(tmp_path, CLASS.replace("*", "+"), make="Views(2)"), *views}) == 5
