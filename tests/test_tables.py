import codecs
import gzip
import math
import os
import random
import re
import unicodedata
import zipfile

import pytest
import torch

import data
import tables
from conftest import draw
from tables import TableError


def write(tmp_path, text, pictures=6):
    for i in range(pictures):
        draw(tmp_path / f"images/{i}.png", "cat", i)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    return tmp_path / "labels.csv"


GOOD = """file,price,area,split,much
images/0.png,10,1.5,train,1
images/1.png,20,2.5,train,3
images/2.png,60,3.5, Train,2
images/3.png,1e2,4.5,valid,1
images/4.png,-5,5.5,test,0
"""


def test_read_table(tmp_path):
    table = tables.read_table(write(tmp_path, GOOD), ["area", "price"], data.split_by_hash, weight_column="much")
    assert table.targets == ["area", "price"]
    assert table.splits["train"] == [(str(tmp_path / f"images/{i}.png"), i) for i in range(3)]
    assert table.splits["val"] == [(str(tmp_path / "images/3.png"), 0)]
    assert table.values["train"].tolist() == [[1.5, 10], [2.5, 20], [3.5, 60]]
    assert table.values["test"].tolist() == [[5.5, -5]] and table.values["test"].dtype == torch.float64
    assert table.weights["train"].tolist() == [0.5, 1.5, 1.0]  # of mean 1
    assert table.weights["val"].tolist() == [0.5]
    assert tables.fingerprint(table) == "train 3, val 1, content 719e519e"  # checkpoints hold it: not to be changed
    text = tables.describe(table)
    row = next(line.split() for line in text.splitlines() if line.startswith("price"))
    assert row == ["price", "train", "3", "10", "30", "20", "60"]


def test_without_a_split_column_some_are_set_aside_and_a_byte_order_mark_is_no_name(tmp_path):
    text = "\ufefffile,price\n" + "".join(f"images/{i}.png,{i}\n" for i in range(6))
    one, two = (tables.read_table(write(tmp_path, text), ["price"], data.split_by_hash, 0.34) for _ in range(2))
    assert one.splits == two.splits and set(one.splits) == {"train", "val"}
    assert (len(one.splits["train"]), len(one.splits["val"])) == (4, 2)
    for split, found in one.splits.items():
        for path, row in found:
            assert path.endswith(f"/{one.values[split][row, 0]:.0f}.png")
    assert tables.fingerprint(one) == tables.fingerprint(two)
    assert tables.fingerprint(one) != tables.fingerprint(one._replace(targets=["cost"]))


@pytest.mark.parametrize("change, words", [
    (lambda t: None, "cannot read the labels .*labels.csv .No such file"),
    (lambda t: "", "labels.csv is empty"),
    (lambda t: "\n,,\n", "labels.csv is empty"),
    (lambda t: t.splitlines()[0], "holds no rows below its header"),
    (lambda t: t.replace("price", "cost"), "has no column 'price': there are file, cost, area, split, much"),
    (lambda t: t.replace("file", "path"), "has no column 'file'"),
    (lambda t: t.replace("area", "price"), "line 1: the column 'price' stands there twice: rename one"),
    (lambda t: t.replace("20", "n/a"), "labels.csv, line 3: price is 'n/a', which is not a number"),
    (lambda t: t.replace("20", ""), "line 3: price is '', which is not a number"),
    (lambda t: t.replace("60", "nan"), "line 4: price is nan: it must be finite"),
    (lambda t: t.replace("60", "-inf"), "line 4: price is -inf: it must be finite"),
    (lambda t: t + "images/5.png\n", "line 7: 1 cell, and the header .line 1. has 5: every row needs as many"),
    (lambda t: t + "images/5.png,7,7,,7\n", "line 7: the split is '': write train, val or test"),
    (lambda t: t.replace("images/1", "images/x").replace("images/4", "y"),
     r"line 3: no such picture: .*images/x.png \(and 1 more are missing\)"),
    (lambda t: t.replace("images/1.png", ""), "line 3: the column file names no picture: leave that row out"),
    (lambda t: t.replace("valid", "test"), "has no rows of the split val"),
    (lambda t: t.replace("rain", "est"), "the split is ' Test'|has no rows of the split train"),
    (lambda t: t.replace(",valid", ",fold 3"), "line 5: the split is 'fold 3': write train, val or test"),
    (lambda t: t.replace("valid,1", "valid,0"), "the weights of the split val add up to 0"),
    (lambda t: t.replace(",1\n", ",1e308\n").replace(",3\n", ",1e308\n"), "the weights of the split train add up to inf"),
    (lambda t: t.replace("60,", "6,000,"), "line 4: 6 cells, and the header .line 1. has 5: a number such as 1,234 needs"),
    (lambda t: t.replace(",3\n", ",3,\n"), "line 3: 6 cells, and the header .line 1. has 5: take away what ends the row"),
    (lambda t: t.replace("20", "10").replace("60", "10"), "price is 10 in every row of the training split"),
    (lambda t: t.replace("valid,1", "valid,-1"), "line 5: the weight much is -1: it must be 0 or above"),
    (lambda t: t.replace(",3\n", ",0\n").replace(",2\n", ",0\n").replace("train,1", "train,0"), "the weights of the split train add up to 0"),
])
def test_tables_that_cannot_be_used(tmp_path, change, words):
    file = write(tmp_path, GOOD)
    text = change(GOOD)
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(TableError, match=words) as error:
        tables.read_table(file, ["price"], data.split_by_hash, weight_column="much")
    assert "\n" not in str(error.value)


def test_lines_wholly_in_quotes_and_rows_with_numbers_of_their_own(tmp_path):
    for text, words in (('file,price\n"images/0.png,1"\n', "line 2: 1 cell, .*: take away the quotes around the line"),
                        ("file,price\n1,images/0.png,1\n", "line 2: 3 cells, .*a column of row numbers needs a name in the header")):
        with pytest.raises(TableError, match=words):
            tables.read_csv(write(tmp_path, text))


def test_a_forgotten_name_of_the_table(tmp_path):
    pictures(tmp_path, "prices.csv", "a.tsv", "notes.txt")
    with pytest.raises(TableError, match="cannot read the labels .*labels.csv .No such .*: beside it there is a.tsv, prices.csv$"):
        tables.read_csv(tmp_path / "labels.csv")
    pictures(tmp_path, "b.csv", "c.csv", "labels_2.csv")  # the closest are shown
    with pytest.raises(TableError, match="beside it there is .*labels_2.csv"):
        tables.read_csv(tmp_path / "labels.csv")


def test_no_logarithm_and_targets_named_twice(tmp_path):
    file = write(tmp_path, GOOD)
    with pytest.raises(TableError, match="line 6: price is -5, which has no logarithm: leave --log-target out"):
        tables.read_table(file, ["area", "price"], data.split_by_hash, log=True)
    file.write_text(file.read_text().replace("area", "price_prediction"))
    with pytest.raises(TableError, match="price_prediction could be a column of predictions of price: rename it"):
        tables.read_table(file, ["price", "price_prediction"], data.split_by_hash)
    with pytest.raises(TableError, match="the target price is named twice"):
        tables.read_table(file, ["price", "price"], data.split_by_hash)


def test_tables_as_spreadsheets_save_them(tmp_path):
    """Empty columns and rows at the end, spaces in the header, absolute paths."""
    rows = "".join(f"{tmp_path}/images/{i}.png,{i},,\n" for i in range(6))
    between = rows.replace(".png,", ".png,,,")
    for text in (f"file, price ,,\n{rows},,,\n,,,\n", f"file,,, price ,,\n{between}"):
        table = tables.read_table(write(tmp_path, text), ["price"], data.split_by_hash)
        assert sorted(v for values in table.values.values() for v in values.flatten().tolist()) == [0, 1, 2, 3, 4, 5]



