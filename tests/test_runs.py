"""One run: what it computes, what it writes down, and that it may be interrupted anywhere."""

import json
import math
import random
import subprocess
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import log_retrieval
from dfatools import DFA, DFALayer, prealign
from mltools import checkpoints, results, runs, training
from mltools.data import DataSet, Part, TrainingLoader
from mltools.errors import UserError
from mltools.logs import epoch_lines
from mltools.networks import Network
from mltools.results import RunFolder
from mltools.runs import train
from mltools.training import Experiment

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(log_retrieval.__file__).parent
CPU = torch.device("cpu")
SMALL = Network(hidden=(8, 7, 6))
BP = {"training_method": "bp", "learning_rate": 0.5}
DFA_SUM = {"reduction": "sum", "learning_rate": 0.02}
REGULARISED = {"batchnorm": True, "dropout_input": 0.1, "dropout_fc": 0.5}
EPOCHS, BATCH = 3, 8
WRITTEN = 6e-5  # metrics.jsonl has four decimals
EXACT = 1e-12


@pytest.fixture
def float64(monkeypatch):
    """Runs compute in float64, so that mathematics can be compared whatever the order of sums."""
    resident = Part.resident

    def exact(part, device):
        x, y = resident(part, device)
        return x.double(), y

    monkeypatch.setattr(Part, "resident", exact)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def part(count, shape, seed):
    random_state = np.random.default_rng(seed)
    x = torch.from_numpy(random_state.integers(0, 256, (count, *shape), dtype=np.uint8))
    y = torch.from_numpy(random_state.integers(0, 3, count))
    return Part(TensorDataset(x, y), (0.4,), (0.25,))


def tiny(shape=(1, 4, 5), test=150):
    """45 training images: five batches of 8 and an incomplete one."""
    return DataSet("tiny", 3, shape, part(45, shape, 1), part(test, shape, 2))


def settings_of(experiment, **changes):
    common = {"dataset": "tiny", "epochs": EPOCHS, "batch_size": BATCH, "seed": 4}
    return {
        "experiment": asdict(experiment),
        **common,
        "feedback_placement": "every-layer",
        "precision": "float32",
        **changes,
    }


def run(path, experiment, data=None, epoch_ended=lambda: None, stop=None, **changes):
    """Trains; returns the folder and the lines that were reported."""
    folder, lines = RunFolder(path), []
    settings = settings_of(experiment, **changes)
    ended = lambda metrics: epoch_ended()  # noqa: E731
    stop = stop or threading.Event()
    train(experiment, data or tiny(), folder, settings, CPU, lines.append, ended, stop)
    return folder, lines


def state(folder):
    return torch.load(folder.path / "state.pt", weights_only=True)


def outcome(folder):
    """All that a run leaves but times: metrics, angles and weights, in comparable form."""
    metrics = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in folder.metrics()]
    angles = {layer: cosines.tolist() for layer, cosines in folder.angles().items()}
    weights = {name: tensor.tolist() for name, tensor in state(folder).items()}
    return metrics, angles, weights


def network_of(experiment, data, seed=4):
    """The run's network, and the same modules without those of DFA."""
    torch.manual_seed(seed)
    model = experiment.network.build(
        data.input_shape, data.classes, "every-layer",
        normalization=experiment.normalization, reduction=experiment.reduction,
    )  # fmt: skip
    kept = [(n, m) for n, m in model.named_children() if not isinstance(m, (DFA, DFALayer))]
    return model, nn.Sequential(OrderedDict(kept))


def training_batches(data, epoch, seed=4):
    batches = list(TrainingLoader(data.train, BATCH, CPU, seed).epoch(epoch))
    assert [len(y) for _, y in batches] == [BATCH] * 5
    return batches


