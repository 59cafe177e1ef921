"""Successive halving (Jamieson & Talwalkar 2016) over splits of the images that choose.

Every split is a training part and a held-out fold, stratified by class. In each round those still in are measured on
further splits, all on the same ones, and the better half goes on. The references are measured on every split and never
leave. Pure: what measures a candidate on a split is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

FOLDS = 5
ROUNDS = (1, 2, 4, 8)  # splits that those still in have been measured on, after each round


@dataclass
class Standing:
    """How far a candidate came."""

    number: int  # in the list of candidates
    accuracies: list[float] = field(default_factory=list)  # one a split
    rounds: int = 0  # that it was in

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


def fold_of(labels: np.ndarray, split: int, seed: int = 0) -> np.ndarray:
    """(n,) bool: the held-out fold of a split. Five splits in a row share a division; then comes a new one."""
    order = np.random.default_rng([seed, split // FOLDS, 0x5F01D]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within it
    mask = np.zeros(len(labels), bool)
    mask[order[split % FOLDS :: FOLDS]] = True
    return mask


def halve(
    count: int,
    measure: Callable[[int, int], float],
    *,
    references: Iterable[int] = (),
    rounds: Sequence[int] = ROUNDS,
    on_round: Callable[[int, list[Standing]], None] | None = None,
) -> list[Standing]:
    """Standings of `count` candidates, the best first: those that came farthest, by their mean accuracy.

    measure(candidate, split) -> accuracy; rounds: splits after each round, growing. After a round the better half of
    those that are no references goes on, rounded up and at least two. Of equals the one named earlier is better.
    """
    references = set(references)
    standings = [Standing(number) for number in range(count)]
    alive = list(standings)
    for round_number, splits in enumerate(rounds, 1):
        for split in range(len(alive[0].accuracies) if alive else 0, splits):  # all that are in have as many
            for one in alive:
                one.accuracies.append(measure(one.number, split))
        for one in alive:
            one.rounds = round_number
        alive.sort(key=lambda one: -one.mean)
        if on_round:
            on_round(round_number, alive)
        if round_number < len(rounds):
            others = [one for one in alive if one.number not in references]
            going = {one.number for one in others[: max(2, -(-len(others) // 2))]} | references
            alive = [one for one in alive if one.number in going]
    return sorted(standings, key=lambda one: (-one.rounds, -one.mean))
