"""Near-duplicates within clusters: SemDeDup (Abbas et al. 2023, "SemDeDup: data-efficient learning at web-scale through
semantic deduplication").

The only part of selection that sees features. Similarities are computed in blocks, so that memory does not grow with
the size of a cluster. Knows nothing of files: features are anything that gives rows for an array of row numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protoprune import vectors
from protoprune.errors import UsageError
from protoprune.ids import hashes

PREFER = ("harder", "central")
LEAST = 1e-5  # float32 cosines of equal vectors differ from 1 by up to about 1e-6
BLOCK = 4096  # images; 64 MiB of similarities
THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # whose effect is told


def check_duplicates(epsilon: float, prefer: str = "harder") -> None:
    """Raise UsageError for a threshold or a side that there is not."""
    if not LEAST <= epsilon < 1:
        raise UsageError(
            f"--dedup {epsilon:g}: expected 1 - cosine from {LEAST:.5f} to below 1; a run with 0.05 tells what others "
            "would remove"
        )
    if prefer not in PREFER:
        raise UsageError(f"--dedup-prefer {prefer}: expected one of {', '.join(PREFER)}")


def duplicates(
    features: vectors.Rows,
    cluster: np.ndarray,
    distance: np.ndarray,
    epsilon: float,
    *,
    ids: Sequence[str],
    prefer: str = "harder",
    seed: int = 0,
    usable: np.ndarray | None = None,
) -> np.ndarray:
    """(n,) int64: for each near-duplicate the row of the kept image that it duplicates, -1 for all others.

    features: (n, d), indexed by arrays of rows; cluster: (n,) integers; distance: (n,) to the own centroid. Within each
    cluster the usable images are gone through farthest from the centroid first (prefer = 'harder', SemDeDup's choice)
    or nearest first ('central'), ties by a seeded hash. An image whose cosine to one that was kept before it exceeds
    1 - epsilon is removed, as a duplicate of the one it is most similar to; all others are kept. So no two kept images
    of a cluster are that similar, and every removed one has a kept one that is. Duplicates in different clusters stay.
    """
    check_duplicates(epsilon, prefer)
    duplicate_of = np.full(len(cluster), -1, np.int64)
    rows = np.arange(len(cluster)) if usable is None else np.flatnonzero(usable)
    side = -distance[rows] if prefer == "harder" else distance[rows]
    rows = rows[np.lexsort((hashes([ids[row] for row in rows.tolist()], seed), side, cluster[rows]))]
    for members in np.split(rows, np.flatnonzero(np.diff(cluster[rows])) + 1):
        _within(features, members, np.float32(1 - epsilon), duplicate_of)
    return duplicate_of


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


def likeness(
    features: vectors.Rows,
    cluster: np.ndarray,
    *,
    usable: np.ndarray | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Likeness:
    """The pairs within clusters, counted, and each image's nearest one; arguments as in `duplicates`.

    All pairs of a cluster are compared once, which costs as much as `duplicates` does when it removes little.
    """
    marks = np.sort(np.asarray(thresholds, np.float32))
    pairs, nearest = np.zeros(len(marks), np.int64), np.full(len(cluster), np.inf, np.float32)
    rows = np.flatnonzero(cluster >= 0 if usable is None else usable & (cluster >= 0))
    rows = rows[np.argsort(cluster[rows], kind="stable")]
    for members in np.split(rows, np.flatnonzero(np.diff(cluster[rows])) + 1):
        blocks = [members[first : first + BLOCK] for first in range(0, len(members), BLOCK)]
        for number, block in enumerate(blocks):
            x = _unit(features, block)
            for other in blocks[number:]:
                distance = 1 - x @ (x if other is block else _unit(features, other)).T
                if other is block:
                    np.fill_diagonal(distance, np.inf)
                nearest[block] = np.minimum(nearest[block], distance.min(axis=1))
                nearest[other] = np.minimum(nearest[other], distance.min(axis=0))
                counts = np.searchsorted(np.sort(distance[distance < marks[-1]]), marks)
                pairs += counts // 2 if other is block else counts
    nearest[np.isinf(nearest)] = np.nan
    return Likeness(tuple(marks.astype(float).round(6).tolist()), pairs, np.maximum(nearest, 0))


def _within(features: vectors.Rows, members: np.ndarray, threshold: np.float32, duplicate_of: np.ndarray) -> None:
    """Fill in the duplicates among the members of one cluster, which are in the order they are gone through."""
    kept = members[:0]
    for first in range(0, len(members), BLOCK):
        block = members[first : first + BLOCK]
        x = _unit(features, block)
        best, whom = np.full(len(block), -2, np.float32), np.full(len(block), -1, np.int64)
        for start in range(0, len(kept), BLOCK):
            part = kept[start : start + BLOCK]
            cosine = x @ _unit(features, part).T
            nearest = cosine.argmax(axis=1)
            value = cosine[np.arange(len(block)), nearest]
            better = value > best
            best[better], whom[better] = value[better], part[nearest[better]]
        _within_block(x @ x.T, block, threshold, best, whom)
        removed = best > threshold
        duplicate_of[block[removed]] = whom[removed]
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


def _unit(features: vectors.Rows, rows: np.ndarray) -> np.ndarray:
    """(len(rows), d) float32 of length 1; a zero vector stays zero and resembles nothing."""
    return vectors.prepared(features[rows], rows, unit=True)
