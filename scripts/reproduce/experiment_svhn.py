"""The best fraction to keep under a worse metric: a probe of few epochs against one of many, at a fixed pruned size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from claims import FAILS, Claim, bars, decide, gap, span
from lab import Lab, accuracies

from protoprune import selection
from protoprune.errors import UsageError
from protoprune.evaluation import runs

SOURCE = "Sorscher et al. 2022, figure 3"


def run(lab: Lab) -> list[Claim]:
    settings = lab.settings
    train, test = lab.sets()
    keeps, epochs = sorted(settings["keeps"]), sorted(settings["probe_epochs"])
    check(keeps, epochs, settings["kept"], len(train))
    probes = [lab.el2n(train, test, epochs=one, models=settings["probe_models"]) for one in epochs]
    planned = [
        runs.Run(f"{p} {f}", seed, hardest(train, probes[p][0], settings["kept"], keeps[f], seed))
        for seed in range(lab.seeds) for p in range(2) for f in range(len(keeps))
    ]  # fmt: skip
    found = accuracies(lab.outcomes(planned, train, test, lab.recipe()))
    errors = 1 - np.array([[found[f"{p} {f}"] for f in range(len(keeps))] for p in range(2)])  # (2, f, seeds)
    lab.save_table([
        {"probe_epochs": epochs[p], "probe_accuracy": probes[p][1], "keep": keep, "kept": settings["kept"],
         "seed": seed, "error": errors[p, f, seed]}
        for p in range(2) for f, keep in enumerate(keeps) for seed in range(lab.seeds)
    ])  # fmt: skip
    names = [
        f"{e} epoch{'s' * (e > 1)} ({accuracy:.1%} right)" for e, (_, accuracy) in zip(epochs, probes, strict=True)
    ]
    draw(lab, errors, keeps, names)
    return judge(errors, keeps, names)


def check(keeps: Sequence[float], epochs: Sequence[int], kept: int, n: int) -> None:
    if len(epochs) != 2:
        raise UsageError(f"probe_epochs = {list(epochs)}: expected two, few and many")
    if round(kept / min(keeps)) > n:
        raise UsageError(f"kept = {kept}: {min(keeps):g} of {n:,} training images are fewer; keep fewer")


def hardest(train, scores: np.ndarray, kept: int, keep: float, seed: int) -> np.ndarray:
    """(kept,) rows: the hardest of kept / keep images that are drawn at random for the seed."""
    initial = runs.random_rows(len(train), round(kept / keep), seed)
    rows = selection.ranking(scores[initial], ids=[train.paths[row] for row in initial], seed=seed)[:kept]
    return np.sort(initial[rows])


# --- claims ----------------------------------------------------------------------------------------------------------


def judge(errors: np.ndarray, keeps: Sequence[float], names: Sequence[str]) -> list[Claim]:
    """errors: (2, f, seeds) test errors, the probe of few epochs first; keeps: (f,) rising fractions."""
    return [worse_keeps_more(errors, keeps, names), too_far_hurts(errors[0], keeps, names[0])]


def worse_keeps_more(errors: np.ndarray, keeps: Sequence[float], names: Sequence[str]) -> Claim:
    """The ratio of the two probes' best fractions, seed by seed, in the logarithm."""
    best = np.log(keeps)[errors.argmin(axis=1)]  # (2, seeds)
    ratio = gap(best[0], best[1])
    means = [f"{np.exp(one.mean()):.2f} with {name}" for one, name in zip(best, names, strict=True)]
    lowest = [f"{100 * one.mean(axis=1).min():.2f}" for one in errors]
    found = (
        f"best fraction {means[0]}, {means[1]} (geometric means over {ratio.n} seeds), ratio "
        f"{np.exp(ratio.difference):.2f} ({np.exp(ratio.low):.2f} to {np.exp(ratio.high):.2f}); lowest "
        f"mean errors {' and '.join(lowest)} %"
    )
    return Claim("The worse the probe, the larger the best fraction to keep", SOURCE, found, decide([ratio]))


def too_far_hurts(errors: np.ndarray, keeps: Sequence[float], name: str) -> Claim:
    """(f, seeds) errors: the smallest fraction against the best one, which is chosen by the other seeds."""
    seeds = range(errors.shape[1])
    chosen = [int(np.delete(errors, seed, axis=1).mean(axis=1).argmin()) for seed in seeds]
    cost = gap([errors[0, seed] for seed in seeds], [errors[chosen[seed], seed] for seed in seeds])
    verdict = decide([cost]) if any(chosen) else FAILS
    best = " or ".join(f"{keeps[at]:g}" for at in sorted(set(chosen)))
    found = (
        f"probe of {name}: with {keeps[0]:g} kept the error is {span(cost)} points "
        f"above that with {best}, {cost.n} seeds"
    )
    return Claim("Pruning past the best fraction hurts", SOURCE, found, verdict)


def draw(lab: Lab, errors: np.ndarray, keeps: Sequence[float], names: Sequence[str]) -> None:
    with lab.panels(6, 4) as (axes,):
        for one, name in zip(errors, names, strict=True):
            bars(axes, keeps, one, label=f"probe of {name}")
        axes.set(xlabel=f"fraction kept (always {lab.settings['kept']:,} images)", ylabel="test error, %", xscale="log")
        axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
        axes.minorticks_off()
        axes.legend()
