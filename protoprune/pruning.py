"""Feature file -> ranking -> kept set: the stages joined, for the command line and for Python.

import protoprune
result = protoprune.select("features.h5", keep=0.7)
result.kept_paths

A ranking says how hard each image is, `Clusters` how the features were clustered for it, a `Rule` what to keep of it.
Everything that can be asked for is checked here, for both. A ranking holds its feature file open, so that all that is
made of it is made of the same features, whatever takes the file's name meanwhile. Knows nothing of how any of it is
written down.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import numpy as np

from protoprune import partition, prototypes, selection
from protoprune.bounds import check_seed, check_whole
from protoprune.decode import Status
from protoprune.device import cores
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features import open_features
from protoprune.paths import picked
from protoprune.prototypes import Clustering
from protoprune.scores import ScoreTable, check_reading, mean_overlap, overlap, read_scores, spearman
from protoprune.units import many
from protoprune.vectors import CHUNK, Rows

if TYPE_CHECKING:
    from protoprune.featurefile import FeatureFile
    from protoprune.featureset import FeatureSet
    from protoprune.sources.shard import ShardOptions

    Source = FeatureFile | FeatureSet

GROUPS = ("class", "cluster")
BY_LENGTH = 0.7  # Spearman of distance and vector length from which on half of a Euclidean ranking is length
QUOTAS = ("dbp",)
LARGE = 50_000  # images a cluster from which on --dedup takes long
_WORKERS = 16  # clusters that are gone through at once, each with some 200 MB of similarities
_NO_QUOTA = "--quota dbp does not go with --euclidean: its complexity is a product of cosine distances"


@dataclass
class Ranking:
    """Every image of a feature file with its score; row i is image i, larger scores are harder."""

    file: str
    root: str
    paths: Sequence[str]  # those of a file are `paths.Paths`, decoded as they are asked for
    labels: np.ndarray  # (n,) int32, -1 for none
    classes: list[str]
    status: np.ndarray  # (n,) uint8, see `decode.Status`
    scores: np.ndarray  # (n,) float32 or float64, NaN where there is none
    clusterings: list[Clustering] = field(default_factory=list)  # one a restart
    cached: int = 0  # how many of them were found in the cache
    clusters: Clusters | None = None  # how they were made
    k_rule: str = ""  # where k came from
    table: ScoreTable | None = None  # when the scores were read from a file
    duplicate_of: np.ndarray | None = None  # (n,) int64 after `deduplicate`: the row that is kept instead, else -1
    placed: np.ndarray | None = None  # (n,) bool: rows that may be kept though nothing has scored them (see `unscored`)
    likeness: selection.Likeness | None = None  # after `deduplicate` where it was to count
    vectors: np.ndarray | None = None  # (n, d) features in memory; None: those of the file
    shard_options: ShardOptions | None = None  # how shards were read, where the images lie in shards
    source: Source | None = None  # the feature file, open until `close`; None where there are vectors

    def __enter__(self) -> Ranking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the feature file; what is still to be read of it is refused then. It is closed in any case when the
        last ranking of it is forgotten."""
        if self.source is not None:
            self.source.close()

    @property
    def features(self) -> Rows:
        """The features, (n, d), wherever they are."""
        if self.vectors is not None:
            return self.vectors
        if self.source is None:
            raise UsageError(f"{self.file}: the ranking has neither its feature file nor vectors; make it with `rank`")
        return self.source.features

    @property
    def scored(self) -> np.ndarray:
        """(n,) bool: rows that have a score."""
        return ~np.isnan(self.scores)

    @property
    def usable(self) -> np.ndarray:
        """(n,) bool: rows that may be kept: all that have a score, or are `placed`, but the removed duplicates."""
        own = self.scored if self.placed is None else self.placed
        return own if self.duplicate_of is None else own & (self.duplicate_of < 0)

    @property
    def readable(self) -> np.ndarray:
        """(n,) bool: rows of images that could be read, whether or not they have a score."""
        return self.status == Status.OK

    @property
    def undirected(self) -> np.ndarray:
        """(n,) bool: readable rows whose features are all zeros, so that no spherical cluster has a place for them."""
        if self.placed is not None:
            return self.readable & ~self.placed
        if not self.clusterings:
            return np.zeros(len(self.paths), bool)
        return self.readable & (self.clusterings[0].cluster < 0)

    def notes(self) -> list[str]:
        """What a user should know before trusting the ranking, a line each."""
        notes = []
        if zeros := int(self.undirected.sum()):
            effect = "in no cluster" if self.table is not None else "not ranked and not kept"
            first = self.paths[int(np.flatnonzero(self.undirected)[0])]
            zero = "features that are all zeros, and"
            some = many(zeros, f"image has {zero} is", f"images have {zero} are")
            notes.append(f"{some} {effect} (first: {first})")
        if self.table is not None or not self.clusterings:
            return notes
        one = self.clusterings[0]
        alone = int((one.sizes() == 1).sum())
        if alone and one.k < int(self.scored.sum()):
            some = many(alone, "image is alone in a cluster and so ranks", "images are alone in a cluster and so rank")
            notes.append(f"{some} easiest; try --restarts 5 or another --k")
        if one.length_spearman is not None and abs(one.length_spearman) >= BY_LENGTH:
            notes.append(
                "this ranking is mostly that of the lengths of the feature vectors (Spearman "
                f"{one.length_spearman:.2f}), and says little about what is in the images; leave out --euclidean"
            )
        return notes


