"""`protoprune info` and `protoprune sheet`: look at what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.cli.outputs import check_outputs, check_picture
from protoprune.cli.progress import say
from protoprune.cli.select import (
    Backend,
    ByPlace,
    Euclidean,
    Features,
    HigherIs,
    Iterations,
    K,
    Rows,
    Seed,
    number_of_clusters,
    say_ranking,
    table_file,
)
from protoprune.cli.tables import echo
from protoprune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


def info(
    features: Features = Path("features.h5"),
    errors: Annotated[bool, typer.Option("--errors", help="List every image that could not be used.")] = False,
) -> None:
    """Describe a feature file."""
    from protoprune.images import describe_counts
    from protoprune.pruning import open_features

    with open_features(features) as file:
        if errors:
            for path, status, reason in file.failures():
                echo(f"{path}\t{status.label}\t{reason}")
            return
        facts = file.provenance
        usable = int(file.usable.sum())
        failures = file.failure_counts()
        echo(f"{file.path}: {file.n:,} images x {file.dim} {file.features.dtype}, {_bytes(os.path.getsize(file.path))}")
        echo(f"usable      {usable:,}" + (f", the others: {describe_counts(failures, 10)}" if failures else ""))
        origin = f" ({facts['labels_from']})" if facts.get("labels_from") else ""
        echo(f"classes     {len(file.classes):,}{origin}" if file.classes else "classes     none")
        echo(f"root        {facts['root']}")
        echo(f"encoder     {facts['encoder']}, weights sha256 {facts['weights_sha256'][:16]}…, {facts['precision']}")
        if facts.get("pool"):
            echo(f"pooling     {facts['pool']}")
        echo(f"preprocess  {facts['preprocess']}")
        echo(f"written     {facts['created']} by protoprune {facts['protoprune']}, id {facts['uuid']}")
        if facts["unreadable_folder_count"]:
            first = file.unreadable_folders[0]
            echo(f"folders     {facts['unreadable_folder_count']} could not be read (first: {first[0]}: {first[1]})")
        folder = file.path + ".clusters"
        if os.path.isdir(folder):
            echo(f"clusterings {len(os.listdir(folder))} in {folder}")


def sheet(
    features: Features = Path("features.h5"),
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")] = Path("sheet.png"),
    by: Annotated[str, typer.Option(help="One row for all, or one a class or cluster: none, class, cluster.")] = "none",
    count: Annotated[int, typer.Option(min=1, max=100, help="Images on each side of a row.")] = 8,
    max_rows: Annotated[int, typer.Option(min=1, max=500, help="At most this many rows.")] = 20,
    root: Annotated[Path | None, typer.Option(help="Where the images are now [default: where they were].")] = None,
    scores: Annotated[Path | None, typer.Option(help="Rank by this score table instead.")] = None,
    higher_is: HigherIs = None,
    duplicates: Annotated[
        float | None,
        typer.Option(
            help="Show instead what `select --dedup` of this would remove: each image that stays, and its duplicates."
        ),
    ] = None,
    rows: Rows = None,
    by_place: ByPlace = False,
    k: K = "auto",
    euclidean: Euclidean = False,
    iterations: Iterations = 25,
    seed: Seed = 0,
    backend: Backend = "auto",
) -> None:
    """Write a contact sheet of the easiest and the hardest images, or of near-duplicates."""
    from protoprune import pruning
    from protoprune.files import write_file
    from protoprune.scores import check_reading
    from protoprune.sheet import contact_sheet

    if by not in ("none", "class", "cluster"):
        raise UsageError(f"--by {by}: expected none, class or cluster")
    if duplicates is not None and (scores is not None or by != "none"):
        raise UsageError(f"--duplicates {duplicates:g}: groups images by likeness; no --scores or --by with it")
    check_outputs(out, inputs=[features, table_file(scores), rows])
    check_reading(scores, higher_is, rows, by_place)
    clusters = pruning.Clusters(number_of_clusters(k), euclidean, iterations, seed, backend=backend)
    reading = {"higher_is": higher_is, "rows": rows, "by_place": by_place}
    ranking = _ranked(features, scores, reading, clusters, duplicates)
    say_ranking(ranking)
    root = os.fspath(root or ranking.root)
    check_picture(out, root, ranking.paths)
    if duplicates is not None:
        lines, heads = _duplicates(ranking, duplicates, count), ("stays", "removed as its duplicates")
        what = f"images that stay, with up to {count} of their duplicates each"
        if not lines:
            say(f"{out}: not written, no two images are that alike; try a larger --duplicates")
            return
    else:
        lines, heads = _rows(ranking, by, count, seed), ("easiest (most prototypical)", "hardest")
        what = f"the {count} easiest and the {count} hardest images"
    if len(lines) > max_rows:
        say(f"showing {max_rows} of {len(lines):,} rows; more with --max-rows {min(len(lines), 500)}")
    picture, unreadable = contact_sheet(lines[:max_rows], root, heads=heads)
    write_file(out, picture)
    if unreadable:
        say(f"warning: {unreadable} images could not be read any more; --root says where they are now")
    say(f"{out}: {min(len(lines), max_rows)} rows of {what}")


def _ranked(features: Path, scores: Path | None, reading: dict, clusters, duplicates: float | None):
    from protoprune import pruning
    from protoprune.selection import check_duplicates

    if scores is not None:
        return pruning.rank_by_table(features, scores, **reading)
    if duplicates is not None:
        check_duplicates(duplicates)
    ranking = pruning.rank(features, clusters)
    if duplicates is not None:
        pruning.deduplicate(ranking, duplicates, seed=clusters.seed)
    return ranking


def _duplicates(ranking, epsilon: float, count: int) -> list[tuple[str, list[str], list[str]]]:
    """(title, the image that stays, its duplicates) of each group, those with the most alike first."""
    import numpy as np

    gone = np.flatnonzero(ranking.duplicate_of >= 0)
    say(f"duplicates: {len(gone):,} images would be removed by `select --dedup {epsilon:g}`")
    likeness = dict(zip(gone.tolist(), _cosines(ranking, gone).tolist(), strict=True))
    groups: dict[int, list[int]] = {}
    for row in sorted(likeness, key=lambda row: (-likeness[row], row)):
        groups.setdefault(int(ranking.duplicate_of[row]), []).append(row)
    lines = []
    for stays, removed in groups.items():
        shown = removed[:count]
        title = f"1 - cosine {1 - likeness[removed[0]]:.4f} to {1 - likeness[removed[-1]]:.4f}"
        title += f" ({len(removed):,} removed)" if len(removed) > len(shown) else ""
        lines.append((title, [ranking.paths[stays]], [ranking.paths[row] for row in shown]))
    return lines


def _cosines(ranking, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) cosine of each removed image to the one that it duplicates."""
    import numpy as np

    from protoprune.pruning import open_features

    def unit(wanted: np.ndarray) -> np.ndarray:
        places, back = np.unique(wanted, return_inverse=True)
        x = file.features[places].astype(np.float64)[back]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    with open_features(ranking.file) as file:
        parts = (rows[first : first + 4096] for first in range(0, len(rows), 4096))
        cosines = [(unit(part) * unit(ranking.duplicate_of[part])).sum(axis=1) for part in parts]
    return np.clip(np.concatenate([np.zeros(0), *cosines]), -1, 1)


def _rows(ranking, by: str, count: int, seed: int) -> list[tuple[str, list[str], list[str]]]:
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
        name = "all images" if by == "none" else titles[group] if titles else f"cluster {group}"
        paths = [[ranking.paths[row] for row in part] for part in (easiest, hardest)]
        lines.append((f"{name} ({len(rows):,})", *paths))
    return lines


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return ""
