"""Does a change of the code change a single bit of what is learned?

    python benchmarks/same_weights.py HEAD~1                        # all commands; ten minutes on one core
    python benchmarks/same_weights.py HEAD~1 --only mixup,ewc       # some of them
    python benchmarks/same_weights.py HEAD~1 --tree ../elsewhere    # instead of the folder that this file lies in
    python benchmarks/same_weights.py --list

Runs short trainings on drawn pictures, each with the scripts of the given commit (in a temporary `git worktree`) and
then with the scripts as they lie here, on this machine. Both must write the same files, say the same, and end alike. In
a checkpoint everything must be the same, tensors bit for bit: weights, optimizer, history, random numbers and the rest;
so must every CSV file and every picture. Only the seconds that things took may differ, and the folders' paths.
Some commands begin with what the commit wrote: a run is resumed, a best.pt is used by predict.py, --weights and --from.

Together the commands use every group of options of the three scripts. Left out: --compile, which takes minutes;
--sync-bn and several GPUs, which need GPUs; --tensorboard, which needs a package; workers, which change no result.
Exit status 1 if anything differs. The scripts are copied at the start, and may be edited while this runs.
"""

import argparse
import csv
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_classifier", "train_regressor", "train_continual", "predict")
MODEL = "shufflenet_v2_x0_5"  # 0.3 million parameters, with BatchNorm; layers conv1, stage2-4, conv5, fc
SMALL = "--epochs 2 --batch-size 8 --workers 0 --amp off --no-report --lr 0.01 --output {run}"
NETWORK = f"--model {MODEL} --weights {{weights}} --image-size 32"
BARE = "--weights none --image-size 64"  # for other networks than MODEL
MAY_DIFFER = {"seconds", "train_seconds", "images_per_second", "machine"}  # keys, anywhere in a checkpoint or a CSV

STOP_AT = """
import ending, os, signal
real, calls = ending.leave_if_asked, iter(range(1, 10**6))
def leave_if_asked(stop):
    if next(calls) == {moment} and os.environ.get("RANK") in (None, "1"):
        os.kill(os.getpid(), signal.SIGTERM)
    real(stop)
ending.leave_if_asked = leave_if_asked
"""  # a signal, just before the script looks for the `moment`th time whether it shall stop; of two processes to one


# ---- the commands


class Step(NamedTuple):
    """One start of a script."""

    script: str
    options: str
    stop: int = 0  # at which look for a stop signal it gets one; 0: it is left to end
    processes: int = 1
    status: int = 0  # the exit status that is expected


def classify(options="", stop=0, processes=1, network=NETWORK, data="{pictures}"):
    words = f"--data {data} {SMALL} {network} {options}"
    return Step("train_classifier", words, stop, processes, status_after(stop, processes))


def regress(options="", stop=0, processes=1, network=NETWORK):
    words = f"--data {{numbers}} --target radius {SMALL} {network} {options}"
    return Step("train_regressor", words, stop, processes, status_after(stop, processes))


def go_on(options="", stop=0, data="{thumbnails}", old="--old-data {pictures}"):
    words = f"--from {{made}}/classifier/best.pt --data {data} {old} {SMALL} {options}"
    return Step("train_continual", words, stop, 1, status_after(stop, 1))


def status_after(stop, processes):
    """SIGTERM is 15; torchrun has a status of its own for processes that have failed."""
    return 0 if not stop else 1 if processes > 1 else 128 + 15


def reported(step):
    return step._replace(options=step.options.replace("--no-report ", ""))


def predict(options):
    return Step("predict", f"--workers 0 --csv {{run}}/predictions.csv {options}")


def copy(name):
    """The run folder becomes a copy of one that the commit wrote."""
    return Step("copy", name)


THAW = "--freeze backbone --unfreeze 1:conv5"
FULL = (f"--batch-size 4 --augment strong --accumulate 2 --amp fp16 --head mlp --dropout 0.3 --clip-grad 1 "
        f"--save-every 1 {THAW}")
