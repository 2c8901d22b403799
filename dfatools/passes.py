"""One pass of a network: its activations, and the checks that refuse a wrong order of calls."""

import threading

import torch
from torch import Tensor, nn


class Pass:
    """An open pass: the activations kept for the call of the DFA.

    Args:
        points: the number of feedback points.
        explicit: True if `one_pass` opened it, False if a call of the network did.
    """

    def __init__(self, points: int, explicit: bool) -> None:
        self.explicit = explicit
        self.waiting: list[list[Tensor]] = [[] for _ in range(points)]  # activations of each point
        self.detached: list[Tensor] = []  # outputs of the points since the DFA's last call
        self.without_grad = False  # a point was called under no_grad
        self.counts: list[int] | None = None  # calls of each point before the DFA's last call
        # A compiled pass always ends before another one begins.
        self.thread = None if torch.compiler.is_compiling() else threading.current_thread()

    def is_here(self) -> bool:
        """Returns whether the pass began in this thread; True under `torch.compile`."""
        known = self.thread is not None and not torch.compiler.is_compiling()
        return not known or self.thread is threading.current_thread()

    def is_elsewhere(self) -> bool:
        """Returns whether the pass began in another thread, which is still alive."""
        return not self.is_here() and self.thread is not None and self.thread.is_alive()

    def take(self, recurrent: list[bool]) -> tuple[list[int], list[Tensor]]:
        """Removes and returns the kept activations, for a call of the DFA.

        Args:
            recurrent: for each point, True if it may be called several times.

        Returns: the point of each activation, and the activations.

        Raises RuntimeError if the output may not depend on all of them, or if none was kept.
        """
        waiting, self.waiting = self.waiting, [[] for _ in recurrent]
        first, self.counts = self.counts, [len(activations) for activations in waiting]
        for point, count in enumerate(self.counts):
            if count > 1 and not recurrent[point]:
                raise RuntimeError(
                    f"feedback point {point} was called {count} times before the DFA: use "
                    "DFALayer(recurrent=True) if the output depends on each call, and make the "
                    "other calls under torch.no_grad()"
                )
        if first is not None and self.counts != first:
            raise RuntimeError(
                f"in one pass, the points were called {first} times before the first call of the "
                f"DFA, {self.counts} times before the next: compute one output after the other"
            )
        if not any(self.counts):
            raise RuntimeError("no feedback point was called in this pass, before the DFA")
        points = [point for point, count in enumerate(self.counts) for _ in range(count)]
        return points, [activation for activations in waiting for activation in activations]

    def refuse_unfed(self) -> None:
        """Raises RuntimeError if the pass ends and a called point got no feedback."""
        counts = self.counts or [0] * len(self.waiting)
        for point, (activations, count) in enumerate(zip(self.waiting, counts)):
            if not count and any(activation.requires_grad for activation in activations):
                raise RuntimeError(
                    f"a pass ended without feedback for point {point}, because the DFA was not "
                    "called after it: call parts of the network in one `with dfa.one_pass():`, or "
                    "under torch.no_grad()"
                )


def refuse_untrained(network: nn.Module, *ends: Tensor) -> None:
    """Raises RuntimeError if the graph does not reach all parameters of the network.

    With reentrant checkpointing this would happen silently: it runs a block under no_grad, and the
    block's output requires a gradient only if its input does. The output of a point does not.

    Args:
        network: the network.
        ends: the tensors from which the graph is followed back: the output, the activations, and
            a rule's own parameters.
    """
    if torch.compiler.is_compiling():
        return
    nodes, seen = [end.grad_fn for end in ends], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    reached = {id(getattr(node, "variable", None)) for node in seen} | {id(end) for end in ends}
    for name, parameter in network.named_parameters():
        leaf = parameter.is_leaf and type(parameter.data) is Tensor  # FSDP2's are in no graph
        if parameter.requires_grad and leaf and id(parameter) not in reached:
            raise RuntimeError(
                f"no gradient would reach {name}: checkpoint with use_reentrant=False, call the "
                "DFA after it, or freeze it"
            )
