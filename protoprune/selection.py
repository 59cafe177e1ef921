"""Scores + keep fraction -> the kept set, as a mask.

A larger score means a harder, less prototypical example, and `keep` is always the fraction KEPT. Exactly
round(keep * m) of the m usable images are kept, the kept sets of growing fractions are nested, and ties are broken by a
seeded hash of the id, so the order of the rows never matters. Pure arrays: no files, no features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from protoprune.errors import ProtopruneError, UsageError

ORDERS = ("hard", "easy", "middle", "random")


def select(
    scores: np.ndarray,
    keep: float,
    *,
    ids: Sequence[str],
    order: str = "hard",
    seed: int = 0,
    usable: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    balance: float = 0.0,
) -> np.ndarray:
    """The kept set as a mask, (n,) bool.

    scores: (n,) larger = harder; ids: n relative paths; usable: (n,) bool, the rows that may be kept (default: all);
    groups: (n,) integers (class or cluster). With `balance` b every group is guaranteed floor(b * kept / groups) of
    its images, or all it has, first in `order` first; the rest is filled by `order` over all groups (the class balance
    of Sorscher et al. 2022, who used 0.5).

    Raises UsageError for a fraction, order or balance out of range, ProtopruneError for a NaN score of a usable image.
    """
    return cut(ranking(scores, ids=ids, order=order, seed=seed, usable=usable), len(scores), keep, groups, balance)


def cut(rows: np.ndarray, n: int, keep: float, groups: np.ndarray | None = None, balance: float = 0.0) -> np.ndarray:
    """The kept set, (n,) bool, of rows that are already in keeping order (see `ranking`)."""
    check(keep, balance=balance)
    count = round(keep * len(rows))
    mask = np.zeros(n, bool)
    if groups is None or balance == 0 or count == 0:
        mask[rows[:count]] = True
    else:
        mask[rows[_balanced(groups[rows], count, balance)]] = True
    return mask


def ranking(
    scores: np.ndarray, *, ids: Sequence[str], order: str = "hard", seed: int = 0, usable: np.ndarray | None = None
) -> np.ndarray:
    """The usable rows, (m,) int64, in the order in which they are kept: row 0 first."""
    check(1, order)
    rows = np.arange(len(scores)) if usable is None else np.flatnonzero(usable)
    if order == "random":
        return rows[np.argsort(_hashes([ids[row] for row in rows], seed), kind="stable")]
    values = np.asarray(scores, np.float64)[rows]
    if np.isnan(values).any():
        row = rows[np.flatnonzero(np.isnan(values))[0]]
        raise ProtopruneError(f"{int(np.isnan(values).sum())} usable images have no score (first: row {row})")
    rows = rows[_sorted_with_hashed_ties(-values if order == "hard" else values, rows, ids, seed)]
    if order == "middle":  # nearest to the median rank first; of two equally near the harder one
        position = np.arange(len(rows))
        rows = rows[np.lexsort((-position, np.abs(2 * position - (len(rows) - 1))))]
    return rows


def check(keep: float, order: str = "hard", balance: float = 0.0) -> None:
    """Raise UsageError for a fraction, order or balance that is out of range."""
    if not 0 < keep <= 1:
        hint = f"; for {keep:g} % give {keep / 100:g}" if 1 < keep <= 100 else ""
        raise UsageError(f"--keep {keep:g}: expected the fraction to keep, above 0 and at most 1{hint}")
    if order not in ORDERS:
        raise UsageError(f"--order {order}: expected one of {', '.join(ORDERS)}")
    if not 0 <= balance <= 1:
        raise UsageError(f"--balance {balance:g}: expected a number from 0 to 1")


def _hashes(ids: Sequence[str], seed: int) -> np.ndarray:
    """(n,) uint64: a hash of each id that depends on the seed."""
    key = seed.to_bytes(8, "little", signed=True)
    encoded = (one.encode("utf-8", "surrogateescape") for one in ids)
    joined = b"".join(hashlib.blake2b(one, digest_size=8, key=key).digest() for one in encoded)
    return np.frombuffer(joined, "<u8")


def _sorted_with_hashed_ties(keys: np.ndarray, rows: np.ndarray, ids: Sequence[str], seed: int) -> np.ndarray:
    """Positions that sort `keys` upwards; only the ids of tied rows are hashed, since hashing all takes seconds."""
    by_key = np.argsort(keys, kind="stable")
    ordered = keys[by_key]
    same_as_next = ordered[1:] == ordered[:-1]
    tied = np.zeros(len(keys), bool)
    tied[1:] |= same_as_next
    tied[:-1] |= same_as_next
    if tied.any():
        positions = by_key[tied]
        hashes = _hashes([ids[rows[position]] for position in positions], seed)
        by_key[tied] = positions[np.lexsort((hashes, keys[positions]))]
    return by_key


def _balanced(groups: np.ndarray, count: int, balance: float) -> np.ndarray:
    """(m,) bool: which of the rows, given in keeping order, are kept when every group has a floor.

    The plain formula (floors first, then the best of the rest) is not nested: when the floor rises by one, every group
    takes an image at once. Here the images due at the next rise are taken early, as late as possible before it, so each
    larger set contains the smaller ones. At the rises both agree; between them they differ by at most one image a
    group.
    """
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    place = _place_in_group(group, sizes)  # 0 for the first of its group
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


def _place_in_group(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(m,) position of each row among the rows of its own group."""
    by_group = np.argsort(group, kind="stable")
    place = np.empty(len(group), np.int64)
    place[by_group] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place
