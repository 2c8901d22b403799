"""A sweep has the same results in parallel, checks its options first, and resumes after a stop."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from made import made_run, save_run
from tiny import (
    SIX_RUNS,
    SMALL,
    checkpoint_of,
    metrics_of,
    needs_cuda,
    outcome,
    sweep_outcome,
    tiny,
)

import best_practices
from mltools import sweep
from mltools.sweep import Options, run_sweep
from mltools.training import Experiment, Run, Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

TWO_EPOCHS = "--dataset Digits --device cpu --batch-size 300 --epochs 2".split()
NAME = "fc-dropout-0.1-0.5"
ONE_RUN = [*TWO_EPOCHS, "--experiments", NAME, "--seeds", "0", "--results-dir"]


def folder(results, seed=0):
    return results / "best_practices" / NAME / f"seed-{seed}"


def test_parallel_runs_give_the_results_of_serial_runs(start, tmp_path, six_runs):
    options = ("--parallel-runs", 4, "--results-dir", tmp_path)
    code, _, err = start(best_practices.main, *SIX_RUNS, *options)
    assert (code, err) == (0, "")
    assert sweep_outcome(tmp_path) == six_runs[0]


@needs_cuda
def test_on_a_gpu_parallel_runs_give_the_results_of_serial_runs(start, tmp_path, deterministic):
    """Each thread trains several short runs, and may end while another thread records a graph."""
    experiments = ("fc-tanh", "fc-batchnorm", NAME, "cnn-tanh", "cnn-dropout-0.1-0.1")
    command = [*TWO_EPOCHS, "--device", "cuda", "--deterministic", "--seeds", *range(5)]
    for at_once in (1, 8):
        options = ("--parallel-runs", at_once, "--results-dir", tmp_path / str(at_once))
        code, _, err = start(best_practices.main, *command, "--experiments", *experiments, *options)
        assert (code, err) == (0, "")
    serial, parallel = (sweep_outcome(tmp_path / at_once) for at_once in ("1", "8"))
    assert parallel == serial
    logs = [path.read_text() for path in tmp_path.rglob("log.txt")]
    assert len(logs) == 50 and not any("without a CUDA graph" in log for log in logs)


def test_the_longest_runs_start_first(start, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(sweep, "train_run", lambda trainer, *_: begun.append(trainer.run.name))
    chosen = ["--seeds", "0", "1", "--experiments", "fc-tanh", "cnn-tanh"]
    start(best_practices.main, *TWO_EPOCHS, *chosen, "--results-dir", tmp_path)
    assert begun == [f"{name}-tanh seed {seed}" for name in ("cnn", "fc") for seed in (0, 1)]


def test_cpu_threads_are_shared_and_restored(start, tmp_path, monkeypatch):
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
def test_the_default_number_of_parallel_runs_depends_on_the_device(device, at_once):
    assert options(device=device).at_once() == at_once
    assert options(device=device, parallel_runs=3).at_once() == 3


def test_the_help_has_every_option(start):
    code, out, _ = start(best_practices.main, "--help")
    text = " ".join(out.split())
    assert code == 0
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"] in text


def test_a_run_has_the_settings_of_the_options(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(sweep, "train_run", lambda trainer, *_: runs.append(trainer.run))
    changes = {"epochs": 7, "batch_size": 9, "precision": "bf16"}
    changes["protocol"] = "corrected"
    asked = options(**changes, seeds=(5,), quiet=True)
    data = dataclasses.replace(tiny(), crc32="01234567")
    experiment = Experiment("one", SMALL)
    run_sweep(tmp_path, [experiment], asked, data)
    own = {"experiment": experiment, "dataset": "Digits", "seed": 5, "data_crc32": "01234567"}
    assert runs == [Run(**own, **changes)]


@pytest.mark.parametrize("arguments, message", [
    ("--parallel-runs 0", "a number from 1 up, or auto"),
    ("--parallel-runs many", "a number from 1 up, or auto"),
    ("--device cuda --parallel-runs 33", "at most 32 on CUDA"),
    ("--device cpu --precision tf32", "needs a CUDA device"),
    ("--tensorboard", "pip install tensorboard"),
])  # fmt: skip
def test_impossible_options_are_reported_in_one_line(
    start, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    results = tmp_path / "results"
    code, _, err = start(best_practices.main, *arguments.split(), "--results-dir", results)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not results.exists()


@pytest.mark.parametrize("precision, deterministic", [
    ("float32", True), ("tf32", False), ("bf16", False),
])  # fmt: skip
def test_a_sweep_sets_pytorchs_precision_and_determinism(monkeypatch, precision, deterministic):
    expected = "tf32" if precision == "tf32" else "ieee"
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # monkeypatch restores it afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        run_sweep(None, [], options(precision=precision, deterministic=deterministic), None)
        assert [backend.fp32_precision for backend in backends] == [expected, expected]
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        for backend, value in zip(backends, before):
            backend.fp32_precision = value


def test_quiet_shows_only_the_tables(start, tmp_path):
    code, out, err = start(best_practices.main, *ONE_RUN, tmp_path, "--quiet")
    assert (code, err) == (0, "") and out.startswith("### ")


# Other settings


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
    second = content(one)
    code, out, _ = run(200, "--force")  # a folder with these settings is kept
    assert code == 0 and "aside" not in out and content(one) == second
    run(300, "--force")
    assert [content(path) for path in aside] == [first, second]


def test_a_run_restarted_without_its_checkpoint_shows_all_its_epochs(start, tmp_path):
    start(best_practices.main, *ONE_RUN, tmp_path)
    metrics = folder(tmp_path) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    code, _, err = start(best_practices.main, *ONE_RUN, tmp_path)
    assert code == 2 and "has results of 1 epochs and no checkpoint.pt" in err
    code, out, _ = start(best_practices.main, *ONE_RUN, tmp_path, "--force")
    assert code == 0 and out.count(": epoch ") == 2


def test_everything_is_checked_before_any_run_starts(start, tmp_path, monkeypatch):
    begun = []
    command = [*TWO_EPOCHS, "--experiments", "cnn-tanh", "fc-tanh", "--results-dir", tmp_path]
    save_run(made_run("fc-tanh", 9, root=tmp_path / "best_practices"))
    monkeypatch.setattr(sweep, "train_run", lambda *_: begun.append(None))
    code, _, err = start(best_practices.main, *command)
    assert code == 2 and "seed-9 holds a run with other settings" in err
    code, _, err = start(best_practices.main, *command, "--force", "--batch-size", "1501")
    assert code == 2 and "--batch-size 1501 is more than 1500 images" in err
    assert begun == [] and [path.name for path in tmp_path.glob("*/*/seed-*")] == ["seed-9"]


# Interruptions


@pytest.mark.parametrize("number, steps", [(signal.SIGINT, 9), (signal.SIGTERM, 5)])
def test_a_run_stopped_by_a_signal_resumes_with_the_same_results(
    start, tmp_path, six_runs, monkeypatch, number, steps
):
    """The signal is sent after the given step; two epochs have ten steps."""
    done, step = [], Trainer.step

    def counted(trainer):
        step(trainer)
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), number)
            while signal.getsignal(number) != signal.SIG_DFL:
                time.sleep(0.001)  # until the handler has run in the main thread

    command = [*TWO_EPOCHS, "--seeds", "0", "1", "--experiments", NAME, "--results-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        handler = signal.getsignal(number)
        code, _, err = start(best_practices.main, *command)
        assert signal.getsignal(number) is handler
    assert code == 130 and err == "interrupted: the same command resumes where this one stopped\n"
    checkpoint = checkpoint_of(folder(tmp_path))
    assert 5 * len(checkpoint["epochs"]) + checkpoint["position"] == len(done) == steps
    assert not folder(tmp_path, seed=1).exists()

    code, out, err = start(best_practices.main, *command)
    assert (code, err) == (0, "") and f"{NAME} seed 0: resuming after epoch 1" in out
    (expected, _), _ = six_runs
    for seed in (0, 1):
        assert outcome(folder(tmp_path, seed=seed)) == expected[f"{NAME}/seed-{seed}"]


def test_a_failing_run_stops_the_other_runs_with_a_checkpoint(start, tmp_path, monkeypatch):
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
    writer = MagicMock()
    writer.return_value.__enter__ = lambda self: self
    monkeypatch.setattr(sweep, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=writer))
    assert start(best_practices.main, *ONE_RUN, tmp_path, "--tensorboard")[0] == 0
    expected = [call(folder(tmp_path) / "tensorboard")]
    for metrics in metrics_of(folder(tmp_path)):
        for name in ("loss", "accuracy"):
            for split in ("train", "test"):
                value = metrics[f"{split}_{name}"]
                expected.append(call().add_scalar(f"{name}/{split}", value, metrics["epoch"]))
        for layer, cosine in metrics["alignment"].items():
            value = cosine["mean"]
            expected.append(call().add_scalar(f"alignment/{layer}", value, metrics["epoch"]))
        expected.append(call().flush())
    assert writer.mock_calls == [*expected, call().__exit__(None, None, None)]
