"""Losses and penalties.

    criterion = CrossEntropy(weight=class_weights("balanced", classes, counts), label_smoothing=0.1)
    loss = criterion(logits, labels)                    # a scalar, in float32
    penalty = 1e-5 * l1_penalty(model)                  # once per optimizer step
    penalty = 0.01 * l2_sp_penalty(model, anchor)       # towards the starting point
    penalty = 100 * ewc_penalty(model, anchor, fisher_diagonal(model, batches))

Every classification loss is called as criterion(logits (N, C), target) -> scalar. The target is int64 labels (N,) or,
from MixUp and CutMix, class shares (N, C): floats that add up to 1 in every row. All is computed in float32 at least,
whatever the type of the logits.

Under accumulation and in several processes every batch has a loss of its own, and those of one optimizer step are
joined by their share of the pictures. For plain means, `CostMatrix` included, that is exactly the loss of the joined
batch. Two losses are not additive:
- a "weighted" mean divides each batch by its own sum of weights, so under accumulation an image counts for less beside
  heavy ones. Processes are joined by their sums of weights instead (`batch_weight`), which is exact;
- `SoftF1` is the F1 of each batch alone, over the classes that occur in it: it wants large batches.

This file needs torch alone and can be copied into any project.
"""

import math
import unicodedata

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class LossError(Exception):
    """Loss settings that make no sense. The message is one line that names the way out."""


def _check_options(mean, label_smoothing):
    if mean not in ("weighted", "plain"):
        raise LossError(f"mean must be 'weighted' or 'plain', not '{mean}'")
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"label smoothing must be from 0 to 1, not {label_smoothing}")


def _prepare(logits, target, per_class=None):
    """The three in float32 at least (labels stay int64). LossError unless the shapes fit: PyTorch might broadcast."""
    are_labels = target.dtype == torch.int64 and target.shape == logits.shape[:1]
    are_shares = target.is_floating_point() and target.shape == logits.shape
    if logits.ndim != 2 or not (are_labels or are_shares):
        raise LossError(f"logits {tuple(logits.shape)} do not fit a target {tuple(target.shape)} of {target.dtype}: "
                        "give logits (N, C) and int64 labels (N,) or class shares (N, C)")
    if per_class is not None and len(per_class) != logits.shape[1]:
        raise LossError(f"logits of {logits.shape[1]} classes need a weight or a row of costs for each, "
                        f"not {len(per_class)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(dtype), target.to(dtype) if are_shares else target,
            None if per_class is None else per_class.to(dtype))


