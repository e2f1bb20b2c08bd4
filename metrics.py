"""Metrics: of classification from a confusion matrix, of several labels per picture from their probabilities, of
regression from values in their own units.

    confusion = confusion_matrix(predictions, labels, num_classes=2)
    scores(confusion)["macro_f1"]
    print(report(confusion, ["cat", "dog"]))
    label_scores(probabilities, truth, best_thresholds(probabilities, truth))["map"]
    regression_scores(predictions, targets)["mae"]
    meter = Meter(["loss", "hits"])                     # the sums of a running epoch

This file needs torch alone and can be copied into any project.
"""

import math
import re
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


def report(confusion, classes, most=20, what="images"):
    """A table of precision, recall, F1 and support per class, with the mean over those that occur in the truth or in
    the predictions, then the confusion matrix (rows: truth); with more than `most` classes, the most frequent
    confusions instead.
    """
    width = max(len(c) for c in [*classes, "macro mean"])
    table = torch.stack(precision_recall_f1(confusion), dim=1)
    lines = [f"{'class':<{width}}  precision  recall      F1  {what:>6}"]
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


# ---- several labels per picture: probabilities (N, L), and a truth (N, L) of 1, 0 and nan, where it is not known


def average_precision(scores, truth):
    """The area under the curve of precision over recall, as a sum of steps: each picture of the label adds the
    precision among those that score at least as high. Scores that are equal make one step. nan if no truth is 1.

    scores: (N,), of any scale. truth: (N,) of 1, 0 or nan. (scikit-learn's average_precision_score has it so. The
    chance level is the share of ones.)
    """
    hits, count, _ = _cuts(scores, truth)
    if not len(hits) or not hits[-1]:
        return math.nan
    gained = hits.diff(prepend=hits.new_zeros(1))
    return (gained * hits / count).sum().item() / hits[-1].item()


def _cuts(scores, truth):
    """For each distinct score, from the highest on: how many ones score at least so (K,), how many pictures (K,), and
    the score (K,), all float64 on the CPU. Where the truth is not known, a picture does not count.
    """
    if scores.shape != truth.shape or truth.ndim != 1:
        raise ValueError(f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} must both be (N,)")
    scores, truth = scores.cpu().double(), truth.cpu().double()
    scores, truth = scores[~truth.isnan()], truth[~truth.isnan()]
    scores, order = scores.sort(descending=True)
    last = torch.ones_like(scores, dtype=torch.bool)  # of those that are equal
    last[:-1] = scores[1:] != scores[:-1]
    return truth[order].cumsum(0)[last], torch.arange(1.0, len(scores) + 1, dtype=torch.float64)[last], scores[last]


def best_threshold(probabilities, truth):
    """The probability from which on to say yes, so that F1 is highest on these pictures: the middle between two of
    their neighbouring probabilities (the lowest one and 0, if all are yes). Of several that are as good, the one
    nearest to 0.5, and of two as near the higher. 0.5 if no truth is 1. probabilities, truth: (N,).
    """
    hits, count, cuts = _cuts(probabilities, truth)
    if not len(hits) or not hits[-1]:
        return 0.5
    f1 = 2 * hits / (count + hits[-1])
    middles = (cuts + torch.cat([cuts[1:], cuts.new_zeros(1)])) / 2
    best = middles[f1 == f1.max()]
    return best[(best - 0.5).abs().argmin()].item()


def best_thresholds(probabilities, truth):
    """`best_threshold` of each label, a list."""
    return [best_threshold(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)]


class Thresholds:
    """From which probability on a label is given: one for each, chosen anew by `choose`. It has the two methods of
    PyTorch's own state, so a checkpoint holds those of its own weights.
    """

    def __init__(self, labels):
        self.labels, self.values = list(labels), [0.5] * len(labels)

    def choose(self, probabilities, truth):
        """Those that give the highest F1 on these pictures (N, L), each label of its own: see `best_threshold`."""
        self.values = best_thresholds(probabilities, truth)

    def state_dict(self):
        return dict(zip(self.labels, self.values, strict=True))

    def load_state_dict(self, state):
        self.values = [state[label] for label in self.labels]


