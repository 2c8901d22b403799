"""What goes wrong, told in one line."""

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
    print(message, file=sys.stderr)
    return code
