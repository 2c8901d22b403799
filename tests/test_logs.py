"""Results out of logs: all that is intact, and a word on what is not."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import zlib
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import log_retrieval
from dfatools import DFA, DFALayer
from mltools.data import load
from mltools.logs import epoch_lines, parse, sealed
from mltools.networks import Network
from mltools.results import RunFolder
from mltools.runs import train
from mltools.training import Experiment

STAMP = "2026-11-23 16:56:17"


def metrics(epoch, shift=0.0):
    return {
        "epoch": epoch,
        "train_loss": round(2.0 - epoch / 10 + shift, 4),
        "train_accuracy": round(30.1234 + epoch + shift, 4),
        "test_loss": round(2.1 - epoch / 10 + shift, 4),
        "test_accuracy": round(29.5 + epoch + shift, 4),
        "alignment": {
            layer: {"mean": round(0.08 * epoch - 0.05 * i, 4), "std": 0.0123}
            for i, layer in enumerate(("lin1", "act1"))
        },
        "seconds": 1.5,
    }


def settings_of(name="fc-tanh", seed=0, epochs=5):
    more = {"dataset": "CIFAR-10", "batch_size": 128, "feedback_placement": "release"}
    return {"experiment": {"name": name}, "seed": seed, "epochs": epochs, **more}


def logged(lines, settings):
    run = zlib.crc32(json.dumps(settings).encode())
    return "".join(f"{STAMP}  {sealed(line, run)}\n" for line in lines).encode()


def own_log(name="fc-tanh", seed=0, epochs=5, shift=0.0):
    settings = settings_of(name, seed, epochs)
    lines = [f"{name} seed {seed}: {epochs} epochs of CIFAR-10 on cpu"]
    lines.append(f"settings {json.dumps(settings)}")
    for epoch in range(1, epochs + 1):
        lines += epoch_lines(metrics(epoch, shift), epochs)
    return logged(lines, settings)


FC = ("0_Linear(in=3072)", "1_Tanh()", "2_Bottleneck(in=800)", "3_Tanh()", "4_Linear(out=10)")


def release_log(rate="0.8525", init="STD", epochs=4, layers=FC, seed=0):
    """In the 2019 release's form, colours, progress and all."""
    lines = [
        "\x1b[33m\x1b[1mEstablishing Baselines\x1b[0m\x1b[33m",
        f"Seeding with \x1b[1m{seed}\x1b[0m.",
        f"Training with a bottlenecking rate {rate} initialized by {init} for {epochs} epochs "
        "on dataset CIFAR-10 with a batch size of 128:",
    ]
    for epoch in range(1, epochs + 1):
        before = f", last epoch processed in {epoch - 1}.250048400879s" if epoch > 1 else ""
        lines.append(f"   EPOCH {epoch}/{epochs}{before}:")
        lines.append("       Batch 1/390 (loaded in 0.0004s, last batch forward in 0.0045s)")
        lines += [f"{x} -- mean:0.{epoch}0{i:02}, std:0.0{i:02}1" for i, x in enumerate(layers)]
        lines.append(
            f"   Training loss: 0.01{epoch}5 (top-1:3{epoch}.5%) -- "
            f"Validation loss: 0.01{epoch}0 (top-1:2{epoch}.5%)."
        )
    lines.append(
        f"Final with a bottlenecking rate {rate} initialized by {init} for {epochs} epochs"
    )
    return "".join(f"{STAMP} -- {line}\n" for line in lines).encode()


def test_our_log_comes_back_exactly():
    (run,), skipped = parse(own_log())
    assert run.name == "fc-tanh/seed-0" and skipped == []
    assert list(run.epochs.values()) == [metrics(epoch) for epoch in range(1, 6)]
    assert run.settings == settings_of()


def test_a_diverged_epoch_comes_back_as_null():
    broken = {**metrics(1), "train_loss": None, "alignment": {"act1": {"mean": None, "std": None}}}
    head = b"".join(own_log().splitlines(keepends=True)[:2])
    data = head + logged(epoch_lines(broken, 5), settings_of())
    (run,), _ = parse(data)
    assert run.epochs == {1: broken}


