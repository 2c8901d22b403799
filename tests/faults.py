"""Kills a process of its own at a chosen point of its writing; what the tests of faults start."""

import builtins
import importlib
import os
import signal
import sys
from pathlib import Path

from mltools.errors import exit_code


def run(script: str, arguments: list[str], results: Path, point: int, note: Path) -> None:
    """Runs a script's main in this process, and kills it at its `point`-th write below `results`.

    A point is a write, of which one half gets to the file, or a sync, a rename or a removal, which
    does not happen. `note` gets a line that says what it was; if there is no such point, a line
    with the number of points that there were. Point 0 is never reached.
    """
    points = 0
    real_open = builtins.open

    def put_down(line: object) -> None:
        with real_open(note, "a") as file:
            file.write(f"{line}\n")

    def reached(what: str) -> bool:
        nonlocal points
        points += 1
        if points == point:
            put_down(what)
        return points == point

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Torn:
        """A file that is open for writing."""

        def __init__(self, file, name: str) -> None:
            self.file, self.name = file, name

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def __enter__(self) -> "Torn":
            return self

        def __exit__(self, *exception) -> None:
            self.file.close()

        def write(self, data) -> int:
            if reached(f"write {self.name}"):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

        def writelines(self, lines) -> None:
            for line in lines:
                self.write(line)

    def open_torn(path, mode="r", *args, **options):
        file = real_open(path, mode, *args, **options)
        if (
            isinstance(path, (str, Path))
            and Path(path).is_relative_to(results)
            and mode[0] in "wax"
        ):
            # A temporary file is called .<name>.<random>.
            name = Path(path).name
            return Torn(file, name if name[0] != "." else name[1:].rsplit(".", 1)[0])
        return file

    def before(function, what: str):
        def call(*args, **options):
            if reached(what):
                die()
            return function(*args, **options)

        return call

    builtins.open = open_torn
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, before(getattr(os, name), name))
    sys.argv = [script, *arguments]
    sys.stdout = real_open(os.devnull, "w")
    code = exit_code(importlib.import_module(script).main)
    put_down(points)
    sys.exit(code)
