"""Checkpoints: save last and best so that none is ever lost or torn, load safely, resume exactly.

    progress = Progress()                                   # .epoch, .step, .best, ...: plain values
    run = Run("runs/a", {"model": model, "optimizer": optimizer}, progress)
    if Path("runs/a/last.pt").exists():
        print(run.resume_from(load("runs/a/last.pt"), "runs/a/last.pt"))
    for epoch in range(progress.epoch, 10):
        with run.saved_if_interrupted(KeyboardInterrupt):   # if that arises between two optimizer steps alone
            ...                                             # progress.step += 1 after each step
        progress.epoch = epoch + 1
        run.save(best=is_best)                              # last.pt, and best.pt as the same file

A part is anything with `state_dict()` and `load_state_dict()`, PyTorch's own convention. A checkpoint holds tensors and
plain values only, and is read with weights_only=True, so that it never executes code.

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
import sys
import time
import unicodedata
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or continued. The message is one line that names the way out."""


# ---- a run and its folder


class Progress:
    """How far a run has come, in plain values. They stand under these names at the top of a checkpoint.

    epoch: epochs that are complete, so the number of the one that runs or comes next. step: optimizer steps so far.
    best, best_epoch: the best score so far and the epoch that had it, None before the first. epochs_without_gain: how
    many there were since the first that had it. plateau_scale: what a plateau schedule has cut the rates to. history: a
    dict of plain values for each epoch.
    """

    def __init__(self):
        self.epoch = 0
        self.step = 0
        self.best = None
        self.best_epoch = None
        self.epochs_without_gain = 0
        self.plateau_scale = 1.0
        self.history = []

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        for name in vars(self):
            setattr(self, name, state[name])


