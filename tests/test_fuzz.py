"""Damaged files: each reader gives what was written, or says in one line which file is damaged.

The files are those of two short runs, damaged in every way that comes to mind, by seeded dice.
"""

import io
import json
import random
import re
import shutil
import zipfile
import zlib
from dataclasses import asdict, replace
from functools import partial
from threading import Event
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from faults import SOAK

import best_practices
import bottleneck_from_log
import log_retrieval
from mltools import checkpoints, logs
from mltools.data import load
from mltools.errors import UserError, exit_code
from mltools.networks import Network
from mltools.records import metrics_problem, settings_problem
from mltools.results import RunFolder
from mltools.runs import train
from mltools.training import Experiment

pytestmark = pytest.mark.usefixtures("one_thread", "quick_figures")

MUTANTS = max(15, 60 * SOAK)  # of each kind of file; 15 are one for each mutation
COMMANDS = max(15, 6 * SOAK)  # of these, by the commands
NAME = "std-18"  # a row of the bottleneck sweep
EPOCHS = 4


# The files


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, and the checkpoint of the first in its third epoch."""
    root, folders = tmp_path_factory.mktemp("runs"), []
    data = load("Digits", "none")
    few = data.train.subset(torch.arange(200))
    data = type(data)(data.name, data.classes, data.input_shape, few, data.test)
    for seed in (0, 1):
        folder = RunFolder(root / NAME / f"seed-{seed}")
        experiment = Experiment(NAME, Network(hidden=(8, 7)), learning_rate=0.1)
        settings = {"experiment": asdict(experiment), "seed": seed, "dataset": data.name}
        settings |= {"epochs": EPOCHS, "batch_size": 50, "feedback_placement": "every-layer"}
        settings["precision"] = "float32"
        arguments = experiment, data, folder, settings, torch.device("cpu"), Mock()
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, Mock(side_effect=[None, None, KeyboardInterrupt]), Event())
        shutil.copy(folder.path / "checkpoint.pt", root / f"checkpoint-{seed}.pt")
        train(*arguments, Mock(), Event())
        folders.append(folder)
    return root, folders


def data_set(seed, save):
    dice, out = np.random.default_rng(seed), io.BytesIO()
    arrays = {}
    for half, count in (("train", 30), ("test", 12)):
        arrays[f"x_{half}"] = dice.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        arrays[f"y_{half}"] = dice.integers(0, 10, count, dtype=np.uint8)
    save(out, **arrays)
    return out.getvalue()


RELEASE_LOG = "".join(
    f"2019-05-23 16:56:17 -- {line}\n"
    for rate in ("0.8525", "0.9775")
    for line in (
        "Seeding with \x1b[1m0\x1b[0m.",
        f"Training with a bottlenecking rate {rate} initialized by STD for 3 epochs on dataset "
        "CIFAR-10 with a batch size of 128:",
        *(
            line
            for epoch in (1, 2, 3)
            for line in (
                f"   EPOCH {epoch}/3, last epoch processed in 7.25s:",
                *(f"{i}_Tanh() -- mean:0.{epoch}12{i}, std:0.012{i}" for i in range(4)),
                f"   Training loss: 0.01{epoch}5 (top-1:3{epoch}.5%) -- "
                f"Validation loss: 0.01{epoch}0 (top-1:2{epoch}.5%).",
            )
        ),
    )
).encode()


# What is done to them


def place(dice, data):
    """Anywhere, but more often where headers and directories are."""
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


def other_digit(dice, data, other):
    digits = [match.start() for match in re.finditer(rb"\d", data)]
    at = dice.choice(digits)
    return data[:at] + str(dice.randrange(10)).encode() + data[at + 1 :]


def other_byte(dice, data, other):
    at = place(dice, data)
    return data[:at] + bytes([dice.choice((0, 10, 13, 34, 57, 92, 123, 255))]) + data[at + 1 :]


def delete(dice, data, other):
    start, end = block(dice, data)
    return data[:start] + data[end:]


def insert(dice, data, other):
    at = place(dice, data)
    return data[:at] + dice.randbytes(dice.choice((1, 2, 4, 100))) + data[at:]


def truncate(dice, data, other):
    return data[: place(dice, data)]


def behead(dice, data, other):
    return data[place(dice, data) :]


def swap(dice, data, other):
    a, b, c = sorted(place(dice, data) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def double(dice, data, other):
    start, end = block(dice, data)
    return data[:end] + data[start:end] + data[end:]


def zero(dice, data, other):
    start, end = block(dice, data)
    return data[:start] + bytes(end - start) + data[end:]


def splice(dice, data, other):
    """A piece of the other run's file, in the place of this one's or beside it."""
    start, end = sorted(dice.randrange(len(other) + 1) for _ in range(2))
    if dice.random() < 0.6:
        return data[:start] + other[start:end] + data[end:]
    at = dice.randrange(len(data))
    return data[:at] + other[start:end] + data[at:]


def exchange(dice, data, other):
    """This one's beginning, the other's end, or both one after the other."""
    at = place(dice, data)
    return dice.choice((data[:at] + other[at:], data + other, other + data))


def lines(dice, data, other):
    """Lines lost, doubled, moved, or another run's."""
    ours, others = data.splitlines(keepends=True), other.splitlines(keepends=True)
    for _ in range(dice.choice((1, 1, 2, 5))):
        if not ours:
            break
        at, to = dice.randrange(len(ours)), dice.randrange(len(ours))
        what = dice.randrange(4)
        if what == 0:
            del ours[at]
        elif what == 1:
            ours.insert(to, ours[at])
        elif what == 2:
            ours.insert(to, ours.pop(at))
        else:
            ours[at] = others[at % len(others)]
    return b"".join(ours)


