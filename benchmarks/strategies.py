"""Some ways to fine-tune the same network on the same pictures or texts, over several seeds, as a table.

    python benchmarks/strategies.py --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth --image-size 64
    python benchmarks/strategies.py ... --rows default "--augment strong" "--mixup 0.2"     # any other comparison
    python benchmarks/strategies.py --data ./houses --target price --log-target ...         # of train_regressor.py
    python benchmarks/strategies.py --text --data reviews.csv --model ./minilm       # of train_text_classifier.py

Runs the training script as a user would, once per strategy and seed, with its default settings, interleaved (all
strategies for seed 0, then for seed 1, ...). The score is that of best.pt on the test split, read from
test_predictions.csv: accuracy, or of a regression the mean absolute error and R2, beside those of predicting the mean and
the median of the training split. Seconds are those of the whole command. Each command is printed, with what it got.
"""

import argparse
import csv
import importlib.metadata
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import metrics  # noqa: E402

STRATEGIES = {
    "from scratch": "--weights none",
    "head only": "--weights {weights} --freeze backbone",
    "gradual unfreezing": "--weights {weights} --freeze backbone --unfreeze 1:layer4 --unfreeze 2:layer3 --unfreeze 3:all",
    "everything, backbone at a tenth of the rate": "--weights {weights}",
}
TEXT_STRATEGIES = {
    "from scratch": "--weights none",
    "head only": "--freeze backbone",
    "head only, on the mean of the pieces": "--freeze backbone --pool mean",
    "head first, then everything": "--freeze backbone --unfreeze 1:all",
    "everything, encoder at a tenth of the rate": "",
}


def accuracy_of(rows, target=None):
    return (sum(row["truth"] == row["prediction"] for row in rows) / len(rows),)


def errors_of(rows, target):
    """(mean absolute error, R2)"""
    truth, found = (torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
                    for name in (target, f"{target}_prediction"))
    scores = metrics.regression_scores(found, truth)
    return scores["mae"], scores["r2"]


def run(command, output):
    """Run one of the scripts, a list of words, as a user would: (the rows of its test_predictions.csv, seconds)."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--output", str(output)], check=True,
                   stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    with open(output / "test_predictions.csv", newline="") as file:
        return list(csv.DictReader(file)), seconds


def this_machine(package="torchvision"):
    """Words about the machine and the versions of torch and of a package."""
    machine = checkpoint.machine()
    return (f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}, {package} "
            f"{importlib.metadata.version(package)}, Python {platform.python_version()}"
            f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}")


def on_what(seeds, count, what="pictures", package="torchvision"):
    """A line about the test split, the machine and the versions."""
    return f"\n{seeds} seeds, {count} test {what}; {this_machine(package)}\n"


def baselines(data, labels, target):
    """{words: (mean absolute error, R2)} of predicting the same number for each row of the test split."""
    with open(Path(data, labels), newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    training = [float(row[target]) for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    return {f"{words} of the training split": errors_of([row | {f"{target}_prediction": of(training)} for row in test], target)
            for words, of in (("mean", statistics.mean), ("median", statistics.median))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="with train/, val/ and test/; a table of texts")
    parser.add_argument("--weights", default="DEFAULT", metavar="W",
                        help="as in train_classifier.py (default %(default)s); not with --text")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (default %(default)s)")
    parser.add_argument("--runs", default="runs/strategies", metavar="DIR", help="run folders; replaced (default %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="OPTIONS",
                        help="instead of the strategies: a row for each of these options of the script")
    parser.add_argument("--target", metavar="NAME", help="run train_regressor.py on this column of labels.csv")
    parser.add_argument("--text", action="store_true", help="run train_text_classifier.py (--target: its column)")
    args, more = parser.parse_known_args(argv)  # more: options for every run, such as --image-size 64
    more += ["--target", args.target] if args.target else []
    script, score, of_numbers = "train_classifier.py", accuracy_of, False
    if args.text:
        script = "train_text_classifier.py"
    elif args.target:
        script, score, of_numbers = "train_regressor.py", errors_of, True

    strategies = TEXT_STRATEGIES if args.text else STRATEGIES
    if args.rows:
        for_all = "" if args.text else "--weights {weights} "
        strategies = {row: for_all + ("" if row == "default" else row) for row in args.rows}
    found = {name: [] for name in strategies}
    for seed in range(args.seeds):
        for number, (name, options) in enumerate(strategies.items()):
            output = Path(args.runs, f"{number}_{seed}")
            options = options.format(weights=shlex.quote(args.weights))
            command = [script, "--data", args.data, *shlex.split(options), *more, "--seed", str(seed)]
            rows, seconds = run(command, output)
            scores = score(rows, args.target)
            found[name].append((*scores, seconds))
            words = "  ".join(f"{s:.6g}" for s in scores)
            print(f"{words}  {seconds:5.1f} s  python {shlex.join(command)}", flush=True)

    print(on_what(args.seeds, len(rows), *(("texts", "transformers") if args.text else ())))
    if of_numbers:
        print("| strategy | mean absolute error, mean | lowest to highest | R2, mean | lowest to highest | seconds, median |")
        print("|---|---|---|---|---|---|")
        for words, (absolute, r2) in baselines(args.data, "labels.csv", args.target).items():
            print(f"| {words} | {absolute:,.6g} | | {r2:.3f} | | |")
    else:
        print("| strategy | test accuracy, mean | lowest to highest | seconds, median |\n|---|---|---|---|")
    for name, results in found.items():
        *scores, seconds = zip(*results, strict=True)
        digits = [",.6g", ".3f"] if of_numbers else [".3f"]
        cells = [f"{statistics.mean(s):{d}} | {min(s):{d}} to {max(s):{d}}" for s, d in zip(scores, digits, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.0f} |")


if __name__ == "__main__":
    main()
