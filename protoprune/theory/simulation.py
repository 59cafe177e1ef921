"""The teacher-student perceptron simulated: random data, a probe at a set angle, pruning, an exact max-margin student.

It checks the solver and shares nothing with it but the model and the names of its options. Finite dimension N adds
a bias of order 1/N; the theory is the limit N -> infinity.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from scipy.optimize import nnls

from protoprune.arguments import checked
from protoprune.bounds import check_seed, check_whole
from protoprune.device import cores
from protoprune.errors import ProtopruneError, UsageError
from protoprune.memory import free_memory
from protoprune.theory.solver import check_point
from protoprune.units import bytes_text


@dataclass(frozen=True)
class Simulation:
    """Test errors of independent runs, one a seed."""

    errors: np.ndarray  # (seeds,)

    @property
    def mean(self) -> float:
        return float(self.errors.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean; nan for a single seed."""
        return float(self.errors.std(ddof=1) / np.sqrt(self.errors.size)) if self.errors.size > 1 else float("nan")


def max_margin(signed: np.ndarray) -> np.ndarray:
    """Unit direction (dimension,) with the largest smallest margin over the rows y_i x_i, (examples, dimension).

    Exact, by a working set: the answer on a subset is the answer on all rows once no row has a smaller margin. Every
    round adds rows that lower the margin and drops only rows that do not support it, so the margin falls strictly and
    the loop ends.
    """
    dimension = signed.shape[1]
    working = np.argsort(signed @ signed.mean(0))[: 4 * dimension]
    while True:
        direction = _closest_hull_point(signed[working])
        fields = signed @ direction
        smallest = fields[working].min()
        outside = np.flatnonzero(fields < smallest - 1e-9 * np.sqrt(dimension))
        if outside.size == 0:
            return direction
        worst = outside[np.argsort(fields[outside])[: 2 * dimension]]
        support = working[fields[working] < smallest + 0.1]  # rows behind the margin may come back; few do
        working = np.union1d(support, worst)


def _closest_hull_point(signed: np.ndarray) -> np.ndarray:
    """Unit direction of the point of the rows' convex hull closest to the origin, which is the max-margin direction.
    (dimension,)

    With A the rows as columns, it is A.lambda for the non-negative least squares solution of [A; 1^T] lambda = [0; 1].
    """
    examples, dimension = signed.shape
    columns = np.vstack([signed.T / np.sqrt(dimension), np.ones(examples)])  # (dimension + 1, examples)
    target = np.zeros(dimension + 1)
    target[-1] = 1.0
    weights, _ = nnls(columns, target, maxiter=30 * max(examples, dimension))
    direction = columns[:-1] @ weights
    norm = np.linalg.norm(direction)
    if not norm > 1e-9 * weights.sum():
        raise ProtopruneError(
            f"the {examples} examples are not linearly separable: there is no max-margin perceptron; check the labels"
        )
    return direction / norm


def select(
    y: np.ndarray, w: np.ndarray, keep: float, theta: float, order: str, margin: str, rng: np.random.Generator
) -> np.ndarray:
    """Indices of the round(keep n) kept examples, from fields along the teacher and beside it, both (n,)."""
    kept = round(keep * y.size)
    if order == "random":
        return rng.choice(y.size, kept, replace=False)
    t = np.radians(theta)
    probe = y * np.cos(t) + w * np.sin(t)
    easiness = np.abs(probe) if margin == "absolute" else probe
    cut = kept if order == "hard" else y.size - kept
    ranked = np.argpartition(easiness, cut - 1) if cut else np.arange(y.size)
    return ranked[:cut] if order == "hard" else ranked[cut:]


def one_error(
    seed: np.random.SeedSequence, dimension: int, examples: int, keep: float, theta: float, order: str, margin: str
) -> float:
    """Test error of one student. Only the kept examples are drawn in full: the probe sees no more than the teacher's
    plane.

    The teacher is the first axis and the label is folded in, y_i x_i, so that the first coordinate is positive.
    """
    rng = np.random.default_rng(seed)
    y, w = np.abs(rng.standard_normal(examples)), rng.standard_normal(examples)
    kept = select(y, w, keep, theta, order, margin, rng)
    signed = rng.standard_normal((kept.size, dimension))
    signed[:, 0], signed[:, 1] = y[kept], w[kept]
    student = max_margin(signed)
    return float(np.arctan2(np.linalg.norm(student[1:]), student[0]) / np.pi)


@checked
def simulate(
    alpha_tot: float,
    keep: float = 1.0,
    theta: float = 0.0,
    order: str = "hard",
    margin: str = "absolute",
    dimension: int = 200,
    seeds: int = 24,
    seed: int = 0,
    pool: ProcessPoolExecutor | None = None,
) -> Simulation:
    """Errors of `seeds` students in `dimension` dimensions, each from its own stream spawned from `seed`.

    The pool changes the speed, never the answer.
    """
    check_point(alpha_tot, keep, theta, order, margin)
    check_whole("--dimension", dimension, 2, 100_000)
    check_whole("--simulate", seeds, 1, 100_000)
    check_seed(seed)
    examples = round(alpha_tot * dimension)
    if round(keep * examples) < 1:
        what = f"alpha_tot {alpha_tot:g} in {dimension:,} dimensions, {keep:g} of it kept,"
        raise UsageError(f"{what} is no example at all: raise one of them")
    needed, free = 16 * dimension * max(round(keep * examples), 4 * dimension) + 32 * examples, free_memory()
    if free is not None and needed > free / cores():
        raise UsageError(
            f"alpha_tot {alpha_tot:g} in {dimension:,} dimensions takes {bytes_text(needed)} a seed, {cores()} at "
            f"once, and {bytes_text(free)} are free; lower one of the two"
        )
    run = partial(one_error, dimension=dimension, examples=examples, keep=keep, theta=theta, order=order, margin=margin)
    streams = np.random.SeedSequence(seed).spawn(seeds)
    return Simulation(np.array(list(pool.map(run, streams) if pool else map(run, streams))))


@contextlib.contextmanager
def worker_pool() -> Iterator[ProcessPoolExecutor]:
    """A pool over all cores, each held to one thread: N is too small for a threaded BLAS to pay.

    Spawned, so that the workers read the thread limit when they first load numpy. Ctrl-C is the parent's business: the
    workers inherit that it is held back, and an exception ends them in the middle of their work.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    count = cores()
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)  # each starts a process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield pool
    except BaseException:
        for process in pool._processes.values():  # Python 3.14 has kill_workers()
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
