"""Vectors that exist already -> feature file: .npy, .npz, Parquet, and folders of them.

The most frequent wish of those who have millions of images: they have embedded them before. Read are single arrays with
a list of their names; Parquet with a column of vectors; clip-retrieval's folders (img_emb/*.npy, metadata/*.parquet);
embedding-reader's (npy, parquet, or npy and parquet of the same number); FiftyOne's samples.json. Arrays stay on the
disk: what is copied is copied in blocks. What the vectors are of is not known here: the file says they were imported.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from protoprune import files, stores
from protoprune.arguments import checked, texts
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features.featurefile import IMPORTED, KEY, PartialFile, check_new, create_partial, vanished
from protoprune.files import leads_out
from protoprune.images.decode import Status
from protoprune.images.listing import (
    FOLDERS,
    ImageList,
    check_labels,
    folder_labels,
    image_labels,
    possible_name,
    relative_id,
    stat_files,
)
from protoprune.npy import load_npy, load_npz, map_npy, npz_headers
from protoprune.sources.finding import split_id
from protoprune.text import parquet, parse_json
from protoprune.units import many

if TYPE_CHECKING:
    import pyarrow.parquet

    from protoprune.images.listing import Labels

_VECTORS = ("embedding", "embeddings", "image_embedding", "image_embeddings", "img_emb", "features", "feature",
            "vector", "vectors", "emb", "x", "arr_0")  # fmt: skip
_NAMES = ("path", "paths", "image_path", "image_paths", "filepath", "file_path", "filename", "file_name", "filenames",
          "names", "file", "image", "key", "id", "ids", "uid", "url")  # fmt: skip
_LACKS = {
    "--vector-column": "holds no vectors; expected an array (images, dimensions), or a column with a list of numbers "
    "in each row, not a column for each dimension",
    "--path-column": "holds no names; expected an array or a column of text, or a list by --paths",
}
_ROWS = 16_384  # rows that are copied at once
_LARGEST = 1 << 24  # bytes that one vector of FiftyOne may unpack to
_NOT_FINITE = "the vector holds NaN or infinity"


@dataclass
class ImportReport:
    """What became of the vectors."""

    out: str
    n: int
    dim: int
    store: str
    names: str  # where the names come from, in words
    unusable: int = 0  # vectors with NaN or infinity
    classes: int = 0
    classes_from: str = ""  # where they are from, in words
    files: list[str] = field(default_factory=list)  # that were read


@dataclass
class _Part:
    """The vectors of one file, and their names where it has them."""

    vectors: np.ndarray  # (n, d), perhaps a memory map
    names: list[str] | None = None


@dataclass
class _Columns:
    """The columns or arrays that were asked for, and whether there was anything to choose from."""

    vectors: str | None
    names: str | None
    own_names: bool  # whether names are looked for in the file of the vectors, or beside it
    of_vectors: bool = False  # whether a file was read that has columns or arrays with names
    of_names: bool = False

    def check(self, source: str, paths: str | os.PathLike[str] | Sequence[str] | None) -> None:
        """Raise UsageError for a column that was asked for where none was looked at."""
        if self.vectors is not None and not self.of_vectors:
            raise UsageError(
                f"--vector-column {self.vectors}: {source} has one array without a name, and nothing to choose from"
            )
        tabular = isinstance(paths, (str, os.PathLike)) and _is_table(os.fspath(paths))
        if self.names is not None and not (self.of_names or tabular):
            where = (
                f"{source} has no names in columns" if self.own_names else "--paths gives the names, without columns"
            )
            raise UsageError(f"--path-column {self.names}: {where}; leave it out")


@checked
def import_features(
    vectors: str | os.PathLike[str],
    out: str | os.PathLike[str] = "features.h5",
    *,
    paths: str | os.PathLike[str] | Sequence[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    encoder: str = "",
    vector_column: str | None = None,
    path_column: str | None = None,
    store: str = "auto",
    labels: Labels = True,
    class_level: int | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Make a feature file of vectors from elsewhere, sorted by name.

    paths    list of their names in the order of the vectors (a file that `read_list` reads, Parquet, or names), where
             the vectors' own file has none; without both the names are row numbers
    root     folder that the names are relative to, where they are files: then size and time are noted; or the URL of
             the shards that they name. Absolute names get their deepest common folder
    encoder  what made the vectors, for the provenance
    store    float16, float32, or auto: float16 where the vectors are
    labels, class_level  where classes come from, as in `list_folder`

    Raises UsageError or ProtopruneError for what cannot be read, numbers of names and vectors that differ, names that
    occur twice, and when `out` exists (unless `overwrite`).
    """
    vectors, out = os.fspath(vectors), os.fspath(out)
    if store not in ("auto", "float16", "float32"):
        raise UsageError(f"--store {store}: expected auto, float16 or float32")
    check_new(out, overwrite)
    check_labels(labels, class_level)
    if isinstance(paths, (str, os.PathLike)) and not os.path.exists(paths):
        raise UsageError(f"--paths {os.fspath(paths)}: no such file; give a list of the images' names")
    with contextlib.ExitStack() as stack:
        columns = _Columns(vector_column, path_column, own_names=paths is None)
        read, parts = _read(vectors, columns, stack)
        columns.check(vectors, paths)
        dim, dtype = _check_shapes(vectors, parts)
        n = sum(len(part.vectors) for part in parts)
        if isinstance(paths, (str, os.PathLike)) and os.path.isdir(paths):
            _check_numbers(read, _natural(os.fspath(paths), ".parquet"))
        names, origin = _names(vectors, parts, paths, columns.names, n)
        names, base, order = _ids(names, root)
        there = root is not None and not stores.is_url(base)
        size, mtime_ns = stat_files(base, names) if there else (np.full(n, -1), np.full(n, -1))
        _warn_of_missing(names, size, base if there else None)
        label, classes, labels_from = _classes(base, names, labels, class_level)
        store = store if store != "auto" else "float16" if dtype == np.float16 else "float32"
        images = ImageList(base, names, size, mtime_ns, label, classes, labels_from)
        digest = _digest(read)
        provenance = dict.fromkeys(KEY, "") | {
            "encoder": f"imported: {encoder or os.path.basename(vectors.rstrip('/'))}", "weights_sha256": digest,
            "preprocess": "{}", "precision": IMPORTED, "store": store,
        }  # fmt: skip
        images.provenance = {"imported_from": os.path.abspath(vectors), "names_from": origin}
        if (np.diff(order) < 0).any():  # a row index is then another one than in the vectors
            images.provenance["reordered"] = 1
        report = ImportReport(
            out, n, dim, store, origin, classes=len(classes), classes_from=labels_from, files=read
        )  # fmt: skip
        with files.lock(out):
            report.unusable = _write(out, images, parts, order, dim, provenance)
    return report


