"""dfa_from_bp gives a Sequential a feedback point before each module with weights but the first."""

import copy
from collections import OrderedDict

import pytest
import torch
from formulas import Residual
from torch import nn
from torch.nn import functional as F

from dfatools import DFALayer, dfa_from_bp


class Named(nn.Sequential):
    """Sequential subclass with a buffer and a forward hook."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.register_buffer("mean", torch.ones(6))
        self[1].register_forward_hook(lambda module, args, output: 2 * output)


def linear():
    return nn.Linear(5, 5)


FIRST, ACT, MIDDLE, LAST = nn.Linear(6, 5), nn.Tanh(), linear(), nn.Linear(5, 3)
FC = nn.Sequential(FIRST, nn.Tanh(), MIDDLE, nn.Tanh(), LAST)
NESTED = nn.Sequential(nn.Sequential(FIRST, nn.Tanh()), MIDDLE, nn.Tanh())
NAMED = Named(FIRST, nn.Sequential(MIDDLE, nn.Tanh()), LAST)


def names(model):
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def points(model):
    """Asserts that each feedback point is right before its module; returns the points' names."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, DFALayer)}
    assert model[-1].layers == tuple(found.values())
    order = names(model)
    for point in found:
        assert order[order.index(point) + 1] == point.replace("feedback_", "")
    return list(found)


@pytest.mark.parametrize("bp, expected", [
    (FC, ["feedback_2", "feedback_4"]),
    (nn.Sequential(nn.Flatten(), NESTED, nn.Sequential(LAST)), ["1.feedback_1", "2.feedback_0"]),
    (nn.Sequential(FIRST, ACT, MIDDLE, ACT, MIDDLE, ACT, LAST),  # repeated modules
     ["feedback_2", "feedback_4", "feedback_6"]),
    (nn.Sequential(FIRST, Residual(linear(), ACT, linear()), LAST), ["feedback_1", "feedback_2"]),
    (NAMED, ["1.feedback_0", "feedback_2"]),
], ids=["fc", "nested", "shared", "residual", "named"])  # fmt: skip
def test_the_result_is_the_original_with_points_and_a_dfa(bp, expected):
    model = dfa_from_bp(bp, training_method="bp")
    assert points(model) == expected and type(model) is type(bp)
    assert [name for name in names(model) if "feedback" not in name] == [*names(bp), "dfa"]
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    bp.zero_grad()
    for network in (bp, model):
        F.cross_entropy(network(x), y).backward()
    for left, right in zip(bp.parameters(), model.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)


@pytest.mark.parametrize("layers, expected", [
    # The paper's convolutional network
    ([nn.Conv2d(3, 4, 5), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5), nn.Tanh(), nn.Flatten(),
      nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)], [3, 6, 8]),
    # Parameters of any module count as weights.
    ([nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3),
      nn.ConvTranspose2d(2, 2, 3), nn.ConvTranspose3d(2, 2, 3)], [1, 2, 3, 4]),
    ([nn.LSTM(5, 5), nn.GRU(5, 5), nn.RNN(5, 5), nn.Bilinear(5, 5, 5), nn.Embedding(5, 5),
      nn.MultiheadAttention(5, 1), nn.TransformerEncoderLayer(5, 1)], [*range(1, 7)]),
    ([nn.Sequential(nn.Tanh(), nn.ParameterList([torch.ones(5)])), linear()], [1]),
    ([nn.Identity(), Residual(linear(), nn.Tanh(), linear()), linear()], [2]),
    # Parameters of normalisation and PReLU do not count; softmax and sigmoid have no parameters.
    ([linear(), nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.RMSNorm(5), nn.PReLU(),
      nn.InstanceNorm1d(5, affine=True), linear()], [7]),
    ([linear(), nn.LogSoftmax(1), nn.Softmax(1), nn.Sigmoid(), linear()], [4]),
])  # fmt: skip
def test_points_precede_modules_with_weights(layers, expected):
    model = dfa_from_bp(nn.Sequential(*layers))
    assert points(model) == [f"feedback_{i}" for i in expected]


def test_the_original_is_unchanged():
    bp = copy.deepcopy(NAMED)
    bp[0].weight.requires_grad_(False)
    before, modules = copy.deepcopy(bp.state_dict()), names(bp)
    model = dfa_from_bp(bp, example=torch.randn(4, 6))
    assert not model[0].weight.requires_grad
    for tensor in (*model.parameters(), model.mean):
        tensor.data.add_(1)
    assert names(bp) == modules
    torch.testing.assert_close(bp.state_dict(), before, rtol=0, atol=0)


def test_options_reach_the_dfa():
    options = {"normalization": False, "reduction": "sum", "training_method": "shallow"}
    options |= {"batch_dims": 2, "feedback_device": "cpu", "generator": torch.Generator()}
    dfa = dfa_from_bp(FC, **options)[-1]
    assert {name: getattr(dfa, name) for name in options} == options


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("behind", [(), (nn.Flatten(0),)])
@pytest.mark.parametrize(
    "last", [nn.LogSoftmax(1), nn.Softmax(1), nn.Softmax2d(), nn.Sigmoid(), nn.LogSigmoid()]
)
def test_a_network_that_ends_in_probabilities_is_refused(last, behind, is_nested):
    end = [nn.Sequential(last, *behind)] if is_nested else [last, *behind]
    with pytest.raises(
        ValueError, match=f"ends in {type(last).__name__}, but DFA needs the error at"
    ):
        dfa_from_bp(nn.Sequential(*FC, *end))


@pytest.mark.parametrize("model, error, message", [
    (linear(), TypeError, "needs points for a Linear, which is no plain Sequential"),
    (Residual(linear(), linear()), TypeError, "needs points for a Residual"),
    (nn.Sequential(nn.Flatten(), linear()), ValueError, "fewer than two modules with weights"),
    (nn.Sequential(*(2 * [linear(), nn.Softmax(1)])), ValueError, "ends in Softmax"),
    (dfa_from_bp(FC), ValueError, "has feedback points already"),
    (nn.Sequential(OrderedDict(dfa=linear(), last=linear())), ValueError, "attribute dfa"),
    (nn.Sequential(OrderedDict(feedback_last=linear(), last=linear())), ValueError,
     "feedback_last is the name"),
])  # fmt: skip
def test_refusals(model, error, message):
    with pytest.raises(error, match=message):
        dfa_from_bp(model)
