"""DFA's gradients against the paper's equations in NumPy, and what surrounds them."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer

WIDTHS = (7, 6, 9, 5, 4)


def fc(widths=WIDTHS, seed=0, dtype=torch.float64, **options):
    """Linear, Tanh, DFALayer, ..., Linear, DFA."""
    torch.manual_seed(seed)
    modules = []
    for a, b in zip(widths[:-2], widths[1:]):
        modules += [nn.Linear(a, b), nn.Tanh(), DFALayer()]
    return with_dfa(*modules, nn.Linear(*widths[-2:]), **options).to(dtype)


def with_dfa(*modules, **options):
    model = nn.Sequential(*modules)
    return model.append(DFA(model, **options))


def plain(model):
    """The same modules, for backpropagation, with gradients of their own."""
    modules = [m for m in copy.deepcopy(model) if not isinstance(m, (DFALayer, DFA))]
    return nn.Sequential(*modules)


def batch(samples=8, features=WIDTHS[0], classes=WIDTHS[-1], dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (samples,), generator=generator)


def gradients(model, x, y):
    """Of each parameter, after one backward pass from the mean cross-entropy."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(left, right):
    """Bit for bit."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert (a is None and b is None) or torch.equal(a, b)


def assert_close(left, right, tolerance=1e-10):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# The equations, in NumPy


def softmax_error(output, y):
    """dL/dy of the mean cross-entropy."""
    p = np.exp(output - output.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p / len(y)


def scaled(matrix, size, normalization=True):
    """B_i, from the shared matrix."""
    return matrix[:, :size] / (math.sqrt(size * len(matrix)) if normalization else 1)


def arrays(model):
    """The parameters, without the graph."""
    return [p.detach().numpy() for p in model.parameters()]


def expected_gradients(model, x, y, normalization=True, reduction="mean"):
    """Of an `fc` network: dW_i = ((e B_i) * tanh')^T h_(i-1), the last layer's true."""
    x, y = x.numpy(), y.numpy()
    weights = arrays(model)
    hidden = [x]
    for w, b in zip(weights[:-2:2], weights[1:-2:2]):
        hidden.append(np.tanh(hidden[-1] @ w.T + b))
    error = softmax_error(hidden[-1] @ weights[-2].T + weights[-1], y)
    sent = error * len(y) if reduction == "sum" else error
    matrix = model[-1].feedback_matrix.numpy()
    result = []
    for below, h in zip(hidden, hidden[1:]):
        delta = (sent @ scaled(matrix, h.shape[1], normalization)) * (1 - h**2)
        result += [delta.T @ below, delta.sum(0)]
    return result + [error.T @ hidden[-1], error.sum(0)]


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_the_equations(normalization, reduction):
    model = fc(normalization=normalization, reduction=reduction)
    x, y = batch()
    got = gradients(model, x, y)
    assert_close(got, expected_gradients(model, x, y, normalization, reduction))


def test_gradients_do_not_depend_on_the_mode():
    model = fc().eval()
    x, y = batch()
    assert_close(gradients(model, x, y), expected_gradients(model, x, y))


def test_true_feedback_gives_true_gradients():
    model = fc((7, 6, 4), normalization=False)
    x, y = batch()
    gradients(model, x, y)  # draws the matrix
    model[-1].feedback_matrix.copy_(model[3].weight.detach())
    assert_close(gradients(model, x, y), gradients(plain(model), x, y), 1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_a_convolutional_network(reduction):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Flatten()),
        nn.Sequential(nn.Linear(20, 6), nn.Tanh()),
    ]
    pairs = [module for block in blocks for module in (block, DFALayer())]
    model = with_dfa(*pairs, nn.Linear(6, 4), reduction=reduction).double()
    x, y = torch.randn(7, 2, 8, 8, dtype=torch.float64), torch.arange(7) % 4
    got = gradients(model, x, y)
    matrix = model[-1].feedback_matrix
    assert matrix.shape == (4, 48)  # the largest of 3x4x4, 20 and 6

    model.zero_grad()
    hidden = [x]
    for block in blocks:
        hidden.append(block(hidden[-1].detach()))
    output = model[-2](hidden[-1].detach())
    error = torch.from_numpy(softmax_error(output.detach().numpy(), y.numpy()))
    sent = error * 7 if reduction == "sum" else error
    signals = [(sent @ scaled(matrix, h[0].numel())).view_as(h) for h in hidden[1:]]
    torch.autograd.backward([*hidden[1:], output], [*signals, error])
    assert_close(got, [p.grad for p in model.parameters()])


@pytest.mark.parametrize(
    "shape, format",
    [
        ((4, 3, 5, 6), torch.contiguous_format),
        ((4, 3, 5, 6), torch.channels_last),
        ((4, 3, 2, 5, 6), torch.channels_last_3d),
    ],
    ids=["contiguous", "channels-last", "channels-last-3d"],
)
def test_the_signal_lies_in_memory_as_the_activation_does(shape, format):
    point = DFALayer()
    dfa = DFA(point)
    hidden = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=format)
    hidden = hidden.requires_grad_().tanh()
    signals = []
    hidden.register_hook(signals.append)
    with dfa.one_pass():
        output = dfa(point(hidden).flatten(1)[:, :2])
    output.square().sum().backward()
    (signal,) = signals
    assert signal.stride() == hidden.stride()
    expected = 2 * hidden.detach().flatten(1)[:, :2] @ dfa.feedback(0)
    torch.testing.assert_close(signal, expected.view(shape), rtol=0, atol=1e-12)


def test_tokens_are_samples_with_two_batch_dimensions():
    x, y = batch(12)
    for reduction in ("mean", "sum"):
        model = fc(batch_dims=2, reduction=reduction)
        output = model(x.view(3, 4, -1))
        assert output.shape == (3, 4, WIDTHS[-1])
        F.cross_entropy(output.flatten(0, 1), y).backward()
        expected = expected_gradients(model, x, y, reduction=reduction)
        assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_dims, shape", [(1, (12,)), (2, (3, 4))])
def test_an_output_without_features_is_one_number_per_sample(batch_dims, shape, reduction):
    """As of a regression that squeezes."""
    torch.manual_seed(0)
    point = DFALayer()
    first, last = nn.Linear(7, 5).double(), nn.Linear(5, 1).double()
    dfa = DFA(point, batch_dims=batch_dims, reduction=reduction)
    x, _ = batch(12)
    with dfa.one_pass():
        output = dfa(last(point(torch.tanh(first(x.view(*shape, 7))))).squeeze(-1))
    assert output.shape == shape
    output.square().mean().backward()
    h = np.tanh(x.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy())
    error = 2 * output.detach().numpy().reshape(12, 1) / 12
    signal = error @ scaled(dfa.feedback_matrix.numpy(), 5) * (12 if reduction == "sum" else 1)
    delta = signal * (1 - h**2)
    assert_close([first.weight.grad, first.bias.grad], [delta.T @ x.numpy(), delta.sum(0)])
    assert_close([last.weight.grad, last.bias.grad], [error.T @ h, error.sum(0)])


def test_half_batches_accumulate_to_the_whole():
    x, y = batch(8)
    model = fc()
    whole = gradients(model, x, y)
    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
    assert_close([p.grad for p in model.parameters()], whole, 1e-14)


# Training methods


def test_the_output_is_that_of_the_plain_network():
    model = fc(dtype=torch.float32)
    x, _ = batch(dtype=torch.float32)
    for method in ("dfa", "bp", "shallow"):
        model[-1].training_method = method
        assert torch.equal(model(x), plain(model)(x))


def test_bp_is_plain_pytorch_bit_for_bit():
    model = fc(dtype=torch.float32, training_method="bp")
    reference = plain(model)
    x, y = batch(dtype=torch.float32)
    assert torch.equal(F.cross_entropy(model(x), y), F.cross_entropy(reference(x), y))
    assert_same(gradients(model, x, y), gradients(reference, x, y))


def test_shallow_trains_what_follows_the_last_point():
    model = fc(dtype=torch.float32, training_method="shallow")
    x, y = batch(dtype=torch.float32)
    true = gradients(plain(model), x, y)
    assert_same(gradients(model, x, y), [None] * 6 + true[6:])


def test_methods_change_on_the_same_weights():
    model = fc(dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    seen = {}
    for method in ("dfa", "bp", "shallow", "dfa", "shallow", "bp", "dfa"):
        model[-1].training_method = method
        got = gradients(model, x, y)
        assert_same(got, seen.setdefault(method, got))
    assert not torch.equal(seen["dfa"][0], seen["bp"][0]) and seen["shallow"][0] is None


# The feedback matrix


def test_feedback_has_the_stated_deviation():
    model = fc((3, 800, 300, 50))
    model(torch.randn(2, 3, dtype=torch.float64))
    dfa = model[-1]
    assert dfa.feedback_matrix.shape == (50, 800)
    for i, size in enumerate((800, 300)):
        matrix = dfa.feedback(i)
        assert matrix.shape == (50, size)
        deviation = 1 / math.sqrt(size * 50)
        assert abs(matrix.std() / deviation - 1) < 0.03 and abs(matrix.mean() / deviation) < 0.05
        expected = dfa.feedback_matrix[:, :size] * deviation
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=0)
    assert torch.equal(dfa.feedback(-1), dfa.feedback(1))
    with pytest.raises(IndexError):
        dfa.feedback(2)


def test_raw_feedback_is_a_slice_of_the_matrix():
    model = fc(normalization=False)
    model(batch()[0])
    for i, size in enumerate(WIDTHS[1:-1]):
        assert torch.equal(model[-1].feedback(i), model[-1].feedback_matrix[:, :size])


def test_feedback_is_no_parameter_and_stays_as_it_is():
    model = fc()
    x, y = batch()
    gradients(model, x, y)
    before = model[-1].feedback_matrix.clone()
    gradients(model, *batch(5))
    assert torch.equal(model[-1].feedback_matrix, before)
    assert len(list(model.parameters())) == 8


def test_a_generator_draws_the_matrix():
    x, _ = batch()
    for seed in (3, 4):
        model = fc(generator=torch.Generator().manual_seed(seed))
        state = torch.get_rng_state()
        model(x)
        assert torch.equal(torch.get_rng_state(), state)
        expected = torch.randn(
            4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert torch.equal(model[-1].feedback_matrix, expected)


def test_the_default_generator_draws_the_matrix():
    model = fc()
    torch.manual_seed(5)
    model(batch()[0])
    torch.manual_seed(5)
    assert torch.equal(model[-1].feedback_matrix, torch.randn(4, 9, dtype=torch.float64))


@pytest.mark.parametrize("dtype, kept", [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_the_matrix_is_no_narrower_than_float32(dtype, kept):
    model = fc(dtype=dtype)
    x, y = batch(dtype=dtype)
    got = gradients(model, x, y)
    assert model[-1].feedback_matrix.dtype == kept
    assert {gradient.dtype for gradient in got} == {dtype}


def test_the_matrix_follows_the_model_in_type():
    model = fc(dtype=torch.float32)
    x, y = batch()
    model(x.float())
    matrix = model[-1].feedback_matrix.clone()
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        assert model[-1].feedback_matrix.dtype == dtype
        assert torch.equal(model[-1].feedback_matrix, matrix.to(dtype))
    model.double()
    assert_close(gradients(model, x, y), expected_gradients(model, x, y))


def test_the_matrix_stays_on_its_own_device():
    model = fc(dtype=torch.float32, feedback_device="cpu")
    model(batch(dtype=torch.float32)[0])
    matrix = model[-1].feedback_matrix.clone()
    model.double()
    assert model[-1].feedback_matrix.dtype == torch.float64
    model.to("meta", torch.float32)
    assert model[0].weight.is_meta and model[-1].feedback_matrix.dtype == torch.float32
    assert torch.equal(model[-1].feedback_matrix, matrix)


def test_a_matrix_without_values_is_drawn_anew():
    with torch.device("meta"):
        model = fc(dtype=torch.float32)
        model(torch.randn(8, 7))
    assert model[-1].feedback_matrix.numel() == 0
    model.to_empty(device="cpu")
    for layer in model[:-1:3]:
        layer.reset_parameters()
    torch.manual_seed(5)
    model(batch(dtype=torch.float32)[0])
    torch.manual_seed(5)
    assert torch.equal(model[-1].feedback_matrix, torch.randn(4, 9))


# A feedback matrix of another type than the model's

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def own_type(dtype, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    return fc(dtype=torch.float32, feedback_dtype=dtype, generator=generator, **options)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_matrix_of_its_own_type(dtype, reduction):
    model = own_type(dtype, reduction=reduction)
    x, y = batch(dtype=torch.float32)
    got = gradients(model, x, y)
    drawn = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    matrix = model[-1].feedback_matrix
    assert matrix.dtype == dtype and torch.equal(matrix, drawn.to(dtype))
    for i, size in enumerate(WIDTHS[1:-1]):
        assert torch.equal(model[-1].feedback(i), matrix[:, :size] * (1 / math.sqrt(size * 4)))

    exact = copy.deepcopy(model).double()  # the matrix stays rounded to its type
    exact[-1].feedback_matrix = matrix.double()
    expected = expected_gradients(exact, x.double(), y, reduction=reduction)
    rounding = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps  # of B and e, of sums
    for gradient, true in zip(got, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert np.linalg.norm(gradient.numpy() - true) < 4 * rounding * np.linalg.norm(true)


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_a_rounded_matrix_gives_nearly_the_same_gradients(dtype):
    x, y = batch(dtype=torch.float32)
    whole, rounded = (gradients(own_type(t), x, y) for t in (torch.float32, dtype))
    for a, b in zip(whole[:-2], rounded):
        assert 0 < (a - b).norm() < 2 * torch.finfo(dtype).eps * a.norm()
    assert_same(whole[-2:], rounded[-2:])  # the output layer has no feedback


@pytest.mark.parametrize("dtype", TYPES)
def test_the_type_is_kept(dtype):
    model = own_type(dtype)
    model(batch(dtype=torch.float32)[0])
    matrix = model[-1].feedback_matrix.clone()
    for change in (nn.Module.bfloat16, nn.Module.double, nn.Module.half, nn.Module.float):
        change(model)
        assert model[-1].feedback_matrix.dtype == dtype
        assert torch.equal(model[-1].feedback_matrix, matrix)
    assert torch.equal(copy.deepcopy(model)[-1].feedback_matrix, matrix)
    model.to("meta")
    assert model[-1].feedback_matrix.numel() == 0


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("saved", TYPES[::2])
@pytest.mark.parametrize("dtype", TYPES[::2])
def test_a_state_dict_of_another_type(dtype, saved, assign, used):
    model, source = own_type(dtype), own_type(saved, seed=4)
    x, y = batch(dtype=torch.float32)
    source(x)
    if used:
        model(x)
    model.load_state_dict(source.state_dict(), assign=assign)
    matrix = model[-1].feedback_matrix
    assert matrix.dtype == dtype
    assert torch.equal(matrix, source[-1].feedback_matrix.to(dtype))
    gradients(model, x, y)
    assert torch.equal(model[-1].feedback_matrix, matrix)


def test_the_type_is_shown():
    assert "feedback_dtype" not in repr(fc())
    assert "feedback_dtype=torch.bfloat16" in repr(own_type(torch.bfloat16))


def test_a_matrix_from_a_checkpoint_goes_where_the_output_is():
    source, model = fc(), fc()
    x, y = batch()
    source(x)
    model.load_state_dict(source.state_dict())
    model[:-1].to("meta")
    assert gradients(model, x.to("meta"), y.to("meta"))[0].is_meta
    assert torch.equal(model[-1].feedback_matrix, source[-1].feedback_matrix)


def test_signals_go_where_the_activation_is():
    point, head = DFALayer(), nn.Linear(7, 4)
    dfa = DFA(point)
    hidden = torch.zeros(8, 5, device="meta", requires_grad=True)
    with dfa.one_pass():
        point(hidden)
        dfa(head(torch.randn(8, 7))).sum().backward()
    assert hidden.grad.is_meta and hidden.grad.shape == (8, 5)


def test_a_network_without_data_trains():
    model = fc().to("meta")
    x, y = batch()
    got = gradients(model, x.to("meta"), y.to("meta"))
    assert all(gradient.is_meta for gradient in got)


def test_signals_under_autocast_have_the_matrix_s_type():
    model = fc(dtype=torch.float32)
    x, _ = batch(dtype=torch.float32)
    error, shapes = model(x).detach(), [torch.Size((8, 6)), torch.Size((8, 9))]
    expected = model[-1].signals(error, shapes)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model[-1].signals(error, shapes), expected)


# Modules of one's own, and plain code


class Skip(nn.Module):
    """The first activation, uncut, skips over the second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.point1, self.point2 = DFALayer(), DFALayer()
        self.guard = Guard()
        self.dfa = DFA(self)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.point2(torch.tanh(self.second(self.point1(h))) + h)
        return self.dfa(self.head(self.guard(h)))


class Recurrent(nn.Module):
    """One cell and one feedback point, called for each of three equal steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(7 + 6, 6), nn.Linear(6, 4)
        self.point, self.guard = DFALayer(recurrent=True), Guard()
        self.dfa = DFA(self)

    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for step in range(3):
            h = self.point(torch.tanh(self.cell(torch.cat([x * (step + 1), h], 1))))
            if step == 1:
                self.guard(h)
        return self.dfa(self.head(h))


class Guard(nn.Module):
    """Identity; raises where it is told to."""

    armed = False

    def forward(self, x):
        if self.armed:
            raise InterruptedError("halfway")
        return x


def guarded_fc():
    model = fc()
    model.insert(6, Guard())  # two feedback points in front
    return model


def guard_of(model):
    return next(module for module in model.modules() if isinstance(module, Guard))


def test_a_skip_connection():
    torch.manual_seed(0)
    model = Skip().double()
    x, y = batch()
    got = gradients(model, x, y)
    w1, b1, w2, b2, w3, b3 = arrays(model)
    h1 = np.tanh(x.numpy() @ w1.T + b1)
    t = np.tanh(h1 @ w2.T + b2)
    h2 = t + h1
    error = softmax_error(h2 @ w3.T + b3, y.numpy())
    signal = error @ scaled(model.dfa.feedback_matrix.numpy(), 6)
    delta2 = signal * (1 - t**2)
    delta1 = 2 * signal * (1 - h1**2)  # through its own point and, skipping, the second
    expected = [delta1.T @ x.numpy(), delta1.sum(0), delta2.T @ h1, delta2.sum(0)]
    assert_close(got, expected + [error.T @ h2, error.sum(0)])


def test_a_point_called_several_times_feeds_back_each_time():
    torch.manual_seed(0)
    model = Recurrent().double()
    x, y = batch()
    got = gradients(model, x, y)
    w, b, v, c = arrays(model)
    inputs, hidden = [], [np.zeros((8, 6))]
    for step in range(3):
        inputs.append(np.concatenate([x.numpy() * (step + 1), hidden[-1]], 1))
        hidden.append(np.tanh(inputs[-1] @ w.T + b))
    error = softmax_error(hidden[-1] @ v.T + c, y.numpy())
    signal = error @ scaled(model.dfa.feedback_matrix.numpy(), 6)
    deltas = [signal * (1 - h**2) for h in hidden[1:]]
    expected = [sum(d.T @ i for d, i in zip(deltas, inputs)), sum(d.sum(0) for d in deltas)]
    assert_close(got, expected + [error.T @ hidden[-1], error.sum(0)])


@pytest.mark.parametrize("build", [Skip, Recurrent, guarded_fc])
@pytest.mark.parametrize("first", [True, False], ids=["first-pass", "later-pass"])
def test_a_pass_that_fails_halfway_leaves_nothing_behind(build, first):
    torch.manual_seed(0)
    model = build().double()
    x, y = batch()
    model(x)  # draws the matrix
    expected = gradients(copy.deepcopy(model), x, y)
    if not first:
        assert_same(gradients(model, x, y), expected)
    guard = guard_of(model)
    guard.armed = True
    for _ in range(2):
        with pytest.raises(InterruptedError):
            model(x)
    guard.armed = False
    duplicate = copy.deepcopy(model)
    assert_same(gradients(model, x, y), expected)
    assert_same(gradients(duplicate, x, y), expected)


@pytest.mark.parametrize("count", [2, 8], ids=["same-batch", "another"])
def test_a_part_called_before_leaves_nothing_behind(count):
    model = fc()
    x, y = batch()
    expected = gradients(model, x, y)
    for part in (model[:3], model[:6], model[3:6], model[3:8]):
        inner = torch.randn(count, part[0].in_features, dtype=x.dtype)
        part(inner)
        assert_same(gradients(model, x, y), expected)


class Staged(nn.Module):
    """Encoder and head in one module, called one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.points = nn.ModuleList([DFALayer(), DFALayer()])
        self.dfa = DFA(self)

    def forward(self, x, stage):
        if stage == "encode":
            return self.points[0](torch.tanh(self.first(x)))
        return self.dfa(self.last(self.points[1](torch.tanh(self.second(x)))))


def test_a_pass_in_stages_is_one_pass():
    torch.manual_seed(0)
    model = Staged().double()
    x, y = batch()
    for _ in range(2):
        model.zero_grad()
        with model.dfa.one_pass():
            F.cross_entropy(model(model(x, "encode"), "decode"), y).backward()
        w1, b1, w2, b2, w3, b3 = arrays(model)
        h1 = np.tanh(x.numpy() @ w1.T + b1)
        h2 = np.tanh(h1 @ w2.T + b2)
        error = softmax_error(h2 @ w3.T + b3, y.numpy())
        matrix = model.dfa.feedback_matrix.numpy()
        delta1, delta2 = (error @ scaled(matrix, h.shape[1]) * (1 - h**2) for h in (h1, h2))
        expected = [delta1.T @ x.numpy(), delta1.sum(0), delta2.T @ h1, delta2.sum(0)]
        assert_close([p.grad for p in model.parameters()], [*expected, error.T @ h2, error.sum(0)])


def test_a_finished_pass_keeps_no_activation_alive():
    model = fc()
    x, y = batch()
    seen = []
    model[1].register_forward_hook(lambda _, __, hidden: seen.append(weakref.ref(hidden)))
    gradients(model, x, y)
    assert len(seen) == 1 and seen[0]() is None


def test_the_output_may_be_changed_in_place():
    model = fc()
    x, y = batch()
    expected = gradients(model, x, y)
    model.zero_grad()
    output = model(x).mul_(2)
    F.cross_entropy(output / 2, y).backward()
    assert_close([p.grad for p in model.parameters()], expected, 1e-15)


def test_encoder_and_head_called_from_plain_code():
    whole = fc()
    x, y = batch()
    expected = gradients(whole, x, y)
    encoder, head = whole[:6], whole[6:]
    for _ in range(2):
        whole.zero_grad()
        with whole[-1].one_pass():
            F.cross_entropy(head(encoder(x)), y).backward()
        assert_same([p.grad for p in whole.parameters()], expected)


def test_plain_code_without_modules():
    torch.manual_seed(0)
    w, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (5, 4)))
    point = DFALayer()
    dfa = DFA(point)
    x, y = batch()
    for _ in range(2):
        w.grad = v.grad = None
        with dfa.one_pass():
            F.cross_entropy(dfa(point(torch.tanh(x @ w)) @ v), y).backward()
        h = np.tanh(x.numpy() @ w.detach().numpy())
        error = softmax_error(h @ v.detach().numpy(), y.numpy())
        delta = (error @ scaled(dfa.feedback_matrix.numpy(), 5)) * (1 - h**2)
        assert_close([w.grad, v.grad], [x.numpy().T @ delta, h.T @ error])


