"""Numbers or classes of pictures, from a CSV: read and check them; standardize numbers for training, and go back to
their own units.

    table = read_table("./houses/labels.csv", ["price"], data.split_by_hash)     # .splits["train"] = [(path, row), ...]
    scale = fit_scale(table.values["train"], log=True)
    targets = standardize(table.values["train"], scale)                          # mean 0, standard deviation 1
    predictions, _ = to_own_units(outputs, scale)
    found = read_classes("./dogs/labels.csv", "breed", data.split_by_hash)       # .classes, .splits, .notes

For other tables, the parts of `read_table`:

    sheet = read_csv("anything.csv")               # .rows = [(line, {column: text}), ...]; .notes: what is to be said
    require_columns(sheet, ["text", "label"])
    paths, splits, prices = find_pictures(sheet), read_splits(sheet), read_numbers(sheet, "price")
    breeds = read_class_names(sheet, "breed")

And labels, of which a picture may have any number:

    table = read_labels("./beaches/labels.csv", ["water", "haze"], data.split_by_hash)     # columns of 0, 1 or nothing
    table = read_labels("./beaches/labels.csv", ["tags"], data.split_by_hash, separator=" ")    # one column of names

This file needs torch alone and can be copied into any project.
"""

import codecs
import difflib
import hashlib
import json
import math
import mimetypes
import os
import re
import shlex
import unicodedata
import zipfile
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from urllib.parse import unquote

import torch


class TableError(Exception):
    """A CSV that cannot be used. The message is one line that names the way out."""


# ---- any table -> rows of text

