"""A kept list -> new tars of what it keeps, one after the other, each whole or not there at all.

Images come from a folder, or from shards of any kind, by the ids of the list. What has an image's key goes with it (in
tars and zips all that is no image, in folders .cls, .json and .txt, of tables the other columns as .json). Inputs are
only read. The tar that is there is the checkpoint: a second run of the same list does only the rest, and the bytes do
not depend on interruptions. What this module does not know: how a shard is read (`sources`), and who trains on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protoprune import files, stores
from protoprune.arguments import checked, texts
from protoprune.bounds import check_whole
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features.current import content_digest
from protoprune.formats import archive_kind
from protoprune.images.decode import ImageError, Status
from protoprune.images.listing import image_suffixes
from protoprune.lists import read_list
from protoprune.paths import of_rows
from protoprune.sources.finding import SUFFIXES, Shard, shard_above, split_id
from protoprune.sources.keys import key_of, levels, stem_of
from protoprune.sources.reading import open_shard
from protoprune.sources.shard import ShardError, ShardImages, ShardOptions, kind_of
from protoprune.text import parse_json, with_slashes
from protoprune.unpacking import TooMuchError

PLAN = "reshard.json"
SIZE = 10_000  # images a tar
_FORMAT, _VERSION = "protoprune-reshard", 2
_BESIDE = (".cls", ".json", ".txt")  # files that go with an image of a folder
_WORD = re.compile(r"[A-Za-z_]+")
_TABLES = (".parquet", ".pq", ".arrow")
# How names make samples: as WebDataset's keys (tars); each image one, but for fields that are words (folders, zips);
# each row one.
_KEYED, _PLAIN, _ROWS = "keyed", "plain", "rows"
_File = tuple[str, bytes, bool]  # name in the tar, content, whether it is an image of the list
_Opened = tuple[ShardImages, dict[str, int], dict[str, list[str]], dict[str, list[str]]]


@dataclass
class ReshardReport:
    """What a run did."""

    out: str
    images: int = 0  # of the list
    shards: int = 0
    there: int = 0  # shards that an earlier run had made
    others: int = 0  # files that went with images, in the shards of this run
    bytes: int = 0  # of all shards
    fields: Counter[str] = field(default_factory=Counter)  # WebDataset's field -> images, in the shards of this run


@checked
def reshard(
    kept: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
    shard_size: int = SIZE,
    options: ShardOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ReshardReport:
    """Write the images of a kept list to tars `00000.tar`, … in the folder `out`, which is new or of the same list.

    `root` is the folder (or the URL) that the listed paths are relative to, that of `features` (a feature file or set,
    which also knows how its shards are read, and what row indices count), or none where the paths are absolute. A tar
    holds `shard_size` images, more where images of one key would be parted. Names are those in the folder or shard;
    in front of the file's name goes the shard's, so that keys which shards share stay apart. `on_progress(done, total)`
    is called as images are written.

    Raises UsageError for a list or a folder that will not do, ProtopruneError for an image that cannot be read now.
    """
    check_whole("--shard-size", shard_size)
    stores.refuse_url(out)
    out, name = os.fspath(out), os.fspath(kept) if isinstance(kept, (str, os.PathLike)) else "the list"
    asked = options
    root, entries, options, content = _entries(kept, name, root, features, asked)
    inputs = _Inputs(root, options, entries, content)
    shards = _cut(entries, shard_size, inputs.sample_of)
    if asked is not None:
        asked.check(name for name in inputs.shard_of.values() if name)
    report = ReshardReport(out, len(entries), len(shards))
    plan = {
        "format": _FORMAT, "format_version": _VERSION, "images": len(entries), "shards": len(shards),
        "root": stores.public(root), "shard_size": int(shard_size),
        "list": hashlib.sha256(os.fsencode("\0".join(entries))).hexdigest(),
    }  # fmt: skip
    done = 0
    with _prepared(out), files.lock(os.path.join(out, PLAN)), contextlib.closing(inputs), _given_up(out):
        _claim(out, plan)
        for number, (first, last) in enumerate(shards):
            path = os.path.join(out, f"{number:05d}.tar")
            if os.path.exists(path):
                report.there, done = report.there + 1, last
            else:
                with files.told(path), files.replacing(path, f"{path}.partial") as temporary:
                    for name, count in _write(temporary, entries[first:last], inputs):
                        report.others, done = report.others + count, done + 1
                        report.fields[name[len(key_of(name)) + 1 :].lower()] += 1
                        if on_progress:
                            on_progress(done, len(entries))
            report.bytes += os.path.getsize(path)
    return report


# --- the list ---------------------------------------------------------------------------------------------------------


def _entries(
    kept: str | os.PathLike[str] | Sequence[str],
    name: str,
    root: str | os.PathLike[str] | None,
    features: str | os.PathLike[str] | None,
    options: ShardOptions | None,
) -> tuple[str, list[str], ShardOptions, dict[str, int]]:
    """(root, paths below it, sorted, how shards are read, digests of what was embedded where that is known)."""
    listed = read_list(kept) if isinstance(kept, (str, os.PathLike)) else kept
    if not isinstance(listed, np.ndarray) or listed.dtype.kind not in "iu":
        listed = texts("kept", listed)
    if features is None:
        return (*_sorted(listed, name, root), options or ShardOptions(), {})
    from protoprune.features.current import digests_of
    from protoprune.features.opening import open_features

    with open_features(features) as file:
        if isinstance(listed, np.ndarray):
            listed = of_rows(listed, file.paths, name, "feature file")
        root, entries = _sorted(listed, name, file.provenance["root"] if root is None else root)
        return root, entries, options or ShardOptions.of(file.provenance), digests_of(file, entries)


def _sorted(
    listed: Sequence[str] | np.ndarray, name: str, root: str | os.PathLike[str] | None
) -> tuple[str, list[str]]:
    """(root, paths below it, sorted)."""
    if isinstance(listed, np.ndarray):
        raise UsageError(f"{name}: row indices do not name images; give --features, whose rows they count")
    if not listed:
        raise UsageError(f"{name}: lists no image, so that nothing would be left")
    if root is None and all(map(stores.is_url, listed)):
        root = _common_url(listed)
    if root is None:
        if not all(os.path.isabs(path) for path in listed):
            raise UsageError(f"{name}: give --root, the folder that its paths are relative to, or --features")
        root = os.path.commonpath([os.path.dirname(path) for path in listed])
    root = os.fspath(root)
    entries = sorted(_below(listed, root, name), key=os.fsencode)
    for one, other in itertools.pairwise(entries):
        if one == other:
            raise UsageError(f"{name}: {one} is listed more than once; list each image once")
    return root, entries


def _below(listed: Sequence[str], root: str, name: str) -> list[str]:
    """The paths relative to the root, as they are in feature files."""
    base = stores.without_query(root).rstrip("/") if stores.is_url(root) else os.path.abspath(root)
    base = os.path.join(base, "")
    found = []
    for path in with_slashes(listed, lambda path: os.path.exists(os.path.join(base, path))):
        whole = path if path.startswith(base) or os.path.isabs(path) else base + path
        inside = _normal(whole.removeprefix(base)) if whole.startswith(base) else ".."
        if inside.startswith(("..", "/")):
            raise UsageError(f"{name}: {path} is not below {root}; give the --root that the list was made for")
        found.append(inside)
    return found


def _common_url(listed: Sequence[str]) -> str | None:
    """The deepest folder above the shards of URLs; None where they share no server or bucket."""
    above = [posixpath.dirname(split_id(url)[0] or url).replace("://", "/", 1) for url in listed]
    kind, _, rest = posixpath.commonpath(above).partition("/")
    return f"{kind}://{rest}" if rest else None


def _normal(path: str) -> str:
    """Without ./ and the like, up to the shard: what follows is an id, which may be a URL."""
    shard, name = split_id(path)
    return f"{os.path.normpath(shard)}/{name}" if shard else os.path.normpath(path)


def _cut(entries: Sequence[str], size: int, sample_of: Callable[[str], object]) -> list[tuple[int, int]]:
    """[first, last) of each tar: `size` images, and those that are one sample with its last one."""
    shards, first = [], 0
    while first < len(entries):
        last = min(first + size, len(entries))
        while last < len(entries) and sample_of(entries[last]) == sample_of(entries[last - 1]):
            last += 1
        shards.append((first, last))
        first = last
    return shards


@contextlib.contextmanager
def _prepared(out: str) -> Iterator[None]:
    """Make the folder, or see that it is one of tars. One that was made here and stays empty goes again."""
    new = not os.path.lexists(out)
    try:
        os.makedirs(out, exist_ok=True)
        there = sorted(os.listdir(out))
    except OSError as error:
        raise UsageError(f"{out}: cannot make the folder ({error.strerror}); choose another one") from None
    if PLAN not in there and (others := _others(there)):
        raise UsageError(f"{out}: a folder that holds other things ({others[0]}); name a new one for the shards")
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # it holds tars
                os.rmdir(out)


@contextlib.contextmanager
def _given_up(out: str) -> Iterator[None]:
    """Remove the plan again where not one tar comes of it."""
    try:
        yield
    except BaseException:
        if not _others(os.listdir(out)):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(out, PLAN))
        raise


def _others(names: Iterable[str]) -> list[str]:
    return [one for one in names if not one.startswith(PLAN)]


def _claim(out: str, plan: dict[str, Any]) -> None:
    """Write the plan, or see that it is this one; one of which nothing was written (its first image could not be read,
    for a wrong root, say) gives way. Under the lock, so that no other process is about to."""
    path = os.path.join(out, PLAN)
    before: Any = None
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        before = parse_json(file.read())
    if before == plan:
        return
    if _others(os.listdir(out)):
        was = before if isinstance(before, dict) else {}
        ways = {"list": "of another list", "root": "from another root", "shard_size": "of another size"}
        how = next((said for key, said in ways.items() if was.get(key) != plan[key]), "as another version writes them")
        raise UsageError(f"{out}: holds shards {how}; name a new folder")
    files.write_file(path, (json.dumps(plan, indent=1) + "\n").encode())


# --- the images -------------------------------------------------------------------------------------------------------


class _Inputs:
    """The images of the list, from the folder or the shards below a root; one shard is open at a time."""

    def __init__(self, root: str, options: ShardOptions, entries: Sequence[str], content: Mapping[str, int]):
        self.root, self.options, self.content = root, options, content
        folders = dict.fromkeys(map(os.path.dirname, entries))
        self.shard_of = {folder: shard_above(f"{folder}/", root) or None for folder in folders}
        self.label_of = _labels([shard for shard in self.shard_of.values() if shard])
        self._stack = contextlib.ExitStack()
        self.kind_of = {shard: self._kind(shard) for shard in set(self.shard_of.values()) if shard}
        self.listed = set(entries)
        self.key_for = self._own_keys(entries)
        self._open: tuple[str, _Opened] | None = None

    def close(self) -> None:
        self._stack.close()

    def _kind(self, shard: str) -> str:
        """By content, by URL by name: in tars the names make samples, in zips only those do that cannot be mistaken."""
        head = b""
        with contextlib.suppress(OSError):
            if "://" not in self.root:
                with open(os.path.join(self.root, shard), "rb") as file:
                    head = file.read(512)
        kind = archive_kind(head) or ""
        if kind in ("a Parquet file", "an Arrow file"):
            return _ROWS
        if kind:
            return _PLAIN if kind == "a zip archive" else _KEYED
        return _PLAIN if shard.lower().endswith(".zip") else _ROWS if shard.lower().endswith(_TABLES) else _KEYED

    def samples(self, entries: Sequence[str]) -> Iterator[list[_File]]:
        """For each sample of the entries, which are sorted, its files."""
        for (shard, key), group in itertools.groupby(entries, self.sample_of):
            own = list(group)
            if shard and self.kind_of[shard] == _KEYED:
                yield self._as_they_are(shard, key, own)
            else:
                yield self._one_by_one(shard, own)

    def sample_of(self, path: str) -> tuple[str | None, str]:
        """(its shard or None, what it has in common with the other images of its sample)."""
        shard = self.shard_of[os.path.dirname(path)]
        kind = self.kind_of[shard] if shard else _PLAIN
        return shard, key_of(path) if kind == _KEYED else _split(path, kind)[0]

    def _own_keys(self, entries: Sequence[str]) -> dict[str, str]:
        """Path -> key without dots of each image that is a sample of its own; no two alike in all tars."""
        keys: dict[str, str] = {}
        taken: dict[str, tuple[str | None, str]] = {}  # key -> the sample that has it
        alone: set[str] = set()  # keys of images without a word between dots: one each
        for path in entries:
            shard, base = sample = self.sample_of(path)
            kind = self.kind_of[shard] if shard else _PLAIN
            if kind == _KEYED:
                continue
            rest = _split(path, kind)[1]
            key = self._named(shard, base)
            if taken.get(key, sample) != sample or (key in alone and rest.count(".") < 2):  # a.png beside a.jpg
                key += rest.replace(".", "_") or "_"
                while key in taken:
                    key += "_"
            taken[key], keys[path] = sample, key
            if rest.count(".") < 2:
                alone.add(key)
        return keys

    def _one_by_one(self, shard: str | None, own: list[str]) -> list[_File]:
        """The files of images that are samples of their own."""
        kind = self.kind_of[shard] if shard else _PLAIN
        samples: dict[str, dict[str, tuple[bytes, bool]]] = {}  # key -> what follows it -> (content, listed)
        for path in own:
            data = self._data(shard, path)
            base, rest = _split(path, kind)
            sample = samples.setdefault(self.key_for[path], {})
            sample[rest or f".{kind_of(data)}"] = data, True
            for name, content in self._beside(shard, path, base):
                sample.setdefault(name, (content, False))
        return [(key + rest, *one) for key, sample in samples.items() for rest, one in sample.items()]

    def _beside(self, shard: str | None, path: str, base: str) -> Iterator[tuple[str, bytes]]:
        """(what follows the key in its name, content) of each file that goes with an image; its very own ones first."""
        beside = self._beside_in(shard, path) if shard else self._beside_file(path)
        for name, data in beside:
            yield next(name[len(one) :] for one in levels(base) if name == one or name.startswith(f"{one}.")), data
        if shard and self.kind_of[shard] == _PLAIN:
            images, rows, _, of_stem = self._opened(shard)
            for other in of_stem.get(path.removesuffix(_split(path, _ROWS)[1]), ()):  # 12.mask.png of 12.png
                if other not in self.listed:
                    yield other[len(base) :], self._read_row(images, rows[other], other)

    def _beside_file(self, path: str) -> Iterator[tuple[str, bytes]]:
        for suffix in _BESIDE:
            for stem in levels(_split(path, _ROWS)[0]):
                if os.path.isfile(whole := os.path.join(self.root, stem + suffix)):
                    yield stem + suffix, _read(whole)
                    break

    def _beside_in(self, shard: str, path: str) -> list[tuple[str, bytes]]:
        try:
            found = self._opened(shard)[0].beside(path[len(shard) + 1 :])
        except ImageError as error:
            raise ProtopruneError(f"{path}: {error.status.label} beside it ({error.reason})") from None
        except TooMuchError as error:
            raise ProtopruneError(f"{shard}: what lies beside its images {error}") from None
        return [(f"{shard}/{name}", data) for name, data in found]

    def _data(self, shard: str | None, path: str) -> bytes:
        if shard is None:
            return self._as_embedded(path, _read(os.path.join(self.root, path)))
        images, rows, _, _ = self._opened(shard)
        if path not in rows:
            raise ProtopruneError(f"{path}: not in its shard any more; embed and select again")
        return self._as_embedded(path, self._read_row(images, rows[path], path))

    def _read_row(self, images: ShardImages, row: int, path: str) -> bytes:
        try:
            return images.read(row)
        except ImageError as error:
            raise ProtopruneError(f"{path}: {error.status.label} ({error.reason}); embed and select again") from None

    def _as_they_are(self, shard: str, key: str, own: list[str]) -> list[_File]:
        """The files of one key of a WebDataset tar, under their names."""
        images, rows, of_key, _ = self._opened(shard)
        found = [(path, self._data(shard, path), True) for path in own]
        also = [path for path in of_key.get(key, ()) if path not in own and _belongs(path, own)]
        found += [(path, self._read_row(images, rows[path], path), False) for path in also]
        named = [(_with_suffix(path, data), data, listed) for path, data, listed in found]
        named += [(name, data, False) for name, data in self._beside_in(shard, own[0])]
        return [(self._named(shard, name), data, listed) for name, data, listed in named]

    def _as_embedded(self, path: str, data: bytes) -> bytes:
        """The image, where it is the one that the list was chosen by: a table that was written anew has the same row
        numbers, and a file that was replaced its name."""
        if path in self.content and content_digest(data) != self.content[path]:
            raise ProtopruneError(f"{path}: is another image than the one that was embedded; embed and select again")
        return data

    def _opened(self, shard: str) -> _Opened:
        """(images, path -> row, key -> paths, stem -> paths of images that belong to the one of that stem)."""
        if self._open is None or self._open[0] != shard:
            self._stack.close()
            try:
                where = os.path.join(self.root, shard)
                if "://" in self.root:
                    from protoprune.sources.remote import fetched

                    where = stores.below(self.root, shard)
                    if (size := stores.size(where)) is None:
                        raise ShardError(Status.MISSING, "no such shard on the store")
                    where = self._stack.enter_context(fetched(Shard(shard, where, size, 0)))
                images = self._stack.enter_context(
                    open_shard(Shard(shard, where, 0, 0), where, self.options, self.root)
                )
            except ShardError as error:
                raise ProtopruneError(f"{shard}: {error.status.label}: {error.reason}") from None
            except TooMuchError as error:
                raise ProtopruneError(f"{shard}: {error}") from None
            of_key: dict[str, list[str]] = {}
            of_stem: dict[str, list[str]] = {}
            for path in images.paths:
                of_key.setdefault(key_of(path), []).append(path)
                stem, _, middle = stem_of(path).rpartition(".")
                if _WORD.fullmatch(middle):
                    of_stem.setdefault(stem, []).append(path)
            self._open = shard, (images, {path: row for row, path in enumerate(images.paths)}, of_key, of_stem)
        return self._open[1]

    def _named(self, shard: str | None, path: str) -> str:
        """The name in the tar: below the root, or in the shard, with the shard's name in front of the file's. A key
        gets no dots."""
        inside = path[len(shard) + 1 :] if shard else path
        folder, slash, last = inside.rpartition("/")
        label = f"{self.label_of[shard]}_" if shard else ""
        if shard is None or self.kind_of[shard] != _KEYED:
            last = last.replace(".", "_")
        return posixpath.normpath(f"{folder}{slash}{label}{last}")


def _labels(shards: Sequence[str]) -> dict[str, str]:
    """shard -> what goes in front of its images' names: its own name without dots and slashes, no two alike."""
    found: dict[str, str] = {}
    for shard in sorted(set(shards), key=os.fsencode):
        stem = next((shard[: -len(suffix)] for suffix in SUFFIXES if shard.lower().endswith(suffix)), shard)
        label = plain = re.sub(r"[./]+", "-", stem)
        taken, count = set(found.values()), 1
        while label in taken:
            count += 1
            label = f"{plain}-{count}"
        found[shard] = label
    return found