@pytest.mark.parametrize(
    "network, shape",
    [
        (SMALL, (1, 4, 5)),
        (Network(hidden=(8, 7, 6), **REGULARISED), (1, 4, 5)),
        (Network("cnn", batchnorm=True, dropout_conv=0.2), (1, 15, 16)),
    ],
    ids=["fc", "fc-regularised", "cnn"],
)
def test_a_bp_run_equals_a_plain_loop(tmp_path, monkeypatch, float64, network, shape):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 130)  # two batches, of 130 and 20
    data = tiny(shape)
    experiment = Experiment("bp", network, training_method="bp", learning_rate=0.05)
    folder, _ = run(tmp_path, experiment, data)

    _, model = network_of(experiment, data)
    torch.manual_seed(4)  # the run's dropout starts from its seed
    (x_test, y_test) = data.test.resident(CPU)
    for epoch, metrics in enumerate(folder.metrics(), 1):
        model.train()
        losses, hits = [], []
        for x, y in training_batches(data, epoch):
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
        assert metrics["epoch"] == epoch
        assert metrics["train_loss"] == pytest.approx(np.mean(losses), abs=WRITTEN)
        assert metrics["train_accuracy"] == pytest.approx(100 * np.mean(hits), abs=WRITTEN)
        picked = log_p[torch.arange(150), y_test]
        assert metrics["test_loss"] == pytest.approx(-picked.mean().item(), abs=WRITTEN)
        correct = (log_p.argmax(1) == y_test).sum().item()
        assert metrics["test_accuracy"] == pytest.approx(100 * correct / 150, abs=WRITTEN)
    assert epoch == EPOCHS

    final = state(folder)
    expected = model.state_dict()
    assert set(final) == {*expected, "dfa.feedback_matrix"}
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=EXACT, msg=name)


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_dfa_run_follows_the_papers_update(tmp_path, float64, normalization, reduction):
    data, rate = tiny(), 0.02
    experiment = Experiment(
        "dfa", SMALL, normalization=normalization, reduction=reduction, learning_rate=rate
    )
    folder, _ = run(tmp_path, experiment, data)

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

    final = state(folder)
    np.testing.assert_array_equal(final.pop("dfa.feedback_matrix"), matrix)
    assert set(final) == set(w)
    for name, tensor in final.items():
        np.testing.assert_allclose(tensor, w[name], rtol=0, atol=EXACT)
        assert np.abs(tensor.numpy() - start[name]).max() > 1e-3, f"{name} has not learnt"


@pytest.mark.parametrize("test_size, measured", [(150, 128), (20, 20)])
def test_alignment_is_that_of_the_first_128_test_samples_in_eval_mode(
    tmp_path, float64, test_size, measured
):
    data = tiny(test=test_size)
    network = Network(hidden=(8, 7, 6), dropout_input=0.3, dropout_fc=0.5)
    experiment = Experiment("dfa", network, **DFA_SUM)
    folder, _ = run(tmp_path, experiment, data)

    _, model = network_of(experiment, data)
    final = state(folder)
    matrix = final.pop("dfa.feedback_matrix")
    model.load_state_dict(final)
    model.eval()
    x, y = (tensor[:128] for tensor in data.test.resident(CPU))
    hidden, h = {}, x
    for name, module in model.named_children():
        h = hidden[name] = module(h)
    loss = F.cross_entropy(h, y)
    error = torch.autograd.grad(loss, h, retain_graph=True)[0]
    angles = folder.angles()
    for name, size in [("act1", 8), ("act2", 7), ("act3", 6)]:
        gradient = torch.autograd.grad(loss, hidden[name], retain_graph=True)[0]
        expected = F.cosine_similarity(error @ matrix[:, :size], gradient).numpy()
        cosines = angles[name]
        assert cosines.dtype == np.float32 and cosines.shape == (EPOCHS, measured)
        np.testing.assert_allclose(cosines[-1], expected, rtol=0, atol=1e-7)  # as float32
        for epoch, metrics in enumerate(folder.metrics()):
            spread = metrics["alignment"][name]
            assert spread["mean"] == pytest.approx(np.mean(cosines[epoch]), abs=WRITTEN)
            assert spread["std"] == pytest.approx(np.std(cosines[epoch], ddof=1), abs=WRITTEN)
        assert not np.array_equal(cosines[0], cosines[-1])
    assert set(metrics["alignment"]) == set(angles)


