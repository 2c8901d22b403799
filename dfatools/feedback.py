"""Direct Feedback Alignment in one backward pass.

Backpropagation (BP) gives hidden activations h_i the gradient dL/dh_i. Direct Feedback Alignment
(Nokland 2016) gives them e B_i instead, with the output error e = dL/dy and a fixed random matrix
B_i.

A `DFALayer` behind a hidden block, a feedback point, detaches its activation: the next block sees
the same values and sends nothing back. A `DFA` at the output joins the detached activations in one
autograd node, which leaves the output as it is and, on the way back, hands e to the output and
e B_i to each h_i. So one plain `loss.backward()` trains every layer, and no product with a
transposed weight matrix is ever formed.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfatools.hooks import hooks_of
from dfatools.passes import Pass, refuse_untrained

TRAINING_METHODS = ("dfa", "bp", "shallow")
REDUCTIONS = ("mean", "sum")
FEEDBACK_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
BLOCK = 2**24  # entries of a narrow feedback matrix that are widened at a time


class Activation(NamedTuple):
    """A hidden activation, as a feedback rule sees it."""

    point: int  # index of its feedback point in `DFA.layers`
    shape: torch.Size  # (*batch, *features)
    size: int  # d_i: number of features, without those that `shared_dims` share
    value: Tensor | None  # None unless the rule needs values


class _OnlyInTinyDFA:
    """Attribute that TinyDFA has, and that would change nothing here: setting it is an error."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(self.name)

    def __set__(self, instance: object, value: object) -> NoReturn:
        kind = type(instance).__name__
        raise AttributeError(f"{kind} has no attribute {self.name}: {self.remedy}")


