"""The programs in benchmarks/ work; what they measure is not asserted here."""

import importlib.util
import shlex

import numpy as np
import pytest
import torch
import torchvision

import train_classifier
from conftest import ROOT


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


@pytest.mark.parametrize("name", list(program("strategies").STRATEGIES))
def test_the_strategies_are_commands_that_the_script_understands(name):
    options = program("strategies").STRATEGIES[name].format(weights="some.pth")
    args = train_classifier.build_parser().parse_args(["--data", "x", *shlex.split(options)])
    assert (args.freeze == "backbone") == (name in ("head only", "gradual unfreezing"))
    assert (args.weights == "none") == (name == "from scratch")
