"""measure_alignment computes the cosine between each sample's DFA signal and BP gradient."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formulas import (
    OwnWeight,
    Recurrent,
    Residual,
    ResidualInPlace,
    batch,
    expected_signals,
    fc,
    with_dfa,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment


def summed(output, y):
    return F.cross_entropy(output, y, reduction="sum")


def cosine(a, b):
    """Computes the cosine of each pair of rows; 0 if a row is zero."""
    return F.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b), eps=1e-300)


def assert_measured(model, names, x, y, loss=F.cross_entropy, reference=None):
    """Asserts the cosines of exactly the named modules; all calls of a module have one cosine."""
    got = measure_alignment(model, x, y, loss)
    assert list(got) == names
    for name, calls in expected_signals(reference or model, x, y, names, loss).items():
        bp, dfa = (
            torch.cat([call[side][:, None].flatten(1) for call in calls], 1) for side in (0, 1)
        )
        torch.testing.assert_close(got[name], cosine(dfa, bp), rtol=0, atol=1e-10)
    return got


def cosines_in_numpy(model, x, y):
    """Computes {module name: cosines} of an `fc` network with two hidden layers."""
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in model.parameters())
    h1 = np.tanh(x.numpy() @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    p = np.exp(h2 @ w3.T + b3)
    error = p / p.sum(1, keepdims=True) - np.eye(4)[y.numpy()]
    matrix = model[-1].feedback_matrix.numpy()
    fed1, fed2 = (error @ matrix[:, :d] / math.sqrt(d * 4) for d in (6, 9))
    bp2 = error @ w3
    bp1 = (bp2 * (1 - h2**2)) @ w2
    return {
        "0": cosine(fed1 * (1 - h1**2), bp1 * (1 - h1**2)),
        "1": cosine(fed1, bp1),
        "2": cosine(fed2 * (1 - h2**2), bp2 * (1 - h2**2)),
        "3": cosine(fed2, bp2),
        "4": torch.ones(len(y), dtype=torch.float64),
    }


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options, loss", [
    ({"training_method": "dfa"}, F.cross_entropy),
    ({"training_method": "bp"}, F.cross_entropy),
    ({"training_method": "shallow"}, F.cross_entropy),
    ({"reduction": "sum"}, summed),
    ({"normalization": False}, F.cross_entropy),
])  # fmt: skip
def test_cosines_follow_the_equations(options, loss, grad_mode):
    model = fc(**options)
    x, y = batch()
    with grad_mode():
        got = measure_alignment(model, x, y, loss)
    expected = cosines_in_numpy(model, x, y)
    assert list(got) == list(expected)
    for name, cosines in got.items():
        assert not cosines.requires_grad
        torch.testing.assert_close(cosines, expected[name], rtol=0, atol=1e-10)
    assert (got["4"] == 1).all() and all(abs(got[name]).max() < 0.99 for name in "0123")


def test_cosine_at_the_output_of_a_float32_network_is_exactly_1():
    x, y = batch(samples=500)
    cosines = measure_alignment(fc().float(), x.float(), y, F.cross_entropy)["4"]
    assert cosines.dtype == torch.float64 and (cosines == 1).all()


def test_cosine_is_0_where_a_signal_vanishes():
    x, y = batch()
    no_gradient, no_feedback = fc(example=x.float()), fc(example=x.float())
    nn.init.zeros_(no_gradient.get_submodule("4").weight)
    no_feedback[-1].feedback_matrix.zero_()
    for model in (no_gradient, no_feedback):
        cosines = measure_alignment(model, x, y, F.cross_entropy)
        assert all((cosines[name] == 0).all() for name in "0123") and (cosines["4"] == 1).all()


def test_activation_checkpointing_makes_no_difference():
    x, y = batch()
    model = fc(example=x.float())
    reference = copy.deepcopy(model)
    model.forward = lambda x: model[3:](checkpoint(model[:3], x, use_reentrant=False))
    assert_measured(model, ["0", "1", "2", "3", "4"], x, y, reference=reference)


@pytest.mark.parametrize("given", [("tuple",), {"key": "dict"}, SimpleNamespace(graph=1)], ids=type)
def test_the_input_may_be_of_any_type(given):
    x, y = batch()
    model = fc()
    model.register_forward_pre_hook(lambda module, args: x if args == (given,) else None)
    assert_measured(model, ["0", "1", "2", "3", "4"], given, y)


def test_an_input_that_requires_gradients_gets_none():
    x, y = batch()
    x.requires_grad_()
    assert_measured(fc(), ["0", "1", "2", "3", "4"], x, y)
    assert x.grad is None


def test_a_module_called_several_times_has_one_cosine():
    assert_measured(Recurrent(), ["first", "cell", "head"], *batch())


@pytest.mark.parametrize("train", [True, False])
def test_a_convolutional_network_is_measured_in_eval_mode(train):
    model = dfa_from_bp(nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4),
    )).double()  # fmt: skip
    x, y = batch(2, 4, 4)
    model(x)  # updates the running statistics of BatchNorm2d
    cosines = assert_measured(model.train(train), [str(i) for i in range(9)], x, y)
    alone = measure_alignment(model, x[:1], y[:1], F.cross_entropy)
    for name in alone:
        torch.testing.assert_close(alone[name], cosines[name][:1], rtol=0, atol=1e-10)


def test_changes_in_place_make_no_difference():
    """The changes are behind a module, behind a feedback point, and in front of a point."""

    def build(inplace):
        block = ResidualInPlace if inplace else Residual
        inner = block(DFALayer(), nn.ReLU(), nn.Linear(6, 6))
        front = nn.Linear(7, 6), nn.ReLU(inplace), nn.Linear(6, 6), inner, nn.Linear(6, 6)
        return with_dfa(*front, DFALayer(), nn.ReLU(inplace), nn.Linear(6, 4))

    x, y = batch()
    model, reference = build(inplace=True), build(inplace=False)
    model(x)
    reference(x)
    reference.load_state_dict(model.state_dict())
    names = ["0", "1", "2", "3.1", "3.2", "4", "6", "7"]
    assert_measured(model, names, x, y, reference=reference)


class Positions(nn.Module):
    """Adds a learned vector, from an Embedding whose output has no batch dimension."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 6)

    def forward(self, x):
        return x + self.table(torch.arange(3)).sum(0)


