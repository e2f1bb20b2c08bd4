"""How much slower is training beside another program that keeps one core busy, with and without spinning threads?

    python benchmarks/beside.py                              # draws its pictures; 20 to 40 minutes on two cores

The threads of OpenMP, which torch computes with on a CPU, wait for each other after every operation. GNU's OpenMP lets
them spin for some milliseconds first; the scripts ask for the passive policy, without spinning. "spinning" is what it
does unasked: GOMP_SPINCOUNT=300000. Each row is a run of train_classifier.py (ResNet-18, random weights), alone and
beside a process that does nothing but count. Seconds per epoch, from history.csv: the median of all epochs but the
first, over --rounds rounds in which the sides run in turn. Nothing else should run meanwhile. (Linux)
"""

import argparse
import contextlib
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

JOBS = {
    "everything, 64 px": "--image-size 64 --epochs 4",
    "everything, 224 px": "--image-size 224 --epochs 3",
    "cached head, 64 px": "--image-size 64 --epochs 10 --freeze backbone --cache-features 1",
    "cached head, 224 px": "--image-size 224 --epochs 10 --freeze backbone --cache-features 1",
}
POLICIES = {"passive": {"OMP_WAIT_POLICY": "passive"}, "spinning": {"GOMP_SPINCOUNT": "300000"}}


@contextlib.contextmanager
def one_core_busy(busy):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def seconds_of_epochs(options, environment, folder, data):
    """Those of a run, in order."""
    command = ["train_classifier.py", "--data", data, "--weights", "none", "--no-test", "--no-report"]
    done = subprocess.run([sys.executable, *command, "--output", folder, *options.split()], cwd=ROOT,
                          env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    with open(Path(folder, "history.csv"), newline="") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="train/ and val/ (default: the 300 pictures of demo.py --draw)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--jobs", default=",".join(f"{i}" for i in range(len(JOBS))), metavar="N,N",
                        help="which of them, by number (default: all)")
    args = parser.parse_args(argv)
    jobs = [list(JOBS)[int(number)] for number in args.jobs.split(",")]
    found = {}
    with tempfile.TemporaryDirectory(prefix="beside-") as temporary:
        data = args.data and os.path.abspath(args.data)
        if not data:
            data = str(Path(temporary, "pictures"))
            subprocess.run([sys.executable, "demo.py", "--draw", data], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for number in range(args.rounds):
            for job in jobs:
                for busy in (False, True):
                    for policy, environment in POLICIES.items():
                        folder = str(Path(temporary, f"{number} {job} {busy} {policy}"))
                        with one_core_busy(busy):
                            first, *others = seconds_of_epochs(JOBS[job], environment, folder, data)
                        seconds = statistics.median(others)
                        found.setdefault((job, busy, policy), []).append((first, seconds))
                        print(f"round {number + 1}: {job}, {'beside' if busy else 'alone'}, {policy}: first epoch "
                              f"{first:.2f} s, then {seconds:.3f} s", file=sys.stderr, flush=True)

    machine = checkpoint.machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}; {args.rounds} rounds\n")
    print("| seconds per epoch, median (lowest to highest) | passive, alone | spinning, alone | passive, beside | "
          "spinning, beside |")
    print("|---|---|---|---|---|")
    for job in jobs:
        # Of a cached head the first epoch, too: it holds the pictures' one way through the backbone.
        for place, name in enumerate(["first epoch", "epochs after the first"]):
            if place == 0 and not job.startswith("cached"):
                continue
            cells = []
            for busy in (False, True):
                for policy in POLICIES:
                    values = [pair[place] for pair in found[job, busy, policy]]
                    cells.append(f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")
            print(f"| {job}, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
