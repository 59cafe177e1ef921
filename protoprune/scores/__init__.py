"""Score tables: one number an image, in a file that anyone can open, and how two rankings compare.

A larger score means a harder example, whatever a file says: what is read is turned round where it has to be. What this
package does not know: where scores come from, and what is done with them.

    table.py      a table in a file: write_scores, read_table, the header, the direction
    columns.py    which column is the path and which is the score, in files that others wrote
    matching.py   a table's rows -> rows of the images: read_scores, match
    ranks.py      spearman, overlap
"""

from protoprune.scores.matching import ScoreTable, check_reading, match, read_scores
from protoprune.scores.ranks import mean_overlap, overlap, spearman
from protoprune.scores.table import Table, named, read_table, split_source, turned, write_scores

__all__ = [
    "ScoreTable", "Table", "check_reading", "match", "mean_overlap", "named", "overlap", "read_scores",
    "read_table", "spearman", "split_source", "turned", "write_scores",
]  # fmt: skip
