"""Sweeps that torchrun spreads over processes: which trains what, kills at any instant, Ctrl-C."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faults import SOAK
from torch.distributed import DistNetworkError, HashStore

import best_practices
from mltools import errors, processes, sweep
from mltools.progress import progress_of_all
from mltools.results import RunFolder

ROOT = Path(best_practices.__file__).parent
KILLS = max(1, 3 * SOAK)
at_length = pytest.mark.skipif(not SOAK, reason="takes long: make soak")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
DIGITS = "--dataset Digits --device cpu --batch-size 300".split()
EIGHT_RUNS = [
    *DIGITS,
    *"--epochs 2 --seeds 0 1 2 3 --experiments fc-dropout-0.1-0.5 fc-batchnorm".split(),
]


@pytest.fixture
def process(monkeypatch, one_thread):
    """Makes this process one of two that torchrun has started, of the given rank."""
    store = HashStore()
    monkeypatch.setattr(processes, "_connected", lambda: store)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def process(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    process(0)
    return process


def test_without_torchrun_there_is_no_store(monkeypatch):
    monkeypatch.setattr(processes, "_store", None)  # fails if it is called
    monkeypatch.setenv("RANK", "3")  # as other launchers set it
    assert not processes.launched() and processes.rank() == 0
    assert processes.take("a run") and processes.own_device("cuda") == "cuda"
    with processes.rank_zero_first():
        pass
    processes.wait(lambda: False, threading.Event())


def test_without_torchrun_to_talk_to_it_ends_in_one_line(process, start, monkeypatch):
    def gone():
        raise DistNetworkError("Broken pipe")

    monkeypatch.setattr(processes, "_connected", gone)
    code, _, err = start(lambda: processes.send("a message"))
    assert code == 1 and err.startswith("error: torchrun is gone;") and err.count("\n") == 1


def test_a_run_is_taken_once_and_kept_by_the_successor(process):
    process(1)
    assert processes.take("a") and processes.take("a")
    process(0)
    assert not processes.take("a") and processes.take("b")
    process(1)
    assert not processes.take("b")


def test_each_process_has_a_gpu_and_its_share_of_the_cores(process, monkeypatch):
    process(1)
    devices = {name: processes.own_device(name) for name in ("cpu", "cuda", "cuda:0")}
    assert devices == {"cpu": "cpu", "cuda": "cuda:1", "cuda:0": "cuda:0"}
    for cores, threads in ((8, 4), (3, 1), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: range(cores))
        assert processes.own_threads() == threads


def test_a_process_without_a_gpu_is_one_line(process, start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(errors, "OTHERS_WAIT", 0)
    process(1)
    code, _, err = start(best_practices.main, "--device", "cuda", "--results-dir", tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "cuda:1 is not there: PyTorch sees 1 CUDA devices; have torchrun start one" in err


def test_the_longest_runs_come_first_and_rank_zero_shows_all(process, start, tmp_path, monkeypatch):
    """Rank 1 finds the long runs taken, trains the others and leaves the tables to rank 0."""
    order = []

    def no_training(experiment, data, folder, settings, device, report, epoch_ended, stop):
        order.append((experiment.name, settings["seed"]))
        report(f"from rank {processes.rank()}")

    monkeypatch.setattr(sweep, "train", no_training)
    monkeypatch.setattr(processes, "wait", lambda ended, stop: None)
    rows = "--seeds 0 1 --experiments fc-tanh fc-bp cnn-tanh".split()
    command = [*DIGITS, "--epochs", "1", *rows, "--results-dir", tmp_path]
    with processes.rank_zero_first():
        for seed in (0, 1):
            assert processes.take(f"cnn-tanh seed {seed}")
    process(1)
    assert start(best_practices.main, *command) == (0, "", "")
    assert order == [("fc-tanh", 0), ("fc-bp", 0), ("fc-tanh", 1), ("fc-bp", 1)]
    assert not list(tmp_path.glob("best_practices/table.*"))

    order.clear()
    process(0)
    code, out, err = start(best_practices.main, *command)
    assert (code, err) == (0, "") and order == [("cnn-tanh", 0), ("cnn-tanh", 1)]
    assert out.count("from rank 1\n") == 4 and out.count("from rank 0\n") == 2
    assert list(tmp_path.glob("best_practices/table.*"))


@pytest.mark.parametrize("option", ["--list", "--tables-only"])
def test_what_is_done_once_rank_zero_does(process, start, tmp_path, option):
    process(1)
    assert start(best_practices.main, option, "--results-dir", tmp_path / "r") == (0, "", "")
    assert not (tmp_path / "r").exists()


def test_what_others_send_is_shown_in_order(process, capsys):
    epoch = {"epoch": 1, "train_loss": None, "test_loss": 1.0, "train_accuracy": 2.0}
    epoch |= {"test_accuracy": 3.0, "alignment": {}, "seconds": 0.1}
    with progress_of_all(2, 2, False) as progress:
        process(1)
        with progress_of_all(2, 2, False) as other:
            other.line("a line")
            other.epoch_ended("a run", 1, epoch)
            other.run_ended()
        progress.line("the last")
        process(0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a line" and lines[1].startswith("a run: epoch 1/1: train loss nan")
    assert lines[2:] == ["the last"]


@pytest.fixture
def script(tmp_path):
    """Starts best_practices.py in processes of one thread each; what it says goes to a file."""
    cores, started = os.sched_getaffinity(0), []
    os.sched_setaffinity(0, sorted(cores)[:2])  # the processes share the threads of all cores

    def script(launcher, *arguments):
        command = [sys.executable, *launcher, "best_practices.py", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / f"said-{len(started)}", "w") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
        process.said = Path(said.name)
        started.append(process)
        return process

    yield script
    os.sched_setaffinity(0, cores)
    for process in started:
        process.terminate()
        process.wait()


def workers(torchrun, but=frozenset()):
    """The two processes of torchrun, once none of them is a given one; none if it ends."""
    while torchrun.poll() is None:
        there = children(torchrun)
        if len(there) == 2 and not there & but:
            return there
        time.sleep(0.02)
    return set()


def children(process):
    try:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except FileNotFoundError:  # it has ended
        text = ""
    return set(map(int, text.split()))


def finished(results):
    """The runs that have come to their end, and when they did."""
    states = results.glob("best_practices/*/*/state.pt")
    return {path: path.stat().st_mtime_ns for path in states if RunFolder(path.parent).complete()}


def outcome(results):
    """All that a sweep leaves but times, in comparable form."""
    runs = {}
    for path in sorted(results.glob("best_practices/*/*/")):
        folder = RunFolder(path)
        metrics = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in folder.metrics()]
        angles = {layer: cosines.tobytes() for layer, cosines in folder.angles().items()}
        state = torch.load(path / "state.pt", weights_only=True)
        weights = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
        runs[path.relative_to(results)] = metrics, angles, weights, sorted(os.listdir(path))
    return runs, (results / "best_practices" / "table.csv").read_text()


def test_killed_at_any_instant_a_sweep_ends_as_in_one_process(script, start, one_thread, tmp_path):
    began = time.monotonic()
    assert start(best_practices.main, *EIGHT_RUNS, "--results-dir", tmp_path / "alone")[0] == 0
    duration = time.monotonic() - began + 2  # which a process takes to start
    expected = outcome(tmp_path / "alone")
    assert len(expected[0]) == 8

    dice, kills, sweeps = random.Random(8), 0, 0
    while kills < KILLS:
        results = tmp_path / f"sweep-{sweeps}"
        restarts = f"--max-restarts={KILLS}"
        torchrun = script([*TORCHRUN, restarts], *EIGHT_RUNS, "--results-dir", results)
        there = workers(torchrun)
        while there and kills < KILLS:
            time.sleep(dice.uniform(0, duration))
            before = finished(results)
            alive = sorted(there & children(torchrun))
            if alive:
                os.kill(dice.choice(alive), signal.SIGKILL)
            there = workers(torchrun, but=there)
            kills += bool(there)
            assert before.items() <= finished(results).items(), "a finished run was done again"
        assert torchrun.wait() == 0, torchrun.said.read_text()
        assert outcome(results) == expected
        sweeps += 1
    print(f"{kills} kills in {sweeps} sweeps")


@at_length
def test_ctrl_c_ends_all_runs_with_a_checkpoint(script, tmp_path):
    command = [*DIGITS, *"--epochs 500 --seeds 0 1 --experiments fc-batchnorm".split()]
    torchrun = script(TORCHRUN, *command, "--results-dir", tmp_path)
    # Either process may start seconds after the other.
    while any(torchrun.said.read_text().count(f"seed {s}: epoch") < 2 for s in (0, 1)):
        assert torchrun.poll() is None
        time.sleep(0.1)
    torchrun.send_signal(signal.SIGINT)
    assert torchrun.wait() != 0
    said = torchrun.said.read_text()
    assert said.count("interrupted: the same command goes on where this one stopped\n") == 1
    for seed in (0, 1):
        path = tmp_path / "best_practices" / "fc-batchnorm" / f"seed-{seed}" / "checkpoint.pt"
        assert f"fc-batchnorm seed {seed}: epoch" in said
        assert torch.load(path, weights_only=True)["epoch"] >= 1


@at_length
def test_what_is_wrong_is_said_once(script, tmp_path):
    command = [*DIGITS, "--experiments", "fc-tanhh", "--results-dir", tmp_path]
    torchrun = script(TORCHRUN, *command)
    assert torchrun.wait() != 0
    assert torchrun.said.read_text().count("no experiment is called 'fc-tanhh'") == 1
