"""The gradient bottleneck: what it lets through, and that it is nn.Linear otherwise."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfatools import BottleneckLinear, DFALayer, dfa_from_bp, measure_alignment, prealign
from mltools.networks import Network


def gradients(layer, x, error):
    """Of the input, the weight and the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).backward(error)
    return x.grad, layer.weight.grad, layer.bias.grad


def layer_and_batch(keep, dtype=torch.float64, sizes=(7, 5), samples=6):
    torch.manual_seed(0)
    layer = BottleneckLinear(*sizes, keep).to(dtype)
    return (
        layer,
        torch.randn(samples, sizes[0], dtype=dtype),
        torch.randn(samples, sizes[1], dtype=dtype),
    )


def test_keeping_everything_is_a_linear_bit_for_bit():
    layer, x, error = layer_and_batch(1.0, torch.float32)
    linear = nn.Linear(7, 5)
    linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.equal(layer(x), linear(x))
    for ours, theirs in zip(gradients(layer, x, error), gradients(linear, x, error)):
        assert torch.equal(ours, theirs)


def test_keeping_nothing_gives_exact_zeros():
    layer, x, error = layer_and_batch(0.0)
    assert all(not gradient.any() for gradient in gradients(layer, x, error))
    assert layer(x).abs().sum() > 0


def test_what_is_kept_is_the_explicit_gradient_under_the_masks():
    layer, x, error = layer_and_batch(0.4)
    torch.manual_seed(1)
    at_input, at_weight, at_bias = gradients(layer, x, error)
    weight, bias_mask = layer.weight.detach().numpy(), layer.bias_mask.numpy()
    expected = (error.numpy().T @ x.numpy()) * layer.weight_mask.numpy()
    np.testing.assert_allclose(at_weight.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        at_bias.numpy(), error.numpy().sum(0) * bias_mask, rtol=0, atol=1e-12
    )
    whole = error.numpy() @ weight
    kept = at_input.numpy() != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(at_input.numpy(), whole * kept, rtol=0, atol=1e-12)


def test_the_masks_of_the_parameters_stay_and_that_of_the_input_is_drawn_anew():
    layer, x, error = layer_and_batch(0.5)
    first, second = gradients(layer, x, error), gradients(layer, x, error)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert not torch.equal(first[0] != 0, second[0] != 0)
    torch.manual_seed(3)
    third = gradients(layer, x, error)[0]
    torch.manual_seed(3)
    assert torch.equal(third, gradients(layer, x, error)[0])


def test_entries_are_kept_one_by_one_with_the_given_probability():
    layer, x, error = layer_and_batch(0.1475, sizes=(400, 300), samples=256)
    at_input, at_weight, at_bias = gradients(layer, x, error)
    for gradient in (at_input, at_weight):
        kept = (gradient != 0).double()
        spread = (0.1475 * 0.8525) ** 0.5
        assert abs(kept.mean() - 0.1475) < 5 * spread / kept.numel() ** 0.5
        for dim in (0, 1):  # neither whole neurons nor whole samples
            shares = kept.mean(dim)
            expected = spread / kept.shape[dim] ** 0.5
            assert 0.8 * expected < shares.std() < 1.2 * expected
    assert abs((at_bias != 0).double().mean() - 0.1475) < 0.1


def test_masks_are_buffers_that_are_seeded_saved_and_cast():
    first, second, third = (
        BottleneckLinear(30, 20, 0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight_mask, second.weight_mask)
    assert not torch.equal(first.weight_mask, third.weight_mask)
    third.load_state_dict(first.state_dict())
    assert torch.equal(first.weight_mask, third.weight_mask)
    assert torch.equal(first.bias_mask, third.bias_mask)
    assert first.double().weight_mask.dtype == torch.float64
    assert torch.equal(copy.deepcopy(first).weight_mask, first.weight_mask)


def test_without_bias_and_with_a_wrong_keep():
    layer = BottleneckLinear(4, 3, 0.5, bias=False)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.bias is None and layer.weight.grad is not None
    for keep in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            BottleneckLinear(4, 3, keep)


def test_a_compiled_network_thins_the_same_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), BottleneckLinear(5, 4, 0.5), nn.Linear(4, 3))
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    model = dfa_from_bp(net).double()
    F.cross_entropy(model(x), y).backward()
    expected = [model[i].weight.grad.clone() for i in (3, 5)]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    for i, gradient in zip((3, 5), expected):
        torch.testing.assert_close(model[i].weight.grad, gradient, rtol=0, atol=1e-12)


def network(placement, keep):
    torch.manual_seed(0)
    model = Network(hidden=(9, 8, 7), bottleneck=keep).build((1, 3, 2), 4, placement)
    model = model.double()
    return model, torch.randn(5, 1, 3, 2).double(), torch.randint(4, (5,))


