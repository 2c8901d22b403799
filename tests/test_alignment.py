"""The measured cosines against NumPy, and what measuring leaves as it was."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from dfatools import DFA, BottleneckLinear, DFALayer, dfa_from_bp, measure_alignment
from dfatools.alignment import probe


def fc(**options):
    torch.manual_seed(0)
    return dfa_from_bp(
        nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)),
        **options,
    ).double()


def batch(*shape, samples=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *(shape or (7,)), generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (samples,), generator=generator)


def cosine(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def expected_signals(model, x, y):
    """`{module name: (DFA signal, BP gradient)}` of an `fc` network, in NumPy."""
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in model.parameters())
    h1 = np.tanh(x.numpy() @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    p = np.exp(h2 @ w3.T + b3)
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[y.numpy()]) / len(y)
    matrix = model[-1].feedback_matrix.numpy()
    fed1, fed2 = (error @ matrix[:, :d] / math.sqrt(d * 4) for d in (6, 9))
    true2 = error @ w3
    true1 = (true2 * (1 - h2**2)) @ w2
    return {
        "0": (fed1 * (1 - h1**2), true1 * (1 - h1**2)),
        "1": (fed1, true1),
        "2": (fed2 * (1 - h2**2), true2 * (1 - h2**2)),
        "3": (fed2, true2),
        "4": (error, error),
    }


def snapshot(model):
    """All that measuring might disturb."""
    tensors = {**model.state_dict(), "random": torch.get_rng_state()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return (
        {name: tensor.clone() for name, tensor in tensors.items()},
        {name: (grad, None if grad is None else grad.clone()) for name, grad in grads.items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [m.training_method for m in model.modules() if isinstance(m, DFA)],
    )


def assert_undisturbed(model, before):
    now = snapshot(model)
    assert now[2:] == before[2:]
    assert now[0].keys() == before[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(now[0][name], tensor), name
    for name, (grad, value) in before[1].items():
        assert now[1][name][0] is grad
        assert grad is None or torch.equal(grad, value)


@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
def test_cosines_are_those_of_the_equations(method):
    model = fc(training_method=method)
    x, y = batch()
    got = measure_alignment(model, x, y, F.cross_entropy)
    expected = expected_signals(model, x, y)
    assert list(got) == list(expected)
    for name, (dfa, bp) in expected.items():
        assert got[name].dtype == torch.float64
        np.testing.assert_allclose(got[name], cosine(dfa, bp), rtol=0, atol=1e-10)
    assert (got["4"] == 1).all() and all(abs(got[name]).max() < 0.99 for name in "0123")


class Unregistered(nn.Module):
    """Runs the modules of a Sequential, of which the feedback points are in a plain list alone."""

    def __init__(self, model):
        super().__init__()
        self.order = list(model)
        self.kept = nn.ModuleList(m for m in model if not isinstance(m, DFALayer))

    def forward(self, x):
        for module in self.order:
            x = module(x)
        return x


def test_points_that_are_no_submodules_of_the_model_count():
    model = fc()
    x, y = batch()
    model(x)
    got = measure_alignment(Unregistered(model), x, y, F.cross_entropy)
    expected = expected_signals(model, x, y)
    assert list(got) == [f"kept.{name}" for name in expected]
    for name, (dfa, bp) in expected.items():
        np.testing.assert_allclose(got[f"kept.{name}"], cosine(dfa, bp), rtol=0, atol=1e-10)


class GraphNetwork(nn.Module):
    """Two graph convolutions; `unpack` says how the forward pass finds nodes and edges in x."""

    def __init__(self, unpack):
        super().__init__()
        self.unpack = unpack
        self.first, self.point, self.last = nn.Linear(7, 6), DFALayer(), nn.Linear(6, 4)
        self.dfa = DFA(self)

    def forward(self, x):
        nodes, edges = self.unpack(x)
        hidden = self.point(torch.tanh(edges @ self.first(nodes)))
        return self.dfa(edges @ self.last(hidden))


INPUTS = {
    "tuple": (lambda *both: both, lambda x: x),
    "dict": (lambda n, e: {"nodes": n, "edges": e}, lambda x: (x["nodes"], x["edges"])),
    "graph": (lambda n, e: SimpleNamespace(nodes=n, edges=e), lambda x: (x.nodes, x.edges)),
}


@pytest.mark.parametrize("pack, unpack", INPUTS.values(), ids=INPUTS)
def test_x_is_whatever_the_model_takes(pack, unpack):
    torch.manual_seed(0)
    model = GraphNetwork(unpack).double()
    nodes, y = batch()
    edges = torch.rand(8, 8, dtype=torch.float64)
    got = measure_alignment(model, pack(nodes, edges), y, F.cross_entropy)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    a = edges.numpy()
    h = np.tanh(a @ (nodes.numpy() @ w1.T + b1))
    p = np.exp(a @ (h @ w2.T + b2))
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[y.numpy()]) / 8
    fed = error @ model.dfa.feedback_matrix.numpy() / math.sqrt(6 * 4)
    true = a.T @ error @ w2
    dfa, bp = (a.T @ (signal * (1 - h**2)) for signal in (fed, true))
    assert list(got) == ["first", "last"]
    np.testing.assert_allclose(got["first"], cosine(dfa, bp), rtol=0, atol=1e-10)
    assert (got["last"] == 1).all()


def test_the_scale_does_not_matter():
    x, y = batch()
    plain, summed = (
        measure_alignment(fc(reduction=reduction, generator=torch.Generator()), x, y, loss)
        for reduction, loss in (
            ("mean", F.cross_entropy),
            ("sum", lambda output, y: F.cross_entropy(output, y, reduction="sum")),
        )
    )
    for name, cosines in plain.items():
        torch.testing.assert_close(summed[name], cosines, rtol=0, atol=1e-12)


def test_the_output_is_aligned_exactly_in_float32():
    model = fc().float()
    x, y = batch(samples=500)
    assert (measure_alignment(model, x.float(), y, F.cross_entropy)["4"] == 1).all()


def test_true_feedback_is_aligned_everywhere():
    torch.manual_seed(0)
    bp = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    model = dfa_from_bp(bp).double()
    nn.init.eye_(model.get_submodule("1").weight)  # so that one matrix is true to both points
    x, y = batch()
    model(x)
    model[-1].feedback_matrix.copy_(model.get_submodule("2").weight.detach())
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert list(cosines) == ["0", "1", "2"]
    for values in cosines.values():
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-10)


def test_a_module_that_changes_its_input_in_place():
    x, y = batch()
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        block = (nn.Linear(7, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.ReLU(inplace))
        model = dfa_from_bp(nn.Sequential(*block, nn.Linear(6, 4))).double()
        torch.manual_seed(0)
        results.append(measure_alignment(model, x, y, F.cross_entropy))
    assert results[0].keys() == results[1].keys()
    for name, cosines in results[0].items():
        assert torch.equal(cosines, results[1][name])
    assert not torch.equal(results[0]["0"], results[0]["1"])


def test_a_block_that_changes_a_fed_activation_in_place():
    x, y = batch()
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 6), DFALayer(), nn.ReLU(inplace), nn.Linear(6, 4))
        model.append(DFA(model)).double()
        torch.manual_seed(0)
        results.append(measure_alignment(model, x, y, F.cross_entropy))
    for name, cosines in results[0].items():
        assert torch.equal(cosines, results[1][name])
    assert abs(results[1]["0"]).max() < 0.999


class Residual(nn.Module):
    """Adds to an activation behind its feedback point, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.point, self.inplace = DFALayer(), inplace
        self.dfa = DFA(self)

    def forward(self, x):
        h = self.first(x)
        change = self.middle(torch.relu(self.point(h)))
        return self.dfa(self.last(h.add_(change) if self.inplace else h + change))


