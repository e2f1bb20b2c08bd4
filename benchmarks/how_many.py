"""How many photographs does a class need? The head of a pretrained network beside training from scratch, as a table and
a picture.

    python benchmarks/how_many.py --data ./cats_and_dogs --model resnet18 --counts 10,30,100,300 --out docs/how_many.png

For each count and seed a folder of links is made, with so many of the training photographs per class, chosen by the
seed, and with all of val/ and test/. train_classifier.py runs on it as a user would run it: ten epochs of the head on
cached features, and from scratch with the default settings. The score is the test accuracy of best.pt. Each command is
printed, with what it got.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from strategies import accuracy_of, on_what, run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

WAYS = {
    "head only": "--weights {weights} --freeze backbone --cache-features 1 --epochs 10",
    "from scratch": "--weights none",
}


def link_some(images, count, seed, folder):
    """A folder of links to `count` training pictures of each class, and to all others."""
    chosen = data.balanced(images.splits["train"], count * len(images.classes), seed)
    for split, samples in (images.splits | {"train": chosen}).items():
        for number, (path, label) in enumerate(samples):
            target = Path(folder, split, images.classes[label], Path(path).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_symlink():  # files of one name may lie in two folders
                target = target.with_name(f"{number}_{target.name}")
            target.symlink_to(os.path.abspath(path))


def draw(found, counts, pictures, about, out):
    """found: {(way, count): [accuracy of each seed]}."""
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4.0), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for way, colour in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
        means = [statistics.mean(found[way, count]) for count in counts]
        axes.plot(counts, means, "o-", color=colour, label=way)
        axes.fill_between(counts, [min(found[way, c]) for c in counts], [max(found[way, c]) for c in counts],
                          color=colour, alpha=0.2, linewidth=0)
        for count, mean in zip(counts, means, strict=True):
            axes.annotate(f"{mean:.2f}", (count, mean), (0, 7), textcoords="offset points", ha="center", color=colour)
    axes.set(xscale="log", xlabel="training photographs per class", ylabel=f"accuracy on {pictures} test photographs",
             ylim=(0.4, 1.06), title=about)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.text(counts[0], 0.51, "guessing", color="grey", ha="center")
    axes.legend(loc="center right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="with train/, val/ and test/")
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="(default %(default)s)")
    parser.add_argument("--weights", default="DEFAULT", metavar="W",
                        help="as in train_classifier.py (default %(default)s)")
    parser.add_argument("--counts", default="10,30,100,300", metavar="N,...", help="per class (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0..N-1 (default %(default)s)")
    parser.add_argument("--scratch-seeds", type=int, default=1, metavar="N", help="from scratch (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="a picture, .png")
    args, more = parser.parse_known_args(argv)  # more: options for every run, such as --image-size 64
    counts = [int(count) for count in args.counts.split(",")]
    images, found = data.find_images(args.data), {}
    if max(counts) > (fewest := min(data.counts(images, "train"))):
        parser.error(f"--counts {max(counts)}: of one class there are {fewest} training photographs only")
    with tempfile.TemporaryDirectory(prefix="how-many-") as temporary:
        for seed in range(max(args.seeds, args.scratch_seeds)):
            for count in counts:
                folder = Path(temporary, f"{count}_{seed}")
                link_some(images, count, seed, folder)
                for way, seeds in (("head only", args.seeds), ("from scratch", args.scratch_seeds)):
                    if seed >= seeds:
                        continue
                    options = shlex.split(WAYS[way].format(weights=shlex.quote(args.weights)))
                    command = ["train_classifier.py", "--data", str(folder), "--model", args.model, *options, *more,
                               "--no-report", "--seed", str(seed)]
                    rows, seconds = run(command, Path(temporary, "run"))
                    (accuracy,) = accuracy_of(rows)
                    found.setdefault((way, count), []).append(accuracy)
                    print(f"{count} per class: {accuracy:.6g}  {seconds:5.1f} s  python {shlex.join(command)}",
                          flush=True)
    print(on_what(args.seeds, len(rows)))
    print(f"| training photographs per class | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}")
    for way in WAYS:
        cells = [f"{statistics.mean(v):.3f}" + (f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "")
                 for v in (found[way, count] for count in counts)]
        print(f"| {way} | {' | '.join(cells)} |")
    if args.out:
        draw(found, counts, len(rows), args.model, args.out)


if __name__ == "__main__":
    main()
