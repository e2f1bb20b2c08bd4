"""Every classification network of torchvision: head, groups and freezing for all, the whole way for those of odd shape.

The whole way for all of them is a command: python benchmarks/all_models.py --train
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import all_models
import freeze
import model as models
from conftest import ROOT, draw_folder, read
from test_train_classifier import SGD

TABLE = (ROOT / "benchmarks/all_models.md").read_text().splitlines()[2:]


class Unfilled(TorchFunctionMode):
    """Layers get parameters that have a shape alone and take no memory: these are counted, not computed with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def test_the_table_of_all_networks_is_true():
    """Counted another way than `freeze.select` does: by the type of each layer."""
    names = models.model_names()
    assert [line.split(" | ")[0].strip("| ") for line in TABLE] == names
    for name, line in zip(names, TABLE, strict=True):
        with Unfilled():
            row = all_models.row_of(name)
        assert line.startswith(all_models.markdown(row)), name
        if row["parameters"] > 60_000_000:
            continue  # of the same families as smaller ones; building them twice takes too long here
        with Unfilled(), all_models.QuickInit(fill=False):
            model = models.build(name, num_classes=2, **models.build_options(name, all_models.size_of(name)))
        layer = model.get_submodule(row["head"])
        outputs = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        assert outputs == 2, name  # torchvision itself sizes this layer by the number of classes
        inside = sum(p.numel() for p in layer.parameters())
        assert (row["parameters"], row["backbone"]) == (sum(p.numel() for p in model.parameters()), inside), name
        for spec, kind in (("conv", nn.Conv2d), ("bn", nn.BatchNorm2d)):
            count = sum(p.numel() for m in model.modules() if isinstance(m, kind) and m is not layer for p in m.parameters())
            assert row[spec] == (row["parameters"] - count if count else None), (name, spec)
        groups = freeze.layer_groups(model, row["head"])
        members = [n for group in groups.values() for n in group]
        assert len(members) == len(set(members)) == len(list(model.parameters())), name
        assert list(groups)[-1] == row["head"] and 5 <= len(groups) <= 60, (name, len(groups))


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("few"), train=2, val=1, test=1)


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0", "googlenet"])
def test_the_whole_way(name, tmp_path, monkeypatch):
    """Trained with every spec and with an MLP head, saved, rebuilt by predict.py with the same probabilities."""
    monkeypatch.setattr(all_models, "gc", SimpleNamespace(collect=lambda: None))  # for memory; slow beside a whole suite
    all_models.draw_pictures(tmp_path / "data")
    row = all_models.row_of(name)
    said = all_models.train_and_predict(row, tmp_path)
    assert said == ", ".join(["none", *(s for s in all_models.SPECS if row[s]), "to", "mlp"])


@pytest.mark.parametrize("size", [299, 96])
def test_inception_has_an_auxiliary_head_where_it_fits(train, few, size, capsys):
    run = train(data=few, model="inception_v3", image_size=size, lr=1e-4)
    out = capsys.readouterr().out
    state = read(run / "last.pt")
    assert state["build"]["options"] == {"aux_logits": size == 299, "transform_input": False}
    assert ("AuxLogits (auxiliary head)" in out) == (size == 299)
    assert ("AuxLogits.fc.weight" in state["model"]) == (size == 299)
    if size == 299:
        assert state["model"]["AuxLogits.fc.weight"].shape == (2, 768)


@pytest.mark.parametrize("freezing, there", [([], True), (["--freeze", "backbone"], False),
                                             (["--freeze", "backbone", "--unfreeze", "0:all"], True)])
def test_auxiliary_heads_are_there_when_the_backbone_trains(train, few, freezing, there):
    state = read(train(*freezing, data=few, model="googlenet", lr=1e-4) / "last.pt")
    assert any(k.startswith("aux1.") for k in state["model"]) == there
    assert any(k.startswith("aux2.") for k in state["model"]) == there


def test_the_auxiliary_losses_are_weighted(train, few, monkeypatch):
    """The network replaced by its head's bias, also for the auxiliary outputs: one SGD step is then 1.6 times that
    without them, and train_loss is that of the head alone."""
    both = []
    for auxiliary in (0, 2):
        def forward(self, x, auxiliary=auxiliary):
            outputs = self.fc.bias.expand(len(x), 2)
            return (outputs,) * (1 + auxiliary) if self.training and auxiliary else outputs

        monkeypatch.setattr(all_models.torchvision.models.GoogLeNet, "forward", forward)
        runs = [train("--class-weights", "dog=3", data=few, model="googlenet", **SGD | {"lr": lr}) for lr in (0, 0.5)]
        start, end = (read(run / "last.pt")["model"]["fc.bias"] for run in runs)
        both.append((end - start, read(runs[0] / "last.pt")["history"][0]["train_loss"]))
    torch.testing.assert_close(both[1][0], 1.6 * both[0][0])
    assert both[1][1] == both[0][1] and both[0][0].abs().max() > 0.01
