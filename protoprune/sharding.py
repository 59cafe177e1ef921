"""Shards x encoder -> feature set: one idempotent function for a shard, and the loop around it.

A shard in, a feature file out, and the file that is there is the checkpoint: `embed_shard` of a shard that is done
returns at once, one that was killed half way goes on, and any number of processes may work on one set as long as each
takes its own shards. A shard that cannot be used is a status, never the end of the job.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from protoprune import features as feature_file
from protoprune import files, launch
from protoprune.current import content_digest
from protoprune.decode import TRANSIENT, ImageError, Status
from protoprune.earlier import LossError
from protoprune.embedding import Engine, embed_with
from protoprune.encoders import Encoder
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features import FeatureFile
from protoprune.featureset import Part, read_plan, shard_file, write_plan
from protoprune.images import SET_FILE, is_feature_set
from protoprune.sources import Shard, ShardError, ShardImages, ShardOptions, Source, open_shard
from protoprune.sources.reading import FOLDERS
from protoprune.text import parse_json

_LOCK_SECONDS = 60


@dataclass
class ShardReport:
    """What became of one shard."""

    name: str
    state: str  # embedded, unchanged, kept (its source is gone, its features are not), busy (elsewhere) or failed
    rows: int = 0
    uuid: str = ""  # of its feature file
    embedded: int = 0  # images that went through the encoder in this run
    transparent: int = 0  # of a shard embedded in this run: images with transparent parts
    status: str = ""  # why it failed
    reason: str = ""
    failures: Counter = field(default_factory=Counter)  # status label -> images
    skipped: Counter = field(default_factory=Counter)  # suffix -> members that are no images
    duplicates: int = 0  # members that named an image a second time


@dataclass
class SetReport:
    """What a run did; every shard is in exactly one of the states."""

    out: str
    shards: int
    states: Counter = field(default_factory=Counter)
    n: int = 0  # images in the set
    embedded: int = 0
    transparent: int = 0  # images with transparent parts, in shards embedded in this run
    failed_shards: list[tuple[str, str, str]] = field(default_factory=list)  # (name, status, reason)
    failures: Counter = field(default_factory=Counter)  # status label -> images, of all n
    skipped: Counter = field(default_factory=Counter)
    duplicates: int = 0
    device: str = ""
    precision: str = ""
    finished: bool = False  # whether all shards of the set are done, by whomever

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


def embed_shards(
    source: Source,
    encoder: Encoder,
    out: str | os.PathLike = "features",
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
    on_shard: Callable[[ShardReport], None] | None = None,
) -> SetReport:
    """Embed the shards of `source` into the feature set `out`, a folder; only what is not there already.

    With `world_size` W, process `rank` takes every W-th shard; each may run on a machine of its own with `out` on a
    file system that all of them see. `on_shard` is called after each shard.

    Shards below another root, and shards that were copied or restored, have their images compared with what was
    embedded, unless `moved`: see `embedding.embed`.

    With `devices` ('cuda:0', 'cuda:1', …; 'cpu' as often as processes are wanted) a worker process on each takes shard
    after shard instead; a worker that dies is started again.

    Raises UsageError for options that do not fit, ProtopruneError when `out` holds features of another encoder, of
    another source or with other options, or would lose most of its shards (unless `overwrite`).
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank}: expected 0 to {world_size - 1}, below --world-size {world_size}")
    options = options or ShardOptions()
    engine = Engine(encoder, devices[0] if devices else device, precision, batch_size, workers, store, compile)
    out = os.fspath(out).rstrip("/") or "/"
    prepare(source, engine.provenance, options, out, overwrite, moved)
    report = SetReport(out, len(source), device=str(engine.device), precision=engine.precision)
    mine = source.shards[rank::world_size]
    if devices:
        settings = {"precision": engine.precision, "batch_size": batch_size, "store": store, "compile": compile}
        start = functools.partial(
            _start_worker, encoder, settings | {"workers": workers}, source.root, options, out, moved
        )
        reports = _by_workers(mine, source.root, options, engine, out, start, devices)
    else:
        reports = (embed_shard(shard, source.root, options, engine, out, moved) for shard in mine)
    uuids = {}
    for one in reports:
        _count(report, one)
        uuids[one.name] = one.uuid
        if on_shard:
            on_shard(one)
    _finish(out, report, uuids)
    return report


