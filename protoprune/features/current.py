"""Which rows of an earlier feature file still hold an image: by name, size and times, and by content where in doubt.

A tree that was copied or restored may have the names, sizes and times of modification of another one, whatever its
pixels, or other times and the same pixels. What no program can set is the ctime, so within one root it vouches for a
file; where it or the time of modification is another one, and for files below another root, what was read of the image
then (a digest of all its bytes, see `featurefile`) is compared with what it holds now. Knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_64_intdigest

from protoprune.features.featurefile import FeatureFile
from protoprune.images.decode import TRANSIENT
from protoprune.images.listing import ImageList

if TYPE_CHECKING:
    from protoprune.features.featureset import FeatureSet


_BATCH = 65_536  # names that are decoded at once


@dataclass
class Known:
    """What earlier files have of a list of images."""

    rows: list[np.ndarray]  # (n,) for each file: its row that holds image i, -1 for none
    compared: np.ndarray  # (n,) bool: images whose content was compared
    other: np.ndarray  # (n,) bool: those of them whose content no file has


def content_digest(data: bytes) -> int:
    """xxh3-64 of an encoded image; never 0, which stands for an image that was not read."""
    return xxh3_64_intdigest(data) or 1


def digests_of(file: FeatureFile | FeatureSet, paths: Iterable[str]) -> dict[str, int]:
    """Path -> digest of the encoded image that was embedded, of those of `paths` of which the file knows it."""
    wanted, content = set(paths), file.content
    found: dict[str, int] = {}
    for first in range(0, len(content), _BATCH):
        some = slice(first, first + _BATCH)
        pairs = zip(file.paths[some], content[some].tolist(), strict=True)
        found.update((path, digest) for path, digest in pairs if digest and path in wanted)
    return found


def known_rows(
    images: ImageList, files: Sequence[FeatureFile], moved: bool, read: Callable[[np.ndarray], np.ndarray]
) -> Known:
    """Match the images with the rows of earlier files.

    read: rows of the list (m,) -> their content digests (m,) uint64, 0 where an image cannot be read; called once, for
    the images in doubt. With `moved` there is no doubt: names, sizes and times of modification say all.
    """
    rows = [_alike(images, file, moved) for file in files]
    was = [np.where(at >= 0, file.content[at], 0).astype(np.uint64) for file, at in zip(files, rows, strict=True)]
    doubt = [_doubt(images, file, at, moved) for file, at in zip(files, rows, strict=True)]
    compared = np.zeros(len(images), bool)
    for one, digests in zip(doubt, was, strict=True):
        compared |= one & (digests != 0)
    now = np.zeros(len(images), np.uint64)
    if compared.any():
        now[compared] = read(np.flatnonzero(compared))
    for file, at, one, digests in zip(files, rows, doubt, was, strict=True):
        speaks = now != digests
        if file.provenance["root"] == images.root:  # without a digest, or unreadable now: only the times can
            speaks &= ((digests != 0) & (now != 0)) | _other_time(images, file, at)
        else:
            speaks |= digests == 0
        at[one & speaks] = -1
    found = np.zeros(len(images), bool)
    for at in rows:
        found |= at >= 0
    return Known(rows, compared, compared & ~found)


def _alike(images: ImageList, file: FeatureFile, moved: bool) -> np.ndarray:
    """(n,) the finished row of each image with the same name and size, -1 for none; and with the same time of
    modification, where there is no digest to compare the content by."""
    paths = file.paths
    if paths == images.paths:
        rows = np.arange(len(paths))
    else:
        row_of = {path: row for row, path in enumerate(paths)}
        rows = np.array([row_of.get(path, -1) for path in images.paths], np.int64)
    good = file.finished() & ~np.isin(file.status, TRANSIENT)
    same = (rows >= 0) & good[rows] & (images.mtime_ns >= 0)
    same &= file.size[rows] == images.size
    comparable = np.zeros(len(rows), bool) if moved else file.content[rows] != 0
    return np.where(same & (comparable | ~_other_time(images, file, rows)), rows, -1)


def _other_time(images: ImageList, file: FeatureFile, rows: np.ndarray) -> np.ndarray:
    """(n,) bool: rows of another time of modification."""
    return (rows >= 0) & (file.mtime_ns[rows] != images.mtime_ns)


def _doubt(images: ImageList, file: FeatureFile, rows: np.ndarray, moved: bool) -> np.ndarray:
    """(n,) bool: rows that are an image's by name and size, perhaps by time of modification, and no more."""
    if moved:
        return np.zeros(len(rows), bool)
    if file.provenance["root"] != images.root:
        return rows >= 0
    doubt = _other_time(images, file, rows)
    if images.ctime_ns is not None:
        before = file.ctime_ns[rows]
        doubt |= (rows >= 0) & (before >= 0) & (images.ctime_ns >= 0) & (before != images.ctime_ns)
    return doubt