def _log_one_minus(logits):
    """log(1 - p) (N, C) of the softmax p, also where p rounds to 1.

    Only the most probable class of a row can be near 1. Its 1 - p is the sum of the others, taken without the 1.
    """
    log_p = logits.log_softmax(1)
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    of_top = log_p.masked_fill(top, -math.inf).logsumexp(1, keepdim=True)
    # Filled with 0 before log1p: an infinity that torch.where leaves out would still make its gradient NaN.
    return torch.where(top, of_top, torch.log1p(-log_p.exp().masked_fill(top, 0)))


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

    With class shares a sample weighs the sum of share * weight over the classes, so that one-hot shares are the same as
    labels. (Given shares, `nn.CrossEntropyLoss` divides by the number of samples instead: our "plain".)
    """

    def __init__(self, weight=None, mean="weighted", label_smoothing=0.0):
        super().__init__()
        _check_options(mean, label_smoothing)
        self.register_buffer("weight", weight)
        self.mean, self.label_smoothing = mean, label_smoothing

    def forward(self, logits, target):
        logits, target, weight = _prepare(logits, target, self.weight)
        if self.mean == "weighted" and not target.is_floating_point():
            return F.cross_entropy(logits, target, weight, label_smoothing=self.label_smoothing)
        per_sample = F.cross_entropy(logits, target, weight, label_smoothing=self.label_smoothing, reduction="none")
        if self.mean == "plain":
            return per_sample.mean()
        return per_sample.sum() / (target if weight is None else target * weight).sum()


class Focal(nn.Module):
    """Cross-entropy in which a class c that is predicted well counts little: each -log p_c times (1 - p_c)^gamma.

    gamma: 0 is cross-entropy; at 2 a class with p = 0.9 counts a hundredth.
    weight, mean, label_smoothing: as in `CrossEntropy`. The paper's alpha is a weight in the "plain" mean.

    (Lin et al., "Focal Loss for Dense Object Detection", 2017)
    """

    def __init__(self, gamma=2.0, weight=None, mean="weighted", label_smoothing=0.0):
        super().__init__()
        _check_options(mean, label_smoothing)
        if not 0 <= gamma < math.inf:
            raise LossError(f"gamma must be 0 (cross-entropy) or above, and finite, not {gamma}")
        self.register_buffer("weight", weight)
        self.gamma, self.mean, self.label_smoothing = gamma, mean, label_smoothing

    def forward(self, logits, target):
        logits, target, weight = _prepare(logits, target, self.weight)
        classes = logits.shape[1]
        shares = target if target.is_floating_point() else F.one_hot(target, classes).to(logits.dtype)
        smooth = (1 - self.label_smoothing) * shares + self.label_smoothing / classes
        if weight is not None:
            shares, smooth = shares * weight, smooth * weight
        # Not (1 - p) ** gamma: with gamma below 1 its gradient is infinite where p rounds to 1.
        factor = torch.exp(self.gamma * _log_one_minus(logits))
        total = -(smooth * factor * logits.log_softmax(1)).sum()
        return total / (shares.sum() if self.mean == "weighted" else len(logits))


class SoftF1(nn.Module):
    """1 minus the macro F1 of the batch, with probabilities in place of decisions: a metric made differentiable.

    F1_c = 2 tp_c / (sum of p_c + number of samples of c), where tp_c is the sum of p_c over the samples of c. The mean
    is over the classes that occur in the batch: one that does not has F1 0 and no gradient, whatever is predicted.
    It takes labels alone: with class shares, its optimum would not be the shares. The gradient vanishes where a
    prediction is certain, even a wrong one.

    (It is the soft Dice loss of Milletari et al., "V-Net", 2016, with samples for pixels and no squares; compare
    Bénédict et al., "sigmoidF1: A Smooth F1 Score Surrogate Loss for Multilabel Classification", 2021)
    """

    def forward(self, logits, target):
        if target.is_floating_point():
            raise LossError("soft F1 needs labels, not class shares: switch MixUp and CutMix off, or take another loss")
        logits, labels, _ = _prepare(logits, target)
        p = logits.softmax(1)
        truth = F.one_hot(labels, logits.shape[1]).to(p.dtype)
        counts = truth.sum(0)
        # The clamp is for classes that do not occur, whose F1 of 0 could be 0 / 0. Selecting the others would make
        # the GPU wait.
        f1 = 2 * (p * truth).sum(0) / (p.sum(0) + counts.clamp(min=1))
        return 1 - f1.sum() / (counts > 0).sum()


class CostMatrix(nn.Module):
    """Mistakes at a price each: a dog called a cat may cost more than a dog called a horse, or a cat called a dog.
    (A class weight cannot tell those two mistakes about a dog apart.)

    costs: tensor (C, C): entry [t, p] is what it costs to call class t p. Zeros on the diagonal; see `cost_matrix`.

    A sample of class t costs the sum over j of costs[t, j] * -log(1 - p_j), and the mean over the samples is plain. Let
    R_j be the expected cost of deciding for j. The optimum is where R_j / (1 - p_j) is the same for all j with p_j > 0,
    so its most probable class is the cheapest decision: the minimum of the risk (Elkan, "The Foundations of
    Cost-Sensitive Learning", 2001). The p_j are then no frequencies of classes, unless all mistakes cost the same.
    With two classes it is the cross-entropy with weights costs[t, other] in the "plain" mean. With many, a random head
    learns slowly from it: at costs of 1 the gradient of the true class's logit is -p there, not -(1 - p).
    """

    def __init__(self, costs):
        super().__init__()
        if costs.ndim != 2 or costs.shape[0] != costs.shape[1]:
            raise LossError(f"costs must be a table (C, C), not {tuple(costs.shape)}")
        if costs.diagonal().any() or not (costs.isfinite() & (costs >= 0)).all():
            raise LossError("costs must be finite, none below zero, and zero on the diagonal")
        self.register_buffer("costs", costs)

    def forward(self, logits, target):
        logits, target, costs = _prepare(logits, target, self.costs)
        if target.is_floating_point():
            with torch.autocast(logits.device.type, enabled=False):  # which would multiply matrices in 16 bits
                costs = target @ costs
        else:
            costs = costs.index_select(0, target)
        return -(costs * _log_one_minus(logits)).sum(1).mean()


# ---- regression


class Regression(nn.Module):
    """Mean squared error, mean absolute error or the Huber loss, with a weight per sample.

    kind: "mse" aims at the mean, and large errors dominate; "l1" aims at the median; "huber" is squared up to `delta`
        and absolute beyond (Huber, "Robust Estimation of a Location Parameter", 1964).

    forward(outputs (N, T), targets (N, T), weights (N,) or None) -> scalar: the mean over samples and targets of weight
    times loss. The divisor is the number of samples, so the batches of a step add up exactly; give weights of mean 1.
    """

    def __init__(self, kind="mse", delta=1.0):
        super().__init__()
        if kind not in ("mse", "l1", "huber"):
            raise LossError(f"the loss must be mse, l1 or huber, not '{kind}'")
        self.kind, self.delta = kind, delta

    def forward(self, outputs, targets, weights=None):
        if outputs.ndim != 2 or outputs.shape != targets.shape:  # (N, 1) and (N,) would broadcast to (N, N)
            raise LossError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must both be (N, T)")
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.kind == "huber":
            losses = F.huber_loss(outputs, targets, delta=self.delta, reduction="none")
        else:
            losses = (F.mse_loss if self.kind == "mse" else F.l1_loss)(outputs, targets, reduction="none")
        return _weighted_mean(losses.mean(1), weights)


class Quantile(nn.Module):
    """The pinball loss: the output for quantile q is pulled up with force q by targets above it and down with force
    1 - q by those below, so that it settles where a share q of the targets lies below it (Koenker and Bassett,
    "Regression Quantiles", 1978).

    quantiles: Q numbers between 0 and 1. forward(outputs (N, T, Q), targets (N, T), weights (N,) or None) -> scalar:
    the mean over samples (weighted as in `Regression`), targets and quantiles. At q = 0.5 half the absolute error.
    """

    def __init__(self, quantiles):
        super().__init__()
        self.register_buffer("quantiles", torch.tensor(quantiles))

    def forward(self, outputs, targets, weights=None):
        if outputs.shape != (*targets.shape, len(self.quantiles)) or targets.ndim != 2:
            raise LossError(f"outputs {tuple(outputs.shape)} must be (N, T, {len(self.quantiles)}) for targets "
                            f"{tuple(targets.shape)} of (N, T)")
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        above, q = targets[..., None] - outputs, self.quantiles.to(outputs.dtype)
        return _weighted_mean(torch.maximum(q * above, (q - 1) * above).mean((1, 2)), weights)


def _weighted_mean(per_sample, weights):
    if weights is not None and weights.shape != per_sample.shape:
        raise LossError(f"weights {tuple(weights.shape)} must be one for each of the {len(per_sample)} samples")
    return per_sample.mean() if weights is None else (per_sample * weights).mean()


# ---- several labels per picture


class BinaryFocal(nn.Module):
    """Binary cross-entropy for each label of its own, in which a cell that is predicted well counts little: with p the
    probability of what is true there, -log p times (1 - p)^gamma.

    gamma: 0 is binary cross-entropy; at 2 a cell with p = 0.9 counts a hundredth.
    pos_weight: tensor (L,) or None: how much a 1 of each label counts against a 0, as in `nn.BCEWithLogitsLoss`: a
        weight of 10 punishes missing the label ten times as hard as a false alarm. The paper's alpha is
        alpha / (1 - alpha) here, but for a factor.

    forward(logits (N, L), targets (N, L) of 0 and 1, weights (N, L) or None) -> scalar: the mean over all cells of
    weight times loss. A weight of 0 masks a cell whose truth is not known: no gradient. The divisor is the number of
    cells, known or not, so the batches of a step add up exactly; give weights of mean 1, as `tables.read_labels` does.

    (Lin et al., "Focal Loss for Dense Object Detection", 2017)
    """

    def __init__(self, gamma=2.0, pos_weight=None):
        super().__init__()
        if not 0 <= gamma < math.inf:
            raise LossError(f"gamma must be 0 (cross-entropy) or above, and finite, not {gamma}")
        self.register_buffer("pos_weight", pos_weight)
        self.gamma = gamma

    def forward(self, logits, targets, weights=None):
        if logits.ndim != 2 or logits.shape != targets.shape or weights is not None and weights.shape != targets.shape:
            raise LossError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and weights must all be "
                            "(N, L)")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Not (1 - p) ** gamma: with gamma below 1 its gradient is infinite where p rounds to 1.
        log_yes, log_no = F.logsigmoid(logits), F.logsigmoid(-logits)
        of_ones = torch.exp(self.gamma * log_no) * log_yes
        if self.pos_weight is not None:
            of_ones = of_ones * self.pos_weight
        cells = -torch.where(targets > 0.5, of_ones, torch.exp(self.gamma * log_yes) * log_no)
        return cells.mean() if weights is None else (cells * weights).mean()


# ---- settings and penalties


def _rename(classes, separators, kind="class"):
    """What to add to an error if a separator in the name of a class may be its cause."""
    words = " or ".join({",": "a comma", ":": "a colon"}[mark] for mark in separators)
    return f" (rename a {kind} with {words})" if any(mark in c for c in classes for mark in separators) else ""


def _nfc(name):
    """In Unicode's composed form: a typed name and that of a folder may look the same and be other characters."""
    return unicodedata.normalize("NFC", name)


def _check_known(name, classes, what, separators, kind="class", kinds="classes"):
    if name not in classes:
        raise LossError(f"{what} name an unknown {kind} '{name}'; the {kinds} are {', '.join(classes)}"
                        + _rename(classes, separators, kind))


def _positive(text, what):
    """The text as a number. LossError unless it is above zero, and finite also in float32."""
    try:
        number = float(text)
    except ValueError:
        raise LossError(f"{what} is '{text}', which is not a number") from None
    if not (math.isfinite(number) and 1e-30 < number < 1e30):
        raise LossError(f"{what} is {text}; it must be above zero, and finite")
    return number


def class_weights(spec, classes, counts, device="cpu"):
    """A weight per class, as a float32 tensor (C,) on the device, or None.

    spec: None; `balanced`: N / (C * n_c) for n_c training images of class c, so that every class weighs the same in
        total (King and Zeng, "Logistic Regression in Rare Events Data", 2001); or `dog=10,cat=1`, where a class that
        is not named weighs 1.
    classes: the C names. counts: images per class in the training split, in that order.
    """
    if spec is None:
        return None
    if spec == "balanced":
        return torch.tensor([sum(counts) / (len(counts) * n) for n in counts], device=device)
    return torch.tensor(_named_weights(spec, classes), device=device)


def _named_weights(spec, names, what="class weights", kind="class", kinds="classes"):
    """The weights that `dog=10,cat=1` gives to the names, 1 to those that it lacks, in a list. The rest: words."""
    names = [_nfc(name) for name in names]
    weights, named = dict.fromkeys(names, 1.0), set()
    for part in _nfc(spec).split(","):
        name, equals, value = part.strip().rpartition("=")
        if not equals:
            raise LossError(f"{what} '{spec}' are neither 'balanced' nor like {names[0]}=10,{names[-1]}=1"
                            + _rename(names, ",", kind))
        _check_known(name, names, what, ",", kind, kinds)
        if name in named:
            raise LossError(f"{what} name '{name}' twice")
        named.add(name)
        # Zero is refused: a batch of that class alone would be 0 / 0.
        weights[name] = _positive(value, f"the weight of {kind} '{name}'")
    return list(weights.values())


def pos_weights(spec, labels, values, device="cpu"):
    """How much a 1 of each label counts against a 0: a float32 tensor (L,) on the device, or None.

    spec: None; `balanced`: the number of zeros over that of ones, so that both weigh the same in total; or
        `beach=10,haze=2`, where a label that is not named has 1.
    labels: the L names. values: 1, 0 or nan (rows, labels), those of the training split.
    """
    if spec is None:
        return None
    if spec == "balanced":
        return ((values == 0).sum(0) / (values == 1).sum(0)).float().to(device)
    return torch.tensor(_named_weights(spec, labels, "pos weights", "label", "labels"), device=device)


def own_parameters(criterion, device="cpu"):
    """The parameters of a loss, in a list: [] for a function, and for a module without any. A module is moved to the
    device; of several processes (torch.distributed) all begin with the parameters of the first. Raises LossError.
    """
    if isinstance(getattr(criterion, "func", None), nn.Module):
        raise LossError(f"functools.partial hides the {type(criterion.func).__name__} within, whose parameters would not be "
                        "trained: give the module itself")
    if not isinstance(criterion, nn.Module):
        return []
    parameters = list(criterion.to(device).parameters())
    for parameter in parameters if dist.is_initialized() else ():
        dist.broadcast(parameter.detach(), 0)
    return parameters


def cost_matrix(spec, classes):
    """What each mistake costs, as a float32 tensor (C, C) for `CostMatrix`: row truth, column prediction.

    spec: `dog:cat=10,cat:dog=2`: calling a dog a cat costs 10, calling a cat a dog 2, and every other mistake 1.
    classes: the C names.
    """
    costs, named = 1 - torch.eye(len(classes)), set()
    classes, spec = [_nfc(name) for name in classes], _nfc(spec or "")
    for part in spec.split(","):
        pair, equals, value = part.strip().rpartition("=")
        truth, colon, prediction = pair.partition(":")
        if not (equals and colon):
            raise LossError(f"--costs '{spec}' is not like {classes[0]}:{classes[-1]}=10,{classes[-1]}:{classes[0]}=2"
                            + _rename(classes, ",:"))
        for name in (truth, prediction):
            _check_known(name, classes, "costs", ",:")
        if truth == prediction:
            raise LossError(f"costs name '{pair}', which is no mistake and costs nothing: leave it out")
        if pair in named:
            raise LossError(f"costs name '{pair}' twice: it is TRUTH:PREDICTION")
        named.add(pair)
        cost = _positive(value, f"the cost of '{pair}'")
        costs[classes.index(truth), classes.index(prediction)] = cost
    return costs


def sum_of_weights(criterion, target):
    """What a weighted mean has divided the loss of a batch by, a tensor (): the sum of the weights of its samples. None
    for any other loss, which divides by their number. For nn.CrossEntropyLoss, nn.NLLLoss (labels alone) and the losses
    here. (MixUp and CutMix do not change the sum.)
    """
    weight = getattr(criterion, "weight", None)
    mean = getattr(criterion, "mean", "")
    if isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
        mean = "weighted" if criterion.reduction == "mean" and not target.is_floating_point() else ""
    if weight is None or mean != "weighted":
        return None
    return (target * weight).sum() if target.is_floating_point() else weight[target].sum()


def batch_weight(criterion, target, pictures):
    """Of how many pictures the loss of a batch is the mean, so that it can be joined with others: `pictures`, the number
    of them. (Its target may hold more: those that a process only runs along with, which count 0.)

    Of several processes that have divided their batch each by its own sum of weights (see `sum_of_weights`), it is the
    part of all their pictures that belongs to this process's share of the weights: together they are then divided by
    the sum of all weights, as one process would. A number, or a tensor () on the target's device.
    """
    weight = sum_of_weights(criterion, target)
    if weight is None or not dist.is_initialized():
        return pictures
    own = torch.stack([weight.new_tensor(float(pictures)), weight * (pictures > 0)])
    totals = own.clone()
    dist.all_reduce(totals)
    return totals[0] * own[1] / totals[1]


def name_of(criterion):
    """The name of a loss: of its class, or of the function, also of one within a functools.partial."""
    function = getattr(criterion, "func", criterion)
    return getattr(function, "__name__", type(function).__name__)


def refuse_unused(criterion, class_weights=None, label_smoothing=0.0, pos_weight=None):
    """Raise LossError if these were asked for and `criterion`, any callable, does not know of them: they would be
    accepted and change nothing. It knows of them if it has them as `weight`, `pos_weight` (those very tensors) and
    `label_smoothing`.
    """
    uses = f"the loss of section 6, {name_of(criterion)},"
    known = getattr(criterion, "keywords", {})  # of a functools.partial
    weight = known.get("weight", getattr(criterion, "weight", None))
    if class_weights is not None and weight is not class_weights:
        raise LossError(f"{uses} takes no class weights: leave --class-weights out, or give it `weight`, as an attribute "
                        "or by functools.partial")
    if pos_weight is not None and known.get("pos_weight", getattr(criterion, "pos_weight", None)) is not pos_weight:
        raise LossError(f"{uses} takes no pos weights: leave --pos-weight out, or give it `pos_weight`, as an attribute "
                        "or by functools.partial")
    if label_smoothing and not known.get("label_smoothing", getattr(criterion, "label_smoothing", 0.0)):
        raise LossError(f"{uses} knows no label smoothing: leave --label-smoothing out, or give it `label_smoothing`, as "
                        "an attribute or by functools.partial")


def l1_penalty(model):
    """Sum of |w| over the trainable weights of convolutions and linear layers: no biases, no norm layers, no tokens or
    position embeddings, nothing frozen.

    A scalar in float32. Multiply by 1e-6 to 1e-5: over a whole ResNet-50 the sum is near a million.
    (Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996)
    """
    weights = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("weight") and p.ndim > 1]
    return torch.stack([w.float().abs().sum() for w in weights]).sum()


