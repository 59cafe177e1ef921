"""Progress on stderr: a rich bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from contextlib import AbstractContextManager

_PLAIN_SECONDS = 10.0


def say(text: str) -> None:
    """One line on stderr; names that are not UTF-8 are shown escaped. A stderr that is full or closed is no error."""
    if sys.stderr is None:  # `2>&-`, where print() would turn to stdout
        return
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with the odd bytes of names that are not UTF-8 escaped."""
    return text.encode(errors="backslashreplace").decode()


def duration(seconds: float) -> str:
    """'8.4 s', '3m12s', '2h05m'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def bytes_text(count: float) -> str:
    """'512 bytes', '3.1 kB', '1.2 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


class Progress(AbstractContextManager):
    """Call `start(total)` once and `update(done, failed)` as often as you like; rate and time left are its own."""

    def __init__(self, what: str, unit: str = "img"):
        self.what, self.unit = what, unit
        self._bar = None
        self._total = self._started = self._shown = 0

    @property
    def started(self) -> bool:
        return bool(self._started)

    def start(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        self._shown = self._started
        if sys.stderr is None or not sys.stderr.isatty() or not total:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn(self.what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} " + self.unit + "/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task(self.what, total=total, rate="0", failed="")

    def update(self, done: int, failed: int = 0, note: str = "") -> None:
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        if self._bar:
            trouble = ", ".join(([f"{failed} failed"] if failed else []) + ([note] if note else []))
            self._bar.update(self._task, completed=done, rate=_rate(rate), failed=trouble)
        elif now - self._shown >= _PLAIN_SECONDS or (done == self._total and self._shown > self._started):
            self._shown = now
            left = duration((self._total - done) / rate)
            share = 100 * done / self._total
            speed = f"{_rate(rate)} {self.unit}/s"
            trouble = (f", {note}" if note else "") + (f", {failed} failed" if failed or self.unit == "img" else "")
            say(f"{self.what} {done:,}/{self._total:,} ({share:.0f} %), {speed}, {left} left{trouble}")

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
