"""Does a run that is killed anywhere, any number of times, end with the same bits as one that was left alone?

    python benchmarks/crash.py --kills 100                               # ten minutes on two cores
    python benchmarks/crash.py --kills 100 --script train_regressor       # or train_multilabel, train_text_classifier
    python benchmarks/crash.py --kills 20 --model resnet18 --epochs 4     # further options of the script

Trains a small network on drawn pictures, or a BERT of two layers on made-up sentences, once undisturbed, then again
with the same command and a bare --resume, each time with another number of workers, and ends that with SIGKILL: half of
the kills at a random time, the other half some milliseconds after a temporary file has appeared in the run folder, that
is while something is being saved. Half of them hit all processes at once, the other half the script alone, as the
kernel does when memory runs out: its workers must then end by themselves. When a run is complete before its kill, the
next one begins in a new folder, up to the number of kills; the last one is then left to end. After each kill last.pt
and best.pt must be whole, and best.pt the best so far. In the end every file of each run must hold what the undisturbed
one's holds, bit for bit, apart from the seconds that things took, and from the options --output, --resume and
--workers. Exit status 1 and `identical: no` if anything is not so; the folder then stays. For Linux. Do not edit the
scripts while it runs.
"""

import argparse
import contextlib
import csv
import itertools
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

OPTIONS = """
--freeze backbone --unfreeze 3:all@0.002 --batch-size 8 --accumulate 2 --epochs 10 --monitor val_loss --seed 1
--save-every 1 --keep-every 2 --no-report
"""
OF_PICTURES = "--model shufflenet_v2_x0_5 --weights none --image-size 32 --unfreeze 1:bn --head mlp --augment strong"
OF_SCRIPT = {
    "train_classifier": f"{OF_PICTURES} --mixup 0.2", "train_regressor": f"{OF_PICTURES} --target cat,bytes",
    "train_multilabel": f"{OF_PICTURES} --target cat,large --pos-weight balanced --augment standard",
    "train_text_classifier": "--unfreeze 1:bert.encoder.layer.1 --pool mean --cache-features 1"}
MAY_DIFFER = {"output", "resume", "workers", "seconds", "images_per_second", "texts_per_second"}
WORKERS = (0, 1, 2, 4)
GRACE = 4  # seconds that workers may outlive the script; torch's own workers look every 5 s whether it is still there


class Found(Exception):
    """What is wrong: something differs, is torn, or is left over."""


# ---- one life of a run


def live(command, log, folder, moment=None, aimed=False, alone=False, pause=0.0):
    """Start the command and kill it after `moment` seconds (None: never), if `aimed` then `pause` seconds after the
    next temporary file has appeared; `alone`: it alone, else its whole group. Returns whether it was killed, the
    seconds it lived, those until last.pt was there, what it printed, and the temporary files that it left.
    """
    before, start, first_save = temporary_files(folder), log.stat().st_size if log.exists() else 0, None
    with open(log, "ab") as file:
        # One thread if not said otherwise: the results depend on how many there are, and the cores may be few.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True,
                                   env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"})
    started = time.perf_counter()
    try:
        while process.poll() is None:
            now = time.perf_counter() - started
            if first_save is None and (folder / "last.pt").exists():
                first_save = now
            if moment is not None and now >= moment and not (aimed and temporary_files(folder) <= before):
                time.sleep(pause if aimed else 0)
                (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        status, seconds = process.wait(), time.perf_counter() - started
        left = sorted(name for name, _ in temporary_files(folder) - before)
        while running := processes_of(process.pid):
            if time.perf_counter() - started > seconds + GRACE:
                raise Found(f"{GRACE} s after the script's end, processes that it had started were there: {running}")
            time.sleep(0.02)
    finally:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)
    said = log.read_bytes()[start:].decode(errors="replace")
    if status not in (0, -signal.SIGKILL):
        raise Found(f"a run ended with status {status}: {said[-2000:]}")
    return SimpleNamespace(killed=status != 0, seconds=seconds, first_save=first_save, said=said, left=left)


