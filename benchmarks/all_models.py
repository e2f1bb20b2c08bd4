"""Every classification network of torchvision: its head, what each way to freeze leaves to train, and does it all work?

    python benchmarks/all_models.py                                 # the table, without training: half a minute
    python benchmarks/all_models.py --train --out all_models.md     # and train, save, rebuild and predict with each
    python benchmarks/all_models.py --train --models timm:resnet10t,timm:vit_tiny_patch16_224      # networks of timm

The numbers are parameters, with a new head for two classes and without auxiliary heads. With --train, each network goes
through train_classifier.py as a user would run it, on a few drawn pictures and from a file of weights for 1000 classes:
a step with nothing frozen, with `backbone`, `conv`, `bn` and `to:` its middle layer group frozen, with `--head mlp`, each
time saved; then predict.py must give the same probabilities from best.pt. The weights are random, with the running
statistics of one batch. Networks too large for this machine's memory are named.
"""

import argparse
import contextlib
import csv
import gc
import io
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export  # noqa: E402
import features  # noqa: E402
import freeze  # noqa: E402
import model as models  # noqa: E402
import predict  # noqa: E402
import train_classifier  # noqa: E402

SPECS = ("backbone", "conv", "bn")
RANDOM_INIT = ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
               "kaiming_normal_")


class QuickInit(TorchFunctionMode):
    """Random initialization of torch.nn.init replaced: by nothing, or by small uniform numbers. A network of 600
    million parameters is then built in a second or two instead of a minute.
    """

    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # torch.nn.init's functions, and those of them that call a method of the parameter at once (xavier_uniform_)
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in RANDOM_INIT and isinstance(tensor, nn.Parameter):
            # below 1: older versions of trunc_normal_ go on to compute erfinv of it
            bound = min(0.9, (3 / max(1, tensor[0].numel())) ** 0.5) if tensor.ndim > 1 else 0.1
            return tensor.detach().uniform_(-bound, bound) if self.fill else tensor
        return func(*args, **(kwargs or {}))


def size_of(name):
    """The smallest image size, of those that a user might give, that the network can be trained with."""
    return {"maxvit_t": 224, "inception_v3": 299, "vit_h_14": 70}.get(name.removeprefix("timm:"), 64)


def build(name, fill=False, real=models.build, **options):
    """`model.build`, with quick random weights (or, without `fill`, whatever stands in the memory)."""
    with QuickInit(fill):
        return real(name, **options)


