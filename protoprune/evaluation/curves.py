"""Error against the number of training images kept: a sweep over initial size, keep fraction and order, with its fits.

For each seed the initial sets are the beginnings of one random permutation, so a smaller one lies in a larger one. The
ranking is made within each initial set: by prototypes clustered on its own features (what a user with that many images
could do), or by scores given from outside. What this module does not know: files, tables, figures.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune import selection
from protoprune.arguments import checked
from protoprune.bounds import check_whole
from protoprune.errors import ProtopruneError, UsageError
from protoprune.evaluation import fits, statistics
from protoprune.evaluation import runs as running
from protoprune.evaluation.comparing import _seeds
from protoprune.evaluation.runs import Fit, Outcome, Run, Step
from protoprune.evaluation.statistics import Interval
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.training.examples import Examples
    from protoprune.training.loop import Recipe

ORDERS = ("hard", "easy", "middle", "random")
ALL = "all"  # the order of keep = 1, where orders do not differ
_Key = tuple[str, float, int]  # order, keep, size
_Planned = tuple[str, float, int, Run]


@dataclass(frozen=True)
class Point:
    """One combination: `kept` of `size` images, in `order`."""

    order: str
    keep: float
    size: int
    kept: int
    steps: int
    errors: list[float]  # one a seed, 1 - accuracy
    error: Interval
    seconds: float  # median over seeds


@dataclass(frozen=True)
class Curve:
    """Points in order of kept size, with the laws fitted to them; None when they are too few, or errors are 0."""

    name: str
    order: str
    keep: float | None  # None for a Pareto envelope
    kept: list[int]
    errors: list[float]  # means over seeds
    fits: fits.Fits | None
    verdict: str


@dataclass(frozen=True)
class Scaling:
    """The sweep's points and curves: one for each order and fraction, and a Pareto envelope for each order."""

    points: list[Point]
    curves: list[Curve]
    seeds: list[int]
    budget: str  # epochs, steps; convergence for linear heads
    runs: list[dict[str, Any]]
    warnings: list[str]  # of runs that ended too early

    def curve(self, name: str) -> Curve:
        return next(one for one in self.curves if one.name == name)


@checked
def scaling(
    train: Examples,
    test: Examples,
    recipe: Recipe,
    *,
    sizes: Sequence[int],
    keeps: Sequence[float] = (1.0, 0.8, 0.5, 0.2),
    orders: Sequence[str] = ("hard", "easy", "random"),
    seeds: int | Sequence[int] = 3,
    scores: np.ndarray | None = None,
    features: np.ndarray | None = None,
    k: int | None = None,
    balance: float = 0.0,
    budget: str | None = None,
    min_steps: int | None = None,
    bootstrap: int = 200,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    fit: Fit | None = None,
    on_run: Callable[[Step], None] | None = None,
) -> Scaling:
    """Sweep initial size x keep x order and fit scaling laws to the errors.

    train, test: `training.Examples`; recipe: `training.loop.Recipe`; sizes: initial numbers of images; keeps: fractions
    kept of them. Ranked by `scores`, (n,) larger = harder, or by spherical k-means on the subset of `features`, (n, d),
    with k clusters (default: as `protoprune select` chooses); neither is needed when the only order is random. balance:
    share of the kept set that is split evenly over classes (Sorscher et al.: 0.5). budget, of networks: 'steps' (the
    default), every run takes the optimizer steps of the largest initial size, so that the curve shows the data and not
    the length of training; 'epochs', every run passes over its own subset as often; all take at least `min_steps`
    (default: runs.MIN_STEPS). A linear head is trained to convergence, and takes neither.

    Raises UsageError for options that do not fit, ProtopruneError for images without a score.
    """
    check_whole("--bootstrap", bootstrap, 0, 100_000)
    running.check_examples("train", train)
    seeds, n, keeps, orders = _seeds(seeds), len(train.paths), list(keeps), list(orders)
    check_options(keeps, orders, k, balance, recipe, budget, min_steps, device)
    sizes, keeps = _check(n, sizes, keeps, orders, scores, features)
    running.check_sets(train, test)
    cells = [(order, keep) for keep in keeps for order in (dict.fromkeys(orders) if keep < 1 else (ALL,))]
    budget = running.CONVERGENCE if running.to_convergence(recipe) else budget or "steps"

    def steps(kept: int) -> int | None:
        return running.steps_for(kept if budget == "epochs" else max(sizes), recipe, min_steps)

    rank = _ranker(train, scores, features, k)
    ranked = any(order not in ("random", ALL) for order, _ in cells)
    planned = []
    for seed, size in itertools.product(seeds, sizes):
        initial = running.random_rows(n, size, seed)
        hardness = rank(initial, seed) if ranked else np.zeros(size)
        for order, keep in cells:
            rows = _cut(train, initial, hardness, order, keep, seed, balance)
            planned.append((order, keep, size, Run(f"{order} {keep:g} of {size}", seed, rows, None, steps(len(rows)))))
    outcomes = running.run_all(
        [run for *_, run in planned], train, test, recipe, folder=folder, fit=fit, device=device, on_run=on_run
    )
    points = _points(planned, outcomes, [(*cell, size) for size in sizes for cell in cells])
    notes = running.warnings_of([(one[-1].method, outcome) for one, outcome in zip(planned, outcomes, strict=True)])
    return Scaling(points, _curves(points, bootstrap), seeds, budget, _rows(planned, outcomes), notes)


