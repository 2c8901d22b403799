"""Every intact epoch of a log is parsed, and every lost epoch is reported."""

import json
import os
import sys
from pathlib import Path

import pytest
from made import STAMP, metrics, own_log, release_log, settings_of

import log_retrieval
from mltools.logs import epoch_lines, first_lines, parse_log
from mltools.results import RunFolder

WHOLE = [metrics(epoch) for epoch in range(1, 6)]


FC_NAMES = ["lin1", "act1", "lin2", "act2", "lin3"]


def names_of(runs):
    return [run.name for run in runs]


def epochs_of(run):
    return [epoch["epoch"] for epoch in run.epochs]


def test_the_lines_of_a_log_are_parsed_exactly():
    run = "fc-tanh seed 0"
    lines = [*first_lines(run, settings_of(), "cpu")]
    lines += [line for epoch in WHOLE for line in epoch_lines(run, epoch, 5)]
    assert lines == [line[21:] for line in own_log().decode().splitlines()]
    (run,), skipped = parse_log(own_log())
    assert run.path == Path("fc-tanh/seed-0") and run.epochs == WHOLE and skipped == []
    assert run.settings == settings_of() and run.environment == {"retrieved": True}


def test_a_diverged_epoch_has_nan_in_its_lines():
    cosine = {"mean": None, "std": None}
    epoch = {**metrics(1), "test_loss": None, "seconds": None, "alignment": {"act1": cosine}}
    lines = epoch_lines("fc seed 0", epoch, 5)
    assert [line.count("nan") for line in lines] == [2, 2]
    assert parse_log("\n".join(lines).encode())[0][0].epochs == [epoch]


def test_a_run_that_was_killed_and_resumed_is_one_run():
    lines = own_log().splitlines(keepends=True)
    resuming = f"{STAMP}  fc-tanh seed 0: resuming after epoch 2\n".encode()
    (run,), skipped = parse_log(b"".join([*lines[: 2 + 3 * 3], resuming, *lines[2 + 2 * 3 :]]))
    assert run.epochs == WHOLE and skipped == []


def test_a_line_torn_by_a_kill_does_not_affect_the_next_line():
    data = own_log()
    torn = data[: data.index(b"epoch 3/5") + 30]
    (first, second), skipped = parse_log(torn + own_log("other"))
    assert epochs_of(first) == [1, 2] and [skip.line for skip in skipped] == [11]
    assert second.name == "other/seed-0" and len(second.epochs) == 5


def test_a_heading_starts_another_attempt():
    runs, skipped = parse_log(own_log() + own_log(epochs=3, shift=1.0) + own_log(seed=1))
    assert names_of(runs) == ["fc-tanh/seed-0", "fc-tanh/seed-0-attempt-2", "fc-tanh/seed-1"]
    assert [run.settings["epochs"] for run in runs] == [5, 3, 5] and skipped == []
    assert runs[1].epochs == [metrics(epoch, 1.0) for epoch in range(1, 4)]


def test_a_run_restarted_with_the_same_settings_is_one_run():
    killed = own_log(epochs=5, shift=1.0).splitlines(keepends=True)[: 2 + 3 * 4 + 1]
    again = own_log().replace(b"act1, epoch 5: mean", b"act1, epoch 5: m\xffan")
    for data, number in ((b"".join(killed) + again, 5), (again + b"".join(killed), 4)):
        (run,), skipped = parse_log(data)
        assert epochs_of(run) == [1, 2, 3, 4, 5] and len(skipped) == 2
        newer = WHOLE if number == 5 else [metrics(epoch, 1.0) for epoch in range(1, 6)]
        assert run.epochs[:4] == newer[:4] and list(run.epochs[4]["alignment"]) == ["lin1"]


def test_interleaved_lines_of_several_runs_without_times_are_parsed():
    logs = (own_log(seed=seed, shift=seed).splitlines(keepends=True) for seed in (0, 1))
    lines = [line[21:] for pair in zip(*logs) for line in pair if b"settings" not in line]
    runs, skipped = parse_log(b"".join(lines) + b"\n| experiment | accuracy |\n")
    assert names_of(runs) == ["fc-tanh/seed-0", "fc-tanh/seed-1"]
    for seed, run in enumerate(runs):
        assert run.epochs == [metrics(epoch, seed) for epoch in range(1, 6)]
        assert skipped[seed].reason == f"{run.name}: its settings are lost"


