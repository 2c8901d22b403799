"""The folder of a run on disk.

    config.json    every setting, the library versions, the device, the git commit
    metrics.jsonl  one line per epoch
    angles.npz     per-sample cosines: one float32 array (epochs, samples) per layer
    log.txt        the settings and metrics as lines of text
    checkpoint.pt  until the run is finished: its state, with the metrics and cosines so far
    state.pt       once the run is finished: the weights and the feedback matrix

The checkpoint is saved at the start, after each epoch and at an interruption; metrics.jsonl and
angles.npz are then written from its epochs. Each file but the log is replaced as a whole, so a run
may be killed at any time.
"""

import argparse
import itertools
import json
import math
import os
import re
import reprlib
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from mltools.errors import UserError, user_errors

RESTORE = "move it away, and restore it from log.txt with log_retrieval.py"
RESTORE_BOTH = "move it and metrics.jsonl away, and restore both from log.txt with log_retrieval.py"
NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)

Metrics = dict
"""The metrics of one epoch: a line of `metrics.jsonl`."""
Rule = Callable[[Any], bool]


@dataclass
class RunResult:
    """A run, loaded from its folder or retrieved from a log."""

    path: Path
    """The run's folder, whose path ends in `<experiment>/seed-<n>`."""
    settings: dict = field(default_factory=dict)
    """The settings in `config.json`; empty if there is no such file."""
    environment: dict = field(default_factory=dict)
    """The versions, device and commit in `config.json`."""
    epochs: list[Metrics] = field(default_factory=list)
    """The lines of `metrics.jsonl`, in order."""
    has_checkpoint: bool = False

    @property
    def name(self) -> str:
        """The name of the run, `<experiment>/seed-<n>`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def diverged(self) -> bool:
        """Returns whether a loss of the last epoch is NaN or infinite."""
        if not self.epochs:
            return False
        return None in (self.epochs[-1]["train_loss"], self.epochs[-1]["test_loss"])

    @property
    def trained(self) -> bool:
        """Returns whether no epoch is left to train: all epochs have ended, or the run diverged."""
        if not self.epochs or not self.settings:
            return False
        return self.diverged or self.epochs[-1]["epoch"] >= self.settings["epochs"]

    @property
    def finished(self) -> bool:
        """Returns whether the run is trained and its checkpoint is removed, as the last step."""
        return self.trained and not self.has_checkpoint


class RunFolder:
    """Loads and saves the files of one run. The constructor creates no file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def lock(self) -> FileLock:
        """Returns the run's lock, for a `with` statement; a killed process releases it too.

        `with` raises filelock.Timeout at once if another thread or process has the lock.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0)

    def load(self, with_epochs: bool = True) -> RunResult:
        """Loads the run. A missing file counts as empty; an incomplete last line is dropped.

        `with_epochs=False` skips `metrics.jsonl`. Raises UserError if a file cannot be read.
        """
        result = RunResult(self.path, has_checkpoint=(self.path / "checkpoint.pt").exists())
        path = self.path / "config.json"
        with user_errors(path, RESTORE_BOTH):
            if path.exists():
                config = json.loads(path.read_bytes())
                _check(config, settings=_is_dict, environment=_is_dict)
                check_settings(config["settings"])
                result.settings, result.environment = config["settings"], config["environment"]
        path = self.path / "metrics.jsonl"
        with user_errors(path, RESTORE):
            there = with_epochs and path.exists()
            lines = path.read_bytes().split(b"\n")[:-1] if there else []
        for number, line in enumerate(lines, 1):
            with user_errors(f"{path}: line {number}", RESTORE):
                metrics = json.loads(line)
                check_metrics(metrics)
                if result.epochs and metrics["epoch"] <= result.epochs[-1]["epoch"]:
                    raise ValueError("its epoch is not after the previous line's")
                result.epochs.append(metrics)
        return result

    def check(self, settings: dict) -> RunResult:
        """Loads the run, and checks that it can be trained or resumed with these settings.

        If there is a checkpoint, which contains the epochs too, `metrics.jsonl` is not read.

        Raises UserError if a file cannot be read, if the folder contains a run with other settings,
        or if an unfinished run has lost its checkpoint.
        """
        result = self.load(with_epochs=not (self.path / "checkpoint.pt").exists())
        differing = differences(result.settings, settings) if result.settings else ""
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings ({differing}): choose another "
                "--results-dir, or rename that folder with --force"
            )
        begun = bool(result.epochs) or (self.path / "state.pt").exists()
        if begun and not result.finished and not result.has_checkpoint:
            raise UserError(
                f"{self.path} has results of {len(result.epochs)} epochs and no checkpoint.pt to "
                "resume from: restore the lost file (log_retrieval.py restores metrics.jsonl), or "
                "rename the folder with --force"
            )
        return result

    def rename(self) -> Path:
        """Renames the folder to `aside-<i>-<name>`, to free its path; returns the new path."""
        paths = (self.path.with_name(f"aside-{i}-{self.path.name}") for i in itertools.count(1))
        return self.path.rename(next(path for path in paths if not path.exists()))

    def start(self, settings: dict, environment: dict) -> None:
        """Creates the folder and its `config.json`, if they are missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            config = {"settings": settings, "environment": environment}
            self.write("config.json", lambda file: file.write(_json(config, indent=2)))

    def remove_leftovers(self) -> None:
        """Removes temporary files of a killed process. The caller must hold the lock."""
        for path in self.path.glob(f".*.{'[0-9a-f]' * 32}"):
            path.unlink(missing_ok=True)

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Replaces a file of the folder, see `write_atomically`."""
        write_atomically(self.path / name, write)

    def write_metrics(self, epochs: Iterable[Metrics]) -> None:
        """Replaces `metrics.jsonl`: one line per epoch."""
        self.write("metrics.jsonl", lambda file: file.writelines(map(_json, epochs)))

    def write_angles(self, angles: Mapping[str, np.ndarray]) -> None:
        """Replaces `angles.npz`: for each layer its cosines, float32 (epochs, samples)."""
        self.write("angles.npz", lambda file: np.savez(file, allow_pickle=False, **angles))

    def log(self, *lines: str) -> None:
        """Appends lines to `log.txt`, each preceded by the current time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a temporary file, which replaces `path` once it is complete and on disk.

    Raises OSError as `open` and `write` do; `path` is then unchanged, the temporary file removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by `text` in UTF-8, see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def user_path(text: str) -> Path:
    """Converts the text of an option to a path, and expands a leading `~` as a shell does.

    Raises argparse.ArgumentTypeError if `~name` names an unknown user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}") from None


def differences(there: dict, asked: dict) -> str:
    """Describes the settings that differ between two runs in one line; empty if none differs."""
    there, asked = flattened(there), flattened(asked)
    return "; ".join(
        f"{key} is {there.get(key)!r} there, now {asked.get(key)!r}"
        for key in sorted({*there, *asked})
        if there.get(key) != asked.get(key)
    )


def flattened(nested: dict, prefix: str = "") -> dict:
    """Returns nested settings as a flat dict, with keys like `experiment.network.hidden`."""
    flat: dict = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_settings(settings: dict) -> None:
    """Checks the six settings that tables and logs need. Raises ValueError for a wrong one."""
    whole = _number(1, float("inf"), int)
    _check(
        settings,
        experiment=lambda value: _is_dict(value) and _is_name(value.get("name")),
        seed=_or_none(_number(0, 2**63 - 1, int)),
        dataset=_is_name,
        epochs=whole,
        batch_size=_or_none(whole),
        protocol=_or_none(_is_name),
    )


def make_metrics(
    epoch: int, numbers: Iterable[float], alignment: dict, seconds: float | None
) -> Metrics:
    """Returns the metrics of one epoch.

    Args:
        numbers: train loss, train accuracy, test loss and test accuracy.
        alignment: maps each layer to its cosine, `{"mean": ..., "std": ...}`.

    Raises ValueError as `check_metrics` does.
    """
    keys = "train_loss", "train_accuracy", "test_loss", "test_accuracy"
    values = dict(zip(keys, map(rounded, numbers), strict=True))
    metrics = {"epoch": epoch, **values, "alignment": alignment, "seconds": seconds}
    check_metrics(metrics)
    return metrics


def rounded(value: float) -> float | None:
    """Rounds a number to the log's 4 decimals; returns None for NaN and infinity, for JSON."""
    return round(float(value), 4) if math.isfinite(value) else None


