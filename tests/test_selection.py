"""Scores -> kept set: exact counts, nesting, floors, ties and orders, against a plain reference of the formula."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune.errors import ProtopruneError, UsageError
from protoprune.ids import hashes
from protoprune.selection import ORDERS, by_key, kept_mask, orders, ranking


def ids_of(n: int) -> list[str]:
    return [f"class/{i:05d}.png" for i in range(n)]


def kept(mask) -> list[int]:
    return np.flatnonzero(mask).tolist()


# Few distinct values, so that ties are everywhere.
scores_of = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0, 2.0, -1.0, 1e-30]), min_size=1, max_size=40)
fraction = st.floats(0.001, 1.0)
order = st.sampled_from(ORDERS)
share = st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0])
drop = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])


@st.composite
def problems(draw):
    """(scores, groups): a few groups of very unequal size."""
    scores = np.array(draw(scores_of))
    names = draw(st.sampled_from([1, 2, 3, 7]))
    groups = np.array(draw(st.lists(st.integers(0, names - 1), min_size=len(scores), max_size=len(scores)))) ** 2
    return scores, groups


@given(problems(), fraction, order, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3), drop)
def test_exactly_the_rounded_fraction_is_kept(problem, keep, order, balance, seed, beta):
    scores, groups = problem
    options = {"order": order, "seed": seed, "balance": balance, "drop_hardest": beta}
    mask = kept_mask(scores, keep, ids=ids_of(len(scores)), groups=groups, **options)
    assert mask.dtype == bool
    assert mask.shape == scores.shape
    assert mask.sum() == round(keep * len(scores))


@settings(max_examples=200)
@given(problems(), order, st.one_of(st.just(0.0), share), drop)
def test_kept_sets_of_growing_fractions_are_nested(problem, order, balance, beta):
    scores, groups = problem
    n = len(scores)
    options = {"order": order, "balance": balance, "drop_hardest": beta}
    before = np.zeros(n, bool)
    for count in range(1, n + 1):
        mask = kept_mask(scores, count / n, ids=ids_of(n), groups=groups, **options)
        assert mask.sum() == count
        assert not (before & ~mask).any()
        before = mask


def floor_of(count: int, balance: float, groups: int) -> int:
    return math.floor(Fraction(str(balance)) * count / groups)


@given(problems(), fraction, order, share)
def test_every_group_gets_its_floor_or_all_it_has(problem, keep, order, balance):
    scores, groups = problem
    mask = kept_mask(scores, keep, ids=ids_of(len(scores)), order=order, groups=groups, balance=balance)
    names = np.unique(groups)
    floor = floor_of(round(keep * len(scores)), balance, len(names))
    for name in names:
        assert mask[groups == name].sum() >= min(floor, (groups == name).sum())


def formula(rows, groups, count: int, balance: float) -> set[int]:
    """Sorscher et al.: every group's first floor(b * count / groups), then the first of the rest; rows in order."""
    floor = floor_of(count, balance, len(set(groups.tolist())))
    chosen: list[int] = []
    for name in set(groups.tolist()):
        chosen += [row for row in rows if groups[row] == name][:floor]
    chosen += [row for row in rows if row not in set(chosen)][: count - len(chosen)]
    return set(chosen)


@settings(max_examples=200)
@given(problems(), order, share)
def test_balance_is_the_papers_formula(problem, order, balance):
    scores, groups = problem
    n, names = len(scores), len(np.unique(groups))
    rows = ranking(scores, ids=ids_of(n), order=order).tolist()
    for count in range(1, n + 1):
        mask = kept_mask(scores, count / n, ids=ids_of(n), order=order, groups=groups, balance=balance)
        expected = formula(rows, groups, count, balance)
        if floor_of(count, balance, names) > floor_of(count - 1, balance, names) or count == n:
            assert set(kept(mask)) == expected
        for name in np.unique(groups):  # elsewhere at most one image a group is taken early
            got = mask[groups == name].sum()
            assert abs(int(got) - len({row for row in expected if groups[row] == name})) <= 1
            # and within a group it is always the first ones that are kept
            own = [row for row in rows if groups[row] == name]
            assert {row for row in own if mask[row]} == set(own[:got])


