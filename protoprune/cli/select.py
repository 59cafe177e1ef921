"""`protoprune select`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.options import ClusterOptions, Features, Root, RuleOptions, Scores, TableOptions, table_file
from protoprune.cli.outputs import below, check_beside, check_outputs
from protoprune.cli.progress import say
from protoprune.cli.streams import need_stdout
from protoprune.errors import UsageError
from protoprune.files import CLASSES, check_free, check_suffix, write_file, write_links, write_stdout
from protoprune.stores import given, is_url
from protoprune.units import many

if TYPE_CHECKING:
    import numpy as np

    from protoprune.pruning import Ranking, Selected, StabilityRow
    from protoprune.scores import ScoreTable


@dataclass(frozen=True)
class ListOptions:
    """What is written of a selection, and where."""

    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the list here; - is stdout.")] = None
    format: Annotated[
        str | None,
        typer.Option(
            help="txt, csv, jsonl (paths), npy (row indices) or datacomp (uids) [default: by suffix, else txt]."
        ),
    ] = None
    null: Annotated[bool, typer.Option("-0", "--null", help="End each path with NUL instead of a line break.")] = False
    absolute: Annotated[bool, typer.Option("--absolute", help="Write absolute paths.")] = False
    root: Root = None
    removed: Annotated[Path | None, typer.Option(help="Write the images that were not kept here.")] = None
    links: Annotated[Path | None, typer.Option(help="Make a folder of links to the kept images.")] = None
    hard_links: Annotated[bool, typer.Option("--hard-links", help="Make the links of --links hard ones.")] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the links of an earlier --links, if the folder holds no more.")
    ] = False
    manifest: Annotated[Path | None, typer.Option(help="Write one row an image, .csv or .jsonl.")] = None

    @property
    def file(self) -> Path | None:
        """Of the list; None for stdout."""
        return None if self.out == Path("-") else self.out

    @property
    def kind(self) -> str:
        """The format of the list: what was asked for, else what the file's suffix says, else txt."""
        from protoprune.lists import list_format

        return self.format or (self.file and list_format(self.file)) or "txt"

    @property
    def kind_of_removed(self) -> str:
        """The same of the images that go: a suffix that says it comes first, since --format is about the list."""
        from protoprune.lists import list_format

        return (self.removed and list_format(self.removed)) or self.format or "txt"

    def check(self, inputs: list[Path | None]) -> None:
        """Find out what cannot be written before the work is done."""
        import numpy as np

        from protoprune.lists import check_list

        need_stdout(self.file)
        for option, wanted in (("--hard-links", self.hard_links), ("--overwrite", self.overwrite)):
            if wanted and self.links is None:
                raise UsageError(f"{option} goes with --links DIR")
        if self.links is not None and not self.overwrite:
            check_free(self.links)
        self._check_root()
        check_outputs(self.removed, self.manifest, inputs=inputs, links=self.links, stdout=self.file)
        self._check_name()
        for option, path in (("-o", self.file), ("--removed", self.removed)):
            check_suffix(path, (".csv", ".jsonl", ".npy"), option)
        check_suffix(self.manifest, (".csv", ".jsonl"), "--manifest")
        check_list([], np.empty(0, int), self.kind, null=self.null)
        if self.removed is not None:
            check_list([], np.empty(0, int), self.kind_of_removed, null=self.null)
        if self.format in ("npy", "datacomp") and self.file is None and sys.stdout.isatty():
            raise UsageError(f"--format {self.format} is binary; give -o FILE or redirect stdout")

    def _check_root(self) -> None:
        """UsageError for a root that nothing written is below, and for absolute paths where there are none."""
        if self.absolute and self.kind in ("npy", "datacomp"):
            raise UsageError(f"--absolute: a list in the format {self.kind} holds no paths; leave it out")
        if self.root is not None and self.links is None and not self.absolute:
            raise UsageError(f"--root {self.root}: goes with --links or --absolute; a list holds paths below the root")

    def _check_name(self) -> None:
        """UsageError for a list under a name that says that it is in another format."""
        from protoprune.lists import list_format

        format, file = self.format, self.file
        said = None if file is None else list_format(file)
        same = {"datacomp": "npy"}.get(format or "", format)
        if format is not None and said not in (None, same) and not (said == "txt" and format in ("csv", "jsonl")):
            raise UsageError(
                f"--format {format}: -o {self.file} says {said}; leave --format out, or choose another name"
            )


