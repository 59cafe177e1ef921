"""The feature set: a folder of feature files, one a shard, that is read as if it were one feature file.

    features/set.json            what the set is: the key, the root, and of each shard its state
    features/train/0000.tar.h5   the features of the shard train/0000.tar, as `featurefile` describes

Shards are in the order of ids, so that row i of the set is row i of the file that `merge` makes of it. Not an HDF5
virtual data set: there a source that is missing reads as zeros, in silence. This module knows nothing of how a shard is
embedded: see `sharding`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
import resource
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from protoprune import files, stores
from protoprune.arguments import checked
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features.featurefile import FeatureFile, Index, row_numbers
from protoprune.images.decode import Status
from protoprune.images.listing import FOLDERS, SET_FILE, is_feature_set, warn_of_stray
from protoprune.paths import STEP, Block, Paths
from protoprune.text import native, parse_json, sorted_classes
from protoprune.units import many

_FORMAT, _VERSION = "protoprune-feature-set", 1
_UUID = re.compile("[0-9a-f]{32}")
# Feature files that are open at once; each takes up to four descriptors, of which macOS gives a process 256.
_OPEN_FILES = min(64, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 31) // 8))  # -1: no limit


def check_folder(out: str) -> None:
    """UsageError for a set that would be a folder called as a feature file is."""
    if out.lower().endswith((".h5", ".hdf5")) and not is_feature_set(out):
        raise UsageError(
            f"-o {stores.public(out)}: shards become a feature set, which is a folder; leave the suffix out, and "
            "`protoprune merge` makes one file of it"
        )


class Plan(TypedDict):
    """What set.json says of a set as a whole."""

    key: dict[str, str]  # see `featurefile.KEY`
    root: str
    options: dict[str, Any]  # the fields of `sources.ShardOptions`


@dataclass
class Part:
    """One shard of a set, as set.json has it."""

    name: str  # the shard's path relative to the root
    size: int = -1  # bytes of the shard, when it was embedded
    version: int = -1
    rows: int = -1  # of its feature file; -1: not done
    uuid: str = ""
    failed: tuple[str, str] | None = None  # (status, reason) of a shard that cannot be used

    @property
    def done(self) -> bool:
        return self.rows >= 0

    @property
    def pending(self) -> bool:
        return not self.done and self.failed is None

    def as_json(self) -> dict[str, Any]:
        plain = {"name": self.name, "size": self.size, "version": self.version}
        if self.done:
            return {**plain, "rows": self.rows, "uuid": self.uuid}
        return {**plain, "failed": list(self.failed)} if self.failed else plain

    def consistent(self) -> bool:
        """Whether all of it is of its kind, and the counts agree with each other and with the state."""
        counts = (self.size, self.version, self.rows)
        if not all(type(count) is int and -1 <= count < 1 << 63 for count in counts):
            return False
        if self.failed is not None:
            told = len(self.failed) == 2 and all(isinstance(one, str) for one in self.failed)
            return told and self.rows == -1
        return self.rows == -1 or bool(_UUID.fullmatch(self.uuid))

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Part:
        failed = plain.get("failed")
        return cls(**{**plain, "name": native(plain["name"]), "failed": tuple(failed) if failed else None})


def shard_file(folder: str, name: str) -> str:
    """The feature file of a shard."""
    return os.path.join(folder, *name.split("/")) + ".h5"


def read_plan(folder: str | os.PathLike[str]) -> tuple[Plan, list[Part]]:
    """(what set.json says of the set, its parts). Raises ProtopruneError when it is none."""
    path = os.path.join(folder, SET_FILE)
    shown = stores.public(path)
    try:
        plan = parse_json(_read(path).decode("utf-8", "surrogateescape"))
        if plan["format"] != _FORMAT:
            raise ValueError("another format")
        if plan["format_version"] != _VERSION:
            raise ProtopruneError(
                f"{shown}: feature set version {plan['format_version']}, this program reads {_VERSION}; upgrade it"
            )
        parts = [Part.from_json(one) for one in plan.pop("shards")]
        _check_plan(plan, parts)
        plan["root"] = native(plan["root"])
    except (FileNotFoundError, NotADirectoryError):
        is_folder = os.path.isdir(folder) or stores.is_url(folder)
        what = f"a folder without {SET_FILE}" if is_folder else f"no folder with a {SET_FILE}"
        where = stores.public(os.fspath(folder))
        raise ProtopruneError(
            f"{where}: {what}, so no feature set; `protoprune embed` makes features of images and shards"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtopruneError(
            f"{shown}: damaged ({' '.join(str(error).split())[:80]}); run the same `protoprune embed` again with "
            "--overwrite, which keeps the features of shards that are whole"
        ) from None
    return plan, parts


def _check_plan(plan: dict[str, Any], parts: list[Part]) -> None:
    """Raise ValueError for what `write_plan` would not have written."""
    kinds = {"key": dict, "root": str, "options": dict}
    if odd := [name for name, kind in kinds.items() if not isinstance(plan.get(name), kind)]:
        raise ValueError(f"no {odd[0]}")
    if not parts:
        raise ValueError("no shards")
    names = [part.name for part in parts]
    if any(files.leads_out(name) for name in names):
        raise ValueError("a shard's name leads out of the set")
    if len(set(names)) < len(names):
        raise ValueError("a shard is named twice")
    if wrong := next((part.name for part in parts if not part.consistent()), None):
        raise ValueError(f"what it says of {wrong}")


def _read(path: str) -> bytes:
    if not stores.is_url(path):
        with open(path, "rb") as file:
            return file.read()
    data = stores.read(path)
    if data is None:
        raise FileNotFoundError(path)
    return data


def write_plan(folder: str, plan: Plan, parts: list[Part], *, new: bool = False) -> None:
    """Write set.json; the set is finished when no part is pending.

    On a store, `new` raises FileExistsError when there is one already.
    """
    state = "unfinished" if any(part.pending for part in parts) else "finished"
    head = {**plan, "format": _FORMAT, "format_version": _VERSION, "state": state}
    lines = ",\n".join("  " + json.dumps(part.as_json()) for part in parts)
    text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'
    data = text.encode("utf-8", "surrogateescape")
    if stores.is_url(folder):
        stores.write(f"{folder}/{SET_FILE}", data, new=new)
    else:
        files.write_file(os.path.join(folder, SET_FILE), data)


def not_finished(path: str, done: int, shards: int) -> ProtopruneError:
    """The error for a set of which some shards are pending."""
    return ProtopruneError(
        f"{stores.public(path)}: not finished, {done:,} of {shards:,} shards are done; run the same `protoprune embed` "
        "again, it does the rest"
    )


def open_set(folder: str) -> FeatureSet:
    """The finished feature set, with a warning of what is not in it."""
    whole = FeatureSet(folder)
    if whole.failed_shards:
        name, status, reason = whole.failed_shards[0]
        warn(
            f"{folder}: {len(whole.failed_shards):,} of {len(whole.parts):,} shards could not be used and are not in "
            f"it (first: {name}: {status}, {reason})"
        )
    return whole


def _of_all(name: str) -> Any:
    """The property of a set that is this column of all its files, one after the other."""
    return property(lambda whole: np.concatenate([getattr(file, name) for file in whole._files()]))


class FeatureSet:
    """A finished feature set, read as a FeatureFile is: the same attributes and methods; a context manager.

    Parts that failed are in `failed_shards` and have no rows. Raises ProtopruneError when set.json is missing or
    damaged, parts are still pending, or a part's file is missing or not the one that set.json names.
    """

    @checked
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = os.fspath(folder).rstrip("/") or "/"
        self.plan, self.parts = read_plan(self.path)
        pending = sum(part.pending for part in self.parts)
        if pending:
            raise not_finished(self.path, len(self.parts) - pending, len(self.parts))
        self._done = [part for part in self.parts if part.done]
        if not self._done:
            name, status, reason = self.failed_shards[0]
            raise ProtopruneError(f"{self.path}: no shard could be used (first: {name}: {status}, {reason})")
        for part in self._done:
            if not os.path.exists(shard_file(self.path, part.name)):
                raise ProtopruneError(
                    f"{shard_file(self.path, part.name)}: missing, a part of the feature set {self.path}; "
                    "run the same `protoprune embed` again"
                )
        self._starts = np.cumsum([0, *(part.rows for part in self._done)])
        self._open: OrderedDict[int, FeatureFile] = OrderedDict()
        self._lock = threading.RLock()  # a thread must not close the part that another one reads
        self._labels: tuple[np.ndarray, list[str], str] | None = None
        self.n = int(self._starts[-1])
        first = self._file(0)
        self.dim = first.dim
        self.features = _Rows(self, (self.n, self.dim), first.features.dtype)
        identity = hashlib.sha256("".join(part.uuid for part in self._done).encode()).hexdigest()[:32]
        self.provenance = {
            **first.provenance, "root": self.plan["root"], "uuid": identity,
            "unreadable_folder_count": 0, "unreadable_folders": "[]",
        }  # fmt: skip
        self.provenance["labels_from"] = self._classes()[2]

    def __repr__(self) -> str:
        return f"FeatureSet({self.path!r}, {self.n:,} images x {self.dim})"

    def __enter__(self) -> FeatureSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].release()

    @property
    def failed_shards(self) -> list[tuple[str, str, str]]:
        """(name, status, reason) of the shards that have no rows."""
        return [(part.name, *part.failed) for part in self.parts if part.failed]

    @cached_property
    def paths(self) -> Paths:
        return Paths(self.n, self._read_names if len(self._done) <= _OPEN_FILES else self._spooled().read)

    def _read_names(self, first: int, last: int) -> list[bytes]:
        names: list[bytes] = []
        for number, low, high in self._within(first, last):
            with self._lock:
                names += self._file(number).paths.read(low, high)
        return names

    def _spooled(self) -> Block:
        """All names in an unnamed temporary file: parts that cannot all be open take longer to open than to read."""
        places, seen, at = [np.zeros(1, np.int64)], 0, 0
        try:
            with tempfile.TemporaryFile() as file:
                for part in self._files():
                    names = part.paths.read(0, part.n)
                    begins = at + np.cumsum([len(name) + 1 for name in names], dtype=np.int64)  # of the rows after them
                    places.append(begins[-(seen + 1) % STEP :: STEP])
                    at += file.write(b"\0".join([*names, b""]))
                    seen += len(names)
                file.flush()
                every = np.concatenate([*places, [at]])
                return Block(os.dup(file.fileno()), 0, every, partial(self.damaged, "its names were cut short"))
        except OSError as error:
            where = tempfile.gettempdir()
            raise ProtopruneError(
                f"{where}: cannot write the names of {self.path} ({error.strerror}); TMPDIR names another place"
            ) from None

    def _within(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(part, its first row, its last row + 1) of the parts that the rows first to last - 1 are of."""
        number = bisect.bisect_right(self._starts, first) - 1
        while first < last:
            start, end = int(self._starts[number]), min(int(self._starts[number + 1]), last)
            if end > first:
                yield number, first - start, end - start
                first = end
            number += 1

    @property
    def classes(self) -> list[str]:
        return self._classes()[1]

    @property
    def labels(self) -> np.ndarray:
        return self._classes()[0]

    status = _of_all("status")
    usable = _of_all("usable")
    size = _of_all("size")
    mtime_ns = _of_all("mtime_ns")
    ctime_ns = _of_all("ctime_ns")
    content = _of_all("content")
    transparent = _of_all("transparent")

    def failures(self) -> list[tuple[str, Status, str]]:
        return [one for file in self._files() for one in file.failures()]

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(name, reason) of the members of shards that are no images and belong to none."""
        return [one for file in self._files() for one in file.left_out]

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """(id, what, reason) of every image without features, and of what was left out, shard by shard."""
        return (one for file in self._files() for one in file.problems())

    def failure_counts(self) -> Counter[str]:
        return sum((file.failure_counts() for file in self._files()), Counter())

    @property
    def unreadable_folders(self) -> list[list[str]]:
        return []

    def finished(self) -> np.ndarray:
        return np.ones(self.n, bool)

    def damage(self) -> list[str]:
        """What of its files is not what was written; see `FeatureFile.damage`."""
        return [f"{file.path}: {line}" for file in self._files() for line in file.damage()]

    def damaged(self, what: str) -> ProtopruneError:
        return ProtopruneError(f"{self.path}: damaged: {what}; the same `protoprune embed` embeds it again")

    @property
    def bytes(self) -> int:
        """Of all its feature files."""
        return sum(os.path.getsize(shard_file(self.path, part.name)) for part in self._done)

    def _file(self, number: int) -> FeatureFile:
        """The feature file of a part, from the few that are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        part = self._done[number]
        path = shard_file(self.path, part.name)
        file = FeatureFile(path)
        if file.provenance["uuid"] != part.uuid or file.n != part.rows:
            file.close()
            raise ProtopruneError(
                f"{path}: not the file that {os.path.join(self.path, SET_FILE)} names; if it was embedded again since "
                "this began, run this again, else the same `protoprune embed`"
            )
        if self._open and file.dim != self.dim:
            file.close()
            raise ProtopruneError(
                f"{path}: {file.dim} dimensions, the set has {self.dim}: its encoder was another one, with the same "
                "digest; embed into a new folder with -o"
            )
        self._open[number] = file
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].release()
        return file

    def _files(self) -> Iterator[FeatureFile]:
        return (self._file(number) for number in range(len(self._done)))

    def _classes(self) -> tuple[np.ndarray, list[str], str]:
        """(labels, classes, where from) of the whole: the classes of all shards together.

        Folders inside shards are classes only where no shard has classes of another kind, every image lies in one and
        there are two, as in a folder of images.
        """
        if self._labels is None:
            self._labels = _joined([
                (file.labels, file.classes, file.provenance["labels_from"]) for file in self._files()
            ])  # fmt: skip
        return self._labels


