"""Kept lists, as files that other programs read, and their way into data loaders.

txt holds one path a line (NUL-terminated with `null=True`), csv and jsonl add row index and score, and each image's
weight where the list is calibrated; npy holds row indices. Names are written as the bytes that the file system has;
jsonl escapes what is not UTF-8. Every file appears complete, by rename. Knows nothing of features or scores' meaning.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from protoprune.errors import ProtopruneError, UsageError
from protoprune.images import refuse_archive, split_list

FORMATS = ("txt", "csv", "jsonl", "npy")


def format_list(
    paths: Sequence[str],
    rows: np.ndarray,
    scores: np.ndarray,
    format: str = "txt",
    *,
    null: bool = False,
    weights: np.ndarray | None = None,
) -> bytes:
    """The file's bytes for `paths` with their row indices, scores and perhaps weights (all of one length).

    csv and jsonl get a weight column where weights are given; txt and npy cannot hold it.

    Raises UsageError for a format unknown, and for txt when a name holds a line break.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if null and format != "txt":
        raise UsageError(f"-0 goes with --format txt, not {format}")
    if format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(rows, np.int64))
        return buffer.getvalue()
    if format == "txt":
        return _lines(paths, null)
    columns = {"path": paths, "index": np.asarray(rows).tolist(), "score": map(_number, scores)}
    if weights is not None:
        columns["weight"] = map(_number, weights)
    records = zip(*columns.values(), strict=True)
    if format == "jsonl":
        return "".join(json.dumps(dict(zip(columns, record, strict=True))) + "\n" for record in records).encode()
    return _csv(list(columns), records)


def _lines(paths: Sequence[str], null: bool) -> bytes:
    end = "\0" if null else "\n"
    text = end.join([*paths, ""])
    if not null and (text.count("\n") != len(paths) or "\r\n" in text):
        broken = [path for path in paths if "\n" in path or path.endswith("\r")]
        raise UsageError(f"{len(broken)} file names hold a line break (first: {broken[0]!r}); use -0 or --format jsonl")
    return os.fsencode(text)


def _csv(header: list[str], records: Iterable[Iterable]) -> bytes:
    lines: list[str] = []
    # csv quotes only the line ends that it writes itself: with "\r\n" a name that holds a lone "\r" survives too.
    file = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows(records)
    return os.fsencode("".join(lines))


def _number(value: np.floating) -> float | str:
    """A score in its type's shortest exact form; empty where there is none."""
    return float(str(value)) if np.isfinite(value) else ""


def read_list(source: str | os.PathLike) -> list[str] | np.ndarray:
    """The paths of a kept list, in its order; a .npy list gives the row indices, (n,) int64.

    The format is taken from the suffix (.csv, .jsonl, .npy), anything else is txt, separated by NUL or line breaks.
    """
    source = os.fspath(source)
    if not os.path.isfile(source):
        raise UsageError(f"{source}: no such list; make one with `protoprune select --keep 0.7 > {source}`")
    suffix = os.path.splitext(source)[1]
    try:
        if suffix == ".npy":
            return np.load(source)
        data = Path(source).read_bytes()
        refuse_archive(data, source)
        if suffix == ".jsonl":
            return [json.loads(line)["path"] for line in data.splitlines() if line.strip()]
        if suffix == ".csv":
            rows = csv.DictReader(io.StringIO(os.fsdecode(data), newline=""), restval=None)
            paths = [record["path"] for record in rows]
            if None in paths:
                raise KeyError("path")
            return paths
    except (ValueError, KeyError, TypeError, EOFError, csv.Error) as error:
        reason = f"no {error} column" if isinstance(error, KeyError) else str(error)
        raise ProtopruneError(f"{source}: not a list that protoprune wrote ({reason})") from None
    return split_list(data, source)


def read_weights(source: str | os.PathLike) -> dict[str, float]:
    """path -> weight of a calibrated list (`protoprune select --calibrate A -o kept.csv`), csv, jsonl or a manifest.

    The weights add up to the number of images that the list was chosen from. Rows without a weight (a manifest's
    removed images) are left out. Raises ProtopruneError for a list that holds none.
    """
    source = os.fspath(source)
    paths = read_list(source)
    suffix = os.path.splitext(source)[1]
    if suffix == ".csv":
        file = io.StringIO(os.fsdecode(Path(source).read_bytes()), newline="")
        values = [record.get("weight") for record in csv.DictReader(file)]
    elif suffix == ".jsonl":
        lines = Path(source).read_bytes().splitlines()
        values = [json.loads(line).get("weight") for line in lines if line.strip()]
    else:
        raise UsageError(f"{source}: only csv and jsonl lists hold weights; select with --format csv")
    if all(value is None for value in values):
        raise UsageError(f"{source}: has no weights; make it with `protoprune select --calibrate 0.5 -o {source}`")
    try:
        weights = {path: float(value) for path, value in zip(paths, values, strict=True) if value not in ("", None)}
    except (TypeError, ValueError):
        raise ProtopruneError(f"{source}: a weight is not a number; it is not a list that protoprune wrote") from None
    bad = [path for path, weight in weights.items() if not 0 < weight < math.inf]
    if bad:
        raise ProtopruneError(f"{source}: the weight of {bad[0]} is {weights[bad[0]]:g}, expected a positive number")
    return weights


