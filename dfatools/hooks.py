"""Forward hooks that insert a feedback point, or the DFA, after a module of any network."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn


class Hook:
    """Forward hook: sends the first floating-point tensor of an output through another module.

    Args:
        place: the feedback point, or the `DFA`; a new `DFA` of the network replaces the old one.
    """

    def __init__(self, place: nn.Module) -> None:
        self.place = place

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        sent = _with_first_tensor(output, self.place)
        if sent is None:
            raise TypeError(
                f"a {type(module).__name__} returns a {type(output).__name__} without a "
                "floating-point tensor for its feedback point or the DFA: name another submodule"
            )
        return sent


def hooks_of(module: nn.Module) -> list[Hook]:
    """Returns the `Hook`s of a module."""
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Hook)]


def _with_first_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns `output` with its first floating-point tensor changed; None if there is none."""
    if output is None:  # PyTorch 2.11 cannot compile is_dataclass(None)
        return None
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else None
    kind: Any = type(output)
    parts: dict[Any, Any]
    if is_dataclass(kind):  # as in transformers
        parts = {field.name: getattr(output, field.name) for field in fields(output) if field.init}
    elif isinstance(output, Mapping):
        parts = {**output}
    elif isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    else:
        return None
    for key, part in parts.items():
        changed = _with_first_tensor(part, change)
        if changed is None:
            continue
        parts[key] = changed
        if is_dataclass(kind):
            return replace(output, **parts)
        if isinstance(output, Mapping):
            return kind(parts)
        return kind(*parts.values()) if hasattr(kind, "_fields") else kind(parts.values())
    return None