# Without gradients, copies, frozen parameters


def test_no_grad_gives_the_output_alone():
    model = fc()
    x, y = batch()
    with torch.no_grad():
        output = model(x)
    assert not output.requires_grad and torch.equal(output, plain(model)(x))
    assert_close(gradients(model, x, y), expected_gradients(model, x, y))


@pytest.mark.parametrize("used", [False, True], ids=["before-first-pass", "after"])
def test_a_deep_copy_is_independent(used):
    model = fc(generator=torch.Generator().manual_seed(2))
    x, y = batch()
    if used:
        gradients(model, x, y)
    duplicate = copy.deepcopy(model)
    expected = gradients(model, x, y)
    assert_same(gradients(duplicate, x, y), expected)
    duplicate[-1].training_method = "shallow"
    duplicate[-1].feedback_matrix.zero_()
    with torch.no_grad():
        duplicate[0].weight.zero_()
    assert_same(gradients(model, x, y), expected)
    assert gradients(duplicate, x, y)[0] is None


def test_a_frozen_layer_gets_no_gradient_and_the_others_their_own():
    x, y = batch()
    model = fc()
    expected = gradients(model, x, y)
    for frozen in (0, 3, -2):  # the first, a middle layer, the head
        model.zero_grad()
        model[frozen].requires_grad_(False)
        of_frozen = {id(p) for p in model[frozen].parameters()}
        wanted = [
            None if id(p) in of_frozen else gradient
            for p, gradient in zip(model.parameters(), expected)
        ]
        assert_same(gradients(model, x, y), wanted)
        model[frozen].requires_grad_(True)


