"""Where does the time go? Parts of a run of train_classifier.py, each beside what it costs at the least.

    python benchmarks/parts.py --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth           # all, a quarter of an hour
    python benchmarks/parts.py --data ./cats_and_dogs --weights resnet18-cifar8-64px.pth --parts start,save

start    from the command to the end of the first optimizer step, beside a bare script that imports torch and torchvision,
         loads the same weights and makes one step on the first batch
steps    pictures per second while training, decoding included, beside the same steps on one batch in memory
save     last.pt and best.pt, beside an epoch
cache    pictures per second through the frozen backbone: other batch sizes, BatchNorm folded into the convolutions
compile  --compile: the first step and those after it

What is compared runs in turn, --rounds times; medians, and lowest to highest. Nothing else should run meanwhile.
"""

import argparse
import copy
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import data  # noqa: E402
import features  # noqa: E402
import model as models  # noqa: E402
from losses import CrossEntropy  # noqa: E402

OURS = """
import os, sys
sys.path.insert(0, {root!r})
import ending, train_classifier
ending.leave_if_asked = lambda stop: os._exit(0)  # called after each step
train_classifier.main({words!r})
"""
BARE = """
import torch, torchvision
from torchvision import transforms as t
steps = t.Compose([t.RandomResizedCrop(224), t.RandomHorizontalFlip(), t.ToTensor()])
loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder({train!r}, steps), 32, True, num_workers={workers})
model = torchvision.models.resnet18(num_classes=8)
model.load_state_dict(torch.load({weights!r}, weights_only=True))
optimizer = torch.optim.SGD(model.parameters(), 0.001)
x, y = next(iter(loader))
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
import os
os._exit(0)
"""


def shown(values, digits=1):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(ones, others):
    return f"{statistics.median(a / b for a, b in zip(ones, others, strict=True)):.2f}"


def seconds_of(words):
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def median_seconds(function, least=3.0):
    """Of the calls that fit into `least` seconds; one goes before."""
    function()
    times = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def options(args, folder, *more):
    return ["--data", args.data, "--weights", args.weights, "--image-size", "224", "--workers", str(args.workers),
            "--output", str(Path(folder, "run")), *more]


def prepared():
    """A ResNet-18 and an optimizer as the script makes them, and a step on one batch in memory, given what to run."""
    network = torchvision.models.resnet18(num_classes=2).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    dtype = models.pick_precision("auto", network, torch.device("cpu"))[2]
    x = torch.randn(32, 3, 224, 224).to(memory_format=torch.channels_last)
    y, criterion = torch.arange(32) % 2, CrossEntropy()

    def step(run):
        with torch.amp.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = run(x)
        criterion(outputs.float(), y).backward()
        nn.utils.get_total_norm([p.grad for p in network.parameters()])
        optimizer.step()
        optimizer.zero_grad()

    return network, optimizer, step


def start(args):
    ours, bare, imports = [], [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(seconds_of([sys.executable, "-c", OURS.format(root=str(ROOT), words=options(args, folder))]))
        code = BARE.format(train=str(Path(args.data, "train")), workers=args.workers, weights=args.weights)
        bare.append(seconds_of([sys.executable, "-c", code]))
        imports.append(seconds_of([sys.executable, "-c", "import torch, torchvision"]))
    print(f"start: {shown(ours)} s to the end of the first step, bare script {shown(bare)} s, ratio {ratio(ours, bare)}; "
          f"importing torch and torchvision alone {shown(imports)} s")


def steps(args):
    training, memory = [], []
    network, _, step = prepared()
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(ROOT / "train_classifier.py"), *options(args, folder, "--epochs", "2")],
                           check=True, stdout=subprocess.DEVNULL)
            with open(Path(folder, "run", "history.csv"), newline="") as file:
                training.append(float(list(csv.DictReader(file))[1]["images_per_second"]))  # workers are up by then
        memory.append(32 / median_seconds(lambda: step(network)))
    print(f"steps: {shown(training)} pictures/s while training, {shown(memory)} in memory, ratio {ratio(training, memory)}")


def save(args):
    network, optimizer, step = prepared()
    count = len(data.find_images(args.data).splits["train"])
    epoch = count * median_seconds(lambda: step(network)) / 32
    state = {"script": "parts", "options": {}, "model": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        times = [median_seconds(lambda: checkpoint.save(state, folder, best=True), 1.0) for _ in range(args.rounds)]
        size = os.path.getsize(Path(folder, "last.pt")) / 1e6
    print(f"save: {shown(times, 2)} s for last.pt and best.pt of {size:.0f} MB; the steps of an epoch of {count} pictures "
          f"take {epoch:.1f} s: {100 * statistics.median(times) / epoch:.1f} %")


def folded(module):
    """The same in evaluation mode, each BatchNorm folded into the convolution that stands before it."""
    for _, inner in module.named_children():
        folded(inner)
    names = [name for name, _ in module.named_children()]
    for one, other in zip(names, names[1:], strict=False):
        convolution, norm = module.get_submodule(one), module.get_submodule(other)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, one, nn.utils.fusion.fuse_conv_bn_eval(convolution, norm))
            setattr(module, other, nn.Identity())
    return module


def cache(args):
    network = torchvision.models.resnet18(num_classes=2).eval().to(memory_format=torch.channels_last)
    dtype = models.pick_precision("auto", network, torch.device("cpu"))[2]
    lighter, found = folded(copy.deepcopy(network)).to(memory_format=torch.channels_last), {}
    for _ in range(args.rounds):
        for name, run in (("as it is", network), ("BatchNorm folded", lighter)):
            side = features.head_side(run, ("fc",))
            for size in (32, 64, 128):
                x = torch.randn(size, 3, 224, 224).to(memory_format=torch.channels_last)

                @torch.inference_mode()
                def through(run=run, side=side, x=x):
                    with torch.amp.autocast("cpu", dtype, enabled=dtype is not None):
                        features.head_input(run, side, x)

                found.setdefault((name, size), []).append(size / median_seconds(through))
    print("cache, pictures/s through the backbone: " + "; ".join(
        f"{name}, batches of {size}: {shown(v)}" for (name, size), v in found.items()))


def compiling(args):
    plain, compiled, first = [], [], []
    for _ in range(args.rounds):
        network, _, step = prepared()
        plain.append(32 / median_seconds(lambda: step(network)))  # noqa: B023
        torch.compiler.reset()
        faster = torch.compile(network)
        started = time.perf_counter()
        step(faster)
        first.append(time.perf_counter() - started)
        compiled.append(32 / median_seconds(lambda: step(faster)))  # noqa: B023
    print(f"compile: {shown(plain)} pictures/s, with --compile {shown(compiled)}, ratio {ratio(compiled, plain)}; its first "
          f"step takes {shown(first)} s")


PARTS = {"start": start, "steps": steps, "save": save, "cache": cache, "compile": compiling}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="train/ and val/")
    parser.add_argument("--weights", required=True, metavar="FILE", help="of a ResNet-18 with 8 outputs")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N")
    args = parser.parse_args(argv)
    args.data, args.weights = os.path.abspath(args.data), os.path.abspath(args.weights)
    models.keep_freed_memory()  # as the script does
    machine = checkpoint.machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, {args.workers} workers, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}, {args.rounds} rounds", flush=True)
    for name in args.parts.split(","):
        PARTS[name](args)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
