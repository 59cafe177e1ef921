"""HDF5 files that survive being killed: space allocated first, and names as blocks of bytes.

The one place that knows how HDF5 behaves; `features` and `records` say what is in their files.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import h5py
import numpy as np

import protoprune
from protoprune.errors import ProtopruneError, UsageError


@dataclass(frozen=True)
class Kind:
    """A kind of file: the `format` and `format_version` attributes that mark it, and how to speak of it."""

    format: str
    version: int
    what: str  # 'feature file'
    command: str  # the command that makes one


def open_file(path: str, mode: str, kind: Kind) -> h5py.File:
    """The file, if it is there, can be read and is of this kind; else ProtopruneError."""
    if not os.path.exists(path):
        raise ProtopruneError(f"{path}: no such {kind.what}; make one with `{kind.command} -o {path}`")
    try:
        file = h5py.File(path, mode, locking="best-effort")  # some network file systems have no locks
    except OSError as error:
        if isinstance(error, PermissionError) or "ermission" in str(error):
            raise ProtopruneError(f"{path}: permission denied") from None
        if "unable to lock" in str(error):  # not merely "lock": a truncated file's message names its superblock
            raise ProtopruneError(f"{path}: being written by another process; wait for it to end") from None
        maker = " ".join(kind.command.split()[:2])
        if path.endswith(".partial"):
            raise ProtopruneError(f"{path}: a damaged unfinished run; delete it and run `{maker}` again") from None
        raise ProtopruneError(f"{path}: not a readable HDF5 file; give a file that `{maker}` wrote") from None
    if plain(file.attrs.get("format")) != kind.format:
        file.close()
        maker = " ".join(kind.command.split()[:2])
        raise ProtopruneError(f"{path}: an HDF5 file, but not a {kind.what} of `{maker}`")
    if file.attrs["format_version"] != kind.version:
        version = file.attrs["format_version"]
        file.close()
        raise ProtopruneError(f"{path}: {kind.what} version {version}, this program reads {kind.version}; upgrade it")
    return file


def create(path: str, kind: Kind) -> h5py.File:
    """A new file that is marked with its kind, a uuid, the date and our version."""
    file = h5py.File(path, "w", locking="best-effort")
    file.attrs["format"], file.attrs["format_version"] = kind.format, kind.version
    file.attrs["uuid"] = uuid.uuid4().hex
    file.attrs["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    file.attrs["protoprune"] = protoprune.__version__
    return file


def check_replaceable(path: str, kind: Kind) -> None:
    """Raise UsageError for a file that --overwrite would destroy by mistake: neither of this kind nor a damaged one."""
    with open(path, "rb") as file:
        good = file.read(8) in (b"", b"\x89HDF\r\n\x1a\n")
    with contextlib.suppress(OSError), h5py.File(path, "r", locking="best-effort") as file:
        good = plain(file.attrs.get("format")) == kind.format
    if not good:
        raise UsageError(f"{path}: not a {kind.what}, and --overwrite replaces nothing else; choose another -o")


def dataset(file: h5py.File, name: str, data: np.ndarray | None = None, shape=None, dtype=None) -> None:
    """A contiguous dataset whose space exists from the start; without data it is left as the file system's zeros."""
    shape, dtype = (data.shape, data.dtype) if data is not None else (shape, dtype)
    if 0 in shape:  # h5py stores an empty array without space
        file.create_dataset(name, shape, dtype)
        return
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, dcpl=options)
    if data is not None:
        file[name][...] = data


def block(names: list[str]) -> np.ndarray:
    """Names as one array of bytes, each followed by a NUL byte."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def split(dataset: h5py.Dataset) -> list[str]:
    """The names of a `block`."""
    return os.fsdecode(dataset[:].tobytes()).split("\0")[:-1]


def text(value: str) -> str | np.void:
    """A path as an attribute: text where it is valid UTF-8, raw bytes otherwise."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return np.void(os.fsencode(value))


def plain(value):
    """An attribute as a plain Python value."""
    if isinstance(value, np.void):
        return os.fsdecode(value.tobytes())
    return value.item() if isinstance(value, np.generic) else value
