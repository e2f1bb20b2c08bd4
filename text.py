"""Texts: find them and their classes, cut them into pieces, put those of like length into a batch; and the networks
that read them, of the package transformers.

    found = gather(rows, val_split=0.2)                        # .classes, .splits["train"] = [(text, label), ...], .notes
    pretrained = load_pretrained("./minilm")                   # or a name on the hub: "bert-base-uncased"
    tokenizer = make_tokenizer(pretrained)
    texts = TextList(found.splits["train"], tokenizer, max_length=128)
    loader = DataLoader(texts, batch_size=8, collate_fn=texts.collate)        # ({"input_ids": ..., ...}, labels, [])
    model = AutoModelForSequenceClassification.from_config(make_config(pretrained, found.classes), dtype=torch.float32)
    print(load_weights(model, pretrained, head="classifier"))

A tokenizer cuts a text into pieces (tokens), words and parts of words, and gives each a number. A text can be a pair: a
tuple of two texts, such as a premise and a hypothesis.

This file needs torch, and transformers for the networks, and can be copied into any project.
"""

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset


class TextError(Exception):
    """Texts or a network for them that cannot be used. The message is one line that names the way out."""


# ---- texts and their classes

Row = namedtuple("Row", "text split name where")
Row.__doc__ = """text: a text, or a tuple of two. split: train, val, test or None. name: of its class, or None. where: it
stands, for a person: "reviews.csv, line 3"."""

Texts = namedtuple("Texts", "classes splits notes")
Texts.__doc__ = """classes: sorted names. splits: {"train", "val", maybe "test": [(text, label), ...]}, where `label` is the
place of the class in that list. notes: lines for a person."""

# What a file or a folder of a split may be called.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


def find_tables(path, endings=TABLES, needs_train=True):
    """{split, or None for that of its rows: file}, of a table of texts, or of a folder that has one for each split,
    such as train.csv and test.csv; {} of another folder. Raises TextError, with needs_train if the split train lacks.
    """
    if not os.path.exists(path):
        raise TextError(f"no such file or folder: {path}: --data names a table of texts, or a folder")
    if not os.path.isdir(path):
        return {None: path}
    files = sorted(entry for entry in Path(path).iterdir() if entry.is_file() and entry.suffix.lower() in endings)
    found = defaultdict(list)
    for file in files:
        if split := SPLITS.get(file.stem.lower()):
            found[split].append(file)
    if twice := [of_split for of_split in found.values() if len(of_split) > 1]:
        raise TextError(f"{path} holds {' and '.join(file.name for file in twice[0])}: which is meant? move one away")
    if not found and any(Path(path).glob("*/*.txt")):
        return {}
    if not found and len(files) == 1:
        return {None: str(files[0])}
    if files and (not found or needs_train and "train" not in found):
        raise TextError(f"{path} holds {_some([file.name for file in files])}: name one of them, or call them train"
                        f"{files[0].suffix}, val{files[0].suffix} and test{files[0].suffix}")
    return {split: str(found[split][0]) for split in ("train", "val", "test") if split in found}


def read_folders(root, notes):
    """Rows of text files in class folders, maybe below train/, val/ and test/: one text a file, as the film reviews of
    Maas et al., "Learning Word Vectors for Sentiment Analysis", 2011, come. notes: takes lines for a person.
    """
    below = _folders(root)
    splits = {SPLITS[folder.name.lower()]: folder for folder in below if folder.name.lower() in SPLITS}
    rows = []
    if splits and "train" not in splits:
        raise TextError(f"{root} holds {_some([folder.name for folder in below])} and no train/: a folder of class "
                        "folders")
    for split, folder in splits.items() if splits else [(None, Path(root))]:
        for of_class in _folders(folder):
            files = sorted(path for path in of_class.iterdir() if path.suffix.lower() == ".txt")
            if files and of_class.name == "unsup":
                notes.append(f"note: {of_class}: {_count(len(files), 'text')} without a class: not used")
            elif files:
                name = unicodedata.normalize("NFC", of_class.name)
                rows += [Row(_read(path), split, name, str(path)) for path in files]
            else:
                notes.append(f"note: {of_class} holds no text files (.txt): not used")
    others = [folder.name + "/" for folder in below if splits and folder.name.lower() not in SPLITS]
    others += [path.name for path in Path(root).iterdir() if path.is_file() and not path.name.startswith(".")]
    if others and rows:
        notes.append(f"note: {root}: not used: {_some(sorted(others))}")
    if not rows:
        raise TextError(f"{root} holds no table of texts ({', '.join(TABLES)}) and no class folders of text files (.txt)")
    return rows