CACHED = "--augment light --cache-features 2 --epochs 4 --freeze backbone --unfreeze 3:conv5"
WEIGHTED = "--class-weights dog=3,cat=1"
MIXED = f"--mixup 0.4 {WEIGHTED} --label-smoothing 0.1"
GOOGLENET = f"--model googlenet {BARE} --epochs 1"
REPLAYED = "--method ewc+replay --fisher-size 6"
DROPPED = f"--from {{made}}/classifier-stopped/best.pt {REPLAYED} --amp fp16 --dropout 0.3 --batch-size 4"  # has an mlp

# What the commit writes before all else, for the commands that begin with {made}/<name>.
MADE = {
    "classifier": classify(THAW),
    "regressor": regress(f"--target radius,place {THAW}"),
    "continual": go_on(REPLAYED),
    "googlenet": classify(GOOGLENET, network=""),
    "classifier-stopped": classify(f"--mixup 0.4 {FULL}", stop=8),
    "regressor-stopped": regress(FULL, stop=2),
    "continual-stopped": go_on(DROPPED, stop=2),
}

COMMANDS = {
    # train_classifier.py: pictures
    "plain": [classify()],
    "one-folder": [classify("--val-split 0.3 --no-test", data="{pictures}/train")],
    "augment-none": [classify("--augment none")],
    "augment-light": [classify("--augment light")],
    "augment-strong": [classify("--augment strong --seed 3")],
    "resize-squash": [classify("--resize squash --white 4095 --no-flip")],
    "resize-pad": [classify("--resize pad --augment light --flip")],
    "mixup": [classify("--mixup 0.4")],
    "cutmix": [classify("--cutmix 1")],
    "mixup-cutmix": [classify(f"--cutmix 1 {MIXED}")],
    "bad-image": [classify("--on-bad-image skip", data="{damaged}")],
    "batch-of-1": [classify("--batch-size 1 --freeze backbone --epochs 1")],
    "cache": [classify("--cache-features 2 --epochs 3 --freeze backbone")],
    "cache-thaw": [classify(CACHED)],
    # networks and heads
    "mlp": [classify("--head mlp --hidden 32")],
    "resnet18": [classify(f"--model resnet18 {BARE} --epochs 1", network="")],
    "mobilenet": [classify(f"--model mobilenet_v3_small {BARE} --dropout 0.4", network="")],
    "squeezenet": [classify(f"--model squeezenet1_1 {BARE} --epochs 1 --lr 0.001", network="")],
    "googlenet": [classify(GOOGLENET, network="")],
    "googlenet-mixed": [classify(f"--mixup 0.4 --accumulate 2 {GOOGLENET}", network="")],
    # freezing
    "freeze-bn": [classify("--freeze bn")],
    "freeze-to": [classify("--freeze to:stage3")],
    "thaw": [classify("--epochs 3 --freeze backbone --unfreeze 1:conv5 --unfreeze 2:all@0.0005")],
    "list-layers": [Step("train_classifier", f"--list-layers --data {{pictures}} {NETWORK} {THAW}")],
    # losses
    "label-smoothing": [classify("--label-smoothing 0.1")],
    "class-weights": [classify(f"{WEIGHTED} --label-smoothing 0.1 --accumulate 2")],
    "class-weights-plain": [classify(f"{WEIGHTED} --class-weight-mean plain")],
    "class-weights-balanced": [classify("--class-weights balanced", data="{uneven}")],
    "focal": [classify("--loss focal --focal-gamma 1.5 --class-weights dog=2")],
    "soft-f1": [classify("--loss soft-f1")],
    "cost": [classify("--loss cost --costs dog:cat=10 --mixup 0.4")],
    "l1": [classify("--l1 1e-4 --accumulate 2")],
    "l2-sp": [classify("--l2-sp 0.1")],
    # optimizers and schedules
    "sgd": [classify("--optimizer sgd --momentum 0.8 --wd 0.01 --schedule constant")],
    "adam": [classify("--optimizer adam --schedule step --step-epochs 1 --gamma 0.3")],
    "rmsprop": [classify("--optimizer rmsprop --momentum 0.5 --lr 0.001 --warmup-epochs 1")],
    "adagrad": [classify("--optimizer adagrad --backbone-lr-scale 0.5")],
    "plateau": [classify("--schedule plateau --plateau-epochs 1 --gamma 0.5 --epochs 5 --monitor val_accuracy")],
    "patience": [classify("--patience 1 --epochs 8 --lr 0.1 --monitor val_macro_f1 --deterministic")],
    "layer-decay": [classify("--layer-decay 0.7 --monitor val_balanced_accuracy")],
    "accumulate": [classify("--accumulate 3 --log-every 1")],
    "clip-grad": [classify("--clip-grad 0.1 --monitor val_loss")],
    "find-lr": [classify("--find-lr --mixup 0.4")],
    # precision
    "fp16": [classify("--amp fp16 --clip-grad 1 --l1 1e-5 --l2-sp 0.1")],
    "bf16": [classify("--amp bf16")],
    "auto": [classify("--amp auto --device cpu")],
    # saving
    "keep-every": [classify("--save-every 2 --keep-every 1 --epochs 3")],
    "report": [reported(classify("--epochs 1"))],
    # resumed
    "resumed": [classify(f"--mixup 0.4 {FULL}", stop=2), classify(f"--mixup 0.4 {FULL} --resume")],
    "resumed-in-validation": [classify(FULL, stop=5), classify(f"{FULL} --resume")],
    "resumed-after-thaw": [classify(FULL, stop=8), classify(f"{FULL} --resume")],
    "resumed-cache": [classify(CACHED, stop=15), classify(f"{CACHED} --resume")],
    "resumed-longer": [classify(THAW), classify(f"{THAW} --epochs 3 --lr 0.005 --resume")],
    "resumed-earlier": [
        classify("--keep-every 1 --epochs 3"),
        classify("--keep-every 1 --epochs 3 --resume {run}/epoch_0.pt"),
    ],
    "refused": [Step("train_classifier", f"--data {{pictures}} {SMALL} {NETWORK} --momentum 0.5", status=2)],
    # train_regressor.py
    "regressor": [regress()],
    "regressor-pad": [regress("--resize pad --white 1 --augment strong --no-flip")],
    "regressor-mse": [regress("--loss mse --target radius,place --monitor val_r2 --augment light")],
    "regressor-l1": [regress("--loss l1 --l1 1e-4 --accumulate 2 --clip-grad 1")],
    "regressor-huber": [regress("--huber-delta 0.5 --head mlp --dropout 0.2 --optimizer sgd --schedule step")],
    "regressor-quantiles": [regress("--quantiles 0.1,0.5,0.9 --target radius,place")],
    "regressor-weights": [regress("--sample-weight weight --log-target")],
    "regressor-file-column": [regress("--file-column file")],
    "regressor-no-split": [regress("--labels all.csv --val-split 0.3 --no-test")],
    "regressor-mlp": [regress("--head mlp --hidden 32 --freeze bn")],
    "regressor-sgd": [regress("--optimizer sgd --momentum 0.8 --wd 0.01 --schedule constant --warmup-epochs 1")],
    "regressor-adam": [regress("--optimizer adam --schedule step --step-epochs 1 --gamma 0.3 --seed 3 --log-every 1")],
    "regressor-adagrad": [regress("--optimizer adagrad --backbone-lr-scale 0.5 --amp auto --augment standard")],
    "regressor-plateau": [regress("--schedule plateau --plateau-epochs 1 --gamma 0.5 --epochs 5 --patience 3")],
    "regressor-batch-of-1": [regress("--batch-size 1 --freeze backbone --epochs 1 --device cpu --deterministic")],
    "regressor-googlenet": [regress(f"{GOOGLENET} --accumulate 2", network="")],
    "regressor-cache": [regress(f"{CACHED} --quantiles 0.2,0.5,0.8")],
    "regressor-thaw": [regress(f"{THAW}@0.0005 --layer-decay 0.8 --keep-every 1")],
    "regressor-bf16": [regress("--amp bf16 --optimizer rmsprop --lr 0.001")],
    "regressor-resumed": [regress(FULL, stop=2), regress(f"{FULL} --resume")],
    "regressor-bad-image": [regress("--labels damaged.csv --on-bad-image skip")],
    "regressor-find-lr": [regress("--find-lr")],
    "regressor-list-layers": [Step("train_regressor", f"--list-layers {NETWORK} {THAW}")],
    "regressor-report": [reported(regress("--epochs 1"))],
    # train_continual.py: also, a best.pt of the commit used by --from
    "continual-none": [go_on("--method none")],
    "continual-no-old": [go_on("--method l2-sp --l2-sp 0.5 --monitor val_loss", old="")],
    "continual-one-folder": [go_on("--val-split 0.3 --no-test", data="{thumbnails}/train", old="--old-data {uneven}")],
    "continual-sgd": [go_on("--method l2-sp --optimizer sgd --momentum 0.8 --wd 0.01 --schedule constant --seed 3")],
    "continual-adam": [go_on("--optimizer adam --schedule step --step-epochs 1 --gamma 0.3 --monitor val_accuracy")],
    "continual-rmsprop": [go_on("--optimizer rmsprop --warmup-epochs 1 --monitor val_macro_f1 --log-every 2")],
    "continual-adagrad": [go_on("--optimizer adagrad --backbone-lr-scale 1 --layer-decay 0.8 --monitor old_val_loss")],
    "continual-plateau": [
        go_on("--schedule plateau --plateau-epochs 1 --gamma 0.5 --epochs 5 --monitor old_val_accuracy --patience 3"),
    ],
    "continual-batch-of-1": [
        go_on("--method freeze --batch-size 1 --epochs 1 --monitor val_balanced_accuracy --device cpu --deterministic"),
    ],
    "continual-auto": [go_on("--amp auto --augment light")],
    "continual-googlenet": [go_on("--from {made}/googlenet/best.pt --method l2-sp+replay --epochs 1", data="{more}")],
    "continual-freeze": [go_on("--method freeze --augment none")],
    "continual-l2-sp": [go_on("--method l2-sp --accumulate 2 --clip-grad 1")],
    "ewc": [go_on("--method ewc --ewc 1000 --fisher-size 8")],
    "ewc-empirical": [go_on("--method ewc --fisher empirical --fisher-size 0 --amp bf16")],
    "replay": [go_on("--method replay --replay-fraction 0.4 --replay-size 12 --augment strong")],
    "ewc-replay": [go_on(f"{REPLAYED} --amp fp16 --accumulate 2 --save-every 1 --keep-every 1")],
    "freeze-replay": [go_on("--method freeze+replay --freeze to:stage3 --label-smoothing 0.1")],
    "new-classes": [go_on("--method l2-sp+replay", data="{more}")],
    "new-classes-ewc": [go_on("--method ewc --fisher-size 6 --schedule plateau --epochs 3", data="{more}")],
    "continual-bad-image": [go_on("--method replay --on-bad-image skip", old="--old-data {damaged}")],
    "continual-resumed": [go_on(DROPPED, stop=2), go_on(f"{DROPPED} --resume")],
    "continual-report": [reported(go_on("--method ewc --fisher-size 6 --epochs 1", data="{more}"))],
    # what the commit wrote, used by both
    "old-weights": [classify(network=f"--model {MODEL} --weights {{made}}/classifier/best.pt")],
    "old-weights-regressor": [regress(network=f"--model {MODEL} --weights {{made}}/regressor/best.pt")],
    "old-from-continual": [go_on("--method l2-sp --from {made}/continual/best.pt", data="{more}")],
    "old-last-classifier": [copy("classifier"), classify(f"{THAW} --epochs 3 --resume")],
    "old-last-regressor": [copy("regressor"), regress(f"--target radius,place {THAW} --epochs 3 --resume")],
    "old-last-continual": [copy("continual"), go_on(f"{REPLAYED} --epochs 3 --resume")],
    "old-stopped-classifier": [copy("classifier-stopped"), classify(f"--mixup 0.4 {FULL} --resume")],
    "old-stopped-regressor": [copy("regressor-stopped"), regress(f"{FULL} --resume")],
    "old-stopped-continual": [copy("continual-stopped"), go_on(f"{DROPPED} --resume")],
    "predict": [predict("--checkpoint {made}/classifier/best.pt --top-k 2 {pictures}/test")],
    "predict-mean": [predict("--checkpoint {made}/classifier/best.pt --checkpoint {made}/classifier-stopped/last.pt "
                             "--tta --amp bf16 {pictures}/test")],
    "predict-regressor": [predict("--checkpoint {made}/regressor/best.pt --labels {numbers}/labels.csv --split test")],
    "predict-continual": [predict("--checkpoint {made}/continual/best.pt {thumbnails}/test")],
    "predict-weights-only": [predict("--checkpoint {made}/classifier/best.pt --weights-only {run}/bare.pt {pictures}")],
    # two processes
    "two": [classify("--batch-size 4 --cutmix 1 --l2-sp 0.1 --l1 1e-5", processes=2)],
    "two-weighted": [classify(f"--batch-size 3 --accumulate 2 {WEIGHTED}", processes=2)],
    "two-resumed": [
        classify(f"{MIXED} {FULL} --batch-size 2", stop=2, processes=2),
        classify(f"{MIXED} {FULL} --batch-size 2 --resume", processes=2),
    ],
    "two-cache-thaw": [classify(f"--batch-size 4 {CACHED}", processes=2)],
    "two-googlenet": [classify(f"--batch-size 4 --mixup 0.4 --accumulate 2 {GOOGLENET}", processes=2, network="")],
    "two-regressor": [
        regress(f"--sample-weight weight {FULL} --batch-size 2", stop=2, processes=2),
        regress(f"--sample-weight weight {FULL} --batch-size 2 --resume", processes=2),
    ],
}


