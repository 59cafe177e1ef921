"""The feature file: one HDF5 file with a row per image, readable with plain h5py.

Layout (format version 1; n images, d dimensions; every dataset contiguous and allocated when the file is created):

    path       uint8   the n ids, each followed by a NUL byte, as the bytes that the file system has
    size       int64   (n,) bytes        mtime_ns  int64 (n,)      as listed; with the path they identify an image
    label      int32   (n,) index into classes, -1 for none
    classes    uint8   class names, each followed by a NUL byte
    features   float16 or float32 (n, d), not normalised; zero where status is not 1
    status     uint8   (n,) 0 pending, 1 ok, others failed: see `decode.Status`
    reason     uint16  (n,) index into reasons
    reasons    S160    (1024,) distinct failure messages, the first one empty
    borrowed   uint8   (n,) 1 where the row was copied from an earlier file
    committed  int64   (1,) how many of the rows with borrowed == 0, in order, are finished

Provenance is in the attributes. While a run is under way the same file is called `<name>.partial`. A batch is written
as data, flush, `committed`, flush: of the orders measured this is the one that survived every kill -9, since after
creation no HDF5 metadata changes. The finished file appears by rename and is never modified.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import h5py
import numpy as np

import protoprune
from protoprune.decode import TRANSIENT, Status
from protoprune.errors import ProtopruneError
from protoprune.images import ImageList

FORMAT = "protoprune-features"
FORMAT_VERSION = 1
# What must agree for two rows of features to be comparable (with path, size and mtime: the cache key of a row).
KEY = ("encoder", "weights_sha256", "preprocess", "precision", "store")
_REASON_SLOTS, _REASON_WIDTH = 1024, 160
_COPY_ROWS = 65_536


class FeatureFile:
    """A finished feature file, opened for reading; a context manager.

    Attributes: path, n, dim, features (h5py dataset, (n, d)), provenance (dict of plain values).
    Arrays are read when first used. Raises ProtopruneError when the file is missing, damaged or something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = _open(self.path, "r")
        self.features = self._file["features"]
        self.n, self.dim = self.features.shape
        self.provenance = {name: _plain(value) for name, value in self._file.attrs.items()}

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def paths(self) -> list[str]:
        """The n ids (surrogateescape where a name is not UTF-8), in row order."""
        return _split(self._file["path"])

    @property
    def classes(self) -> list[str]:
        return _split(self._file["classes"])

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32, -1 where there is no class."""
        return self._file["label"][:]

    @property
    def status(self) -> np.ndarray:
        """(n,) uint8, values of `decode.Status`."""
        return self._file["status"][:]

    @property
    def usable(self) -> np.ndarray:
        """(n,) bool: the rows that have features."""
        return self.status == Status.OK

    @property
    def size(self) -> np.ndarray:
        return self._file["size"][:]

    @property
    def mtime_ns(self) -> np.ndarray:
        return self._file["mtime_ns"][:]

    def failures(self) -> list[tuple[str, Status, str]]:
        """(id, status, reason) of every image that has no features."""
        status, paths = self.status, self.paths
        reason, reasons = self._file["reason"][:], self._file["reasons"][:]
        return [
            (paths[row], Status(status[row]), reasons[reason[row]].decode())
            for row in np.flatnonzero((status != Status.OK) & (status != Status.PENDING))
        ]

    def failure_counts(self) -> Counter:
        """Status label -> number of images."""
        values, counts = np.unique(self.status, return_counts=True)
        return Counter({Status(v).label: int(c) for v, c in zip(values, counts, strict=True) if v > Status.OK})

    @property
    def unreadable_folders(self) -> list[list[str]]:
        """[folder, reason] of the first 100 folders that could not be listed."""
        return json.loads(self.provenance.get("unreadable_folders", "[]"))

    def finished(self) -> np.ndarray:
        """(n,) bool: rows whose result is in the file; all of them unless this is a partial file."""
        return _finished(self._file)


class PartialFile:
    """The file of a run under way: which rows are left, committing a batch, and the rename at the end."""

    def __init__(self, out: str):
        self.out = out
        self._file = _open(partial_path(out), "r+")
        self._committed = self._file["committed"]
        self.done = int(self._committed[0])
        self.n, self.dtype = self._file["features"].shape[0], self._file["features"].dtype
        todo = np.flatnonzero(self._file["borrowed"][:] == 0)
        self.todo, self.borrowed = todo[self.done :], self.n - len(todo)
        self._reasons = {text.decode(): i for i, text in enumerate(self._file["reasons"][:]) if i == 0 or text}

    def commit(self, rows: np.ndarray, features: np.ndarray, status: np.ndarray, reasons: Sequence[str]) -> None:
        """Write the next rows of `todo`: features (b, d), status (b,) and one reason a row ('' when ok)."""
        number = np.array([self._reason_number(text) for text in reasons], np.uint16)
        try:
            for first, last in _runs(rows):
                span = slice(rows[first], rows[last] + 1)
                self._file["features"][span] = features[first : last + 1]
                self._file["reason"][span] = number[first : last + 1]
                self._file["status"][span] = status[first : last + 1]
            self._file.flush()
            self.done += len(rows)
            self._committed[0] = self.done
            self._file.flush()
        except OSError as error:
            raise ProtopruneError(_disk_trouble(partial_path(self.out), error)) from None

    def _reason_number(self, text: str) -> int:
        stored = text.encode("ascii", "backslashreplace")[:_REASON_WIDTH].decode()
        if stored not in self._reasons:
            if len(self._reasons) == _REASON_SLOTS:
                return 0  # the status still says what happened
            self._reasons[stored] = len(self._reasons)
            self._file["reasons"][self._reasons[stored]] = stored.encode()
        return self._reasons[stored]

    def finish(self) -> None:
        """Give the finished file its name. Everything is on the disk before the rename."""
        assert self.done == self.n - self.borrowed, "finish() before the last commit"
        self.close()
        _sync(partial_path(self.out))
        os.replace(partial_path(self.out), self.out)
        _sync(os.path.dirname(os.path.abspath(self.out)))

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # after a full disk HDF5 cannot even close cleanly
            self._file.close()


def partial_path(out: str) -> str:
    return out + ".partial"


def create_partial(out: str, images: ImageList, dim: int, provenance: dict, sources: Sequence[FeatureFile]) -> None:
    """Create `<out>.partial` for these images, with the rows that `sources` already have copied from them.

    Its space is reserved at once, so a disk that is too small is found out before the first image is decoded.
    Nothing appears under the final name, and killing this leaves an ignored `.partial.new` only.
    """
    path = partial_path(out) + ".new"
    try:
        # Once without HDF5, which cannot recover when the disk fills under it, and once for the file as it is.
        _reserve(path, "wb", _estimated_size(images, dim, np.dtype(provenance["store"])))
        with h5py.File(path, "w") as file:
            _allocate(file, images, dim, provenance)
        _reserve(path, "r+b", os.path.getsize(path))
        with h5py.File(path, "r+") as file:
            borrow_from = _match_rows(images, sources)
            for source, rows in zip(sources, borrow_from, strict=True):
                _borrow(file, source, rows)
        _sync(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise ProtopruneError(_disk_trouble(path, error)) from None
    os.replace(path, partial_path(out))


def _estimated_size(images: ImageList, dim: int, store: np.dtype) -> int:
    """Bytes of the file: what _allocate makes of these images, and a little for HDF5's own use."""
    columns = 8 + 8 + 4 + 1 + 2 + 1  # size, mtime, label, status, reason, borrowed
    names = sum(len(path) for path in images.paths) + len(images)
    return len(images) * (dim * store.itemsize + columns) + names + _REASON_SLOTS * _REASON_WIDTH + 16_384


