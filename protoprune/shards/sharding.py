"""Shards x encoder -> feature set: one idempotent function for a shard, and the loop around it.

A shard in, a feature file out, and the file that is there is the checkpoint: of a shard that is done nothing is left to
do, one that was killed half way goes on, and any number of processes may work on one set as long as each takes its own
shards. A shard that cannot be used is a status, never the end of the job.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np

from protoprune import files, stores
from protoprune.arguments import checked
from protoprune.embedding.ahead import Begun, Halves
from protoprune.embedding.earlier import LossError
from protoprune.embedding.engine import Encoder, Engine
from protoprune.embedding.pipeline import in_halves, own_threads
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features import featurefile as feature_file
from protoprune.features import remoteset
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import Part, check_folder, shard_file
from protoprune.features.hdf5 import partial_path
from protoprune.images.decode import Status
from protoprune.images.listing import FOLDERS, SET_FILE
from protoprune.shards import launch, on_ray, setstate
from protoprune.sources import Shard, ShardError, ShardImages, ShardOptions, Source, open_shard
from protoprune.sources.finding import splits_among
from protoprune.sources.remote import local_copy
from protoprune.units import many
from protoprune.unpacking import TooMuchError


class _Settings(TypedDict):
    """What an `Engine` is told but for encoder and device."""

    precision: str
    batch_size: int | None
    workers: int | None
    store: str
    compile: bool


@dataclass
class ShardReport:
    """What became of one shard."""

    name: str
    state: str  # embedded, unchanged, kept (its source is gone, its features are not), busy (elsewhere) or failed
    rows: int = 0
    uuid: str = ""  # of its feature file
    embedded: int = 0  # images that went through the encoder or failed on the way, in this run
    failed_now: int = 0  # those of them that failed
    compared: int = 0  # images whose content was compared with what had been embedded
    other: int = 0  # those of them that had other content
    transparent: int = 0  # of a shard embedded in this run: images with transparent parts
    status: str = ""  # why it failed
    reason: str = ""
    failures: Counter[str] = field(default_factory=Counter)  # status label -> images
    skipped: Counter[str] = field(default_factory=Counter)  # suffix -> members that are no images
    left_out: int = 0  # those of them that belong to none; known of an unchanged shard too
    duplicates: int = 0  # members that named an image a second time
    links: int = 0  # images that are links in a tar, of a shard embedded in this run
    classes: int = 0  # of a shard embedded in this run: those of its images
    classes_from: str = ""  # where they are from


@dataclass
class SetReport:
    """What a run did; every shard is in exactly one of the states."""

    out: str
    shards: int
    states: Counter[str] = field(default_factory=Counter)
    n: int = 0  # images in the set
    embedded: int = 0
    failed_now: int = 0
    compared: int = 0  # images whose content was compared with what had been embedded
    other: int = 0  # those of them that had other content
    transparent: int = 0  # images with transparent parts, in shards embedded in this run
    failed_shards: list[tuple[str, str, str]] = field(default_factory=list)  # (name, status, reason)
    failures: Counter[str] = field(default_factory=Counter)  # status label -> images, of all n
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: int = 0  # members of shards that are no images and belong to none
    duplicates: int = 0
    links: int = 0
    classes_from: set[str] = field(default_factory=set)  # of shards embedded in this run; folders are told afterwards
    device: str = ""
    precision: str = ""
    finished: bool = False  # whether all shards of the set are done, by whomever

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


Run = Callable[[Sequence[Shard]], Iterator[ShardReport | launch.Lost[Shard]]]  # by whichever launcher


@checked
def embed_shards(
    source: Source,
    encoder: Encoder,
    out: str | os.PathLike[str] = "features",
    *,
    options: ShardOptions | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    store: str = "float16",
    compile: bool = False,
    overwrite: bool = False,
    moved: bool = False,
    devices: Sequence[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    ray: bool = False,
    address: str | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_shard: Callable[[ShardReport], None] | None = None,
) -> SetReport:
    """Embed the shards of `source` into the feature set `out`, a folder; only what is not there already.

    With `world_size` W, process `rank` takes every W-th shard; each may run on a machine of its own with `out` on a
    file system that all of them see. `on_start` is called with the number of shards and of those left, `on_shard` after
    each shard.

    Shards below another root, and shards that were copied or restored, have their images compared with what was
    embedded, unless `moved`: see `embedding.embed`.

    With `devices` ('cuda:0', 'cuda:1', …; 'cpu' as often as processes are wanted) a worker process on each takes shard
    after shard instead; a worker that dies is started again.

    With `ray`, actors of a Ray cluster do: the one whose head is at `address` (see `on_ray.connected`), each on a GPU
    or on `workers` CPUs (one). `out` and the shards must be on storage that all machines reach under the same name.

    Raises UsageError for options that do not fit, ProtopruneError when `out` holds features of another encoder, of
    another source or with other options, or would lose most of its shards (unless `overwrite`).
    """
    _check_spread(device, devices, rank, world_size, ray, address)
    options = options or ShardOptions()
    options.check(shard.name for shard in source.shards)
    out = stores.given(out).rstrip("/") or "/"
    check_folder(out)
    settings: _Settings = {"precision": precision, "batch_size": batch_size, "workers": workers, "store": store,
                           "compile": compile}  # fmt: skip
    with contextlib.ExitStack() as stack:
        if ray:
            out = out if stores.is_url(out) else os.path.abspath(out)  # other machines, other working folders
            need = _need_of_ray(encoder, device, settings, stack.enter_context(on_ray.connected(address)))
            device = "cpu"  # of the driver, which embeds nothing
        engine = Engine(encoder, devices[0] if devices else device, **settings)
        settings["precision"] = engine.precision
        dropped = setstate.prepare(source, engine.provenance, options, out, overwrite, moved)
        _warn_of_shards(source, dropped, out)
        mine = source.shards[rank::world_size]
        report = SetReport(out, len(source), device=str(engine.device), precision=engine.precision)
        start = functools.partial(_start, encoder, settings, source.root, options, out, moved)
        worker = _Worker(engine, source.root, options, out, moved)
        run: Run = functools.partial(_run_here, worker)
        if ray:
            report.device = f"{need.device} of Ray"
            run = functools.partial(on_ray.run, _Worker.embed, start, need=need)
        elif devices:
            run = functools.partial(launch.run, _Worker.embed, start, devices=devices)
        seen: dict[str, tuple[str, int]] = {}
        for one in _reports(mine, worker.wanted, out, run, on_start):
            if one.state == "embedded" and not (report.states["embedded"] or one.classes):
                _warn_of_no_classes(options, one.name)  # of the first one, and not after hours
            _count(report, one)
            seen[one.name] = one.uuid, one.rows
            if on_shard:
                on_shard(one)
    _sum_up(report, setstate.finish(out, seen))
    return report


def _warn_of_shards(source: Source, dropped: Sequence[Part], out: str) -> None:
    """Say what of an earlier set is not in this one, and that the shards seem to be of several splits."""
    if dropped:
        rows = many(sum(part.rows for part in dropped), "image")
        some = many(len(dropped), f"shard of {out} is", f"shards of {out} are")
        warn(f"{some} not among those given now: {rows} fewer in it (first: {dropped[0].name})")
    if len(splits := splits_among(shard.name for shard in source.shards)) > 1:
        warn(
            f"the shards look like those of several splits ({', '.join(splits)}), and one set is made of all of them; "
            "to choose from one of them, name its shards with a pattern in quotes"
        )


def _warn_of_no_classes(options: ShardOptions, where: str) -> None:
    """Say that what was asked for about classes was found in no image."""
    for option, value in (("--label-column", options.label_column), ("--class-level", options.class_level)):
        if value is not None:
            warn(f"{option} {value}: gives no image of {where} a class; leave it out, or look at what lies in them")


def _sum_up(report: SetReport, parts: list[Part]) -> None:
    """What is there of the set, by whomever."""
    report.finished = not any(part.pending for part in parts)
    report.n = sum(part.rows for part in parts if part.done)
    report.failed_shards = [(part.name, *part.failed) for part in parts if part.failed]


def _check_spread(
    device: str, devices: Sequence[str] | None, rank: int, world_size: int, ray: bool, address: str | None
) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank}: expected 0 to {world_size - 1}, below --world-size {world_size}")
    if ray and (devices or world_size > 1):
        raise UsageError("--engine ray spreads the shards itself: no --devices, --rank or --world-size with it")
    if address and not ray:
        raise UsageError("--address goes with --engine ray")
    if devices and device != "auto":
        raise UsageError(f"--device {device}: --devices says where to compute; leave one of them out")


def _need_of_ray(encoder: Encoder, device: str, settings: _Settings, alone: bool) -> on_ray.Need:
    """What a worker takes of its machine; the settings are filled in with what follows from it."""
    need = on_ray.need(device, settings["workers"], alone)
    settings["workers"] = need.cpus
    if need.gpus and settings["precision"] == "auto" and not encoder.fp32_only:
        settings["precision"] = "bf16" if on_ray.gpu_has_bf16() else "fp16"
    return need


def _reports(
    shards: Sequence[Shard],
    wanted: setstate.Wanted,
    out: str,
    run: Run,
    on_start: Callable[[int, int], None] | None,
) -> Iterator[ShardReport]:
    """A report of every shard, by whichever launcher; those that another process had in hand are looked at again.

    What is done already is found out here: a run that has nothing to do starts no process.
    """
    left, notes = [], remoteset.notes(out) if stores.is_url(out) else None
    for shard in shards:
        before = setstate.done(shard_file(out, shard.name), shard, wanted, notes=notes)
        if before is None:
            left.append(shard)
        else:
            yield _as_it_was(shard, before)
    if on_start:
        on_start(len(shards), len(left))
    for again in (True, False):
        busy = []
        for one in run(left) if left else ():
            if isinstance(one, launch.Lost):
                error = ShardError(Status.UNREADABLE, one.reason)
                yield _failed(shard_file(out, one.task.name), one.task, error)
            elif one.state == "busy" and again:
                busy.append(one.name)
            else:
                yield one
        left = [shard for shard in left if shard.name in set(busy)]


def _as_it_was(shard: Shard, found: setstate.Finished, state: str = "unchanged") -> ShardReport:
    return ShardReport(shard.name, state, found.rows, found.uuid, failures=found.failures, left_out=found.left_out)


@dataclass
class _Worker:
    """What a process needs for every shard of a set; the encoder is made ready once."""

    engine: Engine
    root: str
    options: ShardOptions
    out: str
    moved: bool
    _ahead: tuple[Shard, Begun[ShardReport]] | None = None

    @property
    def wanted(self) -> setstate.Wanted:
        return setstate.Wanted(self.root, self.options, self.engine.provenance)

    def embed(self, shard: Shard, ahead: Shard | None) -> ShardReport:
        """Embed a shard while the next one is fetched, opened and begun to be decoded, so that the device goes from
        one to the other without a pause."""
        begun = self._ahead[1] if self._ahead and self._ahead[0] == shard else None
        if begun is None:
            self.close()
            begun = self._begin(shard)
        self._ahead = shard, begun
        begun.wait()
        self._ahead = (ahead, self._begin(ahead)) if ahead is not None else None
        return begun.result()

    def _begin(self, shard: Shard) -> Begun[ShardReport]:
        return Begun(_embedded(shard, self))

    def close(self) -> None:
        """Give up what was begun and is not wanted any more."""
        if self._ahead is not None:
            self._ahead[1].drop()
            self._ahead = None


def _start(
    encoder: Encoder, settings: _Settings, root: str, options: ShardOptions, out: str, moved: bool, device: str
) -> _Worker:
    """A worker in its own process. Raises ProtopruneError on a machine where the set or the shards cannot be seen."""
    for path, what in ((os.path.join(out, SET_FILE), "the feature set"), (root, "the shards")):
        if "://" not in path and not os.path.exists(path):
            raise ProtopruneError(
                f"{path} is not there, so {what} cannot be reached; use storage that all machines share under one "
                "name, or a URL"
            )
    return _Worker(Engine(encoder, device, **settings), root, options, out, moved)


def _run_here(worker: _Worker, tasks: Sequence[Shard]) -> Iterator[ShardReport]:
    with own_threads(), contextlib.closing(worker):
        for shard, ahead in zip(tasks, [*tasks[1:], None], strict=True):
            yield worker.embed(shard, ahead)


def _embedded(shard: Shard, worker: _Worker) -> Halves[ShardReport]:
    """Embed one shard into its feature file in the set, unless it is there; what fails is a status.

    Yields when the shard is open and its first images are being decoded, see `ahead`. Raises ProtopruneError for what
    would fail for every other shard too (the disk is full, the encoder overflows).
    """
    path, wanted, options = shard_file(worker.out, shard.name), worker.wanted, worker.options
    before = setstate.done(path, shard, wanted)
    if before is not None:
        return _as_it_was(shard, before)
    if shard.size < 0 and (kept := setstate.done(path, shard, wanted, source_gone=True)):
        return replace(
            _as_it_was(shard, kept, "kept"), reason=f", or cannot be read ({shard.trouble})" if shard.trouble else ""
        )
    with _place(path) as place:
        replaces = False
        if place != path and (replaces := stores.size(path) is not None):
            found = _without_note(path, place, shard, wanted)
            if found is not None:
                return _as_it_was(shard, found)
        try:
            _check_there(shard)
            with local_copy(shard) as local, open_shard(shard, local, options, worker.root) as images:
                images.provenance = _made_of(shard, options)
                useless, changed = _what_is_there(place, shard, wanted.key)
                result = yield from in_halves(
                    worker.engine, images, place, overwrite=useless, changed=changed, moved=worker.moved
                )
                report = ShardReport(
                    shard.name, "embedded", result.n, result.uuid, result.embedded, result.failed_now,
                    result.compared, result.other, result.transparent,
                    failures=result.failures, skipped=images.skipped, left_out=len(images.left_out),
                    duplicates=images.duplicates, classes=len(images.classes), classes_from=images.labels_from,
                    links=images.links,
                )  # fmt: skip
        except files.BusyError:
            return ShardReport(shard.name, "busy")
        except LossError as error:
            return _failed(path, shard, ShardError(Status.UNREADABLE, str(error)))
        except ProtopruneError as error:
            raise type(error)(f"{shard.name}: {error}") from None
        except ShardError as error:
            return _failed(path, shard, error)
        if place != path:
            try:
                remoteset.deliver(place, path, setstate.facts_of(place), new=not replaces)
            except FileExistsError:  # somebody else was faster
                return ShardReport(shard.name, "busy")
    if place == path:
        setstate.forget_failure(path)
    return report


def _check_there(shard: Shard) -> None:
    """Raise ShardError for a shard that is not there, or of which its store says nothing."""
    if shard.size < 0 and shard.trouble:
        raise ShardError(Status.UNREADABLE, shard.trouble)
    if shard.size < 0:
        raise ShardError(Status.MISSING, "no such file")


def _made_of(shard: Shard, options: ShardOptions) -> dict[str, str | int]:
    """What the feature file of a shard says of where it comes from."""
    return {
        "shard": shard.name, "shard_size": shard.size, "shard_version": shard.version,
        "shard_options": options.as_text(), "embedded_by": f"process {os.getpid()} on {os.uname().nodename}",
    }  # fmt: skip


def _failed(path: str, shard: Shard, error: ShardError) -> ShardReport:
    """Of a shard that cannot be used, which is noted beside its feature file `path`."""
    setstate.note_failure(path, shard, error)
    return ShardReport(shard.name, "failed", status=error.status.label, reason=error.reason)


@contextlib.contextmanager
def _place(path: str) -> Iterator[str]:
    """Where a shard's features are written: in their place, or on this machine first where that is on a store."""
    if stores.is_url(path):
        with files.temporary_folder() as folder:
            yield os.path.join(folder, "features.h5")
        return
    files.make_folder(os.path.dirname(path))
    yield path


