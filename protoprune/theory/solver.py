"""The analytic theory of data pruning: a teacher-student perceptron, solved in the limit of many dimensions.

Model (Sorscher et al. 2022, arXiv 2206.14486): inputs x ~ N(0, I_N), labels sign(T.x), alpha_tot = P/N examples a
dimension. A probe perceptron at angle theta from the teacher T ranks the examples by margin (large = easy), a fraction
`keep` of them is kept, and a fresh perceptron of maximal margin is trained on those. `solve` returns its test error,
arccos(R)/pi.

The paper states three coupled saddle-point equations with double integrals. They are the stationarity conditions of a
three-dimensional problem, which is what is solved here (docs/theory.md derives it): with y = |T.x| > 0 and w the fields
of an example along the teacher and along the probe's part orthogonal to it, and g a standard normal independent of
both, find (A, C, K) with

    alpha E[(K - A y - C w - g)_+^2] = 1,  K/sqrt(1 + A^2 + C^2) maximal,  expectation over the KEPT examples.

Then R = A/n, the overlap along the probe's orthogonal part b = C/n and the margin kappa = K/n, with n = sqrt(1 + A^2 +
C^2). The feasible set is convex, so a stationary point is the answer and there is only one. theta = 0 needs no special
case.

What this module does not know: real images. It has two classes, Gaussian inputs, one linear layer and no label noise;
alpha is a number of examples for each dimension, and no formula here turns a number of images into an alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr, ndtri, owens_t

from protoprune.arguments import checked
from protoprune.bounds import check_number, check_whole, shown
from protoprune.errors import ProtopruneError, UsageError

ORDERS = ("hard", "easy", "random")
MARGINS = ("absolute", "signed")
MAX_THETA = 89.0  # degrees; at 90 the probe knows nothing of the teacher
TOLERANCE = 1e-8  # largest accepted residual: relative error left in A and K, absolute in C
_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(12)
_FINE_X, _FINE_W = np.polynomial.legendre.leggauss(20)
STEPS = np.array([-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0])  # panels around a transition, in units of its width


@dataclass(frozen=True)
class Solution:
    """One solved point. Overlaps are cosines; `residual` was measured on a finer mesh than the one solved on."""

    alpha_tot: float
    keep: float
    theta: float  # degrees
    order: str
    margin: str
    error: float  # test error, a probability
    overlap: float  # R, cosine between student and teacher
    probe_overlap: float  # rho, cosine between student and probe
    kappa: float  # margin of the student: smallest |J.x| over the kept examples, J of length 1
    residual: float

    @property
    def alpha_prune(self) -> float:
        """Kept examples a dimension."""
        return self.alpha_tot * self.keep


@dataclass(frozen=True)
class KeptRegion:
    """Kept examples in the plane (y, w): y > 0 and signed probe margin z = y cos t + w sin t in one of `intervals`."""

    keep: float
    cos_t: float
    sin_t: float
    intervals: tuple[tuple[float, float], ...]


# --- which examples are kept -----------------------------------------------------------------------------------------


def kept_region(keep: float, theta: float, order: str = "hard", margin: str = "absolute") -> KeptRegion:
    """The probe margins that are kept, as intervals of the signed margin z (probability `keep` in all)."""
    t = np.radians(theta)
    if order == "random" or keep == 1.0:
        # Random pruning knows no probe; t = 0 spares the solver a direction in which nothing happens.
        return KeptRegion(1.0, 1.0, 0.0, ((-np.inf, np.inf),))
    if margin == "absolute":
        edge = float(ndtri((1 + keep) / 2)) if order == "hard" else float(ndtri(1 - keep / 2))
        intervals = ((-edge, edge),) if order == "hard" else ((-np.inf, -edge), (edge, np.inf))
    else:
        edge = _signed_quantile(keep if order == "hard" else 1 - keep, t)
        intervals = ((-np.inf, edge),) if order == "hard" else ((edge, np.inf),)
    return KeptRegion(keep, float(np.cos(t)), float(np.sin(t)), intervals)


def _signed_quantile(probability: float, t: float) -> float:
    """z with P(signed probe margin < z) = probability.

    That margin is skew-normal of shape cot t: its distribution function is Phi(z) - 2 OwensT(z, cot t).
    """
    shape = 1 / np.tan(t) if t > 0 else np.inf

    def excess(z: float) -> float:
        return ndtr(z) - 2 * owens_t(z, shape) - probability

    if excess(-10) >= 0 or excess(10) <= 0:
        raise UsageError(
            "keep is too close to 0 or 1 for the signed margin's tail: expected 1e-15 or more away from both"
        )
    return brentq(excess, -10, 10, xtol=1e-15)


# --- expectations over the kept examples -----------------------------------------------------------------------------


def panels(breaks: np.ndarray, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre nodes and weights over sorted break points. -> (nodes,), (nodes,)"""
    x, weight = (_FINE_X, _FINE_W) if fine else (_GAUSS_X, _GAUSS_W)
    half = np.diff(breaks)[:, None] / 2
    return (breaks[:-1, None] + half * (1 + x)).ravel(), (half * weight).ravel()


