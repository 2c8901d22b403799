"""The paper's networks, with their feedback points, for any image size and number of classes."""

from dataclasses import dataclass

import torch
from torch import nn

from dfatools import DFA, BottleneckLinear, DFALayer
from mltools.errors import UserError
from mltools.layers import ChannelDropout, Conv2d, Dropout, Linear, MaxPool2d, Tanh
from mltools.release import PROTOCOLS, FixedMaskLinear, missing_point

ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU, "leaky-relu": nn.LeakyReLU}


@dataclass(frozen=True)
class Network:
    """The description of a network, without the sizes of its input and output."""

    architecture: str = "fc"
    """`"fc"`: hidden Linear layers; `"cnn"`: three convolutions and a hidden Linear of size 128."""
    hidden: tuple[int, ...] = (800, 800, 800)
    """Sizes of the hidden layers of `"fc"`."""
    bottleneck: float | None = None
    """If not None, the second Linear of `"fc"` is a `BottleneckLinear` with this `keep`."""
    activation: str = "tanh"
    """A key of ACTIVATIONS."""
    negative_slope: float | None = None
    """Slope of `"leaky-relu"` below zero."""
    batchnorm: bool = False
    """Adds batch normalisation after each activation."""
    dropout_input: float = 0.0
    """Dropout probability of input features (FC) or channels (CNN)."""
    dropout_fc: float = 0.0
    """Dropout probability after the hidden Linear layers."""

    def build(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        protocol: str = "corrected",
        mask_rows: int = 128,
        **dfa_options,
    ) -> nn.Sequential:
        """Builds the network on the CPU, with all random values from the default generator.

        Its modules are named `lin1`, `conv1`, `act1`, `bn1`, `drop1`, `maxp1`, `flat`, `point1`
        (the feedback point after block 1), ..., and `dfa`.

        Args:
            input_shape: (channels, height, width) of an image.
            classes: size of the output.
            protocol: `"corrected"` for a feedback point after each hidden block; `"release"` for
                the network of the 2019 release, see `mltools.release`.
            mask_rows: the largest batch size, for the bottleneck's fixed masks under `"release"`.
            dfa_options: keyword arguments of `dfatools.DFA`.

        Raises UserError if the CNN's images are too small, ValueError for an unknown protocol.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, not {protocol!r}")
        blocks = {"fc": self._fc, "cnn": self._cnn}[self.architecture](input_shape, classes)
        points = {*range(1, len(blocks))}
        if protocol == "release":
            missing = missing_point(self.architecture, self.bottleneck is not None, len(blocks))
            points.discard(missing)
        if self.bottleneck is not None:
            inputs, outputs = self.hidden[:2]
            kind = FixedMaskLinear if protocol == "release" else BottleneckLinear
            blocks[1]["lin2"] = kind(inputs, outputs, self.bottleneck)
        model = nn.Sequential()
        for i, block in enumerate(blocks):
            if i in points:
                model.add_module(f"point{i}", DFALayer())
            for name, module in block.items():
                if module is not None:
                    model.add_module(name, module)
        model.add_module("dfa", DFA(model, **dfa_options))
        model.eval()(torch.zeros(1, *input_shape))  # draws the feedback matrix
        for layer in model:
            if isinstance(layer, FixedMaskLinear):
                layer.draw_input_masks(mask_rows)  # last: both protocols get the same weights
        return model.train()

    def multiply_adds(self, input_shape: tuple[int, int, int], classes: int) -> int:
        """Returns the multiply-adds of a forward pass on one image. Raises as `build` does."""
        x, count = torch.zeros(1, *input_shape), 0
        with torch.no_grad():
            for layer in self.build(input_shape, classes).eval():
                x = layer(x)
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    count += layer.weight.numel() * x[0, 0].numel()
        return count

    def _fc(self, input_shape: tuple[int, int, int], classes: int) -> list[dict]:
        sizes = [torch.Size(input_shape).numel(), *self.hidden]
        blocks = [
            {f"lin{i}": Linear(sizes[i - 1], sizes[i]), **self._hidden(i, sizes[i])}
            for i in range(1, len(sizes))
        ]
        blocks[0] = {"flat": nn.Flatten(), "drop0": _dropout(self.dropout_input), **blocks[0]}
        return [*blocks, {f"lin{len(sizes)}": Linear(sizes[-1], classes)}]

    def _cnn(self, input_shape: tuple[int, int, int], classes: int) -> list[dict]:
        channels, *image = input_shape
        for _ in range(3):
            image = [(side - 3) // 2 + 1 for side in image]
        if min(image) < 1:
            raise UserError(
                f"images of {input_shape[1]}x{input_shape[2]} are too small for the CNN's three "
                "poolings: at least 15x15 is needed; use the fc experiments, or upsample"
            )
        sizes = [channels, 32, 64, 64]
        pooled = self.activation == "tanh" and not self.batchnorm  # Tanh is right before pooling
        blocks = [
            {
                f"conv{i}": Conv2d(sizes[i - 1], sizes[i], kernel_size=5, padding=2),
                f"act{i}": Tanh(pooled=True) if pooled else self._activation(),
                f"bn{i}": nn.BatchNorm2d(sizes[i]) if self.batchnorm else None,
                f"maxp{i}": MaxPool2d(kernel_size=3, stride=2, tanh=pooled),
            }
            for i in range(1, len(sizes))
        ]
        blocks[0] = {"drop0": _dropout(self.dropout_input, ChannelDropout), **blocks[0]}
        features = sizes[-1] * image[0] * image[1]
        blocks[-1]["flat"] = nn.Flatten()
        hidden = {"lin1": Linear(features, 128), **self._hidden(4, 128)}
        return [*blocks, hidden, {"lin2": Linear(128, classes)}]

    def _hidden(self, i: int, size: int) -> dict:
        """Returns the modules between the hidden Linear of block `i` and the next block."""
        return {
            f"drop{i}": _dropout(self.dropout_fc),
            f"act{i}": self._activation(),
            f"bn{i}": nn.BatchNorm1d(size) if self.batchnorm else None,
        }

    def _activation(self) -> nn.Module:
        slope = {} if self.negative_slope is None else {"negative_slope": self.negative_slope}
        return ACTIVATIONS[self.activation](**slope)


def _dropout(probability: float, kind: type[Dropout] = Dropout) -> Dropout | None:
    return kind(probability) if probability > 0 else None
