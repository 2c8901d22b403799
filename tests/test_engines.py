"""DFA's gradients under torch.compile, activation checkpointing, autocast and on CUDA."""

import copy
import itertools
import weakref

import pytest
import torch
from formulas import Recurrent, assert_close, batch, expected_gradients, fc, gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dfatools import dfa_from_bp


def cnn(**options):
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3)
    bp = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(20, 4))
    return dfa_from_bp(bp, reduction="sum", **options).double()


def channels_last():
    return cnn(normalization=False).to(memory_format=torch.channels_last)


def recurrent():
    return Recurrent(steps=3).double()


def compiled(run, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(run, backend=backend, **options)


def assert_gradients(run, model, x, y):
    """Checks two steps. The first may draw the matrix, which the definition needs."""
    got = [gradients(model, (x, y), run=run) for _ in range(2)]
    expected = expected_gradients(model, (x, y))
    assert_close(got[0], expected)
    assert_close(got[1], expected)


@pytest.mark.parametrize("build, shape, eager_first, backend", [
    (fc, (7,), True, "aot_eager"),
    (recurrent, (7,), False, "aot_eager"),
    (cnn, (2, 8, 8), True, "aot_eager"),
    (channels_last, (2, 8, 8), True, "aot_eager"),
    (cnn, (2, 8, 8), False, "inductor"),
])  # fmt: skip
def test_a_compiled_model(build, shape, eager_first, backend):
    model = build()
    x, y = batch(*shape)
    if eager_first:
        model(x)
    assert_gradients(compiled(model, backend, fullgraph=True), model, x, y)


def test_a_compiled_model_takes_images_of_several_sizes():
    layers = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1)
    model = dfa_from_bp(nn.Sequential(*layers, nn.Flatten())).double()
    run = compiled(model, fullgraph=True)
    for length in (12, 10, 9, 11):
        assert_gradients(run, model, *batch(2, length))


def test_a_compiled_model_changes_its_training_method():
    x, y = batch()
    model = fc(example=x.float())
    run = compiled(model, fullgraph=True)
    for method in ("dfa", "bp", "dfa"):
        model[-1].training_method = method
        got = gradients(model, (x, y), run=run)
        assert_close(got, expected_gradients(model, (x, y), detach=method == "dfa"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_recurrence_whose_first_calls_are_compiled(number):
    model = recurrent()
    x, y = batch()
    model(x)
    expected = expected_gradients(model, (x, y))
    steps = [compiled(model.step)] * number + [model.step] * (3 - number)
    turns = itertools.cycle(steps)
    model.step = lambda h: next(turns)(h)
    for _ in range(2):
        assert_close(gradients(model, (x, y)), expected)


def test_activations_of_a_compiled_part_are_not_mixed_with_those_of_another_call():
    x, y = batch()
    model = fc(example=x.float())
    expected = expected_gradients(model, (x, y))
    first = compiled(model[:3])
    model.forward = lambda x: nn.Sequential.forward(model[3:], first(x))
    assert_close(gradients(model, (x, y)), expected)
    model[3:6](torch.randn(8, 6, dtype=x.dtype))
    assert_close(gradients(model, (x, y)), expected)


def blocks_and_points(model, x):
    with model[-1].one_pass():
        for part in (model[:3], model[3:6]):
            x = checkpoint(part, x, use_reentrant=False)
        return model[6:](x)


def whole_network(model, x):
    """Something stands behind the DFA, so that it is computed again too."""
    return checkpoint(lambda x: model(x).log_softmax(1), x, use_reentrant=False)


def reentrant_whole_network(model, x):
    return checkpoint(model, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("run", [blocks_and_points, whole_network, reentrant_whole_network])
@pytest.mark.parametrize("early_stop", [True, False])
def test_activation_checkpointing(run, early_stop):
    model = fc()
    with set_checkpoint_early_stop(early_stop):
        assert_gradients(lambda x: run(model, x), model, *batch())


def test_activation_checkpointing_in_a_compiled_function():
    model = fc(example=torch.zeros(1, 7))

    def run(x):
        with model[-1].one_pass():
            x = model[2](checkpoint(model[:2], x, use_reentrant=False))
            return model[5:](checkpoint(model[3:5], x, use_reentrant=False))

    assert_gradients(compiled(run, fullgraph=True), model, *batch())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("first, last", [(0, 3), (0, 2), (2, 5), (3, 5), (3, 7), (6, 7)])
def test_reentrant_checkpointing_of_a_part_is_right_or_refused(first, last, asking):
    """Parts that hold feedback points or follow one would leave parameters untrained."""
    model = fc()
    x, y = batch()
    x.requires_grad_(asking)

    def run(x):
        with model[-1].one_pass():
            hidden = checkpoint(model[first:last], model[:first](x), use_reentrant=True)
            return model[last:](hidden)

    if asking and (first, last) == (0, 2):
        assert_gradients(run, model, x, y)
    else:
        with pytest.raises(RuntimeError, match="no gradient would get to .*reentrant=False"):
            run(x)


def test_activation_checkpointing_keeps_no_activation():
    model = fc()
    x, y = batch()
    seen = []
    model[1].register_forward_hook(lambda _, __, hidden: seen.append(weakref.ref(hidden)))
    with set_checkpoint_early_stop(False):  # early stopping ends each second pass before the hook
        F.cross_entropy(blocks_and_points(model, x), y).backward()
    assert len(seen) == 2 and not any(hidden() is not None for hidden in seen)


def test_mixed_precision():
    x, y = batch()
    model = fc(example=x.float(), reduction="sum").float()
    expected = expected_gradients(copy.deepcopy(model).double(), (x, y))
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    assert scaler.is_enabled() and loss.dtype == torch.float32
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.03 * gradient.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feedback_device", [None, "cpu"])
@pytest.mark.parametrize("build, shape", [(fc, (7,)), (cnn, (2, 8, 8))])
def test_cuda(build, shape, feedback_device):
    x, y = batch(*shape)
    model = build(feedback_device=feedback_device, example=x.float())
    expected = expected_gradients(model, (x, y))
    state = {name: t for name, t in model.state_dict().items() if "feedback" not in name}
    model.to("cuda")
    assert model[-1].feedback_matrix.device.type == (feedback_device or "cuda")
    got = gradients(model, (x.cuda(), y.cuda()))
    assert_close([gradient.cpu() for gradient in got], expected, 1e-10)
    fresh = build(feedback_device=feedback_device).to("cuda")
    fresh.load_state_dict(state)
    fresh(x.cuda())
    assert fresh[-1].feedback_matrix.device.type == (feedback_device or "cuda")