def row_of(name):
    """{column: value}: the parameters that train, None where the network has no such layers."""
    model = build(name, **models.build_options(name, size_of(name)))
    head = freeze.find_head(model)
    old = model.get_submodule(head)
    model.set_submodule(head, nn.Conv2d(old.in_channels, 2, 1) if isinstance(old, nn.Conv2d)
                        else nn.Linear(old.in_features, 2, bias=old.bias is not None))
    row = {"network": name, "parameters": sum(p.numel() for p in model.parameters()), "head": head,
           "head block": head.split(".")[0]}
    for spec in SPECS:
        try:
            freeze.freeze(model, spec, head)
            row[spec] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        except freeze.FreezeError:
            row[spec] = None
    row["layer groups"] = len(groups := list(freeze.layer_groups(model, head)))
    row["middle"] = groups[len(groups) // 2 - 1]
    return row


def markdown(row):
    """One line of the table."""
    cells = [f"{v:,}" if isinstance(v, int) else "none there" if v is None else v for k, v in row.items() if k != "middle"]
    return f"| {' | '.join(cells)} |"


def draw_pictures(root):
    rng = random.Random(0)
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for kind in ("cat", "dog"):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                noise = Image.frombytes("RGB", (10, 10), rng.randbytes(300))
                noise.resize((80, 80)).save(root / split / kind / f"{i}.png")


def write_weights(name, file):
    """A state_dict for 1000 classes: random weights, BatchNorms that have seen one batch."""
    model = build(name, fill=True, **models.build_options(name, size_of(name), auxiliary=True)).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # no variance below a half: few pictures, and no layer may blow up
    with torch.no_grad():
        model(torch.randn(4, 3, size_of(name), size_of(name)))
    torch.save(model.state_dict(), file)


def train_and_predict(row, root):
    """What went through train_classifier.py and predict.py, in words."""
    name, done = row["network"], []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if memory and 4 * 4 * row["parameters"] > memory:  # weights, gradients, best.pt, and room
        return "too large for this machine"
    runs = [("none", []), *((s, []) for s in SPECS if row[s]), (f"to:{row['middle']}", []), ("backbone", ["--head", "mlp"])]
    write_weights(name, root / "weights.pth")
    for spec, more in runs:
        output = root / "run"
        # The batch of four is the whole split; SGD without momentum keeps the checkpoint of a large network small.
        argv = ["--data", root / "data", "--output", output, "--model", name, "--weights",
                root / "weights.pth", "--image-size", size_of(name), "--epochs", 1, "-b", 4, "-j", 0, "--amp", "off", "--optimizer", "sgd", "--momentum", 0,
                "--lr", 1e-4, "--freeze", spec, "--no-report", *more]
        with contextlib.redirect_stdout(io.StringIO()):
            train_classifier.main([str(a) for a in argv])
            try:
                predict.main(["--checkpoint", str(output / "best.pt"), str(root / "data/test"), "--csv",
                              str(output / "again.csv"), "-j", "0"])
            except SystemExit as stopped:
                assert stopped.code == 0, stopped.code
        found = []
        for file in ("test_predictions.csv", "again.csv"):
            with open(output / file, newline="") as lines:
                found.append([(r["file"], r["prediction"], float(r["probability"])) for r in csv.DictReader(lines)])
        assert found[0] == found[1], f"{name}, {spec}: predict.py differs from the training script: {found}"
        shutil.rmtree(output)
        gc.collect()
        done.append("mlp" if more else spec.partition(":")[0])
    return ", ".join(done)


def features_are_exact(name):
    """Is the head's side, given what the backbone makes of a batch, the whole network bit for bit? (--cache-features)"""
    model = build(name, fill=True, num_classes=3, **models.build_options(name, size_of(name), auxiliary=False)).eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, size_of(name), size_of(name)).contiguous(memory_format=torch.channels_last)
    side = features.head_side(model, freeze.find_head(model))
    with torch.inference_mode():
        return torch.equal(side(features.head_input(model, side, x)), model(x))


def exported(name, file):
    """'' if predict.py could write the network as a program that gives the same as it does, else what is wrong."""
    model = build(name, fill=True, num_classes=3, **models.build_options(name, size_of(name), auxiliary=False)).eval()
    try:
        export.write(export.Program(model, models.IMAGENET_MEAN, models.IMAGENET_STD), size_of(name), file, {})
    except export.ExportError as error:
        return f"{name}: {error}"
    file.unlink()
    return ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train, save, rebuild and predict with each: about an hour")
    parser.add_argument("--features", action="store_true", help="only: can features be cached exactly? some minutes")
    parser.add_argument("--export", action="store_true", help="only: can each be exported? about a quarter of an hour")
    parser.add_argument("--models", metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--out", metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    names = args.models.split(",") if args.models else models.model_names()
    if args.features:
        exact = [name for name in names if features_are_exact(name)]
        print(f"exact for {len(exact)} of {len(names)} networks; not for: {', '.join(set(names) - set(exact)) or 'none'}")
        return
    if args.export:
        with tempfile.TemporaryDirectory() as folder:
            wrong = list(filter(None, (exported(name, Path(folder, "model.pt2")) for name in names)))
        print(f"{len(names) - len(wrong)} of {len(names)} networks can be exported; not:", *wrong or ["none"], sep="\n")
        return

    lines = []

    def say(line):
        print(line, flush=True)
        lines.append(line)

    # In the scripts, weights are loaded right after: their random ones need not take a minute.
    quick = [mock.patch.object(module, "build", build) for module in (train_classifier, models)]
    with tempfile.TemporaryDirectory() as folder, quick[0], quick[1]:
        draw_pictures(Path(folder, "data"))
        for name in names:
            row = row_of(name)
            if not lines:
                columns = [k if k not in SPECS else f"train under `{k}`" for k in row if k != "middle"]
                columns += ["trained, saved, rebuilt with"] if args.train else []
                say(f"| {' | '.join(columns)} |")
                say("|" + "---|" * len(columns))
            more = f" {train_and_predict(row, Path(folder))} |" if args.train else ""
            say(markdown(row) + more)
    print(f"\ntorch {torch.__version__}, torchvision {torchvision.__version__}")
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
