"""`protoprune info` and `protoprune sheet`: look at what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.options import ClusterOptions, Features, Root, TableOptions, given_words, refuse_idle, table_file
from protoprune.cli.outputs import check_outputs, check_picture
from protoprune.cli.progress import say
from protoprune.cli.select import say_ranking
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import echo, echo_fields
from protoprune.errors import UsageError
from protoprune.files import check_suffix, write_file
from protoprune.stores import given, public
from protoprune.text import parse_json
from protoprune.units import bytes_text, many

if TYPE_CHECKING:
    import numpy as np

    from protoprune.pruning import Clusters, Ranking
    from protoprune.pruning.ranking import Source
    from protoprune.records import Record


def info(
    file: Annotated[Path, typer.Argument(help="Feature file, feature set or training record.")] = Path("features.h5"),
    errors: Annotated[
        bool,
        typer.Option(
            "--errors",
            help="List every image that could not be used, and what was left out of shards: name, status and reason, "
            "with tabs between them; in names backslashes and control characters are escaped.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it, and say whether it is what was written.")
    ] = False,
) -> None:
    """Describe features or a training record; check them for damage.

    A feature file, a feature set or a record, finished or not.
    """
    from protoprune.features import hdf5, seals
    from protoprune.features.featurefile import FeatureFile
    from protoprune.features.opening import open_features
    from protoprune.images.listing import is_feature_set
    from protoprune.records import KIND as RECORD
    from protoprune.records import Record

    if errors and verify:
        raise UsageError("--errors and --verify: give one of them")
    if not verify:  # which answers by its exit code too
        need_stdout()
    path = given(file)
    there = hdf5.there(path)
    if seals.format_of(there) == RECORD.format:
        if errors:
            raise UsageError(f"--errors: {path} is a training record, which holds readable images only")
        with Record(there, unfinished=True) as record:
            _verify(record) if verify else _say(_describe_record(record))
        return
    if is_feature_set(there):
        from protoprune.cli.shards import show_set

        if not show_set(there, errors) and not verify:  # opening it says what is amiss
            return
    with open_features(there) if is_feature_set(there) else FeatureFile(there) as features:
        if errors:
            for one in features.problems():
                echo_fields(*one)
        elif verify:
            _verify(features)
        else:
            _say(_describe_features(features))


def _say(lines: Iterator[str]) -> None:
    for line in list(lines):  # all or none of them: what is damaged is found where it is read
        echo(line)


def _describe_features(file: Source) -> Iterator[str]:
    from protoprune.images.listing import describe_counts

    facts = file.provenance
    usable, failures = int(file.usable.sum()), file.failure_counts()
    yield f"{file.path}: {many(file.n, 'image')} x {file.dim} {file.features.dtype}, {bytes_text(file.bytes)}"
    done = int(file.finished().sum())
    if done < file.n or file.path.endswith(".partial"):
        yield f"unfinished  {done:,} of {file.n:,} images are embedded; the same `protoprune embed` does the rest"
    yield f"usable      {usable:,}" + (f", the others: {describe_counts(failures, 10)}" if failures else "")
    if left_out := len(file.left_out):
        some = many(
            left_out, "member of shards that is no image and belongs", "members of shards that are no images and belong"
        )
        yield f"left out    {some} to none (--errors lists them)"
    if file.transparent.any():
        yield f"transparent {many(int(file.transparent.sum()), 'image')}, shown on white"
    origin = f" ({facts['labels_from']})" if facts.get("labels_from") else ""
    yield f"classes     {len(file.classes):,}{origin}" if file.classes else "classes     none"
    yield f"root        {facts['root']}"
    yield f"encoder     {facts['encoder']}, weights sha256 {facts['weights_sha256'][:16]}…, {facts['precision']}"
    if facts.get("pool"):
        yield f"pooling     {facts['pool']}"
    if facts["preprocess"] != "{}":  # as of what was imported
        yield f"preprocess  {facts['preprocess']}"
    yield f"written     {facts['created']} by protoprune {facts['protoprune']}, id {facts['uuid']}"
    if facts.get("unreadable_folder_count"):
        first = file.unreadable_folders[0]
        yield f"folders     {facts['unreadable_folder_count']} could not be read (first: {first[0]}: {first[1]})"
    folder = file.path + ".clusters"
    if os.path.isdir(folder):
        sizes = [one.stat().st_size for one in os.scandir(folder)]
        yield f"clusterings {len(sizes)} in {folder}, {bytes_text(sum(sizes))}"


def _describe_record(record: Record) -> Iterator[str]:
    facts, subset, committed = record.provenance, record.subset, record.committed
    models, epochs = many(record.models, "model"), many(record.epochs, "recorded epoch")
    size = bytes_text(os.path.getsize(record.path))
    yield f"{record.path}: {models} x {epochs} x {many(record.n, 'image')}, {size}"
    done, total = int(committed.sum()), record.models * record.epochs
    if done < total or record.path.endswith(".partial"):
        yield f"unfinished  {done:,} of {total:,} epochs are recorded; the same `protoprune record` does the rest"
    yield f"models      {_recipe(facts)}"
    yield f"epochs      {', '.join(_ranges(record.epoch_numbers.tolist()))}"
    yield f"subsets     {_subsets(subset.mean(axis=1))}"
    yield f"classes     {len(record.classes):,}"
    for number, line in enumerate(_accuracies(record, subset, committed)):
        yield f"{'' if number else 'accuracy':<11} {line}"
    yield f"statistics  {', '.join(name.replace('_', ' ') for name in record.statistics)}"
    if record.test_labels is not None:
        yield f"test        {many(len(record.test_labels), 'image')}"
    yield f"root        {facts.get('root', 'unknown')}"
    yield f"seed        {facts.get('seed', 'unknown')}, computed in {facts.get('computes_in', 'unknown')}"
    yield f"written     {facts['created']} by protoprune {facts['protoprune']}, id {facts['uuid']}"


def _recipe(facts: dict[str, Any]) -> str:
    """'cnn, 10 epochs, batch size 128, lr 0.1, …': what differs from nothing."""
    recipe = dict(parse_json(facts.get("recipe", "{}")))
    model, epochs = recipe.pop("model", "unknown"), recipe.pop("epochs", None)
    first = [str(model)] + ([f"{epochs:,} epochs"] if epochs else [])
    return ", ".join(first + [f"{key.replace('_', ' ')} {value}" for key, value in recipe.items() if value])


def _ranges(numbers: list[int]) -> list[str]:
    """[1, 2, 3, 5] as ['1 to 3', '5']."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return [f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]


