"""Cluster quotas: complexity against loops, quotas against a bisection of the paper's quadratic programme."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune.selection import by_quota, complexity, complexity_shares, ranking


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("k", "pairs"), [(1, 4), (2, 1), (7, 4_000_000), (40, 100), (40, 4_000_000)])
def test_complexity_is_what_the_paper_says(k, pairs, monkeypatch):
    monkeypatch.setattr("protoprune.selection.quotas._PAIRS", pairs)
    rng = np.random.default_rng(k)
    centroids = unit(rng.normal(size=(k, 5))).astype(np.float32)
    cluster, distance = rng.integers(0, k, 60), rng.uniform(0, 1, 60).astype(np.float32)
    cluster[:k] = np.arange(k)
    found = complexity(centroids, cluster, distance)
    for j in range(k):
        inter = sorted(1 - centroids[j].astype(float) @ centroids[i] for i in range(k) if i != j)[:20]
        expected = np.mean(inter or [1.0]) * np.mean([d for d, c in zip(distance, cluster, strict=True) if c == j])
        assert found[j] == pytest.approx(expected, rel=1e-5)


def test_empty_clusters_have_no_complexity_and_are_nobodys_neighbours():
    centroids = unit(np.array([[1.0, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [1, 1, 1]]))
    cluster, distance = np.array([0, 0, 1, 3]), np.array([0.5, 0.1, 0.2, 0.3])
    found = complexity(centroids, cluster, distance)
    assert np.isnan(found[2])
    assert found[[0, 1, 3]] == pytest.approx(complexity(centroids[[0, 1, 3]], np.array([0, 0, 1, 2]), distance))
    shares = complexity_shares(found)
    assert shares[2] == 0
    assert shares.sum() == pytest.approx(1)


def test_shares_are_the_softmax():
    values = np.array([0.1, 0.2, 0.5])
    expected = np.exp(values / 0.1) / np.exp(values / 0.1).sum()
    assert complexity_shares(values) == pytest.approx(expected)


def quotas(shares, sizes, number: float) -> np.ndarray:
    """argmin |x - P N|^2 over 0 <= x <= sizes that add up to N: P N + lift, clipped, by bisection of the lift."""
    low, high = -float(number), float(number + sum(sizes))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(shares * number + middle, 0, sizes).sum() < number else (low, middle)
    return np.clip(shares * number + high, 0, sizes)


def arrival(shares, sizes, j: int, place: int) -> float:
    """The number kept at which cluster j's quota reaches place + 1/2, by bisection."""
    low, high = 0.0, float(sum(sizes))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if quotas(shares, sizes, middle)[j] < place + 0.5 else (low, middle)
    return high


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0.02, 1)), min_size=2, max_size=4), st.integers(0, 9))
def test_every_prefix_meets_the_quadratic_programme(clusters, seed):
    sizes = np.array([size for size, _ in clusters])
    shares = np.array([share for _, share in clusters])
    shares /= shares.sum()
    cluster = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.random.default_rng(seed + 1).permutation(len(cluster))
    found = by_quota(rows, cluster, shares)
    assert sorted(found) == sorted(rows)
    times, seen = [], dict.fromkeys(range(len(sizes)), 0)
    for row in found:
        times.append(arrival(shares, sizes, cluster[row], seen[cluster[row]]))
        seen[cluster[row]] += 1
    assert np.diff(times).min(initial=0) > -1e-6
    for j in range(len(sizes)):  # within a cluster the order stays
        assert [row for row in found if cluster[row] == j] == [row for row in rows if cluster[row] == j]


def test_quotas_by_hand():
    """Shares 0.6, 0.3, 0.1 of sizes 3, 40, 40: the first is full at N = 5, then its 0.6 goes to both others evenly."""
    cluster = np.repeat([0, 1, 2], [3, 40, 40])
    order = by_quota(np.arange(83), cluster, np.array([0.6, 0.3, 0.1]))
    counts = [np.bincount(cluster[order[:number]], minlength=3).tolist() for number in (5, 24)]
    assert counts == [[3, 2, 0], [3, 13, 8]]  # at 24: 0.3 * 24 + 0.3 * 19 = 12.9, 0.1 * 24 + 0.3 * 19 = 8.1, and 3


def test_a_complex_cluster_gets_more_than_a_dense_one():
    rng = np.random.default_rng(0)
    directions = np.eye(3, 16)
    directions[1] = unit(directions[0] + 0.3 * np.eye(16)[5])  # two alike, one far off
    spread = np.array([0.02, 0.02, 0.3])
    x = unit(np.concatenate([d + s * rng.normal(size=(200, 16)) for d, s in zip(directions, spread, strict=True)]))
    cluster = np.repeat([0, 1, 2], 200)
    centroids = unit(np.stack([x[cluster == j].mean(0) for j in range(3)]))
    distance = 1 - np.einsum("nd,nd->n", x, centroids[cluster])
    shares = complexity_shares(complexity(centroids, cluster, distance))
    assert shares[2] > 0.6
    rows = by_quota(ranking(distance, ids=[str(i) for i in range(600)]), cluster, shares)
    counts = np.bincount(cluster[rows[:300]])
    assert counts[2] > 180
    assert abs(counts[0] - counts[1]) <= 1