def _classes(base: str, names: list[str], labels: Labels, class_level: int | None) -> tuple[np.ndarray, list[str], str]:
    """As of images; shards are no classes, but the folders in them may be."""
    inside = [split_id(name) for name in names]
    if labels is not True or class_level is not None or not all(shard for shard, _ in inside):
        return image_labels(base, names, labels, class_level)
    label, classes = folder_labels([name for _, name in inside])
    return label, classes, FOLDERS if classes else ""


def _warn_of_missing(names: list[str], size: np.ndarray, root: str | None) -> None:
    """Say which names are no files below a root that was given, perhaps the wrong one."""
    if root is None:
        return
    there = cache(lambda shard: os.path.isfile(os.path.join(root, shard)))
    away = [row for row in np.flatnonzero(size < 0) if not there(split_id(names[row])[0] or names[row])]
    if away:
        of = f"of {len(names):,} names"
        warn(
            f"--root {root}: {many(len(away), f'{of} is no file', f'{of} are no files')} below it (first: "
            f"{names[away[0]]})"
        )


def _write(
    out: str, images: ImageList, parts: list[_Part], order: np.ndarray, dim: int, provenance: dict[str, Any]
) -> int:
    """Copy the vectors in the order of the names; how many are unusable."""
    create_partial(out, images, dim, provenance)
    partial = PartialFile(out)
    unusable = 0
    try:
        starts = np.cumsum([0, *(len(part.vectors) for part in parts)])
        for start in range(0, len(order), _ROWS):
            rows = order[start : start + _ROWS]
            block = _gather(parts, starts, rows, dim)
            good = np.isfinite(block).all(axis=1)
            with np.errstate(over="ignore"):
                stored = np.where(good[:, None], block, 0).astype(provenance["store"])
            if not np.isfinite(stored).all():
                raise ProtopruneError(f"vectors overflow {stored.dtype}; import them with --store float32")
            if (few := good & vanished(block, stored.dtype)).any():
                way_on = "scale them up" if stored.dtype == np.float32 else "import them with --store float32"
                raise ProtopruneError(
                    f"{many(int(few.sum()), 'vector')} of a block (first: {images.paths[start + int(few.argmax())]}) "
                    f"underflow {stored.dtype}, which has no digits for so small numbers; {way_on}"
                )
            unusable += int((~good).sum())
            status = np.where(good, Status.OK, Status.CORRUPT).astype(np.uint8)
            said = ["" if one else _NOT_FINITE for one in good]
            partial.commit(np.arange(start, start + len(rows)), stored, status, said)
        if unusable == len(order):
            raise ProtopruneError(f"all {unusable:,} vectors hold NaN or infinity")
        partial.finish()
    except BaseException:  # what is there is no start: it is copied from the beginning
        partial.discard()
        raise
    return unusable