def _without_note(path: str, place: str, shard: Shard, wanted: setstate.Wanted) -> setstate.Finished | None:
    """A file on the store that has no note, or that of another file (its writer was killed, or two replaced it at the
    same time), if it is what is wanted; the note is made up for."""
    if remoteset.note(path) is not None:  # it is known not to be
        return None
    seen = stores.seen(path)
    stores.get(path, place)
    found = setstate.done(place, shard, wanted)
    if found is None:
        os.unlink(place)
    else:
        remoteset.write_note(path, setstate.facts_of(place), seen)
    return found


@contextlib.contextmanager
def opened(shard: Shard, root: str, options: ShardOptions) -> Iterator[ShardImages]:
    """The images of a shard that goes into a feature file of its own; ProtopruneError where it cannot be used.

    Its folders are classes when those of a folder of images would be (see `images.folder_labels`).
    """
    options.check([shard.name])
    try:
        _check_there(shard)
        with local_copy(shard) as local, open_shard(shard, local, options, root) as images:
            if images.labels_from == FOLDERS and (len(images.classes) < 2 or (images.labels < 0).any()):
                images.labels, images.classes, images.labels_from = np.full(len(images), -1, np.int32), [], ""
            images.provenance = {"shard_options": options.as_text()}
            if not images.classes:
                _warn_of_no_classes(options, shard.name)
            yield images
    except ShardError as error:
        raise ProtopruneError(f"{shard.name}: {error.status.label}: {error.reason}") from None
    except TooMuchError as error:
        raise ProtopruneError(f"{shard.name}: {error}") from None


