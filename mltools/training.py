"""One run: its description, its training step, its evaluation, and the loop over its epochs.

    experiment = Experiment("fc-tanh", Network("fc"), reduction="sum", learning_rate=5e-4)
    run = Run(experiment=experiment, seed=0, dataset="CIFAR-10", epochs=50, batch_size=128)
    folder, device = RunFolder("results/fc-tanh/seed-0"), torch.device("cuda")
    with own_stream(device), folder.lock():
        train_run(Trainer(run, load_dataset(run.dataset, "data"), device), folder)

The same lines resume an interrupted run.
"""

import io
import json
import platform
import subprocess
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfatools import BottleneckLinear, measure_alignment, prealign
from mltools.data import DATASETS, DataSet, Loader, TrainingLoader
from mltools.errors import UserError, one_line, user_errors
from mltools.gpu import capture, process_state
from mltools.layers import Conv2d, Dropout, Linear
from mltools.logs import epoch_lines, first_lines
from mltools.networks import Network
from mltools.release import PROTOCOLS, measure_release_alignment
from mltools.results import Metrics, RunFolder, RunResult, check_metrics, make_metrics, rounded

PRECISIONS = ("float32", "tf32", "bf16")
EVALUATION_BATCH = 250  # larger batches need more memory than training does
ALIGNMENT_SAMPLES = 128  # the first samples of the test set
STEPS_PER_LAUNCH = 10  # most steps in a CUDA graph; a longer graph takes longer to record


def option(help: str, default: Any = MISSING, **argument: Any) -> Any:
    """Returns a dataclass field that `mltools.sweep` makes an option of the scripts.

    Args:
        help: the option's text in `--help`.
        argument: other keyword arguments of `argparse.ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Experiment:
    """A network and its training settings."""

    name: str
    """Name of the experiment in folders, options and tables."""
    network: Network
    training_method: str = "dfa"
    """`"dfa"`, `"bp"` or `"shallow"`."""
    prealigned: bool = False
    """Sets the initial weights by `dfatools.prealign` on one training batch."""
    normalization: bool = True
    """Normalises the feedback matrices, see `dfatools.DFA`."""
    reduction: str = "mean"
    """Scale of the error sent to the hidden layers, `"mean"` or `"sum"`, see `dfatools.DFA`."""
    learning_rate: float = 0.01
    """Learning rate of plain SGD on the mean cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all runs of a sweep; each is an option of the scripts."""

    dataset: str = option("data set to train on", choices=DATASETS)
    epochs: int = option("number of training epochs", type=int)
    batch_size: int = option("samples per training step", type=int)
    protocol: str = option(
        "release: train and measure as the 2019 release does, to compare with its published "
        "numbers; corrected: feedback at every hidden block, bottleneck masks drawn anew in each "
        "step, exact alignment",
        "corrected",
        choices=PROTOCOLS,
    )
    precision: str = option(
        "arithmetic of training and evaluation: float32 as in 2019, tf32 for faster matrix "
        "products on CUDA, or bf16 mixed precision",
        "float32",
        choices=PRECISIONS,
    )


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """All settings of a run; only a run with equal settings can resume its folder."""

    experiment: Experiment
    seed: int
    data_crc32: str | None = None
    """Checksum of the data set's arrays, see `DataSet`."""

    @property
    def name(self) -> str:
        """`<experiment> seed <n>`, the run's name in logs."""
        return f"{self.experiment.name} seed {self.seed}"

    @property
    def settings(self) -> dict:
        """All fields as nested dicts, as in `config.json`."""
        return json.loads(json.dumps(asdict(self)))


