"""HDF5 files that survive being killed: space allocated first, and names as blocks of bytes.

The one place that knows how HDF5 behaves; `featurefile` and `records` say what is in their files.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import re
import threading
import uuid
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash

import protoprune
from protoprune import files
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import seals
from protoprune.files import leads_out
from protoprune.paths import STEP, Block, Paths, encoded
from protoprune.text import native

_LARGEST_ATTRIBUTE = 1 << 20  # bytes
_PIECE = 1 << 22  # bytes of names that are read at once
_HEAD = 1 << 20  # bytes of a file in which HDF5 puts the attributes that it is made with
_TRIES = 10  # to open a file whose name is taken by another one meanwhile
_OPEN: weakref.WeakSet[Reader] = (
    weakref.WeakSet()
)  # to all that a process opens of a file HDF5 shows what it read first
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Column:
    """What a dataset must be: its types, and its shape in dimensions that other datasets share ('n'), fixed ones (1024)
    and ones of its own ('*')."""

    types: tuple[str, ...]  # numpy's names
    shape: tuple[str | int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of file: the `format` and `format_version` attributes that mark it, what is in it, how to speak of it."""

    format: str
    version: int
    what: str  # 'feature file'
    command: str  # the command that makes one
    layout: Mapping[str, Column]
    attributes: tuple[str, ...]  # those that are always there

    @property
    def maker(self) -> str:
        """'protoprune embed'"""
        return " ".join(self.command.split()[:2])