def select(
    features: Features = Path("features.h5"),
    *,
    keep: Annotated[float, typer.Option(help="Fraction of the images to KEEP, above 0 and at most 1.")],
    how: RuleOptions,
    scores: Scores = None,
    reading: TableOptions,
    clustering: ClusterOptions,
    stability: Annotated[
        bool, typer.Option("--stability", help="Say how much of the list other seeds, k/2 and 2k would keep.")
    ] = False,
    lists: ListOptions,
) -> None:
    """Write the list of images to keep, on stdout or to -o FILE."""
    from protoprune import pruning, stores

    rule, clusters = how.rule(keep, clustering.seed), clustering.clusters()
    lists.check([features, table_file(scores), reading.rows])
    if stability:
        pruning.check_stability(rule)
        if scores is not None:
            raise UsageError("--scores ranks without clustering: no --stability with it")
    chosen = pruning.select(
        features, rule, clusters, scores=scores, **vars(reading), dedup=how.dedup, dedup_prefer=how.dedup_prefer,
        count=True,
    )  # fmt: skip
    ranking = chosen.ranking
    say_ranking(ranking)
    if how.dedup is not None:
        _say_duplicates(ranking, how.dedup)
    if (seeds := len(ranking.clusterings)) > 1:
        share = pruning.restart_overlap(ranking, rule)
        say(f"restarts: {seeds} seeds; the sets that single seeds keep overlap by {100 * share:.1f} % on average")
    place = _place(lists.root or ranking.root, lists.absolute)
    if lists.links is not None:
        if stores.is_url(place):
            raise UsageError(f"--links: the images are on a store ({stores.public(place)}), to which no link can lead")
        check_free(lists.links, place, lists.overwrite)
        check_beside(lists.links, place, ranking.paths, f"--links {lists.links}")
    _write(chosen, lists, place)
    if "npy" in (lists.kind, lists.removed and lists.kind_of_removed):
        pruning.warn_of_reordered(ranking)
    _say_selected(chosen)
    say_notes(chosen.notes())
    if chosen.weights is not None and lists.kind in ("txt", "npy"):
        say("hint: this list holds no weights; write it with -o kept.csv (or --format csv), or add --manifest all.csv")
    if stability:
        _say_stability(pruning.stability(chosen))


def _place(root: str | os.PathLike[str], absolute: bool) -> str:
    """The root as lists and links have it; with a word where absolute paths would lead nowhere."""
    place = given(root)
    if is_url(place):
        return place
    if absolute and not os.path.isdir(place):
        say(f"warning: --absolute: {place} is no folder on this machine; --root says where the images are now")
    return os.path.abspath(place)


def _write(chosen: Selected, lists: ListOptions, root: str) -> None:
    import numpy as np

    from protoprune.lists import check_list, list_chunks, list_format, manifest_chunks, packed

    ranking = chosen.ranking
    kept, gone = np.flatnonzero(chosen.keep), np.empty(0, int)
    check_list(ranking.paths, kept, lists.kind, null=lists.null)
    if lists.removed is not None:  # duplicates are among them
        gone = np.flatnonzero(ranking.readable & ~chosen.keep)
        check_list(ranking.paths, gone, lists.kind_of_removed, null=lists.null)

    def text(rows: np.ndarray, path: Path | None, kind: str, weights: np.ndarray | None = None) -> Iterable[bytes]:
        folder = root if lists.absolute else None
        chunks = list_chunks(ranking.paths, rows, ranking.scores, kind, null=lists.null, weights=weights, folder=folder)
        return packed(path, chunks) if path is not None else chunks

    if lists.removed is not None:
        write_file(lists.removed, text(gone, lists.removed, lists.kind_of_removed))
    if lists.manifest is not None:
        kind = "jsonl" if list_format(lists.manifest) == "jsonl" else "csv"
        zeros = ranking.undirected
        chunks = manifest_chunks(lambda rows: _columns(chosen, zeros[rows], rows), len(chosen.keep), kind)
        write_file(lists.manifest, packed(lists.manifest, chunks))
    if lists.links is not None:
        _write_links(lists.links, root, chosen, lists.hard_links, lists.overwrite)
    if lists.file is not None:
        write_file(lists.file, text(kept, lists.file, lists.kind, chosen.weights))
    else:
        write_stdout(text(kept, None, lists.kind, chosen.weights))


def _write_links(folder: Path, root: str, chosen: Selected, hard: bool, overwrite: bool) -> None:
    level, classes = _folders_of_classes(chosen.ranking)
    kept_paths = chosen.kept_paths

    def folders(paths: Sequence[str]) -> set[str]:
        parts = (path.split("/", level) for path in paths)
        return {"/".join(part[:level]) for part in parts if len(part) > level} if classes else set()

    every = folders(chosen.ranking.paths)
    write_links(folder, root, kept_paths, folders=sorted(every), classes=classes, hard=hard, overwrite=overwrite)
    lost = sorted(every - folders(kept_paths))
    if lost:
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5:,} more" if len(lost) > 5 else "")
        say(
            f"warning: {folder} has no image of {len(lost):,} of {len(every):,} classes ({names}); their folders are "
            "empty, which keeps the others' numbers in Keras, DALI and Ultralytics, and which ImageFolder refuses "
            f"without allow_empty=True; timm wants --class-map {folder / CLASSES}"
        )
    if below(folder, root):
        say(f"warning: {folder} lies in the folder of the images, where `protoprune embed` will find them twice")


