"""DFA on two processes, by DistributedDataParallel and FSDP2: the gradients of one on all data."""

import gc
import itertools
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# DistributedDataParallel imports this too, but later: its default arguments would take hold of the
# process group. Its threads would outlive its destruction and can abort the interpreter at its end.
import torch.distributed.nn.functional
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment

WIDTH, SAMPLES = 12, 16
FULL = StateDictOptions(full_state_dict=True)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Block(nn.Module):
    """Begins with a feedback point, and holds another."""

    def __init__(self):
        super().__init__()
        self.point, self.inner = DFALayer(), DFALayer()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.recompute = False

    def run(self, x):
        x = self.point(x)
        return self.down(self.inner(torch.tanh(self.up(self.norm(x))))) + x

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.recompute else self.run(x)


class Net(nn.Module):
    """`recompute`: the activations of no block are kept; it is "inside" or "outside" of FSDP."""

    def __init__(self, recompute=None, **options):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.point = DFALayer()
        self.dfa = DFA(self, **options)
        self.recompute = recompute
        for block in self.blocks:
            block.recompute = recompute == "inside"

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            outside = self.recompute == "outside"
            x = checkpoint(block, x, use_reentrant=False) if outside else block(x)
        return self.dfa(self.head(self.point(x)))


def net(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def shard(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


ENGINES = {"ddp": DistributedDataParallel, "fsdp2": shard}


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(4, (SAMPLES,), generator=generator)


def half(rank, dtype=torch.float64):
    return [tensor.chunk(2)[rank] for tensor in batch(dtype)]


def sequential():
    torch.manual_seed(0)
    sizes = (WIDTH, 9, 7, 4)
    first, second, third = (nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
    return dfa_from_bp(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)).double()


def gradients(model, x, y, steps=1):
    """Whole, of the mean loss, accumulated over as many micro-batches."""
    model.zero_grad()
    for step, (inputs, targets) in enumerate(zip(x.chunk(steps), y.chunk(steps)), 1):
        last = step == steps
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        alone = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if alone else nullcontext():
            (F.cross_entropy(model(inputs).double(), targets) / steps).backward()
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads]


# What each of the two processes does. Most return their gradients and their feedback matrix.

CASES = list(
    itertools.product(
        ("ddp", "fsdp2"),
        ("mean", "sum"),
        (None, "inside", "outside"),
        (1, 2),
    )
)


def train(rank, engine, reduction, recompute, steps):
    model = net(reduction=reduction, recompute=recompute)
    parallel = ENGINES[engine](model)
    # Every micro-batch that one process would take on all data is shared out between the two.
    share = [torch.cat([part.chunk(2)[rank] for part in t.chunk(steps)]) for t in batch()]
    torch.manual_seed(rank)  # each process would draw another matrix
    gradients(parallel, *share, steps)
    return gradients(parallel, *share, steps), model.dfa.feedback_matrix


def train_in_bfloat16(rank, feedback_dtype):
    model = net(torch.float32, feedback_dtype=feedback_dtype, recompute="inside")
    shard(model, mp_policy=BF16)
    return gradients(model, *half(rank, torch.float32)), model.dfa.feedback_matrix


def train_sequential(rank):
    """Its shards begin with their points."""
    model = sequential()
    fully_shard([model.feedback_2, model[3], model[4]])
    fully_shard([model.feedback_4, model[6]])
    fully_shard(model)
    return gradients(model, *half(rank)), model.dfa.feedback_matrix


def train_from_meta(rank):
    with torch.device("meta"):
        model = Net().double()
    shard(model).to_empty(device="cpu")
    set_model_state_dict(model, net().state_dict(), options=FULL)
    return gradients(model, *half(rank)), model.dfa.feedback_matrix


def count_whole_blocks(rank):
    """How many blocks are gathered when the gradient is in the middle of each."""
    model, counts = shard(net()), []

    def watch(module, args, output):
        output.register_hook(
            lambda _: counts.append(sum(not isinstance(b.up.weight, DTensor) for b in model.blocks))
        )

    for block in model.blocks:
        block.norm.register_forward_hook(watch)
    gradients(model, *half(rank))
    return counts


def align(rank):
    """The cosines of its half, and the matrix."""
    model = shard(net())
    return measure_alignment(model, *half(rank), F.cross_entropy), model.dfa.feedback_matrix


def save_states(rank, folder):
    """Also the names in the full state."""
    model = shard(net())
    found = gradients(model, *half(rank)), model.dfa.feedback_matrix
    full = get_model_state_dict(model, options=FULL)
    torch.save(full, folder / f"full-{rank}.pt")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
    return *found, list(full)


def load_full_state(rank, folder, engine, used):
    model = Net().double()
    parallel = ENGINES[engine](model)
    x, y = half(rank)
    if used:
        gradients(parallel, x, y)
    set_model_state_dict(model, torch.load(folder / f"full-{rank}.pt"), options=FULL)
    return gradients(parallel, x, y), model.dfa.feedback_matrix


def load_sharded_state(rank, folder):
    model = shard(Net().double())
    x, y = half(rank)
    model(x)  # draws a matrix: dcp.load fills tensors of the saved size
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_model_state_dict(model, state)
    return gradients(model, x, y), model.dfa.feedback_matrix


def work(rank, folder):
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    torch.set_num_threads(1)
    found = {}
    for engine in ENGINES:
        dist.init_process_group(
            "gloo",
            f"file://{folder}/{engine}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        found |= {case: train(rank, *case) for case in CASES if case[0] == engine}
        if engine == "fsdp2":
            found["bfloat16"] = train_in_bfloat16(rank, None)
            found["bfloat16 feedback"] = train_in_bfloat16(rank, torch.bfloat16)
            found["sequential"] = train_sequential(rank)
            found["meta"] = train_from_meta(rank)
            found["whole blocks"] = count_whole_blocks(rank)
            found["alignment"] = align(rank)
            found["saved"] = save_states(rank, folder)
            found["loaded", "sharded"] = load_sharded_state(rank, folder)
            for wrapper, used in itertools.product(ENGINES, (False, True)):
                found["loaded", wrapper, used] = load_full_state(rank, folder, wrapper, used)
        gc.collect()
        dist.destroy_process_group()
        if engine == "ddp":  # FSDP2's caches keep hold of the group
            threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            assert not any("gloo" in name for name in threads), threads
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of the two processes."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# In one process


def alone(model, matrix, x, y, steps=1):
    model.dfa.feedback_matrix = matrix
    return gradients(model, x, y, steps)


def assert_close(left, right, tolerance=1e-12):
    """Relative to the norm of each gradient."""
    for a, b in zip(left, right, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() > 0


def assert_same_matrix(matrices):
    for matrix in matrices:
        assert type(matrix) is torch.Tensor and matrix.shape == (4, 2 * WIDTH)
        assert torch.equal(matrix, matrices[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_gradients_are_those_of_one_process(found, case):
    _, reduction, _, steps = case
    assert_same_matrix([result[case][1] for result in found])
    matrix = found[0][case][1]
    expected = alone(net(reduction=reduction), matrix, *batch(), steps)
    for result in found:
        assert_close(result[case][0], expected)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, y = batch()
    model = net()
    whole = gradients(model, x, y)
    assert_close(gradients(model, x, y, 4), whole)
    # The sum counts the micro-batch that it sees: hidden layers get a fourth.
    model = net(reduction="sum")
    expected = [
        gradient / (1 if name.startswith("head") else 4)
        for (name, _), gradient in zip(model.named_parameters(), gradients(model, x, y))
    ]
    assert_close(gradients(model, x, y, 4), expected)


@pytest.mark.parametrize(
    "case, dtype", [("bfloat16", torch.float32), ("bfloat16 feedback", torch.bfloat16)]
)
def test_mixed_precision(found, case, dtype):
    assert_same_matrix([result[case][1] for result in found])
    matrix = found[0][case][1]
    assert matrix.dtype == dtype
    expected = alone(net(torch.float32), matrix.float(), *batch(torch.float32))
    for result in found:
        assert {gradient.dtype for gradient in result[case][0]} == {torch.float32}
        assert_close(result[case][0], expected, 0.03)


def test_one_block_at_a_time_is_whole_in_the_backward_pass(found):
    assert [result["whole blocks"] for result in found] == [[1] * 4] * 2


def test_alignment_of_a_sharded_network(found):
    model = net()
    model.dfa.feedback_matrix = found[0]["alignment"][1]
    expected = measure_alignment(model, *batch(), F.cross_entropy)
    halves = [result["alignment"][0] for result in found]
    assert list(halves[0]) == list(expected)
    for name, cosines in expected.items():
        got = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(got, cosines, rtol=0, atol=1e-12)


def test_a_converted_sequential_in_shards(found):
    expected = alone(sequential(), found[0]["sequential"][1], *batch())
    for result in found:
        assert_close(result["sequential"][0], expected)


def test_a_model_that_began_on_the_meta_device(found):
    assert_same_matrix([result["meta"][1] for result in found])
    expected = alone(net(), found[0]["meta"][1], *batch())
    for result in found:
        assert_close(result["meta"][0], expected)


def test_the_state_dict_brings_the_matrix(found):
    for result in found:
        expected, matrix, names = result["saved"]
        assert names == list(net().state_dict())
        loaded = {key: value for key, value in result.items() if key[0] == "loaded"}
        assert len(loaded) == 5
        for got, taken_up in loaded.values():
            assert torch.equal(taken_up, matrix)
            assert_close(got, expected)
