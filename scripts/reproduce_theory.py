"""The perceptron figures of Sorscher et al. 2022 (their figures 1 and 2): theory lines with simulated points and error
bars.

    python scripts/reproduce_theory.py [--seeds 24] [--dimension 200] [--figures docs/figures] [--results
    results/theory]

Writes four figures, and every number behind them as CSV, and ends with the paper's claims beside what was found here.
A claim is `undecided` when the simulation is too noisy for it, or when it depends on an assumption that fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from protoprune.theory.information import energetic_gain, information_gain
from protoprune.theory.simulation import simulate, worker_pool
from protoprune.theory.solver import best_keep, crossover, pareto, solve

# (alpha_tot, keep, theta, order, margin): the points to which theory and simulation are both held.
REFERENCE = [
    (2, 1, 0, "random", "absolute"),
    (5, 1, 0, "random", "absolute"),
    (2, 0.5, 0, "hard", "absolute"),
    (5, 0.5, 0, "hard", "absolute"),
    (10, 0.2, 0, "hard", "absolute"),
    (2, 0.5, 0, "easy", "absolute"),
    (10, 0.2, 0, "easy", "absolute"),
    (5, 0.5, 20, "hard", "absolute"),
    (10, 0.2, 20, "hard", "absolute"),
    (10, 0.2, 20, "hard", "signed"),
    (20, 0.2, 10, "hard", "absolute"),
    (20, 0.2, 40, "hard", "absolute"),
    (20, 0.2, 40, "hard", "signed"),
]
KEEPS = (1.0, 0.5, 0.2, 0.1)
THETAS = (0.0, 10.0, 20.0, 40.0)
LINE = np.geomspace(0.4, 20, 40)  # alpha_prune of the lines
DOTS = np.geomspace(0.5, 16, 6)  # alpha_prune of the simulated points


def main() -> None:
    started = time.perf_counter()
    options = parse_options()
    for folder in (options.figures, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    points = simulated_points()
    with worker_pool() as pool:
        rows = [measure(point, options, pool) for point in points]
    save_csv(options.results / "points.csv", rows)
    measured = {tuple(row[name] for name in ("alpha_tot", "keep", "theta", "order", "margin")): row for row in rows}
    draw_orders(options.figures / "theory_orders.png", measured)
    envelopes = {theta: pareto(np.geomspace(0.5, 64, 22), theta) for theta in THETAS}
    save_csv(options.results / "pareto.csv", [envelope_row(s) for line in envelopes.values() for s in line])
    draw_envelopes(options.figures / "theory_pareto.png", envelopes, measured)
    keeps = np.geomspace(0.05, 0.9, 12)
    crossings = {rival: [(f, crossover(f, 0.0, rival)) for f in keeps] for rival in ("easy", "random")}
    draw_crossover(options.figures / "theory_crossover.png", crossings)
    gains = information_lines()
    save_csv(options.results / "information.csv", gains)
    draw_information(options.figures / "theory_information.png", gains)
    claims = judge(rows, gains)
    (options.results / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
    report(rows, claims, options, time.perf_counter() - started)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=24, help="students for each simulated point")
    parser.add_argument("--dimension", type=int, default=200, help="N of the simulation")
    parser.add_argument("--seed", type=int, default=0, help="seed from which all streams are spawned")
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--results", type=Path, default=Path("results/theory"))
    return parser.parse_args()


# --- numbers ---------------------------------------------------------------------------------------------------------


def simulated_points() -> list[tuple]:
    """Reference rows, a few points on every line of the first figure, and the best fractions of the second."""
    points = list(REFERENCE)
    points += [(float(a), 1.0, 0.0, "random", "absolute") for a in DOTS]
    points += [(float(a / f), f, 0.0, order, "absolute") for order in ("hard", "easy") for f in KEEPS[1:] for a in DOTS]
    points += [best_point(float(a), theta) for theta in THETAS[1:] for a in DOTS]
    return points


def best_point(alpha_prune: float, theta: float) -> tuple:
    best = best_keep(alpha_prune=alpha_prune, theta=theta)
    keep = round(best.keep, 3)
    return alpha_prune / keep, keep, theta, "hard", "absolute"


def measure(point: tuple, options: argparse.Namespace, pool) -> dict:
    """Theory and simulation of one point. The students see whole numbers of examples, so the theory gets the same."""
    alpha_tot, keep, theta, order, margin = point
    total = round(alpha_tot * options.dimension)
    exact_tot, exact_keep = total / options.dimension, round(keep * total) / total
    result = simulate(exact_tot, exact_keep, theta, order, margin, options.dimension, options.seeds, options.seed, pool)
    row = dict(zip(("alpha_tot", "keep", "theta", "order", "margin"), point, strict=True))
    row |= {"alpha_prune": alpha_tot * keep, "theory": solve(exact_tot, exact_keep, theta, order, margin).error}
    return row | {"simulated": result.mean, "standard_error": result.standard_error, "seeds": options.seeds}


def envelope_row(s) -> dict:
    return {"theta": s.theta, "alpha_prune": s.alpha_prune, "keep": s.keep, "error": s.error}


def information_lines() -> list[dict]:
    rows = []
    for keep in (1.0, 0.5, 0.2, 0.05):
        for alpha in np.geomspace(0.05, 50, 25):
            found = information_gain(float(alpha), keep)
            row = {"keep": keep, "alpha_prune": float(alpha), "overlap": found.overlap, "gain": found.gain}
            rows.append(row | {"energetic": energetic_gain(found.overlap, keep)})
    return rows


def save_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- figures ---------------------------------------------------------------------------------------------------------


def finish(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)


def dots(axes, measured: dict, colour, **wanted) -> None:
    """Simulated points with one standard error, where all of `wanted` agree."""
    rows = [row for row in measured.values() if all(row[name] == value for name, value in wanted.items())]
    x, y, e = ([row[name] for row in rows] for name in ("alpha_prune", "simulated", "standard_error"))
    axes.errorbar(x, y, e, fmt="o", ms=3.5, capsize=2, color=colour)


def draw_orders(path: Path, measured: dict) -> None:
    """Error against the pruned size for several fractions, hard kept and easy kept, perfect probe."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, order in zip(panels, ("hard", "easy"), strict=True):
        for number, keep in enumerate(KEEPS):
            shown = "random" if keep == 1 else order
            errors = [solve(a / keep, keep, 0.0, shown).error for a in LINE]
            label = "all, or random" if keep == 1 else f"{keep:.0%} kept"
            axes.plot(LINE, errors, color=f"C{number}", label=label)
            dots(axes, measured, f"C{number}", keep=keep, order=shown, theta=0, margin="absolute")
        title = f"{order} examples kept, perfect probe"
        axes.set(xscale="log", yscale="log", xlabel="kept examples a dimension", title=title, ylim=(0.003, 0.5))
    panels[0].set_ylabel("test error")
    panels[0].legend(fontsize="small")
    finish(figure, path)


