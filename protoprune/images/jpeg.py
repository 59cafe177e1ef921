"""What a JPEG says of itself before and between its pixels: orientation, and how many scans it has.

Only segments are walked (ITU T.81, B.1), so it costs little beside decoding. Knows nothing of pixels: see `decode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# In the pixels 0xFF is followed by a stuffed zero, by one of the restart markers D0 to D7 or by padding: all else is a
# marker. So is FF 01, which libjpeg skips there.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_NO_PADDING = re.compile(rb"[^\xff]")
_MOST_SEGMENTS = 100_000
_APP1, _SOS, _EOI = 0xE1, 0xDA, 0xD9
_NO_FRAME, _PROGRESSIVE = (0xC4, 0xC8, 0xCC), (0xC2, 0xC6, 0xCA, 0xCE)


def segments(data: bytes, at: int = 2) -> Iterator[tuple[int, int, int]]:
    """(marker, start and end of its content) of the segments from `at`, up to the pixels or the end of the image.

    The last one is that of the pixels (SOS) or the end (EOI), with an empty content; without it the data is no sequence
    of segments from there on.
    """
    for _ in range(_MOST_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            found = _NO_PADDING.search(data, at)
            at = found.start() - 1 if found else len(data)
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these stand alone
            at += 2
        else:
            break_off = marker in (_SOS, _EOI)
            end = at + 2 if marker == _EOI else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            yield marker, at + 4, end
            if break_off:
                return
            at = end


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG; 0 (ask Pillow) when there is one that cannot be read quickly.

    The segments before the pixels are walked: others, of up to 64 KB each, may stand before the one that says it.
    """
    marker, block, xmp = 0, b"", False
    for marker, start, end in segments(data):
        if marker == _APP1:
            segment = data[start:end]
            if segment.startswith(b"Exif\0\0"):  # a long block goes on in the next such segment
                block += segment[6:] if block else segment
            xmp = xmp or b"tiff:Orientation" in segment
    if marker not in (_SOS, _EOI):
        return 0  # no sequence of segments
    if block:
        from PIL import Image

        exif = Image.Exif()
        try:
            exif.load(block)
            if 0x0112 in exif:
                return exif[0x0112]
        except Exception:
            return 0
    # Pillow turns to the XMP block next, which editors write beside or instead of EXIF.
    return 0 if xmp else 1


def scans(data: bytes, most: int) -> int:
    """How many scans the first image of a JPEG is decoded from, counted up to `most` + 1: each takes as long as all the
    pixels do, however few bytes it has."""
    count, at, parts = 0, 2, 0
    while count <= most:
        marker = end = 0
        for marker, start, end in segments(data, at):
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME and end - start > 5:
                parts = 255 if marker in _PROGRESSIVE else data[start + 5]
        if marker != _SOS:
            break
        count += 1
        if data[start : start + 1] >= bytes([parts]):
            break  # all components in one sequential scan: libjpeg takes no other
        found = _MARKER.search(data, end)
        if found is None:
            break
        at = found.start()
    return count
