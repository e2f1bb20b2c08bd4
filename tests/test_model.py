import platform
import re
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


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"", "not a file that torch.save wrote"), (b"GIF89a nothing", "not a file that torch.save wrote"),
    ([1, 2], "holds a list, not a state_dict"), ({"epoch": 3}, "holds no weights.*it holds epoch"), ({}, "holds nothing"),
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


@pytest.mark.parametrize("kind", ["payload", "module"])
def test_a_pickle_payload_is_refused_and_not_executed(tmp_path, kind):
    file = tmp_path / "x.pth"
    torch.save({"model": Payload(tmp_path / "executed")} if kind == "payload" else nn.Linear(1, 1), file)
    with pytest.raises(ModelError, match="refused, nothing in it was executed"):
        models.load_pretrained(str(file), MODEL)
    assert not (tmp_path / "executed").exists()


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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrapped_models_load(weights, prefix):
    state_dict = torch.load(weights, weights_only=True)
    net, _ = load({prefix + k: v for k, v in state_dict.items()}, num_classes=7)
    assert not changed(state_dict, net.state_dict())


def test_a_mismatch_lists_keys(weights):
    state_dict = torch.load(weights, weights_only=True)
    short = {k: v for k, v in state_dict.items() if not k.startswith(("stage4.3", "conv5"))}
    with pytest.raises(ModelError, match=r"missing: stage4.3.branch2.0.weight, .* and \d+ more; is --model"):
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
