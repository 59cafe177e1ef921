"""Accuracy with the hardest images by prototypes kept, against the number of clusters k.

Every seed draws its own images before pruning, clusters those and has a random subset of them; differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from claims import Claim, bars, claim, gap, interval_text, listed, same
from lab import Lab, drawn

from protoprune import selection
from protoprune.clustering import prototypes
from protoprune.evaluation.runs import Run

SOURCE = "Sorscher et al. 2022"
MARGIN = 0.01  # of accuracy: what counts as no difference


def run(lab: Lab) -> list[Claim]:
    train, test = lab.sets()
    vectors = lab.vectors(train)
    runs = [one for seed in range(lab.seeds) for one in plan(lab, train, vectors, seed)]
    found = lab.accuracies(runs, train, test)
    draw(lab, found, len(train.classes))
    return claims(found, lab.settings["k"], len(train.classes))


def plan(lab: Lab, train, vectors: np.ndarray, seed: int) -> list[Run]:
    """A run a k, one on random images and one on all, of the seed's images before pruning."""
    rows, keep = lab.initial(len(train), seed), lab.settings["keep"]
    ids = [train.paths[row] for row in rows]
    runs = []
    for k in lab.settings["k"]:
        hardness = prototypes.cluster(vectors[rows], k, seed=seed).distance
        runs.append(Run(f"k = {k}", seed, rows[selection.kept_mask(hardness, keep, ids=ids)]))
    return [*runs, Run("random", seed, rows[drawn(len(rows), keep, seed)]), Run("everything", seed, rows)]


def claims(found: Mapping[str, np.ndarray], ks: Sequence[int], classes: int) -> list[Claim]:
    """found: (seeds,) accuracies by 'k = 10', 'random' and 'everything'."""
    near = [k for k in ks if classes / 10 <= k <= 10 * classes]
    middle = min(near, key=lambda k: abs(np.log(k / classes)))
    others = {f"k = {k}": gap(found[f"k = {k}"], found[f"k = {middle}"]) for k in near if k != middle}
    to_random = {f"k = {k}": gap(found[f"k = {k}"], found["random"]) for k in near}
    means = [100 * found[f"k = {k}"].mean() for k in near]
    return [
        Claim(
            "Results hardly depend on k from 1/10 to 10 times the number of classes", f"{SOURCE}, section 5",
            f"accuracies from {min(means):.2f} to {max(means):.2f} %; against k = {middle} {listed(others)}; no "
            f"difference means less than {interval_text(MARGIN, None, None)}", same(others.values(), MARGIN),
        ),
        claim("Prototypes are no worse than random (margin 1 point)", f"{SOURCE}, figure 5C", to_random,
              margin=-MARGIN),
    ]  # fmt: skip


def draw(lab: Lab, found: Mapping[str, np.ndarray], classes: int) -> None:
    with lab.panels(6, 4) as (axes,):
        ks = lab.settings["k"]
        bars(axes, ks, [found[f"k = {k}"] for k in ks], label=f"prototypes, hardest {lab.settings['keep']:.0%}")
        for name, style in (("random", "--"), ("everything", ":")):
            axes.axhline(100 * found[name].mean(), linestyle=style, color="grey")
            axes.annotate(name, (ks[0], 100 * found[name].mean()), fontsize=8, va="bottom")
        axes.axvline(classes, color="lightgrey", zorder=0)
        axes.set(xscale="log", xlabel="k, number of clusters (line: number of classes)", ylabel="test accuracy, %")
        axes.legend()
