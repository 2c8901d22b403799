"""The one error that a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do about it.

    Scripts print it and exit with code 2; every other exception keeps its traceback.
    """


def one_line(error: Exception) -> str:
    """An error's message on one short line, whatever a damaged file has put into it."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in told).split())
    return line if len(line) <= 160 else line[:157] + "..."
