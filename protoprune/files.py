"""How a file is written: whole or not at all, never over what it is made from, and with a lock where it takes long.

Everything that protoprune writes goes through here: small files at once (`write_file`), others under a temporary name
that takes the place of the old file when they are finished (`replacing`, `publish`), so that killing the process at any
moment leaves the old file. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.stores import refuse_url
from protoprune.units import many

CLASSES = "classes.txt"  # in a folder of links: all classes, in the order of their numbers

# How files begin that took hours to make or cannot be made again: nothing of another kind is written over them.
_PRECIOUS = (
    (b"\x89HDF", "an HDF5 file"), (b"protoprune-seal", "a feature file or a training record"),
    (b"\xff\xd8\xff", "an image"), (b"\x89PNG", "an image"), (b"GIF8", "an image"),
    (b"II*\0", "an image"), (b"MM\0*", "an image"), (b"PK\x03\x04", "a zip archive, perhaps weights"),
)  # fmt: skip

# Suffixes that say what a file holds, so that something else in it would mislead people and programs.
_TELLING = frozenset((
    ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".npy", ".npz", ".parquet", ".pq", ".h5", ".hdf5", ".png", ".jpg",
    ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".html", ".htm", ".xlsx", ".zip", ".tar", ".pt",
    ".pth", ".safetensors", ".gz", ".bz2", ".xz", ".zst", ".arrow", ".feather",
))  # fmt: skip


def write_file(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Write a file, whose bytes may come in pieces, so that it appears complete or not at all; a pipe or a device is
    written to as it stands."""
    refuse_url(path)
    path = os.fspath(path)
    pieces = _pieces(data)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        _write_device(path, pieces)
        return
    path = target(path)
    what, first = holds(path), next(pieces, b"")
    if what and what != _kind(first[:16]):
        raise ProtopruneError(f"{path}: is {what}, and not written over; choose another name, or delete it first")
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(first)
            file.writelines(pieces)
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def target(path: str) -> str:
    """What a link points to, so that the link stays, and what is read by either name is what was written."""
    return os.path.realpath(path) if os.path.islink(path) else path


def _pieces(data: bytes | Iterable[bytes]) -> Iterator[bytes]:
    return iter([data] if isinstance(data, bytes) else data)


def check_suffix(
    path: str | os.PathLike[str] | None, right: Sequence[str], option: str = "-o", *, only: bool = False
) -> None:
    """Raise UsageError for a name whose suffix promises another format than the `right` ones that can be written; with
    `only` for every other suffix. `.gz` after it does not count where tables are written: they go through gzip."""
    if path is None or str(path) == "-":
        return
    name = os.fspath(path).lower()
    suffix = os.path.splitext(name.removesuffix(".gz") if ".csv" in right else name)[1]
    if suffix not in right and (only or suffix in _TELLING):
        name = f"{option} {os.fspath(path)}".strip()
        raise UsageError(f"{name}: is written as {' or '.join(right)}; give it a name that ends so")


def holds(path: str | os.PathLike[str]) -> str:
    """'an image' and the like, for a file that nothing else may take the place of; '' for others and for none."""
    try:
        if not os.path.isfile(path):
            return ""
        with open(path, "rb") as file:
            return _kind(file.read(16))
    except OSError:
        return ""


def _kind(head: bytes) -> str:
    bmp = head[:2] == b"BM" and head[6:10] == b"\0\0\0\0"  # and not a list of BMW/1.jpg
    if bmp or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "an image"
    return next((what for magic, what in _PRECIOUS if head.startswith(magic)), "")


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two names lead to one file, now or once it is written.

    Links are followed; of files that are not there yet, names that differ only in case or in Unicode normalisation
    count as one, as they are on many disks.
    """
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    if os.path.exists(a) or os.path.exists(b):
        return False
    (folder, name), (other, its) = (os.path.split(os.path.realpath(one)) for one in (a, b))
    if unicodedata.normalize("NFC", name).casefold() != unicodedata.normalize("NFC", its).casefold():
        return False
    return os.path.samefile(folder, other) if os.path.isdir(folder) and os.path.isdir(other) else folder == other


def leads_out(name: str) -> bool:
    """Whether a name, which may come from anywhere, is no path below a folder: absolute, empty, with `..` or NUL."""
    return not name or name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/"))


@contextlib.contextmanager
def replacing(path: str, temporary: str | None = None) -> Iterator[str]:
    """The name to write a file under; it takes the place of `path` when the block ends well, and is removed else.

    `temporary` is that name, by default one that no other process has. Raises OSError.
    """
    temporary = temporary or temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def temporary_name(path: str) -> str:
    """A name beside `path` that says which process of which machine writes under it. What processes of this machine
    left under such names when they were killed is removed, once a folder."""
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in _tidied:
        _tidied.add(folder)
        _tidy(folder)
    return f"{path}.{_machine()}-{os.getpid()}.tmp"


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in $TMPDIR for copies of what lies elsewhere. Those that killed processes left there are removed."""
    base = os.path.join(tempfile.gettempdir(), "protoprune")
    return tempfile.TemporaryDirectory(prefix="protoprune-", suffix=temporary_name(base).removeprefix(base))


