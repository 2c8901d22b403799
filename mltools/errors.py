"""What goes wrong, told in one line."""

import sys
from collections.abc import Callable


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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except OSError as error:
        where = error.filename2 or error.filename
        print(
            f"error: {f'{where}: ' if where else ''}{one_line(error)}; once that is mended, the "
            "same command goes on after the last epoch",
            file=sys.stderr,
        )
        return 1
    return 0
