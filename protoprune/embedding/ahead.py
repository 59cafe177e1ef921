"""Work in two halves, of which the first is done ahead of its turn, beside the second one of what came before it.

The work is a generator that yields once, when it is ready; `Begun` runs it up to there in a thread, and whoever asks
for the result runs the rest. So what holds a device stays with one thread, which an interrupt reaches.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Generic, TypeVar, cast

Result = TypeVar("Result")
Halves = Generator[None, None, Result]
_DROP_SECONDS = 2  # for a first half that nobody wants any more; it is a daemon's, and ends with the program


def whole(work: Halves[Result]) -> Result:
    """The result of both halves, one after the other."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(Result, end.value)


class Begun(Generic[Result]):
    """Work whose first half is under way in a thread."""

    def __init__(self, work: Halves[Result]) -> None:
        self._work, self._lock, self._dropped = work, threading.Lock(), False
        self._ready = threading.Event()
        self._ended: BaseException | None = None  # how the first half did, where there is no second one
        self._thread = threading.Thread(target=self._begin, daemon=True, name="ahead")
        self._thread.start()

    def _begin(self) -> None:
        try:
            next(self._work)
        except BaseException as end:
            self._ended = end
        with self._lock:
            self._ready.set()
            if self._dropped:
                self._work.close()

    def wait(self) -> None:
        """Until the first half is done, however it ended."""
        self._ready.wait()

    def result(self) -> Result:
        """Do the second half. Raises what either of them raises."""
        self._ready.wait()
        if isinstance(self._ended, StopIteration):
            return cast(Result, self._ended.value)
        if self._ended is not None:
            raise self._ended
        return whole(self._work)

    def drop(self) -> None:
        """Give it up: what it holds is let go as soon as the first half is done."""
        with self._lock:
            self._dropped = True
            if self._ready.is_set():
                self._work.close()
        self._thread.join(_DROP_SECONDS)
