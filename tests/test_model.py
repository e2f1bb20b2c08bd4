import argparse
import gzip
import io
import pickle
import platform
import re
import shlex
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

import freeze
import model as models
from all_models import QuickInit
from conftest import MODEL, changed
from model import ModelError


def fresh(name=MODEL, **options):
    return models.build(name, **options)


def load(state_dict, name=MODEL, head="fc", **options):
    net = fresh(name, **options)
    return net, models.load_weights(net, state_dict, head)


def test_names_and_close_matches():
    assert len(models.model_names()) >= 80 and "resnet18" in models.model_names()
    with pytest.raises(ModelError, match="did you mean resnet50"):
        models.check_name("ResNet-50")
    with pytest.raises(ModelError, match="there are: alexnet"):
        models.check_name("zzzz")


# ---- where weights come from


def test_none_knows_the_size_of_the_network():
    assert models.load_pretrained("none", MODEL)["state_dict"] is None
    assert models.load_pretrained("none", "inception_v3")["image_size"] == 299


def test_preprocessing_is_that_of_the_weights_unless_said_otherwise():
    of_weights = {"image_size": 224, "resize_size": 256, "mean": [0.5], "std": [0.2], "interpolation": "bicubic"}
    pretrained = of_weights | {"state_dict": {}, "source": "x"}
    plain = of_weights | {"resize": "crop", "white": None, "flip": True}
    assert models.preprocessing_for(pretrained) == models.preprocessing_for(plain) == plain
    assert models.preprocessing_for(pretrained, image_size=112) == plain | {"image_size": 112, "resize_size": 128}
    given = {"resize": "squash", "white": 4095.0, "flip": False}
    assert models.preprocessing_for(pretrained, None, *given.values()) == of_weights | given
    # one of our own checkpoints has them
    assert models.preprocessing_for(pretrained | given) == of_weights | given
    assert models.preprocessing_for(pretrained | given, resize="crop", white=1.0, flip=True) == of_weights | {
        "resize": "crop", "white": 1.0, "flip": True}


def test_unknown_weights_list_those_there_are():
    for name in ("IMAGENET", "ResNet50_Weights.DEFAULT"):
        with pytest.raises(ModelError, match=f"has no weights '{name}': there are IMAGENET1K_V1, DEFAULT, none, or the"):
            models.load_pretrained(name, MODEL)


def test_a_failed_download_says_what_to_type_instead(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ModelError) as error:
        models.load_pretrained("DEFAULT", "resnet18")
    text = str(error.value)
    assert "\n" not in text and "https://" in text and "--weights FILE" in text and "--weights none" in text


