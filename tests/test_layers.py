"""The layers of mltools compute the outputs, gradients and SGD steps of their torch.nn versions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mltools.layers import ChannelDropout, Conv2d, Dropout, Linear, MaxPool2d, Tanh

LR = 0.3
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
IMAGES = (4, 2, 6, 5)
DROPOUTS = [(Dropout, nn.Dropout, (6, 5)), (ChannelDropout, nn.Dropout2d, (4, 3, 2, 2))]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(actual, expected):
    actual, expected = (torch.as_tensor(x).detach().numpy() for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("needs_input", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize(
    "kind, torch_kind, sizes, shape, format",
    [
        (Linear, nn.Linear, (7, 5), (6, 7), CONTIGUOUS),
        (Linear, nn.Linear, (7, 5), (2, 3, 7), CONTIGUOUS),
        (Conv2d, nn.Conv2d, (2, 3, 3, 1, 1), IMAGES, CONTIGUOUS),
        (Conv2d, nn.Conv2d, (2, 3, 3, 1, 1), IMAGES, CHANNELS_LAST),
        (Conv2d, nn.Conv2d, (2, 3, 5, 2, 2), IMAGES, CONTIGUOUS),
    ],
    ids=["rows", "tokens", "images", "channels-last", "strided"],
)
def test_output_and_step_equal_torchs_layer_and_sgd(
    kind, torch_kind, sizes, shape, format, needs_input, bias
):
    layer, reference = (k(*sizes, bias=bias).double() for k in (kind, torch_kind))
    reference.load_state_dict(layer.to(memory_format=format).state_dict())
    layer.lr = LR
    x = randn(*shape)
    x, x_reference = (x.detach().clone().requires_grad_(needs_input) for _ in range(2))
    output, expected = layer(x), reference(x_reference)
    close(output, expected)
    grad_output = torch.randn_like(output).contiguous(memory_format=format)
    output.backward(grad_output), expected.backward(grad_output)
    torch.optim.SGD(reference.parameters(), LR).step()
    for ours, theirs in zip(layer.parameters(), reference.parameters()):
        close(ours, theirs)
        assert ours.grad is None
    if needs_input:
        close(x.grad, x_reference.grad)


@pytest.mark.parametrize("lr, training", [(None, True), (LR, False)], ids=["no-lr", "eval"])
@pytest.mark.parametrize("layer, shape", [(Linear(3, 2), (4, 3)), (Conv2d(3, 2, 3), (4, 3, 5, 5))])
def test_without_lr_or_in_eval_mode_a_layer_keeps_its_weights(layer, shape, lr, training):
    layer = copy.deepcopy(layer).train(training)
    before, layer.lr = layer.weight.clone(), lr
    layer(torch.randn(shape)).sum().backward()
    assert torch.equal(layer.weight, before) and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("format", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("tanh", [False, True], ids=["pooling", "tanh"])
def test_a_pooling_sends_the_gradient_of_a_window_to_its_first_maximum(tanh, format):
    x = (torch.randint(4, (2, 3, 7, 8)) / 2 - 1).double()  # with ties
    x = x.contiguous(memory_format=format).requires_grad_()
    output = MaxPool2d(3, 2, tanh)(Tanh(pooled=True)(x) if tanh else x)
    grad_output = randn(2, 3, 3, 3)
    output.backward(grad_output)
    values = np.tanh(x.detach().numpy()) if tanh else x.detach().numpy()
    expected, grad_input = np.empty((2, 3, 3, 3)), np.zeros(x.shape)
    for n, c, i, j in np.ndindex(expected.shape):
        window = values[n, c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        expected[n, c, i, j] = top = window.max()
        row, column = divmod(window.argmax(), 3)
        slope = 1 - top**2 if tanh else 1
        grad_input[n, c, 2 * i + row, 2 * j + column] += slope * grad_output[n, c, i, j]
    close(output, expected)
    close(x.grad, grad_input)


def test_tanh_and_pooling_are_swapped_in_train_mode_only():
    act, pooling = Tanh(pooled=True), MaxPool2d(3, 2, tanh=True)
    x = torch.randn(2, 3, 7, 8)
    assert act(x) is x
    assert torch.equal(act.eval()(x), x.tanh())
    assert torch.equal(pooling.eval()(x), nn.functional.max_pool2d(x, 3, 2))


@pytest.mark.parametrize("kind, torch_kind, shape", DROPOUTS)
@pytest.mark.parametrize("own", [True, False], ids=["own-generator", "default"])
def test_dropout_draws_the_masks_of_torch(kind, torch_kind, shape, own):
    layer, x = kind(0.3), torch.ones(shape)
    torch.manual_seed(3)
    expected = [torch_kind(0.3)(x) for _ in range(2)]
    assert (expected[0] == 0).any() and not torch.equal(*expected)
    torch.manual_seed(4 if own else 3)
    layer.generator = torch.Generator().manual_seed(3) if own else None
    before = torch.get_rng_state()
    assert all(torch.equal(layer(x), values) for values in expected)
    assert torch.equal(torch.get_rng_state(), before) == own
    assert layer.eval()(x) is x


@pytest.mark.parametrize("kind, torch_kind, shape", DROPOUTS)
@pytest.mark.parametrize("p, kept", [(0, 1), (1, 0)])
def test_dropout_of_nothing_or_everything(kind, torch_kind, shape, p, kept):
    assert (kind(p)(torch.ones(shape)) == kept).all()
