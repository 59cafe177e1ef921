"""A score table in a file: writing it, and reading other people's.

What is written is CSV (path, score), or Parquet when the name ends in .parquet, through gzip when it ends in .gz; the
bytes depend on nothing but the arguments. The first line (in Parquet the schema's metadata) says what it is:

    # protoprune-scores: {"metric": "el2n", "higher": "harder", "type": "float32", "protoprune": …, "provenance": …,
    "digest": …}

The digest is that of the line's other entries, the paths and the numbers, so that damage never becomes a ranking. What
is read is turned round so that a larger score means harder. This module does not know the images: `matching` does.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from xxhash import xxh3_64

from protoprune import __version__
from protoprune.arguments import as_numbers, checked, one_column, texts
from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import write_file
from protoprune.lists import packed, read_paths
from protoprune.npy import load_npy, load_npz, reason
from protoprune.paths import Paths, all_encoded, distinct
from protoprune.scores.columns import could_be_scores, find_columns, number, parse_text
from protoprune.text import (
    arrow_table,
    check_file,
    contents,
    is_arrow,
    parquet,
    parse_json,
    plain_bytes,
    plain_name,
    unpacked,
)
from protoprune.units import many

_MARK = "# protoprune-scores: "
_META = b"protoprune-scores"
# What a higher score means, in the words that people use: `keep` is what hard-first keeps.
_HIGHER = {"harder": "harder", "keep": "harder", "easier": "easier", "prune": "easier"}

# github.com/rgeirhos/dataset-pruning-metrics, the scores of Sorscher et al. 2022. Its README (commit 129bcd7): "high
# scores indicate keeping an example is beneficial", for all of them; active-learning is 0 or 1.
RELEASED = (
    "DDD", "EL2N-1-model", "EL2N-20-models", "active-learning", "forgetting", "influence-max", "influence-sum-abs",
    "memorization", "random-100", "random-101", "random-102", "random-103", "random-104",
    "self-supervised-prototypes", "supervised-prototypes",
)  # fmt: skip
_RELEASED_FILE = re.compile(rf"ImageNet-1K_({'|'.join(RELEASED)})(\.[a-z]+)*")


# (keys or None, scores as they stand, kind of the keys, header)
_Column = Sequence[object] | np.ndarray
_Read = tuple[Sequence[str] | None, np.ndarray, str, str, dict[str, Any]]


@dataclass
class Table:
    """A score table as its file has it, but for the direction: a larger score is harder."""

    source: str
    keys: Sequence[str] | None  # r paths or row numbers; None: one score a row of the images
    kind: str  # of the keys: name, index (row numbers) or unsure (either)
    scores: np.ndarray  # (r,) float64, NaN where a row has none
    metric: str = ""  # empty when the file does not say
    direction: str = "assumed"  # who says what a higher score means: header, released, given or assumed
    provenance: dict[str, Any] = field(default_factory=dict)
    ranks: bool = False  # whether the scores' column is called rank: such numbers count from either end


# --- writing ---------------------------------------------------------------------------------------------------------


@checked
def write_scores(
    path: str | os.PathLike[str],
    paths: Sequence[str],
    scores: np.ndarray,
    *,
    metric: str,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write n scores (larger = harder) of n relative paths; the file appears whole or not at all.

    float32 and float64 scores come back from `read_scores` bit for bit, NaN as no score. Paths may hold anything that a
    file name can; in Parquet the column is binary when one of them is not UTF-8. Raises UsageError for an array of
    another shape or type and for a name of another format, ProtopruneError when the file cannot be written.
    """
    write_file(path, table_chunks(path, paths, scores, metric=metric, provenance=provenance))


def table_chunks(
    path: str | os.PathLike[str],
    paths: Sequence[str],
    scores: np.ndarray,
    *,
    metric: str,
    provenance: dict[str, Any] | None = None,
) -> Iterable[bytes]:
    """What `write_scores` writes to a file of that name, in pieces; what it refuses is refused now."""
    path = os.fspath(path)
    paths, scores = paths if isinstance(paths, Paths) else texts("paths", paths), as_numbers("scores", scores)
    if scores.shape != (len(paths),):
        raise UsageError(f"{path}: scores of shape {scores.shape}, expected {len(paths):,} numbers, one a path")
    if not isinstance(paths, Paths) and len(set(paths)) < len(paths):
        twice = next(one for one, count in Counter(paths).items() if count > 1)
        raise UsageError(f"{path}: {twice!r} occurs twice; give one score an image")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64 if scores.itemsize > 2 else np.float32)
    _refuse_infinite(path, paths, scores)
    facts = {
        "metric": metric,
        "higher": "harder",
        "type": str(scores.dtype),
        "protoprune": __version__,
        "provenance": provenance or {},
    }
    try:
        facts = json.loads(json.dumps(facts, default=_plain_value))
    except (TypeError, ValueError) as error:
        raise UsageError(f"provenance: {error}; expected names and plain values") from None
    header = json.dumps({**facts, "digest": _digest(facts, paths, scores)})
    if (suffix := check_name(path)) == ".parquet":
        return packed(path, [_parquet(path, paths, scores, header)])
    return packed(path, _csv(paths, scores, header, "\t" if suffix == ".tsv" else ","))


