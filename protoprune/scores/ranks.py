"""How two rankings of the same rows compare. Pure arrays: no files, no names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two score arrays over the rows that both have; 1.0 when one of them is constant on both."""
    from scipy.stats import rankdata

    both = ~(np.isnan(a) | np.isnan(b))
    x, y = rankdata(a[both]), rankdata(b[both])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 1.0 if np.ptp(x) == np.ptp(y) else 0.0
    return float(np.corrcoef(x, y)[0, 1])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the images kept by mask a that mask b keeps too (masks of equal size)."""
    return float((a & b).sum() / max(1, a.sum()))


def mean_overlap(masks: Sequence[np.ndarray]) -> float:
    """Mean `overlap` over all pairs; 1.0 for a single mask."""
    pairs = [overlap(a, b) for a, b in itertools.combinations(masks, 2)]
    return float(np.mean(pairs)) if pairs else 1.0
