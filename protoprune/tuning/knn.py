"""How well features tell the classes apart: weighted k-NN, as encoders are usually compared. Pure arrays."""

from __future__ import annotations

import numpy as np

from protoprune.clustering.vectors import Rows, unit

GALLERY, QUERIES = 8000, 2000  # images that are looked at, at most
NEIGHBOURS, TEMPERATURE = 20, 0.07  # Wu et al. 2018


def knn_accuracy(features: Rows, labels: np.ndarray) -> float | None:
    """Share of labels that the 20 nearest others get right, votes weighted by exp(cosine / 0.07).

    features: (n, d), sliced and indexed by ascending rows; labels: (n,) integers, -1 for rows that do not count. At
    most 2,000 queries among 8,000 others, at random. None where fewer than two classes have two images.
    """
    rows = np.flatnonzero(labels >= 0)
    if (np.bincount(labels[rows]) > 1).sum() < 2:
        return None
    rows = np.random.default_rng([0, 20]).permutation(rows)[: GALLERY + QUERIES]
    queries, gallery = np.split(rows, [max(1, min(QUERIES, len(rows) // 5))])
    asked, known = _unit(features, queries), _unit(features, gallery)
    cosine = asked @ known.T
    k = min(NEIGHBOURS, len(gallery))
    nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(cosine, nearest, 1) / TEMPERATURE)
    votes = np.zeros((len(queries), labels.max() + 1))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[gallery][nearest]), weight)
    return float((votes.argmax(1) == labels[queries]).mean())


def _unit(features: Rows, rows: np.ndarray) -> np.ndarray:
    """(len(rows), d) float32 of length 1, in the order of the rows; read in ascending order."""
    order = np.argsort(rows)
    x = np.empty((len(rows), features.shape[1]), np.float32)
    x[order] = features[rows[order]]
    return unit(x)
