"""One call of a network is one pass. Each order of calls gives right gradients, or is refused."""

import copy
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from formulas import assert_close, batch, copy_gradients, expected_gradients, mean_loss
from torch import nn

from dfatools import DFA, DFALayer

A, Y = batch(6, samples=5, classes=3)
B, _ = batch(6, samples=5, seed=2)


def encode_and_classify(model, x):
    return model.classify(model.encode(x))


class Net(nn.Module):
    """Network of an encoder and a head; `run(model, ...)` is its forward pass."""

    def __init__(self, run=encode_and_classify, recurrent=False):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 3)
        self.point, self.inner = DFALayer(recurrent=recurrent), DFALayer(recurrent=recurrent)
        self.dfa = DFA(self)
        self.run = run

    def encode(self, x):
        return self.point(torch.tanh(self.first(x)))

    def classify(self, h):
        return self.dfa(self.last(self.inner(torch.tanh(self.middle(h)))))

    def forward(self, *args, **options):
        return self.run(self, *args, **options)


def net(*args, **options):
    torch.manual_seed(0)
    model = Net(*args, **options).double()
    with model.dfa.one_pass():
        encode_and_classify(model, A)  # draws the matrix
    return model


def assert_fed(model, *pairs):
    """Asserts that the mean loss over several outputs has the gradients of the equations.

    Args:
        pairs: (output, input) of each forward pass.
    """
    model.zero_grad()
    (sum(mean_loss(output, Y) for output, _ in pairs) / len(pairs)).backward()
    batches = [(x, Y) for _, x in pairs]
    expected = expected_gradients(model, *batches, forward=encode_and_classify)
    assert_close(copy_gradients(model), expected)


def assert_usable(model):
    """Asserts that two passes have the right gradients: earlier calls have left no state."""
    for _ in range(2):
        assert_fed(model, (model(A), A))


# Supported orders of calls


def test_parts_called_separately_in_one_pass():
    model = net()
    with model.dfa.one_pass():
        h = model.encode(A)
        with torch.no_grad():
            model(B)
        output = model.classify(h)
        model.encode(B)  # after the DFA, so without feedback
    assert_fed(model, (output, A))


def test_several_outputs_in_one_pass_and_several_passes_before_the_backward_pass():
    model = net()
    with model.dfa.one_pass():
        a, b = (model.classify(model.encode(x)) for x in (A, B))
    assert_fed(model, (a, A), (b, B))
    assert_fed(model, (model(A), A), (model(B), B))
    with model.dfa.one_pass():
        a, b = model(A), model(B)
    assert_fed(model, (a, A), (b, B))


def teach(model, x, teaches=True):
    """Calls the network within its own forward pass under no_grad, as a teacher."""
    h = model.encode(x)
    if teaches:
        with torch.no_grad():
            model(x, teaches=False)
    return model.classify(h)


def recurse(model, x, inner=False):
    """Calls the network within its own forward pass; only the inner call reaches the DFA."""
    return model.classify(x) if inner else model(model.encode(x), inner=True)


def test_a_network_may_call_itself_without_gradients_or_in_one_pass():
    assert_usable(net(teach))
    model = net(recurse)
    with pytest.raises(RuntimeError, match="the network calls itself: call it in .*one_pass"):
        model(A)
    with model.dfa.one_pass():
        output = model(A)
    assert_fed(model, (output, A))


# Refused orders of calls


def encode_two_views(model, x):
    """Encodes two views before it classifies them, as SimSiam does."""
    h, g = model.encode(x), model.encode(2 * x)
    return model.classify(h), model.classify(g)


def classify_twice(model, x):
    h = model.encode(x)
    return model.classify(h), model.classify(h)


def call_no_point(model, x):
    return model.dfa(model.last(model.middle(model.first(x))))


def begin_another_pass(model, x):
    model.dfa.one_pass().__enter__()


@pytest.mark.parametrize("run, recurrent, message", [
    (Net.encode, False, "a pass ended without feedback for point 0.*one_pass"),
    (encode_two_views, False, r"0 was called 2 times .* under torch.no_grad"),
    (encode_two_views, True, r"called \[2, 1\] times before the first .* \[0, 1\] times"),
    (classify_twice, False, r"called \[1, 1\] times before the first .* \[0, 1\] times"),
    (call_no_point, False, "no feedback point was called in this pass"),
    (begin_another_pass, False, "one_pass was called inside a pass"),
])  # fmt: skip
@pytest.mark.parametrize("explicit", [False, True])
def test_refused_orders(run, recurrent, message, explicit):
    model = net(run, recurrent)
    with (
        pytest.raises(RuntimeError, match=message),
        model.dfa.one_pass() if explicit else nullcontext(),
    ):
        model(A)
    model.run = encode_and_classify
    assert_usable(model)


