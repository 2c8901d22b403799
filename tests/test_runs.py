"""A run equals plain loops of BP and DFA, saves its files, and resumes with the same results."""

import json
import math
import subprocess
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import BATCH, CPU, EPOCHS, SEED, SMALL, angles_of, checkpoint_of, metrics_of, outcome
from torch import nn

import mltools
from dfatools import DFA, DFALayer, measure_alignment, prealign
from mltools import training
from mltools.data import Loader, Split, TrainingLoader
from mltools.errors import UserError
from mltools.networks import Network
from mltools.results import RunFolder
from mltools.training import Experiment

pytestmark = pytest.mark.usefixtures("one_thread")

DFA_SUM = {"reduction": "sum", "learning_rate": 0.02}
REGULARISED = Network(hidden=(8, 7, 6), batchnorm=True, dropout_input=0.1, dropout_fc=0.5)
DFA_RUN = Experiment("dfa", REGULARISED, **DFA_SUM)
WRITTEN = 6e-5  # metrics.jsonl is rounded to four decimals
EXACT = 1e-12


@pytest.fixture
def float64(monkeypatch):
    """Makes runs compute in float64, where sums in another order differ by less than `EXACT`."""
    normalizer = Split.normalizer

    def exact(split, device):
        return lambda x: normalizer(split, device)(x).double()

    monkeypatch.setattr(Split, "normalizer", exact)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network_of(experiment, data, seed=SEED):
    """Returns the run's network, and a Sequential of its modules without `DFA` and `DFALayer`."""
    torch.manual_seed(seed)
    model = experiment.network.build(
        data.input_shape, data.classes, "corrected",
        normalization=experiment.normalization, reduction=experiment.reduction,
    )  # fmt: skip
    kept = [(n, m) for n, m in model.named_children() if not isinstance(m, (DFA, DFALayer))]
    return model, nn.Sequential(OrderedDict(kept))


def training_batches(data, epoch):
    loader = TrainingLoader(data.train, BATCH, CPU, SEED)
    loader.begin(epoch)
    return [loader.take() for _ in range(5)]


@pytest.mark.parametrize(
    "network, shape",
    [(REGULARISED, (1, 4, 5)), (Network("cnn", dropout_fc=0.2), (1, 15, 16))],
    ids=["fc", "cnn"],
)
def test_a_bp_run_equals_a_plain_loop(tmp_path, monkeypatch, float64, network, shape):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 130)  # two batches, of 130 and 20
    data = tiny.tiny(shape)
    experiment = Experiment("bp", network, training_method="bp", learning_rate=0.05)
    tiny.train(tmp_path, experiment, data)

    _, model = network_of(experiment, data)
    torch.manual_seed(SEED)  # the seed of the run's dropout
    ((x_test, y_test),) = Loader(data.test, 150, CPU)
    written = metrics_of(tmp_path)
    assert [metrics["epoch"] for metrics in written] == [1, 2, 3]
    for metrics in written:
        model.train()
        losses, hits = [], []
        for x, y in training_batches(data, metrics["epoch"]):
            output = model(x)
            loss = F.cross_entropy(output, y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter.add_(gradient, alpha=-0.05)
            losses.append(loss.item())
            hits.append((output.argmax(1) == y).double().mean().item())
        model.eval()
        with torch.no_grad():
            log_p = model(x_test).log_softmax(1)
        assert metrics["train_loss"] == pytest.approx(np.mean(losses), abs=WRITTEN)
        assert metrics["train_accuracy"] == pytest.approx(100 * np.mean(hits), abs=WRITTEN)
        picked = log_p[torch.arange(150), y_test]
        assert metrics["test_loss"] == pytest.approx(-picked.mean().item(), abs=WRITTEN)
        correct = (log_p.argmax(1) == y_test).sum().item()
        assert metrics["test_accuracy"] == pytest.approx(100 * correct / 150, abs=WRITTEN)

    final, expected = tiny.state_of(tmp_path), model.state_dict()
    assert set(final) == {*expected, "dfa.feedback_matrix"}
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=EXACT, msg=name)


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_dfa_run_follows_the_papers_update(tmp_path, float64, normalization, reduction):
    data, rate = tiny.tiny(), 0.02
    experiment = Experiment(
        "dfa", SMALL, normalization=normalization, reduction=reduction, learning_rate=rate
    )
    tiny.train(tmp_path, experiment, data)

    model, _ = network_of(experiment, data)
    start = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    w = {name: tensor.copy() for name, tensor in start.items()}
    matrix = w.pop("dfa.feedback_matrix")
    for epoch in range(1, EPOCHS + 1):
        for x, y in training_batches(data, epoch):
            h = [x.flatten(1).numpy()]
            for i in (1, 2, 3):
                h.append(np.tanh(h[-1] @ w[f"lin{i}.weight"].T + w[f"lin{i}.bias"]))
            logits = h[-1] @ w["lin4.weight"].T + w["lin4.bias"]
            error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y.numpy()]
            updates = {4: error / BATCH}
            for i in (1, 2, 3):
                size = h[i].shape[1]
                feedback = matrix[:, :size] / (math.sqrt(size * 3) if normalization else 1)
                sent = (error if reduction == "sum" else error / BATCH) @ feedback
                updates[i] = sent * (1 - h[i] ** 2)
            for i, update in updates.items():
                w[f"lin{i}.weight"] -= rate * update.T @ h[i - 1]
                w[f"lin{i}.bias"] -= rate * update.sum(0)

    final = tiny.state_of(tmp_path)
    np.testing.assert_array_equal(final.pop("dfa.feedback_matrix"), matrix)
    assert set(final) == set(w)
    for name, tensor in final.items():
        np.testing.assert_allclose(tensor, w[name], rtol=0, atol=EXACT)
        assert np.abs(tensor.numpy() - start[name]).max() > 1e-3, f"{name} has not learnt"


