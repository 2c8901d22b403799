"""Layers of `torch.nn`, made to train many networks at once, fast, with reproducible numbers.

Linear                    takes its SGD step within the backward pass
Dropout, ChannelDropout   draw from a generator of their own
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """An `nn.Linear` that can take the step of plain SGD within its backward pass.

    Where `learning_rate` is set, a backward pass in train mode does W <- W - lr (dL/dy)^T x in one
    matrix product, which adds to the weight in place, and the same for the bias. The gradient is
    not written to memory to be read again: it stays None, and an optimizer passes over it. A loss
    must then have one backward pass, and a layer one call in it.

    Attributes:
        learning_rate: None, the default, is `nn.Linear`.

    Shapes: (*, in_features) to (*, out_features).
    """

    learning_rate: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.learning_rate is None or not self.training:
            return super().forward(input)
        return _LinearStep.apply(input, self.weight, self.bias, self.learning_rate)


class _LinearStep(torch.autograd.Function):
    """F.linear; backward: the gradient for the input, and a step of the weight and the bias."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, learning_rate: float):
        ctx.save_for_backward(input)
        # Not saved for backward, where autograd would object to the step.
        ctx.weight, ctx.bias, ctx.learning_rate = weight, bias, learning_rate
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (input,) = ctx.saved_tensors
        sent = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        ctx.weight.addmm_(rows.t(), input.flatten(0, -2), alpha=-ctx.learning_rate)
        if ctx.bias is not None:
            ctx.bias.add_(rows.sum(0), alpha=-ctx.learning_rate)
        return sent, None, None, None


class Dropout(nn.Module):
    """`nn.Dropout`, drawing from a generator of its own.

    Attributes:
        generator: on the input's device; that device's default one if None.

    Shapes: any, unchanged.
    """

    generator: torch.Generator | None = None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        keep = 1 - self.p
        mask = self._mask(input).bernoulli_(keep, generator=self.generator)
        return input * mask.div_(keep)

    def _mask(self, input: Tensor) -> Tensor:
        return torch.empty_like(input)


class ChannelDropout(Dropout):
    """`nn.Dropout2d`, which drops whole channels of (N, C, H, W), from a generator of its own."""

    def _mask(self, input: Tensor) -> Tensor:
        return input.new_empty(*input.shape[:2], 1, 1)