class Run:
    """A run folder, and what is saved there: the states of `parts`, the progress, random numbers, `about`.

    parts: {name: anything with state_dict() and load_state_dict()}. progress: a Progress. meter: what holds the sums of
    a running epoch, if any: a metrics.Meter. about: plain values and tensors that never change; "script" (a name
    without .py), "options" (a dict, written into args.json; there with the number of "classes" and, as "pictures", the
    words of "data") and "loss" (its name, which has to stay) are used here, if they are there.

    Of several processes (torch.distributed) all have to make one and to call its methods; the first alone reads and
    writes the folder, and the random numbers and sums of each are saved. While it lives, no other run may write there.
    Raises CheckpointError.
    """

    def __init__(self, folder, parts, progress, meter=None, about=None):
        self.folder, self.parts, self.progress, self.meter = Path(folder), parts, progress, meter
        self.about = about or {}
        self.script, self.options = self.about.get("script", ""), self.about.get("options", {})
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.resumed = False
        self.schedules = [part for part in parts.values() if isinstance(part, torch.optim.lr_scheduler.LRScheduler)]
        self._check_schedules()
        if self.is_first:
            classes, pictures = self.about.get("classes"), self.about.get("data")
            found = {"classes": len(classes)} if isinstance(classes, (list, tuple)) else {}
            found |= {"pictures": pictures} if isinstance(pictures, str) else {}
            self._lock = start_folder(self.folder, (self.options or {"torch": str(torch.__version__)}) | found)

    def save(self, best=False, name="last.pt", keep_every=0):
        """Write last.pt, and the same file as best.pt if it is the best so far: see `save`. At the end of an epoch
        history.csv, too, and of every `keep_every`th one (0: of none) the same file as epoch_<epoch>.pt. Under another
        `name`, a file that a resumed run finds there stays: it may have gone back to that.
        """
        totals = self.meter.totals() if self.meter else {}
        count = totals[self.meter.unit] if self.meter else 0
        within_epoch = count > 0
        if within_epoch and "loss" in totals:
            self.check_finite(totals["loss"] / count, f"training loss of epoch {self.progress.epoch}")
        sums = self.meter.state_dict() if within_epoch else {}
        of_all = _all_gather((rng_state(), sums))
        stays = name != "last.pt" and self.resumed and (self.folder / name).exists()
        if self.is_first and not stays:
            self._write(best, name, keep_every, totals, of_all)
        _broadcast(None)  # waits until it is there

    def _write(self, best, name, keep_every, totals, of_all):
        """In the first process. totals: the sums of all. of_all: of each, the random numbers and its own sums."""
        sums = of_all[0][1]
        epoch, keep = self.progress.epoch, None
        if keep_every and epoch % keep_every == 0:
            keep = f"epoch_{epoch - 1}.pt"
        state = dict(self.about)
        state |= {part_name: part.state_dict() for part_name, part in self.parts.items()}
        state |= self.progress.state_dict()
        state |= {"machine": machine(), "rng": of_all[0][0], "processes": of_all}
        state["sums"] = {sum_name: totals.get(sum_name, own) for sum_name, own in sums.items()}
        kinds = {kind: [part_name for part_name, part in self.parts.items() if isinstance(part, kind)]
                 for kind in (torch.nn.Module, torch.optim.Optimizer)}
        save(state, self.folder, best=best, name=name, keep=keep, way_out=self.slower_command,
             weights=kinds[torch.nn.Module], optimizers=kinds[torch.optim.Optimizer])
        between_epochs = sums == {}
        if name == "last.pt" and between_epochs and self.progress.history:
            write_csv(self.progress.history, self.folder / "history.csv")

    @contextlib.contextmanager
    def saved_if_interrupted(self, *errors):
        """Save when one of these exceptions ends the block, and let it go on. For those alone that arise between two
        optimizer steps, in all processes at the same time: within one, the state would hold half of it.
        """
        hooks = [schedule.optimizer.register_step_pre_hook(self._check_rates) for schedule in self.schedules]
        try:
            yield
        except errors:
            self.save()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def resume_from(self, saved, file):
        """Bring every part, the progress, the sums and the random numbers back to where the checkpoint `saved`, read
        from `file`, has left them. An optimizer's weight decay and peak rates stay as they are now: a resumed run may
        change them. Returns lines that say so. Raises CheckpointError.
        """
        rank, processes = 0, 1
        if dist.is_initialized():
            rank, processes = dist.get_rank(), dist.get_world_size()
        before, now = saved.get("loss"), self.about.get("loss")
        if before != now and before is not None:
            raise CheckpointError(f"the run was begun with the loss {before}, and this script has {now}: resume it with the "
                                  "script that began it, or start a new run")
        with_an_end = [schedule for schedule in self.schedules if not isinstance(schedule, ENDLESS)]
        for option, schedules in (("epochs", with_an_end), ("lr", self.schedules)):
            before, now = saved.get("options", {}).get(option), self.options.get(option)
            if schedules and before != now:
                raise CheckpointError(f"--{option} is {now} but the run's {type(schedules[0]).__name__} was made for {before}: "
                                      "it stays, or start a new run")
        lacking = [name for name in self.parts if name not in saved]
        if lacking:
            raise CheckpointError(f"{file} holds no '{lacking[0]}': it was saved before that was a part of the run; start "
                                  "a new one")
        for name, part in self.parts.items():
            _load_part(part, saved[name], f"{file} does not fit this run: its '{name}'")
        rng, sums = own_state(saved, rank, processes, self.meter.over_pictures if self.meter else ())
        if self.meter:
            self.meter.load_state_dict(sums)
        notes = [*machine_changes(saved), *go_on_in(self.folder, saved, file)] if self.is_first else []
        self.progress.load_state_dict(_broadcast({name: saved[name] for name in vars(self.progress)}))
        if rng:
            set_rng_state(rng)
        self.resumed = True
        here = f"epoch {self.progress.epoch}, step {self.progress.step}"
        return "\n".join([f"resumed from {file} at {here}", *notes])

    def load_best(self, *parts):
        """The weights (of the part "model") that best.pt holds, on the CPU, its row of the history, and the states of
        other `parts` that are asked for, in all processes. Raises CheckpointError.
        """
        best = None
        if self.is_first:
            state = load(self.folder / "best.pt", self.script or None)
            best = state["model"], state["history"][-1], *(state[name] for name in parts)
        return _broadcast(best)

    def check_finite(self, value, what):
        """Raise CheckpointError, with the way out, unless the number is finite. what: which number it is, in words."""
        if not math.isfinite(value):
            raise CheckpointError(f"the {what} is {value}, nothing of it was saved; try half the rate: "
                                  f"{self.slower_command()}")

    def _check_schedules(self):
        """PyTorch's schedules leave their mark in the optimizer's groups; one that is not saved would begin again."""
        optimizers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        marked = any("initial_lr" in group for optimizer in optimizers for group in optimizer.param_groups)
        if marked and not self.schedules:
            raise CheckpointError("the optimizer has a PyTorch schedule that is not among the parts of the run: it would "
                                  'begin again when the run is resumed; add it to them, as "scheduler": scheduler')
        rated = [spec for spec in self.options.get("unfreeze", []) if "@" in spec]
        if rated and self.schedules:
            raise CheckpointError(f"--unfreeze {rated[0]}: a PyTorch schedule sets the rates of this optimizer, and does not "
                                  "look at peak_lr: leave the rate behind @ out")

    def _check_rates(self, optimizer, args, kwargs):
        """Before a step: are the rates those that PyTorch's schedule has set? Raises CheckpointError."""
        rates = [group["lr"] for group in optimizer.param_groups]
        own = [schedule for schedule in self.schedules if schedule.optimizer is optimizer]
        if own and all(rates != list(schedule.get_last_lr()) for schedule in own):  # of several, the last one sets them
            raise CheckpointError(f"a rate is {rates[-1]:g} and {type(own[-1]).__name__} has set "
                                  f"{own[-1].get_last_lr()[-1]:g}: something else sets it, too; drop the lines of the loop "
                                  'that set group["lr"]')

    def resume_command(self):
        """What to type to go on with this run, '' if there is nothing to go on from, or no name of a script."""
        return resume_command(self.script, self.folder, launcher()) if self.script else ""

    def slower_command(self):
        """What to type when the run has diverged."""
        if "lr" not in self.options:
            return "lower the rate"
        thaws = dict(enumerate(self.options.get("unfreeze", [])))
        return slower_command(self.script, self.folder, self.options["lr"], thaws, self.progress.step, launcher())


