"""Tars and zips -> their images, read in place, and what lies beside them: classes, captions and all else.

Python's `tarfile` ends quietly at a damaged header and at a cut: both are looked for here.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any

from protoprune import formats
from protoprune.images.decode import ImageError, Status
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
    found = Found(lambda place: pread(handle, *places[place]), duplicates=duplicates)
    labels, others = _Sidecars(options), _Others()
    left_out: dict[str, Head] = {}
    for name, member in members.items():
        target = _target(name, member, members)
        plain = target if target is not None and not target.issparse() else None  # what can be read at its place
        if not _is_image(name, partial(_start_of, handle, plain, 512)):
            found.skipped[_suffix(name)] += 1
            left_out[name] = partial(_start_of, handle, plain)
            if plain is not None:
                read = partial(pread, handle, plain.offset_data, plain.size)
                labels.add(name, read, plain.size)
                others.add(name, read)
            continue
        if plain is None:
            why = "a link to what is not in the shard" if target is None else "a sparse file in a tar"
            found.failed[len(found.names)] = (Status.MISSING if target is None else Status.UNSUPPORTED, why)
        found.links += plain not in (None, member)
        places.append(((plain or member).offset_data, (plain or member).size))
        add_image(found, name, (plain or member).size)
    labels.apply(found)
    found.beside = others.by_key()
    found.left_out = _belonging_to_none(left_out, found.names)
    return found


def _stored(member: tarfile.TarInfo) -> int:
    """Bytes that a member has in the tar: the holes of a sparse file are not in it."""
    sparse: Any = member.sparse if member.issparse() else None
    return member.size if sparse is None else sum(size for _, size in sparse)


def _start_of(handle: int, member: tarfile.TarInfo | None, count: int = formats.HEAD) -> bytes | None:
    """How a member of a tar begins; None for what is no regular file."""
    return None if member is None else pread(handle, member.offset_data, min(member.size, count))


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
    labels, others = _Sidecars(options), _Others()
    left_out: dict[str, Head] = {}
    for name, info in members.items():
        if _is_image(name, partial(_head_of, archive, info)):
            images.append(info)
            add_image(found, name, info.file_size)
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
        return read_member(archive, info)
    except RuntimeError:  # zipfile's word for a password
        raise ImageError(Status.UNSUPPORTED, "encrypted in the zip") from None
    except NotImplementedError as error:
        raise ImageError(Status.UNSUPPORTED, reason_of(error, "the zip")) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, lzma.LZMAError) as error:
        raise ImageError(Status.CORRUPT, reason_of(error, "the zip").split(" for ")[0]) from None
    except OSError as error:
        raise ImageError(Status.UNREADABLE, error.strerror or "cannot read the zip") from None


def _head_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return read_member(archive, info, 512)
    except Exception:
        return b""


# --- what lies beside images ------------------------------------------------------------------------------------------


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


def _belonging_to_none(others: Mapping[str, Head], images: list[str]) -> list[tuple[str, str]]:
    """(name, why) of the members that are no images by their names and have the key of none, sorted by name."""
    keys = set(map(key_of, images))
    alone = sorted((name for name in others if key_of(name) not in keys), key=os.fsencode)
    return [(native(name), why_no_image(name, others[name])) for name in alone]


class _Sidecars:
    """Classes that lie beside images under the same key (the name up to the first dot): .cls, and .json's label."""

    def __init__(self, options: ShardOptions) -> None:
        self.key_of_label = (options.label_column,) if options.label_column else LABEL_KEYS
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
        value = next((one for key in self.key_of_label if (one := inside(whole, key)) is not None), None)
        return "" if isinstance(value, (list, dict)) else class_name(value, [])

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
