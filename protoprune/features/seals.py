"""Seals: digests that show damage in an HDF5 file of ours before HDF5 reads any of it.

HDF5 leaves the first BLOCK bytes of a file to its owner. Ours holds one line of text there:

    protoprune-seal 1 <xxh3-64 of the JSON> {"format": …, "size": …, "structure": …, "datasets": {name: [offset, bytes,
    digest]}}

`structure` is the digest of all bytes that belong to no dataset, so HDF5's own headers, attributes and trees are known
to be good before HDF5 follows them (damaged ones make it allocate terabytes, loop or crash). A dataset's digest is that
of its bytes; it is null as long as the dataset may change, and for good where another dataset holds a digest a row.
Digests are xxh3-64 in hexadecimal. Knows nothing of HDF5 but that its datasets are contiguous.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash

from protoprune.text import parse_json

BLOCK = 4096
_MARK = b"protoprune-seal 1 "
SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Where HDF5 notes that a file is open for writing (superblock versions 0 and 1), which a killed process leaves behind.
_OPEN_FLAGS = (BLOCK + 20, 4)
_CHUNK = 16 << 20  # bytes that are read at once


class Damaged(Exception):
    """What is damaged, as the end of 'its … '; the caller knows the file's name and the way on."""


@dataclass
class Seal:
    """What the first line of a file says of the rest."""

    format: str
    size: int  # bytes of the file
    structure: str
    datasets: dict[str, list[Any]]  # name -> [offset, bytes, digest or None]

    def digest(self, name: str) -> str | None:
        return self.datasets[name][2] if name in self.datasets else None


def digest(data: np.ndarray) -> str:
    """The digest of an array's bytes."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def read(file: BinaryIO) -> Seal | None:
    """The seal of an open file whose structure is as it was written; None for a file without one.

    Raises Damaged where the seal, the length or the structure is not what it was.
    """
    head = file.read(BLOCK)
    sealed = head.startswith(_MARK)
    if not sealed and file.read(len(SIGNATURE)) != SIGNATURE:
        return None  # none of ours
    seal = _parse(head) if sealed else None
    if seal is None:
        raise Damaged("its first line, the seal, is not what was written")
    size = file.seek(0, 2)
    if size < seal.size:
        raise Damaged(f"it is cut short: {size:,} of {seal.size:,} bytes are there")
    if _structure(file, seal) != seal.structure:
        raise Damaged("its HDF5 structure is not what was written")
    return seal


def format_of(path: str) -> str | None:
    """The format that a file's seal names: '' where the seal is damaged, None for a file without one, or none."""
    try:
        if not os.path.isfile(path):  # opening a pipe may never end
            return None
        with open(path, "rb") as file:
            head = file.read(BLOCK)
            if not head.startswith(_MARK):
                return "" if file.read(len(SIGNATURE)) == SIGNATURE else None
    except (OSError, ValueError):
        return None
    seal = _parse(head)
    return seal.format if seal else ""


def make(path: str, format: str, extents: Mapping[str, tuple[int, int]], constant: Iterable[str]) -> None:
    """Seal a new file: its structure, and the datasets that will not change any more.

    extents: (offset, bytes) of every dataset in the file.
    """
    with open(path, "r+b") as file:
        seal = Seal(format, file.seek(0, 2), "", {name: [*where, None] for name, where in extents.items()})
        seal.structure = _structure(file, seal)
        _fill(file, seal, constant)


def complete(path: str, but: Iterable[str] = ()) -> None:
    """Seal the other datasets too, when nothing is written any more; but not those that have digests of their own."""
    with open(path, "r+b") as file:
        if (seal := _parse(file.read(BLOCK))) is not None:  # else it was damaged meanwhile: whoever reads it is told
            _fill(file, seal, [name for name in seal.datasets if seal.digest(name) is None and name not in set(but)])


def damaged_datasets(file: BinaryIO, seal: Seal, only: Iterable[str] | None = None) -> list[str]:
    """Names of the datasets of an open file, or of `only` some of them, whose bytes are not what was sealed."""
    looked_at = {name: seal.datasets[name] for name in (seal.datasets if only is None else only)}
    return [name for name, (offset, size, was) in looked_at.items()
            if was is not None and _digest(file, [(offset, size)]) != was]  # fmt: skip


def _fill(file: BinaryIO, seal: Seal, names: Iterable[str]) -> None:
    for name in names:
        offset, size, _ = seal.datasets[name]
        seal.datasets[name][2] = _digest(file, [(offset, size)])
    text = json.dumps(asdict(seal)).encode()
    line = _MARK + xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
    assert len(line) <= BLOCK, "a seal must fit into one block"
    file.seek(0)
    file.write(line.ljust(BLOCK, b"\0"))


def _parse(head: bytes) -> Seal | None:
    own, _, text = head.removeprefix(_MARK).rstrip(b"\0").removesuffix(b"\n").partition(b" ")
    if not head.startswith(_MARK) or xxhash.xxh3_64_hexdigest(text).encode() != own:
        return None
    try:
        seal = Seal(**parse_json(text))
        extents = [(*where, None)[:2] for where in seal.datasets.values()]
        inside = all(0 <= offset <= seal.size and 0 <= size <= seal.size - offset for offset, size in extents)
    except (ValueError, TypeError, AttributeError):  # whoever made it can make digests too
        return None
    return seal if inside else None


def _structure(file: BinaryIO, seal: Seal) -> str:
    """The digest of all bytes between the block and the end that belong to no dataset."""
    gaps, end = [], BLOCK
    for offset, size in sorted([_OPEN_FLAGS, *((offset, size) for offset, size, _ in seal.datasets.values())]):
        if size:
            gaps.append((end, offset - end))
            end = offset + size
    return _digest(file, [*gaps, (end, seal.size - end)])


def _digest(file: BinaryIO, parts: Iterable[tuple[int, int]]) -> str:
    state = xxhash.xxh3_64()
    for offset, size in parts:
        file.seek(offset)
        for start in range(0, size, _CHUNK):
            state.update(file.read(min(_CHUNK, size - start)))
    return state.hexdigest()