class Reader:
    """A file of ours, open: what it says of itself is checked before it is believed or memory is taken for it.

    Attributes: path, file (h5py), data (name -> dataset), raw (the same file, plainly open), attributes (plain values),
    dims (name of a dimension -> size). By its seal (see `seals`) every byte is known to be what was written before it
    is used. Whatever is wrong is one ProtopruneError. All that is read is of the file that was there when it was
    opened, whatever takes its name later; what is written over it, as `cp` does, is refused.
    """

    def __init__(self, path: str, kind: Kind, mode: str = "r") -> None:
        self.path, self.kind = path, kind
        self.raw, self.seal, self.file = self._open(mode)
        self._close_raw = weakref.finalize(self, self.raw.close)  # some callers leave closing to garbage collection
        try:
            self._check_shared()
            with self.trouble("its attributes"):
                self.attributes = {name: _attribute(self.file, name) for name in self.file.attrs}
            for name in kind.attributes:
                if name not in self.attributes:
                    raise self._of_another_version(f"it has no attribute {name}")
            with self.trouble("its HDF5 structure"):
                self.dims = self._check_layout()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._close_raw()
        with contextlib.suppress(OSError, RuntimeError):
            self.file.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.raw.fileno()).st_size

    def mapped(self, name: str) -> np.ndarray:
        """A dataset as a memory map, unchecked: HDF5 is slow at single rows."""
        data = self.data[name]
        if not data.size:
            return np.empty(data.shape, data.dtype)
        with self.trouble(f"its {name}"):
            memory = mmap.mmap(self.raw.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(memory, data.dtype, data.size, data.id.get_offset()).reshape(data.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.data

    def whole(self, name: str) -> np.ndarray:
        """A dataset, checked."""
        with self.trouble(f"its {name}"):
            array = self.data[name][()]
        was = self.seal.digest(name)
        if was is not None and seals.digest(array) != was:
            raise self.damaged(f"its {name} is not what was written")
        return array

    def names(self, name: str) -> list[str]:
        """The names of a `block`."""
        names = os.fsdecode(self.whole(name).tobytes()).split("\0")
        if names.pop():
            raise self.damaged(f"its {name} is no list of names")
        return names

    def paths(self, name: str, count: int) -> Paths:
        """The ids of images, of which there must be `count`, checked now and read when they are asked for.

        One that is no path below a folder is refused: links and reads follow them. Where each row begins is known of
        every STEPth: names are read from the one before.
        """
        data, digest = self.data[name], xxhash.xxh3_64()
        places, seen, last, odd = [np.zeros(1, np.int64)], 0, b"\0", False
        for start in range(0, len(data), _PIECE):
            with self.trouble(f"its {name}"):
                piece = data[start : start + _PIECE]
            digest.update(piece)
            text = last + piece.tobytes()
            odd = odd or any(mark in text for mark in (b"\0\0", b"\0/", b".."))
            ends, last = np.flatnonzero(piece == 0), text[-1:]
            places.append(start + 1 + ends[-(seen + 1) % STEP :: STEP])
            seen += len(ends)
        was = self.seal.digest(name)
        if was is not None and digest.hexdigest() != was:
            raise self.damaged(f"its {name} is not what was written")
        if last != b"\0" or seen != count:
            raise self.damaged(f"its {name} is no list of {count:,} names")
        every, start = np.concatenate([*places, [len(data)]]), data.id.get_offset() or 0
        damaged = partial(_damaged, self.path, self.kind, f"its {name}")
        with self.trouble(f"its {name}"):
            handle = os.dup(self.raw.fileno())
        check = partial(_check_state, self.path, handle, self._state)
        paths = Paths(count, Block(handle, start, every, damaged, check).read)
        if odd and (outside := next(filter(leads_out, paths), None)) is not None:
            raise self.damaged(f"its {name} holds {outside!r}, which leads out of the folder of the images")
        return paths

    def within(self, name: str, low: int, high: int) -> np.ndarray:
        """A dataset of whole numbers from low to high - 1, checked."""
        array = self.whole(name)
        if array.size and not (low <= array.min() and array.max() < high):
            raise self.damaged(f"its {name} holds {array.min()} to {array.max()}, expected {low} to {high - 1}")
        return array

    def check_same(self) -> None:
        """ProtopruneError where the file was written over: a memory map of one that is shorter now ends the process."""
        _check_state(self.path, self.raw.fileno(), self._state)

    def check_sealed(self) -> None:
        """ProtopruneError unless every dataset with a digest in the seal is what was written."""
        for name in self.damaged_datasets():
            raise self.damaged(f"its {name} is not what was written")

    def damaged_datasets(self, only: Collection[str] | None = None) -> list[str]:
        """Names of the datasets, or of `only` some of them, that are not what the seal says."""
        return seals.damaged_datasets(self.raw, self.seal, only)

    def damaged(self, what: str, way_on: str = "") -> ProtopruneError:
        """The error that says what is damaged, and the way on."""
        if not self.raw.closed and _changed(self.raw.fileno(), self._state):
            return _written_over(self.path)
        return _damaged(self.path, self.kind, what, way_on)

    def _of_another_version(self, what: str) -> ProtopruneError:
        """The error for a file that is whole, as its seal says, and laid out in another way."""
        return _of_another_version(self.path, self.kind, f"{self.attributes.get('protoprune', '?')}: {what}")

    @contextlib.contextmanager
    def trouble(self, what: str) -> Iterator[None]:
        """Whatever h5py raises while it reads `what` becomes one line."""
        try:
            yield
        except ProtopruneError:
            raise
        except _TROUBLES as error:
            _refuse_now(self.path, error)
            if self.raw.closed:
                raise ProtopruneError(f"{self.path}: was closed, and is read no more; open it again") from None
            raise self.damaged(what) from None

    def _open(self, mode: str) -> tuple[BinaryIO, seals.Seal, h5py.File]:
        """(the file, its seal, the file in HDF5): one file, though another may take its name at this very moment."""
        for _ in range(_TRIES):
            self.raw = raw = _open_raw(self.path, self.kind)
            file = self._state = None
            try:
                with self.trouble("its HDF5 structure"):
                    if not self.path.endswith(".partial"):
                        self._state = _state(raw.fileno())
                    seal = seals.read(raw)
                    if seal is None:
                        raise _not_ours(self.path, self.kind)
                    file = _open_hdf5(self.path, mode, self.kind)
                    status = os.fstat(raw.fileno())
                    if os.path.samestat(status, os.fstat(file.id.get_vfd_handle())):
                        self._inode = status.st_dev, status.st_ino
                        return raw, seal, file
                file.close()
            except BaseException as error:
                raw.close()
                if file is not None:
                    file.close()
                if isinstance(error, seals.Damaged):
                    raise self.damaged(str(error)) from None
                raise
            raw.close()
        raise ProtopruneError(f"{self.path}: another file takes its place again and again; run it when that has ended")

    def _check_shared(self) -> None:
        """Raise ProtopruneError where HDF5 may show what was in the file before it was written over."""
        with _OPENING:
            others = [one for one in _OPEN if not one.raw.closed]
            _OPEN.add(self)
        for other in others:
            if other._state and other._inode == self._inode and other._state != self._state:
                raise ProtopruneError(
                    f"{self.path}: was written over while this program has it open; close it there (in a notebook, "
                    "restart the kernel), then open it again"
                )

    def _check_layout(self) -> dict[str, int]:
        """The dimensions; ProtopruneError where datasets do not agree with each other or with the file's size."""
        size = self.size
        dims: dict[str, int] = {}
        self.data = {name: self.file[name] for name in self.file}  # looking one up takes longer than reading it
        for name in sorted({*self.kind.layout, *self.data}):
            column = self.kind.layout.get(name)
            if name not in self.data:
                if column is not None and not column.optional:
                    raise self._of_another_version(f"it has no {name}")
                continue
            dataset = self.data[name]
            if not isinstance(dataset, h5py.Dataset):
                raise self.damaged(f"its {name} is not a dataset")
            _check_stored(self, name, dataset, size)
            if column is not None and not _fits(dataset, column, dims):
                raise self.damaged(f"its {name} is {dataset.dtype} of shape {dataset.shape}")
        return dims


# What h5py raises over damaged files, by where it stumbles.
_TROUBLES = (
    OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError, ArithmeticError,
    SystemError,
)  # fmt: skip


# Errors of the machine, or of a file system on another one: they say nothing of what is in the file.
_NOW = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
_ERRNO = re.compile(r"errno = (\d+)")  # in what HDF5 says


def _refuse_now(path: str, error: BaseException) -> None:
    """Raise ProtopruneError where it is not the file that is to blame."""
    said = _ERRNO.search(str(error))
    number = int(said[1]) if said else error.errno if isinstance(error, OSError) else None
    if number in _NOW:
        ways = "raise `ulimit -n`" if number in (errno.EMFILE, errno.ENFILE) else "run it again"
        raise ProtopruneError(f"{path}: cannot be read now ({os.strerror(number)}); {ways}") from None


def _state(handle: int) -> tuple[int, int]:
    """What changes when a file is written over."""
    status = os.fstat(handle)
    return status.st_mtime_ns, status.st_size


def _changed(handle: int, state: tuple[int, int] | None) -> bool:
    return state is not None and _state(handle) != state


def _check_state(path: str, handle: int, state: tuple[int, int] | None) -> None:
    if _changed(handle, state):
        raise _written_over(path)


def _written_over(path: str) -> ProtopruneError:
    return ProtopruneError(f"{path}: was written over since it was opened; open it again")


def _damaged(path: str, kind: Kind, what: str, way_on: str = "") -> ProtopruneError:
    if path.endswith(".partial"):
        return ProtopruneError(f"{path}: a damaged unfinished run ({what}); delete it and run `{kind.maker}` again")
    way_on = way_on or f"take a copy that is whole, or run `{kind.maker}` again with --overwrite"
    return ProtopruneError(f"{path}: damaged ({what}); {way_on}")


def _of_another_version(path: str, kind: Kind, which: str) -> ProtopruneError:
    if path.endswith(".partial"):
        return ProtopruneError(
            f"{path}: an unfinished run of another version of protoprune ({which}); finish it with that version, or "
            f"delete it and run `{kind.maker}` again"
        )
    return ProtopruneError(
        f"{path}: a {kind.what} of another version of protoprune ({which}), which is not read here; run `{kind.maker}` "
        "again with --overwrite, or with another -o"
    )


def _attribute(file: h5py.File, name: str) -> Any:
    identity = h5py.h5a.open(file.id, name.encode())
    if identity.shape not in ((), None) or identity.get_storage_size() > _LARGEST_ATTRIBUTE:
        raise ValueError("an attribute of this size is none of ours")
    return plain(file.attrs[name])


def _check_stored(reader: Reader, name: str, dataset: h5py.Dataset, size: int) -> None:
    """Raise ProtopruneError unless all of the dataset lies in the file, as it is in memory."""
    plist = dataset.id.get_create_plist()
    if dataset.dtype.kind not in "iufS":
        raise reader.damaged(f"its {name} is of type {dataset.dtype}")
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        raise reader.damaged(f"its {name} is not stored as one piece; `h5repack -f NONE -l CONTI` may mend that")
    need = math.prod(dataset.shape) * dataset.dtype.itemsize
    offset = dataset.id.get_offset()
    if need and (offset is None or dataset.id.get_storage_size() != need or offset + need > size):
        raise reader.damaged(f"its {name} of shape {dataset.shape} does not fit into a file of {size:,} bytes")


def _fits(dataset: h5py.Dataset, column: Column, dims: dict[str, int]) -> bool:
    """Whether type and shape are as they must be; notes the dimensions that it is the first to have."""
    if dataset.dtype.name not in column.types and dataset.dtype.str not in column.types:
        return False
    if len(dataset.shape) != len(column.shape):
        return False
    for here, length in zip(column.shape, dataset.shape, strict=True):
        if here != "*" and (dims.setdefault(here, length) if isinstance(here, str) else here) != length:
            return False
    return True


def _open_raw(path: str, kind: Kind) -> BinaryIO:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # opening it may never end
        raise UsageError(f"{path}: a pipe or a device, which can be read only once; give a {kind.what}")
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # no file can have a NUL in its name
        _refuse_now(path, error)
        if not os.path.exists(path):
            raise UsageError(f"{path}: no such {kind.what}; make one with `{kind.command} -o {path}`") from None
        if os.path.isdir(path):
            raise ProtopruneError(f"{path}: a folder, not a {kind.what}; `{kind.command}` makes one") from None
        raise _not_opened(path, kind, error) from None


def _not_ours(path: str, kind: Kind) -> ProtopruneError:
    """The error for a file without a seal, of which HDF5 is not asked: damaged, it may never answer."""
    with open(path, "rb") as file:
        if file.read(len(seals.SIGNATURE)) != seals.SIGNATURE:
            return _not_opened(path, kind)
    if _before_seals(path, kind):
        return _of_another_version(path, kind, "it has no seal")
    if path.endswith(".partial"):
        return _damaged(path, kind, "it has no seal")
    return ProtopruneError(
        f"{path}: an HDF5 file, but not a {kind.what} as `{kind.maker}` writes it (it has no seal); run that with "
        "another -o"
    )


def _before_seals(path: str, kind: Kind) -> bool:
    """Whether a file is of a version that had no seals, by its attributes, which HDF5 has among its first bytes."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return head.startswith(seals.SIGNATURE) and kind.format.encode() in head


def _not_opened(path: str, kind: Kind, error: Exception | None = None) -> ProtopruneError:
    if isinstance(error, PermissionError) or "ermission" in str(error):
        return ProtopruneError(f"{path}: permission denied")
    if path.endswith(".partial"):
        return _damaged(path, kind, "not a readable HDF5 file")
    return ProtopruneError(f"{path}: not a readable HDF5 file; give a file that `{kind.maker}` wrote")


def _open_hdf5(path: str, mode: str, kind: Kind) -> h5py.File:
    """A file that has a seal, if it can be read and is of this kind; else ProtopruneError."""
    try:
        file = h5py.File(path, mode, locking="best-effort")  # some network file systems have no locks
    except OSError as error:
        _refuse_now(path, error)
        if "unable to lock" in str(error):
            raise ProtopruneError(f"{path}: being written by another process; wait for it to end") from None
        raise _not_opened(path, kind, error) from None
    try:
        format, version = _attribute(file, "format"), _attribute(file, "format_version")
    except _TROUBLES as error:
        _refuse_now(path, error)
        format = version = None
    if format != kind.format:
        file.close()
        raise ProtopruneError(f"{path}: an HDF5 file, but not a {kind.what} of `{kind.maker}`")
    if version != kind.version:
        file.close()
        raise ProtopruneError(f"{path}: {kind.what} version {version}, this program reads {kind.version}; upgrade it")
    return file


def create(path: str, kind: Kind) -> h5py.File:
    """A new file that is marked with its kind, a uuid, the date and our version; `seal` it when it is laid out."""
    file = h5py.File(path, "w", userblock_size=seals.BLOCK, libver=("earliest", "v110"), locking="best-effort")
    file.attrs["format"], file.attrs["format_version"] = kind.format, kind.version
    file.attrs["uuid"] = uuid.uuid4().hex
    file.attrs["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    file.attrs["protoprune"] = protoprune.__version__
    return file


def seal(path: str, kind: Kind, changing: Collection[str]) -> None:
    """Seal a new file that is laid out; the datasets in `changing` are still to be written."""
    with h5py.File(path, "r") as file:
        extents = {name: (data.id.get_offset() or 0, data.id.get_storage_size()) for name, data in file.items()}
    seals.make(path, kind.format, extents, [name for name in extents if name not in changing])


def partial_path(out: str) -> str:
    """What a file is called as long as a run fills it."""
    return files.target(out) + ".partial"


def there(path: str) -> str:
    """A file, or the unfinished one of this name where there is only that."""
    return path if os.path.exists(path) or not os.path.exists(partial_path(path)) else partial_path(path)


def finish(out: str, but: Collection[str]) -> None:
    """Give a finished file, which is closed, its name; `but`: the datasets that have digests of their own."""
    partial = partial_path(out)
    with files.told(partial):
        seals.complete(partial, but)
    files.publish(partial, out)


def check_replaceable(path: str, kind: Kind) -> None:
    """Raise UsageError for a file that --overwrite would destroy by mistake: neither of this kind nor a damaged one."""
    ours = seals.format_of(path) in (kind.format, "") or _before_seals(path, kind)
    if not ours and os.path.getsize(path):
        raise UsageError(f"{path}: not a {kind.what}, and --overwrite replaces nothing else; choose another -o")


def dataset(
    file: h5py.File,
    name: str,
    data: np.ndarray | None = None,
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype | type | str | None = None,
) -> None:
    """A contiguous dataset whose space exists from the start; without data it is left as the file system's zeros."""
    shape, dtype = (data.shape, data.dtype) if data is not None else (shape or (), dtype)
    if 0 in shape:  # h5py stores an empty array without space
        file.create_dataset(name, shape, dtype)
        return
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, dcpl=options)
    if data is not None:
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(data))


def block(names: Sequence[str]) -> np.ndarray:
    """Names as one array of bytes, each followed by a NUL byte."""
    parts = (b"\0".join([*part, b""]) for part in encoded(names, np.arange(len(names))))
    return np.frombuffer(b"".join(parts), np.uint8)


def text(value: str) -> str | np.void:
    """A path as an attribute: text where it is valid UTF-8, raw bytes otherwise."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return np.void(os.fsencode(value))


def plain(value: Any) -> Any:
    """An attribute as a plain Python value."""
    if isinstance(value, np.void):
        return os.fsdecode(value.tobytes())
    if isinstance(value, str):
        return native(value)
    return value.item() if isinstance(value, np.generic) else value
