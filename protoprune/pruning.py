"""Feature file -> ranking -> kept set: the stages joined, for the command line and for Python.

import protoprune
result = protoprune.select("features.h5", keep=0.7)
result.kept_paths

A ranking says how hard each image is, a `Rule` what to keep of it. Knows nothing of how either is written down.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, fields

import numpy as np

from protoprune import prototypes, selection
from protoprune.decode import Status
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import FeatureFile, partial_path
from protoprune.prototypes import Clustering
from protoprune.scores import ScoreTable, mean_overlap, overlap, read_scores, spearman

GROUPS = ("class", "cluster")
QUOTAS = ("dbp",)


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
    duplicate_of: np.ndarray | None = None  # (n,) int64 after `deduplicate`: the row that is kept instead, else -1

    @property
    def scored(self) -> np.ndarray:
        """(n,) bool: rows that have a score."""
        return ~np.isnan(self.scores)

    @property
    def usable(self) -> np.ndarray:
        """(n,) bool: rows that have a score and may be kept: all that have one but the removed duplicates."""
        return self.scored if self.duplicate_of is None else self.scored & (self.duplicate_of < 0)


@dataclass(frozen=True)
class Rule:
    """What to keep of a ranking: the options of `protoprune select` that decide it, checked together.

    keep          fraction of the usable images to KEEP, above 0 and at most 1
    order         which first: hard, easy, middle, random or stratified (see `selection.ranking`)
    drop_hardest  fraction that is kept only when nothing else is left, easiest first
    quota         None or 'dbp': every cluster gets a quota by its complexity (see `selection.quotas`)
    balance, by   share of the kept set that is split evenly over groups, and which: 'class' or 'cluster'
    calibrate     None, or the share that goes by order; the rest is drawn at random and weighted
    seed          of ties and of everything random

    Raises UsageError for a value out of range and for two that do not go together.
    """

    keep: float
    order: str = "hard"
    drop_hardest: float = 0.0
    quota: str | None = None
    balance: float = 0.0
    by: str | None = None
    calibrate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        selection.check(self.keep, self.order, self.balance)
        selection.check_order(self.order, self.drop_hardest)
        if self.by not in (None, *GROUPS):
            raise UsageError(f"--by {self.by}: expected class or cluster")
        if self.by is not None and not self.balance:
            raise UsageError(
                f"--by {self.by}: --by goes with --balance, which says how much; the paper's is --balance 0.5"
            )
        if self.quota not in (None, *QUOTAS):
            raise UsageError(f"--quota {self.quota}: expected {', '.join(QUOTAS)}")
        if self.quota and self.order == "stratified":
            raise UsageError("--quota does not go with --order stratified: each of them sets its own budgets")
        if self.calibrate is not None:
            selection.check_calibration(self.calibrate)
            if self.order == "random":
                raise UsageError("--calibrate does not go with --order random, which needs no weights")
            if self.drop_hardest:
                raise UsageError(
                    "--calibrate does not go with --drop-hardest: its weights stand for all images, dropped ones too"
                )


@dataclass
class Selected:
    """A kept set: `keep` marks the rows of `ranking`."""

    ranking: Ranking
    keep: np.ndarray  # (n,) bool
    rank: np.ndarray  # (n,) int64: place in the keeping order, 0 first, -1 for rows that cannot be kept
    rule: Rule
    weights: np.ndarray | None = None  # (n,) float64, NaN where not kept; None unless calibrated with a random part
    dropped: np.ndarray | None = None  # (n,) bool: the hardest, where some were to be dropped

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
    with open_features(features) as file:
        ranking = _ranking(file)
    add_clusters(
        ranking, k=k, euclidean=euclidean, iterations=iterations, seed=seed, restarts=restarts,
        train_points=train_points, backend=backend, cache=cache,
    )  # fmt: skip
    ranking.scores = prototypes.consensus(ranking.clusterings)
    return ranking


def add_clusters(
    ranking: Ranking,
    *,
    k: int | None = None,
    euclidean: bool = False,
    iterations: int = 25,
    seed: int = 0,
    restarts: int = 1,
    train_points: int | None = None,
    backend: str = "auto",
    cache: bool = True,
) -> None:
    """Cluster the features of all readable images into `ranking.clusterings`, whatever the scores are (see `rank`)."""
    if restarts < 1:
        raise UsageError(f"--restarts {restarts}: expected at least 1")
    usable = ranking.status == Status.OK
    with open_features(ranking.file) as file:
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


def rank_by_table(features: str | os.PathLike, table: str | os.PathLike, *, higher_is: str | None = None) -> Ranking:
    """Rank the images of a feature file by a score table (see `scores.read_scores`); no clustering."""
    with open_features(features) as file:
        ranking = _ranking(file)
    ranking.table = read_scores(table, ranking.paths, higher_is=higher_is)
    readable = ranking.status == Status.OK  # a table may well score an image that cannot be read any more
    ranking.scores = np.where(readable, ranking.table.scores, np.nan)
    ranking.table.missing = int(np.isnan(ranking.scores[readable]).sum())
    return ranking


def deduplicate(ranking: Ranking, epsilon: float, *, keep: str = "harder", seed: int = 0) -> None:
    """Take near-duplicates out of a ranking that has clusters: sets `ranking.duplicate_of`, so they are not usable.

    Within each cluster of the first clustering an image goes when its cosine to a kept one exceeds 1 - epsilon; `keep`
    says which stays, the 'harder' or the more 'central' one by distance to the centroid, whatever the scores are (see
    `selection.duplicates`).
    """
    selection.check_duplicates(epsilon, keep)
    one = _first_clustering(ranking, "--dedup")
    with open_features(ranking.file) as file:
        ranking.duplicate_of = selection.duplicates(
            _mapped(file), one.cluster, one.distance, epsilon,
            ids=ranking.paths, keep=keep, seed=seed, usable=ranking.usable,
        )  # fmt: skip


def prune(ranking: Ranking, keep: float, **options) -> Selected:
    """The kept set of a ranking: exactly round(keep * m) of its m usable images, nested for growing `keep`.

    `options` are the fields of `Rule`: order, drop_hardest, quota, balance, by, calibrate, seed. They compose: the
    order (with the dropped last) is interleaved by the quotas, and the first of it are taken with a floor for every
    group; when calibrated this holds for the part that goes by order, and the rest is drawn from all that is left.
    """
    rule = Rule(keep, **options)
    n, usable = len(ranking.paths), ranking.usable
    groups = groups_of(ranking, rule.by) if rule.balance else None
    rows = selection.ranking(
        ranking.scores, ids=ranking.paths, order=rule.order, seed=rule.seed, usable=usable,
        drop_hardest=rule.drop_hardest,
    )  # fmt: skip
    stay = len(rows) - selection.dropped_count(len(rows), rule.drop_hardest)
    if rule.quota and stay:
        one = _first_clustering(ranking, "--quota")
        rows[:stay] = selection.by_quota(rows[:stay], one.cluster, _quota_shares(one, usable))
    rank_of, dropped = np.full(n, -1, np.int64), np.zeros(n, bool)
    rank_of[rows] = np.arange(len(rows))
    dropped[rows[stay:]] = True
    if rule.calibrate is None:
        kept, weights = selection.cut(rows, n, keep, groups, rule.balance), None
    else:
        kept, weights = selection.calibrated(
            rows, n, round(keep * len(rows)), rule.calibrate,
            ids=ranking.paths, seed=rule.seed, groups=groups, balance=rule.balance,
        )  # fmt: skip
    drawn = rule.calibrate is not None and rule.calibrate < 1
    return Selected(ranking, kept, rank_of, rule, weights if drawn else None, dropped if rule.drop_hardest else None)


def select(
    features: str | os.PathLike = "features.h5",
    keep: float = 0.7,
    *,
    scores: str | os.PathLike | None = None,
    higher_is: str | None = None,
    dedup: float | None = None,
    dedup_keep: str = "harder",
    seed: int = 0,
    **options,
) -> Selected:
    """`rank`, `deduplicate` and `prune` in one call.

    `options` takes those of `prune` (order, drop_hardest, quota, balance, by, calibrate) and those of `rank` (k,
    restarts, …). `scores` is a score table to rank by instead (`higher_is`: its direction, if it states none);
    the images are clustered then only where `dedup` or `quota` asks for it. `keep` is the fraction of what `dedup`
    leaves.
    """
    names = {one.name for one in fields(Rule)}
    rule = {"seed": seed, **{name: value for name, value in options.items() if name in names}}
    clustering = {name: value for name, value in options.items() if name not in names}
    Rule(keep, **rule)
    if dedup is not None:
        selection.check_duplicates(dedup, dedup_keep)
    if scores is None:
        ranking = rank(features, seed=seed, **clustering)
    else:
        ranking = rank_by_table(features, scores, higher_is=higher_is)
        if dedup is not None or rule.get("quota"):
            add_clusters(ranking, seed=seed, **clustering)
        elif clustering:
            raise UsageError(f"scores ranks without clustering: no {', '.join(clustering)} with it")
    if dedup is not None:
        deduplicate(ranking, dedup, keep=dedup_keep, seed=seed)
    return prune(ranking, keep, **rule)


def _first_clustering(ranking: Ranking, option: str) -> Clustering:
    if not ranking.clusterings:
        raise UsageError(f"{option} needs clusters; call add_clusters on the ranking first")
    return ranking.clusterings[0]


def _quota_shares(one: Clustering, usable: np.ndarray) -> np.ndarray:
    """(k,) the share of each cluster in the kept set, before its size caps it."""
    if not one.spherical:
        raise UsageError("--quota dbp does not go with --euclidean: its complexity is a product of cosine distances")
    values = selection.complexity(one.centroids, one.cluster[usable], one.distance[usable])
    return selection.complexity_shares(values)


def _mapped(file: FeatureFile) -> np.ndarray:
    """The features as a memory map: a cluster's rows lie all over the file, and HDF5 is slow at single rows."""
    offset = file.features.id.get_offset()
    if offset is None:  # not contiguous, or empty
        return file.features[:]
    return np.memmap(file.path, file.features.dtype, "r", offset, file.features.shape)


