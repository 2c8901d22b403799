"""A run's folder: what is written comes back, and what is damaged is said, not guessed."""

import json

import numpy as np
import pytest

from mltools.errors import UserError
from mltools.files import write_atomically
from mltools.results import RunFolder, diverged, rounded

SETTINGS = {"experiment": {"name": "fc", "hidden": (8, 8)}, "seed": 0, "epochs": 3}


def epoch(number, loss=1.5):
    return {
        "epoch": number,
        "train_loss": loss,
        "train_accuracy": 40.0,
        "test_loss": 1.6,
        "test_accuracy": 39.0,
        "alignment": {},
    }


def angles(number):
    return {"act1": np.full(4, number, np.float32), "act2": np.full(4, -number, np.float32)}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(SETTINGS, {"torch": "1"})
    return folder


def test_nothing_is_created_before_start(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check(SETTINGS)
    assert folder.config() is None and folder.metrics() == [] and folder.angles() == {}
    assert not folder.finished() and list(tmp_path.iterdir()) == []


def test_the_settings_come_back_and_the_first_ones_stay(folder):
    folder.start({**SETTINGS, "seed": 9}, {})
    config = folder.config()
    assert config["settings"] == json.loads(json.dumps(SETTINGS))
    assert config["environment"] == {"torch": "1"}


def test_other_settings_are_refused_with_the_difference(folder):
    folder.check(SETTINGS)
    with pytest.raises(UserError) as error:
        folder.check({**SETTINGS, "epochs": 5, "experiment": {"name": "fc", "hidden": (8, 9)}})
    message = str(error.value)
    assert "epochs is 3 there, now 5" in message
    assert "experiment.hidden is [8, 8] there, now [8, 9]" in message
    assert "seed" not in message and "\n" not in message


def test_epochs_and_angles_come_back_in_order(folder):
    for number in (1, 2):
        folder.add_epoch(epoch(number), angles(number))
    assert folder.metrics() == [epoch(1), epoch(2)]
    stored = folder.angles()
    assert stored["act1"].dtype == np.float32
    np.testing.assert_array_equal(stored["act2"], [[-1] * 4, [-2] * 4])


def test_after_rewinding_an_epoch_is_put_down_once(folder):
    for number in (1, 2, 3):
        folder.add_epoch(epoch(number), angles(number))
    folder.rewind(1)
    folder.add_epoch(epoch(2, loss=7.0), angles(5))
    assert folder.metrics() == [epoch(1), epoch(2, loss=7.0)]
    np.testing.assert_array_equal(folder.angles()["act1"][:, 0], [1, 5])


def test_a_run_is_finished_at_its_last_epoch_or_when_it_diverged(folder):
    folder.write_metrics([epoch(1), epoch(2)])
    assert not folder.finished()
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    assert folder.finished()
    folder.write_metrics([epoch(1), epoch(2, loss=None)])
    assert folder.finished() and diverged(folder.metrics()[-1])


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(folder, cut):
    folder.write_metrics([epoch(1), epoch(2)])
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.metrics() == [epoch(1)]


@pytest.mark.parametrize(
    "line", ['{"epoch": 1}', "nonsense", "[]", "", json.dumps(epoch(2)), "\x00\x00"]
)
def test_a_damaged_earlier_line_is_one_line_that_names_the_file(folder, line):
    path = folder.path / "metrics.jsonl"
    path.write_text("".join(f"{text}\n" for text in (json.dumps(epoch(1)), line, "{}")))
    line_number = 3 if line == json.dumps(epoch(2)) else 2
    with pytest.raises(UserError, match=rf"metrics.jsonl: line {line_number} is damaged"):
        folder.metrics()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3}', "null"])
def test_a_damaged_config_is_one_line_that_names_the_file(folder, text):
    (folder.path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is damaged") as error:
        folder.check(SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"text"])
def test_damaged_angles_are_one_line_that_names_the_file(folder, damage):
    (folder.path / "angles.npz").write_bytes(damage)
    with pytest.raises(UserError, match=r"angles.npz cannot be read"):
        folder.angles()


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


def test_numbers_have_four_decimals_and_what_is_none_is_null():
    assert rounded(0.123456) == 0.1235
    assert rounded(float("nan")) is None and rounded(float("inf")) is None