def test_an_activation_that_is_changed_in_place_behind_its_point():
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Residual(inplace).double()
        results.append(measure_alignment(model, *batch(), F.cross_entropy))
    assert list(results[0]) == list(results[1]) == ["first", "middle", "last"]
    for name, cosines in results[0].items():
        torch.testing.assert_close(results[1][name], cosines, rtol=0, atol=1e-12)
    # Nothing stands between the middle layer and the output's error but true gradients.
    torch.testing.assert_close(results[1]["middle"], torch.ones(8, dtype=torch.float64))


# What is measured is what training uses


class Recurrent(nn.Module):
    """A cell called twice, with a skip connection around the second call."""

    def __init__(self):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.point = DFALayer(recurrent=True)
        self.dfa = DFA(self)

    def forward(self, x):
        h = self.first(x)
        for _ in range(2):
            h = self.point(torch.tanh(self.cell(h)) + h)
        return self.dfa(self.head(h))


def cnn():
    return dfa_from_bp(nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4),
    ))  # fmt: skip


@pytest.mark.parametrize("build, shape", [(fc, (7,)), (cnn, (2, 4, 4)), (Recurrent, (7,))])
def test_signals_agree_with_the_gradients_of_training(build, shape):
    torch.manual_seed(0)
    model = build().double().eval()
    x, y = batch(*shape)
    names = {module: name for name, module in model.named_modules()}
    inputs, hooks = {}, []

    def note(module, args, output):
        inputs.setdefault(names[module], []).append(args[0])

    for module in names:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            hooks.append(module.register_forward_hook(note))
    F.cross_entropy(model(x), y).backward()
    for hook in hooks:
        hook.remove()
    _, probes = probe(model, x, y, F.cross_entropy)
    assert len(inputs) == 3 and inputs.keys() <= probes.keys()
    for name, sources in inputs.items():
        layer = model.get_submodule(name)
        signals = [p.dfa for p in probes[name]]
        for source, signal in zip(sources, signals, strict=True):
            assert len(signal) == len(source) == 8
        bias = sum(s.flatten(2).sum((0, 2)) if s.dim() > 2 else s.sum(0) for s in signals)
        torch.testing.assert_close(layer.bias.grad, bias, rtol=0, atol=1e-12)
        if isinstance(layer, nn.Linear):
            weight = sum(s.T @ i.detach() for s, i in zip(signals, sources))
            torch.testing.assert_close(layer.weight.grad, weight, rtol=0, atol=1e-12)


