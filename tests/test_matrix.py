"""The feedback matrix: which pass makes it, who keeps it, and with which precision it is used."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def network(**options):
    torch.manual_seed(0)
    return dfa_from_bp(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), **options)


def train(model, x=X):
    model.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    return model.dfa.feedback_matrix


def is_made(model):
    return model.dfa.feedback_matrix.shape == (3, 9)


def assert_draws_nothing(call, model):
    state = torch.get_rng_state()
    call()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.dfa.feedback_matrix.numel() == 0


# Who makes it


@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_makes_none(method, mode):
    model = network(training_method=method)
    with mode():
        assert_draws_nothing(lambda: model(X), model)
    train(model)
    assert is_made(model) == (method == "dfa")


@pytest.mark.parametrize("method", ["bp", "shallow"])
def test_other_methods_make_none(method):
    model = network(training_method=method)
    assert_draws_nothing(lambda: train(model), model)


def test_a_refused_pass_makes_none():
    model = network()
    with pytest.raises(ValueError, match="do not share the first 1 dimension"):
        model(X[0])
    with torch.no_grad():
        model(X[0])
    assert_draws_nothing(lambda: None, model)
    train(model)
    assert is_made(model)


def test_an_example_makes_it_at_once_and_leaves_the_rest():
    bp = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 3))
    bp[1].eval()
    for method in ("dfa", "bp"):
        with torch.no_grad():
            model = dfa_from_bp(bp, example=X, training_method=method)
        assert model.dfa.feedback_matrix.shape == (3, 9) == model.dfa.feedback(0).shape
        assert model.dfa.training_method == method
        for name, module in bp.named_modules():
            assert model.get_submodule(name).training == module.training
        for name, tensor in bp.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_measuring_makes_it_under_any_method():
    for method in ("dfa", "bp", "shallow"):
        model = network(training_method=method)
        measure_alignment(model, X, Y, F.cross_entropy)
        assert is_made(model) and model.dfa.training_method == method


def export():
    for strict in (False, True):
        model = network()
        torch.export.export(model, (X,), strict=strict)
        assert_draws_nothing(lambda: None, model)
        before = model[0].weight.clone()
        matrix = train(model)
        assert type(matrix) is torch.Tensor and is_made(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not torch.equal(model[0].weight, before)


def test_an_export_makes_none():
    # PyTorch does not export with the precision that tests of the scripts leave in this process.
    process = torch.multiprocessing.get_context("spawn").Process(target=export)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_pass_of_fake_tensors_makes_none():
    model = network()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))
    assert_draws_nothing(lambda: None, model)


def test_a_pass_of_meta_tensors_keeps_the_values():
    model = network()
    matrix = train(model).clone()
    model[:-1].to("meta")
    model(X.to("meta"))
    assert torch.equal(model.dfa.feedback_matrix, matrix)


# Who keeps it


class Detour(nn.Module):
    """Comes by its first point only where it is told to."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 3)
        self.extra, self.point = DFALayer(), DFALayer()
        self.dfa = DFA(self)

    def forward(self, x, extra=False):
        h = self.conv(x)
        h = self.extra(h) if extra else h
        return self.dfa(self.head(self.point(h.mean((2, 3)))))


def test_a_refused_pass_leaves_no_size_behind():
    model, x = Detour(), torch.randn(8, 1, 8, 8)
    model(x)
    with pytest.raises(ValueError, match="has 128 features, but the .* made for at most 2"):
        model(x, extra=True)
    F.cross_entropy(model(x), Y).backward()
    assert model.dfa.feedback(1).shape == (3, 2)
    with pytest.raises(RuntimeError, match="point 0 has not been fed"):
        model.dfa.feedback(0)


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self):
        super().__init__()
        self.conv, self.point, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            DFALayer(),
            nn.Linear(4, 3),
        )
        self.dfa = DFA(self)

    def forward(self, x):
        return self.dfa(self.head(self.point(self.conv(x).tanh()).mean((2, 3))))


def test_larger_images_are_refused_only_where_they_are_fed_back_to():
    model, large = Pooled(), torch.randn(8, 1, 16, 16)
    train(model, torch.randn(8, 1, 8, 8))
    with torch.no_grad():
        model(large)
    with pytest.raises(ValueError, match="has 1024 features, but the .* made for at most 256"):
        model(large)
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        train(model, large)


@pytest.mark.parametrize("made", [False, True])
def test_a_moving_average_has_the_matrix_or_is_refused(made):
    model = network(example=X if made else None)
    average = AveragedModel(model)
    matrix = train(model)
    if not made:
        with pytest.raises(RuntimeError, match="size of tensor a .0. must match"):
            average.update_parameters(model)
        return
    average.update_parameters(model)
    with torch.no_grad():
        average(X)
    assert torch.equal(average.module.dfa.feedback_matrix, matrix)


