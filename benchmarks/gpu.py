"""A machine with a GPU is at hand: is everything right there, and how fast is it?

    python benchmarks/gpu.py                                        # all, eight minutes at the most
    python benchmarks/gpu.py --only compile --only resume-classifier
    python benchmarks/gpu.py --device cpu                           # the same parts, small

Needs nothing but this repository and its requirements.txt; it draws its own pictures. Each part is a process of its own
with a time limit; one that fails, crashes or takes too long is a row of the table, and the others go on. Parts that
have no meaning on this machine are rows, too, and say why. The table is printed as the rows come in; --out has all of
it, with the numbers. Exit status 1 if a row has failed. First "right", several parts at a time, then "fast", one at
a time.

A part is a function that yields rows (what, words, {name: number}), raises Wrong for what is not right and NotHere for
what there is not; it stands in RIGHT or FAST below with its time limit.
"""

import argparse
import contextlib
import csv
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFilter
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import checkpoint  # noqa: E402
import data  # noqa: E402
import freeze  # noqa: E402
import metrics  # noqa: E402
import model as models  # noqa: E402
import same_weights  # noqa: E402
import train_classifier  # noqa: E402


class Wrong(Exception):
    """Something is not as it has to be."""


class NotHere(Exception):
    """A part that has no meaning on this machine."""


def check(holds, words):
    if not holds:
        raise Wrong(words)


# ---- pictures


def draw(folder, per_class):
    """folder/train/disc/0.jpg and so on, as large and as rich in detail as a photograph, and folder/labels.csv with the
    radius of what is on each, and two labels. per_class: {split: number of pictures}.
    """
    rng, rows = np.random.default_rng(0), []
    for split, count in per_class.items():
        for kind in ("disc", "square"):
            Path(folder, split, kind).mkdir(parents=True)
            for i in range(count):
                file, radius = f"{split}/{kind}/{i}.jpg", rng.uniform(40, 120)
                ground = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                ground = ground.resize((500, 375), Image.BICUBIC)
                x, y = rng.uniform(130, 370), rng.uniform(130, 245)
                box = (x - radius, y - radius, x + radius, y + radius)
                pen = ImageDraw.Draw(ground)
                (pen.ellipse if kind == "disc" else pen.rectangle)(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
                noise = rng.normal(0, 8, (375, 500, 3))  # as of a sensor
                pixels = np.asarray(ground.filter(ImageFilter.SMOOTH)) + noise
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(folder, file), quality=90)
                row = {"file": file, "radius": radius, "large": int(radius > 80), "round": int(kind == "disc")}
                rows.append(row | {"split": split})
    checkpoint.write_csv(rows, Path(folder, "labels.csv"))


def many(pictures, folder, train, val):
    """A folder of so many pictures, which are further names of the drawn ones. Returns it."""
    for split, count in (("train", train), ("val", val)):
        # The classes in turn.
        files = sorted(Path(pictures, split).rglob("*.jpg"), key=lambda file: (int(file.stem), file))
        for i in range(count):
            place = Path(folder, split, files[i % len(files)].parent.name)
            place.mkdir(parents=True, exist_ok=True)
            os.link(files[i % len(files)], place / f"{i}.jpg")
    return folder


# ---- running a script

KILL = """
import ending, os, signal
real, looks = ending.leave_if_asked, iter(range(1, 10**6))
def leave_if_asked(stop):
    if next(looks) == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(stop)
ending.leave_if_asked = leave_if_asked
"""  # as the script looks for the `moment`th time whether it shall stop: behind each step and batch of a validation
FULL = """
import ending, torch
real, looks = ending.leave_if_asked, iter(range(1, 10**6))
def leave_if_asked(stop):
    real(stop)
    if next(looks) == {moment}:
        torch.cuda.empty_cache()
        all = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / all, 0)
ending.leave_if_asked = leave_if_asked
"""  # from there on the process gets no more of the GPU's memory than it holds


