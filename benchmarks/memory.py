"""Does train_classifier.py's memory grow with the pictures that are listed, or from epoch to epoch? (Linux)

    python benchmarks/memory.py                              # 1,000 and 100,000 listed pictures, about eight minutes

Draws a few small pictures, gives them many names by hard links, trains a small network on them, and looks at the most memory
held in each fifth of the training: by the script alone (anonymous pages), and by it and its workers together (proportional set
size: a page that n processes share counts as an nth). The workers start as copies of the script that share its pages until
somebody writes to them, so the sum rises for some minutes, up to a limit.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def draw(folder, listed):
    """`listed` names of sixteen pictures, in two classes; a hundred more for the validation."""
    for split, count in (("train", listed), ("val", 100)):
        for label, name in enumerate(("cat", "dog")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count // 2):
                target = place / f"a_picture_with_a_name_of_usual_length_{i:06}.png"
                if i < 8:
                    Image.new("RGB", (32, 32), (i * 30, 200 * label, 90)).save(target)
                else:
                    os.link(place / f"a_picture_with_a_name_of_usual_length_{i % 8:06}.png", target)


def megabytes(pid):
    """Anonymous pages of the process, proportional set size of it and its children together, and the number of those."""

    def of(process, what):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{what}:")), 0)

    children = Path(f"/proc/{pid}/task/{pid}/children")
    children = children.read_text().split() if children.exists() else []
    return of(pid, "Anonymous"), sum(of(process, "Pss") for process in [pid, *children]), len(children)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", default="1000,100000", metavar="N,N", help="(default %(default)s)")
    parser.add_argument("--pictures", type=int, default=300_000, metavar="N", help="seen in all (default %(default)s)")
    args = parser.parse_args(argv)
    print("| listed | epochs | MB held by | first fifth | second | third | fourth | last |\n|---|---|---|---|---|---|---|---|")
    for listed in map(int, args.listed.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder, "data"), listed)
            epochs, run = max(1, args.pictures // listed), Path(folder, "run")
            words = [sys.executable, str(ROOT / "train_classifier.py"), "--data", f"{folder}/data", "--model",
                     "shufflenet_v2_x0_5", "--weights", "none", "--image-size", "32", "--epochs", str(epochs), "--amp", "off",
                     "--batch-size", "250", "--workers", "2", "--save-every", "20", "--no-report", "--output", str(run)]
            process, found = subprocess.Popen(words, stdout=subprocess.DEVNULL), []
            while process.poll() is None:
                if (run / "last.pt").exists():  # training has begun
                    found.append(megabytes(process.pid))
                time.sleep(0.5)
            if process.returncode:
                sys.exit(f"{' '.join(words)} failed")
            with open(run / "history.csv", newline="") as file:
                assert len(list(csv.DictReader(file))) == epochs
        usual = statistics.mode(children for *_, children in found)  # without the moments in which workers come and go
        found = [sizes for *sizes, children in found if children == usual]
        for name, sizes in zip(("the script", "with its workers"), zip(*found, strict=True), strict=True):
            fifths = [max(sizes[len(sizes) * i // 5 : len(sizes) * (i + 1) // 5]) for i in range(5)]
            print(f"| {listed:,} | {epochs} | {name} | {' | '.join(f'{size:.0f}' for size in fifths)} |", flush=True)


if __name__ == "__main__":
    main()
