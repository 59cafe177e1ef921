"""Shards on an object store, by URL, through fsspec: listing them, and one at a time on this machine's disk.

A shard is fetched whole into a temporary file and read there as any other: one request instead of thousands, and what
arrives can be checked against the size that the store says. Talking to the store is for `stores`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from protoprune import files, stores
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import Status
from protoprune.images.listing import describe_counts, image_suffixes
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
from protoprune.sources.shard import ShardError
from protoprune.stores import without_query
from protoprune.unpacking import no_room

_TRIES = 3
_AT_ONCE = 200  # files that a web server is asked for before it counts as silent
# What tells a file from another one of its name, in the words of each file system; the surest first.
_MARKS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "blob_id", "sha", "mtime", "LastModified", "Last-Modified",
    "last_modified", "modificationTime", "modified", "modify", "updated", "created",
)  # fmt: skip


def find_remote(url: str) -> Source | None:
    """The shards of a URL: one file, a pattern or a folder. See `shards_of`."""
    if url.startswith("file://"):
        return local_shards(url.removeprefix("file://"))
    skipped: Counter[str] = Counter()
    store = stores.store(url)
    store.invalidate_cache()  # of listings of an earlier call in this process
    root, found = stores.answered(url, lambda: _find(store, url, skipped))
    pictures = {suffix: count for suffix, count in skipped.items() if suffix in image_suffixes()}
    if not found and pictures:
        raise UsageError(
            f"{stores.public(url)}: holds images ({describe_counts(Counter(pictures))}) and no shard; images are read "
            "from stores in shards only: pack them into tars, or copy them here"
        )
    if not found:
        kinds = ", ".join(SUFFIXES[:2])
        raise UsageError(
            f"{stores.public(url)}: matches no shard; check the URL, and give a folder of {kinds} …, or a pattern"
        )
    return _source(store, url, root, found, skipped)


def list_remote(urls: Sequence[str], root: str | None = None) -> Source:
    """The shards of a list of URLs; ids are relative to `root`, by default the deepest folder that they share."""
    kind = urls[0].partition("://")[0]
    if odd := next((url for url in urls if not url.startswith(f"{kind}://")), None):
        raise UsageError(
            f"{stores.public(odd)}: in one list with {stores.public(urls[0])}; list shards of one store at a time"
        )
    if root is None:
        folders = [posixpath.dirname(without_query(url)).replace("://", "/", 1) for url in urls]
        root = posixpath.commonpath(folders).replace("/", "://", 1)
    if "://" not in root:
        raise UsageError(f"{stores.public(urls[0])}: the list names several servers or buckets; embed one at a time")
    store = stores.store(next((url for url in urls if stores.names_version(url)), urls[0]))
    store.invalidate_cache()
    found = [store._strip_protocol(url) for url in urls]
    outside = next(
        (url for url in urls if not without_query(url).startswith(without_query(root).rstrip("/") + "/")), None
    )
    if outside is not None:
        raise UsageError(f"{stores.public(outside)}: outside the root {stores.public(root)}")
    return _source(store, urls[0], root, found, Counter())


def _find(store: Any, url: str, skipped: Counter[str]) -> tuple[str, list[str]]:
    """(root, paths on the store)."""
    if is_pattern(without_query(url)) and not _is_there(store, url):
        found = []
        for one in expand(url):
            path = store._strip_protocol(one)
            found += sorted(store.glob(path)) if any(mark in without_query(path) for mark in "*?[") else [path]
        return fixed_part(without_query(url)), found
    path = store._strip_protocol(url)
    web = "http" in store.protocol  # where looking whether it is a folder would fetch all of a shard
    if not (web and without_query(url).lower().endswith(SUFFIXES)) and store.isdir(path):
        return url.rstrip("/"), pick_shards(store.find(path), skipped)
    return without_query(url).rpartition("/")[0], [path]


def _is_there(store: Any, url: str) -> bool:
    """Whether a URL that looks like a pattern is a name: stores take brackets and question marks in names."""
    if not any(mark in without_query(url) for mark in "[?") or "*" in url:
        return False
    with contextlib.suppress(Exception):
        return bool(store.exists(store._strip_protocol(url)))
    return False


def _source(store: Any, url: str, root: str, found: list[str], skipped: Counter[str]) -> Source:
    base = store._strip_protocol(root).rstrip("/")
    found = list(dict.fromkeys(found))
    facts = _facts(store, url, found)
    shards = [_shard(store, path, base, facts.get(path)) for path in found]
    if all(shard.size < 0 for shard in shards):
        why = next((shard.trouble for shard in shards if shard.trouble), "")
        cannot = f"cannot be read: {why}" if why else "not there; check the URL"
        raise ProtopruneError(
            f"{stores.public(url)}: {cannot}"
            if len(shards) == 1
            else f"{stores.public(url)}: none of the {len(shards):,} shards {'can' if why else 'is'} "
            f"{cannot.removeprefix('cannot ').removeprefix('not ')}"
        )
    return Source(stores.public(root), in_order(shards), skipped)


def _facts(store: Any, url: str, paths: list[str]) -> dict[str, dict[str, Any] | str]:
    """path -> what the store says of it, or why it says nothing; by folder, since a request for each of 10,000 shards
    takes minutes, and where there are no folders many at once."""
    facts: dict[str, dict[str, Any] | str] = {}
    sizes = Counter(posixpath.dirname(path) for path in paths)
    whole = {folder for folder, count in sizes.items() if count > 1 and "http" not in store.protocol}
    for folder in sorted(whole):
        facts |= stores.answered(url, partial(_listed, store, folder))
    facts |= _asked(store, url, [path for path in paths if posixpath.dirname(path) not in whole])
    return {path: one for path, one in facts.items() if isinstance(one, str) or one.get("type", "file") == "file"}


def _asked(store: Any, url: str, paths: list[str]) -> dict[str, dict[str, Any] | str]:
    """The same of single files, `_AT_ONCE` at a time; where there is trouble once more, and once more."""
    facts: dict[str, dict[str, Any] | str] = {}
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(attempt)
        for path in paths:
            facts.pop(path, None)
        for first in range(0, len(paths), _AT_ONCE):
            facts |= stores.answered(url, partial(_ask, store, url, paths[first : first + _AT_ONCE]))
        paths = [path for path in paths if isinstance(facts.get(path), str)]
        if not paths:
            break
    return facts


def _listed(store: Any, folder: str) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return {one["name"]: one for one in store.ls(folder, detail=True)}
    return {}


def _ask(store: Any, url: str, paths: list[str]) -> dict[str, dict[str, Any] | str]:
    """What the store says of single files, or its trouble with them; nothing of one that is not there."""

    def one(path: str) -> dict[str, Any] | str | None:
        try:
            return store.info(path)
        except FileNotFoundError as error:
            why = stores.refused(error, url)
            return stores.trouble(why, url) if why else None
        except PermissionError as error:
            if len(paths) == 1:
                raise
            return stores.trouble(error, url)

    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        return {path: found for path, found in zip(paths, pool.map(one, paths), strict=True) if found is not None}


def _shard(store: Any, path: str, base: str, facts: dict[str, Any] | str | None) -> Shard:
    name = posixpath.relpath(without_query(path), without_query(base) or ".")
    if facts is None or isinstance(facts, str):
        return Shard(name, store.unstrip_protocol(path), -1, -1, trouble=facts or "")
    mark = next((facts[key] for key in _MARKS if facts.get(key)), "")
    version = int.from_bytes(hashlib.sha256(str(mark).encode()).digest()[:8], "big") >> 1
    return Shard(name, store.unstrip_protocol(path), int(facts.get("size") or 0), version)


@contextlib.contextmanager
def fetched(shard: Shard) -> Iterator[str]:
    """The path of a copy of a remote shard, for as long as the block lasts. Raises ShardError, and TooMuchError where
    this machine has no room for it, nor perhaps for any other."""
    with files.temporary_folder() as folder:
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
                if attempt == _TRIES and (full := no_room(error, os.path.dirname(folder))) is not None:
                    raise full from None
                if attempt == _TRIES:
                    raise ShardError(Status.UNREADABLE, stores.trouble(error, shard.url)) from None
                time.sleep(attempt)
        size = os.path.getsize(path)
        if shard.size not in (size, 0):
            raise ShardError(Status.TRUNCATED, f"{size:,} of {shard.size:,} bytes arrived")
        yield path


@contextlib.contextmanager
def local_copy(shard: Shard) -> Iterator[str]:
    """The path of a shard on this machine, which is its own where it lies here. Raises ShardError."""
    if "://" in shard.url:
        with fetched(shard) as path:
            yield path
    else:
        yield shard.url
