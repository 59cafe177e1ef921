"""One shard, on this machine -> its images: where each of them is, its class, and what is wrong with it.

Nothing is read twice and nothing is unpacked to the disk but what cannot be read at any place: the tar inside a .tar.gz
and the image column of a Parquet file go to an unnamed temporary file (in $TMPDIR), a tar and a zip are read as they
are. A file is taken for what its content is, whatever its name. Python's `tarfile` ends quietly at a damaged header and
at a cut: both are looked for here.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import math
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from protoprune import formats
from protoprune.decode import ImageError, Status, check_bytes
from protoprune.errors import UsageError
from protoprune.files import leads_out
from protoprune.formats import archive_kind
from protoprune.images import ImageList, folder_labels, image_suffixes, why_no_image
from protoprune.sources.finding import Shard
from protoprune.sources.keys import key_of, levels, owner, stem_of
from protoprune.text import native, parse_json, plain_bytes

if TYPE_CHECKING:
    import pyarrow as pa

    Batches = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]  # names of columns -> the rows of these

_UNPACK: dict[str, Callable[[IO[bytes]], io.BufferedIOBase]] = {
    "a gzip file": lambda file: gzip.GzipFile(fileobj=file), "a bzip2 file": bz2.BZ2File, "an xz file": lzma.LZMAFile,
}  # fmt: skip
_LABEL_KEYS = ("label", "class", "cls", "class_name", "label_name", "category", "target")
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes", "content", "data")
_CUT = re.compile("footer|magic bytes|(?i:eof|expected to read)")  # what pyarrow says of a table that is cut short
_BATCH = 64  # rows of a Parquet file that are in memory at once
_WIDTH = 6  # digits of a row number in an id, at least
_LARGEST_SIDECAR = 1 << 20  # bytes of a .json that is read for its label
_SUFFIX = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of Pillow's names; others in lower case
_WITHOUT_COLUMNS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")


class ShardError(Exception):
    """A shard that cannot be used: its status and a reason."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class ShardOptions:
    """How shards are read: columns of Parquet and Arrow files, and where classes come from.

    label_column is also the key of a .json beside an image. labels=False: no classes. class_level: classes are the
    folders of that level inside the shard.
    """

    image_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    labels: bool = True
    class_level: int | None = None

    def as_text(self) -> str:
        """For a feature file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, provenance: dict[str, Any]) -> ShardOptions:
        """Those that a feature file was made with."""
        try:
            said = parse_json(provenance.get("shard_options", "{}"))
            given: dict[str, Any] = {one.name: said[one.name] for one in fields(cls) if one.name in said}
        except (ValueError, TypeError):
            return cls()
        plain = {name for name, value in given.items() if value is None or isinstance(value, (str, int))}
        return cls(**{name: given[name] for name in plain})

    def check(self, shards: Iterable[str]) -> None:
        """Raise UsageError for options that do nothing beside the others, or in shards of these names."""
        about_classes = [("--label-column", self.label_column), ("--class-level", self.class_level)]
        for option, value in about_classes:
            if value is not None and not self.labels:
                raise UsageError(f"--no-labels does not go with {option}")
        if self.label_column is not None and self.class_level is not None:
            raise UsageError("--label-column and --class-level: give the one that says where the classes are")
        if all(name.lower().endswith(_WITHOUT_COLUMNS) for name in shards):
            for option, value in (("--image-column", self.image_column), ("--id-column", self.id_column)):
                if value is not None:
                    raise UsageError(
                        f"{option} {value}: is for Parquet and Arrow files, and there is none; leave it out"
                    )


# Name in the shard -> (name, content) of what has the image's key and is none (.txt, .json, …); of a table the other
# columns, as .json.
Beside = Callable[[str], list[tuple[str, bytes]]]


Head = Callable[[], bytes | None]  # how a member begins; None for what is no regular file


@dataclass
class ShardImages(ImageList):
    """The images of one opened shard. Close it when they are read.

    `left_out` are the members that are no images and belong to none: there is no image with their key.
    """

    reader: Callable[[int], bytes] = field(kw_only=True)  # row -> bytes of the image
    beside: Beside = field(kw_only=True)
    failed: dict[int, tuple[Status, str]] = field(default_factory=dict)  # rows that need not be read
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def read(self, row: int) -> bytes:
        """The encoded image of a row. Raises ImageError."""
        if row in self.failed:
            raise ImageError(*self.failed[row])
        return self.reader(row)

    def close(self) -> None:
        self.closing.close()

    def __enter__(self) -> ShardImages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Found:
    """The images of a shard in any order; `names` are those inside the shard."""

    read: Callable[[int], bytes]  # place in this order -> bytes of the image
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # '' for none
    labels_from: str = ""
    failed: dict[int, tuple[Status, str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, why) of what is no image and beside none
    beside: Beside = lambda name: []


def open_shard(shard: Shard, path: str, options: ShardOptions, root: str) -> ShardImages:
    """The images of the shard whose file is `path`. Raises ShardError when it cannot be used as a whole."""
    stack = contextlib.ExitStack()
    try:
        found = _open(path, options, stack)
        if not found.names:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in found.skipped.most_common(4))
            raise ShardError(Status.EMPTY, f"holds no images{f' (but {kinds})' if kinds else ''}")
        return _images(shard, found, options, root, stack)
    except ShardError:
        stack.close()
        raise
    except FileNotFoundError:
        stack.close()
        raise ShardError(Status.MISSING, "no such file") from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        stack.close()
        cut = isinstance(error, EOFError)
        raise ShardError(Status.TRUNCATED if cut else Status.CORRUPT, _reason(error, "the compressed data")) from None
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        stack.close()
        raise ShardError(Status.CORRUPT, _reason(error, "the archive")) from None
    except OSError as error:
        stack.close()
        raise ShardError(Status.UNREADABLE, error.strerror or _reason(error, "the file")) from None
    except MemoryError:
        stack.close()
        raise ShardError(Status.UNREADABLE, "not enough memory to read what it says of itself") from None


def _open(path: str, options: ShardOptions, stack: contextlib.ExitStack) -> _Found:
    file: IO[bytes] = stack.enter_context(open(path, "rb"))  # noqa: SIM115 - closed with the shard
    head = file.read(512)
    kind = archive_kind(head)
    if not head:
        raise ShardError(Status.EMPTY, "the file has zero bytes")
    if kind is not None and kind in _UNPACK:
        file.seek(0)
        packed, file = file, stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with _UNPACK[kind](packed) as unpacked:
            shutil.copyfileobj(unpacked, file, 1 << 20)
        file.seek(0)
        kind = archive_kind(file.read(512))
    file.seek(0)
    if kind == "a tar archive":
        return _tar(file, options)
    if kind == "a zip archive":
        return _zip(file, options, stack)
    if kind in ("a Parquet file", "an Arrow file") or head.startswith(b"\xff\xff\xff\xff"):  # an Arrow stream
        return _table(path, file, options, stack)
    if path.lower().endswith(".tar") and not any(head):  # as tar writes one of nothing: its end, and no more
        whole = file.read(10_241)
        if len(whole) <= 10_240 and len(whole) % 512 == 0 and not any(whole):
            raise ShardError(Status.EMPTY, "a tar without members")
    if path.lower().endswith((".tar", ".zip")) and not any(head):
        raise ShardError(Status.CORRUPT, "begins with zeros: not a tar, zip, Parquet or Arrow file")
    raise ShardError(Status.CORRUPT, f"{kind or f'begins with {head[:12]!r}'}: not a tar, zip, Parquet or Arrow file")


def _images(shard: Shard, found: _Found, options: ShardOptions, root: str, stack: contextlib.ExitStack) -> ShardImages:
    """Sorted by id, with classes."""
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
        reader=lambda row: found.read(order[row]),
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
    label, classes = folder_labels(names, options.class_level or 1)
    where = f"folders of level {options.class_level} in the shards" if options.class_level else FOLDERS
    return (label, classes, where) if classes else none


FOLDERS = "folders in the shards"


# --- tar --------------------------------------------------------------------------------------------------------------


def _tar(file: IO[bytes], options: ShardOptions) -> _Found:
    end = os.fstat(file.fileno()).st_size
    members: dict[str, tarfile.TarInfo] = {}
    duplicates = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isdir():
                continue
            if member.isreg() and member.offset_data + _stored(member) > end:
                raise ShardError(Status.TRUNCATED, f"cut off inside {member.name}")
            name = _clean(member.name)
            duplicates += name in members and _is_image(name)
            members[name] = member  # as unpacking would have it, the last one of a name counts
        _check_end(file, tar.offset, end)
    handle = file.fileno()
    places: list[tuple[int, int]] = []
    found = _Found(lambda place: _pread(handle, *places[place]), duplicates=duplicates)
    labels, others = _Sidecars(options), _Others()
    left_out: dict[str, Head] = {}
    for name, member in members.items():
        if not _is_image(name, partial(_start_of, handle, member, 512)):
            found.skipped[_suffix(name)] += 1
            left_out[name] = partial(_start_of, handle, member)
            if member.isreg():
                read = partial(_pread, handle, member.offset_data, member.size)
                labels.add(name, read, member.size)
                others.add(name, read)
            continue
        target = _target(name, member, members)
        if target is None or target.issparse():
            why = "a link to what is not in the shard" if target is None else "a sparse file in a tar"
            found.failed[len(found.names)] = (Status.MISSING if target is None else Status.UNSUPPORTED, why)
            target = member
        places.append((target.offset_data, target.size))
        _add(found, name, target.size)
    labels.apply(found)
    found.beside = others.by_key()
    found.left_out = _belonging_to_none(left_out, found.names)
    return found


def _stored(member: tarfile.TarInfo) -> int:
    """Bytes that a member has in the tar: the holes of a sparse file are not in it."""
    sparse: Any = member.sparse if member.issparse() else None
    return member.size if sparse is None else sum(size for _, size in sparse)


def _start_of(handle: int, member: tarfile.TarInfo, count: int = formats.HEAD) -> bytes | None:
    """How a member of a tar begins; None for what is no regular file."""
    return _pread(handle, member.offset_data, min(member.size, count)) if member.isreg() else None


def _check_end(file: IO[bytes], offset: int, end: int) -> None:
    """tarfile stops at anything that is no header, as if the archive ended there."""
    file.seek(offset)
    block = file.read(512)
    if not block or (len(block) < 512 and not any(block)):
        raise ShardError(Status.TRUNCATED, "cut off: it has no end marker")
    if len(block) < 512:
        raise ShardError(Status.TRUNCATED, "cut off inside a header")
    if any(block):
        raise ShardError(Status.CORRUPT, f"a damaged header at byte {offset:,}")
    while block := file.read(1 << 20):
        if any(block):
            raise ShardError(
                Status.CORRUPT, "data after its end marker: tars that were put together by cat? (use tar -A)"
            )


def _target(name: str, member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The regular file that a member is or links to."""
    for _ in range(8):
        if member.isreg():
            return member
        if not (member.islnk() or member.issym()):
            return None
        link = member.linkname
        name = _clean(link if member.islnk() else posixpath.join(posixpath.dirname(name), link))
        if name not in members:
            return None
        member = members[name]
    return None


