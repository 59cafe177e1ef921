"""What a user calls the images -> their shards, in the order of ids, with what makes a shard "changed".

A pattern with braces names its shards, so that a missing one is known; a glob and a folder find what is there.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from protoprune.errors import ProtopruneError, UsageError
from protoprune.formats import archive_kind
from protoprune.images.decode import size_and_times
from protoprune.images.listing import describe_counts, image_suffixes, is_image_name, relative_id
from protoprune.stores import is_url, without_query
from protoprune.text import parse_json
from protoprune.units import bytes_text, many

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".parquet", ".pq", ".arrow")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_SPLIT = re.compile(r"(?<![a-z])(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval)(?![a-z])", re.I)
_LIST_ROOT = ", and for a list give --root, the folder that its paths are relative to"
_MOST = 1_000_000  # shards of one pattern: more is a slip of the keyboard


@dataclass(frozen=True)
class Shard:
    """One file that holds images."""

    name: str  # path relative to the root, POSIX: the first part of the ids of its images
    url: str  # where it is
    size: int  # bytes; -1: not there
    version: int  # changes with the content: the time of modification in ns, or a number made of the store's etag
    ctime_ns: int = -1  # of a file on this machine: what vouches for it, see `current`
    trouble: str = ""  # of one on a store, whose size is then -1: why it says nothing of it


@dataclass
class Source:
    """The shards of one run. Sorted so that the ids of all images are sorted by code point."""

    root: str
    shards: list[Shard]
    skipped: Counter[str] = field(default_factory=Counter)  # suffix -> files of a folder that are no shards by name

    def __len__(self) -> int:
        return len(self.shards)


def local_shards(spec: str) -> Source | None:
    """The shards on this machine that `spec` names, see `shards_of`."""
    if os.path.isdir(spec):
        return _folder(spec)
    if os.path.isfile(spec):
        return _local(os.path.dirname(os.path.abspath(spec)), [os.path.abspath(spec)]) if is_shard(spec) else None
    if not is_pattern(spec):
        return None
    return _pattern(spec)


def local_list(paths: list[str], root: str | os.PathLike[str] | None = None) -> Source:
    """The shards of a list on this machine, see `list_shards`."""
    if root is None:
        root = os.getcwd()
        if all(os.path.isabs(path) for path in paths):
            root = os.path.commonpath([os.path.dirname(path) for path in paths])
    root = os.path.abspath(root)
    return _local(root, [os.path.normpath(os.path.join(root, path)) for path in paths])


def looks_like_shards(paths: Iterable[str]) -> bool:
    """Whether all entries of a list are shards by their names."""
    paths = list(paths)
    return bool(paths) and all(without_query(path).lower().endswith(SUFFIXES) for path in paths)


def is_pattern(spec: str) -> bool:
    return any(mark in spec for mark in "*?[{")


def is_shard(path: str) -> bool:
    """By content: a packed file counts when its name says that it is a tar."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot read ({error.strerror})") from None
    kind = archive_kind(head)
    if kind in ("a gzip file", "a bzip2 file", "an xz file"):
        return path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tbz2", ".txz"))
    known = ("a tar archive", "a zip archive", "a Parquet file", "an Arrow file")
    return kind in known or path.lower().endswith(SUFFIXES)


def split_id(path: str) -> tuple[str, str]:
    """(shard, name in it) of an image's id, by the shard's suffix; ('', path) where no part of it has one.

    What follows a shard may be anything, a URL too.
    """
    end = path.find("/")
    while end > 0 and not path[:end].lower().endswith(SUFFIXES):
        end = path.find("/", end + 1)
    return (path[:end], path[end + 1 :]) if end > 0 else ("", path)


def shard_above(path: str, root: str) -> str:
    """The shard that an image below a root lies in: the first part of its path that is a file, by URL one that is
    called so; '' for none."""
    if is_url(root):
        return split_id(path)[0]
    end = path.find("/")
    while end > 0 and not os.path.isfile(os.path.join(root, path[:end])):
        end = path.find("/", end + 1)
    return path[: max(end, 0)]


