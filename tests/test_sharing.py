"""Copies of a script, started by hand or by torchrun, share a sweep, even if a copy is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import SOAK
from test_sweep import options
from tiny import SIX_RUNS, checkpoint_of, metrics_of, sweep_outcome

import best_practices
from mltools.results import RunFolder
from mltools.sweep import run_sweep

ROOT = Path(best_practices.__file__).parent
KILLS = max(2, 3 * SOAK)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
LONG_RUN = (
    "--dataset Digits --device cpu --batch-size 300 --epochs 500 --seeds 0 "
    "--experiments fc-batchnorm"
).split()
FOLDER = Path("best_practices/fc-batchnorm/seed-0")


@pytest.fixture
def script(tmp_path):
    """Returns a function that starts a copy of best_practices.py, with its output in a file."""
    started = []

    def script(results, *command, launcher=()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        path = tmp_path / f"output-{len(started)}"
        command = [*launcher, "best_practices.py", *command, "--results-dir", results]
        with open(path, "w") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        process.output = path
        started.append(process)
        return process

    yield script
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def two_cores():
    """Restricts this process, and the copies it starts, to two cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_sweep_with_a_repeatedly_killed_copy_gives_the_same_results(script, tmp_path, six_runs):
    """One of two copies is repeatedly killed at random instants and restarted."""
    expected, duration = six_runs
    dice, kills, sweeps = random.Random(8), 0, 0
    while kills < KILLS:
        results = tmp_path / f"sweep-{sweeps}"
        copies = [script(results, *SIX_RUNS) for _ in range(2)]
        while kills < KILLS and any(process.poll() is None for process in copies):
            time.sleep(dice.uniform(0, duration))
            states = {path: path.stat().st_mtime_ns for path in results.glob("*/*/*/state.pt")}
            if copies[0].poll() is None:
                copies[0].kill()
                kills += 1
                copies[0] = script(results, *SIX_RUNS)
            finished = {path for path in states if not (path.parent / "checkpoint.pt").exists()}
            time.sleep(0.1)
            assert all(path.stat().st_mtime_ns == states[path] for path in finished)
        for process in copies:
            assert process.wait() == 0, process.output.read_text()
            folder = results / "best_practices"
            shown = f"{(folder / 'table.md').read_text()}\nreport: {folder / 'report.html'}\n"
            assert process.output.read_text().endswith(shown)
        assert sweep_outcome(results) == expected
        sweeps += 1
    print(f"{kills} kills in {sweeps} sweeps")


def test_torchrun_copies_share_a_sweep_and_only_one_prints(script, tmp_path, six_runs, two_cores):
    torchrun = script(tmp_path, *SIX_RUNS, launcher=TORCHRUN)
    assert torchrun.wait() == 0, torchrun.output.read_text()
    assert sweep_outcome(tmp_path) == six_runs[0]
    output = torchrun.output.read_text()
    assert output.count("| fc-batchnorm ") == 1 and output.count(": epoch ") == 12


def test_a_copy_waits_for_a_run_of_another_copy_and_shows_its_epochs(script, tmp_path):
    first = script(tmp_path, *LONG_RUN, "--epochs", "20")
    wait_for((tmp_path / FOLDER).exists)
    second = script(tmp_path, *LONG_RUN, "--epochs", "20")
    assert first.wait() == second.wait() == 0, second.output.read_text()
    assert "epochs of Digits" not in second.output.read_text()
    assert ": epoch 20/20: " in second.output.read_text()


def test_ctrl_c_stops_torchrun_copies_with_checkpoints(script, tmp_path):
    torchrun = script(tmp_path, *LONG_RUN, "--seeds", "0", "1", launcher=TORCHRUN)
    paths = [(tmp_path / FOLDER).with_name(f"seed-{seed}") for seed in (0, 1)]
    # Either process may start seconds after the other.
    metrics = [path / "metrics.jsonl" for path in paths]
    wait_for(lambda: all(path.exists() and path.read_text() for path in metrics))
    torchrun.send_signal(signal.SIGINT)
    assert torchrun.wait() != 0
    assert "interrupted: the same command resumes" in torchrun.output.read_text()
    for path in paths:
        assert len(checkpoint_of(path)["epochs"]) >= 1


def test_copies_with_force_rename_a_folder_once_and_not_while_it_is_locked(
    script, start, tmp_path, one_thread
):
    command = [*LONG_RUN, "--seeds", "0", "1"]
    start(best_practices.main, *command, "--epochs", 1, "--results-dir", tmp_path, "--quiet")
    command += ["--epochs", "2", "--force"]
    with RunFolder(tmp_path / FOLDER).lock():
        copies = [script(tmp_path, *command) for _ in range(2)]
        wait_for((tmp_path / FOLDER).with_name("aside-1-seed-1").exists)
        assert len(metrics_of(tmp_path / FOLDER)) == 1
    for process in copies:
        assert process.wait() == 0, process.output.read_text()
    names = sorted(path.name for path in (tmp_path / FOLDER.parent).glob("[!.]*"))
    assert names == ["aside-1-seed-0", "aside-1-seed-1", "seed-0", "seed-1"]
    assert len(metrics_of(tmp_path / FOLDER)) == 2


def test_each_torchrun_copy_gets_its_own_gpu(start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, _, err = start(best_practices.main, "--device", "cuda", "--results-dir", tmp_path)
    assert code == 2 and "--device cuda:1 does not exist: PyTorch sees 1 CUDA devices" in err


@pytest.mark.parametrize("local, threads", [(1, 2), (2, 1), (5, 1)])
def test_torchrun_copies_share_the_cores(monkeypatch, one_thread, two_cores, local, threads):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    run_sweep(None, [], options(), None)
    assert torch.get_num_threads() == threads


def test_variables_of_other_launchers_change_nothing(start, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    code, out, _ = start(best_practices.main, "--list")
    assert code == 0 and "fc-tanh" in out
