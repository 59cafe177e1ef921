"""Parquet and Arrow files -> the images in one of their columns, with classes, ids and the other columns.

The column of images goes to an unnamed temporary file (in $TMPDIR), from which images are read in any order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from protoprune.images.decode import Status
from protoprune.images.listing import image_suffixes
from protoprune.sources.shard import (
    LABEL_KEYS,
    Found,
    ShardError,
    ShardOptions,
    add_image,
    class_name,
    inside,
    kind_of,
    pread,
    reason_of,
)
from protoprune.text import STREAM, check_stream_end, parse_json
from protoprune.unpacking import Spool

if TYPE_CHECKING:
    import pyarrow as pa

    Batches = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]  # names of columns -> the rows of these

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "bytes", "content", "data")
_CUT = re.compile("cut off|footer|magic bytes|(?i:eof|expected to read)")  # in what is said of a table cut short
_ONLY_A_PATH = "no bytes in its row, only a path: to_parquet of datasets leaves images out, save_to_disk puts them in"
# Rows and about as many bytes of a Parquet file that are in memory at once; without a buffer a whole row group is.
_BATCH, _AT_ONCE, _BUFFER = 64, 64 << 20, 1 << 20
_WIDTH = 6  # digits of a row number in an id, at least


def read_table(path: str, file: IO[bytes], options: ShardOptions, stack: contextlib.ExitStack) -> Found:
    pa = _pyarrow()
    try:
        schema, batches, count = _batches(file)
        image = _image_column(schema, options.image_column)
        label, names = _label_column(schema, options, image)
        _check_column(schema, options.id_column)
        spool = Spool(os.path.getsize(path), stack)
        places: list[tuple[int, int]] = []
        found = Found(
            lambda row: pread(spool.file.fileno(), *places[row]), labels_from=f"column {label}" if label else ""
        )
        top = label if label in schema.names else (label or "").partition(".")[0]
        columns = [*dict.fromkeys(filter(None, (image, top, options.id_column)))]
        for batch in batches(columns):
            _spool(batch, image, label, names, options.id_column, spool, found, places)
        if count is not None and len(found.names) != count:
            raise ShardError(Status.TRUNCATED, f"{len(found.names):,} of {count:,} rows")
        spool.flush()
    except MemoryError:  # pyarrow's too
        raise
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        text = reason_of(error, "the table")
        raise ShardError(Status.TRUNCATED if _CUT.search(text) else Status.CORRUPT, text) from None
    if options.id_column is None:
        found.names = _row_numbers(len(found.names))
    found.beside = _Columns(file, image, found.names, stack).of
    return found


def table_ids(path: str, id_column: str | None = None) -> list[str]:
    """The ids inside a Parquet or Arrow file, in the order of its rows. Raises ShardError."""
    pa = _pyarrow()
    try:
        with open(path, "rb") as file:
            schema, batches, count = _batches(file)
            _check_column(schema, id_column)
            if id_column is None and count is None:
                count = sum(len(batch) for batch in batches(schema.names[:1]))
            if id_column is None:
                return _row_numbers(count or 0)
            values = (one for batch in batches([id_column]) for one in batch.column(id_column).to_pylist())
            return [str(one) if one is None else _id(one) for one in values]
    except (OSError, ValueError, pa.ArrowException) as error:
        status = Status.UNREADABLE if getattr(error, "errno", None) else Status.CORRUPT
        raise ShardError(status, getattr(error, "strerror", None) or reason_of(error, "the table")) from None


def _row_numbers(count: int) -> list[str]:
    """The ids of rows without names: numbers of one width."""
    width = max(_WIDTH, len(str(max(count - 1, 0))))
    return [f"{row:0{width}d}" for row in range(count)]


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ShardError(
            Status.UNSUPPORTED, "Parquet and Arrow need pyarrow: pip install 'protoprune[tables]'"
        ) from None
    return pyarrow


def _batches(file: IO[bytes]) -> tuple[pa.Schema, Batches, int | None]:
    """(schema, columns -> batches, number of rows where the file says it)."""
    import pyarrow.ipc
    import pyarrow.parquet

    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if head.startswith(b"PAR1"):
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
        rows = parquet.metadata.num_rows
        of_row = os.fstat(file.fileno()).st_size // max(1, rows)
        at_once = min(_BATCH, max(1, _AT_ONCE // max(1, of_row)))
        return parquet.schema_arrow, lambda columns: parquet.iter_batches(at_once, columns=columns), rows
    reader = pyarrow.ipc.open_file(file) if head.startswith(b"ARROW1") else pyarrow.ipc.open_stream(file)

    def some(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        every = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if head.startswith(b"ARROW1") else reader
        )
        for batch in every:
            wanted = batch.select(columns)
            wanted.validate(full=True)  # damaged offsets are read as they stand, and end the process
            yield wanted
        if head.startswith(STREAM):
            check_stream_end(file)

    return reader.schema, some, None


def _hugging_face(schema: pa.Schema) -> dict[str, Any]:
    """The `datasets` features that a schema's metadata describes: column -> feature."""
    try:
        return parse_json(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}


