"""Self-supervised prototypes: what do 70 to 80 % cost, and are the hardest, or the easiest, better than random images?

Every seed draws its own images before pruning and clusters those. Where all images take part (`images` not given) its
list is one for all seeds but for the clustering, and differences hold the luck of one draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from claims import Claim, bars, claim, fractions_axis, gap
from lab import Lab, drawn

from protoprune import selection
from protoprune.clustering import prototypes
from protoprune.evaluation.runs import Run, steps_for

SOURCE = "Sorscher et al. 2022, section 5"
MUCH = 0.5  # the paper's claim is about so much kept and more
ORDERS = ("hard", "easy")


def run(lab: Lab) -> list[Claim]:
    settings = lab.settings
    train, test = lab.sets()
    vectors = lab.vectors(train)
    runs = [one for seed in range(lab.seeds) for one in plan(lab, train, vectors, seed)]
    found = lab.accuracies(runs, train, test)
    draw(lab, found)
    return claims(found, settings["keeps"], settings["tolerance"], one_draw="images" not in settings)


def plan(lab: Lab, train, vectors: np.ndarray, seed: int) -> list[Run]:
    """Hard, easy and random at every fraction, and everything, of the seed's images before pruning.

    A network takes equal steps on all of them, so that its length of training is not judged.
    """
    rows = lab.initial(len(train), seed)
    steps = steps_for(len(rows), lab.recipe())
    k = lab.settings.get("k") or prototypes.auto_k(len(rows), len(train.classes))
    hardness = prototypes.cluster(vectors[rows], k, seed=seed).distance
    runs = [Run("everything", seed, rows, None, steps)]
    for keep in lab.settings["keeps"]:
        for order in ORDERS:
            own = kept_by(hardness, train, rows, keep, order, lab.settings["balance"])
            runs.append(Run(f"{order} {keep:g}", seed, own, None, steps))
        own = rows[drawn(len(rows), keep, seed)]
        runs.append(Run(f"random {keep:g}", seed, own, None, steps))
    return runs


def kept_by(hardness: np.ndarray, train, rows: np.ndarray, keep: float, order: str, balance: float) -> np.ndarray:
    """The hardest or easiest of these rows, with the paper's floor for every class."""
    ids = [train.paths[row] for row in rows]
    return rows[selection.kept_mask(hardness, keep, ids=ids, order=order, groups=train.labels[rows], balance=balance)]


def claims(
    found: Mapping[str, np.ndarray], keeps: Sequence[float], tolerance: float, *, one_draw: bool = False
) -> list[Claim]:
    """Verdicts from (seeds,) accuracies by 'hard 0.8', …; one_draw: the lists are the same for all seeds."""

    def to_random(order: str, keep: float):
        return {f"{keep:.0%} kept": gap(found[f"{order} {keep:g}"], found[f"random {keep:g}"], one_draw=one_draw)}

    made = []
    for keep in sorted(keeps, reverse=True):
        mine = found[f"hard {keep:g}"]
        about = f"hard {100 * mine.mean():.2f} %, random {100 * found[f'random {keep:g}'].mean():.2f} %: "
        if keep < MUCH:
            made.append(claim(f"{keep:.0%} kept: hard beats random", SOURCE, to_random("hard", keep), about))
            continue
        cost = {f"{keep:.0%} kept": gap(mine, found["everything"])}
        whole = f"{100 * mine.mean():.2f} of {100 * found['everything'].mean():.2f} %: "
        made += [
            claim(f"{keep:.0%} kept by prototypes costs no accuracy (margin {100 * tolerance:g} points)", SOURCE, cost,
                  whole, margin=-tolerance),
            claim(f"{keep:.0%} kept by prototypes is no worse than random (margin {100 * tolerance:g} points)", SOURCE,
                  to_random("hard", keep), about, margin=-tolerance),
        ]  # fmt: skip
    easy = {name: one for keep in sorted(keeps, reverse=True) for name, one in to_random("easy", keep).items()}
    return [*made, claim("Keeping the easy examples loses to random", SOURCE, easy, want="worse")]


def draw(lab: Lab, found: Mapping[str, np.ndarray]) -> None:
    with lab.panels(5, 3.5) as (axes,):
        keeps = sorted(lab.settings["keeps"])
        for order in (*ORDERS, "random"):
            style = {"label": order, "color": "grey"} if order == "random" else {"label": order}
            bars(axes, [100 * keep for keep in keeps], [found[f"{order} {keep:g}"] for keep in keeps], **style)
        axes.axhline(100 * found["everything"].mean(), color="black", ls=":", lw=1, label="everything")
        fractions_axis(axes, keeps, ylabel=f"test accuracy, % (95 %, {lab.seeds} seeds)", title=lab.folder.name)
        axes.legend(fontsize="small")
