"""Sweeps: the command line, runs side by side, other settings, interruptions, failures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import checkpoint_of, metrics_of, outcome

import best_practices
from mltools import sweep
from mltools.errors import exit_code
from mltools.results import RunFolder
from mltools.sweep import Options, run_sweep
from mltools.training import Experiment, Settings, Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

ROOT = Path(best_practices.__file__).parent
TWO_EPOCHS = "--dataset Digits --device cpu --batch-size 300 --epochs 2".split()
NAME = "fc-dropout-0.1-0.5"
ONE_RUN = [*TWO_EPOCHS, "--experiments", NAME, "--seeds", "0", "--results-dir"]
SIX_RUNS = [*TWO_EPOCHS, *f"--seeds 0 1 2 --experiments {NAME} fc-batchnorm --results-dir".split()]


def folder(results, experiment=NAME, seed=0):
    return results / "best_practices" / experiment / f"seed-{seed}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six runs, one after another, never disturbed."""
    results = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that it is compared with
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *SIX_RUNS, str(results)])
        assert exit_code(best_practices.main) == 0
    torch.set_num_threads(threads)
    return results


def test_runs_side_by_side_give_what_each_gives_alone(start, tmp_path, whole):
    code, _, err = start(best_practices.main, *SIX_RUNS, tmp_path, "--parallel-runs", "4")
    assert (code, err) == (0, "")
    for experiment in (NAME, "fc-batchnorm"):
        for seed in range(3):
            ours, alone = (folder(results, experiment, seed) for results in (tmp_path, whole))
            assert outcome(ours) == outcome(alone)
    table = "best_practices/table.csv"
    assert (tmp_path / table).read_text() == (whole / table).read_text()


def test_the_longest_runs_come_first(start, tmp_path):
    code, out, _ = start(
        best_practices.main, *TWO_EPOCHS, "--results-dir", tmp_path, "--seeds", "0", "1",
        "--experiments", "fc-tanh", "cnn-tanh",
    )  # fmt: skip
    begun = [line.partition(":")[0] for line in out.splitlines() if "epochs of Digits" in line]
    assert begun == [f"{name}-tanh seed {seed}" for name in ("cnn", "fc") for seed in (0, 1)]


def test_cpu_threads_are_shared_and_given_back(start, tmp_path, monkeypatch):
    torch.set_num_threads(3)
    seen, evaluate = [], Trainer.evaluate

    def noted(trainer):
        seen.append(torch.get_num_threads())
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    for at_once, threads in (("2", 1), ("9", 1), ("auto", 3)):
        start(best_practices.main, *ONE_RUN, tmp_path / at_once, "--parallel-runs", at_once)
        assert set(seen) == {threads} and torch.get_num_threads() == 3
        seen.clear()


# Options


def options(**changes):
    common = {"dataset": "Digits", "epochs": 1, "batch_size": 8, "seeds": (0,), "device": "cpu"}
    return Options(data_dir=Path("data"), results_dir=Path("results"), **{**common, **changes})


@pytest.mark.parametrize("device, at_once", [("cpu", 1), ("cuda", 8), ("cuda:1", 8)])
def test_how_many_runs_at_once(device, at_once):
    assert options(device=device).at_once() == at_once
    assert options(device=device, parallel_runs=3).at_once() == 3


def test_every_option_has_its_help(start):
    code, out, _ = start(best_practices.main, "--help")
    text = " ".join(out.split())
    assert code == 0
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"] in text
    assert "(default: 0 1 2 3 4 5 6 7 8 9)" in text and "(default: CIFAR-10)" in text


def test_a_run_has_the_settings_of_the_options(tmp_path):
    asked = options(epochs=7, precision="bf16", feedback_placement="every-layer", batch_size=9)
    data = sweep.DataSet("Digits", 10, (1, 32, 32), None, None, crc32="01234567")
    experiment = Experiment("one", best_practices.FC)
    run = sweep.describe_run(experiment, 5, asked, data)
    assert (run.experiment, run.seed, run.data_crc32) == (experiment, 5, "01234567")
    for field in dataclasses.fields(Settings):
        assert getattr(run, field.name) == getattr(asked, field.name)


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


def test_tf32_needs_cuda(start, tmp_path):
    code, _, err = start(
        best_practices.main, "--device", "cpu", "--precision", "tf32", "--results-dir", tmp_path
    )
    assert code == 2 and err.count("\n") == 1 and "needs a CUDA device" in err


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_sweep_sets_the_arithmetic_of_pytorch(monkeypatch, precision, deterministic):
    expected = "tf32" if precision == "tf32" else "ieee"
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        run_sweep("none", [], options(precision=precision, deterministic=deterministic), None)
        assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
        torch.use_deterministic_algorithms(False)


def test_quiet_shows_the_tables_alone(start, tmp_path):
    code, out, err = start(best_practices.main, *ONE_RUN, tmp_path, "--quiet")
    assert (code, err) == (0, "") and out.startswith("### ")


def test_every_epoch_is_a_line_where_there_is_no_terminal(start, tmp_path):
    code, out, err = start(best_practices.main, *ONE_RUN, tmp_path)
    assert (code, err) == (0, "")
    shown = [line for line in out.splitlines() if ": epoch " in line]
    logged = (folder(tmp_path) / "log.txt").read_text().splitlines()
    assert shown == [line[21:] for line in logged if ": epoch " in line] and len(shown) == 2


# Other settings