def manifest(columns: dict[str, Sequence], format: str = "csv") -> bytes:
    """One record an image: csv, or jsonl. Columns are sequences of one length; NaN becomes empty (csv) or null."""
    values = [[_manifest_value(v) for v in column] for column in columns.values()]
    records = zip(*values, strict=True)
    if format == "csv":
        return _csv(list(columns), records)
    blank = {"": None}
    lines = (dict(zip(columns, (blank.get(v, v) for v in record), strict=True)) for record in records)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def table_csv(rows: Sequence[dict]) -> bytes:
    """A CSV file of dicts with plain values; what a row lacks, None and NaN become empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return manifest({name: ["" if row.get(name) is None else row[name] for row in rows] for name in columns})


def _manifest_value(value):
    if isinstance(value, (float, np.floating)):
        return _number(value)
    return value.item() if isinstance(value, np.generic) else value


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that it appears complete or not at all; a pipe or a device is written to as it stands."""
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        _write_device(path, data)
        return
    path = os.path.realpath(path)  # what a link points to, so that the link stays
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def _write_device(path: str, data: bytes) -> None:
    """Into a pipe, /dev/stdout, /dev/null: a rename would put a file in its place."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except BrokenPipeError:  # `-o >(head)`
        pass
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def write_links(folder: str | os.PathLike, root: str, paths: Sequence[str], *, hard: bool = False) -> None:
    """A tree of links to the images, which any folder-reading loader takes. `folder` must not exist or be empty.

    Built beside its place and renamed, so that an interrupted run leaves no half tree under the final name.
    Raises ProtopruneError when an image is missing or the file system refuses the link; images are never touched.
    """
    check_free(folder)
    folder, root = os.path.abspath(folder), os.path.abspath(root)
    building = f"{folder}.{os.getpid()}.tmp"
    made: set[str] = set()
    try:
        os.makedirs(building)
        for path in paths:
            target, link = os.path.join(root, path), os.path.join(building, path)
            parent = os.path.dirname(link)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if not os.path.exists(target):
                raise ProtopruneError(f"--links: {target} does not exist; embed again, or give --root where it is now")
            if hard:
                os.link(os.path.realpath(target), link)  # a hard link of a relative symbolic one would lead nowhere
            else:
                os.symlink(target, link)
        os.replace(building, folder)
    except OSError as error:
        raise ProtopruneError(
            f"--links {folder}: {error.strerror} ({error.filename2 or error.filename})"
            + ("; hard links cannot cross file systems, use symbolic ones" if hard else "")
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)  # only links, and only what this call made


def check_free(folder: str | os.PathLike) -> None:
    """Raise UsageError unless a folder of links can be made here: nothing is there, or an empty folder."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UsageError(f"--links {folder}: exists and is not empty; remove it or choose another folder")


def keep_only(dataset, kept: Iterable[str] | str | os.PathLike, *, root: str | os.PathLike | None = None):
    """`dataset` without the images that are not in `kept` (a list file, or paths as `read_list` gives them).

    - torchvision `ImageFolder`, other sets with `.samples`: a `torch.utils.data.Subset` (classes keep their numbers);
    - Hugging Face `datasets.Dataset` with an image column: `dataset.select(...)`;
    - WebDataset pipelines and other iterables of dicts with `__key__`: the kept samples, by path without suffix.

    `root` is the folder that the listed paths are relative to, by default the data set's own. Raises ProtopruneError
    when a listed image is not in the data set, so that a wrong root can never train on less than was asked for; for
    an iterable this is known, and raised, at its end. (Loader workers see a part each and do not check: go through the
    data set once without workers.)
    """
    if isinstance(kept, (str, os.PathLike)):
        kept = read_list(kept)
    kept = kept if isinstance(kept, np.ndarray) else list(kept)  # an iterator can be gone through only once
    if isinstance(kept, np.ndarray) or any(not isinstance(path, str) for path in kept):
        raise UsageError("keep_only takes paths; row indices are for arrays in protoprune's own order of images")
    if hasattr(dataset, "samples"):
        from torch.utils.data import Subset

        return Subset(dataset, _indices(*_identified(dataset, root), kept))
    if _is_hugging_face(dataset):
        return dataset.select(_indices(*_identified(dataset, root), kept))
    if not hasattr(dataset, "__iter__"):
        raise UsageError(
            f"{type(dataset).__name__}: expected .samples, a Hugging Face data set, or samples with __key__"
        )
    samples = _KeptSamples(dataset, kept)
    return dataset.compose(samples.stage) if hasattr(dataset, "compose") else samples


