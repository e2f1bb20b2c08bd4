"""Pictures from folders: find and split them, decode, augment, order and batch them, the same on every run.

    images = find_images("./cats_and_dogs", val_split=0.2)      # .classes, .splits["train"] = [(path, label), ...]
    dataset = ImageList(images.splits["train"], train_transform(224), seed=0)
    order = SeededBatches(len(dataset), batch_size=32, seed=0, shuffle=True)
    loader = make_loader(dataset, order, workers=2)
    order.set_epoch(3)                                          # before each epoch: another order and augmentation
    for x, y in batches(loader):                                # uint8 (N, 3, H, W) and int64 (N,)
        x = to_input(x, mean, std)                              # float32, normalized, channels_last; then maybe `mix`
    for group, pictures in steps(loader, order, accumulate=4):  # or: the batches of one optimizer step at a time

    python data.py --check ./cats_and_dogs                      # look at every picture before a long run

Every random choice is drawn from (seed, epoch, index of the image or batch), so neither the number of workers nor an
interruption changes what the network sees. This file needs torch, torchvision and what torchvision brings (PIL, NumPy).
"""

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import shlex
import signal
import threading
import time
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


class DataError(Exception):
    """Pictures or folders that cannot be used. The message is one line that names the way out."""


# ---- finding and splitting

Images = namedtuple("Images", "classes splits ignored notes", defaults=[()])
Images.__doc__ = """classes: sorted names. splits: {"train", "val", maybe "test": [(path, label), ...]}.
ignored: a Counter of what was passed over, by file extension or folder name. notes: further lines for a person."""

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_images(root, val_split=0.2, least=2):
    """List the pictures below `root`, which holds either train/ (and val/ or valid/, and test/), each with one folder
    per class, or the class folders themselves.

    Without a val/ folder, a share `val_split` of each class is set aside, chosen by a hash of the file's name: the same
    pictures on every run and machine, and few of them change sides when pictures are added.
    least: classes that there must be. Raises DataError.
    """
    root = Path(root)
    if not os.path.isdir(root):
        raise DataError(f"no such folder: {root}" if not os.path.exists(root) else f"{root} is a file, not a folder")
    ignored = Counter()
    folders = {"train": root}
    split_names = {*(name for names in SPLITS.values() for name in names), "training", "testing"}
    names = {path.name for path in _folders_in(root)}
    if "train" in names:
        folders = {split: root / name for split, known in SPLITS.items() for name in known if name in names}
        others = names - {folder.name for folder in folders.values()}
        ignored.update(f"{name}/" for name in others if not name.startswith("."))
    elif misnamed := sorted(name for name in names if name.lower() in split_names):
        raise DataError(f"{root} holds {_some(misnamed)} but no train/: name the folders train, val and test")
    found = {split: _classes_in(folder, ignored) for split, folder in folders.items()}
    classes = list(found["train"])
    for split, folder in folders.items():
        if list(found[split]) != classes:
            only = sorted(set(classes) ^ set(found[split]))
            raise DataError(f"train/ and {folder.name}/ in {root} have different classes: {_some(only)} "
                            "in one of them only")
    if len(classes) < least:
        raise DataError(f"{folders['train']} holds one class only ('{classes[0]}'): a classifier needs two folders "
                        "or more, one for each class")
    if "val" not in found:
        halves = {name: split_by_hash(paths, val_split, root) for name, paths in found["train"].items()}
        found["train"] = {name: train for name, (train, _) in halves.items()}
        found["val"] = {name: val for name, (_, val) in halves.items()}
    splits = {
        split: [(path, label) for label, name in enumerate(classes) for path in found[split][name]]
        for split in SPLITS
        if split in found
    }
    return Images(classes, splits, ignored)


def _folders_in(folder):
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise DataError(f"cannot look into {folder} ({error.strerror})") from error