def expand(pattern: str) -> list[str]:
    """'s/{0000..0002}.tar' -> three names; {a,b} too, nested and several. Widths are kept, as bash keeps them."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, parts, last = 0, [], start + 1
    for place in range(start, len(pattern)):
        letter = pattern[place]
        depth += (letter == "{") - (letter == "}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(pattern[last:place])
            last = place + 1
        if depth == 0:
            break
    else:
        raise UsageError(f"{pattern}: a brace is not closed; write 'shards/{{0000..0099}}.tar' in quotes")
    choices = _range(parts[0]) if len(parts) == 1 else itertools.chain.from_iterable(map(expand, parts))
    if choices is None:  # {word}: braces of a name
        inner = expand(parts[0])
        choices = [f"{{{one}}}" for one in inner]
    rest = expand(pattern[last:])
    names = [f"{pattern[:start]}{choice}{one}" for choice in choices for one in rest]
    if len(names) > _MOST:
        raise UsageError(f"{pattern}: names {len(names):,} shards, expected at most {_MOST:,}")
    return names


def _range(text: str) -> list[str] | None:
    match = _RANGE.fullmatch(text)
    if not match:
        return None
    low, high, step = match[1], match[2], int(match[3] or 1) or 1
    if abs(int(high) - int(low)) // step >= _MOST:
        raise UsageError(f"{{{text}}}: expected at most {_MOST:,} shards")
    padded = any(len(one.lstrip("-")) > 1 and one.lstrip("-").startswith("0") for one in (low, high))
    width = max(len(low), len(high)) if padded else 0
    numbers = range(int(low), int(high) + 1, step) if int(low) <= int(high) else range(int(low), int(high) - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _of_images(spec: str) -> bool:
    """Whether a pattern is meant for images: 'photos/*.jpg'."""
    return os.path.splitext(spec)[1].lower() in image_suffixes() - set(SUFFIXES)


def _pattern(spec: str) -> Source:
    above, rest = _as_written(spec)
    found: list[str] = []
    for name in expand(rest):
        path = os.path.join(glob.escape(above), name)
        found += sorted(glob.glob(path, recursive=True)) if glob.has_magic(name) else [os.path.join(above, name)]
    found = [os.path.abspath(path) for path in dict.fromkeys(found) if not os.path.isdir(path)]
    if not found:
        way_on = "patterns are for shards: give the folder of the images" if _of_images(spec) else "look at the folder"
        raise UsageError(f"{spec}: matches no file; {way_on}")
    if all(is_image_name(path) and not path.lower().endswith(SUFFIXES) for path in found):
        raise UsageError(
            f"{spec}: matches {many(len(found), 'image')}, and patterns are for shards; give the folder of the images, "
            "or a list of their names"
        )
    return _local(os.path.abspath(os.path.join(above, fixed_part(rest))), found)


def _as_written(spec: str) -> tuple[str, str]:
    """(folders whose names hold marks of patterns and are there by these very names, the rest): '[2024] photos/'."""
    parts = spec.split("/")
    for count in range(len(parts) - 1, 0, -1):
        above = "/".join(parts[:count])
        if is_pattern(above) and os.path.isdir(above):
            return above, "/".join(parts[count:])
    return "", spec


def fixed_part(pattern: str) -> str:
    """The folder above the first wildcard: the root, whichever shards are there."""
    first = min((place for mark in "*?[{" if (place := pattern.find(mark)) >= 0), default=len(pattern))
    return pattern[:first].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")


def _folder(folder: str) -> Source | None:
    names = set(os.listdir(folder)) if os.access(folder, os.R_OK | os.X_OK) else set()
    if "dataset_dict.json" in names:
        splits = sorted(one for one in names if os.path.isdir(os.path.join(folder, one)))
        raise UsageError(f"{folder}: a data set of several splits; give one of them: {', '.join(splits)}")
    if {"state.json", "dataset_info.json"} <= names:
        return _saved_to_disk(folder)
    paths: list[str] = []
    skipped: Counter[str] = Counter()
    for path in _walk(folder):
        if not path.lower().endswith(SUFFIXES) and is_image_name(path):
            return None
        paths.append(path)
    shards = pick_shards(paths, skipped)
    if not shards:
        return None
    return _local(os.path.abspath(folder), [os.path.abspath(one) for one in shards], skipped)


def pick_shards(paths: Iterable[str], skipped: Counter[str]) -> list[str]:
    """The shards among the files of a folder; the others are counted by suffix.

    A Parquet file beside a tar of the same name is the tar's metadata (img2dataset writes it), not images.
    """
    paths = sorted(paths)
    tars = {re.sub(r"\.(tar|tar\.gz|tgz)$", "", path) for path in paths if path.endswith((".tar", ".tar.gz", ".tgz"))}
    shards = []
    for path in paths:
        stem, suffix = os.path.splitext(path)
        if path.lower().endswith(SUFFIXES) and not (suffix.lower() == ".parquet" and stem in tars):
            shards.append(path)
        else:
            skipped[suffix.lower() or "(no suffix)"] += 1
    return shards


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, those of a folder before those of its folders: the first image ends the search. Links are
    followed, but not back to a folder that we are in."""
    for above, folders, files in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(above), "")
        below = {one: os.path.join(os.path.realpath(os.path.join(above, one)), "") for one in folders}
        folders[:] = sorted(one for one in folders if not one.startswith(".") and not here.startswith(below[one]))
        yield from (os.path.join(above, one) for one in files if not one.startswith("."))


