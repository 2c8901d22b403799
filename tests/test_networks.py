"""The paper's networks: their modules, where they are fed back to, and what they compute."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfatools import DFA, BottleneckLinear, DFALayer
from mltools.errors import UserError
from mltools.layers import ChannelDropout, Dropout, Linear
from mltools.networks import ACTIVATIONS, Network

CIFAR = (3, 32, 32)
FC = Network("fc")
CNN = Network("cnn")
EVERYTHING = {"batchnorm": True, "dropout_input": 0.1, "dropout_fc": 0.5, "dropout_conv": 0.2}


def names(model):
    return " ".join(name for name, _ in model.named_children())


def plain(model):
    """The same modules without those of DFA."""
    return nn.Sequential(*(m for m in model if not isinstance(m, (DFA, DFALayer))))


@pytest.mark.parametrize("placement", ["release", "every-layer"])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "flat lin1 act1 point1 lin2 act2 point2 lin3 act3 point3 lin4 dfa"),
        (
            {"batchnorm": True},
            "flat lin1 act1 bn1 point1 lin2 act2 bn2 point2 lin3 act3 bn3 point3 lin4 dfa",
        ),
        (
            {"dropout_input": 0.1},
            "flat drop0 lin1 act1 point1 lin2 act2 point2 lin3 act3 point3 lin4 dfa",
        ),
        (
            EVERYTHING,
            "flat drop0 lin1 drop1 act1 bn1 point1 lin2 drop2 act2 bn2 point2 "
            "lin3 drop3 act3 bn3 point3 lin4 dfa",
        ),
    ],
)
def test_fc_modules_in_order_with_points_before_every_linear_but_the_first(
    options, expected, placement
):
    model = replace(FC, **options).build(CIFAR, 10, placement)
    assert names(model) == expected
    assert model.dfa.layers == (model.point1, model.point2, model.point3)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {},
            "conv1 act1 maxp1 point1 conv2 act2 maxp2 point2 conv3 act3 maxp3 point3 "
            "flat lin1 act4 {}lin2 dfa",
        ),
        (
            {"dropout_fc": 0.1},
            "conv1 act1 maxp1 point1 conv2 act2 maxp2 point2 conv3 act3 maxp3 point3 "
            "flat lin1 drop4 act4 {}lin2 dfa",
        ),
        (
            EVERYTHING,
            "drop0 conv1 drop1 act1 bn1 maxp1 point1 conv2 drop2 act2 bn2 maxp2 point2 "
            "conv3 drop3 act3 bn3 maxp3 point3 flat lin1 drop4 act4 bn4 {}lin2 dfa",
        ),
    ],
)
def test_cnn_modules_in_order_and_the_release_has_no_point_before_lin2(options, expected):
    network = replace(CNN, **options)
    release = network.build(CIFAR, 10, "release")
    every = network.build(CIFAR, 10, "every-layer")
    assert names(release) == expected.format("")
    assert names(every) == expected.format("point4 ")
    assert release.dfa.layers == (release.point1, release.point2, release.point3)
    assert every.dfa.layers == (every.point1, every.point2, every.point3, every.point4)


def test_the_release_has_no_point_before_a_bottleneck():
    network = Network(hidden=(7, 6, 5), bottleneck=0.25)
    release, every = (network.build((1, 4, 4), 3, p) for p in ("release", "every-layer"))
    assert names(release) == "flat lin1 act1 lin2 act2 point2 lin3 act3 point3 lin4 dfa"
    assert names(every) == "flat lin1 act1 point1 lin2 act2 point2 lin3 act3 point3 lin4 dfa"
    for model in (release, every):
        linears = [m for m in model if isinstance(m, nn.Linear)]
        assert [type(m) for m in linears] == [Linear, BottleneckLinear, Linear, Linear]
        assert model.lin2.keep == 0.25
        assert (model.lin2.in_features, model.lin2.out_features) == (7, 6)


def test_release_is_the_default_placement():
    assert names(CNN.build(CIFAR, 10)) == names(CNN.build(CIFAR, 10, "release"))


def test_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="'all'"):
        FC.build(CIFAR, 10, "all")


def test_each_option_makes_the_right_kind_of_module():
    fc = replace(FC, **EVERYTHING).build(CIFAR, 10)
    cnn = replace(CNN, **EVERYTHING).build(CIFAR, 10)
    for model, name, kind, p in [
        (fc, "drop0", Dropout, 0.1),
        (fc, "drop1", Dropout, 0.5),
        (fc, "drop3", Dropout, 0.5),
        (cnn, "drop0", ChannelDropout, 0.1),
        (cnn, "drop1", ChannelDropout, 0.2),
        (cnn, "drop3", ChannelDropout, 0.2),
        (cnn, "drop4", Dropout, 0.5),
    ]:
        module = model.get_submodule(name)
        assert type(module) is kind and module.p == p, name
    for model, name, kind, features in [
        (fc, "bn1", nn.BatchNorm1d, 800),
        (fc, "bn3", nn.BatchNorm1d, 800),
        (cnn, "bn1", nn.BatchNorm2d, 32),
        (cnn, "bn3", nn.BatchNorm2d, 64),
        (cnn, "bn4", nn.BatchNorm1d, 128),
    ]:
        module = model.get_submodule(name)
        assert type(module) is kind and module.num_features == features, name


@pytest.mark.parametrize("network, count", [(FC, 3), (CNN, 4)])
@pytest.mark.parametrize(
    "activation, slope, expected",
    [
        ("tanh", None, nn.Tanh),
        ("relu", None, nn.ReLU),
        ("leaky-relu", None, nn.LeakyReLU),
        ("leaky-relu", 0.5, nn.LeakyReLU),
        ("leaky-relu", 0.1, nn.LeakyReLU),
    ],
)
def test_every_activation_is_the_one_asked_for(network, count, activation, slope, expected):
    network = replace(network, activation=activation, negative_slope=slope)
    model = network.build((1, 16, 16), 10)
    found = [module for module in model if type(module) in ACTIVATIONS.values()]
    assert len(found) == count and all(isinstance(module, expected) for module in found)
    if expected is nn.LeakyReLU:
        assert {module.negative_slope for module in found} == {0.01 if slope is None else slope}


def test_fc_has_the_sizes_of_the_paper():
    model = FC.build(CIFAR, 10)
    linears = [m for m in model if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [
        (3072, 800),
        (800, 800),
        (800, 800),
        (800, 10),
    ]


def test_hidden_sizes_may_be_others_and_more_or_fewer():
    model = Network(hidden=(6, 5)).build((1, 4, 4), 3)
    assert names(model) == "flat lin1 act1 point1 lin2 act2 point2 lin3 dfa"
    shapes = [tuple(model.get_submodule(f"lin{i}").weight.shape) for i in (1, 2, 3)]
    assert shapes == [(6, 16), (5, 6), (3, 5)]


def test_cnn_has_the_sizes_of_the_paper():
    model = CNN.build(CIFAR, 10)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "conv1.weight": (32, 3, 5, 5),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 5, 5),
        "conv2.bias": (64,),
        "conv3.weight": (64, 64, 5, 5),
        "conv3.bias": (64,),
        "lin1.weight": (128, 576),
        "lin1.bias": (128,),
        "lin2.weight": (10, 128),
        "lin2.bias": (10,),
    }


@pytest.mark.parametrize(
    "shape, classes, flat, features",
    [
        ((1, 28, 28), 10, 784, 64 * 2 * 2),
        ((1, 32, 32), 10, 1024, 64 * 3 * 3),
        ((3, 32, 32), 100, 3072, 64 * 3 * 3),
        ((3, 40, 31), 7, 3720, 64 * 4 * 3),
        ((2, 15, 15), 2, 450, 64),
    ],
)
def test_networks_fit_any_image_size_channels_and_classes(shape, classes, flat, features):
    x = torch.zeros(2, *shape)
    fc, cnn = FC.build(shape, classes), CNN.build(shape, classes)
    assert fc.lin1.in_features == flat and fc(x).shape == (2, classes)
    assert cnn.conv1.in_channels == shape[0]
    assert cnn.lin1.in_features == features and cnn(x).shape == (2, classes)


@pytest.mark.parametrize("shape", [(1, 14, 32), (3, 32, 14), (1, 8, 8)])
def test_images_too_small_for_the_poolings_are_one_line_that_names_the_size(shape):
    with pytest.raises(UserError, match=f"{shape[1]}x{shape[2]}.*15x15") as caught:
        CNN.build(shape, 10)
    assert "\n" not in str(caught.value)


def test_multiply_adds_are_weights_times_positions():
    first, rest = 3072 * 800, 2 * 800 * 800 + 800 * 10
    assert Network("fc", batchnorm=True).multiply_adds((3, 32, 32), 10) == first + rest
    assert Network(bottleneck=0.1).multiply_adds((3, 32, 32), 10) == first + rest
    convolutions = 25 * (32**2 * 3 * 32 + 15**2 * 32 * 64 + 7**2 * 64 * 64)
    assert Network("cnn").multiply_adds((3, 32, 32), 10) == convolutions + 576 * 128 + 128 * 10


def test_weights_are_pytorchs_defaults_and_the_feedback_is_drawn_after_them():
    torch.manual_seed(3)
    model = replace(FC, batchnorm=True, dropout_fc=0.5).build((1, 6, 5), 4)
    torch.manual_seed(3)
    for i, (inputs, outputs) in enumerate([(30, 800), (800, 800), (800, 800), (800, 4)], 1):
        expected = nn.Linear(inputs, outputs)
        assert torch.equal(model.get_submodule(f"lin{i}").weight, expected.weight)
        assert torch.equal(model.get_submodule(f"lin{i}").bias, expected.bias)
    assert torch.equal(model.dfa.feedback_matrix, torch.randn(4, 800))


@pytest.mark.parametrize(
    "placement, sizes", [("release", [7200, 3136, 576]), ("every-layer", [7200, 3136, 576, 128])]
)
def test_the_feedback_of_the_cnn_is_as_large_as_what_stands_at_each_point(placement, sizes):
    model = CNN.build(CIFAR, 10, placement)
    assert model.dfa.feedback_matrix.shape == (10, max(sizes))
    assert [model.dfa.feedback(i).shape[1] for i in range(len(sizes))] == sizes
    assert "dfa.feedback_matrix" in model.state_dict()


def test_dfa_options_reach_the_dfa():
    options = {"normalization": False, "reduction": "sum", "training_method": "dfa"}
    model = FC.build((1, 4, 4), 3, **options)
    assert {key: getattr(model.dfa, key) for key in options} == options
    assert torch.equal(model.dfa.feedback(0), model.dfa.feedback_matrix)


def test_build_leaves_train_mode_and_fresh_batchnorm_statistics():
    model = replace(FC, batchnorm=True).build((1, 4, 4), 3)
    assert all(module.training for module in model.modules())
    assert model.bn1.num_batches_tracked == 0
    assert torch.equal(model.bn2.running_mean, torch.zeros(800))


@pytest.mark.parametrize("network", [FC, CNN])
def test_the_same_seed_gives_the_same_network_and_another_one_another(network):
    def build(seed):
        torch.manual_seed(seed)
        return replace(network, **EVERYTHING).build((1, 16, 16), 10).state_dict()

    first, again, other = build(5), build(5), build(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in [key for key in first if key.startswith(("lin", "conv", "dfa"))]:
        assert not torch.equal(first[key], other[key]), key


def test_fc_computes_what_its_formula_says():
    torch.manual_seed(0)
    model = replace(FC, activation="leaky-relu", negative_slope=0.1, batchnorm=True)
    model = model.build((1, 4, 4), 5).double()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    output = model(x)
    h = x.reshape(6, 16)
    for i in (1, 2, 3):
        lin = model.get_submodule(f"lin{i}")
        h = h @ lin.weight.T + lin.bias
        h = torch.where(h > 0, h, 0.1 * h)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    expected = h @ model.lin4.weight.T + model.lin4.bias
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_cnn_computes_what_its_formula_says():
    torch.manual_seed(0)
    model = CNN.build((3, 17, 21), 5).double()
    x = torch.randn(4, 3, 17, 21, dtype=torch.float64)
    h = x
    for i in (1, 2, 3):
        conv = model.get_submodule(f"conv{i}")
        h = F.max_pool2d(torch.tanh(F.conv2d(h, conv.weight, conv.bias, padding=2)), 3, 2)
    h = torch.tanh(F.linear(h.flatten(1), model.lin1.weight, model.lin1.bias))
    expected = F.linear(h, model.lin2.weight, model.lin2.bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", [FC, CNN])
def test_with_dropout_the_values_are_those_of_the_network_without_feedback(network):
    model = replace(network, **EVERYTHING).build((1, 16, 16), 10, "every-layer")
    x = torch.randn(4, 1, 16, 16)
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    assert torch.equal(output, plain(model)(x))
    assert not torch.equal(output, model(x))  # dropout draws anew
    model.eval()
    assert torch.equal(model(x), plain(model)(x))
