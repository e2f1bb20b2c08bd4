"""report.py on small run folders written by hand: what it says is counted here by other means, what it draws is
measured.
"""

import base64
import csv
import html.parser
import itertools
import json
import math
import os
import re
import sys
import warnings

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw

import metrics
import report
import text

ODD = ["猫 🐱", "$x^2$", "a_b_{c}", "<script>alert('1')</script>", "W" * 90, "back\\slash $", 'q"uo&te',
       "two\nlines"]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def epochs(count, **columns):
    """History rows; a column is a function of the epoch."""
    columns = {"train_loss": lambda e: 1 / (e + 1), "val_loss": lambda e: 1.5 / (e + 1),
               "val_accuracy": lambda e: 1 - 0.5 / (e + 1), "lr": lambda e: 0.1 ** (e + 1)} | columns
    return [{"epoch": e} | {name: column(e) for name, column in columns.items()} for e in range(count)]


@pytest.fixture
def folder(tmp_path):
    """folder(history, predictions, split="test", option=value, ...) writes a run folder and returns it."""

    def write(history=None, predictions=None, split="test", name="run", **options):
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        write_csv(run / "history.csv", history or epochs(3))
        (run / "args.json").write_text(json.dumps({"monitor": "val_accuracy"} | options))
        if predictions:
            write_csv(run / f"{split}_predictions.csv", predictions)
        return run

    return write


def classified(*rows):
    """Rows of predictions from (file, truth, prediction, probability)."""
    return [dict(zip(("file", "truth", "prediction", "probability"), row, strict=True)) for row in rows]


def pairs(*counts):
    """pairs(("cat", "dog", 3), ...): so many pictures of a cat that are taken for a dog."""
    return classified(*((f"{t}{p}{i}.jpg", t, p, 0.5 + i / 100) for t, p, count in counts for i in range(count)))