def epochs_begun(saved):
    """How many epochs the run that is resumed from `saved` has begun (None: it starts): one that was interrupted is
    among them, and what happens at the start of an epoch has happened there.
    """
    if saved is None:
        return 0
    interrupted = saved["sums"] != {}
    return saved["epoch"] + 1 if interrupted else saved["epoch"]


# PyTorch's schedules that do not know how many steps or epochs there will be.
ENDLESS = (torch.optim.lr_scheduler.ReduceLROnPlateau, torch.optim.lr_scheduler.StepLR,
           torch.optim.lr_scheduler.MultiStepLR, torch.optim.lr_scheduler.ExponentialLR)


def _load_part(part, state, what):
    """what: says which part of which file, if it does not fit."""
    try:
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, state)
        elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
            for length in ("total_steps", "T_max"):  # loading would bring the old one back
                if getattr(part, length, None) != state.get(length):
                    raise ValueError(f"it was made for {state.get(length)} steps, and now for {getattr(part, length)}")
            part.load_state_dict(state)
        elif state != {}:  # of a GradScaler that was off
            part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{what} ({' '.join(str(error).split())[:200]}): go on with the program that saved it, or "
                              "start a new run") from error


def _all_gather(value):
    """The values of all processes, in a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _broadcast(value):
    """The first process's value, in all."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# ---- one file