def _ranker(
    train: Examples, scores: np.ndarray | None, features: np.ndarray | None, k: int | None
) -> Callable[[np.ndarray, int], np.ndarray]:
    """(rows, seed) -> the score of each row, larger = harder."""
    if scores is not None:
        known = np.asarray(scores, np.float64)
        if np.isinf(known).any():
            raise UsageError("scores that are infinite; give numbers")
        missing = np.flatnonzero(np.isnan(known))
        if len(missing):
            some = many(len(missing), "training image has", "training images have")
            raise ProtopruneError(f"{some} no score (first: {train.paths[missing[0]]}); give a full table")
        return lambda rows, seed: known[rows]

    def by_prototype(rows: np.ndarray, seed: int) -> np.ndarray:
        from protoprune.clustering import prototypes

        assert features is not None  # `_check` has seen to it
        subset = np.asarray(features[rows], np.float32)
        clusters = prototypes.auto_k(len(rows), len(train.classes)) if k is None else k
        return prototypes.cluster(subset, clusters, seed=seed).distance

    return by_prototype


def _cut(
    train: Examples, initial: np.ndarray, hardness: np.ndarray, order: str, keep: float, seed: int, balance: float
) -> np.ndarray:
    if keep == 1:
        return initial
    # Images whose features are all zeros have no distance and cannot be ranked, as in `protoprune select`.
    usable = None if order == "random" else ~np.isnan(hardness)
    mask = selection.kept_mask(
        hardness, keep, usable=usable, ids=[train.paths[row] for row in initial], order=order, seed=seed,
        groups=np.asarray(train.labels)[initial] if balance else None, balance=balance,
    )  # fmt: skip
    return initial[mask]


def _points(planned: list[_Planned], outcomes: list[Outcome], wanted: list[_Key]) -> list[Point]:
    found: dict[_Key, list[Outcome]] = {key: [] for key in wanted}
    kept = {}
    for (order, keep, size, run), outcome in zip(planned, outcomes, strict=True):
        found[order, keep, size].append(outcome)
        kept[order, keep, size] = _kept(run)
    points = []
    for (order, keep, size), some in found.items():
        errors = [1 - one.accuracy for one in some]
        seconds = float(np.median([one.seconds for one in some]))
        number = kept[order, keep, size]
        interval = statistics.mean_interval(errors, share=True)
        points.append(Point(order, keep, size, number, some[0].steps, errors, interval, seconds))
    return points


def _kept(run: Run) -> int:
    return 0 if run.rows is None else len(run.rows)


def _curves(points: list[Point], bootstrap: int) -> list[Curve]:
    curves = []
    for order, keep in dict.fromkeys((one.order, one.keep) for one in points):
        group = [one for one in points if (one.order, one.keep) == (order, keep)]
        curves.append(_curve(f"{order} {keep:g}" if order != ALL else ALL, order, keep, group, bootstrap))
    for order in dict.fromkeys(one.order for one in points if one.order not in (ALL, "random")):
        group = envelope([one for one in points if one.order in (order, ALL)])
        curves.append(_curve(f"Pareto envelope, {order}", order, None, group, bootstrap))
    return curves