def label_counts(probabilities, truth, thresholds):
    """Hits, how often a label was given, and how often it is true, over the pictures where that is known: float64 (L,).
    thresholds: a list of L numbers.
    """
    truth = truth.cpu().double()
    known = ~truth.isnan()
    given = (probabilities.cpu().double() >= torch.tensor(thresholds, dtype=torch.float64)) & known
    return ((truth == 1) & given).sum(0).double(), given.sum(0).double(), (truth == 1).sum(0).double()


def _ratios(hits, given, true):
    """Precision, recall, F1. A ratio 0/0 counts as 0."""
    return hits / given.clamp(min=1), hits / true.clamp(min=1), 2 * hits / (given + true).clamp(min=1)


def label_scores(probabilities, truth, thresholds):
    """{"map", "macro_f1", "micro_f1"}. map: the mean of the average precision of the labels that are true of a picture
    at all (nan if none is). At the thresholds, a list of L numbers: macro F1, the mean over the labels that are true of
    a picture or given to one, so that a rare label counts as much as a frequent one; micro F1, from the counts of all.
    """
    precisions = torch.tensor([average_precision(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)])
    hits, given, true = label_counts(probabilities, truth, thresholds)
    f1, there = _ratios(hits, given, true)[2], given + true > 0
    return {"map": precisions[~precisions.isnan()].double().mean().item(),
            "macro_f1": f1[there].mean().item() if there.any() else 0.0,
            "micro_f1": _ratios(hits.sum(), given.sum(), true.sum())[2].item()}


def label_report(labels, probabilities, truth, thresholds, most=40):
    """A table with a line for each label: of how many pictures it is true and their share, which is the average
    precision of guessing; average precision; at its threshold precision, recall and F1, and beside them the F1 at 0.5.
    Then the means over the labels (see `label_scores`), and the same from the counts of all labels.
    """
    width = max(map(len, [*labels[:most], "macro mean"]))
    both = [label_counts(probabilities, truth, cuts) for cuts in (thresholds, [0.5] * len(labels))]
    precision, recall, f1 = _ratios(*both[0])
    at_half, (_, given, true) = _ratios(*both[1])[2], both[0]
    known = (~truth.isnan()).sum(0).cpu()
    ap = torch.tensor([average_precision(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)]).double()
    share = true / known.clamp(min=1)
    columns = torch.stack([share, ap, torch.tensor(thresholds).double(), precision, recall, f1, at_half], dim=1)
    lines = [f"{'label':<{width}}  pictures  share      AP  threshold  precision  recall      F1  F1 at 0.5"]

    def line(name, count, numbers):
        words = "{:5.3f}  {:6.4f}  {:9.4f}  {:9.4f}  {:6.4f}  {:6.4f}  {:9.4f}".format(*numbers)
        return f"{name:<{width}}  {count:8d}  {re.sub(r'nan', '  -', words)}"

    there = given + true > 0
    for name, count, occurs, numbers in list(zip(labels, true.int().tolist(), there, columns, strict=True))[:most]:
        numbers[3:] = numbers[3:] if occurs else math.nan
        lines.append(line(name, count, numbers.tolist()))
    if len(labels) > most:
        lines.append(f"... and {len(labels) - most} more labels")
    there_at_half = both[1][1] + true > 0
    means = [precision[there].mean(), recall[there].mean(), f1[there].mean(), at_half[there_at_half].mean()]
    found = ~ap.isnan()
    lines.append(line("macro mean", int(true.sum()), [share[found].mean(), ap[found].mean(), math.nan, *means]))
    micro = [*_ratios(*(count.sum() for count in both[0])), _ratios(*(count.sum() for count in both[1]))[2]]
    lines.append(line("micro", int(true.sum()), [math.nan] * 3 + micro))
    if not found.all():
        lines.append(f"note: the mean AP is over the {found.sum()} of {len(labels)} labels that are true of a picture "
                     "here")
    if unknown := int(truth.isnan().sum()):
        lines.append(f"note: {unknown} of {truth.numel()} answers are not known, and not counted")
    return "\n".join(lines)


