"""The arithmetic of one run: its network, its training step, its evaluation.

Nothing in a step waits for the device. Where the data is kept on it, steps need nothing from the
host at all, and on CUDA several of them are recorded once and launched as one graph.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfatools import BottleneckLinear, measure_alignment, prealign
from mltools.capture import capture
from mltools.data import DataSet, Loader, TrainingLoader
from mltools.layers import Conv2d, Dropout, Linear
from mltools.networks import Network

PRECISIONS = ("float32", "tf32", "bf16")
EVALUATION_BATCH = 250  # larger ones take more memory than training does
ALIGNMENT_SAMPLES = 128  # of the test set, its first ones
STEPS_PER_LAUNCH = 10  # of a CUDA graph, at most; more take longer to record


class _Process:
    """What a process has one of: its default generators, and a CUDA graph being recorded.

    One thread may have it alone, to change it, or several together, to leave it as they find it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._together == 0)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()


_process = _Process()


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


class Trainer:
    """One network with its data, its optimizer and its random state, all on one device.

        trainer.begin(epoch)
        batch = 0
        while batch < len(trainer.batches):
            batch += trainer.step()
        loss, accuracy = trainer.training_totals()

    Several trainers may work at once, each in a thread and, on CUDA, on a stream of its own.

    Args:
        settings: of a run; `seed`, `batch_size`, `feedback_placement` and `precision` are used.

    Raises:
        UserError: the batch size leaves no batch, or the images are too small for the network.
    """

    def __init__(
        self, experiment: Experiment, data: DataSet, settings: dict, device: torch.device
    ) -> None:
        seed, precision = settings["seed"], settings["precision"]
        self.experiment = experiment
        self.device = device
        self.batches = TrainingLoader(data.train, settings["batch_size"], device, seed)
        self.test = Loader(data.test, EVALUATION_BATCH, device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self._autocast = torch.autocast(device.type, torch.bfloat16, precision == "bf16")
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct answers
        with _process.alone():
            torch.manual_seed(seed)
            self.model = experiment.network.build(
                data.input_shape,
                data.classes,
                settings["feedback_placement"],
                normalization=experiment.normalization,
                reduction=experiment.reduction,
                training_method=experiment.training_method,
            ).to(device)
            if device.type == "cpu":  # whose convolutions and poolings are faster in that order
                self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if experiment.prealigned:
                self.batches.begin(0)
                prealign(self.model, *self.batches.take(), F.cross_entropy)
        for module in self.model.modules():
            if isinstance(module, Dropout):
                module.generator = self.generator
            elif isinstance(module, BottleneckLinear):
                module.input_generator = self.generator
            elif isinstance(module, (Linear, Conv2d)) and precision != "bf16":
                module.learning_rate = experiment.learning_rate
        self._optimizer = torch.optim.SGD(self.model.parameters(), experiment.learning_rate)
        self._launch: Callable[[], None] | None = None  # of a CUDA graph
        self._steps_per_launch = 1
        self._left = 0  # batches of the epoch

    def capture(self) -> None:
        """Makes several steps one launch of a CUDA graph, with the same results.

        Raises:
            RuntimeError: the steps cannot be recorded.
        """
        if not self.batches.resident:
            raise RuntimeError("the data is streamed")
        state = [*self.model.state_dict().values(), *self.batches.state(), self._totals]
        divisors = (n for n in range(1, STEPS_PER_LAUNCH + 1) if len(self.batches) % n == 0)
        steps = max(divisors)
        self.model.train()
        with _process.alone():
            self._launch = capture(partial(self._steps, steps), state, self.generator)
        self._steps_per_launch = steps

    def begin(self, epoch: int, batch: int = 0) -> None:
        """Makes `step` take the batches of an epoch (from 1 up), from the given one on."""
        self.model.train()
        self.batches.begin(epoch, batch)
        self._left = len(self.batches) - batch
        if batch == 0:
            self._totals.zero_()

    def step(self) -> int:
        """Trains on the next batch of the epoch, or the next few, in one launch; says how many."""
        if self._launch is not None and self._left % self._steps_per_launch == 0:
            self._launch()
            taken = self._steps_per_launch
        else:  # no graph, or the epoch was taken up in between
            self._steps(1)
            taken = 1
        self._left -= taken
        return taken

    def _steps(self, count: int) -> None:
        x, y = self.batches.take(count)
        batches = zip(x.chunk(count), y.chunk(count))
        outputs, losses = zip(*(self.learn(*batch) for batch in batches))
        self._totals += _totals(torch.cat(outputs), torch.stack(losses).double().mean(), y)

    def learn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Forward pass, backward pass and update on one batch; returns its output and mean loss."""
        self._optimizer.zero_grad()
        with self._autocast:
            output = self.model(x)
            loss = F.cross_entropy(output, y)
        loss.backward()
        self._optimizer.step()
        return output.detach(), loss.detach()

    def training_totals(self) -> tuple[float, float]:
        """The mean loss and the running accuracy in percent of the epoch that has ended."""
        return _means(self._totals, len(self.batches) * self.batches.batch_size)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """The mean loss and the accuracy in percent on the test set, in eval mode."""
        self.model.eval()
        with self._autocast:
            outputs, labels = zip(*((self.model(x), y) for x, y in self.test))
            output, y = torch.cat(outputs), torch.cat(labels)
            loss = F.cross_entropy(output, y)
        return _means(_totals(output, loss, y), len(y))

    def alignment(self) -> dict[str, np.ndarray]:
        """Layer to the cosines of the first test images, float32 (samples,); none without DFA."""
        if self.experiment.training_method != "dfa":
            return {}
        x, y = next(iter(self.test))
        x, y = x[:ALIGNMENT_SAMPLES], y[:ALIGNMENT_SAMPLES]
        with _process.together():
            cosines = measure_alignment(self.model, x, y, F.cross_entropy)
        rows = torch.stack([*cosines.values()]).float().cpu().numpy()
        return dict(zip(cosines, rows))

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs to go on within an epoch, its number and batch aside."""
        return {
            "model": self.model.state_dict(),
            "totals": self._totals,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises RuntimeError, or another error of PyTorch's, if `state` is not this network's."""
        self.model.load_state_dict(state["model"])
        self._totals.copy_(state["totals"])
        self.generator.set_state(state["generator"])


def _totals(output: Tensor, mean_loss: Tensor, y: Tensor) -> Tensor:
    """The summed loss and the number of correct answers of a batch."""
    correct = (output.argmax(1) == y).sum()
    return torch.stack([mean_loss.double() * len(y), correct.double()])


def _means(totals: Tensor, samples: int) -> tuple[float, float]:
    loss, correct = totals.tolist()
    return loss / samples, 100 * correct / samples
