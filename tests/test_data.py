import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import data
from conftest import ROOT, draw, draw_folder


def names(images, split):
    return sorted(os.path.relpath(p).split(os.sep)[-1] for p, _ in images.splits[split])


def test_find_images_with_splits(pictures):
    images = data.find_images(pictures)
    assert images.classes == ["cat", "dog"]
    assert {s: data.counts(images, s) for s in images.splits} == {"train": [10, 10], "val": [4, 4], "test": [3, 3]}
    assert all(f"{os.sep}{images.classes[y]}{os.sep}" in p for found in images.splits.values() for p, y in found)


def test_one_folder_is_split_the_same_way_on_every_run_and_place(tmp_path):
    draw_folder(tmp_path, a=20)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = data.find_images(tmp_path / "a", 0.25), data.find_images(tmp_path / "b", 0.25)
    assert data.counts(first, "train") == [15, 15] and data.counts(first, "val") == [5, 5]
    assert names(first, "val") == names(moved, "val") and not set(names(first, "val")) & set(names(first, "train"))
    assert data.fingerprint(first) == data.fingerprint(moved)
    before = set(names(first, "val"))
    draw(tmp_path / "a/cat/new.png", "cat", 1)
    assert len(before - set(names(data.find_images(tmp_path / "a", 0.25), "val"))) <= 1
    assert data.fingerprint(first) != data.fingerprint(data.find_images(tmp_path / "a", 0.25))


def test_names_that_are_not_utf8(tmp_path):
    draw_folder(tmp_path, a=4)
    os.rename(os.fsencode(tmp_path / "a/cat/cat.0.png"), os.fsencode(tmp_path / "a/cat") + b"/caf\xe9.png")
    images = data.find_images(tmp_path / "a", 0.25)
    assert data.counts(images, "train") == [3, 3] and "train 6, val 2" in data.fingerprint(images)


def test_train_without_val_is_split(tmp_path):
    images = data.find_images(draw_folder(tmp_path, train=10, test=2))
    assert {s: data.counts(images, s) for s in images.splits} == {"train": [8, 8], "val": [2, 2], "test": [2, 2]}


def test_walks_down_and_passes_over_what_is_no_picture(tmp_path):
    draw_folder(tmp_path, train=2, val=1)
    draw(tmp_path / "train/cat/deeper/still/x.JPG", "cat", 1)
    for name in ("notes.txt", "Thumbs.db", "._cat.0.png", ".DS_Store"):
        (tmp_path / "train/cat" / name).write_bytes(b"x")
    (tmp_path / "train/.cache").mkdir()
    images = data.find_images(tmp_path)
    assert data.counts(images, "train") == [3, 2]
    assert images.ignored == Counter({".txt": 1, "train/cat/._*": 1})
    assert "note: passed over what is no picture: 1 .txt" in data.describe(images).splitlines()


def test_a_folder_that_must_not_be_looked_into(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)  # root may look into any
    with pytest.raises(data.DataError, match=f"cannot look into {tmp_path} .Permission denied"):
        data.find_images(tmp_path)


def test_links_that_lead_back_up(tmp_path):
    draw_folder(tmp_path, train=2, val=1)
    for name in ("again", "twice"):
        os.symlink(tmp_path / "train/cat", tmp_path / "train/cat" / name)
    os.symlink("itself", tmp_path / "train/cat/itself")
    assert data.counts(data.find_images(tmp_path), "train") == [2, 2]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(tmp_path, name):
    images = data.find_images(draw_folder(tmp_path, train=3, **{name: 2}))
    assert data.counts(images, "train") == [3, 3] and data.counts(images, "val") == [2, 2]
    draw_folder(tmp_path, extra=1)
    assert "not used: extra/ (2)" in data.describe(data.find_images(tmp_path))


def wrong_folders(root, case):
    draw_folder(root, train=2, val=2)
    if case == "missing":
        return root / "nowhere"
    if case == "file":
        return root / "train/cat/cat.0.png"
    if case == "no class folders":
        shutil.rmtree(root / "train/cat"), shutil.rmtree(root / "train/dog")
    elif case == "empty class":
        (root / "train/bird").mkdir()
    elif case == "one class":
        shutil.rmtree(root / "train/cat"), shutil.rmtree(root / "val/cat")
    elif case == "different classes":
        shutil.move(root / "val/dog", root / "val/wolf")
    elif case == "misnamed splits":
        (root / "train").rename(root / "learn"), (root / "val").rename(root / "Val")
    elif case == "one picture":
        shutil.rmtree(root / "val"), (root / "train/dog/dog.0.png").unlink()
    return root


@pytest.mark.parametrize("case, words", [
    ("missing", "no such folder: .*nowhere"), ("file", "is a file, not a folder: give the folder"), ("no class folders", "no class folders in .*train"),
    ("empty class", "bird holds no pictures"), ("one class", r"one class only \('dog'\)"),
    ("different classes", "val holds classes that .*train lacks: wolf"), ("one picture", "one picture only"),
    ("misnamed splits", "holds Val/ but no train/: name"),
])
def test_folders_that_cannot_be_used(tmp_path, case, words):
    with pytest.raises(data.DataError, match=words):
        data.find_images(wrong_folders(tmp_path, case))


def test_describe_hints_at_imbalance(tmp_path, pictures):
    assert "hint" not in data.describe(data.find_images(pictures))
    draw_folder(tmp_path, train=2, val=1)
    for i in range(10):
        draw(tmp_path / f"train/dog/more{i}.png", "dog", i)
    text = data.describe(data.find_images(tmp_path))
    assert "'dog' has 6.0 times as many training pictures as 'cat'" in text and "--class-weights balanced" in text
    assert text.splitlines()[2].split() == ["dog", "12", "1"]


def test_find_duplicates(tmp_path):
    draw_folder(tmp_path, train=3, val=2, test=2)
    assert data.find_duplicates(data.find_images(tmp_path).splits) == []
    shutil.copy(tmp_path / "train/cat/cat.1.png", tmp_path / "test/dog/copy.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "val/dog/broken.png")  # named when it is decoded, no matter here
    # of the same size and start, but different behind it
    for split, end in (("train", b"a"), ("val", b"b")):
        (tmp_path / split / "cat/long.png").write_bytes(b"x" * 5000 + end)
    pairs = data.find_duplicates(data.find_images(tmp_path).splits)
    assert pairs == [(str(tmp_path / "train/cat/cat.1.png"), str(tmp_path / "test/dog/copy.png"))]


# ---- layouts as people have them


def lay_out(root, *places):
    """lay_out(root, ("train/cat", 3), "notes.txt"): three small files 0.png, 1.png, 2.png in train/cat, each of its own
    content; and a file of that name. No pictures: nothing decodes them here."""
    for place in places:
        place, count = place if isinstance(place, tuple) else (place, None)
        folder = root / (place if count is not None else os.path.dirname(place))
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count or 0):
            (folder / f"{i}.png").write_bytes(f"{place} {i}".encode())
        if count is None:
            (root / place).write_bytes(place.encode())
    return root


def each(count, *paths):
    return [(path, count) for path in paths]


SPLIT = each(4, "train/a", "train/b") + each(2, "val/a", "val/b")
CLASSES = each(5, "a", "b")
E_ACUTE, E_AND_ACCENT = "\u00e9", "e\u0301"  # the same letter in NFC and in NFD
NO_LABELS = "note: test/ has no labels, so there is no test split: 3 pictures in no class folders; once trained: " \
            "python predict.py --checkpoint .../best.pt {root}/test"