def test_the_releases_log_comes_back_under_our_names():
    (run,), skipped = parse(release_log())
    assert run.name == "std-118/seed-0" and skipped == []
    assert run.settings["dataset"] == "CIFAR-10" and run.settings["batch_size"] == 128
    assert list(run.epochs) == [1, 2, 3, 4]
    third = run.epochs[3]
    assert third["train_loss"] == pytest.approx(0.0135 * 128, abs=1e-4)
    assert third["test_loss"] == pytest.approx(0.013 * 128, abs=1e-4)
    assert (third["train_accuracy"], third["test_accuracy"]) == (33.5, 23.5)
    assert list(third["alignment"]) == ["lin1", "act1", "lin2", "act2", "lin3"]
    assert third["alignment"]["act2"] == {"mean": 0.3003, "std": 0.0031}
    assert [run.epochs[epoch]["seconds"] for epoch in run.epochs] == [1.25, 2.25, 3.25, None]


POOLED = ["Conv2d", "Tanh", "MaxPool2d"]
NORMALISED = ["Conv2d", "Tanh", "BatchNorm2d", "MaxPool2d"]


@pytest.mark.parametrize("modules, network", [
    ([*3 * POOLED, "Flatten", "Linear", "Tanh", "Linear"], {}),
    ([*3 * NORMALISED, "Flatten", "Linear", "Tanh", "BatchNorm1d", "Linear"], {"batchnorm": True}),
], ids=["plain", "batchnorm"])  # fmt: skip
def test_the_names_of_the_releases_cnn_are_put_right(modules, network):
    shifted = [*modules[1:], modules[-1]]
    layers = [f"{position}_{module}()" for position, module in enumerate(shifted)]
    (run,), _ = parse(release_log(layers=layers, epochs=1))
    ours = Network("cnn", **network).build((3, 32, 32), 10).named_children()
    names = [name for name, module in ours if not isinstance(module, (DFA, DFALayer))]
    assert list(run.epochs[1]["alignment"]) == names
    assert run.epochs[1]["alignment"][names[9]]["mean"] == 0.1009


def test_the_names_of_the_releases_cnn_with_dropout_are_right_as_they_stand():
    """In the order of the release's own log, whose convolutions have a dropout of probability 0."""
    block = ["Conv2d(3, 32)", "Dropout2d(p=0, inplace=False)", "Tanh()", "MaxPool2d(padding=0)"]
    hidden = ["Flatten()", "Linear(in=576)", "Dropout(p=0.5)", "Tanh()", "Linear(in=128)"]
    layers = [f"{position}_{module}" for position, module in enumerate([*3 * block, *hidden])]
    (run,), skipped = parse(release_log(layers=layers, epochs=1))
    names = [f"{name}{i}" for i in (1, 2, 3) for name in ("conv", "drop", "act", "maxp")]
    alignment = run.epochs[1]["alignment"]
    assert list(alignment) == [*names, "flat", "lin1", "drop4", "act4", "lin2"] and not skipped
    assert (alignment["act3"]["mean"], alignment["lin1"]["mean"]) == (0.1010, 0.1013)


@pytest.mark.parametrize("log", [own_log, release_log])
def test_line_ends_and_progress_do_no_harm(log):
    (expected,), _ = parse(log())
    noisy = log().replace(b"\n", b"\r\n")
    noisy = noisy.replace(b"\r\n", b"\r\n 40%|####      | 2/5 [00:01<00:02]\r", 6)
    (run,), skipped = parse(noisy)
    assert run.epochs == expected.epochs and skipped == []


def test_corrupt_bytes_cost_their_line_only_and_are_told():
    data = own_log()
    data = data.replace(b"act1, epoch 2: mean 0.1100", b"act1, epoch 2: mean 0.1\xff00")
    data = data.replace(b"epoch 4/5: train", b"epoch 4/5: tr\xc3in")
    number = 1 + data[: data.index(b"\xff")].count(b"\n")
    (run,), skipped = parse(data)
    assert sorted(run.epochs) == [1, 2, 3, 5]
    assert list(run.epochs[2]["alignment"]) == ["lin1"]
    assert run.epochs[3] == metrics(3) and run.epochs[5] == metrics(5)
    assert number in [skip.line for skip in skipped]
    reasons = ["epoch 4 is missing", "epoch 2 lacks the alignment of act1"]
    assert [skip.reason for skip in skipped[2:]] == [f"fc-tanh/seed-0: {x}" for x in reasons]


