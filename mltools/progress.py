"""The progress of a sweep: a bar in a terminal or a notebook, else lines, and TensorBoard files."""

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm  # a widget in a notebook

from mltools.errors import UserError, show
from mltools.logs import epoch_lines, number_text
from mltools.results import Metrics, RunFolder
from mltools.training import Run

SECONDS_BETWEEN_UPDATES = 1.0
BAR = "|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}{postfix}"


class Progress:
    """Shows the progress of a whole sweep from its folders, including runs of other processes.

    In a terminal or a notebook, a bar counts runs and epochs, and shows the remaining time and the
    metrics of the latest epoch. Elsewhere, each epoch is a line. Threads may share an instance.

    Args:
        runs: the unfinished runs and their folders.
        quiet: True shows nothing.
    """

    def __init__(self, runs: Mapping[Run, RunFolder], quiet: bool) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._next_update = 0.0
        self._left = {} if quiet else dict(runs)
        self._seen = dict.fromkeys(self._left, 0)
        epochs = sum(run.epochs - len(self._new_epochs(run)) for run in [*self._left])
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=epochs,
            # A notebook's widget draws {bar} itself, but prints {bar:10} as text.
            bar_format=BAR if terminal else BAR.replace("{bar:10}", "{bar}"),
            disable=quiet or not (terminal or "ipykernel" in sys.modules),
            dynamic_ncols=True,
            leave=False,
        )

    def close(self) -> None:
        """Shows the new epochs of all runs, and removes the bar."""
        self._next_update = 0.0
        self.update()
        self._bar.close()

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._quiet:
            with tqdm.external_write_mode():  # clears the bar meanwhile
                show(text)

    def update(self) -> None:
        """Shows the new epochs of all runs, unless the last update was too recent."""
        with self._lock:
            start = time.monotonic()
            if start < self._next_update:
                return
            for run in [*self._left]:
                self._show(run)
            end = time.monotonic()
            # For a large sweep on a slow disk, reading the folders takes time from the training.
            self._next_update = end + max(SECONDS_BETWEEN_UPDATES, 20 * (end - start))

    def update_run(self, run: Run) -> None:
        """Shows the new epochs of one run; counts from epoch 1 again after a rename."""
        with self._lock:
            if run in self._left:
                self._show(run)

    def _new_epochs(self, run: Run) -> list[Metrics]:
        """Returns the epochs of a run since the last call, and drops a finished run."""
        try:
            result = self._left[run].load()
        except UserError:  # the process that trains the run reports it
            return []
        # A folder with other settings has no epochs of this run; --force will rename it.
        epochs = result.epochs if result.settings == run.settings else []
        new = epochs[self._seen[run] :]
        self._seen[run] = len(epochs)
        if epochs and result.finished:
            del self._left[run]
        return new

    def _show(self, run: Run) -> None:
        for metrics in self._new_epochs(run):
            if self._bar.disable:
                self.line(epoch_lines(run.name, metrics, run.epochs)[-1])
                continue
            cosines = [c["mean"] for x, c in metrics["alignment"].items() if x.startswith("act")]
            losses = [number_text(metrics[f"{split}_loss"], 3) for split in ("train", "test")]
            shown = [
                run.name,
                f"acc {metrics['train_accuracy']:.1f}/{metrics['test_accuracy']:.1f}%",
                f"cos {' '.join(number_text(cosine, 2) for cosine in cosines) or '-'}",
                f"loss {'/'.join(losses)}",
            ]
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update()
        self._bar.set_description_str(f"runs left: {len(self._left)}")


def add_scalars(writer: Any, metrics: Metrics) -> None:
    """Writes the metrics of one epoch to a TensorBoard `SummaryWriter`."""
    values = {
        "loss/train": metrics["train_loss"],
        "loss/test": metrics["test_loss"],
        "accuracy/train": metrics["train_accuracy"],
        "accuracy/test": metrics["test_accuracy"],
        **{f"alignment/{layer}": c["mean"] for layer, c in metrics["alignment"].items()},
    }
    for name, value in values.items():
        if value is not None:
            writer.add_scalar(name, value, metrics["epoch"])
    writer.flush()