@pytest.mark.parametrize("lost, settings", [
    ((b"5 epochs of ",), settings_of()),
    ((b"settings {",), settings_of(batch_size=None)),
    ((b"5 epochs of ", b"settings {"), settings_of(batch_size=None, dataset="unknown")),
], ids=["heading", "settings", "both"])  # fmt: skip
@pytest.mark.parametrize("before", [0, 1], ids=["first attempt", "second attempt"])
def test_a_run_with_damaged_first_lines_keeps_its_epochs(lost, settings, before):
    data = own_log(shift=before)
    for text in lost:
        data = data.replace(text, text + b"\xff")
    runs, skipped = parse_log(own_log(epochs=4) * before + data)
    assert len(runs) == 1 + before and runs[-1].settings == settings
    assert runs[-1].epochs == [metrics(epoch, before) for epoch in range(1, 6)]
    assert len([skip for skip in skipped if skip.line]) == len(lost)


@pytest.mark.parametrize("old, new", [
    ('"seed"', '"s"'), ("5", "0"), ("5", "5;"), ("fc-", "../fc-"), ("128", "[" * 9999 + "]" * 9999),
])  # fmt: skip
def test_impossible_settings_are_skipped(old, new):
    settings = json.dumps(settings_of())
    data = own_log().replace(settings.encode(), settings.replace(old, new).encode())
    (run,), skipped = parse_log(data)
    assert run.settings == settings_of(batch_size=None) and run.epochs == WHOLE
    assert skipped[0].line == 2 and "fc-tanh seed 0: settings {" in skipped[0].reason


@pytest.mark.parametrize("old, new", [
    (b"1/5: train loss 1.9000 accuracy 31", b"1/5: train loss 1.9000 accuracy 131"),
    (b"1/5: train", b"9/5: train"),
])  # fmt: skip
def test_a_damaged_first_epoch_does_not_lose_the_settings(old, new):
    (run,), skipped = parse_log(own_log().replace(old, new))
    assert run.settings == settings_of() and run.epochs == WHOLE[1:]
    assert [skip.line for skip in skipped] == [5, 0]


def test_the_alignment_of_a_killed_epoch_is_not_given_to_the_next_attempt():
    killed = own_log(shift=1.0).splitlines(keepends=True)[:4]
    lost = own_log().replace(b"act1, epoch 1: mean", b"act1, epoch 1: m\xffan")
    (run,), _ = parse_log(b"".join(killed) + lost)
    assert list(run.epochs[0]["alignment"]) == ["lin1"]


def test_corrupt_bytes_lose_at_most_their_epoch_and_are_reported():
    data = own_log().replace(b"act1, epoch 2: mean 0.11", b"act1, epoch 2: mean 0.1\xff")
    (run,), skipped = parse_log(data.replace(b"epoch 4/5: train", b"epoch 4/5: tr\xc3in"))
    assert list(run.epochs[1]["alignment"]) == ["lin1"]
    assert [WHOLE[0], run.epochs[1], WHOLE[2], WHOLE[4]] == run.epochs
    assert [skip.line for skip in skipped] == [7, 14, 0, 0]
    gaps = ["epoch 4 is missing", "epoch 2 lacks the alignment of act1"]
    assert [skip.reason for skip in skipped[2:]] == [f"fc-tanh/seed-0: {gap}" for gap in gaps]


@pytest.mark.parametrize("old, new, reason", [
    ("accuracy 31", "accuracy 131", "train_accuracy is 131.125"),
    ("accuracy 30.5000", "accuracy nan", "test_accuracy is None"),
    ("mean 0.0800", "mean 1.0800", "mean is 1.08"),
])  # fmt: skip
def test_impossible_numbers_are_skipped(old, new, reason):
    runs, (skip,) = parse_log(own_log(epochs=1).decode().replace(old, new).encode())
    assert runs == [] and skip.line == 5 and skip.reason.startswith(f"{reason}: fc-tanh seed 0")