# --- zip --------------------------------------------------------------------------------------------------------------


def _zip(file: IO[bytes], options: ShardOptions, stack: contextlib.ExitStack) -> _Found:
    archive = stack.enter_context(zipfile.ZipFile(file))
    members: dict[str, zipfile.ZipInfo] = {}
    duplicates = 0
    for info in archive.infolist():
        path = _with_slashes(info)
        if not path.endswith("/"):
            name = _clean(path)
            duplicates += name in members and _is_image(name)
            members[name] = info
    images: list[zipfile.ZipInfo] = []
    found = _Found(lambda place: _unzipped(archive, images[place]), duplicates=duplicates)
    labels, others = _Sidecars(options), _Others()
    left_out: dict[str, Head] = {}
    for name, info in members.items():
        if _is_image(name, partial(_head_of, archive, info)):
            images.append(info)
            _add(found, name, info.file_size)
        else:
            found.skipped[_suffix(name)] += 1
            read = partial(_unzipped, archive, info)
            left_out[name] = partial(_head_of, archive, info)
            labels.add(name, read, info.file_size)
            others.add(name, read)
    labels.apply(found)
    found.beside = others.by_name(found.names)
    found.left_out = _belonging_to_none(left_out, found.names)
    return found


def _with_slashes(info: zipfile.ZipInfo) -> str:
    """A name as `unzip` reads it: zips of old .NET have backslashes, against the format's rules."""
    name = info.filename
    return name.replace("\\", "/") if info.create_system == 0 and "/" not in name else name


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member, from any thread. Raises ImageError."""
    try:
        with archive.open(info) as member:
            # The size that the zip claims is a bound, whatever is packed in it. Of bzip2 and LZMA zipfile unpacks
            # at once what it has read, and 40 bytes may be 45 MB: so it reads little.
            member.MIN_READ_SIZE = 64  # type: ignore[attr-defined] # of a ZipExtFile, which `open` is typed without
            step = 1 << 20 if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 64
            return b"".join(iter(lambda: member.read(step), b""))
    except RuntimeError:  # zipfile's word for a password
        raise ImageError(Status.UNSUPPORTED, "encrypted in the zip") from None
    except NotImplementedError as error:
        raise ImageError(Status.UNSUPPORTED, _reason(error, "the zip")) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, lzma.LZMAError) as error:
        raise ImageError(Status.CORRUPT, _reason(error, "the zip").split(" for ")[0]) from None
    except OSError as error:
        raise ImageError(Status.UNREADABLE, error.strerror or "cannot read the zip") from None


def _head_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as opened:
            return opened.read(512)
    except Exception:
        return b""


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


def _table(path: str, file: IO[bytes], options: ShardOptions, stack: contextlib.ExitStack) -> _Found:
    pa = _pyarrow()
    try:
        schema, batches, count = _batches(file)
        image = _image_column(schema, options.image_column)
        label, names = _label_column(schema, options, image)
        if options.id_column is not None and options.id_column not in schema.names:
            raise ShardError(Status.CORRUPT, f"has no column {options.id_column}, only {', '.join(schema.names)}")
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        places: list[tuple[int, int]] = []
        found = _Found(lambda row: _pread(spool.fileno(), *places[row]), labels_from=f"column {label}" if label else "")
        top = label if label in schema.names else (label or "").partition(".")[0]
        columns = [*dict.fromkeys(filter(None, (image, top, options.id_column)))]
        for batch in batches(columns):
            _spool(batch, image, label, names, options.id_column, spool, found, places)
        if count is not None and len(found.names) != count:
            raise ShardError(Status.TRUNCATED, f"{len(found.names):,} of {count:,} rows")
        spool.flush()
    except MemoryError:  # pyarrow's too
        raise
    except pa.ArrowException as error:
        text = _reason(error, "the table")
        raise ShardError(Status.TRUNCATED if _CUT.search(text) else Status.CORRUPT, text) from None
    if options.id_column is None:
        found.names = _row_numbers(len(found.names))
    found.beside = _Columns(file, image, found.names).of
    return found


def table_ids(path: str, id_column: str | None = None) -> list[str]:
    """The ids inside a Parquet or Arrow file, in the order of its rows. Raises ShardError."""
    pa = _pyarrow()
    try:
        with open(path, "rb") as file:
            schema, batches, count = _batches(file)
            if id_column is not None and id_column not in schema.names:
                raise ShardError(Status.CORRUPT, f"has no column {id_column}, only {', '.join(schema.names)}")
            if id_column is None and count is None:
                count = sum(len(batch) for batch in batches(schema.names[:1]))
            if id_column is None:
                return _row_numbers(count or 0)
            values = (one for batch in batches([id_column]) for one in batch.column(id_column).to_pylist())
            return [str(one) if one is None else _id(one) for one in values]
    except OSError as error:
        raise ShardError(Status.UNREADABLE, error.strerror or _reason(error, "the table")) from None
    except pa.ArrowException as error:
        raise ShardError(Status.CORRUPT, _reason(error, "the table")) from None


def _row_numbers(count: int) -> list[str]:
    """The ids of rows without names: numbers of one width."""
    width = max(_WIDTH, len(str(max(count - 1, 0))))
    return [f"{row:0{width}d}" for row in range(count)]


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ShardError(
            Status.UNSUPPORTED, "Parquet and Arrow need pyarrow: pip install 'protoprune[tables]'"
        ) from None
    return pyarrow


def _batches(file: IO[bytes]) -> tuple[pa.Schema, Batches, int | None]:
    """(schema, columns -> batches, number of rows where the file says it)."""
    import pyarrow.ipc
    import pyarrow.parquet

    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if head.startswith(b"PAR1"):
        parquet = pyarrow.parquet.ParquetFile(file)
        rows = parquet.metadata.num_rows
        return parquet.schema_arrow, lambda columns: parquet.iter_batches(_BATCH, columns=columns), rows
    reader = pyarrow.ipc.open_file(file) if head.startswith(b"ARROW1") else pyarrow.ipc.open_stream(file)

    def some(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        every = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if head.startswith(b"ARROW1") else reader
        )
        for batch in every:
            yield batch.select(columns)

    return reader.schema, some, None


def _hugging_face(schema: pa.Schema) -> dict[str, Any]:
    """The `datasets` features that a schema's metadata describes: column -> feature."""
    try:
        return parse_json(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}


