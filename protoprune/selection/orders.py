"""The order in which images are kept: by score, by stratum of the score or at random, ties broken by a seeded hash.

Knows nothing of how many are kept: every order is a ranking, so growing fractions are nested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from protoprune.bounds import check_number
from protoprune.errors import ProtopruneError, UsageError
from protoprune.ids import hashes_of, row_type, shuffled
from protoprune.paths import BATCH

ORDERS = ("hard", "easy", "middle", "random", "stratified")
COVERS = ("cover", "facility")  # orders that look at features, not at scores: see `covering`
STRATA = 50  # of Zheng et al. 2022, "Coverage-centric coreset selection for high pruning rates"


def ranking(
    scores: np.ndarray,
    *,
    ids: Sequence[str],
    order: str = "hard",
    seed: int = 0,
    usable: np.ndarray | None = None,
    drop_hardest: float = 0.0,
    arrange: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The usable rows, (m,) int64, in the order in which they are kept: row 0 first.

    - hard, easy: largest or smallest score first;
    - middle: nearest to the median rank first, of two equally near the harder one;
    - random: by the seeded hash of the id, whatever the scores;
    - stratified: CCS (Zheng et al. 2022): the range of the scores is cut into 50 strata of equal width which get equal
      budgets, or all they have, each filled at random. An odd image goes to the larger stratum;
    - cover, facility: as `arrange` puts the rows that it is given, ascending; it knows the features (see `covering`).

    With `drop_hardest` beta the round(beta * m) hardest rows come last, easiest first, and take no part in the order.

    Raises UsageError for an order or beta out of range, ProtopruneError for a usable NaN, or for infinite scores
    where strata are asked for.
    """
    check_order(order, drop_hardest)
    rows = np.arange(len(scores)) if usable is None else np.flatnonzero(usable)
    count = dropped_count(len(rows), drop_hardest)
    values = np.asarray(scores)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if ((order in ORDERS and order != "random") or count) and np.isnan(values[rows]).any():
        row = rows[np.flatnonzero(np.isnan(values[rows]))[0]]
        raise ProtopruneError(f"{int(np.isnan(values[rows]).sum())} usable images have no score (first: row {row})")
    if order in COVERS:
        if arrange is None:
            raise UsageError(f"--order {order} looks at features, and there are none here")
        put = arrange
    else:
        put = partial(_ordered, values, ids=ids, order=order, seed=seed)
    if not count:
        return put(rows)
    hard = by_key(values, rows, ids, seed, largest=True)
    return np.concatenate([put(np.sort(hard[count:])), hard[:count][::-1]])


def dropped_count(m: int, drop_hardest: float) -> int:
    """How many of m usable images --drop-hardest puts last."""
    return round(drop_hardest * m)


def check_order(order: str, drop_hardest: float = 0.0) -> None:
    """Raise UsageError for an unknown order or a fraction to drop that is out of range."""
    if order not in (*ORDERS, *COVERS):
        raise UsageError(f"--order {order}: expected one of {', '.join((*ORDERS, *COVERS))}")
    check_number("--drop-hardest", drop_hardest, 0, 1)
    if drop_hardest == 1:
        raise UsageError("--drop-hardest 1: expected a fraction from 0 to below 1")


def _ordered(values: np.ndarray, rows: np.ndarray, *, ids: Sequence[str], order: str, seed: int) -> np.ndarray:
    """The rows in keeping order; values: (n,) floats."""
    if order == "random":
        return shuffled(rows, ids, seed)
    if order == "stratified":
        return _stratified(values, shuffled(rows, ids, seed))
    rows = by_key(values, rows, ids, seed, largest=order == "hard")
    return _from_the_middle(rows) if order == "middle" else rows


def _from_the_middle(rows: np.ndarray) -> np.ndarray:
    """Rows, easiest first, nearest to the middle first: of two equally near the harder one."""
    upper, lower = rows[len(rows) // 2 :], rows[: len(rows) // 2][::-1]
    found = np.empty_like(rows)
    if len(rows) % 2:
        found[0], found[1::2], found[2::2] = upper[0], upper[1:], lower
    else:
        found[0::2], found[1::2] = upper, lower
    return found


def _stratified(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows, given in random order, in the order that fills the strata evenly: one of each stratum, then the next.

    The largest stratum comes first in each round: that is where the authors' algorithm, which divides what is left over
    the strata that are left, smallest first, rounding down, puts the images that do not divide.
    """
    if not len(rows):
        return rows
    own = values[rows].astype(np.float64)
    low, span = own.min(), own.max() - own.min()
    if not np.isfinite(span * STRATA):
        raise ProtopruneError(
            f"scores from {low:g} to {own.max():g} cannot be cut into strata; use --drop-hardest, or another --order"
        )
    # Multiplied first: a score on the border of two strata belongs to the upper one.
    stratum = ((own - low) * STRATA / span).astype(np.int64) if span > 0 else np.zeros(len(rows), np.int64)
    stratum = np.minimum(stratum, STRATA - 1)
    sizes = np.bincount(stratum, minlength=STRATA)
    return rows[np.lexsort((-stratum, -sizes[stratum], place_in_group(stratum, sizes)))]


def by_key(keys: np.ndarray, rows: np.ndarray, ids: Sequence[str], seed: int, largest: bool = False) -> np.ndarray:
    """The rows, given ascending, by their keys (n,) upwards, or the largest first, ties by a seeded hash of the id.

    Only the ids of tied rows are hashed, since hashing all takes seconds.
    """
    whole = len(rows) == len(keys)
    if largest:
        keys = -keys if whole else -keys[rows]
    elif not whole:
        keys = keys[rows]
    places = np.argsort(keys, kind="stable")
    ordered, last_of_its_key = keys[places], np.ones(len(keys), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=last_of_its_key[:-1])
    del ordered
    if not last_of_its_key.all():
        _break_ties(places, last_of_its_key, keys, rows, ids, seed)
    return places if whole else rows[places]


def _break_ties(
    places: np.ndarray, last_of_its_key: np.ndarray, keys: np.ndarray, rows: np.ndarray, ids: Sequence[str], seed: int
) -> None:
    """Sort places that are in the order of their keys by a seeded hash where these are equal; in pieces, since at
    places in groups (see `covering`) nearly all are."""
    tied = ~last_of_its_key
    tied[1:] |= tied[:-1]
    marked, ties = np.zeros(len(keys), bool), np.zeros(len(keys), np.uint64)
    marked[places] = tied
    for first in range(0, len(keys), BATCH):  # in the order of ids, which are read fast in it
        here = first + np.flatnonzero(marked[first : first + BATCH])
        ties[here] = hashes_of(rows[here], ids, seed)
    first = 0
    while first < len(keys):
        last = min(first + BATCH, len(keys))
        last += int(last_of_its_key[last - 1 :].argmax())
        here = places[first:last]
        some = here[tied[first:last]]
        here[tied[first:last]] = some[np.lexsort((ties[some], keys[some]))]
        first = last


def place_in_group(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(m,) position of each row among the rows of its own group; sizes: (groups,) rows of each."""
    small = row_type(len(group))
    by_group, place = np.argsort(group, kind="stable"), np.empty(len(group), small)
    place[by_group] = np.arange(len(group), dtype=small) - np.repeat((np.cumsum(sizes) - sizes).astype(small), sizes)
    return place
