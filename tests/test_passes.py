"""One call of a network is one pass, in any order of calls: right, or refused in one line."""

import copy
import math
import pickle
import threading
import weakref
from contextlib import suppress

import pytest
import torch
from torch import nn

from dfatools import DFA, DFALayer

RANDOM = torch.Generator().manual_seed(1)
A, B = (torch.randn(5, 6, generator=RANDOM, dtype=torch.float64) for _ in range(2))
ERROR_A, ERROR_B = (torch.randn(5, 3, generator=RANDOM, dtype=torch.float64) for _ in range(2))


class Net(nn.Module):
    """An encoder and a head, in `forward` or called by themselves."""

    def __init__(self, recurrent=False):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 3)
        self.point, self.inner = DFALayer(recurrent), DFALayer(recurrent)
        self.dfa = DFA(self)

    def encode(self, x):
        return self.point(torch.tanh(self.first(x)))

    def classify(self, h):
        return self.dfa(self.last(self.inner(torch.tanh(self.middle(h)))))

    def forward(self, x):
        return self.classify(self.encode(x))


def net(build=Net, **options):
    torch.manual_seed(0)
    model = build(**options).double()
    with model.dfa.one_pass():
        model.classify(model.encode(A))  # draws the matrix
    return model


def backward(*pairs):
    """So that e is the given error at each output."""
    sum((output * error).sum() for output, error in pairs).backward()


def expected(model, *pairs):
    """Of an encoder and its head, for inputs and errors: e B_i through each block by itself."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for x, error in pairs:
        h = torch.tanh(model.first(x))
        g = torch.tanh(model.middle(h.detach()))
        output = model.last(g.detach())
        for block, size in ((h, 9), (g, 8)):
            block.backward(error @ model.dfa.feedback_matrix[:, :size] / math.sqrt(size * 3))
        output.backward(error)
    return [parameter.grad for parameter in model.parameters()]


def assert_gradients(model, wanted):
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)
    model.zero_grad()


def assert_usable(model):
    """Two passes have the right gradients: a call before has left no state."""
    model.zero_grad()
    for _ in range(2):
        backward((model(A), ERROR_A))
        assert_gradients(model, expected(model, (A, ERROR_A)))


def test_parts_called_by_themselves():
    model = net()
    with model.dfa.one_pass():
        output = model.classify(model.encode(A))
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_several_outputs_in_one_pass_and_several_passes_before_the_backward_pass():
    model = net()
    with model.dfa.one_pass():
        outputs = [model.classify(model.encode(x)) for x in (A, B)]
    backward(*zip(outputs, (ERROR_A, ERROR_B)))
    wanted = expected(model, (A, ERROR_A), (B, ERROR_B))
    assert_gradients(model, wanted)
    backward((model(A), ERROR_A), (model(B), ERROR_B))
    assert_gradients(model, wanted)
    with model.dfa.one_pass():
        outputs = model(A), model(B)
    backward(*zip(outputs, (ERROR_A, ERROR_B)))
    assert_gradients(model, wanted)


def test_a_whole_pass_without_gradients_between_encoder_and_head():
    model = net()
    with model.dfa.one_pass():
        h = model.encode(A)
        with torch.no_grad():
            model(B)
        output = model.classify(h)
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


class Views(Net):
    """SimSiam's order: both views through the encoder, then both through the head."""

    def forward(self, a, b):
        h, g = self.encode(a), self.encode(b)
        return self.classify(h), self.classify(g)


@pytest.mark.parametrize("recurrent, message", [
    (False, "feedback point 0 was called 2 times before the DFA"),
    (True, r"second call in a pass came by its points \[0, 1\] times, its first \[2, 1\] times"),
])  # fmt: skip
def test_interleaved_views_are_refused(recurrent, message):
    model = net(Views, recurrent=recurrent)
    with pytest.raises(RuntimeError, match=message):
        model(A, B)
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Adapted(Net):
    """Domain adaptation: the encoder also sees a batch that the DFA's output does not."""

    def forward(self, a, b, remedy=False):
        h = self.encode(a)
        with torch.set_grad_enabled(not remedy):
            other = self.encode(b)
        return self.classify(h), other


