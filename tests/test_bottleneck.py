"""BottleneckLinear masks entries of its gradients at random, and is nn.Linear otherwise."""

import copy

import pytest
import torch
from formulas import Definition, assert_close, batch, expected_gradients, gradients, with_dfa
from torch import nn
from torch.nn import functional as F

from dfatools import BottleneckLinear, DFALayer, measure_alignment, prealign


@pytest.mark.parametrize("keep, entries", [(0.0, {0}), (0.4, {0, 1}), (1.0, {1})])
def test_gradients_are_the_explicit_gradients_under_the_masks(keep, entries):
    """The masks of weight and bias are fixed; each backward pass draws a new mask for the input."""
    torch.manual_seed(0)
    layer = BottleneckLinear(7, 5, keep).double()
    x, grad_output = torch.randn(6, 7).double(), torch.randn(6, 5).double()
    for seed, generator in ((1, None), (2, torch.Generator())):
        layer.input_generator = generator
        (generator or torch.default_generator).manual_seed(seed)
        inputs = x.clone().requires_grad_(), *layer.parameters()
        output = layer(inputs[0])
        assert torch.equal(output, F.linear(*inputs))
        got = torch.autograd.grad(output, inputs, grad_output)
        input_mask = torch.empty(6, 7, dtype=torch.float64)
        input_mask.bernoulli_(keep, generator=torch.Generator().manual_seed(seed))
        for mask in (input_mask, layer.weight_mask, layer.bias_mask):
            assert set(mask.flatten().tolist()) == entries
        expected = (
            (grad_output @ layer.weight.detach()) * input_mask,
            (grad_output.T @ x) * layer.weight_mask,
            grad_output.sum(0) * layer.bias_mask,
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_masks_are_buffers_drawn_from_the_generator():
    layer = BottleneckLinear(30, 20, 0.3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for mask in (layer.weight_mask, layer.bias_mask):
        drawn = torch.empty(mask.shape).bernoulli_(0.3, generator=generator)
        assert torch.equal(mask, drawn)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask", "bias_mask"]
    assert len(list(layer.parameters())) == 2


def test_a_layer_without_bias():
    layer = BottleneckLinear(4, 3, 0.5, bias=False)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.bias is None and layer.weight.grad is not None
    assert list(layer.state_dict()) == ["weight", "weight_mask"]


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_keep_outside_0_to_1_is_refused(keep):
    with pytest.raises(ValueError, match="from 0 to 1"):
        BottleneckLinear(4, 3, keep)


# Networks with a bottleneck


def network(keep):
    """Builds a batch and four Linear layers: the second, a bottleneck, has no point before it."""
    torch.manual_seed(0)
    layers = nn.Linear(7, 9), nn.Tanh(), BottleneckLinear(9, 8, keep), nn.Tanh(), DFALayer()
    model = with_dfa(*layers, nn.Linear(8, 7), nn.Tanh(), DFALayer(), nn.Linear(7, 4))
    return model, *batch(samples=5)


def test_a_network_sends_masked_signals_through_its_bottleneck():
    model, *data = network(0.4)
    model(data[0])  # draws the matrix
    computed = []
    for compute in (gradients, expected_gradients):
        torch.manual_seed(6)
        computed.append(compute(model, data))
    assert_close(*computed)


def test_alignment_compares_the_masked_signal_with_the_true_gradient():
    model, x, y = network(0.4)
    model(x)  # draws the matrix
    whole = copy.deepcopy(model)
    whole[2].keep = 1.0
    torch.manual_seed(7)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    for name in ("1", "3"):
        signals = []
        for source, detach in ((model, True), (whole, False)):
            run = Definition(source, x, detach, names=[name])
            torch.manual_seed(7)
            signals += run.propagate(run.error(y, F.cross_entropy), [run.calls[name][0][1]])
        expected = F.cosine_similarity(*signals)
        torch.testing.assert_close(cosines[name], expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError):
        measure_alignment(model, x, y, lambda output, y: output)  # not a scalar
    assert model[2].masking  # restored, even after an error


def test_prealignment_aligns_the_layer_behind_the_bottleneck():
    model, x, y = network(0.5)
    first = model[0].weight.detach().clone()
    prealign(model, x, y, F.cross_entropy)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert cosines["6"].min() > 1 - 1e-9 and cosines["3"].mean() > 0.99
    assert torch.equal(model[0].weight, first)
    assert torch.linalg.matrix_norm(model[2].weight).item() == pytest.approx(1)


def test_a_compiled_network_masks_the_same_parameters():
    model, *data = network(0.5)
    expected = gradients(model, data)[2:]  # the input mask affects the first layer
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, data, run=compiled)[2:], expected, 1e-12)
