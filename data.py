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
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import re
import shlex
import signal
import struct
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

# Pillow knows these formats by name, but not without other programs what is in them.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
# Whatever else Pillow opens is a picture. (It opens .mpo, of stereo cameras, as a JPEG.)
EXTENSIONS = tuple(sorted({*IMG_EXTENSIONS, *(
    ending for ending, kind in Image.registered_extensions().items()
    if (kind in Image.OPEN or kind == "MPO") and kind not in NOT_DECODED)}))


class DataError(Exception):
    """Pictures or folders that cannot be used. The message is one line that names the way out."""


# ---- finding: a folder as a tree

# What operating systems, network drives, notebooks, editors and version control leave behind, in small letters. (Any
# other name that begins with a dot is hidden: not looked into either, but said in another line.)
BY_PRODUCTS = {
    "__macosx", ".ds_store", ".appledouble", ".appledb", ".appledesktop", ".spotlight-v100", ".fseventsd",
    ".temporaryitems", ".documentrevisions-v100", ".localized", "network trash folder", "temporary items",
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", ".thumbnails",
    ".directory", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "#recycle", "#snapshot", ".@__thumb",
    ".snapshot", ".snapshots", ".picasaoriginals", ".picasa.ini", "picasa.ini", ".stfolder", ".stversions",
    ".dropbox.cache", ".ipynb_checkpoints", "__pycache__", ".cache", ".idea", ".vscode", ".git", ".svn", ".hg", ".dvc",
}
BY_PRODUCT_BEGINNINGS = ("._", ".trash", ".nfs", "~$")
# By these files the folder of a run is known; these pictures are what a run writes there.
RUN_FILES = {"args.json", "last.pt", "best.pt"}
RUN_PICTURES = {"curves.png", "confusion.png", "predicted.png", "residuals.png", "mistakes.png", "find_lr.png"}

Folder = namedtuple("Folder", "path name pictures folders others left_out total is_run")
Folder.__doc__ = """name: in NFC. pictures: the paths of those right in it. folders: the Folders in it. others: a
Counter of its files that are no pictures, by extension. left_out: {(kind, place): pictures}, of what is not looked
into, the kind being "by-product", "hidden" or "run". total: pictures in it and below. is_run: is it that of a run?"""


def nfc(name):
    """The name in Unicode's composed form: macOS may write an e and its accent as two characters, others write one."""
    return unicodedata.normalize("NFC", name)


def look_into(path, above=()):
    """All that lies in a folder, as a Folder: each picture is in exactly one list, of its own folder or of one below. A
    link that leads back up is not followed. Raises DataError.
    """
    path, above = os.fspath(path), {*above, os.path.realpath(path)}
    pictures, folders, others, left_out = [], [], Counter(), Counter()
    names = _names_in(path)
    for name, is_folder in names.items():
        inside = name if path == "." else os.path.join(path, name)
        if kind := _kind_of_name(name):
            place, count = _pictures_not_looked_into(path, name, is_folder)
            left_out[kind, place] += count
        elif not is_folder and is_picture(name):
            pictures.append(inside)
        elif not is_folder:
            others[_kind_of_file(inside)] += 1
        elif os.path.realpath(inside) not in above:
            folder = look_into(inside, above)
            if folder.is_run:
                left_out["run", os.path.join(inside, "")] = folder.total + folder.left_out.total()
            else:
                folders.append(folder)
    own_name, total = nfc(os.path.basename(path)), len(pictures) + sum(folder.total for folder in folders)
    is_run = _is_run(own_name, names, pictures, folders, left_out)
    return Folder(path, own_name, pictures, folders, others, left_out, total, is_run)


def is_picture(name):
    """Is a file of this name a picture? (Its extension says so.)"""
    return name.lower().endswith(EXTENSIONS)


def _names_in(path):
    """{name: is it a folder?}, sorted in NFC, which is the same on every file system."""

    def is_folder(entry):
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    try:
        with os.scandir(path) as found:
            names = {entry.name: is_folder(entry) for entry in found}
    except OSError as error:
        raise DataError(f"cannot look into {path} ({error.strerror}): allow it, or move that folder away") from error
    return {name: names[name] for name in sorted(names, key=lambda name: (nfc(name), name))}


def _kind_of_name(name):
    """"by-product", "hidden" or None."""
    known = name.lower() in BY_PRODUCTS or name.lower().startswith(BY_PRODUCT_BEGINNINGS)
    # .cat.jpg.icloud is all that is here of a cat.jpg that iCloud has not downloaded: counted like other files.
    hidden = name.startswith(".") and not name.lower().endswith(".icloud")
    return "by-product" if known else "hidden" if hidden else None


def _kind_of_file(path):
    """Of what is no picture: its extension, in words if there is none. (A dead link may have meant a whole class.)"""
    if not os.path.exists(path):
        return "dead link"
    return Path(path).suffix.lower() or "without an extension"


def _pictures_not_looked_into(path, name, is_folder):
    """(place, pictures) of what is left out by its name; that of a file such as ._cat.png is one for all like it."""
    if is_folder:
        inside = os.path.join(path, name, "")
        return inside, sum(is_picture(file) for _, _, files in os.walk(inside) for file in files)
    beginning = next((b for b in BY_PRODUCT_BEGINNINGS if name.lower().startswith(b)), ".")
    return os.path.join(path, beginning + "*"), int(is_picture(name))


def _is_run(name, names, pictures, folders, left_out):
    """Is the folder of this name, which holds all this, that of a run, or does it hold folders of runs alone?"""
    holds_folders, holds_runs = any(folder.total for folder in folders), any(kind == "run" for kind, _ in left_out)
    # Someone may keep a best.pt among the pictures of a class: those have other names than the pictures of a run.
    if RUN_FILES & names.keys() and not holds_folders:
        return RUN_FILES <= names.keys() or RUN_PICTURES.issuperset(map(os.path.basename, pictures))
    if name == "runs" and not pictures:
        return holds_runs or not holds_folders
    return holds_runs and not pictures and not holds_folders


def _tree(folder):
    """The Folder and all below it."""
    yield folder
    for below in folder.folders:
        yield from _tree(below)


def _pictures_in(folder):
    return [path for below in _tree(folder) for path in below.pictures]


def _with_pictures(folder):
    """The folders right in it that hold pictures, themselves or further down."""
    return [below for below in folder.folders if below.total]


def _below(path, tree):
    """A path as it is seen from `tree`, with slashes."""
    return Path(os.path.relpath(path, tree.path)).as_posix() + ("/" if path.endswith(os.sep) else "")


def list_folder(folder, ignored=None):
    """Sorted paths of the pictures in a folder and all folders below it, by extension. Hidden ones, by-products of
    other programs and runs of these scripts are left out. Raises DataError.
    ignored: a Counter that takes files that are no pictures, by extension, and pictures that are left out, by place.
    """
    tree = look_into(folder)
    if ignored is not None:
        ignored.update(_ignored_in(tree))
    return _pictures_in(tree)


