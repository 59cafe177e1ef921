"""A ranking's near-duplicates: taken out of it, or counted."""

from __future__ import annotations

import math

from protoprune import selection
from protoprune.clustering.prototypes import Clustering
from protoprune.device import cores
from protoprune.errors import warn
from protoprune.pruning.ranking import Ranking, first_clustering, scratch

LARGE = 50_000  # images a cluster from which on --dedup takes long
UNLIKE = 0.5  # 1 - cosine from which on nobody would speak of duplicates, and a cosine was meant
_WORKERS = 16  # clusters that are gone through at once, each with some 200 MB of similarities


def deduplicate(
    ranking: Ranking, epsilon: float, *, prefer: str = "harder", seed: int = 0, count: bool = False
) -> None:
    """Take near-duplicates out of a ranking that has clusters: sets `ranking.duplicate_of`, so they are not usable.

    Within each cluster of the first clustering an image goes when its cosine to a kept one exceeds 1 - epsilon;
    `prefer` says which stays, the 'harder' or the more 'central' one by distance to the centroid, whatever the scores
    are (see `selection.near_duplicates`). With `count` sets `ranking.likeness` too: how many pairs and images are
    nearer than several thresholds, `epsilon` included, before any is removed.
    """
    selection.check_duplicates(epsilon, prefer)
    one = first_clustering(ranking, "--dedup")
    _warn_of_large(one)
    if epsilon >= UNLIKE:
        warn(
            f"{epsilon:g} is 1 - cosine: whatever has a cosine above {1 - epsilon:g} to a kept image counts as its "
            f"duplicate; for a cosine above {epsilon:g} give {1 - epsilon:g}"
        )
    thresholds = sorted({*selection.THRESHOLDS, epsilon}) if count else ()
    ranking.duplicate_of, found = selection.near_duplicates(
        ranking.features, one.cluster, one.distance, epsilon, ids=ranking.paths, prefer=prefer, seed=seed,
        usable=ranking.usable, thresholds=thresholds, folder=scratch(ranking), workers=min(cores(), _WORKERS),
    )  # fmt: skip
    ranking.likeness = found if count else None


def _warn_of_large(one: Clustering) -> None:
    """All pairs of a cluster are compared, so that its time grows with the square of its size."""
    largest = int(one.sizes().max())
    if largest > LARGE:
        enough = one.k * math.ceil(largest / (LARGE // 5))
        warn(
            f"the largest of {one.k:,} clusters has {largest:,} images, all pairs of which are compared; with more "
            f"clusters, such as --k {enough}, --dedup takes less time and misses duplicates in different clusters"
        )