def test_signals_at_inputs():
    model = fc()
    x, y = batch()
    _, probes = probe(model, x, y, F.cross_entropy)
    expected = expected_signals(model, x, y)
    assert probes["0"][0].dfa_input is None
    # In front of a Linear stands a point; behind an activation, what the block sends back.
    for name, below in (("1", "0"), ("2", "1"), ("3", "2"), ("4", "3")):
        got = probes[name][0].dfa_input
        np.testing.assert_allclose(got, expected[below][0], rtol=0, atol=1e-12)


def test_the_calls_of_a_module_count_as_one_vector():
    torch.manual_seed(0)
    model = Recurrent().double()
    x, y = batch()
    got = measure_alignment(model, x, y, F.cross_entropy)
    calls = probe(model, x, y, F.cross_entropy)[1]["cell"]
    dfa, bp = (torch.cat([getattr(p, side) for p in calls], 1) for side in ("dfa", "bp"))
    assert len(calls) == 2 and list(got) == ["first", "cell", "head"]
    np.testing.assert_allclose(got["cell"], cosine(dfa.numpy(), bp.numpy()), rtol=0, atol=1e-12)


def test_a_side_that_vanishes_counts_as_zero():
    model = fc()
    x, y = batch()
    model(x)
    with torch.no_grad():
        model.get_submodule("4").weight.zero_()  # BP sends nothing below the last layer
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    for name in "0123":
        assert torch.equal(cosines[name], torch.zeros(8, dtype=torch.float64))
    assert (cosines["4"] == 1).all()
    model = fc()
    model(x)
    model[-1].feedback_matrix.zero_()
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert all((cosines[name] == 0).all() for name in "0123") and (cosines["4"] == 1).all()


