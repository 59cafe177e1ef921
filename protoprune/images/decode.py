"""One image file -> the square uint8 RGB crop that an encoder sees, or a status that says why not.

JPEG by libjpeg-turbo (`simplejpeg`) and an antialiased uint8 resize in torch, everything else by Pillow. Pixels are
those of torchvision's transforms on PIL images: nearly all equal, none more than a step or two of 255 away. (Strips
longer than 2:1, and strips squashed to a square, may differ more: Pillow picks the order of its two passes.)
EXIF orientation is applied, the first frame of an animation is taken, and images with more than 8 bits a channel are
scaled to 8. Transparent images are shown on white, as browsers and viewers show them: `convert("RGB")`, and with it
torchvision's loader, keeps the colour under full transparency instead, which is black in most files, so that black
drawings on transparency would all be one image. What this module does not know: encoders, batches, feature files.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, BinaryIO, TypedDict

import numpy as np

from protoprune import formats
from protoprune.arguments import check_fields
from protoprune.bounds import check_whole, shown
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images import jpeg

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Status(IntEnum):
    """What became of an image; stored as one byte a row in the feature file."""

    PENDING = 0
    OK = 1
    MISSING = 2
    UNREADABLE = 3
    CHANGED = 4
    EMPTY = 5
    NOT_AN_IMAGE = 6
    TRUNCATED = 7
    CORRUPT = 8
    TOO_LARGE = 9
    UNSUPPORTED = 10
    TOO_SLOW = 11

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


# Trouble with the machine rather than with the bytes (the file system, memory, a missing program): tried again on
# every run. TOO_SLOW is none of them: it is counted in CPU time, and would cost as much again.
TRANSIENT = (Status.MISSING, Status.UNREADABLE, Status.CHANGED, Status.UNSUPPORTED)

# Pillow refuses images of more than twice its MAX_IMAGE_PIXELS; the same bound holds on the fast path.
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)

# Nothing of more than MAX_PIXELS is decoded, and without compression these take less at 8 bits a channel.
MAX_BYTES = 1_000_000_000

# Encoders write about 10 scans; 300 fit into 280 kB and take 15 s of CPU time, 1,500 take minutes.
MAX_SCANS = 100

# A strip 60,000 pixels long and 2 high would be resized to gigabytes before the crop; beyond this ratio only the crop
# is computed (Pillow's `box`), which is exact too but slower for ordinary shapes.
MAX_ASPECT = 4


# `fast` lets libjpeg-turbo decode to n/8 of the size, n <= 4, while both edges stay at least this many times the resize
# target. Once, the smallest that holds the target, is too little: cosines of features down to .977 on photographs.
FAST_MARGIN = 3

_TIME = (1 << 63) - 1
_BAND = 1 << 20  # pixels that are computed with at once
DECODERS = ("exact", "fast")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
CROP_MODES = ("center", "squash")
LARGEST_SIDE = 8192  # pixels of an encoder's input
# Words of Pillow's errors.
_CUT = (
    "truncated",
    "unexpected end",
    "eof",
    "not enough data",
    "not enough image data",
    "but only got",
    "no more data",
)
_TOO_MUCH = (
    "too large for",
    "decompressed data too large",
    "decompression bomb",
    "exceeds limit",
    "exceeds the maximum",
)
_UNREAD = (
    "unsupported", "not supported", "unimplemented", "not implemented", "cannot find loader", "unknown",
    "not installed", "not available", "unrecogni", "cannot handle", "unavailable", "unable to decode this",
)  # fmt: skip
ON_WHITE = "transparent, shown on white"  # the note of such an image in the feature file


class ImageError(Exception):
    """An image that cannot be used: its status and a reason that names neither path nor position."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class DataConfig(TypedDict):
    """What timm says of a model's input, as far as it is used here."""

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float | None
    crop_mode: str
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Preprocess:
    """Evaluation preprocessing: resize, centre crop, normalise (timm's `center` and `squash` crop modes)."""

    size: int  # side of the square crop, pixels
    resize: int  # side that the short edge (center) or both edges (squash) are resized to, pixels
    interpolation: str = "bicubic"  # bicubic, bilinear, lanczos, nearest
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixels in [0, 1], one a channel
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    decode: str = "exact"  # or fast: large JPEGs are decoded at half their size or less

    def __post_init__(self) -> None:
        """Raise UsageError for what no image could be made with, or only another one than was asked for."""
        check_fields(self, globals())
        check_whole("size", self.size, 1, LARGEST_SIDE, " pixels")
        check_whole("resize", self.resize, self.size, 4 * LARGEST_SIDE, " pixels, no less than the crop's size")
        for name, value, choices in (
            ("interpolation", self.interpolation, INTERPOLATIONS), ("crop_mode", self.crop_mode, CROP_MODES),
            ("decode", self.decode, DECODERS),
        ):  # fmt: skip
            if value not in choices:
                raise UsageError(f"{name} {value}: expected one of {', '.join(choices)}")
        for name in ("mean", "std"):
            values = np.asarray(getattr(self, name))
            if values.shape != (3,) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
                raise UsageError(f"{name} {shown(getattr(self, name))}: expected three numbers, one a channel")
            object.__setattr__(self, name, tuple(map(float, values)))
        if min(self.std) <= 0:
            raise UsageError(f"std {shown(self.std)}: expected numbers above 0, of pixels in [0, 1]")

    @classmethod
    def from_timm(cls, cfg: DataConfig, image_size: int | None = None) -> Preprocess:
        """From a timm data configuration (`timm.data.resolve_model_data_config`); `image_size` overrides the crop."""
        _, height, width = cfg["input_size"]
        if image_size is None and height != width:
            raise UsageError(f"the model's input is {height}x{width}, not square; give --image-size")
        size = image_size or height
        if cfg["crop_mode"] not in CROP_MODES:
            raise ProtopruneError(f"crop mode {cfg['crop_mode']!r} is not supported; choose another encoder")
        if cfg["interpolation"] not in INTERPOLATIONS:
            raise ProtopruneError(f"interpolation {cfg['interpolation']!r} is not supported; choose another encoder")
        resize = math.floor(size / (cfg["crop_pct"] or 1.0))
        return cls(size, resize, cfg["interpolation"], cfg["crop_mode"], tuple(cfg["mean"]), tuple(cfg["std"]))

    def describe(self) -> dict[str, int | str | list[float]]:
        """Everything that changes pixels, as plain values: part of the cache key and of the provenance."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "exif": "applied", "alpha": "white"}

    def apply(self, pixels: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels (h, w, 3) uint8 -> (size, size, 3) uint8, as torchvision's Resize and CenterCrop on a PIL image.

        `shape` is the (height, width) that the file has, where `pixels` were decoded at a fraction of it.
        """
        if not isinstance(pixels, np.ndarray) or pixels.shape[2:] != (3,) or pixels.dtype != np.uint8:
            raise UsageError(f"pixels {shown(pixels)}: expected an array (h, w, 3) of uint8")
        height, width = shape or pixels.shape[:2]
        if self.crop_mode == "squash":
            target = (self.resize, self.resize)
        else:  # torchvision truncates the long edge
            short = min(height, width)
            edges = [self.resize if edge == short else int(self.resize * edge / short) for edge in (height, width)]
            target = edges[0], edges[1]
        top, left = (round((edge - self.size) / 2.0) for edge in target)
        if self.interpolation in ("bicubic", "bilinear") and max(target) <= MAX_ASPECT * self.resize:
            resized = _resize_torch(pixels, target, self.interpolation)
            return resized[top : top + self.size, left : left + self.size]
        return _resize_pillow(pixels, target, (top, left), self.size, self.interpolation)


