"""How much of a list hangs on one seed and one number of clusters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from protoprune.errors import UsageError
from protoprune.pruning.choosing import Selected, prune
from protoprune.pruning.ranking import Ranking, rank
from protoprune.pruning.rules import Rule, by_scores
from protoprune.scores import mean_overlap, overlap, spearman
from protoprune.selection import COVERS


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
    rule = _by_order_alone(reference.rule)
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
    if not by_scores(rule):
        raise UsageError(f"--stability compares rankings by prototypes; --order {rule.order} is none")


def restart_overlap(ranking: Ranking, rule: Rule) -> float:
    """Mean overlap of the sets that the single restarts would keep, by order alone: what one seed is worth."""
    singles = [replace(ranking, scores=one.distance, clusterings=[one]) for one in ranking.clusterings]
    return mean_overlap([prune(one, _by_order_alone(rule)).keep for one in singles])


def _by_order_alone(rule: Rule) -> Rule:
    by = rule.by if rule.order in COVERS else None  # which also says what is covered
    return replace(rule, quota=None, balance=0.0, by=by, calibrate=None)
