"""Kept lists, as files that other programs read.

txt holds one path a line (NUL-terminated with `null=True`), csv and jsonl add row index and score, and each image's
weight where the list is calibrated; npy holds row indices. Names are written as the bytes that the file system has;
jsonl escapes what is not UTF-8. Knows nothing of features or scores' meaning, of how a file is written (`files`), or of
what is made of a list (`loaders`).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from protoprune.arguments import checked, one_column
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.files import csv_bytes, plain_cell, plain_number
from protoprune.formats import archive_kind, refuse_archive
from protoprune.npy import load_npy
from protoprune.paths import BATCH, encoded
from protoprune.text import (
    CLASS_NAMES,
    PATH_NAMES,
    arrow_table,
    check_file,
    contents,
    json_lines,
    parse_json,
    plain_bytes,
    plain_name,
    shortened,
    unpacked,
)
from protoprune.units import many

T = TypeVar("T")

FORMATS = ("txt", "csv", "jsonl", "npy", "datacomp")
_UID = re.compile(rb"[0-9a-fA-F]{32}")
_TABLES = (".csv", ".tsv")
_OTHERWISE = "name the file .jsonl, or use -0 or --format jsonl"
_SAMPLE = 50  # rows whose numbers are looked at
_OURS = ("index", "score", "keep", "weight")  # columns of our lists and manifests
_TRUTH = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}


def list_chunks(
    ids: Sequence[str],
    rows: np.ndarray,
    scores: np.ndarray,
    format: str,
    *,
    null: bool = False,
    weights: np.ndarray | None = None,
    folder: str | None = None,
) -> Iterator[bytes]:
    """A list of the images `rows` (ascending), of whose n ids, scores and perhaps weights it is given all, in pieces:
    one of any length needs little memory.

    csv and jsonl get a weight column where weights are given; txt and npy cannot hold it. `folder` makes the paths
    absolute. Call `check_list` first: what it refuses must be known before anything is written.
    """
    names, scores = encoded(ids, rows), scores[rows]
    weights = None if weights is None else weights[rows]
    if folder is not None:
        base = os.fsencode(folder)
        names = ([os.path.join(base, name) for name in part] for part in names)
    if np.isinf(scores).any():
        raise UsageError(
            f"{many(int(np.isinf(scores).sum()), 'score is', 'scores are')} infinite; give numbers, or NaN for none"
        )
    if format in ("npy", "datacomp"):
        yield from _npy_chunks(rows.astype("<i8", copy=False) if format == "npy" else _datacomp(names))
        return
    if format == "txt":
        end = b"\0" if null else b"\n"
        yield from (end.join([*part, b""]) for part in names)
        return
    header = ["path", "index", "score"] + (["weight"] if weights is not None else [])
    if format == "csv":
        yield csv_bytes(header)
    done = 0
    for part in names:
        here = slice(done, done + len(part))
        done += len(part)
        columns = [map(os.fsdecode, part), rows[here].tolist(), map(plain_number, scores[here])]
        if weights is not None:
            columns.append(map(plain_number, weights[here]))
        yield _records(header, zip(*columns, strict=True), format)


def check_list(ids: Sequence[str], rows: np.ndarray, format: str, *, null: bool = False) -> None:
    """Raise UsageError for a format unknown, or one that cannot hold the names of these rows."""
    if format not in FORMATS:
        raise UsageError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if null and format != "txt":
        raise UsageError(f"-0 goes with --format txt, not {format}")
    if format == "datacomp":
        for names in encoded(ids, rows):
            _uids(names)
    if null or format != "txt":
        return
    broken = [name for names in encoded(ids, rows) for name in _broken(names)]
    if broken:
        first = os.fsdecode(broken[0])
        some = many(len(broken), "file name holds", "file names hold")
        raise UsageError(f"{some} a line break (first: {first!r}); {_OTHERWISE}")
    if len(rows) and (first := ids[rows[0]]).startswith("\ufeff"):
        raise UsageError(f"the first file name begins with a byte order mark ({first!r}); {_OTHERWISE}")


def _broken(names: list[bytes]) -> list[bytes]:
    """Those that a list with a name a line would not hold."""
    text = b"\n".join([*names, b""])
    if text.count(b"\n") == len(names) and b"\r\n" not in text:
        return []
    return [name for name in names if b"\n" in name or name.endswith(b"\r")]


def _cells(column: Sequence[object] | np.ndarray) -> Sequence[object]:
    """The values of a column as csv and json write them."""
    if isinstance(column, np.ndarray):
        return [plain_number(value) for value in column] if column.dtype.kind == "f" else column.tolist()
    return [plain_cell(value) for value in column]


def _npy_chunks(values: np.ndarray) -> Iterator[bytes]:
    """What np.save makes of (m,) values."""
    head, descr = io.BytesIO(), np.lib.format.dtype_to_descr(values.dtype)
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": values.shape})
    yield head.getvalue()
    for first in range(0, len(values), BATCH):
        yield values[first : first + BATCH].tobytes()


def _datacomp(names: Iterable[list[bytes]]) -> np.ndarray:
    """(m,) "u8,u8", sorted: the uids of these images, as DataComp's resharder takes them."""
    uids = np.concatenate([np.empty((0, 2), "<u8"), *map(_uids, names)])
    found = np.sort(np.ascontiguousarray(uids).view("<u8,<u8").reshape(-1))
    if len(twice := np.flatnonzero(found[1:] == found[:-1])):
        first, last = found[twice[0]].tolist()
        raise UsageError(f"--format datacomp: two images have the uid {first:016x}{last:016x}; use another format")
    return found


