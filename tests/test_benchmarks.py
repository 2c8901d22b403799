"""The benchmarks count the products of a step, and convert their networks to DFA correctly."""

import sys
from pathlib import Path

import pytest
import torch

from dfatools import DFA
from mltools.networks import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from harness import products
from networks import NETWORKS
from step import count_flops, training_step

N = 6
CONVOLUTIONS = [25 * 2 * 32 * 15 * 16, 25 * 32 * 64 * 7 * 7, 25 * 64 * 64 * 3 * 3]
LINEARS = [64 * 128, 128 * 3]
FEEDBACK = 3 * 32 * 7 * 7  # one product, as wide as the widest feedback point
FORWARD = sum(CONVOLUTIONS + LINEARS)


@pytest.mark.parametrize("protocol, method, other, count_of_works", [
    ("corrected", "dfa", FEEDBACK, 11),
    ("release", "dfa", FEEDBACK + LINEARS[1], 12),  # BP through the last layer
    ("corrected", "bp", FORWARD - CONVOLUTIONS[0], 12),
])  # fmt: skip
def test_the_products_of_the_papers_cnn_are_counted(protocol, method, other, count_of_works):
    model = Network("cnn").build((2, 15, 16), 3, protocol, training_method=method)
    count, works = products(model, torch.randn(N, 2, 15, 16))
    assert count == N * (2 * FORWARD + other) and len(works) == count_of_works
    for work in works:
        work()


@pytest.mark.parametrize("name", ["fc", "cnn"])
def test_products_agree_with_the_flop_counter(name):
    network = NETWORKS[name]
    bp, (x, y) = network.build(), network.batch()
    for model in (bp, network.to_dfa(bp)):
        assert count_flops(training_step(model, x, y, network.loss)) == 2 * products(model, x)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_has_the_bp_gradients_and_finite_dfa_gradients(name):
    network = NETWORKS[name]
    torch.manual_seed(0)
    bp, (x, y) = network.build(), network.batch()
    dfa = network.to_dfa(bp)
    network.loss(bp(x), y).backward()
    (the_dfa,) = (module for module in dfa.modules() if isinstance(module, DFA))

    the_dfa.training_method = "bp"
    network.loss(dfa(x), y).backward()
    gradients = {key: parameter.grad for key, parameter in bp.named_parameters()}
    torch.testing.assert_close(
        {key: parameter.grad for key, parameter in dfa.named_parameters()}, gradients
    )

    the_dfa.training_method = "dfa"
    dfa.zero_grad()
    network.loss(dfa(x), y).backward()
    missing = [
        key
        for key, parameter in dfa.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not missing
