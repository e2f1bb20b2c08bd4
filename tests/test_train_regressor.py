"""train_regressor.py as a user runs it, on drawn discs of known radius and a small network."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import checkpoint
import data
import metrics
import predict
import tables
import train_regressor
from conftest import MODEL, changed, draw_discs, read
from test_train_classifier import SGD, equal, history, untimed

QUANTILES = ["--quantiles", "0.1,0.5,0.9"]


def rows_of(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_radius_of_a_disc_is_learned_from_scratch(regress, tmp_path, capsys):
    """In ten seconds on one core, by a small network: a large one says the same in half a minute."""
    root = draw_discs(tmp_path / "many", train=200, val=40, test=60)
    regress(data=root, model="squeezenet1_1", epochs=10, batch_size=16, lr=0.002)
    words = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("this model"))
    assert float(words[4]) > 0.9, words


def test_a_frozen_backbone_is_bit_identical(regress, weights):
    run = regress("--freeze", "backbone", weights=weights, epochs=2)
    before, after = read(weights), read(run / "last.pt")["model"]
    assert {k for k in before if not torch.equal(before[k], after.get(k, torch.tensor(0)))} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("options, targets", [
    (["--freeze", "backbone", "--unfreeze", "1:stage4@0.001"], "radius"), ([*QUANTILES, "--log-target"], "radius"),
    (["--sample-weight", "weight", "--loss", "mse", "--accumulate", "2", "--l1", "1e-6"], "radius,place"),
])
def test_resume_is_bit_identical(regress, monkeypatch, weights, options, targets):
    whole = regress(*options, weights=weights, epochs=3, target=targets)
    real = checkpoint.save

    def save(state, folder, **kwargs):
        real(state, folder, **kwargs)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint, "save", save)
        regress(*options, weights=weights, epochs=3, target=targets, output=whole.with_name("broken"))
    assert stopped.value.code == 130
    broken = whole.with_name("broken")
    # what was typed may be typed again, and another number of workers changes nothing
    train_regressor.main(["--resume", str(broken / "last.pt"), *options, "--target", targets, "--workers", "1"])
    a, b = read(whole / "last.pt"), read(broken / "last.pt")
    for key in ("model", "optimizer", "rng", "scale", "outputs", "best", "best_epoch", "epoch", "step"):
        assert equal(a[key], b[key]), key
    assert untimed(history(whole)) == untimed(history(broken))
    assert (whole / "test_predictions.csv").read_text() == (broken / "test_predictions.csv").read_text()


def test_targets_scaled_by_a_power_of_two_give_exactly_scaled_predictions(regress, tmp_path):
    found = []
    for scale in (1.0, 2.0**20):
        run = regress(*QUANTILES, data=draw_discs(tmp_path / f"{scale}", scale, train=20, val=8, test=6), epochs=2)
        found.append(rows_of(run / "test_predictions.csv"))
    for one, other in zip(*found, strict=True):
        for key in ("radius", "radius_prediction", "radius_q0.1", "radius_q0.9"):
            assert float(other[key]) == 2**20 * float(one[key]), key


def test_one_sgd_step_by_hand(regress, weights, discs):
    """Order, standardization, normalization, frozen statistics, weighted Huber loss, in plain lines."""
    options = ["--freeze", "backbone", "--sample-weight", "weight", "--huber-delta", "0.5", "--seed", "4"]
    run = regress(*options, weights=weights, batch_size=32, target="radius,place", **SGD)
    start = read(regress(*options, weights=weights, batch_size=32, target="radius,place", **SGD | {"lr": 0}) / "last.pt")["model"]

    model = torchvision.models.get_model(MODEL, num_classes=2).eval()
    model.load_state_dict(start)
    rows = [row for row in rows_of(discs / "labels.csv") if row["split"] == "train"]
    pictures = [data.eval_transform(32)(torchvision.transforms.v2.functional.pil_to_tensor(data.decode(discs / row["file"])))
                for row in rows]
    x = torch.stack(pictures).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    y = torch.tensor([[float(row["radius"]), float(row["place"])] for row in rows])
    y = (y - y.mean(0)) / y.std(0, correction=0)
    w = torch.tensor([float(row["weight"]) for row in rows])
    loss = (torch.nn.functional.huber_loss(model(x), y, delta=0.5, reduction="none").mean(1) * w / w.mean()).mean()
    loss.backward()
    after = read(run / "last.pt")["model"]
    for name, parameter in model.fc.named_parameters():
        torch.testing.assert_close(after[f"fc.{name}"], parameter.detach() - 0.5 * parameter.grad, rtol=1e-3, atol=1e-5)
    assert float(history(run)[0]["train_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_metrics_and_predictions_are_in_the_targets_own_units(regress, discs, capsys):
    """Read back from the CSV of predictions, against the summary, the history's columns and the baselines by hand."""
    run = regress(*QUANTILES, "--log-target", epochs=2, target="radius,place")
    out = capsys.readouterr().out
    labels, found = rows_of(discs / "labels.csv"), rows_of(run / "test_predictions.csv")
    truth = {str(discs / row["file"]): row for row in labels}
    assert len(found) == 6
    for name in ("radius", "place"):
        y = [float(truth[row["file"]][name]) for row in found]
        assert y == [float(row[name]) for row in found]
        p = [float(row[f"{name}_prediction"]) for row in found]
        assert all(float(r[f"{name}_q0.1"]) <= q == float(r[f"{name}_q0.5"]) <= float(r[f"{name}_q0.9"])
                   for r, q in zip(found, p, strict=True))
        training = sorted(float(row[name]) for row in labels if row["split"] == "train")
        table = out[out.rindex(f"\n{name} "):].splitlines()[2:6]
        median = (training[9] + training[10]) / 2
        for line, guess in zip(table, (p, [sum(training) / 20] * 6, [median] * 6), strict=False):
            words = line.split()
            assert float(words[2]) == pytest.approx(sum(abs(a - b) for a, b in zip(y, guess, strict=True)) / 6, rel=1e-4)
            rmse = math.sqrt(sum((a - b) ** 2 for a, b in zip(y, guess, strict=True)) / 6)
            assert float(words[3]) == pytest.approx(rmse, rel=1e-4)
        assert [line.split()[:2] for line in table[:3]] == [["this", "model"], ["training", "mean"], ["training", "median"]]
    row = history(run)[-1]
    assert {"val_mae_radius", "val_rmse_place", "val_inside_radius", "val_r2"} <= row.keys()
    assert float(row["val_r2"]) == pytest.approx((float(row["val_r2_radius"]) + float(row["val_r2_place"])) / 2)


