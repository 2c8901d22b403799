"""The gradient bottleneck: the entries of the gradients that it keeps, and nn.Linear otherwise."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from formulas import assert_close, assert_same, batch, gradients
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, BottleneckLinear, DFALayer, measure_alignment, prealign


def layer_gradients(layer, x, grad_output):
    """Computes the gradients of the input, the weight and the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).backward(grad_output)
    return x.grad, layer.weight.grad, layer.bias.grad


def layer_and_batch(keep, dtype=torch.float64):
    """Makes a layer, an input and the gradient at the output."""
    torch.manual_seed(0)
    layer = BottleneckLinear(7, 5, keep).to(dtype)
    return layer, torch.randn(6, 7, dtype=dtype), torch.randn(6, 5, dtype=dtype)


def test_a_layer_that_keeps_everything_is_a_linear_bit_for_bit():
    layer, x, grad_output = layer_and_batch(1.0, torch.float32)
    linear = nn.Linear(7, 5)
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.equal(layer(x), linear(x))
    got, expected = (layer_gradients(module, x, grad_output) for module in (layer, linear))
    assert_same(got, expected)


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_gradients_are_the_explicit_gradients_under_the_masks(keep):
    """The masks of the parameters stay, and each pass draws the mask of the input anew."""
    layer, x, grad_output = layer_and_batch(keep)
    for seed, generator in ((1, None), (2, torch.Generator())):
        layer.input_generator = generator
        (generator or torch.default_generator).manual_seed(seed)
        got = layer_gradients(layer, x, grad_output)
        input_mask = torch.empty(6, 7, dtype=torch.float64)
        input_mask.bernoulli_(keep, generator=torch.Generator().manual_seed(seed))
        for mask in (input_mask, layer.weight_mask, layer.bias_mask):
            assert 0 < mask.sum() < mask.numel() if keep else not mask.any()
        expected = (
            (grad_output @ layer.weight.detach()) * input_mask,
            (grad_output.T @ x) * layer.weight_mask,
            grad_output.sum(0) * layer.bias_mask,
        )
        for gradient, wanted in zip(got, expected, strict=True):
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-12)


def test_masks_are_buffers_that_a_generator_draws():
    layer = BottleneckLinear(30, 20, 0.3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for mask in (layer.weight_mask, layer.bias_mask):
        drawn = torch.empty(mask.shape).bernoulli_(0.3, generator=generator)
        assert torch.equal(mask, drawn)
    other = BottleneckLinear(30, 20, 0.3)
    assert not torch.equal(other.weight_mask, layer.weight_mask)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask", "bias_mask"]
    assert len(list(layer.parameters())) == 2
    other.load_state_dict(layer.state_dict())
    assert_same(other.buffers(), layer.buffers())
    assert_same(copy.deepcopy(layer).buffers(), layer.buffers())
    assert all(mask.is_meta for mask in other.to("meta").buffers())
    assert layer.double().weight_mask.dtype == torch.float64


def test_a_layer_without_bias():
    layer = BottleneckLinear(4, 3, 0.5, bias=False)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.bias is None and layer.weight.grad is not None
    assert list(layer.state_dict()) == ["weight", "weight_mask"]


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_keep_that_is_no_probability_is_refused(keep):
    with pytest.raises(ValueError, match="from 0 to 1"):
        BottleneckLinear(4, 3, keep)


# Networks with a bottleneck


def network(keep, point=False):
    """Builds four Linears, of which the second is a bottleneck, with or without a point in front.

    Returns: the network and a batch.
    """
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(
        flat=nn.Flatten(), lin1=nn.Linear(6, 9), act1=nn.Tanh(),
        point1=DFALayer() if point else nn.Identity(),
        lin2=BottleneckLinear(9, 8, keep), act2=nn.Tanh(), point2=DFALayer(),
        lin3=nn.Linear(8, 7), act3=nn.Tanh(), point3=DFALayer(), lin4=nn.Linear(7, 4),
    ))  # fmt: skip
    model.dfa = DFA(model)
    return model.double(), *batch(2, 3, samples=5)


def explicit_signals(model, x, y):
    """Computes, in NumPy, e B_1 and e B_2, the true gradient at h2, and h0, h1, h2 themselves."""
    layers = [model.get_submodule(f"lin{i}").parameters() for i in (1, 2, 3, 4)]
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = ([p.detach().numpy() for p in ps] for ps in layers)
    h0 = x.flatten(1).numpy()
    h1 = np.tanh(h0 @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    h3 = np.tanh(h2 @ w3.T + b3)
    p = np.exp(h3 @ w4.T + b4)
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[y]) / len(y)
    matrix = model.dfa.feedback_matrix.numpy()
    fed = [error @ matrix[:, :size] / np.sqrt(4 * size) for size in (9, 8)]
    return *fed, ((error @ w4) * (1 - h3**2)) @ w3, h0, h1, h2


def drawn_mask(seed, keep):
    torch.manual_seed(seed)
    return torch.empty(5, 9, dtype=torch.float64).bernoulli_(keep).numpy()


@pytest.mark.parametrize("point", [False, True], ids=["no-point", "point-in-front"])
def test_the_layers_around_a_bottleneck_learn_by_the_explicit_formula(point):
    model, x, y = network(0.4, point)
    model(x)  # draws the matrix
    fed1, fed2, _, h0, h1, h2 = explicit_signals(model, x, y)
    torch.manual_seed(6)
    gradients(model, (x, y))
    at_lin2 = fed2 * (1 - h2**2)
    at_act1 = fed1
    if not point:
        at_act1 = (at_lin2 @ model.lin2.weight.detach().numpy()) * drawn_mask(6, 0.4)
    expected = (
        (at_act1 * (1 - h1**2)).T @ h0,
        (at_lin2.T @ h1) * model.lin2.weight_mask.numpy(),
        at_lin2.sum(0) * model.lin2.bias_mask.numpy(),
    )
    got = model.lin1.weight.grad, model.lin2.weight.grad, model.lin2.bias.grad
    assert_close(got, map(torch.from_numpy, expected), 1e-12)


def test_alignment_compares_the_masked_signal_with_the_true_gradient():
    model, x, y = network(0.4)
    model(x)  # draws the matrix
    _, fed2, true2, _, _, h2 = explicit_signals(model, x, y)
    torch.manual_seed(7)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    weight, slope = model.lin2.weight.detach().numpy(), 1 - h2**2
    at_act1 = ((fed2 * slope) @ weight) * drawn_mask(7, 0.4), (true2 * slope) @ weight
    for name, (signal, true) in {"act1": at_act1, "act2": (fed2, true2)}.items():
        norms = np.linalg.norm(signal, axis=1) * np.linalg.norm(true, axis=1)
        expected = (signal * true).sum(1) / norms
        np.testing.assert_allclose(cosines[name], expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError):
        measure_alignment(model, x, y, lambda output, y: output)  # no scalar
    assert model.lin2.thinning  # set back, after an error too


def test_prealignment_aligns_the_layer_behind_the_bottleneck():
    model, x, y = network(0.5)
    first = model.lin1.weight.detach().clone()
    prealign(model, x, y, F.cross_entropy)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert cosines["act3"].min() > 1 - 1e-9 and cosines["act2"].mean() > 0.99
    assert torch.equal(model.lin1.weight, first)
    assert torch.linalg.matrix_norm(model.lin2.weight).item() == pytest.approx(1)


def test_a_compiled_network_masks_the_same_parameters():
    model, *data = network(0.5)
    expected = gradients(model, data)[2:]  # lin1's gradients depend on the input's mask
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, data, run=compiled)[2:], expected, 1e-12)