def _ignored_in(tree):
    ignored = Counter()
    for folder in _tree(tree):
        ignored.update(folder.others)
        ignored.update({_below(place, tree): count for (_, place), count in folder.left_out.items() if count})
    return ignored


# ---- finding: which folders are splits, which are classes

Images = namedtuple("Images", "classes splits ignored notes", defaults=[()])
Images.__doc__ = """classes: sorted names, in NFC. splits: {"train", "val", maybe "test": [(path, label), ...]}.
ignored: a Counter of what was passed over: files that are no pictures, by extension; pictures left out, by place.
notes: lines about how the folders were understood, and what was passed over."""

# The names of the folders of the splits; and the words by which others are known, alone or in a longer name: Training,
# seg_train, val2017, testSet.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_WORDS = {
    "train": {"train", "training", "trainset", "trainval", "trn"},
    "val": {"val", "valid", "validation", "valset", "dev", "eval", "evaluation"},
    "test": {"test", "testing", "testset", "tst"},
}


def find_images(root, val_split=0.2, least=2):
    """List the pictures below `root`, which holds either train/ (and val/ or valid/, and test/), each with one folder
    per class, or the class folders themselves. val/ and test/ may lack classes. Pictures in test/ that lie in no class
    folders are no split. Each picture below `root` is in `splits`, or counted in a line of `notes`.

    Without a val/ folder, a share `val_split` of each class is set aside, chosen by a hash of the file's name: the same
    pictures on every run and machine, and few of them change sides when pictures are added.
    least: classes that there must be. Raises DataError.
    """
    root = Path(root)
    if not os.path.exists(root):
        raise DataError(f"no such folder: {root}: see how it is spelled; if the pictures have moved, say where they "
                        "are now: --data NEWPLACE (old ones: --old-data NEWPLACE)")
    if not os.path.isdir(root):
        raise DataError(f"{root} is a file, not a folder: give the folder that holds the class folders (unpack an "
                        "archive first)")
    tree = look_into(root)
    if not tree.total:
        raise DataError(f"{root} holds no pictures{_instead(tree)}: put those of each class into a folder there, "
                        "unpacked, or give another folder")
    _refuse_too_high(tree, least, is_root=True)
    _refuse_too_low(tree)
    chains, notes = _split_folders(tree)
    train = chains["train"][-1]
    _refuse_too_high(train, least, is_root=train is tree)
    if 0 < len(inside := _with_pictures(train)) < least:
        raise DataError(f"{train.path} holds one class only ('{inside[0].name}'): a classifier needs two folders of "
                        "pictures or more, one for each class")
    found = {"train": _classes_in(train)}
    classes = list(found["train"])
    for split in ("val", "test"):
        if split in chains and not (split == "test" and _without_labels(chains[split][-1], classes)):
            found[split] = _classes_in(chains[split][-1], classes, train)
    notes += _notes_on(tree, chains, found)

    pictures = {split: {name: _pictures_in(folder) for name, folder in found[split].items()} for split in found}
    if "val" not in found:
        halves = {name: split_by_hash(paths, val_split, root) for name, paths in pictures["train"].items()}
        pictures["train"] = {name: train for name, (train, _) in halves.items()}
        pictures["val"] = {name: val for name, (_, val) in halves.items()}
    splits = {
        split: [(path, label) for label, name in enumerate(classes) for path in pictures[split].get(name, [])]
        for split in SPLITS
        if split in pictures
    }
    return Images(classes, splits, _ignored_in(tree), [_one_line(note) for note in notes])


def _split_folders(tree):
    """({split: [tree, its folder, maybe one in that, ..., the one that holds the classes]}, lines). Where the folders
    in `tree` are the classes: {"train": [tree]}.
    """
    like_splits = [folder for folder in tree.folders if _splits_in(folder.name)]
    others = [folder for folder in _with_pictures(tree) if folder not in like_splits]
    # bus/, car/ and train/ with pictures right in it are classes: two others make a data set without it.
    trains = all(_splits_in(folder.name) == {"train"} and not _with_pictures(folder) for folder in like_splits)
    if not like_splits or (trains and len(others) >= 2):
        return {"train": [tree]}, []

    named = {split: _best_named(split, tree.folders) for split in SPLITS}
    way_out = ("name the folders of the splits train, val and test; or, if all of them are classes, move them into one "
               f"folder train/, such as {os.path.join(tree.path, 'train', like_splits[0].name)}")
    if not named["train"]:
        lower = [folder for folder in _tree(tree) if _holds_splits(folder)]
        if len(lower) == 1:
            way_out = f"type --data {shlex.quote(lower[0].path)}, which holds one; else {way_out}"
        raise DataError(f"{tree.path} holds {_listed(like_splits)} but no train/: {way_out}")
    for split, folders in named.items():
        if len(folders) > 1:
            raise DataError(f"{tree.path} holds {_listed(folders)}, and one at most can be the split {split}: "
                            f"{way_out}")
    train = named["train"][0]
    rank, alone = _rank(train.name, "train"), not named["val"] and not named["test"]
    # Beside others, steam_train/ without a val/ or test/ may be a class, and so may train/ without folders in it.
    perhaps_a_class = others and (rank == 2 and alone or not _with_pictures(train))
    # Beside train_val/, which may be either, nothing but a plain train/ is certain.
    unclear = [folder for folder in like_splits if len(_splits_in(folder.name)) > 1]
    if perhaps_a_class or (rank and unclear):
        raise DataError(f"{tree.path} holds {train.name}/, perhaps the split train, beside "
                        f"{_listed(unclear + others)}: {way_out}")
    chains = {split: [tree, *_nested(folders[0])] for split, folders in named.items() if folders}
    misnamed = [f"{_below(chain[-1].path, tree)} as {split}" for split, chain in chains.items()
                if len(chain) > 2 or chain[1].name not in SPLITS[split]]
    return chains, [f"note: read {', '.join(misnamed)}"] if misnamed else []


def _splits_in(name):
    """The splits that a folder's name speaks of: {"train"} for seg_train and trainingSet, none for trainer."""
    runs = re.findall(r"[^\W\d_]+", name)
    words = {word.lower() for run in runs for word in re.split("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", run)}
    return {split for split, known in SPLIT_WORDS.items() if known & words}


def _is_split_name(name):
    """Is it a split's name as a whole?"""
    return any(_rank(name, split) < 2 for split in _splits_in(name))


def _rank(name, split):
    """How well a name that speaks of the split fits: 0 as it should be, 1 all of it (Train, dev), 2 a word of it."""
    return 0 if name in SPLITS[split] else 1 if name.lower() in SPLIT_WORDS[split] else 2


