"""Progress shows each new epoch in the folders of a sweep once, as a line or in a bar."""

import os
import sys
import termios
from contextlib import suppress

import pytest
import tiny

from mltools.progress import Progress
from mltools.results import RunFolder
from mltools.training import Experiment

EXPERIMENTS = [Experiment(name, tiny.SMALL) for name in ("one", "two")]


def train_one_epoch(path):
    ended = []
    tiny.train(path, EXPERIMENTS[0], epoch_ended=ended.append, stopped=lambda: bool(ended))


def of_a_sweep(folder, quiet=False):
    """Shows a sweep of two runs while the first run is trained from its second epoch to its end."""
    runs = {tiny.describe(x): RunFolder(folder / x.name) for x in EXPERIMENTS}
    train_one_epoch(folder / "one")
    progress = Progress(runs, quiet)
    tiny.train(folder / "one", EXPERIMENTS[0])
    progress.close()


def test_each_new_epoch_is_shown_as_a_line(tmp_path, capsys):
    of_a_sweep(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": train")[0] for line in lines] == [
        "one seed 4: epoch 2/3", "one seed 4: epoch 3/3"
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [tiny.BATCH, 7], ids=["lost checkpoint", "other settings"])
def test_a_run_restarted_after_a_rename_shows_all_its_epochs(tmp_path, capsys, batch_size):
    path = tmp_path / "one"
    train_one_epoch(path)
    (run,) = runs = {tiny.describe(EXPERIMENTS[0], batch_size=batch_size): RunFolder(path)}
    progress = Progress(runs, quiet=False)
    RunFolder(path).rename()
    progress.update_run(run)
    tiny.train(path, EXPERIMENTS[0], batch_size=batch_size)
    progress.update_run(run)
    assert capsys.readouterr().out.count(": epoch ") == 3


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_a_bar_of_epochs_and_runs(tmp_path, monkeypatch, capsys, columns):
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (25, columns))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        of_a_sweep(tmp_path)
    drawn = b""
    with suppress(OSError):  # raised at the end of the output
        while True:
            drawn += os.read(master, 1024)
    os.close(master)
    assert capsys.readouterr().out == ""
    begun, *_, ended, _, _ = drawn.decode().split("\r")[1:]
    assert " 0/5 [" in begun
    assert " 2/5 [" in ended and "] runs left: 1, one seed 4, acc " in ended
    last = tiny.metrics_of(tmp_path / "one")[-1]
    assert f"{last['train_accuracy']:.1f}/{last['test_accuracy']:.1f}%" in ended
    assert (f"/{last['test_loss']:.3f}" in ended) == (columns == 200)


def test_a_notebook_shows_the_bar_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    of_a_sweep(tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and " 0/5 [" in err and "] runs left: 1, one seed 4, acc " in err


def test_quiet_shows_nothing(tmp_path, capsys):
    of_a_sweep(tmp_path, quiet=True)
    assert capsys.readouterr() == ("", "")
