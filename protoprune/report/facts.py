"""A selection -> everything that its page says: numbers, tables by stop, galleries, groups, duplicates, failures.

Tables are made for every stop here, so that the page only looks them up, whatever the number of images. Of the images
themselves it gets a sample: what the galleries show, and at most 50,000 points for the map. What this module does not
know: HTML.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protoprune import pruning, selection
from protoprune.clustering.vectors import unit
from protoprune.ids import row_type
from protoprune.images.decode import Status
from protoprune.images.listing import describe_counts
from protoprune.pruning import Selected
from protoprune.report import maps, results, stops
from protoprune.report.stops import NEVER, Stops

POINTS = 50_000  # of the map
ENDS = 24  # images at each end of a gallery
GROUP_ENDS = 4  # images at each end of a class or cluster
BORDER = 6  # images at each stop of the fraction kept
GROUPS = 400  # classes or clusters that a page has thumbnails and rows for
DUPLICATE_GROUPS = 60
BINS = 60
FAILURES = 300  # names of images that could not be used


@dataclass(frozen=True)
class Options:
    """What a page shows beside the selection itself."""

    root: str | None = None  # where the images are now
    duplicates: float = 0.05  # 1 - cosine of near-duplicates to show where the selection removed none
    map: str = "pca"
    thumbnails: bool = True
    tables: Sequence[str] = ()  # score tables to compare the ranking with
    evaluation: str | None = None  # a folder that `evaluate -o` wrote
    command: tuple[str, str] | None = None  # what makes the list, around the fraction; None: not shown
    seed: int = 0


@dataclass
class Facts:
    """What goes into the page: `text` for the template, `data` and `blocks` for the script, `thumbs` by importance."""

    n: int
    text: dict[str, Any]
    data: dict[str, Any]
    blocks: dict[str, np.ndarray]  # of uint8, uint16, int32, uint32 or float32
    sample: np.ndarray  # (s,) rows that the page knows
    first: np.ndarray  # (n,) uint8, see `stops.Stops`
    thumbs: list[int] = field(default_factory=list)  # rows, most important first


def gather(chosen: Selected, options: Options) -> Facts:
    """Everything but pictures. Raises ProtopruneError where features, tables or results cannot be read."""
    ranking, n = chosen.ranking, len(chosen.keep)
    if not ranking.scored.any():  # the list needed no scores, the page does
        pruning.add_scores(ranking, ranking.clusters)
    evaluation = results.read(options.evaluation) if options.evaluation else None
    found = stops.find(ranking, chosen.rule)
    order = selection.ranking(
        ranking.scores, ids=ranking.paths, order="easy", seed=chosen.rule.seed, usable=ranking.scored
    ).astype(row_type(n))
    duplicates = _duplicates(chosen, options.duplicates)
    tables = _tables(chosen, options)
    groups = {name: one for name in ("class", "cluster") if (one := _group(chosen, name, found, order)) is not None}
    ends = {"easiest": order[:ENDS].tolist(), "hardest": order[len(order) - min(ENDS, len(order)) :][::-1].tolist()}
    border = _border(found, options.seed)
    shown_rows = [*ends.values(), *(one["rows"] for one in duplicates["groups"]), *border.values()]
    shown_rows += [one["rows"] for one in tables["pairs"]]
    shown_rows += [rows for one in groups.values() for rows in one["ends"].values()]
    wanted = [row for rows in shown_rows for row in rows]
    spread = _spread(ranking, order, options.seed)
    thumbs = list(dict.fromkeys([*wanted, *_shuffled(spread, options.seed).tolist()]))
    sample = np.unique(np.concatenate([spread, np.asarray(wanted, np.int64)]).astype(np.int64))
    xy, how = _map(chosen, sample, options)
    data = _data(chosen, options, found, sample, {"ends": ends, "border": border, "groups": groups}, duplicates, tables)
    blocks = _blocks(chosen, found, sample, xy)
    for name, one in groups.items():
        blocks[f"{name}_table"] = one["table"]
    text = {
        **_summary(chosen, n), "map_how": how, "map_points": len(sample), "duplicates": duplicates["text"],
        "spearman": tables["spearman"], "notes": tables["notes"], "evaluation": evaluation, "groups": list(groups),
    }  # fmt: skip
    return Facts(n, text, data, blocks, sample, found.first, thumbs)


def _data(
    chosen: Selected,
    options: Options,
    found: Stops,
    sample: np.ndarray,
    rows: dict[str, Any],
    duplicates: dict[str, Any],
    tables: dict[str, Any],
) -> dict[str, Any]:
    """What the script reads as JSON; images are numbered by their place in the sample."""
    ranking, place = chosen.ranking, {int(row): at for at, row in enumerate(sample)}

    def at(rows: Iterable[int]) -> list[int]:
        return [place[int(row)] for row in rows]

    def ends(found: dict[str, Sequence[int]]) -> dict[str, list[int]]:
        return {name: at(some) for name, some in found.items()}

    return {
        "stops": [repr(fraction) for fraction in found.fractions],  # as they are typed after --keep
        "counts": found.counts,
        "initial": found.initial,
        "usable": int(ranking.usable.sum()),
        "bins": _histogram(ranking, found)[1],
        "ends": ends(rows["ends"]),
        "border": {str(stop): at(some) for stop, some in rows["border"].items()},
        "groups": {
            name: {**{key: value for key, value in one.items() if key != "table"}, "ends": ends(one["ends"])}
            for name, one in rows["groups"].items()
        },
        "duplicates": [{**one, "rows": at(one["rows"])} for one in duplicates["groups"]],
        "disagreements": [{**one, "rows": at(one["rows"])} for one in tables["pairs"]],
        "classes": [shown(name) for name in ranking.classes],
        "command": options.command and list(options.command),
    }


def _blocks(chosen: Selected, found: Stops, sample: np.ndarray, xy: np.ndarray) -> dict[str, np.ndarray]:
    """What the script reads as arrays of the sample."""
    ranking = chosen.ranking
    blocks = {
        "histogram": _histogram(ranking, found)[0],
        "bytes": _bytes_by_stop(chosen, found),
        "first": found.first[sample],
        "label": ranking.labels[sample].astype(np.int32),
        "score": ranking.scores[sample].astype(np.float32),
        "xy": (xy * 65_535).round().astype(np.uint16),
    }
    if ranking.clusterings:
        blocks["cluster"] = ranking.clusterings[0].cluster[sample].astype(np.int32)
    return blocks


def _summary(chosen: Selected, n: int) -> dict[str, Any]:
    ranking = chosen.ranking
    file = ranking.source
    assert file is not None  # a page is made of a file
    facts, failures, size, dim, counts = file.provenance, file.failures(), file.size, file.dim, file.failure_counts()
    one = ranking.clusterings[0] if ranking.clusterings else None
    return {
        "name": os.path.basename(os.path.abspath(ranking.root)) or ranking.root,
        "root": ranking.root,
        "file": os.path.basename(ranking.file),
        "n": n,
        "usable": int(ranking.usable.sum()),
        "failed": int((ranking.status != Status.OK).sum()),
        "failure_counts": describe_counts(counts, 10) if counts else "",
        "failures": [(path, status.label, reason) for path, status, reason in failures[:FAILURES]],
        "more_failures": max(0, len(failures) - FAILURES),
        "unscored": int((~ranking.scored & (ranking.status == Status.OK)).sum()),
        "encoder": facts["encoder"],
        "dim": dim,
        "weights": facts["weights_sha256"][:12],
        "created": facts["created"],
        "classes": len(ranking.classes),
        "k": one.k if one else None,
        "ranked_by": "score" if ranking.table is not None else "distance to the prototype",
        "rule": describe(chosen),
        "weighted": chosen.weights is not None,
        "total_bytes": int(size.sum()),
        "removed_duplicates": 0 if ranking.duplicate_of is None else int((ranking.duplicate_of >= 0).sum()),
    }


def describe(chosen: Selected) -> str:
    """How the list is cut, in words."""
    rule = chosen.rule
    parts = [{"random": "at random", "stratified": "evenly over 50 strata of the scores"}.get(
        rule.order, f"{rule.order} first")]  # fmt: skip
    if rule.drop_hardest:
        parts.append(f"the hardest {100 * rule.drop_hardest:g} % last")
    if rule.quota:
        parts.append("cluster quotas by complexity")
    if rule.balance:
        by = rule.by or ("class" if chosen.ranking.classes else "cluster")
        parts.append(f"{100 * rule.balance:g} % of the list split evenly over every {by}")
    if rule.calibrate is not None:
        parts.append(f"{100 * rule.calibrate:g} % of the list by order, the rest at random with weights")
    return ", ".join(parts)


def _bytes_by_stop(chosen: Selected, found: Stops) -> np.ndarray:
    """(stops,) float32 megabytes of the images kept at each stop."""
    assert chosen.ranking.source is not None
    size = chosen.ranking.source.size
    kept = found.first != NEVER
    entering = np.bincount(found.first[kept], weights=size[kept], minlength=len(found.fractions))
    return (entering.cumsum() / 1e6).astype(np.float32)


def _histogram(ranking: pruning.Ranking, found: Stops) -> tuple[np.ndarray, dict[str, Any]]:
    """(stops, bins) kept images a bin of the scores, and what the bins are; the last row may be less than all."""
    scores = ranking.scores[ranking.scored]
    low, high = float(scores.min()), float(scores.max())
    inside = np.minimum(((scores - low) / max(high - low, 1e-12) * BINS).astype(np.int16), BINS - 1)
    bins = np.full(len(ranking.scores), -1, np.int16)
    bins[ranking.scored] = inside
    whole = np.bincount(inside, minlength=BINS)
    return stops.table(found.first, bins, BINS, len(found.fractions)), {"low": low, "high": high, "all": whole.tolist()}


def _group(chosen: Selected, by: str, found: Stops, order: np.ndarray) -> dict[str, Any] | None:
    """Classes or clusters: names, sizes, spread, table of kept counts, both ends, nearest clusters."""
    ranking = chosen.ranking
    if by == "class":
        if not ranking.classes:
            return None
        group, names = ranking.labels, list(ranking.classes)
    else:
        if not ranking.clusterings:
            return None
        one = ranking.clusterings[0]
        group, names = one.cluster, [f"cluster {number}" for number in range(one.k)]
    group = np.where(ranking.scored, group, -1)
    sizes = np.bincount(group[group >= 0], minlength=len(names))
    biggest = np.sort(np.argsort(-sizes, kind="stable")[:GROUPS])
    biggest = biggest[sizes[biggest] > 0]
    place_of = np.full(len(names) + 1, -1, np.int32)
    place_of[biggest] = np.arange(len(biggest))
    small = place_of[group]  # -1 stays -1: the last place
    scored = small >= 0
    total = np.bincount(small[scored], weights=ranking.scores[scored], minlength=len(biggest))
    result = {
        "names": [shown(names[number]) for number in biggest],
        "sizes": sizes[biggest].tolist(),
        "spread": [float(f"{value:.4g}") for value in total / sizes[biggest]],
        "left_out": int((sizes > 0).sum() - len(biggest)),
        "ends": _ends(order, small, len(biggest)),
        "table": stops.table(found.first, small, len(biggest), len(found.fractions)),
    }
    if by == "cluster":
        centroids = unit(one.centroids[biggest])
        cosine = centroids @ centroids.T
        np.fill_diagonal(cosine, -2)
        near = min(5, len(biggest) - 1)
        result["nearest"] = np.argsort(-cosine, axis=1, kind="stable")[:, :near].tolist()
    return result


def _ends(order: np.ndarray, group: np.ndarray, number: int) -> dict[str, list[int]]:
    """'3 easy' and '3 hard' -> rows of group 3, from rows in order, easiest first; no row stands at both ends."""
    of = group[order]
    rows = order[of >= 0][np.argsort(of[of >= 0], kind="stable")]
    first = np.searchsorted(np.sort(of[of >= 0]), np.arange(number + 1))
    ends = {}
    for one in range(number):
        members = rows[first[one] : first[one + 1]]
        easy = min(GROUP_ENDS, (len(members) + 1) // 2)
        hard = min(GROUP_ENDS, len(members) - easy)
        ends[f"{one} easy"] = members[:easy].tolist()
        ends[f"{one} hard"] = members[len(members) - hard :][::-1].tolist()
    return ends


def _border(found: Stops, seed: int) -> dict[int, list[int]]:
    """stop -> some of the images that enter the list there."""
    rows = _shuffled(np.flatnonzero(found.first != NEVER), seed)
    rows = rows[np.argsort(found.first[rows], kind="stable")]
    starts = np.searchsorted(found.first[rows], np.arange(len(found.fractions) + 1))
    return {
        stop: rows[starts[stop] : min(starts[stop] + BORDER, starts[stop + 1])].tolist()
        for stop in range(len(found.fractions))
        if starts[stop + 1] > starts[stop]
    }


def _duplicates(chosen: Selected, epsilon: float) -> dict[str, Any]:
    """Groups of near-duplicates, mixed classes first: those removed, or those that --dedup would remove."""
    ranking = chosen.ranking
    duplicate_of, text = ranking.duplicate_of, "removed by this list"
    if duplicate_of is None:
        if not ranking.clusterings:
            return {
                "groups": [],
                "text": {"none": "A score table was ranked by; without clusters none are searched for."},
            }
        probe = pruning.Ranking(**vars(ranking))
        pruning.deduplicate(probe, epsilon, seed=chosen.rule.seed)
        duplicate_of, text = probe.duplicate_of, f"that --dedup {epsilon:g} would remove; this list keeps them"
    assert duplicate_of is not None  # `deduplicate` has set it
    gone = np.flatnonzero(duplicate_of >= 0)
    stays = duplicate_of[gone]
    by_kept = np.argsort(stays, kind="stable")
    names, starts = np.unique(stays[by_kept], return_index=True)
    members = np.split(gone[by_kept], starts[1:]) if len(names) else []
    groups: list[dict[str, Any]] = []
    for kept, others in zip(names.tolist(), members, strict=True):
        rows = [kept, *others.tolist()]
        labels = {int(ranking.labels[row]) for row in rows} - {-1}  # of no class is of no other one
        groups.append({"rows": rows[:8], "size": len(rows), "mixed": len(labels) > 1})
    mixed = sum(one["mixed"] for one in groups)
    groups.sort(key=lambda one: (not one["mixed"], -one["size"], one["rows"][0]))
    counts = {"images": len(gone), "groups": len(groups), "mixed": mixed, "what": text, "shown": DUPLICATE_GROUPS}
    return {"groups": groups[:DUPLICATE_GROUPS], "text": counts}


def _tables(chosen: Selected, options: Options) -> dict[str, Any]:
    """Spearman matrix of the ranking and the score tables, and the images on which each differs most from it."""
    if not options.tables:
        return {"spearman": None, "pairs": [], "notes": []}
    from protoprune.comparison import compare
    from protoprune.scores import read_scores

    ranking = chosen.ranking
    own = "this ranking"
    tables, notes = {own: np.where(ranking.scored, ranking.scores, np.nan)}, []
    for path in options.tables:
        name = os.path.basename(path)
        name, table = name if name not in tables else os.fspath(path), read_scores(path, ranking.paths)
        tables[name] = table.scores
        notes.append(f"{name}: {'; '.join(table.notes())}")
    result = compare(tables, ranking.paths, resamples=0)
    compared = np.flatnonzero(~np.any([np.isnan(scores) for scores in tables.values()], axis=0))
    pairs = []
    for number, name in enumerate(result.names[1:], 1):
        gap = result.percentiles[number] - result.percentiles[0]
        for sign, what in ((1, f"hard by {name}, easy by {own}"), (-1, f"easy by {name}, hard by {own}")):
            rows = compared[np.argsort(-sign * gap, kind="stable")[:12]].tolist()
            pairs.append({"title": shown(what), "rows": rows})
    matrix = [[f"{value:.2f}" for value in row] for row in result.spearman]
    spearman = {"names": result.names, "rows": matrix, "images": len(result.paths)}
    return {"spearman": spearman, "pairs": pairs, "notes": notes}


def _spread(ranking: pruning.Ranking, order: np.ndarray, seed: int) -> np.ndarray:
    """At most POINTS rows, in proportion from every cluster (or along the scores, where there are none)."""
    if len(order) <= POINTS:
        return order
    rows = _shuffled(order, seed)
    of_cluster = ranking.clusterings[0].cluster if ranking.clusterings else None
    rows = order if of_cluster is None else rows[np.argsort(of_cluster[rows], kind="stable")]
    return rows[np.linspace(0, len(rows) - 1, POINTS).astype(np.int64)]


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    return rows[np.random.default_rng([seed, 77]).permutation(len(rows))]


def _map(chosen: Selected, sample: np.ndarray, options: Options) -> tuple[np.ndarray, str]:
    usable = chosen.ranking.readable[sample]
    features = chosen.ranking.features[sample]
    xy, how = maps.project(features[usable], options.map, options.seed)
    whole = np.zeros((len(sample), 2), np.float32)
    whole[usable] = xy
    return whole, how


def shown(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 and control characters are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