def test_balance_by_hand():
    scores = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.0])
    groups = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    arguments = {"ids": ids_of(10), "groups": groups}
    assert kept(kept_mask(scores, 0.4, **arguments)) == [0, 1, 2, 3]  # no balance: groups do not matter
    assert kept(kept_mask(scores, 0.4, balance=0.5, **arguments)) == [0, 1, 2, 7]  # floor(0.5 * 4 / 2) = 1
    assert kept(kept_mask(scores, 0.4, balance=1, **arguments)) == [0, 1, 7, 8]
    assert kept(kept_mask(scores, 0.8, balance=1, **arguments)) == [0, 1, 2, 3, 4, 7, 8, 9]  # capped at the size


@given(problems(), fraction, order, st.sampled_from([0.0, 0.5, 1.0]), st.randoms(use_true_random=False), drop)
def test_the_order_of_the_rows_does_not_matter(problem, keep, order, balance, random, beta):
    scores, groups = problem
    ids = ids_of(len(scores))
    usable = np.array([random.random() < 0.8 for _ in scores])
    shuffle = list(range(len(scores)))
    random.shuffle(shuffle)
    arguments = {"order": order, "balance": balance, "seed": 5, "drop_hardest": beta}
    straight = kept_mask(scores, keep, ids=ids, groups=groups, usable=usable, **arguments)
    mixed = kept_mask(
        scores[shuffle],
        keep,
        ids=[ids[i] for i in shuffle],
        groups=groups[shuffle],
        usable=usable[shuffle],
        **arguments,
    )
    assert {ids[row] for row in kept(straight)} == {ids[shuffle[row]] for row in kept(mixed)}


# --- the orders, on planted data that a flipped sign fails

PLANTED = np.array([0.1, 0.9, 0.3, 0.7, 0.5])


@pytest.mark.parametrize(
    ("order", "expected"),
    [("hard", [1, 3, 4, 2, 0]), ("easy", [0, 2, 4, 3, 1]), ("middle", [4, 3, 2, 1, 0])],
)
def test_order_of_keeping(order, expected):
    assert ranking(PLANTED, ids=ids_of(5), order=order).tolist() == expected
    for count in range(1, 6):
        assert kept(kept_mask(PLANTED, count / 5, ids=ids_of(5), order=order)) == sorted(expected[:count])


def test_hard_is_the_default_and_keeps_the_largest():
    assert kept(kept_mask(PLANTED, 0.4, ids=ids_of(5))) == [1, 3]


@given(scores_of, fraction)
def test_hard_keeps_nothing_easier_than_what_it_removes(scores, keep):
    scores = np.array(scores)
    for order, sign in (("hard", 1), ("easy", -1)):
        mask = kept_mask(scores, keep, ids=ids_of(len(scores)), order=order)
        if 0 < mask.sum() < len(scores):
            assert (sign * scores[mask]).min() >= (sign * scores[~mask]).max()


@given(st.lists(st.integers(0, 1000), unique=True, min_size=1, max_size=30), fraction)
def test_middle_removes_both_ends_evenly(scores, keep):
    scores = np.array(scores, float)
    ordered = np.sort(scores)
    mask = kept_mask(scores, keep, ids=ids_of(len(scores)), order="middle")
    if mask.any():
        below, above = (ordered < scores[mask].min()).sum(), (ordered > scores[mask].max()).sum()
        assert below + above == (~mask).sum()  # one unbroken stretch of ranks
        assert 0 <= below - above <= 1  # of two equally near, the harder one is kept


def test_random_does_not_look_at_the_scores():
    n = 200
    rng = np.random.default_rng(0)
    one, other = rng.random(n), np.full(n, np.nan)
    masks = [kept_mask(scores, 0.3, ids=ids_of(n), order="random", seed=1) for scores in (one, other)]
    assert np.array_equal(*masks)
    another_seed = kept_mask(one, 0.3, ids=ids_of(n), order="random", seed=2)
    assert 5 < (masks[0] & another_seed).sum() < 35  # 60 and 60 of 200 meet in 18 by chance
    assert abs(one[masks[0]].mean() - one.mean()) < 0.12


@settings(max_examples=60)
@given(st.integers(1, 200), st.integers(1, 60), st.booleans(), st.integers(0, 10**6))
def test_ties_broken_in_pieces_are_those_of_one_sort(n, values, whole, seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, values, n) / values
    keys[rng.random(n) < 0.2] = 0.5  # a run that is longer than a piece
    rows, ties = np.arange(n) if whole else np.flatnonzero(rng.random(n) < 0.7), hashes(ids_of(n), 3)
    before = keys.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "BATCH", 7)
        upwards = by_key(keys, rows, ids_of(n), 3)
        downwards = orders.by_key(keys, rows, ids_of(n), 3, largest=True)
    assert upwards.tolist() == rows[np.lexsort((ties[rows], keys[rows]))].tolist()
    assert downwards.tolist() == rows[np.lexsort((ties[rows], -keys[rows]))].tolist()
    assert np.array_equal(keys, before)  # the caller's


