"""DistributedDataParallel and FSDP2 on two processes compute the DFA gradients of one process."""

import gc
import itertools
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# DistributedDataParallel would import this module after the process group exists. Its default
# arguments would keep the group, whose threads could then abort the interpreter at exit.
import torch.distributed.nn.functional
from formulas import (
    Definition,
    Residual,
    assert_close,
    batch,
    expected_gradients,
    expected_signals,
    fc,
    with_dfa,
)
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

from dfatools import DFALayer, dfa_from_bp, measure_alignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from feedback_rules import LearnedMatrices

WIDTH = 12
FULL = StateDictOptions(full_state_dict=True)
FP32, BF16 = torch.float32, torch.bfloat16


class Recomputed(nn.Sequential):
    """Sequential whose activations are recomputed in the backward pass."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def net(recompute=None, seed=0, **options):
    """Builds residual blocks; `recompute` checkpoints them "inside" or "outside" of FSDP."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, WIDTH)]
    for _ in range(4):
        up, down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        body = Residual(nn.LayerNorm(WIDTH), up, nn.Tanh(), DFALayer(), down)
        block = (Recomputed if recompute == "inside" else nn.Sequential)(DFALayer(), body)
        layers.append(Recomputed(block) if recompute == "outside" else block)
    return with_dfa(*layers, DFALayer(), nn.Linear(WIDTH, 4), **options)


def sequential():
    return fc((WIDTH, 9, 7, 4))