def _described(schema: pa.Schema, kind: str) -> list[str]:
    """The columns that the metadata call images, or class labels."""
    features = _hugging_face(schema)
    return [name for name, one in features.items() if isinstance(one, dict) and one.get("_type") == kind]


def _image_column(schema: pa.Schema, asked: str | None) -> str:
    kinds = {name: schema.field(name).type for name in schema.names}
    if asked is not None:
        _check_image_column(kinds, asked)
        return asked
    described = [name for name in _described(schema, "Image") if name in kinds]
    candidates = described or [name for name, kind in kinds.items() if _holds_bytes(kind)]
    named = [name for name in _IMAGE_COLUMNS if name in candidates]
    if named and len(candidates) > 1:
        return named[0]
    if len(candidates) != 1:
        which = f"which of {', '.join(candidates)} holds the images" if candidates else "no column of image bytes"
        raise ShardError(Status.CORRUPT, f"{which}; give --image-column (columns: {', '.join(kinds)})")
    return candidates[0]


def _check_image_column(kinds: Mapping[str, pa.DataType], asked: str) -> None:
    if asked not in kinds:
        raise ShardError(Status.CORRUPT, f"has no column {asked}, only {', '.join(kinds)}")
    if not _holds_bytes(kinds[asked]):
        raise ShardError(Status.CORRUPT, f"its column {asked} holds {kinds[asked]}, no image bytes")


