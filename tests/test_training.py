"""A run's arithmetic: its steps with and without each speed-up, alone and beside others."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import dfatools
from mltools import training
from mltools.data import DataSet, Part
from mltools.layers import Conv2d, Linear, MaxPool2d, Tanh
from mltools.networks import Network
from mltools.training import Experiment, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))]  # fmt: skip


FC = Network(hidden=(8, 7, 6), batchnorm=True, dropout_input=0.1, dropout_fc=0.3)
CNN = Network("cnn", batchnorm=True, dropout_conv=0.2)
POOLED = Network("cnn", dropout_conv=0.2)  # in which Tanh and pooling change places
BOTTLENECK = Network(hidden=(8, 7, 6), bottleneck=0.5)
NETWORKS = pytest.mark.parametrize(
    "network", [FC, CNN, POOLED, BOTTLENECK], ids=["fc", "cnn", "pooled", "thin"]
)


@pytest.fixture
def deterministic(monkeypatch):
    """As --deterministic, without which some of cuDNN's sums differ from call to call."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


def part(count, seed):
    random_state = np.random.default_rng(seed)
    x = torch.from_numpy(random_state.integers(0, 256, (count, 1, 15, 15), dtype=np.uint8))
    y = torch.from_numpy(random_state.integers(0, 3, count))
    return Part(TensorDataset(x, y), (0.4,), (0.25,))


DATA = DataSet("tiny", 3, (1, 15, 15), part(85, 1), part(150, 2))


def trainer(network, device=CPU, seed=4, batch_size=8, method="dfa", rate=0.02, **settings):
    experiment = Experiment("one", network, method, reduction="sum", learning_rate=rate)
    common = {"feedback_placement": "every-layer", "precision": "float32"}
    settings = {"seed": seed, "batch_size": batch_size, **common, **settings}
    return Trainer(experiment, DATA, settings, torch.device(device))


def steps(trainer, count=20):
    """That many training steps, over epochs of ten."""
    done = 0
    while done < count:
        if done % 10 == 0:
            trainer.begin(1 + done // 10)
        done += trainer.step()


def outcome(trainer):
    """Weights, buffers, totals and random state, to compare bit by bit."""
    state = trainer.state_dict()
    tensors = {**state["model"], "totals": state["totals"], "generator": state["generator"]}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def learn_in_float64(trainer):
    """Twenty steps of a model in float64, where rounding does not decide what a pooling picks."""
    for epoch in (1, 2):
        trainer.begin(epoch)
        for x, y in trainer.batches.epoch(epoch):
            trainer.learn(x.double(), y)


@NETWORKS
@pytest.mark.parametrize("method", ["dfa", "bp"])
def test_a_fast_step_agrees_with_a_plain_one(network, method):
    # The paper's rate; a much larger one doubles the difference in each step.
    fast, plain = (trainer(network, method=method, rate=5e-4) for _ in range(2))
    fast.model.double(), plain.model.double()
    before = {name: value.clone() for name, value in plain.model.state_dict().items()}
    for module in plain.model.modules():
        if isinstance(module, (Linear, Conv2d)):
            module.learning_rate = None
        elif isinstance(module, Tanh):
            module.pooled = False
        elif isinstance(module, MaxPool2d):
            module.tanh = False
    plain.model.to(memory_format=torch.contiguous_format)
    assert any(isinstance(m, Linear) and m.learning_rate == 5e-4 for m in fast.model.modules())
    learn_in_float64(fast), learn_in_float64(plain)
    for name, value in plain.model.state_dict().items():
        ours = fast.model.state_dict()[name]
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-12, msg=name)
        if name.endswith("weight"):
            assert not torch.equal(value, before[name]), name


@contextmanager
def recording(monkeypatch, fail=False):
    """Stands in for CUDA graphs: what is recorded is the step, and a launch calls it."""
    recorded = []

    class Graph:
        def __init__(self):
            self.generators, self.launches, self.ended = [], 0, False

        def register_generator_state(self, generator):
            self.generators.append(generator)

        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            recorded.append(self)
            self.pool = pool

        def capture_end(self):
            self.ended = True
            if fail:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay(self):
            self.launches += 1
            self.step()

    class Event:
        """Of a device that ends what was launched only when the host waits for it."""

        def __init__(self, blocking):
            assert blocking
            self.pending = False

        def record(self):
            self.pending = True
            ahead.append(self)
            assert len(ahead) <= 2

        def synchronize(self):
            while self.pending:
                ahead.pop(0).pending = False

    ahead = []

    class MemPool:
        def __init__(self):
            self.id = next(ids)

    ids = count(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "MemPool", MemPool)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr("mltools.capture._thread", threading.local())
        yield recorded


@NETWORKS
def test_a_captured_step_gives_the_same_bits(network, monkeypatch):
    plain, captured = trainer(network), trainer(network)
    with recording(monkeypatch) as graphs:
        captured.capture()
    (graph,) = graphs
    graph.step = lambda: captured._steps(10)  # what the recording would hold
    assert graph.generators == [captured.generator] and graph.ended
    # The steps before and during the recording left no trace.
    assert outcome(captured) == outcome(plain)
    steps(plain, 50), steps(captured, 50)
    assert graph.launches == 5
    ours, theirs = outcome(captured), outcome(plain)
    assert ours.pop("totals") == pytest.approx(theirs.pop("totals"))  # added up in another order
    assert ours == theirs
    assert captured.evaluate() == plain.evaluate()
    # Taken up in between, the epoch goes on step by step up to the next launch.
    captured.begin(6, 7), plain.begin(6, 7)
    assert [captured.step() for _ in range(3)] == [plain.step() for _ in range(3)] == [1, 1, 1]
    assert outcome(captured)["lin1.weight"] == outcome(plain)["lin1.weight"]


