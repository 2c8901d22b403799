"""prealign sets weights by its formula, here from NumPy's pseudo-inverse and plain autograd."""

import copy

import numpy as np
import pytest
import torch
from formulas import OwnWeight, batch, expected_signals, fc, with_dfa
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment, prealign


def expected_state(model, x, y, names, loss):
    """Returns the state_dict after W^T = S^T pinv(G^T) / norm, from the last name to the first."""
    before = copy.deepcopy(model.state_dict())
    for name in reversed(names):
        ((gradient, _, signal),) = expected_signals(model, x, y, [name], loss)[name]
        gradient, signal = (side.flatten(0, -2).numpy() for side in (gradient, signal))
        cutoff = max(gradient.shape) * np.finfo(np.float64).eps
        weight = (signal.T @ np.linalg.pinv(gradient.T, rcond=cutoff)).T
        model.get_submodule(name).weight.data = torch.from_numpy(weight / np.linalg.norm(weight))
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    return expected


def assert_prealigned(model, names, x, y, loss=F.cross_entropy):
    """Asserts that `prealign` sets the weights of the named modules, and no other tensor."""
    measure_alignment(model, x, y, loss)  # draws the feedback matrix
    expected = expected_state(model, x, y, names, loss)
    prealign(model, x, y, loss)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("samples", [5, 30])  # fewer and more samples than features
@pytest.mark.parametrize("without_point", [False, True])
def test_weights_follow_the_formula(without_point, samples):
    model = fc((7, 6, 9, 8, 4))
    if without_point:
        del model.feedback_4
    assert_prealigned(model, ["2", "4", "6"], *batch(samples=samples))


class Unregistered(nn.Module):
    """Calls a Sequential's modules by keyword; its feedback points are not its submodules."""

    def __init__(self, model):
        super().__init__()
        self.order = list(model)
        self.kept = nn.ModuleList(m for m in model if not isinstance(m, DFALayer))

    def forward(self, images):
        (x,) = images.values()
        for module in self.order:
            x = module(x) if isinstance(module, (DFALayer, DFA)) else module(input=x)
        return x


def test_points_outside_of_the_module_tree_and_inputs_by_keyword():
    x, y = batch(samples=30)
    model = fc(example=x.float())
    assert_prealigned(Unregistered(model), ["kept.2", "kept.4"], {"images": x}, y)


class Product(nn.Sequential):
    """Computes the product of two layers with the same input."""

    def forward(self, x):
        left, right = self
        return left(x) * right(x)


@pytest.mark.parametrize("layers, shape, names", [
    ([nn.Conv2d(2, 3, 3), DFALayer(), nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Flatten(), DFALayer(),
      nn.Linear(12, 6), nn.Tanh(), DFALayer(), nn.Linear(6, 4)], (2, 6, 6), ["6", "9"]),
    ([nn.BatchNorm1d(7), nn.Linear(7, 6), nn.Tanh(), DFALayer(), nn.Linear(6, 4)], (7,), ["4"]),
    ([Product(nn.Linear(7, 6), nn.Linear(7, 6)), DFALayer(), nn.Linear(6, 4)], (7,), ["2"]),
], ids=["convolutions", "first-behind-batchnorm", "two-layers-on-the-input"])  # fmt: skip
def test_other_layers_keep_their_weights(layers, shape, names):
    assert_prealigned(with_dfa(*layers), names, *batch(*shape))


def test_the_first_layer_keeps_its_weight_if_the_input_requires_gradients():
    x, y = batch()
    assert_prealigned(fc(), ["2", "4"], x.requires_grad_(), y)


def test_layers_without_a_gradient_keep_their_weights():
    model = fc()
    nn.init.constant_(model.get_submodule("2").bias, 1e3)  # saturates the Tanh behind it
    assert_prealigned(model, ["4"], *batch())


def test_weights_outside_of_layers_stay_as_they_are():
    assert_prealigned(OwnWeight(nn.Tanh()), [], *batch())


def test_all_tokens_count_as_samples():
    x, y = batch(4, 7)
    labels = torch.stack(4 * [y], 1)
    model = fc(batch_dims=2)
    assert_prealigned(model, ["2", "4"], x, labels, lambda output, y: F.cross_entropy(output.mT, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_computed_in_float32(dtype):
    model = fc((7, 6, 4)).to(dtype)
    x, y = batch()
    x = x.to(dtype)
    model(x)
    exact = copy.deepcopy(model).double()
    expected = expected_state(exact, x.double(), y, ["2"], F.cross_entropy)["2.weight"]
    prealign(model, x, y, F.cross_entropy)
    error = model.get_submodule("2").weight.double() - expected
    assert error.norm() < 5 * torch.finfo(dtype).eps


def test_a_parametrized_weight_is_refused_before_any_weight_is_set():
    x, y = batch()
    model = fc(example=x.float())
    weight_norm(model.get_submodule("2"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot set the weight of 2"):
        prealign(model, x, y, F.cross_entropy)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_linear_that_is_used_twice_is_refused_before_any_weight_is_set():
    (x, y), shared = batch(), nn.Linear(7, 7)
    bp = nn.Sequential(nn.Linear(7, 7), shared, nn.Tanh(), shared, nn.Linear(7, 4)).double()
    model = dfa_from_bp(bp, example=x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="one call of 1 in a pass, not 2"):
        prealign(model, x, y, F.cross_entropy)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
