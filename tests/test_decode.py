"""One file -> pixels: equal to Pillow's for every format, equal to torchvision's after preprocessing, or a status."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from helpers import encoded, many_scans, noise, picture, write_image
from PIL import Image, ImageFilter, ImageOps, features

from protoprune import formats
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images import jpeg
from protoprune.images.decode import (
    FAST_MARGIN,
    MAX_PIXELS,
    ON_WHITE,
    ImageError,
    Preprocess,
    Status,
    _decode,
    _on_white,
    crop,
    decode,
    load,
    read_bounded,
    silence_libtiff,
)
from protoprune.images.listing import image_suffixes
from protoprune.sources.reader import ImageReader

RGB = picture(67, 45, seed=3)
WITH_ALPHA = RGB.copy()
WITH_ALPHA.putalpha(Image.linear_gradient("L").resize(RGB.size))
PLAIN = Preprocess(size=32, resize=32)


def deep(image: Image.Image = RGB) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)  # 16 bits of the same grey


def reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        colours = np.asarray(image.convert("RGBA")).astype(float)
        alpha = colours[:, :, 3:] / 255
        return (colours[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


ENCODINGS = {
    "jpeg 4:4:4": encoded(RGB, "JPEG", subsampling=0, quality=95),
    "jpeg 4:2:2": encoded(RGB, "JPEG", subsampling=1),
    "jpeg 4:2:0": encoded(RGB, "JPEG", subsampling=2),
    "jpeg grey": encoded(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg progressive": encoded(RGB, "JPEG", progressive=True, optimize=True),
    "jpeg rgb": encoded(RGB, "JPEG", keep_rgb=True),
    "png": encoded(RGB, "PNG"),
    "png grey": encoded(RGB.convert("L"), "PNG"),
    "png 1 bit": encoded(RGB.convert("1"), "PNG"),
    "png palette": encoded(RGB.quantize(64), "PNG"),
    "png palette transparent": encoded(RGB.quantize(64), "PNG", transparency=3),
    "png palette alpha": encoded(RGB.quantize(64), "PNG", transparency=bytes(range(64))),
    "png la": encoded(WITH_ALPHA.convert("LA"), "PNG"),
    "png rgba": encoded(WITH_ALPHA, "PNG"),
    "png rgb transparent colour": encoded(RGB, "PNG", transparency=(1, 2, 3)),
    "gif": encoded(RGB.quantize(32), "GIF"),
    "gif transparent": encoded(RGB.quantize(32), "GIF", transparency=2),
    "gif animated": encoded(RGB, "GIF", save_all=True, append_images=[picture(67, 45, seed=9)] * 3),
    "bmp": encoded(RGB, "BMP"),
    "bmp palette": encoded(RGB.quantize(16), "BMP"),
    "tga": encoded(WITH_ALPHA, "TGA"),
    "ppm": encoded(RGB, "PPM"),
    "ico": encoded(RGB.resize((32, 32)), "ICO"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encoded(RGB.convert("CMYK"), "TIFF"),
    "tiff jpeg": encoded(RGB, "TIFF", compression="jpeg"),
    "webp lossy": encoded(RGB, "WEBP", quality=80),
    "webp lossless alpha": encoded(WITH_ALPHA, "WEBP", lossless=True),
    "webp animated": encoded(RGB, "WEBP", save_all=True, append_images=[picture(67, 45, seed=9)], lossless=True),
    "mpo": encoded(RGB, "MPO", save_all=True, append_images=[picture(67, 45, seed=9)]),
}
if features.check("avif"):
    ENCODINGS["avif"] = encoded(RGB, "AVIF", quality=80)
if features.check("jpg_2000"):
    ENCODINGS["jpeg 2000"] = encoded(RGB, "JPEG2000")


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.filterwarnings("ignore:Palette images")  # the reference's warning; ours must not warn
def test_every_format_equals_pillow(name):
    pixels = decode(ENCODINGS[name])
    expected = reference(ENCODINGS[name])
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    if not any(
        word in name for word in ("cmyk", "1 bit", "transparent", "grey", "png la", "ico", "rgba", "alpha", "tga")
    ):
        # The reference itself shows the picture, and of an animation not the second frame.
        assert np.abs(expected.astype(int) - np.asarray(RGB)).mean() < 24


def test_suffix_does_not_matter(tmp_path):
    path = tmp_path / "really_a_gif.jpg"
    path.write_bytes(ENCODINGS["gif"])
    status = path.stat()
    crop = load(str(path), status.st_size, status.st_mtime_ns, Preprocess(size=45, resize=45))
    assert np.array_equal(crop, reference(ENCODINGS["gif"])[:, 11 : 11 + 45])


# --- more than 8 bits a channel, which `convert("RGB")` would clip to white


GREY = np.asarray(RGB.convert("L")).astype(int)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format):
    pixels = decode(encoded(deep(), format))
    assert pixels.shape == (45, 67, 3)
    assert np.abs(pixels - GREY[:, :, None]).max() <= 1
    assert len(np.unique(pixels)) > 100


def test_12_bits_stored_in_16_are_scaled_by_12():
    twelve = Image.fromarray((GREY * 16 + 15).astype(np.uint16))
    assert np.abs(decode(encoded(twelve, "TIFF")) - GREY[:, :, None]).max() <= 1


def test_32_bit_integers_and_floats_are_stretched():
    for image in (Image.fromarray(GREY.astype(np.int32) * 70_000), Image.fromarray(GREY.astype(np.float32) / 255)):
        pixels = decode(encoded(image, "TIFF"))
        stretched = (GREY - GREY.min()) * 255.0 / (GREY.max() - GREY.min())
        assert np.abs(pixels - stretched[:, :, None]).max() <= 1


@pytest.mark.parametrize("values", [[np.nan, np.inf], [np.nan, np.nan], [7.0, 7.0], [-np.inf, 3.0]])
def test_floats_that_cannot_be_stretched_still_give_pixels(values):
    image = Image.fromarray(np.array([values], np.float32))
    assert decode(encoded(image, "TIFF")).shape == (1, 2, 3)


def test_lab_tiff():
    grey = Image.merge("LAB", [Image.new("L", (8, 8), 128), *[Image.new("L", (8, 8), 128)] * 2])
    pixels = decode(encoded(grey, "TIFF")).astype(int)
    assert pixels.shape == (8, 8, 3)
    assert np.ptp(pixels, axis=2).max() <= 3  # a = b = 0, stored in the middle of a byte, is grey
    assert 105 < pixels.mean() < 135  # L = 50 %


# --- transparency


def test_black_drawings_on_transparency_differ():
    """They are one image where the colour under full transparency, black in most files, counts."""
    drawings = []
    for x in (4, 20):
        image = Image.new("RGBA", (32, 32))
        image.paste((0, 0, 0, 255), (x, 8, x + 6, 24))
        drawings.append(decode(encoded(image, "PNG")))
    assert not np.array_equal(*drawings)
    assert np.array_equal(drawings[0][0, 0], [255, 255, 255])
    assert np.array_equal(drawings[0][10, 5], [0, 0, 0])


@pytest.mark.parametrize("name", ["png rgba", "png la", "png palette alpha", "webp lossless alpha", "gif transparent"])
def test_images_with_transparent_parts_are_noted(name):
    assert note_of(ENCODINGS[name]) == ON_WHITE


def test_opaque_alpha_changes_nothing_and_is_not_noted():
    image = RGB.copy()
    image.putalpha(255)
    assert np.array_equal(decode(encoded(image, "PNG")), np.asarray(RGB))
    for data in (encoded(image, "PNG"), ENCODINGS["png"], ENCODINGS["jpeg 4:2:0"]):
        assert note_of(data) == ""


def test_half_transparent_red_on_white_is_pink():
    assert np.array_equal(decode(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "PNG"))[0, 0], [255, 127, 127])


def test_16_bits_with_a_transparent_grey():
    values = np.array([[0, 40_000, 65_535, 257]], np.uint16)
    image = Image.fromarray(values)
    image.info["transparency"] = 0
    flat, transparent = _on_white(image)
    assert transparent
    assert np.asarray(flat).tolist() == [[255, 156, 255, 1]]


def note_of(data: bytes) -> str:
    return crop(data, PLAIN)[1]


# --- formats that a plugin reads


def test_heic_is_read_with_its_plugin(tmp_path):
    pytest.importorskip("pillow_heif")
    assert formats.register() >= {"heif"}
    pixels = decode(encoded(RGB, "HEIF", quality=95))
    assert pixels.shape == (45, 67, 3)
    assert np.abs(pixels.astype(int) - np.asarray(RGB)).mean() < 12
    assert ".heic" in image_suffixes()


def test_jpeg_xl_is_read_with_its_plugin():
    pytest.importorskip("pillow_jxl")
    formats.register()
    assert np.array_equal(decode(encoded(RGB, "JXL", lossless=True)), np.asarray(RGB))
    assert ".jxl" in image_suffixes()


@pytest.mark.parametrize(
    ("data", "extra"),
    [(b"\0\0\0\x1cftypheic" + bytes(40), "heif"), (b"\xff\x0a" + bytes(40), "jxl"),
     (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "jxl")],
)  # fmt: skip
def test_a_missing_plugin_is_named_by_content_and_by_name(data, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "register", lambda: frozenset())
    monkeypatch.setattr(Image, "ID", [one for one in Image.ID if one not in ("HEIF", "JXL")])
    with pytest.raises(ImageError, match=rf"pip install 'protoprune\[{extra}\]'") as caught:
        decode(data)
    assert caught.value.status == Status.UNSUPPORTED  # tried again on the next run
    assert f"protoprune[{extra}]" in formats.advice({".txt", *formats.PLUGINS[extra][2]})
    assert formats.advice({".txt"}) == ""


# --- decoding at a fraction


def big(edge: int) -> bytes:
    return encoded(picture(edge * 3 // 2, edge, seed=1).filter(ImageFilter.GaussianBlur(2)), "JPEG", quality=92)


@pytest.mark.parametrize(("edge", "decoded"), [(191, 191), (192, 96), (200, 100), (256, 96), (600, 150)])
def test_fast_decoding_keeps_three_times_the_target(edge, decoded):
    """Target 32: the smallest n/8 of at most a half that leaves 96 pixels."""
    pixels, shape, _ = _decode(big(edge), FAST_MARGIN * 32)
    assert (min(pixels.shape[:2]), min(shape)) == (decoded, edge)


def test_fast_decoding_gives_nearly_the_same_crop(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(big(701))
    status = path.stat()
    crops = [
        load(str(path), status.st_size, status.st_mtime_ns, Preprocess(56, 64, decode=how)) for how in ("exact", "fast")
    ]
    assert crops[0].shape == crops[1].shape
    difference = np.abs(crops[0].astype(int) - crops[1])
    assert 0 < difference.mean() < 4
    assert Preprocess(56, 64).describe() != Preprocess(56, 64, decode="fast").describe()


def test_fast_decoding_leaves_other_formats_alone():
    data = encoded(picture(300, 300, seed=1), "PNG")
    assert np.array_equal(_decode(data, 8)[0], decode(data))


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, format, exif=exif.tobytes())
    pixels, expected = decode(data), reference(data)
    assert pixels.shape == ((45, 67, 3) if orientation < 5 else (67, 45, 3))
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_change_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(RGB, "JPEG", exif=exif.tobytes())).shape == (45, 67, 3)


def test_damaged_exif_does_not_lose_the_image():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.abs(decode(data).astype(int) - reference(encoded(RGB, "JPEG"))).max() <= 1


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_orientation_behind_long_segments(before):
    """Maker notes and colour profiles of up to 64 KB each may stand before EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(RGB, "JPEG", exif=exif)
    filler = (b"\xff\xed" + (65_000 + 2).to_bytes(2, "big") + bytes(65_000)) * before
    data = data[:2] + filler + data[2:]
    assert jpeg.orientation(data) == 6
    assert np.array_equal(decode(data), reference(data))


