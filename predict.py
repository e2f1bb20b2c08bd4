"""Use a fine-tuned model: pictures in, classes, labels or numbers out.

    python predict.py --checkpoint runs/.../best.pt some.jpg a_folder/ 'more/*.png'
    python predict.py --checkpoint runs/.../best.pt a_folder/ --top-k 3 --csv predictions.csv
    python predict.py --checkpoint runs/.../best.pt cats_and_dogs/test          # subfolders are classes: scores too
    python predict.py --checkpoint runs/.../best.pt a_folder/ --csv p.csv --all-probabilities   # a column per class
    python predict.py --checkpoint runs/.../best.pt --labels houses/labels.csv --split test   # a table: scores too
    python predict.py --checkpoint runs/a/best.pt --checkpoint runs/b/best.pt --tta a_folder/   # the mean of four
    python predict.py --checkpoint runs/.../best.pt --weights-only weights.pth  # the bare state_dict, to use elsewhere
    python predict.py --checkpoint runs/.../best.pt --export model.pt2          # a program, or model.onnx

A picture that cannot be read is named and passed over; the exit status is then 1. One of which no class, label or
number is known is predicted and not scored. Of labels, those are given whose probability reaches the threshold that was
best on the validation split. Any other mistake is one line on stderr and exit status 2.

More: docs/prediction.md
"""

import contextlib
import difflib
import glob
import math
import os
import sys
from collections import Counter, namedtuple
from pathlib import Path

# torch's threads wait for each other by spinning, which beside other work takes several times as long. torch reads this
# when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tqdm import tqdm

import checkpoint
import data
import ending
import export
import metrics
import tables
from arguments import make_parser, number
from model import ModelError, output_names, pick_device, pick_precision, preprocessing_for, rebuild


