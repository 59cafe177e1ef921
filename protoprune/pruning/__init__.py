"""Feature file -> ranking -> kept set: the stages joined, for the command line and for Python.

import protoprune
result = protoprune.select("features.h5", keep=0.7)
result.write("kept.txt")  # or result.kept_paths

A ranking says how hard each image is, `Clusters` how the features were clustered for it, a `Rule` what to keep of it.
How any of it is written down `lists` knows.

    rules       what can be asked for, checked
    ranking     feature file -> `Ranking`
    duplicates  its near-duplicates
    choosing    ranking x rule -> `Selected`; `select` from end to end
    seeds       how much of a list hangs on one seed
"""

from protoprune.pruning.choosing import Selected, cover_places, prune, select, warn_of_reordered
from protoprune.pruning.duplicates import deduplicate
from protoprune.pruning.ranking import (
    Ranking,
    add_clusters,
    add_scores,
    groups_of,
    rank,
    rank_by_table,
    unscored,
)
from protoprune.pruning.rules import Clusters, Rule
from protoprune.pruning.seeds import StabilityRow, check_stability, restart_overlap, stability

__all__ = [
    "Clusters", "Ranking", "Rule", "Selected", "StabilityRow", "add_clusters", "add_scores", "check_stability",
    "cover_places", "deduplicate", "groups_of", "prune", "rank", "rank_by_table", "restart_overlap", "select",
    "stability", "unscored", "warn_of_reordered",
]  # fmt: skip
