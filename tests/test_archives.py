"""npz files and checkpoints: each kind of damage is one line, and nothing else comes out."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from mltools import checkpoints
from mltools.archives import read_arrays
from mltools.errors import UserError

ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.uint8)}
BODY = ARRAYS["a"].tobytes()
CONTENT = {"epoch": 3, "model": {"w": torch.arange(6.0).view(2, 3)}, "random": torch.arange(4)}
REQUIRED = {"epoch": int, "model": dict}


def npz(save=np.savez):
    file = io.BytesIO()
    save(file, **ARRAYS)
    return file.getvalue()


def checkpoint(content=CONTENT):
    file = io.BytesIO()
    checkpoints.save(file, content)
    return file.getvalue()


def rebuilt(data, change=lambda name, content: [(name, content)], compression=zipfile.ZIP_STORED):
    """An archive with other members, all checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for member in old.namelist():
            for name, content in change(member, old.read(member)):
                new.writestr(name, content)
    return out.getvalue()


def flagged(data, offset, value):
    """All members with a 16-bit field of their headers changed; offsets as in a local header."""
    data = bytearray(data)
    for sign, more in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        at = data.find(sign)
        while at >= 0:
            struct.pack_into("<H", data, at + offset + more, value)
            at = data.find(sign, at + 4)
    return bytes(data)


def doubled(name, content):
    return [(name, content), (name, content)]


def flipped(data):
    """One bit of the content of the first member."""
    name, extra = struct.unpack_from("<HH", data, 26)
    at = 30 + name + extra + 10
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


COMMON = {
    "empty": lambda data: b"",
    "text": lambda data: b"<html>not found</html>",
    "pickle": lambda data: pickle.dumps(CONTENT),
    "truncated": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "bytes behind": lambda data: data + b"more",
    "an archive behind": lambda data: data + data,
    "an empty archive behind": lambda data: data + b"PK\x05\x06" + bytes(18),
    "bytes in front": lambda data: b"more" + data,
    "comment": lambda data: data[:-2] + b"\x04\x00more",
    "encrypted": lambda data: flagged(data, 6, 0x801),
    "unknown compression": lambda data: flagged(data, 8, 97),
    "twice": lambda data: rebuilt(data, doubled),
    "a flipped bit": flipped,
}


def npy(shape, descr="<f4", body=BODY, version=(1, 0)):
    """An npz whose `a` has this header, as it stands, and this body."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    start = b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header))

    def change(name, content):
        return [(name, start + header + body if name == "a.npy" else content)]

    return lambda data: rebuilt(data, change)


ARRAY_ONLY = {
    "a bare array": lambda data: zipfile.ZipFile(io.BytesIO(data)).read("a.npy"),
    "a giant": npy("(1000000000000, 1000)"),
    "a giant that overflows": npy("(4611686018427387904, 4)"),
    "fewer than there are": npy("(3, 3)"),
    "negative": npy("(-3, -4)"),
    "no shape": npy("'x'"),
    "no header": npy("(3, 4), ("),
    "deep header": npy("(" * 3000 + ")" * 3000),
    "Python objects": npy("(3, 4)", "|O"),
    "no type": npy("(3, 4)", "nonsense"),
    "version": npy("(3, 4)", version=(9, 0)),
}


def forged(data):
    """A checkpoint that claims more numbers than it has."""
    return rebuilt(data, lambda name, content: [(name, content.replace(b"K\x06t", b"M\xff\xfft"))])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def harmful(data):
    def change(name, content):
        return [(name, pickle.dumps(Harmful(), 2) if name.endswith("data.pkl") else content)]

    return rebuilt(data, change)


CHECKPOINT_ONLY = {
    "compressed": lambda data: rebuilt(data, compression=zipfile.ZIP_DEFLATED),
    "more numbers than there are": forged,
    "something to execute": harmful,
    "arrays": lambda data: npz(),
    "a tensor": lambda data: checkpoint(torch.arange(3)),
    "a list": lambda data: checkpoint([CONTENT]),
    "a key less": lambda data: checkpoint({"epoch": 3}),
    "a wrong type": lambda data: checkpoint({**CONTENT, "epoch": "3"}),
    "a boolean": lambda data: checkpoint({**CONTENT, "epoch": True}),
    "without checksums": lambda data: unchecked(),
}


def unchecked():
    file = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, file)
    finally:
        torch.serialization.set_crc32_options(True)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    (tmp_path / "x.npz").write_bytes(npz(save))
    found = read_arrays(tmp_path / "x.npz")
    assert list(found) == ["a", "b"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert list(read_arrays(tmp_path / "x.npz", ("b", "c"))) == ["b"]


def test_a_checkpoint_comes_back_whatever_the_process_has_set(tmp_path):
    path = tmp_path / "x.pt"
    assert checkpoints.load(path, REQUIRED) is None
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(checkpoint())
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    found = checkpoints.load(path, REQUIRED)
    assert list(found) == list(CONTENT) and found["epoch"] == 3
    assert torch.equal(found["model"]["w"], CONTENT["model"]["w"])
    assert torch.equal(found["random"], CONTENT["random"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("spoil", (COMMON | ARRAY_ONLY).values(), ids=COMMON | ARRAY_ONLY)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_spoilt_arrays_raise(tmp_path, save, spoil):
    (tmp_path / "x.npz").write_bytes(spoil(npz(save)))
    with pytest.raises(Exception) as error:
        read_arrays(tmp_path / "x.npz")
    assert not isinstance(error.value, MemoryError)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("spoil", (COMMON | CHECKPOINT_ONLY).values(), ids=COMMON | CHECKPOINT_ONLY)
def test_a_spoilt_checkpoint_is_one_line(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    path.write_bytes(spoil(checkpoint()))
    with pytest.raises(UserError, match="x.pt cannot be read .*: move its folder away") as error:
        checkpoints.load(path, REQUIRED)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_checkpoint_that_is_a_folder_or_below_a_file_is_one_line(tmp_path):
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(UserError, match="x.pt cannot be read .Is a directory.*"):
        checkpoints.load(tmp_path / "x.pt", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read .Not a directory.*"):
        checkpoints.load(tmp_path / "file" / "x.pt", {})


def test_compressed_data_that_never_ends_is_not_unpacked(tmp_path):
    data = rebuilt(npz(), lambda name, content: [(name, content + bytes(10**7))],
                   zipfile.ZIP_DEFLATED)  # fmt: skip
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match="a.npy claims 48 bytes, but has 10000048"):
        read_arrays(tmp_path / "x.npz")
