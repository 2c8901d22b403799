"""DFA under torch.compile, DistributedDataParallel, autocast and CUDA."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# DistributedDataParallel imports this too, but later: its default arguments would take hold of the
# process group. Its threads would outlive its destruction and can abort the interpreter at its end.
import torch.distributed.nn.functional
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dfatools import DFA, DFALayer, dfa_from_bp


def fc(**options):
    torch.manual_seed(0)
    blocks = nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
    return dfa_from_bp(nn.Sequential(*blocks), **options)


def cnn(**options):
    torch.manual_seed(0)
    blocks = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3)
    return dfa_from_bp(nn.Sequential(*blocks, nn.Tanh(), nn.Flatten(), nn.Linear(20, 4)), **options)


class Recurrent(nn.Module):
    """One point, called at each of three steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.point = nn.Linear(12, 12), DFALayer()
        self.head, self.dfa = nn.Linear(12, 4), DFA([self.point])

    def forward(self, x):
        for _ in range(3):
            x = self.point(torch.tanh(self.cell(x)))
        return self.dfa(self.head(x))


SHAPES = {fc: (12,), cnn: (2, 8, 8)}


def batch(build=fc, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *SHAPES[build], generator=generator, dtype=dtype), torch.arange(8) % 4


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("build", [fc, cnn])
@pytest.mark.parametrize("eager_first", [True, False], ids=["after-eager", "compiled-first"])
def test_a_compiled_model_has_the_same_gradients(build, eager_first):
    torch.compiler.reset()
    model = build(reduction="sum").double()
    x, y = batch(build)
    if eager_first:
        gradients(model, x, y)
    compiled = torch.compile(model, fullgraph=True)
    got = [gradients(compiled, x, y) for _ in range(2)]
    # By then it has its matrix, which the first compiled pass draws from a stream of its own.
    expected = gradients(model, x, y)
    assert min(gradient.abs().max() for gradient in expected) > 1e-3
    for gradient in got:
        assert_close(gradient, expected, 1e-12)


def test_a_compiled_model_changes_its_training_method():
    torch.compiler.reset()
    model = fc().double()
    x, y = batch()
    model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for method in ("dfa", "bp", "dfa"):
        model[-1].training_method = method
        seen.append(gradients(compiled, x, y))
        assert_close(seen[-1], gradients(model, x, y), 1e-12)
    assert not torch.allclose(seen[0][0], seen[1][0])


def test_a_compiled_recurrence():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Recurrent().double()
    x, y = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, x, y), gradients(model, x, y), 1e-12)


def _train_distributed(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    x, y = (tensor.chunk(2)[rank] for tensor in batch())
    for reduction in ("mean", "sum"):
        model = fc(reduction=reduction).double()
        torch.manual_seed(rank)  # each process would draw another matrix
        found = gradients(DistributedDataParallel(model), x, y)
        torch.save((found, model.state_dict()), folder / f"{reduction}-{rank}.pt")
    dist.destroy_process_group()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]  # on Linux
    assert not any("gloo" in name for name in threads), threads


def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_train_distributed, (tmp_path,), nprocs=2)
    for reduction in ("mean", "sum"):
        for rank in range(2):
            found, state = torch.load(tmp_path / f"{reduction}-{rank}.pt")
            model = fc(reduction=reduction).double()
            model.load_state_dict(state)
            if rank == 0:
                first = state["dfa.feedback_matrix"]
            assert torch.equal(state["dfa.feedback_matrix"], first)
            assert_close(found, gradients(model, *batch()), 1e-12)


def test_a_step_in_mixed_precision():
    reference = fc(reduction="sum")
    x, y = batch(dtype=torch.float32)
    with torch.no_grad():
        reference(x)
    model = copy.deepcopy(reference)
    start = [p.detach().clone() for p in model.parameters()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    gradients(reference, x, y)
    optimizers[0].step()

    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        loss = F.cross_entropy(output, y)
    assert scaler.is_enabled() and output.dtype == torch.bfloat16
    scaler.scale(loss).backward()
    scaler.step(optimizers[1])
    scaler.update()
    for before, p, exact in zip(start, model.parameters(), reference.parameters(), strict=True):
        moved, wanted = p.detach() - before, exact.detach() - before
        assert p.dtype == torch.float32
        assert (moved - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feedback_device", [None, "cpu"])
def test_cuda_gives_the_gradients_of_the_cpu(feedback_device):
    for build in (fc, cnn):
        model = build(feedback_device=feedback_device).double()
        x, y = batch(build)
        expected = gradients(model, x, y)
        model.to("cuda")
        assert model[-1].feedback_matrix.device.type == (feedback_device or "cuda")
        got = gradients(model, x.cuda(), y.cuda())
        assert_close([gradient.cpu() for gradient in got], expected, 1e-10)
        state = {name: t for name, t in model.state_dict().items() if "feedback" not in name}
        fresh = build(feedback_device=feedback_device).double().to("cuda")
        fresh.load_state_dict(state)
        fresh(x.cuda())
        assert fresh[-1].feedback_matrix.device.type == (feedback_device or "cuda")