def save(state, folder, best=False, name="last.pt", keep=None, way_out=lambda: "lower the rate", weights=("model",),
         optimizers=("optimizer",)):
    """Write `state` to folder/name; serialized once, also as folder/best.pt if it is the best so far, and under the
    name `keep`. weights, optimizers: the names of what must be finite.

    A reader, and a run killed at any moment, finds the old file or the new one, never a torn one; best.pt is in place
    before last.pt says so. The predictions of an earlier best.pt are removed. Raises CheckpointError, for weights or
    optimizer states that are not finite with the text that `way_out()` gives, and when the disk refuses; the
    checkpoints that were there stay as they were.
    """
    broken = _not_finite(state, weights, optimizers)
    if broken:
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


def _not_finite(state, weights, optimizers):
    """The name of a tensor among the weights and the optimizer's state that holds inf or nan, else ''."""
    tensors = {f"weight {k}": v for name in weights for k, v in state.get(name, {}).items()}
    for name in optimizers:
        for i, found in state.get(name, {}).get("state", {}).items():
            tensors |= {f"the {name}'s {k} of parameter {i}": v for k, v in found.items()}
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
            return load(path, saved.get("script"), mmap=True)
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
                score = history[-1].get(saved.get("options", {}).get("monitor"))
                saved |= {"best": score, "best_epoch": saved["epoch"] - 1, "epochs_without_gain": 0}
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
    """text: one, or a tuple of several."""
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
            if _starts_with(path, ("file,", "text,")):
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


def load(path, script=None, needs=(), mmap=False):
    """Read a checkpoint. script: the name (without .py) of the training script that has to have written it; None: any
    program. needs: names that it has to hold. mmap: leave the tensors on the disk until they are looked at. Raises
    CheckpointError.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder: give the file, such as {Path(path, 'last.pt')}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what is wrong
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        early = Path(path).name == "last.pt" and Path(path).with_name("args.json").exists()
        way_out = ": the run there has ended before its first save; start it again" if early else ""
        raise CheckpointError(f"no such checkpoint: {path}{way_out}") from error
    except Exception as error:  # torch.load raises many kinds for files that are something else
        raise CheckpointError(f"{path} is no checkpoint of this repository: it is damaged, or something else, or holds "
                              "Python objects besides tensors and plain values; nothing in it was executed") from error
    names = state.keys() if isinstance(state, dict) else set()
    if not ({"script", "model", "options"} <= names or {"epoch", "rng", "machine"} <= names):
        raise CheckpointError(f"{path} holds no run, perhaps bare weights: start from them with --weights "
                              f"{shlex.quote(str(path))}")
    writer = f"{state.get('script', 'another program')}.py"
    if script and state.get("script") != script:
        raise CheckpointError(f"{path} was written by {writer}, not by {script}.py")
    lacking = set(needs) - names
    if "preprocessing" in lacking and "max_length" in names:
        raise CheckpointError(f"{path} takes texts, {writer} wrote it, and here only a network for pictures can be "
                              "used: predict_text.py is for this one")
    if "max_length" in lacking and "preprocessing" in names:
        raise CheckpointError(f"{path} takes pictures, {writer} wrote it, and here only a network for texts can be "
                              "used: predict.py is for this one")
    if lacking:
        weights = "" if "text" in str(state.get("script")) else f" from its weights, --weights {shlex.quote(str(path))}"
        raise CheckpointError(f"{path} lacks {', '.join(sorted(lacking))}: another version of the script wrote it; start a "
                              f"new run{weights}")
    if isinstance(state.get("classes"), list):  # in the form in which names of folders are compared
        state["classes"] = [unicodedata.normalize("NFC", name) if isinstance(name, str) else name
                            for name in state["classes"]]
    return state


# What all training scripts save and a resumed run needs; and, of pictures, predict.py, of texts, predict_text.py.
OF_A_RUN = ("build", "optimizer", "rng", "epoch", "sums", "history")
NEEDED = (*OF_A_RUN, "hidden", "preprocessing")
OF_TEXTS = (*OF_A_RUN, "head", "pool", "max_length")


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
           "report.html", "curves.png", "confusion.png", "labels.png", "predicted.png", "residuals.png", "mistakes.png")


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
        first = json.dumps(next(iter(options), ""))
        if args_json.exists() and not _starts_with(args_json, f"{{\n  {first}: "):
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
        saved = load(file, script, OF_A_RUN)
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
        if name not in may_change and (name not in saved or saved[name] != value):
            option = "--" + name.replace("_", "-")
            before = f"with {saved[name]}" if name in saved else "by a version that did not know it"
            raise CheckpointError(f"{option} is {value} but the run was started {before}: leave it out to go "
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
    return f"{launcher} {_file_of(script)} --resume {shlex.quote(str(last))}" if last.exists() else ""


def _file_of(script):
    """The file to run: an edited copy of a script has another name."""
    main = sys.modules["__main__"]
    return Path(main.__file__).name if hasattr(main, "train") and hasattr(main, "__file__") else f"{script}.py"


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
    go_on = f"{launcher} {_file_of(script)} --resume {shlex.quote(str(latest))}" if latest else "the same command with"
    another = "" if latest or not steps else " --output elsewhere"
    rates = ", and lower rates behind @" if "@" in "".join(thaws.values()) else ""
    return f"{go_on}{another} --lr {lr / 2:g}{rates}"


def launcher():
    """What stands before the name of the script in a command that goes on with this run: python, or torchrun with as
    many processes as there are now.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    machines = f"--nnodes={processes // here} ... " if processes > here else ""
    return "python" if processes == 1 else f"torchrun {machines}--nproc_per_node={here}"