def test_a_download_is_loaded_without_unpickling_objects(monkeypatch):
    seen = {}
    expected = fresh("resnet18").state_dict()

    def download(url, **kwargs):
        seen.update(kwargs)
        return expected

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    pretrained = models.load_pretrained("IMAGENET1K_V1", "resnet18")
    assert pretrained["state_dict"] is expected and pretrained["source"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert seen["weights_only"] is True and seen["check_hash"] is True
    assert models.load_pretrained("ResNet18_Weights.DEFAULT", "resnet18")["image_size"] == 224


def test_a_published_file_is_known_by_its_name(tmp_path):
    entry = torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V2
    file = tmp_path / Path(entry.url).name
    torch.save({"x": torch.ones(1)}, file)
    pretrained = models.load_pretrained(str(file), "efficientnet_b1")
    assert (pretrained["image_size"], pretrained["resize_size"]) == (240, 255)
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    assert models.load_pretrained(str(tmp_path / "other.pth"), "efficientnet_b1")["image_size"] == 224


class Payload:
    """Unpickling this creates a file: what a malicious checkpoint would do."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def archive(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(zipfile.ZipInfo(name), "")  # without the time, of which the name of the test is made
    return file.getvalue()


def saved(holder, **options):
    file = io.BytesIO()
    torch.save(holder, file, **options)
    return file.getvalue()


OLD = saved({"a.w": torch.ones(300, 3)}, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
PROTOBUF = "is a model of ONNX, or of TensorFlow or Core ML"


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"", "is empty: fetch"), (b"\0" * 600, "is empty at its beginning, a download"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html><title>Virus scan warning", "is a web page.*fetch the file itself"),
    (b"<html lang=en>", "is a web page"), (b"planet42 is text", "is text, which begins with 'planet42"), (b"<?xml version='1.0'?><Error>", "is an XML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer.*`git lfs pull`"),
    (b"GGUF\3\0", "is a GGUF file"), (b"\x1c\0\0\0TFL3", "is a model of TensorFlow Lite"), (b"\x89HDF\r\n", "is an HDF5 file, as Keras"),
    (b"\x08\x08\x12\x07pytorch", PROTOBUF), (b"\x08\x01\x12\xff\x01\n", PROTOBUF), (b"\x93NUMPY\1\0", "is an array of NumPy"),
    (gzip.compress(b"x", mtime=0), "is a gzip archive: unpack it"), (b"7z\xbc\xaf\x27\x1c", "is a compressed archive: unpack"),
    (b"Rar!\x1a", "compressed archive"), (b"\xfd7zXZ\0", "compressed archive"), (b"a" * 257 + b"ustar", "is a tar archive: unpack"),
    (b"\x89PNG\r\n", "is a picture"), (b"GIF89a nothing", "is a picture"), (b"\xff\xd8\xff\xe0", "is a picture"),
    (b'{"weight_map": {}}', "is text, which begins with '{\"weight_map"), ("Größe?\n".encode(), "is text, which begins with 'Größe"),
    (pickle.dumps({"a": 1}), "is a Python pickle that torch.save did not write, nothing in it was executed"),
    (archive("best/model.pth", "LICENSE"), "is a zip archive with best/model.pth, LICENSE: unpack it"),
    (archive("config.json", "model.weights.h5"), "is a model of Keras"), (archive("a.npy", "b.npy"), "is an archive of NumPy"),
    (archive("x/archive_format", "x/data.pkl"), "is a program that torch.export wrote: give the checkpoint"),
    (archive("x/data.pkl", "x/constants.pkl"), 'is a program of TorchScript: where you trust it, type python -c "'),
    (saved({"a.w": torch.ones(300, 3)})[:900], "is a file whose end is missing, as when a download breaks off"),
    (OLD[:900], "is damaged, or its end is missing: fetch it again"),
    (bytes(range(90, 256)) * 4, "is not a file that torch.save or safetensors wrote, or is damaged"),
    ([1, 2], "holds no weights.*it holds a list"), ({"epoch": 3}, "holds no weights.*it holds epoch"), ({}, "holds nothing"),
    ({1: torch.ones(1)}, "holds no weights"), ({"model_state_dict": {}}, "it holds model_state_dict"),
    ({"w": torch.ones(1).to_sparse()}, "holds no weights"), ({"w": torch.ones(1, dtype=torch.complex64)}, "holds no weights"),
])
def test_files_that_hold_no_weights(tmp_path, content, words):
    file = tmp_path / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ModelError, match=words) as error:
        models.load_pretrained(str(file), MODEL)
    assert "x.pth" in str(error.value) and "\n" not in str(error.value)


def test_folders_and_addresses_are_no_files_of_weights(tmp_path, weights):
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / "hub" / name).touch()
    with pytest.raises(ModelError, match="hub is a folder: give the file of weights in it, such as .*hub/model.safetensors"):
        models.load_pretrained(str(tmp_path / "hub"), MODEL)
    with pytest.raises(ModelError, match="is an address: fetch the file, and give that"):
        models.load_pretrained("https://x.org/a.pth", MODEL)
    zipfile.ZipFile(weights).extractall(tmp_path)  # as some browsers do
    folder = tmp_path / weights.stem
    with pytest.raises(ModelError, match="is the unpacked folder of a PyTorch file: pack it again with python -m zipfile"):
        models.load_pretrained(str(folder), MODEL)
    zipfile.main(["-c", str(tmp_path / "again.pth"), str(folder)])
    again = models.load_pretrained(str(tmp_path / "again.pth"), MODEL)["state_dict"]
    assert not changed(torch.load(weights, weights_only=True), again)


def test_old_files_and_safetensors_under_any_name(tmp_path, monkeypatch):
    (tmp_path / "old.pth").write_bytes(OLD)
    assert torch.equal(models.load_pretrained(str(tmp_path / "old.pth"), MODEL)["state_dict"]["a.w"], torch.ones(300, 3))
    header = b'{"a.w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "x.pth").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda path: {"a.w": torch.ones(1)}
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    assert models.load_pretrained(str(tmp_path / "x.pth"), MODEL)["state_dict"] == {"a.w": 1}
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModelError, match="needs the package safetensors: pip install safetensors"):
        models.load_pretrained(str(tmp_path / "x.pth"), MODEL)


@pytest.mark.parametrize("kind", ["payload", "module"])
def test_a_pickle_payload_is_refused_and_not_executed(tmp_path, kind):
    file = tmp_path / "x.pth"
    torch.save({"model": Payload(tmp_path / "executed")} if kind == "payload" else nn.Linear(1, 1), file)
    with pytest.raises(ModelError, match=r"objects besides tensors \((io.open|torch.nn.modules.linear.Linear)\) and was refused, "
                                         "nothing in it was executed: where you trust it, type python -c"):
        models.load_pretrained(str(file), MODEL)
    assert not (tmp_path / "executed").exists()


def test_the_line_that_converts_a_file_with_objects(tmp_path, monkeypatch, weights):
    """As a shell would run it: its words, in this process."""
    plain, net = torch.load(weights, weights_only=True), fresh(num_classes=7)
    net.load_state_dict(plain)
    file = tmp_path / "it's $HOME `x`.pt"
    monkeypatch.chdir(tmp_path)
    for holder, source in ((net, ""), ({"model": net, "args": argparse.Namespace(lr=1)}, "::model"),
                           ({"run": {"net": plain, "acc": argparse.Namespace(best=0.5)}, "log": [print]}, "::run.net"),
                           ([3, net], "::1"), ((net, {"lr": 1}), "::0"), (argparse.Namespace(model=net, lr=1), "::model")):
        torch.save(holder, file)
        with pytest.raises(ModelError) as error:
            models.load_pretrained(str(file), MODEL)
        command = re.search(r"type (.*), and give --weights weights.pt$", str(error.value))[1]
        _, _, code, path = shlex.split(command)
        assert path == str(file) and not set(code) & set('$`!"\\')  # what shells change between double quotes
        monkeypatch.setattr(sys, "argv", ["-c", path])
        Path("weights.pt").unlink(missing_ok=True)
        exec(code, {})
        pretrained = models.load_pretrained("weights.pt", MODEL)
        assert pretrained["source"] == f"weights.pt{source}" and not changed(plain, pretrained["state_dict"])
        with pytest.raises(FileExistsError):  # nothing is written over
            exec(code, {})


# ---- the one dict of tensors


def optimizer_state():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


STATE = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.ones(2)}
CALLBACKS = {"Checkpoint{}": {"best_k_models": {"runs/epoch=1.ckpt": torch.tensor(0.5)}}}


@pytest.mark.parametrize("holder, source", [
    (STATE, ""), ({"x": torch.ones(1)}, ""), ({"epoch": 3, "model_state_dict": STATE}, "::model_state_dict"), ({"net": STATE}, "::net"),
    ({"state_dict_ema": STATE, "optimizer": optimizer_state(), "acc": torch.tensor(0.5)}, "::state_dict_ema"),
    ({"model": STATE, "muon": {"param_groups": [], "momenta": STATE}}, "::model"),
    ({"checkpoint": {"model": STATE, "opt": optimizer_state(), "loss": {"weight": torch.ones(2)}}}, "::checkpoint.model"),
    ({"state_dict": STATE, "callbacks": CALLBACKS, "optimizer_states": [optimizer_state()]}, "::state_dict"), ([STATE, 3], "::0"),
    (STATE | {"epoch": 3, "note": "x"}, " without epoch, note"),
    ({"teacher": {k: nn.Parameter(v) for k, v in STATE.items()}}, "::teacher"),
])
def test_the_one_dict_of_tensors_is_found(tmp_path, holder, source):
    file = tmp_path / "x.pt"
    torch.save(holder, file)
    pretrained = models.load_pretrained(str(file), MODEL)
    assert pretrained["source"] == f"{file}{source}"
    expected = {"x": torch.ones(1)} if holder == {"x": torch.ones(1)} else STATE
    assert not changed(expected, pretrained["state_dict"]) and not any(v.requires_grad for v in pretrained["state_dict"].values())


def test_of_several_dicts_a_key_chooses(tmp_path):
    file, other = tmp_path / "x.pt", {k: 2 * v for k, v in STATE.items()}
    two = {f"module.q.{k}": v for k, v in STATE.items()} | {f"module.k.{k}": v for k, v in other.items()}
    torch.save({"model": STATE, "ema": {"module": other}, "both": two}, file)
    with pytest.raises(ModelError, match=r"holds several sets of weights, model \(2 tensors\), ema.module \(2 tensors\), both \(4 "
                                         r"tensors\): choose one, --weights .*x.pt::model"):
        models.load_pretrained(str(file), MODEL)
    for key, expected in (("model", STATE), ("ema", other), ("ema.module", other), ("both.module.k", other), ("module.q", STATE)):
        pretrained = models.load_pretrained(f"{file}::{key}", MODEL)
        assert pretrained["source"] == f"{file}::{key}" and not changed(expected, pretrained["state_dict"])
    inner = {f"{which}.{k}": v for which, held in (("model", STATE), ("ema", other)) for k, v in held.items()}
    torch.save({"model": inner, "optimizer": {}}, tmp_path / "inner.pt")  # "several networks that fit, model, ema"
    for key, expected in (("model", STATE), ("ema", other), ("model.model", STATE), ("model.ema", other)):
        assert not changed(expected, models.load_pretrained(f"{tmp_path / 'inner.pt'}::{key}", MODEL)["state_dict"])
    with pytest.raises(ModelError, match=r"no weights under 'q': there are model .*, with names such as conv.weight and conv.bias"):
        models.load_pretrained(f"{file}::q", MODEL)
    file.rename(tmp_path / "a::b.pt")  # a name that exists is a name
    with pytest.raises(ModelError, match="a::b.pt holds several"):
        models.load_pretrained(str(tmp_path / "a::b.pt"), MODEL)
    with pytest.raises(ModelError, match="no such file: gone$"):
        models.load_pretrained("gone::model", MODEL)


def test_our_own_checkpoints_are_taken_by_model_alone(train, tmp_path):
    """Whatever an edited script has saved beside it."""
    run = train()
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save(state | {"averaged": state["model"]}, tmp_path / "x.pt")
    pretrained = models.load_pretrained(str(tmp_path / "x.pt"), MODEL)
    assert pretrained["source"] == str(tmp_path / "x.pt") and pretrained["outputs"] == ["cat", "dog"]


# ---- what fits and what does not


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_and_a_head_that_does_not_fit(weights, dtype):
    state_dict = torch.load(weights, weights_only=True)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
    net, said = load(cast, num_classes=2)
    assert "head fc left out: the file's has 7 outputs, this task 2" in said
    for key, value in net.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64)
        if not key.startswith("fc."):
            assert torch.equal(value, cast[key].to(value.dtype)), key


def test_a_head_that_fits_is_kept(weights):
    state_dict = torch.load(weights, weights_only=True)
    net, said = load(state_dict, num_classes=7)
    assert said == "head fc kept, it fits" and not changed(state_dict, net.state_dict())


OTHERS = {"queue": torch.ones(2, 2), "decoder.0.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("rename, off", [
    ("module.{}", "module"), ("_orig_mod.module.{}", "_orig_mod, module"), ("module._orig_mod.{}", "_orig_mod, module"),
    ("model.{}", "model"), ("module.model._orig_mod.net.0.{}", "_orig_mod, module, model.net.0"), ("student.{}", "student"),
    (lambda k: k.replace("stage2.", "stage2.module."), "module"), (lambda k: "backbone." + k.replace("conv1.", "conv1._orig_mod."), "_orig_mod, backbone"),
])
def test_what_stands_before_and_in_the_names_is_taken_off(weights, rename, off):
    state_dict = torch.load(weights, weights_only=True)
    rename = rename if callable(rename) else rename.format
    renamed = {rename(k): v for k, v in state_dict.items()}
    net, said = load(renamed, num_classes=7)
    assert not changed(state_dict, net.state_dict()) and said == f"taken off the names: {off}; head fc kept, it fits"
    assert renamed.keys() == {rename(k) for k in state_dict}  # the caller's stays as it is
    if off.split(", ")[-1] not in ("module", "_orig_mod"):  # then others may stand beside
        net, said = load(renamed | OTHERS, num_classes=7)
        assert not changed(state_dict, net.state_dict()) and said.endswith("; left out: queue, decoder.0.weight")


def test_counts_and_heads_under_other_names_are_left_out(weights):
    state_dict = torch.load(weights, weights_only=True)
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(fresh(num_classes=7)))
    averaged.module.module.load_state_dict(state_dict)
    net, said = load(averaged.state_dict(), num_classes=7)
    assert not changed(state_dict, net.state_dict())
    assert said == "taken off the names: module; head fc kept, it fits; left out: n_averaged"
    net, said = load(state_dict | {"conv1.total_ops": torch.zeros(1), "epoch": torch.tensor(3)}, num_classes=7)
    assert said == "head fc kept, it fits; left out: conv1.total_ops, epoch"
    other = {k.replace("fc.", "last_linear."): v for k, v in state_dict.items()}
    net, said = load(other, num_classes=7)
    assert said == ("head fc is not in the file, it starts at random weights; left out: last_linear.weight, last_linear.bias")
    assert changed(state_dict, net.state_dict()) == {"fc.weight", "fc.bias"}
    swav = {k: v for k, v in state_dict.items() if not k.startswith("fc.")} | {"prototypes.weight": torch.ones(3, 2)}
    assert load(swav, num_classes=7)[1].endswith("left out: prototypes.weight")


def test_several_networks_under_one_another(weights):
    state_dict = torch.load(weights, weights_only=True)
    both = {f"module.encoder_{which}.{k}": v for which in "qk" for k, v in state_dict.items()}
    with pytest.raises(ModelError, match="several networks that fit, module.encoder_q, module.encoder_k: choose one, --weights "
                                         "FILE::module.encoder_q"):
        load(both, num_classes=7)
    with pytest.raises(ModelError, match="unexpected: module.conv1.0.weight, "):
        load(state_dict | {f"module.{k}": v for k, v in state_dict.items()}, num_classes=7)


def test_weights_of_another_network_are_named():
    with QuickInit(fill=True):
        wide = {f"net.{k}": v for k, v in fresh("resnet34", num_classes=7).state_dict().items()}
    with pytest.raises(ModelError, match="weights do not fit this ResNet: 100 of its 100 tensors before the head are there; unexpected: "
                                         "layer1.2.conv1.weight, .* as many parameters as a resnet34: give --model resnet34"):
        load(wide, "resnet18", num_classes=7)


def test_a_mismatch_lists_keys(weights):
    state_dict = torch.load(weights, weights_only=True)
    short = {k: v for k, v in state_dict.items() if not k.startswith(("stage4.3", "conv5"))}
    with pytest.raises(ModelError, match=r"260 of its 280 tensors .*; missing: stage4.3.branch2.0.weight, .* and \d+ more; is --model"):
        load(short, num_classes=7)
    with pytest.raises(ModelError, match="unexpected: extra"):
        load(state_dict | {"extra": torch.ones(1)}, num_classes=7)
    with pytest.raises(ModelError, match=r"of another shape: conv1.0.weight \(1,\) instead of \(24, 3, 3, 3\)"):
        load(state_dict | {"conv1.0.weight": torch.ones(1)}, num_classes=7)
    with pytest.raises(ModelError, match="no floating-point numbers: conv1.0.weight"):
        load(state_dict | {"conv1.0.weight": torch.ones(24, 3, 3, 3, dtype=torch.int8)}, num_classes=7)
    for odd in ({"fc.weight": torch.ones(())}, {"fc.bias": torch.ones(1000)}):
        assert "left out" in load(state_dict | odd, num_classes=7)[1]
    without = {k: v for k, v in state_dict.items() if k != "fc.weight"}
    assert "left out: the file's consists of fc.bias" in load(without, num_classes=7)[1]
    assert "not in the file" in load({k: v for k, v in without.items() if k != "fc.bias"}, num_classes=7)[1]
    with pytest.raises(ModelError, match="not finite: conv1.0.weight"):
        load(state_dict | {"conv1.0.weight": torch.full((24, 3, 3, 3), torch.nan)}, num_classes=7)


def test_old_densenet_names_and_versions_of_layers():
    """torchvision's DenseNet files hold `norm.1`; MNASNet refuses a state_dict without its version."""
    net = fresh("densenet121", num_classes=3)
    old = {re.sub(r"(denselayer\d+\.)(norm|conv)([12])\.", r"\1\2.\3.", k): v for k, v in net.state_dict().items()}
    assert old.keys() != net.state_dict().keys()
    loaded, _ = load(old, "densenet121", head="classifier", num_classes=3)
    assert not changed(net.state_dict(), loaded.state_dict())
    net = fresh("mnasnet0_5", num_classes=3)
    loaded, _ = load(dict(net.state_dict()), "mnasnet0_5", head="classifier.1", num_classes=3)
    assert not changed(net.state_dict(), loaded.state_dict())


def test_the_first_files_had_no_batch_counts(weights):
    state_dict = OrderedDict(torch.load(weights, weights_only=True))
    old = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    net, _ = load(old, num_classes=7)
    assert torch.equal(net.conv1[1].running_mean, state_dict["conv1.1.running_mean"])
    detector = torch.load(weights, weights_only=True)  # frozen BatchNorms, of a newer version, have none either
    for key in [k for k in detector if k.endswith("num_batches_tracked")]:
        del detector[key]
    assert detector._metadata["conv1.1"]["version"] == 2
    net, _ = load(detector, num_classes=7)
    assert torch.equal(net.conv1[1].running_mean, state_dict["conv1.1.running_mean"])


# ---- building


def test_vit_is_built_for_the_size_and_its_positions_are_interpolated():
    options = models.build_options("vit_b_32", 96)
    small = models.build("vit_b_32", num_classes=2, **options)
    models.check_image_size(small.eval(), 96)
    said = models.load_weights(small, models.build("vit_b_32", num_classes=1000).state_dict(), "heads.head")
    assert small.encoder.pos_embedding.shape == (1, 3 * 3 + 1, 768) and "left out" in said
    with pytest.raises(ModelError, match="vit_b_32 cannot be built"):
        models.build("vit_b_32", **models.build_options("vit_b_32", 100))


@pytest.mark.parametrize("name, size", [("alexnet", 32), ("inception_v3", 32), ("squeezenet1_1", 8)])
def test_a_size_that_the_network_cannot_take(name, size):
    with pytest.raises(ModelError, match=f"cannot take images of {size} x {size} pixels") as error:
        models.check_image_size(models.build(name, **models.build_options(name, size)).eval(), size)
    assert "\n" not in str(error.value)


def test_a_single_image_that_batchnorm_cannot_train_on():
    net = fresh("resnet18")
    models.check_image_size(net.train(), 64)
    with pytest.raises(ModelError, match="cannot take a single image of 32 x 32 pixels .* --batch-size 2 or more"):
        models.check_image_size(net.train(), 32)


def test_imagenet_input_of_googlenet_is_kept_in_the_options():
    pretrained = models.load_pretrained("none", "googlenet") | {"imagenet_input": True}
    net = models.build("googlenet", num_classes=2, **models.build_options("googlenet", 224, pretrained))
    assert net.transform_input and net.aux1 is None
    with_aux = torchvision.models.googlenet(num_classes=2, aux_logits=True, init_weights=False).state_dict()
    assert models.load_weights(net, with_aux, "fc") == "head fc kept, it fits"


def test_a_squeezenet_head_can_go_below_zero():
    net = models.build("squeezenet1_1", num_classes=20).eval()
    assert (net(torch.randn(4, 3, 64, 64)) < 0).any()


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch):
    """Another process may hold all of its memory."""
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", full)
    for name in ("auto", "cuda"):
        with pytest.raises(ModelError, match=rf"^--device {name} cannot be used here \(CUDA out of memory.*\): try --device cpu$"):
            models.pick_device(name)
    with pytest.raises(ModelError, match=r"try --device cuda$"):
        models.pick_device("cuda:7")