# state_dict


@pytest.mark.parametrize("used", [False, True], ids=["before-first-pass", "after"])
def test_a_bp_state_dict_loads_strictly(used):
    model, source = fc(seed=0), fc(seed=1)
    x, _ = batch()
    state = {k: v for k, v in source.state_dict().items() if "feedback" not in k}
    if used:
        model(x)
        matrix = model[-1].feedback_matrix.clone()
    model.load_state_dict(state, strict=True)
    assert_same(list(model.parameters()), list(source.parameters()))
    if used:
        assert torch.equal(model[-1].feedback_matrix, matrix)


@pytest.mark.parametrize("used", [False, True], ids=["into-fresh", "into-used"])
def test_a_dfa_state_dict_brings_its_matrix(used):
    model, source = fc(seed=0), fc(seed=1)
    x, y = batch()
    assert source.state_dict()["10.feedback_matrix"].numel() == 0
    expected = gradients(source, x, y)
    state = source.state_dict()
    assert torch.equal(state["10.feedback_matrix"], source[-1].feedback_matrix)
    if used:
        gradients(model, x, y)
    model.load_state_dict(state, strict=True)
    assert model[-1].feedback_matrix.data_ptr() != source[-1].feedback_matrix.data_ptr()
    assert_same(gradients(model, x, y), expected)