class _OfClusters(TypedDict, total=False):
    k: int | None
    euclidean: bool
    iterations: int
    restarts: int
    train_points: int | None
    backend: str
    cache: bool


class _OfRule(TypedDict, total=False):
    order: str
    drop_hardest: float
    quota: str | None
    balance: float
    by: str | None
    calibrate: float | None


class ClusterOptions(_OfClusters, total=False):
    """The fields of `Clusters`, for whoever does not make one."""

    seed: int


class RuleOptions(_OfRule, total=False):
    """The fields of `Rule` but `keep`."""

    seed: int


class Options(_OfClusters, _OfRule, total=False):
    """Both; the seed is that of both."""

    seed: int


@dataclass(frozen=True)
class Clusters:
    """How images are clustered: the options of `protoprune select` that decide it, checked together.

    k             number of clusters; None leaves it to `prototypes.auto_k`
    euclidean     Euclidean k-means on the features as they are, instead of spherical k-means
    iterations    of k-means
    seed          of the first clustering; restarts take the seeds after it
    restarts      how many clusterings; images are ranked by the mean of their distances
    train_points  how many points k-means sees; None: all, up to 4 GB of them
    backend       auto, faiss or torch
    cache         keep clusterings in `<features>.clusters/`, and take them from there

    Raises UsageError for a value out of range.
    """

    k: int | None = None
    euclidean: bool = False
    iterations: int = 25
    seed: int = 0
    restarts: int = 1
    train_points: int | None = None
    backend: str = "auto"
    cache: bool = True

    def __post_init__(self) -> None:
        prototypes.check_settings(self.k, self.iterations, self.train_points, self.backend)
        check_seed(self.seed)
        check_whole("--restarts", self.restarts, 1, 100_000)