def test_auto_precision_avoids_depthwise_convolutions_on_a_cpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert models.auto_precision(fresh("resnet18"), cpu)[0] == "bf16"
    mobilenet = fresh("mobilenet_v3_small")
    assert models.auto_precision(mobilenet, cpu)[0] == "off"
    assert models.auto_precision(fresh("efficientnet_v2_s"), cpu)[0] == "bf16"  # a few of them do no harm
    freeze.freeze(mobilenet, "backbone", "classifier.3")
    assert models.auto_precision(mobilenet, cpu)[0] == "bf16"  # forward alone they are faster, too
    assert models.auto_precision(mobilenet, cpu, thaws=True)[0] == "off"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert models.auto_precision(fresh("resnet18"), cpu) == ("off", "this CPU has no bf16 instructions")


# ---- heads


@pytest.mark.parametrize("name, kinds", [
    ("resnet18", "Linear ReLU Dropout Linear"), ("squeezenet1_1", "Conv2d ReLU Dropout Conv2d"),
])
def test_mlp_head(name, kinds):
    net = fresh(name, num_classes=9)
    head = "fc" if name == "resnet18" else "classifier.1"
    old = net.get_submodule(head)
    new = models.mlp_head(old, 3, hidden=7, dropout=0.25)
    assert " ".join(type(layer).__name__ for layer in new) == kinds and new[2].p == 0.25
    net.set_submodule(head, new)
    assert net.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    inside = old.in_channels if name != "resnet18" else old.in_features
    assert sum(p.numel() for p in new.parameters()) == (inside + 1) * 7 + (7 + 1) * 3