def test_every_run_in_a_file_is_found():
    data = own_log() + own_log("cnn-tanh", 3, shift=1.0) + release_log() + release_log("0.99875")
    runs, skipped = parse(data)
    names = ["fc-tanh/seed-0", "cnn-tanh/seed-3", "std-118/seed-0", "std-1/seed-0"]
    assert [run.name for run in runs] == names and skipped == []
    assert runs[1].epochs[5] == metrics(5, shift=1.0)


def test_a_run_that_was_killed_and_gone_on_with_is_one_run():
    lines = own_log().splitlines(keepends=True)
    going_on = logged(["fc-tanh seed 0: going on after epoch 2"], settings_of())
    (run,), skipped = parse(b"".join([*lines[: 2 + 3 * 3], going_on, *lines[2 + 2 * 3 :]]))
    assert list(run.epochs.values()) == [metrics(epoch) for epoch in range(1, 6)]
    assert skipped == []


def test_a_restart_of_the_release_is_a_run_of_its_own():
    first = release_log(epochs=4)
    cut = first[: first.index(b"EPOCH 3/4")]
    runs, _ = parse(cut + b"\n" + first)
    assert [run.name for run in runs] == ["std-118/seed-0", "std-118/seed-0-attempt-2"]
    assert [len(run.epochs) for run in runs] == [2, 4]


@pytest.mark.parametrize(
    ("log", "end"), [(own_log, rb"epoch \d+/\d+: .*\n"), (release_log, rb"Training loss: .*\n")]
)
def test_a_log_cut_anywhere_keeps_every_epoch_before_the_cut(log, end):
    data = log(epochs=12) if log is own_log else log(epochs=9)
    whole = parse(data)[0][0].epochs
    ends = [match.end() for match in re.finditer(end, data)]
    assert len(ends) == len(whole)
    dice = random.Random(0)
    for cut in (dice.randrange(len(data)) for _ in range(200)):
        runs, _ = parse(data[:cut])
        complete = sum(position <= cut for position in ends)
        found = runs[0].epochs if runs else {}
        assert len(found) >= complete
        for epoch in range(1, complete + 1):
            assert found[epoch] | {"seconds": 0} == whole[epoch] | {"seconds": 0}


@pytest.mark.parametrize("log", [own_log, release_log])
def test_a_run_whose_beginning_is_lost_is_not_taken_for_the_one_before(log):
    first = log()
    second = log(seed=1).replace(b"settings", b"sett\xffngs").replace(b"Training w", b"Train\xffng")
    runs, skipped = parse(first + second.replace(b"seed 1: 5 epochs of", b"seed 1: \xff epochs of"))
    assert [run.epochs for run in runs] == [parse(first)[0][0].epochs]
    assert any("unknown run" in skip.reason for skip in skipped)


def test_random_damage_never_raises():
    dice = random.Random(1)
    data = own_log() + release_log()
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(20):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        parse(bytes(damaged))
    assert parse(b"") == ([], [])


def test_the_releases_own_log():
    folder = os.environ.get("DFA_TEST_DATA_DIR", "")
    path = Path(folder, "..", "reference", "release_log_bottleneck.txt")
    if not folder or not path.exists():
        pytest.skip("there is no log of the 2019 release beside DFA_TEST_DATA_DIR")
    runs, skipped = parse(path.read_bytes())
    assert [run.name for run in runs] == ["std-1/seed-0", "std-118/seed-0"] and skipped == []
    assert [list(run.epochs) for run in runs] == [list(range(1, 51))] * 2
    last = runs[1].epochs[50]
    assert (last["train_accuracy"], last["test_accuracy"]) == (58.5, 47.6)
    assert [last["alignment"][f"act{i}"]["mean"] for i in (1, 2, 3)] == [0.1392, 0.7557, 0.5329]


