"""mltools.networks builds the paper's networks: their modules, feedback points and values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfatools import BottleneckLinear, DFALayer
from mltools.errors import UserError
from mltools.layers import ChannelDropout, Dropout, Linear
from mltools.networks import ACTIVATIONS, Network

CIFAR = (3, 32, 32)
FC, CNN = Network("fc"), Network("cnn")
EVERYTHING = {"batchnorm": True, "dropout_input": 0.1, "dropout_fc": 0.5}


def names(model):
    return " ".join(name for name, _ in model.named_children())


@pytest.mark.parametrize("protocol", ["release", "corrected"])
@pytest.mark.parametrize("network, missing, corrected", [
    (FC, None, "flat lin1 act1 point1 lin2 act2 point2 lin3 act3 point3 lin4 dfa"),
    (replace(FC, hidden=(7, 6), **EVERYTHING), None,
     "flat drop0 lin1 drop1 act1 bn1 point1 lin2 drop2 act2 bn2 point2 lin3 dfa"),
    (replace(FC, hidden=(7, 6), bottleneck=0.25), "point1",
     "flat lin1 act1 point1 lin2 act2 point2 lin3 dfa"),
    (CNN, "point4", "conv1 act1 maxp1 point1 conv2 act2 maxp2 point2 conv3 act3 maxp3 "
     "flat point3 lin1 act4 point4 lin2 dfa"),
    (replace(CNN, **EVERYTHING), "point4",
     "drop0 conv1 act1 bn1 maxp1 point1 conv2 act2 bn2 maxp2 point2 "
     "conv3 act3 bn3 maxp3 flat point3 lin1 drop4 act4 bn4 point4 lin2 dfa"),
], ids=["fc", "fc-all", "bottleneck", "cnn", "cnn-all"])  # fmt: skip
def test_a_feedback_point_is_missing_in_the_release(network, missing, corrected, protocol):
    model = network.build(CIFAR, 10, protocol)
    expected = corrected if protocol == "corrected" else corrected.replace(f"{missing} ", "")
    assert names(model) == expected
    assert model.dfa.layers == tuple(m for m in model if isinstance(m, DFALayer))


def test_the_second_linear_is_the_bottleneck():
    model = Network(hidden=(7, 6, 5), bottleneck=0.25).build((1, 4, 4), 3)
    linears = [type(m) for m in model if isinstance(m, nn.Linear)]
    assert linears == [Linear, BottleneckLinear, Linear, Linear]
    assert model.lin2.keep == 0.25 and model.lin2.weight.shape == (6, 7)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="'all'"):
        FC.build(CIFAR, 10, "all")


def test_dropout_and_batchnorm_are_of_the_right_kind_and_size():
    fc, cnn = (replace(network, **EVERYTHING).build(CIFAR, 10) for network in (FC, CNN))
    drops = [(type(m), m.p) for m in (*fc, *cnn) if isinstance(m, Dropout)]
    assert drops[:4] == [(Dropout, 0.1), *3 * [(Dropout, 0.5)]]
    assert drops[4:] == [(ChannelDropout, 0.1), (Dropout, 0.5)]
    norms = [(type(m), m.num_features) for m in (*fc, *cnn) if hasattr(m, "num_features")]
    assert norms[:3] == 3 * [(nn.BatchNorm1d, 800)]
    convolutional = [(nn.BatchNorm2d, channels) for channels in (32, 64, 64)]
    assert norms[3:] == [*convolutional, (nn.BatchNorm1d, 128)]


@pytest.mark.parametrize("network, blocks", [(FC, 3), (CNN, 4)], ids=["fc", "cnn"])
@pytest.mark.parametrize(
    "activation, slope, expected",
    [
        ("tanh", None, "Tanh()"),
        ("relu", None, "ReLU()"),
        ("leaky-relu", 0.5, "LeakyReLU(negative_slope=0.5)"),
    ],
)
def test_every_hidden_block_has_the_activation(network, blocks, activation, slope, expected):
    network = replace(network, activation=activation, negative_slope=slope)
    found = [repr(m) for m in network.build((1, 16, 16), 10) if type(m) in ACTIVATIONS.values()]
    assert found == [expected] * blocks


FC_SHAPES = [(800, 3072), (800, 800), (800, 800), (10, 800)]
CNN_SHAPES = [(32, 3, 5, 5), (64, 32, 5, 5), (64, 64, 5, 5), (128, 576), (10, 128)]


@pytest.mark.parametrize("network, shapes", [(FC, FC_SHAPES), (CNN, CNN_SHAPES)])
def test_weights_and_biases_have_the_shapes_of_the_paper(network, shapes):
    found = [tuple(p.shape) for p in network.build(CIFAR, 10).parameters()]
    assert found == [shape for weight in shapes for shape in (weight, weight[:1])]


@pytest.mark.parametrize("shape, classes, features", [
    ((1, 28, 28), 10, 64 * 2 * 2), ((3, 40, 31), 7, 64 * 4 * 3), ((2, 15, 15), 2, 64)
])  # fmt: skip
def test_networks_fit_any_image_size_channels_and_classes(shape, classes, features):
    x = torch.zeros(2, *shape)
    fc, cnn = FC.build(shape, classes), CNN.build(shape, classes)
    assert fc.lin1.in_features == x[0].numel() and fc(x).shape == (2, classes)
    assert cnn.lin1.in_features == features and cnn(x).shape == (2, classes)


@pytest.mark.parametrize("shape", [(1, 14, 32), (3, 32, 14), (1, 8, 8)])
def test_images_too_small_for_the_poolings_are_refused_with_their_size(shape):
    with pytest.raises(UserError, match=f"{shape[1]}x{shape[2]}.*15x15") as caught:
        CNN.build(shape, 10)
    assert "\n" not in str(caught.value)


def test_multiply_adds_are_weights_times_positions():
    first, rest = 3072 * 800, 2 * 800 * 800 + 800 * 10
    assert Network("fc", batchnorm=True).multiply_adds(CIFAR, 10) == first + rest
    assert Network(bottleneck=0.1).multiply_adds(CIFAR, 10) == first + rest
    convolutions = 25 * (32**2 * 3 * 32 + 15**2 * 32 * 64 + 7**2 * 64 * 64)
    assert Network("cnn").multiply_adds(CIFAR, 10) == convolutions + 576 * 128 + 128 * 10


def test_weights_are_pytorchs_defaults_and_the_feedback_is_drawn_after_them():
    torch.manual_seed(3)
    model = replace(FC, batchnorm=True, dropout_fc=0.5).build((1, 6, 5), 4)
    torch.manual_seed(3)
    for i, (inputs, outputs) in enumerate([(30, 800), (800, 800), (800, 800), (800, 4)], 1):
        expected = nn.Linear(inputs, outputs)
        assert torch.equal(model.get_submodule(f"lin{i}").weight, expected.weight)
        assert torch.equal(model.get_submodule(f"lin{i}").bias, expected.bias)
    assert torch.equal(model.dfa.feedback_matrix, torch.randn(4, 800))


def test_dfa_options_reach_the_dfa():
    options = {"normalization": False, "reduction": "sum", "training_method": "shallow"}
    model = FC.build((1, 4, 4), 3, **options)
    assert {key: getattr(model.dfa, key) for key in options} == options


def test_build_leaves_train_mode_and_fresh_batchnorm_statistics():
    model = replace(FC, batchnorm=True).build((1, 4, 4), 3)
    assert all(module.training for module in model.modules())
    assert model.bn1.num_batches_tracked == 0


def test_fc_computes_its_formula():
    network = replace(FC, activation="leaky-relu", negative_slope=0.1, batchnorm=True)
    model, x = network.build((1, 4, 4), 5).double(), torch.randn(6, 1, 4, 4).double()
    h = x.reshape(6, 16)
    for lin in (model.lin1, model.lin2, model.lin3):
        h = h @ lin.weight.T + lin.bias
        h = torch.where(h > 0, h, 0.1 * h)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    expected = h @ model.lin4.weight.T + model.lin4.bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_cnn_computes_its_formula():
    model, x = CNN.build((3, 17, 21), 5).double(), torch.randn(4, 3, 17, 21).double()
    h = x
    for conv in (model.conv1, model.conv2, model.conv3):
        h = F.max_pool2d(torch.tanh(F.conv2d(h, conv.weight, conv.bias, padding=2)), 3, 2)
    h = torch.tanh(F.linear(h.flatten(1), model.lin1.weight, model.lin1.bias))
    expected = F.linear(h, model.lin2.weight, model.lin2.bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
