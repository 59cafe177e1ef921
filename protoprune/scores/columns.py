"""Which column of somebody's table is the path and which is the score.

Columns are found by name, else by what they hold. What could be meant in two ways is an error that names the columns,
never a guess: a ranking by the class label looks like any other ranking. Knows nothing of files.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.paths import held
from protoprune.text import PATH_NAMES, plain_name

# Names as `plain_name` leaves them; the first of the tuple that occurs is taken.
_UNSURE_KEYS = ("image", "img", "id", "imageid", "name", "key", "sample", "example")  # names or row numbers
_INDEX_KEYS = ("index", "idx", "row", "rowindex", "rownumber", "imageindex", "sampleindex")
_SCORES = ("score", "scores", "metricscore", "difficulty", "distance", "value")
_COUNTERS = ("", "unnamed0", *_INDEX_KEYS)
_SAMPLE = 50  # rows that are looked at
_SHOWN = 60  # letters of a row in a message
_DELIMITERS = ("\t", ";", "|", ",", " ", "")  # "": the last blank of each line, for names that hold blanks


@dataclass(frozen=True)
class Columns:
    """Where key and score are. `kind` of the keys: name, index (row numbers) or unsure (either)."""

    key: int | None  # None: no keys, one score a row
    score: int
    kind: str
    header: bool

    def name(self, first: Sequence[str]) -> str:
        """What the score's column is called in the first row; '' where that is no header."""
        return first[self.score].strip() if self.header else ""


def find_columns(rows: Sequence[Sequence[str]], wanted: str | None = None) -> Columns:
    """Columns of a table whose first rows are given as text; ProtopruneError (which names no file) when unclear.

    `wanted` is the name of the score's column, where the user gave it.
    """
    first, rest = rows[0], rows[1:]
    names = [plain_name(name) for name in first]
    if wanted is not None:
        return _with_score(first, names, rest, wanted)
    key = _named(names, (*PATH_NAMES, *_UNSURE_KEYS))
    score = _named(names, _SCORES)
    if key is not None and score is not None:
        return Columns(key, score, _kind(names[key]), True)
    data = rest or rows
    numeric = _numeric(first, data)
    if not rest and key is not None and not numeric:
        raise ProtopruneError("a header and no rows")
    header = _is_header(rows, numeric, (key, score) != (None, None))
    if len(first) == 1 and numeric:
        return Columns(None, 0, "index", header)
    if not header:  # what looks like names is data
        names, key, score = [""] * len(first), None, None
    if key is None:
        key = _find_key(first, names, data, numeric, score)
    if score is None:
        score = _find_score(first, data, numeric, key, names if header else None)
    return Columns(key, score, _kind(names[key]), header)


def _kind(name: str) -> str:
    """What the keys of a column of this name are."""
    return "name" if name in PATH_NAMES else "index" if name in _INDEX_KEYS else "unsure"


def _with_score(first: Sequence[str], names: list[str], rows: Sequence[Sequence[str]], wanted: str) -> Columns:
    """Columns of a table with a header, of which the score is the one of that name. Without names of images, and
    without a column that says that it numbers the rows, there are no keys: the other columns are scores too."""
    cells = [cell.strip() for cell in first]
    if wanted not in cells:
        raise ProtopruneError(f"has no column {wanted!r}; its first row is {_shown(first)}")
    score = cells.index(wanted)
    if not _is_numeric(rows, score):
        raise ProtopruneError(f"its column {wanted} holds something else than numbers")
    others = ["" if column == score else name for column, name in enumerate(names)]
    key = _named(others, (*PATH_NAMES, *_UNSURE_KEYS))
    if key is None:
        text = [column for column in range(len(first)) if column != score and not _is_numeric(rows, column)]
        if len(text) > 1:
            raise ProtopruneError(
                f"which of its columns {_shown([first[one] for one in text])} is the path? name it path"
            )
        key = text[0] if text else _named(others, _INDEX_KEYS)
    return Columns(key, score, "index" if key is None else _kind(names[key]), True)