# ---- the pictures


def draw(path, kind, seed, size=96):
    """A white ellipse (cat), rectangle (dog) or triangle (bird) on a coloured ground. Returns (radius, x)."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (size, size), tuple(rng.randrange(160) for _ in range(3)))
    x, y, r = rng.uniform(30, 66), rng.uniform(30, 66), rng.uniform(12, 28)
    pen = ImageDraw.Draw(picture)
    if kind == "cat":
        pen.ellipse((x - r, y - r, x + r, y + r), fill="white")
    elif kind == "dog":
        pen.rectangle((x - r, y - r, x + r, y + r), fill="white")
    else:
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return r, x


def draw_classes(root, **counts):
    """counts: of the training pictures of each class; there are fewer to validate and to test with."""
    for kind, count in counts.items():
        for split, n in (("train", count), ("val", 5), ("test", 3)):
            for i in range(n):
                draw(root / split / kind / f"{kind}.{i}.jpg", kind, f"{root.name}{split}{kind}{i}")


def draw_numbers(root):
    """labels.csv: with a column split; all.csv: without; damaged.csv: a picture of it cannot be read."""
    rows = []
    for split, n in (("train", 20), ("val", 7), ("test", 5)):
        for i in range(n):
            radius, place = draw(root / split / f"{i}.jpg", "cat", f"{split}{i}")
            rows.append({"file": f"{split}/{i}.jpg", "radius": radius, "place": place, "weight": 1 + i % 2,
                         "split": split})
    (root / "damaged.jpg").write_bytes(b"no picture")
    damaged = [row | {"file": "damaged.jpg"} if row["file"] == "train/3.jpg" else row for row in rows]
    write_table(root / "labels.csv", rows)
    write_table(root / "all.csv", [{name: row[name] for name in ("file", "radius", "place")} for row in rows])
    write_table(root / "damaged.csv", damaged)


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prepare(home):
    """Draw all pictures and write small weights. Returns {name in a command: path}."""
    names = ("pictures", "uneven", "damaged", "thumbnails", "more", "numbers", "made", "weights")
    places = {name: home / name for name in names}
    draw_classes(places["pictures"], cat=11, dog=10)
    draw_classes(places["uneven"], cat=12, dog=5)
    draw_classes(places["thumbnails"], cat=9, dog=9)
    draw_classes(places["more"], bird=8, cat=7)
    draw_numbers(places["numbers"])
    shutil.copytree(places["pictures"], places["damaged"])
    (places["damaged"] / "train" / "cat" / "cat.4.jpg").write_bytes(b"no picture")
    (places["damaged"] / "val" / "dog" / "dog.2.jpg").write_bytes(b"no picture")
    torch.manual_seed(1)
    network = torchvision.models.get_model(MODEL, num_classes=7).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 32, 32))  # so that the BatchNorms have seen something
    torch.save(network.state_dict(), places["weights"])
    return places


# ---- a tree, and what it runs


class Tree:
    """A folder with the scripts, and a process that has imported them and forks a child for each start of one: so
    importing torch takes its seconds once. Two processes are started by torchrun, as a command.
    """

    def __init__(self, folder, home):
        self.folder, self.runs, self.out, self.err = folder, home / "runs", home / "out", home / "err"
        self.runs.mkdir(parents=True)
        self.started = None  # torchrun
        self.server = subprocess.Popen([sys.executable, __file__, "--serve", str(folder)], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, start_new_session=True)

    def wait(self):
        """Until the scripts have been imported."""
        if self.server.stdout.readline() != "ready\n":
            sys.exit(f"error: the scripts of {self.folder} cannot be imported")

    def start(self, step, words):
        """Run a step to its end. Returns its exit status, what it printed, and the lines on stderr that are its own."""
        if step.processes == 1:
            before = STOP_AT.format(moment=step.stop) if step.stop else ""
            request = {"script": step.script, "argv": words, "before": before, "files": [str(self.out), str(self.err)]}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            status = json.loads(self.server.stdout.readline())
        else:
            status = self.torchrun(step, words)
        said = [line for line in self.err.read_text().splitlines() if re.match("error:|warning:|stopped by", line)]
        return status, self.out.read_text(), said

    def torchrun(self, step, words):
        script = self.folder / f"{step.script}.py"
        if step.stop:
            code = f"import sys\nsys.path.insert(0, {str(self.folder)!r})\n{STOP_AT.format(moment=step.stop)}"
            script = self.runs.parent / "stopped.py"
            script.write_text(f"{code}\nimport {step.script}\n{step.script}.main()\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.started = subprocess.Popen([*command, *words], stdout=out, stderr=err, start_new_session=True)
            return self.started.wait()

    def close(self):
        if self.started and self.started.poll() is None:
            self.started.terminate()  # it ends its processes
            self.started.wait()
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()


def serve(folder):
    """The process behind a Tree: a JSON line for each step, answered by the exit status."""
    sys.path.insert(0, folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as under nohup
    for script in SCRIPTS:
        assert Path(__import__(script).__file__).parent == Path(folder)
    import torch._dynamo  # noqa: F401  # the first optimizer of each child would

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            live(**request)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


def live(script, argv, before, files):
    """In the child: write to the files, run the script, leave with its exit status."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    status = 0
    try:
        exec(before, {})
        sys.modules[script].main(argv)
    except SystemExit as left:
        status = left.code or 0
    except BaseException as error:
        status = 1
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(tree, name, steps, places):
    """All steps of a command in one tree. Returns what is to be compared: {what: value}; and what went wrong, or ''."""
    folder = tree.runs / name
    found = {}
    for number, step in enumerate(steps, start=1):
        if step.script == "copy":
            shutil.copytree(places["made"] / step.options, folder)
            continue
        if step.script == "predict":
            folder.mkdir()
        words = step.options.format(run=folder, **places).split()
        status, out, err = tree.start(step, words)
        which = f" {number}" if len(steps) > 1 else ""
        found[f"exit status{which}"] = status
        found[f"stdout{which}"] = plain(out, tree, folder)
        found[f"stderr{which}"] = plain("\n".join(err), tree, folder)
        if status != step.status:
            return found, f"exit status {status} in place of {step.status}: {' '.join(err)[-300:]}"
        if step.stop and not any(line.startswith("stopped by") for line in err):
            return found, f"not stopped at look {step.stop}: {' '.join(err)[-300:]}"
    found["files"] = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for file in found["files"]:
        if (content := read(folder / file, tree, folder)) is not None:
            found[file] = content
    return found, ""