def _reserve(path: str, mode: str, size: int) -> None:
    with open(path, mode) as file:
        if not hasattr(os, "posix_fallocate"):  # macOS: there a full disk is found out while writing
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise  # any other error: a file system that reserves nothing


def _allocate(file: h5py.File, images: ImageList, dim: int, provenance: dict) -> None:
    n = len(images)
    file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
    file.attrs["uuid"] = uuid.uuid4().hex
    file.attrs["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    file.attrs["protoprune"] = protoprune.__version__
    file.attrs["root"] = _text(images.root)
    file.attrs["unreadable_folder_count"] = len(images.unreadable_folders)
    file.attrs["unreadable_folders"] = json.dumps(images.unreadable_folders[:100])
    for name, value in provenance.items():
        file.attrs[name] = value
    _dataset(file, "path", data=_block(images.paths))
    _dataset(file, "size", data=images.size)
    _dataset(file, "mtime_ns", data=images.mtime_ns)
    _dataset(file, "label", data=images.labels)
    _dataset(file, "classes", data=_block(images.classes))
    _dataset(file, "status", np.zeros(n, np.uint8))
    _dataset(file, "reason", np.zeros(n, np.uint16))
    _dataset(file, "reasons", np.zeros(_REASON_SLOTS, f"S{_REASON_WIDTH}"))
    _dataset(file, "borrowed", np.zeros(n, np.uint8))
    _dataset(file, "committed", np.zeros(1, np.int64))
    _dataset(file, "features", shape=(n, dim), dtype=np.dtype(provenance["store"]))


def _dataset(file: h5py.File, name: str, data: np.ndarray | None = None, shape=None, dtype=None) -> None:
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


def _match_rows(images: ImageList, sources: Sequence[FeatureFile]) -> list[np.ndarray]:
    """For each source an (n,) array: which of its rows holds image i unchanged, -1 for none; the first source wins."""
    taken = np.zeros(len(images), bool)
    matches = []
    for source in sources:
        good = source.finished() & ~np.isin(source.status, TRANSIENT)
        row_of = {path: row for row, path in enumerate(source.paths)}
        rows = np.array([row_of.get(path, -1) for path in images.paths], np.int64)
        same = (rows >= 0) & good[rows] & (source.size[rows] == images.size)
        same &= (source.mtime_ns[rows] == images.mtime_ns) & (images.mtime_ns >= 0) & ~taken
        taken |= same
        matches.append(np.where(same, rows, -1))
    return matches


def _borrow(file: h5py.File, source: FeatureFile, rows: np.ndarray) -> None:
    """Copy features, status and reason of the matched rows and mark them as borrowed."""
    status, reason = source._file["status"][:], source._file["reason"][:]
    table = file["reasons"][:]
    slot = {text: i for i, text in enumerate(table) if i == 0 or text}
    for text in source._file["reasons"][:]:
        if text and text not in slot and len(slot) < _REASON_SLOTS:
            slot[text] = len(slot)
            table[slot[text]] = text
    file["reasons"][...] = table
    number = np.array([slot.get(text, 0) for text in source._file["reasons"][:]], np.uint16)
    here = np.flatnonzero(rows >= 0)
    there = rows[here]  # ascending, since both files are sorted by id
    for start in range(0, source.n, _COPY_ROWS):
        low, high = np.searchsorted(there, (start, start + _COPY_ROWS))
        if low == high:
            continue
        theirs, ours = there[low:high], here[low:high]
        features = source.features[theirs[0] : theirs[-1] + 1][theirs - theirs[0]]
        for first, last in _runs(ours):
            span = slice(ours[first], ours[last] + 1)
            file["features"][span] = features[first : last + 1]
            file["status"][span] = status[theirs[first : last + 1]]
            file["reason"][span] = number[reason[theirs[first : last + 1]]]
            file["borrowed"][span] = 1


def covers(file: FeatureFile, images: ImageList) -> bool:
    """Whether the file, finished or not, is for exactly these images, unchanged and in the same place."""
    return (
        file.n == len(images)
        and file.provenance["root"] == images.root
        and np.array_equal(file.size, images.size)
        and np.array_equal(file.mtime_ns, images.mtime_ns)
        and np.array_equal(file.labels, images.labels)
        and file.paths == images.paths
        and file.classes == images.classes
    )


def key_differences(provenance: dict, wanted: dict) -> list[str]:
    """'encoder: dino_vits16, not mini' for everything in KEY that differs between a file and a request."""
    return [
        f"{name.replace('_', ' ')}: {_shorten(provenance.get(name))}, not {_shorten(wanted[name])}"
        for name in KEY
        if provenance.get(name) != wanted[name]
    ]


@contextlib.contextmanager
def lock(out: str) -> Iterator[None]:
    """Hold `<out>.lock` while writing; a second process is refused at once. The lock dies with its process."""
    import fcntl

    path = out + ".lock"
    try:
        file = _locked(path, fcntl)
    except BlockingIOError:
        with contextlib.suppress(OSError), open(path) as holder:
            who = holder.read().strip()
        raise ProtopruneError(f"{out}: another protoprune is writing it ({who or path}); wait for it to end") from None
    except OSError as error:
        raise ProtopruneError(f"{path}: {error.strerror}; choose an output in a folder that can be written") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()


def _locked(path: str, fcntl):
    while True:
        file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}")
                file.flush()
                return file
        except OSError:
            file.close()
            raise
        file.close()  # its holder removed it between our open and our flock: this lock guards nothing


