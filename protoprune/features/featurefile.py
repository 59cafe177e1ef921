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
    borrowed   uint8   (n,) 1 where the row was copied from an earlier file or finished by an earlier run
    committed  int64   (1,) how many of the rows with borrowed == 0, in order, are finished
    ctime_ns   int64   (n,) as listed, -1 where it is not known
    content    uint64  (n,) xxh3-64 of the encoded image as it was read, 0 where it was not
    left_out   uint8   of a shard, where there is any: name and reason of each member that is no image and belongs to
                       none, each followed by a NUL byte
    digest     uint64  (n,) xxh3-64 of the row's features, seeded with that of its status byte and its failure message

Provenance is in the attributes, digests of all else are in the seal (see `seals`).
While a run is under way the same file is called `<name>.partial`. A batch is written as data, flush, `committed`,
flush: of the orders measured this is the one that survived every kill -9, since after creation no HDF5 metadata
changes. The finished file appears by rename and is never modified.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from protoprune import files
from protoprune.arguments import checked
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import hdf5, seals
from protoprune.features.hdf5 import Column, partial_path
from protoprune.images.decode import ON_WHITE, Status
from protoprune.images.listing import ImageList
from protoprune.paths import Paths
from protoprune.text import parse_json
from protoprune.units import many

# What must agree for two rows of features to be comparable (with path, size and mtime: the cache key of a row).
KEY = ("encoder", "weights_sha256", "pool", "preprocess", "precision", "store")
IMPORTED = "as imported"  # the precision of vectors that were computed elsewhere
_REASON_SLOTS, _REASON_WIDTH = 1024, 160
_COPY_ROWS = 65_536
_AGAIN = "the same `protoprune embed` embeds what is damaged again"
NO_IMAGE = "not an image by name"
_PER_ROW = ("features",)  # what has a digest a row instead of one in the seal

Index = int | np.integer | slice | np.ndarray | list[int]  # rows or columns of an array

KIND = hdf5.Kind(
    "protoprune-features", 1, "feature file", "protoprune embed IMAGES",
    {
        "path": Column(("uint8",), ("*",)),
        "size": Column(("int64",), ("n",)),
        "mtime_ns": Column(("int64",), ("n",)),
        "label": Column(("int32",), ("n",)),
        "classes": Column(("uint8",), ("*",)),
        "features": Column(("float16", "float32"), ("n", "d")),
        "status": Column(("uint8",), ("n",)),
        "reason": Column(("uint16",), ("n",)),
        "reasons": Column((f"|S{_REASON_WIDTH}",), (_REASON_SLOTS,)),
        "borrowed": Column(("uint8",), ("n",)),
        "committed": Column(("int64",), (1,)),
        "digest": Column(("uint64",), ("n",)),
        "ctime_ns": Column(("int64",), ("n",)),
        "content": Column(("uint64",), ("n",)),
        "left_out": Column(("uint8",), ("*",), optional=True),
    },
    ("root", "uuid", "created", "protoprune", "encoder", "weights_sha256", "preprocess", "precision", "store"),
)  # fmt: skip