def _best_named(split, folders):
    """Of the folders whose names speak of this split and of no other, the ones that fit best: one, if it is clear."""
    found = [folder for folder in folders if _splits_in(folder.name) == {split}]
    found = [folder for folder in found if folder.total] or found
    best = min((_rank(folder.name, split) for folder in found), default=0)
    return [folder for folder in found if _rank(folder.name, split) == best]


def _nested(folder):
    """[training_set, training_set/training_set], if all that it holds is that, and so on; [folder] as a rule."""
    inside = _with_pictures(folder)
    again = len(inside) == 1 and not folder.pictures and _splits_in(inside[0].name) == _splits_in(folder.name)
    return [folder, *_nested(inside[0])] if again and _with_pictures(inside[0]) else [folder]


def _holds_splits(folder):
    return any(_splits_in(below.name) == {"train"} and _with_pictures(below) for below in folder.folders)


def _refuse_too_high(folder, least=2, is_root=False):
    """Raise DataError if the classes, or the splits, lie further down, in the one folder that there is."""
    low, inside = folder, _with_pictures(folder)
    only = inside[0] if len(inside) == 1 else None
    while len(inside) == 1 and not _holds_splits(low):
        low, inside = inside[0], _with_pictures(inside[0])
    holds_classes = len(inside) > 1 and not _splits_in(low.name)
    if low is folder or not (holds_classes or _holds_splits(low)):
        return
    way_out = f"type --data {shlex.quote(low.path)}" if is_root else f"move what {low.path} holds into {folder.path}"
    if least < 2:
        if only.pictures:  # a class, some of whose pictures lie deeper
            return
        way_out += f"; or, if '{only.name}' is a class, put its pictures right into {only.path}"
    raise DataError(f"{folder.path} holds {only.name}/ alone, and {_listed(inside)} lie further down: {way_out}")


def _refuse_too_low(tree):
    """Raise DataError if `tree` may be a single class: it holds pictures alone, and so do folders beside it."""
    if _with_pictures(tree):
        return
    above, own_name = os.path.split(os.path.abspath(tree.path))
    beside = []
    with contextlib.suppress(DataError):  # what must not be looked into is nothing to hint at
        for name, is_folder in _names_in(above).items():
            if is_folder and name != own_name and not _kind_of_name(name):
                beside += [name + "/"] if any(map(is_picture, _names_in(os.path.join(above, name)))) else []
    if beside:
        raise DataError(f"no class folders in {tree.path}, but {_count(len(tree.pictures))} right in it: if it is a "
                        f"class itself, beside {_some(beside)}, type --data {shlex.quote(above)}; else put the "
                        "pictures of each class into a folder named after it")


def _without_labels(test, classes):
    """Do the pictures in test/ lie in no class folders: right in it, or in one folder, named otherwise?"""
    inside = _with_pictures(test)
    known = [folder for folder in [*inside, *(below for f in inside for below in f.folders)] if folder.name in classes]
    return len(inside) <= 1 and not known


def _classes_in(folder, known=None, train=None):
    """{class name: its Folder} of the folders in `folder`. Of the training split, each has to hold pictures. known: for
    another split the names of its classes; `train` is its Folder.
    """
    inside = folder.folders if known is None else _with_pictures(folder)
    if not _with_pictures(folder):
        right_in_it = f", but {_count(len(folder.pictures))} right in it" if folder.pictures else _instead(folder)
        without = "" if known is None else f", or remove {folder.name}/"
        raise DataError(f"no class folders in {folder.path}{right_in_it}: put the pictures of each class into a folder "
                        f"named after it{without}")
    if twice := [name for name, count in Counter(f.name for f in inside).items() if count > 1]:
        raise DataError(f"{folder.path} holds two folders named {twice[0]}, once in Unicode's form NFC and once in "
                        "NFD: put the pictures of both into one")
    if known:
        _refuse_classes_that_train_lacks(folder, inside, known, train)
    _refuse_splits_below(folder, inside)
    if empty := [below for below in inside if not below.total]:
        so_do = f", nor do {_listed(empty[1:])}" if empty[1:] else ""
        raise DataError(f"class folder {empty[0].path} holds no pictures{_instead(empty[0])}{so_do}: put some there, "
                        f"or take it out of {folder.path}")
    _refuse_classes_in_a_class(folder, inside)
    _refuse_shared_folders(folder, inside)
    return {below.name: below for below in inside}


def _refuse_classes_that_train_lacks(folder, classes, known, train):
    """Raise DataError where the Folder of another split has a class that is not `known`."""
    if strange := [below.name for below in classes if below.name not in known]:
        _refuse_too_high(folder)
        alike = [name for name in known if _spelled_alike(name) == _spelled_alike(strange[0])]
        remove = "take them out of" if len(strange) < len(classes) else "remove"
        is_it = f"; or is '{strange[0]}' the same as '{alike[0]}'? Then rename it" if alike else ""
        raise DataError(f"{folder.path} holds classes that {train.path} lacks: {_some(strange)}; put pictures of them "
                        f"there, too, or {remove} {folder.name}/{is_it}")


def _refuse_splits_below(folder, classes):
    """Raise DataError where a class holds a folder named like a split, or is named so and holds folders alone."""
    for below in classes:
        inside = ([] if below.pictures else [below]) + _with_pictures(below)
        if splits := [f for f in inside if _is_split_name(f.name)]:
            holder = folder if below in splits else below
            raise DataError(f"{below.path} should be a class, and {splits[0].path} is named like a split: type --data "
                            f"{shlex.quote(holder.path)} if that holds the splits; else put the splits above the "
                            "classes, as in train/cat, or give that folder another name")


def _refuse_classes_in_a_class(folder, classes):
    """Raise DataError where a folder among the classes holds them once more, as archives that were packed twice do."""
    names = {below.name for below in classes}
    for below in classes:
        if again := [f for f in _with_pictures(below) if f.name in names - {below.name}]:
            raise DataError(f"{below.path} holds {_listed(again)} like {folder.path} itself: if these are copies, move "
                            f"{below.path} away; if '{below.name}' is a class, put its pictures right into it; if "
                            "they are more pictures of the same classes, put them into the folders of these")


def _refuse_shared_folders(folder, classes):
    """Raise DataError where each class has, say, images/ and masks/: nobody but the user knows which to learn from."""
    itself = "the class folder itself"
    sources = [{*(f.name + "/" for f in _with_pictures(c)), *([itself] if c.pictures else [])} for c in classes]
    shared = sorted(set.intersection(*sources), key=lambda name: (name == itself, name))
    if len(classes) > 1 and len(shared) > 1:
        raise DataError(f"the folders in {folder.path} ({_listed(classes)}) all hold pictures in {_some(shared)}: if "
                        "one of these holds the pictures to learn from and the others masks or thumbnails, move the "
                        "others away; if all do, put the pictures right into the class folders; if these are the "
                        "classes, name the folders above them train, val and test; if these are the splits, put them "
                        "above the classes, as in train/cat")


# ---- finding: what is said about the folders