def found(file, *targets, **options):
    """{name of the picture: (split, numbers, weight)}, and the notes, of the table."""
    rows, notes = tables.read_rows(file, targets or ["price"], **options)
    assert all(re.match("(note|warning): ", note) and "\n" not in note for note in notes), notes
    return {os.path.basename(path): more for path, *more in rows}, notes


def pictures(tmp_path, *names):
    """Empty files: none of these tests decodes any."""
    for name in names or [f"images/{i}.png" for i in range(5)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "labels.csv"


QUOTED = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in GOOD.splitlines())
NO_NOTE, SEMICOLONS, TABS = [], ["read with semicolons between the columns"], ["read with tabs between the columns"]


@pytest.mark.parametrize("content, said", [
    (GOOD, NO_NOTE), (GOOD.rstrip(), NO_NOTE), (QUOTED, NO_NOTE), (QUOTED.replace(",", ' , '), NO_NOTE),
    (GOOD.replace("\n", "\r\n"), NO_NOTE), (GOOD.replace("\n", "\r"), NO_NOTE), (GOOD.replace("\n", "\r\r\n"), NO_NOTE),
    (GOOD.replace("\n", "\n\n"), NO_NOTE), ("\n \n" + GOOD, NO_NOTE), (",,,,\n" + GOOD, NO_NOTE),
    ("sep=,\n" + GOOD, NO_NOTE), ('"sep=,",,,,\n' + GOOD, NO_NOTE), ("\ufeffSEP=;\n" + GOOD.replace(",", ";"), SEMICOLONS),
    (GOOD.replace(",", ";"), SEMICOLONS), (GOOD.replace(",", "\t"), TABS), (GOOD.replace(",", "|"), ["with bars |"]),
    ("sep=:\n" + GOOD.replace(",", ":"), ["read with ':' between the columns"]),
    (GOOD.replace("file,", "file,a;b|c,").replace("png,", "png,x|y,"), NO_NOTE),  # three of them in the header
    (GOOD.replace(",", ";").replace("area", "area, m2"), SEMICOLONS),
    (GOOD.replace(",", ";").replace("area", "length, width, height, depth, age, weight"), SEMICOLONS),  # the rows tell
    ("# made by hand, in May\n\n#\n" + GOOD, ["passed over 2 comments above the header .line 1."]),
    (GOOD + ",,,,\n ,,\n", ["passed over 2 rows of empty cells .line 7."]),
    (re.sub("(?m)^", "0,", GOOD.strip()).replace("0,file", ",file"), NO_NOTE),  # the index that pandas writes
    (re.sub("(?m)^", "0,", GOOD.strip()).replace("0,file", "#,file"), NO_NOTE),
    (GOOD.replace("file,price", 'file, "price" '), NO_NOTE),
    (GOOD.replace("file,", 'file,"a ""note""\nof mine",').replace("png,", 'png,"one, ""two""\n\nthree",'), NO_NOTE),
    (GOOD.replace("file,", "file,disk,").replace("png,", 'png,5" disk,'), NO_NOTE),
    (GOOD.replace(".png", ".png ").replace("/", "\\"), ["5 pictures found .* the column file: 'images.0.png ' .line 2. is"]),
    (codecs.BOM_UTF8 + GOOD.encode(), NO_NOTE),
    (GOOD.replace(",", "\t").encode("utf-16"), TABS),
    (codecs.BOM_UTF16_BE + GOOD.encode("utf-16-be"), NO_NOTE), (GOOD.encode("utf-32"), NO_NOTE),
    (GOOD.replace("area", "Größe").encode("cp1252"), ["line 1 is no UTF-8: the file is read as Windows-1252"]),
])
def test_tables_as_programs_write_them(tmp_path, content, said):
    file = pictures(tmp_path)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, notes = found(file, "price", weight_column="much")
    assert rows == {"0.png": ["train", [10], 1], "1.png": ["train", [20], 3], "2.png": ["train", [60], 2],
                    "3.png": ["val", [100], 1], "4.png": ["test", [-5], 0]}
    assert len(notes) == len(said) and all(map(re.search, said, notes)), notes


def test_file_names_beyond_ascii_whatever_the_encoding(tmp_path):
    names = ["straße.png", "été.png", unicodedata.normalize("NFD", "Käfer.png")]
    file = pictures(tmp_path, *names)
    raw = os.fsdecode("Fuß.png".encode("cp1252"))
    try:
        pictures(tmp_path, raw)
        names.append(raw)
    except OSError:  # macOS stores UTF-8 alone
        pass
    text = "file,price\n" + "".join(f"{name},{i}\n" for i, name in enumerate(["straße.png", "été.png", "Käfer.png", "Fuß.png"][:len(names)]))
    for encoding in ("utf-8", "cp1252", "utf-16"):
        file.write_bytes(text.encode(encoding))
        rows, _ = found(file)
        assert [rows[name][1] for name in names] == [[i] for i in range(len(names))], encoding


@pytest.mark.parametrize("content, words", [
    # An open quote swallows what is below; the row that the next one closes is no part of a cell.
    (GOOD.replace("file,", "file,note,").replace("png,", "png,x,").replace("1.png,x", '1.png,"5 inch'), "line 3: a quote .* is not closed"),
    (GOOD.replace("file,", "file,note,").replace("png,", "png,x,").replace("1.png,x", '1.png,"5 inch').replace("3.png,x", '3.png,5 inch"'),
     'line 3: a cell in quotes .* holds the row of images/2.png: close the quote'),
    (GOOD.replace("file,", "file,note,").replace("png,", "png,x,").replace("1.png,x", '1.png,"5" disk'),
     "line 3: text behind a closing quote"),
    (GOOD.replace("file,", "file,note,").replace("png,", "png,x,").replace("1.png,x", '1.png,"5 inch').replace("3.png,x", '3.png,"5" disk'),
     "line 5: text behind a closing quote .*it opens in line 3"),
    (GOOD.replace("area,", '"area,').replace("2.5", '2.5"'), "line 1: a quote .* in the header is closed in a later line"),
    # The line is where the row begins, below cells of several lines.
    (GOOD.replace("file,", "file,note,").replace("png,", 'png,"a\nb",').replace("60", "sixty"), "line 6: price is 'sixty', which is not a number$"),
    (GOOD.replace("file,", "file,note,").replace("png,", 'png,"a\r\nb",').replace("60,", ""), "line 6: 5 cells, and the header .line 1. has 6"),
    (GOOD.replace("60", '"6\n0"'), r"line 4: price is '6\\n0', which is not a number: write it plainly"),
    ("\n".join(f'"{line}"' for line in GOOD.splitlines()), "line 1: one column, named 'file,price.*take away the quotes"),
    (GOOD.replace(",", ";", 1), "line 2: 5 cells, and the header .line 1. has 4"),
    ("file;price, EUR\nimages/0.png;1,5\n", "can be read with commas or semicolons between .*: say which in a first line, such as sep=;"),
    ("sep=;\n" + GOOD, "line 2: one column, named 'file,price"),
    ("Prices of 2024\n" + GOOD, "line 2: 5 cells, and the header .line 1. has 1"),
    (GOOD.split("\n", 1)[1], "has no column 'file', 'price': there .* .the first line .* must name the columns, and it holds 'images/0.png'"),
    ("# " + GOOD, "the first line that is no comment, #, must name the columns"),
    ("images/0.png,1,1,train\n", "line 1: the column '1' stands there twice: rename one .the first line"),
    (GOOD.replace("price", "Price"), "has no column 'price': there are file, Price, .*; did you mean 'Price'.$"),
    (GOOD.replace("price", "the price"), "did you mean 'the price'"), (GOOD.replace("file", "File Name"), "did you mean --file-column 'File Name'"),
    (GOOD.replace("split", "Split").replace("area", "SPLIT"), "has the columns SPLIT and Split: rename one"),
    (GOOD + GOOD, "line 7: the header once more: leave that line out"),
    (GOOD.replace("2.5", "\0"), "line 3: NUL bytes"), (GOOD.encode("utf-16-le"), "line 1: NUL bytes, .*UTF-16 without a byte order mark"),
    (GOOD.replace("2.5", "é").encode() + "é".encode("cp1252"), "line 3 is UTF-8 and line 7 is not"),
    (GOOD.replace("2.5", "é").encode("cp850") + b"\x81\n", "line 7: neither UTF-8 nor Windows-1252: save the table as CSV"),
    (codecs.BOM_UTF8 + GOOD.replace("2.5", "é").encode("cp1252"), "line 3: this is no UTF-8, as the file's first bytes say"),
    (GOOD.replace("price", "цена").encode("cp1251"), "has no column 'price': .* .it is read as Windows-1252 .*save it as UTF-8.$"),
    (GOOD.replace("1.png", "ü.png").encode("mac_roman"), "line 3: no such picture: .*it is read as Windows-1252"),
    (GOOD.encode("utf-16")[:-1], "line 6: this is no UTF-16-LE"),
    (gzip.compress(GOOD.encode(), mtime=0), "is compressed by gzip: save the table as CSV"), (b"PAR1\x15\x04", "is a Parquet file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel file"), (b"PK\x03\x04", "is a zip archive, and damaged"),
    ('[{"file": "images/0.png", "price": 1}]', "is JSON"), ('{"file": "images/0.png", "price": 1}\n', "is JSON"),
    ("<!DOCTYPE html>\n<table>", "is HTML or XML"), ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
])
def test_what_is_no_table_or_a_broken_one(tmp_path, content, words):
    file = pictures(tmp_path)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError, match=words) as error:
        tables.read_table(file, ["price"], data.split_by_hash)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("inside, words", [("xl/workbook.xml", "an Excel file"), ("mimetype", "an OpenDocument file"),
                                           ("Index/Document.iwa", "a Numbers file"), ("labels.csv", "a zip archive")])
