"""What the benchmarks count: the multiply-adds that a training step cannot avoid."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dfatools import dfa_from_bp
from mltools.networks import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness import products

N = 6


def fc():
    layers = nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)
    return nn.Sequential(*layers)


def test_of_a_fully_connected_network():
    x, weights = torch.randn(N, 12), 12 * 8 + 8 * 9 + 9 * 4
    # Forward and weight gradient of each layer; BP: the input gradient of all but the first.
    count, works = products(fc(), x)
    assert count == N * (2 * weights + 8 * 9 + 9 * 4) and len(works) == 3 * 2 + 2
    # DFA: one product with the feedback matrix, as wide as the widest point, and no other.
    count, works = products(dfa_from_bp(fc()), x)
    assert count == N * (2 * weights + 4 * 9) and len(works) == 3 * 2 + 1
    for work in works:
        work()


@pytest.mark.parametrize("placement, sent", [("release", 128 * 3), ("every-layer", 0)])
def test_of_the_papers_cnn(placement, sent):
    """Where the release has no feedback point, BP sends one gradient."""
    model = Network("cnn").build((2, 15, 16), 3, placement)
    images = 15 * 16, 7 * 7, 3 * 3
    forward = sum(
        25 * a * b * size for a, b, size in zip((2, 32, 64), (32, 64, 64), images, strict=True)
    )
    forward += 64 * 128 + 128 * 3
    count, works = products(model, torch.randn(N, 2, 15, 16))
    assert count == N * (2 * forward + sent + 3 * 32 * 7 * 7)
    for work in works:
        work()
