"""A feature set on an object store: how features get there, and a copy of it on this machine to read.

    s3://bucket/features/set.json
    s3://bucket/features/train/0000.tar.h5          one put, when the shard is done
    s3://bucket/features/train/0000.tar.note.json   what the file says of itself, or why the shard has failed

The notes spare a run the fetching of files that are done; each names the file that it is about by the store's mark of
it (the etag), so that a note never speaks for a file that somebody else put there. A store has no locks: of two writers
of a new file it refuses the second, and set.json is written again by whoever finds more done than it says (see
`sharding`).
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protoprune import stores
from protoprune.errors import ProtopruneError, warn
from protoprune.features import seals
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import Part, not_finished, read_plan, shard_file, write_plan
from protoprune.files import replacing
from protoprune.images.listing import SET_FILE, is_feature_set
from protoprune.text import parse_json

_FETCHING = 8  # feature files that are on their way at once
_NOTE = ".note.json"


def note_file(path: str) -> str:
    """The note beside a feature file."""
    return path.removesuffix(".h5") + _NOTE


def notes(out: str) -> dict[str, dict[str, Any]]:
    """Feature file -> its note, of all shards of a set; of those that are done only where it is about what is there."""
    there = stores.listed(out)
    names = [name for name in there if name.endswith(_NOTE)]
    paths = [f"{out}/{name.removesuffix(_NOTE)}.h5" for name in names]
    found = stores.answered(out, lambda: stores.read_all(f"{out}/{name}" for name in names))
    seen = [there.get(name.removesuffix(_NOTE) + ".h5") for name in names]
    return {path: one for path, data, file in zip(paths, found, seen, strict=True) if (one := _note(data, file))}


def note(path: str) -> dict[str, Any] | None:
    """The note of one feature file, as `notes` has it."""
    return _note(stores.read(note_file(path)), stores.seen(path))


def _note(data: bytes | None, file: stores.Seen | None) -> dict[str, Any] | None:
    if data is None:
        return None
    try:
        found: dict[str, Any] = parse_json(data.decode())
        if found.pop("digest") != _digest(found):
            return None  # damaged: the file itself is asked again
        if "failed" in found:
            return found
        if file is None:
            return None
        marks = {found.get("mark", ""), file.mark} - {""}
        return found if found["bytes"] == file.size and len(marks) < 2 else None
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def write_note(path: str, what: dict[str, Any], file: stores.Seen | None = None) -> None:
    """Write the note of a feature file, which is about `file`, if there is one."""
    what = what | ({"mark": file.mark} if file is not None and file.mark else {})
    stores.write(note_file(path), json.dumps(what | {"digest": _digest(what)}).encode())


def _digest(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def deliver(local: str, path: str, what: dict[str, Any], *, new: bool) -> None:
    """Put a finished feature file on the store, and its note, which says `what`. Raises FileExistsError when somebody
    else puts one there at the same time, who is left to make the note."""
    if not new:  # killed in between, there is none rather than that of what was there
        stores.remove(note_file(path))
    stores.put(local, path, new=new)
    seen = stores.seen(path)  # first: when the file is still ours after that, so was what has been seen
    with open(local, "rb") as file:
        head = file.read(seals.BLOCK)  # the digest of its structure, in which every file has an id
    if seen is None or stores.read(path, len(head)) != head:
        raise FileExistsError(path)
    write_note(path, what, seen)


# --- a copy to read ---------------------------------------------------------------------------------------------------


def cache_folder() -> str:
    """Where copies of what lies on stores are kept: $PROTOPRUNE_CACHE, else protoprune in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("PROTOPRUNE_CACHE") or os.path.join(base, "protoprune")


def local_copy(url: str) -> str:
    """A folder on this machine with the finished feature set at `url`; only what changed is fetched again.

    Raises ProtopruneError.
    """
    url = url.rstrip("/")
    plan, parts = read_plan(url)
    pending = sum(part.pending for part in parts)
    if pending:
        raise not_finished(url, len(parts) - pending, len(parts))
    identity = hashlib.sha256(stores.public(url).encode()).hexdigest()[:16]
    folder = os.path.join(cache_folder(), "sets", f"{identity}-{url.rpartition('/')[2]}")
    try:
        os.makedirs(folder, exist_ok=True)
        missing = [part for part in parts if part.done and not _is_there(folder, part)]
        if missing:
            warn(f"{stores.public(url)}: fetching {len(missing):,} feature files into {folder}")
        with ThreadPoolExecutor(_FETCHING) as pool:
            for _ in pool.map(lambda part: _fetch(url, folder, part), missing):
                pass
        if missing or not is_feature_set(folder) or read_plan(folder) != (plan, parts):
            write_plan(folder, plan, parts)
    except OSError as error:
        raise ProtopruneError(
            f"{folder}: cannot write ({error.strerror}); PROTOPRUNE_CACHE=FOLDER names another place for the copy of "
            f"{stores.public(url)}"
        ) from None
    return folder


def _is_there(folder: str, part: Part) -> bool:
    try:
        with FeatureFile(shard_file(folder, part.name)) as file:
            return file.provenance["uuid"] == part.uuid
    except ProtopruneError:
        return False


def _fetch(url: str, folder: str, part: Part) -> None:
    path = shard_file(folder, part.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as temporary:
        stores.get(shard_file(url, part.name), temporary)
    if not _is_there(folder, part):
        raise ProtopruneError(
            f"{stores.public(shard_file(url, part.name))}: not the file that its {SET_FILE} names; run the same "
            "`protoprune embed` again"
        )
