"""One self-contained page that says what a pruned list does: `protoprune.report.page(chosen)` -> HTML bytes.

    stops       at which fraction each image enters the list, exactly as `select` cuts it
    facts       everything the page says, from a selection: counts, galleries, groups, duplicates, failures
    maps        features -> two dimensions
    thumbnails  images -> WebP sprites within a budget
    render      all of it -> one HTML file

The page ships the stop at which every image enters, never scores to cut by: the kept set in the browser is the one
that `select` writes.
"""

from protoprune.report.facts import Options
from protoprune.report.render import page

__all__ = ["Options", "page"]
