"""Gradients of four kinds of networks against explicit computations, whatever runs them."""

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

# Imported before there is a process group, of which its default arguments would take hold.
import torch.distributed.nn.functional
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dfatools import DFA, DFALayer

SAMPLES = 8


class Network(nn.Module):
    """A stem, blocks that begin with a feedback point, and a head that begins with one."""

    def __init__(self, stem, blocks, head, batch_dims=1):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.dfa = DFA(self, batch_dims=batch_dims)
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


class Attention(nn.Module):
    """Causal self-attention and an MLP, each added to its input."""

    def __init__(self, width):
        super().__init__()
        self.point, self.norm1, self.norm2 = DFALayer(), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = self.point(x)
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def fc():
    blocks = [nn.Sequential(DFALayer(), nn.Linear(9, 9), nn.Tanh()) for _ in range(2)]
    stem = nn.Sequential(nn.Linear(7, 9), nn.Tanh())
    return Network(stem, blocks, nn.Sequential(DFALayer(), nn.Linear(9, 4)))


def cnn():
    stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2))
    block = nn.Sequential(DFALayer(), nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten())
    return Network(stem, [block], nn.Sequential(DFALayer(), nn.Linear(20, 4)))


def resnet():
    stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh())
    head = nn.Sequential(DFALayer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return Network(stem, [Residual(3, 4), Residual(4, 5)], head)


def transformer():
    head = nn.Sequential(DFALayer(), nn.LayerNorm(8), nn.Linear(8, 11))
    return Network(nn.Embedding(11, 8), [Attention(8), Attention(8)], head, batch_dims=2)


NETWORKS = {network.__name__: network for network in (fc, cnn, resnet, transformer)}


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def batch(name):
    generator = torch.Generator().manual_seed(1)
    if name == "transformer":
        tokens = torch.randint(11, (SAMPLES, 6), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    shape = {"fc": (7,), "cnn": (2, 8, 8), "resnet": (2, 6, 6)}[name]
    x = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (SAMPLES,), generator=generator)


def mean_loss(output, y):
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def gradients(model, *batches, run=None):
    """Of the model, which `run` runs: accumulated over batches, of the mean loss over all."""
    run = model if run is None else run
    model.zero_grad()
    for x, y in batches:
        (mean_loss(run(x), y) / len(batches)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


class Detach(nn.Module):
    """Keeps its input, and ends the graph."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, hidden):
        self.kept.append(hidden)
        return hidden.detach()


def expected(model, *batches, matrix=None):
    """The same by plain autograd: e B_i goes into each block by itself."""
    matrix = model.dfa.feedback_matrix if matrix is None else matrix
    batch_dims = model.dfa.batch_dims
    model = copy.deepcopy(model)
    hidden, model.dfa = [], nn.Identity()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DFALayer):
                setattr(module, name, Detach(hidden))
    model.zero_grad()
    for x, y in batches:
        hidden.clear()
        output = model.forward(x)
        loss = mean_loss(output, y) / len(batches)
        (error,) = torch.autograd.grad(loss, output, retain_graph=True)
        signals = []
        for h in hidden:
            size = h.shape[batch_dims:].numel()
            signal = error.reshape(-1, len(matrix)) @ matrix[:, :size]
            signals.append(signal.view_as(h) / math.sqrt(size * len(matrix)))
        torch.autograd.backward([output, *hidden], [error, *signals])
    return [parameter.grad for parameter in model.parameters()]


def assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert b.abs().max() > 1e-4


def halves(x, y):
    return list(zip(x.chunk(2), y.chunk(2)))


@pytest.mark.parametrize("name", NETWORKS)
def test_eager(name):
    model, data = build(name), batch(name)
    for _ in range(2):
        assert_close(gradients(model, data), expected(model, data))


@pytest.mark.parametrize("name", NETWORKS)
def test_accumulated(name):
    model, data = build(name), halves(*batch(name))
    assert_close(gradients(model, *data), expected(model, *data))


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled(name):
    torch.compiler.reset()
    model, data = build(name), batch(name)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(gradients(model, data, run=run), expected(model, data))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_computed_again(name, whole):
    model, data = build(name), batch(name)
    model.recompute = not whole
    run = (lambda x: checkpoint(model, x, use_reentrant=False)) if whole else model
    for _ in range(2):
        got = gradients(model, data, run=run)
        model.recompute = False
        assert_close(got, expected(model, data))
        model.recompute = not whole


@pytest.mark.parametrize("name", NETWORKS)
def test_functional_call_with_another_matrix(name):
    """Of two forward passes before the backward passes, each has its own."""
    model, (x, y) = build(name), batch(name)
    model(x)
    buffers = {key: tensor.clone() for key, tensor in model.named_buffers()}
    other = torch.randn_like(model.dfa.feedback_matrix)
    parts = {**dict(model.named_parameters()), **buffers, "dfa.feedback_matrix": other}
    losses = [mean_loss(torch.func.functional_call(model, parts, (x,)), y), mean_loss(model(x), y)]
    for loss, matrix in zip(losses, (other, None)):
        model.zero_grad()
        loss.backward()
        got = [parameter.grad for parameter in model.parameters()]
        assert_close(got, expected(model, (x, y), matrix=matrix))


# Two processes, half of the batch each


def distributed(model):
    return DistributedDataParallel(model)


def sharded(model):
    for block in (*model.blocks, model.head):
        fully_shard(block)
    return fully_shard(model)


def work(rank, folder):
    torch.set_num_threads(1)
    found = {}
    for engine in (distributed, sharded):
        dist.init_process_group(
            "gloo",
            f"file://{folder}/{engine.__name__}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        for name in NETWORKS:
            model = build(name)
            parallel = engine(model)
            torch.manual_seed(rank)  # each process would draw another matrix
            got = gradients(parallel, halves(*batch(name))[rank])
            full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in got]
            found[engine.__name__, name] = full, model.dfa.feedback_matrix
        del model, parallel
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gradients and matrices of the two processes."""
    folder = str(tmp_path_factory.mktemp("two"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["distributed", "sharded"])
def test_two_processes(found, engine, name):
    (first, matrix), (second, other) = (result[engine, name] for result in found)
    assert torch.equal(matrix, other)
    wanted = expected(build(name), *halves(*batch(name)), matrix=matrix)
    assert_close(first, wanted)
    assert_close(second, wanted)