def _folders(root):
    return sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))


def read_lines(file):
    """Rows of a text file, each line of which is a text; of standard input, if `file` is "-". Blank lines at the end
    are passed over. Raises TextError.
    """
    name = "standard input" if file == "-" else file
    content = _decode(sys.stdin.buffer.read() if file == "-" else _bytes_of(file), name).rstrip()
    if not content:
        raise TextError(f"{name} is empty: nothing to predict")
    lines = enumerate(content.split("\n"), start=1)
    return [Row(line.strip(), None, None, f"{name}, line {number}") for number, line in lines]


def _read(path):
    return _decode(_bytes_of(path), path).strip()


def _bytes_of(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path} ({error.strerror})") from error


def _decode(content, name):
    try:
        found = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if "\0" in found:
        raise TextError(f"{name} holds NUL bytes, so it is no text")
    return found


def gather(rows, val_split=0.2, notes=()):
    """The texts of Rows, by split and class: Texts. Where no row is of val, a share of each class is set aside, chosen
    by a hash of the text, so that the same text is never parted. Raises TextError.
    """
    notes = list(notes)
    refuse_no_texts(rows)
    named = [row for row in rows if row.name is not None]
    if len(named) < len(rows):
        notes.append(f"note: left out {_count(len(rows) - len(named), 'row')} of the split test without a class: "
                     "predict_text.py predicts them")
    of_split = defaultdict(list)
    for row in named:
        of_split[row.split or "train"].append(row)
    classes = sorted({row.name for row in of_split["train"]})
    if not of_split["train"]:
        raise TextError("there are no rows of the split train: name some so in the column 'split', or the file train.csv")
    if len(classes) == 1:
        raise TextError(f"all texts of train are of the class {classes[0]!r}: a classifier needs two classes or more")
    if len(classes) == len(named):
        raise TextError(f"another class in each of the {len(named)} rows: a class needs several texts; is --target the "
                        "right column?")
    for split in ("val", "test"):
        for row in of_split[split]:
            if row.name not in classes:
                raise TextError(f"{row.where}: a row of the split {split} has the class {row.name!r}, which no row of "
                                "train has: put texts of it into train, or leave that row out")
    if not of_split["val"]:
        of_split["train"], of_split["val"] = _set_aside(of_split["train"], val_split)
    splits = {split: [(row.text, classes.index(row.name)) for row in of_split[split]]
              for split in ("train", "val", "test") if of_split[split]}
    return Texts(classes, splits, notes)


def refuse_no_texts(rows):
    """Raise TextError for the first of these Rows whose text, or a half of it, cannot be cut into pieces."""
    for row in rows:
        for part in [row.text] if isinstance(row.text, str) else row.text:
            if not part.strip():
                raise TextError(f"{row.where}: an empty text: write it, or leave it out")
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise TextError(f"{row.where}: the character {error.start + 1} is half of one (a surrogate), so this is "
                                "no text: mend it, or leave it out") from None


def _set_aside(rows, share):
    """(rows for train, rows for val): of each class the texts with the smallest hashes are val."""
    aside = set()
    for name in sorted({row.name for row in rows}):
        texts = sorted({row.text for row in rows if row.name == name}, key=_hash)
        if len(texts) == 1:
            where = next(row.where for row in rows if row.name == name)
            raise TextError(f"{where}: this is the only text of the class {name!r}, so it cannot be in train and in val: "
                            "add a second one, or leave that row out")
        aside.update(texts[: max(1, min(len(texts) - 1, round(share * len(texts))))])
    train, val = ([row for row in rows if (row.text in aside) == is_val] for is_val in (False, True))
    if lost := {row.name for row in rows} - {row.name for row in train}:
        raise TextError(f"all texts of the class {min(lost)!r} stand in another class, too, and went to val: give the "
                        "rows a split of their own")
    return train, val


def _hash(words):
    return hashlib.sha256(ascii(words).encode()).hexdigest()


def fingerprint(texts):
    """What a run learns from, in a few words: which texts are in train and val, in which classes."""
    content = [texts.classes, texts.splits["train"], texts.splits["val"]]
    sizes = ", ".join(f"{split} {len(texts.splits[split])}" for split in ("train", "val"))
    return f"{sizes}, content {_hash(content)[:8]}"


def refuse_others(found, before, data, file):
    """Raise TextError if the texts are not those that a run, resumed from the checkpoint `file`, has learned from
    before. found, before: their fingerprints.
    """
    if found != before:
        raise TextError(f"{data} holds other texts ({found}) than the run was started with ({before}): start a new run")


