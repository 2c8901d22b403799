"""The feedback matrix is drawn in the first pass that needs it, and then saved as a buffer."""

import copy
import math
from functools import partial

import pytest
import torch
from formulas import assert_close, assert_same, batch, expected_gradients, fc, gradients, with_dfa
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from dfatools import DFA, DFALayer, dfa_from_bp
from dfatools.feedback import Activation

X, Y = batch(dtype=torch.float32)
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

network = partial(fc, dtype=torch.float32)


def own_type(dtype, seed=3, **options):
    """Builds a float32 network whose matrix has the given type."""
    generator = torch.Generator().manual_seed(seed)
    return network(feedback_dtype=dtype, generator=generator, **options)


def run_pass(model, x=X):
    """Runs a forward and a backward pass; returns the feedback matrix."""
    gradients(model, (x, Y))
    return model.dfa.feedback_matrix


def is_drawn(model):
    return model.dfa.feedback_matrix.shape == (4, 9)


def is_empty(model):
    return model.dfa.feedback_matrix.numel() == 0


# Passes that draw the matrix


def test_the_matrix_is_drawn_from_the_default_or_the_given_generator():
    torch.manual_seed(5)
    expected = torch.randn(4, 9)
    for seed, generator in ((5, None), (6, torch.Generator().manual_seed(5))):
        model = network(generator=generator)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        assert torch.equal(run_pass(model), expected)
        assert torch.equal(torch.get_rng_state(), state) == (generator is not None)


@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_and_other_methods_draw_no_matrix(method, mode):
    model = network(training_method=method)
    state = torch.get_rng_state()
    with mode():
        model(X)
    assert is_empty(model)
    run_pass(model)
    assert is_drawn(model) if method == "dfa" else is_empty(model)
    assert torch.equal(torch.get_rng_state(), state) == (method != "dfa")


@pytest.mark.parametrize("method", ["dfa", "bp"])
@pytest.mark.parametrize("training", [True, False])
def test_an_example_draws_the_matrix_and_changes_nothing_else(training, method):
    bp = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 4))
    bp.train(training)[1].eval()
    with torch.no_grad():
        model = dfa_from_bp(bp, example=X, training_method=method)
    assert is_drawn(model) and model.dfa.feedback(0).shape == (4, 9)
    assert model.dfa.training_method == method
    for name, module in bp.named_modules():
        assert model.get_submodule(name).training == module.training
    for name, tensor in bp.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())


def export():
    for strict in (False, True):
        model = network()
        torch.export.export(model, (X,), strict=strict)
        assert is_empty(model)
        assert type(run_pass(model)) is torch.Tensor and is_drawn(model)


def test_an_export_draws_no_matrix():
    # torch.export fails with the fp32_precision that tests of the scripts set in this process.
    process = torch.multiprocessing.get_context("spawn").Process(target=export)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_pass_of_fake_tensors_draws_no_matrix():
    model = network()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))
    assert is_empty(model)


# Sizes


