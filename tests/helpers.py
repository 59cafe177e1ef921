"""Small images whose pixels are known: smooth, so that lossy formats stay close, and coloured, so that a swap shows."""

from __future__ import annotations

import io
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from protoprune.errors import ProtopruneError
from protoprune.lists import check_list, list_chunks


def on_a_full_disk(limit: int, function: Callable[[], object]) -> str:
    """What `function` ends in of ours, '' for nothing else, where files may have no more than `limit` bytes.

    In a forked process: a limit of the size of files, which stands in for a full disk, cannot be lifted again.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                function()
            except ProtopruneError as error:
                os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


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


def format_list(paths, rows, scores, format="txt", *, null=False, weights=None) -> bytes:
    """A list of these paths, which have these ascending row indices, scores and perhaps weights, as one piece."""
    rows = np.asarray(rows, int)
    n = int(rows.max(initial=-1)) + 1
    ids, every, own = [""] * n, np.zeros(n, np.asarray(scores).dtype), None if weights is None else np.zeros(n)
    for path, row in zip(paths, rows.tolist(), strict=True):
        ids[row] = path
    every[rows] = scores
    if own is not None:
        own[rows] = weights
    check_list(ids, rows, format, null=null)
    return b"".join(list_chunks(ids, rows, every, format, null=null, weights=own))
