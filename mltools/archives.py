"""Zip archives (npz files, checkpoints), believed only where each byte that counts is checked.

Python's, NumPy's and PyTorch's readers pass over bytes in front of an archive or behind it, over
the first of two members of one name, and, PyTorch's, over wrong checksums.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

_END = b"PK\x05\x06"  # of the record that ends an archive, which has 22 bytes
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """An archive that fills its file; the checksum of a member is compared when it is read.

    Raises what `zipfile` raises for a damaged file, and ValueError.
    """
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    end = file.seek(-22, 2)
    record = file.read(22)
    if not record.startswith(_END) or archive.comment:
        raise ValueError("something follows the archive in it")
    if int.from_bytes(record[10:12], "little") != min(len(members), 0xFFFF):
        raise ValueError("members are missing")
    if min((member.header_offset for member in members), default=end) > 0:
        raise ValueError("something precedes the archive in it")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two members have one name")
    if any(member.flag_bits & 1 for member in members):
        raise ValueError("it is encrypted")
    return archive


def read_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file: all of them, or those of `names` that are there.

    Takes no more memory than the file holds, whatever it claims.

    Raises OSError, what `zipfile` raises for a damaged file, and ValueError.
    """
    with open(path, "rb") as file, open_archive(file) as archive:
        members = archive.namelist()
        if names is not None:
            members = [f"{name}.npy" for name in names if f"{name}.npy" in members]
        return {member.removesuffix(".npy"): _array(archive, member) for member in members}


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    size = archive.getinfo(name).file_size
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{name} has an unknown version")
        shape, _, dtype = _HEADERS[version](member)
        claimed, size = math.prod(shape) * dtype.itemsize, size - member.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if min(shape, default=0) < 0 or claimed != size:
        raise ValueError(f"{name} claims {claimed} bytes, but has {size}")
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