def _classes_in(folder, ignored):
    """{class name: sorted picture paths} for the folders in `folder`."""
    found = {}
    for entry in (path for path in _folders_in(folder) if not path.name.startswith(".")):
        found[entry.name] = list_folder(entry, ignored)
        if not found[entry.name]:
            raise DataError(f"class folder {entry} holds no pictures ({', '.join(e[1:] for e in EXTENSIONS)})")
    if not found:
        raise DataError(f"no class folders in {folder}: put the pictures of each class into a folder named after it")
    return found


def list_folder(folder, ignored=None):
    """Sorted paths of the pictures in a folder and all folders below it, by extension; hidden ones are left out.
    ignored: a Counter that takes the extensions of files that are no pictures.
    """
    paths, seen = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:  # a link that leads back up
            folders[:] = []
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(f for f in files if not f.startswith(".")):
            if name.lower().endswith(EXTENSIONS):
                paths.append(os.path.join(where, name))
            elif ignored is not None:
                ignored[Path(name).suffix or name] += 1
    return paths


def split_by_hash(paths, val_split, root):
    """Set a share of the paths aside, those whose name below `root` has the smallest hash: (the others, those)."""
    if len(paths) < 2:
        raise DataError(f"{Path(paths[0]).parent} holds one picture only: it cannot be split into train and val")
    count = min(max(1, round(len(paths) * val_split)), len(paths) - 1)
    below = {path: os.fsencode(Path(os.path.relpath(path, root)).as_posix()) for path in paths}
    by_hash = sorted(paths, key=lambda path: hashlib.sha256(below[path]).digest())
    chosen = set(by_hash[:count])
    return [p for p in paths if p not in chosen], [p for p in paths if p in chosen]


def counts(images, split):
    """Pictures per class in a split, in the order of `images.classes`."""
    seen = Counter(label for _, label in images.splits[split])
    return [seen[label] for label in range(len(images.classes))]


def labels(images, split):
    """The label of each picture in a split, int64 (N,): the place of its class in `images.classes`."""
    return torch.tensor([label for _, label in images.splits[split]])


def relabel(images, classes):
    """The same pictures with other labels: the places of their classes in `classes`, a list of names that holds all."""
    place = [classes.index(name) for name in images.classes]
    splits = {split: [(path, place[label]) for path, label in found] for split, found in images.splits.items()}
    return images._replace(classes=classes, splits=splits)


def balanced(samples, count, seed=0):
    """`count` of the samples [(path, label), ...] (0: all), chosen by `seed` and in their order: as many of each class,
    give or take one, unless a class has too few.
    """
    turns = []  # (of each class the first, of each class the second, ...)
    for label in sorted({label for _, label in samples}):
        places = [i for i, sample in enumerate(samples) if sample[1] == label]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(mix_seed(seed, label, 0, 0)))
        turns += [(turn, label, places[i]) for turn, i in enumerate(order.tolist())]
    chosen = sorted(turns)[: count or None]
    return [samples[i] for i in sorted(place for _, _, place in chosen)]


def describe(images, most=20, hints=True):
    """A table of pictures per class and split, with a hint (if `hints`) for imbalanced classes and a warning for pictures
    that are in the training split and in another one.
    """
    splits = list(images.splits)
    width = max(len(c) for c in [*images.classes, "class", "total"])
    columns = [counts(images, s) for s in splits]
    lines = [f"{'class':<{width}}" + "".join(f"{s:>8}" for s in splits)]
    rows = list(zip(images.classes, *columns, strict=True))
    lines += [f"{name:<{width}}" + "".join(f"{n:8d}" for n in ns) for name, *ns in rows[:most]]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more classes")
    lines.append(f"{'total':<{width}}" + "".join(f"{sum(c):8d}" for c in columns))
    few, many = min(columns[0]), max(columns[0])
    if hints and many >= 2 * few:
        lines.append(f"hint: '{images.classes[columns[0].index(many)]}' has {many / few:.1f} times as many training "
                     f"pictures as '{images.classes[columns[0].index(few)]}': consider --class-weights balanced "
                     "and --monitor val_macro_f1")
    if images.ignored:
        kinds = ", ".join(f"{n} {kind}" for kind, n in images.ignored.most_common(5))
        lines.append(f"note: passed over what is no picture or split: {kinds}")
    lines += images.notes
    return "\n".join(lines + pictures_to_know_of(images.splits))


