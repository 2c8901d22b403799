"""What the tests of the scripts share."""

import sys
from pathlib import Path

import pytest

from mltools.sweep import exit_code

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


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
