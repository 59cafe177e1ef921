"""The first `count` rows of an order, with a floor for every group. Knows nothing of what orders the rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from protoprune.bounds import check_number
from protoprune.selection.orders import place_in_group


def check_balance(balance: float) -> None:
    """Raise UsageError unless `balance` is a share."""
    check_number("--balance", balance, 0, 1)


def take(rows: np.ndarray, n: int, count: int, groups: np.ndarray | None = None, balance: float = 0.0) -> np.ndarray:
    """(n,) bool: `count` of the rows, which are in keeping order; nested for growing counts.

    groups: (n,) integers. With `balance` b every group has floor(b * count / groups) of them, or all it has.
    """
    mask = np.zeros(n, bool)
    if groups is None or balance == 0 or count == 0:
        mask[rows[:count]] = True
    else:
        mask[rows[_balanced(groups[rows], count, balance)]] = True
    return mask


def _numbered(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the groups that there are, ascending; the place of each image's own in them): np.unique without its sorting."""
    lowest, highest = int(groups.min()), int(groups.max())
    if highest - lowest > 4 * len(groups):
        return np.unique(groups, return_inverse=True)
    number = groups - lowest
    present = np.zeros(highest - lowest + 1, bool)
    present[number] = True
    place_of = np.cumsum(present, dtype=np.int32) - np.int32(1)
    return np.flatnonzero(present) + lowest, place_of[number]


def _balanced(groups: np.ndarray, count: int, balance: float) -> np.ndarray:
    """(m,) bool: which of the rows, given in keeping order, are kept when every group has a floor.

    The plain formula (floors first, then the best of the rest) is not nested: when the floor rises by one, every group
    takes an image at once. Here the images due at the next rise are taken early, as late as possible before it, so each
    larger set contains the smaller ones. At the rises both agree; between them they differ by at most one image a
    group.
    """
    names, group = _numbered(groups)
    sizes = np.bincount(group)
    place = place_in_group(group, sizes)  # 0 for the first of its group
    share = Fraction(str(balance))  # the number that was written, not its binary neighbour
    floor = math.floor(share * count / len(names))
    deadline = math.ceil((floor + 1) * len(names) / share)  # the count at which the floor is one higher

    def plain(size: int) -> np.ndarray:
        kept = place < floor
        rest = np.flatnonzero(~kept)
        kept[rest[: size - int(kept.sum())]] = True
        return kept

    def due(kept: np.ndarray) -> np.ndarray:
        """Groups that have not yet what the next floor asks of them."""
        return np.bincount(group[kept], minlength=len(names)) < np.minimum(floor + 1, sizes)

    def slack(size: int) -> int:
        return deadline - size - int(due(plain(size)).sum())

    if deadline > len(group) or slack(count) >= 0:
        return plain(count)
    low, high = math.ceil(floor * len(names) / share), count  # slack(low) >= 0 > slack(high), and slack never rises
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if slack(middle) >= 0 else (low, middle)
    kept = plain(low)
    waiting = np.flatnonzero(due(kept)[group] & (place == floor))
    kept[waiting[: count - low]] = True
    return kept