@pytest.mark.parametrize("method", ["bp", "shallow"])
def test_other_methods_than_dfa_have_no_alignment(tmp_path, method):
    folder, _ = run(tmp_path, Experiment(method, SMALL, training_method=method))
    assert [epoch["alignment"] for epoch in folder.metrics()] == [{}] * EPOCHS
    assert folder.angles() == {}


class Interrupted(Exception):
    pass


REGULAR_RUN = Experiment("dfa", Network(hidden=(8, 7, 6), **REGULARISED), **DFA_SUM)
BP_RUN = Experiment("bp", Network(hidden=(8, 7, 6), **REGULARISED), **BP)


@pytest.mark.parametrize("experiment", [REGULAR_RUN, BP_RUN], ids=["dfa", "bp"])
@pytest.mark.parametrize("epochs", range(1, EPOCHS + 1))
def test_a_run_interrupted_between_epochs_ends_the_same(tmp_path, epochs, experiment):
    whole, _ = run(tmp_path / "whole", experiment)

    done = []

    def stop():
        done.append(None)
        if len(done) == epochs:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "part", experiment, epoch_ended=stop)
    assert len(RunFolder(tmp_path / "part").metrics()) == epochs
    assert not (tmp_path / "part/state.pt").exists()

    torch.rand(epochs)  # another process would have another random state
    again = []
    resumed, lines = run(tmp_path / "part", experiment, epoch_ended=lambda: again.append(None))
    assert len(again) == EPOCHS - epochs
    assert lines[0].endswith(f"going on after epoch {epochs}")
    assert outcome(resumed) == outcome(whole)
    assert sorted(p.name for p in resumed.path.iterdir()) == sorted(
        p.name for p in whole.path.iterdir()
    )


@pytest.mark.parametrize(
    "name, count",
    [("angles.npz", 1), ("angles.npz", 3), ("checkpoint.pt", 1), ("checkpoint.pt", 2),
     ("checkpoint.pt", 3), ("state.pt", 1)],
)  # fmt: skip
@pytest.mark.parametrize("torn", [b"", b'{"epoch": 4, "train_lo'], ids=["", "torn"])
def test_a_run_interrupted_between_two_files_ends_the_same(
    tmp_path, monkeypatch, name, count, torn
):
    whole, _ = run(tmp_path / "whole", REGULAR_RUN)
    writes = []

    def stop(path, write):
        if path.name == name:
            writes.append(path)
            if len(writes) == count:
                raise Interrupted
        write_atomically(path, write)

    write_atomically = results.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_atomically", lambda path, write: stop(path, write))
        with pytest.raises(Interrupted):
            run(tmp_path / "part", REGULAR_RUN)
    with open(tmp_path / "part/metrics.jsonl", "ab") as file:
        file.write(torn)
    resumed, _ = run(tmp_path / "part", REGULAR_RUN)
    assert outcome(resumed) == outcome(whole)


@pytest.mark.parametrize("experiment", [REGULAR_RUN, BP_RUN], ids=["dfa", "bp"])
def test_the_same_seed_gives_the_same_bits_whatever_ran_before(tmp_path, experiment):
    first, _ = run(tmp_path / "first", experiment)
    other, _ = run(tmp_path / "other", experiment, seed=5)
    torch.rand(3), np.random.rand(3), random.random()
    second, _ = run(tmp_path / "second", experiment)
    assert outcome(first) == outcome(second)
    assert all(a != b for a, b in zip(outcome(first)[0], outcome(other)[0]))


