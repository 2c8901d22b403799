"""Layers of `torch.nn`, adapted to train many networks at once, fast and reproducibly.

Linear, Conv2d            can do their SGD step in the backward pass
Tanh, MaxPool2d           can swap their order in train mode, if pooling follows Tanh
Dropout, ChannelDropout   can draw from a generator of their own
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """An `nn.Linear` that can do its step of plain SGD in the backward pass.

    If `lr`, the learning rate, is not None, a backward pass in train mode computes
    W <- W - lr (dL/dy)^T x in place, in one matrix product, and updates the bias likewise. No
    gradient is written to memory: `weight.grad` stays None, and an optimizer skips the weight. The
    layer must then be called once per forward pass, and the loss have one backward pass.

    Shapes: (*, in_features) to (*, out_features).
    """

    lr: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lr is None or not self.training:
            return _linear(input, self.weight, self.bias)
        return _LinearStep.apply(input, self.weight, self.bias, self.lr)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `F.linear`, in about half of its time on an H100, with an expanded bias."""
    if bias is None or input.dim() != 2:
        return F.linear(input, weight, bias)
    return torch.addmm(bias.expand(len(input), -1), input, weight.t())


class _LinearStep(torch.autograd.Function):
    """`_linear`, whose backward pass returns `grad_input` and updates the weight and the bias."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, lr: float):
        ctx.save_for_backward(input)
        # Not by save_for_backward: autograd refuses saved tensors after a change in place.
        ctx.weight, ctx.bias, ctx.lr = weight, bias, lr
        return _linear(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (input,) = ctx.saved_tensors
        grad_input = grad_output @ ctx.weight if ctx.needs_input_grad[0] else None
        rows = grad_output.flatten(0, -2)
        ctx.weight.addmm_(rows.t(), input.flatten(0, -2), alpha=-ctx.lr)
        if ctx.bias is not None:
            ctx.bias.add_(rows.sum(0), alpha=-ctx.lr)
        return grad_input, None, None, None


class Conv2d(nn.Conv2d):
    """An `nn.Conv2d` that can do its SGD step like `Linear`, for zero padding given in pixels.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H', W').
    """

    lr: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.lr is None or not self.training:
            return super().forward(input)
        return _Conv2dStep.apply(input, self.weight, self.bias, self)


class _Conv2dStep(torch.autograd.Function):
    """`F.conv2d`, whose backward pass returns `grad_input` and updates the weight and the bias."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv2d):
        ctx.save_for_backward(input)
        ctx.layer = layer
        ctx.geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(input, weight, bias, *ctx.geometry)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (input,) = ctx.saved_tensors
        weight, bias, lr = ctx.layer.weight, ctx.layer.bias, ctx.layer.lr
        stride, padding, dilation, groups = ctx.geometry
        # torch.nn.grad's functions ignore the weight's memory format, and are slower.
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output, input, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (ctx.needs_input_grad[0], True, False),
        )  # fmt: skip
        weight.add_(grad_weight, alpha=-lr)
        if bias is not None:
            bias.add_(_channel_sums(grad_output), alpha=-lr)
        return grad_input, None, None, None


def _channel_sums(images: Tensor) -> Tensor:
    """Sums (N, C, H, W) over samples and pixels, to (C,)."""
    if not images.is_contiguous():  # channels last
        return images.sum((0, 2, 3))
    # A matrix product with ones: on CUDA, `sum` takes up to four times as long.
    pixels = images.flatten(2)
    sums = pixels.flatten(0, 1) @ pixels.new_ones(pixels.shape[2])
    return sums.view(pixels.shape[:2]).sum(0)


class Tanh(nn.Tanh):
    """An `nn.Tanh` that can leave its work to the pooling layer after it.

    Args:
        pooled: True if a `MaxPool2d` with `tanh` set follows. In train mode, this layer then
            returns its input.

    Shapes: any, unchanged.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, input: Tensor) -> Tensor:
        return input if self.pooled and self.training else super().forward(input)


class MaxPool2d(nn.MaxPool2d):
    """An `nn.MaxPool2d` without padding, faster in train mode.

    Where more than two windows overlap, CUDA adds their gradients in no fixed order. Under
    `torch.use_deterministic_algorithms`, it therefore uses the backward pass of `nn.MaxPool2d`.

    Args:
        kernel_size, stride: size and distance of the windows, in pixels.
        tanh: True if a `Tanh` with `pooled` set precedes. In train mode, this layer then applies
            tanh to its output, which is smaller than the input: max(tanh(x)) = tanh(max(x)).

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
            pooled = super().forward(input)  # as fast for channels last
        return pooled.tanh() if self.tanh else pooled


class _MaxPool2d(torch.autograd.Function):
    """`F.max_pool2d`, whose backward pass adds each window's gradient at the window's maximum."""

    @staticmethod
    def forward(ctx, input: Tensor, kernel_size: int, stride: int):
        output, index = F.max_pool2d(input, kernel_size, stride, return_indices=True)
        ctx.save_for_backward(index)
        ctx.shape = input.shape
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (index,) = ctx.saved_tensors
        grad_input = grad_output.new_zeros(ctx.shape).flatten(2)
        grad_input.scatter_add_(2, index.flatten(2), grad_output.flatten(2))
        return grad_input.view(ctx.shape), None, None


class Dropout(nn.Dropout):
    """An `nn.Dropout` that draws from `generator`; None means the device's default generator."""

    generator: torch.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        keep = 1 - self.p
        mask = self._mask(input).bernoulli_(keep, generator=self.generator)
        return input * mask.div_(keep or 1)  # else p = 1 would give 0 / 0

    def _mask(self, input: Tensor) -> Tensor:
        return torch.empty_like(input)


class ChannelDropout(Dropout):
    """An `nn.Dropout2d`, which drops whole channels of (N, C, H, W), with a `generator`."""

    def _mask(self, input: Tensor) -> Tensor:
        return input.new_empty(*input.shape[:2], 1, 1)
