"""Conversion of a network for backpropagation to one for Direct Feedback Alignment."""

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
    """Returns a copy of an ordinary network, made into a DFA network.

        >>> bp = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
        >>> dfa_from_bp(bp)
        Sequential(
          (0): Linear(in_features=20, out_features=64, bias=True)
          (1): Tanh()
          (feedback_2): DFALayer()
          (2): Linear(in_features=64, out_features=10, bias=True)
          (dfa): DFA(1 layers, normalization=True, reduction='mean', training_method='dfa')
        )
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> dfa_from_bp(encoder, ["layers.0"], batch_dims=2).dfa.layers
        (DFALayer(),)

    An `nn.Sequential` needs no `points`. It gets a feedback point before every module with weights
    except the first, in nested Sequentials too, and the `DFA` as its last module. Parameters of
    normalisation layers and PReLU do not count as weights. Any other module with weights inside,
    for example a residual block, counts as one layer: BP trains its inside. The point before
    module `m` is a module of the Sequential, called `feedback_m`.

    Any other network gets a feedback point after each submodule named in `points`, by a forward
    hook. Its code, its names and the keys of its `state_dict` stay the same; the submodule `dfa`
    and the key `dfa.feedback_matrix` are new. The `DFA` is applied to the model's output. Of a
    tuple, a list, a mapping or a dataclass, a point and the `DFA` use the first floating-point
    tensor; the other tensors are not detached. A first pass that does not call all named submodules
    raises RuntimeError (a compiled first pass is not checked).

    Args:
        model: the network; the result has the same input and output.
        points: names of submodules, as in `model.named_modules()`, or `{name: DFALayer(...)}` with
            the options of each point. Optional for a Sequential.
        example: a batch, the model's one argument. One pass of it, in eval mode, draws the feedback
            matrix at once; by default, the first training pass draws it.
        output: name of the submodule that computes the logits, if the model itself returns a loss
            or probabilities; the `DFA` is applied to its output.
        rule: the class of the `DFA`.
        dfa_options: the keyword arguments of `rule`.

    Raises:
        TypeError: `points` or `output` has a wrong type; `points` is missing, and the model is no
            Sequential; or the model is a Sequential with its own `forward`, or with `output`.
        ValueError: `points` is empty; a named submodule does not exist (the message lists the
            existing ones), or has two names in `points`; the model has feedback points already, or
            an attribute with the name of an added module; as a Sequential, it ends in a softmax or
            sigmoid, so that the error at its output is not the error at the logits; without
            `points`, it has fewer than two modules with weights; or `rule` refuses an option.
    """
    plain = _is_plain(model)
    if points is None and not plain:
        raise TypeError(
            f"dfa_from_bp needs points for a {type(model).__name__}, which is no plain Sequential: "
            'give names of submodules, such as ["layer1", "layer2"]'
        )
    if isinstance(model, nn.Sequential) and not (plain and output is None):
        raise TypeError(
            "a Sequential would run the added DFA as its last module: to use `output`, or a "
            "Sequential with its own forward, wrap it in a module"
        )
    if feedback_points(model):
        raise ValueError("this model has feedback points already: give the BP network")
    if hasattr(model, "dfa"):
        raise ValueError("this model has an attribute dfa, the name of the added module: rename it")
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
    """Adds a feedback point after each named submodule."""
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
            raise ValueError(f"{name} is a second name of one submodule: give one of its names")
        point.name = name
        module.register_forward_hook(Hook(point))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns a submodule; raises an error that lists the existing ones."""
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
    """Raises ValueError if a softmax or sigmoid follows the last weights of a Sequential."""
    modules = _flat(model)
    weighted = [i for i, module in enumerate(modules) if has_weights(module)]
    for module in modules[weighted[-1] if weighted else 0 :]:
        if isinstance(module, PROBABILITIES):
            raise ValueError(
                f"this model ends in {type(module).__name__}, but DFA needs the error at the "
                "logits: remove that module, and use a loss of logits, such as cross_entropy"
            )


def _with_points(model: nn.Sequential) -> nn.Sequential:
    """Rebuilds a Sequential with a feedback point before each module with weights but the first."""
    if sum(map(has_weights, _flat(model))) < 2:
        raise ValueError("this model has fewer than two modules with weights: DFA needs two")
    return _rebuilt(model, first=True)


def _rebuilt(model: nn.Sequential, first: bool) -> nn.Sequential:
    """Returns a copy with feedback points; `first` is True if no weights precede `model`."""
    result = copy.copy(model)  # keeps its class, hooks and buffers
    result._modules = {}
    for name, module in model._modules.items():  # named_children omits repeated modules
        if _is_plain(module):
            module = _rebuilt(module, first)
        elif has_weights(module) and not first:
            point = f"feedback_{name}"
            if point in model._modules:
                raise ValueError(f"{point} is the name of an added point: rename the module")
            result.add_module(point, DFALayer())
        first = first and not has_weights(module)
        result.add_module(name, module)
    return result


def _flat(model: nn.Module) -> list[nn.Module]:
    """Returns the modules in the order of their calls, with nested Sequentials unpacked."""
    if not _is_plain(model):
        return [model]
    return [module for child in model._modules.values() for module in _flat(child)]


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Returns whether a module is a Sequential with nn.Sequential's own forward."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_weights(module: nn.Module) -> bool:
    """Returns whether a module has parameters outside of normalisation layers and PReLU."""
    own = (part for part in module.modules() if not isinstance(part, NORMS))
    return any(True for part in own for _ in part.parameters(recurse=False))
