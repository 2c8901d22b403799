"""dfa_from_bp(model, points) makes any module a DFA network, by forward hooks on its submodules."""

import copy
import io
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from formulas import (
    Residual,
    assert_close,
    assert_same,
    batch,
    copy_gradients,
    expected_gradients,
    fc,
    gradients,
)
from test_alignment import cosines_in_numpy
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp, measure_alignment, prealign

X, Y = batch(samples=8)
POINTS = ["first", "body.second"]


@dataclass
class Outputs:
    """Output of a network, a dataclass as in `transformers`."""

    loss: torch.Tensor | None
    logits: torch.Tensor | None


@dataclass
class Computed:
    """Dataclass with a field that `__init__` does not accept."""

    hidden: torch.Tensor
    samples: int = field(init=False)

    def __post_init__(self):
        self.samples = len(self.hidden)


class Second(nn.Linear):
    """Block that returns its activation inside another object, made by `wrap`."""

    def __init__(self, wrap):
        super().__init__(6, 9)
        self.wrap = wrap

    def forward(self, h):
        return self.wrap(torch.tanh(super().forward(h)))


class Net(nn.Module):
    """Network of three layers, which computes a loss if it gets targets.

    Args:
        wrap, unwrap: turn the second block's activation into its output, and back.
        respond: turns the loss (None without targets) and the logits into the network's output.
    """

    def __init__(self, wrap=lambda h: h, unwrap=lambda output: output, respond=lambda loss, z: z):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        self.body = nn.ModuleDict({"second": Second(wrap)})
        self.head = nn.Linear(9, 4)
        self.unwrap, self.respond = unwrap, respond

    def forward(self, x, y=None):
        h = self.unwrap(self.body["second"](self.first(x)))
        logits = self.head(h)
        return self.respond(None if y is None else F.cross_entropy(logits, y), logits)


def net(*args, points=POINTS, output=None, **options):
    """Builds a float64 DFA network with a feedback matrix; returns it and its BP original."""
    torch.manual_seed(0)
    bp = Net(*args).double()
    return dfa_from_bp(bp, points, X, output, **options), bp


def wanted(model):
    """Computes the gradients of a `Net` in NumPy, with e B_i at the hidden activations."""
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in model.parameters())
    h1 = np.tanh(X.numpy() @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    p = np.exp(h2 @ w3.T + b3)
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[Y]) / len(Y)
    matrix = model.dfa.feedback_matrix.numpy()
    assert matrix.shape == (4, 9)
    found = []
    for below, h in ((X.numpy(), h1), (h1, h2)):
        size = h.shape[1]
        delta = error @ matrix[:, :size] / np.sqrt(4 * size) * (1 - h**2)
        found += [delta.T @ below, delta.sum(0)]
    return [torch.from_numpy(g) for g in (*found, error.T @ h2, error.sum(0))]


def assert_trained(model, logits=lambda output: output):
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(logits(model(X)), Y).backward()
        assert_close(copy_gradients(model), wanted(model))


def first(output):
    return output[0]


Pair = namedtuple("Pair", "note hidden")
WRAPPED = {
    "tensor": (lambda h: h, lambda output: output),
    "tuple": (lambda h: (h, "more"), first),
    "list": (lambda h: [None, h], lambda output: output[1]),
    "nested": (lambda h: ((3, (h, h.detach())), h.detach()), lambda output: output[0][1][0]),
    "integers first": (lambda h: (torch.arange(3), h), lambda output: output[1]),
    "namedtuple": (lambda h: Pair("more", h), lambda output: output.hidden),
    "dict": (lambda h: {"note": 1, "hidden": h}, lambda output: output["hidden"]),
    "ordered": (lambda h: OrderedDict(hidden=h, rest=0), lambda output: output["hidden"]),
    "dataclass": (lambda h: Outputs(None, h), lambda output: output.logits),
    "computed": (lambda h: Computed(h), lambda output: output.hidden),
}


@pytest.mark.parametrize("wrap, unwrap", WRAPPED.values(), ids=WRAPPED)
def test_a_point_detaches_the_first_tensor_of_an_output(wrap, unwrap):
    model, _ = net(wrap, unwrap)
    assert_trained(model)
    output = model.body["second"](torch.zeros(2, 6).double())
    assert type(output) is type(wrap(X))


