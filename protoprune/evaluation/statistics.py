"""Accuracies over seeds -> intervals, paired differences and verdicts.

Pure numbers: knows nothing of training, lists or files. The one decision taken here is what "better than random" means.

A list is one fixed set of images, and a random list of its size is better or worse than the average random list too, by
the luck of its draw. Training that one list with many seeds measures its luck ever more exactly, but does not remove
it: a paired t test over seeds calls a random list "better" or "worse" far more often than at the 5 % it promises (up
to 30 % with five seeds). So for a list the variance of the mean difference is

    s_d^2 / n  +  s_r^2        s_d: paired differences, s_r: random subsets, one drawn for each seed

where s_r^2 bounds the luck of one draw from above (it holds the training noise as well). With t on n - 1 degrees of
freedom the rate of false verdicts is then at most the stated one: the mean is independent of both variances, and a
positive mixture of chi-squares is less dispersed than a single one. What is drawn anew for each seed (a sampler) has
no such luck in common, and gets the plain paired t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit  # scipy.stats, which calls these, takes a second to import

from protoprune.bounds import check_confidence
from protoprune.errors import UsageError
from protoprune.units import rounded


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its two-sided t interval; low and high are None with one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high); the mean twice where one seed gives no interval."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Difference:
    """A paired difference to a reference. Positive means better; all in the unit of the values (accuracy: 0 to 1)."""

    difference: float
    low: float | None  # the interval that p and the verdict rest on: seeds, and for a list the luck of its draw
    high: float | None
    seeds_low: float | None  # the interval over seeds alone: of this very list against the average random one
    seeds_high: float | None
    p: float | None  # two-sided, for no difference
    n: int
    p_adjusted: float | None = None  # Holm, over all comparisons of one command
    verdict: str = "undecided"  # better, worse or undecided

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high); the difference twice where one seed gives no interval."""
        return (self.difference,) * 2 if self.low is None or self.high is None else (self.low, self.high)


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, share: bool = False) -> Interval:
    """Mean and t interval of (n,) values, n >= 1; of a `share` the part of it from 0 to 1, which covers as often."""
    own = _values(values)
    n, mean = len(own), float(np.mean(own))
    if n == 1:
        return Interval(mean, None, None, 1)
    half = _quantile(confidence, n) * math.sqrt(own.var(ddof=1) / n)
    low, high = mean - half, mean + half
    return Interval(mean, max(low, 0.0), min(high, 1.0), n) if share else Interval(mean, low, high, n)


def share_of_images(right: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The share of (n,) bool with Wilson's interval (1927), which has a width where all are right, too."""
    from scipy.stats import binomtest

    check_confidence(confidence)
    found = binomtest(int(np.sum(right)), len(right)).proportion_ci(confidence, method="wilson")
    return Interval(float(np.mean(right)), found.low, found.high, len(right))


def over_images(gaps: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean and interval of (n,) paired differences from -1 to 1, one a test image.

    Agresti & Min's (2005), who add half an image to each cell of right and wrong: an interval of no width, where both
    are right about the same few images, would say that they always are.
    """
    n, mean = len(gaps), float(np.mean(gaps))
    centre = mean * n / (n + 2)
    half = _normal(confidence) * math.sqrt(((np.square(gaps).sum() + 1) / (n + 2) - centre**2) / (n + 2))
    return Interval(mean, max(centre - half, -1.0), min(centre + half, 1.0), n)


def compare(
    values: Sequence[float] | np.ndarray,
    reference: Sequence[float] | np.ndarray,
    *,
    one_draw: bool,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> Difference:
    """The mean of values - reference, (n,) each and paired by seed, with its interval and p value; no verdict yet.

    one_draw: the values belong to one fixed list, the reference to a random subset drawn for each seed (see above).
    resolution: the smallest step of the values (1 / test images), below which a standard deviation is not believed: two
    seeds that happen to agree would otherwise prove anything.
    """
    ours, theirs = _values(values), _values(reference)
    if ours.shape != theirs.shape:
        raise UsageError(f"{len(ours)} values against {len(theirs)}: a paired difference needs the same seeds")
    gap = ours - theirs
    n, mean = len(gap), float(gap.mean())
    if n == 1:
        return Difference(mean, None, None, None, None, None, 1)
    seeds = math.sqrt(max(gap.var(ddof=1), resolution**2) / n)
    luck = max(theirs.var(ddof=1), resolution**2) if one_draw else 0.0
    error = math.sqrt(seeds**2 + luck)
    quantile = _quantile(confidence, n)
    p = 1.0 if mean == 0 else 0.0 if error == 0 else float(2 * stdtr(n - 1, -abs(mean) / error))
    return Difference(
        mean, mean - quantile * error, mean + quantile * error, mean - quantile * seeds, mean + quantile * seeds, p, n
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p values, (m,): rejecting where they are <= a errs anywhere at most at the rate a."""
    p = np.asarray(p_values, np.float64)
    m = len(p)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (m - np.arange(m))))
    return adjusted


def judge(comparisons: Sequence[Difference], *, confidence: float = 0.95) -> list[Difference]:
    """The comparisons with Holm-adjusted p values and verdicts: all of them err at most at the rate 1 - confidence."""
    adjusted = iter(holm([one.p for one in comparisons if one.p is not None]))
    judged = []
    for one in comparisons:
        if one.p is None:
            judged.append(one)
            continue
        p = float(next(adjusted))
        shown = p <= 1 - confidence
        verdict = ("better" if one.difference > 0 else "worse") if shown else "undecided"
        judged.append(replace(one, p_adjusted=p, verdict=verdict))
    return judged


def sentence(one: Difference, *, against: str = "random") -> str:
    """The verdict in words, accuracies in points (hundredths): never more than the interval supports."""
    if one.low is None or one.high is None or one.seeds_low is None or one.seeds_high is None:
        return f"{_points(one.difference)} points against {against}, but one seed gives no interval and so no verdict"
    if one.verdict != "undecided":
        size, near, far = abs(one.difference), *sorted((abs(one.low), abs(one.high)))
        span = f"{_points(near)} to {_points(far)}, {one.n} seeds"
        return f"{one.verdict} than {against} by {_points(size)} points ({span})"
    span = f"{_points(one.low)} to {_points(one.high)}, {one.n} seeds"
    text = f"no difference to {against} shown at this n ({_points(one.difference)} points, {span})"
    if one.low > 0 or one.high < 0:
        return text + "; its own interval leaves 0 out, but not after allowing for the other comparisons"
    if one.seeds_low > 0 or one.seeds_high < 0:
        return text + "; such a gap to the average random list can be the luck of one draw"
    return text


def span(value: float, low: float | None, high: float | None, *, sign: str = "", digits: int = 1) -> str:
    """'92.31 (92.02 to 92.60)' of fractions; the value alone where there is no interval."""
    text, *ends = ("" if one is None else rounded(100 * one, digits, sign) for one in (value, low, high))
    return f"{text} ({' to '.join(ends)})" if all(ends) else text


def _points(value: float) -> str:
    return rounded(100 * value)


def _quantile(confidence: float, n: int) -> float:
    check_confidence(confidence)
    return float(stdtrit(n - 1, (1 + confidence) / 2))


def _normal(confidence: float) -> float:
    check_confidence(confidence)
    return float(ndtri((1 + confidence) / 2))


def _values(values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise UsageError(f"values {found.tolist()}: expected one finite number a seed")
    return found