@pytest.mark.parametrize("placement", ["release", "every-layer"])
def test_what_the_first_layer_learns_from_follows_from_the_placement(placement):
    model, x, y = network(placement, 1.0)
    F.cross_entropy(model(x), y).backward()
    w1, w2 = (model.get_submodule(name).weight.detach().numpy() for name in ("lin1", "lin2"))
    b1, b2 = (model.get_submodule(name).bias.detach().numpy() for name in ("lin1", "lin2"))
    flat = x.flatten(1).numpy()
    h1 = np.tanh(flat @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    output = model(x).detach().numpy()
    softmax = np.exp(output) / np.exp(output).sum(1, keepdims=True)
    error = (softmax - np.eye(4)[y.numpy()]) / 5
    matrix = model.dfa.feedback_matrix.numpy()
    sent = {i: error @ matrix[:, :size] / np.sqrt(4 * size) for i, size in ((1, 9), (2, 8))}
    at_lin2 = sent[2] * (1 - h2**2)
    if placement == "every-layer":
        assert isinstance(model.point1, DFALayer)
        at_act1 = sent[1]
    else:
        assert not hasattr(model, "point1")
        at_act1 = at_lin2 @ w2
    np.testing.assert_allclose(model.lin2.weight.grad.numpy(), at_lin2.T @ h1, rtol=0, atol=1e-12)
    expected = (at_act1 * (1 - h1**2)).T @ flat
    np.testing.assert_allclose(model.lin1.weight.grad.numpy(), expected, rtol=0, atol=1e-12)


def test_alignment_is_of_the_thinned_signal_with_the_true_gradient():
    cosines = {}
    for keep in (1.0, 0.3, 0.0):
        model, x, y = network("release", keep)
        full = network("release", 1.0)[0]
        model.load_state_dict(full.state_dict() | {
            name: mask for name, mask in model.state_dict().items() if name.endswith("_mask")
        })  # fmt: skip
        torch.manual_seed(5)
        cosines[keep] = measure_alignment(model, x, y, F.cross_entropy)
        assert model.lin2.thinning
    for keep in (0.3, 0.0):  # behind the bottleneck nothing changes; before it the signal thins out
        assert torch.equal(cosines[keep]["act2"], cosines[1.0]["act2"])
        assert not torch.equal(cosines[keep]["act1"], cosines[1.0]["act1"])
    assert not cosines[0.0]["act1"].any()


def test_thinning_is_on_again_after_an_error():
    model, x, y = network("release", 0.5)

    def loss(output, target):
        return output  # no scalar

    with pytest.raises(RuntimeError):
        measure_alignment(model, x, y, loss)
    assert model.lin2.thinning


def test_prealignment_aligns_the_layer_behind_the_bottleneck():
    model, x, y = network("release", 0.5)
    first = model.lin1.weight.detach().clone()
    prealign(model, x, y, F.cross_entropy)
    cosines = measure_alignment(model, x, y, F.cross_entropy)
    assert cosines["act3"].min() > 1 - 1e-9 and cosines["act2"].mean() > 0.99
    assert torch.equal(model.lin1.weight, first)
    assert torch.linalg.matrix_norm(model.lin2.weight).item() == pytest.approx(1)


def test_masks_move_with_the_module_and_belong_to_the_state_dict():
    layer = BottleneckLinear(4, 3, 0.5)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask", "bias_mask"]
    assert len(list(layer.parameters())) == 2
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight_mask.is_meta and moved.bias_mask.is_meta and not layer.weight_mask.is_meta
    assert "weight_mask" in BottleneckLinear(4, 3, 0.5, bias=False).state_dict()
    assert "bias_mask" not in BottleneckLinear(4, 3, 0.5, bias=False).state_dict()


def release_in_numpy(model, x, y):
    """What reaches lin2's output in the DFA network, the true gradient there, and h0, h1, w2."""
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = (
        [p.detach().numpy() for p in model.get_submodule(f"lin{i}").parameters()]
        for i in (1, 2, 3, 4)
    )
    h0 = x.flatten(1).numpy()
    h1 = np.tanh(h0 @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    h3 = np.tanh(h2 @ w3.T + b3)
    p = np.exp(h3 @ w4.T + b4)
    error = (p / p.sum(1, keepdims=True) - np.eye(4)[y.numpy()]) / len(y)
    matrix = model.dfa.feedback_matrix.numpy()
    signal = error @ matrix[:, :8] / np.sqrt(4 * 8) * (1 - h2**2)
    true = ((error @ w4) * (1 - h3**2)) @ w3 * (1 - h2**2)
    return signal, true, h0, h1, w2


def test_the_first_layer_learns_through_the_bottleneck():
    model, x, y = network("release", 0.4)
    signal, _, h0, h1, w2 = release_in_numpy(model, x, y)
    torch.manual_seed(6)
    F.cross_entropy(model(x), y).backward()
    torch.manual_seed(6)
    kept = torch.empty(5, 9, dtype=torch.float64).bernoulli_(0.4).numpy()
    lin1, lin2 = model.lin1, model.lin2
    assert 0 < kept.sum() < kept.size and 0 < lin2.weight_mask.sum() < 72
    for found, expected in (
        (lin2.weight.grad, signal.T @ h1 * lin2.weight_mask.numpy()),
        (lin2.bias.grad, signal.sum(0) * lin2.bias_mask.numpy()),
        (lin1.weight.grad, ((signal @ w2) * kept * (1 - h1**2)).T @ h0),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_the_cosine_before_the_bottleneck_is_that_of_the_explicit_formula():
    model, x, y = network("release", 0.4)
    signal, true, _, _, w2 = release_in_numpy(model, x, y)
    torch.manual_seed(7)
    cosines = measure_alignment(model, x, y, F.cross_entropy)["act1"].numpy()
    torch.manual_seed(7)
    kept = torch.empty(5, 9, dtype=torch.float64).bernoulli_(0.4).numpy()
    ours, theirs = (signal @ w2) * kept, true @ w2
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    np.testing.assert_allclose(cosines, (ours * theirs).sum(1) / norms, rtol=0, atol=1e-12)
