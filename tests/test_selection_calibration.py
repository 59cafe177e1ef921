"""Calibrated selection: exact, nested, and without bias, also where the order left the tie-breaking hash used up."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune.errors import UsageError
from protoprune.selection import by_score, calibrated, ranking


def ids_of(n: int) -> list[str]:
    return [f"class/{i:05d}.png" for i in range(n)]


alphas = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 0.999, 1.0])


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30),
    alphas,
    st.sampled_from(["hard", "easy", "middle", "stratified"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 4),
)
def test_exact_nested_and_the_weights_add_up(scores, alpha, order, balance, names):
    n = len(scores)
    groups = np.arange(n) ** 2 % names
    rows = ranking(np.array(scores), ids=ids_of(n), order=order)
    before, top_before = np.zeros(n, bool), set()
    for count in range(1, n + 1):
        mask, weights = calibrated(rows, n, count, alpha, ids=ids_of(n), groups=groups, balance=balance)
        assert mask.sum() == count
        assert not (before & ~mask).any()
        assert np.array_equal(np.isnan(weights), ~mask)
        a = by_score(count, alpha)
        if alpha < 1:
            assert weights[mask].sum() == pytest.approx(n, rel=1e-12)
            heavy = (n - a) / (count - a)
            assert sorted(weights[mask]) == pytest.approx([1.0] * a + [heavy] * (count - a), rel=1e-12)
            assert abs(a - alpha * count) <= 0.5 or a == count - 1
        else:
            assert (weights[mask] == 1).all()
        if not balance:
            assert {*rows[:a]} >= top_before
            assert all(weights[row] == 1 for row in rows[:a])
            top_before = {*rows[:a]}
        before = mask


def test_alpha_one_is_the_order_and_alpha_zero_does_not_look_at_it():
    n = 300
    rows = ranking(np.arange(n, dtype=float), ids=ids_of(n))
    mask, weights = calibrated(rows, n, 90, 1.0, ids=ids_of(n))
    assert set(np.flatnonzero(mask)) == set(rows[:90].tolist())
    drawn, weights = calibrated(rows, n, 90, 0.0, ids=ids_of(n))
    backwards, _ = calibrated(rows[::-1], n, 90, 0.0, ids=ids_of(n))
    assert np.array_equal(drawn, backwards)
    assert np.unique(weights[drawn]) == pytest.approx([300 / 90])
    assert 14 < drawn[-90:].sum() < 40  # 27 by chance


@given(st.integers(1, 40), alphas, st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(n, alpha, seed, random):
    ids, scores = ids_of(n), np.arange(n) % 7.0
    shuffle = list(range(n))
    random.shuffle(shuffle)
    mixed_ids = [ids[i] for i in shuffle]
    found = []
    for these, values in ((ids, scores), (mixed_ids, scores[shuffle])):
        rows = ranking(values, ids=these, order="stratified", seed=seed)
        _, weights = calibrated(rows, n, math.ceil(n / 2), alpha, ids=these, seed=seed)
        found.append({these[row]: weights[row] for row in np.flatnonzero(~np.isnan(weights))})
    assert found[0] == found[1]


def test_the_expected_weighted_mean_is_the_mean_of_all():
    """Two of six by score, two of the other four drawn: all six pairs turn up equally often, and average exactly."""
    values = np.array([10.0, 3.0, -2.0, 7.0, 0.5, 1.0])
    rows = ranking(values, ids=ids_of(6))
    means, seeds = {}, 3000
    seen = Counter()
    for seed in range(seeds):
        mask, weights = calibrated(rows, 6, 4, 0.5, ids=ids_of(6), seed=seed)
        assert mask[[0, 3]].all()
        kept = tuple(np.flatnonzero(mask))
        seen[kept] += 1
        means[kept] = (weights[mask] * values[mask]).sum() / 6
    assert len(seen) == len(list(itertools.combinations(range(4), 2)))
    assert np.mean(list(means.values())) == pytest.approx(values.mean(), abs=1e-12)
    sigma = math.sqrt(seeds * (1 / 6) * (5 / 6))
    assert max(abs(count - seeds / 6) for count in seen.values()) < 4 * sigma


@pytest.mark.parametrize(("order", "scores"), [("hard", [1.0] * 30), ("stratified", [0.0] * 24 + [50.0] * 6)])
def test_what_the_tie_breaking_hash_passed_over_is_drawn_as_often_as_the_rest(order, scores):
    """Ties and strata take the smallest hashes; a draw by the same hash would prefer what they did not take from."""
    n, seeds, count, alpha = 30, 2000, 16, 0.5
    total = np.zeros(n)
    for seed in range(seeds):
        rows = ranking(np.array(scores), ids=ids_of(n), order=order, seed=seed)
        _, weights = calibrated(rows, n, count, alpha, ids=ids_of(n), seed=seed)
        total += np.nan_to_num(weights)
    heavy = (n - 8) / 8
    sigma = heavy * math.sqrt(seeds) / 2  # at most
    assert np.abs(total - seeds).max() < 4 * sigma  # every image counts once in expectation
    mine, theirs = total[:24].sum(), total[24:].sum()
    assert abs(mine - 24 * seeds) < 0.02 * 24 * seeds
    assert abs(theirs - 6 * seeds) < 0.03 * 6 * seeds


def test_how_many_go_by_score():
    assert [by_score(count, 0.5) for count in range(8)] == [0, 0, 1, 2, 2, 3, 3, 4]
    assert [by_score(count, 0.9) for count in (1, 2, 10, 11)] == [0, 1, 9, 10]  # at least one is drawn
    assert by_score(10, 1.0) == 10
    assert by_score(10, 0.15) == 2  # 1.5, though the binary neighbour of 0.15 is a little less


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_shares_out_of_range(alpha):
    with pytest.raises(UsageError, match=r"--calibrate .*: expected a number from 0 to 1, the share of the list"):
        calibrated(np.arange(3), 3, 2, alpha, ids=ids_of(3))
