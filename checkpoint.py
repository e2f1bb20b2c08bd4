"""Checkpoints: save last and best so that none is ever lost or torn, load safely, resume with the same options.

    save(state, "runs/a", best=True)            # writes last.pt, and best.pt as the same file
    state = load("runs/a/last.pt", "train")     # tensors and plain values only, never code
    args, state = resume_arguments(args, typed, "train", may_change)

This file needs torch alone and can be copied into any project.
"""

import argparse
import contextlib
import csv
import errno
import json
import math
import os
import platform
import shlex
import shutil
import time
import warnings
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or continued. The message is one line that names the way out."""


def save(state, folder, best=False, name="last.pt", keep=None, way_out=lambda: "lower --lr"):
    """Write `state` to folder/name; serialized once, also as folder/best.pt if it is the best so far, and under the
    name `keep`.

    A reader, and a run killed at any moment, finds the old file or the new one, never a torn one; best.pt is in place
    before last.pt says so. The predictions of an earlier best.pt are removed. Raises CheckpointError, for weights or
    optimizer states that are not finite with the text that `way_out()` gives, and when the disk refuses; the
    checkpoints that were there stay as they were.
    """
    if broken := _not_finite(state):
        raise CheckpointError(f"not saved: {broken} is no longer finite; try half the rate: {way_out()}")
    folder = Path(folder)
    temporary = _temporary(folder / name)
    others = [folder / other for other in (keep, "best.pt" if best else None) if other]
    try:
        # Unlinked, not overwritten: after a kill between the renames it may be a second name of best.pt.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            _remove_predictions(folder)
        for other in others:
            _link(temporary, _temporary(other))
            os.replace(_temporary(other), other)
        os.replace(temporary, folder / name)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        _remove(temporary, *map(_temporary, others))
        raise CheckpointError(f"could not write {folder / name} ({error}): make room, or bring the folder back; "
                              "earlier checkpoints are as they were") from error


def _temporary(path):
    """With the process number, so that two runs in one folder, started by mistake, do not write into the same file."""
    return Path(f"{path}.{os.getpid()}.tmp")


def _not_finite(state):
    """The name of a tensor among the weights and the optimizer's state that holds inf or nan, else ''."""
    states = state.get("optimizer", {}).get("state", {})
    tensors = {f"weight {k}": v for k, v in state["model"].items()}
    tensors |= {f"the optimizer's {k} of parameter {i}": v for i, s in states.items() for k, v in s.items()}
    tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    # The sum is the quicker question by far; where it is finite, so is every summand.
    return next((k for k, v in tensors.items() if not v.sum().isfinite() and not v.isfinite().all()), "")


def go_on_in(folder, saved, file):
    """Make `folder` ready for a run that is resumed from `file`, which holds `saved`.

    Where the run goes back, checkpoints of later epochs are set aside: last.pt as last_until_<epoch>.pt and so on.
    best.pt becomes that of the epochs that `saved` knows: it may be there, beside `file`, or set aside. Where it is not
    there any more, `file` itself stands in for it, in `saved` too. last.pt comes last, so that a run killed in here, or
    before its first save, can be resumed like any other. Returns lines about it; raises CheckpointError.
    """
    folder, here, said, history = Path(folder), (saved["epoch"], saved["step"]), [], saved["history"]
    best, last, beside = folder / "best.pt", folder / "last.pt", Path(file).with_name("best.pt")

    def read(path):
        try:
            return load(path, saved["script"], mmap=True)
        except CheckpointError:  # damaged: set aside, too
            return {"epoch": math.inf, "step": math.inf}

    def place(path):
        return tuple(read(path)[k] for k in ("epoch", "step"))

    def is_best(path):
        known = history[: saved["best_epoch"] + 1]
        state = read(path) if path.exists() else {}
        return bool(state) and state["epoch"] == len(known) and repr(state["history"]) == repr(known)

    kept = [path for kind in KEPT for path in sorted(folder.glob(kind)) if "_until_" not in path.name]
    places = {path: place(path) for path in (*kept, best, last) if path.exists()}
    goes_back = last not in places or places[last] > here
    later = [path for path in places if goes_back and places[path] > here]
    end = max([here[0], *(epoch for epoch, _ in places.values() if epoch < math.inf)])
    try:
        for path in later:
            aside, number = path.with_name(f"{path.stem}_until_{end}.pt"), 1
            while aside.exists() and not os.path.samefile(aside, path):
                number += 1
                aside = path.with_name(f"{path.stem}_until_{end}_{number}.pt")
            _link(path, aside)
            if path == best:
                _remove_predictions(folder)
            if path in kept or path == best and not history:
                path.unlink()  # best.pt and last.pt are replaced below, in one step
            said.append(f"going back: {path.name} of a later epoch is now {aside.name}")
        known = (best, beside, *([] if saved["sums"] else [Path(file)]), *sorted(folder.glob("best_until_*.pt")))
        found = next(filter(is_best, known), None) if history else None
        # Killed within a save, best.pt may be that of the next epoch: that epoch will come out the same again.
        if history and found != best and (goes_back or best not in places or places[best] <= here):
            _remove_predictions(folder)
            _put(found or file, best)
            if not found:
                saved |= {"best": history[-1][saved["options"]["monitor"]], "best_epoch": saved["epoch"] - 1,
                          "epochs_without_gain": 0}
                said.append(f"best.pt of the epochs before {saved['epoch']} is not there any more: {file} is best.pt "
                            "for now")
        if goes_back:
            _put(file, last)
    except OSError as error:
        raise CheckpointError(f"could not get {folder} ready to go on ({error}): is there room, and may it be "
                              "written?") from error
    if history:
        write_csv(history, folder / "history.csv")
    elif _starts_with(folder / "history.csv", "epoch,"):  # of epochs that are set aside now
        _remove(folder / "history.csv")
    return said