def _uids(names: list[bytes]) -> np.ndarray:
    """(b, 2) uint64: the two halves of the uid that each file is called by."""
    stems = [name.rpartition(b"/")[2].partition(b".")[0] for name in names]
    odd = next((name for name, stem in zip(names, stems, strict=True) if not _UID.fullmatch(stem)), None)
    if odd is not None:
        raise UsageError(
            f"--format datacomp: {os.fsdecode(odd)!r} is not called by a uid of 32 hexadecimal digits; embed with "
            "--id-column uid, import with --path-column uid, or let `protoprune reshard` write what is kept"
        )
    return np.frombuffer(bytes.fromhex(b"".join(stems).decode()), ">u8").reshape(-1, 2).astype("<u8")


def _records(header: list[str], records: Iterable[Iterable[object]], format: str) -> bytes:
    """Rows of csv or jsonl, where what is empty is null."""
    if format == "csv":
        return csv_bytes(None, records)
    lines = (dict(zip(header, (None if cell == "" else cell for cell in one), strict=True)) for one in records)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def list_format(path: str | os.PathLike[str]) -> str | None:
    """The format that a file's name asks for; None when it says nothing."""
    suffix = os.path.splitext(os.fspath(path).lower().removesuffix(".gz"))[1][1:]
    return suffix if suffix in FORMATS else None


def packed(path: str | os.PathLike[str], chunks: Iterable[bytes]) -> Iterable[bytes]:
    """The pieces of a file of this name: through gzip when it ends in .gz."""
    return _gzipped(chunks) if os.fspath(path).lower().endswith(".gz") else chunks


def _gzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # a gzip file without name and time: the same bytes every time
    yield from filter(None, map(packer.compress, chunks))
    yield packer.flush()


@checked
def read_list(source: str | os.PathLike[str], *, every: bool = False) -> list[str] | np.ndarray:
    """The paths of a kept list, in its order; a .npy list gives the row indices, (n,) int64.

    Read are csv, jsonl and npy by suffix or by content, Parquet and Arrow (Feather) by content, anything else is txt,
    separated by NUL or line breaks; all through gzip or not, and as Windows writes them (UTF-16, a mark at the start,
    CRLF). A table names its column path, file or the like. Of a manifest, which has a keep column, the images that it
    keeps; with `every` all of them. `-` is standard input; a pipe is read to its end.

    Raises UsageError for a file that is not there or no list, ProtopruneError for one that cannot be read.
    """
    found = _read(os.fspath(source), once=True)
    if not isinstance(found, _Rows):
        return found
    if found.scored and not every:
        warn(
            f"{os.fspath(source)}: has a column {found.scored} and none of a list (keep, index, weight), so "
            f"that all its {len(found.paths):,} rows are taken; a score table goes to `protoprune select --scores`"
        )
    return found.paths if every else found.kept(found.paths)