def test_an_encoder_that_sees_a_second_batch():
    model = net(Adapted)
    with pytest.raises(RuntimeError, match=r"2 times before the DFA: .* under torch.no_grad"):
        model(A, B)
    backward((model(A, B, remedy=True)[0], ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_what_follows_the_output_is_not_fed():
    model = net()
    with model.dfa.one_pass():
        output = model.classify(model.encode(A))
        model.encode(B)
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_two_heads_on_one_encoding_are_refused():
    model = net()
    with model.dfa.one_pass():
        h = model.encode(A)
        model.classify(h)
        with pytest.raises(RuntimeError, match=r"points \[0, 1\] times, its first \[1, 1\] times"):
            model.classify(h)
    assert_usable(model)


class Staged(Net):
    def forward(self, x, stage=None):
        return super().forward(x) if stage is None else getattr(self, stage)(x)


def test_stages_that_are_passes_by_themselves_are_refused():
    model = net(Staged)
    with pytest.raises(RuntimeError, match="a pass ended before its DFA.*one_pass"):
        model(A, "encode")
    with pytest.raises(RuntimeError, match="a pass ended before its DFA"), model.dfa.one_pass():
        model.encode(A)
    assert_usable(model)
    with model.dfa.one_pass():
        output = model(model(A, "encode"), "classify")
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_parts_outside_of_a_pass():
    model = net()
    h = model.encode(A)  # detached, and not fed
    with pytest.raises(RuntimeError, match="DFA was called outside of a pass: .*one_pass"):
        model.classify(h)
    assert_usable(model)
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        backward((model.classify(model.encode(A)), ERROR_A))


def test_a_pass_within_a_pass_is_refused():
    model = net()
    outer, inner = model.dfa.one_pass(), model.dfa.one_pass()
    with pytest.raises(RuntimeError, match="one_pass was called in a pass"), outer, inner:
        pass
    assert_usable(model)


class Halting(Net):
    """Raises between its two points."""

    error = None

    def forward(self, x):
        h = self.encode(x)
        if self.error is not None:
            raise self.error
        return self.classify(h)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_pass_that_raises_leaves_nothing_behind(error, explicit, recurrent):
    model = net(Halting, recurrent=recurrent)
    model.error = error
    with pytest.raises(error):
        if explicit:
            with model.dfa.one_pass():
                model(A)
        else:
            model(A)
    model.error = None
    if error is ValueError or explicit:  # PyTorch calls no hooks after KeyboardInterrupt
        with pytest.raises(RuntimeError, match="outside of a pass"):
            model.classify(torch.tanh(model.first(A)))
    assert_usable(model)


class Reporting(Net):
    """Calls itself: under no_grad, as a teacher."""

    def forward(self, x, teaches=True):
        h = self.encode(x)
        if teaches:
            with torch.no_grad():
                self(x, teaches=False)
        return self.classify(h)


def test_a_network_that_calls_itself_without_gradients():
    assert_usable(net(Reporting))


class Recursive(Net):
    """Calls itself with gradients, and comes to the DFA in the inner call."""

    def forward(self, x, inner=False):
        return self.classify(x) if inner else self(self.encode(x), inner=True)


def test_a_network_that_calls_itself_is_refused_but_in_one_pass():
    model = net(Recursive)
    with pytest.raises(RuntimeError, match="a network that calls itself does so in .*one_pass"):
        model(A)
    with model.dfa.one_pass():
        output = model(A)
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_activations_have_gradients_of_their_own():
    """Leaves keep what arrives, and add to it."""
    points = nn.ModuleList([DFALayer(), DFALayer()])
    dfa, head = DFA(points), nn.Linear(8, 3).double()
    leaves = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for _ in range(2):
        with dfa.one_pass():
            hidden = [point(leaf) for point, leaf in zip(points, leaves)]
            output = dfa(head(torch.cat(hidden, 1)))
        backward((output, ERROR_A))
    wanted = 2 * ERROR_A @ dfa.feedback_matrix / math.sqrt(4 * 3)
    for leaf in leaves:
        torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=1e-12)


class InPlace(nn.Module):
    """A residual block that adds to its input, behind that input's point."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.point, self.inplace = DFALayer(), True
        self.dfa = DFA(self)

    def forward(self, x):
        h = self.first(x)
        change = self.middle(torch.relu(self.point(h)))
        if self.inplace:
            h += change
        else:
            h = h + change
        return self.dfa(self.last(h))


def test_an_activation_that_is_changed_in_place_behind_its_point():
    torch.manual_seed(0)
    model = InPlace().double()
    model(A)
    results = []
    for model.inplace in (False, True):
        model.zero_grad()
        backward((model(A), ERROR_A))
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, inplace in zip(*results, strict=True):
        torch.testing.assert_close(inplace, plain, rtol=0, atol=1e-12)
    # The activation gets e B at its point, and the true gradient through the sum.
    error = ERROR_A @ (model.dfa.feedback_matrix / math.sqrt(8 * 3) + model.last.weight)
    torch.testing.assert_close(model.first.weight.grad, error.T @ A, rtol=0, atol=1e-12)
    wanted = (ERROR_A @ model.last.weight).T @ torch.relu(model.first(A))
    torch.testing.assert_close(model.middle.weight.grad, wanted, rtol=0, atol=1e-12)


def test_a_network_needs_no_garbage_collection():
    model = net()
    backward((model(A), ERROR_A))
    weight = weakref.ref(model.first.weight)
    del model
    assert weight() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_in_a_pass_begins_without_one(duplicate):
    model = net()
    with model.dfa.one_pass():
        h = model.encode(A)
        other = duplicate(model)
        output = model.classify(h)
    backward((output, ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))
    assert_usable(other)


class Waiting(Net):
    """Lets the other thread go on, between its two points."""

    def __init__(self):
        super().__init__()
        self.barrier = None

    def forward(self, x):
        h, barrier = self.encode(x), self.barrier
        if barrier is not None:
            barrier.wait()
            barrier.wait()
        return self.classify(h)


def test_another_thread_is_refused_and_disturbs_nothing():
    model = net(Waiting)
    model.barrier = threading.Barrier(2, timeout=10)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(model(A)))
    thread.start()
    model.barrier.wait()
    for attempt in (model, model.dfa.one_pass().__enter__):
        with pytest.raises(RuntimeError, match="in another thread: give each thread a copy"):
            attempt(*[B] * (attempt is model))
    with pytest.raises(RuntimeError, match="outside of a pass"):
        model.classify(model.encode(B))
    model.barrier.wait()
    thread.join()
    model.barrier = None
    backward((outputs[0], ERROR_A))
    assert_gradients(model, expected(model, (A, ERROR_A)))


def test_a_thread_that_was_ended_in_a_pass_is_forgotten():
    model = net(Halting)
    model.error = SystemExit

    def run():
        with suppress(SystemExit):
            model(A)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    model.error = None
    assert_usable(model)


@pytest.mark.parametrize("method", ["bp", "shallow"])
def test_other_methods_run_in_any_thread(method):
    model = net(Waiting)
    model.dfa.training_method = method
    model.barrier = threading.Barrier(2, timeout=10)
    thread = threading.Thread(target=lambda: model(A))
    thread.start()
    model.barrier.wait()
    barrier, model.barrier = model.barrier, None
    backward((model(A), ERROR_A))
    barrier.wait()
    thread.join()


@pytest.mark.parametrize("swap", ["shared", "copied"])
def test_a_point_of_another_network_is_refused(swap):
    model, other = net(), net()
    model.point = other.point if swap == "shared" else copy.deepcopy(model.point)
    with pytest.raises(
        RuntimeError, match="point of the network belongs to another DFA: make a new DFA"
    ):
        model(A)
    model.dfa = DFA(model)
    model(A)
    assert_usable(model)


def test_the_points_may_go_to_a_new_dfa():
    """As where the output layer was replaced."""
    model = net()
    old, model.last = model.dfa, nn.Linear(8, 3).double()
    model.dfa = DFA(model)
    hooks = [*model._forward_pre_hooks, *model._forward_hooks]
    assert len(hooks) == 2
    model(A)
    assert_usable(model)
    model.dfa = old
    for method in ("dfa", "bp", "shallow"):
        old.training_method = method
        with pytest.raises(RuntimeError, match="another DFA has taken over the feedback points"):
            model(A)


@pytest.mark.parametrize("wrong, kind", [
    (lambda h: (h, h), "tuple"),
    (lambda h: {"logits": h}, "dict"),
    (lambda h: None, "NoneType"),
])  # fmt: skip
def test_what_is_no_tensor_is_refused(wrong, kind):
    model = net()
    with pytest.raises(TypeError, match=f"a feedback point takes one tensor, not a {kind}"):
        model.point(wrong(A))
    with pytest.raises(TypeError, match=f"DFA takes the output as one tensor, not a {kind}"):
        model.dfa(wrong(A))
