"""What the benchmarks count: the multiply-adds that a training step cannot avoid."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dfatools import dfa_from_bp
from mltools.networks import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness import products
from sweep import EPOCHS, lower_bound, makespan, simulate, speed

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


def test_the_simulated_schedule():
    # Runs that fill their GPUs take as long as their work; alone, a run takes longer.
    assert makespan([3.0] * 8, 1) == (pytest.approx(24), 0)
    assert makespan([3.0] * 32, 2)[0] == pytest.approx(48)
    assert makespan([3.0], 4)[0] == pytest.approx(3 / speed(1)) == lower_bound([3.0], 4)
    assert speed(1) < speed(3) < speed(4) < speed(7) < speed(8) == 1
    # By hand: eight share a GPU until seven have done their second, which takes eight; then the
    # longest has seven left, beside the ninth, which ends first; then it is alone.
    work = [8.0] + [1.0] * 8
    by_hand = 8 + 2 / speed(2) + 6 / speed(1)
    assert makespan(work, 1)[0] == pytest.approx(by_hand)
    for gpus in (1, 3, 8):
        assert makespan(work * 5, gpus)[0] >= lower_bound(work * 5, gpus) - 1e-9


def test_killed_processes_cost_restarts_and_at_most_an_epoch_of_each_run():
    work = [60.0] * 16
    quiet, _ = makespan(work, 2)
    for seed in range(5):
        total, stalled = makespan(work, 2, deaths=1 / 1000, seed=seed)
        restarts = stalled / 15
        assert quiet <= total - stalled + 1e-9
        assert total - stalled <= quiet + math.ceil(restarts) * 8 * 60 / EPOCHS + 1e-6
    assert any(makespan(work, 2, 1 / 1000, seed)[1] > 0 for seed in range(5))


def test_the_papers_schedule_on_eight_gpus_is_within_a_tenth_of_the_bound(capsys):
    simulate(seeds=10)
    line = next(row for row in capsys.readouterr().out.splitlines() if row.split()[0] == "8")
    assert 1 <= float(line.split()[2]) <= 1.1
