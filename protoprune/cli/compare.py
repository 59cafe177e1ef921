"""`protoprune compare`: how far several score tables agree."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.cli.options import TableOptions, numbers, refuse_idle, table_file
from protoprune.cli.outputs import check_outputs, check_picture
from protoprune.cli.progress import say
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import print_table
from protoprune.errors import UsageError
from protoprune.files import check_suffix, table_csv, write_file
from protoprune.units import many

if TYPE_CHECKING:
    import numpy as np

    from protoprune.comparison import Comparison
    from protoprune.scores import ScoreTable
    from protoprune.scores.table import Table
    from protoprune.sources.shard import ShardOptions

_FIGURES = (".png", ".svg", ".pdf")
_SHEET_ROWS = 10


def compare(
    tables: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more score tables; FILE:COLUMN is one of several columns or arrays, FILE:easier says what "
            "higher means in this one."
        ),
    ],
    features: Annotated[
        Path | None, typer.Option(help="Feature file: the images, their classes, and the root of the sheet.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBERS", help="Compare the sets kept at these fractions, hardest first: 0.5,0.2."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write one row a pair to this .csv file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the matrix to this .png, .svg or .pdf file.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Write the share of each class that is kept to this .csv file.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG of the images on which two tables disagree most.")] = None,
    count: Annotated[int, typer.Option(min=1, max=100, help="Images on each side of a row of the sheet.")] = 8,
    root: Annotated[Path | None, typer.Option(help="Where the images are [default: where --features says].")] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=100_000, help="Resamples behind the 95 % intervals; 0 for none.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2_000_000_000, help="Seed of the resamples and of ties.")] = 0,
    *,
    reading: TableOptions,
) -> None:
    """Compare score tables: correlations, and what each would keep.

    Spearman rank correlations, and the overlap of the sets that would be kept.
    """
    from protoprune import comparison, selection
    from protoprune.lists import packed
    from protoprune.scores import check_reading

    need_stdout(out, figure, classes, sheet)
    keeps = list(dict.fromkeys(numbers(keep, "--keep")))
    for fraction in keeps:
        selection.check(fraction)
    tables = _without_results(tables)
    check_reading(tables, **vars(reading))
    if len(tables) < 2:
        raise UsageError(f"{len(tables)} score table: expected two or more to compare")
    if classes is not None and not keeps:
        raise UsageError(f"--classes {classes}: goes with --keep, for example --keep 0.5")
    if sheet is None:
        refuse_idle("goes with --sheet, which shows images", "count", "root")
    elif features is None and root is None:
        raise UsageError(f"--sheet {sheet}: where are the images? give --features FILE or --root DIR")
    if not keeps and not bootstrap:
        refuse_idle("is of the resamples of --bootstrap and of the ties of --keep, and neither is asked for", "seed")
    _check_outputs([*map(table_file, tables), reading.rows], features, out, figure, classes, sheet)
    result, place, options = _load(tables, features, reading, root, keeps, classes is not None, bootstrap, seed)
    for picture in (sheet, figure):
        check_picture(picture, place, result.paths)
    for path, rows in ((out, comparison.pair_rows), (classes, comparison.class_rows)):
        if path is not None:
            write_file(path, packed(path, [table_csv(rows(result))]))
    if figure is not None:
        write_file(figure, comparison.draw(result, figure.suffix[1:].lower()))
    if sheet is not None:
        _write_sheet(result, sheet, place, options, count, features)
    _say_result(result, bootstrap)
    _show(result)


def _without_results(files: list[Path]) -> list[Path]:
    """The score tables: `compare *.csv -o pairs.csv` finds its own pairs.csv among them the second time."""
    tables = [file for file in files if not _is_result(file)]
    for file in files:
        if file not in tables:
            say(f"{file}: left out, it is what `protoprune compare` wrote and no score table")
    return tables


def _is_result(file: Path) -> bool:
    from protoprune.comparison import CLASS_COLUMNS, PAIR_COLUMNS

    try:
        if not file.is_file():  # nothing is taken out of a pipe
            return False
        with open(file, "rb") as opened:
            first = opened.readline(1000).decode(errors="replace").rstrip("\r\n").split(",")
    except OSError:
        return False
    return first[: len(PAIR_COLUMNS)] == PAIR_COLUMNS or first == CLASS_COLUMNS


def _check_outputs(tables: list[Path | None], features: Path | None, *outputs: Path | None) -> None:
    """Find out what cannot be written before the work is done; `outputs` are the csv, figure, classes and sheet."""
    figure = outputs[1]
    if figure is not None and figure.suffix.lower() not in _FIGURES:
        raise UsageError(f"--figure {figure}: expected a name that ends in {', '.join(_FIGURES)}")
    check_outputs(*outputs, inputs=[*tables, features])
    for option, path in (("-o", outputs[0]), ("--classes", outputs[2])):
        check_suffix(path, (".csv",), option)
    check_suffix(outputs[3], (".png",), "--sheet", only=True)


def _load(
    files: list[Path],
    features: Path | None,
    reading: TableOptions,
    root: Path | None,
    keeps: list[float],
    by_class: bool,
    bootstrap: int,
    seed: int,
) -> tuple[Comparison, str, ShardOptions | None]:
    """Read, join and compare, saying what did not match; also where the images are, and how shards were read."""
    import numpy as np

    from protoprune import comparison
    from protoprune.scores import read_table

    names = comparison.short_names(files)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{twice}: is given twice")
    read = {name: read_table(source) for name, source in zip(names, files, strict=True)}
    _check_reading(list(read.values()), reading)
    tables = {name: _as_told(table, reading) for name, table in read.items()}
    paths = labels = classes = usable = options = None
    if features is not None:
        from protoprune.features.opening import open_features
        from protoprune.sources.shard import ShardOptions

        with open_features(features) as file:
            paths, labels, classes, usable = file.paths, file.labels, file.classes, file.usable
            options = ShardOptions.of(file.provenance)
            root = root or file.provenance["root"]
    ids, matched = comparison.join(tables, paths, by_place=reading.by_place)
    del read, tables  # of millions of images their names are what takes most
    arrays = {name: table.scores for name, table in matched.items()}
    for scores in arrays.values():
        if usable is not None:
            scores[~usable] = np.nan
    result = comparison.compare(
        arrays, ids, keeps=keeps, labels=labels, classes=classes, by_class=by_class, resamples=bootstrap, seed=seed
    )
    _say_tables(matched, len(ids) if usable is None else int(usable.sum()), arrays, result)
    return result, os.fspath(root or ""), options


def _check_reading(tables: list[Table], reading: TableOptions) -> None:
    """UsageError for options of tables that do not say all of it, where none of these is one."""
    if reading.higher_is is not None and not any(table.direction == "assumed" for table in tables):
        raise UsageError(f"--higher-is {reading.higher_is}: all of these tables say what is higher; leave it out")
    if reading.rows is not None and not any(table.kind == "index" for table in tables):
        raise UsageError(f"--rows {reading.rows}: none of these tables needs names; leave it out")


def _as_told(table: Table, reading: TableOptions) -> Table:
    """A table with its direction, and its names where --rows gives them."""
    from protoprune.scores import named, turned

    table = turned(table, reading.higher_is)
    return table if reading.rows is None or table.kind != "index" else named(table, reading.rows)


def _say_tables(matched: dict[str, ScoreTable], images: int, arrays: dict[str, np.ndarray], result: Comparison) -> None:
    import numpy as np

    plain = [name for name, table in matched.items() if table.direction == "header" and len(table.notes()) == 1]
    if plain:
        say(f"direction from the header: {', '.join(plain)}")
    for name, table in matched.items():
        if name not in plain:
            say(f"{name}: {'; '.join(table.notes())}")
        scored = int((~np.isnan(arrays[name])).sum())
        if scored < images:
            say(f"{name}: has no score for {images - scored:,} of {images:,} images")
        if scored and np.nanmin(arrays[name]) == np.nanmax(arrays[name]):
            say(f"{name}: warning: all images have the same score, so that it ranks none of them before another")
    say(f"compared: {len(result.paths):,} of {images:,} images, those with a score in all {len(matched)} tables")


def _say_result(result: Comparison, bootstrap: int) -> None:
    import numpy as np

    from protoprune.comparison import pairs

    if result.low is not None and result.high is not None:
        width = result.high - result.low
        a, b = max(pairs(result), key=width.__getitem__)
        say(
            f"95 % intervals from {bootstrap} bootstrap resamples of the images; the widest is "
            f"{result.low[a, b]:.3f} to {result.high[a, b]:.3f} ({result.names[a]}, {result.names[b]})"
        )
    for keep, tied in result.tied.items():
        kept = round(keep * len(result.paths))
        for name, count in zip(result.names, tied, strict=True):
            if count > 0.01 * kept:
                say(f"{name}: {count:,} of the {kept:,} kept at {keep:g} share their score with images left out")
    for keep, shares in result.class_shares.items():
        for name, row in zip(result.names, shares, strict=True):
            low, high = np.argmin(row), np.argmax(row)
            least, most = f"{100 * row[low]:.1f} %", f"{100 * row[high]:.1f} %"
            span = f"of {result.classes[low]} to {most} of {result.classes[high]}"
            say(f"{name} at {keep:g}: keeps {least} {'of every class' if least == most else span}")


def _write_sheet(
    result: Comparison, path: Path, root: str, options: ShardOptions | None, count: int, features: Path | None
) -> None:
    from protoprune import comparison
    from protoprune.features.current import digests_of
    from protoprune.features.opening import open_features
    from protoprune.report.sheet import contact_sheet

    rows = []
    for a, b in comparison.pairs(result):
        left, right = comparison.disagreements(result, a, b, count)
        title = f"{result.names[a]} | {result.names[b]}, Spearman {result.spearman[a, b]:.2f}"
        if left or right:
            rows.append((title, left, right))
    if not rows:
        say(f"{path}: not written, the rankings are the same")
        return
    heads = ("hard for the first table, easy for the second", "easy for the first, hard for the second")
    content = None
    if features is not None:
        with open_features(features) as file:
            content = digests_of(file, (one for _, *sides in rows[:_SHEET_ROWS] for side in sides for one in side))
    picture, unreadable = contact_sheet(rows[:_SHEET_ROWS], root, heads=heads, options=options, content=content)
    write_file(path, picture)
    if unreadable:
        changed = ", or changed since they were embedded" if content else ""
        say(f"warning: {many(unreadable, 'image')} could not be read{changed}; --root says where they are")
    say(f"{path}: the {min(len(rows), _SHEET_ROWS)} of {len(rows)} pairs that agree least")


def _show(result: Comparison) -> None:
    """The matrices on stdout, the Spearman matrix first, similar tables side by side."""
    matrices = [("Spearman" if sys.stdout is not None and sys.stdout.isatty() else "", result.spearman)]
    matrices += [(f"overlap of the kept sets at {keep:g} (random: {keep:g})", m) for keep, m in result.overlap.items()]
    names = [result.names[row] for row in result.order]
    for place, (title, matrix) in enumerate(matrices):
        if place:
            typer.echo("")
        cells = matrix[result.order][:, result.order]
        rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, cells, strict=True)]
        print_table(["", *names], rows, title=title, right=range(1, len(names) + 1))