def test_an_excel_file_is_called_one(tmp_path, inside, words):
    with zipfile.ZipFile(tmp_path / "labels.csv", "w") as archive:
        archive.writestr(inside, "x")
    with pytest.raises(TableError, match=f"labels.csv is {words}: save the table as CSV .UTF-8., and name that file"):
        tables.read_csv(tmp_path / "labels.csv")


def numbers_of(tmp_path, *cells, delimiter=",", may_lack=None):
    (tmp_path / "x.csv").write_text(f"price{delimiter}x\n" + "".join(f'"{cell}"{delimiter}x\n' for cell in cells), encoding="utf-8")
    sheet = tables.read_csv(tmp_path / "x.csv")
    return tables.read_numbers(sheet, "price", may_lack), [note for note in sheet.notes if "price" in note]


@pytest.mark.parametrize("cells, expected, said", [
    (["1", "-2.50", "+.5", "5.", "1e3", "1E-2", " 7 ", "0.1", "123456789.123456789", "\u00a08"],
     [1, -2.5, 0.5, 5, 1000, 0.01, 7, 0.1, 123456789.123456789, 8], NO_NOTE),
    (["1.234", "2.5"], [1.234, 2.5], NO_NOTE), (["1.234", "200"], [1.234, 200], ["line 2: price is read with decimal points"]),
    (["1,5", "-2,25", "3", "1,234"], [1.5, -2.25, 3, 1.234], ["line 2: price has decimal commas: '1,5' is 1.5"]),
    (["1,234", "0,125"], [1.234, 0.125], ["line 3: price has decimal commas: '0,125' is 0.125"]),
    (["1234,567", ",5"], [1234.567, 0.5], ["decimal commas"]),
])
def test_numbers_are_those_that_python_reads(tmp_path, cells, expected, said):
    numbers, notes = numbers_of(tmp_path, *cells)
    assert numbers == expected and len(notes) == len(said) and all(map(re.search, said, notes))


def test_a_point_that_may_separate_thousands_is_said(tmp_path):
    for delimiter in (",", ";"):  # Google Sheets in German writes 1.234 between commas
        numbers, notes = numbers_of(tmp_path, "1.234", "9.500", delimiter=delimiter)
        assert numbers == [1.234, 9.5] and len(notes) == 1
        assert "line 2: price is read with decimal points: '1.234' is not 1234" in notes[0]
    with pytest.raises(TableError, match="line 3: price is '1.234', which may mean 1.234 or 1234: write all with a decimal point"):
        numbers_of(tmp_path, "950", "1.234", delimiter=";")
    assert numbers_of(tmp_path, "950", "1.234", "1.5", delimiter=";") == ([950, 1.234, 1.5], [])


@pytest.mark.parametrize("cells, words", [
    (["5", "1,234"], "line 3: price is '1,234', which may mean 1.234 or 1234: write all with a decimal point"),
    (["1,5", "2.5"], "line 2: price is '1,5', and '2.5' elsewhere: write all with a decimal point"),
    *((["5", text], f"line 3: price is '{re.escape(text)}', which is not a number: write it plainly, such as 1234.5") for text in (
        "1.234,56", "1,234.56", "1,234,567", "1 234", "1_000", "1'000", "$1200", "12 %", "5 cm", "0x10", "1e", "1.2.3", "2024-05-01")),
    *((["5", text], "line 3: price is '.*', which is not a number") for text in ("\u0665", "True", "\u2212", "e5", "--")),
    *((["5", text], "line 3: price is '.*', which is not a number: write one, or leave that row out") for text in ("", "N/A", "None", "-", "?")),
    *((["5", text], f"line 3: price is {text}: it must be finite") for text in ("NaN", "inf", "-Infinity", "1e999")),
])
def test_what_is_no_number(tmp_path, cells, words):
    with pytest.raises(TableError, match=words) as error:
        numbers_of(tmp_path, *cells)
    assert "\n" not in str(error.value)


def test_rows_that_may_lack_their_number(tmp_path):
    cells = ["", "N/A", "nan", "7", " - ", "\\N"]
    assert numbers_of(tmp_path, *cells, may_lack=[True] * 6)[0] == [None, None, None, 7, None, None]
    with pytest.raises(TableError, match="line 3: price is 'N/A', which"):
        numbers_of(tmp_path, *cells, may_lack=[True, False, True, True, True, True])
    with pytest.raises(TableError, match="line 2: price is 'cheap', which is not a number"):
        numbers_of(tmp_path, "cheap", may_lack=[True])


@pytest.mark.parametrize("typed, columns, expected", [
    (["price", "area"], ["price", "area"], ["price", "area"]), (["price", "EUR"], ["price, EUR", "area"], ["price, EUR"]),
    (["price", "EUR"], ["price,EUR", "price", "EUR"], ["price,EUR"]), (["price", "EUR"], ["EUR", "price"], ["price", "EUR"]),
    (["area", "price", "EUR", "age"], ["price, EUR", "area", "age"], ["area", "price, EUR", "age"]),
    (["price, EUR"], ["price, EUR", "price"], ["price, EUR"]), (["a", "b", "c"], ["a,b", "a,b,c"], ["a,b,c"]),
    (["Gro\u0308ße"], ["Größe"], ["Größe"]), (["Größe"], ["Gro\u0308ße"], ["Größe"]), (["cost"], ["price"], ["cost"]),
    (["price EUR"], ["price\u00a0EUR"], ["price EUR"]), (["price  EUR"], ["price EUR"], ["price EUR"]),
])
def test_a_target_may_hold_a_comma(tmp_path, typed, columns, expected):
    (tmp_path / "x.csv").write_text(",".join(f'"{column}"' for column in columns) + "\n" + ",".join("1" for _ in columns) + "\n", encoding="utf-8")
    assert tables.pick_columns(typed, tables.read_csv(tmp_path / "x.csv")) == expected


