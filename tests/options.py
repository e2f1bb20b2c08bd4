"""Write docs/options.md, the tables of all options, from the parsers.

    python tests/options.py

tests/test_house.py compares the page with what this program would write.
"""

import re

from conftest import ROOT  # it puts the scripts on the path

import predict
import predict_text
import train_classifier
import train_continual
import train_multilabel
import train_regressor
import train_text_classifier
import train_token_classifier

PAGE = ROOT / "docs/options.md"
TOP = """# Every option

*Which options does each script have, and what are their defaults?*

Written by `python tests/options.py` from the parsers; `--help` prints the same. Why the defaults are what they are:
[training.md](training.md#defaults-and-why).

"""


def option_rows(script):
    """{group: [a row of a table for each option]}, from the parser."""
    parser, rows = script.build_parser(), {}
    for group in parser._action_groups:
        for action in (a for a in group._group_actions if a.option_strings and a.dest != "help"):
            words = parser._get_formatter()._expand_help(action)
            words = re.sub(r"default here \d+", "default: 4, or the number of cores if fewer", words).replace("|", "\\|").replace("<", "&lt;")
            value = f" {action.metavar}" if action.metavar else ""
            value = " " + " \\| ".join(action.choices) if action.choices else value
            rows.setdefault(group.title, []).append(f"| `{'`, `'.join(action.option_strings)}`{value} | {words} |")
    return rows


def page():
    lines, of_the_classifier, all_options = [], set(), []
    for script in (train_classifier, train_multilabel, train_regressor, train_continual, predict, train_text_classifier,
                   train_token_classifier, predict_text):
        lines += [f"## {script.__name__}.py", ""]
        options = [next(word for word in action.option_strings if word.startswith("--"))
                   for action in script.build_parser()._actions if action.option_strings and action.dest != "help"]
        if script in (train_multilabel, train_regressor, train_continual, train_text_classifier, train_token_classifier):
            lacking = "`, `".join(option for option in all_options if option not in options)
            lines += [f"As `train_classifier.py`, except for the options below, and without `{lacking}`.", ""]
        lines += ["| | |", "|---|---|"]
        for group, rows in option_rows(script).items():
            if new := [row for row in rows if row not in of_the_classifier]:
                lines += [f"| **{group}** | |", *new]
            if script is train_classifier:
                of_the_classifier |= set(rows)
                all_options = options
        lines.append("")
    return TOP + "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
