"""Folders and file lists -> sorted image paths with size, mtime and class labels.

The id of an image is its path relative to the root, POSIX, sorted by its bytes, which in UTF-8 is by code point; row i
is the same image in every array of the program. Names that are not valid UTF-8 are carried as Python carries them
(surrogateescape), so any name that Linux allows survives. This module knows nothing about pixels: see `decode`.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune import formats, stores
from protoprune.arguments import checked, texts
from protoprune.bounds import is_whole, shown
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.images.decode import ImageError, open_at_once, read_file, size_and_times
from protoprune.text import with_slashes
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.images.labels import LabelFile

    # Where classes come from, see `list_folder`.
    Labels = bool | str | os.PathLike[str] | LabelFile | Mapping[str, str | int]

FOLDERS = "folders in the shards"  # where classes of shards come from
SET_FILE = "set.json"  # what makes a folder a feature set
_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval|unlabell?ed)([\d._-].*)?", re.I)
_DEEPEST = 2048  # folders in a path of Linux's 4,096 bytes

_Entry = tuple[str, int, int, int]  # path, size, mtime_ns, ctime_ns


@dataclass
class ImageList:
    """The images of one run, in the order of every array that follows."""

    root: str
    paths: Sequence[str]  # relative to root, POSIX, sorted by their bytes, unique
    size: np.ndarray  # (n,) int64, bytes; -1 where the file cannot be examined
    mtime_ns: np.ndarray  # (n,) int64; -1 where the file cannot be examined
    labels: np.ndarray  # (n,) int32 index into classes, -1 where there is none
    classes: list[str]
    labels_from: str = ""  # where the classes come from, in words; empty without classes
    labels_asked: bool = False  # whether the caller said where they come from, or that there are none
    skipped: Counter[str] = field(default_factory=Counter)  # suffix -> files that are not images by their name
    unreadable_folders: list[tuple[str, str]] = field(default_factory=list)  # (folder, reason)
    duplicates: int = 0  # list entries that named an image a second time

    provenance: dict[str, Any] = field(default_factory=dict)  # more attributes for the feature file made of them
    left_out: list[str] = field(default_factory=list)  # the files that `skipped` counts; of a shard see `ShardImages`
    why: list[str] | None = None  # a reason for each of them, where it is known already
    ctime_ns: np.ndarray | None = None  # (n,) int64, of the last change of content, name or rights; -1: not known

    def __repr__(self) -> str:
        """In a line: a notebook shows what a cell ends in, and these may be millions of names."""
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        return f"ImageList({len(self.paths):,} images{classes} below {self.root!r})"

    def __post_init__(self) -> None:
        """Raise UsageError where a column has not a value an image: one that was forgotten when a list was cut."""
        for name in ("size", "mtime_ns", "labels", "ctime_ns"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.paths):
                raise UsageError(f"images: {len(self.paths):,} paths, but {len(column):,} values of {name}")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        """The encoded image of a row, if it is still the one that was listed. Raises `decode.ImageError`."""
        return read_file(os.path.join(self.root, self.paths[row]), int(self.size[row]), int(self.mtime_ns[row]))


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file suffixes of every format that the installed Pillow can read."""
    from PIL import Image

    formats.register()
    suffixes = Image.registered_extensions()
    # MPO (stereo JPEG) has no opener of its own: Pillow's JPEG opener recognises it.
    readable = (set(Image.OPEN) | {"MPO"}) - formats.STUBS
    return frozenset(suffix for suffix, name in suffixes.items() if name in readable)


