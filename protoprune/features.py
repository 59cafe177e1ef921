"""The feature file: one HDF5 file with a row per image, readable with plain h5py.

Layout (format version 1; n images, d dimensions; every dataset contiguous and allocated when the file is created):

    path       uint8   the n ids, each followed by a NUL byte, as the bytes that the file system has
    size       int64   (n,) bytes        mtime_ns  int64 (n,)      as listed; with the path they identify an image
    label      int32   (n,) index into classes, -1 for none
    classes    uint8   class names, each followed by a NUL byte
    features   float16 or float32 (n, d), not normalised; zero where status is not 1
    status     uint8   (n,) 0 pending, 1 ok, others failed: see `decode.Status`
    reason     uint16  (n,) index into reasons; of a usable image a note (transparent, shown on white)
    reasons    S160    (1024,) distinct failure messages, the first one empty
    borrowed   uint8   (n,) 1 where the row was copied from an earlier file
    committed  int64   (1,) how many of the rows with borrowed == 0, in order, are finished

Provenance is in the attributes. While a run is under way the same file is called `<name>.partial`. A batch is written
as data, flush, `committed`, flush: of the orders measured this is the one that survived every kill -9, since after
creation no HDF5 metadata changes. The finished file appears by rename and is never modified.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence

import h5py
import numpy as np

from protoprune import files, hdf5
from protoprune.decode import ON_WHITE, TRANSIENT, Status
from protoprune.errors import ProtopruneError
from protoprune.images import ImageList

KIND = hdf5.Kind("protoprune-features", 1, "feature file", "protoprune embed IMAGES")
# What must agree for two rows of features to be comparable (with path, size and mtime: the cache key of a row).
KEY = ("encoder", "weights_sha256", "pool", "preprocess", "precision", "store")
_REASON_SLOTS, _REASON_WIDTH = 1024, 160
_COPY_ROWS = 65_536


class FeatureFile:
    """A finished feature file, opened for reading; a context manager.

    Attributes: path, n, dim, features (h5py dataset, (n, d)), provenance (dict of plain values).
    Arrays are read when first used. Raises ProtopruneError when the file is missing, damaged or something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = hdf5.open_file(self.path, "r", KIND)
        self.features = self._file["features"]
        self.n, self.dim = self.features.shape
        self.provenance = {name: hdf5.plain(value) for name, value in self._file.attrs.items()}

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def paths(self) -> list[str]:
        """The n ids (surrogateescape where a name is not UTF-8), in row order."""
        return hdf5.split(self._file["path"])

    @property
    def classes(self) -> list[str]:
        return hdf5.split(self._file["classes"])

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
    def transparent(self) -> int:
        """How many images have transparent parts, which are shown on white."""
        slot = np.flatnonzero(self._file["reasons"][:] == ON_WHITE.encode())
        return int(np.isin(self._file["reason"][:], slot).sum())

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
        self._file = hdf5.open_file(partial_path(out), "r+", KIND)
        self._committed = self._file["committed"]
        self.overwrite = bool(self._file.attrs.get("overwrite", 0))  # was asked to replace what is there
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
            raise ProtopruneError(files.disk_trouble(partial_path(self.out), error)) from None

    def _reason_number(self, text: str) -> int:
        stored = text.encode("ascii", "backslashreplace")[:_REASON_WIDTH].decode()
        if stored not in self._reasons:
            if len(self._reasons) == _REASON_SLOTS:
                return 0  # the status still says what happened
            self._reasons[stored] = len(self._reasons)
            self._file["reasons"][self._reasons[stored]] = stored.encode()
        return self._reasons[stored]

    def status_counts(self) -> Counter:
        """Status label -> number of images, ok and pending ones too."""
        values, counts = np.unique(self._file["status"][:], return_counts=True)
        return Counter({Status(v).label: int(c) for v, c in zip(values, counts, strict=True)})

    def discard(self) -> None:
        """Remove the unfinished file: there is nothing in it."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(partial_path(self.out))

    def finish(self) -> None:
        """Give the finished file its name. Everything is on the disk before the rename."""
        assert self.done == self.n - self.borrowed, "finish() before the last commit"
        self.close()
        files.publish(partial_path(self.out), self.out)

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
    with files.creating(partial_path(out)) as path:
        # Once without HDF5, which cannot recover when the disk fills under it, and once for the file as it is.
        files.reserve(path, "wb", _estimated_size(images, dim, np.dtype(provenance["store"])))
        with hdf5.create(path, KIND) as file:
            _allocate(file, images, dim, provenance)
        files.reserve(path, "r+b", os.path.getsize(path))
        with h5py.File(path, "r+", locking="best-effort") as file:
            borrow_from = _match_rows(images, sources)
            for source, rows in zip(sources, borrow_from, strict=True):
                _borrow(file, source, rows)


def _estimated_size(images: ImageList, dim: int, store: np.dtype) -> int:
    """Bytes of the file: what _allocate makes of these images, and a little for HDF5's own use."""
    columns = 8 + 8 + 4 + 1 + 2 + 1  # size, mtime, label, status, reason, borrowed
    names = sum(len(path) for path in images.paths) + len(images)
    return len(images) * (dim * store.itemsize + columns) + names + _REASON_SLOTS * _REASON_WIDTH + 16_384


def _allocate(file: h5py.File, images: ImageList, dim: int, provenance: dict) -> None:
    n = len(images)
    file.attrs["root"] = hdf5.text(images.root)
    file.attrs["labels_from"] = hdf5.text(images.labels_from)
    file.attrs["unreadable_folder_count"] = len(images.unreadable_folders)
    file.attrs["unreadable_folders"] = json.dumps(images.unreadable_folders[:100])
    for name, value in provenance.items():
        file.attrs[name] = value
    hdf5.dataset(file, "path", data=hdf5.block(images.paths))
    hdf5.dataset(file, "size", data=images.size)
    hdf5.dataset(file, "mtime_ns", data=images.mtime_ns)
    hdf5.dataset(file, "label", data=images.labels)
    hdf5.dataset(file, "classes", data=hdf5.block(images.classes))
    hdf5.dataset(file, "status", np.zeros(n, np.uint8))
    hdf5.dataset(file, "reason", np.zeros(n, np.uint16))
    hdf5.dataset(file, "reasons", np.zeros(_REASON_SLOTS, f"S{_REASON_WIDTH}"))
    hdf5.dataset(file, "borrowed", np.zeros(n, np.uint8))
    hdf5.dataset(file, "committed", np.zeros(1, np.int64))
    hdf5.dataset(file, "features", shape=(n, dim), dtype=np.dtype(provenance["store"]))


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
        f"{name.replace('_', ' ')}: {_shorten(provenance.get(name))}, not {_shorten(wanted.get(name))}"
        for name in KEY
        if provenance.get(name) != wanted.get(name)
    ]


def _finished(file: h5py.File) -> np.ndarray:
    finished = file["borrowed"][:] == 1
    finished[np.flatnonzero(~finished)[: int(file["committed"][0])]] = True
    return finished


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """[first, last] positions of each stretch of consecutive numbers: slices are what HDF5 writes fast."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    return list(zip([0, *(breaks + 1)], [*breaks, len(rows) - 1], strict=True))


def _shorten(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:12] + "…" if " " not in text else text
