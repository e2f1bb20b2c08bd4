"""A run that is stopped or killed anywhere, any number of times, ends as an undisturbed one; and faults of every kind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import ending
import train_classifier
from conftest import ROOT, SMALL, changed, command_line, draw_folder, read
from lives import running
from test_train_classifier import SGD, equal, history, untimed

# Whatever keeps a state of its own: momenta, a scale, dropout, a thaw with a rate, accumulation with a rest, mixing.
FULL = ["--freeze", "backbone", "--unfreeze", "1:stage4@0.001", "--head", "mlp", "--hidden", "8", "--accumulate", "2",
        "--augment", "strong", "--schedule", "plateau", "--plateau-epochs", "1", "--l1", "1e-6", "--keep-every", "2"]
MIXED = [*FULL, "--mixup", "0.2", "--cutmix", "1", "--l2-sp", "0.1"]
STATE = ("model", "optimizer", "scaler", "rng", "best", "best_epoch", "epochs_without_gain", "plateau_scale", "epoch", "step",
         "sums", "data")


def assert_the_same_run(one, other, predictions="test_predictions.csv"):
    """Every tensor and number of two run folders, bit for bit, times apart."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for file in sorted(one.glob("*.pt")):
        a, b = read(file), read(other / file.name)
        for key in STATE:
            assert equal(a[key], b[key]), (file.name, key)
        assert equal(untimed(a["history"]), untimed(b["history"]))
    assert untimed(history(one)) == untimed(history(other))
    assert (one / predictions).read_text() == (other / predictions).read_text()


def stop_at(patch, moment, number=signal.SIGINT):
    """Send this process a signal just before it looks for the `moment`th time whether it shall stop."""
    real, calls = ending.leave_if_asked, iter(range(1, 10**6))

    def leave_if_asked(stop):
        if next(calls) == moment:
            os.kill(os.getpid(), number)
        real(stop)

    patch.setattr(ending, "leave_if_asked", leave_if_asked)


# ---- between any two steps


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_stopped_after_every_step_and_within_validation(request, kind, weights, monkeypatch, capsys):
    """A life for each: 4 steps of 3 + 3 pictures and a rest, the first and second batch of the validation, the end of the
    epoch, the steps after the thaw. Each with another number of workers."""
    run = request.getfixturevalue({"classifier": "train", "regressor": "regress"}[kind])
    options = MIXED if kind == "classifier" else [*FULL, "--quantiles", "0.1,0.5,0.9"]
    settings = {"weights": weights, "epochs": 2, "batch_size": 3, "amp": "fp16"}
    whole = run(*options, **settings)
    broken, places = whole.with_name("broken"), []
    for life, moment in enumerate([1, 1, 1, 1, 2, 4, 1, 1]):
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_at(patch, moment)
            run(*options, "--resume", **settings | {"workers": (0, 1, 2, 4)[life % 4]}, output=broken)
        assert stopped.value.code == 130
        command = f"python train_{kind}.py --resume {broken}/last.pt"
        assert capsys.readouterr().err == f"stopped by SIGINT; go on with: {command}\n"
        state = read(broken / "last.pt")
        places.append((state["epoch"], state["step"]))
    assert places == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 4), (1, 4), (1, 5), (1, 6)]
    run(*options, "--resume", **settings, output=broken)
    assert_the_same_run(whole, broken)


def test_going_on_decodes_nothing_of_what_was_seen(train, monkeypatch, tmp_path):
    """Of three batches of 8, 8 and 4 the first two are not read again, nor is the training split by a validation."""
    read_files, real = [], data.decode
    for moment, left in ((2, 4), (4, 0)):  # after the second step; within the validation
        output = tmp_path / f"stopped{moment}"
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, moment)
            train("--save-every", 1, output=output)
        with monkeypatch.context() as patch:
            patch.setattr(data, "decode", lambda path, *a: (read_files.append(Path(path).parts[-3]), real(path, *a))[1])
            train_classifier.main(["--resume", str(output / "last.pt")])
        assert read_files.count("train") == left and read_files.count("val") == 8
        read_files.clear()


def test_speed_is_that_of_training_though_stopped_within_validation(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 4)  # three steps, then the one batch of the validation
        train(output=tmp_path / "run")
    saved = read(tmp_path / "run" / "last.pt")
    assert saved["step"] == 3 and saved["sums"]["images"] == 20 and 0 < saved["sums"]["train_seconds"] < 100
    saved["sums"]["seconds"] += 1000  # of a slow validation
    torch.save(saved, tmp_path / "run" / "last.pt")
    train_classifier.main(["--resume", str(tmp_path / "run" / "last.pt")])
    (row,) = history(tmp_path / "run")
    assert float(row["images_per_second"]) > 0.2 and float(row["seconds"]) > 1000


