"""What can be said of a recipe without labels: how its list lies among all images, and how stable it is.

None of it is accuracy: which images a model needs cannot be judged without labels. Pure: arrays in, numbers out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from protoprune.clustering import prototypes, vectors
from protoprune.errors import UsageError
from protoprune.selection import check_keep
from protoprune.tuning.recipes import RANDOM, Candidate, Part, Pool

SAMPLE = 5000  # images that distances and neighbours are measured for
NEIGHBOURS = 10
ALIKE = 0.05  # 1 - cosine below which two images count as near-duplicates, as --dedup's example has it
_BLOCK = 1 << 26  # similarities at a time


@dataclass(frozen=True)
class Row:
    """One recipe."""

    name: str
    candidate: Candidate
    farness: float  # mean 1 - cosine of an image to the nearest kept one: small = all are covered
    farthest: float  # the same at the 99th percentile
    duplicates: float  # share of the kept ones that have a near-duplicate among the kept
    stability: float  # share of the list that two seeds have in common


@dataclass(frozen=True)
class Unlabelled:
    """All recipes, and what holds for the features."""

    rows: list[Row]
    consistency: float  # share of an image's 10 nearest that lie in its own cluster
    chance: float  # the same for random neighbours
    duplicates: float  # share of all images that have a near-duplicate
    sampled: int


def recipes() -> list[Candidate]:
    """Those that need no labels."""
    orders = ("hard", "easy", "middle")
    return [RANDOM, Candidate("cover", by="cluster"), Candidate("facility", by="cluster"), *map(Candidate, orders)]


def describe(pool: Pool, keep: float, seed: int = 0) -> Unlabelled:
    """Coverage, near-duplicates and stability of every recipe's list of the pool, whose labels are not looked at."""
    check_keep(keep)
    vectors.check_finite("the features", pool.vectors, pool.paths)
    placed = np.flatnonzero(pool.vectors.any(axis=1))  # zeros resemble nothing, and no recipe keeps them
    n = len(placed)
    if not 1 <= round(keep * n) < n:
        raise UsageError(f"--keep {keep:g}: {round(keep * n):,} of {n:,} images, which leaves nothing to compare")
    unit = vectors.unit(np.asarray(pool.vectors, np.float32))
    sample = np.sort(np.random.default_rng([seed, 77]).permutation(placed)[:SAMPLE])
    blind = Pool(pool.paths, np.full(len(pool), -1), [], pool.vectors)
    first, second = (Part(blind, np.arange(len(pool)), seed=one) for one in (seed, seed + 1))
    rows = []
    for one in recipes():
        kept, other = first.select(one, keep), second.select(one, keep)
        near = _similarity(unit, sample, kept, 1)[:, 0]
        own = np.intersect1d(kept, sample)
        rows.append(
            Row(
                one.name, one, float(np.mean(1 - near)), float(np.quantile(1 - near, 0.99)), _alike(unit, own, kept),
                len(np.intersect1d(kept, other)) / len(kept),
            )
        )  # fmt: skip
    cluster = prototypes.cluster(pool.vectors, prototypes.auto_k(n), seed=seed).cluster
    neighbours = _nearest(unit, sample, placed, min(NEIGHBOURS, n - 1))
    same = cluster[neighbours] == cluster[sample][:, None]
    share = np.bincount(cluster[placed]) / n
    return Unlabelled(
        rows, float(same.mean()), float(np.square(share).sum()), _alike(unit, sample, placed), len(sample)
    )


def _alike(unit: np.ndarray, rows: np.ndarray, among: np.ndarray) -> float:
    """Share of the rows that have a near-duplicate among others."""
    if not len(rows) or len(among) < 2:
        return 0.0
    return float((_similarity(unit, rows, among, 2)[:, 1] > 1 - ALIKE).mean())  # the first is the row itself


def _similarity(unit: np.ndarray, rows: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) largest cosines to the images of `among`, falling."""
    return np.concatenate([np.sort(-np.partition(-x, count - 1, axis=1)[:, :count])[:, ::-1]
                           for x in _blocks(unit, rows, among)])  # fmt: skip


def _nearest(unit: np.ndarray, rows: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) the nearest others."""
    found = []
    for block, x in zip(_split(rows, among), _blocks(unit, rows, among), strict=True):
        x[np.arange(len(block)), np.searchsorted(among, block)] = -2
        found.append(among[np.argpartition(-x, count - 1, axis=1)[:, :count]])
    return np.concatenate(found)


def _split(rows: np.ndarray, among: np.ndarray) -> list[np.ndarray]:
    step = max(1, _BLOCK // max(len(among), 1))
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _blocks(unit: np.ndarray, rows: np.ndarray, among: np.ndarray) -> Iterator[np.ndarray]:
    others = unit[among].T
    for block in _split(rows, among):
        yield unit[block] @ others
