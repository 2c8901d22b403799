"""What a sweep shows while it runs: two bars on a terminal, plain lines elsewhere."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from mltools import processes
from mltools.errors import show
from mltools.logs import epoch_lines


class Progress:
    """Shows how runs go on; to be used in a `with` statement. Threads may share it.

    On a terminal a bar counts runs and another epochs, with the latest epoch's numbers and the time
    that is left. Elsewhere every epoch is a line.

    Args:
        runs, epochs: how many there are to come, in all.
        quiet: shows nothing.
    """

    def __init__(self, runs: int, epochs: int, quiet: bool) -> None:
        self.quiet = quiet
        self.bars = not quiet and sys.stderr is not None and sys.stderr.isatty()
        common = {"disable": not self.bars, "dynamic_ncols": True, "leave": False}
        self._runs = tqdm(total=runs, unit="run", desc="runs", position=0, **common)
        self._epochs = tqdm(total=epochs, unit="epoch", desc="epochs", position=1, **common)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._epochs.close()
        self._runs.close()

    def line(self, text: str) -> None:
        """Something worth a line of its own."""
        if not self.quiet:
            with tqdm.external_write_mode():  # the bars make room
                show(text)

    def epoch_ended(self, run: str, epochs: int, metrics: dict) -> None:
        """An epoch of a run of so many, as in `metrics.jsonl`."""
        if not self.bars:
            self.line(f"{run}: {epoch_lines(metrics, epochs)[-1]}")
            return
        losses = _number(metrics["train_loss"], 3), _number(metrics["test_loss"], 3)
        accuracies = _number(metrics["train_accuracy"], 1), _number(metrics["test_accuracy"], 1)
        shown = {"loss": "/".join(losses), "acc": "/".join(accuracies) + "%"}
        cosines = [c["mean"] for name, c in metrics["alignment"].items() if name.startswith("act")]
        if cosines:
            shown["cos"] = " ".join(_number(cosine, 2) for cosine in cosines)
        self._runs.set_postfix_str(run, refresh=False)
        self._epochs.set_postfix(shown, refresh=False)
        self._epochs.update()

    def run_ended(self) -> None:
        self._runs.update()


class Relayed(Progress):
    """Has rank 0 show how the runs of this process go on."""

    def __init__(self) -> None:
        pass

    def line(self, text: str) -> None:
        processes.send(json.dumps(["line", text]))

    def epoch_ended(self, run: str, epochs: int, metrics: dict) -> None:
        processes.send(json.dumps(["epoch_ended", run, epochs, metrics]))

    def run_ended(self) -> None:
        processes.send(json.dumps(["run_ended"]))


@contextmanager
def progress_of_all(runs: int, epochs: int, quiet: bool) -> Iterator[Progress]:
    """What the runs of this process report to: rank 0 shows the progress of all processes.

    Args: as of `Progress`.
    """
    if processes.rank() > 0:
        yield Relayed()
        return
    with Progress(runs, epochs, quiet) as progress:
        if not processes.launched():
            yield progress
            return
        ended = threading.Event()

        def show() -> None:
            last = False
            with suppress(ConnectionError):  # torchrun is gone, which ends the runs too
                while not last:
                    last = ended.wait(0.2)
                    for message in processes.receive():
                        method, *arguments = json.loads(message)
                        getattr(progress, method)(*arguments)

        thread = threading.Thread(target=show)
        thread.start()
        try:
            yield Relayed()
        finally:
            ended.set()
            thread.join()


def _number(value: float | None, digits: int) -> str:
    return "nan" if value is None else f"{value:.{digits}f}"