def by_buffers(target, source):
    for a, b in zip(target.buffers(), source.buffers(), strict=True):
        a.copy_(b)


def by_names(target, source):
    own = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    for name, tensor in source.state_dict().items():
        own[name].copy_(tensor)


def by_state_dict(target, source):
    for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        a.copy_(b)


@torch.no_grad
def fill(loader, target, source):
    loader(target, source)


@pytest.mark.parametrize("loader", [by_buffers, by_names, by_state_dict])
def test_loaders_that_fill_what_is_there_fill_the_matrix_or_are_refused(loader):
    source = network()
    matrix = train(source)
    with pytest.raises(RuntimeError, match="size of tensor a .0. must match"):
        fill(loader, network(), source)
    target = network(example=X)
    fill(loader, target, source)
    assert torch.equal(train(target), matrix)


def test_an_average_of_the_parameters_alone_takes_no_other_matrix():
    """Evaluated before the first pass of training, it makes none: resuming from it draws anew."""
    model = network()
    average = copy.deepcopy(model)
    with torch.no_grad():
        assert_draws_nothing(lambda: average(X), average)
    resumed = network()
    resumed.load_state_dict(average.state_dict())
    assert_draws_nothing(lambda: None, resumed)


def test_a_state_dict_from_before_the_matrix_keeps_the_one_there_is():
    model = network()
    start = copy.deepcopy(model.state_dict())
    matrix = train(model).clone()
    model.load_state_dict(start)
    assert torch.equal(train(model), matrix)


def test_a_meta_state_dict_brings_no_matrix():
    model = network(example=X)
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    fresh = network()
    fresh.load_state_dict(state, assign=True)
    assert_draws_nothing(lambda: None, fresh)


def test_shared_memory_before_the_matrix_is_refused():
    model = network()
    with pytest.raises(RuntimeError, match="share_memory.. before there is a feedback matrix"):
        model.share_memory()
    model = network(example=X)
    assert model.share_memory().dfa.feedback_matrix.is_shared()


def test_functional_calls_have_one_matrix():
    """Also where the buffers were collected before the first pass."""
    for clone in (lambda tensor: tensor, torch.clone):
        model = network()
        parts = {name: clone(buffer) for name, buffer in model.named_buffers()}
        gradients = []
        for _ in range(2):
            model.zero_grad()
            output = torch.func.functional_call(model, ({}, parts), (X,))
            F.cross_entropy(output, Y).backward()
            gradients.append(model[0].weight.grad)
        assert torch.equal(*gradients) and parts["dfa.feedback_matrix"].shape == (3, 9)


@pytest.mark.parametrize("made", [False, True])
def test_a_matrix_of_one_s_own(made):
    model = network(normalization=False).double()
    if made:
        train(model, X.double())
    matrix = torch.arange(27, dtype=torch.float64).view(3, 9) / 27
    model.dfa.feedback_matrix = matrix
    train(model, X.double())
    w, b, v, c = (parameter.detach().numpy() for parameter in model.parameters())
    h = np.tanh(X.numpy() @ w.T + b)
    p = np.exp(h @ v.T + c)
    error = (p / p.sum(1, keepdims=True) - np.eye(3)[Y.numpy()]) / 8
    expected = ((error @ matrix.numpy()) * (1 - h**2)).T @ X.numpy()
    np.testing.assert_allclose(model[0].weight.grad, expected, rtol=0, atol=1e-12)
    model.dfa.feedback_matrix = matrix[:2]
    with pytest.raises(ValueError, match="output of size 3, but .* was made for 2"):
        model(X.double())


# How exact e B_i is


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [9, 70])
def test_a_narrow_matrix_is_as_exact_as_its_rounding(dtype, size, columns, monkeypatch):
    monkeypatch.setattr("dfatools.feedback.BLOCK", 100)  # columns are widened 33 at a time
    model = nn.Sequential(DFALayer(), nn.Linear(columns, 3))
    dfa = DFA(model, feedback_dtype=dtype)
    dfa.feedback_matrix = torch.randn(3, columns).to(dtype)
    error = size * torch.randn(5, 3)
    (signal,) = dfa.signals(error, [torch.Size((5, columns))])
    expected = error.double() @ dfa.feedback_matrix.double() / math.sqrt(3 * columns)
    assert signal.dtype == torch.float32
    assert (signal - expected).norm() < 1e-6 * expected.norm()