def pictures_to_know_of(splits):
    """Lines about animated pictures, and about those that are in the training split and in another one."""
    lines = []
    if moving := animated(path for found in splits.values() for path, _ in found):
        count = f"{len(moving)} animated picture{'s' if len(moving) > 1 else ''}"
        lines.append(f"note: {count}, of which the first frame is used: {_some([Path(path).name for path in moving])}")
    same = find_duplicates(splits)
    lines += [f"warning: the same picture twice, so the scores are too good: {a} and {b}" for a, b in same[:3]]
    if len(same) > 3:
        lines.append(f"warning: ... and {len(same) - 3} more such pairs")
    return lines


def animated(paths):
    """Those of the paths that hold more than one frame. It has to open a file and looks at .gif and .webp only."""

    def frames(path):
        try:
            if str(path).lower().endswith(".webp"):  # PIL would read the whole file; a bit of its header says it too
                with open(path, "rb") as file:
                    header = file.read(21)
                return header[8:16] == b"WEBPVP8X" and bool(header[20] & 2)
            with Image.open(path) as image:
                return getattr(image, "is_animated", False)  # a JPEG under a wrong name does not know the word
        except Exception:  # decoding will name it
            return False

    return [path for path in paths if str(path).lower().endswith((".gif", ".webp")) and frames(path)]


def find_duplicates(splits):
    """[(path in train, path in val or test)] of files that are the same byte for byte. Such pictures make the scores
    look better than they are. Only files of equal size are read, and in full only where their first 4 KiB agree.
    """

    def read(path, most=-1):
        try:
            with open(path, "rb") as file:
                return hashlib.sha256(file.read(most)).digest()
        except OSError:
            return path  # like no other; decoding will name it

    def size_of(path):
        return os.path.getsize(path) if os.path.exists(path) else path

    def start_of(path):
        return read(path, 4096)

    train = list(dict.fromkeys(path for path, _ in splits["train"]))
    others = list(dict.fromkeys(path for split in ("val", "test") for path, _ in splits.get(split, [])))
    for key in (size_of, start_of, read):  # each looks only at the files that the one before has left
        of_train, of_others = ({path: key(path) for path in paths} for paths in (train, others))
        both = set(of_train.values()) & set(of_others.values())
        train, others = ([path for path, k in found.items() if k in both] for found in (of_train, of_others))
    return [(path, other) for path in train for other in others if of_train[path] == of_others[other]]


def fingerprint(images):
    """What a run learns from, in a few words: which pictures are in train and val and in which class, by file name; the
    same when the folder has moved. The test split may change, since nothing is learned from it.
    """
    names = [(s, images.classes[y], Path(p).name) for s in ("train", "val") for p, y in images.splits[s]]
    sizes = ", ".join(f"{split} {len(images.splits[split])}" for split in ("train", "val"))
    return f"{sizes}, names {hashlib.sha256(ascii(names).encode()).hexdigest()[:8]}"


def refuse_unknown(images, known, folder, who):
    """Raise DataError if there is a class that is not among the `known` ones. folder: where it is. who: knows those."""
    strange = [name for name in images.classes if name not in known]
    if strange:
        raise DataError(f"{folder} has the class '{strange[0]}', which {who} does not know: it knows {', '.join(known)}; "
                        "new classes belong into --data")


def refuse_others(fingerprint, before, folder, file, option="--weights"):
    """Raise DataError if what is in the folder is not what a run, resumed from the checkpoint `file`, has learned from
    before. fingerprint, before: of the two. option: that by which a new run starts from its weights.
    """
    if fingerprint != before:
        raise DataError(f"{folder} holds other pictures ({fingerprint}) than the run was started with ({before}): start a "
                        f"new run from its weights, {option} {shlex.quote(file)}")


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- the walk of one image: decode, augment