class Page(html.parser.HTMLParser):
    """Tables as lists of rows, pictures, text; and that every tag is closed in its turn."""

    VOID = {"meta", "img"}

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.images, self.text, self.attributes, self.tags = [], [], [], "", [], set()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += text

    def facts(self):
        return dict(self.tables[0])

    def table(self, *header):
        return next(table[1:] for table in self.tables if table[0] == list(header))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pixels are quicker; sizes in inches and letters in points stay."""
    monkeypatch.setattr(report, "DPI", 60)


def check_drawing(figure):
    """No visible text lies outside the canvas; no two tick labels of an axis overlap, and no two panels with all that
    belongs to them. Returns the texts: [(artist, axes or None, box), ...].
    """
    figure.set_dpi(144)
    renderer = FigureCanvasAgg(figure).get_renderer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.draw_without_rendering()
    found = []
    for axes in [None, *figure.axes]:
        artists = [*axes.texts, axes.title] if axes else [
            *figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axis in (axes.xaxis, axes.yaxis) if axes else ():
            low, high = sorted(axis.get_view_interval())
            labels = [t for t in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
                      if t.get_text() and low <= t.get_position()[axis is axes.yaxis] <= high]
            boxes = [t.get_window_extent(renderer) for t in labels]
            artists += [*labels, axis.label, axis.get_offset_text()]
            boxes.sort(key=lambda box: (box.x0, box.y0)[axis is axes.yaxis])
            for one, other in itertools.pairwise(boxes) if labels and labels[0].get_rotation() in (0, 90) else ():
                assert not one.overlaps(other), (axes.get_title(), [t.get_text() for t in labels])
        found += [(a, axes, a.get_window_extent(renderer)) for a in artists if a.get_visible() and a.get_text().strip()]
    for artist, _, box in found:
        assert -1 <= box.x0 < box.x1 <= figure.bbox.width + 1, artist
        assert -1 <= box.y0 < box.y1 <= figure.bbox.height + 1, artist
    panels = [axes.get_tightbbox(renderer).padded(-1) for axes in figure.axes]
    for one, other in itertools.combinations(panels, 2):
        assert not one.overlaps(other)
    return found


@pytest.fixture
def blank(monkeypatch):
    """For a test of the page alone: nothing is drawn."""
    for name in ("draw_curves", "draw_confusion", "draw_sheet"):
        monkeypatch.setattr(report, name, lambda *a: report.new_figure(1, 1))
    monkeypatch.setattr(report, "draw_numbers", lambda *a: (report.new_figure(1, 1), report.new_figure(1, 1)))


@pytest.fixture
def drawn(monkeypatch):
    """{name of the function: Figure} of what is drawn within a test."""
    figures = {}
    for name in ("draw_curves", "draw_confusion", "draw_sheet"):
        real = getattr(report, name)
        monkeypatch.setattr(report, name, lambda *a, real=real, name=name: figures.setdefault(name, real(*a)))
    return figures


# ---- the page of a classification


def test_the_page_of_a_classification(folder, blank, capsys):
    counts = ("cat", "cat", 7), ("cat", "dog", 3), ("dog", "dog", 4), ("dog", "cat", 1), ("emu", "dog", 2)
    run = folder(epochs(3, val_accuracy=lambda e: (0.5, 0.9, 0.7)[e]), pairs(*counts), model="resnet18",
                 unfreeze=["1:layer4", "2:all@1e-4"])
    assert report.main([str(run)]) is None
    assert capsys.readouterr().out.startswith(f"wrote {run}/report.html")
    page = Page(run / "report.html")
    assert page.facts()["accuracy"] == "0.6471 (11 of 17 pictures right)"
    assert page.facts()["balanced accuracy"] == f"{(0.7 + 0.8 + 0) / 3:.4f}"
    assert page.facts()["best epoch"] == "1, val_accuracy 0.9"
    assert "model resnet18" in page.facts()["options"] and "1:layer4" in page.facts()["options"]
    rows = page.table("class", "precision", "recall", "F1", "images")
    assert rows == [["emu", "0.0000", "0.0000", "0.0000", "2"],
                    ["dog", f"{4 / 9:.4f}", f"{4 / 5:.4f}", f"{8 / 14:.4f}", "5"],
                    ["cat", f"{7 / 8:.4f}", f"{7 / 10:.4f}", f"{14 / 18:.4f}", "10"],
                    ["macro mean", f"{(4 / 9 + 7 / 8) / 3:.4f}", "0.5000", f"{(8 / 14 + 14 / 18) / 3:.4f}", "17"]]
    swaps = page.table("", "images", "share of the class")
    assert swaps == [["cat as dog", "3", "30%"], ["emu as dog", "2", "100%"], ["dog as cat", "1", "20%"]]
    history = page.table("epoch", "train_loss", "val_loss", "val_accuracy", "lr")
    assert [row[3] for row in history] == ["0.5", "0.9", "0.7"]
    assert re.findall(r'<tr class="best"><td>(\w+)', page.source)[1:] == ["1"]
    assert "details" in page.tags


def test_the_page_stands_alone(folder, monkeypatch):
    monkeypatch.setattr(report, "DPI", 144)
    run = folder(predictions=pairs(("cat", "cat", 2), ("cat", "dog", 1)))
    paths = report.write_report(run)
    assert [path.name for path in paths] == ["curves.png", "confusion.png", "mistakes.png", "report.html"]
    page = Page(run / "report.html")
    assert not re.search(r"https?:|src=\"(?!data:)|url\(|@import", page.source)
    assert not page.tags & {"script", "link", "iframe", "a", "object"}
    assert not [name for name, _ in page.attributes if name in ("href", "srcset") or name.startswith("on")]
    assert ("name", "viewport") in page.attributes and "color-scheme: light dark" in page.source
    for picture, path in zip(page.images, paths, strict=False):
        assert base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) == path.read_bytes()
        assert len(picture["alt"]) > 20
        with Image.open(path) as image:
            assert 300 <= image.width <= 4000 and 300 <= image.height
            image.load()
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["history.csv", "args.json", "test_predictions.csv", *(path.name for path in paths)])  # no temporary files
    before = [path.read_bytes() for path in paths]
    assert report.write_report(run) == paths and [path.read_bytes() for path in paths] == before


def test_hostile_class_names(folder, capsys, recwarn, drawn):
    names = [*ODD, "\udcff bytes"]
    rows = classified(*((f"{t}.jpg", t, p, 0.5) for t, p in zip(names, names[1:] + names[:1], strict=True)))
    run = folder(data="<b>x</b>")
    with open(run / "test_predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    report.main([str(run)])
    assert capsys.readouterr().err == "" and not recwarn
    page = Page(run / "report.html")
    assert not page.tags & {"script", "b"}
    shown = {row[0] for row in page.table("class", "precision", "recall", "F1", "images")}
    assert shown == {*ODD[:-1], "two lines", "? bytes", "macro mean"}
    found = check_drawing(drawn["draw_confusion"])
    words = {artist.get_text() for artist, _, _ in found}
    assert r"\$x^2\$" in words and not any(artist._preprocess_math(artist.get_text())[1] for artist, *_ in found)
    assert max(map(len, words)) <= 30 and any("…" in text for text in words)
    check_drawing(drawn["draw_sheet"])


def test_mistakes_are_those_with_the_highest_probability(folder, blank, monkeypatch):
    sheets = []
    monkeypatch.setattr(report, "thumbnail", lambda path: None)
    monkeypatch.setattr(report, "draw_sheet", lambda sections: (sheets.append(sections), report.new_figure(1, 1))[1])
    rows = [(f"{i}.jpg", "ab"[i % 2], "ab"[i % 3 % 2], (i * 37 % 101) / 101) for i in range(90)]
    run = folder(predictions=classified(*rows))
    report.write_report(run)
    wrong = sorted([row for row in rows if row[1] != row[2]], key=lambda row: row[3])[::-1][: report.WORST]
    (title, tiles), = sheets[0].items()
    assert [tile[1] for tile in tiles] == [row[0] for row in wrong]
    assert tiles[0][2] == [f"true: {wrong[0][1]}", f"predicted: {wrong[0][2]}", f"probability {wrong[0][3]:.1%}"]
    assert title.startswith(f"24 of {sum(a != b for _, a, b, _ in rows)} mistakes")
    assert [row[0] for row in Page(run / "report.html").table("file", "true", "predicted", "probability")] == [
        row[0] for row in wrong]


def test_without_mistakes_the_page_says_so_and_an_old_sheet_goes(folder, blank):
    run = folder(predictions=pairs(("cat", "dog", 1)))
    report.write_report(run)
    assert (run / "mistakes.png").exists()
    folder(predictions=pairs(("cat", "cat", 1)), split="test")
    assert [path.name for path in report.write_report(run)] == ["curves.png", "confusion.png", "report.html"]
    assert "No mistakes." in Page(run / "report.html").text and not (run / "mistakes.png").exists()
    (run / "test_predictions.csv").unlink()
    assert [path.name for path in report.write_report(run)] == ["curves.png", "report.html"]
    assert "No predictions." in Page(run / "report.html").text


def test_predictions_of_val_stand_in_for_test_and_are_named(folder, blank):
    run = folder(predictions=pairs(("cat", "cat", 1)), split="val")
    report.write_report(run)
    assert Page(run / "report.html").facts()["judged on"].startswith("val, which chose best.pt")
    folder(predictions=pairs(("cat", "dog", 2)), split="test")
    report.write_report(run)
    assert Page(run / "report.html").facts()["judged on"] == "test"


def test_predictions_without_truth_are_shown_and_not_judged(folder, blank):
    """As predict.py writes them into a run folder: the truth of some is empty, or there is no such column at all."""
    rows = classified(("a.png", "cat", "cat", 0.9), ("b.png", "", "dog", 0.8), ("c.png", "cat", "dog", 0.7))
    run = folder(predictions=[row | {"p_cat": 0.5, "p_x_prediction": 0.5} for row in rows])
    report.write_report(run)
    text = Page(run / "report.html").text
    assert "0.5000 (1 of 2 pictures right)" in text and "1 of 3 pictures, whose class is not known" in text
    assert "b.png" not in text and "c.png" in text
    run = folder(predictions=[{k: v for k, v in row.items() if k != "truth"} for row in rows])
    assert [path.name for path in report.write_report(run)] == ["curves.png", "report.html"]
    text = Page(run / "report.html").text
    assert "3 of 3 pictures, whose class is not known" in text and "No predictions whose truth is known." in text
    numbers = [{"file": f"{i}.png", "price": price, "price_prediction": 2.0} for i, price in enumerate((1.0, "", 5.0))]
    for some, said in ((numbers, "MAE 2,"), ([{k: v for k, v in row.items() if k != "price"} for row in numbers], "0 of 3")):
        run = folder(predictions=some, monitor="val_loss")
        report.write_report(run)
        assert said in Page(run / "report.html").text
    # A target may be called so.
    run = folder(predictions=[{"file": "0.png", "a_prediction": 1.0, "a_prediction_prediction": 2.0}])
    assert report.read_predictions(run)[2] == ["a_prediction"]


def test_a_hundred_classes(monkeypatch):
    monkeypatch.setattr(report, "draw_sheet", lambda sections: None)
    names = [f"kind_{i:02d}_of_a_thing" for i in range(100)]
    rows = classified(*(("x.jpg", names[i % 100], names[(i + (i % 7 == 0)) % 100], 0.5) for i in range(3000)))
    _, pictures = report.judge_classes(rows, lambda file: None)
    figure, _, below = pictures["confusion.png"]
    scores = [float(score) for score in re.findall(r"<td>([0-9.]+)</td><td>\d+</td></tr>", below)]
    assert len(scores) == 101 and scores[:100] == sorted(scores[:100])
    assert set(names) <= {artist.get_text() for artist, _, _ in check_drawing(figure)}
    assert figure.axes[0].bbox.width > 100 * 0.18 * 144  # pixels: the long names have taken no room from the cells


def test_ten_thousand_predictions(folder):
    run = folder(predictions=pairs(*((t, p, 100) for t in "abcdefghij" for p in "abcdefghij")))
    report.write_report(run)
    assert Page(run / "report.html").facts()["accuracy"] == "0.1000 (1000 of 10000 pictures right)"


def test_confusion_of_two_classes():
    counts = report.Counter({("cat", "cat"): 7, ("cat", "dog"): 3, ("dog", "dog"): 5})
    figure = report.draw_confusion(counts, report.class_scores(counts))
    found = check_drawing(figure)
    axes = figure.axes[0]
    cells = {artist.get_position(): artist.get_text() for artist, owner, _ in found if artist in axes.texts}
    assert cells == {(0, 0): "7\n70%", (1, 0): "3\n30%", (0, 1): "0\n0%", (1, 1): "5\n100%"}  # x: prediction, y: truth
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    lightness = [sum(axes.images[0].cmap(i / 10)[:3]) for i in range(11)]
    assert lightness == sorted(lightness, reverse=True)  # a sequence in grey, too


# ---- curves


def lines_of(axes):
    return {line.get_color(): line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_linestyle() != "-."}


@pytest.mark.parametrize("count", [1, 4, 200])
def test_curves(count):
    best = min(2, count - 1)
    history = epochs(count, old_val_loss=lambda e: math.nan if e % 2 else 0.3,
                     val_accuracy=lambda e: 0.9 - abs(e - 2) / 300)
    figure = report.draw_curves(history, {"unfreeze": ["1:layer4,layer3@1e-4", "2:all", "900:x"]}, best)
    found = check_drawing(figure)
    loss, accuracy, rate = figure.axes[:3]
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy", "learning rate"] + ["thaws"] * (count > 1)
    assert rate.get_yscale() == ("log" if count > 1 else "linear")
    marks = [line.get_xdata()[0] for line in accuracy.lines if line.get_linestyle() == "-."]
    assert marks == [1, 2][: max(0, count - 1)]
    if count > 1:
        words = {artist.get_text() for artist, axes, _ in found if axes is figure.axes[3]}
        assert {"1:layer4,layer3@1e-4", "2:all"} <= words and "900:x" not in words
        old = next(line for line in loss.lines if line.get_linestyle() == ":")
        assert list(old.get_xdata()) == list(range(0, count, 2)) and set(old.get_ydata()) == {0.3}
        assert len({line.get_linestyle() for line in lines_of(loss).values()}) == 3  # told apart without colours
    ring = next(line for line in accuracy.lines if line.get_markerfacecolor() == "none")
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([best], [history[best]["val_accuracy"]])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"training", "validation", "old validation", f"best epoch, {best}"} <= set(legend)
    assert all(float(text.get_text().replace("−", "-")).is_integer() for text in loss.get_xticklabels())


def test_missing_cells_and_unknown_columns(folder):
    history = epochs(6, old_val_accuracy=lambda e: "" if e % 3 else 0.9, val_f1=lambda e: "nan", note=lambda e: "x<y")
    run = folder(history, unfreeze=["3:all"])
    report.write_report(run)
    assert Page(run / "report.html").table(*history[0])[1][-3:] == ["nan", "nan", "x<y"]


def test_a_rate_of_zero_and_one_that_stays_are_no_logarithm():
    for rates, scale in (([0, 0, 0], "linear"), ([1, 1, 0.5], "linear"), ([1, 0.1, 0], "log")):
        history = [row | {"lr": rate} for row, rate in zip(epochs(3), rates, strict=True)]
        figure = report.draw_curves(history, {})
        assert figure.axes[2].get_yscale() == scale


# ---- texts


def of_texts(words, *rows):
    """Rows of predictions as train_text_classifier.py writes them; rows: (truth, prediction, its probability)."""
    classes = ["no", "yes"]
    p = torch.tensor([[1 - p, p] if guess == "yes" else [p, 1 - p] for _, guess, p in rows], dtype=torch.float64)
    labels = torch.tensor([classes.index(truth) for truth, *_ in rows])
    return text.prediction_rows(words, metrics.prediction_rows(words, p, classes, labels))


def test_the_page_of_texts(folder, monkeypatch, recwarn):
    """The worst mistakes are texts, whole up to 400 characters, and whatever stands in them stays text."""
    def no_thumbnails(*_):
        raise AssertionError("a text is no picture")

    monkeypatch.setattr(report, "draw_sheet", no_thumbnails)
    monkeypatch.setattr(report, "find_picture", no_thumbnails)
    words = [*ODD, "a" * 400, "b" * 200 + "in the middle" + "c" * 199, "right"]
    rows = of_texts(words, *(("yes", "no", 0.99 - i / 100) for i in range(len(words) - 1)), ("no", "no", 0.9))
    history = epochs(3, texts_per_second=lambda e: 100)
    run = folder(history, rows, text_column=["text"], pool="mean", max_length=64)
    (run / "mistakes.png").write_bytes(b"of an earlier report.py")
    assert [path.name for path in report.write_report(run)] == ["curves.png", "confusion.png", "report.html"]
    assert not (run / "mistakes.png").exists() and not recwarn
    page = Page(run / "report.html")
    assert not page.tags & {"script", "b"} and len(page.images) == 2
    shown = page.table("text", "true", "predicted", "probability")
    assert [row[0] for row in shown] == [*ODD[:-1], "two lines", "a" * 400, "b" * 200 + "…" + "c" * 199]
    assert [row[1:] for row in shown] == [["yes", "no", f"{99 - i}.0%"] for i in range(len(words) - 1)]
    title = "10 of 10 mistakes: wrong with the highest probability. Of a text of more than 400 characters, the middle is left out."
    assert title in page.text and page.facts()["accuracy"] == "0.0909 (1 of 11 texts right)"
    assert [row[0] for row in page.table("class", "precision", "recall", "F1", "texts")] == ["yes", "no", "macro mean"]
    assert all(said in page.facts()["options"] for said in ("text_column 'text'", "pool mean", "max_length 64"))
    assert "pictures" not in page.text and "images" not in page.text and "1 of 11 texts are on" in page.images[1]["alt"]


def test_the_page_of_pairs_and_of_a_very_long_text(folder, blank):
    csv.field_size_limit(131_072)  # as Python starts
    words = [("a premise", "it" * 100_000), ("<i>x</i>", "so"), ("one", "more")]
    rows = of_texts(words, ("yes", "no", 0.7), ("no", "yes", 0.8), ("no", "no", 0.6))
    rows[2]["truth"] = ""  # as predict_text.py may write it
    run = folder(epochs(3), rows)
    report.write_report(run)
    page = Page(run / "report.html")
    assert page.table("text", "text_2", "true", "predicted", "probability") == [
        ["<i>x</i>", "so", "no", "yes", "80.0%"], ["a premise", "it" * 100 + "…" + "ti" * 99 + "t", "yes", "no", "70.0%"]]
    assert page.facts()["not judged"] == "1 of 3 texts, whose class is not known"
    assert csv.field_size_limit() == 131_072
    write_csv(run / "test_predictions.csv", [{"text": "x", "prediction": "no", "probability": ""}])
    with pytest.raises(report.ReportError, match="test_predictions.csv lacks a text, prediction, probability in some row"):
        report.write_report(run)


# ---- several labels per picture


def labelled_rows(count=60, names=("sea", "two words", "rare")):
    """Each label by another rule; some answers are not known."""
    rows = []
    for i in range(count):
        p = [((i * (7 + k)) % 20 + 0.5) / 20 for k in range(len(names))]
        given = [name for name, value in zip(names, p, strict=True) if value >= 0.5]
        row = {"file": f"{i}.jpg", "labels": ",".join(given)} | {f"p_{n}": v for n, v in zip(names, p, strict=True)}
        rows.append(row | {f"true_{n}": "" if (i + k) % 9 == 0 else int((i * (5 + k)) % 11 < 6 and k < 2) for k, n in enumerate(names)})
    return rows


def test_the_page_of_several_labels(folder, monkeypatch):
    sheets = []
    monkeypatch.setattr(report, "draw_sheet", lambda sections: (sheets.append(sections), report.new_figure(1, 1))[1])
    rows, names = labelled_rows(), ["sea", "two words", "rare"]
    run = folder(epochs(3, val_map=lambda e: e / 3), rows, monitor="val_map", separator=",")
    assert [path.name for path in report.write_report(run)] == ["curves.png", "labels.png", "mistakes.png", "report.html"]
    page = Page(run / "report.html")
    p, truth = (torch.tensor([[float(row[f"{kind}_{n}"] if row[f"{kind}_{n}"] != "" else "nan") for n in names] for row in rows]).double()
                for kind in ("p", "true"))
    scores = metrics.label_scores(p, truth, [0.5] * 3)
    assert page.facts()["mean average precision"].startswith(f"{scores['map']:.4f}, over the 2 of 3 labels")
    assert page.facts()["macro F1"] == f"{scores['macro_f1']:.4f}" and page.facts()["micro F1"].startswith(f"{scores['micro_f1']:.4f} (")
    shown = page.table("label", "pictures", "share", "average precision", "precision", "recall", "F1")
    by_hand = {line.split("  ")[0]: line.split() for line in metrics.label_report(names, p, truth, [0.5] * 3).splitlines()}
    for name, pictures, share, ap, *ratios in shown:
        words = by_hand[name][len(name.split()):]
        assert [pictures, share, *ratios] == [words[0], words[1], *words[4:7]]
        assert ap == words[2] or (ap, words[2]) == ("nan", "-")
    assert [row[0] for row in shown][-1] == "rare"  # of which there is none
    for k, name in enumerate(names):
        known = [(p[i, k].item(), f"{i}.jpg") for i in range(60) if truth[i, k] == 1 and p[i, k] < 0.5]
        title = next((title for title in sheets[0] if title.startswith(f"{name}: missed")), None)
        assert [tile[1] for tile in sheets[0][title]] == [file for _, file in sorted(known)[:4]] if title else not known
        alarms = sorted([(-p[i, k].item(), i) for i in range(60) if truth[i, k] == 0 and p[i, k] >= 0.5])
        tiles = sheets[0][f"{name}: false alarm, 4 of {len(alarms)}"]
        assert sorted(tile[2][1] for tile in tiles) == sorted(f"probability {-value:.1%}" for value, _ in alarms[:4])
    check_drawing(report.draw_labels([("a" * 70, 3, 0.1, 0.4), ("b", 0, 0.0, math.nan), ("$c", 9, 1.0, 1.0)]))


def test_labels_without_truth_are_shown_and_not_judged(folder, blank):
    rows = [{name: value for name, value in row.items() if not name.startswith("true_")} for row in labelled_rows(5)]
    run = folder(epochs(3), rows)
    assert [path.name for path in report.write_report(run)] == ["curves.png", "report.html"]
    assert Page(run / "report.html").facts()["not judged"] == "5 of 5 pictures, whose labels are not known"
    assert report.better_is_lower("val_map") is False and report.label_names(["file", "labels", "labels_prediction"]) == []


# ---- regression


def regressed(count, targets=("price",), ranged=True, scale=1e6):
    rows = []
    for i in range(count):
        row = {"file": f"{i}.jpg"}
        for k, target in enumerate(targets):
            truth = scale * (1 + (i * 7 + k) % 13)
            guess = truth * (1 + ((i * 5 + k) % 11 - 5) / 20)
            row |= {target: truth, f"{target}_prediction": guess}
            if ranged:
                row |= {f"{target}_q0.05": guess * 0.8, f"{target}_q0.5": guess, f"{target}_q0.95": guess * 1.1}
        rows.append(row)
    return rows


def test_the_page_of_a_regression(folder, blank):
    rows = regressed(40, ("price", "area"))
    run = folder(epochs(3, val_mae=lambda e: 3 - e), rows, target=["price", "area"], monitor="val_loss")
    assert [path.name for path in report.write_report(run)] == [
        "curves.png", "predicted.png", "residuals.png", "mistakes.png", "report.html"]
    page = Page(run / "report.html")
    for target in ("price", "area"):
        t, p = ([row[name] for row in rows] for name in (target, f"{target}_prediction"))
        errors, mean = [abs(a - b) for a, b in zip(t, p, strict=True)], sum(t) / 40
        squares, spread = sum(e**2 for e in errors), sum((a - mean) ** 2 for a in t)
        inside = sum(row[f"{target}_q0.05"] <= row[target] <= row[f"{target}_q0.95"] for row in rows) / 40
        assert page.facts()[target] == (
            f"MAE {sum(errors) / 40:.6g}, RMSE {(squares / 40) ** 0.5:.6g}, R2 {1 - squares / spread:.6g}, inside "
            f"{inside:.6g}, on 40 of 40 pictures, inside: from {target}_q0.05 to {target}_q0.95")
        shown = [row for row in page.table("file", "target", "true", "predicted", "error") if row[1] == target]
        assert [float(row[4]) for row in shown] == [float(f"{e:.6g}") for e in sorted(errors, reverse=True)[:12]]


def test_a_page_of_more_targets_than_can_be_drawn(folder):
    """15 landmarks have 30 coordinates: drawn whole, the curves alone would be 21,000 pixels high."""
    targets = [f"x{i}" for i in range(30)]
    scores = {f"val_{score}_{t}": lambda e: 3 - e for score in ("mae", "rmse", "r2", "medape") for t in targets}
    history = epochs(2, **scores, val_r2=lambda e: 1 - 1 / (e + 2))
    run = folder(history, regressed(5, targets, ranged=False), target=targets, monitor="val_r2")
    report.write_report(run)
    page = Page(run / "report.html")
    assert page.facts()["pictures"] == "of the first 12 of 30 targets"
    drawn = [axes.get_title() for axes in report.draw_curves(history, {"monitor": "val_r2"}).axes]
    assert drawn[:3] == ["loss", "r2", "accuracy"] and drawn[3] == "mae_x0" and len(drawn) == 25  # and the rate
    named = re.search("Without a curve, but in the history below: (.*?)[.]", page.text)[1].split(", ")
    assert named == [name.removeprefix("val_") for name in scores][21:]
    assert set(targets) < set(page.facts()) and len(page.table("file", "target", "true", "predicted", "error")) >= 30
    for name in ("curves.png", "predicted.png", "residuals.png", "mistakes.png"):
        width, height = Image.open(run / name).size
        assert height < 45 * report.DPI, name  # inches


def test_the_loss_of_quantiles_is_not_that_of_the_option(folder, blank):
    run = folder(loss="huber", quantiles=[0.1, 0.5], monitor="val_loss")
    report.write_report(run)
    assert "quantiles 0.1, 0.5" in Page(run / "report.html").facts()["options"]
    assert "loss huber" not in Page(run / "report.html").facts()["options"]
    folder(loss="huber", monitor="val_loss")
    report.write_report(run)
    assert "loss huber" in Page(run / "report.html").facts()["options"]


@pytest.mark.parametrize("count, ranged, log, scale", [(1, False, False, 1e6), (40, True, True, 1e6),
                                                       (400, True, False, 1e-4)])
def test_numbers_are_drawn_whole(count, ranged, log, scale):
    rows = regressed(count, ("price$", "area_" * 30), ranged, scale)
    values = {name: [(row[name], row[f"{name}_prediction"], row.get(f"{name}_q0.05"), row.get(f"{name}_q0.95"))
                     for row in rows] for name in ("price$", "area_" * 30)}
    predicted, residuals = report.draw_numbers(values, log)
    check_drawing(predicted)
    check_drawing(residuals)
    for axes, points in zip(predicted.axes, values.values(), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == ("log" if log else "linear")
        assert axes.get_xlim() == axes.get_ylim()
        low, high = axes.get_xlim()
        assert all(low < value < high for point in points for value in point if value is not None)
        dots, diagonal = axes.lines
        assert list(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == [point[:2] for point in points]
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
        if ranged:
            assert [list(s[:, 1]) for s in axes.collections[0].get_segments()] == [[p[2], p[3]] for p in points]
    for axes, points in zip(residuals.axes[::2], values.values(), strict=True):
        assert list(axes.lines[0].get_ydata()) == [p - t for t, p, *_ in points]
    assert sum(bar.get_height() for bar in residuals.axes[1].patches) == count


def test_numbers_that_are_not_finite_are_left_out_and_counted(folder, blank):
    rows = regressed(3, ranged=False)
    rows[1]["price_prediction"] = math.inf
    run = folder(predictions=rows)
    report.write_report(run)
    assert Page(run / "report.html").facts()["price"].endswith("on 2 of 3 pictures")
    folder(predictions=[row | {"price_prediction": math.nan} for row in rows])
    report.write_report(run)
    assert "0 of 3" in Page(run / "report.html").facts()["price"]


# ---- thumbnails


def test_thumbnails_are_upright_and_whole(tmp_path):
    picture = Image.new("RGB", (400, 200), "blue")
    ImageDraw.Draw(picture).rectangle((0, 0, 400, 50), fill="red")  # at the top; turned by EXIF, on the right
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = report.thumbnail(tmp_path / "turned.jpg")
    assert found.size == (report.SIDE, report.SIDE)
    near = [tuple(round(v / 255) for v in found.getpixel((x, 140))) for x in (20, 100, 200, 260)]
    assert near == [(1, 1, 1), (0, 0, 1), (1, 0, 0), (1, 1, 1)]
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert report.thumbnail(tmp_path / "clear.png").getpixel((140, 140)) == (255, 255, 255)
    halves = b"\x60\xea" * 1250 + b"\x30\x75" * 1250  # 60000, 30000
    Image.frombytes("I;16", (50, 50), halves).save(tmp_path / "grey.png")
    assert [report.thumbnail(tmp_path / "grey.png").getpixel((140, y))[0] // 5 for y in (20, 260)] == [51, 25]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    assert report.thumbnail(tmp_path / "broken.jpg") is None


def test_missing_pictures_leave_a_tile_with_their_name(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "there.png")
    names = "gone/" + "long_name_" * 9 + ".jpg"
    lines = ["true: " + "W" * 60, "predicted: 猫" + "M" * 60, "probability 99.0%"]
    tiles = [(tmp_path / "there.png", "there.png", lines), (None, names, lines), (tmp_path, "folder.png", lines)]
    figure = report.draw_sheet({"a title": tiles * 2, "$another$ " * 20: tiles})
    found = check_drawing(figure)
    assert [len(axes.images) for axes in figure.axes] == [1, 0, 0] * 3
    words = [artist.get_text() for artist, axes, _ in found if axes is not None]
    assert words[0].startswith("not found:\nlong_name") and words[1] == "not read:\nfolder.png"
    below = sorted((box for artist, axes, box in found if axes is None and artist.get_text().startswith("true")),
                   key=lambda box: (-box.y0, box.x0))
    assert all(a.x1 < b.x0 or b.y1 < a.y0 for a, b in zip(below, below[1:], strict=False))


def test_pictures_are_found_again(tmp_path, monkeypatch):
    for place in ("start/data/test/a.png", "start/data/labels/b.png", "c.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    run = tmp_path / "start/runs/one"
    run.mkdir(parents=True)
    options = {"data": "data", "labels": "labels/x.csv", "output": "runs/one"}
    monkeypatch.chdir(tmp_path)
    for file, place in (("data/test/a.png", "start/data/test/a.png"), ("test/a.png", "start/data/test/a.png"),
                        ("b.png", "start/data/labels/b.png"), ("c.png", "c.png"), (str(tmp_path / "c.png"), "c.png")):
        assert os.path.samefile(report.find_picture(file, run, options), tmp_path / place)
    assert report.find_picture("a.png", run, options) is None
    monkeypatch.chdir(tmp_path / "start/data")
    assert report.find_picture("test/a.png", run, {}) is not None


# ---- advice


def history_of(train_loss, val_loss, **columns):
    columns |= {"train_loss": train_loss, "val_loss": val_loss}
    return [{"epoch": e} | {name: values[e] for name, values in columns.items()} for e in range(len(val_loss))]


# Made for each rule: what the next rows change is the only reason for their other answer.
BY_HEART, RISING, ONCE_BETTER = [1, 0.5, 0.3, 0.2, 0.15, 0.1], [1, 0.5, 0.6, 0.7, 0.8, 0.9], [0.5, 0.8, 0.7, 0.7, 0.7, 0.7]
CHANCE, FLAT, HALF = [0.9, 0.71, 0.69, 0.7, 0.69], [0.7, 0.69, 0.7, 0.7, 0.7], [0.5, 0.52, 0.5, 0.48, 0.5]
FALLING, RISEN = [1, 0.8, 0.6, 0.5, 0.4], [0.5, 0.6, 0.7, 0.8, 0.9]
LEVEL, STAYED = [1, 0.5, 0.51, 0.5, 0.51, 0.51], [0.5, 0.8, 0.7, 0.7, 0.7, 0.7]
TWO, FEW, MANY = {"classes": 2}, {"classes": 2, "pictures": "train 80, val 20, names 0"}, {"pictures": "train 80, val 10000"}


@pytest.mark.parametrize("said, train_loss, val_loss, accuracy, options", [
    ("overfitting: val_loss was lowest in epoch 1 and has risen since", BY_HEART, RISING, ONCE_BETTER, {}),
    ("", BY_HEART, RISING, [0.5, 0.7, 0.75, 0.8, 0.85, 0.9], {}),  # the accuracy still gains
    ("", BY_HEART, [1, 0.5, 0.6, 0.7, 0.9, 0.8], [0.5, 0.8, 0.7, 0.75, 0.7, 0.81], {}),  # the last is the best
    ("a plateau", BY_HEART, [1, 0.5, 0.6, 0.7, 0.9, 0.8], ONCE_BETTER, {}),  # val_loss comes back
    ("a plateau", BY_HEART, [1, 0.5, 0.52, 0.53, 0.54, 0.55], ONCE_BETTER, {}),  # a rise of a tenth, on 100 pictures
    ("overfitting", BY_HEART, [1, 0.5, 0.52, 0.53, 0.57, 0.58], ONCE_BETTER, MANY),
    ("a plateau", BY_HEART, [1, 0.5, 0.52, 0.53, 0.57, 0.58], [0.5, 0.9, 0.8, 0.8, 0.8, 0.8], FEW),  # chance, on 20
    ("a plateau", [10, 0.5, 0.3, 0.2, 0.15, 0.1], [10, *RISING[1:]], ONCE_BETTER, {}),  # little beside what it fell
    ("a plateau", [1, 0.2, 0.19, 0.18, 0.18, 0.17], RISING, ONCE_BETTER, {}),  # training has hardly gone on
    ("a plateau", [1.5, 0.9, 0.7, 0.6, 0.5, 0.45], RISING, ONCE_BETTER, {}),  # augmented: it may not know them by heart
    ("", [0.9, 0.71, 0.69, 0.69, 0.69, 0.68], [0.7, 0.69, 1, 1.5, 2, 3], [0.5] * 6, {}),  # at chance on its own pictures
    ("", [0.7, 0.4, 0.2, 0.1, 0.05, 0.02], [0.7, 0.69, 1, 1.5, 2, 3], [0.5, 0.55, 0.5, 0.5, 0.5, 0.5], TWO),  # BatchNorm
    ("", [0.7, 0.4, 0.2, 0.1, 0.05, 0.02], [0.7, 0.69, 1, 1.5, 2, 3], [0.5, 0.55, 0.5, 0.7, 0.5, 0.5], TWO),  # and luck
    ("", [3, 1.5, 1, 0.5, 0.2, 0.1], [2.3, 1.6, 1.8, 2, 2.2, 2.4], [0.2, 0.45, 0.4, 0.4, 0.4, 0.4], {}),  # of how many?
    ("overfitting", [3, 1.5, 1, 0.5, 0.2, 0.1], [2.3, 1.6, 1.8, 2, 2.2, 2.4], [0.2, 0.45, 0.4, 0.4, 0.4, 0.4], {"classes": 10}),
    ("", BY_HEART[:3], RISING[:3], ONCE_BETTER[:3], {}),  # three epochs are no trend

    ("nothing learned: train_loss stayed near 0.69, that of guessing", CHANCE, FLAT, HALF, TWO),
    ("nothing learned: train_loss stayed near 2.30", [2.4, 2.31, 2.3, 2.29], [2.3] * 4, [0.1, 0.12, 0.1, 0.1], {"classes": 10}),
    ("nothing learned", CHANCE, FLAT, [0.5, 0.6, 0.55, 0.5, 0.65], FEW),  # on 20 pictures that is chance
    ("", CHANCE, FLAT, [0.5, 0.6, 0.55, 0.5, 0.65], MANY | TWO),  # on 10000 it is not
    ("", [6.9, 6.8, 6.7, 6.6], [6.9, 6.7, 6.4, 6.2], [0, 0.02, 0.06, 0.06], FEW | {"classes": 1000}),  # slowly, of many
    ("", CHANCE, FLAT, HALF, {}),  # chance is not known
    ("", [0.9, 0.7, 0.65, 0.6, 0.55], FLAT, HALF, TWO),  # training has begun
    ("", CHANCE, FLAT, HALF, TWO | {"loss": "focal"}),  # its chance is another
    ("", CHANCE, FLAT, HALF, TWO | {"class_weight_mean": "plain"}),
    ("nothing learned", CHANCE, FLAT, HALF, TWO | {"loss": "cross-entropy", "class_weight_mean": "weighted", "mixup": 0.2}),
    ("", [0.1, 0.05, 0.05, 0.05], [0.1, 0.11, 0.12, 0.11], [0.97, 0.96, 0.97, 0.96], TWO),  # all learned in one epoch

    ("val_accuracy was still improving", FALLING, FALLING, RISEN, {}),
    ("", FALLING, FALLING, [0.5, 0.6, 0.7, 0.73, 0.74], {}),  # on 100 pictures that may be chance
    ("val_accuracy was still improving", FALLING, FALLING, [0.5, 0.6, 0.7, 0.73, 0.74], MANY),
    ("", FALLING, FALLING, [0.5, 0.6, 0.85, 0.8, 0.94], FEW),  # 2 of 20 pictures
    ("", FALLING, FALLING, [0.5, 0.6, 0.9, 0.8, 0.9], MANY),  # no better than before
    ("", FALLING, FALLING, [0.5, 0.85, 0.9, 0.9, 0.93], MANY),  # less than a tenth of the whole gain
    ("", FALLING[:3], FALLING[:3], RISEN[:3], {}),
    ("", FALLING, [1, 0.5, 0.4, 0.6, 0.7], RISEN, {}),  # val_loss does not agree
    ("", [1, 0.8, 0.6, 0.6, 0.65], FALLING, RISEN, {}),  # nor train_loss here
    ("", FALLING, FALLING, [0.4, 0.42, 0.44, 0.5, 0.58], TWO),  # at chance

    ("a plateau: val_accuracy was no better in the last 4 of 6 epochs", BY_HEART, LEVEL, STAYED, {}),
    ("a plateau", [0.1] * 5, [0.1] * 5, [1] * 5, {}),
    ("", BY_HEART, LEVEL, STAYED, {"patience": 4}),  # it stops by itself
    ("", BY_HEART, [1, 0.5, 0.51, 0.49, 0.48, 0.47], STAYED, {}),  # val_loss still falls
    ("", BY_HEART[:5], LEVEL[:5], STAYED[:5], {}),  # three epochs
    ("", [0.4] * 10, [0.4] * 5 + [0.3] + [0.4] * 4, [0.7] * 5 + [0.8] + [0.7] * 4, {}),  # less than half of them
    ("", BY_HEART, LEVEL, [0.5, 0.52, 0.5, 0.5, 0.5, 0.5], TWO),  # at chance
    ("", [math.nan] * 5, [math.nan] * 5, [math.nan] * 5, TWO),
])
def test_advice(said, train_loss, val_loss, accuracy, options):
    history = history_of(train_loss, val_loss, val_accuracy=accuracy)
    found = report.advice(history, "val_accuracy", options)
    assert found.startswith(said) and bool(found) == bool(said) and "\n" not in found
    assert report.advice(history, "val_nothing", options) == ""
    for row in history:
        row["texts_per_second"] = 1.0
    of_texts = found.replace("more pictures, more --augment or --freeze", "more texts, --freeze")
    assert report.advice(history, "val_accuracy", options) == of_texts
    # the same by balanced accuracy, which alone counts where there is one: that of a majority is no skill
    majority = history_of(train_loss, val_loss, val_balanced_accuracy=accuracy, val_accuracy=[0.9] * len(accuracy))
    assert report.advice(majority, "val_balanced_accuracy", options) == found.replace("val_a", "val_balanced_a")


@pytest.mark.parametrize("said, train_loss, val_loss, r2", [
    ("overfitting", BY_HEART, RISING, [0, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ("", BY_HEART, RISING, [-1, 0.05, -0.4, -0.3, -0.2, -0.1]),  # by heart from the start
    ("nothing learned: val_r2 stayed near 0", [0.5, 0.48, 0.49, 0.48], [0.5] * 4, [-0.1, -0.02, 0.01, -0.5]),
    ("", [0.5, 0.4, 0.3, 0.2], [0.5] * 4, [-0.1, -0.02, 0.01, -0.5]),  # training has begun
    ("", [0.5, 0.48, 0.49, 0.48], [0.5] * 4, [-0.1, -0.02, 0.3, -0.5]),
    ("", [0.5, 0.48, 0.49, 0.48], [0.5] * 4, [math.nan] * 4),
    ("val_r2 was still improving", FALLING, FALLING, RISEN),
    ("val_r2 was still improving", FALLING, [0.1 * loss for loss in FALLING], RISEN),  # a loss is small or not by itself
    ("a plateau", BY_HEART, LEVEL, STAYED),
])
def test_advice_on_numbers(said, train_loss, val_loss, r2):
    history = history_of(train_loss, val_loss, val_r2=r2)
    found = report.advice(history, "val_r2")
    assert found.startswith(said) and bool(found) == bool(said)
    if not said.startswith("a plateau"):  # by the loss, the same
        assert report.advice(history, "val_loss") == found.replace("val_r2 was", "val_loss was")


def test_a_run_gives_its_advice_what_it_has_to_know(folder, train, regress, monkeypatch):
    """The number of classes and of validation pictures, by way of args.json, at the end of a run and on its page."""
    history = history_of(CHANCE, FLAT, val_accuracy=HALF)
    for options, said in (({"classes": 2}, True), ({}, False)):
        run = folder(history, **options)
        assert ("nothing learned" in report.sum_up(run, history, "val_accuracy", False)) is said
        report.write_report(run)
        assert ("nothing learned" in Page(run / "report.html").text) is said
    options = json.loads((train() / "args.json").read_text())
    assert options["classes"] == 2 and options["pictures"].startswith("train 20, val 8, ")
    assert report.noise_of(options) == 1 / math.sqrt(8)
    options = json.loads((regress() / "args.json").read_text())
    assert "classes" not in options and options["pictures"].startswith("train 20, val 8, ")


def test_best_row_knows_what_is_better_and_who_wins_a_tie():
    history = [{"val_loss": v, "val_r2": v} for v in (math.nan, 3, 1, 1, 3)]
    assert (report.best_row(history, "val_loss"), report.best_row(history, "val_r2")) == (2, 1)
    history = [{"val_loss": loss, "val_accuracy": accuracy} for loss, accuracy in ((3, 0.5), (2, 0.9), (1, 0.9), (1, 0.9), (0, 0.7))]
    assert report.best_row(history, "val_accuracy") == 2
    assert report.best_row([{"val_accuracy": 0.5}, {"val_accuracy": 0.5}], "val_accuracy") == 0
    assert report.best_row(history, "val_f1") is None


# ---- errors


def test_errors_name_the_way_out_and_leave_files_untouched(folder, blank, tmp_path, error_of, monkeypatch):
    run = folder(predictions=pairs(("cat", "dog", 2)))
    report.write_report(run)

    def full(*paths):
        raise OSError(28, "No space left on device")

    def untouched():
        return {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".png", ".html", ".tmp")}

    def refused(words, file=None, content=None):
        saved = file and file.read_bytes()
        if file:
            file.write_bytes(content)
        before = untouched()
        assert re.search(words, error_of(report.main, [str(run)]))
        assert untouched() == before
        if file:
            file.write_bytes(saved)

    assert "no such folder" in error_of(report.main, [str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    assert re.search("cannot read .*history.csv.* run", error_of(report.main, [str(tmp_path / "empty")]))
    for content in (b"", b"epoch,val_loss\n", b"a,b\n1,2\n", b"epoch,val_loss\n,1\n"):
        refused("history.csv holds no epochs", run / "history.csv", content)
    refused("history.csv is damaged in line 3.*'0.x'", run / "history.csv", b"epoch,val_loss\n0,1\n1,0.x\n")
    refused("history.csv is damaged in line 2 .more cells", run / "history.csv", b"epoch,val_loss\n0,1,2\n")
    refused("args.json is damaged", run / "args.json", b"{")
    for content in (b"[]", b'{"unfreeze": 3}'):
        refused("args.json holds no options", run / "args.json", content)
    refused("test_predictions.csv lacks", run / "test_predictions.csv", b"file,truth,prediction,probability\na,b,c,\n")
    refused("test_predictions.csv lacks", run / "test_predictions.csv", b"x,y\na,b\n")
    refused("test_predictions.csv is damaged in line 2", run / "test_predictions.csv", b"file,p,p_prediction\na,1,z\n")
    for name in ("confusion.png", "report.html"):
        refused(f"{name} is not of a report", run / name, b"my own")
    with monkeypatch.context() as patch:
        patch.setattr(report.os, "replace", full)
        refused("could not write the report into .*No space left on device")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        refused("pip install matplotlib")


def test_it_leaves_matplotlibs_state_alone(folder):
    import matplotlib

    before = repr(matplotlib.rcParams), warnings.filters[:]
    report.write_report(folder(predictions=pairs(("猫", "dog", 1))))
    assert repr(matplotlib.rcParams) == before[0] and warnings.filters == before[1]


# ---- after training


def test_a_run_ends_with_a_report_and_says_where(train, regress, classify_text, capsys):
    for run, pictures, script, what in ((train, {"confusion.png"}, "predict.py", "PICTURES"),
                                        (regress, {"predicted.png", "residuals.png"}, "predict.py", "PICTURES"),
                                        (classify_text, {"confusion.png"}, "predict_text.py", "TEXTS")):
        folder = run(no_report=None, epochs=2)
        out = capsys.readouterr().out
        assert f"files are in {folder}; look at {folder}/report.html\nnext: python {script} --checkpoint {folder}/best.pt {what}\n" in out
        assert {"curves.png", "report.html"} | pictures <= set(os.listdir(folder))
    assert "of 8 texts right" in Page(folder / "report.html").facts()["accuracy"]
    folder = train("--no-test", no_report=None)
    assert not list(folder.glob("*_predictions.csv")) and (folder / "report.html").exists()
    assert "accuracy" not in capsys.readouterr().out.partition("best.pt: ")[2].replace("val_accuracy", "")


def test_a_report_that_fails_does_not_fail_the_run(train, monkeypatch, capsys):
    def fail(folder):
        raise report.ReportError("no room")

    monkeypatch.setattr(report, "write_report", fail)
    folder = train(no_report=None)
    assert f"note: no report: no room\nfiles are in {folder}\n" in capsys.readouterr().out


def test_numbers_for_tensorboard(train, monkeypatch, error_of, tmp_path):
    import sys
    import types

    import train_classifier

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    assert "pip install tensorboard" in error_of(train, "--tensorboard", output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, float(value), step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    folder = train("--tensorboard", epochs=1)
    train_classifier.main(["--resume", str(folder / "last.pt"), "--epochs", "2"])
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [[(name, float(value), int(row["epoch"])) for name, value in row.items() if name != "epoch"] for row in rows]
    board = str(folder / "tensorboard")
    assert seen == [(board, 0), *expected[0], (board, 1), *expected[1]]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # gone on another machine
    resumed = ["--resume", str(folder / "last.pt"), "--epochs", "3"]
    before = (folder / "args.json").read_bytes()
    assert "--no-tensorboard" in error_of(train_classifier.main, resumed)
    assert (folder / "args.json").read_bytes() == before
    train_classifier.main([*resumed, "--no-tensorboard"])