def _put(source, target):
    """Replace `target` by `source` in one step."""
    _link(os.path.realpath(source), _temporary(target))
    os.replace(_temporary(target), target)


def _starts_with(path, text):
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(text)


def _link(source, target):
    """Give a file a second name, or make a copy where the file system knows no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target)


def _copy(source, target):
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def _remove(*paths):
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _remove_predictions(folder):
    """Those of a best.pt that is going to be replaced. A file of that name which is something else stays."""
    for path in (folder / name for name in PREDICTIONS):
        with contextlib.suppress(OSError):
            if _starts_with(path, "file,"):
                path.unlink()


def _sync_folder(folder):
    if os.name == "posix":  # makes the renames themselves durable; Windows has no such call
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse this for a folder; the renames have happened all the same
            pass
        finally:
            os.close(handle)


def load(path, script=None, mmap=False):
    """Read a checkpoint that the training script `script` (its name without .py; None: any) wrote. mmap: leave the
    tensors on the disk until they are looked at. Raises CheckpointError.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder: give the file, such as {Path(path, 'last.pt')}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what is wrong
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise CheckpointError(f"no such checkpoint: {path}") from error
    except Exception as error:  # torch.load raises many kinds for files that are something else
        raise CheckpointError(f"{path} is no checkpoint of this repository: it is damaged, or something else, or holds "
                              "Python objects besides tensors and plain values; nothing in it was executed") from error
    if not (isinstance(state, dict) and {"script", "model", "options"} <= state.keys()):
        raise CheckpointError(f"{path} holds no run, perhaps bare weights: start from them with --weights "
                              f"{shlex.quote(str(path))}")
    if script and state["script"] != script:
        raise CheckpointError(f"{path} was written by {state['script']}.py, not by {script}.py")
    if lacking := {"build", "hidden", "preprocessing", "optimizer", "rng", "epoch", "sums", "history"} - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(lacking))}: another version of the script wrote it; "
                              f"start a new run from its weights, --weights {shlex.quote(str(path))}")
    return state


def refuse_other_files(path, columns=None):
    """Raise CheckpointError if `path` exists and must not be written over: something else than a .csv file, or one
    whose column names are not `columns` (if given), such as a table of labels; or if there is no folder for it.
    """
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise CheckpointError(f"there is no folder for {path}: make it, or write elsewhere")
    if Path(path).exists() and not (Path(path).is_file() and Path(path).suffix == ".csv"):
        raise CheckpointError(f"{path} exists and is no .csv file: it was left as it is, give another name")
    if columns and Path(path).exists():
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            if next(csv.reader(file), columns) != columns:
                raise CheckpointError(f"{path} exists with other columns: it was left as it is, give another name")