def counts(texts, split):
    """How many texts of each class a split has, in the order of the classes."""
    found = Counter(label for _, label in texts.splits[split])
    return [found[label] for label in range(len(texts.classes))]


def labels(samples):
    """The labels (N,) of a split [(text, label), ...], int64."""
    return torch.tensor([label for _, label in samples])


def describe(texts, most=20):
    """A table of the texts per class and split, and lines about those that stand in two splits or two classes."""
    width = max(len(name) for name in [*texts.classes, "class"])
    of_split = {split: counts(texts, split) for split in texts.splits}
    lines = [f"{'class':<{width}}" + "".join(f"{split:>8}" for split in of_split)]
    for label, name in enumerate(texts.classes[:most]):
        lines.append(f"{name:<{width}}" + "".join(f"{found[label]:8d}" for found in of_split.values()))
    if len(texts.classes) > most:
        lines.append(f"... and {len(texts.classes) - most} more classes")
    for split, found in of_split.items():
        if missing := [name for name, n in zip(texts.classes, found, strict=True) if not n]:
            lines.append(f"note: {split} has no text of {_some(missing)}: learned, but not scored")
    if all(re.fullmatch(r"-?\d+([.,]\d+)?", name) for name in texts.classes) and len(texts.classes) > 2:
        lines.append(f"note: the {len(texts.classes)} classes are all numbers: they are taken as names, of which none is "
                     "near to another")
    classes_of = defaultdict(set)
    for samples in texts.splits.values():
        for words, label in samples:
            classes_of[words].add(label)
    train = {words for words, _ in texts.splits["train"]}
    for split in ("val", "test"):
        both = sum(words in train for words, _ in texts.splits.get(split, ()))
        if both:
            lines.append(f"warning: {_count(both, 'text')} of {split} also in train: scores on these are too high")
    if torn := [words for words, found in classes_of.items() if len(found) > 1]:
        first = torn[0] if isinstance(torn[0], str) else " | ".join(torn[0])
        lines.append(f"warning: {_count(len(torn), 'text')} with different classes, such as {first[:60]!r}")
    return "\n".join([*lines, *texts.notes])


# ---- pieces


class TextList(Dataset):
    """Texts, cut into pieces, and their labels. Asked for a key (epoch, index) or an index, it gives the text's pieces
    and its label; `collate` makes a batch of such items.

    samples: [(text, label), ...], where a text may be a tuple of two. tokenizer: of transformers. max_length: how many
    pieces a text may have; of a longer one the end is left out, of a pair that of the longer half.
    lengths: the pieces of each text. cut: how many texts are longer than max_length. whole_lengths: without the cut.
    """

    def __init__(self, samples, tokenizer, max_length):
        self.targets = labels(samples)
        self.pad = tokenizer.pad_token_id or 0
        self.pad_left = tokenizer.padding_side == "left"
        with_types = "token_type_ids" in tokenizer.model_input_names
        texts = [words for words, _ in samples]
        # The tokenizer's own padding and truncation, which its file may ask for, are off.
        found = _encode(tokenizer, texts)
        self.whole_lengths = [len(ids) for ids in found["input_ids"]]
        self.cut = sum(length > max_length for length in self.whole_lengths)
        if self.cut:
            found = _encode(tokenizer, texts, truncation=True, max_length=max_length)
        self.lengths = [len(ids) for ids in found["input_ids"]]
        self.starts = torch.tensor([0, *self.lengths]).cumsum(0)
        # All in one tensor, which workers share: a list of lists would be copied into each.
        self.ids = torch.tensor([piece for ids in found["input_ids"] for piece in ids], dtype=torch.int32)
        types = [kind for kinds in found["token_type_ids"] for kind in kinds] if with_types else None
        self.types = torch.tensor(types, dtype=torch.int8) if with_types else None

    def __len__(self):
        return len(self.lengths)

    def labels(self):
        return self.targets

    def numbered(self):
        """The same texts, with their places in the list as labels."""
        same = copy.copy(self)
        same.targets = torch.arange(len(self))
        return same

    def __getitem__(self, key):
        _, index = key if isinstance(key, tuple) else (0, key)
        place = slice(self.starts[index], self.starts[index + 1])
        return self.ids[place], None if self.types is None else self.types[place], self.targets[index]

    def collate(self, items):
        """({"input_ids", "attention_mask" (1 for a piece, 0 for padding), maybe "token_type_ids" (which half of a
        pair): int64 (N, T)}, labels (N,), []), T being the length of the longest of these texts. The last are the
        samples that could not be read, which data.steps asks for; of texts there are none.
        """
        if not items:  # of a small batch, a process may have none
            return None, None, []
        ids, types, found = zip(*items, strict=True)
        x = {"input_ids": self._padded(ids, self.pad),
             "attention_mask": self._padded([torch.ones_like(one) for one in ids], 0)}
        if self.types is not None:
            x["token_type_ids"] = self._padded(types, 0)
        return x, torch.stack(found), []

    def _padded(self, rows, value):
        side = "left" if self.pad_left else "right"
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side).long()


