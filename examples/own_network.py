"""Trains a small ResNet by Direct Feedback Alignment (DFA) and by backpropagation.

    python examples/own_network.py
    python examples/own_network.py --epochs 2 --output quick.png

Results on the embedded digits: 15 epochs, seed 0, one run each, about 20 seconds on one CPU core:

    test accuracy    backpropagation 99.7 %, DFA 97.0 %, last layer only 90.9 %
    mean cosine      stem 0.00, block1 0.02, block2 0.17, block3 0.80 (each at its last activation)

Comments (1) to (4) mark the additions that turn a network into a DFA network; docs/own-network.md
explains them. The figure shows the test accuracy of the three training methods, and the alignment
of each layer during training by DFA.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfatools import DFA, DFALayer, measure_alignment
from mltools.data import DataSet, Loader, TrainingLoader, load_dataset
from mltools.errors import show
from mltools.results import user_path

matplotlib.use("Agg")  # writes files without a display
from matplotlib import pyplot as plt

METHODS = {  # label and line style, distinguishable in greyscale
    "bp": ("Backpropagation", {"color": "black", "linestyle": "--", "marker": "s"}),
    "dfa": ("DFA", {"color": "#d1711a", "marker": "o"}),
    "shallow": ("Last layer only", {"color": "#808080", "linestyle": ":", "marker": "^"}),
}


class Block(nn.Module):
    """Residual block: Tanh of the sum of two convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.Tanh()
        self.point = DFALayer()  # (1) make a feedback point for each hidden activation,
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.act2 = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(self.act1(self.norm1(self.conv1(x))))  # (2) call it there,
        return self.act2(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet(nn.Module):
    """Residual network: images (N, 1, 32, 32) to class scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 4, stride=4), nn.Tanh(), DFALayer())
        self.block1 = nn.Sequential(Block(16, 16, 1), DFALayer())
        self.block2 = nn.Sequential(Block(16, 32, 2), DFALayer())
        self.block3 = nn.Sequential(
            Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), DFALayer()
        )
        self.head = nn.Linear(64, 10)
        self.dfa = DFA(self)  # (3) make one DFA after all feedback points,

    def forward(self, x: Tensor) -> Tensor:
        h = self.block3(self.block2(self.block1(self.stem(x))))
        return self.dfa(self.head(h))  # (4) call it on the output


def train(method: str, data: DataSet, epochs: int) -> tuple[list[float], dict[str, list[float]]]:
    """Trains a ResNet; returns test accuracy (%) and mean cosine per activation, by epoch."""
    torch.manual_seed(0)
    model = ResNet()
    model.dfa.training_method = method
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = TrainingLoader(data.train, 50, "cpu")
    x_test, y_test = next(iter(Loader(data.test, len(data.test), "cpu")))
    activations = [name for name, module in model.named_modules() if isinstance(module, nn.Tanh)]
    accuracy: list[float] = []
    alignment: dict[str, list[float]] = {name: [] for name in activations}
    for epoch in range(epochs):
        model.train()
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy.append(100 * (model(x_test).argmax(1) == y_test).float().mean().item())
        cosines = measure_alignment(model, x_test[:128], y_test[:128], F.cross_entropy)
        for name in activations:
            alignment[name].append(cosines[name].mean().item())
        show(f"{method:8} epoch {epoch + 1:2}: test accuracy {accuracy[-1]:.1f} %")
    return accuracy, alignment


def draw(accuracies: dict[str, list[float]], alignment: dict[str, list[float]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, values in accuracies.items():
        label, style = METHODS[method]
        left.plot(range(1, len(values) + 1), values, label=label, markersize=4, **style)
    left.set(title="Test accuracy", xlabel="Epoch", ylabel="%")
    left.legend(frameon=False)
    shades = plt.get_cmap("viridis")(torch.linspace(0.9, 0, len(alignment)).numpy())
    for shade, marker, (name, values) in zip(shades, "osD^v<>", alignment.items()):
        right.plot(
            range(1, len(values) + 1), values, label=name, color=shade, marker=marker, markersize=4
        )
    right.set(title="Alignment under DFA", xlabel="Epoch", ylabel="Mean cosine to the gradient")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument(
        "--output", type=user_path, default=Path("own_network.png"), help="default: %(default)s"
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error("--output must be a .png file in an existing folder")
    torch.set_num_threads(1)  # in so small a network, more threads mostly wait for each other
    data = load_dataset("Digits", ".")
    runs = {method: train(method, data, args.epochs) for method in METHODS}
    alignment = runs["dfa"][1]
    draw({method: accuracy for method, (accuracy, _) in runs.items()}, alignment, args.output)
    show("alignment: " + ", ".join(f"{name} {c[-1]:.2f}" for name, c in alignment.items()))
    show(f"figure: {args.output}")


if __name__ == "__main__":
    main()
