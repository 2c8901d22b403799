"""One-line error messages, and printing that does not stop a script when it fails."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can correct. Its message is one line: fault, place and remedy."""


def one_line(error: Exception) -> str:
    """Returns an error's message as one line of at most 160 printable characters."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= 160 else line[:157] + "..."


@contextmanager
def user_errors(source: object, remedy: str, verb: str = "read") -> Iterator[None]:
    """Context manager: errors become UserError("<source> cannot be <verb> (...): <remedy>").

    Args:
        source: the file, or the place in a file.
        remedy: how the user can correct the error.
        verb: completes "cannot be": "read", "written", ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json, zipfile, NumPy and PyTorch raise any type for a damaged file
        raise UserError(f"{source} cannot be {verb} ({one_line(error)}): {remedy}") from error


def show(text: str, error: bool = False) -> bool:
    """Prints a line to stdout, or to stderr for an error; returns False if printing fails.

    A script's results are on disk, so it continues if the stream is closed, if the reader of its
    pipe has ended, or if the disk of its file is full. Later lines to the stream are dropped.
    Characters that the stream cannot encode become question marks.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return False
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
        return True
    except OSError as failure:
        with open(os.devnull, "w") as null:  # also receives the rest of the stream's buffer
            os.dup2(null.fileno(), stream.fileno())
        if not error and not isinstance(failure, BrokenPipeError):  # `| head` may close its pipe
            show(f"stdout cannot be written to ({one_line(failure)}): the rest is lost", error=True)
        return False


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script's `main`, and reports an error in it as one line on stderr.

    Returns: 0 for success; 2 for a UserError; 1 for an OSError, such as a full disk; 130 for an
    interruption. Other exceptions, which are bugs, are raised.
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
        code, message = 1, f"error: {reason}; once the cause is fixed, the same command resumes"
    show(message, error=True)
    return code