@pytest.mark.parametrize("log", [own_log, release_log])
@pytest.mark.parametrize("old, new", [
    (b"\n", b"\r\n"),
    (b"\n", b"\n 40%|####      | 2/5 [00:01<00:02]\r"),
    (b"\n", b"\r 40%|####      | 2/5 [00:01<00:02]\n"),
    (STAMP.encode(), b" 40%|####      | 2/5 [00:01<00:02]" + STAMP.encode()),
    (STAMP.encode(), b"\x1b[1m" + STAMP.encode()),
])  # fmt: skip
def test_line_ends_progress_bars_and_colours_change_nothing(log, old, new):
    assert parse_log(log().replace(old, new)) == parse_log(log())


def test_the_releases_log_is_parsed_with_our_names():
    (run,), skipped = parse_log(release_log())
    assert run.name == "std-118/seed-0" and epochs_of(run) == [1, 2, 3, 4] and skipped == []
    assert run.settings == settings_of("std-118", epochs=4)
    third = run.epochs[2]
    assert (third["train_loss"], third["test_loss"]) == (1.728, 1.664)  # 128 * (0.0135, 0.013)
    assert (third["train_accuracy"], third["test_accuracy"]) == (33.5, 23.5)
    assert list(third["alignment"]) == FC_NAMES
    assert third["alignment"]["act2"] == {"mean": 0.3003, "std": 0.0031}
    assert [epoch["seconds"] for epoch in run.epochs] == [1.25, 2.25, 3.25, None]


@pytest.mark.parametrize("modules, names", [
    (f"{2 * 'Tanh MaxPool2d Conv2d '} Tanh MaxPool2d Flatten Linear Tanh Linear Linear",
     "conv1 act1 maxp1 conv2 act2 maxp2 conv3 act3 maxp3 flat lin1 act4 lin2"),
    ("Tanh BatchNorm2d MaxPool2d Flatten Linear Tanh BatchNorm1d Linear Linear",
     "conv1 act1 bn1 maxp1 flat lin1 act2 bn2 lin2"),
    (f"{2 * 'Conv2d Dropout2d Tanh MaxPool2d '} Flatten Linear Dropout Tanh Linear",
     "conv1 drop1 act1 maxp1 conv2 drop2 act2 maxp2 flat lin1 drop3 act3 lin2"),
], ids=["plain", "batchnorm", "dropout"])  # fmt: skip
def test_the_layers_of_the_releases_cnns_get_our_names(modules, names):
    """Without dropout, each line has the name of the next layer; the last line has its own."""
    layers = [f"{position}_{module}(p=0)" for position, module in enumerate(modules.split())]
    (run,), skipped = parse_log(release_log(layers=layers, epochs=1))
    alignment = run.epochs[0]["alignment"]
    assert list(alignment) == names.split() and skipped == []
    assert alignment["lin1"]["mean"] == round(0.1 + names.split().index("lin1") / 10000, 4)


@pytest.mark.parametrize("end, epochs", [("EPOCH 3/4", [[1, 2], [1, 2, 3, 4]]),
                                         ("4_Linear", [[1, 2, 3, 4]])])  # fmt: skip
def test_a_restart_of_the_release_is_another_attempt_if_the_first_has_an_epoch(end, epochs):
    whole = release_log()
    runs, _ = parse_log(whole[: whole.index(end.encode())] + b"\n" + whole)
    assert [epochs_of(run) for run in runs] == epochs
    assert names_of(runs) == ["std-118/seed-0", "std-118/seed-0-attempt-2"][: len(epochs)]


def test_epochs_after_a_lost_heading_of_the_release_are_not_given_to_the_run_before():
    runs, skipped = parse_log(release_log() + release_log().replace(b"Training w", b"Train\xffng"))
    assert runs == parse_log(release_log())[0]
    assert skipped[0].reason == "epoch of an unknown run: EPOCH 1/4:"


