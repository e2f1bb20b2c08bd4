"""Metrics: of classification from a confusion matrix, of regression from values in their own units.

    confusion = confusion_matrix(predictions, labels, num_classes=2)
    scores(confusion)["macro_f1"]
    print(report(confusion, ["cat", "dog"]))
    regression_scores(predictions, targets)["mae"]
    meter = Meter(["loss", "hits"])                     # the sums of a running epoch

This file needs torch alone and can be copied into any project.
"""

import math
import time

import torch


def confusion_matrix(predictions, labels, num_classes):
    """Count pairs: entry [t, p] is the number of samples of true class t that were predicted as p.

    predictions, labels: int64 tensors (N,) with values in 0..num_classes-1. Returns int64 (num_classes, num_classes).
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in shape")
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def precision_recall_f1(confusion):
    """Per-class precision, recall and F1, each a float64 tensor (C,). A ratio 0/0 counts as 0."""
    confusion = confusion.cpu()  # float64 does not exist on every device
    hits = confusion.diagonal().double()
    predicted, true = confusion.sum(0), confusion.sum(1)
    return (hits / predicted.clamp(min=1), hits / true.clamp(min=1), 2 * hits / (predicted + true).clamp(min=1))


def scores(confusion):
    """{"accuracy", "balanced_accuracy", "macro_f1"}: fractions of 1. In the last two a rare class counts as much as a
    frequent one: balanced accuracy is the plain mean of the recall of the classes that occur in the truth (Brodersen et
    al., "The Balanced Accuracy and Its Posterior Distribution", 2010), macro F1 that of the F1 of the classes that
    occur in the truth or in the predictions, as scikit-learn has it. (A validation split may lack classes.)
    """
    _, recall, f1 = precision_recall_f1(confusion)
    accuracy = confusion.diagonal().sum().item() / max(1, confusion.sum().item())
    occurring = (confusion.sum(1) > 0).sum().item()
    return {"accuracy": accuracy, "balanced_accuracy": recall.sum().item() / max(1, occurring),
            "macro_f1": f1[_occurring(confusion)].mean().item()}


def _occurring(confusion):
    """Which classes occur in the truth or in the predictions, bool (C,); all, if none does."""
    occurring = (confusion.sum(0) + confusion.sum(1)).cpu() > 0
    return occurring | ~occurring.any()


def top_k_accuracy(outputs, labels, k):
    """Share of samples whose true class is among the k largest outputs.

    outputs: (N, C), of any scale. labels: int64 (N,). Raises ValueError if k is not in 1..C.
    """
    if not 1 <= k <= outputs.shape[1]:
        raise ValueError(f"k must be in 1..{outputs.shape[1]}, the number of classes, not {k}")
    if outputs.shape[:1] != labels.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} differ in length")
    hits = outputs.topk(k, dim=1).indices == labels[:, None]
    return hits.sum().item() / max(1, len(labels))


def correct(outputs, target):
    """Of each sample, whether its largest output (N, C) is its class: bool (N,). target: labels (N,), or class shares
    (N, C), of which the largest counts.
    """
    labels = target if target.ndim == 1 else target.argmax(1)
    return outputs.detach().argmax(1) == labels


def prediction_rows(files, probabilities, classes, labels=None, top_k=1, all_probabilities=False):
    """[{"file", "truth" (given `labels`), "prediction", "probability", then "prediction_2", "probability_2" and so on up
    to `top_k`, then of `all_probabilities` "p_cat" and so on, in the order of the classes}, ...] for a CSV; of equally
    probable classes the first.

    probabilities: (N, C). classes: their names. labels: int64 (N,), -1 where the truth is not known: an empty cell.
    """
    values, guesses = (found[:, :top_k].tolist() for found in probabilities.sort(dim=1, descending=True, stable=True))
    rows, columns = [{"file": file} for file in files], probability_columns(classes)
    for i, row in enumerate(rows):
        if labels is not None:
            row["truth"] = classes[labels[i]] if labels[i] >= 0 else ""
        for k, (value, guess) in enumerate(zip(values[i], guesses[i], strict=True), start=1):
            nth = f"_{k}" if k > 1 else ""
            row |= {f"prediction{nth}": classes[guess], f"probability{nth}": value}
        if all_probabilities:
            row |= zip(columns, probabilities[i].tolist(), strict=True)
    return rows


def probability_columns(classes):
    """Their names in `prediction_rows`: none is that of another column there, whatever the classes are called."""
    return [f"p_{name}" for name in classes]


def mean_cost(confusion, costs):
    """Mean over the samples of costs[t, p], what it costs to call class t p: float (C, C), 0 where nothing is lost."""
    if costs.shape != confusion.shape:
        raise ValueError(f"costs {tuple(costs.shape)} and confusion {tuple(confusion.shape)} differ in shape")
    return (confusion.cpu() * costs.cpu().double()).sum().item() / max(1, confusion.sum().item())


def as_numbers(scores):
    """The same dict with plain floats, whatever kinds of numbers or tensors () it holds."""
    return {name: float(score) for name, score in scores.items()}


def is_better(score, best, lower=False):
    """Is this score better than the best one before (None: there is none)? lower: a smaller one is, as of a loss. A
    score that is not a number, such as kappa where there is one class only, is worse than any that is.
    """
    if best is None:
        return True
    if math.isnan(score) or math.isnan(best):
        return math.isnan(best) and not math.isnan(score)
    return score < best if lower else score > best


def wins_tie(history, best_epoch, monitor):
    """Is the newest epoch as good as the best one by `monitor`, at a lower val_loss? Accuracies of few pictures are
    often equal. history: a dict of numbers for each epoch, from epoch 0 on.
    """
    newest, best = history[-1], history[best_epoch]
    return newest[monitor] == best[monitor] and newest["val_loss"] < best["val_loss"]


def class_scores(outputs, labels, costs=None):
    """`scores` of outputs (N, C) for labels (N,); with more than five classes "top5_accuracy", too, and given costs
    (C, C) "cost", the `mean_cost`.
    """
    confusion = confusion_matrix(outputs.argmax(1), labels, outputs.shape[1])
    found = scores(confusion)
    if outputs.shape[1] > 5:
        found["top5_accuracy"] = top_k_accuracy(outputs, labels, 5)
    if costs is not None:
        found["cost"] = mean_cost(confusion, costs)
    return found


def report(confusion, classes, most=20):
    """A table of precision, recall, F1 and support per class, with the mean over those that occur in the truth or in
    the predictions, then the confusion matrix (rows: truth); with more than `most` classes, the most frequent
    confusions instead.
    """
    width = max(len(c) for c in [*classes, "macro mean"])
    table = torch.stack(precision_recall_f1(confusion), dim=1)
    lines = [f"{'class':<{width}}  precision  recall      F1  images"]
    there = _occurring(confusion)
    for name, (precision, recall, f1), n, occurs in zip(classes, table.tolist(), confusion.sum(1).tolist(),
                                                        there.tolist(), strict=True):
        numbers = f"{precision:9.4f}  {recall:6.4f}  {f1:6.4f}" if occurs else f"{'-':>9}  {'-':>6}  {'-':>6}"
        lines.append(f"{name:<{width}}  {numbers}  {n:6d}")
    precision, recall, f1 = table[there].mean(0).tolist()
    lines.append(f"{'macro mean':<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {int(confusion.sum()):6d}")
    if not there.all():
        lines.append(f"note: the mean is over the {there.sum()} of {len(classes)} classes that occur here")
    if len(classes) <= most:
        cell = max(8, *(len(c) + 2 for c in classes))
        lines += ["", f"{'truth, predicted':<{max(width, 17)}}" + "".join(f"{c:>{cell}}" for c in classes)]
        for name, row in zip(classes, confusion.tolist(), strict=True):
            lines.append(f"{name:<{max(width, 17)}}" + "".join(f"{n:>{cell}}" for n in row))
    else:
        wrong = confusion.clone().fill_diagonal_(0)
        counts, places = wrong.flatten().topk(min(10, wrong.numel()))
        lines += ["", "most frequent confusions (truth -> predicted):"]
        for n, place in zip(counts.tolist(), places.tolist(), strict=True):
            if n:
                lines.append(f"{n:6d}  {classes[place // len(classes)]} -> {classes[place % len(classes)]}")
    return "\n".join(lines)


# ---- regression


def regression_scores(predictions, targets):
    """{"mae", "rmse", "r2", "medape"} of predictions (N,) for targets (N,), both in their own units.

    mae: mean absolute error; rmse: root of the mean squared error; r2: 1 minus the squared error over that of the
    targets' own mean, so 1 is perfect, 0 no better than a constant, nan where all targets are the same; medape: median
    absolute percentage error, as a fraction of 1, over the targets that are not zero (nan if all are).
    """
    if predictions.shape != targets.shape or targets.ndim != 1:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} must both be (N,)")
    predictions, targets = predictions.cpu().double(), targets.cpu().double()
    errors = predictions - targets
    spread = (targets - targets.mean()).square().sum()
    shares = (errors / targets)[targets != 0].abs()
    return {"mae": errors.abs().mean().item(), "rmse": errors.square().mean().sqrt().item(),
            "r2": (1 - errors.square().sum() / spread).item() if spread > 0 else math.nan,
            "medape": shares.quantile(0.5).item() if len(shares) else math.nan}


def coverage(lowest, highest, targets):
    """Share of the targets that lie inside [lowest, highest], all (N,)."""
    return ((lowest <= targets) & (targets <= highest)).double().mean().item()


def score_columns(names, predictions, targets, quantiles=None):
    """`regression_scores` of T targets in one dict, such as {"mae_price": ..., "mae_area": ...} (without the names if
    there is one target only), with "r2" as the mean over the targets, and "inside", the `coverage` of the range from
    the first to the last of the quantiles (N, T, Q) if there are any.
    """
    found = {}
    for t, name in enumerate(names):
        ending = f"_{name}" if len(names) > 1 else ""
        of_target = regression_scores(predictions[:, t], targets[:, t])
        if quantiles is not None and quantiles.shape[-1] > 1:
            of_target["inside"] = coverage(quantiles[:, t, 0], quantiles[:, t, -1], targets[:, t])
        found |= {f"{metric}{ending}": value for metric, value in of_target.items()}
    return found | {"r2": sum(v for k, v in found.items() if k.startswith("r2")) / len(names)}


def regression_report(names, targets, predictions, quantiles=None):
    """For each of the T targets (`names`) a table with one line for each way to predict it.

    targets: (N, T), nan where a number is not known: such a sample does not count. predictions: {words: (N, T), or (T,)
    for the same prediction for all samples}. quantiles: (N, T, Q), whose first and last are a range that a share of the
    targets lies in. What cannot be computed, as the R2 of equal numbers, is a dash.
    """
    width = max(map(len, [*names, *predictions]))
    lines = []
    for i, name in enumerate(names):
        known = ~targets[:, i].isnan()
        truth = targets[known, i]
        lines.append(f"{name:<{width}}           MAE          RMSE      R2  median error")
        for words, values in predictions.items() if len(truth) else ():
            s = regression_scores(values.expand_as(targets)[known, i], truth)
            numbers = f"{s['mae']:12.6g}  {s['rmse']:12.6g}  {s['r2']:6.3f}  {s['medape']:12.1%}"
            lines.append(f"{words:<{width}}  {numbers.replace('nan%', '   -').replace('nan', '  -')}")
        if len(truth) < len(targets):
            lines.append(f"{name} is known for {len(truth)} of {len(targets)} pictures")
        if quantiles is not None and quantiles.shape[-1] > 1 and len(truth):
            share = coverage(quantiles[known, i, 0], quantiles[known, i, -1], truth)
            lines.append(f"{share:.1%} of {name} inside the range from the first to the last quantile")
        lines.append("")
    return "\n".join(lines[:-1])


# ---- the sums of an epoch


class Meter:
    """The sums of a running epoch, on the device that they are computed on: reading one (`.item()`) in every step would
    make a GPU wait. It has the two methods of PyTorch's own state, so an epoch can be interrupted and gone on with.

    over_pictures: names of sums over pictures, of which each of several processes has a share ("images", their number,
    is always one). over_steps: names of sums over optimizer steps, which are the same in all processes.

        meter = Meter(["loss", "hits"], ["norm"])
        meter.start_clock()                             # at the start of an epoch, also of one that is gone on with
        meter.add("images", len(y))
        meter.add("loss", loss * len(y))
        meter.mean("loss")                              # over the pictures of all processes
        meter.clear()                                   # at its end
    """

    def __init__(self, over_pictures, over_steps=()):
        self.over_pictures, self.over_steps = ("images", *over_pictures), tuple(over_steps)
        self.clear()

    def clear(self):
        self.sums = dict.fromkeys([*self.over_pictures, *self.over_steps], 0.0)
        self.earlier_seconds, self.train_seconds, self.started = 0.0, None, None

    def start_clock(self):
        """Seconds count from here; sums stay as they are."""
        self.started = time.perf_counter()

    def seconds(self):
        """Since the epoch began, in this process and in those that were interrupted in it."""
        return self.earlier_seconds + (time.perf_counter() - self.started if self.started is not None else 0.0)

    def stop_clock(self):
        """The training of this epoch is over: the validation does not count for `images_per_second`."""
        if self.train_seconds is None:
            self.train_seconds = self.seconds()

    def add(self, name, value):
        """value: a number, or a tensor (), of whose graph nothing is kept."""
        self.sums[name] += value.detach() if isinstance(value, torch.Tensor) else value

    def totals(self):
        """{name: number}: the sums, those over pictures summed over all processes, which all have to call this."""
        values = {name: float(value) for name, value in self.sums.items()}
        if torch.distributed.is_initialized():
            totals = torch.tensor([values[name] for name in self.over_pictures], dtype=torch.float64)
            torch.distributed.all_reduce(totals)
            values |= zip(self.over_pictures, totals.tolist(), strict=True)
        return values

    def mean(self, name):
        """Of a sum over pictures, those of all processes: nan before the first."""
        totals = self.totals()
        return totals[name] / totals["images"] if totals["images"] else math.nan

    def images_per_second(self):
        """Of all processes, as long as they train."""
        seconds = self.seconds() if self.train_seconds is None else self.train_seconds
        return self.totals()["images"] / max(seconds, 1e-9)

    def summary(self):
        """The loss so far, and how fast it goes, in a few words for a progress bar."""
        return f"loss {self.mean('loss'):.4f}, {self.images_per_second():.0f} images/s"

    def add_norm(self, norm, scaler):
        """Of the gradient, a tensor (), after `scaler.unscale_`: to the sums over steps "norm" and "skipped_steps". A
        step that has overflowed in fp16, where the norm is not finite, was passed over and counts in the second only.
        """
        self.add("norm", norm.nan_to_num(0, 0, 0))
        if scaler.is_enabled():
            self.add("skipped_steps", norm.isfinite().logical_not())

    def columns(self, optimizer, scaler, steps, train_pictures, unread_val):
        """What the history tells of an epoch of so many steps besides its scores: lr, that of the head, whose group is
        the optimizer's last; grad_norm, the mean over the steps that were not skipped; loss_scale, skipped_steps;
        unreadable, of the `train_pictures` that were listed and in the validation; seconds; images_per_second.
        """
        skipped, totals = int(self.sums["skipped_steps"]), self.totals()
        return {"lr": optimizer.param_groups[-1]["lr"],
                "grad_norm": totals["norm"] / max(1, steps - skipped),
                "loss_scale": scaler.get_scale(), "skipped_steps": skipped,
                "unreadable": train_pictures - int(totals["images"]) + unread_val,
                "seconds": self.seconds(), "images_per_second": self.images_per_second()}

    def state_dict(self):
        """This process's sums as plain numbers."""
        state = {name: float(value) for name, value in self.sums.items()} | {"seconds": self.seconds()}
        return state if self.train_seconds is None else state | {"train_seconds": self.train_seconds}

    def load_state_dict(self, state):
        """An empty dict is a state, too: that between two epochs."""
        self.clear()
        self.sums |= {name: state[name] for name in self.sums if name in state}
        self.earlier_seconds, self.train_seconds = state.get("seconds", 0.0), state.get("train_seconds")
