"""Scaling laws: error against the number of examples, as a power law, an exponential or a power law with an offset.

    power                a n^-b
    exponential          a exp(-b n)
    power with offset    a n^-b + c,  c >= 0

Fitted to the means over seeds by weighted least squares, compared by AICc, with intervals from a bootstrap over seeds.
Knows nothing of where the errors come from, and does not extrapolate. Two things it cannot see: that error bars at
neighbouring sizes hang together when the subsets are nested (the bootstrap takes whole seeds for that reason), and that
a lower envelope of noisy means lies too low. The intervals are about the seeds, and take the law for the right one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protoprune.bounds import check_whole
from protoprune.errors import UsageError

LAWS = {"power": ("a", "b"), "exponential": ("a", "b"), "power with offset": ("a", "b", "c")}
# A difference in AICc of 6 is an evidence ratio of exp(3), 20 to 1; and the bootstrap must agree nine times in ten.
DECISIVE, AGREEMENT = 6.0, 0.9
_LARGEST = 600.0  # exponents beyond this overflow


@dataclass(frozen=True)
class Law:
    """One law fitted to one curve."""

    name: str
    parameters: dict[str, float]  # a, b and for the offset c
    intervals: dict[str, list[float]] | None  # 95 %, bootstrap over seeds; None with one seed
    aicc: float | None  # None where there are too few sizes for this many parameters
    wins: float | None  # share of the bootstrap samples in which this law has the lowest AICc, where it has one
    rms_log: float  # root mean square of log(error / fit) over sizes: how far off, about as a fraction


@dataclass(frozen=True)
class Fits:
    """All laws on one curve. `best` has the lowest AICc, `rivals` are those that the data do not tell from it."""

    laws: list[Law]
    best: str | None
    delta: float | None  # AICc of the runner-up minus that of the best
    rivals: list[str]
    sizes: int
    seeds: int

    @property
    def decided(self) -> bool:
        return self.best is not None and not self.rivals

    def law(self, name: str) -> Law:
        return next(law for law in self.laws if law.name == name)


def predict(name: str, parameters: dict[str, float], sizes: Sequence[float] | np.ndarray) -> np.ndarray:
    """The law's error at (m,) sizes."""
    n = np.asarray(sizes, np.float64)
    a, b = parameters["a"], parameters["b"]
    return a * np.exp(-b * n) if name == "exponential" else a * n**-b + parameters.get("c", 0.0)


def fit_laws(sizes: Sequence[float], errors: np.ndarray | Sequence[float], *, bootstrap: int = 200) -> Fits:
    """Fit every law to the errors, (m,) or (seeds, m), at (m,) different sizes, m >= 3.

    Each mean is weighted by its standard error over seeds, drawn towards the one that all sizes share (as a fraction of
    the error). AICc has the scale of the residuals as one more parameter, so a law that misses by more than the seeds'
    spread is not believed more than it should be. Raises UsageError for fewer than 3 sizes, or errors not above 0.
    """
    check_whole("bootstrap", bootstrap, 0, 100_000)
    at, table = _check(sizes, errors)
    mean, sigma = table.mean(0), _standard_errors(table)
    found = {name: _fit(name, at, mean, sigma, _starts(name, at, mean)) for name in LAWS}
    aicc = {name: _aicc(found[name][1], len(at), len(LAWS[name])) for name in LAWS}
    rng = np.random.default_rng(0)
    samples, won = _bootstrap(at, table, found, bootstrap, rng) if len(table) > 1 and bootstrap else (None, None)
    laws = []
    for name in LAWS:
        parameters = _natural(name, found[name][0], at, mean)
        gap = np.log(mean / np.maximum(predict(name, parameters, at), 1e-300))
        intervals = _intervals(parameters, samples[name], len(table)) if samples else None
        wins = won[name] if won and aicc[name] is not None else None
        laws.append(Law(name, parameters, intervals, aicc[name], wins, float(np.sqrt(np.mean(gap**2)))))
    return _choose(laws, len(at), len(table))


