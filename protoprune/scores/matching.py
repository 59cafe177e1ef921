"""A table's rows -> rows of the images, tolerantly about the root that the paths are relative to, and never by guess.

A key and a path match when they are equal, or when one is the end of the other at a folder's border (another root, a
bare file name), or likewise without the path's suffix. One such form is taken for the whole table, so that a stray
`old/cat/1.png` never becomes the score of `cat/1.png` in a table that is about this root. A key that could be several
images, and several keys that could be one image, are ambiguous and stay out. Everything is counted.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.scores.table import Table, read_table

_NONE, _AMBIGUOUS = -1, -2


@dataclass
class ScoreTable:
    """Scores matched to images; what did not match is counted, on both sides."""

    scores: np.ndarray  # (n,) float64, larger = harder, NaN where the table has no score for the image
    unmatched_rows: list[str]  # paths of the table that are no image here
    missing: int  # images without a score
    ambiguous: list[str] = field(default_factory=list)  # paths of the table that may mean several images, or share one
    matched_by: str = "path"  # how paths and rows were matched, in words
    metric: str = ""  # empty when the file does not say
    direction: str = "assumed"  # who says what a higher score means: header, released, given or assumed
    provenance: dict = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a user should know about how the table was read, a line each."""
        who = {
            "header": "direction from its header",
            "released": "a released ImageNet file, in which higher means keep",
            "given": "direction from --higher-is",
            "assumed": "a higher score is taken as harder, since the table does not say (--higher-is)",
        }
        lines = [f"metric {self.metric}, {who[self.direction]}" if self.metric else who[self.direction]]
        if self.matched_by != "path":
            lines.append(f"matched by {self.matched_by}")
        if self.ambiguous:
            lines.append(
                f"{len(self.ambiguous):,} table rows could mean several images, or share one, and are left out, "
                f"first {self.ambiguous[0]}"
            )
        return lines


def read_scores(source: str | os.PathLike, paths: Sequence[str], *, higher_is: str | None = None) -> ScoreTable:
    """Read a score table (see `read_table`) and match it to the images `paths`.

    Raises ProtopruneError for what cannot be read, and when no row names an image.
    """
    return match(read_table(source, higher_is=higher_is), paths)


def match(table: Table, paths: Sequence[str], *, row_numbers: bool = True) -> ScoreTable:
    """The table's scores in the order of `paths`. `row_numbers` says whether keys may be the places in `paths`."""
    n = len(paths)
    if table.keys is None:
        if table.scores.shape != (n,):
            raise ProtopruneError(
                f"{table.source}: shape {table.scores.shape}, expected ({n},): one score a row of the feature file"
            )
        rows, matched_by = np.arange(n), "place: one score a row"
    else:
        rows, matched_by = _match_keys(table, paths, row_numbers)
    hit = rows >= 0
    scores = np.full(n, np.nan)
    scores[rows[hit]] = table.scores[hit]
    unmatched, ambiguous = (
        list(itertools.compress(table.keys or [], (rows == why).tolist())) for why in (_NONE, _AMBIGUOUS)
    )
    missing = int(np.isnan(scores).sum())
    facts = (table.metric, table.direction, table.provenance)
    return ScoreTable(scores, unmatched, missing, ambiguous, matched_by, *facts)


def _match_keys(table: Table, paths: Sequence[str], row_numbers: bool) -> tuple[np.ndarray, str]:
    numbers = None
    if table.kind == "index" or (table.kind == "unsure" and row_numbers and _all_digits(table.keys)):
        numbers = _row_numbers(table, len(paths))
        if table.kind == "index":
            return numbers, "row number"
    rows, matched_by = _by_name(table.keys, paths)
    found = int((rows >= 0).sum())
    if numbers is not None:
        if not found:
            return numbers, "row number"
        if (numbers != rows)[(rows >= 0) & (numbers >= 0)].any():
            key = table.keys[int(np.flatnonzero((numbers != rows) & (rows >= 0))[0])]
            raise ProtopruneError(
                f"{table.source}: {key!r} may be a row number or a file name; name its column index or path"
            )
    if not found:
        why = (
            f"{len(table.keys):,} rows are ambiguous"
            if (rows == _AMBIGUOUS).any()
            else (f"none of its {len(table.keys):,} rows names an image of the feature file")
        )
        raise ProtopruneError(
            f"{table.source}: {why} (it has {table.keys[0]!r}, the images are like {paths[0]!r}); "
            "paths must be relative to the same root"
        )
    return rows, matched_by