class DFALayer(nn.Module):
    """A feedback point: placed after a hidden block, identity in value.

    It belongs to the `DFA` that is made after it, on a network that holds it. It may stand inside
    what `torch.utils.checkpoint` computes again (`use_reentrant=False`), except under
    `torch.compile`. In a module given to FSDP2's `fully_shard` it comes first, not last: FSDP
    gathers the weights when a gradient gets to the module's output.

    Args:
        shared_dims: dimensions of the activation, behind the batch's, whose positions all get the
            same signal: `(1,)` for the tokens or time steps of (N, T, d), `(2, 3)` for the pixels
            of (N, C, H, W). The other d_i features alone count for the matrix, (output size, d_i),
            so any number of positions will do. Each of R positions gets e B_i / sqrt(R), as in
            TinyDFA: the signal of the whole activation is as long as that of one position alone.
        recurrent: allows several calls in one pass before the `DFA`'s, as in a recurrence or with
            shared weights. All their activations get the feedback: the output must depend on each.

    Shapes: any `(*batch, *features)`, unchanged, with as many batch dimensions as its `DFA` says.

    Raises ValueError if `shared_dims` is no tuple of different positive integers.
    """

    _dfa: "DFA | None"
    batch_dims = _OnlyInTinyDFA("give batch_dims to the DFA, and shared_dims to the point")
    passthrough = _OnlyInTinyDFA('set training_method = "bp" of the DFA')

    def __init__(self, shared_dims: Sequence[int] = (), recurrent: bool = False) -> None:
        super().__init__()
        shared = tuple(shared_dims) if isinstance(shared_dims, Sequence) else (0,)
        if any(type(dim) is not int or dim < 1 for dim in shared) or len({*shared}) < len(shared):
            raise ValueError(
                f"shared_dims must be a tuple of different positive integers, not {shared_dims!r}"
            )
        self.shared_dims = shared
        self.recurrent = recurrent
        self.name: str | None = None  # of the submodule that it stands behind, if it was named
        # In __dict__, so as not to be a submodule: the DFA stands elsewhere in the network.
        self.__dict__["_dfa"] = None
        self._index = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises TypeError if `hidden` is no tensor, RuntimeError where no `DFA` owns the point."""
        if not isinstance(hidden, Tensor):
            raise TypeError(f"a feedback point takes one tensor, not a {type(hidden).__name__}")
        if self._dfa is None:
            raise RuntimeError(
                "this DFALayer belongs to no DFA: make DFA(network) after it, on a network that "
                "holds it as a submodule"
            )
        return self._dfa._detach(self._index, hidden)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)}"
            for name in ("shared_dims", "recurrent")
            if getattr(self, name)
        )


def feedback_points(network: nn.Module) -> list[DFALayer]:
    """Returns the feedback points of a network: its submodules, and those that hooks call."""
    points: list[DFALayer] = []
    for module in network.modules():
        places = [module, *(hook.place for hook in hooks_of(module))]
        points += [place for place in places if isinstance(place, DFALayer)]
    return points


class DFA(nn.Module):
    """Direct Feedback Alignment for the feedback points of a network; called on its output.

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last, self.point = nn.Linear(20, 64), nn.Linear(64, 5), DFALayer()
                self.dfa = DFA(self)  # after the points

            def forward(self, x):
                return self.dfa(self.last(self.point(torch.tanh(self.first(x)))))

    It owns one random matrix, (output size, largest feedback size), with entries from N(0, 1),
    shared by all points: the i-th gets the first d_i columns, its B_i, (output size, d_i).
    The first pass that needs the matrix draws it, on the output's device, in float32 or wider. In a
    distributed run the first process sends its matrix to all: they make the first pass together.

    One call of the network is one pass: the activations at its points wait for the `DFA`'s call,
    and are dropped when the network returns or raises. Parts of it that are called by themselves
    make one pass in `with dfa.one_pass():`; outside of a pass, points detach and get no feedback.

    Args:
        network: the module that holds the `DFALayer`s. It may have had another `DFA` before.
        normalization: scale B_i to a standard deviation of 1 / sqrt(d_i * output size), so that
            the norm of e B_i is about that of e over sqrt(output size), whatever d_i is. Without
            it, the standard deviation is 1, and the norm sqrt(d_i) times that of e.
        reduction: `"mean"` sends back e itself; `"sum"` sends back e times the number of samples
            in the batch (in a distributed run: over all processes), which under a mean loss is
            the summed error of the 2019 release. Each micro-batch counts by itself.
        training_method: `"dfa"`; `"bp"`, the same network with nothing detached; `"shallow"`, where
            only what follows the last feedback point learns. May be changed at any time.
        batch_dims: how many leading dimensions the output and the hidden activations share: 1 for
            (batch, feature), 2 for (batch, token, feature).
        feedback_device: where the matrix is kept, if not where the output is.
        generator: draws the matrix; without one the device's default generator does.
        feedback_dtype: the matrix's floating-point type, to which it is rounded; e B_i is computed
            in float32 or wider. If None, the matrix follows the model in type.

    Attributes:
        layers: the feedback points, a tuple, in the order of `network.modules()`.
        training_method: as above.
        feedback_matrix: a buffer, (output size, largest d_i), without normalization; empty until it
            is drawn; saved in the `state_dict`, and loaded from one. May be set.

    Shapes: any `(*batch, *features)`, unchanged. All that is not batch counts as one vector.

    Raises TypeError if `network` is no module, ValueError if it holds no `DFALayer` or an option is
    unknown.

    Other feedback rules are subclasses with `signals` of their own; examples/feedback_rules.py has
    six.
    """

    layers: tuple[DFALayer, ...]
    feedback_matrix: Tensor
    needs_matrix = True  # whether a rule needs the shared matrix
    needs_values = False  # whether it needs the values of activations
    no_training = _OnlyInTinyDFA('set training_method = "shallow"')
    rp_device = _OnlyInTinyDFA("give feedback_device to DFA(...)")

    def __init__(
        self,
        network: nn.Module,
        normalization: bool = True,
        reduction: str = "mean",
        training_method: str = "dfa",
        batch_dims: int = 1,
        feedback_device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"DFA takes the network of its DFALayers, not a {type(network).__name__}"
            )
        layers = tuple(feedback_points(network))
        if not layers:
            raise ValueError(
                "the network has no DFALayer as a submodule: make the DFA after them, and keep a "
                "list of them in an nn.ModuleList"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, not {reduction!r}")
        if not isinstance(batch_dims, int) or batch_dims < 1:
            raise ValueError(f"batch_dims must be a positive integer, not {batch_dims!r}")
        if feedback_dtype not in FEEDBACK_DTYPES:
            raise ValueError(
                f"feedback_dtype must be one of {FEEDBACK_DTYPES}, not {feedback_dtype!r}"
            )
        self.training_method = training_method
        self.normalization = normalization
        self.reduction = reduction
        self.batch_dims = batch_dims
        self.feedback_device = feedback_device
        self.generator = generator
        self.feedback_dtype = feedback_dtype
        self.register_buffer("feedback_matrix", torch.empty(0, 0, device="cpu"))
        self._sizes: dict[int, int] = {}  # features at each point, in its last pass
        self._pass: Pass | None = None  # under way
        self.layers = layers  # a tuple, so that they are not registered a second time here
        for old in {layer._dfa for layer in layers if layer._dfa is not None}:
            old._retire(network, self)
        for index, layer in enumerate(layers):
            layer.__dict__["_dfa"] = self
            layer._index = index
        self._network = weakref.ref(network)  # weak, or its weights would await garbage collection
        self._hooks = (
            network.register_forward_pre_hook(self._enter),
            network.register_forward_hook(self._leave, always_call=True),
        )

    def _retire(self, network: nn.Module, other: "DFA") -> None:
        """Gives up the points, and a hook at the output, to another DFA."""
        self.layers = ()
        for handle in self._hooks:
            handle.remove()
        for module in network.modules():
            for hook in hooks_of(module):
                if hook.place is self:
                    hook.place = other

    @property
    def training_method(self) -> str:
        return self._training_method

    @training_method.setter
    def training_method(self, method: str) -> None:
        if method not in TRAINING_METHODS:
            raise ValueError(f"training_method must be one of {TRAINING_METHODS}, not {method!r}")
        self._training_method = method

    def extra_repr(self) -> str:
        dtype = "" if self.feedback_dtype is None else f", feedback_dtype={self.feedback_dtype}"
        return (
            f"{len(self.layers)} layers, normalization={self.normalization}, "
            f"reduction={self.reduction!r}, training_method={self.training_method!r}{dtype}"
        )

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Makes one pass of all that is called within: of an encoder and its head, say.

            with model.dfa.one_pass():
                output = model.classify(model.encode(x))

        Raises RuntimeError within a pass, and where points were called, but not the DFA.
        """
        if self._current() is not None:
            self._pass = None
            raise RuntimeError("one_pass was called in a pass: one call of the network is one")
        self._begin(explicit=True)
        try:
            yield
            self._end()
        finally:
            self._pass = None

    def _enter(self, network: nn.Module, args: tuple) -> None:
        if getattr(network, "_is_replica", False):
            raise RuntimeError("nn.DataParallel splits a pass: use DistributedDataParallel")
        now = self._current()
        if self._feeds() and not (now and now.explicit):
            self._begin(explicit=False)

    def _leave(self, network: nn.Module, args: tuple, output: Any) -> None:
        now = self._current()
        failed = output is None  # hooks of a call that has raised get None
        if not self._feeds() or (now and now.explicit):
            return
        if now is not None:
            self._end(failed)
        elif not failed:
            raise RuntimeError("a network that calls itself does so in `with dfa.one_pass():`")

    def _owner(self) -> nn.Module:
        """Returns the network, or itself where that is gone."""
        network = self._network()
        return self if network is None else network

    def _feeds(self) -> bool:
        return self.training_method == "dfa" and torch.is_grad_enabled()

    def _begin(self, explicit: bool) -> None:
        if self._pass is not None and self._pass.is_elsewhere():
            raise RuntimeError(
                "a pass of this network is under way in another thread: give each thread a copy"
            )
        if not torch.compiler.is_compiling():
            points = feedback_points(self._owner())
            if any(point._dfa not in (None, self) for point in points):
                raise RuntimeError(
                    "a feedback point of the network belongs to another DFA: make a new "
                    "DFA(network)"
                )
        self._pass = Pass(len(self.layers), explicit)

    def _end(self, failed: bool = False) -> None:
        now, self._pass = self._pass, None
        if now and not failed:
            now.refuse_unfed()

    def _current(self) -> Pass | None:
        """The pass under way in this thread."""
        return self._pass if self._pass is not None and self._pass.is_here() else None

    def _detach(self, index: int, hidden: Tensor) -> Tensor:
        """Ends the graph at a feedback point, whose activation waits for the DFA's call."""
        if self.training_method == "bp":
            return hidden
        now = self._current()
        if not torch.is_grad_enabled():
            if now is not None:
                now.without_grad = True
            return hidden
        # In no pass where activation checkpointing computes again: e goes to its first graph.
        if self.training_method == "dfa" and now is not None:
            now.waiting[index].append(_Activation.apply(hidden, self.needs_values))
            now.detached.append(hidden.detach())
            return now.detached[-1]
        return hidden.detach()

    def forward(self, output: Tensor) -> Tensor:
        """Returns `output`, joined with the activations detached in this pass.

        Raises:
            TypeError: `output` is no tensor.
            ValueError: its size is not the matrix's, its batch dimensions are not those of the
                activations, or an activation lacks a dimension of `shared_dims`.
            RuntimeError: there is no pass, or one that would leave something untrained: without a
                call of a feedback point, with several of one that is not `recurrent`, with others
                than before the `DFA`'s first call, or with reentrant checkpointing.
        """
        if not isinstance(output, Tensor):
            raise TypeError(f"DFA takes the output as one tensor, not a {type(output).__name__}")
        if torch.is_grad_enabled() and not self.layers:
            raise RuntimeError("another DFA has taken over the feedback points of this one")
        if not self._feeds():
            return output
        now = self._current()
        if now is None:
            raise RuntimeError(
                "DFA was called outside of a pass: call its network, or parts of it in "
                "`with dfa.one_pass():`"
            )
        points, hidden = now.take([layer.recurrent for layer in self.layers])
        self._refuse_point_at_output(output, now)
        now.detached.clear()
        for activation in hidden:
            if activation.shape[: self.batch_dims] != output.shape[: self.batch_dims]:
                raise ValueError(
                    f"hidden activations of shape {tuple(activation.shape)} do not share the first "
                    f"{self.batch_dims} dimension(s) with the output, {tuple(output.shape)}: "
                    "see batch_dims"
                )
        own = [] if type(self) is DFA else [*self.parameters()]  # a learned rule's
        if now.without_grad or not all(tensor.requires_grad for tensor in (output, *hidden)):
            refuse_untrained(self._owner(), output, *hidden, *own)
        if len(self._sizes) < len(self.layers) and not torch.compiler.is_compiling():
            self._refuse_uncalled(points)
        sizes = [self._size(point, tensor.shape) for point, tensor in zip(points, hidden)]
        matrix = self._matrix_for(output, sizes)
        self._sizes.update(zip(points, sizes))
        return _Feedback.apply(self, matrix, points, sizes, output, *hidden, *own)

    def _refuse_point_at_output(self, output: Tensor, now: Pass) -> None:
        """Raises RuntimeError where the output layer would get e B in the place of e."""
        is_detached = any(output is detached for detached in now.detached)
        if not is_detached and not output.requires_grad:  # no weights behind the last point
            named = any(layer.name is not None for layer in self.layers)
            is_detached = named and all(p.requires_grad for p in self._owner().parameters())
        if is_detached:
            raise RuntimeError(
                "a feedback point stands behind the output layer, which would get no true "
                "gradient: leave that point out"
            )

    def _refuse_uncalled(self, points: list[int]) -> None:
        """Raises RuntimeError for a point behind a named submodule that was never called."""
        for i, layer in enumerate(self.layers):
            if layer.name is not None and i not in self._sizes and i not in points:
                raise RuntimeError(
                    f"{layer.name}, behind which a feedback point stands, was not called before "
                    "the DFA (another module may read its weights): name one that is, or if it is "
                    "called in some passes only, give dfa_from_bp an example that calls it, or "
                    "make one such pass first"
                )

    def feedback(self, i: int) -> Tensor:
        """B_i as the i-th feedback point gets it, (output size, d_i), normalization included.

        Where `shared_dims` share it between R positions, each gets it over sqrt(R).

        Raises RuntimeError if the point has not been fed yet, IndexError if there is none.
        """
        i = range(len(self.layers))[i]
        if i not in self._sizes:
            raise RuntimeError(f"feedback point {i} has not been fed yet: its size is unknown")
        size = self._sizes[i]
        return self.feedback_matrix[:, :size] * self._scale(size, self.feedback_matrix)

    def signals(
        self, error: Tensor, activations: Sequence[Activation], matrix: Tensor | None
    ) -> Sequence[Tensor]:
        """Computes the signal of each activation, e B_i: the method that another rule overrides.

            class SignOfError(DFA):
                def signals(self, error, activations, matrix):
                    return super().signals(error.sign(), activations, matrix)

        It must have no effect but its result: `measure_alignment` calls it, too. A class with
        matrices of its own registers them, and says `needs_matrix = False`. A class that uses the
        activations' values says `needs_values = True`.

        Args:
            error: e = dL/dy, (rows, output size), a row for each index of the batch dimensions; in
                float32 or wider; under `reduction="sum"`, times the number of samples.
            activations: point, shape, number of features and value of each activation.
            matrix: the feedback matrix of the forward pass, (output size, largest d_i).

        Returns: a signal for each activation, (rows, d_i), of any floating-point type, on e's
        device. Positions of `shared_dims` share it.
        """
        assert matrix is not None
        sizes = [activation.size for activation in activations]
        # One product serves all points: they share its columns, up to their scale.
        common = _product(error, matrix[:, : max([0, *sizes])]).to(error.device)
        by_size = {size: common[:, :size] * self._scale(size, matrix) for size in set(sizes)}
        return [by_size[size] for size in sizes]

    def rule_gradients(
        self, error: Tensor, activations: Sequence[Activation]
    ) -> Sequence[Tensor | None]:
        """Computes the gradients of a learned rule's own parameters, for a rule that has some.

        Args:
            error, activations: as for `signals`.

        Returns: a gradient for each of `self.parameters()`. Autograd adds them to `.grad`, so any
        optimizer and any engine for several processes treats them as those of weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has parameters, but no rule_gradients")

    def _size(self, point: int, shape: torch.Size) -> int:
        """Returns the number of features of an activation: d_i."""
        batch, shared = self.batch_dims, self.layers[point].shared_dims
        if any(not batch <= dim < len(shape) for dim in shared):
            raise ValueError(
                f"shared_dims {shared} of feedback point {point} are no dimensions, behind the "
                f"batch's {batch}, of its activation of shape {tuple(shape)}"
            )
        return math.prod([shape[dim] for dim in range(batch, len(shape)) if dim not in shared])

    def _activation(self, point: int, hidden: Tensor) -> Activation:
        value = hidden.detach() if self.needs_values else None
        return Activation(point, hidden.shape, self._size(point, hidden.shape), value)

    def _rows(self, error: Tensor) -> Tensor:
        """Reshapes the error at the output, and scales it as `reduction` says, for `signals`."""
        batch, features = error.shape[: self.batch_dims], error.shape[self.batch_dims :]
        rows = error.reshape(batch.numel(), features.numel())
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows * (len(rows) * _processes()) if self.reduction == "sum" else rows

    def _shaped_signals(
        self, rows: Tensor, activations: Sequence[Activation], matrix: Tensor | None
    ) -> list[Tensor]:
        """Returns the signals in the shapes of the activations."""
        signals = self.signals(rows, activations, matrix)
        for signal, (point, _, size, _) in zip(signals, activations, strict=True):
            if signal.shape != (len(rows), size):
                raise ValueError(
                    f"{type(self).__name__}.signals returned a tensor of shape "
                    f"{tuple(signal.shape)} for feedback point {point}, not {(len(rows), size)}"
                )
        return [self._spread(*each) for each in zip(signals, activations)]

    def _spread(self, signal: Tensor, activation: Activation) -> Tensor:
        shape, shared = activation.shape, self.layers[activation.point].shared_dims
        if not shared:
            return signal.reshape(shape)
        positions = math.prod([shape[dim] for dim in shared])
        kept = [1 if dim in shared else size for dim, size in enumerate(shape)]
        return (signal / math.sqrt(positions)).reshape(kept).expand(shape)

    def _scale(self, size: int, matrix: Tensor) -> float:
        return 1 / math.sqrt(size * matrix.shape[0]) if self.normalization else 1.0

    def _matrix_for(self, output: Tensor, sizes: list[int]) -> Tensor | None:
        """Returns the feedback matrix, drawn if there is none; refuses one that does not fit."""
        if not self.needs_matrix:
            return None
        features, columns = output.shape[self.batch_dims :].numel(), max([0, *sizes])
        matrix = self.feedback_matrix
        if matrix.numel() == 0:
            matrix = self._draw(features, columns, output)
        elif self.feedback_device is None and matrix.device != output.device:
            matrix = matrix.to(output.device)  # from a checkpoint
        if features != len(matrix):
            raise ValueError(
                f"DFA got an output of size {features}, but its feedback matrix was made for "
                f"{len(matrix)}"
            )
        if columns > matrix.shape[1]:
            raise ValueError(
                f"a feedback point has {columns} features, but the feedback matrix was made for at "
                f"most {matrix.shape[1]}"
            )
        # Of an export or on a meta device it holds no values to be kept.
        if matrix is not self.feedback_matrix and type(matrix) is Tensor and not matrix.is_meta:
            if torch.compiler.is_compiling():
                self.feedback_matrix = matrix
            else:
                self.feedback_matrix.data = matrix  # in place, for all who hold the buffer
        return matrix

    def _draw(self, rows: int, columns: int, output: Tensor) -> Tensor:
        device = output.device if self.feedback_device is None else self.feedback_device
        source = device if self.generator is None else self.generator.device
        dtype = torch.promote_types(output.dtype, torch.float32)
        matrix = torch.randn(rows, columns, generator=self.generator, device=source, dtype=dtype)
        matrix = matrix.to(device, self.feedback_dtype)
        if _processes() > 1:
            shared = matrix.to(output.device)  # where the process group can send it
            dist.broadcast(shared, src=0)
            matrix = shared.to(device)
        return matrix

    def __getstate__(self) -> dict:
        """The state of a copy or a pickle: without the pass under way, its network not weak."""
        return {**self.__dict__, "_pass": None, "_network": self._network()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        network = state["_network"]
        self._network = weakref.ref(self if network is None else network)

    def _apply(self, fn, recurse=True):
        """Follows the model, but for what `feedback_device` and `feedback_dtype` fix."""
        if self.feedback_device is None and self.feedback_dtype is None:
            super()._apply(fn, recurse)
        else:
            # Not even for a moment on another device, or in a narrower type.
            follower = fn(self.feedback_matrix[:0])
            self.feedback_matrix = self.feedback_matrix.to(
                self.feedback_device or follower.device, self.feedback_dtype or follower.dtype
            )
        matrix = self.feedback_matrix
        if matrix.is_meta:  # holds no values: the next pass draws them
            self.feedback_matrix = torch.empty(0, 0, device="cpu")
        elif self.needs_matrix and not matrix.numel() and matrix.is_cpu and matrix.is_shared():
            raise RuntimeError(
                "share_memory() before there is a feedback matrix, of which each process would "
                "draw its own: call the network once before, or dfa_from_bp(..., example=x)"
            )
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads a matrix of any size if there is none yet; a BP `state_dict` needs none."""
        name = prefix + "feedback_matrix"
        loaded = state_dict.get(name)
        if loaded is None or loaded.numel() == 0 or loaded.is_meta:
            state_dict = {**state_dict, name: self.feedback_matrix}
        elif self.feedback_matrix.numel() == 0:
            self.feedback_matrix = torch.empty_like(
                loaded, device=self.feedback_device, dtype=self.feedback_dtype
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True, it has come as it was in the checkpoint.
        self.feedback_matrix = self.feedback_matrix.to(self.feedback_device, self.feedback_dtype)


@contextmanager
def evaluation(model: nn.Module, dfa: DFA, method: str) -> Iterator[None]:
    """Sets eval mode and a training method, and restores both: the modes by `train(mode)`."""
    before, modes = dfa.training_method, [(m, m.training) for m in model.modules()]
    try:
        dfa.training_method = method
        model.eval()
        yield
    finally:
        dfa.training_method = before
        for module, mode in modes:  # parents first: `train` takes the children along
            if module.training != mode:
                module.train(mode)


class _Activation(torch.autograd.Function):
    """Identity: the activation as it was at its point, whatever changes it in place later."""

    @staticmethod
    def forward(ctx, hidden: Tensor, needs_value: bool) -> Tensor:
        ctx.leaf = hidden.is_leaf
        return hidden.clone() if needs_value else hidden.detach()

    @staticmethod
    def backward(ctx, signal: Tensor):
        # A leaf keeps the tensor itself as its `.grad`: two leaves must not share memory.
        return signal.clone() if ctx.leaf else signal, None


class _Feedback(torch.autograd.Function):
    """(output, h_1, ..., h_n) -> output; backward: e -> (e, e B_1, ..., e B_n).

    Behind h_1 to h_n come the parameters of a learned rule, whose gradients it computes itself.
    """

    @staticmethod
    def forward(
        ctx,
        dfa: DFA,
        matrix: Tensor | None,
        points: list[int],
        sizes: list[int],
        output: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        hidden = inputs[: len(points)]
        # Not saved for backward: DistributedDataParallel writes the same values into all buffers.
        ctx.dfa, ctx.matrix, ctx.parameters = dfa, matrix, len(inputs) - len(hidden)
        shapes = [h.shape for h in hidden]
        ctx.activations = [Activation(*each, None) for each in zip(points, shapes, sizes)]
        ctx.places = [(h.device, _memory_format(h)) for h in hidden]
        ctx.save_for_backward(*(hidden if dfa.needs_values else ()))
        return output.detach()  # shares memory, but is no view: those cannot be changed in place

    @staticmethod
    def backward(ctx, error: Tensor):
        dfa, activations, rows = ctx.dfa, ctx.activations, ctx.dfa._rows(error)
        if dfa.needs_values:
            values = ctx.saved_tensors
            activations = [each._replace(value=value) for each, value in zip(activations, values)]
        signals = dfa._shaped_signals(rows, activations, ctx.matrix)
        # Laid out as the activations, or the blocks' own backward passes would be slow.
        placed = (
            signal.to(device).contiguous(memory_format=memory_format)
            for signal, (device, memory_format) in zip(signals, ctx.places)
        )
        own = dfa.rule_gradients(rows, activations) if ctx.parameters else ()
        return None, None, None, None, error, *placed, *own


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, on the matrix's device, in the wider type of both, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, matrix.dtype), torch.float32)
    rows = rows.to(matrix.device, dtype)
    kind = matrix.device.type
    # A backward pass may be under autocast, which of all devices meta alone does not have.
    exact = kind == "meta" or not torch.is_autocast_enabled(kind)
    with nullcontext() if exact else torch.autocast(kind, enabled=False):
        if matrix.dtype == dtype:
            return rows @ matrix
        blocks = matrix.split(max(1, BLOCK // matrix.shape[0]), 1)
        return torch.cat([rows @ block.to(dtype) for block in blocks], 1)


def _memory_format(images: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    if last and not images.is_contiguous() and images.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
