"""`measure_alignment` and `prealign` restore modes, gradients, hooks and random state."""

import copy
from contextlib import contextmanager

import pytest
import torch
from formulas import batch, fc, with_dfa
from torch import nn
from torch.nn import functional as F

from dfatools import BottleneckLinear, DFALayer, dfa_from_bp, measure_alignment, prealign


@contextmanager
def undisturbed(model, changing=()):
    """Checks that a block changes no tensor (except `changing`), setting or random state."""
    gradients = [parameter.grad for parameter in model.parameters()]

    def tensors():
        kept = {key: value for key, value in model.state_dict().items() if key not in changing}
        return kept, gradients, torch.get_rng_state()

    def settings():
        modules = [(module.training, [*module._forward_hooks]) for module in model.modules()]
        return modules, model.dfa.training_method

    before = copy.deepcopy((tensors(), settings()))
    yield
    torch.testing.assert_close(tensors(), before[0], rtol=0, atol=0)
    assert settings() == before[1]
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients))
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


class Noisy(nn.Module):
    """Dropout, active in eval mode too."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("method", ["dfa", "bp", "shallow"])
@pytest.mark.parametrize("act, changing", [(measure_alignment, ()), (prealign, ["5.weight"])])
def test_modes_gradients_and_random_state_are_restored(act, changing, method, grad_mode):
    x, y = batch()
    layers = nn.Dropout(0.5), nn.Linear(7, 6), nn.Tanh(), nn.BatchNorm1d(6), Noisy()
    bp = nn.Sequential(*layers, nn.Linear(6, 4))
    model = dfa_from_bp(bp, example=x.float(), training_method=method).double()
    model.get_submodule("4").eval()
    F.cross_entropy(model(x), y).backward()
    model.get_submodule("5").bias.grad = None
    with grad_mode(), undisturbed(model, changing):
        act(model, x, y, F.cross_entropy)
        assert torch.is_grad_enabled() == (grad_mode is torch.enable_grad)


def test_a_failing_loss_leaves_the_model_unchanged():
    x, y = batch()
    model = fc(example=x.float())
    with undisturbed(model), pytest.raises(ZeroDivisionError):
        measure_alignment(model, x, y, lambda output, y: 1 / 0)


class Recording(nn.Tanh):
    """A Tanh that records its modes. LoRA, for example, merges weights when `train` is called."""

    def train(self, mode=True):
        self.modes = [*getattr(self, "modes", []), mode]
        return super().train(mode)


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_restored_by_train(mode):
    model = with_dfa(nn.Linear(7, 6), Recording(), DFALayer(), nn.Linear(6, 4)).train(mode)
    measure_alignment(model, *batch(), F.cross_entropy)
    assert model[1].modes[:2] == [mode, False] and model[1].modes[-1] == mode
    assert model.training == model[1].training == mode


def test_the_generator_of_a_bottleneck_is_restored():
    bottleneck = BottleneckLinear(6, 9, 0.5)
    model = with_dfa(nn.Linear(7, 6), bottleneck, DFALayer(), nn.Linear(9, 4))
    bottleneck.input_generator = generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    measure_alignment(model, *batch(), F.cross_entropy)
    assert torch.equal(generator.get_state(), before) and bottleneck.masking


def test_drawing_a_feedback_matrix_advances_the_default_generator():
    first, second = fc(), fc()
    for model in (first, second):
        measure_alignment(model, *batch(), F.cross_entropy)
    third = torch.randn(4, 9, dtype=torch.float64)
    matrices = first[-1].feedback_matrix, second[-1].feedback_matrix, third
    assert len({matrix.sum().item() for matrix in matrices}) == 3
