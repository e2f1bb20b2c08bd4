import argparse
import csv
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import arguments
import checkpoint
from checkpoint import CheckpointError
from conftest import ROOT, read
from model import output_names
from test_model import Payload
from test_train_classifier import equal


def state(value, **more):
    return {"script": "test", "options": {}, "model": {"w": torch.full((3,), float(value))}} | more


def value(path):
    return read(path)["model"]["w"][0].item()


def test_last_and_best(tmp_path):
    checkpoint.save(state(1), tmp_path, best=True)
    checkpoint.save(state(2), tmp_path)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (1, 2)
    checkpoint.save(state(3), tmp_path, best=True)
    checkpoint.save(state(4), tmp_path, best=True)  # over a pair that is one file with two names
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (4, 4)
    checkpoint.save(state(5), tmp_path, name="before_unfreeze_3.pt")
    assert sorted(os.listdir(tmp_path)) == ["before_unfreeze_3.pt", "best.pt", "last.pt"]


def test_predictions_are_those_of_best(tmp_path):
    """Those of the best.pt before would be taken for the new one's."""
    checkpoint.save(state(1), tmp_path, best=True)
    names = "test_predictions.csv", "old_val_predictions.csv", "my_predictions.csv"
    for name in names:
        (tmp_path / name).write_text("file,truth,prediction,probability\n")
    (tmp_path / "val_predictions.csv").write_text("id,guess\n")  # somebody's own
    checkpoint.save(state(2), tmp_path)
    checkpoint.save(state(2), tmp_path, name="before_unfreeze_3.pt", keep="epoch_1.pt")
    assert {path.name for path in tmp_path.glob("*.csv")} == {*names, "val_predictions.csv"}
    checkpoint.save(state(3), tmp_path, best=True)
    assert {path.name for path in tmp_path.glob("*.csv")} == {"my_predictions.csv", "val_predictions.csv"}


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(state(1), tmp_path, best=True)
    checkpoint.save(state(2), tmp_path)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (1, 2)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call, moment", [("fsync", 0), ("link", 0), ("replace", 0), ("replace", 1), ("fsync", 1)])
@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_in_a_save(tmp_path, monkeypatch, call, moment, after):
    """At every moment last.pt and best.pt are whole; best.pt never falls behind last.pt; the next save recovers."""
    checkpoint.save(state(1), tmp_path, best=True)
    checkpoint.save(state(2), tmp_path, best=True)
    real, calls = getattr(os, call), iter(range(100))

    def die(*args):
        now = next(calls) == moment
        if now and not after:
            raise Killed
        result = real(*args)
        if now:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            checkpoint.save(state(3), tmp_path, best=True)
    best, last = value(tmp_path / "best.pt"), value(tmp_path / "last.pt")
    assert (best, last) in ((2, 2), (3, 2), (3, 3))
    checkpoint.save(state(4), tmp_path)  # a new start writes to the same temporary name: best.pt must not follow
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (best, 4)
    checkpoint.save(state(5), tmp_path, best=True)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (5, 5)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