def test_a_word_that_looks_like_exif_elsewhere_is_no_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    comment = b"Exif\0\0" + exif.tobytes()[6:]
    data = encoded(RGB, "JPEG", comment=comment)
    assert jpeg.orientation(data) == 1
    assert decode(data).shape == (45, 67, 3)


def test_orientation_in_xmp_counts_as_pillow_counts_it():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(RGB, "JPEG", xmp=xmp)
    assert reference(data).shape == (67, 45, 3)
    assert np.abs(decode(data).astype(int) - reference(data)).max() <= 1


# --- what cannot be decoded


def unread_bmp() -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 5, 5, 1, 24, 9, *[0] * 5) + bytes(100)


def unread_dds() -> bytes:
    header = struct.pack("<7I44x", 124, 0x1007, 8, 8, 0, 0, 0) + struct.pack("<8I", 32, 8, 0, 0, 0, 0, 0, 0)
    return b"DDS " + header + bytes(20) + bytes(64)


def float_rgb_tiff() -> bytes:
    """2 x 2 pixels of three 32-bit floats, a valid TIFF that Pillow has no mode for."""
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 150), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 162),
               (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 48), (339, 3, 3, 156)]  # fmt: skip
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *one) for one in entries) + bytes(4)
    data = b"II*\0\x08\0\0\0" + ifd
    return data.ljust(150, b"\0") + struct.pack("<6H", 32, 32, 32, 3, 3, 3) + bytes(48)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (unread_bmp(), "Unsupported BMP compression"),
        (unread_dds(), "Unknown pixel format flags"),
        (b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHIH", 0, 0, 9, 9, 72, 0, 0) + b"\1\0\x09\0" + bytes(90), "WMF"),
        (float_rgb_tiff(), "TIFF: unknown pixel mode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "a PostScript file"),
    ],
)
def test_what_is_valid_but_not_read_is_unsupported_and_not_damaged(data, said):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert said in caught.value.reason
    assert caught.value.status == Status.UNSUPPORTED


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_a_damaged_header_is_no_reason_to_call_a_file_no_image(format):
    with pytest.raises(ImageError) as caught:
        decode(encoded(RGB, format)[:20])
    assert caught.value.status in (Status.CORRUPT, Status.TRUNCATED)