@dataclass(frozen=True)
class Rule:
    """What to keep of a ranking: the options of `protoprune select` that decide it, checked together.

    keep          fraction of the usable images to KEEP, above 0 and at most 1
    order         which first: hard, easy, middle, random or stratified (see `selection.ranking`), or, by the features
                  instead of the scores, cover or facility (see `selection.cover`)
    drop_hardest  fraction that is kept only when nothing else is left, easiest first
    quota         None or 'dbp': every cluster gets a quota by its complexity (see `selection.quotas`)
    balance, by   share of the kept set that is split evenly over groups, and which: 'class' or 'cluster'; cover and
                  facility cover the same groups
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
        check_seed(self.seed)
        if self.by not in (None, *GROUPS):
            raise UsageError(f"--by {self.by}: expected class or cluster")
        covers = self.order in selection.COVERS
        if self.by is not None and not self.balance and not covers:
            raise UsageError(
                f"--by {self.by}: --by goes with --balance, which says how much; the paper's is --balance 0.5 "
                "(or with --order cover, which covers each group)"
            )
        if self.quota not in (None, *QUOTAS):
            raise UsageError(f"--quota {self.quota}: expected {', '.join(QUOTAS)}")
        if self.quota and self.order == "stratified":
            raise UsageError("--quota does not go with --order stratified: each of them sets its own budgets")
        if self.calibrate is not None:
            selection.check_calibration(self.calibrate)
            if self.order == "random":
                raise UsageError("--calibrate does not go with --order random, which needs no weights")
            if covers:
                raise UsageError(
                    f"--calibrate does not go with --order {self.order}, whose list stands for all images with equal "
                    "weights: a weight of 1 beside drawn images with larger ones would undo that"
                )
            if self.drop_hardest:
                raise UsageError(
                    "--calibrate does not go with --drop-hardest: its weights stand for all images, dropped ones too"
                )


# Metrics whose extremes were compared with random images (docs/results.md, "All metrics").
_EXTREME = {"hard": "hardest", "easy": "easiest"}
_MEASURED = frozenset((
    "el2n", "grand", "forgetting", "memorization", "ddd", "ensemble_active_learning", "aum", "margin", "entropy",
    "loss", "dyn_unc", "tdds", "supervised_prototypes", "self_supervised_prototypes",
))  # fmt: skip


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
        return picked(self.ranking.paths, np.flatnonzero(self.keep))

    def notes(self) -> list[str]:
        """What a user should know before training on the list, a line each: docs/results.md, "Which list?"."""
        rule, table = self.rule, self.ranking.table
        if rule.order not in _EXTREME or rule.keep > 0.5 or rule.calibrate is not None:
            return []
        if table is not None and table.metric not in _MEASURED:
            return []  # nothing is known of a score from elsewhere; covers and random draws are no extremes
        named = "" if self.ranking.file in ("", "features.h5") else f" --features {shlex.quote(self.ranking.file)}"
        often = "nearly all" if rule.keep <= 0.3 else "most"  # hard at 50 %: -.7, -1.7, -9.7 points, and +.3 with lite0
        return [
            f"in {often} measurements (docs/results.md) the {_EXTREME[rule.order]} {100 * rule.keep:.3g} % trained "
            "worse models than random images, and `--order cover` better ones; "
            f"`protoprune tune{named} --keep {rule.keep:.3g}` compares them on your images"
        ]


def rank(
    features: str | os.PathLike[str] | Source = "features.h5",
    clusters: Clusters | None = None,
    **options: Unpack[ClusterOptions],
) -> Ranking:
    """Rank the images of a feature file or feature set by their distance to their k-means prototype.

    `features` is its name, or what `open_features` made of it. `options` are the fields of `Clusters` (k, euclidean,
    iterations, seed, restarts, train_points, backend, cache), for whoever does not make one.
    """
    clusters = _clusters(clusters, options)
    with _opened(features) as file:
        ranking = unranked(file)
        add_scores(ranking, clusters)
    return ranking


@contextlib.contextmanager
def _opened(features: str | os.PathLike[str] | Source) -> Iterator[Source]:
    """The feature file or set, which stays open but for errors (one that was given open stays so in any case)."""
    if not isinstance(features, (str, os.PathLike)):
        yield features
        return
    file = open_features(features)
    try:
        yield file
    except BaseException:
        file.close()
        raise


def unscored(features: str | os.PathLike[str] | Source, euclidean: bool = False) -> Ranking:
    """The images of a feature file (see `rank`) for an order that needs neither scores nor clusters of all images.

    `placed` are the images that `rank` would give a score: all that could be read, but vectors of zeros unless
    `euclidean`. `add_scores` makes up for the scores.
    """
    with _opened(features) as file:
        ranking = unranked(file)
        ranking.placed = ranking.readable
        for first in range(0, 0 if euclidean else file.n, CHUNK):
            ranking.placed[first : first + CHUNK] &= file.features[first : first + CHUNK].any(axis=1)
        if not ranking.placed.any():
            raise ProtopruneError(f"{file.path}: none of its {file.n:,} images can be used; see `protoprune info`")
    return ranking


def add_scores(ranking: Ranking, clusters: Clusters | None = None, **options: Unpack[ClusterOptions]) -> None:
    """Give a ranking the scores of `rank`, whose options they are; what may be kept stays as it is."""
    add_clusters(ranking, clusters, **options)
    ranking.scores = prototypes.consensus(ranking.clusterings)


def add_clusters(ranking: Ranking, clusters: Clusters | None = None, **options: Unpack[ClusterOptions]) -> None:
    """Cluster the features of all readable images into `ranking.clusterings`, whatever the scores are (see `rank`)."""
    clusters = ranking.clusters = _clusters(clusters, options)
    usable, classes = ranking.readable, len(ranking.classes)
    if not usable.any():
        none = f"{ranking.file}: none of its {len(usable):,} images could be read"
        raise ProtopruneError(f"{none}; see `protoprune info`")
    k, ranking.k_rule = clusters.k, "as given"
    if k is None:
        k = prototypes.auto_k(int(usable.sum()), classes)
        ranking.k_rule = _k_rule(k, int(usable.sum()), classes)
    for number in range(clusters.restarts):
        one, found = _cluster(ranking, usable, k, clusters, clusters.seed + number)
        ranking.clusterings.append(one)
        ranking.cached += found


def rank_by_table(
    features: str | os.PathLike[str] | Source,
    table: str | os.PathLike[str],
    *,
    higher_is: str | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    by_place: bool = False,
) -> Ranking:
    """Rank the images of a feature file (see `rank`) by a score table (see `scores.read_scores`); no clustering."""
    with _opened(features) as file:
        ranking = unranked(file)
        ranking.table = read_scores(table, ranking.paths, higher_is=higher_is, rows=rows, by_place=by_place)
        # A table may well score an image that cannot be read any more.
        ranking.scores = np.where(ranking.readable, ranking.table.scores, np.nan)
        ranking.table.missing = int(np.isnan(ranking.scores[ranking.readable]).sum())
        if not ranking.scored.any():
            raise ProtopruneError(f"{table}: gives none of the images a score; nothing can be ranked")
    return ranking


def deduplicate(
    ranking: Ranking, epsilon: float, *, prefer: str = "harder", seed: int = 0, count: bool = False
) -> None:
    """Take near-duplicates out of a ranking that has clusters: sets `ranking.duplicate_of`, so they are not usable.

    Within each cluster of the first clustering an image goes when its cosine to a kept one exceeds 1 - epsilon;
    `prefer` says which stays, the 'harder' or the more 'central' one by distance to the centroid, whatever the scores
    are (see `selection.near_duplicates`). With `count` sets `ranking.likeness` too, which `likeness` would count in
    another pass over the features.
    """
    selection.check_duplicates(epsilon, prefer)
    one = _first_clustering(ranking, "--dedup")
    _warn_of_large(ranking, one)
    thresholds = _thresholds(epsilon) if count else ()
    ranking.duplicate_of, found = selection.near_duplicates(
        ranking.features, one.cluster, one.distance, epsilon, ids=ranking.paths, prefer=prefer, seed=seed,
        usable=ranking.usable, thresholds=thresholds, folder=_scratch(ranking), workers=min(cores(), _WORKERS),
    )  # fmt: skip
    ranking.likeness = found if count else None


def _warn_of_large(ranking: Ranking, one: Clustering) -> None:
    """All pairs of a cluster are compared, so that its time grows with the square of its size."""
    largest = int(one.sizes().max())
    if largest > LARGE:
        enough = one.k * math.ceil(largest / (LARGE // 5))
        warn(
            f"the largest of {one.k:,} clusters has {largest:,} images, all pairs of which are compared; with more "
            f"clusters, such as --k {enough}, --dedup takes less time and misses duplicates in different clusters"
        )


def _scratch(ranking: Ranking) -> str | None:
    """Where temporary files of the features' size are made: where TMPDIR says, else where the features lie."""
    folder = os.path.dirname(os.path.abspath(ranking.file))
    return None if os.environ.get("TMPDIR") or not os.access(folder, os.W_OK) else folder


