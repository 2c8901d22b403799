"""Pre-alignment initialisation: weights through which BP starts out aligned with the feedback."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfatools.alignment import probe
from dfatools.conversion import has_weights


@torch.no_grad()
def prealign(model: nn.Module, x: Any, y: Any, loss: Callable[[Any, Any], Tensor]) -> None:
    """Sets the weights of the Linear layers in place, from the last to the first but one.

    With DFA's signal S at a layer's input, (N, in), and the BP gradient G at its output, (N, out),
    both on the given batch, W^T = S^T pinv(G^T), divided by its Frobenius norm. Then G W, the
    BP gradient at the layer's input, is the least-squares approximation to the direction of S. Each
    layer is set before the next is measured. S is the signal of the feedback point right before the
    layer, or where none stands there, the signal that arrives there from behind. Tokens count as
    samples. The first module with weights, layers other than Linear, layers that nothing is learned
    in front of, and those where S or G is zero keep their weights; biases are kept.

    Args:
        model, x, y, loss: as for `measure_alignment`.

    Raises:
        ValueError: the model has no `DFA` or several, uses a Linear more than once per pass, or
            computes its weight (`torch.nn.utils.parametrize`).
        RuntimeError: as for `measure_alignment`.
    """
    _, probes = probe(model, x, y, loss)
    layers = [(name, model.get_submodule(name)) for name in probes]
    _, *behind = [(name, layer) for name, layer in layers if has_weights(layer)]
    linears = [(name, layer) for name, layer in behind if isinstance(layer, nn.Linear)]
    for name, layer in linears:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"pre-alignment sets weights; {name} computes its own from others")
    for name, layer in reversed(linears):
        calls = probe(model, x, y, loss)[1][name]
        if len(calls) > 1:
            raise ValueError(f"pre-alignment needs each Linear to be used once; {name} is not")
        signal, gradient = calls[0].dfa_input, calls[0].bp
        if signal is None:  # nothing is learned before it
            continue
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # no narrower one has a pinv
        gradient, signal = (tensor.flatten(0, -2) for tensor in (gradient, signal))
        noise = max(gradient.shape) * torch.finfo(gradient.dtype).eps
        weight = torch.linalg.pinv(gradient.to(dtype), rtol=noise) @ signal.to(dtype)
        if weight.any():
            layer.weight.copy_(weight / torch.linalg.matrix_norm(weight))