def test_larger_images_are_refused_only_in_passes_with_feedback():
    layers = nn.Conv2d(1, 4, 3, padding=1), DFALayer(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, large = with_dfa(*layers, nn.Linear(4, 4)).float(), torch.randn(8, 1, 16, 16)
    run_pass(model, large[:, :, :8, :8])
    feedback = model.dfa.feedback(0)
    with torch.no_grad():
        model(large)
    with pytest.raises(ValueError, match="has 1024 features, but the .* made for at most 256"):
        model(large)
    assert torch.equal(model.dfa.feedback(0), feedback)  # the refused pass has changed no size
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        run_pass(model, large)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_matrix_may_be_set(drawn):
    model, data = fc(normalization=False), batch()
    if drawn:
        gradients(model, data)
    matrix = torch.arange(36, dtype=torch.float64).view(4, 9) / 36
    model.dfa.feedback_matrix = matrix
    assert_close(gradients(model, data), expected_gradients(model, data, matrix=matrix))
    model.dfa.feedback_matrix = matrix[:3]
    with pytest.raises(ValueError, match="output of size 4, but .* was made for 3"):
        model(data[0])


# state_dict


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("saved, dtype", [
    (None, None), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
])  # fmt: skip
def test_loading_a_state_dict_replaces_the_matrix(saved, dtype, assign, used):
    model, source = own_type(dtype), own_type(saved, seed=4)
    source(X)
    if used:
        model(X)
    saved_matrix = source.dfa.feedback_matrix
    model.load_state_dict(source.state_dict(), assign=assign)
    assert assign or model.dfa.feedback_matrix.data_ptr() != saved_matrix.data_ptr()
    for _ in range(2):
        assert model.dfa.feedback_matrix.dtype == (dtype or torch.float32)
        assert torch.equal(model.dfa.feedback_matrix, saved_matrix.to(dtype))
        gradients(model, (X, Y))


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
@pytest.mark.parametrize("entry", [None, torch.empty(0, 0), torch.empty(4, 9, device="meta")])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_without_a_matrix_keeps_the_matrix(entry, used, assign):
    """Such a state_dict is from a BP network, an unused DFA network, or a meta device."""
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
    source, fresh = network((7, 6, 8, 4), example=X), network()
    matrix = {"dfa.feedback_matrix": source.dfa.feedback_matrix}
    with pytest.raises(RuntimeError, match="size mismatch for dfa.feedback_matrix"):
        network(example=X).load_state_dict(matrix, strict=False)
    fresh.load_state_dict(matrix, strict=False)
    with pytest.raises(ValueError, match="has 9 features, but the .* made for at most 8"):
        fresh(X)


# Other ways to copy the matrix


def test_a_moving_average_made_before_the_matrix_is_drawn_is_refused():
    """Other tools that copy buffers in place fail in the same way."""
    model = network()
    average = AveragedModel(model)
    run_pass(model)
    with pytest.raises(RuntimeError, match="size of tensor a .0. must match"):
        average.update_parameters(model)


def test_share_memory_before_the_matrix_is_drawn_is_refused():
    with pytest.raises(RuntimeError, match="share_memory.. before the feedback matrix is drawn"):
        network().share_memory()
    assert network(example=X).share_memory().dfa.feedback_matrix.is_shared()


@pytest.mark.parametrize("clone", [lambda tensor: tensor, torch.clone], ids=["own", "cloned"])
def test_functional_calls_share_one_matrix(clone):
    """The first call draws it into the given buffers, which were collected before the call."""
    model = network()
    parts = {name: clone(buffer) for name, buffer in model.named_buffers()}

    def run(x):
        return torch.func.functional_call(model, ({}, parts), (x,))

    first = gradients(model, (X, Y), run=run)
    assert_same(gradients(model, (X, Y), run=run), first)
    assert parts["dfa.feedback_matrix"].shape == (4, 9)


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_matrix_is_no_narrower_than_float32(dtype):
    model = fc(dtype=dtype)
    got = gradients(model, batch(dtype=dtype))
    assert model.dfa.feedback_matrix.dtype == torch.promote_types(dtype, torch.float32)
    assert {gradient.dtype for gradient in got} == {dtype}


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_are_as_exact_as_the_rounded_matrix(dtype):
    model = own_type(dtype)
    got = gradients(model, (X, Y))
    drawn = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    matrix = model.dfa.feedback_matrix
    assert matrix.dtype == dtype and torch.equal(matrix, drawn.to(dtype))
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
    monkeypatch.setattr("dfatools.feedback.BLOCK", 100)  # widens 33 columns at a time
    dfa = DFA(DFALayer(), feedback_dtype=dtype)
    dfa.feedback_matrix = torch.randn(3, columns).to(dtype)
    for error in (size * torch.randn(5, 3), torch.randn(5, 3).to(dtype)):
        activation = Activation(0, torch.Size((5, columns)), columns, None)
        (signal,) = dfa.signals(error, [activation], dfa.feedback_matrix)
        expected = error.double() @ dfa.feedback_matrix.double() / math.sqrt(3 * columns)
        assert signal.dtype == torch.float32
        assert (signal - expected).norm() < 1e-6 * expected.norm()


def test_signals_are_the_same_under_autocast():
    model = network()
    error = model(X).detach()
    matrix = model.dfa.feedback_matrix
    activations = [Activation(i, torch.Size((8, size)), size, None) for i, size in ((0, 6), (1, 9))]
    expected = model.dfa.signals(error, activations, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model.dfa.signals(error, activations, matrix), expected)


def test_repr_shows_the_type():
    assert "feedback_dtype" not in repr(fc())
    assert "feedback_dtype=torch.bfloat16" in repr(own_type(torch.bfloat16))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fixed_type_survives_conversions_of_the_model(dtype):
    model = own_type(dtype)
    model(X)
    matrix = model.dfa.feedback_matrix.clone()
    for change in (nn.Module.bfloat16, nn.Module.double, nn.Module.half, nn.Module.float):
        change(model)
        assert model.dfa.feedback_matrix.dtype == dtype
        assert torch.equal(model.dfa.feedback_matrix, matrix)
    model.to("meta")
    assert is_empty(model)


# Devices


@pytest.mark.parametrize("feedback_device", [None, "cpu"])
def test_the_matrix_follows_the_model_unless_its_device_is_fixed(feedback_device):
    model = network(feedback_device=feedback_device)
    matrix = run_pass(model).clone()
    model.double()
    assert torch.equal(model.dfa.feedback_matrix, matrix.double())
    model.to("meta", torch.float32)
    assert model[0].weight.is_meta
    expected = matrix if feedback_device else torch.empty(0, 0)
    assert torch.equal(model.dfa.feedback_matrix, expected)


def test_a_matrix_without_values_is_drawn_again():
    with torch.device("meta"):
        model = network()
        model(torch.randn(8, 7))
    assert is_empty(model)
    model.to_empty(device="cpu")
    for layer in model[:-1:3]:
        layer.reset_parameters()
    torch.manual_seed(5)
    model(X)
    torch.manual_seed(5)
    assert torch.equal(model.dfa.feedback_matrix, torch.randn(4, 9))


def test_signals_are_moved_to_the_device_of_their_activation():
    point, head = DFALayer(), nn.Linear(7, 4)
    dfa = DFA(point)
    hidden = torch.zeros(8, 5, device="meta", requires_grad=True)
    with dfa.one_pass():
        point(hidden)
        dfa(head(torch.randn(8, 7))).sum().backward()
    assert hidden.grad.is_meta and hidden.grad.shape == (8, 5)