def _folders_of_classes(ranking: Ranking) -> tuple[int, list[str]]:
    """(the level of the folders that the classes are called by, all of that level and no other; the classes in order);
    of classes that are called otherwise, those that the first-level folders are."""
    from protoprune.images.listing import folder_labels

    names = [[ranking.classes[label]] if label >= 0 else [] for label in ranking.labels.tolist()]
    folders = [path.split("/")[:-1] for path in ranking.paths]
    for level in range(max(map(len, folders), default=0) if ranking.classes else 0):
        if all(own[level : level + 1] == name for own, name in zip(folders, names, strict=True)):
            return level + 1, list(ranking.classes)
    return 1, folder_labels(ranking.paths)[1]


def _columns(chosen: Selected, zeros: np.ndarray, rows: slice) -> dict[str, Any]:
    """The manifest: one row an image of the feature file, unusable ones included; some of its rows, and which of them
    are all zeros."""
    import numpy as np

    from protoprune.images.decode import Status

    ranking, n = chosen.ranking, len(chosen.keep[rows])
    cluster, distance = np.full(n, -1), np.full(n, np.nan)
    for one in ranking.clusterings[:1]:
        cluster, distance = one.cluster[rows], one.distance[rows]
    status = zip(ranking.status[rows].tolist(), zeros.tolist(), strict=True)
    columns = {
        "path": ranking.paths[rows],
        "class": [ranking.classes[label] if label >= 0 else "" for label in ranking.labels[rows].tolist()],
        "cluster": cluster,
        "distance": distance,
        "score": ranking.scores[rows],
        "rank": chosen.rank[rows],
        "keep": chosen.keep[rows].astype(int),
        "status": ["all zeros" if zero else Status(value).label for value, zero in status],
    }
    if chosen.weights is not None:
        columns["weight"] = chosen.weights[rows]
    if ranking.duplicate_of is not None:
        columns["duplicate_of"] = _originals(ranking, ranking.duplicate_of[rows])
    return columns


def _originals(ranking: Ranking, duplicate_of: np.ndarray) -> list[str]:
    """The paths of the images that these duplicate; '' for those that duplicate none."""
    from protoprune.paths import picked

    names = iter(picked(ranking.paths, duplicate_of[duplicate_of >= 0]))
    return [next(names) if row >= 0 else "" for row in duplicate_of.tolist()]


def say_ranking(ranking: Ranking) -> None:
    import numpy as np

    from protoprune.images.decode import Status
    from protoprune.images.listing import describe_counts

    excluded = ranking.status != Status.OK
    say(f"{ranking.file}: {many(len(excluded), 'image')}")
    if excluded.any():
        from collections import Counter

        why = Counter(Status(status).label for status in ranking.status[excluded])
        say(f"excluded: {int(excluded.sum()):,} that could not be read ({describe_counts(why, 10)})")
    if ranking.table is not None:
        say_table(ranking, ranking.table)
    for one in ranking.clusterings[:1]:
        points = int((one.cluster >= 0).sum())
        seen = "all" if one.train_points == points else f"a sample of {one.train_points:,} of"
        kind = "spherical" if one.spherical else "Euclidean"
        cached = " (from the cache)" if ranking.cached == len(ranking.clusterings) else ""
        say(
            f"k-means: k = {one.k:,} ({ranking.k_rule}), {kind}, {one.iterations} iterations on {seen} {points:,} "
            f"images, seed {one.seed}, {one.backend}{cached}"
        )
        sizes = one.sizes()
        empty = f", {int((sizes == 0).sum())} empty" if (sizes == 0).any() else ""
        say(f"clusters: {sizes.min():,} to {sizes.max():,} images, median {int(np.median(sizes)):,}{empty}")
    say_notes(ranking.notes())
    values = ranking.scores[ranking.scored]
    if len(values):
        low, quarter, median, upper, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
        what = "distance" if ranking.table is None else "score"
        say(f"{what}: {low:.4g} to {high:.4g}, quartiles {quarter:.4g}, {median:.4g}, {upper:.4g}")


def say_notes(notes: Iterable[str]) -> None:
    """What to know before trusting a ranking or a list."""
    for note in notes:
        say(f"warning: {note}")


def say_table(ranking: Ranking, table: ScoreTable) -> None:
    """How the score table of a ranking was read, and what did not match, on either side."""
    if table.missing:
        scored, none = int(ranking.scored.sum()), many(table.missing, "has none and is", "have none and are")
        say(f"scores: {many(scored, 'image has', 'images have')} one; {none} not kept")
    for note in table.notes():
        say(f"scores: {note}")


