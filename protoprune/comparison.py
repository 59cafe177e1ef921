"""How far several rankings of the same images agree: Spearman matrix, kept sets, classes, where they differ most.

Scores are larger = harder, one array a metric. What this module does not know: where they come from, and what the
images look like.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from protoprune import selection
from protoprune.arguments import as_numbers, checked, texts
from protoprune.bounds import check_confidence, check_seed, check_whole
from protoprune.errors import ProtopruneError, UsageError
from protoprune.ids import row_type
from protoprune.images.listing import folder_labels
from protoprune.paths import Paths, chosen
from protoprune.scores import ScoreTable, Table, match
from protoprune.units import many

PAIR_COLUMNS = ["a", "b", "spearman"]  # the first ones of `pair_rows`
CLASS_COLUMNS = ["keep", "table", "class", "images", "share"]  # those of `class_rows`
_RESAMPLE = 10_000  # rows of a bootstrap resample; intervals of larger sets are scaled (see `bootstrap`)


@dataclass
class Comparison:
    """m rankings of the n images that all of them score; matrices follow `names`, drawings follow `order`."""

    names: list[str]
    paths: Sequence[str]  # the n images, sorted
    percentiles: np.ndarray  # (m, n) float32, mid-rank / n: 0 is the easiest
    spearman: np.ndarray  # (m, m)
    low: np.ndarray | None  # (m, m) ends of the bootstrap interval; None without one
    high: np.ndarray | None
    order: np.ndarray  # (m,) int: similar rankings side by side
    overlap: dict[float, np.ndarray] = field(default_factory=dict)  # keep -> (m, m); two random sets have `keep`
    tied: dict[float, np.ndarray] = field(default_factory=dict)  # keep -> (m,) kept images that the tie-break chose
    classes: list[str] = field(default_factory=list)
    class_sizes: np.ndarray | None = None  # (classes,)
    class_shares: dict[float, np.ndarray] = field(default_factory=dict)  # keep -> (m, classes): share kept of each


@checked
def compare(
    tables: dict[str, np.ndarray],
    paths: Sequence[str],
    *,
    keeps: Sequence[float] = (),
    labels: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    by_class: bool = False,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare score arrays, each (N,) in the order of `paths`, over the rows where none is NaN.

    keeps: fractions at which the kept sets (hardest first, ties by hash, as `select` does) are compared; labels (N,)
    and classes: else the first-level folders of the paths; by_class: they are asked for. Classes of which no image is
    compared are left out. Intervals: see `bootstrap`; none with 0 resamples.
    Raises UsageError for fewer than two tables, or no classes where they are asked for, ProtopruneError when fewer than
    two images have every score.
    """
    paths = paths if isinstance(paths, Paths) else texts("paths", paths)
    check_whole("--bootstrap", resamples, 0, 100_000)
    check_seed(seed)
    check_confidence(level)
    names = list(tables)
    values = [as_numbers(*one).astype(np.float64, copy=False) for one in tables.items()]  # m times (N,)
    _check(dict(zip(names, values, strict=True)), paths, keeps, labels)
    common = np.flatnonzero(~np.logical_or.reduce([np.isnan(row) for row in values])).astype(row_type(len(paths)))
    if len(common) < 2:
        raise ProtopruneError(
            f"{many(len(common), 'image has', 'images have')} a score in every table; comparing takes two or more"
        )
    if none := [keep for keep in keeps if round(keep * len(common)) < 1]:
        raise UsageError(f"--keep {none[0]:g} of {len(common):,} images is none; keep more")
    if len(common) < len(values[0]):
        values = [row[common] for row in values]
    paths = chosen(paths, common)
    if labels is None:
        labels, classes = folder_labels(paths)
    else:
        labels, classes = np.asarray(labels)[common], [] if classes is None else list(classes)
    present, sizes, labels = _present(labels, classes)
    if by_class and not present:
        raise UsageError("--classes: the images compared have no classes (no first-level folders)")
    ranks = _ranks(values)
    matrix = correlations(ranks)
    low = high = None
    if resamples:
        low, high = bootstrap(values, matrix, resamples=resamples, level=level, seed=seed)
    ranks -= 0.5
    ranks /= len(paths)
    percentiles = ranks.astype(np.float32)
    del ranks
    result = Comparison(names, paths, percentiles, matrix, low, high, similar_order(matrix))
    result.classes, result.class_sizes = present, sizes
    _compare_kept(result, values, keeps, labels, seed)
    return result


def _check(
    tables: dict[str, np.ndarray], paths: Sequence[str], keeps: Sequence[float], labels: np.ndarray | None
) -> None:
    """UsageError for what cannot be compared, whatever is in it."""
    if labels is not None and np.asarray(labels).dtype.kind not in "iu":
        raise UsageError(f"labels of type {np.asarray(labels).dtype}: expected the numbers of the classes, -1 for none")
    if len(tables) < 2:
        raise UsageError(f"{many(len(tables), 'score table')}: expected two or more to compare")
    for keep in keeps:
        selection.check(keep)
    for name, array in (*tables.items(), ("labels", labels)):
        if array is not None and np.shape(array) != (len(paths),):
            raise UsageError(f"{name}: shape {np.shape(array)}, expected one number for each of {len(paths):,} paths")