def weights_of(
    dataset, kept: Mapping[str, float] | str | os.PathLike, *, root: str | os.PathLike | None = None
) -> np.ndarray:
    """(len(dataset),) float32: the weight of each image of `dataset`, in its order; 0 for one that is not listed.

    dataset: what `keep_only` returned or took, except iterables (`read_weights` gives those their weights by path);
    kept: a calibrated list, or what `read_weights` gives. For a loss (weight each image's), or for
    `torch.utils.data.WeightedRandomSampler` (draw by weight). `root` as for `keep_only`, which must be given for a
    Hugging Face data set. Raises ProtopruneError when a listed image is not in the data set.
    """
    weights = kept if isinstance(kept, Mapping) else read_weights(kept)
    indices = None
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # a torch Subset, perhaps of a Subset
        own = np.asarray(dataset.indices)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    if not hasattr(dataset, "samples") and not _is_hugging_face(dataset):
        raise UsageError(f"{type(dataset).__name__}: expected .samples or a Hugging Face data set; see read_weights")
    if root is None and not hasattr(dataset, "samples"):
        raise UsageError(
            "weights_of needs root= for a Hugging Face data set: the folder that the paths are relative to"
        )
    ids, base, where = _identified(dataset, root)
    ids = ids if indices is None else [ids[index] for index in indices]
    listed = {path.removeprefix(base): weight for path, weight in weights.items()}
    _all_present(listed.keys() - set(ids), len(listed), where)
    return np.array([listed.get(one, 0) for one in ids], np.float32)


def _is_hugging_face(dataset) -> bool:
    return hasattr(dataset, "select") and hasattr(dataset, "features")


def _identified(dataset, root: str | os.PathLike | None) -> tuple[list[str], str, str]:
    """(each image's path as lists have it, the folder with a slash that was taken off, 'under …' for messages)."""
    if hasattr(dataset, "samples"):
        paths = [sample[0] for sample in dataset.samples]
        root = os.fspath(root if root is not None else dataset.root)
    else:
        paths = _hugging_face_paths(dataset)
        root = os.fspath(root) if root is not None else os.path.commonpath([os.path.dirname(p) for p in paths])
    base = os.path.join(os.path.abspath(root), "")
    return [os.path.abspath(path).removeprefix(base) for path in paths], base, f"under {root}"


def _indices(ids: list[str], base: str, where: str, kept: Iterable[str]) -> list[int]:
    wanted = {path.removeprefix(base) for path in kept}
    _all_present(wanted - set(ids), len(wanted), where)
    return [index for index, one in enumerate(ids) if one in wanted]


def _hugging_face_paths(dataset) -> list[str]:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UsageError(f"the data set has no image column, only {', '.join(dataset.features)}")
    undecoded = dataset.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))
    paths = [record["path"] for record in undecoded[columns[0]]]
    if not all(path and os.path.isabs(path) for path in paths):
        raise UsageError("the data set does not know its files' paths; load it with load_dataset('imagefolder', …)")
    return paths


def _all_present(missing: set[str], listed: int, where: str) -> None:
    if missing:
        raise ProtopruneError(
            f"{len(missing)} of {listed} listed images are not in the data set {where} "
            f"(first: {min(missing)}); give the root that the list was made for"
        )


class _KeptSamples:
    """The samples whose key is in the list, pass after pass; each whole pass checks that all of them were seen."""

    def __init__(self, dataset: Iterable[dict], kept: Iterable[str]):
        self.dataset = dataset
        self.keys = {_key(path): path for path in kept}

    def __iter__(self) -> Iterator[dict]:
        return self.stage(self.dataset)

    def stage(self, samples: Iterable[dict]) -> Iterator[dict]:
        unseen = set(self.keys)
        for sample in samples:
            if "__key__" not in sample:
                raise UsageError(
                    f"the samples have no __key__, only {', '.join(map(str, sample))}; keep_only needs one"
                )
            if sample["__key__"] in self.keys:
                unseen.discard(sample["__key__"])
                yield sample
        if not _is_loader_worker():
            _all_present({self.keys[key] for key in unseen}, len(self.keys), "(by key)")


def _is_loader_worker() -> bool:
    """Whether this process sees one worker's share of the shards only."""
    if "torch" not in sys.modules:
        return False
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None


def _key(path: str) -> str:
    """WebDataset's key of a file: its path up to the first dot of the file name."""
    folder, _, name = path.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def write_stdout(data: bytes) -> None:
    """The list on standard output. A reader that stops early (`| head`) is not an error; a full disk is."""
    if sys.stdout is None:  # `>&-`
        raise UsageError("standard output is closed; give -o FILE")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        if not isinstance(error, BrokenPipeError):
            raise ProtopruneError(f"standard output: cannot write ({error.strerror}); the list is cut short") from None