def _gather(parts: list[_Part], starts: np.ndarray, rows: np.ndarray, dim: int) -> np.ndarray:
    """The given rows of all parts together, (len(rows), d) float32 or wider."""
    out = np.empty((len(rows), dim), np.result_type(np.float32, *{part.vectors.dtype for part in parts}))
    where = np.searchsorted(starts, rows, side="right") - 1
    for number in np.unique(where):
        here = np.flatnonzero(where == number)
        local = rows[here] - starts[number]
        ascending = np.argsort(local)  # a memory map is read in one direction
        out[here[ascending]] = parts[number].vectors[local[ascending]]
    return out


def _check_shapes(source: str, parts: list[_Part]) -> tuple[int, np.dtype]:
    parts[:] = [part for part in parts if len(part.vectors)]
    if not parts:
        raise ProtopruneError(f"{source}: holds no vectors")
    dims = {part.vectors.shape[1] for part in parts}
    if len(dims) > 1:
        raise ProtopruneError(
            f"{source}: vectors of {', '.join(map(str, sorted(dims)))} dimensions; expected one number"
        )
    kinds = {part.vectors.dtype for part in parts}
    if not all(kind.kind == "f" for kind in kinds):
        raise ProtopruneError(f"{source}: numbers of type {', '.join(map(str, kinds))}, expected float16, 32 or 64")
    return dims.pop(), np.result_type(*kinds)


def _digest(read: list[str]) -> str:
    digest = hashlib.sha256()
    for path in read:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# --- names ------------------------------------------------------------------------------------------------------------


def _names(
    source: str,
    parts: list[_Part],
    paths: str | os.PathLike[str] | Sequence[str] | None,
    path_column: str | None,
    n: int,
) -> tuple[list[str], str]:
    """(name of each vector, where they come from)."""
    if paths is not None:
        names, origin = (
            (_read_names(os.fspath(paths), path_column), os.path.basename(os.fspath(paths)))
            if isinstance(paths, (str, os.PathLike))
            else (texts("paths", paths, "names"), "given names")
        )
    elif all(part.names is not None for part in parts):
        names, origin = [name for part in parts for name in part.names or ()], "the vectors' own file"
    else:
        width = max(6, len(str(n - 1)))
        warn(f"{source}: has no names, so row numbers stand for them; give --paths LIST to have kept lists of images")
        return [f"{row:0{width}d}" for row in range(n)], "row numbers"
    if len(names) != n:
        raise ProtopruneError(
            f"{source}: {n:,} vectors and {len(names):,} names; they must be the same images in order"
        )
    return names, origin


def _read_names(path: str, column: str | None) -> list[str]:
    if os.path.isdir(path):
        return [name for one in _natural(path, ".parquet") for name in _read_names(one, column)]
    if path.lower().endswith((".parquet", ".pq")):
        table = _parquet(path)
        import pyarrow.compute

        columns = table.schema_arrow.names
        names = table.read([_one_of(path, columns, _NAMES, column, "--path-column")])[0]
        if {"status", "error_message"} <= set(columns):  # img2dataset lists what it could not download too
            names = names.filter(pyarrow.compute.equal(table.read(["status"])[0], "success"))
        return _strings(names)
    from protoprune.lists import read_paths

    return read_paths(path, every=True)