def test_alignment_is_measured_on_the_first_128_test_samples(tmp_path, float64):
    data = tiny.tiny()
    network = Network(hidden=(8, 7, 6), dropout_input=0.3, dropout_fc=0.5)
    experiment = Experiment("dfa", network, **DFA_SUM)
    tiny.train(tmp_path, experiment, data)

    model, _ = network_of(experiment, data)
    model.load_state_dict(tiny.state_of(tmp_path))
    x, y = next(iter(Loader(data.test, 128, CPU)))
    expected = measure_alignment(model, x, y, F.cross_entropy)
    angles = angles_of(tmp_path)
    assert set(expected) == set(angles) > {"act1", "act2", "act3"}
    for name, cosines in angles.items():
        assert cosines.dtype == np.float32 and cosines.shape == (EPOCHS, 128)
        np.testing.assert_allclose(cosines[-1], expected[name], rtol=0, atol=1e-7)  # in float32
        for row, metrics in zip(cosines, metrics_of(tmp_path), strict=True):
            spread = metrics["alignment"][name]
            assert spread["mean"] == pytest.approx(np.mean(row), abs=WRITTEN)
            assert spread["std"] == pytest.approx(np.std(row, ddof=1), abs=WRITTEN)
    assert not np.array_equal(angles["act1"][0], angles["act1"][-1])
    assert set(metrics["alignment"]) == set(angles)


@pytest.mark.parametrize("method", ["bp", "shallow"])
def test_other_methods_than_dfa_have_no_alignment(tmp_path, method):
    tiny.train(tmp_path, Experiment(method, SMALL, training_method=method))
    assert [epoch["alignment"] for epoch in metrics_of(tmp_path)] == [{}] * EPOCHS
    assert angles_of(tmp_path) == {}


# Files