def label_rows(files, labels, probabilities, thresholds, truth=None):
    """[{"file", "labels": those given, then of each label "p_beach", its probability, and given a truth "true_beach":
    1, 0, or an empty cell}, ...] for a CSV. thresholds: a list of L numbers. Between the names stands `separator_for`
    them.
    """
    rows, separator = [], separator_for(labels)
    given = probabilities.double() >= torch.tensor(thresholds, dtype=torch.float64)
    for i, file in enumerate(files):
        row = {"file": file, "labels": separator.join(name for name, yes in zip(labels, given[i], strict=True) if yes)}
        row |= zip(probability_columns(labels), probabilities[i].tolist(), strict=True)
        if truth is not None:
            row |= {f"true_{name}": "" if value != value else int(value)
                    for name, value in zip(labels, truth[i].tolist(), strict=True)}
        rows.append(row)
    return rows


def separator_for(labels):
    """What stands between names in a cell: a blank, or else the first of , ; | that none of the names holds."""
    return next((mark for mark in " ,;|" if not any(mark in name for name in labels)), "\n")


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

    over_pictures: names of sums over pictures, of which each of several processes has a share. unit: what is counted, the
    name of one more such sum: their number. over_steps: names of sums over optimizer steps, which are the same in all
    processes.

        meter = Meter(["loss", "hits"], ["norm"])
        meter.start_clock()                             # at the start of an epoch, also of one that is gone on with
        meter.add("images", len(y))
        meter.add("loss", loss * len(y))
        meter.mean("loss")                              # over the pictures of all processes
        meter.clear()                                   # at its end
    """

    def __init__(self, over_pictures, over_steps=(), unit="images"):
        self.unit, self.over_pictures, self.over_steps = unit, (unit, *over_pictures), tuple(over_steps)
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
        """The training of this epoch is over: the validation does not count for `per_second`."""
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
        return totals[name] / totals[self.unit] if totals[self.unit] else math.nan

    def per_second(self):
        """How many pictures, of all processes, as long as they train."""
        seconds = self.seconds() if self.train_seconds is None else self.train_seconds
        return self.totals()[self.unit] / max(seconds, 1e-9)

    def summary(self):
        """The loss so far, and how fast it goes, in a few words for a progress bar."""
        return f"loss {self.mean('loss'):.4f}, {self.per_second():.0f} {self.unit}/s"

    def add_norm(self, norm, scaler):
        """Of the gradient, a tensor (), after `scaler.unscale_`: to the sums over steps "norm" and "skipped_steps". A
        step that has overflowed in fp16, where the norm is not finite, was passed over and counts in the second only.
        """
        self.add("norm", norm.nan_to_num(0, 0, 0))
        if scaler.is_enabled():
            self.add("skipped_steps", norm.isfinite().logical_not())

    def columns(self, optimizer, scaler, steps, train_pictures=None, unread_val=0):
        """What the history tells of an epoch of so many steps besides its scores: lr, that of the head, whose group is
        the optimizer's last; grad_norm, the mean over the steps that were not skipped; loss_scale, skipped_steps; of
        pictures unreadable, of the `train_pictures` that were listed and in the validation; seconds;
        images_per_second, or what the unit is called.
        """
        skipped, totals = int(self.sums["skipped_steps"]), self.totals()
        found = {"lr": optimizer.param_groups[-1]["lr"],
                 "grad_norm": totals["norm"] / max(1, steps - skipped),
                 "loss_scale": scaler.get_scale(), "skipped_steps": skipped}
        if train_pictures is not None:
            found["unreadable"] = train_pictures - int(totals[self.unit]) + unread_val
        return found | {"seconds": self.seconds(), f"{self.unit}_per_second": self.per_second()}

    def state_dict(self):
        """This process's sums as plain numbers."""
        state = {name: float(value) for name, value in self.sums.items()} | {"seconds": self.seconds()}
        return state if self.train_seconds is None else state | {"train_seconds": self.train_seconds}

    def load_state_dict(self, state):
        """An empty dict is a state, too: that between two epochs."""
        self.clear()
        self.sums |= {name: state[name] for name in self.sums if name in state}
        self.earlier_seconds, self.train_seconds = state.get("seconds", 0.0), state.get("train_seconds")
