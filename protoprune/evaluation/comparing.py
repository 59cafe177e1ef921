"""Does a list pay? Train on it, on random subsets of its size and on everything, and compare seed by seed.

The random subset of a seed is drawn anew for each seed; order, augmentation and model are those of the seed, whatever
the subset ("permute all, then filter"). What this module does not know: files, tables, figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protoprune.errors import UsageError
from protoprune.evaluation import runs as running
from protoprune.evaluation import statistics
from protoprune.evaluation.runs import Outcome, Run, Step
from protoprune.evaluation.statistics import Comparison, Interval

BUDGETS = ("epochs", "steps")
EVERYTHING = "everything"


@dataclass(frozen=True)
class Kept:
    """A list under test, as rows of the training set."""

    name: str
    rows: np.ndarray  # (m,) int64
    weights: np.ndarray | None = None  # (m,) loss weights of those rows, in any scale
    selection_seconds: float | None = None  # what it cost to choose them


@dataclass(frozen=True)
class Method:
    """One line of the result: a list, random subsets, everything or a sampler, over all seeds."""

    name: str
    kind: str  # list, random, everything, dynamic
    kept: int  # images in the subset; for a sampler round(keep * n), which sets its steps
    fraction: float
    steps: int
    accuracies: list[float]  # one a seed
    accuracy: Interval
    to_random: Comparison | None  # lists and samplers
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


@dataclass(frozen=True)
class Evaluation:
    """All methods, and every single run behind them."""

    methods: list[Method]
    seeds: list[int]
    budget: str
    target_accuracy: float | None
    confidence: float
    runs: list[dict]  # method, kind, kept, seed, accuracy, ..., in the order in which they were planned

    def method(self, name: str) -> Method:
        return next(one for one in self.methods if one.name == name)


def evaluate(
    train,
    test,
    lists: Sequence[Kept],
    recipe,
    *,
    seeds: int | Sequence[int] = 5,
    budget: str = "epochs",
    dynamic: Sequence[dict] = (),
    everything: bool = True,
    target_accuracy: float | None = None,
    confidence: float = 0.95,
    folder=None,
    device: str = "auto",
    fit: Callable | None = None,
    on_run: Callable[[Step], None] | None = None,
) -> Evaluation:
    """Train and compare.

    train, test: `training.Examples` with the same classes; recipe: `training.loop.Recipe`; seeds: how many, or which.
    budget: 'epochs', everyone passes over its own subset as often, so that a smaller one takes fewer steps and less
    time; 'steps', everyone takes the optimizer steps that everything takes, which separates the choice of images from
    the length of training. dynamic: samplers as {"name": one of runs.DYNAMIC, "keep": fraction, options of its
    class}, which take as many steps as a random list of round(keep * n) images.
    folder: where the result of each run is kept (see `runs`).

    Verdicts hold for all lists and samplers together (Holm). Raises UsageError for options that do not fit.
    """
    seeds = _seeds(seeds)
    check_options(lists, dynamic, budget, target_accuracy)
    _check(train, test, lists)
    n = len(train.paths)
    plans = _plan(n, lists, dynamic, everything, budget, recipe)
    order = [(plan, seed) for seed in seeds for plan in plans]  # by seed: what is stopped early can still be compared
    outcomes = running.run_all(
        [plan.run(n, seed) for plan, seed in order], train, test, recipe,
        folder=folder, fit=fit, device=device, curves=target_accuracy is not None, on_run=on_run,
    )  # fmt: skip
    found: dict[str, list[Outcome]] = {plan.name: [] for plan in plans}
    for (plan, _), outcome in zip(order, outcomes, strict=True):
        found[plan.name].append(outcome)
    comparisons = _compare(plans, found, len(test.labels), confidence)
    methods = [
        _summary(plan, found, comparisons.get(plan.name), n, train.classes, target_accuracy, confidence)
        for plan in plans
    ]
    rows = [_row(plan, seed, outcome) for (plan, seed), outcome in zip(order, outcomes, strict=True)]
    return Evaluation(methods, seeds, budget, target_accuracy, confidence, rows)


@dataclass(frozen=True)
class _Plan:
    """A method before it has run."""

    name: str
    kind: str
    kept: int
    steps: int
    fixed_steps: int | None  # as the run is told; None: the recipe's epochs
    rows: np.ndarray | None = None
    weights: np.ndarray | None = None  # (n,)
    sampler: dict | None = None
    selection_seconds: float | None = None

    def run(self, n: int, seed: int) -> Run:
        rows = running.random_rows(n, self.kept, seed) if self.kind == "random" else self.rows
        return Run(self.name, seed, rows, self.weights, self.fixed_steps, self.sampler)


def _plan(n: int, lists, dynamic, everything: bool, budget: str, recipe) -> list[_Plan]:
    full = running.steps_for(n, recipe)

    def plan(name: str, kind: str, kept: int, **more) -> _Plan:
        own = running.steps_for(kept, recipe)
        steps = full if budget == "steps" else own
        fixed = steps if kind == "dynamic" or steps != own else None
        return _Plan(name, kind, kept, steps, fixed, **more)

    plans = []
    for one in lists:
        rows = np.sort(np.asarray(one.rows, np.int64))
        more = {"weights": _spread(one, n), "selection_seconds": one.selection_seconds}
        plans.append(plan(one.name, "list", len(rows), rows=rows, **more))
    for one in dynamic:
        more = {"sampler": dict(one), "selection_seconds": 0.0}
        plans.append(plan(dynamic_name(one), "dynamic", running.kept_count(one["keep"], n), **more))
    for kept in sorted({one.kept for one in plans}):
        plans.append(plan(random_name(kept), "random", kept, selection_seconds=0.0))
    if everything:
        plans.append(plan(EVERYTHING, EVERYTHING, n))
    names = [one.name for one in plans]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)}: a name that the comparison needs; rename the list")
    return plans


def random_name(kept: int) -> str:
    """What random subsets of a size are called."""
    return f"random {kept:,}"


def dynamic_name(sampler: dict) -> str:
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
    own = np.asarray(one.weights, np.float64)
    if own.shape != np.shape(one.rows) or not np.isfinite(own).all() or (own < 0).any() or not own.any():
        raise UsageError(f"{one.name}: expected a weight of 0 or more for each of its {len(one.rows):,} images")
    weights = np.zeros(n, np.float32)
    weights[np.asarray(one.rows)] = own / own.mean()
    return weights


def _compare(plans, found, test_images: int, confidence: float) -> dict[str, Comparison]:
    judged = [plan for plan in plans if plan.kind in ("list", "dynamic")]
    raw = [
        statistics.compare(
            _accuracies(found[plan.name]), _accuracies(found[random_name(plan.kept)]),
            one_draw=plan.kind == "list", confidence=confidence, resolution=1 / test_images,
        )
        for plan in judged
    ]  # fmt: skip
    verdicts = statistics.judge(raw, confidence=confidence)
    return {plan.name: one for plan, one in zip(judged, verdicts, strict=True)}


def _summary(plan: _Plan, found, to_random, n: int, classes, target: float | None, confidence: float) -> Method:
    outcomes, full = found[plan.name], found.get(EVERYTHING)
    accuracies = _accuracies(outcomes)
    by_class = _class_means(outcomes, classes)
    worst = min(by_class, key=by_class.__getitem__)
    seconds = float(np.median([one.seconds for one in outcomes]))
    others = plan.name != EVERYTHING and full
    saved = float(np.median([one.seconds for one in full])) - seconds if others else None
    known = saved is not None and plan.selection_seconds is not None
    reached = [time_to(one, target) for one in outcomes] if target is not None else None
    return Method(
        name=plan.name,
        kind=plan.kind,
        kept=plan.kept,
        fraction=plan.kept / n,
        steps=plan.steps,
        accuracies=accuracies,
        accuracy=statistics.mean_interval(accuracies, confidence=confidence, share=True),
        to_random=to_random,
        to_everything=_to_everything(accuracies, full, confidence) if others else None,
        class_accuracy=by_class,
        worst_class=worst,
        worst_class_accuracy=by_class[worst],
        seconds=seconds,
        seconds_saved=saved,
        selection_seconds=plan.selection_seconds,
        net_saved=saved - plan.selection_seconds if known else None,
        seconds_to_target=float(np.median(reached)) if reached and None not in reached else None,
        reached_target=sum(one is not None for one in reached) if reached else None,
    )


def _to_everything(accuracies: list[float], full: list[Outcome], confidence: float) -> Interval:
    gaps = [ours - theirs for ours, theirs in zip(accuracies, _accuracies(full), strict=True)]
    return statistics.mean_interval(gaps, confidence=confidence)


def time_to(outcome: Outcome, target: float) -> float | None:
    """Training seconds after which the accuracy was first at least `target`; None if it never was."""
    return next((seconds for _, seconds, accuracy in outcome.curve if accuracy >= target), None)


def _accuracies(outcomes: list[Outcome]) -> list[float]:
    return [one.accuracy for one in outcomes]


def _class_means(outcomes: list[Outcome], classes: Sequence[str]) -> dict[str, float]:
    table = [one.class_accuracy() for one in outcomes]
    present = [number for number, value in enumerate(table[0]) if value is not None]
    return {classes[number]: float(np.mean([row[number] for row in table])) for number in present}


def _row(plan: _Plan, seed: int, outcome: Outcome) -> dict:
    return {
        "method": plan.name, "kind": plan.kind, "kept": plan.kept, "seed": seed, "steps": outcome.steps,
        "accuracy": outcome.accuracy, "worst_class_accuracy": min(v for v in outcome.class_accuracy() if v is not None),
        "correct": outcome.correct, "seconds": outcome.seconds, "curve": outcome.curve,
    }  # fmt: skip


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise UsageError(f"--seeds {seeds}: expected at least one, and each once")
    return found


def check_options(lists: Sequence, dynamic: Sequence[dict], budget: str, target: float | None) -> None:
    """UsageError for options that do not fit, which needs no images: loading them can take minutes."""
    check_budget(budget)
    if not lists and not dynamic:
        raise UsageError("nothing to compare: give at least one list, or --dynamic with --keep")
    for one in dynamic:
        running.check_dynamic(one)
    names = [dynamic_name(one) for one in dynamic]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is given twice; give each once")
    if target is not None and not 0 < target <= 1:
        raise UsageError(f"--target-accuracy {target:g}: expected a fraction above 0 and at most 1, such as 0.9")


def check_budget(budget: str) -> None:
    """UsageError unless there is such a budget."""
    if budget not in BUDGETS:
        raise UsageError(f"--budget {budget}: expected epochs (passes over the subset) or steps (of the optimizer)")


def _check(train, test, lists) -> None:
    if list(train.classes) != list(test.classes):
        raise UsageError("the test set has other classes than the training set; load it with the same ones")
    if not len(test.labels):
        raise UsageError("the test set is empty; give one with labelled images")
    names = [one.name for one in lists]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is given twice; give each list once")