Sheet = namedtuple("Sheet", "file delimiter columns rows notes")
Sheet.__doc__ = """file: its path. delimiter: what stands between its cells. columns: their names, in order. rows:
[(number of the line in the file where the row begins, {column: text}), ...]. notes: lines for a person, to which the
functions below add."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars |"}
# UTF-32's begins like UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
                    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# How files begin that are no text (None: a zip archive, which may hold several kinds).
KINDS = {b"PK\x03\x04": None, b"\xd0\xcf\x11\xe0": "an old Excel file", b"PAR1": "a Parquet file",
         b"ARROW1": "an Arrow file", b"\x89HDF": "an HDF5 file",
         b"SQLite format": "an SQLite database", b"\x93NUMPY": "a NumPy array",
         b"\x80\x04": "a Python pickle", b"\x80\x05": "a Python pickle", b"\x1f\x8b": "compressed by gzip",
         b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz", b"\x28\xb5\x2f\xfd": "compressed by zstd",
         b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"%PDF": "a PDF", b"\x89PNG": "a picture",
         b"\xff\xd8\xff": "a picture", b"{\\rtf": "an RTF document",
         b"version https://git-lfs": "the pointer to a file in Git LFS, to be fetched by git lfs pull"}


def table_path(folder, name):
    """The path of a table whose name is relative to the folder. Raises TableError if only from here there is one."""
    _refuse_missing(folder)
    path = os.path.join(folder, name)
    if not os.path.exists(path) and os.path.isfile(name):
        raise TableError(f"there is no {path}: --labels is relative to --data: type --labels "
                         f"{shlex.quote(os.path.relpath(name, folder))}")
    return path


def _refuse_missing(folder):
    if not os.path.isdir(folder):
        raise TableError(f"no such folder: {folder}: say where the pictures are, by --data")


def read_csv(file):
    """Read a table of text, whichever program wrote it: a Sheet. Raises TableError, with the number of the line, for
    what cannot be read with certainty.

    The first line that is neither blank nor a comment (#) names the columns; a line sep=; before it, as Excel writes
    it, is obeyed. Otherwise the header and the rows tell the delimiter: a comma, semicolon, tab or bar. Every row must
    have as many cells as the header. A row of empty cells is passed over.
    """
    text, notes = _decode(file)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    top, delimiter = _find_header(lines, file, notes)
    delimiter = delimiter or _find_delimiter(lines, top, file)
    if delimiter == "\t" and _quotes_are_text(lines[top:]):
        notes.append(f"note: {file}: quotes are read as they stand: the tabs alone make the columns")
        rows = [(top + i, line.split("\t")) for i, line in enumerate(lines[top:], start=1) if line.strip()]
        (_, header), *rows = rows
    else:
        (_, header), *rows = _split(lines, top, delimiter, file)
    columns = _columns(header, delimiter, f"{file}, line {top + 1}")
    if delimiter != ",":
        notes.append(f"note: {file}: read with {DELIMITERS.get(delimiter, repr(delimiter))} between the columns")
    filled = [(line, cells) for line, cells in rows if any(cell.strip() for cell in cells)]
    if len(filled) < len(rows):
        line = next(line for line, cells in rows if not any(cell.strip() for cell in cells))
        notes.append(f"note: {file}: passed over {_count(len(rows) - len(filled), 'row')} of empty cells (line {line})")
    if not filled:
        raise TableError(f"{file} holds no rows below its header")
    for line, cells in filled:
        _refuse_misfit(cells, header, f"{file}, line {line}", top + 1)
    found = [(line, dict(zip(columns, cells, strict=True))) for line, cells in filled]
    return Sheet(file, delimiter, [name for name in columns if name], found, notes)


def read_json_lines(file):
    """[(number of the line, what it holds), ...], each an object {name: value}, of a file of JSON lines; blank lines are
    passed over. Raises TableError, with the number of the line.
    """
    text, _ = _decode(file, is_json=True)
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if text.lstrip().startswith("["):
                raise TableError(f"{file} is one list in JSON: write an object {{...}} a line, without the brackets around "
                                 "and the commas between them") from error
            raise TableError(f"{file}, line {number}: no JSON ({error}): each line is an object, such as "
                             '{"text": "...", "label": "..."}') from error
        if not isinstance(value, dict):
            raise TableError(f"{file}, line {number}: {_shown(line)} is no object: each line is one, such as "
                             '{"text": "...", "label": "..."}')
        found.append((number, value))
    if not found:
        raise TableError(f"{file} is empty")
    return found


JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_sheet(file):
    """A Sheet of a CSV (see `read_csv`), or of JSON lines, by the file's ending. There the columns are the names of all
    objects; what an object lacks, or has as null, is empty, and numbers are text. Raises TableError.
    """
    if Path(file).suffix.lower() not in JSON_LINES:
        return read_csv(file)
    objects = read_json_lines(file)
    columns = list(dict.fromkeys(_clean_name(name) for _, value in objects for name in value))
    rows = []
    for line, value in objects:
        cells = dict.fromkeys(columns, "")
        for name, cell in value.items():
            if isinstance(cell, (dict, list)):
                cells[_clean_name(name)] = json.dumps(cell)
            elif cell is not None:
                cells[_clean_name(name)] = cell if isinstance(cell, str) else json.dumps(cell)
        rows.append((line, cells))
    return Sheet(file, None, columns, rows, [])


def read_text_rows(file, text_columns, target, classes_optional=False, column_optional=True):
    """[(the text, or a tuple of those of two columns; split or None; name of the class or None; where it stands), ...] and
    notes, from a table (see `read_sheet`). Raises TableError.

    text_columns: one name or two. target: the column of the classes. classes_optional: cells of it may be empty, and
    with column_optional there may be no such column. Without it, those of rows of the split test may.
    """
    sheet = read_sheet(file)
    target = target and pick_columns([target], sheet)[0]
    text_columns = pick_columns(text_columns, sheet)
    there = target in sheet.columns
    may_be_absent = classes_optional and column_optional
    if target and not there and may_be_absent:
        sheet.notes.append(f"note: {sheet.file} has no column '{target}': nothing to score by")
    try:
        require_columns(sheet, text_columns if may_be_absent else [*text_columns, target])
    except TableError as error:
        raise TableError(f"{error} (--text-column names that of the texts, --target that of the classes)") from None
    splits = read_splits(sheet)
    may_lack = [classes_optional or split == "test" for split in splits]
    names = read_class_names(sheet, target, may_lack) if there else [None] * len(splits)
    rows = []
    for (line, row), split, name in zip(sheet.rows, splits, names, strict=True):
        texts = tuple(row[column] for column in text_columns)
        rows.append((texts if len(texts) > 1 else texts[0], split, name, f"{file}, line {line}"))
    return rows, sheet.notes


def _columns(header, delimiter, where):
    """The names that the cells of the header give; `where` it stands."""
    columns = [_clean_name(cell) for cell in header]
    if len(columns) == 1 and any(mark in columns[0] for mark in DELIMITERS):
        raise TableError(f"{where}: one column, named '{columns[0]}': take away the quotes around the line, or name "
                         "the delimiter in a first line such as sep=;")
    if any("\n" in cell and delimiter in cell for cell in header):
        raise TableError(f'{where}: a quote (") in the header is closed in a later line: close it')
    if twice := [name for name, count in Counter(columns).items() if count > 1 and name]:
        raise TableError(f"{where}: the column '{twice[0]}' stands there twice: rename one{_no_header(columns)}")
    return columns


def _refuse_misfit(cells, header, where, header_line):
    """Raise TableError for a row with more or fewer cells than the header."""
    if cells == header:
        raise TableError(f"{where}: the header once more: leave that line out")
    if len(cells) == len(header):
        return
    if len(cells) < len(header):
        quoted = len(cells) == 1 and any(mark in cells[0] for mark in DELIMITERS)
        way_out = "take away the quotes around the line" if quoted else "every row needs as many, empty ones too"
    elif any(cell.strip() for cell in cells[len(header) :]):
        way_out = "a number such as 1,234 needs quotes, or no comma; a column of row numbers needs a name in the header"
    else:
        way_out = "take away what ends the row"
    raise TableError(f"{where}: {_count(len(cells), 'cell')}, and the header (line {header_line}) has {len(header)}: "
                     f"{way_out}")


def _decode(file, is_json=False):
    """The text of the file, and notes about its encoding."""
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        beside = (path.name for path in Path(file).parent.glob("*.[ct]sv") if path != Path(file))
        others = sorted(difflib.get_close_matches(Path(file).name, sorted(beside), 3, 0))
        raise TableError(f"cannot read the labels {file} ({error.strerror})"
                         + (f": beside it there is {', '.join(others)}" if others else "")) from error
    for start, kind in KINDS.items():
        if raw.startswith(start):
            raise TableError(f"{file} is {kind or _kind_of_zip(file)}: {SAVE_AS_CSV}")
    mark = next((mark for mark in BYTE_ORDER_MARKS if raw.startswith(mark)), b"")
    raw, encoding, notes = raw[len(mark) :], BYTE_ORDER_MARKS.get(mark, "utf-8"), []
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = _lines_in(raw[: error.start].decode(encoding, "ignore")) + 1
        if mark:
            raise TableError(f"{file}, line {line}: this is no {encoding.upper()}, as the file's first bytes say: "
                             f"{SAVE_AS_CSV}") from None
        text = _decode_windows(raw, line, file)
        notes = [f"note: {file}: line {line} is no UTF-8: the file is read as {WINDOWS}"]
    if "\0" in text:
        raise TableError(f"{file}, line {_lines_in(text[: text.index(chr(0))]) + 1}: NUL bytes, so this is no text, or "
                         f"UTF-16 without a byte order mark: {SAVE_AS_CSV}")
    if re.match(r"\s*<", text):
        raise TableError(f"{file} is HTML or XML: {SAVE_AS_CSV}")
    if not is_json and re.match(r"""\s*(\{|\[\s*[\[{"\d])""", text):
        raise TableError(f"{file} is JSON: {SAVE_AS_CSV}")
    return text, notes


WINDOWS = "Windows-1252 (Western European)"
SAVE_AS_CSV = "save the table as CSV (UTF-8), and name that file"


def _kind_of_zip(file):
    """What a file is that begins like a zip archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "a zip archive, and damaged"
    if any(name.startswith("xl/") for name in names):
        return "an Excel file"
    if any(name.endswith(".iwa") for name in names):
        return "a Numbers file"
    return "an OpenDocument file" if "mimetype" in names else "a zip archive"


def _decode_windows(raw, line, file):
    """Bytes, of which this line is the first that is no UTF-8, in the encoding of Western Windows programs."""
    for number, one in enumerate(raw.splitlines(), 1):
        try:
            # Letters beyond ASCII that are UTF-8: the file mixes two encodings, and one of them would turn to rubbish.
            mixed = not one.isascii() and one.decode("utf-8")
        except UnicodeDecodeError:
            mixed = False
        if mixed:
            raise TableError(f"{file}: line {number} is UTF-8 and line {line} is not: {SAVE_AS_CSV}")
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError as error:
        line = _lines_in(raw[: error.start].decode("latin-1")) + 1
        raise TableError(f"{file}, line {line}: neither UTF-8 nor Windows-1252: {SAVE_AS_CSV}") from None


def _lines_in(text):
    return len(re.findall(r"\r\n|\r|\n", text))


def _find_header(lines, file, notes):
    """The place of the line that names the columns, and the delimiter of a line sep=; before it, else None."""
    delimiter, comments = None, []
    for place, line in enumerate(lines):
        # Excel's, which a program may since have given empty cells, or quotes.
        said = re.fullmatch(r'\s*"?sep=(\\t|[^"\w])"?[\s,;|]*', line.strip("\ufeff"), re.IGNORECASE)
        if said and not delimiter:
            delimiter = said[1].replace("\\t", "\t")
        elif re.match(r"\s*#(?![,;\t|])", line):  # but for a column that is called #
            comments.append(place + 1)
        elif line.strip(' \t,;|"\xa0\ufeff'):
            if comments:
                notes.append(f"note: {file}: passed over {_count(len(comments), 'comment')} above the header (line "
                             f"{comments[0]})")
            return place, delimiter
    raise TableError(f"{file} is empty" if not comments else f"{file} holds comments and no table")


def _find_delimiter(lines, top, file):
    """The delimiter that the header holds; of several the one by which the most rows have as many cells as the header,
    then the one that makes the most cells.
    """
    held = [mark for mark in DELIMITERS if mark in lines[top]]
    if len(held) < 2:
        return held[0] if held else ","
    fitting = {}
    for mark in held:
        try:
            (_, header), *rows = _split(lines, top, mark, file)
            fitting[mark] = sum(len(cells) == len(header) > 1 for _, cells in rows), len(header)
        except TableError:  # quotes that make no sense by this delimiter
            fitting[mark] = 0, lines[top].count(mark)
    best = [mark for mark in held if fitting[mark] == max(fitting.values())]
    if len(best) > 1:
        words = " or ".join(DELIMITERS[mark] for mark in best)
        raise TableError(f"{file} can be read with {words} between its cells: say which in a first line, such as "
                         f"sep={best[-1]}")
    return best[0]


QUOTED = re.compile(r' *"([^"]*(?:""[^"]*)*)"(?!") *')


def _split(lines, top, delimiter, file):
    """[(number of the line where the row begins, [cell, ...]), ...] from the line at `top` on, without blank lines."""
    rows, place = [], top
    while place < len(lines):
        begin, line = place, lines[place]
        if '"' in line:
            cells, place = _split_quoted(lines, place, delimiter, file)
            rows.append((begin + 1, cells))
        elif line.strip(" \xa0\ufeff"):
            rows.append((begin + 1, line.split(delimiter)))
        place += 1
    return rows


def _split_quoted(lines, place, delimiter, file):
    """The cells of the row that begins in the line at `place`, and the place of the line where it ends. A cell in
    quotes may hold delimiters, line breaks and doubled quotes. (Python's csv lets a quote that is never closed swallow
    all rows below it.)
    """
    cells, rest, more = [], lines[place], delimiter
    # Until no delimiter follows a cell.
    while more:
        if rest.lstrip(" ").startswith('"'):
            opens = place
            while not (found := QUOTED.match(rest)):
                end = next((i for i in range(place + 1, len(lines)) if '"' in lines[i]), None)
                if end is None:
                    raise TableError(f'{file}, line {opens + 1}: a quote (") opens here and is not closed: close it, '
                                     "or take it away")
                rest, place = "\n".join([rest, *lines[place + 1 : end + 1]]), end
            cell = found[1].replace('""', '"')
            behind, more, rest = rest[found.end() :].partition(delimiter)
            if behind:
                since = f" (it opens in line {opens + 1})" if opens != place else ""
                raise TableError(f'{file}, line {place + 1}: text behind a closing quote ("){since}: put the whole '
                                 'cell into quotes, those within it twice ("")')
        else:
            cell, more, rest = rest.partition(delimiter)
        cells.append(cell)
    return cells, place


def _quotes_are_text(lines):
    """Whether a table with tabs was written without a thought of quotes, as those of GLUE: each line has as many cells as
    the header, and a cell begins with a quote that does not end where the cell does.
    """
    rows = [line.split("\t") for line in lines if line.strip()]
    as_many = all(len(cells) == len(rows[0]) for cells in rows)
    quoted = [cell for cells in rows for cell in cells if cell.lstrip(" ").startswith('"')]
    return as_many and any(not QUOTED.fullmatch(cell) for cell in quoted)


def _clean_name(name):
    """The name of a column, as it is compared: letters with accents in one form, words with one plain blank between."""
    return unicodedata.normalize("NFC", " ".join(name.strip("\ufeff").split()))


def _count(number, word):
    return f"{number} {word}{'' if number == 1 else 's'}"


def _shown(text):
    """A cell as it can stand in one line: with a line break as \\n."""
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "'"


# ---- columns: their names, numbers, splits


def pick_columns(names, sheet):
    """The columns that these names mean, a list. A name that holds a comma, and so has come in parts, is put together.
    """

    def without_blanks(text):
        return ",".join(part.strip() for part in _clean_name(text).split(","))

    known = {without_blanks(column): column for column in sheet.columns}
    found, names = [], [_clean_name(name) for name in names]
    while names:
        # As many parts as make up the name of a column, or one.
        size = next((n for n in range(len(names), 0, -1) if without_blanks(",".join(names[:n])) in known), 1)
        found.append(known.get(without_blanks(",".join(names[:size])), names[0]))
        del names[:size]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise TableError(f"the target {twice[0]} is named twice")
    return found


def require_columns(sheet, names):
    """Raise TableError if a column is missing."""
    if not (missing := [name for name in names if name not in sheet.columns]):
        return
    like = {re.sub(r"[\s_-]", "", column).casefold(): column for column in sheet.columns}
    close = difflib.get_close_matches(re.sub(r"[\s_-]", "", missing[0]).casefold(), like, 1)
    meant = like[close[0]] if close else None
    if missing[0] == "file":
        meant = _column_of_pictures(sheet) or meant
    words = f"; did you mean '{meant}'?" if meant else ""
    if missing[0] == "file":
        words = (f"; did you mean --file-column {shlex.quote(meant)}?" if meant
                 else "; --file-column says which column names the pictures")
    if len(sheet.columns) == 1:
        words = f", and no other: columns are separated by {', '.join(DELIMITERS.values())}"
    raise TableError(f"{sheet.file} has no column {', '.join(map(repr, missing))}: there are {', '.join(sheet.columns)}"
                     f"{_no_header(sheet.columns, sheet.file) or words}{_encoding(sheet)}")


def _column_of_pictures(sheet):
    """The column of which the first cells lead to files, best as they are written; or None."""
    folder, listed, rows = str(Path(sheet.file).parent), {}, [row for _, row in sheet.rows[:3]]
    for leads in (lambda text: os.path.isfile(os.path.join(folder, text)), lambda text: _similar(text, folder, listed)):
        for column in sheet.columns:
            if all(leads(row[column]) for row in rows):
                return column
    return None


def _encoding(sheet):
    """Words for a name that may be there in another encoding."""
    return f" (it is read as {WINDOWS}: if it is not, save it as UTF-8)" if WINDOWS in "".join(sheet.notes) else ""


def _no_header(columns, file=None):
    """Words for a first line that looks like a row."""
    for name in columns:
        if PLAIN.fullmatch(name) or file and name and os.path.isfile(os.path.join(Path(file).parent, name)):
            return f" (the first line that is no comment, #, must name the columns, and it holds '{name}')"
    return ""


PLAIN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
WITH_COMMA = re.compile(r"[-+]?\d*,\d+(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
# The comma, or point, may as well separate thousands.
EITHER = re.compile(r"[-+]?[1-9]\d{0,2}[.,]\d{3}", re.ASCII)
WITH_POINTS = "write all with a decimal point, and none with thousands separators"
# How programs write that there is no number.
NOTHING = {"", "-", "?", "\\n", "na", "n/a", "#n/a", "nan", "none", "null"}


def read_numbers(sheet, column, may_lack=None):
    """The numbers of a column, a list. Raises TableError for a cell that is no number: Python would take 1_000 and nan.

    A column of numbers such as 1,5 is read with decimal commas, and 1,234 refused where none of them tells what it
    means. may_lack: for each row, whether it may be without a number, which is None then.
    """
    where = [f"{sheet.file}, line {line}" for line, _ in sheet.rows]
    texts = [row[column].strip() for _, row in sheet.rows]
    lack = [may and text.lower() in NOTHING for text, may in zip(texts, may_lack or [False] * len(texts), strict=True)]
    for place, text in enumerate(texts):
        if not (lack[place] or PLAIN.fullmatch(text) or WITH_COMMA.fullmatch(text)):
            raise TableError(f"{where[place]}: {column} is {_no_number(text)}")
    _refuse_doubtful_marks([(w, text) for w, text, no in zip(where, texts, lack, strict=True) if not no], column, sheet)
    numbers = [None if lack[place] else float(text.replace(",", ".")) for place, text in enumerate(texts)]
    for place, number in enumerate(numbers):
        if number is not None and not math.isfinite(number):
            raise TableError(f"{where[place]}: {column} is {texts[place]}: it must be finite")
    return numbers


def _refuse_doubtful_marks(found, column, sheet):
    """Raise TableError if a comma or point in numbers may mean two things; else add to the notes which was taken.
    found: [(where it stands, text), ...]
    """

    def two_meanings(where, text):
        return f"{where}: {column} is '{text}', which may mean {text.replace(',', '.')} or {re.sub('[.,]', '', text)}"

    commas = [(where, text) for where, text in found if "," in text]
    points = [(where, text) for where, text in found if "." in text]
    certain = [(where, text) for where, text in commas or points if not EITHER.fullmatch(text)]
    if commas and points:
        where, text = commas[0]
        raise TableError(f"{where}: {column} is '{text}', and '{points[0][1]}' elsewhere: {WITH_POINTS}")
    if commas and certain:
        where, text = certain[0]
        sheet.notes.append(f"note: {where}: {column} has decimal commas: '{text}' is {text.replace(',', '.')}")
    elif commas:
        raise TableError(f"{two_meanings(*commas[0])}: {WITH_POINTS}")
    # A table with other delimiters may come from where a point separates thousands; one with commas less often.
    elif points and not certain:
        if sheet.delimiter != "," and len(points) < len(found):  # as with 950 beside 1.234
            raise TableError(f"{two_meanings(*points[0])}: {WITH_POINTS}")
        where, text = points[0]
        sheet.notes.append(f"note: {where}: {column} is read with decimal points: '{text}' is not "
                           f"{text.replace('.', '')}")


def _no_number(text):
    """Words for a cell that is no number."""
    if re.fullmatch(r"[-+]?(nan|inf|infinity)", text, re.IGNORECASE):
        return f"{text}: it must be finite"
    if text.lower() in NOTHING:
        return f"'{text}', which is not a number: write one, or leave that row out"
    plainly = "write it plainly, such as 1234.5, without units and thousands separators"
    return f"{_shown(text)}, which is not a number{f': {plainly}' if re.search('[0-9]', text) else ''}"


def read_class_names(sheet, column, may_lack=None):
    """The cells of a column as names, a list: text as it stands, numbers too, with accents in one form and no blanks
    around it. may_lack: for each row, whether its cell may be empty; None stands for one that is. Raises TableError.
    """
    names = [_clean_name(row[column]) or None for _, row in sheet.rows]
    for (line, _), name, may in zip(sheet.rows, names, may_lack or [False] * len(names), strict=True):
        if name is None and not may:
            raise TableError(f"{sheet.file}, line {line}: {column} is empty: write a name, or leave that row out")
    return names


# What may stand in the column `split`.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}


def read_splits(sheet):
    """train, val or test for each row, from the column `split`; None for each where there is no such column."""
    named = [column for column in sheet.columns if column.casefold() == "split"]
    if not named:
        for column in sheet.columns:
            texts = {row[column].strip().lower() for _, row in sheet.rows}
            if len(texts) > 1 and texts <= SPLITS.keys():
                sheet.notes.append(f"hint: {sheet.file}: the column '{column}' holds {' and '.join(sorted(texts))}, "
                                   "and is not used: to split by it, rename it to split")
        return [None] * len(sheet.rows)
    if len(named) > 1:
        raise TableError(f"{sheet.file} has the columns {' and '.join(named)}: rename one")
    texts = [row[named[0]] for _, row in sheet.rows]
    for (line, _), text in zip(sheet.rows, texts, strict=True):
        if text.strip().lower() not in SPLITS:
            raise TableError(f"{sheet.file}, line {line}: the split is {_shown(text)}: write train, val or test")
    return [SPLITS[text.strip().lower()] for text in texts]


# ---- the pictures that a column names


def find_pictures(sheet, column="file", folder=None):
    """The path of the file that each row names, a list; names are relative to the `folder`, if one is given and has
    such a file, and to the CSV's own. Where there is no such file, the one is taken that differs in upper and lower
    case, in how accents are stored, in backslashes, in blanks or quotes around it, in blanks as %20, by a missing
    ending, or by the folders before it. Raises TableError if none or several do.

    Adds to the notes what was found so, and which pictures beside those named stand in no row.
    """
    folders, listed = [str(Path(sheet.file).parent)], {}
    if folder is not None:
        _refuse_missing(folder)
        own = [one for one in folders if not os.path.samefile(one, folder)]
        folders = [str(Path(folder)), *own]
    paths, others, absent, doubtful = [], [], [], []
    for line, row in sheet.rows:
        text = row[column]
        exact = [path for path in (os.path.join(one, text) for one in folders) if os.path.isfile(path)]
        alike = [] if exact else next(filter(None, (_similar(text, one, listed) for one in folders)), [])
        if len(alike) > 1:
            raise TableError(f"{sheet.file}, line {line}: {_shown(text)} may be {' or '.join(sorted(alike)[:3])}: "
                             "write the one that is meant, or say by --data where to look first")
        if alike:
            others.append((line, text, alike[0]))
        elif not exact:
            absent.append((line, text))
        elif not os.path.samefile(exact[0], exact[-1]):
            doubtful.append((line, *exact))
        paths.append((exact + alike + [None])[0])
    _refuse_swallowed(sheet, folders)
    if absent:
        line, text = absent[0]
        where, more = f"{sheet.file}, line {line}", f" (and {len(absent) - 1} more are missing)" if absent[1:] else ""
        if not _parts(text):
            raise TableError(f"{where}: the column {column} names no picture: leave that row out{more}")
        close = next(filter(None, (_closest(text, one, listed) for one in folders)), None)
        sought = ", nor ".join(" ".join(os.path.join(one, text).splitlines()) for one in folders)
        close = f"; did you mean {close}?" if close else ""
        way_out = "; --data says where to look first" if folder is None and not close else ""
        raise TableError(f"{where}: no such picture: {sought}{close}{more}{way_out}{_encoding(sheet)}")
    _refuse_mistaken(sheet, column, paths, {line for line, *_ in others})
    if others:
        line, text, path = others[0]
        shortest = min((os.path.relpath(path, one) for one in folders), key=len)
        sheet.notes.append(f"note: {sheet.file}: {_count(len(others), 'picture')} found under another name than in the "
                           f"column {column}: {_shown(text)} (line {line}) is {shortest}")
    if doubtful:
        line, taken, other = doubtful[0]
        sheet.notes.append(f"warning: {sheet.file}: {_count(len(doubtful), 'picture')} in both folders: {taken} is "
                           f"taken, not {other} (line {line})")
    sheet.notes.extend(_unlisted(sheet.file, paths, listed))
    return paths


def _names(folder, listed):
    """What a folder holds: {key: [name, ...]} by whole names, the same by names without ending, and the set of those
    that are folders. listed: what is known already.
    """
    if folder not in listed:
        whole, stems, folders = defaultdict(list), defaultdict(list), set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    whole[_key(entry.name)].append(entry.name)
                    stem, ending = os.path.splitext(_key(entry.name))
                    if ending not in NO_PICTURES:
                        stems[stem].append(entry.name)
                    if entry.is_dir():
                        folders.add(entry.name)
        except OSError:
            pass
        listed[folder] = whole, stems, folders
    return listed[folder]


# Of files beside a picture that have its name, but for the ending.
NO_PICTURES = {".txt", ".xml", ".json", ".csv", ".yaml", ".yml", ".npy", ".md"}
ENDINGS = {".jpeg": ".jpg", ".tiff": ".tif"}


def _key(name):
    """A file's name as it is compared: without case, accents in one form."""
    if re.search("[\ud800-\udfff]", name):  # bytes on the disk that are no UTF-8
        name = os.fsencode(name).decode("cp1252", "replace")
    stem, ending = os.path.splitext(unicodedata.normalize("NFC", name.strip().casefold()))
    return stem + ENDINGS.get(ending, ending)


def _parts(text):
    """The names of folders and file in a path, however it is written."""
    # Also a byte order mark, where two files were joined, a blank without width, and a text's round quotes.
    text = text.strip(" \t\n\xa0\ufeff\u200b").strip("'\"\u2018\u2019\u201c\u201d").replace("\\", "/")
    return [part for part in (part.strip() for part in text.split("/")) if part not in ("", ".")]


def _below(folder, parts, listed):
    """The files below a folder whose path is `parts`, but for case, accents and a missing ending."""

    def inside(folders, part, kind):  # 0: by whole names; 1: by names without ending
        found = []
        for folder in folders:
            names = [".."] if part == ".." else _names(folder, listed)[kind].get(_key(part), [])
            found += [os.path.join(folder, name) for name in ([part] if part in names else names)]
        return found

    folders = [folder]
    for part in parts[:-1]:
        folders = inside(folders, part, 0)
    whole = [path for path in inside(folders, parts[-1], 0) if os.path.isfile(path)]
    return whole or [path for path in inside(folders, parts[-1], 1) if os.path.isfile(path)]


def _similar(text, folder, listed):
    """The files that a cell of the table may mean, the likeliest kind of them alone."""
    if not (parts := _parts(text)):
        return []
    absolute = re.match(r"[\s'\"]*([a-z][a-z\d]*:|/|\\|~)", text, re.IGNORECASE)
    if absolute and os.path.isfile(path := "/" + "/".join(parts)):
        return [path]
    if found := _below(folder, parts, listed):
        return found
    # Relative to the folder above, where the CSV lies in a folder of its own.
    if not absolute and os.path.isfile(path := os.path.normpath(os.path.join(folder, "..", *parts))):
        return [path]
    # Written elsewhere: the longest end of the path that is here. Of a relative one a folder must be left, or the last
    # that is dropped must be this one: a/1.jpg is not 1.jpg.
    for i in range(1, len(parts)):
        here = _key(parts[i - 1]) == _key(os.path.basename(os.path.abspath(folder)))
        if (absolute or here or i < len(parts) - 1) and (found := _below(folder, parts[i:], listed)):
            return found
    # Without the folder that the pictures lie in. Of a path written elsewhere, the longest end; but train/1.jpg is not
    # test/1.jpg.
    for i in range(len(parts) if absolute else 1):
        homes = [name for name in _homes(folder, listed).get(_key(parts[i]), ()) if not (i and name.lower() in SPLITS)]
        if found := [path for name in homes for path in _below(os.path.join(folder, name), parts[i:], listed)]:
            return found
    # As in the address of a web page: %20 is a blank, and ?size=80 belongs to no name.
    plain = unquote(text.partition("?")[0] if "://" in text else text)
    return _similar(plain, folder, listed) if plain != text else []


def _homes(folder, listed):
    """{key of a name, with and without ending: [the folders in `folder` that hold it, ...]}"""
    if (folder, "homes") not in listed:
        homes = defaultdict(list)
        for name in sorted(name for name in _names(folder, listed)[2] if not name.startswith(".")):
            whole, stems, _ = _names(os.path.join(folder, name), listed)
            for key in {*whole, *stems}:
                homes[key].append(name)
        listed[folder, "homes"] = homes
    return listed[folder, "homes"]


def _closest(text, folder, listed):
    """The path below the folder that is most like a cell that names no file, or None."""
    parts, depth = _parts(text), 0
    # As far down as there are such folders.
    while parts[depth] in _names(os.path.join(folder, *parts[:depth]), listed)[2] and depth < len(parts) - 1:
        depth += 1
    _, stems, _ = _names(os.path.join(folder, *parts[:depth]), listed)
    stem = os.path.splitext(_key(parts[depth]))[0]
    # Excel turns 0007 to 7.
    padded = [other for other in stems if other.lstrip("0") == stem.lstrip("0")]
    if close := padded or difflib.get_close_matches(stem, stems, 1, 0.7):
        return os.path.join(*parts[:depth], stems[close[0]][0], *parts[depth + 1 :])
    # Of the same name in another folder.
    homes = _homes(folder, listed).get(_key(parts[-1]))
    return os.path.join(homes[0], parts[-1]) if homes else None


def _refuse_swallowed(sheet, folders):
    """Raise TableError for a row that has swallowed others, where that of a later row has closed its quote."""

    def is_file(cell):
        return any(os.path.isfile(os.path.join(folder, cell)) for folder in folders)

    for line, row in sheet.rows:
        for inside in (more for text in row.values() if "\n" in text for more in text.split("\n")[1:]):
            cells = [cell.strip() for cell in inside.split(sheet.delimiter)]
            named = [cell for cell in cells if cell and is_file(cell)]
            if named and len(cells) > 1:
                raise TableError(f'{sheet.file}, line {line}: a cell in quotes (") holds the row of {named[0]}: close '
                                 "the quote that opens here before the end of its line, or take it away")


def _refuse_mistaken(sheet, column, paths, lines):
    """Raise TableError if names that differ have led to one file; lines: of the rows found under another name."""
    first = {}
    for (line, row), path in zip(sheet.rows, paths, strict=True):
        before, text = first.setdefault(os.path.normpath(path), (line, row[column]))
        if text == row[column] or not lines & {before, line}:
            continue
        if [*map(_key, _parts(text))] != [*map(_key, _parts(row[column]))]:
            raise TableError(f"{sheet.file}, lines {before} and {line}: {_shown(text)} and {_shown(row[column])} both "
                             f"lead to {path}: write the paths as they are here")


def _unlisted(file, paths, listed):
    """A note about the pictures that lie beside those of the table and are in no row, if there are any."""
    known = {os.path.normpath(path) for path in paths}
    endings = {os.path.splitext(path)[1].lower() for path in known} - NO_PICTURES - {""}

    def is_picture(name):
        return os.path.splitext(name)[1].lower() in endings or str(mimetypes.guess_type(name)[0]).startswith("image/")

    rest = []
    for folder in sorted({os.path.dirname(path) for path in known}):
        whole, _, folders = _names(folder or ".", listed)
        names = sorted(name for names in whole.values() for name in names if name[0] != "." and name not in folders)
        rest += [os.path.join(folder, name) for name in names
                 if os.path.join(folder, name) not in known and is_picture(name)]
    some = ", ".join(os.path.relpath(path, Path(file).parent) for path in rest[:3])
    return [f"note: {file}: {_count(len(rest), 'picture')} beside those of the table in no row: {some}"
            f"{' ...' if len(rest) > 3 else ''}"] if rest else []


# ---- the table to learn from

Table = namedtuple("Table", "targets splits values weights notes", defaults=[()])
Table.__doc__ = """targets: the names of the columns to predict. splits: {"train", "val", maybe "test": [(path, row),
...]}, where `row` counts from 0 within the split. values: {split: float64 (rows, targets)}. weights: {split: float64
(rows,)}, of mean 1 over the training split; all 1 without a column of weights. notes: lines for a person. (Of labels:
see `read_labels`.)"""


def read_table(file, targets, split_paths, val_split=0.2, weight_column=None, log=False, file_column="file",
               folder=None):
    """Read a CSV (see `read_rows`) and split it by its column `split`. Returns a Table; raises TableError.

    split_paths: where there is no such column, a function (paths, share, folder) -> (paths for train, paths for val);
        the share is `val_split`.
    """
    samples = {split: [] for split in ("train", "val", "test")}
    sheet = read_csv(file)
    targets = pick_columns(targets, sheet)
    rows = _rows_of(sheet, targets, weight_column, log, False, file_column, folder)
    splits = set_aside([path for path, *_ in rows], [split for _, split, *_ in rows], split_paths, val_split, file)
    for (path, _, numbers, weight), split in zip(rows, splits, strict=True):
        if numbers is not None:
            samples[split].append((path, numbers, weight))
    if without := sum(numbers is None for _, _, numbers, _ in rows):
        sheet.notes.append(f"note: {file}: left out {_count(without, 'row')} of the split test without a number: "
                           "predict.py --labels predicts them")
    for split in ("train", "val"):
        if not samples[split]:
            raise TableError(f"{file} has no rows of the split {split}: name some so in its column 'split'")
    samples = {split: found for split, found in samples.items() if found}
    values = {split: torch.tensor([n for _, n, _ in found], dtype=torch.float64) for split, found in samples.items()}
    weights = {split: torch.tensor([w for _, _, w in found], dtype=torch.float64) for split, found in samples.items()}
    for name, column in zip(targets, values["train"].T, strict=True):
        if (column == column[0]).all():
            raise TableError(f"{file}: {name} is {column[0]:g} in every row of the training split: nothing to learn")
    for split in ("train", "val"):
        if not 0 < weights[split].sum() < math.inf:
            raise TableError(f"{file}: the weights of the split {split} add up to {weights[split].sum():g}")
    weights = {split: w / weights["train"].mean() for split, w in weights.items()}
    splits = {split: [(path, i) for i, (path, _, _) in enumerate(found)] for split, found in samples.items()}
    return Table(targets, splits, values, weights, sheet.notes)


def set_aside(paths, splits, split_paths, val_split, file):
    """The split of each row; where there is no column `split` in the file, those of a share `val_split` are val, which
    `split_paths` chooses: see `read_table`.
    """
    if splits[0] is not None:
        return splits
    aside = set(split_paths(list(dict.fromkeys(paths)), val_split, Path(file).parent)[1])
    return ["val" if path in aside else "train" for path in paths]


def read_rows(file, targets, weight_column=None, log=False, numbers_optional=False, file_column="file", folder=None):
    """[(path, split or None, [number of each target] or None, weight), ...] and notes, from a table (see `read_csv`)
    with a column of pictures (`file_column`, `folder`: see `find_pictures`), numeric columns `targets`, and maybe a
    column `split` of train, val (valid, validation, dev) and test.

    log: the targets will be taken the logarithm of, so they must be above zero. numbers_optional: rows may lack
    numbers: None in place of one, and in place of the list where there is none at all. Without it, rows of the split
    test may, whose list is None then. Raises TableError, with the number of the line in the file, for whatever cannot
    be used.
    """
    sheet = read_csv(file)
    targets = pick_columns(targets, sheet)
    return _rows_of(sheet, targets, weight_column, log, numbers_optional, file_column, folder), sheet.notes


def _rows_of(sheet, targets, weight_column, log, numbers_optional, file_column, folder):
    """The rows of `read_rows`. targets: as the columns are named."""
    file_column = pick_columns([file_column], sheet)[0]
    weight_column = weight_column and pick_columns([weight_column], sheet)[0]
    missing = [name for name in targets if name not in sheet.columns]
    if missing and numbers_optional:
        what = "nothing to score by" if missing == targets else "only the others are scored"
        sheet.notes.append(f"note: {sheet.file} has no column {', '.join(map(repr, missing))}: {what}")
        require_columns(sheet, [file_column])
    else:
        require_columns(sheet, [file_column, *targets, *([weight_column] if weight_column else [])])
    for name in targets:
        if other := [t for t in targets if t.startswith((f"{name}_prediction", f"{name}_q"))]:
            raise TableError(f"{other[0]} could be a column of predictions of {name}: rename it")
    splits = read_splits(sheet)
    may_lack = [numbers_optional or split == "test" for split in splits]
    columns = [[None] * len(splits) if name in missing else read_numbers(sheet, name, may_lack) for name in targets]
    # A score can do with some of a row's numbers, a loss needs all.
    lacking = all if numbers_optional else any
    numbers = [None if lacking(number is None for number in found) else list(found)
               for found in zip(*columns, strict=True)]
    weights = read_numbers(sheet, weight_column) if weight_column else [1.0] * len(splits)
    for (line, _), found, weight in zip(sheet.rows, numbers, weights, strict=True):
        where = f"{sheet.file}, line {line}"
        known = [number for number in found or () if number is not None]
        if log and known and min(known) <= 0:
            raise TableError(f"{where}: {targets[found.index(min(known))]} is {min(known):g}, which has no logarithm: "
                             "leave --log-target out, or that row")
        if weight < 0:
            raise TableError(f"{where}: the weight {weight_column} is {weight:g}: it must be 0 or above")
    paths = find_pictures(sheet, file_column, folder)
    sheet.notes.extend(_repeated(sheet, paths, numbers))
    return list(zip(paths, splits, numbers, weights, strict=True))


def _repeated(sheet, paths, values, what="numbers"):
    """A warning about pictures that stand in several rows, if there are any. values: what each row says of its picture;
    what: the word for that.
    """
    rows = defaultdict(list)
    for (line, _), path, found in zip(sheet.rows, paths, values, strict=True):
        rows[os.path.normpath(path)].append((line, found))
    several = {path: found for path, found in rows.items() if len(found) > 1}
    differ = {path: found for path, found in several.items() if any(n != found[0][1] for _, n in found)}
    if not several:
        return []
    path, found = next(iter((differ or several).items()))
    where = ", ".join(str(line) for line, _ in found[:5])
    way_out = "; several labels of a picture: train_multilabel.py" if differ and what == "classes" else ""
    return [f"warning: {sheet.file}: {_count(len(several), 'picture')} in several rows, {len(differ) or 'none'} with "
            f"different {what}: {os.path.basename(path)} in the lines {where}{way_out}"]


def describe(table):
    """A table of the rows per split, with the smallest, mean, median and largest value of each target; and
    the notes.
    """
    width = max(len(name) for name in [*table.targets, "target"])
    lines = [f"{'target':<{width}}  split   rows     smallest         mean       median      largest"]
    for i, name in enumerate(table.targets):
        for split, values in table.values.items():
            column = values[:, i]
            numbers = (column.min(), column.mean(), column.quantile(0.5), column.max())
            numbers = "".join(f"{v.item():13.6g}" for v in numbers)
            lines.append(f"{name:<{width}}  {split:<5} {len(column):6d}{numbers}")
    return "\n".join([*lines, *table.notes])


def fingerprint(table):
    """What a run learns from, in a few words: which pictures are in train and val, with which numbers and weights."""
    content = [table.targets]
    for split in ("train", "val"):
        content += zip([Path(path).name for path, _ in table.splits[split]], table.values[split].tolist(),
                       table.weights[split].tolist(), strict=True)
    sizes = ", ".join(f"{split} {len(table.splits[split])}" for split in ("train", "val"))
    return f"{sizes}, content {hashlib.sha256(ascii(content).encode()).hexdigest()[:8]}"


def refuse_others(fingerprint, before, labels, file):
    """Raise TableError if the rows of the file `labels` are not those that a run, resumed from the checkpoint `file`, has
    learned from before. fingerprint, before: of the two.
    """
    if fingerprint != before:
        raise TableError(f"{labels} holds other rows ({fingerprint}) than the run was started with ({before}): start a new "
                         f"run from its weights, --weights {shlex.quote(file)}")


def refuse_constant(values, labels):
    """Raise TableError if a target has the same value in all rows (rows, targets) of the validation split."""
    if (values == values[0]).all(0).any():
        raise TableError(f"{labels}: a target is the same in all val rows, so there is no val_r2 to monitor")


# ---- the table to learn classes from

Classes = namedtuple("Classes", "classes splits ignored notes")
Classes.__doc__ = """What class folders would give, in their order. classes: sorted names. splits: {"train", "val",
maybe "test": [(path, label), ...]}, where `label` is the place of the class in that list. ignored: {}. notes: lines for
a person, also about what is not used."""


def read_classes(file, target, split_paths, val_split=0.2, file_column="file", folder=None):
    """Read a CSV (see `read_class_rows`) whose column `target` names the classes of pictures: a Classes. A picture
    counts once in a class of a split, in however many rows it stands. Raises TableError.

    split_paths: where there is no column `split`, or no row of val, a function (paths, share, folder) -> (paths for
        train, paths for val), called for each class; the share is `val_split`, and the folder that of the pictures.
    """
    sheet = read_csv(file)
    rows = _class_rows(sheet, target, file_column, folder)
    lines = defaultdict(lambda: defaultdict(dict))  # {split: {class: {path: line}}}
    spelled = {}
    for (line, _), (path, split, name) in zip(sheet.rows, rows, strict=True):
        if name is not None:
            path = spelled.setdefault(os.path.normpath(path), path)
            lines[split or "train"][name].setdefault(path, line)
    if without := sum(name is None for _, _, name in rows):
        sheet.notes.append(f"note: {file}: left out {_count(without, 'row')} of the split test without a class: "
                           "predict.py --labels predicts them")
    classes = sorted(lines["train"])
    _refuse_no_classes(file, target, lines)
    root = Path(file).parent if folder is None else folder
    paths = {split: {name: sorted(found, key=lambda path: _in_folders(path, root)) for name, found in of_split.items()}
             for split, of_split in lines.items()}
    if "val" not in paths:
        _refuse_single_pictures(file, target, lines["train"])
        halves = {name: split_paths(found, val_split, root) for name, found in paths["train"].items()}
        paths |= {split: {name: half[i] for name, half in halves.items()} for i, split in enumerate(("train", "val"))}
    splits = {split: [(path, label) for label, name in enumerate(classes) for path in paths[split].get(name, [])]
              for split in ("train", "val", "test") if split in paths}
    sheet.notes.extend(_class_notes(file, target, classes, paths))
    return Classes(classes, splits, {}, sheet.notes)


def read_class_rows(file, target, file_column="file", folder=None, classes_optional=False, column_optional=False):
    """[(path, split or None, name of the class or None), ...] and notes, from a table (see `read_csv`) with a column of
    pictures (`file_column`, `folder`: see `find_pictures`), one of names, `target`, and maybe a column `split` (see
    `read_rows`). Raises TableError.

    classes_optional: cells of that column may be empty. Without it, those of rows of the split test may.
    column_optional: there may be no such column, and `target` may be None.
    """
    sheet = read_csv(file)
    return _class_rows(sheet, target, file_column, folder, classes_optional, column_optional), sheet.notes


def _class_rows(sheet, target, file_column, folder, classes_optional=False, column_optional=False):
    """The rows of `read_class_rows`."""
    file_column, target = pick_columns([file_column], sheet)[0], target and pick_columns([target], sheet)[0]
    there = target in sheet.columns
    if target and not there and column_optional:
        sheet.notes.append(f"note: {sheet.file} has no column '{target}': nothing to score by")
    require_columns(sheet, [file_column] if column_optional else [file_column, target])
    splits = read_splits(sheet)
    may_lack = [classes_optional or split == "test" for split in splits]
    names = read_class_names(sheet, target, may_lack) if there else [None] * len(splits)
    paths = find_pictures(sheet, file_column, folder)
    sheet.notes.extend(_repeated(sheet, paths, names, "classes"))
    return list(zip(paths, splits, names, strict=True))


def _in_folders(path, root):
    """What sorts paths as the pictures of class folders below `root` are sorted: those in a folder before those further
    down.
    """
    *folders, name = Path(os.path.relpath(path, root)).parts
    return [(1, unicodedata.normalize("NFC", part), part) for part in folders] + [
        (0, unicodedata.normalize("NFC", name), name)]


def _refuse_no_classes(file, target, lines):
    """Raise TableError if what the rows name are no classes to learn. lines: {split: {class: {path: line}}}."""
    if not (train := lines["train"]):
        raise TableError(f"{file} has no rows of the split train: name some so in its column 'split'")
    if len(train) == 1:
        raise TableError(f"{file}: {target} is {_shown(*train)} in every row of the training split: a classifier needs "
                         "two classes or more")
    everywhere = Counter(name for of_split in lines.values() for name, found in of_split.items() for _ in found)
    if max(everywhere.values()) == 1:
        raise TableError(f"{file}: the column {target} holds another name in each of its {len(everywhere)} rows: a "
                         "class needs several pictures; if the classes stand in another column, name that by --target"
                         f"{_as_numbers(everywhere)}")
    for split in ("val", "test"):
        for name, found in lines.get(split, {}).items():
            if name not in train:
                raise TableError(f"{file}, line {min(found.values())}: a row of the split {split} has the class "
                                 f"{_shown(name)}, which no row of train has: put pictures of it into train, or leave "
                                 f"that row out{_as_numbers(everywhere)}")


def _refuse_single_pictures(file, target, train):
    """Raise TableError for a class of one picture, which cannot be in train and in val. train: {class: {path: line}}"""
    single = [(min(found.values()), name) for name, found in train.items() if len(found) == 1]
    if single:
        line, name = min(single)
        more = f" (and of {len(single) - 1} more of the {len(train)} classes)" if single[1:] else ""
        raise TableError(f"{file}, line {line}: this is the only picture of the {target} {_shown(name)}{more}, so it "
                         "cannot be in train and in val: add a second one, leave that row out, or say in a column "
                         f"'split' which rows are val{_as_numbers(train)}")


def _as_numbers(names):
    """Words for names that are all numbers."""
    numbers = all(PLAIN.fullmatch(name) or WITH_COMMA.fullmatch(name) for name in names)
    return "; if these are numbers to predict: train_regressor.py" if numbers else ""


def _class_notes(file, target, classes, paths):
    """Lines about classes that are not all scored, and names that may not be meant as they stand."""
    notes = []
    for split in paths:
        if lacking := [name for name in classes if not paths[split].get(name)]:
            notes.append(f"note: {file}: no row of the split {split} has the {target} {_some(lacking)}: trained, but "
                         "not scored")
    notes.extend(_doubtful_names(file, classes, "class", "classes", "leave those rows out"))
    measured = _as_numbers(classes) and [name for name in classes if not float(name.replace(",", ".")).is_integer()]
    if measured:
        notes.append(f"warning: {file}: {target} holds numbers such as {measured[0]}, taken as the names of "
                     f"{len(classes)} classes: train_regressor.py predicts numbers")
    return notes


def _doubtful_names(file, names, kind, kinds, way_out):
    """Warnings about names that may be meant as one, and about some that may mean nothing. kind, kinds: words for what
    has them. way_out: what to do with a name of nothing.
    """
    notes, groups = [], defaultdict(list)
    for name in names:
        groups[_as_meant(name)].append(name)
    if alike := [" and ".join(map(_shown, found)) for found in groups.values() if len(found) > 1]:
        more = f" and {len(alike) - 3} more such" if alike[3:] else ""
        notes.append(f"warning: {file}: {kinds} of their own, since text counts as it stands: {'; '.join(alike[:3])}"
                     f"{more}: write them alike if they are one")
    if nothing := [name for name in names if name.lower() in NOTHING]:
        notes.append(f"warning: {file}: {_some(nothing)} is taken as the name of a {kind}: {way_out} if it means that "
                     "there is none")
    return notes


def _as_meant(name):
    """The same for names that people and programs take for one: cat and Cat, 1 and 01 and 1.0, a b and a_b."""
    if PLAIN.fullmatch(name):
        return float(name)
    text = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
    return re.sub(r"(?<!\d)0+(?=\d)", "", "".join(letter for letter in text if letter.isprintable()))


def _some(names):
    return ", ".join(map(_shown, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "")


# ---- standardizing, and back


def fit_scale(values, log=False):
    """What `standardize` needs: {"mean", "std" of each target, "log"}, from the training values (rows, targets). Raises
    TableError for numbers that float64 cannot square or tell apart.
    """
    values = values.log() if log else values
    mean, std = values.mean(0), values.std(0, correction=0)
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise TableError(f"the targets have mean {mean.tolist()} and standard deviation {std.tolist()}: rescale them")
    return {"mean": mean.tolist(), "std": std.tolist(), "log": log}


def baselines(values):
    """What to compare a model with: {"training mean", "training median"}, one number for each target."""
    return {"training mean": values.mean(0).tolist(), "training median": values.quantile(0.5, dim=0).tolist()}


def output_names(targets, log=False, quantiles=None):
    """What each output of the network stands for: `price`, `log price`, or `price q0.1` and so on."""
    names = [f"log {name}" if log else name for name in targets]
    return [f"{name} q{q:g}" for name in names for q in quantiles] if quantiles else names


def standardize(values, scale):
    """Values (rows, targets) in their own units -> mean 0 and standard deviation 1 over the training split. float64."""
    mean, std = (torch.tensor(scale[k], dtype=torch.float64) for k in ("mean", "std"))
    found = ((values.log() if scale["log"] else values) - mean) / std
    if not found.float().isfinite().all():
        raise TableError(f"a target is {found.abs().max():g} standard deviations from the training split's mean")
    return found


def tensors(table, split, scale, device="cpu"):
    """What a network learns from a split: the standardized targets (rows, targets) and the weights (rows,), in float32 on
    the device.
    """
    targets = standardize(table.values[split], scale)
    return targets.float().to(device), table.weights[split].float().to(device)


def to_own_units(outputs, scale, quantiles=None):
    """The way back from `standardize`, to float64 on the CPU: outputs (rows, targets) -> (predictions (rows, targets),
    None). With quantiles, a list that holds 0.5: outputs (rows, targets, quantiles) -> (the medians, all of them).
    """
    mean, std = (torch.tensor(scale[k], dtype=torch.float64) for k in ("mean", "std"))
    if quantiles:
        mean, std = mean[:, None], std[:, None]
    values = outputs.cpu().double() * std + mean
    values = values.exp() if scale["log"] else values
    if not quantiles:
        return values, None
    # Sorted, so that they do not cross (Chernozhukov et al., "Quantile and Probability Curves Without Crossing", 2010).
    values = values.sort(-1).values
    return values[..., quantiles.index(0.5)], values


def prediction_rows(files, targets, predictions, quantiles=None, levels=(), truth=None):
    """[{"file", then of each target its true value (given `truth`), `<target>_prediction`, `<target>_q0.1` and so on},
    ...] for a CSV. predictions, truth: (N, targets), nan where the truth is not known: an empty cell; quantiles: (N,
    targets, levels).
    """
    rows = []
    for i, file in enumerate(files):
        row = {"file": file}
        for t, name in enumerate(targets):
            if truth is not None:
                row[name] = "" if truth[i, t].isnan() else truth[i, t].item()
            row[f"{name}_prediction"] = predictions[i, t].item()
            if quantiles is not None:
                row |= {f"{name}_q{q:g}": quantiles[i, t, k].item() for k, q in enumerate(levels)}
        rows.append(row)
    return rows


# ---- labels, of which a picture may have any number


def read_labels(file, targets, split_paths, val_split=0.2, separator=None, file_column="file", folder=None):
    """A Table of labels, whose `targets` are their names. Its values are 1, 0, or nan where it is not known; its
    weights (rows, labels) are 0 there, and the same for all known cells of a split, so that their mean is 1. Raises
    TableError.

    targets: columns of 0, 1 or nothing, a label each; with a `separator`, one column of names with that between them,
        where an empty cell is a picture without a label. Names are learned from the training split.
    split_paths, val_split: see `read_table`. file_column, folder: see `find_pictures`.
    """
    sheet = read_csv(file)
    targets, file_column = pick_columns(targets, sheet), pick_columns([file_column], sheet)[0]
    require_columns(sheet, [file_column, *targets])
    if separator and len(targets) > 1:
        raise TableError(f"{file}: a separator is for one column of names, and {len(targets)} are named: "
                         f"{', '.join(targets)}")
    paths = find_pictures(sheet, file_column, folder)
    splits = set_aside(paths, read_splits(sheet), split_paths, val_split, file)
    if separator:
        names = read_names(sheet, targets[0], separator)
        of_training = [found for found, split in zip(names, splits, strict=True) if split == "train"]
        labels = sorted({name for found in of_training for name in found})
        _refuse_new_names(sheet, targets[0], names, labels, separator)
        cells = _cells_of(names, labels, splits)
    else:
        labels = targets
        cells = _by_row(sheet, [read_zeros_and_ones(sheet, name) for name in targets])
    sheet.notes.extend(_repeated(sheet, paths, cells, "labels"))
    sheet.notes.extend(_doubtful_names(file, labels, "label", "labels", "take it out of the cells"))
    samples, unknown = {split: [] for split in ("train", "val", "test")}, Counter()
    for path, split, row in zip(paths, splits, cells, strict=True):
        if all(cell is None for cell in row):
            unknown[split] += 1
        else:
            samples[split].append((path, row))
    for split, count in unknown.items():
        sheet.notes.append(f"note: {file}: left out {_count(count, 'row')} of the split {split} in which no label is "
                           f"known{': predict.py --labels predicts them' if split == 'test' else ''}")
    for split in ("train", "val"):
        if not samples[split]:
            raise TableError(f"{file} has no rows of the split {split} with a known label: name some so in its column "
                             "'split', and fill them in")
    samples = {split: found for split, found in samples.items() if found}
    values = {split: torch.tensor([[math.nan if cell is None else cell for cell in row] for _, row in found],
                                  dtype=torch.float64) for split, found in samples.items()}
    for name, column in zip(labels, values["train"].T, strict=True):
        for value in (1, 0):
            if not (column == value).any():
                raise TableError(f"{file}: the label {name} is {value} in no row of the training split: nothing to "
                                 f"learn, leave it out{' of the cells' if separator else ' of --target'}")
    weights = {split: ~found.isnan() / (~found.isnan()).double().mean() for split, found in values.items()}
    splits = {split: [(path, i) for i, (path, _) in enumerate(found)] for split, found in samples.items()}
    return Table(labels, splits, values, weights, sheet.notes)


def read_label_rows(file, labels, targets, separator=None, file_column="file", folder=None):
    """[(path, split or None, [1.0, 0.0, or None where it is not known, for each label]), ...] and notes, from a table
    as `read_labels` takes it, for a model that knows these labels. Columns may be absent; names that are not among the
    labels are told in the notes. Raises TableError.
    """
    sheet = read_csv(file)
    targets, file_column = pick_columns(targets, sheet), pick_columns([file_column], sheet)[0]
    require_columns(sheet, [file_column])
    if missing := [name for name in targets if name not in sheet.columns]:
        sheet.notes.append(f"note: {file} has no column {', '.join(map(repr, missing))}: nothing to score "
                           f"{'them' if len(missing) > 1 else 'it'} by")
    splits, nothing = read_splits(sheet), [None] * len(sheet.rows)
    if not separator:
        cells = _by_row(sheet, [nothing if name in missing else read_zeros_and_ones(sheet, name) for name in targets])
    else:
        names = [[]] * len(sheet.rows) if missing else read_names(sheet, targets[0], separator)
        if strange := sorted({name for found in names for name in found} - set(labels)):
            sheet.notes.append(f"note: {file}: {_count(len(strange), 'label')} that the model does not know, not "
                               f"scored: {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}")
        cells = _cells_of(names, labels, splits)
    return list(zip(find_pictures(sheet, file_column, folder), splits, cells, strict=True)), sheet.notes


def read_zeros_and_ones(sheet, column):
    """1.0, 0.0, or None (an empty cell: not known) for each row, from a column of 0 and 1. Raises TableError."""
    found = []
    for line, row in sheet.rows:
        text = row[column].strip()
        value = re.fullmatch(r"([01])([.,]0*)?", text)  # 1.0 is how a program writes it where cells are empty
        if text and not value:
            # A word that is no yes or no in itself may be the name of a label.
            names = re.search(r"[^\W\d_]", text) and text.casefold() not in NOTHING | YES_OR_NO
            names = "; for a column of names say --separator" if names else ""
            raise TableError(f"{sheet.file}, line {line}: {column} is {_shown(text)}: write 1, 0, or nothing where it "
                             f"is not known{names}")
        found.append(float(value[1]) if value else None)
    return found


YES_OR_NO = {"true", "false", "yes", "no", "t", "f", "y", "n", "x"}


def read_names(sheet, column, separator):
    """The names in each row of a column, in lists: letters with accents in one form, without blanks around them."""
    found = []
    for line, row in sheet.rows:
        # Several blanks, or a line break, separate like one blank.
        parts = row[column].split(None if separator == " " else separator)
        names = [name for name in map(_clean_name, parts) if name]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise TableError(f"{sheet.file}, line {line}: the label {_shown(twice[0])} stands there twice in {column}")
        # What is left of another separator, or of a list in brackets.
        if strange := [name for name in names if name[0] in "[{" or name[-1] in ",;|]}"]:
            raise TableError(f"{sheet.file}, line {line}: the label {_shown(strange[0])} in {column} holds more than a "
                             f"name: write names alone, with --separator's {separator!r} between them")
        found.append(names)
    if _separates_nothing(found) and any(found):
        place = max(range(len(found)), key=lambda i: len(sheet.rows[i][1][column]))
        line, row = sheet.rows[place]
        sheet.notes.append(f"hint: {sheet.file}: the separator {separator!r} separates nothing in {column}: each cell "
                           f"is one label, such as {_shown(row[column])} (line {line})")
    return found


def _separates_nothing(names):
    return all(len(found) < 2 for found in names)


def _refuse_new_names(sheet, column, names, labels, separator):
    """Raise TableError for a name that no row of the training split has: there is nothing to learn it from."""
    for (line, _), found in zip(sheet.rows, names, strict=True):
        if strange := [name for name in found if name not in labels]:
            close = difflib.get_close_matches(strange[0], labels, 1)
            meant = f"; did you mean {_shown(close[0])}?" if close else ""
            if _separates_nothing(names):
                meant = f" (the separator {separator!r} separates nothing there)"
            raise TableError(f"{sheet.file}, line {line}: the label {_shown(strange[0])} in {column} is in no row of "
                             f"the training split{meant}: take it away, or give training some in a column split")


def _cells_of(names, labels, splits):
    """[1.0 or 0.0 for each label] of each row, from the names in it. Where no row of a split has any, they are not
    known there: None.
    """
    told = {split for split, found in zip(splits, names, strict=True) if found}
    return [[float(label in found) if split in told else None for label in labels]
            for split, found in zip(splits, names, strict=True)]


def _by_row(sheet, columns):
    """The cells of each row, in lists, from those of each column."""
    return [[column[i] for column in columns] for i in range(len(sheet.rows))]


def describe_labels(table, most=20):
    """A table of how often each label is 1, 0 and not known in each split; and the notes."""
    width = max(map(len, [*table.targets[:most], "pictures"]))
    head = "".join(f"{f'{split}: 1':>12}{'0':>8}{'unknown':>9}" for split in table.splits)
    lines = [f"{'label':<{width}}{head}"]
    for name, *columns in list(zip(table.targets, *(found.T for found in table.values.values()), strict=True))[:most]:
        counts = [((column == 1).sum(), (column == 0).sum(), column.isnan().sum()) for column in columns]
        lines.append(f"{name:<{width}}" + "".join(f"{ones:12d}{zeros:8d}{rest:9d}" for ones, zeros, rest in counts))
    if len(table.targets) > most:
        lines.append(f"... and {len(table.targets) - most} more labels")
    counts = "".join(f"{len(found):12d}{'':17}" for found in table.splits.values())
    lines.append(f"{'pictures':<{width}}{counts}".rstrip())
    there = (table.values["val"] == 1).any(0).tolist()
    if absent := [name for name, occurs in zip(table.targets, there, strict=True) if not occurs]:
        lines.append(f"note: no picture of val has {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}: no "
                     "score there, and the threshold stays 0.5")
    return "\n".join([*lines, *table.notes])


def label_tensors(table, split, device="cpu"):
    """What a network learns from a split of labels, in float32 on the device: 1 and 0 (rows, labels), and the weights
    of these cells: 0 where a label is not known, and its 0 or 1 means nothing.
    """
    return table.values[split].nan_to_num(0).float().to(device), table.weights[split].float().to(device)


def refuse_no_ones(values, labels, monitor):
    """Raise TableError if no label (rows, labels) is 1 in any row of the validation split. labels: the file."""
    if not (values == 1).any():
        raise TableError(f"{labels}: no label is 1 in any val row, so there is no {monitor} to monitor: --monitor "
                         "val_loss")
