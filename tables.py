"""Numbers for pictures, from a CSV: read and check them, standardize them for training, and go back to their own units.

    table = read_table("./houses/labels.csv", ["price"], data.split_by_hash)     # .splits["train"] = [(path, row), ...]
    scale = fit_scale(table.values["train"], log=True)
    targets = standardize(table.values["train"], scale)                          # mean 0, standard deviation 1
    predictions, _ = to_own_units(outputs, scale)

This file needs torch alone and can be copied into any project.
"""

import csv
import hashlib
import itertools
import math
import os
import shlex
from collections import Counter, namedtuple
from pathlib import Path

import torch


class TableError(Exception):
    """A CSV that cannot be used. The message is one line that names the way out."""


# ---- reading

Table = namedtuple("Table", "targets splits values weights")
Table.__doc__ = """targets: the names of the columns to predict. splits: {"train", "val", maybe "test": [(path, row),
...]}, where `row` counts from 0 within the split. values: {split: float64 (rows, targets)}. weights: {split: float64
(rows,)}, of mean 1 over the training split; all 1 without a column of weights."""


# What may stand in the column `split`.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_table(file, targets, split_paths, val_split=0.2, weight_column=None, log=False):
    """Read a CSV (see `read_rows`) and split it by its column `split`. Returns a Table; raises TableError.

    split_paths: where there is no such column, a function (paths, share, folder) -> (paths for train, paths for val);
        the share is `val_split`.
    """
    samples = {split: [] for split in ("train", "val", "test")}
    rows = read_rows(file, targets, weight_column, log)
    for path, split, numbers, weight in rows:
        samples[split or "train"].append((path, numbers, weight))
    if rows[0][1] is None:  # there is no column `split`
        paths = list(dict.fromkeys(path for path, _, _ in samples["train"]))
        aside = set(split_paths(paths, val_split, Path(file).parent)[1])
        samples["val"] = [s for s in samples["train"] if s[0] in aside]
        samples["train"] = [s for s in samples["train"] if s[0] not in aside]
    for split in ("train", "val"):
        if not samples[split]:
            raise TableError(f"{file} has no rows of the split {split}: name some so in its column 'split'")
    samples = {split: found for split, found in samples.items() if found}
    values = {split: torch.tensor([n for _, n, _ in found], dtype=torch.float64) for split, found in samples.items()}
    weights = {split: torch.tensor([w for _, _, w in found], dtype=torch.float64) for split, found in samples.items()}
    for name, column in zip(targets, values["train"].T, strict=True):
        if (column == column[0]).all():
            raise TableError(f"{file}: {name} is {column[0]:g} in every row of the training split: nothing to learn")
    for split in ("train", "val"):
        if not 0 < weights[split].sum() < math.inf:
            raise TableError(f"{file}: the weights of the split {split} add up to {weights[split].sum():g}")
    weights = {split: w / weights["train"].mean() for split, w in weights.items()}
    splits = {split: [(path, i) for i, (path, _, _) in enumerate(found)] for split, found in samples.items()}
    return Table(list(targets), splits, values, weights)


