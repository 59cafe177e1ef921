"""The perceptron figures of Sorscher et al. 2022 (their figures 1 and 2): theory lines with simulated points and error
bars.

Writes four figures, and every number behind them as CSV. A claim is `undecided` when the simulation is too noisy for
it, or when it depends on an assumption that fails.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from claims import FAILS, HOLDS, OPEN, Claim
from lab import Lab

from protoprune.theory.information import energetic_gain, information_gain
from protoprune.theory.simulation import simulate, worker_pool
from protoprune.theory.solver import best_keep, crossover, pareto, solve

SOURCE = "Sorscher et al. 2022, figures 1 and 2"

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


def run(lab: Lab) -> list[Claim]:
    settings = lab.settings
    points, rows = simulated_points(settings["dots"]), []
    with worker_pool() as pool:
        for point in points:
            row = measure(point, settings, pool)
            rows.append(row)
            lab.say(
                f"point {len(rows)}/{len(points)}: alpha_tot {row['alpha_tot']:g}, keep {row['keep']:g}, theta "
                f"{row['theta']:g}, {row['order']} ({row['margin']}): theory {row['theory']:.4f}, simulation "
                f"{row['simulated']:.4f} +- {row['standard_error']:.4f}"
            )
    lab.save_table(rows, "points")
    measured = {tuple(row[name] for name in ("alpha_tot", "keep", "theta", "order", "margin")): row for row in rows}
    draw_orders(lab, measured)
    envelopes = {theta: pareto(np.geomspace(0.5, 64, settings["envelope"]), theta) for theta in THETAS}
    lab.save_table([envelope_row(s) for line in envelopes.values() for s in line], "pareto")
    draw_envelopes(lab, envelopes, measured)
    keeps = np.geomspace(0.05, 0.9, settings["crossings"])
    draw_crossover(lab, {rival: [(f, crossover(f, 0.0, rival)) for f in keeps] for rival in ("easy", "random")})
    gains = information_lines(settings["gains"])
    lab.save_table(gains, "information")
    draw_information(lab, gains)
    return [*judge(theory_numbers()), agreement(rows)]


# --- numbers ---------------------------------------------------------------------------------------------------------


def simulated_points(dots: int) -> list[tuple]:
    """Reference rows, a few points on every line of the first figure, and the best fractions of the second."""
    points, places = list(REFERENCE), np.geomspace(0.5, 16, dots)  # alpha_prune
    points += [(float(a), 1.0, 0.0, "random", "absolute") for a in places]
    points += [
        (float(a / f), f, 0.0, order, "absolute") for order in ("hard", "easy") for f in KEEPS[1:] for a in places
    ]
    points += [best_point(float(a), theta) for theta in THETAS[1:] for a in places]
    return points


def best_point(alpha_prune: float, theta: float) -> tuple:
    best = best_keep(alpha_prune=alpha_prune, theta=theta)
    keep = round(best.keep, 3)
    return alpha_prune / keep, keep, theta, "hard", "absolute"


def measure(point: tuple, settings: dict, pool) -> dict:
    """Theory and simulation of one point. The students see whole numbers of examples, so the theory gets the same."""
    alpha_tot, keep, theta, order, margin = point
    dimension, seeds = settings["dimension"], settings["seeds"]
    total = round(alpha_tot * dimension)
    exact_tot, exact_keep = total / dimension, round(keep * total) / total
    result = simulate(exact_tot, exact_keep, theta, order, margin, dimension, seeds, settings["seed"], pool)
    row = dict(zip(("alpha_tot", "keep", "theta", "order", "margin"), point, strict=True))
    row |= {"alpha_prune": alpha_tot * keep, "theory": solve(exact_tot, exact_keep, theta, order, margin).error}
    return row | {"simulated": result.mean, "standard_error": result.standard_error, "seeds": seeds}


def envelope_row(s) -> dict:
    return {"theta": s.theta, "alpha_prune": s.alpha_prune, "keep": s.keep, "error": s.error}


def information_lines(points: int) -> list[dict]:
    rows = []
    for keep in (1.0, 0.5, 0.2, 0.05):
        for alpha in np.geomspace(0.05, 50, points):
            found = information_gain(float(alpha), keep)
            row = {"keep": keep, "alpha_prune": float(alpha), "overlap": found.overlap, "gain": found.gain}
            rows.append(row | {"energetic": energetic_gain(found.overlap, keep)})
    return rows


# --- figures ---------------------------------------------------------------------------------------------------------


def dots(axes, measured: dict, colour, **wanted) -> None:
    """Simulated points with one standard error, where all of `wanted` agree."""
    rows = [row for row in measured.values() if all(row[name] == value for name, value in wanted.items())]
    x, y, e = ([row[name] for row in rows] for name in ("alpha_prune", "simulated", "standard_error"))
    axes.errorbar(x, y, e, fmt="o", ms=3.5, capsize=2, color=colour)


def draw_orders(lab: Lab, measured: dict) -> None:
    """Error against the pruned size for several fractions, hard kept and easy kept, perfect probe."""
    with lab.panels(9, 4, 2, name="theory_orders", sharey=True) as panels:
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


def draw_envelopes(lab: Lab, envelopes: dict, measured: dict) -> None:
    """Best error over fractions against the pruned size, for several probe angles; and the best fraction."""
    with lab.panels(9, 4, 2, name="theory_pareto") as (left, right):
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


def draw_crossover(lab: Lab, crossings: dict) -> None:
    """Where hard starts to win, in examples before pruning."""
    with lab.panels(5, 4, name="theory_crossover") as (axes,):
        for rival, line in crossings.items():
            found = [(keep, alpha) for keep, alpha in line if alpha is not None]
            axes.plot(*zip(*found, strict=True), label=f"hard beats {rival} above")
        axes.set(xscale="log", yscale="log", xlabel="fraction kept", ylabel="examples a dimension before pruning")
        axes.set_title("where hard starts to win, perfect probe")
        axes.legend(fontsize="small")


def draw_information(lab: Lab, gains: list[dict]) -> None:
    with lab.panels(9, 4, 2, name="theory_information", sharey=True) as panels:
        titles = {"gain": "both overlaps solved for", "energetic": "the paper's form, q = R"}
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for keep in dict.fromkeys(row["keep"] for row in gains):
                line = [row for row in gains if row["keep"] == keep]
                axes.plot([r["alpha_prune"] for r in line], [r[column] for r in line], label=f"{keep:.0%} kept")
            axes.axhline(1, color="grey", lw=0.8, ls=":")
            axes.set(xscale="log", yscale="log", xlabel="kept examples a dimension", title=title)
        panels[0].set_ylabel("nats an example")
        panels[0].legend(fontsize="small")


# --- claims ----------------------------------------------------------------------------------------------------------


def slope(low: float, high: float, keep: float = 1.0, theta: float = 0.0) -> float:
    """Exponent of the error in alpha_prune between two sizes at a fixed fraction kept."""
    errors = [solve(a / keep, keep, theta).error for a in (low, high)]
    return float(np.log(errors[1] / errors[0]) / np.log(high / low))


def envelope_slope(low: float, high: float, theta: float) -> float:
    errors = [s.error for s in pareto(np.array([low, high]), theta, min_keep=0.001)]
    return float(np.log(errors[1] / errors[0]) / np.log(high / low))


def theory_numbers() -> SimpleNamespace:
    """Every number of the theory that a claim rests on."""
    draws = [information_gain(alpha).gain for alpha in (10.0, 50.0)]
    envelope = {alpha: envelope_slope(alpha, 2 * alpha, 20.0) for alpha in (2, 32)}
    return SimpleNamespace(
        limit=200 * solve(200).error,
        scarce={order: solve(2, 0.5, 0, order).error for order in ("hard", "easy")},
        rich={order: solve(20, 0.5, 0, order).error for order in ("hard", "easy")},
        switch=crossover(0.5),
        steep=envelope_slope(1.5, 3, 0.0),
        plain=slope(1.5, 3),
        fixed=slope(50, 200, keep=0.2),
        falling=[best_keep(alpha_prune=a, theta=20.0).keep for a in (2, 8, 32)],
        best=[best_keep(alpha_prune=8, theta=t).keep for t in THETAS[1:]],
        over=solve(8 / 0.05, 0.05, 20.0).error,
        right=best_keep(alpha_prune=8, theta=20.0).error,
        early=envelope[2],
        late=envelope[32],
        plain_early=slope(2, 4),
        plain_late=slope(32, 64),
        information=float(np.log(draws[1] / draws[0]) / np.log(5)),
        nat=energetic_gain(1 - 1e-4, 1e-5),
        full=information_gain(20.0, 0.05).gain,
    )


def judge(n: SimpleNamespace) -> list[Claim]:
    """The paper's claims on the theory: what was found (`theory_numbers`), and whether that supports them."""
    return [
        claim(
            "random data: test error is a power law, 1/alpha",
            abs(n.limit - 0.5005) < 1e-3,
            f"error * alpha = {n.limit:.4f} at alpha 200",
        ),
        claim(
            "scarce data: keep easy; plentiful data: keep hard",
            n.scarce["easy"] < n.scarce["hard"] and n.rich["hard"] < n.rich["easy"],
            f"half kept: alpha_tot 2 easy {n.scarce['easy']:.3f}, hard {n.scarce['hard']:.3f}; alpha_tot 20 easy "
            f"{n.rich['easy']:.4f}, hard {n.rich['hard']:.4f}; they cross at {n.switch:.2f}",
        ),
        claim(
            "perfect probe: the Pareto envelope beats a power law",
            n.steep < 2 * n.plain,
            f"exponent from alpha_prune 1.5 to 3: envelope {n.steep:.2f}, random {n.plain:.2f}; "
            "fractions down to 0.1 %",
        ),
        claim(
            "at a fixed fraction kept the power law comes back",
            abs(n.fixed + 1) < 0.05,
            f"20 % kept: exponent {n.fixed:.3f} from alpha_prune 50 to 200",
        ),
        claim(
            "the best fraction kept falls as the data grows",
            n.falling[0] > n.falling[1] > n.falling[2],
            "20 degrees, alpha_prune 2, 8, 32: " + ", ".join(f"{f:.0%}" for f in n.falling),
        ),
        claim(
            "a worse probe asks for keeping more, and pruning past that hurts",
            n.best[0] < n.best[1] < n.best[2] and n.over > n.right,
            f"alpha_prune 8: best at 10, 20, 40 degrees {n.best[0]:.0%}, {n.best[1]:.0%}, {n.best[2]:.0%}; "
            f"at 20 degrees 5 % kept gives {n.over:.3f}, the best fraction {n.right:.3f}",
        ),
        claim(
            "an imperfect probe beats the power law only up to some size",
            n.early < 1.5 * n.plain_early and n.late > 1.15 * n.plain_late,
            f"20 degrees, exponent from alpha_prune 2 to 4: envelope {n.early:.2f}, random {n.plain_early:.2f}; "
            f"from 32 to 64: {n.late:.2f}, {n.plain_late:.2f}",
        ),
        claim(
            "random data: information an example decays as a power law",
            -1.1 < n.information < -0.9,
            f"exponent {n.information:.3f} at alpha_prune 10 to 50",
        ),
        claim(
            "pruned data: information an example tends to a constant, 1 nat",
            None,
            f"in the paper's form (q = R) it does, {n.nat:.4f} at R = 1 - 1e-4 and 0.001 % kept; but pruning breaks "
            f"q = R, and with both overlaps solved for it decays: {n.full:.3f} at alpha_prune 20, 5 % kept",
        ),
    ]


def claim(text: str, holds: bool | None, found: str) -> Claim:
    verdict = OPEN if holds is None else HOLDS if holds else FAILS
    return Claim(text, SOURCE, found, verdict)


def agreement(rows: list[dict]) -> Claim:
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
