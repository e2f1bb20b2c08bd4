"""The learning-rate range test, on a problem whose answer is known, and in the scripts."""

import copy
import functools
import math
import os

import pytest
import torch
from PIL import Image

import freeze
import lr_finder
import train_classifier
from conftest import changed, read


def quadratic(curvature=8.0):
    """loss = curvature / 2 * w^2 by SGD: it falls while lr < 2 / curvature, fastest to zero at 1 / curvature."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 3.0)

    def losses():
        while True:
            yield curvature / 2 * (model.weight**2).sum()

    return model, losses(), torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)


def test_rates_rise_by_the_same_factor_and_stop_where_it_breaks():
    model, losses, optimizer = quadratic()
    rates, values = lr_finder.range_test(model, losses, optimizer, low=1e-3, high=10.0, steps=41)
    factor = (10.0 / 1e-3) ** (1 / 40)
    assert rates == pytest.approx([1e-3 * factor**i for i in range(len(rates))])
    assert len(values) == len(rates) < 41 and values[0] == 36.0
    w, momentum = 3.0, 0.0  # the same by hand
    for rate, value in zip(rates, values, strict=True):
        assert value == pytest.approx(4 * w * w, rel=1e-4)
        momentum = 0.5 * momentum + 8 * w
        w -= rate * momentum
    assert rates[-1] > 2 / 8  # it goes on until the rate is too high


def test_everything_is_as_before():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "lr": 1e-2}])
    x, y = torch.randn(16, 3), torch.arange(16) % 2
    loss = torch.nn.functional.cross_entropy
    loss(model(x), y).backward()
    optimizer.step()  # so that it has a state
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    seen = []
    real = optimizer.step
    optimizer.step = lambda: (seen.append([g["lr"] for g in optimizer.param_groups]), real())
    lr_finder.range_test(model, iter(lambda: loss(model(x), y), None), optimizer, lr=1e-2, low=1e-4, high=1e-1, steps=7)
    assert [high / low for low, high in seen] == pytest.approx([10] * 7) and seen[0][1] == 1e-4 and seen[-1][1] == pytest.approx(0.1)
    assert not changed(before[0], model.state_dict())
    after = optimizer.state_dict()
    assert [g["lr"] for g in after["param_groups"]] == [1e-3, 1e-2]
    assert all(torch.equal(a, b) for i, s in before[1]["state"].items() for a, b in zip(s.values(), after["state"][i].values(), strict=True))


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_smoothed_loss():
    rates = [10.0**i for i in range(-6, 3)]
    values = [1.0, 1.0, 0.9, 0.7, 0.4, 0.2, 0.5, 5.0, math.nan]
    average, smoothed = 0.0, []  # by the definition: weights 0.9^k, normalized
    for i in range(8):
        weights = [0.9**k for k in range(i + 1)]
        smoothed.append(sum(w * v for w, v in zip(weights, reversed(values[: i + 1]), strict=True)) / sum(weights))
    assert lr_finder.smooth(values[:8]) == pytest.approx(smoothed) and average == 0.0
    rate, words = lr_finder.suggest(rates, values)
    assert rate == pytest.approx(rates[smoothed.index(min(smoothed))] / 10) and words.startswith("a tenth of 1,")
    for flat in ([1.0] * 9, [1.0, 2.0, 3.0], [math.nan]):
        with pytest.raises(lr_finder.RangeTestError, match="the loss never fell"):
            lr_finder.suggest(rates, flat)


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_find_lr_suggests_and_trains_nothing(request, kind, capsys, tmp_path, monkeypatch):
    # Eight steps on so few pictures are all noise: what is made of them is tested above.
    monkeypatch.setattr(lr_finder, "range_test", functools.partial(lr_finder.range_test, steps=8, high=1e-4))
    monkeypatch.setattr(lr_finder, "suggest", lambda rates, values: (rates[5], f"a tenth of {len(values)}"))
    run, trained = request.getfixturevalue({"classifier": "train", "regressor": "regress"}[kind]), []
    monkeypatch.setattr(freeze, "train_mode", lambda model, real=freeze.train_mode: (trained.append(model), real(model))[1])
    folder = run("--find-lr", "--amp", "fp16", output=tmp_path / "found", epochs=3)
    out = capsys.readouterr().out
    assert "suggested: --lr 1.4e-05 (a tenth of 8)" in out and f"the curve is in {folder}/find_lr.png" in out
    assert sorted(os.listdir(folder)) == ["args.json", "find_lr.png"] and len(trained) == 1
    assert Image.open(folder / "find_lr.png").size[0] > 500
    run(output=folder)  # the folder is as good as new
    assert (folder / "last.pt").exists()


def test_find_lr_leaves_a_run_alone(train, error_of):
    run = train()
    before = {name: (run / name).read_bytes() for name in os.listdir(run)}
    assert "already holds a run" in error_of(train, "--find-lr", output=run)
    assert "--find-lr only has a meaning with a new run" in error_of(
        train_classifier.main, ["--resume", str(run / "last.pt"), "--find-lr"])
    assert {name: (run / name).read_bytes() for name in os.listdir(run)} == before and read(run / "last.pt")["epoch"] == 1


def test_find_lr_where_nothing_can_be_learned(train, error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert "the loss never fell" in error_of(train, "--find-lr", "--augment", "none", output=tmp_path / "x", freeze="backbone")