@pytest.mark.parametrize("wrap, unwrap", WRAPPED.values(), ids=WRAPPED)
def test_the_dfa_joins_the_first_tensor_of_the_output(wrap, unwrap):
    def respond(loss, logits):
        return wrap(logits)

    assert_trained(net(lambda h: h, lambda h: h, respond)[0], unwrap)


def test_the_dfa_follows_the_submodule_named_by_output():
    model, _ = net(lambda h: h, lambda h: h, Outputs, output="head")
    assert_trained(model, lambda output: output.logits)
    model.zero_grad()
    model(X, Y).loss.backward()
    assert_close(copy_gradients(model), wanted(model))


def test_without_a_named_output_the_dfa_joins_the_first_tensor():
    """The first tensor is the loss here. It has no batch dimension, so the DFA refuses it."""
    model, _ = net(lambda h: h, lambda h: h, Outputs)
    with pytest.raises(ValueError, match=r"do not share the first 1 .* with the output, \(\)"):
        model(X, Y)


def test_the_result_keeps_names_and_values_and_the_original_is_unchanged():
    bp = Net().double()
    hooks, before = [len(m._forward_hooks) for m in bp.modules()], copy.deepcopy(bp.state_dict())
    model = dfa_from_bp(bp, POINTS, example=X)
    assert type(model) is Net and torch.equal(model(X), bp(X))
    assert [name for name, _ in bp.named_modules()] == [
        name for name, _ in model.named_modules() if name.partition(".")[0] != "dfa"
    ]
    assert [*model.state_dict()] == [*before, "dfa.feedback_matrix"]
    model.load_state_dict(before)
    F.cross_entropy(model(X), Y).backward()
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert [len(m._forward_hooks) for m in bp.modules()] == hooks
    assert all(parameter.grad is None for parameter in bp.parameters())
    torch.testing.assert_close(bp.state_dict(), before, rtol=0, atol=0)