@pytest.mark.parametrize("every", [1, 2])
def test_save_every(train, weights, monkeypatch, every):
    saved, real = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda state, *a, **k: (
        saved.append((state["epoch"], state["step"], k.get("best", False))), real(state, *a, **k)))
    run = train("--save-every", every, "--monitor", "val_loss", weights=weights, epochs=2)
    steps = [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (1, 5), (1, 6), (2, 6)]
    ends = {(1, 3), (2, 6)}
    assert [place for *place, _ in saved] == [list(p) for p in steps if p in ends or p[1] % every == 0]
    assert not any(best for epoch, step, best in saved if (epoch, step) not in ends)  # in mid-epoch nothing is the best
    monkeypatch.undo()
    assert not changed(read(run / "last.pt")["model"], read(train("--monitor", "val_loss", weights=weights, epochs=2) / "last.pt")["model"])


def test_what_may_change_in_the_middle_of_an_epoch(train, weights, monkeypatch, error_of, tmp_path):
    """Batch size and accumulation, as long as their product stays; not the thaw that this epoch has begun with."""
    options = ["--freeze", "backbone", "--unfreeze", "0:conv5.0", "--accumulate", "2"]
    whole = train(*options, weights=weights, batch_size=4, **SGD | {"lr": 0.1})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        train(*options, weights=weights, batch_size=4, output=tmp_path / "broken", **SGD | {"lr": 0.1})
    last = str(tmp_path / "broken" / "last.pt")
    assert "what thawed before epoch 1 cannot be changed" in error_of(train_classifier.main, ["--resume", last, "--unfreeze", "0:conv5"])
    assert "--batch-size is 1 but the run was started with 4" in error_of(
        train_classifier.main, ["--resume", last, "--batch-size", "1", "--accumulate", "8"])
    train_classifier.main(["--resume", last, "--batch-size", "2", "--accumulate", "4"])
    a, b = read(whole / "last.pt"), read(last)
    assert a["step"] == b["step"] == 3
    for key in a["model"]:
        torch.testing.assert_close(a["model"][key], b["model"][key], rtol=1e-3, atol=1e-5)


def test_going_back_to_the_very_beginning_keeps_what_is_left_behind(train, weights, tmp_path):
    run = train("--freeze", "backbone", "--unfreeze", "0:stage4", weights=weights, epochs=2)
    shutil.copytree(run, tmp_path / "again")
    train_classifier.main(["--resume", str(run / "before_unfreeze_0.pt"), "--unfreeze", "0:conv5", "--epochs", "1"])
    assert read(run / "last_until_2.pt")["epoch"] == 2 and read(run / "best_until_2.pt")["epoch"] in (1, 2)
    assert [row["epoch"] for row in history(run)] == ["0"]
    back = tmp_path / "again"  # stopped at once, there is no history, so no history.csv of the epochs left behind
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        train_classifier.main(["--resume", str(back / "before_unfreeze_0.pt")])
    assert not (back / "history.csv").exists() and read(back / "last.pt")["step"] == 1
    assert not list(back.glob("*_predictions.csv"))
    # from the middle of an epoch back to its beginning
    train_classifier.main(["--resume", str(back / "before_unfreeze_0.pt"), "--epochs", "1"])
    assert read(back / "last_until_0.pt")["step"] == 1


def test_keep_every(train, weights):
    run = train("--keep-every", 2, weights=weights, epochs=5)
    assert sorted(p.name for p in run.glob("epoch_*")) == ["epoch_1.pt", "epoch_3.pt"]
    assert [read(run / f"epoch_{e}.pt")["epoch"] for e in (1, 3)] == [2, 4]
    kept = (run / "epoch_3.pt").read_bytes()
    train_classifier.main(["--resume", str(run / "epoch_1.pt"), "--epochs", "4", "--lr", "0"])  # and back to one of them
    assert (run / "epoch_3_until_5.pt").read_bytes() == kept != (run / "epoch_3.pt").read_bytes()


# ---- SIGKILL

KILLS = {  # before which call of which function: its name, the file that it is about, how many such calls come before
    "a step's file is synced": ("fsync", "last.pt.tmp", 1), "best.pt is linked": ("link", "best.pt.tmp", 0),
    "best.pt is renamed": ("replace", "best.pt", 0), "the kept one is renamed": ("replace", "epoch_0.pt", 0),
    "last.pt is renamed after best.pt": ("replace", "last.pt", 0), "before a thaw": ("replace", "before_unfreeze_1.pt", 0),
    "the folder is synced": ("fsync", "", 1), "history.csv is renamed": ("replace", "history.csv", 1),
}
KILL_BEFORE = """
import os, signal

def dying(function, place):
    calls = iter(range(1000))
    def call(*args, **kwargs):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[-1]))
        name = name.replace(f".{os.getpid()}.tmp", ".tmp")
        if (name == WANTED or WANTED == "" and name.endswith("broken")) and next(calls) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
"""