def check_metrics(metrics: Metrics) -> None:
    """Checks a line of `metrics.jsonl`. Raises ValueError for a missing or wrong value."""
    percent, positive = _number(0, 100), _or_none(_number(0, sys.float_info.max))
    _check(
        metrics,
        epoch=_number(1, float("inf"), int),
        train_loss=positive,
        train_accuracy=percent,
        test_loss=positive,
        test_accuracy=percent,
        alignment=lambda value: _is_dict(value) and all(map(_is_name, value)),
        seconds=positive,
    )
    for cosine in metrics["alignment"].values():
        _check(cosine, mean=_or_none(_number(-1, 1)), std=_or_none(_number(0, 2)))


def _check(record: Any, **rules: Rule) -> None:
    if not _is_dict(record):
        raise ValueError("it is not a JSON object")
    for key, passes in rules.items():
        if key not in record:
            raise ValueError(f"{key} is missing")
        if not passes(record[key]):
            raise ValueError(f"{key} is {reprlib.repr(record[key])}")


def _number(low: float, high: float, *kinds: type) -> Rule:
    return lambda value: type(value) in (kinds or (int, float)) and low <= value <= high


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _json(record: dict, indent: int | None = None) -> bytes:
    return (json.dumps(record, indent=indent) + "\n").encode()
