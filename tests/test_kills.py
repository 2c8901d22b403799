"""A run killed at any instant and resumed gives the results of an uninterrupted run.

Real training processes are killed in the middle of their writes and at random times.
"""

import itertools
import json
import multiprocessing
import random
import signal
import time
from collections import Counter

import faults
import pytest
import tiny

from mltools.logs import parse_log

EPOCHS = 3
SCENARIOS = {  # script, arguments, and number out of 25 kills
    "fc-dropout": ("best_practices", ("--experiments", "fc-dropout-0.1-0.5"), 8),
    "fc-batchnorm": ("best_practices", ("--experiments", "fc-batchnorm"), 7),
    "cnn": ("best_practices", ("--experiments", "cnn-dropout-0.1-0.1"), 2),
    "bottleneck": ("bottleneck", ("--sizes", "118", "--init", "pai"), 8),
}
KINDS = {
    *("write config.json", "write log.txt", "write angles.npz", "write metrics.jsonl"),
    *("write checkpoint.pt", "write state.pt", "write table.csv", "write report.html"),
    *("fsync", "replace", "unlink"),
}


@pytest.fixture(scope="module")
def processes():
    """Forks from a process that has imported everything, so that a start is fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults", "best_practices", "bottleneck", "torch._dynamo"])
    return context


def start(processes, scenario, results, point, note):
    script, arguments, _ = SCENARIOS[scenario]
    common = "--dataset Digits --seeds 3 --device cpu --batch-size 64 --quiet".split()
    command = [*arguments, *common, "--epochs", str(EPOCHS), "--results-dir", str(results)]
    process = processes.Process(target=faults.run, args=(script, command, results, point, note))
    process.start()
    return process


def outcome(results):
    """Returns all results of a sweep except times; the log must have the same epochs."""
    (path,) = results.glob("*/*/seed-3")
    tables = {file.name: file.read_text() for file in sorted(results.glob("*/table.*"))}
    (logged,), _ = parse_log((path / "log.txt").read_bytes())
    assert logged.epochs == tiny.metrics_of(path)
    return *tiny.outcome(path), tables


def finished_epochs(results):
    """Returns the number of epochs in the checkpoint, or all of them for a finished run."""
    for path in results.glob("*/*/seed-3"):
        if (path / "checkpoint.pt").exists():
            return len(tiny.checkpoint_of(path)["epochs"])
        if (path / "state.pt").exists():
            return EPOCHS
    return 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_killed_at_any_instant_gives_the_same_results(processes, scenario, tmp_path):
    note = tmp_path / "note"
    began = time.monotonic()
    process = start(processes, scenario, tmp_path / "whole", None, note)
    process.join()
    duration = time.monotonic() - began
    assert process.exitcode == 0
    points = json.loads(note.read_text())
    assert set(points) >= KINDS
    expected = outcome(tmp_path / "whole")
    assert len(expected[0]) == EPOCHS

    dice = random.Random(scenario)
    kills = Counter()
    quota = max(1, faults.SOAK * SCENARIOS[scenario][2])
    for results in (tmp_path / f"round-{i}" for i in itertools.count()):
        reached, code = 0, None
        while code != 0:
            killing = kills.total() < quota
            by_clock = killing and dice.random() < 0.3
            kind = dice.choice(sorted(KINDS))
            point = (kind, dice.randint(1, points[kind])) if killing and not by_clock else None
            process = start(processes, scenario, results, point, note)
            if by_clock:
                process.join(dice.uniform(0, duration))
                process.kill()
            process.join()
            code = process.exitcode
            if code:
                assert code == -signal.SIGKILL
                kills["by the clock" if by_clock else kind] += 1
            assert finished_epochs(results) >= reached, "a finished epoch is lost"
            reached = finished_epochs(results)
        assert outcome(results) == expected
        if kills.total() >= quota:
            break
    print(f"{scenario}: {kills.total()} kills: {dict(kills.most_common())}")
