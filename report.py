"""Pictures and one HTML page about a run, from what lies in its folder: how it went, and what it gets wrong.

    python report.py runs/train_classifier/2026-11-21_17-59-30_13631     # writes report.html and its pictures there
    paths = write_report("runs/a")
    print(advice(history, "val_loss"))                                   # one line, or nothing

Reads history.csv (one row per epoch: train_X and val_X share a panel), args.json, and test_predictions.csv or else
val_predictions.csv; of train_continual.py also old_test_predictions.csv or old_val_predictions.csv. (Of texts, they
have the column "text", of pairs also "text_2", in place of "file"; of entities, a row for each.) The page holds its
pictures, so it can be sent as it is; they also lie beside it as PNG files.

This file needs matplotlib and PIL and can be copied into any project.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import warnings
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps


class ReportError(Exception):
    """A report that cannot be made. The message is one line that names the way out."""


DPI = 144
WORST = 24  # mistakes on the page
SWAPS = 12  # pairs of classes in the table of what is taken for what
SIDE = 280  # pixels of a thumbnail
LONGEST = 400  # characters of a text in the table of mistakes
MOST_CLASSES = 100  # in the picture of the confusion matrix
MOST_TARGETS = 12  # in the pictures of numbers
MOST_PANELS = 24  # in the picture of the curves
MARK = "report.py"  # stands at the beginning of every file that is written here
HEADINGS = {"curves.png": "Training", "confusion.png": "Classes", "labels.png": "Labels",
            "entities.png": "Entities", "predicted.png": "Predicted and true", "residuals.png": "Errors",
            "mistakes.png": "The worst mistakes"}
STYLES = {"train": ("training", {"color": "tab:blue", "linestyle": "--", "marker": "o"}),
          "val": ("validation", {"color": "black", "linestyle": "-", "marker": "s"}),
          "old_val": ("old validation", {"color": "tab:red", "linestyle": ":", "marker": "^"}),
          "lr": ("learning rate", {"color": "0.3", "linestyle": "-", "marker": "."})}
OPTIONS = ("data labels text_column target separator log_target quantiles from old_data method ewc fisher "
           "replay_fraction replay_size l2_sp model weights head pool freeze unfreeze image_size max_length "
           "augment mixup cutmix loss class_weights pos_weight costs optimizer lr backbone_lr_scale layer_decay "
           "weight_decay schedule batch_size accumulate epochs patience seed").split()  # those that the page shows
OF_METHODS = {"freeze": "freeze", "l2_sp": "l2-sp", "ewc": "ewc", "fisher": "ewc", "fisher_size": "ewc",
              "replay_fraction": "replay", "replay_size": "replay"}  # of train_continual.py: option, its --method

# ---- reading


def read_csv(path, is_number):
    """[{column: text, or a float where is_number(column)}, ...]; an empty or missing cell of a number is nan."""
    rows, limit = [], csv.field_size_limit(2**30)  # a text may have more than the usual 131,072 characters
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:  # a name holds any bytes
            reader = csv.reader(lines)
            columns = next(reader, [])
            for cells in filter(None, reader):
                if len(cells) > len(columns):
                    raise ValueError("more cells than the header has columns")
                row = dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))
                rows.append({k: float(v.strip() or "nan") if is_number(k) else v for k, v in row.items()})
    except OSError as error:
        raise ReportError(f"cannot read {path} ({error.strerror}): give the folder of a run that has trained at least "
                          "one epoch") from error
    except (ValueError, csv.Error) as error:
        raise ReportError(f"{path} is damaged in line {reader.line_num} ({error}): restore it, or resume the run, "
                          "which writes it anew") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def read_history(folder):
    """The rows of history.csv, in which epoch, lr and the train_, val_, old_val_ and mean_ columns are numbers."""
    path = Path(folder, "history.csv")
    history = read_csv(path, lambda name: name in ("epoch", "lr") or re.match("(train|val|old_val|mean)_", name))
    if not history or not all(math.isfinite(row.get("epoch", math.nan)) for row in history):
        raise ReportError(f"{path} holds no epochs, or one without its number: give the folder of a run that has "
                          "trained at least one epoch")
    return [row | {"epoch": int(row["epoch"])} for row in history]


def read_options(folder):
    """The dict in args.json; {} without that file."""
    path = Path(folder, "args.json")
    try:
        options = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is damaged ({error}): restore it, or delete it") from error
    if not (isinstance(options, dict) and isinstance(options.get("unfreeze") or [], list)):
        raise ReportError(f"{path} holds no options of a run: restore it, or delete it")
    return options


def read_predictions(folder, prefix=""):
    """(split, rows, targets): targets are the numbers that a regression predicts, [] for classes and labels. Without
    predictions, as before the end of a run: (None, [], []). prefix: "old_" for those of the old pictures. predict.py
    writes such files, too, and knows no truth of some pictures: their cells are empty, or there is no such column.
    """
    split = next((s for s in ("test", "val") if Path(folder, f"{prefix}{s}_predictions.csv").exists()), None)
    if split is None:
        return None, [], []
    path = Path(folder, f"{prefix}{split}_predictions.csv")
    names = list((read_csv(path, lambda name: False) or [{}])[0])
    of_classes, labels = {"prediction", "probability"} <= set(names), label_names(names)
    # (A column that has one of predictions itself is a target that is called so.)
    of_numbers = [n for n in names if n.endswith("_prediction") and f"{n}_prediction" not in names]
    targets = [] if of_classes or labels else [name.removesuffix("_prediction") for name in of_numbers]
    pattern = "|".join(f"{re.escape(t)}(_prediction|_q[-+.0-9e]+)?" for t in targets) or "probability"
    if labels:
        pattern = "(p|true)_.*"
    rows = read_csv(path, lambda name: re.fullmatch(pattern, name))
    subject = "text" if text_columns(names) else "file"
    needed = ["file"] if targets else ["file", *(f"p_{name}" for name in labels)] if labels else [
        subject, "entity" if of_entities(names) else "prediction", "probability"]
    if not all(row.get(name, "") != "" and row[name] == row[name] for row in rows for name in needed):  # "" or nan
        raise ReportError(f"{path} lacks a {', '.join(needed)} in some row: restore it, or delete it")
    return split, [row | {name: row.get(name, math.nan) for name in targets} for row in rows], targets


def label_names(columns):
    """The labels whose probabilities stand in a file with these columns, [] if it is of classes or numbers."""
    first, rest = list(columns)[:2], list(columns)[2:]
    of_labels = first == ["file", "labels"] and all(name.startswith(("p_", "true_")) for name in rest)
    return [name.removeprefix("p_") for name in rest if name.startswith("p_")] if of_labels else []


def of_entities(columns):
    """Whether a file with these columns has a row for each entity in texts, true or predicted."""
    return {"text", "start", "end", "entity", "truth", "prediction", "probability"} <= set(columns)


def text_columns(columns):
    """Those of the texts in a file of predictions with these columns: ["text"], of pairs ["text", "text_2"]; of pictures
    [].
    """
    return [] if "file" in columns else [name for name in ("text", "text_2") if name in columns]


def find_picture(file, folder, options):
    """Where a picture of the predictions lies: as it is written, below --data or beside --labels, from here or from the
    folder in which the run was started. None if it is not there any more.
    """
    data = str(options.get("data") or "")
    beside = os.path.dirname(os.path.join(data, str(options.get("labels") or "")))
    output, here = Path(os.path.normpath(str(options.get("output") or "."))), Path(folder).resolve()
    ours = output.parts and not output.is_absolute() and here.parts[-len(output.parts) :] == output.parts
    started_in = [here.parents[len(output.parts) - 1]] if ours else []
    places = [Path(start, below, file) for start in (".", *started_in) for below in ("", data, beside)]
    return next((place for place in places if os.path.isfile(place)), None)


# ---- judging


def better_is_lower(name):
    """Is a smaller number of this column of the history a better one?"""
    return bool(re.search("loss|cost|error|mae|mse|medape", name))


def best_row(history, monitor):
    """The place in the history of the row that best.pt is of: the best `monitor`, of equal ones the lowest val_loss,
    and of those the first. None where there is no such number.
    """
    sign = 1 if better_is_lower(monitor) else -1
    found = [(sign * row[monitor], row.get("val_loss", math.nan), i) for i, row in enumerate(history)
             if math.isfinite(row.get(monitor, math.nan))]
    return min(found)[2] if found else None


def advice(history, monitor, options=None):
    """One line about what to try next, or ''. history: a list with a dict per epoch; monitor: the column that chose the
    best one; options: those of args.json, of which "classes" (their number), "pictures" ("train 80, val 20, ...") and
    a few more are used. The first rule that applies, from 4 epochs on; where in doubt, none.
    """
    options, best, lowest = options or {}, best_row(history, monitor), best_row(history, "val_loss")
    if len(history) < 4 or best is None or lowest is None:  # fewer epochs are no trend
        return ""
    noise = noise_of(options)
    learned = above_chance(history, options, noise)
    # At chance, whatever validation does is chance: it neither improves nor overfits.
    if not (learned[best] and learned[lowest]):
        return nothing_learned(history, options) if learned.count(False) == len(learned) else ""
    return (overfitting(history, max(best, lowest), lowest, noise) or still_improving(history, monitor, lowest, noise)
            or plateau(history, monitor, lowest, options))


def what_it_learned(history):
    """Words for what a run learns from."""
    of_texts = any("texts_per_second" in row or "words_per_second" in row for row in history)
    return "texts" if of_texts else "pictures"


def noise_of(options):
    """How far chance moves a share of the validation pictures: two standard errors, at most. If it is not known how
    many there are, of 100.
    """
    count = re.search(r"\bval ([1-9]\d*)", str(options.get("pictures")))
    return 1 / math.sqrt(int(count[1]) if count else 100)


def above_chance(history, options, noise):
    """For each epoch: is validation better than chance, by more than `noise`? None where that cannot be told. The
    training's own numbers do not tell it: BatchNorm takes each batch's statistics there, and its running ones may be
    off.
    """
    # At chance, balanced accuracy is 1 / classes, however unequal they are: at most a half.
    chance = {name: 1 / max(2, options.get("classes") or 2) for name in ("val_balanced_accuracy", "val_accuracy")}
    chance["val_r2"] = 0.0
    column = next((name for name in chance if name in history[0]), None)
    values = [row.get(column, math.nan) for row in history]
    return [value > chance[column] + noise if math.isfinite(value) else None for value in values]


def nothing_learned(history, options):
    """Validation is at chance, and so are both losses: cross-entropy at ln(classes), with soft labels and class
    weights, too; of numbers, the training's has not fallen. Where one did fall, the reason is another, such as few
    pictures, other pictures in the validation, or BatchNorm: nothing is said.
    """
    training, losses = ([row.get(name, math.nan) for row in history] for name in ("train_loss", "val_loss"))
    classes = options.get("classes") or 0
    if "val_r2" in history[0]:
        at_chance, words = min(training) > 0.9 * training[0] > 0, "val_r2 stayed near 0, what a constant gets, or below"
    else:
        guessing = math.log(max(1, classes))
        comparable = options.get("loss") in (None, "cross-entropy") and options.get("class_weight_mean") != "plain"
        at_chance = comparable and classes > 1 and min(training + losses) > 0.95 * guessing
        words = f"train_loss stayed near {guessing:.2f}, that of guessing, or above"
    return f"nothing learned: {words}: try a lower --lr, or a higher one" if at_chance else ""


def overfitting(history, best, lowest, noise):
    """Training clearly improved over the same epochs in which validation got clearly worse.

    best: the later one of the best epoch and that of the lowest val_loss; it lies before the last third, in which every
    val_loss is above the lowest by more than `noise` of it and by a tenth of what it had fallen, and the last is not
    the least of them. train_loss has fallen by a quarter since, and is that far below the lowest val_loss.
    Augmentation, MixUp and dropout only raise it: it may lie above val_loss for their sake, and then nothing is said.
    """
    third = math.ceil(len(history) / 3)
    losses, training = ([row.get(name, math.nan) for row in history] for name in ("val_loss", "train_loss"))
    low, tail, last = losses[lowest], losses[-third:], training[-1]
    worse = min(tail) > low + max(noise * abs(low), 0.1 * (losses[0] - low)) and tail[-1] > min(tail)
    by_heart = all(last < loss - 0.25 * abs(loss) for loss in (low, training[lowest]))
    if best < len(history) - third and worse and by_heart:
        of_texts = what_it_learned(history) == "texts"
        more = "more texts, --freeze" if of_texts else "more pictures, more --augment or --freeze"
        return (f"overfitting: val_loss was lowest in epoch {history[lowest]['epoch']} and has risen since, while "
                f"train_loss fell: {more}, or fewer --epochs may help")
    return ""


def still_improving(history, monitor, lowest, noise):
    """The last epoch is the first with its score, and better than all before the last third: by more than a tenth of
    the whole gain and more than one standard error (of a loss or an error, that share of it). Both losses agree: the
    lowest val_loss lies in the last third, and train_loss is lower than ever before that.
    """
    count, third = len(history), math.ceil(len(history) / 3)
    values, training = ([row.get(name, math.nan) for row in history] for name in (monitor, "train_loss"))
    earlier = best_row(history[:-third], monitor)
    agree = lowest >= count - third and training[-1] < min(training[:-third])
    if values.index(values[best_row(history, monitor)]) < count - 1 or earlier is None or not agree:
        return ""
    gain, whole = abs(values[-1] - values[earlier]), abs(values[-1] - values[0])
    if gain > max(0.1 * whole, noise / 2 * (abs(values[-1]) if better_is_lower(monitor) else 1)):
        return f"{monitor} was still improving at the end: more --epochs may help"
    return ""


def plateau(history, monitor, lowest, options):
    """Neither the score nor val_loss got better in the last half, and that is at least 4 epochs. With --patience, it
    stops there by itself.
    """
    values = [row.get(monitor, math.nan) for row in history]
    count, gained = len(history), values.index(values[best_row(history, monitor)])
    idle = count - 1 - max(gained, lowest)
    if idle >= max(4, count / 2) and not options.get("patience"):
        return f"a plateau: {monitor} was no better in the last {idle} of {count} epochs: fewer --epochs, or --patience"
    return ""


def class_scores(counts):
    """[(class, precision, recall, F1, images or texts), ...], the lowest F1 first; counts: a Counter of (truth,
    prediction). A ratio 0/0 counts as 0.
    """
    true, predicted = Counter(), Counter()
    for (t, p), count in counts.items():
        true[t] += count
        predicted[p] += count
    scores = [(c, counts[c, c] / max(1, predicted[c]), counts[c, c] / max(1, true[c]),
               2 * counts[c, c] / (true[c] + predicted[c]), true[c]) for c in sorted(true | predicted)]
    return sorted(scores, key=lambda score: score[3])


def average_precision(points):
    """Of [(probability, truth: 0 or 1), ...]: the sum over the ones of the share of ones among what is at least as
    probable, divided by their number. nan without ones.
    """
    ordered = sorted(points, reverse=True)
    ones, hits, count, total = sum(truth for _, truth in points), 0, 0, 0.0
    for _, group in itertools.groupby(ordered, key=lambda point: point[0]):
        found = [truth for _, truth in group]
        count, hits = count + len(found), hits + sum(found)
        total += sum(found) * hits / count
    return total / ones if ones else math.nan


def number_scores(points):
    """{"MAE", "RMSE", "R2", maybe "inside": the share within the range} of [(truth, prediction, low, high), ...]."""
    n, mean = len(points), sum(t for t, *_ in points) / len(points)
    squares, spread = sum((p - t) * (p - t) for t, p, *_ in points), sum((t - mean) * (t - mean) for t, *_ in points)
    found = {"MAE": sum(abs(p - t) for t, p, *_ in points) / n, "RMSE": math.sqrt(squares / n),
             "R2": 1 - squares / spread if spread else math.nan}
    if points[0][2] is not None:
        found["inside"] = sum(low <= t <= high for t, _, low, high in points) / n
    return found


# ---- drawing: each function returns a matplotlib Figure; none touches pyplot, so a script's own figures stay alone


def new_figure(width, height, **how):
    """An empty white figure; inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"the pictures need matplotlib ({error}): pip install matplotlib") from error
    return Figure((width, height), dpi=DPI, facecolor="white", **how)