@dataclass
class StabilityRow:
    """How one other clustering ranks the images, against the one in use."""

    k: int
    seed: int
    spearman: float  # of the distances
    overlap: float  # share of the kept set that is kept here too


def stability(features: str | os.PathLike, reference: Selected, *, seeds: int = 3, **settings) -> list[StabilityRow]:
    """Cluster with other seeds and with k/2 and 2k, and compare each ranking with the one in use.

    The kept sets compared are those of the ranking alone, of the same images: no balance, quota or random part, which
    would hide how far the rankings differ.
    """
    ranking, rule = reference.ranking, reference.rule
    options = {"order": rule.order, "drop_hardest": rule.drop_hardest, "seed": rule.seed}
    base, seed = ranking.clusterings[0].k, ranking.clusterings[0].seed
    m = int((ranking.status == Status.OK).sum())
    # Other seeds come after those of the restarts, which the reference has used up.
    fresh = seed + len(ranking.clusterings)
    others = [(base, fresh + number) for number in range(seeds)]
    others += [(k, seed) for k in (max(1, base // 2), min(m, 2 * base)) if k != base]
    plain = prune(ranking, rule.keep, **options)
    rows = []
    for k, other_seed in others:
        other = rank(features, k=k, seed=other_seed, **settings)
        other.duplicate_of = ranking.duplicate_of
        kept = prune(other, rule.keep, **options)
        rows.append(StabilityRow(k, other_seed, spearman(ranking.scores, other.scores), overlap(plain.keep, kept.keep)))
    return rows


def restart_overlap(ranking: Ranking, rule: Rule) -> float:
    """Mean overlap of the sets that the single restarts would keep, by order alone: what one seed is worth."""
    options = {"order": rule.order, "seed": rule.seed, "drop_hardest": rule.drop_hardest}
    ids, usable = ranking.paths, ranking.usable
    masks = [
        selection.select(one.distance, rule.keep, ids=ids, usable=usable, **options) for one in ranking.clusterings
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