def _thresholds(epsilon: float | None) -> list[float]:
    return sorted({*selection.THRESHOLDS, *([epsilon] if epsilon is not None else [])})


def likeness(ranking: Ranking, epsilon: float | None = None) -> selection.Likeness:
    """How many pairs and images of a ranking that has clusters are nearer than several thresholds, `epsilon` included.

    Counted before anything was removed, within the clusters that `deduplicate` goes through.
    """
    one = _first_clustering(ranking, "--dedup")
    return selection.likeness(
        ranking.features, one.cluster, usable=ranking.scored, thresholds=_thresholds(epsilon),
        folder=_scratch(ranking), workers=min(cores(), _WORKERS),
    )  # fmt: skip


def prune(ranking: Ranking, keep: float | Rule, **options: Unpack[RuleOptions]) -> Selected:
    """The kept set of a ranking: exactly round(keep * m) of its m usable images, nested for growing `keep`.

    `keep` is a fraction, and `options` are the other fields of `Rule` (order, drop_hardest, quota, balance, by,
    calibrate, seed), or it is a `Rule`. They compose: the order (with the dropped last) is interleaved by the quotas,
    and the first of it are taken with a floor for every group; when calibrated this holds for the part that goes by
    order, and the rest is drawn from all that is left. Raises UsageError where nothing would be kept.
    """
    rule = _rule(keep, options)
    n, usable = len(ranking.paths), ranking.usable
    if np.isinf(ranking.scores).any():
        some = many(int(np.isinf(ranking.scores).sum()), "score is", "scores are")
        raise UsageError(f"{some} infinite; give numbers, or NaN for none")
    if not round(rule.keep * int(usable.sum())):
        raise UsageError(f"--keep {rule.keep:g} of {int(usable.sum()):,} images is none; keep more")
    groups = groups_of(ranking, rule.by) if rule.balance else None
    rows = selection.ranking(
        ranking.scores, ids=ranking.paths, order=rule.order, seed=rule.seed, usable=usable,
        drop_hardest=rule.drop_hardest, arrange=lambda rows: _arranged(ranking, rule, rows),
    )  # fmt: skip
    stay = len(rows) - selection.dropped_count(len(rows), rule.drop_hardest)
    if rule.quota and stay:
        one = _first_clustering(ranking, "--quota")
        rows[:stay] = _by_quota(rows[:stay], one, usable & (one.cluster >= 0))
    if rule.calibrate is None:
        kept, weights = selection.cut(rows, n, rule.keep, groups, rule.balance), None
    else:
        kept, weights = selection.calibrated(
            rows, n, round(rule.keep * len(rows)), rule.calibrate,
            ids=ranking.paths, seed=rule.seed, groups=groups, balance=rule.balance,
        )  # fmt: skip
    rank_of, dropped = np.full(n, -1, np.int64), np.zeros(n, bool)
    rank_of[rows] = np.arange(len(rows))
    dropped[rows[stay:]] = True
    drawn = rule.calibrate is not None and rule.calibrate < 1
    return Selected(ranking, kept, rank_of, rule, weights if drawn else None, dropped if rule.drop_hardest else None)


