"""Calibrated pruning (Ayed & Hayou 2023): a toy where score-only pruning must fail, and the same on images.

Toy: logistic regression, 20 Gaussian inputs, labels 1 where sum(x) / sqrt(20) + (x1 x2 + x3 x4) / 2 > 0. The products
are what a linear model cannot see, so that it errs on a sixth of the examples, and those are the hardest by EL2N. The
data model is ours; the numbers of examples, inputs and seeds, the fractions and alpha are those of the published table.
"""

from __future__ import annotations

import numpy as np
from claims import Claim, bars, claim, fractions_axis, gaps, listed, same
from lab import Lab, drawn

from protoprune import selection
from protoprune.evaluation.runs import Run, kept_count

TOY_KEEP = (0.5, 0.3, 0.1, 0.05)
TOY_METHODS = ("random", "EL2N-hard", "calibrated", "unweighted")
MARGIN = 0.01  # accuracies this near count as equal
COLLAPSE = 0.1  # and so far below random as a collapse
SOURCE = "Ayed & Hayou 2023"


def run(lab: Lab) -> list[Claim]:
    toys = [toy(lab.settings["toy_images"], seed) for seed in range(lab.settings["toy_seeds"])]
    toy_found = {name: [one[name] for one in toys] for name in toys[0]}
    lab.save_table(toy_table(toy_found), "toy")
    lab.say(f"toy: everything {np.mean(toy_found['everything']):.3f}; see toy.csv")
    train, test = lab.sets()
    found = lab.accuracies(plan(lab, train, test), train, test)
    draw(lab, found)
    return toy_claims(toy_found) + claims(found, lab.settings["keep"], lab.settings["calibrate"])


# --- the toy ---------------------------------------------------------------------------------------------------------


def toy(n: int, seed: int) -> dict[str, float]:
    """Test accuracy of logistic regression by method and fraction kept ('random 0.3'), and on everything."""
    rng = np.random.default_rng([seed, 20])
    (x, y), (x_test, y_test) = toy_data(rng, n), toy_data(rng, n)

    def accuracy(rows=slice(None), weights=None) -> float:
        slope = logistic(x[rows], y[rows], weights)
        return float(((x_test @ slope > 0) == y_test).mean())

    found = {"everything": accuracy()}
    error = np.abs(1 / (1 + np.exp(-x @ logistic(x, y))) - y)  # EL2N up to a factor of sqrt(2)
    ids = [f"{number:05d}" for number in range(n)]
    order = selection.ranking(error, ids=ids)
    for keep in TOY_KEEP:
        count = kept_count(keep, n)
        mask, weights = selection.calibrated(order, n, count, 0.5, ids=ids, seed=seed)
        rows = np.flatnonzero(mask)
        found[f"random {keep:g}"] = accuracy(drawn(n, keep, seed))
        found[f"EL2N-hard {keep:g}"] = accuracy(order[:count])
        found[f"calibrated {keep:g}"] = accuracy(rows, weights[rows])
        found[f"unweighted {keep:g}"] = accuracy(rows)
    return found


def toy_data(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """x (n, 20), y (n,) of 0 and 1."""
    x = rng.normal(size=(n, 20))
    return x, (x.sum(1) / np.sqrt(20) + (x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) / 2 > 0).astype(float)


def logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None, ridge: float = 1.0) -> np.ndarray:
    """(d,) slope of (weighted) logistic regression by Newton's method; the ridge keeps separable data finite."""
    weights = np.ones(len(x)) if weights is None else weights
    slope = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ slope, -30, 30)))
        gradient = x.T @ (weights * (p - y)) + ridge * slope
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge * np.eye(x.shape[1])
        step = np.linalg.solve(curvature, gradient)
        slope -= step
        if np.abs(step).max() < 1e-8:
            break
    return slope


def toy_table(found: dict[str, list[float]]) -> list[dict]:
    rows = [{"kept": 1.0, **{name: float(np.mean(found["everything"])) for name in TOY_METHODS[:1]}}]
    for keep in TOY_KEEP:
        rows.append({"kept": keep, **{name: float(np.mean(found[f"{name} {keep:g}"])) for name in TOY_METHODS}})
    return rows


