"""A training step as one CUDA graph: one launch from the host, whatever it is made of."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # steps before the recording, in which libraries set themselves up


def capture(
    step: Callable[[], None], state: Sequence[Tensor], generator: torch.Generator
) -> Callable[[], None]:
    """Records a step and returns what launches it; its runs for the recording leave no trace.

    To be called on a stream other than the device's default one, and by one thread at a time.

    Args:
        step: works on tensors that stay where they are, on the current stream.
        state: the tensors that it changes.
        generator: what it draws from.

    Raises:
        RuntimeError: the step cannot be recorded, say because it waits for the device.
    """
    tensors, random_state = [tensor.clone() for tensor in state], generator.get_state()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    stream = torch.cuda.current_stream()
    try:
        for _ in range(WARM_UP):
            step()
        # Other threads may go on with their runs meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    finally:
        for tensor, before in zip(state, tensors):
            tensor.copy_(before)
        generator.set_state(random_state)
    return graph.replay
