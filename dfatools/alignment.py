"""How well DFA's signals are aligned with the gradients of backpropagation (Section 2.2)."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfatools.bottleneck import BottleneckLinear
from dfatools.feedback import DFA, DFALayer


def measure_alignment(
    model: nn.Module, x: Any, y: Any, loss: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """The cosine between DFA's signal and the BP gradient at the output of each leaf module.

    It is the cosine of the alignment angle of Section 2.2: 1 is BP's direction, 0 a right angle.
    Both are taken on one forward pass, in eval mode; no parameter's gradient is computed. The
    model's mode, its gradients and the random state are as before afterwards, but for a pass that
    draws the feedback matrix, if there is none yet.

    Args:
        model: a network with one `DFA` at its output, called once per pass, before `torch.compile`.
            Its `training_method` does not matter. Its feedback points need not be submodules.
        x: a batch, passed to the model as its one argument: a tensor, a tuple, a dict or a graph.
        y: its targets, passed to the loss.
        loss: `loss(model(x), y)`, a scalar in which no sample's term depends on another sample.

    Returns: `{module name: cosines}`, in network order, each `(N,)`, float64, on the device of the
    module's output; 0 where either side vanishes. N is the first dimension of the `DFA`'s output:
    the number of samples, or of the nodes of a graph. Leaf modules are left out whose output is no
    tensor of shape `(N, ...)`, that no gradient reaches, or that are feedback points. The outputs
    of a module that is called several times count as one.

    Raises:
        ValueError: the model has no `DFA` or several, or calls it more than once.
        RuntimeError: the loss is no scalar, no parameter asks for gradients, or the model is
            compiled.
    """
    result = {}
    samples, modules = probe(model, x, y, loss)
    for name, probes in modules.items():
        if any(probe.dfa.shape[:1] != (samples,) for probe in probes):
            continue
        dfa = torch.cat([probe.dfa[:, None].flatten(1) for probe in probes], 1).double()
        bp = torch.cat([probe.bp[:, None].flatten(1) for probe in probes], 1).double()
        # In this form the cosine of a vector with itself is exactly 1.
        norms = (dfa.square().sum(1) * bp.square().sum(1)).sqrt()
        result[name] = torch.where(norms == 0, 0.0, (dfa * bp).sum(1) / norms)
    return result


@dataclass
class Probe:
    """What reaches one call of a leaf module: tensors shaped as its output, or its input."""

    dfa: Tensor  # DFA's signal at its output
    bp: Tensor  # the BP gradient at its output
    dfa_input: Tensor | None  # DFA's signal at its input; None where no gradient can reach it


def probe(model: nn.Module, x: Any, y: Any, loss: Callable) -> tuple[int, dict[str, list[Probe]]]:
    """Takes DFA's signals and BP's gradients of every call of every leaf module, as above.

    Returns: the number of samples, and `{module name: its calls}`.

    The graph is built whole. Behind each feedback point stands a gate: open, the backward pass
    through it is BP; shut, and with e B_i put in at the points, it is DFA. The gradient bottleneck
    is the DFA network's: BP's gradient is the true one.
    """
    dfas = [module for module in model.modules() if isinstance(module, DFA)]
    if len(dfas) != 1:
        raise ValueError(f"the model must hold one DFA, at its output; it holds {len(dfas)}")
    dfa = dfas[0]
    bottlenecks = [module for module in model.modules() if isinstance(module, BottleneckLinear)]
    shut = False
    points: list[Tensor] = []
    gated: dict[Tensor, Tensor] = {}  # what stands behind a gate -> what stands before it
    calls: list[tuple[str, Tensor | None, Tensor]] = []  # module name, input, output
    outputs: list[Tensor] = []

    def gate(module: DFALayer, args: tuple[Tensor], hidden: Tensor) -> Tensor | None:
        if not hidden.requires_grad:
            return None
        behind = hidden.clone()
        behind.register_hook(lambda gradient: torch.zeros_like(gradient) if shut else None)
        points.append(hidden)
        gated[behind] = hidden
        return behind

    def note(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            if isinstance(output, Tensor) and output.requires_grad:
                source = next(iter((*args, *kwargs.values())), None)
                if isinstance(source, Tensor) and source.requires_grad:
                    source = gated.get(source, source)
                else:
                    source = None
                calls.append((name, source, output))
                return output.clone()  # as at the gates: an in-place module may come next
            return None

        return hook

    hooks = []
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _undisturbed(model, dfa, bottlenecks, x),
        ):
            hooks.append(dfa.register_forward_hook(lambda _, args, out: outputs.append(out)))
            for point in dfa.layers:  # a plain list may hold them: not all are submodules
                hooks.append(point.register_forward_hook(gate))
            for name, module in model.named_modules():
                if _is_leaf(name, module) and not isinstance(module, (DFA, DFALayer)):
                    hooks.append(module.register_forward_hook(note(name), with_kwargs=True))
            value = loss(model(x), y)
            if len(outputs) != 1:
                raise ValueError(f"the model must call its DFA once, not {len(outputs)} times")
            tensors = [output for _, _, output in calls]
            for bottleneck in bottlenecks:
                bottleneck.thinning = False
            error, *bp = torch.autograd.grad(
                value, outputs + tensors, retain_graph=True, allow_unused=True
            )
            shut = True
            for bottleneck in bottlenecks:
                bottleneck.thinning = True
            # Inputs are looked up behind the outputs, once each.
            sources = list({id(s): s for _, s, _ in calls if s is not None}.values())
            signals = dfa.signals(error, [point.shape for point in points])
            signals = [signal.to(point.device) for signal, point in zip(signals, points)]
            grads = torch.autograd.grad(
                outputs + points, tensors + sources, [error, *signals], allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        for bottleneck in bottlenecks:
            bottleneck.thinning = True
    at_source = dict(zip(map(id, sources), grads[len(tensors) :]))
    probes: dict[str, list[Probe]] = {}
    for (name, source, _), signal, gradient in zip(calls, grads, bp):
        if signal is not None and gradient is not None:
            signal_at_input = None if source is None else at_source[id(source)]
            probes.setdefault(name, []).append(Probe(signal, gradient, signal_at_input))
    if not probes:
        raise RuntimeError(
            "no gradient gets to the output of any module; of a compiled model, take the original"
        )
    return len(outputs[0]), probes


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Whether it holds no other modules, those that compute its own parameters aside."""
    parametrizations = "parametrizations"  # torch.nn.utils.parametrize's name for them
    inside = parametrizations in name.split(".")
    children = [child for name, child in module.named_children() if name != parametrizations]
    return not inside and not any(children)


@contextmanager
def _undisturbed(
    model: nn.Module, dfa: DFA, bottlenecks: list[BottleneckLinear], x: Any
) -> Iterator[None]:
    """Eval mode, nothing cut; afterwards everything is as it was, the random state too."""
    generators = {layer.input_generator for layer in bottlenecks if layer.input_generator}
    states = [(generator, generator.get_state()) for generator in generators]
    modes = {module: module.training for module in model.modules()}
    method = dfa.training_method
    tensors = itertools.chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    try:
        dfa.training_method = "bp"
        model.eval()
        if dfa.feedback_matrix is None:  # drawn before the random state is put by, to be used once
            with torch.no_grad():
                model(x)
        with torch.random.fork_rng([*devices]):
            yield
    finally:
        dfa.training_method = method
        for module, mode in modes.items():
            module.training = mode
        for generator, state in states:
            generator.set_state(state)
