"""Shards: tars, zips, Parquet and Arrow files that hold images, on this machine or on an object store.

A source is a root and its shards; an opened shard is an `ImageList` whose images are read from it, so that everything
that embeds a folder embeds a shard. The id of an image is the shard's path relative to the root, a slash, and the
image's name in the shard (`train/0007.tar/cat/12.jpg`) or its row (`part-0.parquet/000123`). What is wrong with a shard
as a whole is a `ShardError`; what is wrong with one image is a status of that image.
"""

from protoprune.sources.finding import Shard, Source, find_shards, list_shards
from protoprune.sources.reading import ShardError, ShardImages, ShardOptions, open_shard

__all__ = ["Shard", "ShardError", "ShardImages", "ShardOptions", "Source", "find_shards", "list_shards", "open_shard"]