_tidied: set[str] = set()


@functools.cache
def _machine() -> str:
    """Eight digits for where process numbers mean what they mean here: the host, since it was booted, and in it the
    container, so that nothing of a process that lives elsewhere is taken for a dead one's."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _tidy(folder: str) -> None:
    ours = re.compile(rf".+\.{_machine()}-([0-9]+)\.tmp", re.DOTALL)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = ours.fullmatch(entry.name)
            if match is None or _alive(int(match[1])):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):  # links that were to become --links
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


@contextlib.contextmanager
def creating(path: str) -> Iterator[str]:
    """As `replacing`, for a file that a long run fills afterwards: raises ProtopruneError with the way on.

    The temporary name, `<path>.new`, is the same each time: the run holds a lock, and a killed one leaves no heap.
    """
    temporary = f"{path}.new"
    with told(temporary), replacing(path, temporary):
        yield temporary


def publish(partial: str, path: str) -> None:
    """Give a finished file its name. It is on the disk before the rename, and the rename before the return."""
    path = target(path)
    with told(partial):
        sync(partial)
        os.replace(partial, path)
    with contextlib.suppress(OSError):  # not every file system can do this with a folder
        sync(os.path.dirname(os.path.abspath(path)))


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Trouble with the disk, while a long run writes `path`, as a ProtopruneError with the way on."""
    try:
        yield
    except OSError as error:
        raise ProtopruneError(disk_trouble(path, error)) from None


def _write_device(path: str, pieces: Iterator[bytes]) -> None:
    """Into a pipe, /dev/stdout, /dev/null: a rename would put a file in its place."""
    try:
        with open(path, "wb") as file:
            file.writelines(pieces)
    except BrokenPipeError:  # `-o >(head)`
        pass
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def write_stdout(data: bytes | Iterable[bytes]) -> None:
    """The list, which may come in pieces, on standard output. A reader that stops early (`| head`) is not an error; a
    full disk is."""
    if sys.stdout is None:  # `>&-`
        raise ProtopruneError("standard output is closed; give -o FILE")
    try:
        sys.stdout.buffer.writelines(_pieces(data))
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        if not isinstance(error, BrokenPipeError):
            raise ProtopruneError(f"standard output: cannot write ({error.strerror}); the list is cut short") from None


def write_links(
    folder: str | os.PathLike[str],
    root: str,
    paths: Sequence[str],
    *,
    folders: Sequence[str] = (),
    classes: Sequence[str] = (),
    hard: bool = False,
    overwrite: bool = False,
) -> None:
    """A tree of links to the images, which any folder-reading loader takes. `folder` must not exist, be empty, or with
    `overwrite` hold what an earlier call has made of the images below this root, and nothing else.

    All `folders`, those of the classes, are made, be they empty, and of the names of `classes`, in the order of their
    numbers, `classes.txt`: a loader that counts the folders would number the classes anew where one has lost all its
    images (torchvision's ImageFolder refuses it, unless told to take it), and timm, which counts the folders of files,
    takes the list as --class-map.

    Built beside its place and renamed, so that an interrupted run leaves no half tree under the final name.
    Raises ProtopruneError when an image is missing or the file system refuses the link; images are never touched. A
    name that leads out of the folder is refused before anything is made.
    """
    if not overwrite:
        check_free(folder)
    if (outside := next(filter(leads_out, paths), None)) is not None:
        raise ProtopruneError(f"--links {folder}: {outside!r} leads out of the folder; links are made below it only")
    folder, root = os.path.abspath(folder), os.path.abspath(root)
    building = temporary_name(folder)
    made: set[str] = set()
    try:
        os.makedirs(building)
        for name in folders:
            if not leads_out(name):
                os.makedirs(os.path.join(building, name), exist_ok=True)
        for path in paths:
            target, link = os.path.join(root, path), os.path.join(building, path)
            parent = os.path.dirname(link)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if not os.path.isfile(target):
                above = os.path.dirname(target)
                while len(above) > len(root) and not os.path.isfile(above):
                    above = os.path.dirname(above)
                if os.path.isfile(above):
                    raise UsageError(
                        f"--links: {path} lies in a shard, to which no link can lead; `protoprune reshard LIST OUT` "
                        "writes new tars of what is kept"
                    )
                raise ProtopruneError(f"--links: {target} does not exist; embed again, or give --root where it is now")
            if hard:
                os.link(os.path.realpath(target), link)  # a hard link of a relative symbolic one would lead nowhere
            else:
                os.symlink(target, link)
        _write_classes(folder, os.path.join(building, CLASSES), classes)
        _put(building, folder, root, overwrite)
    except OSError as error:
        check_free(folder, root, overwrite)  # another process has made it in the meantime
        raise ProtopruneError(
            f"--links {folder}: {error.strerror} ({error.filename2 or error.filename})"
            + ("; hard links cannot cross file systems, use symbolic ones" if hard else "")
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)  # only links, and only what this call made


