"""A contact sheet: the easiest and the hardest images side by side, as in figure 6 of Sorscher et al. 2022."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.images.decode import ImageError, decode
from protoprune.sources.reader import ImageReader
from protoprune.sources.shard import ShardOptions
from protoprune.stores import public

if TYPE_CHECKING:
    from PIL import Image

_THUMB, _GAP, _LABEL = 96, 4, 14  # pixels


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    root: str,
    *,
    options: ShardOptions | None = None,
    content: Mapping[str, int] | None = None,
    heads: tuple[str, str] = ("easiest (most prototypical)", "hardest"),
) -> tuple[bytes, int]:
    """A PNG with one line a row: (title, easiest image paths, hardest image paths).

    `heads` says what stands left and right, where that is something else, `options` how shards were read, `content`
    what the images were when they were embedded (see `current.digests_of`).

    Returns the PNG's bytes and how many images could not be read any more, or are other ones now (grey squares).
    Raises ProtopruneError when that is all of them.
    """
    import io

    from PIL import Image, ImageDraw

    easy = max(len(one) for _, one, _ in rows)
    hard = max(len(one) for _, _, one in rows)
    cell = _THUMB + _GAP
    middle = easy * cell + 3 * _GAP
    line = cell + _LABEL
    sheet = Image.new("RGB", (middle + hard * cell + _GAP, _LABEL + len(rows) * line + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 1), heads[0], fill="black")
    draw.text((middle, 1), heads[1], fill="black")
    unreadable = 0
    with ImageReader(root, options, content) as read:
        for number, (title, easiest, hardest) in enumerate(rows):
            top = _LABEL + number * line
            draw.text((_GAP, top + 1), title.encode("ascii", "replace").decode(), fill="gray")
            for left, paths in ((_GAP, easiest), (middle, hardest)):
                for column, path in enumerate(paths):
                    picture = _thumbnail(read, path, _THUMB)
                    unreadable += picture is None
                    place = (left + column * cell, top + _LABEL)
                    sheet.paste(picture or Image.new("RGB", (_THUMB, _THUMB), "lightgray"), place)
    if unreadable == sum(len(side) for _, *sides in rows for side in sides):
        raise ProtopruneError(
            f"none of the {unreadable:,} images of the sheet could be read any more, or they changed since; --root "
            f"says where they are now, if not below {public(root)}"
        )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue(), unreadable


def _thumbnail(read: ImageReader, path: str, side: int) -> Image.Image | None:
    try:
        return thumbnail(read(path), side)
    except ImageError:
        return None


def thumbnail(data: bytes, side: int) -> Image.Image | None:
    """A PIL image of `side` pixels squared, the middle of the picture; None for data that are no image."""
    from PIL import Image, ImageOps

    try:
        pixels = decode(data)
    except ImageError:
        return None
    return ImageOps.fit(Image.fromarray(np.ascontiguousarray(pixels)), (side, side), Image.Resampling.BICUBIC)