def _mesh(A: float, C: float, K: float, region: KeptRegion, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in p, the field along the student's part in the plane (y, w), dense wherever the integrand turns."""
    tau = np.hypot(A, C)
    along_z = (region.cos_t * A + region.sin_t * C) / tau
    across_z = (region.sin_t * A - region.cos_t * C) / tau
    turns = [(K / tau, 1 / tau), (0.0, abs(C) / A)]  # the margin's kink, smoothed by g; the edge y = 0
    for edge in {e for interval in region.intervals for e in interval if np.isfinite(e)}:
        if along_z != 0:
            turns.append((edge / along_z, abs(across_z / along_z)))  # the edge of the kept region
        if region.sin_t > 0:
            turns.append((C * edge / (tau * region.sin_t), 0.0))  # the corner where it meets y = 0
    centre, width = np.array(turns).T
    breaks = np.concatenate([np.arange(-10.0, 11.0, 2.0), (centre[:, None] + width[:, None] * STEPS).ravel()])
    breaks = np.unique(breaks[np.abs(breaks) <= 10])
    return panels(breaks[np.diff(breaks, prepend=-np.inf) > 1e-12], fine)  # a node must not round onto an edge


def _across(p: np.ndarray, A: float, C: float, region: KeptRegion) -> np.ndarray:
    """Integrals of 1, q, q^2 over the kept q at each p. -> (3, nodes)

    q is the standard normal field orthogonal to p in the plane (y, w).
    """
    tau = np.hypot(A, C)
    cos_p, sin_p = A / tau, C / tau
    along_z = region.cos_t * cos_p + region.sin_t * sin_p
    across_z = region.sin_t * cos_p - region.cos_t * sin_p + 0.0  # + 0.0: a negative zero would flip the infinities
    total = np.zeros((3, p.size))
    with np.errstate(divide="ignore"):  # x/0 = +-inf is the right bound: the constraint does not depend on q
        y_edge = cos_p * p / (sin_p + 0.0)  # y = cos_p p - sin_p q > 0
        y_low, y_high = (y_edge, np.inf) if sin_p < 0 else (-np.inf, y_edge)
        for low_z, high_z in region.intervals:
            ends = (low_z - along_z * p) / across_z, (high_z - along_z * p) / across_z
            z_low, z_high = ends[::-1] if across_z < 0 else ends
            low = np.clip(np.maximum(y_low, z_low), -38, 38)
            high = np.maximum(np.clip(np.minimum(y_high, z_high), -38, 38), low)
            density_low, density_high = density(low), density(high)
            mass = np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
            total += [mass, density_low - density_high, mass + low * density_low - high * density_high]
    return total


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def _moments(
    A: float, C: float, K: float, region: KeptRegion, fine: bool = False
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """E[h^2], E[h v], E[1{h>0} v v^T] and E[1] over kept examples, with h = (K - Ay - Cw - g)_+ and v = (1, y, w).

    Everything across the student's direction and over g is done in closed form; the one numerical integral is along it.
    """
    p, weight = _mesh(A, C, K, region, fine)
    tau = np.hypot(A, C)
    cos_p, sin_p = A / tau, C / tau
    mass, first, second = _across(p, A, C, region) * (weight * density(p) * 2 / region.keep)
    y, w = cos_p * p * mass - sin_p * first, sin_p * p * mass + cos_p * first
    yy = cos_p**2 * p * p * mass - 2 * cos_p * sin_p * p * first + sin_p**2 * second
    ww = sin_p**2 * p * p * mass + 2 * cos_p * sin_p * p * first + cos_p**2 * second
    yw = cos_p * sin_p * (p * p * mass - second) + (cos_p**2 - sin_p**2) * p * first
    gap = K - tau * p
    below = ndtr(gap)
    hinge = np.maximum(gap * below + density(gap), 0)
    one, ey, ew, eyy, eyw, eww = np.stack([mass, y, w, yy, yw, ww]) @ below
    quadratic = float(mass @ (gap * hinge + below))
    linear = np.array([mass @ hinge, y @ hinge, w @ hinge])
    return quadratic, linear, np.array([[one, ey, ew], [ey, eyy, eyw], [ew, eyw, eww]]), float(mass.sum())


# --- the solver ------------------------------------------------------------------------------------------------------


def _equations(
    x: np.ndarray, alpha: float, region: KeptRegion, fine: bool = False
) -> tuple[np.ndarray, np.ndarray, float]:
    """Residuals (3,) and Jacobian (3, 3) in x = (log A, C, log K), and the kept mass, which is 1 on a good mesh.

    Logarithms keep A and K positive: E[h y] > 0 because y > 0, so A is positive at every solution.
    """
    A, C, K = np.exp(x[0]), x[1], np.exp(x[2])
    quadratic, (h, hy, hw), second, mass = _moments(A, C, K, region, fine)
    turn = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])  # dh = dK - y dA - w dC: rows (A, C, K), columns (1, y, w)
    dh, dhy, dhw = second @ turn.T
    n2 = 1 + A * A + C * C
    dn2 = np.array([2 * A, 2 * C, 0])
    pull = hw * n2 / (h * K)  # equals C at the solution
    residual = np.array([np.log(alpha * quadratic), np.log(hy * n2 / (h * A * K)), pull - C])
    jacobian = np.array(
        [
            2 * (turn @ np.array([h, hy, hw])) / quadratic,
            dhy / hy - dh / h + dn2 / n2 - [1 / A, 0, 1 / K],
            dhw * n2 / (h * K) - pull * dh / h + hw * dn2 / (h * K) - [0, 1, pull / K],
        ]
    )
    scale = np.array([1, 1, 1 / (1 + abs(C))])
    return residual * scale, jacobian * [A, 1, K] * scale[:, None], mass