def test_a_matrix_of_another_size_is_refused():
    x, _ = batch()
    other = fc((7, 6, 8, 5, 4))
    other(x)
    matrix = {"10.feedback_matrix": other[-1].feedback_matrix}
    used = fc()
    used(x)
    with pytest.raises(RuntimeError, match="size mismatch for 10.feedback_matrix"):
        used.load_state_dict(matrix, strict=False)
    fresh = fc()
    fresh.load_state_dict(matrix, strict=False)
    with pytest.raises(ValueError, match="has 9 features, but the .* made for at most 8"):
        fresh(x)


# Errors


def test_a_replica_is_refused():
    """As nn.DataParallel makes them, which needs several GPUs."""
    model = fc()
    x, _ = batch()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model[-1]._replicate_for_data_parallel()(model[:-1](x))


def test_a_point_without_a_dfa():
    model = nn.Sequential(nn.Linear(2, 3), DFALayer())
    model.append(DFA(model))
    model.insert(0, DFALayer())  # too late
    with pytest.raises(RuntimeError, match="belongs to no DFA: make DFA.network. after it"):
        model(torch.randn(2, 2))


@pytest.mark.parametrize("network, error, message", [
    ([DFALayer()], TypeError, "takes the network of its DFALayers, not a list"),
    (nn.Linear(2, 3), ValueError, "no DFALayer as a submodule: make the DFA after them"),
])  # fmt: skip
def test_bad_networks(network, error, message):
    with pytest.raises(error, match=message):
        DFA(network)


