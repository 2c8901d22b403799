"""The feedback rules of examples/feedback_rules.py, subclasses of DFA, follow their formulas."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import Definition, assert_close, batch, expected_gradients, fc, gradients, mean_loss
from test_shared_dims import Mean
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from feedback_rules import (
    LearnedMatrices,
    LowRank,
    OwnMatrices,
    SignOfError,
    TargetProjection,
    TernaryError,
)

X, Y = batch(samples=8)
SIZES = (6, 9)  # features of the activations of `fc`


def net(rule, *arguments, **options):
    """Builds an `fc` network with another feedback rule in place of its DFA."""
    model = fc()
    model.dfa = rule(model, *arguments, **options)
    return model.double()


def matrix(model, size):
    """Returns B_i for an activation of `size` features, (4, size), normalisation included."""
    return model.dfa.feedback_matrix[:, :size].numpy() / np.sqrt(4 * size)


# Each formula computes the signal of a point, (rows, size), from the error e, (rows, 4), in NumPy.


def sign_of_error(model, e, point, size):
    signs = np.where(e > 0, 1.0, -1.0)
    return signs * np.abs(e).mean(1, keepdims=True) @ matrix(model, size)


def ternary_error(model, e, point, size):
    largest = np.abs(e).max(1, keepdims=True)
    return (1.0 * (e > largest / 2) - 1.0 * (e < -largest / 2)) * largest @ matrix(model, size)


def target_projection(model, e, point, size):
    target = np.eye(4)[Y] / (1 if model.dfa.reduction == "sum" else len(e))
    return -target @ matrix(model, size)


def own_matrices(model, e, point, size):
    return e @ dict(model.dfa.named_buffers())[f"matrix{point}"].numpy()


def low_rank(model, e, point, size):
    product = model.dfa.left.numpy() @ model.dfa.right.numpy()
    assert np.linalg.matrix_rank(product) == 2
    return e @ product[:, :size] / np.sqrt(size)


def learned_matrices(model, e, point, size):
    return e @ model.dfa.matrices[point].detach().numpy()


RULES = {
    sign_of_error: (SignOfError,),
    ternary_error: (TernaryError,),
    target_projection: (TargetProjection,),
    own_matrices: (OwnMatrices, 4, SIZES),
    low_rank: (LowRank, 4, 9, 2),
    learned_matrices: (LearnedMatrices, 4, SIZES),
}


def as_rule(formula, model):
    """Converts a formula to the `rule` argument of `formulas.Definition`."""
    return lambda rows, point, size: torch.from_numpy(formula(model, rows.numpy(), point, size))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("formula", RULES, ids=lambda formula: formula.__name__)
def test_gradients(formula, reduction):
    model = net(*RULES[formula], reduction=reduction)
    got = gradients(model, (X, Y))[:6]
    rule = as_rule(formula, model)
    assert_close(got, expected_gradients(model, (X, Y), rule=rule)[:6])


@pytest.mark.parametrize("formula", RULES, ids=lambda formula: formula.__name__)
def test_a_compiled_network(formula):
    torch.compiler.reset()
    model = net(*RULES[formula])
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = gradients(model, (X, Y), run=run)
        assert_close(got, gradients(model, (X, Y)))


@pytest.mark.parametrize("formula", RULES, ids=lambda formula: formula.__name__)
def test_alignment(formula):
    model = net(*RULES[formula])
    model(X)
    before = copy.deepcopy(model.state_dict())
    got = measure_alignment(model, X, Y, F.cross_entropy)
    sides = []
    for detach in (True, False):
        run = Definition(model, X, detach, names=("1", "3"), rule=as_rule(formula, model))
        outputs = [run.calls[name][0][1] for name in ("1", "3")]
        sides.append(run.propagate(run.error(Y, F.cross_entropy), outputs))
    for name, signal, gradient in zip(("1", "3"), *sides):
        cosines = F.cosine_similarity(signal, gradient)
        torch.testing.assert_close(got[name], cosines, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("formula", RULES, ids=lambda formula: formula.__name__)
def test_the_state_dict_contains_all_matrices(formula):
    torch.manual_seed(1)
    model = net(*RULES[formula])
    expected = gradients(model, (X, Y))
    other = net(*RULES[formula])
    other.load_state_dict(model.state_dict())
    assert_close(gradients(other, (X, Y)), expected, tolerance=0)
    if not model.dfa.needs_matrix:
        assert model.dfa.feedback_matrix.numel() == 0  # no pass has drawn the shared matrix


# Learned matrices


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_learned_matrices_get_the_gradient_of_kolen_and_pollack(reduction):
    """dB_i = e^T h_i, in NumPy, over accumulated batches."""
    model = net(LearnedMatrices, 4, SIZES, reduction=reduction)
    got = gradients(model, (X[:5], Y[:5]), (X[5:], Y[5:]))[6:]
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in [*model.parameters()][:6])
    expected = [np.zeros((4, 6)), np.zeros((4, 9))]
    for x, y in ((X[:5], Y[:5]), (X[5:], Y[5:])):
        h1 = np.tanh(x.numpy() @ w1.T + b1)
        h2 = np.tanh(h1 @ w2.T + b2)
        p = np.exp(h2 @ w3.T + b3)
        e = (p / p.sum(1, keepdims=True) - np.eye(4)[y]) / 2 / (1 if reduction == "sum" else len(y))
        expected = [sum_ + e.T @ h for sum_, h in zip(expected, (h1, h2))]
    assert_close(got, map(torch.from_numpy, expected))


def test_the_last_learned_matrix_converges_to_the_output_layers_weight():
    """Both get the same gradient, and weight decay removes their initial difference."""
    model = net(LearnedMatrices, 4, SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        mean_loss(model(X), Y).backward()
        optimizer.step()
    weight, learned = model.get_submodule("4").weight, model.dfa.matrices[1]
    assert weight.norm() > 0.5 and (weight - learned).norm() < 1e-4


def test_learned_matrices_get_gradients_behind_a_frozen_layer():
    model = net(LearnedMatrices, 4, SIZES)
    model.get_submodule("0").requires_grad_(False)
    mean_loss(model(X), Y).backward()
    assert all(matrix.grad is not None for matrix in model.dfa.matrices)
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        assert gradients(model, (X, Y))[6:] == [None, None]


# The interface


class Recorded(DFA):
    """DFA that records the arguments of its last call of `signals`."""

    needs_values = True

    def signals(self, error, activations, matrix):
        self.seen = error, activations, matrix
        return super().signals(error, activations, matrix)


def test_a_rule_gets_error_point_shape_size_and_value():
    points = [DFALayer(), DFALayer((2, 3)), DFALayer(recurrent=True)]
    layers = nn.Conv2d(2, 3, 3), points[1], nn.Flatten(), points[0], points[2]
    model = nn.Sequential(*layers, nn.Linear(12, 4))
    model.add_module("dfa", Recorded(model, reduction="sum"))
    model.double()
    x, y = batch(2, 4, 4)
    hidden = model[0](x)
    output = model(x)
    output.retain_grad()
    mean_loss(output, y).backward()
    error, activations, matrix = model.dfa.seen
    torch.testing.assert_close(error, 8 * output.grad, rtol=1e-12, atol=0)
    assert torch.equal(matrix, model.dfa.feedback_matrix) and matrix.shape == (4, 12)
    assert [tuple(each[:3]) for each in activations] == [
        (0, (8, 3, 2, 2), 3), (1, (8, 12), 12), (2, (8, 12), 12),
    ]  # fmt: skip
    assert torch.equal(activations[0].value, hidden)
    assert torch.equal(activations[2].value, hidden.flatten(1))


def test_an_activations_value_is_unaffected_by_later_changes_in_place():
    model = nn.Sequential(nn.Linear(7, 6), DFALayer(), nn.ReLU(inplace=True), nn.Linear(6, 4))
    model.add_module("dfa", Recorded(model))
    model.double()
    mean_loss(model(X), Y).backward()
    (activation,) = model.dfa.seen[1]
    assert torch.equal(activation.value, model[0](X))


def test_dfa_from_bp_passes_options_to_a_rule():
    plain = nn.Sequential(*(layer for layer in fc() if not isinstance(layer, (DFALayer, DFA))))
    for points in (None, ["1", "3"]):
        options = {"rule": OwnMatrices, "output_size": 4, "sizes": SIZES, "reduction": "sum"}
        model = dfa_from_bp(plain, points, **options).double()
        assert type(model.dfa) is OwnMatrices and model.dfa.reduction == "sum"
        rule = as_rule(own_matrices, model)
        got = gradients(model, (X, Y))
        assert_close(got, expected_gradients(model, (X, Y), rule=rule))


class ByValue(DFA):
    """Sends back the activation itself, times the sum of the error's magnitudes."""

    needs_matrix, needs_values = False, True

    def signals(self, error, activations, matrix):
        assert matrix is None
        return [error.abs().sum(1, keepdim=True) * each.value for each in activations]


