"""Times one training step of Direct Feedback Alignment against backpropagation.

    python benchmarks/step.py                              all ten networks of networks.py
    python benchmarks/step.py --networks fc gcn --steps 500 --threads 1
    python benchmarks/step.py --device cuda

A step consists of zero_grad, forward pass, loss, backward pass and SGD update, on one random batch.
On CUDA, a step is one CUDA graph. The steps of the two methods alternate, so that other load on the
machine slows both alike. The columns:

    BP ms, DFA ms  the median time of a step
    DFA / BP       the median ratio, over pairs of neighbouring steps
    quartiles      the first and third quartile of this ratio
    allowed        the ratio of operations in matrix products, convolutions and attention, counted
                   by PyTorch's FlopCounterMode over one step of each method

`allowed` excludes operations without a product: activations, norms, pooling, embeddings, sums over
a graph's edges, the update. It counts causal attention as full attention.

docs/performance.md has measured numbers.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from harness import in_turns, launched, machine
from networks import NETWORKS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_CPU = {  # FlopCounterMode knows the CUDA kernels only
    attention: lambda *shapes, **others: sdpa_flop_count(*shapes[:3]),
    attention_backward: lambda *shapes, **others: sdpa_backward_flop_count(*shapes[:4]),
}


def training_step(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def count_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        step()
    return counter.get_total_flops()


def compare(name: str, device: torch.device, repeats: int) -> float:
    """Times a network, prints its table row, and returns its median ratio DFA / BP."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    bp = network.build().to(device)
    if device.type == "cpu":
        bp.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the scripts do
    x, y = (tensor.to(device) for tensor in network.batch())
    steps = [training_step(model, x, y, network.loss) for model in (bp, network.to_dfa(bp))]
    times = in_turns([launched(step, device) for step in steps], repeats, device)
    bp_flops, dfa_flops = (count_flops(step) for step in steps)
    bp_ms, dfa_ms = (1000 * statistics.median(column) for column in times)
    low, ratio, high = statistics.quantiles([dfa / bp for bp, dfa in zip(*times)], n=4)
    print(
        f"{name:8} {bp_ms:8.2f} {dfa_ms:8.2f} {ratio:8.3f} ({low:.3f} to {high:.3f}) "
        f"{dfa_flops / bp_flops:8.3f}",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: PyTorch's choice")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each method")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    print(
        f"{'network':8} {'BP ms':>8} {'DFA ms':>8} {'DFA / BP':>8} {'quartiles':>16} {'allowed':>8}"
    )
    ratios = [compare(name, args.device, args.steps) for name in args.networks]
    print(f"median DFA / BP over {len(ratios)} network(s): {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