# what lies there: {split: pictures per class}, the lines that are said (as a whole, or up to "...")
LAYOUTS = {
    "split": (SPLIT, {"train": [4, 4], "val": [2, 2]}, []),
    "classes": (CLASSES, {"train": [4, 4], "val": [1, 1]}, []),
    # names of splits
    "nested once more": (
        each(5, "training_set/training_set/a", "training_set/training_set/b") + each(3, "test_set/test_set/a"),
        {"train": [4, 4], "val": [1, 1], "test": [3, 0]},
        ["note: read training_set/training_set as train, test_set/test_set as test",
         "note: test_set/ has no pictures of b: trained, but not scored"]),
    "words": (
        each(5, "seg_train/a", "seg_train/b") + each(3, "seg_test/a", "seg_test/b") + each(7, "seg_pred/seg_pred"),
        {"train": [4, 4], "val": [1, 1], "test": [3, 3]},
        ["note: read seg_train as train, seg_test as test",
         "warning: 7 pictures in folders that are no split and no class, not used: seg_pred/ (7)"]),
    "years": (each(4, "train2017/a", "train2017/b") + each(2, "val2017/a", "val2017/b"),
              {"train": [4, 4], "val": [2, 2]}, ["note: read train2017 as train, val2017 as val"]),
    "capitals": (each(4, "TRAINING/a", "TRAINING/b") + each(2, "Val/a", "Val/b", "myTestData/a", "myTestData/b"),
                 {"train": [4, 4], "val": [2, 2], "test": [2, 2]},
                 ["note: read TRAINING as train, Val as val, myTestData as test"]),
    "the plain name wins": (SPLIT + each(3, "train_masks/a") + each(1, "dev"), {"train": [4, 4], "val": [2, 2]},
                            ["warning: 4 pictures in folders that are no split and no class, not used: dev/ (1), train_masks/ (3)"]),
    "words within words": (each(5, "constrain", "protested", "testudo", "trainer", "validity"),
                           {"train": [4] * 5, "val": [1] * 5}, []),
    "a class named train": (each(5, "bus", "car", "train"), {"train": [4, 4, 4], "val": [1, 1, 1]},
                            ["note: read as classes, though named like splits: train"]),
    "classes named like splits, in train/": (each(5, "train/negative_test", "train/test", "train/valid"),
                                             {"train": [4] * 3, "val": [1] * 3},
                                             ["note: read as classes, though named like splits: negative_test, test, valid"]),
    # splits that lack something
    "val lacks a class": (SPLIT + each(3, "train/rare"), {"train": [4, 4, 3], "val": [2, 2, 0]},
                          ["note: val/ has no pictures of rare: trained, but not scored"]),
    "val has an empty folder": (SPLIT + each(3, "train/rare") + each(0, "val/rare"), {"train": [4, 4, 3], "val": [2, 2, 0]},
                                ["note: val/ has no pictures of rare: trained, but not scored"]),
    "test without labels": (SPLIT + each(3, "test"), {"train": [4, 4], "val": [2, 2]}, [NO_LABELS]),
    "test/test": (SPLIT + each(3, "test/test"), {"train": [4, 4], "val": [2, 2]}, [NO_LABELS]),
    "test/unknown": (SPLIT + each(2, "test/unknown") + each(1, "test"), {"train": [4, 4], "val": [2, 2]}, [NO_LABELS]),
    "test/ is empty": (SPLIT + each(0, "test"), {"train": [4, 4], "val": [2, 2]},
                       ["note: test/ has no labels, so there is no test split: it holds no pictures"]),
    # what is not used, and what lies deeper
    "above": (SPLIT + each(2, "", "train") + each(1, "val"), {"train": [4, 4], "val": [2, 2]},
              ["warning: 5 pictures above the class folders, in no class, not used: 0.png, 1.png, 0.png, 1.png, 0.png"]),
    "beside": (SPLIT + each(2, "a", "more/deep") + each(0, "docs"), {"train": [4, 4], "val": [2, 2]},
               ["warning: 4 pictures in folders that are no split and no class, not used: a/ (2), docs/ (0), more/ (2)"]),
    "beside, without pictures": (SPLIT + ["docs/x.txt"], {"train": [4, 4], "val": [2, 2]},
                                 ["note: 0 pictures in folders that are no split and no class, not used: docs/ (0)",
                                  "note: passed over what is no picture: 1 .txt"]),
    "deeper": (each(5, "a/images", "b/images/more"), {"train": [4, 4], "val": [1, 1]},
               ["note: 10 pictures deeper than a class folder, used like the others in it: a/images/ (5), b/images/ (5)"]),
    "one class has masks": (CLASSES + each(5, "a/masks"), {"train": [8, 4], "val": [2, 1]},
                            ["note: 5 pictures deeper than a class folder, used like the others in it: a/masks/ (5)"]),
    "hidden": (CLASSES + each(3, ".net", "a/.old/older") + ["a/.x.png", "b/.y.png", "b/.z.png", ".gitignore"],
               {"train": [4, 4], "val": [1, 1]},
               ["note: 9 pictures hidden, not used (a name without the dot would be): .net/ (3), a/.old/ (3), a/.* (1), b/.* (2)"]),
    "by-products": (
        CLASSES + each(1, "__MACOSX/a", "@eaDir", "a/.ipynb_checkpoints", "$RECYCLE.BIN/S-1", "System Volume Information",
                         "lost+found", ".Trash-1000/files", "b/#recycle", ".git", "b/@Recycle")
        + ["b/Thumbs.db", "a/desktop.ini", "a/.DS_Store", "a/._0.png", "a/._1.png"],
        {"train": [4, 4], "val": [1, 1]},
        ["note: 12 pictures among by-products of other programs, not used: $RECYCLE.BIN/ (1), .Trash-1000/ (1), .git/ (1), "
         "@eaDir/ (1), System Volume Information/ (1) and 6 more"]),
    "runs": (
        CLASSES + ["runs/train_classifier/1/args.json", "runs/train_classifier/1/curves.png", "mine/last.pt", "mine/own.png",
                   "mine/best.pt", "mine/args.json", "out/x/best.pt", "out/x/mistakes.png", "early/args.json", "b/best.pt"],
        {"train": [4, 4], "val": [1, 1]},
        ["note: 3 pictures in folders of runs of these scripts, not used: early/ (0), mine/ (1), out/ (1), runs/ (1)",
         "note: passed over what is no picture: 1 .pt"]),
    "a class of a best.pt alone": (CLASSES + ["bird/best.pt"], {"train": [4, 4], "val": [1, 1]},
                                   ["note: 0 pictures in folders of runs of these scripts, not used: bird/ (0)"]),
    "a class named runs": (each(5, "runs/fast", "walks"), {"train": [4, 4], "val": [1, 1]},
                           ["note: 5 pictures deeper than a class folder, used like the others in it: runs/fast/ (5)"]),
    "extensions": (
        CLASSES + [f"a/x.{i}y" for i in range(12)] + ["a/x.TXT", "b/x.txt", "labels.csv", "README"],
        {"train": [4, 4], "val": [1, 1]},
        ["note: passed over what is no picture: 2 .txt, 1 without an extension, 1 .csv, 1 .0y, 1 .10y, 1 .11y, 1 .1y, 1 .2y "
         "and 7 more kinds (7 files)"]),
    "capitals alone": (each(5, "Cat", "cat", "dog"), {"train": [4] * 3, "val": [1] * 3},
                       ["warning: classes whose names differ in capital letters, blanks, _ or - alone: Cat, cat"]),
    "names that people take for one": (each(5, "my cat", "my_cat", "my-cat", "c", "c++", "1", "-1"), {"train": [4] * 7, "val": [1] * 7},
                                       ["warning: classes whose names differ in capital letters, blanks, _ or - alone: my cat, my-cat, my_cat"]),
    "files that are not there": (CLASSES + ["a/.x.jpg.icloud", "b/.y.JPG.icloud"], {"train": [4, 4], "val": [1, 1]},
                                 ["note: passed over what is no picture: 2 .icloud"]),
    "a class in itself": (each(5, "a/a", "b"), {"train": [4, 4], "val": [1, 1]},
                          ["note: 5 pictures deeper than a class folder, used like the others in it: a/a/ (5)"]),
    "versions of one original, kept together": (
        [f"{split}/{name}/{split}_jpg.rf.{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(3)],
        {"train": [3, 3], "val": [3, 3]}, []),
    "versions of one original": (
        [f"{name}/{i}_jpg.rf.{version}.jpg" for name in "ab" for i in range(3) for version in range(5)]
        + [f"c/c_original_{i}.png_{version}.JPEG" for i in range(3) for version in range(5)],
        {"train": [12] * 3, "val": [3] * 3}, ["warning: versions of ..."]),
    "masks by name": (CLASSES + [f"a/{i}_mask.png" for i in range(4)] + ["a/4_mask_1.png"] + ["b/thumb-0.png", "b/thumb-1.png", "b/1 (2).png"],
                      {"train": [8, 6], "val": [2, 2]},
                      ["warning: 5 pictures named like another one and '_mask' (0_mask.png and 0.png): used ...",
                       "warning: 2 pictures named like another one and 'thumb' (thumb-0.png and 0.png): used ..."]),
    "NFC": (each(4, f"train/caf{E_ACUTE}", "train/b") + each(2, f"val/caf{E_AND_ACCENT}", "val/b"),
            {"train": [4, 4], "val": [2, 2]}, []),
    "a line": (CLASSES + each(1, ".two\nlines"), {"train": [4, 4], "val": [1, 1]},
               ["note: 1 picture hidden, not used (a name without the dot would be): .two lines/ (1)"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_are_read(tmp_path, name):
    inside, expected, said = LAYOUTS[name]
    images = data.find_images(lay_out(tmp_path, *inside))
    assert {split: data.counts(images, split) for split in images.splits} == expected
    for path, label in (place for found in images.splits.values() for place in found):
        assert images.classes[label] in data.nfc(path).split(os.sep)
    lines = data.describe(images, hints=False).splitlines()[len(images.classes) + 2 :]
    assert len(lines) == len(said), lines
    for line, words in zip(lines, said, strict=True):
        words = words.format(root=tmp_path)
        assert line.startswith(words[:-3]) if words.endswith("...") else line == words


@pytest.mark.parametrize("inside, words", [
    # nobody but the user knows
    (each(3, "a/images", "a/masks", "b/images", "b/masks"), r"all hold pictures in images/, masks/: .*move the others away"),
    (CLASSES + each(3, "a/thumbs", "b/thumbs"), "all hold pictures in thumbs/, the class folder itself: "),
    (each(3, "train/a/x", "train/a/y", "train/b/x", "train/b/y", "train/b/z"), "train .a/, b/. all hold pictures in x/, y/"),
    (each(3, "learn/a", "learn/b", "check/a", "check/b"), "all hold pictures in a/, b/: .* as in train/cat$"),
    (each(3, "bottle/train", "bottle/test", "nut/train", "nut/test"), "bottle/test is named like a split: .*{root}/bottle"),
    # names of splits
    (CLASSES + each(3, "test"), r"holds test/ but no train/: .*move them into one folder train/, such as {root}/train/test$"),
    (each(3, "negative_test", "positive_test"), "holds negative_test/, positive_test/ but no train/"),
    (each(3, "cats_train", "dogs_train", "cats_val", "dogs_val"), "cats_train/, dogs_train/, and one at most can be the split train"),
    (each(3, "train_1/a", "train_1/b", "train_2/a", "train_2/b"), "train_1/, train_2/, and one at most can be the split train: name"),
    (SPLIT + each(3, "valid/a", "valid/b"), "holds val/, valid/, and one at most can be the split val"),
    (each(3, "steam_train/a", "steam_train/b", "bus/a", "bus/b"), "steam_train/, perhaps the split train, beside bus/"),
    (each(3, "train_val/a", "train_val/b", "Train/a", "Train/b"), "Train/, perhaps the split train, beside train_val/"),
    (each(3, "train", "car"), "holds train/, perhaps the split train, beside car/: .* such as {root}/train/train$"),
    (each(3, "train", "car", "bus", "val"), "train/, perhaps the split train, beside bus/, car/"),
    (each(3, "train", "test"), "no class folders in {root}/train, but 3 pictures right in it"),
    # one too high
    (each(3, "set/a", "set/b"), "holds set/ alone, and a/, b/ lie further down: type --data {root}/set$"),
    (each(3, "zip/set/a", "zip/set/b") + ["x.txt"], "further down: type --data {root}/zip/set$"),
    ([(f"my set/{place}", n) for place, n in SPLIT], "further down: type --data '{root}/my set'$"),
    ([(f"test_data/{place}", n) for place, n in SPLIT], "train/, val/ lie further down: type --data {root}/test_data$"),
    ([(f"train_data/{place}", n) for place, n in SPLIT], "train is named like a split: type --data {root}/train_data if"),
    (each(3, "train/images/a", "train/images/b"), "further down: move what {root}/train/images holds into {root}/train$"),
    (SPLIT + each(3, "test/images/a", "test/images/b"), "move what {root}/test/images holds into {root}/test$"),
    # classes
    (SPLIT + each(3, "val/wolf"), "{root}/val holds classes that {root}/train lacks: wolf; put pictures of them there"),
    (each(3, "train/a", "train/Dog", "val/dog "), "or is 'dog ' the same as 'Dog'. Then rename it"),
    (SPLIT + each(3, "test/x", "test/y"), "{root}/test holds classes that {root}/train lacks: x, y; put .* too, or remove test/$"),
    (SPLIT[:2] + each(3, "val"), "no class folders in {root}/val, but 3 pictures right in it: .*, or remove val/"),
    (SPLIT[:2] + each(0, "val/a"), r"no class folders in {root}/val .it is empty.: .*, or remove val/"),
    (each(1, "a") + each(3, "b"), "{root}/a holds one picture only: .*add a second one, or put .* into a folder val/ .* if that is no class, move it away$"),
    (each(5, "a", "b", "set/a", "set/b"), "{root}/set holds a/, b/ like {root} itself: if these are copies, move {root}/set away; if 'set' is"),
    (each(5, "train/a", "train/b", "train/all/b"), "{root}/train/all holds b/ like {root}/train itself"),
    (each(5, "train/images") + ["train/labels/0.txt"], "{root}/train holds one class only .'images'.: a classifier needs two folders of pictures"),
    (CLASSES + each(0, "c", "d", "e"), "class folder {root}/c holds no pictures .it is empty., nor do d/, e/: put"),
    (["code/x.py"] + each(3, "data/train/a", "data/train/b", "docs"), "data/train is named like a split: type --data {root}/data if"),
    (each(3, "set/set/train/a", "set/set/train/b", "test/test"), "holds test/ but no train/: type --data {root}/set/set, which holds one; else name"),
    (each(3, "lernen/a", "lernen/b", "pruefen/a", "pruefen/b"), "if these are the classes, name the folders above them train, val and test; "),
    (CLASSES + each(0, "c"), "class folder {root}/c holds no pictures .it is empty.: put some there, or take it out"),
    (CLASSES + ["c/0.tar", "c/1.tar", "c/.x.png"], "c holds no pictures .but 2 .tar, 1 in .\\*.: put some there"),
    (each(3, f"caf{E_ACUTE}", f"caf{E_AND_ACCENT}"), f"two folders named caf{E_ACUTE}, once in Unicode's form NFC"),
    # no pictures
    (["x.zip", "y.zip", ".hidden/a.png"], r"{root} holds no pictures .but 2 .zip, 1 in .hidden/."),
    ([], "{root} holds no pictures .it is empty."),
    (each(3, ""), "no class folders in {root}, but 3 pictures right in it: put the pictures of each class into a folder"),
])
def test_layouts_that_are_refused(tmp_path, inside, words):
    root = lay_out(tmp_path / "root", *inside, ("", 0))
    with pytest.raises(data.DataError, match=words.format(root=root)) as error:
        data.find_images(root)
    assert "\n" not in str(error.value)


def test_a_single_new_class_and_one_folder_too_high(tmp_path):
    lay_out(tmp_path, *each(3, "one/fox", "one/fox/deeper", "one/fox/more", "two/set/a", "two/set/b", "three/fox/images"))
    assert data.counts(data.find_images(tmp_path / "one", least=1), "train") == [7]
    assert data.counts(data.find_images(tmp_path / "three", least=1), "train") == [2]
    with pytest.raises(data.DataError, match="two/set; or, if 'set' is a class, put its pictures right into .*two/set$"):
        data.find_images(tmp_path / "two", least=1)


def test_versions_of_one_original_in_two_splits_are_counted(tmp_path):
    lay_out(tmp_path, *(f"{split}/{name}/{i}.jpg_{split}.jpg" for split in ("train", "val") for name in "ab" for i in range(3)))
    (tmp_path / "val/b/2.jpg_val.jpg").unlink()
    *_, line = data.describe(data.find_images(tmp_path)).splitlines()
    assert line.startswith("warning: versions of 5 pictures in training and in another split, by their names "
                           "(train/a/0.jpg_train.jpg and val/a/0.jpg_val.jpg): if ")


def test_a_link_that_leads_nowhere_may_have_been_a_class(tmp_path):
    os.symlink(tmp_path / "an_unmounted_disk/c", lay_out(tmp_path, *CLASSES) / "c")
    assert "note: passed over what is no picture: 1 dead link" in data.describe(data.find_images(tmp_path)).splitlines()


def test_empty_files_are_not_the_same_picture(tmp_path):
    lay_out(tmp_path, *SPLIT)
    for place in ("train/a", "train/b", "val/a"):
        (tmp_path / place / "empty.png").touch()
    assert len(data.describe(data.find_images(tmp_path)).splitlines()) == 4


def test_one_folder_too_low(tmp_path, monkeypatch):
    lay_out(tmp_path, *each(2, "my set/a", "my set/b", "my set/.c", "my set/d/deeper", "alone/a"), "my set/e/x.txt")
    words = r"no class folders in {}, but 2 pictures right in it: if it is a class itself, beside b/, type --data '{}/my set';"
    for place in (tmp_path / "my set/a", "."):
        with pytest.raises(data.DataError, match=words.format(place, tmp_path)):
            data.find_images(place)
        monkeypatch.chdir(tmp_path / "my set/a")
    with pytest.raises(data.DataError, match="alone/a, but 2 pictures right in it: put the pictures of each"):
        data.find_images(tmp_path / "alone/a")


def test_where_pictures_have_moved_to(tmp_path):
    with pytest.raises(data.DataError, match="no such folder: .*gone: .* where they are now: --data NEWPLACE"):
        data.find_images(tmp_path / "gone")


def test_the_same_file_in_two_classes(tmp_path):
    lay_out(tmp_path, *SPLIT)
    for split in ("train", "val"):
        shutil.copy(tmp_path / "train/a/0.png", tmp_path / split / "b/copy.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "train/a/copy.png")  # nobody minds
    lines = data.describe(data.find_images(tmp_path)).splitlines()[4:]
    assert lines == [
        "warning: 1 picture in two classes, byte for byte the same: a/0.png and b/copy.png: keep each in one of them",
        *(f"warning: the same picture twice, so the scores are too good: {tmp_path}/train/{x} and {tmp_path}/val/b/copy.png"
          for x in ("a/0.png", "b/copy.png"))]


def test_a_data_set_that_moves_to_another_file_system(tmp_path):
    """Its names in NFD, as macOS may have written them, or in NFC: the same classes, order, split and fingerprint."""
    found = []
    for e in (E_ACUTE, E_AND_ACCENT):
        root = lay_out(tmp_path / e.encode().hex(), *each(20, f"{e}t{e}", "eu", "f"))
        for i in range(20):
            (root / f"{e}t{e}" / f"{i}.png").rename(root / f"{e}t{e}" / f"{'fe'[i % 2]}{e}{i}.png")
        found.append(data.find_images(root))
    first, second = found
    assert first.classes == second.classes == ["eu", "f", f"{E_ACUTE}t{E_ACUTE}"]
    for split in ("train", "val"):
        assert [data.nfc(Path(p).name) for p, _ in first.splits[split]] == [data.nfc(Path(p).name) for p, _ in second.splits[split]]
    assert data.fingerprint(first) == data.fingerprint(second)
    assert all(os.path.exists(path) for path, _ in second.splits["train"])


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path):
    """Or their runs could not be resumed."""
    images = data.find_images(lay_out(tmp_path, *each(10, "cat/deeper", "dog") + each(3, "cat")))
    assert data.fingerprint(images) == "train 18, val 5, names d212561a"


ENDINGS = (".png", ".jpg")
NAMES = ["train", "Train", "training_set", "seg_train", "val", "val2017", "test", "testSet", "dev", "train_val", "constrain",
         "images", "masks", ".hidden", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "runs", "cat", "Cat", "fox", f"caf{E_ACUTE}",
         f"caf{E_AND_ACCENT}", "two\nlines", "set"]


def mutate(root, rng):
    """Change something in a folder of pictures at random: what is left of it is what a user may have."""
    folders = sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    folder, file = rng.choice([*folders, root]), rng.choice([*files, None])
    new = folder / rng.choice(NAMES)
    kind = rng.randrange(12)
    if kind == 0 and folder != root and not (folder.parent / new.name).exists():
        folder.rename(folder.parent / new.name)
    elif kind == 1 and folder not in (root, *root.iterdir()):
        for path in folder.iterdir():  # up
            if not (target := folder.parent / path.name).exists():
                path.rename(target)
    elif kind == 2 and not new.exists():  # down
        new.mkdir()
        for path in sorted(folder.iterdir()):
            if path != new and rng.random() < 0.7:
                path.rename(new / path.name)
    elif kind == 3 and file:
        file.rename(rng.choice([*folders, root]) / file.name)
    elif kind == 4 and file:
        shutil.copy(file, rng.choice([*folders, root]) / f"copy{rng.randrange(9)}.png")
    elif kind == 5 and file:
        file.rename(file.with_name(rng.choice([".", "._", "x_"]) + file.name))
    elif kind == 6 and file:
        file.rename(file.with_name(file.stem + rng.choice([".PNG", ".Jpg", ".txt", "", ".png.part", "_mask.png"])))
    elif kind == 7:
        lay_out(new, ("", rng.randrange(3)))
    elif kind == 8 and folder != root:
        shutil.rmtree(folder)
    elif kind == 9:
        lay_out(folder, *rng.sample(["notes.txt", "args.json", "best.pt", "curves.png", "Thumbs.db", "labels.csv"], 2))
    elif kind == 10 and not os.path.lexists(folder / "back"):
        os.symlink(rng.choice([root, folder]), folder / "back")
    elif kind == 11:
        for sibling in folder.parent.iterdir() if folder != root else ():
            if sibling.is_dir():
                lay_out(sibling / "masks", ("", 2))


@pytest.fixture
def quick_folder(tmp_path):
    """In memory where there is such a place: making and removing folders takes milliseconds each on some disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_mutated_folders_are_read_or_refused_and_every_picture_is_accounted_for(quick_folder):
    """Some hundred times: a good layout, changed at random. Either one line says what is wrong, or every picture that an
    independent walk finds is in a split or in the count of a printed line."""
    rng, outcomes = random.Random(0), Counter()
    starts = [lay_out(quick_folder / "0", *SPLIT, *each(2, "test/a", "test/b")),
              lay_out(quick_folder / "1", *each(3, "a", "b", "c"))]
    for number in range(400):
        root = shutil.copytree(rng.choice(starts), quick_folder / "root")
        for _ in range(rng.randint(1, 4)):
            mutate(root, rng)
        try:
            images = data.find_images(root)
            text = data.describe(images)
        except data.DataError as error:
            assert str(root) in str(error) and len(str(error)) > len(str(root)) + 20
            outcomes["refused"] += 1
        else:
            walked = [os.path.join(where, name) for where, _, names in os.walk(root) for name in names]
            pictures = [path for path in walked if path.lower().endswith(ENDINGS)]
            used = [path for found in images.splits.values() for path, _ in found]
            lines = text.splitlines()[len(images.classes) + 2 :]
            assert all(line.startswith(("note: ", "warning: ", "hint: ")) for line in lines), text
            left = [int(n) for line in lines for n in re.findall(
                r"^\w+: (\d+) pictures? (?:above|in folders|hidden|among)|(\d+) pictures? in no class f", line) for n in n if n]
            assert len(used) == len(set(used)) and set(used) <= set(pictures)
            assert len(used) + sum(left) == len(pictures), f"{number}\n{text}\n" + "\n".join(pictures)
            outcomes["left out" if sum(left) else "read"] += 1
        shutil.rmtree(root)
    assert min(outcomes.values()) > 40 and len(outcomes) == 3, outcomes


# ---- decoding


def squares(mode, *colors):
    """A picture of squares of 16 pixels side by side."""
    if mode.startswith("I;16"):  # where Pillow pastes bytes, not numbers
        numbers = np.array(colors, dtype=">u2" if mode == "I;16B" else "<u2").repeat(16)
        return Image.frombytes(mode, (len(numbers), 16), numbers.tobytes() * 16)
    picture = Image.new(mode, (16 * len(colors), 16))
    for i, color in enumerate(colors):
        picture.paste(color, (16 * i, 0, 16 * i + 16, 16))
    return picture


def assert_squares(path, expected, tolerance=1, **options):
    """Compare the middle of each square with an (R, G, B), or a number for a grey."""
    picture = data.decode(path, **options)
    middle = picture.height // 2
    found = [picture.getpixel((i * 2 * middle + middle, middle)) for i in range(len(expected))]
    expected = [color if isinstance(color, tuple) else (color,) * 3 for color in expected]
    assert picture.mode == "RGB" and picture.width == 2 * middle * len(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


HALF_RED, RED, BLUE, WHITE = (200, 0, 0, 128), (200, 0, 0, 255), (0, 0, 200, 255), (255, 255, 255, 255)
PALETTE = [200, 0, 0, 0, 200, 0, 0, 0, 200, 255, 255, 255]


@pytest.mark.parametrize("name, mode, colors, options, expected", [
    ("rgb.png", "RGB", [(200, 100, 0), (255, 255, 255)], {}, [(200, 100, 0), 255]),
    ("rgb.jpg", "RGB", [(200, 100, 0), (255, 255, 255)], {"quality": 95}, [(200, 100, 0), 255]),
    ("lossy.webp", "RGB", [(200, 100, 0), (255, 255, 255)], {"quality": 90}, [(200, 100, 0), 255]),
    ("lossless.webp", "RGB", [(200, 100, 0), (255, 255, 255)], {"lossless": True}, [(200, 100, 0), 255]),
    ("grey.jpg", "L", [0, 100, 255], {"quality": 95}, [0, 100, 255]),
    ("grey.png", "L", [0, 100, 255], {}, [0, 100, 255]),
    ("clear grey.png", "L", [0, 100, 101], {"transparency": 100}, [0, 255, 101]),
    ("one bit.png", "1", [0, 255], {}, [0, 255]),
    ("one bit.tif", "1", [0, 255], {}, [0, 255]),
    # 16 bits: a 257th
    ("16 bit.png", "I;16", [0, 300, 32768, 65535], {}, [0, 1, 127, 255]),
    ("dark 16 bit.tif", "I;16", [0, 100, 250], {}, [0, 0, 1]),
    ("16 bit.tif", "I;16", [0, 300, 32768, 65535], {}, [0, 1, 127, 255]),
    ("big endian.tif", "I;16B", [0, 300, 32768, 65535], {}, [0, 1, 127, 255]),
    # what is half transparent is half white
    ("alpha.png", "LA", [(0, 0), (0, 128), (200, 255)], {}, [255, 127, 200]),
    ("rgba.png", "RGBA", [(200, 0, 0, 0), HALF_RED, RED, WHITE], {}, [255, (227, 127, 127), RED[:3], 255]),
    ("rgba.webp", "RGBA", [(200, 0, 0, 0), HALF_RED, RED], {"lossless": True}, [255, (227, 127, 127), RED[:3]]),
    ("lossy rgba.webp", "RGBA", [(200, 0, 0, 0), HALF_RED, RED], {"quality": 90}, [255, (227, 127, 127), RED[:3]]),
    ("rgba.tif", "RGBA", [(200, 0, 0, 0), HALF_RED, RED], {}, [255, (227, 127, 127), RED[:3]]),
    ("clear colour.png", "RGB", [RED[:3], BLUE[:3]], {"transparency": RED[:3]}, [255, BLUE[:3]]),
    ("palette.png", "P", [0, 1, 2, 3], {}, [RED[:3], (0, 200, 0), BLUE[:3], 255]),
    ("palette.gif", "P", [0, 1, 2, 3], {}, [RED[:3], (0, 200, 0), BLUE[:3], 255]),
    ("opaque.png", "P", [0, 1, 2], {"transparency": bytes([255] * 4)}, [RED[:3], (0, 200, 0), BLUE[:3]]),
    ("alphas.png", "P", [0, 1, 2], {"transparency": bytes([128, 0, 255])}, [(227, 127, 127), 255, BLUE[:3]]),
    ("clear.png", "P", [0, 1, 2], {"transparency": 1}, [RED[:3], 255, BLUE[:3]]),
    ("clear.gif", "P", [0, 1, 2], {"transparency": 1}, [RED[:3], 255, BLUE[:3]]),
    # (255 - C) * (255 - K) / 255: white, red, grey, a dark cyan
    ("cmyk.jpg", "CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 128), (255, 0, 0, 64)], {"quality": 95},
     [255, (255, 0, 0), 127, (0, 191, 191)]),
    ("cmyk.tif", "CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 128)], {}, [255, (255, 0, 0), 127]),
])
def test_decode_any_kind_to_rgb(tmp_path, name, mode, colors, options, expected):
    picture = squares(mode, *colors)
    if mode == "P":
        picture.putpalette(PALETTE)
    picture.save(tmp_path / name, **options)
    lossy = name.endswith(".jpg") or name.startswith("lossy")
    with Image.open(tmp_path / name) as stored:
        assert stored.mode[0] == mode[0] or name == "palette.gif"  # else this would test something else
    assert_squares(tmp_path / name, expected, tolerance=4 if lossy else 1)


def test_grey_that_is_multiplied_by_its_opacity(tmp_path):
    squares("LA", (100, 128), (0, 0), (200, 255)).save(tmp_path / "x.tif")
    stored, kind = (tmp_path / "x.tif").read_bytes(), struct.pack("<HHI", 338, 3, 1)  # what the second number is
    assert stored.count(kind + b"\2\0") == 1
    (tmp_path / "x.tif").write_bytes(stored.replace(kind + b"\2\0", kind + b"\1\0"))
    assert_squares(tmp_path / "x.tif", [100 + 127, 255, 200])


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_cmyk_jpeg_is_inverted_as_adobe_does_and_as_torchvision_reads_it(tmp_path):
    """Pillow writes and reads this file and could be wrong twice in the same way. torchvision has its own decoder."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        pytest.skip("torchvision has announced to drop its decoder, and has done so")
    picture = squares("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (30, 20, 200, 64), (255, 0, 0, 0))
    picture.save(tmp_path / "x.jpg", quality=95)
    stored = torch.frombuffer(bytearray((tmp_path / "x.jpg").read_bytes()), dtype=torch.uint8)
    assert b"Adobe" in bytes(stored.tolist())
    expected = decode_jpeg(stored, ImageReadMode.RGB)[:, 8, 8::16].T.tolist()
    np.testing.assert_allclose(expected[:2], [(255, 255, 255), (255, 0, 0)], rtol=0, atol=4)
    assert_squares(tmp_path / "x.jpg", [tuple(color) for color in expected], tolerance=2)
    assert data.decode(tmp_path / "x.jpg", size=8).size == (32, 8)
    assert_squares(tmp_path / "x.jpg", [tuple(color) for color in expected], tolerance=4, size=8)


def write_png(path, depth, kind, row, before=(), after=()):
    """A PNG of one row, with (name, content) of chunks before and after the pixels: kinds that Pillow cannot write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    pixels = struct.pack(f">{len(row)}{'H' if depth == 16 else 'B'}", *row)
    header = struct.pack(">IIBBBBB", len(row) // channels, 1, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(b"\0" + pixels)), *after, (b"IEND", b"")]
    written = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize("kind, row, clear, expected", [
    (0, [0, 200 * 257, 65535], [200 * 257], [0, 255, 255]),
    (0, [0, 200 * 257, 199 * 257], [], [0, 200, 199]),
    (2, [65535, 100 * 257, 0, 300, 65535, 1000], [], [(255, 100, 0), (1, 255, 3)]),
    (4, [0, 32896, 0, 65535, 51400, 65535, 0, 0], [], [127, 0, 200, 255]),
    (6, [65535, 0, 0, 32896, 0, 0, 65535, 65535, 0, 0, 0, 0], [], [(255, 127, 127), (0, 0, 255), 255]),
])
def test_decode_16_bit_png_of_every_kind(tmp_path, kind, row, clear, expected):
    """kind: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha. clear: the value that the file calls transparent."""
    chunk = (b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    write_png(tmp_path / "x.png", 16, kind, row, before=[chunk] if clear else ())
    picture = data.decode(tmp_path / "x.png")
    expected = [color if isinstance(color, tuple) else (color,) * 3 for color in expected]
    assert picture.mode == "RGB"
    np.testing.assert_allclose(np.asarray(picture)[0], expected, rtol=0, atol=1)


# What the EXIF standard says: the sides of the upright picture to which the stored one's first row and column belong.
EXIF_SIDES = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
              5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}


@pytest.mark.parametrize("number, ending", [*((n, "jpg") for n in EXIF_SIDES), (6, "webp"), (6, "png"), (6, "tif")])
def test_decode_applies_exif_orientation(tmp_path, number, ending):
    picture = Image.new("RGB", (64, 32))
    for i, color in enumerate(("red", "lime", "blue", "white")):  # first row: red and lime, first column: red and blue
        picture.paste(color, (i % 2 * 32, i // 2 * 16, i % 2 * 32 + 32, i // 2 * 16 + 16))
    exif = Image.Exif()
    exif[0x0112] = number
    picture.save(tmp_path / f"x.{ending}", exif=exif)
    upright = data.decode(tmp_path / f"x.{ending}")
    assert upright.size == ((32, 64) if number > 4 else (64, 32))
    bright = np.asarray(upright) > 128
    named = {(1, 0, 0): "red", (0, 1, 0): "lime", (0, 0, 1): "blue", (1, 1, 1): "white"}
    (a, b), (c, d) = [[named[tuple(bright[y, x].tolist())] for x in (4, -4)] for y in (4, -4)]
    sides = {"top": {a, b}, "bottom": {c, d}, "left": {a, c}, "right": {b, d}}
    row, column = EXIF_SIDES[number]
    assert sides[row] == {"red", "lime"} and sides[column] == {"red", "blue"}


def test_decode_applies_an_orientation_that_stands_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    write_png(tmp_path / "x.png", 8, 0, [10, 20, 30], after=[(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])
    assert np.asarray(data.decode(tmp_path / "x.png"))[0, :, 0].tolist() == [30, 20, 10]


def test_decode_scales_16_bit_and_does_not_clip(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    found = np.asarray(data.decode(tmp_path / "x.png"))
    assert (found[..., 0] == found[..., 2]).all()
    assert np.abs(found[..., 0].flatten() - np.arange(256)).max() <= 1


def draw_frames(path, *colors):
    first, *others = [Image.new("RGB", (8, 8), color) for color in colors]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, **({"save_all": True, "append_images": others} if others else {}))
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == len(colors)
    return str(path)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_decode_takes_the_first_frame_or_page(tmp_path, ending):
    path = draw_frames(tmp_path / f"x.{ending}", (200, 0, 0), (0, 0, 200), (0, 200, 0))
    np.testing.assert_allclose(data.decode(path).getpixel((3, 3)), (200, 0, 0), rtol=0, atol=4)


def test_animated_names_files_of_several_frames_or_pages(tmp_path):
    several = [draw_frames(tmp_path / name, "red", "blue") for name in ("a.gif", "B.GIF", "c.webp", "g.png", "h.tif", "i.mpo")]
    still = [draw_frames(tmp_path / name, "red") for name in ("d.gif", "e.webp", "f.jpg", "j.png", "k.tif")]
    bad = [str(tmp_path / "nowhere.gif"), str(tmp_path / "broken.webp"), str(tmp_path / "wrong name.gif")]
    (tmp_path / "broken.webp").write_bytes((tmp_path / "c.webp").read_bytes()[:12])
    shutil.copy(tmp_path / "f.jpg", bad[2])
    assert data.animated([*bad, *still, *several]) == several
    # a smaller copy for a quick view, as many programs append it, is no page
    first, copy = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (8, 8), "red")
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "l.tif", save_all=True, append_images=[copy])
    assert Image.open(tmp_path / "l.tif").n_frames == 2 and data.animated([tmp_path / "l.tif"]) == []


def test_the_first_page_is_said_to_be_a_page(tmp_path):
    files = [draw_frames(tmp_path / name, "red", "blue") for name in ("a.tif", "b.tiff", "c.gif")]
    assert data.first_frames([draw_frames(tmp_path / "d.png", "red"), *files]) == [
        "note: 1 animated picture, of which the first frame is used: c.gif",
        "note: 2 pictures of several pages, of which the first page is used: a.tif, b.tiff"]


# ---- one scale for all pictures of a data set


def values_of(path, **options):
    return np.asarray(data.decode(path, **options))[0, :, 0].tolist()


def write_tiff(path, row, bits, kind=1, photometric=1, order="<"):
    """A TIFF of one row that Pillow cannot write. row: bytes, or an array; kind: 1 unsigned, 2 signed, 3 floats."""
    count = len(row) * 8 // bits if isinstance(row, bytes) else len(row)
    row = row if isinstance(row, bytes) else row.astype(row.dtype.newbyteorder(order)).tobytes()
    tags = [(256, count), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, len(row)), (339, kind)]
    page = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, n) if tag in (256, 257, 273, 278, 279)
                    else struct.pack(f"{order}HHIHH", tag, 3, 1, n, 0) for tag, n in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(row))
    path.write_bytes(head + row + struct.pack(f"{order}H", len(tags)) + page + b"\0\0\0\0")
    return path


ROW = np.array([0, 300, 2048, 4095], dtype=np.uint16)
DARK, STRETCHED = [0, 1, 8, 16], [0, 19, 128, 255]


def draw_deep(path):
    """The four numbers of ROW, as this ending keeps them; a big endian, signed or 12-bit TIFF by its name."""
    if path.suffix == ".pgm":
        path.write_bytes(f"P5 4 1 {4095 if path.stem == 'to 4095' else 65535}\n".encode() + ROW.astype(">u2").tobytes())
    elif path.stem == "12 bits":
        pairs = [f"{number:012b}" for number in ROW]
        write_tiff(path, int("".join(pairs), 2).to_bytes(6, "big"), 12)
    elif path.suffix == ".tif":
        dtype, bits, kind = {"signed": ("i2", 16, 2), "32": ("u4", 32, 1), "float": ("f4", 32, 3)}.get(path.stem, ("u2", 16, 1))
        write_tiff(path, ROW.astype(dtype), bits, kind, order=">" if path.stem == "big endian" else "<")
    else:
        Image.fromarray(ROW[None].repeat(8, 0).repeat(8, 1)).save(path)  # JPEG 2000 takes no single row


@pytest.mark.parametrize("name, plain", [
    ("x.png", DARK), ("x.tif", DARK), ("big endian.tif", DARK), ("x.jp2", DARK), ("x.j2k", DARK), ("x.pgm", DARK),
    # what the file itself calls white, before and with --white
    ("12 bits.tif", STRETCHED), ("to 4095.pgm", STRETCHED),
    ("signed.tif", None), ("32.tif", None), ("float.tif", None),
])
def test_grey_of_more_than_8_bits_has_the_white_of_its_format_or_the_one_given(tmp_path, name, plain):
    draw_deep(tmp_path / name)
    every = 8 if name[-3:] in ("png", "jp2", "j2k") else 1
    assert values_of(tmp_path / name, white=4095)[::every] == STRETCHED
    assert values_of(tmp_path / name, white=2048)[::every] == [0, 37, 255, 255]  # clipped
    if plain:
        assert values_of(tmp_path / name)[::every] == plain
    else:
        kind = "floating-point numbers" if name == "float.tif" else "signed or 32-bit integers"
        with pytest.raises(data.DataError, match=f"^its grey levels are {kind}, up to 4095: say .* --white 4095 in training$"):
            data.decode(tmp_path / name)


def test_no_picture_has_a_scale_of_its_own(tmp_path):
    """Equal numbers are equal greys, whatever else is in the picture."""
    for dtype, most, white in (("u2", 65535, None), ("u2", 65535, 4095), ("f4", 1.02, 1), ("i4", 2**30, 70000)):
        row = np.linspace(0, 1 if dtype == "f4" else 4095, 16).astype(dtype)
        plain = write_tiff(tmp_path / "a.tif", row, 8 * row.itemsize, {"u": 1, "i": 2, "f": 3}[dtype[0]])
        row[0] = most
        other = write_tiff(tmp_path / "b.tif", row, 8 * row.itemsize, {"u": 1, "i": 2, "f": 3}[dtype[0]])
        assert values_of(plain, white=white)[1:] == values_of(other, white=white)[1:] and values_of(other, white=white)[0] == 255


def test_numbers_that_are_none_and_that_have_no_place(tmp_path):
    odd = write_tiff(tmp_path / "a.tif", np.array([np.nan, np.inf, -np.inf, -1, 0.4, 3e38], dtype="f4"), 32, 3)
    assert values_of(odd, white=1) == [0, 255, 0, 0, 102, 255]
    with pytest.raises(data.DataError, match="up to 0: say which level is white, such as --white 1 "):
        data.decode(write_tiff(tmp_path / "b.tif", np.array([np.nan, -np.inf], dtype="f4"), 32, 3))
    unsigned = write_tiff(tmp_path / "c.tif", np.array([0, 2**31, 2**32 - 1], dtype="u4"), 32)
    assert values_of(unsigned, white=2**32 - 1) == [0, 128, 255]
    white_is_zero = write_tiff(tmp_path / "d.tif", np.array([0, 65535, 257], dtype="u2"), 16, photometric=0)
    assert values_of(white_is_zero) == [255, 0, 254]
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 4, "NAXIS2": 1}
    header = "".join(f"{f'{key:8}= {value:>20}':80}" for key, value in cards.items()) + "END"
    (tmp_path / "e.fits").write_bytes(f"{header:2880}".encode() + ROW.astype(">i2").tobytes().ljust(2880, b"\0"))
    with pytest.raises(data.DataError, match="a FITS file have an offset"):
        data.decode(tmp_path / "e.fits")


def test_hints_about_levels_and_shapes_that_a_network_sees_little_of(tmp_path):
    def hints(*rows, white=None):
        paths = [str(write_tiff(tmp_path / f"{i}.tif", np.array(row), 16)) for i, row in enumerate(rows)]
        return "\n".join(data.hints_about(paths, white, resize="squash"))

    dark, bright = np.array([0, 3000, 4095], "u2"), np.array([0, 4096, 0], "u2")
    assert hints(dark, dark) == "hint: grey levels of more than 8 bits stay below a sixteenth of white here (4095 at most): " \
                                "if 4095 is white in them, train with --white 4095"
    assert "--white 1023" in hints(dark // 5) and hints(dark // 5, dark).endswith("--white 4095")
    assert hints(dark, bright) == hints(dark, white=4095) == hints(dark, white=4000) == hints(dark * 0) == ""
    faint = write_tiff(tmp_path / "faint.tif", np.array([0, 0.04], "f4"), 32, 3)  # of --white 1 there is nothing better
    assert data.hints_about([faint], 1, "pad") == data.hints_about([faint], resize="pad") == []
    assert hints(bright * 0 + 9000, white=255) == "hint: more than half of each picture is above --white 255 and so white, " \
                                                  "since grey levels go up to 9000: is it --white 16383?"
    # Where the first 16 of 64 that are looked at stand in a folder does not matter, nor what cannot be read.
    draw(tmp_path / "x.png", "cat", 1)
    (tmp_path / "bad.tif").write_bytes(b"")
    few = [str(tmp_path / "x.png")] * 500 + [str(write_tiff(tmp_path / "y.tif", dark, 16))] * 100 + [str(tmp_path / "bad.tif")] * 9
    assert len(data.hints_about(few)) == 1
    looked_at = [data._few(list(range(count))) for count in (0, 1, 64, 65, 100, 10**5)]
    assert [len(few) for few in looked_at] == [0, 1, 64, 33, 50, 64] and looked_at[4][-1] == 98
    # Colours: of 16 bits Pillow keeps 8.
    write_png(tmp_path / "z.png", 16, 2, [0, 300, 4095])
    assert "16-bit colours stay below a sixteenth" in data.hints_about([tmp_path / "z.png"])[0]
    write_png(tmp_path / "z.png", 16, 2, [0, 300, 4096])
    assert data.hints_about([tmp_path / "z.png"]) == data.hints_about([]) == []
    long, wide, square = (str(tmp_path / f"{side}.png") for side in ("long", "wide", "square"))
    for path, size in ((long, (20, 60)), (wide, (60, 20)), (square, (20, 20))):
        Image.new("RGB", size).save(path)
    assert "are 3.0 times as long as wide or more" in data.hints_about([long, wide, square])[0]
    assert data.hints_about([square, wide, square]) == data.hints_about([long, wide], resize="pad") == []


# ---- what may stand beside the pixels


def chunk(name, content, crc=None):
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def segment(marker, content):
    return struct.pack(">BBH", 255, marker, len(content) + 2) + content


def with_tags(tiff, *tags):
    """A TIFF of Pillow's with more (number, type, count, value)."""
    start = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    entries = [tiff[start + 2 + 12 * i :][:12] for i in range(count)] + [struct.pack("<HHI4s", *tag) for tag in tags]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


JUNK = [b"", b"\0", b"junk", b"\0\x08\0\x02\x01\x12\0\x03", b"II*\0", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0\xff\xff"]
PNG_CHUNKS = [b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT", b"bKGD", b"acTL", b"fcTL"]


def test_metadata_never_decide_about_pixels(tmp_path):
    """Broken, huge, or of a strange type: the pixels are those of the file without."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    files = {}
    for ending in ("png", "jpg", "tif", "webp"):
        picture.save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
        files[ending] = (tmp_path / f"x.{ending}").read_bytes()
    png, jpg, expected = files["png"], files["jpg"], {e: np.asarray(data.decode(tmp_path / f"x.{e}")) for e in files}
    huge = zlib.compress(bytes(2**21))
    parts = [chunk(name, junk) for name in PNG_CHUNKS for junk in JUNK] + [
        chunk(b"tEXt", b"a\0b", crc=1), chunk(b"eXIf", b"MM", crc=1), chunk(b"tRNS", b"\0"), chunk(b"zTXt", b"a\0\0" + huge),
        chunk(b"iTXt", b"a\0\1\0\0\0" + huge), chunk(b"iCCP", b"a\0\0" + huge),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nzz\n")),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation=\"9\"")]
    end = png.rindex(b"IEND") - 4
    cases = [("png", png[:33] + part + png[33:]) for part in parts] + [("png", png[:end] + part + png[end:]) for part in parts]
    for marker, begin in ((0xE0, b"JFIF\0"), (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), (0xE2, b"ICC_PROFILE\0"),
                          (0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\0"), (0xED, b"Photoshop 3.0\x008BIM"), (0xFE, b"")):
        cases += [("jpg", jpg[:2] + segment(marker, begin + junk) + jpg[2:]) for junk in JUNK]
    for tag in (270, 274, 282, 296, 305, 700, 33723, 34377, 34675, 34665, 34853, 65000):
        cases += [("tif", with_tags(files["tif"], (tag, kind, count, b"\x08\0\0\0")))
                  for kind, count in ((0, 0), (1, 1), (2, 3), (2, 2**31), (3, 0), (5, 1), (7, 1000), (12, 1), (99, 1))
                  if (tag, kind) != (274, 1)]  # an orientation, of an unusual type
    for junk in JUNK:
        picture.save(tmp_path / "y.webp", lossless=True, exif=b"Exif\0\0" + junk)
        cases.append(("webp", (tmp_path / "y.webp").read_bytes()))
    wrong = []
    for number, (ending, content) in enumerate(cases):
        (tmp_path / f"y.{ending}").write_bytes(content)
        try:
            assert (np.asarray(data.decode(tmp_path / f"y.{ending}")) == expected[ending]).all()
        except Exception as error:
            wrong.append((number, ending, repr(error)))
    assert not wrong and len(cases) > 350


def test_a_good_orientation_beside_a_bad_part_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    good = exif.tobytes().removeprefix(b"Exif\0\0")
    for bad in ((b"gAMA", b""), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))):
        for before, after in (([bad, (b"eXIf", good)], []), ([bad], [(b"eXIf", good)])):
            write_png(tmp_path / "x.png", 8, 0, [10, 20, 30], before, after)
            assert values_of(tmp_path / "x.png") == [30, 20, 10]
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "red").save(tmp_path / "y.jpg", exif=exif)
    stored = (tmp_path / "y.jpg").read_bytes()
    (tmp_path / "y.jpg").write_bytes(stored[:2] + segment(0xE2, b"ICC_PROFILE\0") + stored[2:])
    assert data.decode(tmp_path / "y.jpg").size == (16, 32)


@pytest.mark.parametrize("mode, colour", [("L", 100), ("LA", (100, 128)), ("P", 1), ("RGB", (9, 8, 7)), ("RGBA", (9, 8, 7, 128)), ("1", 255)])
def test_a_transparent_colour_of_a_strange_type_is_passed_over(tmp_path, mode, colour):
    picture = squares(mode, colour)
    if mode == "P":
        picture.putpalette(PALETTE)
    picture.save(tmp_path / "x.png")
    plain, png = np.asarray(data.decode(tmp_path / "x.png")), (tmp_path / "x.png").read_bytes()
    at = png.index(b"IDAT") - 4
    for junk in (b"", b"\0", b"\0\0\0", bytes(7), bytes(300)):
        (tmp_path / "y.png").write_bytes(png[:at] + chunk(b"tRNS", junk) + png[at:])
        found = np.asarray(data.decode(tmp_path / "y.png"))
        assert found.shape == plain.shape and (mode == "P" or (found == plain).all() or (found == 255).all())


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_every_format_that_pillow_opens_is_a_picture(tmp_path):
    known = Image.registered_extensions()
    assert {*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".mpo", ".tga", ".jp2", ".ico"} <= set(data.EXTENSIONS)
    assert not {".pdf", ".eps", ".h5", ".mpg", ".emf", ".grib"} & set(data.EXTENSIONS)
    tried = set()
    for ending in data.EXTENSIONS:
        if known[ending] in Image.SAVE:
            for mode in ("RGB", "P", "1"):  # some keep nothing else
                try:
                    picture = Image.new("RGB", (32, 32), "white").convert(mode)
                    picture.save(tmp_path / f"x{ending}", **({"append_images": [picture]} if ending == ".icns" else {}))
                except (OSError, ValueError):
                    continue
                found = data.decode(tmp_path / f"x{ending}")
                assert found.mode == "RGB" and found.getpixel((5, 5)) >= (250, 250, 250), ending
                tried.add(ending)
                break
    assert len(tried) >= 30 and [os.path.basename(path) for path in data.list_folder(tmp_path)] == sorted(f"x{e}" for e in tried)


def test_describe_names_animated_pictures(tmp_path):
    draw_folder(tmp_path, train=2, val=1)
    draw_frames(tmp_path / "train/cat/still.gif", "red")
    assert "animated" not in data.describe(data.find_images(tmp_path))
    draw_frames(tmp_path / "val/dog/0.webp", "red", "blue")
    line = "note: 1 animated picture, of which the first frame is used: 0.webp"
    assert line in data.describe(data.find_images(tmp_path)).splitlines()
    for i in range(1, 7):
        draw_frames(tmp_path / f"train/dog/{i}.gif", "red", "blue")
    line = "note: 7 animated pictures, of which the first frame is used: 1.gif, 2.gif, 3.gif, 4.gif, 5.gif and 2 more"
    assert line in data.describe(data.find_images(tmp_path)).splitlines()


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tif", "bmp", "ppm"])
def test_decode_does_not_pass_over_a_missing_end(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{ending}")
    assert data.decode(tmp_path / f"x.{ending}").size == (32, 32)
    whole = (tmp_path / f"x.{ending}").read_bytes()
    (tmp_path / f"x.{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(OSError):
        data.decode(tmp_path / f"x.{ending}")


def test_decode_reduces_a_large_jpeg_but_never_below_size(tmp_path):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "x.jpg")
    assert data.decode(tmp_path / "x.jpg").size == (1600, 1200)
    assert data.decode(tmp_path / "x.jpg", size=128).size == (200, 150)


# ---- order, seeds, batches


def test_order_is_a_permutation_drawn_from_seed_and_epoch():
    def epoch(seed, number, shuffle=True):
        order = data.SeededBatches(11, 4, seed, shuffle)
        order.epoch = number
        return [key for batch in order for key in batch]

    assert sorted(epoch(0, 3)) == [(3, i) for i in range(11)]
    assert epoch(0, 3) == epoch(0, 3)
    assert len({tuple(i for _, i in epoch(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert epoch(0, 0, shuffle=False) == [(0, i) for i in range(11)]


@pytest.mark.parametrize("length, sizes", [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1]), (3, [3]), (5, [5])])
def test_a_last_batch_of_one_is_merged(length, sizes):
    order = data.SeededBatches(length, 4, shuffle=True)
    assert order.sizes() == [len(batch) for batch in order] == sizes and len(order) == len(sizes)


def load(pictures, workers, epochs=(0, 1)):
    samples = data.find_images(pictures).splits["train"]
    order = data.SeededBatches(len(samples), 8, seed=5, shuffle=True)
    loader = data.make_loader(data.ImageList(samples, data.train_transform(32), seed=5), order, workers)
    found = []
    for order.epoch in epochs:
        found += list(data.batches(loader))
    return found


def test_a_share_of_each_batch_is_old():
    plain, order = data.SeededBatches(11, 6, seed=5, shuffle=True), data.ReplayBatches(11, 5, 8, 0.25, seed=5)
    assert order.sizes() == [8, 7] and len(order) == 2 and data.ReplayBatches(11, 5, 6, 0, seed=5).sizes() == [6, 5]
    old = []
    for epoch in range(4):
        plain.epoch = order.epoch = epoch
        found = list(order)
        for batch, new in zip(found, plain, strict=True):
            assert batch[: len(new)] == new  # the new pictures, as without the old ones
            old += batch[len(new) :]
        order.start = 1
        assert list(order) == found[1:]
        order.start = 0
    assert len(old) == 4 * (2 + 2) and [turn for turn, _ in old] == [i // 5 for i in range(16)]
    turns = [[i for t, i in old if t == turn] for turn in range(3)]
    assert all(sorted(turn) == [11, 12, 13, 14, 15] for turn in turns) and len({tuple(turn) for turn in turns}) > 1
    for share in (0.01, 0.99):
        with pytest.raises(data.DataError, match="both kinds need one at least"):
            data.ReplayBatches(11, 5, 8, share)


def test_a_balanced_choice():
    samples = [(f"{label}{i}", label) for label, count in ((2, 9), (0, 2), (1, 6)) for i in range(count)]
    chosen = data.balanced(samples, 8, seed=1)
    assert [sum(label == c for _, label in chosen) for c in (0, 1, 2)] == [2, 3, 3]
    assert chosen == sorted(chosen, key=samples.index) == data.balanced(samples, 8, seed=1) != data.balanced(samples, 8)
    assert data.balanced(samples, 0) == data.balanced(samples, 99) == samples


def test_batches_are_the_same_for_any_number_of_workers(pictures):
    torch.manual_seed(0)
    alone = load(pictures, 0)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    shared = load(pictures, 2)
    for (x, y), (x2, y2) in zip(alone, shared, strict=True):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 32, 32)
        assert torch.equal(x, x2) and torch.equal(y, y2)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the generator that dropout uses


def test_augmentation_depends_on_epoch_and_index(pictures):
    path = data.find_images(pictures).splits["train"][0][0]
    listed = data.ImageList([(path, 0)] * 2, data.train_transform(32), seed=0)
    views = [listed[key][0] for key in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2]) and not torch.equal(views[0], views[3])
    plain = data.ImageList([(path, 0)], data.train_transform(32, augment="none"), seed=0)
    assert torch.equal(plain[(0, 0)][0], plain[(1, 0)][0])


@pytest.mark.parametrize("augment", data.AUGMENT)
@pytest.mark.parametrize("shape", [(90, 70), (1, 600), (600, 1), (3, 5), (1, 1)])
@pytest.mark.parametrize("resize", data.RESIZE)
def test_every_level_takes_pictures_of_any_shape(augment, shape, resize):
    for interpolation in ("bilinear", "bicubic"):
        transform = data.train_transform(32, augment, interpolation, resize=resize)
        for seed in range(20 if resize == "crop" else 3):
            torch.manual_seed(seed)
            found = transform(torch.randint(0, 256, (3, *shape), dtype=torch.uint8))
            assert found.dtype == torch.uint8 and found.shape == (3, 32, 32)


@pytest.mark.parametrize("augment", data.AUGMENT)
def test_every_level_draws_from_seed_epoch_and_index_only(tmp_path, augment):
    path = tmp_path / "x.png"  # noise: no two crops look the same
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)

    def view(seed, epoch, index):
        listed = data.ImageList([(path, 0)] * 20, data.train_transform(32, augment), seed)
        return listed[(epoch, index)][0]

    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    keys = [(s, e, i) for s in (0, 1) for e in range(10) for i in (0, 19)]
    views = [view(*key) for key in keys]
    assert random.getstate() == generators[0] and np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(12345)
    assert all(torch.equal(a, view(*key)) for a, key in zip(views, keys, strict=True))
    assert len({v.numpy().tobytes() for v in views}) == (1 if augment == "none" else len(views))


def places(height, width):
    """A picture whose red and green are each pixel's x and y, from 0 to 255."""
    y, x = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 128)]).round().to(torch.uint8)


def views_of(picture, transform, seeds=200):
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield transform(picture)


def test_how_much_of_the_picture_each_level_shows():
    def shown(view):
        """Shares of the width and the height, and whether left and right are swapped."""
        (left, right), (top, bottom) = view[0, 32, [0, -1]].tolist(), view[1, [0, -1], 32].tolist()
        grow = 64 / 63 / 255  # from the distance of the outer pixels' centres to that of the edges
        return abs(right - left) * grow, (bottom - top) * grow, left > right

    def sizes_of(level, height, width):
        return [shown(view) for view in views_of(places(height, width), data.train_transform(64, level))]

    for augment, smallest, ratio in (("light", 0.8, 1.11), ("standard", 0.35, 4 / 3)):
        sizes = sizes_of(augment, 256, 256)
        areas = [w * h for w, h, _ in sizes]
        assert smallest - 0.02 < min(areas) < smallest + 0.05 and 0.95 < max(areas) < 1.02, augment
        ratios = [w / h for w, h, _ in sizes]
        assert 1 / ratio - 0.03 < min(ratios) < 0.95 and 1.05 < max(ratios) < ratio + 0.03, augment
        assert 60 < sum(flipped for _, _, flipped in sizes) < 140, augment
    # of a 3:2 photograph, "light" shows most of the square in the centre: 2/3 of the width, and not always the same
    sizes = sizes_of("light", 200, 300)
    assert 0.78 < min(1.5 * w * h for w, h, _ in sizes) < 0.85 and max(w for w, _, _ in sizes) < 0.69
    assert len({(round(w, 2), round(h, 2)) for w, h, _ in sizes}) > 50


def test_standard_is_the_crop_and_the_flip_and_strong_goes_on_from_there():
    crop = v2.RandomResizedCrop(64, scale=(0.35, 1.0), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    standard = v2.Compose([crop, v2.RandomHorizontalFlip()])
    bilinear = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    strong = v2.Compose([standard, bilinear, v2.RandomErasing(p=0.25, value=0)])
    for name, expected in (("standard", standard), ("strong", strong)):
        ours, theirs = (views_of(places(80, 100), t) for t in (data.train_transform(64, name), expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def test_unknown_level():
    with pytest.raises(data.DataError, match="no such augmentation: wild; there are none, light, standard, strong"):
        data.train_transform(32, "wild")
    with pytest.raises(data.DataError, match="no such way to resize: stretch; there are crop, squash, pad"):
        data.train_transform(32, "none", resize="stretch")


def test_without_flips_left_stays_left_in_every_level():
    flipped = {level: sum(view[0, 32, 0] > view[0, 32, -1] for view in views_of(
        places(80, 100), data.train_transform(64, level, flip=False), 60)) for level in ("none", "light", "standard")}
    assert flipped == {"none": 0, "light": 0, "standard": 0}
    crop = v2.RandomResizedCrop(64, scale=(0.35, 1.0), antialias=True)
    expected = v2.Compose([crop, v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR), v2.RandomErasing(p=0.25)])
    ours, theirs = (views_of(places(80, 100), t, 60) for t in (data.train_transform(64, "strong", flip=False), expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_squash_and_pad_see_the_whole_picture():
    """By torchvision's own transforms; the crop of the augmentation is one of that square."""
    for height, width in ((48, 256), (256, 48), (40, 40), (5, 9), (700, 300)):
        picture = places(height, width)
        squashed, padded = (data.eval_transform(32, resize=resize)(picture) for resize in ("squash", "pad"))
        assert torch.equal(squashed, v2.Resize((32, 32), antialias=True)(picture))
        by_torchvision = v2.Compose([v2.Resize(None, max_size=32, antialias=True), v2.CenterCrop(32)])
        assert torch.equal(padded, by_torchvision(picture))
        assert (padded[2] == 0).sum() == 32 * (32 - max(1, 32 * min(height, width) // max(height, width)))  # black
        for resize, square in (("squash", v2.Resize((64, 64), antialias=True)),
                               ("pad", v2.Compose([v2.Resize(None, max_size=64, antialias=True), v2.CenterCrop(64)]))):
            expected = v2.Compose([square, v2.RandomResizedCrop(32, (0.35, 1), antialias=True), v2.RandomHorizontalFlip()])
            ours, theirs = (views_of(picture, t, 10) for t in (data.train_transform(32, resize=resize), expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert torch.equal(data.train_transform(32, "none", resize=resize)(picture), data.eval_transform(32, resize=resize)(picture))


def test_augmentation_and_evaluation_by_a_dict_that_may_be_an_old_one(tmp_path):
    picture, old = places(40, 200), {"image_size": 32, "interpolation": "bicubic", "resize_size": 37}
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    for more, way in (({}, {}), ({"resize": "squash", "flip": False}, {"resize": "squash", "flip": False})):
        ours, theirs = data.augmentation(old | more, "light"), data.train_transform(32, "light", "bicubic", 37, **way)
        assert all(map(torch.equal, views_of(picture, ours, 5), views_of(picture, theirs, 5)))
        x, numbers = next(data.batches(data.eval_loader([(str(tmp_path / "x.png"),)], old | more, 4)))
        assert torch.equal(x[0], data.eval_transform(32, "bicubic", 37, more.get("resize", "crop"))(picture))
    assert data.ImageList([], None, white=5).numbered().white == 5
    write_tiff(tmp_path / "y.tif", ROW, 16)
    for white, most in ((None, 16), (4095, 255)):
        x, _ = next(data.batches(data.eval_loader([(str(tmp_path / "y.tif"),)], old | {"resize": "squash", "white": white}, 4)))
        assert abs(int(x.max()) - most) <= 2


def test_what_is_said_about_the_augmentation():
    standard = data.train_transform(32)
    assert data.describe_augment(standard, "standard") == \
        "augment: standard (random crop, horizontal flip; --no-flip where left and right differ)"
    assert data.describe_augment(data.train_transform(32, "strong", flip=False, resize="pad"), "strong") == \
        "augment: strong (random crop, colours, rotations or distortions, holes)"
    assert data.describe_augment(data.train_transform(32, "none"), "none") == "augment: none"
    assert data.describe_augment(v2.Compose([standard, v2.ColorJitter()]), "light") == "augment: light (ColorJitter)"
    assert data.describe_augment(lambda x: x, "light") == "augment: light"  # one of your own
    for name, hints in (("square", []), ("flat", ["hint: the augmentation gives 16 x 32 pixels, and validation 32 x 32"])):
        one = data.ImageList([], v2.Resize((16 if name == "flat" else 32, 32)))
        said = data.describe_views(one, {"image_size": 32, "resize": "crop", "white": None}, "light")
        assert said.splitlines() == ["augment: light", *hints]


def test_mix_seed_uses_every_number():
    seeds = {data.mix_seed(s, e, i) for s in range(5) for e in range(5) for i in range(5)}
    seeds |= {data.mix_seed(s, e) for s in range(5) for e in range(5)}  # the order of an epoch is no picture's seed
    assert len(seeds) == 150 and all(0 <= s < 2**32 for s in seeds)


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated"])
def test_a_picture_that_cannot_be_read_is_named(pictures, tmp_path, content):
    draw_folder(tmp_path, train=3, val=1)
    bad = tmp_path / "train/cat/bad.jpg"
    Image.new("RGB", (64, 64), "red").save(bad)
    bad.write_bytes(bad.read_bytes()[:400] if content == "truncated" else content)
    samples = data.find_images(tmp_path).splits["train"]
    for workers in (0, 1):
        order = data.SeededBatches(len(samples), 4)
        loader = data.make_loader(data.ImageList(samples, data.eval_transform(32)), order, workers)
        if workers == 0 or content == b"":  # a loader that is left in mid-epoch waits seconds for its workers
            with pytest.raises(data.DataError, match="cannot read .*bad.jpg") as error:
                list(data.batches(loader))
            assert "\n" not in str(error.value)
            del error  # it holds this frame, and so the loader: the garbage collector would wait ten seconds for its workers
        listed, said = data.ImageList(samples, data.eval_transform(32), on_bad_image="skip"), []
        loader = data.make_loader(listed, order, workers)
        for _ in range(2):
            assert sum(len(y) for _, y in data.batches(loader, say=said.append)) == 6
        assert [os.path.basename(path) for path in listed.skipped] == ["bad.jpg"]
        assert len(said) == 1 and str(bad) in said[0]  # once, though it was met twice
        if workers == 0:
            with pytest.raises(data.DataError, match="has the disk gone away"):
                list(data.batches(loader, at_least=4))


def test_batches_can_start_in_the_middle_and_nothing_before_is_read(tmp_path, monkeypatch):
    root = draw_folder(tmp_path, train=5, val=1)
    samples = data.find_images(root).splits["train"]
    listed, order = data.ImageList(samples, data.train_transform(32), seed=3), data.SeededBatches(10, 4, 3, shuffle=True)
    order.epoch = 1
    whole = [x for x, _ in data.batches(data.make_loader(listed, order))]
    assert [len(x) for x in whole] == [4, 4, 2]
    read, real = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *a: (read.append(path), real(path, *a))[1])
    for start in range(4):
        order.start = start
        read.clear()
        rest = [x for x, _ in data.batches(data.make_loader(listed, order))]
        assert len(rest) == len(order) == 3 - start and all(map(torch.equal, rest, whole[start:]))
        assert len(read) == [10, 6, 2, 0][start]


@pytest.mark.parametrize("size", [(1, 600000), (600000, 1)])
def test_a_picture_of_extreme_shape_is_cut_to_its_centre(tmp_path, size):
    picture = Image.new("RGB", size, "red")
    middle = tuple(side // 2 - min(side // 2, 2) for side in size)
    picture.paste("blue", (*middle, *(place + min(side, 4) for place, side in zip(middle, size, strict=True))))
    picture.save(tmp_path / "thin.png")
    image, _ = data.ImageList([(tmp_path / "thin.png", 0)], data.eval_transform(32))[0]
    assert image.shape == (3, 32, 32) and image[2, 16, 16] > 200 > image[0, 16, 16]
    wide = torch.randint(256, (3, 50, 300), dtype=torch.uint8)  # less extreme ones are as they ever were
    by_torchvision = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    assert torch.equal(data.eval_transform(32)(wide), by_torchvision(wide))


def as_tensors(*lists):
    return [torch.tensor(values).view(3, 1, 1) for values in lists]


def test_to_input_normalizes_as_torchvision_does():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    found = data.to_input(x, *as_tensors(mean, std))
    expected = v2.functional.normalize(v2.functional.to_dtype(x, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    features = torch.randn(2, 512)
    assert torch.equal(data.to_input(features, *as_tensors(mean, std)), features)


def test_eval_transform_is_torchvisions_preset():
    from torchvision.transforms._presets import ImageClassification

    picture = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)
    preset = ImageClassification(crop_size=56, resize_size=64)
    ours = data.to_input(data.eval_transform(56)(picture)[None], *as_tensors(preset.mean, preset.std))
    one_level = 1 / 255 / min(preset.std) + 1e-5  # the preset resizes in float and rounds, v2 in uint8: one grey level
    torch.testing.assert_close(ours[0], preset(picture), rtol=0, atol=one_level)
    assert (ours[0] - preset(picture)).abs().mean() < one_level / 4


# ---- MixUp and CutMix


def batch(length=6, channels_last=True):
    """Pictures of which no two pixels are the same, and labels of three classes, no two neighbours of one class."""
    x = torch.randn(length, 3, 16, 12, generator=torch.Generator().manual_seed(3))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout), torch.arange(length) % 3


def share_of_first(y, shares):
    """The share of each picture's own class, where that of the picture before it is another one."""
    own = shares.gather(1, y[:, None])[:, 0]
    other = shares.gather(1, y.roll(1, 0)[:, None])[:, 0]
    torch.testing.assert_close(shares.sum(1), torch.ones(len(y)))
    torch.testing.assert_close(own + other, torch.ones(len(y)))
    return own


@pytest.mark.parametrize("step", range(10))
def test_mixup_is_the_weighted_mean_with_the_picture_before(step):
    x, y = batch()
    mixed, shares = data.mix(x, y, data.mixer(3, mixup=1.0), 0, 2, step)
    lam = share_of_first(y, shares)
    assert shares.shape == (6, 3) and shares.dtype == torch.float32 and len(set(lam.tolist())) == 1
    lam = lam.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.roll(1, 0))


@pytest.mark.parametrize("step", range(10))
def test_cutmix_puts_a_rectangle_of_the_picture_before_into_each(step):
    x, y = batch()
    mixed, shares = data.mix(x, y, data.mixer(3, cutmix=1.0), 0, 2, step)
    own, other = (mixed == x).all(1), (mixed == x.roll(1, 0)).all(1)
    assert (own ^ other).all() and torch.equal(other, other[:1].expand_as(other))
    assert torch.equal(other[0], other[0].any(1)[:, None] & other[0].any(0)[None])  # a rectangle
    torch.testing.assert_close(share_of_first(y, shares), own.float().mean((1, 2)))


def test_both_alphas_choose_one_for_each_batch():
    x, y = batch()
    found = [data.mix(x, y, data.mixer(3, mixup=1.0, cutmix=1.0), 0, 0, step)[0] for step in range(60)]
    cut = [bool(((mixed == x) | (mixed == x.roll(1, 0))).all()) for mixed in found]
    assert 15 < sum(cut) < 45
    assert data.mixer(3) is None and data.mix(x, y, None, 0, 0, 0) == (x, y)


def test_alpha_is_that_of_the_beta_distribution():
    x, y = batch(2)
    for alpha, variance in ((0.2, 1 / 4 / 1.4), (1.0, 1 / 12)):  # 1 / 4 / (2 alpha + 1)
        lams = [data.mix(x, y, data.mixer(3, mixup=alpha), step)[1][0, 0].item() for step in range(1000)]
        assert abs(np.mean(lams) - 0.5) < 0.05 and abs(np.var(lams) - variance) < 0.015
    small, large = ([(data.mix(x, y, data.mixer(3, cutmix=alpha), step)[0] == x).all(1).float().mean().item()
                     for step in range(300)] for alpha in (0.05, 20))  # integers too
    assert np.mean(np.greater(small, 0.99)) > 0.2 and np.mean(np.greater(large, 0.99)) < 0.01


@pytest.mark.parametrize("alphas", [(0.4, 0), (0, 1.0), (0.4, 1.0)])
def test_mixing_draws_from_its_numbers_only(alphas):
    x, y = batch()
    mixer = data.mixer(3, *alphas)
    before = torch.get_rng_state()
    found = [data.mix(x, y, mixer, *numbers) for numbers in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))]
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from this
    torch.manual_seed(99)
    again = data.mix(x, y, data.mixer(3, *alphas), 0, 1, 2)
    assert torch.equal(again[0], found[0][0]) and torch.equal(again[1], found[0][1])
    assert len({mixed.numpy().tobytes() for mixed, _ in found}) == len(found)


def test_the_seed_of_a_batch_is_never_that_of_a_picture(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "mix_seed", lambda *numbers: seen.append(len(numbers)) or 0)
    for numbers in ((1,), (1, 2), (1, 2, 3)):
        data.mix(*batch(), data.mixer(3, 1.0), *numbers)
    assert min(seen) > 3  # ImageList's has three numbers, the order's two


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("channels_last", [True, False])
def test_mixing_keeps_the_layout_and_takes_any_length(length, channels_last):
    x, y = batch(length, channels_last)
    for mixer in (data.mixer(3, mixup=1.0), data.mixer(3, cutmix=1.0)):
        original = x.clone()
        mixed, shares = data.mix(x, y, mixer, 0)
        assert mixed.stride() == x.stride() and mixed.dtype == torch.float32 and shares.shape == (length, 3)
        assert torch.equal(x, original)
        if length == 1:  # its own neighbour
            torch.testing.assert_close(mixed, x)
            torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0, 0.0]]))


def test_check_names_every_picture_that_cannot_be_read(tmp_path, capsys):
    draw_folder(tmp_path, train=20)
    (tmp_path / "train/cat/notes.txt").write_text("x")
    for workers in ("0", "2"):
        with pytest.raises(SystemExit) as stopped:
            data.main(["--check", str(tmp_path), "-j", workers])
        assert stopped.value.code == 0 and capsys.readouterr().out == "40 pictures, 0 that cannot be read; passed over: 1 .txt\n"
    for name in ("train/cat/cat.1.png", "train/dog/dog.7.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        data.main(["--check", str(tmp_path), "-j", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and lines[-1].startswith("40 pictures, 2 that cannot be read")
    assert [line.split(" (")[0] for line in lines[:-1]] == [
        f"cannot read {tmp_path}/train/cat/cat.1.png", f"cannot read {tmp_path}/train/dog/dog.7.png"]


def test_check_names_files_whose_names_are_not_utf8(tmp_path, capsys):
    draw_folder(tmp_path, train=2)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        data.main(["--check", str(tmp_path), "-j", "0"])
    assert f"cannot read {tmp_path}/caf\\udce9.png (" in capsys.readouterr().out


def test_check_knows_white_and_says_what_stays_dark(tmp_path, capsys):
    for name, row, bits, kind in (("a.tif", ROW, 16, 1), ("b.tif", ROW.astype("f4"), 32, 3)):
        write_tiff(tmp_path / name, row, bits, kind)
    for options, status, words in (([], 1, "up to 4095: say which level is white"), (["--white", "4095"], 0, "2 pictures, 0 that"),
                                   (["--white", "70000"], 0, "train with --white 4095")):
        with pytest.raises(SystemExit) as stopped:
            data.main(["--check", str(tmp_path), "-j", "0", *options])
        assert stopped.value.code == status and words in capsys.readouterr().out


def test_check_into_a_closed_pipe(tmp_path):
    draw_folder(tmp_path, train=2)
    (tmp_path / "train/cat/cat.1.png").write_bytes(b"")
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, str(ROOT / "data.py"), "--check", str(tmp_path), "-j", "0"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_workers_start_with_stop_signals_blocked(tmp_path, monkeypatch):
    """Until they are ready to pass them over: a process that is spawned prints a traceback while it imports torch."""
    draw_folder(tmp_path, train=2)
    real, masks = data._live_and_die_with_the_script, tmp_path / "masks"

    def init(worker):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        real(worker)
        masks.write_text(f"{signal.SIGINT in before} {signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])}")

    monkeypatch.setattr(data, "_live_and_die_with_the_script", init)
    pictures = data.ImageList(data.find_images(tmp_path, 0.5).splits["train"], data.eval_transform(16))
    assert len(list(data.batches(data.make_loader(pictures, data.SeededBatches(len(pictures), 2), workers=1)))) == 1
    assert masks.read_text() == "True False"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("folder, words", [("nowhere", "no such folder"), ("empty", "holds no pictures"), ("file", "is a file")])
def test_check_of_a_folder_without_pictures(tmp_path, error_of, folder, words):
    (tmp_path / "empty").mkdir(), (tmp_path / "file").touch()
    assert words in error_of(data.main, ["--check", str(tmp_path / folder)])


def test_damaged_files_are_decoded_or_named(tmp_path):
    """A thousand seeded mutations of drawn pictures: bytes changed, cut out, doubled, cut off."""
    rng = random.Random(0)
    sources = []
    for name in ("x.jpg", "x.png", "x.webp", "x.gif", "x.tif", "x.bmp"):
        draw(tmp_path / name, "cat", name)
        sources.append((tmp_path / name).read_bytes())
    outcomes = Counter()
    for _ in range(1000):
        content = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 8)):
            at, kind = rng.randrange(len(content)), rng.randrange(4)
            if kind == 0:
                content[at] = rng.randrange(256)
            elif kind == 1:
                del content[at : at + rng.randint(1, 20)]
            elif kind == 2:
                content[at:at] = content[at : at + rng.randint(1, 20)]
            else:
                del content[max(1, at) :]
            content = content or bytearray(b"x")
        (tmp_path / "mutated.jpg").write_bytes(content)
        found = data.ImageList([(str(tmp_path / "mutated.jpg"), 0)], data.eval_transform(16), size=32)[(0, 0)]
        if isinstance(found, data.BadImage):
            assert found.reason and "\n" not in found.reason
        else:
            assert found[0].shape == (3, 16, 16) and found[0].dtype == torch.uint8
        outcomes[type(found).__name__] += 1
    assert outcomes["BadImage"] > 100 and outcomes["tuple"] > 50, outcomes
