"""The processes that torchrun has started for a sweep: which takes which run, and which speaks.

Runs do not depend on each other, so that there is no process group: all that the processes share,
beside the files, is the key-value store that torchrun keeps for them. What is in it outlives them.
Without torchrun there is one process, of rank 0, and no store.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Event
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store


def launched() -> bool:
    """Whether torchrun has started this process."""
    # What torch.distributed.is_torchelastic_launched looks at. The scripts that only read logs have
    # no need of PyTorch, so that it is not imported here.
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Of this process, from 0 up; rank 0 also does what is to be done once for all of them."""
    return int(os.environ["RANK"]) if launched() else 0


def own_device(name: str) -> str:
    """What a `--device` means to this process: to each that torchrun starts, `cuda` is another."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and launched() else name


def own_threads() -> int:
    """How many threads each process of this machine can have a core for."""
    # torchrun has set OMP_NUM_THREADS to 1, so that PyTorch does not know.
    return max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"]))


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Lets the other processes into the block once rank 0 is through; they wait if it fails there.

    So what is wrong with a sweep is said once, and what is to be fetched is fetched once.
    """
    while rank() > 0 and not _store("check", ["prepared"]):
        time.sleep(0.1)  # a wait of the store's own would keep Ctrl-C waiting, too
    yield
    if launched() and rank() == 0:
        _store("set", "prepared", "yes")


def take(run: str) -> bool:
    """Whether this process is to train a run: it is the first to ask, or the first one's successor.

    A process that takes the place of one that was killed has its rank, and so its runs.
    """
    if not launched():
        return True
    own = str(rank())
    return _store("compare_set", f"taken by/{run}", "", own) == own.encode()


def wait(ended: Callable[[], bool], stop: Event) -> None:
    """Waits for what another process is to end, or until `stop` is set."""
    while launched() and not (stop.is_set() or ended()):
        stop.wait(0.5)
        _store("check", ["prepared"])  # where torchrun is gone, nobody ends it


def send(message: str) -> None:
    """To rank 0."""
    _store("queue_push", "messages", message)


def receive() -> Iterator[str]:
    """What the processes have sent until now, in rank 0."""
    while _store("queue_len", "messages"):
        yield _store("queue_pop", "messages").decode()


def _store(method: str, *arguments) -> Any:
    """Calls a method of the store.

    Raises ConnectionError if torchrun is gone.
    """
    from torch.distributed import DistError

    try:
        return getattr(_connected(), method)(*arguments)
    except DistError as error:
        raise ConnectionError("torchrun is gone") from error


@cache
def _connected() -> "Store":
    from torch.distributed import PrefixStore, rendezvous

    store, _, size = next(rendezvous("env://"))
    # Where nodes come and go, all processes start again, and of some ranks there are none any more.
    return PrefixStore(f"sweep of {size}", store)
