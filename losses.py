"""Losses and penalties.

    criterion = CrossEntropy(weight=class_weights("balanced", classes, counts), label_smoothing=0.1)
    loss = criterion(logits, labels)                    # a scalar, in float32
    penalty = 1e-5 * l1_penalty(model)                  # once per optimizer step

This file needs torch alone and can be copied into any project.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LossError(Exception):
    """Loss settings that make no sense. The message is one line that names the way out."""


class CrossEntropy(nn.Module):
    """Cross-entropy with class weights in either of their two senses, and label smoothing.

    weight: tensor (C,) or None: how much a sample of each true class counts. It punishes *missing* that class; it does
        not punish false alarms for it.
    mean: what the weighted losses of a batch are divided by.
        "weighted": the sum of the samples' weights, as `nn.CrossEntropyLoss(weight=...)` does. A batch in which every
            sample weighs 10 has the same loss as one in which every sample weighs 1: weights shift the balance
            between classes and leave the size of the gradient alone.
        "plain": the number of samples. A sample of weight 10 costs ten times as much, whatever else is in the batch:
            the "10x penalty" of many tutorials. Gradients grow with the weights.
    label_smoothing: as in `nn.CrossEntropyLoss` (Szegedy et al., "Rethinking the Inception Architecture", 2016).

    forward(logits (N, C), labels (N,) int64) -> scalar. With "weighted", the mean is not additive: micro-batches of an
    accumulated step are each divided by their own sum of weights, then joined by their share of the images.
    """

    def __init__(self, weight=None, mean="weighted", label_smoothing=0.0):
        super().__init__()
        if mean not in ("weighted", "plain"):
            raise LossError(f"mean must be 'weighted' or 'plain', not '{mean}'")
        self.register_buffer("weight", weight)
        self.mean, self.label_smoothing = mean, label_smoothing

    def forward(self, logits, labels):
        if self.mean == "weighted":
            return F.cross_entropy(logits, labels, self.weight, label_smoothing=self.label_smoothing)
        per_sample = F.cross_entropy(
            logits, labels, self.weight, label_smoothing=self.label_smoothing, reduction="none"
        )
        return per_sample.mean()


def class_weights(spec, classes, counts):
    """A weight per class, as a float32 tensor (C,), or None.

    spec: None; `balanced`: N / (C * n_c) for n_c training images of class c, so that every class weighs the same in
        total (King and Zeng, "Logistic Regression in Rare Events Data", 2001); or `dog=10,cat=1`, where a class that
        is not named weighs 1.
    classes: the C names. counts: images per class in the training split, in that order.
    """
    if spec is None:
        return None
    if spec == "balanced":
        return torch.tensor([sum(counts) / (len(counts) * n) for n in counts])
    weights = dict.fromkeys(classes, 1.0)
    for part in spec.split(","):
        name, equals, value = part.strip().rpartition("=")
        if not equals:
            raise LossError(f"class weights '{spec}' are neither 'balanced' nor like {classes[0]}=10,{classes[-1]}=1"
                            + (" (rename a class with a comma)" if any("," in c for c in classes) else ""))
        if name not in weights:
            raise LossError(f"class weights name an unknown class '{name}'; the classes are {', '.join(classes)}"
                            + (" (rename a class with a comma)" if any("," in c for c in classes) else ""))
        try:
            weights[name] = float(value)
        except ValueError:
            raise LossError(f"the weight of class '{name}' is '{value}', which is not a number") from None
        # At zero, a batch of that class alone would be 0 / 0; what is too large for float32 would be infinite.
        if not (math.isfinite(weights[name]) and 1e-30 < weights[name] < 1e30):
            raise LossError(f"the weight of class '{name}' is {value}; it must be above zero, and finite")
    return torch.tensor(list(weights.values()))


def check_finite(loss, what, way_out):
    """Raise LossError, naming `what` and the way out, unless the number `loss` is finite."""
    if not math.isfinite(loss):
        raise LossError(f"the {what} is {loss}, nothing of it was saved; try half the rate: {way_out}")


def l1_penalty(model):
    """Sum of |w| over the trainable weights of convolutions and linear layers: no biases, no norm layers, no tokens or
    position embeddings, nothing frozen.

    A scalar in float32. Multiply by 1e-6 to 1e-5: over a whole ResNet-50 the sum is near a million.
    (Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996)
    """
    weights = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("weight") and p.ndim > 1]
    return torch.stack([w.float().abs().sum() for w in weights]).sum()
