import pytest
import torch
import torchvision
from torch import nn

import freeze


@pytest.fixture
def resnet():
    return torchvision.models.resnet18(num_classes=2)


def frozen(model):
    return {n for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name, head", [
    ("resnet18", "fc"), ("vgg11", "classifier.6"), ("squeezenet1_1", "classifier.1"), ("densenet121", "classifier"),
    ("mobilenet_v3_small", "classifier.3"), ("efficientnet_b0", "classifier.1"), ("swin_t", "head"), ("vit_b_32", "heads.head"),
])
def test_find_head(name, head):
    model = torchvision.models.get_model(name, num_classes=5)
    assert freeze.find_head(model) == head
    layer = model.get_submodule(head)
    assert (layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features) == 5


def test_find_head_refuses_a_network_without_one():
    with pytest.raises(freeze.FreezeError, match="no Linear and no Conv2d"):
        freeze.find_head(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("name, groups", [
    ("resnet18", "conv1 bn1 layer1 layer2 layer3 layer4 fc"),
    ("efficientnet_b0", " ".join(f"features.{i}" for i in range(9)) + " classifier.1"),
    ("vit_b_32", "class_token conv_proj encoder.pos_embedding "
     + " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(12)) + " encoder.ln heads.head"),
])
def test_layer_groups(name, groups):
    model = torchvision.models.get_model(name)
    found = freeze.layer_groups(model, freeze.find_head(model))
    assert " ".join(found) == groups
    members = [n for group in found.values() for n in group]
    assert sorted(members) == sorted(n for n, _ in model.named_parameters())  # each parameter in exactly one group


@pytest.mark.parametrize("spec, expected", [
    ("none", lambda n: False),
    ("backbone", lambda n: not n.startswith("fc.")),
    ("all", lambda n: not n.startswith("fc.")),  # the head is never frozen
    ("layer1", lambda n: n.startswith("layer1.")),
    ("conv1", lambda n: n == "conv1.weight"),  # and not layer4.0.conv1
    ("conv1, layer4.1.bn2", lambda n: n == "conv1.weight" or n.startswith("layer4.1.bn2.")),
    ("layer4.0.conv1.weight", lambda n: n == "layer4.0.conv1.weight"),
    ("*.bn1", lambda n: ".bn1." in n),
    ("layer[12]", lambda n: n.startswith(("layer1.", "layer2."))),
    ("to:layer2", lambda n: n.startswith(("conv1.", "bn1.", "layer1.", "layer2."))),
    ("bn", lambda n: "bn" in n or "downsample.1" in n),
    ("conv", lambda n: "conv" in n or "downsample.0" in n),
])
def test_freeze_spec(resnet, spec, expected):
    freeze.freeze(resnet, spec, "fc")
    assert frozen(resnet) == {n for n, _ in resnet.named_parameters() if expected(n)}


def test_the_head_alone_is_refused(resnet):
    for spec in ("fc", "fc.*"):
        with pytest.raises(freeze.FreezeError, match="is the head fc, which always trains"):
            freeze.freeze(resnet, spec, "fc")


def test_the_example_at_the_top_runs(monkeypatch, capsys):
    """freeze.py copied alone: its own example, without the download."""
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights, make=torchvision.models.resnet18: make())
    example = "\n".join(line[4:] for line in freeze.__doc__.splitlines() if line.startswith("    "))
    names = {"torch": torch, "torchvision": torchvision, "nn": nn, **vars(freeze)}
    exec(example, names)
    assert frozen(names["model"]) == {n for n, _ in names["model"].named_parameters() if not n.startswith(("fc.", "layer4."))}
    assert {g["lr"] for g in names["optimizer"].param_groups} == {1e-3, 1e-4}
    assert names["model"].layer4.training and not names["model"].layer3.training
    assert "1,026" in capsys.readouterr().out


def test_a_prefix_is_no_substring():
    model = nn.Sequential()
    for name in ("layer1", "layer10"):
        model.add_module(name, nn.Linear(2, 2))
    model.add_module("fc", nn.Linear(2, 2))
    freeze.freeze(model, "layer1", "fc")
    assert frozen(model) == {"layer1.weight", "layer1.bias"}


@pytest.mark.parametrize("spec", ["layer5", "conv", "relu", "to:nowhere", "*.nothing", "", "bn,,conv1"])
def test_a_name_that_matches_nothing_lists_those_there_are(spec):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(2, 2))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc", nn.Linear(2, 2))
    with pytest.raises(freeze.FreezeError, match="there are: body, fc"):
        freeze.freeze(model, spec, "fc")


