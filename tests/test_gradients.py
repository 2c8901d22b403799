"""Gradients of several kinds of networks, run in several ways, against explicit computations."""

import math
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

# Imported before there is a process group, of which its default arguments would take hold.
import torch.distributed.nn.functional
from formulas import assert_close, batch, expected_gradients, fc, gradients, mean_loss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dfatools import DFA, DFALayer


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_follow_the_equations(normalization, reduction, training):
    """dW_i = ((e B_i) * tanh')^T h_(i-1), and the last layer's true gradient, in NumPy."""
    model = fc((7, 6, 9, 5, 4), normalization=normalization, reduction=reduction).train(training)
    x, y = batch()
    got = gradients(model, (x, y))

    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    hidden = [x.numpy()]
    for w, b in zip(weights[:-2:2], weights[1:-2:2]):
        hidden.append(np.tanh(hidden[-1] @ w.T + b))
    p = np.exp(hidden[-1] @ weights[-2].T + weights[-1])
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[y]) / len(y)
    matrix = model.dfa.feedback_matrix.numpy()
    assert matrix.shape == (4, 9)
    expected = []
    for below, h in zip(hidden, hidden[1:]):
        size = h.shape[1]
        feedback = matrix[:, :size] / (math.sqrt(size * 4) if normalization else 1)
        delta = (error @ feedback) * (len(y) if reduction == "sum" else 1) * (1 - h**2)
        expected += [delta.T @ below, delta.sum(0)]
    expected += [error.T @ hidden[-1], error.sum(0)]
    assert_close(got, map(torch.from_numpy, expected))


# Networks of several kinds


class Network(nn.Module):
    """A stem, blocks that begin with a feedback point, and a head that begins with one."""

    def __init__(self, stem, blocks, head, **options):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.dfa = DFA(self, **options)
        self.recompute = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.dfa(self.head(x))


class Residual(nn.Module):
    """Two convolutions, a feedback point between them, and a skip connection around both."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.point, self.inner = DFALayer(), DFALayer()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        x = self.point(x)
        h = self.inner(torch.tanh(self.norm1(self.conv1(x))))
        return torch.tanh(self.norm2(self.conv2(h)) + self.skip(x))


class Recurrent(nn.Module):
    """One cell and one feedback point, called in each of three steps."""

    def __init__(self, **options):
        super().__init__()
        self.cell, self.head = nn.Linear(7 + 6, 6), nn.Linear(6, 4)
        self.point = DFALayer(recurrent=True)
        self.dfa = DFA(self, **options)

    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for step in range(3):
            h = self.point(torch.tanh(self.cell(torch.cat([x * (step + 1), h], 1))))
        return self.dfa(self.head(h))


def mlp(**options):
    blocks = [nn.Sequential(DFALayer(), nn.Linear(9, 9), nn.Tanh()) for _ in range(2)]
    stem = nn.Sequential(nn.Linear(7, 9), nn.Tanh())
    return Network(stem, blocks, nn.Sequential(DFALayer(), nn.Linear(9, 4)), **options)


def cnn(**options):
    stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2))
    block = nn.Sequential(DFALayer(), nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten())
    return Network(stem, [block], nn.Sequential(DFALayer(), nn.Linear(20, 4)), **options)


def resnet(**options):
    stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh())
    head = nn.Sequential(DFALayer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return Network(stem, [Residual(3, 4), Residual(4, 5)], head, **options)


def transformer(**options):
    head = nn.Sequential(DFALayer(), nn.LayerNorm(8), nn.Linear(8, 11))
    layers = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
    blocks = [nn.Sequential(DFALayer(), layer) for layer in layers]
    return Network(nn.Embedding(11, 8), blocks, head, batch_dims=2, **options)


SHAPES = {mlp: (7,), cnn: (2, 8, 8), resnet: (2, 6, 6), Recurrent: (7,)}
NETWORKS = [mlp, cnn, resnet, transformer]


def make(network, **options):
    """Builds a network, and draws a batch for it."""
    torch.manual_seed(0)
    model = network(**options).double()
    if network is transformer:
        tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(1))
        return model, (tokens[:, :-1], tokens[:, 1:])
    return model, batch(*SHAPES[network])


def halves(x, y):
    return list(zip(x.chunk(2), y.chunk(2)))


@pytest.mark.parametrize("network", [*NETWORKS, Recurrent])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_eager(network, reduction):
    model, data = make(network, reduction=reduction)
    for batches in ([data], halves(*data)):
        assert_close(gradients(model, *batches), expected_gradients(model, *batches))


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


def checkpointed_blocks(model):
    model.recompute = True
    return model


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", [compiled, checkpointed, checkpointed_blocks])
def test_engines(network, engine):
    model, data = make(network)
    run = engine(model)
    for _ in range(2):
        assert_close(gradients(model, data, run=run), expected_gradients(model, data))


@pytest.mark.parametrize("network", NETWORKS)
def test_functional_call_with_another_matrix(network):
    """Each of two forward passes has its own matrix in its backward pass."""
    model, (x, y) = make(network)
    model(x)
    buffers = {key: tensor.clone() for key, tensor in model.named_buffers()}
    other = torch.randn_like(model.dfa.feedback_matrix)
    parts = {**dict(model.named_parameters()), **buffers, "dfa.feedback_matrix": other}
    losses = [mean_loss(torch.func.functional_call(model, parts, (x,)), y), mean_loss(model(x), y)]
    for loss, matrix in zip(losses, (other, None)):
        model.zero_grad()
        loss.backward()
        got = [parameter.grad for parameter in model.parameters()]
        assert_close(got, expected_gradients(model, (x, y), matrix=matrix))


# Two processes, half of the batch each


def sharded(model):
    for block in (*model.blocks, model.head):
        fully_shard(block)
    return fully_shard(model)


def work(rank, folder):
    torch.set_num_threads(1)
    found = {}
    for engine in (DistributedDataParallel, sharded):
        dist.init_process_group(
            "gloo",
            f"file://{folder}/{engine.__name__}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        for network in NETWORKS:
            model, data = make(network)
            parallel = engine(model)
            torch.manual_seed(rank)  # each process would draw another matrix
            got = gradients(parallel, halves(*data)[rank])
            full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in got]
            found[engine.__name__, network.__name__] = full, model.dfa.feedback_matrix
        del model, parallel
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gradients and matrices of the two processes."""
    folder = str(tmp_path_factory.mktemp("two"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", [DistributedDataParallel, sharded])
def test_two_processes(found, engine, network):
    (first, matrix), (second, other) = (
        result[engine.__name__, network.__name__] for result in found
    )
    assert torch.equal(matrix, other)
    model, data = make(network)
    wanted = expected_gradients(model, *halves(*data), matrix=matrix)
    assert_close(first, wanted)
    assert_close(second, wanted)