# ---- random numbers and the machine


def own_state(saved, rank, processes, over_pictures=("images", "loss", "hits")):
    """What process `rank` of `processes` goes on from: the state of its random numbers (or None), and the sums of the
    running epoch. If there were as many before, its own; else the first process takes over the sums of all.
    over_pictures: names of the sums that add up over the processes.
    """
    if processes > 1 and len(saved.get("processes", [])) == processes:
        return saved["processes"][rank]
    nothing = {name: 0.0 for name in saved["sums"] if name in over_pictures} if rank else {}
    return None if rank else saved["rng"], saved["sums"] | nothing


# What a resumed run may change, or what the device decides; everything else, such as momenta that a schedule moves,
# comes back as it was saved.
SETTINGS = ("peak_lr", "weight_decay", "fused", "foreach", "capturable")


def load_optimizer(optimizer, state):
    """Load an optimizer's state_dict, but leave the `SETTINGS` of its groups as they are now. The rate `lr` of the last
    step comes back, too.
    """
    now = [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]
    if len(now) == len(state["param_groups"]):  # else loading says so
        # Before loading: by `fused` and `capturable` it decides on which device the numbers of steps are kept.
        groups = [group | settings for group, settings in zip(state["param_groups"], now, strict=True)]
        state = state | {"param_groups": groups}
    optimizer.load_state_dict(state)


def rng_state():
    """The states of torch's global generators, from which dropout draws."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def machine():
    """What bit-identical results depend on besides seed and data: CPU type, threads, version of torch, and the type of
    the GPU, if this process uses one.
    """
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    cpu = f"{cpu}, {torch.backends.cpu.get_cpu_capability()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "none"
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": str(torch.__version__), "gpu": gpu}


def machine_changes(saved):
    """A warning for each difference between the machine of the checkpoint `saved` and this one."""
    return [f"warning: {what} was {saved['machine'][what]} and is {value}: results may differ in the last bits"
            for what, value in machine().items() if value != saved["machine"].get(what, value)]
