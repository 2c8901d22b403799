"""DFA reproduces a training of TinyDFA, and refuses TinyDFA's attributes with a remedy."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer


class Net(nn.Module):
    """Classifies tokens, (N, T, 7) to (N, T, 4), or whole sequences if `shared`, to (N, 4)."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 12), nn.Linear(12, 9), nn.Linear(9, 4)
        self.shared = shared
        self.point1 = DFALayer(shared_dims=(1,) if shared else ())
        self.point2 = DFALayer()
        self.dfa = DFA(self, normalization=False, batch_dims=1 if shared else 2)

    def forward(self, x):
        return self.dfa(self.run(x, self.point1, self.point2))

    def run(self, x, point1, point2):
        h = point1(torch.tanh(self.first(x)))
        h = torch.tanh(self.second(h))
        return self.last(point2(h.mean(1) if self.shared else h))


def loss(output, y):
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def tinydfa_gradients(model, x, y, uniform):
    """Computes gradients by TinyDFA's rule, with plain autograd.

    TinyDFA multiplies the error by `uniform`, (output size, largest feedback size), with entries
    from [-1, 1), and divides by the root of the largest size. A layer gets the first columns of
    the product. If R positions share a row of the error, their signal is divided by sqrt(R).
    """
    kept = []

    def point(hidden):
        kept.append(hidden)
        return hidden.detach().requires_grad_()

    output = model.run(x, point, point)
    (error,) = torch.autograd.grad(loss(output, y), output, retain_graph=True)
    signals = []
    for hidden in kept:
        projected = error @ uniform[:, : hidden.shape[-1]] / math.sqrt(uniform.shape[1])
        positions = hidden.shape[1] if hidden.dim() > error.dim() else 1
        signal = projected[:, None] if hidden.dim() > error.dim() else projected
        signals.append(signal.expand(hidden.shape) / math.sqrt(positions))
    return torch.autograd.grad([output, *kept], [*model.parameters()], [error, *signals])


@pytest.mark.parametrize("shared", [False, True])
def test_a_training_of_tinydfa_is_reproduced(shared):
    torch.manual_seed(0)
    uniform = torch.rand(4, 12, dtype=torch.float64) * 2 - 1
    x, y = torch.randn(16, 5, 7, dtype=torch.float64), torch.randint(4, (16, 5))
    y = y[:, 0] if shared else y
    ours, theirs = Net(shared).double(), Net(shared).double()
    theirs.load_state_dict(ours.state_dict())
    ours.dfa.feedback_matrix = uniform / math.sqrt(12)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, theirs)
    ]
    start = [parameter.clone() for parameter in ours.parameters()]
    for _ in range(50):
        ours.zero_grad()
        loss(ours(x), y).backward()
        gradients = tinydfa_gradients(theirs, x, y, uniform)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for before, a, b in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert (a - before).abs().max() > 0.01


@pytest.mark.parametrize("name, value, remedy", [
    ("no_training", True, 'training_method = "shallow"'),
    ("rp_device", "cpu", "give feedback_device to DFA"),
])  # fmt: skip
def test_an_attribute_of_tinydfa_is_refused(name, value, remedy):
    dfa = DFA(DFALayer())
    with pytest.raises(AttributeError, match=f"DFA has no attribute {name}: .*{remedy}"):
        setattr(dfa, name, value)
    assert not hasattr(dfa, name)
    with pytest.raises(TypeError, match=name):
        DFA(DFALayer(), **{name: value})


@pytest.mark.parametrize("name, value, remedy", [
    ("batch_dims", (0, 1), "give batch_dims to the DFA"),
    ("passthrough", True, 'training_method = "bp"'),
])  # fmt: skip
def test_a_point_attribute_of_tinydfa_is_refused(name, value, remedy):
    with pytest.raises(AttributeError, match=f"DFALayer has no attribute {name}: .*{remedy}"):
        setattr(DFALayer(), name, value)
    assert not hasattr(DFALayer(), name)
    with pytest.raises(TypeError, match=name):
        DFALayer(**{name: value})


def test_a_list_of_points_instead_of_the_network_is_refused():
    with pytest.raises(TypeError, match="DFA takes the network with the DFALayers, not a list"):
        DFA([DFALayer()])
