"""Shards on an object store, by URL, through fsspec: listing them, and one at a time on this machine's disk.

A shard is fetched whole into a temporary file and read there as any other: one request instead of thousands, and what
arrives can be checked against the size that the store says. Credentials come from where fsspec's file systems take them
(the environment, ~/.aws, …) and appear in no message and no file: URLs are shown without user, password and query.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from protoprune.decode import Status
from protoprune.errors import ProtopruneError, UsageError
from protoprune.sources.finding import SUFFIXES, Shard, Source, expand, fixed_part, in_order, is_pattern, pick_shards
from protoprune.sources.reading import ShardError

_ANSWER_SECONDS = 30  # for a listing; a store that does not answer must not hang the program
_TRIES = 3
_SECRETS = re.compile(r"(?<=://)[^/@\s]*@|[?#]\S*")


def public(url: str) -> str:
    """A URL or a message without user, password, query and fragment."""
    return _SECRETS.sub("", url)


def find_remote(url: str) -> Source:
    """The shards of a URL: one file, a pattern or a folder. See `find_shards`."""
    if url.startswith("file://"):
        from protoprune.sources.finding import find_shards

        return find_shards(url.removeprefix("file://"))
    store = _store(url)
    return _answered(url, lambda: _find(store, url))


def _find(store, url: str) -> Source:
    skipped: Counter = Counter()
    if is_pattern(_path(url)):
        root, found = fixed_part(url), []
        for one in expand(url):
            path = store._strip_protocol(one)
            found += sorted(store.glob(path)) if any(mark in path for mark in "*?[") else [path]
    else:
        path = store._strip_protocol(url)
        if store.isdir(path):
            root, found = url.rstrip("/"), pick_shards(store.find(path), skipped)
        else:
            root, found = url.rpartition("/")[0], [path]
    if not found:
        raise UsageError(f"{public(url)}: matches no shard; give a folder of {', '.join(SUFFIXES[:2])} …, or a pattern")
    base = store._strip_protocol(root).rstrip("/")
    facts = _facts(store, found)
    shards = [_shard(store, path, base, facts.get(path)) for path in dict.fromkeys(found)]
    if all(shard.size < 0 for shard in shards):
        raise ProtopruneError(f"{public(url)}: none of the {len(shards):,} shards is there; check the URL")
    return Source(public(root), in_order(shards), skipped)


def _path(url: str) -> str:
    """A URL without its query, in which ? is no wildcard."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _facts(store, paths: list[str]) -> dict[str, dict]:
    """path -> what the store says of it; by folder, since a request for each of 10,000 shards takes minutes."""
    facts: dict[str, dict] = {}
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


def _shard(store, path: str, base: str, facts: dict | None) -> Shard:
    name = posixpath.relpath(_path(path), _path(base) or ".")
    if facts is None:
        return Shard(name, store.unstrip_protocol(path), -1, -1)
    mark = next((facts[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated",
                                        "created") if facts.get(key)), "")  # fmt: skip
    version = int.from_bytes(hashlib.sha256(str(mark).encode()).digest()[:8], "big") >> 1
    return Shard(name, store.unstrip_protocol(path), int(facts.get("size") or 0), version)


def _store(url: str):
    """The fsspec file system of a URL."""
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise ProtopruneError(
            f"{public(url)}: URLs need fsspec, which is not installed; pip install 'protoprune[remote]'"
        ) from None
    options = {}
    if protocol in ("s3", "s3a"):  # botocore's own limits are minutes
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ProtopruneError(f"{public(url)}: {error}; pip install what {protocol}:// needs") from None
    except ValueError:
        raise UsageError(f"{public(url)}: no file system for {protocol}://; see fsspec's list of protocols") from None


def _answered(url: str, ask: Callable[[], Source]) -> Source:
    """What the store answers, in time; every kind of trouble as one line that names the way on."""
    answer: list = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not answer:
        raise ProtopruneError(
            f"{public(url)}: no answer within {_ANSWER_SECONDS} seconds; check the network and the URL"
        )
    if isinstance(answer[0], BaseException):
        if isinstance(answer[0], (ProtopruneError, KeyboardInterrupt)):
            raise answer[0]
        raise ProtopruneError(f"{public(url)}: {trouble(answer[0])}") from None
    return answer[0]


def trouble(error: BaseException) -> str:
    """An exception of a store in words, without secrets, and what to do about it."""
    text = public(" ".join(str(error).split()))[:160] or type(error).__name__
    kind = type(error).__name__
    if "NoCredentials" in kind or "credentials" in text.lower():
        return (
            "no credentials; set them as your store's tools expect (AWS_PROFILE or AWS_ACCESS_KEY_ID …), "
            "or FSSPEC_S3_ANON=true for a public bucket"
        )
    if "xpired" in text:
        return f"the credentials have expired ({text}); renew them and run it again"
    if isinstance(error, PermissionError) or "Forbidden" in text or "Denied" in text or "403" in text:
        return f"permission denied ({text}); check the credentials' rights to list and read"
    if isinstance(error, FileNotFoundError) or "does not exist" in text:
        return "no such bucket, folder or file; check the URL"
    if "onnect" in kind or "onnect" in text or isinstance(error, (ConnectionError, TimeoutError)):
        return f"cannot be reached ({text}); check the network, the URL and the endpoint (AWS_ENDPOINT_URL)"
    return text


@contextlib.contextmanager
def fetched(shard: Shard) -> Iterator[str]:
    """The path of a copy of a remote shard, for as long as the block lasts. Raises ShardError."""
    with tempfile.TemporaryDirectory(prefix="protoprune-") as folder:
        path = os.path.join(folder, "shard" + os.path.splitext(shard.name)[1])
        store = _store(shard.url)
        for attempt in range(1, _TRIES + 1):
            try:
                store.get_file(store._strip_protocol(shard.url), path)
                break
            except FileNotFoundError:
                raise ShardError(Status.MISSING, "no such file on the store") from None
            except PermissionError as error:
                raise ShardError(Status.UNREADABLE, trouble(error)) from None
            except Exception as error:  # every file system raises its own
                if attempt == _TRIES:
                    raise ShardError(Status.UNREADABLE, trouble(error)) from None
                time.sleep(attempt)
        size = os.path.getsize(path)
        if shard.size not in (size, 0):
            raise ShardError(Status.TRUNCATED, f"{size:,} of {shard.size:,} bytes arrived")
        yield path
