"""Self-supervised prototypes at 70 to 80 % kept: what do they cost, and are they better than random?"""

from __future__ import annotations

import numpy as np
from lab import Claim, Lab, interval_text

from protoprune import pruning, selection
from protoprune.evaluation import Kept, evaluate, report

SOURCE = "Sorscher et al. 2022, section 5"


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    if recipe.model == "head":
        train, test = lab.features(settings["data"])
    else:
        train, test = lab.images(settings["data"], image_size=recipe.image_size)
    ranking = pruning.rank(lab.feature_file(settings["data"], "train"), k=settings.get("k"))
    row_of = {path: row for row, path in enumerate(ranking.paths)}
    hardness = ranking.scores[[row_of[path] for path in train.paths]]
    lists = [kept_by(hardness, train, keep, settings["balance"]) for keep in settings["keeps"]]
    result = evaluate(
        train, test, lists, recipe, seeds=lab.seeds, folder=lab.runs, device=lab.device, on_run=lab.progress
    )
    lab.save_table([report.summary_row(one) for one in result.methods])
    draw(lab, result)
    pruned = [one for one in result.methods if one.kind == "list"]
    return [claim for one in pruned for claim in judge(one, settings["tolerance"])]


def kept_by(hardness: np.ndarray, train, keep: float, balance: float) -> Kept:
    """The hardest `keep` of the training images with the paper's floor for every class."""
    mask = selection.kept_mask(hardness, keep, ids=train.paths, groups=train.labels, balance=balance)
    return Kept(f"prototypes {keep:g}", np.flatnonzero(mask))


def judge(one, tolerance: float) -> list[Claim]:
    """Two claims on a list (`evaluation.Method`): what it costs against everything, and against random."""
    cost, random = one.to_everything, one.to_random
    return [
        Claim(
            f"{one.fraction:.0%} kept by prototypes costs no accuracy",
            SOURCE,
            f"{100 * one.accuracy.mean:.2f} %, against everything {interval_text(cost.mean, cost.low, cost.high)} "
            f"points (none: above {-100 * tolerance:g}), {cost.n} {'test images' if cost.n > random.n else 'seeds'}",
            no_worse(cost.low, cost.high, tolerance),
        ),
        Claim(
            f"{one.fraction:.0%} kept by prototypes is no worse than random",
            SOURCE,
            f"against random {interval_text(random.difference, random.low, random.high)} points with the luck of one "
            f"draw, {interval_text(random.difference, random.seeds_low, random.seeds_high)} over seeds alone; "
            f"{random.n} seeds",
            no_worse(random.low, random.high, tolerance),
        ),
    ]


def no_worse(low: float | None, high: float | None, tolerance: float) -> str:
    """Holds where the interval of a difference lies above -tolerance, does not hold where it lies below."""
    if low is None or high is None:
        return "undecided"
    return "holds" if low >= -tolerance else "does not hold" if high < -tolerance else "undecided"


def draw(lab: Lab, result) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    for place, one in enumerate(result.methods):
        colour = {"list": "C0", "random": "grey"}.get(one.kind, "black")
        axes.plot(100 * np.array(one.accuracies), [place] * len(one.accuracies), ".", color=colour, alpha=0.4)
        if one.accuracy.low is not None:
            axes.plot([100 * one.accuracy.low, 100 * one.accuracy.high], [place, place], color=colour)
        axes.plot(100 * one.accuracy.mean, place, "o", color=colour)
    axes.set_yticks(range(len(result.methods)), [one.name for one in result.methods])
    axes.invert_yaxis()
    axes.set_xlabel(f"test accuracy, %: mean, 95 % interval, {len(result.seeds)} seeds")
    lab.save_figure(figure)
