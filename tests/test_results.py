"""A run's folder: files are loaded as they were written, and damaged ones are reported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import Timeout

import mltools
from mltools.errors import UserError
from mltools.results import RunFolder, write_atomically

SETTINGS = {
    "experiment": {"name": "fc", "hidden": [8, 8]},
    "seed": 0,
    "dataset": "tiny",
    "epochs": 3,
    "batch_size": 8,
    "feedback_placement": "release",
}


def epoch(number, **changes):
    return {
        "epoch": number, "train_loss": 1.5, "train_accuracy": 40.0, "test_loss": 1.6,
        "test_accuracy": 39.0, "alignment": {"act1": {"mean": 0.5, "std": 0.1}}, "seconds": 0.25,
        **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "fc" / "seed-0")
    folder.start(SETTINGS, {"torch": "1"})
    return folder


def test_a_run_that_is_not_there_is_empty_and_nothing_is_created(tmp_path):
    result = RunFolder(tmp_path / "fc" / "seed-0").check(SETTINGS)
    assert (result.name, result.settings, result.epochs) == ("fc/seed-0", {}, [])
    assert not result.finished and not result.diverged and list(tmp_path.iterdir()) == []


def test_what_was_written_is_loaded_and_the_first_settings_stay(folder):
    folder.start({**SETTINGS, "seed": 9}, {})
    folder.write_metrics([epoch(1), epoch(2)])
    result = folder.load()
    assert (result.settings, result.environment) == (SETTINGS, {"torch": "1"})
    assert result.epochs == [epoch(1), epoch(2)]


def test_other_settings_are_refused_with_the_difference(folder):
    folder.check(SETTINGS)
    other = {**SETTINGS, "epochs": 5, "experiment": {"name": "fc", "hidden": [8, 9]}}
    with pytest.raises(UserError) as error:
        folder.check(other)
    message = str(error.value)
    assert "epochs is 3 there, now 5" in message and "--force" in message
    assert "experiment.hidden is [8, 8] there, now [8, 9]" in message
    assert "seed is" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("epochs", "checkpoint", "finished"),
    [
        ([], False, False),
        ([epoch(1), epoch(2)], True, False),
        ([epoch(1), epoch(2), epoch(3)], True, False),
        ([epoch(1), epoch(2), epoch(3)], False, True),
        ([epoch(1), epoch(2, train_loss=None)], False, True),
        ([epoch(1), epoch(2, test_loss=None)], False, True),
    ],
)
def test_a_run_is_finished_with_its_last_epoch_and_without_a_checkpoint(
    folder, epochs, checkpoint, finished
):
    folder.write_metrics(epochs)
    if checkpoint:
        (folder.path / "checkpoint.pt").touch()
    assert folder.check(SETTINGS).finished == finished


@pytest.mark.parametrize("lost", ["checkpoint", "metrics"])
def test_a_run_that_lost_a_file_is_not_begun_again(folder, lost):
    if lost == "checkpoint":
        folder.write_metrics([epoch(1)])
    else:
        (folder.path / "state.pt").touch()
    with pytest.raises(UserError, match="no checkpoint.pt to resume from: restore.*--force"):
        folder.check(SETTINGS)


def test_a_run_with_a_checkpoint_is_resumed_whatever_became_of_its_metrics(folder):
    (folder.path / "checkpoint.pt").touch()
    (folder.path / "metrics.jsonl").write_text("damaged\n")
    assert not folder.check(SETTINGS).finished


# Damaged files


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(folder, cut):
    folder.write_metrics([epoch(1), epoch(2)])
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.load().epochs == [epoch(1)]


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        folder.load()
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line",
    [b'{"epoch": 1}', b"nonsense", b"[]", b"", b"\x00\x00", b"\xff", b"\xef\xbb\xbf{}", b"9" * 5000,
     b"[" * 3000, *(
         json.dumps(epoch(2, **change)).encode()
         for change in (
             {"epoch": True}, {"epoch": 0}, {"epoch": 2.0}, {"epoch": "2"}, {"epoch": 1},
             {"train_accuracy": None}, {"test_accuracy": 101}, {"test_accuracy": float("nan")},
             {"train_loss": -1}, {"train_loss": "1.5"}, {"train_loss": float("inf")},
             {"alignment": []}, {"alignment": {"act1": 0.5}}, {"alignment": {"a b": {}}},
             {"alignment": {"act1": {"mean": 2, "std": 0}}}, {"alignment": {"act1": {"mean": 0}}},
         )
     )],
)  # fmt: skip
def test_a_damaged_line_is_one_line_with_its_place(folder, line):
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    path = folder.path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + third)
    refused(folder, r"metrics.jsonl: line 2 cannot be read .*: move it away, and restore it")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "9" * 5000, '{"settings": 3, "environment": {}}', *(
        json.dumps({"settings": {**SETTINGS, **change}, "environment": {}})
        for change in (
            {"experiment": "fc"}, {"experiment": {}}, {"experiment": {"name": "a\nb"}},
            {"seed": -1}, {"seed": "0"}, {"seed": True}, {"dataset": None}, {"epochs": 0},
            {"epochs": 2.5}, {"batch_size": []}, {"feedback_placement": 3},
        )
    )],
)  # fmt: skip
def test_a_damaged_config_is_one_line_with_its_name(folder, text):
    (folder.path / "config.json").write_text(text)
    refused(folder, r"config.json cannot be read .*: move it and metrics.jsonl away, and restore")


def test_a_folder_in_the_place_of_a_file_is_one_line(folder):
    (folder.path / "metrics.jsonl").mkdir()
    refused(folder, r"metrics.jsonl cannot be read \(Is a directory\)")


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_names_the_file_and_not_the_temporary_one(tmp_path):
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(path, lambda file: None)
    assert error.value.filename == str(path)


def test_leftovers_of_a_killed_process_are_removed(folder):
    leftover = folder.path / f".checkpoint.pt.{'0' * 32}"
    leftover.touch()
    (folder.path / ".mine").touch()
    folder.remove_leftovers()
    assert {path.name for path in folder.path.iterdir()} == {".mine", "config.json"}


def test_angles_are_arrays_that_numpy_reads(folder):
    angles = {"act1": np.ones((2, 4), np.float32), "act2": np.zeros((2, 4), np.float32)}
    folder.write_angles(angles)
    with np.load(folder.path / "angles.npz", allow_pickle=False) as loaded:
        for layer, rows in angles.items():
            np.testing.assert_array_equal(loaded[layer], rows)


# The lock


def test_a_lock_excludes_other_holders_until_it_is_released(folder):
    with folder.lock(), pytest.raises(Timeout), RunFolder(folder.path).lock():
        pass
    with RunFolder(folder.path).lock():
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import os, signal, sys; from mltools.results import RunFolder; from pathlib import Path\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(mltools.__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "run"], cwd=root)
    assert ended.returncode == -9
    with RunFolder(tmp_path / "run").lock():
        pass


def test_renamed_folders_are_numbered(folder):
    for i in (1, 2):
        folder.start(SETTINGS, {})
        assert folder.rename() == folder.path.with_name(f"aside-{i}-seed-0")
        assert not folder.path.exists()