def silence_libtiff() -> None:
    """Stop libtiff from writing its own complaints to the terminal; Pillow still reports what cannot be read.

    One damaged TIFF can print hundreds of lines from C. Pillow offers no switch, so the handlers of the library that
    its wheels bundle are unset; elsewhere (a system libtiff) nothing changes.
    """
    import ctypes
    import glob

    from PIL import Image  # loads the library, and what it needs in turn

    bundled = os.path.join(os.path.dirname(os.path.dirname(Image.__file__)), "pillow.libs", "libtiff*")
    for path in glob.glob(bundled):
        library = ctypes.CDLL(path)
        for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)


def load(path: str, size: int, mtime_ns: int, preprocess: Preprocess) -> np.ndarray:
    """The crop of one file, (s, s, 3) uint8; `size` and `mtime_ns` are what the listing saw.

    Raises ImageError, and nothing else, when the image cannot be used.
    """
    return crop(read_file(path, size, mtime_ns), preprocess)[0]


def crop(data: bytes, preprocess: Preprocess) -> tuple[np.ndarray, str]:
    """An encoded image -> its crop, (s, s, 3) uint8, and what the user should know of it: ON_WHITE or nothing.

    Raises ImageError, and nothing else.
    """
    least = FAST_MARGIN * preprocess.resize if preprocess.decode == "fast" else None
    with _one_image():
        pixels, shape, transparent = _decode(data, least)
        return preprocess.apply(pixels, shape), ON_WHITE if transparent else ""


