"""Groups of images small enough to look at all of their pairs: classes or everything, split by k-means.

What covers a group (`selection.cover`) costs the square of its size, so that its groups have to be bounded however
large the data set is. Many parts are made in two steps or more, of at most FAN each: then the cost of a split does not
grow with the number of parts. Knows nothing of files or selection.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from protoprune.clustering import buckets, prototypes, vectors
from protoprune.ids import hashes_of, row_type

CLASS_SIZE = 2000  # images above which a class is split
CLUSTER_SIZE = 400  # images a cluster on average, where there are no classes
FAN = 256  # parts made at once
_TRAIN = 100_000  # points that one k-means sees at least, where there are as many


def split(
    features: vectors.Rows,
    groups: np.ndarray,
    size: int,
    *,
    ids: Sequence[str],
    usable: np.ndarray | None = None,
    seed: int = 0,
    iterations: int = 25,
    backend: str = "auto",
    folder: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """(n,) int32 numbers of groups that are about `size` images or smaller, -1 for rows that are not usable.

    features: (n, d), read in slices (see `buckets.grouped`, which `folder` is for); groups: (n,) integers. A group of
    m > size images is split into ceil(m / size) by spherical k-means, which makes uneven parts: those of more than
    twice `size` are split again, and what k-means cannot tell apart is divided by a hash of the ids.
    """
    rows = np.arange(len(groups)) if usable is None else np.flatnonzero(usable)
    rows = rows[np.argsort(groups[rows], kind="stable")].astype(row_type(len(groups)))
    parts = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1) if len(rows) else []
    most = size  # groups as given are split above `size`, parts only above twice as much
    while any(len(own) > most for own in parts):
        large = [own for own in parts if len(own) > most]
        fresh = _split(features, large, size, ids, seed, iterations, backend, folder)
        parts = [part for own in parts for part in (next(fresh) if len(own) > most else [own])]
        most = 2 * size
    numbers = np.full(len(groups), -1, np.int32)
    for number, own in enumerate(parts):
        numbers[own] = number
    return numbers


def _split(
    features: vectors.Rows,
    groups: list[np.ndarray],
    size: int,
    ids: Sequence[str],
    seed: int,
    iterations: int,
    backend: str,
    folder: str | os.PathLike[str] | None,
) -> Iterator[list[np.ndarray]]:
    """Each group, ascending rows, in at most FAN parts. One that holds most rows stays where it is, and is read in
    slices; the others are in memory one after the other."""
    n = features.shape[0]
    small = [own for own in groups if 2 * len(own) <= n]
    fetched = (fetch(own) for some, fetch in buckets.grouped(features, small, folder) for own in some)
    for own in groups:
        k = min(math.ceil(len(own) / size), FAN)
        usable = None
        if 2 * len(own) <= n:
            points: vectors.Rows = next(fetched)
        else:
            points, usable = features, np.zeros(n, bool)
            usable[own] = True
        part = np.full(len(own), k, np.int16)
        if _directed(points, k, usable):
            found = prototypes.cluster(
                points, k, usable=usable, seed=seed, iterations=iterations,
                train_points=min(len(own), max(FAN * k, _TRAIN)), backend=backend,
            ).cluster  # fmt: skip
            found = found if usable is None else found[own]
            part[found >= 0] = found[found >= 0]  # vectors of zeros, which k-means has no place for, stay together
        if np.bincount(part).max() > 0.9 * len(own):
            part = (np.argsort(np.argsort(hashes_of(own, ids, seed, b"split"))) * k // len(own)).astype(np.int16)
        by_part = np.argsort(part, kind="stable")
        own[:] = own[by_part]  # in place: all groups are pieces of one array
        yield np.split(own, np.flatnonzero(np.diff(part[by_part])) + 1)


def _directed(points: vectors.Rows, k: int, usable: np.ndarray | None) -> bool:
    """Whether at least k of the points are not all zeros, which a score table may have scores for too."""
    found = 0
    for first in range(0, points.shape[0], vectors.CHUNK):
        some = np.any(points[first : first + vectors.CHUNK], axis=1)
        found += int((some if usable is None else some & usable[first : first + len(some)]).sum())
        if found >= k:
            return True
    return False
