"""Labelled training examples in memory: pixels of an image folder, or vectors of a feature file.

Row i of every array is the same example, sorted by path. Pixels are decoded once, in threads, to uint8 squares; a data
set that is larger than memory lives in a memory-mapped file. What this module does not know: models, and which of the
examples a training run uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from protoprune import files
from protoprune.arguments import checked, texts
from protoprune.bounds import shown
from protoprune.clustering.vectors import check_finite
from protoprune.device import cores
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features.featurefile import IMPORTED, KEY, key_differences
from protoprune.features.opening import missing, open_features
from protoprune.images.crew import Crew
from protoprune.images.decode import Preprocess, Status, load, silence_libtiff
from protoprune.images.listing import ImageList, is_feature_set, list_folder
from protoprune.memory import free_memory
from protoprune.npy import load_npz
from protoprune.units import bytes_text, many

if TYPE_CHECKING:
    from protoprune.images.listing import Labels
    from protoprune.pruning.ranking import Source

Progress = Callable[[int, int], None]  # (done, total)
_MEMORY_SHARE = 0.5  # of the free memory may hold pixels; more asks for a cache file
_READ_ROWS = 65_536  # features that are read at once
_BLOCK = 512  # images that one decoding task takes
_ROUNDING = ("precision", "store")  # of the key of features: differences in the last digits, which a model survives


@dataclass
class Examples:
    """n labelled examples."""

    root: str
    paths: list[str]
    labels: np.ndarray  # (n,) int64 index into classes
    classes: list[str]
    inputs: torch.Tensor  # uint8 (n, 3, s, s) pixels or float32 (n, d) vectors
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of images left out
    unlabelled: int = 0  # images left out because no class folder holds them
    made_by: dict[str, Any] = field(
        default_factory=dict[str, Any]
    )  # of vectors: encoder, weights, preprocessing, ... (`features.KEY`)
    every_path: Sequence[str] = ()  # of the source, left out ones too, in its order: what row indices of a list count

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.inputs.shape[1:]))
        return (
            f"Examples({len(self):,} of {len(self.classes):,} classes, {shape} {self.inputs.dtype}, of {self.root!r})"
        )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def vectors(self) -> bool:
        """Whether the inputs are vectors, not pixels."""
        return self.inputs.ndim == 2

    def fingerprint(self) -> str:
        """sha256 of paths, labels, classes and inputs: two sets with the same one train the same."""
        digest = hashlib.sha256("\0".join([*self.classes, "", *self.paths]).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes())
        for start in range(0, len(self), 4096):
            digest.update(self.inputs[start : start + 4096].contiguous().numpy().tobytes())
        return digest.hexdigest()


@checked
def load_examples(
    source: str | os.PathLike[str] | Source,
    image_size: int = 32,
    *,
    classes: Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    decode: bool = True,
    labels: Labels = True,
    class_level: int | None = None,
    on_progress: Progress | None = None,
) -> Examples:
    """The labelled examples of an image folder (pixels) or of a feature file (vectors), by its name or open.

    `classes` fixes the numbering of the classes, for a test set that must agree with its training set. Images without
    a class and images that cannot be read are left out and counted. `cache` is a file for pixels that do not fit into
    memory. Without `decode` images are only listed, and the pixels have size 0. `labels` and `class_level` say where
    the classes of an image folder come from (see `images.list_folder`). `on_progress(done, total)` is called as images
    are decoded.

    Raises ProtopruneError when there are no classes, a class is not among `classes`, or memory would not do.
    """
    classes = None if classes is None else texts("classes", classes, "names")
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "provenance"):
            raise UsageError(f"source {shown(source)}: expected an image folder or a feature file")
        return _load_features(source, classes)
    source = os.fspath(source)
    if os.path.isdir(source) and not is_feature_set(source):
        images = list_folder(source, labels=labels, class_level=class_level)
        return _load_images(images, source, image_size, classes, cache, decode, on_progress)
    if not os.path.exists(source):
        raise missing(source)
    if labels is not True or class_level is not None:
        raise UsageError(
            f"{source}: a feature file has its classes; give --labels or --class-level to `protoprune embed`"
        )
    with open_features(source) as file:
        return _load_features(file, classes)


def warn_of_shared(train: Examples, test: Examples) -> None:
    """Warn when the very vectors or pixels of test images are those of training images, under whatever names: what is
    right on them says nothing about new images."""
    shared = _shared(train, test)
    if shared:
        whole = "the training set itself" if len(shared) == len(test) == len(train) else "training images too"
        warn(
            f"{len(shared):,} of the {len(test):,} test images are {whole} (first: {test.paths[min(shared)]}); what is "
            "right on them says nothing about new images"
        )


def _shared(train: Examples, test: Examples) -> set[int]:
    """The rows of the test images that are training images; where nothing was decoded, by what they are called."""
    own, other = (np.asarray(one.inputs.flatten(1)) for one in (train, test))
    if own.shape[1:] != other.shape[1:]:
        return set()
    if not own.shape[1]:
        known = set(train.paths) if os.path.realpath(train.root) == os.path.realpath(test.root) else set()
        return {row for row, path in enumerate(test.paths) if path in known}
    some = np.unique(np.linspace(0, own.shape[1] - 1, 32).round().astype(int))  # a look at all of a large set is dear
    looks: dict[bytes, list[int]] = {}
    for row, part in enumerate(np.ascontiguousarray(other[:, some])):
        looks.setdefault(part.tobytes(), []).append(row)
    shared: set[int] = set()
    for row, part in enumerate(np.ascontiguousarray(own[:, some])):
        rows = looks.get(part.tobytes(), ())
        shared.update(one for one in rows if other[one].any() and np.array_equal(own[row], other[one]))
    return shared


def check_same_inputs(train: Examples, test: Examples) -> list[str]:
    """Raise UsageError unless both sets have inputs that one model can take; returns what differs in rounding only.

    A model trained on the vectors of one encoder finds only noise in those of another, even where the lengths agree:
    encoder, its weights, pooling and preprocessing must be the same. Vectors computed or stored in another precision
    differ in their last digits, and are only told of. Of imported vectors all that is known is what their encoder is
    called; the digest in the place of its weights is that of the vectors.
    """
    differences = _made_differently(train.made_by, test.made_by)
    if found := [text for name, texts in differences.items() if name not in _ROUNDING for text in texts]:
        imported = train.made_by.get("precision") == test.made_by.get("precision") == IMPORTED
        remedy = "embed both with the same encoder"
        remedy = "if one encoder made both, import both with its name (--encoder)" if imported else remedy
        raise UsageError(
            f"the test features were not made as the training features were ({'; '.join(found)}); {remedy}"
        )
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        sizes = ["x".join(map(str, one.inputs.shape[1:])) for one in (train, test)]
        raise UsageError(f"the inputs of the training set are {sizes[0]} and those of the test set {sizes[1]}")
    return [text for name in _ROUNDING for text in differences.get(name, [])]


def _made_differently(train: dict[str, Any], test: dict[str, Any]) -> dict[str, list[str]]:
    """How features differ in what they were made by, a setting; nothing where that is not known of one of them."""
    if not train or not test:
        return {}
    differences = {name: key_differences({**train, name: test.get(name)}, train) for name in {**train, **test}}
    if differences.get("encoder"):  # the others are its own
        return {"encoder": differences["encoder"]}
    if train.get("precision") == test.get("precision") == IMPORTED:
        differences.pop("weights_sha256", None)
    return differences


def subset(examples: Examples, rows: np.ndarray) -> Examples:
    """The examples of these rows alone, as a set of its own."""
    rows = np.sort(np.asarray(rows))
    return Examples(
        examples.root, [examples.paths[row] for row in rows], examples.labels[rows], examples.classes,
        examples.inputs[torch.from_numpy(rows)], made_by=examples.made_by, every_path=examples.every_path,
    )  # fmt: skip


def _load_features(file: Source, classes: Sequence[str] | None) -> Examples:
    labels, usable, own, paths = file.labels, file.usable, file.classes, list(file.paths)
    if not usable.any():
        raise ProtopruneError(f"{file.path}: none of its {len(paths):,} images could be read; see `protoprune info`")
    rows = np.flatnonzero(usable & (labels >= 0))
    _require_classes(file.path, own, len(rows), paths, classes, "give --labels FILE to `protoprune embed`")
    vectors, own_paths = torch.empty(len(rows), file.dim), [paths[row] for row in rows]
    for start in range(0, len(rows), _READ_ROWS):  # a second copy of all of them would be the peak
        some = rows[start : start + _READ_ROWS]
        block = file.features[some[0] : some[-1] + 1][some - some[0]]
        vectors[start : start + len(some)] = torch.from_numpy(block.astype(np.float32))
    check_finite(file.path, vectors.numpy(), own_paths)
    unreadable = [(path, reason) for path, _, reason in file.failures()]
    return Examples(
        file.provenance["root"], own_paths, _renumber(file.path, labels[rows], own, classes),
        list(classes or own), vectors, unreadable, int((usable & (labels < 0)).sum()),
        {name: file.provenance.get(name) for name in KEY}, paths,
    )  # fmt: skip


def _load_images(
    images: ImageList,
    root: str,
    size: int,
    classes: Sequence[str] | None,
    cache: str | os.PathLike[str] | None,
    decode: bool,
    on_progress: Progress | None,
) -> Examples:
    if size < 8:
        raise UsageError(f"--image-size {size}: expected at least 8")
    labelled = np.flatnonzero(images.labels >= 0)
    remedy = "give --labels FILE" if classes is None else "give --test-labels FILE"
    _require_classes(root, images.classes, len(labelled), images.paths, classes, remedy)
    labels = _renumber(root, images.labels[labelled], images.classes, classes)
    if decode:
        pixels, failed = _pixels(images, labelled, size, cache, on_progress)
    else:
        pixels, failed = torch.empty(len(labelled), 3, 0, 0, dtype=torch.uint8), {}
    kept = np.array([row not in failed for row in range(len(labelled))], bool)
    if not kept.any():
        raise ProtopruneError(f"{root}: none of its {len(labelled):,} labelled images can be read")
    paths = [images.paths[row] for row in labelled.tolist()]
    return Examples(
        images.root, [path for path, good in zip(paths, kept, strict=True) if good], labels[kept],
        list(classes or images.classes), pixels, [(paths[row], reason) for row, reason in sorted(failed.items())],
        len(images) - len(labelled), every_path=images.paths,
    )  # fmt: skip


def _require_classes(
    source: str, own: Sequence[str], labelled: int, paths: Sequence[str], known: Sequence[str] | None, remedy: str
) -> None:
    """Raise ProtopruneError without labelled images of two classes; of one where the classes are `known`, of a test."""
    if not labelled or (known is None and len(own) < 2):
        stray = next((path for path in paths if "/" not in path), None)
        who = "training" if known is None else "a test set"
        raise ProtopruneError(
            f"{source}: {who} needs labels, and no two classes were found; put the images of each class into a "
            f"first-level folder of its own{f' (not so: {stray})' if stray else ''}, or {remedy}"
        )


def _renumber(source: str, labels: np.ndarray, own: Sequence[str], classes: Sequence[str] | None) -> np.ndarray:
    """Labels by the numbering of `classes`, (n,) int64."""
    if classes is None:
        return labels.astype(np.int64)
    index = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in own if name not in index]
    if unknown:
        raise ProtopruneError(
            f"{source}: {many(len(unknown), 'of its classes is', 'of its classes are')} not in the training set "
            f"(first: {unknown[0]}); "
            "both need classes of the same names, from folders or --labels and --test-labels"
        )
    return np.array([index[name] for name in own], np.int64)[labels]


def _pixels(
    images: ImageList, rows: np.ndarray, size: int, cache: str | os.PathLike[str] | None, on_progress: Progress | None
) -> tuple[torch.Tensor, dict[int, str]]:
    """uint8 (n - failed, 3, s, s) of the listed rows that can be read, and position -> reason of the others."""
    preprocess = Preprocess(size, size if size <= 64 else round(size / 0.875), "bicubic")
    shape = (len(rows), 3, size, size)
    if cache is None:
        _check_memory(shape)
        array = np.zeros(shape, np.uint8)
        failed = _decode_all(images, rows, preprocess, array, on_progress)
        return torch.from_numpy(_compact(array, failed)), failed
    cache = os.fspath(cache)
    key = _cache_key(images, rows, preprocess)
    found = _cached(cache, key, shape)
    if found is None:
        with files.lock(cache):
            try:
                found = _fill_cache(cache, key, shape, partial(_decode_all, images, rows, preprocess), on_progress)
            except OSError as error:
                raise ProtopruneError(f"{cache}: cannot write ({error.strerror or error}); make room") from None
    return found


def _fill_cache(
    cache: str,
    key: str,
    shape: tuple[int, ...],
    decode: Callable[[np.ndarray, Progress | None], dict[int, str]],
    on_progress: Progress | None,
) -> tuple[torch.Tensor, dict[int, str]]:
    """Decode into the cache file. Its side file, which says what it holds, goes first and comes back last."""
    partial_path, side = f"{cache}.partial", f"{cache}.failed.npz"
    try:  # on a full disk a memory-mapped file ends the process, so ask for the space now
        files.reserve(partial_path, "wb", math.prod(shape))
        array = np.lib.format.open_memmap(partial_path, "w+", np.uint8, shape)
        files.reserve(partial_path, "r+b", os.path.getsize(partial_path))  # numpy has cut the file
        failed = decode(array, on_progress)
    except BaseException:  # a later run begins anew
        with contextlib.suppress(OSError):
            os.unlink(partial_path)
        raise
    pixels = _compact(array, failed)
    array.flush()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(side)
    os.replace(partial_path, cache)
    with files.replacing(side) as temporary, open(temporary, "wb") as file:
        np.savez(file, key=key, rows=list(failed), reasons=[*failed.values(), ""], digest=_digest(pixels))
    return torch.from_numpy(pixels), failed


def _compact(array: np.ndarray, failed: dict[int, str]) -> np.ndarray:
    """The rows that did not fail, moved together in place: a copy would not fit into memory."""
    good = np.setdiff1d(np.arange(len(array)), list(failed))
    for start in range(min(failed, default=len(good)), len(good), _BLOCK):
        rows = good[start : start + _BLOCK]
        array[start : start + len(rows)] = array[rows]
    return array[: len(good)]


def _decode_all(
    images: ImageList, rows: np.ndarray, preprocess: Preprocess, array: np.ndarray, on_progress: Progress | None
) -> dict[int, str]:
    silence_libtiff()
    failed: dict[int, str] = {}
    block = max(1, min(_BLOCK, len(rows) // (4 * cores())))  # small sets too keep all cores busy

    def work(row: int) -> tuple[np.ndarray, str]:
        path = os.path.join(images.root, images.paths[row])
        return load(path, int(images.size[row]), int(images.mtime_ns[row]), preprocess), ""

    def take(first: int, place: int, pixels: np.ndarray | None) -> None:
        if pixels is not None:
            array[first + place] = pixels.transpose(2, 0, 1)

    threads, starts = torch.get_num_threads(), range(0, len(rows), block)
    try:
        with Crew(cores(), work, partial(torch.set_num_threads, 1)) as crew:
            parts = [crew.start(rows[first : first + block].tolist(), partial(take, first)) for first in starts]
            for first, part in zip(starts, parts, strict=True):
                for position, (status, reason) in enumerate(crew.results(part), first):
                    if status != Status.OK:
                        failed[position] = f"{status.label}: {reason}"
                if on_progress:
                    on_progress(min(first + block, len(rows)), len(rows))
    finally:
        torch.set_num_threads(threads)  # what a thread sets is set for the training too
    return failed


def _check_memory(shape: tuple[int, ...]) -> None:
    need = int(np.prod(shape, dtype=np.int64))
    free = free_memory()
    if free is not None and need > _MEMORY_SHARE * free:  # where it is not known the allocation itself will tell
        raise ProtopruneError(
            f"{shape[0]:,} images of {shape[2]} x {shape[3]} pixels take {bytes_text(need)} and "
            f"{bytes_text(free)} are free; give --pixels FILE on a fast disk, or a smaller --image-size"
        )


def _cache_key(images: ImageList, rows: np.ndarray, preprocess: Preprocess) -> str:
    digest = hashlib.sha256(repr(preprocess.describe()).encode())
    digest.update("\0".join(images.paths).encode("utf-8", "surrogateescape"))
    digest.update(os.fsencode(images.root))  # another tree may have the same names, sizes and times
    for array in (images.size, images.mtime_ns, *([] if images.ctime_ns is None else [images.ctime_ns]), rows):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _cached(cache: str, key: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, str]] | None:
    """What an earlier run left in the cache file, if it is for exactly these images."""
    try:
        side = load_npz(f"{cache}.failed.npz")
    except FileNotFoundError:
        return None
    except Exception:
        side = {}
    try:
        if str(side["key"]) != key:
            return None
        failed = dict(zip(side["rows"].astype(int).tolist(), side["reasons"].tolist()[:-1], strict=True))
        array = np.load(cache, mmap_mode="c")  # copy on write: torch wants memory that it might write to
        good = array[: shape[0] - len(failed)]
        if array.shape == shape and array.dtype == np.uint8 and _digest(good) == str(side["digest"]):
            return torch.from_numpy(good), failed
    except Exception:  # numpy raises whatever it stumbles over; decoding again is always right
        pass
    warn(f"{cache}: damaged; the images are decoded again")
    return None


def _digest(pixels: np.ndarray) -> str:
    """xxh3-64 of pixels, read in pieces: they may not fit into memory."""
    state = xxhash.xxh3_64()
    for start in range(0, len(pixels), _BLOCK):
        state.update(np.ascontiguousarray(pixels[start : start + _BLOCK]).reshape(-1).data)
    return state.hexdigest()
