"""Pictures from folders: find and split them, decode, augment, order and batch them, the same on every run.

    images = find_images("./cats_and_dogs", val_split=0.2)      # .classes, .splits["train"] = [(path, label), ...]
    dataset = ImageList(images.splits["train"], train_transform(224), seed=0)
    order = SeededBatches(len(dataset), batch_size=32, seed=0, shuffle=True)
    loader = make_loader(dataset, order, workers=2)
    order.epoch = 3                                             # before each epoch: another order and augmentation
    for x, y in batches(loader):                                # uint8 (N, 3, H, W) and int64 (N,)
        x = to_input(x, mean, std)                              # float32, normalized, channels_last; then maybe `mix`

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
import re
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

Images = namedtuple("Images", "classes splits ignored")
Images.__doc__ = """classes: sorted names. splits: {"train", "val", maybe "test": [(path, label), ...]}.
ignored: a Counter of what was passed over, by file extension or folder name."""

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
NONE_READ = ("no picture of this split can be read: has the disk gone away? python data.py --check DIR lists what cannot be "
             "read")


class ImageList(Dataset):
    """Pictures and labels. Asked for (epoch, index), it decodes picture `index` and augments it with random numbers
    drawn from (seed, epoch, index); a plain index means epoch 0. Returns (uint8 tensor, label), or a BadImage for a
    file that cannot be read: an exception in a worker would arrive as thirty lines of traceback.

    samples: [(path, label), ...]. transform: takes and returns a uint8 tensor (3, H, W). size: see `decode`.
    """

    def __init__(self, samples, transform, seed=0, size=None):
        self.samples, self.transform, self.seed, self.size = samples, transform, seed, size

    def __len__(self):
        return len(self.samples)

    def labels(self):
        return torch.tensor([label for _, label in self.samples])

    def numbered(self):
        """The same pictures, with their places in the list as labels."""
        samples = [(path, number) for number, (path, _) in enumerate(self.samples)]
        return ImageList(samples, self.transform, self.seed, self.size)

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
    """Batches of (epoch, index). The order is a permutation drawn from (seed, epoch): set `.epoch` before each epoch,
    and `.start` to go on in the middle of one: the batches before it are passed over, and no picture of them is read.

    A last batch of one picture is merged into the batch before it, since BatchNorm cannot train on a single value.

    Process `rank` of `processes` gets its share of each batch, which is then of batch_size * processes pictures: two
    processes of 16 see together what one of 32 sees. No share is of one picture (unless batch_size is 1), so a small
    last batch may leave some processes none; with `along` these get some of the pictures of another's, so that they can
    run along with the others, and `shares()` says 0.
    """

    def __init__(self, length, batch_size, seed=0, shuffle=False, epoch=0, rank=0, processes=1, along=False):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.epoch, self.start = epoch, 0
        self.rank, self.processes, self.along = rank, processes, along

    def sizes(self):
        """The number of pictures in each batch, all processes together."""
        size = self.batch_size * self.processes
        full, rest = divmod(self.length, size)
        sizes = [size] * full + ([rest] if rest else [])
        if rest == 1 and full:
            sizes[-2:] = [size + 1]
        return sizes

    def shares(self):
        """The number of pictures in this process's share of each batch."""
        return [end - first for first, end in map(self._share, self.sizes())]

    def _share(self, size):
        """Where this process's share of a batch begins and ends."""
        sharing = max(1, min(self.processes, size // min(2, self.batch_size)))
        return (size * self.rank // sharing, size * (self.rank + 1) // sharing) if self.rank < sharing else (0, 0)

    def __len__(self):
        return len(self.sizes()) - self.start

    def __iter__(self):
        order = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        ends = list(itertools.accumulate(self.sizes(), initial=0))
        for first, end in itertools.pairwise(ends[self.start :]):
            begin, stop = self._share(end - first)
            if begin == stop and self.along:
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
        self.length, self.old, self.seed, self.epoch, self.start = length, old, seed, 0, 0

    def _old_sizes(self):
        return [round(n * self.per_batch / self.new.batch_size) for n in self.new.sizes()]

    def sizes(self):
        return [n + m for n, m in zip(self.new.sizes(), self._old_sizes(), strict=True)]

    def __len__(self):
        return len(self.new.sizes()) - self.start

    def __iter__(self):
        sizes = self._old_sizes()
        self.new.epoch, self.new.start = self.epoch, self.start
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


def eval_loader(samples, preprocessing, batch_size, workers=0, rank=0, processes=1):
    """A DataLoader over [(path, label), ...] in their order, as they are evaluated: resized, the centre cut out.

    preprocessing: a dict with image_size, resize_size, interpolation. Of several processes, each reads its share.
    """
    size = preprocessing["image_size"]
    plain = eval_transform(size, preprocessing["interpolation"], preprocessing["resize_size"])
    order = SeededBatches(len(samples), batch_size, rank=rank, processes=processes)
    return make_loader(ImageList(samples, plain, size=2 * size), order, workers)


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


def batches(loader, skipped=None, at_least=0, say=None):
    """Yield (x, y) from a loader. At the first picture that cannot be read, raise DataError, naming the file; or, given
    a dict `skipped`, put {file: what is wrong with it} there, `say` a line about it when it is new, and go on with the
    rest of its batch. Fewer than `at_least` left of one is a DataError, too: the disk may have gone away.
    """
    with _signals_wait():
        found = iter(loader)  # starts the workers
    for x, y, bad in found:
        if bad and skipped is None:
            raise DataError(f"cannot read {bad[0].path} ({bad[0].reason}): put a good picture in its place, or remove "
                            "it (a run goes on with the same train and val pictures only), or leave such pictures out "
                            "with --on-bad-image skip")
        for path, reason in bad:
            if say and path not in skipped:
                say(" ".join(f"warning: left out, since it cannot be read: {path} ({reason})".splitlines()))
            skipped[path] = reason
        if bad and (0 if x is None else len(x)) < at_least:
            raise DataError(f"cannot read {bad[0].path} ({bad[0].reason}), nor almost any other of its batch: has the "
                            "disk gone away? python data.py --check DIR lists what cannot be read")
        if x is not None:
            yield x, y


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
    become float32, normalized, in channels_last; anything else (features) is moved as it is.
    """
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
    such as seed, epoch, number of the batch; those of dropout are left as they were.
    """
    if mixer is None:
        return x, y
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*numbers, 0, 0, 0))  # more numbers than a picture's seed has
        x, shares = mixer(x, y)
    return x.contiguous(memory_format=layout), shares  # torch.roll may lose channels_last


# ---- features: what a frozen backbone makes of pictures, computed once


def features_key(weights, head, *depends_on):
    """A short text that is the same as long as features are: a hash of the weights (a state_dict) outside the top-level
    block of `head`, and of all else; of an ImageList that is its transform (of functions in it the name alone), its
    seed, and the name, size and time of each file.
    """
    found = hashlib.sha256()
    for name, tensor in weights.items():
        if name.partition(".")[0] != head.partition(".")[0]:
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for thing in depends_on:
        if isinstance(thing, ImageList):
            stats = [(Path(path), os.stat(path)) for path, _ in thing.samples if os.path.exists(path)]
            files = [(os.fsencode(path.name), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
            thing = thing.transform, thing.seed, thing.size, files
        found.update(re.sub(" at 0x[0-9a-f]+", "", repr(thing), flags=re.IGNORECASE).encode())  # else of this process alone
    return found.hexdigest()


def share_features(file, key, batches, rank, of_all):
    """`write_features` by several processes, each with batches of its own, which the first joins in one file for all.
    rank: the number of this process. of_all: gives the values that all processes have called it with, as a list.
    """
    if len(of_all(rank)) == 1:
        return write_features(file, key, batches)
    batches, part = iter(batches), Path(file).with_suffix(f".{rank}.bin")
    if first := next(batches, None):  # of a small split there may be none for this process
        write_features(part, key, itertools.chain([first], batches))
    parts = [path for path in of_all(str(part) if first else None) if path]
    found = [read_features(path, key) for path in parts]
    if rank == 0 and None not in found:
        write_features(file, key, (
            (saved["features"][i : i + 256].contiguous(memory_format=_layout(saved)), saved["numbers"][i : i + 256])
            for saved in found for i in range(0, len(saved["numbers"]), 256)))
    of_all(None)  # waits until that is done
    part.unlink(missing_ok=True)
    if (cached := read_features(file, key)) is None:
        raise DataError(f"{file} cannot be seen by all processes: --cache-features needs an --output on a disk that all "
                        "machines share")
    return cached


def write_features(file, key, batches):
    """Write the features of a split, from batches of (features (N, ...), numbers of the pictures (N,)), to a file that
    is there when it is complete, and may be larger than memory. Returns what `read_features` does. Raises DataError.
    """
    numbers, raw, temporary = [], f"{file}.raw.{os.getpid()}.tmp", f"{file}.{os.getpid()}.tmp"

    @contextlib.contextmanager
    def writing():
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            raise DataError(f"could not write {file} ({error}): make room, or leave out --cache-features") from error

    try:
        with writing():
            stream = open(raw, "wb")
        with stream:
            for x, which in batches:
                channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
                with writing():
                    stream.write(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                numbers += which.tolist()
            with writing():
                stream.flush()
        if not numbers:
            raise DataError(NONE_READ)
        shape = len(numbers), *x.shape[1:]
        with writing():
            features = torch.from_file(raw, size=math.prod(shape), dtype=x.dtype).view(shape)
            state = {"key": key, "numbers": torch.tensor(numbers), "features": features, "channels_last": channels_last}
            torch.save(state, temporary)
            os.replace(temporary, file)
    finally:
        for path in (raw, temporary):
            Path(path).unlink(missing_ok=True)
    return read_features(file, key)


def read_features(file, key):
    """What `write_features` has written under this key, to be read as it is needed; None if that is not there."""
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # not there, or damaged: they can be computed again
        return None
    return saved if isinstance(saved, dict) and saved.get("key") == key else None


def drop_features(folder):
    """Remove the files of features from a folder. Returns how many there were."""
    return sum(not path.unlink() for path in Path(folder).glob("features_*.bin"))


def feature_batches(saved, labels, order):
    """Like a DataLoader over the batches of `order`: (features (N, ...), labels (N,), []) from what `read_features` has
    found. labels: those of all pictures. Pictures that could not be read are left out.
    """
    place = torch.full((len(labels),), -1)
    place[saved["numbers"]] = torch.arange(len(saved["numbers"]))
    for keys in filter(None, order):
        numbers = torch.tensor([index for _, index in keys])
        numbers = numbers[place[numbers] >= 0]
        yield saved["features"][place[numbers]].contiguous(memory_format=_layout(saved)), labels[numbers], []


def _layout(saved):
    return torch.channels_last if saved["channels_last"] else torch.contiguous_format


# ---- python data.py --check DIR


def unreadable_files(paths, workers=0, progress=iter):
    """{file: what is wrong with it} for the pictures that cannot be decoded. progress: wraps the batches, like tqdm."""
    pictures = ImageList([(path, 0) for path in paths], v2.Resize((8, 8)))  # decoded whole; what is handed on is small
    bad = {}
    for _ in progress(batches(make_loader(pictures, SeededBatches(len(paths), 16), workers), bad)):
        pass
    return bad


def main(argv=None):
    """Decode every picture below a folder and name those that cannot be read; exit status 1 if there are any."""
    import argparse
    import sys

    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=main.__doc__)
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
