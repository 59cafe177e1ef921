"""Object stores and other places by URL, through fsspec: what lies there, getting it, and putting it there whole.

Credentials come from where fsspec's file systems take them (the environment, ~/.aws, …) and appear in no message and no
file: URLs are shown without user, password and query. Every kind of trouble is one line that names the way on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

from protoprune.errors import ProtopruneError, UsageError

T = TypeVar("T")
_ANSWER_SECONDS = 30  # for a listing; a store that does not answer must not hang the program
_SILENCE_SECONDS = 60  # within a download
_SECRETS = re.compile(r"(?<=://)[^/@\s]*@|[?#]\S*")
_ERRNO = re.compile(r"^\[Errno -?\d+\] ")
_BUSY = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO))  # what s3fs makes of 503 and of 500
_USER = re.compile(r"(?<=://)[^/@\s]*@")
_AMAZON, _GOOGLE, _WEB = ("s3", "s3a"), ("gs", "gcs"), ("http", "https")
_OBJECTS = (*_AMAZON, *_GOOGLE, "memory")
_COLLAPSED = re.compile(r"([a-z][a-z0-9+]+):/+(?=[^/])")
# Where an object appears when all of it has arrived; elsewhere a file is put under another name and renamed.
_WHOLE = (*_OBJECTS, "az", "abfs", "abfss", "adl", "oss", "oci")

# What tells an object from another one of its name, where listings and single answers are known to agree on it.
_MARKS = dict.fromkeys(_AMAZON, "ETag") | dict.fromkeys(_GOOGLE, "etag")


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def given(path: str | os.PathLike[str]) -> str:
    """A path or URL as the user wrote it: `pathlib` makes s3:/bucket of s3://bucket. file:// is a path."""
    path = os.fspath(path)
    match = _COLLAPSED.match(path)
    if not match or os.path.exists(path):
        return path
    rest = path[match.end() :].rstrip("/")
    return f"/{rest}" if match[1] == "file" else f"{match[1]}://{rest}"


def refuse_url(path: str | os.PathLike[str], option: str = "") -> None:
    """Raise UsageError for a URL as the name of what is written, which as a path would be a folder called `s3:`."""
    url = given(path)
    if url != os.fspath(path) and not is_url(url):
        raise UsageError(f"{option}file://{url}: give the path itself, {url}")
    if is_url(url):
        raise UsageError(
            f"{option}{public(url)}: only feature sets of shards are written to a URL; write to this machine, and copy "
            "it"
        )


def public(url: str) -> str:
    """A URL without user, password, query and fragment; a path as it is. The names of objects may hold ? and #."""
    if _protocol(url) in _OBJECTS:
        return _USER.sub("", url)
    return _SECRETS.sub("", url) if is_url(url) else url


def below(root: str, name: str) -> str:
    """The URL of a file below a root, which keeps its query: a signature may be for a whole folder."""
    path = without_query(root)
    return f"{path.rstrip('/')}/{name}{root[len(path) :]}"


def without_query(url: str) -> str:
    """A URL of the web without its query; elsewhere ? is part of a name, or a wildcard."""
    return url.partition("?")[0] if _protocol(url) in _WEB else url


def names_version(url: str) -> bool:
    """Whether a URL is of one version of an object, which s3fs would pass over in silence."""
    return _protocol(url) in _AMAZON and "?versionId=" in url


def store(url: str) -> Any:
    """The fsspec file system of a URL."""
    protocol = _protocol(url)
    if protocol in _MARKS and "@" in url.partition("://")[2].partition("/")[0]:
        raise UsageError(
            f"{public(url)}: credentials in a URL would end up in histories and logs; set them as your store's tools "
            "expect (AWS_PROFILE or AWS_ACCESS_KEY_ID …), and leave them out of the URL"
        )
    if names_version(url):
        raise UsageError(
            f"{public(url)}: one version of an object is not read; leave ?versionId= out for the newest, or copy that "
            "version (aws s3api get-object --version-id)"
        )
    try:
        import fsspec
    except ImportError:
        raise ProtopruneError(
            f"{public(url)}: URLs need fsspec, which is not installed; pip install 'protoprune[remote]'"
        ) from None
    options: dict[str, Any] = {}
    if protocol in _GOOGLE and "GCSFS_DEBUG" not in os.environ:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints whole tracebacks of what it raises as well
    if protocol in _AMAZON:  # botocore's own limits are minutes
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}
    try:
        if protocol in _WEB:  # aiohttp's limit is five minutes for a whole shard, however fast it arrives
            import aiohttp

            times = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_SECONDS)
            options["client_kwargs"] = {"timeout": times}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ProtopruneError(f"{public(url)}: {error}; pip install what {protocol}:// needs") from None
    except ValueError:
        raise UsageError(f"{public(url)}: no file system for {protocol}://; see fsspec's list of protocols") from None


