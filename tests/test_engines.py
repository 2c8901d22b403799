"""DFA under torch.compile, activation checkpointing, autocast and CUDA."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment


def fc(**options):
    torch.manual_seed(0)
    blocks = nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
    return dfa_from_bp(nn.Sequential(*blocks), **options)


def cnn(**options):
    torch.manual_seed(0)
    blocks = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3)
    return dfa_from_bp(nn.Sequential(*blocks, nn.Tanh(), nn.Flatten(), nn.Linear(20, 4)), **options)


def channels_last(**options):
    return cnn(**options).to(memory_format=torch.channels_last)


class Recurrent(nn.Module):
    """One point, called at each of three steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.point = nn.Linear(12, 12), DFALayer(recurrent=True)
        self.head, self.dfa = nn.Linear(12, 4), DFA(self)

    def forward(self, x):
        for _ in range(3):
            x = self.point(torch.tanh(self.cell(x)))
        return self.dfa(self.head(x))


SHAPES = {fc: (12,), cnn: (2, 8, 8), channels_last: (2, 8, 8)}


def batch(build=fc, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *SHAPES[build], generator=generator, dtype=dtype), torch.arange(8) % 4


def gradients(run, x, y, model=None):
    """Of the model, which is `run` itself or is run by it."""
    model = model or run
    model.zero_grad()
    F.cross_entropy(run(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("build, backend, eager_first", [
    (fc, "aot_eager", True),
    (cnn, "aot_eager", True),
    (channels_last, "aot_eager", True),
    (cnn, "aot_eager", False),
    (cnn, "inductor", False),
])  # fmt: skip
def test_a_compiled_model_has_the_same_gradients(build, backend, eager_first):
    torch.compiler.reset()
    model = build(reduction="sum").double()
    x, y = batch(build)
    if eager_first:
        gradients(model, x, y)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
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


class HalfCompiled(Recurrent):
    """Of three calls of a cell with its point, the first ones are compiled."""

    compiled = 1

    def forward(self, x):
        step = torch.compile(self.step, backend="aot_eager")
        for i in range(3):
            x = step(x) if i in range(self.compiled) else self.step(x)
        return self.dfa(self.head(x))

    def step(self, x):
        return self.point(torch.tanh(self.cell(x)))


@pytest.mark.parametrize("compiled", [1, 2, 3])
def test_a_recurrence_that_is_compiled_in_part(compiled):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = HalfCompiled().double()
    x, y = batch()
    model.compiled = 0
    expected = gradients(model, x, y)
    model.compiled = compiled
    for _ in range(2):
        assert_close(gradients(model, x, y), expected, 1e-12)


def test_what_a_part_leaves_is_told_from_what_was_compiled():
    torch.compiler.reset()
    model = fc().double()
    x, y = batch()
    expected = gradients(model, x, y)
    first = torch.compile(model[:3], backend="aot_eager")
    model.forward = lambda x: nn.Sequential.forward(model[3:], first(x))
    assert_close(gradients(model, x, y), expected, 1e-12)
    model[3:6](torch.randn(8, 9, dtype=x.dtype))
    assert_close(gradients(model, x, y), expected, 1e-12)


def test_a_compiled_model_takes_images_of_several_sizes():
    torch.compiler.reset()
    torch.manual_seed(0)
    blocks = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 3, 3), nn.AdaptiveAvgPool1d(1)
    model = dfa_from_bp(nn.Sequential(*blocks, nn.Flatten())).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = torch.arange(8) % 3
    for length in (12, 10, 9, 11):
        x = torch.randn(8, 2, length, dtype=torch.float64)
        assert_close(gradients(compiled, x, y), gradients(model, x, y), 1e-12)


def parts(model, x):
    """Two parts are computed again, with their feedback points."""
    x = checkpoint(model[:3], x, use_reentrant=False)
    return model[6:](checkpoint(model[3:6], x, use_reentrant=False))


def in_parts(model, x):
    with model[-1].one_pass():
        return parts(model, x)


def as_a_whole(model, x):
    """The DFA is computed again, too: something behind it is."""
    return checkpoint(lambda x: model(x).log_softmax(1), x, use_reentrant=False)


@pytest.mark.parametrize("run", [in_parts, as_a_whole])
@pytest.mark.parametrize("early_stop", [True, False])
def test_activation_checkpointing_has_the_same_gradients(run, early_stop):
    model = fc().double()
    x, y = batch()
    expected = gradients(model, x, y)
    with set_checkpoint_early_stop(early_stop):
        for _ in range(2):
            assert_close(gradients(lambda x: run(model, x), x, y, model), expected, 1e-15)


def test_reentrant_checkpointing_of_the_whole_network_has_the_same_gradients():
    model = fc().double()
    x, y = batch()
    expected = gradients(model, x, y)
    x.requires_grad_()  # or it would leave no graph

    def run(x):
        return checkpoint(model, x, use_reentrant=True)

    assert_close(gradients(run, x, y, model), expected, 1e-15)


def reentrant(part):
    return lambda x: checkpoint(part, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("first, last", [(0, 3), (0, 2), (2, 5), (3, 5), (3, 7), (6, 7)])
def test_reentrant_checkpointing_of_a_part_is_right_or_refused(first, last, asking):
    """Of parts that hold points, or follow one: their parameters would not be trained."""
    model = fc().double()
    x, y = batch()
    expected = gradients(model, x, y)
    x.requires_grad_(asking)
    parts = [model[:first], reentrant(model[first:last]), model[last:]]

    def run(x):
        with model[-1].one_pass():
            for part in parts:
                x = part(x)
            return x

    if asking and (first, last) == (0, 2):
        assert_close(gradients(run, x, y, model), expected, 1e-15)
    else:
        with pytest.raises(RuntimeError, match="no gradient would get to .*reentrant=False"):
            run(x)


def test_activation_checkpointing_keeps_no_activation():
    model = fc()
    x, y = batch(dtype=torch.float32)
    seen = []
    model[1].register_forward_hook(lambda _, __, hidden: seen.append(weakref.ref(hidden)))
    with set_checkpoint_early_stop(False):  # it would end each second pass before the hook
        F.cross_entropy(in_parts(model, x), y).backward()
    assert len(seen) == 2 and not any(hidden() is not None for hidden in seen)


def test_activation_checkpointing_in_a_compiled_model():
    torch.compiler.reset()
    model = fc().double()
    x, y = batch()
    expected = gradients(model, x, y)

    def run(x):
        with model[-1].one_pass():
            x = model[2](checkpoint(model[:2], x, use_reentrant=False))
            return model[5:](checkpoint(model[3:5], x, use_reentrant=False))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, x, y, model), expected, 1e-12)


def test_alignment_with_activation_checkpointing():
    model = fc().double()
    x, y = batch()
    expected = measure_alignment(model, x, y, F.cross_entropy)
    model.forward = lambda x: parts(model, x)
    found = measure_alignment(model, x, y, F.cross_entropy)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-14)


def test_a_step_in_mixed_precision():
    reference = fc(reduction="sum")
    x, y = batch(dtype=torch.float32)
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