def run(script, words, edits=(), before="", processes=0, status=0):
    """Run a script of the repository. edits: ((text, text in its place), ...) made to it first. before: code that is
    run before it. processes: by torchrun. Raises Wrong unless it ends with this status. Returns (stdout, stderr).
    """
    command = [str(ROOT / f"{script}.py"), *map(str, words)]
    if edits or before:
        command = [__file__, "--launch", json.dumps([script, command[1:], edits, before])]
    if processes:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    print(f"{script}.py {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != status:
        raise Wrong(f"{script}.py ended with status {done.returncode} in place of {status}: {last_line(done.stderr)}")
    return done.stdout, done.stderr


def launch(request):
    """Behind --launch: the edited script, in this process."""
    script, words, edits, before = json.loads(request)
    text = (ROOT / f"{script}.py").read_text()
    for old, new in edits:
        if old not in text:
            sys.exit(f"error: {script}.py does not say {old} any more")
        text = text.replace(old, new)
    exec(before, {})
    sys.argv = [f"{script}.py", *words]
    exec(compile(text, ROOT / f"{script}.py", "exec"), {"__name__": "__main__"})


def last_line(text):
    """The last line that is an error's, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line.partition(":")[0]]
    return (errors or lines or ["it said nothing"])[-1][:300]


def words_for(here, script, output, *more):
    """The words of a short training with two epochs of a small network: six steps each, twelve with replay."""
    of_script = {"train_classifier": here.network, "train_regressor": f"--target radius {here.network}",
                 "train_multilabel": f"--target large,round {here.network}",
                 "train_continual": f"--from {here.folder}/base/best.pt --old-data {here.pictures} --method ewc+replay "
                                    "--fisher-size 8"}
    common = f"--data {here.pictures} --batch-size 8 --epochs 2 --workers 2 --no-report --log-every 2"
    where = f"--device {here.device} --output {here.folder / output}"
    return " ".join([common, of_script[script], where, *more]).split()


def train(here, script, output, *more, **how):
    """Run such a training; `more` replaces words of it. Returns its folder."""
    if script == "train_continual" and not (here.folder / "base").exists():
        train(here, "train_classifier", "base", "--epochs 1 --no-test")
    run(script, words_for(here, script, output, *more), **how)
    return here.folder / output


def killed_and_resumed(here, script, output, *more, moment=5, **how):
    """The same, saved every second step, killed at this moment, gone on with. Returns its folder and where that was."""
    kill = KILL.format(moment=moment) + how.pop("before", "")
    folder = train(here, script, output, "--save-every 2", *more, before=kill, status=-signal.SIGKILL, **how)
    state = checkpoint.load(folder / "last.pt", script)
    check(state["sums"], f"there was no save within the epoch that was killed, the last is of step {state['step']}")
    train(here, script, output, "--save-every 2", *more, "--resume", **how)
    rows, whole = history(folder), checkpoint.load(folder / "last.pt", script)
    check(len(rows) == 2, f"history.csv has {len(rows)} epochs in place of 2")
    check(all(math.isfinite(row[name]) for row in rows for name in row if "loss" in name), "a loss is not finite")
    check(len({key for key in whole["model"] if key.startswith(("module.", "_orig_mod."))}) == 0, "keys with a prefix")
    return folder, f"killed in epoch {state['epoch']}, gone on from step {state['step']} of {whole['step']}"


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights_differ(one, other, name="last.pt"):
    """The largest difference between the weights of two run folders, 0.0 where all bits are the same."""
    a, b = (checkpoint.load(folder / name)["model"] for folder in (one, other))
    check(a.keys() == b.keys(), f"other weights: {sorted(a.keys() ^ b.keys())[:3]}")
    if all(torch.equal(a[key], b[key]) for key in a):
        return 0.0
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def losses_differ(one, other):
    """The largest relative difference between the losses of two run folders, over all epochs."""
    return max(abs(a[name] - b[name]) / max(a[name], 1e-6) for a, b in zip(history(one), history(other), strict=True)
               for name in ("train_loss", "val_loss"))


def within(difference, bound, what):
    check(difference <= bound, f"{what} differ by {difference:.1e}, allowed are {bound:.1e}")
    return f"{what} {'are the same bits' if not difference else f'differ by {difference:.1e} (bound {bound:.1e})'}"


# ---- right


def resume(here, script):
    """A training is killed within an epoch, behind a save, and goes on."""
    _, words = killed_and_resumed(here, script, "run")
    yield "", f"{words}, 2 epochs in history.csv", {}


def deterministic(here, amp):
    """--deterministic, with dropout, whose random numbers a GPU draws itself: once, again, and killed and resumed."""
    words = f"--deterministic --head mlp --amp {amp}"
    first, again = (train(here, "train_classifier", name, words) for name in ("first", "again"))
    broken, where = killed_and_resumed(here, "train_classifier", "broken", words)
    for what, other in (("again", again), ("resumed", broken)):
        for name in ("best.pt", "last.pt"):
            difference = weights_differ(first, other, name)
            check(difference == 0, f"the weights of {name} differ by {difference:.1e}: {what}")
    yield "", f"precision {checkpoint.load(first / 'last.pt')['precision']}: the same bits again, and {where}", {}


# What one rounding may change, as a share. The first loss has gone through some twenty layers, each of which rounds;
# what the weights have learned by five steps, through several times as many. (On a CPU it was 0.5 to 5 times as much,
# and 3 to 20.) The scripts leave TF32 as PyTorch has it: on in convolutions, off in the products of matrices.
ROUNDING = {"TF32 in convolutions": 2**-11, "TF32 in all": 2**-11, "bf16": 2**-8, "fp16": 2**-11}
FIRST, LATER = 16, 64


def precisions(here):
    """The loss of one batch, at first and after five steps, in each precision beside float32 without TF32."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 64, 64, device=here.device).to(memory_format=torch.channels_last)
    y = torch.arange(16, device=here.device) % 2
    start = models.build(here.model, num_classes=2).state_dict()

    def losses(dtype=None, tf32=(False, False)):
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        network = models.build(here.model, num_classes=2)
        network.load_state_dict(start)
        network.to(here.device, memory_format=torch.channels_last).train()
        # A scale at which nothing overflows: a step that is skipped would make the difference.
        step = one_step(network, torch.optim.AdamW(network.parameters(), 1e-5, fused=True), dtype, x, y, scale=256.0)
        return [step().item() for _ in range(6)]

    exact = losses()
    sides = {"bf16": losses(torch.bfloat16), "fp16": losses(torch.float16)}
    if torch.device(here.device).type == "cuda":
        sides["TF32 in convolutions"] = losses(tf32=(True, False))
        sides["TF32 in all"] = losses(tf32=(True, True))
    for name, found in sides.items():
        first, later = (abs(found[i] - exact[i]) / exact[0] for i in (0, 5))
        words = [within(first, FIRST * ROUNDING[name], "the first losses"),
                 within(later, LATER * ROUNDING[name], "those after five steps")]
        yield name, "; ".join(words), {"first": first, "later": later}


def one_step(network, optimizer, dtype, x, y, scale=2.0**16):
    """A function that makes one step on one batch, in the order of the scripts, and returns the loss."""
    scaler = torch.amp.GradScaler(x.device.type, init_scale=scale, enabled=dtype == torch.float16)
    autocast = torch.amp.autocast(x.device.type, dtype, enabled=dtype is not None)

    def step():
        with autocast:
            outputs = network(x)
        loss = nn.functional.cross_entropy(outputs.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def precisions_of_the_script(here):
    """Two epochs of the script itself in each precision, beside --amp off. (Frozen BatchNorms: in a small network,
    statistics of eight pictures make much of a rounding.)
    """
    words = "--freeze bn --augment none --lr 1e-5"
    exact = train(here, "train_classifier", "off", words, "--amp off")
    for amp in ("bf16", "fp16"):
        other = train(here, "train_classifier", amp, words, f"--amp {amp}")
        difference = losses_differ(exact, other)
        yield amp, within(difference, LATER * ROUNDING[amp], "the losses"), {"difference": difference}


def overflow(here):
    """fp16: steps that overflow are skipped and halve the scale until none does; after many good ones it doubles."""
    words = "--amp fp16 --batch-size 4 --freeze bn --lr 1e-5 --no-test"  # 12 steps, of which nothing else overflows
    folder = train(here, "train_classifier", "run", words, "--epochs 1")

    def go_on(scale, good_steps, epochs):
        state = checkpoint.load(folder / "last.pt")
        state["scaler"] |= {"scale": scale, "_growth_tracker": good_steps}
        torch.save(state, folder / "last.pt")
        train(here, "train_classifier", "run", words, f"--epochs {epochs}", "--resume")
        row = history(folder)[-1]
        return int(row["skipped_steps"]), row["loss_scale"]

    # Of a fresh head, the loss's gradient is about an eighth, and 65504 the largest number: 2^19 is too much already.
    skipped, scale = go_on(2.0**22, 0, 2)
    check(0 < skipped < 12, f"{skipped} of 12 steps were skipped at a scale of 2^22")
    check(scale == 2.0 ** (22 - skipped), f"the scale is {scale} after {skipped} halvings of 2^22")
    interval = checkpoint.load(folder / "last.pt")["scaler"]["growth_interval"]
    later, grown = go_on(2.0, interval - 1, 3)
    check((later, grown) == (0, 4.0), f"{later} skipped, and a scale of 2 has become {grown} in place of 4")
    down = f"{skipped} of 12 steps skipped from 2^22 down to 2^{math.log2(scale):.0f}"
    yield "", f"{down}; a scale of 2 grew to {grown:.0f}", {}


def predicted(here, checkpoint_file, device, name):
    """What predict.py says on a device of the test pictures: {file: probability of a disc}."""
    table = here.folder / f"{name}.csv"
    words = ["--checkpoint", checkpoint_file, "--device", device, "--csv", table, "--workers", 0]
    run("predict", [*words, here.pictures / "test"])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["file"]: abs((row["prediction"] != "disc") - float(row["probability"])) for row in rows}


# A GPU computes convolutions in TF32 where a CPU computes in float32: some twenty layers of it.
ACROSS = 0.01


def across(here, first, second):
    """A checkpoint of one device is gone on with on another, and predicts the same on both."""
    first, second = (here.device if device == "gpu" else "cpu" for device in (first, second))
    folder = train(here, "train_classifier", "run", "--epochs 1", f"--device {first}")
    one, other = (predicted(here, folder / "best.pt", device, place) for place, device in (("a", first), ("b", second)))
    difference = max(abs(one[file] - other[file]) for file in one)
    words = within(difference, ACROSS, "the probabilities")
    train(here, "train_classifier", "run", f"--device {second}", "--resume")
    rows = history(folder)
    check(len(rows) == 2 and math.isfinite(rows[1]["train_loss"]), "it did not go on to its end on the other device")
    yield "", f"{first} to {second}: {words}; went on with epoch 1 there", {"difference": difference}


def predict_and_export(here):
    """predict.py, --export and --weights-only on a checkpoint that was trained here."""
    folder = train(here, "train_classifier", "run", "--epochs 1")
    found = predicted(here, folder / "best.pt", here.device, "predicted")
    program, bare = here.folder / "model.pt2", here.folder / "bare.pth"
    run("predict", ["--checkpoint", folder / "best.pt", "--export", program, "--weights-only", bare])
    state, files = checkpoint.load(folder / "best.pt"), list(found)
    plain = data.augmentation(state["preprocessing"], "none")
    pictures = data.ImageList([(file, 0) for file in files], plain, size=2 * state["preprocessing"]["image_size"])
    x = torch.stack([pictures[i][0] for i in range(len(files))]) / 255
    with torch.no_grad():
        again = torch.export.load(program).module()(x)[:, state["classes"].index("disc")].tolist()
    difference = max(abs(a - b) for a, b in zip(found.values(), again, strict=True))
    network = torchvision.models.get_model(here.model, num_classes=2)
    network.load_state_dict(torch.load(bare, weights_only=True))  # as on a machine without a GPU, so no map_location
    words = within(difference, ACROSS, "the probabilities of the exported program on the CPU")
    yield "", f"{words}; bare weights load", {"difference": difference}


def data_parallel(here):
    """nn.DataParallel on one GPU: as it is, and with both of two replicas there. (No two GPUs: that stays untested.)"""
    device = "cuda" if here.device != "cpu" else "cpu"  # without a number: all GPUs
    words = f"--freeze backbone --augment none --amp off --device {device}"
    alone = train(here, "train_classifier", "alone", words, f"--device {here.device}")
    begun = train(here, "train_classifier", "begun", f"--epochs 1 --device {here.device}")
    for count, ids in ((1, [0]), (2, [0, 0])):
        edits = (("gpus = torch.cuda.device_count() if all_gpus else 1", "gpus = 2"),
                 ("nn.DataParallel(model)", f"nn.DataParallel(model, device_ids={ids})"))
        both = train(here, "train_classifier", f"{count}", words, edits=edits)
        difference = losses_differ(alone, both)
        _, where = killed_and_resumed(here, "train_classifier", f"{count}-killed", f"--device {device}", edits=edits)
        words_of = within(difference, 1e-2, "the losses of the head alone, with and without,")
        on = "" if device == "cuda" else " (on a CPU it hands on to the network itself)"
        yield f"{count} replica{'s' * (count > 1)}", f"{words_of}; everything, {where}, no module. in the keys{on}", {}
    run("train_classifier", ["--resume", begun / "last.pt", "--epochs", 2, "--device", device], edits=edits)
    precision = checkpoint.load(begun / "last.pt")["precision"]
    check(precision != "bf16", "a run went on in bf16 under DataParallel")
    yield "from one GPU", f"a run of one GPU went on under DataParallel in precision {precision}", {}


WRAPPED = """
import os
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
real = DDP.__init__
def init(self, *words, **more):
    real(self, *words, **more)
    print(f"wrapped: {torch.distributed.get_world_size()} by {torch.distributed.get_backend()}", flush=True)
DDP.__init__ = init
"""
ONE = WRAPPED + """
import arguments
os.environ["WORLD_SIZE"] = "01"             # which distributed.joined does not take for a process that is alone
arguments.refuse_idle = lambda *words: None  # --sync-bn for one process
"""
BOTH_HERE = WRAPPED + """
os.environ["LOCAL_RANK"] = "0"               # both take the first GPU, which NCCL does not do
torch.distributed.is_nccl_available = lambda: False
"""


def wrapped(here, output, *more, **how):
    """A training by torchrun. Returns its folder, and how many processes DistributedDataParallel has joined by what."""
    said, _ = run("train_classifier", words_for(here, "train_classifier", output, *more), **how)
    lines = [line.removeprefix("wrapped: ") for line in said.splitlines() if line.startswith("wrapped: ")]
    check(lines, "the network was not wrapped in DistributedDataParallel")
    return here.folder / output, lines[0]


def nccl(here):
    """torchrun with one process, which goes the way of several: NCCL on a GPU, DistributedDataParallel, --sync-bn."""
    on_gpu = here.device != "cpu"
    if on_gpu and not torch.distributed.is_nccl_available():
        raise NotHere("this build of torch has no NCCL")
    words = f"--lr 1e-4 --device {'cuda' if on_gpu else 'cpu'}"
    alone = train(here, "train_classifier", "alone", words, f"--device {here.device}")
    edits = (("processes > 1", "processes > 0"),)
    sync = " --sync-bn" if on_gpu else ""
    one, joined = wrapped(here, "one", words + sync, edits=edits, before=ONE, processes=1)
    difference = losses_differ(alone, one)
    yield "", f"{joined}{sync}: {within(difference, 1e-2, 'the losses with and without')}", {"difference": difference}


def two_processes(here):
    """torchrun with two processes that share the GPU (by Gloo), --sync-bn, beside one with batches of twice the size.
    On a CPU, where there is no --sync-bn, the head alone.
    """
    on_gpu = here.device != "cpu"
    words, sync, device = "--lr 1e-4 --epochs 1 --augment none --no-test", " --sync-bn", "cuda"
    if not on_gpu:
        words, sync, device = f"{words} --freeze backbone", "", "cpu"
    alone = train(here, "train_classifier", "alone", words)
    two, joined = wrapped(here, "two", words, f"--batch-size 4 --device {device}{sync}", before=BOTH_HERE, processes=2)
    difference = losses_differ(alone, two)
    said = within(difference, 1e-2, "the losses of one and of two processes")
    yield "", f"{joined}{sync}: {said}", {"difference": difference}


def memory(here):
    """The GPU's memory runs out in a step: one line, and the last save is good."""
    if here.device == "cpu":
        raise NotHere("of a GPU's memory (tests/test_interruptions.py does it to a CPU's)")
    words = "--image-size 224 --batch-size 24 --save-every 1"  # its activations do not fit into what lies about
    command = words_for(here, "train_classifier", "run", words)
    _, said = run("train_classifier", command, before=FULL.format(moment=1), status=2)
    lines = said.strip().splitlines()
    check(len(lines) == 1 and lines[0].startswith("error: ") and "out of memory" in lines[0], f"it said: {said[-500:]}")
    check("--resume" in lines[0], f"it did not say how to go on: {lines[0]}")
    step = checkpoint.load(here.folder / "run/last.pt")["step"]
    train(here, "train_classifier", "run", words, "--resume")
    check(len(history(here.folder / "run")) == 2, "it did not go on to its end")
    yield "", f"one line, '{lines[0][:60]}...'; gone on from step {step}", {}


def compiled(here):
    """--compile: a thaw, killed behind it, resumed; beside the same without."""
    network = "--unfreeze 1:layer4"
    if here.small:  # a network of few layers: the compiler of a CPU is slow
        network = "--model squeezenet1_1 --dropout 0 --image-size 48 --unfreeze 1:features.12"
    words = f"{network} --freeze backbone --amp off --augment none --lr 1e-4 --no-test"
    plain = train(here, "train_classifier", "plain", words)
    folder, where = killed_and_resumed(here, "train_classifier", "run", words, "--compile", moment=12)
    difference = losses_differ(plain, folder)
    yield "", f"{where}; {within(difference, 2e-2, 'the losses with and without')}", {"difference": difference}


def cached(here):
    """--cache-features 1 beside none, of pictures that are the same in every epoch: the head learns the same."""
    words = "--freeze backbone --augment none"
    plain, cache = (train(here, "train_classifier", f"cache{k}", words, f"--cache-features {k}") for k in (0, 1))
    difference, of_losses = weights_differ(plain, cache), losses_differ(plain, cache)
    # Another kernel, as one for other pictures beside it, may round bf16 otherwise.
    words = f"{within(difference, 1e-2, 'the weights')}, {within(of_losses, LATER * 2**-8, 'the losses')}"
    yield "", f"precision {checkpoint.load(plain / 'last.pt')['precision']}: {words}", {"difference": difference}


OPTIONS = {  # of benchmarks/same_weights.py: what computes something of its own on the device
    "classifier": "mixup-cutmix cache-thaw googlenet-mixed squeezenet class-weights class-weights-plain focal soft-f1 "
                  "cost l1 l2-sp sgd adam rmsprop adagrad plateau accumulate clip-grad find-lr fp16 bf16",
    "others": "regressor regressor-mse regressor-quantiles regressor-weights regressor-googlenet regressor-cache "
              "regressor-bf16 regressor-find-lr ewc ewc-empirical ewc-replay replay new-classes continual-l2-sp "
              "predict-mean predict-regressor",
}


def options(here, which):
    """Short commands with every group of options end well."""
    places, tree = same_weights.prepare(here.folder), same_weights.Tree(ROOT, here.folder / "tree")
    try:
        tree.wait()
        commands = {name: same_weights.COMMANDS[name] for name in OPTIONS[which].split()}
        used = " ".join(step.options for steps in commands.values() for step in steps)
        made = {name: [step._replace(stop=0, status=0)] for name, step in same_weights.MADE.items()
                if f"{{made}}/{name}/" in used}
        wrong = []
        for name, steps in (made | commands).items():
            steps = [step._replace(options=f"{step.options} --device {here.device}") for step in steps]
            _, reason = same_weights.run(tree, name, steps, places)
            if name in made and not reason:
                (places["made"]).mkdir(exist_ok=True)
                (tree.runs / name).rename(places["made"] / name)
            wrong += [f"{name}: {reason}"] if reason else []
    finally:
        tree.close()
    check(not wrong, f"{len(wrong)} of {len(commands)} have failed: {'; '.join(wrong)[:600]}")
    yield "", f"{len(commands)} commands of benchmarks/same_weights.py have ended well", {}


# ---- fast

REACHED = 0.95
SECONDS = 1.2  # of steps in an epoch that is measured, more or less


def reason(limit, found, decoding, workers, step, parts):
    """Why `found` images/s are less than REACHED of the `limit`, '' if they are not. decoding: images/s of the workers
    alone. step: the pictures of one. parts: what it does besides, {words: ms}.
    """
    if found >= REACHED * limit:
        return ""
    said = []
    if decoding < limit:
        said.append(f"decoding: {decoding:.0f} images/s with {workers} workers, the network could take {limit:.0f}")
    if decoding >= limit or found < 0.85 * decoding:  # it does not explain (all of) it
        took, least = 1000 * step / found, 1000 * step / limit
        rest = took - least - sum(parts.values())
        parts = parts | {"the rest (metrics, loader, Python)": rest}
        besides = ", ".join(f"{what} {milliseconds:.1f} ms" for what, milliseconds in parts.items())
        said.append(f"the loop: a step takes {took:.1f} ms, on one batch {least:.1f} ms; {besides}")
    return "; ".join(said)


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def ms(function, device, least=0.3):
    """The median time of a call, of as many as fit into `least` seconds; three go before."""
    for _ in range(3):
        function()
    wait(device)
    times = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def rate(step, batch, device, least=0.5):
    """Images/s of steps in a row, as many as fit into `least` seconds; three go before."""
    per_step = ms(step, device, 0.1) / 1000
    count = max(5, round(least / per_step))
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return batch * count / (time.perf_counter() - started)


class Enough(BaseException):
    """Ends a script that has been measured."""


@contextlib.contextmanager
def from_memory(size):
    """Within the block, the pictures of even epochs are not decoded: the same one is there in memory."""
    real, picture = data.ImageList.__getitem__, torch.randint(0, 256, (3, size, size), dtype=torch.uint8)

    def get(self, key):
        return (picture, self.samples[key[1]][1]) if key[0] % 2 == 0 else real(self, key)

    data.ImageList.__getitem__ = get
    try:
        yield
    finally:
        data.ImageList.__getitem__ = real


def script_rates(words, batch, steps, skip, device):
    """Images/s of train_classifier.py, as it is but for its saves, in epochs 0 to 3, from step `skip` to `steps`."""
    times, real, save = [], metrics.Meter.add_norm, checkpoint.Run.save

    def add_norm(self, norm, scaler):
        real(self, norm, scaler)
        times.append(None)
        if len(times) % steps in (skip, 0):
            wait(device)
            times[-1] = time.perf_counter()
        if len(times) == 4 * steps:
            raise Enough

    metrics.Meter.add_norm, checkpoint.Run.save = add_norm, lambda *_, **__: None
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(Enough):
            train_classifier.main([str(word) for word in words])
    finally:
        metrics.Meter.add_norm, checkpoint.Run.save = real, save
    gc.collect()  # the script's network, before another needs its memory
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    marks = [found for found in times if found is not None]
    return [batch * (steps - skip) / (end - start) for start, end in zip(marks[::2], marks[1::2], strict=True)]


def loader_rates(pictures, size, batch, workers):
    """Images/s of the workers alone: (without decoding, with it), in the second half of two epochs of them."""
    images = data.find_images(pictures)
    listed = data.ImageList(images.splits["train"], data.train_transform(size), 0, 2 * size)
    order, found = data.SeededBatches(len(listed), batch, 0, shuffle=True), []
    loader = data.make_loader(listed, order, workers)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        half, started = len(order) // 2, 0.0
        for number, _ in enumerate(data.batches(loader), start=1):
            if number == half:
                started = time.perf_counter()
        found.append(batch * (len(order) - half) / (time.perf_counter() - started))
    return found


def limit_of(here, network, spec, dtype):
    """A function that trains the network for one step on one batch that lies on the device, and its model."""
    model = models.build(network, num_classes=2, **models.build_options(network, here.fast_size))
    head = freeze.find_head(model)
    freeze.freeze(model, spec, head)
    freeze.train_mode(model)
    model.to(here.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(freeze.param_groups(model, head, 3e-3, 0.01), fused=True)
    x = torch.randn(here.batch, 3, here.fast_size, here.fast_size, device=here.device)
    y = torch.arange(here.batch, device=here.device) % 2
    return one_step(model, optimizer, dtype, x.to(memory_format=torch.channels_last), y), model


def best_flags(on):
    """PyTorch's switches for speed that the scripts leave alone."""
    torch.backends.cudnn.benchmark = on
    torch.set_float32_matmul_precision("high" if on else "highest")


DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMM = {"resnet50": "resnet50", "vit_b_16": "vit_base_patch16_224", "convnext_tiny": "convnext_tiny"}  # its names


def timm_rate(here, network, spec, pictures, dtype, steps, skip):
    """Images/s of timm's network, loader with prefetcher and augmentation, with its best flags, decoding included."""
    from timm import create_model
    from timm.data import create_dataset, create_loader

    on_gpu = here.device != "cpu"
    best_flags(True)
    started, listed = 0.0, create_dataset("", root=str(pictures), split="train")
    loader = create_loader(listed, (3, here.fast_size, here.fast_size), here.batch, is_training=True,
                           use_prefetcher=on_gpu, num_workers=here.workers, hflip=0.5, color_jitter=None,
                           scale=(0.35, 1.0), device=torch.device(here.device), pin_memory=on_gpu)
    model = create_model(TIMM[network], num_classes=2).to(here.device, memory_format=torch.channels_last).train()
    if spec == "backbone":
        model.requires_grad_(False).eval().get_classifier().requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)
    for number, (x, y) in enumerate(loader, start=1):
        x = x.to(here.device).contiguous(memory_format=torch.channels_last)
        one_step(model, optimizer, dtype, x, y.to(here.device))()
        if number == skip:
            wait(here.device)
            started = time.perf_counter()
        if number == steps:
            break
    wait(here.device)
    best_flags(False)
    return here.batch * (steps - skip) / (time.perf_counter() - started)


def fast_words(here, pictures, network, output):
    """The words of train_classifier.py for a training that is measured."""
    return f"""--data {pictures} --model {network} --weights none --image-size {here.fast_size}
        --batch-size {here.batch} --workers {here.workers} --device {here.device} --output {here.folder / output}
        --no-test --no-report""".split()


def speed(here, network, spec):
    """Images/s of the script, with decoding and without, beside the limit: the same network and optimizer on one batch
    that lies on the GPU. The limit is measured before and after; the script's epochs take turns.
    """
    size, batch, device = here.fast_size, here.batch, here.device
    if not here.small and torch.device(device).type == "cuda" and torch.cuda.mem_get_info()[0] < 40e9:
        batch = here.batch = 32
    x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    x = x.pin_memory() if device != "cpu" else x
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (models.IMAGENET_MEAN, models.IMAGENET_STD))
    to_input = ms(lambda: data.to_input(x, mean, std), device)
    with from_memory(size):
        some = many(here.pictures, here.folder / "some", batch * max(4, 4 * here.workers), batch)
        without, decoding = loader_rates(some, size, batch, here.workers)
        for amp, dtype in DTYPES.items():
            step, model = limit_of(here, network, spec, dtype)
            limits = [rate(step, batch, device)]
            best_flags(True)
            with_flags = rate(step, batch, device)
            best_flags(False)
            gradients = [torch.ones_like(p) for p in model.parameters() if p.requires_grad]
            norm = ms(functools.partial(nn.utils.get_total_norm, gradients), device)
            parts = {"to_input": to_input, "the gradient's norm": norm}
            del step, model, gradients
            steps = min(160, max(8, round(SECONDS * limits[0] / batch)))
            steps = 4 * here.workers if steps < 4 * here.workers <= 2 * steps else steps
            # The workers' first batches all come at once; then it flows.
            skip = here.workers if steps >= 4 * here.workers else steps // 4
            pictures = many(here.pictures, here.folder / amp, steps * batch, batch)
            words = [*fast_words(here, pictures, network, f"run-{amp}"), "--amp", amp, "--freeze", spec, "--epochs", 4]
            epochs = script_rates(words, batch, steps, skip, device)
            limits.append(rate(limit_of(here, network, spec, dtype)[0], batch, device))
            found = {"limit": statistics.median(limits), "without_decoding": statistics.median(epochs[::2]),
                     "with_decoding": statistics.median(epochs[1::2]), "limit_with_best_flags": with_flags,
                     "workers_alone": decoding, "workers_alone_without_decoding": without, "batch": batch,
                     "steps": steps, "limits": limits, "epochs": epochs} | parts
            if amp == "bf16" and importlib.util.find_spec("timm") and network in TIMM:
                found["timm"] = timm_rate(here, network, spec, pictures, dtype, steps, skip)
            yield amp, sides(found, here.workers, parts), found