def _newton(x: np.ndarray, alpha: float, region: KeptRegion, iterations: int) -> np.ndarray | None:
    """Damped Newton from x; None if it has not converged after that many steps.

    A step is accepted when it shortens the NEXT step as predicted with the same Jacobian (Deuflhard's natural
    monotonicity test). The norm of the residual is no guide: where the student starts to see the labels, the equations
    differ in scale by 10^5.
    """
    residual, jacobian, _ = _equations(x, alpha, region)
    for _ in range(iterations):
        if np.abs(residual).max() < 1e-12:
            return x
        step = -np.linalg.solve(jacobian, residual)
        length = float(np.linalg.norm(step))
        damping = min(1.0, 2 / length)
        while damping > 1e-4:
            trial = x + damping * step
            residual, trial_jacobian, _ = _equations(trial, alpha, region)
            finite = np.isfinite(residual).all() and np.isfinite(trial_jacobian).all()
            if finite and np.linalg.norm(np.linalg.solve(jacobian, residual)) <= (1 - damping / 4) * length:
                break
            damping /= 2
        else:
            return x if length < 1e-6 else None  # rounding error is all that is left; the caller checks the residual
        x, jacobian = trial, trial_jacobian
        if damping * length < 1e-10:
            return x
    return None


def _start(alpha: float) -> np.ndarray:
    """First guess of (log A, C, log K): with many examples A grows like alpha, with few K like 1/sqrt(alpha)."""
    A = min(0.5, np.sqrt(alpha)) + 0.5 * alpha
    return np.array([np.log(A), 0.0, np.log(0.5 + 1 / np.sqrt(alpha))])