@pytest.mark.parametrize("there, text, meant", [
    (["im/0.png"], "im/0.png", None), (["im/0.png"], "./im/0.png", None), ([" 0.png", "0.png"], " 0.png", None),
    (["im/0.png"], "im\\0.png", 0), (["im/0.png"], ".\\im\\0.png", 0), (["im/0.png"], " im/0.png ", 0), (["im/0.png"], "'im/0.png'", 0),
    (["im/0.png"], "\ufeffim/0.png", 0), (["im/0.png"], "\u201cim/0.png\u201d", 0), (["im/0.png"], "im / 0.png", 0),
    (["im/0.png", "im/0.txt"], "im/0", 0), (["im/0.jpeg"], "im/0.JPG", 0), (["Im/IMG_1.JPG"], "im/img_1.jpg", 0),
    (["im/ä.png"], "im/a\u0308.png", 0), (["im/a\u0308.png"], "im/Ä.PNG", 0), (["a.png", "b.png"], "A.png", 0),
    (["im/0.png"], "C:\\Users\\me\\im\\0.png", 0), (["im/0.png", "0.png"], "/content/drive/im/0.png", 0), (["0.png"], "/home/me/x/0.png", 0),
    (["im/0.png"], "/home/me/x/0.png", 0), (["train/0.png"], "/home/me/test/0.png", "did you mean train/0.png"),
    (["im/0.png"], "project/x/im/0.png", 0), (["0.png"], "houses/0.png", 0), (["im/0.png"], "https://a.b/c/im/0.png", 0),
    (["im/a b.png"], "im/a%20b.png", 0), (["im/a%20b.png", "im/a b.png"], "im/a%20b.png", None),
    (["im/a b.png"], "https://a.b/c/im/a%20b.png?size=80", 0), (["0.png"], "s3://bucket/c/0.png", 0), (["0.png"], "100%25", "no such picture"),
    (["im/0007.png"], "im/7", "did you mean im/0007.png"),
    (["im/0.png"], "0.png", 0), (["im/0.png", "masks/1.png"], "0", 0), (["../im/0.png"], "im/0.png", 0),
    (["im/0.png", "im/0.jpg"], "im/0", "line 2: 'im/0' may be .*im/0.jpg or .*im/0.png: write the one"),
    (["im/0.png", "masks/0.png"], "0.png", "'0.png' may be .*im/0.png or .*masks/0.png"),
    (["im/A.png", "im/a.PNG"], "im/a.png", "'im/a.png' may be"),
    (["im/0.png"], "im/0.jpg", "line 2: no such picture: .*; did you mean im/0.png.$"), (["im/castle.png"], "im/casle.png", "did you mean im/castle.png"),
    (["images/0.png"], "image/0.png", "did you mean images/0.png"), (["train/0.png"], "test/0.png", "did you mean train/0.png"),
    (["0.png"], "test/0.png", "no such picture: .*test/0.png; --data says where to look first$"), (["im/0.png"], "im", "no such picture"), (["im/0.png"], "", "names no picture"),
    (["im/0.png"], '"a\nb"', "no such picture: .*a b; --data says"), (["im/0.png"], "x" * 9999, "no such picture"),
])
def test_the_picture_that_a_cell_means(tmp_path, there, text, meant):
    """meant: None for the path as it is written, or the place in `there`, or words of the error."""
    root = tmp_path / "houses"
    root.mkdir()
    pictures(root, *there)
    if "im/a.PNG" in there and len(os.listdir(root / "im")) == 1:
        pytest.skip("A.png and a.PNG are one file here")
    (root / "labels.csv").write_text(f'"file",price\n"{text}",1\n' if '"' not in text else f"file,price\n{text},1\n", encoding="utf-8")
    if isinstance(meant, str):
        with pytest.raises(TableError, match=meant) as error:
            tables.find_pictures(tables.read_csv(root / "labels.csv"))
        assert "\n" not in str(error.value)
        return
    sheet = tables.read_csv(root / "labels.csv")
    paths = tables.find_pictures(sheet)
    notes = [note for note in sheet.notes if "under another name" in note]
    if meant is None:
        assert paths == [os.path.join(root, text)] and not notes
    else:
        assert [os.path.realpath(path) for path in paths] == [os.path.realpath(root / there[meant])]
        assert len(notes) == 1 and notes[0].endswith(f"(line 2) is {os.path.normpath(there[meant])}")


@pytest.mark.parametrize("header, row, words", [
    ("image,price", "im/{}.png,1", "has no column 'file': there are image, price; did you mean --file-column image\\?$"),
    (",Bild,price", "{},im/{}.png,1", "there are Bild, price; did you mean --file-column Bild\\?$"), ("id,price", "{},1", "did you mean --file-column id\\?"),
    ("n,filename,price", "{},im/{}.png,1", "did you mean --file-column filename\\?"), ("x,price", "a{},0.5", "there are x, price; --file-column says which column names the pictures$"),
    ("file price", "im/{}.png 1", "there are file price, and no other: columns are separated by commas, semicolons, tabs"),
    ("im/9.png,9", "im/{}.png,1", r"there are im/9.png, 9 \(the first line that is no comment"),
])
def test_the_column_to_be_named_file(tmp_path, header, row, words):
    pictures(tmp_path, *(f"im/{i}.png" for i in (1, 2, 9)))
    (tmp_path / "x.csv").write_text("\n".join([header, *(row.format(i, i) for i in (1, 2))]), encoding="utf-8")
    with pytest.raises(TableError, match=words):
        tables.read_rows(tmp_path / "x.csv", ["price"] if "price" in header else [])


def test_splits_under_another_name_are_said(tmp_path):
    for name, cells, said in (("subset", ("train", "Test"), 1), ("subset", ("train", "train"), 0), ("subset", ("train", "a"), 0), ("Split ", ("train", "test"), 0)):
        (tmp_path / "x.csv").write_text(f"file,{name}\n1,{cells[0]}\n2,{cells[1]}\n", encoding="utf-8")
        sheet = tables.read_csv(tmp_path / "x.csv")
        found = tables.read_splits(sheet)
        assert len(sheet.notes) == said and found == ([None, None] if name == "subset" else ["train", "test"])
        assert not said or "the column 'subset' holds test and train, and is not used: to split by it, rename it to split" in sheet.notes[0]


def test_an_absolute_path_with_blanks_or_quotes_around_it(tmp_path):
    file = pictures(tmp_path / "houses", "im/0.png")
    pictures(tmp_path, "elsewhere/im/0.png")
    file.write_text(f"file,price\n '{tmp_path}/elsewhere/im/0.png' ,1\n")
    assert tables.find_pictures(tables.read_csv(file)) == [str(tmp_path / "elsewhere/im/0.png")]


def test_two_names_do_not_lead_to_one_picture(tmp_path):
    file = pictures(tmp_path, "0.png")
    file.write_text("file,price\n/x/a/0.png,1\n/x/b/0.png,2\n")
    with pytest.raises(TableError, match="lines 2 and 3: '/x/a/0.png' and '/x/b/0.png' both lead to .*0.png: write the paths"):
        found(file)
    file.write_text("file,price\n/x/a/0.png,1\n\\x\\a\\0.png,2\n")
    assert "1 picture in several rows, 1 with different numbers: 0.png in the lines 2, 3" in found(file)[1][-1]


