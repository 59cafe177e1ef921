"""numpy's files, read with nothing believed: .npy and .npz raise one kind of error whatever is wrong with them.

numpy itself takes memory for the shape that a damaged header names, and lets errors of a dozen kinds through.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from protoprune.units import bytes_text
from protoprune.unpacking import memory_share, read_member

_PICKLED = "it holds pickled Python objects, which are never read, since that can run code; save numbers"
_HEADER = 20_000  # bytes, of which the header of an array is some hundred; numpy itself takes no more than 10,000


def load_npy(source: bytes | str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file or of its bytes. Raises ValueError for anything but a whole array of plain values."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    file = io.BytesIO(data)
    try:
        shape, dtype = _header(file)
        if min(shape, default=0) >= 0:
            need, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
            if need > there:
                raise ValueError(f"cut short: {there:,} of {need:,} bytes")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # SyntaxError, TokenError, UnicodeDecodeError, MemoryError, …
        raise ValueError(reason(error)) from None


def load_npz(source: bytes | str | os.PathLike[str], names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file or of its bytes (those of `names`), whose checksums agree. Raises ValueError for
    anything else, and for more than half of the free memory."""
    with _members(source) as (archive, members):
        wanted = {name: one for name, one in members.items() if names is None or name in names}
        total, most = sum(one.file_size for one in wanted.values()), memory_share(2)
        if total > most:
            raise ValueError(f"unpacks to {bytes_text(total)}, more than half of the free memory; save arrays as .npy")
        data = {name: read_member(archive, one) for name, one in wanted.items()}  # checks the checksums
    return {name: load_npy(one) for name, one in data.items()}


def npz_headers(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, type) of each array of a .npz file, by name, from their headers. Raises ValueError."""
    with _members(path) as (archive, members):
        return {name: _header(io.BytesIO(read_member(archive, one, _HEADER))) for name, one in members.items()}


@contextlib.contextmanager
def _members(
    source: bytes | str | os.PathLike[str],
) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """A .npz file and its arrays by name. Whatever goes wrong within, too, is a ValueError."""
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
            zipfile.ZipFile(file) as archive,
        ):
            every = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
            yield archive, {name: one for name, one in every.items() if read_member(archive, one, 6) == b"\x93NUMPY"}
    except OSError:
        raise
    except Exception as error:  # BadZipFile, RuntimeError (encrypted), NotImplementedError, zlib.error, …
        raise ValueError(reason(error)) from None


def map_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file as a memory map. Raises ValueError as `load_npy` does."""
    try:
        with open(path, "rb") as file:
            _header(file)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise ValueError(reason(error)) from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of an array, from its header; the file is then at the array. Raises whatever numpy does."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(_PICKLED)
    return shape, dtype


def reason(error: Exception) -> str:
    """What numpy or zipfile said, as a few words on one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "allow_pickle" in reason:  # numpy's advice
        return _PICKLED
    return reason if len(reason) <= 120 else reason[:120] + "…"  # zipfile shows the bytes that it found
