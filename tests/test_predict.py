"""predict.py as a user runs it, on a checkpoint trained on small drawn pictures."""

import csv
import os
import re
import shutil
import unicodedata

import pytest
import torch
import torchvision
from PIL import Image

import data
import predict
import train_classifier
import train_regressor
from conftest import MODEL, SMALL, command_line, draw, read
from test_model import Payload


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a training. Not to be changed by a test."""
    output = tmp_path_factory.mktemp("predict") / "run"
    train_classifier.main(command_line([], SMALL | {"data": pictures, "output": output, "epochs": 3, "lr": 0.01, "batch_size": 4}))
    return output


def call(*argv):
    """The exit status of predict.py."""
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(a) for a in argv])
    return stopped.value.code


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_files_folders_and_globs(run, pictures, tmp_path, capsys):
    file = pictures / "test/dog/dog.1.png"
    argv = [file, pictures / "val/cat", f"{pictures}/test/cat/*.png", file]
    assert call("--checkpoint", run / "best.pt", *argv, "--csv", tmp_path / "x.csv", "--top-k", 5) == 0
    rows = rows_of(tmp_path / "x.csv")
    expected = [file, *sorted((pictures / "val/cat").iterdir()), *sorted((pictures / "test/cat").iterdir())]
    assert [row["file"] for row in rows] == [str(p) for p in expected]  # in the order given, no file twice
    assert list(rows[0]) == ["file", "prediction", "probability", "prediction_2", "probability_2"]
    assert all(float(r["probability"]) + float(r["probability_2"]) == pytest.approx(1) for r in rows)
    out = capsys.readouterr().out
    assert out.splitlines()[-8].split()[0] == str(file) and "accuracy" not in out.splitlines()[-1]
    # another route: plain torchvision on one picture
    plain = torchvision.models.get_model(MODEL, weights=None, num_classes=2).eval()
    plain.load_state_dict(read(run / "best.pt")["model"])
    x = data.eval_transform(32, resize_size=37)(torchvision.transforms.v2.functional.pil_to_tensor(data.decode(file)))
    x = torchvision.transforms.v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    p = plain(x[None]).softmax(1)[0]
    assert rows[0]["prediction"] == ["cat", "dog"][int(p.argmax())]
    assert float(rows[0]["probability"]) == pytest.approx(p.max().item(), abs=1e-4)


def test_scores_when_the_subfolders_are_the_classes(run, pictures, capsys, tmp_path):
    capsys.readouterr()
    assert call("--checkpoint", run / "best.pt", pictures / "test", "--csv", tmp_path / "x.csv") == 0
    out = capsys.readouterr().out
    mine, scripts = rows_of(tmp_path / "x.csv"), rows_of(run / "test_predictions.csv")
    assert [r["prediction"] for r in mine] == [r["prediction"] for r in scripts]
    for a, b in zip(mine, scripts, strict=True):
        assert float(a["probability"]) == pytest.approx(float(b["probability"]), abs=1e-5)
    accuracy = sum(r["truth"] == r["prediction"] for r in mine) / 6
    assert f"accuracy {accuracy:.4f} on 6 pictures" in out and "macro mean" in out
    assert call("--checkpoint", run / "best.pt", pictures) == 0  # train/, val/ and test/ are no classes
    captured = capsys.readouterr()
    assert "macro mean" not in captured.out
    assert f"hint: class folders lie one lower: for scores give {pictures}/test, {pictures}/train, {pictures}/val" in captured.err


@pytest.fixture
def unread(run, monkeypatch):
    """Pictures are listed, scored and written, but not read: all are cats, with probability 0.75."""
    logits = torch.tensor([0.75, 0.25]).log()

    def run_network(args, state, device, paths):
        order = [sorted(state["classes"]).index(name) for name in state["classes"]]
        return [logits[order].repeat(len(paths), 1)], {place: "bad" for place, path in enumerate(paths) if "bad" in path}

    monkeypatch.setattr(predict, "run_network", run_network)


def scores_of(capsys, tmp_path, *argv, status=0):
    """The line of scores, what is said, and {file below tmp_path: truth, None without such a column}."""
    capsys.readouterr()
    (tmp_path / "table.csv").unlink(missing_ok=True)
    assert call(*argv, "--csv", tmp_path / "table.csv") == status
    captured = capsys.readouterr()
    words = [line for line in captured.out.splitlines() if line.startswith("accuracy")]
    said = captured.err.replace(f"{tmp_path}/", "").splitlines()
    truth = {os.path.relpath(row["file"], tmp_path): row.get("truth") for row in rows_of(tmp_path / "table.csv")}
    return words[0] if words else None, said, truth


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize("names, given, scores, said, truth", [
    (["f/cat/1.png", "f/dog/1.png", "f/stray.png"], ["f"], "accuracy 0.5000 on 2 pictures",
     ["note: 1 picture is in no class folder: predicted, not scored (f/stray.png)"], ["", "cat", "dog"]),
    (["f/cat/1.png", "f/dog/1.png", "f/horse/1.png", "f/horse/2.png", "f/Dog/1.png"], ["f"], "accuracy 0.5000 on 2 pictures",
     ["note: 3 pictures are in folders that are no class of the model (cat, dog): predicted, not scored (f/Dog, f/horse)"],
     ["", "cat", "dog", "", ""]),
    (["f/cat/siam/1.png", "f/cat/2.png", "f/dog/cat/1.png"], ["f"], "accuracy 0.6667 on 3 pictures",
     ["note: 2 pictures are deeper in a class folder: scored as of that class (f/cat/siam, f/dog/cat)"], ["cat", "cat", "dog"]),
    (["f/cat/1.png", "f/cat/2.png", "x/1.png"], ["f", "x/*.png"],
     "accuracy 1.0000 on 2 pictures, balanced accuracy 1.0000 over the 1 of 2 classes that have any",
     ["note: 1 picture is in no class folder: predicted, not scored (x/1.png)"], ["cat", "cat", ""]),
    (["f/cat/1.png", "g/dog/1.png", "g/notes.txt"], ["f", "g"], "accuracy 0.5000 on 2 pictures",
     ["note: passed over: 1 .txt"], ["cat", "dog"]),
    (["f/val/cat/1.png", "f/test/dog/1.png"], ["f"], None,
     ["note: 2 pictures are in folders that are no class of the model (cat, dog): predicted, not scored (f/test, f/val)",
      "hint: class folders lie one lower: for scores give f/test, f/val"], [None, None]),
    (["f/cat/1.png", "f/dog/1.png"], ["f/cat", "f/dog/1.png"], None,
     ["hint: for scores give the folder that holds the class folders, not what is in f/cat, f/dog"], [None, None]),
    (["f/1.png", "f/2.png"], ["f"], None, [], [None, None]),
    (["f/cat/1.png", "f/dog/1.png"], ["f/dog/1.png", "f/../f", "f/cat"], "accuracy 0.5000 on 2 pictures", [], ["dog", "cat"]),
    (["f/cat/bad.png", "f/cat/1.png"], ["f"],
     "accuracy 1.0000 on 1 picture, balanced accuracy 1.0000 over the 1 of 2 classes that have any",
     ["cannot read f/cat/bad.png (bad): passed over"], ["cat"]),
    (["f/cat/bad.png", "f/1.png"], ["f"], None,
     ["note: 1 picture is in no class folder: predicted, not scored (f/1.png)", "cannot read f/cat/bad.png (bad): passed over"],
     [""]),
])
def test_what_is_scored_and_what_is_said_of_the_rest(run, unread, tmp_path, capsys, names, given, scores, said, truth):
    touch(tmp_path, *names)
    found = scores_of(capsys, tmp_path, "--checkpoint", run / "best.pt", *(tmp_path / name for name in given),
                      status=int("bad" in str(said)))
    assert (found[0], found[1], list(found[2].values())) == (scores, said, truth)


def test_a_picture_in_the_folder_of_its_class_where_the_folder_is_not_named(run, unread, tmp_path, capsys, monkeypatch):
    touch(tmp_path, "cat/1.png", "cat/2.png")
    monkeypatch.chdir(tmp_path / "cat")
    for given in (["."], ["1.png", "2.png"]):
        assert scores_of(capsys, tmp_path, "--checkpoint", run / "best.pt", *given)[:2] == (
            None, ["hint: for scores give the folder that holds the class folders, not what is in ."])
    assert scores_of(capsys, tmp_path, "--checkpoint", run / "best.pt", "1.png")[:2] == (None, [])
    assert scores_of(capsys, tmp_path, "--checkpoint", run / "best.pt", "..")[0].startswith("accuracy 1.0000 on 2 pictures")


def test_names_of_classes_are_compared_in_nfc(run, unread, tmp_path, capsys):
    """In both directions, and between checkpoints."""
    state = read(run / "best.pt")
    short, long = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    assert short != long
    for name, classes in (("short", [short, "dog"]), ("long", ["dog", long])):
        torch.save(state | {"classes": classes}, tmp_path / f"{name}.pt")
        touch(tmp_path, f"{name}/{short}/1.png", f"{name}/{long}/2.png")
        words, said, truth = scores_of(capsys, tmp_path, "--checkpoint", tmp_path / f"{name}.pt", tmp_path / name)
        assert said == [] and "on 2 pictures" in words
        assert {unicodedata.normalize("NFC", name) for name in truth.values()} == {short}
    both = ["--checkpoint", tmp_path / "short.pt", "--checkpoint", tmp_path / "long.pt", tmp_path / "short"]
    assert scores_of(capsys, tmp_path, *both)[0].startswith("accuracy 1.0000 on 2 pictures")


def test_the_probability_of_every_class(run, train, pictures, tmp_path, capsys, error_of):
    """A column each, in the order of the classes, of one checkpoint and of the mean of two, whose classes have another
    order: the softmax of the networks' own outputs. Terminal and other columns are as without them.
    """
    state = read(run / "best.pt")
    names = ["prediction", "2"]  # names of columns, as nearly as may be
    torch.save(state | {"classes": names}, tmp_path / "a.pt")
    model = {k: v.flip(0) * 3 if k.startswith("fc") else v for k, v in state["model"].items()}
    torch.save(state | {"model": model, "classes": names[::-1]}, tmp_path / "b.pt")

    def softmax(file, weights):
        plain = torchvision.models.get_model(MODEL, num_classes=2).eval()
        plain.load_state_dict(weights)
        x = data.eval_transform(32, resize_size=37)(torchvision.transforms.v2.functional.pil_to_tensor(data.decode(file)))
        x = torchvision.transforms.v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return plain(x[None]).softmax(1)[0]

    one, two = ["--checkpoint", tmp_path / "a.pt"], ["--checkpoint", tmp_path / "a.pt", "--checkpoint", tmp_path / "b.pt"]
    for number, (argv, top_k) in enumerate(((one, 1), (two, 2))):
        argv = [*argv, pictures / "test/cat", "--top-k", top_k]
        assert call(*argv, "--csv", tmp_path / f"{number}.csv", "--all-probabilities") == 0
        shown = capsys.readouterr().out
        rows = rows_of(tmp_path / f"{number}.csv")
        assert list(rows[0])[-2:] == ["p_prediction", "p_2"] and "p_" not in shown
        for row in rows:
            found = [float(row["p_prediction"]), float(row["p_2"])]
            expected = softmax(row["file"], state["model"])
            if argv[:4] == two:
                expected = (expected + softmax(row["file"], model).flip(0)) / 2
            assert found == pytest.approx(expected.tolist(), abs=1e-4) and sum(found) == pytest.approx(1, abs=1e-6)
            assert float(row["probability"]) == max(found) == float(row[f"p_{row['prediction']}"])
        assert call(*argv, "--csv", tmp_path / f"{number}b.csv") == 0
        assert capsys.readouterr().out == shown
        less = [{k: v for k, v in row.items() if k not in ("p_prediction", "p_2")} for row in rows]
        assert rows_of(tmp_path / f"{number}b.csv") == less
    asked = ["--checkpoint", str(run / "best.pt"), str(pictures / "test"), "--all-probabilities"]
    assert "into --csv FILE: name one" in error_of(predict.main, asked)


@pytest.fixture(scope="module")
def numbers(discs, tmp_path_factory):
    """The checkpoint of a regression of two targets. Not to be changed by a test."""
    output = tmp_path_factory.mktemp("numbers") / "run"
    named = SMALL | {"data": discs, "output": output, "target": "radius,place"}
    train_regressor.main(command_line(["--no-test"], named))
    return output / "best.pt"


@pytest.mark.parametrize("rows, note, scored", [
    ([(5.0, 30.0), (7.0, 32.0)], None, (2, 2)),
    ([(5.0, 30.0), None, (7.0, 32.0)], "1 of 3 rows of {file} have no number for radius, place", (2, 2)),
    ([(5.0, None), None, (7.0, 32.0)], "1 of 3 rows of {file} have no number for radius, place", (2, 1)),
    ([None, None], "2 of 2 rows of {file} have no number for radius, place", None),
])
def test_labels_without_numbers(numbers, discs, tmp_path, capsys, rows, note, scored):
    """Rows without a number are predicted; scores are of those that have one."""
    found = [(str(discs / f"test/{i}.png"), values or (None, None)) for i, values in enumerate(rows)]
    cells = [[file, *("" if value is None else repr(value) for value in values)] for file, values in found]
    (tmp_path / "x.csv").write_text("\n".join(map(",".join, [["file", "radius", "place"], *cells])))
    argv = ["--checkpoint", numbers, "--labels", tmp_path / "x.csv", "--csv", tmp_path / "y.csv"]
    assert call(*argv) == 0
    captured = capsys.readouterr()
    without = [line for line in captured.err.splitlines() if "have no number" in line]
    assert len(without) == (note is not None)
    if note:
        assert without[0].startswith(f"note: {note.format(file=tmp_path / 'x.csv')}: predicted, not scored ({discs}/test/")
    written = rows_of(tmp_path / "y.csv")
    assert [row["file"] for row in written] == [file for file, *_ in found] and "nan" not in captured.out.lower()
    assert all(float(row[f"{name}_prediction"]) for row in written for name in ("radius", "place"))
    if scored is None:
        assert "radius" not in written[0] and "MAE" not in captured.out
        return
    assert f"\non the 2 pictures of {tmp_path}/x.csv" in captured.out
    for place, (name, count) in enumerate(zip(("radius", "place"), scored, strict=True)):
        known = {i: values[place] for i, values in enumerate(rows) if values and values[place] is not None}
        assert [row[name] for row in written] == [str(known.get(i, "")) for i in range(len(rows))]
        table = captured.out[captured.out.index(f"\n{name:<15}") :].splitlines()
        errors = [abs(float(written[i][f"{name}_prediction"]) - true) for i, true in known.items()]
        assert float(table[2].split()[2]) == pytest.approx(sum(errors) / count, rel=1e-4)
        assert (f"{name} is known for {count} of {len(rows)} pictures" in table[5:6]) is (count < len(rows))
    assert "--all-probabilities is for classes" in _error(capsys, [*argv, "--all-probabilities"])
    assert f"--top-k is for classes, and {numbers} predicts the numbers radius, place: leave it out\n" in _error(capsys, [*argv, "--top-k", 2])


def _error(capsys, argv):
    assert call(*argv) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("split, rows, scored, said", [
    ("test", ["cat,test", "dog,test", "cat,train"], "accuracy 0.5000 on 2 pictures of test", []),
    (None, ["cat,test", "cat,val"], "accuracy 1.0000 on 2 pictures of {0}, those it was trained on perhaps among them, balanced", []),
    ("test", ["cat,test", ",test", "horse,test", "Cat,test", ",val"], "accuracy 1.0000 on 1 picture of test, balanced accuracy",
     ["1 of 4 rows of {0} have no kind: predicted, not scored (1.png)",
      "2 of 4 rows of {0} have a kind that is no class of the model (horse, Cat): predicted, not scored (2.png, 3.png)"]),
    (None, [",train", ",test"], None, ["2 of 2 rows of {0} have no kind: predicted, not scored (0.png, 1.png)"]),
    (None, ["horse,train"], None, ["1 of 1 rows of {0} have a kind that is no class of the model (horse): predicted, not scored (0.png)"]),
])
def test_classes_in_a_table(run, unread, tmp_path, capsys, split, rows, scored, said):
    """By the columns of the training, and by those named here; all are cats, see `unread`."""
    state = read(run / "best.pt")
    torch.save(state | {"options": state["options"] | {"target": "kind", "file_column": "image"}}, tmp_path / "table.pt")
    touch(tmp_path, *(f"{i}.png" for i in range(len(rows))))
    file = tmp_path / "x.csv"
    file.write_text("image,kind,split\n" + "".join(f"{i}.png,{row}\n" for i, row in enumerate(rows)))
    argv = ["--labels", file, *(["--split", split] if split else [])]
    words, notes, truth = scores_of(capsys, tmp_path, "--checkpoint", tmp_path / "table.pt", *argv)
    assert (words or "").startswith((scored or "").format(file)) and (words is None) == (scored is None)
    assert notes == [f"note: {line.format('x.csv')}" for line in said]
    cells = {f"{i}.png": row.split(",")[0] for i, row in enumerate(rows) if split in (None, row.split(",")[1])}
    expected = {name: cell if cell in ("cat", "dog") else "" for name, cell in cells.items()}
    assert truth == (expected if scored else dict.fromkeys(cells))
    named = ["--checkpoint", run / "best.pt", *argv, "--file-column", "image", "--target", "kind"]
    assert scores_of(capsys, tmp_path, *named) == (words, notes, truth)


def test_tables_whose_columns_are_not_those_of_the_training(run, unread, tmp_path, capsys, error_of):
    state = read(run / "best.pt")
    torch.save(state | {"options": state["options"] | {"target": "kind"}}, tmp_path / "table.pt")
    touch(tmp_path, "t/x/a.png", "u/a.png")
    file = tmp_path / "t/x.csv"
    file.write_text("file,sort\nx/a.png,cat\n")
    trained, folders = ["--checkpoint", tmp_path / "table.pt", "--labels", file], ["--checkpoint", run / "best.pt", "--labels", file]
    words, notes, truth = scores_of(capsys, tmp_path, *trained)
    assert words is None and notes == ["note: t/x.csv has no column 'kind': nothing to score by",
                                       "note: 1 of 1 rows of t/x.csv have no kind: predicted, not scored (t/x/a.png)"]
    words, notes, truth = scores_of(capsys, tmp_path, *folders)
    assert words is None and notes == ["note: predicted, not scored: the model comes from class folders, and no --target names "
                                       "the column of the classes"]
    assert scores_of(capsys, tmp_path, *folders, "--target", "sort")[0].startswith("accuracy 1.0000 on 1 picture")
    as_text = [str(word) for word in folders]
    assert "has no column 'sorts': there are file, sort; did you mean 'sort'?" in error_of(predict.main, [*as_text, "--target", "sorts"])
    assert "has no rows that a column split calls val" in error_of(predict.main, [*as_text, "--split", "val"])
    file.write_text("file,sort\na,cat\n")
    assert list(scores_of(capsys, tmp_path, *folders, "--data", tmp_path / "u")[2]) == ["u/a.png"]
    assert list(scores_of(capsys, tmp_path, *folders)[2]) == ["t/x/a.png"]
    for option in ("split", "data", "file-column", "target"):
        error = error_of(predict.main, [*as_text[:2], str(tmp_path), f"--{option}", "val"])
        assert error == f"error: --{option} only has a meaning with --labels"
    for option in (["--csv", "x.csv"], ["--top-k", "2"], ["--tta"]):
        error = error_of(predict.main, [*as_text[:2], "--weights-only", str(tmp_path / "w.pth"), *option])
        assert error == f"error: {option[0]} only has a meaning with pictures or --labels"
    assert call(*folders, "--csv", file) == 2 and "would write over the labels" in capsys.readouterr().err


def test_an_unreadable_picture_is_named_and_the_rest_predicted(run, pictures, tmp_path, capsys):
    shutil.copytree(pictures / "val/cat", tmp_path / "x")
    whole = (tmp_path / "x/cat.1.png").read_bytes()
    (tmp_path / "x/cat.1.png").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert call("--checkpoint", run / "best.pt", tmp_path / "x", "--csv", tmp_path / "x.csv", "-b", 1) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot read" in err and "cat.1.png" in err
    assert [os.path.basename(r["file"]) for r in rows_of(tmp_path / "x.csv")] == ["cat.0.png", "cat.2.png", "cat.3.png"]
    (tmp_path / "only.jpg").write_bytes(b"")
    assert call("--checkpoint", run / "best.pt", tmp_path / "only.jpg") == 1


def test_weights_only_loads_into_plain_torchvision(run, tmp_path, pictures, error_of):
    assert call("--checkpoint", run / "best.pt", "--weights-only", tmp_path / "w.pth") == 0
    plain = torchvision.models.get_model(MODEL, num_classes=2)
    plain.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    argv = ["--checkpoint", str(run / "best.pt"), "--weights-only", str(tmp_path / "no/w.pth")]
    assert "cannot write" in error_of(predict.main, argv)
    assert "start from them with --weights" in error_of(predict.main, ["--checkpoint", str(tmp_path / "w.pth"), str(pictures)])


def test_a_table_that_cannot_be_written_is_said_before_the_predicting(run, pictures, tmp_path, error_of, monkeypatch):
    argv, table = ["--checkpoint", str(run / "best.pt"), str(pictures / "test"), "--csv"], str(tmp_path / "x.csv")
    assert call(*argv, table, "--top-k", 2) == 0
    monkeypatch.setattr(predict, "run_network", None)
    assert "exists with other columns" in error_of(predict.main, [*argv, table])
    assert "there is no folder for" in error_of(predict.main, [*argv, str(tmp_path / "no/x.csv")])
    monkeypatch.undo()
    assert call(*argv, table, "--top-k", 2) == 0  # the same columns again


@pytest.mark.parametrize("argv, words", [
    (["nowhere.jpg"], "no such picture, folder or glob: nowhere.jpg"), (["*.none"], "no such picture, folder or glob"),
    ([], "name pictures, folders or globs"), (["x", "--top-k", "0"], "--top-k: 0 is out of range"),
    (["x", "-b", "0"], "--batch-size: 0 is out of range"), (["x", "-j", "-1"], "--workers: -1 is out of range"), (["x", "--device", "gpu9"], "--device gpu9 cannot be used here"),
])
def test_bad_input(run, error_of, argv, words):
    assert words in error_of(predict.main, ["--checkpoint", str(run / "best.pt"), *argv])


def test_nothing_is_written_over(run, pictures, tmp_path, error_of):
    """--csv with its name forgotten takes the first picture for it; --weights-only a checkpoint."""
    shutil.copytree(pictures / "val", tmp_path / "val")
    picture = tmp_path / "val/cat/cat.0.png"
    before = picture.read_bytes(), (run / "best.pt").read_bytes(), (run / "last.pt").read_bytes()
    argv = ["--checkpoint", str(run / "best.pt"), str(pictures / "val")]
    assert "is no .csv file" in error_of(predict.main, [*argv, "--csv", str(picture)])
    assert "is no .csv file" in error_of(predict.main, [*argv, "--csv", "/dev/null"])
    for name in ("best.pt", "last.pt"):
        assert "exists: it was left as it is" in error_of(predict.main, [*argv, "--weights-only", str(run / name)])
    assert before == (picture.read_bytes(), (run / "best.pt").read_bytes(), (run / "last.pt").read_bytes())


def test_a_dangling_link_is_an_unreadable_picture(run, pictures, tmp_path, capsys):
    os.symlink(tmp_path / "nowhere", tmp_path / "x.png")
    shutil.copy(pictures / "val/cat/cat.0.png", tmp_path / "y.png")
    capsys.readouterr()
    assert call("--checkpoint", run / "best.pt", f"{tmp_path}/*.png") == 1
    captured = capsys.readouterr()
    assert "x.png" in captured.err and "y.png" in captured.out


def test_a_checkpoint_that_lacks_something(run, error_of, tmp_path, pictures):
    state = read(run / "best.pt")
    del state["build"]
    torch.save(state, tmp_path / "x.pt")
    assert "lacks build" in error_of(predict.main, ["--checkpoint", str(tmp_path / "x.pt"), str(pictures)])


def test_folders_without_pictures(run, unread, error_of, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "docs/a.pdf", "docs/.old/1.png", "some/1.png")
    argv = ["--checkpoint", str(run / "best.pt"), str(tmp_path / "empty"), str(tmp_path / "docs")]
    words = f"no pictures in {tmp_path}/empty (it is empty), {tmp_path}/docs (but 1 .pdf, 1 in .old/)"
    assert f"{words}: give pictures" in error_of(predict.main, argv)
    assert call(*argv, tmp_path / "some") == 0
    assert capsys.readouterr().err.splitlines() == [f"note: {words}", "note: passed over: 1 .pdf, 1 in .old/"]


@pytest.mark.parametrize("argument, words", [
    ("f\\cat.png", "did you mean f/cat.png?"), ("'f/cat.png'", "did you mean f/cat.png?"), ("f/cat.png ", "did you mean f/cat.png?"),
    ("f/cat.PNG", "did you mean f/cat.png?"), ("f/cat", "did you mean f/cat.png?"), ("f/cta.png", "did you mean f/cat.png?"),
    ("~/f", "did you mean {0}/f?"), ("f\\", "did you mean f/?"), ("f/*.gif", "it was looked for from {0}"), ("g/cat.png", "it was looked for from {0}"),
    ("", "it was looked for from {0}"), ("/no/x.png", "no such picture, folder or glob: /no/x.png"),
])
def test_what_may_have_been_meant(run, error_of, tmp_path, monkeypatch, argument, words):
    touch(tmp_path, "f/cat.png", "f/dog.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert error_of(predict.main, ["--checkpoint", str(run / "best.pt"), argument]).strip().endswith(words.format(tmp_path))


def test_bad_checkpoints(error_of, tmp_path, pictures):
    torch.save({"model": {}, "script": Payload(tmp_path / "executed")}, tmp_path / "x.pt")
    assert "nothing in it was executed" in error_of(predict.main, ["--checkpoint", str(tmp_path / "x.pt"), str(pictures)])
    assert not (tmp_path / "executed").exists()
    assert "no such checkpoint" in error_of(predict.main, ["--checkpoint", str(tmp_path / "y.pt"), str(pictures)])


def test_a_picture_in_a_labelled_and_an_unlabelled_place(run, pictures, tmp_path, capsys):
    draw(tmp_path / "cat/a.png", "cat", 1)
    draw(tmp_path / "elsewhere.png", "cat", 2)
    assert call("--checkpoint", run / "best.pt", tmp_path / "cat", tmp_path / "elsewhere.png") == 0
    assert "accuracy" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("model, more", [(MODEL, ["--head", "mlp", "--hidden", 5]), ("squeezenet1_1", ["--head", "mlp"]),
                                         ("vit_b_32", ["--freeze", "backbone"])])
def test_what_weights_only_says_builds_the_network(train, pictures, tmp_path, capsys, monkeypatch, model, more):
    """The words that it prints, typed: the network gives the probabilities that predict.py gives. The vision transformer
    with one of its twelve layers: 12 million parameters say the same as 88."""
    vit = torchvision.models.vision_transformer
    real = vit._vision_transformer
    monkeypatch.setattr(vit, "_vision_transformer", lambda *a, **k: real(*a, **k | {"num_layers": 1}))
    run = train(*more, model=model, lr=1e-4)
    capsys.readouterr()
    assert call("--checkpoint", run / "best.pt", "--weights-only", tmp_path / "w.pth") == 0
    said = capsys.readouterr().out
    names = {"torchvision": torchvision, "torch": torch, "nn": torch.nn}
    exec("model = " + re.search(r"for (torchvision\.models\..*)", said)[1], names)
    for line in re.findall(r"then (?:set )?(model\..*?)(?:, before loading|: it was.*)?$", said, re.M):
        exec(line, names)
    names["model"].load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    plain = names["model"].eval()
    call("--checkpoint", run / "best.pt", pictures / "val", "--csv", tmp_path / "x.csv")
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=37)
    for row in rows_of(tmp_path / "x.csv"):
        p = plain(preset(data.decode(row["file"]))[None]).softmax(1)[0]
        assert p.max().item() == pytest.approx(float(row["probability"]), abs=0.02)


def test_animated_pictures_are_said(run, tmp_path, capsys):
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert call("--checkpoint", run / "best.pt", tmp_path) == 0
    assert capsys.readouterr().err == "note: 1 animated picture, of which the first frame is used: x.gif\n"


# ---- several checkpoints, mirror images


def table_of(tmp_path, *argv, top_k=("--top-k", 2)):
    """{file name: {class: probability}} or {file name: prediction} of predict.py with these arguments."""
    file = tmp_path / "table.csv"
    file.unlink(missing_ok=True)
    assert call(*argv, "--csv", file, *top_k) == 0
    rows = rows_of(file)
    if "probability" not in rows[0]:
        return {row["file"].rpartition("/")[2]: float(row["radius_prediction"]) for row in rows}
    return {row["file"].rpartition("/")[2]: {row["prediction"]: float(row["probability"]),
                                             row["prediction_2"]: float(row["probability_2"])} for row in rows}


def test_probabilities_of_several_checkpoints_are_averaged(run, train, pictures, tmp_path, error_of):
    other = train(epochs=1, lr=0.01, batch_size=4, seed=5, image_size=40)  # each has a size of its own
    one, two = (table_of(tmp_path, "--checkpoint", r / "best.pt", pictures / "test") for r in (run, other))
    assert one != two
    both = ["--checkpoint", run / "best.pt", "--checkpoint", other / "best.pt"]
    for file, found in table_of(tmp_path, *both, pictures / "test").items():
        assert found == {name: pytest.approx((one[file][name] + two[file][name]) / 2, abs=1e-6) for name in ("cat", "dog")}
    # classes in another order: the same network with the rows of its head exchanged
    state = read(run / "best.pt")
    state["classes"] = state["classes"][::-1]
    for name in ("fc.weight", "fc.bias"):
        state["model"][name] = state["model"][name].flip(0)
    torch.save(state, tmp_path / "reversed.pt")
    same = table_of(tmp_path, "--checkpoint", run / "best.pt", "--checkpoint", tmp_path / "reversed.pt", pictures / "test")
    assert same == {file: {name: pytest.approx(p, abs=1e-6) for name, p in row.items()} for file, row in one.items()}
    torch.save(state | {"classes": ["cat", "horse"]}, tmp_path / "horses.pt")
    error = error_of(predict.main, ["--checkpoint", str(run / "best.pt"), "--checkpoint", str(tmp_path / "horses.pt"), "x.png"])
    assert "horses.pt predicts cat, horse and" in error and "only the same can be averaged" in error
    assert "of one --checkpoint" in error_of(predict.main, [*map(str, both), "--weights-only", str(tmp_path / "w.pth")])


def test_mirror_images_are_averaged(run, pictures, tmp_path):
    plain = pictures / "test"
    for file in sorted(plain.rglob("*.png")):
        target = tmp_path / "mirrored" / file.relative_to(plain)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target)
    options = ["--checkpoint", run / "best.pt"]
    one, two = (table_of(tmp_path, *options, folder) for folder in (plain, tmp_path / "mirrored"))
    assert one != two
    for file, found in table_of(tmp_path, *options, "--tta", plain).items():
        assert found == {name: pytest.approx((one[file][name] + two[file][name]) / 2, abs=1e-4) for name in ("cat", "dog")}


def test_numbers_of_several_checkpoints_are_averaged_in_their_own_units(regress, discs, tmp_path):
    runs = regress(epochs=2), regress("--log-target", epochs=1, seed=4)
    one, two = (table_of(tmp_path, "--checkpoint", r / "best.pt", discs / "test", top_k=()) for r in runs)
    both = table_of(tmp_path, "--checkpoint", runs[0] / "best.pt", "--checkpoint", runs[1] / "best.pt", discs / "test", top_k=())
    assert both == {file: pytest.approx((one[file] + two[file]) / 2, rel=1e-6) for file in one} and one != two


def test_a_bad_picture_is_named_once_for_several_checkpoints(run, pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"")
    capsys.readouterr()
    assert call("--checkpoint", run / "best.pt", "--checkpoint", run / "last.pt", tmp_path / "bad.png", pictures / "test/cat") == 1
    captured = capsys.readouterr()
    assert captured.err.count("bad.png") == 1 and captured.out.count(".png") == 3


def test_a_picture_that_one_of_several_checkpoints_cannot_read_has_no_mean(run, pictures, tmp_path, capsys):
    state = read(run / "best.pt")
    torch.save(state | {"preprocessing": state["preprocessing"] | {"white": 1.0}}, tmp_path / "white.pt")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.tif")
    for files in (("best.pt", tmp_path / "white.pt"), (tmp_path / "white.pt", "best.pt")):
        capsys.readouterr()
        checkpoints = [word for file in files for word in ("--checkpoint", run / file)]
        assert call(*checkpoints, tmp_path / "a.tif", pictures / "test/cat") == 1
        captured = capsys.readouterr()
        assert f"cannot read {tmp_path}/a.tif (its grey levels are floating-point numbers" in captured.err
        assert captured.out.count(".png") == 3 and "a.tif" not in captured.out


def test_a_name_beside_what_must_not_be_looked_into_is_an_error_of_one_line(run, tmp_path, monkeypatch, error_of):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", refuse)
    argv = ["--checkpoint", str(run / "best.pt"), str(tmp_path / "x.png")]
    assert error_of(predict.main, argv).endswith(f"no such picture, folder or glob: {tmp_path}/x.png")