def could_be_scores(names: Sequence[str]) -> list[str]:
    """Of columns of numbers those that may be the score: one that is called so, else all that are not keys."""
    plain = {name: plain_name(name) for name in names}
    called = [name for name in names if plain[name] in _SCORES]
    return called or [name for name in names if plain[name] not in (*PATH_NAMES, *_UNSURE_KEYS, *_COUNTERS)]


def _find_key(
    first: Sequence[str], names: list[str], rows: Sequence[Sequence[str]], numeric: list[int], score: int | None
) -> int:
    """The only column of text, else row numbers: a column that is called so, or a first one of whole numbers."""
    text = [column for column in range(len(first)) if column not in numeric and column != score]
    if len(text) == 1:
        return text[0]
    index = _named(names, _INDEX_KEYS)
    if not text and index is not None:
        return index
    if not text and numeric and numeric[0] != score and all(row[0].strip().isdecimal() for row in rows):
        return 0
    raise ProtopruneError(
        f"which of its columns {_shown(first)} is the path? add a header line that names path and score"
    )


def _find_score(
    first: Sequence[str], rows: Sequence[Sequence[str]], numeric: list[int], key: int, names: list[str] | None
) -> int:
    """The only column of numbers, not counting one that only numbers the rows."""
    candidates = [column for column in numeric if column != key]
    if len(candidates) > 1 and names is not None:
        candidates = [column for column in candidates if names[column] not in _COUNTERS]
    elif len(candidates) > 1 and candidates[0] == 0 and _counts(rows):
        candidates = candidates[1:]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and names is not None:
        raise ProtopruneError(f"no score table: none of its columns {_shown(first)} holds numbers, beside the path")
    advice = (
        f"give it as FILE:{_shown([first[candidates[0]]])}, or name it score (and the other one path)"
        if names and candidates
        else "add a header line that names path and score"
    )
    raise ProtopruneError(f"which of its columns {_shown(first)} is the score? {advice}")


