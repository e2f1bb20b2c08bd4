"""Use a fine-tuned classifier of texts: texts in, classes out. Or one of words: texts in, entities out.

    python predict_text.py --checkpoint runs/.../best.pt --text "a film to see twice"                 # repeatable
    python predict_text.py --checkpoint runs/.../best.pt --text "a man sleeps" --text-2 "he is awake" # of pairs
    python predict_text.py --checkpoint runs/.../best.pt lines.txt --top-k 3 --csv predictions.csv    # a text a line
    cat lines.txt | python predict_text.py --checkpoint runs/.../best.pt -                            # likewise
    python predict_text.py --checkpoint runs/.../best.pt reviews.csv --split test                     # scores, too
    python predict_text.py --checkpoint runs/a/best.pt --checkpoint runs/b/best.pt lines.txt          # their mean
    python predict_text.py --checkpoint runs/.../best.pt --save-pretrained ./mine                     # to use elsewhere
    python predict_text.py --checkpoint runs/.../best.pt test.conll --conll OUT    # of train_token_classifier.py

A table is CSV, TSV or JSON lines, with the columns of the training. A folder holds train.csv, val.csv and test.csv, or
class folders of text files. Texts of which the class is known are scored. A checkpoint of train_token_classifier.py
finds entities in texts, and in files of words: CoNLL or JSON lines. Any mistake is one line on stderr and exit status
2.

More: docs/text.md
"""

import os
import sys
from collections import namedtuple
from pathlib import Path

# torch's threads wait for each other by spinning, which beside other work takes several times as long. torch reads this
# when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tokenizers use threads of their own, and warn if a DataLoader's workers start after that: here there are none.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from tqdm import tqdm

import checkpoint
import data
import ending
import metrics
import tables
import text
import words
from arguments import make_parser, names, number
from model import ModelError, pick_device, pick_precision


def build_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXTS",
        help="tables (CSV, TSV, JSON lines), text files (.txt: each line is a text), folders of tables or of class "
             "folders; - is standard input, each line a text; for entities also CoNLL files and JSON lines of words")
    add("--text", action="append", default=[], metavar="SENTENCE", help="a text itself; repeatable")
    add("--text-2", action="append", default=[], metavar="SENTENCE", help="of a pair the second half, for each --text")
    add("--checkpoint", required=True, action="append", metavar="FILE",
        help="best.pt or last.pt of a training run; repeatable: probabilities are averaged")
    add("--split", choices=["train", "val", "test"], help="of tables and folders: the texts of this split alone")
    add("--text-column", type=names, metavar="NAME",
        help="of tables: the column of the texts, of pairs two (default: as in training)")
    add("--target", metavar="COLUMN", help="of tables: the column of the classes (default: as in training)")
    add("--top-k", type=number(int, 1), default=1, metavar="K", help="show the K likeliest (default %(default)s)")
    add("--csv", metavar="FILE", help="write the predictions there")
    add("--conll", metavar="OUT",
        help="of one CoNLL file, for entities: write it there with the predicted tag of each word as one more column")
    add("--all-probabilities", action="store_true",
        help="with --csv: the probability of every class, too, in columns p_CLASS")
    add("--save-pretrained", metavar="DIR",
        help="write a new folder there, from which transformers loads the network: "
             "AutoModelForSequenceClassification.from_pretrained(DIR), or ForTokenClassification")
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="(default %(default)s)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="precision (default off: float32)")
    add("--device", default="auto", metavar="D", help="auto (cuda, mps, cpu in that order) or a name")
    return parser


def counted(count):
    return "1 text" if count == 1 else f"{count} texts"


def some(words):
    words = list(dict.fromkeys(words))
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def say(line):
    """To stderr, in one line, whatever a text or a file's name holds."""
    print(" ".join(line.splitlines()), file=sys.stderr)


# ---- what is predicted, and by what


def load_checkpoints(files):
    """Their states, which must know the same classes (in any order), and all take single texts or all pairs. Raises
    CheckpointError.
    """
    states = [checkpoint.load(file, needs=checkpoint.OF_TEXTS) for file in files]
    first = states[0]
    for file, state in zip(files, states, strict=True):
        if sorted(state["classes"]) != sorted(first["classes"]):
            raise checkpoint.CheckpointError(f"{file} predicts {some(state['classes'])} and {files[0]} "
                                             f"{some(first['classes'])}: only the same can be averaged")
        if takes_pairs(state) != takes_pairs(first):
            raise checkpoint.CheckpointError(f"of {files[0]} and {file}, one takes pairs and one takes single texts: "
                                             "only the same can be averaged")
    return states


