"""Progress on stderr: a rich bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import typer

from protoprune.units import duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_PLAIN_SECONDS = 10.0


# What would break a line, move the cursor, or (the last two ranges) turn the order of what follows it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def say(text: str) -> None:
    """One line on stderr, whatever the names in it (see `printable`). A stderr that is full or closed is no error."""
    if sys.stderr is None:  # `2>&-`, where print() would turn to stdout
        return
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text as one line that does nothing to a terminal: what file names may hold is escaped, control characters and
    line breaks as well as bytes that are not UTF-8."""
    plain = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return plain.encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def resumable(kept: str | Callable[[], str] | None) -> Iterator[None]:
    """Ctrl-C ends the work within in two lines: what is kept of it, and how to go on. None: nothing is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is None:
            say("interrupted: without -o nothing is kept")
        else:
            say(f"interrupted: {kept if isinstance(kept, str) else kept()}; to go on, run the same again:")
            # without --overwrite, which would throw away what is done
            again = [one for one in sys.argv[1:] if one != "--overwrite"]
            say(f"  {shlex.join(['protoprune', *again])}")
        raise typer.Exit(130) from None


class Progress(AbstractContextManager["Progress"]):
    """Call `start(total)` once and `update(done, failed)` as often as you like; rate and time left are its own."""

    def __init__(self, what: str, unit: str = "img") -> None:
        self.what, self.unit = what, unit
        self._bar: Bar | None = None
        self._total = 0
        self._started = self._shown = 0.0

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
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn(self.what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} " + self.unit + "/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task(self.what, total=total, rate="0", failed="")

    def show(self, done: int, total: int) -> None:
        """`update`, for work whose size is first said with a step of it."""
        if not self.started:
            self.start(total)
        self.update(done)

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

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
