"""Write a trained network as a program that runs without the code that built it: torch.export's .pt2, or ONNX.

    program = Program(model, mean, std)                     # pictures (N, 3, size, size) in 0..1 -> probabilities (N, C)
    program = Program(model, mean, std, scale=scale)        # -> numbers in their own units
    print(write(program, size, "model.pt2", {"classes": ["cat", "dog"]}))

This file needs torch alone, for .onnx also the packages onnx and onnxscript, and can be copied into any project.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from pathlib import Path

import torch
from torch import nn

TOLERANCE = 1e-4  # the largest difference to the network, as a share of the largest output


class ExportError(Exception):
    """A network that cannot be written as a program. The message is one line that names the way out."""


class Program(nn.Module):
    """A network with what belongs before and behind it: normalization, then softmax, sigmoid, or the way back to a
    target's own units.

    scale: None for classes and labels; for numbers {"mean": [...], "std": [...], "log": bool}, as tables.fit_scale
    makes it; quantiles: of each number, how many the network was trained for (0: it gives the number itself). labels:
    whether it gives labels, of which a picture may have any number.

    forward(pictures (N, 3, H, W) float32, RGB in 0..1) -> probabilities (N, C) of classes or labels, numbers (N,
    T), or their quantiles (N, T, Q), ascending.
    """

    def __init__(self, model, mean, std, scale=None, quantiles=0, labels=False):
        super().__init__()
        self.model, self.quantiles, self.labels = model, quantiles, labels
        self.classes, self.log = scale is None and not labels, bool(scale and scale["log"])
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        if scale:
            self.register_buffer("target_mean", torch.tensor(scale["mean"]).unsqueeze(1))
            self.register_buffer("target_std", torch.tensor(scale["std"]).unsqueeze(1))

    def forward(self, pictures):
        outputs = self.model((pictures - self.mean) / self.std)
        if self.classes:
            return outputs.softmax(1)
        if self.labels:
            return outputs.sigmoid()
        numbers = outputs.unflatten(1, (-1, self.quantiles or 1)) * self.target_std + self.target_mean
        numbers = numbers.exp() if self.log else numbers
        return numbers.sort(2).values if self.quantiles else numbers.flatten(1)


def write(program, size, path, about):
    """Write `program` for pictures of size x size pixels and any number of them to a new file, .pt2 or .onnx, with the
    dict `about` as its metadata. Returns words about how well the file agrees with the network. Raises ExportError, and
    then there is no such file.

    What is to be written is read again and has to give the outputs of `program`, for three pictures where two were
    traced, up to TOLERANCE times the largest of them. (ONNX: if the package onnxruntime is there.)
    """
    kind = Path(path).suffix
    if kind not in (".pt2", ".onnx"):
        raise ExportError(f"{path} must end in .pt2 (a program for PyTorch) or .onnx")
    if os.path.lexists(path):
        raise ExportError(f"{path} exists: it was left as it is, give another name")
    if kind == ".onnx":
        lacking = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if lacking:
            raise ExportError(f"writing {path} needs the packages onnx and onnxscript: pip install {' '.join(lacking)}")
    program, pictures = program.cpu().eval(), torch.rand(2, 3, size, size)
    with torch.no_grad(), _quiet():
        try:
            content, again = (_to_pt2 if kind == ".pt2" else _to_onnx)(program, pictures, about)
        except Exception as error:  # torch.export and torch.onnx raise many kinds
            said = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
            raise ExportError(f"{type(program.model).__name__} cannot be written as {kind} ({said[:200]}): use "
                              "--weights-only, which any network can be") from error
        said = "not compared with the network: pip install onnxruntime for that"
        if again:
            others = torch.rand(3, 3, size, size)
            expected, found = program(others), again(others)
            difference = float((found - expected).abs().max() / expected.abs().max())
            if not (found.shape == expected.shape and difference <= TOLERANCE):  # true for nan as well
                raise ExportError(f"{path} was not written: the program differs from the network by {difference:.1e} of "
                                  "the largest output; use --weights-only")
            said = (f"its outputs differ from the network's by at most {difference:.0e} of the largest one" if difference
                    else "its outputs are exactly the network's")
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"could not write {path} ({error.strerror}): make room there, or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return said


def _to_pt2(program, pictures, about):
    """Returns the content of the file, and a function of pictures: the program in there."""
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(program, (pictures,), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(exported, buffer := io.BytesIO(), extra_files={"about.json": json.dumps(about)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _to_onnx(program, pictures, about):
    """As `_to_pt2`; without onnxruntime, None in place of the function."""
    batch = torch.export.Dim("batch", min=1)
    onnx_program = torch.onnx.export(program, (pictures,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
                                     input_names=["pictures"], output_names=["outputs"])
    onnx_program.model.metadata_props["about"] = json.dumps(about)
    content = onnx_program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return content, None
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"pictures": x.numpy()})[0])


@contextlib.contextmanager
def _quiet():
    """Without what torch.export and torch.onnx print about themselves."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