def _what_is_there(path: str, shard: Shard, key: dict[str, str]) -> tuple[bool, bool]:
    """Whether a feature file that is there is damaged (but for single rows) or of another kind, or an unfinished one
    is; and whether it is of another version of the shard. What is wanted of the whole set was settled when it was
    prepared."""
    facts, started = _said(path), _said(partial_path(path))
    useless = any(one is not None and feature_file.key_differences(one, key) for one in (facts, started))
    return useless, facts is not None and (facts["shard_size"], facts["shard_version"]) != (shard.size, shard.version)


def _said(path: str) -> dict[str, Any] | None:
    """What a feature file says of itself, nothing at all where it is damaged; None where there is none."""
    if not os.path.exists(path):
        return None
    try:
        with FeatureFile(path) as file:
            if not file.damaged_parts():
                return {"shard_size": None, "shard_version": None, **file.provenance}
    except ProtopruneError:
        pass
    return {"shard_size": None, "shard_version": None}


def _count(report: SetReport, one: ShardReport) -> None:
    report.states[one.state] += 1
    report.embedded += one.embedded
    report.failed_now += one.failed_now
    report.compared += one.compared
    report.other += one.other
    report.transparent += one.transparent
    report.failures += one.failures
    report.skipped += one.skipped
    report.left_out += one.left_out
    report.duplicates += one.duplicates
    report.links += one.links
    report.classes_from |= {one.classes_from} - {"", FOLDERS}
    if one.state == "kept":
        warn(f"{one.name}: the shard is gone{one.reason}; its {one.rows:,} features are kept")
