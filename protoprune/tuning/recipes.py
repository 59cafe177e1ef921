"""What is compared: recipes for a kept list, each of which is also a command that a user can run.

A `Candidate` is the options of `protoprune select` that decide a list. It is applied to parts of a set in memory here,
by the same `pruning.prune` that the command calls, and to the whole feature file by the command itself. What this
module does not know: which of them is good.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from protoprune import pruning
from protoprune.arguments import as_numbers, texts
from protoprune.clustering import prototypes
from protoprune.errors import UsageError
from protoprune.ids import Known, row_type
from protoprune.images.decode import Status
from protoprune.paths import Paths

CALM = 0.5  # the paper's share for --balance
DROPPED = 0.1  # tried for --drop-hardest


@dataclass(frozen=True)
class Candidate:
    """The options of `protoprune select` that make a list; None and 0 are its defaults."""

    order: str = "hard"
    by: str | None = None
    balance: float = 0.0
    drop_hardest: float = 0.0
    k: int | None = None
    scores: str | None = None  # a score table takes the place of the distance to the prototype

    @property
    def name(self) -> str:
        """In words: 'hard, balance 0.5', 'cover by class', 'random by class'."""
        if self.order == "random":
            return "random by class" if self.balance else "random"
        parts = [f"{self.order} by {self.by}" if self.by and not self.balance else self.order]
        parts += [f"balance {self.balance:g}"] if self.balance else []
        parts += [f"drop hardest {self.drop_hardest:g}"] if self.drop_hardest else []
        parts += [f"k {self.k:,}"] if self.k else []
        parts += [f"by {self.scores}"] if self.scores else []
        return ", ".join(parts)

    def rule(self, keep: float, seed: int = 0) -> pruning.Rule:
        return pruning.Rule(
            keep, order=self.order, drop_hardest=self.drop_hardest, balance=self.balance, by=self.by, seed=seed
        )

    def command(
        self, features: str | os.PathLike[str], keep: float, out: str | os.PathLike[str], higher_is: str | None = None
    ) -> str:
        """The command line that writes this list."""
        fraction = str(float(keep)).removesuffix(".0")  # every digit counts where images are many
        words = ["protoprune", "select", os.fspath(features), "--keep", fraction, "--order", self.order]
        options = {"--by": self.by, "--balance": self.balance, "--drop-hardest": self.drop_hardest, "--k": self.k}
        options |= {"--scores": self.scores, "--higher-is": higher_is if self.scores else None}
        for option, value in options.items():
            if value:
                words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join([*words, "-o", os.fspath(out)])


RANDOM, BALANCED = Candidate("random"), Candidate("random", by="class", balance=1.0)
REFERENCES = (RANDOM, BALANCED)  # what a recipe has to beat


def candidates(images: int, classes: int, tables: Sequence[str] = ()) -> list[Candidate]:
    """The recipes that are compared for a labelled set of so many images, without the references.

    Orders by prototypes with two numbers of clusters (auto and four times as many), by each score table, and by cover;
    with and without balance and the hardest dropped.
    """
    k = 4 * prototypes.auto_k(images, classes)
    plain = Candidate()
    sources = [plain, *([replace(plain, k=k)] if 10 * k <= images else []), *(replace(plain, scores=t) for t in tables)]
    found = [Candidate("cover", by="class"), Candidate("cover", by="cluster"), Candidate("facility", by="class")]
    found.append(Candidate("cover", by="class", drop_hardest=DROPPED))
    for source in sources:
        for order in ("hard", "easy", "middle", "stratified"):
            for balance in (0.0, CALM):
                for dropped in (0.0, DROPPED) if order in ("hard", "stratified") else (0.0,):
                    by = "class" if balance else None
                    found.append(replace(source, order=order, by=by, balance=balance, drop_hardest=dropped))
    return found


@dataclass
class Pool:
    """Labelled images with features in memory, of which parts are selected from."""

    paths: Sequence[str]
    labels: np.ndarray  # (n,) int64
    classes: Sequence[str]
    vectors: np.ndarray  # (n, d)
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)  # {score table: (n,) scores, larger = harder}

    def __post_init__(self) -> None:
        """Raise UsageError for what is not one of each an image."""
        if not isinstance(self.paths, Paths):
            self.paths = texts("paths", self.paths)
        self.labels, self.vectors = as_numbers("labels", self.labels), as_numbers("vectors", self.vectors)
        self.tables = {name: as_numbers(name, table) for name, table in self.tables.items()}
        n, most = len(self.paths), max(len(self.classes) - 1, -1)
        if np.shape(self.labels) != (n,) or np.ndim(self.vectors) != 2 or len(self.vectors) != n:
            shapes = f"{np.shape(self.labels)} and {np.shape(self.vectors)}"
            raise UsageError(f"labels and vectors of shape {shapes} for {n:,} paths: expected (n,) and (n, d)")
        if self.labels.dtype.kind not in "iu":
            raise UsageError(f"labels of type {self.labels.dtype}: expected the numbers of the classes")
        if odd := [name for name, table in self.tables.items() if table.shape != (n,)]:
            raise UsageError(f"{odd[0]}: scores of shape {self.tables[odd[0]].shape} for {n:,} paths: expected (n,)")
        if n and not -1 <= np.min(self.labels) <= np.max(self.labels) <= most:
            raise UsageError(f"labels from {np.min(self.labels)} to {np.max(self.labels)}: expected numbers of classes")

    def __len__(self) -> int:
        return len(self.paths)


Ranks = dict[tuple[Candidate, int], tuple[np.ndarray, int]]


class Part:
    """Some rows of a pool, on which recipes are applied; clusterings and orders are made once for all fractions.

    ranks: {(recipe, seed): (place of each row in its order (m,), rows that can be kept)} of this very part, which grows
    and may outlive it: an order is small, what it is made of is not.
    """

    def __init__(self, pool: Pool, rows: np.ndarray, seed: int = 0, ranks: Ranks | None = None) -> None:
        self.pool, self.rows, self.seed = pool, np.sort(rows), seed
        self._paths = Known(pool.paths[row] for row in self.rows.tolist())
        self._rankings: dict[tuple[int | None, str | None, bool], pruning.Ranking] = {}
        self._ranks: Ranks = {} if ranks is None else ranks

    def select(self, candidate: Candidate, keep: float, seed: int | None = None) -> np.ndarray:
        """The rows of the pool that are kept, (m,) ascending; `seed` is that of ties and draws."""
        seed = self.seed if seed is None else seed
        if candidate.balance:  # its floors depend on the fraction
            return self.rows[pruning.prune(self._ranking(candidate), candidate.rule(keep, seed)).keep]
        if (candidate, seed) not in self._ranks:
            self._ranks[candidate, seed] = self._ranked(candidate, seed)
        rank, usable = self._ranks[candidate, seed]
        return self.rows[(rank >= 0) & (rank < round(keep * usable))]

    def _ranked(self, candidate: Candidate, seed: int) -> tuple[np.ndarray, int]:
        ranking = self._ranking(candidate)
        rank = pruning.prune(ranking, candidate.rule(1.0, seed)).rank
        return rank.astype(row_type(len(rank))), int(ranking.usable.sum())

    def _ranking(self, candidate: Candidate) -> pruning.Ranking:
        key = candidate.k, candidate.scores, self._by_prototypes(candidate)
        if key not in self._rankings:
            self._rankings[key] = self._made(candidate)
        return self._rankings[key]

    @staticmethod
    def _by_prototypes(candidate: Candidate) -> bool:
        ranks = candidate.order not in ("random", "cover", "facility") or candidate.drop_hardest > 0
        return candidate.scores is None and ranks

    def _made(self, candidate: Candidate) -> pruning.Ranking:
        pool, rows = self.pool, self.rows
        vectors, scores, clusterings, placed = pool.vectors[rows], np.zeros(len(rows)), [], None
        if candidate.scores is not None:
            scores = pool.tables[candidate.scores][rows]
        elif self._by_prototypes(candidate):
            k = candidate.k or prototypes.auto_k(len(rows), len(pool.classes))
            clusterings = [prototypes.cluster(vectors, min(k, len(rows)), seed=self.seed)]
            scores = clusterings[0].distance
        else:
            placed = vectors.any(axis=1)  # as `select` does: vectors of zeros are kept by a score table alone
        return pruning.Ranking(
            "", "", self._paths, pool.labels[rows], list(pool.classes),
            np.full(len(rows), Status.OK, np.uint8), scores, clusterings,
            clusters=pruning.Clusters(k=candidate.k, seed=self.seed), vectors=vectors, placed=placed,
        )  # fmt: skip
