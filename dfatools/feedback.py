"""Direct Feedback Alignment in one backward pass.

Backpropagation (BP) gives hidden activations h_i the gradient dL/dh_i. Direct Feedback Alignment
(Nokland 2016; Launay, Poli, Krzakala 2019, Eq. 2) gives them e B_i instead, with the output error
e = dL/dy and a fixed random matrix B_i.

Two modules make an ordinary network learn that way. A `DFALayer` after a hidden block cuts the
graph: the next block sees the same values and sends nothing back. A `DFA` at the output joins all
the activations that were cut in one autograd node, which leaves the output as it is and, on the
way back, hands e to the output and e B_i to each h_i. So one plain `loss.backward()` trains every
layer, and no product with a transposed weight matrix is ever formed.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

TRAINING_METHODS = ("dfa", "bp", "shallow")
REDUCTIONS = ("mean", "sum")
FEEDBACK_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


class DFALayer(nn.Module):
    """A feedback point: placed after a hidden block, identity in value.

    It learns which `DFA` it belongs to when it is given to one. Called several times in one
    forward pass (shared weights, recurrence), it feeds back at each call.

    Where a module that holds the `DFA` comes to this point again in another call, that is a new
    pass, and what is left of one that raised, or was of a part of the network, is forgotten. So a
    recurrence goes inside one call. What is left is not seen where the next pass is plain code, or
    does not come by this point: call a part whose output does not go on to the `DFA` under
    `torch.no_grad()`, and after an error the whole network once.

    It may stand inside what `torch.utils.checkpoint` computes again (`use_reentrant=False`), except
    under `torch.compile`. In a module given to FSDP2's `fully_shard` it comes first, not last: FSDP
    gathers the weights when a gradient gets to the module's output.

    Shapes: any `(*batch, *features)`, unchanged, with as many batch dimensions as its `DFA` says.
    """

    _dfa: "DFA | None"

    def __init__(self) -> None:
        super().__init__()
        # In __dict__, so as not to be a submodule: the DFA stands elsewhere in the network.
        self.__dict__["_dfa"] = None
        self._index = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises RuntimeError where no `DFA` owns this layer."""
        if self._dfa is None:
            raise RuntimeError(
                "this DFALayer belongs to no DFA: list it in that at the output, DFA([layer, ...])"
            )
        return self._dfa._cut(self._index, hidden)


