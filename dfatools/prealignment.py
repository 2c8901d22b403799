"""Pre-alignment: weights whose BP gradients start aligned with the feedback."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfatools.alignment import probe
from dfatools.conversion import has_weights


@torch.no_grad()
def prealign(model: nn.Module, x: Any, y: Any, loss: Callable[[Any, Any], Tensor]) -> None:
    """Sets the weights of Linear layers so that BP through them agrees with the feedback.

        >>> bp = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
        >>> model, (x, y) = dfa_from_bp(bp), (torch.randn(128, 20), torch.randint(10, (128,)))
        >>> prealign(model, x, y, F.cross_entropy)
        >>> round(measure_alignment(model, x, y, F.cross_entropy)["1"].mean().item(), 3)
        1.0

    Works in place, from the last layer to the second. With DFA's signal S at a layer's input,
    (N, in), and the BP gradient G at its output, (N, out), on the given batch, it sets
    W^T = S^T pinv(G^T), divided by its Frobenius norm. Then G W, the BP gradient at the layer's
    input, is, up to its scale, the least-squares approximation to S. Each layer is set before the
    next one is measured. Without a feedback point directly before the layer, S is the signal that
    reaches its input in the DFA network. Tokens count as samples.

    Biases, the first module with weights and layers other than Linear are unchanged, and so are
    layers without a trained parameter before them, and layers where S or G is zero.

    Args:
        model, x, y, loss: as for `measure_alignment`.

    Raises:
        ValueError, RuntimeError: as for `measure_alignment`.
        ValueError: the model calls a Linear more than once per pass, or computes its weight
            (`torch.nn.utils.parametrize`).
    """
    _, probes = probe(model, x, y, loss)
    layers = [(name, model.get_submodule(name)) for name in probes]
    behind = [(name, layer) for name, layer in layers if has_weights(layer)][1:]
    linears = [(name, layer) for name, layer in behind if isinstance(layer, nn.Linear)]
    for name, layer in linears:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"prealign cannot set the weight of {name}: make it a plain parameter")
        if (calls := len(probes[name])) > 1:
            raise ValueError(f"prealign needs one call of {name} in a pass, not {calls}")
    for name, layer in reversed(linears):
        (call,) = probe(model, x, y, loss)[1][name]
        signal, gradient = call.dfa_input, call.bp
        if signal is None:  # no trained parameter comes before the layer
            continue
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # pinv needs float32
        gradient, signal = (tensor.flatten(0, -2) for tensor in (gradient, signal))
        noise = max(gradient.shape) * torch.finfo(gradient.dtype).eps
        weight = torch.linalg.pinv(gradient.to(dtype), rtol=noise) @ signal.to(dtype)
        if weight.any():
            layer.weight.copy_(weight / torch.linalg.matrix_norm(weight))