# Nothing is disturbed


class Noisy(nn.Module):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
def test_the_model_is_as_before(no_grad, method):
    torch.manual_seed(0)
    model = dfa_from_bp(
        nn.Sequential(
            nn.Dropout(0.5), nn.Linear(7, 6), nn.Tanh(), nn.BatchNorm1d(6), Noisy(), nn.Linear(6, 4)
        ),
        example=batch()[0].float(),
        training_method=method,
    ).double()
    x, y = batch()
    model[-3].eval()  # modes differ
    F.cross_entropy(model(x), y).backward()
    model.get_submodule("5").bias.grad = None
    before = snapshot(model)
    with torch.set_grad_enabled(not no_grad):
        cosines = measure_alignment(model, x, y, F.cross_entropy)
        assert torch.is_grad_enabled() != no_grad
    assert_undisturbed(model, before)
    assert list(cosines) == ["1", "2", "3", "4", "5"]
    assert all(not values.requires_grad for values in cosines.values())


class Merging(nn.Linear):
    """Merges its update into the weight in eval mode, as LoRA does."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.update, self.merged = nn.Parameter(torch.randn(outputs, inputs)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.update.data if mode else self.update.data
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.update.T)


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_set_back_by_train(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), DFALayer(), Merging(6, 4))
    model.append(DFA(model)).double().train(mode)
    measure_alignment(model, *batch(), F.cross_entropy)
    assert model.training == model[3].training == mode != model[3].merged
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert (model[3].update.grad is not None) == mode


def test_the_model_is_as_before_when_the_loss_fails():
    model = fc()
    x, y = batch()
    model(x)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        measure_alignment(model, x, y, lambda output, y: 1 / 0)
    assert_undisturbed(model, before)


def test_a_feedback_matrix_drawn_here_is_drawn_once():
    x, y = batch()
    first, second = fc(), fc()
    torch.manual_seed(3)
    matrices = []
    for model in (first, second):
        measure_alignment(model, x, y, F.cross_entropy)
        matrices.append(model[-1].feedback_matrix)
    assert not torch.equal(*matrices)
    assert not torch.equal(torch.randn(4, 9, dtype=torch.float64), matrices[1])


def test_it_is_measured_in_inference_mode_too():
    model = fc()
    x, y = batch()
    expected = measure_alignment(model, x, y, F.cross_entropy)
    with torch.inference_mode():
        found = measure_alignment(model, x, y, F.cross_entropy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_a_bottleneck_s_generator_is_as_before():
    torch.manual_seed(0)
    bottleneck = BottleneckLinear(6, 9, 0.5)
    blocks = nn.Linear(7, 6), nn.Tanh(), bottleneck, nn.Tanh(), DFALayer(), nn.Linear(9, 4)
    model = nn.Sequential(*blocks)
    model.append(DFA(model)).double()
    bottleneck.input_generator = generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    measure_alignment(model, *batch(), F.cross_entropy)
    assert torch.equal(generator.get_state(), before) and bottleneck.thinning


def test_dropout_and_batchnorm_are_in_eval_mode():
    torch.manual_seed(0)
    model = cnn().double()
    x, y = batch(2, 4, 4)
    model(x)  # so that the running statistics are not the initial ones
    in_train = measure_alignment(model, x, y, F.cross_entropy)
    in_eval = measure_alignment(model.eval(), x, y, F.cross_entropy)
    one = measure_alignment(model, x[:1], y[:1], F.cross_entropy)
    for name, cosines in in_train.items():
        assert torch.equal(cosines, in_eval[name])
        torch.testing.assert_close(cosines[:1], one[name], rtol=0, atol=1e-10)


def test_frozen_layers_and_inputs_that_ask_for_gradients():
    model = fc()
    x, y = batch()
    whole = measure_alignment(model, x, y, F.cross_entropy)
    model[0].requires_grad_(False)
    part = measure_alignment(model, x, y, F.cross_entropy)
    assert list(part) == ["2", "3", "4"]  # no gradient reaches the first block
    model[0].requires_grad_(True)
    asking = measure_alignment(model, x.requires_grad_(), y, F.cross_entropy)
    assert x.grad is None
    for cosines in (part, asking):
        for name in cosines:
            torch.testing.assert_close(cosines[name], whole[name], rtol=0, atol=1e-12)


def test_a_network_of_which_only_the_head_learns():
    model = fc().requires_grad_(False)
    model[-2].requires_grad_(True)
    measured = measure_alignment(model, *batch(), F.cross_entropy)
    assert list(measured) == ["4"]
    assert torch.equal(measured["4"], torch.ones(8, dtype=torch.float64))


class Positions(nn.Module):
    """Adds something learned that is not of any sample."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 6)

    def forward(self, x):
        return x + self.table(torch.arange(3)).sum(0)


