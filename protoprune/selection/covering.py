"""Lists that stand for all images: greedy orders that cover each group of them, by class or by cluster.

Herding (Chen, Welling & Smola 2010, "Super-samples from kernel herding"): within a group always the image next that
brings the mean of those taken, in the feature space of a Gaussian kernel, nearest to the mean of all, so that their
maximum mean discrepancy (MMD) falls about as 1/t where that of random images falls as 1/sqrt(t). Here without
replacement, and with the authors' greedy rule. Facility location (Mirchandani & Francis 1990; greedy by Minoux 1978's
lazy evaluation): always the image next that raises most the sum over the group of the similarity to the nearest one
taken.

Groups are covered each by itself and interleaved in proportion to their sizes, so that growing lists are nested. Knows
nothing of files: features are anything that gives rows in slices.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence

import numpy as np

from protoprune.clustering import buckets
from protoprune.clustering.vectors import Rows, unit
from protoprune.errors import ProtopruneError, UsageError
from protoprune.ids import hashes_of, row_type
from protoprune.units import many

LARGEST = 8192  # images a group: a kernel of 256 MiB


def cover(
    features: Rows,
    groups: np.ndarray,
    *,
    ids: Sequence[str],
    method: str = "cover",
    usable: np.ndarray | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
) -> np.ndarray:
    """(n,) float64: each usable image's place in the order that covers its group, above 0 and below 1; NaN elsewhere.

    features: (n, d) of any float type; groups: (n,) integers. An image that comes t-th (from 0) in a group of s has the
    place (t + 0.5) / s, so sorting by place interleaves the groups in proportion. Within a group x is the feature less
    the mean of all usable ones, at length 1; the kernel is exp(-D / median D), with D the squared distances of the
    group's distinct x. Images of equal x are told apart by a seeded hash of the id, and so are equal gains; an image
    that lies at the mean itself has no direction, x = 0, and resembles its equals alone.

    Features are read in two passes (see `buckets.grouped`, which `folder` is for). `workers` threads hold a kernel
    each, 4 bytes a pair of images, and do not change the answer.

    Raises UsageError for a method that there is not or a group too large, ProtopruneError for NaN or infinite features.
    """
    if method not in METHODS:
        raise UsageError(f"--order {method}: expected one of {', '.join(METHODS)}")
    rows = np.arange(len(groups)) if usable is None else np.flatnonzero(usable)
    places = np.full(len(groups), np.nan)
    if not len(rows):
        return places
    # By group, and within each at random: all ids are hashed at once, for names are read fast in their own order.
    rows = rows[np.lexsort((hashes_of(rows, ids, seed, b"cover"), groups[rows]))].astype(row_type(len(groups)))
    members = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1)
    largest = max(map(len, members))
    if largest > LARGEST:
        raise UsageError(f"a group of {largest:,} images is too large to cover, at most {LARGEST:,}; split it")
    mean = _mean(features, np.sort(rows))

    def one(own: np.ndarray, x: np.ndarray) -> None:
        order = order_of(_directions(x, mean), METHODS[method])
        places[own[order]] = (np.arange(len(own)) + 0.5) / len(own)

    buckets.through(features, members, one, folder, workers)
    return places


def order_of(x: np.ndarray, greedy: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """(m,) positions in the order in which `greedy` takes the rows of x, (m, d) float32 of length 1 or 0.

    Equal rows are made one with a count, and so are exactly equal in all sums; the first of them comes first.
    """
    number: dict[bytes, int] = {}  # of each distinct row, in the order given: of equal gains the earlier one is taken
    same_as = np.array([number.setdefault(row.tobytes(), len(number)) for row in x + np.float32(0)])  # and no -0
    first = np.unique(same_as, return_index=True)[1]
    counts = np.bincount(same_as)
    taken = greedy(kernel(x[first]), counts)
    # The t-th time that a distinct row is taken means its t-th copy.
    order = np.empty(len(x), np.int64)
    order[np.argsort(taken, kind="stable")] = np.argsort(same_as, kind="stable")
    return order


def kernel(x: np.ndarray) -> np.ndarray:
    """(p, p) float32 exp(-D / median D) of distinct rows x (p, d), of length 1 or 0; D: squared distances.

    The median is that of the pairs of two different rows, as usual for this kernel; of two middle ones the larger.
    """
    p = len(x)
    distance = x @ x.T
    distance *= -2
    distance += 2
    np.maximum(distance, 0, out=distance)
    np.fill_diagonal(distance, 0)
    if p > 1:
        middle = p + (p * p - p) // 2  # of the sorted entries; the p zeros of the diagonal come first
        width = np.partition(distance, middle, axis=None)[middle]
        width = width or distance.mean() or 1.0  # most pairs, or all, may differ by less than rounding
        distance /= -np.float32(width)
    return np.exp(distance, out=distance)


def herding(kernel: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(m,) rows of the kernel (p, p), which it overwrites, in the order taken; row i can be taken counts[i] times.

    Taken next is the j with the largest mu_j - acc_j / (t + 1): mu is the mean of the kernel over all m images, acc its
    sum over the t images taken. Kept is (t + 1) mu_j - acc_j, which grows by mu - kernel[taken] from step to step.
    """
    mu = _row_sums(kernel, counts) / counts.sum()
    step, gain = np.subtract(mu.astype(np.float32), kernel, out=kernel), mu
    left, order = counts.tolist(), np.empty(int(counts.sum()), np.int64)
    for t in range(len(order)):
        taken = int(gain.argmax())
        order[t] = taken
        gain += step[taken]
        left[taken] -= 1
        if not left[taken]:
            gain[taken] = -np.inf
    return order


