"""DFA computes the gradients of its equations in any network: eager, compiled or checkpointed."""

import copy
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from formulas import (
    Recurrent,
    Residual,
    ResidualInPlace,
    assert_close,
    batch,
    expected_gradients,
    fc,
    gradients,
    mean_loss,
    with_dfa,
)
from tiny import needs_cuda
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dfatools import DFALayer, dfa_from_bp

X, Y = batch()


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


def cnn(**options):
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3)
    bp = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(20, 4))
    return dfa_from_bp(bp, **options).double().to(memory_format=torch.channels_last)


def resnet(**options):
    body = Residual(
        nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Tanh(), DFALayer(),
        nn.Conv2d(5, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3),
    )  # fmt: skip
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    return with_dfa(nn.Conv2d(2, 3, 3), DFALayer(), body, nn.Tanh(), DFALayer(), *head, **options)


def transformer(**options):
    layers = [nn.Embedding(11, 8)]
    for _ in range(2):
        layers += [DFALayer(), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)]
    head = DFALayer(), nn.LayerNorm(8), nn.Linear(8, 11)
    return with_dfa(*layers, *head, batch_dims=2, **options)


SHAPES = {fc: (7,), cnn: (2, 8, 8), resnet: (2, 6, 6), Recurrent: (7,)}
NETWORKS = [*SHAPES, transformer]


def make(network, **options):
    """Builds a network, and draws a batch for it."""
    torch.manual_seed(0)
    model = network(**options)
    if network is transformer:
        tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(1))
        return model, (tokens[:, :-1], tokens[:, 1:])
    return model, batch(*SHAPES[network])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_gradients(network, reduction):
    model, (x, y) = make(network, reduction=reduction)
    for batches in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]):
        assert_close(gradients(model, *batches), expected_gradients(model, *batches))


def test_an_activation_changed_in_place_behind_its_point():
    """The activation gets e B_i at its point, and the true gradient through the residual sum."""

    def build(block):
        inner = block(DFALayer(), nn.Tanh(), nn.Linear(6, 6))
        return with_dfa(nn.Linear(7, 6), inner, nn.Linear(6, 4))

    model, reference = build(ResidualInPlace), build(Residual)
    got = gradients(model, (X, Y))
    reference.load_state_dict(model.state_dict())
    assert_close(got, expected_gradients(reference, (X, Y)))


def compiled(run, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend=backend)


def compiled_by_inductor(model):
    return compiled(model, "inductor")


def checkpointed(model):
    """Checkpoints the network and a log-softmax behind it, so that the DFA is recomputed too."""
    return lambda x: checkpoint(lambda x: model(x).log_softmax(-1), x, use_reentrant=False)


def assert_gradients(run, model, x=X, y=Y):
    """Asserts that two passes of `run` have the gradients of the equations."""
    for _ in range(2):
        got = gradients(model, (x, y), run=run)
        assert_close(got, expected_gradients(model, (x, y)))


@pytest.mark.parametrize("network, engine", [
    *[(network, engine) for network in NETWORKS for engine in (compiled, checkpointed)],
    (cnn, compiled_by_inductor),
])  # fmt: skip
def test_compiled_and_checkpointed_networks(network, engine):
    model, data = make(network, reduction="sum")
    assert_gradients(engine(model), model, *data)


@pytest.mark.parametrize("network", NETWORKS)
def test_functional_call_with_another_matrix(network):
    """Each backward pass uses the matrix of its own forward pass."""
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


# torch.compile


def fc_with_matrix():
    """Builds an `fc` network whose feedback matrix is drawn."""
    return fc(example=X.float())


def test_a_compiled_model_accepts_inputs_of_several_lengths():
    layers = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1)
    model = dfa_from_bp(nn.Sequential(*layers, nn.Flatten())).double()
    run = compiled(model)
    for length in (12, 10, 9, 11):
        assert_gradients(run, model, *batch(2, length))


