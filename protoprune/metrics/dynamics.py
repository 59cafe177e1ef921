"""Statistics of one model's training -> difficulty: (epochs, n) arrays in, (n,) float32 out, larger = harder.

Rows of the arrays are consecutive recorded epochs, so a record of every fifth epoch sees only what changed between
those. What this module does not know: models (see `average`), files, labels, and which epochs were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from protoprune.errors import UsageError

WINDOW = 10  # J of Dyn-Unc and TDDS: their papers' choice
DECAY = 0.9  # of TDDS, as released


def average(models: Iterable[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    """Mean over models: pairs of values (n,) and a mask (n,) of the examples that the model counts for.

    An example that no model counts for is NaN. One model at a time, so that an iterator never holds two.
    """
    total, count = np.zeros(n), np.zeros(n, np.int64)
    for values, counts in models:
        total += np.where(counts, values, 0)
        count += counts
    with np.errstate(invalid="ignore"):
        return (total / count).astype(np.float32)


def forgetting(correct: np.ndarray) -> np.ndarray:
    """Number of forgetting events, correct -> incorrect from one epoch to the next (Toneva et al. 2019).

    correct: (epochs, n) bool. An example that was never right counts as many events as there are epochs, more than
    any other can have, as in the authors' code. Counts are small integers, so ties are many: they stay ties here, and
    `selection` breaks them by a hash of the id.
    """
    events = (correct[:-1] & ~correct[1:]).sum(axis=0)
    return np.where(correct.any(axis=0), events, len(correct)).astype(np.float32)


def aum(margin: np.ndarray) -> np.ndarray:
    """Minus the area under the margin (Pleiss et al. 2020): minus the mean over epochs of margin, (epochs, n).

    The margin is the logit of the label minus the largest other logit; mislabelled examples have the smallest area.
    """
    return (-margin.mean(axis=0, dtype=np.float64)).astype(np.float32)


def dyn_unc(true_probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Dyn-Unc (He et al. 2023): mean over all windows of J epochs of the standard deviation of the label's probability.

    true_probability: (epochs, n). The deviation is the sample one (divisor J - 1), as in the paper and its code. Fewer
    epochs than J make one window of what there is; a single epoch has no deviation, and every score is 0.
    """
    return _over_windows(true_probability, window, lambda rows: rows.std(axis=0, ddof=1), lambda age: 1.0, mean=True)


def tdds(change: np.ndarray, window: int = WINDOW, decay: float = DECAY) -> np.ndarray:
    """TDDS (Zhang et al. 2024): how much an example's change from epoch to epoch varies, later windows counting more.

    change: (epochs, n), divergence of each epoch's prediction from the one before; the first row has no epoch before it
    in the trajectory and is not used. Each window of J epochs gives the L2 norm of its J - 1 changes' deviations from
    their mean, weighted by decay * (1 - decay)^(windows after it), as in the released code. At its decay of 0.9 the
    last window decides. That code sums |p_t log(p_t / p_(t-1))| over classes where a record's `change` is the KL
    divergence, the same sum without the bars: a record holds no probabilities of all classes.
    Fewer epochs than J make one window; fewer than three have no variation, and every score is 0.
    """

    def depth(rows: np.ndarray) -> np.ndarray:
        moves = rows[1:]  # between the epochs of the window
        return np.sqrt(((moves - moves.mean(axis=0)) ** 2).sum(axis=0))

    if not 0 < decay <= 1:
        raise UsageError(f"decay {decay:g}: expected above 0 and at most 1; TDDS has 0.9")
    return _over_windows(change, window, depth, lambda age: decay * (1 - decay) ** age)


def _over_windows(
    table: np.ndarray,
    window: int,
    reduce: Callable[[np.ndarray], np.ndarray],
    weight: Callable[[int], float],
    mean: bool = False,
) -> np.ndarray:
    """Weighted sum (or mean) of `reduce` over all windows of consecutive rows; `weight` of the windows after it."""
    if window < 2:
        raise UsageError(f"--window {window}: expected at least 2 epochs; the papers have 10")
    epochs, n = table.shape
    total = np.zeros(n)
    width = min(window, epochs)
    if width < 2:
        return total.astype(np.float32)
    windows = epochs - width + 1
    for first in range(windows):
        total += weight(windows - 1 - first) * reduce(table[first : first + width].astype(np.float64))
    return (total / windows if mean else total).astype(np.float32)
