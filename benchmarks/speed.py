"""How long does train_classifier.py take, whole commands, beside what a user would run instead on the same pictures?

    python benchmarks/speed.py --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth
    python benchmarks/speed.py ... --job head --rounds 1 --python other/bin/python     # one that has timm, fastai, lightning

--job everything: one epoch with everything trained. --job head: ten epochs of the new head alone. Ours without its final
evaluation on test/ and its report, which the others do not make; also with both. The sides (others.py) run in turn,
--rounds times; the ratios are taken within each round, since the seconds of a machine drift. Also without the
seconds that importing torch and torchvision takes, which all sides pay. Nothing else should run meanwhile.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

OURS = "train_classifier.py {data} {weights} --image-size 224 --workers {workers} --output {output}"
OTHERS = "benchmarks/others.py {side} {data} {weights} --workers {workers}"
LEAN = " --no-test --no-report"  # what the others do not do either
JOBS = {
    "everything": {"ours": OURS + LEAN + " --epochs 1", "ours with test and report": OURS + " --epochs 1"} | {
        side: OTHERS.replace("{side}", side) + " --epochs 1" for side in ("plain", "timm", "fastai", "lightning")},
    "head": {
        "ours, --cache-features 1": OURS + LEAN + " --freeze backbone --epochs 10 --cache-features 1",
        "ours, --cache-features 1, with test and report": OURS + " --freeze backbone --epochs 10 --cache-features 1",
        "ours, --cache-features 10": OURS + LEAN + " --freeze backbone --epochs 10 --cache-features 10",
        "ours, no cache": OURS + LEAN + " --freeze backbone --epochs 10",
    } | {side: OTHERS.replace("{side}", side) + " --epochs 10 --frozen" for side in ("plain", "timm", "fastai", "lightning")}
      | {"lightning by hand": OTHERS.replace("{side}", "lightning") + " --epochs 10 --frozen by-hand"},
}


def seconds_of(command, python, folder):
    """Run a command of the repository; the seconds that it took. Ends the program if it fails."""
    started = time.perf_counter()
    done = subprocess.run([python, *command], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="train/ and val/")
    parser.add_argument("--weights", required=True, metavar="FILE", help="of a ResNet-18")
    parser.add_argument("--job", choices=list(JOBS), default="everything", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--sides", metavar="A,B", help="these alone (default: all; the first is ours)")
    parser.add_argument("--python", default=sys.executable, help="the Python of the other sides (default: this one)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    args = parser.parse_args(argv)

    sides = {k: v for k, v in JOBS[args.job].items() if not args.sides or k.partition(",")[0] in args.sides.split(",")}
    ours = next(iter(sides), None)
    if ours not in ("ours", "ours, --cache-features 1"):
        parser.error(f"--sides are names of {', '.join(JOBS[args.job])}, up to a comma; ours is among them")
    args.python = os.path.abspath(shutil.which(args.python) or args.python)  # the sides run in the folder of the repository
    temporary = tempfile.TemporaryDirectory(prefix="speed-")
    output = Path(temporary.name, "run")
    fill = {"{data}": ["--data", os.path.abspath(args.data)], "{weights}": ["--weights", os.path.abspath(args.weights)],
            "{workers}": [str(args.workers)], "{output}": [str(output)]}
    found, start_up = {side: [] for side in sides}, []
    for number in range(args.rounds):
        start_up.append(seconds_of(["-c", "import torch, torchvision"], sys.executable, output))
        for side, command in sides.items():
            words = [word for part in command.split() for word in fill.get(part, [part])]
            python = sys.executable if side.startswith("ours") else args.python
            found[side].append(seconds_of(words, python, output))
            print(f"round {number + 1}: {side}, {found[side][-1]:.1f} s", file=sys.stderr, flush=True)

    machine = checkpoint.machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, {args.workers} workers, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}; importing torch and torchvision takes "
          f"{statistics.median(start_up):.1f} s\n")
    print(f"| {args.job} | seconds, median | lowest to highest | times ours | without start-up |\n|---|---|---|---|---|")
    for side, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found[ours], strict=True))
        net = statistics.median((a - s) / (b - s) for a, b, s in zip(seconds, found[ours], start_up, strict=True))
        print(f"| {side} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {ratio:.2f} | "
              f"{net:.2f} |")


if __name__ == "__main__":
    main()
