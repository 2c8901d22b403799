"""The folder of one run on disk: what was asked for, and all that came out of it.

    config.json    every setting, the library versions, the device, the git commit
    metrics.jsonl  one line per epoch
    angles.npz     per-sample cosines: one float32 array (epochs, samples) per layer
    log.txt        the same for people
    checkpoint.pt  while the run goes on: all that is needed to go on after the last epoch
    state.pt       once it is finished: the weights and the feedback matrix

Files are replaced whole or appended line by line, so a run may be killed at any instant. Where they
disagree after that, the checkpoint's epoch counts.
"""

import fcntl
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mltools.errors import UserError
from mltools.files import remove_leftovers, write_atomically

KEYS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


class RunFolder:
    """Reads and writes the files of one run. Nothing is created before `start`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def config(self) -> dict | None:
        """The `config.json` of this folder, or None where there is none.

        Raises UserError if it cannot be read.
        """
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config["settings"], dict):
                raise ValueError("settings is no object")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): move its folder away") from None
        return config

    def differences(self, settings: dict) -> list[str]:
        """Where the settings of the run in this folder, if there is one, are others than these."""
        config = self.config()
        if config is None:
            return []
        there, asked = _flat(config["settings"]), _flat(json.loads(json.dumps(settings)))
        return [
            f"{key} is {there.get(key)!r} there, now {asked.get(key)!r}"
            for key in sorted({*there, *asked})
            if there.get(key) != asked.get(key)
        ]

    def check(self, settings: dict) -> None:
        """Raises UserError if this folder belongs to a run with other settings."""
        differences = self.differences(settings)
        if differences:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}): "
                "choose another --results-dir, or set that folder aside with --force"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps it from other runs until the block or the process ends.

        Raises UserError if another process is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "log.txt", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is at work on this run: wait for its end, or "
                    "stop it"
                ) from None
            yield

    def set_aside(self) -> Path:
        """Renames the folder, so that another run can take its place; says what it is called now.

        Raises UserError if another process is at work in it.
        """
        with self.locked():
            numbers = itertools.count(1)
            aside = (self.path.with_name(f"aside-{i}-{self.path.name}") for i in numbers)
            return self.path.rename(next(path for path in aside if not path.exists()))

    def metrics(self) -> list[dict]:
        """The intact epochs of `metrics.jsonl`, in order; a torn last line is left out.

        Raises UserError if an earlier line is damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        epochs = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
            try:
                epoch = json.loads(line)
                after = epochs[-1]["epoch"] if epochs else 0
                intact = all(key in epoch for key in KEYS) and epoch["epoch"] > after
            except (ValueError, TypeError):
                intact = False
            if not intact:
                raise UserError(f"{path}: line {number} is damaged: move the run's folder away")
            epochs.append(epoch)
        return epochs

    def finished(self) -> bool:
        """Whether the metrics reach the end: the last epoch asked for, or one that diverged."""
        metrics, config = self.metrics(), self.config()
        if not metrics or config is None:
            return False
        return metrics[-1]["epoch"] >= config["settings"]["epochs"] or diverged(metrics[-1])

    def complete(self) -> bool:
        """Whether nothing is left to do: a run's last file is there, or it came out of a log."""
        names = {path.name for path in self.path.glob("*")}
        ended = "state.pt" in names or "log.txt" not in names
        return self.finished() and ended and "checkpoint.pt" not in names

    def start(self, settings: dict, environment: dict) -> None:
        """Makes the folder and its `config.json`, if they are not there."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        if self.config() is None:
            config = {"settings": settings, "environment": environment}
            text = json.dumps(config, indent=2) + "\n"
            self.write("config.json", lambda file: file.write(text.encode()))

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Replaces a file of the folder whole."""
        write_atomically(self.path / name, write)

    def rewind(self, epochs: int) -> None:
        """Forgets what comes after so many epochs."""
        self.write_metrics([line for line in self.metrics() if line["epoch"] <= epochs])

    def write_metrics(self, epochs: list[dict]) -> None:
        """Replaces `metrics.jsonl` whole."""
        text = "".join(json.dumps(line) + "\n" for line in epochs)
        self.write("metrics.jsonl", lambda file: file.write(text.encode()))

    def angles(self) -> dict[str, np.ndarray]:
        """Layer name to per-sample cosines, float32 (epochs, samples).

        Raises UserError if the file is damaged.
        """
        path = self.path / "angles.npz"
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # zip, header and value errors alike
            raise UserError(f"{path} cannot be read ({error}): move its folder away") from None

    def add_epoch(self, metrics: dict, angles: dict[str, np.ndarray]) -> None:
        """Puts down one epoch: its line of metrics, and the cosines (samples,) of each layer."""
        done = metrics["epoch"] - 1
        before = self.angles()
        whole = {
            name: np.concatenate([before[name][:done], row[None]]) if name in before else row[None]
            for name, row in angles.items()
        }
        self.write("angles.npz", lambda file: np.savez(file, **whole))
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log(self, *lines: str) -> None:
        """Appends lines to `log.txt`, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n" for line in lines)


def diverged(metrics: dict) -> bool:
    """Whether this epoch ended with a loss that is no number."""
    return metrics["train_loss"] is None or metrics["test_loss"] is None


def rounded(value: float) -> float | None:
    """A number of `metrics.jsonl`, as precise as in the log; what is no number is null in JSON."""
    return round(float(value), 4) if math.isfinite(value) else None


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
