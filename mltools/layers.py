"""Layers of `torch.nn`, made to train many networks at once, fast, with reproducible numbers.

Linear, Conv2d            take their SGD step within the backward pass
Tanh, MaxPool2d           change places in train mode, where they follow each other
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
            return _linear(input, self.weight, self.bias)
        return _LinearStep.apply(input, self.weight, self.bias, self.learning_rate)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, which on an H100 takes about twice as long for a bias of one dimension."""
    if bias is None or input.dim() != 2:
        return F.linear(input, weight, bias)
    return torch.addmm(bias.expand(len(input), -1), input, weight.t())


class _LinearStep(torch.autograd.Function):
    """`_linear`; backward: the gradient for the input, and a step of the weight and the bias."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, learning_rate: float):
        ctx.save_for_backward(input)
        # Not saved for backward, where autograd would object to the step.
        ctx.weight, ctx.bias, ctx.learning_rate = weight, bias, learning_rate
        return _linear(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (input,) = ctx.saved_tensors
        sent = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        ctx.weight.addmm_(rows.t(), input.flatten(0, -2), alpha=-ctx.learning_rate)
        if ctx.bias is not None:
            ctx.bias.add_(rows.sum(0), alpha=-ctx.learning_rate)
        return sent, None, None, None


class Conv2d(nn.Conv2d):
    """An `nn.Conv2d`, padded with a number of zeros, that can take SGD's step as `Linear` does.

    Attributes:
        learning_rate: None, the default, is `nn.Conv2d`.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H', W').
    """

    learning_rate: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.learning_rate is None or not self.training:
            return super().forward(input)
        return _Conv2dStep.apply(input, self.weight, self.bias, self)


class _Conv2dStep(torch.autograd.Function):
    """F.conv2d; backward: the gradient for the input, and a step of the weight and the bias."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv2d):
        ctx.save_for_backward(input)
        ctx.layer = layer
        ctx.geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(input, weight, bias, *ctx.geometry)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (input,) = ctx.saved_tensors
        weight, bias, rate = ctx.layer.weight, ctx.layer.bias, ctx.layer.learning_rate
        stride, padding, dilation, groups = ctx.geometry
        # torch.nn.grad's functions do not know how the weight lies in memory, and take longer.
        sent, step, _ = torch.ops.aten.convolution_backward(
            gradient, input, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (ctx.needs_input_grad[0], True, False),
        )  # fmt: skip
        weight.add_(step, alpha=-rate)
        if bias is not None:
            bias.add_(_sums(gradient), alpha=-rate)
        return sent, None, None, None


def _sums(images: Tensor) -> Tensor:
    """Of the channels of (N, C, H, W)."""
    if not images.is_contiguous():  # channels last
        return images.sum((0, 2, 3))
    # As a product with ones: on CUDA the sum takes up to four times as long.
    pixels = images.flatten(2)
    sums = pixels.flatten(0, 1) @ pixels.new_ones(pixels.shape[2])
    return sums.view(pixels.shape[:2]).sum(0)


class Tanh(nn.Tanh):
    """An `nn.Tanh`, whose work a pooling may do.

    Args:
        pooled: whether a `MaxPool2d` with `tanh` set follows. In train mode, this layer then passes
            on its input as it is.

    Shapes: any, unchanged.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, input: Tensor) -> Tensor:
        return input if self.pooled and self.training else super().forward(input)


class MaxPool2d(nn.MaxPool2d):
    """An `nn.MaxPool2d` without padding, faster in train mode.

    Where more than two windows overlap, CUDA adds up what they send back in no fixed order; if
    PyTorch is asked for deterministic algorithms, the backward pass is that of `nn.MaxPool2d`.

    Args:
        kernel_size, stride: of the windows, in pixels.
        tanh: whether a `Tanh` with `pooled` set is in front. In train mode, this layer then does
            its work, of which less is left: the greatest tanh is that of the greatest input.

    Shapes: (N, C, H, W) to (N, C, H', W').
    """

    def __init__(self, kernel_size: int, stride: int, tanh: bool = False) -> None:
        super().__init__(kernel_size, stride)
        self.tanh = tanh

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if input.is_contiguous() and not torch.are_deterministic_algorithms_enabled():
            pooled = _MaxPool2d.apply(input, self.kernel_size, self.stride)
        else:
            pooled = super().forward(input)  # as fast with channels last
        return pooled.tanh() if self.tanh else pooled


class _MaxPool2d(torch.autograd.Function):
    """F.max_pool2d; backward: each window sends its gradient to where its maximum was."""

    @staticmethod
    def forward(ctx, input: Tensor, kernel_size: int, stride: int):
        output, index = F.max_pool2d(input, kernel_size, stride, return_indices=True)
        ctx.save_for_backward(index)
        ctx.shape = input.shape
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (index,) = ctx.saved_tensors
        sent = gradient.new_zeros(ctx.shape).flatten(2)
        sent.scatter_add_(2, index.flatten(2), gradient.flatten(2))
        return sent.view(ctx.shape), None, None


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