def select(
    features: str | os.PathLike[str] | Source = "features.h5",
    keep: float | Rule = 0.7,
    clusters: Clusters | None = None,
    *,
    scores: str | os.PathLike[str] | None = None,
    higher_is: str | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    by_place: bool = False,
    dedup: float | None = None,
    dedup_prefer: str | None = None,
    count: bool = False,
    **options: Unpack[Options],
) -> Selected:
    """`rank`, `deduplicate` and `prune` in one call: what `protoprune select` does.

    `keep` is the fraction to keep or a `Rule`; `options` are the other fields of `Rule` (order, drop_hardest, quota,
    balance, by, calibrate, seed) and, without `clusters`, those of `Clusters` (k, euclidean, restarts, …); a `seed`
    goes to both. `scores` is a score table to rank by instead (`higher_is`: its direction, if it states none;
    `rows` or `by_place`: which images its scores are of, if it names none; see `scores.read_scores`); the images are
    clustered then only where `dedup` or `quota` asks for it, and nothing is ranked where groups are covered that are no
    clusters of all images (see `unscored`). `dedup` removes near-duplicates first (see `deduplicate`;
    `dedup_prefer`: harder, the default, or central; `count`: count the likeness too), and `keep` is the fraction of
    what it leaves.

    Raises UsageError, before any work, for what is out of range or does not go together.
    """
    rule, clusters = _rule_and_clusters(keep, clusters, options)
    if not isinstance(scores, str | os.PathLike | None):
        raise UsageError(
            f"scores: {type(scores).__name__}: expected the path of a score table; `write_scores` makes one of an array"
        )
    check_reading(scores, higher_is, rows, by_place)
    _check_together(rule, clusters, scores, dedup, dedup_prefer)
    if scores is None:
        with _opened(features) as file:
            covers = dedup is None and _only_covers(rule, clusters, bool(file.classes))
            if covers:
                _refuse_clusters(clusters, _UNUSED_BY_COVERS, f"--order {rule.order} ranks nothing")
            ranking = unscored(file, clusters.euclidean) if covers else rank(file, clusters)
        ranking.clusters = clusters
    else:
        ranking = rank_by_table(features, scores, higher_is=higher_is, rows=rows, by_place=by_place)
        if dedup is not None or rule.quota:
            add_clusters(ranking, clusters)
    if dedup is not None:
        deduplicate(ranking, dedup, prefer=dedup_prefer or "harder", seed=rule.seed, count=count)
    return prune(ranking, rule)


