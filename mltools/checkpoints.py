"""Checkpoints: dictionaries of tensors and plain values, in PyTorch's file format."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from torch.utils.serialization import config

from mltools.archives import open_archive
from mltools.files import reading


def save(file: BinaryIO, content: dict) -> None:
    """Writes what `load` reads, with the checksums that it asks for."""
    with config.patch("save.compute_crc32", True):
        torch.save(content, file)


def load(path: Path, required: Mapping[str, type]) -> dict | None:
    """Reads a checkpoint onto the CPU, or None where there is none.

    Args:
        path: the file.
        required: the keys that must be there, and the types of their values.

    Raises UserError if it is damaged, or something else. Nothing in it is executed.
    """
    with reading(path, "move its folder away"):
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return None
        with file, open_archive(file) as archive:
            if any(member.compress_size != member.file_size for member in archive.infolist()):
                raise ValueError("it is compressed")  # may be endless; PyTorch never does that
            damaged = archive.testzip()  # torch.load compares no checksum
            if damaged:
                raise ValueError(f"the checksum of {damaged!r} is wrong")
            file.seek(0)
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except UnpicklingError:  # whose message says how to execute it all the same
                raise ValueError("it holds more than tensors and plain values") from None
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        for key, kind in required.items():
            if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
                raise ValueError(f"{key} is no {kind.__name__}")
    return content
