"""The one error that a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do about it.

    Scripts print it and exit with code 2; every other exception keeps its traceback.
    """