def decode(data: bytes) -> np.ndarray:
    """An encoded image -> (h, w, 3) uint8 RGB, upright. Raises ImageError when it cannot be decoded."""
    with _one_image():
        return _decode(data)[0]


@contextlib.contextmanager
def _one_image() -> Iterator[None]:
    """Whatever is raised becomes an ImageError: one image must never end a run over millions."""
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, RuntimeError):  # torch reports want of memory as a RuntimeError
        raise ImageError(Status.UNREADABLE, "not enough memory to decode and resize it") from None
    except Exception as error:
        raise ImageError(Status.CORRUPT, f"{type(error).__name__}: {_reason(error)}") from None


def _decode(data: bytes, least: int | None = None) -> tuple[np.ndarray, tuple[int, int], bool]:
    """Pixels, the (height, width) of the whole image, and whether parts of it were transparent.

    A JPEG may come at n/8 of its size, n <= 4, where its edges are then at least `least` pixels long.
    """
    if not data:
        raise ImageError(Status.EMPTY, "the file has zero bytes")
    if data[:3] == b"\xff\xd8\xff":
        if jpeg.scans(data, MAX_SCANS) > MAX_SCANS:
            raise ImageError(Status.TOO_SLOW, f"a JPEG of more than {MAX_SCANS} scans, which takes long to decode")
        found = _decode_jpeg(data, least)
        if found is not None:
            return *found, False
    pixels, transparent = _decode_pillow(data)
    return pixels, pixels.shape[:2], transparent


def read_file(path: str, size: int, mtime_ns: int) -> bytes:
    """The bytes of a file that is still the one that was listed. Raises ImageError."""
    try:
        with open(path, "rb", opener=open_at_once) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ImageError(Status.UNREADABLE, "not a regular file")
            data = read_bounded(file, before.st_size)
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        raise ImageError(Status.MISSING, "no such file") from None
    except OSError as error:
        raise ImageError(Status.UNREADABLE, error.strerror or type(error).__name__) from None
    same = {size_and_times(before)[:2], size_and_times(after)[:2]} == {(size, mtime_ns)}
    if not same or len(data) != size:  # some network file systems say another size than they give
        raise ImageError(Status.CHANGED, "the file changed since it was listed")
    return data


def size_and_times(status: os.stat_result) -> tuple[int, int, int]:
    """Size, mtime and ctime of a file. Times are in ns and from 0 to 2^63 - 1: what is dated before 1970 or after 2262
    gets another number, which is as much its own."""
    return status.st_size, status.st_mtime_ns & _TIME, status.st_ctime_ns & _TIME


