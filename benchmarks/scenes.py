"""Draw scenes whose labels are known, to try train_multilabel.py on.

    python benchmarks/scenes.py --draw ./scenes       # labels.csv with columns of 0 and 1, tags.csv with one of names
    python train_multilabel.py --data ./scenes --target disc,bar,ring,star --weights none --image-size 48 --lr 0.003

On a ground of any colour lie shapes of any colour and place, each kind present or not, whatever the others are: discs
and bars in every second picture, rings in every seventh, stars in one of 20. A tenth of the cells of labels.csv are
empty: it is not known whether the shape is there. The same pictures on every run.
"""

import argparse
import csv
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SHARES = {"disc": 0.5, "bar": 0.5, "ring": 0.15, "star": 0.05}
COUNTS = {"train": 1500, "val": 300, "test": 500}
UNKNOWN = 0.1
SIDE = 96


def draw_scene(kinds, rng):
    """A PIL picture with one shape of each of the kinds; rng: a `random.Random`."""

    def color(low, high):
        return tuple(rng.randint(low, high) for _ in range(3))

    picture = Image.new("RGB", (SIDE, SIDE), color(0, 110))
    pen = ImageDraw.Draw(picture)
    # A place for each, so that none covers another, and none in the margin, which a crop may cut off.
    places = rng.sample([(x, y) for x in (30, 66) for y in (30, 66)], len(kinds))
    for kind, place in zip(kinds, places, strict=True):
        x, y = (middle + rng.uniform(-4, 4) for middle in place)
        r, fill, turn = rng.uniform(9, 14), color(130, 255), rng.uniform(0, math.pi)
        if kind == "disc":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=4)
        elif kind == "bar":
            dx, dy = r * math.cos(turn), r * math.sin(turn)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=6)
        else:
            points = [(x + s * math.cos(a), y + s * math.sin(a))
                      for a, s in ((turn + i * math.pi / 5, r if i % 2 else 0.4 * r) for i in range(10))]
            pen.polygon(points, fill=fill)
    return picture


def draw_folder(folder, counts):
    """Draw folder/<split>/<number>.png and write labels.csv and tags.csv there."""
    rows = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = random.Random(f"{split} {i}")
            there = {kind: rng.random() < share for kind, share in SHARES.items()}
            draw_scene([kind for kind, yes in there.items() if yes], rng).save(folder / split / f"{i}.png")
            cells = {kind: "" if rng.random() < UNKNOWN else int(yes) for kind, yes in there.items()}
            tags = " ".join(kind for kind, yes in there.items() if yes)
            rows.append({"file": f"{split}/{i}.png", **cells, "tags": tags, "split": split})
    for name, left_out in (("labels.csv", {"tags"}), ("tags.csv", set(SHARES))):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            columns = [column for column in rows[0] if column not in left_out]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", required=True, metavar="DIR", help="a new folder")
    folder = Path(parser.parse_args(argv).draw)
    if folder.exists():
        parser.error(f"{folder} exists: name a new folder")
    draw_folder(folder, COUNTS)
    print(f"{sum(COUNTS.values())} pictures, labels.csv and tags.csv are in {folder}")


if __name__ == "__main__":
    main()
