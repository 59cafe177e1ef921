"""How much memory is free, for those who take much of it at once; and where containers say how much is theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator

_GROUPS, _OWN = "/sys/fs/cgroup", "/proc/self/cgroup"  # of Linux, where containers and schedulers set bounds


def free_memory() -> int | None:
    """Bytes that this process can take without swapping; None where the system does not say (only Linux does)."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    for folder in control_groups("memory"):
        bound = _first_number(folder, "memory.max", "memory.limit_in_bytes")
        used = _first_number(folder, "memory.current", "memory.usage_in_bytes")
        if bound is not None and used is not None:
            free = min(free, max(0, bound - used + _cached(folder)))
    return free


def control_groups(kind: str) -> Iterator[str]:
    """The folders of the control groups that bound this process, of version 2 and of 1, the innermost first."""
    try:
        with open(_OWN) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, kinds, path in lines:
        if not kinds or kind in kinds.split(","):
            parts = [part for part in path.split("/") if part]
            for count in range(len(parts), -1, -1):
                yield os.path.join(_GROUPS, *([kind] if kinds else []), *parts[:count])


def words_of(folder: str, name: str) -> list[str]:
    """What a file of such a folder says, where it is there."""
    try:
        with open(os.path.join(folder, name)) as file:
            return file.read().split()
    except OSError:
        return []


def _first_number(folder: str, *names: str) -> int | None:
    """What the first of these files says that is there and says a number."""
    return next((int(words[0]) for name in names if (words := words_of(folder, name)) and words[0].isdecimal()), None)


def _cached(folder: str) -> int:
    """Bytes of files that the system holds in memory as long as nobody else wants it."""
    words = words_of(folder, "memory.stat")
    return next((int(size) for name, size in zip(words[::2], words[1::2], strict=False)
                 if name in ("inactive_file", "total_inactive_file")), 0)  # fmt: skip
