"""Answers on stdout: lines of text and tables, drawn on a terminal and plain columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer


def show(text: str) -> None:
    """One line on stdout."""
    typer.echo(printable(text))


def printable(text: str) -> str:
    """A name that is not UTF-8, with its odd bytes escaped."""
    return text.encode(errors="backslashreplace").decode()


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", caption: str = "", numbers: bool = False
) -> None:
    """A table on stdout; `numbers`: cells stand at the right. No cell is cut where there is no terminal.

    A header of empty words is left out.
    """
    header, rows = [printable(one) for one in header], [[printable(one) for one in row] for row in rows]
    if sys.stdout is not None and sys.stdout.isatty():
        _draw(header, rows, title, caption, numbers)
        return
    if title:
        show(title)
    lines = [header, *rows] if any(header) else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (one.rjust(width) if numbers else one.ljust(width) for one, width in zip(line, widths, strict=True))
        show("  ".join(cells).rstrip())
    if caption:
        show(caption)


def _draw(header: list[str], rows: list[list[str]], title: str, caption: str, numbers: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, caption=Text(caption) if caption else None)
    table.show_header = any(header)
    for name in header:
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