def _encode(tokenizer, texts, **how):
    """The tokenizer's numbers for texts, or for pairs of them."""
    texts = texts if isinstance(texts[0], str) else list(map(tuple, texts))
    parts = [texts] if isinstance(texts[0], str) else [list(half) for half in zip(*texts, strict=True)]
    with _quiet():  # it would warn of texts that are longer than the network takes: describe_lengths says so
        return tokenizer(*parts, padding=False, **({"truncation": False} | how))


def describe_lengths(texts, max_length):
    """A line about the lengths of a TextList."""
    lengths = sorted(texts.whole_lengths)
    median, most = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    numbers = f"median {median}, 95 % up to {most}, longest {lengths[-1]}"
    cut = f"{_count(texts.cut, 'text')} cut off there" if texts.cut else "none is cut off"
    return f"pieces per text: {numbers}; --max-length {max_length}: {cut}"


def to_input(x, device):
    """A batch for the network, as keyword arguments: the dict of `TextList.collate`, or cached features (N, ...)."""
    x = x if isinstance(x, dict) else {"features": x}
    return {name: part.to(device, non_blocking=True) for name, part in x.items()}


# ---- texts of like length in one batch


class ByLength:
    """Puts the order of an epoch into another one, such that the texts of a step are about as long as each other: a
    batch is padded to its longest text, and padding costs time and gives nothing. For data.SeededBatches(...,
    arrange=this).

    The order, a permutation, is cut into pools of 50 steps (or a quarter of all, if that is less). Within a pool, the
    texts are sorted by length and cut into steps, and the steps of all pools come in random order, but for a smaller
    last one, which has the longest texts of the last pool. So a text meets others of its pool that are as long, in each
    epoch others. (With fewer than eight steps a pool is one step: nothing is sorted.)

    lengths: of each text. seed: draws the order of the steps, with the epoch. accumulate: batches per step. regroup:
    False: the texts of a step are the same in every epoch, and the steps come in another order. What a frozen encoder
    makes of a text depends, in the last bits, on how far it is padded; so features that were computed once are those of
    every epoch, bit for bit.
    """

    POOL = 50

    def __init__(self, lengths, seed=0, accumulate=1, regroup=True):
        self.lengths, self.seed, self.accumulate, self.regroup = lengths, seed, accumulate, regroup

    def __call__(self, order, sizes, epoch):
        if not self.regroup:
            order = _permutation(len(order), self.seed)
        size = sizes[0] * self.accumulate
        count = len(order) // size
        pool = size * max(1, min(self.POOL, count // 4))
        arranged = []
        for start in range(0, len(order), pool):
            arranged += sorted(order[start : start + pool], key=lambda place: self.lengths[place])
        steps = [arranged[i * size : (i + 1) * size] for i in range(count)]
        mixed = [steps[i] for i in _permutation(count, self.seed, epoch)]
        return [place for step in mixed for place in step] + arranged[count * size :]


class LongestFirst:
    """For evaluation: all texts by length. What does not fit into memory shows at once."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, order, sizes, epoch):
        return sorted(order, key=lambda place: -self.lengths[place])


def _permutation(length, *numbers):
    seed = int(hashlib.sha256(repr(numbers).encode()).hexdigest()[:15], 16)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


# ---- networks of transformers

# The tokenizer is made of these, whichever of them a network comes with.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
                   "vocab.json", "merges.txt", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model")


def load_pretrained(name, weights="pretrained"):
    """A network of transformers: of a local folder (config.json, model.safetensors, tokenizer.json), or of that name on
    the hub, downloaded once into its cache. Nothing of it is executed: no remote code, no pickle.

    weights: "none": its shape and its tokenizer alone, for random weights. Returns a dict of plain values and tensors:
    config (JSON), tokenizer ({name of a file: its content}), state_dict (None with weights "none"), source (words).
    `make_config` and `make_tokenizer` make objects of it. Raises TextError; a network is never left at random weights
    because a download failed.
    """
    folder = Path(name) if os.path.isdir(name) else _download(name)
    if not (folder / "config.json").is_file():
        raise TextError(f"{folder} holds no config.json: --model names the folder of a network of transformers, as "
                        "save_pretrained writes it, or its name on the hub")
    files = {file: (folder / file).read_bytes() for file in TOKENIZER_FILES if (folder / file).is_file()}
    if not files.keys() - {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}:
        raise TextError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.txt and the like): copy the files of the "
                        "one that it was trained with into that folder")
    return {"config": (folder / "config.json").read_text(encoding="utf-8"),
            "tokenizer": {file: content.decode("latin-1") for file, content in files.items()},
            "state_dict": None if weights == "none" else _read_weights(folder), "source": str(name)}


def _download(name):
    """The folder of a network of the hub."""
    if os.path.exists(name):
        kind = "a checkpoint or another file of weights" if Path(name).suffix in (".pt", ".pth", ".bin") else "a file"
        raise TextError(f"{name} is {kind}: --model takes a folder of transformers (config.json, model.safetensors, "
                        "tokenizer.json), or its name on the hub; predict_text.py --save-pretrained makes such a folder "
                        "of a checkpoint")
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if looks_local:
        raise TextError(f"no such folder: {name}: --model takes a folder of transformers, or the name of a network on the "
                        "hub")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *TOKENIZER_FILES, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no network, no such name, a gated one: many kinds
        reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
        raise TextError(f"'{name}' is no folder here, and could not be downloaded from the hub ({reason}): fetch its "
                        "config.json, model.safetensors and tokenizer files elsewhere, and give their folder as --model "
                        "DIR") from error


def _read_weights(folder):
    """{name: tensor} of a folder's safetensors, float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    try:
        parts = {"model.safetensors"}
        if index.is_file():
            parts = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f"{index} cannot be read: fetch it again") from error
    if lacking := [part for part in sorted(parts) if not (folder / part).is_file()]:
        pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        if pickles and not index.is_file():
            code = ("import sys, torch; from safetensors.torch import save_file; "
                    "f = torch.load(sys.argv[1], weights_only=True); "
                    "save_file({k: v.clone() for k, v in f.items()}, sys.argv[2])")
            raise TextError(f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code, and no "
                            f'model.safetensors: type python -c "{code}" {shlex.quote(str(folder / pickles[0]))} '
                            f"{shlex.quote(str(folder / 'model.safetensors'))}")
        raise TextError(f"{folder} lacks {lacking[0]}: fetch it, or give another folder; where the hub has a "
                        "pytorch_model.bin alone, put that into a folder with the other files, and name the folder")
    state_dict = {}
    for part in parts:
        try:
            state_dict |= load_file(folder / part)
        except (SafetensorError, OSError, ValueError) as error:
            raise TextError(f"{folder / part} cannot be read ({str(error)[:100]}): fetch it again") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}


