"""The gradient bottleneck: a Linear layer that masks its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BottleneckLinear(nn.Linear):
    """Linear layer whose backward pass keeps each gradient entry with probability `keep`.

        >>> layer = BottleneckLinear(64, 64, keep=0.1)
        >>> layer(torch.randn(8, 64)).sum().backward()
        >>> torch.equal(layer.weight.grad != 0, layer.weight_mask.bool())
        True

    The forward pass equals `nn.Linear`'s. The masks of `grad_weight` and `grad_bias` are drawn once
    and kept as buffers; the mask of `grad_input` is drawn in each backward pass, by `input_mask`.

    Args:
        in_features, out_features, bias: as for `nn.Linear`.
        keep: the probability, from 0 to 1.
        generator: draws the masks in the buffers, on the CPU; by default the default generator.

    Attributes:
        input_generator: draws the masks of `grad_input`, on its device; None for the device's
            default generator.
        masking: False to keep all gradient entries, see `unmasked`.

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
        """Draws the mask of `grad_input`: 0 or 1 for each entry."""
        mask = torch.empty_like(gradient)
        return mask.bernoulli_(self.keep, generator=self.input_generator)


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Context manager that switches off the masks of a model, for true BP gradients."""
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