def _saved_to_disk(folder: str) -> Source:
    """`Dataset.save_to_disk`: Arrow streams that state.json lists."""
    try:
        with open(os.path.join(folder, "state.json")) as file:
            names = [one["filename"] for one in parse_json(file.read())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProtopruneError(f"{folder}: its state.json cannot be read ({error}); save the data set again") from None
    root = os.path.abspath(folder)
    return _local(root, [os.path.join(root, name) for name in names])


def _local(root: str, paths: list[str], skipped: Counter[str] | None = None) -> Source:
    shards = []
    for path in paths:
        name = relative_id(path, root, "shard")
        try:
            shards.append(Shard(name, path, *size_and_times(os.stat(path))))
        except OSError:
            shards.append(Shard(name, path, -1, -1))
    if all(shard.size < 0 for shard in shards):
        none = f"none of the {len(shards):,} shards is there (first: {shards[0].url})"
        raise ProtopruneError(f"{none}; check that the disk is mounted{'' if root != os.getcwd() else _LIST_ROOT}")
    return Source(root, in_order(shards), skipped or Counter())


def in_order(shards: list[Shard]) -> list[Shard]:
    """By name with the slash that follows it in ids: the ids of all images are then in the order of code points."""
    return sorted(shards, key=lambda shard: os.fsencode(shard.name + "/"))


def splits_among(shards: Iterable[str]) -> list[str]:
    """The splits that shards are of by their names ('train-00000.parquet', 'val/0000.tar', 'set-test-000.tar')."""
    found = (_SPLIT.search(name) for name in shards)
    return sorted({match[0].lower() for match in found if match})


def describe_source(source: Source) -> str:
    """'40 shards (.tar 38, .zip 2), 1.2 GB, under /data' for a line on stderr."""
    kinds = Counter(os.path.splitext(shard.name)[1] or "(no suffix)" for shard in source.shards)
    size = sum(max(shard.size, 0) for shard in source.shards)
    return f"{many(len(source), 'shard')} ({describe_counts(kinds)}), {bytes_text(size)}, under {source.root}"
