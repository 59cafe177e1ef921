"""Feature file -> ranking -> kept set: the stages joined, for the command line and for Python.

import protoprune
result = protoprune.select("features.h5", keep=0.7)
result.kept_paths
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field

import numpy as np

from protoprune import prototypes, selection
from protoprune.decode import Status
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import FeatureFile, partial_path
from protoprune.prototypes import Clustering
from protoprune.scores import ScoreTable, mean_overlap, overlap, read_scores, spearman


@dataclass
class Ranking:
    """Every image of a feature file with its score; row i is image i, larger scores are harder."""

    file: str
    root: str
    paths: list[str]
    labels: np.ndarray  # (n,) int32, -1 for none
    classes: list[str]
    status: np.ndarray  # (n,) uint8, see `decode.Status`
    scores: np.ndarray  # (n,) float32 or float64, NaN where there is none
    clusterings: list[Clustering] = field(default_factory=list)  # one a restart
    cached: int = 0  # how many of them were found in the cache
    k_rule: str = ""  # where k came from
    table: ScoreTable | None = None  # when the scores were read from a file

    @property
    def usable(self) -> np.ndarray:
        """(n,) bool: rows that have a score and may be kept."""
        return ~np.isnan(self.scores)


@dataclass
class Selected:
    """A kept set: `keep` marks the rows of `ranking`."""

    ranking: Ranking
    keep: np.ndarray  # (n,) bool
    rank: np.ndarray  # (n,) int64: 0 is kept first, -1 for rows that cannot be kept

    @property
    def kept_paths(self) -> list[str]:
        """Ids of the kept images, sorted."""
        return list(itertools.compress(self.ranking.paths, self.keep))


def open_features(path: str | os.PathLike) -> FeatureFile:
    """The finished feature file; a run that was cut short gets an error that says how to finish it."""
    path = os.fspath(path)
    if not os.path.exists(path) and os.path.exists(partial_path(path)):
        with FeatureFile(partial_path(path)) as partial:
            done = int(partial.finished().sum())
        raise ProtopruneError(
            f"{path}: not finished, {done:,} of {partial.n:,} images are embedded; "
            "run the same `protoprune embed` again, it does the rest"
        )
    return FeatureFile(path)


def rank(
    features: str | os.PathLike = "features.h5",
    *,
    k: int | None = None,
    euclidean: bool = False,
    iterations: int = 25,
    seed: int = 0,
    restarts: int = 1,
    train_points: int | None = None,
    backend: str = "auto",
    cache: bool = True,
) -> Ranking:
    """Rank the images of a feature file by their distance to their k-means prototype.

    `k` defaults to `prototypes.auto_k`. With `restarts` R the clustering is run from the seeds seed … seed + R - 1 and
    the score is the mean distance. Clusterings are kept in `<features>.clusters/`.
    """
    if restarts < 1:
        raise UsageError(f"--restarts {restarts}: expected at least 1")
    with open_features(features) as file:
        ranking = _ranking(file)
        usable = file.usable
        if not usable.any():
            raise ProtopruneError(f"{file.path}: none of its {file.n:,} images could be read; see `protoprune info`")
        ranking.k_rule = "as given"
        if k is None:
            k = prototypes.auto_k(int(usable.sum()), len(file.classes))
            ranking.k_rule = _k_rule(k, int(usable.sum()), len(file.classes))
        for number in range(restarts):
            one, found = _cluster(
                file, usable, cache, k=k, spherical=not euclidean, seed=seed + number, iterations=iterations,
                train_points=train_points, backend=backend,
            )  # fmt: skip
            ranking.clusterings.append(one)
            ranking.cached += found
        ranking.scores = prototypes.consensus(ranking.clusterings)
    return ranking


def rank_by_table(features: str | os.PathLike, table: str | os.PathLike, *, higher_is: str | None = None) -> Ranking:
    """Rank the images of a feature file by a score table (see `scores.read_scores`); no clustering."""
    with open_features(features) as file:
        ranking = _ranking(file)
    ranking.table = read_scores(table, ranking.paths, higher_is=higher_is)
    readable = ranking.status == Status.OK  # a table may well score an image that cannot be read any more
    ranking.scores = np.where(readable, ranking.table.scores, np.nan)
    ranking.table.missing = int(np.isnan(ranking.scores[readable]).sum())
    return ranking


def prune(
    ranking: Ranking, keep: float, *, order: str = "hard", seed: int = 0, balance: float = 0.0, by: str | None = None
) -> Selected:
    """The kept set of a ranking. `by` names the groups that `balance` is about, 'class' or 'cluster'."""
    if by is not None and not balance:
        raise UsageError(f"--by {by}: --by goes with --balance, which says how much; the paper's is --balance 0.5")
    groups = groups_of(ranking, by) if balance else None
    rows = selection.ranking(ranking.scores, ids=ranking.paths, order=order, seed=seed, usable=ranking.usable)
    rank_of = np.full(len(ranking.paths), -1, np.int64)
    rank_of[rows] = np.arange(len(rows))
    return Selected(ranking, selection.cut(rows, len(rank_of), keep, groups, balance), rank_of)


def select(
    features: str | os.PathLike = "features.h5",
    keep: float = 0.7,
    *,
    order: str = "hard",
    balance: float = 0.0,
    by: str | None = None,
    scores: str | os.PathLike | None = None,
    higher_is: str | None = None,
    seed: int = 0,
    **clustering,
) -> Selected:
    """`rank` and `prune` in one call; `clustering` takes the options of `rank`, `scores` a score table instead.

    `higher_is` (keep, prune, harder or easier) is for a table that does not say what a higher score means.
    """
    selection.check(keep, order, balance)
    if scores is not None:
        ranking = rank_by_table(features, scores, higher_is=higher_is)
    else:
        ranking = rank(features, seed=seed, **clustering)
    return prune(ranking, keep, order=order, seed=seed, balance=balance, by=by)


@dataclass
class StabilityRow:
    """How one other clustering ranks the images, against the one in use."""

    k: int
    seed: int
    spearman: float  # of the distances
    overlap: float  # share of the kept set that is kept here too


def stability(
    features: str | os.PathLike, reference: Selected, *, keep: float, seeds: int = 3, order: str = "hard", **settings
) -> list[StabilityRow]:
    """Cluster with other seeds and with k/2 and 2k, and compare each ranking with the one in use.

    The kept sets compared are those of the ranking alone: no balance, which would hide how far the rankings differ.
    """
    ranking = reference.ranking
    base, seed = ranking.clusterings[0].k, ranking.clusterings[0].seed
    m = int(ranking.usable.sum())
    # Other seeds come after those of the restarts, which the reference has used up.
    fresh = seed + len(ranking.clusterings)
    others = [(base, fresh + number) for number in range(seeds)]
    others += [(k, seed) for k in (max(1, base // 2), min(m, 2 * base)) if k != base]
    plain = prune(ranking, keep, order=order, seed=seed)
    rows = []
    for k, other_seed in others:
        other = rank(features, k=k, seed=other_seed, **settings)
        kept = prune(other, keep, order=order, seed=seed)
        rows.append(StabilityRow(k, other_seed, spearman(ranking.scores, other.scores), overlap(plain.keep, kept.keep)))
    return rows


def restart_overlap(ranking: Ranking, keep: float, *, order: str = "hard", seed: int = 0) -> float:
    """Mean overlap of the sets that the single restarts would keep: what one seed is worth."""
    masks = [
        selection.select(one.distance, keep, ids=ranking.paths, order=order, seed=seed, usable=ranking.usable)
        for one in ranking.clusterings
    ]
    return mean_overlap(masks)


def _ranking(file: FeatureFile) -> Ranking:
    root = file.provenance["root"]
    return Ranking(file.path, root, file.paths, file.labels, file.classes, file.status, np.full(file.n, np.nan))


def _cluster(file: FeatureFile, usable: np.ndarray, cache: bool, **settings) -> tuple[Clustering, bool]:
    def compute(**settings) -> Clustering:
        return prototypes.cluster(file.features, settings.pop("k"), usable=usable, **settings)

    if not cache:
        return compute(**settings), False
    return prototypes.cached(file.path + ".clusters", file.provenance["uuid"], compute, **settings)


def _k_rule(k: int, usable: int, classes: int) -> str:
    if k == classes:
        return "the number of classes"
    return "the square root of the number of images" if k == round(math.sqrt(usable)) else "one for ten images"


def groups_of(ranking: Ranking, by: str | None) -> np.ndarray:
    """(n,) integers: the class or the cluster of each image; without `by` the class where there is one."""
    by = by or ("class" if ranking.classes else "cluster")
    if by == "class":
        if not ranking.classes:
            other = (
                "use --by cluster" if ranking.clusterings else "and a score table has no clusters to balance instead"
            )
            raise UsageError(f"--by class: the images have no classes (no first-level folders); {other}")
        return ranking.labels
    if by != "cluster":
        raise UsageError(f"--by {by}: expected class or cluster")
    if not ranking.clusterings:
        raise UsageError("--by cluster does not go with --scores, which clusters nothing; use --by class")
    return ranking.clusterings[0].cluster
