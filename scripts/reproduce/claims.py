"""Claims of papers and the verdicts on them, one way for every experiment.

A claim is about one or several mean differences, most of them paired by seed. They are tested together, two-sided,
with Holm's correction (`protoprune.evaluation.statistics`): it holds where every difference is beyond chance on its
side of the margin, it does not hold as soon as one is on the other side, and anything else is undecided. So neither
verdict comes easier than the other. What this module does not know: experiments, and how a difference came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from protoprune.evaluation import statistics
from protoprune.evaluation.statistics import Difference

HOLDS, FAILS, OPEN = VERDICTS = ("holds", "does not hold", "undecided")
RESOLUTION = 5e-4  # of an accuracy: an image of the smallest test set here; a smaller deviation is not believed


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what was found here."""

    claim: str  # as one sentence
    source: str  # paper and figure or section
    found: str  # numbers, with intervals and n
    verdict: str  # one of VERDICTS

    def __post_init__(self):
        assert self.verdict in VERDICTS, self.verdict


def gap(values: Sequence[float], reference: Sequence[float] | float = 0.0, *, one_draw: bool = False) -> Difference:
    """The mean of values less reference, (seeds,) each; one_draw: the values are of one list for all seeds."""
    reference = np.broadcast_to(reference, np.shape(values))
    return statistics.compare(values, reference, one_draw=one_draw, resolution=RESOLUTION)


def gaps(found: Mapping[str, Sequence[float]], one: str, other: str, keeps: Iterable[float]) -> dict[str, Difference]:
    """{'30%': the difference of two methods there}; `found` are accuracies by 'method 0.3', one a seed."""
    return {f"{keep:.0%}": gap(found[f"{one} {keep:g}"], found[f"{other} {keep:g}"]) for keep in keeps}


def spanned(mean: float, low: float, high: float, n: int) -> Difference:
    """A difference of which an interval is known, such as one by bootstrap over n images."""
    return beyond(Difference(mean, low, high, low, high, 1.0, n), 0.0)


def beyond(one: Difference, margin: float) -> Difference:
    """The same difference tested against a margin in the place of 0."""
    if one.low is None:
        return one
    from scipy.stats import t

    error = (one.high - one.low) / (2 * t.ppf(0.975, one.n - 1))
    distance = one.difference - margin
    p = 1.0 if distance == 0 else 0.0 if error == 0 else float(2 * t.sf(abs(distance) / error, one.n - 1))
    return replace(one, difference=distance, p=p)


def sides(gaps: Iterable[Difference], margin: float = 0.0) -> list[str]:
    """'better', 'worse' or 'undecided' than the margin for each, all of them together (Holm)."""
    return [one.verdict for one in statistics.judge([beyond(one, margin) for one in gaps])]


def decide(gaps: Iterable[Difference], *, margin: float = 0.0, want: str = "better", some: bool = False) -> str:
    """The verdict on a claim that every difference is above the margin, or with want = 'worse' below it.

    some: one above it is enough, where none is below, and it does not hold where one is below and none above.
    """
    found = sides(gaps, margin)
    right, wrong = found.count(want), found.count({"better": "worse", "worse": "better"}[want])
    if wrong:
        return OPEN if some and right else FAILS
    return HOLDS if right and (some or right == len(found)) else OPEN


def same(gaps: Iterable[Difference], margin: float) -> str:
    """The verdict on a claim that every difference is within the margin of 0, on both sides."""
    gaps = list(gaps)
    turned = [replace(one, difference=-one.difference, low=-one.high, high=-one.low) for one in gaps if one.n > 1]
    return decide([*gaps, *turned], margin=-margin)


def span(one: Difference, unit: float = 100) -> str:
    """'+1.20 (+0.40 to +2.00)', a difference of accuracies in points; with one seed the mean alone."""
    return interval_text(one.difference, one.low, one.high, unit)


def interval_text(mean: float, low: float | None, high: float | None, unit: float = 100) -> str:
    """The same of a mean and the ends of its interval."""
    ends = "" if low is None or high is None else f" ({unit * low:+.2f} to {unit * high:+.2f})"
    return f"{unit * mean:+.2f}{ends}"


def listed(gaps: Mapping[str, Difference]) -> str:
    """'80 % kept +1.20 (+0.40 to +2.00); 60 % kept … points, 5 seeds'."""
    seeds = max(one.n for one in gaps.values())
    return "; ".join(f"{name} {span(one)}".strip() for name, one in gaps.items()) + f" points, {seeds} seeds"


def gathered(rows: Iterable[Mapping], names: Sequence[str], value: str) -> dict[tuple, np.ndarray]:
    """{the row's values of `names`: (seeds, …) of its column `value`} of rows of a table."""
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row[value])
    return {key: np.array(values) for key, values in found.items()}


def claim(text: str, source: str, gaps: Mapping[str, Difference], about: str = "", **how) -> Claim:
    """A claim about differences of accuracies by their names; `how` is that of `decide`."""
    return Claim(text, source, f"{about}{listed(gaps)}", decide(gaps.values(), **how))


def bars(axes, places: Sequence[float], rows: Iterable[Sequence[float]], style: str = "o-", **how) -> None:
    """Means of (seeds,) rows with their 95 % intervals, in points."""
    spans = [statistics.mean_interval(100 * np.asarray(row)) for row in rows]
    half = [0 if one.low is None else one.mean - one.low for one in spans]
    axes.errorbar(list(places), [one.mean for one in spans], half, fmt=style, **{"capsize": 2, "ms": 4, "lw": 1} | how)


def fractions_axis(axes, keeps: Sequence[float], **more) -> None:
    """A logarithmic axis of fractions kept, in %, named at these."""
    axes.set(xscale="log", **{"xlabel": "kept, %"} | more)
    axes.set_xticks([100 * keep for keep in keeps], [f"{100 * keep:g}" for keep in keeps])
    axes.minorticks_off()
