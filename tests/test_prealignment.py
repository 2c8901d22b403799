"""Pre-alignment against its formula in NumPy."""

import math

import numpy as np
import pytest
import torch
from test_alignment import Unregistered
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment, prealign


def network(widths, without_point=None):
    """Linear, Tanh, [DFALayer], ..., Linear, DFA; no point in front of Linear `without_point`."""
    torch.manual_seed(0)
    modules = [nn.Linear(*widths[:2])]
    for i in range(1, len(widths) - 1):
        modules.append(nn.Tanh())
        if i != without_point:
            modules.append(DFALayer())
        modules.append(nn.Linear(widths[i], widths[i + 1]))
    model = nn.Sequential(*modules)
    return model.append(DFA(model)).double()


def batch(samples, features=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (samples,), generator=generator)


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def expected_weights(model, x, y, without_point=None):
    """W^T = S^T pinv(G^T) / its norm, from the last layer to the second, in NumPy."""
    weights = [layer.weight.detach().numpy().copy() for layer in linears(model)]
    biases = [layer.bias.detach().numpy() for layer in linears(model)]
    matrix = model[-1].feedback_matrix.numpy()
    for i in reversed(range(1, len(weights))):
        hidden = [x.numpy()]
        for w, b in zip(weights[:-1], biases):
            hidden.append(np.tanh(hidden[-1] @ w.T + b))
        p = np.exp(hidden[-1] @ weights[-1].T + biases[-1])
        error = (p / p.sum(1, keepdims=True) - np.eye(4)[y.numpy()]) / len(y)

        def fed(layer, error=error, hidden=hidden):
            size = hidden[layer].shape[1]
            return error @ matrix[:, :size] / math.sqrt(size * 4)

        gradient = error  # at the output of layer i
        for j in reversed(range(i + 1, len(weights))):
            gradient = (gradient @ weights[j]) * (1 - hidden[j] ** 2)
        if i == without_point:  # the point behind this layer's activation, through both
            signal = (fed(i + 1) * (1 - hidden[i + 1] ** 2)) @ weights[i]
        else:
            signal = fed(i)
        cutoff = max(gradient.shape) * np.finfo(np.float64).eps
        transposed = signal.T @ np.linalg.pinv(gradient.T, rcond=cutoff)
        weights[i] = transposed.T / np.sqrt((transposed**2).sum())
    return weights


@pytest.mark.parametrize("samples", [5, 30])  # fewer and more than the widths
@pytest.mark.parametrize("without_point", [None, 2])
def test_weights_are_those_of_the_formula(samples, without_point):
    model = network((7, 6, 9, 8, 4), without_point)
    x, y = batch(samples)
    model(x)  # draws the matrix
    biases = [layer.bias.clone() for layer in linears(model)]
    first = linears(model)[0].weight.clone()
    expected = expected_weights(model, x, y, without_point)
    prealign(model, x, y, F.cross_entropy)
    for layer, weight, bias in zip(linears(model), expected, biases, strict=True):
        np.testing.assert_allclose(layer.weight.detach(), weight, rtol=0, atol=1e-9)
        assert torch.equal(layer.bias, bias)
    assert torch.equal(linears(model)[0].weight, first)


def test_x_is_whatever_the_model_takes():
    unpacking, plain = network((7, 6, 4)), network((7, 6, 4))
    x, y = batch(8)
    unpacking(x)
    plain.load_state_dict(unpacking.state_dict())
    unpacking.register_forward_pre_hook(lambda module, args: args[0]["images"])
    prealign(unpacking, {"images": x}, y, F.cross_entropy)
    prealign(plain, x, y, F.cross_entropy)
    for a, b in zip(linears(unpacking), linears(plain)):
        assert torch.equal(a.weight, b.weight)


class ByKeyword(Unregistered):
    def forward(self, x):
        for module in self.order:
            x = module(input=x) if isinstance(module, nn.Linear) else module(x)
        return x


@pytest.mark.parametrize("wrapped", [Unregistered, ByKeyword])
def test_points_that_are_no_submodules_and_inputs_by_keyword_count(wrapped):
    model = network((7, 6, 9, 8, 4))
    x, y = batch(30)
    model(x)
    expected = expected_weights(model, x, y)
    prealign(wrapped(model), x, y, F.cross_entropy)
    for layer, weight in zip(linears(model), expected, strict=True):
        np.testing.assert_allclose(layer.weight.detach(), weight, rtol=0, atol=1e-9)


def test_bp_starts_out_aligned_with_the_feedback():
    model = network((7, 12, 12, 12, 4))
    x, y = batch(8)
    before = measure_alignment(model, x, y, F.cross_entropy)
    prealign(model, x, y, F.cross_entropy)
    after = measure_alignment(model, x, y, F.cross_entropy)
    # With fewer samples than outputs, G W meets S exactly where G has full rank.
    assert abs(before["7"]).mean() < 0.9 and after["7"].min() > 1 - 1e-9
    assert all(after[name].mean() > before[name].mean() for name in ("1", "4", "7"))


