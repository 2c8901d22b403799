"""From a network for backpropagation to one for Direct Feedback Alignment."""

import copy
from typing import Any, TypeGuard

import torch
from torch import nn

from dfatools.feedback import DFA, DFALayer, evaluation

NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip
PROBABILITIES = (nn.LogSoftmax, nn.Softmax, nn.Softmax2d, nn.LogSigmoid, nn.Sigmoid)


def dfa_from_bp(model: nn.Sequential, example: Any = None, **dfa_options: Any) -> nn.Sequential:
    """Makes a DFA network of an ordinary Sequential, which is left as it was.

        bp = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
        model = dfa_from_bp(bp, example=torch.zeros(1, 20))
        F.cross_entropy(model(x), y).backward()

    A feedback point goes in front of every module with weights but the first, in nested
    Sequentials too, and a `DFA` at the end. Weights are parameters other than those of
    normalisation and PReLU. A module that holds modules with weights (a residual block, say) counts
    as one such module: backpropagation trains its inside. The modules, which are copies, keep their
    names, so a `state_dict` of `model` loads into the result; the new ones are called
    `feedback_<name of the module behind>` and `dfa`.

    Args:
        model: the network, whose input and output are those of the result, `(*batch, *features)`.
        example: a batch for `model`; one pass of it, in eval mode, makes the feedback matrix at
            once. Without it, the first pass that needs the matrix does.
        dfa_options: the keyword arguments of `DFA`.

    Raises:
        TypeError: `model` is no Sequential, or one with a forward of its own.
        ValueError: it has fewer than two modules with weights, feedback points already, or a module
            with the name of one to be added; it ends in probabilities, whose error is not that at
            the logits; or `DFA` refuses an option.
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
    modules = _flat(model)
    weighted = [i for i, module in enumerate(modules) if has_weights(module)]
    if len(weighted) < 2:
        raise ValueError("this model has fewer than two modules with weights: nothing to feed")
    for module in modules[weighted[-1] :]:
        if isinstance(module, PROBABILITIES):
            raise ValueError(
                f"this model ends in {type(module).__name__}: DFA needs the error at the logits; "
                "leave that module out, and use a loss of logits, such as cross_entropy"
            )
    result = _with_points(copy.deepcopy(model), first=True)
    dfa = DFA(result, **dfa_options)
    result.add_module("dfa", dfa)
    if example is not None:
        with evaluation(result, dfa, "dfa"), torch.enable_grad():
            result(example)
    return result


def _with_points(model: nn.Sequential, first: bool) -> nn.Sequential:
    """Rebuilds `model` with feedback points; `first`: no module with weights is in front of it."""
    result = copy.copy(model)  # of its own kind, with its hooks and buffers
    result._modules = {}
    for name, module in model._modules.items():  # named_children gives a shared module once only
        if _is_plain(module):
            module = _with_points(module, first)
        elif has_weights(module) and not first:
            point = f"feedback_{name}"
            if point in model._modules:
                raise ValueError(f"a module is called {point}, the name of a point to be added")
            result.add_module(point, DFALayer())
        first = first and not has_weights(module)
        result.add_module(name, module)
    return result


def _flat(model: nn.Module) -> list[nn.Module]:
    """The modules that a Sequential runs one by one, those of nested Sequentials included."""
    if not _is_plain(model):
        return [model]
    return [module for child in model._modules.values() for module in _flat(child)]


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Whether it is a Sequential that runs its modules one by one, and does no more than that."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_weights(module: nn.Module) -> bool:
    """Whether it holds a parameter that is not one of normalisation."""
    own = (part for part in module.modules() if not isinstance(part, NORMS))
    return any(True for part in own for _ in part.parameters(recurse=False))
