"""Images as a folder, and the same images packed into shards of every kind."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

from helpers import write_image

COUNTS = {"ant": 5, "bee": 4, "cat": 6}


def image_folder(folder: Path, counts: dict[str, int] | None = None, side: int = 40) -> Path:
    for number, (name, count) in enumerate((counts or COUNTS).items()):
        for i in range(count):
            write_image(folder / name / f"{i:03d}.png", seed=100 * number + i, width=side, height=side - 4)
    return folder


def members(folder: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of the images of a folder, in the order of names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted((path.relative_to(folder).as_posix(), path.read_bytes()) for path in files)


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path, files: list[tuple[str, bytes]], count: int, suffix: str = ".tar") -> Path:
    """`count` shards of consecutive images, 0000.tar and so on."""
    for number in range(count):
        part = files[number * len(files) // count : (number + 1) * len(files) // count]
        write_tar(folder / f"{number:04d}{suffix}", part, "w:gz" if suffix == ".tar.gz" else "w")
    return folder


def write_zip(path: Path, files: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return path


def write_parquet(path: Path, files: list[tuple[str, bytes]], layout: str = "hf", rows: int = 4) -> Path:
    """The images with their classes: layout 'hf' is a struct of bytes and path, 'binary' a plain column."""
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": data, "path": os.path.basename(name)} if layout == "hf" else data for name, data in files]
    labels = [name.partition("/")[0] for name, _ in files]
    table = pyarrow.table({"image": images, "label": labels, "name": [name for name, _ in files]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path
