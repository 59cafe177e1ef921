"""Seeded hashes of images' ids: ties and draws that do not depend on the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def hashes(ids: Sequence[str], seed: int, purpose: bytes = b"") -> np.ndarray:
    """(n,) uint64: a hash of each id that depends on the seed; independent ones for different purposes."""
    key = seed.to_bytes(8, "little", signed=True)
    encoded = (one.encode("utf-8", "surrogateescape") for one in ids)
    joined = b"".join(hashlib.blake2b(one, digest_size=8, key=key, person=purpose).digest() for one in encoded)
    return np.frombuffer(joined, "<u8")


def shuffled(rows: np.ndarray, ids: Sequence[str], seed: int, purpose: bytes = b"") -> np.ndarray:
    """The rows (m,) at random: sorted by the hashes of their ids among all (n,) `ids`."""
    return rows[np.argsort(hashes([ids[row] for row in rows.tolist()], seed, purpose), kind="stable")]
