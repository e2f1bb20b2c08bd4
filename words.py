"""Words and their tags: read files of them, find the entities that they name, cut sentences into windows of pieces for
a network, score what was found.

    corpus = gather("./wnut17")                # .classes: ["O", "B-loc", "I-loc", ...]; .splits["train"]: sentences
    windows = WordList(corpus.splits["train"], corpus.classes, tokenizer, max_length=512)
    loader = DataLoader(windows, batch_size=8, collate_fn=windows.collate)
    model = WordClassifier(AutoModelForTokenClassification.from_config(config))
    for x, y, _ in loader:
        logits = model(**x).logits             # (W, C): a row for each word of these windows, as y has a label
    print(entities(["B-loc", "I-loc", "O"]))   # [(0, 2, "loc")]: from word 0 up to, not including, word 2

A tag says of a word whether it is in an entity, and of which type. An entity is what counts: its first word, its last
word and its type. A tokenizer cuts words into pieces; a network answers for pieces, and the first of a word answers for
it.

This file needs torch, and a tokenizer and a network of transformers that are given; it can be copied into any project.
"""

import copy
import hashlib
import json
import math
import os
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset


class WordError(Exception):
    """Words or tags that cannot be used. The message is one line that names the way out."""


# ---- tags and entities

# IOB2: every entity begins with B. IOB1: with I, and with B only right behind another one of its type. IO: no B at all.
# BIOES: a last word has E, a single one S; BILOU calls these L and U.
SCHEMES = ("IOB2", "IOB1", "IO", "BIOES", "BILOU")


def entities(tags):
    """The entities of a sentence, [(first word, the word behind the last, type), ...], by one rule for all schemes,
    also for tags that break theirs; it is that of conlleval. An entity begins at B, S and U; and at I, E and L, if the
    word before is in none, in one of another type, or the end of one.
    """
    found, start, of_type, has_ended = [], None, None, True
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix in ("I", "E", "L") and start is not None and name == of_type and not has_ended
        if start is not None and not goes_on:
            found.append((start, place, of_type))
            start = None
        if prefix != "O" and not goes_on:
            start, of_type = place, name
        has_ended = prefix in ("E", "L", "S", "U")
    return found


def encode(length, found, scheme="IOB2"):
    """The tags of a sentence of so many words with these entities. (In IO, neighbours of one type cannot be told apart:
    the second begins with B, as in IOB1.)
    """
    last, single = {"BIOES": ("E", "S"), "BILOU": ("L", "U")}.get(scheme, ("I", "B"))
    tags = ["O"] * length
    for start, end, name in found:
        for place in range(start, end):
            tags[place] = f"I-{name}"
        touches = start > 0 and tags[start - 1].partition("-")[2] == name
        if scheme in ("IOB2", "BIOES", "BILOU") or touches:
            tags[start] = f"B-{name}"
        if scheme in ("BIOES", "BILOU"):
            tags[end - 1] = f"{single if end - start == 1 else last}-{name}"
    return tags


def recognize(sentences):
    """The scheme of sentences (lists of tags): one of SCHEMES. Where B and I both begin entities, the one that does so
    more often decides; `breaks` tells the others. Raises ValueError for tags of BIOES and BILOU together.
    """
    prefixes = {tag[0] for tags in sentences for tag in tags}
    of_bioes, of_bilou = prefixes & {"E", "S"}, prefixes & {"L", "U"}
    if of_bioes and of_bilou:
        raise ValueError("E and S are of BIOES, L and U of BILOU")
    if of_bioes or of_bilou:
        return "BIOES" if of_bioes else "BILOU"
    if "B" not in prefixes:
        return "IO" if "I" in prefixes else "IOB2"
    against_iob2, against_iob1 = (sum(len(breaks(tags, scheme)) for tags in sentences) for scheme in ("IOB2", "IOB1"))
    return "IOB1" if against_iob1 < against_iob2 else "IOB2"


