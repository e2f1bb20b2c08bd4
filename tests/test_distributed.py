"""Several processes train what one would: the same order, the same sums, one that writes; and none is left behind.

Most of these processes are forked by tests/lives.py and find each other as under torchrun; two tests start torchrun.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import data
import distributed
import freeze
import losses
import model as model_py
import train_classifier
from conftest import ROOT, SMALL, changed, command_line, draw_folder, read
from lives import running
from pages import TEXT
from test_interruptions import FULL, MIXED, assert_the_same_run
from test_train_classifier import history

TIMES = ("seconds", "images_per_second", "texts_per_second", "words_per_second")


@pytest.fixture
def together(lives, tmp_path, pictures, weights):
    """together(2, "classifier", options..., before={1: code}, name=value...) runs two processes; returns their Lives and
    the run folder. before: code that a process runs first."""
    folders = iter(range(100))

    def run(processes, kind, *options, before=None, output=None, statuses=None, **named):
        output = output or tmp_path / f"processes{processes}_{next(folders)}"
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps one
        settings = {"data": pictures, "weights": weights, "output": output, "lr": 0.01}
        words = command_line(options, SMALL | settings | named)
        started = []
        for rank in range(processes):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            code = f"import os, torch\ntorch.set_num_threads(1)\nos.environ |= {({k: str(v) for k, v in env.items()})}\n"
            started.append(lives.start(f"train_{kind}", *words, before=code + (before or {}).get(rank, "")))
        found = [life.wait() for life in started]
        assert found == (statuses or [0] * processes), "\n".join(life.out + life.err for life in started)
        return started, output

    return run


def assert_close(one, other, within=1e-5, without=()):
    """Two run folders with the same numbers, to within the rounding of sums in another order. without: columns."""
    a, b = read(one / "last.pt"), read(other / "last.pt")
    for key, value in a["model"].items():
        torch.testing.assert_close(b["model"][key], value, rtol=0, atol=within, msg=key)
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
    for row, row2 in zip(history(one), history(other), strict=True):
        for name in row.keys() - {*TIMES, *without}:
            assert float(row[name]) == pytest.approx(float(row2[name]), abs=10 * within), name


def list_of(run):
    """The pictures of the final evaluation."""
    return [line.split(",")[0] for line in (run / "test_predictions.csv").read_text().splitlines()[1:]]


# ---- shares


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_shares_make_up_the_batches_of_one_process(processes, batch_size):
    for length in range(1, 45):
        whole = data.SeededBatches(length, batch_size * processes, seed=3, shuffle=True, epoch=2)
        own = [data.SeededBatches(length, batch_size, 3, True, 2, rank, processes) for rank in range(processes)]
        joined = [sum(parts, []) for parts in zip(*own, strict=True)]
        assert joined == list(whole)
        assert [sum(sizes) for sizes in zip(*(o.shares() for o in own), strict=True)] == whole.sizes() == own[0].sizes()
        alone = {len(part) for o in own for part in o} & {1}
        assert not alone or batch_size == 1 or length == 1
        running = [data.SeededBatches(length, batch_size, 3, True, 2, r, processes, pad=True) for r in range(processes)]
        for o, along in zip(own, running, strict=True):
            assert o.shares() == along.shares() == [len(part) for part in o]
            for part, more, batch in zip(o, along, whole, strict=True):
                assert more == (part or batch[:min(2, batch_size)])


def test_no_share_makes_another_step_than_one_process():
    """So a run can go on with another number of processes in the middle of an epoch."""
    for length in range(2, 60):
        counts = {len(data.SeededBatches(length, 12 // processes, processes=processes)) for processes in (1, 2, 3, 4, 6)}
        assert len(counts) == 1


def test_weights_of_a_batch():
    weight, labels = torch.tensor([1.0, 3.0]), torch.tensor([0, 1, 1])
    assert losses.sum_of_weights(losses.CrossEntropy(weight), labels) == 7
    mixed = 0.7 * torch.eye(2)[labels] + 0.3 * torch.eye(2)[labels].roll(1, 0)
    assert losses.sum_of_weights(losses.Focal(2.0, weight), mixed).item() == pytest.approx(7)  # as without mixing
    for criterion in (losses.CrossEntropy(weight, "plain"), losses.CrossEntropy(), losses.SoftF1(), nn.CrossEntropyLoss()):
        assert losses.sum_of_weights(criterion, labels) is None


def test_what_a_process_goes_on_from():
    sums = {"images": 8.0, "loss": 4.0, "norm": 3.0}
    saved = {"rng": "of 0", "sums": sums, "processes": [("of 0", {"images": 5.0}), ("of 1", {"images": 3.0})]}
    assert checkpoint.own_state(saved, 1, 2) == ("of 1", {"images": 3.0})
    assert checkpoint.own_state(saved, 0, 1) == checkpoint.own_state(saved, 0, 3) == ("of 0", sums)
    assert checkpoint.own_state(saved, 2, 3) == (None, {"images": 0.0, "loss": 0.0, "norm": 3.0})


def test_batches_times_processes_times_accumulation_stays(error_of):
    saved = {"batch_size": 8, "accumulate": 1, "processes": 2}
    assert checkpoint.resume_options({"batch_size": 16}, saved, {"batch_size"}, 1)["batch_size"] == 16
    assert checkpoint.resume_options({"batch_size": 4}, saved, {"batch_size"}, 4)["batch_size"] == 4
    with pytest.raises(checkpoint.CheckpointError, match="is 8 but the run was started with 16: keep the product"):
        checkpoint.resume_options({}, saved, {"batch_size"}, 1)


# ---- the same as one process


def test_two_and_three_processes_train_what_one_does(together, pictures):
    """20 pictures in batches of 6: at the end 2 are left, too few for all, and in the validation one process has none.
    Weighted means, accumulation with a rest, a penalty, a clipped gradient."""
    options = ["--freeze", "backbone", "--accumulate", "2", "--class-weights", "dog=3", "--l1", "0.01", "--clip-grad", "0.5",
               "--optimizer", "sgd", "--log-every", "1"]
    _, one = together(1, "classifier", *options, batch_size=6, epochs=2)
    for processes in (2, 3):
        lives, run = together(processes, "classifier", *options, batch_size=6 // processes, epochs=2)
        assert_close(one, run)
        assert list_of(run) == list_of(one) == sorted(map(str, (pictures / "test").rglob("*.png")))  # each once
        assert all(row["unreadable"] == "0" for row in history(run))
        assert [life.out.count("\nepoch ") for life in lives] == [2] + [0] * (processes - 1)
        assert [life.err for life in lives] == [""] * processes
        assert f"12 pictures per step: batch size x {processes} x" in lives[0].out
        assert not {key for key in read(run / "best.pt")["model"] if "module" in key}
    assert read(one / "last.pt")["history"][0]["grad_norm"] > 0.5  # it was clipped


def test_thaws_and_regression(together, discs):
    """What thaws in the second epoch trains in all processes alike: a convolution whose BatchNorm stays frozen."""
    options = ["--target", "radius", "--freeze", "backbone", "--unfreeze", "1:conv5.0", "--accumulate", "2", "--sample-weight",
               "weight", "--optimizer", "sgd"]
    _, one = together(1, "regressor", *options, data=discs, batch_size=6, epochs=3)
    _, two = together(2, "regressor", *options, data=discs, batch_size=3, epochs=3)
    assert_close(one, two)
    before = read(two / "before_unfreeze_1.pt")
    assert changed(before["model"], read(two / "last.pt")["model"]) == {"conv5.0.weight", "fc.weight", "fc.bias"}


def test_running_statistics_are_those_of_the_first_when_all_validate(together, train, pictures):
    """The BatchNorms of each process have seen other pictures; the validation counts what is saved."""
    _, two = together(2, "classifier", batch_size=2)
    assert list_of(two) == sorted(map(str, (pictures / "test").rglob("*.png")))  # six, in batches of four and two
    again = train("--freeze", "backbone", weights=two / "last.pt", lr=0)
    assert float(history(again)[0]["val_loss"]) == pytest.approx(float(history(two)[0]["val_loss"]), rel=1e-5)


def test_cached_features_are_shared_out(together, pictures):
    options = ["--freeze", "backbone", "--augment", "strong"]
    _, plain = together(2, "classifier", *options, batch_size=3, epochs=2)
    lives, cached = together(2, "classifier", *options, "--cache-features", "2", batch_size=3, epochs=2)
    assert not changed(read(plain / "last.pt")["model"], read(cached / "last.pt")["model"])
    found = {path.name: read(path) for path in cached.glob("features_*.bin")}
    assert sorted(found) == ["features_train_0.bin", "features_train_1.bin", "features_val_0.bin"]
    assert sorted(found["features_train_0.bin"]["numbers"].tolist()) == list(range(20))
    assert sorted(found["features_val_0.bin"]["numbers"].tolist()) == list(range(8))


# ---- stopped, resumed, with another number of processes

STOP_AT = """
import ending, os, signal
real, calls = ending.leave_if_asked, iter(range(1, 10**6))
def leave_if_asked(stop):
    if next(calls) == {moment}:
        os.kill(os.getpid(), {number})
    real(stop)
