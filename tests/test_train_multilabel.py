"""train_multilabel.py as a user runs it, on drawn discs and a small network."""

import shutil

import pytest
import torch
import torchvision

import checkpoint
import data
import freeze
import losses
import metrics
import predict
import tables
import train_multilabel
from conftest import MODEL, changed, read
from test_distributed import assert_close, together  # noqa: F401
from test_interruptions import assert_the_same_run, stop_at
from test_train_classifier import SGD, history
from test_train_regressor import rows_of

THAW = ["--freeze", "backbone", "--unfreeze", "1:stage4@0.001"]


def call(*argv):
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--checkpoint", *map(str, argv)])
    return stopped.value.code


def test_a_frozen_backbone_is_bit_identical(label, weights):
    run = label("--freeze", "backbone", weights=weights, epochs=2)
    before, after = read(weights), read(run / "last.pt")["model"]
    assert {k for k in before if not torch.equal(before[k], after.get(k, torch.tensor(0)))} == {"fc.weight", "fc.bias"}


def test_one_sgd_step_by_hand(label, weights, labelled):
    """Order, masking, weight of the ones, the mean over the known cells of the split, in plain lines."""
    options = ["--freeze", "backbone", "--augment", "none", "--pos-weight", "right=3"]
    run = label(*options, weights=weights, batch_size=32, **SGD)
    start = read(label(*options, weights=weights, batch_size=32, **SGD | {"lr": 0}) / "last.pt")["model"]
    model = torchvision.models.get_model(MODEL, num_classes=2).eval()
    model.load_state_dict(start)
    rows = [row for row in rows_of(labelled / "labels.csv") if row["split"] == "train" and row["large"] + row["right"]]
    decoded = [torchvision.transforms.v2.functional.pil_to_tensor(data.decode(labelled / row["file"])) for row in rows]
    x = torch.stack([data.eval_transform(32)(picture) for picture in decoded]).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits, terms = model(x), []
    for row, outputs in zip(rows, logits, strict=True):
        for name, z, weight in zip(("large", "right"), outputs, (1, 3), strict=True):
            if row[name]:
                terms.append(-weight * z.sigmoid().log() if row[name] == "1" else -(1 - z.sigmoid()).log())
    assert len(terms) < 40
    loss = sum(terms) / len(terms)
    loss.backward()
    after = read(run / "last.pt")["model"]
    for name, parameter in model.fc.named_parameters():
        torch.testing.assert_close(after[f"fc.{name}"], parameter.detach() - 0.5 * parameter.grad, rtol=1e-3, atol=1e-5)
    assert float(history(run)[0]["train_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_what_is_not_known_has_no_influence(label, monkeypatch):
    """Another answer where there is none: the same bits. Elsewhere: others."""
    real, runs = tables.label_tensors, []
    for known in (None, False, True):
        def turned(*args, known=known):
            targets, weights = real(*args)
            return torch.where((weights > 0) == known, 1 - targets, targets), weights

        monkeypatch.setattr(tables, "label_tensors", real if known is None else turned)
        runs.append(read(label("--loss", "focal", "--pos-weight", "balanced", lr=0.01) / "last.pt"))
    assert not changed(runs[0]["model"], runs[1]["model"])
    assert runs[0]["history"][0]["val_loss"] == runs[1]["history"][0]["val_loss"]
    assert changed(runs[0]["model"], runs[2]["model"])


def test_accumulation_and_two_processes_make_the_step_of_one_large_batch(label, together, labelled, weights):  # noqa: F811
    """Cells that are not known fall unevenly on the batches. (Random features are so alike that rounding ranks the
    pictures.)
    """
    options = ["--freeze", "backbone", "--target", "large,right,heavy", "--loss", "bce", "--pos-weight", "balanced"]
    named = {"data": labelled, "weights": weights, "optimizer": "sgd", "lr": 0.01, "epochs": 2}
    one = label(*options, batch_size=10, **named)
    ranked = "val_map", "val_macro_f1", "val_micro_f1"
    assert_close(one, label(*options, batch_size=5, accumulate=2, **named), without=ranked)
    _, two = together(2, "multilabel", *options, batch_size=5, **named)
    assert_close(one, two, without=ranked)
    assert read(two / "last.pt")["thresholds"].keys() == {"large", "right", "heavy"}


@pytest.mark.parametrize("options, moments", [(["--pos-weight", "balanced", "--accumulate", "2", "--head", "mlp", *THAW], (2, 5)),
                                              (["--freeze", "backbone", "--loss", "focal", "--cache-features", "1"], (1, 12))])
def test_stopped_and_resumed_within_an_epoch_is_bit_identical(label, monkeypatch, weights, options, moments):
    """The second time among the steps of an epoch; the first time there, too, or while features are computed."""
    settings = {"weights": weights, "epochs": 2, "batch_size": 3, "monitor": "val_macro_f1"}
    whole = label(*options, **settings)
    broken = whole.with_name("broken")
    for moment in moments:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment)
            label(*options, "--resume", **settings, output=broken)
        assert stopped.value.code == 130
    assert read(broken / "last.pt")["sums"]
    label(*options, "--resume", **settings, output=broken)
    assert_the_same_run(whole, broken)
    for file in ("last.pt", "best.pt"):
        assert read(whole / file)["thresholds"] == read(broken / file)["thresholds"]


def test_best_pt_has_the_thresholds_of_its_own_validation(label, monkeypatch, labelled):
    """Each epoch chooses others, none the test; those of the best epoch, here the second, are kept and used for the test."""
    chosen, maps = iter([[0.1, 0.1], [0.0, 1.0], [0.2, 0.0], [1.0, 0.0]]), iter([0.5, 0.9, 0.8, 0.7])
    monkeypatch.setattr(metrics, "best_thresholds", lambda *_: next(chosen))
    monkeypatch.setattr(metrics, "label_scores", lambda *_: {"map": next(maps), "macro_f1": 0.0})
    run = label(epochs=4)
    assert read(run / "best.pt")["thresholds"] == {"large": 0.0, "right": 1.0} and next(chosen, None) is None
    assert read(run / "last.pt")["thresholds"] == {"large": 1.0, "right": 0.0}
    truth = {row["file"]: row for row in rows_of(labelled / "labels.csv")}
    for row in rows_of(run / "test_predictions.csv"):
        assert row["labels"] == "large"
        assert all(row[f"true_{name}"] == truth[f"test/{row['file'].rpartition('/')[2]}"][name] for name in ("large", "right"))


def test_predict_gives_what_the_script_gave(label, labelled, tmp_path, capsys, error_of):
    run = label("--head", "mlp", "--hidden", "5", epochs=2)
    summary = capsys.readouterr().out
    best, table = run / "best.pt", labelled / "labels.csv"
    assert call(best, "--labels", table, "--split", "test", "--csv", tmp_path / "x.csv") == 0
    assert (tmp_path / "x.csv").read_text() == (run / "test_predictions.csv").read_text()
    printed = capsys.readouterr().out.split("\n\n", 2)
    assert printed[2].strip() in summary and "F1 at 0.5" in printed[2] and printed[1].startswith("on the 6 pictures of test")
    rows, cuts = rows_of(tmp_path / "x.csv"), read(best)["thresholds"]
    assert all(row["labels"].split() == [name for name in cuts if float(row[f"p_{name}"]) >= cuts[name]] for row in rows)
    for line, row in zip(printed[0].splitlines()[-6:], rows, strict=True):
        said = sorted(part.split()[0] for part in line[len(row["file"]):].strip().split(", ") if part != "-")
        assert said == sorted(row["labels"].split())
    assert call(best, labelled / "test", "--csv", tmp_path / "y.csv") == 0  # without a truth
    assert list(rows_of(tmp_path / "y.csv")[0]) == ["file", "labels", "p_large", "p_right"]
    # several answers: the mean of the probabilities, by the mean of the thresholds, whatever the order of the labels
    other = label(target="right,large", seed=3)
    cuts, files = [{"large": 0.0, "right": 1.0}, {"right": -1.0, "large": 2.0}], [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file, source, values in zip(files, (best, other / "best.pt"), cuts, strict=True):
        torch.save(read(source) | {"thresholds": values}, file)
    found = {}
    for name, argv in (("a", files[:1]), ("b", files[1:]), ("ab", [files[0], "--checkpoint", files[1]]),
                       ("ba", [files[1], "--checkpoint", files[0]])):
        assert call(*argv, labelled / "test", "--csv", tmp_path / f"{name}.csv") == 0
        found[name] = rows_of(tmp_path / f"{name}.csv")
    for one, two, both, swapped in zip(*found.values(), strict=True):
        for name in ("large", "right"):
            mean = (float(one[f"p_{name}"]) + float(two[f"p_{name}"])) / 2
            assert mean == pytest.approx(float(both[f"p_{name}"])) == pytest.approx(float(swapped[f"p_{name}"]))
        assert (one["labels"], two["labels"], both["labels"], swapped["labels"]) == ("large", "right", "right", "right")
    assert call(best, "--tta", labelled / "test") == 0
    # a table in which the answers, or a column, are missing
    shutil.copytree(labelled / "test", tmp_path / "test")
    (tmp_path / "some.csv").write_text("file,large\n" + "".join(f"test/{i}.png,{c}\n" for i, c in enumerate("1?0?10")).replace("?", ""))
    capsys.readouterr()
    assert call(best, "--labels", tmp_path / "some.csv", "--csv", tmp_path / "z.csv") == 0
    said = capsys.readouterr()
    assert "has no column 'right': nothing to score it by" in said.err
    assert "2 of 6 rows" in said.err and "have no known label: predicted, not scored" in said.err and "on the 4 pictures" in said.out
    assert [row["true_large"] for row in rows_of(tmp_path / "z.csv")] == ["1", "", "0", "", "1", "0"]
    (tmp_path / "some.csv").write_text("file,large,right\ntest/0.png,2,1\n")
    assert "line 2: large is '2': write 1, 0" in error_of(
        predict.main, ["--checkpoint", str(best), "--labels", str(tmp_path / "some.csv")])
    idle = ["--checkpoint", str(best), str(tmp_path / "test"), "--csv", str(tmp_path / "q.csv"), "--export", str(tmp_path / "q.pt2")]
    for option in (["--all-probabilities"], ["--top-k", "1"]):
        words = f"{option[0]} is for classes, and {best} predicts labels large, right: leave it out, the CSV has the probabilities"
        assert words in error_of(predict.main, [*idle, *option]) and not list(tmp_path.glob("q.*"))


def test_tables_with_a_comma_in_a_name_and_other_columns_of_pictures(label, labelled, tmp_path, capsys, error_of):
    """One column is one label, in training and in a table that lacks it. The pictures are those of the column that the
    training was told, or that is named here, below --data.
    """
    truth = rows_of(labelled / "labels.csv")
    table, less = tmp_path / "labels.csv", tmp_path / "less.csv"
    table.write_text('image,"water, deep",haze,split\n' + "".join(
        f"{row['file']},{row['large']},{row['right']},{row['split']}\n" for row in truth))
    less.write_text("id,haze\n" + "".join(f"{row['file']},{row['right']}\n" for row in truth[-6:]))
    run = label("--no-test", labels=table, target="water, deep,haze", file_column="image")
    assert read(run / "best.pt")["labels"] == ["water, deep", "haze"]
    argv = [run / "best.pt", "--data", labelled, "--csv", tmp_path / "x.csv", "--labels"]
    for file, options in ((table, ["--split", "test"]), (less, ["--file-column", "id"])):
        capsys.readouterr()
        assert call(*argv, file, *options) == 0
        note = f"note: {less} has no column 'water, deep': nothing to score it by"
        assert (note in capsys.readouterr().err.splitlines()) is (file == less)
        for written, row in zip(rows_of(tmp_path / "x.csv"), truth[-6:], strict=True):
            assert written["file"] == str(labelled / row["file"]) and written["true_haze"] == row["right"]
            assert written["true_water, deep"] == ("" if file == less else row["large"])
            assert set(written["labels"].split(";")) <= {"water, deep", "haze", ""}
    assert "has no column 'image': there are id, haze" in error_of(predict.main, ["--checkpoint", *map(str, argv), str(less)])
    del argv[1:3]
    assert "(and 33 more are missing); --data says where" in error_of(predict.main, ["--checkpoint", *map(str, argv), str(table)])


def test_a_column_of_names(label, labelled, tmp_path, capsys):
    """As columns without empty cells: the same numbers, for names that are learned from the training split."""
    lines = [line.split(",") for line in (labelled / "tags.csv").read_text().splitlines()[1:]]
    columns = tmp_path / "columns.csv"
    columns.write_text("\n".join(["file,heavy,large,right,split", *(
        ",".join([f"{labelled}/{file}", *(str(int(name in tags.split())) for name in ("heavy", "large", "right")), split])
        for file, tags, split in lines)]))
    named = label("--separator", " ", labels="tags.csv", target="tags")
    assert "label" in capsys.readouterr().out
    plain = label(labels=columns, target="heavy,large,right")
    a, b = read(named / "last.pt"), read(plain / "last.pt")
    assert a["labels"] == ["heavy", "large", "right"] and not changed(a["model"], b["model"])
    assert a["thresholds"] == b["thresholds"]
    # scored by the names of another table; one that the model does not know is said
    table = tmp_path / "other.csv"
    table.write_text(f"file,tags\n{labelled}/test/0.png,large strange\n{labelled}/test/1.png,\n")
    assert call(named / "best.pt", "--labels", table) == 0
    said = capsys.readouterr()
    assert "1 label that the model does not know, not scored: strange" in said.err and "on the 2 pictures" in said.out
    table.write_text(f"file,tags\n{labelled}/test/0.png,\n{labelled}/test/1.png,\n")  # nobody has filled it in
    assert call(named / "best.pt", "--labels", table) == 0
    assert "2 of 2 rows" in (said := capsys.readouterr()).err and "on the" not in said.out


def test_labels_start_from_other_checkpoints_and_the_other_way(label, train, capsys):
    first = label(epochs=1)
    capsys.readouterr()
    label("--freeze", "backbone", weights=first / "best.pt", image_size=None, lr=0)
    assert "head fc kept" in capsys.readouterr().out
    label(weights=first / "best.pt", target="heavy")
    assert "head fc left out, it was trained for other outputs" in capsys.readouterr().out
    train("--freeze", "backbone", weights=first / "best.pt")
    assert "head fc left out" in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [
    ({"labels": "other.csv"}, "cannot read the labels"), ({"target": None}, "--data and --target are needed"),
    ({"target": "large,price"}, "has no column 'price': there are file, large"),
    ({"target": "large,large"}, "the target large is named twice"),
    ({"target": "split"}, "line 2: split is 'train': write 1, 0, or nothing where it is not known; for a column of names say --separator"),
    ({"file_column": "name"}, "has no column 'name'"), ({"separator": ""}, "--separator is empty"),
    ({"separator": " "}, "a separator is for one column of names, and 2 are named: large, right"),
    ({"pos_weight": "blue=2"}, "pos weights name an unknown label 'blue'; the labels are large, right"),
    ({"pos_weight": "right"}, "pos weights 'right' are neither 'balanced' nor like large=10,right=1"),
    ({"focal_gamma": 2}, "--focal-gamma only has a meaning with --loss focal"),
    ({"monitor": "val_accuracy"}, "argument --monitor: invalid choice"),
])
def test_bad_input(label, error_of, tmp_path, options, words):
    assert words in error_of(label, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_resume_refuses_other_labels(label, labelled, tmp_path, error_of):
    run, table = label(), tmp_path / "moved/labels.csv"
    shutil.copytree(labelled, tmp_path / "moved")
    train_multilabel.main(["--resume", str(run / "last.pt"), "--data", str(tmp_path / "moved"), "--epochs", "2"])
    lines = table.read_text().splitlines()
    file, large, *rest = lines[2].split(",")
    table.write_text("\n".join([*lines[:2], ",".join([file, str(1 - int(large)), *rest]), *lines[3:]]) + "\n")
    assert "holds other rows (train 20, val 8, content" in error_of(train_multilabel.main, ["--resume", str(run / "last.pt")])
    for option, value in (("--target", "large"), ("--loss", "focal"), ("--pos-weight", "balanced"), ("--separator", " ")):
        assert f"{option} is " in error_of(train_multilabel.main, ["--resume", str(run / "last.pt"), option, value])


def test_your_own_loss_has_to_take_the_weights_of_the_ones(label, monkeypatch, error_of):
    monkeypatch.setattr(train_multilabel, "masked_cross_entropy", losses.BinaryFocal(0.0))
    assert "hides the BinaryFocal within" in error_of(label)
    monkeypatch.setattr(losses, "BinaryFocal", lambda gamma, pos_weight: lambda logits, targets, weights: logits.mean())
    assert "takes no pos weights" in error_of(label, "--loss", "focal", "--pos-weight", "balanced")


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, logits, targets, weights):
        return torch.nn.functional.binary_cross_entropy_with_logits(self.scale * logits, targets, weights)


def test_your_own_loss_with_parameters_is_trained_saved_and_resumed(label, monkeypatch, weights):
    monkeypatch.setattr(losses, "BinaryFocal", lambda gamma, pos_weight: Scaled())
    options, settings = ["--loss", "focal", "--freeze", "backbone"], {"weights": weights, "epochs": 2, "batch_size": 5}
    whole = label(*options, **settings)
    broken = whole.with_name("broken")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2)
        label(*options, **settings, output=broken)
    label(*options, "--resume", **settings, output=broken)
    assert_the_same_run(whole, broken)
    scale, same = (read(run / "last.pt")["criterion"]["scale"] for run in (whole, broken))
    assert torch.equal(scale, same) and ((scale - 1).abs() > 1e-3).all()