def leaf(dice, data, other):
    """A value somewhere in JSON text becomes something else, or its key is lost or doubled."""
    values = list(re.finditer(rb'("\w+": )(-?[\d.]+|null|true|false|"[^"]*")', data))
    if not values:
        return flip_bits(dice, data, other)
    found = dice.choice(values)
    key, value = found.groups()
    new = dice.choice(
        (b"true", b"null", b"NaN", b"1e999", b"-1", b"250", b'"1"', b"[]", b"{}", b"9" * 5000,
         b"[" * 3000 + b"]" * 3000, b"\xef\xbb\xbf1", value + b"0", value + b"1", b"-" + value,
         value + b", " + key + value, dice.choice(values).group(2))
    )  # fmt: skip
    return data[: found.start(2)] + new + data[found.end(2) :]


def header(dice, data, other):
    """Something in an npy header, or in the fields of a zip header or directory."""
    spots = [m.start() for m in re.finditer(rb"\x93NUMPY|PK\x01\x02|PK\x03\x04|PK\x05\x06", data)]
    if not spots:
        return flip_bits(dice, data, other)
    at = dice.choice(spots) + dice.randrange(70)
    new = dice.choice((b"\x00", b"\xff", b"9", b"-", b"8", b"|O", b"\xff\xff\xff\xff", b"\x01"))
    return data[:at] + new + data[at + len(new) :]


MUTATIONS = [
    flip_bits, other_digit, other_byte, delete, insert, truncate, behead, swap, double, zero,
    splice, exchange, lines, leaf, header,
]  # fmt: skip


def mutants(kind, data, other, count):
    """Damaged copies of a file: their number and their bytes."""
    for number in range(count):
        dice = random.Random(f"{kind} {number}")
        mutant = data
        # The other run's file, its first header aside, is no damaged file.
        while mutant == data or mutant[64:] == other[64:]:
            mutant = MUTATIONS[number % len(MUTATIONS)](dice, data, other)
        yield f"{kind} {number}", mutant