def draw_envelopes(path: Path, envelopes: dict, measured: dict) -> None:
    """Best error over fractions against the pruned size, for several probe angles; and the best fraction."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot(LINE * 3, [solve(a).error for a in LINE * 3], "k--", lw=1, label="all, or random: a power law")
    for number, (theta, line) in enumerate(envelopes.items()):
        sizes = [s.alpha_prune for s in line]
        left.plot(sizes, [s.error for s in line], color=f"C{number}", label=f"best fraction, theta {theta:g}°")
        right.plot(sizes, [s.keep for s in line], color=f"C{number}", label=f"theta {theta:g}°")
        if theta:
            dots(left, {k: r for k, r in measured.items() if k not in REFERENCE}, f"C{number}", theta=theta)
    left.set(xscale="log", yscale="log", xlabel="kept examples a dimension", ylabel="test error", ylim=(3e-6, 0.5))
    left.set_title("Pareto envelope, hard kept")
    right.set(xscale="log", yscale="log", xlabel="kept examples a dimension", ylabel="best fraction kept")
    right.set_title("1 % was the smallest fraction tried")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    finish(figure, path)


def draw_crossover(path: Path, crossings: dict) -> None:
    """Where hard starts to win, in examples before pruning."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for rival, line in crossings.items():
        found = [(keep, alpha) for keep, alpha in line if alpha is not None]
        axes.plot(*zip(*found, strict=True), label=f"hard beats {rival} above")
    axes.set(xscale="log", yscale="log", xlabel="fraction kept", ylabel="examples a dimension before pruning")
    axes.set_title("where hard starts to win, perfect probe")
    axes.legend(fontsize="small")
    finish(figure, path)