def test_killed_between_any_two_steps_of_a_save(lives, pictures, weights, tmp_path):
    """SIGKILL, eight times in the life of one run; after each kill what is there is whole, and best.pt the best."""
    options = ["--save-every", "1", "--monitor", "val_loss", "--freeze", "backbone", "--unfreeze", "1:stage4", "--keep-every", "1"]
    settings = SMALL | {"data": pictures, "weights": weights, "epochs": 3, "lr": 0.01}
    assert lives.start("train_classifier", *command_line(options, settings | {"output": tmp_path / "whole"})).wait() == 0
    broken, inside = tmp_path / "broken", 0
    for number, (name, file, place) in enumerate(KILLS.values()):
        before = f"WANTED = {file!r}\n{KILL_BEFORE}\nos.{name} = dying(os.{name}, {place})"
        words = command_line([*options, "--resume"], settings | {"output": broken, "workers": (0, 1, 2)[number % 3]})
        life = lives.start("train_classifier", *words, before=before)
        assert life.wait() == -signal.SIGKILL, (life.out, life.err)
        inside += bool(list(broken.glob("*.tmp")))
        found = {p.stem: read(p) for p in broken.glob("*.pt")}
        if "last" in found and found["last"]["best"] is not None:
            best = found["best"]["history"][-1]["val_loss"]
            assert best <= min(row["val_loss"] for row in found["last"]["history"])
            assert found["best"]["best"] == best
    assert inside >= 6
    assert lives.start("train_classifier", *command_line([*options, "--resume"], settings | {"output": broken})).wait() == 0
    assert_the_same_run(tmp_path / "whole", broken)


def test_a_continued_model_that_is_killed_ends_as_an_undisturbed_one(lives, train, pictures, tmp_path):
    """SIGKILL before the Fisher information is saved for the first time, within an epoch, between best.pt and last.pt."""
    start = train()
    settings = {"from": start / "best.pt", "data": pictures, "old-data": pictures, "method": "ewc+replay", "ewc": 10, "fisher-size": 2,
                "save-every": 1, "epochs": 2, "batch-size": 20, "optimizer": "sgd", "workers": 0, "amp": "off", "no-report": True}
    words = command_line(["--resume"], settings)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert lives.start("train_continual", *words, "--output", whole).wait() == 0
    for name, file, place in (("fsync", "last.pt.tmp", 0), ("replace", "last.pt", 1), ("replace", "last.pt", 1)):
        life = lives.start("train_continual", *words, "--output", broken,
                           before=f"WANTED = {file!r}\n{KILL_BEFORE}\nos.{name} = dying(os.{name}, {place})")
        assert life.wait() == -signal.SIGKILL, (life.out, life.err)
    assert lives.start("train_continual", *words, "--output", broken).wait() == 0
    assert_the_same_run(whole, broken)
    for key in ("anchor", "fisher", "before"):
        assert equal(read(whole / "last.pt")[key], read(broken / "last.pt")[key])


def test_the_same_command_begins_again_where_nothing_was_saved(lives, train, pictures, weights, tmp_path, error_of):
    """Killed in the first epoch, after the state before its thaw; in the first save, between best.pt and last.pt."""
    options = ["--freeze", "backbone", "--unfreeze", "0:stage4", "--resume"]
    whole = train(*options, weights=weights)
    words = command_line(options, SMALL | {"data": pictures, "weights": weights, "output": tmp_path / "broken"})
    for file, left in (("best.pt", ["before_unfreeze_0", "best.pt."]), ("last.pt", ["before_unfreeze_0", "best.pt"])):
        life = lives.start("train_classifier", *words, before=f"WANTED = {file!r}\n{KILL_BEFORE}\nos.replace = dying(os.replace, 0)")
        assert life.wait() == -signal.SIGKILL, life.err
        found = sorted(p.name for p in (tmp_path / "broken").glob("b*"))
        assert len(found) == 2 and all(map(str.startswith, found, left)) and found[1].endswith(".tmp") == (file == "best.pt")
    assert lives.start("train_classifier", *words).wait() == 0
    assert_the_same_run(whole, tmp_path / "broken")
    # but not where epochs would be lost
    train("--epochs", "2", *options[:-1], epochs=None, weights=weights, output=tmp_path / "two")
    (tmp_path / "two" / "last.pt").unlink()
    error = error_of(train, *options, epochs=2, weights=weights, output=tmp_path / "two")
    assert f"already holds a run: go on with it by --resume {tmp_path}/two/best.pt" in error