class Discarding(nn.Sequential):
    """Calls its modules, but returns its input."""

    def forward(self, x):
        super().forward(x)
        return x


@pytest.mark.parametrize("front, names", [
    ([nn.Linear(7, 6).requires_grad_(False), DFALayer(), nn.Linear(6, 6)], ["2", "3", "5"]),
    ([weight_norm(nn.Linear(7, 6)), Positions()], ["0", "2", "4"]),
    ([nn.Linear(7, 6), Discarding(nn.Linear(6, 3), DFALayer())], ["0", "2", "4"]),
], ids=["no-gradient", "no-sample", "discarded"])  # fmt: skip
@pytest.mark.parametrize("samples", [8, 6])  # 6 is also the first size of the normalised weight
def test_outputs_without_a_gradient_or_a_batch_dimension_have_no_cosine(front, names, samples):
    model = with_dfa(*front, nn.Tanh(), DFALayer(), nn.Linear(6, 4))
    assert_measured(model, names, *batch(samples=samples))


def test_an_output_of_one_number_per_sample():
    layers = nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)
    model = dfa_from_bp(nn.Sequential(*layers)).double()
    x, _ = batch()
    assert_measured(model, ["0", "1", "2", "3"], x, torch.zeros(8, dtype=x.dtype), F.mse_loss)


def constant(output, y):
    return torch.ones((), requires_grad=True)


def called_twice():
    inner = fc()
    outer = nn.Sequential(inner)
    outer.forward = lambda x: inner(x) + inner(2 * x)
    return outer


def compiled():
    torch.compiler.reset()
    return torch.compile(fc(), backend="aot_eager")


@pytest.mark.parametrize("build, loss, error, message", [
    (lambda: nn.Linear(7, 4), F.cross_entropy, ValueError, "must hold one DFA.* it holds 0"),
    (lambda: nn.Sequential(fc(), DFA(DFALayer())), F.cross_entropy, ValueError, "it holds 2"),
    (called_twice, F.cross_entropy, ValueError, "must call its DFA once, not 2 times"),
    (fc, constant, RuntimeError, "the loss does not depend on the output of the DFA"),
    (compiled, F.cross_entropy, RuntimeError, "give the model before torch.compile"),
    (OwnWeight, F.cross_entropy, RuntimeError, "with its parameters in submodules"),
])  # fmt: skip
def test_refusals(build, loss, error, message):
    with pytest.raises(error, match=message):
        measure_alignment(build(), *batch(), loss)
