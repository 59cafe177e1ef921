"""Hard or easy examples, against the number of images at hand, and the error against the number kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from claims import FAILS, HOLDS, OPEN, Claim, bars, claim, decide, gap, span
from lab import Lab

from protoprune.errors import UsageError
from protoprune.evaluation import report, scaling
from protoprune.evaluation.curves import ALL

SOURCE = "Sorscher et al. 2022, figure 3"
Errors = Mapping[tuple[str, float], np.ndarray]  # (order, keep) -> (seeds, sizes) test errors


def run(lab: Lab) -> list[Claim]:
    settings = lab.settings
    train, test = lab.sets()
    result = scaling(
        train, test, lab.recipe(), sizes=settings["sizes"], keeps=settings["keeps"], orders=("hard", "easy", "random"),
        seeds=lab.seeds, bootstrap=settings["bootstrap"], folder=lab.runs, device=lab.device, on_run=lab.progress,
        **ranked_by(lab, train, test),
    )  # fmt: skip
    lab.save_table([report._point_row(one) for one in result.points], "points")
    lab.save_table(report.fit_rows(result), "fits")
    errors, sizes = errors_of(result)
    draw(lab, errors, sizes)
    laws = {one.name: one.fits for one in result.curves if one.name in (ALL, "Pareto envelope, hard")}
    return [*judge(errors, sizes), judge_law(laws.get("Pareto envelope, hard"))]


def ranked_by(lab: Lab, train, test) -> dict:
    """The ranking of the settings, as options of `scaling`."""
    metric = lab.settings["metric"]
    if metric == "prototypes":
        return {"features": lab.vectors(train)}
    if metric != "el2n":
        raise UsageError(f"metric = {metric!r}: expected el2n or prototypes")
    scores, accuracy = lab.el2n(train, test, epochs=lab.settings["probe_epochs"], models=lab.settings["probe_models"])
    lab.say(f"the probe is right on {accuracy:.1%} of the test images")
    return {"scores": scores}


def errors_of(result) -> tuple[Errors, list[int]]:
    """({(order, keep): (seeds, sizes) errors}, sizes) of a sweep; the order of keep = 1 is 'all'."""
    sizes = sorted({one.size for one in result.points})
    keys = dict.fromkeys((one.order, one.keep) for one in result.points)
    found = {(one.order, one.keep, one.size): one.errors for one in result.points}
    return {key: np.array([found[(*key, size)] for size in sizes]).T for key in keys}, sizes


# --- claims ----------------------------------------------------------------------------------------------------------


def judge(errors: Errors, sizes: Sequence[int]) -> list[Claim]:
    """The claims that rest on differences at one size, and on the best fraction; see `judge_law` for the law."""
    return [
        switch(errors, sizes, "hard", 0, "worse", "Scarce data: keeping the hard examples loses to random"),
        switch(errors, sizes, "easy", 0, "better", "Scarce data: keeping the easy examples beats random"),
        switch(errors, sizes, "hard", -1, "better", "Plentiful data: keeping the hard ones beats random"),
        falling_best(errors, sizes),
        steeper(errors, sizes),
    ]


def switch(errors: Errors, sizes, order: str, place: int, want: str, text: str) -> Claim:
    """`order` against random at the smallest (place 0) or largest (-1) size, at some fraction at least.

    Each seed has an initial set of its own, and so a list of its own.
    """
    keeps = sorted({keep for which, keep in errors if which == order}, reverse=True)
    gaps = {
        f"{keep:.0%} kept": gap(-errors[order, keep][:, place], -errors["random", keep][:, place]) for keep in keeps
    }
    about = f"{sizes[place]:,} images at first, {order} less random: "
    return claim(text, SOURCE, gaps, about, want=want, some=True)


def at_kept(errors: np.ndarray, sizes: Sequence[float], keep: float, kept: Sequence[float]) -> np.ndarray:
    """(seeds, m) errors with the fraction `keep` where (m,) images remain, on straight lines in log and log."""
    x = np.log(keep * np.asarray(sizes, float))
    return np.exp([np.interp(np.log(kept), x, np.log(row)) for row in errors])


def common_grid(keeps: Sequence[float], sizes: Sequence[int], points: int = 9) -> np.ndarray:
    """(points,) kept sizes that every fraction reaches, evenly in the logarithm."""
    return np.geomspace(max(keeps) * sizes[0], min(keeps) * sizes[-1], points)


def hard_surface(errors: Errors, sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(fractions (f,), kept sizes (m,), errors (f, seeds, m)) of hard pruning and of no pruning."""
    keyed = {keep: table for (order, keep), table in errors.items() if order in ("hard", ALL)}
    keeps = np.array(sorted(keyed))
    grid = common_grid(keeps, sizes)
    return keeps, grid, np.array([at_kept(keyed[keep], sizes, keep, grid) for keep in keeps])