def test_files_of_the_users_own_are_left_as_they_are(train, weights, tmp_path, error_of):
    run = train("--freeze", "backbone", "--unfreeze", "0:stage4", weights=weights)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "history.csv").write_text("my,own\n1,2\n")
    assert "mine already holds a run: give another --output" in error_of(train, output=mine)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        train_classifier.main(["--resume", str(run / "before_unfreeze_0.pt"), "--output", str(mine), "--epochs", "2"])
    assert (mine / "history.csv").read_text() == "my,own\n1,2\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text('{"mine": 1}')
    assert "args.json is not of a run" in error_of(train, output=other)
    assert (other / "args.json").read_text() == '{"mine": 1}'


def test_a_link_to_a_checkpoint(train, tmp_path):
    run = train()
    os.symlink(run / "last.pt", tmp_path / "latest.pt")
    train_classifier.main(["--resume", str(tmp_path / "latest.pt"), "--epochs", "2", "--output", str(tmp_path / "more")])
    assert read(tmp_path / "more" / "last.pt")["epoch"] == 2 and read(run / "last.pt")["epoch"] == 1


def test_going_back_without_a_last_pt_keeps_what_is_left_behind(train, weights):
    run = train("--keep-every", 1, weights=weights, epochs=3)
    (run / "last.pt").unlink()
    kept = (run / "epoch_2.pt").read_bytes()
    train_classifier.main(["--resume", str(run / "epoch_0.pt"), "--lr", "0"])
    assert (run / "epoch_2_until_3.pt").read_bytes() == kept != (run / "epoch_2.pt").read_bytes()


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(train, tmp_path):
    run = train()
    mine = ["best.pt.tmp", "mine.csv", "mine.pt.1.tmp"]
    for name in ("last.pt.1.tmp", "best.pt.22.tmp", "epoch_3.pt.333.tmp", "history.csv.4.tmp", *mine):
        (run / name).write_text("x")
    train_classifier.main(["--resume", str(run / "last.pt")])
    assert sorted(p.name for p in run.iterdir() if p.read_bytes() == b"x") == mine


def gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(running(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_workers_end_with_a_killed_script(lives, pictures, tmp_path):
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "epochs": 500, "workers": 2})
    life = lives.start("train_classifier", *words)
    life.wait_for("epoch   0")
    workers = life.workers()
    assert len(workers) == 4  # two that train, two that validate
    os.kill(life.pid, signal.SIGKILL)
    assert life.wait() == -signal.SIGKILL and gone(workers, seconds=3)


# ---- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_saves_and_says_how_to_go_on(lives, pictures, tmp_path, number):
    """Sent to the whole group, as terminals and job queues do, while the step still waits for two of its three batches."""
    words = command_line(["--accumulate", "3"], SMALL | {"data": pictures, "output": tmp_path / "run", "epochs": 500, "workers": 2})
    before = "import data, time\nreal = data.decode\ndata.decode = lambda *a: (time.sleep(0.02), real(*a))[1]"
    life = lives.start("train_classifier", *words, before=before)
    life.wait_for("epoch   1")
    workers = life.workers()
    os.killpg(life.pid, number)
    assert life.wait(4) == 128 + number, life.err
    notice, last = life.err.strip().splitlines()
    assert notice.startswith("stopping after this step")
    assert last == f"stopped by {number.name}; go on with: python train_classifier.py --resume {tmp_path}/run/last.pt"
    assert len(workers) == 4 and gone(workers, seconds=2)
    assert read(tmp_path / "run" / "last.pt")["step"] == 3


def test_a_second_ctrl_c_leaves_at_once_and_tears_nothing(lives, train, pictures, tmp_path):
    """The disk takes a minute for a save."""
    run = train()
    earlier = (run / "last.pt").read_bytes()
    before = "import os, time\nos.fsync = lambda handle: (print('syncing', flush=True), time.sleep(60))"
    life = lives.start("train_classifier", "--resume", run / "last.pt", "--epochs", "2", "--workers", "2", before=before)
    life.wait_for("syncing")
    os.killpg(life.pid, signal.SIGINT)
    time.sleep(0.7)
    assert life.lives.ask(wait=life.pid) is None
    workers = life.workers()
    os.killpg(life.pid, signal.SIGINT)
    assert life.wait(5) == 130 and "Traceback" not in life.err and gone(workers, seconds=2)
    assert (run / "last.pt").read_bytes() == earlier
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert not list(run.glob("*.tmp"))


