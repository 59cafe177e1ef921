"""What is there of a feature set and what is still to be done: set.json, and what the files of single shards say.

In a folder set.json is written under a lock. A store has none: there it is looked at again after it was written, see
`finish`. This module reads and writes what says how far a set is; it embeds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from protoprune import files, stores
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features import featurefile as feature_file
from protoprune.features import remoteset
from protoprune.features.current import content_digest
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import Part, Plan, read_plan, shard_file, write_plan
from protoprune.images.decode import TRANSIENT, ImageError
from protoprune.images.listing import SET_FILE, is_feature_set
from protoprune.sources import Shard, ShardError, ShardOptions, Source, open_shard
from protoprune.text import parse_json

_LOCK_SECONDS = 60
_WAYS = "write to another folder with -o, or replace it with --overwrite"


class Wanted(NamedTuple):
    """What the features of a set are made of, and how."""

    root: str
    options: ShardOptions
    key: dict[str, str]  # see `featurefile.KEY`


def prepare(
    source: Source, key: dict[str, str], options: ShardOptions, out: str, overwrite: bool, moved: bool = False
) -> list[Part]:
    """Leave a set.json for exactly this source, key and options, which keeps what is done already; the parts that are
    done and of none of these shards."""
    there = is_feature_set(out)
    if not there:
        _check_free(out)
    wanted: Plan = {"key": key, "root": source.root, "options": asdict(options)}
    with _locked(out):
        plan, before = _read(out, overwrite) if there or is_feature_set(out) else (None, [])
        if plan is not None:
            _check(out, plan, before, wanted, source, overwrite, moved)
            _warn_of_other_classes(out, plan["options"], wanted["options"])
        names = {shard.name for shard in source.shards}
        dropped = [part for part in before if part.done and part.name not in names]
        before = before if plan is not None and _agrees(plan, wanted) else []
        known = {part.name: part for part in before}
        parts = [_carried(known.get(shard.name), shard) for shard in source.shards]
        if parts != before:
            try:
                write_plan(out, wanted, parts, new=not there)
            except FileExistsError:  # on a store, by a process that began at the same moment
                return prepare(source, key, options, out, overwrite, moved)
    return dropped


def _check_free(out: str) -> None:
    """Raise UsageError for a place that holds other things; a folder is made."""
    if stores.is_url(out):
        others = list(stores.listed(out))
    else:
        if os.path.exists(out) and not os.path.isdir(out):
            raise UsageError(f"-o {out}: a file; shards go to a folder of feature files, such as -o features")
        try:
            os.makedirs(out, exist_ok=True)
            others = [one for one in os.listdir(out) if not one.startswith(SET_FILE)]
        except OSError as error:
            raise ProtopruneError(f"-o {out}: cannot make the folder ({error.strerror})") from None
    if others:
        raise UsageError(
            f"-o {stores.public(out)}: a folder that holds other things ({others[0]}); name a new one for the features"
        )


def _read(out: str, overwrite: bool) -> tuple[Plan | None, list[Part]]:
    try:
        return read_plan(out)
    except ProtopruneError:
        if overwrite:  # a damaged one counts as none
            return None, []
        raise


def _agrees(plan: Plan, wanted: Plan) -> bool:
    return (plan.get("key"), plan["root"], plan.get("options")) == (wanted["key"], wanted["root"], wanted["options"])


def _carried(part: Part | None, shard: Shard) -> Part:
    """The part of a shard that is done and unchanged, or gone; else a pending one."""
    if part is not None and part.done and (shard.size < 0 or _unchanged(part, shard)):
        return part
    return Part(shard.name, shard.size, shard.version)


def _unchanged(part: Part, shard: Shard) -> bool:
    return (part.size, part.version) == (shard.size, shard.version)


def _check(out: str, plan: Plan, parts: list[Part], wanted: Plan, source: Source, overwrite: bool, moved: bool) -> None:
    """Refuse, without --overwrite, features of another kind, of other images by the first shard, and to lose most."""
    if overwrite or all(part.failed for part in parts):  # by a wrong column, say: there is nothing to lose
        return
    if differences := _differences(plan, wanted):
        raise ProtopruneError(f"{out} holds other features ({'; '.join(differences)}); {_WAYS}")
    _check_losses(out, plan, parts, wanted, source, moved)


def _check_losses(out: str, plan: Plan, parts: list[Part], wanted: Plan, source: Source, moved: bool) -> None:
    ways = _WAYS
    elsewhere = plan["root"] != source.root
    shards = {shard.name: shard for shard in source.shards}
    read = not moved and not any(map(stores.is_url, (out, source.root)))  # and compared with what was embedded
    staying = _staying(parts, shards, elsewhere, read)
    stay, rows = (sum(part.rows for part in some if part.done) for some in (staying, parts))
    what = f"is for shards below {plan['root']}, not {source.root}" if elsewhere else "is for other shards"
    if elsewhere and moved:  # other times of modification, which --moved goes by
        ways = f"leave --moved out, and contents are compared, {ways}"
    elif elsewhere and staying:
        first, options = staying[0].name, ShardOptions(**wanted["options"])
        if trouble := _other_content(shard_file(out, first), shards[first], source.root, options):
            raise ProtopruneError(f"{out}: {what}, and {first} {trouble}; {ways}")
    if 2 * stay < rows:
        raise ProtopruneError(f"{out}: {what}: {rows - stay:,} of its {rows:,} features would be lost; {ways}")


def _warn_of_other_classes(out: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Say that classes are replaced which nobody asked to: an earlier run had them from elsewhere."""
    if (now["labels"], now["label_column"], now["class_level"]) != (True, None, None):
        return
    for name in ("label_column", "class_level"):
        if was.get(name) is not None:
            option = f"--{name.replace('_', '-')} {was[name]}"
            warn(
                f"{stores.public(out)}: had the classes of {option}, and is given those of the default now; give the "
                "option again in each run, or --no-labels where there are to be none"
            )