def make_config(pretrained, classes, tokenizer=None):
    """The configuration of a network with one output for each class, from `load_pretrained` or what a checkpoint holds
    of it; tokenizer: whose padding it is to know. Raises TextError.
    """
    from transformers import AutoConfig, __version__

    try:
        options = json.loads(pretrained["config"])
        kind = options.pop("model_type")
    except (ValueError, KeyError) as error:
        raise TextError(f"{pretrained['source']}: its config.json names no model_type: is it that of "
                        "transformers?") from error
    options.pop("auto_map", None)  # code of its own, which is not run
    try:
        with _quiet():
            config = AutoConfig.for_model(kind, **options)
    except ValueError as error:
        raise TextError(f"{pretrained['source']}: transformers {__version__} knows no network of the kind '{kind}': take "
                        "a newer one (pip install -U transformers), or another network; code that comes with a network is "
                        "not run") from error
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if tokenizer is not None and config.pad_token_id is None:  # of a GPT
        config.pad_token_id = tokenizer.pad_token_id
    return config


def make_tokenizer(pretrained, of_words=False):
    """The tokenizer, from `load_pretrained` or what a checkpoint holds of it; of_words: for texts that are lists of words,
    of which those of the kind of GPT-2 and RoBERTa then see each one with a blank before it. Raises TextError.
    """
    from transformers import AutoTokenizer

    files = pretrained["tokenizer"]
    of_bytes = "merges.txt" in files or '"ByteLevel"' in files.get("tokenizer.json", "")
    how = {"add_prefix_space": True} if of_words and of_bytes else {}
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder, _quiet():
        write_files(pretrained, folder)
        if how and "tokenizer.json" in files:  # which some kinds of tokenizers follow, and not what they are told
            _with_blanks_before_words(Path(folder, "tokenizer.json"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **how)
        except Exception as error:  # whatever is wrong with its files
            reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
            raise TextError(f"{pretrained['source']}: its tokenizer cannot be made ({reason}): fetch its files "
                            "again") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = ""
    return tokenizer


def _with_blanks_before_words(file):
    state = json.loads(file.read_text(encoding="utf-8"))
    cutter = state.get("pre_tokenizer") or {}
    for part in [cutter, *cutter.get("pretokenizers", ())]:
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = True
    file.write_text(json.dumps(state), encoding="utf-8")


def write_files(pretrained, folder):
    """Write config.json and the tokenizer's files into a folder."""
    Path(folder, "config.json").write_text(pretrained["config"], encoding="utf-8")
    for name, content in pretrained["tokenizer"].items():
        Path(folder, name).write_bytes(content.encode("latin-1"))


# These number their positions from the one behind the number of the padding: RoBERTa's 514 make 512 pieces.
BEHIND_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text", "xmod",
                  "roberta-prelayernorm", "ibert", "esm", "lilt", "layoutlmv3")