def test_pictures_in_several_rows_and_in_none(tmp_path):
    file = pictures(tmp_path)
    pictures(tmp_path, "images/5.JPG", "images/notes.txt", "images/.hidden.png", "elsewhere/6.png", "images/more/7.png")
    text = "file,price\n" + "".join(f"images/{i}.png,{i}\n" for i in (0, 1, 2, 3, 1, 0))
    file.write_text(text)
    assert found(file)[1] == [f"note: {file}: 2 pictures beside those of the table in no row: images/4.png, images/5.JPG",
                              f"warning: {file}: 2 pictures in several rows, none with different numbers: 0.png in the lines 2, 7"]
    file.write_text(text.replace("3.png", "./1.png"))
    assert found(file)[1][-1].endswith("2 pictures in several rows, 1 with different numbers: 1.png in the lines 3, 5, 6")
    text = tables.describe(tables.read_table(file, ["price"], data.split_by_hash))
    assert text.splitlines()[-1] == found(file)[1][-1] and "target" in text.splitlines()[0]


def test_rows_of_the_split_test_without_numbers(tmp_path):
    file = pictures(tmp_path)
    file.write_text(GOOD.replace("-5", "").replace("valid", " Dev"))
    table = tables.read_table(file, ["price"], data.split_by_hash)
    assert set(table.splits) == {"train", "val"} and len(table.values["train"]) == 3
    assert table.notes == [f"note: {file}: left out 1 row of the split test without a number: predict.py --labels predicts them"]
    file.write_text(GOOD.replace("1e2", ""))
    with pytest.raises(TableError, match="line 5: price is '', which is not a number: write one"):
        found(file)


def test_rows_without_true_numbers_for_predictions(tmp_path):
    file = pictures(tmp_path)
    file.write_text(GOOD.replace("20", "").replace("1e2", "n/a"))
    rows, notes = found(file, numbers_optional=True)
    assert [numbers for _, numbers, _ in rows.values()] == [[10], None, [60], None, [-5]] and not notes
    file.write_text(re.sub(",.*", "", GOOD))
    rows, notes = found(file, "price", "area", numbers_optional=True)
    assert list(rows.values()) == [[None, None, 1.0]] * 5
    assert notes == [f"note: {file} has no column 'price', 'area': nothing to score by"]
    file.write_text(GOOD.replace("price", "cost"))
    rows, notes = found(file, "price", "area", numbers_optional=True)
    assert [numbers for _, numbers, _ in rows.values()] == [[None, area] for area in (1.5, 2.5, 3.5, 4.5, 5.5)]
    assert notes == [f"note: {file} has no column 'price': only the others are scored"]
    file.write_text(GOOD.replace("file", "path"))
    with pytest.raises(TableError, match="has no column 'file'"):
        found(file, numbers_optional=True)


def test_the_column_of_the_pictures_may_have_any_name(tmp_path):
    file = write(tmp_path, GOOD.replace("file", "image id"))
    assert len(tables.read_table(file, ["price"], data.split_by_hash, file_column=" image id").splits["train"]) == 3
    with pytest.raises(TableError, match="has no column 'image': there are image id, .*; did you mean 'image id'.$"):
        found(file, file_column="image")
    with pytest.raises(TableError, match="has no column 'file': .*; did you mean --file-column 'image id'.$"):
        found(file)


# ---- pictures below another folder than the CSV's


def test_names_are_sought_below_the_folder_first_and_then_beside_the_csv(tmp_path):
    pictures(tmp_path, "small/a.png", "large/a.png", "large/b.png", "small/train/c.png", "large/test/c.png")
    file = tmp_path / "large/x.csv"
    file.write_text("file\na.png\nb.png\nc\n")
    sheet = tables.read_csv(file)
    assert tables.find_pictures(sheet, folder=tmp_path / "small") == [
        str(tmp_path / name) for name in ("small/a.png", "large/b.png", "small/train/c.png")]
    assert sheet.notes == [
        f"note: {file}: 1 picture found under another name than in the column file: 'c' (line 4) is train/c.png",
        f"warning: {file}: 1 picture in both folders: {tmp_path}/small/a.png is taken, not {tmp_path}/large/a.png (line 2)",
        f"note: {file}: 1 picture beside those of the table in no row: a.png"]
    for folder in (None, tmp_path / "large", f"{tmp_path}/small/../large/"):  # a folder that is the CSV's own
        sheet = tables.read_csv(file)
        paths = tables.find_pictures(sheet, folder=folder)
        assert [os.path.relpath(path, tmp_path) for path in paths] == ["large/a.png", "large/b.png", "large/test/c.png"]
        assert not any("both folders" in note for note in sheet.notes)
    with pytest.raises(TableError, match="no such folder: .*nowhere: say where the pictures are, by --data"):
        tables.find_pictures(sheet, folder=tmp_path / "nowhere")
    file.write_text("file\nd.png\n")
    with pytest.raises(TableError, match="line 2: no such picture: .*small/d.png, nor .*large/d.png$"):
        tables.find_pictures(tables.read_csv(file), folder=tmp_path / "small")


def test_a_table_is_named_relative_to_the_folder(tmp_path, monkeypatch):
    pictures(tmp_path, "dogs/labels.csv", "other.csv")
    monkeypatch.chdir(tmp_path)
    for name in ("labels.csv", "../other.csv", str(tmp_path / "other.csv")):
        assert os.path.isfile(tables.table_path("dogs", name))
    with pytest.raises(TableError, match="there is no dogs/dogs/labels.csv: --labels is relative to --data: type --labels labels.csv$"):
        tables.table_path("dogs", "dogs/labels.csv")
    with pytest.raises(TableError, match="type --labels ../other.csv$"):
        tables.table_path("dogs", "other.csv")
    with pytest.raises(TableError, match="no such folder: cats"):
        tables.table_path("cats", "labels.csv")


# ---- classes


def class_table(tmp_path, *rows, header="file,breed"):
    """A table of the pictures 0.png, 1.png and so on, and of what the rows say of them."""
    pictures(tmp_path, *(f"{i}.png" for i in range(len(rows))))
    (tmp_path / "labels.csv").write_text("\n".join([header, *(f"{i}.png,{row}" for i, row in enumerate(rows))]), encoding="utf-8")
    return tmp_path / "labels.csv"


@pytest.mark.parametrize("val", [True, False])
def test_a_table_gives_what_class_folders_give(tmp_path, val):
    """The same pictures in the same order in the same splits; names as they sort, and folders within the class folders."""
    names = [f"{s}/{c}/{n}.png" for s in (["train", "val"] if val else ["x"]) for c in ("b", "a")
             for n in ("1", "10", "2", "é", f"z{c}/0", f"B{c}/3")]
    pictures(tmp_path / "d", *names)
    for name in names:
        (tmp_path / "d" / name).write_text(name)  # else they are the same picture
    root = tmp_path / "d" if val else tmp_path / "d/x"
    random.Random(0).shuffle(names)
    text = "".join(f"../d/{name.removesuffix('.png')},{name.split('/')[1]},{name.split('/')[0]}\n" for name in names)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/l.csv").write_text(("f,class,split\n" if val else "f,class,other\n") + text, encoding="utf-8")
    folders, table = data.find_images(root, 0.3), tables.read_classes(tmp_path / "t/l.csv", "class", data.split_by_hash, 0.3, "f", root)
    assert table.classes == folders.classes == ["a", "b"] and len(table.splits["val"]) == (12 if val else 4)
    for split, found in folders.splits.items():
        assert [(os.path.realpath(path), label) for path, label in table.splits[split]] == [(os.path.realpath(path), label) for path, label in found]
    assert data.fingerprint(table) == data.fingerprint(folders)
    assert data.describe(table).splitlines()[:4] == data.describe(folders).splitlines()[:4]
    assert data.describe(table).splitlines()[4:] == table.notes and len(table.notes) == 1


SPLITS = "file,breed,split"


