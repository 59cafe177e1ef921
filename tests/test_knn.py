"""k-NN quality against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from protoprune.tuning.knn import knn_accuracy


def test_it_is_scikit_learns_weighted_vote():
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    x = (rng.standard_normal((1000, 8)) + 1.5 * np.eye(4, 8)[labels]).astype(np.float32)
    rows = np.random.default_rng([0, 20]).permutation(1000)
    queries, gallery = rows[:200], rows[200:]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    votes = neighbors.KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    expected = votes.fit(unit[gallery], labels[gallery]).score(unit[queries], labels[queries])
    assert knn_accuracy(x, labels) == pytest.approx(expected, abs=1e-9)
    assert 0.5 < expected < 0.99


def test_planted_classes_are_told_apart_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], [60, 60, 30])
    x = np.eye(2, 5)[labels] + 0.05 * rng.standard_normal((150, 5))
    assert knn_accuracy(x, labels) == 1
    assert 0.2 < knn_accuracy(rng.standard_normal((150, 5)), labels) < 0.8
    assert knn_accuracy(x, np.full(150, -1)) is None
    assert knn_accuracy(x, np.append(np.zeros(149, int), 1)) is None
