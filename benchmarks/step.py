"""Times one training step of Direct Feedback Alignment against backpropagation.

    python benchmarks/step.py                              the three networks below
    python benchmarks/step.py --networks fc --steps 1000 --threads 1
    python benchmarks/step.py --device cuda

A step is zero_grad, forward pass, cross-entropy, backward pass, SGD update, on one random batch of
128; on CUDA, it is one graph. The two methods take turns, step by step, so that whatever else the
machine does slows both.
`DFA / BP` is the median of the ratio over pairs of neighbouring steps, with its quartiles behind;
`allowed` is the ratio of multiply-adds in matrix products, which leaves out everything else.

docs/performance.md has measured numbers.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from harness import in_turns, launched, machine, products
from torch import Tensor, nn

from dfatools import dfa_from_bp

BATCH = 128


def fc(hidden_layers: int) -> nn.Sequential:
    sizes = [3072] + [800] * hidden_layers
    blocks = [(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*(module for block in blocks for module in block), nn.Linear(800, 10))


def cnn() -> nn.Sequential:
    channels = [3, 32, 64, 64]
    blocks = [
        (nn.Conv2d(a, b, 5, padding=2), nn.Tanh(), nn.MaxPool2d(3, 2))
        for a, b in zip(channels, channels[1:])
    ]
    head = [nn.Flatten(), nn.Linear(576, 128), nn.Tanh(), nn.Linear(128, 10)]
    return nn.Sequential(*(module for block in blocks for module in block), *head)


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "fc": (lambda: fc(3), (3072,)),  # the paper's two
    "cnn": (cnn, (3, 32, 32)),
    "deep": (lambda: fc(10), (3072,)),
}


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def compare(name: str, device: torch.device, steps: int) -> str:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    bp = build().to(device)
    if device.type == "cpu":
        bp.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the scripts do
    dfa = dfa_from_bp(bp)
    x = torch.randn(BATCH, *shape, device=device)
    y = torch.randint(10, (BATCH,), device=device)
    (bp_count, _), (dfa_count, _) = products(bp, x), products(dfa, x)
    allowed = dfa_count / bp_count
    works = [launched(training_step(model, x, y), device) for model in (bp, dfa)]
    times = in_turns(works, steps, device)
    bp_ms, dfa_ms = (1000 * statistics.median(column) for column in times)
    low, ratio, high = statistics.quantiles([dfa / bp for bp, dfa in zip(*times)], n=4)
    return (
        f"{name:8} {bp_ms:8.2f} {dfa_ms:8.2f} {ratio:8.3f} ({low:.3f} to {high:.3f}) {allowed:8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--steps", type=int, default=200, help="of each method on each network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    print(
        f"{'network':8} {'BP ms':>8} {'DFA ms':>8} {'DFA / BP':>8} {'quartiles':>16} {'allowed':>8}"
    )
    for name in args.networks:
        print(compare(name, args.device, args.steps), flush=True)


if __name__ == "__main__":
    main()