def test_a_rule_that_uses_values():
    model = net(ByValue)
    got = gradients(model, (X, Y))
    h1 = torch.tanh(model[0](X)).detach()
    h2 = torch.tanh(model[3](h1)).detach()
    values = [h1, h2]

    def rule(rows, point, size):
        return rows.abs().sum(1, keepdim=True) * values[point]

    assert_close(got, expected_gradients(model, (X, Y), rule=rule))
    cosines = measure_alignment(model, X, Y, F.cross_entropy)
    error = (model(X).softmax(1) - F.one_hot(Y, 4)).detach()
    true = error @ model.get_submodule("4").weight.detach()
    expected = F.cosine_similarity(rule(error, 1, 9), true)
    torch.testing.assert_close(cosines["3"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("signals, message", [
    (lambda self, error, *_: [error @ torch.ones(4, 6)], "zip"),
    (lambda self, error, *_: 2 * [error @ torch.ones(4, 6)], r"\(8, 6\) for feedback point 1, not"),
    (lambda self, error, *_: [error.sum(), error], r"\(\) for feedback point 0, not .8, 6"),
    (lambda self, error, *_: [torch.ones(6, 6), torch.ones(8, 9)], r"\(6, 6\) for .* 0, not .8, 6"),
])  # fmt: skip
def test_signals_of_a_wrong_shape_or_number_are_refused(signals, message):
    model = net(type("Wrong", (DFA,), {"signals": signals})).float()
    with pytest.raises(ValueError, match=message):
        mean_loss(model(X.float()), Y).backward()
    with pytest.raises(ValueError, match=message):
        measure_alignment(model, X.float(), Y, F.cross_entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rule_gets_the_error_in_float32(dtype):
    model = net(Recorded).to(dtype)
    mean_loss(model(X.to(dtype)), Y).backward()
    assert model.dfa.seen[0].dtype == torch.float32


def test_a_rule_without_the_shared_matrix_may_be_shared_between_processes():
    net(OwnMatrices, 4, SIZES).share_memory()
    with pytest.raises(RuntimeError, match="share_memory"):
        net(SignOfError).share_memory()


def test_learned_matrices_with_shared_positions():
    """dB = e^T sum_t h_t / sqrt(T), in NumPy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), DFALayer((1,)), Mean(1), nn.Linear(5, 4))
    model.add_module("dfa", LearnedMatrices(model, 4, (5,)))
    x, y = batch(3, 7)
    got = gradients(model.double(), (x, y))[-1:]
    hidden = torch.tanh(model[0](x)).detach()
    error = (model[4](hidden.mean(1)).softmax(1) - F.one_hot(y, 4)).detach().numpy() / len(y)
    expected = sum(error.T @ hidden.numpy()[:, t] for t in range(3)) / np.sqrt(3)
    assert_close(got, [torch.from_numpy(expected)])


def test_rule_parameters_without_rule_gradients_are_refused():
    class Forgetful(LearnedMatrices):
        rule_gradients = DFA.rule_gradients

    with pytest.raises(NotImplementedError, match="Forgetful has parameters, but no rule_grad"):
        mean_loss(net(Forgetful, 4, SIZES)(X), Y).backward()
