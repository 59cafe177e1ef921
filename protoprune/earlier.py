"""What earlier runs left -> what this one has to do, and what it may replace.

A finished feature file, an unfinished one, or both: rows that still hold an image are taken over (see `current`), and a
file that has features never gives way to one that has none, or lost most of them, unless the user asks for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from protoprune import featurefile as feature_file
from protoprune import hdf5
from protoprune.crew import Crew
from protoprune.current import Known, content_digest, known_rows
from protoprune.decode import TRANSIENT, Status, crop
from protoprune.errors import ProtopruneError
from protoprune.featurefile import FeatureFile, PartialFile, partial_path
from protoprune.images import ImageList

if TYPE_CHECKING:
    from protoprune.embedding import EmbedReport, Engine


class LossError(ProtopruneError):
    """The features that are there would be lost, in whole or for the most part."""


def prepare(
    images: ImageList,
    engine: Engine,
    out: str,
    overwrite: bool,
    moved: bool,
    report: EmbedReport,
    on_compare: Callable[[int], None] | None,
) -> bool:
    """Leave a partial file for this run's rows; False when the finished file needs nothing.

    An unfinished run with the same key goes on. One that was started by --overwrite stands in for the finished file,
    which it will replace; without that, a file of other features is never touched.
    """
    started, finished, provenance = partial_path(out), out, engine.provenance
    if overwrite and os.path.exists(out):
        hdf5.check_replaceable(out, feature_file.KIND)
    with contextlib.ExitStack() as stack:
        files = {
            path: stack.enter_context(FeatureFile(path)) for path in (started, finished) if _readable(path, overwrite)
        }
        other = {path: feature_file.key_differences(file.provenance, provenance) for path, file in files.items()}
        replacing = started in files and not other[started] and bool(files[started].provenance.get("overwrite"))
        if overwrite or replacing:
            files.pop(finished, None)
            if not replacing:
                files.pop(started, None)
        elif other.get(finished):
            raise ProtopruneError(_other_features(finished, files[finished], other[finished], provenance))
        if os.path.exists(out):
            _check_findable(out, images)
        known = _known(
            images, engine, {path: file for path, file in files.items() if not other[path]}, moved, on_compare
        )
        report.compared, report.other = int(known.compared.sum()), int(known.other.sum())
        rows = dict(zip((path for path in files if not other[path]), known.rows, strict=True))
        if finished in files:
            report.moved_from = _moved_from(files[finished], images)
            _check_losses(files[finished], images, rows[finished])
            report.dropped = len(set(files[finished].paths).difference(images.paths))
            if (started not in files or other[started]) and _up_to_date(files[finished], images, engine):
                report.unchanged, report.failures = files[finished].n, files[finished].failure_counts()
                report.transparent = int(files[finished].transparent.sum())
                return False
        if other.get(started) and started in files:
            raise ProtopruneError(
                f"{started} is an unfinished run with other features ({'; '.join(other[started])}); finish that one "
                f"first, write to another file with -o, or delete {started} to give it up"
            )
        refused = started in files and files[started].finished().all()  # all done, and yet not in its place
        if started not in files or refused or not feature_file.covers(files[started], images):
            replaces = {**provenance, "overwrite": int(overwrite or replacing)}
            if finished in files and _same_features(files[finished], images, rows[finished]):
                replaces["uuid"] = files[finished].provenance["uuid"]
            sources = [files[path] for path in rows]
            feature_file.create_partial(out, images, engine.encoder.dim, replaces, sources, list(rows.values()))
    return True


def _known(
    images: ImageList,
    engine: Engine,
    files: dict[str, FeatureFile],
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

    return known_rows(images, list(files.values()), moved, read)


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


def _check_losses(file: FeatureFile, images: ImageList, known: np.ndarray) -> None:
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
    if moved_from and not file.content[usable].any():
        ways = (
            "and it has no digests of their content, to compare them by (an earlier version wrote it); if they were "
            f"only moved or copied, say so with --moved, else {ways}"
        )
    raise LossError(
        f"{file.path}: {what}: {len(usable) - stays.sum():,} of its {len(usable):,} features would be lost; {ways}"
    )


def _check_denied(file: FeatureFile, images: ImageList, lost: list[str], ways: str) -> None:
    """Refuse to take images for gone that may not be looked at: of a folder, or of files, without permission."""
    if _moved_from(file, images):
        return
    for folder, reason in images.unreadable_folders:
        below = sum(path.startswith(f"{folder}/") or folder == "." for path in lost)
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


def _readable(path: str, overwrite: bool) -> bool:
    """Whether there is a feature file; with --overwrite a damaged one counts as none."""
    if not os.path.exists(path):
        return False
    try:
        FeatureFile(path).close()
    except ProtopruneError:
        if overwrite:
            return False
        raise
    return True


def _other_features(path: str, file: FeatureFile, differences: list[str], wanted: dict[str, str]) -> str:
    ways = "write to another file with -o, or replace it with --overwrite"
    if len(differences) == 1 and file.provenance["precision"] != wanted["precision"]:
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
