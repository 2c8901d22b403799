"""Sweeps: runs side by side, stopped, locked, set aside, and one that fails."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import best_practices
from mltools import runs, sweep
from mltools.data import load
from mltools.errors import UserError, exit_code
from mltools.results import RunFolder
from mltools.sweep import Options
from mltools.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

ROOT = Path(best_practices.__file__).parent
TWO_EPOCHS = "--dataset Digits --device cpu --batch-size 300 --epochs 2".split()
ROW = "fc-dropout-0.1-0.5"
HALVES = ("train", "test")


def outcome(folder):
    """All that a run leaves but times, in comparable form."""
    metrics = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in folder.metrics()]
    angles = {layer: cosines.tolist() for layer, cosines in folder.angles().items()}
    weights = torch.load(folder.path / "state.pt", weights_only=True)
    return metrics, angles, {name: tensor.tolist() for name, tensor in weights.items()}


def folder(results, row=ROW, seed=0):
    return RunFolder(results / "best_practices" / row / f"seed-{seed}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three runs, one after another, never disturbed."""
    results = tmp_path_factory.mktemp("whole")
    command = [*TWO_EPOCHS, "--seeds", "0", "1", "2", "--experiments", ROW, "fc-batchnorm"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that it is compared with
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *command, "--results-dir", str(results)])
        assert exit_code(best_practices.main) == 0
    torch.set_num_threads(threads)
    return results


def test_runs_side_by_side_give_what_each_gives_alone(start, tmp_path, whole):
    command = [*TWO_EPOCHS, "--seeds", "0", "1", "2", "--experiments", ROW, "fc-batchnorm"]
    code, out, err = start(
        best_practices.main, *command, "--results-dir", tmp_path, "--parallel-runs", "4"
    )
    assert (code, err) == (0, "")
    for row in (ROW, "fc-batchnorm"):
        for seed in range(3):
            assert outcome(folder(tmp_path, row, seed)) == outcome(folder(whole, row, seed))
    table = "best_practices/table.csv"
    assert (tmp_path / table).read_text() == (whole / table).read_text()


def test_cpu_threads_are_shared_and_given_back(start, tmp_path, monkeypatch):
    torch.set_num_threads(3)
    seen = []
    monkeypatch.setattr(
        "mltools.sweep.train", lambda *arguments: seen.append(torch.get_num_threads())
    )
    for at_once, threads in (("2", 1), ("9", 1), ("auto", 3)):
        start(best_practices.main, *TWO_EPOCHS, "--experiments", ROW, "--seeds", "0",
              "--results-dir", tmp_path, "--parallel-runs", at_once)  # fmt: skip
        assert seen.pop() == threads and torch.get_num_threads() == 3


@pytest.mark.parametrize("device, at_once", [("cpu", 1), ("cuda", 8), ("cuda:1", 8)])
def test_how_many_runs_at_once(device, at_once):
    options = Options("Digits", Path("data"), Path("results"), device=device)
    assert options.at_once() == at_once
    assert Options("Digits", Path("d"), Path("r"), device=device, parallel_runs=3).at_once() == 3


@pytest.mark.parametrize("bad", ["0", "-1", "many", "1.5"])
def test_a_bad_number_of_runs_is_one_line(start, bad):
    code, _, err = start(best_practices.main, "--parallel-runs", bad)
    assert code == 2 and err.count("\n") == 1 and "a number from 1 up, or auto" in err


