"""Intervals against scipy, Holm against its definition, and the rate of false verdicts against the stated one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from protoprune.errors import UsageError
from protoprune.evaluation.statistics import (
    compare,
    holm,
    judge,
    mean_interval,
    over_images,
    sentence,
    share_of_images,
)

VALUES = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@given(VALUES, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_students(values, confidence):
    got = mean_interval(values, confidence=confidence)
    error = stats.sem(values)
    low, high = stats.t.interval(confidence, len(values) - 1, np.mean(values), error) if error else (got.mean,) * 2
    assert (got.mean, got.low, got.high) == pytest.approx((np.mean(values), low, high), abs=1e-12)
    assert got.n == len(values)


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_interval_of_a_share_is_wilsons(right, images):
    right = min(right, images)
    got = share_of_images(np.arange(images) < right)
    low, high = stats.binomtest(right, images).proportion_ci(method="wilson")
    assert (got.mean, got.low, got.high) == pytest.approx((right / images, low, high))


def test_paired_differences_over_images():
    """By hand: 3 of 10 images are right with the one alone, 1 with the other alone; half an image more in each cell."""
    got = over_images(np.array([1, 1, 1, -1] + 6 * [0]))
    half = stats.norm.ppf(0.975) * np.sqrt((3.5 + 1.5) - 2**2 / 12) / 12
    assert (got.mean, got.low, got.high) == pytest.approx((0.2, 2 / 12 - half, 2 / 12 + half))
    same = over_images(np.zeros(30))
    assert -0.1 < same.low < same.mean == 0 < same.high < 0.1


def test_intervals_over_few_images_cover_as_often_as_stated():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        drawn = rng.choice(3, 60, p=[0.95, 0.04, 0.01])
        share, gap = share_of_images(drawn == 0), over_images((drawn == 1) - 1.0 * (drawn == 2))
        covered += [share.low <= 0.95 <= share.high, gap.low <= 0.03 <= gap.high]
    assert (covered > 0.93 * 400).all()


def test_one_seed_gives_no_interval_and_no_verdict():
    assert mean_interval([0.7]).low is None
    (one,) = judge([compare([0.9], [0.5], one_draw=True)])
    assert (one.difference, one.low, one.p, one.verdict) == (pytest.approx(0.4), None, None, "undecided")
    assert "no interval" in sentence(one)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8))
def test_what_is_drawn_for_each_seed_gets_the_paired_t_test(pairs):
    ours, theirs = map(np.array, zip(*pairs, strict=True))
    if np.ptp(ours - theirs) < 1e-6:
        return
    got = compare(ours, theirs, one_draw=False)
    assert got.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=1e-12)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high))
    assert (got.seeds_low, got.seeds_high) == (got.low, got.high)


def test_a_list_is_judged_by_the_spread_of_random_lists_too():
    """By hand: differences 3, 2, 4 points, random lists 1 point apart."""
    ours, theirs = [0.53, 0.53, 0.53], [0.50, 0.51, 0.49]
    error = np.sqrt(0.01**2 / 3 + 0.01**2)
    got = compare(ours, theirs, one_draw=True)
    assert got.difference == pytest.approx(0.03)
    assert got.p == pytest.approx(2 * stats.t.sf(0.03 / error, 2))
    assert got.high - got.difference == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert got.seeds_high - got.difference == pytest.approx(stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3))


def test_seeds_that_agree_to_the_last_image_prove_no_more_than_one_image_can():
    ours, theirs = [0.52, 0.52], [0.51, 0.51]
    assert compare(ours, theirs, one_draw=False).p == 0
    assert compare(ours, theirs, one_draw=False, resolution=0.01).p > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def null_rates(lists: int, subset: float, training: float, *, one_draw: bool, seeds: int = 5, trials: int = 600):
    """Share of null commands with any verdict: each list a random subset itself, its luck of spread `subset`."""
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(trials):
        random = subset * rng.normal(size=seeds) + training * rng.normal(size=seeds)
        luck = subset * rng.normal(size=(lists, 1))
        ours = luck + training * rng.normal(size=(lists, seeds))
        verdicts = judge([compare(one, random, one_draw=one_draw) for one in ours])
        false += any(one.verdict != "undecided" for one in verdicts)
    return false / trials


@pytest.mark.parametrize(("lists", "subset", "training"), [(1, 1.0, 0.0), (1, 1.0, 1.0), (1, 0.0, 1.0), (4, 1.0, 0.5)])
def test_random_lists_get_a_verdict_at_most_at_the_stated_rate(lists, subset, training):
    bound = stats.binom.ppf(0.999, 600, 0.05) / 600
    assert null_rates(lists, subset, training, one_draw=True) <= bound


def test_the_plain_paired_test_would_not_hold_the_rate_for_a_list():
    """Why `one_draw` is there: seeds measure one list's luck ever better, and do not remove it."""
    assert null_rates(1, 1.0, 0.3, one_draw=False) > 0.15
    assert null_rates(1, 0.0, 1.0, one_draw=False) == pytest.approx(0.05, abs=0.03)  # without luck it does