def test_an_unreadable_seed_is_not_guessed():
    second = release_log(seed=2).replace(b"Seeding with \x1b[1m2", b"Seeding with \x1b[1m\xff2")
    runs, (skip,) = parse_log(release_log(seed=1) + second + release_log(seed=4))
    assert names_of(runs) == ["std-118/seed-1", "std-118/seed-unknown", "std-118/seed-4"]
    assert runs[1].settings["seed"] is None and skip.reason.startswith("damaged line: Seeding")


@pytest.mark.parametrize("epochs, names", [(1, ["1", "2", "3", "4"]), (2, FC_NAMES)])
def test_layers_are_named_by_position_if_a_layer_is_lost_in_all_epochs(epochs, names):
    (run,), skipped = parse_log(release_log(epochs=epochs).replace(b"0_Linear", b"\xff", 1))
    assert list(run.epochs[-1]["alignment"]) == names
    gap = "std-118/seed-0: epoch 1 lacks the alignment of lin1"
    assert [skip.reason for skip in skipped] == [gap][: epochs - 1]


@pytest.mark.parametrize("what", ["..", "../../x", "/etc/x", "a" * 300, "x for 5 epochs on", "."])
def test_a_name_in_a_log_cannot_lead_out_of_the_output_folder(what):
    name = "with a bottlenecking rate 0.8525 initialized by STD"
    runs, _ = parse_log(release_log().decode().replace(name, what).encode())
    assert all(len(run.path.parts) == 2 and run.path.parts[0].strip(".") for run in runs)


@pytest.mark.parametrize("path, names, epochs, accuracies, cosines", [
    ("reference/release_log_bottleneck.txt", ["std-1/seed-0", "std-118/seed-0"], 50, (58.5, 47.6),
     {"act1": 0.1392, "act2": 0.7557, "act3": 0.5329}),
    ("cases/release_cnn_dropout_log.txt", ["with-dfa-initialized-by-std/seed-0"], 1, (10.3, 10.5),
     {"conv2": -0.0041, "maxp3": 0.0009, "lin1": 0.7103, "drop4": 0.9985, "act4": 0.9998}),
])  # fmt: skip
def test_original_logs_of_the_release_are_parsed(path, names, epochs, accuracies, cosines):
    folder = os.environ.get("DFA_TEST_DATA_DIR", "")
    if not folder or not Path(folder, "..", path).exists():
        pytest.skip(f"there is no {path} beside DFA_TEST_DATA_DIR")
    runs, skipped = parse_log(Path(folder, "..", path).read_bytes())
    assert names_of(runs) == names and skipped == []
    assert all(epochs_of(run) == list(range(1, epochs + 1)) for run in runs)
    last = runs[-1].epochs[-1]
    assert (last["train_accuracy"], last["test_accuracy"]) == accuracies
    assert cosines.items() <= {name: c["mean"] for name, c in last["alignment"].items()}.items()


def main():
    """Runs log_retrieval.py, and exits with its code as the script does."""
    sys.exit(log_retrieval.main())


NAMES = ["std-118/seed-0", "pai-1/seed-0", "pai-1/seed-0-attempt-2", "fc-tanh/seed-2"]


def test_the_command_restores_the_folders_of_runs(start, tmp_path):
    logs = first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(release_log() + 2 * release_log("0.99875", "PAI"))
    second.write_bytes(b"nothing\n" + own_log(seed=2))
    (tmp_path / NAMES[0]).mkdir(parents=True)
    (tmp_path / NAMES[0] / "state.pt").touch()  # as in a finished run, without a checkpoint
    code, out, err = start(main, *logs, "--output", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{tmp_path / n}: {e} epochs" for n, e in zip(NAMES, (4, 4, 4, 5))]
    runs = [RunFolder(tmp_path / name).load() for name in NAMES]
    assert [len(run.epochs) for run in runs] == [4, 4, 4, 5] and runs[3].epochs == WHOLE
    assert all(run.finished and run.environment == {"retrieved": True} for run in runs)

    metrics = tmp_path / NAMES[3] / "metrics.jsonl"
    metrics.write_text("mine")
    _, out, _ = start(main, second, "--output", tmp_path)
    assert out == f"{metrics.parent}: has a metrics.jsonl, which is not changed\n"
    assert metrics.read_text() == "mine"
