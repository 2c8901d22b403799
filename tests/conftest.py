"""Fixtures that several test files share."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tiny import SIX_RUNS, sweep_outcome

from mltools.errors import exit_code

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory):
    """Gives torch.compile a new cache: cached code for another ATEN_CPU_CAPABILITY would fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def one_thread():
    """Sets one thread: on a busy machine, small networks would only wait for the other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic(monkeypatch):
    """Sets PyTorch as --deterministic does, since some of cuDNN's sums differ between calls."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def quick_figures(monkeypatch):
    """Saves a placeholder for each figure, since drawing one takes half a second."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"drawn"))


@pytest.fixture
def start(monkeypatch, capsys):
    """Returns a function that runs a script's main and returns its exit code, stdout and stderr."""

    def start(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = exit_code(main)
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return start


@pytest.fixture(scope="session")
def six_runs(tmp_path_factory):
    """Runs SIX_RUNS one after another, undisturbed; returns their outcome and the seconds taken."""
    results = tmp_path_factory.mktemp("six-runs")
    command = [sys.executable, "best_practices.py", *SIX_RUNS, "--quiet", "--results-dir", results]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return sweep_outcome(results), time.monotonic() - start
