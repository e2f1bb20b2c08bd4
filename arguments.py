"""Command-line options: numbers with a range, errors in one line, and which options were typed.

    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=number(int, 1), default=15)
    args, typed = parser.parse_args(argv), typed_options(parser, argv)
    refuse_idle(parser, typed, {"momentum": (args.optimizer == "sgd", "--optimizer sgd")})

This file needs the standard library alone and can be copied into any project.
"""

import argparse


def make_parser(description):
    """An ArgumentParser that shows `description` as it stands, knows no abbreviations, and answers a mistake in one
    line with exit status 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    return parser


ANY = 10**9  # no limit that anyone meets


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
    """An argparse type: several names, comma-separated, as a list."""
    return [part.strip() for part in text.split(",")]


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


def refuse_idle(parser, typed, rules):
    """End with an error for a typed option that would do nothing. rules: {option: (does it apply?, what it needs)}."""
    for option, (applies, needs) in rules.items():
        if option in typed and not applies:
            parser.error(f"--{option.replace('_', '-')} only has a meaning with {needs}")