def retrieve(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["log_retrieval.py", *map(str, arguments)])
    try:
        code = log_retrieval.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command_prints_lines_or_writes_folders(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log() + b"2026-11-23 16:56:17  alignment act1: mean 0.")
    code, out, err = retrieve(monkeypatch, capsys, log)
    assert code == 0
    printed = [json.loads(line) for line in out.splitlines()]
    assert [line.pop("run") for line in printed] == ["fc-tanh/seed-0"] * 5
    assert err.startswith(f"{log}:18: skipped, damaged line")

    code, _, _ = retrieve(monkeypatch, capsys, log, "--output", tmp_path / "out")
    lines = (tmp_path / "out/fc-tanh/seed-0/metrics.jsonl").read_text().splitlines()
    assert code == 0 and [json.loads(line) for line in lines] == printed
    for line in printed:
        line.pop("crc32")
    folder = RunFolder(tmp_path / "out/fc-tanh/seed-0")
    assert folder.metrics() == printed == [metrics(epoch) for epoch in range(1, 6)]

    (tmp_path / "out/fc-tanh/seed-0/metrics.jsonl").write_text("mine")
    code, out, _ = retrieve(monkeypatch, capsys, log, "--output", tmp_path / "out")
    assert code == 0 and "left as it is" in out
    assert (tmp_path / "out/fc-tanh/seed-0/metrics.jsonl").read_text() == "mine"


