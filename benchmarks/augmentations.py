"""What the network sees: a sheet with a row for each level of augmentation, one for MixUp and one for CutMix.

    python demo.py --draw ./cats_and_dogs
    python benchmarks/augmentations.py --data ./cats_and_dogs --out benchmarks/augmentations.png

Shows the first training picture of the first two classes in several epochs, made by the functions that the training
uses, at seed 0. MixUp and CutMix, at alpha 1, mix the two pictures of level "none"; below each view stands its share of
its own class, and what is missing to 1 is the share of the other.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

SIDE = 88  # pixels of a view
EPOCHS = 4
LEFT, TOP, GAP, BELOW = 196, 60, 6, 22  # pixels: for the names of the rows, of the columns, between views, for shares
ROWS = {
    "none": "centre crop",
    "light": "crop of 80 to 100 %,\nflip",
    "standard": "crop of 35 to 100 %,\nflip",
    "strong": "standard, then\nTrivialAugmentWide,\nRandomErasing",
    "MixUp": "weighted mean\nof two pictures",
    "CutMix": "rectangle of the\nother picture",
}


def views(samples, level):
    """[(x, y), ...]: for each epoch a batch with one view of every sample, as the training gets it."""
    listed = data.ImageList(samples, data.train_transform(SIDE, level), seed=0, size=2 * SIDE)
    order = data.SeededBatches(len(samples), len(samples))
    loader = data.make_loader(listed, order)
    found = []
    for order.epoch in range(EPOCHS):
        found += data.batches(loader)
    return found


def mixed_views(samples, mixer):
    """The same, mixed: [(x, shares), ...]."""
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    found = []
    for epoch, (x, y) in enumerate(views(samples, "none")):
        x, shares = data.mix(data.to_input(x, mean, std), y, mixer, 0, epoch, 0)
        found.append(((x * std + mean).mul(255).round().clip(0, 255).to(torch.uint8), shares))
    return found


def draw_sheet(images, out):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into memory: needs no display
    from matplotlib.figure import Figure

    first = {label: (path, label) for path, label in reversed(images.splits["train"])}
    samples, names = [first[0], first[1]], images.classes[:2]
    rows = {level: views(samples, level) for level in data.AUGMENT}
    rows["MixUp"] = mixed_views(samples, data.mixer(len(images.classes), mixup=1.0))
    rows["CutMix"] = mixed_views(samples, data.mixer(len(images.classes), cutmix=1.0))

    def corner(row, sample, epoch):
        """x and y of a view's upper left corner in pixels. The views of one picture stand together."""
        x = LEFT + (sample * EPOCHS + epoch) * (SIDE + GAP) + sample * 2 * GAP
        return x, TOP + row * (SIDE + GAP) + max(0, row - len(data.AUGMENT)) * BELOW

    width, height = corner(len(rows), len(samples) - 1, EPOCHS)
    sheet = torch.full((height, width, 3), 255, dtype=torch.uint8)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    def write(x, y, text, pixels, **options):
        figure.text(x / width, 1 - y / height, text, size=pixels * 72 / 100, va="center", **options)

    for sample, name in enumerate(names):
        write(corner(0, sample, EPOCHS / 2)[0] - GAP / 2, 16, name, 21, ha="center", weight="bold")
        for epoch in range(EPOCHS):
            write(corner(0, sample, epoch)[0] + SIDE / 2, 44, f"epoch {epoch}", 16, ha="center", color="0.3")
    for row, (name, found) in enumerate(rows.items()):
        middle = corner(row, 0, 0)[1] + SIDE / 2
        lines = 1 + ROWS[name].count("\n")
        write(GAP, middle - 10 * lines, name, 21, weight="bold")
        write(GAP, middle + 13, ROWS[name], 16, color="0.3")
        for epoch, (x, y) in enumerate(found):
            for sample, picture in enumerate(x):
                left, top = corner(row, sample, epoch)
                sheet[top : top + SIDE, left : left + SIDE] = picture.permute(1, 2, 0)
                if y.ndim == 2:
                    share = f"{names[sample][:8]} {y[sample, sample]:.2f}"
                    write(left + SIDE / 2, top + SIDE + BELOW / 2, share, 15, ha="center", color="0.3")
    figure.figimage(sheet.numpy())  # pixel for pixel
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(out, format="PNG", optimize=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder that train_classifier.py can train on")
    parser.add_argument("--out", default="augmentations.png", metavar="FILE", help="a PNG (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        draw_sheet(data.find_images(args.data), args.out)
    except data.DataError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {args.out}: {error.strerror}")
    print(f"drew {args.out}")


if __name__ == "__main__":
    main()
