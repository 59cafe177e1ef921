"""One shard, on this machine -> its images: where each of them is, its class, and what is wrong with it.

Nothing is read twice and nothing is unpacked to the disk but what cannot be read at any place: the tar inside a .tar.gz
and the image column of a Parquet file go to an unnamed temporary file (in $TMPDIR), a tar and a zip are read as they
are. A file is taken for what its content is, whatever its name.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
from collections.abc import Callable
from typing import IO

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.files import leads_out
from protoprune.formats import archive_kind
from protoprune.images.decode import ImageError, Status, size_and_times
from protoprune.images.listing import FOLDERS, folder_labels
from protoprune.sources.archives import read_tar, read_zip
from protoprune.sources.finding import Shard
from protoprune.sources.shard import Found, ShardError, ShardImages, ShardOptions, reason_of
from protoprune.sources.tables import read_table
from protoprune.text import native
from protoprune.unpacking import Spool, TooMuchError

_UNPACK: dict[str, Callable[[IO[bytes]], io.BufferedIOBase]] = {
    "a gzip file": lambda file: gzip.GzipFile(fileobj=file), "a bzip2 file": bz2.BZ2File, "an xz file": lzma.LZMAFile,
}  # fmt: skip


def open_shard(shard: Shard, path: str, options: ShardOptions, root: str) -> ShardImages:
    """The images of the shard whose file is `path`. Raises ShardError when it cannot be used as a whole."""
    try:
        with contextlib.ExitStack() as failed:
            stack = failed.enter_context(contextlib.ExitStack())  # what is open, and will be when tables are read on
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
            unchanged = _unchanged(file.fileno())
            found = _open(path, file, options, stack)
            unchanged()
            if not found.names:
                kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in found.skipped.most_common(4))
                raise ShardError(Status.EMPTY, f"holds no images{f' (but {kinds})' if kinds else ''}")
            images = _images(shard, found, options, root, stack, unchanged)
            failed.pop_all()
            return images
    except ImageError as error:
        raise ShardError(error.status, error.reason) from None
    except FileNotFoundError:
        raise ShardError(Status.MISSING, "no such file") from None
    except TooMuchError as error:
        raise ShardError(Status.TOO_LARGE, str(error)) from None
    except EOFError as error:
        raise ShardError(Status.TRUNCATED, reason_of(error, "the compressed data")) from None
    except OSError as error:
        status = Status.UNREADABLE if error.errno else Status.CORRUPT  # without a number it is of what is in the file
        raise ShardError(status, error.strerror or reason_of(error, "the file")) from None
    except MemoryError:
        raise ShardError(Status.UNREADABLE, "not enough memory to read what it says of itself") from None
    except NotImplementedError as error:
        raise ShardError(Status.UNSUPPORTED, reason_of(error, "the archive")) from None
    except ProtopruneError:
        raise
    except Exception as error:  # tarfile, zipfile and pyarrow stumble over damage in every way
        raise ShardError(Status.CORRUPT, reason_of(error, "the file")) from None


def _unchanged(handle: int) -> Callable[[], None]:
    """A check that an open file is what it is now: raises ImageError once it was written to."""
    before = size_and_times(os.fstat(handle))[:2]

    def check() -> None:
        try:
            now = size_and_times(os.fstat(handle))[:2]
        except OSError as error:
            raise ImageError(Status.UNREADABLE, error.strerror or "cannot read the shard") from None
        if now != before:
            raise ImageError(Status.CHANGED, "the shard changed while it was read")

    return check


def _open(path: str, file: IO[bytes], options: ShardOptions, stack: contextlib.ExitStack) -> Found:
    head = file.read(512)
    kind = archive_kind(head)
    file.seek(0)
    if kind is not None and kind in _UNPACK:
        file = _unpacked(path, _UNPACK[kind](file), stack)
        kind = archive_kind(file.read(512))
        file.seek(0)
    if kind == "a tar archive":
        return read_tar(file, options)
    if kind == "a zip archive":
        return read_zip(file, options, stack)
    if kind in ("a Parquet file", "an Arrow file"):
        return read_table(path, file, options, stack)
    raise _no_shard(path, file, head, kind)


def _unpacked(path: str, packed: io.BufferedIOBase, stack: contextlib.ExitStack) -> IO[bytes]:
    """What is in a packed file, in a temporary one."""
    spool = Spool(os.path.getsize(path), stack)
    with packed:
        while data := packed.read(1 << 20):
            spool.add(data)
    spool.flush()
    spool.file.seek(0)
    return spool.file


def _no_shard(path: str, file: IO[bytes], head: bytes, kind: str | None) -> ShardError:
    """What is wrong with a file that is none of them; `head` is how it begins."""
    if not head:
        return ShardError(Status.EMPTY, "the file has zero bytes")
    zeros = path.lower().endswith((".tar", ".zip")) and not any(head)
    if zeros and path.lower().endswith(".tar"):  # as tar writes one of nothing: its end, and no more
        whole = file.read(10_241)
        if len(whole) <= 10_240 and len(whole) % 512 == 0 and not any(whole):
            return ShardError(Status.EMPTY, "a tar without members")
    begins = "begins with zeros" if zeros else kind or f"begins with {head[:12]!r}"
    return ShardError(Status.CORRUPT, f"{begins}: not a tar, zip, Parquet or Arrow file")


def _images(
    shard: Shard,
    found: Found,
    options: ShardOptions,
    root: str,
    stack: contextlib.ExitStack,
    unchanged: Callable[[], None],
) -> ShardImages:
    """Sorted by id, with classes."""

    def read(row: int) -> bytes:
        try:
            data = found.read(order[row])
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # as when it is opened
            raise ImageError(Status.CORRUPT, reason_of(error, "the shard")) from None
        unchanged()
        return data

    n = len(found.names)
    names = [native(name) for name in found.names]
    order = sorted(range(n), key=lambda i: os.fsencode(names[i]))
    names = [names[i] for i in order]
    for one, other in itertools.pairwise(names):
        if one == other:
            raise ShardError(Status.CORRUPT, f"two images have the id {one}; choose another --id-column, or none")
    if (outside := next(filter(leads_out, names), None)) is not None:
        raise ShardError(Status.CORRUPT, f"an image has the id {outside!r}, no path; choose another --id-column")
    label, classes, source = _classes(names, [native(found.labels[i]) for i in order], found.labels_from, options)
    place = {old: new for new, old in enumerate(order)}
    return ShardImages(
        root=root,
        paths=[f"{shard.name}/{name}" for name in names],
        size=np.array([found.sizes[i] for i in order], np.int64),
        mtime_ns=np.full(n, shard.version, np.int64),
        ctime_ns=np.full(n, shard.ctime_ns, np.int64),
        labels=label,
        classes=classes,
        labels_from=source,
        labels_asked=(options.labels, options.label_column, options.class_level) != (True, None, None),
        skipped=found.skipped,
        left_out=[f"{shard.name}/{name}" for name, _ in found.left_out],
        why=[why for _, why in found.left_out],
        duplicates=found.duplicates,
        links=found.links,
        reader=read,
        beside=found.beside,
        failed={place[old]: why for old, why in found.failed.items()},
        closing=stack,
    )


def _classes(
    names: list[str], labels: list[str], source: str, options: ShardOptions
) -> tuple[np.ndarray, list[str], str]:
    """(label of each image, classes, where from): those beside the images, else the folders inside the shard.

    One shard cannot know whether its folders are classes: it may hold a single one. `featureset` decides for all.
    """
    none: tuple[np.ndarray, list[str], str] = np.full(len(names), -1, np.int32), [], ""
    if not options.labels:
        return none
    if options.class_level is None and any(labels):
        classes = sorted(set(labels) - {""})
        index = {"": -1, **{name: number for number, name in enumerate(classes)}}
        return np.array([index[one] for one in labels], np.int32), classes, source
    if options.label_column is not None:  # folders are not what was asked for
        return none
    label, classes = folder_labels(names, options.class_level or 1)
    where = f"folders of level {options.class_level} in the shards" if options.class_level else FOLDERS
    return (label, classes, where) if classes else none
