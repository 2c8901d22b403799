"""Each epoch of a damaged log is parsed as it was logged, or skipped with a report."""

import json
import random

import pytest
from made import own_log, release_log, settings_of
from test_logs import main

from mltools.logs import parse_log
from mltools.results import RunFolder

LOGS = {
    "ours": own_log() + own_log("cnn", shift=1),
    "release": release_log() + release_log("0.0"),
}
WHOLE = {run.path.parent: run.epochs for log in LOGS.values() for run in parse_log(log)[0]}


def corrupt(dice, data):
    """Replaces or inserts a byte; the new byte is not a digit."""
    at = dice.randrange(len(data))
    return data[:at] + dice.choice([b"\xff", b"\0"]) + data[at + dice.randrange(2) :]


def lose_or_double_line(dice, data):
    lines = data.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    return b"".join([*lines[:at], *dice.choice([0, 2]) * [lines[at]], *lines[at + 1 :]])


def overwrite(dice, data):
    """Replaces 20 bytes by random bytes, so that numbers may change too."""
    data = bytearray(data)
    for _ in range(20):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def mutants(log, mutation, count):
    dice = random.Random(f"{log} {mutation.__name__}")
    return [mutation(dice, LOGS[log]) for _ in range(count)]


@pytest.mark.parametrize("mutation", [corrupt, lose_or_double_line])
@pytest.mark.parametrize("log", LOGS)
def test_epochs_are_parsed_as_logged_and_gaps_are_reported(log, mutation):
    recovered = 0
    for mutant in mutants(log, mutation, 100):
        runs, skipped = parse_log(mutant)
        for run in runs:
            whole = WHOLE[run.path.parent]
            numbers = [epoch["epoch"] for epoch in run.epochs]
            lost = numbers != list(range(1, len(numbers) + 1))
            for epoch in run.epochs:
                logged = whole[epoch["epoch"] - 1]
                unchecked = {"alignment": None, "seconds": None}
                assert epoch | unchecked == logged | unchecked
                assert epoch["alignment"].items() <= logged["alignment"].items()
                lost |= epoch["alignment"] != logged["alignment"]
            assert skipped or not lost
            recovered += len(numbers)
    assert recovered > 200  # of 1000 in our logs, 800 in the release's


@pytest.mark.parametrize("log", LOGS)
def test_the_command_restores_the_epochs_that_it_prints(start, tmp_path, log):
    file = tmp_path / "log.txt"
    for number, mutant in enumerate(mutants(log, overwrite, 30)):
        file.write_bytes(mutant)
        code, out, err = start(main, file)
        errors = [line for line in err.splitlines() if not line.startswith(str(file))]
        assert errors == ["error: no epoch of any run was found"] * code and code == (out == "")
        output = tmp_path / str(number)
        assert start(main, file, "--output", output)[::2] == (code, err)
        restored = [RunFolder(path.parent).load() for path in output.glob("*/*/metrics.jsonl")]
        lines = [{"run": run.name, **epoch} for run in restored for epoch in run.epochs]
        key = json.dumps
        assert sorted(lines, key=key) == sorted(map(json.loads, out.splitlines()), key=key)


def test_a_refused_log_does_not_prevent_restoring_the_next_log(start, tmp_path):
    other, good = tmp_path / "other.txt", tmp_path / "log.txt"
    other.write_bytes(own_log("cnn-tanh", epochs=4))  # with other settings than the folder's
    RunFolder(tmp_path / "cnn-tanh/seed-0").start(settings_of("cnn-tanh", epochs=3), {})
    good.write_bytes(own_log())
    arguments = tmp_path / "missing.txt", other, good, "--output", tmp_path
    code, out, err = start(main, *arguments)
    assert code == 2 and out == f"{tmp_path}/fc-tanh/seed-0: 5 epochs\n"
    first, second = err.splitlines()
    assert "missing.txt" in first and "epochs is 3 there, now 4" in second


def test_a_log_without_results_is_an_error(start, tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"settings {\x1b]0;title\x07 \xff\x00\xe2\x80\xa8\n")
    code, out, err = start(main, log)
    first, second = err.splitlines()
    assert code == 1 and out == "" and first.startswith(f"{log}:1: skipped, damaged line: settings")
    assert first.isprintable() and second == "error: no epoch of any run was found"
    assert start(main)[0] == 2


@pytest.mark.parametrize("name", ["fc-tanh", "fc-tanh/seed-0", "fc-tanh/seed-0/config.json"])
def test_an_output_that_cannot_be_written_is_reported_in_one_line(start, tmp_path, name):
    log, blocked = tmp_path / "log.txt", tmp_path / "out" / name
    log.write_bytes(own_log())
    blocked.parent.mkdir(parents=True)
    blocked.mkdir() if name.endswith("config.json") else blocked.write_text("mine")
    code, out, err = start(main, log, "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and str(blocked) in err
