"""Where dfa_from_bp puts feedback points, and what it leaves alone."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfatools import DFA, DFALayer, dfa_from_bp


class Residual(nn.Sequential):
    """A Sequential by type only: its forward adds the input."""

    def forward(self, x):
        return x + super().forward(x)


def fc():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def names(model):
    return [name for name, _ in model.named_modules() if name]


def points(model):
    return [name for name, module in model.named_modules() if isinstance(module, DFALayer)]


def layers(model):
    """The feedback points that the DFA at the end feeds, by name."""
    by_module = {module: name for name, module in model.named_modules()}
    return [by_module[layer] for layer in model[-1].layers]


def test_points_go_before_every_weight_layer_but_the_first():
    model = dfa_from_bp(fc())
    assert names(model) == ["0", "1", "feedback_2", "2", "3", "feedback_4", "4", "dfa"]
    assert isinstance(model[-1], DFA)
    assert layers(model) == points(model) == ["feedback_2", "feedback_4"]


def test_the_paper_s_convolutional_network():
    bp = nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 4, 5), act1=nn.Tanh(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(4, 4, 5), act2=nn.Tanh(), flat=nn.Flatten(),
        lin1=nn.Linear(16, 8), act3=nn.Tanh(), lin2=nn.Linear(8, 2),
    ))  # fmt: skip
    model = dfa_from_bp(bp)
    assert points(model) == ["feedback_conv2", "feedback_lin1", "feedback_lin2"]
    assert [name for name in names(model) if "feedback" not in name] == [*names(bp), "dfa"]


@pytest.mark.parametrize(
    "layer", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
)
def test_every_kind_of_convolution_counts(layer):
    assert points(dfa_from_bp(nn.Sequential(layer(2, 2, 3), layer(2, 2, 3)))) == ["feedback_1"]


class Scale(nn.Module):
    """Has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("module", [
    nn.LSTM(5, 5),
    nn.GRU(5, 5),
    nn.RNN(5, 5),
    nn.Bilinear(5, 5, 5),
    nn.MultiheadAttention(5, 1),
    nn.Embedding(5, 5),
    nn.TransformerEncoderLayer(5, 1),
    Scale(),
    nn.Sequential(nn.Tanh(), Scale()),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_every_module_with_parameters_counts(module):
    model = dfa_from_bp(nn.Sequential(module, nn.Linear(5, 3)))
    assert points(model) == ["feedback_1"]


@pytest.mark.parametrize("module", [
    nn.BatchNorm1d(5),
    nn.LayerNorm(5),
    nn.GroupNorm(1, 5),
    nn.InstanceNorm1d(5, affine=True),
    nn.RMSNorm(5),
    nn.PReLU(),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_normalisation_belongs_to_the_weights_in_front(module):
    model = dfa_from_bp(nn.Sequential(nn.Linear(6, 5), module, nn.Linear(5, 3)))
    assert points(model) == ["feedback_2"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("behind", [(), (nn.Flatten(0),)])
@pytest.mark.parametrize("last", [
    nn.LogSoftmax(1),
    nn.Softmax(1),
    nn.Softmax2d(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_a_network_that_ends_in_probabilities_is_refused(last, behind, nested):
    """Of them the error at the output is not that at the logits, and does not vanish with it."""
    end = nn.Sequential(last, *behind) if nested else last
    with pytest.raises(ValueError, match=f"ends in {type(last).__name__}: DFA needs the error at"):
        dfa_from_bp(nn.Sequential(*fc(), end, *behind))
    within = nn.Sequential(nn.Linear(6, 5), last, nn.Linear(5, 3))
    assert points(dfa_from_bp(within)) == ["feedback_2"]


def test_nested_sequentials_are_entered():
    bp = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 3)),
    )
    model = dfa_from_bp(bp)
    assert layers(model) == points(model) == ["1.feedback_1", "2.feedback_0"]
    model.load_state_dict(bp.state_dict(), strict=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_block_of_another_kind_is_one_layer(first):
    block = Residual(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    bp = nn.Sequential(nn.Identity() if first else nn.Linear(5, 5), block, nn.Linear(5, 3))
    model = dfa_from_bp(bp)
    assert points(model) == (["feedback_2"] if first else ["feedback_1", "feedback_2"])
    x = torch.randn(4, 5)
    assert torch.equal(model(x), bp(x))  # the block's own forward is kept
    assert type(model.get_submodule("1")) is Residual


def test_a_module_that_stands_in_two_places():
    act, lin = nn.Tanh(), nn.Linear(5, 5)
    bp = nn.Sequential(nn.Linear(6, 5), act, lin, act, lin, act, nn.Linear(5, 3))
    model = dfa_from_bp(bp)
    assert points(model) == ["feedback_2", "feedback_4", "feedback_6"]
    assert model.get_submodule("2") is model.get_submodule("4")
    x = torch.randn(4, 6)
    assert torch.equal(model(x), bp(x))


def test_in_bp_mode_it_is_the_original_bit_for_bit():
    bp = fc()
    model = dfa_from_bp(bp, training_method="bp")
    x, y = torch.randn(4, 6), torch.arange(4) % 3
    for network in (bp, model):
        F.cross_entropy(network(x), y).backward()
    for left, right in zip(bp.parameters(), model.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)


def test_the_original_is_left_as_it_was():
    bp = fc()
    bp[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in bp.state_dict().items()}
    model = dfa_from_bp(bp)
    assert not model[0].weight.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert names(bp) == ["0", "1", "2", "3", "4"]
    for name, tensor in bp.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_modes_are_kept():
    bp = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3))
    bp[0][1].eval()
    for mode in (bp, bp.eval()):
        model = dfa_from_bp(mode)
        for name, module in mode.named_modules():
            assert model.get_submodule(name).training == module.training


def test_options_reach_the_dfa():
    generator = torch.Generator()
    options = {
        "normalization": False,
        "reduction": "sum",
        "training_method": "shallow",
        "batch_dims": 2,
        "feedback_device": "cpu",
        "generator": generator,
    }
    dfa = dfa_from_bp(fc(), **options)[-1]
    assert {name: getattr(dfa, name) for name in options} == options
    with pytest.raises(ValueError, match="reduction must be"):
        dfa_from_bp(fc(), reduction="max")


def test_a_state_dict_of_the_original_loads():
    bp, model = fc(), dfa_from_bp(fc())
    x = torch.randn(4, 6)
    for _ in range(2):  # before and after the first pass
        bp[0].weight.data.mul_(2)
        model.load_state_dict(bp.state_dict(), strict=True)
        assert torch.equal(model(x), bp(x))


@pytest.mark.parametrize("model, error, message", [
    (nn.Linear(2, 2), TypeError, "takes an nn.Sequential, not Linear"),
    (Residual(nn.Linear(2, 2), nn.Linear(2, 2)), TypeError, "not Residual"),
    (nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), ValueError, "fewer than two modules with w"),
    (dfa_from_bp(fc()), ValueError, "has feedback points already"),
])  # fmt: skip
def test_errors(model, error, message):
    with pytest.raises(error, match=message):
        dfa_from_bp(model)


@pytest.mark.parametrize("name", ["dfa", "feedback_last"])
def test_no_module_is_written_over(name):
    model = nn.Sequential(OrderedDict([(name, nn.Linear(3, 3)), ("last", nn.Linear(3, 2))]))
    with pytest.raises(ValueError, match=f"called {name}"):
        dfa_from_bp(model)


class Named(nn.Sequential):
    """A Sequential with more to it."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.register_buffer("mean", torch.ones(6))

    def predict(self, x):
        return self(x - self.mean).argmax(1)


def test_a_sequential_of_one_s_own_stays_what_it_is():
    nested = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    nested.register_forward_hook(lambda module, args, output: 2 * output)
    bp = Named(nn.Linear(6, 5), nested, nn.Linear(5, 3)).eval()
    model = dfa_from_bp(bp)
    x = torch.randn(4, 6)
    assert isinstance(model, Named) and not model.training
    assert torch.equal(model(x), bp(x)) and torch.equal(model.predict(x), bp.predict(x))
    model.load_state_dict({name: 2 * tensor for name, tensor in bp.state_dict().items()})
    assert torch.equal(model.mean, torch.full((6,), 2.0)) and torch.equal(bp.mean, torch.ones(6))
    assert names(bp) == ["0", "1", "1.0", "1.1", "2"]