def test_find_lr_and_the_list_of_layers(label, capsys, monkeypatch):
    found = []
    monkeypatch.setattr(train_multilabel, "find_lr", lambda model, trial, *_: found.extend(next(trial) for _ in range(4)))
    label("--find-lr")
    assert len(found) == 4 and all(0 < loss.item() < 2 and loss.requires_grad for loss in found)
    train_multilabel.main(["--list-layers", "--model", MODEL, "--target", "a,b"])
    assert "2,050" in capsys.readouterr().out


def test_the_auxiliary_losses_are_weighted(label, monkeypatch):
    """The network replaced by its head's bias, also for the auxiliary outputs: 1.6 times the step without them."""
    both = []
    for auxiliary in (0, 2):
        def forward(self, x, auxiliary=auxiliary):
            outputs = self.fc.bias.expand(len(x), 2)
            return (outputs,) * (1 + auxiliary) if self.training and auxiliary else outputs

        monkeypatch.setattr(torchvision.models.GoogLeNet, "forward", forward)
        run = label(model="googlenet", batch_size=32, no_test=True, **SGD | {"lr": 0.1})
        both.append((read(run / "last.pt")["model"]["fc.bias"], history(run)[0]["train_loss"]))
    start = read(label(model="googlenet", batch_size=32, no_test=True, **SGD | {"lr": 0}) / "last.pt")["model"]["fc.bias"]
    torch.testing.assert_close(both[1][0] - start, 1.6 * (both[0][0] - start))
    assert both[1][1] == both[0][1] and (both[0][0] - start).abs().max() > 0.001


def test_exactly_what_thaws_moves(label, weights):
    run = label(*THAW, weights=weights, epochs=2)
    before, after = read(run / "before_unfreeze_1.pt")["model"], read(run / "last.pt")["model"]
    assert {key.partition(".")[0] for key in changed(before, after)} == {"stage4", "fc"}
    model = torchvision.models.get_model(MODEL, num_classes=2)
    assert freeze.find_head(model) == "fc" and checkpoint.load(run / "best.pt")["head"] == "fc"
