"""How much is forgotten, and how well the new is learned: every method of train_continual.py, as a table and a picture.

    python benchmarks/forgetting.py --old ./cats_and_dogs --new ./thumbnails --weights resnet18-cifar8-64px.pth
    python benchmarks/forgetting.py ... --seeds 1 --rows "--method ewc --ewc 10" "--method ewc --ewc 1000"    # to choose from

For each seed, train_classifier.py learns the old pictures (everything trained, its defaults but for --first), then every
method goes on from there on the new ones, with the same settings but for the options of its row; options that are not listed
below, such as --epochs 5, are for all of them. Both folders hold train/ and test/ (and val/).
best.pt is chosen by `mean_accuracy` on the two validation splits; the scores are those of the two test splits. Settings of
a method belong to be chosen by the validation column. Each run is printed; runs that are there already are not repeated.
"""

import argparse
import contextlib
import csv
import io
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import predict  # noqa: E402
import report  # noqa: E402
import train_classifier  # noqa: E402
import train_continual  # noqa: E402

ROWS = {
    "plain fine-tuning": "",
    "BatchNorms frozen": "--method freeze --freeze bn",
    "EWC": "--method ewc --ewc 10000",
    "L2-SP": "--method l2-sp --l2-sp 1",
    "replay, a quarter of each batch": "--method replay --replay-fraction 0.25",
    "EWC, BatchNorms frozen": "--method freeze+ewc --freeze bn --ewc 10000",
    "head alone": "--method freeze",
    "a tenth of the rate": "--lr 3e-4",
}


def quietly(main, words):
    """Run a script's main in this process; its output is shown if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{said.getvalue()}\nfailed: {shlex.join(map(str, words))}")


def accuracy(file):
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    return sum(row.get("truth") == row["prediction"] for row in rows) / len(rows)  # no truth: an unknown class


def draw(found, file):
    """New against old accuracy: the mean over the seeds of each row, lines from the lowest to the highest."""
    figure = report.new_figure(9, 6.2, layout="constrained")
    axes = report.plain_panel(figure, (1, 1, 1), "what is kept, what is gained", "accuracy on the old pictures (test)",
                              "accuracy on the new pictures (test)")
    for number, (name, results) in enumerate(found.items()):
        old, new, *_ = zip(*results, strict=True)
        x, y = statistics.mean(old), statistics.mean(new)
        spread = [[[m - min(v)], [max(v) - m]] for m, v in ((x, old), (y, new))]
        marker = "*" if number == 0 else "osD^vP"[number % 6]
        axes.errorbar(x, y, spread[1], spread[0], marker=marker, markersize=15 if number == 0 else 9, mfc="none", mew=2,
                      linestyle="", color="black" if number == 0 else f"C{(number - 1) % 10}", elinewidth=0.8,
                      label=report.label(name, 60))
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, metavar="DIR")
    parser.add_argument("--new", required=True, metavar="DIR")
    parser.add_argument("--weights", default="DEFAULT", metavar="W", help="of the first training (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, metavar="N", help="(default %(default)s)")
    parser.add_argument("--first", default="", metavar="OPTIONS", help="further options of the first training")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (default %(default)s)")
    parser.add_argument("--runs", default="runs/forgetting", metavar="DIR", help="run folders (default %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="OPTIONS", help="instead of the methods: options of train_continual.py")
    parser.add_argument("--out", default="forgetting.png", metavar="FILE", help="the picture (default %(default)s)")
    args, more = parser.parse_known_args(argv)
    rows = {row: row for row in args.rows} if args.rows else ROWS
    shared = ["--workers", 1, "--no-report", *more]

    found = {"before": [], **{name: [] for name in rows}}
    for seed in range(args.seeds):
        first = Path(args.runs, f"old_{seed}")
        if not (first / "test_predictions.csv").exists():
            words = ["--data", args.old, "--weights", args.weights, "--image-size", args.image_size, "--seed", seed,
                     *shlex.split(args.first), "--workers", 1, "--no-report", "--output", first, "--resume"]
            print(f"python train_classifier.py {shlex.join(map(str, words))}", flush=True)
            quietly(train_classifier.main, words)
        if not (first / "new.csv").exists():
            words = ["--checkpoint", first / "best.pt", Path(args.new, "test"), "--csv", first / "new.csv", "-j", 0]
            quietly(predict.main, words)
        found["before"].append((accuracy(first / "test_predictions.csv"), accuracy(first / "new.csv"), float("nan"), 0.0))
        for name, options in rows.items():
            output = Path(args.runs, f"{options.replace('--', '').replace(' ', '_') or 'plain'}_{seed}")
            words = ["--from", first / "best.pt", "--old-data", args.old, "--data", args.new, *shared, *shlex.split(options),
                     "--seed", seed, "--output", output]
            if not (output / "old_test_predictions.csv").exists():
                started = time.perf_counter()
                quietly(train_continual.main, [*words, "--resume"])
                (output / "seconds.txt").write_text(f"{time.perf_counter() - started}")
                for file in output.glob("*.pt"):  # all of them, with anchors and Fisher information, would take 20 GB
                    file.unlink()
            history = report.read_history(output)
            validation = max(row["mean_accuracy"] for row in history)
            scores = accuracy(output / "old_test_predictions.csv"), accuracy(output / "test_predictions.csv")
            found[name].append((*scores, validation, float((output / "seconds.txt").read_text())))
            print("old {:.3f}  new {:.3f}  validation {:.3f}  {:5.1f} s".format(*found[name][-1]),
                  f" python train_continual.py {shlex.join(map(str, words))}", flush=True)

    machine = checkpoint.machine()
    print(f"\n{args.seeds} seeds; {machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}"
          f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}\n")
    print("| | old, test | lowest to highest | new, test | lowest to highest | mean of both, validation | seconds, median |")
    print("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        old, new, validation, seconds = zip(*results, strict=True)
        cells = [f"{statistics.mean(v):.3f} | {min(v):.3f} to {max(v):.3f}" for v in (old, new)]
        words = f"{name}, `{rows[name]}`" if rows.get(name) and not args.rows else name
        last = f"{statistics.mean(validation):.3f} | {statistics.median(seconds):.0f}" if name != "before" else "|"
        print(f"| {words} | {' | '.join(cells)} | {last} |")
    draw(found, args.out)


if __name__ == "__main__":
    main()
