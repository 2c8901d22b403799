"""Small DFA networks, and DFA by its definition: plain autograd, without the code of dfatools."""

import copy
import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp

# Networks and batches


def fc(widths=(7, 6, 9, 4), dtype=torch.float64, seed=0, **options):
    """Builds Linear layers with Tanh between them and a feedback point behind each Tanh."""
    torch.manual_seed(seed)
    layers = [
        layer for sizes in zip(widths, widths[1:]) for layer in (nn.Linear(*sizes), nn.Tanh())
    ]
    return dfa_from_bp(nn.Sequential(*layers[:-1]), **options).to(dtype)


def with_dfa(*modules, **options):
    """Builds a float64 Sequential of modules with feedback points, and a DFA named `dfa`."""
    model = nn.Sequential(*modules)
    model.add_module("dfa", DFA(model, **options))
    return model.double()


def batch(*shape, samples=8, classes=4, dtype=torch.float64, seed=1):
    """Draws inputs, (samples, *shape) or by default (samples, 7), and class labels, (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *(shape or (7,)), generator=generator, dtype=dtype)
    return x, torch.randint(classes, (samples,), generator=generator)


class Residual(nn.Sequential):
    """A Sequential by type only: its forward pass adds the input to the output."""

    def forward(self, x):
        return x + super().forward(x)


class ResidualInPlace(nn.Sequential):
    """Computes the values of `Residual`, but writes them over its input."""

    def forward(self, x):
        return x.add_(super().forward(x))


class Recurrent(nn.Module):
    """Recurrent network: three calls of a cell with a feedback point and a skip connection."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.point = DFALayer(recurrent=True)
        self.dfa = DFA(self, **options)
        self.double()

    def step(self, h):
        return self.point(torch.tanh(self.cell(h)) + h)

    def forward(self, x):
        h = self.first(x)
        for _ in range(3):
            h = self.step(h)
        return self.dfa(self.head(h))


class OwnWeight(nn.Module):
    """A network whose weight belongs to no layer."""

    def __init__(self, act=torch.tanh):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4, dtype=torch.float64))
        self.act, self.point = act, DFALayer()
        self.dfa = DFA(self)

    def forward(self, x):
        return self.dfa(self.point(self.act(x @ self.weight)) @ self.weight[:4])


# Gradients as DFA computes them


def mean_loss(output, y):
    """Computes the mean cross-entropy over samples, or over all tokens of all samples."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def copy_gradients(model):
    """Returns a copy of each parameter's gradient; None for a parameter without gradient."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def gradients(model, *batches, run=None, loss=mean_loss):
    """Accumulates gradients over batches: one forward and one backward pass for each.

    Args:
        run: called in place of the model, such as its compiled version.

    Returns: the gradient of the mean loss with respect to each parameter.
    """
    run = model if run is None else run
    model.zero_grad()
    for x, y in batches:
        (loss(run(x), y) / len(batches)).backward()
    return copy_gradients(model)


# Gradients and signals by the definition