class DFA(nn.Module):
    """Direct Feedback Alignment for a list of feedback points; placed on the output.

    It owns one random matrix, (output size, largest feedback size), with entries from N(0, 1),
    shared by all the points: the i-th gets the first d_i columns, which are its B_i, (output size,
    d_i), in Eq. 2. It is made on the first forward pass, on the output's device, in float32 or
    wider. In a distributed run the first process's matrix is everybody's, whole: all make the first
    pass together.

    Args:
        layers: the `DFALayer`s that this output feeds, in network order.
        normalization: scale B_i to a standard deviation of 1 / sqrt(d_i * output size) (Section 3),
            so that the norm of e B_i is about that of e over sqrt(output size), whatever d_i is.
            Without it, the standard deviation is 1, and the norm sqrt(d_i) times that of e.
        reduction: `"mean"` sends back e itself; `"sum"` sends back e times the number of samples
            in the batch (in a distributed run: over all processes), which under a mean loss is
            the summed error of the 2019 release. Under gradient accumulation each forward pass
            has a batch of its own.
        training_method: `"dfa"`; `"bp"`, the same network with nothing cut; `"shallow"`, where only
            what follows the last feedback point learns. May be changed at any time.
        batch_dims: how many leading dimensions the output and the hidden activations share: 1 for
            (batch, feature), 2 for (batch, token, feature).
        feedback_device: where the matrix is kept, if not where the output is.
        generator: draws the matrix; without one the device's default generator does.
        feedback_dtype: the matrix's floating-point type, whatever the model's: what is drawn is
            rounded to it, and e B_i is computed in it. If None, the matrix is drawn in float32 or
            wider, and follows the model in type.

    Attributes:
        layers: the feedback points, a tuple.
        training_method: as above.
        feedback_matrix: a buffer, (output size, largest d_i), without normalization; None before
            the first forward pass. It is saved in the `state_dict`, and taken up from one.

    Shapes: any `(*batch, *features)`, unchanged. All that is not batch counts as one vector of
    features: (channel, height, width) of a convolution, say.

    Raises:
        TypeError: an entry of `layers` is no `DFALayer`.
        ValueError: no layer, a layer listed twice or owned by another `DFA`, an unknown option.
    """

    feedback_matrix: Tensor | None

    def __init__(
        self,
        layers: Iterable[DFALayer],
        normalization: bool = True,
        reduction: str = "mean",
        training_method: str = "dfa",
        batch_dims: int = 1,
        feedback_device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layers = tuple(layers)
        if not layers:
            raise ValueError("DFA needs at least one DFALayer")
        for layer in layers:
            if not isinstance(layer, DFALayer):
                raise TypeError(f"DFA takes a list of DFALayer, not {type(layer).__name__}")
            if layer._dfa is not None:
                raise ValueError("a DFALayer given to DFA already belongs to another one")
        if len(set(layers)) < len(layers):
            raise ValueError(
                "a DFALayer is listed twice; a layer that is used twice is listed once"
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
        self.layers = layers  # a tuple, so that they are not registered a second time here
        for index, layer in enumerate(layers):
            layer.__dict__["_dfa"] = self
            layer._index = index
        self.normalization = normalization
        self.reduction = reduction
        self.batch_dims = batch_dims
        self.feedback_device = feedback_device
        self.generator = generator
        self.feedback_dtype = feedback_dtype
        self.register_buffer("feedback_matrix", None)
        self._sizes: dict[int, int] = {}  # features at each point, as last seen
        # What the forward pass under way has cut: index, outermost module call, activation.
        self._pending: list[tuple[int, FrameType | None, Tensor]] = []

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

    def forward(self, output: Tensor) -> Tensor:
        """Returns `output`, joined with the cut activations.

        Raises:
            ValueError: `output` has another size than the feedback matrix was made for, or other
                batch dimensions than the hidden activations.
            RuntimeError: no feedback point of this DFA was reached in this forward pass, or it is
                one that cannot work, see `DFALayer`.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel splits a pass among threads, which a DFA cannot follow: use "
                "DistributedDataParallel"
            )
        cuts = self.training_method == "dfa" and torch.is_grad_enabled()
        if cuts and _recomputing():
            return output
        pending, self._pending = [hidden for _, _, hidden in self._pending], []
        if not self._sizes:
            raise RuntimeError(
                "none of this DFA's layers was called: place them in the network, before the DFA"
            )
        self._prepare(output)
        if not cuts:
            return output
        if not pending:
            raise RuntimeError(
                "none of this DFA's layers was called with gradients enabled in this forward pass"
            )
        for hidden in pending:
            if hidden.shape[: self.batch_dims] != output.shape[: self.batch_dims]:
                raise ValueError(
                    f"hidden activations of shape {tuple(hidden.shape)} do not share the first "
                    f"{self.batch_dims} dimension(s) with the output, {tuple(output.shape)}: "
                    "see batch_dims"
                )
        return _Feedback.apply(self, output, *pending)

    def feedback(self, i: int) -> Tensor:
        """B_i as the i-th feedback point gets it, (output size, d_i), normalization included.

        In the feedback matrix's type, on its device.

        Raises:
            RuntimeError: before the first forward pass, when the sizes are not known yet.
            IndexError: there is no such point.
        """
        i = range(len(self.layers))[i]
        matrix = self._matrix()
        if i not in self._sizes:
            raise RuntimeError(f"feedback point {i} has not been called yet: its size is unknown")
        size = self._sizes[i]
        return matrix[:, :size] * self._scale(size)

    def signals(self, error: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """What DFA sends to hidden activations of these shapes for the output error e = dL/dy.

        Args:
            error: e, `(*batch, *features)`, shaped as the output.
            shapes: `(*batch, *features)` of each activation.

        Returns: e B_i for each, times the batch's size under `reduction="sum"`, in the feedback
        matrix's type, on e's device.

        Raises RuntimeError before the first forward pass.
        """
        matrix = self._matrix()
        rows = error.reshape(-1, matrix.shape[0])
        samples = rows.shape[0] * _processes() if self.reduction == "sum" else 1
        sizes = [shape[self.batch_dims :].numel() for shape in shapes]
        # One product serves all points: they share its columns, up to their scale.
        with _without_autocast(matrix.device.type):  # a backward pass may be under it
            common = rows.to(matrix.device, matrix.dtype) @ matrix[:, : max([0, *sizes])]
        common = common.to(error.device)
        by_size = {size: common[:, :size] * (samples * self._scale(size)) for size in set(sizes)}
        return [by_size[size].reshape(shape) for size, shape in zip(sizes, shapes)]

    def _scale(self, size: int) -> float:
        return 1 / math.sqrt(size * self._matrix().shape[0]) if self.normalization else 1.0

    def _matrix(self) -> Tensor:
        if self.feedback_matrix is None:
            raise RuntimeError("the feedback is known after the first forward pass")
        return self.feedback_matrix

    def _cut(self, index: int, hidden: Tensor) -> Tensor:
        """Called by a feedback point: notes its activation and ends the graph there."""
        self._sizes[index] = hidden.shape[self.batch_dims :].numel()
        if self.training_method == "bp" or not torch.is_grad_enabled():
            return hidden
        if self.training_method == "dfa" and not _recomputing():
            self._note(index, hidden)
        return hidden.detach()

    def _note(self, index: int, hidden: Tensor) -> None:
        """Adds to `_pending`, and drops what a pass that never got to this DFA has left there.

        Nothing in the tensors tells those activations from the others. The call stack does: where a
        point is called again in another call of a module that holds this DFA, that is a new pass.
        """
        call = None if torch.compiler.is_compiling() else _outermost_module_call()
        if call is not None and self._pending and self._pending[0][1] is not call:
            # What was compiled has no call, and goes with what was noted next to it.
            others = [i for i, entry in enumerate(self._pending) if entry[1] not in (None, call)]
            again = any(self._pending[i][0] == index for i in others)
            if again and self in call.f_locals["self"].modules():
                del self._pending[: others[-1] + 1]
        self._pending.append((index, call, hidden))

    def _prepare(self, output: Tensor) -> None:
        """Makes the feedback matrix if there is none, and checks it against the output."""
        if output.dim() < self.batch_dims:
            raise ValueError(
                f"DFA with batch_dims={self.batch_dims} got an output of shape "
                f"{tuple(output.shape)}"
            )
        features = output.shape[self.batch_dims :].numel()
        if self.feedback_matrix is None:
            with torch.inference_mode(False):  # it will be trained with, and saved
                self.feedback_matrix = self._draw(features, max(self._sizes.values()), output)
        elif self.feedback_device is None and self.feedback_matrix.device != output.device:
            self.feedback_matrix = self.feedback_matrix.to(output.device)  # from a checkpoint
        rows, columns = self.feedback_matrix.shape
        if features != rows:
            raise ValueError(
                f"DFA got an output of size {features}, but its feedback matrix was made for {rows}"
            )
        if max(self._sizes.values()) > columns:
            raise ValueError(
                f"a feedback point has {max(self._sizes.values())} features, "
                f"but the feedback matrix was made for at most {columns}"
            )

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
        """For copies and pickles: without the pass under way."""
        return {**self.__dict__, "_pending": []}

    def _apply(self, fn, recurse=True):
        """Follows the model, but for what `feedback_device` and `feedback_dtype` fix."""
        matrix = self.feedback_matrix
        if matrix is not None and matrix.is_meta:
            matrix = self.feedback_matrix = None  # holds no values: the next pass draws them
        if matrix is None or (self.feedback_device is None and self.feedback_dtype is None):
            return super()._apply(fn, recurse)
        # Not even for a moment on another device, or in a narrower type.
        self.feedback_matrix = None
        super()._apply(fn, recurse)
        follower = fn(matrix[:0])
        self.feedback_matrix = matrix.to(
            self.feedback_device or follower.device, self.feedback_dtype or follower.dtype
        )
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """A checkpoint's matrix is taken up even before the first pass; a BP one needs none."""
        key = prefix + "feedback_matrix"
        if key not in state_dict:
            return
        if self.feedback_matrix is None:
            self.feedback_matrix = torch.empty_like(
                state_dict[key], device=self.feedback_device, dtype=self.feedback_dtype
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True, it has come as it was in the checkpoint.
        self.feedback_matrix = self.feedback_matrix.to(self.feedback_device, self.feedback_dtype)


class _Feedback(torch.autograd.Function):
    """(output, h_1, ..., h_n) -> output; backward: e -> (e, e B_1, ..., e B_n)."""

    @staticmethod
    def forward(ctx, dfa: DFA, output: Tensor, *hidden: Tensor) -> Tensor:
        ctx.dfa, ctx.shapes = dfa, [h.shape for h in hidden]
        ctx.places = [(h.device, _memory_format(h)) for h in hidden]
        return output.detach()  # shares memory, but is no view: those cannot be changed in place

    @staticmethod
    def backward(ctx, error: Tensor):
        signals = ctx.dfa.signals(error, ctx.shapes)
        # Laid out as the activations, or the blocks' own backward passes would be slow.
        placed = (
            signal.to(device).contiguous(memory_format=memory_format)
            for signal, (device, memory_format) in zip(signals, ctx.places)
        )
        return None, error, *placed


def _memory_format(images: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    if last and not images.is_contiguous() and images.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _without_autocast(device_type: str) -> AbstractContextManager:
    # Of the devices that networks run on, meta alone has no autocast.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _recomputing() -> bool:
    """Whether this call, made inside a backward pass, is activation checkpointing's second one.

    The graph of the first one is what the error goes to: the second must not add to it. Where
    checkpointing is reentrant there is no such graph, which is known by the lack of its hooks.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        raise RuntimeError(
            "a feedback point or a DFA was called in a backward pass: checkpoint with "
            "use_reentrant=False"
        )
    return True


def _outermost_module_call() -> FrameType | None:
    """The frame of the outermost module call under way in this thread, or None."""
    frame: FrameType | None = sys._getframe(1)
    outermost = None
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            outermost = frame
        frame = frame.f_back
    return outermost