def test_the_model_is_otherwise_as_before():
    model = network((7, 6, 5, 4)).train()
    x, y = batch(8)
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    matrix, state = model[-1].feedback_matrix.clone(), torch.get_rng_state()
    assert prealign(model, x, y, F.cross_entropy) is None
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert model[-1].training_method == "dfa"
    assert torch.equal(model[-1].feedback_matrix, matrix)
    assert torch.equal(torch.get_rng_state(), state)


def test_convolutions_keep_their_weights():
    torch.manual_seed(0)
    model = dfa_from_bp(nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4),
    )).double()  # fmt: skip
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.arange(8) % 4
    before = {name: p.clone() for name, p in model.named_parameters()}
    prealign(model, x, y, F.cross_entropy)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"5.weight", "7.weight"}
    for name in changed:
        norm = model.get_parameter(name).detach().square().sum().sqrt()
        torch.testing.assert_close(norm, torch.ones_like(norm))


@pytest.mark.parametrize("case", ["asking-input", "batchnorm-in-front"])
def test_the_first_weight_layer_is_kept_though_a_gradient_passes_it(case):
    torch.manual_seed(0)
    front = [nn.BatchNorm1d(7)] if case == "batchnorm-in-front" else [nn.Identity()]
    bp = nn.Sequential(*front, nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    model = dfa_from_bp(bp).double()
    x, y = batch(8)
    x.requires_grad_(case == "asking-input")
    prealign(model, x, y, F.cross_entropy)
    assert torch.equal(model.get_submodule("1").weight, bp[1].weight.double())
    assert not torch.equal(model.get_submodule("3").weight, bp[3].weight.double())


def test_token_layers_take_all_tokens_as_samples():
    flat, tokens = network((7, 6, 4)), network((7, 6, 4))
    tokens[-1].batch_dims = 2
    x, y = batch(12)
    flat(x)
    tokens.load_state_dict(flat.state_dict())
    prealign(flat, x, y, F.cross_entropy)
    prealign(tokens, x.view(3, 4, 7), y, lambda output, y: F.cross_entropy(output.flatten(0, 1), y))
    for a, b in zip(flat.parameters(), tokens.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_what_is_learned_in_front_of_may_be_an_embedding():
    torch.manual_seed(0)
    front = nn.Embedding(9, 7), nn.Flatten()  # two tokens a sample
    blocks = *front, DFALayer(), nn.Linear(14, 6), nn.Tanh(), DFALayer(), nn.Linear(6, 4)
    model = nn.Sequential(*blocks)
    model.append(DFA(model)).double()
    x, y = torch.randint(9, (8, 2)), torch.arange(8) % 4
    prealign(model, x, y, F.cross_entropy)
    for layer in linears(model):
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight).item(), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_computed_in_float32(dtype):
    model, reference = network((7, 6, 4)).to(dtype), network((7, 6, 4)).to(dtype).double()
    x, y = batch(8)
    x = x.to(dtype)
    model(x)
    reference[-1].feedback_matrix = model[-1].feedback_matrix.double()
    prealign(model, x, y, F.cross_entropy)
    prealign(reference, x.double(), y, F.cross_entropy)
    for a, b in zip(linears(model), linears(reference)):
        assert (a.weight.double() - b.weight).norm() < 5 * torch.finfo(dtype).eps


def test_where_nothing_arrives_weights_are_kept():
    model = network((7, 6, 5, 4))
    x, y = batch(8)
    model(x)
    with torch.no_grad():
        linears(model)[1].bias.fill_(1e3)  # Tanh behind it lets nothing through
    before = [layer.weight.clone() for layer in linears(model)]
    prealign(model, x, y, F.cross_entropy)
    kept = [torch.equal(layer.weight, old) for layer, old in zip(linears(model), before)]
    assert kept == [True, True, False]


def test_a_weight_that_is_computed_is_refused():
    model = network((7, 6, 5, 4))
    weight_norm(linears(model)[1])
    last = linears(model)[2].weight.clone()
    with pytest.raises(ValueError, match="3 computes its own from others"):
        prealign(model, *batch(8), F.cross_entropy)
    assert torch.equal(linears(model)[2].weight, last)


def test_a_linear_that_is_used_twice_is_refused():
    torch.manual_seed(0)
    shared = nn.Linear(7, 7)
    model = dfa_from_bp(nn.Sequential(nn.Linear(7, 7), shared, nn.Tanh(), shared, nn.Linear(7, 4)))
    with pytest.raises(ValueError, match="each Linear to be used once; 1 is not"):
        prealign(model.double(), *batch(8), F.cross_entropy)


def test_a_model_without_dfa_is_refused():
    with pytest.raises(ValueError, match="must hold one DFA"):
        prealign(nn.Sequential(nn.Linear(7, 4)).double(), *batch(8), F.cross_entropy)