def _present(labels: np.ndarray, classes: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Of the classes that have images: names, numbers of images, and which of them each image is of, -1 for none."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    for label in (labels.min(), len(counts) - 1):
        if not -1 <= label < len(classes):
            raise UsageError(f"label {label}: expected a class's number, 0 to {len(classes) - 1}, or -1 for none")
    present = np.flatnonzero(counts)
    number = np.full(len(classes) + 1, -1, np.int32)  # the last is of images without one
    number[present] = np.arange(len(present))
    return [classes[one] for one in present.tolist()], counts[present], number[labels]


def _ranks(values: Sequence[np.ndarray]) -> np.ndarray:
    """(m, n) mid-ranks, 1 to n; ties share their mean."""
    from scipy.stats import rankdata

    ranks = np.empty((len(values), len(values[0])))
    for row, own in zip(ranks, values, strict=True):
        row[:] = rankdata(own)
    return ranks


def correlations(ranks: np.ndarray) -> np.ndarray:
    """(m, m) Pearson correlations of ranks (m, n). A constant row has 1 with a constant row and 0 with the others."""
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt([(row**2).sum() for row in centred])
    constant = norms == 0
    centred /= np.where(constant, 1, norms)[:, None]
    matrix = np.clip(centred @ centred.T, -1, 1)
    matrix[np.ix_(constant, constant)] = 1
    np.fill_diagonal(matrix, 1)
    return matrix


def bootstrap(
    values: Sequence[np.ndarray], estimate: np.ndarray, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals (low, high), each (m, m), of the Spearman matrix of m times (n,) values.

    Images are drawn with replacement and ranked anew in every resample (drawing the finished ranks would give another
    spread). Of more than 10,000 images 10,000 are drawn, and the deviations shrunk by sqrt(10,000 / n): the m-out-of-n
    bootstrap of Bickel, Götze & van Zwet 1997. The interval is about the images being a sample; it does not cover how
    a metric moves when its models are trained again.
    """
    n = len(values[0])
    size = min(n, _RESAMPLE)
    rng = np.random.default_rng(seed)
    deviations = np.empty((resamples, *estimate.shape))
    for deviation in deviations:
        drawn = rng.integers(0, n, size)
        deviation[:] = correlations(_ranks([row[drawn] for row in values])) - estimate
    ends = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.clip(estimate + ends * np.sqrt(size / n), -1, 1)
    return low, high


def similar_order(matrix: np.ndarray) -> np.ndarray:
    """(m,) rows with similar ones side by side: average linkage on 1 - Spearman, optimal order of the leaves."""
    if len(matrix) < 3:
        return np.arange(len(matrix))
    from scipy.cluster.hierarchy import leaves_list, linkage

    distances = (1 - matrix)[np.triu_indices(len(matrix), 1)]
    return leaves_list(linkage(np.maximum(distances, 0), "average", optimal_ordering=True))


def _compare_kept(
    result: Comparison, values: Sequence[np.ndarray], keeps: Sequence[float], labels: np.ndarray, seed: int
) -> None:
    """Fill in overlap, tied and class_shares."""
    if not len(keeps):
        return
    n = len(values[0])
    orders = [selection.ranking(row, ids=result.paths, seed=seed).astype(row_type(n)) for row in values]
    for keep in keeps:
        masks = [selection.cut(order, n, keep) for order in orders]
        common = np.array([[np.count_nonzero(one & other) for other in masks] for one in masks])
        result.overlap[keep] = common / max(1, masks[0].sum())
        result.tied[keep] = np.array([_tied(row, mask) for row, mask in zip(values, masks, strict=True)])
        if result.classes and result.class_sizes is not None:
            counts = [np.bincount(labels[mask & (labels >= 0)], minlength=len(result.classes)) for mask in masks]
            result.class_shares[keep] = np.stack(counts) / result.class_sizes


def _tied(scores: np.ndarray, mask: np.ndarray) -> int:
    """How many kept images have a score that an image left out has too."""
    if mask.all() or not mask.any():
        return 0
    border = scores[mask].min()
    return int((scores[mask] == border).sum()) if scores[~mask].max() == border else 0


def disagreements(result: Comparison, a: int, b: int, count: int = 8) -> tuple[list[str], list[str]]:
    """The images on which rankings a and b differ most, by percentile: (hard for a but easy for b, the reverse)."""
    difference = result.percentiles[a] - result.percentiles[b]
    order = np.argsort(difference, kind="stable")
    first = [result.paths[row] for row in order[::-1][:count] if difference[row] > 0]
    return first, [result.paths[row] for row in order[:count] if difference[row] < 0]


def pairs(result: Comparison) -> list[tuple[int, int]]:
    """All pairs a < b, those that agree least first."""
    m = len(result.names)
    return sorted(((a, b) for a in range(m) for b in range(a + 1, m)), key=lambda pair: (result.spearman[pair], pair))


def pair_rows(result: Comparison) -> list[dict[str, Any]]:
    """One record a pair, in the order of the names: spearman, its interval, images, overlap at each fraction."""
    rows = []
    for a, b in sorted(pairs(result)):
        row: dict[str, Any] = {"a": result.names[a], "b": result.names[b], "spearman": float(result.spearman[a, b])}
        if result.low is not None and result.high is not None:
            row |= {"low": float(result.low[a, b]), "high": float(result.high[a, b])}
        row["images"] = len(result.paths)
        rows.append(row | {f"overlap_{keep:g}": float(matrix[a, b]) for keep, matrix in result.overlap.items()})
    return rows


def class_rows(result: Comparison) -> list[dict[str, Any]]:
    """One record a fraction, metric and class: the class's images and the share of them that is kept."""
    sizes = np.empty(0, np.int64) if result.class_sizes is None else result.class_sizes
    return [
        {"keep": keep, "table": table, "class": name, "images": int(images), "share": float(share)}
        for keep, shares in result.class_shares.items()
        for table, row in zip(result.names, shares, strict=True)
        for name, images, share in zip(result.classes, sizes, row, strict=True)
    ]


def draw(result: Comparison, format: str = "png") -> bytes:
    """The Spearman matrix as a heat map in `order`, with its numbers; png, svg or pdf."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order, m = result.order, len(result.names)
    names = [result.names[row].encode(errors="replace").decode() for row in order]
    side = 1.8 + 0.55 * m
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    matrix = result.spearman[np.ix_(order, order)]
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(m), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(m), names, parse_math=False)
    for (row, column), value in np.ndenumerate(matrix):
        shade = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color=shade)
    axes.set_title(f"Spearman correlation over {len(result.paths):,} images", fontsize="medium")
    figure.colorbar(image, ax=axes, shrink=0.8)
    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "protoprune"}):
        figure.savefig(buffer, format=format, dpi=120, metadata=undated.get(format))
    return buffer.getvalue()


# --- score tables -> arrays of the same images -----------------------------------------------------------------------


def join(
    tables: dict[str, Table], paths: Sequence[str] | None = None, *, by_place: bool = False
) -> tuple[Sequence[str], dict[str, ScoreTable]]:
    """The tables over the same images: (N paths, each table's scores in their order).

    Without `paths` (those of a feature file) the images are those of the first table that has paths, and the rows of
    the others are matched to them; `by_place` says that tables without names are in their order. Tables of row numbers
    alone are joined by number. Raises ProtopruneError when a table cannot be matched, UsageError for `by_place` where
    all tables have names.
    """
    if by_place and not any(map(_by_number, tables.values())):
        raise UsageError(
            "--by-place: all of these tables name their images, and their order says nothing; leave it out"
        )
    if paths is None and all(map(_by_number, tables.values())):
        return _joined_by_number(tables)
    row_numbers = paths is not None
    if paths is None:
        paths = _paths_of(tables)
    matched = {name: match(table, paths, row_numbers=row_numbers, by_place=by_place) for name, table in tables.items()}
    return paths, matched


def _joined_by_number(tables: dict[str, Table]) -> tuple[list[str], dict[str, ScoreTable]]:
    numbers = [str(row) for row in range(max(map(_rows, tables.values())))]
    joined = {name: match(table, numbers, by_place=True) for name, table in tables.items()}
    return numbers, {name: replace(table, ends=[]) for name, table in joined.items()}


def _paths_of(tables: dict[str, Table]) -> list[str]:
    """The paths of the first table, where all have paths."""
    named = [table for table in tables.values() if not _by_number(table)]
    for table in tables.values():
        if _by_number(table):
            raise UsageError(
                f"{table.source}: has row numbers and {named[0].source} has paths; "
                "give --features FILE, which knows both, or --rows FILE with the names"
            )
    return sorted(named[0].keys or ())


def _by_number(table: Table) -> bool:
    return table.keys is None or table.kind == "index"


def _rows(table: Table) -> int:
    return len(table.scores) if table.keys is None else 1 + max(map(int, table.keys))


def short_names(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A name for each file: without folder and suffixes where these differ, else as given."""
    plain = []
    for source in sources:
        name = os.path.basename(os.fspath(source))
        name = name.removesuffix(".gz") if name != ".gz" else name
        plain.append((os.path.splitext(name)[0] or name).removeprefix("ImageNet-1K_"))
    return [name if plain.count(name) == 1 else os.fspath(source) for name, source in zip(plain, sources, strict=True)]