def draw_information(path: Path, gains: list[dict]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    titles = {"gain": "both overlaps solved for", "energetic": "the paper's form, q = R"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for keep in dict.fromkeys(row["keep"] for row in gains):
            line = [row for row in gains if row["keep"] == keep]
            axes.plot([r["alpha_prune"] for r in line], [r[column] for r in line], label=f"{keep:.0%} kept")
        axes.axhline(1, color="grey", lw=0.8, ls=":")
        axes.set(xscale="log", yscale="log", xlabel="kept examples a dimension", title=title)
    panels[0].set_ylabel("nats an example")
    panels[0].legend(fontsize="small")
    finish(figure, path)


# --- claims ----------------------------------------------------------------------------------------------------------


def slope(low: float, high: float, keep: float = 1.0, theta: float = 0.0) -> float:
    """Exponent of the error in alpha_prune between two sizes at a fixed fraction kept."""
    errors = [solve(a / keep, keep, theta).error for a in (low, high)]
    return float(np.log(errors[1] / errors[0]) / np.log(high / low))


def envelope_slope(low: float, high: float, theta: float) -> float:
    errors = [s.error for s in pareto(np.array([low, high]), theta, min_keep=0.001)]
    return float(np.log(errors[1] / errors[0]) / np.log(high / low))


def judge(rows: list[dict], gains: list[dict]) -> list[dict]:
    """The paper's claims: what was found, and whether that supports them."""
    limit = 200 * solve(200).error
    scarce = {order: solve(2, 0.5, 0, order).error for order in ("hard", "easy")}
    rich = {order: solve(20, 0.5, 0, order).error for order in ("hard", "easy")}
    switch = crossover(0.5)
    steep, plain = envelope_slope(1.5, 3, 0.0), slope(1.5, 3)
    fixed = slope(50, 200, keep=0.2)
    best = [best_keep(alpha_prune=8, theta=t).keep for t in THETAS[1:]]
    over, right = solve(8 / 0.05, 0.05, 20.0).error, best_keep(alpha_prune=8, theta=20.0).error
    early, late = (envelope_slope(a, 2 * a, 20.0) for a in (2, 32))
    plain_early, plain_late = (slope(a, 2 * a) for a in (2, 32))
    falling = [best_keep(alpha_prune=a, theta=20.0).keep for a in (2, 8, 32)]
    random_gain = [r for r in gains if r["keep"] == 1]
    exponent = float(np.log(random_gain[-1]["gain"] / random_gain[-7]["gain"]))
    exponent /= float(np.log(random_gain[-1]["alpha_prune"] / random_gain[-7]["alpha_prune"]))
    nat = energetic_gain(1 - 1e-4, 1e-5)
    full = information_gain(20.0, 0.05).gain
    return [
        claim(
            "random data: test error is a power law, 1/alpha",
            abs(limit - 0.5005) < 1e-3,
            f"error * alpha = {limit:.4f} at alpha 200",
        ),
        claim(
            "scarce data: keep easy; plentiful data: keep hard",
            scarce["easy"] < scarce["hard"] and rich["hard"] < rich["easy"],
            f"half kept: alpha_tot 2 easy {scarce['easy']:.3f}, hard {scarce['hard']:.3f}; alpha_tot 20 easy "
            f"{rich['easy']:.4f}, hard {rich['hard']:.4f}; they cross at {switch:.2f}",
        ),
        claim(
            "perfect probe: the Pareto envelope beats a power law",
            steep < 2 * plain,
            f"exponent from alpha_prune 1.5 to 3: envelope {steep:.2f}, random {plain:.2f}; fractions down to 0.1 %",
        ),
        claim(
            "at a fixed fraction kept the power law comes back",
            abs(fixed + 1) < 0.05,
            f"20 % kept: exponent {fixed:.3f} from alpha_prune 50 to 200",
        ),
        claim(
            "the best fraction kept falls as the data grows",
            falling[0] > falling[1] > falling[2],
            "20 degrees, alpha_prune 2, 8, 32: " + ", ".join(f"{f:.0%}" for f in falling),
        ),
        claim(
            "a worse probe asks for keeping more, and pruning past that hurts",
            best[0] < best[1] < best[2] and over > right,
            f"alpha_prune 8: best at 10, 20, 40 degrees {best[0]:.0%}, {best[1]:.0%}, {best[2]:.0%}; "
            f"at 20 degrees 5 % kept gives {over:.3f}, the best fraction {right:.3f}",
        ),
        claim(
            "an imperfect probe beats the power law only up to some size",
            early < 1.5 * plain_early and late > 1.15 * plain_late,
            f"20 degrees, exponent from alpha_prune 2 to 4: envelope {early:.2f}, random {plain_early:.2f}; "
            f"from 32 to 64: {late:.2f}, {plain_late:.2f}",
        ),
        claim(
            "random data: information an example decays as a power law",
            -1.1 < exponent < -0.9,
            f"exponent {exponent:.3f} at alpha_prune 9 to 50",
        ),
        claim(
            "pruned data: information an example tends to a constant, 1 nat",
            None,
            f"in the paper's form (q = R) it does, {nat:.4f} at R = 1 - 1e-4 and 0.001 % kept; but pruning breaks "
            f"q = R, and with both overlaps solved for it decays: {full:.3f} at alpha_prune 20, 5 % kept",
        ),
        agreement(rows),
    ]


def claim(text: str, holds: bool | None, found: str) -> dict:
    verdict = "undecided" if holds is None else "holds" if holds else "does not hold"
    return {"claim": text, "verdict": verdict, "found": found}


def agreement(rows: list[dict]) -> dict:
    """Theory against simulation for good probes: within 3 %, as far as the standard errors can tell."""
    near = [row for row in rows if row["theta"] <= 20]
    relative = np.array([row["simulated"] / row["theory"] - 1 for row in near])
    noise = np.array([row["standard_error"] / row["theory"] for row in near])
    outside = int(np.sum(np.abs(relative) > 0.03 + 3 * noise))
    mean = float(np.average(relative, weights=noise**-2))
    spread = float(np.sum(noise**-2) ** -0.5)
    found = (
        f"{len(near)} points: weighted mean deviation {mean:+.2%} +- {spread:.2%}, "
        f"{outside} beyond 3 % and three standard errors"
    )
    holds = None if outside == 0 and abs(mean) + 2 * spread > 0.03 else outside == 0
    return claim("theory agrees with simulation within 3 % up to 20 degrees", holds, found)


def report(rows: list[dict], claims: list[dict], options: argparse.Namespace, seconds: float) -> None:
    print(f"simulation: N = {options.dimension}, {options.seeds} seeds, mean and standard error")
    print(f"{'alpha_tot':>9} {'keep':>5} {'theta':>5}  {'order':6} {'margin':8}  theory  simulation")
    for row in rows[: len(REFERENCE)]:
        point = f"{row['alpha_tot']:9g} {row['keep']:5g} {row['theta']:5g}  {row['order']:6} {row['margin']:8}"
        print(f"{point}  {row['theory']:.4f}  {row['simulated']:.4f} +- {row['standard_error']:.4f}")
    for entry in claims:
        print(f"\n{entry['verdict'].upper()}: {entry['claim']}\n    {entry['found']}")
    print(
        f"{len(rows)} simulated points in {seconds:.0f} s; figures in {options.figures}, numbers in {options.results}"
    )


if __name__ == "__main__":
    main()
