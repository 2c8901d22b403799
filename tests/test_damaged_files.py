"""A damaged file is loaded correctly, or reported in one line without a traceback.

Seeded random mutations damage a checkpoint, a data set, config.json and metrics.jsonl.
"""

import io
import random
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
from faults import SOAK

import best_practices
from mltools.data import load_dataset
from mltools.errors import UserError
from mltools.networks import Network
from mltools.training import Experiment

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

NAME = "std-18"
EXPERIMENT = Experiment(NAME, Network(hidden=(8, 7)), learning_rate=0.1)
MUTANTS = max(24, 60 * SOAK)  # damaged copies of each file


# Mutations of a file's bytes; `other` has the bytes of another file of the same kind


def place(dice, data):
    """Draws a position, more often near the ends, where headers and directories are."""
    start, end = dice.choice(((0, None), (0, None), (0, 120), (-200, None)))
    return dice.choice(range(len(data))[start:end])


def block(dice, data):
    start = place(dice, data)
    return start, min(len(data), start + dice.choice((1, 2, 4, 16, 64, 300, 2000)))


def flip_bits(dice, data, other):
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        data[place(dice, data)] ^= 1 << dice.randrange(8)
    return bytes(data)


def replace_block(dice, data, other):
    """Replaces a block by nothing, zeros, random bytes, or a block of the other file."""
    (start, end), (a, b) = block(dice, data), block(dice, other)
    size = end - start
    new = dice.choice((b"", bytes(size), dice.randbytes(size), other[a:b]))
    return data[:start] + new + data[end:]


def insert(dice, data, other):
    at = place(dice, data)
    return data[:at] + dice.randbytes(dice.choice((1, 2, 4, 100))) + data[at:]


def lose_an_end(dice, data, other):
    at = place(dice, data)
    return dice.choice((data[:at], data[at:]))


def lines(dice, data, other):
    ours = data.splitlines(keepends=True)
    dice.shuffle(ours)
    return b"".join(ours[: dice.randrange(len(ours) + 1)])


def value(dice, data, other):
    """Replaces a value in JSON by another; flips bits if the file has none."""
    values = list(re.finditer(rb'"\w+": (-?[\d.]+|null|"[^"]*")', data))
    if not values:
        return flip_bits(dice, data, other)
    start, end = dice.choice(values).span(1)
    new = (b"true", b"null", b"NaN", b"1e999", b"-1", b"250", b'"1"', b'"a\\nb"', b"[]", b"{}",
           b"9" * 5000, b"[" * 3000 + b"]" * 3000, b"\xef\xbb\xbf1")  # fmt: skip
    return data[:start] + dice.choice(new) + data[end:]


MUTATIONS = flip_bits, replace_block, insert, lose_an_end, lines, value


def mutants(kind, data, other):
    """Yields damaged copies of a file, with each mutation in turn."""
    for number in range(MUTANTS):
        dice, mutant = random.Random(f"{kind} {number}"), data
        while mutant in (data, other):
            mutant = MUTATIONS[number % len(MUTATIONS)](dice, data, other)
        yield mutant


# Files


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains two runs to their end, and keeps the checkpoints of their second epoch."""
    results = tmp_path_factory.mktemp("results")
    for seed in (0, 1):
        path, copy = results / "best_practices" / NAME / f"seed-{seed}", f"checkpoint-{seed}.pt"

        def keep(metrics, path=path, copy=copy):
            if metrics["epoch"] == 2:
                shutil.copy(path / "checkpoint.pt", results / copy)

        tiny.train(path, EXPERIMENT, epoch_ended=keep, seed=seed)
    return results


def a_copy(runs, tmp_path):
    shutil.copytree(runs / "best_practices", tmp_path / "best_practices")
    return [tmp_path / "best_practices" / NAME / f"seed-{seed}" for seed in (0, 1)]


def loaded_or_reported(load, path, mutant):
    """Loads a mutant; returns None if a one-line UserError reports its damage."""
    path.write_bytes(mutant)
    try:
        return load()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and str(path) in message and len(message) < 600, message
        return None


def test_a_damaged_checkpoint_is_reported_or_resumed_correctly(runs, tmp_path):
    path, _ = a_copy(runs, tmp_path)
    checkpoint = path / "checkpoint.pt"
    whole, other = ((runs / f"checkpoint-{seed}.pt").read_bytes() for seed in (0, 1))
    expected = tiny.outcome(path)
    reported = 0
    for mutant in mutants("checkpoint", whole, other):
        resume = partial(tiny.train, path, EXPERIMENT, seed=0)
        reported += loaded_or_reported(resume, checkpoint, mutant) is None
        checkpoint.unlink(missing_ok=True)
        assert tiny.outcome(path) == expected
    assert reported > MUTANTS / 2


def test_a_damaged_data_set_is_reported_or_loaded_correctly(tmp_path):
    def data_set(seed):
        dice, file = np.random.default_rng(seed), io.BytesIO()
        arrays = {}
        for split, count in (("train", 30), ("test", 12)):
            arrays[f"x_{split}"] = dice.integers(0, 256, (count, 6, 5), dtype=np.uint8)
            arrays[f"y_{split}"] = dice.integers(0, 10, count, dtype=np.uint8)
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    path, whole = tmp_path / "mnist.npz", data_set(0)
    path.write_bytes(whole)
    expected = load_dataset("MNIST", tmp_path).crc32
    reported = 0
    for mutant in mutants("data set", whole, data_set(1)):
        data = loaded_or_reported(partial(load_dataset, "MNIST", tmp_path), path, mutant)
        reported += data is None
        assert data is None or data.crc32 == expected
    assert reported > MUTANTS / 2


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_damaged_results_give_tables_or_one_error_line(runs, tmp_path, start, monkeypatch, name):
    experiment = replace(best_practices.EXPERIMENTS[0], name=NAME)
    monkeypatch.setattr(best_practices, "EXPERIMENTS", [experiment])
    one, other = (path / name for path in a_copy(runs, tmp_path))
    reported = 0
    for mutant in mutants(name, one.read_bytes(), other.read_bytes()):
        one.write_bytes(mutant)
        code, out, err = start(
            best_practices.main, "--tables-only", "--results-dir", tmp_path, "--seeds", 0
        )
        if code == 0:
            assert err == "" and out.startswith("### ")
        else:
            reported += 1
            assert code == 2 and out == "" and err.count("\n") == 1 and str(one.parent) in err
    assert reported > MUTANTS / 4


@pytest.mark.parametrize("name", ["table.csv", "report.html"])
def test_results_that_cannot_be_written_are_reported_in_one_line(tmp_path, start, name):
    blocked = tmp_path / "best_practices" / name
    blocked.mkdir(parents=True)
    arguments = ("--tables-only", "--results-dir", tmp_path, "--experiments", "fc-tanh")
    code, out, err = start(best_practices.main, *arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1 and str(blocked) in err