def test_a_compiled_model_changes_its_training_method():
    model = fc_with_matrix()
    run = compiled(model)
    for method in ("dfa", "bp", "dfa"):
        model.dfa.training_method = method
        got = gradients(model, (X, Y), run=run)
        assert_close(got, expected_gradients(model, (X, Y), detach=method == "dfa"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_recurrence_whose_first_calls_are_compiled(number):
    model = Recurrent()
    model(X)
    expected = expected_gradients(model, (X, Y))
    steps = [compiled(model.step)] * number + [model.step] * (3 - number)
    turns = itertools.cycle(steps)
    model.step = lambda h: next(turns)(h)
    for _ in range(2):
        assert_close(gradients(model, (X, Y)), expected)


def test_a_compiled_part_does_not_mix_the_activations_of_two_calls():
    model = fc_with_matrix()
    expected = expected_gradients(model, (X, Y))
    first = compiled(model[:3])
    model.forward = lambda x: nn.Sequential.forward(model[3:], first(x))
    assert_close(gradients(model, (X, Y)), expected)
    model[3:6](torch.randn(8, 6, dtype=X.dtype))
    assert_close(gradients(model, (X, Y)), expected)


# Activation checkpointing


def blocks_and_points(model, x):
    with model.dfa.one_pass():
        for part in (model[:3], model[3:6]):
            x = checkpoint(part, x, use_reentrant=False)
        return model[6:](x)


def reentrant_whole_network(model, x):
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("run", [blocks_and_points, reentrant_whole_network])
@pytest.mark.parametrize("early_stop", [True, False])
def test_activation_checkpointing(run, early_stop):
    model = fc()
    with set_checkpoint_early_stop(early_stop):
        assert_gradients(lambda x: run(model, x), model)


def test_activation_checkpointing_in_a_compiled_function():
    model = fc_with_matrix()

    def run(x):
        with model.dfa.one_pass():
            x = model[2](checkpoint(model[:2], x, use_reentrant=False))
            return model[5:](checkpoint(model[3:5], x, use_reentrant=False))

    assert_gradients(compiled(run), model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("first, last", [(0, 3), (0, 2), (2, 5), (3, 5), (3, 7), (6, 7)])
def test_reentrant_checkpointing_of_a_part_is_right_or_refused(first, last, asking):
    """Parts that contain feedback points or follow a point would leave parameters untrained."""
    model = fc()
    x = X.clone().requires_grad_(asking)

    def run(x):
        with model.dfa.one_pass():
            hidden = checkpoint(model[first:last], model[:first](x), use_reentrant=True)
            return model[last:](hidden)

    if asking and (first, last) == (0, 2):
        assert_gradients(run, model, x)
    else:
        with pytest.raises(RuntimeError, match="no gradient would reach .*reentrant=False"):
            run(x)


def test_activation_checkpointing_keeps_no_activation():
    model, seen = fc(), []
    model[1].register_forward_hook(lambda _, __, hidden: seen.append(weakref.ref(hidden)))
    with set_checkpoint_early_stop(False):  # early stopping ends a recomputation before the hook
        F.cross_entropy(blocks_and_points(model, X), Y).backward()
    assert len(seen) == 2 and not any(hidden() is not None for hidden in seen)


def test_mixed_precision():
    model = fc(example=X.float(), reduction="sum").float()
    expected = expected_gradients(copy.deepcopy(model).double(), (X, Y))
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X.float()), Y)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    assert scaler.is_enabled() and loss.dtype == torch.float32
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.03 * gradient.norm()


@needs_cuda
@pytest.mark.parametrize("network", [fc, cnn])
@pytest.mark.parametrize("feedback_device", [None, "cpu"])
def test_cuda(network, feedback_device):
    model, (x, y) = make(network, feedback_device=feedback_device)
    model(x)
    expected = expected_gradients(model, (x, y))
    state = {name: t for name, t in model.state_dict().items() if "feedback" not in name}
    model.to("cuda")
    assert model.dfa.feedback_matrix.device.type == (feedback_device or "cuda")
    got = gradients(model, (x.cuda(), y.cuda()))
    assert_close([gradient.cpu() for gradient in got], expected, 1e-10)
    fresh, _ = make(network, feedback_device=feedback_device)
    fresh.to("cuda").load_state_dict(state)
    fresh(x.cuda())
    assert fresh.dfa.feedback_matrix.device.type == (feedback_device or "cuda")
