"""DFA and DFALayer as modules: training methods, matrices B_i, signals, refused arguments."""

import copy
import math

import pytest
import torch
from formulas import assert_close, assert_same, batch, expected_gradients, fc, gradients, with_dfa
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp


def test_training_methods_may_alternate_on_the_same_weights():
    model = fc(dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    modules = [m for m in copy.deepcopy(model) if not isinstance(m, (DFALayer, DFA))]
    plain = nn.Sequential(*modules)
    true = gradients(plain, (x, y))
    expected = {"dfa": gradients(model, (x, y)), "bp": true, "shallow": [None] * 4 + true[4:]}
    assert not torch.equal(expected["dfa"][0], true[0])
    for method in ("dfa", "bp", "shallow", "dfa", "shallow", "bp", "dfa"):
        model.dfa.training_method = method
        assert torch.equal(model(x), plain(x))
        assert_same(gradients(model, (x, y)), expected[method])
        with torch.no_grad():
            output = model(x)
        assert not output.requires_grad and torch.equal(output, plain(x))


def test_feedback_has_the_documented_standard_deviation():
    model = fc((3, 800, 300, 50))
    model(torch.randn(2, 3, dtype=torch.float64))
    dfa = model.dfa
    assert dfa.feedback_matrix.shape == (50, 800)
    for i, size in enumerate((800, 300)):
        matrix, deviation = dfa.feedback(i), 1 / math.sqrt(size * 50)
        assert abs(matrix.std() / deviation - 1) < 0.03 and abs(matrix.mean() / deviation) < 0.05
        expected = dfa.feedback_matrix[:, :size] * deviation
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=0)
    assert torch.equal(dfa.feedback(-1), dfa.feedback(1))
    with pytest.raises(IndexError):
        dfa.feedback(2)
    dfa.normalization = False
    assert torch.equal(dfa.feedback(1), dfa.feedback_matrix[:, :300])


def test_the_feedback_is_unknown_before_the_first_pass():
    model, used = fc(), fc()
    used(batch()[0])
    model.load_state_dict(used.state_dict())  # loads the matrix, but not the sizes of the points
    with pytest.raises(RuntimeError, match="matrix of feedback point 1 is not drawn"):
        model.dfa.feedback(1)


def test_the_feedback_is_unknown_after_the_matrix_is_lost():
    model = fc()
    model(batch()[0])
    model.to("meta")  # tensors without values
    with pytest.raises(RuntimeError, match="matrix of feedback point 0 is not drawn"):
        model.dfa.feedback(0)


def test_a_rule_without_the_matrix_has_no_feedback():
    class OwnMatrices(DFA):
        needs_matrix = False

    model = dfa_from_bp(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4)), rule=OwnMatrices)
    model(torch.randn(8, 7))
    with pytest.raises(RuntimeError, match="OwnMatrices does not use the shared feedback matrix"):
        model.dfa.feedback(0)


@pytest.mark.parametrize("shape, memory_format", [
    ((4, 3, 5, 6), torch.contiguous_format),
    ((4, 3, 5, 6), torch.channels_last),
    ((4, 3, 2, 5, 6), torch.channels_last_3d),
])  # fmt: skip
def test_a_signal_has_the_memory_format_of_its_activation(shape, memory_format):
    point, signals = DFALayer(), []
    dfa = DFA(point)
    hidden = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_().tanh()
    hidden.register_hook(signals.append)
    with dfa.one_pass():
        dfa(point(hidden).flatten(1)).sum().backward()
    assert signals[0].stride() == hidden.stride()


@pytest.mark.parametrize("frozen", [0, 3, -2], ids=["first", "middle", "last"])
def test_a_frozen_layer_gets_no_gradient_and_changes_no_other(frozen):
    model, data = fc(), batch()
    expected = gradients(model, data)
    model[frozen].requires_grad_(False)
    wanted = [
        gradient if parameter.requires_grad else None
        for parameter, gradient in zip(model.parameters(), expected)
    ]
    assert wanted.count(None) == 2
    assert_same(gradients(model, data), wanted)


def test_the_output_may_be_changed_in_place():
    model, data = fc(), batch()
    got = gradients(model, data, run=lambda x: model(x).mul_(2) / 2)
    assert_close(got, expected_gradients(model, data))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_dims, shape", [(1, (12,)), (2, (3, 4))])
def test_an_output_without_features_is_one_number_per_sample(batch_dims, shape, reduction):
    """Regression networks often squeeze their output."""
    torch.manual_seed(0)
    modules = nn.Linear(7, 5), nn.Tanh(), DFALayer(), nn.Linear(5, 1), nn.Flatten(-2)
    model = with_dfa(*modules, batch_dims=batch_dims, reduction=reduction)
    data = torch.randn(*shape, 7).double(), torch.zeros(shape).double()
    assert model(data[0]).shape == shape and model.dfa.feedback_matrix.shape == (1, 5)
    got = gradients(model, data, loss=F.mse_loss)
    assert_close(got, expected_gradients(model, data, loss=F.mse_loss))


# Refused arguments


def test_bad_networks_are_refused():
    with pytest.raises(TypeError, match="takes the network with the DFALayers, not a list"):
        DFA([DFALayer()])
    with pytest.raises(ValueError, match="no DFALayer as a submodule: make the DFALayers before"):
        DFA(nn.Linear(2, 3))


@pytest.mark.parametrize("option, value", [
    ("reduction", "none"),
    ("training_method", "backprop"),
    ("batch_dims", 0),
    ("batch_dims", 1.0),
    ("feedback_dtype", torch.int8),
])  # fmt: skip
def test_bad_options_are_refused_and_leave_the_network_unchanged(option, value):
    model, data = fc(), batch()
    with pytest.raises(ValueError, match=f"{option} must be .*{value!r}"):
        DFA(model, **{option: value})
    with pytest.raises(ValueError, match="training_method must be"):
        model.dfa.training_method = "BP"
    assert_close(gradients(model, data), expected_gradients(model, data))


def test_a_point_without_a_dfa_is_refused():
    model = with_dfa(DFALayer(), nn.Linear(2, 3))
    model[1] = DFALayer()  # made after the DFA
    with pytest.raises(RuntimeError, match="belongs to no DFA: make DFA.network. after it"):
        model(torch.randn(2, 2))


def test_a_replica_is_refused():
    # Calls a private method of nn.DataParallel, since its public functions need several GPUs.
    for model in (fc(), dfa_from_bp(nn.ModuleDict({"a": nn.Tanh()}), ["a"])):
        with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
            model._replicate_for_data_parallel()(torch.randn(8, 7))


def test_anything_but_a_tensor_is_refused():
    model, (x, _) = fc(), batch()
    with pytest.raises(TypeError, match="a feedback point takes one tensor, not a tuple"):
        model[2]((x, x))
    with pytest.raises(TypeError, match="DFA takes the output as one tensor, not a dict"):
        model.dfa({"logits": x})


@pytest.mark.parametrize("batch_dims, sizes, message", [
    (1, (6, 3), r"\(6, 3\) do not share the first 1 dimension\(s\) with the output, \(18,\)"),
    (2, (2, 3, 4), r"\(2, 3, 4\) do not share the first 2 dimension\(s\) .* \(24,\)"),
])  # fmt: skip
def test_different_batch_dimensions_are_refused(batch_dims, sizes, message):
    model = with_dfa(DFALayer(), nn.Flatten(0), batch_dims=batch_dims)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(sizes))
    assert model.dfa.feedback_matrix.numel() == 0  # the refused pass has drawn no matrix
