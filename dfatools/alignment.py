"""Alignment of DFA's signals with the gradients of backpropagation (BP)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dfatools.bottleneck import unmasked
from dfatools.feedback import DFA, DFALayer, evaluation


def measure_alignment(
    model: nn.Module, x: Any, y: Any, loss: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """Measures the cosine between DFA's signal and the BP gradient at each leaf module's output.

        >>> model = dfa_from_bp(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10)))
        >>> x, y = torch.randn(128, 20), torch.randint(10, (128,))
        >>> cosines = measure_alignment(model, x, y, F.cross_entropy)
        >>> {name: tuple(cosine.shape) for name, cosine in cosines.items()}
        {'0': (128,), '1': (128,), '2': (128,)}
        >>> cosines["2"].mean().item()  # the output layer gets the BP gradient itself
        1.0

    A cosine of 1 is the direction of the BP gradient, 0 a right angle. Signal and gradient come
    from one forward pass, in eval mode; no gradient of a parameter is computed. Afterwards the
    model's mode, its gradients and the random state are unchanged, except that an empty feedback
    matrix is drawn. Modes are restored by `train(mode)`.

    Args:
        model: a network with one `DFA` at its output, called once per pass; not the result of
            `torch.compile`. Any `training_method`.
        x: a batch, the model's one argument: a tensor, a tuple, a dict or a graph.
        y: its targets, an argument of the loss.
        loss: `loss(model(x), y)`, a scalar in which no sample's term depends on another sample.

    Returns: `{module name: cosines}`, in the order of calls, each `(N,)`, float64, on the device of
    the module's output; 0 if signal or gradient is zero. N is the first dimension of the `DFA`'s
    output: the number of samples, or of nodes of a graph. Feedback points, modules without a
    gradient, and modules whose output is no tensor of shape `(N, ...)` are omitted. All outputs
    of a repeatedly called module together give one cosine per sample.

    Raises:
        ValueError: the model has no `DFA` or several, or does not call it exactly once.
        RuntimeError: the loss is no scalar, or does not depend on the output; no parameter of a
            submodule requires a gradient; or the model is compiled.
    """
    result = {}
    samples, modules = probe(model, x, y, loss)
    for name, calls in modules.items():
        if any(call.dfa.shape[:1] != (samples,) for call in calls):
            continue
        dfa, bp = (
            torch.cat([side[:, None].flatten(1) for side in sides], 1).double()
            for sides in zip(*((call.dfa, call.bp) for call in calls))
        )
        # One root of the product, not two roots: a vector's cosine with itself is exactly 1.
        norms = (dfa.square().sum(1) * bp.square().sum(1)).sqrt()
        result[name] = torch.where(norms == 0, 0.0, (dfa * bp).sum(1) / norms)
    return result


@dataclass
class Probe:
    """Signal and gradient at one call of a leaf module, in the shape of its output or input."""

    dfa: Tensor  # DFA's signal at its output
    bp: Tensor  # the BP gradient at its output
    dfa_input: Tensor | None  # DFA's signal at its input; None if no gradient reaches it


def probe(model: nn.Module, x: Any, y: Any, loss: Callable) -> tuple[int, dict[str, list[Probe]]]:
    """Computes DFA's signal and the BP gradient at every call of every leaf module.

    The forward pass builds the whole graph, with a gate after each feedback point. The first
    backward pass, with open gates and unmasked bottlenecks, is BP. The second one, with shut gates
    and e B_i inserted at the points, is DFA.

    Args:
        model, x, y, loss: as for `measure_alignment`, whose errors it raises.

    Returns: the number of samples, and `{module name: its calls}`.
    """
    dfas = [module for module in model.modules() if isinstance(module, DFA)]
    if len(dfas) != 1:
        raise ValueError(f"the model must hold one DFA, at its output; it holds {len(dfas)}")
    (dfa,) = dfas
    seen = _Recorder()
    with torch.inference_mode(False), torch.enable_grad():
        if dfa.needs_matrix and dfa.feedback_matrix.numel() == 0:
            # Drawn before the fork, which would rewind the random state.
            with evaluation(model, dfa, "dfa"):
                model(x)
        with evaluation(model, dfa, "bp"), _forked_random_state(model), seen.watch(model, dfa):
            value = loss(model(x), y)
            if len(seen.outputs) != 1:
                raise ValueError(f"the model must call its DFA once, not {len(seen.outputs)} times")
            (output,) = seen.outputs
            ends = [end for _, _, end in seen.calls]
            sources = list(
                {id(source): source for _, source, _ in seen.calls if source is not None}.values()
            )
            with unmasked(model):
                error, *bp = torch.autograd.grad(
                    value, [output, *ends], retain_graph=True, allow_unused=True
                )
            if error is None:
                raise RuntimeError("the loss does not depend on the output of the DFA")
            seen.shut = True
            points = [hidden for _, hidden in seen.points]
            activations = [dfa._activation(*each) for each in seen.points]
            matrix = dfa._matrix_for(output, [activation.size for activation in activations])
            signals = dfa._shaped_signals(dfa._rows(error), activations, matrix)
            signals = [signal.to(hidden.device) for signal, hidden in zip(signals, points)]
            _, *grads = torch.autograd.grad(
                [output, *points],
                [output, *ends, *sources],
                [error, *signals],
                allow_unused=True,
            )
    at_source = dict(zip(map(id, sources), grads[len(ends) :]))
    calls: dict[str, list[Probe]] = {}
    for (name, source, _), signal, gradient in zip(seen.calls, grads, bp):
        if signal is not None and gradient is not None:
            call = Probe(signal, gradient, at_source.get(id(source)))
            calls.setdefault(name, []).append(call)
    if not calls:
        raise RuntimeError(
            "no gradient reaches the output of any submodule: give the model before "
            "torch.compile, with its parameters in submodules"
        )
    return len(output), calls


class _Recorder:
    """Forward hooks: record the calls of leaf modules, and add a gate after each feedback point."""

    def __init__(self) -> None:
        self.shut = False
        self.points: list[tuple[int, Tensor]] = []  # index and activation of each call of a point
        self.gated: dict[Tensor, Tensor] = {}  # tensor after a gate -> tensor before it
        self.calls: list[tuple[str, Tensor | None, Tensor]] = []  # module name, input, output
        self.outputs: list[Tensor] = []

    @contextmanager
    def watch(self, model: nn.Module, dfa: DFA) -> Iterator[None]:
        hooks = [dfa.register_forward_hook(self.at_output)]
        hooks += [
            point.register_forward_hook(partial(self.at_point, index))
            for index, point in enumerate(dfa.layers)
        ]
        hooks += [
            module.register_forward_hook(partial(self.at_leaf, name), with_kwargs=True)
            for name, module in model.named_modules()
            if _is_leaf(name, module) and not isinstance(module, (DFA, DFALayer))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def at_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.outputs.append(output)

    def at_point(self, index: int, module: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        if not hidden.requires_grad:
            return None
        hidden = hidden.clone()  # the network may change the activation in place later
        behind = hidden.clone()
        behind.register_hook(lambda gradient: torch.zeros_like(gradient) if self.shut else None)
        self.points.append((index, hidden))
        self.gated[behind] = hidden
        return behind

    def at_leaf(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any):
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        source: Any = next(iter((*args, *kwargs.values())), None)
        # The module's own hook may be a feedback point. An in-place module returns its input.
        end = output if output is source else self.gated.get(output, output)
        if isinstance(source, Tensor) and source.requires_grad:
            self.calls.append((name, self.gated.get(source, source), end))
        else:
            self.calls.append((name, None, end))
        copied = output.clone()  # the next module may work in place
        if end is not output:
            self.gated[copied] = end
        return copied


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Returns whether a module has no children, except parametrizations of its parameters."""
    parametrizations = "parametrizations"  # torch.nn.utils.parametrize's name for them
    inside = parametrizations in name.split(".")
    children = [child for name, child in module.named_children() if name != parametrizations]
    return not inside and not any(children)


@contextmanager
def _forked_random_state(model: nn.Module) -> Iterator[None]:
    """Context manager that restores the default generators and the generators of modules."""
    tensors = chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    held = chain.from_iterable(vars(module).values() for module in model.modules())
    states = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    try:
        with torch.random.fork_rng([*devices]):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
