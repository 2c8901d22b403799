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

import json
import math
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from mltools.errors import UserError
from mltools.files import write_atomically

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

    def check(self, settings: dict) -> None:
        """Raises UserError if this folder belongs to a run with other settings."""
        config = self.config()
        if config is None:
            return
        there, asked = _flat(config["settings"]), _flat(json.loads(json.dumps(settings)))
        differing = [
            f"{key} is {there.get(key)!r} there, now {asked.get(key)!r}"
            for key in sorted({*there, *asked})
            if there.get(key) != asked.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(differing)}): "
                "choose another --results-dir, or move that folder away"
            )

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
                intact = all(key in epoch for key in KEYS) and epoch["epoch"] == number
            except (ValueError, TypeError):
                intact = False
            if not intact:
                raise UserError(f"{path}: line {number} is damaged: move the run's folder away")
            epochs.append(epoch)
        return epochs

    def finished(self) -> bool:
        """Whether the run has ended, at its last epoch or because it diverged."""
        return (self.path / "state.pt").exists()

    def start(self, settings: dict, device: torch.device) -> dict | None:
        """Makes the folder, or returns the checkpoint that the run there goes on from."""
        self.path.mkdir(parents=True, exist_ok=True)
        config = {"settings": settings, "environment": environment(device)}
        if self.config() is None:
            text = json.dumps(config, indent=2) + "\n"
            write_atomically(self.path / "config.json", lambda file: file.write(text.encode()))
        checkpoint = self._load("checkpoint.pt")
        epochs = checkpoint["epoch"] if checkpoint else 0
        kept = "".join(json.dumps(line) + "\n" for line in self.metrics()[:epochs])
        write_atomically(self.path / "metrics.jsonl", lambda file: file.write(kept.encode()))
        return checkpoint

    def _load(self, name: str) -> dict | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read ({reason}): move its folder away") from None

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

    def add_epoch(self, metrics: dict, angles: dict[str, np.ndarray], checkpoint: dict) -> None:
        """Puts down one epoch; the checkpoint, last, makes it count."""
        done = metrics["epoch"] - 1
        before = self.angles()
        whole = {
            name: np.concatenate([before[name][:done], row[None]]) if name in before else row[None]
            for name, row in angles.items()
        }
        write_atomically(self.path / "angles.npz", lambda file: np.savez(file, **whole))
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(checkpoint, file))

    def finish(self, state_dict: dict) -> None:
        """Keeps the final weights; the checkpoint has served."""
        write_atomically(self.path / "state.pt", lambda file: torch.save(state_dict, file))
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def log(self, line: str) -> None:
        """Appends a line to `log.txt`, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")


def diverged(metrics: dict) -> bool:
    """Whether this epoch ended with a loss that is no number."""
    return metrics["train_loss"] is None or metrics["test_loss"] is None


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: they are written as null."""
    return value if math.isfinite(value) else None


def environment(device: torch.device) -> dict:
    """Versions, device and source of a run, for `config.json`."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or not a checkout: the run is as good
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
