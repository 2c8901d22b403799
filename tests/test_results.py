"""A run's folder: what is written comes back, and what is damaged is said, not guessed."""

import fcntl
import json
import zlib

import numpy as np
import pytest

from mltools.errors import UserError
from mltools.files import write_atomically
from mltools.results import FILES, RunFolder, diverged, rounded

SETTINGS = {
    "experiment": {"name": "fc", "hidden": (8, 8)},
    "seed": 0,
    "dataset": "tiny",
    "epochs": 3,
    "batch_size": 8,
    "feedback_placement": "release",
}


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
    return {"act1": np.full(4, number / 8, np.float32), "act2": np.full(4, -number / 8, np.float32)}


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
    settings = json.loads(json.dumps(SETTINGS))
    assert folder.config() == {"settings": settings, "environment": {"torch": "1"}}


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
    np.testing.assert_array_equal(stored["act2"] * 8, [[-1] * 4, [-2] * 4])


def test_after_rewinding_an_epoch_is_put_down_once(folder):
    for number in (1, 2, 3):
        folder.add_epoch(epoch(number), angles(number))
    folder.rewind(1)
    assert len(folder.angles()["act1"]) == 1
    folder.add_epoch(epoch(2, loss=7.0), angles(5))
    assert folder.metrics() == [epoch(1), epoch(2, loss=7.0)]
    np.testing.assert_array_equal(folder.angles()["act1"][:, 0] * 8, [1, 5])


def test_cosines_that_were_lost_are_no_number_and_move_no_others(folder):
    folder.write_metrics([epoch(1), epoch(2)])
    folder.add_epoch(epoch(3), angles(3))
    stored = folder.angles()["act1"][:, 0] * 8
    np.testing.assert_array_equal(stored, [np.nan, np.nan, 3])


def test_a_run_is_finished_at_its_last_epoch_or_when_it_diverged(folder):
    folder.write_metrics([epoch(1), epoch(2)])
    assert not folder.finished()
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    assert folder.finished()
    folder.write_metrics([epoch(1), epoch(2, loss=None)])
    assert folder.finished() and diverged(folder.metrics()[-1])


def test_a_finished_run_is_complete_without_its_weights(folder):
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    for name, complete in (("checkpoint.pt", False), ("state.pt", True)):
        assert folder.complete() and folder.ended()
        (folder.path / name).touch()
        assert folder.complete() == folder.ended() == complete
        (folder.path / name).unlink()


@pytest.mark.parametrize("kept", [0, 2])
def test_a_finished_run_that_lost_metrics_is_not_begun_again(folder, kept):
    folder.write_metrics([epoch(1), epoch(2), epoch(3)][:kept])
    (folder.path / "state.pt").touch()
    assert not folder.ended()
    with pytest.raises(UserError, match="metrics.jsonl has lost epochs: move it away and bring"):
        folder.complete()


def test_a_run_that_lost_its_checkpoint_is_not_begun_again(folder):
    assert not folder.complete()
    folder.write_metrics([epoch(1)])
    assert not folder.ended()
    with pytest.raises(UserError, match="checkpoint.pt, where this run would go on, is not there"):
        folder.complete()
    (folder.path / "checkpoint.pt").touch()
    assert not folder.complete()


def test_a_folder_that_was_set_aside_meanwhile_is_not_locked(folder, monkeypatch):
    flock = fcntl.flock

    def late(file, flags):
        monkeypatch.setattr(fcntl, "flock", flock)
        folder.set_aside()
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="has set this run aside: try again"), folder.locked():
        pass


def test_the_checksums_are_those_of_the_json_text_one_after_the_other(folder):
    folder.write_metrics([epoch(1), epoch(2)])
    text = (folder.path / "config.json").read_text()
    body, said = json.loads(text), json.loads(text)["crc32"]
    del body["crc32"]
    assert list(json.loads(text))[-1] == "crc32"
    assert said == f"{zlib.crc32(json.dumps(body).encode()):08x}"
    start = zlib.crc32(json.dumps(SETTINGS).encode())
    for line in (folder.path / "metrics.jsonl").read_bytes().splitlines():
        body, said = line[: -len(', "crc32": "01234567"}')] + b"}", line[-10:-2]
        start = zlib.crc32(body, start)
        assert said.decode() == f"{start:08x}"