def _only_covers(rule: Rule, clusters: Clusters, classes: bool) -> bool:
    """Whether a rule asks for nothing that k-means of all images would say."""
    if rule.order not in selection.COVERS or rule.quota or rule.drop_hardest:
        return False
    by = rule.by or ("class" if classes else "cluster")
    return by == "class" or (clusters.k is None and not rule.balance)


def _rule(keep: float | Rule, options: RuleOptions) -> Rule:
    if isinstance(keep, Rule):
        return replace(keep, **options)
    return Rule(keep, **options)


def _clusters(clusters: Clusters | None, options: ClusterOptions) -> Clusters:
    return replace(clusters, **options) if clusters is not None else Clusters(**options)


def _rule_and_clusters(keep: float | Rule, clusters: Clusters | None, options: Options) -> tuple[Rule, Clusters]:
    """Both, with the options by their names; one that neither has is a TypeError."""
    names = {one.name for one in fields(Rule)}
    rule = {name: value for name, value in options.items() if name in names}
    other = {name: value for name, value in options.items() if name not in names or name == "seed"}
    return _rule(keep, cast(RuleOptions, rule)), _clusters(clusters, cast(ClusterOptions, other))


def _check_together(
    rule: Rule,
    clusters: Clusters,
    scores: str | os.PathLike[str] | None,
    dedup: float | None,
    dedup_prefer: str | None,
) -> None:
    """Raise UsageError for options that do not go together, before the work that they would ask for."""
    if dedup is not None:
        selection.check_duplicates(dedup, dedup_prefer or "harder")
    elif dedup_prefer is not None:
        raise UsageError(f"--dedup-prefer {dedup_prefer}: goes with --dedup, which says how alike duplicates are")
    if rule.quota and clusters.euclidean:
        raise UsageError(_NO_QUOTA)
    if scores is None:
        if not _by_scores(rule) and dedup is None:
            _refuse_clusters(clusters, ("restarts",), f"--order {rule.order} takes no ranking into account")
    elif dedup is not None or rule.quota:
        _refuse_clusters(clusters, ("restarts",), "--scores ranks without clustering")
    else:
        idle = ("k", "euclidean", "iterations", "restarts", "train_points", "backend", "cache")
        more = "; --dedup and --quota cluster: they take all of these but --restarts"
        _refuse_clusters(clusters, idle, "--scores ranks without clustering", more)