def temporary_files(folder):
    """{(name, time of writing)} of the temporary files in a run folder."""
    found = set()
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def processes_of(group):
    """The numbers of the running processes of a process group; those that have ended and were not fetched are none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


# ---- what must hold


def check_files(folder, script):
    """After a kill: last.pt and best.pt, if there, can be read, and best.pt holds the best epoch of those in either.
    Returns the state in last.pt, else None.
    """
    try:
        states = {n: checkpoint.load(folder / n, script) for n in ("last.pt", "best.pt") if (folder / n).exists()}
    except checkpoint.CheckpointError as error:
        raise Found(str(error)) from error
    rows = [row for state in states.values() for row in state["history"]]
    if rows and "best.pt" not in states:
        raise Found(f"no best.pt after {len(rows)} epochs")
    if rows:
        monitor = states["best.pt"]["options"]["monitor"]
        top = (min if monitor == "val_loss" else max)(row[monitor] for row in rows)
        if states["best.pt"]["history"][-1][monitor] != top:
            raise Found(f"best.pt is of {monitor} {states['best.pt']['history'][-1][monitor]}, but there was {top}")
    return states.get("last.pt")


def place_of(life, state, steps_per_epoch, epochs):
    """Where in the training a kill has hit."""
    if ", precision " not in life.said:  # the line before the first epoch
        return "start-up"
    if state is None or state["epoch"] < epochs:
        at_end = state is not None and state["sums"] and state["step"] % steps_per_epoch == 0
        return "validation and its save" if at_end else "steps"
    return "final evaluation"


def differences(a, b, where):
    """The places where two values from checkpoints differ: tensors in any bit, nan equal to nan."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a if k not in MAY_DIFFER for d in differences(a[k], b[k], f"{where} {k}")]
    elif isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where} {i}")]
    else:
        same = type(a) is type(b) and (a == b or a != a and b != b)
    return [] if same else [where if isinstance(a, torch.Tensor) else f"{where} ({str(a)[:80]} and {str(b)[:80]})"]


def compare(folder, reference, script):
    """Raise Found if a completed run's folder does not hold the same files as the undisturbed one's."""
    there, expected = (sorted(p.name for p in f.iterdir()) for f in (folder, reference))
    if there != expected:
        raise Found(f"{folder} holds other files: {sorted(set(there) ^ set(expected))}")
    found = []
    for name in expected:
        if name.endswith(".pt"):
            a, b = (checkpoint.load(f / name, script) for f in (reference, folder))
        elif name.endswith(".csv"):
            a, b = (list(csv.DictReader((f / name).read_text().splitlines())) for f in (reference, folder))
        else:  # args.json: its options are in the checkpoints
            continue
        found += differences(a, b, name)
    if found:
        raise Found(f"{len(found)} values of {folder} differ: " + "; ".join(found[:12]))


# ---- the whole


def large_or_not_known(path):
    """Whether a file is large, 1 or 0; of each tenth it is not known."""
    size = path.stat().st_size
    return "" if size % 10 == 0 else int(size > 2200)


def draw_pictures(home):
    """Returns the options that name them."""
    pictures = home / "pictures"
    subprocess.run([sys.executable, ROOT / "demo.py", "--draw", pictures], check=True, stdout=subprocess.DEVNULL)
    checkpoint.write_csv([{"file": path.relative_to(pictures), "split": path.parts[-3], "cat": int("cat" in path.name),
                           "bytes": path.stat().st_size, "large": large_or_not_known(path)}
                          for path in sorted(pictures.rglob("*.jpg"))],
                         pictures / "labels.csv")  # for train_regressor.py and train_multilabel.py
    return ["--data", str(pictures)]


def make_texts(home):
    """Sentences, and a BERT that the tests use. Returns the options that name them."""
    sys.path.append(str(ROOT / "tests"))
    import tiny_bert

    texts = tiny_bert.write_reviews(home / "texts.csv", train=200, val=60, test=60)
    return ["--data", str(texts), "--model", str(tiny_bert.make(home / "bert"))]