def _by_workers(
    shards: Sequence[Shard], root: str, options, engine: Engine, out: str, start, devices
) -> Iterator[ShardReport]:
    """What is done already is found out here: a run that has nothing to do starts no process."""
    left = []
    for shard in shards:
        before = _done(shard_file(out, shard.name), shard, root, options, engine.provenance)
        if before is None:
            left.append(shard)
        else:
            yield ShardReport(shard.name, "unchanged", before.rows, before.uuid, failures=before.failures)
    yield from launch.run(_work, start, left, devices)


def _start_worker(
    encoder: Encoder, settings: dict, root: str, options: ShardOptions, out: str, moved: bool, device: str
):
    """What a worker needs for every shard; the encoder is made ready once."""
    return functools.partial(
        embed_shard, root=root, options=options, engine=Engine(encoder, device, **settings), out=out, moved=moved
    )


def _work(state, shard: Shard) -> ShardReport:
    return state(shard)


def embed_shard(
    shard: Shard, root: str, options: ShardOptions, engine: Engine, out: str, moved: bool = False
) -> ShardReport:
    """Embed one shard into its feature file in the set `out`, unless it is there; what fails is a status.

    Raises ProtopruneError for what would fail for every other shard too (the disk is full, the encoder overflows).
    """
    path = shard_file(out, shard.name)
    before = _done(path, shard, root, options, engine.provenance)
    if before is not None:
        return ShardReport(shard.name, "unchanged", before.rows, before.uuid, failures=before.failures)
    if shard.size < 0 and (kept := _done(path, shard, root, options, engine.provenance, source_gone=True)):
        return ShardReport(shard.name, "kept", kept.rows, kept.uuid, failures=kept.failures)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise ProtopruneError(f"{os.path.dirname(path)}: cannot make the folder ({error.strerror})") from None
    try:
        if shard.size < 0:
            raise ShardError(Status.MISSING, "no such file")
        with _local_copy(shard) as local, open_shard(shard, local, options, root) as images:
            images.provenance = {
                "shard": shard.name, "shard_size": shard.size, "shard_version": shard.version,
                "shard_options": json.dumps(asdict(options), sort_keys=True),
                "embedded_by": f"process {os.getpid()} on {os.uname().nodename}",
            }  # fmt: skip
            result = embed_with(engine, images, path, overwrite=_replaces(path, shard, engine.provenance), moved=moved)
            skipped, duplicates = images.skipped, images.duplicates
    except files.BusyError:
        return ShardReport(shard.name, "busy")
    except LossError as error:
        lost = ShardError(Status.UNREADABLE, str(error))
        _note_failure(path, shard, lost)
        return ShardReport(shard.name, "failed", status=lost.status.label, reason=lost.reason)
    except ProtopruneError as error:
        raise type(error)(f"{shard.name}: {error}") from None
    except ShardError as error:
        _note_failure(path, shard, error)
        return ShardReport(shard.name, "failed", status=error.status.label, reason=error.reason)
    with contextlib.suppress(OSError):
        os.unlink(_failure_file(path))
    return ShardReport(
        shard.name, "embedded", result.n, _uuid(path), result.embedded, result.transparent,
        failures=result.failures, skipped=skipped, duplicates=duplicates,
    )  # fmt: skip


@contextlib.contextmanager
def opened(shard: Shard, root: str, options: ShardOptions) -> Iterator[ShardImages]:
    """The images of a shard that goes into a feature file of its own; ProtopruneError where it cannot be used.

    Its folders are classes when those of a folder of images would be (see `images.folder_labels`).
    """
    try:
        if shard.size < 0:
            raise ShardError(Status.MISSING, "no such file")
        with _local_copy(shard) as local, open_shard(shard, local, options, root) as images:
            if images.labels_from == FOLDERS and (len(images.classes) < 2 or (images.labels < 0).any()):
                images.labels, images.classes, images.labels_from = np.full(len(images), -1, np.int32), [], ""
            yield images
    except ShardError as error:
        raise ProtopruneError(f"{shard.name}: {error.status.label}: {error.reason}") from None


# --- the plan: set.json -----------------------------------------------------------------------------------------------