def breaks(tags, scheme):
    """The places of a sentence whose tag the scheme does not allow behind the one before; at its end, that of a last
    word whose entity has no end.
    """
    found, before = [], "O"
    for place, tag in enumerate([*tags, "O"]):
        same_type = tag != "O" and tag[2:] == before[2:]
        if scheme == "IOB2":
            is_wrong = tag[0] == "I" and not same_type
        elif scheme == "IOB1":
            is_wrong = tag[0] == "B" and not same_type
        elif scheme == "IO":
            is_wrong = False
        else:
            is_open, goes_on = before[0] in "BI", tag[0] in "IEL"
            is_wrong = is_open != goes_on or goes_on and not same_type
        if is_wrong:
            found.append(min(place, len(tags) - 1))
        before = tag
    return found


# ---- files

Sentence = namedtuple("Sentence", "words tags lines")
Sentence.__doc__ = """words: texts. tags: one for each, in IOB2, or None if they are not known. lines: for each word the
number of its line."""

Tagged = namedtuple("Tagged", "sentences scheme notes")
Tagged.__doc__ = """sentences: [Sentence, ...]. scheme: the one of the file, or None. notes: lines for a person."""

Corpus = namedtuple("Corpus", "classes splits notes")
Corpus.__doc__ = """classes: the tags of IOB2, "O" first, then B and I of each type, sorted. splits: {"train", "val",
maybe "test": [Sentence, ...]}. notes: lines for a person."""

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}
JSON = (".jsonl", ".ndjson", ".json")
TAG = re.compile(r"O|[BIESLU]-.+")


def find_files(path):
    """{split: file} of a folder that has train, and maybe val or dev, and test, of any ending; {"train": file} of a
    file. Raises WordError.
    """
    if not os.path.exists(path):
        raise WordError(f"no such file or folder: {path}: --data names a CoNLL file, or a folder with train, val and "
                        "test")
    if not os.path.isdir(path):
        return {"train": str(path)}
    files = sorted(entry for entry in Path(path).iterdir() if entry.is_file() and not entry.name.startswith("."))
    found = defaultdict(list)
    for file in files:
        if split := SPLITS.get(file.stem.lower()):
            found[split].append(file)
    if twice := [of_split for of_split in found.values() if len(of_split) > 1]:
        raise WordError(f"{path} holds {' and '.join(file.name for file in twice[0])}: which is meant? move one away")
    if "train" not in found and len(files) == 1:
        return {"train": str(files[0])}
    if "train" not in found:
        raise WordError(f"{path} holds {_some([file.name for file in files]) or 'no files'}: name one of them, or call "
                        "them train, val (or dev) and test, with any ending")
    return {split: str(found[split][0]) for split in ("train", "val", "test") if split in found}


def read(file, tags_optional=False):
    """The sentences of a CoNLL file, a word a line and its tag last, or of JSON lines, {"tokens": [...], "tags":
    [...]}: Tagged. tags_optional: a file of words alone will do. Raises WordError that names the line.
    """
    of_json = str(file).lower().endswith(JSON)
    sentences = (_read_json_lines if of_json else _read_columns)(read_text(file), file, tags_optional)
    if not sentences:
        raise WordError(f"{file} holds no words: a word and its tag a line, a blank line behind each sentence")
    if sentences[0].tags is None:
        return Tagged(sentences, None, [])
    _refuse_two_schemes(sentences, file)
    scheme = recognize([sentence.tags for sentence in sentences])
    notes = [f"{file}: tags are {scheme}"]
    wrong = [(sentence, place) for sentence in sentences for place in breaks(sentence.tags, scheme)]
    if wrong:
        sentence, place = wrong[0]
        before = sentence.tags[place - 1] if place else "the beginning"
        notes.append(f"warning: {file}: {_count(len(wrong), 'tag')} against {scheme}, such as {sentence.tags[place]} "
                     f"behind {before} in line {sentence.lines[place]}: read as the beginning or end of an entity")
    in_iob2 = [Sentence(words, encode(len(words), entities(tags)), lines) for words, tags, lines in sentences]
    return Tagged(in_iob2, scheme, notes)