def _ids(names: list[str], root: str | os.PathLike[str] | None) -> tuple[list[str], str, np.ndarray]:
    """(ids sorted as images are, root, the vector of each)."""
    base = _base(names, root)
    names = [_plain(name if base is None else _below(name, base)) for name in names]
    order = np.array(sorted(range(len(names)), key=lambda row: os.fsencode(names[row])), np.int64)
    ordered = [names[i] for i in order]
    twice = [one for one, other in itertools.pairwise(ordered) if one == other]
    if twice:
        some = many(len(twice), "name has", "names have")
        raise ProtopruneError(f"{some} two vectors (first: {twice[0]}); each image needs one")
    return ordered, base or os.getcwd(), order


def _base(names: list[str], root: str | os.PathLike[str] | None) -> str | None:
    """What the names are relative to, where they are: what was given, else the folder that absolute ones share."""
    if root is not None:
        base = stores.given(root)
        return stores.public(base).rstrip("/") if stores.is_url(base) else os.path.abspath(base)
    if all(os.path.isabs(name) for name in names):
        return os.path.commonpath([os.path.dirname(name) for name in names])
    return None


def _below(name: str, base: str) -> str:
    if stores.is_url(base):
        inside = name.removeprefix(f"{base}/")
        if stores.is_url(name) and inside == name:
            raise UsageError(f"{stores.public(name)}: outside the root {base}; give a --root that holds every image")
        return inside
    return relative_id(name, base)


def _plain(name: str) -> str:
    name = possible_name(name).removeprefix("./")
    if not name:
        raise UsageError(f"{name!r}: an image needs a name")
    if leads_out(name):
        raise UsageError(f"{name}: not below one folder as the others are; give --root a folder that holds every image")
    return name


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(source: str, columns: _Columns, stack: contextlib.ExitStack) -> tuple[list[str], list[_Part]]:
    """(the files that were read, their parts in order)."""
    if not os.path.exists(source):
        raise UsageError(f"{source}: no such file or folder; give vectors as .npy, .npz, .parquet, or a folder of them")
    if os.path.isdir(source):
        read, names = _folder(source)
    else:
        read, names = [source], []
    parts = [_file(path, columns, stack) for path in read]
    if names and columns.own_names:
        columns.of_names = True
        if len(names) != len(parts):
            raise ProtopruneError(f"{source}: {len(parts):,} files of vectors and {len(names):,} of metadata")
        _check_numbers(read, names)
        for part, path in zip(parts, names, strict=True):
            part.names = _read_names(path, columns.names)
            if len(part.names) != len(part.vectors):
                raise ProtopruneError(f"{path}: {len(part.names):,} names for {len(part.vectors):,} vectors")
    return read, parts


def _folder(folder: str) -> tuple[list[str], list[str]]:
    """(files of vectors, files of metadata or none) of clip-retrieval's, embedding-reader's and FiftyOne's folders."""
    nested = os.path.join(folder, "img_emb")
    where = nested if os.path.isdir(nested) else folder
    arrays = _natural(where, ".npy")
    beside = _natural(where, ".parquet")
    if not arrays and not beside and os.path.isfile(samples := os.path.join(folder, "samples.json")):
        return [samples], []
    if not arrays and not beside:
        raise UsageError(f"{folder}: no .npy or .parquet in it; give the folder of the vectors")
    if not arrays:
        return beside, []
    metadata = os.path.join(folder, "metadata")
    return arrays, _natural(metadata, ".parquet") if os.path.isdir(metadata) else beside