def test_other_data_under_the_same_name_is_refused(start, tmp_path):
    dice, splits = np.random.default_rng(0), ("train", "test")
    arrays = {f"x_{split}": dice.integers(0, 256, (40, 28, 28), np.uint8) for split in splits}
    arrays |= {f"y_{split}": dice.integers(0, 10, 40, np.uint8) for split in splits}
    command = ["--dataset", "MNIST", "--data-dir", tmp_path, "--device", "cpu", "--epochs", "1",
               "--batch-size", "20", "--experiments", NAME, "--seeds", "0"]  # fmt: skip
    command += ["--results-dir", tmp_path / "results"]
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert start(best_practices.main, *command)[0] == 0
    known = json.loads((folder(tmp_path / "results") / "config.json").read_text())
    bytes_of_all = b"".join(
        arrays[f"{kind}_{split}"].tobytes() for split in splits for kind in "xy"
    )
    crc32 = f"{zlib.crc32(bytes_of_all):08x}"
    assert known["settings"]["data_crc32"] == crc32
    arrays["x_test"][0, 0, 0] ^= 1
    np.savez(tmp_path / "mnist.npz", **arrays)
    code, _, err = start(best_practices.main, *command)
    assert code == 2 and err.count("\n") == 1 and f"data_crc32 is '{crc32}' there, now" in err


def test_force_renames_folders_with_other_settings(start, tmp_path):
    def run(batch_size, *more):
        return start(best_practices.main, *ONE_RUN, tmp_path, "--batch-size", batch_size, *more)

    def content(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    one = folder(tmp_path)
    aside = [one.with_name(f"aside-{i}-seed-0") for i in (1, 2)]
    run(300)
    first = content(one)
    code, _, err = run(200)
    assert code == 2 and err.count("\n") == 1
    assert "batch_size is 300 there, now 200" in err and "--force" in err
    assert content(one) == first

    code, out, err = run(200, "--force")
    assert (code, err) == (0, "") and f"{one} renamed to {aside[0]}" in out
    assert content(aside[0]) == first
    second = content(one)
    assert RunFolder(one).load().settings["batch_size"] == 200

    code, out, _ = run(200, "--force")  # a folder that fits stays where it is
    assert code == 0 and "aside" not in out and content(one) == second

    code, out, _ = run(300, "--force")
    assert code == 0 and content(aside[0]) == first and content(aside[1]) == second


# Interruptions


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_stopped_run_keeps_its_batch_and_ends_the_same(
    start, tmp_path, whole, monkeypatch, steps
):
    """Ctrl-C in the given one of two epochs' ten steps."""
    done, step = [], Trainer.step

    def counted(trainer):
        step(trainer)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
                time.sleep(0.001)  # until the main thread has taken notice

    command = [*TWO_EPOCHS, "--seeds", "0", "1", "--experiments", NAME, "--results-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        handler = signal.getsignal(signal.SIGINT)
        code, _, err = start(best_practices.main, *command)
        assert signal.getsignal(signal.SIGINT) is handler
    assert code == 130 and err == "interrupted: the same command resumes where this one stopped\n"
    checkpoint = checkpoint_of(folder(tmp_path))
    assert 5 * len(checkpoint["epochs"]) + checkpoint["position"] == len(done) == steps
    assert not folder(tmp_path, seed=1).exists()

    code, out, err = start(best_practices.main, *command)
    assert (code, err) == (0, "")
    assert f"{NAME} seed 0: resuming after epoch {len(checkpoint['epochs'])}" in out
    for seed in (0, 1):
        assert outcome(folder(tmp_path, seed=seed)) == outcome(folder(whole, seed=seed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_says_how_to_resume(tmp_path, number):
    command = [sys.executable, "best_practices.py", *ONE_RUN, tmp_path, "--epochs", "500"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if ": epoch " in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted: the same command resumes where this one stopped\n"
    assert metrics_of(folder(tmp_path)) and (folder(tmp_path) / "checkpoint.pt").exists()


def test_a_run_that_fails_ends_the_others_with_a_checkpoint(start, tmp_path, monkeypatch):
    step = Trainer.step

    def failing(trainer):
        step(trainer)
        if trainer.run.seed == 1:
            raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(Trainer, "step", failing)
    code, _, err = start(
        best_practices.main, *TWO_EPOCHS, "--epochs", "1000", "--seeds", "0", "1", "2",
        "--experiments", NAME, "--parallel-runs", "2", "--results-dir", tmp_path,
    )  # fmt: skip
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: somewhere: No space left on device;")
    assert (folder(tmp_path, seed=0) / "checkpoint.pt").exists()
    assert not (folder(tmp_path, seed=2) / "checkpoint.pt").exists()


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
    assert start(best_practices.main, *ONE_RUN, tmp_path, "--tensorboard")[0] == 0
    expected = []
    for metrics in metrics_of(folder(tmp_path)):
        epoch = metrics["epoch"]
        for name in ("loss", "accuracy"):
            for split in ("train", "test"):
                expected.append((f"{name}/{split}", metrics[f"{split}_{name}"], epoch))
        for layer, cosine in metrics["alignment"].items():
            expected.append((f"alignment/{layer}", cosine["mean"], epoch))
    assert written == [(folder(tmp_path) / "tensorboard", 1), *expected, "closed"]


def test_tensorboard_without_its_package_is_one_line(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, err = start(best_practices.main, "--tensorboard", "--results-dir", tmp_path / "r")
    assert code == 2 and err == "error: --tensorboard needs a package: pip install tensorboard\n"
    assert not (tmp_path / "r").exists()