def _notes_on(tree, chains, found):
    """Lines about what is not used, what lies deeper than a class folder, which classes are lacking.

    chains: {split: [tree, ..., the folder of its classes]}. found: {split: {class: its Folder}} of those with labels.
    """
    notes = []
    for split in chains.keys() - found.keys():
        test = chains[split][1]
        what = f"{_count(test.total)} in no class folders" if test.total else "it holds no pictures"
        later = f"python predict.py --checkpoint .../best.pt {shlex.quote(test.path)}"
        notes.append(f"note: {test.name}/ has no labels, so there is no test split: {what}"
                     + (f"; once trained: {later}" if test.total else ""))

    levels = {folder.path: folder for split in found for folder in chains[split]}
    above = [os.path.basename(path) for folder in levels.values() for path in folder.pictures]
    if above:
        notes.append(f"warning: {_count(len(above))} above the class folders, in no class, not used: {_some(above)}")
    classes = [folder for of_split in found.values() for folder in of_split.values()]
    known = {folder.path for folder in [*classes, *(f for chain in chains.values() for f in chain)]}
    beside = [f for f in tree.folders if f.path not in known]
    if beside:
        kind, count = "warning" if any(f.total for f in beside) else "note", _count(sum(f.total for f in beside))
        notes.append(f"{kind}: {count} in folders that are no split and no class, not used: {_counts(beside, tree)}")
    deeper = [f for folder in classes for f in _with_pictures(folder)]
    if deeper:
        count = _count(sum(f.total for f in deeper))
        notes.append(f"note: {count} deeper than a class folder, used like the others in it: {_counts(deeper, tree)}")

    for split in found:
        if lacking := [name for name in found["train"] if name not in found[split]]:
            notes.append(f"note: {chains[split][1].name}/ has no pictures of {_some(lacking)}: trained, but not scored")
    if named_so := [name for name in found["train"] if _splits_in(name)]:
        notes.append(f"note: read as classes, though named like splits: {_some(named_so)}")
    if alike := [", ".join(names) for names in _by(_spelled_alike, found["train"]) if len(names) > 1]:
        notes.append(f"warning: classes whose names differ in capital letters, blanks, _ or - alone: {_some(alike)}")
    return notes + _notes_on_left_out(tree)


def _notes_on_left_out(tree):
    """Lines about hidden pictures, those among by-products and in runs, and files that are no pictures."""
    left_out, others = {}, Counter()
    for folder in _tree(tree):
        others.update(folder.others)
        for (kind, place), count in folder.left_out.items():
            left_out.setdefault(kind, Counter())[_below(place, tree)] += count
    notes = []
    for kind, words in (("hidden", "hidden, not used (a name without the dot would be)"),
                        ("by-product", "among by-products of other programs, not used"),
                        ("run", "in folders of runs of these scripts, not used")):
        places = left_out.get(kind, Counter())
        if kind != "run":  # a class folder without pictures, into which a best.pt was put, is told
            places = +places  # those with pictures
        if places:
            counts = _some([f"{place} ({count})" for place, count in places.items()])
            notes.append(f"note: {_count(places.total())} {words}: {counts}")
    if others:
        notes.append(f"note: passed over what is no picture: {kinds(others)}")
    return notes


def _instead(folder):
    """What a folder without pictures holds, in words."""
    ignored = _ignored_in(folder)
    return f" (but {kinds(ignored)})" if ignored else " (it is empty)"


def kinds(ignored, most=8):
    """What `list_folder` has ignored, in words, most first."""
    words = [f"{count} {'in ' if kind.endswith(('/', '*')) else ''}{kind}" for kind, count in ignored.most_common()]
    rest = sum(count for _, count in ignored.most_common()[most:])
    return ", ".join(words[:most]) + (f" and {len(words) - most} more kinds ({rest} files)" if rest else "")


def _count(pictures):
    return f"{pictures} picture{'' if pictures == 1 else 's'}"


def _counts(folders, tree):
    return _some([f"{_below(folder.path, tree)}/ ({folder.total})" for folder in folders])


def _listed(folders):
    return _some([folder.name + "/" for folder in folders])


def _some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _by(key, values):
    """Lists of values that have the same key, in the order of their first."""
    groups = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())


def _spelled_alike(name):
    """The same for names that people take for one: Siamese_cat and "siamese cat "."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).strip().casefold())


def _one_line(text):
    """The text in one line that any terminal can show: a name may hold any bytes."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()


# ---- splitting, counting, describing


def split_by_hash(paths, val_split, root):
    """Set a share of the paths aside, those whose name below `root` has the smallest hash: (the others, those)."""
    if len(paths) < 2:
        raise DataError(f"{Path(paths[0]).parent} holds one picture only: it cannot be split into train and val; add a "
                        "second one, or put pictures to validate with into a folder val/ beside train/; or, if that is "
                        "no class, move it away")
    count = min(max(1, round(len(paths) * val_split)), len(paths) - 1)
    below = {path: os.fsencode(nfc(Path(os.path.relpath(path, root)).as_posix())) for path in paths}
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
    """A table of pictures per class and split, with a hint (if `hints`) for imbalanced classes, the `notes` about the
    folders, and warnings about pictures that are in two splits or in two classes.
    """
    splits = list(images.splits)
    names = [_one_line(name) for name in images.classes]
    width = max(len(name) for name in [*names, "class", "total"])
    columns = [counts(images, s) for s in splits]
    lines = [f"{'class':<{width}}" + "".join(f"{s:>8}" for s in splits)]
    rows = list(zip(names, *columns, strict=True))
    lines += [f"{name:<{width}}" + "".join(f"{n:8d}" for n in ns) for name, *ns in rows[:most]]
    if len(rows) > most:
        lines.append(f"... and {len(rows) - most} more classes")
    lines.append(f"{'total':<{width}}" + "".join(f"{sum(c):8d}" for c in columns))
    few, many = min(columns[0]), max(columns[0])
    if hints and many >= 2 * few:
        lines.append(f"hint: '{names[columns[0].index(many)]}' has {many / few:.1f} times as many training "
                     f"pictures as '{names[columns[0].index(few)]}': consider --class-weights balanced "
                     "and --monitor val_macro_f1")
    lines += images.notes
    places = [place for found in images.splits.values() for place in found]
    same = same_files([path for path, _ in places])
    lines += _contradictions(same, images) + _named_after_others([path for path, _ in places])
    lines += _versions_apart(images)
    return "\n".join(lines + pictures_to_know_of(images.splits, same))


def _contradictions(same, images):
    """A line about files that are the same byte for byte and lie in two classes. same: as from `same_files`."""
    of_path = {path: images.classes[label] for found in images.splits.values() for path, label in found}
    groups = [_by(of_path.get, group) for group in same]
    pairs = [_two(one[0], other[0]) for one, other, *_ in (group for group in groups if len(group) > 1)]
    if not pairs:
        return []
    return [_one_line(f"warning: {_count(len(pairs))} in two classes, byte for byte the same: {_some(pairs, 3)}: keep "
                      "each in one of them")]


