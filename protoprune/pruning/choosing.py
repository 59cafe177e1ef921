"""Ranking x rule -> kept set."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from protoprune import selection
from protoprune.arguments import checked
from protoprune.clustering import partition
from protoprune.clustering.prototypes import Clustering
from protoprune.device import cores
from protoprune.errors import UsageError, warn
from protoprune.files import check_suffix, write_file
from protoprune.lists import check_list, list_chunks, list_format, packed
from protoprune.paths import picked
from protoprune.pruning.duplicates import deduplicate
from protoprune.pruning.ranking import (
    Ranking,
    add_clusters,
    first_clustering,
    groups_of,
    opened,
    rank,
    rank_by_table,
    scratch,
    unscored,
)
from protoprune.pruning.rules import (
    GROUPS,
    NO_QUOTA,
    Clusters,
    Options,
    Rule,
    RuleOptions,
    as_rule,
    check_together,
    refuse_clusters,
    rule_and_clusters,
)
from protoprune.scores import check_reading
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.pruning.ranking import Source

# Metrics whose extremes were compared with random images (docs/results.md, "All metrics").
_EXTREME = {"hard": "hardest", "easy": "easiest"}
_MEASURED = re.compile(
    "(el2n|grand|forgetting|memorization|ddd|ensemble_active_learning|aum|margin|entropy|loss|dyn_unc|tdds"
    "|(self_)?supervised_prototypes)(_|$)",
    re.IGNORECASE,
)  # also as others call them, such as EL2N-20-models of the released files


ScoreFile = str | os.PathLike[str]  # by another name: what else is given has a hint of its own, see `select`


@dataclass
class Selected:
    """A kept set: `keep` marks the rows of `ranking`."""

    ranking: Ranking
    keep: np.ndarray  # (n,) bool
    rank: np.ndarray  # (n,) int64: place in the keeping order, 0 first, -1 for rows that cannot be kept
    rule: Rule
    weights: np.ndarray | None = None  # (n,) float64, NaN where not kept; None unless calibrated with a random part
    dropped: np.ndarray | None = None  # (n,) bool: the hardest, where some were to be dropped

    def __repr__(self) -> str:
        return f"Selected({int(self.keep.sum()):,} images of {self.ranking!r}, {self.rule!r})"

    @property
    def kept_paths(self) -> list[str]:
        """Ids of the kept images, sorted."""
        return picked(self.ranking.paths, np.flatnonzero(self.keep))

    @checked
    def write(self, path: str | os.PathLike[str], *, removed: bool = False) -> None:
        """Write the kept images, as `protoprune select -o PATH` does: with rows, scores and weights where the name ends
        in .csv or .jsonl, their rows where it ends in .npy, else a path a line; through gzip where .gz follows.

        With `removed` the readable images that are not kept. The file appears whole or not at all. Raises UsageError
        for a name of another format, and for names of images that lines cannot hold; ProtopruneError when it cannot be
        written, or holds features, a record or an image.
        """
        check_suffix(path, (".csv", ".jsonl", ".npy"), "")
        ranking, format = self.ranking, list_format(path) or "txt"
        if format == "npy":
            warn_of_reordered(ranking)
        rows = np.flatnonzero(ranking.readable & ~self.keep if removed else self.keep)
        check_list(ranking.paths, rows, format)
        weights = None if removed else self.weights
        write_file(path, packed(path, list_chunks(ranking.paths, rows, ranking.scores, format, weights=weights)))

    def notes(self) -> list[str]:
        """What a user should know before training on the list, a line each: docs/results.md, "Which list?"."""
        rule, table = self.rule, self.ranking.table
        if rule.order not in _EXTREME or rule.keep > 0.5 or rule.calibrate is not None:
            return []
        if table is not None and not _MEASURED.match(table.metric.replace("-", "_")):
            return []  # nothing is known of a score from elsewhere; covers and random draws are no extremes
        named = "" if self.ranking.file in ("", "features.h5") else f" --features {shlex.quote(self.ranking.file)}"
        often = "nearly all" if rule.keep <= 0.3 else "most"  # hard at 50 %: -.7, -1.7, -9.7 points, and +.3 with lite0
        return [
            f"in {often} of our experiments the {_EXTREME[rule.order]} {100 * rule.keep:.3g} % trained worse models "
            "than random images, and `--order cover` better ones; "
            f"`protoprune tune{named} --keep {rule.keep:.3g}` compares them on your images"
        ]


def warn_of_reordered(ranking: Ranking) -> None:
    """Say what row indices count, where it is not the rows of the vectors that were imported."""
    if ranking.source is not None and ranking.source.provenance.get("reordered"):
        warn(
            f"row indices count the rows of {ranking.file}, which are sorted by name, not those of the vectors that it "
            "was imported from; take paths, or a manifest"
        )


@checked
def prune(ranking: Ranking, keep: float | Rule, **options: Unpack[RuleOptions]) -> Selected:
    """The kept set of a ranking: exactly round(keep * m) of its m usable images, nested for growing `keep`.

    `keep` is a fraction, and `options` are the other fields of `Rule` (order, drop_hardest, quota, balance, by,
    calibrate, seed), or it is a `Rule`. They compose: the order (with the dropped last) is interleaved by the quotas,
    and the first of it are taken with a floor for every group; when calibrated this holds for the part that goes by
    order, and the rest is drawn from all that is left. Raises UsageError where nothing would be kept.
    """
    rule = as_rule(keep, options)
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
        one = first_clustering(ranking, "--quota")
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


@checked
def select(
    features: str | os.PathLike[str] | Source = "features.h5",
    keep: float | Rule = 0.7,
    clusters: Clusters | None = None,
    *,
    scores: ScoreFile | None = None,
    higher_is: str | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    by_place: bool = False,
    dedup: float | None = None,
    dedup_prefer: str | None = None,
    count: bool = False,
    **options: Unpack[Options],
) -> Selected:
    """`rank`, `deduplicate` and `prune` in one call: what `protoprune select` does. The `Selected` that it gives has
    `kept_paths` and `weights`, and writes the list (`write`).

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
    rule, clusters = rule_and_clusters(keep, clusters, options)
    if not isinstance(scores, str | os.PathLike | None):
        raise UsageError(
            f"scores: {type(scores).__name__}: expected the path of a score table; `write_scores` makes one of an array"
        )
    check_reading(scores, higher_is, rows, by_place)
    check_together(rule, clusters, scores, dedup, dedup_prefer)
    if scores is None:
        with opened(features) as file:
            covers = dedup is None and _only_covers(rule, clusters, bool(file.classes))
            if covers:
                refuse_clusters(clusters, _UNUSED_BY_COVERS, f"--order {rule.order} ranks nothing")
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