def _described(schema: pa.Schema, kind: str) -> list[str]:
    """The columns that the metadata call images, or class labels."""
    features = _hugging_face(schema)
    return [name for name, one in features.items() if isinstance(one, dict) and one.get("_type") == kind]


def _check_column(schema: pa.Schema, name: str | None) -> None:
    """Raise ShardError for a column that is asked for and not there."""
    if name is not None and name not in schema.names:
        raise ShardError(Status.CORRUPT, f"has no column {name}, only {', '.join(schema.names)}")


def _image_column(schema: pa.Schema, asked: str | None) -> str:
    kinds = {name: schema.field(name).type for name in schema.names}
    if asked is not None:
        _check_column(schema, asked)
        _refuse_lists(kinds, [asked])
        if not _holds_bytes(kinds[asked]):
            raise ShardError(Status.CORRUPT, f"its column {asked} holds {kinds[asked]}, no image bytes")
        return asked
    described = [name for name in _described(schema, "Image") if name in kinds]
    candidates = described or [name for name, kind in kinds.items() if _holds_bytes(kind)]
    if not candidates:
        _refuse_lists(kinds, kinds)
    if len(candidates) == 1:
        return candidates[0]
    if named := next((name for name in _IMAGE_COLUMNS if name in candidates), None):
        return named
    which = f"which of {', '.join(candidates)} holds the images" if candidates else "no column of image bytes"
    raise ShardError(Status.CORRUPT, f"{which}; give --image-column (columns: {', '.join(kinds)})")


def _refuse_lists(kinds: Mapping[str, pa.DataType], names: Iterable[str]) -> None:
    """Raise ShardError for the first of these columns that holds several images a row."""
    if (found := next((name for name in names if _holds_lists(kinds[name])), None)) is not None:
        raise ShardError(Status.CORRUPT, f"its column {found} holds lists of images; write one image a row")


def _holds_bytes(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_lists(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind)) and _holds_bytes(kind.value_type)


def _label_column(schema: pa.Schema, options: ShardOptions, image: str) -> tuple[str | None, list[str]]:
    """(column or None, names of its numbers)."""
    import pyarrow

    if not options.labels or options.class_level is not None:
        return None, []
    name = options.label_column
    if name is None:
        classes = _described(schema, "ClassLabel")
        name = next((n for n in (*classes, *LABEL_KEYS) if n in schema.names and n != image), None)
    elif name not in schema.names and name.partition(".")[0] in schema.names:
        return name, list((inside(_hugging_face(schema), name) or {}).get("names", []))
    _check_column(schema, name)
    if name is None or pyarrow.types.is_nested(schema.field(name).type):
        return None, []
    feature = _hugging_face(schema).get(name)
    return name, list(feature.get("names", [])) if isinstance(feature, dict) else []