@checked
def list_folder(
    root: str | os.PathLike[str],
    *,
    labels: Labels = True,
    class_level: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ImageList:
    """Every image below `root`, recursively.

    Classes are the first-level folders, where the tree has that shape (see `folder_labels`); with `class_level` N the
    folders of level N (2 for `train/<class>/…`); with `labels` a file those that it lists (see `labels.LabelFile`),
    a mapping those of its paths; with `labels=False` there are none.

    Hidden files and folders are skipped, links are followed, and a link to one of its own parents is not entered
    again. A file without a suffix counts as an image when it begins like one, or cannot be read. What is left out for
    its name is counted in `skipped` and listed in `left_out`, folders that cannot be listed are in
    `unreadable_folders`.

    Raises UsageError when `root` is not a folder and ProtopruneError when it holds no image.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise UsageError(
            f"{root}: {'not a folder' if os.path.exists(root) else 'no such folder'}; give an image folder"
        )
    check_labels(labels, class_level)
    left_out: list[str] = []
    unreadable: list[tuple[str, str]] = []
    found: list[_Entry] = []
    for entry in _walk(root, left_out, unreadable):
        found.append(entry)
        if on_progress and len(found) % 10_000 == 0:
            on_progress(len(found))
    skipped = Counter(os.path.splitext(path)[1].lower() or "(no suffix)" for path in left_out)
    if not found:
        raise ProtopruneError(_nothing_found(root, skipped, unreadable))
    found.sort(key=lambda entry: os.fsencode(entry[0]))
    images = _build(root, found, labels, class_level)
    images.skipped, images.left_out = skipped, sorted(left_out, key=os.fsencode)
    images.unreadable_folders = unreadable
    return images


@checked
def list_paths(
    entries: Iterable[str],
    root: str | os.PathLike[str] | None = None,
    *,
    labels: Labels = True,
    class_level: int | None = None,
) -> ImageList:
    """The images named by `entries`, absolute or relative to `root`, whatever their suffix.

    Without `root` it is the current folder, or, when all entries are absolute, their deepest common folder. An entry
    that does not exist is kept: it becomes a row with a failed status, never a silent loss. `labels` and `class_level`
    are those of `list_folder`, with levels counted from the root.

    Raises UsageError for an entry outside `root` or that no file can be called, and for a `root` below which nothing
    of the list is, while all of it is below the current folder; ProtopruneError for an empty list.
    """
    entries = [entry for entry in texts("entries", entries) if entry]
    if not entries:
        raise ProtopruneError("the list of images is empty; give one path a line")
    check_labels(labels, class_level)
    chosen = root is not None
    root = _common_root(entries) if root is None else os.fspath(root)
    _check_root(root, chosen)
    entries = with_slashes(entries, lambda entry: os.path.lexists(os.path.join(root, possible_name(entry))))
    ids = [relative_id(possible_name(entry), root) for entry in entries]
    unique = sorted(set(ids), key=os.fsencode)
    found = [(path, *_size_and_times(os.path.join(root, path))) for path in unique]
    if chosen and all(mtime < 0 for _, _, mtime, _ in found) and all(map(os.path.isfile, unique)):
        raise UsageError(
            f"--root {root}: none of the {len(unique):,} listed images is below it, and all are where the current "
            f"folder is the root (first: {unique[0]}); leave --root out"
        )
    images = _build(root, found, labels, class_level)
    images.duplicates = len(ids) - len(unique)
    if not chosen and labels is True and class_level is None:
        _doubt_common_root(images)
    return images


def _check_root(root: str, chosen: bool) -> None:
    if not os.path.isdir(root):
        what = f"--root {root}: no such folder" if chosen else f"{root}: no such folder, where all listed images lie"
        raise UsageError(what)


def is_feature_set(path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or what is at a URL, holds features (see `featureset`) and not images."""
    path = stores.given(path)
    if stores.is_url(path):
        return stores.size(f"{path}/{SET_FILE}") is not None
    return os.path.isfile(os.path.join(path, SET_FILE))


def _build(root: str, found: list[_Entry], labels: Labels, class_level: int | None) -> ImageList:
    paths = [path for path, *_ in found]
    root = os.path.abspath(root)
    label, classes, source = image_labels(root, paths, labels, class_level)
    return ImageList(
        root=root,
        paths=paths,
        size=np.array([size for _, size, _, _ in found], np.int64),
        mtime_ns=np.array([mtime for _, _, mtime, _ in found], np.int64),
        ctime_ns=np.array([ctime for _, _, _, ctime in found], np.int64),
        labels=label,
        classes=classes,
        labels_from=source,
        labels_asked=labels is not True or class_level is not None,
    )


def image_labels(
    root: str, paths: list[str], labels: Labels, class_level: int | None
) -> tuple[np.ndarray, list[str], str]:
    """(label of each image, classes, where they come from); `labels` and `class_level` are those of `list_folder`."""
    check_labels(labels, class_level)
    if labels is False:
        return np.full(len(paths), -1, np.int32), [], ""
    if isinstance(labels, Mapping):
        from protoprune.images.labels import given_labels

        return given_labels(labels, paths, root)
    if labels is not True:
        from protoprune.images.labels import LabelFile, read_labels

        return read_labels(labels if isinstance(labels, LabelFile) else LabelFile(labels), paths, root)
    label, classes = folder_labels(paths, class_level)
    if class_level is None:
        _doubt_first_level(root, paths, classes)
        return label, classes, "first-level folders" if classes else ""
    if not classes:
        raise UsageError(f"--class-level {class_level}: no image of {root} lies that deep; count folders from there")
    if len(without := np.flatnonzero(label < 0)):
        nowhere = f"in no folder of level {class_level} and"
        some = many(len(without), f"image lies {nowhere} gets", f"images lie {nowhere} get")
        warn(f"{some} no class (first: {paths[int(without[0])]})")
    return label, classes, f"folders of level {class_level}"


def _doubt_first_level(root: str, paths: Sequence[str], classes: list[str]) -> None:
    """Warn where the first-level folders, which are the classes, look like splits or are what img2dataset numbers, or
    some images keep them from it."""
    splits = [name for name in classes if _SPLIT.fullmatch(name)]
    if len(splits) >= 2 and 2 * len(splits) >= len(classes):
        warn(
            f"the classes are the first-level folders {', '.join(classes[:6])}, which look like splits; embed one "
            "of them, or give --class-level 2 for the folders inside them, --labels FILE or --no-labels"
        )
    if classes and os.path.isfile(os.path.join(root, f"{classes[0]}_stats.json")):
        warn(
            f"the classes are the first-level folders {', '.join(classes[:6])}, which are parts that img2dataset "
            "numbered; give --no-labels or --labels FILE"
        )
    if not classes:
        stray = [path for path in paths if "/" not in path]
        folders = {path.partition("/")[0] for path in paths if "/" in path}
        first = f"in no folder (first: {stray[0]})" if stray else ""
        warn_of_stray(len(stray), len(paths), len(folders), first)


def check_labels(labels: Labels, class_level: int | None) -> None:
    """Raise UsageError for arguments of `list_folder` that will not do, whatever the images."""
    if class_level is not None and labels is not True:
        raise UsageError(
            f"--class-level {class_level}: goes with classes from folders, not with --labels or --no-labels"
        )
    if class_level is not None and not is_whole(class_level, 1, _DEEPEST):
        raise UsageError(
            f"--class-level {class_level}: expected at least 1, the first-level folders, and at most {_DEEPEST}"
        )
    if not isinstance(labels, (bool, Mapping)):
        from protoprune.images.labels import LabelFile, check_there

        if not isinstance(labels, (str, os.PathLike, LabelFile)):
            raise UsageError(f"labels {shown(labels)}: expected a file of them, a dict of path and class, or False")
        check_there(labels if isinstance(labels, LabelFile) else LabelFile(labels))


def warn_of_stray(stray: int, images: int, folders: int, where: str) -> None:
    """Say what keeps folders from being classes, where most images lie in two of them or more."""
    if stray and folders >= 2 and 2 * stray <= images:
        of = f"of {images:,} images"
        warn(
            f"no classes, since {many(stray, f'{of} lies', f'{of} lie')} {where}; move what does not belong there, or "
            "give --class-level 1, which takes the folders all the same, or --no-labels"
        )


def _doubt_common_root(images: ImageList) -> None:
    """Warn when the common folder of an absolute list is hardly what the classes lie in: several disks or sets."""
    folders = images.classes
    if folders and (os.path.dirname(images.root) == images.root or all(path.count("/") > 1 for path in images.paths)):
        warn(
            f"the classes are the folders {', '.join(folders[:6])} below {images.root}, the common folder of the list; "
            "if they are disks or data sets, give --root, --class-level N, --labels FILE or --no-labels"
        )


def folder_labels(paths: Sequence[str], level: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Class labels from folders: (n,) int32 and the class names, sorted as torchvision's ImageFolder does.

    Without `level` classes are the first-level folders of a tree of that shape: every image lies in a folder and there
    are at least two first-level folders; otherwise every label is -1 and there are no classes. With `level` N they are
    the folders of level N, 1 the first, whatever lies above them; images that lie less deep have label -1.
    """
    check_labels(True, level)
    place = (level or 1) - 1
    parts = [path.split("/", place + 1) for path in paths]
    folder = [part[place] if len(part) > place + 1 else None for part in parts]
    names = sorted({name for name in folder if name is not None})
    if level is None and (len(names) < 2 or None in folder):
        return np.full(len(paths), -1, np.int32), []
    index: dict[str | None, int] = {None: -1, **{name: i for i, name in enumerate(names)}}
    return np.array([index[name] for name in folder], np.int32), names


def _walk(root: str, left_out: list[str], unreadable: list[tuple[str, str]]) -> Iterator[_Entry]:
    """Yield (id, size, mtime_ns, ctime_ns) of the images below root, in no particular order, depth first."""
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        folder, ancestors = stack.pop()
        try:
            here = os.stat(os.path.join(root, folder))
            identity = (here.st_dev, here.st_ino)
            if identity in ancestors:  # a link back to a folder that we are in
                continue
            with os.scandir(os.path.join(root, folder)) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            unreadable.append((folder or ".", error.strerror or str(error)))
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                stack.append((path, ancestors | {identity}))
            elif is_image_name(entry.path):
                yield (path, *_size_and_times(entry.path))
            else:
                left_out.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def is_image_name(path: str) -> bool:
    """By the suffix of a file; of one without a suffix by how it begins."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix:  # and not the content: backups and half downloads (x.jpg_original, x.jpg.part) begin like images too
        return suffix in image_suffixes()
    if not os.path.isfile(path):
        return False
    try:  # content-addressed stores have names without a suffix
        return formats.is_image(_head(path), lambda: open(path, "rb", opener=open_at_once))
    except OSError:  # unless it is read nobody knows: it becomes a row with a status
        return True


def _head(path: str) -> bytes:
    with open(path, "rb", buffering=0, opener=open_at_once) as file:
        return file.read(formats.HEAD)


def why_left_out(images: ImageList) -> Iterator[tuple[str, str]]:
    """(path, reason) of each file of a folder that is no image by its name, with what its content says."""
    if images.why is not None:
        yield from zip(images.left_out, images.why, strict=True)
        return

    def head(path: str) -> bytes | None:
        return _head(path) if os.path.isfile(path) else None

    for path in images.left_out:
        yield (
            path,
            why_no_image(path, partial(head, os.path.join(images.root, path)), ", or name it in a list of paths"),
        )


def why_no_image(name: str, head: Callable[[], bytes | None], or_else: str = "") -> str:
    """Why a file is none by its name, and what its first bytes say; `head` gives None for what is no regular file."""
    suffix = os.path.splitext(name)[1]
    why = f"no image has the suffix {suffix}" if suffix else "it has no suffix"
    if any(part.startswith(".") for part in name.split("/")) and suffix.lower() in image_suffixes():
        return "hidden: its name, or that of a folder above it, begins with a dot"
    try:
        data = head()
    except (OSError, ImageError) as error:
        return f"{why}; it cannot be read ({getattr(error, 'strerror', '') or error})"
    if data is None:
        return f"{why}, and it is no regular file"
    found = formats.begins_like(data)
    if found and found[1]:
        return f"{why}, but it begins like a {found[0]} file: rename it{or_else}"
    return why if suffix else f"{why} and begins like no image"


def stat_files(root: str, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(size, mtime_ns), each (n,) int64, of files below root; -1 where a file cannot be examined."""
    found = np.array([_size_and_times(os.path.join(root, path)) for path in paths], np.int64).reshape(-1, 3)
    return found[:, 0], found[:, 1]


def _size_and_times(path: str) -> tuple[int, int, int]:
    """Size, mtime and ctime of a regular file; -1 each where it cannot be examined."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    return size_and_times(status) if stat.S_ISREG(status.st_mode) else (-1, -1, -1)


def _common_root(entries: list[str]) -> str:
    """The current folder as soon as one entry is relative to it, wherever in the list that one is."""
    if not all(os.path.isabs(entry) for entry in entries):
        return os.getcwd()
    return os.path.commonpath([os.path.dirname(entry) for entry in entries])


def possible_name(entry: str) -> str:
    """The entry itself; a NUL or a lone surrogate (from a JSON list) would break the feature file's block of names."""
    try:
        if b"\0" not in os.fsencode(entry):
            return entry
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{entry!r}: no file can have this name; give a list that holds file names")


def relative_id(entry: str, root: str, what: str = "image") -> str:
    """Entry as an id; a lexical operation, so that links inside the root stay the names that the user gave them."""
    path = os.path.normpath(os.path.relpath(entry, os.path.abspath(root)) if os.path.isabs(entry) else entry)
    if path == ".." or path.startswith("../"):
        raise UsageError(f"{entry}: outside the root {root}; give --root a folder that holds every {what}")
    return path


def _nothing_found(root: str, skipped: Counter[str], unreadable: list[tuple[str, str]]) -> str:
    detail = ""
    if skipped:
        detail = f" ({sum(skipped.values())} other files: {describe_counts(skipped)})"
    if unreadable:
        detail += f" ({len(unreadable)} unreadable folders, first: {unreadable[0][0]}: {unreadable[0][1]})"
    ways = formats.advice(skipped) or "give a folder that holds images, or a list of paths"
    return f"{root}: no images found{detail}; {ways}"


def describe_counts(counts: Counter[str], most: int = 5) -> str:
    """'.txt 10, .json 2 and 3 more kinds': the largest counts first, ties by name."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name} {count:,}" for name, count in ordered[:most])
    return text + (f" and {len(ordered) - most} more kinds" if len(ordered) > most else "")