@pytest.mark.parametrize("rows, header, classes, sizes, said", [
    (["cat", "dog"] * 4, "file,breed", ["cat", "dog"], (6, 2), NO_NOTE),
    ([" cat\u00a0", "dog"] + ["cat", '" dog"'] * 3, "file,breed", ["cat", "dog"], (6, 2), NO_NOTE),
    ([0, 1] * 4, "file,breed", ["0", "1"], (6, 2), NO_NOTE), ([-1, 1] * 4, "file,breed", ["-1", "1"], (6, 2), NO_NOTE),
    ([2, 10] * 4, "file,breed", ["10", "2"], (6, 2), NO_NOTE), (["a10", "a100"] * 4, "file,breed", ["a10", "a100"], (6, 2), NO_NOTE),
    (["c", "c++"] * 4, "file,breed", ["c", "c++"], (6, 2), NO_NOTE),
    (["caf\u00e9", "cafe\u0301", "x", "x"], "file,breed", ["caf\u00e9", "x"], (2, 2), NO_NOTE),
    (["train,train", "val,train"] * 2 + ["train,test", "val,test"], SPLITS, ["train", "val"], (2, 2, 2), NO_NOTE),
    (["a,train", "b,train", "a,Dev", "b,valid"], SPLITS, ["a", "b"], (2, 2), NO_NOTE),
    (["1", "01", "2"] * 2, "file,breed", ["01", "1", "2"], (3, 3), ["classes of their own, since text counts as it stands: '01' and '1': write"]),
    (["1", "1.0"] * 2, "file,breed", ["1", "1.0"], (2, 2), ["'1' and '1.0'"]),
    (["Cat", "cat", "a b", "a_b"] * 2, "file,breed", ["Cat", "a b", "a_b", "cat"], (4, 4), ["'Cat' and 'cat'; 'a b' and 'a_b': write"]),
    (["cat", "cat\u200b"] * 2, "file,breed", ["cat", "cat\u200b"], (2, 2), [r"'cat' and 'cat.u200b'"]),
    (["class 1", "class 01"] * 2, "file,breed", ["class 01", "class 1"], (2, 2), ["'class 01' and 'class 1'"]),
    (["nan", "None", "cat"] * 2, "file,breed", ["None", "cat", "nan"], (3, 3), ["'None', 'nan' is taken as the name of a class: leave"]),
    ([0.5, 1] * 2, "file,breed", ["0.5", "1"], (2, 2), ["breed holds numbers such as 0.5, .* of 2 classes: train_regressor.py"]),
    (["a,train", "b,train", "a,val", "a,test"], SPLITS, ["a", "b"], (2, 1, 1), ["split val has the breed 'b': trained, but not", "split test has"]),
    (["a,train", "b,train"] * 2 + [",test", "a,test"], SPLITS, ["a", "b"], (2, 2, 1), ["left out 1 row of the split test without a class", "split test has"]),
    (["a,train", "b,train"] * 2 + [",test"] * 2, SPLITS, ["a", "b"], (2, 2), ["left out 2 rows of the split test .* predict.py --labels predicts them"]),
])
def test_classes_and_what_is_said_of_them(tmp_path, rows, header, classes, sizes, said):
    file = class_table(tmp_path, *rows, header=header)
    found = tables.read_classes(file, "breed", data.split_by_hash)
    assert (found.classes, tuple(map(len, found.splits.values()))) == (classes, sizes)
    assert list(found.splits) == ["train", "val", "test"][: len(sizes)]
    assert len(found.notes) == len(said) and all(map(re.search, said, found.notes)), found.notes
    for path, label in (one for split in found.splits.values() for one in split):
        cell = str(rows[int(os.path.basename(path)[:-4])]).split(",")[0].strip(' "\u00a0')
        assert unicodedata.normalize("NFC", cell) == found.classes[label]


@pytest.mark.parametrize("rows, header, words", [
    (["cat", "", "dog", "cat"], "file,breed", "line 3: breed is empty: write a name, or leave that row out"),
    (["a,train", "b,train", " ,val"], SPLITS, "line 4: breed is empty"),
    (["cat"] * 4, "file,breed", "breed is 'cat' in every row of the training split: a classifier needs two classes or more"),
    (list("abcd"), "file,breed", "the column breed holds another name in each of its 4 rows: .* another column, name that by --target$"),
    ([1.5, 2.5, 3.5, 4], "file,breed", "another name in each of its 4 rows: .*; if these are numbers to predict: train_regressor.py$"),
    ([1.5, 2.5, 2.5, 4], "file,breed", "line 2: this is the only picture of the breed '1.5' .and of 1 more of the 3 classes.* numbers to predict"),
    (["cat", "cat", "dog"], "file,breed", "line 4: this is the only picture of the breed 'dog', so it cannot be in train and in val: add a second"),
    (["a,train", "b,train", "c,val", "a,val"], SPLITS, "line 4: a row of the split val has the class 'c', which no row of train has"),
    (["a,train", "b,train", "a,val", "A,test"], SPLITS, "line 5: a row of the split test has the class 'A'"),
    (["a,val", "b,val", "a,test"], SPLITS, "has no rows of the split train"), ([",test", ",test"], SPLITS, "has no rows of the split train"),
    (["a,x", "b,train"], SPLITS, "line 2: the split is 'x'"), (["a", "b"] * 2, "file,race", "has no column 'breed': there are file, race"),
    (["a", "b"] * 2, "id,breed", "has no column 'file': there are id, breed; did you mean --file-column id"),
])
def test_columns_that_are_no_classes(tmp_path, rows, header, words):
    with pytest.raises(TableError, match=words) as error:
        tables.read_classes(class_table(tmp_path, *rows, header=header), "breed", data.split_by_hash)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "labels.csv"))


def test_a_picture_counts_once_in_its_class_and_may_be_in_two(tmp_path):
    file = class_table(tmp_path, *["cat", "dog"] * 4)
    text = file.read_text()
    file.write_text(f"{text}\n0.png,cat\n./1.png,dog\n")
    pictures(tmp_path, "8.png")
    found = tables.read_classes(file, "breed", data.split_by_hash)
    assert {split: len(pairs) for split, pairs in found.splits.items()} == {"train": 6, "val": 2}
    assert found.notes == [f"note: {file}: 1 picture beside those of the table in no row: 8.png",
                           f"warning: {file}: 2 pictures in several rows, none with different classes: 0.png in the lines 2, 10"]
    file.write_text(f"{text}\n0.png,dog\n")
    found = tables.read_classes(file, "breed", data.split_by_hash)
    assert sorted(label for pairs in found.splits.values() for path, label in pairs if path.endswith("/0.png")) == [0, 1]
    assert found.notes[-1].endswith("1 with different classes: 0.png in the lines 2, 10; several labels of a picture: train_multilabel.py")


def test_rows_without_a_class_for_predictions(tmp_path):
    file = class_table(tmp_path, "a,val", ",val", "b,test", header=SPLITS)
    rows, notes = tables.read_class_rows(file, "breed", classes_optional=True)
    assert [row[1:] for row in rows] == [("val", "a"), ("val", None), ("test", "b")] and not notes
    rows, notes = tables.read_class_rows(file, "race", classes_optional=True, column_optional=True)
    assert [row[2] for row in rows] == [None] * 3 and notes == [f"note: {file} has no column 'race': nothing to score by"]
    assert tables.read_class_rows(file, None, classes_optional=True, column_optional=True)[1] == []
    with pytest.raises(TableError, match="has no column 'bred': .*did you mean 'breed'"):
        tables.read_class_rows(file, "bred", classes_optional=True)


# ---- whatever happens to a table: read, or one line

WHOLE = "file,price,note,split\n" + "".join(
    f'im/{name}.png,{i + 10}.5,{note},{split}\n' for i, (name, note, split) in enumerate(
        [("a0", "fine", "train"), ("b1", '"small, old"', "train"), ("c2", "", "train"), ("d3", '"5"" disk"', "train"), ("e4", "x", "train"),
         ("f5", "2|3;4", "val"), ("g6", "", "val"), ("h7", "é", "test"), ("i8", '"a"', "test")]))


