"""Several runs on one GPU: streams, CUDA graphs, and the state that a process has only once.

Each run has a thread. On a CPU, of all this only the lock has work to do.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LAUNCHES_AHEAD = 2  # of the device; enough that it never waits for the host

_thread = threading.local()
_graphs: dict[int, torch.cuda.CUDAGraph] = {}  # the latest of each stream


class SharedLock:
    """A lock that one thread holds alone, or several hold together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other thread is in a block of this lock."""
        with self._changed:
            self._changed.wait_for(lambda: self._together == 0)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits until no other thread is in an `alone` block of this lock."""
        with self._changed:
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()


process_state = SharedLock()
"""Held alone to change the default generators or to record a CUDA graph, of which a process can
record one at a time; held together where the generators must stay as they are."""


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Lets the block's work on CUDA run beside that of other threads; does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    if not hasattr(_thread, "stream"):  # one per thread, not per run: the device's queues are few
        if device.index is not None:
            torch.cuda.set_device(device)  # else PyTorch would take memory of the first one, too
        _thread.stream = torch.cuda.Stream(device)
    with process_state.alone():
        free, total = torch.cuda.mem_get_info(device)
        if free < total / 2:  # PyTorch keeps the memory of earlier graphs, and reuses it for none
            torch.cuda.empty_cache()
    # PyTorch's thread for backward passes is one per device: all runs would queue for it.
    with torch.cuda.stream(_thread.stream), torch.autograd.set_multithreading_enabled(False):
        yield


def capture(
    steps: Callable[[], object], state: Sequence[Tensor], generator: torch.Generator
) -> Callable[[], None]:
    """Records steps as a CUDA graph, and returns the function that launches it.

    `state` and `generator` are afterwards as they were. An earlier graph of the stream is freed. To
    be called in `own_stream`, by the thread that holds `process_state` alone.

    Args:
        steps: works on tensors that stay where they are, on the current stream.
        state: the tensors that it changes.
        generator: the one that it draws from.

    Raises:
        RuntimeError: the steps cannot be recorded, for instance because they wait for the device.
    """
    tensors, random_state = [tensor.clone() for tensor in state], generator.get_state()

    def restore() -> None:
        for tensor, value in zip(state, tensors):
            tensor.copy_(value)
        generator.set_state(random_state)

    stream = torch.cuda.current_stream().cuda_stream
    if before := _graphs.pop(stream, None):
        before.reset()  # freed later, it would take the workspaces of cuBLAS that the new one uses
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        steps()  # in which libraries set themselves up
        restore()
        # `torch.cuda.graph` would wait for all that other threads have launched, and give their
        # spare memory back to the device.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            steps()
        finally:
            graph.capture_end()
    finally:
        restore()
    _graphs[stream] = graph
    # The host waits here, asleep, for its earlier launches: within the driver it would spin.
    ended = deque(torch.cuda.Event(blocking=True) for _ in range(LAUNCHES_AHEAD))

    def launch() -> None:
        ended[0].synchronize()  # at once if it was never recorded
        graph.replay()
        ended[0].record()
        ended.rotate(-1)

    return launch