def _write_classes(folder: str, path: str, classes: Sequence[str]) -> None:
    """One a line, unless there is something: a class may be called as the file is."""
    broken = [name for name in classes if "\n" in name or "\r" in name]
    if broken:
        some = many(len(broken), "class name holds", "class names hold")
        warn(f"{folder}: no {CLASSES}, since {some} a line break (first: {broken[0]!r})")
    elif classes and not os.path.exists(path):
        with open(path, "wb") as file:
            file.write(os.fsencode("".join(f"{name}\n" for name in classes)))


def _put(building: str, folder: str, root: str, overwrite: bool) -> None:
    """Give a finished tree of links its name; where an earlier one has it, there is none for a moment."""
    check_free(folder, root, overwrite)
    before = temporary_name(f"{folder}.before")
    if overwrite and os.path.isdir(folder):
        os.rename(folder, before)
    try:
        os.replace(building, folder)
    except BaseException:
        if os.path.lexists(before):
            os.rename(before, folder)
        raise
    # What came after `check_free` had looked goes where nothing is, under a name that no later run clears away.
    if os.path.isdir(before) and (other := _not_ours(before, root)) is not None:
        aside = tempfile.mkdtemp(prefix=f"{os.path.basename(folder)}.before-", dir=os.path.dirname(folder))
        os.rename(before, aside)
        raise ProtopruneError(
            f"--links {folder}: {other} was put among the earlier links while they were replaced; they are in "
            f"{aside} now, and the new ones in their place"
        )
    shutil.rmtree(before, ignore_errors=True)


def check_free(folder: str | os.PathLike[str], root: str = "", overwrite: bool = False) -> None:
    """Raise UsageError unless a folder of links can be made here: nothing is there, or an empty folder, or, with
    `overwrite`, links to the images below `root` as they are made here, and nothing else."""
    refuse_url(folder, "--links ")
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return
    if not overwrite:
        raise UsageError(
            f"--links {folder}: exists and is not empty; choose another folder, or replace the links of an earlier run "
            "with --overwrite"
        )
    own = f"--links {folder}: --overwrite replaces links to the images below {root} and nothing else, and"
    if os.path.islink(folder) or not os.path.isdir(folder):
        raise UsageError(f"{own} this is no folder of them; choose another one")
    if (other := _not_ours(os.fspath(folder), os.path.abspath(root))) is not None:
        raise UsageError(f"{own} {other} is none; look at it, and choose another folder or remove this one")


def _not_ours(folder: str, root: str) -> str | None:
    """The first thing in a folder of links that would be lost with it: that is neither a symbolic link to the image of
    its path below the root, nor another name of that very image, nor the list of classes."""
    for here, folders, names in os.walk(folder):
        for name in (*names, *(one for one in folders if os.path.islink(os.path.join(here, one)))):
            path = os.path.join(here, name)
            inside = os.path.relpath(path, folder)
            if not _leads_to(path, os.path.join(root, inside)) and not (inside == CLASSES and _lists(path, folder)):
                return inside
    return None