def _continue(alpha: float, region: KeptRegion, iterations: int) -> np.ndarray | None:
    """Follow the solution from few examples, where it is the mean (Hebb), up to alpha; steps shrink if Newton fails."""
    _, _, means, _ = _moments(1e-3, 0.0, 100.0, region)  # K so large that h > 0 everywhere: plain means of y and w
    mean_y, mean_w = means[0, 1:]
    K = 30 * (1 + np.hypot(mean_y, mean_w))
    here = min(K**-2, alpha)
    x = _newton(np.array([np.log(mean_y / K), mean_w / K, np.log(K)]), here, region, iterations)
    factor = 2.0
    while x is not None and here < alpha:
        target = min(here * factor, alpha)
        found = _newton(x, target, region, iterations)
        if found is not None:
            x, here, factor = found, target, min(factor**1.5, 4.0)
        elif (factor := np.sqrt(factor)) < 1.001:
            return None
    return x


MAX_ALPHA = 1e9  # examples a dimension, of which a perceptron needs a few: beyond it the equations have no digits left


def check_point(alpha_tot: float, keep: float, theta: float, order: str, margin: str) -> None:
    """UsageError for a point that makes no sense."""
    check_number("alpha_tot", alpha_tot, 0, MAX_ALPHA, ", examples a dimension (for example 5)", above=True)
    check_number("keep", keep, 0, 1, ", the fraction kept (for example 0.5)", above=True)
    check_number("theta", theta, 0, MAX_THETA, " degrees, 0 for a perfect probe")
    if order not in ORDERS:
        raise UsageError(f"order is {order!r}: expected one of {', '.join(ORDERS)}")
    if margin not in MARGINS:
        raise UsageError(f"margin is {margin!r}: expected one of {', '.join(MARGINS)}")


@checked
def solve(
    alpha_tot: float,
    keep: float = 1.0,
    theta: float = 0.0,
    order: str = "hard",
    margin: str = "absolute",
    iterations: int = 60,
) -> Solution:
    """Test error and overlaps for alpha_tot examples a dimension, of which `keep` are kept by a probe at theta degrees.

    Raises ProtopruneError rather than return a number when Newton and continuation both fail, or when a finer mesh than
    the one the equations were solved on would move the answer by more than TOLERANCE.
    """
    check_point(alpha_tot, keep, theta, order, margin)
    check_whole("iterations", iterations)
    return _solved(float(alpha_tot), float(keep), float(theta), order, margin, iterations)


@lru_cache(maxsize=10_000)  # of the hard examples each rival of `crossover` asks anew
def _solved(alpha_tot: float, keep: float, theta: float, order: str, margin: str, iterations: int) -> Solution:
    region = kept_region(keep, theta, order, margin)
    alpha = alpha_tot * keep
    with np.errstate(all="ignore"):  # a rejected Newton step may overflow; the accepted one is checked below
        x = _newton(_start(alpha), alpha, region, iterations)
        if x is None:
            x = _continue(alpha, region, iterations)
        residual = _residual(x, alpha, region)
    if x is None or not residual < TOLERANCE:
        raise ProtopruneError(
            f"the theory did not converge at alpha_tot {alpha_tot:g}, keep {keep:g}, theta {theta:g}, {order}, "
            f"{margin} margin: residual {residual:.1e}, expected below {TOLERANCE:g}; try a neighbouring point or the "
            "simulation"
        )
    A, C, K = np.exp(x[0]), x[1], np.exp(x[2])
    n = np.sqrt(1 + A * A + C * C)
    t = np.radians(theta)
    error = np.arctan2(np.hypot(1, C), A) / np.pi  # arccos(R)/pi without its cancellation at R near 1
    rho = (A * np.cos(t) + C * np.sin(t)) / n
    return Solution(
        alpha_tot, keep, theta, order, margin, float(error), float(A / n), float(rho), float(K / n), residual
    )


def _residual(x: np.ndarray | None, alpha: float, region: KeptRegion) -> float:
    """How far a Newton step on the fine mesh would still move (log A, C, log K), or the kept mass's error if larger.

    inf when there is no solution. The bare residual would not do: with R near 1 the equation for C multiplies rounding
    error by 10^4, with no effect on the error.
    """
    if x is None:
        return np.inf
    residual, jacobian, mass = _equations(x, alpha, region, fine=True)
    return float(max(np.abs(np.linalg.solve(jacobian, residual)).max(), abs(mass - 1)))