def build_parser():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURES", help="picture files, folders (searched to the bottom) and globs")
    add("--checkpoint", required=True, action="append", metavar="FILE",
        help="best.pt or last.pt of a training run; repeatable: probabilities (or numbers) are averaged")
    add("--tta", action="store_true", help="average over each picture and its mirror image")
    add("--labels", metavar="CSV",
        help="the pictures of this CSV, and scores against its classes, labels or numbers, if any")
    add("--split", choices=list(data.SPLITS), help="with --labels: the rows of this split alone")
    add("--data", metavar="DIR", help="with --labels: where to look for the pictures first (default: beside the CSV)")
    add("--file-column", metavar="COLUMN", help="with --labels: the column of the pictures (default: as in training)")
    add("--target", metavar="COLUMN",
        help="with --labels: the column of the classes (default: as in training, if that was from a table)")
    add("--top-k", type=number(int, 1), metavar="K", help="of classes: show the K likeliest (default 1)")
    add("--csv", metavar="FILE", help="write the predictions there")
    add("--all-probabilities", action="store_true",
        help="of classes, with --csv: the probability of each, too, in columns p_CLASS")
    add("--weights-only", metavar="FILE", help="write the bare state_dict there; it loads into plain torchvision")
    add("--export", metavar="FILE.pt2",
        help="write a program there that PyTorch runs without any code of the network: RGB in 0..1 (N, 3, size, size) "
             "in, probabilities or numbers out, normalization inside; FILE.onnx: ONNX, by the packages onnx, onnxscript")
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="(default %(default)s)")
    add("-j", "--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that decode pictures (default here %(default)s)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="precision (default off: float32)")
    add("--device", default="auto", metavar="D", help="auto (cuda, mps, cpu in that order) or a name")
    return parser


# A picture; the folder that was given and in which it was found (None: its own name was given), the names of the
# folders between, and the place of its class, or -1.
Found = namedtuple("Found", "path given between label")


def list_pictures(arguments, classes):
    """[Found]: what files, folders and globs stand for, in the order given, no file twice. The class is that which the
    first folder below the given one is named after: given `test`, `test/cat/1.jpg` is a cat. Raises data.DataError.
    """
    place = {name: label for label, name in enumerate(classes)}
    found, passed_over, empty = {}, Counter(), []
    for argument in arguments:
        matches = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise data.DataError(f"no such picture, folder or glob: {argument}{perhaps(argument)}")
        for match in matches:
            given = match if os.path.isdir(match) else None  # a dangling link is a file: it is named when it is decoded
            ignored = Counter()
            inside = data.list_folder(given, ignored) if given else [match]
            passed_over += ignored
            if not inside:
                empty.append(match + (f" (but {data.kinds(ignored)})" if ignored else " (it is empty)"))
            for path in inside:
                between = Path(path).relative_to(given).parts[:-1] if given else ()
                label = place.get(data.nfc(between[0]), -1) if between else -1
                key = os.path.abspath(path)
                if key not in found or found[key].label < 0 <= label:  # a folder says what a bare name does not
                    found[key] = Found(path, given, between, label)
    if not found:
        raise data.DataError(f"no pictures in {some(empty)}: give pictures, or a folder that holds some")
    if empty:
        say(f"note: no pictures in {some(empty)}")
    if passed_over:
        say(f"note: passed over: {data.kinds(passed_over)}")
    return list(found.values())


def perhaps(argument):
    """Words about what may have been meant by a name that there is not."""
    cleaned = os.path.expanduser(argument.strip(" '\"").replace("\\", "/"))
    folder, name = os.path.split(cleaned)
    if os.path.exists(cleaned):
        return f"; did you mean {cleaned}?"
    with contextlib.suppress(OSError):  # no such folder, or one that must not be looked into
        there = {other.lower(): other for other in sorted(os.listdir(folder or "."))}
        if close := difflib.get_close_matches(name.lower(), there, 1):
            return f"; did you mean {os.path.join(folder, there[close[0]])}?"
    return "" if os.path.isabs(cleaned) else f"; it was looked for from {os.getcwd()}"


def what_is_not_scored(found, classes):
    """Lines about the pictures (Found) without a class, if others have one or one may have been meant."""
    names = set(classes)
    without = [one for one in found if one.label < 0]
    stray = [one.path for one in without if not one.between]
    strange = [os.path.join(one.given, one.between[0]) for one in without if one.between]
    too_high = [os.path.join(one.given, one.between[0]) for one in without
                if names & set(map(data.nfc, one.between[1:2]))]
    too_low = [os.path.dirname(path) or "." for path in stray
               if data.nfc(Path(os.path.abspath(path)).parent.name) in names]
    deep = [os.path.dirname(one.path) for one in found if one.label >= 0 and len(one.between) > 1]
    lines = []
    if stray and len(without) < len(found):
        lines.append(f"note: {are(stray)} in no class folder: predicted, not scored ({some(stray)})")
    if strange:
        lines.append(f"note: {are(strange)} in folders that are no class of the model ({some(classes)}): predicted, "
                     f"not scored ({some(strange)})")
    if too_high:
        lines.append(f"hint: class folders lie one lower: for scores give {some(too_high)}")
    if len(too_low) > 1:  # who asks for a single picture expects no scores
        lines.append(f"hint: for scores give the folder that holds the class folders, not what is in {some(too_low)}")
    if deep:
        lines.append(f"note: {are(deep)} deeper in a class folder: scored as of that class ({some(deep)})")
    return lines


def counted(number):
    return "1 picture" if number == 1 else f"{number} pictures"


def are(pictures):
    return f"{counted(len(pictures))} {'is' if len(pictures) == 1 else 'are'}"


def some(names):
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def say(line):
    """To stderr, in one line, whatever a file's name holds."""
    print(" ".join(line.splitlines()), file=sys.stderr)


def shape_of_input(state):
    """Words on how a picture becomes the square that the network takes, and on what is white in grey of 16 bits."""
    words = {"crop": "shorter side resized to {resize_size} ({interpolation}), centre {image_size} x {image_size}",
             "squash": "resized to {image_size} x {image_size} whatever its shape ({interpolation})",
             "pad": "longer side resized to {image_size} ({interpolation}), black added to {image_size} x {image_size}"}
    preprocessing = preprocessing_for(state["preprocessing"])
    white = ", grey of more than 8 bits divided by {white:g}" if preprocessing["white"] else ""
    return (words[preprocessing["resize"]] + white).format(**preprocessing)


def write_weights(state, file):
    """Write the bare state_dict, and say what it takes to use it without this repository."""
    checkpoint.write_weights(state["model"], file)
    names, network = output_names(state), state["build"]["name"]
    arguments = ", ".join(f"{k}={v}" for k, v in ({"num_classes": len(names)} | state["build"]["options"]).items())
    how = f"torchvision.models.{network}({arguments})"
    if network.startswith("timm:"):
        how = f'timm.create_model("{network.removeprefix("timm:")}", {arguments})'
    print(f"wrote {file}, a state_dict for {how}")
    print("input: RGB in 0..1, {}, mean {mean}, std {std}".format(shape_of_input(state), **state["preprocessing"]))
    print(f"outputs: {', '.join(names)}")
    if "labels" in state:
        print(f"a label is given where sigmoid(output) is at least: {thresholds_in_words(state)}")
    if "scale" in state:
        print("in units of the training split: number = {}output * std + mean{}, with mean {mean} and std {std}".format(
            *(("exp(", ")") if state["scale"]["log"] else ("", "")), **state["scale"]))
        if state["quantiles"]:
            print("sort the quantiles of each number: the outputs themselves may cross")
    if state["hidden"]:
        layers = ", ".join(f"nn.{layer}" for layer in rebuild(state).get_submodule(state["head"]))
        print(f'then model.set_submodule("{state["head"]}", nn.Sequential({layers})), before loading')
    if state["build"]["name"].startswith("squeezenet"):
        print("then set model.classifier[2] = torch.nn.Identity(): it was trained without the ReLU behind the head")


def thresholds_in_words(state):
    return ", ".join(f"{label} {value:.4f}" for label, value in state["thresholds"].items())


def write_program(state, file):
    """Write the network with normalization, and softmax, sigmoid or the targets' units, as a program; say how to use
    it.
    """
    targets, labels = state.get("targets"), state.get("labels")
    preprocessing = preprocessing_for(state["preprocessing"])
    mean, std, quantiles = preprocessing["mean"], preprocessing["std"], len(state.get("quantiles") or [])
    program = export.Program(rebuild(state), mean, std, state.get("scale"), quantiles, labels is not None)
    if targets:
        outputs = {"targets": targets, "quantiles": state["quantiles"]}
    elif labels:
        outputs = {"labels": labels, "thresholds": list(state["thresholds"].values())}
    else:
        outputs = {"classes": state["classes"]}
    said = export.write(program, preprocessing["image_size"], file, preprocessing | outputs)
    print(f"wrote {file}; {said}")
    print("input: RGB in 0..1, float32, (N, 3, {image_size}, {image_size}): {}; mean and std are inside".format(
        shape_of_input(state), **preprocessing))
    kind = "probabilities" if not targets else "numbers in their own units" if not state["quantiles"] else \
        f"the quantiles {', '.join(map(str, state['quantiles']))} in their own units"
    print(f"output: {kind}: {', '.join(targets or output_names(state))}")
    if labels:
        print(f"a label is given where its probability is at least: {thresholds_in_words(state)}")


def load_checkpoints(files):
    """Their states, which must predict the same classes or labels (in any order), or the same numbers. Raises
    CheckpointError.
    """
    states = [checkpoint.load(file, needs=checkpoint.NEEDED) for file in files]
    kinds = [next(kind for kind in ("classes", "labels", "targets") if kind in state) for state in states]
    answers = [sorted(output_names(state)) if "targets" not in state else
               [*state["targets"], *map(str, state["quantiles"] or [])] for state in states]
    for file, kind, answer in zip(files, kinds, answers, strict=True):
        if (kind, answer) != (kinds[0], answers[0]):
            raise checkpoint.CheckpointError(f"{file} predicts {', '.join(answer)} and {files[0]} "
                                             f"{', '.join(answers[0])}: only the same can be averaged")
    return states


def refuse_mirror_images(args, states):
    """--tta of a network that was trained with --no-flip: its left and right differ. Raises CheckpointError."""
    for file, state in zip(args.checkpoint, states, strict=True):
        if args.tta and not preprocessing_for(state["preprocessing"])["flip"]:
            raise checkpoint.CheckpointError(f"{file} was trained with --no-flip, so a mirror image is another "
                                             "picture: leave --tta out")


def refuse_options_of_classes(args, state):
    """--target, --top-k, --all-probabilities of a model of labels or numbers. Raises CheckpointError."""
    if "classes" in state:
        return
    predicts, names = ("labels", state["labels"]) if "labels" in state else ("the numbers", state["targets"])
    for option, value in (("--target", args.target), ("--top-k", args.top_k),
                          ("--all-probabilities", args.all_probabilities)):
        more = ", the CSV has the probabilities of all labels" if "labels" in state and option != "--target" else ""
        if value:
            raise checkpoint.CheckpointError(f"{option} is for classes, and {args.checkpoint[0]} predicts {predicts} "
                                             f"{', '.join(names)}: leave it out{more}")


def run_network(args, state, device, paths):
    """Return the outputs (N, C) in float32 for the pictures, with --tta those for their mirror images too, and
    {place in `paths`: what is wrong} of those that cannot be read.
    """
    model = rebuild(state).requires_grad_(False)
    model.to(device, memory_format=torch.channels_last).eval()
    _, _, amp_dtype = pick_precision(args.amp, model, device)
    preprocessing = state["preprocessing"]
    mean, std = (torch.tensor(preprocessing[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    # The loader hands on each picture's place in the list, since bad pictures drop out of a batch.
    workers = args.workers if len(paths) > args.batch_size else 0  # starting processes costs more than one batch
    loader = data.eval_loader([(path,) for path in paths], preprocessing, args.batch_size, workers, on_bad_image="skip")
    batches = data.batches(loader, say=lambda line: None)  # main() says it

    outputs = torch.zeros(1 + args.tta, len(paths), len(output_names(state)))
    with torch.inference_mode(), torch.amp.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for x, places in tqdm(batches, "predict", len(loader), leave=False, disable=None):
            x = data.to_input(x, mean, std)
            for view in range(1 + args.tta):
                outputs[view, places] = model(x.flip(3) if view else x).float().cpu()
    bad = loader.dataset.skipped
    return list(outputs), {place: bad[path] for place, path in enumerate(paths) if path in bad}


def places_of(names, states):
    """Where the names, of classes or labels, stand in each of the checkpoints, which may have them in another order."""
    return [[output_names(state).index(name) for name in names] for state in states]


def class_rows(args, states, outputs, good, found):
    """The predictions as rows of a table, and words about their scores (None where no class is known).
    outputs: the logits (N, C) of each of `states`, of which one may be there twice. good: the places of the pictures
    `found` that could be read.
    """
    classes = states[0]["classes"]
    places = places_of(classes, states)
    probabilities = torch.stack([logits.softmax(1)[:, p] for logits, p in zip(outputs, places, strict=True)]).mean(0)
    labels = torch.tensor([one.label for one in found])
    truth = labels[good] if (labels >= 0).any() else None
    files = [found[place].path for place in good]
    rows = metrics.prediction_rows(files, probabilities[good], classes, truth, args.top_k or 1, args.all_probabilities)
    scored = [place for place in good if labels[place] >= 0]
    if not scored:
        return rows, None
    confusion = metrics.confusion_matrix(probabilities[scored].argmax(1), labels[scored], len(classes))
    of_all, there = metrics.scores(confusion), (confusion.sum(1) > 0).sum()
    of_table = f" {which_rows(args)}" if args.labels else ""
    words = f"accuracy {of_all['accuracy']:.4f} on {counted(len(scored))}{of_table}"
    if there < len(classes):
        balanced = of_all["balanced_accuracy"]
        words += f", balanced accuracy {balanced:.4f} over the {there} of {len(classes)} classes that have any"
    return rows, f"{words}\n{metrics.report(confusion, classes)}"


def label_rows(args, states, outputs, good, paths, truth):
    """As `class_rows`, for labels; truth: (N, labels), nan where it is not known, or None. Several answers: the means
    of their probabilities, and of their thresholds.
    """
    labels = output_names(states[0])
    places = places_of(labels, states)
    found = [logits[good].double().sigmoid()[:, p] for logits, p in zip(outputs, places, strict=True)]
    probabilities = torch.stack(found).mean(0)
    values = torch.tensor([list(state["thresholds"].values()) for state in states], dtype=torch.float64)
    thresholds = torch.stack([own[p] for own, p in zip(values, places, strict=True)]).mean(0).tolist()
    truth = None if truth is None else truth[good]
    rows = metrics.label_rows([paths[i] for i in good], labels, probabilities, thresholds, truth)
    if truth is None or truth.isnan().all():
        return rows, None
    known = (~truth.isnan()).any(1)
    report = metrics.label_report(labels, probabilities[known], truth[known], thresholds)
    return rows, f"on the {counted(int(known.sum()))} {which_rows(args)}:\n\n{report}"


def which_rows(args):
    """Words about those that are scored."""
    return f"of {args.split}" if args.split else f"of {args.labels}, those it was trained on perhaps among them"


def number_rows(args, states, outputs, good, paths, truth):
    """As `class_rows`, for a regression; truth: (N, targets), nan where a number is not known, or None."""
    state, targets, levels = states[0], states[0]["targets"], states[0]["quantiles"]
    shape = (len(good), len(targets), len(levels)) if levels else (len(good), len(targets))
    own = [tables.to_own_units(o[good].view(shape), s["scale"], levels) for s, o in zip(states, outputs, strict=True)]
    predictions = torch.stack([values for values, _ in own]).mean(0)
    quantiles = torch.stack([ranges for _, ranges in own]).mean(0) if levels else None
    truth = None if truth is None else truth[good]
    rows = tables.prediction_rows([paths[i] for i in good], targets, predictions, quantiles, levels, truth)
    if truth is None or truth.isnan().all():
        return rows, None
    ways = {"this model": predictions} | {k: torch.tensor(v, dtype=torch.float64) for k, v in state["baseline"].items()}
    report = metrics.regression_report(targets, truth, ways, quantiles)
    known = int((~truth.isnan()).any(1).sum())
    return rows, f"on the {counted(known)} {which_rows(args)}:\n\n{report}"


def columns_of(args, state, found, truth):
    """The columns of what `class_rows`, `label_rows` or `number_rows` will return."""
    if "classes" in state:
        label = torch.zeros(1, dtype=torch.int64) if any(one.label >= 0 for one in found) else None
        zeros = torch.zeros(1, len(state["classes"]))
        rows = metrics.prediction_rows([""], zeros, state["classes"], label, args.top_k or 1, args.all_probabilities)
        return list(rows[0])
    if "labels" in state:
        zeros = torch.zeros(1, len(state["labels"]))
        return list(metrics.label_rows([""], state["labels"], zeros, [0.5] * len(state["labels"]), truth)[0])
    levels, zeros = state["quantiles"], torch.zeros(1, len(state["targets"]))
    quantiles = zeros[..., None].expand(-1, -1, len(levels)) if levels else None
    return list(tables.prediction_rows([""], state["targets"], zeros, quantiles, levels, truth)[0])


def rows_of_split(args, rows):
    """Those of --split, among rows that are tuples (path, split, ...)."""
    rows = [row for row in rows if args.split in (None, row[1])]
    if not rows:
        raise tables.TableError(f"{args.labels} has no rows that a column split calls {args.split}")
    return rows


def read_classes(args, state):
    """The pictures (Found) of the rows of --labels, of a classifier. Raises tables.TableError."""
    options, classes = state["options"], state["classes"]
    # (An older checkpoint, or one from class folders, has no such options, or None.)
    target = args.target or options.get("target")
    column = args.file_column or options.get("file_column") or "file"
    # A column that is named here must be there.
    rows, notes = tables.read_class_rows(args.labels, target, column, args.data, classes_optional=True,
                                         column_optional=not args.target)
    rows = rows_of_split(args, rows)
    place = {name: label for label, name in enumerate(classes)}
    without = [path for path, _, name in rows if name is None]
    strange = [(path, name) for path, _, name in rows if name is not None and name not in place]
    if not target:
        notes.append("note: predicted, not scored: the model comes from class folders, and no --target names the "
                     "column of the classes")
    elif without:
        notes.append(f"note: {len(without)} of {len(rows)} rows of {args.labels} have no {target}: predicted, not "
                     f"scored ({some(without)})")
    if strange:
        names = some(name for _, name in strange)
        notes.append(f"note: {len(strange)} of {len(rows)} rows of {args.labels} have a {target} that is no class of "
                     f"the model ({names}): predicted, not scored ({some(path for path, _ in strange)})")
    for line in notes:
        say(line)
    return [Found(path, None, (), place.get(name, -1)) for path, _, name in rows]


def read_truth(args, state):
    """The pictures (Found) of the rows of --labels, and what is true of them: numbers (N, targets) or labels (N,
    labels), nan where it is not known, or None where it never is. Raises tables.TableError.
    """
    options = state["options"]
    column = args.file_column or options.get("file_column") or "file"
    if "labels" in state:
        names, what = state["labels"], "known label"
        # With a separator, --target named the column; without, those of the labels. (One with a comma in its name was
        # typed in parts.)
        separator = options["separator"]
        targets = options["target"] if separator else names
        rows, notes = tables.read_label_rows(args.labels, names, targets, separator, column, args.data)
    else:
        names, what = state["targets"], f"number for {', '.join(state['targets'])}"
        rows, notes = tables.read_rows(args.labels, names, numbers_optional=True, file_column=column, folder=args.data)
    rows = rows_of_split(args, rows)
    # Of several numbers some may be known: a row that has none at all is None.
    nothing = [None] * len(names)
    truth = torch.tensor([[math.nan if number is None else number for number in numbers or nothing]
                          for _, _, numbers, *_ in rows], dtype=torch.float64)
    without = truth.isnan().all(1).tolist()
    if any(without):
        files = some([path for (path, *_), lacks in zip(rows, without, strict=True) if lacks])
        notes.append(f"note: {sum(without)} of {len(rows)} rows of {args.labels} have no {what}: predicted, not scored "
                     f"({files})")
    for line in notes:
        say(line)
    return [Found(path, None, (), -1) for path, *_ in rows], None if all(without) else truth


def predict(args):
    states = load_checkpoints(args.checkpoint)
    refuse_mirror_images(args, states)
    state = states[0]
    refuse_options_of_classes(args, state)
    if args.weights_only:
        write_weights(state, args.weights_only)
    if args.export:
        write_program(state, args.export)
    if not (args.pictures or args.labels):
        return 0
    device, truth, classes = pick_device(args.device), None, state.get("classes", [])
    if args.labels and classes:
        found = read_classes(args, state)
    elif args.labels:
        found, truth = read_truth(args, state)
    else:
        found = list_pictures(args.pictures, classes)
    if args.csv:  # now, and not after all the predicting
        if args.labels and Path(args.csv).exists() and os.path.samefile(args.csv, args.labels):
            raise tables.TableError(f"--csv {args.csv} would write over the labels: give another name")
        checkpoint.refuse_other_files(args.csv, columns_of(args, state, found, truth))

    for line in what_is_not_scored(found, classes) if classes and not args.labels else ():
        say(line)
    paths = [one.path for one in found]
    for line in data.first_frames(paths):
        say(line)
    answers, bad = [], {}  # (state, outputs): of each checkpoint, and of its mirror images
    for one in states:
        outputs, unread = run_network(args, one, device, paths)
        answers += [(one, view) for view in outputs]
        bad |= unread  # by its --white, one may read what another cannot: that has no mean
    for place, reason in bad.items():
        say(f"cannot read {paths[place]} ({reason}): passed over")
    good = [place for place in range(len(paths)) if place not in bad]
    if classes:
        rows, words = class_rows(args, *zip(*answers, strict=True), good, found)
    else:
        rows_of = label_rows if "labels" in state else number_rows
        rows, words = rows_of(args, *zip(*answers, strict=True), good, paths, truth)
    if rows:
        # --all-probabilities are for the file: a thousand of them would fill the terminal.
        for_the_file = set(metrics.probability_columns(classes))
        shown = [column for column in rows[0] if column not in for_the_file]
        cells = [shown, *([_short(row[column], column) for column in shown] for row in rows)]
        if "labels" in state:
            cells = [["file", "labels"], *([row["file"], _given(row, state["labels"])] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        if args.csv:
            checkpoint.write_csv(rows, args.csv)
    if words:
        print(f"\n{words}")
    return 1 if len(good) < len(found) else 0


def _given(row, labels):
    """The labels that a row of `label_rows` gives, with their probabilities, the likeliest first."""
    names = row["labels"].split(metrics.separator_for(labels))
    columns = zip(metrics.probability_columns(labels), labels, strict=True)
    found = sorted(((row[column], name) for column, name in columns if name in names), reverse=True)
    return ", ".join(f"{name} {value:.4f}" for value, name in found) or "-"


def _short(value, column):
    """A cell of the table."""
    if isinstance(value, str):
        return value or "-"
    return f"{value:.4f}" if column.startswith("probability") else f"{value:.6g}"


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.pictures or args.labels or args.weights_only or args.export):
        parser.error("name pictures, folders or globs to predict, or --labels CSV, or --weights-only or --export FILE")
    if args.weights_only and len(args.checkpoint) > 1:
        parser.error("--weights-only writes the weights of one --checkpoint")
    if args.export and (len(args.checkpoint) > 1 or args.tta):
        parser.error("--export writes one --checkpoint: average the outputs of several programs, or of mirror images")
    if args.pictures and args.labels:
        parser.error("give either pictures or --labels, not both")
    for option in ("csv", "tta", "top_k"):
        if getattr(args, option) and not (args.pictures or args.labels):
            parser.error(f"--{option.replace('_', '-')} only has a meaning with pictures or --labels")
    for option in ("split", "data", "file_column", "target"):
        if getattr(args, option) and not args.labels:
            parser.error(f"--{option.replace('_', '-')} only has a meaning with --labels")
    if args.all_probabilities and not args.csv:
        parser.error("--all-probabilities writes a column for each class into --csv FILE: name one")
    with ending.tidy(checkpoint.CheckpointError, data.DataError, export.ExportError, ModelError, tables.TableError):
        sys.exit(predict(args))


if __name__ == "__main__":
    main()
