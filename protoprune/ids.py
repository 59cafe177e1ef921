"""Seeded hashes of images' ids: ties and draws that do not depend on the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from protoprune.paths import BATCH, encoded


def hashes(ids: Sequence[str], seed: int, purpose: bytes = b"") -> np.ndarray:
    """(n,) uint64: a hash of each id that depends on the seed; independent ones for different purposes."""
    return hashes_of(np.arange(len(ids)), ids, seed, purpose)


def hashes_of(rows: np.ndarray, ids: Sequence[str], seed: int, purpose: bytes = b"") -> np.ndarray:
    """(m,) uint64: the hashes of the ids of these rows (m,) among all (n,) `ids`."""
    if isinstance(ids, Known):
        return ids.hashes(seed, purpose)[rows]
    if len(rows) > BATCH and not (np.diff(rows) >= 0).all():  # ids are read fast in their own order
        order = np.argsort(rows, kind="stable")
        found = np.empty(len(rows), np.uint64)
        found[order] = hashes_of(rows[order], ids, seed, purpose)
        return found
    start = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little", signed=True), person=purpose)

    def one(name: bytes) -> bytes:
        state = start.copy()
        state.update(name)
        return state.digest()

    found, done = np.empty(len(rows), "<u8"), 0
    for names in encoded(ids, rows):
        found[done : done + len(names)] = np.frombuffer(b"".join(map(one, names)), "<u8")
        done += len(names)
    return found


class Known(list[str]):
    """Ids that are ordered again and again, as by `tune`: all are hashed once a seed, which is most of an order."""

    def __init__(self, ids: Iterable[str]) -> None:
        super().__init__(ids)
        self.hashes = lru_cache(2)(lambda seed, purpose: hashes(list(self), seed, purpose))


def row_type(n: int) -> type[np.int32] | type[np.int64]:
    """The type for the numbers of n rows, of which there are several arrays: the smaller one as long as it does."""
    return np.int32 if n < 1 << 31 else np.int64


def shuffled(rows: np.ndarray, ids: Sequence[str], seed: int, purpose: bytes = b"") -> np.ndarray:
    """The rows (m,) at random: sorted by the hashes of their ids among all (n,) `ids`."""
    return rows[np.argsort(hashes_of(rows, ids, seed, purpose), kind="stable")]