def crash(args, more, home, counts, places, files):
    """Kill `args.kills` times; counts what came to pass in three Counters. Raises Found."""
    rng, script = random.Random(args.seed), args.script
    material = (make_texts if script == "train_text_classifier" else draw_pictures)(home)

    def command(folder, workers, *resume):
        options = [*OF_SCRIPT[script].split(), *OPTIONS.split(), *material, *more, "--output", str(folder),
                   "--workers", str(workers), *resume]
        return [sys.executable, str(ROOT / f"{script}.py"), *options]

    reference, folder = home / "undisturbed", None
    life = live(command(reference, 0), home / "undisturbed.log", reference)
    state = check_files(reference, script)
    epochs, steps, machine = state["epoch"], state["step"], state["machine"]
    times = [time.perf_counter() for _ in range(6) if not checkpoint.save(state, home)]
    save_seconds = statistics.median(b - a for a, b in itertools.pairwise(times))
    print(f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}, torchvision "
          f"{torchvision.__version__}, Python {platform.python_version()}\n"
          f"{script}.py undisturbed: {life.seconds:.1f} s, the first save after {life.first_save:.1f} s; {steps} steps "
          f"in {epochs} epochs; a save takes {1000 * save_seconds:.0f} ms", flush=True)
    longest = 2 * life.first_save  # of a life; so about three of four go on until they have saved something
    while folder or counts["kills"] < args.kills:
        folder = folder or home / f"run{counts['runs completed'] + 1}"
        moment = rng.triangular(0, longest, longest) if counts["kills"] < args.kills else None
        aimed, alone, workers = rng.random() < 0.5, rng.random() < 0.5, rng.choice(WORKERS)
        counts["lives"] += 1
        if counts["lives"] > 5 * args.kills:
            raise Found(f"no end after {counts['lives']} starts: the runs do not come forward")
        counts["resumes"] += (folder / "last.pt").exists()
        life = live(command(folder, workers, "--resume"), folder.with_suffix(".log"), folder, moment, aimed, alone,
                    rng.triangular(0, save_seconds, 0))
        if not life.killed:
            compare(folder, reference, script)
            counts["runs completed"] += 1
            print(f"run {counts['runs completed']} is complete and identical, after {counts['kills']} kills in all",
                  flush=True)
            shutil.rmtree(folder)
            folder = None
            continue
        counts["kills"] += 1
        counts["kills inside a save"] += bool(life.left)
        state = check_files(folder, script)
        place = place_of(life, state, steps // epochs, epochs)
        places[place] += 1
        files.update(life.left)
        if args.verbose:
            reached = f"epoch {state['epoch']}, step {state['step']}" if state else "nothing saved"
            print(f"kill {counts['kills']:3d}, run {counts['runs completed'] + 1}, {life.seconds:5.1f} s, "
                  f"{workers} workers, {'aimed' if aimed else 'timed'}, {'the script' if alone else 'its group'}: "
                  f"{place}; {reached}{'; left ' + ', '.join(life.left) if life.left else ''}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="(default %(default)s)")
    parser.add_argument("--script", choices=list(OF_SCRIPT), default="train_classifier", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments (default %(default)s)")
    parser.add_argument("--keep", metavar="DIR", help="a new folder to work in, which stays (default: a temporary one)")
    parser.add_argument("--verbose", action="store_true", help="a line about each kill")
    args, more = parser.parse_known_args(argv)  # more: options of the training script, which replace those above
    if args.keep and Path(args.keep).exists():
        parser.error(f"{args.keep} exists: name a new folder")
    home, started, wrong = Path(args.keep or tempfile.mkdtemp(prefix="crash-")).resolve(), time.perf_counter(), ""
    counts, places, files = Counter(), Counter(), Counter()
    try:
        crash(args, more, home, counts, places, files)
    except Found as error:
        wrong = f" ({error}; the files are in {home})"
    finally:
        if not (args.keep or wrong):
            shutil.rmtree(home)
    for name in ("kills", "kills inside a save", "resumes", "runs completed"):
        of = {"kills": places, "kills inside a save": files}.get(name, {})
        print(f"{name}: {counts[name]}" + (f" ({', '.join(f'{k} {v}' for k, v in sorted(of.items()))})" if of else ""))
    print(f"identical: {'no' if wrong else 'yes'}{wrong}\n{(time.perf_counter() - started) / 60:.1f} minutes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
