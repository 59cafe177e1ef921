"""How much memory is free, for those who take much of it at once."""

from __future__ import annotations


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say (only Linux does)."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
