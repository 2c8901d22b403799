"""Checkpoints: dictionaries of tensors and plain values, in PyTorch's file format."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from torch.utils.serialization import config

from mltools.archives import open_archive
from mltools.files import reading


def save(file: BinaryIO, content: dict) -> None:
    """Writes what `load` reads, with the checksums that it asks for.

    Raises OSError as `file.write` does.
    """
    whole = io.BytesIO()  # PyTorch would make a RuntimeError of an OSError
    with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]  # set at import
        torch.save(content, whole)
    file.write(whole.getbuffer())


def load(path: Path, required: Mapping[str, type]) -> dict | None:
    """Reads a checkpoint onto the CPU, or None where there is none.

    Args:
        path: the file.
        required: the keys that must be there, and the types of their values.

    Raises UserError if it is damaged, or something else. Nothing in it is executed.
    """
    with reading(path, "move its folder away"):
        try:
            with open(path, "rb") as file, open_archive(file) as archive:
                checked = _checked(archive)
        except FileNotFoundError:
            return None
        try:
            content = torch.load(checked, map_location="cpu", weights_only=True)
        except UnpicklingError:  # whose message says how to execute it all the same
            raise ValueError("it holds more than tensors and plain values") from None
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        for key, kind in required.items():
            if not isinstance(content.get(key), kind) or isinstance(content[key], bool):
                raise ValueError(f"{key} is no {kind.__name__}")
    return content


def _checked(archive: zipfile.ZipFile) -> BinaryIO:
    """A copy of the archive with what its checksums confirm, and headers of our own.

    PyTorch compares no checksum, and makes numbers of its own where a header is damaged.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as checked:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:  # PyTorch never does, and it may be huge
                raise ValueError("it is compressed")
            checked.writestr(member.filename, archive.read(member))
    copy.seek(0)
    return copy
