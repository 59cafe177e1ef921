"""Names of many images without a Python object for each: they stay where they are, and are decoded as they are needed.

A string costs some 80 bytes, and its place in a list 8 more, which at 100 million images is the memory of a large
machine. What is needed of names is little at a time: one for a message, a batch to hash or to write. Where a function
takes a sequence of names, lists do too. Knows nothing of files.
"""

from __future__ import annotations

import itertools
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from xxhash import xxh3_64_intdigest

from protoprune.errors import ProtopruneError
from protoprune.units import many

BATCH = 65_536  # names that are in memory at once
STEP = 64  # names between two whose places are known
_NEAR = 512  # names that are read along with one, for its neighbours are mostly next
_GAP = 2048  # names that are rather read than jumped over


class Paths(Sequence[str]):
    """n names, which `read(first, last)` gives as bytes, those of the rows first to last - 1; a sequence of str.

    Names that are not UTF-8 have surrogates, as `os.fsdecode` makes them.
    """

    def __init__(self, n: int, read: Callable[[int, int], list[bytes]]):
        self._n, self.read = n, read
        self._recent: tuple[int, list[bytes]] = (0, [])

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            rows = range(self._n)[row]
            if rows.step == 1:
                return [os.fsdecode(name) for part in self._batches(rows.start, rows.stop) for name in part]
            return [self[one] for one in rows]
        row = int(row)
        if not -self._n <= row < self._n:
            raise IndexError(f"row {row} of {self._n:,} names")
        row %= self._n
        first, names = self._recent
        if not first <= row < first + len(names):
            first = row - row % _NEAR
            names = self.read(first, min(first + _NEAR, self._n))
            self._recent = first, names  # one assignment: threads may look at the same time
        return os.fsdecode(names[row - first])

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(name) for part in self._batches(0, self._n) for name in part)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment] # as of a list

    def __reduce__(self) -> tuple[type[list[str]], tuple[list[str]]]:
        return list, (list(self),)  # another process has not the file

    def __repr__(self) -> str:
        return f"<{self._n:,} names{f', {self[0]!r} to {self[-1]!r}' if self._n else ''}>"

    def _batches(self, first: int, last: int) -> Iterator[list[bytes]]:
        return (self.read(start, min(start + BATCH, last)) for start in range(first, last, BATCH))


class Block:
    """Names in a file, each followed by a NUL byte, which can be read from any thread.

    handle: a descriptor of the file, which is closed with the block; start: the first byte; places: where the rows 0,
    STEP, 2 * STEP, … begin after it, and the end; damaged: makes the error for a file that is too short; check: raises
    where what was read may be of another file than was opened.
    """

    def __init__(
        self,
        handle: int,
        start: int,
        places: np.ndarray,
        damaged: Callable[[], Exception],
        check: Callable[[], None] = lambda: None,
    ):
        self.handle, self.start, self.places, self.damaged, self.check = handle, start, places, damaged, check
        weakref.finalize(self, os.close, handle)

    def read(self, first: int, last: int) -> list[bytes]:
        """Those of the rows first to last - 1."""
        return _cut(self.places, first, last, self._bytes)

    def _bytes(self, low: int, high: int) -> bytes:
        block = os.pread(self.handle, high - low, self.start + low)
        self.check()
        if len(block) < high - low:
            raise self.damaged()
        return block


def _cut(places: Sequence[int] | np.ndarray, first: int, last: int, read: Callable[[int, int], bytes]) -> list[bytes]:
    """The names of the rows first to last - 1 out of a block, of which `read(low, high)` gives the bytes."""
    if last <= first:
        return []
    low, high = places[first // STEP], places[min(-(-last // STEP), len(places) - 1)]
    return read(low, high).split(b"\0")[first % STEP :][: last - first]


def held(names: Iterable[bytes]) -> Paths:
    """Names that are nowhere in a file, in one block of memory. ValueError for one with a NUL byte."""
    block, places, count = bytearray(), array("q"), 0
    for name in names:
        if b"\0" in name:
            raise ValueError(f"a name with a NUL byte: {name!r}")
        if count % STEP == 0:
            places.append(len(block))
        block += name
        block += b"\0"
        count += 1
    places.append(len(block))

    return Paths(count, lambda first, last: _cut(places, first, last, lambda low, high: bytes(block[low:high])))


def chosen(names: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """The names of these ascending rows, in their order, as a sequence that decodes them as they are needed."""
    if len(rows) == len(names):
        return names

    def read(first: int, last: int) -> list[bytes]:
        return list(itertools.chain.from_iterable(encoded(names, rows[first:last])))

    return Paths(len(rows), read)


def of_rows(rows: np.ndarray, paths: Sequence[str], name: str, of: str) -> list[str]:
    """The paths that a list of row indices, called `name`, stands for. Raises ProtopruneError where they are none."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ProtopruneError(f"{name}: {rows.dtype} of shape {rows.shape}, expected one row index an image")
    outside = rows[(rows < 0) | (rows >= len(paths))]
    if len(outside):
        some = many(len(outside), "of its row indices is", "of its row indices are")
        raise ProtopruneError(
            f"{name}: {some} not in the {of} of {len(paths):,} images (first: {outside[0]}); it is for another one"
        )
    return picked(paths, rows)


def digests(names: Sequence[str], seed: int = 0) -> np.ndarray:
    """(n,) uint64: a hash of each name."""
    found, done = np.empty(len(names), np.uint64), 0
    for part in all_encoded(names):
        found[done : done + len(part)] = [xxh3_64_intdigest(name, seed) for name in part]
        done += len(part)
    return found


def distinct(names: Sequence[str]) -> bool:
    """Whether no name occurs twice."""
    found = digests(names)
    found.sort()
    return not (found[1:] == found[:-1]).any() or len(set(names)) == len(names)


def encoded(names: Sequence[str], rows: np.ndarray) -> Iterator[list[bytes]]:
    """The names of these rows as the bytes that the file system has, in the order of `rows`, up to BATCH at once.

    Fast where the rows ascend; else sort them first, where there are many.
    """
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        if not isinstance(names, Paths):
            yield [os.fsencode(names[row]) for row in some.tolist()]
        elif _ascend(some):
            yield list(itertools.chain.from_iterable(_picked(names, part) for part in _near(some)))
        else:
            order = np.argsort(some, kind="stable")
            found = [name for part in _near(some[order]) for name in _picked(names, part)]
            back = np.empty(len(some), np.int64)
            back[order] = np.arange(len(some))
            yield [found[place] for place in back.tolist()]


def all_encoded(names: Sequence[str]) -> Iterator[list[bytes]]:
    """The same of all names."""
    for first in range(0, len(names), BATCH):
        yield from encoded(names, np.arange(first, min(first + BATCH, len(names))))


def picked(names: Sequence[str], rows: np.ndarray) -> list[str]:
    """The names of these rows, in their order."""
    return [os.fsdecode(name) for part in encoded(names, rows) for name in part]


def _ascend(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) >= 0).all())


def _near(rows: np.ndarray) -> list[np.ndarray]:
    """Ascending rows in parts that are read at once each."""
    far = (np.diff(rows) > _GAP) | (np.diff(rows // BATCH) > 0)
    return np.split(rows, np.flatnonzero(far) + 1) if len(rows) else []


def _picked(names: Paths, rows: np.ndarray) -> Iterable[bytes]:
    first = int(rows[0])
    read = names.read(first, int(rows[-1]) + 1)
    return read if (np.diff(rows) == 1).all() else [read[row] for row in (rows - first).tolist()]
