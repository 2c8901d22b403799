"""From a network for backpropagation to one for Direct Feedback Alignment."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from dfatools.feedback import DFA, DFALayer, evaluation, feedback_points
from dfatools.hooks import Hook, hooks_of

NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU,
)  # fmt: skip
PROBABILITIES = (nn.LogSoftmax, nn.Softmax, nn.Softmax2d, nn.LogSigmoid, nn.Sigmoid)


def dfa_from_bp(
    model: nn.Module,
    points: Iterable[str] | Mapping[str, DFALayer] | None = None,
    example: Any = None,
    output: str | None = None,
    rule: Callable[..., DFA] = DFA,
    **dfa_options: Any,
) -> Any:
    """Makes a DFA network of an ordinary network, which is left as it was.

        bp = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
        model = dfa_from_bp(bp, example=torch.zeros(1, 20))
        F.cross_entropy(model(x), y).backward()

        gpt2 = dfa_from_bp(gpt2, ["transformer.h.0", "transformer.h.1"], batch_dims=2)
        resnet = dfa_from_bp(resnet, {"layer1": DFALayer(shared_dims=(2, 3)), ...})

    With `points`, a feedback point stands behind each submodule named there, by a forward hook. The
    network's code, names and `state_dict` keys stay; `dfa.feedback_matrix` is new. Where a
    submodule returns a tuple, a mapping or a dataclass, the point takes the first floating-point
    tensor in it, and the others are not detached. The `DFA` is a submodule called `dfa`; it takes
    the model's output, or the first such tensor in it. The first pass has to call all these
    submodules, and is refused otherwise, if it is not compiled.

    An `nn.Sequential` needs no `points`. A point then stands in front of every module with weights
    but the first, in nested Sequentials too. Weights are parameters other than those of
    normalisation and PReLU. A module that holds modules with weights (a residual block, say) counts
    as one such module: backpropagation trains its inside. The points are modules of the Sequential,
    called `feedback_<name of the module behind>`, and the `DFA` is its last.

    Args:
        model: the network, whose input and output are those of the result.
        points: names of submodules, as in `model.named_modules()`, or `{name: DFALayer(...)}`,
            from which each point takes its options. May be None for a Sequential.
        example: a batch for `model`; one pass of it, in eval mode, makes the feedback matrix at
            once. Without it, the first pass that needs the matrix does.
        output: name of the submodule that the `DFA` stands behind, if not the model itself: of the
            module that computes the logits, where the model itself computes a loss or a softmax.
        rule: the class of the `DFA`.
        dfa_options: the keyword arguments of `rule`.

    Raises:
        TypeError: `points` is no list of names, or missing for a model that is no Sequential; or
            the model is a Sequential with a forward of its own, or with `output`.
        ValueError: there is no submodule of a name (the message lists the submodules of its
            parent), or a submodule is named twice; the model has feedback points already, or an
            attribute with the name of a module to be added; it ends in probabilities, whose error
            is not that at the logits; without `points`, it has fewer than two modules with
            weights; or `rule` refuses an option.
    """
    plain = _is_plain(model)
    if points is None and not plain:
        raise TypeError(
            f"dfa_from_bp needs points for {type(model).__name__}, which is no plain nn.Sequential:"
            ' names of submodules, such as ["layer1", "layer2"]'
        )
    if isinstance(model, nn.Sequential) and not (plain and output is None):
        raise TypeError(
            "a Sequential runs all modules that are added to it: for one with a forward of its "
            "own, or with `output`, make a module that holds it"
        )
    if feedback_points(model):
        raise ValueError("this model has feedback points already")
    if hasattr(model, "dfa"):
        raise ValueError("this model has an attribute dfa, the name of the module to be added")
    result: Any = copy.deepcopy(model)
    end = result if output is None else _submodule(result, output)
    _refuse_probabilities(end)
    if points is None:
        result = _with_points(result)
    else:
        _hook_points(result, points)
    result.dfa = rule(result, **dfa_options)
    if not plain:  # a Sequential calls the DFA as its last module
        end.register_forward_hook(Hook(result.dfa), prepend=end is result)  # in its pass
    if example is not None:
        with evaluation(result, result.dfa, "dfa"), torch.enable_grad():
            result(example)
    return result


def _hook_points(model: nn.Module, points: Iterable[str] | Mapping[str, DFALayer]) -> None:
    """Puts a feedback point behind each of the named submodules."""
    if isinstance(points, str):
        raise TypeError(f"points must be a list of names, not the string {points!r}")
    given = points if isinstance(points, Mapping) else {name: DFALayer() for name in points}
    if not given:
        raise ValueError("points is empty: it must name a submodule")
    for name, options in given.items():
        if not isinstance(options, DFALayer):
            kind = type(options).__name__
            raise TypeError(f"points[{name!r}] must be a DFALayer with options, not a {kind}")
        module, point = _submodule(model, name), DFALayer(options.shared_dims, options.recurrent)
        if hooks_of(module):
            raise ValueError(f"{name} is another name of a module that has its point already")
        point.name = name
        module.register_forward_hook(Hook(point))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns a submodule; where there is none, the error lists the submodules of its parent."""
    if not isinstance(name, str):
        raise TypeError(f"points and output are names of submodules, not a {type(name).__name__}")
    module, path = model, "the model"
    for part in name.split("."):
        children = {name: child for name, child in module._modules.items() if child is not None}
        if part not in children:
            there = ", ".join(children) or "none"
            raise ValueError(f"there is no submodule {name!r}: in {path} there are {there}")
        module, path = children[part], part if module is model else f"{path}.{part}"
    return module


def _refuse_probabilities(model: nn.Module) -> None:
    """Raises ValueError if a network, as far as its modules tell, ends in probabilities."""
    modules = _flat(model)
    weighted = [i for i, module in enumerate(modules) if has_weights(module)]
    for module in modules[weighted[-1] if weighted else 0 :]:
        if isinstance(module, PROBABILITIES):
            raise ValueError(
                f"this model ends in {type(module).__name__}: DFA needs the error at the logits; "
                "leave that module out, and use a loss of logits, such as cross_entropy"
            )


def _with_points(model: nn.Sequential) -> nn.Sequential:
    """Rebuilds a Sequential with feedback points as modules in front of those with weights."""
    if sum(map(has_weights, _flat(model))) < 2:
        raise ValueError("this model has fewer than two modules with weights: nothing to feed")
    return _rebuilt(model, first=True)


def _rebuilt(model: nn.Sequential, first: bool) -> nn.Sequential:
    """Puts the points in; `first`: no module with weights is in front of `model`."""
    result = copy.copy(model)  # of its own kind, with its hooks and buffers
    result._modules = {}
    for name, module in model._modules.items():  # named_children gives a shared module once only
        if _is_plain(module):
            module = _rebuilt(module, first)
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