class Trainer:
    """The network, data, optimizer and random state of a run, on one device.

        trainer.begin(epoch)
        while trainer.batches.left:
            trainer.step()
        loss, accuracy = trainer.training_totals()

    No step waits for its own results on the device.

    Raises:
        UserError: the batch size gives no full batch, or the images are too small for the network.
    """

    def __init__(self, run: Run, data: DataSet, device: torch.device) -> None:
        experiment = run.experiment
        self.run = run
        self.device = device
        self.batches = TrainingLoader(data.train, run.batch_size, device, run.seed)
        self.test = Loader(data.test, EVALUATION_BATCH, device)
        self.generator = torch.Generator(device).manual_seed(run.seed)
        self._autocast = torch.autocast(device.type, torch.bfloat16, run.precision == "bf16")
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)  # see `_totals`
        with process_state.alone():
            torch.manual_seed(run.seed)
            self.model = experiment.network.build(
                data.input_shape,
                data.classes,
                run.protocol,
                max(run.batch_size, ALIGNMENT_SAMPLES),
                normalization=experiment.normalization,
                reduction=experiment.reduction,
                training_method=experiment.training_method,
            ).to(device)
            if device.type == "cpu":  # convolutions and poolings are faster with channels last
                self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if experiment.prealigned:
                self.batches.begin(0)
                prealign(self.model, *self.batches.take(), F.cross_entropy)
        for module in self.model.modules():
            if isinstance(module, Dropout):
                module.generator = self.generator
            elif isinstance(module, BottleneckLinear):
                module.input_generator = self.generator
            elif isinstance(module, (Linear, Conv2d)) and run.precision != "bf16":
                module.lr = experiment.learning_rate
        self._optimizer = torch.optim.SGD(self.model.parameters(), experiment.learning_rate)
        self._replay: Callable[[], None] | None = None  # launches a CUDA graph of several steps

    def begin(self, epoch: int, position: int = 0) -> None:
        """Begins an epoch (counted from 1) in train mode, at the batch with index `position`."""
        self.model.train()
        self.batches.begin(epoch, position)
        if position == 0:
            self._totals.zero_()

    def step(self) -> None:
        """Trains on the next batch, or after `capture` on several batches in one launch."""
        if self._replay and self.batches.left % self._recorded == 0:
            self._order.copy_(self.batches.take_order(self._recorded))
            self._replay()
        else:  # no graph, or the batches left do not fill whole launches
            self._steps(1, *self.batches.take())

    def _steps(self, count: int, x: Tensor, y: Tensor) -> None:
        batches = zip(x.chunk(count), y.chunk(count))
        outputs, losses = zip(*(self.learn(*batch) for batch in batches))
        self._totals += _totals(torch.cat(outputs), torch.stack(losses).double().mean(), y)

    def learn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Trains on one batch; returns its output, (N, classes), and its mean loss."""
        self._optimizer.zero_grad()
        with self._autocast:
            output = self.model(x)
            loss = F.cross_entropy(output, y)
        loss.backward()
        self._optimizer.step()
        return output.detach(), loss.detach()

    def training_totals(self) -> tuple[float, float]:
        """Returns the mean loss and the running accuracy in percent of the finished epoch."""
        return _means(self._totals, len(self.batches) * self.batches.batch_size)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """Returns the mean loss and the accuracy in percent on the test set, in eval mode."""
        self.model.eval()
        with self._autocast:
            outputs, labels = zip(*((self.model(x), y) for x, y in self.test))
            output, y = torch.cat(outputs), torch.cat(labels)
            loss = F.cross_entropy(output, y)
        return _means(_totals(output, loss, y), len(y))

    def alignment(self) -> dict[str, np.ndarray]:
        """Returns `{layer: cosines}` for the first test images, float32 (samples,).

        The dict is empty for training methods other than DFA.
        """
        if self.run.experiment.training_method != "dfa":
            return {}
        x, y = next(iter(self.test))
        x, y = x[:ALIGNMENT_SAMPLES], y[:ALIGNMENT_SAMPLES]
        if self.run.protocol == "release":
            cosines = measure_release_alignment(self.model, x, y)
        else:
            with process_state.together():
                cosines = measure_alignment(self.model, x, y, F.cross_entropy)
        rows = torch.stack([*cosines.values()]).float().cpu().numpy()
        return dict(zip(cosines, rows))

    def state_dict(self) -> dict:
        """Returns the state for `load_state_dict`, without the position in the epoch."""
        return {
            "model": self.model.state_dict(),
            "totals": self._totals,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Loads a `state_dict()`. Raises RuntimeError or another PyTorch error on a mismatch."""
        self.model.load_state_dict(state["model"])
        self._totals.copy_(state["totals"])
        self.generator.set_state(state["generator"])

    def capture(self) -> None:
        """Records several training steps as a CUDA graph, which `step` launches from then on.

        A launch gives the same weights as single steps. Call it in a `gpu.own_stream` block.

        Raises:
            RuntimeError: the steps cannot be recorded, for instance because the data is streamed.
        """
        if not self.batches.resident:
            raise RuntimeError("the data is streamed")
        count = max(n for n in range(1, STEPS_PER_LAUNCH + 1) if len(self.batches) % n == 0)
        size = count * self.batches.batch_size
        self._order = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._recorded = count
        state = [*self.model.state_dict().values(), self._totals]
        self.model.train()
        with process_state.alone():
            self._replay = capture(
                lambda: self._steps(count, *self.batches.at(self._order)), state, self.generator
            )