def write_csv(rows, path):
    """Write a list of dicts with the same keys as a CSV file, replacing an earlier one in one step."""
    refuse_other_files(path, list(rows[0]))
    # surrogateescape: a file name may hold any bytes
    with _replacing(path, newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(options, path):
    """Write a dict of plain values as a JSON file, replacing an earlier one in one step."""
    with _replacing(path) as file:
        file.write(json.dumps(options, indent=2) + "\n")


@contextlib.contextmanager
def _replacing(path, **how):
    """Open a temporary text file that takes the place of `path` when the block has ended well."""
    try:
        with open(_temporary(path), "w", encoding="utf-8", **how) as file:
            yield file
        os.replace(_temporary(path), path)
    except OSError as error:
        _remove(_temporary(path))
        raise CheckpointError(f"could not write {path} ({error.strerror}): make room there, or write "
                              "elsewhere") from error


def write_weights(state_dict, path):
    """Write a bare state_dict to a new file; an existing file is never written over."""
    try:
        with open(path, "xb") as file:
            torch.save(state_dict, file)
    except FileExistsError as error:
        raise CheckpointError(f"{path} exists: it was left as it is, give another name") from error
    except (OSError, RuntimeError) as error:
        if os.path.isfile(path):  # a part of it, on a full disk
            _remove(path)
        raise CheckpointError(f"cannot write {path}: {error}") from error


KEPT = ("before_unfreeze_*.pt", "epoch_*.pt")  # beside last.pt and best.pt
PREDICTIONS = tuple(f"{which}{split}_predictions.csv" for which in ("", "old_") for split in ("val", "test"))
WRITTEN = (*KEPT, "last.pt", "best.pt", "history.csv", "args.json", *PREDICTIONS, "features_*.bin", "features_*.bin.raw",
           "report.html", "curves.png", "confusion.png", "predicted.png", "residuals.png", "mistakes.png")


def start_folder(folder, options):
    """Make the run folder and write args.json there, so that what cannot be written is an error before the training and
    not after it. What a run that was killed in the middle of writing has left there is removed.

    Returns args.json, open and locked: another run in this folder is refused until it is closed, if only by the end of
    the process. (Not on Windows.) Raises CheckpointError.
    """
    args_json = Path(folder, "args.json")

    def lock(file):
        if fcntl:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system knows no locks
                    raise CheckpointError(f"another run is writing into {folder}: give another --output") from error
        return file

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if args_json.is_file():
            with open(args_json, "r+b") as file:
                lock(file)
        if args_json.exists() and not _starts_with(args_json, "{\n  \"data\": "):
            raise CheckpointError(f"{folder}/args.json is not of a run: it was left as it is, give another --output")
        for stray in [path for name in WRITTEN for path in Path(folder).glob(f"{name}.[0-9]*.tmp")]:
            stray.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write into the run folder {folder} ({error.strerror}): "
                              "give another --output") from error
    write_json(options, args_json)
    return lock(open(args_json, "r+b"))


# ---- options of a resumed run