def read_text(file):
    """The text of a file in UTF-8. Raises WordError."""
    try:
        found = Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise WordError(f"cannot read {file} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise WordError(f"{file} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if "\0" in found:
        raise WordError(f"{file} holds NUL bytes, so it is no text")
    return found


def _read_columns(content, file, tags_optional):
    lines = [line.rstrip(" \t\r") for line in content.split("\n")]
    of_words = (line for line in lines if line and not line.startswith("-DOCSTART-")
                and not (line.startswith("#") and "\t" not in line))
    first = next(of_words, "")
    mark = "\t" if "\t" in first else " "
    columns = len(first.split("\t") if mark == "\t" else first.split())
    sentences, begun = [], None
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("-DOCSTART-"):
            begun = None
        elif not _is_comment(line, mark, columns):
            if begun is None:
                begun = Sentence([], [], [])
                sentences.append(begun)
            word, tag = _cells(line, mark, columns, f"{file}, line {number}", tags_optional)
            begun.words.append(word)
            begun.tags.append(tag)
            begun.lines.append(number)
    if columns == 1:
        return [sentence._replace(tags=None) for sentence in sentences]
    return sentences


def _is_comment(line, mark, columns):
    """Whether a line is a comment ("# id 5") and not the word "#" with its tag."""
    if mark == "\t":
        return "\t" not in line and (line == "#" or line.startswith("# "))
    cells = line.split()
    return cells[0] == "#" and (len(cells) != columns or not TAG.fullmatch(cells[-1]))


def _cells(line, mark, columns, where, tags_optional):
    """(word, tag or None) of a line."""
    if mark == " " and "\t" in line or mark == "\t" and " " in line:
        here, others = ("tab", "blanks") if mark == " " else ("blank", "tabs")
        raise WordError(f"{where}: tabs and blanks mixed: there is a {here}, and {others} part the columns of this "
                        "file")
    cells = line.split("\t") if mark == "\t" else line.split()
    if len(cells) == 1 and not (tags_optional and columns == 1):
        raise WordError(f"{where}: {cells[0]!r} has no tag: write one behind it, O for none")
    if len(cells) != columns:
        raise WordError(f"{where}: {_count(len(cells), 'column')}, and {columns} in the first line: a word holds no "
                        "blanks")
    return _word(cells[0], where), None if columns == 1 else _tag(cells[-1], where)


def _read_json_lines(content, file, tags_optional):
    sentences = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WordError(f"{where}: no JSON ({error}): an object a line") from error
        tokens, tags = (row.get(name) if isinstance(row, dict) else None for name in ("tokens", "tags"))
        if not isinstance(tokens, list) or not tokens:
            raise WordError(f'{where}: no words: write {{"tokens": ["Rome", ...], "tags": ["B-loc", ...]}}')
        if tags is None and not tags_optional or tags is not None and (
                not isinstance(tags, list) or len(tags) != len(tokens)):
            raise WordError(f"{where}: {_count(len(tokens), 'word')} and {len(tags or [])} tags: each word needs one")
        words = [_word(word, where) for word in tokens]
        known = None if tags is None else [_tag(tag, where) for tag in tags]
        if sentences and (known is None) != (sentences[0].tags is None):
            raise WordError(f"{where}: tags in some lines and not in others: give all or none")
        sentences.append(Sentence(words, known, [number] * len(words)))
    return sentences


def _word(word, where):
    if not isinstance(word, str) or not word.strip():
        raise WordError(f"{where}: an empty word: write it, or leave the line out")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise WordError(f"{where}: half of a character (a surrogate) in a word: mend it") from None
    return word


def _tag(tag, where):
    if not isinstance(tag, str):
        raise WordError(f"{where}: the tag {tag!r} is no text: write its name, such as B-person")
    if re.fullmatch("[BIESLU]-?", tag):
        raise WordError(f"{where}: the tag {tag!r} has no type: write one behind it, such as {tag[0]}-person")
    if not TAG.fullmatch(tag):
        raise WordError(f"{where}: the tag {tag!r} is neither O nor like B-person; known are B, I, E, S, L and U")
    return unicodedata.normalize("NFC", tag)


def _refuse_two_schemes(sentences, file):
    seen = {}
    for sentence in sentences:
        for tag, number in zip(sentence.tags, sentence.lines, strict=True):
            scheme = {"E": "BIOES", "S": "BIOES", "L": "BILOU", "U": "BILOU"}.get(tag[0])
            if scheme and seen.setdefault(scheme, number) == number and len(seen) == 2:
                other, line = next(iter(seen.items()))
                raise WordError(f"{file}, line {number}: mixed schemes: {tag} is of {scheme}, and a tag in line {line} "
                                f"of {other}: write all in one")


def gather(path, val_split=0.2):
    """The sentences of a folder or a file: Corpus. Where there is no val, a share of train is set aside, chosen by a
    hash of the words, so that the same sentence is never parted. Raises WordError.
    """
    files = find_files(path)
    found = {split: read(file) for split, file in files.items()}
    splits = {split: tagged.sentences for split, tagged in found.items()}
    types = types_of(splits["train"])
    if not types:
        raise WordError(f"{files['train']} has no entity: all words have the tag O")
    for split, sentences in splits.items():
        for sentence in sentences:
            for start, _, name in entities(sentence.tags):
                if name not in types:
                    raise WordError(f"{files[split]}, line {sentence.lines[start]}: an entity of the type {name!r}, "
                                    "which train has none of: put some into train, or leave that sentence out")
    if "val" not in splits:
        splits["train"], splits["val"] = _set_aside(splits["train"], val_split, files["train"])
    classes = ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]
    notes = [note for tagged in found.values() for note in tagged.notes]
    return Corpus(classes, {split: splits[split] for split in ("train", "val", "test") if split in splits}, notes)


