"""Which files belong together by their names: WebDataset's keys, and names that have several dots.

A key ends at the first dot of a file's name, so that `7.left.jpg`, `7.right.jpg` and `7.cls` are one sample. But
`scan.1.jpg` and `scan.1.cls` belong together more closely than `scan.1.jpg` and `scan.2.cls`, which have that key too:
a file belongs to the image with the longest name that its own begins with.
"""

from __future__ import annotations

from collections.abc import Container, Iterator


def key_of(name: str) -> str:
    """WebDataset's key of a file: its path up to the first dot of the file's name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def stem_of(name: str) -> str:
    """The name without its last suffix."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.rpartition(".")
    return f"{folder}{slash}{stem if dot else last}"


def levels(stem: str) -> Iterator[str]:
    """`d/a.b.c` -> `d/a.b.c`, `d/a.b` and `d/a`, its key."""
    key = key_of(stem)
    yield stem
    while stem != key:
        stem = stem_of(stem)
        yield stem


def owner(name: str, stems: Container[str]) -> str | None:
    """Which of the images with these stems a file that is none belongs to; None for no single one, but to its key."""
    return next((one for one in levels(stem_of(name)) if one in stems), None)