def _named_after_others(paths):
    """Lines about pictures such as a_mask.png or thumb_a.jpg that lie beside an a.png: are they to be learned from?"""
    by_stem = {(os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]): path for path in paths}
    found = {}  # {"_mask": [(path, path of the other one), ...]}
    for (folder, stem), path in by_stem.items():
        for base in (re.sub(r"[ _.-]+[^\W\d_]+[ _.-]?\d*$", "", stem), re.sub(r"^[^\W\d_]+\d*[ _.-]+", "", stem)):
            if base != stem and (folder, base) in by_stem:
                more = re.sub(r"[ _.-]?\d*$", "", stem.replace(base, "", 1))
                found.setdefault(more, []).append((path, by_stem[folder, base]))
    return [_one_line(f"warning: {_count(len(pairs))} named like another one and '{more}' ({_two(*pairs[0])}): used "
                      "like any other, even in another split than that one; if they are masks, thumbnails or copies, "
                      "move them away")
            for more, pairs in found.items() if len(pairs) > 1]


def _versions_apart(images):
    """A line about versions of one picture in training and in another split. Tools that augment keep the name of the
    original with its ending in that of each version: a_jpg.rf.123.jpg, cat_original_a.jpg_123.jpg.
    """
    endings = "|".join(re.escape(ending[1:]) for ending in EXTENSIONS)
    of_original = re.compile(rf"(.+?)[._](?:{endings})[._-]", re.IGNORECASE)
    trained, pairs = {}, {}
    for split in images.splits:  # train comes first
        for path, label in images.splits[split]:
            if match := of_original.match(os.path.basename(path)):
                original = match[1], label
                if split == "train":
                    trained[original] = path
                elif original in trained:
                    pairs.setdefault(original, _two(trained[original], path))
    if not pairs:
        return []
    return [_one_line(f"warning: versions of {_count(len(pairs))} in training and in another split, by their names "
                      f"({next(iter(pairs.values()))}): if they are made of one original, the scores are too good; "
                      "keep them in one split, in a val/ of your own")]


def _two(path, other):
    """Two paths in words, without what they have in common."""
    above = os.path.dirname(os.path.commonprefix([path, other]))
    return f"{os.path.relpath(path, above or '.')} and {os.path.relpath(other, above or '.')}"


def pictures_to_know_of(splits, same=None):
    """Lines about pictures of several frames or pages, and about those in the training split and in another one. same:
    what `same_files` has found among them, if that is known.
    """
    lines = first_frames(path for found in splits.values() for path, _ in found)
    pairs = find_duplicates(splits, same)
    lines += [f"warning: the same picture twice, so the scores are too good: {a} and {b}" for a, b in pairs[:3]]
    if len(pairs) > 3:
        lines.append(f"warning: ... and {len(pairs) - 3} more such pairs")
    return [_one_line(line) for line in lines]


def first_frames(paths):
    """Lines that name those of the files of which `decode` takes the first of several frames or pages."""
    several, lines = animated(paths), []
    paged = [path for path in several if Path(path).suffix.lower() in PAGED]
    moving = [path for path in several if path not in paged]
    for found, kind, plural, part in ((moving, "animated picture", "animated pictures", "frame"),
                                      (paged, "picture of several pages", "pictures of several pages", "page")):
        if found:
            names = _some([Path(path).name for path in found])
            kind = plural if len(found) > 1 else kind
            lines.append(f"note: {len(found)} {kind}, of which the first {part} is used: {names}")
    return lines


PAGED = (".tif", ".tiff", ".dcx")
MOVING = (".gif", ".webp", ".png", ".apng", ".mpo", ".avif", ".avifs", ".fli", ".flc")


def animated(paths):
    """Those of the paths that hold more than one frame, or another page that is no smaller copy of the first. It has to
    open a file and looks at the endings in MOVING and PAGED only.
    """

    def has_several(path):
        ending = Path(path).suffix.lower()
        try:
            if ending in (".webp", ".png", ".apng"):  # there may be 100,000, and the header says it
                with open(path, "rb") as file:
                    header = file.read(4096)
                if header[8:16] == b"WEBPVP8X":
                    return bool(header[20] & 2)
                frames = header.partition(b"IDAT")[0].partition(b"acTL")[2]
                return header.startswith(b"\x89PNG") and int.from_bytes(frames[:4], "big") > 1
            if ending in (".tif", ".tiff") and _has_one_page(path):  # Pillow takes several times as long
                return False
            with Image.open(path) as image:
                if image.format != "TIFF":
                    return getattr(image, "is_animated", False)  # not every format knows the word
                return _has_pages(image)
        except Exception:  # decoding will name it
            return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [path for path in paths if str(path).lower().endswith((*MOVING, *PAGED)) and has_several(path)]


def _has_one_page(path):
    """Does a TIFF's first page say that it is the last one?"""
    with open(path, "rb") as file:
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(file.read(4))
        if order is None:  # a TIFF of more than 4 GB, or something else
            return False
        file.seek(struct.unpack(f"{order}I", file.read(4))[0])
        file.seek(12 * struct.unpack(f"{order}H", file.read(2))[0], os.SEEK_CUR)
        return file.read(4) == b"\0\0\0\0"


def _has_pages(image):
    """Has a TIFF another page that is neither a smaller copy of the first, for a quick view, nor a mask?"""
    with contextlib.suppress(EOFError):
        for page in itertools.count(1):
            image.seek(page)
            if not image.tag_v2.get(254, 0) & 5:
                return True
    return False


def find_duplicates(splits, same=None):
    """[(path in train, path in val or test)] of files that are the same byte for byte. Such pictures make the scores
    look better than they are. same: as in `pictures_to_know_of`.
    """
    train = list(dict.fromkeys(path for path, _ in splits["train"]))
    others = list(dict.fromkeys(path for split in ("val", "test") for path, _ in splits.get(split, [])))
    same = same_files([*train, *others]) if same is None else same
    first = {path: group[0] for group in same for path in group}
    twins = {}  # by the first of each group, or by the path itself: one file may be in two splits
    for other in others:
        twins.setdefault(first.get(other, other), []).append(other)
    return [(path, other) for path in train for other in twins.get(first.get(path, path), [])]


def same_files(paths):
    """Lists of two or more files that are the same byte for byte. Only files of equal size are read, and in full only
    where their first 4 KiB agree.
    """

    def read(path, most=-1):
        try:
            with open(path, "rb") as file:
                return hashlib.sha256(file.read(most)).digest()
        except OSError:
            return path  # like no other; decoding will name it

    def size_of(path):
        size = os.path.getsize(path) if os.path.exists(path) else 0
        return size or path  # nor is an empty file the same picture as another

    def start_of(path):
        return read(path, 4096)

    groups = [list(dict.fromkeys(paths))]
    for key in (size_of, start_of, read):  # each looks only at the files that the one before has left
        groups = [alike for group in groups for alike in _by(key, group) if len(alike) > 1]
    return groups