@pytest.mark.parametrize("name, found", [
    ("vgg11", ["classifier.2", "classifier.5"]), ("efficientnet_b0", ["classifier.0"]), ("alexnet", ["classifier.0", "classifier.3"]),
    ("squeezenet1_1", ["classifier.0"]), ("inception_v3", ["dropout"]), ("googlenet", ["dropout"]),
    ("mobilenet_v3_small", ["classifier.2"]), ("resnet18", None), ("vit_b_32", None), ("swin_t", None),
])
def test_set_dropout_reaches_the_heads_side_alone(name, found):
    options = {"aux_logits": True} if name in models.AUXILIARY_WEIGHT else {}
    with QuickInit(fill=False):
        net = fresh(name, num_classes=2, **options)
    head = freeze.find_head(net)
    if found is None:
        with pytest.raises(ModelError, match="has no dropout before its head: --dropout needs --head mlp here"):
            models.set_dropout(net, head, 0.125)
        net.set_submodule(head, models.mlp_head(net.get_submodule(head), 2))
        found = [f"{head}.2"]
    models.set_dropout(net, head, 0.125)
    assert [n for n, m in net.named_modules() if isinstance(m, nn.Dropout) and m.p == 0.125] == found


def test_a_head_of_another_kind_or_size_is_left_out(weights):
    plain = torch.load(weights, weights_only=True)
    mlp = fresh(num_classes=2)
    mlp.fc = models.mlp_head(mlp.fc, 2, hidden=5)
    kept = {k: v.clone() for k, v in mlp.state_dict().items()}
    assert "left out: the file's consists of fc.weight, fc.bias" in models.load_weights(mlp, plain, "fc")
    for key, value in mlp.state_dict().items():
        assert torch.equal(value, kept[key] if key.startswith("fc.") else plain[key]), key
    linear = fresh(num_classes=2)
    assert "left out: the file's consists of fc.0.weight" in models.load_weights(linear, kept, "fc")
    wider = fresh(num_classes=2)
    wider.fc = models.mlp_head(wider.fc, 2, hidden=6)
    assert "left out: the file's is of another size" in models.load_weights(wider, kept, "fc")


