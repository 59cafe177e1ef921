"""Features wherever they are: a file, a set, or a set on a store, opened by one function; and a set made one file."""

from __future__ import annotations

import os

import numpy as np

from protoprune import files, stores
from protoprune.arguments import checked
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import hdf5
from protoprune.features.featurefile import KEY, FeatureFile, PartialFile, check_new, create_partial
from protoprune.features.featureset import FeatureSet, open_set
from protoprune.features.remoteset import local_copy
from protoprune.images.decode import ON_WHITE
from protoprune.images.listing import ImageList, is_feature_set

_COPY_ROWS = 65_536


@checked
def open_features(path: str | os.PathLike[str]) -> FeatureFile | FeatureSet:
    """The finished feature file or feature set; a run that was cut short gets an error that says how to finish it.

    A feature set by URL is copied to this machine first, see `remoteset`.
    """
    path = local_path(path)
    folder = os.path.splitext(path)[0]
    if os.path.isdir(path):
        return open_set(path)
    there = hdf5.there(path)
    if not os.path.exists(there) and is_feature_set(folder):
        raise UsageError(f"{path}: no such feature file; the feature set is {folder}: give that")
    file = FeatureFile(there)
    try:
        done = int(file.finished().sum())
        if done < file.n or there != path:
            raise ProtopruneError(
                f"{path}: not finished, {done:,} of {file.n:,} images are embedded; "
                "run the same `protoprune embed` again, it does the rest"
            )
    except BaseException:
        file.close()
        raise
    return file


def local_path(path: str | os.PathLike[str]) -> str:
    """Where a feature file or set is on this machine: of a set on a store its copy."""
    path = stores.given(path)
    if not stores.is_url(path):
        return path
    return local_copy(path)


def missing(path: str | os.PathLike[str], what: str = "image folder or feature file") -> ProtopruneError:
    """The error for a file that is not there: an unfinished feature file says how to finish it."""
    if os.path.exists(hdf5.partial_path(os.fspath(path))):
        try:
            open_features(path).close()
        except ProtopruneError as error:
            return error
    return UsageError(f"{path}: no such {what}")


@checked
def merge(folder: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Make one feature file of a set, with the same rows in the same order; returns their number.

    Shards that failed have no rows in it, of which is warned. Raises UsageError when `out` exists (unless `overwrite`),
    ProtopruneError when the set is not whole or the file cannot be written.
    """
    out = os.fspath(out)
    check_new(out, overwrite)
    with open_set(local_path(folder)) as whole, files.lock(out):
        (labels, classes, labels_from), left_out = whole._classes(), whole.left_out
        images = ImageList(
            root=whole.provenance["root"], paths=whole.paths, size=whole.size, mtime_ns=whole.mtime_ns, labels=labels,
            classes=classes, labels_from=labels_from, ctime_ns=whole.ctime_ns,
            left_out=[name for name, _ in left_out], why=[reason for _, reason in left_out],
        )  # fmt: skip
        key = {name: whole.provenance[name] for name in (*KEY, "shard_options") if name in whole.provenance}
        create_partial(out, images, whole.dim, {**key, "merged_from": whole.provenance["uuid"]})
        partial = PartialFile(out)
        try:
            content, status = whole.content, whole.status
            reasons = {path: reason for path, _, reason in whole.failures()}
            reasons |= {images.paths[int(row)]: ON_WHITE for row in np.flatnonzero(whole.transparent)}
            for start in range(0, whole.n, _COPY_ROWS):
                rows = np.arange(start, min(start + _COPY_ROWS, whole.n))
                said = [reasons.get(path, "") for path in images.paths[start : start + len(rows)]]
                partial.commit(rows, whole.features[start : start + len(rows)], status[rows], said, content[rows])
            partial.finish()
        except BaseException:
            partial.discard()
            raise
        return whole.n
