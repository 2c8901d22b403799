"""Feedback points with `shared_dims` send the same signal to all positions (tokens, pixels)."""

import math

import numpy as np
import pytest
import torch
from formulas import assert_close, batch, expected_gradients, gradients, with_dfa
from test_alignment import assert_measured
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp


class Mean(nn.Module):
    """Computes the mean over the dimensions `dims`."""

    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, h):
        return h.mean(self.dims)


def tokens(**options):
    """Builds a classifier of token sequences, (N, T, 7) to (N, 4)."""
    torch.manual_seed(0)
    shared = DFALayer(shared_dims=(1,))
    layers = nn.Linear(7, 5), nn.Tanh(), shared, nn.Linear(5, 9), nn.Tanh(), Mean(1), DFALayer()
    return with_dfa(*layers, nn.Linear(9, 4), **options)


def images(**options):
    """Builds a classifier of images, (N, 2, H, W) to (N, 4)."""
    torch.manual_seed(0)
    first, second = (DFALayer(shared_dims=(2, 3)) for _ in range(2))
    convs = nn.Conv2d(2, 3, 3), nn.Tanh(), first, nn.Conv2d(3, 5, 3), nn.Tanh(), second
    model = with_dfa(*convs, Mean(2, 3), nn.Linear(5, 4), **options)
    return model.to(memory_format=torch.channels_last)


def videos(**options):
    """Builds a classifier of video frames, (N, T, H, W, 6) to (N, T, 4), with shared pixels."""
    torch.manual_seed(0)
    point = DFALayer(shared_dims=(3, 2))
    return with_dfa(nn.Linear(6, 5), nn.Tanh(), point, Mean(2, 3), nn.Linear(5, 4), **options)


def recurrent(**options):
    """Builds an LSTM, (N, T, 7) to (N, 4), whose time steps share the signal."""
    torch.manual_seed(0)
    lstm = nn.LSTM(7, 5, batch_first=True)
    lstm.register_forward_hook(lambda module, args, output: output[0])
    return with_dfa(lstm, DFALayer(shared_dims=(1,)), Mean(1), nn.Linear(5, 4), **options)


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_follow_the_equations(normalization, reduction):
    """Token t gets e B / sqrt(T): delta_t = (e B / sqrt(T)) * tanh', in NumPy."""
    model = tokens(normalization=normalization, reduction=reduction)
    x, y = batch(3, 7)
    got = gradients(model, (x, y))[:2]

    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in model.parameters())
    matrix = model.dfa.feedback_matrix.numpy()
    assert matrix.shape == (4, 9)  # tokens do not count: max(5, 9), not max(3 * 5, 9)
    h1 = np.tanh(x.numpy() @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2).mean(1)
    p = np.exp(h2 @ w3.T + b3)
    error = p / p.sum(1, keepdims=True) - np.eye(4)[y]
    error /= 1 if reduction == "sum" else len(y)
    signal = error @ matrix[:, :5] / math.sqrt(3) / (math.sqrt(5 * 4) if normalization else 1)
    delta = signal[:, None] * (1 - h1**2)
    weight = sum(delta[n, t][:, None] * x.numpy()[n, t] for n in range(8) for t in range(3))
    assert_close(got, map(torch.from_numpy, (weight, delta.sum((0, 1)))))


@pytest.mark.parametrize("network, options, shapes", [
    (tokens, {}, [(6, 7), (4, 7), (1, 7), (9, 7)]),
    (recurrent, {}, [(6, 7), (4, 7), (9, 7)]),
    (images, {}, [(2, 8, 8), (2, 6, 9), (2, 12, 7)]),
    (videos, {"batch_dims": 2}, [(3, 4, 5, 6), (2, 2, 3, 6)]),
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_number_of_positions(network, options, shapes, reduction):
    """Later sequences may be longer or shorter than the first, and images of other sizes."""
    model = network(reduction=reduction, **options)
    for shape in shapes:
        x, y = batch(*shape)
        y = y[:, None].expand(x.shape[: model.dfa.batch_dims]) if options else y
        assert_close(gradients(model, (x, y)), expected_gradients(model, (x, y)))


@pytest.mark.parametrize("network, shape", [(tokens, (6, 7)), (images, (2, 8, 8))])
def test_a_compiled_network(network, shape):
    torch.compiler.reset()
    model = network()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for positions in (shape, (shape[0] + 1, *shape[1:])) if network is tokens else (shape,):
        data = batch(*positions)
        assert_close(gradients(model, data, run=run), expected_gradients(model, data))


def test_alignment():
    assert_measured(tokens(), ["0", "1", "3", "4", "5", "7"], *batch(3, 7))
    assert_measured(images(), ["0", "1", "3", "4", "6", "7"], *batch(2, 8, 8))
    assert_measured(recurrent(), ["0", "2", "3"], *batch(3, 7))


def test_the_norm_of_a_signal_does_not_depend_on_the_number_of_positions():
    point, alone = DFALayer(shared_dims=(1,)), DFALayer()
    dfa = DFA(nn.ModuleList([point, alone]))
    error = torch.randn(5, 4, dtype=torch.float64)
    hidden, single = torch.zeros(5, 30, 6).double(), torch.zeros(5, 6).double()
    hidden.requires_grad_(), single.requires_grad_()
    with dfa.one_pass():
        joined = point(hidden).sum(1) + alone(single)
        dfa(F.pad(joined, (0, -2))).backward(error)
    assert torch.equal(hidden.grad, hidden.grad[:, :1].expand(5, 30, 6))
    torch.testing.assert_close(hidden.grad.norm(), single.grad.norm(), rtol=1e-12, atol=0)
    assert dfa.feedback(0).shape == dfa.feedback(1).shape == (4, 6)


@pytest.mark.parametrize("dims", [1, (0,), (-1,), (1, 1), (1.0,), (True,)])
def test_bad_shared_dims_are_refused(dims):
    with pytest.raises(ValueError, match="shared_dims must be a tuple of different positive"):
        DFALayer(shared_dims=dims)


@pytest.mark.parametrize("dims, batch_dims", [((2,), 1), ((1, 3), 1), ((1,), 2)])
def test_shared_dims_that_an_activation_lacks_are_refused(dims, batch_dims):
    model = with_dfa(DFALayer(dims), nn.Linear(4, 4), batch_dims=batch_dims)
    message = rf"shared_dims .*{dims[-1]}.* of feedback point 0 .* of shape \(5, 4\)"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 4, dtype=torch.float64))
    assert model.dfa.feedback_matrix.numel() == 0


def test_repr_shows_the_options():
    assert repr(DFALayer((2, 3), recurrent=True)) == "DFALayer(shared_dims=(2, 3), recurrent=True)"
    assert "DFALayer()" in repr(dfa_from_bp(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))))
