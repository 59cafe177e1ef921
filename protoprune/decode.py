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

import io
import math
import os
import stat
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np

from protoprune import formats
from protoprune.errors import ProtopruneError, UsageError


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

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


# Trouble with the machine rather than with the bytes (the file system, memory, a missing program): tried again on
# every run.
TRANSIENT = (Status.MISSING, Status.UNREADABLE, Status.CHANGED, Status.UNSUPPORTED)

# Pillow refuses images of more than twice its MAX_IMAGE_PIXELS; the same bound holds on the fast path.
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)

# A strip 60,000 pixels long and 2 high would be resized to gigabytes before the crop; beyond this ratio only the crop
# is computed (Pillow's `box`), which is exact too but slower for ordinary shapes.
MAX_ASPECT = 4


# `fast` lets libjpeg-turbo decode to n/8 of the size, n <= 4, while both edges stay at least this many times the resize
# target. Once, the smallest that holds the target, is too little: cosines of features down to .977 on photographs.
FAST_MARGIN = 3

DECODERS = ("exact", "fast")
ON_WHITE = "transparent, shown on white"  # the note of such an image in the feature file


class ImageError(Exception):
    """An image that cannot be used: its status and a reason that names neither path nor position."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Preprocess:
    """Evaluation preprocessing: resize, centre crop, normalise (timm's `center` and `squash` crop modes)."""

    size: int  # side of the square crop, pixels
    resize: int  # side that the short edge (center) or both edges (squash) are resized to, pixels
    interpolation: str = "bicubic"  # bicubic, bilinear, lanczos, nearest
    crop_mode: str = "center"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of pixels in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decode: str = "exact"  # or fast: large JPEGs are decoded at half their size or less

    @classmethod
    def from_timm(cls, cfg: dict, image_size: int | None = None) -> Preprocess:
        """From a timm data configuration (`timm.data.resolve_model_data_config`); `image_size` overrides the crop."""
        _, height, width = cfg["input_size"]
        if image_size is None and height != width:
            raise UsageError(f"the model's input is {height}x{width}, not square; give --image-size")
        size = image_size or height
        if cfg["crop_mode"] not in ("center", "squash"):
            raise ProtopruneError(f"crop mode {cfg['crop_mode']!r} is not supported; choose another encoder")
        if cfg["interpolation"] not in ("bicubic", "bilinear", "lanczos", "nearest"):
            raise ProtopruneError(f"interpolation {cfg['interpolation']!r} is not supported; choose another encoder")
        resize = math.floor(size / (cfg["crop_pct"] or 1.0))
        return cls(size, resize, cfg["interpolation"], cfg["crop_mode"], tuple(cfg["mean"]), tuple(cfg["std"]))

    def describe(self) -> dict:
        """Everything that changes pixels, as plain values: part of the cache key and of the provenance."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "exif": "applied", "alpha": "white"}

    def apply(self, pixels: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels (h, w, 3) uint8 -> (size, size, 3) uint8, as torchvision's Resize and CenterCrop on a PIL image.

        `shape` is the (height, width) that the file has, where `pixels` were decoded at a fraction of it.
        """
        height, width = shape or pixels.shape[:2]
        if self.crop_mode == "squash":
            target = (self.resize, self.resize)
        else:  # torchvision truncates the long edge
            short = min(height, width)
            target = tuple(
                self.resize if edge == short else int(self.resize * edge / short) for edge in (height, width)
            )
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

    import PIL

    bundled = os.path.join(os.path.dirname(os.path.dirname(PIL.__file__)), "pillow.libs", "libtiff*")
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
    try:
        pixels, shape, transparent = _decode(data, least)
        return preprocess.apply(pixels, shape), ON_WHITE if transparent else ""
    except ImageError:
        raise
    except (MemoryError, RuntimeError):  # torch reports want of memory as a RuntimeError
        raise ImageError(Status.UNREADABLE, "not enough memory to decode and resize it") from None
    except Exception as error:  # one image must never end a run over millions
        raise ImageError(Status.CORRUPT, f"{type(error).__name__}: {_reason(error)}") from None


def decode(data: bytes) -> np.ndarray:
    """An encoded image -> (h, w, 3) uint8 RGB, upright. Raises ImageError when it cannot be decoded."""
    return _decode(data)[0]


def _decode(data: bytes, least: int | None = None) -> tuple[np.ndarray, tuple[int, int], bool]:
    """Pixels, the (height, width) of the whole image, and whether parts of it were transparent.

    A JPEG may come at n/8 of its size, n <= 4, where its edges are then at least `least` pixels long.
    """
    if not data:
        raise ImageError(Status.EMPTY, "the file has zero bytes")
    if data[:3] == b"\xff\xd8\xff":
        found = _decode_jpeg(data, least)
        if found is not None:
            return *found, False
    pixels, transparent = _decode_pillow(data)
    return pixels, pixels.shape[:2], transparent


def read_file(path: str, size: int, mtime_ns: int) -> bytes:
    """The bytes of a file that is still the one that was listed. Raises ImageError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ImageError(Status.UNREADABLE, "not a regular file")
            data = file.read()
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        raise ImageError(Status.MISSING, "no such file") from None
    except OSError as error:
        raise ImageError(Status.UNREADABLE, error.strerror or type(error).__name__) from None
    if {(before.st_size, before.st_mtime_ns), (after.st_size, after.st_mtime_ns)} != {(size, mtime_ns)}:
        raise ImageError(Status.CHANGED, "the file changed since it was listed")
    return data


def _open_at_once(path: str, flags: int) -> int:
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
        if colorspace not in ("YCbCr", "Gray") or height * width > MAX_PIXELS or _exif_orientation(data) != 1:
            return None
        scale = {} if least is None else {"min_height": least, "min_width": least, "min_factor": 2}
        if min(height, width) < 2 * (least or 0):
            scale = {}
        # strict: a warning is an error, and Pillow decides
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **scale), (height, width)
    except ValueError:
        return None


def _exif_orientation(data: bytes) -> int:
    """The orientation of a JPEG; 0 (ask Pillow) when there is one that cannot be read quickly.

    The segments before the pixels are walked: others, of up to 64 KB each, may stand before the one that says it.
    """
    at, block, xmp = 2, b"", False
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xD9):  # pixels, end
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1:
            segment = data[at + 4 : at + 2 + length]
            if segment.startswith(b"Exif\0\0"):  # a long block goes on in the next such segment
                block += segment[6:] if block else segment
            xmp = xmp or b"tiff:Orientation" in segment
        at += 2 + length
    if at + 2 > len(data) or data[at] != 0xFF:
        return 0  # not a sequence of segments
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


def _decode_pillow(data: bytes) -> tuple[np.ndarray, bool]:
    """Pixels, and whether parts of them were transparent."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    formats.register()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            flat, transparent = _on_white(ImageOps.exif_transpose(image))
            return np.asarray(_to_rgb(flat)), transparent
    except Image.DecompressionBombError:
        raise ImageError(Status.TOO_LARGE, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        extra = formats.extra_for(data)
        if extra:
            reason = f"a {formats.PLUGINS[extra][1]} file; to read it: pip install 'protoprune[{extra}]'"
            raise ImageError(Status.UNSUPPORTED, reason) from None
        raise ImageError(Status.NOT_AN_IMAGE, "not in any image format that Pillow knows") from None
    except NotImplementedError as error:
        raise ImageError(Status.UNSUPPORTED, _reason(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise every kind of error on damaged files
        text = _reason(error)
        if "Ghostscript" in text:
            raise ImageError(Status.UNSUPPORTED, "needs Ghostscript, which is not installed") from None
        cut = any(word in text.lower() for word in ("truncated", "unexpected end", "eof", "not enough data"))
        raise ImageError(Status.TRUNCATED if cut else Status.CORRUPT, text) from None


def _on_white(image):
    """(the image on white, True) where parts of a loaded PIL image are transparent, else (the same image, False)."""
    from PIL import Image

    if not image.has_transparency_data:
        return image, False
    if image.mode.startswith("I"):  # 16 bits and one transparent grey
        values, clear = np.asarray(image), image.info["transparency"]
        if not isinstance(clear, int) or not (values == clear).any():
            return image, False
        return Image.fromarray(np.where(values == clear, 255, _to_8_bits(values)).astype(np.uint8)), True
    try:
        whole = image.convert("RGBA")
    except ValueError:  # a mode that knows no way there; its transparency is then no more than a remark
        return image, False
    if whole.getextrema()[3][0] == 255:
        return image, False
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB"), True


def _to_rgb(image):
    """A loaded PIL image of any mode -> mode RGB; deep images are scaled to 8 bits, which `convert` would clip."""
    from PIL import Image, ImageCms

    if image.mode == "RGB":
        return image
    if image.mode == "LAB":  # Pillow converts this mode by colour profiles only
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # the way round a warning; the same pixels
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits -> uint8.

    Unsigned values within 16 bits are shifted down from the smallest usual depth (8, 10, 12, 14, 16 bits) that holds
    the largest of them, since scanners and microscopes store 12 bits in 16; others are stretched from least to most.
    """
    if values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 0xFFFF:
        depth = max(8, math.ceil(int(values.max()).bit_length() / 2) * 2)
        return (values.astype(np.uint16) >> (depth - 8)).astype(np.uint8)
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    with np.errstate(invalid="ignore"):
        scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).round().clip(0, 255).astype(np.uint8)


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