def test_other_second_signals_do_not_interrupt_the_save(lives, train, tmp_path):
    run = train()
    before = ("import os, time\nreal, naps = os.fsync, [1.5]\n"  # the first one takes long: all signals come within it
              "os.fsync = lambda handle: (print('syncing', flush=True), time.sleep(naps.pop() if naps else 0), real(handle))")
    life = lives.start("train_classifier", "--resume", run / "last.pt", "--epochs", "9", "--workers", "1", before=before)
    life.wait_for("syncing")
    for number, pause in ((signal.SIGHUP, 0.1), (signal.SIGINT, 0.7), (signal.SIGHUP, 0), (signal.SIGTERM, 0)):
        os.kill(life.pid, number)  # a Ctrl-C at the same moment has been passed on twice
        time.sleep(pause)
    for worker in life.workers():  # nor does it matter now that these end
        os.kill(worker, signal.SIGKILL)
    assert life.wait() == 129 and read(run / "last.pt")["epoch"] == 2, life.err


def test_a_signal_before_the_loop_stops_at_once(lives, pictures, tmp_path):
    before = "import data, time\ndata.find_images = lambda *a: (print('looking', flush=True), time.sleep(60))"
    life = lives.start("train_classifier", *command_line([], SMALL | {"data": pictures, "output": tmp_path / "run"}), before=before)
    life.wait_for("looking")
    os.kill(life.pid, signal.SIGTERM)
    assert life.wait(5) == 143 and life.err == "stopped by SIGTERM\n" and not (tmp_path / "run").exists()


def test_under_nohup_a_closing_terminal_is_not_heard(lives, pictures, tmp_path):
    before = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "epochs": 3, "workers": 1})
    life = lives.start("train_classifier", *words, before=before)
    life.wait_for("epoch   0")
    os.killpg(life.pid, signal.SIGHUP)
    assert life.wait() == 0 and len(history(tmp_path / "run")) == 3


BROKEN_PIPE = "import os\nr, w = os.pipe()\nos.dup2(w, 1), os.dup2(w, 2), os.close(r), os.close(w)"
CLOSED_TERMINAL = ("import os, threading\nmaster, terminal = os.openpty()\nos.dup2(terminal, 1), os.dup2(terminal, 2)\n"
                   "threading.Timer(0.6, os.close, [master]).start()")


@pytest.mark.parametrize("before", [BROKEN_PIPE, CLOSED_TERMINAL, "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)"])
def test_training_goes_on_when_nobody_reads_what_it_prints(lives, pictures, tmp_path, before):
    epochs = 20 if before == CLOSED_TERMINAL else 3  # it closes after a while
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "epochs": epochs})
    assert lives.start("train_classifier", *words, before=before).wait() == 0
    assert len(history(tmp_path / "run")) == epochs and (tmp_path / "run" / "test_predictions.csv").exists()


# ---- disk and memory


def test_a_file_size_limit_is_one_line_and_the_earlier_checkpoint_stays(lives, train):
    run = train()
    files = {p: p.read_bytes() for p in run.iterdir()}
    limit = (run / "last.pt").stat().st_size // 2
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    life = lives.start("train_classifier", "--resume", run / "last.pt", "--epochs", "2", before=before)
    assert life.wait() == 2
    assert life.err.startswith(f"error: could not write {run}/last.pt (") and life.err.count("\n") == 1
    assert f"go on with: python train_classifier.py --resume {run}/last.pt" in life.err
    now = {p: p.read_bytes() for p in run.iterdir()}
    assert now == files | {run / "args.json": now[run / "args.json"]}
    train_classifier.main(["--resume", str(run / "last.pt")])
    assert read(run / "last.pt")["epoch"] == 1


def small_disk(script, folder):
    """Run a shell script with a disk of 4 MB mounted on `folder`, in a name space of its own; None where that is not allowed."""
    mount = f"mount -t tmpfs -o size=4m none {folder}"
    try:
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
            return None
    except FileNotFoundError:
        return None
    return subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} && {script}"], capture_output=True, text=True, timeout=90)