# --- questions asked of the solver -----------------------------------------------------------------------------------


@checked
def best_keep(
    *,
    alpha_tot: float | None = None,
    alpha_prune: float | None = None,
    theta: float = 0.0,
    order: str = "hard",
    margin: str = "absolute",
    min_keep: float = 0.01,
) -> Solution:
    """The fraction kept that minimises the test error, at a fixed number of examples before (alpha_tot) or after
    (alpha_prune) pruning.

    At fixed alpha_prune a smaller fraction means that more examples were there to choose from. The error may have two
    minima in keep, so a grid finds the valley before a bounded search goes down it. A best fraction at min_keep means
    "that or less". Of fractions that are as good to eight digits (a perfect probe's, of many examples; all, of random
    ones) it is the one of the grid that takes the fewest examples.
    """
    if (alpha_tot is None) == (alpha_prune is None):
        raise UsageError("best_keep needs exactly one of alpha_tot (before pruning) and alpha_prune (after pruning)")
    name, alpha = ("alpha_tot", alpha_tot) if alpha_prune is None else ("alpha_prune", alpha_prune)
    check_number(name, alpha, 0, MAX_ALPHA, ", examples a dimension (for example 5)", above=True)
    check_number("min_keep", min_keep, 0, 1 - 1e-9, " (for example 0.01)", above=True)

    def at(log_keep: float) -> Solution:
        keep = min(float(np.exp(log_keep)), 1.0)
        return solve(alpha_tot or (alpha_prune or 0.0) / keep, keep, theta, order, margin)

    grid = np.linspace(np.log(min_keep), 0.0, 25)
    solutions = [at(g) for g in grid]
    low = int(np.argmin([s.error for s in solutions]))
    bounds = grid[max(low - 1, 0)], grid[min(low + 1, len(grid) - 1)]
    refined = minimize_scalar(lambda g: at(g).error, bounds=bounds, method="bounded", options={"xatol": 2e-3})
    found = [*solutions, at(refined.x)]
    lowest = min(s.error for s in found)
    return min(
        (s for s in found if s.error <= lowest * (1 + 1e-8)), key=lambda s: s.alpha_tot if alpha_tot is None else s.keep
    )


@checked
def pareto(
    alpha_prunes: Iterable[float],
    theta: float = 0.0,
    order: str = "hard",
    margin: str = "absolute",
    min_keep: float = 0.01,
) -> list[Solution]:
    """The best solution at each number of kept examples a dimension, over all fractions from min_keep to 1."""
    return [best_keep(alpha_prune=a, theta=theta, order=order, margin=margin, min_keep=min_keep) for a in alpha_prunes]


@checked
def crossover(
    keep: float,
    theta: float = 0.0,
    rival: str = "easy",
    margin: str = "absolute",
    span: tuple[float, float] = (0.1, 200.0),
) -> float | None:
    """alpha_tot above which keeping the hard fraction `keep` beats the rival (easy or random) of the same size; None if
    never in span.

    The last crossing counts: from there to the end of the span hard wins. Returns the span's start when hard wins
    throughout.
    """

    if not isinstance(span, (tuple, list)) or len(span) != 2:
        raise UsageError(f"span {shown(span)}: expected two numbers, such as (0.1, 200)")
    for alpha in span:
        check_number("span", alpha, 0, MAX_ALPHA, ", examples a dimension", above=True)

    def gain(log_alpha: float) -> float:
        alpha = float(np.exp(log_alpha))
        return solve(alpha, keep, theta, rival, margin).error - solve(alpha, keep, theta, "hard", margin).error

    grid = np.linspace(math.log(span[0]), math.log(span[1]), 30)
    gains = np.array([gain(g) for g in grid])
    if gains[-1] <= 0:
        return None
    losing = np.flatnonzero(gains <= 0)
    if losing.size == 0:
        return span[0]
    return float(np.exp(brentq(gain, grid[losing[-1]], grid[losing[-1] + 1], xtol=1e-6)))
