"""Records that carry the right checksum are still refused where they cannot be a run's."""

import json
import zlib
from contextlib import suppress

import pytest

from mltools.errors import UserError
from mltools.results import RunFolder
from mltools.tables import summarise

SETTINGS = {
    "experiment": {"name": "fc"},
    "seed": 0,
    "dataset": "tiny",
    "epochs": 1,
    "batch_size": 8,
    "feedback_placement": "release",
}
EPOCH = {
    "epoch": 1,
    "train_loss": 1.5,
    "train_accuracy": 40.0,
    "test_loss": 1.6,
    "test_accuracy": 39.0,
    "alignment": {"act1": {"mean": 0.5, "std": 0.1}},
    "seconds": 1.0,
}
LAYER = {"mean": 0.5, "std": 0.1}
DEEP = 10_000


def with_checksum(text, start=0):
    """JSON text with the checksum that it would have; the way the text is written is kept."""
    if not text.endswith("}"):
        return text
    with suppress(ValueError, RecursionError):  # then no checksum is right
        start = zlib.crc32(json.dumps(json.loads(text)).encode(), start)
    return text[:-1] + ", " * (text != "{}") + f'"crc32": "{start:08x}"}}'


def write(path, settings=SETTINGS, epoch=EPOCH):
    """A run of one epoch by hand; what is text already is taken as it is."""
    path.mkdir(parents=True)
    if not isinstance(settings, str):
        settings = json.dumps(settings)
    config = f'{{"settings": {settings}, "environment": {{}}}}'
    (path / "config.json").write_text(with_checksum(config), "utf-8")
    start = zlib.crc32(json.dumps(SETTINGS).encode())
    line = with_checksum(epoch if isinstance(epoch, str) else json.dumps(epoch), start)
    (path / "metrics.jsonl").write_text(line + "\n", "utf-8")
    return RunFolder(path)


def test_the_files_by_hand_are_those_that_are_written(tmp_path):
    by_hand, folder = write(tmp_path / "hand"), RunFolder(tmp_path / "run")
    assert by_hand.config()["settings"] == SETTINGS and by_hand.metrics() == [EPOCH]
    folder.start(SETTINGS, {})
    folder.write_metrics([EPOCH])
    for name in ("config.json", "metrics.jsonl"):
        ours, theirs = ((one.path / name).read_text() for one in (by_hand, folder))
        assert json.loads(ours) == json.loads(theirs)
    assert ours == theirs


def changed(record, key, value):
    return {**record, key: value}


def text_with(record, key, value):
    """The record's JSON with `value` as it stands in the place of that of `key`."""
    return json.dumps({**record, key: "HERE"}).replace('"HERE"', value)