def takes_pairs(state):
    return len(state["options"].get("text_column", ())) == 2


def finds_entities(state):
    return state["pool"] == "words"


def read_texts(args, state):
    """[text.Row] of all that is to be predicted, in the order given, and lines for a person. Raises TextError,
    tables.TableError.
    """
    options, pairs, file = state["options"], takes_pairs(state), args.checkpoint[0]
    columns = args.text_column or options["text_column"]
    if (len(columns) == 2) != pairs:
        raise text.TextError(f"--text-column names {', '.join(columns)}, and {file} takes "
                             f"{'pairs: name two columns' if pairs else 'single texts: name one column'}")
    rows, notes = [], []
    for path in args.texts:
        found = read_file(path, columns, args, options["target"], notes)
        if pairs and isinstance(found[0].text, str):
            name = "standard input" if path == "-" else path
            raise text.TextError(f"{name} holds single texts, and {file} takes pairs: give a table with the columns "
                                 f"{' and '.join(columns)}, or --text and --text-2")
        rows += found
    rows += read_typed(args, pairs)
    text.refuse_no_texts(rows)
    return rows, notes


def read_typed(args, pairs):
    """Rows of --text and --text-2."""
    file = args.checkpoint[0]
    if args.text_2 and not pairs:
        raise text.TextError(f"--text-2 is the second half of a pair, and {file} takes single texts: leave it out")
    if pairs and len(args.text) != len(args.text_2):
        raise text.TextError(f"{file} takes pairs: each --text needs a --text-2, and there are {len(args.text)} and "
                             f"{len(args.text_2)}")
    typed = list(zip(args.text, args.text_2, strict=True)) if pairs else args.text
    return [text.Row(words, None, None, f"--text number {place}") for place, words in enumerate(typed, start=1)]


def read_file(path, columns, args, target, notes):
    """Rows of a table, a text file, a folder or standard input; those of --split, if given. At least one."""
    if path == "-":
        return text.read_lines(path)
    if not os.path.exists(path):
        raise text.TextError(f"no such file or folder: {path}: name a file of texts, or give a text itself by --text")
    if os.path.isfile(path) and path.lower().endswith(".txt"):
        return text.read_lines(path)
    rows, files = [], text.find_tables(path, needs_train=False)
    for split, file in files.items():
        if split in (None, args.split) or args.split is None:
            # A column that is named here must be there.
            found, said = tables.read_text_rows(file, columns, args.target or target, classes_optional=True,
                                                column_optional=not args.target)
            # The name of the file says the split, or else each row's.
            rows += [text.Row(words, split or own, name, where) for words, own, name, where in found]
            notes += said
    if not files:
        rows = text.read_folders(path, notes)
    rows = [row for row in rows if args.split in (None, row.split)]
    if not rows:
        raise text.TextError(f"{path} has no texts of the split {args.split}: no file or folder of that name, and no "
                             "such row in a column split")
    return rows


def labels_of(rows, classes, notes):
    """The labels (N,) of the rows, -1 where it is not known; None if none is. notes: takes lines about those."""
    place = {name: label for label, name in enumerate(classes)}
    strange = [row for row in rows if row.name is not None and row.name not in place]
    without = [row for row in rows if row.name is None]
    if strange:
        unknown = some(row.name for row in strange)
        notes.append(f"note: {counted(len(strange))} of a class that the model does not know ({unknown}): predicted, "
                     f"not scored ({some(row.where for row in strange)})")
    if without and len(without) < len(rows):
        notes.append(f"note: {counted(len(without))} of {len(rows)} without a class: predicted, not scored "
                     f"({some(row.where for row in without)})")
    labels = torch.tensor([place.get(row.name, -1) for row in rows])
    return labels if (labels >= 0).any() else None


# ---- predicting


