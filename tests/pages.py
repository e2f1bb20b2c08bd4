"""The README and the pages under docs/, as the tests read them: their text, and the snippets and edits in it."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{page.name}": page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join(PAGES.values())


def snippet(name):
    """The Python block whose first line names it."""
    found = re.findall(rf"^```python\n# {name}: .*?\n(.*?)^```$", TEXT, re.S | re.M)
    assert len(found) == 1, name
    return found[0]


def edits(name):
    """The diff block whose first line names it, as [(lines there now, lines that take their place), ...]."""
    found = re.findall(rf"^```diff\n# {name}: .*?\n(.*?)^```$", TEXT, re.S | re.M)
    assert len(found) == 1, name
    hunks = []
    for line in found[0].splitlines():
        if line.startswith("@@ "):
            hunks.append(([], []))
        assert line[0] in "@ +-", line
        if line[0] in " -":
            hunks[-1][0].append(line[1:])
        if line[0] in " +":
            hunks[-1][1].append(line[1:])
    return hunks


def edit(lines, hunks):
    """`lines` of a program with these edits made, each where its lines stand, at whatever indent."""
    lines = list(lines)
    for old, new in hunks:
        size = len(old)
        places = [i for i in range(len(lines)) if [line.strip() for line in lines[i : i + size]] == [o.strip() for o in old]]
        assert len(places) == 1, old
        indent = lines[places[0]][: len(lines[places[0]]) - len(lines[places[0]].lstrip())]
        lines[places[0] : places[0] + size] = [indent + line if line else "" for line in new]
    return lines
