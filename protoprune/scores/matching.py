"""A table's rows -> rows of the images, tolerantly about the root that the paths are relative to, and never by guess.

A key and a path match when they are equal, or when one is the end of the other at a folder's border (another root, a
bare file name), or likewise without the path's suffix. One such form is taken for the whole table, so that a stray
`old/cat/1.png` never becomes the score of `cat/1.png` in a table that is about this root. A key that could be several
images, and several keys that could be one image, are ambiguous and stay out. Everything is counted.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protoprune.arguments import checked, texts
from protoprune.errors import ProtopruneError, UsageError
from protoprune.ids import row_type
from protoprune.paths import BATCH, Paths, digests, distinct
from protoprune.scores.table import Table, check_higher, named, read_table, turned
from protoprune.units import many

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
    provenance: dict[str, Any] = field(default_factory=dict)
    ends: list[tuple[int, str]] = field(default_factory=list)  # matched by place: the first and last row, their images

    def notes(self) -> list[str]:
        """What a user should know about how the table was read, a line each."""
        who = {
            "header": "direction from its header",
            "released": "a released ImageNet file, in which higher means keep",
            "given": "direction as given",
            "assumed": "a higher score is taken as harder, since the table does not say (--higher-is, or FILE:prune)",
        }
        lines = [f"metric {self.metric}, {who[self.direction]}" if self.metric else who[self.direction]]
        if self.ends:
            (first, its), (last, others) = self.ends
            lines.append(
                f"warning: matched by {self.matched_by}: {first:,} is taken as {its}, {last:,} as {others}; if the "
                "table is in another order, give --rows FILE with the names in its order"
            )
        elif self.matched_by != "path":
            lines.append(f"matched by {self.matched_by}")
        if self.ambiguous:
            lines.append(
                f"{many(len(self.ambiguous), 'table row')} could mean several images, or share one, and are left out, "
                f"first {self.ambiguous[0]}"
            )
        if self.unmatched_rows:
            rows = many(len(self.unmatched_rows), "table row names", "table rows name")
            lines.append(f"{rows} no image, first {self.unmatched_rows[0]}")
        return lines


@checked
def read_scores(
    source: str | os.PathLike[str],
    paths: Sequence[str],
    *,
    higher_is: str | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    by_place: bool = False,
) -> ScoreTable:
    """Read a score table (see `read_table`) and match it to the images `paths`.

    For a table that names no images: `rows` are their names in its order (or a file that lists them), `by_place` says
    that its order is that of `paths`. Raises ProtopruneError for what cannot be read, when no row names an image, and
    for a table without names and without either.
    """
    check_reading(source, higher_is, rows, by_place)
    paths = paths if isinstance(paths, Paths) else texts("paths", paths)
    if not len(paths):
        raise UsageError("paths: holds no image that a score could be of")
    table = turned(read_table(source, higher_is=higher_is), None)
    if by_place and table.kind == "name":
        raise UsageError(f"{table.source}: names its images, and --by-place would not look at them; leave it out")
    return match(table if rows is None else named(table, rows), paths, by_place=by_place)


def check_reading(
    scores: object,
    higher_is: str | None,
    rows: str | os.PathLike[str] | Sequence[str] | None,
    by_place: bool,
) -> None:
    """Raise UsageError for options of a score table without one (`scores` is None), or that do not go together."""
    check_higher(higher_is)
    if rows is not None and by_place:
        raise UsageError("--rows and --by-place: give the one that says which image each score is of")
    if scores is None:
        if higher_is is not None:
            raise UsageError(f"--higher-is {higher_is}: goes with --scores, whose direction it gives")
        if rows is not None or by_place:
            raise UsageError(f"{'--by-place' if by_place else '--rows'}: goes with --scores, whose order it gives")


def match(table: Table, paths: Sequence[str], *, row_numbers: bool = True, by_place: bool = False) -> ScoreTable:
    """The table's scores in the order of `paths`. `row_numbers` says whether keys may be the places in `paths`, and
    `by_place` that a table without keys is in their order."""
    n = len(paths)
    if table.keys is None:
        if table.scores.shape != (n,):
            raise ProtopruneError(f"{table.source}: shape {table.scores.shape}, expected ({n},): one score an image")
        if n and not by_place:
            raise UsageError(
                f"{table.source}: does not say which score is of which image; give --rows FILE with their names in its "
                f"order, or --by-place if it is sorted by path, from {paths[0]} to {paths[-1]}"
            )
        rows, matched_by = np.arange(n), "place"
    else:
        rows, matched_by = _match_keys(table, table.keys, paths, row_numbers)
    hit = rows >= 0
    ends = [int(rows.min()), int(rows.max())] if matched_by in ("place", "row number") and n else []
    scores = np.full(n, np.nan)
    scores[rows[hit]] = table.scores[hit]
    unmatched, ambiguous = (
        list(itertools.compress(table.keys or [], (rows == why).tolist())) for why in (_NONE, _AMBIGUOUS)
    )
    missing = int(np.isnan(scores).sum())
    facts = (table.metric, table.direction, table.provenance)
    return ScoreTable(
        scores, unmatched, missing, ambiguous, matched_by, *facts, ends=[(row, paths[row]) for row in ends]
    )


def _match_keys(table: Table, keys: Sequence[str], paths: Sequence[str], row_numbers: bool) -> tuple[np.ndarray, str]:
    if table.kind == "index":
        return _row_numbers(table.source, keys, len(paths)), "row number"
    rows, matched_by = match_names(keys, paths)
    found = rows >= 0
    if table.kind == "unsure" and row_numbers and _could_be_row_numbers(keys, len(paths)):
        numbers = np.array([int(key) for key in keys])
        if not found.any():
            return numbers, "row number"
        unlike = np.flatnonzero(found & (numbers != rows))
        if len(unlike):
            raise ProtopruneError(
                f"{table.source}: {keys[unlike[0]]!r} may be a row number or the file "
                f"{paths[rows[unlike[0]]]}; name its column index or path"
            )
    if not found.any():
        what = "could be several images" if (rows == _AMBIGUOUS).any() else "names an image"
        raise ProtopruneError(
            f"{table.source}: {'each' if 'could' in what else 'none'} of its {many(len(keys), 'row')} {what} "
            f"(it has {keys[0]!r}, the images are like {paths[0]!r}); paths must be relative to the same root"
        )
    return rows, matched_by


def _could_be_row_numbers(keys: Sequence[str], n: int) -> bool:
    if not all(len(key) <= 9 and key.isascii() and key.isdigit() for key in keys):
        return False
    numbers = set(map(int, keys))
    return len(numbers) == len(keys) and max(numbers) < n


def _row_numbers(source: str, keys: Sequence[str], n: int) -> np.ndarray:
    try:
        rows = np.array([int(key) for key in keys], np.int64)
    except (ValueError, OverflowError) as error:
        raise ProtopruneError(f"{source}: its index column holds no row number ({error})") from None
    for wrong in (rows.min(), rows.max()):
        if not 0 <= wrong < n:
            raise ProtopruneError(
                f"{source}: row number {wrong}, expected 0 to {n - 1}; is the table about other images?"
            )
    if len(np.unique(rows)) < len(rows):
        raise ProtopruneError(f"{source}: a row number occurs twice (as 1 and 01); give one score an image")
    return rows


def match_names(keys: Sequence[str], paths: Sequence[str]) -> tuple[np.ndarray, str]:
    """The first form that matches at least half of the smaller side; if none does, the first that matches anything."""
    if len(keys) == len(paths) and all(map(operator.eq, keys, paths)) and distinct(keys):
        return np.arange(len(keys)), "path"  # as our own tables are: without an index of all names
    enough = min(len(keys), len(paths)) / 2
    best, most = (np.full(len(keys), _NONE), "path"), -1
    for rows, how in _forms(keys, paths):
        found = int((rows >= 0).sum())
        if found and found >= enough:
            return rows, how
        if most < 1 and (found or (rows != _NONE).any()) and found > most:
            best, most = (rows, how), found
    return best


def _forms(keys: Sequence[str], paths: Sequence[str]) -> Iterator[tuple[np.ndarray, str]]:
    """(row of each key, how it was found), for one form after the other; each costs a second or two at a million."""
    yield _same(keys, paths), "path"
    index = _index(paths)
    if "\\" in "".join(keys) and not any("/" in key for key in keys):  # written on Windows
        keys = [key.replace("\\", "/") for key in keys]
        yield _equal(keys, index), "path"
    yield _keys_end_in_paths(keys, index), "path, relative to another root"
    key_index = _index(keys)
    yield _paths_end_in_keys(paths, key_index, len(keys)), "the end of the path"
    stems = [os.path.splitext(path)[0] for path in paths]
    index = _index(stems)
    yield _equal(keys, index), "path without suffix"
    yield _keys_end_in_paths(keys, index), "path without suffix, relative to another root"
    yield _paths_end_in_keys(stems, key_index, len(keys)), "the end of the path without suffix"


def _index(names: Sequence[str]) -> dict[str, int]:
    """name -> its place, or _AMBIGUOUS for a name that occurs twice."""
    index = {name: place for place, name in enumerate(names)}
    if len(index) < len(names):
        index.update((name, _AMBIGUOUS) for name, count in Counter(names).items() if count > 1)
    return index


def _same(keys: Sequence[str], paths: Sequence[str]) -> np.ndarray:
    """The place in `paths` of each key; by hashes of 128 bits, as an index of all names takes ten times as much."""
    if not len(paths):
        return np.full(len(keys), _NONE)
    own, other = digests(paths), digests(paths, 1)
    order = np.argsort(own, kind="stable").astype(row_type(len(paths)))
    own.sort(kind="stable")
    rows = np.full(len(keys), _NONE)
    for first in range(0, len(keys), BATCH):
        some = keys[first : first + BATCH]
        wanted, check = digests(some), digests(some, 1)
        at = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
        row, after = order[at], np.minimum(at + 1, len(own) - 1)
        found = (own[at] == wanted) & (other[row] == check)
        twice = found & (after > at) & (own[after] == wanted)
        rows[first : first + BATCH] = np.where(twice, _AMBIGUOUS, np.where(found, row, _NONE))
    del own, other, order
    return _once(rows)


def _equal(keys: Sequence[str], index: dict[str, int]) -> np.ndarray:
    return _once(np.fromiter(map(index.get, keys, itertools.repeat(_NONE)), np.int64, len(keys)))


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


def _keys_end_in_paths(keys: Sequence[str], index: dict[str, int]) -> np.ndarray:
    return _once(_ends(keys, index))


def _paths_end_in_keys(paths: Sequence[str], index: dict[str, int], n_keys: int) -> np.ndarray:
    places = _ends(paths, index)
    hit = np.flatnonzero(places >= 0)
    rows = np.full(n_keys, _NONE)
    rows[places[hit]] = hit
    rows[np.bincount(places[hit], minlength=n_keys) > 1] = _AMBIGUOUS
    return rows


def _once(rows: np.ndarray) -> np.ndarray:
    """Rows that were found by one key only; the others become _AMBIGUOUS."""
    found = np.flatnonzero(rows >= 0)
    twice = np.bincount(rows[found]) > 1
    if twice.any():
        rows[found[twice[rows[found]]]] = _AMBIGUOUS
    return rows