def _natural(folder: str, suffix: str) -> list[str]:
    """Files of a suffix in the order of their numbers: img_emb_10 comes after img_emb_9."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(suffix) and not name.startswith(".")]
    names.sort(key=lambda name: [int(one) if one.isdecimal() else one for one in re.split(r"(\d+)", name)])
    return [os.path.join(folder, name) for name in names]


def _check_numbers(vectors: Sequence[str], names: Sequence[str]) -> None:
    """Raise ProtopruneError for as many files of names as of vectors which have other numbers: of each one is away."""
    if len(vectors) != len(names):
        return
    numbers = [[int((re.findall(r"\d+", os.path.basename(path)) or [-1])[-1]) for path in some]
               for some in (vectors, names)]  # fmt: skip
    if any(len(set(some)) < max(2, len(some)) for some in numbers):  # not those of parts
        return
    for vector, name, one, other in zip(vectors, names, *numbers, strict=True):
        if one != other:
            raise ProtopruneError(
                f"{vector}: {os.path.basename(name)} has the next names, of another number; bring the files that are "
                "missing, or give the names in one list with --paths"
            )


def _is_table(path: str) -> bool:
    """Whether `_read_names` looks for a column in it."""
    return os.path.isdir(path) or path.lower().endswith((".parquet", ".pq"))


def _file(path: str, columns: _Columns, stack: contextlib.ExitStack) -> _Part:
    suffix = os.path.splitext(path)[1].lower()
    columns.of_vectors |= suffix != ".npy"
    columns.of_names |= columns.own_names and suffix in (".npz", ".parquet", ".pq")
    try:
        if suffix == ".npy":
            return _Part(_two_dimensions(path, map_npy(path)))
        if suffix == ".npz":
            return _npz(path, columns)
        if suffix in (".parquet", ".pq"):
            return _table(path, columns, stack)
        if suffix == ".json":
            return _fiftyone(path, columns.vectors)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        raise ProtopruneError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise UsageError(
        f"{path}: expected .npy, .npz, .parquet, a samples.json of FiftyOne, or a folder of them; save what is in "
        "another file (.pt, .csv, an index of faiss) by numpy.save, and give the names by --paths"
    )


def _two_dimensions(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2:
        raise ProtopruneError(f"{path}: shape {array.shape}, expected (images, dimensions)")
    return array


def _npz(path: str, columns: _Columns) -> _Part:
    arrays = npz_headers(path)
    floats = [name for name, (shape, dtype) in arrays.items() if len(shape) == 2 and dtype.kind == "f"]
    strings = [name for name, (shape, dtype) in arrays.items() if len(shape) == 1 and dtype.kind in "US"]
    name = _one_of(path, floats, _VECTORS, columns.vectors, "--vector-column")
    if not columns.own_names or (not strings and columns.names is None):
        return _Part(load_npz(path, [name])[name])
    own = _one_of(path, strings, _NAMES, columns.names, "--path-column")
    found = load_npz(path, [name, own])
    return _Part(found[name], _as_text(found[own].tolist()))


def _one_of(path: str, names: Sequence[str], usual: Sequence[str], asked: str | None, option: str) -> str:
    """The array or column that was asked for, the only one, or the first that has a usual name."""
    if not names:
        raise UsageError(f"{path}: {_LACKS[option]}")
    if asked is not None:
        if asked not in names:
            raise UsageError(f"{path}: no {asked} that could be it, only {', '.join(names)}")
        return asked
    plain = {name.lower(): name for name in names}
    found = next((plain[name] for name in usual if name in plain), None)
    if found is None and len(names) == 1:
        found = names[0]
    if found is None:
        raise UsageError(f"{path}: which of {', '.join(names)} is it? give {option} NAME")
    return found


def _parquet(path: str) -> pyarrow.parquet.ParquetFile:
    pyarrow = parquet(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ProtopruneError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None


def _strings(column: pyarrow.ChunkedArray | pyarrow.Array) -> list[str]:
    values = column.to_pylist()
    if any(value is None for value in values):
        raise ProtopruneError(many(sum(value is None for value in values), "row has no name", "rows have no name"))
    return _as_text(values)


def _as_text(values: Iterable[object]) -> list[str]:
    return [os.fsdecode(value) if isinstance(value, bytes) else str(value) for value in values]


def _table(path: str, columns: _Columns, stack: contextlib.ExitStack) -> _Part:
    """A column of lists; its numbers go to a temporary file, since a column of 100 GB does not fit into memory."""
    import pyarrow

    table = _parquet(path)
    kinds = dict(zip(table.schema_arrow.names, table.schema_arrow.types, strict=True))
    lists = [
        name for name, kind in kinds.items() if hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind)
    ]
    column = _one_of(path, lists, _VECTORS, columns.vectors, "--vector-column")
    flat = [name for name, kind in kinds.items() if not pyarrow.types.is_nested(kind)]
    named = columns.own_names and (columns.names is not None or any(name.lower() in _NAMES for name in flat))
    own = _one_of(path, flat, _NAMES, columns.names, "--path-column") if named else None
    spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    return _spooled(path, table, column, own, spool)


def _spooled(path: str, table: pyarrow.parquet.ParquetFile, column: str, own: str | None, spool: IO[bytes]) -> _Part:
    """The vectors of a column, mapped from the temporary file `spool`, and the names of another one."""
    names: list[str] = []
    dim = rows = 0
    dtype = np.dtype(np.float32)
    for block, batch in _vector_blocks(path, table, column, [own] if own else []):
        if rows == 0:
            dim, dtype = block.shape[1], block.dtype
        if block.shape[1] != dim:
            raise ProtopruneError(f"{path}: vectors of {dim} and of {block.shape[1]} dimensions")
        spool.write(np.ascontiguousarray(block).tobytes())
        rows += len(block)
        names += _strings(batch.column(own)) if own else []
    spool.flush()
    vectors = np.memmap(spool, dtype, "r", shape=(rows, dim)) if rows * dim else np.empty((0, max(dim, 1)), dtype)
    return _Part(vectors, names if own else None)


def _vector_blocks(
    path: str, table: pyarrow.parquet.ParquetFile, column: str, others: list[str]
) -> Iterator[tuple[np.ndarray, pyarrow.RecordBatch]]:
    import pyarrow

    try:
        for batch in table.iter_batches(_ROWS, columns=[column, *others]):
            values = batch.column(column)
            if values.null_count:
                some = many(values.null_count, "row has", "rows have")
                raise ProtopruneError(f"{path}: {some} no vector; leave them out")
            flat = values.flatten().to_numpy(zero_copy_only=False)
            if len(batch) and len(flat) % len(batch):
                raise ProtopruneError(f"{path}: its vectors are not all of one length")
            if len(batch):
                lengths = None if hasattr(values.type, "list_size") else np.diff(values.offsets.to_numpy())
                if lengths is not None and (lengths != lengths[0]).any():
                    raise ProtopruneError(f"{path}: its vectors are not all of one length")
                yield flat.reshape(len(batch), -1), batch
    except pyarrow.ArrowException as error:
        raise ProtopruneError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None


def _fiftyone(path: str, field_name: str | None) -> _Part:
    """`dataset.export(dataset_type=FiftyOneDataset)`: samples.json, vectors as lists or zlib-compressed .npy."""
    with open(path, encoding="utf-8") as file:
        samples = parse_json(file.read())
    samples = samples.get("samples") if isinstance(samples, dict) else samples
    if not isinstance(samples, list) or not samples or not all(isinstance(one, dict) for one in samples):
        raise ProtopruneError(f"{path}: no samples in it")
    fields = list(samples[0]) if field_name else [one for one, value in samples[0].items() if _may_be_vector(value)]
    name = _one_of(path, fields, _VECTORS, field_name, "--vector-column")
    lacking = sum(one.get(name) is None or "filepath" not in one for one in samples)
    if lacking:
        raise ProtopruneError(f"{path}: {lacking:,} of {len(samples):,} samples have no {name} or no filepath")
    return _Part(np.stack([_vector(one[name]) for one in samples]), [one["filepath"] for one in samples])


def _may_be_vector(value: object) -> bool:
    return (isinstance(value, list) and bool(value) and all(isinstance(one, float) for one in value)) or (
        isinstance(value, dict) and "$binary" in value
    )


def _vector(value: Any) -> np.ndarray:
    if isinstance(value, list):
        return np.asarray(value, np.float32)
    packed = value["$binary"] if isinstance(value, dict) else value
    packed = packed["base64"] if isinstance(packed, dict) else packed
    data = zlib.decompressobj().decompress(base64.b64decode(packed), _LARGEST)
    return load_npy(data).reshape(-1)  # one that was cut off there is refused