@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_a_diverged_run_stops_is_recorded_as_null_and_logged(tmp_path, method):
    network = Network(hidden=(8, 7, 6), activation="relu")
    experiment = Experiment("wild", network, training_method=method, learning_rate=1e30)
    calls = []
    folder, lines = run(tmp_path, experiment, epoch_ended=lambda: calls.append(None), epochs=9)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (metrics,) = [json.loads(line, parse_constant=refuse) for line in text]
    assert metrics["epoch"] == 1 and len(calls) == 1
    assert metrics["train_loss"] is None and metrics["test_loss"] is None
    assert results.diverged(metrics) and folder.finished()
    message = "wild seed 4: diverged in epoch 1, stopped"
    assert lines[-1] == message
    assert f"  {message} #" in (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_finished_run_leaves_the_files_of_the_design(tmp_path):
    folder, _ = run(tmp_path, REGULAR_RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "angles.npz", "config.json", "log.txt", "metrics.jsonl", "state.pt"
    ]  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"] == json.loads(json.dumps(settings_of(REGULAR_RUN)))
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["device"] == "cpu"
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert config["environment"]["commit"] == (commit or None)
    for metrics in folder.metrics():
        assert list(metrics) == [
            "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "alignment",
            "seconds",
        ]  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    for metrics in folder.metrics():
        said = epoch_lines(metrics, EPOCHS)
        assert [line for line in said if f"  {line} #" not in log] == []


def test_the_state_is_that_of_the_network_and_loads_into_it(tmp_path):
    folder, _ = run(tmp_path, REGULAR_RUN)
    model, _ = network_of(REGULAR_RUN, tiny(), seed=99)
    model.load_state_dict(state(folder))
    x, y = tiny().test.resident(CPU)
    accuracy = 100 * (model.eval()(x).argmax(1) == y).sum().item() / len(y)
    assert accuracy == pytest.approx(folder.metrics()[-1]["test_accuracy"], abs=WRITTEN)


def test_a_prealigned_run_starts_from_weights_set_on_the_first_batch(tmp_path):
    data = tiny()
    experiment = Experiment("pai", SMALL, prealigned=True, reduction="sum", learning_rate=0.0)
    folder, _ = run(tmp_path, experiment, data)
    model, _ = network_of(experiment, data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prealign(model, *training_batches(data, 0)[0], F.cross_entropy)
    for name, tensor in state(folder).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(model.lin4.weight, before["lin4.weight"])


def test_a_prealigned_run_that_goes_on_is_not_prealigned_again(tmp_path):
    experiment = Experiment("pai", SMALL, prealigned=True, **DFA_SUM)
    whole, _ = run(tmp_path / "whole", experiment)

    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "part", experiment, epoch_ended=stop)
    resumed, _ = run(tmp_path / "part", experiment)
    assert outcome(resumed) == outcome(whole)


@pytest.mark.parametrize("damage", [b"", b"text", b"PK\x03\x04 torn", "half"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(tmp_path, damage):
    def stop():
        raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path, REGULAR_RUN, epoch_ended=stop)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="checkpoint.pt cannot be read") as caught:
        run(tmp_path, REGULAR_RUN)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_too_large_a_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="46 .*45 images"):
        run(tmp_path / "run", REGULAR_RUN, batch_size=46)
    assert not (tmp_path / "run").exists()


def interrupted(path, epochs):
    """A run that was stopped after so many epochs."""
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, Experiment("bp", SMALL, **BP), epoch_ended=stop)
    return RunFolder(path)


@pytest.mark.parametrize("kept", [0, 1, None])
def test_metrics_that_were_lost_before_the_checkpoint_are_brought_back(tmp_path, monkeypatch, kept):
    experiment = Experiment("bp", SMALL, **BP)
    whole, _ = run(tmp_path / "whole" / "bp" / "seed-4", experiment)
    folder = interrupted(tmp_path / "bp" / "seed-4", 2)
    lost = folder.path / "metrics.jsonl"
    if kept is None:
        lost.unlink()
    else:
        folder.write_metrics(folder.metrics()[:kept])
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(UserError, match=f"has {kept or 0} of 2 epochs: move it away and bring it"):
        run(folder.path, experiment)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
    lost.unlink(missing_ok=True)
    monkeypatch.setattr("sys.argv", ["", str(folder.path / "log.txt"), "--output", str(tmp_path)])
    assert log_retrieval.main() == 0
    run(folder.path, experiment)
    assert outcome(folder) == outcome(whole)


