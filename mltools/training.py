"""The training loop of one run."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfatools import measure_alignment
from mltools.data import DataSet, Loader
from mltools.networks import Network
from mltools.results import RunFolder, diverged, finite

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
    checkpoint = folder.start(settings, device)

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
        log(f"{name}: {epochs} epochs of {data.name} on {device}, {asdict(experiment)}")

    for epoch in range(checkpoint["epoch"] + 1 if checkpoint else 1, epochs + 1):
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
            "train_loss": finite(train_loss),
            "train_accuracy": train_accuracy,
            "test_loss": finite(test_loss),
            "test_accuracy": test_accuracy,
            "alignment": {
                layer: {"mean": finite(float(c.mean())), "std": finite(float(c.std(ddof=1)))}
                for layer, c in cosines.items()
            },
            "seconds": round(time.perf_counter() - start, 3),
        }
        lines = epoch_lines(metrics, epochs)
        for line in lines:  # first, so that a kill can make the log say an epoch twice, never skip it
            folder.log(line)
        checkpoint = {
            "epoch": epoch,
            "model": model.state_dict(),
            "random_state": _random_state(device),
        }
        folder.add_epoch(metrics, cosines, checkpoint)
        report(lines[0])
        epoch_ended()
        if diverged(metrics):
            log(f"{name}: diverged in epoch {epoch}, stopped")
            break
    folder.finish(model.state_dict())


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


def epoch_lines(metrics: dict, epochs: int) -> list[str]:
    """An epoch for people: all that `metrics.jsonl` holds of it, to the printed precision."""

    def number(value: float | None, digits: int) -> str:
        return "nan" if value is None else f"{value:.{digits}f}"

    lines = [
        f"epoch {metrics['epoch']}/{epochs}: "
        f"train loss {number(metrics['train_loss'], 4)} accuracy {metrics['train_accuracy']:.2f}%, "
        f"test loss {number(metrics['test_loss'], 4)} accuracy {metrics['test_accuracy']:.2f}%, "
        f"{metrics['seconds']:.3f} s"
    ]
    for layer, cosine in metrics["alignment"].items():
        mean, std = number(cosine["mean"], 4), number(cosine["std"], 4)
        lines.append(f"alignment {layer}: mean {mean} std {std}")
    return lines


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
