"""`protoprune info` and `protoprune sheet`: look at what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from protoprune.cli.outputs import check_outputs
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
    say_table,
    table_file,
)
from protoprune.errors import UsageError


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
                _print(f"{path}\t{status.label}\t{reason}")
            return
        facts = file.provenance
        usable = int(file.usable.sum())
        failures = file.failure_counts()
        _print(
            f"{file.path}: {file.n:,} images x {file.dim} {file.features.dtype}, {_bytes(os.path.getsize(file.path))}"
        )
        _print(f"usable      {usable:,}" + (f", the others: {describe_counts(failures, 10)}" if failures else ""))
        origin = f" ({facts['labels_from']})" if facts.get("labels_from") else ""
        if file.transparent:
            _print(f"transparent {file.transparent:,} images, shown on white")
        _print(f"classes     {len(file.classes):,}{origin}" if file.classes else "classes     none")
        _print(f"root        {facts['root']}")
        _print(f"encoder     {facts['encoder']}, weights sha256 {facts['weights_sha256'][:16]}…, {facts['precision']}")
        if facts.get("pool"):
            _print(f"pooling     {facts['pool']}")
        _print(f"preprocess  {facts['preprocess']}")
        _print(f"written     {facts['created']} by protoprune {facts['protoprune']}, id {facts['uuid']}")
        if facts["unreadable_folder_count"]:
            first = file.unreadable_folders[0]
            _print(f"folders     {facts['unreadable_folder_count']} could not be read (first: {first[0]}: {first[1]})")
        folder = file.path + ".clusters"
        if os.path.isdir(folder):
            _print(f"clusterings {len(os.listdir(folder))} in {folder}")


def sheet(
    features: Features = Path("features.h5"),
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")] = Path("sheet.png"),
    by: Annotated[str, typer.Option(help="One row for all, or one a class or cluster: none, class, cluster.")] = "none",
    count: Annotated[int, typer.Option(min=1, max=100, help="Images on each side of a row.")] = 8,
    max_rows: Annotated[int, typer.Option(min=1, max=500, help="At most this many rows.")] = 20,
    root: Annotated[Path | None, typer.Option(help="Where the images are now [default: where they were].")] = None,
    scores: Annotated[Path | None, typer.Option(help="Rank by this score table instead.")] = None,
    higher_is: HigherIs = None,
    rows: Rows = None,
    by_place: ByPlace = False,
    k: K = "auto",
    euclidean: Euclidean = False,
    iterations: Iterations = 25,
    seed: Seed = 0,
    backend: Backend = "auto",
) -> None:
    """Write a contact sheet of the easiest and the hardest images."""
    from protoprune import pruning
    from protoprune.files import write_file
    from protoprune.scores import check_reading
    from protoprune.sheet import contact_sheet

    if by not in ("none", "class", "cluster"):
        raise UsageError(f"--by {by}: expected none, class or cluster")
    check_outputs(out, inputs=[features, table_file(scores), rows])
    check_reading(scores, higher_is, rows, by_place)
    if scores is not None:
        ranking = pruning.rank_by_table(features, scores, higher_is=higher_is, rows=rows, by_place=by_place)
        say_table(ranking)
    else:
        number = number_of_clusters(k)
        ranking = pruning.rank(
            features, k=number, euclidean=euclidean, iterations=iterations, seed=seed, backend=backend
        )
    for note in ranking.notes():
        say(f"warning: {note}")
    lines = _rows(ranking, by, count, seed)
    if len(lines) > max_rows:
        say(f"showing {max_rows} of {len(lines)} rows; more with --max-rows {len(lines)}")
    picture, unreadable = contact_sheet(lines[:max_rows], os.fspath(root or ranking.root))
    write_file(out, picture)
    if unreadable:
        say(f"warning: {unreadable} images could not be read any more; --root says where they are now")
    say(f"{out}: {min(len(lines), max_rows)} rows of the {count} easiest and the {count} hardest images")


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


def _print(text: str) -> None:
    typer.echo(text.encode(errors="backslashreplace").decode())
