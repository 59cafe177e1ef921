"""Decode and resize JPEGs to a square crop, on one core, against what you would use instead.

    python benchmarks/decode_speed.py FOLDER [--resize 256] [--size 224] [--enlarge 2400] [--count 100] [--rounds 3]

The ways run in turn, on bytes in memory. Pillow and torchvision.io do what their users write: a whole decode, an
antialiased bicubic resize of the short edge, a centre crop; OpenCV has no antialiased bicubic and uses INTER_AREA.
--enlarge makes every photograph that large first (Lanczos, quality 92), for want of real ones of that size. Ways whose
library is missing are left out. Prints a markdown table of images/s: median (least-most) over the rounds.
"""

import argparse
import io
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from protoprune.images.decode import Preprocess, crop


def pillow(data: bytes, p: Preprocess) -> np.ndarray:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(CenterCrop(p.size)(Resize(p.resize, InterpolationMode.BICUBIC)(image.convert("RGB"))))


def pillow_draft(data: bytes, p: Preprocess) -> np.ndarray:
    """What Image.thumbnail and many loaders do: Pillow's own scaled decoding, the smallest that holds the target."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (p.resize, p.resize))
        return np.asarray(CenterCrop(p.size)(Resize(p.resize, InterpolationMode.BICUBIC)(image.convert("RGB"))))


def torchvision_io(data: bytes, p: Preprocess) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return center_crop(resize(pixels, [p.resize], InterpolationMode.BICUBIC, antialias=True), [p.size] * 2).numpy()


def opencv(data: bytes, p: Preprocess) -> np.ndarray:
    import cv2

    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    scale = p.resize / min(pixels.shape[:2])
    width, height = (round(edge * scale) for edge in pixels.shape[1::-1])
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (height - p.size) // 2, (width - p.size) // 2
    return pixels[top : top + p.size, left : left + p.size]


def ours(how: str):
    return lambda data, p: crop(data, Preprocess(p.size, p.resize, decode=how))[0]


WAYS = {"protoprune, exact": ours("exact"), "protoprune, --decode fast": ours("fast"), "Pillow": pillow,
        "Pillow, draft": pillow_draft, "torchvision.io": torchvision_io, "OpenCV, area": opencv}  # fmt: skip


def photographs(folder: Path, count: int, enlarge: int | None) -> list[bytes]:
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            if image.format != "JPEG" or image.mode != "RGB" or max(image.size) != 500 or len(found) == count:
                continue
            data = path.read_bytes()
            if enlarge:
                scale, buffer = enlarge / max(image.size), io.BytesIO()
                larger = image.resize([round(edge * scale) for edge in image.size], Image.Resampling.LANCZOS)
                larger.save(buffer, "JPEG", quality=92)
                data = buffer.getvalue()
            found.append(data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--enlarge", type=int)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = photographs(options.folder, options.count, options.enlarge)
    target = Preprocess(options.size, options.resize)
    rates: dict[str, list[float]] = {}
    for turn in range(options.rounds + 1):  # the first turn warms up
        for name, way in WAYS.items():
            started = time.process_time()
            try:
                for data in images:
                    way(data, target)
            except ImportError:
                continue
            if turn:
                rates.setdefault(name, []).append(len(images) / (time.process_time() - started))
    first = statistics.median(rates["protoprune, exact"])
    print(f"{len(images)} photographs, long edge {options.enlarge or 500}, to {options.resize}/{options.size}\n")
    print("| way | images/s a core | min-max | / exact |\n|---|---|---|---|")
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.0f} | {min(values):.0f}-{max(values):.0f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
