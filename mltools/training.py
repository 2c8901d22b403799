"""The training loop of one run."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfatools import measure_alignment, prealign
from mltools.data import DataSet, Loader
from mltools.errors import UserError
from mltools.logs import epoch_lines
from mltools.networks import Network
from mltools.results import RunFolder, diverged, rounded

EVALUATION_BATCH = 1000
ALIGNMENT_SAMPLES = 128  # of the test set, its first ones


@dataclass(frozen=True)
class Experiment:
    """One row of a table: what is trained, and how."""

    name: str
    """Its name in folders, options and tables."""
    network: Network
    training_method: str = "dfa"
    """`"dfa"`, `"bp"` or `"shallow"`."""
    prealigned: bool = False
    """Whether the weights start out pre-aligned, see `dfatools.prealign`, on the first batch."""
    normalization: bool = True
    """Whether the feedback matrices are normalised."""
    reduction: str = "mean"
    """Scale of the error that is fed back, see `dfatools.DFA`."""
    learning_rate: float = 0.01
    """Of plain SGD under the mean cross-entropy."""


def train(
    experiment: Experiment,
    data: DataSet,
    folder: RunFolder,
    settings: dict,
    device: torch.device,
    report: Callable[[str], None],
    epoch_ended: Callable[[], None],
) -> None:
    """Trains one network from one seed, or goes on where the folder's checkpoint stands.

    Args:
        experiment: the row.
        data: its images.
        folder: where results go.
        settings: what `config.json` keeps; of these `seed`, `epochs`, `batch_size` and
            `feedback_placement` are used here.
        device: where to train.
        report: takes the lines of the log, those on alignment aside.
        epoch_ended: called after every epoch, once it is on disk.
    """
    seed, epochs = settings["seed"], settings["epochs"]
    batches = Loader(
        data.train, settings["batch_size"], device, shuffle=True, drop_last=True, seed=seed
    )
    test = Loader(data.test, EVALUATION_BATCH, device)
    folder.start(settings, environment(device))
    checkpoint = load_checkpoint(folder.path / "checkpoint.pt")
    done = checkpoint["epoch"] if checkpoint else 0
    folder.rewind(done)
    metrics = folder.metrics()
    if done and (not metrics or metrics[-1]["epoch"] < done):
        raise UserError(
            f"{folder.path}: metrics.jsonl lacks epochs before the checkpoint's, {done}: "
            "bring them back with log_retrieval.py, or move the folder away"
        )
    if metrics and diverged(metrics[-1]):
        done = epochs

    def log(line: str) -> None:
        folder.log(line)
        report(line)

    torch.manual_seed(seed)
    model = experiment.network.build(
        data.input_shape,
        data.classes,
        settings["feedback_placement"],
        normalization=experiment.normalization,
        reduction=experiment.reduction,
        training_method=experiment.training_method,
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=experiment.learning_rate)
    name = f"{experiment.name} seed {seed}"
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        _set_random_state(checkpoint["random_state"], device)
        log(f"{name}: going on after epoch {checkpoint['epoch']}")
    else:
        log(f"{name}: {epochs} epochs of {data.name} on {device}")
        folder.log(f"settings {json.dumps(settings)}")
        if experiment.prealigned:
            x, y = next(iter(batches))
            prealign(model, x, y, F.cross_entropy)

    for epoch in range(done + 1, epochs + 1):
        start = time.perf_counter()
        batches.set_epoch(epoch)
        train_loss, train_accuracy = train_epoch(model, batches, optimizer)
        test_loss, test_accuracy = evaluate(model, test)
        cosines = {}
        if experiment.training_method == "dfa":
            x, y = next(iter(test))
            x, y = x[:ALIGNMENT_SAMPLES], y[:ALIGNMENT_SAMPLES]
            cosines = measure_alignment(model, x, y, F.cross_entropy)
            cosines = {layer: c.float().cpu().numpy() for layer, c in cosines.items()}
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
        lines = epoch_lines(metrics, epochs)
        folder.log(*lines)  # first: a kill can make the log say an epoch twice, but not skip it
        checkpoint = {
            "epoch": epoch,
            "model": model.state_dict(),
            "random_state": _random_state(device),
        }
        folder.add_epoch(metrics, cosines)
        folder.write("checkpoint.pt", partial(torch.save, checkpoint))  # now the epoch counts
        report(lines[-1])
        epoch_ended()
        if diverged(metrics):
            log(f"{name}: diverged in epoch {epoch}, stopped")
            break
    folder.write("state.pt", partial(torch.save, model.state_dict()))
    (folder.path / "checkpoint.pt").unlink(missing_ok=True)


def train_epoch(
    model: nn.Module, batches: Loader, optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """One pass over the batches; the mean loss and the running accuracy in percent, train mode."""
    model.train()
    totals = _Totals()
    for x, y in batches:
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        totals.add(output.detach(), loss.detach(), y)
    return totals.result()


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Loader) -> tuple[float, float]:
    """The mean loss and the accuracy in percent, in eval mode."""
    model.eval()
    totals = _Totals()
    for x, y in batches:
        output = model(x)
        totals.add(output, F.cross_entropy(output, y), y)
    return totals.result()


class _Totals:
    """Sums over samples, kept on the device until `result` fetches them."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: Tensor | float = 0.0

    def add(self, output: Tensor, mean_loss: Tensor, y: Tensor) -> None:
        correct = (output.argmax(1) == y).sum()
        self.sums = self.sums + torch.stack([mean_loss.double() * len(y), correct.double()])
        self.samples += len(y)

    def result(self) -> tuple[float, float]:
        loss, correct = self.sums.tolist()
        return loss / self.samples, 100 * correct / self.samples


def load_checkpoint(path: Path) -> dict | None:
    """Reads a checkpoint, where there is one. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}): move its folder away") from None


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


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """What dropout draws from. The order of the samples follows from seed and epoch."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
