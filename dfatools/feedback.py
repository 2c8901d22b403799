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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfatools.passes import Pass, refuse_untrained

TRAINING_METHODS = ("dfa", "bp", "shallow")
REDUCTIONS = ("mean", "sum")
FEEDBACK_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
BLOCK = 2**24  # entries of a narrow feedback matrix that are widened at a time


class DFALayer(nn.Module):
    """A feedback point: placed after a hidden block, identity in value.

    It belongs to the `DFA` that is made after it, on a network that holds it. It may stand inside
    what `torch.utils.checkpoint` computes again (`use_reentrant=False`), except under
    `torch.compile`. In a module given to FSDP2's `fully_shard` it comes first, not last: FSDP
    gathers the weights when a gradient gets to the module's output.

    Args:
        recurrent: allows several calls in one pass before the `DFA`'s, as in a recurrence or with
            shared weights. All their activations get the feedback: the output must depend on each.

    Shapes: any `(*batch, *features)`, unchanged, with as many batch dimensions as its `DFA` says.
    """

    _dfa: "DFA | None"

    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.recurrent = recurrent
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
    """

    feedback_matrix: Tensor

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
        layers = tuple(module for module in network.modules() if isinstance(module, DFALayer))
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
        for index, layer in enumerate(layers):
            if layer._dfa is not None:
                layer._dfa._retire()
            layer.__dict__["_dfa"] = self
            layer._index = index
        self._network = weakref.ref(network)  # weak, or its weights would await garbage collection
        self._hooks = (
            network.register_forward_pre_hook(self._enter),
            network.register_forward_hook(self._leave, always_call=True),
        )

    def _retire(self) -> None:
        """Gives up the points to another DFA."""
        self.layers = ()
        for hook in self._hooks:
            hook.remove()

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

    def _feeds(self) -> bool:
        return self.training_method == "dfa" and torch.is_grad_enabled()

    def _begin(self, explicit: bool) -> None:
        if self._pass is not None and self._pass.is_elsewhere():
            raise RuntimeError(
                "a pass of this network is under way in another thread: give each thread a copy"
            )
        if not torch.compiler.is_compiling():
            points = (m for m in (self._network() or self).modules() if isinstance(m, DFALayer))
            if any(point._dfa not in (None, self) for point in points):
                raise RuntimeError(
                    "a feedback point of the network belongs to another DFA: make a new "
                    "DFA(network)"
                )
        self._pass = Pass(len(self.layers), explicit)

    def _end(self, failed: bool = False) -> None:
        now, self._pass = self._pass, None
        if now and not failed and not now.counts and any(now.waiting):
            raise RuntimeError(
                "a pass ended before its DFA, and its feedback points get nothing: call parts of "
                "the network in one `with dfa.one_pass():`, or under torch.no_grad()"
            )

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
            now.waiting[index].append(_Activation.apply(hidden))
        return hidden.detach()

    def forward(self, output: Tensor) -> Tensor:
        """Returns `output`, joined with the activations detached in this pass.

        Raises:
            TypeError: `output` is no tensor.
            ValueError: its size is not the matrix's, or its batch dimensions not the activations'.
            RuntimeError: there is no pass, or one that would leave something untrained: without a
                call of a feedback point, with several of one that is not `recurrent`, with others
                than before the `DFA`'s first call, or with reentrant checkpointing.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel splits a pass: use DistributedDataParallel")
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
        for activation in hidden:
            if activation.shape[: self.batch_dims] != output.shape[: self.batch_dims]:
                raise ValueError(
                    f"hidden activations of shape {tuple(activation.shape)} do not share the first "
                    f"{self.batch_dims} dimension(s) with the output, {tuple(output.shape)}: "
                    "see batch_dims"
                )
        if now.without_grad or not all(tensor.requires_grad for tensor in (output, *hidden)):
            refuse_untrained(self._network() or self, output, *hidden)
        sizes = [activation.shape[self.batch_dims :].numel() for activation in hidden]
        matrix = self._matrix_for(output, max(sizes))
        self._sizes.update(zip(points, sizes))
        return _Feedback.apply(self, matrix, output, *hidden)

    def feedback(self, i: int) -> Tensor:
        """B_i as the i-th feedback point gets it, (output size, d_i), normalization included.

        Raises RuntimeError if the point has not been fed yet, IndexError if there is none.
        """
        i = range(len(self.layers))[i]
        if i not in self._sizes:
            raise RuntimeError(f"feedback point {i} has not been fed yet: its size is unknown")
        size = self._sizes[i]
        return self.feedback_matrix[:, :size] * self._scale(size, self.feedback_matrix)

    def signals(
        self, error: Tensor, shapes: Sequence[torch.Size], matrix: Tensor | None = None
    ) -> list[Tensor]:
        """Computes e B_i for hidden activations, times the batch's size under `reduction="sum"`.

        Args:
            error: e = dL/dy, `(*batch, *features)`, shaped as the output.
            shapes: `(*batch, *features)` of each activation.
            matrix: the feedback matrix of the forward pass; this DFA's if None.

        Returns: a signal for each activation, shaped as it, in the wider of e's and the matrix's
        types, float32 at least, on e's device.
        """
        matrix = self.feedback_matrix if matrix is None else matrix
        rows = error.reshape(-1, matrix.shape[0])
        samples = rows.shape[0] * _processes() if self.reduction == "sum" else 1
        sizes = [shape[self.batch_dims :].numel() for shape in shapes]
        # One product serves all points: they share its columns, up to their scale.
        common = _product(rows, matrix[:, : max([0, *sizes])]).to(error.device)
        by_size = {
            size: common[:, :size] * (samples * self._scale(size, matrix)) for size in set(sizes)
        }
        return [by_size[size].reshape(shape) for size, shape in zip(sizes, shapes)]

    def _scale(self, size: int, matrix: Tensor) -> float:
        return 1 / math.sqrt(size * matrix.shape[0]) if self.normalization else 1.0

    def _matrix_for(self, output: Tensor, columns: int) -> Tensor:
        """The feedback matrix, drawn if there is none; refused if it does not fit the pass."""
        features = output.shape[self.batch_dims :].numel()
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
        elif matrix.numel() == 0 and matrix.device.type == "cpu" and matrix.is_shared():
            raise RuntimeError(
                "share_memory() before there is a feedback matrix, of which each process would "
                "draw its own: call the network once before, or dfa_from_bp(..., example=x)"
            )
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads a matrix of any size if there is none yet; a BP `state_dict` needs none."""
        loaded = state_dict.get(prefix + "feedback_matrix")
        if loaded is None or loaded.numel() == 0 or loaded.is_meta:
            return
        if self.feedback_matrix.numel() == 0:
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
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.leaf = hidden.is_leaf
        return hidden.detach()

    @staticmethod
    def backward(ctx, signal: Tensor):
        # A leaf keeps the tensor itself as its `.grad`: two leaves must not share memory.
        return signal.clone() if ctx.leaf else signal


class _Feedback(torch.autograd.Function):
    """(output, h_1, ..., h_n) -> output; backward: e -> (e, e B_1, ..., e B_n)."""

    @staticmethod
    def forward(ctx, dfa: DFA, matrix: Tensor, output: Tensor, *hidden: Tensor) -> Tensor:
        # Not saved for backward: DistributedDataParallel writes the same values into all buffers.
        ctx.dfa, ctx.matrix, ctx.shapes = dfa, matrix, [h.shape for h in hidden]
        ctx.places = [(h.device, _memory_format(h)) for h in hidden]
        return output.detach()  # shares memory, but is no view: those cannot be changed in place

    @staticmethod
    def backward(ctx, error: Tensor):
        signals = ctx.dfa.signals(error, ctx.shapes, ctx.matrix)
        # Laid out as the activations, or the blocks' own backward passes would be slow.
        placed = (
            signal.to(device).contiguous(memory_format=memory_format)
            for signal, (device, memory_format) in zip(signals, ctx.places)
        )
        return None, None, error, *placed


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, on the matrix's device, in the wider type of both, float32 at least."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, matrix.dtype), torch.float32)
    rows = rows.to(matrix.device, dtype)
    kind = matrix.device.type
    # A backward pass may be under autocast, which of all devices meta alone does not have.
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
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
