"""Cluster quotas by complexity: density-based pruning (DBP; Abbas et al. 2024, "Effective pruning of web-scale datasets
based on complexity of concept clusters").

A cluster that lies far from others and is spread out is a complex concept and gets more images. With C_j = d_inter,j *
d_intra,j, P = softmax(C / temperature) and N images to keep, the quotas solve the paper's quadratic programme:
nearest to P_j * N in the least squares, adding up to N, none above the cluster's size. What differs from the authors'
code: one ranking serves every N (theirs solves and rounds for one), and there is no lower bound of one image a cluster
(`--balance --by cluster` is that bound). Distances are 1 - cosine. Knows nothing of files.
"""

from __future__ import annotations

import numpy as np

from protoprune.selection.orders import place_in_group

NEIGHBOURS = 20  # nearest other centroids, as the authors' code has it
_PAIRS = 1 << 22  # of centroids that are looked at at once
TEMPERATURE = 0.1  # our default; the authors' code takes it as an option


def complexity(centroids: np.ndarray, cluster: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(k,) d_inter * d_intra, NaN for an empty cluster.

    centroids: (k, d) of length 1; cluster: (m,) integers; distance: (m,) 1 - cosine to the own centroid. d_intra is
    the mean distance of a cluster's images, d_inter the mean distance of its centroid to its 20 nearest (or all, where
    there are fewer) other centroids of clusters that have images; 1 where there is no other.
    """
    sizes = np.bincount(cluster, minlength=len(centroids))
    inside = np.bincount(cluster, weights=distance, minlength=len(centroids))
    result = np.full(len(centroids), np.nan)
    present = np.flatnonzero(sizes)
    points = np.asarray(centroids, np.float64)[present]
    near = min(NEIGHBOURS, len(present) - 1)
    d_inter, rows = np.ones(len(present)), max(1, _PAIRS // max(1, len(present)))
    for first in range(0, len(present) if near else 0, rows):  # k x k distances would be large at k = 100,000
        distance = 1 - points[first : first + rows] @ points.T
        own = np.arange(len(distance))
        distance[own, first + own] = np.inf
        d_inter[first : first + rows] = np.partition(distance, near - 1, axis=1)[:, :near].mean(axis=1)
    result[present] = np.maximum(d_inter, 0) * inside[present] / sizes[present]
    return result


def complexity_shares(values: np.ndarray) -> np.ndarray:
    """(k,) softmax of the complexities over the clusters that have one; 0 for the others."""
    powers = np.exp((values - np.nanmax(values)) / TEMPERATURE)
    powers = np.where(np.isnan(powers), 0, powers)
    return powers / powers.sum()


def by_quota(rows: np.ndarray, cluster: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The rows, given in keeping order, reordered so that the first N of them meet the quotas for every N.

    cluster: (n,) integers; shares: (k,) above 0 for every cluster of these rows. Within a cluster the order stays. A
    cluster's next image comes when its quota has grown to half of it, so quotas are met to within rounding.
    """
    present, group = np.unique(cluster[rows], return_inverse=True)
    if len(present) < 2:
        return rows
    sizes = np.bincount(group)
    shares = shares[present] / shares[present].sum()
    times, lifts = _levels(shares, sizes)
    place = place_in_group(group, sizes)
    arrival = np.empty(len(rows))
    members = np.argsort(group, kind="stable")
    for one, own in enumerate(np.split(members, np.cumsum(sizes)[:-1])):
        arrival[own] = np.interp(place[own] + 0.5, shares[one] * times + lifts, times)
    return rows[np.argsort(arrival, kind="stable")]


def _levels(shares: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(events,) numbers kept at which a cluster runs full, and by how much the others' quotas lie above P_j * N there.

    The programme's solution is x_j = min(size_j, P_j * N + lift(N)): the lift is 0 until the first cluster is full,
    then grows so that the free ones share equally what the full ones cannot take.
    """
    times, lifts = [0.0], [0.0]
    free = np.arange(len(sizes))
    while len(free):
        slope = max((1 - shares[free].sum()) / len(free), 0)
        wait = (sizes[free] - shares[free] * times[-1] - lifts[-1]) / (shares[free] + slope)
        step = max(wait.min(), 0)
        times.append(times[-1] + step)
        lifts.append(lifts[-1] + slope * step)
        free = free[wait > step]
    return np.array(times), np.array(lifts)
