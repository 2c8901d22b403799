"""Several runs on one GPU: streams, CUDA graphs, and a lock around process-wide state.

Parallel runs are threads of one process. On a CPU, only the lock has an effect.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LAUNCHES_AHEAD = 2  # graph launches queued at most; with two, the device never waits for the host

_thread = threading.local()
_graphs: dict[int, torch.cuda.CUDAGraph] = {}  # the latest graph of each stream


class SharedLock:
    """A readers-writer lock: one thread may hold it alone, or several threads together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager: waits until no other thread holds the lock, then holds it alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._together == 0)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager: waits until no thread holds the lock alone, then shares it."""
        with self._changed:
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()


process_state = SharedLock()
"""A thread holds it alone while it changes the default generators or records a CUDA graph (one at a
time in a process), and together with others while the default generators must not change."""


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Runs the CUDA work of a block on a stream of this thread; does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    if device.index is not None:
        torch.cuda.set_device(device)  # else PyTorch would also use memory of cuda:0
    index = torch.cuda.current_device()
    streams = vars(_thread).setdefault("streams", {})
    if index not in streams:  # a stream per run would be too many: a device has few queues
        streams[index] = torch.cuda.Stream(index)
    with process_state.alone():
        free, total = torch.cuda.mem_get_info(device)
        if free < total / 2:  # PyTorch keeps the memory of freed graphs, but never reuses it
            torch.cuda.empty_cache()
    # PyTorch has one thread per device for backward passes: all runs would queue for it.
    with torch.cuda.stream(streams[index]), torch.autograd.set_multithreading_enabled(False):
        yield


def capture(
    steps: Callable[[], object], state: Sequence[Tensor], generator: torch.Generator
) -> Callable[[], None]:
    """Records `steps` as a CUDA graph, and returns a function that launches the graph.

    `state` and `generator` keep their values. An earlier graph of the stream is freed, and must not
    be launched again. Call it in an `own_stream` block, holding `process_state` alone.

    Args:
        steps: works on the current stream, on tensors with fixed addresses.
        state: the tensors that `steps` changes.
        generator: the random generator that `steps` uses.

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
        before.reset()  # freed later, it would free the cuBLAS workspaces of the new graph, too
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        steps()  # a warm-up, in which libraries initialise themselves
        restore()
        # `torch.cuda.graph` would wait for the work of all threads, and empty the memory cache.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            steps()
        finally:
            graph.capture_end()
    except BaseException:
        # PyTorch 2.11 refuses to draw from these generators after a failed recording.
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        for each in (generator, default):
            each.graphsafe_set_state(each.clone_state())
        raise
    finally:
        restore()
    _graphs[stream] = graph
    # With blocking events, the host sleeps while the queue is full; otherwise it would spin.
    ended = deque(torch.cuda.Event(blocking=True) for _ in range(LAUNCHES_AHEAD))

    def launch() -> None:
        ended[0].synchronize()  # returns at once if it was never recorded
        graph.replay()
        ended[0].record()
        ended.rotate(-1)

    return launch
