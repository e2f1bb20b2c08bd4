"""Four ways to fine-tune the same network on the same pictures, over several seeds, as a table.

    python benchmarks/strategies.py --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth --image-size 64
    python benchmarks/strategies.py ... --rows default "--augment strong" "--mixup 0.2"     # any other comparison

Runs train_classifier.py as a user would, once per strategy and seed, with its default settings, interleaved (all
strategies for seed 0, then for seed 1, ...). Accuracy is that of best.pt on test/, read from test_predictions.csv;
seconds are those of the whole command. Each command is printed, with what it got.
"""

import argparse
import csv
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

STRATEGIES = {
    "from scratch": "--weights none",
    "head only": "--weights {weights} --freeze backbone",
    "gradual unfreezing": "--weights {weights} --freeze backbone --unfreeze 1:layer4 --unfreeze 2:layer3 --unfreeze 3:all",
    "everything, backbone at a tenth of the rate": "--weights {weights}",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="with train/, val/ and test/")
    parser.add_argument("--weights", default="DEFAULT", metavar="W", help="as in train_classifier.py (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (default %(default)s)")
    parser.add_argument("--runs", default="runs/strategies", metavar="DIR", help="run folders; replaced (default %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="OPTIONS",
                        help="instead of the four strategies: a row for each of these options of train_classifier.py")
    args, more = parser.parse_known_args(argv)  # more: options for every run, such as --image-size 64

    strategies = {r: "--weights {weights} " + ("" if r == "default" else r) for r in args.rows or ()} or STRATEGIES
    found = {name: [] for name in strategies}
    for seed in range(args.seeds):
        for number, (name, options) in enumerate(strategies.items()):
            output = Path(args.runs, f"{number}_{seed}")
            shutil.rmtree(output, ignore_errors=True)
            options = options.format(weights=shlex.quote(args.weights))
            command = ["train_classifier.py", "--data", args.data, *shlex.split(options), *more, "--seed", str(seed)]
            started = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--output", str(output)], check=True,
                           stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            with open(output / "test_predictions.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            accuracy = sum(row["truth"] == row["prediction"] for row in rows) / len(rows)
            found[name].append((accuracy, seconds))
            print(f"{accuracy:.3f}  {seconds:5.1f} s  python {shlex.join(command)}", flush=True)

    machine = checkpoint.machine()
    print(f"\n{args.seeds} seeds, {len(rows)} test pictures; {machine['cpu']}, {machine['threads']} threads; torch "
          f"{machine['torch']}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
          f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}\n")
    print("| strategy | test accuracy, mean | lowest to highest | seconds, median |\n|---|---|---|---|")
    for name, results in found.items():
        accuracies, seconds = zip(*results, strict=True)
        print(f"| {name} | {statistics.mean(accuracies):.3f} | {min(accuracies):.3f} to {max(accuracies):.3f} | "
              f"{statistics.median(seconds):.0f} |")


if __name__ == "__main__":
    main()