@pytest.mark.parametrize("call, code", [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_disk_that_refuses_leaves_the_earlier_files(tmp_path, monkeypatch, call, code):
    checkpoint.save(state(1), tmp_path, best=True)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            checkpoint.save(state(2), tmp_path, best=True)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (1, 1)


def test_a_file_system_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    real = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "not for folders")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    checkpoint.save(state(2), tmp_path, best=True)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (2, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, bad):
    checkpoint.save(state(1), tmp_path, best=True)
    with pytest.raises(CheckpointError, match="no longer finite"):
        checkpoint.save(state(bad), tmp_path, best=True)
    assert (value(tmp_path / "best.pt"), value(tmp_path / "last.pt")) == (1, 1)


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "x.pt", "test")
    (tmp_path / "args.json").touch()
    with pytest.raises(CheckpointError, match="last.pt: the run there has ended before its first save; start it again"):
        checkpoint.load(tmp_path / "last.pt", "test")
    with pytest.raises(CheckpointError, match="is a folder: give the file, such as .*last.pt"):
        checkpoint.load(tmp_path, "test")
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="no checkpoint of this repository"):
        checkpoint.load(tmp_path / "x.pt", "test")
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="start from them with --weights"):
        checkpoint.load(tmp_path / "x.pt", "test")
    torch.save(state(1, extra=Payload(tmp_path / "executed")), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        checkpoint.load(tmp_path / "x.pt", "test")
    assert not (tmp_path / "executed").exists()
    checkpoint.save(state(1), tmp_path)
    torn = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(torn[: len(torn) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "last.pt", "test")


def test_classes_are_compared_in_nfc(tmp_path):
    checkpoint.save(state(1, classes=["cafe\u0301", "tea"]), tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["classes"] == ["caf\u00e9", "tea"]
    assert output_names(read(tmp_path / "last.pt")) == ["caf\u00e9", "tea"]  # for --weights
    checkpoint.save(state(2, classes=7), tmp_path)  # somebody else's
    assert checkpoint.load(tmp_path / "last.pt")["classes"] == 7
    checkpoint.save(state(3, classes=[0, 1]), tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["classes"] == [0, 1]
    checkpoint.Run(tmp_path / "run", {}, checkpoint.Progress(), about={"classes": 7, "data": {"cats": 3}})
    assert list(json.loads((tmp_path / "run/args.json").read_text())) == ["torch"]


def test_write_csv(tmp_path):
    rows = [{"a": 1, "b": "x, y"}, {"a": 2, "b": 'say "z"'}]
    checkpoint.write_csv(rows, tmp_path / "x.csv")
    checkpoint.write_csv(rows, tmp_path / "x.csv")
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'say "z"'}]
    assert os.listdir(tmp_path) == ["x.csv"]


def test_options_not_typed_come_from_the_checkpoint():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--thaw", action="append", default=[])
    parser.add_argument("--flag", action="store_true")
    assert arguments.typed_options(parser, []) == {}
    typed = arguments.typed_options(parser, ["--lr", "0.1", "--thaw", "a", "--thaw", "b", "--flag"])
    assert typed == {"lr": 0.1, "thaw": ["a", "b"], "flag": True}
    saved = {"lr": 0.5, "epochs": 7, "thaw": [], "flag": False, "batch_size": 8, "accumulate": 2}
    assert checkpoint.resume_options({"lr": 0.2}, saved, {"lr"}) == saved | {"lr": 0.2}
    assert checkpoint.resume_options({"epochs": 7}, saved, {"lr"}) == saved
    with pytest.raises(CheckpointError, match="--epochs is 8 but the run was started with 7"):
        checkpoint.resume_options({"epochs": 8}, saved, {"lr"})


def test_rng_state_brings_back_the_same_numbers():
    saved = checkpoint.rng_state()
    expected = torch.randn(5)
    checkpoint.set_rng_state(saved)
    assert torch.equal(torch.randn(5), expected)


# ---- going on and going back


def epoch_state(number, scores, **more):
    """The state after epoch `number` of a run with these validation losses."""
    history = [{"epoch": e, "val_loss": score, "seconds": 0.25 * e} for e, score in enumerate(scores[:number])]
    best = min(range(number), key=scores.__getitem__) if number else None
    more = {"best": scores[best] if number else None, "best_epoch": best, "epochs_without_gain": 5} | more
    kept = {"build": {}, "hidden": 0, "preprocessing": {}, "optimizer": {}, "rng": {}, "sums": {}}
    return state(number, **kept, epoch=number, step=10 * number, history=history, **more) | {"options": {"monitor": "val_loss"}}


def run_folder(folder, scores, back_to):
    """What a run of len(scores) epochs leaves that has kept the state before epoch `back_to`, and an earlier trail."""
    folder.mkdir()
    for number in range(len(scores) + 1):
        now = epoch_state(number, scores)
        if number == back_to:
            checkpoint.save(now, folder, name=f"before_unfreeze_{number}.pt")
        if number:
            checkpoint.save(now, folder, best=now["best_epoch"] == number - 1, keep="epoch_2.pt" if number == 3 else None)
    return folder


def values(folder):
    return {path.name: value(path) for path in folder.glob("*.pt")}


BACK = {  # losses, the epoch to go back to: what best.pt holds then
    "best of an epoch before it": ([5.0, 1.0, 2.0, 3.0], 2, 2),
    "best of a later epoch": ([5.0, 4.0, 1.0, 2.0], 2, 2),  # the state of epoch 2 is itself the best of its epochs
    "best that is gone": ([1.0, 4.0, 2.0, 0.5], 2, 2),  # epoch 1 was the best of two: written over since
    "to the beginning": ([1.0, 4.0, 2.0, 0.5], 0, None),
}


def dying(function, calls, kill_at):
    def wrapper(*args, **how):
        calls.append(args)
        if len(calls) == kill_at:
            raise Killed
        return function(*args, **how)

    return wrapper


@pytest.mark.parametrize("scores, back_to, best", BACK.values(), ids=BACK)
def test_killed_anywhere_while_going_back(tmp_path, monkeypatch, scores, back_to, best):
    """Then nothing is lost, the same command ends as if nothing had happened, and so does going on with what was left."""
    name, calls = f"before_unfreeze_{back_to}.pt", []

    def go_on(folder, file, kill_at=None):
        saved = read(folder / file)
        with monkeypatch.context() as patch:
            calls.clear()
            for call in ("link", "replace", "unlink"):
                patch.setattr(os, call, dying(getattr(os, call), calls, kill_at))
            return checkpoint.go_on_in(folder, saved, folder / file), saved

    undisturbed = run_folder(tmp_path / "undisturbed", scores, back_to)
    before = values(undisturbed)
    _, saved = go_on(undisturbed, name)
    count, after = len(calls), values(undisturbed)
    assert after["last.pt"] == back_to and after.get("best.pt") == best
    assert after["last_until_4.pt"] == 4 and after["epoch_2_until_4.pt"] == 3
    if best is not None:
        assert saved["best_epoch"] == best - 1 and saved["epochs_without_gain"] == (0 if scores == BACK["best that is gone"][0] else 5)
    assert count >= 5
    for moment in range(1, count + 1):
        broken = run_folder(tmp_path / str(moment), scores, back_to)
        with pytest.raises(Killed):
            go_on(broken, name, kill_at=moment)
        left = values(broken)
        assert set(left.values()) >= set(before.values())
        assert back_to == 0 or "best.pt" in left
        assert "last.pt" in left
        abandoned = tmp_path / f"{moment}_abandoned"
        shutil.copytree(broken, abandoned)
        _, held = go_on(broken, name)
        assert values(broken) == after and held["best_epoch"] == saved["best_epoch"]
        if left["last.pt"] == 4:
            said, held = go_on(abandoned, "last.pt")
            assert value(abandoned / "best.pt") == before["best.pt"] and held["best_epoch"] == before["best.pt"] - 1 and not said


def test_what_is_taken_for_best(tmp_path):
    """After a kill between the two renames of a save, best.pt is that of the next epoch, which will come again."""
    folder = run_folder(tmp_path / "run", [3.0, 2.0], 1)
    last = folder / "last.pt"
    checkpoint.save(epoch_state(3, [3.0, 2.0, 1.0]), folder, name="best.pt")
    assert checkpoint.go_on_in(folder, read(last), last) == [] and value(folder / "best.pt") == 3
    # of two that were set aside, the one of this run, and not the one of another attempt
    (folder / "best.pt").unlink()
    checkpoint.save(epoch_state(3, [3.0, 2.0, 4.0]), folder)
    checkpoint.save(epoch_state(2, [3.0, 1.9], model={"w": torch.ones(3)}), folder, name="best_until_2.pt")
    checkpoint.save(epoch_state(2, [3.0, 2.0]), folder, name="best_until_3.pt")
    assert checkpoint.go_on_in(folder, read(last), last) == [] and value(folder / "best.pt") == 2


def test_a_damaged_last_does_not_hinder_going_back(tmp_path):
    folder = run_folder(tmp_path / "run", [5.0, 1.0, 2.0, 3.0], 2)
    (folder / "last.pt").write_bytes(b"damaged")
    file = folder / "before_unfreeze_2.pt"
    assert any("last.pt" in line for line in checkpoint.go_on_in(folder, read(file), file))
    assert (folder / "last_until_3.pt").read_bytes() == b"damaged" and value(folder / "last.pt") == value(folder / "best.pt") == 2


def test_where_to_go_on_after_divergence(tmp_path):
    """From a checkpoint that an optimizer step lies behind: at the same step, the same comes out again."""
    folder, start = tmp_path / "run", "python test.py --resume "
    assert checkpoint.slower_command("test", folder, 0.01, {}, 7) == "the same command with --lr 0.005"
    folder.mkdir()
    checkpoint.save(epoch_state(0, []), folder, name="before_unfreeze_0.pt")
    assert checkpoint.slower_command("test", folder, 0.01, {}, 0) == "the same command with --output elsewhere --lr 0.005"
    assert checkpoint.slower_command("test", folder, 0.01, {}, 1) == f"{start}{folder}/before_unfreeze_0.pt --lr 0.005"
    checkpoint.save(epoch_state(1, [1.0]), folder, best=True)
    checkpoint.save(epoch_state(2, [1.0, 2.0]), folder)
    assert checkpoint.slower_command("test", folder, 0.01, {}, 21) == f"{start}{folder}/last.pt --lr 0.005"
    assert checkpoint.slower_command("test", folder, 0.01, {0: "fc@1"}, 20) == (
        f"{start}{folder}/best.pt --lr 0.005, and lower rates behind @")


def starts_in_another_process(folder):
    """Whether a run could start in the folder. (A process itself may lock again what it has locked.)"""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            checkpoint.start_folder(folder, {"data": "b"})
            status = 0
        except CheckpointError as error:
            status = 1 if str(error) == f"another run is writing into {folder}: give another --output" else 3
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


def test_check_finite(tmp_path):
    run = checkpoint.Run(tmp_path / "run", {}, checkpoint.Progress(), about={"script": "test", "options": {"lr": 2}})
    run.check_finite(3.0, "loss")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CheckpointError, match="the loss is .*, nothing of it was saved; try half the rate: "
                                                  "the same command with --lr 1"):
            run.check_finite(bad, "loss")


def test_two_runs_in_one_folder(tmp_path):
    held = checkpoint.start_folder(tmp_path / "run", {"data": "a"})
    assert not starts_in_another_process(tmp_path / "run") and '"a"' in (tmp_path / "run" / "args.json").read_text()
    held.close()
    assert starts_in_another_process(tmp_path / "run") and '"b"' in (tmp_path / "run" / "args.json").read_text()


def test_a_run_holds_its_folder_until_its_end(train, monkeypatch, tmp_path):
    real, found = checkpoint.save, []
    monkeypatch.setattr(checkpoint, "save", lambda *args, **how: (
        found.append(starts_in_another_process(tmp_path / "run")), real(*args, **how)))
    train(output=tmp_path / "run", epochs=2)
    assert found == [False, False] and starts_in_another_process(tmp_path / "run")


# ---- in a program of somebody else's

STRANGER = '''
import os, signal, sys
from pathlib import Path

import torch
from torch import nn

import checkpoint
import freeze


def train(folder, die_at=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    names = freeze.select(net, "1", freeze.find_head(net))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    progress = checkpoint.Progress()
    run = checkpoint.Run(folder, {"net": net, "optimizer": optimizer, "scheduler": scheduler}, progress)
    last = Path(folder, "last.pt")
    if last.exists():
        print(run.resume_from(checkpoint.load(last), last))
    for epoch in range(progress.epoch, 4):
        net.train()
        for part in freeze.frozen_parts(net):
            part.eval()
        generator = torch.Generator().manual_seed(epoch)
        for i in range(5):
            x, y = torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)
            if i < progress.step - epoch * 5:
                continue
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.step += 1
            run.save()
            if progress.step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        progress.epoch = epoch + 1
        net.eval()
        with torch.no_grad():
            score = net(torch.ones(1, 4))[0, 0].item()
        progress.history.append({"epoch": epoch, "score": score})
        is_best = progress.best is None or score > progress.best
        if is_best:
            progress.best, progress.best_epoch = score, epoch
        run.save(best=is_best)


for folder, moments in (("whole", [None]), ("killed", [3, 10, 17, None])):
    for moment in moments:
        if os.fork() == 0:
            train(folder, moment)
            os._exit(0)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == (0 if moment is None else -9)
'''


def test_a_strangers_program_with_nothing_but_two_files(tmp_path):
    """Of this repository; its parts have names of their own, it has no options, and it is killed three times."""
    for name in ("checkpoint.py", "freeze.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "program.py").write_text(STRANGER)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    assert re.findall(r"resumed from killed/last.pt at epoch (\d), step (\d+)", done.stdout) == [("0", "3"), ("1", "10"), ("3", "17")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sorted(os.listdir(whole)) == sorted(os.listdir(killed)) == ["args.json", "best.pt", "history.csv", "last.pt"]
    assert (whole / "history.csv").read_text() == (killed / "history.csv").read_text()
    for name in ("last.pt", "best.pt"):
        a, b = read(whole / name), read(killed / name)
        assert a.keys() == b.keys() >= {"net", "optimizer", "scheduler", "epoch", "step", "rng"}
        assert all(equal(a[key], b[key]) for key in a), name
    start = torch.nn.BatchNorm1d(8).state_dict()
    assert all(torch.equal(a["net"][f"1.{key}"], value) for key, value in start.items())  # frozen means frozen
    with pytest.raises(CheckpointError, match="lacks build"):
        checkpoint.load(whole / "last.pt", needs=checkpoint.NEEDED)
    with pytest.raises(CheckpointError, match="was written by another program.py, not by train_classifier.py"):
        checkpoint.load(whole / "last.pt", "train_classifier")


def test_a_schedule_that_would_not_be_saved_is_refused(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(CheckpointError, match='not among the parts of the run.*"scheduler": scheduler'):
        checkpoint.Run(tmp_path / "run", {"optimizer": optimizer}, checkpoint.Progress())
    assert not (tmp_path / "run").exists()
    checkpoint.Run(tmp_path / "run", {"optimizer": optimizer, "scheduler": scheduler}, checkpoint.Progress())


def test_an_optimizer_of_any_name_must_be_finite(tmp_path):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    run = checkpoint.Run(tmp_path / "run", {"net": layer, "opt": optimizer}, checkpoint.Progress())
    run.save()
    optimizer.state[layer.weight]["momentum_buffer"].fill_(math.nan)
    with pytest.raises(CheckpointError, match="the opt's momentum_buffer of parameter 0 is no longer finite"):
        run.save()


def test_a_part_that_was_not_saved_is_named(tmp_path):
    layer, progress = torch.nn.Linear(2, 2), checkpoint.Progress()
    checkpoint.Run(tmp_path / "run", {"model": layer}, progress).save()
    run = checkpoint.Run(tmp_path / "run", {"model": layer, "criterion": torch.nn.Linear(1, 1)}, progress)
    file = tmp_path / "run/last.pt"
    with pytest.raises(CheckpointError, match="last.pt holds no 'criterion': it was saved before that was a part of the run"):
        run.resume_from(checkpoint.load(file), file)
    other = checkpoint.Run(tmp_path / "run", {"model": torch.nn.Linear(3, 2)}, progress)
    with pytest.raises(CheckpointError, match="last.pt does not fit this run: its 'model' .*size mismatch"):
        other.resume_from(checkpoint.load(file), file)


def test_a_resumed_optimizer_keeps_what_a_run_may_change_and_gets_back_the_rest():
    def optimizer(lr, decay):
        group = {"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr, "peak_lr": lr, "weight_decay": decay}
        return torch.optim.AdamW([group])

    before, after = optimizer(0.1, 0.5), optimizer(0.2, 0.25)
    before.param_groups[0] |= {"lr": 0.03, "betas": (0.85, 0.999)}  # as a schedule has left them
    checkpoint.load_optimizer(after, before.state_dict())
    group = after.param_groups[0]
    assert [group[k] for k in ("peak_lr", "weight_decay", "lr", "betas")] == [0.2, 0.25, 0.03, (0.85, 0.999)]


def test_an_optimizers_state_is_loaded_for_the_form_that_it_has_now():
    """A fused one keeps its numbers of steps beside the weights and in float32, others on the CPU as they are: what comes
    from another kind of device is made fit."""
    parameter = torch.nn.Parameter(torch.ones(2))
    before, after = torch.optim.AdamW([parameter], fused=False), torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(2)
    before.step()
    state = before.state_dict()
    state["state"][0]["step"] = state["state"][0]["step"].double()
    checkpoint.load_optimizer(after, state)
    assert after.state[parameter]["step"].dtype == torch.float32 and after.param_groups[0]["fused"]
    assert state["param_groups"][0]["fused"] is False  # what was handed in stays as it was


def test_the_type_of_the_gpu_is_a_part_of_the_machine(monkeypatch):
    here = checkpoint.machine()
    assert here["gpu"] == "none"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert checkpoint.machine_changes({"machine": here}) == [
        "warning: gpu was none and is NVIDIA X: results may differ in the last bits"]
    older = {"machine": {what: value for what, value in here.items() if what != "gpu"}}
    assert checkpoint.machine_changes(older) == []  # before it was written down