def _all_digits(keys: Sequence[str]) -> bool:
    joined = "".join(keys)
    return joined.isascii() and joined.isdigit() and all(keys)


def _row_numbers(table: Table, n: int) -> np.ndarray:
    try:
        rows = np.array([int(key) for key in table.keys])
    except ValueError as error:
        raise ProtopruneError(f"{table.source}: its index column holds no row number ({error})") from None
    if len(rows) and (rows.min() < 0 or (table.kind == "index" and rows.max() >= n)):
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise ProtopruneError(f"{table.source}: row number {wrong:,}, expected 0 to {n - 1:,}; is it of other images?")
    if len(np.unique(rows)) != len(rows):
        raise ProtopruneError(f"{table.source}: a row number occurs twice (as 1 and 01); give one score an image")
    return np.where(rows < n, rows, _NONE)


def _by_name(keys: Sequence[str], paths: Sequence[str]) -> tuple[np.ndarray, str]:
    """The first form that matches at least half of the smaller side; if none does, the first that matches anything."""
    enough = min(len(keys), len(paths)) / 2
    fallback = None
    for form, how in _forms(keys, paths):
        rows = form()
        found = int((rows >= 0).sum())
        if found and found >= enough:
            return rows, how
        if fallback is None and (rows != _NONE).any():
            fallback = rows, how
    return fallback or (np.full(len(keys), _NONE), "path")


def _forms(keys: Sequence[str], paths: Sequence[str]) -> Iterable[tuple[Callable[[], np.ndarray], str]]:
    yield lambda: _equal(keys, paths), "path"
    if any("\\" in key for key in keys) and not any("/" in key for key in keys):  # written on Windows
        keys = [key.replace("\\", "/") for key in keys]
        yield lambda: _equal(keys, paths), "path"
    yield lambda: _keys_end_in_paths(keys, paths), "path, relative to another root"
    yield lambda: _paths_end_in_keys(keys, paths), "the end of the path"
    stems = [os.path.splitext(path)[0] for path in paths]
    yield lambda: _equal(keys, stems), "path without suffix"
    yield lambda: _keys_end_in_paths(keys, stems), "path without suffix, relative to another root"
    yield lambda: _paths_end_in_keys(keys, stems), "the end of the path without suffix"


def _index(names: Sequence[str]) -> dict[str, int]:
    """name -> its place, or _AMBIGUOUS for a name that occurs twice."""
    index = {name: place for place, name in enumerate(names)}
    if len(index) < len(names):
        seen: set[str] = set()
        index.update({name: _AMBIGUOUS for name in names if name in seen or seen.add(name)})
    return index


def _equal(keys: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    found = map(_index(paths).get, keys, itertools.repeat(_NONE))
    return _once(np.fromiter(found, np.int64, len(keys)), len(paths))


def _ends(names: Sequence[str], index: dict[str, int]) -> np.ndarray:
    """For each name what `index` has for the longest of its ends that it knows."""

    def find(name: str) -> int:
        start = 0
        while (found := index.get(name[start:])) is None:
            start = name.find("/", start) + 1
            if not start:
                return _NONE
        return found

    return np.fromiter(map(find, names), np.int64, len(names))


def _keys_end_in_paths(keys: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    return _once(_ends(keys, _index(paths)), len(paths))


def _paths_end_in_keys(keys: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    places = _ends(paths, _index(keys))
    hit = np.flatnonzero(places >= 0)
    rows = np.full(len(keys), _NONE)
    rows[places[hit]] = hit
    rows[np.bincount(places[hit], minlength=len(keys)) > 1] = _AMBIGUOUS
    return rows


def _once(found: np.ndarray, size: int) -> np.ndarray:
    """Places that were found by one only; the others become _AMBIGUOUS."""
    counts = np.bincount(found[found >= 0], minlength=size)
    return np.where((found >= 0) & (counts[found] > 1), _AMBIGUOUS, found)
