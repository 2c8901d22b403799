"""Helpers of the benchmarks: machine, clock, and the minimal arithmetic of a training step."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfatools import DFA, DFALayer

WARM_UP = 5  # uncounted calls before the measurement


def machine(device: torch.device) -> str:
    """Returns the hardware, the number of threads and the versions as one line."""
    return (
        f"{_processor(device)}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    )


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call, including its work on the device."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def launched(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns `work`, on CUDA as a graph: else, small networks would wait for kernel launches."""
    if device.type != "cuda":
        return work
    torch.cuda.synchronize(device)  # the tensors of `work` come from another stream
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def in_turns(
    works: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Calls the works in turn, so that other load slows all alike; returns the seconds of each."""
    rows = [[seconds(work, device) for work in works] for _ in range(WARM_UP + repeats)]
    return [list(column) for column in zip(*rows[WARM_UP:])]


def median_ratio(times: Sequence[float], against: Sequence[float]) -> float:
    """Returns the median ratio between neighbouring measurements."""
    return statistics.median(a / b for a, b in zip(times, against, strict=True))


def products(model: nn.Sequential, x: Tensor) -> tuple[int, list[Callable[[], object]]]:
    """Extracts the matrix products and convolutions of a training step.

    Args:
        model: a Sequential, with or without feedback points.
        x: a batch of N images.

    Returns: the number of multiply-adds, and functions that each compute one operation on tensors
    of the step's shapes. Matrix products write their results into preallocated memory.
    """
    count = 0
    works: list[Callable[[], object]] = []
    fed = []  # number of features at each feedback point

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal count
        inner = args[0].detach()
        sent = torch.randn_like(output)
        if isinstance(module, DFALayer):
            fed.append(inner[0].numel())
        elif isinstance(module, DFA) and module.training_method == "dfa":
            matrix = module.get_buffer("feedback_matrix")[:, : max(fed)]
            count += matrix.numel() * len(x)
            works.append(_product(sent, matrix))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            needs = args[0].requires_grad
            # Forward pass, grad_weight, and grad_input if it is needed.
            count += (2 + needs) * module.weight.numel() * output[:, 0].numel()
            if isinstance(module, nn.Linear):
                works.append(_product(inner, module.weight.detach().t()))
                works.append(_product(sent.t(), inner))
                if needs:
                    works.append(_product(sent, module.weight.detach()))
            else:
                works.append(
                    lambda: F.conv2d(inner, module.weight.detach(), None, 1, module.padding)
                )
                works.append(lambda: _convolution_backward(module, sent, inner, needs))

    hooks = [module.register_forward_hook(note) for module in model]
    model(x)
    for hook in hooks:
        hook.remove()
    return count, works


def _product(a: Tensor, b: Tensor) -> Callable[[], object]:
    out = a.new_empty(a.shape[0], b.shape[1])
    return lambda: torch.mm(a, b, out=out)


def _convolution_backward(module: nn.Conv2d, sent: Tensor, inner: Tensor, needs: bool) -> object:
    return torch.ops.aten.convolution_backward(
        sent, inner, module.weight.detach(), None, (1, 1), module.padding, (1, 1), False, (0, 0), 1,
        (needs, True, False),
    )  # fmt: skip


def rate_of_a_large_product(device: torch.device) -> float:
    """Returns the multiply-adds per second of a product of two large square float32 matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    (times,) = in_turns([lambda: torch.mm(a, b, out=out)], 10, device)
    return size**3 / statistics.median(times)


def write_random_images(path: Path) -> None:
    """Writes a random data set of CIFAR-10's size, as an npz file for `load_dataset`."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 50_000), ("test", 10_000)):
        arrays[f"x_{split}"] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = random.integers(0, 10, count, dtype=np.uint8)
    np.savez(path, allow_pickle=False, **arrays)