@pytest.mark.parametrize("option, value", [
    ("reduction", "none"),
    ("training_method", "backprop"),
    ("batch_dims", 0),
    ("batch_dims", 1.0),
    ("feedback_dtype", torch.int8),
    ("feedback_dtype", torch.complex64),
    ("feedback_dtype", "bfloat16"),
])  # fmt: skip
def test_bad_options_leave_the_network_as_it_was(option, value):
    model = fc()
    x, y = batch()
    with pytest.raises(ValueError, match=f"{option} must be .*{value!r}"):
        DFA(model, **{option: value})
    assert_close(gradients(model, x, y), expected_gradients(model, x, y))


def test_a_bad_training_method_is_not_taken_up():
    dfa = DFA(DFALayer())
    with pytest.raises(ValueError, match=r"one of \('dfa', 'bp', 'shallow'\), not 'BP'"):
        dfa.training_method = "BP"
    assert dfa.training_method == "dfa"


def test_the_feedback_is_unknown_before_the_first_pass():
    model, used = fc(), fc()
    with pytest.raises(RuntimeError, match="point 0 has not been fed yet"):
        model[-1].feedback(0)
    used(batch()[0])
    model.load_state_dict(used.state_dict())  # the matrix is there, the points' sizes are not
    with pytest.raises(RuntimeError, match="point 1 has not been fed yet"):
        model[-1].feedback(1)