def fingerprint(images):
    """What a run learns from, in a few words: which pictures are in train and val and in which class, by file name; the
    same when the folder has moved, to another file system, too. The test split may change: nothing is learned from it.
    """
    names = [(s, images.classes[y], nfc(Path(p).name)) for s in ("train", "val") for p, y in images.splits[s]]
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


# ---- the walk of one image: decode, augment


def decode(path, size=None, white=None):
    """Read a picture as a PIL image in mode RGB, upright.

    size: pixels that the shorter side must keep at least; a JPEG is decoded at a half, a quarter or an eighth of its
    size where that is enough (much faster for a 12-megapixel photograph). EXIF orientation is applied; transparent
    parts become white; of several frames or pages the first is taken. What else a file says about itself and Pillow
    cannot read (EXIF, XMP, colour profiles, texts) is passed over.

    white: which number is white in grey of more than 8 bits; those above become white, those below 0 and NaN black.
    None: the largest of the file's bits, 65535 of 16. Never the largest of a picture, which would make one number
    another grey in each. Floats and 32-bit integers have no such number: without `white` that is a DataError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about corners of a file that do not matter to the pixels
        try:
            return _decode(path, size, white)
        except DataError:
            raise
        except Exception as error:  # Pillow raises many kinds
            try:
                return _decode(io.BytesIO(_without_metadata(path)), size, white)
            except DataError:
                raise
            except Exception:  # it is not for these that it cannot be read
                raise error from None


# EXIF's numbers of how a picture is stored, and the way back.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def _decode(file, size, white):
    with Image.open(file) as image:
        if size is not None:
            image.draft("RGB", (size, size))
        of_the_file = _white_of(image)
        image.load()
        try:
            way = UPRIGHT.get(image.getexif().get(0x0112))
        except Exception:  # Pillow raises many kinds; the pixels are there
            way = None
        picture = _to_rgb(image, of_the_file, white)
    return picture if way is None else picture.transpose(way)


def _is_deep(image):
    """Is it grey of more than 8 bits? (Colours of 16 bits are cut to 8 by Pillow itself.)"""
    return image.mode.startswith("I") or image.mode == "F"


def _white_of(image):
    """The number that is white in grey of more than 8 bits, by the file's format; None if that does not say it. To be
    asked before the pixels are loaded.
    """
    if not _is_deep(image) or image.mode == "F":
        return None
    if image.format == "FITS":
        raise DataError("the integers of a FITS file have an offset that Pillow leaves out: save it as a 16-bit TIFF")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose 16 bits may come as "I"
        return None
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (16,))[0]
    elif image.format == "JPEG2000":
        place = image.fp.tell()
        image.fp.seek(0)
        bits = (image.fp.read().partition(b"\xff\x4f\xff\x51")[2][38] & 127) + 1  # behind the mark of the pixels
        image.fp.seek(place)
    elif image.format == "PPM" and image.tile[0][0].startswith("ppm"):
        return image.tile[0][3][-1]  # any number
    return 2**bits - 1


def _levels(image, of_the_file):
    """The numbers of grey of more than 8 bits, float64 (H, W), as the file has them. of_the_file: from `_white_of`."""
    levels = np.array(image, dtype=np.float64)
    if of_the_file and image.format in ("JPEG2000", "PPM"):  # Pillow makes 65535 of their white
        levels *= of_the_file / 65535
    if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 1:  # they have no sign
        levels[levels < 0] += 2**32
    levels[np.isnan(levels)] = 0
    return levels


def _to_rgb(image, of_the_file, white):
    if _is_deep(image):
        levels = _levels(image, of_the_file)
        if not (white or of_the_file):
            most = levels[np.isfinite(levels)].max(initial=0)
            kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
            raise DataError(f"its grey levels are {kind}, up to {most:.6g}: say which level is white, such as --white "
                            f"{_likely_white(most)} in training")
        grey = (levels / (white or of_the_file) * 255).round().clip(0, 255)
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is zero; Pillow knows that of 8 bits alone
            grey = 255 - grey
        clear = image.info.get("transparency")  # a 16-bit PNG names one transparent grey at most
        if isinstance(clear, int):
            grey[levels == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _likely_white(most):
    """1, 3, 7, ... 255, ... 4095: the largest number of so many bits that `most` fits into, give or take a tenth."""
    return 2 ** max(1, math.ceil(most - 0.1)).bit_length() - 1


def _without_metadata(path):
    """The bytes of a PNG, JPEG or TIFF file without what does not decide about the pixels. The EXIF block of a PNG or
    JPEG stays: its orientation may be good.
    """
    content = Path(path).read_bytes()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(content)
    if content.startswith(b"\xff\xd8"):
        return _bare_jpeg(content)
    if content[:4] in (b"II*\0", b"MM\0*"):
        return _bare_tiff(content)
    raise OSError("of other formats no such parts are known")


def _bare_png(content):
    """Header, palette, transparent colour, EXIF and pixels."""
    kept, place, colour = [content[:8]], 8, content[25]
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        chunk, place = content[place : place + length + 12], place + length + 12
        intact = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        clear = name == b"tRNS" and (length <= 256 if colour == 3 else length == {0: 2, 2: 6}.get(colour))
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or intact and (clear or name == b"eXIf"):
            kept.append(chunk)
    return b"".join(kept)


def _bare_jpeg(content):
    """Without comments and the parts of applications, but for EXIF and Adobe's, which tells how colours are stored."""
    kept, place = [content[:2]], 2
    while content[place + 1] != 0xDA:  # the pixels begin
        marker, length = struct.unpack_from(">HH", content, place)
        segment, place = content[place : place + length + 2], place + length + 2
        of_application = 0xFFE0 <= marker <= 0xFFEF or marker == 0xFFFE
        if not of_application or segment[4:10] == b"Exif\0\0" or marker == 0xFFEE and segment[4:9] == b"Adobe":
            kept.append(segment)
    return b"".join([*kept, content[place:]])


def _bare_tiff(content):
    """The first page, with the tags alone that say where its pixels are and what they mean."""
    order = "<" if content.startswith(b"II") else ">"
    start = struct.unpack_from(f"{order}I", content, 4)[0]
    count = struct.unpack_from(f"{order}H", content, start)[0]
    entries = [content[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    wanted = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 332, 338,
              339, 347, *range(529, 533)}
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in wanted]
    one_number = struct.pack(f"{order}HHI", 274, 3, 1)  # as an orientation has to be
    kept = [entry for entry in kept if entry[:2] != one_number[:2] or entry[:8] == one_number]
    page = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + b"\0\0\0\0"
    return content[:start] + page + content[start + len(page) :]


