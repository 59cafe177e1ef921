"""What can be asked for: how images are clustered, and what is kept of a ranking; each checked, and both together.

Everything that is wrong with a question is found here, for the command line and for Python, before any work.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict, cast

from protoprune import selection
from protoprune.arguments import check_fields
from protoprune.bounds import check_seed, check_whole
from protoprune.clustering import prototypes
from protoprune.errors import UsageError

GROUPS = ("class", "cluster")
QUOTAS = ("dbp",)
NO_QUOTA = "--quota dbp does not go with --euclidean: its complexity is a product of cosine distances"


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
        check_fields(self, globals())
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
        check_fields(self, globals())
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


def _check_names(options: Mapping[str, object], *kinds: type) -> None:
    """TypeError for an option that none of these dataclasses has, with the one that may be meant."""
    names = {one.name for kind in kinds for one in fields(kind)}
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), 1)
            raise TypeError(f"unexpected keyword argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def as_rule(keep: float | Rule, options: RuleOptions) -> Rule:
    _check_names(options, Rule)
    if isinstance(keep, Rule):
        return replace(keep, **options)
    return Rule(keep, **options)


def as_clusters(clusters: Clusters | None, options: ClusterOptions) -> Clusters:
    _check_names(options, Clusters)
    return replace(clusters, **options) if clusters is not None else Clusters(**options)


def rule_and_clusters(keep: float | Rule, clusters: Clusters | None, options: Options) -> tuple[Rule, Clusters]:
    """Both, with the options by their names; one that neither has is a TypeError."""
    _check_names(options, Rule, Clusters)
    names = {one.name for one in fields(Rule)}
    rule = {name: value for name, value in options.items() if name in names}
    other = {name: value for name, value in options.items() if name not in names or name == "seed"}
    return as_rule(keep, cast(RuleOptions, rule)), as_clusters(clusters, cast(ClusterOptions, other))


def check_together(
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
        raise UsageError(NO_QUOTA)
    if scores is None:
        if not by_scores(rule):
            refuse_clusters(clusters, ("restarts",), f"--order {rule.order} takes no ranking into account")
    elif dedup is not None or rule.quota:
        refuse_clusters(clusters, ("restarts",), "--scores ranks without clustering")
    else:
        idle = ("k", "euclidean", "iterations", "restarts", "train_points", "backend", "cache")
        more = "; --dedup and --quota cluster: they take all of these but --restarts"
        refuse_clusters(clusters, idle, "--scores ranks without clustering", more)


def by_scores(rule: Rule) -> bool:
    """Whether the scores decide which images are kept."""
    return rule.order not in ("random", *selection.COVERS) or bool(rule.drop_hardest)


def refuse_clusters(clusters: Clusters, idle: Sequence[str], why: str, more: str = "") -> None:
    """UsageError for options of the clustering that would do nothing."""
    given = [one.name for one in fields(Clusters) if one.name in idle and getattr(clusters, one.name) != one.default]
    if given:
        names = ", ".join(("--no-" if name == "cache" else "--") + name.replace("_", "-") for name in given)
        raise UsageError(f"{why}: no {names} with it{more}")