def check_bytes(size: int) -> None:
    """Raise ImageError for an encoded image of more bytes than are read."""
    if size > MAX_BYTES:
        raise ImageError(
            Status.TOO_LARGE, f"more than {MAX_BYTES / 1e9:.0f} GB, which is as much as is read of an image"
        )


def read_bounded(file: BinaryIO, size: int) -> bytes:
    """All of an open file of `size` bytes. Raises ImageError where that is too much."""
    check_bytes(size)
    try:
        return file.read(size + 1)  # one more: a file that grows is then seen to have changed
    except MemoryError:
        raise ImageError(Status.UNREADABLE, "not enough memory to read it") from None


def open_at_once(path: str, flags: int) -> int:
    """O_NONBLOCK: a named pipe called x.jpg must not hang the run."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode_jpeg(data: bytes, least: int | None) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The fast path: plain upright YCbCr or grey JPEG. None for everything else, damaged files included."""
    try:
        import simplejpeg
    except ImportError:  # it comes with the encoders; a contact sheet does without
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "Gray") or height * width > MAX_PIXELS or jpeg.orientation(data) != 1:
            return None
        scale: dict[str, int] = {} if least is None else {"min_height": least, "min_width": least, "min_factor": 2}
        if min(height, width) < 2 * (least or 0):
            scale = {}
        # strict: a warning is an error, and Pillow decides
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **scale), (height, width)
    except ValueError:
        return None