def run_network(args, state, device, texts):
    """Probabilities (N, C) in float32 of the texts, in their order, by one checkpoint."""
    model = text.network_of(state).requires_grad_(False)
    model.to(device).eval()
    _, _, amp_dtype = pick_precision(args.amp, model, device)
    tokenizer, max_length = text.make_tokenizer(state["build"]), state["max_length"]
    # The loader hands on each text's place in the list, since texts of like length make up a batch.
    found = text.TextList([(words, 0) for words in texts], tokenizer, max_length).numbered()
    if found.cut:
        say(f"note: {counted(found.cut)} longer than the {max_length} pieces of the training (--max-length): what is "
            "behind them is not read")
    order = data.SeededBatches(len(found), args.batch_size, arrange=text.LongestFirst(found.lengths))
    loader = data.make_loader(found, order, collate_fn=found.collate)
    probabilities = torch.zeros(len(texts), len(state["classes"]))
    with torch.inference_mode(), torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for x, places in tqdm(data.batches(loader), "predict", len(loader), leave=False, disable=None):
            outputs = model(**text.to_input(x, device))
            probabilities[places] = outputs.logits.float().softmax(1).cpu()
    return probabilities


def mean_probabilities(args, states, device, texts):
    """The mean over the checkpoints, which may know the classes in another order: that of the first one counts."""
    total = 0
    for state in states:
        run = run_on_words if finds_entities(state) else run_network
        probabilities = run(args, state, device, texts)
        total = total + probabilities[:, [state["classes"].index(name) for name in states[0]["classes"]]]
    return total / len(states)


def score(args, rows, labels, probabilities, classes):
    """Words about the scores on those rows of which the class is known."""
    known = labels >= 0
    confusion = metrics.confusion_matrix(probabilities[known].argmax(1), labels[known], len(classes))
    of_all, there = metrics.scores(confusion), int((confusion.sum(1) > 0).sum())
    words = f"accuracy {of_all['accuracy']:.4f} on {counted(int(known.sum()))}"
    if args.split:
        words += f" of {args.split}"
    elif any(row.split in (None, "train") for row, is_known in zip(rows, known.tolist(), strict=True) if is_known):
        words += ", those it was trained on perhaps among them"
    if there < len(classes):
        balanced = of_all["balanced_accuracy"]
        words += f", balanced accuracy {balanced:.4f} over the {there} of {len(classes)} classes that have any"
    return f"{words}\n{metrics.report(confusion, classes, what='texts')}"


def table_of(texts, probabilities, classes, labels, args):
    """The predictions as rows of a table."""
    rows = metrics.prediction_rows(texts, probabilities, classes, labels, args.top_k, args.all_probabilities)
    return text.prediction_rows(texts, rows)


