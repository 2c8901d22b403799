"""What the benchmarks count: the multiply-adds that a training step cannot avoid."""

import sys
from pathlib import Path

import pytest
import torch

from mltools.networks import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness import products

N = 6
CONVOLUTIONS = [25 * 2 * 32 * 15 * 16, 25 * 32 * 64 * 7 * 7, 25 * 64 * 64 * 3 * 3]
LINEARS = [64 * 128, 128 * 3]
FEEDBACK = 3 * 32 * 7 * 7  # one product, as wide as the widest point
FORWARD = sum(CONVOLUTIONS + LINEARS)


@pytest.mark.parametrize("protocol, method, other, count_of_works", [
    ("corrected", "dfa", FEEDBACK, 11),
    ("release", "dfa", FEEDBACK + LINEARS[1], 12),  # BP before the last layer
    ("corrected", "bp", FORWARD - CONVOLUTIONS[0], 12),
])  # fmt: skip
def test_the_products_of_the_papers_cnn(protocol, method, other, count_of_works):
    model = Network("cnn").build((2, 15, 16), 3, protocol, training_method=method)
    count, works = products(model, torch.randn(N, 2, 15, 16))
    assert count == N * (2 * FORWARD + other) and len(works) == count_of_works
    for work in works:
        work()
