"""Images -> small pictures in WebP sprites, most important first, within a number of bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from protoprune.images.decode import ImageError
from protoprune.report.sheet import thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 72  # pixels of a thumbnail
ACROSS = 12  # thumbnails of a line of a sprite, and lines
_QUALITY = (62, 48, 34)  # of WebP: 1.5, 1.2 and 0.9 kB a photograph
MISSING = -2  # the image could not be read any more
NONE = -1  # not among those that the page has room for


@dataclass
class Sprites:
    """WebP files of ACROSS x ACROSS thumbnails; `place` says where an image is: number of sprite * ACROSS^2 + cell."""

    images: list[bytes] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)  # row -> place, or MISSING

    @property
    def missing(self) -> int:
        return sum(place == MISSING for place in self.place.values())


def make(
    rows: Sequence[int],
    read: Callable[[int], bytes],
    budget: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sprites:
    """Thumbnails of `rows`, the first ones first, in at most `budget` bytes; `read(row)` gives an image's bytes.

    The whole is encoded at the best quality at which it fits, else at the worst, and cut off where the budget ends.
    """
    per_sprite = ACROSS * ACROSS
    result, cells, tiles = Sprites(), [], []
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        pictures = pool.map(lambda row: _picture(read, row), rows)
        for done, (row, picture) in enumerate(zip(rows, pictures, strict=True), 1):
            if picture is None:
                result.place[row] = MISSING
            else:
                cells.append(row)
                tiles.append(np.asarray(picture))
            if on_progress:
                on_progress(done, len(rows))
    groups = [tiles[first : first + per_sprite] for first in range(0, len(tiles), per_sprite)]
    for quality in _QUALITY:
        result.images, spent = [], 0
        for group in groups:
            sprite = _encode(group, quality)
            spent += len(sprite)
            if spent > budget:
                break
            result.images.append(sprite)
        if len(result.images) == len(groups):
            break
    room = len(result.images) * per_sprite
    result.place |= {row: place for place, row in enumerate(cells[:room])}
    return result


def _picture(read: Callable[[int], bytes], row: int) -> Image | None:
    try:
        return thumbnail(read(row), SIDE)
    except (OSError, ImageError):
        return None


def _encode(tiles: Sequence[np.ndarray], quality: int) -> bytes:
    from PIL import Image

    lines = -(-len(tiles) // ACROSS)
    sheet = np.full((lines * SIDE, ACROSS * SIDE, 3), 128, np.uint8)
    for number, tile in enumerate(tiles):
        y, x = divmod(number, ACROSS)
        sheet[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE] = tile
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()
