"""Training steps as one CUDA graph: one launch from the host, whatever they are made of."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAUNCHES_AHEAD = 2  # of the device; enough that it never waits for the host

_thread = threading.local()


def capture(
    steps: Callable[[], object], state: Sequence[Tensor], generator: torch.Generator
) -> Callable[[], None]:
    """Records steps and returns what launches them; the calls it takes leave no trace.

    To be called on a stream other than the device's default one, and by one thread at a time.

    Args:
        steps: works on tensors that stay where they are, on the current stream.
        state: the tensors that it changes.
        generator: what it draws from.

    Raises:
        RuntimeError: the steps cannot be recorded, say because they wait for the device.
    """
    tensors, random_state = [tensor.clone() for tensor in state], generator.get_state()

    def restore() -> None:
        for tensor, before in zip(state, tensors):
            tensor.copy_(before)
        generator.set_state(random_state)

    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    try:
        steps()  # in which libraries set themselves up
        restore()
        # Other threads may go on with their runs meanwhile. `torch.cuda.graph` would wait for all
        # that they have launched, and give their spare memory back to the device.
        graph.capture_begin(_pool().id, "thread_local")  # type: ignore[arg-type]  # a NewType of it
        try:
            steps()
        finally:
            graph.capture_end()
    except BaseException:
        vars(_thread).clear()  # a pool whose recording has failed may take no other
        raise
    finally:
        restore()
    # The host waits here, asleep, for what it launched before: within the driver it would spin.
    ended = deque(torch.cuda.Event(blocking=True) for _ in range(LAUNCHES_AHEAD))

    def launch() -> None:
        ended[0].synchronize()  # at once if it was never recorded
        graph.replay()
        ended[0].record()
        ended.rotate(-1)

    return launch


def _pool() -> torch.cuda.MemPool:
    """The thread's own: the graph of its next run takes the memory of the last one's."""
    device = str(torch.cuda.current_device())
    pools = vars(_thread)
    if device not in pools:
        pools[device] = torch.cuda.MemPool()
    return pools[device]
