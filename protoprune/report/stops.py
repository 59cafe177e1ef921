"""At which fraction kept each image enters the list. Nested kept sets make one number an image say all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from protoprune import pruning
from protoprune.pruning import Ranking, Rule

NEVER = 255  # of an image that no fraction keeps: without a score, or a duplicate


@dataclass(frozen=True)
class Stops:
    """The fractions that a page can show, growing; `first` says at which of them an image enters the list."""

    fractions: list[float]
    counts: list[int]  # images kept at each, 0 where `select` refuses since none would be
    first: np.ndarray  # (n,) uint8 index into fractions, or NEVER
    initial: int  # the one that was asked for

    def kept(self, stop: int) -> np.ndarray:
        """(n,) bool: the kept set of `fractions[stop]`."""
        return self.first <= stop


def find(ranking: Ranking, rule: Rule) -> Stops:
    """Every whole per cent, and the fraction of `rule` itself; each is cut by `pruning.prune`, so none is a guess.

    Without floors and random parts the cut is a prefix of one order, and one call tells all of them.
    """
    fractions = sorted({round(percent / 100, 2) for percent in range(1, 101)} | {rule.keep})
    usable = int(ranking.usable.sum())
    counts = [round(fraction * usable) for fraction in fractions]
    if rule.balance or rule.calibrate is not None:
        first = np.full(len(ranking.paths), NEVER, np.uint8)
        for stop, (fraction, count) in enumerate(zip(fractions, counts, strict=True)):
            if count:
                kept = pruning.prune(ranking, replace(rule, keep=fraction)).keep
                first[kept & (first == NEVER)] = stop
    else:
        rank = pruning.prune(ranking, replace(rule, keep=1.0)).rank
        first = np.searchsorted(counts, rank, side="right").astype(np.uint8)
        first[rank < 0] = NEVER
    return Stops(fractions, counts, first, fractions.index(rule.keep))


def table(first: np.ndarray, groups: np.ndarray, number: int, stops: int) -> np.ndarray:
    """(stops, number) uint32: images kept of each group at each stop; rows with a negative group count nowhere."""
    counted = (groups >= 0) & (first != NEVER)
    flat = first[counted].astype(np.int32) * number + groups[counted]  # at most 255 times `facts.GROUPS`
    entering = np.bincount(flat, minlength=stops * number).reshape(stops, number)
    return entering.cumsum(axis=0).astype(np.uint32)
