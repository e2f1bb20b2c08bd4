"""The learning-rate range test: raise the rate from step to step and see where the loss falls and where it breaks.

    def losses():                                   # computed one by one, each with the weights of that moment
        while True:
            for x, y in loader:
                yield criterion(model(x), y)

    rates, values = range_test(model, losses(), optimizer)
    rate, words = suggest(rates, values)

(Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.) The model is as before afterwards.
This file needs torch alone and can be copied into any project.
"""

import copy
import math


class RangeTestError(Exception):
    """A range test that says nothing. The message is one line that names the way out."""


def range_test(model, losses, optimizer, scaler=None, lr=1.0, low=1e-7, high=10.0, steps=100):
    """Train for `steps` optimizer steps while the rate rises from `low` to `high`, each time by the same factor, until
    the loss is not finite or four times its lowest smoothed value. Returns ([rate, ...], [loss, ...]), of the same
    length. Weights, buffers and the optimizer's state and rates are put back as they were.

    losses: an iterator that computes a scalar loss when it is asked for one. lr: the rate that the optimizer's groups
    were made for: they keep the proportions of their `peak_lr`, or else `lr`, to it. scaler: a torch.amp.GradScaler for fp16.
    """
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    scaling = copy.deepcopy(scaler.state_dict()) if scaler else {}
    # A schedule of PyTorch's has already lowered the groups' `lr` for its first step.
    shares = [group.get("peak_lr", group["lr"]) / lr for group in optimizer.param_groups]
    rates, values = [], []
    try:
        for i, loss in zip(range(steps), losses, strict=False):
            rate = low * (high / low) ** (i / (steps - 1))
            rates.append(rate)
            values.append(loss.item())
            smoothed = smooth(values)
            if not math.isfinite(values[-1]) or smoothed[-1] > 4 * min(smoothed):
                break
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            if scaler:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        if scaling:
            scaler.load_state_dict(scaling)
    return rates, values


def smooth(values, keep=0.9):
    """The exponential moving average of a list of numbers, freed from its bias towards zero at the beginning."""
    smoothed, average = [], 0.0
    for i, value in enumerate(values, start=1):
        average = keep * average + (1 - keep) * value
        smoothed.append(average / (1 - keep**i))
    return smoothed


def suggest(rates, values):
    """(rate, the rule in words): a tenth of the rate at which the smoothed loss was lowest. Raises RangeTestError where
    the loss never fell.
    """
    finite = [value for value in values if math.isfinite(value)]
    smoothed = smooth(finite)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    if not smoothed or smoothed[lowest] > 0.97 * smoothed[len(smoothed) // 10]:  # the very first are too noisy
        raise RangeTestError("the loss never fell, whatever the rate: look at the data and the loss first, or let more "
                             "of the network train")
    return rates[lowest] / 10, f"a tenth of {rates[lowest]:.2g}, at which the smoothed loss was lowest"