def verdict(fits: Fits) -> str:
    """Which law wins and by how much, in one sentence that claims no more than the data do."""
    if fits.best is None:
        return f"{fits.sizes} sizes are too few to compare laws (5 for two, 6 for all three)"
    best = fits.law(fits.best)
    exponent = f"b = {best.parameters['b']:.3g}"
    if best.intervals:
        low, high = best.intervals["b"]
        exponent += f" ({low:.3g} to {high:.3g})"
    others = [
        f"{law.name} is behind by {law.aicc - best.aicc:.1f}"
        for law in fits.laws
        if law.aicc is not None and best.aicc is not None and law.name not in (fits.best, *fits.rivals)
    ]
    if fits.decided:
        return f"{fits.best.capitalize()} wins by {fits.delta:.1f} in AICc over the next law; {exponent}"
    text = (
        f"undecided between {fits.best} (lowest AICc, by {fits.delta:.1f}; {exponent}) and {' and '.join(fits.rivals)}"
    )
    return "; ".join([text, *others])


def _choose(laws: list[Law], sizes: int, seeds: int) -> Fits:
    ranked = sorted((law.aicc, place) for place, law in enumerate(laws) if law.aicc is not None)
    if len(ranked) < 2:
        return Fits(laws, None, None, [], sizes, seeds)
    (lowest, place), *behind = ranked
    best, others = laws[place], [laws[place] for _, place in behind]
    rivals = [law.name for law, (aicc, _) in zip(others, behind, strict=True) if aicc - lowest < DECISIVE]
    if not rivals and best.wins is not None and best.wins < AGREEMENT:
        rivals = [max(others, key=lambda law: law.wins or 0.0).name]
    return Fits(laws, best.name, behind[0][0] - lowest, rivals, sizes, seeds)


