"""What the tests of the scripts share."""

import sys

import pytest
import torch
from matplotlib.figure import Figure

from mltools.errors import exit_code


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory):
    """Gives torch.compile a new cache: code from another ATEN_CPU_CAPABILITY does not compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def one_thread():
    """On a busy machine, small networks only wait for the other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_figures(monkeypatch):
    """Writes figures without drawing them, which takes half a second each."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"drawn"))


@pytest.fixture
def start(monkeypatch, capsys):
    """Starts a script's main with a command line: exit code, stdout and stderr come back."""

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
