"""A run's folder is loaded as it was written, and its damaged files are reported in one line."""

import json

import pytest
from filelock import Timeout
from made import made_run

from mltools.errors import UserError
from mltools.results import RunFolder, write_atomically

EPOCHS = made_run("fc", test=(40, 41, 42), cosines={"act1": [0.5, 0.5, 0.5]}).epochs
SETTINGS = {
    **made_run("fc", epochs=3).settings,
    "experiment": {"name": "fc", "hidden": [8, 8]},
}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "fc" / "seed-0")
    folder.start(SETTINGS, {"torch": "1"})
    return folder


def test_a_missing_run_is_loaded_as_empty_and_not_created(tmp_path):
    result = RunFolder(tmp_path / "fc" / "seed-0").check(SETTINGS)
    assert (result.name, result.settings, result.epochs) == ("fc/seed-0", {}, [])
    assert not result.finished and not result.diverged and list(tmp_path.iterdir()) == []


def test_a_run_is_loaded_as_written_and_keeps_its_first_settings(folder):
    folder.start({**SETTINGS, "seed": 9}, {})
    folder.write_metrics(EPOCHS)
    result = folder.load()
    assert (result.settings, result.environment) == (SETTINGS, {"torch": "1"})
    assert result.epochs == EPOCHS


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
        (EPOCHS, True, False),
        (EPOCHS, False, True),
        ([{**EPOCHS[0], "train_loss": None}], False, True),
        ([{**EPOCHS[0], "test_loss": None}], False, True),
    ],
)
def test_a_run_is_finished_if_it_has_its_last_epoch_and_no_checkpoint(
    folder, epochs, checkpoint, finished
):
    folder.write_metrics(epochs)
    if checkpoint:
        (folder.path / "checkpoint.pt").touch()
    assert folder.check(SETTINGS).finished == finished


@pytest.mark.parametrize("lost", ["checkpoint", "metrics"])
def test_a_run_that_lost_a_file_is_not_restarted(folder, lost):
    if lost == "checkpoint":
        folder.write_metrics(EPOCHS[:2])
    else:
        (folder.path / "state.pt").touch()
    with pytest.raises(UserError, match="no checkpoint.pt to resume from: restore.*--force"):
        folder.check(SETTINGS)


def test_a_run_with_a_checkpoint_is_resumed_despite_damaged_metrics(folder):
    (folder.path / "checkpoint.pt").touch()
    (folder.path / "metrics.jsonl").write_text("damaged\n")
    assert not folder.check(SETTINGS).finished


# Damaged files


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(folder, cut):
    folder.write_metrics(EPOCHS)
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.load().epochs == EPOCHS[:2]


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        folder.load()
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line",
    [b'{"epoch": 1}', b"nonsense", b"[]", b"", b"\xff", b"9" * 5000, b"[" * 3000, *(
         json.dumps(EPOCHS[1] | change).encode()
         for change in (
             {"epoch": True}, {"epoch": 2.0}, {"epoch": 1}, {"train_accuracy": None},
             {"test_accuracy": 101}, {"train_loss": -1}, {"test_loss": float("inf")},
             {"alignment": []}, {"alignment": {"act1": 0.5}}, {"alignment": {"a b": {}}},
             {"alignment": {"act1": {"mean": 2, "std": 0}}}, {"alignment": {"act1": {"mean": 0}}},
         )
     )],
)  # fmt: skip
def test_a_damaged_line_is_reported_with_its_file_and_number(folder, line):
    folder.write_metrics(EPOCHS)
    path = folder.path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + third)
    refused(folder, r"metrics.jsonl: line 2 cannot be read .*: move it away, and restore it")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "9" * 5000, '{"settings": 3, "environment": {}}', *(
        json.dumps({"settings": SETTINGS | change, "environment": {}})
        for change in (
            {"experiment": "fc"}, {"experiment": {"name": "a\nb"}}, {"seed": -1}, {"seed": "0"},
            {"dataset": None}, {"epochs": 2.5}, {"batch_size": 0}, {"protocol": 3},
        )
    )],
)  # fmt: skip
def test_a_damaged_config_is_reported_with_its_name(folder, text):
    (folder.path / "config.json").write_text(text)
    refused(folder, r"config.json cannot be read .*: move it and metrics.jsonl away, and restore")


# Writing


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, fail)
    assert error.value.filename == str(path)  # not the temporary file
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_process_are_removed(folder):
    leftover = folder.path / f".checkpoint.pt.{'0' * 32}"
    leftover.touch()
    (folder.path / ".mine").touch()
    folder.remove_leftovers()
    assert {path.name for path in folder.path.iterdir()} == {".mine", "config.json"}


def test_a_lock_excludes_other_holders_until_it_is_released(folder):
    with folder.lock(), pytest.raises(Timeout), RunFolder(folder.path).lock():
        pass
    with RunFolder(folder.path).lock():
        pass
