"""The feedback matrix: the passes that draw it, and everything that saves, loads or copies it."""

import pytest
import torch
from formulas import assert_close, assert_same, batch, expected_gradients, gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment

X, Y = batch(6, classes=3, dtype=torch.float32)


def network(seed=0, widths=(6, 9, 3), **options):
    torch.manual_seed(seed)
    inputs, hidden, outputs = widths
    bp = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    return dfa_from_bp(bp, **options)


def run_pass(model, x=X):
    """Runs a forward and a backward pass; returns the matrix."""
    gradients(model, (x, Y))
    return model.dfa.feedback_matrix


def is_drawn(model):
    return model.dfa.feedback_matrix.shape == (3, 9)


def is_empty(model):
    return model.dfa.feedback_matrix.numel() == 0


# Passes that draw it


def test_it_is_drawn_by_the_default_generator_or_by_a_given_one():
    torch.manual_seed(5)
    expected = torch.randn(3, 9)
    for seed, generator in ((5, None), (6, torch.Generator().manual_seed(5))):
        model = network(generator=generator)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        assert torch.equal(run_pass(model), expected)
        assert torch.equal(torch.get_rng_state(), state) == (generator is not None)


@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_and_other_methods_draw_none(method, mode):
    model = network(training_method=method)
    state = torch.get_rng_state()
    with mode():
        model(X)
    assert is_empty(model)
    run_pass(model)
    assert is_drawn(model) if method == "dfa" else is_empty(model)
    assert torch.equal(torch.get_rng_state(), state) == (method != "dfa")


@pytest.mark.parametrize("method", ["dfa", "bp"])
def test_an_example_draws_it_at_once_and_changes_nothing_else(method):
    bp = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 3))
    bp[1].eval()
    with torch.no_grad():
        model = dfa_from_bp(bp, example=X, training_method=method)
    assert is_drawn(model) and model.dfa.feedback(0).shape == (3, 9)
    assert model.dfa.training_method == method
    for name, module in bp.named_modules():
        assert model.get_submodule(name).training == module.training
    for name, tensor in bp.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
def test_measuring_draws_it_under_any_method(method):
    model = network(training_method=method)
    measure_alignment(model, X, Y, F.cross_entropy)
    assert is_drawn(model) and model.dfa.training_method == method


def export():
    for strict in (False, True):
        model = network()
        torch.export.export(model, (X,), strict=strict)
        assert is_empty(model)
        before = model[0].weight.clone()
        matrix = run_pass(model)
        assert type(matrix) is torch.Tensor and is_drawn(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not torch.equal(model[0].weight, before)


def test_an_export_draws_none():
    # PyTorch does not export with the precision that tests of the scripts leave in this process.
    process = torch.multiprocessing.get_context("spawn").Process(target=export)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_pass_of_fake_tensors_draws_none():
    model = network()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))
    assert is_empty(model)


# Sizes


class Pooled(nn.Module):
    """Takes images of any size; `extra` sends them through the other feedback point."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.extra, self.point = DFALayer(), DFALayer()
        self.dfa = DFA(self)

    def forward(self, x, extra=False):
        h = self.conv(x).tanh()
        h = self.extra(h) if extra else self.point(h)
        return self.dfa(self.head(h.mean((2, 3))))


def test_larger_images_are_refused_only_where_they_are_fed_back_to():
    model, large = Pooled(), torch.randn(8, 1, 16, 16)
    run_pass(model, torch.randn(8, 1, 8, 8))
    with torch.no_grad():
        model(large)
    with pytest.raises(ValueError, match="has 1024 features, but the .* made for at most 256"):
        model(large, extra=True)
    assert model.dfa.feedback(1).shape == (3, 256)
    with pytest.raises(RuntimeError, match="point 0 has not been fed"):
        model.dfa.feedback(0)  # the refused pass has left no size behind
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        run_pass(model, large)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_matrix_may_be_set(drawn):
    model, data = network(normalization=False).double(), (X.double(), Y)
    if drawn:
        gradients(model, data)
    matrix = torch.arange(27, dtype=torch.float64).view(3, 9) / 27
    model.dfa.feedback_matrix = matrix
    assert_close(gradients(model, data), expected_gradients(model, data, matrix=matrix))
    model.dfa.feedback_matrix = matrix[:2]
    with pytest.raises(ValueError, match="output of size 3, but .* was made for 2"):
        model(data[0])


# state_dict


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
def test_a_state_dict_brings_its_matrix(used):
    model, source = network(), network(seed=1)
    expected = gradients(source, (X, Y))
    if used:
        run_pass(model)
    model.load_state_dict(source.state_dict())
    assert model.dfa.feedback_matrix.data_ptr() != source.dfa.feedback_matrix.data_ptr()
    assert_same(gradients(model, (X, Y)), expected)


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
@pytest.mark.parametrize("entry", [None, torch.empty(0, 0), torch.empty(3, 9, device="meta")])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_without_a_matrix_leaves_the_matrix_as_it_is(entry, used, assign):
    """It comes from a BP network, a DFA network before its first pass, or a meta device."""
    model, source = network(), network(seed=1)
    state = source.state_dict()
    del state["dfa.feedback_matrix"]
    if entry is not None:
        state["dfa.feedback_matrix"] = entry
    matrix = run_pass(model).clone() if used else torch.empty(0, 0)
    model.load_state_dict(state, strict=True, assign=assign)
    assert_same(model.parameters(), source.parameters())
    assert torch.equal(model.dfa.feedback_matrix, matrix)


def test_a_matrix_of_another_size_is_refused():
    source, fresh = network(widths=(6, 8, 3), example=X), network()
    matrix = {"dfa.feedback_matrix": source.dfa.feedback_matrix}
    with pytest.raises(RuntimeError, match="size mismatch for dfa.feedback_matrix"):
        network(example=X).load_state_dict(matrix, strict=False)
    fresh.load_state_dict(matrix, strict=False)
    with pytest.raises(ValueError, match="has 9 features, but the .* made for at most 8"):
        fresh(X)


# Other ways to copy it


@pytest.mark.parametrize("drawn", [False, True])
def test_a_moving_average_has_the_matrix_or_is_refused(drawn):
    """Other tools that copy buffers in place behave alike."""
    model = network(example=X if drawn else None)
    average = AveragedModel(model)
    matrix = run_pass(model)
    if drawn:
        average.update_parameters(model)
        assert torch.equal(average.module.dfa.feedback_matrix, matrix)
    else:
        with pytest.raises(RuntimeError, match="size of tensor a .0. must match"):
            average.update_parameters(model)


def test_shared_memory_before_the_matrix_is_refused():
    with pytest.raises(RuntimeError, match="share_memory.. before there is a feedback matrix"):
        network().share_memory()
    assert network(example=X).share_memory().dfa.feedback_matrix.is_shared()


@pytest.mark.parametrize("clone", [lambda tensor: tensor, torch.clone], ids=["own", "cloned"])
def test_functional_calls_have_one_matrix(clone):
    """The buffers may be collected before the first pass."""
    model = network()
    parts = {name: clone(buffer) for name, buffer in model.named_buffers()}

    def run(x):
        return torch.func.functional_call(model, ({}, parts), (x,))

    first = gradients(model, (X, Y), run=run)
    assert_same(gradients(model, (X, Y), run=run), first)
    assert parts["dfa.feedback_matrix"].shape == (3, 9)
