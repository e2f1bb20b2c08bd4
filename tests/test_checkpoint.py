import argparse
import csv
import errno
import os

import pytest
import torch

import arguments
import checkpoint
from checkpoint import CheckpointError
from conftest import read
from test_model import Payload


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
