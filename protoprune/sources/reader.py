"""Single images by their ids, wherever they are: a file below the root, or an image in a shard there or on a store."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import NoReturn

from protoprune import stores
from protoprune.errors import ProtopruneError, warn
from protoprune.features.current import content_digest
from protoprune.files import leads_out
from protoprune.images.decode import ImageError, Status, open_at_once, read_bounded
from protoprune.sources.finding import Shard, shard_above
from protoprune.sources.reading import open_shard
from protoprune.sources.shard import ShardImages, ShardOptions
from protoprune.unpacking import TooMuchError

_OPEN = 8  # shards that stay open
_FETCHED = 2 << 30  # bytes of shards that are fetched from a store, in all


class ImageReader:
    """`reader(path)` gives the bytes of the image `path` below `root`, from any thread. Raises ImageError.

    `content` has the digests of what was embedded, by path: another image of the same name (or in the same row of a
    table that was written anew) is not taken for it. Shards below a URL are fetched, up to _FETCHED bytes of them;
    images of the others cannot be read, with a warning. A context manager: the copies are removed at its end.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        options: ShardOptions | None = None,
        content: Mapping[str, int] | None = None,
    ):
        self.root, self.options, self.content = stores.given(root), options or ShardOptions(), content or {}
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, tuple[ShardImages, dict[str, int]]] = OrderedDict()
        self._copies: dict[str, str] = {}  # shard -> its copy here
        self._holding = contextlib.ExitStack()  # the copies, for as long as the reader lives
        self._fetched, self._refused = 0, ""

    def __call__(self, path: str) -> bytes:
        data = self._read(path)
        if path in self.content and content_digest(data) != self.content[path]:
            raise ImageError(Status.CHANGED, "not the image that was embedded")
        return data

    def _read(self, path: str) -> bytes:
        if leads_out(path):  # a score table may hold any name
            raise ImageError(Status.MISSING, "the name leads out of the folder of the images")
        if stores.is_url(self.root):
            return self._from_shard(path)
        whole = os.path.join(self.root, path)
        try:
            with open(whole, "rb", opener=open_at_once) as file:
                return read_bounded(file, os.fstat(file.fileno()).st_size)
        except NotADirectoryError:
            return self._from_shard(path)
        except OSError as error:
            raise ImageError(Status.MISSING, error.strerror or "cannot be read") from None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._shards:
            self._shards.popitem()[1][0].close()
        self._copies.clear()
        self._holding.close()

    def _from_shard(self, path: str) -> bytes:
        if not (name := shard_above(path, self.root)):
            raise ImageError(Status.MISSING, "no such file or shard")
        with self._lock:  # reading too: a shard must not be closed meanwhile
            images, rows = self._opened(name)
            if path not in rows:
                raise ImageError(Status.MISSING, "not in its shard")
            return images.read(rows[path])

    def _opened(self, name: str) -> tuple[ShardImages, dict[str, int]]:
        if name in self._shards:
            self._shards.move_to_end(name)
            return self._shards[name]
        where = self._copy(name) if stores.is_url(self.root) else os.path.join(self.root, name)
        images = open_shard(Shard(name, where, 0, 0), where, self.options, self.root)
        self._shards[name] = images, {path: row for row, path in enumerate(images.paths)}
        if len(self._shards) > _OPEN:
            self._shards.popitem(last=False)[1][0].close()
        return self._shards[name]

    def _copy(self, name: str) -> str:
        """The copy of a shard on a store."""
        from protoprune.sources.remote import fetched

        if name in self._copies:
            return self._copies[name]
        if self._refused:
            raise ImageError(Status.UNREADABLE, self._refused)
        url = stores.below(self.root, name)
        try:
            size = stores.size(url)
        except ProtopruneError as error:
            self._refuse(str(error))
        if size is None:
            raise ImageError(Status.MISSING, "no such shard on the store")
        if self._fetched + size > _FETCHED:
            self._refuse(f"{stores.public(url)} and further shards are not fetched: more than {_FETCHED:,} bytes")
        self._fetched += size
        try:
            self._copies[name] = self._holding.enter_context(fetched(Shard(name, url, size, 0)))
        except TooMuchError as error:
            self._refuse(f"{stores.public(url)}: {error}")
        return self._copies[name]

    def _refuse(self, why: str) -> NoReturn:
        self._refused = why
        warn(f"{why}; their images are not shown")
        raise ImageError(Status.UNREADABLE, why)