def test_predict_gives_what_the_script_gave(regress, discs, tmp_path, capsys, error_of):
    run = regress(*QUANTILES, "--head", "mlp", "--hidden", "5", epochs=2, target="radius,place")
    summary = capsys.readouterr().out

    def call(*argv):
        with pytest.raises(SystemExit) as stopped:
            predict.main(["--checkpoint", *map(str, argv)])
        return stopped.value.code

    assert call(run / "best.pt", "--labels", discs / "labels.csv", "--split", "test", "--csv", tmp_path / "x.csv") == 0
    assert (tmp_path / "x.csv").read_text() == (run / "test_predictions.csv").read_text()
    report = capsys.readouterr().out.split("\n\n", 1)[1].strip()
    assert report in summary and report.count("training median") == 2
    assert call(run / "best.pt", discs / "test", "--csv", tmp_path / "y.csv") == 0  # without the numbers
    assert [row["radius_prediction"] for row in rows_of(tmp_path / "y.csv")] == [
        row["radius_prediction"] for row in sorted(rows_of(tmp_path / "x.csv"), key=lambda row: row["file"])]
    assert "radius" not in rows_of(tmp_path / "y.csv")[0]
    shutil.copytree(discs / "test", tmp_path / "test")
    (tmp_path / "labels.csv").write_text("file,radius,place\n" + "".join(f"test/{i}.png,{i},1\n" for i in range(6)))
    (tmp_path / "test/2.png").write_bytes(b"")
    capsys.readouterr()
    assert call(run / "best.pt", "--labels", tmp_path / "labels.csv", "--csv", tmp_path / "z.csv") == 1
    assert "cannot read" in capsys.readouterr().err
    assert [row["radius"] for row in rows_of(tmp_path / "z.csv")] == ["0.0", "1.0", "3.0", "4.0", "5.0"]
    assert "has no rows that a column split calls val" in error_of(
        predict.main, ["--checkpoint", str(run / "best.pt"), "--labels", str(tmp_path / "labels.csv"), "--split", "val"])


