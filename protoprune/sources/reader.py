"""Single images by their ids, wherever they are: a file below the root, or an image in a shard there."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from protoprune.decode import ImageError, Status, open_at_once, read_bounded
from protoprune.files import leads_out
from protoprune.sources.finding import Shard
from protoprune.sources.reading import ShardError, ShardImages, ShardOptions, open_shard

_OPEN = 8  # shards that stay open


class ImageReader:
    """`reader(path)` gives the bytes of the image `path` below `root`, from any thread. Raises ImageError.

    Shards on an object store are not fetched for single images.
    """

    def __init__(self, root: str | os.PathLike[str], options: ShardOptions | None = None):
        self.root, self.options = os.fspath(root), options or ShardOptions()
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, tuple[ShardImages, dict[str, int]]] = OrderedDict()

    def __call__(self, path: str) -> bytes:
        if leads_out(path):  # a score table may hold any name
            raise ImageError(Status.MISSING, "the name leads out of the folder of the images")
        whole = os.path.join(self.root, path)
        try:
            with open(whole, "rb", opener=open_at_once) as file:
                return read_bounded(file, os.fstat(file.fileno()).st_size)
        except NotADirectoryError:
            return self._from_shard(path)
        except OSError as error:
            raise ImageError(Status.MISSING, error.strerror or "cannot be read") from None

    def _from_shard(self, path: str) -> bytes:
        end = path.find("/")
        while end > 0 and not os.path.isfile(os.path.join(self.root, path[:end])):
            end = path.find("/", end + 1)
        if end <= 0:
            raise ImageError(Status.MISSING, "no such file or shard")
        with self._lock:  # reading too: a shard must not be closed meanwhile
            images, rows = self._opened(path[:end])
            if path not in rows:
                raise ImageError(Status.MISSING, "not in its shard")
            return images.read(rows[path])

    def _opened(self, name: str) -> tuple[ShardImages, dict[str, int]]:
        if name in self._shards:
            self._shards.move_to_end(name)
            return self._shards[name]
        where = os.path.join(self.root, name)
        try:
            images = open_shard(Shard(name, where, 0, 0), where, self.options, self.root)
        except ShardError as error:
            raise ImageError(error.status, error.reason) from None
        self._shards[name] = images, {path: row for row, path in enumerate(images.paths)}
        if len(self._shards) > _OPEN:
            self._shards.popitem(last=False)[1][0].close()
        return self._shards[name]
