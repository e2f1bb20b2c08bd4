"""Draw a small folder of cats and dogs, so that there is something to train on before you have pictures of your own.

    python demo.py ./cats_and_dogs
    python train_classifier.py --data ./cats_and_dogs --weights none --image-size 64 --epochs 8 --lr 0.001

Writes train/, val/ and test/ with a folder per class: drawn faces of 96 x 96 pixels in any colour, place, size and
tilt. A cat has pointed ears and whiskers, a dog hanging ears and a tongue. The same pictures on every run.
"""

import argparse
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIDE = 96  # pixels
PER_CLASS = {"train": 100, "val": 25, "test": 25}


def draw_face(kind, rng):
    """One PIL picture of a `cat` or a `dog`; rng: a `random.Random`."""

    def color(low, high):
        return tuple(rng.randint(low, high) for _ in range(3))

    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), color(90, 255))  # drawn twice as large, then smoothed
    draw = ImageDraw.Draw(picture)
    for _ in range(6):  # something in the background
        x, y, r = rng.randrange(2 * SIDE), rng.randrange(2 * SIDE), rng.randint(5, 40)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color(60, 255))

    radius = rng.uniform(34, 52)
    cx, cy = (SIDE + rng.uniform(-0.5, 0.5) * SIDE * 0.5 for _ in range(2))
    tilt = rng.uniform(-0.4, 0.4)
    fur, dark = color(70, 220), color(0, 60)

    def at(x, y):
        """A point given in head radii from the centre of the face, tilted."""
        return (cx + radius * (x * math.cos(tilt) - y * math.sin(tilt)),
                cy + radius * (x * math.sin(tilt) + y * math.cos(tilt)))

    def blob(x, y, rx, ry, fill):
        ring = (2 * math.pi * k / 24 for k in range(24))
        draw.polygon([at(x + rx * math.cos(t), y + ry * math.sin(t)) for t in ring], fill=fill)

    inner = tuple(min(255, c + 40) for c in fur)
    for side in (-1, 1):
        if kind == "cat":
            draw.polygon([at(side * 0.2, -0.8), at(side * 0.9, -0.35), at(side * 0.85, -1.45)], fill=fur)
    blob(0, 0, 1, 0.9, fur)
    for side in (-1, 1):
        if kind == "dog":
            blob(side * 0.95, 0.1, 0.3, 0.75, inner)
        blob(side * 0.38, -0.15, 0.15, 0.18, (250, 250, 240))
        blob(side * 0.38, -0.15, 0.07, 0.14, dark)
        if kind == "cat":
            for y in (0.25, 0.38, 0.5):
                draw.line([at(side * 0.2, 0.38), at(side * 1.1, y)], fill=dark, width=2)
    if kind == "dog":
        blob(0, 0.75, 0.17, 0.32, (230, 90, 110))
    blob(0, 0.3, 0.14, 0.1, dark)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5))).resize((SIDE, SIDE), Image.BILINEAR)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("folder", metavar="DIR", help="where to draw; an empty or new folder, or an earlier drawing")
    folder = Path(parser.parse_args(argv).folder)
    marker = folder / "DRAWN_BY_DEMO.txt"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not marker.exists())):
        parser.error(f"{folder} holds something else: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("Drawn by demo.py; may be deleted.\n")
        for split, count in PER_CLASS.items():
            for kind in ("cat", "dog"):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    face = draw_face(kind, random.Random(f"{split} {kind} {i}"))
                    face.save(folder / split / kind / f"{kind}.{i}.jpg", quality=90)
    except OSError as error:
        parser.error(f"cannot draw into {folder}: {error}")
    print(f"drew {2 * sum(PER_CLASS.values())} pictures into {folder}; next: "
          f"python train_classifier.py --data {folder} --weights none --image-size 64 --epochs 8 --lr 0.001")


if __name__ == "__main__":
    sys.exit(main())