def envelope(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats with as few images: lower error for more images, by mean error.

    A minimum over noisy means lies too low, the more so the more points compete at a size: take more seeds.
    """
    front: list[Point] = []
    for one in sorted(points, key=lambda point: (point.kept, point.error.mean)):
        if not front or one.error.mean < front[-1].error.mean:
            front.append(one)
    return front


def _curve(name: str, order: str, keep: float | None, points: list[Point], bootstrap: int) -> Curve:
    unique = list({one.kept: one for one in sorted(points, key=lambda point: point.kept)}.values())
    kept, errors = [one.kept for one in unique], [one.error.mean for one in unique]
    usable = [one for one in unique if one.error.mean > 0]
    if len(usable) < 3:
        missing = "" if len(usable) == len(unique) else " with an error above 0"
        few = f"{len(usable)} {'size' if len(usable) == 1 else 'sizes'}{missing}"
        return Curve(name, order, keep, kept, errors, None, f"too few to fit a law: {few}, and it takes 3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # steps of the optimiser into overflow, which it leaves again
        found = fits.fit_laws(
            [one.kept for one in usable], np.array([one.errors for one in usable]).T, bootstrap=bootstrap
        )
    perfect = [f"{one.kept:,}" for one in unique if one.error.mean == 0]  # which no law here can reach
    without = f"; fitted without {', '.join(perfect)} kept, where no test image is wrong" if perfect else ""
    return Curve(name, order, keep, kept, errors, found, fits.verdict(found) + without)


def _rows(planned: list[_Planned], outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [
        {"order": order, "keep": keep, "size": size, "kept": _kept(run), "seed": run.seed, "steps": outcome.steps,
         "accuracy": outcome.accuracy, "error": 1 - outcome.accuracy, "correct": outcome.correct,
         "seconds": outcome.seconds, "fall": outcome.fall, "strength": outcome.strength}
        for (order, keep, size, run), outcome in zip(planned, outcomes, strict=True)
    ]  # fmt: skip


def _check(
    n: int,
    sizes: Sequence[int],
    keeps: Sequence[float],
    orders: Sequence[str],
    scores: np.ndarray | None,
    features: np.ndarray | None,
) -> tuple[list[int], list[float]]:
    for size in sizes:
        check_whole("--size", size, 2, n, ", the number of training images")
    sizes, keeps = sorted({int(size) for size in sizes}), sorted({float(keep) for keep in keeps}, reverse=True)
    if not sizes:
        raise UsageError("--size is empty: expected numbers of images, such as 1000,2000")
    for keep in keeps:
        if round(keep * sizes[0]) < 1:
            raise UsageError(f"--keep {keep:g} of {sizes[0]} images is none; keep more, or start with more")
    _check_ranking(n, bool(set(orders) - {"random"}) and min(keeps) < 1, scores, features)
    return sizes, keeps


def _check_ranking(n: int, ranked: bool, scores: np.ndarray | None, features: np.ndarray | None) -> None:
    for name, array, dimensions in (("scores", scores, 1), ("features", features, 2)):
        shape = np.shape([] if array is None else array)
        if array is not None and (len(shape) != dimensions or shape[0] != n):
            raise UsageError(f"{name} of shape {shape} for {n:,} training images: expected one each")
    if scores is not None and not ranked:
        raise UsageError("--scores rank, and nothing here asks for a ranking: --order random, or --keep 1 alone")
    if scores is None and features is None and ranked:
        raise UsageError("orders other than random need a ranking: give --features or --scores")


def check_options(
    keeps: Sequence[float],
    orders: Sequence[str],
    k: int | None,
    balance: float,
    recipe: Recipe,
    budget: str | None,
    min_steps: int | None,
    device: str = "auto",
) -> None:
    """UsageError for options that do not fit, which needs no images: loading them can take minutes."""
    running.check_recipe(recipe, budget, min_steps, device)
    if not keeps:
        raise UsageError("--keep is empty: expected fractions to keep, such as 1,0.5,0.2")
    for keep in keeps:
        selection.check(keep, balance=balance)
    for order in orders:
        if not isinstance(order, str) or order not in ORDERS:
            raise UsageError(f"--order {order}: expected some of {', '.join(ORDERS)}")
    if not orders:
        raise UsageError(f"--order is empty: expected some of {', '.join(ORDERS)}")
    if k is not None:
        check_whole("--k", k, hint="; use --k auto")
        if set(orders) == {"random"} or min(keeps) == 1:
            why = "--keep 1" if min(keeps) == 1 else "--order random"
            raise UsageError(f"--k {k}: {why} ranks nothing, so that nothing is clustered; leave it out")
    if balance and min(keeps) == 1:
        raise UsageError(f"--balance {balance:g}: --keep 1 leaves nothing out that could be balanced; leave it out")