def _staying(parts: list[Part], shards: dict[str, Shard], elsewhere: bool, read: bool) -> list[Part]:
    """The parts whose shards are there; below another root those that look the same, or are read and have its size."""
    there = [(part, shards[part.name]) for part in parts if part.done and part.name in shards]
    return [
        part for part, shard in there
        if not elsewhere or _unchanged(part, shard) or (read and part.size == shard.size)
    ]  # fmt: skip


def _differences(plan: Plan, wanted: Plan) -> list[str]:
    """What makes features of one kind incomparable with those of another: the key, and what an image and its id are."""
    options = [(name, plan["options"].get(name), wanted["options"][name]) for name in ("image_column", "id_column")]
    return feature_file.key_differences(plan["key"], wanted["key"]) + [
        f"{name.replace('_', ' ')}: {was}, not {value}" for name, was, value in options if was != value
    ]


def _other_content(path: str, shard: Shard, root: str, options: ShardOptions) -> str:
    """What speaks against a shard being the one that was embedded, by the content of its first images; '' for nothing.
    One on an object store is compared when it is embedded; one whose features are there is embedded again."""
    if stores.is_url(shard.url) or stores.is_url(path):
        return ""
    try:
        with FeatureFile(path) as file, open_shard(shard, shard.url, options, root) as images:
            was = file.content
            rows = np.flatnonzero(was)[:8].tolist()
            same = file.paths == images.paths
            same = same and all(content_digest(images.read(row)) == was[row] for row in rows)
            return "" if same else "holds other images"
    except (ProtopruneError, ImageError) as error:
        return f"cannot be compared with what was embedded ({error})"


def finish(out: str, seen: dict[str, tuple[str, int]]) -> list[Part]:
    """Write what is there into set.json; the parts of it.

    `seen` has the ids and rows of the feature files that this run saw, whatever was written of them before.

    On a store, which has no locks, it is looked at again after it was written: whoever writes last has seen all that
    was done before, and what is done later its maker writes.
    """
    while True:
        with _locked(out):
            plan, parts = read_plan(out)
            notes = remoteset.notes(out) if stores.is_url(out) else None
            now = [_state(out, part, plan, *seen.get(part.name, (part.uuid, part.rows)), notes) for part in parts]
            changed = now != parts
            if changed:
                write_plan(out, plan, now)
        if not changed or notes is None:
            break
    return now


def _state(out: str, part: Part, plan: Plan, uuid: str, rows: int, notes: dict[str, Any] | None) -> Part:
    """A part as its files have it; `uuid` and `rows` are what its feature file is known to have."""
    path = shard_file(out, part.name)
    if (
        part.done
        and (part.uuid, part.rows) == (uuid, rows)
        and (notes is None or notes.get(path, {}).get("uuid") == uuid)
    ):
        return part
    shard = Shard(part.name, "", part.size, part.version)
    wanted = Wanted(plan["root"], ShardOptions(**plan["options"]), plan["key"])
    found = done(path, shard, wanted, source_gone=part.size < 0, try_again=False, notes=notes)
    if found is not None:
        return Part(part.name, found.size, found.version, found.rows, found.uuid)
    said = _failure(path, notes)
    if said and (said["size"], said["version"]) == (part.size, part.version):
        return Part(part.name, part.size, part.version, failed=(said["status"], said["reason"]))
    return part


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """set.json for one process at a time; the others wait, since each holds it for moments only."""
    if stores.is_url(out):
        yield
        return
    until = time.monotonic() + _LOCK_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(files.lock(os.path.join(out, SET_FILE)))
                break
            except files.BusyError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass
class Finished:
    """What a finished feature file of a shard says of itself."""

    rows: int
    uuid: str
    size: int
    version: int
    failures: Counter[str]
    left_out: int


def done(
    path: str,
    shard: Shard,
    wanted: Wanted,
    *,
    source_gone: bool = False,
    try_again: bool = True,
    notes: dict[str, Any] | None = None,
) -> Finished | None:
    """The feature file of a shard if it is for this shard, unchanged (or gone), and as it is wanted.

    With `try_again` a file whose images failed for want of something (a program, a permission) does not count, nor one
    that is damaged. `notes` are those of the whole set, where it lies on a store.
    """
    again = try_again and not source_gone
    if stores.is_url(path):
        facts = remoteset.note(path) if notes is None else notes.get(path)
        if facts is None or not _is_for(facts, shard, wanted, source_gone):
            return None
        return None if again and facts["try_again"] else _finished(facts)
    if not os.path.exists(path):
        return None
    try:
        with FeatureFile(path) as file:
            facts = _facts(file)
            if not _is_for(facts, shard, wanted, source_gone):
                return None
            return None if again and (facts["try_again"] or file.damage()) else _finished(facts)
    except ProtopruneError:  # damaged: embed it again
        return None


def _is_for(facts: dict[str, Any], shard: Shard, wanted: Wanted, source_gone: bool) -> bool:
    same = (facts.get("shard"), facts.get("root")) == (shard.name, wanted.root)
    same = same and not feature_file.key_differences(facts, wanted.key)
    same = same and facts.get("shard_options") == wanted.options.as_text()
    if source_gone or not same:
        return same
    # Another file may have been put in the shard's place: its ctime is another one.
    before = facts.get("shard_ctime", -1)
    touched = before >= 0 and shard.ctime_ns >= 0 and before != shard.ctime_ns
    return (facts.get("shard_size"), facts.get("shard_version")) == (shard.size, shard.version) and not touched


def _facts(file: FeatureFile) -> dict[str, Any]:
    """What a finished feature file says of itself."""
    status = file.status
    names = (*feature_file.KEY, "shard", "shard_options", "shard_size", "shard_version", "root", "uuid", "embedded_by")
    return {name: file.provenance[name] for name in names if name in file.provenance} | {
        "rows": file.n, "failures": dict(file.failure_counts()),
        "try_again": bool(np.isin(status, TRANSIENT).any()), "bytes": file.bytes, "left_out": len(file.left_out),
        "shard_ctime": int(file.ctime_ns[0]) if file.n else -1,
    }  # fmt: skip


def _finished(facts: dict[str, Any]) -> Finished:
    return Finished(
        facts["rows"], facts["uuid"], int(facts["shard_size"]), int(facts["shard_version"]),
        Counter(facts["failures"]), facts.get("left_out", 0),
    )  # fmt: skip


def facts_of(path: str) -> dict[str, Any]:
    with FeatureFile(path) as file:
        return _facts(file)


def failure_file(path: str) -> str:
    return path.removesuffix(".h5") + ".failed.json"


def forget_failure(path: str) -> None:
    """Of a feature file in a folder, whose shard could be used after all."""
    with contextlib.suppress(OSError):
        os.unlink(failure_file(path))


def note_failure(path: str, shard: Shard, error: ShardError) -> None:
    said = {"size": shard.size, "version": shard.version, "status": error.status.label, "reason": error.reason}
    if stores.is_url(path):
        remoteset.write_note(path, {"failed": said})
    else:
        files.write_file(failure_file(path), json.dumps(said).encode())


def _failure(path: str, notes: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was noted of a shard that failed."""
    said = None
    if notes is not None:
        said = notes.get(path, {}).get("failed")
    else:
        with contextlib.suppress(OSError, ValueError), open(failure_file(path)) as file:
            said = parse_json(file.read())
    kinds = {"size": int, "version": int, "status": str, "reason": str}
    if not isinstance(said, dict) or not all(isinstance(said.get(name), kind) for name, kind in kinds.items()):
        return None  # or damaged: the shard is tried again
    return said
