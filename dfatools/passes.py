"""One pass of a network: its activations, and the checks that refuse a wrong order of calls."""

import threading

import torch
from torch import Tensor, nn


class Pass:
    """A pass under way: the activations that wait for the call of the DFA.

    Args:
        points: the number of feedback points.
        explicit: whether `one_pass` began it, not a call of the network.
    """

    def __init__(self, points: int, explicit: bool) -> None:
        self.explicit = explicit
        self.waiting: list[list[Tensor]] = [[] for _ in range(points)]  # activations of each point
        self.detached: list[Tensor] = []  # outputs of the points since the DFA's last call
        self.without_grad = False  # a point was called under no_grad
        self.counts: list[int] | None = None  # calls of each point before the DFA's last call
        # A compiled pass has ended before another begins.
        self.thread = None if torch.compiler.is_compiling() else threading.current_thread()

    def is_here(self) -> bool:
        """Whether it began in this thread."""
        known = self.thread is not None and not torch.compiler.is_compiling()
        return not known or self.thread is threading.current_thread()

    def is_elsewhere(self) -> bool:
        """Whether another thread is still in it."""
        return not self.is_here() and self.thread is not None and self.thread.is_alive()

    def take(self, recurrent: list[bool]) -> tuple[list[int], list[Tensor]]:
        """Takes the activations, for a call of the DFA.

        Args:
            recurrent: for each point, whether it may have been called several times.

        Returns: the point of each activation, and the activations.

        Raises RuntimeError where it is not certain that the output depends on all of them, or
        where none waits.
        """
        waiting, self.waiting = self.waiting, [[] for _ in recurrent]
        first, self.counts = self.counts, [len(activations) for activations in waiting]
        for point, count in enumerate(self.counts):
            if count > 1 and not recurrent[point]:
                raise RuntimeError(
                    f"feedback point {point} was called {count} times before the DFA: if the "
                    "output depends on each call, use DFALayer(recurrent=True); if not, call what "
                    "it does not depend on under torch.no_grad()"
                )
        if first is not None and self.counts != first:
            raise RuntimeError(
                f"the DFA's second call in a pass came by its points {self.counts} times, its "
                f"first {first} times: compute each output from its input, one after the other"
            )
        if not any(self.counts):
            raise RuntimeError("no feedback point was called in this pass, before the DFA")
        points = [point for point, count in enumerate(self.counts) for _ in range(count)]
        return points, [activation for activations in waiting for activation in activations]

    def refuse_unfed(self) -> None:
        """Raises RuntimeError, at the end, for points that were called, but not before the DFA."""
        counts = self.counts or [0] * len(self.waiting)
        for point, (activations, count) in enumerate(zip(self.waiting, counts)):
            if not count and any(activation.requires_grad for activation in activations):
                raise RuntimeError(
                    f"a pass ended, and feedback point {point} gets nothing, for the DFA was not "
                    "called behind it: call parts of the network in one `with dfa.one_pass():`, or "
                    "under torch.no_grad()"
                )


def refuse_untrained(network: nn.Module, *ends: Tensor) -> None:
    """Raises RuntimeError for a graph that lacks parameters of the network.

    Reentrant checkpointing leaves such a graph silently. It calls a block under no_grad, and its
    output requires a gradient only if its input does, which is not so behind a feedback point.

    Args:
        network: the network.
        ends: the output, the activations and a rule's own parameters, from which the graph is
            followed back.
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
        leaf = parameter.is_leaf and type(parameter.data) is Tensor  # FSDP's are in no graph
        if parameter.requires_grad and leaf and id(parameter) not in reached:
            raise RuntimeError(
                f"no gradient would get to {name}: checkpoint with use_reentrant=False, call the "
                "DFA behind it, or freeze it"
            )
