"""Near-duplicates within clusters: SemDeDup (Abbas et al. 2023, "SemDeDup: data-efficient learning at web-scale through
semantic deduplication").

Sees features, cluster by cluster, one of which is in memory; similarities are computed in blocks, so that memory does
not grow with the square of a cluster. Knows nothing of files: features are anything that gives rows in slices.
"""

from __future__ import annotations

import numbers
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protoprune.bounds import shown
from protoprune.clustering import buckets, vectors
from protoprune.errors import UsageError
from protoprune.ids import hashes_of, row_type

PREFER = ("harder", "central")
LEAST = 1e-5  # float32 cosines of equal vectors differ from 1 by up to about 1e-6
BLOCK = 4096  # images; 64 MiB of similarities
THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # whose effect is told


def check_duplicates(epsilon: float, prefer: str = "harder", option: str = "--dedup") -> None:
    """Raise UsageError for a threshold or a side that there is not."""
    if not isinstance(epsilon, numbers.Real) or not LEAST <= epsilon < 1:
        raise UsageError(
            f"{option} {shown(epsilon)}: expected 1 - cosine from {LEAST:.5f} to below 1; a run with 0.05 tells "
            "what others would remove"
        )
    if prefer not in PREFER:
        raise UsageError(f"--dedup-prefer {prefer}: expected one of {', '.join(PREFER)}")


