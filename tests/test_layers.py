"""The layers that train many networks at once: equal to torch.nn's, to the last bit or digit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mltools.layers import ChannelDropout, Conv2d, Dropout, Linear, MaxPool2d, Tanh

RATE = 0.3
FORMATS = pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)


def pair(bias=True, dtype=torch.float64):
    """The same layer twice, ours set to take its step, and a batch."""
    torch.manual_seed(0)
    ours = Linear(7, 5, bias, dtype=dtype)
    theirs = nn.Linear(7, 5, bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    ours.learning_rate = RATE
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["rows", "tokens"])
@pytest.mark.parametrize("needs_input", [True, False])
def test_the_step_is_that_of_sgd(bias, shape, needs_input):
    ours, theirs = pair(bias)
    x = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=needs_input)
    error = torch.randn(*shape, 5, dtype=torch.float64)
    with torch.no_grad():
        w, b = theirs.weight.clone(), None if theirs.bias is None else theirs.bias.clone()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
    ours(x).backward(error)
    rows, inputs = error.reshape(-1, 5), x.detach().reshape(-1, 7)
    torch.testing.assert_close(ours.weight, w - RATE * rows.T @ inputs, rtol=0, atol=1e-13)
    if bias:
        torch.testing.assert_close(ours.bias, b - RATE * rows.sum(0), rtol=0, atol=1e-13)
    if needs_input:  # through the weight before its step
        torch.testing.assert_close(x.grad, error @ w, rtol=0, atol=1e-13)
    assert all(parameter.grad is None for parameter in ours.parameters())


def convolved(x, w):
    """A convolution with one zero of padding, entry by entry."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(w), *x.shape[2:]))
    for i, j in np.ndindex(out.shape[2:]):
        window = padded[:, :, i : i + w.shape[2], j : j + w.shape[3]]
        out[:, :, i, j] = np.einsum("ncij,kcij->nk", window, w)
    return out


@FORMATS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_the_step_of_a_convolution_is_that_of_sgd(bias, needs_input, format):
    torch.manual_seed(0)
    layer = Conv2d(2, 3, 3, padding=1, bias=bias, dtype=torch.float64).to(memory_format=format)
    layer.learning_rate = RATE
    w, b = layer.weight.detach().numpy().copy(), bias and layer.bias.detach().clone()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64, requires_grad=needs_input)
    error = torch.randn(4, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=format)
    output = layer(x)
    output.backward(error)
    inputs, sent = x.detach().numpy(), error.numpy()
    shift = b.view(3, 1, 1).numpy() if bias else 0
    np.testing.assert_allclose(output.detach(), convolved(inputs, w) + shift, rtol=0, atol=1e-12)
    # The gradient of an entry is the product of what it meets with what it is sent back.
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)))
    gradient = np.empty_like(w)
    for i, j in np.ndindex(3, 3):
        met = padded[:, :, i : i + 5, j : j + 6]
        gradient[:, :, i, j] = np.einsum("nkab,ncab->kc", sent, met)
    np.testing.assert_allclose(layer.weight.detach(), w - RATE * gradient, rtol=0, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias, b - RATE * error.sum((0, 2, 3)), rtol=0, atol=1e-13)
    if needs_input:  # through the weight before its step: a convolution with the turned kernel
        turned = w[:, :, ::-1, ::-1].swapaxes(0, 1)
        np.testing.assert_allclose(x.grad, convolved(sent, turned), rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in layer.parameters())


def pooled(x, error, tanh):
    """A pooling of windows of 3 with stride 2, and its gradient, entry by entry."""
    output, gradient = np.empty(error.shape), np.zeros(x.shape)
    for n, c, i, j in np.ndindex(error.shape):
        window = x[n, c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        window = np.tanh(window) if tanh else window
        output[n, c, i, j] = top = window.max()
        di, dj = divmod(window.argmax(), 3)  # the first one
        slope = 1 - top**2 if tanh else 1
        gradient[n, c, 2 * i + di, 2 * j + dj] += slope * error[n, c, i, j]
    return output, gradient


@FORMATS
@pytest.mark.parametrize("tanh", [False, True])
def test_a_pooling_sends_the_gradient_of_a_window_to_its_first_maximum(tanh, format):
    torch.manual_seed(0)
    x = (torch.randint(4, (2, 3, 7, 8)) / 2 - 1).double()  # with ties
    x = x.contiguous(memory_format=format).requires_grad_()
    error = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    act, pooling = Tanh(pooled=tanh), MaxPool2d(3, 2, tanh)
    output = pooling(act(x) if tanh else x)
    output.backward(error)
    expected, gradient = pooled(x.detach().numpy(), error.numpy(), tanh)
    np.testing.assert_allclose(output.detach(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(x.grad, gradient, rtol=0, atol=1e-12)


def test_tanh_and_pooling_change_places_in_train_mode_only():
    act, pooling = Tanh(pooled=True), MaxPool2d(3, 2, tanh=True)
    x = torch.randn(2, 3, 7, 8)
    assert act(x) is x
    assert torch.equal(act.eval()(x), x.tanh())
    assert torch.equal(pooling.eval()(x), nn.functional.max_pool2d(x, 3, 2))


def test_nothing_moves_without_a_rate_in_eval_mode_or_without_gradients():
    ours, theirs = pair()
    x, error = torch.randn(6, 7, dtype=torch.float64), torch.ones(6, 5, dtype=torch.float64)
    ours.eval()(x).backward(error)
    with torch.no_grad():
        ours.train()(x)
    ours.learning_rate = None
    ours(x).backward(error)
    theirs(x).backward(2 * error)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


KINDS = [(Dropout, nn.Dropout, (6, 5)), (ChannelDropout, nn.Dropout2d, (4, 3, 2, 2))]


@pytest.mark.parametrize("ours, theirs, shape", KINDS)
def test_dropout_draws_what_torch_does_from_a_generator_of_its_own(ours, theirs, shape):
    layer, x = ours(0.3), torch.randn(shape)
    torch.manual_seed(3)
    expected = [theirs(0.3)(x) for _ in range(3)]
    layer.generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    for one in expected:
        assert torch.equal(layer(x), one)
    assert torch.equal(torch.get_rng_state(), before)
    assert (expected[0] == 0).any() and not torch.equal(expected[0], expected[1])
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))  # a copy goes on with a generator of its own
    assert layer.eval()(x) is x


@pytest.mark.parametrize("ours, theirs, shape", KINDS)
def test_dropout_without_a_generator_draws_from_the_default_one(ours, theirs, shape):
    x = torch.randn(shape)
    torch.manual_seed(3)
    expected = theirs(0.3)(x)
    torch.manual_seed(3)
    assert torch.equal(ours(0.3)(x), expected)