BAD_METRICS = {
    "no object": "[1, 2]",
    "no key": {},
    "text": changed(EPOCH, "train_loss", "1.5"),
    "boolean": changed(EPOCH, "epoch", True),
    "boolean loss": changed(EPOCH, "test_loss", False),
    "list": changed(EPOCH, "test_accuracy", [39.0]),
    "fraction of an epoch": changed(EPOCH, "epoch", 1.5),
    "epoch 0": changed(EPOCH, "epoch", 0),
    "huge epoch": changed(EPOCH, "epoch", 10**4000),
    "too many digits": text_with(EPOCH, "epoch", "1" * 5000),
    "accuracy 250": changed(EPOCH, "test_accuracy", 250),
    "negative": changed(EPOCH, "train_accuracy", -1e-9),
    "negative loss": changed(EPOCH, "train_loss", -0.5),
    "accuracy null": changed(EPOCH, "test_accuracy", None),
    "seconds": changed(EPOCH, "seconds", -1),
    "NaN": text_with(EPOCH, "test_loss", "NaN"),
    "Infinity": text_with(EPOCH, "test_loss", "Infinity"),
    "-Infinity": text_with(EPOCH, "seconds", "-Infinity"),
    "1e999": text_with(EPOCH, "test_loss", "1e999"),
    "alignment list": changed(EPOCH, "alignment", [LAYER]),
    "layer a number": changed(EPOCH, "alignment", {"act1": 0.5}),
    "layer without std": changed(EPOCH, "alignment", {"act1": {"mean": 0.5}}),
    "cosine 1.5": changed(EPOCH, "alignment", {"act1": {"mean": 1.5, "std": 0.1}}),
    "negative std": changed(EPOCH, "alignment", {"act1": {"mean": 0.5, "std": -0.1}}),
    "layer with a line end": changed(EPOCH, "alignment", {"act\n1": LAYER}),
    "layer with a bar": changed(EPOCH, "alignment", {"a|b": LAYER}),
    "deep": text_with(EPOCH, "seconds", "[" * DEEP + "]" * DEEP),
    "deep objects": text_with(EPOCH, "alignment", '{"a":' * DEEP + "1" + "}" * DEEP),
    "twice": json.dumps(EPOCH)[:-1] + ', "epoch": 1}',
    "mark": "\ufeff" + json.dumps(EPOCH),
}
BAD_SETTINGS = {
    "list": [],
    "null": None,
    "no key": {},
    "epochs text": changed(SETTINGS, "epochs", "1"),
    "epochs boolean": changed(SETTINGS, "epochs", True),
    "epochs 0": changed(SETTINGS, "epochs", 0),
    "epochs 1e999": text_with(SETTINGS, "epochs", "1e999"),
    "huge batch": changed(SETTINGS, "batch_size", 10**4000),
    "data set with a line end": changed(SETTINGS, "dataset", "a\nb"),
    "data set null": changed(SETTINGS, "dataset", None),
    "placement a bar": changed(SETTINGS, "feedback_placement", "a|b"),
    "seed negative": changed(SETTINGS, "seed", -1),
    "experiment text": changed(SETTINGS, "experiment", "fc"),
    "name a path": changed(SETTINGS, "experiment", {"name": "../x"}),
    "key with a line end": changed(SETTINGS, "a\nb", 1),
    "half a character": text_with(SETTINGS, "more", '"\\ud800"'),
    "deep": text_with(SETTINGS, "more", "[" * DEEP + "]" * DEEP),
    "less deep": text_with(SETTINGS, "more", "[" * 50 + "]" * 50),
    "twice": json.dumps(SETTINGS)[:-1] + ', "seed": 0}',
}


@pytest.mark.parametrize("epoch", BAD_METRICS.values(), ids=BAD_METRICS)
def test_metrics_that_cannot_be_are_one_line(tmp_path, epoch):
    folder = write(tmp_path / "run", epoch=epoch)
    for read in (folder.metrics, folder.finished, lambda: summarise("fc", [folder])):
        with pytest.raises(UserError, match=r"metrics.jsonl: line 1 cannot be read") as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert "checksum" not in str(error.value) or not isinstance(epoch, dict)


@pytest.mark.parametrize("settings", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_be_are_one_line(tmp_path, settings):
    folder = write(tmp_path / "run", settings)
    for read in (folder.config, lambda: folder.check(SETTINGS), lambda: summarise("fc", [folder])):
        with pytest.raises(UserError, match=r"config.json cannot be read") as error:
            read()
        assert str(error.value).isprintable() and len(str(error.value)) < 500
        assert "checksum" not in str(error.value)


def test_a_diverged_epoch_and_a_lost_cosine_are_no_damage(tmp_path):
    lost = {"act1": {"mean": None, "std": None}, "act2": {"mean": 0.5, "std": None}}
    folder = write(tmp_path / "a" / "seed-0", epoch=changed(EPOCH, "alignment", lost))
    row = summarise("fc", [folder])
    assert row.test == (39.0, None) and row.alignment == {"act2": (0.5, None)}
    diverged = {**EPOCH, "train_loss": None, "train_accuracy": None}
    folder = write(tmp_path / "b" / "seed-0", epoch=diverged)
    assert summarise("fc", [folder]).note == "1 diverged"