def _by_scores(rule: Rule) -> bool:
    """Whether the scores decide which images are kept."""
    return rule.order not in ("random", *selection.COVERS) or bool(rule.drop_hardest)


# The others say how groups are split, and (euclidean) whether vectors of zeros have a place.
_UNUSED_BY_COVERS = ("k", "restarts", "train_points", "cache")


def _refuse_clusters(clusters: Clusters, idle: Sequence[str], why: str, more: str = "") -> None:
    """UsageError for options of the clustering that would do nothing."""
    given = [one.name for one in fields(Clusters) if one.name in idle and getattr(clusters, one.name) != one.default]
    if given:
        names = ", ".join(("--no-" if name == "cache" else "--") + name.replace("_", "-") for name in given)
        raise UsageError(f"{why}: no {names} with it{more}")


def _first_clustering(ranking: Ranking, option: str) -> Clustering:
    if not ranking.clusterings:
        raise UsageError(f"{option} needs clusters; call add_clusters on the ranking first")
    return ranking.clusterings[0]


def _by_quota(rows: np.ndarray, one: Clustering, usable: np.ndarray) -> np.ndarray:
    """The rows, given in keeping order, by cluster quotas; those without a cluster come last."""
    if not one.spherical:
        raise UsageError(_NO_QUOTA)
    if not usable.any():
        return rows
    shares = selection.complexity_shares(selection.complexity(one.centroids, one.cluster[usable], one.distance[usable]))
    placed = one.cluster[rows] >= 0
    return np.concatenate([selection.by_quota(rows[placed], one.cluster, shares), rows[~placed]])


def _arranged(ranking: Ranking, rule: Rule, rows: np.ndarray) -> np.ndarray:
    places = cover_places(ranking, rule.order, rows, rule.by, rule.seed)
    return selection.by_place(places, rows, ranking.paths, rule.seed)


def cover_places(ranking: Ranking, order: str, rows: np.ndarray, by: str | None = None, seed: int = 0) -> np.ndarray:
    """(n,) float64: the places of these rows in the order that covers their groups (see `selection.cover`), else NaN.

    The groups are the classes, or the clusters: those of the ranking where their number was given, else of about 400
    images. Groups so large that their pairs would not do are split by k-means.
    """
    if by not in (None, *GROUPS):
        raise UsageError(f"--by {by}: expected class or cluster")
    n = len(ranking.paths)
    usable = np.zeros(n, bool)
    usable[rows] = True
    how = ranking.clusters or Clusters()
    if (by or ("class" if ranking.classes else "cluster")) == "class" or how.k is not None:
        groups, size = groups_of(ranking, by), partition.CLASS_SIZE
    else:
        groups, size = np.zeros(n, np.int64), partition.CLUSTER_SIZE
    features, folder = ranking.features, _scratch(ranking)
    groups = partition.split(
        features, groups, size, ids=ranking.paths, usable=usable, seed=seed, iterations=how.iterations,
        backend=how.backend, folder=folder,
    )  # fmt: skip
    return selection.cover(
        features, groups, method=order, ids=ranking.paths, usable=usable, seed=seed, folder=folder, workers=cores()
    )


@dataclass
class StabilityRow:
    """How one other clustering ranks the images, against the one in use."""

    k: int
    seed: int
    spearman: float  # of the distances
    overlap: float  # share of the kept set that is kept here too


