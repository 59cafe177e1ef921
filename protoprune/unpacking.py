"""How much may come out of what is packed: a file of a few MB may hold terabytes of zeros.

Into memory goes a share of what is free there, onto the disk what is free in the folder of temporary files.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from contextlib import ExitStack
from typing import IO

from protoprune.errors import ProtopruneError
from protoprune.memory import free_memory
from protoprune.units import bytes_text

_LEAST_MEMORY = 400_000_000  # bytes, of which a share may be taken whatever is free
_ASSUMED = 16_000_000_000  # bytes of free memory where the system does not say
_LEAST_DISK = 1_000_000_000
# Images hardly get smaller by packing, bitmaps of a single colour 1,032 times by deflate and a million times by bzip2.
_TIMES = 300


def memory_share(parts: int) -> int:
    """Bytes that may be taken: one of so many parts of the free memory."""
    return max(_LEAST_MEMORY, free_memory() or _ASSUMED) // parts


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, count: int | None = None) -> bytes:
    """A member of a zip, or its first `count` bytes: never more than the zip says that it has. Raises whatever zipfile
    does."""
    with archive.open(info) as member:
        # Of bzip2 and LZMA zipfile unpacks at once what it has read, and 40 bytes may be 45 MB: so it reads little.
        member.MIN_READ_SIZE = 64  # type: ignore[attr-defined] # of a ZipExtFile, which `open` is typed without
        if count is not None:
            return member.read(count)
        step = 1 << 20 if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 64
        return b"".join(iter(lambda: member.read(step), b""))


class TooMuchError(ProtopruneError):
    """What is packed does not fit, or cannot be meant; without the name of the file."""


def no_room(error: Exception, folder: str) -> TooMuchError | None:
    """What to say of a disk that was full when something was written to the folder of temporary files; None for any
    other trouble."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return TooMuchError(f"no room for it in {folder} ({os.strerror(number)}); TMPDIR names another place")


class Spool:
    """An unnamed temporary file (in $TMPDIR) for what is in a file of `packed` bytes; it is closed with the stack.

    Raises TooMuchError for more than there is room for, or than can be meant.
    """

    def __init__(self, packed: int, stack: ExitStack) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free * 9 // 10
        times = max(_LEAST_DISK, _TIMES * packed)
        self._most = min(free, times)
        self._why = f"nine tenths of what is free in {folder}" if free < times else f"{_TIMES} times its size"
        self._folder = folder
        self.file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.size = 0

    def add(self, data: bytes) -> tuple[int, int]:
        """Write; (offset, bytes) of it."""
        place = self.size, len(data)
        self.size += len(data)
        if self.size > self._most:
            raise TooMuchError(f"unpacks to more than {bytes_text(self._most)}, {self._why}")
        try:
            self.file.write(data)
        except OSError as error:
            raise no_room(error, self._folder) or error from None
        return place

    def flush(self) -> None:
        """Everything is in the file then."""
        try:
            self.file.flush()
        except OSError as error:
            raise no_room(error, self._folder) or error from None
