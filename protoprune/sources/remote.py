"""Shards on an object store, by URL, through fsspec: listing them, and one at a time on this machine's disk.

A shard is fetched whole into a temporary file and read there as any other: one request instead of thousands, and what
arrives can be checked against the size that the store says. Talking to the store is for `stores`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from protoprune import stores
from protoprune.decode import Status
from protoprune.errors import ProtopruneError, UsageError
from protoprune.sources.finding import (
    SUFFIXES,
    Shard,
    Source,
    expand,
    fixed_part,
    in_order,
    is_pattern,
    local_shards,
    pick_shards,
)
from protoprune.sources.reading import ShardError

_TRIES = 3


def find_remote(url: str) -> Source | None:
    """The shards of a URL: one file, a pattern or a folder. See `find_shards`."""
    if url.startswith("file://"):
        return local_shards(url.removeprefix("file://"))
    return stores.answered(url, lambda: _find(stores.store(url), url))


def _find(store: Any, url: str) -> Source:
    skipped: Counter[str] = Counter()
    if is_pattern(_path(url)):
        root, found = fixed_part(url), []
        for one in expand(url):
            path = store._strip_protocol(one)
            found += sorted(store.glob(path)) if any(mark in _path(path) for mark in "*?[") else [path]
    else:
        path = store._strip_protocol(url)
        if store.isdir(path):
            root, found = url.rstrip("/"), pick_shards(store.find(path), skipped)
        else:
            root, found = url.rpartition("/")[0], [path]
    if not found:
        kinds = ", ".join(SUFFIXES[:2])
        raise UsageError(f"{stores.public(url)}: matches no shard; give a folder of {kinds} …, or a pattern")
    base = store._strip_protocol(root).rstrip("/")
    facts = _facts(store, found)
    shards = [_shard(store, path, base, facts.get(path)) for path in dict.fromkeys(found)]
    if all(shard.size < 0 for shard in shards):
        raise ProtopruneError(f"{stores.public(url)}: none of the {len(shards):,} shards is there; check the URL")
    return Source(stores.public(root), in_order(shards), skipped)


def _path(url: str) -> str:
    """A URL without its query, in which ? is no wildcard."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _facts(store: Any, paths: list[str]) -> dict[str, dict[str, Any]]:
    """path -> what the store says of it; by folder, since a request for each of 10,000 shards takes minutes."""
    facts: dict[str, dict[str, Any]] = {}
    folders = Counter(posixpath.dirname(path) for path in paths)
    for folder, count in folders.items():
        if count > 1 and "http" not in store.protocol:
            with contextlib.suppress(FileNotFoundError):
                facts.update((one["name"], one) for one in store.ls(folder, detail=True))
    for path in paths:
        if folders[posixpath.dirname(path)] == 1 or "http" in store.protocol:
            with contextlib.suppress(FileNotFoundError):
                facts[path] = store.info(path)
    return {path: one for path, one in facts.items() if one.get("type", "file") == "file"}


def _shard(store: Any, path: str, base: str, facts: dict[str, Any] | None) -> Shard:
    name = posixpath.relpath(_path(path), _path(base) or ".")
    if facts is None:
        return Shard(name, store.unstrip_protocol(path), -1, -1)
    mark = next((facts[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated",
                                        "created") if facts.get(key)), "")  # fmt: skip
    version = int.from_bytes(hashlib.sha256(str(mark).encode()).digest()[:8], "big") >> 1
    return Shard(name, store.unstrip_protocol(path), int(facts.get("size") or 0), version)


@contextlib.contextmanager
def fetched(shard: Shard) -> Iterator[str]:
    """The path of a copy of a remote shard, for as long as the block lasts. Raises ShardError."""
    with tempfile.TemporaryDirectory(prefix="protoprune-") as folder:
        path = os.path.join(folder, "shard" + os.path.splitext(shard.name)[1])
        store = stores.store(shard.url)
        for attempt in range(1, _TRIES + 1):
            try:
                store.get_file(store._strip_protocol(shard.url), path)
                break
            except FileNotFoundError:
                raise ShardError(Status.MISSING, "no such file on the store") from None
            except PermissionError as error:
                raise ShardError(Status.UNREADABLE, stores.trouble(error, shard.url)) from None
            except Exception as error:  # every file system raises its own
                if attempt == _TRIES:
                    raise ShardError(Status.UNREADABLE, stores.trouble(error, shard.url)) from None
                time.sleep(attempt)
        size = os.path.getsize(path)
        if shard.size not in (size, 0):
            raise ShardError(Status.TRUNCATED, f"{size:,} of {shard.size:,} bytes arrived")
        yield path


class Copies:
    """Copies of remote shards on this machine's disk: the one in use, and the next one, fetched meanwhile."""

    def __init__(self) -> None:
        self._coming: _Coming | None = None

    @contextlib.contextmanager
    def of(self, shard: Shard, ahead: Shard | None = None) -> Iterator[str]:
        """The path of a shard on this machine; `ahead` is fetched from then on, the one that will be wanted next.

        Raises ShardError.
        """
        if "://" not in shard.url:
            yield shard.url
            return
        coming, self._coming = self._coming, None
        if coming is None or coming.shard != shard:
            if coming is not None:
                coming.drop()
            coming = _Coming(shard)
        try:
            path = coming.path()
            if ahead is not None and "://" in ahead.url and ahead.size >= 0:
                self._coming = _Coming(ahead)
            yield path
        finally:
            coming.drop()

    def close(self) -> None:
        """Forget what was fetched for nothing."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.drop()


class _Coming:
    """A shard on its way, in a thread, which keeps the copy until it is dropped."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._arrived, self._dropped = threading.Event(), threading.Event()
        self._path = ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        try:
            with fetched(self.shard) as self._path:
                self._arrived.set()
                self._dropped.wait()
        except BaseException as error:
            self._error = error
        finally:
            self._arrived.set()

    def path(self) -> str:
        """Where the copy is, as soon as it is there. Raises what the fetching raised."""
        self._arrived.wait()
        if self._error is not None:
            raise self._error
        return self._path

    def drop(self) -> None:
        self._dropped.set()
        if self._arrived.is_set():
            self._thread.join()  # it removes the copy
