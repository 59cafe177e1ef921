"""Accuracy with 80 % kept by prototypes, against the number of clusters k."""

from __future__ import annotations

import numpy as np
from lab import Claim, Lab

from protoprune import pruning, selection
from protoprune.evaluation import Kept, evaluate, report


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    train, test = lab.features(settings["data"]) if recipe.model == "head" else lab.images(settings["data"])
    lists = [kept_by_prototypes(lab, train, k) for k in settings["k"]]
    result = evaluate(
        train, test, lists, recipe, seeds=lab.seeds, folder=lab.runs, device=lab.device, on_run=lab.progress
    )
    lab.save_table([report.summary_row(one) for one in result.methods])
    draw(lab, result, len(train.classes))
    return claims(result, settings["k"], len(train.classes))


def kept_by_prototypes(lab: Lab, train, k: int) -> Kept:
    """The hardest `keep` of the training images, by distance to k prototypes."""
    ranking = pruning.rank(lab.feature_file(lab.settings["data"], "train"), k=k)
    row_of = {path: row for row, path in enumerate(ranking.paths)}
    rows = np.array([row_of[path] for path in train.paths])
    mask = selection.kept_mask(ranking.scores[rows], lab.settings["keep"], ids=train.paths)
    return Kept(f"k = {k}", np.flatnonzero(mask))


MARGIN = 0.01  # of accuracy: what counts as no difference


def claims(result, ks: list[int], classes: int) -> list[Claim]:
    near = [result.method(f"k = {k}") for k in ks if classes / 10 <= k <= 10 * classes]
    means = [one.accuracy.mean for one in near]
    noise = max(one.accuracy.high - one.accuracy.low for one in near)
    spread = max(means) - min(means)
    flat = "holds" if spread < MARGIN else "does not hold" if spread > MARGIN + noise else "undecided"
    lines = "; ".join(
        f"{one.name} {100 * one.to_random.difference:+.2f} ({100 * one.to_random.low:+.2f} to "
        f"{100 * one.to_random.high:+.2f})"
        for one in near
    )
    worse = any(one.to_random.verdict == "worse" for one in near)
    no_worse = all(one.to_random.low > -MARGIN for one in near)
    return [
        Claim(
            "Results hardly depend on k from 1/10 to 10 times the number of classes",
            "Sorscher et al. 2022, section 5",
            f"accuracies from {100 * min(means):.2f} to {100 * max(means):.2f} %, widest 95 % interval "
            f"{100 * noise:.2f} points, {len(result.seeds)} seeds; no difference means less than 1 point",
            flat,
        ),
        Claim(
            "Prototypes are no worse than random at 80 % kept",
            "Sorscher et al. 2022, figure 5C",
            f"points against random with 95 % intervals: {lines}; no worse means by less than 1 point",
            "does not hold" if worse else "holds" if no_worse else "undecided",
        ),
    ]


def draw(lab: Lab, result, classes: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    listed = [one for one in result.methods if one.kind == "list"]
    ks = [int(one.name.removeprefix("k = ")) for one in listed]
    middle = [100 * one.accuracy.mean for one in listed]
    span = [
        [100 * (o.accuracy.mean - o.accuracy.low) for o in listed],
        [100 * (o.accuracy.high - o.accuracy.mean) for o in listed],
    ]
    axes.errorbar(ks, middle, span, fmt="o-", capsize=3, label="prototypes, hardest 80 %")
    for one in result.methods:
        if one.kind in ("random", "everything"):
            axes.axhline(100 * one.accuracy.mean, linestyle="--" if one.kind == "random" else ":", color="grey")
            axes.annotate(one.name, (ks[0], 100 * one.accuracy.mean), fontsize=8, va="bottom")
    axes.axvline(classes, color="lightgrey", zorder=0)
    axes.set(xscale="log", xlabel="k, number of clusters (line: number of classes)", ylabel="test accuracy, %")
    axes.legend()
    lab.save_figure(figure)