def read_rows(file, targets, weight_column=None, log=False):
    """[(path, split or None, [number of each target], weight), ...] from a CSV with a column `file` (paths relative to
    the CSV's folder), numeric columns `targets`, and maybe a column `split` of train, val (valid, validation) and test.
    log: the targets will be taken the logarithm of, so they must be above zero. Raises TableError, with the number of
    the line in the file, for whatever cannot be used.
    """
    rows, columns = _read_csv(file)
    needed = ["file", *targets, *([weight_column] if weight_column else [])]
    if missing := [name for name in needed if name not in columns]:
        raise TableError(f"{file} has no column {', '.join(map(repr, missing))}: there are {', '.join(columns)}")
    if twice := [name for name, count in Counter(targets).items() if count > 1]:
        raise TableError(f"the target {twice[0]} is named twice")
    for name in targets:
        if other := [t for t in targets if t.startswith((f"{name}_prediction", f"{name}_q"))]:
            raise TableError(f"{other[0]} could be a column of predictions of {name}: rename it")
    found, absent = [], []
    for line, row in rows:
        where = f"{file}, line {line}"
        path = os.path.join(Path(file).parent, row["file"])
        if not os.path.isfile(path):
            absent.append(f"{where}: no such picture: {path}")
        split = SPLITS.get(row["split"].strip().lower()) if "split" in columns else None
        if "split" in columns and split is None:
            raise TableError(f"{where}: the split is '{row['split']}': write train, val or test")
        numbers = [_number(row[name], name, where) for name in targets]
        if log and min(numbers) <= 0:
            raise TableError(f"{where}: {targets[numbers.index(min(numbers))]} is {min(numbers):g}, which has no "
                            "logarithm: leave --log-target out, or that row")
        weight = _number(row[weight_column], weight_column, where) if weight_column else 1.0
        if weight < 0:
            raise TableError(f"{where}: the weight {weight_column} is {weight:g}: it must be 0 or above")
        found.append((path, split, numbers, weight))
    if absent:
        raise TableError(absent[0] + (f" (and {len(absent) - 1} more are missing)" if len(absent) > 1 else ""))
    return found


def _read_csv(file):
    """([(number of the line, {column: text}), ...], [column, ...])"""
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            reader = csv.reader(lines)
            columns = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except OSError as error:
        raise TableError(f"cannot read the labels {file} ({error.strerror})") from error
    except csv.Error as error:
        raise TableError(f"{file} is no CSV file ({error})") from error
    if len(columns) == 1 and (mark := next((m for m in ";\t" if m in columns[0]), None)):
        raise TableError(f"{file} is separated by {'semicolons' if mark == ';' else 'tabs'}: save it with commas")
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise TableError(f"{file}, line {line}: more cells than the header has columns; a number such as 1,234 "
                             "needs quotes, or no comma")
    if twice := [name for name, count in Counter(columns).items() if count > 1 and name]:
        raise TableError(f"{file} has the column '{twice[0]}' twice: rename one")
    if not rows:
        raise TableError(f"{file} holds no rows below its header")
    # A line that is too short has empty cells at its end.
    whole = [(line, dict(itertools.zip_longest(columns, cells[: len(columns)], fillvalue=""))) for line, cells in rows]
    return whole, [name for name in columns if name]


def _number(text, column, where):
    try:
        number = float(text)
    except ValueError:
        raise TableError(f"{where}: {column} is '{text}', which is not a number") from None
    if not math.isfinite(number):
        raise TableError(f"{where}: {column} is {number}: it must be finite")
    return number


def describe(table):
    """A table of the rows per split, with the smallest, mean, median and largest value of each target."""
    width = max(len(name) for name in [*table.targets, "target"])
    lines = [f"{'target':<{width}}  split   rows     smallest         mean       median      largest"]
    for i, name in enumerate(table.targets):
        for split, values in table.values.items():
            column = values[:, i]
            numbers = (column.min(), column.mean(), column.quantile(0.5), column.max())
            numbers = "".join(f"{v.item():13.6g}" for v in numbers)
            lines.append(f"{name:<{width}}  {split:<5} {len(column):6d}{numbers}")
    return "\n".join(lines)


def fingerprint(table):
    """What a run learns from, in a few words: which pictures are in train and val, with which numbers and weights."""
    content = [table.targets]
    for split in ("train", "val"):
        content += zip([Path(path).name for path, _ in table.splits[split]], table.values[split].tolist(),
                       table.weights[split].tolist(), strict=True)
    sizes = ", ".join(f"{split} {len(table.splits[split])}" for split in ("train", "val"))
    return f"{sizes}, content {hashlib.sha256(ascii(content).encode()).hexdigest()[:8]}"


