"""Calibrated pruning (Ayed & Hayou 2023): part of the budget by score, the rest at random with larger weights.

The weighted kept set stands for all images without bias: an image taken by score counts once, one drawn at random
counts for all those that could have been drawn. Knows nothing of scores: rows come in keeping order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from protoprune.bounds import check_number
from protoprune.ids import shuffled
from protoprune.selection.floors import take


def check_calibration(alpha: float) -> None:
    """Raise UsageError unless `alpha` is a share."""
    check_number("--calibrate", alpha, 0, 1, ", the share of the list that goes by score")


def calibrated(
    rows: np.ndarray,
    n: int,
    count: int,
    alpha: float,
    *,
    ids: Sequence[str],
    seed: int = 0,
    groups: np.ndarray | None = None,
    balance: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows, which are in keeping order: (n,) bool mask and (n,) float64 weights, NaN where not kept.

    a = round(alpha * count) are the first ones, with weight 1 (their choice honours `balance`, see `floors.take`); the
    others are drawn uniformly from the m - a that are left, with weight (m - a) / (count - a). Below alpha = 1 at least
    one is drawn, so that the weights always add up to m; alpha = 1 draws none and all weights are 1. For growing
    counts the sets are nested: a grows by one or not at all, and the draw is the start of one fixed random order
    without those taken by score.
    """
    check_calibration(alpha)
    first = take(rows, n, by_score(count, alpha), groups, balance)
    rest = rows[~first[rows]]
    drawn = count - int(first.sum())
    # Not the hash that breaks ties and fills strata: the rows that it left over are not a random order any more.
    chosen = shuffled(rest, ids, seed, b"calibrate")[:drawn]
    weights = np.full(n, np.nan)
    weights[first] = 1.0
    if drawn:
        weights[chosen] = len(rest) / drawn
    return ~np.isnan(weights), weights


def by_score(count: int, alpha: float) -> int:
    """How many of `count` go by score; it never grows by more than one while `count` grows by one."""
    if alpha == 1 or count == 0:
        return count
    share = Fraction(str(alpha))  # the number that was written, not its binary neighbour
    return min(math.floor(share * count + Fraction(1, 2)), count - 1)
