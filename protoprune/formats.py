"""Image formats: which one a file begins like, why Pillow does not read it, and the formats that a plugin reads."""

from __future__ import annotations

import io
import logging
import re
import struct
import tarfile
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import BinaryIO

from protoprune.errors import UsageError

# extra -> (module, what its files are called, their suffixes)
PLUGINS = {
    "heif": ("pillow_heif", "HEIC/HEIF", (".heic", ".heics", ".heif", ".heifs", ".hif")),
    "jxl": ("pillow_jxl", "JPEG XL", (".jxl",)),
}
# Formats whose first bytes other files do not have by chance; the rest begin with one to four common bytes.
_SURE = (
    "AVIF", "BLP", "DDS", "FITS", "FTEX", "GIF", "HEIF", "ICNS", "JPEG", "JPEG2000", "JXL", "PNG", "PSD", "QOI", "SUN",
    "TIFF", "WEBP", "XPM",
)  # fmt: skip
# Formats that Pillow recognises without reading them (stubs for other programs); .h5 among them would turn a feature
# file in the image folder into an image.
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}
_STUMBLES = (IndexError, TypeError, KeyError, EOFError, struct.error)  # of Pillow's plugins over headers
HEAD = 32  # bytes of a file that tell its format
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


_SEAL = b"protoprune-seal "
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")
_MAGIC = (
    (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "a zip archive"), (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"), (b"\xfd7zXZ\0", "an xz file"), (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"PAR1\x15", "a Parquet file"), (b"ARROW1\0", "an Arrow file"), (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!\x1a", "a RAR archive"), (b"\x89HDF", "an HDF5 file"), (b"\x93NUMPY", "a NumPy file"),
    (b"\x80\x04\x95", "a pickle"), (b"\x80\x05\x95", "a pickle"), (b"\x80\x02}", "a pickle"),
    (b"\xff\xff\xff\xff", "an Arrow file"),  # a stream of Arrow, as data sets on disk are
    (b"\xff\xd8\xff", "an image"), (b"\x89PNG", "an image"), (b"GIF8", "an image"),
)  # fmt: skip


_UNPACKING = {
    "a gzip file": "gzip -d",
    "a Zstandard file": "zstd -d",
    "a 7z archive": "7z x",
    "a RAR archive": "unrar x",
}


@cache
def register() -> frozenset[str]:
    """Teach Pillow the formats whose plugins are installed; the extras that are there.

    Pillow's logger gets the handler that a library should give its own: else Python prints what it says of damaged
    files, which have their reasons, to stderr.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    found = set()
    for extra, (module, _, _) in PLUGINS.items():
        try:
            plugin = import_module(module)  # pillow_jxl registers itself
            if extra == "heif":
                plugin.register_heif_opener()
            found.add(extra)
        except Exception:  # missing, or built for another Pillow: the format is then as unknown as without it
            continue
    return frozenset(found)


def begins_like(head: bytes) -> tuple[str, bool] | None:
    """(the format that a file begins like by Pillow's word, whether that is sure), from its first HEAD bytes."""
    from PIL import Image

    register()
    Image.init()
    likely = None
    for name in Image.ID:
        accept = Image.OPEN[name][1]
        if accept is None or name in STUBS or not _accepts(accept, head):
            continue
        if name in _SURE or (name == "BMP" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS):
            return name, True
        likely = likely or (name, False)
    return likely


def _accepts(accept: Callable[[bytes], bool | str], head: bytes) -> bool:
    try:
        return bool(accept(head[:16]))
    except Exception:  # of fewer bytes than it wants
        return False


def is_image(head: bytes, opened: Callable[[], BinaryIO]) -> bool:
    """Whether a file is meant to be an image: by how it begins, and where that may be chance by what Pillow makes of
    the rest of its header. Damaged and far too large ones are images too."""
    from PIL import Image

    found = begins_like(head)
    if found is None or found[1]:
        return found is not None or extra_for(head) is not None
    try:
        with opened() as file, Image.open(file, formats=[found[0]]):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False


def complaint(data: bytes) -> tuple[str, str] | None:
    """(format, what its plugin says against it) of an image that Pillow calls unidentified; None for other files."""
    from PIL import Image

    found = begins_like(data[:HEAD])
    if found is None or not found[1]:
        return None
    factory, accept = Image.OPEN[found[0]]
    said = accept(data[:16]) if accept else True
    if isinstance(said, str):
        return found[0], said
    try:
        factory(io.BytesIO(data), "").close()
    except Exception as error:
        text = " ".join(str(error).split())
        stumbled = isinstance(error.__cause__, _STUMBLES) and str(error) == str(error.__cause__)
        if text and "not identified" not in text and not stumbled:
            return found[0], text
    return found[0], "its header is damaged or cut off"


def extra_for(data: bytes) -> str | None:
    """The extra that reads this file, by its first bytes, where that extra is not there."""
    kind = None
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        kind = "heif"
    elif data[:2] == b"\xff\x0a" or data[:12] == b"\x00\x00\x00\x0cJXL \r\n\x87\n":
        kind = "jxl"
    return kind if kind not in register() else None


def advice(suffixes: Iterable[str]) -> str:
    """'.heic files are read after pip install …' where files with these suffixes were left out for want of an extra."""
    suffixes = set(suffixes)
    lines = [
        f"{names} files are read after: pip install 'protoprune[{extra}]'"
        for extra, (_, names, known) in PLUGINS.items()
        if extra not in register() and suffixes & set(known)
    ]
    return "; ".join(lines)


def archive_kind(head: bytes) -> str | None:
    """'a zip archive' and the like for a file that begins so and cannot be a list; None when it may be one."""
    if head.startswith(_SEAL):  # text without control characters, and no file is called so
        return "a feature file or a training record"
    if len(head) < 20 or not _CONTROL.search(head):  # a file may well be called PAR1
        return None
    for magic, kind in _MAGIC:
        # Every zip of today asks for a version below 256 (APPNOTE 4.4.3); a name that begins as one goes on otherwise.
        if head.startswith(magic) and (magic != b"PK\x03\x04" or head[5] == 0):
            return kind
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")  # checks the header's sum
    except tarfile.HeaderError:
        return None
    return "a tar archive"


def refuse_archive(data: bytes, name: str, wanted: str = "a list of paths") -> None:
    """Raise UsageError for what is no list (or what else is `wanted`) by its content, whatever its name."""
    kind = archive_kind(data[:512])
    if kind in _UNPACKING:
        raise UsageError(f"{name}: {kind}, not {wanted}; unpack it first ({_UNPACKING[kind]})")
    if kind:
        raise UsageError(f"{name}: {kind}, not {wanted}")