def _say_duplicates(ranking: Ranking, epsilon: float) -> None:
    import numpy as np

    gone, left = int((ranking.scored & ~ranking.usable).sum()), int(ranking.usable.sum())
    say(
        f"duplicates: {gone:,} of {gone + left:,} images removed (cosine to a kept one above {1 - epsilon:g}); "
        f"{left:,} remain, of which --keep is a fraction"
    )
    near = ranking.likeness
    assert near is not None  # it was counted
    say("duplicates: within clusters, --dedup E would find")
    for threshold, pairs, images in zip(near.thresholds, near.pairs, near.images, strict=True):
        mark = " (this run)" if abs(threshold - epsilon) < 1e-6 else ""
        say(f"  E {threshold:<6g} {pairs:>9,} pairs, among {images:,} images{mark}")
    if near.suggested is not None:
        say(
            f"  an image's nearest one is at {np.nanmedian(near.nearest):.3g} (median); a quarter of that, --dedup "
            f"{near.suggested:g}, is where near-duplicates usually end; `protoprune sheet --duplicates "
            f"{near.suggested:g}` shows them"
        )


def _say_selected(chosen: Selected) -> None:
    import numpy as np

    ranking, usable, rule = chosen.ranking, chosen.ranking.usable, chosen.rule
    kept, of = int(chosen.keep.sum()), int(usable.sum())
    group = rule.by or ("class" if ranking.classes else "cluster")
    how = {
        "random": "at random",
        "stratified": "evenly over 50 strata of the scores",
        "cover": f"herding in each {group}",
        "facility": f"facility location in each {group}",
    }.get(rule.order, f"{rule.order} first")
    how += ", cluster quotas" if rule.quota else ""
    how += f", balance {rule.balance:g} by {group}" if rule.balance else ""
    say(f"kept {kept:,} of {of:,} ({100 * kept / of:.1f} %, {how}), removed {of - kept:,}")
    if chosen.weights is not None and rule.calibrate is not None:
        from protoprune.selection import by_score

        drawn, first = float(np.nanmax(chosen.weights)), by_score(kept, rule.calibrate)
        say(f"calibrated: {first:,} by order with weight 1, {kept - first:,} at random with weight {drawn:.6g}")
    if chosen.dropped is not None:
        back = int((chosen.dropped & chosen.keep).sum())
        also = f"; {back:,} of them are kept all the same, easiest first, to make up the number" if back else ""
        say(f"dropped the {int(chosen.dropped.sum()):,} hardest{also}")
    if not (usable & (ranking.labels >= 0)).any():
        return
    # Images without a class are a group of their own for --balance, and no class here: counted in front, and left out.
    sizes = np.bincount(ranking.labels[usable] + 1, minlength=len(ranking.classes) + 1)
    shares = (np.bincount(ranking.labels[chosen.keep] + 1, minlength=len(sizes)) / np.maximum(sizes, 1))[1:]
    groups, sizes = int((sizes > 0).sum()), sizes[1:]
    shares[sizes == 0] = np.nan
    low, high = np.nanargmin(shares), np.nanargmax(shares)
    least, most = f"{100 * shares[low]:.1f} %", f"{100 * shares[high]:.1f} %"
    span = f"smallest kept share {least} ({ranking.classes[low]}), largest {most} ({ranking.classes[high]})"
    say(f"classes: {f'{least} of each is kept' if least == most else span}")
    gone = int((shares == 0).sum())
    if gone:
        say(f"warning: {gone} of {len(sizes)} classes lost every image; {_to_keep_each(chosen, groups)}")
    elif not rule.balance and shares[high] > 2 * shares[low]:
        say("hint: the classes are pruned unevenly; --balance 0.5 guarantees each of them a share")


def _to_keep_each(chosen: Selected, groups: int) -> str:
    """What gives every class at least one image; groups: how many --balance splits the list over."""
    from protoprune.selection import by_score

    rule, kept = chosen.rule, int(chosen.keep.sum())
    by_order = kept if rule.calibrate is None else by_score(kept, rule.calibrate)
    if by_order < groups:
        what = "keep" if rule.calibrate is None else "take by order"
        return f"{what} at least {groups:,} images for one of each"
    least = max(0.5, math.ceil(100 * groups / by_order) / 100)  # floor(balance * kept / classes) is at least 1
    return f"--balance {least:g} --by class keeps some of each"


def _say_stability(rows: list[StabilityRow]) -> None:
    say("stability against this ranking:")
    for row in rows:
        say(f"  k {row.k:,}, seed {row.seed}: Spearman {row.spearman:.3f}, kept sets overlap {100 * row.overlap:.1f} %")