def test_ties_are_broken_by_a_hash_that_the_seed_changes():
    n = 300
    scores = np.zeros(n)
    masks = [kept_mask(scores, 0.5, ids=ids_of(n), seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(masks[0], masks[1])
    assert 45 < (masks[0] & masks[2]).sum() < 105
    assert 45 < masks[0][:150].sum() < 105  # not by position
    renamed = kept_mask(scores, 0.5, ids=[one + "x" for one in ids_of(n)], seed=0)
    assert not np.array_equal(masks[0], renamed)


def test_a_tie_never_beats_a_better_score():
    scores = np.array([1.0] * 50 + [2.0] * 5 + [0.0] * 50)
    for seed in range(5):
        mask = kept_mask(scores, 20 / 105, ids=ids_of(105), seed=seed)
        assert mask[50:55].all()
        assert not mask[55:].any()


# --- strata


def budgets_of_the_authors(count: int, sizes: list[int]) -> list[int]:
    """CCS as its authors allot: smallest stratum first, each an equal part of what is left, rounded down."""
    budgets = [0] * len(sizes)
    for position, stratum in enumerate(sorted(range(len(sizes)), key=lambda one: sizes[one])):
        budgets[stratum] = min(sizes[stratum], (count - sum(budgets)) // (len(sizes) - position))
    return budgets


@settings(max_examples=150)
@given(
    st.lists(st.one_of(st.integers(0, 1000), st.integers(0, 30), st.just(700)), min_size=1, max_size=150),
    st.sampled_from([0.0, 0.3]),
)
def test_strata_get_the_authors_budgets(scores, beta):
    n, scores = len(scores), np.array(scores, float)
    left = np.sort(scores)[: n - round(beta * n)]
    low, width = int(left[0]), int(left[-1] - left[0])
    stratum = [min(49, (int(score) - low) * 50 // width) if width else 0 for score in left]  # in whole numbers
    sizes = np.bincount(stratum, minlength=50).tolist()
    for count in range(1, len(left) + 1):
        mask = kept_mask(scores, count / n, ids=ids_of(n), order="stratified", drop_hardest=beta)
        kept_stratum = [min(49, (int(score) - low) * 50 // width) if width else 0 for score in scores[mask]]
        assert np.bincount(kept_stratum, minlength=50).tolist() == budgets_of_the_authors(count, sizes)


def test_strata_are_filled_at_random_and_evenly():
    """Scores in two heaps, 900 easy and 100 hard ones: each gives half, and no part of a heap is preferred."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.uniform(0, 0.019, 900), rng.uniform(0.981, 1, 100)])
    scores[0], scores[-1] = 0, 1
    mask = kept_mask(scores, 0.1, ids=ids_of(1000), order="stratified")
    assert (mask[:900].sum(), mask[900:].sum()) == (50, 50)
    assert abs(scores[:900][mask[:900]].mean() - scores[:900].mean()) < 0.003  # 4 standard errors
    other = kept_mask(scores, 0.1, ids=ids_of(1000), order="stratified", seed=1)
    assert (mask & other)[:900].sum() < 12
    assert kept_mask(scores, 0.5, ids=ids_of(1000), order="stratified")[900:].all()  # the small one runs out


def test_strata_of_scores_without_a_range():
    assert kept_mask(np.ones(10), 0.4, ids=ids_of(10), order="stratified").sum() == 4
    infinite = np.array([0.0, 1.0, 2.0, np.inf])
    with pytest.raises(ProtopruneError, match="scores from 0 to inf cannot be cut into strata"):
        kept_mask(infinite, 0.5, ids=ids_of(4), order="stratified")
    assert not kept_mask(infinite, 0.5, ids=ids_of(4), order="stratified", drop_hardest=0.25)[3]


# --- the hardest dropped


@pytest.mark.parametrize("order", ORDERS)
def test_the_dropped_come_last_and_easiest_first(order):
    scores = np.array([3.0, 9, 1, 7, 5, 8, 0, 2, 6, 4])
    rows = ranking(scores, ids=ids_of(10), order=order, drop_hardest=0.3)
    assert scores[rows[-3:]].tolist() == [7, 8, 9]
    inner = ranking(scores, ids=ids_of(10), order=order, usable=scores < 7)
    assert rows[:7].tolist() == inner.tolist()  # the others are ordered as if the dropped were not there


def test_which_of_equals_are_dropped_is_the_same_for_every_order():
    scores = np.array([1.0] * 5 + [2.0] * 10)
    dropped = [set(ranking(scores, ids=ids_of(15), order=one, drop_hardest=0.4)[-6:].tolist()) for one in ORDERS]
    assert dropped == [dropped[0]] * len(ORDERS)
    assert min(dropped[0]) >= 5


# --- rows that cannot be used, and errors


def test_unusable_rows_are_never_kept_and_do_not_count():
    scores = np.array([np.nan, 5, 4, 3, 2, 1, np.nan])
    usable = ~np.isnan(scores)
    for order in ORDERS:
        mask = kept_mask(scores, 0.6, ids=ids_of(7), usable=usable, order=order)
        assert mask.sum() == 3  # 0.6 of 5, not of 7
        assert not mask[~usable].any()
    groups = np.array([0, 1, 1, 1, 1, 1, 2])  # two groups without a usable row take no part of the balance
    assert kept(kept_mask(scores, 0.6, ids=ids_of(7), usable=usable, groups=groups, balance=1.0)) == [1, 2, 3]


@pytest.mark.parametrize("order", ["hard", "easy", "middle", "stratified"])
def test_nan_among_usable_scores_is_an_error(order):
    with pytest.raises(ProtopruneError, match=r"2 usable images have no score \(first: row 1\)"):
        kept_mask(np.array([1, np.nan, 2, np.nan]), 0.5, ids=ids_of(4), order=order)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, 100, 150, math.nan, math.inf])
def test_fractions_out_of_range(value):
    with pytest.raises(UsageError, match=r"--keep .*above 0 and at most 1") as caught:
        kept_mask(PLANTED, value, ids=ids_of(5))
    assert caught.value.exit_code == 2
    assert ("%" in str(caught.value)) == (1 < value <= 100)


def test_percentages_get_a_hint():
    with pytest.raises(UsageError, match=r"for 70 % give 0\.7$"):
        kept_mask(PLANTED, 70, ids=ids_of(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "hardest"}, "--order hardest: expected one of hard, easy, middle, random, stratified"),
        ({"drop_hardest": 1}, "--drop-hardest 1: expected a fraction from 0 to below 1"),
        ({"drop_hardest": -0.1}, "--drop-hardest -0.1"),
        ({"drop_hardest": math.nan}, "--drop-hardest nan"),
        ({"balance": 1.5}, "--balance 1.5"),
        ({"balance": -0.5}, "--balance -0.5"),
        ({"balance": math.nan}, "--balance nan"),
    ],
)
def test_usage_errors_name_the_value(options, message):
    with pytest.raises(UsageError, match=message):
        kept_mask(PLANTED, 0.5, ids=ids_of(5), **options)


def test_keep_everything_and_nothing_to_choose_from():
    assert kept_mask(PLANTED, 1.0, ids=ids_of(5)).all()
    assert not kept_mask(PLANTED, 0.001, ids=ids_of(5)).any()
    for one in ORDERS:
        assert len(kept_mask(np.empty(0), 0.5, ids=[], order=one)) == 0
    assert not kept_mask(np.full(3, np.nan), 0.5, ids=ids_of(3), usable=np.zeros(3, bool)).any()
    nothing = {"usable": np.zeros(3, bool), "groups": np.zeros(3, int), "balance": 0.5}
    assert not kept_mask(np.full(3, np.nan), 0.5, ids=ids_of(3), **nothing).any()


def test_infinite_scores_are_scores():
    scores = np.array([1.0, np.inf, -np.inf, 2.0])
    assert ranking(scores, ids=ids_of(4)).tolist() == [1, 3, 0, 2]


def test_a_tiny_balance_is_a_balance_that_guarantees_nothing():
    scores, groups = np.arange(20.0), np.repeat([0, 1], 10)
    tiny = kept_mask(scores, 0.5, ids=ids_of(20), groups=groups, balance=1e-9)
    assert np.array_equal(tiny, kept_mask(scores, 0.5, ids=ids_of(20)))