def show(table, classes):
    """Print the predictions, of long texts the beginning."""
    # --all-probabilities are for the file: a thousand of them would fill the terminal.
    for_the_file = set(metrics.probability_columns(classes))
    shown = [column for column in table[0] if column not in for_the_file]
    cells = [shown, *([short(row[column]) for column in shown] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def short(value, most=60):
    """A cell of the table on the terminal, in one line."""
    if isinstance(value, float):
        return f"{value:.4f}"
    said = " ".join(str(value).split()) or "-"
    return said if len(said) <= most else f"{said[: most - 3]}..."


def check_csv(args, texts, classes, labels):
    """Raise an error if the predictions cannot go into --csv."""
    files = [path for path in args.texts if os.path.exists(path)]
    if os.path.exists(args.csv) and any(os.path.samefile(args.csv, path) for path in files):
        raise text.TextError(f"--csv {args.csv} would write over the texts: give another name")
    first = None if labels is None else labels[:1]
    row = table_of(texts[:1], torch.zeros(1, len(classes)), classes, first, args)[0]
    checkpoint.refuse_other_files(args.csv, list(row))


def predict(args):
    states = load_checkpoints(args.checkpoint)
    classes = states[0]["classes"]
    if args.save_pretrained:
        write_folder(states[0], args.save_pretrained)
    if not (args.texts or args.text or args.text_2):
        return
    device = pick_device(args.device)
    if finds_entities(states[0]):
        predict_entities(args, states, device)
        return
    if args.conll:
        raise text.TextError(f"--conll is for entities, and {args.checkpoint[0]} gives a class to each text: leave it "
                             "out")
    rows, notes = read_texts(args, states[0])
    labels = labels_of(rows, classes, notes)
    texts = [row.text for row in rows]
    if args.csv:  # now, and not after all the predicting
        check_csv(args, texts, classes, labels)
    for line in notes:
        say(line)
    probabilities = mean_probabilities(args, states, device, texts)
    table = table_of(texts, probabilities, classes, labels, args)
    show(table, classes)
    if args.csv:
        checkpoint.write_csv(table, args.csv)
    if labels is not None:
        print(f"\n{score(args, rows, labels, probabilities, classes)}")


# ---- entities

Item = namedtuple("Item", "sentence text places")
Item.__doc__ = """sentence: a words.Sentence, whose tags may be None. text: in which its words stand. places: where,
[(start, end), ...]."""


def predict_entities(args, states, device):
    """Of checkpoints of train_token_classifier.py: print the entities in texts, and scores where their tags are
    known.
    """
    file = args.checkpoint[0]
    of_classes = ["top_k"] if args.top_k > 1 else []
    of_classes += [name for name in ("text_2", "split", "text_column", "target", "all_probabilities")
                   if getattr(args, name)]
    if of_classes:
        option = of_classes[0].replace("_", "-")
        raise text.TextError(f"--{option} is for classes of texts, and {file} finds entities: leave it out")
    classes, scheme = states[0]["classes"], "IOB2"
    if args.conll:
        refuse_conll(args)
        tagged = words.read(args.texts[0], tags_optional=True)
        items = [Item(sentence, *words.joined(sentence)) for sentence in tagged.sentences]
        scheme = tagged.scheme or scheme
    else:
        items = read_items(args, text.make_tokenizer(states[0]["build"], of_words=True))
    sentences = [item.sentence for item in items]
    probabilities = mean_probabilities(args, states, device, sentences)
    numbers = torch.arange(len(probabilities))
    predicted = words.predicted_tags(probabilities, numbers, sentences, classes)
    rows = entity_rows(items, predicted, probabilities.amax(1))
    if args.conll:
        given = [words.encode(len(tags), words.entities(tags), scheme) for tags in predicted]
        write_conll(words.with_column(words.read_text(args.texts[0]), sentences, given), args.conll)
    else:
        show(rows, [])
    if args.csv:
        checkpoint.write_csv(rows, args.csv)
    known = [(sentence, tags) for sentence, tags in zip(sentences, predicted, strict=True) if sentence.tags is not None]
    if known:
        print(f"\n{entity_scores(*zip(*known, strict=True), classes)}")


def refuse_conll(args):
    """Raise TextError if --conll cannot be written."""
    if args.texts[0].lower().endswith(words.JSON):
        raise text.TextError(f"--conll adds a column to a CoNLL file, and {args.texts[0]} is called one of JSON: leave "
                             "it out")
    if os.path.exists(args.conll):
        raise text.TextError(f"--conll {args.conll} exists: it was left as it is, give another name")
    if not os.path.isdir(os.path.dirname(os.path.abspath(args.conll))):
        raise text.TextError(f"there is no folder for --conll {args.conll}: make it, or write elsewhere")


def write_conll(content, file):
    try:
        with open(file, "x", encoding="utf-8", newline="") as out:
            out.write(content)
    except OSError as error:
        raise text.TextError(f"could not write {file} ({error.strerror}): make room there, or write "
                             "elsewhere") from error
    print(f"wrote {file}")


def read_items(args, tokenizer):
    """[Item, ...] of all that is named: texts, a line each, and files of words."""
    items = []
    for path in args.texts:
        if path == "-" or os.path.isfile(path) and path.lower().endswith(".txt"):
            rows = text.read_lines(path)
            text.refuse_no_texts(rows)
            items += [item_of(row.text, tokenizer) for row in rows]
        else:
            items += [Item(sentence, *words.joined(sentence)) for sentence in words.read(path, True).sentences]
    rows = read_typed(args, pairs=False)
    text.refuse_no_texts(rows)
    return items + [item_of(row.text, tokenizer) for row in rows]


def item_of(content, tokenizer):
    # A text of marks alone has no words for the tokenizer.
    places = words.words_of(content, tokenizer) or [(0, len(content))]
    found = [content[start:end] for start, end in places]
    return Item(words.Sentence(found, None, [0] * len(found)), content, places)


def run_on_words(args, state, device, sentences):
    """Probabilities (words, C) in float32 of the words of the sentences, in their order, by one checkpoint."""
    model = words.WordClassifier(text.network_of(state)).requires_grad_(False)
    model.to(device).eval()
    _, _, amp_dtype = pick_precision(args.amp, model, device)
    tokenizer, classes = text.make_tokenizer(state["build"], of_words=True), state["classes"]
    plain = [sentence._replace(tags=["O"] * len(sentence.words)) for sentence in sentences]
    found = words.WordList(plain, classes, tokenizer, state["max_length"], may_be_empty=True)
    for note in words.describe_pieces(found, "input", state["max_length"]):
        say(note)
    # A word without a piece is in no entity.
    probabilities = torch.zeros(len(found.labels()), len(classes))
    probabilities[:, classes.index("O")] = 1
    order = data.SeededBatches(len(found), args.batch_size, arrange=text.LongestFirst(found.lengths))
    loader = data.make_loader(found.numbered(), order, collate_fn=found.collate)
    with torch.inference_mode(), torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for x, numbers in tqdm(data.batches(loader), "predict", len(loader), leave=False, disable=None):
            probabilities[numbers] = model(**text.to_input(x, device)).logits.float().softmax(1).cpu()
    return probabilities


def entity_rows(items, predicted, probabilities):
    """Rows of a table: one for each entity that was predicted or is there, and one for a text that has none."""
    rows, start = [], 0
    for item, tags in zip(items, predicted, strict=True):
        own = probabilities[start : start + len(tags)]
        found = words.prediction_rows([item.sentence], [tags], own, [(item.text, item.places)])
        none = dict.fromkeys(("start", "end", "entity", "truth", "prediction", "probability"), "")
        rows += found or [{"text": item.text} | none]
        start += len(tags)
    if all(item.sentence.tags is None for item in items):
        rows = [{name: value for name, value in row.items() if name != "truth"} for row in rows]
    return rows


def entity_scores(sentences, predicted, classes):
    """Words about the scores on sentences whose tags are known."""
    lines = [words.report(sentences, predicted), words.describe_scores(words.count(sentences, predicted))]
    lines[-1] += f" on {len(sentences)} sentences"
    if unknown := set(words.types_of(sentences)) - {name[2:] for name in classes}:
        lines.insert(0, f"note: types that the model does not know, all missed: {some(sorted(unknown))}")
    return "\n".join(lines)


# ---- for other programs


def write_folder(state, folder):
    """--save-pretrained: write it, and say how it is used."""
    files = text.save_pretrained(state, folder)
    print(f"wrote {', '.join(str(Path(folder, name)) for name in files)}")
    if finds_entities(state):
        print(f'it is used by transformers.pipeline("token-classification", "{folder}", aggregation_strategy="first")')
        print(f"which cuts a text off at {state['max_length']} pieces")
    else:
        print(f'it is used by transformers.pipeline("text-classification", "{folder}", truncation=True)')
        print(f"truncation=True cuts a text off at {state['max_length']} pieces, as in training")
    print(f"outputs: {', '.join(state['classes'])}")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.texts or args.text or args.text_2 or args.save_pretrained):
        parser.error('name files of texts to predict, or - for standard input, or give --text "A SENTENCE", or '
                     "--save-pretrained DIR")
    if args.save_pretrained and len(args.checkpoint) > 1:
        parser.error("--save-pretrained writes the network of one --checkpoint")
    if args.all_probabilities and not args.csv:
        parser.error("--all-probabilities writes a column for each class into --csv FILE: name one")
    if args.conll and (len(args.texts) != 1 or args.text or args.texts[0] == "-"):
        parser.error("--conll writes one CoNLL file with a column more: name one file")
    if args.texts.count("-") > 1:
        parser.error("- is standard input: name it once")
    if "-" in args.texts and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("- is standard input, and nothing is led into it: cat lines.txt | python predict_text.py ... -, "
                     'or give --text "A SENTENCE"')
    lines = [path for path in args.texts if path == "-" or path.lower().endswith(".txt") and not os.path.isdir(path)]
    of_tables = [f"--{name.replace('_', '-')}" for name in ("split", "text_column", "target") if getattr(args, name)]
    if of_tables and (lines or args.text or not args.texts):
        parser.error(f"{of_tables[0]} is for tables and folders: other texts have no columns, predict them alone")
    with ending.tidy(checkpoint.CheckpointError, data.DataError, ModelError, tables.TableError, text.TextError,
                     words.WordError):
        predict(args)


if __name__ == "__main__":
    main()