def _holds_bytes(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _label_column(schema: pa.Schema, options: ShardOptions, image: str) -> tuple[str | None, list[str]]:
    """(column or None, names of its numbers)."""
    import pyarrow

    if not options.labels or options.class_level is not None:
        return None, []
    name = options.label_column
    if name is not None and name.partition(".")[0] in schema.names and name not in schema.names:
        return name, list((_inside(_hugging_face(schema), name) or {}).get("names", []))
    if name is not None and name not in schema.names:
        raise ShardError(Status.CORRUPT, f"has no column {name}, only {', '.join(schema.names)}")
    if name is None:
        classes = _described(schema, "ClassLabel")
        name = next((n for n in (*classes, *_LABEL_KEYS) if n in schema.names and n != image), None)
    if name is None or pyarrow.types.is_nested(schema.field(name).type):
        return None, []
    feature = _hugging_face(schema).get(name)
    return name, list(feature.get("names", [])) if isinstance(feature, dict) else []


def _spool(
    batch: pa.RecordBatch,
    image: str,
    label: str | None,
    names: list[str],
    id_column: str | None,
    spool: IO[bytes],
    found: _Found,
    places: list[tuple[int, int]],
) -> None:
    """Write the images of a batch to the temporary file, and note the rest of it."""
    labels = _labels_in(batch, label) if label else [None] * len(batch)
    ids = batch.column(id_column).to_pylist() if id_column else [None] * len(batch)
    for value, one, own in zip(batch.column(image), labels, ids, strict=True):
        row, plain = len(found.names), value.as_py()
        cell = plain if isinstance(plain, dict) else {"bytes": plain}
        data = cell.get("bytes") or b""
        if not data:
            status = Status.EMPTY if cell.get("bytes") is not None else Status.MISSING
            why = "no bytes in its row, only a path" if cell.get("path") else "no bytes in its row"
            found.failed[row] = status, why
        if own is None and id_column:
            raise ShardError(Status.CORRUPT, f"row {row} has no {id_column}; choose another --id-column, or none")
        places.append((spool.tell(), len(data)))
        spool.write(data)
        _add(found, _id(own), len(data), _name(one, names))


def _labels_in(batch: pa.RecordBatch, label: str) -> list[Any]:
    """The cells of a column, or of one inside structs ('meta.label')."""
    if label in batch.schema.names:
        return batch.column(label).to_pylist()
    first, _, rest = label.partition(".")
    found = (_inside(one, rest) for one in batch.column(first).to_pylist())
    return [None if isinstance(one, (list, dict)) else one for one in found]


def _id(value: object) -> str:
    """A cell of a column of ids as text; '' where there is no such column."""
    return "" if value is None else os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _name(value: object, names: list[str]) -> str:
    if value is None or value == "" or value == -1:  # -1: ClassLabel of a test split without labels
        return ""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return names[int(value)] if 0 <= int(value) < len(names) else str(int(value))
    return str(value)


# --- names and labels -------------------------------------------------------------------------------------------------


class _Others:
    """The members of a tar or zip that are no images, by key."""

    def __init__(self) -> None:
        self.all: dict[str, Callable[[], bytes]] = {}
        self.belonging: dict[str, list[str]] = {}  # key, or stem of an image -> names

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        self.all[name] = read

    def by_key(self) -> Beside:
        """As in WebDataset's tars: all that has the image's key."""
        for name in sorted(self.all):
            self.belonging.setdefault(key_of(name), []).append(name)
        return lambda image: [(one, self.all[one]()) for one in self.belonging.get(key_of(image), ())]

    def by_name(self, images: list[str]) -> Beside:
        """What is called as the image is, and then what is called as its key is."""
        stems = set(map(stem_of, images))
        for name in sorted(self.all):
            self.belonging.setdefault(owner(name, stems) or key_of(name), []).append(name)
        return self._nearest

    def _nearest(self, image: str) -> list[tuple[str, bytes]]:
        found: dict[str, str] = {}  # what follows the stem -> name
        for level in levels(stem_of(image)):
            for name in self.belonging.get(level, ()):
                found.setdefault(name[len(level) :], name)
        return [(name, self.all[name]()) for name in found.values()]


class _Columns:
    """The other columns of a table, by row: those of bytes as files, all else as JSON; read when first asked for."""

    def __init__(self, file: IO[bytes], image: str, names: list[str]) -> None:
        self.file, self.image, self.names = file, image, names
        self.rows: dict[str, dict[str, Any]] | None = None
        self.bytes_in: list[str] = []

    def of(self, name: str) -> list[tuple[str, bytes]]:
        if self.rows is None:
            schema, batches, _ = _batches(self.file)
            others = [one for one in schema.names if one != self.image]
            self.bytes_in = [one for one in others if _holds_bytes(schema.field(one).type)]
            wanted = [one for one in others if one in self.bytes_in or _is_plain(schema.field(one).type)]
            rows = (row for batch in batches(wanted) for row in batch.to_pylist()) if wanted else iter(())
            self.rows = dict(zip(self.names, rows, strict=bool(wanted)))
        row = dict(self.rows.get(name, {}))
        suffix = posixpath.splitext(name)[1]
        stem = name.removesuffix(suffix) if suffix.lower() in image_suffixes() else name
        files = []
        for column in self.bytes_in:
            cell = row.pop(column, None)
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if data:
                files.append((f"{stem}.{re.sub('[./]', '_', column)}.{kind_of(data)}", data))
        if row:
            files.insert(0, (f"{stem}.json", json.dumps(_without_nan(row), default=str).encode()))
        return files


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kind_of(data: bytes) -> str:
    """The suffix of an image's format, without a dot; 'bin' where it is none."""
    from PIL import Image

    formats.register()
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or "bin"
    except Exception:
        return "bin"
    return _SUFFIX.get(kind, kind.lower())


def _belonging_to_none(others: Mapping[str, Head], images: list[str]) -> list[tuple[str, str]]:
    """(name, why) of the members that are no images by their names and have the key of none, sorted by name."""
    keys = set(map(key_of, images))
    alone = sorted((name for name in others if key_of(name) not in keys), key=os.fsencode)
    return [(native(name), why_no_image(name, others[name])) for name in alone]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a column can be written as JSON."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(one.type) for one in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _inside(value: object, name: str) -> Any:
    """What an object has under a name, or one level deeper for each dot of it; None where it has none."""
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    return _inside(value.get(first), rest) if dot else None


class _Sidecars:
    """Classes that lie beside images under the same key (the name up to the first dot): .cls, and .json's label."""

    def __init__(self, options: ShardOptions) -> None:
        self.key_of_label = (options.label_column,) if options.label_column else _LABEL_KEYS
        self.wanted = options.labels and options.class_level is None
        self.found: list[tuple[str, str, str]] = []  # (name, suffix, class)

    def add(self, name: str, read: Callable[[], bytes], size: int) -> None:
        suffix = _suffix(name)
        if not self.wanted or suffix not in (".cls", ".json") or size > _LARGEST_SIDECAR:
            return
        with contextlib.suppress(ImageError):
            text = plain_bytes(read()).decode("utf-8", "surrogateescape").strip()
            value = text if suffix == ".cls" else self._from_json(text)
            if value:
                self.found.append((name, suffix, value))

    def _from_json(self, text: str) -> str:
        try:
            whole = parse_json(text)
        except ValueError:
            return ""
        if not isinstance(whole, dict):
            return ""
        value = next((one for key in self.key_of_label if (one := _inside(whole, key)) is not None), None)
        return "" if isinstance(value, (list, dict)) else _name(value, [])

    def apply(self, found: _Found) -> None:
        """Give each image the class beside it, else that of its key: `a.1.jpg` that of `a.1.cls`, or of `a.cls`."""
        if not self.found:
            return
        stems = set(map(stem_of, found.names))
        classes: dict[str, tuple[tuple[bool, bool], str]] = {}  # stem or key -> (how sure: .cls, of this very name)
        for name, suffix, value in self.found:
            place = owner(name, stems) or key_of(name)
            sure = suffix == ".cls", stem_of(name) == place
            if place not in classes or sure > classes[place][0] or (sure == classes[place][0] and sure[0]):
                classes[place] = sure, value
        found.labels = [
            next((classes[one][1] for one in levels(stem_of(name)) if one in classes), "") for name in found.names
        ]
        found.labels_from = " and ".join(sorted({suffix for _, suffix, _ in self.found})) + " in the shards"


def _clean(name: str) -> str:
    """`./a//b.png` -> `a/b.png`; never above the shard."""
    return posixpath.normpath("/" + name).lstrip("/")


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower() or "(no suffix)"


def _is_image(name: str, head: Head | None = None) -> bool:
    """By its suffix, as in a folder; without one by how it begins. Hidden files (macOS's ._x.jpg) are none."""
    if any(part.startswith(".") for part in name.split("/")) or name.startswith("__MACOSX/"):
        return False
    suffix = posixpath.splitext(name)[1].lower()
    if suffix or head is None:
        return suffix in image_suffixes()
    data = head() or b""
    return formats.is_image(data[: formats.HEAD], lambda: io.BytesIO(data))


def _check_bytes(found: _Found, size: int) -> None:
    """Note of the next image that it is too large to be read."""
    try:
        check_bytes(size)
    except ImageError as error:
        found.failed.setdefault(len(found.names), (error.status, error.reason))


def _add(found: _Found, name: str, size: int, label: str = "") -> None:
    _check_bytes(found, size)
    found.names.append(name)
    found.sizes.append(size)
    found.labels.append(label)


def _pread(handle: int, offset: int, size: int) -> bytes:
    """Bytes at a place, from any thread."""
    try:
        parts: list[bytes] = []
        while size > 0:
            part = os.pread(handle, size, offset)
            if not part:
                raise ImageError(Status.CHANGED, "the shard changed since it was listed")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)
    except OSError as error:
        raise ImageError(Status.UNREADABLE, error.strerror or "cannot read the shard") from None


def _reason(error: Exception, what: str) -> str:
    text = " ".join(str(error).split())
    return (text or f"{what} cannot be read")[:160]