def test_a_full_and_a_read_only_disk(pictures, tmp_path):
    """The first save fits, a second beside it does not."""
    (tmp_path / "disk").mkdir()
    run = tmp_path / "disk" / "run"
    words = command_line(["--freeze", "backbone"], SMALL | {"data": pictures, "output": run})
    program = f"""
import sys, os, subprocess
sys.path.insert(0, {str(ROOT)!r})
import train_classifier

def main(*argv):
    sys.stdout, sys.stderr = open(os.devnull, "w"), sys.__stdout__
    try:
        train_classifier.main(argv)
    except SystemExit as left:
        print("status", left.code, file=sys.__stdout__)
    sys.stdout.close()
    sys.stdout = sys.__stdout__
    return open({str(run / "last.pt")!r}, "rb").read()

first = main(*{words!r})
with open({str(tmp_path / "disk" / "others")!r}, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(100_000))
    except OSError:
        file.truncate(file.tell() - 300_000)
more = ["--resume", {str(run / "last.pt")!r}, "--epochs", "2"]
print("full", main(*more) == first, sorted(os.listdir({str(run)!r})))
subprocess.run(["mount", "-o", "remount,ro", {str(tmp_path / "disk")!r}], check=True)
print("read-only", main(*more) == first)
"""
    (tmp_path / "program.py").write_text(program)
    done = small_disk(f"{sys.executable} {tmp_path / 'program.py'}", tmp_path / "disk")
    if done is None:
        pytest.skip("no file system can be mounted here")
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith(f"error: could not write {run}/last.pt") and "make room" in lines[0], lines
    assert lines[1:3] == ["status 2", "full True ['args.json', 'best.pt', 'history.csv', 'last.pt', 'test_predictions.csv']"]
    assert lines[3] == f"error: cannot write into the run folder {run} (Read-only file system): give another --output" and lines[5] == "read-only True", lines


CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB. See documentation."


def test_out_of_memory_names_the_way_out(train, monkeypatch, error_of):
    run = train()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError(CUDA_WORDS)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        error = error_of(train_classifier.main, ["--resume", str(run / "last.pt"), "--epochs", "2"])
    assert error.startswith("error: CUDA out of memory: take a smaller --batch-size (in training with a larger --accumulate")
    assert error.endswith(f"or fewer --workers; go on with: python train_classifier.py --resume {run}/last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        assert error_of(train).endswith("; or --amp bf16, or in training with a frozen backbone --cache-features 1")


@pytest.mark.parametrize("words, said", [
    ("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com for more.", "CUDA error: out of memory"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", None),
    ("Caught OutOfMemoryError in replica 1 on device 1.\nOriginal Traceback (most recent call last):\n  File x\nout of memory",
     "Caught OutOfMemoryError in replica 1 on device 1"),
])
def test_a_gpu_without_memory_has_many_words(words, said):
    text, status = ending.last_words(RuntimeError(words))
    assert status == 2 and text.startswith(f"error: {said or words}: take a smaller --batch-size") and "\n" not in text


def test_real_lack_of_memory(lives, pictures, tmp_path):
    before = ("import resource\nused = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
              "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))")
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "image_size": 2048, "batch_size": 20})
    life = lives.start("train_classifier", *words, before=before)
    assert life.wait() == 2 and life.err.count("\n") == 1 and "take a smaller --batch-size" in life.err, life.err


def test_with_stderr_closed_from_the_start(lives, pictures, tmp_path):
    """No file may take its number, or messages would be written into that."""
    before = "import os, sys\nos.close(2)\nsys.stderr = None"
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "epochs": 2})
    assert lives.start("train_classifier", *words, before=before).wait() == 0
    assert len(history(tmp_path / "run")) == 2


def test_too_many_open_files(lives, pictures, tmp_path):
    before = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "workers": 8})
    life = lives.start("train_classifier", *words, before=before)
    assert life.wait() == 2 and "Too many open files: perhaps fewer --workers" in life.err.splitlines()[-1], life.err


def test_two_signals_at_once_before_the_loop(lives, pictures, tmp_path):
    before = ("import data, os, signal\n"
              "data.find_images = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGINT), 1 / 0)")
    life = lives.start("train_classifier", *command_line([], SMALL | {"data": pictures, "output": tmp_path / "x"}), before=before)
    assert life.wait() in (130, 143) and life.err.count("\n") == 1, life.err


def test_a_worker_that_is_killed(lives, pictures, tmp_path):
    before = "import data, os, signal\ndata.decode = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
    words = command_line([], SMALL | {"data": pictures, "output": tmp_path / "run", "workers": 2})
    life = lives.start("train_classifier", *words, before=before)
    assert life.wait() == 2 and "take fewer --workers" in life.err and life.err.count("\n") == 1, life.err


