"""What the comparisons of seeds have in common: many runs by method and seed, EL2N scores, and verdicts on intervals.

A verdict rests on paired differences over seeds. Where a claim is about several differences at once, it holds only if
each holds at the stated confidence (which needs no correction: all must), and it does not hold as soon as one is
refuted at a confidence corrected for their number (Bonferroni). Anything else is undecided. What this module does not
know: experiments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import protoprune
from protoprune.evaluation.runs import Outcome, Run, run_all
from protoprune.evaluation.statistics import Interval, mean_interval
from protoprune.training import loop
from protoprune.training.examples import Examples
from protoprune.training.loop import Recipe
from protoprune.training.per_example import from_logits

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


def above(one: Interval, margin: float = 0.0) -> str:
    """Is the mean above the margin?"""
    if one.low is None:
        return OPEN
    return HOLDS if one.low > margin else FAILS if one.high < margin else OPEN


def no_worse(one: Interval, margin: float) -> str:
    """Is the mean above minus the margin?"""
    return above(one, -margin)


def same(one: Interval, margin: float) -> str:
    """Is the mean within the margin of 0, on both sides?"""
    if one.low is None:
        return OPEN
    if -margin < one.low and one.high < margin:
        return HOLDS
    return FAILS if one.low > margin or one.high < -margin else OPEN


def decide(gaps: Sequence[Sequence[float]], judge: Callable[[Interval], str], *, confidence: float = 0.95) -> str:
    """The verdict on a claim that is about every row of `gaps`, each the paired differences of the seeds."""
    if not gaps:
        return OPEN
    corrected = 1 - (1 - confidence) / len(gaps)
    if any(judge(mean_interval(gap, confidence=corrected)) == FAILS for gap in gaps):
        return FAILS
    return HOLDS if all(judge(mean_interval(gap, confidence=confidence)) == HOLDS for gap in gaps) else OPEN


def points(gap: Sequence[float]) -> str:
    """'+1.2 [0.4, 2.0]': a mean difference of accuracies and its 95 % interval, in points."""
    one = mean_interval(gap)
    span = "" if one.low is None else f" [{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"{100 * one.mean:+.1f}{span}"


def minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Paired differences, one a seed."""
    return [a - b for a, b in zip(values, others, strict=True)]


def outcomes_by_method(lab, runs: Sequence[Run], train, test, recipe: Recipe, **options) -> dict[str, list[Outcome]]:
    """{method: outcomes in the order of its seeds}; finished runs are not done again."""
    found: dict[str, list[Outcome]] = {}
    outcomes = run_all(
        runs, train, test, recipe, folder=lab.runs, device=lab.device, on_run=lab.progress, **options
    )  # fmt: skip
    for run, outcome in zip(runs, outcomes, strict=True):
        found.setdefault(run.method, []).append(outcome)
    return found


def accuracies(found: dict[str, list[Outcome]]) -> dict[str, list[float]]:
    return {method: [one.accuracy for one in outcomes] for method, outcomes in found.items()}


def rows_of_table(found: dict[str, list[Outcome]]) -> list[dict]:
    """One row a method, for `Lab.save_table`."""
    table = []
    for method, outcomes in found.items():
        one = mean_interval([outcome.accuracy for outcome in outcomes])
        table.append({
            "method": method, "seeds": one.n, "steps": outcomes[0].steps, "accuracy": one.mean,
            "accuracy_low": one.low, "accuracy_high": one.high,
            "seconds": float(np.median([outcome.seconds for outcome in outcomes])),
        })  # fmt: skip
    return table


def el2n(train: Examples, recipe: Recipe, *, models: int, seed: int, device: str, folder: Path) -> np.ndarray:
    """(n,) EL2N, mean over `models` trained by the recipe with seeds of their own; kept in `folder`, done once.

    The recipe's epochs are few, as EL2N is a measure of early training (Paul et al. 2021).
    """
    key = f"{train.fingerprint()} {recipe} {models} {seed} {protoprune.__version__} {loop.torch.__version__}"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if path.exists():
        return np.load(path)
    labels = loop.torch.from_numpy(train.labels)
    total = np.zeros(len(train))
    for number in range(models):
        model = loop.fit(train, None, recipe, seed=10_000 + 100 * seed + number, device=device).model
        logits = loop.logits(model, train.inputs, precision=recipe.precision)
        total += from_logits(logits, labels)["error_norm"].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, total / models)
    partial.replace(path)
    return total / models
