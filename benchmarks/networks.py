"""Ten networks of the kinds that the literature trains by Direct Feedback Alignment.

    from networks import NETWORKS
    entry = NETWORKS["gcn"]
    bp, (x, y) = entry.build(), entry.batch()
    entry.loss(entry.to_dfa(bp)(x), y).backward()

Each network is written for backpropagation. `Entry.to_dfa` places feedback points after its hidden
blocks; the output layer follows the last point. All data are random.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfatools import DFALayer, dfa_from_bp


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    """Builds the network for backpropagation."""
    batch: Callable[[], tuple[Tensor, Tensor]]
    """Draws a batch: inputs and targets."""
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    """Computes the loss from the network's output and the targets."""
    points: tuple[str, ...] | None = None
    """Submodules followed by a feedback point; None for the default points of an nn.Sequential."""
    shared_dims: tuple[int, ...] = ()
    """Dimensions of the activations whose positions all get the same signal."""
    batch_dims: int = 1
    """Leading dimensions that the output and the activations share."""

    def to_dfa(self, model: nn.Module) -> nn.Module:
        """Returns a DFA network made from a copy of `model`, a network of `build`."""
        if self.points is None:
            return dfa_from_bp(model, batch_dims=self.batch_dims)
        points = {name: DFALayer(shared_dims=self.shared_dims) for name in self.points}
        return dfa_from_bp(model, points, batch_dims=self.batch_dims)


def fc(hidden_layers: int) -> nn.Sequential:
    sizes = [3072] + [800] * hidden_layers
    blocks = [(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*(module for block in blocks for module in block), nn.Linear(800, 10))


def cnn() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 5, padding=2), nn.Tanh(), nn.MaxPool2d(3, 2)

    head = nn.Flatten(), nn.Linear(576, 128), nn.Tanh(), nn.Linear(128, 10)
    return nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 64), *head)


def convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3, 1)
        self.shortcut = nn.Identity() if stride == 1 else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Builds a ResNet-18 for images of 32 x 32, with a quarter of the channels."""
    channels = [16, 16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [ResidualBlock(a, b, 1 if a == b else 2) for a, b in zip(channels, channels[1:])]
    model = nn.Sequential()
    model.stem = nn.Sequential(convolution(3, 16, 3, 1), nn.ReLU())
    model.blocks = nn.Sequential(*blocks)
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.head = nn.Linear(128, 10)
    return model


class Transformer(nn.Module):
    """Transformer, tokens (N, length) to scores: (N, length, outputs) if causal, else (N, outputs).

    Causal blocks have pre-norm, other blocks have post-norm.
    """

    def __init__(self, causal: bool, outputs: int, length: int = 64, width: int = 128) -> None:
        super().__init__()
        self.causal = causal
        self.word, self.place = nn.Embedding(1000, width), nn.Embedding(length, width)
        self.embedded = nn.Identity()  # the place of a feedback point
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", 1e-5, True, causal)
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(width) if causal else nn.Identity()
        self.head = nn.Linear(width, outputs)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(self.word(tokens) + self.place.weight)
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=self.causal)
        x = self.norm(x)
        return self.head(x if self.causal else x.mean(1))


def summed(messages: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Sums the messages of the edges, (edges, ...), at their target nodes: (nodes, ...)."""
    return messages.new_zeros(nodes, *messages.shape[1:]).index_add(0, target, messages)


class GraphConvolution(nn.Linear):
    """Graph convolution: sums neighbours' features, each over the root of both nodes' degrees."""

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        scale = summed(x.new_ones(len(target), 1), target, len(x)).rsqrt()
        return scale * summed((scale * super().forward(x))[source], target, len(x))


class GraphAttention(nn.Module):
    """Graph attention: softmax-weighted mean of neighbours' features, (nodes, heads * outputs)."""

    def __init__(self, inputs: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, heads * outputs)
        self.by_source = nn.Parameter(0.1 * torch.randn(heads, outputs))
        self.by_target = nn.Parameter(0.1 * torch.randn(heads, outputs))

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = self.linear(x).unflatten(1, self.by_source.shape)
        scores = (h * self.by_source).sum(2)[source] + (h * self.by_target).sum(2)[target]
        scores = F.leaky_relu(scores, 0.2).unsqueeze(2)
        weights = (scores - scores.detach().amax(0)).exp()
        total = summed(weights, target, len(x))
        return (summed(h[source] * weights, target, len(x)) / total).flatten(1)


