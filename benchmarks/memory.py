"""Does train_classifier.py's memory grow with the pictures that are listed, or from epoch to epoch? (Linux)

    python benchmarks/memory.py                              # 1,000 and 100,000 listed pictures, about five minutes

Draws a few small pictures, gives them many names by hard links, trains a small network on them, and looks at the memory that
the script and its workers hold together (proportional set size: a page that n processes share counts as an nth) after each
fifth of the training.
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
    """Proportional set size of the process and of its children together, and the number of those."""

    def of(process):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)

    children = Path(f"/proc/{pid}/task/{pid}/children")
    children = children.read_text().split() if children.exists() else []
    return of(pid) + sum(map(of, children)), len(children)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", default="1000,100000", metavar="N,N", help="(default %(default)s)")
    parser.add_argument("--pictures", type=int, default=100_000, metavar="N", help="seen in all (default %(default)s)")
    args = parser.parse_args(argv)
    print("| listed | epochs | MB after 1/5 | 2/5 | 3/5 | 4/5 | at the end |\n|---|---|---|---|---|---|---|")
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
        usual = statistics.mode(children for _, children in found)  # without the moments in which workers come and go
        found = [size for size, children in found if children == usual]
        fifths = [max(found[len(found) * i // 5 : len(found) * (i + 1) // 5]) for i in range(5)]
        print(f"| {listed:,} | {epochs} | {' | '.join(f'{size:.0f}' for size in fifths)} |", flush=True)


if __name__ == "__main__":
    main()
