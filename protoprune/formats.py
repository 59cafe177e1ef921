"""Image formats that Pillow reads with a plugin's help: register what is installed, name what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module

# extra -> (module, what its files are called, their suffixes)
PLUGINS = {
    "heif": ("pillow_heif", "HEIC/HEIF", (".heic", ".heics", ".heif", ".heifs", ".hif")),
    "jxl": ("pillow_jxl", "JPEG XL", (".jxl",)),
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


@cache
def register() -> frozenset[str]:
    """Teach Pillow the formats whose plugins are installed; the extras that are there."""
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
