"""Kills a process at a chosen point of its writing, for the tests of faults.

`make test` runs a few faults of each kind. `make soak` runs `DFA_SOAK` times 25 kills of a process,
3 kills of one of two copies that share a sweep, and 60 damaged copies of each file.
"""

import builtins
import importlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from tiny import tiny

from mltools.errors import exit_code

Point = tuple[str, int]

SOAK = int(os.environ.get("DFA_SOAK", "0"))


def run(script: str, arguments: list[str], results: Path, point: Point | None, note: Path) -> None:
    """Runs a script's main on tiny images in this process, and kills the process at a given point.

    A point is the middle of a write below `results`, or the instant before an fsync, a rename or a
    removal of any file. Points are counted by kind, such as "write log.txt".

    Args:
        point: the kind, and the number from 1; None kills nothing.
        note: the file in which the number of points of each kind is saved, as JSON.
    """
    points: Counter[str] = Counter()
    real_open = builtins.open

    def reached(kind: str) -> bool:
        points[kind] += 1
        return (kind, points[kind]) == point

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def open_torn(path, mode="r", *args, **options):
        file = real_open(path, mode, *args, **options)
        below = isinstance(path, (str, Path)) and Path(path).is_relative_to(results)
        if below and mode[0] in "wax":
            # The name of a temporary file is .<name>.<random>.
            name = Path(path).name
            kind = f"write {name if name[0] != '.' else name[1:].rsplit('.', 1)[0]}"
            write = file.write

            def write_torn(data):
                if reached(kind):
                    write(data[: len(data) // 2])
                    file.flush()
                    die()
                return write(data)

            file.write = write_torn
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
    module = importlib.import_module(script)
    module.load_dataset = lambda *_: tiny((1, 15, 16), train=200)
    Figure.savefig = lambda figure, file, **options: file.write(b"drawn")  # drawing is slow
    sys.argv = [script, *arguments]
    sys.stdout = real_open(os.devnull, "w")
    code = exit_code(module.main)
    with real_open(note, "w") as file:
        json.dump(points, file)
    sys.exit(code)