def clean(text):
    """The text without what no page and no font can show: bytes that are no UTF-8, control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", str(text).encode("utf-8", "replace").decode())


def shortened(text, width):
    """The text, cleaned, in at most `width` characters: of a longer one the middle is left out."""
    text = clean(text)
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - 1) // 2 :]}"


def label(text, width=30):
    """For matplotlib: at most `width` characters, and no $ that begins a formula."""
    return shortened(text, width).replace("$", r"\$")


def plain_panel(figure, place, title, x, y=""):
    """An empty panel in `figure`; place: (rows, columns, number)."""
    axes = figure.add_subplot(*place)
    axes.set_title(label(title), fontsize=9.5)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return axes


def panel_names(history, options):
    """What has a curve of the training, the validation or both: the loss comes first, then what is monitored."""
    kinds = [re.fullmatch("(train|val|old_val)_(.+)", name) for name in history[0]]
    monitored = str(options.get("monitor")).partition("val_")[2]
    return sorted(dict.fromkeys(kind[2] for kind in kinds if kind), key=lambda name: (name != "loss", name != monitored))


def draw_curves(history, options, best=None):
    """Loss, metrics and learning rate over the epochs, a line where layers thaw, a ring around the best epoch (its
    place in the history), and what thaws.
    """
    panels = {name: {f"{kind}_{name}": style for kind, style in STYLES.items() if f"{kind}_{name}" in history[0]}
              for name in panel_names(history, options)[:MOST_PANELS]}
    panels |= {"learning rate": {"lr": STYLES["lr"]}} if "lr" in history[0] else {}
    epochs = [row["epoch"] for row in history]
    left, right = min(epochs), max(epochs)
    pad = max(0.5, 0.03 * (right - left))
    found = [re.fullmatch(r"\s*(\d{1,9})\s*:(.*)", str(text)) for text in options.get("unfreeze") or []]
    thaws = sorted((int(thaw[1]), thaw[0]) for thaw in found if thaw and int(thaw[1]) <= right)
    rows = math.ceil((len(panels) + bool(thaws)) / 2) or 1
    figure, handles = new_figure(8.4, 0.6 + 2.4 * rows, layout="constrained"), {}
    for number, (title, panel) in enumerate((panels | ({"thaws": {}} if thaws else {})).items(), start=1):
        axes = plain_panel(figure, (rows, 2, number), title, "epoch")
        axes.set_xlim(left - pad, right + pad)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        rates = [row["lr"] for row in history if "lr" in panel and row["lr"] > 0]
        logarithmic = bool(rates) and max(rates) >= 10 * min(rates)
        axes.set_yscale("log" if logarithmic else "linear")
        for epoch, _ in thaws if panel else ():
            handles["thaw"] = axes.axvline(epoch, color="0.45", linestyle="-.", linewidth=1)
        if not panel:  # what thaws: a bar each, from its epoch on
            axes.set(yticks=[], ylim=(len(thaws) - 0.4, -0.6))
            axes.grid(False)
            for place, (epoch, words) in enumerate(thaws):
                axes.barh(place, right + pad - epoch, left=epoch, color="0.87", height=0.9)
                axes.text(0.02, place, label(words, 50), transform=axes.get_yaxis_transform(), va="center",
                          fontsize=min(8, 100 / len(thaws)))
        for column, (words, style) in panel.items():
            points = [(row["epoch"], row[column]) for row in history
                      if math.isfinite(row[column]) and (row[column] > 0 or not logarithmic)]
            style = style | ({"marker": ""} if len(points) > 30 else {})
            x, y = ([point[i] for point in points] for i in (0, 1))
            handles[words], = axes.plot(x, y, markersize=4, linewidth=1.4, **style)
            if column.startswith("val_") and best is not None:
                handles[f"best epoch, {epochs[best]}"], = axes.plot(
                    epochs[best], history[best][column], "o", markersize=11, mfc="none", mec="black", mew=1.6)
    handles.pop("learning rate", None)
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    return figure


def draw_confusion(counts, scores):
    """The confusion matrix, truth on the rows; counts and scores as in `class_scores`. Colours: shares of the rows."""
    classes = sorted(score[0] for score in scores[:MOST_CLASSES])
    n, images = len(classes), {score[0]: score[4] for score in scores}
    shares = [[counts[t, p] / max(1, images[t]) for p in classes] for t in classes]
    cell = max(0.75, 3 / n) if n <= 12 else 0.36 if n <= 30 else 0.19  # inches
    size, names = 8.5 if n <= 12 else 7, [label(name, 28) for name in classes]
    longest, most = max(map(len, names)), max(counts[t, p] for t in classes for p in classes)
    margin = 0.7 + 0.0092 * size * longest
    upright = n > 12 or longest > 8  # the labels below
    figure = new_figure(n * cell + margin + 1, n * cell + 0.6 + (margin if upright else 0.4), layout="constrained")
    title = f"{n} of {len(scores)} classes, lowest F1" if n < len(scores) else "confusion matrix"
    axes = plain_panel(figure, (1, 1, 1), title, "predicted", "true")
    axes.grid(False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), names, fontsize=size, rotation=90 * upright)
    axes.set_yticks(range(n), names, fontsize=size)
    bar = figure.colorbar(image, shrink=min(1, 3 / (n * cell)), fraction=min(0.15, 0.6 / (n * cell)),
                          pad=min(0.05, 0.3 / (n * cell)), format=lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of the row", fontsize=8)
    for i, t in enumerate(classes):
        for j, p in enumerate(classes):
            if n <= 12 or counts[t, p] and (n <= 30 or shares[i][j] >= 0.05):  # 10,000 texts would take their time
                words = f"{counts[t, p]}\n{shares[i][j]:.0%}" if n <= 12 else counts[t, p]
                axes.text(j, i, words, ha="center", va="center", color="white" if shares[i][j] > 0.65 else "black",
                          fontsize=min(9, 72 * cell / (0.75 * len(str(most)))), in_layout=False)
    return figure


def draw_labels(scores):
    """The average precision of each label as a bar, and a line where guessing would be; scores: [(label, ones, share of
    ones, average precision), ...]. Where there are no ones, there is no bar.
    """
    figure = new_figure(7, 1.1 + 0.28 * len(scores), layout="constrained")
    axes = plain_panel(figure, (1, 1, 1), "average precision", "black: guessing, the share of ones")
    places = range(len(scores))
    axes.barh(places, [0 if math.isnan(ap) else ap for *_, ap in scores], color="tab:blue", height=0.7)
    for place, (_, ones, share, ap) in enumerate(scores):
        axes.vlines(share, place - 0.35, place + 0.35, color="black", linewidth=2)
        words = f"{ap:.3f}" if ones else "no ones"
        axes.text(1.01, place, words, va="center", fontsize=8)
    axes.set_yticks(places, [label(f"{name} ({ones})", 40) for name, ones, *_ in scores], fontsize=8)
    axes.set(xlim=(0, 1.1), ylim=(len(scores) - 0.4, -0.6))
    return figure


def draw_numbers(values, log):
    """Two Figures, with panels for each of values: {target: [(truth, prediction, low, high), ...]}: the predictions
    against the truth; the errors, predicted minus true, against the truth and as a histogram.
    """
    columns, rows = min(2, len(values)), math.ceil(len(values) / 2)
    one = new_figure(4.4 * columns, 4.4 * rows, layout="constrained")
    other = new_figure(8.4, 3.2 * len(values), layout="constrained")
    for place, (name, points) in enumerate(values.items()):
        truth, guesses, low, high = map(list, zip(*points, strict=True))
        errors, ranged = [p - t for t, p, *_ in points], low[0] is not None
        dots = {"color": "tab:blue", "linestyle": "", "marker": "o", "markeredgewidth": 0,
                "markersize": 4 if len(points) < 300 else 2.5, "alpha": 0.7 if len(points) < 300 else 0.3}
        line = {"color": "black", "linestyle": "--", "linewidth": 1}
        ends = truth + guesses + (low + high if ranged else [])
        ends = min(ends), max(ends)
        axes = plain_panel(one, (rows, columns, place + 1), name, "true", "predicted" + ", and its range" * ranged)
        if ranged:
            axes.vlines(truth, low, high, color="0.6", linewidth=0.8, alpha=dots["alpha"])
        axes.plot(truth, guesses, **dots)
        axes.plot(ends, ends, **line)
        scatter = plain_panel(other, (len(values), 2, 2 * place + 1), name, "true", "predicted - true")
        scatter.plot(truth, errors, **dots)
        scatter.axhline(0, **line)
        bars = plain_panel(other, (len(values), 2, 2 * place + 2), name, "predicted - true", "pictures")
        pad = 0.02 * (max(errors) - min(errors)) or 0.5 * abs(errors[0]) or 0.5
        bars.hist(errors, bins=min(40, 5 + math.isqrt(len(errors))), range=(min(errors) - pad, max(errors) + pad),
                  color="tab:blue", edgecolor="white", linewidth=0.5)
        bars.axvline(0, **line)
        for scaled, name in ((axes, "x"), (axes, "y"), (scatter, "x")) if log and ends[0] > 0 else ():
            scaled.set(**{f"{name}scale": "log"})
            axis = getattr(scaled, f"{name}axis")
            axis.get_major_locator().set_params(subs=(1, 2, 5) if ends[1] < 1000 * ends[0] else (1,))
            axis.set_minor_formatter("")
        limits = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
        axes.set(xlim=limits, ylim=limits)
        for panel in (axes, scatter, bars):
            panel.tick_params(axis="x", rotation=30)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    return one, other


def thumbnail(path):
    """A square RGB picture of SIDE pixels, upright, the whole of it on white; None if `path` cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.draft("RGB", (SIDE, SIDE))  # a large JPEG is decoded at a fraction of its size
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16-bit and float grey
                image = image if image.mode == "F" else image.convert("I").convert("F")
                scale = 255 / (image.getextrema()[1] or 1)
                image = image.point(lambda value: value * scale + 0).convert("L")
            image = image.convert("RGBA")
            image.thumbnail((SIDE, SIDE))
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return ImageOps.pad(image, (SIDE, SIDE), color="white")
    except Exception:  # PIL raises many kinds for damaged files
        return None