def read_paths(source: str | os.PathLike[str], *, every: bool = False) -> list[str]:
    """`read_list` where rows would say nothing: UsageError for a list of them."""
    found = read_list(source, every=every)
    if isinstance(found, np.ndarray):
        raise UsageError(f"{os.fspath(source)}: row indices do not name images; give a list of paths")
    return found


@checked
def read_weights(source: str | os.PathLike[str]) -> dict[str, float]:
    """path -> weight of a calibrated list (`protoprune select --calibrate A -o kept.csv`), csv, jsonl or a manifest.

    The weights add up to the number of images that the list was chosen from. Rows without a weight and the images that
    a manifest does not keep are left out. Raises UsageError for a list that holds none, ProtopruneError for a weight
    that is no positive number, and for an image that has two.
    """
    source = os.fspath(source)
    found = _read(source)
    if not isinstance(found, _Rows) or not found.table:
        raise UsageError(f"{source}: only csv and jsonl lists hold weights; select with --format csv")
    if found.weights is None or all(value is None for value in found.weights):
        raise UsageError(f"{source}: has no weights; make it with `protoprune select --calibrate 0.5 -o {source}`")
    weights: dict[str, float] = {}
    for path, value in zip(found.kept(found.paths), found.kept(found.weights), strict=True):
        if value in ("", None):
            continue
        try:
            weight = float(value)
        except (TypeError, ValueError):
            raise ProtopruneError(
                f"{source}: the weight of {path} is {value!r}, which is not a number (a decimal point, no comma)"
            ) from None
        if path in weights and weights[path] != weight:
            both = f"{weights[path]:g} and {weight:g}"
            raise ProtopruneError(f"{source}: {path} has two weights, {both}; give each image one")
        weights[path] = weight
    bad = [path for path, weight in weights.items() if not 0 < weight < math.inf]
    if bad:
        raise ProtopruneError(f"{source}: the weight of {bad[0]} is {weights[bad[0]]:g}, expected a positive number")
    return weights


@dataclass
class _Rows:
    """What a list holds, a row an image."""

    paths: list[str]
    weights: list[Any] | None = None  # as they stand; None without such a column
    keep: list[bool] | None = None  # of a manifest
    table: bool = True  # csv or jsonl
    scored: str = ""  # a column of numbers, in a table without any of those that lists have

    def kept(self, values: list[T]) -> list[T]:
        return values if self.keep is None else list(itertools.compress(values, self.keep))


def check_again(source: str) -> None:
    """UsageError unless a list is a file, which can be read again."""
    missing = f"no such list; make one with `protoprune select --keep 0.7 > {source}`"
    check_file(source, missing, "that lists the images")


def _read(source: str, once: bool = False) -> _Rows | np.ndarray:
    """`once`: nothing reads it again, so that it may be a pipe, or `-`, standard input."""
    if once and source == "-":
        source, data = "the list on stdin", _stdin()
    else:
        if not once or not os.path.exists(source) or os.path.isdir(source):
            check_again(source)
        data = contents(source)
    data = unpacked(data, source)
    try:
        return _parsed(data, source, os.path.splitext(source.lower().removesuffix(".gz"))[1])
    except _NoList as error:
        raise ProtopruneError(f"{source}: {error}") from None
    except (ValueError, TypeError, AttributeError, EOFError, csv.Error) as error:
        raise ProtopruneError(f"{source}: not a list that protoprune wrote ({error})") from None


def _stdin() -> bytes:
    if sys.stdin is None:  # `<&-`
        raise UsageError("-: standard input is closed; pipe a list into it, or give a file")
    return sys.stdin.buffer.read()