def test_white_shape_and_flips_reach_every_picture(regress, discs, tmp_path, capsys):
    """Discs in 12 bits of 16 give bit for bit what they give in 8."""
    for split, value in (("deep", 4095), ("plain", 255)):
        shutil.copytree(discs, tmp_path / split)
        for file in (tmp_path / split).rglob("*.png"):
            grey = np.asarray(Image.open(file).convert("L"))
            Image.fromarray(grey if value == 255 else (grey / 255 * 4095).round().astype(np.uint16)).save(file)
    options = "--no-flip", "--resize", "squash", "--augment", "light"
    deep, plain = (regress(*options, data=tmp_path / name, **white)
                   for name, white in (("deep", {"white": 4095}), ("plain", {})))
    assert "augment: light (random crop)\n" in capsys.readouterr().out
    a, b = (read(run / "best.pt") for run in (deep, plain))
    assert not changed(a["model"], b["model"]) and a["preprocessing"] == b["preprocessing"] | {"white": 4095}
    assert [r["radius_prediction"] for r in rows_of(deep / "test_predictions.csv")] == [
        r["radius_prediction"] for r in rows_of(plain / "test_predictions.csv")]


def test_a_classifier_starts_from_a_regressor_and_the_other_way(regress, train, capsys):
    first = regress(epochs=1)
    capsys.readouterr()
    regress("--freeze", "backbone", weights=first / "best.pt", image_size=None, lr=0)
    assert "head fc kept" in capsys.readouterr().out
    regress(weights=first / "best.pt", target="place")
    assert "head fc left out, it was trained for other outputs" in capsys.readouterr().out
    second = train("--freeze", "backbone", weights=first / "best.pt")
    before, after = (read(file)["model"] for file in (first / "best.pt", second / "last.pt"))
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("fc."))
    assert "head fc left out" in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [
    ({"labels": "other.csv"}, "cannot read the labels"), ({"target": "price"}, "has no column 'price': there are file, radius"),
    ({"target": None}, "--data and --target are needed"), ({"target": "radius,radius"}, "the target radius is named twice"),
    ({"target": "split"}, "line 2: split is 'train', which is not a number"),
    ({"sample_weight": "heavy"}, "has no column 'heavy'"),
    ({"quantiles": "0.1,0.9"}, "--quantiles need 0.5 among them"), ({"quantiles": "0.5,1"}, "--quantiles: 0.5,1 is out of range"),
    ({"quantiles": "a,b"}, "argument --quantiles: invalid list of numbers value: 'a,b'"),
    ({"quantiles": "0.5", "loss": "mse"}, "--loss only has a meaning with no --quantiles"),
    ({"loss": "mse", "huber_delta": 2}, "--huber-delta only has a meaning with --loss huber"),
    ({"monitor": "val_accuracy"}, "argument --monitor: invalid choice"),
    ({"monitor": "val_r2", "labels": "flat.csv"}, "a target is the same in all val rows, so there is no val_r2"),
])
def test_bad_input(regress, discs, error_of, tmp_path, options, words):
    lines = (discs / "labels.csv").read_text().splitlines()
    flat = [",".join([line.split(",")[0], "7", *line.split(",")[2:]]) if line.endswith("val") else line for line in lines]
    (discs / "flat.csv").write_text("\n".join(flat))
    assert words in error_of(regress, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_table_from_a_spreadsheet_trains_the_same(regress, discs, capsys):
    """Semicolons, decimal commas, backslashes, Windows' encoding, and a target with a comma in its name."""
    plain = regress()
    lines = [line.split(",") for line in (discs / "labels.csv").read_text().splitlines()]
    header = f'file;"{lines[0][1]}, größe";place;weight;split'
    rows = [";".join([file.replace("/", "\\"), radius.replace(".", ","), *more]) for file, radius, *more in lines[1:]]
    (discs / "excel.csv").write_text("\r\n".join(["sep=;", header, *rows, ";;;;"]), encoding="cp1252", newline="")
    capsys.readouterr()
    run = regress(labels="excel.csv", target="radius, größe")
    out = capsys.readouterr().out
    for words in ("line 2 is no UTF-8", "read with semicolons", "passed over 1 row of empty cells (line 37)",
                  "line 3: radius, größe has decimal commas: '", "34 pictures found under another name"):
        assert len([line for line in out.splitlines() if line.startswith("note: ") and words in line]) == 1, words
    a, b = (read(folder / "last.pt") for folder in (plain, run))
    assert equal(a["model"], b["model"]) and b["targets"] == b["outputs"] == ["radius, größe"]
    train_regressor.main(["--resume", str(run / "last.pt"), "--target", "radius, größe", "--epochs", "2"])
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--checkpoint", str(run / "best.pt"), "--labels", str(discs / "excel.csv"), "--split", "test"])
    assert "decimal commas" in capsys.readouterr().err


def test_the_column_of_the_pictures_and_a_table_beside_them(regress, discs, tmp_path, error_of):
    """Another name of the column, and the CSV in a folder of its own: the same run, and predict.py knows the column."""
    plain, (header, rows) = regress(), (discs / "labels.csv").read_text().split("\n", 1)
    file = tmp_path / "t/numbers.csv"
    file.parent.mkdir()
    file.write_text(header.replace("file", "Image File") + "\n" + rows)
    run = regress(labels=file, file_column="Image File")
    a, b = (read(folder / "last.pt") for folder in (plain, run))
    assert equal(a["model"], b["model"]) and a["data"] == b["data"]
    asked = ["--checkpoint", str(run / "best.pt"), "--labels", str(file), "--split", "test"]
    assert "no such picture" in error_of(predict.main, asked)
    with pytest.raises(SystemExit, match="0"):
        predict.main([*asked, "--data", str(discs), "--csv", str(tmp_path / "x.csv")])
    assert rows_of(tmp_path / "x.csv") == rows_of(run / "test_predictions.csv")
    assert "--target is for classes, and" in error_of(predict.main, [*asked, "--target", "radius"])
    asked[1] = str(plain / "best.pt")
    assert "did you mean --file-column 'Image File'?" in error_of(predict.main, [*asked, "--data", str(discs)])
    with pytest.raises(SystemExit, match="0"):
        predict.main([*asked, "--data", str(discs), "--file-column", "image file".title()])


def test_resume_refuses_other_numbers(regress, discs, tmp_path, error_of):
    run = regress()
    shutil.copytree(discs, tmp_path / "moved")
    train_regressor.main(["--resume", str(run / "last.pt"), "--data", str(tmp_path / "moved"), "--epochs", "2"])
    file = tmp_path / "moved/labels.csv"
    file.write_text(file.read_text().replace(",1,train", ",2,train"))
    train_regressor.main(["--resume", str(run / "last.pt"), "--epochs", "3"])  # the weights are not used in this run
    lines = file.read_text().splitlines()
    name, radius, *rest = lines[1].split(",")
    file.write_text("\n".join([lines[0], ",".join([name, str(float(radius) + 1), *rest]), *lines[2:]]) + "\n")
    assert "holds other rows (train 20, val 8, content" in error_of(train_regressor.main, ["--resume", str(run / "last.pt")])
    for option, value in (("--target", "place"), ("--loss", "mse"), ("--quantiles", "0.5"), ("--seed", "3")):
        assert f"{option} is " in error_of(train_regressor.main, ["--resume", str(run / "last.pt"), option, value])
    assert "was written by train_regressor.py, not by train_classifier.py" in error_of(
        __import__("train_classifier").main, ["--resume", str(run / "last.pt")])


def test_the_baseline_is_exact_where_the_numbers_are_far_from_zero(regress, tmp_path, capsys):
    root = draw_discs(tmp_path / "far", train=20, val=8, test=6)
    lines = (root / "labels.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    (root / "labels.csv").write_text("\n".join([lines[0], *(",".join([f, str(float(r) + 2**40), *more]) for f, r, *more in rows)]))
    regress("--freeze", "backbone", data=root, lr=0)
    values = {split: [float(r) + 2**40 for _, r, *_, s in rows if s == split] for split in ("train", "test")}
    expected = sum(abs(v - sum(values["train"]) / 20) for v in values["test"]) / 6
    words = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("training mean"))
    assert float(words[2]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("monitor, better", [("val_loss", min), ("val_r2", max)])
def test_best_is_the_epoch_of_the_best_monitored_value(regress, monitor, better):
    run = regress("--monitor", monitor, epochs=5, lr=0.01)
    values = [float(row[monitor]) for row in history(run)]
    assert read(run / "best.pt")["best_epoch"] == values.index(better(values)) and len(set(values)) == 5


def test_of_equal_scores_the_lowest_val_loss_is_the_best_and_no_gain(regress, monkeypatch):
    monkeypatch.setattr(metrics, "score_columns", lambda *_: {"r2": 0.5})
    run = regress("--monitor", "val_r2", epochs=4, lr=0.01)
    losses, last = [float(row["val_loss"]) for row in history(run)], read(run / "last.pt")
    assert last["best_epoch"] == losses.index(min(losses)) > 0 and last["epochs_without_gain"] == 3
    assert read(run / "best.pt")["epoch"] == last["best_epoch"] + 1


def test_val_loss_counts_the_weights(regress, discs):
    """From the predictions on val, which is where best.pt is scored without a test split."""
    rows = [row for row in rows_of(discs / "labels.csv") if row["split"] != "test"]
    file = discs / "no_test.csv"
    file.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    run = regress("--sample-weight", "weight", "--loss", "mse", labels="no_test.csv")
    scale = read(run / "best.pt")["scale"]
    weights = {str(discs / row["file"]): float(row["weight"]) for row in rows}
    mean_weight = sum(float(row["weight"]) for row in rows if row["split"] == "train") / 20
    found = rows_of(run / "val_predictions.csv")
    errors = [((float(r["radius"]) - float(r["radius_prediction"])) / scale["std"][0]) ** 2 * weights[r["file"]] for r in found]
    assert float(history(run)[0]["val_loss"]) == pytest.approx(sum(errors) / mean_weight / 8, rel=1e-4)


def test_nothing_is_written_over(regress, discs, tmp_path, error_of):
    run = regress()
    shutil.copytree(discs, tmp_path / "mine")
    labels = tmp_path / "mine/labels.csv"
    before = labels.read_bytes()
    (tmp_path / "other.csv").write_text("name,phone\n")
    for file, words in ((labels, "would write over the labels"), (tmp_path / "other.csv", "exists with other columns")):
        argv = ["--checkpoint", str(run / "best.pt"), "--labels", str(labels), "--split", "val", "--csv", str(file)]
        assert words in error_of(predict.main, argv)
    assert (tmp_path / "other.csv").read_text() == "name,phone\n"
    assert labels.read_bytes() == before


def test_a_table_of_other_columns_is_said_before_the_predicting(regress, discs, tmp_path, error_of, monkeypatch):
    run, table = regress("--quantiles", "0.1,0.5", no_test=True), tmp_path / "x.csv"
    argv = ["--checkpoint", str(run / "best.pt"), "--csv", str(table)]
    with pytest.raises(SystemExit, match="0"):
        predict.main([*argv, str(discs / "val")])
    assert list(rows_of(table)[0]) == ["file", "radius_prediction", "radius_q0.1", "radius_q0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "run_network", None)
        assert "exists with other columns" in error_of(predict.main, [*argv, "--labels", str(discs / "labels.csv")])
    with pytest.raises(SystemExit, match="0"):
        predict.main([*argv, str(discs / "test")])


def test_list_layers_needs_no_data(capsys):
    train_regressor.main(["--list-layers", "--model", MODEL, "--target", "a,b"])
    assert "2,050" in capsys.readouterr().out


def test_the_scale_is_that_of_the_training_split(regress, discs):
    state = read(regress() / "last.pt")
    radii = [float(row["radius"]) for row in rows_of(discs / "labels.csv") if row["split"] == "train"]
    mean = sum(radii) / 20
    assert state["scale"]["mean"][0] == pytest.approx(mean)
    assert state["scale"]["std"][0] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in radii) / 20))
    assert tables.to_own_units(torch.zeros(1, 1), state["scale"])[0].item() == pytest.approx(mean)


def test_the_auxiliary_losses_are_weighted(regress, monkeypatch):
    """As for the classifier: the network replaced by its head's bias, also for the auxiliary outputs. One SGD step is
    1.6 times that without them; the weight of each sample counts in both."""
    both = []
    for auxiliary in (0, 2):
        def forward(self, x, auxiliary=auxiliary):
            outputs = self.fc.bias.expand(len(x), 1)
            return (outputs,) * (1 + auxiliary) if self.training and auxiliary else outputs

        monkeypatch.setattr(torchvision.models.GoogLeNet, "forward", forward)
        options = ["--sample-weight", "weight", "--loss", "mse"]
        runs = [regress(*options, model="googlenet", batch_size=32, **SGD | {"lr": lr}) for lr in (0, 0.1)]
        start, end = (read(run / "last.pt")["model"]["fc.bias"] for run in runs)
        both.append((end - start, history(runs[0])[0]["train_loss"]))
    torch.testing.assert_close(both[1][0], 1.6 * both[0][0])
    assert both[1][1] == both[0][1] and both[0][0].abs().max() > 0.001
