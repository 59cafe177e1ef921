"""Score tables: one number an image, in a file that anyone can open, and how two rankings compare.

A larger score means a harder example. What this module does not know: where scores come from.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protoprune.errors import ProtopruneError, UsageError

_PATH_NAMES = ("path", "file", "filename", "image", "id", "name", "key")
_SCORE_NAMES = ("score", "difficulty", "distance", "value")


@dataclass
class ScoreTable:
    """Scores matched to images; what did not match is counted, on both sides."""

    scores: np.ndarray  # (n,) float64, NaN where the table has no row for the image
    unmatched_rows: list[str]  # paths of the table that are no image here
    missing: int  # images without a score


def read_scores(source: str | os.PathLike, paths: Sequence[str]) -> ScoreTable:
    """Read (path, score) rows from a csv, tsv or semicolon-separated file, with or without a header, or a .npy array.

    Columns are found by name (path, score, …) or else are the first two; a .npy array holds one score a row of the
    feature file. Rows with an empty score count as missing. Raises ProtopruneError for what cannot be read.
    """
    source = os.fspath(source)
    if not os.path.isfile(source):
        raise UsageError(f"--scores {source}: no such file")
    if source.endswith(".npy"):
        return _from_array(source, len(paths))
    table = _read_rows(source)
    index = {path: row for row, path in enumerate(paths)}
    scores = np.full(len(paths), np.nan)
    unmatched = []
    for path, score in table.items():
        if path in index:
            scores[index[path]] = score
        else:
            unmatched.append(path)
    if len(unmatched) == len(table):
        raise ProtopruneError(
            f"{source}: none of its {len(table):,} rows names an image of the feature file "
            f"(it has {next(iter(table))!r}, the images are like {paths[0]!r}); paths must be relative to the same root"
        )
    return ScoreTable(scores, unmatched, int(np.isnan(scores).sum()))


def _from_array(source: str, n: int) -> ScoreTable:
    try:
        scores = np.load(source).astype(np.float64)
    except (ValueError, TypeError, EOFError, AttributeError) as error:  # text, records, an empty file, an .npz
        raise ProtopruneError(f"{source}: not a .npy array of numbers ({error})") from None
    if scores.shape != (n,):
        raise ProtopruneError(f"{source}: shape {scores.shape}, expected ({n},): one score a row of the feature file")
    return ScoreTable(scores, [], int(np.isnan(scores).sum()))


def _read_rows(source: str) -> dict[str, float]:
    text = os.fsdecode(Path(source).read_bytes()).removeprefix("\ufeff")
    first = text.partition("\n")[0]
    delimiter = max("\t;,", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise ProtopruneError(f"{source}: cannot be read as a table ({error})") from None
    if not rows or len(rows[0]) < 2:
        raise ProtopruneError(f"{source}: expected rows of path and score, separated by comma, semicolon or tab")
    path_column, score_column, has_header = _columns(source, rows[0])
    table: dict[str, float] = {}
    for number, row in enumerate(rows[has_header:], 1 + has_header):
        try:
            text = row[score_column].strip()
            score = float(text) if text else math.nan
        except (IndexError, ValueError):
            raise ProtopruneError(f"{source}: row {number} has no number in column {score_column + 1}: {row}") from None
        path = row[path_column].removeprefix("./")
        if path in table:
            raise ProtopruneError(f"{source}: {path!r} occurs twice; give one score an image")
        table[path] = score
    if not table:
        raise ProtopruneError(f"{source}: a header and no rows")
    return table


def _columns(source: str, first: list[str]) -> tuple[int, int, bool]:
    """(path column, score column, whether the first row is a header)."""
    names = [name.strip().lower() for name in first]
    path = next((names.index(name) for name in _PATH_NAMES if name in names), None)
    score = next((names.index(name) for name in _SCORE_NAMES if name in names), None)
    if path is not None and score is not None:
        return path, score, True
    try:
        float(first[1])
        return 0, 1, False
    except ValueError:  # a header
        if len(names) == 2:
            return path or 0, 1 - (path or 0), True
        raise ProtopruneError(
            f"{source}: which of its columns {', '.join(first)} is the score? name it score (and the other one path)"
        ) from None


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two score arrays over the rows that both have; 1.0 when one of them is constant on both."""
    from scipy.stats import rankdata

    both = ~(np.isnan(a) | np.isnan(b))
    x, y = rankdata(a[both]), rankdata(b[both])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 1.0 if np.ptp(x) == np.ptp(y) else 0.0
    return float(np.corrcoef(x, y)[0, 1])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the images kept by mask a that mask b keeps too (masks of equal size)."""
    return float((a & b).sum() / max(1, a.sum()))


def mean_overlap(masks: Sequence[np.ndarray]) -> float:
    """Mean `overlap` over all pairs; 1.0 for a single mask."""
    pairs = [overlap(a, b) for a, b in itertools.combinations(masks, 2)]
    return float(np.mean(pairs)) if pairs else 1.0
