"""Answers on stdout: lines, and tables that are drawn on a terminal and aligned plain text elsewhere, never cut."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import typer

from protoprune.cli.progress import printable


def echo(text: str) -> None:
    """One line on stdout, whatever the names in it (see `printable`)."""
    typer.echo(printable(text))


def echo_fields(*cells: str) -> None:
    """One line of fields with tabs between them, which a program can take apart: backslashes are doubled, and what
    `printable` escapes is `\\n`, `\\t`, `\\xNN`, ..., so that Python's unicode_escape gives each back."""
    typer.echo("\t".join(printable(cell.replace("\\", "\\\\")) for cell in cells))


def print_table(
    heads: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: Collection[int] = (),
    fold: bool = False,
) -> None:
    """A table of text cells. `heads` are those of its columns, if they have any; `right` numbers the columns that are
    aligned to the right. On a terminal too narrow for it the plain form is printed, unless its cells may `fold`.
    """
    heads = None if heads is None else [printable(head) for head in heads]
    rows = [[printable(cell) for cell in row] for row in rows]
    if title:
        echo(title)
    if sys.stdout is not None and sys.stdout.isatty() and _drawn(heads, rows, right, fold):
        return
    lines = rows if heads is None else [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        typer.echo("  ".join(cells).rstrip())


def _drawn(heads: Sequence[str] | None, rows: Sequence[Sequence[str]], right: Collection[int], fold: bool) -> bool:
    """Draw the table, if the terminal is wide enough."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=heads is not None)
    for place, head in enumerate(heads if heads is not None else [""] * len(rows[0])):
        table.add_column(Text(head), justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as they stand: "[b]" is a name, not a style
    unbounded = console.options.update(max_width=100_000)
    if not fold and console.measure(table, options=unbounded).maximum > console.width:
        return False
    console.print(table)
    return True