def test_a_finished_run_has_the_expected_files_and_settings(tmp_path):
    tiny.train(tmp_path, DFA_RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "angles.npz", "config.json", "log.txt", "metrics.jsonl", "state.pt"
    ]  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    experiment = config["settings"].pop("experiment")
    assert experiment["network"]["hidden"] == [8, 7, 6] and experiment["learning_rate"] == 0.02
    assert config["settings"] == {
        "dataset": "tiny", "epochs": EPOCHS, "batch_size": BATCH, "precision": "float32",
        "protocol": "corrected", "seed": SEED, "data_crc32": None,
    }  # fmt: skip
    git = ["git", "-C", Path(mltools.__file__).parents[1], "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    expected = {"torch": torch.__version__, "device": "cpu", "commit": commit}
    assert expected.items() <= config["environment"].items()
    for metrics in metrics_of(tmp_path):
        assert list(metrics) == [
            "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "alignment",
            "seconds",
        ]  # fmt: skip


def test_a_diverged_run_stops_with_null_losses_and_a_log_line(tmp_path):
    experiment = Experiment("wild", Network(hidden=(8, 7), activation="relu"), learning_rate=1e30)
    ended = []
    lines = tiny.train(tmp_path, experiment, epoch_ended=ended.append, epochs=9)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (metrics,) = [json.loads(line, parse_constant=refuse) for line in text]
    assert metrics["epoch"] == 1 and ended == [metrics]
    assert metrics["train_loss"] is None and metrics["test_loss"] is None
    assert RunFolder(tmp_path).load().finished
    message = "wild seed 4: diverged in epoch 1, stopped"
    assert lines[-1] == message
    assert (tmp_path / "log.txt").read_text().endswith(f"  {message}\n")


# Interruptions


def interrupted(path, experiment=DFA_RUN):
    """Trains a run until its first epoch has ended; returns the run's folder."""
    ended = []
    tiny.train(path, experiment, epoch_ended=ended.append, stopped=lambda: bool(ended))
    return path


@pytest.fixture
def whole(one_thread, tmp_path_factory):
    """The outcome of `DFA_RUN` without an interruption."""
    path = tmp_path_factory.mktemp("whole")
    tiny.train(path, DFA_RUN)
    return outcome(path)


@pytest.mark.parametrize("steps", [1, 5, 9, 10])
def test_a_run_resumed_after_any_step_gives_the_same_results(tmp_path, whole, steps):
    """An epoch has five steps."""
    asked = iter(range(steps + 1))  # `stopped` is called before each step
    tiny.train(tmp_path, DFA_RUN, stopped=lambda: next(asked) == steps)
    checkpoint, (epoch, batch) = checkpoint_of(tmp_path), divmod(steps, 5)
    assert (len(checkpoint["epochs"]), checkpoint["position"]) == (epoch, batch)
    torch.rand(steps)  # another process would have another random state
    again = []
    lines = tiny.train(tmp_path, DFA_RUN, epoch_ended=again.append)
    assert lines[0].endswith(f"after epoch {epoch}" + (f", batch {batch}" if batch else ""))
    assert len(again) == EPOCHS - epoch
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize(
    "name, count",
    [("angles.npz", 3), ("checkpoint.pt", 1), ("checkpoint.pt", 3), ("metrics.jsonl", 2),
     ("state.pt", 1)],
)  # fmt: skip
def test_a_run_interrupted_between_two_files_gives_the_same_results(
    tmp_path, monkeypatch, whole, name, count
):
    writes, write = [], RunFolder.write

    def stop(folder, file, content):
        writes.append(file)
        if writes.count(name) == count:
            raise KeyboardInterrupt
        write(folder, file, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path, DFA_RUN)
    tiny.train(tmp_path, DFA_RUN)
    assert outcome(tmp_path) == whole


def test_a_finished_run_is_not_trained_again(tmp_path):
    tiny.train(tmp_path, DFA_RUN)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert tiny.train(tmp_path, DFA_RUN) == []
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "angles.npz", "config.json", "log.txt"])
def test_a_lost_file_is_restored_from_the_checkpoint(tmp_path, whole, name):
    (interrupted(tmp_path) / name).unlink()
    tiny.train(tmp_path, DFA_RUN)
    assert outcome(tmp_path) == whole


def test_a_resumed_run_is_prealigned_only_once_on_its_first_batch(tmp_path):
    data = tiny.tiny()
    experiment = Experiment("pai", SMALL, prealigned=True, reduction="sum", learning_rate=0.0)
    tiny.train(interrupted(tmp_path, experiment), experiment, data)
    model, _ = network_of(experiment, data)
    before = model.lin4.weight.clone()
    prealign(model, *training_batches(data, 0)[0], F.cross_entropy)
    for name, tensor in tiny.state_of(tmp_path).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(model.lin4.weight, before)


def test_a_diverged_run_killed_before_its_end_is_not_trained_further(tmp_path):
    checkpoint = checkpoint_of(interrupted(tmp_path))
    checkpoint["epochs"][-1]["train_loss"] = None
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    tiny.train(tmp_path, DFA_RUN)
    assert len(metrics_of(tmp_path)) == 1 and (tmp_path / "state.pt").exists()


def test_the_seconds_of_an_epoch_include_the_time_before_its_interruption(tmp_path):
    tiny.train(tmp_path, DFA_RUN, stopped=lambda: True)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["epochs"] == [] and checkpoint["seconds"] > 0
    torch.save({**checkpoint, "seconds": 1000.0}, tmp_path / "checkpoint.pt")
    tiny.train(tmp_path, DFA_RUN)
    first, *later = metrics_of(tmp_path)
    assert first["seconds"] > 1000 and all(metrics["seconds"] < 1000 for metrics in later)


@pytest.mark.parametrize("change, message", [
    ({"model": {}}, "cannot be read"),
    ({"position": "one"}, "cannot be read"),
    ({"epochs": [{"epoch": 250}]}, "cannot be read"),
    ({"angles": Path("code")}, "it holds more than tensors and plain values"),
    ({"settings": tiny.describe(DFA_RUN, seed=5).settings}, "belongs to another run"),
    ({"device": "cuda"}, "was saved on cuda: resume there"),
])  # fmt: skip
def test_an_unusable_checkpoint_is_reported_in_one_line_and_kept(tmp_path, change, message):
    path = interrupted(tmp_path) / "checkpoint.pt"
    torch.save(checkpoint_of(tmp_path) | change, path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as error:
        tiny.train(tmp_path, DFA_RUN)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
