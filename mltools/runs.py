"""One run from its start to its end, on disk: epochs, checkpoints, logs."""

import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mltools import checkpoints
from mltools.data import DataSet
from mltools.errors import UserError, one_line
from mltools.files import reading
from mltools.logs import epoch_lines
from mltools.records import diverged
from mltools.results import RunFolder, rounded
from mltools.training import Experiment, Trainer

CHECKPOINT = {
    "settings": str,
    "epoch": int,
    "batch": int,
    "seconds": float,
    "device": str,
    "model": dict,
}
"""What a checkpoint holds, beside the rest of `Trainer.state_dict`."""

_thread = threading.local()


def train(
    experiment: Experiment,
    data: DataSet,
    folder: RunFolder,
    settings: dict,
    device: torch.device,
    report: Callable[[str], None],
    epoch_ended: Callable[[dict], None],
    stop: threading.Event,
) -> None:
    """Trains one network from one seed, or goes on where the folder's checkpoint stands.

    Several threads may do so at once, each with a folder of its own.

    Args:
        experiment: the row.
        data: its images.
        folder: where results go.
        settings: what `config.json` keeps, see `Trainer`; of these `epochs` is used here.
        device: where to train.
        report: takes the lines of the log, those on alignment aside.
        epoch_ended: called with the metrics of every epoch, once it is on disk.
        stop: when it is set, the run ends after the step under way, with a checkpoint.

    Raises UserError if the folder's files do not fit together, or the data does not fit the run.
    """
    with _beside_others(device):
        trainer = Trainer(experiment, data, settings, device)
        with folder.locked():
            if folder.complete():  # by another process, meanwhile
                return
            folder.start(settings, environment(device))
            name = f"{experiment.name} seed {settings['seed']}"

            def log(line: str) -> None:
                folder.log(f"{name}: {line}")
                report(f"{name}: {line}")

            if _train(trainer, folder, settings, log, epoch_ended, stop):
                state = dict(trainer.model.state_dict())
                folder.write("state.pt", partial(checkpoints.save, content=state))
                (folder.path / "checkpoint.pt").unlink(missing_ok=True)


def _train(
    trainer: Trainer,
    folder: RunFolder,
    settings: dict,
    log: Callable[[str], None],
    epoch_ended: Callable[[dict], None],
    stop: threading.Event,
) -> bool:
    """All epochs that are left; whether it came to the end, and was not stopped."""
    epochs, device = settings["epochs"], trainer.device
    epoch, batch, seconds = _resume(trainer, folder, settings)
    if epoch or batch:
        log(f"going on after epoch {epoch}" + (f", batch {batch}" if batch else ""))
    else:
        log(f"{epochs} epochs of {settings['dataset']} on {device}")
        folder.log(f"settings {json.dumps(settings)}")
    if device.type == "cuda":
        try:
            trainer.capture()
        except RuntimeError as error:
            log(f"no CUDA graph, steps are launched one by one ({one_line(error)})")

    ended = any(map(diverged, folder.metrics()[-1:]))
    while epoch < epochs and not ended:
        start = time.perf_counter() - seconds
        trainer.begin(epoch + 1, batch)
        while batch < len(trainer.batches):
            if stop.is_set():
                _save(trainer, folder, settings, epoch, batch, time.perf_counter() - start)
                return False
            batch += trainer.step()
        epoch, batch, seconds = epoch + 1, 0, 0.0
        train_loss, train_accuracy = trainer.training_totals()
        test_loss, test_accuracy = trainer.evaluate()
        cosines = trainer.alignment()
        metrics = {
            "epoch": epoch,
            "train_loss": rounded(train_loss),
            "train_accuracy": rounded(train_accuracy),
            "test_loss": rounded(test_loss),
            "test_accuracy": rounded(test_accuracy),
            "alignment": {
                layer: {"mean": rounded(c.mean()), "std": rounded(c.std(ddof=1))}
                for layer, c in cosines.items()
            },
            "seconds": round(time.perf_counter() - start, 3),
        }
        # The log first: a kill can make it say an epoch twice, but not skip one.
        folder.log(*epoch_lines(metrics, epochs))
        folder.add_epoch(metrics, cosines)
        _save(trainer, folder, settings, epoch)  # now the epoch counts
        epoch_ended(metrics)
        ended = diverged(metrics)
        if ended:
            log(f"diverged in epoch {epoch}, stopped")
    if device.type == "cuda":
        megabytes = torch.cuda.max_memory_allocated(device) / 1e6
        log(f"at most {megabytes:.0f} MB of GPU memory allocated, by all runs so far together")
    return True


def _resume(trainer: Trainer, folder: RunFolder, settings: dict) -> tuple[int, int, float]:
    """Takes up the folder's checkpoint, and forgets what was put down after it.

    Returns: epochs finished, batches done in the next one, and the seconds that these took.
    """
    path = folder.path / "checkpoint.pt"
    checkpoint = checkpoints.load(path, CHECKPOINT)
    if checkpoint is None:
        folder.rewind(0)
        _save(trainer, folder, settings, 0)  # so that there are no epochs without a checkpoint
        return 0, 0, 0.0
    if checkpoint["settings"] != json.dumps(settings):
        raise UserError(f"{path} is another run's: put this run's back, or move its folder away")
    if checkpoint["device"] != trainer.device.type:
        raise UserError(
            f"{folder.path} was begun on {checkpoint['device']}: go on there, with --device"
        )
    with reading(path, "move its folder away"):
        trainer.load_state_dict(checkpoint)
    epoch = checkpoint["epoch"]
    folder.rewind(epoch)
    return epoch, checkpoint["batch"], checkpoint["seconds"]


def _save(
    trainer: Trainer,
    folder: RunFolder,
    settings: dict,
    epoch: int,
    batch: int = 0,
    seconds: float = 0.0,
) -> None:
    checkpoint = {
        "settings": json.dumps(settings),
        "epoch": epoch,
        "batch": batch,
        "seconds": seconds,
        "device": trainer.device.type,
        **trainer.state_dict(),
    }
    folder.write("checkpoint.pt", partial(checkpoints.save, content=checkpoint))


@contextmanager
def _beside_others(device: torch.device) -> Iterator[None]:
    """On CUDA, gives the thread what lets the runs of other threads go on at the same time."""
    if device.type != "cuda":
        yield
        return
    streams = vars(_thread)  # not one per run: the device's queues are few
    if str(device) not in streams:
        if device.index is not None:
            torch.cuda.set_device(device)  # else PyTorch would take memory of the first one, too
        streams[str(device)] = torch.cuda.Stream(device)
    stream = streams[str(device)]
    # PyTorch's thread for backward passes is one per device: all runs would queue for it.
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        yield


def environment(device: torch.device) -> dict:
    """Versions, device and source of a run, for `config.json`."""
    # Of this package: an installed copy may lie within the checkout of another project.
    checkout = Path(__file__).resolve().parents[1] / ".git"
    try:
        commit = subprocess.run(
            ["git", f"--git-dir={checkout}", "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True,
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