def _spool(
    batch: pa.RecordBatch,
    image: str,
    label: str | None,
    names: list[str],
    id_column: str | None,
    spool: Spool,
    found: Found,
    places: list[tuple[int, int]],
) -> None:
    """Write the images of a batch to the temporary file, and note the rest of it."""
    labels = _labels_in(batch, label) if label else [None] * len(batch)
    ids = batch.column(id_column).to_pylist() if id_column else [None] * len(batch)
    for value, one, own in zip(batch.column(image), labels, ids, strict=True):
        row, plain = len(found.names), value.as_py()
        cell = plain if isinstance(plain, dict) else {"bytes": plain}
        data = cell.get("bytes") or b""
        if cell.get("bytes") is None:
            found.failed[row] = Status.MISSING, _ONLY_A_PATH if cell.get("path") else "no bytes in its row"
        elif not data:
            found.failed[row] = Status.EMPTY, "no bytes in its row"
        if own is None and id_column:
            raise ShardError(Status.CORRUPT, f"row {row} has no {id_column}; choose another --id-column, or none")
        places.append(spool.add(data))
        add_image(found, _id(own), len(data), class_name(one, names))


def _labels_in(batch: pa.RecordBatch, label: str) -> list[Any]:
    """The cells of a column, or of one inside structs ('meta.label')."""
    if label in batch.schema.names:
        return batch.column(label).to_pylist()
    first, _, rest = label.partition(".")
    found = (inside(one, rest) for one in batch.column(first).to_pylist())
    return [None if isinstance(one, (list, dict)) else one for one in found]


def _id(value: object) -> str:
    """A cell of a column of ids as text; '' where there is no such column."""
    return "" if value is None else os.fsdecode(value) if isinstance(value, bytes) else str(value)


class _Columns:
    """The other columns of a table, by row: those of bytes as files, all else as JSON; read when first asked for.

    Bytes go to an unnamed temporary file, as those of the images do.
    """

    def __init__(self, file: IO[bytes], image: str, names: list[str], stack: contextlib.ExitStack) -> None:
        self.file, self.image, self.names, self.stack = file, image, names, stack
        self.rows: dict[str, dict[str, Any]] | None = None
        self.places: dict[str, dict[str, tuple[int, int]]] = {}  # name -> column -> (offset, bytes)
        self.spool: Spool | None = None

    def of(self, name: str) -> list[tuple[str, bytes]]:
        if self.rows is None:
            self.rows = self._read()
        suffix = posixpath.splitext(name)[1]
        stem = name.removesuffix(suffix) if suffix.lower() in image_suffixes() else name
        files = []
        if row := self.rows.get(name):
            files.append((f"{stem}.json", json.dumps(_without_nan(row), default=str).encode()))
        for column, (offset, size) in self.places.get(name, {}).items():
            data = pread(self.spool.file.fileno(), offset, size) if self.spool else b""
            files.append((f"{stem}.{re.sub('[./]', '_', column)}.{kind_of(data)}", data))
        return files

    def _read(self) -> dict[str, dict[str, Any]]:
        schema, batches, _ = _batches(self.file)
        others = [one for one in schema.names if one != self.image]
        of_bytes = [one for one in others if _holds_bytes(schema.field(one).type)]
        wanted = [one for one in others if one in of_bytes or _is_plain(schema.field(one).type)]
        if not wanted:
            return {}
        rows: dict[str, dict[str, Any]] = {}
        names = iter(self.names)
        spool = self.spool = Spool(os.fstat(self.file.fileno()).st_size, self.stack)
        for batch in batches(wanted):
            for row in batch.to_pylist():
                rows[name := next(names)] = row
                for column in of_bytes:
                    cell = row.pop(column)
                    if data := cell.get("bytes") if isinstance(cell, dict) else cell:
                        self.places.setdefault(name, {})[column] = spool.add(data)
        spool.flush()
        return rows


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a column can be written as JSON."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(one.type) for one in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return not (_holds_bytes(kind) or types.is_fixed_size_binary(kind))