def test_each_run_on_cuda_has_a_stream(start, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = start(
        best_practices.main, "--device", "cuda", "--parallel-runs", 33, "--results-dir", tmp_path
    )
    assert code == 2 and err.count("\n") == 1 and "at most 32 on CUDA" in err


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_precision_is_that_of_the_run(start, tmp_path, precision):
    command = [*TWO_EPOCHS, "--experiments", ROW, "--seeds", "0", "--results-dir", tmp_path]
    assert start(best_practices.main, *command, "--precision", precision)[0] == 0
    assert folder(tmp_path).config()["settings"]["precision"] == precision


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_what_pytorch_is_told_of_arithmetic(monkeypatch, precision, deterministic):
    said = "tf32" if precision == "tf32" else "ieee"
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    options = Options("Digits", Path("d"), Path("r"), precision=precision)
    try:
        sweep._set_arithmetic(replace(options, deterministic=deterministic))
        assert (matmul.fp32_precision, conv.fp32_precision) == (said, said)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
        torch.use_deterministic_algorithms(False)


def test_other_data_under_the_same_name_is_refused(start, tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"x_{half}": random.integers(0, 256, (40, 28, 28), np.uint8) for half in HALVES}
    arrays |= {f"y_{half}": random.integers(0, 10, 40, np.uint8) for half in HALVES}
    command = ["--dataset", "MNIST", "--data-dir", tmp_path, "--device", "cpu", "--epochs", "1",
               "--batch-size", "20", "--experiments", ROW, "--seeds", "0"]  # fmt: skip
    command += ["--results-dir", tmp_path / "results"]
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert start(best_practices.main, *command)[0] == 0
    said = folder(tmp_path / "results").config()["settings"]["data_crc32"]
    whole = b"".join(arrays[f"{kind}_{half}"].tobytes() for half in HALVES for kind in "xy")
    assert said == f"{zlib.crc32(whole):08x}"
    arrays["x_test"][0, 0, 0] ^= 1
    np.savez(tmp_path / "mnist.npz", **arrays)
    code, _, err = start(best_practices.main, *command)
    assert code == 2 and err.count("\n") == 1 and f"data_crc32 is '{said}' there, now" in err


def test_tf32_needs_cuda(start, tmp_path):
    code, _, err = start(
        best_practices.main, "--device", "cpu", "--precision", "tf32", "--results-dir", tmp_path
    )
    assert code == 2 and err.count("\n") == 1 and "needs a CUDA device" in err


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_stopped_run_keeps_its_batch_and_ends_the_same(
    start, tmp_path, whole, monkeypatch, steps
):
    """Ctrl-C in the given one of two epochs' ten steps."""
    done, step = [], Trainer.step

    def counted(trainer):
        taken = step(trainer)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
                time.sleep(0.001)  # until the main thread has taken notice
        return taken

    command = [*TWO_EPOCHS, "--seeds", "0", "1", "--experiments", ROW, "--results-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        handler = signal.getsignal(signal.SIGINT)
        code, _, err = start(best_practices.main, *command)
        assert signal.getsignal(signal.SIGINT) is handler
    assert code == 130 and err == "interrupted: the same command goes on where this one stopped\n"
    checkpoint = torch.load(folder(tmp_path).path / "checkpoint.pt", weights_only=True)
    assert 5 * checkpoint["epoch"] + checkpoint["batch"] == len(done) == steps
    assert not folder(tmp_path, seed=1).path.exists()

    code, out, err = start(best_practices.main, *command)
    assert (code, err) == (0, "")
    assert f"{ROW} seed 0: going on after epoch {checkpoint['epoch']}" in out
    for seed in (0, 1):
        assert outcome(folder(tmp_path, seed=seed)) == outcome(folder(whole, seed=seed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_interrupted_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, "best_practices.py", "--dataset", "Digits", "--device", "cpu",
               "--experiments", ROW, "--seeds", "0", "--epochs", "500",
               "--results-dir", tmp_path]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if ": epoch " in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted: the same command goes on where this one stopped\n"
    assert len(folder(tmp_path).metrics()) >= 1
    assert (folder(tmp_path).path / "checkpoint.pt").exists()


def test_a_folder_in_use_is_left_alone(start, tmp_path):
    command = [*TWO_EPOCHS, "--seeds", "0", "--experiments", ROW, "--results-dir", tmp_path]
    with folder(tmp_path).locked():
        code, _, err = start(best_practices.main, *command)
        assert code == 2 and err.count("\n") == 1
        assert str(folder(tmp_path).path) in err and "another process is at work" in err
        assert [path.name for path in folder(tmp_path).path.iterdir()] == ["log.txt"]
    code, _, err = start(best_practices.main, *command)
    assert (code, err) == (0, "")


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import os, signal, sys; from mltools.results import RunFolder; from pathlib import Path\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "run"], cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    with RunFolder(tmp_path / "run").locked():
        pass


def test_a_run_that_another_process_has_ended_meanwhile_is_left_as_it_is(whole, monkeypatch):
    one = folder(whole)
    before = {path: path.read_bytes() for path in one.path.iterdir()}
    config = one.config()["settings"]
    monkeypatch.setattr(runs, "_train", None)  # would fail if it were called
    row = next(row for row in best_practices.EXPERIMENTS if row.name == ROW)
    data = load("Digits", "none")
    runs.train(row, data, one, config, torch.device("cpu"), None, None, None)
    assert before == {path: path.read_bytes() for path in one.path.iterdir()}


def test_force_sets_folders_with_other_settings_aside(start, tmp_path):
    def sweep(batch_size, *more):
        return start(
            best_practices.main, "--dataset", "Digits", "--device", "cpu", "--epochs", "1",
            "--experiments", ROW, "--seeds", "0", "--results-dir", tmp_path,
            "--batch-size", batch_size, *more,
        )  # fmt: skip

    def content(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    one = folder(tmp_path)
    aside = [one.path.with_name(f"aside-{i}-seed-0") for i in (1, 2)]
    sweep(300)
    first = content(one.path)
    code, _, err = sweep(200)
    assert code == 2 and err.count("\n") == 1
    assert "batch_size is 300 there, now 200" in err and "--force" in err
    assert content(one.path) == first

    code, out, err = sweep(200, "--force")
    assert (code, err) == (0, "") and f"{one.path} set aside as {aside[0]}" in out
    assert content(aside[0]) == first
    second = content(one.path)
    assert one.config()["settings"]["batch_size"] == 200 and one.complete()

    code, out, _ = sweep(200, "--force")  # what fits stays where it is
    assert code == 0 and "aside" not in out and content(one.path) == second

    code, out, _ = sweep(300, "--force")
    assert code == 0 and content(aside[0]) == first and content(aside[1]) == second


def test_a_folder_in_use_is_not_set_aside(tmp_path):
    one = folder(tmp_path)
    with one.locked(), pytest.raises(UserError, match="another process is at work"):
        RunFolder(one.path).set_aside()
    assert one.path.exists()


def test_a_run_that_fails_ends_the_others_with_a_checkpoint(start, tmp_path, monkeypatch):
    step = Trainer.step

    def failing(trainer):
        taken = step(trainer)
        if trainer.batches.seed == 1:
            raise OSError(28, "No space left on device", "somewhere")
        return taken

    monkeypatch.setattr(Trainer, "step", failing)
    code, _, err = start(
        best_practices.main, "--dataset", "Digits", "--device", "cpu", "--epochs", "1000",
        "--seeds", "0", "1", "2", "--experiments", ROW, "--parallel-runs", "2",
        "--results-dir", tmp_path,
    )  # fmt: skip
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: somewhere: No space left on device;")
    assert (folder(tmp_path, seed=0).path / "checkpoint.pt").exists()
    assert not (folder(tmp_path, seed=2).path / "checkpoint.pt").exists()


def test_quiet_shows_the_tables_alone(start, tmp_path):
    command = [*TWO_EPOCHS, "--experiments", ROW, "--seeds", "0", "--results-dir", tmp_path]
    code, out, err = start(best_practices.main, *command, "--quiet")
    assert (code, err) == (0, "") and out.startswith("### ")
    config = json.loads((folder(tmp_path).path / "config.json").read_text())
    assert "quiet" not in config["settings"]


def test_tensorboard_gets_every_epoch_once(start, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    command = [*TWO_EPOCHS, "--experiments", ROW, "--seeds", "0", "--results-dir", tmp_path]
    assert start(best_practices.main, *command, "--tensorboard")[0] == 0
    one = folder(tmp_path)
    expected = []
    for metrics in one.metrics():
        epoch = metrics["epoch"]
        for name in ("loss", "accuracy"):
            for half in ("train", "test"):
                expected.append((f"{name}/{half}", metrics[f"{half}_{name}"], epoch))
        for layer, cosine in metrics["alignment"].items():
            expected.append((f"alignment/{layer}", cosine["mean"], epoch))
    assert written == [(one.path / "tensorboard", 1), *expected, "closed"]


def test_tensorboard_without_its_package_is_one_line(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, err = start(best_practices.main, "--tensorboard", "--results-dir", tmp_path / "r")
    assert code == 2 and err == "error: --tensorboard needs a package: pip install tensorboard\n"
    assert not (tmp_path / "r").exists()