def _subsets(share: np.ndarray) -> str:
    low, high = 100 * share.min(), 100 * share.max()
    if low == 100:
        return "every model was trained on all images"
    return f"every model was trained on {low:.3g}{'' if low == high else f' to {high:.3g}'} % of the images"


def _accuracies(record: Record, subset: np.ndarray, committed: np.ndarray) -> Iterator[str]:
    """Mean accuracies of the models at the last recorded epoch of each, which are computed from the record."""
    import numpy as np

    labels, test = record.labels, record.test_labels
    parts: dict[str, list[float]] = {}
    for model in np.flatnonzero(committed).tolist():
        last = int(committed[model]) - 1
        right = record.read("prediction", model, epochs=slice(last, last + 1))[0] == labels
        for what, rows in (("the images trained on", subset[model]), ("the others", ~subset[model])):
            if rows.any():
                parts.setdefault(what, []).append(float(right[rows].mean()))
        if test is not None and len(test):
            right = record.test_at("test_prediction", last)[model] == test
            parts.setdefault("the test images", []).append(float(right.mean()))
    for what, values in parts.items():
        spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
        yield f"{100 * np.mean(values):.1f} %{spread} on {what}"


def _verify(file: Source | Record) -> None:
    """Say that all of a file is what was written, or raise the error that says what is not."""
    damage = file.damage()
    if damage:
        more = f"; and {len(damage) - 1:,} more: {', '.join(damage[1:4])}" if len(damage) > 1 else ""
        raise file.damaged(f"{damage[0]} is not what was written{more}")
    size = bytes_text(os.path.getsize(file.path) if os.path.isfile(file.path) else getattr(file, "bytes", 0))
    echo(f"{file.path}: whole: all of its {size} are what was written")