# ---- auxiliary heads


@pytest.mark.parametrize("name, heads", [("googlenet", ("aux1", "aux2")), ("inception_v3", ("AuxLogits",)), (MODEL, ())])
def test_auxiliary_heads(name, heads):
    with QuickInit(fill=True):
        net = fresh(name, num_classes=3, **models.build_options(name, 299, auxiliary=True))
    assert models.auxiliary_heads(net) == heads
    if heads:
        plain = models.build_options(name, 299)
        with QuickInit(fill=False):
            assert models.auxiliary_heads(fresh(name, num_classes=3, **plain)) == ()
    assert models.build_options("inception_v3", 298, auxiliary=True)["aux_logits"] is False  # they cannot take it


def test_weights_with_and_without_auxiliary_heads():
    def net(classes, aux_logits):
        with QuickInit(fill=True):
            return fresh("googlenet", num_classes=classes, aux_logits=aux_logits)

    def load_into(target, source):
        before = {k: v.clone() for k, v in target.state_dict().items()}
        models.load_weights(target, source.state_dict(), "fc")
        return before, target.state_dict(), source.state_dict()

    before, after, there = load_into(net(2, True), net(9, True))
    for key in after:  # the last layers have another size; all else comes from the file
        own = key.startswith(("fc.", "aux1.fc2.", "aux2.fc2."))
        assert torch.equal(after[key], before[key] if own else there[key]), key
    before, after, there = load_into(net(9, True), net(9, False))
    assert all(torch.equal(after[k], before[k] if k.startswith("aux") else there[k]) for k in after)
    _, after, there = load_into(net(9, False), net(9, True))
    assert all(torch.equal(after[k], there[k]) for k in after) and not any(k.startswith("aux") for k in after)
    target, source = net(2, True), net(2, True)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    models.load_weights(target, source.state_dict(), "fc", same_outputs=False)  # as many outputs, but others
    after, there = target.state_dict(), source.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith(("fc.", "aux1.fc2.", "aux2.fc2.")))
    assert all(torch.equal(after[k], there[k]) for k in after if k.startswith(("aux1.fc1.", "conv1.")))


TAKEN_AND_FREED = """
import resource, torch, model

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.ones(12_500_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
print(faults())
model.keep_freed_memory()
print(faults())
raise SystemExit
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept(lives):
    """In a process that has freed nothing yet, counted in page faults: 50 MB are 12,207 pages, which the system gives out
    one by one, filled with zeros. What is kept may be taken at another place a few times.
    """
    life = lives.start("train_classifier", before=TAKEN_AND_FREED)
    assert life.wait() == 0, life.err
    given_back, kept = map(int, life.out.split())
    assert given_back > 30 * 12_000 and kept < 10 * 12_000