def mutate(text, draw):
    """A text with one change of the kind that editors, programs and people make."""
    lines, place = text.split("\n"), draw.randrange(len(text))
    at = draw.randrange(len(lines))
    cells = lines[at].split(",")
    kind = draw.choice(["delete", "insert", "swap", "swap all", "drop", "empty", "case", "blank", "commas", "copy", "move", "cut", "above"])
    if kind == "delete":
        return text[:place] + text[place + 1 :]
    if kind == "insert":
        return text[:place] + draw.choice('""",,;|\t\n\r 0.#\'é\0') + text[place:]
    if kind == "swap":
        return text[:place] + draw.choice(";|\t ") + text[place + 1 :]
    if kind == "swap all":
        return text.replace(",", draw.choice(";|\t"))
    if kind == "cut":
        return text[:place]
    if kind in ("drop", "empty"):
        gone = draw.randrange(len(cells))
        cells[gone : gone + 1] = [] if kind == "drop" else [""]
    lines[at] = lines[at].upper() if kind == "case" else ",".join(cells)
    more = {"blank": "", "commas": ",,,", "copy": lines[at], "above": draw.choice(["sep=,", "# hand-made", ""])}
    if kind in more:
        lines.insert(0 if kind == "above" else draw.randrange(1, len(lines) + 1), more[kind])
    if kind == "move":
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_table_is_read_wholly_or_refused_in_one_line(tmp_path, seed):
    names = re.findall(r"im/(\w+)\.png", WHOLE)
    good = {name: i + 10.5 for i, name in enumerate(names)}
    file, draw, read = pictures(tmp_path, *(f"im/{name}.png" for name in names)), random.Random(seed), 0
    for _ in range(120):
        text = WHOLE
        changes = draw.randint(1, 2)
        for _ in range(changes):
            text = mutate(text, draw) or WHOLE
        text = text.replace("\n", draw.choice(["\n", "\r\n", "\r"]))
        raw = text.encode(draw.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
        file.write_bytes(raw)
        try:
            table = tables.read_table(file, ["price"], lambda paths, share, folder: (paths[2:], paths[:2]))
        except TableError as error:
            assert "\n" not in str(error) and str(file) in str(error), text
            continue
        read += 1
        # By hand: every line with a picture was read, or is spoken of.
        lines = [line for line in re.split("[\r\n]+", text) if "png" in line.lower()]
        said = sum(int(n) for note in table.notes for n in re.findall(r"left out (\d+) row", note))
        assert sum(map(len, table.splits.values())) + said == len(lines), (text, table)
        # The number of each picture is its own, but for the rows that were changed, where it is the one that stands there.
        pairs = [(path, values.item()) for split, rows in table.splits.items()
                 for (path, _), values in zip(rows, table.values[split], strict=True)]
        others = [value for path, value in pairs if good[os.path.splitext(os.path.basename(path))[0]] != value]
        assert len(others) <= changes, (text, others)
        cells = {cell.strip(' "') for line in lines for cell in re.split(r"[,;\t|]", line)}
        assert set(others) <= {float(cell) for cell in cells if re.fullmatch(r"[\d.]*\d[\d.]*", cell)}, (text, others)
    assert 15 < read < 105  # both happen


@pytest.mark.parametrize("values", [[[1e308], [-1e308]], [[1e-200], [2e-200]], [[1e200], [2e200]]])
def test_numbers_that_cannot_be_standardized(values):
    with pytest.raises(TableError, match="rescale them"):
        tables.fit_scale(torch.tensor(values, dtype=torch.float64))
    with pytest.raises(TableError, match="a target is .* standard deviations from"):
        tables.standardize(torch.tensor([[1e45]], dtype=torch.float64), {"mean": [0.0], "std": [1.0], "log": False})


@pytest.mark.parametrize("log", [False, True])
def test_standardizing_and_back(log):
    values = torch.rand(50, 3, dtype=torch.float64) * torch.tensor([1.0, 1e6, 1e-3], dtype=torch.float64) + 1e-6
    scale = tables.fit_scale(values, log)
    z = tables.standardize(values, scale)
    torch.testing.assert_close(z.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.square().mean(0), torch.ones(3, dtype=torch.float64))
    back, nothing = tables.to_own_units(z, scale)
    torch.testing.assert_close(back, values)
    assert nothing is None


def test_scaling_by_a_power_of_two_changes_no_bit():
    values = torch.rand(50, 2, dtype=torch.float64)
    one, other = tables.fit_scale(values), tables.fit_scale(values * 2**20)
    z = tables.standardize(values, one)
    assert torch.equal(z, tables.standardize(values * 2**20, other))
    assert torch.equal(tables.to_own_units(z, other)[0], 2**20 * tables.to_own_units(z, one)[0])


@pytest.mark.parametrize("log", [False, True])
def test_quantiles_never_cross_and_the_median_is_reported(log):
    scale = {"mean": [10.0, 2.0], "std": [2.0, 0.5], "log": log}
    outputs = torch.tensor([[[-1.0, 0.0, 1.0], [1.0, 3.0, 2.0]], [[5.0, 4.0, 3.0], [0.0, -1.0, 1.0]]])
    medians, quantiles = tables.to_own_units(outputs, scale, [0.1, 0.5, 0.9])
    expected = torch.tensor([[[8.0, 10, 12], [2.5, 3, 3.5]], [[16, 18, 20], [1.5, 2, 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(quantiles, expected.exp() if log else expected)
    assert torch.equal(medians, quantiles[..., 1])
    rows = tables.prediction_rows(["a", "b"], ["x", "y"], medians, quantiles, [0.1, 0.5, 0.9], medians + 1)
    assert list(rows[1]) == ["file", "x", "x_prediction", "x_q0.1", "x_q0.5", "x_q0.9", "y", "y_prediction", "y_q0.1", "y_q0.5", "y_q0.9"]
    assert rows[1]["y"] == rows[1]["y_prediction"] + 1 == medians[1, 1].item() + 1 and rows[0]["x_q0.9"] == quantiles[0, 0, 2].item()


# ---- labels


def label_table(folder, text, name="labels.csv"):
    """Write a table whose column of pictures is first, and files for them."""
    for line in text.splitlines()[1:]:
        (folder / line.partition(",")[0]).touch()
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read_labels(file, targets, **how):
    return tables.read_labels(file, targets, data.split_by_hash, **how)


COLUMNS = "file,a,b,split\n1.png,1,0,train\n2.png,,1.0,train\n3.png,0, 0 ,train\n4.png,,,train\n5.png,1,,val\n6.png,,0,test\n7.png,,,test\n"


def test_labels_in_columns(tmp_path):
    table = read_labels(label_table(tmp_path, COLUMNS), ["b", "a"])
    nan = math.nan
    assert table.targets == ["b", "a"] and {s: len(v) for s, v in table.splits.items()} == {"train": 3, "val": 1, "test": 1}
    for split, values in (("train", [[0, 1], [1, nan], [0, 0]]), ("val", [[nan, 1]]), ("test", [[0, nan]])):
        assert torch.equal(table.values[split].nan_to_num(9), torch.tensor(values).double().nan_to_num(9))
        assert table.weights[split].mean() == pytest.approx(1)
        assert torch.equal(table.weights[split] > 0, ~table.values[split].isnan())
    assert len(set(table.weights["train"][~table.values["train"].isnan()].tolist())) == 1
    assert table.splits["train"][2] == (f"{tmp_path}/3.png", 2)
    said = "\n".join(table.notes)
    assert "left out 1 row of the split train in which no label is known" in said
    assert "left out 1 row of the split test in which no label is known: predict.py --labels predicts them" in said
    lines = tables.describe_labels(table).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["b", "1", "2", "0", "0", "0", "1", "0", "1", "0"],
        ["a", "1", "1", "1", "1", "0", "0", "0", "0", "1"], ["pictures", "3", "1", "1"]]
    assert lines[4].startswith("note: no picture of val has b: no score there")
    targets, weights = tables.label_tensors(table, "train")
    assert targets.tolist() == [[0, 1], [1, 0], [0, 0]] and targets.dtype == weights.dtype == torch.float32
    again = read_labels(label_table(tmp_path, COLUMNS.replace("3.png,0,", "3.png,,").replace("2.png,,", "2.png,0,")), ["b", "a"])
    assert tables.fingerprint(again) != tables.fingerprint(table)


TAGS = "file,tags,split\n1.png,sky  sea,train\n2.png,,train\n3.png,cafe\u0301,train\n4.png,caf\u00e9,val\n5.png,,test\n6.png,,test\n"


def test_labels_in_one_column(tmp_path):
    table = read_labels(label_table(tmp_path, TAGS), ["tags"], separator=" ")
    assert table.targets == ["caf\u00e9", "sea", "sky"]
    assert table.values["train"].tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]] and table.values["val"].tolist() == [[1, 0, 0]]
    # of the split test nobody has filled in a cell: not known, rather than without a label
    assert "test" not in table.splits and "left out 2 rows of the split test" in "\n".join(table.notes)
    swapped = TAGS.replace("sky  sea", "sea;sky").replace("3.png,cafe\u0301", "3.png,caf\u00e9 ; sea")
    assert read_labels(label_table(tmp_path, swapped), ["tags"], separator=";").values["train"].tolist() == [
        [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert "hint" not in "".join(table.notes)
    with pytest.raises(TableError, match="no row of the training split .the separator .[|]. separates nothing there.: take it away"):
        read_labels(label_table(tmp_path, swapped), ["tags"], separator="|")
    hints = read_labels(label_table(tmp_path, swapped.replace(" ; sea", "")), ["tags"], separator="|").notes
    assert any("hint: " in h and "the separator '|' separates nothing in tags: each cell is one label, such as 'sea;sky' (line 2)" in h
               for h in hints)
    doubtful = "\n".join(read_labels(label_table(tmp_path, TAGS.replace("2.png,", "2.png,Sky none")), ["tags"], separator=" ").notes)
    assert "labels of their own, since text counts as it stands: 'Sky' and 'sky': write them alike if they are one" in doubtful
    assert "'none' is taken as the name of a label: take it out of the cells if it means that there is none" in doubtful


def test_labels_without_a_split_and_with_another_column_of_files(tmp_path):
    text = "image_name,a\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(20))
    table = read_labels(label_table(tmp_path, text), ["a"], file_column="image_name", val_split=0.25)
    assert {s: len(v) for s, v in table.splits.items()} == {"train": 15, "val": 5}
    train, val = data.split_by_hash([f"{tmp_path}/{i}.png" for i in range(20)], 0.25, tmp_path)
    assert [path for path, _ in table.splits["val"]] == val and [path for path, _ in table.splits["train"]] == train


@pytest.mark.parametrize("text, targets, separator, words", [
    (COLUMNS.replace("3.png,0", "3.png,2"), ["a"], None, "line 4: a is '2': write 1, 0, or nothing where it is not known"),
    (COLUMNS.replace("3.png,0", "3.png,-1"), ["a"], None, "line 4: a is '-1': write 1, 0"),
    (COLUMNS.replace("3.png,0", "3.png,0.5"), ["a"], None, "line 4: a is '0.5': write 1, 0"),
    (COLUMNS.replace("3.png,0", "3.png,nan"), ["a"], None, "line 4: a is 'nan': write 1, 0"),
    (COLUMNS.replace("3.png,0", "3.png,x y"), ["a"], None, "where it is not known; for a column of names say --separator"),
    (COLUMNS.replace("3.png,0", "3.png,True"), ["a"], None, "line 4: a is 'True': write 1, 0, or nothing where it is not known$"),
    (COLUMNS.replace("1.png,1", "1.png,0"), ["a", "b"], None, "the label a is 1 in no row of the training split: nothing to learn"),
    (COLUMNS.replace("3.png,0", "3.png,1"), ["a"], None, "the label a is 0 in no row of the training split"),
    (COLUMNS.replace("5.png,1", "5.png,"), ["a"], None, "has no rows of the split val with a known label"),
    (COLUMNS, ["c"], None, "has no column 'c': there are file, a, b, split"),
    (COLUMNS, ["a", "a"], None, "the target a is named twice"),
    (COLUMNS, ["a", "b"], " ", "a separator is for one column of names, and 2 are named: a, b"),
    (TAGS.replace("4.png,caf\u00e9", "4.png,cafes"), ["tags"], " ",
     "line 5: the label 'cafes' in tags is in no row of the training split; did you mean 'caf\u00e9'?"),
    (TAGS.replace("5.png,", "5.png,fog"), ["tags"], " ", "line 6: the label 'fog' in tags is in no row of the training split"),
    (TAGS.replace("sky  sea", "sky sea sky"), ["tags"], " ", "line 2: the label 'sky' stands there twice in tags"),
    (TAGS.replace("sky  sea", '"sky, sea"'), ["tags"], " ", "line 2: the label 'sky,' in tags holds more than a name: write names alone, "
     "with --separator's ' ' between them"),
    (TAGS.replace("sky  sea", '"[\'sky\', \'sea\']"'), ["tags"], ",", "line 2: the label '['sky'' in tags holds more than a name"),
    (TAGS.replace("2.png,", "2.png,sea").replace("cafe\u0301", "sea"), ["tags"], " ", "label"),
])
def test_labels_that_cannot_be_used(tmp_path, text, targets, separator, words):
    with pytest.raises(TableError) as raised:
        read_labels(label_table(tmp_path, text), targets, separator=separator)
    assert words in f"{raised.value}$" and "\n" not in str(raised.value)


def test_a_validation_without_any_label_has_no_score_to_choose_by(tmp_path):
    table = read_labels(label_table(tmp_path, COLUMNS.replace("5.png,1", "5.png,0")), ["a", "b"])
    with pytest.raises(TableError, match="x.csv: no label is 1 in any val row, so there is no val_map to monitor: --monitor val_loss"):
        tables.refuse_no_ones(table.values["val"], "x.csv", "val_map")
    tables.refuse_no_ones(table.values["train"], "x.csv", "val_map")


def test_labels_of_pictures_that_are_not_there(tmp_path):
    (tmp_path / "labels.csv").write_text(COLUMNS)
    with pytest.raises(TableError, match=r"line 2: no such picture: .*1.png \(and 6 more are missing\)"):
        read_labels(str(tmp_path / "labels.csv"), ["a"])


def test_pictures_in_several_rows_with_other_labels(tmp_path):
    table = read_labels(label_table(tmp_path, COLUMNS + "1.png,0,0,train\n"), ["a"])
    assert any("1 picture in several rows, 1 with different labels: 1.png in the lines 2, 9" in note for note in table.notes)


def test_quotes_in_a_table_with_tabs_are_text_where_they_part_nothing(tmp_path):
    """As in the tables of GLUE; a table whose quotes all stand around cells is read as such."""
    file = tmp_path / "t.tsv"
    rows = ['he said "hi"', '"begins and does not end', 'plain', '"all of it"', 'ends here"']
    file.write_text("text\tlabel\n" + "".join(f"{words}\t{i % 2}\n" for i, words in enumerate(rows)))
    sheet = tables.read_csv(str(file))
    assert [row["text"] for _, row in sheet.rows] == rows and any("quotes are read as they stand" in n for n in sheet.notes)
    file.write_text('text\tlabel\n"a ""b""\nd"\t1\nplain\t0\n')
    assert [row["text"] for _, row in tables.read_csv(str(file)).rows] == ['a "b"\nd', "plain"]