# The others say how groups are split, and (euclidean) whether vectors of zeros have a place.
_UNUSED_BY_COVERS = ("k", "restarts", "train_points", "cache")


def _by_quota(rows: np.ndarray, one: Clustering, usable: np.ndarray) -> np.ndarray:
    """The rows, given in keeping order, by cluster quotas; those without a cluster come last."""
    if not one.spherical:
        raise UsageError(NO_QUOTA)
    if not usable.any():
        return rows
    shares = selection.complexity_shares(selection.complexity(one.centroids, one.cluster[usable], one.distance[usable]))
    placed = one.cluster[rows] >= 0
    return np.concatenate([selection.by_quota(rows[placed], one.cluster, shares), rows[~placed]])


def _arranged(ranking: Ranking, rule: Rule, rows: np.ndarray) -> np.ndarray:
    places = cover_places(ranking, rule.order, rows, rule.by, rule.seed)
    return selection.by_key(places, rows, ranking.paths, rule.seed)


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
    features, folder = ranking.features, scratch(ranking)
    groups = partition.split(
        features, groups, size, ids=ranking.paths, usable=usable, seed=seed, iterations=how.iterations,
        backend=how.backend, folder=folder,
    )  # fmt: skip
    return selection.cover(
        features, groups, method=order, ids=ranking.paths, usable=usable, seed=seed, folder=folder, workers=cores()
    )
