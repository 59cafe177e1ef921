"""Tars and zips -> their images, read in place, and what lies beside them: classes, captions and all else.

Python's `tarfile` ends quietly at a damaged header and at a cut: both are looked for here.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import IO, Any

from protoprune import formats
from protoprune.images.decode import ImageError, Status, check_bytes
from protoprune.images.listing import image_suffixes, why_no_image
from protoprune.sources.keys import key_of, levels, owner, stem_of
from protoprune.sources.shard import (
    LABEL_KEYS,
    Beside,
    Found,
    Head,
    ShardError,
    ShardOptions,
    add_image,
    class_name,
    inside,
    pread,
    reason_of,
)
from protoprune.text import native, parse_json, plain_bytes
from protoprune.unpacking import read_member

_LARGEST_SIDECAR = 1 << 20  # bytes of a .json that is read for its label


def read_tar(file: IO[bytes], options: ShardOptions) -> Found:
    members, duplicates = _members(file)
    handle = file.fileno()
    targets: list[tarfile.TarInfo] = []
    found = Found(lambda place: _content(handle, targets[place]), duplicates=duplicates)
    rest = _Rest(options)
    for name, member in members.items():
        target = _target(name, member, members)
        if not _is_image(name, partial(_start_of, handle, target, 512)):
            read = None if target is None else partial(_content, handle, target)
            rest.add(name, partial(_start_of, handle, target), read, 0 if target is None else target.size)
            continue
        if target is None:
            found.failed[len(found.names)] = Status.MISSING, "a link to what is not in the shard"
        found.links += target is not None and _clean(target.name) != name
        targets.append(target or member)
        add_image(found, name, (target or member).size)
    rest.share_out(found, rest.others.by_key())
    return found


def _members(file: IO[bytes]) -> tuple[dict[str, tarfile.TarInfo], int]:
    """The members of a whole tar by name, as unpacking would have them, and how many images another one replaced."""
    end = os.fstat(file.fileno()).st_size
    members: dict[str, tarfile.TarInfo] = {}
    duplicates = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0:  # tarfile goes back then, and round for ever
                raise ShardError(Status.CORRUPT, f"a negative size of {member.name}")
            if member.isdir():
                continue
            if member.isreg() and member.offset_data + sum(size for _, size in _pieces(member)) > end:
                raise ShardError(Status.TRUNCATED, f"cut off inside {member.name}")
            name = _clean(member.name)
            if member.islnk():  # to what has that name so far: itself, where tar was given a file twice
                member = members.get(_clean(member.linkname), member)
            duplicates += members.get(name, member) is not member and _is_image(name)
            members[name] = member  # the last one of a name counts
        _check_end(file, tar.offset)
    return members, duplicates


def _pieces(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """(offset, bytes) of what is stored of a member: the holes of a sparse file (`tar -S`) are not in the tar."""
    sparse: Any = member.sparse if member.issparse() else None
    return [(0, member.size)] if sparse is None else sparse


def _content(handle: int, member: tarfile.TarInfo) -> bytes:
    """A regular member, from any thread. Raises ImageError."""
    pieces, place = _pieces(member), member.offset_data
    if pieces == [(0, member.size)]:
        return pread(handle, place, member.size)
    check_bytes(member.size)
    data = bytearray(member.size)
    for offset, size in pieces:
        if offset + size > member.size:
            raise ImageError(Status.CORRUPT, "a sparse file that is longer than it says")
        data[offset : offset + size] = pread(handle, place, size)
        place += size
    return bytes(data)


def _start_of(handle: int, member: tarfile.TarInfo | None, count: int = formats.HEAD) -> bytes | None:
    """How a member of a tar begins; None for what is no regular file."""
    if member is None:
        return None
    first = next((size for offset, size in _pieces(member) if offset == 0), 0)
    return pread(handle, member.offset_data, min(first, count))


def _check_end(file: IO[bytes], offset: int) -> None:
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


def read_zip(file: IO[bytes], options: ShardOptions, stack: contextlib.ExitStack) -> Found:
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
    found = Found(lambda place: _unzipped(archive, images[place]), duplicates=duplicates)
    rest = _Rest(options)
    for name, info in members.items():
        if _is_image(name, partial(_head_of, archive, info)):
            images.append(info)
            add_image(found, name, info.file_size)
        else:
            rest.add(name, partial(_head_of, archive, info), partial(_unzipped, archive, info), info.file_size)
    rest.share_out(found, rest.others.by_name(found.names))
    return found


def _with_slashes(info: zipfile.ZipInfo) -> str:
    """A name as `unzip` reads it: zips of old .NET have backslashes, against the format's rules."""
    name = info.filename
    return name.replace("\\", "/") if info.create_system == 0 and "/" not in name else name


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member, from any thread. Raises ImageError."""
    try:
        return read_member(archive, info)
    except NotImplementedError as error:  # which is a RuntimeError too
        raise ImageError(Status.UNSUPPORTED, reason_of(error, "the zip")) from None
    except RuntimeError:  # zipfile's word for a password
        raise ImageError(Status.UNSUPPORTED, "encrypted in the zip") from None
    except OSError as error:
        status = Status.UNREADABLE if error.errno else Status.CORRUPT  # bz2 has no errors of its own
        raise ImageError(status, error.strerror or reason_of(error, "the zip")) from None
    except MemoryError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, LZMAError, a name that is not UTF-8, …
        raise ImageError(Status.CORRUPT, reason_of(error, "the zip").split(" for ")[0]) from None


def _head_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return read_member(archive, info, 512)
    except Exception:
        return b""


# --- what lies beside images ------------------------------------------------------------------------------------------


class _Rest:
    """The members of a tar or zip that are no images."""

    def __init__(self, options: ShardOptions) -> None:
        self.labels, self.others = _Sidecars(options), _Others()
        self.heads: dict[str, Head] = {}

    def add(self, name: str, head: Head, read: Callable[[], bytes] | None, size: int) -> None:
        """`read` is None for what is no regular file."""
        self.heads[name] = head
        if read is not None:
            self.labels.add(name, read, size)
            self.others.all[name] = read

    def share_out(self, found: Found, beside: Beside) -> None:
        """Give the images their classes, names and what lies beside them; note what belongs to none."""
        found.skipped.update(map(_suffix, self.heads))
        self.labels.apply(found)
        found.beside = beside
        found.left_out = _belonging_to_none(self.heads, found.names)
        self.labels.rename(found)


class _Others:
    """The members of a tar or zip that are no images, by key."""

    def __init__(self) -> None:
        self.all: dict[str, Callable[[], bytes]] = {}
        self.belonging: dict[str, list[str]] = {}  # key, or stem of an image -> names

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


def _belonging_to_none(others: Mapping[str, Head], images: list[str]) -> list[tuple[str, str]]:
    """(name, why) of the members that are no images by their names and have the key of none, sorted by name."""
    keys = set(map(key_of, images))
    alone = sorted((name for name in others if key_of(name) not in keys), key=os.fsencode)
    return [(native(name), why_no_image(name, others[name])) for name in alone]


class _Sidecars:
    """What is said of images beside them, under the same key (the name up to the first dot): classes in .cls or by
    .json's label, and the names that another key of .json gives them."""

    def __init__(self, options: ShardOptions) -> None:
        self.key_of_label = (options.label_column,) if options.label_column else LABEL_KEYS
        self.wanted = {".cls", ".json"} if options.labels and options.class_level is None else set[str]()
        self.id_column = options.id_column
        self.found: list[tuple[str, str, str]] = []  # (name, suffix, class)
        self.ids: dict[str, str] = {}  # key -> what the image is to be called

    def add(self, name: str, read: Callable[[], bytes], size: int) -> None:
        suffix = _suffix(name)
        named = suffix == ".json" and self.id_column is not None
        if not (named or suffix in self.wanted) or size > _LARGEST_SIDECAR:
            return
        with contextlib.suppress(ImageError):
            text = plain_bytes(read()).decode("utf-8", "surrogateescape").strip()
            whole = _json_object(text) if suffix == ".json" else None
            if named and (value := _first(whole, (self.id_column,))):
                self.ids[key_of(name)] = value
            if suffix in self.wanted and (value := _first(whole, self.key_of_label) if suffix == ".json" else text):
                self.found.append((name, suffix, value))

    def rename(self, found: Found) -> None:
        """Call each image by what the .json of its key says, in the place of the key: `0017.jpg` becomes `<uid>.jpg`,
        and what lies beside it the same."""
        if self.id_column is None:
            return
        original: dict[str, str] = {}
        for name in found.names:
            key = key_of(name)
            value = self.ids.get(key, "")
            if not value or "/" in value or "." in value:
                what = f"is called {value}, which has a dot or a slash" if value else "is in no .json beside it"
                why = f"{name}: its {self.id_column} {what}; choose another --id-column, or none"
                raise ShardError(Status.CORRUPT, why)
            original.setdefault(value + name[len(key) :], name)
        if len(original) < len(found.names):
            raise ShardError(
                Status.CORRUPT, f"two images have one {self.id_column}; choose another --id-column, or none"
            )
        beside, found.names = found.beside, list(original)

        def renamed(image: str) -> list[tuple[str, bytes]]:
            cut = len(key_of(original[image]))
            return [(key_of(image) + name[cut:], data) for name, data in beside(original[image])]

        found.beside = renamed

    def apply(self, found: Found) -> None:
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


def _json_object(text: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        whole = parse_json(text)
        return whole if isinstance(whole, dict) else None
    return None


def _first(whole: dict[str, Any] | None, keys: Iterable[str | None]) -> str:
    """What an object has under the first of these keys that it has, as text; '' for nothing, or no single value."""
    value = next((one for key in keys if key and (one := inside(whole, key)) is not None), None)
    return "" if isinstance(value, (list, dict)) else class_name(value, [])


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
