"""numpy's files, read with nothing believed: .npy and .npz raise one kind of error whatever is wrong with them.

numpy itself takes memory for the shape that a damaged header names, and lets errors of a dozen kinds through.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

_PICKLED = "it holds pickled Python objects, which are never read, since that can run code; save numbers"
_DEFLATE = 1100  # what deflate makes of a byte at most is 1032 bytes


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


def load_npz(source: bytes | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a .npz file or of its bytes, whose checksums agree. Raises ValueError for anything else."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(one.file_size for one in archive.infolist()) > _DEFLATE * len(data):
                raise ValueError("it claims to hold more than it can")
            members = {one.filename: archive.read(one) for one in archive.infolist()}  # checks the checksums
    except Exception as error:  # BadZipFile, RuntimeError (encrypted), NotImplementedError, zlib.error, …
        raise ValueError(reason(error)) from None
    return {
        name.removesuffix(".npy"): load_npy(data) for name, data in members.items() if data.startswith(b"\x93NUMPY")
    }


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
