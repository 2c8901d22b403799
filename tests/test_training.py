"""Training steps give equal numbers with every speed-up and beside other runs; bf16 is close."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import tiny
import torch
from tiny import needs_cuda

from mltools import gpu
from mltools.data import Split
from mltools.gpu import SharedLock, capture, own_stream
from mltools.layers import Conv2d, Linear, MaxPool2d, Tanh
from mltools.networks import Network
from mltools.training import Experiment, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
FC = Network(hidden=(8, 7, 6), batchnorm=True, dropout_input=0.1, dropout_fc=0.3)
CNN = Network("cnn", batchnorm=True, dropout_input=0.2)
POOLED = Network("cnn", dropout_fc=0.2)  # Tanh and pooling swap places
BOTTLENECK = Network(hidden=(8, 7, 6), bottleneck=0.5)
NETWORKS = pytest.mark.parametrize(
    "network", [FC, CNN, POOLED, BOTTLENECK], ids=["fc", "cnn", "pooled", "bottleneck"]
)
DATA = tiny.tiny((1, 15, 15), train=85)  # ten batches


def trainer(network, device="cpu", method="dfa", lr=0.02, **changes):
    experiment = Experiment("one", network, method, reduction="sum", learning_rate=lr)
    return Trainer(tiny.describe(experiment, **changes), DATA, torch.device(device))


def train(trainer, epochs=2):
    for epoch in range(1, 1 + epochs):
        trainer.begin(epoch)
        while trainer.batches.left:
            trainer.step()


def state(trainer):
    """Returns weights, buffers, totals and random state, to compare bit by bit."""
    state = trainer.state_dict()
    tensors = {**state["model"], "totals": state["totals"], "generator": state["generator"]}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def assert_same_training(captured, plain):
    """Asserts equal bits. A launch of several steps may change the rounding of the totals."""
    ours, theirs = state(captured), state(plain)
    assert ours.pop("totals") == pytest.approx(theirs.pop("totals"))
    assert ours == theirs


@NETWORKS
@pytest.mark.parametrize("method", ["dfa", "bp"])
def test_a_fast_step_agrees_with_a_plain_step(network, method):
    # The scripts' learning rate; a much larger rate doubles the difference in each step.
    fast, plain = (trainer(network, method=method, lr=5e-4) for _ in range(2))
    before = {name: value.double() for name, value in plain.model.state_dict().items()}
    for module in plain.model.modules():
        if isinstance(module, (Linear, Conv2d)):
            module.lr = None
        elif isinstance(module, Tanh):
            module.pooled = False
        elif isinstance(module, MaxPool2d):
            module.tanh = False
    plain.model.to(memory_format=torch.contiguous_format)
    assert any(isinstance(m, Linear) and m.lr == 5e-4 for m in fast.model.modules())
    for one in (fast, plain):
        one.model.double()  # so that rounding does not decide which pixel a pooling picks
        one.begin(1)
        while one.batches.left:
            x, y = one.batches.take()
            one.learn(x.double(), y)
    for name, value in plain.model.state_dict().items():
        ours = fast.model.state_dict()[name]
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-12, msg=name)
        if name.endswith("weight"):
            assert not torch.equal(value, before[name]), name


@DEVICES
@NETWORKS
def test_bf16_stays_close_to_float32(network, device):
    exact, mixed = trainer(network, device), trainer(network, device, precision="bf16")
    start = {name: p.detach().clone() for name, p in exact.model.named_parameters()}
    for one in (exact, mixed):
        one.begin(1)
        one.step()
    for name, p in mixed.model.named_parameters():
        assert p.dtype == torch.float32
        wanted = exact.model.get_parameter(name).detach() - start[name]
        got = p.detach() - start[name]
        if "lin" in name and name.endswith("weight"):
            assert 1e-4 < (got - wanted).norm() / wanted.norm() < 0.1, name
    assert abs(mixed.evaluate()[0] - exact.evaluate()[0]) < 0.05


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
    train(one, 1)
    assert waits == []
    one.training_totals()
    assert waits == ["tolist"]  # once an epoch
    one.evaluate()
    assert waits == ["tolist"] * 2


# Runs that share a device


@DEVICES
def test_parallel_runs_give_the_bits_of_serial_runs(device, deterministic):
    def work(run):
        network, seed = run
        with own_stream(torch.device(device)):
            one = trainer(network, device, seed=seed)
            if device == "cuda":
                one.capture()
            train(one, 3)
            alignment = {layer: cosines.tolist() for layer, cosines in one.alignment().items()}
            train(one, 1)
            return state(one), one.evaluate(), alignment

    runs = [(network, seed) for network in (FC, CNN, BOTTLENECK) for seed in (0, 1)]
    alone = [work(run) for run in runs]
    with ThreadPoolExecutor(len(runs)) as pool:
        together = list(pool.map(work, runs))
    assert together == alone
    assert all(a[0] != b[0] for a, b in zip(alone[::2], alone[1::2]))


def test_a_thread_has_one_stream_per_device(monkeypatch):
    """Mocks replace the calls of torch.cuda, so no GPU is needed."""
    entered, devices, made = [], [0], []
    monkeypatch.setattr(gpu, "_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(device.index))
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: made.append(index) or Mock(index=index))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setattr(torch.cuda, "stream", lambda each: entered.append(each) or nullcontext())
    for device in ("cuda", "cuda:1", "cuda", "cuda:0", "cuda:1"):
        with own_stream(torch.device(device)):
            pass
    assert [stream.index for stream in entered] == [0, 1, 1, 0, 1] and made == [0, 1]


def test_an_exclusive_lock_waits_for_a_shared_lock():
    lock, order = SharedLock(), []
    inside, leave = threading.Event(), threading.Event()

    def together():
        with lock.together(), lock.together():
            inside.set()
            leave.wait()
            order.append("together")

    def alone():
        with lock.alone():
            order.append("alone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(together)
        inside.wait()
        second = pool.submit(alone)
        leave.set()
        first.result(), second.result()
    assert order == ["together", "alone"]


# CUDA graphs


@DEVICES
@NETWORKS
def test_a_launch_of_several_steps_gives_the_bits_of_single_steps(
    network, device, deterministic, monkeypatch
):
    """On a CPU, a launch calls the steps in place of a CUDA graph."""
    if device == "cpu":
        monkeypatch.setattr("mltools.training.capture", lambda steps, state, generator: steps)
    with own_stream(torch.device(device)):
        plain, captured = trainer(network, device), trainer(network, device)
        captured.capture()
        train(plain, 3), train(captured, 3)
        assert_same_training(captured, plain)
        # Resumed within an epoch, the trainer takes single steps up to the next launch.
        captured.begin(4, 7), plain.begin(4, 7)
        for left in (2, 1, 0):
            captured.step(), plain.step()
            assert captured.batches.left == plain.batches.left == left
        assert_same_training(captured, plain)


class GraphSafeGenerator(torch.Generator):
    """A CPU generator with `graphsafe_set_state`, which only CUDA generators have."""

    renewed = False

    def graphsafe_set_state(self, other):
        self.renewed = other is not self and torch.equal(other.get_state(), self.get_state())


@pytest.mark.parametrize("fail", [False, True])
def test_recording_a_graph_leaves_the_state_unchanged(monkeypatch, fail):
    """A mock replaces CUDA graphs, and records the order of its own calls and of the steps."""
    graph, weight = Mock(), torch.ones(3)
    generator, default, other = (GraphSafeGenerator().manual_seed(seed) for seed in (1, 2, 3))
    for name in ("CUDAGraph", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=graph))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", (other, default))
    if fail:
        graph.capture_end.side_effect = RuntimeError("not permitted when stream is capturing")
    before = generator.get_state()

    def steps():
        graph.steps()
        weight.add_(torch.rand(3, generator=generator))

    def record():
        with pytest.raises(RuntimeError, match="not permitted") if fail else nullcontext():
            return capture(steps, [weight], generator)

    begin = call.capture_begin(capture_error_mode="thread_local")
    recording = [
        call.register_generator_state(generator),
        call.steps(), begin, call.steps(), call.capture_end(),
    ]  # fmt: skip
    launch = record()
    assert graph.mock_calls == recording
    assert weight.tolist() == [1, 1, 1] and torch.equal(generator.get_state(), before)
    assert generator.renewed == default.renewed == fail and not other.renewed
    if not fail:
        launch(), launch()
        assert graph.replay.call_count == 2
    graph.reset_mock()
    record()  # again, on the same stream
    assert graph.mock_calls == [call.reset()] * (not fail) + recording


@needs_cuda
def test_after_a_failed_recording_the_generators_draw_and_record():
    """The steps wait for the device, which is allowed in the warm-up only."""
    with own_stream(torch.device("cuda")):
        generator = torch.Generator("cuda").manual_seed(1)
        first, second = (torch.rand(3, device="cuda", generator=generator) for _ in range(2))
        total = torch.zeros(3, device="cuda")

        def step():
            total.add_(torch.rand(3, device="cuda", generator=generator))

        generator.manual_seed(1)
        with pytest.raises(RuntimeError):
            capture(lambda: (step(), total.tolist()), [total], generator)
        step()
        torch.rand(3, device="cuda")
        capture(step, [total], generator)()
        assert torch.equal(total, first + second)


def test_streamed_data_is_not_captured(monkeypatch):
    monkeypatch.setattr(Split, "resident", lambda self, device: None)
    with pytest.raises(RuntimeError, match="streamed"):
        trainer(FC).capture()
