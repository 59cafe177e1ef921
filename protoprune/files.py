"""How a file is written: whole or not at all, never over what it is made from, and with a lock where it takes long.

Everything that protoprune writes goes through here: small files at once (`write_file`), others under a temporary name
that takes the place of the old file when they are finished (`replacing`, `publish`), so that killing the process at any
moment leaves the old file. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from protoprune.errors import ProtopruneError, UsageError, warn


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Write a file so that it appears complete or not at all; a pipe or a device is written to as it stands."""
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        _write_device(path, data)
        return
    path = os.path.realpath(path)  # what a link points to, so that the link stays
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


@contextlib.contextmanager
def replacing(path: str, temporary: str | None = None) -> Iterator[str]:
    """The name to write a file under; it takes the place of `path` when the block ends well, and is removed else.

    `temporary` is that name, by default one that no other process has. Raises OSError.
    """
    temporary = temporary or f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


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


def _write_device(path: str, data: bytes) -> None:
    """Into a pipe, /dev/stdout, /dev/null: a rename would put a file in its place."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except BrokenPipeError:  # `-o >(head)`
        pass
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def write_stdout(data: bytes) -> None:
    """The list on standard output. A reader that stops early (`| head`) is not an error; a full disk is."""
    if sys.stdout is None:  # `>&-`
        raise UsageError("standard output is closed; give -o FILE")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        if not isinstance(error, BrokenPipeError):
            raise ProtopruneError(f"standard output: cannot write ({error.strerror}); the list is cut short") from None


def write_links(folder: str | os.PathLike, root: str, paths: Sequence[str], *, hard: bool = False) -> None:
    """A tree of links to the images, which any folder-reading loader takes. `folder` must not exist or be empty.

    Built beside its place and renamed, so that an interrupted run leaves no half tree under the final name.
    Raises ProtopruneError when an image is missing or the file system refuses the link; images are never touched.
    """
    check_free(folder)
    folder, root = os.path.abspath(folder), os.path.abspath(root)
    building = f"{folder}.{os.getpid()}.tmp"
    made: set[str] = set()
    try:
        os.makedirs(building)
        for path in paths:
            target, link = os.path.join(root, path), os.path.join(building, path)
            parent = os.path.dirname(link)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if not os.path.exists(target):
                raise ProtopruneError(f"--links: {target} does not exist; embed again, or give --root where it is now")
            if hard:
                os.link(os.path.realpath(target), link)  # a hard link of a relative symbolic one would lead nowhere
            else:
                os.symlink(target, link)
        os.replace(building, folder)
    except OSError as error:
        raise ProtopruneError(
            f"--links {folder}: {error.strerror} ({error.filename2 or error.filename})"
            + ("; hard links cannot cross file systems, use symbolic ones" if hard else "")
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)  # only links, and only what this call made


def check_free(folder: str | os.PathLike) -> None:
    """Raise UsageError unless a folder of links can be made here: nothing is there, or an empty folder."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UsageError(f"--links {folder}: exists and is not empty; remove it or choose another folder")


# --- long writes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(out: str) -> Iterator[None]:
    """Hold `<out>.lock` while writing; a second process is refused at once. The lock dies with its process."""
    import fcntl

    path = out + ".lock"
    try:
        file = _locked(path, fcntl)
    except BlockingIOError:
        with contextlib.suppress(OSError), open(path) as holder:
            who = holder.read().strip()
        raise ProtopruneError(f"{out}: another protoprune is writing it ({who or path}); wait for it to end") from None
    except OSError as error:
        raise ProtopruneError(f"{path}: {error.strerror}; choose an output in a folder that can be written") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        file.close()


def _locked(path: str, fcntl):
    while True:
        file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            if not _flock(file, path, fcntl):
                return file
            if os.path.exists(path) and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {os.uname().nodename}")
                file.flush()
                return file
        except OSError:
            file.close()
            raise
        file.close()  # its holder removed it between our open and our flock: this lock guards nothing


def _flock(file, path: str, fcntl) -> bool:
    """Take the lock; False on a file system that has none (Lustre, some NFS), where the run goes on without."""
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


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- rows of CSV ------------------------------------------------------------------------------------------------------


def csv_bytes(header: Sequence[str], records: Iterable[Iterable]) -> bytes:
    """A CSV file in which every name that Linux allows survives."""
    lines: list[str] = []
    # csv quotes only the line ends that it writes itself: with "\r\n" a name that holds a lone "\r" survives too.
    file = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows(records)
    return os.fsencode("".join(lines))


def table_csv(rows: Sequence[dict]) -> bytes:
    """A CSV file of dicts with plain values; what a row lacks, None and NaN become empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([plain_cell("" if row.get(name) is None else row[name]) for name in columns] for row in rows)
    return csv_bytes(columns, cells)


def plain_number(value: np.floating) -> float | str:
    """A score in its type's shortest exact form; empty where there is none."""
    return float(str(value)) if np.isfinite(value) else ""


def plain_cell(value):
    """A value as csv and json write it: a float in its shortest exact form, empty where it is not finite."""
    if isinstance(value, (float, np.floating)):
        return plain_number(value)
    return value.item() if isinstance(value, np.generic) else value