def _counts(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first column only numbers the rows."""
    cells = [row[0].strip() for row in rows]
    start = int(cells[0]) if cells[0].isdecimal() else 0
    return cells == [str(start + place) for place in range(len(cells))]


def _shown(cells: Sequence[str]) -> str:
    text = " ".join(", ".join(cells).split())  # a quoted name may hold line breaks
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


_NOTHING = ("na", "n/a", "null")  # what R and SQL write where there is no number


def _named(names: list[str], wanted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _numeric(first: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns of numbers."""
    return [column for column in range(len(first)) if _is_numeric(rows, column)]


def _is_numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    values = [row[column].strip() if len(row) > column else "too short" for row in rows]
    given = [value for value in values if value and value.casefold() not in _NOTHING]
    return bool(given) and all(number(value) is not None for value in given)


def _is_header(rows: Sequence[Sequence[str]], numeric: list[int], named: bool) -> bool:
    """Whether the first of several rows is a header: it has names that we know, or stand where the other rows have
    numbers, or no path at all (pandas writes `,0` over a Series)."""
    cells = [rows[0][column].strip() for column in numeric]
    above_numbers = bool(cells) and all(cell and number(cell) is None for cell in cells)
    return len(rows) > 1 and (named or above_numbers or not rows[0][0].strip())


def number(text: str) -> float | None:
    """A cell's value: NaN when it is empty, or says so as R and SQL do, None when it is no number."""
    text = text.strip()
    if not text or text.casefold() in _NOTHING:
        return math.nan
    try:
        return float(text) if "_" not in text else None  # Python reads 1_0 as ten
    except ValueError:
        return {"true": 1.0, "false": 0.0}.get(text.lower())


# --- delimited text --------------------------------------------------------------------------------------------------


def parse_text(
    text: bytes, delimiter: str | None = None, wanted: str | None = None
) -> tuple[Sequence[str] | None, np.ndarray, str, str]:
    """(keys or None, scores, kind of the keys, name of the score's column) of delimited text, UTF-8.

    With a `delimiter` the columns are path and score under a header. Without it, a line that starts with # is a
    comment, unless it reads like a row: `#1.png,0.5`. `wanted` is the name of the score's column. Raises
    ProtopruneError (which names no file) and csv.Error.
    """
    sign, columns, name = (delimiter, Columns(0, 1, "name", True), "score") if delimiter else _layout(text, wanted)
    keys, scores = _extract(text, sign, columns, comments=not delimiter and b"#" in text)
    if not len(scores):
        raise ProtopruneError("a header and no rows")
    return (None if columns.key is None else keys), np.array(scores, np.float64), columns.kind, name


def _rows(text: bytes, delimiter: str) -> Iterator[list[str]]:
    """Rows that are not blank, comments included."""
    lines = io.TextIOWrapper(io.BytesIO(text), "utf-8", "surrogateescape", newline="")
    rows: Iterator[list[str]]
    if delimiter == "":
        rows = (line.rsplit(None, 1) for line in lines)
    elif delimiter == " ":
        rows = csv.reader((line.strip() + "\n" for line in lines), delimiter=" ", skipinitialspace=True)
    else:
        rows = csv.reader(lines, delimiter=delimiter)
    return (row for row in rows if row)


def _layout(text: bytes, wanted: str | None) -> tuple[str, Columns, str]:
    """The delimiter under which the first rows have clear columns, best all of one width, these, and the name of the
    score's; else why there is none."""
    reason = None
    for even, delimiter in itertools.product((True, False), _DELIMITERS):
        if delimiter == "" and reason:  # or any text would end in a column of its own
            continue
        try:
            rows = _sample(text, delimiter)
            if _could_be_rows(rows, delimiter, even):
                found = find_columns(rows, wanted)
                return delimiter, found, found.name(rows[0])
        except (ProtopruneError, csv.Error) as error:
            if isinstance(error, csv.Error) or len(rows[0]) > 1:
                reason = reason or error
    raise reason or ProtopruneError("expected rows of path and score, separated by comma, semicolon, tab, bar or blank")


def _could_be_rows(rows: list[list[str]], delimiter: str, even: bool) -> bool:
    """Whether rows under a delimiter are of one width (where they must be) and of more than one column; one column is
    believed only where no delimiter was looked for."""
    if not rows:
        return False
    uneven = len({len(row) for row in rows}) > 1
    return not (even and uneven) and not (len(rows[0]) == 1 and (delimiter or uneven))


def _sample(text: bytes, delimiter: str) -> list[list[str]]:
    """The first rows; those that look like comments only when there are no others."""
    rows = list(itertools.islice(_rows(text, delimiter), 4 * _SAMPLE))
    return ([row for row in rows if not row[0].startswith("#")] or rows)[:_SAMPLE]


def _extract(text: bytes, delimiter: str, columns: Columns, comments: bool) -> tuple[Sequence[str], Sequence[float]]:
    """Key and score of every row of data."""
    key, score = columns.key or 0, columns.score
    rows = _rows(text, delimiter)
    above = _skip_header(rows) if columns.header else 0
    if not comments:
        scores = array("d")

        def keys() -> Iterator[bytes]:
            for row in rows:
                value = number(row[score])
                if value is None:
                    raise ValueError("no number")
                scores.append(value)
                yield os.fsencode(row[key])

        with contextlib.suppress(IndexError, ValueError):  # what cannot be read is looked for below
            return held(keys()), scores
    return _extract_each(itertools.islice(_rows(text, delimiter), above, None), above, key, score, comments)


def _extract_each(
    rows: Iterator[list[str]], above: int, key: int, score: int, comments: bool
) -> tuple[list[str], list[float]]:
    """The same, row by row; `above` rows stand above them."""
    keys: list[str] = []
    scores: list[float] = []
    for place, row in enumerate(rows, above + 1):
        if comments and row[0].startswith("#") and row[0][1:2] in ("", " ", "\t"):
            continue
        value = number(row[score]) if len(row) > max(key, score) else None
        if value is not None:
            keys.append(row[key])
            scores.append(value)
        elif not comments or not row[0].startswith("#"):
            raise ProtopruneError(f"row {place} has no number in column {score + 1}: {_shown(row)}")
    return keys, scores


def _skip_header(rows: Iterator[list[str]]) -> int:
    """Go past the header and the comments above it; how many rows that was."""
    for place, row in enumerate(rows, 1):
        if not row[0].startswith("#"):
            return place
    raise ProtopruneError("nothing but comments; expected rows of path and score")
