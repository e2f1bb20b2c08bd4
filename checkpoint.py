"""Checkpoints: save last and best so that none is ever lost or torn, load safely, resume with the same options.

    save(state, "runs/a", best=True)            # writes last.pt, and best.pt as the same file
    state = load("runs/a/last.pt", "train")     # tensors and plain values only, never code
    args, state = resume_arguments(args, typed, "train", may_change)

This file needs torch alone and can be copied into any project.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import time
import warnings
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or continued. The message is one line that names the way out."""


def save(state, folder, best=False, name="last.pt"):
    """Write `state` to folder/name, and as folder/best.pt too if it is the best so far; serialized once.

    A reader, and a run killed at any moment, finds the old file or the new one, never a torn one; best.pt is in place
    before last.pt says so. Raises CheckpointError for a weight that is not finite, or when the disk refuses; the
    files that were there stay as they were.
    """
    broken = [k for k, v in state["model"].items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise CheckpointError(f"not saved: the weights are no longer finite ({broken[0]}); lower --lr")
    folder = Path(folder)
    temporary, best_temporary = folder / f"{name}.tmp", folder / "best.pt.tmp"
    try:
        # Unlinked, not overwritten: after a kill between the renames it may be a second name of best.pt.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            best_temporary.unlink(missing_ok=True)
            try:
                os.link(temporary, best_temporary)
            except OSError:  # no hard links on this file system
                _copy(temporary, best_temporary)
            os.replace(best_temporary, folder / "best.pt")
        os.replace(temporary, folder / name)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {folder / name} ({error}): make room; earlier checkpoints are as they "
                              "were") from error


def set_aside_later_epochs(saved, folder):
    """Before a run goes back to the earlier epoch that `saved` holds: rename the checkpoints of later epochs in
    `folder`, from last.pt to last_until_<epoch>.pt and so on, so that going on overwrites none of them. Returns a line
    about each.
    """
    last, said = Path(folder, "last.pt"), []
    end = load(last, saved["script"])["epoch"] if last.exists() else 0
    if end <= saved["epoch"]:
        return said
    for path in (*Path(folder).glob("before_unfreeze_*.pt"), Path(folder, "best.pt"), last):
        if "_until_" not in path.name and path.exists() and load(path, saved["script"])["epoch"] > saved["epoch"]:
            kept, number = path.with_name(f"{path.stem}_until_{end}.pt"), 1
            while kept.exists():
                number += 1
                kept = path.with_name(f"{path.stem}_until_{end}_{number}.pt")
            try:
                os.replace(path, kept)
            except OSError as error:
                raise CheckpointError(f"could not rename {path} ({error.strerror})") from error
            said.append(f"going back: {path.name} of a later epoch is now {kept.name}")
    return said


def take_best_along(file, saved, folder):
    """Before a run that is resumed from `file`, which holds `saved`, goes on in `folder`: see that folder/best.pt is
    there, if need be as a copy of the best.pt beside `file`. Returns False where that is missing or of a later epoch:
    `file` itself then stands in for it.
    """
    best, beside = Path(folder, "best.pt"), Path(file).with_name("best.pt")
    if best.exists():
        return True
    found = beside.exists() and load(beside, saved["script"])["epoch"] <= saved["epoch"]
    try:
        _copy(beside if found else file, best.with_name("best.pt.tmp"))
        os.replace(best.with_name("best.pt.tmp"), best)
    except OSError as error:
        raise CheckpointError(f"could not write {best} ({error.strerror})") from error
    return found


def _copy(source, target):
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder):
    if os.name == "posix":  # makes the renames themselves durable; Windows has no such call
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse this for a folder; the renames have happened all the same
            pass
        finally:
            os.close(handle)