def test_what_reaches_the_log_ends_with_a_checksum_that_tells_the_run(folder):
    folder.log("one", "two")
    lines = (folder.path / "log.txt").read_text().splitlines()
    run = zlib.crc32(json.dumps(SETTINGS).encode())
    for line, text in zip(lines, ("one", "two"), strict=True):
        assert line[19:] == f"  {text} #{zlib.crc32(text.encode()) ^ run:08x}"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(folder, cut):
    folder.write_metrics([epoch(1), epoch(2)])
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.metrics() == [epoch(1)]


@pytest.mark.parametrize(
    "line", [b'{"epoch": 1}', b"nonsense", b"[]", b"", b"\x00\x00", b"\xff", b"\xef\xbb\xbf{}"]
)
def test_a_damaged_earlier_line_is_one_line_that_names_the_file(folder, line):
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    path = folder.path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + third)
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 cannot be read .*log_retrieval"):
        folder.metrics()


def test_lines_that_are_lost_moved_doubled_or_another_runs_are_found(folder, tmp_path):
    folder.write_metrics([epoch(1), epoch(2), epoch(3)])
    path = folder.path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    other = RunFolder(tmp_path / "other")
    other.start({**SETTINGS, "seed": 1}, {})
    other.write_metrics([epoch(1), epoch(2), epoch(3)])
    others = (other.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for lines, number in (
        ([second, third], 1),
        ([first, third], 2),
        ([first, third, second], 2),
        ([first, first, second, third], 2),
        ([first, others[1], third], 2),
        (others, 1),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(UserError, match=rf"line {number} cannot be read .its checksum is wron"):
            folder.metrics()


def test_metrics_without_their_settings_are_not_believed(folder):
    folder.write_metrics([epoch(1)])
    (folder.path / "config.json").unlink()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read .config.json, which"):
        folder.metrics()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3}', "null", "9" * 5000])
def test_a_damaged_config_is_one_line_that_names_the_file(folder, text):
    (folder.path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json cannot be read .*log_retrieval") as error:
        folder.check(SETTINGS)
    assert "\n" not in str(error.value)


def test_a_config_changed_by_hand_is_refused(folder):
    path = folder.path / "config.json"
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 2'))
    with pytest.raises(UserError, match="its checksum is wrong"):
        folder.config()


BAD_ANGLES = {
    "empty": b"",
    "torn": b"PK\x03\x04 torn",
    "text": b"text",
    "float64": {"act1": np.zeros((2, 4))},
    "one axis": {"act1": np.zeros(4, np.float32)},
    "epochs": {"act1": np.zeros((2, 4), np.float32), "act2": np.zeros((1, 4), np.float32)},
    "no cosine": {"act1": np.full((2, 4), 1.5, np.float32)},
    "infinite": {"act1": np.full((2, 4), np.inf, np.float32)},
}


@pytest.mark.parametrize("damage", BAD_ANGLES.values(), ids=BAD_ANGLES)
def test_damaged_angles_are_one_line_that_names_the_file(folder, damage):
    path = folder.path / "angles.npz"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        np.savez(path, **damage)
    with pytest.raises(UserError, match=r"angles.npz cannot be read") as error:
        folder.angles()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file_is_one_line_before_any_work(folder, name):
    path = folder.path / name
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(UserError, match=rf"{name} is a folder, not a file: move it away"):
        folder.check(SETTINGS)
    for read in (folder.config, folder.metrics, folder.angles, folder.finished):
        try:
            read()
        except UserError as error:
            assert name in str(error) and "Is a directory" in str(error)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "script").write_text("mine")
    folder = RunFolder(tmp_path / "script" / "fc" / "seed-0")
    for read in (folder.config, folder.metrics, folder.angles, folder.finished):
        with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
            read()


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


def test_an_error_names_the_file_and_not_the_one_in_its_place(tmp_path):
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(path, lambda file: None)
    assert error.value.filename == str(path)