def facility_location(kernel: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(m,) rows of the kernel (p, p) in the order taken: lazy greedy on sum_i counts_i max_{j taken} kernel_ij.

    A further copy of a row adds nothing: those come last, the copies of one row after another.
    """
    weight, covered = counts.astype(np.float32), np.zeros(len(kernel), np.float32)
    waiting = [(-gain, row) for row, gain in enumerate(_row_sums(kernel, counts))]  # upper bounds: gains only fall
    heapq.heapify(waiting)
    order = []
    while waiting:
        _, row = waiting[0]
        gain = float(np.maximum(kernel[row] - covered, 0) @ weight)
        heapq.heapreplace(waiting, (-gain, row))
        if waiting[0][1] == row:  # still the best, or first of equals
            heapq.heappop(waiting)
            order.append(row)
            np.maximum(covered, kernel[row], out=covered)
    return np.concatenate([order, np.repeat(np.arange(len(counts)), counts - 1)])


METHODS = {"cover": herding, "facility": facility_location}  # by the name of the order


def _row_sums(kernel: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(p,) float64 sums of the kernel over all images, equal for rows of equal entries."""
    if (counts == 1).all():
        return kernel.sum(axis=1, dtype=np.float64)
    return np.array([np.dot(row.astype(np.float64), counts) for row in kernel])


def _mean(features: Rows, rows: np.ndarray) -> np.ndarray:
    """(d,) mean of the ascending rows, rounded to float32, so that neither slices nor the order of the rows can be seen
    in it."""
    total = np.zeros(features.shape[1])
    for here, x in buckets.slices(features, rows):
        part = np.asarray(x, np.float64).sum(axis=0)
        if not np.isfinite(part).all():
            bad = here[~np.isfinite(x).all(axis=1)]
            where = f" (first: row {bad[0]})" if len(bad) else ""
            raise ProtopruneError(f"features of {many(len(bad), 'image')} are NaN or infinite{where}; embed them again")
        total += part
    return (total / len(rows)).astype(np.float32)


def _directions(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(m, d) float32: the features less the mean, at length 1; what lies at the mean itself stays 0."""
    return unit(features.astype(np.float64) - mean).astype(np.float32)
