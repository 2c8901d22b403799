"""Direct Feedback Alignment in one backward pass.

Backpropagation (BP) gives a hidden activation h_i the gradient dL/dh_i. Direct Feedback Alignment
(Nokland 2016) gives it e B_i instead: the output error e = dL/dy, times a fixed random matrix B_i.

A feedback point is a `DFALayer` after a hidden block. It detaches the activation: the next block
gets the same values, and sends no gradient back. A `DFA` at the output joins all detached
activations in one autograd node. Its forward pass returns the output unchanged; its backward pass
gives e to the output, and e B_i to each h_i. So one plain `loss.backward()` trains every layer.
With a feedback point before each layer, no product with a transposed weight matrix is formed.
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
BLOCK = 2**24  # entries of the feedback matrix cast to a wider type at a time


class Activation(NamedTuple):
    """A hidden activation, as a feedback rule sees it."""

    point: int  # index of its feedback point in `DFA.layers`
    shape: torch.Size  # (*batch, *features)
    size: int  # d_i: number of features per position of `shared_dims`
    value: Tensor | None  # None unless the rule needs values


class _OnlyInTinyDFA:
    """An attribute of TinyDFA without effect here; setting it raises AttributeError."""

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
    """Feedback point after a hidden block: detaches the block's activation, and keeps its values.

    It belongs to the `DFA(network)` made after it. It may be inside a block recomputed by
    `torch.utils.checkpoint` (`use_reentrant=False`), except under `torch.compile`. In a module
    sharded by FSDP2's `fully_shard` it comes first, not last: FSDP2 gathers the weights when a
    gradient reaches the module's output, and no gradient reaches the output of a point.

        >>> model = nn.Sequential(nn.Embedding(100, 32), DFALayer(shared_dims=(1,)), nn.GRU(32, 64))
        >>> model[1]
        DFALayer(shared_dims=(1,))

    Args:
        shared_dims: dimensions of the activation, after the batch dimensions, whose positions all
            get the same signal: `(1,)` for the tokens or time steps of (N, T, d), `(2, 3)` for the
            pixels of (N, C, H, W). B_i is then (output size, d_i), where d_i is the number of
            features of one position. Each of R positions gets e B_i / sqrt(R), as in TinyDFA, so
            that the norm of the signal does not depend on R.
        recurrent: allows several calls of the point before the call of the `DFA` in one pass, as
            in a recurrence or with shared weights. The activation of each call gets a signal, so
            the output must depend on all of them.

    Shapes: any `(*batch, *features)`, unchanged; `DFA(batch_dims=...)` is the length of `batch`.

    Raises ValueError if `shared_dims` is no sequence of different positive integers. A call raises
    TypeError for an input other than a tensor, RuntimeError if the point belongs to no `DFA`.
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
        self.name: str | None = None  # of the submodule before it, if dfa_from_bp got points
        # In __dict__, so that the DFA is not registered as a submodule of its point.
        self.__dict__["_dfa"] = None
        self._index = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns `hidden`, detached except under `training_method="bp"` or `no_grad`."""
        if not isinstance(hidden, Tensor):
            raise TypeError(f"a feedback point takes one tensor, not a {type(hidden).__name__}")
        if self._dfa is None:
            raise RuntimeError(
                "this DFALayer belongs to no DFA: make DFA(network) after it, on a network that "
                "contains it as a submodule"
            )
        return self._dfa._detach(self._index, hidden)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)}"
            for name in ("shared_dims", "recurrent")
            if getattr(self, name)
        )


def feedback_points(network: nn.Module) -> list[DFALayer]:
    """Returns the feedback points among the submodules and in the forward hooks of a network."""
    points: list[DFALayer] = []
    for module in network.modules():
        places = [module, *(hook.place for hook in hooks_of(module))]
        points += [place for place in places if isinstance(place, DFALayer)]
    return points


class DFA(nn.Module):
    """Direct Feedback Alignment for a network with feedback points; called on its output.

        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.output = nn.Linear(20, 64), nn.Linear(64, 5)
        ...         self.point = DFALayer()
        ...         self.dfa = DFA(self)  # after the points
        ...
        ...     def forward(self, x):
        ...         h = self.point(torch.tanh(self.hidden(x)))
        ...         return self.dfa(self.output(h))
        >>> model = Net()
        >>> F.cross_entropy(model(torch.randn(8, 20)), torch.arange(8) % 5).backward()
        >>> model.hidden.weight.grad.shape, model.dfa.feedback(0).shape
        (torch.Size([64, 20]), torch.Size([5, 64]))

    All feedback points share one random matrix, (output size, largest d_i), with entries from
    N(0, 1). B_i, (output size, d_i), is its first d_i columns, where d_i is the number of features
    of activation i. The first pass that needs the matrix draws it, on the output's device, in
    float32 or wider. In a distributed run the first process broadcasts its matrix, so all processes
    must make the first pass together.

    One call of the network is one pass: its activations are kept for the call of the `DFA`, and
    dropped when the network returns or raises. Parts of the network called by themselves form one
    pass in `with dfa.one_pass():`. Outside of a pass, feedback points detach, but get no signal.

    Args:
        network: the module that contains the feedback points. A new `DFA` replaces an earlier one.
        normalization: scales B_i to a standard deviation of 1 / sqrt(d_i * output size), so that
            e B_i has about the norm of e, divided by sqrt(output size), for any d_i. Without it,
            the standard deviation is 1, and e B_i has about the norm of e, times sqrt(d_i).
        reduction: `"mean"` sends back e itself. `"sum"` sends back e times the number of samples,
            or of tokens if `batch_dims` is 2, in the (micro-)batch of all processes. Under a mean
            loss, this is the summed error of the 2019 release.
        training_method: `"dfa"`; `"bp"`, backpropagation through the same network; `"shallow"`,
            which trains only the layers after the last feedback point. May be changed at any time.
        batch_dims: number of leading dimensions shared by the output and the activations: 1 for
            (batch, feature), 2 for (batch, token, feature).
        feedback_device: device of the matrix; by default the output's.
        generator: draws the matrix; by default the device's default generator.
        feedback_dtype: floating-point type of the matrix, to which it is rounded; e B_i is
            computed in float32 or wider. By default, `model.to(dtype)` converts the matrix too.

    Attributes:
        layers: the feedback points, a tuple, in the order of `network.modules()`.
        training_method: as above.
        feedback_matrix: the shared matrix before normalization, empty until it is drawn. A buffer,
            saved in the `state_dict` and loaded from it. May be set.

    Shapes: any `(*batch, *features)`, unchanged; all feature dimensions count as one vector.

    Raises TypeError if `network` is no module, ValueError if it has no `DFALayer` or an option has
    an unknown value.

    A subclass with its own `signals` is another feedback rule; examples/feedback_rules.py has six.
    """

    layers: tuple[DFALayer, ...]
    feedback_matrix: Tensor
    needs_matrix = True  # False for a rule that does not use the shared matrix
    needs_values = False  # True for a rule that uses the values of activations
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
                f"DFA takes the network with the DFALayers, not a {type(network).__name__}"
            )
        layers = tuple(feedback_points(network))
        if not layers:
            raise ValueError(
                "the network has no DFALayer as a submodule: make the DFALayers before the DFA, "
                "and keep a list of them in an nn.ModuleList"
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
        self._sizes: dict[int, int] = {}  # d_i of each point, in its last pass
        self._pass: Pass | None = None  # the open pass
        self.layers = layers  # a tuple, so that the points are not registered a second time
        for old in {layer._dfa for layer in layers if layer._dfa is not None}:
            old._retire(network, self)
        for index, layer in enumerate(layers):
            layer.__dict__["_dfa"] = self
            layer._index = index
        self._network = weakref.ref(network)  # weak: a cycle would delay the freeing of weights
        self._hooks = (
            network.register_forward_pre_hook(self._enter),
            network.register_forward_hook(self._leave, always_call=True),
        )

    def _retire(self, network: nn.Module, other: "DFA") -> None:
        """Hands the feedback points, and the hook at the output, over to another DFA."""
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
        """Context manager: all calls in it form one pass, for example of an encoder and its head.

            with model.dfa.one_pass():
                output = model.dfa(model.head(model.encode(x)))

        Raises RuntimeError if a pass is open already, or if points are called without the DFA.
        """
        if self._current() is not None:
            self._pass = None
            raise RuntimeError(
                "one_pass was called inside a pass: remove it, as a call of the network is a pass"
            )
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
        failed = output is None  # always_call: None after an exception
        if not self._feeds() or (now and now.explicit):
            return
        if now is not None:
            self._end(failed)
        elif not failed:
            raise RuntimeError("the network calls itself: call it in `with dfa.one_pass():`")

    def _owner(self) -> nn.Module:
        """Returns the network; `self` if the network no longer exists."""
        network = self._network()
        return self if network is None else network

    def _feeds(self) -> bool:
        return self.training_method == "dfa" and torch.is_grad_enabled()

    def _begin(self, explicit: bool) -> None:
        if self._pass is not None and self._pass.is_elsewhere():
            raise RuntimeError(
                "a pass of this network is open in another thread: give each thread a copy"
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
        """Returns the open pass of this thread."""
        return self._pass if self._pass is not None and self._pass.is_here() else None

    def _detach(self, index: int, hidden: Tensor) -> Tensor:
        """Detaches an activation, and keeps it for the call of the DFA in the same pass."""
        if self.training_method == "bp":
            return hidden
        now = self._current()
        if not torch.is_grad_enabled():
            if now is not None:
                now.without_grad = True
            return hidden
        # Recomputation by activation checkpointing is in no pass: the first graph gets e B_i.
        if self.training_method == "dfa" and now is not None:
            now.waiting[index].append(_Activation.apply(hidden, self.needs_values))
            now.detached.append(hidden.detach())
            return now.detached[-1]
        return hidden.detach()

    def forward(self, output: Tensor) -> Tensor:
        """Returns `output`, joined in the graph with the activations detached in this pass.

        Raises:
            TypeError: `output` is no tensor.
            ValueError: the output or an activation does not fit the matrix, their batch dimensions
                differ, or an activation lacks a dimension of `shared_dims`.
            RuntimeError: no pass is open, another `DFA` owns the points, or the points were called
                wrongly: not at all, several times without `recurrent=True`, after the output layer,
                or not before each call of the `DFA`; or no gradient would reach a parameter, as in
                a block checkpointed with `use_reentrant=True`.
        """
        if not isinstance(output, Tensor):
            raise TypeError(f"DFA takes the output as one tensor, not a {type(output).__name__}")
        if torch.is_grad_enabled() and not self.layers:
            raise RuntimeError("another DFA has taken over the feedback points: call that DFA")
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
                    "set batch_dims of the DFA"
                )
        own = [] if type(self) is DFA else [*self.parameters()]  # parameters of a learned rule
        if now.without_grad or not all(tensor.requires_grad for tensor in (output, *hidden)):
            refuse_untrained(self._owner(), output, *hidden, *own)
        if len(self._sizes) < len(self.layers) and not torch.compiler.is_compiling():
            self._refuse_uncalled(points)
        sizes = [self._size(point, tensor.shape) for point, tensor in zip(points, hidden)]
        matrix = self._matrix_for(output, sizes)
        self._sizes.update(zip(points, sizes))
        return _Feedback.apply(self, matrix, points, sizes, output, *hidden, *own)

    def _refuse_point_at_output(self, output: Tensor, now: Pass) -> None:
        """Raises RuntimeError if the output layer would get e B_i in place of e."""
        is_detached = any(output is detached for detached in now.detached)
        if not is_detached and not output.requires_grad:  # no weights after the last point
            named = any(layer.name is not None for layer in self.layers)
            is_detached = named and all(p.requires_grad for p in self._owner().parameters())
        if is_detached:
            raise RuntimeError(
                "a feedback point comes after the output layer, which would get no true gradient: "
                "remove that point"
            )

    def _refuse_uncalled(self, points: list[int]) -> None:
        """Raises RuntimeError if no pass so far called a submodule named in `points`."""
        for i, layer in enumerate(self.layers):
            if layer.name is not None and i not in self._sizes and i not in points:
                raise RuntimeError(
                    f"{layer.name} has a feedback point, but was not called before the DFA "
                    "(another module may read its weights): name another submodule; if some passes "
                    "do call it, give dfa_from_bp an example that does, or make such a pass first"
                )

    def feedback(self, i: int) -> Tensor:
        """Returns B_i, (output size, d_i), normalised if `normalization` is set.

        With `shared_dims`, each of R positions gets e B_i / sqrt(R). Raises RuntimeError before the
        point's first pass under `training_method="dfa"`, after a move to the meta device, and if
        the rule uses no shared matrix; IndexError for a wrong i.
        """
        i = range(len(self.layers))[i]
        if not self.needs_matrix:
            raise RuntimeError(f"{type(self).__name__} does not use the shared feedback matrix")
        if i not in self._sizes or not self.feedback_matrix.numel():
            raise RuntimeError(
                f"the matrix of feedback point {i} is not drawn, or its size unknown: call the "
                "network once, as in training by DFA"
            )
        size = self._sizes[i]
        return self.feedback_matrix[:, :size] * self._scale(size, self.feedback_matrix)

    def signals(
        self, error: Tensor, activations: Sequence[Activation], matrix: Tensor | None
    ) -> Sequence[Tensor]:
        """Computes the signal e B_i of each activation; another feedback rule overrides it.

            >>> class SignOfError(DFA):
            ...     def signals(self, error, activations, matrix):
            ...         return super().signals(error.sign(), activations, matrix)

        An override must have no side effects, because `measure_alignment` calls it too. A class
        with its own matrices registers them, and sets `needs_matrix = False`. A class that uses the
        values of the activations sets `needs_values = True`.

        Args:
            error: e = dL/dy, (rows, output size), a row for each index of the batch dimensions; in
                float32 or wider; under `reduction="sum"`, times the rows of all processes.
            activations: point, shape, number of features and value of each activation.
            matrix: the `feedback_matrix` of the forward pass; None if `needs_matrix` is False.

        Returns: a signal for each activation, (rows, d_i), of any floating-point type, on e's
        device. All positions of `shared_dims` get the same signal.
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
        """Computes the gradients of a rule's own parameters; a learned rule overrides it.

        Args:
            error, activations: as for `signals`.

        Returns: a gradient for each of `self.parameters()`. Autograd adds it to `.grad`, so
        optimizers, DDP and FSDP2 treat these parameters as they treat weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has parameters, but no rule_gradients")

    def _size(self, point: int, shape: torch.Size) -> int:
        """Returns d_i, the number of features of an activation."""
        batch, shared = self.batch_dims, self.layers[point].shared_dims
        if any(not batch <= dim < len(shape) for dim in shared):
            raise ValueError(
                f"shared_dims {shared} of feedback point {point} are no feature dimensions of its "
                f"activation of shape {tuple(shape)}: these follow the first {batch} (batch_dims)"
            )
        return math.prod([shape[dim] for dim in range(batch, len(shape)) if dim not in shared])

    def _activation(self, point: int, hidden: Tensor) -> Activation:
        value = hidden.detach() if self.needs_values else None
        return Activation(point, hidden.shape, self._size(point, hidden.shape), value)

    def _rows(self, error: Tensor) -> Tensor:
        """Returns the error as (rows, output size), scaled by `reduction`, for `signals`."""
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
        """Returns the feedback matrix, drawn if empty. Raises ValueError if it does not fit."""
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
                f"{len(matrix)}: give the network a new DFA"
            )
        if columns > matrix.shape[1]:
            raise ValueError(
                f"a feedback point has {columns} features, but the feedback matrix was made for at "
                f"most {matrix.shape[1]}: begin with the largest input, or make a new DFA"
            )
        # A matrix drawn in an export or on the meta device has no values to keep.
        if matrix is not self.feedback_matrix and type(matrix) is Tensor and not matrix.is_meta:
            if torch.compiler.is_compiling():
                self.feedback_matrix = matrix
            else:
                self.feedback_matrix.data = matrix  # in place, for other references to the buffer
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
        """Returns the state to copy or pickle: no open pass, and no weak reference."""
        return {**self.__dict__, "_pass": None, "_network": self._network()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        network = state["_network"]
        self._network = weakref.ref(self if network is None else network)

    def _apply(self, fn, recurse=True):
        """Converts the matrix with the model, but keeps `feedback_device` and `feedback_dtype`."""
        if self.feedback_device is None and self.feedback_dtype is None:
            super()._apply(fn, recurse)
        else:
            # A detour over another device or a narrower type could run out of memory, or round.
            follower = fn(self.feedback_matrix[:0])
            self.feedback_matrix = self.feedback_matrix.to(
                self.feedback_device or follower.device, self.feedback_dtype or follower.dtype
            )
        matrix = self.feedback_matrix
        if matrix.is_meta:  # without values: the next pass draws the matrix
            self.feedback_matrix = torch.empty(0, 0, device="cpu")
        elif self.needs_matrix and not matrix.numel() and matrix.is_cpu and matrix.is_shared():
            raise RuntimeError(
                "share_memory() before the feedback matrix is drawn would give each process its "
                "own: call the network once first, or dfa_from_bp(..., example=x)"
            )
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads a matrix of any size into an empty one; a BP `state_dict` may lack it."""
        name = prefix + "feedback_matrix"
        loaded = state_dict.get(name)
        if loaded is None or loaded.numel() == 0 or loaded.is_meta:
            state_dict = {**state_dict, name: self.feedback_matrix}
        elif self.feedback_matrix.numel() == 0:
            self.feedback_matrix = torch.empty_like(
                loaded, device=self.feedback_device, dtype=self.feedback_dtype
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True, the matrix has the checkpoint's device and type.
        self.feedback_matrix = self.feedback_matrix.to(self.feedback_device, self.feedback_dtype)


@contextmanager
def evaluation(model: nn.Module, dfa: DFA, method: str) -> Iterator[None]:
    """Context manager: eval mode and a training method; restores modes by `train(mode)`."""
    before, modes = dfa.training_method, [(m, m.training) for m in model.modules()]
    try:
        dfa.training_method = method
        model.eval()
        yield
    finally:
        dfa.training_method = before
        for module, mode in modes:  # parents first: `train` changes the children too
            if module.training != mode:
                module.train(mode)


class _Activation(torch.autograd.Function):
    """Identity; a copy if the rule needs the value, which may change in place later."""

    @staticmethod
    def forward(ctx, hidden: Tensor, needs_value: bool) -> Tensor:
        ctx.leaf = hidden.is_leaf
        return hidden.clone() if needs_value else hidden.detach()

    @staticmethod
    def backward(ctx, signal: Tensor):
        # A leaf keeps the tensor itself as its `.grad`, and two leaves must not share memory.
        return signal.clone() if ctx.leaf else signal, None


class _Feedback(torch.autograd.Function):
    """(output, h_1, ..., h_n) -> output; backward: e -> (e, e B_1, ..., e B_n).

    The inputs after h_n are the parameters of a learned rule; `rule_gradients` computes their
    gradients.
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
        # Not saved for backward: DDP writes buffers in place, though with the same values.
        ctx.dfa, ctx.matrix, ctx.parameters = dfa, matrix, len(inputs) - len(hidden)
        shapes = [h.shape for h in hidden]
        ctx.activations = [Activation(*each, None) for each in zip(points, shapes, sizes)]
        ctx.places = [(h.device, _memory_format(h)) for h in hidden]
        ctx.save_for_backward(*(hidden if dfa.needs_values else ()))
        return output.detach()  # no view of it: a view could not be changed in place

    @staticmethod
    def backward(ctx, error: Tensor):
        dfa, activations, rows = ctx.dfa, ctx.activations, ctx.dfa._rows(error)
        if dfa.needs_values:
            values = ctx.saved_tensors
            activations = [each._replace(value=value) for each, value in zip(activations, values)]
        signals = dfa._shaped_signals(rows, activations, ctx.matrix)
        # In the activations' memory format: in another, the blocks' backward passes are slow.
        placed = (
            signal.to(device).contiguous(memory_format=memory_format)
            for signal, (device, memory_format) in zip(signals, ctx.places)
        )
        own = dfa.rule_gradients(rows, activations) if ctx.parameters else ()
        return None, None, None, None, error, *placed, *own


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Computes rows @ matrix on the matrix's device, in the wider type, at least float32."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, matrix.dtype), torch.float32)
    rows = rows.to(matrix.device, dtype)
    kind = matrix.device.type
    # The backward pass may run under autocast, which the meta device does not support.
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