ending.leave_if_asked = leave_if_asked
"""


MIXED_BY = """
import data, sys
mix = data.mix
data.mix = lambda x, y, mixer, *numbers: (print("mixed by", *numbers, file=sys.stderr), mix(x, y, mixer, *numbers))[1]
"""


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(together, discs, kind):
    """After the first step, after the last of an epoch, in the validation, after a thaw, with all that has a state of its own: dropout, fp16's scale,
    momenta, mixing, a thaw, and BatchNorms that train. Two processes: a + b is b + a."""
    options = MIXED if kind == "classifier" else [*FULL, "--target", "radius"]
    settings = {"epochs": 2, "batch_size": 2, "amp": "fp16", "workers": 0} | ({} if kind == "classifier" else {"data": discs})
    lives, whole = together(2, kind, *options, before={0: MIXED_BY, 1: MIXED_BY}, **settings)
    mixed_by = [re.findall(r"^mixed by (.*)$", life.err, re.M) for life in lives]
    assert len({*mixed_by[0], *mixed_by[1]}) == (20 if kind == "classifier" else 0)  # 5 batches, 2 epochs, 2 processes
    broken = whole.with_name("broken")
    places = []
    stops = [(1, signal.SIGTERM), (2, signal.SIGINT), (1, signal.SIGHUP), (3, signal.SIGTERM)]
    for moment, number in stops if kind == "classifier" else stops[:1]:
        status = 128 + number
        lives, _ = together(2, kind, *options, "--resume", output=broken, statuses=[status, status],
                            before={1: STOP_AT.format(moment=moment, number=int(number))}, **settings)
        said = "".join(life.err for life in lives)
        assert said.strip().startswith(f"stopped by {number.name}; go on with: torchrun --nproc_per_node=2 train_{kind}.py "
                                       f"--resume {broken}/last.pt")
        assert said.count("\n") == 1
        state = read(broken / "last.pt")
        places.append((state["epoch"], state["step"]))
        assert state["sums"]["images"] == sum(own["images"] for _, own in state["processes"])
    assert places == [(0, 1), (0, 3), (0, 3), (1, 4)][: len(places)]
    together(2, kind, *options, "--resume", output=broken, **settings)
    assert_the_same_run(whole, broken)
    states = [read(run / "last.pt")["processes"] for run in (whole, broken)]
    for (rng, _), (rng2, _) in zip(*states, strict=True):
        assert torch.equal(rng["cpu"], rng2["cpu"])
    assert not torch.equal(states[0][0][0]["cpu"], states[0][1][0]["cpu"])  # each draws its own dropout


def test_one_process_goes_on_with_what_two_began_and_the_other_way_round(together):
    options = ["--freeze", "backbone", "--resume"]
    _, whole = together(1, "classifier", *options, batch_size=6, epochs=2)
    stop = {0: STOP_AT.format(moment=2, number=int(signal.SIGTERM))}
    for before, after in ((2, 1), (1, 2)):
        _, run = together(before, "classifier", *options, batch_size=6 // before, epochs=2, before=stop, statuses=[143] * before)
        assert read(run / "last.pt")["step"] == 2
        _, run = together(after, "classifier", *options, batch_size=6 // after, epochs=2, output=run)
        assert_close(whole, run)


def test_a_picture_that_one_process_cannot_read(together, tmp_path):
    folder = draw_folder(tmp_path / "pictures", train=10, val=4)
    order = data.SeededBatches(20, 3, seed=0, shuffle=True, rank=1, processes=2)
    victim = Path(data.find_images(folder).splits["train"][list(order)[1][0][1]][0])  # in the second step
    good = victim.read_bytes()
    victim.write_bytes(b"no picture")
    options = ["--freeze", "backbone", "--no-test"]
    lives, run = together(2, "classifier", *options, data=folder, batch_size=3, statuses=[2, 2])
    assert lives[0].err == "" and lives[1].err.count("\n") == 1
    assert lives[1].err.startswith(f"error: cannot read {victim}")
    assert read(run / "last.pt")["step"] == 1  # saved after the last step that all have made
    victim.write_bytes(good)
    together(2, "classifier", *options, "--resume", data=folder, batch_size=3, output=run)
    _, whole = together(2, "classifier", *options, data=folder, batch_size=3)
    assert not changed(read(whole / "last.pt")["model"], read(run / "last.pt")["model"])
    victim.write_bytes(b"no picture")
    lives, run = together(2, "classifier", *options, "--on-bad-image", "skip", data=folder, batch_size=3)
    assert f"left out, since it cannot be read: {victim}" in lives[1].err and history(run)[0]["unreadable"] == "1"
    # in the validation, where each process reads at its own pace
    victim.write_bytes(good)
    order = data.SeededBatches(8, 3, rank=1, processes=2)
    victim = Path(data.find_images(folder).splits["val"][list(order)[0][0][1]][0])
    victim.write_bytes(b"no picture")
    lives, run = together(2, "classifier", *options, data=folder, batch_size=3, statuses=[2, 2])
    assert lives[0].err == "" and lives[1].err.count("\n") == 1 and f"cannot read {victim}" in lives[1].err
    state = read(run / "last.pt")
    assert (state["epoch"], state["step"], state["sums"]["images"]) == (0, 4, 20)


# ---- torchrun


def torchrun(script, *words, nproc=2, options=(), **how):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", *options, str(script)]
    return subprocess.Popen([*command, *map(str, words)], env=env, text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_a_killed_process_comes_back_and_the_run_goes_on(together, pictures, weights, tmp_path):
    """SIGKILL to the second of two in the middle of the second epoch; nobody types anything, not even --resume."""
    options = ["--save-every", "1", "--head", "mlp", "--hidden", "8"]
    script = tmp_path / "killed.py"
    moment = "10**9 if os.environ['TORCHELASTIC_RESTART_COUNT'] != '0' or os.environ['RANK'] == '0' else 6"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"{STOP_AT.format(moment=f'({moment})', number=9)}\nimport train_classifier\ntrain_classifier.main()\n")
    words = command_line(options, SMALL | {"data": pictures, "weights": weights, "output": tmp_path / "run", "lr": 0.01,
                                           "batch_size": 3, "epochs": 2})
    process = torchrun(script, *words, options=["--max-restarts=1"])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert re.search(r"^resumed from .*last.pt at epoch 1, step \d", out, re.M)
    ours = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(ours) == 1 and "another process of this run has ended" in ours[0] and "Traceback" not in err
    _, whole = together(2, "classifier", *options, batch_size=3, epochs=2)
    assert_the_same_run(whole, tmp_path / "run")


def test_an_error_is_one_line_and_the_end_of_all(together, tmp_path):
    """In all processes; in the first, while the second waits for it; in the second, while the first waits within a step."""
    for options, before, words in (
        (["--freeze", "layer9"], {}, "error: 'layer9' matches no layer"),
        (["--epochs", "nine"], {}, "error: argument --epochs: invalid int value"),
        ([], {1: "import freeze\ndef fail(*_): raise freeze.FreezeError('no')\nfreeze.decaying_weights = fail"}, "error: no"),
    ):
        lives, run = together(2, "classifier", "--l1", "0.1", *options, before=before, statuses=[2, 2])
        said = "".join(life.err for life in lives)
        assert said.startswith(words) and said.count("\n") == 1, said
        assert not list(run.glob("*.pt"))


def test_a_signal_to_torchrun_saves_once_and_ends_all(pictures, weights, tmp_path):
    words = command_line(["--resume"], SMALL | {"data": pictures, "weights": weights, "output": tmp_path / "run",
                                                "batch_size": 3, "epochs": 2000})
    process = torchrun("train_classifier.py", *words)
    end = time.monotonic() + 100
    while not (tmp_path / "run" / "history.csv").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    children = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat") if _parent(p) == process.pid]
    assert len(children) == 2
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 20  # after 30 s torchrun would have killed them
    assert not any(map(running, children))
    lines = [line for line in err.splitlines() if line.startswith("stopped by")]
    assert len(lines) == 1
    assert lines[0].endswith(f"go on with: torchrun --nproc_per_node=2 train_classifier.py --resume {tmp_path}/run/last.pt")
    assert "error:" not in err.partition("Traceback")[0]  # torchrun's own traceback follows
    state = read(tmp_path / "run" / "last.pt")
    assert len(state["processes"]) == 2 and state["step"] > 0


def _parent(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.parametrize("gpus, nccl, backend", [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, False, "gloo")])
def test_nccl_between_gpus_where_there_is_one(monkeypatch, gpus, nccl, backend):
    """Windows has GPUs and no NCCL."""
    asked = []
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(None, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "_clean", lambda *store: None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with distributed.joined():
        pass
    assert asked == [backend]


# ---- what is refused


def test_options_that_make_no_sense(train, error_of, monkeypatch, pictures):
    assert "--sync-bn only has a meaning with several processes" in error_of(train, "--sync-bn")
    monkeypatch.setattr(distributed, "ranks", lambda: (0, 2))
    assert "several processes need --output" in error_of(train_classifier.main, ["--data", str(pictures)])
    assert "--find-lr only has a meaning with" in error_of(train, "--find-lr")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "from_main", lambda function, *args: function(*args))
    if not torch.cuda.is_available():
        assert "--sync-bn needs GPUs" in error_of(train, "--sync-bn")
        assert "there are 0 GPUs here: lower torchrun's --nproc_per_node" in error_of(train, device="cuda")
        assert model_py.pick_device() == torch.device("cpu")
    assert "--device cuda:0: several processes take a GPU each" in error_of(train, device="cuda:0")


# ---- BatchNorms over all processes, as far as it goes without a GPU


def test_synchronized_batchnorms_keep_names_parameters_and_freezing():
    model = model_py.build("resnet18", num_classes=2)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert freeze.select(model, "bn", "fc") == [n for n in parameters if ".bn" in f".{n}" or "downsample.1" in n]
    freeze.freeze(model, "to:layer3", "fc")
    freeze.train_mode(model)
    assert model.layer4[0].bn1.training and not model.layer3[0].bn1.training


# ---- DataParallel, as far as it goes without a GPU


def test_data_parallel_leaves_no_trace_in_the_checkpoint(train, weights, monkeypatch):
    """On a CPU the wrapper hands on to the network within; names, freezing, thawing and saving are what they would be."""
    options = ["--freeze", "backbone", "--unfreeze", "1:stage4"]
    plain = train(*options, weights=weights, epochs=2)
    source = (ROOT / "train_classifier.py").read_text()
    assert source.count("    if gpus > 1:\n        whole = nn.DataParallel(model)\n") == 1
    spec = importlib.util.spec_from_loader("wrapped", None)
    wrapped = importlib.util.module_from_spec(spec)
    exec(compile(source.replace("    if gpus > 1:\n", "    if True:\n"), "wrapped", "exec"), vars(wrapped))
    with monkeypatch.context() as patch:
        patch.setattr(train_classifier, "main", wrapped.main)
        run = train(*options, weights=weights, epochs=2)
    assert not changed(read(plain / "last.pt")["model"], read(run / "last.pt")["model"])
    for folder, main in ((plain, wrapped.main), (run, train_classifier.main)):  # each goes on as the other
        main(["--resume", str(folder / "last.pt"), "--epochs", "3"])
    assert not changed(read(plain / "last.pt")["model"], read(run / "last.pt")["model"])


def test_data_parallel_knows_no_bf16():
    model, device = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), torch.device("cpu")
    with pytest.raises(model_py.ModelError, match="--amp bf16 does not reach DataParallel's threads"):
        model_py.pick_precision("bf16", model, device, gpus=2)
    assert model_py.pick_precision("auto", model, device, gpus=2)[0] in ("fp16", "off")
    assert model_py.pick_precision("bf16", model, device, gpus=1)[2] == torch.bfloat16


# ---- the Slurm script of docs/several-gpus.md


@pytest.mark.parametrize("stopped", [True, False])
def test_the_slurm_script_queues_itself_again_when_its_time_is_up(tmp_path, stopped):
    """With stand-ins for srun, which ends at SIGTERM or by itself, and scontrol, which writes down what it is told."""
    (tmp_path / "job.sh").write_text(re.search(r"^```bash\n(#!/bin/bash\n#SBATCH .*?)^```$", TEXT, re.S | re.M)[1])
    stands = {"srun": 'trap "echo saved >> log; exit 143" TERM; echo "$@" > command; for i in $(seq LAST); do sleep 0.02; done; echo done >> log',
              "scontrol": '[ $1 = show ] && printf "one\\ntwo\\n" || echo "$@" >> log'}
    for name, code in stands.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + code.replace("LAST", "500" if stopped else "1") + "\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2",
                        "SLURM_JOB_NODELIST": "x"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env)
    end = time.monotonic() + 20
    while not (tmp_path / "command").exists() or not (tmp_path / "command").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    if stopped:
        job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 does
    job.wait(20)
    assert (tmp_path / "log").read_text().split("\n")[:-1] == (["saved", "requeue 7"] if stopped else ["done"])
    words = (tmp_path / "command").read_text().split()
    assert "--rdzv_endpoint=one:29500" in words and "--nnodes=2" in words and "--resume" in words
    train_classifier.build_parser().parse_args(words[words.index("train_classifier.py") + 1 :])


def test_two_processes_train_on_texts_what_one_does(together, classify_text, reviews, tiny_bert):
    """Of batches of like length each gets its share; the encoder's features are shared out."""
    options = {"freeze": "backbone", "dropout": 0, "lr": 0.01, "epochs": 2}
    alone = classify_text(batch_size=8, **options)
    _, both = together(2, "text_classifier", "--cache-features", 1, data=reviews, model=tiny_bert, weights=None,
                       image_size=None, batch_size=4, **options)
    assert_close(alone, both)
    texts = [sorted(line.split(",")[0] for line in (run / "test_predictions.csv").read_text().splitlines())
             for run in (alone, both)]
    assert texts[0] == texts[1] and len(texts[0]) == 9


def test_two_processes_train_on_words_what_one_does(together, tag_words, tagged, tiny_bert):
    """Windows with unlike numbers of words; each word counts the same, and the features of words are shared out."""
    options = {"freeze": "backbone", "dropout": 0, "lr": 0.01, "epochs": 2, "max_length": 12,
               "class_weights": "balanced"}
    alone = tag_words(batch_size=8, **options)
    _, both = together(2, "token_classifier", "--cache-features", 1, data=tagged, model=tiny_bert, weights=None,
                       image_size=None, batch_size=4, **options)
    assert_close(alone, both)
    found = [(run / "test_predictions.csv").read_text().splitlines() for run in (alone, both)]
    assert [line.rpartition(",")[0] for line in found[0]] == [line.rpartition(",")[0] for line in found[1]]