def sides(found, workers, parts):
    """The images/s that were found, in words, and where less than REACHED of the limit is reached, why."""
    limit, said = found["limit"], [f"limit {found['limit']:.0f} images/s"]
    for name, least in (("without_decoding", "workers_alone_without_decoding"), ("with_decoding", "workers_alone")):
        why = reason(limit, found[name], found[least], workers, found["batch"], parts)
        why = why.replace("decoding:", "handing over:") if name == "without_decoding" else why
        because = f"; {why}" if why else ""
        said.append(f"{name.replace('_', ' ')} {found[name]:.0f} ({found[name] / limit:.0%}{because})")
    said.append(f"limit with cudnn.benchmark and TF32 {found['limit_with_best_flags']:.0f}")
    return ", ".join(said + ([f"timm {found['timm']:.0f}"] if "timm" in found else []))


def share(here, network):
    """How long an epoch's validation, save and looks at the sums take beside its training; 8 pictures are trained for
    each that is validated. As a command; the second of two epochs, when the workers are up.
    """
    count = here.batch * (4 if here.small else 32)
    pictures = many(here.pictures, here.folder / "pictures", count, count // 8)
    words = [str(ROOT / "train_classifier.py"), *fast_words(here, pictures, network, "run"), "--epochs", "2"]
    process = subprocess.Popen([sys.executable, "-u", *words], stdout=subprocess.PIPE, text=True)
    ends = [time.perf_counter() for line in process.stdout if line.startswith("epoch ")]
    check(process.wait() == 0 and len(ends) == 2, f"it ended with status {process.returncode} after {len(ends)} epochs")
    row, whole = history(here.folder / "run")[1], ends[1] - ends[0]
    training = count / row["images_per_second"]
    meter = metrics.Meter(["loss", "hits"], ["norm", "skipped_steps"])
    for name in meter.sums:
        meter.add(name, torch.ones((), device=here.device))
    looks = 3 * ms(meter.totals, here.device) / 1000 * math.ceil(count / here.batch / 10)
    spent = {"training": training, "looks at the sums, of these": looks, "validation": row["seconds"] - training,
             "save of last.pt and best.pt": whole - row["seconds"]}
    size = (here.folder / "run/last.pt").stat().st_size / 1e6
    words = ", ".join(f"{what} {seconds:.2f} s ({seconds / whole:.1%})" for what, seconds in spent.items())
    yield "", f"{count} pictures, {words} of {size:.0f} MB", spent | {"epoch": whole, "megabytes": size}


# ---- the parts

SCRIPTS = ("classifier", "multilabel", "regressor", "continual")
RIGHT = [  # (name, function, limit in seconds)
    ("compile", compiled, 240),
    *[(f"options-{which}", functools.partial(options, which=which), 200) for which in OPTIONS],
    *[(f"resume-{script}", functools.partial(resume, script=f"train_{script}"), 100) for script in SCRIPTS],
    ("deterministic", functools.partial(deterministic, amp="auto"), 120),
    ("deterministic-fp16", functools.partial(deterministic, amp="fp16"), 120),
    ("precisions", precisions, 80),
    ("precisions-script", precisions_of_the_script, 100),
    ("overflow", overflow, 100),
    ("gpu-to-cpu", functools.partial(across, first="gpu", second="cpu"), 120),
    ("cpu-to-gpu", functools.partial(across, first="cpu", second="gpu"), 120),
    ("predict", predict_and_export, 120),
    ("data-parallel", data_parallel, 160),
    ("torchrun", nccl, 120),
    ("two-processes", two_processes, 120),
    ("memory", memory, 100),
    ("cache", cached, 100),
]
FAST = {  # by whether it is small; each network with everything trained and the head alone
    small: [("share", functools.partial(share, network=networks[0]), 90)] + [
        (f"speed-{network}-{job}", functools.partial(speed, network=network, spec=spec), 110)
        for network in networks for job, spec in (("everything", "none"), ("head", "backbone"))]
    for small, networks in ((False, ("resnet50", "vit_b_16", "convnext_tiny")), (True, ("shufflenet_v2_x0_5",)))
}


def setting(device, home, name):
    """What a part is given: the device, its own empty folder, the pictures, and sizes: small ones on a CPU."""
    small = device == "cpu"
    model, size = ("shufflenet_v2_x0_5", 32) if small else ("resnet18", 64)
    folder = Path(home, name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return SimpleNamespace(device=device, small=small, folder=folder, pictures=Path(home, "pictures"), model=model,
                           network=f"--model {model} --weights none --image-size {size}",
                           fast_size=32 if small else 224, batch=8 if small else 128, workers=min(16, cores))


MARK = "a row: "  # before a line of a part's stdout that is one


def be_part(function, here):
    """Behind --part: run it in this process and print its rows."""
    def say(**row):
        print(MARK + json.dumps(row), file=real, flush=True)

    real = sys.stdout
    try:
        for what, words, numbers in function(here):
            say(what=what, result="ok", words=words, numbers=numbers)
    except NotHere as error:
        say(what="", result="skipped", words=f"not here: {error}", numbers={})
    except BaseException as error:
        traceback.print_exc()
        words = str(error) if isinstance(error, Wrong) else last_line(f"{type(error).__name__}: {error}")
        say(what="", result="FAILED", words=words or type(error).__name__, numbers={})


def descendants(pid):
    """The numbers of a process and of all below it, by /proc; a session of its own hides none of them."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for number in found:
        found += children.get(number, [])
    return found


def end(process, over):
    """Kill a part that has taken too long, with all its processes. over: a threading.Event that says so."""
    over.set()
    family = descendants(process.pid)
    for number in family:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGSTOP)  # so that none starts another meanwhile
    for number in {*family, *descendants(process.pid)}:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)


def run_part(name, limit, left, device, home, program):
    """Run a part in a process of its own, for `limit` seconds at most, and for the seconds that are `left` for all parts.
    Returns its rows; whatever befalls it is the last of them.
    """
    Path(home, name).mkdir()
    seconds = min(limit, left)
    log, started, over, rows = Path(home, f"{name}.log"), time.perf_counter(), threading.Event(), []
    with open(log, "w") as errors:
        process = subprocess.Popen([sys.executable, program, "--part", name, "--home", home, "--device", device],
                                   stdout=subprocess.PIPE, stderr=errors, text=True, stdin=subprocess.DEVNULL)
    timer = threading.Timer(seconds, end, [process, over])
    timer.start()
    for line in process.stdout:
        if line.startswith(MARK):
            rows.append(json.loads(line.removeprefix(MARK)))
    status = process.wait()
    timer.cancel()
    said = log.read_text(errors="replace")
    if over.is_set() and left < limit:
        rows.append({"what": "", "result": "skipped", "words": "no time left for all of it", "numbers": {}})
    elif over.is_set() or status:
        why = f"ended after its {seconds:.0f} s" if over.is_set() else f"crashed with status {status}"
        rows.append({"what": "", "result": "FAILED", "words": f"{why}: {last_line(said)}", "numbers": {}})
    for row in rows:
        row |= {"part": name, "seconds": time.perf_counter() - started}
        row |= {"log": said[-3000:]} if row["result"] == "FAILED" else {}
    return rows


def machine(device):
    gpu, about = "none", {}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        gpu = f"{properties.name}, {size}, compute {properties.major}.{properties.minor}"
        about = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpus": torch.cuda.device_count()}
    timm = importlib.metadata.version("timm") if importlib.util.find_spec("timm") else "not installed"
    return checkpoint.machine() | {"gpu": gpu, "cores": os.cpu_count(), "torchvision": torchvision.__version__,
                                   "timm": timm, "python": platform.python_version()} | about


def show(row):
    name = " ".join(filter(None, [row["part"], row["what"]]))
    print(f"| {name} | {row['result']} | {row['seconds']:.0f} | {row['words'].replace('|', '/')} |", flush=True)


def main(argv=None, right=RIGHT, fast=None, program=__file__):
    """right, fast: lists of parts. program: the file that is started for each of them, and calls this with the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--only", action="append", metavar="NAME", help="this part alone; repeatable")
    parser.add_argument("--out", default="gpu.json", metavar="FILE", help="(default %(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=480, metavar="S", help="for all of it (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    for hidden in ("--launch", "--part", "--home"):  # how this program starts itself
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.launch:
        return launch(args.launch)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = FAST[args.device == "cpu"] if fast is None else fast
    parts = {name: function for name, function, _ in [*right, *fast]}
    if args.part:
        return be_part(parts[args.part], setting("cuda:0" if args.device == "cuda" else "cpu", args.home, args.part))
    if args.list:
        print("\n".join(parts))
        return 0
    if unknown := [name for name in args.only or () if name not in parts]:
        parser.error(f"there is no part '{unknown[0]}': {', '.join(parts)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    about, rows, began, lock = machine(args.device), [], time.perf_counter(), threading.Lock()
    print(", ".join(f"{what} {value}" for what, value in about.items()))
    print("\n| part | result | seconds | what was found |\n|---|---|---|---|", flush=True)

    def one(name, limit):
        left = args.seconds - (time.perf_counter() - began)
        if left < 5:
            found = [{"what": "", "result": "skipped", "words": "no time left for it", "numbers": {}, "part": name,
                      "seconds": 0.0}]
        else:
            found = run_part(name, limit, left, args.device, home, program)
        with lock:
            rows.extend(found)
            for row in found:
                show(row)
            took = time.perf_counter() - began
            checkpoint.write_json({"machine": about, "seconds": took, "rows": rows}, args.out)

    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as home:
        draw(Path(home, "pictures"), {"train": 24, "val": 8, "test": 6})
        slower = 3 if args.device == "cpu" else 1
        chosen = [[(name, slower * limit) for name, _, limit in group if not args.only or name in args.only]
                  for group in (right, fast)]
        with ThreadPoolExecutor(max(1, min(6, os.cpu_count() or 1))) as pool:
            list(pool.map(lambda part: one(*part), chosen[0]))
        for part in chosen[1]:
            one(*part)
    counts = {result: sum(row["result"] == result for row in rows) for result in ("ok", "FAILED", "skipped")}
    said = ", ".join(f"{count} {result}" for result, count in counts.items())
    print(f"\n{said}; {time.perf_counter() - began:.0f} s; {args.out}")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
