"""Feature vectors as geometry wants them: finite float32, of length 1 where only the direction counts, read in slices.

A vector of zeros has no direction: it stays zero here, and whoever ranks by direction gives such a row no score.
Vectors so short or so long that their squares under- or overflow do have one. What this module does not know: files,
and what the vectors are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.units import many

CHUNK = 65_536  # rows that are read at once
_SAFE = 1e-15, 1e15  # lengths whose squares are ordinary float32 numbers
LONGEST = 1e15  # beyond it sums of squares over many images overflow


class Rows(Protocol):
    """What is asked of features, (n, d): their shape, and their rows by a slice or an array of numbers.

    numpy arrays, memory maps and HDF5 datasets (in rising order) have it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


def slices(features: Rows, wanted: np.ndarray, *, unit: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row numbers (b,), their vectors (b, d), see `prepared`) of the rows marked in `wanted`, (n,) bool.

    features: (n, d) of any float type, an array or an HDF5 dataset, which is slow at single rows.
    """
    for first in range(0, features.shape[0], CHUNK):
        here = np.flatnonzero(wanted[first : first + CHUNK])
        if len(here):
            x = features[first : first + CHUNK]
            yield first + here, prepared(x if len(here) == len(x) else x[here], first + here, unit=unit)


def prepared(x: np.ndarray, rows: np.ndarray, *, unit: bool) -> np.ndarray:
    """A float32 copy of x, (b, d); of length 1 when `unit`, but for vectors of zeros. `rows` are named in errors.

    Raises ProtopruneError for NaN and infinity, and, unless `unit`, for vectors too long to compute distances with.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.array(x, np.float32)
        length = np.linalg.norm(x, axis=1)
    if not np.isfinite(length).all():  # rare: only then is every number looked at
        _refuse(~np.isfinite(x).all(axis=1), rows, "NaN or infinite", "embed them again")
    if not unit:
        too_long = ~(length <= LONGEST)
        _refuse(too_long, rows, f"longer than {LONGEST:g}", "too long for Euclidean distances: scale them")
        return x
    _scale(x, length)
    return x


def unit(x: np.ndarray) -> np.ndarray:
    """The rows of x, (b, d) of any float type, at length 1, but for rows of zeros."""
    with np.errstate(over="ignore"):
        x = np.array(x)
        _scale(x, np.linalg.norm(x, axis=1))
    return x


def _scale(x: np.ndarray, length: np.ndarray) -> None:
    """Bring rows of this length to length 1, also those whose squares their type does not hold."""
    odd = ~((length > _SAFE[0]) & (length < _SAFE[1]))
    if odd.any():
        peak = np.abs(x[odd]).max(axis=1)
        x[odd] /= np.where(peak > 0, peak, 1)[:, None]
        length[odd] = np.linalg.norm(x[odd], axis=1)
    x /= np.where(length > 0, length, 1)[:, None]


def check_finite(source: str, vectors: np.ndarray, names: Sequence[str]) -> None:
    """Raise ProtopruneError for NaN and infinity in (n, d) vectors of so many named images.

    No error of a model would show them: it answers with some class all the same.
    """
    for first in range(0, len(vectors), CHUNK):
        bad = np.flatnonzero(~np.isfinite(vectors[first : first + CHUNK]).all(axis=1))
        if len(bad):
            raise ProtopruneError(
                f"{source}: the vector of {names[first + int(bad[0])]} is NaN or infinite; embed again, or leave such "
                "images out"
            )


def _refuse(bad: np.ndarray, rows: np.ndarray, what: str, remedy: str) -> None:
    if bad.any():
        first = rows[np.flatnonzero(bad)[0]]
        raise ProtopruneError(f"features of {many(int(bad.sum()), 'image')} are {what} (first: row {first}); {remedy}")