def sheet(
    features: Features = Path("features.h5"),
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")] = Path("sheet.png"),
    by: Annotated[str, typer.Option(help="One row for all, or one a class or cluster: none, class, cluster.")] = "none",
    count: Annotated[int, typer.Option(min=1, max=100, help="Images on each side of a row.")] = 8,
    max_rows: Annotated[int, typer.Option(min=1, max=500, help="At most this many rows.")] = 20,
    root: Root = None,
    scores: Annotated[Path | None, typer.Option(help="Rank by this score table instead.")] = None,
    duplicates: Annotated[
        float | None,
        typer.Option(
            help="Show instead what `select --dedup` of this would remove: each image that stays, and its duplicates."
        ),
    ] = None,
    *,
    reading: TableOptions,
    clustering: ClusterOptions,
) -> None:
    """Draw the easiest and the hardest images, or near-duplicates."""
    from protoprune.features.current import digests_of
    from protoprune.report.sheet import contact_sheet
    from protoprune.scores import check_reading

    _check_rows(by, duplicates, scores)
    check_outputs(out, inputs=[features, table_file(scores), reading.rows])
    check_suffix(out, (".png",), only=True)
    if scores is not None and (words := given_words(replace(clustering, seed=0))):
        raise UsageError(f"{words}: is about clusters, and --scores ranks without clustering")
    check_reading(scores, **vars(reading))
    clusters = clustering.clusters()
    ranking = _ranked(features, scores, reading, clusters, duplicates, by)
    say_ranking(ranking)
    place = given(root or ranking.root)
    check_picture(out, place, ranking.paths)
    if duplicates is not None:
        lines, heads = _duplicates(ranking, duplicates, count), ("stays", "removed as its duplicates")
        what = f"images that stay, with up to {count} of their duplicates each"
    else:
        lines, heads = _rows(ranking, by, count, clusters.seed), ("easiest (most prototypical)", "hardest")
        what = f"the {count} easiest and the {count} hardest images"
    if not lines:
        say(f"{out}: not written, no two images are that alike; try a larger --duplicates")
        return
    if len(lines) > max_rows:
        say(f"showing {max_rows} of {len(lines):,} rows; more with --max-rows {min(len(lines), 500)}")
    shown = [path for _, *sides in lines[:max_rows] for side in sides for path in side]
    content = digests_of(ranking.source, shown) if ranking.source is not None else None
    picture, unreadable = contact_sheet(
        lines[:max_rows], place, heads=heads, options=ranking.shard_options, content=content
    )
    write_file(out, picture)
    if unreadable:
        say(
            f"warning: {many(unreadable, 'image')} could not be read any more, or changed since; --root says where "
            f"they are now, if not below {public(place)}"
        )
    say(f"{out}: {many(min(len(lines), max_rows), 'row')} of {what}")


def _check_rows(by: str, duplicates: float | None, scores: Path | None) -> None:
    """UsageError for rows that there are not, and for options that do nothing to those that are asked for."""
    if by not in ("none", "class", "cluster"):
        raise UsageError(f"--by {by}: expected none, class or cluster")
    if duplicates is not None and (scores is not None or by != "none"):
        raise UsageError(f"--duplicates {duplicates:g}: groups images by likeness; no --scores or --by with it")
    if duplicates is not None:
        refuse_idle("ranks by several clusterings, and near-duplicates are those of one; leave it out", "restarts")
    elif by == "none":
        refuse_idle("goes with --by or --duplicates; without them there is one row", "max_rows")