def _lists(path: str, folder: str) -> bool:
    """Whether a file is a list of classes: names those folders that are so many levels below this one."""
    with open(path, "rb") as file:
        names = set(file.read().split(b"\n")) - {b""}
    level = [os.fsencode(folder)]
    while level:
        below = [entry for one in level for entry in os.scandir(one) if entry.is_dir(follow_symlinks=False)]
        if names == {entry.name for entry in below}:
            return True
        level = [entry.path for entry in below]
    return False


def _leads_to(path: str, target: str) -> bool:
    """Whether a file is a link to another one, which stays when the link goes: no other name of the folder it is in."""
    if os.path.islink(path):
        return os.readlink(path) == target
    if not os.path.exists(target) or not os.path.samefile(path, target):
        return False
    return not os.path.samefile(os.path.dirname(path), os.path.dirname(os.path.realpath(target)))


class BusyError(ProtopruneError):
    """Another process is writing the file."""


# --- long writes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(out: str) -> Iterator[None]:
    """Hold `<out>.lock` while writing; a second process is refused at once. The lock dies with its process."""
    refuse_url(out)
    path = target(out) + ".lock"
    try:
        file = _locked(path)
    except BlockingIOError:
        with contextlib.suppress(OSError), open(path) as holder:
            who = holder.read().strip()
        raise BusyError(f"{out}: another protoprune is writing it ({who or path}); wait for it to end") from None
    except OSError as error:
        raise ProtopruneError(f"{path}: {error.strerror}; choose an output in a folder that can be written") from None
    with file:  # closed, and so given back, whatever interrupts the rest
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _locked(path: str) -> IO[str]:
    while True:
        file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            if not _flock(file, path):
                return file
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                with contextlib.suppress(OSError):  # of a full disk: it is held all the same, by nobody in particular
                    file.truncate(0)
                    os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
                return file
        except OSError:
            file.close()
            raise
        file.close()  # its holder removed it between our open and our flock: this lock guards nothing


def _flock(file: IO[str], path: str) -> bool:
    """Take the lock; False on a file system that has none (Lustre, some NFS), where the run goes on without."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        warn(f"{path}: the file system has no locks ({error.strerror}); let no other process write the same file")
        return False
    return True


def reserve(path: str, mode: str, size: int) -> None:
    """Make a file at least `size` bytes long on the disk, so that a full disk is found out now."""
    with open(path, mode) as file:
        if not hasattr(os, "posix_fallocate"):  # macOS: there a full disk is found out while writing
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise  # any other error: a file system that reserves nothing


def disk_trouble(path: str, error: OSError) -> str:
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        return f"{path}: its folder vanished while it was being written; make the folder again, or choose another -o"
    if isinstance(error, FileNotFoundError):
        return f"{path}: vanished while it was being written; run it again"
    reason = error.strerror or str(error)
    return f"{path}: cannot write ({reason}); what is done is kept: make room or choose another -o, and run it again"


def make_folder(path: str | os.PathLike[str], way_on: str = "choose another place") -> None:
    """Make a folder that need not be new. Raises ProtopruneError where it cannot be made."""
    refuse_url(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ProtopruneError(f"{os.fspath(path)}: cannot make this folder ({error.strerror}); {way_on}") from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- rows of CSV ------------------------------------------------------------------------------------------------------


def csv_bytes(header: Sequence[str] | None, records: Iterable[Iterable[object]] = ()) -> bytes:
    """A CSV file in which every name that Linux allows survives; without a header what comes after it."""
    # csv quotes only the line ends that it writes itself: with "\r\n" a name that holds a lone "\r" survives too.
    file = _Lines()
    writer = csv.writer(file, lineterminator="\r\n")
    if header is not None:
        writer.writerow(header)
    writer.writerows(records)
    return os.fsencode("".join(file.lines))


class _Lines:
    """What csv writes its rows to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line.removesuffix("\r\n") + "\n")


def table_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """A CSV file of dicts with plain values; what a row lacks, None and NaN become empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([plain_cell("" if row.get(name) is None else row[name]) for name in columns] for row in rows)
    return csv_bytes(columns, cells)


def plain_number(value: object) -> float | str:
    """A float, numpy's or Python's, with its type's shortest exact digits; empty where it is not finite."""
    number = float(str(value))
    return number if math.isfinite(number) else ""


def plain_cell(value: object) -> object:
    """A value as csv and json write it: a float in its shortest exact form, empty where it is not finite."""
    if isinstance(value, float):
        return plain_number(value)
    if hasattr(value, "dtype") and hasattr(value, "item"):  # numpy's
        return plain_number(value) if value.dtype.kind == "f" else value.item()
    return value
