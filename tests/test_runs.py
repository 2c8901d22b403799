"""One run: its numbers against plain loops, its files, and its resumption after an interruption."""

import json
import math
import random
import subprocess
import threading
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
from dfatools import DFA, DFALayer, prealign
from mltools import training
from mltools.data import Split, TrainingLoader
from mltools.errors import UserError
from mltools.logs import epoch_lines
from mltools.networks import Network
from mltools.results import RunFolder
from mltools.training import Experiment, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

DFA_SUM = {"reduction": "sum", "learning_rate": 0.02}
REGULARISED = Network(hidden=(8, 7, 6), batchnorm=True, dropout_input=0.1, dropout_fc=0.5)
DFA_RUN = Experiment("dfa", REGULARISED, **DFA_SUM)
BP_RUN = Experiment("bp", REGULARISED, training_method="bp", learning_rate=0.5)
EITHER = pytest.mark.parametrize("experiment", [DFA_RUN, BP_RUN], ids=["dfa", "bp"])
WRITTEN = 6e-5  # metrics.jsonl has four decimals
EXACT = 1e-12


@pytest.fixture
def float64(monkeypatch):
    """Runs compute in float64, so that mathematics can be compared whatever the order of sums."""
    resident = Split.resident

    def exact(split, device):
        x, y = resident(split, device)
        return x.double(), y

    monkeypatch.setattr(Split, "resident", exact)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network_of(experiment, data, seed=SEED):
    """The run's network, and the same modules without those of DFA."""
    torch.manual_seed(seed)
    model = experiment.network.build(
        data.input_shape, data.classes, "every-layer",
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
    [
        (SMALL, (1, 4, 5)),
        (REGULARISED, (1, 4, 5)),
        (Network("cnn", dropout_fc=0.2), (1, 15, 16)),
    ],
    ids=["fc", "fc-regularised", "cnn"],
)
def test_a_bp_run_equals_a_plain_loop(tmp_path, monkeypatch, float64, network, shape):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 130)  # two batches, of 130 and 20
    data = tiny.tiny(shape)
    experiment = Experiment("bp", network, training_method="bp", learning_rate=0.05)
    tiny.train(tmp_path, experiment, data)

    _, model = network_of(experiment, data)
    torch.manual_seed(SEED)  # the run's dropout starts from its seed
    x_test, y_test = data.test.resident(CPU)
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


@pytest.mark.parametrize("test_size, measured", [(150, 128), (20, 20)])
def test_alignment_is_measured_on_the_first_128_test_samples_in_eval_mode(
    tmp_path, float64, test_size, measured
):
    data = tiny.tiny(test=test_size)
    network = Network(hidden=(8, 7, 6), dropout_input=0.3, dropout_fc=0.5)
    experiment = Experiment("dfa", network, **DFA_SUM)
    tiny.train(tmp_path, experiment, data)

    _, model = network_of(experiment, data)
    final = tiny.state_of(tmp_path)
    matrix = final.pop("dfa.feedback_matrix")
    model.load_state_dict(final)
    model.eval()
    x, y = (tensor[:128] for tensor in data.test.resident(CPU))
    hidden, h = {}, x
    for name, module in model.named_children():
        h = hidden[name] = module(h)
    loss = F.cross_entropy(h, y)
    error = torch.autograd.grad(loss, h, retain_graph=True)[0]
    angles = angles_of(tmp_path)
    for name, size in [("act1", 8), ("act2", 7), ("act3", 6)]:
        gradient = torch.autograd.grad(loss, hidden[name], retain_graph=True)[0]
        expected = F.cosine_similarity(error @ matrix[:, :size], gradient).numpy()
        cosines = angles[name]
        assert cosines.dtype == np.float32 and cosines.shape == (EPOCHS, measured)
        np.testing.assert_allclose(cosines[-1], expected, rtol=0, atol=1e-7)  # as float32
        for row, metrics in zip(cosines, metrics_of(tmp_path), strict=True):
            spread = metrics["alignment"][name]
            assert spread["mean"] == pytest.approx(np.mean(row), abs=WRITTEN)
            assert spread["std"] == pytest.approx(np.std(row, ddof=1), abs=WRITTEN)
        assert not np.array_equal(cosines[0], cosines[-1])
    assert set(metrics["alignment"]) == set(angles)


@pytest.mark.parametrize("method", ["bp", "shallow"])
def test_other_methods_than_dfa_have_no_alignment(tmp_path, method):
    tiny.train(tmp_path, Experiment(method, SMALL, training_method=method))
    assert [epoch["alignment"] for epoch in metrics_of(tmp_path)] == [{}] * EPOCHS
    assert angles_of(tmp_path) == {}


# Files