def load(path, script=None):
    """Read a checkpoint that the training script `script` (its name without .py; None: any) wrote. Raises
    CheckpointError.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder: give the file, such as {Path(path, 'last.pt')}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what is wrong
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no such checkpoint: {path}") from error
    except Exception as error:  # torch.load raises many kinds for files that are something else
        raise CheckpointError(f"{path} is no checkpoint of this repository: it is damaged, or something else, or holds "
                              "Python objects besides tensors and plain values; nothing in it was executed") from error
    if not (isinstance(state, dict) and {"script", "model", "options"} <= state.keys()):
        raise CheckpointError(f"{path} holds no run, perhaps bare weights: start from them with --weights {path}")
    if script and state["script"] != script:
        raise CheckpointError(f"{path} was written by {state['script']}.py, not by {script}.py")
    if lacking := {"build", "hidden", "preprocessing", "optimizer", "rng", "epoch", "history"} - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(lacking))}: another version of the script wrote it; "
                              f"start a new run from its weights, --weights {path}")
    return state


def refuse_other_files(path, columns=None):
    """Raise CheckpointError if `path` exists and must not be written over: something else than a .csv file, or one
    whose column names are not `columns` (if given), such as a table of labels.
    """
    if Path(path).exists() and not (Path(path).is_file() and Path(path).suffix == ".csv"):
        raise CheckpointError(f"{path} exists and is no .csv file: it was left as it is, give another name")
    if columns and Path(path).exists():
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            if next(csv.reader(file), columns) != columns:
                raise CheckpointError(f"{path} exists with other columns: it was left as it is, give another name")


def write_csv(rows, path):
    """Write a list of dicts with the same keys as a CSV file, replacing an earlier one in one step."""
    refuse_other_files(path, list(rows[0]))
    temporary = Path(f"{path}.tmp")
    try:
        # surrogateescape: a file name may hold any bytes
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path} ({error.strerror})") from error


def write_weights(state_dict, path):
    """Write a bare state_dict to a new file; an existing file is never written over."""
    try:
        with open(path, "xb") as file:
            torch.save(state_dict, file)
    except FileExistsError as error:
        raise CheckpointError(f"{path} exists: it was left as it is, give another name") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def write_json(options, path):
    """Write a dict of plain values as a JSON file."""
    try:
        Path(path).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"could not write {path} ({error.strerror})") from error


def start_folder(folder):
    """Make the run folder, so that one that cannot be made is an error before the training and not after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write into the run folder {folder} ({error.strerror}): "
                              "give another --output") from error


# ---- options of a resumed run


def resume_arguments(args, typed, script, may_change):
    """Complete the options `args` of a training script (its name without .py) by --resume and --output.

    typed: those of the options that stand on the command line. may_change: the names of what a resumed run may change.
    Returns the options and the checkpoint of the run that is resumed, else None: `--resume FILE` goes on from FILE, and
    a bare `--resume` from the --output folder's last.pt if there is one, so that the same command starts a run and goes
    on with it. What was not typed then comes from the checkpoint. Raises CheckpointError.
    """
    saved, file = None, Path(args.resume or Path(args.output or "", "last.pt"))
    if args.resume == "" and not args.output:
        raise CheckpointError("--resume without a file needs --output, the folder of the run to go on with")
    if args.resume or args.resume == "" and file.exists():
        saved = load(file, script)
        args = argparse.Namespace(**vars(args) | resume_options(typed, saved["options"], may_change))
        args.resume, args.output = str(file), typed.get("output", str(file.parent))
    # Two runs may start in the same second: the process number keeps them apart.
    args.output = args.output or time.strftime(f"runs/{script}/%Y-%m-%d_%H-%M-%S_{os.getpid()}")
    elsewhere = saved is None or Path(args.output).resolve() != file.resolve().parent
    if elsewhere and os.path.isdir(args.output) and any(Path(args.output).glob("*.pt")):
        raise CheckpointError(f"{args.output} already holds a run: go on with it by --resume {args.output}/last.pt, or "
                              "give another --output")
    return args, saved


def resume_options(typed, saved, may_change):
    """The options of a resumed run: the saved ones, overridden by those typed. Raises CheckpointError, with both
    values, for a typed option that differs and is not in `may_change`; batch size and accumulation may, as long as
    their product stays.
    """
    for name, value in typed.items():
        if name in saved and name not in may_change and saved[name] != value:
            option = "--" + name.replace("_", "-")
            raise CheckpointError(f"{option} is {value} but the run was started with {saved[name]}: leave it out to go "
                                  "on, or start a new run with --output elsewhere")
    options = saved | typed
    before, now = (o["batch_size"] * o["accumulate"] for o in (saved, options))
    if now != before:
        raise CheckpointError(f"--batch-size times --accumulate is {now} but the run was started with {before}: keep "
                              "the product")
    return options


# ---- random numbers and the machine


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
