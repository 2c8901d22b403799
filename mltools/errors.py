"""Errors in one line, and printing that costs no result."""

import os
import sys
import time
from collections.abc import Callable

from mltools import processes

OTHERS_WAIT = 5.0  # seconds


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do about it.

    See `exit_code` for what becomes of it.
    """


def one_line(error: Exception) -> str:
    """An error's message on one short line, whatever a damaged file has put into it."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in told).split())
    return line if len(line) <= 160 else line[:157] + "..."


def show(text: str, error: bool = False) -> bool:
    """Prints a line to stdout, or to stderr for an error; returns False where it cannot be printed.

    A script has its results on disk, so it continues where a stream is closed, its pipe has no
    reader, or the disk behind `>` is full; later lines to that stream are dropped. Characters that
    the stream cannot encode become question marks.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return False
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
        return True
    except OSError as failure:
        with open(os.devnull, "w") as null:  # takes the rest of the stream's buffer, too
            os.dup2(null.fileno(), stream.fileno())
        if not error and not isinstance(failure, BrokenPipeError):  # `| head` may close its pipe
            show(f"stdout cannot be written to ({one_line(failure)}): the rest is lost", error=True)
        return False


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script's `main`, and says on stderr, in one line, what has ended it.

    Returns: 0; 2 for what the user can mend before it is tried again; 1 where the system fails, say
    for want of room; 130 if it was interrupted.
    """
    try:
        main()
        return 0
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted: the same command goes on where this one stopped"
    except OSError as error:
        where = error.filename2 or error.filename
        what = f"{where}: {one_line(error)}" if where else one_line(error)
        message = f"error: {what}; once that is mended, the same command goes on from there"
        code = 1
    if processes.rank() > 0:  # most often, rank 0 has the same to say
        if code == 130:
            return code
        time.sleep(OTHERS_WAIT)  # in which torchrun ends this process, if rank 0 has failed
    show(message, error=True)
    return code