def test_a_finished_run_leaves_the_files_of_the_design(tmp_path):
    tiny.train(tmp_path, DFA_RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "angles.npz", "config.json", "log.txt", "metrics.jsonl", "state.pt"
    ]  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"] == tiny.describe(DFA_RUN).settings
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["device"] == "cpu"
    git = ["git", "-C", Path(mltools.__file__).parents[1], "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert config["environment"]["commit"] == (commit or None)
    log = (tmp_path / "log.txt").read_text()
    for metrics in metrics_of(tmp_path):
        assert list(metrics) == [
            "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "alignment",
            "seconds",
        ]  # fmt: skip
        for line in epoch_lines("dfa seed 4", metrics, EPOCHS):
            assert f"  {line}\n" in log


def test_the_settings_on_disk_are_all_fields_of_the_run():
    settings = tiny.describe(Experiment("one", SMALL, learning_rate=0.25), epochs=7).settings
    assert settings["experiment"]["network"]["hidden"] == [8, 7, 6]
    assert settings["experiment"]["learning_rate"] == 0.25
    del settings["experiment"]
    assert settings == {
        "dataset": "tiny", "epochs": 7, "batch_size": BATCH, "feedback_placement": "every-layer",
        "precision": "float32", "seed": SEED, "data_crc32": None,
    }  # fmt: skip


def test_the_state_is_that_of_the_network_and_loads_into_it(tmp_path):
    tiny.train(tmp_path, DFA_RUN)
    model, _ = network_of(DFA_RUN, tiny.tiny(), seed=99)
    model.load_state_dict(tiny.state_of(tmp_path))
    x, y = tiny.tiny().test.resident(CPU)
    accuracy = 100 * (model.eval()(x).argmax(1) == y).sum().item() / len(y)
    assert accuracy == pytest.approx(metrics_of(tmp_path)[-1]["test_accuracy"], abs=WRITTEN)


def test_too_large_a_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="batch size of 46"):
        tiny.train(tmp_path / "run", DFA_RUN, batch_size=46)
    assert not (tmp_path / "run").exists()


@EITHER
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(tmp_path, experiment):
    tiny.train(tmp_path / "first", experiment)
    tiny.train(tmp_path / "other", experiment, seed=5)
    torch.rand(3), np.random.rand(3), random.random()
    tiny.train(tmp_path / "second", experiment)
    first, second, other = (outcome(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first[0] != other[0] and first[2] != other[2]


@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_a_diverged_run_stops_is_recorded_as_null_and_logged(tmp_path, method):
    network = Network(hidden=(8, 7, 6), activation="relu")
    experiment = Experiment("wild", network, training_method=method, learning_rate=1e30)
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


def test_a_prealigned_run_starts_from_weights_set_on_the_first_batch(tmp_path):
    data = tiny.tiny()
    experiment = Experiment("pai", SMALL, prealigned=True, reduction="sum", learning_rate=0.0)
    tiny.train(tmp_path, experiment, data)
    model, _ = network_of(experiment, data)
    before = model.lin4.weight.clone()
    prealign(model, *training_batches(data, 0)[0], F.cross_entropy)
    for name, tensor in tiny.state_of(tmp_path).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(model.lin4.weight, before)


# Interruptions


class Interrupted(Exception):
    pass


def interrupt_at(epoch):
    def stop(metrics):
        if metrics["epoch"] == epoch:
            raise Interrupted

    return stop


def interrupted(path, epoch=2, experiment=DFA_RUN):
    """A run that was interrupted after an epoch."""
    with pytest.raises(Interrupted):
        tiny.train(path, experiment, epoch_ended=interrupt_at(epoch))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of each run, never interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs that it is compared with
    outcomes = {}
    for experiment in (DFA_RUN, BP_RUN):
        path = tmp_path_factory.mktemp(experiment.name)
        tiny.train(path, experiment)
        outcomes[experiment] = outcome(path)
    torch.set_num_threads(threads)
    return outcomes


@EITHER
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_a_run_interrupted_between_epochs_ends_the_same(tmp_path, whole, epoch, experiment):
    interrupted(tmp_path, epoch, experiment)
    assert len(metrics_of(tmp_path)) == epoch and not (tmp_path / "state.pt").exists()
    torch.rand(epoch)  # another process would have another random state
    again = []
    lines = tiny.train(tmp_path, experiment, epoch_ended=again.append)
    assert len(again) == EPOCHS - epoch
    assert lines[0] == f"{experiment.name} seed 4: resuming after epoch {epoch}"
    assert outcome(tmp_path) == whole[experiment]


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 12])
def test_a_run_stopped_within_an_epoch_ends_the_same(tmp_path, monkeypatch, whole, steps):
    """An epoch has five steps."""
    stop, step, done = threading.Event(), Trainer.step, []

    def counted(trainer):
        step(trainer)
        done.append(None)
        if len(done) == steps:
            stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", counted)
        tiny.train(tmp_path, DFA_RUN, stop=stop)
    checkpoint = checkpoint_of(tmp_path)
    assert (len(checkpoint["epochs"]), checkpoint["position"]) == divmod(steps, 5)
    lines = tiny.train(tmp_path, DFA_RUN)
    epoch, batch = divmod(steps, 5)
    assert lines[0].endswith(f"after epoch {epoch}" + (f", batch {batch}" if batch else ""))
    assert outcome(tmp_path) == whole[DFA_RUN]