def falling_best(errors: Errors, sizes) -> Claim:
    """The slope of the log of the best fraction against the log of the kept size, seed by seed."""
    keeps, grid, surface = hard_surface(errors, sizes)
    best = np.log(keeps)[surface.argmin(axis=0)]  # (seeds, m)
    x = np.log(grid / grid.mean())
    slope = gap(np.polyfit(x, best.T, 1)[0])
    ends = [float(np.exp(best[:, at].mean())) for at in (0, -1)]
    found = (
        f"best of {', '.join(f'{keep:g}' for keep in keeps)} with {grid[0]:,.0f} kept {ends[0]:.2f}, with "
        f"{grid[-1]:,.0f} kept {ends[1]:.2f} (geometric means); exponent {span(slope, 1)}, {slope.n} seeds"
    )
    return Claim("The best fraction to keep falls as data grow", SOURCE, found, decide([slope], want="worse"))


def steeper(errors: Errors, sizes) -> Claim:
    """Error at the best fraction against that without pruning: does the gap widen in the upper half of the sizes?

    A seed's best fractions are those of the other seeds, or the minimum over noise would be taken for a gain.
    """
    _, grid, surface = hard_surface(errors, sizes)
    fractions, seeds, m = surface.shape
    gain = np.empty((seeds, m))
    for seed in range(seeds):
        others = np.delete(surface, seed, axis=1).mean(axis=1)  # (f, m)
        gain[seed] = np.log(surface[others.argmin(axis=0), seed, np.arange(m)] / surface[fractions - 1, seed])
    upper = slice(m // 2, None)
    x = np.log(grid[upper])
    slope = gap(np.polyfit(x - x.mean(), gain[:, upper].T, 1)[0])
    plain = np.polyfit(x - x.mean(), np.log(surface[-1].mean(axis=0))[upper], 1)[0]
    found = (
        f"from {grid[m // 2]:,.0f} to {grid[-1]:,.0f} kept the exponent without pruning is {plain:.3f}, that of the "
        f"best fraction differs from it by {span(slope, 1)}, {slope.n} seeds"
    )
    return Claim(
        "At the best fraction the error falls faster than without pruning", SOURCE, found, decide([slope], want="worse")
    )


def judge_law(fits) -> Claim:
    """Whether the Pareto envelope is better described by an exponential than by power laws."""
    from protoprune.evaluation.fits import verdict

    text = "The Pareto envelope of hard pruning is exponential, not a power law"
    if fits is None or not fits.decided:
        found = "too few points to fit" if fits is None else verdict(fits)
        return Claim(text, SOURCE, found, OPEN)
    return Claim(text, SOURCE, verdict(fits), HOLDS if fits.best == "exponential" else FAILS)


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(lab: Lab, errors: Errors, sizes: Sequence[int]) -> None:
    """Left and middle: accuracy less that of random, hard and easy, by initial size. Right: error by kept size."""
    with lab.panels(12, 4, 3) as panels:
        keeps = sorted({keep for _, keep in errors if keep < 1}, reverse=True)
        for axes, order in zip(panels, ("hard", "easy"), strict=False):
            for number, keep in enumerate(keeps):
                gaps = errors["random", keep] - errors[order, keep]
                bars(axes, sizes, gaps.T, color=f"C{number}", label=f"{keep:.0%} kept")
            axes.axhline(0, color="grey", lw=0.8)
            axes.set(
                xscale="log", yscale="symlog", xlabel="images before pruning", title=f"{order} less random, points"
            )
            axes.legend(fontsize="small")
        right = panels[2]
        right.plot(sizes, errors[ALL, 1.0].mean(axis=0), "k.-", label="all, or random")
        for number, keep in enumerate(keeps):
            right.plot(np.array(sizes) * keep, errors["hard", keep].mean(axis=0), ".-", color=f"C{number}",
                       label=f"hard, {keep:.0%} kept")  # fmt: skip
        right.set(xscale="log", yscale="log", xlabel="images after pruning", title="test error")
        right.legend(fontsize="small")