def toy_claims(found: dict[str, list[float]]) -> list[Claim]:
    """Verdicts from accuracies by 'method keep', one a seed."""
    return [
        claim("Toy: score-only pruning collapses at 30 % kept or less (over 10 points below random)", SOURCE,
              gaps(found, "random", "EL2N-hard", TOY_KEEP[1:]), margin=COLLAPSE),
        claim("Toy: calibrated pruning is no worse than random (margin 1 point)", SOURCE,
              gaps(found, "calibrated", "random", TOY_KEEP), margin=-MARGIN),
        claim("Toy: without weights it is worse at 10 % kept or less", SOURCE,
              gaps(found, "calibrated", "unweighted", TOY_KEEP[2:])),
    ]  # fmt: skip


# --- images ----------------------------------------------------------------------------------------------------------


def plan(lab: Lab, train, test) -> list[Run]:
    """All runs, by seed; scores and draws are made anew for each."""
    settings, n = lab.settings, len(train)
    runs = []
    for seed in range(lab.seeds):
        scores, _ = lab.el2n(train, test, epochs=settings["probe_epochs"], models=settings["probes"], seed=seed)
        order = selection.ranking(scores, ids=train.paths)
        runs.append(Run("everything", seed))
        for keep in settings["keep"]:
            count = kept_count(keep, n)
            runs.append(Run(f"random {keep:g}", seed, drawn(n, keep, seed)))
            runs.append(Run(f"score only {keep:g}", seed, np.sort(order[:count])))
            for alpha in (0.0, *settings["calibrate"]):
                rows, weights = calibrated(order, n, count, alpha, train.paths, seed)
                runs.append(Run(f"calibrated {alpha:g} {keep:g}", seed, rows, weights))
                if alpha == judged(settings["calibrate"]):
                    runs.append(Run(f"unweighted {alpha:g} {keep:g}", seed, rows))
    return runs


def calibrated(order: np.ndarray, n: int, count: int, alpha: float, ids, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(count,) rows and (n,) loss weights, scaled to a mean of 1 over the rows as `evaluate` does."""
    mask, weights = selection.calibrated(order, n, count, alpha, ids=ids, seed=seed)
    rows = np.flatnonzero(mask)
    scaled = np.zeros(n, np.float32)
    scaled[rows] = weights[rows] / weights[rows].mean()
    return rows, scaled


def judged(alphas: list[float]) -> float:
    """The alpha that claims are about, and that is also run without weights: the published 0.5 where it is there."""
    return 0.5 if 0.5 in alphas else alphas[len(alphas) // 2]


def claims(found: dict[str, list[float]], keeps: list[float], alphas: list[float]) -> list[Claim]:
    """Verdicts from accuracies by 'method keep', one a seed."""
    keeps = sorted((keep for keep in keeps if keep <= 0.3), reverse=True)
    alpha = judged(alphas)
    zero = gaps(found, "calibrated 0", "random", keeps)
    return [
        claim("Random beats score-based pruning at 30 % kept or less", SOURCE,
              gaps(found, "random", "score only", keeps)),
        claim("Score-only pruning collapses at 30 % kept or less (over 10 points below random)", SOURCE,
              gaps(found, "random", "score only", keeps), margin=COLLAPSE),
        claim(f"Calibrated pruning (alpha {alpha:g}) returns to random or better (margin 1 point)", SOURCE,
              gaps(found, f"calibrated {alpha:g}", "random", keeps), margin=-MARGIN),
        claim(f"Its weights are needed: without them it is worse (alpha {alpha:g})", SOURCE,
              gaps(found, f"calibrated {alpha:g}", f"unweighted {alpha:g}", keeps)),
        Claim("alpha = 0 is random (margin 1 point)", SOURCE, listed(zero), same(zero.values(), MARGIN)),
    ]  # fmt: skip


def draw(lab: Lab, found: dict[str, list[float]]) -> None:
    with lab.panels(6.5, 4.5) as (axes,):
        keeps = sorted(lab.settings["keep"])
        alphas = lab.settings["calibrate"]
        colours = {"random": "black", **{f"calibrated {alpha:g}": f"C{number}" for number, alpha in enumerate(alphas)}}
        colours |= {f"unweighted {judged(alphas):g}": "grey", "score only": "red"}
        for name, colour in colours.items():
            style = "--v" if name.startswith("unweighted") else "-o"
            rows = [found[f"{name} {keep:g}"] for keep in keeps]
            label = name.replace("d 0.", "d, alpha 0.")
            bars(axes, [100 * keep for keep in keeps], rows, style, color=colour, label=label)
        axes.axhline(100 * np.mean(found["everything"]), color="grey", ls=":", lw=1, label="everything")
        fractions_axis(axes, keeps, ylabel=f"test accuracy, % (95 % interval, {lab.seeds} seeds)")
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0.02, 0.48))