def answered(url: str, ask: Callable[[], T]) -> T:
    """What the store answers, in time; every kind of trouble as one line that names the way on."""
    answer: list[tuple[T, None] | tuple[None, BaseException]] = []

    def run() -> None:
        try:
            answer.append((ask(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not answer:
        raise ProtopruneError(
            f"{public(url)}: no answer within {_ANSWER_SECONDS} seconds; check the network and the URL{_and_keys(url)}"
        )
    error = answer[0][1]
    if error is None:
        return cast(T, answer[0][0])
    if isinstance(error, (ProtopruneError, KeyboardInterrupt)):
        raise error
    raise ProtopruneError(f"{public(url)}: {trouble(error, url)}") from None


def refused(error: FileNotFoundError, url: str) -> BaseException | None:
    """What a web server said instead of a file; None where it is not there. fsspec calls both by one name."""
    cause = error.__cause__ if _protocol(url) in _WEB else None
    if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
        return None
    return cause


# Kinds of trouble in what stores say, as 'Class: text', where no status says it; the first that fits.
_TROUBLES: tuple[tuple[tuple[type[BaseException], ...], str, str], ...] = (
    ((), ": .*(401|nvalid authentication|(?i:nvalid credentials))",
     "the credentials are not accepted, or have expired ({text}); renew them and run it again"),
    ((), "^[^:]*NoCredentials|: .*(?i:credentials)", "no credentials; {credentials}"),
    ((), ": .*xpired", "the credentials have expired ({text}); renew them and run it again"),
    ((PermissionError,), ": .*(Forbidden|Denied|403)",
     "permission denied ({text}); check the credentials' rights to list, read and, for -o, write"),
    ((FileNotFoundError,), ": .*does not exist", "no such bucket, folder or file; check the URL"),
    ((ConnectionError, TimeoutError), "onnect", "cannot be reached ({text}); check the network{endpoint}"),
)  # fmt: skip


def trouble(error: BaseException, url: str = "") -> str:
    """An exception of a store in words, without secrets, and what to do about it."""
    text = _ERRNO.sub("", _SECRETS.sub("", " ".join(str(error).split())))[:160] or type(error).__name__
    kind = type(error).__name__
    status = getattr(error, "status", 0)  # of an answer of the web
    status = status if isinstance(status, int) else 0
    if kind == "TooManyRedirects":
        return "the server redirects without end; check the URL"
    if status in (401, 403) and _protocol(url) in _WEB:
        return f"the server refuses it ({text}); a signed URL may have expired"
    if status == 429 or status >= 500 or getattr(error, "errno", None) in _BUSY:
        return f"the server has no answer now ({text}); run the same again later"
    for kinds, words, told in _TROUBLES:
        if isinstance(error, kinds) or re.search(words, f"{kind}: {text}"):
            amazon = _protocol(url) in (*_AMAZON, "")
            endpoint = ", the URL and the endpoint (AWS_ENDPOINT_URL)" if amazon else " and the URL"
            return told.format(text=text, credentials=_set_credentials(url), endpoint=endpoint)
    return text


def _set_credentials(url: str) -> str:
    if _protocol(url) in _GOOGLE:
        return (
            "set them as Google's tools expect (gcloud auth application-default login, or "
            "GOOGLE_APPLICATION_CREDENTIALS), or FSSPEC_GS_TOKEN=anon for a public bucket"
        )
    if url.startswith("hf://"):
        return "log in with `hf auth login`, or set HF_TOKEN"
    return (
        "set them as your store's tools expect (AWS_PROFILE or AWS_ACCESS_KEY_ID …), or FSSPEC_S3_ANON=true for a "
        "public bucket"
    )


def _and_keys(url: str) -> str:
    """Google's library looks for credentials in many places, and asks a server for them, before it gives up."""
    return f", and the credentials: {_set_credentials(url)}" if _protocol(url) in _GOOGLE else ""


# --- files ------------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a store says of a file."""

    size: int  # bytes
    mark: str  # another one for other content (the etag); '' where the store has none


def seen(url: str) -> Seen | None:
    """What the store says of a file; None when it is not there."""

    def ask(there: Any, path: str) -> Seen | None:
        there.invalidate_cache(posixpath.dirname(path))
        found = there.info(path)
        return _seen(url, found) if found["type"] == "file" else None

    return _of_one(url, ask)


def _seen(url: str, facts: dict[str, Any]) -> Seen:
    mark = facts.get(_MARKS.get(_protocol(url), ""), "")
    return Seen(int(facts["size"] or 0), str(mark or ""))


def size(url: str) -> int | None:
    """Bytes of a file; None when it is not there."""
    found = seen(url)
    return None if found is None else found.size


def read(url: str, count: int | None = None) -> bytes | None:
    """What is in a file, or its first `count` bytes; None when it is not there."""
    return _of_one(url, lambda there, path: there.cat_file(path, end=count))


def _of_one(url: str, ask: Callable[[Any, str], T]) -> T | None:
    def run() -> T | None:
        there, path = store(url), _path(url)
        try:
            return ask(there, path)
        except FileNotFoundError as error:
            if why := refused(error, url):
                raise why from None
            return None
        except OSError:  # S3 answers HEAD without a word of why; a listing is told it
            there.ls(posixpath.dirname(path))
            raise

    return answered(url, run)


def read_all(urls: Iterable[str]) -> list[bytes | None]:
    """What is in many small files, asked for at once where the store can; None for what is not there."""
    urls = list(urls)
    if not urls:
        return []
    there, paths = store(urls[0]), [_path(url) for url in urls]
    found = there.cat(paths, on_error="return")
    results = []
    for url, path in zip(urls, paths, strict=True):
        data = found.get(path)
        if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
            raise ProtopruneError(f"{public(url)}: {trouble(data, url)}") from None
        results.append(data if isinstance(data, bytes) else None)
    return results


def listed(folder: str) -> dict[str, Seen]:
    """Path relative to a folder -> what the store says of it, of every file below it."""

    def ask() -> dict[str, Seen]:
        there, base = store(folder), _path(folder).rstrip("/")
        there.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = there.find(base, detail=True)
            return {posixpath.relpath(path, base): _seen(folder, one) for path, one in found.items()}
        return {}

    return answered(folder, ask)


def write(url: str, data: bytes, *, new: bool = False) -> None:
    """Put a small file there, whole. `new`: FileExistsError when it is there already."""
    _put(url, lambda there, path, options: there.pipe_file(path, data, **options), new)


def put(local: str, url: str, *, new: bool = False) -> None:
    """Put a file of this machine there, whole. `new`: FileExistsError when it is there already."""
    _put(url, lambda there, path, options: there.put_file(local, path, **options), new)


def get(url: str, local: str) -> None:
    """Fetch a file."""
    try:
        store(url).get_file(_path(url), local)
    except Exception as error:  # every file system raises its own
        raise ProtopruneError(f"{public(url)}: {trouble(error, url)}") from None


def remove(url: str) -> None:
    with contextlib.suppress(Exception):
        store(url).rm_file(_path(url))


def _put(url: str, how: Callable[[Any, str, dict[str, str]], object], new: bool) -> None:
    """As one object where the store makes it visible when all of it has arrived, else under another name first.

    Of two writers of a new file on S3 the store itself refuses the second (If-None-Match); elsewhere the second may
    replace what the first wrote a moment before.
    """
    there, path, protocol = store(url), _path(url), _protocol(url)
    try:
        if new and protocol not in _AMAZON and there.exists(path):
            raise FileExistsError(path)
        if protocol in _WHOLE:
            how(there, path, {"mode": "create"} if new and protocol in _AMAZON else {})
        else:
            there.makedirs(posixpath.dirname(path), exist_ok=True)
            beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                how(there, beside, {})
                there.mv(beside, path)
            except BaseException:
                remove(f"{protocol}://{beside}")
                raise
    except FileExistsError:
        raise
    except Exception as error:
        if "PreconditionFailed" in f"{type(error).__name__} {error}" or "onditionalRequestConflict" in str(error):
            raise FileExistsError(path) from None
        raise ProtopruneError(f"{public(url)}: {trouble(error, url)}; what was written before is kept") from None
    there.invalidate_cache(posixpath.dirname(path))


def _path(url: str) -> str:
    return store(url)._strip_protocol(url)
