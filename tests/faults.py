"""Kills a process at a chosen point of its writing, for the tests of faults.

`make test` has a few faults of each kind. `make soak` sets `DFA_SOAK`: tests have that many times
25 kills of a process, 3 kills of one of two that share a sweep, and 60 damaged copies of each file.
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
    """Runs a script's main on tiny images in this process, and kills it at a point of its writing.

    Points are writes below `results`, of which one half gets to the file, and syncs, renames and
    removals of files, which do not happen. They are counted by kind, such as "write log.txt".

    Args:
        point: the kind, and the number from 1; nothing is killed if it is None.
        note: a file that gets how many points there were of each kind, as JSON.
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
            # A temporary file is called .<name>.<random>.
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
    Figure.savefig = lambda figure, file, **options: file.write(b"drawn")  # drawing takes long
    sys.argv = [script, *arguments]
    sys.stdout = real_open(os.devnull, "w")
    code = exit_code(module.main)
    with real_open(note, "w") as file:
        json.dump(points, file)
    sys.exit(code)