def test_the_exit_code_says_whether_anything_was_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").write_text("nothing here\n")
    assert retrieve(monkeypatch, capsys, tmp_path / "empty")[0] == 1
    assert retrieve(monkeypatch, capsys)[0] == 2
    code, _, err = retrieve(monkeypatch, capsys, tmp_path / "missing")
    assert code == 2 and err.count("\n") == 1 and "missing" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run on the digits that was killed after two epochs and gone on with."""
    folder = RunFolder(tmp_path_factory.mktemp("results") / "tiny" / "seed-3")
    experiment = Experiment("tiny", Network(hidden=(8, 7)), learning_rate=0.1)
    settings = {"experiment": asdict(experiment), "seed": 3, "dataset": "Digits", "epochs": 4}
    settings |= {"batch_size": 100, "feedback_placement": "every-layer", "precision": "float32"}
    killed = Mock(side_effect=[None, KeyboardInterrupt])
    arguments = experiment, load("Digits", "none"), folder, settings, torch.device("cpu"), Mock()
    with pytest.raises(KeyboardInterrupt):
        train(*arguments, killed, threading.Event())
    train(*arguments, Mock(), threading.Event())
    return folder


def test_the_log_of_a_real_run_gives_its_metrics_to_the_byte(trained, tmp_path):
    (run,), skipped = parse((trained.path / "log.txt").read_bytes())
    assert run.name == "tiny/seed-3" and skipped == []
    assert list(run.epochs.values()) == trained.metrics() and len(run.epochs) == 4
    assert log_retrieval.restore(run, tmp_path)
    for name in ("metrics.jsonl", "config.json"):
        ours, theirs = ((path / name).read_text() for path in (tmp_path / run.name, trained.path))
        if name == "config.json":
            ours, theirs = json.loads(ours)["settings"], json.loads(theirs)["settings"]
        assert ours == theirs


def test_a_real_log_cut_anywhere_keeps_every_epoch_before_the_cut(trained):
    data = (trained.path / "log.txt").read_bytes()
    ends = [match.end() for match in re.finditer(rb"  epoch \d/4: .*\n", data)]
    assert len(ends) == 4
    dice = random.Random(2)
    for cut in (dice.randrange(len(data)) for _ in range(200)):
        runs, _ = parse(data[:cut])
        found = runs[0].epochs if runs else {}
        complete = sum(position <= cut for position in ends)
        assert len(found) >= complete
        assert list(found.values()) == trained.metrics()[: len(found)]


def test_a_run_whose_settings_are_damaged_keeps_its_name_and_its_epochs(trained):
    data = (trained.path / "log.txt").read_bytes()
    for damage in (b'"epochs": \xff4', b'"epochs": 4, "x": "\xff"', b'"epochs": 4;'):
        (run,), skipped = parse(data.replace(b'"epochs": 4', damage))
        assert run.name == "tiny/seed-3" and list(run.epochs.values()) == trained.metrics()
        known = {"seed": 3, "dataset": "Digits", "epochs": 4, "experiment": {"name": "tiny"}}
        assert run.settings == known | {"batch_size": None, "feedback_placement": None}
        assert "damaged" in skipped[0].reason and skipped[0].line == 2
    (run,), skipped = parse(data.replace(b"settings", b"sett\xffngs"))
    assert list(run.epochs.values()) == trained.metrics()
    assert skipped[0].line == 2 and skipped[0].reason.startswith("damaged line, or of an unknown")
    assert [skip.reason for skip in skipped[1:]] == ["tiny/seed-3: its settings are lost"]


@pytest.mark.parametrize("log", [own_log, release_log])
@pytest.mark.parametrize("bar", [b" 40%|####  | 2/5 [00:01<00:02]", b"\r 40%|####  | 2/5"])
def test_a_progress_bar_in_front_of_a_line_does_not_hide_it(log, bar):
    (expected,), _ = parse(log())
    noisy = b"".join(bar + line for line in log().splitlines(keepends=True))
    assert parse(noisy) == ([expected], [])


def test_a_line_that_was_torn_and_written_on_costs_only_itself():
    data = own_log()
    torn = data[: data.index(b"epoch 3/5") + 30]
    (first, second), skipped = parse(torn + own_log("other"))
    assert sorted(first.epochs) == [1, 2] and [skip.line for skip in skipped] == [11]
    assert second.name == "other/seed-0" and len(second.epochs) == 5


def test_runs_of_one_name_and_other_settings_are_not_mixed():
    runs, _ = parse(own_log() + own_log(epochs=3, shift=1.0) + own_log())
    assert [run.name for run in runs] == ["fc-tanh/seed-0", "fc-tanh/seed-0-attempt-2"]
    assert [run.settings["epochs"] for run in runs] == [5, 3]
    assert list(runs[0].epochs.values()) == [metrics(epoch) for epoch in range(1, 6)]
    assert list(runs[1].epochs.values()) == [metrics(epoch, 1.0) for epoch in range(1, 4)]


def test_a_release_run_that_ended_before_its_first_epoch_counts_for_nothing():
    whole = release_log()
    cut = whole[: whole.index(b"4_Linear(out=10)")]
    (run,), _ = parse(cut + b"\n" + whole)
    assert run.name == "std-118/seed-0" and run.epochs == parse(whole)[0][0].epochs


def test_a_seed_that_cannot_be_read_is_not_guessed():
    second = release_log(seed=2).replace(b"Seeding with \x1b[1m2", b"Seeding with \x1b[1m\xff2")
    runs, skipped = parse(release_log(seed=1) + second + release_log(seed=4))
    names = ["std-118/seed-1", "std-118/seed-unknown", "std-118/seed-4"]
    assert [run.name for run in runs] == names and runs[1].settings["seed"] is None
    assert len(skipped) == 1 and skipped[0].reason.startswith("damaged line: Seeding")


CNN = ("0_Tanh()", "1_BatchNorm2d(32)", "2_MaxPool2d(3)", "3_Conv2d(32)")


@pytest.mark.parametrize("layers, lost, names", [
    (CNN, 2, ["conv1", "act1", "bn1", "maxp1"]), (FC, 0, ["lin1", "act1", "lin2", "act2", "lin3"])
], ids=["cnn", "fc"])  # fmt: skip
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_line_that_is_lost_in_all_epochs_leaves_positions_as_names(layers, lost, names, epochs):
    data = release_log(layers=layers, epochs=epochs)
    at = data.index(layers[lost].encode())
    (run,), skipped = parse(data[:at] + b"\xff" + data[at:])
    positions = [str(i) for i in range(len(layers)) if i != lost]
    assert list(run.epochs[epochs]["alignment"]) == (positions if epochs == 1 else names)
    gap = f"std-118/seed-0: epoch 1 lacks the alignment of {names[lost]}"
    assert [skip.reason for skip in skipped] == ([] if epochs == 1 else [gap])


def test_a_log_that_cannot_be_taken_does_not_keep_the_next_one_from_it(
    tmp_path, monkeypatch, capsys
):
    first, second, good = tmp_path / "missing.txt", tmp_path / "other.txt", tmp_path / "log.txt"
    second.write_bytes(own_log("cnn-tanh", epochs=4))  # of other settings than what is there
    RunFolder(tmp_path / "cnn-tanh/seed-0").start(settings_of("cnn-tanh", epochs=3), {})
    good.write_bytes(own_log())
    code, out, err = retrieve(monkeypatch, capsys, first, second, good, "--output", tmp_path)
    assert code == 2 and out == f"{tmp_path}/fc-tanh/seed-0: 5 epochs\n"
    lines = err.splitlines()
    assert len(lines) == 2 and "missing.txt" in lines[0] and "epochs is 3 there, now 4" in lines[1]


def test_several_logs_and_runs_go_where_their_names_say(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(release_log() + release_log())
    second.write_bytes(b"nothing\n" + own_log(seed=2))
    code, out, err = retrieve(monkeypatch, capsys, first, second)
    assert code == 0 and err == ""
    runs = [json.loads(line)["run"] for line in out.splitlines()]
    names = ["std-118/seed-0", "std-118/seed-0-attempt-2", "fc-tanh/seed-2"]
    assert runs == [names[0]] * 4 + [names[1]] * 4 + [names[2]] * 5
    code, out, _ = retrieve(monkeypatch, capsys, first, second, "--output", tmp_path / "out")
    assert code == 0 and len(out.splitlines()) == 3
    for name, epochs in zip(names, (4, 4, 5)):
        folder = RunFolder(tmp_path / "out" / name)
        assert len(folder.metrics()) == epochs and folder.finished()
        assert folder.config()["environment"] == {"retrieved": True}


def test_numbers_that_cannot_be_are_not_believed_though_their_line_is_whole():
    head = b"".join(own_log().splitlines(keepends=True)[:2])
    good = epoch_lines(metrics(1), 5)
    for old, new in (("accuracy 31", "accuracy 131"), ("epoch 1/", "epoch 0/"),
                     ("loss 1.9", "loss -1.9"), ("accuracy 30.5000", "accuracy nan"),
                     ("mean 0.0800", "mean 1.0800")):  # fmt: skip
        changed = [line.replace(old, new) for line in good]
        assert changed != good
        runs, (skip,) = parse(head + logged(changed, settings_of()))
        assert runs == [] and skip.reason.startswith("damaged line (")


def test_lines_of_another_run_are_not_taken_for_this_ones():
    ours, other = (own_log(seed=seed, shift=seed).splitlines(keepends=True) for seed in (0, 1))
    mixed = ours[: 2 + 3 * 2] + other[2 + 3 * 2 :]
    (run,), skipped = parse(b"".join(mixed))
    assert list(run.epochs.values()) == [metrics(1), metrics(2)]
    assert len(skipped) == 9 and all("of an unknown run" in skip.reason for skip in skipped)
    both, skipped = parse(b"".join([*other[:2], *mixed]))
    assert [run.name for run in both] == ["fc-tanh/seed-1", "fc-tanh/seed-0"]
    assert list(both[0].epochs.values()) == [metrics(epoch, 1) for epoch in (3, 4, 5)]
    assert list(both[1].epochs.values()) == [metrics(1), metrics(2)]
    assert [skip.reason for skip in skipped] == ["fc-tanh/seed-1: epochs 1 to 2 are missing"]


@pytest.mark.parametrize("what", ["..", "../../x", "/etc/x", "a" * 300, "x for 5 epochs on", "."])
def test_a_name_in_a_log_leads_nowhere_else(tmp_path, monkeypatch, capsys, what):
    log = tmp_path / "log.txt"
    text = release_log().decode()
    log.write_text(re.sub(r"Training .* for 4 epochs", f"Training {what} for 4 epochs", text))
    (tmp_path / "a").mkdir()
    retrieve(monkeypatch, capsys, log, "--output", tmp_path / "a" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "log.txt"}
    assert {path.name for path in (tmp_path / "a").iterdir()} <= {"out"}


def test_what_is_shown_of_a_damaged_line_can_be_printed(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.txt"
    log.write_bytes(b"settings {\x1b]0;title\x07 \xff\x00\xe2\x80\xa8\n")
    code, out, err = retrieve(monkeypatch, capsys, log)
    assert code == 1 and out == "" and len(err.splitlines()) == 2
    assert all(c.isprintable() for c in err.replace("\n", ""))


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(own_log(epochs=12) * 1000 + b"".join(own_log(seed=n) for n in range(200)))
    command = [sys.executable, Path(log_retrieval.__file__), log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("name", ["fc-tanh", "fc-tanh/seed-0", "fc-tanh/seed-0/config.json"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, name):
    log, blocked = tmp_path / "log.txt", tmp_path / "out" / name
    log.write_bytes(own_log())
    blocked.parent.mkdir(parents=True)
    if name.endswith("config.json"):
        blocked.mkdir()
    else:
        blocked.write_text("mine")
    code, out, err = retrieve(monkeypatch, capsys, log, "--output", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and str(blocked) in err