class Definition:
    """One forward pass of a copy of a DFA network, with plain hooks instead of `dfatools`.

    Args:
        detach: whether the graph is detached at each feedback point, as in DFA, or not, as in BP.
        names: names of the modules whose inputs and outputs `calls` records.
        matrix: the feedback matrix; the model's own by default.
        forward: `forward(model, x)` computes the output; a call of the model by default.
        rule: `rule(error, point, size)` computes a signal, (rows, size); e B_i by default.
    """

    def __init__(
        self, model, x, detach=True, names=(), matrix=None, forward=nn.Module.__call__, rule=None
    ):
        self.model = copy.deepcopy(model)
        (self.dfa,) = (module for module in self.model.modules() if isinstance(module, DFA))
        self.dfa.training_method = "bp"  # makes the DFA and its points the identity
        self.matrix = self.dfa.feedback_matrix if matrix is None else matrix
        self.rule = rule or self.random_projection
        self.points, self.activations, self.detached = [], [], []  # for each call of a point
        self.calls = {name: [] for name in names}
        for name in names:
            module = self.model.get_submodule(name)
            module.register_forward_hook(partial(self.record, name), with_kwargs=True)
        for point in self.dfa.layers if detach else ():
            point.register_forward_hook(self.detach)
        self.output = forward(self.model, x)

    def record(self, name, module, args, kwargs, output):
        self.calls[name].append(((*args, *kwargs.values())[0], output))

    def detach(self, point, args, hidden):
        self.points.append(point)
        self.activations.append(hidden)
        self.detached.append(hidden.detach().requires_grad_(hidden.requires_grad))
        return self.detached[-1]

    def error(self, y, loss):
        """Computes e = dL/dy."""
        return torch.autograd.grad(loss(self.output, y), self.output, retain_graph=True)[0]

    def random_projection(self, rows, point, size):
        """Computes e B_i."""
        scale = 1 / (size * len(self.matrix)) ** 0.5 if self.dfa.normalization else 1
        return scale * rows @ self.matrix[:, :size]

    def feedback(self, error):
        """Computes the signal of each activation at a feedback point.

        The R positions of shared dimensions are moved behind all features. Each position gets the
        same signal, divided by sqrt(R).
        """
        signals = []
        for point, hidden in zip(self.points, self.activations):
            shared = point.shared_dims
            behind = tuple(range(-len(shared), 0))
            moved = torch.empty_like(hidden).movedim(shared, behind)
            features = moved.shape[: hidden.dim() - len(shared)]
            positions = math.prod(hidden.shape[dim] for dim in shared)
            rows = error.reshape(features[: self.dfa.batch_dims].numel(), -1)
            rows = rows * len(rows) if self.dfa.reduction == "sum" else rows
            size = features[self.dfa.batch_dims :].numel()
            signal = self.rule(rows, self.dfa.layers.index(point), size).reshape(features)
            for _ in shared:
                signal = signal[..., None]
            moved.copy_(signal / positions**0.5)
            signals.append(moved.movedim(behind, shared))
        return signals

    def propagate(self, error, to):
        """Returns the gradients at tensors `to`, from e at the output and signals at the points."""
        pairs = zip(self.activations, self.feedback(error))
        ends, signals = zip(
            (self.output, error), *(pair for pair in pairs if pair[0].requires_grad)
        )
        return torch.autograd.grad(ends, to, signals, retain_graph=True, allow_unused=True)


def expected_gradients(model, *batches, loss=mean_loss, **options):
    """Computes the result that `gradients` should have; `options` are passed to `Definition`."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x, y in batches:
        run = Definition(model, x, **options)
        error = run.error(y, loss) / len(batches)
        parts = run.propagate(error, [*run.model.parameters()])
        total = [a if b is None else a + b for a, b in zip(total, parts, strict=True)]
    return total


def expected_signals(model, x, y, names, loss=F.cross_entropy):
    """Computes {module name: [(BP gradient, DFA signal, DFA signal at the input) of each call]}.

    The BP gradient and first DFA signal are at the module's output. The network is in eval mode.
    """
    options = {"names": names, "forward": lambda model, x: model.eval()(x)}
    bp, dfa = (Definition(model, x, detach, **options) for detach in (False, True))
    error = bp.error(y, loss)
    feedback = dict(zip(dfa.detached, dfa.feedback(error)))
    result = {name: [] for name in names}
    for name in names:
        for (_, bp_output), (source, output) in zip(bp.calls[name], dfa.calls[name], strict=True):
            (gradient,) = bp.propagate(error, [bp_output])
            (signal,), at_input = dfa.propagate(error, [output]), feedback.get(source)
            if at_input is None and source.requires_grad:
                (at_input,) = dfa.propagate(error, [source])
            result[name].append((gradient, signal, at_input))
    return result


# Assertions


def assert_close(got, expected, tolerance=1e-12):
    """Asserts that tensors agree up to `tolerance`, and that no expected tensor is zero."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        assert b.abs().max() > 1e-4


def assert_same(got, expected):
    """Asserts that each pair of tensors is bitwise equal, or None on both sides."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