def test_an_output_of_another_size():
    model = fc()
    x, y = batch()
    expected = gradients(model, x, y)
    head, model[-2] = model[-2], nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="output of size 3, but .* was made for 4"):
        model(x)
    model[-2] = head
    assert_same(gradients(model, x, y), expected)


def test_activations_larger_than_the_matrix():
    model = with_dfa(DFALayer(), Head(2))
    model(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match="has 5 features, but the .* made for at most 3"):
        model(torch.randn(2, 5))


class Head(nn.Module):
    """The first features of each sample."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return x[:, : self.features]


def test_a_dfa_whose_points_are_not_called():
    model = fc()
    model[2] = model[5] = model[8] = nn.Identity()
    with pytest.raises(RuntimeError, match="no feedback point was called in this pass"):
        model(batch()[0])


def test_batch_dimensions_that_differ():
    model = with_dfa(DFALayer(), nn.Flatten(0), nn.Unflatten(0, (2, 9)))
    with pytest.raises(ValueError, match=r"\(6, 3\) do not share the first 1 dimension"):
        model(torch.randn(6, 3))
    model = with_dfa(DFALayer(), nn.Flatten(), Head(1), nn.Flatten(0), batch_dims=2)
    with pytest.raises(ValueError, match=r"the first 2 dimension\(s\) with the output, \(2,\)"):
        model(torch.randn(2, 3, 4))
