"""Files that are there whole or not at all: written so, and taken for nothing else when read."""

import argparse
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mltools.errors import UserError, one_line


def user_path(text: str) -> Path:
    """Converts the text of an option to a path; a leading `~` is the home folder, as in a shell.

    Raises ArgumentTypeError for the home folder of an unknown user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}") from None


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a file that takes the place of `path` once it is whole and on disk.

    Raises OSError as `open` and `write` do; `path` is then as it was, and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_atomically`, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path) -> None:
    """Removes what `write_atomically` has left in a folder where it was killed."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def reading(what: object, remedy: str) -> Iterator[None]:
    """Around the reading of a file: all that goes wrong becomes one UserError.

    Args:
        what: the file, or a place in it.
        remedy: what the user can do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json, zipfile, NumPy and PyTorch raise all kinds at a damaged file
        raise UserError(f"{what} cannot be read ({one_line(error)}): {remedy}") from error