def draw_sheet(sections):
    """Thumbnails with words below them; sections: {title: [(path or None, file name, [line, ...]), ...]}."""
    tile, words, head = 2.1, 0.5, 0.35  # inches
    height = sum(head + math.ceil(len(tiles) / 4) * (tile + words) for tiles in sections.values())
    figure, y = new_figure(4 * tile, height), height
    for title, tiles in sections.items():
        figure.text(0.01, (y - 0.12) / height, label(title, 90), fontsize=10, va="top")
        y -= head
        for place, (path, file, lines) in enumerate(tiles):
            x, top = place % 4 * tile, y - place // 4 * (tile + words)
            side = tile - 0.15
            axes = figure.add_axes(((x + 0.075) / (4 * tile), (top - side) / height, side / (4 * tile), side / height))
            axes.set(xticks=[], yticks=[])
            if picture := thumbnail(path) if path else None:
                axes.imshow(picture)
            else:
                axes.set_facecolor("0.8")
                words_here = f"not {'read' if path else 'found'}:\n{label(os.path.basename(file), 28)}"
                axes.text(0.5, 0.5, words_here, transform=axes.transAxes, ha="center", va="center", fontsize=7.5,
                          family="DejaVu Sans Mono")
            figure.text((x + 0.075) / (4 * tile), (top - side - 0.06) / height, "\n".join(label(t, 31) for t in lines),
                        fontsize=7.5, va="top", family="DejaVu Sans Mono")  # of one width, so that 31 letters fit
        y -= math.ceil(len(tiles) / 4) * (tile + words)
    return figure


