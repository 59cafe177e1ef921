"""EXIF orientation, wherever a format keeps it and whatever stands before it: as Pillow's `ImageOps.exif_transpose`."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image, ImageOps

from protoprune.images import jpeg
from protoprune.images.decode import decode

RGB = picture(31, 17, seed=3)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def exif(orientation: int | None = 6, *, big: bool = False, before: int = 0) -> bytes:
    """A block of EXIF, with `before` entries of other tags (a comment each) before the orientation."""
    order, mark = (">", b"MM\0*") if big else ("<", b"II*\0")
    entries = [(0x0020 + i, 2, 4, b"abc\0") for i in range(before)]
    if orientation is not None:
        entries.append((0x0112, 3, 1, struct.pack(order + "H", orientation) + b"\0\0"))
    body = struct.pack(order + "H", len(entries))
    body += b"".join(struct.pack(order + "HHI", *one[:3]) + one[3] for one in entries)
    return mark + struct.pack(order + "I", 8) + body + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


PLAIN = encoded(RGB, "JPEG", quality=95)
ICC = b"".join(
    segment(0xE2, b"ICC_PROFILE\0" + bytes((number, 4)) + random.Random(number).randbytes(65_000))
    for number in range(1, 5)
)
MARKED = segment(0xE1, b"Exif\0\0" + exif())
COMMENT = segment(0xFE, b"Exif\0\0" + exif(8) + b" Exif II*\0 \xff\xe1 \xff\xda")

# name -> (what stands between the start of a JPEG and the rest of it, the orientation)
JPEGS = {
    "first": (MARKED, 6),
    "big-endian": (segment(0xE1, b"Exif\0\0" + exif(big=True)), 6),
    "behind a colour profile of four segments": (ICC + MARKED, 6),
    "before it": (MARKED + ICC, 6),
    "behind a comment that contains Exif": (COMMENT + MARKED, 6),
    "a comment that contains Exif, and none": (COMMENT, 1),
    "a profile that contains Exif, and none": (segment(0xE2, b"ICC_PROFILE\0\1\1" + b"Exif\0\0" + exif(8)), 1),
    "behind padding": (b"\xff\xff\xff" + MARKED, 6),
    "padding between all": (b"\xff" + COMMENT + b"\xff\xff" + ICC + b"\xff" * 9 + MARKED + b"\xff", 6),
    "behind an empty segment": (segment(0xEC, b"") + MARKED, 6),
    "many tags before": (segment(0xE1, b"Exif\0\0" + exif(before=18)), 6),
    "none in EXIF": (segment(0xE1, b"Exif\0\0" + exif(None)), 1),
    "EXIF in two segments": (
        segment(0xE1, (block := b"Exif\0\0" + exif(before=18))[:100]) + segment(0xE1, b"Exif\0\0" + block[100:]), 6,
    ),
    "XMP alone": (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 8), 8),
    "XMP of another mind": (MARKED + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 8), 6),
    "XMP before EXIF": (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 3) + MARKED, 6),
    "an orientation that does not exist": (segment(0xE1, b"Exif\0\0" + exif(9)), 1),
}  # fmt: skip
TURNED = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def check(data: bytes, orientation: int) -> None:
    """Ours is Pillow's, and Pillow's is what the test means."""
    with Image.open(io.BytesIO(data)) as image:
        stored = image.convert("RGB")
    meant = stored.transpose(TURNED[orientation]) if orientation in TURNED else stored
    assert np.array_equal(by_pillow(data), np.asarray(meant))
    assert np.abs(decode(data).astype(int) - by_pillow(data)).max() <= 1


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("progressive", [False, True])
def test_of_jpegs(name, progressive):
    before, orientation = JPEGS[name]
    plain = encoded(RGB, "JPEG", quality=95, progressive=progressive)
    for data in (plain[:2] + before + plain[2:], plain[:20] + before + plain[20:]):  # before and behind JFIF
        check(data, orientation)
        assert jpeg.orientation(data) in (orientation, 0, 9)  # 0: Pillow is asked


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 9, 30])
def test_segments_that_end_early_leave_it_to_pillow(cut):
    assert jpeg.orientation((PLAIN[:2] + MARKED)[:cut]) == 0
    assert jpeg.orientation(PLAIN[:2] + b"\xff\xe1\xff\xff" + PLAIN[2:]) == 0  # longer than the file


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("big", [False, True])
def test_of_other_formats(orientation, big):
    block = exif(orientation, big=big, before=2)
    profile = random.Random(0).randbytes(200_000)
    for data in (
        encoded(RGB, "PNG", exif=block),
        encoded(RGB, "PNG", exif=block, icc_profile=profile),
        encoded(RGB, "WEBP", exif=block, quality=95),
        encoded(RGB, "WEBP", exif=b"Exif\0\0" + block, icc_profile=profile, lossless=True),
        encoded(RGB, "MPO", exif=b"Exif\0\0" + block, save_all=True, append_images=[picture(31, 17, seed=9)]),
    ):
        check(data, orientation)


def test_of_pngs_with_the_chunk_behind_the_pixels():
    """The standard allows it; whatever Pillow makes of it, so do we."""
    png, block = encoded(RGB, "PNG"), b"eXIf" + exif()
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    for data in (png[:-12] + chunk + png[-12:], png[:33] + chunk + png[33:]):
        assert np.array_equal(decode(data), by_pillow(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_of_tiffs(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(RGB, "TIFF", exif=tags, compression="tiff_lzw", icc_profile=bytes(70_000))
    assert np.array_equal(decode(data), by_pillow(data))
    assert decode(data).shape == ((17, 31, 3) if orientation < 5 else (31, 17, 3))


@pytest.mark.parametrize("damage", range(40))
def test_damaged_exif_is_no_reason_to_lose_an_image(damage):
    """Whatever it says then: the image is there, upright or as it is stored."""
    rng = random.Random(damage)
    block = bytearray(exif(before=3))
    for _ in range(3):
        block[rng.randrange(len(block))] = rng.randrange(256)
    block = bytes(block[: rng.randrange(6, len(block) + 1)])
    for data in (
        PLAIN[:2] + segment(0xE1, b"Exif\0\0" + block) + PLAIN[2:],
        encoded(RGB, "PNG", exif=block),
        encoded(RGB, "WEBP", exif=block),
    ):
        assert sorted(decode(data).shape) == [3, 17, 31]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", [b"\xff" * 100_000_000, b"\xff\xe5\0\2" * 10_000_000])
def test_segments_without_end_are_walked_quickly_or_not_at_all(filler):
    data = PLAIN[:2] + filler + MARKED + PLAIN[2:]
    assert jpeg.orientation(data) == (6 if filler[1] == 0xFF else 0)
    assert jpeg.scans(data, 100) <= 1