def prepare(source: Source, key: dict, options: ShardOptions, out: str, overwrite: bool, moved: bool = False) -> None:
    """Leave a set.json for exactly this source, key and options, which keeps what is done already."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"-o {out}: a file; shards go to a folder of feature files, such as -o features")
    try:
        os.makedirs(out, exist_ok=True)
        foreign = not is_feature_set(out) and [one for one in os.listdir(out) if not one.startswith(SET_FILE)]
    except OSError as error:
        raise ProtopruneError(f"-o {out}: cannot make the folder ({error.strerror})") from None
    if foreign:
        raise UsageError(f"-o {out}: a folder that holds other things ({foreign[0]}); name a new one for the features")
    wanted = {"key": key, "root": source.root, "options": asdict(options)}
    with _locked(out):
        before: dict[str, Part] = {}
        if is_feature_set(out):
            plan, parts = _read(out, overwrite)
            if plan is not None:
                _check(out, plan, parts, wanted, source, overwrite, moved)
                before = {part.name: part for part in parts} if _agrees(plan, wanted) else {}
        parts = [_carried(before.get(shard.name), shard) for shard in source.shards]
        if not (before and [part.as_json() for part in parts] == [part.as_json() for part in before.values()]):
            write_plan(out, wanted, parts)


def _read(out: str, overwrite: bool) -> tuple[dict | None, list[Part]]:
    try:
        return read_plan(out)
    except ProtopruneError:
        if overwrite:  # a damaged one counts as none
            return None, []
        raise


def _agrees(plan: dict, wanted: dict) -> bool:
    return all(plan.get(name) == wanted[name] for name in ("key", "root", "options"))


def _carried(part: Part | None, shard: Shard) -> Part:
    """The part of a shard that is done and unchanged, or gone; else a pending one."""
    same = (
        part is not None and part.done and (shard.size < 0 or (part.size, part.version) == (shard.size, shard.version))
    )
    return part if same else Part(shard.name, shard.size, shard.version)


def _unchanged(part: Part, shard: Shard) -> bool:
    return (part.size, part.version) == (shard.size, shard.version)


def _check(out: str, plan: dict, parts: list[Part], wanted: dict, source: Source, overwrite: bool, moved: bool) -> None:
    """Refuse, without --overwrite, features of another kind, of other images by the first shard, and to lose most."""
    if overwrite:
        return
    ways = "write to another folder with -o, or replace it with --overwrite"
    differences = feature_file.key_differences(plan["key"], wanted["key"])
    differences += [
        f"{name.replace('_', ' ')}: {plan['options'].get(name)}, not {value}"
        for name, value in wanted["options"].items()
        if plan["options"].get(name) != value and name in ("image_column", "id_column")
    ]
    if differences:
        raise ProtopruneError(f"{out} holds other features ({'; '.join(differences)}); {ways}")
    done = [part for part in parts if part.done]
    shards = {shard.name: shard for shard in source.shards}
    elsewhere = plan["root"] != source.root
    staying = [
        part for part in done
        if part.name in shards and (not elsewhere or _unchanged(part, shards[part.name]))
    ]  # fmt: skip
    stay, rows = sum(part.rows for part in staying), sum(part.rows for part in done)
    what = f"is for shards below {plan['root']}, not {source.root}" if elsewhere else "is for other shards"
    if elsewhere and staying and not moved:
        options = ShardOptions(**wanted["options"])
        if trouble := _other_content(shard_file(out, staying[0].name), shards[staying[0].name], source.root, options):
            raise ProtopruneError(f"{out}: {what}, and {staying[0].name} {trouble}; {ways}")
    if 2 * stay < rows:
        raise ProtopruneError(f"{out}: {what}: {rows - stay:,} of its {rows:,} features would be lost; {ways}")


def _other_content(path: str, shard: Shard, root: str, options: ShardOptions) -> str:
    """What speaks against a shard being the one that was embedded, by the content of its first images; '' for nothing.
    One on an object store is compared when it is embedded."""
    if "://" in shard.url:
        return ""
    try:
        with FeatureFile(path) as file, open_shard(shard, shard.url, options, root) as images:
            was = file.content
            rows = np.flatnonzero(was)[:8].tolist()
            if not len(rows):
                return "has no digests of its images, to compare them by; if it was only moved, say so with --moved"
            same = file.paths == images.paths
            same = same and all(content_digest(images.read(row)) == was[row] for row in rows)
            return "" if same else "holds other images"
    except (ProtopruneError, ShardError, ImageError) as error:
        return f"cannot be compared with what was embedded ({error})"


def _finish(out: str, report: SetReport, uuids: dict[str, str]) -> None:
    """Write what is there into set.json, and count it. `uuids` are those of the feature files that this run saw."""
    with _locked(out):
        plan, parts = read_plan(out)
        now = [_state(out, part, plan, uuids.get(part.name, part.uuid)) for part in parts]
        plan.pop("state", None)
        if [part.as_json() for part in now] != [part.as_json() for part in parts]:
            write_plan(out, plan, now)
    report.finished = not any(part.pending for part in now)
    report.n = sum(part.rows for part in now if part.done)
    report.failed_shards = [(part.name, *part.failed) for part in now if part.failed]


def _state(out: str, part: Part, plan: dict, uuid: str) -> Part:
    """A part as its files have it; `uuid` is what its feature file is known to have."""
    if part.done and part.uuid == uuid:
        return part
    path = shard_file(out, part.name)
    shard = Shard(part.name, "", part.size, part.version)
    options = ShardOptions(**plan["options"])
    found = _done(path, shard, plan["root"], options, plan["key"], source_gone=part.size < 0, try_again=False)
    if found is not None:
        return Part(part.name, found.size, found.version, found.rows, found.usable, found.uuid)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(_failure_file(path)) as file:
        said = parse_json(file.read())
        if (said["size"], said["version"]) == (part.size, part.version):
            return Part(part.name, part.size, part.version, failed=(said["status"], said["reason"]))
    return part


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """set.json for one process at a time; the others wait, since each holds it for moments only."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        held = files.lock(os.path.join(out, SET_FILE))
        try:
            held.__enter__()
            break
        except files.BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass
class _Finished:
    """What a finished feature file of a shard says of itself."""

    rows: int
    usable: int
    uuid: str
    size: int
    version: int
    failures: Counter


def _done(
    path: str,
    shard: Shard,
    root: str,
    options: ShardOptions,
    key: dict,
    *,
    source_gone: bool = False,
    try_again: bool = True,
) -> _Finished | None:
    """The feature file of a shard if it is for this shard below this root, unchanged (or gone), with this key and these
    options.

    With `try_again` a file whose images failed for want of something (a program, a permission) does not count, nor one
    whose features are damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        with FeatureFile(path) as file:
            facts = file.provenance
            status = file.status
            same = (facts.get("shard"), facts.get("root")) == (shard.name, root)
            same &= not feature_file.key_differences(facts, key)
            same &= facts.get("shard_options") == json.dumps(asdict(options), sort_keys=True)
            same &= source_gone or (facts.get("shard_size"), facts.get("shard_version")) == (shard.size, shard.version)
            same &= source_gone or not _touched(file, shard)
            if not same or (try_again and not source_gone and np.isin(status, TRANSIENT).any()):
                return None
            if try_again and not source_gone and not file.intact().all():
                return None
            usable = int((status == Status.OK).sum())
            size, version = int(facts["shard_size"]), int(facts["shard_version"])
            return _Finished(file.n, usable, facts["uuid"], size, version, file.failure_counts())
    except ProtopruneError:  # damaged: embed it again
        return None


def _touched(file: FeatureFile, shard: Shard) -> bool:
    """Whether another file may have been put in the shard's place: its ctime is another one."""
    before = file.ctime_ns[:1]
    return shard.ctime_ns >= 0 and bool(((before >= 0) & (before != shard.ctime_ns)).any())


def _uuid(path: str) -> str:
    with FeatureFile(path) as file:
        return file.provenance["uuid"]


def _replaces(path: str, shard: Shard, key: dict) -> bool:
    """Whether a feature file that is there is of another kind, or of another version of the shard."""
    if not os.path.exists(path):
        return False
    try:
        with FeatureFile(path) as file:
            facts = file.provenance
    except ProtopruneError:
        return True
    changed = (facts.get("shard_size"), facts.get("shard_version")) != (shard.size, shard.version)
    return changed or bool(feature_file.key_differences(facts, key))


@contextlib.contextmanager
def _local_copy(shard: Shard) -> Iterator[str]:
    """The path of the shard on this machine."""
    if "://" not in shard.url:
        yield shard.url
        return
    from protoprune.sources.remote import fetched

    with fetched(shard) as path:
        yield path


def _failure_file(path: str) -> str:
    return path.removesuffix(".h5") + ".failed.json"


def _note_failure(path: str, shard: Shard, error: ShardError) -> None:
    said = {"size": shard.size, "version": shard.version, "status": error.status.label, "reason": error.reason}
    files.write_file(_failure_file(path), json.dumps(said).encode())


def _count(report: SetReport, one: ShardReport) -> None:
    report.states[one.state] += 1
    report.embedded += one.embedded
    report.transparent += one.transparent
    report.failures += one.failures
    report.skipped += one.skipped
    report.duplicates += one.duplicates
    if one.state == "kept":
        warn(f"{one.name}: the shard is gone; its {one.rows:,} features are kept")
