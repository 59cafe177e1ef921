"""Positions in an embedding -> difficulty: features (n, d) in, (n,) float32 out, larger = harder (kept first).

Features are an array or an HDF5 dataset of any float type, read in chunks; rows that are not `usable`, have no class
where classes matter, or are all zeros where directions do, come out as NaN. What this module does not know: files,
encoders, k-means (see `prototypes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protoprune.bounds import check_number
from protoprune.clustering import vectors
from protoprune.ids import hashes, shuffled

K_CENTER_SHARE, K_CENTER_MOST = 0.1, 10_000  # images that k_center picks one by one unless told otherwise
_PURPOSE = b"metrics"  # of hashes: other ones than those that break ties in a selection
FARTHEST = 2.0  # the largest 1 - cosine there is


def supervised_prototypes(features: vectors.Rows, labels: np.ndarray, usable: np.ndarray | None = None) -> np.ndarray:
    """1 - cosine to the mean of the normalised features of the example's class (Sorscher et al. 2022).

    labels: (n,) integers, -1 for none. The only image of a class lies at its own mean and ranks easiest.
    """
    rows = _labelled(labels, usable)
    means = _class_means(features, labels, rows, True)
    return _distance_to_mean(features, labels, rows, means, True)


def moderate(distance: np.ndarray) -> np.ndarray:
    """Moderate coreset (Xia et al. 2023): minus |d - median of d|, d the distance to the class mean (`class_distance`).

    Neither the nearest nor the farthest images are kept first but those at the median distance, so 'larger = harder'
    reads 'larger = kept first' here. One median over all classes, as in the paper; its code takes the middle ranks
    instead and the coordinate-wise median as the centre. NaN stays NaN.
    """
    known = ~np.isnan(distance)
    return -np.abs(distance - np.median(distance[known])) if known.any() else distance


def class_distance(features: vectors.Rows, labels: np.ndarray, usable: np.ndarray | None = None) -> np.ndarray:
    """Euclidean distance to the mean of the example's class."""
    rows = _labelled(labels, usable)
    return _distance_to_mean(features, labels, rows, _class_means(features, labels, rows, False), False)


def lengths(features: vectors.Rows, usable: np.ndarray | None = None) -> np.ndarray:
    """(n,) float32 lengths of the features, NaN where they are not usable."""
    usable = np.ones(features.shape[0], bool) if usable is None else usable
    found = np.full(features.shape[0], np.nan, np.float32)
    for here, x in vectors.slices(features, usable, unit=False):
        found[here] = np.linalg.norm(x, axis=1)
    return found


def k_center(
    features: vectors.Rows,
    ids: Sequence[str],
    budget: float | None = None,
    seed: int = 0,
    usable: np.ndarray | None = None,
) -> np.ndarray:
    """k-center greedy (Sener & Savarese 2018): from a random image on, always the one farthest from those chosen.

    The score is the distance, 1 - cosine, to the chosen set: at the moment of its choice for a chosen image, at the end
    for the others, 2 for the first. It never rises from one choice to the next and no image left over exceeds the last
    choice, so keeping the largest scores keeps the images in the order of choosing, then the rest, farthest first.
    budget: the share of the images that is chosen (default: a tenth, at most 10,000); n * budget * n * d
    multiplications, and the features as float32 in memory. The start and ties depend on the seed and the ids, not on
    the order of the rows.
    """
    if budget is not None:
        check_number("--budget", budget, 0, 1, ", the share of the images to choose", above=True)
    usable = np.ones(len(ids), bool) if usable is None else usable
    rows = np.flatnonzero(usable)
    rows = shuffled(rows, ids, seed, _PURPOSE)
    points = np.empty((len(rows), features.shape[1]), np.float32)
    place = np.full(len(ids), -1)
    place[rows] = np.arange(len(rows))
    for here, x in vectors.slices(features, usable, unit=True):
        points[place[here]] = x
    directed = points.any(axis=1)
    if not directed.all():
        rows, points = rows[directed], points[directed]
    share = min(round(K_CENTER_SHARE * len(rows)), K_CENTER_MOST) if budget is None else round(budget * len(rows))
    scores = np.full(len(ids), np.nan, np.float32)
    scores[rows] = _farthest_first(points, max(1, share)) if len(rows) else 0
    return scores


def _farthest_first(points: np.ndarray, k: int) -> np.ndarray:
    """(m,) float32 distances to the chosen set, see `k_center`; points (m, d) of length 1, the first one is chosen."""
    nearest = np.full(len(points), np.inf, np.float32)  # distance to the chosen set; -1 for its members
    scores = np.empty(len(points), np.float32)
    chosen, distance = 0, FARTHEST
    for _ in range(k):
        scores[chosen] = distance
        np.minimum(nearest, np.clip(1 - points @ points[chosen], 0, FARTHEST), out=nearest)
        nearest[chosen] = -1
        chosen = int(nearest.argmax())
        distance = nearest[chosen]
        if distance < 0:  # all are chosen
            return scores
    left = nearest >= 0
    scores[left] = nearest[left]
    return scores


def random(ids: Sequence[str], seed: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1) from a seeded hash of each id: the same image gets the same one in any folder order."""
    return ((hashes(ids, seed, _PURPOSE) >> np.uint64(40)) / np.float32(1 << 24)).astype(
        np.float32
    )  # 24 bits: exact in float32


def _labelled(labels: np.ndarray, usable: np.ndarray | None) -> np.ndarray:
    return (labels >= 0) if usable is None else (labels >= 0) & usable


def _class_means(features: vectors.Rows, labels: np.ndarray, rows: np.ndarray, normalise: bool) -> np.ndarray:
    """(classes, d) float32 mean of each class's features; of length 1 when `normalise`."""
    classes = int(labels.max(initial=-1)) + 1
    sums = np.zeros((classes, features.shape[1]))
    for here, x in vectors.slices(features, rows, unit=normalise):
        by_class = np.argsort(labels[here], kind="stable")
        found, starts = np.unique(labels[here][by_class], return_index=True)
        sums[found] += np.add.reduceat(x[by_class], starts, axis=0, dtype=np.float64)
    if normalise:
        length = np.linalg.norm(sums, axis=1, keepdims=True)
    else:
        length = np.bincount(labels[rows], minlength=classes)[:, None]
    return (sums / np.where(length > 0, length, 1)).astype(np.float32)


def _distance_to_mean(
    features: vectors.Rows, labels: np.ndarray, rows: np.ndarray, means: np.ndarray, normalise: bool
) -> np.ndarray:
    distance = np.full(features.shape[0], np.nan, np.float32)
    for here, x in vectors.slices(features, rows, unit=normalise):
        own = means[labels[here]]
        if normalise:
            cosine = np.einsum("nd,nd->n", x, own)
            distance[here] = np.where(x.any(axis=1), np.clip(1 - cosine, 0, FARTHEST), np.nan)
        else:
            distance[here] = np.linalg.norm(x - own, axis=1)
    return distance