def longest(config, tokenizer):
    """How many pieces a text may have for this network; None if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions <= 0:  # XLNet, ALBERT's relatives: none
        positions = None
    if positions is not None and config.model_type in BEHIND_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    known = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((limit for limit in (positions, known) if limit is not None), default=None)


def pick_max_length(wanted, config, tokenizer):
    """--max-length, or the default: as many as the network takes, 512 at most. Raises TextError if that is too long."""
    limit = longest(config, tokenizer)
    if wanted is not None and limit is not None and wanted > limit:
        raise TextError(f"--max-length {wanted}: this {config.model_type} has positions for {limit} pieces")
    least = tokenizer.num_special_tokens_to_add(pair=True) + 1
    if wanted is not None and wanted < least:
        raise TextError(f"--max-length {wanted} leaves no room for a text: {least - 1} pieces are marks of the beginning "
                        "and the end")
    return wanted or min(512, limit or 512)


def make_network(config, source="", of_words=False):
    """AutoModelForSequenceClassification.from_config(config), with random weights; of_words: the one for tokens. Raises
    TextError for a kind without such a head.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if of_words else AutoModelForSequenceClassification
    try:
        with _quiet():
            return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise TextError(f"{source}: a {config.model_type} has no head for classes in transformers: take another network, "
                        "an encoder such as BERT") from error


def find_head(model):
    """The dotted name of a network's head: the last `nn.Linear` outside its encoder, which has an output for each
    class. (In a CamemBERT it stands before the encoder.) Raises TextError.
    """
    encoder = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and not name.startswith(encoder)]
    if not names or model.get_submodule(names[-1]).out_features != model.config.num_labels:
        raise TextError(f"no layer of this {type(model).__name__} has an output for each class: take --pool mean, or "
                        "another network")
    return names[-1]


