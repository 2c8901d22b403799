"""A disk that is full ends a run with one line, and costs nothing that was finished."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import best_practices
from mltools.results import RunFolder

ROOT = Path(best_practices.__file__).parent


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB: there is no room for a second checkpoint beside the first one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True, text=True
    ) if os.name == "posix" and os.geteuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def sweep(results):
    return subprocess.run(
        [sys.executable, "best_practices.py", "--dataset", "Digits", "--device", "cpu",
         "--experiments", "fc-dropout-0.1-0.5", "--seeds", "0", "--epochs", "3",
         "--batch-size", "500", "--quiet", "--results-dir", results],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def outcome(results):
    folder = RunFolder(results / "best_practices/fc-dropout-0.1-0.5/seed-0")
    metrics = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in folder.metrics()]
    weights = torch.load(folder.path / "state.pt", weights_only=True)
    return metrics, {name: tensor.tolist() for name, tensor in weights.items()}


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(small_disk, tmp_path):
    ended = sweep(small_disk / "results")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ") and "No space left on device" in ended.stderr
    (path,) = (small_disk / "results").glob("*/*/seed-0")
    folder = RunFolder(path)
    assert folder.metrics()[0]["epoch"] == 1
    checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 0  # whole, as it was before the one that has no room

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert sweep(small_disk / "results").returncode == 0
    assert sweep(tmp_path / "whole").returncode == 0
    assert outcome(small_disk / "results") == outcome(tmp_path / "whole")