def draw_range_test(rates, losses, smoothed, suggestion, file):
    """Write the curve of a learning-rate range test to `file`: losses and smoothed losses over the rates, and a line at
    the suggested rate. Raises ReportError.
    """
    figure = new_figure(7, 4, layout="constrained")
    axes = plain_panel(figure, (1, 1, 1), "learning-rate range test", "learning rate of the head", "loss")
    axes.plot(rates, losses, ".", color="0.6", markersize=4, label="each step")
    axes.plot(rates[: len(smoothed)], smoothed, color="black", label="smoothed")
    axes.axvline(suggestion, color="tab:blue", linestyle="--", label=f"suggested: {suggestion:.1e}")
    low = min(smoothed)
    axes.set(xscale="log", ylim=(low - 0.2 * (smoothed[0] - low) - 1e-9, smoothed[0] + (smoothed[0] - low) + 1e-9))
    axes.legend(fontsize=8)
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Software": MARK})
    try:
        write_whole(Path(file).parent, {Path(file).name: buffer.getvalue()})
    except OSError as error:
        raise ReportError(f"could not write {file} ({error.strerror}): make room, or give another --output") from error


# ---- the page

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="report.py">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h2, h3 { margin: 2rem 0 0.5rem }
table { border-collapse: collapse; font-size: 0.9rem }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8885 }
.numbers td, .numbers th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.numbers td:first-child, .numbers th:first-child { text-align: left; white-space: normal; min-width: 7rem }
.words td, .texts td { min-width: 6rem }
.texts td:not(:nth-last-child(-n + 3)) { min-width: 14rem; unicode-bidi: plaintext }
.facts td:first-child, .words td:first-child { min-width: 8rem }
.scroll { overflow-x: auto }
img { display: block; background: white; height: auto; width: 100% }
.best { font-weight: bold }
summary { cursor: pointer; margin: 0.5rem 0 }
</style>
"""


def shown(value):
    """A value as escaped text; a float with six digits."""
    return html.escape(clean(f"{value:.6g}" if isinstance(value, float) else value))


def table(header, rows, kind="numbers", best=None):
    """An HTML table; kind: its class; best: the place of a row in bold."""
    lines = [f'<div class="scroll"><table class="{kind}">']
    if header:
        lines.append(f"<tr>{''.join(f'<th>{shown(cell)}</th>' for cell in header)}</tr>")
    for i, row in enumerate(rows):
        start = '<tr class="best">' if i == best else "<tr>"
        lines.append(f"{start}{''.join(f'<td>{shown(cell)}</td>' for cell in row)}</tr>")
    return "\n".join([*lines, "</table></div>"])


def folded(title, content):
    return f"<details><summary>{shown(title)}</summary>\n{content}\n</details>"


def picture_tag(png, alt):
    """The picture itself; as wide as the page, but never so small that its words cannot be read: it scrolls then."""
    width = Image.open(io.BytesIO(png)).width * 100 // DPI  # CSS pixels
    least = min(width, max(600, width * 2 // 3))
    return (f'<div class="scroll"><img style="max-width: {width}px; min-width: {least}px" alt="{shown(alt)}" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>')


def judge_classes(rows, find):
    """What the predictions of a classification say: [(name, text), ...] for the head of the page, and {file: (Figure,
    alt text, HTML below it)}. find: gives the path of a picture by its name in the predictions, or None. Of texts, the
    mistakes are a table and no Figure.
    """
    texts = text_columns(rows[0])
    what = "texts" if texts else "pictures"
    counts = Counter((row["truth"], row["prediction"]) for row in rows)
    scores, right = class_scores(counts), sum(count for (t, p), count in counts.items() if t == p)
    occurring = sum(score[4] > 0 for score in scores)
    mean = ["macro mean", *(sum(score[k] for score in scores) / len(scores) for k in (1, 2, 3)), len(rows)]
    facts = [("accuracy", f"{right / len(rows):.4f} ({right} of {len(rows)} {what} right)"),
             ("balanced accuracy", f"{sum(score[2] for score in scores) / occurring:.4f}"),
             ("macro F1", f"{mean[3]:.4f}, over the {len(scores)} classes that occur")]
    cells = [[c, *(f"{v:.4f}" for v in values), images] for c, *values, images in [*scores, mean]]
    in_class = {score[0]: score[4] for score in scores}
    mistaken = Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1]})
    swaps = [(f"{t} as {p}", count, f"{count / in_class[t]:.0%}") for (t, p), count in mistaken.most_common(SWAPS)]
    counted = "texts" if texts else "images"
    below = table(["class", "precision", "recall", "F1", counted], cells, best=len(scores))
    if len(scores) > 2 and swaps:
        below += "<h3>Taken for another most often</h3>" + table(["", counted, "share of the class"], swaps)
    found = {"confusion.png": (
        draw_confusion(counts, scores),
        f"Confusion matrix, truth on the rows: {right} of {len(rows)} {what} are on the diagonal",
        below)}
    wrong = sorted((row for row in rows if row["truth"] != row["prediction"]), key=lambda row: -row["probability"])
    worst = wrong[:WORST]
    title = f"{len(worst)} of {len(wrong)} mistakes: wrong with the highest probability"
    if worst and texts:
        lines = [[*(shortened(row[name], LONGEST) for name in texts), row["truth"], row["prediction"],
                  f"{row['probability']:.1%}"] for row in worst]
        if any(len(row[name]) > LONGEST for row in worst for name in texts):
            title += f". Of a text of more than {LONGEST} characters, the middle is left out"
        lines = table([*texts, "true", "predicted", "probability"], lines, "texts")
        found["mistakes.png"] = None, "", f"<p>{title}.</p>\n{lines}"
    elif worst:
        lines = [(row["file"], row["truth"], row["prediction"], f"{row['probability']:.1%}") for row in worst]
        words = "true: {}", "predicted: {}", "probability {}"
        tiles = [(find(file), file, [w.format(v) for w, v in zip(words, values, strict=True)])
                 for file, *values in lines]
        lines = table(["file", "true", "predicted", "probability"], lines, "words")
        found["mistakes.png"] = draw_sheet({title: tiles}), f"Thumbnails: {title}", folded("As a table", lines)
    return facts, found


def judge_entities(rows):
    """As `judge_classes`, for entities in texts: a row for each that is true or predicted. One is right if its place
    and its type are.
    """
    right, given, true = Counter(), Counter(), Counter()
    for row in rows:
        true[row["truth"]] += 1
        given[row["prediction"]] += 1
        right[row["truth"]] += row["truth"] == row["prediction"]
    types = sorted((true | given).keys() - {""})

    def line(name, names):
        hits, said, there = (sum(counts[n] for n in names) for counts in (right, given, true))
        ratios = hits / max(1, said), hits / max(1, there), 2 * hits / max(1, said + there)
        return [name, *(f"{ratio:.4f}" for ratio in ratios), there, said]

    micro, cells = line("all (micro)", types), [line(name, [name]) for name in types]
    sections = {"Missed": [row for row in rows if not row["prediction"]],
                "Invented": [row for row in rows if not row["truth"]],
                "Of the wrong type": [row for row in rows if row["truth"] and row["prediction"]
                                      and row["truth"] != row["prediction"]]}
    facts = [("precision, recall, F1", ", ".join(micro[1:4])),
             ("mistakes", ", ".join(f"{len(wrong)} {name.lower()}" for name, wrong in sections.items()))]
    below = table(["type", "precision", "recall", "F1", "true", "predicted"], [*cells, micro], best=len(cells))
    lists = []
    for name, wrong in sections.items():
        worst = sorted(wrong, key=lambda row: -row["probability"])[:WORST]
        lines = [[shortened(row["text"], LONGEST), row["entity"], row["truth"] or "-", row["prediction"] or "-",
                  f"{row['probability']:.1%}"] for row in worst]
        if worst:
            lists.append(f"<h3>{name}: {len(worst)} of {len(wrong)}, the most probable first</h3>\n"
                         + table(["text", "entity", "true", "predicted", "probability"], lines, "texts"))
    found = {"entities.png": (None, "", below)}
    return facts, found | ({"mistakes.png": (None, "", "\n".join(lists))} if lists else {})


def judge_labels(rows, labels, find):
    """As `judge_classes`, for labels of which a picture may have any number. Where it is not known whether it has one,
    the picture does not count for that label.
    """
    # As in metrics.separator_for.
    separator = next((mark for mark in " ,;|" if not any(mark in name for name in labels)), "\n")
    given, scores, sections, lines = [set(row["labels"].split(separator)) for row in rows], [], {}, []
    for name in labels:
        cells = [(row["file"], row.get(f"true_{name}", math.nan), row[f"p_{name}"], name in names)
                 for row, names in zip(rows, given, strict=True)]
        cells = [cell for cell in cells if math.isfinite(cell[1])]
        ones, hits = sum(truth for _, truth, *_ in cells), sum(truth for _, truth, _, yes in cells if yes)
        said, ap = sum(yes for *_, yes in cells), average_precision([(p, truth) for _, truth, p, _ in cells])
        scores.append((name, int(ones), ones / max(1, len(cells)), ap, said, hits, hits / max(1, said),
                       hits / max(1, ones), 2 * hits / max(1, ones + said)))
        missed = sorted((p, file) for file, truth, p, yes in cells if truth and not yes)
        alarms = sorted(((p, file) for file, truth, p, yes in cells if yes and not truth), reverse=True)
        for words, worst in (("missed", missed), ("false alarm", alarms)):
            lines += [(file, name, words, f"{p:.1%}") for p, file in worst[:4]]
            if worst[:4]:
                sections[f"{name}: {words}, {min(4, len(worst))} of {len(worst)}"] = [
                    (find(file), file, [words, f"probability {p:.1%}"]) for p, file in worst[:4]]
    there, judged = [s for s in scores if s[1] or s[4]], [s[3] for s in scores if s[1]]
    said, hits, ones = (sum(s[k] for s in scores) for k in (4, 5, 1))
    mean = sum(judged) / len(judged) if judged else math.nan
    counts = f"{hits:.0f} of {ones} right, {said - hits:.0f} false alarms"
    facts = [("mean average precision", f"{mean:.4f}, over the {len(judged)} of {len(labels)} labels that are true of a "
                                        "picture here"),
             ("macro F1", f"{sum(s[8] for s in there) / max(1, len(there)):.4f}"),
             ("micro F1", f"{2 * hits / max(1, said + ones):.4f} ({counts})")]
    scores.sort(key=lambda score: (math.isnan(score[3]), score[3]))
    cells = [[name, ones, f"{share:.3f}", *(f"{v:.4f}" for v in (ap, *ratios))]
             for name, ones, share, ap, _, _, *ratios in scores]
    below = table(["label", "pictures", "share", "average precision", "precision", "recall", "F1"], cells)
    found = {"labels.png": (draw_labels([score[:4] for score in scores[:MOST_CLASSES]]),
                            "Average precision of each label, and that of guessing", below)}
    if sections:
        lines = table(["file", "label", "mistake", "probability"], lines, "words")
        sections = dict(list(sections.items())[: 2 * MOST_TARGETS])
        found["mistakes.png"] = draw_sheet(sections), f"Thumbnails: {'; '.join(sections)}", folded("As a table", lines)
    return facts, found


def judge_numbers(rows, targets, log, find):
    """As `judge_classes`, for a regression; log: its --log-target. Numbers that are not finite are left out."""
    facts, values, sections, lines = [], {}, {}, []
    for target in targets:
        levels = sorted((name for name in rows[0] if re.fullmatch(re.escape(target) + "_q[-+.0-9e]+", name)),
                        key=lambda name: float(name.rpartition("_q")[2]))
        ends = [levels[0], levels[-1]] if len(levels) > 1 else []
        columns = [target, f"{target}_prediction", *ends]
        good = [row for row in rows if all(abs(row[name]) < 1e300 for name in columns)]  # differences are finite, too
        facts.append((target, f"{len(good)} of {len(rows)} pictures have finite numbers"))
        if not good:
            continue
        values[target] = [(*(row[name] for name in columns), *([] if ends else [None, None])) for row in good]
        facts[-1] = target, ", ".join([f"{k} {v:.6g}" for k, v in number_scores(values[target]).items()]
                                      + [f"on {len(good)} of {len(rows)} pictures"]
                                      + [f"inside: from {name}" for name in [" to ".join(ends)] if ends])
        errors = [(row["file"], target, t, p, abs(p - t)) for row, (t, p, *_) in zip(good, values[target], strict=True)]
        worst = sorted((e for e in errors if e[4] > 0), key=lambda e: -e[4])[: max(4, WORST // len(targets))]
        lines += worst
        if worst:
            sections[f"{target}: the {len(worst)} largest errors"] = [
                (find(file), file, [f"true: {t:.6g}", f"predicted: {p:.6g}", f"off by {error:.6g}"])
                for file, _, t, p, error in worst]
    found = {}
    if values:
        if len(values) > MOST_TARGETS:
            facts.append(("pictures", f"of the first {MOST_TARGETS} of {len(values)} targets"))
        predicted, residuals = draw_numbers(dict(list(values.items())[:MOST_TARGETS]), log)
        found["predicted.png"] = predicted, "Predicted against true numbers; the same on the dashed line", ""
        found["residuals.png"] = residuals, "Predicted minus true, against the truth and as a histogram", ""
    if sections:
        lines = table(["file", "target", "true", "predicted", "error"], lines, "words")
        sections = dict(list(sections.items())[:MOST_TARGETS])
        found["mistakes.png"] = draw_sheet(sections), f"Thumbnails: {'; '.join(sections)}", folded("As a table", lines)
    return facts, found


def write_report(folder):
    """Write report.html and its PNG files into the run folder; returns their paths. Raises ReportError: for a folder
    that is none of a run, damaged files, files of the same names that are not of a report, a disk that refuses; what
    was there then stays as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"no such folder: {folder}: give the folder of a run, such as runs/train_classifier/<time>")
    history, options, (split, rows, targets) = read_history(folder), read_options(folder), read_predictions(folder)
    monitor = str(options.get("monitor") or "val_loss")
    best = best_row(history, monitor)
    old_split, old_rows, _ = read_predictions(folder, "old_")
    methods = str(options.get("method") or "")
    idle = [name for name, method in OF_METHODS.items() if methods and method not in methods.split("+")]
    idle += ["loss"] if options.get("quantiles") else []
    chosen = (f"{name} {clean(options[name]).strip('[]')}" for name in OPTIONS if options.get(name) and name not in idle)
    facts = [("epochs", f"{len(history)}, from {history[0]['epoch']} to {history[-1]['epoch']}")]
    if best is not None:
        facts.append(("best epoch", f"{history[best]['epoch']}, {monitor} {history[best][monitor]:.6g}"))
    if said := advice(history, monitor, options):
        facts.append(("advice", said))

    def find(file):
        return find_picture(file, folder, options)

    files, judged = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font does not have
        labels = label_names(rows[0]) if rows else []
        entities = bool(rows) and of_entities(rows[0])
        known = [row for row in rows if targets or entities or row.get("truth")
                 or any(math.isfinite(row.get(f"true_{name}", math.nan)) for name in labels)]
        if rows:
            facts.append(("judged on", split + (", which chose best.pt: expect a little less on others"
                                                if split == "val" else "")))
        if len(known) < len(rows):
            what = "labels are" if labels else "class is"
            things = "texts" if text_columns(rows[0]) else "pictures"
            facts.append(("not judged", f"{len(rows) - len(known)} of {len(rows)} {things}, whose {what} not known"))
        if known:
            more, judged = (judge_numbers(known, targets, bool(options.get("log_target")), find) if targets
                            else judge_entities(known) if entities
                            else judge_labels(known, labels, find) if labels else judge_classes(known, find))
            facts += more
        old_rows = [row for row in old_rows if row.get("truth")]
        if old_rows:
            right = sum(row["truth"] == row["prediction"] for row in old_rows)
            facts.append(("old pictures", f"accuracy {right / len(old_rows):.4f} on {old_split} ({right} of {len(old_rows)})"))
        left_out = panel_names(history, options)[MOST_PANELS:]
        more = f"<p>Without a curve, but in the history below: {shown(', '.join(left_out))}.</p>" if left_out else ""
        curves = draw_curves(history, options, best), "Loss, metrics and learning rate over the epochs", more
        pictures = {"curves.png": curves} | judged
        for name, (figure, _, _) in pictures.items():
            if figure is None:  # of texts
                continue
            figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Software": MARK})
            files[name] = buffer.getvalue()

    facts.append(("options", ", ".join(chosen) or "not known"))
    title = shown(folder.resolve().name)
    page = [f"{HEAD}<title>{title}</title></head><body>", f"<h1>{title}</h1>", table([], facts, "facts")]
    for name, (_, alt, below) in pictures.items():
        page += [f"<h2>{HEADINGS[name]}</h2>", picture_tag(files[name], alt) if name in files else "", below]
    if "mistakes.png" not in pictures:
        none = "No mistakes." if judged else "No predictions whose truth is known." if rows else "No predictions."
        page.append(f"<h2>{HEADINGS['mistakes.png']}</h2><p>{none}</p>")
    cells = [[short_number(cell) for cell in row.values()] for row in history]
    page += ["<h2>All numbers</h2>", folded("History", table(list(history[0]), cells, best=best)), "</body></html>"]
    replace_files(folder, files | {"report.html": "\n".join(page).encode()})
    return [folder / name for name in (*files, "report.html")]


