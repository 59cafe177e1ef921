"""What earlier runs left -> what this one has to do, and what it may replace.

A finished feature file, an unfinished one, or both: rows that still hold an image are taken over (see `current`), and a
file that has features never gives way to one that has none, or lost most of them, unless the user asks for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from protoprune.errors import ProtopruneError, warn
from protoprune.features import featurefile as feature_file
from protoprune.features import hdf5
from protoprune.features.current import Known, content_digest, known_rows
from protoprune.features.featurefile import FeatureFile, PartialFile
from protoprune.features.hdf5 import partial_path
from protoprune.images.crew import Crew
from protoprune.images.decode import TRANSIENT, Status, crop
from protoprune.images.listing import ImageList
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.embedding.engine import Engine


class LossError(ProtopruneError):
    """The features that are there would be lost, in whole or for the most part."""


@dataclass
class Before:
    """What this run finds."""

    compared: int  # images whose content was compared with what had been embedded
    other: int  # those of them that had other content
    dropped: int = 0  # images of the earlier file that are gone from the list
    moved_from: str = ""  # the root that the earlier file was for, where that was another one
    up_to_date: bool = False  # whether the finished file needs nothing


@dataclass
class _Left:
    """What earlier runs left and may be taken over: an unfinished file and a finished one, where they are there."""

    started: FeatureFile | None
    finished: FeatureFile | None
    differences: list[str]  # between the features of the unfinished file and those that are wanted
    replacing: bool  # the finished file will be replaced, whatever it holds

    @property
    def alike(self) -> list[FeatureFile]:
        """Those that hold the features that are wanted."""
        return [file for file in (None if self.differences else self.started, self.finished) if file is not None]


def prepare(
    images: ImageList,
    engine: Engine,
    out: str,
    overwrite: bool,
    moved: bool,
    on_compare: Callable[[int], None] | None,
    changed: bool = False,
) -> Before:
    """Leave a partial file for this run's rows, unless the finished file needs nothing.

    `changed`: what the images lie in is another version, whose features replace those of the finished file in any case.
    """
    with contextlib.ExitStack() as stack:
        left = _left(out, engine, overwrite, changed, stack)
        started, finished = left.started, left.finished
        if os.path.exists(out):
            _check_findable(out, images)
        known = _known(images, engine, left.alike, moved, on_compare)
        before = Before(int(known.compared.sum()), int(known.other.sum()))
        rows = {file.path: mine for file, mine in zip(left.alike, known.rows, strict=True)}
        if finished is not None:
            before.moved_from = _moved_from(finished, images)
            if not changed:
                _check_losses(finished, images, rows[out], moved)
            _warn_of_other_classes(finished, images)
            before.dropped = len(set(finished.paths).difference(images.paths))
            if (started is None or left.differences) and _up_to_date(finished, images, engine):
                before.up_to_date = True
                return before
        if left.differences:
            raise ProtopruneError(_other_unfinished(partial_path(out), left.differences))
        # One that is all done, and yet not in its place, was refused there.
        if started is None or started.finished().all() or not feature_file.covers(started, images):
            replaces = {**engine.provenance, "overwrite": int(left.replacing)}
            if finished is not None and _same_features(finished, images, rows[out]):
                replaces["uuid"] = finished.provenance["uuid"]
            feature_file.create_partial(out, images, engine.encoder.dim, replaces, left.alike, known.rows)
    return before


def _left(out: str, engine: Engine, overwrite: bool, changed: bool, stack: contextlib.ExitStack) -> _Left:
    """What is at this place, of feature files alone. An unfinished run with the same key goes on. One that was started
    by --overwrite stands in for the finished file, which it will replace; without that, a file of other features is
    never touched."""
    if overwrite and os.path.exists(out):
        hdf5.check_replaceable(out, feature_file.KIND)
    started, finished = _opened(partial_path(out), overwrite, stack), _opened(out, overwrite, stack)
    differences = [] if started is None else _differences(started, engine)
    goes_on = started is not None and not differences and bool(started.provenance.get("overwrite"))
    if overwrite or goes_on:
        return _Left(started if goes_on else None, None, [], replacing=True)
    if finished is not None and (other := _differences(finished, engine)):
        raise ProtopruneError(_other_features(out, finished, other))
    return _Left(started, finished, differences, replacing=changed)


def _differences(file: FeatureFile, engine: Engine) -> list[str]:
    """Between the features of a file and those that the engine makes: an encoder of one's own may be changed, and its
    digest forgotten."""
    dims = [] if file.dim == engine.encoder.dim else [f"dimensions: {file.dim}, not {engine.encoder.dim}"]
    return feature_file.key_differences(file.provenance, engine.provenance) or dims


def _opened(path: str, overwrite: bool, stack: contextlib.ExitStack) -> FeatureFile | None:
    """The feature file, if there is one; with --overwrite a damaged one counts as none."""
    if not os.path.exists(path):
        return None
    try:
        return stack.enter_context(FeatureFile(path))
    except ProtopruneError:
        if overwrite:
            return None
        raise


def _known(
    images: ImageList,
    engine: Engine,
    files: list[FeatureFile],
    moved: bool,
    on_compare: Callable[[int], None] | None,
) -> Known:
    """What earlier files with the same key have of the images, see `current`."""

    def read(rows: np.ndarray) -> np.ndarray:
        if on_compare:
            on_compare(len(rows))
        now = np.zeros(len(images), np.uint64)

        def work(row: int) -> tuple[None, str]:
            now[row] = content_digest(images.read(row))
            return None, ""

        step = max(1, min(256, len(rows) // (4 * engine.workers)))
        with Crew(engine.workers, work) as readers:
            parts = [
                readers.start(rows[first : first + step].tolist(), lambda *_: None)
                for first in range(0, len(rows), step)
            ]
            for part in parts:
                readers.results(part)
        return now[rows]

    return known_rows(images, files, moved, read)


def _moved_from(file: FeatureFile, images: ImageList) -> str:
    return "" if file.provenance["root"] == images.root else file.provenance["root"]


def _same_features(file: FeatureFile, images: ImageList, rows: np.ndarray) -> bool:
    """Whether a finished file is rewritten only for where its images lie, or when they were touched: it keeps its id,
    and with it clusterings that are kept by it."""
    return (
        file.n == len(images)
        and np.array_equal(rows, np.arange(file.n))
        and np.array_equal(file.labels, images.labels)
        and file.classes == images.classes
        and bool(file.intact().all())
    )


def _check_findable(out: str, images: ImageList) -> None:
    """Refuse early to replace features by none: not one of the images is there (a disk away, a wrong --root)."""
    if (images.mtime_ns < 0).all() and _usable_rows(out):
        raise LossError(
            f"none of the {len(images):,} images can be found below {images.root}, so {out} stays as it is; "
            "check the list, --root and that the disk is mounted"
        )


def _check_losses(file: FeatureFile, images: ImageList, known: np.ndarray, moved: bool) -> None:
    """Refuse to lose most of the features that a finished file has, as other images or a disk that is away would, and
    any for want of a permission. `known` are its rows that hold an image of the list."""
    usable = np.flatnonzero(file.usable)
    if not len(usable):
        return
    row_of = {path: row for row, path in enumerate(images.paths)}
    paths = list(file.paths)
    rows = np.array([row_of.get(paths[row], -1) for row in usable.tolist()])
    stays = (rows >= 0) & (images.mtime_ns[rows] >= 0)
    ways = "write to another file with -o, or replace it with --overwrite"
    _check_denied(file, images, [paths[row] for row in usable[~stays].tolist()], ways)
    moved_from = _moved_from(file, images)
    if moved_from:  # there the same name may well be another image
        stays &= np.isin(usable, known)
    if 2 * stays.sum() >= len(usable):
        return
    what = f"is for images below {moved_from}, not {images.root}" if moved_from else "is for other images"
    if moved_from and moved:  # other times of modification, which --moved goes by
        ways = f"leave --moved out, and contents are compared, {ways}"
    raise LossError(
        f"{file.path}: {what}: {len(usable) - stays.sum():,} of its {len(usable):,} features would be lost; {ways}"
    )


def _warn_of_other_classes(file: FeatureFile, images: ImageList) -> None:
    """Say that classes are lost or replaced which nobody asked to: the file had them from elsewhere. Of a feature set
    that is said once, see `setstate`."""
    if "shard" in images.provenance:
        return
    before = file.provenance["labels_from"] or images.labels_from or "of a list of your own"
    if file.classes and before != images.labels_from and not images.labels_asked:
        now = f"{many(len(images.classes), 'class', 'classes')} ({images.labels_from})" if images.classes else "none"
        warn(
            f"{file.path}: had {many(len(file.classes), 'class', 'classes')} ({before}), and has {now} now; give "
            "--labels, --label-column or --class-level again in each run, or --no-labels where there are to be none"
        )


def _check_denied(file: FeatureFile, images: ImageList, lost: list[str], ways: str) -> None:
    """Refuse to take images for gone that may not be looked at: of a folder, or of files, without permission."""
    if _moved_from(file, images):
        return
    for folder, reason in images.unreadable_folders:
        below = sum(path.startswith(f"{folder}/") for path in lost)
        if below:
            raise LossError(
                f"{file.path}: folder {folder}: {reason}: its {below:,} features would be lost; make it readable, "
                f"{ways}"
            )
    listed = set(images.paths) if lost else set()
    denied = [path for path in lost if path in listed and _denied(os.path.join(images.root, path))]
    if denied:
        raise LossError(
            f"{file.path}: {len(denied):,} of its features would be lost, as their images may not be read (permission "
            f"denied, first: {denied[0]}); make them readable, {ways}"
        )


def _denied(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def check_result(out: str, partial: PartialFile) -> None:
    """Refuse to put a run's result in the place of a file that has features, when it has none or lost most of them.

    What was computed stays in the unfinished file, for the next run, when there is any.
    """
    counts = partial.status_counts()
    before, now = _usable_rows(out), counts.pop(Status.OK.label, 0)
    if not before or (now and (2 * now >= before or partial.overwrite)):
        return
    if not now:
        partial.discard()
    why = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(3))
    raise LossError(
        f"{f'only {now:,}' if now else 'none'} of the {partial.n:,} images could be used ({why}), so {out} with its "
        f"{before:,} features stays as it is; check the list and that the disk is mounted"
        + (", or replace it with --overwrite" if now else "")
    )


def _usable_rows(path: str) -> int:
    """How many features a file has; 0 when it is missing or damaged."""
    try:
        with FeatureFile(path) as file:
            return int(file.usable.sum())
    except ProtopruneError:
        return 0


def _other_unfinished(path: str, differences: list[str]) -> str:
    return (
        f"{path} is an unfinished run with other features ({'; '.join(differences)}); finish that one first, write to "
        f"another file with -o, or delete {path} to give it up"
    )


def _other_features(path: str, file: FeatureFile, differences: list[str]) -> str:
    ways = "write to another file with -o, or replace it with --overwrite"
    if len(differences) == 1 and differences[0].startswith("precision: "):
        ways = f"go on with --precision {file.provenance['precision']}, {ways}"
    return f"{path} holds other features ({'; '.join(differences)}); {ways}"


def _up_to_date(file: FeatureFile, images: ImageList, engine: Engine) -> bool:
    """Whether the finished file is what a run would make: the same images, no row damaged, and what failed for want of
    something (a permission, memory, another program) still fails."""
    if not feature_file.covers(file, images) or not file.intact().all():
        return False
    again = np.flatnonzero(np.isin(file.status, TRANSIENT))
    if not len(again):
        return True

    def work(row: int) -> tuple[None, str]:
        crop(images.read(row), engine.encoder.preprocess)
        return None, ""

    with Crew(min(len(again), engine.workers), work) as decoders:
        parts = [decoders.start([row], lambda *_: None) for row in again.tolist()]
        now = [decoders.results(part)[0][0] for part in parts]
    return now == file.status[again].tolist()