def test_metrics_that_are_lost_while_the_run_goes_on_end_it(tmp_path):
    calls = []

    def lose():
        calls.append(None)
        if len(calls) == 2:
            (tmp_path / "metrics.jsonl").unlink()

    with pytest.raises(UserError, match="has 0 of 2 epochs"):
        run(tmp_path, REGULAR_RUN, epoch_ended=lose)
    assert RunFolder(tmp_path).metrics() == [] and (tmp_path / "checkpoint.pt").exists()


def test_the_seconds_of_an_epoch_go_on_where_it_was_stopped(tmp_path):
    experiment, stop = Experiment("bp", SMALL, **BP), threading.Event()
    step = training.Trainer.step

    def stopping(trainer):
        stop.set()
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "step", stopping)
        folder, _ = run(tmp_path, experiment, stop=stop)
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["batch"]) == (0, 1) and checkpoint["seconds"] > 0
    with open(path, "wb") as file:
        checkpoints.save(file, {**checkpoint, "seconds": 1000.0})
    run(tmp_path, experiment)
    first, *later = folder.metrics()
    assert first["seconds"] > 1000 and all(metrics["seconds"] < 1000 for metrics in later)


def test_a_diverged_run_that_was_killed_before_its_end_does_not_train_on(tmp_path):
    folder = interrupted(tmp_path / "run", 2)
    first, second = folder.metrics()
    folder.write_metrics([first, {**second, "train_loss": None}])
    run(tmp_path / "run", Experiment("bp", SMALL, **BP))
    assert len(folder.metrics()) == 2 and (folder.path / "state.pt").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    one, other = interrupted(tmp_path / "one", 2), interrupted(tmp_path / "other", 2)
    settings = settings_of(Experiment("bp", SMALL, **BP), seed=5)
    content = torch.load(one.path / "checkpoint.pt", weights_only=True)
    torch.save({**content, "settings": json.dumps(settings)}, other.path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt is another run's"):
        run(other.path, Experiment("bp", SMALL, **BP))
    torch.save({**content, "device": "cuda"}, other.path / "checkpoint.pt")
    with pytest.raises(UserError, match="was begun on cuda: go on there"):
        run(other.path, Experiment("bp", SMALL, **BP))
    assert len(other.metrics()) == 2


@pytest.mark.parametrize("damage", ["shape", "missing", "type", "generator"])
def test_a_checkpoint_that_does_not_fit_the_network_is_one_line(tmp_path, damage):
    folder = interrupted(tmp_path / "run", 2)
    path = folder.path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    if damage == "shape":
        content["model"]["lin1.weight"] = torch.zeros(3, 3)
    elif damage == "missing":
        del content["model"]["lin1.weight"]
    elif damage == "type":
        content["totals"] = "none"
    else:
        content["generator"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(content, path)
    with pytest.raises(UserError, match="checkpoint.pt cannot be read") as caught:
        run(folder.path, Experiment("bp", SMALL, **BP))
    assert "\n" not in str(caught.value) and len(folder.metrics()) == 2


def test_a_thread_has_a_stream_and_its_backward_passes(monkeypatch):
    """What torch.cuda would be asked for, on a machine that may have none."""
    current, devices = [], []

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def seen(device="cuda:1"):
        with runs._beside_others(torch.device(device)):
            return current[-1], torch._C._is_multithreading_enabled()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(runs, "_thread", threading.local())
    with ThreadPoolExecutor(1) as pool:
        elsewhere, _ = pool.submit(seen).result()
    (stream, multithreading), (again, _) = seen(), seen()
    assert stream is again is not elsewhere and not multithreading
    assert devices == [torch.device("cuda:1")] * 2
    assert seen("cuda")[0] is not stream and len(devices) == 2  # "cuda" is the current one
    assert not current and torch._C._is_multithreading_enabled()