def test_training_methods():
    model, bp = net()
    true = gradients(bp, (X, Y))
    for method, expected in (("bp", true), ("shallow", [None] * 4 + true[4:])):
        model.dfa.training_method = method
        assert_same(gradients(model, (X, Y)), expected)


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Plain(nn.Module):
    """Network without lambdas, so that pickle accepts it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        self.body = nn.ModuleDict({"second": nn.Sequential(nn.Linear(6, 9), nn.Tanh())})
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.body["second"](self.first(x)))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_whole]
)
def test_copies_are_independent(duplicate):
    model = dfa_from_bp(Plain().double(), POINTS, example=X)
    other = duplicate(model)
    for tensor in (*model.parameters(), model.dfa.feedback_matrix):
        tensor.data.zero_()
    assert_trained(other)


def test_a_moving_average():
    model, _ = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert_trained(average.module)


def test_a_second_dfa_takes_over_the_points():
    model, _ = net()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        model.dfa = DFA(model, generator=generator)
        assert_trained(model)
        generator.manual_seed(seed)
        expected = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        assert torch.equal(model.dfa.feedback_matrix, expected)


@pytest.mark.parametrize("output, wrap, unwrap", [
    (None, *WRAPPED["tensor"]), ("head", *WRAPPED["tuple"]), ("head", *WRAPPED["dataclass"]),
])  # fmt: skip
def test_a_compiled_network(output, wrap, unwrap):
    torch.compiler.reset()
    model, _ = net(wrap, unwrap, output=output)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = gradients(model, (X, Y), run=run)
        assert_close(got, wanted(model))


def test_options():
    """Options reach the points and the DFA, and the same `points` serve for a second network."""
    points = {"0": DFALayer(shared_dims=(1,)), "2": DFALayer(recurrent=True)}
    bp = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 4)).double()
    for _ in range(2):
        model = dfa_from_bp(bp, points, batch_dims=1, reduction="sum", normalization=False)
        found = [(point.shared_dims, point.recurrent) for point in model.dfa.layers]
        assert found == [((1,), False), ((), True)]
        x, y = batch(3, 7)
        loss = lambda output, y: F.cross_entropy(output.mean(1), y)  # noqa: E731
        got = gradients(model, (x, y), loss=loss)
        assert_close(got, expected_gradients(model, (x, y), loss=loss))
    model(x)


def test_a_sequential_accepts_points_by_name():
    model = fc(example=X.float())
    plain = nn.Sequential(*(module for name, module in model.named_children() if name.isdigit()))
    hooked = dfa_from_bp(plain, ["1", "3"], example=X)
    assert [name for name, _ in hooked.named_children()] == ["0", "1", "2", "3", "4", "dfa"]
    hooked.dfa.feedback_matrix = model.dfa.feedback_matrix
    assert_same(gradients(hooked, (X, Y)), gradients(model, (X, Y)))


def test_alignment_and_prealignment():
    """Points in hooks give the same cosines and weights as points in the Sequential."""
    model = fc(example=X.float())
    plain = nn.Sequential(*(module for name, module in model.named_children() if name.isdigit()))
    hooked = dfa_from_bp(plain, ["1", "3"], example=X)
    hooked.dfa.feedback_matrix = model.dfa.feedback_matrix
    got = measure_alignment(hooked, X, Y, F.cross_entropy)
    for name, cosines in cosines_in_numpy(model, X, Y).items():
        torch.testing.assert_close(got[name], cosines, rtol=0, atol=1e-10)
    prealign(model, X, Y, F.cross_entropy)
    prealign(hooked, X, Y, F.cross_entropy)
    assert_close([*hooked.parameters()], [*model.parameters()])


@pytest.mark.parametrize("name, message", [
    ("last", "'last': in the model there are first, body, head"),
    ("body.third", "'body.third': in body there are second"),
    ("head.0", "'head.0': in head there are none"),
    ("first.0.weight", "'first.0.weight': in first.0 there are none"),
    ("", "'': in the model there are first"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["points", "output"])
def test_a_wrong_name_is_refused_with_a_list_of_valid_names(name, message, place):
    names = {"points": POINTS, "output": "head"}
    names[place] = ["first", name] if place == "points" else name
    with pytest.raises(ValueError, match=f"no submodule {message}"):
        dfa_from_bp(Net(), **names)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.dfa = nn.Linear(7, 4)


class Alias(Net):
    def __init__(self):
        super().__init__()
        self.alias = self.first


class Attribute(Net):
    dfa = "a word"


@pytest.mark.parametrize("model, arguments, error, message", [
    (Net(), ("first",), TypeError, "a list of names, not the string 'first'"),
    (Net(), ([0],), TypeError, "names of submodules, not a int"),
    (Net(), ([],), ValueError, "points is empty"),
    (Alias(), (["first", "alias"],), ValueError, "alias is a second name of one submodule"),
    (Net(), ({"first": (1,)},), TypeError, "must be a DFALayer with options, not a tuple"),
    (Named(), (["dfa"],), ValueError, "an attribute dfa"),
    (Attribute(), (["first"],), ValueError, "an attribute dfa"),
    (Residual(nn.Linear(7, 7)), (["0"],), TypeError, "a Sequential would run the"),
    (nn.Sequential(nn.Linear(7, 7)), (["0"], X, "0"), TypeError, "a Sequential would run the"),
    (nn.Sequential(nn.Linear(7, 7), nn.Softmax(1)), (["0"],), ValueError, "ends in Softmax"),
    (nn.ModuleDict({"a": nn.Sigmoid()}), (["a"], X, "a"), ValueError, "ends in Sigmoid"),
    (net()[0], (POINTS,), ValueError, "has feedback points already"),
    (net()[0].first, (["1"],), ValueError, "has feedback points already"),
])  # fmt: skip
def test_refusals(model, arguments, error, message):
    before = len(model._modules)
    with pytest.raises(error, match=message):
        dfa_from_bp(model, *arguments)
    assert len(model._modules) == before


@pytest.mark.parametrize("points, kind", [(POINTS, "Second"), (["first"], "Net")])
@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True`` raised")
def test_an_output_without_a_tensor_is_refused(points, kind):
    model = dfa_from_bp(Net(lambda h: 3, lambda h: torch.ones(8, 9), lambda _, z: "text"), points)
    with pytest.raises(TypeError, match=f"a {kind} returns a (int|str) without a floating-point"):
        model(X.float())


class Reading(Plain):
    """Calls `read` if `skips` is None, uses only its weight if False, and skips it if True."""

    def __init__(self):
        super().__init__()
        self.read, self.skips = nn.Linear(6, 6), False

    def forward(self, x):
        h = self.first(x)
        if self.skips is None:
            h = self.read(h)
        elif not self.skips:
            h = F.linear(h, self.read.weight)
        return self.head(self.body["second"](h))


def test_a_named_submodule_without_a_call_in_the_first_pass_is_refused():
    model = dfa_from_bp(Reading().double(), [*POINTS, "read"])
    with pytest.raises(RuntimeError, match="read has a feedback point, but was not called"):
        model(X)
    assert model.dfa.feedback_matrix.numel() == 0


def test_later_passes_may_skip_a_point_that_the_example_called():
    """Stochastic depth, for example, skips blocks at random."""
    bp = Reading().double()
    bp.skips = None
    model = dfa_from_bp(bp, [*POINTS, "read"], X)
    model.skips = True
    got = gradients(model, (X, Y))
    assert model.read.weight.grad is None
    assert_close(got[:6], expected_gradients(model, (X, Y))[:6])


def test_a_point_called_only_after_the_output_layer_is_refused():
    class Auxiliary(Plain):
        def forward(self, x):
            return super().forward(x), self.body["second"](x[:, :6])

    model = dfa_from_bp(Auxiliary().double(), ["first", "body.second"], output="head")
    model(X)  # calls `second` both before and after the DFA

    class Behind(Auxiliary):
        def forward(self, x):
            output = self.head(F.pad(self.first(x), (0, 3)))
            return output, self.body["second"](x[:, :6])

    with pytest.raises(RuntimeError, match="body.second has a feedback point, but was not"):
        dfa_from_bp(Behind().double(), POINTS, output="head")(X)


@pytest.mark.parametrize("output", [None, "head"])
def test_a_point_behind_the_output_layer_is_refused(output):
    model = dfa_from_bp(Plain().double(), [*POINTS, "head"], output=output)
    with pytest.raises(RuntimeError, match="after the output layer, .*remove that point"):
        model(X)


class Finished(Plain):
    """Network with two heads; `finish` computes the first output from the scores of `head`."""

    def __init__(self, finish):
        super().__init__()
        self.other, self.finish = nn.Linear(9, 4), finish

    def forward(self, x):
        h = self.body["second"](self.first(x))
        scores = self.head(h)
        return self.finish(scores), self.other(h)


@pytest.mark.parametrize("points", [["first", "head"], ["first", "head", "other"]])
@pytest.mark.parametrize("finish", [nn.Identity(), nn.LogSoftmax(1)])
def test_a_point_behind_the_output_layer_is_refused_whatever_follows_it(points, finish):
    with pytest.raises(RuntimeError, match="a feedback point comes after the output layer"):
        dfa_from_bp(Finished(finish).double(), points)(X)


def test_hidden_layers_learn_before_a_frozen_output_layer():
    model = dfa_from_bp(Plain().double(), POINTS)
    model.head.requires_grad_(False)
    got = gradients(model, (X, Y))
    assert_close(got[:4], wanted(model)[:4])
    assert got[4:] == [None, None]


def test_a_copied_part_of_a_network_is_refused():
    model, _ = net()
    model.first = copy.deepcopy(model.first)
    with pytest.raises(RuntimeError, match="belongs to another DFA: make a new DFA.network."):
        model(X)
    model.dfa = DFA(model)
    assert_trained(model)


def test_several_calls_of_a_submodule_are_refused_unless_its_point_is_recurrent():
    class Twice(Plain):
        def forward(self, x):
            return super().forward(x) + super().forward(2 * x)

    with pytest.raises(RuntimeError, match="point 0 was called 2 times"):
        dfa_from_bp(Twice().double(), POINTS)(X)
    points = {name: DFALayer(recurrent=True) for name in POINTS}
    model = dfa_from_bp(Twice().double(), points)
    assert_close(gradients(model, (X, Y)), expected_gradients(model, (X, Y)))
