"""The feature vectors of one group of images after the other, though they lie mixed on the disk, each row read once.

Groups (clusters) go into buckets that fit into memory. Where one bucket does not hold them all, a single pass over the
features writes each row to the temporary file of its bucket, so that the disk is read and written in long stretches and
never row by row. What this module does not know: what is done with a group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import numpy as np

from protoprune.clustering.vectors import CHUNK, Rows
from protoprune.errors import ProtopruneError

MEMORY = 1 << 27  # bytes of features that are in memory at once; of a larger group they stay in its file
_MOST = 200  # buckets, each of which is an open file

Fetch = Callable[[np.ndarray], np.ndarray]  # rows (m,) of a bucket -> their features (m, d)


def through(
    features: Rows,
    groups: Sequence[np.ndarray],
    one: Callable[[np.ndarray, np.ndarray], None],
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> None:
    """Call `one(rows, their features)` for each group, in threads; see `grouped`."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for some, fetch in grouped(features, groups, folder):
            for _ in pool.map(lambda rows, fetch=fetch: one(rows, fetch(rows)), some):
                pass


def grouped(
    features: Rows, groups: Sequence[np.ndarray], folder: str | os.PathLike[str] | None = None
) -> Iterator[tuple[Sequence[np.ndarray], Fetch]]:
    """The groups, each an array of row numbers, bucket by bucket, and what gives the features of a bucket's rows.

    features: (n, d), read in rising slices; no row may be in two groups. `folder` is where the temporary files are made
    (by default the system's place), which need as much room as the features; they have no name and vanish with the
    process; features that are in memory need none. Raises ProtopruneError where there is no room.
    """
    if type(features) is np.ndarray:
        yield groups, features.__getitem__
        return
    row_bytes = features.shape[1] * getattr(features, "dtype", np.dtype(np.float64)).itemsize
    sizes = np.array([len(rows) for rows in groups], np.int64)
    most = max(MEMORY, int(sizes.sum()) * row_bytes // _MOST)
    shares = _shares(sizes * row_bytes, most)
    if len(shares) == 1 and int(sizes.sum()) * row_bytes <= most:
        yield groups, partial(_of, _all(features, groups))
        return
    folder = os.fspath(folder or tempfile.gettempdir())
    bucket_of = np.full(features.shape[0], -1, np.int16)
    for number, (first, last) in enumerate(shares):
        for rows in groups[first:last]:
            bucket_of[rows] = number
    with contextlib.ExitStack() as stack:
        with _told(folder, int(sizes.sum()) * row_bytes):
            files = [stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0)) for _ in shares]
            dtype = _spread(features, bucket_of, files)
        for number, (first, last) in enumerate(shares):
            rows = np.flatnonzero(bucket_of == number)
            shape = len(rows), features.shape[1]
            if len(rows) * row_bytes > most:
                vectors: np.ndarray = np.memmap(files[number], dtype, "r", shape=shape)
            else:
                files[number].seek(0)
                vectors = np.fromfile(files[number], dtype).reshape(shape)
            files[number].close()
            bucket = [rows, vectors]
            del rows, vectors
            yield groups[first:last], partial(_of, bucket)
            bucket.clear()  # whoever still has the function must not hold two buckets in memory


def _shares(sizes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """[first, last) of each stretch of groups that together do not exceed `most`, or that is one group."""
    shares, first, filled = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if filled and filled + size > most:
            shares.append((first, number))
            first, filled = number, 0
        filled += size
    return [*shares, (first, len(sizes))]


def _of(bucket: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """The vectors of the rows `own`, in its order, of a bucket: its rows, ascending, and their vectors."""
    rows, vectors = bucket
    return vectors if np.array_equal(rows, own) else vectors[np.searchsorted(rows, own)]


def _all(features: Rows, groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *groups]))
    vectors, filled = np.empty((0, features.shape[1]), np.float32), 0
    for here, x in slices(features, rows):
        if not filled:
            vectors = np.empty((len(rows), features.shape[1]), x.dtype)
        vectors[filled : filled + len(here)] = x
        filled += len(here)
    return rows, vectors


def _spread(features: Rows, bucket_of: np.ndarray, files: Sequence[BinaryIO]) -> np.dtype:
    """Write each row to the file of its bucket, in rising order; returns the type of the numbers."""
    dtype = np.dtype(np.float32)
    for here, x in slices(features, np.flatnonzero(bucket_of >= 0)):
        dtype, bucket = x.dtype, bucket_of[here]
        order = np.argsort(bucket, kind="stable")
        present, starts = np.unique(bucket[order], return_index=True)
        for number, rows in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
            files[number].write(np.ascontiguousarray(x[rows]))
    return dtype


def slices(features: Rows, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their features) of ascending rows, a slice of all features at a time."""
    for first in range(0, features.shape[0], CHUNK):
        low, high = np.searchsorted(rows, (first, first + CHUNK))
        if low < high:
            here = rows[low:high]
            yield here, features[first : first + CHUNK][here - first]


@contextlib.contextmanager
def _told(folder: str, need: int) -> Iterator[None]:
    """Refuse a folder without room, and trouble with it, in one line."""
    hint = "make room, or set TMPDIR to another folder"
    try:
        free = shutil.disk_usage(folder).free
        if free < need:
            raise ProtopruneError(
                f"{folder}: {free / 1e9:.1f} GB are free, and the features need {need / 1e9:.1f} GB for a while; {hint}"
            )
        yield
    except OSError as error:
        raise ProtopruneError(f"{folder}: cannot write temporary files ({error.strerror or error}); {hint}") from None