def test_a_bug_keeps_its_traceback(train, monkeypatch):
    monkeypatch.setattr(data, "to_input", lambda *a, **k: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        train()


# ---- what is not finite


def test_a_run_that_diverges_in_its_first_epoch(train, error_of, tmp_path):
    """The command starts again where nothing was saved, and goes on where --save-every has saved."""
    settings = {"epochs": 1, "output": tmp_path / "run"} | SGD | {"lr": 1e9}
    assert "try half the rate: the same command with --lr 5e+08" in error_of(train, "--log-every", 1, **settings)
    assert not list((tmp_path / "run").glob("*.pt"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 1)
        train(output=tmp_path / "saved", **SGD)
    error = error_of(train_classifier.main, ["--resume", str(tmp_path / "saved/last.pt"), "--lr", "1e9", "--save-every", "1"])
    assert f"python train_classifier.py --resume {tmp_path}/saved/last.pt --lr 5e+08" in error
    assert all(v.isfinite().all() for v in read(tmp_path / "saved/last.pt")["model"].values())


def test_a_loss_that_is_not_finite_is_not_saved_by_a_signal(train, error_of, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        assert "training loss of epoch 0 is nan" in error_of(train, output=tmp_path / "run", log_every=99, batch_size=4, **SGD | {"lr": 1e9})
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_optimizer_state_that_is_not_finite_is_never_saved(tmp_path):
    state = {"model": {"w": torch.ones(1)}, "optimizer": {"state": {3: {"step": torch.tensor(1.0), "exp_avg_sq": torch.tensor([1, torch.inf])}}}}
    with pytest.raises(checkpoint.CheckpointError, match="the optimizer's exp_avg_sq of parameter 3 is no longer finite"):
        checkpoint.save(state, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_collapsing_loss_scale_is_in_the_history_and_a_warning(train, monkeypatch, capsys):
    """A gradient that is infinite at every step."""
    real, unscale = torch.amp.GradScaler, torch.amp.GradScaler.unscale_
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**3, **k))

    def spoil(self, optimizer):
        next(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None).fill_(torch.inf)
        unscale(self, optimizer)

    monkeypatch.setattr(real, "unscale_", spoil)
    rows = history(train(amp="fp16", epochs=2))
    assert [row["skipped_steps"] for row in rows] == ["3", "3"]
    assert [row["loss_scale"] for row in rows] == ["1.0", "0.125"] and [row["grad_norm"] for row in rows] == ["0.0", "0.0"]
    words = "warning: fp16's loss scale has collapsed, steps are passed over: start again with --amp bf16 or off"
    assert capsys.readouterr().out.count(words) == 1


# ---- pictures that cannot be read


@pytest.fixture
def damaged(tmp_path):
    root = draw_folder(tmp_path / "damaged", train=10, val=4, test=3)
    for name in ("train/cat/cat.3.png", "val/dog/dog.2.png", "test/cat/cat.1.png"):
        (root / name).write_bytes(b"not a picture")
    return root


def test_skipping_what_cannot_be_read(train, damaged, capsys, error_of):
    run = train("--on-bad-image", "skip", data=damaged, epochs=2, workers=2)
    out = capsys.readouterr().out
    for name in ("train/cat/cat.3.png", "val/dog/dog.2.png", "test/cat/cat.1.png"):
        assert out.count(f"warning: left out, since it cannot be read: {damaged / name} (") == 1
    assert [row["unreadable"] for row in history(run)] == ["2", "2"]
    predictions = (run / "test_predictions.csv").read_text()
    assert predictions.count("\n") == 6 and "cat.1.png" not in predictions
    # stopped by the first of them, and told to go on without: the same run
    error = error_of(train, data=damaged, epochs=2, output=run.with_name("other"))
    assert "train/cat/cat.3.png" in error and "--on-bad-image skip" in error and "--resume" in error
    places = read(run.with_name("other") / "last.pt")
    assert places["epoch"] == 0 and 0 <= places["step"] < 3
    train_classifier.main(["--resume", str(run.with_name("other") / "last.pt"), "--on-bad-image", "skip"])
    assert_the_same_run(run, run.with_name("other"))


@pytest.mark.parametrize("split, options", [
    ("test", []), ("val", []), ("val", ["--freeze", "backbone", "--cache-features", "1"])])
def test_a_split_of_which_nothing_can_be_read(train, pictures, tmp_path, error_of, split, options):
    shutil.copytree(pictures, tmp_path / "data")
    for picture in (tmp_path / "data" / split).rglob("*.png"):
        picture.write_bytes(b"no picture")
    error = error_of(train, "--on-bad-image", "skip", *options, data=tmp_path / "data", output=tmp_path / "run")
    assert error.startswith("error: no picture of this split can be read") and "data.py --check" in error
    # Features are computed at the start of an epoch, so there was nothing yet; a validation finds the epoch's steps.
    assert (tmp_path / "run/last.pt").exists() == (not options)


def test_half_a_step_is_not_saved(train, error_of, tmp_path):
    """The second batch of the second step of two cannot be read: the state stays that after the first step."""
    root = draw_folder(tmp_path / "data", train=10, val=4, test=3)
    _, _, _, late, _ = data.SeededBatches(20, 4, seed=0, shuffle=True)
    Path(data.find_images(root).splits["train"][late[2][1]][0]).write_bytes(b"")
    options = ["--accumulate", "2", "--save-every", "1"]
    whole = train("--on-bad-image", "skip", *options, data=root, batch_size=4)
    error_of(train, *options, data=root, batch_size=4, output=whole.with_name("broken"))
    assert read(whole.with_name("broken") / "last.pt")["step"] == 1
    train_classifier.main(["--resume", str(whole.with_name("broken") / "last.pt"), "--on-bad-image", "skip"])
    assert_the_same_run(whole, whole.with_name("broken"))


def test_the_regressor_leaves_rows_out(regress, discs, tmp_path):
    root = shutil.copytree(discs, tmp_path / "discs")
    for name in ("train/3.png", "val/0.png", "test/1.png"):
        (root / name).write_bytes(b"")
    run = regress("--on-bad-image", "skip", data=root, epochs=1)
    assert history(run)[0]["unreadable"] == "2"
    with open(run / "test_predictions.csv") as file:
        found = {line.split(",")[0].rpartition("/")[2]: float(line.split(",")[1]) for line in list(file)[1:]}
    with open(root / "labels.csv") as file:
        truth = {line.split(",")[0].rpartition("/")[2]: float(line.split(",")[1]) for line in file if line.startswith("test/")}
    assert found == {name: radius for name, radius in truth.items() if name != "1.png"}  # each beside its own number


def test_a_short_batch_of_which_little_can_be_read_is_scored(train, tmp_path, capsys):
    """Validation of 4 + 2 and test of 4 + 2, one of the last two unreadable, and again readable for the test at the end."""
    root = draw_folder(tmp_path / "data", train=4, val=3)
    bad, real = root / "val/dog/dog.2.png", data.decode
    good = bad.read_bytes()
    bad.write_bytes(b"")

    def decode(path, *a):
        if Path(path) == bad and len(seen) == 2:  # in the last evaluation
            bad.write_bytes(good)
        seen.extend([1] if Path(path) == bad else [])
        return real(path, *a)

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "decode", decode)
        run = train("--on-bad-image", "skip", data=root, epochs=2, batch_size=4)
    assert [row["unreadable"] for row in history(run)] == ["1", "1"]
    assert (run / "val_predictions.csv").read_text().count("\n") == 7


def test_a_disk_that_has_gone_away_is_not_skipped(train, tmp_path, error_of):
    root = draw_folder(tmp_path / "data", train=6, val=2)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    assert "has the disk gone away" in error_of(train, "--on-bad-image", "skip", data=root)


# ---- --deterministic, and the last words by themselves


def test_deterministic_is_the_same_on_a_cpu(train, weights):
    one, other = train(weights=weights), train("--deterministic", weights=weights)
    assert not changed(read(one / "last.pt")["model"], read(other / "last.pt")["model"])
    assert torch.are_deterministic_algorithms_enabled()
    train(weights=weights)
    assert not torch.are_deterministic_algorithms_enabled()  # one run does not decide for the next


def test_what_cannot_be_computed_deterministically_is_said():
    words = ("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
             "'torch.use_deterministic_algorithms(True)'. You can turn off determinism")
    assert ending.last_words(RuntimeError(words)) == (
        "error: adaptive_avg_pool2d_backward_cuda has no deterministic form here: leave out --deterministic, or "
        "say --no-deterministic", 2)


def test_a_resumed_run_can_leave_out_what_does_not_work_here(train):
    run = train("--deterministic", "--no-test")
    train_classifier.main(["--resume", str(run / "last.pt"), "--epochs", "2", "--no-deterministic", "--no-compile",
                           "--no-tensorboard"])
    options = read(run / "last.pt")["options"]
    assert [options[name] for name in ("deterministic", "compile", "tensorboard", "no_test")] == [False] * 3 + [True]


def test_a_network_that_cannot_be_compiled(train, monkeypatch, error_of):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*args, **kwargs):
        raise TorchDynamoException("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda model: fail)
    error = error_of(train, "--compile")
    assert error == "error: torch.compile has failed (no C++ compiler was found): leave out --compile, or say --no-compile"


def test_predictions_into_a_closed_pipe(lives, train, pictures):
    run = train()
    words = ["--checkpoint", str(run / "best.pt"), str(pictures / "test")]
    assert lives.start("predict", *words, before=BROKEN_PIPE).wait() == 0
