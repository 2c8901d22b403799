"""Progress of a sweep: two bars on a terminal, plain lines elsewhere, and TensorBoard."""

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mltools.errors import UserError, show
from mltools.logs import epoch_lines, number_text
from mltools.results import Metrics, RunFolder, diverged
from mltools.training import Run

SECONDS_BETWEEN_UPDATES = 1.0


class Progress:
    """Shows a whole sweep, whichever process trains its runs: epochs are read from their folders.

    Use it in a `with` statement; threads may share it. On a terminal one bar counts runs, another
    bar counts epochs, with the numbers of the latest epoch and the remaining time. Elsewhere every
    epoch is a line.

    Args:
        runs: the unfinished runs, and their folders.
        quiet: shows nothing.
    """

    def __init__(self, runs: Mapping[Run, RunFolder], quiet: bool) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._next_update = 0.0
        self._left = {} if quiet else dict(runs)
        self._seen = {run: len(self._epochs(run) or ()) for run in self._left}
        epochs = sum(run.epochs - seen for run, seen in self._seen.items())
        self._bars = not quiet and sys.stderr is not None and sys.stderr.isatty()
        common = {"disable": not self._bars, "dynamic_ncols": True, "leave": False}
        self._run_bar = tqdm(total=len(runs), unit="run", desc="runs", position=0, **common)
        self._epoch_bar = tqdm(total=epochs, unit="epoch", desc="epochs", position=1, **common)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._next_update = 0.0
        self.update()
        self._epoch_bar.close()
        self._run_bar.close()

    def line(self, text: str) -> None:
        """Shows a line of its own."""
        if not self._quiet:
            with tqdm.external_write_mode():  # the bars make room
                show(text)

    def update(self) -> None:
        """Shows the new epochs in the folders of all runs, if the last update was a while ago."""
        with self._lock:
            start = time.monotonic()
            if start < self._next_update:
                return
            for run in list(self._left):
                self._update(run)
            end = time.monotonic()
            # Folders of a large sweep on a slow disk take time that the runs would have.
            self._next_update = end + max(SECONDS_BETWEEN_UPDATES, 20 * (end - start))

    def run_ended(self, run: Run) -> None:
        """Shows the new epochs of a run."""
        with self._lock:
            if run in self._left:
                self._update(run)

    def _update(self, run: Run) -> None:
        epochs = self._epochs(run)
        if epochs is None:
            return
        for metrics in epochs[self._seen[run] :]:
            self._show_epoch(run, metrics)
        self._seen[run] = len(epochs)
        if epochs and (len(epochs) >= run.epochs or diverged(epochs[-1])):
            del self._left[run]
            self._run_bar.update()

    def _epochs(self, run: Run) -> list[Metrics] | None:
        """Loads the epochs of a run; None if they cannot be read, which its own process reports."""
        try:
            result = self._left[run].load()
        except UserError:
            return None
        # A folder with other settings is renamed when its run is trained.
        return result.epochs if result.settings == run.settings else []

    def _show_epoch(self, run: Run, metrics: Metrics) -> None:
        if not self._bars:
            self.line(epoch_lines(run.name, metrics, run.epochs)[-1])
            return
        losses = [number_text(metrics[f"{split}_loss"], 3) for split in ("train", "test")]
        accuracies = [number_text(metrics[f"{split}_accuracy"], 1) for split in ("train", "test")]
        shown = {"loss": "/".join(losses), "acc": "/".join(accuracies) + "%"}
        cosines = [c["mean"] for name, c in metrics["alignment"].items() if name.startswith("act")]
        if cosines:
            shown["cos"] = " ".join(number_text(cosine, 2) for cosine in cosines)
        self._run_bar.set_postfix_str(run.name, refresh=False)
        self._epoch_bar.set_postfix(shown, refresh=False)
        self._epoch_bar.update()


class Board:
    """Writes the epochs of a run for TensorBoard, to `tensorboard` in its folder.

    Use it in a `with` statement.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, metrics: Metrics) -> None:
        """Writes the scalars of an epoch; the first call discards this epoch and later ones."""
        if not self._writer:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder / "tensorboard", purge_step=metrics["epoch"])
        values = {
            "loss/train": metrics["train_loss"],
            "loss/test": metrics["test_loss"],
            "accuracy/train": metrics["train_accuracy"],
            "accuracy/test": metrics["test_accuracy"],
            **{f"alignment/{layer}": c["mean"] for layer, c in metrics["alignment"].items()},
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, metrics["epoch"])
        self._writer.flush()


def check_tensorboard() -> None:
    """Raises UserError if TensorBoard's package is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