def decode(path, size=None):
    """Read a picture as a PIL image in mode RGB, upright.

    size: pixels that the shorter side must keep at least; a JPEG is decoded at a half, a quarter or an eighth of its
    size where that is enough (much faster for a 12-megapixel photograph). EXIF orientation is applied; 16-bit grey is
    scaled to 8 bits, not clipped; transparent parts become white; of several frames or pages the first is taken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about corners of a file that do not matter to the pixels
        with Image.open(path) as image:
            if size is not None:
                image.draft("RGB", (size, size))
            image.load()
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit integer and float grey
        values = np.array(image, dtype=np.float64)
        values[~np.isfinite(values)] = 0
        most = values.max()
        white = max(most, 65535) if image.mode.startswith("I;16") or most > 255 else 255 if most > 1 else 1
        values[values == image.info.get("transparency")] = white  # a 16-bit PNG names one transparent grey at most
        image = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


AUGMENT = ("none", "light", "standard", "strong")


def train_transform(image_size, augment="standard", interpolation="bilinear", resize_size=None):
    """Augmentation of a uint8 tensor (3, H, W) to (3, image_size, image_size), of a level in `AUGMENT`.

    "none": as `eval_transform`. "light": a random crop of 80 to 100 % of the largest centred square, nearly square, and
    a horizontal flip. "standard": a random crop of 35 to 100 % of the picture's area, 3:4 to 4:3, and the flip (Szegedy
    et al., "Going Deeper with Convolutions", 2014, with a larger smallest crop). "strong": standard, then one operation
    on colour or geometry, of random strength (Müller and Hutter, "TrivialAugment", 2021), and in one picture of four a
    black rectangle (Zhong et al., "Random Erasing Data Augmentation", 2017). Raises DataError.
    """
    if augment not in AUGMENT:
        raise DataError(f"no such augmentation: {augment}; there are {', '.join(AUGMENT)}")
    if augment == "none":
        return eval_transform(image_size, interpolation, resize_size)
    scale, ratio = ((0.8, 1.0), (0.9, 1.11)) if augment == "light" else ((0.35, 1.0), (3 / 4, 4 / 3))
    crop = v2.RandomResizedCrop(image_size, scale, ratio, InterpolationMode(interpolation), antialias=True)
    steps = [crop, v2.RandomHorizontalFlip()]
    if augment == "light":
        steps.insert(0, _centre_square)
    elif augment == "strong":
        steps += [v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), v2.RandomErasing(p=0.25)]
    return v2.Compose(steps)


def _centre_square(image):
    """Without it, no nearly square crop has 80 % of a 3:2 photograph, and RandomResizedCrop always takes the centre."""
    return v2.functional.center_crop(image, [min(image.shape[-2:])])


def eval_transform(image_size, interpolation="bilinear", resize_size=None):
    """Resize the shorter side to `resize_size` (default: image_size * 256 / 224) and cut out the centre."""
    resize = v2.Resize(
        resize_size or round(image_size * 256 / 224), interpolation=InterpolationMode(interpolation), antialias=True
    )
    return v2.Compose([_centre_part, resize, v2.CenterCrop(image_size)])


def _centre_part(image):
    """At most 8 times as long as wide: resized as it is, a picture of 1 x 600000 pixels would fill 100 GB."""
    return v2.functional.center_crop(image, [min(side, 8 * min(image.shape[-2:])) for side in image.shape[-2:]])


BadImage = namedtuple("BadImage", "path reason")


class ImageList(Dataset):
    """Pictures and labels. Asked for (epoch, index), it decodes picture `index` and augments it with random numbers
    drawn from (seed, epoch, index); a plain index means epoch 0. Returns (uint8 tensor, label), or a BadImage for a
    file that cannot be read: an exception in a worker would arrive as thirty lines of traceback.

    samples: [(path, label), ...]. transform: takes and returns a uint8 tensor (3, H, W). size: see `decode`.
    on_bad_image: what reading on does at a BadImage, see `batches`: "error" or "skip", which notes it in `skipped`,
    {file: what is wrong with it}.
    """

    def __init__(self, samples, transform, seed=0, size=None, on_bad_image="error"):
        self.samples, self.transform, self.seed, self.size = samples, transform, seed, size
        self.on_bad_image, self.skipped = on_bad_image, {}

    def __len__(self):
        return len(self.samples)

    def labels(self):
        return torch.tensor([label for _, label in self.samples])

    def numbered(self):
        """The same pictures, with their places in the list as labels."""
        samples = [(path, number) for number, (path, _) in enumerate(self.samples)]
        same = ImageList(samples, self.transform, self.seed, self.size, self.on_bad_image)
        same.skipped = self.skipped  # what has been said is not said again
        return same

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label = self.samples[index]
        try:
            image = decode(path, self.size)
        except Exception as error:  # PIL's readers raise many kinds for damaged files
            reason = str(error).partition("\n")[0].replace(f" '{path}'", "") or type(error).__name__
            return BadImage(str(path), reason)
        image = v2.functional.pil_to_tensor(image)
        # Torch's transforms draw from the global generator; fork_rng puts it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), label


# ---- order and batches


def mix_seed(*numbers):
    """One 32-bit seed from several numbers, such that close numbers give unrelated seeds."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


