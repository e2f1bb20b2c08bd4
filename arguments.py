"""Command-line options: numbers with a range, errors in one line, and which options were typed.

    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=number(int, 1), default=15)
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    refuse_idle(parser, typed, {"momentum": (args.optimizer == "sgd", "--optimizer sgd")})

and the options that mean the same in every training script.
This file needs the standard library alone and can be copied into any project.
"""

import argparse
import os
import unicodedata


def make_parser(description):
    """An ArgumentParser that shows `description` as it stands, knows no abbreviations, and answers a mistake in one
    line with exit status 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    return parser


ANY = 10**9  # no limit that anyone meets
SWITCH = argparse.BooleanOptionalAction  # with its --no-..., for a run that is resumed and goes on without


def number(kind, low, high=ANY):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # true for nan as well
            limits = f"{low} or above" if high == ANY and value < low else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


positive, count, share, above = number(int, 1), number(int, 0), number(float, 0, 1), number(float, 0)


def numbers(low, high):
    """An argparse type: several floats between low and high, comma-separated, as an ascending list without repeats."""

    def parse(text):
        values = sorted({float(f"{float(part):g}") for part in text.split(",")})  # six digits, as they are printed
        if not all(low < value < high for value in values):
            raise argparse.ArgumentTypeError(f"{text} is out of range: each must lie between {low} and {high}")
        return values

    parse.__name__ = "list of numbers"
    return parse


def names(text):
    """An argparse type: several names, comma-separated, as a list; letters with accents in one form (NFC)."""
    return [part.strip() for part in unicodedata.normalize("NFC", text).split(",")]


def typed_options(parser, argv):
    """The options that stand on the command line, as a dict: those left at their default are not in it. (argparse
    itself does not tell the two apart; but it leaves alone what a namespace already holds.)
    """
    untyped = object()
    blank = argparse.Namespace(**{a.dest: untyped for a in parser._actions})
    # An option that appends would append to the marker; with None it starts a list of its own.
    for action in parser._actions:
        if isinstance(action, argparse._AppendAction):
            setattr(blank, action.dest, None)
    typed = vars(parser.parse_args(argv, blank))
    return {name: value for name, value in typed.items() if value is not untyped and value is not None}


def refuse_unknown_choices(parser, args):
    """End with an error for an option whose value is none of its choices: a checkpoint's, which another version of the
    script has written.
    """
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.choices and value is not None and value not in action.choices:
            parser.error(f"{action.option_strings[-1]} is {value} in the checkpoint, and this script knows "
                         f"{', '.join(action.choices)}: resume the run with the script that began it")


def refuse_idle(parser, typed, rules):
    """End with an error for a typed option that would do nothing. rules: {option: (does it apply?, what it needs)}."""
    for option, (applies, needs) in rules.items():
        if option in typed and not applies:
            parser.error(f"--{option.replace('_', '-')} only has a meaning with {needs}")


# ---- options that mean the same in every training script; without: names of those that a script leaves out


def _but_for(without, add):
    """`add`, deaf to options of these names."""
    return lambda *words, **how: None if set(words) & set(without) else add(*words, **how)


# A resumed run may change these and nothing else: the rest decides what has been learned so far.
MAY_CHANGE = {"data", "old_data", "labels", "epochs", "lr", "backbone_lr_scale", "layer_decay", "weight_decay",
              "patience", "unfreeze", "workers", "device", "output", "resume", "list_layers", "log_every", "save_every",
              "keep_every", "on_bad_image", "batch_size", "accumulate", "no_test", "no_report",
              "tensorboard", "find_lr", "compile", "deterministic"}
DEFAULT_LR = {"sgd": 1e-2, "adam": 3e-3, "adamw": 3e-3, "rmsprop": 1e-3, "adagrad": 1e-2}


def add_table_options(add, labels=None):
    """The CSV of the pictures. add: the `add_argument` of the group "data". labels: the default of --labels."""
    default = "default %(default)s" if labels else "default: none, but class folders"
    add("--labels", default=labels, metavar="FILE",
        help=f"a CSV of the pictures, maybe with a column split; relative to --data ({default})")
    add("--file-column", default="file", metavar="COLUMN",
        help="the column of --labels with the pictures: names below --data or beside the CSV (default %(default)s)")


def add_picture_options(add, without=()):
    """Size, shape, grey levels, flips, batches, workers, the cache, unreadable pictures. add: the `add_argument` of the
    group "data".
    """
    add = _but_for(without, add)
    add("--image-size", type=positive, metavar="N",
        help="pixels (default: the evaluation size of the weights; 224 for a bare local file)")
    add("--resize", choices=["crop", "squash", "pad"],
        help="to a square: crop sees the centre of a long picture only; squash and pad see the whole, out of shape or "
             "with black beside it (default: as the weights, if they are a checkpoint of these scripts; else crop)")
    add("--white", type=number(float, 1e-9, 2**32), metavar="VALUE",
        help="the number that is white in grey of 16 or 32 bits or floats, such as 4095 (default: as the weights, if "
             "they are a checkpoint of these scripts; else 65535 in 16 bits, and for others it has to be given)")
    add("--flip", action=SWITCH, default=None,
        help="--no-flip: no mirror images, in any --augment, where left and right differ (default: as the weights, if "
             "they are a checkpoint of these scripts; else mirror images)")
    add("-b", "--batch-size", type=positive, default=32, metavar="N",
        help="pictures per batch, under torchrun in each process (default %(default)s)")
    add("-j", "--workers", type=count, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that decode pictures; does not change the result (default here %(default)s)")
    add("--cache-features", type=count, default=0, metavar="K",
        help="with a frozen backbone: put K views of each picture through it, once (default 0: one in every epoch)")
    add("--on-bad-image", choices=["error", "skip"], default="error",
        help="stop at a picture that cannot be read, or leave it out (default %(default)s)")


OF_TABLES = ("a CSV, TSV or JSON-lines file; a folder with one for each split, train.csv and so on; or a folder of "
             "class folders of text files, maybe below train/, val/ and test/")


def add_text_options(add, files=OF_TABLES, read="that are read of a text", texts="texts"):
    """Texts, and the batches of them. add: the `add_argument` of the group "data". The rest: words for the help."""
    add("--data", metavar="PATH", help=files)
    add("--val-split", type=number(float, 0.01, 0.99), default=0.2, metavar="SHARE",
        help="share that is set aside where there is no split val (default %(default)s)")
    add("--max-length", type=positive, metavar="N",
        help=f"pieces {read} (default: as many as the network takes, 512 at most)")
    add("-b", "--batch-size", type=positive, default=32, metavar="N",
        help=f"{texts} per batch, under torchrun in each process (default %(default)s)")
    add("-j", "--workers", type=count, default=0, metavar="N",
        help="processes that put batches together; does not change the result (default %(default)s)")


def add_encoder_options(parser):
    """A network of transformers and its head: text.py knows the words. Returns the `add_argument` of the group."""
    add = parser.add_argument_group("network").add_argument
    add("--model", default="bert-base-uncased", metavar="NAME",
        help="a folder of transformers (config.json, model.safetensors, tokenizer.json), or the name of a network on the hub "
             "(default %(default)s)")
    add("--weights", choices=["pretrained", "none"], default="pretrained",
        help="none: that network with random weights, to train from scratch (default %(default)s)")
    add("--dropout", type=number(float, 0, 0.99), metavar="P", help="beside the head (default: the network's own)")
    return add


def add_network_options(parser):
    """The network, its weights and its head: model.py knows the words."""
    add = parser.add_argument_group("network").add_argument
    add("--model", default="resnet18", metavar="NAME",
        help="torchvision's name for the network, or timm:NAME for one of the package timm (default %(default)s)")
    add("--weights", default="DEFAULT", metavar="W",
        help="DEFAULT | a torchvision weights name | none | a local .pt, .pth or .safetensors file, of several sets of "
             "weights in it FILE::KEY (default %(default)s)")
    add("--head", choices=["linear", "mlp"], default="linear", help="mlp: one hidden layer (default %(default)s)")
    add("--hidden", type=number(int, 1, 65536), default=256, metavar="N", help="of the mlp (default %(default)s)")
    add("--dropout", type=number(float, 0, 0.99), metavar="P",
        help="beside the head (default: 0.5 in an mlp, otherwise the network's own)")


def add_freezing_options(parser):
    """--freeze, --unfreeze, --list-layers: freeze.py knows the words."""
    add = parser.add_argument_group("freezing").add_argument
    add("--freeze", default="none", metavar="SPEC",
        help="none | backbone | conv | bn | to:LAYER | names or patterns, comma-separated, such as conv1,layer1 or "
             "'*.bn1'; the new head always trains (default %(default)s)")
    add("--unfreeze", action="append", default=[], metavar="EPOCH:NAMES",
        help="what thaws at the start of that epoch, the first being 0: 3:layer4, 5:all; with a peak rate of its own: "
             "3:layer4@1e-4; repeatable")
    add("--list-layers", action="store_true", help="print the layers, what is frozen, the rates; do not train")


SCHEDULES = ["cosine", "step", "constant", "plateau"]


def add_optimizer_options(parser, without=(), rates="", schedules=SCHEDULES):
    """Optimizer, rates, decay, schedule, accumulation. None stands for a default that `fill_defaults` sets. rates: words
    about the default of --lr, if it is another one.
    """
    add = _but_for(without, parser.add_argument_group("optimizer").add_argument)
    add("--optimizer", choices=list(DEFAULT_LR), default="adamw", help="(default %(default)s)")
    rates = rates or ", ".join(f"{k} {v:g}" for k, v in DEFAULT_LR.items())
    add("--lr", type=above, metavar="LR", help=f"learning rate of the head (default: {rates})")
    add("--backbone-lr-scale", type=above, metavar="S",
        help="the backbone's rate is LR * S (default 0.1; 1 with --weights none)")
    add("--layer-decay", type=share, default=1.0, metavar="D",
        help="the rate of each group of the backbone is D times that of the one behind it (default %(default)s)")
    add("--find-lr", action="store_true",
        help="do not train: raise the rate over 100 steps, suggest an --lr, draw find_lr.png")
    add("--momentum", type=share, metavar="M", help="sgd (default 0.9) and rmsprop (default 0)")
    add("--wd", "--weight-decay", dest="weight_decay", type=above, metavar="D",
        help="on weights, not on biases and norm layers; decoupled in adamw (default 0.01), L2 in others (0.0001)")
    add("--schedule", choices=schedules, default="cosine", help="(default %(default)s)")
    add("--warmup-epochs", type=above, default=0.5, metavar="N", help="linear (default %(default)s)")
    add("--step-epochs", type=positive, default=3, metavar="N", help="step: epochs between cuts (default %(default)s)")
    add("--plateau-epochs", type=positive, default=2, metavar="N",
        help="plateau: epochs without a better --monitor before a cut (default %(default)s)")
    add("--gamma", type=share, default=0.1, metavar="G", help="step, plateau: factor of a cut (default %(default)s)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default %(default)s)")
    add("--clip-grad", type=above, default=0.0, metavar="NORM", help="longest gradient (default: any)")


def add_training_options(parser, metrics, about="", without=()):
    """Epochs, precision, device, seed. metrics: what --monitor may be, the default first; about: words about them."""
    add = _but_for(without, parser.add_argument_group("training").add_argument)
    add("--epochs", type=positive, default=15, metavar="N", help="(default %(default)s)")
    add("--monitor", choices=metrics, default=metrics[0],
        help=f"what chooses best.pt and stops early{about} (default %(default)s)")
    add("--patience", type=count, default=0, metavar="N",
        help="stop after N epochs without a better --monitor (default %(default)s: never)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="precision (default %(default)s)")
    add("--device", default="auto", metavar="D", help="auto (cuda, mps, cpu in that order) or a name such as cuda:0")
    add("--compile", action=SWITCH, default=None,
        help="torch.compile, on one device: a minute or more to start, then maybe faster")
    add("--sync-bn", action="store_true",
        help="under torchrun, on GPUs: BatchNorms that train see the batches of all processes as one")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="(default %(default)s)")
    add("--deterministic", action=SWITCH, default=None,
        help="the same bits on a GPU, too; slower (a CPU needs no asking)")


def add_saving_options(parser, script):
    """Where and how often to save, and --resume: checkpoint.py does it. script: its name without .py."""
    add = parser.add_argument_group("saving").add_argument
    add("--output", metavar="DIR", help=f"the run folder (default runs/{script}/<time>)")
    add("--resume", nargs="?", const="", metavar="FILE",
        help="go on from FILE; without FILE from --output's last.pt if there is one, else start afresh; options not "
             "typed come from the checkpoint")
    add("--save-every", type=count, default=0, metavar="N",
        help="save last.pt every N optimizer steps, too (default %(default)s: at the end of each epoch only)")
    add("--keep-every", type=count, default=0, metavar="N",
        help="keep the checkpoint of every Nth epoch as epoch_<epoch>.pt (default %(default)s: none)")
    add("--no-test", action="store_true",
        help="no evaluation of best.pt at the end: the test split stays unseen while you try settings")
    add("--tensorboard", action=SWITCH, default=None, help="write each epoch's numbers for TensorBoard, too")
    add("--no-report", action="store_true", help="no pictures and no report.html at the end")
    add("--log-every", type=positive, default=10, metavar="N",
        help="optimizer steps between looks at the loss (default %(default)s)")


def fill_defaults(args):
    """Set those options of the optimizer that were not typed and whose default depends on another option."""
    for option, default in (
        ("lr", DEFAULT_LR[args.optimizer]),
        ("weight_decay", 1e-2 if args.optimizer == "adamw" else 1e-4),
        ("momentum", 0.9 if args.optimizer == "sgd" else 0.0),
        ("backbone_lr_scale", 1.0 if vars(args).get("weights", "").lower() == "none" else 0.1),
    ):
        if getattr(args, option) is None:
            setattr(args, option, default)


def shared_rules(args, backbone_trains, processes=1):
    """Rules for `refuse_idle` about these options."""
    thawing = backbone_trains, "a backbone that trains or thaws"
    options = vars(args)  # not all scripts have all of them
    table = options.get("labels"), "--labels, a CSV"
    listing = not options.get("list_layers"), "training: --list-layers shows the network with a linear head"
    return {
        "labels": (options.get("target") and args.data, "--data and --target, the column to learn"),
        "target": table, "file_column": table,
        "hidden": (options.get("head") == "mlp", "--head mlp"), "head": listing, "dropout": listing,
        "find_lr": (args.resume is None and args.lr != 0 and processes == 1,
                    "a new run (no --resume), an --lr above 0 and a single process"),
        "sync_bn": (processes > 1, "several processes: torchrun --nproc_per_node=2, on a machine with two GPUs"),
        "on_bad_image": (args.batch_size > 2 or options.get("on_bad_image") == "error",
                         "a --batch-size of 3 or more: too little would be left of a smaller one"),
        "momentum": (args.optimizer in ("sgd", "rmsprop"), "--optimizer sgd or rmsprop"),
        "unfreeze": (args.freeze != "none", "something frozen by --freeze"),
        "backbone_lr_scale": thawing, "layer_decay": thawing,
        "step_epochs": (args.schedule == "step", "--schedule step"),
        "plateau_epochs": (args.schedule == "plateau", "--schedule plateau"),
        "gamma": (args.schedule in ("step", "plateau"), "--schedule step or plateau"),
    }