def train_run(
    trainer: Trainer,
    folder: RunFolder,
    report: Callable[[str], object] = lambda line: None,
    epoch_ended: Callable[[Metrics], object] = lambda metrics: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Trains a run to its end, from the checkpoint in its folder if there is one.

    A finished run is left as it is. On CUDA, make the trainer and call this function in the same
    `gpu.own_stream` block, so that the steps can be recorded as a CUDA graph.

    Args:
        folder: the run's folder, locked by the caller.
        report: called with each log line about the whole run, except its settings.
        epoch_ended: called with the metrics of each epoch, after they are saved.
        stopped: called before each step; True ends the training, with a checkpoint.

    Raises UserError if the checkpoint cannot be read, was saved by another run or device type, or
    is lost.
    """
    run, batches, device = trainer.run, trainer.batches, trainer.device
    if folder.check(run.settings).finished:
        return

    def log(line: str) -> None:
        folder.log(line)
        report(line)

    def save(position: int, seconds: float) -> None:
        checkpoint = {
            "settings": run.settings,
            "device": device.type,
            "epochs": result.epochs,
            "angles": {layer: torch.from_numpy(rows) for layer, rows in angles.items()},
            "position": position,
            "seconds": seconds,
            **trainer.state_dict(),
        }
        folder.write("checkpoint.pt", lambda file: _save(checkpoint, file))
        folder.write_angles(angles)
        folder.write_metrics(result.epochs)

    folder.start(run.settings, environment(device))
    folder.remove_leftovers()
    result = RunResult(folder.path, run.settings)
    angles: dict[str, np.ndarray] = {}
    position, seconds = 0, 0.0
    path = folder.path / "checkpoint.pt"
    if not path.exists():
        heading, settings = first_lines(run.name, run.settings, device)
        log(heading)
        folder.log(settings)
        save(0, 0.0)  # else a run killed in its first epoch would log its heading again
    else:
        result.epochs, angles, position, seconds = _load_checkpoint(path, trainer)
        folder.write_angles(angles)  # after a kill, these two files may lack the last epoch
        folder.write_metrics(result.epochs)
        batch = f", batch {position}" if position else ""
        log(f"{run.name}: resuming after epoch {len(result.epochs)}{batch}")
    if device.type == "cuda":
        try:
            trainer.capture()
        except RuntimeError as error:
            log(f"{run.name}: training without a CUDA graph ({one_line(error)})")

    while not result.trained:
        start = time.perf_counter() - seconds
        trainer.begin(len(result.epochs) + 1, position)
        while batches.left:
            if stopped():
                save(batches.position, time.perf_counter() - start)
                return
            trainer.step()
        position, seconds = 0, 0.0
        numbers = *trainer.training_totals(), *trainer.evaluate()
        alignment = {}
        for layer, row in trainer.alignment().items():
            angles[layer] = np.vstack([*angles.get(layer, ()), row])
            alignment[layer] = {"mean": rounded(row.mean()), "std": rounded(row.std(ddof=1))}
        elapsed = round(time.perf_counter() - start, 3)
        metrics = make_metrics(len(result.epochs) + 1, numbers, alignment, elapsed)
        result.epochs.append(metrics)
        # The log is written first: after a kill it may repeat an epoch, but never lacks one.
        folder.log(*epoch_lines(run.name, metrics, run.epochs))
        save(0, 0.0)
        epoch_ended(metrics)
    if result.diverged:
        log(f"{run.name}: diverged in epoch {len(result.epochs)}, stopped")
    if device.type == "cuda":
        megabytes = torch.cuda.max_memory_allocated(device) / 1e6
        log(f"{run.name}: peak GPU memory {megabytes:.0f} MB, of all runs in this process so far")
    folder.write("state.pt", lambda file: _save(dict(trainer.model.state_dict()), file))
    (folder.path / "checkpoint.pt").unlink(missing_ok=True)


def _load_checkpoint(
    path: Path, trainer: Trainer
) -> tuple[list[Metrics], dict[str, np.ndarray], int, float]:
    """Restores the trainer; returns metrics, angles, the position in the epoch and its seconds."""
    with user_errors(path, "move its folder away"):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load verifies no checksums
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:  # its message explains how to run the file's code anyway
            raise ValueError("it holds more than tensors and plain values") from None
        if checkpoint["settings"] != trainer.run.settings:
            raise UserError(
                f"{path} belongs to another run: restore the right file, or move the folder away"
            )
        if checkpoint["device"] != trainer.device.type:
            raise UserError(
                f"{path} was saved on {checkpoint['device']}: resume there, with --device"
            )
        for metrics in checkpoint["epochs"]:
            check_metrics(metrics)
        angles = {layer: rows.numpy() for layer, rows in checkpoint["angles"].items()}
        position, seconds = int(checkpoint["position"]), float(checkpoint["seconds"])
        trainer.load_state_dict(checkpoint)
        return checkpoint["epochs"], angles, position, seconds


def _save(content: dict, file: BinaryIO) -> None:
    whole = io.BytesIO()  # torch.save to a file turns an OSError into a RuntimeError
    torch.save(content, whole)
    file.write(whole.getbuffer())


def environment(device: torch.device) -> dict:
    """Returns the versions, the device and the git commit of a run, for `config.json`."""
    # Named explicitly: git could find another project's checkout around an installed copy.
    checkout = Path(__file__).resolve().parents[1] / ".git"
    command = ["git", f"--git-dir={checkout}", "rev-parse", "--verify", "HEAD"]
    commit = None
    with suppress(OSError):  # git may be missing; outside a checkout, it prints nothing
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def _totals(output: Tensor, mean_loss: Tensor, y: Tensor) -> Tensor:
    """Returns the summed loss and the number of correct answers of a batch, float64 (2,)."""
    correct = (output.argmax(1) == y).sum()
    return torch.stack([mean_loss.double() * len(y), correct.double()])


def _means(totals: Tensor, samples: int) -> tuple[float, float]:
    loss, correct = totals.tolist()
    return loss / samples, 100 * correct / samples