def resume_arguments(args, typed, script, may_change, processes=1, restarted=False):
    """Complete the options `args` of a training script (its name without .py) by --resume and --output.

    typed: those of the options that stand on the command line. may_change: the names of what a resumed run may change.
    Returns the options and the checkpoint of the run that is resumed, else None: `--resume FILE` goes on from FILE, and
    a bare `--resume` from the --output folder's last.pt if there is one, so that the same command starts a run and goes
    on with it. What was not typed then comes from the checkpoint. processes: how many train together, written into the
    options. restarted: after one of them has died, so that a bare --resume is meant. Raises CheckpointError.
    """
    if restarted and args.resume is None:
        args.resume = ""
    if processes > 1 and not (args.output or args.resume):
        raise CheckpointError("several processes need --output, where they find the run when they are started again")
    saved, file = None, Path(args.resume or Path(args.output or "", "last.pt"))
    if args.resume == "" and not args.output:
        raise CheckpointError("--resume without a file needs --output, the folder of the run to go on with")
    if args.resume or args.resume == "" and file.exists():
        saved = load(file, script)
        args = argparse.Namespace(**vars(args) | resume_options(typed, saved["options"], may_change, processes))
        args.resume, args.output = str(file), typed.get("output", str(file.parent))
    args.processes = processes
    # Two runs may start in the same second: the process number keeps them apart.
    args.output = args.output or time.strftime(f"runs/{script}/%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    if saved is None or Path(args.output).resolve() != file.parent.resolve():
        found = sorted(Path(args.output).glob("*.pt"))
        # Killed before its first save was complete, a run has files but no last.pt: a bare --resume begins it again.
        begun = Path(args.output, "history.csv").exists() or any(load(path)["epoch"] > 1 for path in found)
        if begun or found and args.resume != "":
            known = [path for path in (file, file.with_name("best.pt"), *found) if path in found]
            go_on = f"go on with it by --resume {shlex.quote(str(known[0]))}, or " if known else ""
            raise CheckpointError(f"{args.output} already holds a run: {go_on}give another --output")
    return args, saved


def resume_options(typed, saved, may_change, processes=1):
    """The options of a resumed run: the saved ones, overridden by those typed. Raises CheckpointError, with both
    values, for a typed option that differs and is not in `may_change`; batch size, accumulation and the number of
    processes may, as long as their product stays. (Batches of 1 stay: they have no last batch of one picture to merge,
    so other steps.)
    """
    for name, value in typed.items():
        if name in saved and name not in may_change and saved[name] != value:
            option = "--" + name.replace("_", "-")
            raise CheckpointError(f"{option} is {value} but the run was started with {saved[name]}: leave it out to go "
                                  "on, or start a new run with --output elsewhere")
    options = saved | typed
    before, now = (o["batch_size"] * n for o, n in ((saved, saved.get("processes", 1)), (options, processes)))
    if now * options["accumulate"] != before * saved["accumulate"]:
        times = ", times the number of processes," if processes > 1 or saved.get("processes", 1) > 1 else ""
        raise CheckpointError(f"--batch-size times --accumulate{times} is {now * options['accumulate']} but the run was "
                              f"started with {before * saved['accumulate']}: keep the product")
    if 1 in (before, now) and now != before:
        raise CheckpointError(f"--batch-size{' times processes' * (processes > 1)} is {now} but the run was started with "
                              f"{before}: 1 stays 1")
    return options


def resume_command(script, folder, launcher="python"):
    """The command that goes on with the run in `folder`, '' if there is no last.pt yet. launcher: its first words."""
    last = Path(folder, "last.pt")
    return f"{launcher} {script}.py --resume {shlex.quote(str(last))}" if last.exists() else ""


def slower_command(script, folder, lr, thaws, step, launcher="python"):
    """What to type after a run in `folder` has diverged before optimizer step `step`: go on at half the rate `lr` from
    the latest checkpoint of an earlier step, else start again. thaws: {epoch: what thaws, perhaps at a rate of its own
    behind @}.
    """
    steps = {}
    for path in Path(folder).glob("*.pt"):
        with contextlib.suppress(CheckpointError):  # damaged, or something else
            steps[path] = load(path, script, mmap=True)["step"]
    earlier = [path for path in steps if steps[path] < step and "_until_" not in path.name]
    latest = max(earlier, key=lambda path: (steps[path], path.name == "last.pt"), default=None)
    go_on = f"{launcher} {script}.py --resume {shlex.quote(str(latest))}" if latest else "the same command with"
    another = "" if latest or not steps else " --output elsewhere"
    rates = ", and lower rates behind @" if "@" in "".join(thaws.values()) else ""
    return f"{go_on}{another} --lr {lr / 2:g}{rates}"


# ---- random numbers and the machine


SUMMED = ("images", "loss", "hits")  # of the sums of an epoch, those that add up over several processes


def own_state(saved, rank, processes):
    """What process `rank` of `processes` goes on from: the state of its random numbers (or None), and the sums of the
    running epoch. If there were as many before, its own; else the first process takes over the sums of all.
    """
    if processes > 1 and len(saved.get("processes", [])) == processes:
        return saved["processes"][rank]
    nothing = {name: 0.0 for name in saved["sums"] if name in SUMMED} if rank else {}
    return None if rank else saved["rng"], saved["sums"] | nothing


def restore(saved, optimizer, scaler, rng):
    """Bring the optimizer's state, the gradient scaler and the random numbers (`rng`, unless None) back to where `saved`
    left them. The optimizer's peak rates and other settings stay as they are now; the rate `lr` of the last step comes
    back.
    """
    now = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])  # brings back the momenta, and the old settings too
    for group, settings in zip(optimizer.param_groups, now, strict=True):
        group.update(settings)
    if scaler.is_enabled() and saved["scaler"]:  # both empty unless in fp16
        scaler.load_state_dict(saved["scaler"])
    if rng:
        set_rng_state(rng)


def rng_state():
    """The states of torch's global generators, from which dropout draws."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def machine():
    """What bit-identical results depend on besides seed and data: CPU type, threads, version of torch."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    cpu = f"{cpu}, {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def machine_changes(saved):
    """A warning for each difference between the machine of the checkpoint `saved` and this one."""
    return [f"warning: {what} was {saved['machine'][what]} and is {value}: results may differ in the last bits"
            for what, value in machine().items() if value != saved["machine"][what]]