@pytest.mark.parametrize("keyword", [b"zTXt", b"iCCP"])
def test_a_png_that_unpacks_to_gigabytes_is_one_failure(keyword):
    bomb = zlib.compress(bytes(100_000_000))
    body = keyword + b"x\0\0" + bomb
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = ENCODINGS["png"]
    tracemalloc.start()
    with pytest.raises(ImageError) as caught:
        decode(data[:33] + chunk + data[33:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status == Status.TOO_LARGE
    assert peak < 50e6


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND")
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_of_claimed_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(RGB, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BAD = {
    "empty": (b"", Status.EMPTY),
    "text": (b"<html>404 not found</html>", Status.NOT_AN_IMAGE),
    "zeros": (bytes(2000), Status.NOT_AN_IMAGE),
    "jpeg start only": (b"\xff\xd8\xff", Status.CORRUPT),
    "jpeg cut": (ENCODINGS["jpeg 4:2:0"][:900], Status.TRUNCATED),
    "jpeg cut at the end": (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-400], Status.TRUNCATED),
    "png cut": (encoded(Image.fromarray(noise(64, 64)), "PNG")[:4000], Status.TRUNCATED),
    "gif cut": (encoded(Image.fromarray(noise(64, 64)).quantize(64), "GIF")[:1500], Status.TRUNCATED),
    "webp cut": (encoded(Image.fromarray(noise(64, 64)), "WEBP")[:900], None),
    "png crc": (ENCODINGS["png"][:60] + b"\x00\x01\x02" + ENCODINGS["png"][63:], None),
    "bomb png": (png_header(20_000, 20_000), Status.TOO_LARGE),
    "bomb png just above": (png_header(MAX_PIXELS // 4096 + 1, 4096), Status.TOO_LARGE),
    "bomb jpeg": (jpeg_of_claimed_size(65_000, 65_000), Status.TOO_LARGE),
    "bomb bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6), None),
}
BAD["bomb bmp"] = (BAD["bomb bmp"][0], Status.TOO_LARGE)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_has_a_status_and_a_reason(name):
    data, expected = BAD[name]
    tracemalloc.start()
    with pytest.raises(ImageError) as caught:
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if expected is None:  # damaged in a way that the format's library words in its own way
        assert caught.value.status in (Status.TRUNCATED, Status.CORRUPT, Status.NOT_AN_IMAGE)
    else:
        assert caught.value.status == expected
    assert 0 < len(caught.value.reason) <= 160
    assert "0x" not in caught.value.reason  # an address would make every reason unique
    assert peak < 50e6


@pytest.mark.parametrize(("image", "count"), [(RGB, 1), (RGB.convert("L"), 1), (RGB.convert("CMYK"), 1)])
def test_scans_of_ordinary_jpegs(image, count):
    assert jpeg.scans(encoded(image, "JPEG"), 100) == count
    # A thumbnail before the picture, and the pictures after it in an MPO, have scans of their own.
    exif = b"Exif\0\0" + encoded(image.convert("L"), "JPEG", progressive=True)
    data = encoded(image, "JPEG", progressive=True, exif=exif)
    assert jpeg.scans(data + data, 100) == jpeg.scans(encoded(image, "JPEG", progressive=True), 100)
    assert 3 < jpeg.scans(data, 100) < 30
    assert np.abs(decode(data).astype(int) - reference(data)).max() <= 1


def test_a_jpeg_of_more_scans_than_anybody_writes_is_refused():
    assert jpeg.scans(many_scans(64, 100), 1000) == 100
    assert decode(many_scans(64, 100)).shape == (64, 64, 3)
    assert jpeg.scans(many_scans(64, 1500), 200) == 201  # counted no further
    with pytest.raises(ImageError, match="more than 100 scans") as caught:
        decode(many_scans(64, 101))
    assert caught.value.status == Status.TOO_SLOW


@pytest.mark.parametrize("cut", [3, 5, 20, 300, 700])
def test_scans_of_a_jpeg_that_is_cut_off(cut):
    assert jpeg.scans(ENCODINGS["jpeg progressive"][:cut], 100) <= 10


@pytest.mark.timeout(60)
def test_no_file_is_read_beyond_a_bound_that_its_reason_says(tmp_path):
    """A sparse file of 100 GB takes no room on the disk, and all the memory that there is when it is read."""
    with open(tmp_path / "x.jpg", "wb") as file:
        file.write(ENCODINGS["jpeg 4:2:0"])
        file.truncate(100_000_000_000)
    with pytest.raises(ImageError, match="more than 1 GB") as caught:
        loaded(tmp_path / "x.jpg")
    assert caught.value.status == Status.TOO_LARGE
    with pytest.raises(ImageError, match="more than 1 GB"):
        ImageReader(tmp_path)("x.jpg")


def test_want_of_memory_while_reading_is_the_images_trouble(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def read(self, size=-1):
            raise MemoryError

    with pytest.raises(ImageError) as caught:
        read_bounded(Full(), 10)
    assert caught.value.status == Status.UNREADABLE
    write_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: Full().read())
    for function in (decode, lambda data: crop(data, PLAIN)):
        with pytest.raises(ImageError, match="not enough memory"):
            function((tmp_path / "a.png").read_bytes())


@pytest.mark.parametrize("mode", ["F", "I", "I;16", "RGBA"])
def test_deep_images_take_no_more_memory_than_others(mode):
    """Of 6 million pixels: as many bytes in copies of numpy as the RGB image has, and no float64 of all of it."""
    values = np.tile(np.arange(3000) % 200 + {"RGBA": 0, "I;16": 1000}.get(mode, 70_000), (2000, 1))
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([values] * 4).astype(np.uint8))
    else:
        image = Image.fromarray(values.astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]))
    data = encoded(image, "TIFF", compression="tiff_lzw")
    for _ in range(3):  # threads of other tests that were given up may end meanwhile, and would be counted
        tracemalloc.start()
        pixels = decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak < 6_000_000 * 9:  # twice the RGB image, which is joined of parts, and a third
            break
    assert pixels.shape == (2000, 3000, 3)
    assert peak < 6_000_000 * 9
    if mode == "RGBA":
        expected = reference(data)
    elif mode == "I;16":
        expected = (values >> 4)[:, :, None]  # 11 bits are 12
    else:
        expected = ((values - values.min()) * (255 / 199)).round()[:, :, None]
    assert np.abs(pixels.astype(int) - expected).max() <= (mode == "RGBA")


def test_bands_that_differ_are_stretched_alike(monkeypatch):
    monkeypatch.setattr("protoprune.images.decode._BAND", 10)
    values = np.array([[np.nan, 1, 2, 3], [100, np.inf, 7, 9], [np.nan] * 4, [-100, 0, 50, 25]], np.float32)
    got = decode(encoded(Image.fromarray(values), "TIFF"))[:, :, 0]
    finite = np.nan_to_num((values.astype(float) + 100) * (255 / 200), nan=0, posinf=255)
    assert np.array_equal(got, finite.round())


def test_every_kind_of_damage_ends_in_pixels_or_a_status():
    silence_libtiff()
    rng = np.random.default_rng(0)
    outcomes = set()
    for name in ("jpeg 4:2:0", "jpeg progressive", "png palette", "gif", "tiff lzw", "webp lossy", "bmp"):
        original = ENCODINGS[name]
        for turn in range(25):
            data = bytearray(original)
            for at in rng.integers(2, len(data), 4):
                data[at] = rng.integers(256)
            if turn % 2:
                del data[rng.integers(len(data) // 2, len(data)) :]
            try:
                assert decode(bytes(data)).shape[2] == 3
                outcomes.add(Status.OK)
            except ImageError as error:
                outcomes.add(error.status)
    assert {Status.OK, Status.TRUNCATED, Status.CORRUPT} <= outcomes  # and nothing but ImageError came out


def test_damaged_tiffs_are_silent(run_program, tmp_path):
    data = bytearray(encoded(Image.fromarray(noise(64, 64)), "TIFF", compression="tiff_lzw"))
    data[200:1200] = b"\xff" * 1000
    (tmp_path / "bad.tif").write_bytes(data)
    program = (
        "import sys\n"
        "from protoprune.images.decode import *\n"
        "if 'quiet' in sys.argv: silence_libtiff()\n"
        "try:\n"
        "    decode(open('bad.tif', 'rb').read())\n"
        "except ImageError as error:\n"
        "    print(error.status.label)\n"
    )
    loud = run_program(python=("-c", program))
    quiet = run_program("quiet", python=("-c", program))
    if not loud.stderr:
        pytest.skip("this Pillow's libtiff is silent by itself")
    assert quiet.stdout.strip()
    assert quiet.stderr == b""


# --- the file under the image


def loaded(path, preprocess=PLAIN, size=None, mtime=None) -> np.ndarray:
    status = os.stat(path)
    return load(str(path), status.st_size if size is None else size, mtime or status.st_mtime_ns, preprocess)


def test_load_reads_the_file_that_was_listed(tmp_path):
    path = write_image(tmp_path / "a.png", width=32, height=32)
    assert np.array_equal(loaded(path), np.asarray(Image.open(path)))


def test_file_that_changed_since_it_was_listed(tmp_path):
    path = write_image(tmp_path / "a.png")
    for arguments in ({"size": 5}, {"mtime": 12345}):
        with pytest.raises(ImageError) as caught:
            loaded(path, **arguments)
        assert caught.value.status == Status.CHANGED


def test_files_that_cannot_be_opened(tmp_path):
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere.png", tmp_path / "broken.png")
    (tmp_path / "folder.png").mkdir()
    expected = {"gone.png": Status.MISSING, "broken.png": Status.MISSING, "loop.png": Status.UNREADABLE}
    expected |= {"folder.png": Status.UNREADABLE, "x" * 300 + ".png": Status.UNREADABLE}
    for name, status in expected.items():
        with pytest.raises(ImageError) as caught:
            load(str(tmp_path / name), -1, -1, PLAIN)
        assert caught.value.status == status, name


@pytest.mark.timeout(10)
def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError) as caught:
        load(str(tmp_path / "pipe.jpg"), -1, -1, PLAIN)
    assert caught.value.status == Status.UNREADABLE


def test_failures_do_not_leak_file_handles(tmp_path):
    (tmp_path / "folder.png").mkdir()
    write_image(tmp_path / "a.png")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("folder.png", "a.png", "gone.png") * 5:
        with pytest.raises(ImageError):
            load(str(tmp_path / name), 1, 1, PLAIN)
    assert len(os.listdir("/proc/self/fd")) == before


# --- preprocessing, against torchvision and timm

SHAPES = [(500, 375), (375, 500), (224, 224), (225, 224), (223, 1000), (301, 300), (33, 47), (47, 33), (640, 641)]
SHAPES += [(1, 1), (1, 5), (5, 1), (2, 3), (256, 256), (257, 256), (999, 250), (250, 999)]


def torchvision_reference(pixels, preprocess: Preprocess, squash=False) -> np.ndarray:
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(preprocess.interpolation)
    size = (preprocess.resize, preprocess.resize) if squash else preprocess.resize
    steps = [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(preprocess.size)]
    return np.asarray(transforms.Compose(steps)(Image.fromarray(pixels)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_resize_and_crop_equal_torchvision(width, height, interpolation):
    # Of long strips Pillow sometimes resizes the rows first, sometimes the columns, and rounds in between: on noise
    # that alone is a mean error of 0.4.
    strip = max(width, height) > 3 * min(width, height)
    pixels = np.asarray(picture(width, height)) if strip else noise(width, height)
    preprocess = Preprocess(size=224, resize=256, interpolation=interpolation)
    got, expected = preprocess.apply(pixels).astype(int), torchvision_reference(pixels, preprocess)
    assert got.shape == (224, 224, 3)
    assert np.abs(got - expected).mean() < (0.4 if strip else 0.05)
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize(("size", "resize"), [(32, 32), (31, 36), (37, 40), (224, 224), (65, 64 * 65 // 56)])
def test_odd_crops_equal_torchvision(size, resize):
    for width, height in [(61, 80), (80, 61), (63, 63)]:
        pixels = np.asarray(picture(width, height, seed=width))
        preprocess = Preprocess(size, resize)
        got, expected = preprocess.apply(pixels).astype(int), torchvision_reference(pixels, preprocess)
        assert np.abs(got - expected).mean() < 0.05
        assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 300), (1, 1), (224, 224)])
def test_squash_equals_torchvision(width, height):
    pixels = np.asarray(picture(width, height))
    preprocess = Preprocess(size=200, resize=224, crop_mode="squash")
    got, expected = preprocess.apply(pixels).astype(int), torchvision_reference(pixels, preprocess, squash=True)
    assert got.shape == (200, 200, 3)
    assert np.abs(got - expected).mean() < 0.4
    assert np.abs(got - expected).max() <= 2


def test_nearest_takes_existing_pixels_only():
    pixels = noise(50, 40)
    got = Preprocess(size=64, resize=72, interpolation="nearest").apply(pixels)
    assert {tuple(p) for p in got.reshape(-1, 3)} <= {tuple(p) for p in pixels.reshape(-1, 3)}


@pytest.mark.parametrize(("width", "height"), [(60_000, 2), (2, 60_000), (60_000, 1)])
def test_extreme_shapes_cost_little_memory(width, height):
    pixels = np.asarray(picture(width, height))
    tracemalloc.start()
    crop = Preprocess(size=224, resize=256).apply(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert crop.shape == (224, 224, 3)
    assert peak < 20e6  # resized before the crop it would be 256 x 7,680,000 x 3 bytes
    middle = pixels[:, width // 2] if width > 2 else pixels[height // 2]  # (1 or 2, 3)
    assert np.abs(crop[112, 112] - middle.mean(axis=0)).max() < 4


def test_wide_images_equal_torchvision_where_the_crop_alone_is_computed():
    pixels = np.asarray(picture(900, 60))
    preprocess = Preprocess(size=56, resize=64)
    got, expected = preprocess.apply(pixels).astype(int), torchvision_reference(pixels, preprocess)
    assert np.abs(got - expected).mean() < 0.4
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("architecture", ["vit_small_patch16_224.dino", "resnet50.a1_in1k", "convnext_tiny.fb_in22k"])
def test_timm_models_get_timms_own_preprocessing(architecture):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_model_data_config

    cfg = resolve_model_data_config(None, pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    preprocess = Preprocess.from_timm(cfg)
    pixels = noise(333, 250, seed=5)
    expected = create_transform(**cfg, is_training=False)(Image.fromarray(pixels)).numpy()  # (3, s, s) normalised
    mean, std = np.reshape(preprocess.mean, (3, 1, 1)), np.reshape(preprocess.std, (3, 1, 1))
    got = (preprocess.apply(pixels).transpose(2, 0, 1) / 255.0 - mean) / std
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() * 255 * 0.22 < 0.05


def timm_config(**changes) -> dict:
    return {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3} | {
        "crop_pct": 0.875,
        "crop_mode": "center",
        **changes,
    }


def test_from_timm_sizes():
    assert Preprocess.from_timm(timm_config()).resize == 256
    assert Preprocess.from_timm(timm_config(), image_size=112).resize == 128
    assert Preprocess.from_timm(timm_config(crop_pct=None)).resize == 224


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (3, 224, 196)}, "--image-size"),
        ({"crop_mode": "border"}, "crop mode 'border'"),
        ({"interpolation": "random"}, "interpolation 'random'"),
    ],
)
def test_configurations_that_are_not_supported(changes, message):
    with pytest.raises(ProtopruneError, match=message) as caught:
        Preprocess.from_timm(timm_config(**changes))
    assert isinstance(caught.value, UsageError) == ("input_size" in changes)


def test_description_tells_every_setting_apart():
    base = Preprocess(224, 256)
    others = [Preprocess(225, 256), Preprocess(224, 257), Preprocess(224, 256, "bilinear")]
    others += [Preprocess(224, 256, crop_mode="squash"), Preprocess(224, 256, mean=(0.1, 0, 0))]
    assert all(other.describe() != base.describe() for other in others)


# --- other people's odd files


@pytest.mark.filterwarnings("ignore")
def test_odd_images_each_have_a_defined_outcome(shared_data, tmp_path):
    archive = shared_data / "odd-images.tgz"
    if not archive.exists():
        pytest.skip("odd-images.tgz is not there")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    outcome = {}
    for path in sorted((tmp_path / "odd-images").iterdir()):
        if path.suffix == ".tsv":
            continue
        try:
            outcome[path.name] = loaded(path).shape
        except ImageError as error:
            outcome[path.name] = error.status
    assert len(outcome) >= 40
    for name, result in outcome.items():
        if "EOFError" in name:  # raised for the frames after the first, which is all that is wanted
            continue
        failed = "Error" in name
        assert isinstance(result, Status) == failed, (name, result)
        if "Bomb" in name:
            assert result == Status.TOO_LARGE