def check_tensorboard(wanted):
    """Before anything is written: raise ReportError if TensorBoard is wanted and not installed."""
    try:
        if wanted:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ReportError(f"--tensorboard needs TensorBoard ({error}): pip install tensorboard, or say "
                          "--no-tensorboard (report.html has the same curves)") from error


class Log:
    """What a run says of each epoch: a line on the terminal and, if wanted, TensorBoard.

    tensorboard: whether it is. first_epoch: what an earlier run wrote for it from that epoch on is passed over.
    """

    def __init__(self, folder, tensorboard=False, first_epoch=0):
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(folder, "tensorboard")), purge_step=first_epoch)

    def epoch(self, row, is_best, shown, digits=".4f"):
        """row: that of the history. is_best: whether best.pt is of this epoch now. shown: the columns that are in the
        line. digits: their format.
        """
        words = "  ".join(f"{name} {row[name]:{digits}}" for name in dict.fromkeys(shown))
        print(f"epoch {row['epoch']:3d}  {words}  lr {row['lr']:.1e}  {row['seconds']:.1f} s{'  best' if is_best else ''}",
              flush=True)
        if row["loss_scale"] < 1:
            print("warning: fp16's loss scale has collapsed, steps are passed over: start again with --amp bf16 or off")
        if self.writer:
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])
            self.writer.flush()