def forged(dice, data, kind, start):
    """Contents changed, and all checksums right again; that of metrics goes on from `start`."""
    if kind in ("config", "metrics"):
        changed = dice.choice((leaf, other_digit))(dice, data, data)
        out, start = b"", start if kind == "metrics" else 0
        try:
            for text in changed.splitlines() if kind == "metrics" else [changed]:
                record = json.loads(text)
                del record["crc32"]
                text = json.dumps(record).encode()
                start = zlib.crc32(text, start)
                out += text[:-1] + f', "crc32": "{start:08x}"}}\n'.encode()
            return out
        except (ValueError, RecursionError, TypeError, KeyError):  # then no checksum is right
            return changed
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = dice.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen and content:
                content = dice.choice((flip_bits, other_byte, delete, header, zero))(
                    dice, content, content
                )
            new.writestr(name, content)
    return out.getvalue()


# What has to come of it


def read_or_said(read, path, mutant, number):
    """What the reader makes of a mutant: None where it says that it is damaged."""
    path.write_bytes(mutant)
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and str(path) in message and len(message) < 600, message
        return None
    except Exception as error:
        raise AssertionError(f"mutant {number}: {error!r}") from error


def same(one, other):
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, (np.ndarray, torch.Tensor)):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and one == other


def a_copy(runs, tmp_path):
    folder = RunFolder(tmp_path / "results" / "best_practices" / NAME / "seed-0")
    shutil.copytree(runs[1][0].path, folder.path)
    return folder


def kinds(runs, tmp_path):
    """Kind of file: its path, another file like it, its reader, and whether a result is right."""
    root, (_, second) = runs
    folder = a_copy(runs, tmp_path)
    shutil.copy(root / "checkpoint-0.pt", folder.path / "checkpoint.pt")
    whole = folder.metrics()

    def prefix(result):
        return same(dict(enumerate(result)), dict(enumerate(whole[: len(result)])))

    def exactly(read):
        expected = read()
        return read, lambda result: same(result, expected)

    def images(data_dir):
        found = load("MNIST", data_dir)
        halves = (found.train, found.test)
        return dict(enumerate(x for half in halves for x in half.dataset.tensors))

    def checkpoint(name, required):
        return exactly(lambda: checkpoints.load(folder.path / name, required))

    found = {
        "config": (folder.path / "config.json", second.path / "config.json",
                   *exactly(folder.config)),
        "metrics": (folder.path / "metrics.jsonl", second.path / "metrics.jsonl",
                    folder.metrics, prefix),
        "angles": (folder.path / "angles.npz", second.path / "angles.npz", *exactly(folder.angles)),
        "checkpoint": (folder.path / "checkpoint.pt", root / "checkpoint-1.pt",
                       *checkpoint("checkpoint.pt", {"epoch": int, "model": dict})),
        "state": (folder.path / "state.pt", second.path / "state.pt", *checkpoint("state.pt", {})),
    }  # fmt: skip
    for kind, save in (("data set", np.savez), ("packed data set", np.savez_compressed)):
        path = tmp_path / kind / "mnist.npz"
        path.parent.mkdir()
        path.write_bytes(data_set(0, save))
        path.with_name("other").write_bytes(data_set(1, save))
        found[kind] = path, path.with_name("other"), *exactly(partial(images, path.parent))
    return found