AUGMENT = ("none", "light", "standard", "strong")
RESIZE = ("crop", "squash", "pad")


def train_transform(image_size, augment="standard", interpolation="bilinear", resize_size=None, resize="crop",
                    flip=True):
    """Augmentation of a uint8 tensor (3, H, W) to (3, image_size, image_size), of a level in `AUGMENT`.

    "none": as `eval_transform`. "light": a random crop of 80 to 100 % of the largest centred square, nearly square, and
    a horizontal flip. "standard": a random crop of 35 to 100 % of the picture's area, 3:4 to 4:3, and the flip (Szegedy
    et al., "Going Deeper with Convolutions", 2014, with a larger smallest crop). "strong": standard, then one operation
    on colour or geometry, of random strength (Müller and Hutter, "TrivialAugment", 2021), and in one picture of four a
    black rectangle (Zhong et al., "Random Erasing Data Augmentation", 2017). Raises DataError.

    resize: as in `eval_transform`: with "squash" and "pad" the whole picture is first made a square, twice as large,
    and what is cropped is that. flip: whether half of the pictures are mirrored; False where left and right differ.
    """
    if augment not in AUGMENT:
        raise DataError(f"no such augmentation: {augment}; there are {', '.join(AUGMENT)}")
    if augment == "none":
        return eval_transform(image_size, interpolation, resize_size, resize)
    scale, ratio = ((0.8, 1.0), (0.9, 1.11)) if augment == "light" else ((0.35, 1.0), (3 / 4, 4 / 3))
    steps = [v2.RandomResizedCrop(image_size, scale, ratio, InterpolationMode(interpolation), antialias=True)]
    if resize != "crop":
        steps.insert(0, eval_transform(2 * image_size, interpolation, resize=resize))
    elif augment == "light":
        steps.insert(0, _centre_square)
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment == "strong":
        steps += [v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), v2.RandomErasing(p=0.25)]
    return v2.Compose(steps)


def _centre_square(image):
    """Without it, no nearly square crop has 80 % of a 3:2 photograph, and RandomResizedCrop always takes the centre."""
    return v2.functional.center_crop(image, [min(image.shape[-2:])])


def augmentation(preprocessing, augment="standard"):
    """`train_transform` by a dict with image_size, interpolation, resize_size, and maybe resize and flip."""
    p = {"resize": "crop", "flip": True} | preprocessing
    return train_transform(p["image_size"], augment, p["interpolation"], p["resize_size"], p["resize"], p["flip"])


def eval_transform(image_size, interpolation="bilinear", resize_size=None, resize="crop"):
    """A uint8 tensor (3, H, W) to (3, image_size, image_size), by one of the ways in `RESIZE`. Raises DataError.

    "crop": resize the shorter side to `resize_size` (default: image_size * 256 / 224) and cut out the centre. "squash":
    the whole picture, whatever its shape, becomes the square. "pad": the whole picture fits into the square, in its own
    shape, and the rest is black.
    """
    if resize not in RESIZE:
        raise DataError(f"no such way to resize: {resize}; there are {', '.join(RESIZE)}")
    how = {"interpolation": InterpolationMode(interpolation), "antialias": True}
    if resize == "squash":
        return v2.Compose([v2.Resize((image_size, image_size), **how)])
    if resize == "pad":
        return v2.Compose([functools.partial(_fit, image_size, how), v2.CenterCrop(image_size)])  # which adds black
    larger = v2.Resize(resize_size or round(image_size * 256 / 224), **how)
    return v2.Compose([_centre_part, larger, v2.CenterCrop(image_size)])


def _centre_part(image):
    """At most 8 times as long as wide: resized as it is, a picture of 1 x 600000 pixels would fill 100 GB."""
    return v2.functional.center_crop(image, [min(side, 8 * min(image.shape[-2:])) for side in image.shape[-2:]])


