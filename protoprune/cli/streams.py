"""The standard streams of the process: what becomes of a command when one is closed, full, or nobody reads it any more.

stdout carries the answer: one that cannot be written ends the command, and a reader that has had enough (`| head`) is
no error. stderr carries what is said about it, and never ends a command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import IO

from protoprune.errors import ProtopruneError

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO)


def open_closed() -> None:
    """Let closed streams (`2>&-`) lead nowhere: else the next file that is opened would get the stream's number, and
    what a library writes to stderr would end up in a feature file. A closed stdout stays None for those who ask."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - for good


def need_stdout(*files: object) -> None:
    """ProtopruneError where the answer would be lost, before it takes its time: stdout is closed (`>&-`), and none of
    the files that can take its place is asked for."""
    if sys.stdout is None and not any(files):
        raise ProtopruneError("standard output is closed, and the answer would be lost; leave it open, or give a file")


def stdout_failed(error: OSError) -> bool:
    """Whether this error is stdout's, whose writes have no file's name in their errors (those of files get one in
    `protoprune.files`). What is left in it then leads nowhere, so that none follows at exit."""
    if sys.stdout is None or error.filename is not None or error.errno not in _WRITING:
        return False
    if error.strerror != os.strerror(error.errno):  # HDF5's, in words of its own
        return False
    silence(sys.stdout)
    return True


def silence(stream: IO[str]) -> None:
    """Let what is still to be written to a stream lead nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # one without a number: of a test
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