class GraphNetwork(nn.Module):
    """Two graph layers on a fixed random graph of Cora's size: 2,708 nodes, 5,278 edges."""

    def __init__(self, first: nn.Module, activation: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = first, activation, last
        pairs, loops = torch.randint(2708, (2, 5278)), torch.arange(2708).expand(2, -1)
        self.edges = nn.Buffer(torch.cat([pairs, pairs.flip(0), loops], 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x, *self.edges))
        return self.last(hidden, *self.edges)


class DeepFM(nn.Module):
    """Factorisation machine and FC network on shared embeddings: indices (N, fields) to (N, 1)."""

    def __init__(self, fields: int = 39, size: int = 10, width: int = 400) -> None:
        super().__init__()
        values = fields * 1000  # number of embeddings, over all fields
        self.first_order = nn.Embedding(values, 1)
        self.embedding = nn.Embedding(values, size)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.flat = nn.Flatten()
        self.mlp = nn.Sequential(
            nn.Linear(fields * size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        v = self.embedding(x)  # (N, fields, size)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True) / 2
        return self.first_order(x).sum(1) + pairs + self.mlp(self.flat(v))


class NeRF(nn.Module):
    """NeRF: encodings of points, 3 + 3 * 2 * 10 numbers each, to colour and density, (N, 4)."""

    def __init__(self, inputs: int = 63, width: int = 256) -> None:
        super().__init__()
        sizes = [inputs, *[width] * 4, width + inputs, *[width] * 2]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in sizes)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for i, layer in enumerate(self.layers):
            hidden = layer(torch.cat([hidden, x], 1) if i == 5 else hidden)
        return self.head(hidden)


NETWORKS = {
    # The two networks of the 2019 paper, and a deeper one.
    "fc": Entry(lambda: fc(3), lambda: (torch.randn(128, 3072), torch.randint(10, (128,)))),
    "cnn": Entry(cnn, lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,)))),
    "deep": Entry(lambda: fc(10), lambda: (torch.randn(128, 3072), torch.randint(10, (128,)))),
    "resnet": Entry(
        resnet,
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
        points=("stem", *(f"blocks.{i}" for i in range(7)), "pool"),
    ),
    # The last point follows the final norm, not the last block.
    "language": Entry(
        lambda: Transformer(causal=True, outputs=1000),
        lambda: (torch.randint(1000, (8, 64)), torch.randint(1000, (8, 64))),
        lambda output, words: F.cross_entropy(output.flatten(0, 1), words.flatten()),
        points=("embedded", "blocks.0", "blocks.1", "blocks.2", "norm"),
        batch_dims=2,
    ),
    "encoder": Entry(
        lambda: Transformer(causal=False, outputs=10),
        lambda: (torch.randint(1000, (8, 64)), torch.randint(10, (8,))),
        points=("embedded", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
        shared_dims=(1,),
    ),
    "gcn": Entry(
        lambda: GraphNetwork(GraphConvolution(1433, 16), nn.ReLU(), GraphConvolution(16, 7)),
        lambda: (torch.randn(2708, 1433), torch.randint(7, (140,))),
        lambda output, y: F.cross_entropy(output[: len(y)], y),  # the other nodes have no label
        points=("activation",),
    ),
    "gat": Entry(
        lambda: GraphNetwork(GraphAttention(1433, 8, 8), nn.ELU(), GraphAttention(64, 1, 7)),
        lambda: (torch.randn(2708, 1433), torch.randint(7, (140,))),
        lambda output, y: F.cross_entropy(output[: len(y)], y),
        points=("activation",),
    ),
    # The first point is on the path from the embeddings to the fully connected layers only. So the
    # embeddings get feedback for this path, and true gradients through the factorisation machine,
    # which is an output layer to them.
    "deepfm": Entry(
        DeepFM,
        lambda: (torch.randint(39 * 1000, (2048, 39)), torch.rand(2048, 1).round()),
        F.binary_cross_entropy_with_logits,
        points=("flat", "mlp.1", "mlp.3", "mlp.5"),
    ),
    "nerf": Entry(
        NeRF,
        lambda: (torch.randn(4096, 63), torch.rand(4096, 4)),
        F.mse_loss,
        points=tuple(f"layers.{i}" for i in range(8)),
    ),
}