def check_name(path: str | os.PathLike[str]) -> str:
    """The suffix that decides the format, without .gz; UsageError for one of another format."""
    suffix = _suffix(os.fspath(path))
    if suffix in (".npy", ".npz", ".jsonl", ".h5", ".json"):
        raise UsageError(f"{path}: score tables are written as .csv, .tsv or .parquet, each with .gz or without")
    return ".parquet" if suffix == ".pq" else suffix


def _suffix(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _digest(header: dict[str, Any], paths: Sequence[str], scores: np.ndarray) -> str:
    """xxh3-64 of a header without its digest, the paths and the scores in their own type."""
    digest = xxh3_64(json.dumps({key: header[key] for key in sorted(header) if key != "digest"}).encode())
    for place, part in enumerate(all_encoded(paths)):
        digest.update((b"\0" if place else b"") + b"\0".join(part))
    digest.update(np.where(np.isnan(scores), scores.dtype.type(np.nan), scores).data)  # a NaN comes back as another one
    return digest.hexdigest()


def _plain_value(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else str(value)


def _csv(paths: Sequence[str], scores: np.ndarray, header: str, delimiter: str) -> Iterator[bytes]:
    yield os.fsencode(f"{_MARK}{header}\npath{delimiter}score\n")
    plain = all(_is_plain(part, delimiter.encode()) for part in all_encoded(paths))
    done = 0
    for part in all_encoded(paths):
        some = scores[done : done + len(part)]
        done += len(part)
        cells = some.astype("S32").tolist()  # the shortest digits that give this number in its own type
        for row in np.flatnonzero(np.isnan(some)).tolist():
            cells[row] = b""
        names = part if plain else [b'"%b"' % name.replace(b'"', b'""') for name in part]
        pairs = zip(names, cells, strict=True)
        yield b"".join([b"%b%b%b\n" % (name, delimiter.encode(), cell) for name, cell in pairs])


def _is_plain(names: list[bytes], delimiter: bytes) -> bool:
    """Whether a table holds these names without quotation marks."""
    text = b"\n".join(names)
    return text.count(b"\n") == len(names) - 1 and not any(mark in text for mark in (b'"', b"\r", delimiter))


def _parquet(path: str, paths: Sequence[str], scores: np.ndarray, header: str) -> bytes:
    pyarrow = parquet(path)
    raw = [os.fsencode(one) for one in paths]
    try:
        names = pyarrow.array(raw, pyarrow.binary()).cast(pyarrow.string())
    except pyarrow.ArrowInvalid:
        names = pyarrow.array(raw, pyarrow.binary())
    columns = {"path": names, "score": pyarrow.array(scores, from_pandas=True)}  # NaN -> null
    table = pyarrow.table(columns).replace_schema_metadata({_META: header.encode()})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


@checked
def read_table(source: str | os.PathLike[str], *, higher_is: str | None = None) -> Table:
    """Read a score table whose images are not known yet: a file, with `:COLUMN` (or the array of an .npz) and with what
    higher means in it (`:easier`) after its name where they are wanted.

    Read are delimited text (comma, tab, semicolon, bar or blanks; with or without a header; comment lines), JSON lines,
    Parquet, .npy and .npz, each through gzip or not. Keys are paths or row numbers; .npy and a text of one column have
    none. `higher_is` (keep, prune, harder or easier) says what a higher score means in a file that does not say it
    itself; without both, harder is assumed. Raises ProtopruneError for what cannot be read or contradicts itself.
    """
    check_higher(higher_is)
    source = os.fspath(source)
    file, column, own = split_source(source)
    if own and higher_is and _HIGHER[own] != _HIGHER[higher_is]:
        raise UsageError(f"{source}: contradicts --higher-is {higher_is}; leave one of them out")
    check_file(file, f"no such score table; `protoprune score METRIC -o {file}` makes one", "that holds the scores")
    keys, scores, kind, name, header = _read(file, column)
    higher, direction = _direction(file, header, own or higher_is)
    scores = _as_written(source, header, keys or [], scores)
    _refuse_infinite(source, keys, scores)
    if ranks := plain_name(name) in ("rank", "ranking"):
        scores = np.where(scores == -1, np.nan, scores)  # a manifest's, of what is in no order: unreadable, a duplicate
    if higher == "easier":
        scores = 0.0 - scores
    if keys is not None:
        keys = keys if header else _without_dots(keys)
        _refuse_duplicates(source, keys)
    metric = str(column or header.get("metric") or _released(file))
    return Table(source, keys, kind, scores, metric, direction, header.get("provenance") or {}, ranks)


def _released(file: str) -> str:
    """The metric of a released file, by the file's name; '' for any other."""
    found = _RELEASED_FILE.fullmatch(os.path.basename(file))
    return found[1] if found else ""


def _without_dots(keys: Sequence[str]) -> Sequence[str]:
    """The keys without `./` before them."""
    return [key.removeprefix("./") for key in keys] if any(key.startswith("./") for key in keys) else keys


def _as_written(source: str, header: dict[str, Any], keys: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """(r,) float64: the scores in the digits of their own type. Raises ProtopruneError where they, or the keys, are not
    what the header's digest says."""
    if header.get("type") == "float32":  # the shortest digits of a float32 are not those of the same float64
        scores = scores.astype(np.float32)
    if "digest" in header and header["digest"] != _digest(header, keys, scores):
        raise ProtopruneError(
            f"{source}: not what was written: damaged, or edited by hand; write it again, or remove its first line "
            "where the edit is meant"
        )
    return scores.astype(np.float64)


def split_source(source: str | os.PathLike[str]) -> tuple[str, str | None, str | None]:
    """(file, column, what higher means) of FILE[:COLUMN][:keep|prune|harder|easier]; a file that has all of it for its
    name is that file."""
    file, column, higher = os.fspath(source), None, None
    head, _, tail = file.rpartition(":")
    if head and tail in _HIGHER and not os.path.exists(file):
        file, higher = head, tail
    head, _, tail = file.rpartition(":")
    if head and tail and not os.path.exists(file) and os.path.exists(head):
        file, column = head, tail
    return file, column, higher


def named(table: Table, rows: str | os.PathLike[str] | Sequence[str]) -> Table:
    """The table with the names of its rows: a file that lists them in the table's order, or the names themselves.

    Raises UsageError for a table that has names of its own, ProtopruneError for another number of names.
    """
    what = os.fspath(rows) if isinstance(rows, str | os.PathLike) else "rows"
    if table.keys is not None and table.kind == "name":
        raise UsageError(f"{table.source}: names its images itself; --rows goes with a table that does not")
    names = read_paths(rows, every=True) if isinstance(rows, str | os.PathLike) else texts("rows", rows, "names")
    if table.keys is None:
        keys = names
        if len(names) != len(table.scores):
            raise ProtopruneError(
                f"--rows {what}: {len(names):,} names for the {len(table.scores):,} scores of {table.source}"
            )
    else:
        keys = _names_of_rows(table, table.keys, names, what)
    _refuse_duplicates(f"--rows {what}", keys)
    return replace(table, keys=_without_dots(keys), kind="name")


def _names_of_rows(table: Table, keys: Sequence[str], names: list[str], what: str) -> list[str]:
    numbers = [int(key) if key.isascii() and key.isdecimal() else -1 for key in keys]
    wrong = next((key for key, row in zip(keys, numbers, strict=True) if not 0 <= row < len(names)), None)
    if wrong is not None:
        raise ProtopruneError(f"{table.source}: {wrong!r} is no row of --rows {what}, which has {len(names):,} names")
    return [names[row] for row in numbers]


def turned(table: Table, higher_is: str | None) -> Table:
    """The table with `higher_is` (as in `read_table`) applied, unless it has a direction of its own.

    Raises UsageError for ranks whose direction nobody gives.
    """
    check_higher(higher_is)
    if table.direction != "assumed":
        return table
    if higher_is is None and table.ranks:
        raise UsageError(
            f"{table.source}: a rank may count from either end; {table.source}:easier is for one whose 0 or 1 is the "
            f"hardest, as in a manifest, and {table.source}:harder for the other"
        )
    if higher_is is None:
        return table
    scores = table.scores if _HIGHER[higher_is] == "harder" else 0.0 - table.scores
    return replace(table, scores=scores, direction="given")


def check_higher(higher_is: str | None) -> None:
    """Raise UsageError for a word that says nothing about direction."""
    if higher_is is not None and higher_is not in _HIGHER:
        raise UsageError(f"--higher-is {higher_is}: expected one of {', '.join(sorted(_HIGHER))}")


def _direction(source: str, header: dict[str, Any], higher_is: str | None) -> tuple[str, str]:
    """(harder or easier, who says so)."""
    given = None if higher_is is None else _HIGHER[higher_is]
    own, who, whose = header.get("higher"), "header", "its own header says"
    if own is None and _released(source):
        own, who, whose = "harder", "released", "it has the name of a released file, in which higher means"
    if own is None:
        return (given, "given") if given else ("harder", "assumed")
    if not isinstance(own, str) or own not in _HIGHER:
        raise ProtopruneError(f"{source}: its header says higher is {own!r}, expected one of {', '.join(_HIGHER)}")
    if given and given != _HIGHER[own]:
        raise UsageError(f"--higher-is {higher_is}: contradicts {source}: {whose} {_HIGHER[own]}; leave the option out")
    return _HIGHER[own], who


def _refuse_infinite(source: str, keys: Sequence[str] | None, scores: np.ndarray) -> None:
    """An infinite score has no place among others: no quantile, no stratum, no bin, no digits in a table."""
    rows = np.flatnonzero(np.isinf(scores))
    if len(rows):
        first = f"row {rows[0] + 1}" if keys is None else keys[rows[0]]
        some = many(len(rows), "score is", "scores are")
        raise ProtopruneError(
            f"{source}: {some} infinite (first: {first}); give numbers in their place, or nothing "
            "where an image has no score"
        )


def _refuse_duplicates(source: str, keys: Sequence[str]) -> None:
    if distinct(keys):
        return
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ProtopruneError(f"{source}: {key!r} occurs twice; give one score an image")
        seen.add(key)


def _read(source: str, column: str | None = None) -> _Read:
    """What is in a file of any format."""
    suffix, data = _suffix(source), unpacked(contents(source), source)
    if data.startswith(b"\x1f\x8b"):
        raise ProtopruneError(f"{source}: a damaged gzip file (cut short)")
    try:
        return _parsed(data, suffix, column)
    except ProtopruneError as error:
        raise ProtopruneError(f"{source}: {error}") from None
    except OSError as error:
        raise ProtopruneError(f"{source}: cannot be read ({reason(error)})") from None
    except csv.Error as error:
        raise ProtopruneError(f"{source}: cannot be read as a table ({error})") from None
    except (ValueError, TypeError, LookupError, EOFError, AttributeError, NotImplementedError, MemoryError) as error:
        what = "a .npy array of numbers" if suffix == ".npy" else f"a table in the form {suffix or 'text'}"
        said = str(error).splitlines()[0] if str(error) else "empty"
        raise ProtopruneError(f"{source}: not {what} ({said})") from None


def _parsed(data: bytes, suffix: str, column: str | None) -> _Read:
    """By content, or by suffix where the content says nothing."""
    if suffix == ".npz" or data.startswith(b"PK\x03\x04"):
        return _read_arrays(data, column)
    if suffix == ".npy" or data.startswith(b"\x93NUMPY"):
        return _read_array(data, column)
    if data.startswith((b"\x89HDF\r\n", b"protoprune-seal")):
        raise ProtopruneError(
            "an HDF5 file, not a score table; `protoprune score METRIC` makes one of a record or a feature file"
        )
    if is_arrow(data):
        return _read_parquet(data, column)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _read_json_lines(data, column)
    return _read_text(data, column)


def _read_text(data: bytes, column: str | None) -> _Read:
    data = plain_bytes(data)
    header: dict[str, Any] = {}
    delimiter, end = None, data.find(b"\n")
    line = os.fsdecode(data[:end] if end >= 0 else data)
    if not line.startswith(_MARK):
        _refuse_damaged_line(line[:2000])
    else:
        header, data = _header(line.removeprefix(_MARK)), data[len(os.fsencode(line)) + 1 :]
        if column is None:
            delimiter = "\t" if data.startswith(b"path\tscore") else "," if data.startswith(b"path,score") else None
    return *parse_text(data, delimiter, column), header


def _refuse_damaged_line(first: str) -> None:
    """Raise ProtopruneError for a first line that was ours once, or is neither text nor a row that ends in a number."""
    parts = sum(one in first for one in ("protoprune", '"metric": ', '"higher": ', '"digest": '))
    garbled = any("\udc80" <= letter <= "\udcff" for letter in first)  # bytes that are not UTF-8
    if parts > 1 or (garbled and number(re.split(r"[,;\t| ]", first)[-1]) is None):
        raise ProtopruneError("its first line is damaged; write it again, or remove that line")


def _header(text: str) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("provenance", {}), dict | None):
        raise ProtopruneError(f"its header {_MARK.strip('# :')} is not valid JSON; remove the line or write it again")
    return header


def _read_array(data: bytes, column: str | None) -> _Read:
    if column is not None:
        raise ProtopruneError(f"has no array {column!r}: a .npy file is one array")
    array = one_column(load_npy(data))
    if array.dtype.kind not in "fiub":
        raise ProtopruneError(f"holds {array.dtype}, expected numbers")
    array = array.astype(np.float64)
    if array.ndim != 1:
        raise ProtopruneError(f"shape {array.shape}, expected (n,): one score an image")
    return None, array, "index", "", {}


def _read_arrays(data: bytes, wanted: str | None) -> _Read:
    """An .npz: arrays are columns, of which those that could be the score are named where there are several."""
    arrays = {name: one_column(array) for name, array in load_npz(data).items()}
    if not arrays:
        raise ProtopruneError(
            "a zip archive without arrays, as Excel and torch.save write them; save a table as CSV, or numbers by "
            "numpy.save"
        )
    scores = could_be_scores([name for name, array in arrays.items() if array.dtype.kind in "fiub"])
    shown = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if wanted is None and len(scores) != 1:
        if not scores:
            raise ProtopruneError(f"holds no array of scores, only {shown}")
        raise ProtopruneError(f"holds the arrays {shown}; which is the score? name it: FILE.npz:{scores[0]}")
    if wanted is not None and wanted not in arrays:
        raise ProtopruneError(f"has no array {wanted!r}; it holds {shown}")
    wanted = wanted or scores[0]
    if arrays[wanted].ndim != 1:
        raise ProtopruneError(f"its array {wanted} has shape {arrays[wanted].shape}, expected (n,): one score an image")
    return _from_columns(arrays, {}, wanted)


def _read_json_lines(data: bytes, column: str | None) -> _Read:
    if data.lstrip().startswith(b"["):  # one piece of JSON
        records = parse_json(data)
    else:
        records = [parse_json(line) for line in data.split(b"\n") if line.strip()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ProtopruneError("expected one object with path and score a line")
    return _from_columns({name: [record.get(name) for record in records] for name in records[0]}, {}, column)


def _read_parquet(data: bytes, wanted: str | None) -> _Read:
    pyarrow, table = parquet(), arrow_table(data)
    header = (table.schema.metadata or {}).get(_META)
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        is_number = pyarrow.types.is_floating(column.type) or pyarrow.types.is_integer(column.type)
        columns[name] = column.to_numpy() if is_number else column.to_pylist()
    return _from_columns(columns, _header(header.decode()) if header else {}, wanted)


def _from_columns(columns: Mapping[str, _Column], header: dict[str, Any], wanted: str | None) -> _Read:
    """A table whose columns have names. Those of another length than the longest (or the wanted one) are no columns."""
    columns = {
        name: column for name, column in columns.items() if isinstance(column, list) or np.ndim(np.asarray(column)) == 1
    }
    length = (
        len(columns[wanted]) if wanted is not None and wanted in columns else max(map(len, columns.values()), default=0)
    )
    if not length:
        raise ProtopruneError("a header and no rows")
    columns = {name: column for name, column in columns.items() if len(column) == length}
    sample = [[_text(column[row]) for column in columns.values()] for row in range(min(length, 50))]
    if len(columns) == 1 and wanted in (None, *columns):
        return None, _numbers(*columns.values()), "index", next(iter(columns)), header
    found = find_columns([list(columns), *sample], wanted)
    values = list(columns.values())
    scores = _numbers(values[found.score])
    keys = None if found.key is None else [_text(value) for value in values[found.key]]
    return keys, scores, found.kind, found.name(list(columns)), header


def _numbers(column: _Column) -> np.ndarray:
    """(n,) float64 of a column, NaN where it has nothing."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "fiub":
        return column.astype(np.float64)
    found = [number("" if value is None else str(value)) for value in column]
    wrong = next((row for row, value in enumerate(found) if value is None), None)
    if wrong is not None:
        raise ProtopruneError(f"row {wrong + 1} has no number as its score: {_text(column[wrong])[:60]}")
    return np.array(found, np.float64)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return "" if value is None else str(value)
