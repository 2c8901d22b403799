"""The gradient bottleneck: a layer that lets only part of its gradients through (Section 4)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BottleneckLinear(nn.Linear):
    """A Linear whose backward pass keeps each gradient entry with a given probability.

    The forward pass is that of `nn.Linear`. Which entries of the weight's and the bias's gradient
    are kept is drawn once; the masks are buffers. Of the gradient with respect to the input, the
    entries, one for each sample and feature, are drawn anew in each backward pass.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
        keep: the probability, in 0..1.
        generator: draws the masks that are buffers, on the CPU; the default one if None.

    Attributes:
        input_generator: draws what is kept of the gradient with respect to the input, on that
            tensor's device; the device's default one if None.
        thinning: False lets everything through, see `unthinned`.

    Raises ValueError for a `keep` outside 0..1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keep: float,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if not 0 <= keep <= 1:
            raise ValueError(f"keep is a probability, from 0 to 1, not {keep}")
        self.keep = keep
        self.thinning = True
        self.input_generator: torch.Generator | None = None
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            mask = None
            if parameter is not None:
                mask = torch.empty(parameter.shape).bernoulli_(keep, generator=generator)
            self.register_buffer(f"{name}_mask", mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}"

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) to (*, out_features)."""
        weight = _Thin.apply(self.weight, self, self.weight_mask)
        bias = None if self.bias is None else _Thin.apply(self.bias, self, self.bias_mask)
        return F.linear(_Thin.apply(input, self, None), weight, bias)


@contextmanager
def unthinned(model: nn.Module) -> Iterator[None]:
    """Lets whole gradients through the bottlenecks of a model, so that BP's are the true ones."""
    layers = [m for m in model.modules() if isinstance(m, BottleneckLinear) and m.thinning]
    try:
        for layer in layers:
            layer.thinning = False
        yield
    finally:
        for layer in layers:
            layer.thinning = True


class _Thin(torch.autograd.Function):
    """Identity; backward: keeps the gradient where the mask is 1. Without a mask, one is drawn."""

    @staticmethod
    def forward(ctx, tensor: Tensor, layer: BottleneckLinear, mask: Tensor | None) -> Tensor:
        ctx.layer, ctx.mask = layer, mask
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if not ctx.layer.thinning:
            return gradient, None, None
        mask = ctx.mask
        if mask is None:
            mask = torch.empty_like(gradient)
            mask.bernoulli_(ctx.layer.keep, generator=ctx.layer.input_generator)
        return gradient * mask, None, None
