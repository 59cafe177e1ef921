"""Feature file -> ranking: how hard each image is, by prototypes or by a score table.

A ranking holds its feature file open, so that all that is made of it is made of the same features, whatever takes the
file's name meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from protoprune import selection
from protoprune.arguments import checked
from protoprune.bounds import shown
from protoprune.clustering import prototypes
from protoprune.clustering.prototypes import Clustering
from protoprune.clustering.vectors import CHUNK, Rows
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features.opening import open_features
from protoprune.images.decode import Status
from protoprune.pruning.rules import ClusterOptions, Clusters, as_clusters
from protoprune.scores import ScoreTable, read_scores
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.features.featurefile import FeatureFile
    from protoprune.features.featureset import FeatureSet
    from protoprune.sources.shard import ShardOptions

    Source = FeatureFile | FeatureSet

BY_LENGTH = 0.7  # Spearman of distance and vector length from which on half of a Euclidean ranking is length


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

    def __repr__(self) -> str:
        return f"Ranking({len(self.paths):,} images of {self.file!r})"

    def __enter__(self) -> Ranking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, or another process: without the open file, so that what needs its features asks for it again."""
        return {**self.__dict__, "source": None}

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
        folder = f"{self.file}.clusters"
        made = self.clusters is not None and self.clusters.cache and self.cached < len(self.clusterings)
        if made and self.source is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            notes.append(
                f"{folder} cannot be written, so the clustering is made anew each time; copy the feature file to where "
                "you can write, or give --no-cache if this is meant"
            )
        if self.table is not None or not self.clusterings:
            return notes
        one = self.clusterings[0]
        alone, usable = int((one.sizes() == 1).sum()), int(self.scored.sum())
        if one.k == usable > 1:
            notes.append("every image is its own prototype, so that this ranking says nothing; give a smaller --k")
        elif 0 < alone < usable:
            some = many(alone, "image is alone in a cluster and so ranks", "images are alone in a cluster and so rank")
            notes.append(f"{some} easiest; try --restarts 5 or another --k")
        if one.length_spearman is not None and abs(one.length_spearman) >= BY_LENGTH:
            notes.append(
                "this ranking is mostly that of the lengths of the feature vectors (Spearman "
                f"{one.length_spearman:.2f}), and says little about what is in the images; leave out --euclidean"
            )
        return notes


@checked
def rank(
    features: str | os.PathLike[str] | Source = "features.h5",
    clusters: Clusters | None = None,
    **options: Unpack[ClusterOptions],
) -> Ranking:
    """Rank the images of a feature file or feature set by their distance to their k-means prototype.

    `features` is its name, or what `open_features` made of it. `options` are the fields of `Clusters` (k, euclidean,
    iterations, seed, restarts, train_points, backend, cache), for whoever does not make one.
    """
    clusters = as_clusters(clusters, options)
    with opened(features) as file:
        ranking = unranked(file)
        add_scores(ranking, clusters)
    return ranking


@contextlib.contextmanager
def opened(features: str | os.PathLike[str] | Source) -> Iterator[Source]:
    """The feature file or set, which stays open but for errors (one that was given open stays so in any case)."""
    if not isinstance(features, (str, os.PathLike)):
        if not hasattr(features, "provenance"):
            raise UsageError(f"features {shown(features)}: expected the path of a feature file or set, or an open one")
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
    with opened(features) as file:
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
    clusters = ranking.clusters = as_clusters(clusters, options)
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


@checked
def rank_by_table(
    features: str | os.PathLike[str] | Source,
    table: str | os.PathLike[str],
    *,
    higher_is: str | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    by_place: bool = False,
) -> Ranking:
    """Rank the images of a feature file (see `rank`) by a score table (see `scores.read_scores`); no clustering."""
    with opened(features) as file:
        ranking = unranked(file)
        ranking.table = read_scores(table, ranking.paths, higher_is=higher_is, rows=rows, by_place=by_place)
        # A table may well score an image that cannot be read any more.
        ranking.scores = np.where(ranking.readable, ranking.table.scores, np.nan)
        ranking.table.missing = int(np.isnan(ranking.scores[ranking.readable]).sum())
        if not ranking.scored.any():
            raise ProtopruneError(f"{table}: gives none of the images a score; nothing can be ranked")
    return ranking


def scratch(ranking: Ranking) -> str | None:
    """Where temporary files of the features' size are made: where TMPDIR says, else where the features lie."""
    folder = os.path.dirname(os.path.abspath(ranking.file))
    return None if os.environ.get("TMPDIR") or not os.access(folder, os.W_OK) else folder


def first_clustering(ranking: Ranking, option: str) -> Clustering:
    if not ranking.clusterings:
        raise UsageError(f"{option} needs clusters; call add_clusters on the ranking first")
    return ranking.clusterings[0]


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
