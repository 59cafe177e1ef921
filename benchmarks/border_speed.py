"""How long a device waits between shards: tars of a folder's JPEGs, and an encoder that sleeps as a GPU would compute.

python benchmarks/border_speed.py FOLDER --images 100 --shards 20 --ms 2 --rounds 3
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tarfile
import tempfile
import time
from pathlib import Path

from protoprune.images.decode import Preprocess
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards


class Sleeper:
    """An encoder that takes so many seconds an image and leaves the cores alone meanwhile."""

    name, pool, fp32_only, dim, digest, preprocess = "sleeper", "", False, 384, "0" * 64, Preprocess(64, 64)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spans: list[tuple[float, float]] = []

    def model(self, pixels):
        began = time.monotonic()
        time.sleep(self.seconds * len(pixels))
        self.spans.append((began, time.monotonic()))
        return pixels.mean((2, 3)).repeat(1, 128)


def write_tars(folder: str, paths: list[Path], images: int, shards: int) -> None:
    every = itertools.cycle(paths)
    for number in range(shards):
        with tarfile.open(os.path.join(folder, f"{number:04d}.tar"), "w") as tar:
            for row, path in enumerate(itertools.islice(every, images)):
                info, data = tarfile.TarInfo(f"{row:06d}.jpg"), path.read_bytes()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def busy(spans: list[tuple[float, float]]) -> float:
    """Seconds that are in any of the spans."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, value in (("images", 100), ("shards", 20), ("ms", 2.0), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args()
    paths = [path for path in sorted(given.folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(tars := os.path.join(folder, "tars"))
        write_tars(tars, paths, given.images, given.shards)
        for number in range(given.rounds):
            encoder, began = Sleeper(given.ms / 1000), time.monotonic()
            embed_shards(find_shards(tars), encoder, os.path.join(folder, f"set-{number}"), device="cpu", batch_size=64)
            wall, works = time.monotonic() - began, busy(encoder.spans)
            whole = max(last for _, last in encoder.spans) - min(first for first, _ in encoder.spans)
            gap = 1000 * (whole - works) / max(1, given.shards - 1)
            print(
                f"{wall:.2f} s; the device works {works / whole:.2f} of {whole:.2f} s, {gap:.0f} ms a border",
                flush=True,
            )


if __name__ == "__main__":
    main()