def _ranked(
    features: Path, scores: Path | None, reading: TableOptions, clusters: Clusters, duplicates: float | None, by: str
) -> Ranking:
    from protoprune import pruning
    from protoprune.features.opening import open_features
    from protoprune.selection import check_duplicates

    if scores is not None:
        return pruning.rank_by_table(features, scores, **vars(reading))
    if duplicates is not None:
        check_duplicates(duplicates, option="--duplicates")
    source = open_features(features)
    if by == "class" and not source.classes:  # said before the clustering
        raise UsageError("--by class: the images have no classes (no first-level folders); use --by cluster")
    ranking = pruning.rank(source, clusters)
    if duplicates is not None:
        pruning.deduplicate(ranking, duplicates, seed=clusters.seed)
    return ranking


def _duplicates(ranking: Ranking, epsilon: float, count: int) -> list[tuple[str, list[str], list[str]]]:
    """(title, the image that stays, its duplicates) of each group, those with the most alike first."""
    import numpy as np

    duplicate_of = ranking.duplicate_of
    assert duplicate_of is not None  # `deduplicate` has set it
    gone = np.flatnonzero(duplicate_of >= 0)
    say(f"duplicates: {many(len(gone), 'image')} would be removed by `select --dedup {epsilon:g}`")
    likeness = dict(zip(gone.tolist(), _cosines(ranking, gone).tolist(), strict=True))
    groups: dict[int, list[int]] = {}
    for row in sorted(likeness, key=lambda row: (-likeness[row], row)):
        groups.setdefault(int(duplicate_of[row]), []).append(row)
    lines = []
    for stays, removed in groups.items():
        shown = removed[:count]
        title = f"1 - cosine {1 - likeness[removed[0]]:.4f} to {1 - likeness[removed[-1]]:.4f}"
        title += f" ({len(removed):,} removed)" if len(removed) > len(shown) else ""
        lines.append((title, [ranking.paths[stays]], [ranking.paths[row] for row in shown]))
    return lines


def _cosines(ranking: Ranking, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) cosine of each removed image to the one that it duplicates."""
    import numpy as np

    from protoprune.clustering.vectors import unit

    def units(wanted: np.ndarray) -> np.ndarray:
        places, back = np.unique(wanted, return_inverse=True)
        return unit(ranking.features[places].astype(np.float64))[back]

    kept = np.full(len(rows), -1) if ranking.duplicate_of is None else ranking.duplicate_of
    parts = (rows[first : first + 4096] for first in range(0, len(rows), 4096))
    cosines = [(units(part) * units(kept[part])).sum(axis=1) for part in parts]
    return np.clip(np.concatenate([np.zeros(0), *cosines]), -1, 1)


def _rows(ranking: Ranking, by: str, count: int, seed: int) -> list[tuple[str, list[str], list[str]]]:
    """(title, easiest, hardest) of each group that has images; the two ends never share an image."""
    import numpy as np

    from protoprune import selection
    from protoprune.pruning import groups_of

    order = selection.ranking(ranking.scores, ids=ranking.paths, order="easy", seed=seed, usable=ranking.usable)
    groups = np.zeros(len(ranking.scores), int) if by == "none" else groups_of(ranking, by)
    titles = ranking.classes if by == "class" else None
    lines = []
    for group in np.unique(groups[order]):
        rows = order[groups[order] == group]
        ends = min(count, (len(rows) + 1) // 2)
        easiest, hardest = rows[:ends], rows[len(rows) - min(ends, len(rows) - ends) :][::-1]
        name = "all images" if by == "none" else f"cluster {group}" if titles is None else [*titles, "no class"][group]
        easy, hard = ([ranking.paths[row] for row in part] for part in (easiest, hardest))
        lines.append((f"{name} ({len(rows):,})", easy, hard))
    return lines