def test_thaw(resnet):
    freeze.freeze(resnet, "backbone", "fc")
    count = freeze.thaw(resnet, "layer4", "fc")
    assert count == sum(p.numel() for p in resnet.layer4.parameters())
    assert frozen(resnet) == {n for n, _ in resnet.named_parameters() if not n.startswith(("fc.", "layer4."))}
    assert freeze.thaw(resnet, "layer4", "fc") == 0
    freeze.thaw(resnet, "all", "fc")
    assert not frozen(resnet)


def test_freezing_again_drops_the_gradient(resnet):
    resnet(torch.randn(2, 3, 32, 32)).sum().backward()
    freeze.freeze(resnet, "layer1", "fc")
    assert all(p.grad is None for p in resnet.layer1.parameters())
    assert all(p.grad is not None for p in resnet.layer2.parameters())


def test_parse_thaws():
    assert freeze.parse_thaws(["5:all", "3:layer4, layer3", "3:bn1"]) == {3: "layer4, layer3,bn1", 5: "all"}
    for wrong in ("layer4", "x:layer4", "-1:all", "3:", "1.5:all"):
        with pytest.raises(freeze.FreezeError, match="EPOCH:NAMES"):
            freeze.parse_thaws([wrong])


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_train_mode_puts_frozen_parts_into_eval(resnet, wrap):
    freeze.freeze(resnet, "backbone", "fc")
    freeze.thaw(resnet, "layer4", "fc")
    freeze.train_mode(wrap(resnet))
    for name, module in resnet.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == name.startswith("layer4."), name
    freeze.thaw(resnet, "all", "fc")
    freeze.train_mode(wrap(resnet))
    assert all(m.training for m in resnet.modules())


def test_dropout_is_live_beside_the_head_and_off_in_frozen_parts():
    model = torchvision.models.efficientnet_b0(num_classes=2)
    freeze.freeze(model, "backbone", "classifier.1")
    freeze.train_mode(model)
    assert model.classifier[0].training
    assert not any(m.training for m in model.features.modules())  # BatchNorm and stochastic depth
    vit = torchvision.models.vit_b_32(num_classes=2)
    freeze.freeze(vit, "backbone", "heads.head")
    freeze.train_mode(vit)
    assert not any(m.training for m in vit.encoder.modules())
    assert vit.heads.head.training


def test_requires_grad_alone_would_not_freeze_a_batchnorm(resnet):
    """The reason for train_mode: what the usual snippet does to a "frozen" network."""
    for parameter in resnet.parameters():
        parameter.requires_grad_(False)
    before = resnet.bn1.running_mean.clone()
    resnet.train()(torch.randn(4, 3, 32, 32))
    assert not torch.equal(resnet.bn1.running_mean, before)
    freeze.freeze(resnet, "backbone", "fc")
    before = resnet.bn1.running_mean.clone()
    freeze.train_mode(resnet)(torch.randn(4, 3, 32, 32))
    assert torch.equal(resnet.bn1.running_mean, before)


def test_param_groups_decay_no_bias_and_no_norm(resnet):
    freeze.freeze(resnet, "backbone", "fc")
    groups = freeze.param_groups(resnet, "fc", 0.5, weight_decay=0.1, backbone_lr_scale=0.25)
    assert all(g["lr"] == 0.5 * g["lr_scale"] for g in groups)
    settings = {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert len(settings) == sum(len(g["params"]) for g in groups) == len(list(resnet.parameters()))
    for name, module in resnet.named_modules():  # another route than the number of dimensions: the type of the layer
        for kind, parameter in module.named_parameters(recurse=False):
            decays = kind == "weight" and isinstance(module, (nn.Conv2d, nn.Linear))
            assert settings[id(parameter)] == (0.1 if decays else 0.0, 1.0 if name == "fc" else 0.25), name


def test_param_groups_decay_no_tokens_and_no_embeddings():
    for name in ("vit_b_32", "swin_t", "convnext_tiny"):
        model = torchvision.models.get_model(name, num_classes=2)
        decayed = {id(p) for g in freeze.param_groups(model, freeze.find_head(model), 1, 0.1) if g["weight_decay"] for p in g["params"]}
        expected = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        expected |= {id(m.in_proj_weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        assert decayed == expected


def test_group_table(resnet):
    freeze.freeze(resnet, "to:layer3", "fc")
    rows = {line.split()[0]: line for line in freeze.group_table(resnet, "fc", lr=0.01, backbone_lr_scale=0.1).splitlines()}
    assert "frozen" in rows["layer3"] and "trains" in rows["layer4"] and rows["layer4"].endswith("0.001")
    assert rows["fc"].endswith("0.01") and "1,026" in rows["fc"]
    assert "11,177,538" in rows["total"]