def test_parts_called_outside_of_a_pass_are_refused_under_dfa_only():
    model = net()
    h = model.encode(A)  # detached, without feedback
    with pytest.raises(RuntimeError, match="DFA was called outside of a pass: .*one_pass"):
        model.classify(h)
    assert_usable(model)
    for method in ("bp", "shallow"):
        model.dfa.training_method = method
        mean_loss(model.classify(model.encode(A)), Y).backward()


class Auxiliary(Net):
    """Calls its second point only after the DFA."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(6, 6)

    def forward(self, x):
        output = self.dfa(self.last(torch.tanh(self.middle(self.encode(x)))))
        return output, self.inner(self.side(x))


def test_a_part_called_after_the_dfa_is_refused_unless_it_is_frozen():
    model = Auxiliary().double()
    with pytest.raises(RuntimeError, match="a pass ended without feedback for point 1"):
        model(A)
    model.side.requires_grad_(False)
    assert model(A)[0].requires_grad


def run_that_raises(error):
    """Returns a forward pass that raises `error` between its two points."""

    def run(model, x):
        model.encode(x)
        raise error

    return run


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_pass_that_raises_leaves_no_state(error, explicit):
    model = net(run_that_raises(error), recurrent=True)
    for _ in range(2):
        with pytest.raises(error), model.dfa.one_pass() if explicit else nullcontext():
            model(A)
    model.run = encode_and_classify
    duplicate = copy.deepcopy(model)
    if error is ValueError or explicit:  # PyTorch calls no hooks after KeyboardInterrupt
        with pytest.raises(RuntimeError, match="outside of a pass"):
            model.classify(torch.tanh(model.first(A)))
    assert_usable(model)
    assert_usable(duplicate)


# Activations


def test_leaf_activations_have_separate_gradients():
    """The `.grad` of leaf activations accumulates, so it must not share memory between leaves."""
    points = nn.ModuleList([DFALayer(), DFALayer()])
    dfa, head = DFA(points), nn.Linear(8, 3).double()
    leaves = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    error = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        with dfa.one_pass():
            hidden = [point(leaf) for point, leaf in zip(points, leaves)]
            output = dfa(head(torch.cat(hidden, 1)))
        output.backward(error)
    wanted = 2 * error @ dfa.feedback_matrix / math.sqrt(4 * 3)
    assert_close([leaf.grad for leaf in leaves], [wanted, wanted])


def test_a_finished_pass_keeps_no_tensor_alive():
    model, hidden = net(), []
    model.point.register_forward_pre_hook(lambda _, args: hidden.append(weakref.ref(args[0])))
    mean_loss(model(A), Y).backward()
    assert len(hidden) == 1 and hidden[0]() is None
    weight = weakref.ref(model.first.weight)
    del model  # without garbage collection
    assert weight() is None


# Copies, threads and other DFAs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_within_a_pass_is_in_no_pass(duplicate):
    model = net()
    with model.dfa.one_pass():
        h = model.encode(A)
        other = duplicate(model)
        output = model.classify(h)
    assert_fed(model, (output, A))
    assert_usable(other)


def test_a_second_thread_is_refused_and_does_not_disturb_the_pass():
    def attempt(model):
        for begin in (lambda: model(B), model.dfa.one_pass().__enter__):
            with pytest.raises(RuntimeError, match="in another thread: give each thread a copy"):
                begin()
        with pytest.raises(RuntimeError, match="outside of a pass"):
            encode_and_classify(model, B)
        for method in ("bp", "shallow"):
            model.dfa.training_method = method
            model(B)
        model.dfa.training_method = "dfa"

    def attempt_between_points(model, x):
        h = model.encode(x)
        model.run = encode_and_classify
        with ThreadPoolExecutor(1) as pool:
            pool.submit(attempt, model).result()
        return model.classify(h)

    model = net(attempt_between_points)
    assert_fed(model, (model(A), A))


def test_the_pass_of_an_ended_thread_does_not_block_later_passes():
    model = net(run_that_raises(SystemExit))
    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit):
        pool.submit(model, A).result()
    model.run = encode_and_classify
    assert_usable(model)


@pytest.mark.parametrize("swap", ["shared", "copied"])
def test_a_point_of_another_network_is_refused(swap):
    model, other = net(), net()
    model.point = other.point if swap == "shared" else copy.deepcopy(model.point)
    with pytest.raises(RuntimeError, match="belongs to another DFA: make a new DFA"):
        model(A)


def test_a_new_dfa_takes_over_the_points_and_the_old_one_is_refused():
    """A network may need a new DFA after its output layer is replaced."""
    model = net()
    old, model.last = model.dfa, nn.Linear(8, 3).double()
    model.dfa = DFA(model)
    model(A)
    assert_usable(model)
    model.dfa = old
    for method in ("dfa", "bp", "shallow"):
        old.training_method = method
        with pytest.raises(RuntimeError, match="another DFA has taken over the feedback points"):
            model(A)
