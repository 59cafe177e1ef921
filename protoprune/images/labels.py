"""Class labels from a file: a table of path and class, ImageNet's ground truth for its flat folder, or the
metadata.csv / metadata.jsonl of a Hugging Face imagefolder.

Paths are matched to images as those of score tables are (`scores.matching`): tolerantly about the root, never by guess.
What does not match, on either side, is counted and said.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protoprune.arguments import check_fields, texts
from protoprune.bounds import shown
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.formats import refuse_archive
from protoprune.scores.matching import match_names
from protoprune.text import (
    CLASS_NAMES,
    arrow_table,
    contents,
    is_arrow,
    is_class_number,
    json_lines,
    parse_json,
    plain_bytes,
    plain_name,
    sorted_classes,
)
from protoprune.units import many

_PATHS = ("path", "filename", "file", "filepath", "imagepath", "imgpath", "relativepath", "imagename", "image",
          "imageid", "img", "id", "name", "key")  # fmt: skip
_DELIMITERS = ("\t", ",", ";", "|", " ")
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class LabelFile:
    """A file of labels and how to read it.

    path    CSV, TSV, text, JSON, JSON lines, Parquet or Arrow: a path and a class a row; or text with one class a line,
            the i-th for the i-th image in the order of names (ImageNet's ILSVRC2012_validation_ground_truth.txt)
    column  name of the class column, where the file has several that could be it
    names   file that turns class numbers into names: lines of number and name in either order (map_clsloc.txt), one
            name a line (synsets.txt), or JSON (imagenet_class_index.json)
    """

    path: str | os.PathLike[str]
    column: str | None = None
    names: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self, globals())


def label_file(
    path: str | os.PathLike[str] | None,
    column: str | None,
    names: str | os.PathLike[str] | None,
    level: int | None = None,
) -> LabelFile | bool:
    """The `labels` argument of `list_folder` for the command line's options."""
    if path is None:
        return True
    if level is not None:
        raise UsageError(f"--class-level {level} does not go with --labels {path}, which gives the classes")
    return LabelFile(path, column, names)


def read_labels(file: LabelFile, paths: Sequence[str], root: str) -> tuple[np.ndarray, list[str], str]:
    """(n,) int32 label of each image of `paths` (-1: none), the class names, and where they come from in words.

    Classes are sorted by name, by value when all of them are numbers. Warns of rows that name no image, images without
    a class, and images with two. Raises UsageError or ProtopruneError when the file cannot be read or names no image.
    """
    check_there(file)
    source = os.fspath(file.path)
    data = _read(source)
    keys, values = _parse(source, data, file.column)
    if file.names is not None:
        values = _rename(source, values, os.fspath(file.names))
    if keys is None:
        values = _by_place(source, values, paths)
        found = dict(enumerate(values))
    else:
        named = _by_path(source, keys, values, paths, root)
        if named is None:
            raise ProtopruneError(
                f"{source}: none of its {many(len(set(keys)), 'row')} names an image (it has {keys[0]!r}, the images "
                f"are like {paths[0]!r}); paths must be relative to the same root"
            )
        found = named
    label, classes = _as_labels(source, found, paths)
    return label, classes, f"{os.path.basename(source)}, sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def given_labels(given: Mapping[Any, Any], paths: Sequence[str], root: str) -> tuple[np.ndarray, list[str], str]:
    """The same of a mapping of path and class: text or a whole number; None, NaN and '' are none."""
    keys, values = texts("labels", list(given)), [_as_text(*one) for one in given.items()]
    if not keys:
        raise UsageError("labels: an empty dict, expected path and class; give labels=False for images without classes")
    found = _by_path("labels", keys, values, paths, root)
    if found is None:
        raise UsageError(
            f"none of the {len(paths):,} images below {root} has a class (first: {paths[0]}; those of {len(keys):,} "
            f"are known, first: {keys[0]}); is it the folder that these paths are relative to?"
        )
    return *_as_labels("labels", found, paths), "as given"


def _as_text(path: object, value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas has for nothing
        return ""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and float(value).is_integer():
        return str(int(value))
    if not isinstance(value, str):
        raise UsageError(f"labels: the class of {path} is {shown(value)}, expected text or a whole number")
    return value


def _as_labels(source: str, found: Mapping[int, str], paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(n,) int32 label of each image (-1: none) and the class names, of the classes found for rows."""
    found = {row: value for row, value in found.items() if value}
    classes = sorted_classes(set(found.values()))
    if not classes:
        raise ProtopruneError(f"{source}: gives no image a class")
    index = {name: number for number, name in enumerate(classes)}
    label = np.full(len(paths), -1, np.int32)
    label[list(found)] = [index[value] for value in found.values()]
    without = np.flatnonzero(label < 0)
    if len(without):
        of = f"of {len(paths):,} images"
        warn(f"{source}: {many(len(without), f'{of} has', f'{of} have')} no class (first: {paths[without[0]]})")
    return label, classes


def check_there(file: LabelFile) -> None:
    """Raise UsageError where a file of labels, or that of its classes' names, is not there."""
    for option, path in (("--labels", file.path), ("--class-names", file.names)):
        if path is not None and not os.path.isfile(path):
            raise UsageError(f"{option} {os.fspath(path)}: no such file; give a table of path and class")


def _read(source: str) -> bytes:
    data = contents(source)
    if not is_arrow(data):
        refuse_archive(data, source, "a table of classes")
    return data


# --- reading ----------------------------------------------------------------------------------------------------------


def _parse(source: str, data: bytes, column: str | None) -> tuple[list[str] | None, list[str]]:
    """(paths or None for one class a line, classes) of a file's rows; a class is '' where the row has none."""
    try:
        if is_arrow(data):
            return _from_records(arrow_table(data, source).to_pylist(), column)
        text = _text(data)
        if text.lstrip()[:1] in ("{", "["):
            return _from_records(_json(text), column)
        return _from_text(text, source, column)
    except (csv.Error, ValueError) as error:
        raise ProtopruneError(f"{source}: cannot read its rows ({error})") from None
    except _Unclear as error:
        raise UsageError(f"{source}: {error}") from None


class _Unclear(Exception):
    """What is wrong with a table, without its name."""


def _text(data: bytes) -> str:
    return os.fsdecode(plain_bytes(data))


def _json(text: str) -> list[dict[str, Any]]:
    try:
        whole = parse_json(text)
    except ValueError:
        return json_lines(text)
    if isinstance(whole, dict) and all(isinstance(value, (str, int)) for value in whole.values()) and len(whole) > 1:
        return [{"path": path, "label": value} for path, value in whole.items()]
    return whole if isinstance(whole, list) else [whole]


def _from_records(records: list[dict[str, Any]], column: str | None) -> tuple[list[str], list[str]]:
    if not records or not all(isinstance(one, dict) for one in records):
        raise _Unclear("expected rows with a path and a class")
    names = list(dict.fromkeys(name for one in records for name in one))
    key, label = _columns(names, column)
    return [_cell(one.get(names[key])) for one in records], [_cell(one.get(names[label])) for one in records]


def _cell(value: object) -> str:
    if isinstance(value, (list, dict)):
        raise _Unclear(f"a class that is not one value ({str(value)[:60]}); expected one class an image")
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value)


def _from_text(text: str, source: str, column: str | None) -> tuple[list[str] | None, list[str]]:
    rows = _rows(text, source)
    if not rows:
        raise _Unclear("the file has no rows")
    width = len(rows[0])
    header = any(plain_name(name) in (*_PATHS, *CLASS_NAMES) for name in rows[0]) or column in rows[0]
    if width == 1:
        if column is not None and column not in rows[0]:
            raise _Unclear(f"no column {column}: it has one class a line; leave --label-column out")
        return None, [row[0].strip() for row in rows[header:]]
    key, label = _columns(rows[0], column) if header else _columns_of(rows, column)
    # Kaggle's ImageNet has class and box, repeated
    first_word = header and plain_name(rows[0][label]) == "predictionstring"
    keys, values = [], []
    for place, row in enumerate(rows[header:], 1 + header):
        if len(row) <= key:
            raise _Unclear(f"row {place} has {len(row)} columns, expected {width}")
        value = row[label].strip() if len(row) > label else ""
        keys.append(row[key].strip())
        values.append(value.split(" ")[0] if first_word else value)
    return keys, values


def _columns_of(rows: list[list[str]], column: str | None) -> tuple[int, int]:
    """(path, class) columns of rows without a header."""
    if column is not None:
        raise _Unclear(f"no column {column}: the file has no header")
    if len(rows[0]) == 2:
        return (1, 0) if _like_paths(rows, 1) and not _like_paths(rows, 0) else (0, 1)
    raise _Unclear(
        f"which of its {len(rows[0])} columns is the path, which the class? add a header line that names both"
    )


def _like_paths(rows: list[list[str]], column: int) -> bool:
    return all(len(row) > column and ("/" in row[column] or "." in row[column]) for row in rows[:50])


def _rows(text: str, source: str) -> list[list[str]]:
    """Rows of fields. The delimiter is the first under which the first rows have one width of two or more."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for delimiter in _DELIMITERS:
        if delimiter == " " and source.lower().endswith((".csv", ".tsv")):
            continue
        split = _split(text, lines, delimiter)
        if split and len(split[0]) > 1 and len({len(row) for row in split[:50]}) == 1:
            return split
    return [[line] for line in lines]


def _split(text: str, lines: list[str], delimiter: str) -> list[list[str]]:
    if delimiter == " ":  # names may hold blanks: the last word is the class
        return [line.strip().rsplit(None, 1) for line in lines]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [row for row in rows if row and not row[0].startswith("#")]


def _columns(names: Sequence[str], column: str | None) -> tuple[int, int]:
    """(path, class) columns by name."""
    plain = [plain_name(name) for name in names]
    key = _first_of(_PATHS, plain)
    label = _first_of(CLASS_NAMES, ["" if place == key else name for place, name in enumerate(plain)])
    if column is not None:
        if column not in names:
            raise _Unclear(f"no column {column}, only {', '.join(names)}")
        label = list(names).index(column)
    if len(names) == 2 and key is None and label is not None:
        key = 1 - label
    elif len(names) == 2 and key is not None and label is None:
        label = 1 - key
    if label is None:
        raise _Unclear(f"which of its columns {', '.join(names)} is the class? give --label-column NAME")
    if key is None or key == label:
        raise _Unclear(f"which of its columns {', '.join(names)} is the path? name it path")
    return key, label


def _first_of(wanted: Sequence[str], names: list[str]) -> int | None:
    """The place of the first of the wanted names that is there."""
    return next((names.index(name) for name in wanted if name in names), None)


# --- class numbers -> names -------------------------------------------------------------------------------------------


def _rename(source: str, values: list[str], names: str) -> list[str]:
    numbers = {value for value in values if value}
    if not all(is_class_number(value) for value in numbers):
        first = next(value for value in values if value and not is_class_number(value))
        raise UsageError(f"--class-names goes with class numbers, and {source} has {first!r}")
    table = _class_names(names, {int(value) for value in numbers})
    unknown = sorted(int(value) for value in numbers if int(value) not in table)
    if unknown:
        raise UsageError(f"--class-names {names}: has no name for {len(unknown)} class numbers (first: {unknown[0]})")
    _warn_of_shared_names(names, {number: table[number] for number in sorted(map(int, numbers))})
    return [table[int(value)] if value else "" for value in values]


def _warn_of_shared_names(source: str, table: dict[int, str]) -> None:
    """Say that numbers of one name become one class."""
    first_of: dict[str, int] = {}
    for number, name in table.items():
        first_of.setdefault(name, number)
    if together := [number for number, name in table.items() if first_of[name] != number]:
        name = table[together[0]]
        warn(
            f"--class-names {source}: {len(table):,} numbers have {many(len(first_of), 'name')}, each of which "
            f"becomes a class (first: {first_of[name]} and {together[0]} are {name!r})"
        )


def _class_names(names: str, used: set[int]) -> dict[int, str]:
    """number -> name of a file of class names."""
    text = _text(_read(names))
    try:
        found = _json_names(text) if text.lstrip()[:1] in ("{", "[") else _lines_of_names(text)
    except ValueError as error:
        raise ProtopruneError(f"{names}: cannot read its JSON ({error})") from None
    if isinstance(found, list):
        return _numbered(names, found, used)
    if not all(is_class_number(number) for number in found):
        raise ProtopruneError(f"{names}: expected class numbers and names")
    return {int(number): name for number, name in found.items()}


def _json_names(text: str) -> list[str] | dict[str, str]:
    """Names without numbers, or number -> name; a name may be the first of several. Raises ValueError."""
    whole = parse_json(text)
    if isinstance(whole, list):
        return [_first(one) for one in whole]
    return dict(_number_first(str(a), _first(b)) for a, b in whole.items())


def _lines_of_names(text: str) -> list[str] | dict[str, str]:
    """The same of text: number and name in either order, perhaps below a header, or a name, a line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [_number_and_name(line) for line in lines]
    numbered = [pair for pair in pairs[pairs[:1] == [None] :] if pair is not None]  # below a header
    if numbered and len(numbered) + (pairs[0] is None) == len(pairs):
        table = dict(numbered)
        if len(table) == len(numbered) and (len(table) == 1 or len(set(table.values())) > 1):
            return table  # else the numbers are part of the names: zone 1, zone 2
    wnids = all(_WNID.match(line) for line in lines)  # LOC_synset_mapping.txt adds what they mean
    return [line.split()[0] if wnids else line for line in lines]


def _number_and_name(line: str) -> tuple[str, str] | None:
    """Of '1 golf ball', 'golf ball,1' or 'n02119789 1 kit_fox', where the name is what stands first."""
    if match := re.match(r"(\d{1,18})[\s,:;]+(.*\D.*)", line):
        return match[1], match[2].strip('"')
    if match := re.match(r"(n\d{8})[\s,:;]+(\d{1,18})\b", line) or re.match(r"(.*\D.*?)[\s,:;]+(\d{1,18})$", line):
        return match[2], match[1].strip('"')
    return None


def _number_first(a: str, b: str) -> tuple[str, str]:
    return (b, a) if is_class_number(b) and not is_class_number(a) else (a, b)


def _first(value: object) -> str:
    return str(value[0]) if isinstance(value, list) and value else str(value)


def _numbered(source: str, names: list[str], used: set[int]) -> dict[int, str]:
    """Names without numbers: counted from 0, or from 1 where the labels show it."""
    if min(used) == 0:
        return dict(enumerate(names))
    if max(used) == len(names):
        return dict(enumerate(names, 1))
    raise UsageError(
        f"--class-names {source}: do its {len(names):,} names count from 0 or from 1? the labels go from {min(used)} "
        f"to {max(used)}; give a file with number and name in each line"
    )


# --- matching ---------------------------------------------------------------------------------------------------------


def _by_place(source: str, values: list[str], paths: Sequence[str]) -> list[str]:
    if len(values) != len(paths):
        raise UsageError(
            f"{source}: {len(values):,} lines of one class each, and {len(paths):,} images; "
            "give a table of path and class, or one line an image in the order of their names"
        )
    warn(
        f"{source}: one class a line, taken for the images in the order of their names: {paths[0]} is {values[0]}, "
        f"{paths[-1]} is {values[-1]}"
    )
    return values


def _by_path(source: str, keys: list[str], values: list[str], paths: Sequence[str], root: str) -> dict[int, str] | None:
    """row -> class of the images that the table names; None where it names none of them."""
    if not any("/" in key for key in keys) and not any("\\" in path for path in paths):  # written on Windows
        keys = [key.replace("\\", "/") for key in keys]
    of: dict[str, set[str]] = {}
    for key, value in zip(keys, values, strict=True):
        of.setdefault(key.removeprefix("./"), set()).add(value)
    if len(of) < len(keys):
        warn(f"{source}: {many(len(keys) - len(of), 'row names', 'rows name')} an image a second time")
    unique = list(of)
    rows = match_names(_below(source, unique, paths, root), paths)[0].tolist()
    found = {row: of[key] - {""} for row, key in zip(rows, unique, strict=True) if row >= 0}
    if not found:
        return None
    lost = [key for key, row in zip(unique, rows, strict=True) if row < 0]
    if lost:
        warn(f"{source}: {len(lost):,} of {len(unique):,} rows name no image, or could name several (first: {lost[0]})")
    return _one_each(source, found, paths)


def _one_each(source: str, found: dict[int, set[str]], paths: Sequence[str]) -> dict[int, str]:
    """row -> its class, of those that have one; warns of those that have several."""
    torn = [row for row, classes in found.items() if len(classes) > 1]
    if torn:
        first = min(torn)
        some = many(len(torn), "image has several classes and gets", "images have several classes and get")
        warn(f"{source}: {some} none (first: {paths[first]}: {', '.join(sorted(found[first])[:4])})")
    return {row: next(iter(classes)) for row, classes in found.items() if len(classes) == 1}


def _below(source: str, keys: list[str], paths: Sequence[str], root: str) -> list[str]:
    """The keys relative to the root where they are relative to the file's own folder below it (metadata.csv)."""
    folder = os.path.relpath(os.path.dirname(os.path.abspath(source)), root)
    if folder in (".", "..") or folder.startswith("../"):
        return keys
    moved, known = [f"{folder}/{key}" for key in keys], set(paths)
    return moved if sum(one in known for one in moved) > sum(one in known for one in keys) else keys
