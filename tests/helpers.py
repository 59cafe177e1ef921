"""Small images whose pixels are known: smooth, so that lossy formats stay close, and coloured, so that a swap shows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    """A smooth RGB image: a few waves in each channel, no two seeds, channels or directions alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = []
    for _ in range(3):
        across, down, shift = rng.uniform(0.5, 2.5), rng.uniform(0.5, 2.5), rng.uniform(0, 6)
        channels.append(127 + 110 * np.sin(across * x / width * 3 + down * y / height * 3 + shift))
    return Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8 noise: the hardest case for a resize."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0, width: int = 24, height: int = 20, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, seed).save(path, **options)
    return path


def many_scans(side: int, count: int) -> bytes:
    """A grey progressive JPEG with its last scan written again and again: few bytes, much work."""
    data = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    last = data[starts[-1] : -2]
    return data[:-2] + last * (count - len(starts)) + data[-2:]