def plain(text, tree, folder):
    """Without what may differ: the paths, and the seconds that something took."""
    text = text.replace(str(folder), "RUN").replace(str(tree.folder), "TREE")
    return re.sub(r"[\d.,]+(?= s\b| images/s)", "#", text)


def read(path, tree, folder):
    """The content of a file as plain values, for `differences`; None: its name is enough."""
    if path.suffix == ".pt":
        return without_paths(torch.load(path, map_location="cpu", weights_only=True), tree, folder)
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".png":
        return path.read_bytes()
    return None  # args.json: its options are in the checkpoints; report.html: its pictures are compared


def without_paths(value, tree, folder):
    """The same value with the paths in its texts made plain: the options of a run name its folder."""
    if isinstance(value, dict):
        return {k: without_paths(v, tree, folder) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_paths(v, tree, folder) for v in value)
    return plain(value, tree, folder) if isinstance(value, str) else value


# ---- the comparison


def differences(a, b, where=""):
    """[(place, words)] for all places where two values differ: tensors in any bit, nan equal to nan."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return [(where, f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")]
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return [] if torch.equal(*bits) else [(where, (a.double() - b.double()).abs().max().item())]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [(f"{where} {k}", "missing" if k in a else "added") for k in sorted(a.keys() ^ b.keys(), key=str)]
        for k in a:
            if k in b and k not in MAY_DIFFER:
                found += differences(a[k], b[k], f"{where} {k}")
        return found
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where} {i}")]
    if type(a) is type(b) and (a == b or a != a and b != b):
        return []
    return [(where, f"{str(a)[:60]} and {str(b)[:60]}")]


def say_values(what, a, b):
    """What differs between two values of the same name, in words: how many places, and the worst or first of them."""
    places = differences(a, b)
    sizes = [(words, where.strip()) for where, words in places if isinstance(words, float)]
    if sizes:
        largest, where = max(sizes)
        return f"{what}: {len(places)} differ, most by {largest:.1e}{f' in {where}' if where else ''}"
    where, words = places[0]
    return f"{what}: {len(places)} differ, first{where}: {words}"


def say_checkpoints(file, a, b):
    """The same for each entry of a checkpoint. One that the tree has added is no difference."""
    found = [f"{file} {key}: missing" for key in sorted(a.keys() - b.keys())]
    for key in a:
        if key in b and key not in MAY_DIFFER and differences(a[key], b[key]):
            found.append(say_values(f"{file} {key}", a[key], b[key]))
    return found


def say_lists(what, a, b):
    """Of file names, or of lines: how many only one of both has, and the first of them."""
    less, more = [x for x in a if x not in b], [x for x in b if x not in a]
    if not less and not more:
        return f"{what}: another order"
    start = len(os.path.commonprefix([less[0], more[0]])) if less and more else 0  # where the first two part
    firsts = [repr(lines[0][max(0, start - 20) : start + 40]) for lines in (less, more) if lines]
    return f"{what}: {len(less)} missing, {len(more)} added, first {' and '.join(firsts)}"


def compare(a, b):
    """Two results of `run`: what differs, one entry for each kind."""
    found = []
    for what in a:
        if what not in b:
            if not what.endswith((".pt", ".csv", ".png")):  # else it is missing among the files
                found.append(f"{what}: missing")
        elif what.startswith(("stdout", "stderr")) or what == "files":
            lines = [x if what == "files" else x.splitlines() for x in (a[what], b[what])]
            found += [say_lists(what, *lines)] if a[what] != b[what] else []
        elif what.endswith(".png"):
            found += [f"{what}: another picture"] if a[what] != b[what] else []
        elif what.endswith(".pt") and "model" in a[what] and "model" in b[what]:
            found += say_checkpoints(what, a[what], b[what])
        elif differences(a[what], b[what]):
            found.append(say_values(what, a[what], b[what]))
    return found


# ---- the whole


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: git {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def same_weights(commit, folder, names, home, trees):
    """Run the commands of these names in both trees, which are put into `trees`. Returns how many are the same."""
    places = prepare(home)
    git("worktree", "add", "--detach", str(home / "commit"), commit)
    (home / "here").mkdir()
    for file in Path(folder).glob("*.py"):
        shutil.copy(file, home / "here")
    trees.append(old := Tree(home / "commit", home / "by_commit"))
    trees.append(Tree(home / "here", home / "by_tree"))
    for tree in trees:
        tree.wait()
    for name, step in MADE.items():
        found, wrong = run(old, name, [step], places)
        if wrong:
            sys.exit(f"error: {commit} cannot make '{name}': {wrong}")
        shutil.move(old.runs / name, places["made"] / name)
        machine = found["last.pt"]["machine"]
    print(f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}", flush=True)
    same = 0
    for name in names:
        (a, wrong_a), (b, wrong_b) = (run(tree, name, COMMANDS[name], places) for tree in trees)
        found = [f"{where}: {wrong}" for where, wrong in (("the commit", wrong_a), ("the tree", wrong_b)) if wrong]
        found = found or compare(a, b)
        same += not found
        print(f"{name:24s} {'; '.join(found) or 'same'}", flush=True)
        for tree in trees:
            shutil.rmtree(tree.runs / name, ignore_errors=True)
    return same


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("commit", nargs="?", help="what to compare with: any name that git knows")
    parser.add_argument("--tree", default=ROOT, metavar="DIR", help="the folder of the scripts (default: this one)")
    parser.add_argument("--only", metavar="NAME,...", help="these commands alone")
    parser.add_argument("--list", action="store_true", help="print the names of the commands and what they run")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the process behind a Tree
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve)
    names = args.only.split(",") if args.only else list(COMMANDS)
    if unknown := [name for name in names if name not in COMMANDS]:
        parser.error(f"there is no command '{unknown[0]}': see --list")
    if args.list:
        for name in names:
            print("\n".join(f"{name:24s} {said(step)}" for step in COMMANDS[name]))
        return 0
    if not args.commit:
        parser.error("name a commit")
    if not (Path(args.tree) / "train_classifier.py").exists():
        parser.error(f"{args.tree} holds no train_classifier.py")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the results depend on how many there are, and the cores may be few
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # past the `finally`
    home, started, trees = Path(tempfile.mkdtemp(prefix="same_weights-")).resolve(), time.perf_counter(), []
    try:
        same = same_weights(args.commit, args.tree, names, home, trees)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for tree in trees:
            tree.close()
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", home / "commit"], capture_output=True)
        shutil.rmtree(home, ignore_errors=True)
        git("worktree", "prune")
    print(f"{same} of {len(names)} commands: the same bits\n{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0 if same == len(names) else 1


def said(step):
    """A step as one could type it, the names of the folders in braces."""
    processes = f"{step.processes} processes, " if step.processes > 1 else ""
    return f"{processes}{f'stopped at look {step.stop}, ' if step.stop else ''}{step.script} {step.options}"


if __name__ == "__main__":
    sys.exit(main())