def _parsed(data: bytes, source: str, suffix: str) -> _Rows | np.ndarray:
    """By suffix, or by content where that says nothing."""
    if suffix == ".npy" or data.startswith(b"\x93NUMPY"):
        return one_column(load_npy(data))
    if archive_kind(data[:512]) in ("a Parquet file", "an Arrow file"):
        return _from_arrow(data, source)
    refuse_archive(data, source)
    plain = plain_bytes(data)
    if suffix == ".json" or plain.lstrip()[:1] == b"[":
        whole = _whole_json(plain, suffix == ".json")
        if whole is not None:
            return _from_records(whole)
    if suffix in (".jsonl", ".ndjson") or (suffix not in _TABLES and _begins_with_record(plain)):
        return _from_records(json_lines(os.fsdecode(plain)))
    if suffix in _TABLES or _begins_with_header(plain):
        return _from_table(plain)
    return _Rows(split_list(plain, source), table=False)


def _from_arrow(data: bytes, source: str) -> _Rows:
    """What a data frame was written to; a name that is not UTF-8 may be bytes."""
    records = arrow_table(data, source).to_pylist()
    return _from_records(
        [
            {name: os.fsdecode(value) if isinstance(value, bytes) else value for name, value in one.items()}
            for one in records
        ]
    )


class _NoList(Exception):
    """What is wrong with a list, without its name."""


def _whole_json(data: bytes, sure: bool) -> list[Any] | None:
    """The entries of a list that is one piece of JSON; None for JSON Lines, and for text where it is not `sure`."""
    text = os.fsdecode(data)
    try:
        whole = parse_json(text)
    except ValueError:
        if sure and not text.lstrip().startswith("{"):
            raise
        return None
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict) and any(plain_name(name) in PATH_NAMES for name in whole):
        return None  # one line of JSON Lines
    raise _NoList("not a list: its JSON is no array of paths, or of objects with a path")


def _from_records(records: list[Any]) -> _Rows:
    """Objects with a path (and more), or paths alone."""
    if not records:
        return _Rows([])
    if all(isinstance(record, str) for record in records):
        return _Rows(records, table=False)
    number, odd = next(((n, one) for n, one in enumerate(records, 1) if not isinstance(one, dict)), (0, None))
    if number:
        raise _NoList(
            f"not a list that protoprune wrote (entry {number}, {json.dumps(odd)[:40]}, is no object with a path)"
        )
    names = _columns(list(records[0]))
    columns = {what: [record.get(name) for record in records] for what, name in names.items()}
    others = {name: [record.get(name) for record in records[:_SAMPLE]] for name in _foreign(list(records[0]))}
    return _from_columns(columns, others)


def _from_table(data: bytes) -> _Rows:
    text = os.fsdecode(data)
    if text.startswith("#TYPE "):  # PowerShell's Export-Csv
        text = text.partition("\n")[2]
    if text.startswith("# protoprune-scores:"):
        raise _NoList("a score table, which says nothing of what to keep; give it to `protoprune select --scores`")
    if not text.strip():
        return _Rows([])
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    header = next(rows)
    names = _columns(header)
    places = {what: header.index(name) for what, name in names.items()}
    columns: dict[str, list[str | None]] = {what: [] for what in places}
    others: dict[str, list[str | None]] = {name: [] for name in _foreign(header)}
    for number, row in enumerate(rows):
        for what, place in places.items():
            columns[what].append(row[place] if len(row) > place else None)
        if number < _SAMPLE:
            for name, values in others.items():
                values.append(row[header.index(name)] if len(row) > header.index(name) else None)
    return _from_columns(columns, others)


def _columns(header: list[str]) -> dict[str, str]:
    """path, weight and keep -> the name of that column, where there is one."""
    plain = {name: plain_name(name) for name in header}
    path = next((name for one in PATH_NAMES for name in header if plain[name] == one), None)
    if path is None:
        only = shortened(" ".join(", ".join(header).split()))
        raise _NoList(f"not a list that protoprune wrote (no 'path' column, only {only})")
    found = {"path": path}
    for name in header:
        if plain[name] in ("weight", "keep"):
            found.setdefault(plain[name], name)
    return found


