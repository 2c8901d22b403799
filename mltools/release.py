"""The 2019 release's departures from DFA and from its exact alignment, under `--protocol release`.

The published numbers depend on them. Under `--protocol corrected` there is none. The numbers below
are of CIFAR-10, 50 epochs, seed 0; `docs/results.md` has more.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfatools import DFA, BottleneckLinear, DFALayer
from mltools.layers import Dropout

PROTOCOLS = ("release", "corrected")


def missing_point(architecture: str, bottleneck: bool, blocks: int) -> int | None:
    """Returns the number of the feedback point that the release's network lacks, or None.

    The release gave two points of the CNN the same name, and lost the one before the last Linear:
    BP trains the layer in front, whose exact cosine is 1. It put no point before the bottleneck,
    since it knew Linear layers by their exact type: after 10 epochs, std-118 has 42.2 % train and
    42.1 % test accuracy (corrected: 46.7 and 44.6).
    """
    if architecture == "cnn":
        return blocks - 1
    return 1 if bottleneck else None


class FixedMaskLinear(BottleneckLinear):
    """A `BottleneckLinear` whose mask of the input's gradient is the same in each step.

    The release drew this mask once, for a batch: the i-th sample of every batch gets its i-th row.
    So pai-18 ends at 43.2 % train and 42.2 % test accuracy (with a mask drawn in each step: 42.7
    and 41.8). The copy of the network that alignment is measured against has another mask: the
    cosine at act1 of std-118 is 0.129 (exact: 0.364).

    Attributes:
        input_masks: both masks, (2, rows, in_features); a buffer, once they are drawn.
        in_copy: whether this layer belongs to that copy.
    """

    input_masks: Tensor
    in_copy = False

    def draw_input_masks(self, rows: int) -> None:
        """Draws both masks, for batches of at most that many samples."""
        masks = torch.empty(2, rows, self.in_features).bernoulli_(self.keep)
        self.register_buffer("input_masks", masks)

    def input_mask(self, gradient: Tensor) -> Tensor:
        return self.input_masks[int(self.in_copy), : len(gradient)]


def measure_release_alignment(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Measures the cosine between DFA's signal and the BP gradient as the release does.

    The BP gradient is that of a copy of the network in train mode, with dropout of its own, batch
    statistics and bottleneck masks; DFA's signal is that of the network in eval mode. The cosines
    of fc-batchnorm are 0.566, 0.445, 0.476 (exact: 0.748, 0.577, 0.603), those of
    fc-dropout-0.1-0.5 are 0.708, 0.711, 0.520 (exact: 0.811, 0.834, 0.559). The model is left in
    eval mode, and unchanged otherwise.

    Args:
        model: a network of `Network.build`.
        x, y: images and labels, (N, C, H, W) and (N,).

    Returns: `{layer: cosines}`, each (N,), for all layers that `dfatools.measure_alignment` knows.
    """
    model.eval()
    copied = copy.deepcopy(model)  # and its generator: the model's own draws nothing
    for module in copied.modules():
        if isinstance(module, (Dropout, nn.BatchNorm1d, nn.BatchNorm2d)):
            module.train()  # not Linear, which would take a step, nor Tanh, which may be pooled
        elif isinstance(module, FixedMaskLinear):
            module.in_copy = True
        elif isinstance(module, DFA):
            module.training_method = "bp"
    signals, gradients = _gradients(model, x, y), _gradients(copied, x, y)
    return {layer: floored_cosine(signals[layer], gradients[layer]) for layer in signals}


def _gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns the gradient of the mean loss, or DFA's signal, at each layer's output."""
    outputs = {}
    (dfa,) = (layer for layer in model if isinstance(layer, DFA))
    with dfa.one_pass():
        for name, layer in model.named_children():
            x = layer(x)
            if x.requires_grad and not isinstance(layer, (DFALayer, DFA)):
                outputs[name] = x
    loss = F.cross_entropy(x, y)
    return dict(zip(outputs, torch.autograd.grad(loss, [*outputs.values()])))


def floored_cosine(signal: Tensor, gradient: Tensor) -> Tensor:
    """Computes the cosine of each sample, (N,), as PyTorch did in 2019; both sides are (N, ...).

    The product of the norms was at least 1e-8, so that a confident answer counts as badly aligned.
    The cosines of std-800 are 0.962 ± 0.122, 0.887 ± 0.145, 0.668 ± 0.112 (exact: 0.976 ± 0.027,
    0.909 ± 0.038, 0.688 ± 0.015).
    """
    a, b = signal.flatten(1), gradient.flatten(1)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)
