"""What other people's text files have in common: encodings, marks, compression, Windows' separators, names of columns.

One reader for lists, score tables and files of labels. Knows nothing of what is in them.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

from protoprune.errors import ProtopruneError, UsageError
from protoprune.units import bytes_text
from protoprune.unpacking import memory_share

# How the column of paths is called, as `plain_name` leaves it.
PATH_NAMES = ("path", "file", "filename", "filepath", "imagepath", "imgpath", "relativepath", "imagename")

# And that of classes, the surest first.
CLASS_NAMES = ("label", "class", "classname", "labelname", "category", "target", "wnid", "synset", "species", "classid",
               "categoryid", "labelid", "labels", "predictionstring", "y")  # fmt: skip

STREAM = b"\xff" * 4  # how a stream of Arrow begins, since 2019
_STREAM_END = STREAM + bytes(4)


def plain_name(name: str) -> str:
    """A column's name without case, blanks and punctuation: 'Image Path', 'image_path' and 'image-path' are one."""
    return "".join(letter for letter in name.casefold() if letter not in " ._-:")


def is_class_number(name: str) -> bool:
    return name.isdecimal() and len(name) < 19  # Python refuses to make numbers of thousands of digits


def sorted_classes(names: set[str]) -> list[str]:
    """By name; by value where all are numbers."""
    return sorted(names, key=(lambda name: (int(name), name)) if all(map(is_class_number, names)) else None)


def shortened(text: str) -> str:
    """The text, or its beginning and end where it is longer than 200 characters: for messages."""
    return text if len(text) <= 200 else f"{text[:150]}…{text[-50:]}"


def native(name: str) -> str:
    """A name that was kept as text, as this process reads it from the file system: under a locale that is not UTF-8 the
    same bytes are other text."""
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a character, as JSON may hold it
        return os.fsdecode(name.encode("utf-8", "surrogatepass"))


def unpacked(data: bytes, source: str) -> bytes:
    """The content of a gzip file, whatever its name; other data as they are. Raises ProtopruneError when it is damaged,
    or too much for this machine's memory: a thousand times its size may come out of a file."""
    if not data.startswith(b"\x1f\x8b\x08") or len(data) < 20:  # that of nothing has 20 bytes
        return data
    most = memory_share(4)  # names take a multiple of their text
    parts, total = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:  # piece by piece: what comes out may have no end
            while piece := file.read(1 << 20):
                parts.append(piece)
                total += len(piece)
                if total > most:
                    raise ProtopruneError(
                        f"{source}: unpacks to more than {bytes_text(most)}, a quarter of the free memory; look at it "
                        "with `zcat | head`, and split it if that is what you meant"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise ProtopruneError(f"{source}: a damaged gzip file ({error})") from None
    return b"".join(parts)


def check_file(path: str, missing: str, what: str) -> None:
    """UsageError unless a file is there that can be read again: `missing` is said where nothing is, and `what` it would
    hold otherwise."""
    if not os.path.exists(path):
        raise UsageError(f"{path}: {missing}")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device, which can be read only once"
        raise UsageError(f"{path}: {kind}; give a file {what}")


def contents(source: str) -> bytes:
    """All bytes of a file. Raises ProtopruneError when it cannot be read."""
    try:
        with open(source, "rb") as file:
            return file.read()
    except OSError as error:
        raise ProtopruneError(f"{source}: cannot read ({error.strerror})") from None


def plain_bytes(data: bytes) -> bytes:
    """Lines of text as bytes that `os.fsdecode` takes: UTF-16 with its mark (PowerShell's `>`) becomes UTF-8, and the
    mark that Windows puts before UTF-8 is left out. Names separated by NUL stay as they are, whatever they begin with.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError:
            return data
        return text.encode() if "\n" in text else data  # else it may be a name that is not UTF-8
    return data if b"\0" in data else data.removeprefix(codecs.BOM_UTF8)


def parse_json(text: str | bytes) -> Any:
    """`json.loads` of text that may come from anywhere: whatever is wrong is a ValueError, too deep a nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_lines(text: str) -> list[Any]:
    """What is on each line that is not empty. Raises ValueError."""
    return [parse_json(line) for line in text.split("\n") if line.strip()]


def parquet(path: str = "") -> ModuleType:
    """pyarrow, with its Parquet, to read or write this file. Raises ProtopruneError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ProtopruneError(
            f"{path and f'{path}: '}Parquet needs pyarrow, which is not installed; pip install 'protoprune[tables]'"
        ) from None
    return pyarrow


def check_stream_end(file: Any) -> None:
    """Raise OSError where a stream of Arrow that was read has no end of its own: its writer was killed between two
    batches, and pyarrow takes the end of the file for that of the stream."""
    file.seek(-len(_STREAM_END), os.SEEK_CUR)
    if file.read(len(_STREAM_END)) != _STREAM_END:
        raise OSError("cut off: it has no end marker")


def is_arrow(data: bytes) -> bool:
    """Whether these are the bytes of a Parquet file, or of an Arrow one (Feather, a stream)."""
    return data.startswith((b"PAR1", b"ARROW1\0", STREAM))


def arrow_table(data: bytes, source: str = "") -> Any:
    """pyarrow's table of such a file, without what is nested (images among them). Raises ValueError for a damaged one,
    ProtopruneError where pyarrow is not installed."""
    pyarrow = parquet(source)
    file = pyarrow.BufferReader(data)
    try:
        if data.startswith(b"PAR1"):
            flat = _flat(pyarrow, pyarrow.parquet.read_schema(file))
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=flat)
        else:
            reader = pyarrow.ipc.open_file(file) if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream(file)
            table = reader.read_all().select(_flat(pyarrow, reader.schema))
            if data.startswith(STREAM):
                check_stream_end(file)
        table.validate(full=True)  # damaged offsets are read as they stand, and end the process
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else "damaged") from None
    return table


def _flat(pyarrow: ModuleType, schema: Any) -> list[str]:
    """The columns that hold a plain value a row."""
    return [name for name, kind in zip(schema.names, schema.types, strict=True) if not pyarrow.types.is_nested(kind)]


def as_known(entries: Sequence[str], base: str, known: Collection[str]) -> list[str]:
    """Entries of a list as the `known` paths below `base/` have them: they may be absolute, begin with ./, have
    backslashes, or be in double quotes all of them."""
    entries = with_slashes(_without_quotes(entries, known), known.__contains__)
    return [one if one in known else os.path.normpath(os.path.join(base, one)).removeprefix(base) for one in entries]


def with_slashes(entries: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """Paths that were written on Windows with slashes: when there are backslashes only, and not one is `known` as it is
    (elsewhere a file's name may hold a backslash)."""
    odd = [entry for entry in entries if "\\" in entry]
    if not odd or any("/" in entry for entry in entries) or any(known(entry) for entry in odd):
        return list(entries)
    return [entry.replace("\\", "/") for entry in entries]


def _without_quotes(entries: Sequence[str], known: Collection[str]) -> Sequence[str]:
    """Lines that a table's writer or `ls -Q` put into quotes: when all are, and not one is `known` as it is."""
    if not all(len(one) > 1 and one[0] == one[-1] == '"' for one in entries) or any(one in known for one in entries):
        return entries
    return [one[1:-1].replace('""', '"') for one in entries]
