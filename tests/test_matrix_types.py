"""The feedback matrix: its type, its device, and the precision of e B_i."""

import copy
import math

import pytest
import torch
from formulas import assert_close, assert_same, batch, expected_gradients, fc, gradients
from torch import nn

from dfatools import DFA, DFALayer

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
X, Y = batch(dtype=torch.float32)


def own_type(dtype, seed=3, **options):
    """Builds a float32 network whose matrix has a type of its own."""
    generator = torch.Generator().manual_seed(seed)
    return fc(dtype=torch.float32, feedback_dtype=dtype, generator=generator, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_matrix_is_no_narrower_than_float32(dtype):
    model = fc(dtype=dtype)
    got = gradients(model, batch(dtype=dtype))
    assert model.dfa.feedback_matrix.dtype == torch.promote_types(dtype, torch.float32)
    assert {gradient.dtype for gradient in got} == {dtype}


def test_the_matrix_follows_the_model_in_type():
    model = fc(dtype=torch.float32)
    model(X)
    matrix = model.dfa.feedback_matrix.clone()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        assert model.dfa.feedback_matrix.dtype == dtype
        assert torch.equal(model.dfa.feedback_matrix, matrix.to(dtype))
    assert_close(gradients(model, batch()), expected_gradients(model, batch()))


# A type of its own


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_as_exact_as_the_rounded_matrix(dtype, reduction):
    model = own_type(dtype, reduction=reduction)
    got = gradients(model, (X, Y))
    drawn = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    matrix = model.dfa.feedback_matrix
    assert matrix.dtype == dtype and torch.equal(matrix, drawn.to(dtype))
    for i, size in enumerate((6, 9)):
        assert torch.equal(model.dfa.feedback(i), matrix[:, :size] * (1 / math.sqrt(size * 4)))
    exact = copy.deepcopy(model).double()
    expected = expected_gradients(exact, (X.double(), Y), matrix=matrix.double())
    rounding = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps  # of B_i, and of sums
    for gradient, true in zip(got, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - true).norm() < 4 * rounding * true.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("columns", [9, 70])
def test_signals_are_computed_in_float32(dtype, size, columns, monkeypatch):
    monkeypatch.setattr("dfatools.feedback.BLOCK", 100)  # 33 columns are widened at a time
    dfa = DFA(DFALayer(), feedback_dtype=dtype)
    dfa.feedback_matrix = torch.randn(3, columns).to(dtype)
    error = size * torch.randn(5, 3)
    (signal,) = dfa.signals(error, [torch.Size((5, columns))])
    expected = error.double() @ dfa.feedback_matrix.double() / math.sqrt(3 * columns)
    assert signal.dtype == torch.float32
    assert (signal - expected).norm() < 1e-6 * expected.norm()


def test_signals_are_the_same_under_autocast():
    model = fc(dtype=torch.float32)
    error, shapes = model(X).detach(), [torch.Size((8, 6)), torch.Size((8, 9))]
    expected = model.dfa.signals(error, shapes)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model.dfa.signals(error, shapes), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_type_is_kept(dtype):
    model = own_type(dtype)
    model(X)
    matrix = model.dfa.feedback_matrix.clone()
    for change in (nn.Module.bfloat16, nn.Module.double, nn.Module.half, nn.Module.float):
        change(model)
        assert model.dfa.feedback_matrix.dtype == dtype
        assert torch.equal(model.dfa.feedback_matrix, matrix)
    assert torch.equal(copy.deepcopy(model).dfa.feedback_matrix, matrix)
    model.to("meta")
    assert model.dfa.feedback_matrix.numel() == 0


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("saved", TYPES[::2])
@pytest.mark.parametrize("dtype", TYPES[::2])
def test_a_state_dict_of_another_type(dtype, saved, assign, used):
    model, source = own_type(dtype), own_type(saved, seed=4)
    source(X)
    if used:
        model(X)
    model.load_state_dict(source.state_dict(), assign=assign)
    for _ in range(2):
        assert model.dfa.feedback_matrix.dtype == dtype
        assert torch.equal(model.dfa.feedback_matrix, source.dfa.feedback_matrix.to(dtype))
        gradients(model, (X, Y))


def test_the_type_is_shown():
    assert "feedback_dtype" not in repr(fc())
    assert "feedback_dtype=torch.bfloat16" in repr(own_type(torch.bfloat16))


# Devices


def test_the_matrix_stays_on_its_own_device():
    model = fc(dtype=torch.float32, feedback_device="cpu")
    model(X)
    matrix = model.dfa.feedback_matrix.clone()
    model.double()
    assert model.dfa.feedback_matrix.dtype == torch.float64
    model.to("meta", torch.float32)
    assert model[0].weight.is_meta and model.dfa.feedback_matrix.dtype == torch.float32
    assert torch.equal(model.dfa.feedback_matrix, matrix)


def test_a_matrix_without_values_is_drawn_anew():
    with torch.device("meta"):
        model = fc(dtype=torch.float32)
        model(torch.randn(8, 7))
    assert model.dfa.feedback_matrix.numel() == 0
    model.to_empty(device="cpu")
    for layer in model[:-1:3]:
        layer.reset_parameters()
    torch.manual_seed(5)
    model(X)
    torch.manual_seed(5)
    assert torch.equal(model.dfa.feedback_matrix, torch.randn(4, 9))


def test_a_pass_of_meta_tensors_trains_and_keeps_a_loaded_matrix():
    model, source = fc(), fc()
    x, y = batch()
    source(x)
    model.load_state_dict(source.state_dict())
    model[:-1].to("meta")
    got = gradients(model, (x.to("meta"), y.to("meta")))
    assert all(gradient.is_meta for gradient in got)
    assert torch.equal(model.dfa.feedback_matrix, source.dfa.feedback_matrix)


def test_signals_go_where_the_activation_is():
    point, head = DFALayer(), nn.Linear(7, 4)
    dfa = DFA(point)
    hidden = torch.zeros(8, 5, device="meta", requires_grad=True)
    with dfa.one_pass():
        point(hidden)
        dfa(head(torch.randn(8, 7))).sum().backward()
    assert hidden.grad.is_meta and hidden.grad.shape == (8, 5)