@pytest.mark.parametrize("samples", [8, 6])  # 6 is a size of the weight, too
def test_outputs_that_are_not_of_samples_are_left_out(samples):
    torch.manual_seed(0)
    positions, first = Positions(), weight_norm(nn.Linear(7, 6))
    model = dfa_from_bp(nn.Sequential(first, positions, nn.Tanh(), nn.Linear(6, 4))).double()
    x, y = batch(samples=samples)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert list(cosines) == ["0", "2", "3"]  # nor is the weight of the first layer one
    assert all(len(values) == samples for values in cosines.values())
    assert (cosines["3"] == 1).all()


def test_an_output_of_one_number_per_sample():
    model = dfa_from_bp(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)))
    x, _ = batch()
    cosines = measure_alignment(model.double(), x, torch.zeros(8, dtype=x.dtype), F.mse_loss)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    h = np.tanh(x.numpy() @ w1.T + b1)
    error = h @ w2.T + b2
    fed, true = error @ model[-1].feedback(0).numpy(), error @ w2
    np.testing.assert_allclose(cosines["1"], cosine(fed, true), rtol=0, atol=1e-12)
    assert (cosines["3"] == 1).all()


class Discarding(nn.Module):
    """Calls a feedback point on what does not come to the output."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.side, self.point = inner, nn.Linear(7, 3), DFALayer()
        inner[-1].layers += (self.point,)
        self.point.__dict__["_dfa"], self.point._index = inner[-1], 2

    def forward(self, x):
        self.point(self.side(x))
        return self.inner(x)


def test_a_branch_that_is_discarded_is_left_out():
    x, y = batch()
    model = Discarding(fc()).double()
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    expected = measure_alignment(model.inner, x, y, F.cross_entropy)
    assert list(cosines) == [f"inner.{name}" for name in expected]
    for name, values in expected.items():
        torch.testing.assert_close(cosines[f"inner.{name}"], values, rtol=0, atol=1e-12)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = fc()

    def forward(self, x):
        return self.inner(x) + self.inner(2 * x)


def test_a_loss_of_something_else_is_refused():
    model = fc()
    with pytest.raises(RuntimeError, match="the loss does not depend on the output of the DFA"):
        measure_alignment(model, *batch(), lambda output, y: model[0].weight.sum())


def test_a_dfa_called_twice_is_refused():
    with pytest.raises(ValueError, match="must call its DFA once, not 2 times"):
        measure_alignment(Twice(), *batch(), F.cross_entropy)


def test_a_compiled_model_is_refused():
    torch.compiler.reset()
    compiled = torch.compile(fc(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="of a compiled model, take the original"):
        measure_alignment(compiled, *batch(), F.cross_entropy)


@pytest.mark.parametrize("model, number", [
    (nn.Sequential(nn.Linear(7, 4)), 0),
    (nn.Sequential(nn.Linear(7, 4), DFA(DFALayer()), DFA(DFALayer())), 2),
])  # fmt: skip
def test_errors(model, number):
    with pytest.raises(ValueError, match=f"must hold one DFA, at its output; it holds {number}"):
        measure_alignment(model, *batch(), F.cross_entropy)