def test_a_verdict_says_the_direction_and_the_size():
    random = np.array([0.70, 0.71, 0.69, 0.70, 0.70])
    better, worse = judge(
        [compare(random + 0.05, random, one_draw=True), compare(random - 0.05, random, one_draw=True)]
    )
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert sentence(better).startswith("better than random by 5.0 points (")
    assert "5 seeds" in sentence(better)
    assert sentence(worse) == sentence(better).replace("better", "worse")


def test_without_support_no_verdict_is_worded():
    random = [0.70, 0.72, 0.68, 0.71]
    (close,) = judge([compare([0.71, 0.70, 0.70, 0.71], random, one_draw=True)])
    assert close.verdict == "undecided"
    assert sentence(close).startswith("no difference to random shown at this n (")
    # Seeds alone would call this better: 3 points above the average random list, which themselves are 2 apart.
    (lucky,) = judge([compare([0.73, 0.75, 0.71, 0.74], random, one_draw=True)])
    assert lucky.seeds_low > 0
    assert lucky.verdict == "undecided"
    assert "luck of one draw" in sentence(lucky)


def test_holm_takes_back_what_one_of_many_would_be_given():
    random = np.array([0.70, 0.71, 0.69, 0.70, 0.705])
    edge = compare(random + 0.025 + np.array([0.001, -0.001, 0, 0, 0]), random, one_draw=True)
    assert 0.025 < edge.p < 0.05
    assert judge([edge])[0].verdict == "better"
    two = judge([edge, compare(random, random, one_draw=True)])[0]
    assert two.verdict == "undecided"
    assert two.low > 0
    assert "other comparisons" in sentence(two)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [[0.5], [0.6]]])
def test_values_that_are_not_one_number_a_seed_are_refused(values):
    with pytest.raises(UsageError, match="finite number a seed"):
        mean_interval(values)


def test_other_mistakes_are_named():
    with pytest.raises(UsageError, match="same seeds"):
        compare([0.5, 0.6], [0.5], one_draw=True)
    with pytest.raises(UsageError, match="confidence 95"):
        mean_interval([0.5, 0.6], confidence=95)


def test_the_interval_of_a_share_ends_at_0_and_1():
    wide = mean_interval([0.6, 0.9])
    share = mean_interval([0.6, 0.9], share=True)
    assert wide.low < 0
    assert wide.high > 1
    assert (share.low, share.high, share.mean) == (0, 1, wide.mean)
    assert mean_interval([0.6, 0.61, 0.6], share=True) == mean_interval([0.6, 0.61, 0.6])


def test_one_seed_is_said_with_what_it_is_against():
    one = compare([0.5], [0.6], one_draw=True)
    assert sentence(one) == "-10.0 points against random, but one seed gives no interval and so no verdict"