class Tower(nn.Module):
    """BP network of residual blocks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.blocks = nn.Sequential(
            *(Residual(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH)) for _ in range(3))
        )
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(self.blocks(self.first(x)))


def hooked():
    torch.manual_seed(0)
    return dfa_from_bp(Tower(), ["first", "blocks.0", "blocks.1", "blocks.2"]).double()


def learned():
    model = sequential()
    model.dfa = LearnedMatrices(model, 4, (9, 7))
    return model.double()


def shard(model, **options):
    for block in model[1:5]:
        fully_shard(block[0] if len(block) == 1 else block, **options)
    return fully_shard(model, **options)


ENGINES = {"ddp": DistributedDataParallel, "fsdp2": shard}


def data():
    return batch(WIDTH, samples=16)


def share(rank, steps=1):
    """Returns the inputs and targets of one process: half of each micro-batch."""
    return [torch.cat([part.chunk(2)[rank] for part in t.chunk(steps)]) for t in data()]


# Both processes call the functions below. Most of them return gradients and the feedback matrix.


def gradients(parallel, model, x, y, steps=1):
    """Accumulates unsharded gradients over micro-batches; `parallel` is the wrapped `model`."""
    parallel.zero_grad()
    for step, (inputs, targets) in enumerate(zip(x.chunk(steps), y.chunk(steps)), 1):
        last = step == steps
        if isinstance(parallel, FSDPModule):
            parallel.set_requires_gradient_sync(last)
        alone = isinstance(parallel, DistributedDataParallel) and not last
        with parallel.no_sync() if alone else nullcontext():
            (F.cross_entropy(parallel(inputs).double(), targets) / steps).backward()
    grads = [p.grad for p in parallel.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads]
    return whole, model.dfa.feedback_matrix


def train(rank, engine, reduction, recompute, steps):
    model = net(reduction=reduction, recompute=recompute)
    parallel = ENGINES[engine](model)
    torch.manual_seed(rank)  # without a broadcast, the matrices would differ
    gradients(parallel, model, *share(rank, steps), steps)
    return gradients(parallel, model, *share(rank, steps), steps)


def train_in_bfloat16(rank, feedback_dtype):
    model = net(feedback_dtype=feedback_dtype, recompute="inside").float()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32))
    x, y = share(rank)
    return gradients(model, model, x.float(), y)


def train_sequential(rank):
    """Trains a Sequential in which each FSDP shard begins with its feedback point."""
    model = sequential()
    fully_shard([model.feedback_2, model[3], model[4]])
    fully_shard([model.feedback_4, model[6]])
    return gradients(fully_shard(model), model, *share(rank))


def train_other(rank, engine, build):
    """Trains `hooked()` or `learned()`; FSDP2 shards the Linear layers inside hooked blocks."""
    model = build()
    if engine == "fsdp2":
        for block in model.blocks if build is hooked else ():
            fully_shard(block[0])
            fully_shard(block[2])
        parallel = fully_shard(model)
    else:
        parallel = DistributedDataParallel(model)
    return gradients(parallel, model, *share(rank))


def train_from_meta(rank):
    with torch.device("meta"):
        model = net()
    shard(model).to_empty(device="cpu")
    set_model_state_dict(model, net().state_dict(), options=FULL)
    return gradients(model, model, *share(rank))


def save_states(rank, folder):
    model = shard(net())
    found = gradients(model, model, *share(rank))
    full = get_model_state_dict(model, options=FULL)
    torch.save(full, folder / f"full-{rank}.pt")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
    return *found, list(full)


def load_full_state(rank, folder, engine, used):
    model = net(seed=1)
    parallel = ENGINES[engine](model)
    if used:
        gradients(parallel, model, *share(rank))
    set_model_state_dict(model, torch.load(folder / f"full-{rank}.pt"), options=FULL)
    return gradients(parallel, model, *share(rank))


def load_sharded_state(rank, folder):
    model = shard(net(seed=1))
    model(share(rank)[0])  # draws a matrix of the saved size, which dcp.load fills in place
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "sharded")
    set_model_state_dict(model, state)
    return gradients(model, model, *share(rank))


def align(rank):
    model = shard(net())
    return measure_alignment(model, *share(rank), F.cross_entropy), model[-1].feedback_matrix


def count_whole_blocks(rank):
    """Counts the blocks with gathered weights, once in the backward pass of each block."""
    model, counts = shard(net()), []
    bodies = [body for _, body in model[1:5]]

    def count(module, grad_output):
        counts.append(sum(not isinstance(body[1].weight, DTensor) for body in bodies))

    for body in bodies:
        body[0].register_full_backward_pre_hook(count)
    gradients(model, model, *share(rank))
    return counts


CASES = list(itertools.product(ENGINES, ("mean", "sum"), (None, "inside", "outside"), (1, 2)))
OTHERS = {"hooked": hooked, "learned": learned}
LOADS = list(itertools.product(ENGINES, (False, True)))


def work(rank, folder):
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    torch.set_num_threads(1)
    found = {}
    for engine in ENGINES:
        store, wait = f"file://{folder}/{engine}", timedelta(seconds=60)
        dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=wait)
        found |= {case: train(rank, *case) for case in CASES if case[0] == engine}
        found |= {(engine, build): train_other(rank, engine, OTHERS[build]) for build in OTHERS}
        if engine == "fsdp2":
            found |= {dtype: train_in_bfloat16(rank, dtype) for dtype in (None, BF16)}
            found["sequential"] = train_sequential(rank)
            found["meta"] = train_from_meta(rank)
            found["alignment"] = align(rank)
            found["whole blocks"] = count_whole_blocks(rank)
            found["saved"] = save_states(rank, folder)
            found["sharded"] = load_sharded_state(rank, folder)
            found |= {load: load_full_state(rank, folder, *load) for load in LOADS}
        gc.collect()
        dist.destroy_process_group()
        if engine == "ddp":  # under FSDP2, caches keep the group
            threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
            assert not any("gloo" in name for name in threads), threads
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Runs `work` in two processes, and loads the results of each."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # else FSDP2 would move the models to a GPU
        torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def whole_matrix(found, job):
    """Returns the feedback matrix of a job, which must be the same in both processes."""
    first, second = (result[job][1] for result in found)
    assert type(first) is torch.Tensor and torch.equal(first, second)
    return first


def assert_gradients(found, job, model, steps=1, tolerance=1e-12):
    """Asserts that both processes have the expected gradients, up to `tolerance` of each norm."""
    model.dfa.feedback_matrix = whole_matrix(found, job).double()
    batches = zip(*(tensor.chunk(steps) for tensor in data()))
    expected = expected_gradients(model, *batches)
    for result in found:
        for got, wanted in zip(result[job][0], expected, strict=True):
            assert (got - wanted).norm() <= tolerance * wanted.norm() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_training(found, case):
    _, reduction, _, steps = case
    assert_gradients(found, case, net(reduction=reduction), steps)


@pytest.mark.parametrize("job, build", [("sequential", sequential), ("meta", net)])
def test_training_a_converted_sequential_and_a_model_from_the_meta_device(found, job, build):
    assert_gradients(found, job, build())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_with_hooks(found, engine):
    assert_gradients(found, (engine, "hooked"), hooked())


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_matrices(found, engine):
    """The matrices get the gradients e^T h_i, and the weights get the signals of the matrices."""
    model = learned()
    x, y = data()
    run = Definition(model, x, rule=lambda e, point, size: e @ model.dfa.matrices[point].detach())
    error = run.error(y, F.cross_entropy)
    weights = run.propagate(error, [*run.model.parameters()][:6])
    matrices = [error.T @ hidden for hidden in run.activations]
    for result in found:
        assert_close(result[engine, "learned"][0], [*weights, *matrices])


@pytest.mark.parametrize("feedback_dtype", [None, BF16])
def test_mixed_precision(found, feedback_dtype):
    assert_gradients(found, feedback_dtype, net(), tolerance=0.03)
    gradients, matrix = found[0][feedback_dtype]
    assert matrix.dtype == (feedback_dtype or FP32)
    assert {gradient.dtype for gradient in gradients} == {FP32}


@pytest.mark.parametrize("load", ["sharded", *LOADS], ids=str)
def test_a_state_dict_restores_weights_and_matrix(found, load):
    assert found[0]["saved"][2] == list(net().state_dict())
    assert torch.equal(whole_matrix(found, load), whole_matrix(found, "saved"))
    assert_gradients(found, load, net())


def test_the_backward_pass_gathers_one_block_at_a_time(found):
    assert [result["whole blocks"] for result in found] == [[1] * 4] * 2


def test_alignment(found):
    model = net()
    model[-1].feedback_matrix = whole_matrix(found, "alignment")
    halves = [result["alignment"][0] for result in found]
    assert len(halves[0]) == 18  # four modules in each of four blocks, and two Linear layers
    for name, ((bp, dfa, _),) in expected_signals(model, *data(), list(halves[0])).items():
        got = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(got, F.cosine_similarity(dfa, bp), rtol=0, atol=1e-12)
