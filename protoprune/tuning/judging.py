"""The winner on images that chose nothing: against random lists, random lists with even classes, and everything.

Pure: arrays of right and wrong answers in, comparisons out. The interval of a difference to random lists holds the
seeds and the luck of one draw (see `evaluation.statistics`). That luck is measured on the images that judge, so it
holds the part that is theirs too: a list which suits just these images better is one of the lucky draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from protoprune.evaluation import statistics
from protoprune.evaluation.statistics import Difference, Interval
from protoprune.tuning import halving


@dataclass(frozen=True)
class Judgement:
    """What the images that chose nothing say. All as shares of them, from 0 to 1."""

    accuracy: float
    random: float  # means over draws
    balanced: float
    everything: float
    to_random: Difference
    to_balanced: Difference
    balanced_to_random: Difference
    to_everything: Interval  # list less everything
    random_to_everything: Interval
    balanced_to_everything: Interval
    images: int  # that judged
    seeds: int

    @property
    def better(self) -> bool:
        """Whether the list beats random lists and those with even classes.

        Both have to be shown, so neither needs a correction: where one is not so, this errs at most at the rate that
        the one comparison does.
        """
        return all(one.verdict == "better" for one in (self.to_random, self.to_balanced))

    @property
    def worse(self) -> bool:
        return any(one.verdict == "worse" for one in (self.to_random, self.to_balanced))

    @property
    def even_better(self) -> bool:
        """Whether random lists with even classes beat random lists, each seed drawing its own of both."""
        return self.balanced_to_random.verdict == "better"


def judge(right: dict[str, np.ndarray], *, confidence: float = 0.95) -> Judgement:
    """right: {'list', 'random', 'balanced', 'everything'} -> (seeds, images) bool, the answers of one model a seed."""
    full = right["everything"].mean(axis=0)  # (images,)
    means = {name: float(rows.mean()) for name, rows in right.items()}
    seeds, images = right["list"].shape
    gaps = {
        name: replace(statistics.over_images(rows.mean(axis=0) - full, confidence=confidence), n=seeds)
        for name, rows in right.items()
    }
    return Judgement(
        means["list"], means["random"], means["balanced"], means["everything"],
        _compared(right["list"], right["random"], confidence, one_draw=True),
        _compared(right["list"], right["balanced"], confidence, one_draw=True),
        _compared(right["balanced"], right["random"], confidence, one_draw=False),
        gaps["list"], gaps["random"], gaps["balanced"], images, seeds,
    )  # fmt: skip


def _compared(ours: np.ndarray, others: np.ndarray, confidence: float, *, one_draw: bool) -> Difference:
    """Answers, (seeds, images) bool, against others, with the verdict; `one_draw`: ours are of one list."""
    one = statistics.compare(
        ours.mean(axis=1), others.mean(axis=1), one_draw=one_draw, confidence=confidence, resolution=1 / ours.shape[1]
    )
    return statistics.judge([one], confidence=confidence)[0]


def resampled(gaps: np.ndarray) -> Interval:
    """Mean and 95 % interval of (splits,) differences whose training parts overlap: the corrected resampled t.

    Nadeau & Bengio 2003: the variance of the mean is (1 / splits + held out / trained on) s^2.
    """
    n, mean = len(gaps), float(np.mean(gaps))
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt((1 / n + 1 / (halving.FOLDS - 1)) * np.var(gaps, ddof=1))
    return Interval(mean, mean - half, mean + half, n)
