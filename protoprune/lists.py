"""Kept lists, as files that other programs read.

txt holds one path a line (NUL-terminated with `null=True`), csv and jsonl add row index and score, and each image's
weight where the list is calibrated; npy holds row indices. Names are written as the bytes that the file system has;
jsonl escapes what is not UTF-8. Knows nothing of features or scores' meaning, of how a file is written (`files`), or of
what is made of a list (`loaders`).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import csv_bytes, plain_cell, plain_number
from protoprune.images import refuse_archive, split_list
from protoprune.npy import load_npy

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
    columns = {"path": paths, "index": np.asarray(rows).tolist(), "score": map(plain_number, scores)}
    if weights is not None:
        columns["weight"] = map(plain_number, weights)
    records = zip(*columns.values(), strict=True)
    if format == "jsonl":
        return "".join(json.dumps(dict(zip(columns, record, strict=True))) + "\n" for record in records).encode()
    return csv_bytes(list(columns), records)


def _lines(paths: Sequence[str], null: bool) -> bytes:
    end = "\0" if null else "\n"
    text = end.join([*paths, ""])
    if not null and (text.count("\n") != len(paths) or "\r\n" in text):
        broken = [path for path in paths if "\n" in path or path.endswith("\r")]
        raise UsageError(f"{len(broken)} file names hold a line break (first: {broken[0]!r}); use -0 or --format jsonl")
    return os.fsencode(text)


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
            return load_npy(source)
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
    values = [[plain_cell(v) for v in column] for column in columns.values()]
    records = zip(*values, strict=True)
    if format == "csv":
        return csv_bytes(list(columns), records)
    blank = {"": None}
    lines = (dict(zip(columns, (blank.get(v, v) for v in record), strict=True)) for record in records)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
