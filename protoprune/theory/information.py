"""How much a kept example tells about the teacher: the information part of the theory (perfect probe, theta = 0).

A student drawn at random from all perceptrons that fit the kept examples has overlap q with another such student and R
with the teacher. The entropy of that set, in nats a dimension, is the extremum over q and R of

    S = ln(1 - q)/2 + (q - R^2)/(2 (1 - q)) + alpha En(q, R),   En = < ln P[the student fits an example] >,

and one more example a dimension lowers it by I = -En nats. `information_gain` solves for q and R. `energetic_gain` is
the paper's form, which sets q = R: exact on random data, but pruning breaks that symmetry, and the two then differ
(docs/theory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import root
from scipy.special import log_ndtr, ndtr, ndtri

from protoprune.arguments import checked
from protoprune.bounds import check_number
from protoprune.errors import ProtopruneError
from protoprune.theory.solver import MAX_ALPHA, STEPS, density, panels


@dataclass(frozen=True)
class Information:
    """What one more kept example a dimension tells, in nats, where the fraction `keep` of hardest examples is kept."""

    alpha_prune: float
    keep: float
    gain: float  # nats an example
    overlap: float  # R, student with teacher
    replica_overlap: float  # q, student with student
    residual: float


@checked
def energetic_gain(overlap: float, keep: float) -> float:
    """Nats an example in the paper's form (q = R): ln 2 for random data at R = 0, 1 as keep -> 0 and then R -> 1."""
    check_number("overlap", overlap, 0, 1 - 1e-12, ", a cosine between the two", above=True)
    edge = _edge(keep)
    slope = np.sqrt(overlap / (1 - overlap))
    breaks = np.concatenate(
        [np.arange(-12.0, 13.0), STEPS / slope, (STEPS * np.sqrt(1 - overlap) - edge) / np.sqrt(overlap)]
    )
    t, weight = panels(np.unique(breaks[np.abs(breaks) <= 12]), fine=True)
    kept = ndtr(-slope * t) - ndtr(-(edge + np.sqrt(overlap) * t) / np.sqrt(1 - overlap))
    return float(-2 / keep * np.sum(weight * density(t) * kept * log_ndtr(-slope * t)))


@checked
def information_gain(alpha_prune: float, keep: float = 1.0) -> Information:
    """Nats an example at alpha_prune kept examples a dimension, with q and R at their extremum.

    Follows the solution up from few examples, where R and q are proportional to alpha; ProtopruneError when that fails.
    """
    check_number("alpha_prune", alpha_prune, 0, MAX_ALPHA, ", kept examples a dimension (for example 2)", above=True)
    edge = _edge(keep)
    first = min(1e-3, alpha_prune)
    path = np.geomspace(first, alpha_prune, 1 + int(np.ceil(5 * np.log(alpha_prune / first))))
    mean_y = 2 * (density(np.array(0.0)) - density(np.array(edge))) / keep
    with np.errstate(all="ignore"):  # a step that overflows is rejected by `root`, and the residual is checked
        x = np.log([first * mean_y * np.sqrt(2 / np.pi), first * 2 / np.pi])
        for alpha in path:
            x = root(_saddle, x, args=(alpha, keep, edge), tol=1e-12).x
        residual = float(np.abs(_saddle(x, alpha_prune, keep, edge)).max())
    if not residual < 1e-8:
        raise ProtopruneError(
            f"the information gain did not converge at alpha_prune {alpha_prune:g}, keep {keep:g}: residual "
            f"{residual:.1e}, expected below 1e-08; try a neighbouring point"
        )
    X, Y2 = np.exp(x)
    n2 = 1 + X * X + Y2
    gain = -_expectations(X, Y2, keep, edge)[0]
    return Information(alpha_prune, keep, float(gain), float(X / np.sqrt(n2)), float((X * X + Y2) / n2), residual)


def _edge(keep: float) -> float:
    check_number("keep", keep, 0, 1, ", the fraction kept (for example 0.2)", above=True)
    return float(ndtri((1 + keep) / 2))  # inf when everything is kept


def _saddle(x: np.ndarray, alpha: float, keep: float, edge: float) -> list[float]:
    """Stationarity of S in X = R/sqrt(1-q) and Y^2 = (q-R^2)/(1-q), at x = (log X, log Y^2), as log ratios."""
    X, Y2 = np.exp(x)
    n2 = 1 + X * X + Y2  # 1/(1 - q)
    _, slope, curvature = _expectations(X, Y2, keep, edge)
    return [np.log(alpha * slope * n2 / X), np.log(alpha * curvature * n2 / (X * X + Y2))]


def _expectations(X: float, Y2: float, keep: float, edge: float) -> tuple[float, float, float]:
    """E[ln Phi(m)], E[y r(m)], -E[r'(m)] over kept examples, with r = phi/Phi.

    m = X y + Y v is the student's field: v is standard normal, y half-normal and below `edge`.
    """
    tau = np.sqrt(X * X + Y2)
    spread = np.sqrt(Y2) / tau  # of y given m
    turns = [(0.0, 1 / tau), (0.0, np.sqrt(Y2) / X), (edge * tau / X, np.sqrt(Y2) / X)]
    breaks = np.concatenate([np.arange(-10.0, 11.0, 2.0), *[c + w * STEPS for c, w in turns if np.isfinite(c)]])
    p, weight = panels(np.unique(breaks[np.abs(breaks) <= 10]), fine=True)
    centre = X * p / tau  # mean of y at m = tau p, before the cut
    low, high = -centre / spread, (edge - centre) / spread
    mass = np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    y = centre * mass + spread * (density(low) - density(high))
    m, weight = tau * p, weight * density(p) * 2 / keep
    log_fit = log_ndtr(m)
    r = np.exp(-m * m / 2 - log_fit) / np.sqrt(2 * np.pi)
    return float(weight @ (mass * log_fit)), float(weight @ (y * r)), float(weight @ (mass * r * (m + r)))
