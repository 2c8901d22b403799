"""Tiny data sets and runs for tests, and the files of a run as Python objects to compare."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from mltools.data import DataSet, Split
from mltools.networks import Network
from mltools.results import RunFolder
from mltools.training import Run, Trainer, train_run

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EPOCHS, BATCH, SEED = 3, 8, 4


def split(count, shape, seed):
    """Draws a split of random images, (count, *shape), in three classes."""
    dice = np.random.default_rng(seed)
    x = torch.from_numpy(dice.integers(0, 256, (count, *shape), dtype=np.uint8))
    y = torch.from_numpy(dice.integers(0, 3, count))
    return Split(TensorDataset(x, y), (0.4,), (0.25,))


def tiny(shape=(1, 4, 5), train=45, test=150):
    """Makes a data set; its 45 training images are five batches of 8 and an incomplete batch."""
    return DataSet("tiny", 3, shape, split(train, shape, 1), split(test, shape, 2))


SMALL = Network(hidden=(8, 7, 6))
SIX_RUNS = (
    "--dataset Digits --device cpu --batch-size 300 --epochs 2 --seeds 0 1 2 "
    "--experiments fc-dropout-0.1-0.5 fc-batchnorm"
).split()


def describe(experiment, **changes):
    common = {"dataset": "tiny", "epochs": EPOCHS, "batch_size": BATCH, "seed": SEED}
    return Run(experiment=experiment, **{**common, **changes})


def train(
    path, experiment, data=None, epoch_ended=lambda metrics: None, stopped=lambda: False, **changes
):
    """Trains or resumes a run in the folder `path`; returns its reported log lines."""
    lines = []
    trainer = Trainer(describe(experiment, **changes), data or tiny(), CPU)
    train_run(trainer, RunFolder(path), lines.append, epoch_ended, stopped)
    return lines


def metrics_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def angles_of(path):
    with np.load(path / "angles.npz", allow_pickle=False) as angles:
        return dict(angles)


def state_of(path):
    return torch.load(path / "state.pt", weights_only=True)


def checkpoint_of(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


def outcome(path):
    """Returns the metrics, cosines, weights and file names of a run, without times."""
    metrics = [{**epoch, "seconds": None} for epoch in metrics_of(path)]
    angles = {layer: cosines.tolist() for layer, cosines in angles_of(path).items()}
    weights = {name: tensor.tolist() for name, tensor in state_of(path).items()}
    return metrics, angles, weights, sorted(file.name for file in path.iterdir())


def sweep_outcome(results):
    """Returns the outcome of each run of best_practices.py, and its table."""
    folder = results / "best_practices"
    runs = {str(path.relative_to(folder)): outcome(path) for path in folder.glob("*/seed-*")}
    return runs, (folder / "table.csv").read_text()