class SeededBatches(Sampler):
    """Batches of (epoch, index). The order is a permutation drawn from (seed, epoch): call `set_epoch` before each epoch,
    with `start` to go on in the middle of one: the batches before it are passed over, and no picture of them is read.

    A last batch of one picture is merged into the batch before it, since BatchNorm cannot train on a single value.

    Process `rank` of `processes` gets its share of each batch, which is then of batch_size * processes pictures: two
    processes of 16 see together what one of 32 sees. No share is of one picture (unless batch_size is 1), so a small
    last batch may leave some processes none; with `pad` these get some of the pictures of another's, so that all make
    the same number of steps, and `shares()` says 0.
    """

    def __init__(self, length, batch_size, seed=0, shuffle=False, epoch=0, rank=0, processes=1, pad=False):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.set_epoch(epoch)
        self.rank, self.processes, self.pad = rank, processes, pad

    def set_epoch(self, epoch, start=0):
        """Another order and other augmentation in each epoch. start: how many batches of it are passed over."""
        self.epoch, self.start = epoch, start

    def sizes(self):
        """The number of pictures in each batch, all processes together."""
        size = self.batch_size * self.processes
        full, rest = divmod(self.length, size)
        sizes = [size] * full + ([rest] if rest else [])
        if rest == 1 and full:
            sizes[-2:] = [size + 1]
        return sizes

    def steps_per_epoch(self, accumulate=1):
        """How many optimizer steps an epoch has, of so many batches each; the last one may have fewer."""
        return math.ceil(len(self.sizes()) / accumulate)

    def shares(self):
        """The number of pictures in this process's share of each batch."""
        return [end - first for first, end in map(self._share, self.sizes())]

    def once(self, epoch):
        """The batches of one epoch from its beginning, without padding."""
        return SeededBatches(self.length, self.batch_size, self.seed, self.shuffle, epoch, self.rank, self.processes)

    def _share(self, size):
        """Where this process's share of a batch begins and ends."""
        sharing = max(1, min(self.processes, size // min(2, self.batch_size)))
        return (size * self.rank // sharing, size * (self.rank + 1) // sharing) if self.rank < sharing else (0, 0)

    def __len__(self):
        return max(0, len(self.sizes()) - self.start)

    def __iter__(self):
        order = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        ends = list(itertools.accumulate(self.sizes(), initial=0))
        for first, end in itertools.pairwise(ends[self.start :]):
            begin, stop = self._share(end - first)
            if begin == stop and self.pad:
                stop = min(2, self.batch_size, end - first)
            yield [(self.epoch, index) for index in order[first + begin : first + stop]]


class ReplayBatches(Sampler):
    """As `SeededBatches`, shuffled, but in each batch a share of old pictures stands behind the new ones. An epoch is one
    pass through the `length` new pictures, which are numbered from 0; the `old` ones, from `length` on, are gone through
    again and again, each time in another order and with another augmentation. Raises DataError.
    (Rebuffi et al., "iCaRL", 2017; Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019)
    """

    def __init__(self, length, old, batch_size, share, seed=0):
        self.per_batch = round(share * batch_size)
        if share and not (0 < self.per_batch < batch_size and old):
            raise DataError(f"a share of {share} makes {self.per_batch} old pictures in a batch of {batch_size}: both "
                            "kinds need one at least; take a larger --batch-size or another --replay-fraction")
        self.new = SeededBatches(length, batch_size - self.per_batch, seed, shuffle=True)
        self.length, self.old, self.seed = length, old, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """As in `SeededBatches`."""
        self.epoch, self.start = epoch, start

    def _old_sizes(self):
        return [round(n * self.per_batch / self.new.batch_size) for n in self.new.sizes()]

    def sizes(self):
        return [n + m for n, m in zip(self.new.sizes(), self._old_sizes(), strict=True)]

    def steps_per_epoch(self, accumulate=1):
        """As in `SeededBatches`."""
        return math.ceil(len(self.sizes()) / accumulate)

    def shares(self):
        """As in `SeededBatches`; there is one process here."""
        return self.sizes()

    def __len__(self):
        return max(0, len(self.new.sizes()) - self.start)

    def __iter__(self):
        sizes = self._old_sizes()
        self.new.set_epoch(self.epoch, self.start)
        place = self.epoch * sum(sizes) + sum(sizes[: self.start])  # in the endless row of old pictures
        orders = {}
        for keys, count in zip(self.new, sizes[self.start :], strict=True):
            for turn, i in (divmod(place + k, self.old) for k in range(count)):
                if turn not in orders:
                    generator = torch.Generator().manual_seed(mix_seed(self.seed, turn, 1, 1, 1))
                    orders[turn] = torch.randperm(self.old, generator=generator).tolist()
                keys.append((turn, self.length + orders[turn][i]))
            place += count
            yield keys


def collate(items):
    """Stack the good pictures of a batch: (uint8 (N, 3, H, W), int64 (N,), [BadImage, ...])."""
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    if not good:
        return None, None, bad
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good]), bad


def make_loader(dataset, order, workers=0, pin_memory=False):
    """A DataLoader over the batches of `order` (a SeededBatches)."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_live_and_die_with_the_script,
        generator=torch.Generator(),  # else each epoch draws from the global one, and dropout depends on it
    )


def eval_loader(samples, preprocessing, batch_size, workers=0, rank=0, processes=1, on_bad_image="error"):
    """A DataLoader over the pictures of [(path, ...), ...] in their order, as they are evaluated: resized, the centre cut
    out. Beside each picture it has no label but its number, its place in that list: with on_bad_image "skip", or when
    several processes read a share each, it says which picture an output is of.

    preprocessing: a dict with image_size, resize_size, interpolation.
    """
    size = preprocessing["image_size"]
    plain = eval_transform(size, preprocessing["interpolation"], preprocessing["resize_size"])
    order = SeededBatches(len(samples), batch_size, rank=rank, processes=processes)
    numbered = [(path, number) for number, (path, *_) in enumerate(samples)]
    return make_loader(ImageList(numbered, plain, size=2 * size, on_bad_image=on_bad_image), order, workers)


def _live_and_die_with_the_script(worker_id):
    """In a worker: leave the signals that a terminal or a job queue sends to all processes at once to the script, which
    may want to finish its step; and end as soon as the script has ended, by whatever means.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Not passed over for good: multiprocessing itself ends its processes by SIGTERM, and waits for them.
    signal.signal(signal.SIGTERM, lambda *_: later(time.sleep, 5))

    def later(wait, *args):
        threading.Thread(target=lambda: (wait(*args), os._exit(1)), daemon=True).start()

    later(multiprocessing.parent_process().join)
    if hasattr(signal, "pthread_sigmask"):  # `batches` has blocked them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})


def batches(loader, at_least=0, say=print):
    """Yield (x, y) from a DataLoader over an ImageList. At the first picture that cannot be read, raise DataError, naming
    the file; or, if the list's on_bad_image is "skip", note {file: what is wrong with it} in its `skipped`, `say` a line
    about it when it is new, and go on with the rest of its batch. Fewer than `at_least` left of one is a DataError, too:
    the disk may have gone away.
    """
    for x, y, bad in _started(loader):
        _judge(bad, loader, 0 if x is None else len(x), at_least, say)
        if x is not None:
            yield x, y


Batch = namedtuple("Batch", "x y pictures number")
Batch.__doc__ = """x, y: as from `batches`. pictures: how many of them count: all, or 0 where they are padding. number: its
place in the epoch, from 0."""


def steps(loader, order, accumulate=1, say=print):
    """Yield for each optimizer step of an epoch (its Batches, the number of pictures in them in all processes together).
    A step has `accumulate` batches, the last one of an epoch maybe fewer. They are all read before it begins, so that
    what cannot be read, and `batches` would say so, ends a run between two steps.

    order: what orders the loader, a SeededBatches or ReplayBatches, which may start at the first batch of any step.
    """
    sizes, shares = order.sizes(), order.shares()
    found = []
    for number, (x, y, bad) in enumerate(_started(loader), start=order.start):
        # BatchNorm cannot train on a single picture.
        _judge(bad, loader, 0 if x is None else len(x), 2, say)
        found.append(Batch(x, y, min(len(y), shares[number]), number))
        if len(found) == accumulate or number + 1 == len(sizes):
            # As many as were to be read: a step counts the same whatever could not be.
            yield found, sum(sizes[number + 1 - len(found) : number + 1])
            found = []


def _started(loader):
    """An iterator over a loader."""
    with _signals_wait():
        return iter(loader)  # starts the workers


def _judge(bad, loader, good, at_least, say):
    """What `batches` does about the BadImages of a batch, of which so many other pictures are `good`."""
    if not bad:
        return
    pictures = loader.dataset
    if pictures.on_bad_image == "error":
        raise DataError(f"cannot read {bad[0].path} ({bad[0].reason}): put a good picture in its place, or remove "
                        "it (a run goes on with the same train and val pictures only), or leave such pictures out "
                        "with --on-bad-image skip")
    for path, reason in bad:
        if path not in pictures.skipped:
            say(" ".join(f"warning: left out, since it cannot be read: {path} ({reason})".splitlines()))
        pictures.skipped[path] = reason
    if good < at_least:
        raise DataError(f"cannot read {bad[0].path} ({bad[0].reason}), nor almost any other of its batch: has the "
                        "disk gone away? python data.py --check DIR lists what cannot be read")


@contextlib.contextmanager
def _signals_wait():
    """Within the block, stop signals wait, for processes that start in it, too: one that is still importing torch would
    print a traceback. (Not on Windows.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_input(x, mean, std):
    """Move a batch to the device of `mean` and `std`, tensors (3, 1, 1) for values in 0..1. uint8 pictures (N, 3, H, W)
    become float32, normalized, in channels_last; anything else (features) is moved as it is. Raises DataError.
    """
    if x.dtype == torch.uint8 and x.ndim != 4:
        raise DataError(f"a batch of pictures is (N, 3, H, W), not {tuple(x.shape)}: flatten several views of a picture "
                        "into the batch, as by x.flatten(0, 1)")
    x = x.to(mean.device, non_blocking=True)
    if x.dtype == torch.uint8:
        x = x.to(torch.float32, memory_format=torch.channels_last).sub_(255 * mean).div_(255 * std)
    return x


def mixer(num_classes, mixup=0.0, cutmix=0.0):
    """What `mix` applies to a batch: MixUp, the weighted mean of two pictures (Zhang et al., "mixup", 2018), CutMix, a
    rectangle of one in the other (Yun et al., "CutMix", 2019), or for each batch one of them at random. None if both
    are off.

    mixup, cutmix: alpha of the Beta(alpha, alpha) that the share of the first picture is drawn from; 0: off. A small
    alpha leaves most pictures nearly whole, 1 makes all shares equally likely.
    """
    kinds = [v2.MixUp(alpha=float(mixup), num_classes=num_classes)] if mixup else []
    kinds += [v2.CutMix(alpha=float(cutmix), num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(kinds) if len(kinds) == 2 else kinds[0] if kinds else None


def mix(x, y, mixer, *numbers):
    """Mix each picture of a normalized batch (N, 3, H, W), and its label, with the picture before it in the batch (the
    first with the last): torchvision pairs by rolling the batch by one, so the order should be shuffled. Returns x and
    the shares of the classes, float32 (N, C), which nn.CrossEntropyLoss takes in place of labels.

    mixer: from `mixer`; None returns (x, y) as they are. numbers: one or more that the random numbers are drawn from,
    such as seed, epoch, number of the batch; those of dropout are left as they were. Raises DataError.
    """
    if mixer is None:
        return x, y
    if len(x) != len(y):
        raise DataError(f"{len(x)} pictures and {len(y)} labels cannot be mixed: repeat the labels for several views, or "
                        "leave --mixup and --cutmix out")
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*numbers, 0, 0, 0))  # more numbers than a picture's seed has
        x, shares = mixer(x, y)
    return x.contiguous(memory_format=layout), shares  # torch.roll may lose channels_last


# ---- python data.py --check DIR


def unreadable_files(paths, workers=0, progress=iter):
    """{file: what is wrong with it} for the pictures that cannot be decoded. progress: wraps the batches, like tqdm."""
    samples = [(path, 0) for path in paths]
    pictures = ImageList(samples, v2.Resize((8, 8)), on_bad_image="skip")  # decoded whole; what is handed on is small
    loader = make_loader(pictures, SeededBatches(len(paths), 16), workers)
    for _ in progress(batches(loader, say=lambda line: None)):
        pass
    return pictures.skipped


def main(argv=None):
    """Decode every picture below a folder and name those that cannot be read; exit status 1 if there are any."""
    import argparse
    import sys

    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=main.__doc__, epilog="More: docs/troubleshooting.md")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--check", required=True, metavar="DIR", help="searched to the bottom")
    parser.add_argument("-j", "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
                        help="processes that decode (default here %(default)s)")
    args = parser.parse_args(argv)
    ignored = Counter()
    if not os.path.isdir(args.check):
        parser.error(f"no such folder: {args.check}")
    paths = list_folder(args.check, ignored)
    if not paths:
        parser.error(f"{args.check} holds no pictures ({', '.join(e[1:] for e in EXTENSIONS)})")

    def progress(found):
        return tqdm(found, "check", len(SeededBatches(len(paths), 16)), leave=False, disable=None)

    try:
        bad = unreadable_files(paths, max(0, args.workers), progress)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    lines = [" ".join(f"cannot read {path} ({reason})".splitlines()) for path, reason in bad.items()]
    kinds = ", ".join(f"{n} {kind}" for kind, n in ignored.most_common(5))
    kinds = f"; passed over: {kinds}" if kinds else ""
    lines.append(f"{len(paths)} pictures, {len(bad)} that cannot be read{kinds}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any bytes
    try:
        print("\n".join(lines), flush=True)
    except OSError:  # nobody reads it any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
