"""The folder of one run on disk: what was asked for, and all that came out of it.

    config.json    every setting, the library versions, the device, the git commit
    metrics.jsonl  one line per epoch
    angles.npz     per-sample cosines: one float32 array (epochs, samples) per layer
    log.txt        the same for people
    checkpoint.pt  while the run goes on: all that is needed to go on where it was written
    state.pt       once it is finished: the weights and the feedback matrix

Files are replaced whole, the log aside, so a run may be killed at any instant. Where they disagree
after that, the checkpoint's epoch counts. Every number carries a checksum (see `mltools.records`,
`mltools.logs` and `mltools.archives`), so what is damaged is not taken for a result.
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

from mltools import logs
from mltools.archives import read_arrays
from mltools.errors import UserError
from mltools.files import reading, remove_leftovers, write_atomically, write_text
from mltools.records import (
    checksum,
    differences,
    diverged,
    metrics_problem,
    sealed,
    sealed_metrics,
    settings_problem,
    unsealed,
)

RETRIEVE = "move it away and bring it back out of log.txt with log_retrieval.py"
BRING_BACK = f"{RETRIEVE}, or move the folder away"
FILES = ("config.json", "metrics.jsonl", "angles.npz", "log.txt", "checkpoint.pt", "state.pt")


class RunFolder:
    """Reads and writes the files of one run. Nothing is created before `start`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def config(self) -> dict | None:
        """The `config.json` of this folder, or None where there is none.

        Raises UserError if it cannot be read.
        """
        path = self.path / "config.json"
        remedy = (
            "move it and metrics.jsonl away and bring both back out of log.txt with "
            "log_retrieval.py"
        )
        with reading(path, remedy):
            try:
                config = unsealed(path.read_bytes())
            except FileNotFoundError:
                return None
            problem = settings_problem(config.get("settings"))
            if problem:
                raise ValueError(problem)
        return config

    def check(self, settings: dict) -> None:
        """Raises UserError if this folder belongs to a run with other settings, or is no run's."""
        for name in FILES:
            if (self.path / name).is_dir():
                raise UserError(f"{self.path / name} is a folder, not a file: move it away")
        config = self.config()
        if config is None:
            return
        differing = differences(config["settings"], json.loads(json.dumps(settings)))
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings ({differing}): choose another "
                "--results-dir, or set that folder aside with --force"
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
            if not self._holds(file):
                raise UserError(f"{self.path}: another process has set this run aside: try again")
            yield

    def _holds(self, log: BinaryIO) -> bool:
        """Whether this is the folder's log still."""
        try:
            return os.path.samestat(os.fstat(log.fileno()), os.stat(self.path / "log.txt"))
        except FileNotFoundError:
            return False

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

        Raises UserError if an earlier line is damaged, or another run's.
        """
        path = self.path / "metrics.jsonl"
        with reading(path, RETRIEVE):
            try:
                lines = path.read_bytes().split(b"\n")
            except FileNotFoundError:
                return []
            if len(lines) > 1 and self.config() is None:
                raise ValueError("config.json, which it belongs to, is not there")
        epochs: list[dict] = []
        start = self._checksum()
        for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
            with reading(f"{path}: line {number}", RETRIEVE):
                epoch = unsealed(line, start)
                problem = metrics_problem(epoch)
                if problem:
                    raise ValueError(problem)
            start = checksum(epoch, start)
            epochs.append(epoch)
        return epochs

    def finished(self) -> bool:
        """Whether the metrics reach the end: the last epoch asked for, or one that diverged."""
        metrics, config = self.metrics(), self.config()
        if not metrics or config is None:
            return False
        return metrics[-1]["epoch"] >= config["settings"]["epochs"] or diverged(metrics[-1])

    def ended(self) -> bool:
        """Whether nothing is left to do: the metrics reach the end, and there is no checkpoint."""
        return self.finished() and not (self.path / "checkpoint.pt").exists()

    def complete(self) -> bool:
        """As `ended`, of a run that nobody else is at work on.

        Raises UserError if files are lost without which it can neither go on nor begin again.
        """
        if (self.path / "checkpoint.pt").exists():
            return False
        if self.ended():
            return True
        if (self.path / "state.pt").exists():
            raise UserError(f"{self.path}: metrics.jsonl has lost epochs: {BRING_BACK}")
        if self.metrics():
            raise UserError(
                f"{self.path}: checkpoint.pt, where this run would go on, is not there: put it "
                "back, or set the folder aside with --force"
            )
        return False

    def start(self, settings: dict, environment: dict) -> None:
        """Makes the folder and its `config.json`, if they are not there."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        if self.config() is None:
            config = {"settings": settings, "environment": environment}
            write_text(self.path / "config.json", json.dumps(sealed(config), indent=2) + "\n")

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Replaces a file of the folder whole."""
        write_atomically(self.path / name, write)

    def rewind(self, epochs: int) -> None:
        """Forgets what comes after so many epochs.

        Raises UserError if not all of these are there.
        """
        kept = self._epochs(epochs)
        angles = self.angles()
        if any(len(rows) > epochs for rows in angles.values()):
            self._write_angles({layer: rows[:epochs] for layer, rows in angles.items()})
        self.write_metrics(kept)

    def _epochs(self, count: int) -> list[dict]:
        """The first so many epochs."""
        epochs = [line for line in self.metrics() if line["epoch"] <= count]
        if len(epochs) < count:
            raise UserError(
                f"{self.path}: metrics.jsonl has {len(epochs)} of {count} epochs: {BRING_BACK}"
            )
        return epochs

    def write_metrics(self, epochs: list[dict]) -> None:
        """Replaces `metrics.jsonl` whole."""
        lines = sealed_metrics(epochs, self._checksum())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self.path / "metrics.jsonl", text)

    def angles(self) -> dict[str, np.ndarray]:
        """Layer name to per-sample cosines, float32 (epochs, samples).

        Raises UserError if the file is damaged.
        """
        path = self.path / "angles.npz"
        with reading(path, "move it away to go on without what it held"):
            try:
                angles = read_arrays(path)
            except FileNotFoundError:
                return {}
            shapes = {rows.shape for rows in angles.values()}
            if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
                raise ValueError(f"arrays of {', '.join(map(str, shapes))}, not (epochs, samples)")
            for layer, rows in angles.items():
                if rows.dtype != np.float32 or (np.abs(rows) > 1.001).any():  # rounded; or NaN
                    raise ValueError(f"{layer!r} does not hold float32 cosines")
        return angles

    def add_epoch(self, metrics: dict, angles: dict[str, np.ndarray]) -> None:
        """Puts down one epoch: its line of metrics, and the cosines (samples,) of each layer.

        Cosines of earlier epochs that are not there, in a run out of a log say, become NaN.

        Raises UserError if the metrics of earlier epochs are not there.
        """
        done = metrics["epoch"] - 1
        epochs = self._epochs(done)
        before, whole = self.angles(), {}
        for layer, row in angles.items():
            whole[layer] = np.full((done + 1, len(row)), np.nan, np.float32)
            known = before.get(layer, whole[layer])[:done]
            whole[layer][: len(known)] = known
            whole[layer][done] = row
        self._write_angles(whole)
        self.write_metrics([*epochs, metrics])

    def log(self, *lines: str) -> None:
        """Appends lines to `log.txt`, with the time and a checksum; the run must be started."""
        run = self._checksum()
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.writelines(
                f"{datetime.now():%Y-%m-%d %H:%M:%S}  {logs.sealed(line, run)}\n" for line in lines
            )
            file.flush()
            os.fsync(file.fileno())

    def _checksum(self) -> int:
        """Of the settings: what those of the metrics and of the log go on from."""
        config = self.config()
        return checksum(config["settings"] if config else None)

    def _write_angles(self, angles: dict[str, np.ndarray]) -> None:
        self.write("angles.npz", lambda file: np.savez(file, allow_pickle=False, **angles))


def rounded(value: float) -> float | None:
    """A number of `metrics.jsonl`, as precise as in the log; what is no number is null in JSON."""
    return round(float(value), 4) if math.isfinite(value) else None