def _fit(side, how, image):
    """The longer side becomes `side` pixels, the shorter one as many as its share, and one at least."""
    longest = max(image.shape[-2:])
    return v2.functional.resize(image, [max(1, side * length // longest) for length in image.shape[-2:]], **how)


# ---- what is said about it before a run


def describe_views(pictures, preprocessing, augment):
    """Lines on how the pictures of an ImageList are seen in training: the steps of its transform, of the level
    `augment`, and hints from a look at a few pictures. preprocessing: a dict with image_size, resize and white. Raises
    DataError if one of them cannot be read for want of what is white (and the list does not skip such pictures): now
    and not in the middle of an epoch.
    """
    paths = [path for path, *_ in pictures.samples]
    if not preprocessing["white"] and pictures.on_bad_image == "error":
        for path in _few(paths):
            if _lacks_white(path):
                bad = pictures[paths.index(path)]
                raise DataError(f"cannot read {bad.path} ({bad.reason})")
    hints = hints_about(paths, preprocessing["white"], preprocessing["resize"])
    size = preprocessing["image_size"]
    with torch.random.fork_rng(devices=[]):
        height, width = pictures.transform(torch.full((3, 2 * size, 2 * size), 128, dtype=torch.uint8)).shape[-2:]
    if (height, width) != (size, size):
        hints.append(f"hint: the augmentation gives {height} x {width} pixels, and validation {size} x {size}")
    return "\n".join([describe_augment(pictures.transform, augment), *hints])


def _few(paths):
    """Up to 64 of them, evenly spread: in a folder, those of a class stand together."""
    return paths[:: max(1, math.ceil(len(paths) / 64))]


def _lacks_white(path):
    """Does it need a `white` to be decoded?"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                return _is_deep(image) and _white_of(image) is None
        except Exception:  # decoding will name it
            return False


def describe_augment(transform, augment):
    """A line with the random steps of a transform, of the level `augment`, and how to leave out the flip, if any."""
    names = [type(step).__name__ for step in getattr(transform, "transforms", [transform])]
    words = [STEPS.get(name, name) for name in names if name not in FIXED]
    way_out = "; --no-flip where left and right differ" if "RandomHorizontalFlip" in names else ""
    return f"augment: {augment}" + (f" ({', '.join(words)}{way_out})" if words else "")


FIXED = ("Compose", "Resize", "CenterCrop", "function", "partial")
STEPS = {"RandomResizedCrop": "random crop", "RandomHorizontalFlip": "horizontal flip", "RandomErasing": "holes",
         "TrivialAugmentWide": "colours, rotations or distortions"}


def hints_about(paths, white=None, resize="crop"):
    """Lines about levels and shapes that a network would see little of, by the headers of a few of the files and the
    pixels of up to 16 of more than 8 bits.
    """
    shapes, grey, colours = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in _few(paths):
            with contextlib.suppress(Exception), Image.open(path) as image:  # decoding will name it
                shapes.append(max(image.size) / min(image.size))
                if _is_deep(image) and len(grey) < 16:
                    of_the_file = _white_of(image)
                    levels = _levels(image, of_the_file)
                    scale = white or of_the_file
                    grey.append((levels.max(), levels.max() / scale, (levels > scale).mean()))
                elif ";16" in str(image.tile) and len(colours) < 16:
                    colours.append(max(high for _, high in image.convert("RGB").getextrema()))
    lines = []
    if grey:
        most, shares, clipped = max(level for level, _, _ in grey), [s for _, s, _ in grey], [c for _, _, c in grey]
        likely = _likely_white(most)
        if 0 < max(shares) < 1 / 16 and likely < most / max(shares):
            lines.append("hint: grey levels of more than 8 bits stay below a sixteenth of white here "
                         f"({most:.6g} at most): if {likely} is white in them, train with --white {likely}")
        if min(clipped) > 0.5:
            lines.append(f"hint: more than half of each picture is above --white {white:g} and so white, since grey "
                         f"levels go up to {most:.6g}: is it --white {likely}?")
    if colours and max(colours) < 16:
        lines.append("hint: 16-bit colours stay below a sixteenth of white here, and Pillow keeps the upper 8 of 16 "
                     "bits: write the pictures with 8 bits, divided by what is white in them")
    median = sorted(shapes)[len(shapes) // 2] if shapes else 1
    if resize == "crop" and median >= 2:
        lines.append(f"hint: half of the pictures are {median:.1f} times as long as wide or more, and only a square of "
                     "them is seen: train with --resize squash or pad to see the whole")
    return lines


BadImage = namedtuple("BadImage", "path reason")


class ImageList(Dataset):
    """Pictures and labels. Asked for (epoch, index), it decodes picture `index` and augments it with random numbers
    drawn from (seed, epoch, index); a plain index means epoch 0. Returns (uint8 tensor, label), or a BadImage for a
    file that cannot be read: an exception in a worker would arrive as thirty lines of traceback.

    samples: [(path, label), ...]. transform: takes and returns a uint8 tensor (3, H, W). size, white: see `decode`.
    on_bad_image: what reading on does at a BadImage, see `batches`: "error" or "skip", which notes it in `skipped`,
    {file: what is wrong with it}.
    """

    def __init__(self, samples, transform, seed=0, size=None, on_bad_image="error", white=None):
        self.samples, self.transform, self.seed, self.size, self.white = samples, transform, seed, size, white
        self.on_bad_image, self.skipped = on_bad_image, {}

    def __len__(self):
        return len(self.samples)

    def labels(self):
        return torch.tensor([label for _, label in self.samples])

    def numbered(self):
        """The same pictures, with their places in the list as labels."""
        samples = [(path, number) for number, (path, _) in enumerate(self.samples)]
        same = ImageList(samples, self.transform, self.seed, self.size, self.on_bad_image, self.white)
        same.skipped = self.skipped  # what has been said is not said again
        return same

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label = self.samples[index]
        try:
            image = decode(path, self.size, self.white)
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

    arrange: a function (order, sizes, epoch) that puts the order of an epoch, a list of places, into another one, which is
    then cut into batches of these sizes: a text.ByLength, say.
    """

    def __init__(self, length, batch_size, seed=0, shuffle=False, epoch=0, rank=0, processes=1, pad=False, arrange=None):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.set_epoch(epoch)
        self.rank, self.processes, self.pad, self.arrange = rank, processes, pad, arrange

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
        return SeededBatches(self.length, self.batch_size, self.seed, self.shuffle, epoch, self.rank, self.processes,
                             arrange=self.arrange)

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
        if self.arrange:
            order = self.arrange(list(order), self.sizes(), self.epoch)
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


def make_loader(dataset, order, workers=0, pin_memory=False, collate_fn=collate):
    """A DataLoader over the batches of `order` (a SeededBatches). collate_fn: makes a batch (x, y, [BadImage, ...])."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_live_and_die_with_the_script,
        generator=torch.Generator(),  # else each epoch draws from the global one, and dropout depends on it
    )


def eval_loader(samples, preprocessing, batch_size, workers=0, rank=0, processes=1, on_bad_image="error"):
    """A DataLoader over the pictures of [(path, ...), ...] in their order, as they are evaluated: `eval_transform`.
    Beside each picture it has no label but its number, its place in that list: with on_bad_image "skip", or when
    several processes read a share each, it says which picture an output is of.

    preprocessing: a dict with image_size, resize_size, interpolation, and maybe resize and white.
    """
    size, white = preprocessing["image_size"], preprocessing.get("white")
    order = SeededBatches(len(samples), batch_size, rank=rank, processes=processes)
    numbered = [(path, number) for number, (path, *_) in enumerate(samples)]
    plain = augmentation(preprocessing, "none")
    pictures = ImageList(numbered, plain, size=2 * size, on_bad_image=on_bad_image, white=white)
    return make_loader(pictures, order, workers)


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


Batch = namedtuple("Batch", "x y samples number")
Batch.__doc__ = """x, y: as from `batches`. samples: how many of them count: all, or 0 where they are padding. number: its
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
    # Of pictures in 0..1, those of the training alone would go on without being normalized.
    if x.is_floating_point() and x.ndim == 4 and x.shape[1] == 3:
        raise DataError(f"pictures have come as {x.dtype}: leave ToDtype and Normalize out of your augmentation, which "
                        "must give uint8: all pictures are normalized here")
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


def unreadable_files(paths, workers=0, progress=iter, white=None):
    """{file: what is wrong with it} for the pictures that cannot be decoded. progress: wraps the batches, like tqdm."""
    samples = [(path, 0) for path in paths]
    # Decoded whole; what is handed on is small.
    pictures = ImageList(samples, v2.Resize((8, 8)), on_bad_image="skip", white=white)
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
    parser.add_argument("--white", type=float, metavar="VALUE", help="as in the training scripts")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.check):
        is_there = os.path.exists(args.check)
        parser.error(f"{args.check} is a file, not a folder" if is_there else f"no such folder: {args.check}")
    try:
        tree = look_into(args.check)
    except DataError as error:
        parser.error(_one_line(str(error)))
    paths = _pictures_in(tree)
    if not paths:
        parser.error(_one_line(f"{args.check} holds no pictures{_instead(tree)}"))

    def progress(found):
        return tqdm(found, "check", len(SeededBatches(len(paths), 16)), leave=False, disable=None)

    try:
        bad = unreadable_files(paths, max(0, args.workers), progress, args.white)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    lines = [" ".join(f"cannot read {path} ({reason})".splitlines()) for path, reason in bad.items()]
    lines += hints_about(paths, args.white, resize="squash")
    ignored = _ignored_in(tree)
    passed_over = f"; passed over: {kinds(ignored)}" if ignored else ""
    lines.append(f"{len(paths)} pictures, {len(bad)} that cannot be read{passed_over}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any bytes
    try:
        print("\n".join(lines), flush=True)
    except OSError:  # nobody reads it any more, as behind `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