def _split(path: str, kind: str) -> tuple[str, str]:
    """(key, what follows it) of an image whose name was not made for WebDataset: `scan.1` and `.jpg`.

    Only of words between dots a field is made, as in `7.left.jpg`, and none of the ids of rows.
    """
    suffix = posixpath.splitext(path)[1]
    suffix = suffix if suffix.lower() in image_suffixes() else ""
    stem = path.removesuffix(suffix)
    middle = stem[len(key_of(stem)) :]
    if kind == _PLAIN and middle and all(map(_WORD.fullmatch, middle[1:].split("."))):
        return key_of(stem), middle + suffix
    return stem, suffix


def _belongs(path: str, own: Sequence[str]) -> bool:
    """Whether an image that is not listed belongs to one that is: `7.mask.png` to `7.jpg`, but not to `7.left.jpg`."""
    middle = path[len(key_of(path)) + 1 :].rpartition(".")[0]
    return bool(_WORD.fullmatch(middle)) and not any(one[len(key_of(one)) + 1 :].rpartition(".")[0] for one in own)


def _with_suffix(name: str, data: bytes) -> str:
    """The name, with a suffix for what the image is where it has none."""
    return name if "." in name.rpartition("/")[2] else f"{name}.{kind_of(data)}"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ProtopruneError(f"{path}: {error.strerror}; give the --root that the list was made for") from None


# --- a tar ------------------------------------------------------------------------------------------------------------


def _write(path: str, entries: Sequence[str], inputs: _Inputs) -> Iterator[tuple[str, int]]:
    """Write a tar, whose bytes depend on names and contents alone; yields of each listed image its name and how many
    other files went with it."""
    names: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for sample in inputs.samples(entries):
            others = sum(not listed for _, _, listed in sample)
            for name, data, listed in sample:
                if name in names:
                    raise ProtopruneError(f"{name}: two files of the list would have this name; reshard them apart")
                names.add(name)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                if listed:
                    yield name, others
                    others = 0
