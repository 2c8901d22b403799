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
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from mltools.data import DataSet, Split, load_dataset
from mltools.errors import exit_code

Point = tuple[str, int]

SOAK = int(os.environ.get("DFA_SOAK", "0"))


def run(script: str, arguments: list[str], results: Path, point: Point | None, note: Path) -> None:
    """Runs a script's main in this process, and kills it at a point of its writing.

    Points are writes below `results`, of which one half gets to the file, and syncs, renames and
    removals of files, which do not happen. They are counted by kind, such as "write log.txt".
    `note` gets the kind and number of the point if it is reached, and else how many there were of
    each kind, as JSON.

    Args:
        point: the kind, and the number from 1; nothing is killed if it is None.
    """
    points: Counter[str] = Counter()
    real_open = builtins.open

    def save_note(content: object) -> None:
        with real_open(note, "w") as file:
            json.dump(content, file)

    def reached(kind: str) -> bool:
        points[kind] += 1
        there = (kind, points[kind]) == point
        if there:
            save_note(point)
        return there

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
    module = importlib.import_module(script)
    module.load_dataset = few_images
    Figure.savefig = lambda figure, file, **options: file.write(b"drawn")  # drawing takes long
    sys.argv = [script, *arguments]
    sys.stdout = real_open(os.devnull, "w")
    code = exit_code(module.main)
    save_note(points)
    sys.exit(code)


def few_images(name: str, data_dir: Path) -> DataSet:
    """Loads 200 training images and 100 test images of a data set."""

    def first(split: Split, count: int) -> Split:
        tensors = (tensor[:count] for tensor in split.dataset.tensors)
        return Split(TensorDataset(*tensors), split.mean, split.std)

    data = load_dataset(name, data_dir)
    return replace(data, train=first(data.train, 200), test=first(data.test, 100))
