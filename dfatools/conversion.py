"""From a network for backpropagation to one for Direct Feedback Alignment."""

import copy
from typing import Any, TypeGuard

from torch import nn

from dfatools.feedback import DFA, DFALayer

WEIGHT_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def dfa_from_bp(model: nn.Sequential, **dfa_options: Any) -> nn.Sequential:
    """Makes a DFA network of an ordinary Sequential, which is left as it was.

    A feedback point goes in front of every Linear or convolution but the first, in nested
    Sequentials too, and a `DFA` at the end. A module of another kind that holds a Linear or a
    convolution (a residual block, say) counts as one such layer: backpropagation trains its inside.
    The modules, which are copies, keep their names, so a `state_dict` of `model` loads into the
    result; the new ones are called `feedback_<name of the layer behind>` and `dfa`.

    Args:
        model: the network, whose input and output are those of the result, `(*batch, *features)`.
        dfa_options: the keyword arguments of `DFA`.

    Raises:
        TypeError: `model` is no Sequential, or one with a forward of its own.
        ValueError: it has fewer than two weight layers, feedback points already, or a module with
            the name of one to be added; or `DFA` refuses an option.
    """
    if not _is_plain(model):
        raise TypeError(
            f"dfa_from_bp takes an nn.Sequential, not {type(model).__name__}: in another kind of "
            "module, place DFALayer and DFA in forward by hand"
        )
    if any(isinstance(module, (DFALayer, DFA)) for module in model.modules()):
        raise ValueError("this model has feedback points already")
    if "dfa" in model._modules:
        raise ValueError("a module of this model is called dfa, the name of the one to be added")
    layers: list[DFALayer] = []
    converted = _with_points(copy.deepcopy(model), layers, first=True)
    if not layers:
        raise ValueError("this model has fewer than two weight layers: there is nothing to feed")
    converted.add_module("dfa", DFA(layers, **dfa_options))
    return converted


def _with_points(model: nn.Sequential, layers: list[DFALayer], first: bool) -> nn.Sequential:
    """Rebuilds `model` with points, which it appends to `layers`; `first`: no weights so far."""
    result = copy.copy(model)  # of its own kind, with its hooks and buffers
    result._modules = {}
    for name, module in model._modules.items():  # named_children gives a shared module once only
        if _is_plain(module):
            module = _with_points(module, layers, first)
        elif _has_weights(module) and not first:
            layers.append(DFALayer())
            point = f"feedback_{name}"
            if point in model._modules:
                raise ValueError(f"a module is called {point}, the name of a point to be added")
            result.add_module(point, layers[-1])
        first = first and not _has_weights(module)
        result.add_module(name, module)
    return result


def _is_plain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it is a Sequential that runs its modules one by one, and does no more than that."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(part, WEIGHT_LAYERS) for part in module.modules())
