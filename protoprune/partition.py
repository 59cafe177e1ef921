"""Groups of images small enough to look at all of their pairs: classes or everything, split by k-means.

What covers a group (`selection.cover`) costs the square of its size, so that its groups have to be bounded however
large the data set is. Many parts are made in two steps or more, of at most FAN each: then the cost of a split does not
grow with the number of parts. Knows nothing of files or selection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from protoprune import prototypes, vectors
from protoprune.ids import hashes_of

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
) -> np.ndarray:
    """(n,) int64 numbers of groups that are about `size` images or smaller, -1 for rows that are not usable.

    features: (n, d), sliced and indexed by arrays of ascending rows; groups: (n,) integers. A group of m > size images
    is split into ceil(m / size) by spherical k-means, which makes uneven parts: those of more than twice `size` are
    split again, and what k-means cannot tell apart is divided by a hash of the ids.
    """
    rows = np.arange(len(groups)) if usable is None else np.flatnonzero(usable)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    waiting = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1)[::-1] if len(rows) else []
    fresh = len(waiting)  # groups as given are split above `size`, parts only above twice as much
    numbers, count = np.full(len(groups), -1, np.int64), 0
    while waiting:
        own = waiting.pop()
        given, fresh = len(waiting) < fresh, min(fresh, len(waiting))
        if len(own) <= (size if given else 2 * size):
            numbers[own], count = count, count + 1
        else:
            waiting += _parts(features, own, size, ids, seed, iterations, backend)[::-1]
    return numbers


def _parts(
    features: vectors.Rows, rows: np.ndarray, size: int, ids: Sequence[str], seed: int, iterations: int, backend: str
) -> list[np.ndarray]:
    """The rows, ascending, in at most FAN parts."""
    k = min(math.ceil(len(rows) / size), FAN)
    points = features if len(rows) == features.shape[0] else np.asarray(features[rows])
    own = np.full(len(rows), k)
    if _directed(points, k):
        found = prototypes.cluster(
            points, k, seed=seed, iterations=iterations, train_points=min(len(rows), max(FAN * k, _TRAIN)),
            backend=backend,
        ).cluster  # fmt: skip
        own = np.where(found < 0, k, found)  # vectors of zeros, which k-means has no place for
    if np.bincount(own).max() > 0.9 * len(rows):
        own = np.argsort(np.argsort(hashes_of(rows, ids, seed, b"split"))) * k // len(rows)
    return [rows[own == part] for part in range(k + 1) if (own == part).any()]


def _directed(points: vectors.Rows, k: int) -> bool:
    """Whether at least k of the points are not all zeros, which a score table may have scores for too."""
    found = 0
    for first in range(0, points.shape[0], vectors.CHUNK):
        found += int(points[first : first + vectors.CHUNK].any(axis=1).sum())
        if found >= k:
            return True
    return False
