"""The layers that train many networks at once: equal to torch.nn's, to the last bit or digit."""

import copy

import pytest
import torch
from torch import nn

from mltools.layers import ChannelDropout, Dropout, Linear

RATE = 0.3


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
    assert torch.equal(ours(x), theirs(x))
    ours(x).backward(error)
    rows, inputs = error.reshape(-1, 5), x.detach().reshape(-1, 7)
    torch.testing.assert_close(ours.weight, w - RATE * rows.T @ inputs, rtol=0, atol=1e-13)
    if bias:
        torch.testing.assert_close(ours.bias, b - RATE * rows.sum(0), rtol=0, atol=1e-13)
    if needs_input:  # through the weight before its step
        torch.testing.assert_close(x.grad, error @ w, rtol=0, atol=1e-13)
    assert all(parameter.grad is None for parameter in ours.parameters())


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