def sum_up(folder, history, monitor, pictures=True):
    """The last words after training: `advice`, where the files are, with a report among them if `pictures`, and how to
    predict. What hinders the report is said and does not end the script.
    """
    lines, written, options = [""], [], {}
    try:
        options = read_options(folder)
        lines += filter(None, [advice(history, monitor, options)])
        written = write_report(folder) if pictures else []
    except ReportError as error:
        lines.append(f"note: no report: {error}")
    lines.append(f"files are in {folder}" + (f"; look at {written[-1]}" if written else ""))
    script, takes = ("predict_text.py", "TEXTS") if "max_length" in options else ("predict.py", "PICTURES")
    lines.append(f"next: python {script} --checkpoint {shlex.quote(str(Path(folder, 'best.pt')))} {takes}")
    return "\n".join(lines)


def short_number(cell):
    try:
        return f"{float(cell):.5g}"
    except ValueError:  # text, or nothing
        return cell


def write_whole(folder, files):
    """Write {name: bytes} into a folder, each file in one step, when all of them are there. Raises OSError."""
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            temporary[name].write_bytes(content)
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def replace_files(folder, files):
    """Write {name: bytes} into a folder, each file in one step, and remove the pictures of an earlier report that this
    one does not have. Files that are not of a report stay as they are: ReportError.
    """
    try:
        old = [folder / name for name in (*HEADINGS, "report.html") if os.path.lexists(folder / name)]
        for path in old:
            with open(path, "rb") as file:
                if MARK.encode() not in file.read(1000):
                    raise ReportError(f"{path} is not of a report: it was left as it is, rename it")
        write_whole(folder, files)
        for path in old:
            if path.name not in files:
                path.unlink()
    except OSError as error:
        raise ReportError(f"could not write the report into {folder} ({error.strerror}): make room, or copy the run to "
                          "where you may write") from error


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="More: docs/runs.md")
    parser.error = lambda message: parser.exit(2, f"error: {clean(message)}\n")
    parser.add_argument("folder", metavar="RUN", help="the folder of a run, such as runs/train_classifier/<time>")
    try:
        paths = write_report(parser.parse_args(argv).folder)
    except ReportError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    print(f"wrote {clean(paths[-1])}, and beside it {', '.join(path.name for path in paths[:-1])}")


if __name__ == "__main__":
    main()
