"""Errors in one line, and printing that costs no result."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can correct; its message is one line: fault, place and remedy."""


def one_line(error: Exception) -> str:
    """Returns an error's message as one short line of printable characters."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= 160 else line[:157] + "..."


@contextmanager
def user_errors(source: object, remedy: str, verb: str = "read") -> Iterator[None]:
    """Turns any error of a block into a UserError, `<source> cannot be <verb> (...): <remedy>`.

    Args:
        source: the file, or a place in it.
        remedy: the way to correct the error.
        verb: completes "cannot be": "read", "written", ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json, zipfile, NumPy and PyTorch raise all kinds at a damaged file
        raise UserError(f"{source} cannot be {verb} ({one_line(error)}): {remedy}") from error


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
    """Runs a script's `main`, and reports the error that ends it on stderr, in one line.

    Returns: 0; 2 for an error that the user can correct; 1 where the system fails, for instance on
    a full disk; 130 if it was interrupted.
    """
    try:
        main()
        return 0
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted: the same command resumes where this one stopped"
    except OSError as error:
        path = error.filename2 or error.filename
        reason = f"{path}: {one_line(error)}" if path else one_line(error)
        code, message = 1, f"error: {reason}; once that is fixed, the same command resumes"
    show(message, error=True)
    return code