def near_duplicates(
    features: vectors.Rows,
    cluster: np.ndarray,
    distance: np.ndarray,
    epsilon: float,
    *,
    ids: Sequence[str],
    prefer: str = "harder",
    seed: int = 0,
    usable: np.ndarray | None = None,
    thresholds: Sequence[float] = (),
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> tuple[np.ndarray, Likeness]:
    """(n,) int64: for each near-duplicate the row of the kept image that it duplicates, -1 for all others; and
    the pairs within clusters, counted for `thresholds` before any is removed, and each image's nearest one (nothing
    without thresholds, which halves the work).

    features: (n, d); cluster: (n,) integers; distance: (n,) to the own centroid. Within each cluster the usable images
    are gone through farthest from the centroid first (prefer = 'harder', SemDeDup's choice) or nearest first
    ('central'), ties by a seeded hash. An image whose cosine to one that was kept before it exceeds 1 - epsilon is
    removed, as a duplicate of the one it is most similar to; all others are kept. So no two kept images of a cluster
    are that similar, and every removed one has a kept one that is. Duplicates in different clusters stay.

    Each row of the features is read once (see `buckets.grouped`, which `folder` is for). `workers` threads have a
    cluster each and do not change the answer.
    """
    check_duplicates(epsilon, prefer)
    duplicate_of, found = np.full(len(cluster), -1, np.int64), _Pairs(thresholds, len(cluster))
    rows = np.arange(len(cluster)) if usable is None else np.flatnonzero(usable)
    rows = _visited(rows, cluster, -distance if prefer == "harder" else distance, ids, seed)

    def one(members: np.ndarray, x: np.ndarray) -> None:
        x = vectors.prepared(x, members, unit=True)
        _within(x, members, np.float32(1 - epsilon), duplicate_of)
        if len(thresholds) and cluster[members[0]] >= 0:
            ascending = np.argsort(members)
            found.add(members[ascending], x[ascending])

    buckets.through(features, _groups(rows, cluster), one, folder, workers)
    return duplicate_of, found.counted()


def _visited(rows: np.ndarray, cluster: np.ndarray, side: np.ndarray, ids: Sequence[str], seed: int) -> np.ndarray:
    """The rows, ascending, by cluster, then side, then hash; only what is tied is hashed, since hashing takes long."""
    rows = rows[np.lexsort((side[rows], cluster[rows]))].astype(row_type(len(cluster)))
    group, key = cluster[rows], side[rows]
    same_as_next = (group[1:] == group[:-1]) & (key[1:] == key[:-1])
    tied = np.zeros(len(rows), bool)
    tied[1:] |= same_as_next
    tied[:-1] |= same_as_next
    if tied.any():
        some = rows[tied]
        rows[tied] = some[np.lexsort((hashes_of(some, ids, seed), side[some], cluster[some]))]
    return rows


def _groups(rows: np.ndarray, cluster: np.ndarray) -> list[np.ndarray]:
    """The rows, which are in the order of clusters, cluster by cluster."""
    return np.split(rows, np.flatnonzero(np.diff(cluster[rows])) + 1) if len(rows) else []


@dataclass(frozen=True)
class Likeness:
    """How alike the images of a cluster are to each other: what a threshold should be chosen by."""

    thresholds: tuple[float, ...]  # ascending
    pairs: np.ndarray  # (t,) int64: pairs of images of one cluster that are nearer than each
    nearest: np.ndarray  # (n,) float32: 1 - cosine to the most similar image of the cluster; NaN where there is none

    @property
    def suggested(self) -> float | None:
        """A quarter of the median distance to the nearest image, or None where no image has another beside it.

        Duplicates hardly move the median while fewer than half of the images are. On CIFAR-10 and Imagenette with
        planted copies it found nine in ten crops and more of the other kinds, and took 4 in 1,000 other images for
        copies (bundled encoder; docs/select.md).
        """
        found = self.nearest[~np.isnan(self.nearest)]
        middle = float(np.median(found)) if len(found) else 0.0
        return round(middle / 4, 4) if middle / 4 >= LEAST else None

    @property
    def images(self) -> np.ndarray:
        """(t,) int64: images that have another one nearer than each threshold."""
        near = np.sort(self.nearest[~np.isnan(self.nearest)])
        return np.searchsorted(near, self.thresholds)


class _Pairs:
    """What is counted of pairs, cluster by cluster."""

    def __init__(self, thresholds: Sequence[float], n: int):
        self.marks = np.sort(np.asarray(thresholds, np.float32))
        self.pairs, self.lock = np.zeros(len(self.marks), np.int64), threading.Lock()
        self.nearest = np.full(n if len(self.marks) else 0, np.inf, np.float32)

    def add(self, members: np.ndarray, x: np.ndarray) -> None:
        """The images of one cluster, and their unit vectors."""
        near, total = np.full(len(members), np.inf, np.float32), np.zeros(len(self.marks), np.int64)
        blocks = [slice(first, first + BLOCK) for first in range(0, len(members), BLOCK)]
        for number, block in enumerate(blocks):
            for other in blocks[number:]:
                distance = x[block] @ x[other].T
                np.subtract(1, distance, out=distance)
                if other is block:
                    np.fill_diagonal(distance, np.inf)
                near[block] = np.minimum(near[block], distance.min(axis=1))
                near[other] = np.minimum(near[other], distance.min(axis=0))
                counts = np.searchsorted(np.sort(distance[distance < self.marks[-1]]), self.marks)
                total += counts // 2 if other is block else counts
        self.nearest[members] = near
        with self.lock:
            self.pairs += total

    def counted(self) -> Likeness:
        self.nearest[np.isinf(self.nearest)] = np.nan
        np.maximum(self.nearest, 0, out=self.nearest)
        return Likeness(tuple(self.marks.astype(float).round(6).tolist()), self.pairs, self.nearest)


def _within(x: np.ndarray, members: np.ndarray, threshold: np.float32, duplicate_of: np.ndarray) -> None:
    """Fill in the duplicates among the members of one cluster, which are in the order they are gone through.

    x: (m, d) float32 of length 1; a zero vector stays zero and resembles nothing.
    """
    kept = np.empty(0, np.int64)  # places in x
    for first in range(0, len(members), BLOCK):
        block = np.arange(first, min(first + BLOCK, len(members)))
        own = x[first : first + BLOCK]
        best, whom = np.full(len(block), -2, np.float32), np.full(len(block), -1, np.int64)
        for start in range(0, len(kept), BLOCK):
            part = kept[start : start + BLOCK]
            cosine = own @ x[part].T
            nearest = cosine.argmax(axis=1)
            value = cosine[np.arange(len(block)), nearest]
            better = value > best
            best[better], whom[better] = value[better], part[nearest[better]]
        _within_block(own @ own.T, block, threshold, best, whom)
        removed = best > threshold
        duplicate_of[members[block[removed]]] = members[whom[removed]]
        kept = np.concatenate([kept, block[~removed]])


def _within_block(
    cosine: np.ndarray, block: np.ndarray, threshold: np.float32, best: np.ndarray, whom: np.ndarray
) -> None:
    """Update each image's best cosine to a kept one before it, for the images of the block itself."""
    close = cosine > threshold
    for i in np.flatnonzero(np.triu(close, 1).any(axis=1)):  # the others remove nothing
        if best[i] <= threshold:
            later = i + 1 + np.flatnonzero(close[i, i + 1 :])
            better = later[cosine[i, later] > best[later]]
            best[better], whom[better] = cosine[i, better], block[i]