def _check(sizes: Sequence[float], errors: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    at, table = np.asarray(sizes, np.float64), np.atleast_2d(np.asarray(errors, np.float64))
    if at.ndim != 1 or table.ndim != 2 or table.shape[1] != len(at):
        raise UsageError(f"errors of shape {table.shape} at {at.size} sizes: expected (seeds, sizes)")
    if len(np.unique(at)) < max(3, len(at)):
        raise UsageError(f"sizes {at.tolist()}: a law needs at least 3 sizes, each once")
    if not (np.isfinite(table).all() and (table >= 0).all() and (table.mean(0) > 0).all() and (at > 0).all()):
        raise UsageError("errors and sizes must be above 0; leave out sizes at which no test image is misclassified")
    order = np.argsort(at)
    return at[order], table[:, order]


def _standard_errors(errors: np.ndarray) -> np.ndarray:
    """(m,) standard error of each mean, up to a common factor; in proportion to the error where seeds say nothing."""
    mean, seeds = errors.mean(0), len(errors)
    if seeds == 1:
        return mean
    variance = errors.var(0, ddof=1)
    shared = np.mean(variance / mean**2) * mean**2
    prior = 4  # counts like the seeds' n - 1 degrees of freedom
    sigma = np.sqrt(((seeds - 1) * variance + prior * shared) / (seeds - 1 + prior) / seeds)
    return sigma if sigma.min() > 1e-9 * mean.max() else mean


def _starts(name: str, sizes: np.ndarray, mean: np.ndarray) -> list[np.ndarray]:
    """Starting points from straight lines through log(error - offset)."""
    x = sizes / sizes[-1] if name == "exponential" else np.log(sizes / sizes[-1])
    starts = []
    for share in (0.0,) if len(LAWS[name]) == 2 else (0.02, 0.5, 0.9):
        slope, level = np.polyfit(x, np.log(mean - share * mean.min()), 1)
        if len(LAWS[name]) == 2:
            starts.append(np.array([level, -slope]))
        else:
            starts.append(np.array([level, math.log(max(-slope, 1e-3)), math.log(share / (1.05 - share))]))
    return starts


def _curve(name: str, free: np.ndarray, sizes: np.ndarray, ceiling: float) -> np.ndarray:
    """The law in the parameters that are fitted: log of the error at the largest size, b in units of it, offset."""
    relative = sizes / sizes[-1]
    exponent = -free[1] * relative if name == "exponential" else -_exponent(name, free) * np.log(relative)
    curve = np.exp(np.clip(free[0] + exponent, -_LARGEST, _LARGEST))
    return curve + ceiling * _share(free[2]) if len(free) == 3 else curve


def _exponent(name: str, free: np.ndarray) -> float:
    """b of a power law: any number, but with an offset above 0 and at most 20, where it is a step."""
    return float(free[1]) if name == "power" else _bounded_exp(min(free[1], 3.0))


def _share(free: float) -> float:
    return 1 / (1 + math.exp(-max(min(free, _LARGEST), -_LARGEST)))


def _natural(name: str, free: np.ndarray, sizes: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """a, b, c as the law is written, with sizes as they are."""
    largest = float(sizes[-1])
    if name == "exponential":
        return {"a": _bounded_exp(free[0]), "b": float(free[1] / largest)}
    b = _exponent(name, free)
    parameters = {"a": _bounded_exp(free[0] + b * math.log(largest)), "b": b}
    return parameters if name == "power" else parameters | {"c": 1.05 * float(mean.min()) * _share(free[2])}


def _bounded_exp(value: float) -> float:
    return math.exp(max(min(float(value), _LARGEST), -_LARGEST))


def _fit(
    name: str, sizes: np.ndarray, mean: np.ndarray, sigma: np.ndarray, starts: list[np.ndarray]
) -> tuple[np.ndarray, float]:
    """(free parameters, weighted mean square) of the best of the starts."""
    from scipy.optimize import least_squares

    ceiling = 1.05 * float(mean.min())
    results = [
        least_squares(
            lambda free: np.clip((_curve(name, free, sizes, ceiling) - mean) / sigma, -1e100, 1e100),
            start,
            method="lm",
            max_nfev=400,
        )
        for start in starts
    ]
    best = min(results, key=lambda result: float(result.cost))
    return best.x, float(2 * best.cost / len(sizes))


def _aicc(mean_square: float, m: int, parameters: int) -> float | None:
    k = parameters + 1  # the scale of the residuals is estimated too
    if m - k - 1 < 1:
        return None
    return float(m * math.log(max(mean_square, 1e-20)) + 2 * k + 2 * k * (k + 1) / (m - k - 1))


def _bootstrap(
    sizes: np.ndarray,
    errors: np.ndarray,
    found: dict[str, tuple[np.ndarray, float]],
    samples: int,
    rng: np.random.Generator,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """Parameters of each law, and how often each has the lowest AICc, when whole seeds are drawn with replacement."""
    parameters: dict[str, list[dict[str, float]]] = {name: [] for name in LAWS}
    wins = dict.fromkeys(LAWS, 0)
    sigma = _standard_errors(errors)  # that of the data: a sample of few seeds can hold one seed three times
    drawn = [rng.integers(0, len(errors), len(errors)) for _ in range(samples)]
    for rows in drawn:
        mean = np.maximum(errors[rows].mean(0), 1e-3 * errors.mean(0))
        scores = {}
        for name in LAWS:
            free, square = _fit(name, sizes, mean, sigma, [found[name][0]])
            parameters[name].append(_natural(name, free, sizes, mean))
            scores[name] = _aicc(square, len(sizes), len(LAWS[name]))
        possible = {name: score for name, score in scores.items() if score is not None}
        if possible:
            wins[min(possible, key=possible.__getitem__)] += 1
    return parameters, {name: count / samples for name, count in wins.items()}


def _intervals(estimate: dict[str, float], samples: list[dict[str, float]], seeds: int) -> dict[str, list[float]]:
    """Percentile intervals, widened about the estimate by what a bootstrap of n seeds lacks: t for z, n - 1 for n."""
    from scipy.special import ndtri, stdtrit

    tails = np.array([0.025, 0.975])
    widen = math.sqrt(seeds / (seeds - 1)) * stdtrit(seeds - 1, tails[1]) / ndtri(tails[1])
    intervals = {}
    for key, value in estimate.items():
        drawn = np.array([one[key] for one in samples])
        if key == "a" or (key == "b" and len(estimate) == 3):  # above 0, and spread over orders of magnitude
            centre, drawn = math.log(value), np.log(drawn)
            low, high = map(_bounded_exp, centre + widen * (np.quantile(drawn, tails) - centre))
        else:
            low, high = value + widen * (np.quantile(drawn, tails) - value)
        low = max(low, 0.0) if key == "c" else low
        intervals[key] = [float(min(low, value)), float(max(high, value))]
    return intervals