def _decode_pillow(data: bytes) -> tuple[np.ndarray, bool]:
    """Pixels, and whether parts of them were transparent."""
    from PIL import Image, UnidentifiedImageError

    formats.register()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise ImageError(Status.UNSUPPORTED, "a PostScript file: a program, which is not run; convert it")
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            flat, transparent = _on_white(_upright(image))
            return _pixels(flat), transparent
    except Image.DecompressionBombError:
        raise ImageError(Status.TOO_LARGE, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise every kind of error on damaged files
        raise _why(error, data) from None


def _unidentified(data: bytes) -> ImageError:
    extra = formats.extra_for(data)
    if extra:
        reason = f"a {formats.PLUGINS[extra][1]} file; to read it: pip install 'protoprune[{extra}]'"
        return ImageError(Status.UNSUPPORTED, reason)
    found = formats.complaint(data)
    if found is None:
        return ImageError(Status.NOT_AN_IMAGE, "not in any image format that Pillow knows")
    name, said = found
    error = _why(SyntaxError(said), data)
    return ImageError(error.status, f"{name}: {error.reason}"[:160])


def _why(error: Exception, data: bytes) -> ImageError:
    """Pillow's error in our words: cut off, of a kind that Pillow does not read, or damaged."""
    text = _reason(error)
    low = text.lower()
    if isinstance(error, NotImplementedError):
        return ImageError(Status.UNSUPPORTED, text)
    if any(word in low for word in _CUT):
        return ImageError(Status.TRUNCATED, text)
    if any(word in low for word in _TOO_MUCH):
        return ImageError(Status.TOO_LARGE, text)
    # Of these there is no kind that Pillow does not read: an odd number in one is damage.
    if any(word in low for word in _UNREAD) and not data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8")):
        return ImageError(Status.UNSUPPORTED, text)
    return ImageError(Status.CORRUPT, text)


def _upright(image: Picture) -> Picture:
    """A loaded PIL image, turned as its EXIF says; without that it is no copy."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF is no reason to lose an image
        pass
    return image


def _on_white(image: Picture) -> tuple[Picture, bool]:
    """(the image on white, True) where parts of a loaded PIL image are transparent, else (the same image, False)."""
    from PIL import Image

    if not image.has_transparency_data:
        return image, False
    if image.mode.startswith("I"):  # 16 bits and one transparent grey
        clear = image.info["transparency"]
        if not isinstance(clear, int) or not any((np.asarray(band) == clear).any() for _, band in _bands(image)):
            return image, False
        grey = _to_8_bits(image)
        for rows, band in _bands(image):
            grey[rows][np.asarray(band) == clear] = 255
        return Image.fromarray(grey), True
    try:
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
    except ValueError:  # a mode that knows no way there; its transparency is then no more than a remark
        return image, False
    if whole.getchannel("A").getextrema()[0] == 255:
        return image, False
    flat = Image.new("RGB", whole.size)
    for rows, band in _bands(whole):
        white = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), (0, rows.start))
    return flat, True


def _pixels(image: Picture) -> np.ndarray:
    """A loaded PIL image of any mode -> (h, w, 3) uint8; deep ones are scaled to 8 bits, which `convert` would clip."""
    from PIL import ImageCms

    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_to_8_bits(image)[:, :, None], 3, axis=2)
    if image.mode == "LAB":  # Pillow converts this mode by colour profiles only
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB") or image
    if image.mode == "P" and "transparency" in image.info:  # the way round a warning; the same pixels
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(image: Picture) -> np.ndarray:
    """Grey values of 16 or 32 bits, in a loaded PIL image -> (h, w) uint8.

    Unsigned values within 16 bits are shifted down from the smallest usual depth (8, 10, 12, 14, 16 bits) that holds
    the largest of them, since scanners and microscopes store 12 bits in 16; others are stretched from least to most.
    """
    grey = np.zeros((image.height, image.width), np.uint8)
    ranges = [_range(np.asarray(band)) for _, band in _bands(image)]
    low, high = min(one[0] for one in ranges), max(one[1] for one in ranges)
    if low > high:  # not one finite value
        return grey
    shift = None
    if image.mode != "F" and low >= 0 and high <= 0xFFFF:
        shift = max(8, math.ceil(int(high).bit_length() / 2) * 2) - 8
    for rows, band in _bands(image):
        values = np.asarray(band)
        if shift is not None:
            grey[rows] = values.astype(np.uint16) >> shift
            continue
        with np.errstate(invalid="ignore"):
            scaled = (values.astype(np.float64) - low) * (255.0 / (high - low) if high > low else 0.0)
        grey[rows] = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).round().clip(0, 255)
    return grey


def _range(values: np.ndarray) -> tuple[float, float]:
    """Least and greatest of the finite values, as plain numbers; (inf, -inf) without any."""
    finite = values if values.dtype.kind in "iu" else values[np.isfinite(values)]
    return (finite.min().item(), finite.max().item()) if finite.size else (math.inf, -math.inf)


def _bands(image: Picture) -> Iterator[tuple[slice, Picture]]:
    """(rows, PIL image of them): a deep image is 8 bytes a pixel in numpy, and as much in every step of a formula."""
    step = max(1, _BAND // image.width)
    for top in range(0, image.height, step):
        rows = slice(top, min(top + step, image.height))
        yield rows, image.crop((0, rows.start, image.width, rows.stop))


def _reason(error: Exception) -> str:
    """The message without digits and addresses, so that reasons can be counted and stored once each."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split(" <_io.")[0].split(" (")[0]
    return text[:160]


def _resize_torch(pixels: np.ndarray, target: tuple[int, int], interpolation: str) -> np.ndarray:
    if target == pixels.shape[:2]:
        return pixels
    import torch

    if not pixels.flags.writeable:
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last in memory
    resized = torch.nn.functional.interpolate(image, size=target, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()  # (H, W, 3)


def _resize_pillow(
    pixels: np.ndarray, target: tuple[int, int], corner: tuple[int, int], size: int, interpolation: str
) -> np.ndarray:
    """Resize by computing the crop only: the box is the crop's place in the original, in fractions of a pixel."""
    from PIL import Image

    scale_y, scale_x = pixels.shape[0] / target[0], pixels.shape[1] / target[1]
    top, left = corner
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize((size, size), resample, box=box))