# ---- against forgetting


def anchor_of(model, without=()):
    """Where a training starts from: {name: a copy} of the parameters, frozen or not. without: the names of modules, such
    as a new head, that are left out.
    """
    outside = tuple(f"{name}." for name in without)
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(outside)}


def moved(tensors, device):
    """{name: tensor}, each on the device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def refuse_idle_pull(model, anchor, pull, frozen):
    """Raise LossError if nothing that trains is in the anchor. pull, frozen: what asks for it, and what hinders it."""
    if not any(p.requires_grad and name in anchor for name, p in model.named_parameters()):
        raise LossError(f"{pull} has nothing to pull: {frozen} keeps all of it still")


def l2_sp_penalty(model, anchor):
    """Half the squared distance of the trainable parameters from the starting point: its gradient is w - anchor.

    anchor: {name: tensor}, as from `anchor_of`; parameters that it does not name, such as a new head's, are left alone
    and need a plain decay of their own. It takes the place of weight decay, which pulls towards zero. A scalar in
    float32. (Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    2018: L2-SP, the starting point as reference)
    """
    return ewc_penalty(model, anchor, None)


def ewc_penalty(model, anchor, fisher):
    """Elastic weight consolidation: half the squared distance of the trainable parameters from `anchor`, each weighted
    by how much the old task needs it: its gradient is fisher * (w - anchor).

    anchor, fisher: {name: tensor}, as from `anchor_of` and `fisher_diagonal` (None: every weight is 1). A scalar in
    float32; multiply by lambda. (Kirkpatrick et al., "Overcoming Catastrophic Forgetting in Neural Networks", 2017)
    """
    terms = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in anchor:
            squares = (parameter.float() - anchor[name]).square()
            terms.append((squares if fisher is None else squares * fisher[name]).sum())
    if not terms:  # as long as all of it is frozen
        return torch.zeros((), requires_grad=True)
    return 0.5 * torch.stack(terms).sum()


EXACT_CLASSES = 10  # up to which `fisher_diagonal` takes the mean over all classes


def fisher_diagonal(model, batches, kind="true", classes=None, seed=0):
    """The diagonal of the Fisher information: {name: tensor} for the parameters that train. It is the mean over the
    pictures of the squared gradient of log p(y | x): that of each picture alone, not that of a batch.

    batches: yields (x, y), as the model takes them. classes: take the softmax over the first so many outputs alone.
    kind: where the y of a picture come from.
        "true": from the model's own prediction: the mean over y ~ p(y | x), which is the curvature of the model's
            predictions, whatever the labels are. Computed over all classes if there are at most `EXACT_CLASSES`, else
            from one y that is drawn for each picture (from `seed`, not from the global generator).
        "empirical": the label. It is no curvature: it vanishes where the labels are predicted with certainty, and one
            mislabelled picture can outweigh all others.
    (Kunstner et al., "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent", 2019)

    Leaves the model in `eval()`: BatchNorms use their running statistics, which do not move, and no dropout is drawn. One
    picture at a time, which is plain, exact, and works for every network.
    """
    if kind not in ("true", "empirical"):
        raise LossError(f"the Fisher information must be true or empirical, not '{kind}'")
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    generator, count = torch.Generator().manual_seed(seed), 0
    for x, y in batches:
        for picture, label in zip(x.split(1), y.tolist(), strict=True):
            log_p = model(picture)[0, :classes].float().log_softmax(0)
            p, shares = log_p.detach().exp(), {label: 1.0}
            if kind == "true" and len(p) <= EXACT_CLASSES:
                shares = dict(enumerate(p))
            elif kind == "true":
                shares = {torch.multinomial(p.cpu(), 1, generator=generator).item(): 1.0}
            for c, share in shares.items():
                # a parameter that takes no part, as in an auxiliary head, has no gradient
                found = torch.autograd.grad(log_p[c], parameters.values(), retain_graph=True, allow_unused=True)
                for total, gradient in zip(fisher.values(), found, strict=True):
                    if gradient is not None:
                        total += share * gradient.float().square()
            count += 1
    if not count:
        raise LossError("the Fisher information of no pictures is not known")
    return {name: total / count for name, total in fisher.items()}
