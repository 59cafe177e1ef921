"""Shards: tars, zips, Parquet and Arrow files that hold images, on this machine or on an object store.

A source is a root and its shards; an opened shard is an `ImageList` whose images are read from it, so that everything
that embeds a folder embeds a shard. The id of an image is the shard's path relative to the root, a slash, and the
image's name in the shard (`train/0007.tar/cat/12.jpg`) or its row (`part-0.parquet/000123`). What is wrong with a shard
as a whole is a `ShardError`; what is wrong with one image is a status of that image.
"""

import os
from collections.abc import Iterable

from protoprune.arguments import checked
from protoprune.errors import ProtopruneError, UsageError
from protoprune.sources.finding import Shard, Source, local_list, local_shards
from protoprune.sources.reading import open_shard
from protoprune.sources.remote import find_remote, list_remote
from protoprune.sources.shard import ShardError, ShardImages, ShardOptions
from protoprune.stores import given

__all__ = [
    "Shard", "ShardError", "ShardImages", "ShardOptions", "Source", "find_shards", "list_shards", "open_shard",
    "shards_of",
]  # fmt: skip


@checked
def find_shards(spec: str | os.PathLike[str]) -> Source:
    """The shards that `spec` names.

    spec: a tar, zip, Parquet or Arrow file; a pattern ('shards/{0000..0099}.tar', 'shards/*.tar'); a folder of shards
    without images; a Hugging Face data set that was saved to disk; or any of these by URL. Raises UsageError for what
    is not there or holds images as files, ProtopruneError for what cannot be listed.
    """
    spec = os.fspath(spec)
    found = shards_of(spec)
    if found is None:
        what = "no shards there" if os.path.exists(spec) else "no such file or folder"
        raise UsageError(
            f"{spec}: {what}; give a tar, zip, Parquet or Arrow file, a folder of them or a pattern (images that are "
            "files of their own: list_folder, list_paths)"
        )
    return found


def shards_of(spec: str) -> Source | None:
    """The same, and None where it is a folder of images, a list of paths or nothing."""
    return find_remote(spec) if "://" in spec else local_shards(spec)


def list_shards(paths: Iterable[str], root: str | os.PathLike[str] | None = None) -> Source:
    """The shards of a list, absolute or relative to `root` (default: as for lists of images); or URLs, all of them."""
    paths = list(dict.fromkeys(path for path in paths if path))
    if not paths:
        raise ProtopruneError("the list of shards is empty; give one path a line")
    if any("://" in path for path in paths):
        return list_remote(paths, None if root is None else given(root))
    return local_list(paths, root)
