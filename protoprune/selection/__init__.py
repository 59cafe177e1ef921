"""Scores + keep fraction -> the kept set, as a mask.

A larger score means a harder, less prototypical example, and `keep` is always the fraction KEPT. Exactly
round(keep * m) of the m usable images are kept, the kept sets of growing fractions are nested, and ties are broken by a
seeded hash of the id, so the order of the rows never matters. Pure arrays: no files; only `covering` and `dedup` see
features.

    orders       which images first: hard, easy, middle, random, stratified; --drop-hardest
    covering     which images first to cover each group of them: kernel herding, facility location
    quotas       the same images, interleaved so that each cluster gets its share (DBP)
    floors       the first `count` of an order, with a floor for every group (--balance)
    calibration  part by order, part at random, with weights that make up for it
    dedup        near-duplicates, which leave before anything is selected
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np

from protoprune.errors import UsageError
from protoprune.selection.calibration import by_score, calibrated, check_calibration
from protoprune.selection.covering import cover
from protoprune.selection.dedup import (
    THRESHOLDS,
    Likeness,
    check_duplicates,
    near_duplicates,
)
from protoprune.selection.floors import check_balance, take
from protoprune.selection.orders import COVERS, ORDERS, by_key, check_order, dropped_count, ranking
from protoprune.selection.quotas import by_quota, complexity, complexity_shares

__all__ = [
    "COVERS", "ORDERS", "THRESHOLDS", "Likeness", "by_key", "by_quota", "by_score", "calibrated", "check",
    "check_balance", "check_calibration", "check_duplicates", "check_keep", "check_order", "complexity",
    "complexity_shares", "cover", "cut", "dropped_count", "kept_mask", "near_duplicates", "ranking",
]  # fmt: skip


def kept_mask(
    scores: np.ndarray,
    keep: float,
    *,
    ids: Sequence[str],
    order: str = "hard",
    seed: int = 0,
    usable: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    balance: float = 0.0,
    drop_hardest: float = 0.0,
) -> np.ndarray:
    """The kept set as a mask, (n,) bool.

    scores: (n,) larger = harder; ids: n relative paths; usable: (n,) bool, the rows that may be kept (default: all);
    groups: (n,) integers (class or cluster). With `balance` b every group is guaranteed floor(b * kept / groups) of
    its images, or all it has, first in `order` first; the rest is filled by `order` over all groups (the class balance
    of Sorscher et al. 2022, who used 0.5). `drop_hardest` is the fraction that comes last whatever the order.

    Raises UsageError for a fraction, order or balance out of range, ProtopruneError for a NaN score of a usable image.
    """
    rows = ranking(scores, ids=ids, order=order, seed=seed, usable=usable, drop_hardest=drop_hardest)
    return cut(rows, len(scores), keep, groups, balance)


def cut(rows: np.ndarray, n: int, keep: float, groups: np.ndarray | None = None, balance: float = 0.0) -> np.ndarray:
    """The kept set, (n,) bool, of rows that are already in keeping order (see `ranking`)."""
    check(keep, balance=balance)
    return take(rows, n, round(keep * len(rows)), groups, balance)


def check(keep: float, order: str = "hard", balance: float = 0.0) -> None:
    """Raise UsageError for a fraction, order or balance that is out of range."""
    check_keep(keep)
    check_order(order)
    check_balance(balance)


def check_keep(keep: float) -> None:
    """Raise UsageError unless `keep` is a fraction to keep."""
    if isinstance(keep, numbers.Real) and 0 < keep <= 1 and not isinstance(keep, bool):
        return
    shown = f"{keep:.12g}" if isinstance(keep, numbers.Real) else repr(keep)
    percent = isinstance(keep, numbers.Real) and 1 < keep <= 100
    hint = f"; for {keep:.12g} % give {keep / 100:.12g}" if percent else ""
    raise UsageError(f"--keep {shown}: expected the fraction to keep, above 0 and at most 1{hint}")
