"""Programs that predict.py --export writes: any number of pictures, the same answers, nothing half written."""

import importlib.util
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import export
import predict
import tables
from conftest import read
from pages import snippet
from test_predict import call, rows_of

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))), reason="onnx is not installed")


def tiny(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(4, outputs))


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SAID = r"its outputs (differ from the network's by at most \de-\d+ of the largest one|are exactly the network's)$"


def test_a_program_takes_any_number_of_pictures_and_knows_its_classes(tmp_path):
    model, file = tiny(), tmp_path / "model.pt2"
    said = export.write(export.Program(model, MEAN, STD), 16, file, {"classes": ["a", "b", "c"]})
    assert re.search(SAID, said) and os.listdir(tmp_path) == ["model.pt2"]
    about = {"about.json": ""}
    program = torch.export.load(file, extra_files=about).module()
    assert json.loads(about["about.json"]) == {"classes": ["a", "b", "c"]}
    for count in (1, 2, 5):
        x = torch.rand(count, 3, 16, 16)
        by_hand = torch.stack([(x[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1)
        assert torch.allclose(program(x), model.eval()(by_hand).softmax(1), atol=1e-6)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("levels", [[], [0.1, 0.5, 0.9]])
def test_numbers_come_out_in_their_own_units(log, levels):
    scale = {"mean": [12.5, 3.0], "std": [0.5, 2.0], "log": log}
    model = tiny(2 * max(1, len(levels))).eval()
    x = torch.rand(4, 3, 16, 16)
    found = export.Program(model, [0.0] * 3, [1.0] * 3, scale, len(levels)).eval()(x)
    outputs = model(x).view(4, 2, -1) if levels else model(x)
    numbers, quantiles = tables.to_own_units(outputs.detach(), scale, levels)
    assert torch.allclose(found.double(), quantiles if levels else numbers, rtol=1e-5)


def test_labels_come_out_as_probabilities_of_their_own(label, labelled, tmp_path, capsys):
    run, file = label(no_test=True), tmp_path / "labels.pt2"
    assert call("--checkpoint", run / "best.pt", "--export", file, labelled / "test", "--csv", tmp_path / "x.csv") == 0
    cuts = read(run / "best.pt")["thresholds"]
    said = f"a label is given where its probability is at least: large {cuts['large']:.4f}, right {cuts['right']:.4f}"
    assert said in capsys.readouterr().out
    about = {"about.json": ""}
    program = torch.export.load(file, extra_files=about).module()
    assert json.loads(about["about.json"])["labels"] == ["large", "right"]
    assert json.loads(about["about.json"])["thresholds"] == list(cuts.values())
    rows = rows_of(tmp_path / "x.csv")
    x = torch.stack([data.eval_transform(32, resize_size=37)(pil_to_tensor(data.decode(row["file"]))) for row in rows]) / 255
    found = program(x)
    for row, (large, right) in zip(rows, found.tolist(), strict=True):
        assert (float(row["p_large"]), float(row["p_right"])) == pytest.approx((large, right), abs=1e-4)
    assert call("--checkpoint", run / "best.pt", "--weights-only", tmp_path / "bare.pth") == 0
    out = capsys.readouterr().out
    assert "outputs: large, right\n" in out and said.replace("its probability", "sigmoid(output)") in out


class Shrinks(nn.Module):
    """Of another answer each time that it is asked: what is exported cannot agree with it."""

    calls = 0

    def forward(self, x):
        Shrinks.calls += 1
        return x.mean((2, 3)) * Shrinks.calls


class DataDependent(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_what_cannot_be_exported_is_one_line_and_no_file(tmp_path):
    def error_of(model, name="x.pt2", folder=tmp_path):
        with pytest.raises(export.ExportError) as error:
            export.write(export.Program(model, MEAN, STD), 8, folder / name, {})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "DataDependent cannot be written as .pt2" in error_of(DataDependent())
    assert "the program differs from the network by" in error_of(Shrinks())
    assert "must end in .pt2" in error_of(tiny(), "x.pth")
    assert "could not write" in error_of(tiny(), folder=tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []
    (tmp_path / "x.pt2").write_text("mine")
    assert "exists: it was left as it is" in error_of(tiny())
    assert (tmp_path / "x.pt2").read_text() == "mine"


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(export.ExportError, match="needs the packages onnx and onnxscript: pip install onnxscript$"):
        export.write(export.Program(tiny(), MEAN, STD), 8, tmp_path / "x.onnx", {})


@needs_onnx
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    program = export.Program(tiny(), MEAN, STD)
    assert re.search(SAID, export.write(program, 16, tmp_path / "x.onnx", {"classes": ["a", "b", "c"]}))
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["about"]) == {"classes": ["a", "b", "c"]}
    x = torch.rand(5, 3, 16, 16)
    found = session.run(["outputs"], {"pictures": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), program(x), atol=1e-6) and os.listdir(tmp_path) == ["x.onnx"]


# ---- predict.py --export


@pytest.mark.parametrize("resize, white", [("crop", None), ("squash", 4095.0), ("pad", None)])
def test_the_readme_prepares_a_picture_as_training_did(tmp_path, monkeypatch, capsys, resize, white):
    """The snippet with a network whose answer is the mean of each quarter of the picture."""
    means = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12, bias=False))
    means[2].weight.data = torch.eye(12)
    monkeypatch.setattr(predict, "rebuild", lambda state: means)
    monkeypatch.chdir(tmp_path)
    preprocessing = {"image_size": 32, "resize_size": 37, "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    if resize != "crop":  # else a checkpoint from before these were
        preprocessing |= {"resize": resize, "white": white, "flip": True}
    state = {"preprocessing": preprocessing, "classes": [str(i) for i in range(12)]}
    predict.write_program(state, "model.pt2")
    words = {"crop": "shorter side resized to 37 (bilinear), centre 32 x 32", "pad": "black added to 32 x 32",
             "squash": "32 x 32 whatever its shape (bilinear), grey of more than 8 bits divided by 4095"}
    assert words[resize] in capsys.readouterr().out
    levels = np.random.default_rng(0).integers(0, 65536 if white is None else 4096, (40, 100)).astype(np.uint16)
    levels[:20, :50] //= 4
    for kind, picture in (("PNG", Image.fromarray(levels)), ("PNG", Image.fromarray((levels // 257).astype(np.uint8)).convert("RGB"))):
        picture.save("some.jpg", kind)
        exec(snippet("use_the_program"), names := {})
        x, _ = next(data.batches(data.eval_loader([("some.jpg",)], preprocessing, 1)))
        expected = export.Program(means, MEAN, STD)(x / 255)[0]
        assert torch.allclose(names["probabilities"], expected, atol=2e-3)


def test_the_readme_runs_what_export_wrote(train, pictures, tmp_path, capsys, monkeypatch):
    """The snippet gives the class and the probability that predict.py prints."""
    run, size = train(model="squeezenet1_1", lr=1e-4), (100, 80)
    Image.open(pictures / "test/dog/dog.1.png").resize(size).save(tmp_path / "some.jpg")
    monkeypatch.chdir(tmp_path)
    assert call("--checkpoint", run / "best.pt", "some.jpg", "--csv", "x.csv", "--export", "model.pt2") == 0
    said = capsys.readouterr().out
    assert "input: RGB in 0..1" in said and "probabilities: cat, dog" in said
    names = {}
    exec(snippet("use_the_program"), names)
    row, shown = rows_of("x.csv")[0], capsys.readouterr().out.split()
    assert shown[0] == row["prediction"] and float(shown[1]) == pytest.approx(float(row["probability"]), abs=2e-3)
    assert names["about"]["classes"] == ["cat", "dog"] and names["about"]["image_size"] == 32


def test_a_regression_is_exported_in_its_own_units(regress, discs, tmp_path, capsys, monkeypatch):
    run = regress("--log-target", quantiles="0.1,0.5,0.9")
    monkeypatch.setattr(predict, "rebuild", lambda state: tiny(3).eval())  # quicker to export
    assert call("--checkpoint", run / "best.pt", "--export", tmp_path / "model.pt2") == 0
    assert "the quantiles 0.1, 0.5, 0.9 in their own units: radius" in capsys.readouterr().out
    x, state = torch.rand(3, 3, 32, 32), read(run / "best.pt")
    found = torch.export.load(tmp_path / "model.pt2").module()(x)
    mean, std = (torch.tensor(state["preprocessing"][k]).view(3, 1, 1) for k in ("mean", "std"))
    outputs = tiny(3).eval()((x - mean) / std).detach().view(3, 1, 3)
    assert torch.allclose(found.double(), tables.to_own_units(outputs, state["scale"], [0.1, 0.5, 0.9])[1], rtol=1e-4)


def test_export_of_several_checkpoints_is_refused(error_of):
    both = ["--checkpoint", "a.pt", "--checkpoint", "b.pt", "--export", "x.pt2"]
    assert "--export writes one --checkpoint" in error_of(predict.main, both)
    assert "--export writes one --checkpoint" in error_of(predict.main, ["--checkpoint", "a.pt", "--tta", "--export", "x.pt2"])
