"""`--protocol release` reproduces each departure of the 2019 release from DFA."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import CPU, SMALL, describe, metrics_of, state_of, tiny, train
from torch.nn import functional as F

from dfatools import measure_alignment
from mltools.networks import Network
from mltools.release import floored_cosine, measure_release_alignment
from mltools.training import Experiment, Trainer

SAMPLES, CLASSES = 8, 3
BOTTLENECK = Network(hidden=(9, 8, 7), bottleneck=0.5)
REGULARISED = Network(hidden=(9, 8, 7), batchnorm=True, dropout_input=0.2, dropout_fc=0.4)


def build(network, shape=(1, 4, 5)):
    """Builds a network of the release, in float64 and eval mode; returns it, images and labels."""
    torch.manual_seed(0)
    model = network.build(shape, CLASSES, "release", SAMPLES, reduction="sum").double().eval()
    x = torch.randn(SAMPLES, *shape, dtype=torch.float64)
    return model, x, torch.randint(CLASSES, (SAMPLES,))


def error_of(output, y):
    """Computes the error of each sample, softmax minus one-hot."""
    p = np.exp(output - output.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y]


def feedback(model, error, size):
    """Computes e B_i for a hidden layer of the given size."""
    return error @ model.dfa.feedback_matrix.numpy()[:, :size] / np.sqrt(size * CLASSES)


def bottleneck_in_numpy(model, x, y):
    """Computes {layer: (DFA's signal, BP gradient)} of BOTTLENECK; also returns the flat images."""
    weights = [p.detach().numpy() for p in model.parameters()]
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = zip(weights[::2], weights[1::2])
    x = x.numpy().reshape(SAMPLES, -1)
    h1 = np.tanh(x @ w1.T + b1)
    h2 = np.tanh(h1 @ w2.T + b2)
    h3 = np.tanh(h2 @ w3.T + b3)
    error = error_of(h3 @ w4.T + b4, y)
    mask, mask_of_copy = model.lin2.input_masks.numpy()
    # There is no feedback point behind the first block: its signal comes through the bottleneck.
    f2, f3 = feedback(model, error, 8), feedback(model, error, 7)
    f1 = mask * ((f2 * (1 - h2**2)) @ w2)
    g3 = error / SAMPLES @ w4  # gradient of the mean loss
    g2 = (g3 * (1 - h3**2)) @ w3
    g1 = mask_of_copy * ((g2 * (1 - h2**2)) @ w2)
    sides = {"lin4": (error / SAMPLES, error / SAMPLES)}
    for i, (f, g, h) in enumerate([(f1, g1, h1), (f2, g2, h2), (f3, g3, h3)], 1):
        sides |= {f"act{i}": (f, g), f"lin{i}": (f * (1 - h**2), g * (1 - h**2))}
    return sides, x


def cosine_2019(signal, gradient):
    """Returns the cosine of each sample, divided by at least 1e-8, and the product of the norms."""
    norms = np.sqrt((signal**2).sum(1)) * np.sqrt((gradient**2).sum(1))
    return (signal * gradient).sum(1) / np.maximum(norms, 1e-8), norms


def test_the_first_layer_learns_through_the_bottleneck_with_one_mask_for_all_batches():
    model, x, y = build(BOTTLENECK)
    masks = model.lin2.input_masks
    assert masks.shape == (2, SAMPLES, 9) and set(masks.flatten().tolist()) == {0, 1}
    assert not torch.equal(*masks)
    for images, labels in ((x, y), (x.flip(0) * 2, y)):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        sides, inputs = bottleneck_in_numpy(model, images, labels)
        signal, _ = sides["lin1"]
        np.testing.assert_allclose(model.lin1.weight.grad, signal.T @ inputs, rtol=0, atol=1e-12)


def test_a_smaller_batch_gets_the_first_rows_of_the_mask():
    model, x, y = build(BOTTLENECK)
    F.cross_entropy(model(x[:5]), y[:5], reduction="sum").backward()
    whole = copy.deepcopy(model)
    whole.zero_grad()
    loss = F.cross_entropy(whole(x), y, reduction="none")[:5].sum()
    loss.backward()  # the other samples have no error
    expected = whole.lin1.weight.grad * 5 / 8  # "sum" multiplies by the batch size
    torch.testing.assert_close(model.lin1.weight.grad, expected, rtol=0, atol=1e-12)


def test_backpropagation_trains_the_last_hidden_layer_of_the_cnn():
    model, x, y = build(Network("cnn"), (1, 15, 16))
    seen = {}
    for name in ("flat", "act4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.detach().numpy()})
        )
    output = model(x)
    F.cross_entropy(output, y).backward()
    error = error_of(output.detach().numpy(), y)
    gradient = error / SAMPLES @ model.lin2.weight.detach().numpy() * (1 - seen["act4"] ** 2)
    expected = gradient.T @ seen["flat"]
    np.testing.assert_allclose(model.lin1.weight.grad, expected, rtol=0, atol=1e-12)


def test_alignment_of_the_bottleneck_uses_the_masks_of_a_copy_and_the_floor():
    model, x, y = build(BOTTLENECK)
    with torch.no_grad():
        model.lin4.weight.mul_(60)  # confident answers have a tiny error
    found = measure_release_alignment(model, x, y)
    sides, _ = bottleneck_in_numpy(model, x, y)
    assert list(found) == ["lin1", "act1", "lin2", "act2", "lin3", "act3", "lin4"]
    floored = 0
    for layer, cosines in found.items():
        expected, norms = cosine_2019(*sides[layer])
        np.testing.assert_allclose(cosines, expected, rtol=0, atol=1e-10)
        floored += sum((norms > 0) & (norms < 1e-8))
    assert 0 < floored < len(found) * SAMPLES


def plain(model, x, generator=None):
    """Runs a network by plain functions, in train mode if there is a generator for its dropout.

    Returns: {layer: output} of the activations and feedback points, and the network's output.
    """
    outputs, h = {}, x
    for name, layer in model.named_children():
        if name.startswith("conv"):
            h = F.conv2d(h, layer.weight, layer.bias, padding=2)
        elif name.startswith("lin"):
            h = F.linear(h, layer.weight, layer.bias)
        elif name.startswith("drop") and generator is not None:
            mask = h.new_empty((*h.shape[:2], 1, 1) if h.dim() == 4 else h.shape)
            h = h * mask.bernoulli_(1 - layer.p, generator=generator) / (1 - layer.p)
        elif name.startswith("act"):
            h = torch.tanh(h)
        elif name.startswith("bn"):
            mean, var = layer.running_mean, layer.running_var
            if generator is not None:
                dims = [0, *range(2, h.dim())]
                mean, var = h.mean(dims), h.var(dims, correction=0)
            mean, var, weight, bias = (
                tensor.view(-1, *[1] * (h.dim() - 2))
                for tensor in (mean, var + 1e-5, layer.weight, layer.bias)
            )
            h = (h - mean) / var.sqrt() * weight + bias
        elif name.startswith("maxp"):
            h = F.max_pool2d(h, 3, 2)
        elif name == "flat":
            h = h.flatten(1)
        if name.startswith(("act", "point")):
            outputs[name] = h
    return outputs, h


def regularised(network, shape=(1, 4, 5)):
    """Builds a network in train mode, with random statistics and weights in its BatchNorm layers.

    Returns: the network, images, labels, and the generator of its dropout.
    """
    model, x, y = build(network, shape)
    generator = torch.Generator().manual_seed(5)
    for name, layer in model.named_children():
        if name.startswith("bn"):
            for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
                tensor.data.uniform_(0.5, 1.5)
        elif name.startswith("drop"):
            layer.generator = generator
    return model.train(), x, y, generator


@pytest.mark.parametrize("network, shape", [
    (REGULARISED, (1, 4, 5)),
    (Network("cnn"), (3, 15, 16)),  # swaps Tanh and pooling in train mode
    (Network("cnn", batchnorm=True, dropout_input=0.2, dropout_fc=0.4), (3, 15, 16)),
], ids=["fc", "cnn", "cnn, regularised"])  # fmt: skip
def test_gradients_are_from_a_copy_in_train_mode_and_signals_from_eval_mode(network, shape):
    model, x, y, _ = regularised(network, shape)
    found = measure_release_alignment(model, x, y)
    outputs, output = plain(model, x, torch.Generator().manual_seed(5))
    loss = F.cross_entropy(output, y)
    gradients = [
        torch.autograd.grad(loss, outputs[f"act{i}"], retain_graph=True)[0] for i in (1, 2, 3)
    ]
    outputs, output = plain(model, x)
    error = error_of(output.detach().numpy(), y)
    for i, gradient in enumerate(gradients, 1):
        act, point = outputs[f"act{i}"], outputs[f"point{i}"]
        fed = torch.from_numpy(feedback(model, error, point[0].numel())).view_as(point)
        (signal,) = torch.autograd.grad(point, act, fed, retain_graph=True)
        sides = (side.flatten(1).numpy() for side in (signal, gradient))
        expected, _ = cosine_2019(*sides)
        np.testing.assert_allclose(found[f"act{i}"], expected, rtol=0, atol=1e-10)
        assert found[f"act{i}"].abs().max() < 0.99


def test_measuring_does_not_change_the_model_or_the_random_state():
    model, x, y, generator = regularised(REGULARISED)
    before = copy.deepcopy(model.state_dict()), generator.get_state(), torch.get_rng_state()
    once, twice = (measure_release_alignment(model, x, y) for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    torch.testing.assert_close(
        (dict(model.state_dict()), generator.get_state(), torch.get_rng_state()),
        (dict(before[0]), *before[1:]), rtol=0, atol=0,
    )  # fmt: skip
    assert not any(module.training for module in model.modules())
    assert model.dfa.training_method == "dfa"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale, floor", [(1.0, False), (1e-10, True), (0.0, True)])
def test_the_cosine_has_the_floor_of_pytorch_in_2019(scale, floor):
    a, b = (torch.randn(6, 2, 3, dtype=torch.float64) for _ in range(2))
    expected, norms = cosine_2019(a.flatten(1).numpy(), scale * b.flatten(1).numpy())
    assert ((norms < 1e-8) == floor).all()
    np.testing.assert_allclose(floored_cosine(a, scale * b), expected, rtol=0, atol=1e-12)


def test_the_protocol_changes_the_measurement_but_not_the_training_of_fc(tmp_path):
    network = replace(SMALL, batchnorm=True, dropout_input=0.1, dropout_fc=0.4)
    experiment = Experiment("fc", network, reduction="sum", learning_rate=0.05)
    exact = partial(measure_alignment, loss=F.cross_entropy)
    for protocol, measure in (("release", measure_release_alignment), ("corrected", exact)):
        trainer = Trainer(describe(experiment, protocol=protocol), tiny(), CPU)
        images, labels = next(iter(trainer.test))
        for layer, cosines in measure(trainer.model, images[:128], labels[:128]).items():
            np.testing.assert_array_equal(trainer.alignment()[layer], cosines.float())
        train(tmp_path / protocol, experiment, protocol=protocol)
    release, corrected = (metrics_of(tmp_path / name) for name in ("release", "corrected"))
    for ours, exact in zip(release, corrected, strict=True):
        assert ours["alignment"].keys() == exact["alignment"].keys()
        assert ours["alignment"]["act1"] != exact["alignment"]["act1"]
        both = [{**x, "alignment": None, "seconds": None} for x in (ours, exact)]
        assert both[0] == both[1]
    states = [state_of(tmp_path / protocol) for protocol in ("release", "corrected")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size, rows", [(8, 128), (140, 140)])
def test_the_bottleneck_has_a_mask_for_each_sample(tmp_path, batch_size, rows):
    experiment = Experiment("std", replace(SMALL, bottleneck=0.5), reduction="sum")
    train(tmp_path, experiment, tiny(train=150), batch_size=batch_size, protocol="release")
    assert state_of(tmp_path)["lin2.input_masks"].shape == (2, rows, 8)


def test_input_masks_are_drawn_last_so_that_both_protocols_start_alike():
    network, states = Network(hidden=(9, 9, 7), bottleneck=0.1), []
    for protocol in ("release", "corrected"):
        torch.manual_seed(0)
        states.append(dict(network.build((1, 4, 5), 3, protocol).state_dict()))
    assert states[0].pop("lin2.input_masks").mean().item() == pytest.approx(0.1, abs=0.03)
    torch.testing.assert_close(*states, rtol=0, atol=0)