@pytest.mark.parametrize(
    "name, count",
    [("angles.npz", 1), ("angles.npz", 3), ("checkpoint.pt", 1), ("checkpoint.pt", 2),
     ("checkpoint.pt", 3), ("metrics.jsonl", 2), ("state.pt", 1)],
)  # fmt: skip
def test_a_run_interrupted_between_two_files_ends_the_same(
    tmp_path, monkeypatch, whole, name, count
):
    writes, write = [], RunFolder.write

    def stop(folder, file, content):
        writes.append(file)
        if writes.count(name) == count:
            raise Interrupted
        write(folder, file, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stop)
        with pytest.raises(Interrupted):
            tiny.train(tmp_path, DFA_RUN)
    tiny.train(tmp_path, DFA_RUN)
    assert outcome(tmp_path) == whole[DFA_RUN]


@pytest.mark.parametrize("name", ["metrics.jsonl", "angles.npz", "config.json", "log.txt"])
def test_a_lost_file_is_written_anew_from_the_checkpoint(tmp_path, whole, name):
    (interrupted(tmp_path) / name).unlink()
    tiny.train(tmp_path, DFA_RUN)
    assert outcome(tmp_path) == whole[DFA_RUN]


def test_a_prealigned_run_that_is_resumed_is_not_prealigned_again(tmp_path):
    experiment = Experiment("pai", SMALL, prealigned=True, **DFA_SUM)
    tiny.train(tmp_path / "whole", experiment)
    tiny.train(interrupted(tmp_path / "part", 1, experiment), experiment)
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")


def test_a_diverged_run_that_was_killed_before_its_end_does_not_train_on(tmp_path):
    checkpoint = checkpoint_of(interrupted(tmp_path))
    checkpoint["epochs"][-1]["train_loss"] = None
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    tiny.train(tmp_path, DFA_RUN)
    assert len(metrics_of(tmp_path)) == 2 and (tmp_path / "state.pt").exists()


def test_the_seconds_of_an_epoch_are_counted_over_its_interruption(tmp_path):
    stop = threading.Event()
    stop.set()
    tiny.train(tmp_path, DFA_RUN, stop=stop)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["epochs"] == [] and checkpoint["seconds"] > 0
    torch.save({**checkpoint, "seconds": 1000.0}, tmp_path / "checkpoint.pt")
    tiny.train(tmp_path, DFA_RUN)
    first, *later = metrics_of(tmp_path)
    assert first["seconds"] > 1000 and all(metrics["seconds"] < 1000 for metrics in later)


# Damaged checkpoints


def refused(path, match):
    """Resuming is one line, and leaves the folder as it is."""
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        tiny.train(path, DFA_RUN)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("damage", ["empty", "text", "half", "bits"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(tmp_path, damage):
    path = interrupted(tmp_path) / "checkpoint.pt"
    whole = path.read_bytes()
    weights = checkpoint_of(tmp_path)["model"]["lin1.weight"].numpy().tobytes()
    flipped = whole.replace(weights[:8], bytes(255 - byte for byte in weights[:8]))
    assert flipped != whole
    damaged = {"empty": b"", "text": b"text", "half": whole[: len(whole) // 2], "bits": flipped}
    path.write_bytes(damaged[damage])
    refused(tmp_path, "checkpoint.pt cannot be read")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update({"lin1.weight": torch.zeros(3, 3)}),
        lambda content: content["model"].pop("lin1.weight"),
        lambda content: content.pop("position"),
        lambda content: content.update(seconds="none"),
        lambda content: content.update(generator=torch.zeros(3, dtype=torch.uint8)),
        lambda content: content["epochs"][0].update(train_accuracy=250.0),
        lambda content: content["epochs"].append("epoch"),
    ],
)
def test_a_checkpoint_with_a_wrong_value_is_one_line(tmp_path, change):
    content = checkpoint_of(interrupted(tmp_path))
    change(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    refused(tmp_path, "checkpoint.pt cannot be read")


def test_a_checkpoint_with_code_in_it_is_refused_without_advice_to_execute_it(tmp_path):
    torch.save(Path("x"), interrupted(tmp_path) / "checkpoint.pt")
    refused(tmp_path, "it holds more than tensors and plain values")


def test_a_checkpoint_of_another_run_or_device_is_refused(tmp_path):
    content = checkpoint_of(interrupted(tmp_path))
    settings = tiny.describe(DFA_RUN, seed=5).settings
    torch.save({**content, "settings": settings}, tmp_path / "checkpoint.pt")
    refused(tmp_path, "checkpoint.pt is another run's")
    torch.save({**content, "device": "cuda"}, tmp_path / "checkpoint.pt")
    refused(tmp_path, "was written on cuda: resume there")