def _set_aside(sentences, share, file):
    """(sentences for train, for val): those with the smallest hashes are val; train keeps some entity of each type."""
    copies = defaultdict(list)
    for sentence in sentences:
        copies[tuple(sentence.words)].append(sentence)
    left = Counter(name for sentence in sentences for *_, name in entities(sentence.tags))
    aside, wanted = set(), max(1, round(share * len(copies)))
    for words in sorted(copies, key=_hash):
        lost = Counter(name for sentence in copies[words] for *_, name in entities(sentence.tags))
        if len(aside) < min(wanted, len(copies) - 1) and all(left[name] > count for name, count in lost.items()):
            aside.add(words)
            left -= lost
    if not aside:
        raise WordError(f"{file}: too few sentences to set some aside for validation: add some, or give a file val")
    train, val = ([s for s in sentences if (tuple(s.words) in aside) == is_val] for is_val in (False, True))
    return train, val


def types_of(sentences):
    """The types of their entities, sorted."""
    return sorted({tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"})


def labels(sentences, classes):
    """The labels (words,) of all words, in their order: the place of each one's tag in the classes."""
    place = {tag: label for label, tag in enumerate(classes)}
    return torch.tensor([place[tag] for sentence in sentences for tag in sentence.tags])


def _hash(thing):
    return hashlib.sha256(ascii(thing).encode()).hexdigest()


def fingerprint(corpus):
    """What a run learns from, in a few words: the words and tags of train and val."""
    content = [[(s.words, s.tags) for s in corpus.splits[split]] for split in ("train", "val")]
    sizes = ", ".join(f"{split} {len(corpus.splits[split])}" for split in ("train", "val"))
    return f"{sizes}, content {_hash(content)[:8]}"


def describe(corpus):
    """A table of the sentences, the words and the entities of each type in each split, and lines for a person."""
    types = types_of(corpus.splits["train"])
    width = max(len(name) for name in [*types, "sentences"]) + 2
    lines = [" " * width + "".join(f"{split:>9}" for split in corpus.splits)]
    rows = {"sentences": [len(sentences) for sentences in corpus.splits.values()],
            "words": [sum(len(s.words) for s in sentences) for sentences in corpus.splits.values()]}
    counts = [Counter(name for s in sentences for *_, name in entities(s.tags)) for sentences in corpus.splits.values()]
    rows["entities"] = [sum(of_split.values()) for of_split in counts]
    rows |= {f"  {name}": [of_split[name] for of_split in counts] for name in types}
    lines += [f"{name:<{width}}" + "".join(f"{count:9d}" for count in of_splits) for name, of_splits in rows.items()]
    train = {tuple(sentence.words) for sentence in corpus.splits["train"]}
    for split in ("val", "test"):
        both = sum(tuple(sentence.words) in train for sentence in corpus.splits.get(split, ()))
        if both:
            lines.append(f"warning: {_count(both, 'sentence')} of {split} also in train: scores on these are too high")
    return "\n".join([*lines, *corpus.notes])


# ---- pieces


class WordList(Dataset):
    """Sentences, cut into pieces and windows, and the labels of their words. Asked for a key (epoch, index) or an
    index, it gives a window; `collate` makes a batch of such items.

    A sentence that the network takes is one window. A longer one is several, which overlap by half, and each word is
    read in the one in which it has the most context: where the nearer end of the window is the farthest.

    sentences: [Sentence, ...], with tags. classes: as of a Corpus. tokenizer: a fast one of transformers. max_length:
    how many pieces a window may have, the marks of beginning and end among them. may_be_empty: no word need have a
    piece. lengths: the pieces of each window. no_pieces: the words that have none. long: how many sentences are cut.
    """

    def __init__(self, sentences, classes, tokenizer, max_length, may_be_empty=False):
        self.targets = labels(sentences, classes)
        self.pad, self.pad_left = tokenizer.pad_token_id or 0, tokenizer.padding_side == "left"
        self.before, self.behind = _marks(tokenizer)
        room = max_length - len(self.before) - len(self.behind)
        ids, windows, numbers, places, of_window = [], [], [], [], [0]
        self.no_pieces, self.long, words_before = [], 0, 0
        for sentence, (own_ids, firsts) in zip(sentences, _cut(sentences, tokenizer), strict=True):
            self.no_pieces += [word for word, first in zip(sentence.words, firsts, strict=True) if first is None]
            self.long += len(own_ids) > room
            for start, end, words in _windows(firsts, len(own_ids), room):
                windows.append((len(ids) + start, len(ids) + end))
                numbers += [words_before + word for word in words]
                places += [len(self.before) + firsts[word] - start for word in words]
                of_window.append(len(numbers))
            ids += own_ids
            words_before += len(sentence.words)
        if not windows and not may_be_empty:
            raise WordError("no word of these sentences has a piece: is this the tokenizer of the network?")
        self.lengths = [end - start + max_length - room for start, end in windows]
        # In tensors, which workers share: lists would be copied into each.
        self.ids, self.windows = torch.tensor(ids, dtype=torch.int32), torch.tensor(windows)
        self.numbers, self.places, self.of_window = map(torch.tensor, (numbers, places, of_window))

    def __len__(self):
        return len(self.lengths)

    def labels(self):
        """Of all words, also of those without pieces."""
        return self.targets

    def parts(self, index):
        """The numbers of the words that are read in a window, those of all sentences counted on."""
        return self.numbers[self.of_window[index] : self.of_window[index + 1]]

    def numbered(self):
        """The same windows, with the numbers of the words as labels."""
        same = copy.copy(self)
        same.targets = torch.arange(len(self.targets))
        return same

    def __getitem__(self, key):
        _, index = key if isinstance(key, tuple) else (0, key)
        start, end = self.windows[index]
        before, behind = (torch.tensor(part, dtype=torch.int32) for part in (self.before, self.behind))
        places = self.places[self.of_window[index] : self.of_window[index + 1]]
        return torch.cat([before, self.ids[start:end], behind]), places, self.targets[self.parts(index)]

    def collate(self, items):
        """({"input_ids", "attention_mask" (1: a piece, 0: padding): int64 (N, T), "first": bool (N, T), the first
        pieces of the words that are read here}, labels (W,) of these words, from window to window, []). T: the pieces
        of the longest.
        """
        if not items:  # of a small batch, a process may have none
            return None, None, []
        ids, places, found = zip(*items, strict=True)
        firsts = [torch.zeros(len(one), dtype=torch.bool) for one in ids]
        for first, places_here in zip(firsts, places, strict=True):
            first[places_here] = True
        x = {"input_ids": self._padded(ids, self.pad).long(),
             "attention_mask": self._padded([torch.ones_like(one) for one in ids], 0).long(),
             "first": self._padded(firsts, False)}
        return x, torch.cat(found), []

    def _padded(self, rows, value):
        side = "left" if self.pad_left else "right"
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _cut(sentences, tokenizer):
    """(the pieces of a sentence, for each word the place of its first one or None), for each sentence."""
    if not tokenizer.is_fast:
        raise WordError(f"the {type(tokenizer).__name__} does not say which pieces a word has: take a network that has "
                        "a tokenizer.json")
    # The tokenizer's own padding and truncation, which its file may ask for, are off.
    found = tokenizer([list(sentence.words) for sentence in sentences], is_split_into_words=True,
                      add_special_tokens=False, padding=False, truncation=False, verbose=False)
    for number, sentence in enumerate(sentences):
        firsts = [None] * len(sentence.words)
        for place, word in enumerate(found.word_ids(number)):
            if firsts[word] is None:
                firsts[word] = place
        yield found["input_ids"][number], firsts


def _marks(tokenizer):
    """The pieces that the tokenizer puts before and behind a text."""
    how = {"padding": False, "truncation": False}
    bare = tokenizer("a", add_special_tokens=False, **how)["input_ids"]
    whole = tokenizer("a", **how)["input_ids"]
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _windows(firsts, length, room):
    """[(first piece, the piece behind the last, the words that are read there), ...] of a sentence of so many
    pieces.
    """
    begins = sorted(first for first in firsts if first is not None)
    ranges, start = [], 0
    while start + room < length:
        ranges.append((start, start + room))
        half = start + max(1, room // 2)
        # At the beginning of a word, unless that has more pieces than half a window.
        word = begins[bisect_right(begins, half) - 1]
        start = word if word > start else half
    ranges.append((start, length))

    def context(first, window):
        """The pieces up to the nearer end of the window; an end of the sentence is no end."""
        left = first - window[0] if window[0] > 0 else math.inf
        right = window[1] - 1 - first if window[1] < length else math.inf
        return min(left, right) if window[0] <= first < window[1] else -1

    words = defaultdict(list)
    for word, first in enumerate(firsts):
        if first is not None:
            words[max(range(len(ranges)), key=lambda i: context(first, ranges[i]))].append(word)
    return [(*ranges[i], words[i]) for i in sorted(words)]


def describe_pieces(windows, split, max_length):
    """Lines about words of a WordList without pieces, and about long sentences; [] if there are none."""
    lines = []
    if windows.no_pieces:
        some = _some([ascii(word) for word in windows.no_pieces])
        without = _count(len(windows.no_pieces), "word")
        lines.append(f"note: {split}: {without} without a piece ({some}): predicted as O")
    if windows.long:
        lines.append(f"note: {split}: {_count(windows.long, 'sentence')} longer than the {max_length} pieces of "
                     "--max-length: read in windows that overlap by half")
    return lines


def words_of(text, tokenizer):
    """The places [(start, end), ...] of the words of a text, as transformers' pipeline finds them: what the tokenizer
    takes for words, if its pieces say which ones go on with a word (BERT: "##ing"); otherwise what stands between
    blanks.
    """
    model = tokenizer.backend_tokenizer.model
    if not getattr(model, "continuing_subword_prefix", None):
        return [match.span() for match in re.finditer(r"\S+", text)]
    found = tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False,
                      return_offsets_mapping=True)
    places = {}
    for word, (start, end) in zip(found.word_ids(), found["offset_mapping"], strict=True):
        places[word] = places.get(word, (start, end))[0], end
    return list(places.values())


# ---- networks

Words = namedtuple("Words", "logits")


class WordClassifier(nn.Module):
    """A network that answers for words and not for pieces. Its layers are those of a network of transformers for token
    classification, under the same names.
    """

    def __init__(self, network):
        super().__init__()
        self.config, self.base_model_prefix = network.config, network.base_model_prefix
        for name, layer in network.named_children():
            self.add_module(name, layer)

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix)

    def head_layers(self):
        """What follows the encoder: in BERT, dropout and the head."""
        return [layer for name, layer in self.named_children() if name != self.base_model_prefix]

    def features(self, first, **x):
        """Features (W, H), what the encoder makes of the first pieces of words; first: bool (N, T), where they are."""
        return self.base_model(**x).last_hidden_state[first]

    def forward(self, first, **x):
        """An object whose `logits` are (W, classes). x: input_ids and attention_mask (N, T)."""
        return Words(_through(self.head_layers(), self.features(first, **x)))


class HeadSide(nn.Module):
    """What follows the encoder of a WordClassifier, as a module that shares its layers: HeadSide(model)(features) is
    model(**x), bit for bit, where features (W, H) are HeadSide(model).features(x).
    """

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList(model.head_layers())
        self.whole = (model,)  # in a tuple, so that it is none of this module's own parts

    def forward(self, features):
        return Words(_through(self.layers, features))

    def features(self, x):
        return self.whole[0].features(**x)


def _through(layers, features):
    for layer in layers:
        features = layer(features)
    return features


# ---- scores


def predicted_tags(outputs, numbers, sentences, classes):
    """The likeliest tag of each word, a list for each sentence; O for a word without a piece. outputs: (W, C), of the
    words of these numbers (W,).
    """
    found = torch.zeros(sum(len(sentence.words) for sentence in sentences), dtype=torch.long)
    found[numbers] = outputs.argmax(1).cpu()
    tags = iter(found.tolist())
    return [[classes[next(tags)] for _ in sentence.words] for sentence in sentences]


def count(sentences, predicted):
    """{type: [right, predicted, true]}, numbers of entities. predicted: tags, a list for each sentence. An entity is
    right if its first word, its last word and its type are.
    """
    counts = defaultdict(lambda: [0, 0, 0])
    for sentence, tags in zip(sentences, predicted, strict=True):
        true, given = set(entities(sentence.tags)), set(entities(tags))
        for place, found in enumerate((true & given, given, true)):
            for *_, name in found:
                counts[name][place] += 1
    return dict(counts)


def scores(counts):
    """{"precision", "recall", "f1" over all entities (micro), "macro_precision", "macro_recall", "macro_f1": the means
    over the types}. A ratio of nothing is 0.
    """
    micro = _ratios(*map(sum, zip(*counts.values(), strict=True))) if counts else (0.0, 0.0, 0.0)
    per_type = [_ratios(*of_type) for of_type in counts.values()]
    macro = [sum(column) / len(per_type) for column in zip(*per_type, strict=True)] or (0.0, 0.0, 0.0)
    names = "precision", "recall", "f1"
    return dict(zip(names, micro, strict=True)) | {f"macro_{n}": v for n, v in zip(names, macro, strict=True)}


def _ratios(right, given, true):
    return right / max(1, given), right / max(1, true), 2 * right / max(1, given + true)


def word_accuracy(sentences, predicted):
    """(share of the words whose tag is right, what "always O" would get)."""
    pairs = [pair for s, tags in zip(sentences, predicted, strict=True) for pair in zip(s.tags, tags, strict=True)]
    right, outside = sum(true == given for true, given in pairs), sum(true == "O" for true, _ in pairs)
    return right / len(pairs), outside / len(pairs)


def report(sentences, predicted):
    """A table of the scores per type, and a line about words."""
    counts = count(sentences, predicted)
    all_scores = scores(counts)
    width = max(len(name) for name in [*counts, "micro"])
    lines = [f"{'type':<{width}}  precision  recall      f1    true  predicted"]
    for name in sorted(counts):
        right, given, true = counts[name]
        lines.append(_line(name, width, _ratios(right, given, true), true, given))
    _, given, true = map(sum, zip(*counts.values(), strict=True)) if counts else (0, 0, 0)
    for name, prefix in (("micro", ""), ("macro", "macro_")):
        ratios = [all_scores[f"{prefix}{n}"] for n in ("precision", "recall", "f1")]
        lines.append(_line(name, width, ratios, true, given))
    accuracy, always_o = word_accuracy(sentences, predicted)
    lines.append(f"word accuracy {accuracy:.4f}, and {always_o:.4f} by always saying O")
    return "\n".join(lines)


def _line(name, width, ratios, true, given):
    precision, recall, f1 = ratios
    return f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {true:6d}  {given:9d}"


def describe_scores(counts):
    """The micro scores in a few words."""
    found = scores(counts)
    return f"precision {found['precision']:.4f}  recall {found['recall']:.4f}  f1 {found['f1']:.4f}"


def prediction_rows(sentences, predicted, probabilities, texts=None):
    """A row for each entity that is there or was predicted: the sentence, its place in it (in characters), its words,
    the true and the predicted type ("" for none) and the probability of what was predicted, the mean over its words.

    probabilities: (words,), of the predicted tag of each word, those of all sentences counted on. texts: [(text, the
    places of its words), ...], if they are not words joined by blanks.
    """
    texts = texts or map(joined, sentences)
    rows, words_before = [], 0
    for sentence, tags, (text, places) in zip(sentences, predicted, texts, strict=True):
        true, given = ({(start, end): name for start, end, name in entities(t or ())} for t in (sentence.tags, tags))
        for start, end in sorted(true.keys() | given.keys()):
            first, last = places[start][0], places[end - 1][1]
            probability = probabilities[words_before + start : words_before + end].mean().item()
            rows.append({"text": text, "start": first, "end": last, "entity": text[first:last],
                         "truth": true.get((start, end), ""), "prediction": given.get((start, end), ""),
                         "probability": f"{probability:.6f}"})
        words_before += len(sentence.words)
    return rows


def joined(sentence):
    """The words of a sentence with blanks between them, and their places in that, [(start, end), ...]."""
    places, start = [], 0
    for word in sentence.words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(sentence.words), places


def with_column(content, sentences, predicted):
    """The text of a CoNLL file with a tag more behind each word. sentences: as read from it."""
    lines = content.split("\n")
    for sentence, tags in zip(sentences, predicted, strict=True):
        for number, tag in zip(sentence.lines, tags, strict=True):
            line = lines[number - 1].rstrip(" \t\r")
            ending = "\r" if lines[number - 1].endswith("\r") else ""
            lines[number - 1] = line + ("\t" if "\t" in line else " ") + tag + ending
    return "\n".join(lines)


def _some(names):
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _count(number, word):
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