KINDS = ("config", "metrics", "angles", "checkpoint", "state", "data set", "packed data set")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_said_or_read_right(runs, tmp_path, kind):
    path, other, read, right = kinds(runs, tmp_path)[kind]
    data, other = path.read_bytes(), other.read_bytes()
    assert right(read())
    said = 0
    for number, mutant in mutants(kind, data, other, MUTANTS):
        result = read_or_said(read, path, mutant, number)
        said += result is None
        assert result is None or right(result), f"mutant {number} is taken for a result"
    assert said > MUTANTS / 3
    path.write_bytes(data)
    assert right(read())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_file_is_said_or_possible(runs, tmp_path, kind):
    """Under right checksums a changed number passes for another result; nonsense does not."""
    path, _, read, _ = kinds(runs, tmp_path)[kind]
    data, believed = path.read_bytes(), 0
    start = zlib.crc32(json.dumps(runs[1][0].config()["settings"]).encode())
    for number in range(MUTANTS // 2):
        mutant = forged(random.Random(f"forged {kind} {number}"), data, kind, start)
        result = read_or_said(read, path, mutant, number)
        believed += bool(result)
        if kind == "config" and result:
            assert settings_problem(result["settings"]) is None
        elif kind == "metrics" and result:
            assert not any(map(metrics_problem, result))
        elif kind == "angles" and result:
            assert len({rows.shape for rows in result.values()}) == 1
            assert all(rows.dtype == np.float32 for rows in result.values())
        elif result:
            assert isinstance(result, dict)
    assert believed  # so the checksums were right


def logged(runs):
    return [(folder.path / "log.txt").read_bytes() for folder in runs[1]]


def check_log(found, skipped, runs):
    """Only numbers of one of the two runs; what is missing is said, the end of a log aside."""
    whole = {f"{NAME}/seed-{i}": folder.metrics() for i, folder in enumerate(runs[1])}
    for run in found:
        assert run.name in whole and run.epochs
        for epoch, metrics in run.epochs.items():
            truth = whole[run.name][epoch - 1]
            layers = metrics["alignment"]
            assert same({**metrics, "alignment": 0}, {**truth, "alignment": 0})
            assert all(same(layers[layer], truth["alignment"][layer]) for layer in layers)
            assert len(layers) == len(truth["alignment"]) or skipped
        assert sorted(run.epochs) == list(range(1, len(run.epochs) + 1)) or skipped


def test_a_damaged_log_gives_what_was_in_it_and_says_the_rest(runs):
    ours, other = logged(runs)
    both = ours + other
    assert [run.name for run in logs.parse(both)[0]] == [f"{NAME}/seed-{i}" for i in (0, 1)]
    recovered = 0
    for _, mutant in mutants("log", ours, other, MUTANTS):
        found, skipped = logs.parse(mutant)
        check_log(found, skipped, runs)
        recovered += bool(found)
    for _, mutant in mutants("logs", both, other, MUTANTS):
        check_log(*logs.parse(mutant), runs)
    assert recovered > MUTANTS / 3


def test_a_damaged_log_of_the_release_never_raises():
    """It has no checksums, so whether its numbers are right cannot be asked."""
    ours, other = RELEASE_LOG, RELEASE_LOG.replace(b"STD", b"PAI")
    assert [len(run.epochs) for run in logs.parse(ours)[0]] == [3, 3]
    for _, mutant in mutants("release log", ours, other, MUTANTS):
        for run in logs.parse(mutant)[0]:
            assert settings_problem(run.settings) is None
            assert not any(map(metrics_problem, run.epochs.values()))


# By the commands


def call(main, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    capsys.readouterr()
    code = main() if main is log_retrieval.main else exit_code(main)
    return code, *capsys.readouterr()


def test_log_retrieval_of_damaged_logs(runs, tmp_path, monkeypatch, capsys):
    ours, other = logged(runs)
    log = tmp_path / "log.txt"
    for number, mutant in mutants("log", ours, other, COMMANDS):
        log.write_bytes(mutant)
        code, out, err = call(log_retrieval.main, monkeypatch, capsys, log)
        complaints = err.splitlines()
        assert code in (0, 1) and all(str(log) in line for line in complaints[: -code or None])
        assert (code == 1) == (out == "") == (complaints[-1:] == ["error: no epoch of any run was "
                                                                 "found"])  # fmt: skip
        code_again, _, _ = call(
            log_retrieval.main, monkeypatch, capsys, log, "--output", tmp_path / number
        )
        assert code_again == code
        rows = [json.loads(line) for line in out.splitlines()]
        for path in (tmp_path / number).glob("*/*"):
            name = f"{path.parent.name}/{path.name}"
            own = [row for row in rows if row["run"] == name]
            assert RunFolder(path).metrics() == [
                {key: row[key] for key in row if key not in ("run", "crc32")} for row in own
            ]


def test_bottleneck_from_log_of_damaged_logs_and_folders(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bottleneck_from_log, "sweep_figure", lambda *arguments: None)
    ours, other = logged(runs)
    results = tmp_path / "results"
    shutil.copytree(runs[1][0].path, results / NAME / "seed-0")
    log = tmp_path / "log.txt"

    def cells(out):
        rows = [line for line in out.splitlines() if line.startswith(f"| {NAME} ")]
        return {cell.strip() for row in rows for cell in row.split("|")}

    allowed = {"0", "1 not finished", "2 not finished"}
    for data in (ours, other, ours + other):  # the damage may be that both are there
        log.write_bytes(data)
        code, out, _ = call(
            bottleneck_from_log.main, monkeypatch, capsys, log, "--output", tmp_path / "out"
        )
        assert code == 0 and len(cells(out)) > 5
        allowed |= cells(out)

    def check(code, out, err, complaints):
        if code == 0:
            assert cells(out) <= allowed and cells(out)
        else:
            assert code == 2 and out == "" and len(err.splitlines()) <= complaints
            assert err.splitlines()[-1].startswith("error: ")

    for _, mutant in mutants("log", ours, other, COMMANDS):
        log.write_bytes(mutant)
        said = len(logs.parse(mutant)[1])
        arguments = (log, "--output", tmp_path / "out")
        check(*call(bottleneck_from_log.main, monkeypatch, capsys, *arguments), said + 1)
    for name in ("config.json", "metrics.jsonl"):
        path, other = results / NAME / "seed-0" / name, (runs[1][1].path / name).read_bytes()
        data = path.read_bytes()
        for _, mutant in mutants(name, data, other, COMMANDS):
            path.write_bytes(mutant)
            check(*call(bottleneck_from_log.main, monkeypatch, capsys, results), 1)
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_tables_of_damaged_folders(runs, tmp_path, start, monkeypatch, name):
    folder = a_copy(runs, tmp_path)
    row = replace(best_practices.EXPERIMENTS[0], name=NAME)
    monkeypatch.setattr(best_practices, "EXPERIMENTS", [row])
    path, other = folder.path / name, (runs[1][1].path / name).read_bytes()
    data = path.read_bytes()
    arguments = ("--tables-only", "--results-dir", tmp_path / "results", "--dataset", "Digits")
    arguments = (*arguments, "--seeds", 0)
    code, whole, _ = start(best_practices.main, *arguments)
    assert code == 0 and "1 not finished" not in whole
    for number, mutant in mutants(name, data, other, COMMANDS):
        path.write_bytes(mutant)
        code, out, err = start(best_practices.main, *arguments)
        if code == 0:
            assert err == "" and (out == whole or "1 not finished" in out), number
        else:
            assert code == 2 and out == "" and err.count("\n") == 1 and str(path.parent) in err


@pytest.mark.parametrize("name", ["table.md", "table.csv", "table.tex", "."])
def test_results_folders_that_cannot_be_written_are_one_line(runs, tmp_path, start, name):
    results = tmp_path / "results"
    blocked = results / "best_practices" / name
    if name == ".":
        results.mkdir()
        blocked.write_text("mine")
    else:
        blocked.mkdir(parents=True)
    arguments = ("--tables-only", "--results-dir", results, "--experiments", "fc-tanh")
    code, out, err = start(best_practices.main, *arguments)
    assert code == (2 if name == "." else 1)
    assert out == "" and err.count("\n") == 1 and str(blocked) in err


@pytest.mark.parametrize("name", ["alignment.png", "accuracy.pdf", "table.md"])
def test_figures_that_cannot_be_written_are_one_line(runs, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(runs[1][0].path, tmp_path / NAME / "seed-0")
    (tmp_path / name).mkdir()
    code, out, err = call(bottleneck_from_log.main, monkeypatch, capsys, tmp_path)
    assert code == 1 and out == "" and err.count("\n") == 1 and str(tmp_path / name) in err


def test_the_mutations_are_those_that_are_named():
    """Each of them changes something, and each has its turn."""
    for mutation in MUTATIONS:
        dice = random.Random(0)
        changed = [mutation(dice, RELEASE_LOG, b'{"a": 1}\n' * 99) for _ in range(20)]
        assert any(mutant != RELEASE_LOG for mutant in changed), mutation.__name__
    assert len(MUTATIONS) <= MUTANTS