class MeanPooled(nn.Module):
    """An encoder, the mean over a text's pieces, padding left out, and a linear head `classifier`, which is to be
    replaced. (Reimers and Gurevych, "Sentence-BERT", 2019.) Names are those of the network that it is made of.

    network: for sequence classification, of transformers; its encoder is taken, and its pooling left behind.
    """

    def __init__(self, network):
        super().__init__()
        self.config, self.base_model_prefix = network.config, network.base_model_prefix
        encoder = network.base_model
        if getattr(encoder, "pooler", None) is not None:  # a layer of which nothing would be used
            encoder.pooler = nn.Identity()
        setattr(self, self.base_model_prefix, encoder)
        self.dropout = nn.Dropout(_dropout_of(network))
        self.classifier = nn.Linear(self.config.hidden_size, network.config.num_labels)

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **more):
        """As that of the network: an object whose `logits` are (N, classes)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        found = self.base_model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **more)
        mean = mean_over_pieces(found.last_hidden_state, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))


def mean_over_pieces(hidden, attention_mask=None):
    """Mean (N, H), in float32, of hidden (N, T, H) over the pieces of each text, where attention_mask (N, T) is 1. (For
    the maximum: hidden.masked_fill(mask == 0, -math.inf).amax(1), here and, without a mask, hidden.amax(1).)
    """
    hidden = hidden.float()
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _dropouts(network):
    """The dropout layers beside the head: those outside the encoder."""
    inside = {id(module) for module in network.base_model.modules()}
    return [module for module in network.modules() if id(module) not in inside and hasattr(module, "p")
            and "dropout" in type(module).__name__.lower()]


def _dropout_of(network):
    return next((float(layer.p) for layer in _dropouts(network)), 0.1)


def set_dropout(network, p):
    """Set the dropout beside the head. Raises TextError if there is none."""
    layers = _dropouts(network)
    if not layers:
        raise TextError(f"--dropout: this {type(network).__name__} has no dropout beside its head")
    for layer in layers:
        layer.p = p


def load_weights(model, pretrained, head, same_classes=False):
    """Load pretrained weights, all that fit. Returns (words about what was left out and what is new, the names of the
    layers besides the head for which there were none: they keep their random start).

    Raises TextError if weights of the encoder are missing: it would learn from noise.
    """
    if pretrained["state_dict"] is None:
        return "random weights", []
    prefix, own = f"{model.base_model_prefix}.", model.state_dict()
    found, left_out = {}, []
    for name, tensor in pretrained["state_dict"].items():
        # The oldest files call a LayerNorm's weight and bias so.
        plain = name.removeprefix("module.").replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias")
        # A file of the encoder alone has no prefix.
        target = next((n for n in (plain, prefix + plain) if n in own), None)
        if target is None or (_is_under(target, head) and not same_classes):
            left_out.append(name)
        elif tensor.shape != own[target].shape:
            raise TextError(f"{pretrained['source']}: {name} is {tuple(tensor.shape)} in the weights and "
                            f"{tuple(own[target].shape)} by config.json: they are not of one network")
        else:
            found[target] = tensor
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in found and not _is_under(name, head)]
    pooler = f"{prefix}pooler."
    if lacking := [name for name in missing if name.startswith(prefix) and not name.startswith(pooler)]:
        raise TextError(f"{pretrained['source']}: its weights lack {_count(len(lacking), 'tensor')} of this "
                        f"{type(model).__name__}, such as {lacking[0]}: is config.json that of these weights?")
    model.load_state_dict(found, strict=False)
    fresh = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
    same = same_classes and any(_is_under(name, head) for name in found)
    words = [f"loaded {len(found)} tensors", "the head, too" if same else f"new: {', '.join([head, *fresh])}"]
    if left_out := list(dict.fromkeys(".".join(name.split(".")[:2]) for name in left_out)):
        words.append(f"left out: {_some(left_out)}")
    return "; ".join(words), fresh


def same_head(pretrained, classes):
    """Whether a network's own head tells these classes apart, by their names."""
    names = json.loads(pretrained["config"]).get("id2label") or {}
    return [names[key] for key in sorted(names, key=int)] == classes


def network_of(state):
    """The network of a checkpoint that train_text_classifier.py wrote, or train_token_classifier.py (its pool is "words"),
    with its weights. Raises TextError.
    """
    source, classes, head = state["build"]["source"], state["classes"], state["head"]
    model = make_network(make_config(state["build"], classes), source, state["pool"] == "words")
    if state["pool"] == "mean":
        model = MeanPooled(model)
    try:
        has_bias = f"{head}.bias" in state["model"]
        model.set_submodule(head, nn.Linear(model.get_submodule(head).in_features, len(classes), has_bias))
        model.load_state_dict(state["model"])
    except (AttributeError, RuntimeError) as error:
        raise TextError(f"the weights of the checkpoint do not fit its network, made of {source}: take the version of "
                        "transformers that it was trained with") from error
    return model


def save_pretrained(state, folder):
    """Write the network and the tokenizer of a checkpoint into a new or empty folder, from which transformers loads
    them: config.json, model.safetensors, tokenizer.json. Returns the names of the files. Raises TextError.

    What was written is loaded again and tried; if it answers otherwise than the checkpoint, nothing stays there.
    """
    from safetensors import SafetensorError

    folder = Path(folder)
    if state["pool"] == "mean":
        raise TextError("no network of transformers classifies by the mean over the pieces (--pool mean): predict with "
                        "predict_text.py, or train with --pool head")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise TextError(f"{folder} exists and is no empty folder: it was left as it is, give another name")
    model, is_new = network_of(state).eval(), not folder.exists()
    tokenizer = make_tokenizer(state["build"], state["pool"] == "words")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _quiet():
            model.save_pretrained(folder)
            _without_limits(tokenizer, state["max_length"]).save_pretrained(folder)
            _compare(state, model, folder)
    except BaseException as error:
        for path in folder.glob("*"):
            path.unlink()
        if is_new and folder.exists():
            folder.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or error
            raise TextError(f"could not write {folder} ({reason}): make room there, or write elsewhere") from error
        raise
    return sorted(path.name for path in folder.iterdir())


