"""The gradient bottleneck: a Linear layer that masks its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BottleneckLinear(nn.Linear):
    """A Linear whose backward pass keeps each gradient entry with a given probability.

    The forward pass is that of `nn.Linear`. Which entries of the weight's and the bias's gradient
    are kept is drawn once; the masks are buffers. Of the gradient with respect to the input, the
    entries are drawn anew in each backward pass, by `input_mask`.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
        keep: the probability, in 0..1.
        generator: draws the masks that are buffers, on the CPU; the default one if None.

    Attributes:
        input_generator: draws what is kept of the gradient with respect to the input, on that
            tensor's device; the device's default one if None.
        masking: False lets whole gradients through, see `unmasked`.

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
        self.masking = True
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
        weight = _Mask.apply(self.weight, self, self.weight_mask)
        bias = None if self.bias is None else _Mask.apply(self.bias, self, self.bias_mask)
        return F.linear(_Mask.apply(input, self, None), weight, bias)

    def input_mask(self, gradient: Tensor) -> Tensor:
        """Draws the mask, 0 or 1 for each entry, of the gradient with respect to the input."""
        mask = torch.empty_like(gradient)
        return mask.bernoulli_(self.keep, generator=self.input_generator)


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Lets whole gradients through the bottlenecks of a model, so that BP's are the true ones."""
    layers = [m for m in model.modules() if isinstance(m, BottleneckLinear) and m.masking]
    try:
        for layer in layers:
            layer.masking = False
        yield
    finally:
        for layer in layers:
            layer.masking = True


class _Mask(torch.autograd.Function):
    """Identity; backward: multiplies the gradient by the mask, or by the layer's `input_mask`."""

    @staticmethod
    def forward(ctx, tensor: Tensor, layer: BottleneckLinear, mask: Tensor | None) -> Tensor:
        ctx.layer, ctx.mask = layer, mask
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if not ctx.layer.masking:
            return gradient, None, None
        mask = ctx.layer.input_mask(gradient) if ctx.mask is None else ctx.mask
        return gradient * mask, None, None