class FeatureFile:
    """A feature file, opened for reading; a context manager. `open_features` is for finished ones only.

    Attributes: path, n, dim, features (see `Features`), provenance (dict of plain values). Arrays are read and checked
    when they are used. Raises ProtopruneError when the file is missing, damaged or something else.
    """

    @checked
    def __init__(self, path: str | os.PathLike[str], mode: str = "r") -> None:
        self.path = os.fspath(path)
        self._reader = hdf5.Reader(self.path, KIND, mode)
        self.n, self.dim = (self._reader.dims[name] for name in "nd")
        self.provenance = self._reader.attributes
        self.features = Features(self)

    def __repr__(self) -> str:
        return f"FeatureFile({self.path!r}, {self.n:,} images x {self.dim})"

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def release(self) -> None:
        """Close it and what reads of it, of which nothing may be in use.

        What was handed out reads on otherwise, and keeps its descriptors until Python looks for circles.
        """
        self.close()
        self.features._map = None
        self.__dict__.pop("paths", None)

    @cached_property
    def paths(self) -> Paths:
        """The n ids (surrogateescape where a name is not UTF-8), in row order, read as they are asked for."""
        return self._reader.paths("path", self.n)

    @property
    def classes(self) -> list[str]:
        return self._reader.names("classes")

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32, -1 where there is no class."""
        return self._reader.within("label", -1, len(self.classes))

    @property
    def status(self) -> np.ndarray:
        """(n,) uint8, values of `decode.Status`."""
        status = self._reader.within("status", 0, max(Status) + 1)
        if (pending := status == Status.PENDING).any() and (count := int((pending & self.finished()).sum())):
            raise self._reader.damaged(f"its status says that {count:,} finished rows are pending")
        return status

    @property
    def usable(self) -> np.ndarray:
        """(n,) bool: the rows that have features."""
        return self.status == Status.OK

    @property
    def size(self) -> np.ndarray:
        return self._reader.whole("size")

    @property
    def mtime_ns(self) -> np.ndarray:
        return self._reader.whole("mtime_ns")

    @property
    def ctime_ns(self) -> np.ndarray:
        """(n,) int64, -1 where it is not known."""
        return self._reader.whole("ctime_ns")

    @property
    def content(self) -> np.ndarray:
        """(n,) uint64 digests of the encoded images, 0 where one is not known: see `current`."""
        return self._reader.whole("content")

    @property
    def reasons(self) -> list[bytes]:
        """The failure messages, which the rows have numbers of."""
        return self._reader.whole("reasons").tolist()

    @property
    def reason(self) -> np.ndarray:
        """(n,) uint16 index into reasons."""
        return self._reader.within("reason", 0, _REASON_SLOTS)

    def failures(self) -> list[tuple[str, Status, str]]:
        """(id, status, reason) of every image that has no features."""
        status, paths, reason, reasons = self.status, self.paths, self.reason, self.reasons
        return [
            (paths[row], Status(status[row]), reasons[reason[row]].decode(errors="backslashreplace"))
            for row in np.flatnonzero((status != Status.OK) & (status != Status.PENDING)).tolist()
        ]

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(name, reason) of the members of a shard that are no images and belong to none."""
        names = self._reader.names("left_out") if "left_out" in self._reader else []
        if len(names) % 2:
            raise self._reader.damaged("its left_out is no list of names and reasons")
        return list(zip(names[::2], names[1::2], strict=True))

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """(id, what, reason) of every image that has no features, and of what is left out of a shard."""
        yield from ((path, status.label, reason) for path, status, reason in self.failures())
        yield from ((path, NO_IMAGE, reason) for path, reason in self.left_out)

    def failure_counts(self) -> Counter[str]:
        """Status label -> number of images."""
        values, counts = np.unique(self.status, return_counts=True)
        return Counter({Status(v).label: int(c) for v, c in zip(values, counts, strict=True) if v > Status.OK})

    @property
    def transparent(self) -> np.ndarray:
        """(n,) bool: the images with transparent parts, which are shown on white."""
        slots = [slot for slot, text in enumerate(self.reasons) if text == ON_WHITE.encode()]
        return np.isin(self.reason, slots)

    @property
    def unreadable_folders(self) -> list[list[str]]:
        """[folder, reason] of the first 100 folders that could not be listed."""
        with self._reader.trouble("its unreadable_folders"):
            return parse_json(self.provenance.get("unreadable_folders", "[]"))

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._reader.size

    def finished(self) -> np.ndarray:
        """(n,) bool: rows whose result is in the file; all of them unless this is a partial file."""
        finished = self._reader.within("borrowed", 0, 2) == 1
        todo, done = np.flatnonzero(~finished), int(self._reader.whole("committed")[0])
        if not 0 <= done <= len(todo):
            raise self._reader.damaged(f"its committed says that {done:,} of {len(todo):,} rows are finished")
        finished[todo[:done]] = True
        return finished

    def intact(self) -> np.ndarray:
        """(n,) bool: finished rows that are what was written."""
        good = self.finished()
        for start in range(0, self.n, _COPY_ROWS):
            rows = np.arange(start, min(start + _COPY_ROWS, self.n))
            with self._reader.trouble("its features"):
                block = self._reader.data["features"][start : start + len(rows)]
            good[rows[self.features.differs(rows, block)]] = False
        return good

    def damaged(self, what: str) -> ProtopruneError:
        """The error that says what is damaged, and the way on."""
        return self._reader.damaged(what, _AGAIN if what.startswith("its features of ") else "")

    def damage(self) -> list[str]:
        """What of the file is not what was written, a line each; all of it is read."""
        lines = self.damaged_parts()
        if not lines:
            bad = np.flatnonzero(self.finished() & ~self.intact())
            lines += [f"its features of {many(len(bad), 'image')}, first {self.paths[bad[0]]}"] if len(bad) else []
        return lines

    def damaged_parts(self) -> list[str]:
        """The same of all but single rows of features, which a run can embed again."""
        lines = [f"its {name}" for name in self._reader.damaged_datasets()]
        for read in (lambda: self.paths, lambda: self.labels, self.failures, lambda: self.unreadable_folders):
            try:
                read()
            except ProtopruneError as error:
                lines = lines or [str(error)]
        return lines


