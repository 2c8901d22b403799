"""The 2019 release's departures from DFA and from its exact alignment, for `--protocol release`.

The published numbers depend on these departures; `--protocol corrected` has none of them. The
numbers below are from CIFAR-10, seed 0, 50 epochs or as stated; `docs/results.md` has more.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfatools import DFA, BottleneckLinear, DFALayer
from mltools.layers import Dropout

PROTOCOLS = ("release", "corrected")


def missing_point(architecture: str, bottleneck: bool, blocks: int) -> int | None:
    """Returns the number of the feedback point missing from the release's network, or None.

    In its CNN, two points had the same name, and the point before the last Linear was lost. So BP
    trains the hidden Linear, whose exact cosine is 1. The release recognised Linear layers by
    their exact type, so it put no point before the bottleneck layer. As a result, std-118 has
    42.2 % train and 42.1 % test accuracy after 10 epochs (corrected: 46.7 and 44.6).
    """
    if architecture == "cnn":
        return blocks - 1
    return 1 if bottleneck else None


class FixedMaskLinear(BottleneckLinear):
    """A `BottleneckLinear` whose mask of `grad_input` is the same in each step.

    The release drew this mask once: row i masks the i-th sample of every batch. With this mask,
    pai-18 ends at 43.2 % train and 42.2 % test accuracy (with a mask drawn in each step: 42.7 and
    41.8). Alignment was measured against a copy of the network, which had another mask: the cosine
    at act1 of std-118 is 0.129 (exact: 0.364).

    Attributes:
        input_masks: the masks of the network and of its copy, a buffer (2, rows, in_features).
        in_copy: True if this layer belongs to the copy.
    """

    input_masks: Tensor
    in_copy = False

    def draw_input_masks(self, rows: int) -> None:
        """Draws both masks, for batches of at most `rows` samples."""
        masks = torch.empty(2, rows, self.in_features).bernoulli_(self.keep)
        self.register_buffer("input_masks", masks)

    def input_mask(self, gradient: Tensor) -> Tensor:
        return self.input_masks[int(self.in_copy), : len(gradient)]


def measure_release_alignment(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Measures the cosines between DFA's signals and the BP gradients as the release does.

    The BP gradients are from a copy of the network in train mode, with its own dropout, batch
    statistics and bottleneck masks; DFA's signals are from the network in eval mode. The cosines of
    fc-batchnorm are 0.566, 0.445, 0.476 (exact: 0.748, 0.577, 0.603). The cosines of
    fc-dropout-0.1-0.5 are 0.708, 0.711, 0.520 (exact: 0.811, 0.834, 0.559). The model is left in
    eval mode, otherwise unchanged.

    Args:
        model: a network of `Network.build`.
        x, y: images and labels, (N, C, H, W) and (N,).

    Returns: `{layer: cosines}`, each (N,), for the layers of `dfatools.measure_alignment`.
    """
    model.eval()
    copied = copy.deepcopy(model)  # with its generators, so the model's own keep their state
    for module in copied.modules():
        if isinstance(module, (Dropout, nn.BatchNorm1d, nn.BatchNorm2d)):
            module.train()  # not Linear, which would do its SGD step, nor a pooled Tanh
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
    """Returns the cosine of each sample, (N,), for arguments (N, ...), as in PyTorch of 2019.

    The product of the norms is raised to at least 1e-8. A confident, correct answer has a tiny
    gradient, and so counts as badly aligned. The cosines of std-800 are 0.962 ± 0.122,
    0.887 ± 0.145, 0.668 ± 0.112 (exact: 0.976 ± 0.027, 0.909 ± 0.038, 0.688 ± 0.015).
    """
    a, b = signal.flatten(1), gradient.flatten(1)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)