def test_a_recording_that_fails_leaves_no_trace_either(monkeypatch):
    plain, captured = trainer(FC), trainer(FC)
    refused = pytest.raises(RuntimeError, match="not permitted")
    with recording(monkeypatch, fail=True) as graphs:
        for _ in range(2):
            with refused:
                captured.capture()
    assert graphs[0].ended and graphs[0].pool != graphs[1].pool  # which the failure may have spoilt
    steps(plain), steps(captured)
    assert outcome(captured) == outcome(plain)


def test_the_graphs_of_a_thread_share_their_memory(monkeypatch):
    with recording(monkeypatch) as graphs:
        for _ in range(2):
            trainer(FC).capture()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(trainer(FC).capture).result()
    here, again, elsewhere = (graph.pool for graph in graphs)
    assert here == again != elsewhere


def test_alignment_leaves_the_generators_to_nobody_who_changes_them(monkeypatch):
    measured = []

    def measure(*arguments):
        measured.append(training._process._together)
        return dfatools.measure_alignment(*arguments)

    monkeypatch.setattr(training, "measure_alignment", measure)
    trainer(FC).alignment()
    assert measured == [1] and training._process._together == 0


def test_one_thread_alone_waits_for_those_together():
    process, order = training._Process(), []
    inside, leave = threading.Event(), threading.Event()

    def together():
        with process.together(), process.together():
            inside.set()
            leave.wait()
            order.append("together")

    def alone():
        with process.alone():
            order.append("alone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(together)
        inside.wait()
        second = pool.submit(alone)
        leave.set()
        first.result(), second.result()
    assert order == ["together", "alone"]


def test_streamed_data_is_not_captured(monkeypatch):
    monkeypatch.setattr(Part, "resident", lambda self, device: None)
    with pytest.raises(RuntimeError, match="streamed"):
        trainer(FC).capture()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@NETWORKS
def test_a_cuda_graph_gives_the_bits_of_single_launches(network, deterministic):
    plain, captured = trainer(network, "cuda"), trainer(network, "cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        captured.capture()
        steps(captured)
    torch.cuda.synchronize()
    steps(plain)
    ours, theirs = outcome(captured), outcome(plain)
    assert ours.pop("totals") == pytest.approx(theirs.pop("totals"))
    assert ours == theirs


@NETWORKS
def test_no_step_waits_for_the_device(network, monkeypatch):
    one, waits = trainer(network), []

    def noted(name, original):
        def fetch(tensor, *args):
            waits.append(name)
            return original(tensor, *args)

        return fetch

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    one.begin(1)
    for _ in range(len(one.batches)):
        one.step()
    assert waits == []
    one.training_totals()
    assert waits == ["tolist"]  # once an epoch
    one.evaluate()
    assert waits == ["tolist"] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_runs_side_by_side_give_what_each_gives_alone(device, deterministic):
    def work(job):
        network, seed = job
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else threading.Lock()
        with stream:
            one = trainer(network, device, seed)
            if device == "cuda":
                one.capture()
            steps(one, 30)
            alignment = {layer: c.tolist() for layer, c in one.alignment().items()}
            steps(one, 10)
            return outcome(one), one.evaluate(), alignment

    jobs = [(network, seed) for network in (FC, CNN, BOTTLENECK) for seed in (0, 1)]
    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(work, jobs))
    assert together == alone
    assert all(a[0] != b[0] for a, b in zip(alone[::2], alone[1::2]))


def test_training_totals_weigh_all_samples_alike():
    one = trainer(replace(FC, dropout_input=0, dropout_fc=0, batchnorm=False), batch_size=9)
    for module in one.model.modules():
        if isinstance(module, Linear):
            module.learning_rate = 0.0
    one.begin(1)
    taken = list(one.batches.epoch(1))
    one.begin(1)
    for _ in range(len(one.batches)):
        one.step()
    x, y = (torch.cat(tensors) for tensors in zip(*taken))
    assert len(x) == 81
    log_p = one.model(x).detach().double().log_softmax(1)
    loss, accuracy = one.training_totals()
    assert loss == pytest.approx(-log_p[torch.arange(81), y].mean().item(), rel=1e-6)
    assert accuracy == pytest.approx(100 * (log_p.argmax(1) == y).double().mean().item())


@pytest.mark.parametrize("device", DEVICES)
@NETWORKS
def test_bf16_stays_close_to_float32(network, device):
    exact, mixed = trainer(network, device), trainer(network, device, precision="bf16")
    start = {name: p.detach().clone() for name, p in exact.model.named_parameters()}
    steps(exact, 1), steps(mixed, 1)
    for name, p in mixed.model.named_parameters():
        assert p.dtype == torch.float32
        wanted = exact.model.get_parameter(name).detach() - start[name]
        got = p.detach() - start[name]
        if "lin" in name and name.endswith("weight"):
            assert (got - wanted).norm() < 0.1 * wanted.norm() > 0, name
    assert abs(mixed.evaluate()[0] - exact.evaluate()[0]) < 0.05