class Features:
    """The features of an open file: an array, (n, d), on the disk, whose rows are checked when they are first read.

    Indexed by a number, a slice, or an array of numbers or booleans for the rows, and perhaps another index for the
    columns.
    """

    ndim = 2

    def __init__(self, file: FeatureFile) -> None:
        self._file = file
        self.shape, self.dtype = (file.n, file.dim), file._reader.data["features"].dtype
        self.itemsize = self.dtype.itemsize
        self._good: np.ndarray | None = None  # (n,) bool: rows that need no more checking
        self._map: np.ndarray | None = None
        self._columns: tuple[np.ndarray, np.ndarray, list[bytes]] | None = None  # see `differs`
        self._digest: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"Features({self.shape[0]:,} x {self.shape[1]} {self.dtype}, in the file; [:] reads them)"

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        numbers = row_numbers(rows, len(self))
        if numbers.ndim == 0:
            return self[int(numbers) : int(numbers) + 1][0][(*columns,)]
        with self._file._reader.trouble("its features"):
            if isinstance(rows, slice) and (rows.step or 1) == 1:
                block = self._file._reader.data["features"][rows]
            else:
                if self._map is None:
                    self._map = self._file._reader.mapped("features")
                self._file._reader.check_same()
                block = self._map[numbers]
        self._check(numbers, block)
        return block[(slice(None), *columns)] if columns else block

    def _check(self, rows: np.ndarray, block: np.ndarray) -> None:
        if self._good is None:
            self._good = ~self._file.finished()
        new = np.flatnonzero(~self._good[rows])
        bad = rows[new[self.differs(rows[new], block[new])]]
        if len(bad):
            more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
            what = f"its features of {self._file.paths[bad[0]]}{more} are not what was written"
            raise self._file.damaged(what)
        self._good[rows] = True

    def differs(self, rows: np.ndarray, block: np.ndarray) -> np.ndarray:
        """(len(rows),) bool: which rows are not what their digests say; `block` holds their features."""
        if not len(rows):
            return np.zeros(0, bool)
        if self._columns is None:
            self._columns = self._file.status, self._file.reason, self._file.reasons
        status, reason, reasons = self._columns
        return row_digests(block, status[rows], reason[rows], reasons) != self._digests(rows)

    def _digests(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows; of all they take 8 bytes an image, which a pass over the file does without."""
        first, last = int(rows.min()), int(rows.max()) + 1
        if self._digest is None and last - first <= 4 * len(rows) < len(self):
            with self._file._reader.trouble("its digest"):
                found: np.ndarray = self._file._reader.data["digest"][first:last]
            return found[rows - first]
        if self._digest is None:
            self._digest = self._file._reader.whole("digest")
        return self._digest[rows]


def row_numbers(rows: Index, n: int) -> np.ndarray:
    """The numbers of the rows of an index, without those of all n rows, which take longer than some of them."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(n))
    numbers = np.asarray(rows, None if np.size(rows) else np.int64)
    if numbers.dtype == bool:
        return np.arange(n)[numbers]
    if numbers.size and not -n <= int(numbers.min()) <= int(numbers.max()) < n:
        raise IndexError(f"a row outside 0 to {n - 1}")
    return np.where(numbers < 0, numbers + n, numbers)


def vanished(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(b,) bool: rows that are not all zeros, but so small that `dtype` has few digits for them or none."""
    largest = np.abs(values).max(axis=1)
    return (largest > 0) & (largest < np.finfo(dtype).tiny)


def row_digests(features: np.ndarray, status: np.ndarray, reason: np.ndarray, reasons: Sequence[bytes]) -> np.ndarray:
    """(b,) uint64 digests of rows: features (b, d), status and reason (b,), and what the reasons stand for."""
    raw = np.ascontiguousarray(features).reshape(-1).view(np.uint8).data
    step = features.shape[1] * features.itemsize
    kinds, which = np.unique(status.astype(np.int64) * _REASON_SLOTS + reason, return_inverse=True)
    seeds = [xxh3_64_intdigest(bytes([kind // _REASON_SLOTS]) + reasons[kind % _REASON_SLOTS]) for kind in kinds]
    starts = range(0, len(raw), step)
    if len(seeds) == 1:
        seed = seeds[0]
        digests = [xxh3_64_intdigest(raw[start : start + step], seed) for start in starts]
    else:
        pairs = zip(starts, which.tolist(), strict=True)
        digests = [xxh3_64_intdigest(raw[start : start + step], seeds[kind]) for start, kind in pairs]
    return np.array(digests, np.uint64)


class PartialFile:
    """The file of a run under way: which rows are left, committing a batch, and the rename at the end."""

    def __init__(self, out: str) -> None:
        self.out, self.damaged = out, 0
        found = FeatureFile(partial_path(out), "r+")
        self._reader = found._reader
        self._file, self._data = self._reader.file, self._reader.data
        try:
            self._reader.check_sealed()
            finished = found.finished()
            if finished.any() and not (good := found.intact())[finished].all():
                self.damaged = int((finished & ~good).sum())
                self._forget(good)
        except BaseException:
            self.close()
            raise
        self._committed = self._data["committed"]
        self.overwrite = bool(self._file.attrs.get("overwrite", 0))  # was asked to replace what is there
        self.done = int(self._committed[0])
        self.n, self.dtype = self._data["features"].shape[0], self._data["features"].dtype
        todo = np.flatnonzero(self._data["borrowed"][:] == 0)
        self.todo, self.borrowed = todo[self.done :], self.n - len(todo)
        self._table = self._data["reasons"][:].tolist()
        self._reasons = {text: i for i, text in enumerate(self._table) if i == 0 or text}

    def _forget(self, good: np.ndarray) -> None:
        """Keep the good rows only. `committed` goes first: killed in between, all of it is done again."""
        self._data["committed"][0] = 0
        self._file.flush()
        self._data["status"][...] = np.where(good, self._data["status"][:], Status.PENDING)
        self._data["borrowed"][...] = good
        self._file.flush()

    def commit(
        self,
        rows: np.ndarray,
        features: np.ndarray,
        status: np.ndarray,
        reasons: Sequence[str],
        content: np.ndarray | None = None,
    ) -> None:
        """Write the next rows of `todo`: features (b, d), status (b,), one reason a row ('' when ok), and perhaps the
        digests (b,) of what was read."""
        features = np.asarray(features, self.dtype)
        number = np.array([self._reason_number(text) for text in reasons], np.uint16)
        columns = {"features": features, "status": status, "reason": number}
        columns["digest"] = row_digests(features, status, number, self._table)
        if content is not None:
            columns["content"] = content
        with files.told(partial_path(self.out)):
            for first, last in _runs(rows):
                for name, values in columns.items():
                    self._data[name][rows[first] : rows[last] + 1] = values[first : last + 1]
            self._file.flush()
            self.done += len(rows)
            self._committed[0] = self.done
            self._file.flush()

    def _reason_number(self, text: str) -> int:
        stored = text.encode("ascii", "backslashreplace")[:_REASON_WIDTH]
        if stored not in self._reasons:
            if len(self._reasons) == _REASON_SLOTS:
                return 0  # the status still says what happened
            number = self._reasons[stored] = len(self._reasons)
            self._table[number] = self._data["reasons"][number] = stored
        return self._reasons[stored]

    def status_counts(self) -> Counter[str]:
        """Status label -> number of images, ok and pending ones too."""
        values, counts = np.unique(self._data["status"][:], return_counts=True)
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
        hdf5.finish(self.out, _PER_ROW)

    def close(self) -> None:
        self._reader.close()


def check_new(out: str, overwrite: bool) -> None:
    """Raise UsageError where a whole new feature file would take the place of something, unless it is asked to: of an
    unfinished run of `embed` too, which may be hours of a GPU."""
    if os.path.isdir(out):
        raise UsageError(f"{out}: a folder; name a file")
    if os.path.exists(out):
        if not overwrite:
            raise UsageError(f"{out}: exists; choose another -o, or replace it with --overwrite")
        hdf5.check_replaceable(out, KIND)
    if not overwrite and os.path.exists(partial_path(out)) and not _made_at_once(partial_path(out)):
        raise UsageError(
            f"{partial_path(out)}: an unfinished run of `protoprune embed`; run that again to finish it, choose "
            "another -o, or replace it with --overwrite"
        )


def _made_at_once(partial: str) -> bool:
    """Whether an unfinished file is one of `merge` or `import`, which nobody misses: they start again."""
    try:
        with FeatureFile(partial) as file:
            return "merged_from" in file.provenance or file.provenance["precision"] == IMPORTED
    except ProtopruneError:
        return False


def create_partial(
    out: str,
    images: ImageList,
    dim: int,
    provenance: dict[str, Any],
    sources: Sequence[FeatureFile] = (),
    known: Sequence[np.ndarray] = (),
) -> None:
    """Create `<out>.partial` for these images, with the rows that `sources` already have copied from them: `known`
    says of each source which of its rows holds image i, (n,), -1 for none; the first source wins.

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
            taken = np.zeros(len(images), bool)
            for source, rows in zip(sources, known, strict=True):
                _borrow(file, source, np.where(taken, -1, rows))
                taken |= rows >= 0
        hdf5.seal(path, KIND, {"features", "status", "reason", "reasons", "borrowed", "committed", "digest", "content"})


def _estimated_size(images: ImageList, dim: int, store: np.dtype) -> int:
    """Bytes of the file: what _allocate makes of these images, and a little for HDF5's own use."""
    columns = 8 + 8 + 8 + 4 + 1 + 2 + 1 + 8 + 8  # size, times, label, status, reason, borrowed, digest, content
    names = sum(len(path) for path in images.paths) + len(images) + sum(len(text) + 1 for text in _left_out(images))
    return len(images) * (dim * store.itemsize + columns) + names + _REASON_SLOTS * _REASON_WIDTH + seals.BLOCK + 16_384


def _allocate(file: h5py.File, images: ImageList, dim: int, provenance: dict[str, Any]) -> None:
    n = len(images)
    file.attrs["root"] = hdf5.text(images.root)
    file.attrs["labels_from"] = hdf5.text(images.labels_from)
    file.attrs["unreadable_folder_count"] = len(images.unreadable_folders)
    file.attrs["unreadable_folders"] = json.dumps(images.unreadable_folders[:100])
    for name, value in {**images.provenance, **provenance}.items():
        file.attrs[name] = hdf5.text(value) if isinstance(value, str) else value
    hdf5.dataset(file, "path", data=hdf5.block(images.paths))
    hdf5.dataset(file, "size", data=images.size)
    hdf5.dataset(file, "mtime_ns", data=images.mtime_ns)
    ctime = images.ctime_ns
    hdf5.dataset(file, "ctime_ns", data=np.full(n, -1, np.int64) if ctime is None else ctime)
    hdf5.dataset(file, "content", np.zeros(n, np.uint64))
    hdf5.dataset(file, "label", data=images.labels)
    hdf5.dataset(file, "classes", data=hdf5.block(images.classes))
    hdf5.dataset(file, "status", np.zeros(n, np.uint8))
    hdf5.dataset(file, "reason", np.zeros(n, np.uint16))
    hdf5.dataset(file, "reasons", np.zeros(_REASON_SLOTS, f"S{_REASON_WIDTH}"))
    hdf5.dataset(file, "borrowed", np.zeros(n, np.uint8))
    hdf5.dataset(file, "committed", np.zeros(1, np.int64))
    hdf5.dataset(file, "digest", np.zeros(n, np.uint64))
    if left_out := _left_out(images):
        hdf5.dataset(file, "left_out", data=hdf5.block(left_out))
    hdf5.dataset(file, "features", shape=(n, dim), dtype=np.dtype(provenance["store"]))


def _left_out(images: ImageList) -> list[str]:
    """Name, reason, name, reason, … of what is known to have been left out; a folder is listed anew by every run."""
    pairs = zip(images.left_out, images.why or (), strict=False)
    return [text for pair in pairs for text in pair]


def _borrow(file: h5py.File, source: FeatureFile, rows: np.ndarray) -> None:
    """Copy features, status and reason of the matched rows and mark them as borrowed, but for damaged rows."""
    status, reason, reasons, content = source.status, source.reason, source.reasons, source.content
    table = file["reasons"][:].tolist()
    slot = {text: i for i, text in enumerate(table) if i == 0 or text}
    for text in reasons:
        if text and text not in slot and len(slot) < _REASON_SLOTS:
            slot[text] = len(slot)
            table[slot[text]] = text
    file["reasons"][...] = np.array(table, f"S{_REASON_WIDTH}")
    number = np.array([slot.get(text, 0) for text in reasons], np.uint16)
    here = np.flatnonzero(rows >= 0)
    here = here[np.argsort(rows[here], kind="stable")]  # in the source's order
    there = rows[here]
    for start in range(0, source.n, _COPY_ROWS):
        low, high = np.searchsorted(there, (start, start + _COPY_ROWS))
        if low == high:
            continue
        theirs, ours = there[low:high], here[low:high]
        with source._reader.trouble("its features"):
            features = source._reader.data["features"][theirs[0] : theirs[-1] + 1][theirs - theirs[0]]
        good = ~source.features.differs(theirs, features)
        theirs, ours, features = theirs[good], ours[good], features[good]
        columns = {"features": features, "status": status[theirs], "reason": number[reason[theirs]]}
        columns["digest"] = row_digests(features, columns["status"], columns["reason"], table)
        columns["borrowed"], columns["content"] = np.ones(len(ours), np.uint8), content[theirs]
        for first, last in _runs(ours) if len(ours) else ():
            for name, values in columns.items():
                file[name][ours[first] : ours[last] + 1] = values[first : last + 1]


def covers(file: FeatureFile, images: ImageList) -> bool:
    """Whether the file, finished or not, is for exactly these images, unchanged and in the same place."""
    return (
        file.n == len(images)
        and file.provenance["root"] == images.root
        and np.array_equal(file.size, images.size)
        and np.array_equal(file.mtime_ns, images.mtime_ns)
        and not _touched(file, images)
        and np.array_equal(file.labels, images.labels)
        and file.paths == images.paths
        and file.classes == images.classes
        and all(
            file.provenance.get(name) == value for name, value in images.provenance.items() if name != "embedded_by"
        )
    )


def _touched(file: FeatureFile, images: ImageList) -> bool:
    """Whether files may have been put in the place of those that were listed: their ctime is another one."""
    if images.ctime_ns is None:
        return False
    before = file.ctime_ns
    return bool(((before >= 0) & (images.ctime_ns >= 0) & (before != images.ctime_ns)).any())


def key_differences(provenance: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """'pool: token, not avg' for everything in KEY that differs between a file and a request.

    Of another encoder that alone is said: weights, pooling and preprocessing are its own.
    """
    differ = [name for name in KEY if provenance.get(name) != wanted.get(name)]
    if "encoder" in differ:
        differ = ["encoder"]
    return [
        f"{name.replace('_', ' ')}: {was}, not {value}"
        for name in differ
        for was, value in [_unlike(name, str(provenance.get(name)), str(wanted.get(name)))]
    ]


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """[first, last] positions of each stretch of consecutive numbers: slices are what HDF5 writes fast."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    return list(zip([0, *(breaks + 1)], [*breaks, len(rows) - 1], strict=True))


def _unlike(name: str, one: str, other: str) -> tuple[str, str]:
    """Two values as messages show them: of a digest its start, of preprocessings the settings that are not the same."""
    if name == "weights_sha256":
        one, other = (text if len(text) < 40 else text[:12] + "…" for text in (one, other))
    if name == "preprocess":
        with contextlib.suppress(ValueError, AttributeError):
            sides = json.loads(one), json.loads(other)
            keys = sorted(key for key in sides[0].keys() | sides[1].keys() if sides[0].get(key) != sides[1].get(key))
            one, other = (", ".join(f"{key} {side.get(key)}" for key in keys) for side in sides)
    return one, other
