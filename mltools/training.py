"""The arithmetic of one run: its network, its training step, its evaluation.

Nothing in a step waits for the device. Where the data is kept on it, a step needs nothing from the
host at all, and on CUDA it is recorded once and launched as one graph.
"""

import threading
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfatools import BottleneckLinear, measure_alignment, prealign
from mltools.capture import capture
from mltools.data import DataSet, Loader, TrainingLoader
from mltools.layers import Dropout, Linear
from mltools.networks import Network

PRECISIONS = ("float32", "tf32", "bf16")
EVALUATION_BATCH = 500  # larger ones leave no room for the CNN in 1 GB of GPU memory
ALIGNMENT_SAMPLES = 128  # of the test set, its first ones

# What a process has one of: the default generators, and a CUDA graph being recorded.
_process = threading.Lock()


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
        for _ in range(len(trainer.batches)):
            trainer.step()
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
        with _process:
            torch.manual_seed(seed)
            self.model = experiment.network.build(
                data.input_shape,
                data.classes,
                settings["feedback_placement"],
                normalization=experiment.normalization,
                reduction=experiment.reduction,
                training_method=experiment.training_method,
            ).to(device)
            if experiment.prealigned:
                self.batches.begin(0)
                prealign(self.model, *self.batches.take(), F.cross_entropy)
        for module in self.model.modules():
            if isinstance(module, Dropout):
                module.generator = self.generator
            elif isinstance(module, BottleneckLinear):
                module.input_generator = self.generator
            elif isinstance(module, Linear) and precision != "bf16":
                module.learning_rate = experiment.learning_rate
        self._optimizer = torch.optim.SGD(self.model.parameters(), experiment.learning_rate)
        self._launch = self._step

    def capture(self) -> None:
        """Makes each step one launch of a CUDA graph, with the same results.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        if not self.batches.resident:
            raise RuntimeError("the data is streamed")
        state = [*self.model.state_dict().values(), *self.batches.state(), self._totals]
        self.model.train()
        with _process:
            self._launch = capture(self._step, state, self.generator)

    def begin(self, epoch: int, batch: int = 0) -> None:
        """Makes `step` take the batches of an epoch (from 1 up), from the given one on."""
        self.model.train()
        self.batches.begin(epoch, batch)
        if batch == 0:
            self._totals.zero_()

    def step(self) -> None:
        """Trains on the next batch of the epoch."""
        self._launch()

    def _step(self) -> None:
        x, y = self.batches.take()
        self._totals += _totals(*self.learn(x, y), y)

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
        totals = torch.zeros_like(self._totals)
        for x, y in self.test:
            with self._autocast:
                output = self.model(x)
                loss = F.cross_entropy(output, y)
            totals += _totals(output, loss, y)
        return _means(totals, len(self.test.part))

    def alignment(self) -> dict[str, np.ndarray]:
        """Layer to the cosines of the first test images, float32 (samples,); none without DFA."""
        if self.experiment.training_method != "dfa":
            return {}
        x, y = next(iter(self.test))
        x, y = x[:ALIGNMENT_SAMPLES], y[:ALIGNMENT_SAMPLES]
        with _process:
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
