"""Does a list pay? Train on it, on random subsets of its size and on everything, and compare seed by seed.

The random subset of a seed is drawn anew for each seed; order, augmentation and model are those of the seed, whatever
the subset ("permute all, then filter"). A second random subset has the list's own class counts, so that one sees which
part of a difference they make: a list that is more even than the set, or less, differs from random by that alone.

A linear head is trained to convergence: a list, and everything, then give one number, with no spread over seeds, and
only the random subsets differ from seed to seed. That is all that the verdict needs (see `statistics`); intervals of
the one number, and of a difference between two of them, are over test images. What this module does not know: files,
tables, figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune.arguments import as_numbers, check_fields, checked
from protoprune.bounds import SEEDS, check_confidence, check_number, check_whole, shown
from protoprune.errors import UsageError
from protoprune.evaluation import runs as running
from protoprune.evaluation import statistics
from protoprune.evaluation.runs import Fit, Outcome, Run, Step
from protoprune.evaluation.statistics import Difference, Interval
from protoprune.units import rounded

if TYPE_CHECKING:
    from protoprune.training.examples import Examples
    from protoprune.training.loop import Recipe

EVERYTHING = "everything"


@dataclass(frozen=True)
class Kept:
    """A list under test, as rows of the training set."""

    name: str
    rows: np.ndarray  # (m,) int64
    weights: np.ndarray | None = None  # (m,) loss weights of those rows, in any scale
    selection_seconds: float | None = None  # what it cost to choose them

    def __post_init__(self) -> None:
        check_fields(self, globals())
        if self.selection_seconds is not None:
            check_number("--selection-seconds", self.selection_seconds, 0, 1e9)


@dataclass(frozen=True)
class Method:
    """One line of the result: a list, random subsets, everything or a sampler, over all seeds."""

    name: str
    kind: str  # list, random, classes (random with a list's class counts), everything, dynamic
    kept: int  # images in the subset; for a sampler round(keep * n), which sets its steps
    fraction: float
    steps: int  # of a head evaluations of its loss, median over seeds
    accuracies: list[float]  # one a seed; one in all for a list or everything when heads are trained to convergence
    accuracy: Interval
    to_random: Difference | None  # lists and samplers
    to_classes: Difference | None  # lists: against random subsets with their class counts
    class_counts: Interval | None  # lists: what those are above random, paired: the part that the class counts make
    to_everything: Interval | None  # paired; all but everything
    class_accuracy: dict[str, float]  # means over seeds, of classes that have test images
    worst_class: str
    worst_class_accuracy: float
    seconds: float  # of training, median over seeds
    seconds_saved: float | None  # against everything
    selection_seconds: float | None
    net_saved: float | None  # saved by one training, less the selection
    seconds_to_target: float | None = None  # median; None when not asked for, or not reached by every seed
    reached_target: int | None = None  # seeds that reached it

    @property
    def verdict(self) -> str | None:
        """The verdict against random in words; None where there is none to give."""
        return None if self.to_random is None else statistics.sentence(self.to_random)

    @property
    def class_verdict(self) -> str | None:
        """The verdict against random images of the same class counts, and what these counts make; None for no list."""
        if self.to_classes is None or self.class_counts is None:
            return None
        against = statistics.sentence(self.to_classes, against="random images of the same class counts")
        return f"{against}; the class counts alone make {rounded(100 * self.class_counts.mean, sign='+')} points"


@dataclass(frozen=True)
class Evaluation:
    """All methods, and every single run behind them."""

    methods: list[Method]
    seeds: list[int]
    budget: str  # epochs, steps; convergence for linear heads
    target_accuracy: float | None
    confidence: float
    runs: list[dict[str, Any]]  # method, kind, kept, seed, accuracy, ..., in the order in which they were planned
    warnings: list[str]  # of runs that ended too early

    def method(self, name: str) -> Method:
        return next(one for one in self.methods if one.name == name)


@checked
def evaluate(
    train: Examples,
    test: Examples,
    lists: Sequence[Kept],
    recipe: Recipe,
    *,
    seeds: int | Sequence[int] = 5,
    budget: str | None = None,
    min_steps: int | None = None,
    dynamic: Sequence[dict[str, Any]] = (),
    everything: bool = True,
    class_counts: bool = True,
    target_accuracy: float | None = None,
    confidence: float = 0.95,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    fit: Fit | None = None,
    on_run: Callable[[Step], None] | None = None,
) -> Evaluation:
    """Train and compare.

    train, test: `training.Examples` with the same classes; recipe: `training.loop.Recipe`; seeds: how many, or which.
    budget, of networks: 'epochs' (the default), everyone passes over its own subset as often, so that a smaller one
    takes fewer steps and less time; 'steps', everyone takes the optimizer steps that everything takes, which separates
    the choice of images from the length of training. min_steps: what everyone takes at least, by default
    runs.MIN_STEPS. A linear head (recipe.hidden = 0) is trained to convergence and takes neither. dynamic: samplers as
    {"name": one of runs.DYNAMIC, "keep": fraction, options of its class}, for networks, which take as many steps as a
    random list of round(keep * n) images. class_counts: compare each list also with random subsets of its class counts.
    folder: where the result of each run is kept (see `runs`).

    Verdicts hold for all lists and samplers together (Holm). Raises UsageError for options that do not fit.
    """
    seeds, lists, dynamic = _seeds(seeds), list(lists), list(dynamic)
    check_confidence(confidence)
    check_options(lists, dynamic, recipe, budget, min_steps, target_accuracy, device)
    _check(train, test, lists)
    n = len(train.paths)
    plans = _plan(train, lists, dynamic, everything, class_counts, budget, min_steps, recipe)
    # By seed, so that what is stopped early can still be compared; what has no spread over seeds is done once.
    order = [(plan, seed) for seed in seeds for plan in plans if not plan.once or seed == seeds[0]]
    outcomes = running.run_all(
        [plan.run(train, seed) for plan, seed in order], train, test, recipe,
        folder=folder, fit=fit, device=device, curves=target_accuracy is not None, on_run=on_run,
    )  # fmt: skip
    found: dict[str, list[Outcome]] = {plan.name: [] for plan in plans}
    for (plan, _), outcome in zip(order, outcomes, strict=True):
        found[plan.name].append(outcome)
    comparisons = _compare(plans, found, len(seeds), len(test.labels), confidence)
    methods = [
        _summary(plan, found, comparisons.get(plan.name, _Compared()), n, train.classes, target_accuracy, confidence)
        for plan in plans
    ]
    rows = [_row(plan, seed, outcome) for (plan, seed), outcome in zip(order, outcomes, strict=True)]
    notes = running.warnings_of([(plan.name, outcome) for (plan, _), outcome in zip(order, outcomes, strict=True)])
    budget = running.CONVERGENCE if running.to_convergence(recipe) else budget or "epochs"
    return Evaluation(methods, seeds, budget, target_accuracy, confidence, rows, notes)


@dataclass(frozen=True)
class _Compared:
    """What a method was found to be against its random subsets; see `Method`."""

    to_random: Difference | None = None
    to_classes: Difference | None = None
    class_counts: Interval | None = None


@dataclass(frozen=True)
class _Plan:
    """A method before it has run."""

    name: str
    kind: str
    kept: int
    fixed_steps: int | None  # as the run is told; None: the recipe's epochs, or convergence
    once: bool = False  # whether one run stands for all seeds
    rows: np.ndarray | None = None
    weights: np.ndarray | None = None  # (n,)
    sampler: dict[str, Any] | None = None
    counts: tuple[int, ...] | None = None  # images of each class: of a list its own, of random ones what they are given
    selection_seconds: float | None = None

    def run(self, train: Examples, seed: int) -> Run:
        rows = self.rows
        if self.kind == "random":
            rows = running.random_rows(len(train.paths), self.kept, seed)
        elif self.counts is not None and self.kind == "classes":
            rows = running.matched_rows(train.labels, self.counts, seed)
        return Run(self.name, seed, rows, self.weights, self.fixed_steps, self.sampler)


def _plan(
    train: Examples,
    lists: Sequence[Kept],
    dynamic: Sequence[dict[str, Any]],
    everything: bool,
    class_counts: bool,
    budget: str | None,
    min_steps: int | None,
    recipe: Recipe,
) -> list[_Plan]:
    n = len(train.paths)
    full = running.steps_for(n, recipe, min_steps)

    def plan(name: str, kind: str, kept: int, **more: Any) -> _Plan:
        steps = full if budget == "steps" else running.steps_for(kept, recipe, min_steps)
        fixed = steps if kind == "dynamic" or steps != running.steps_for(kept, recipe) else None
        once = kind in ("list", EVERYTHING) and running.to_convergence(recipe)
        return _Plan(name, kind, kept, fixed, once, **more)

    plans: list[_Plan] = []
    for one in lists:
        rows = np.sort(np.asarray(one.rows, np.int64))
        counts = tuple(np.bincount(np.asarray(train.labels)[rows], minlength=len(train.classes)).tolist())
        more = {"weights": _spread(one, n), "counts": counts, "selection_seconds": one.selection_seconds}
        plans.append(plan(one.name, "list", len(rows), rows=rows, **more))
    for sampler in dynamic:
        kept = running.kept_count(sampler["keep"], n)
        own = plan(dynamic_name(sampler), "dynamic", kept, sampler=dict(sampler), selection_seconds=0.0)
        # What it refuses is known before anything is trained.
        running.make_sampler(**sampler, n=n, seed=0, steps=own.fixed_steps or 1, batch_size=recipe.batch_size)
        plans.append(own)
    for kept in sorted({planned.kept for planned in plans}):
        plans.append(plan(random_name(kept), "random", kept, selection_seconds=0.0))
    if class_counts:
        first = {each.counts: each for each in reversed(plans) if each.kind == "list"}  # lists may share their counts
        for like in sorted(first.values(), key=plans.index):
            name = classes_name(like.name)
            plans.append(plan(name, "classes", like.kept, counts=like.counts, selection_seconds=0.0))
    if everything:
        plans.append(plan(EVERYTHING, EVERYTHING, n))
    names = [planned.name for planned in plans]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)}: a name that the comparison needs; rename the list")
    return plans


def random_name(kept: int) -> str:
    """What random subsets of a size are called."""
    return f"random {kept:,}"


def classes_name(name: str) -> str:
    """What random subsets with the class counts of a list are called."""
    return f"random, classes as {name}"


def dynamic_name(sampler: dict[str, Any]) -> str:
    """What a sampler is called: 'dynamic random 0.3 every=1'."""
    options = "".join(f" {key}={value}" for key, value in sampler.items() if key not in ("name", "keep"))
    return f"dynamic {sampler['name']} {sampler['keep']:g}{options}"


def _spread(one: Kept, n: int) -> np.ndarray | None:
    """(n,) loss weights from those of the list's own rows; rows outside are never seen.

    Scaled to a mean of 1 over the list: weights that add up to n, as those of a calibrated list do, would multiply the
    learning rate by n / kept.
    """
    if one.weights is None:
        return None
    own = as_numbers(f"{one.name}: weights", one.weights).astype(np.float64)
    if own.shape != np.shape(one.rows) or not np.isfinite(own).all() or (own < 0).any() or not own.any():
        raise UsageError(f"{one.name}: expected a weight of 0 or more for each of its {len(one.rows):,} images")
    weights = np.zeros(n, np.float32)
    weights[np.asarray(one.rows)] = own / own.mean()
    return weights


def _compare(
    plans: list[_Plan], found: dict[str, list[Outcome]], seeds: int, test_images: int, confidence: float
) -> dict[str, _Compared]:
    """What each list and sampler was found to be; the verdicts are for all comparisons together."""
    matched = {plan.counts: plan.name for plan in plans if plan.kind == "classes"}
    pairs = []  # (method, what it is compared with)
    for plan in plans:
        if plan.kind in ("list", "dynamic"):
            pairs.append((plan, random_name(plan.kept)))
        if plan.kind == "list" and plan.counts in matched:
            pairs.append((plan, matched[plan.counts]))
    raw = [
        statistics.compare(
            _accuracies(found[plan.name], seeds), _accuracies(found[other]),
            one_draw=plan.kind == "list", confidence=confidence, resolution=1 / test_images,
        )
        for plan, other in pairs
    ]  # fmt: skip
    results: dict[str, _Compared] = {}
    for (plan, other), one in zip(pairs, statistics.judge(raw, confidence=confidence), strict=True):
        random = random_name(plan.kept)
        if other == random:
            results[plan.name] = _Compared(one)
        else:
            part = statistics.mean_interval(_gaps(found[other], found[random]), confidence=confidence)
            results[plan.name] = replace(results[plan.name], to_classes=one, class_counts=part)
    return results


def _summary(
    plan: _Plan,
    found: dict[str, list[Outcome]],
    compared: _Compared,
    n: int,
    classes: Sequence[str],
    target: float | None,
    confidence: float,
) -> Method:
    outcomes, full = found[plan.name], found.get(EVERYTHING)
    by_class = _class_means(outcomes, classes)
    worst = min(by_class, key=by_class.__getitem__)
    seconds = float(np.median([one.seconds for one in outcomes]))
    full = None if plan.name == EVERYTHING else full
    saved = float(np.median([one.seconds for one in full])) - seconds if full else None
    net = saved - plan.selection_seconds if saved is not None and plan.selection_seconds is not None else None
    to_target, reached = (None, None) if target is None else _reached(outcomes, target)
    return Method(
        name=plan.name,
        kind=plan.kind,
        kept=plan.kept,
        fraction=plan.kept / n,
        steps=int(np.median([one.steps for one in outcomes])),
        accuracies=_accuracies(outcomes),
        accuracy=_accuracy(plan, outcomes, confidence),
        to_random=compared.to_random,
        to_classes=compared.to_classes,
        class_counts=compared.class_counts,
        to_everything=_to_everything(plan, outcomes, full, confidence) if full else None,
        class_accuracy=by_class,
        worst_class=worst,
        worst_class_accuracy=by_class[worst],
        seconds=seconds,
        seconds_saved=saved,
        selection_seconds=plan.selection_seconds,
        net_saved=net,
        seconds_to_target=to_target,
        reached_target=reached,
    )


def _reached(outcomes: list[Outcome], target: float) -> tuple[float | None, int]:
    """(median training seconds until the accuracy was `target`, None where a seed never got there; how many did)."""
    times = [time_to(one, target) for one in outcomes]
    reached = [seconds for seconds in times if seconds is not None]
    return float(np.median(reached)) if len(reached) == len(times) else None, len(reached)


def _accuracy(plan: _Plan, outcomes: list[Outcome], confidence: float) -> Interval:
    """Over seeds; over test images where one run stands for all seeds."""
    if plan.once:
        return statistics.share_of_images(outcomes[0].correct_images(), confidence=confidence)
    return statistics.mean_interval(_accuracies(outcomes), confidence=confidence, share=True)


def _to_everything(plan: _Plan, outcomes: list[Outcome], full: list[Outcome], confidence: float) -> Interval:
    """Paired by seed, or by test image where one run of each stands for all seeds."""
    if not plan.once:
        return statistics.mean_interval(_gaps(outcomes, full), confidence=confidence)
    gaps = outcomes[0].correct_images().astype(float) - full[0].correct_images()
    return statistics.over_images(gaps, confidence=confidence)


def time_to(outcome: Outcome, target: float) -> float | None:
    """Training seconds after which the accuracy was first at least `target`; None if it never was."""
    return next((seconds for _, seconds, accuracy in outcome.curve if accuracy >= target), None)


def _accuracies(outcomes: list[Outcome], seeds: int = 1) -> list[float]:
    """One a seed; what was run once counts for each of them."""
    found = [one.accuracy for one in outcomes]
    return found * seeds if len(found) == 1 else found


def _gaps(outcomes: list[Outcome], others: list[Outcome]) -> list[float]:
    """Paired differences of accuracy, one a seed."""
    seeds = max(len(outcomes), len(others))
    return [a - b for a, b in zip(_accuracies(outcomes, seeds), _accuracies(others, seeds), strict=True)]


def _class_means(outcomes: list[Outcome], classes: Sequence[str]) -> dict[str, float]:
    table = [one.class_accuracy() for one in outcomes]
    present = [number for number, value in enumerate(table[0]) if value is not None]
    return {classes[number]: float(np.mean([row[number] for row in table])) for number in present}


def _row(plan: _Plan, seed: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "method": plan.name, "kind": plan.kind, "kept": plan.kept, "seed": seed, "steps": outcome.steps,
        "accuracy": outcome.accuracy, "worst_class_accuracy": min(v for v in outcome.class_accuracy() if v is not None),
        "correct": outcome.correct, "seconds": outcome.seconds, "fall": outcome.fall, "strength": outcome.strength,
        "curve": outcome.curve,
    }  # fmt: skip


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    if not isinstance(seeds, Iterable) or isinstance(seeds, (str, bytes)) or getattr(seeds, "ndim", 1) != 1:
        return list(range(check_whole("--seeds", seeds, 1, 10_000)))
    found = list(seeds)
    for seed in found:
        check_whole("--seeds", seed, 0, SEEDS)
    if not found or len(set(found)) < len(found):
        raise UsageError(f"--seeds {seeds}: expected at least one, and each once")
    return [int(seed) for seed in found]


def check_options(
    lists: Sequence[Any],
    dynamic: Sequence[dict[str, Any]],
    recipe: Recipe,
    budget: str | None,
    min_steps: int | None,
    target: float | None,
    device: str = "auto",
) -> None:
    """UsageError for options that do not fit, which needs no images: loading them can take minutes."""
    running.check_recipe(recipe, budget, min_steps, device)
    if not lists and not dynamic:
        raise UsageError("nothing to compare: give at least one list, or --dynamic with --keep")
    for one in dynamic:
        running.check_dynamic(one)
    names = [dynamic_name(one) for one in dynamic]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is given twice; give each once")
    if target is not None:
        check_number("--target-accuracy", target, 0, 1, ", a fraction such as 0.9", above=True)
    if running.to_convergence(recipe) and (dynamic or target is not None):
        raise UsageError(
            f"{'--dynamic' if dynamic else '--target-accuracy'} is about the course of a training, and a linear head "
            "is trained to convergence; train a network, if only a small one on the features with --hidden 256"
        )


def _check(train: Examples, test: Examples, lists: Sequence[Kept]) -> None:
    running.check_sets(train, test)
    if odd := [one for one in lists if not isinstance(one, Kept)]:
        raise UsageError(f"lists: holds {shown(odd[0])}, expected what Kept(name, rows) makes")
    names = [one.name for one in lists]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is given twice; give each list once")
    for one in lists:
        _check_rows(one, len(train.paths))


def _check_rows(one: Kept, n: int) -> None:
    """Raise UsageError for rows that are none: taken as they are, a mask would be the rows 0 and 1 many times."""
    rows = np.asarray(one.rows)
    if rows.dtype == bool:
        raise UsageError(f"{one.name}: a mask, expected the rows of the list; give np.flatnonzero of it")
    if rows.ndim != 1 or not len(rows) or not np.issubdtype(rows.dtype, np.integer):
        raise UsageError(f"{one.name}: {rows.dtype} of shape {rows.shape}, expected the rows of its images")
    if rows.min() < 0 or rows.max() >= n:
        raise UsageError(f"{one.name}: rows {rows.min()} to {rows.max()} of {n:,} images; expected 0 to {n - 1:,}")
    if len(np.unique(rows)) < len(rows):
        raise UsageError(f"{one.name}: rows that are given twice; give each once")
