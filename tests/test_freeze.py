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
    assert all(g["lr"] == g["peak_lr"] for g in groups)
    settings = {id(p): (g["weight_decay"], g["peak_lr"]) for g in groups for p in g["params"]}
    assert len(settings) == sum(len(g["params"]) for g in groups) == len(list(resnet.parameters()))
    for name, module in resnet.named_modules():  # another route than the number of dimensions: the type of the layer
        for kind, parameter in module.named_parameters(recurse=False):
            decays = kind == "weight" and isinstance(module, (nn.Conv2d, nn.Linear))
            assert settings[id(parameter)] == (0.1 if decays else 0.0, 0.5 if name == "fc" else 0.125), name


def test_param_groups_decay_no_tokens_and_no_embeddings():
    for name in ("vit_b_32", "swin_t", "convnext_tiny"):
        model = torchvision.models.get_model(name, num_classes=2)
        decayed = {id(p) for g in freeze.param_groups(model, freeze.find_head(model), 1, 0.1) if g["weight_decay"] for p in g["params"]}
        expected = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        expected |= {id(m.in_proj_weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        assert decayed == expected


def test_group_table(resnet):
    freeze.freeze(resnet, "to:layer3", "fc")
    groups = freeze.param_groups(resnet, "fc", lr=0.01, backbone_lr_scale=0.1)
    rows = {line.split()[0]: line for line in freeze.group_table(resnet, "fc", groups).splitlines()}
    assert "frozen" in rows["layer3"] and "trains" in rows["layer4"] and rows["layer4"].endswith("0.001")
    assert rows["fc"].endswith("0.01") and "1,026" in rows["fc"]
    assert "11,177,538" in rows["total"]


# ---- layer groups, rates, freezing again


def test_freeze_to_and_unfreeze_as_in_fastai(resnet):
    groups = freeze.layer_groups(resnet, "fc")
    for n in (-1, -3, 0, 2, 6):
        freeze.freeze_to(resnet, n, "fc")
        assert frozen(resnet) == {name for group in list(groups.values())[:n] for name in group}, n
    freeze.unfreeze(resnet)
    assert not frozen(resnet)
    freeze.freeze_to(resnet, -1)  # the head is found where it is not named
    assert {n for n, p in resnet.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    for n in (7, -8):
        with pytest.raises(freeze.FreezeError, match=f"7 layer groups .*: n must be from -7 to 6, not {n}"):
            freeze.freeze_to(resnet, n)


def test_an_auxiliary_head_is_never_frozen_and_has_the_heads_rate():
    model = torchvision.models.googlenet(num_classes=2, init_weights=False)
    heads = ("fc", "aux1", "aux2")
    found = freeze.layer_groups(model, heads)
    assert {"aux1", "aux2", "inception4a"} < set(found) and list(found)[-1] == "fc"
    for spec in ("backbone", "all", "aux1,conv1", "to:fc"):
        freeze.freeze(model, spec, heads)
        assert "conv1.conv.weight" in frozen(model)
        assert not any(n.startswith(heads) for n in frozen(model)), spec
    rates = {g["layer"]: g["peak_lr"] for g in freeze.param_groups(model, heads, 1.0, 0, 0.5, layer_decay=0.5)}
    assert (rates["fc"], rates["aux1"], rates["aux2"]) == (1, 1, 1)
    assert (rates["inception5b"], rates["inception5a"], rates["inception4e"]) == (0.5, 0.25, 0.125)
    assert "aux1 (auxiliary head)" in freeze.group_table(model, heads)
    for n, first in ((-1, "fc"), (-2, "inception5b"), (-3, "inception5a")):
        freeze.freeze_to(model, n, heads)
        trains = [name for name in freeze.layer_groups(model, heads) if f"{name}." in "".join(
            f"{n}. " for n, p in model.named_parameters() if p.requires_grad) and name not in heads]
        assert trains[:1] == ([first] if first != "fc" else []), n


def test_to_a_layer_takes_the_class_token_along():
    vit = torchvision.models.vit_b_32(num_classes=2)
    freeze.freeze(vit, "to:conv_proj", "heads.head")
    assert frozen(vit) == {"class_token", "conv_proj.weight", "conv_proj.bias"}
    freeze.freeze(vit, "to:encoder.layers.encoder_layer_0", "heads.head")
    assert {"class_token", "encoder.pos_embedding"} < frozen(vit)
    assert not any("encoder_layer_1" in n for n in frozen(vit))
    freeze.freeze(vit, "class_token", "heads.head")
    assert frozen(vit) == {"class_token"}


def test_layer_decay_by_hand(resnet):
    rates = {g["layer"]: g["peak_lr"] for g in freeze.param_groups(resnet, "fc", 1.0, 0, 0.1, layer_decay=0.5)}
    assert rates == pytest.approx({"fc": 1, "layer4": 0.1, "layer3": 0.05, "layer2": 0.025, "layer1": 0.0125,
                                   "bn1": 0.00625, "conv1": 0.003125})


def test_a_rate_for_each_stage(resnet):
    freeze.freeze(resnet, "backbone", "fc")
    groups = freeze.param_groups(resnet, "fc", 1.0, 0.1, 0.1)

    def rates():
        return {g["layer"]: g["peak_lr"] for g in groups}

    before = rates()
    freeze.thaw(resnet, "layer4@1e-4,layer3", "fc", groups)
    assert rates() == before | {"layer4": 1e-4}
    assert not any(n.startswith(("layer3.", "layer4.")) for n in frozen(resnet))
    assert {g["lr"] for g in groups} == {1.0, 0.1}  # the loop sets it, from peak_lr
    freeze.thaw(resnet, "all@0", "fc", groups)
    assert rates() == dict.fromkeys(before, 0.0) | {"fc": 1.0}  # the head keeps its own
    freeze.thaw(resnet, "bn@0.5", "fc", groups)  # in a ResNet these are whole groups: those without decay
    assert {g["peak_lr"] for g in groups if g["layer"] != "fc" and not g["weight_decay"]} == {0.5}


@pytest.mark.parametrize("spec, words", [
    ("layer4@fast", "'layer4@fast': 'fast' is no learning rate"), ("layer4@-1", "is no learning rate"),
    ("layer4@", "is no learning rate"), ("layer4@nan", "is no learning rate"), ("layer4@inf", "is no learning rate"),
    ("layer4.0@1e-4", "are a part of layer4 only: write layer4@RATE"), ("fc@1e-4", "the head learns at --lr"), ("layer9@1e-4", "'layer9' matches no layer"),
])
def test_rates_that_cannot_be_set(resnet, spec, words):
    groups = freeze.param_groups(resnet, "fc", 1.0)
    with pytest.raises(freeze.FreezeError, match=words):
        freeze.check_thaws({1: spec}, 3, resnet, "fc", groups)
    assert {g["peak_lr"] for g in groups} == {1.0}
    with pytest.raises(freeze.FreezeError, match="needs the optimizer's param_groups"):
        freeze.thaw(resnet, "layer4@1e-4", "fc")


def test_plan_thaws_of_a_resumed_run():
    assert freeze.plan_thaws(["1:layer4", "3:all"], ["1:layer4", "2:bn"], 2) == {1: "layer4", 3: "all"}
    assert freeze.plan_thaws(["3:all"], ["1:layer4@1e-4", "2:bn"], 2) == {1: "layer4@1e-4", 3: "all"}
    assert freeze.plan_thaws(["1:layer4@1e-5"], ["1:layer4@1e-4"], 2) == {1: "layer4@1e-5"}  # rates may change
    with pytest.raises(freeze.FreezeError, match="before epoch 2 cannot be changed: that was 1:layer4@1e-4"):
        freeze.plan_thaws(["1:layer3@1e-4"], ["1:layer4@1e-4"], 2)


@pytest.mark.parametrize("make", [
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), lambda groups: torch.optim.AdamW(groups),
    lambda groups: torch.optim.RMSprop(groups, momentum=0.9), lambda groups: torch.optim.Adagrad(groups),
])
def test_freezing_again_leaves_no_momentum_and_no_decay_that_moves(resnet, make):
    """Trained for two steps, frozen again, trained on: what is frozen stands still bit for bit."""
    optimizer = make(freeze.param_groups(resnet, "fc", 0.1, weight_decay=0.1))
    for step in range(5):
        if step == 2:
            before = {k: v.clone() for k, v in resnet.state_dict().items()}
            freeze.freeze(resnet, "to:layer4", "fc")
        freeze.train_mode(resnet)(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {k for k, v in resnet.state_dict().items() if not torch.equal(v, before[k])} == {"fc.weight", "fc.bias"}
    freeze.unfreeze(resnet)  # and trains again
    freeze.train_mode(resnet)(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(resnet.conv1.weight, before["conv1.weight"])