def _foreign(header: list[str]) -> list[str]:
    """The columns that may be scores, of a table in which no column says that it is a list."""
    plain = {name: plain_name(name) for name in header}
    if any(one in ("index", "keep", "weight") for one in plain.values()):
        return []
    return [name for name, one in plain.items() if one not in (*PATH_NAMES, *CLASS_NAMES)]


def _are_numbers(values: list[Any]) -> bool:
    given = [value for value in values if value not in ("", None)]
    try:
        return bool([float(str(value)) for value in given])
    except ValueError:
        return False


def _from_columns(columns: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> _Rows:
    paths = columns["path"]
    scored = next((name for name, values in others.items() if _are_numbers(values)), "")
    for number, path in enumerate(paths, 1):
        if not isinstance(path, str):
            raise _NoList(f"not a list that protoprune wrote (row {number} has no 'path')")
    keep = columns.get("keep")
    kept = None if keep is None else [_truth(*one) for one in enumerate(keep, 1)]
    return _Rows(paths, columns.get("weight"), kept, scored=scored)


def _truth(number: int, value: object) -> bool:
    known = _TRUTH.get(str(value).strip().casefold())
    if known is None:
        raise _NoList(f"its keep column has {value!r} in row {number}, expected 1 or 0")
    return known


def _begins_with_record(data: bytes) -> bool:
    """Whether a file without a telling suffix is jsonl."""
    if not data.startswith(b"{"):
        return False
    try:
        record = parse_json(os.fsdecode(data.partition(b"\n")[0]))
    except ValueError:
        return False
    return isinstance(record, dict) and any(plain_name(name) in PATH_NAMES for name in record)


def _begins_with_header(data: bytes) -> bool:
    """Whether a file without a telling suffix is one of our tables: `--manifest all.txt`, `--format csv -o kept`."""
    if b"\0" in data:
        return False
    head = os.fsdecode(data.partition(b"\n")[0]).rstrip("\r")
    if head.startswith("# protoprune-scores:"):
        return True
    names = [plain_name(name) for name in head.split(max(",;\t", key=head.count))]
    return any(name in PATH_NAMES for name in names) and any(name in _OURS for name in names)


def manifest_chunks(
    columns: Callable[[slice], Mapping[str, Sequence[object] | np.ndarray]], n: int, format: str
) -> Iterator[bytes]:
    """One record an image, csv or jsonl, in pieces; NaN becomes empty (csv) or null. `columns` gives those of some
    rows, of one length."""
    for first in range(0, max(n, 1), BATCH):
        part = columns(slice(first, first + BATCH))
        header = list(part)
        if not first and format == "csv":
            yield csv_bytes(header)
        values = [_cells(column) for column in part.values()]
        yield _records(header, zip(*values, strict=True), format)


def table_chunks(header: list[str], records: Iterable[Iterable[object]]) -> Iterator[bytes]:
    """The csv of any number of records, in pieces."""
    yield csv_bytes(header)
    records = iter(records)
    while part := list(itertools.islice(records, BATCH)):
        yield csv_bytes(None, part)


def split_list(data: bytes, name: str = "the list") -> list[str]:
    """The entries of a path list: NUL-separated when a NUL occurs, else one a line (LF, CRLF or mixed), empty ones
    dropped.

    UTF-16 and a mark at the start, as Windows writes them, and gzip are understood. Raises UsageError, with the list's
    `name`, for an archive or an image.
    """
    data = unpacked(data, name)
    refuse_archive(data, name)
    data = plain_bytes(data)
    if b"\0" in data:
        parts = data.split(b"\0")
    else:
        lines = data.split(b"\n")  # a name that ends in a carriage return takes a list with NULs
        ended = [line.removesuffix(b"\r") for line in lines[:-1]]
        parts = [*ended, lines[-1].removesuffix(b"\r") if len(lines) > 1 else lines[-1]]
    return [os.fsdecode(part) for part in parts if part]
