"""What an opened shard is, whatever kind of file it was: its images, how it is read, and what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from protoprune import __version__, formats
from protoprune.arguments import check_fields
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import ImageError, Status, check_bytes
from protoprune.images.listing import ImageList, check_labels
from protoprune.text import parse_json

# The keys of .json files, and columns of tables, that are classes; the surest first.
LABEL_KEYS = ("label", "class", "cls", "class_name", "label_name", "category", "target")
_SUFFIX = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of Pillow's names; others in lower case
_WITHOUT_COLUMNS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")

# Name in the shard -> (name, content) of what has the image's key and is none (.txt, .json, …); of a table the other
# columns.
Beside = Callable[[str], list[tuple[str, bytes]]]

Head = Callable[[], bytes | None]  # how a member begins; None for what is no regular file


class ShardError(ImageError):
    """A shard that cannot be used, nor any image in it: its status and a reason."""


@dataclass(frozen=True)
class ShardOptions:
    """How shards are read: columns of Parquet and Arrow files, and where classes come from.

    label_column and id_column are also keys of the .json beside an image. labels=False: no classes. class_level:
    classes are the folders of that level inside the shard.
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
        """Those that a feature file was made with. Raises ProtopruneError for such as a later version has."""
        found = parse_json(provenance.get("shard_options", "{}"))
        if unknown := sorted(set(found) - {one.name for one in fields(cls)}):
            raise ProtopruneError(
                f"the features are of protoprune {provenance.get('protoprune', 'unknown')}, which has options of "
                f"shards that {__version__} does not know ({', '.join(unknown)}); upgrade it"
            )
        return cls(**found)

    def check(self, shards: Iterable[str]) -> None:
        """Raise UsageError for options that do nothing beside the others, or in shards of these names."""
        check_fields(self, globals())
        about_classes = [("--label-column", self.label_column), ("--class-level", self.class_level)]
        for option, value in about_classes:
            if value is not None and not self.labels:
                raise UsageError(f"--no-labels does not go with {option}")
        if self.label_column is not None and self.class_level is not None:
            raise UsageError("--label-column and --class-level: give the one that says where the classes are")
        check_labels(True, self.class_level)
        names = list(shards)
        if self.image_column is not None and all(name.lower().endswith(_WITHOUT_COLUMNS) for name in names):
            raise UsageError(
                f"--image-column {self.image_column}: is for Parquet and Arrow files, and there is none; leave it out"
            )
        if self.id_column is not None and not names:
            raise UsageError(f"--id-column {self.id_column}: is for shards, and there is none; leave it out")


@dataclass
class ShardImages(ImageList):
    """The images of one opened shard. Close it when they are read.

    `left_out` are the members that are no images and belong to none: there is no image with their key.
    """

    reader: Callable[[int], bytes] = field(kw_only=True)  # row -> bytes of the image
    beside: Beside = field(kw_only=True)
    failed: dict[int, tuple[Status, str]] = field(default_factory=dict)  # rows that need not be read
    links: int = 0  # images that are links in a tar, which loaders pass over
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
class Found:
    """The images of a shard in any order; `names` are those inside the shard."""

    read: Callable[[int], bytes]  # place in this order -> bytes of the image
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # '' for none
    labels_from: str = ""
    failed: dict[int, tuple[Status, str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    links: int = 0  # images that are links in a tar
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, why) of what is no image and beside none
    beside: Beside = lambda name: []


def _check_bytes(found: Found, size: int) -> None:
    """Note of the next image that it is too large to be read."""
    try:
        check_bytes(size)
    except ImageError as error:
        found.failed.setdefault(len(found.names), (error.status, error.reason))


def add_image(found: Found, name: str, size: int, label: str = "") -> None:
    _check_bytes(found, size)
    found.names.append(name)
    found.sizes.append(size)
    found.labels.append(label)


def pread(handle: int, offset: int, size: int) -> bytes:
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


def reason_of(error: Exception, what: str) -> str:
    text = " ".join(str(error).split())
    return (text or f"{what} cannot be read")[:160]


def class_name(value: object, names: list[str]) -> str:
    if value is None or value == "" or value == -1:  # -1: ClassLabel of a test split without labels
        return ""
    if isinstance(value, float) and math.isnan(value):  # what a column of numbers has for nothing
        return ""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return names[int(value)] if 0 <= int(value) < len(names) else str(int(value))
    return str(value)


def inside(value: object, name: str) -> Any:
    """What an object has under a name, or one level deeper for each dot of it; None where it has none."""
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    return inside(value.get(first), rest) if dot else None


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