def _joined(parts: list[tuple[np.ndarray, list[str], str]]) -> tuple[np.ndarray, list[str], str]:
    """The same of the whole; `parts` are the labels of shards, their classes, and where these come from."""
    kinds = {source for _, classes, source in parts if classes}
    others = kinds - {FOLDERS}
    if others:
        parts = _without_folders(parts, others)
    names = sorted_classes({name for _, classes, _ in parts for name in classes})
    index = {name: number for number, name in enumerate(names)}
    labels = np.concatenate([np.array([*map(index.get, classes), -1], np.int32)[own] for own, classes, _ in parts])
    if kinds == {FOLDERS} and (len(names) < 2 or (labels < 0).any()):
        warn_of_stray(int((labels < 0).sum()), len(labels), len(names), "in no folder of their shards")
        labels, names = np.full(len(labels), -1, np.int32), []
    return labels, names, " and ".join(sorted(others or kinds)) if names else ""


def _without_folders(
    parts: list[tuple[np.ndarray, list[str], str]], others: set[str]
) -> list[tuple[np.ndarray, list[str], str]]:
    """The same where folders are no classes, since other shards have classes of another kind; says so."""
    if images := sum(len(own) for own, classes, source in parts if classes and source == FOLDERS):
        some = many(images, "image has", "images have")
        warn(f"{some} no class: other shards have theirs from {' and '.join(sorted(others))}, and folders go without")
    return [(np.full_like(one[0], -1), [], "") if one[2] == FOLDERS else one for one in parts]


class _Rows:
    """The features of a set as an array that is read in slices, or row by row."""

    def __init__(self, owner: FeatureSet, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._owner, self.shape, self.dtype = owner, shape, dtype
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Index) -> np.ndarray:
        if isinstance(key, slice) and (key.step or 1) == 1:
            start, stop, _ = key.indices(len(self))
            return self._span(start, max(start, stop))
        rows = row_numbers(key, len(self))
        return self._at(rows.reshape(-1)).reshape(*rows.shape, self.shape[1])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _span(self, start: int, stop: int) -> np.ndarray:
        out, filled = np.empty((stop - start, self.shape[1]), self.dtype), 0
        for number, low, high in self._owner._within(start, stop):
            with self._owner._lock:
                out[filled : filled + high - low] = self._owner._file(number).features[low:high]
            filled += high - low
        return out

    def _at(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        where = np.searchsorted(self._owner._starts, rows, side="right") - 1
        for number in np.unique(where):
            here = np.flatnonzero(where == number)
            with self._owner._lock:
                out[here] = self._owner._file(int(number)).features[rows[here] - self._owner._starts[number]]
        return out