def _without_limits(tokenizer, max_length):
    """The tokenizer, such that truncation=True cuts at max_length, and nothing else cuts or pads."""
    tokenizer.model_max_length = max_length
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


@torch.inference_mode()
def _compare(state, model, folder):
    """Raise TextError if a folder of transformers cuts a text into other pieces than the checkpoint, or has other
    outputs.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    of_words = state["pool"] == "words"
    kind = AutoModelForTokenClassification if of_words else AutoModelForSequenceClassification
    # Longer than max_length: each sentence has 8 pieces or more.
    words = " ".join(f"These are {number} words to try it by." for number in range(state["max_length"] // 8 + 1))
    own = make_tokenizer(state["build"], of_words)
    cut = _encode(own, [words], truncation=True, max_length=state["max_length"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    again = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    # The beginning is enough for the networks, and quick.
    x = {name: torch.tensor(found)[:, :64] for name, found in cut.items()}
    same = torch.allclose(model(**x).logits, again.eval()(**x).logits, rtol=1e-4, atol=1e-4)
    if not same or tokenizer(words, truncation=True)["input_ids"] != cut["input_ids"][0]:
        raise TextError(f"transformers makes something else of this {type(model).__name__} than it is: nothing was "
                        "written; predict with predict_text.py")


def _is_under(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def prediction_rows(texts, rows):
    """Rows of predictions with the texts in place of `file`: in the column text, or of pairs in text and text_2."""
    found = []
    for words, row in zip(texts, rows, strict=True):
        parts = {"text": words} if isinstance(words, str) else {"text": words[0], "text_2": words[1]}
        found.append(parts | {name: value for name, value in row.items() if name != "file"})
    return found


# ---- cached features


class HeadSide(nn.Module):
    """What follows a network's encoder, as a module of its own that shares the layers: HeadSide(model, head)(features)
    is model(**x), bit for bit, where features (N, H) are HeadSide(model, head).features(x): what the encoder hands on.

    It runs the network itself, whose encoder is replaced by one that passes on what it is given. head: its name.
    """

    def __init__(self, model, head):
        super().__init__()
        self.network = copy.copy(model)
        self.network._modules = dict(model._modules) | {model.base_model_prefix: _InPlaceOfEncoder()}
        self.whole = (model,)  # in a tuple, so that it is none of this module's own parts
        self.head = head
        self.pool = mean_of_tokens if isinstance(model, MeanPooled) else None

    def forward(self, features):
        self.network.training = self.whole[0].training
        return self.network(inputs_embeds=features[:, None])

    def features(self, x):
        """Features (N, H) of a batch x, without gradients, of a model in eval(). Raises TextError for a network that
        looks at more than that.
        """
        model = self.whole[0]
        found, mask = model.base_model(**x), x.get("attention_mask")
        if self.pool is None:
            # What does the network look at: the encoder's own pooling, its first token, or the mean? The one is right
            # by which its head gets what it gets from the whole network.
            with _inputs_of(model.get_submodule(self.head)) as inputs:
                model(**x)
                fitting = [pool for pool in (pooler_output, first_token, mean_of_tokens)
                           if self._leads_to(inputs, pool, found, mask)]
            if not fitting:
                raise TextError(f"--cache-features: the head of this {type(model).__name__} looks at more than one vector "
                                "of a text: use --pool mean, or leave --cache-features out")
            self.pool = fitting[0]
        return self.pool(found, mask)

    def _leads_to(self, inputs, pool, found, mask):
        """inputs: of the head, the first ones from the whole network."""
        with contextlib.suppress(Exception):  # there may be no such output, or the network may need the tokens
            self(pool(found, mask))
            return torch.allclose(inputs[-1].float(), inputs[0].float(), rtol=1e-4, atol=1e-5)
        return False


class _InPlaceOfEncoder(nn.Module):
    def forward(self, *args, inputs_embeds=None, **more):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])


@contextlib.contextmanager
def _inputs_of(layer):
    """The inputs that a layer gets in this block, in a list."""
    found = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def pooler_output(found, mask):
    """The encoder's own pooling: BERT has a layer for that."""
    return found.pooler_output


def first_token(found, mask):
    return found.last_hidden_state[:, 0]


def mean_of_tokens(found, mask):
    return mean_over_pieces(found.last_hidden_state, mask)


# ---- words


@contextlib.contextmanager
def _quiet():
    """Without the warnings and progress bars of transformers: what is to be said, these scripts say."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    logger = logging.getLogger("transformers")
    before, has_bars = logger.level, is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if has_bars:
            enable_progress_bar()


def _count(number, word):
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