def _open(path: str, mode: str) -> h5py.File:
    if not os.path.exists(path):
        raise ProtopruneError(f"{path}: no such feature file; make one with `protoprune embed IMAGES -o {path}`")
    try:
        file = h5py.File(path, mode, locking="best-effort")  # some network file systems have no locks
    except OSError as error:
        if isinstance(error, PermissionError) or "ermission" in str(error):
            raise ProtopruneError(f"{path}: permission denied") from None
        if "lock" in str(error):
            raise ProtopruneError(f"{path}: being written by another process; wait for it to end") from None
        if path.endswith(".partial"):
            raise ProtopruneError(
                f"{path}: a damaged unfinished run; delete it and run `protoprune embed` again"
            ) from None
        raise ProtopruneError(f"{path}: not a readable HDF5 file; give a file that `protoprune embed` wrote") from None
    if _plain(file.attrs.get("format")) != FORMAT:
        file.close()
        raise ProtopruneError(f"{path}: an HDF5 file, but not a feature file of `protoprune embed`")
    if file.attrs["format_version"] != FORMAT_VERSION:
        version = file.attrs["format_version"]
        file.close()
        raise ProtopruneError(
            f"{path}: feature file version {version}, this program reads {FORMAT_VERSION}; upgrade it"
        )
    return file


def _finished(file: h5py.File) -> np.ndarray:
    finished = file["borrowed"][:] == 1
    finished[np.flatnonzero(~finished)[: int(file["committed"][0])]] = True
    return finished


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """[first, last] positions of each stretch of consecutive numbers: slices are what HDF5 writes fast."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    return list(zip([0, *(breaks + 1)], [*breaks, len(rows) - 1], strict=True))


def _block(names: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def _split(dataset: h5py.Dataset) -> list[str]:
    return os.fsdecode(dataset[:].tobytes()).split("\0")[:-1]


def _text(value: str) -> str | np.void:
    """A path as an attribute: text where it is valid UTF-8, raw bytes otherwise."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return np.void(os.fsencode(value))


def _plain(value):
    if isinstance(value, np.void):
        return os.fsdecode(value.tobytes())
    return value.item() if isinstance(value, np.generic) else value


def _shorten(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:12] + "…" if " " not in text else text


def _disk_trouble(path: str, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{path}: cannot write ({reason}); what is done is kept: make room or choose another -o, and run it again"


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