def refuse_others(fingerprint, before, labels, file):
    """Raise TableError if the rows of the file `labels` are not those that a run, resumed from the checkpoint `file`, has
    learned from before. fingerprint, before: of the two.
    """
    if fingerprint != before:
        raise TableError(f"{labels} holds other rows ({fingerprint}) than the run was started with ({before}): start a new "
                         f"run from its weights, --weights {shlex.quote(file)}")


def refuse_constant(values, labels):
    """Raise TableError if a target has the same value in all rows (rows, targets) of the validation split."""
    if (values == values[0]).all(0).any():
        raise TableError(f"{labels}: a target is the same in all val rows, so there is no val_r2 to monitor")


# ---- standardizing, and back


def fit_scale(values, log=False):
    """What `standardize` needs: {"mean", "std" of each target, "log"}, from the training values (rows, targets). Raises
    TableError for numbers that float64 cannot square or tell apart.
    """
    values = values.log() if log else values
    mean, std = values.mean(0), values.std(0, correction=0)
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise TableError(f"the targets have mean {mean.tolist()} and standard deviation {std.tolist()}: rescale them")
    return {"mean": mean.tolist(), "std": std.tolist(), "log": log}


def baselines(values):
    """What to compare a model with: {"training mean", "training median"}, one number for each target."""
    return {"training mean": values.mean(0).tolist(), "training median": values.quantile(0.5, dim=0).tolist()}


def output_names(targets, log=False, quantiles=None):
    """What each output of the network stands for: `price`, `log price`, or `price q0.1` and so on."""
    names = [f"log {name}" if log else name for name in targets]
    return [f"{name} q{q:g}" for name in names for q in quantiles] if quantiles else names


def standardize(values, scale):
    """Values (rows, targets) in their own units -> mean 0 and standard deviation 1 over the training split. float64."""
    mean, std = (torch.tensor(scale[k], dtype=torch.float64) for k in ("mean", "std"))
    found = ((values.log() if scale["log"] else values) - mean) / std
    if not found.float().isfinite().all():
        raise TableError(f"a target is {found.abs().max():g} standard deviations from the training split's mean")
    return found


def tensors(table, split, scale, device="cpu"):
    """What a network learns from a split: the standardized targets (rows, targets) and the weights (rows,), in float32 on
    the device.
    """
    targets = standardize(table.values[split], scale)
    return targets.float().to(device), table.weights[split].float().to(device)


def to_own_units(outputs, scale, quantiles=None):
    """The way back from `standardize`, to float64 on the CPU: outputs (rows, targets) -> (predictions (rows, targets),
    None). With quantiles, a list that holds 0.5: outputs (rows, targets, quantiles) -> (the medians, all of them).
    """
    mean, std = (torch.tensor(scale[k], dtype=torch.float64) for k in ("mean", "std"))
    if quantiles:
        mean, std = mean[:, None], std[:, None]
    values = outputs.cpu().double() * std + mean
    values = values.exp() if scale["log"] else values
    if not quantiles:
        return values, None
    # Sorted, so that they do not cross (Chernozhukov et al., "Quantile and Probability Curves Without Crossing", 2010).
    values = values.sort(-1).values
    return values[..., quantiles.index(0.5)], values


def prediction_rows(files, targets, predictions, quantiles=None, levels=(), truth=None):
    """[{"file", then of each target its true value (given `truth`), `<target>_prediction`, `<target>_q0.1` and so on},
    ...] for a CSV. predictions, truth: (N, targets), nan where the truth is not known: an empty cell; quantiles: (N,
    targets, levels).
    """
    rows = []
    for i, file in enumerate(files):
        row = {"file": file}
        for t, name in enumerate(targets):
            if truth is not None:
                row[name] = "" if truth[i, t].isnan() else truth[i, t].item()
            row[f"{name}_prediction"] = predictions[i, t].item()
            if quantiles is not None:
                row |= {f"{name}_q{q:g}": quantiles[i, t, k].item() for k, q in enumerate(levels)}
        rows.append(row)
    return rows