def stability(reference: Selected, *, seeds: int = 3) -> list[StabilityRow]:
    """Cluster with other seeds and with k/2 and 2k, and compare each ranking with the one in use.

    The kept sets compared are those of the ranking alone, of the same images: no balance, quota or random part, which
    would hide how far the rankings differ.
    """
    ranking, clusters = reference.ranking, reference.ranking.clusters
    if ranking.table is not None or clusters is None or ranking.source is None:
        raise UsageError("--scores ranks without clustering: no --stability with it")
    check_stability(reference.rule)
    rule = replace(reference.rule, quota=None, balance=0.0, by=None, calibrate=None)
    base, seed = ranking.clusterings[0].k, ranking.clusterings[0].seed
    m = int(ranking.scored.sum())
    # Other seeds come after those of the restarts, which the reference has used up.
    fresh = seed + len(ranking.clusterings)
    others = [(base, fresh + number) for number in range(seeds)]
    others += [(k, seed) for k in (max(1, base // 2), min(m, 2 * base)) if k != base]
    plain = prune(ranking, rule)
    rows = []
    for k, other_seed in others:
        other = rank(ranking.source, replace(clusters, k=k, seed=other_seed, restarts=1))
        other.duplicate_of = ranking.duplicate_of
        kept = prune(other, rule)
        rows.append(StabilityRow(k, other_seed, spearman(ranking.scores, other.scores), overlap(plain.keep, kept.keep)))
    return rows


def check_stability(rule: Rule) -> None:
    """Raise UsageError for a rule whose list no ranking decides."""
    if not _by_scores(rule):
        raise UsageError(f"--stability compares rankings by prototypes; --order {rule.order} is none")


def restart_overlap(ranking: Ranking, rule: Rule) -> float:
    """Mean overlap of the sets that the single restarts would keep, by order alone: what one seed is worth."""
    masks = [
        selection.kept_mask(
            one.distance, rule.keep, ids=ranking.paths, usable=ranking.usable, order=rule.order, seed=rule.seed,
            drop_hardest=rule.drop_hardest,
        )
        for one in ranking.clusterings
    ]  # fmt: skip
    return mean_overlap(masks)


def unranked(file: Source) -> Ranking:
    """The images of an open feature file or set, without scores."""
    from protoprune.sources.shard import ShardOptions

    return Ranking(
        file.path, file.provenance["root"], file.paths, file.labels, file.classes, file.status,
        np.full(file.n, np.nan, np.float32),
        source=file, shard_options=ShardOptions.of(file.provenance),
    )  # fmt: skip


class _Settings(TypedDict):
    """What a clustering is kept by."""

    k: int
    spherical: bool
    seed: int
    iterations: int
    train_points: int | None
    backend: str


def _cluster(ranking: Ranking, usable: np.ndarray, k: int, how: Clusters, seed: int) -> tuple[Clustering, bool]:
    """A clustering, and whether it was found in the cache."""
    compute = partial(prototypes.cluster, ranking.features, usable=usable)
    settings: _Settings = {
        "k": k, "spherical": not how.euclidean, "seed": seed, "iterations": how.iterations,
        "train_points": how.train_points, "backend": how.backend,
    }  # fmt: skip
    if not how.cache or ranking.source is None:
        return compute(**settings), False
    return prototypes.cached(ranking.file + ".clusters", ranking.source.provenance["uuid"], compute, **settings)


def _k_rule(k: int, usable: int, classes: int) -> str:
    if k == classes:
        return "the number of classes"
    return "the square root of the number of images" if k == round(math.sqrt(usable)) else "one for ten images"


def groups_of(ranking: Ranking, by: str | None) -> np.ndarray:
    """(n,) integers: the class or the cluster of each image; without `by` the class where there is one."""
    by = by or ("class" if ranking.classes else "cluster")
    if by == "class":
        if not ranking.classes:
            clustered = ranking.clusterings or ranking.table is None
            other = "use --by cluster" if clustered else "and a score table has no clusters to balance instead"
            raise UsageError(f"--by class: the images have no classes (no first-level folders); {other}")
        return ranking.labels
    if by != "cluster":
        raise UsageError(f"--by {by}: expected class or cluster")
    if not ranking.clusterings:
        raise UsageError("--by cluster does not go with --scores, which clusters nothing; use --by class")
    return ranking.clusterings[0].cluster
