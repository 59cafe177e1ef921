"""Threads that decode images, each of which may be given up: no image holds up the others for long, nor Ctrl-C at all.

A thread inside a C library cannot be stopped, so one whose image takes too long is left to itself: its place is marked,
another thread does the rest, and what it comes back with is thrown away. The bound is CPU time, so that it says
something of the image and nothing of how busy the machine is. Knows nothing of batches, encoders or feature files.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

from protoprune.errors import ProtopruneError
from protoprune.images.decode import ImageError, Status

# CPU time of one image: an ordinary one takes milliseconds, one of MAX_PIXELS of noise 1 s in JPEG, 4 s in PNG, 26 s in
# JPEG XL and 56 s in JPEG 2000 (lossless).
IMAGE_SECONDS = 120
_SILENCE = 600  # wall time of an image that takes no CPU time: a file system that does not answer
_TICK = 0.25  # seconds between two looks at the clock
_MOST_LOST = 16  # threads that are given up and still busy

Work = Callable[[int], tuple[np.ndarray | None, str]]  # item -> its pixels, and a note; raises ImageError
Take = Callable[[int, np.ndarray | None], None]  # place in the part, pixels; None for an image that cannot be used


class Part:
    """A few images for one thread: `take` is called with what `work` made of each, in order."""

    def __init__(self, items: Sequence[int], take: Take) -> None:
        self.items, self.take = items, take
        self.outcome: list[tuple[Status, str]] = []  # of the first images
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.since: tuple[float, float] | None = None  # wall and CPU time at which its thread began the next image
        self.thread: _Thread | None = None

    def settle(self, place: int, pixels: np.ndarray | None, outcome: tuple[Status, str]) -> bool:
        """Take the result of an image; False when that has been given up meanwhile."""
        with self.lock:
            if len(self.outcome) != place or self.finished.is_set():
                return False
            self.take(place, pixels)
            self.outcome.append(outcome)
            self.since = None
            return True


class _Thread(threading.Thread):
    """Does part after part; a daemon, so that the end of the program does not wait for it."""

    def __init__(self, crew: Crew, first: Part | None = None) -> None:
        super().__init__(daemon=True, name="decode")
        self.crew, self.first, self.relieved = crew, first, False
        self.clock: int | None = None
        self.start()

    def run(self) -> None:
        try:
            self.crew.set_up()
        except BaseException as error:
            self.crew.broken = error
            return
        with contextlib.suppress(AttributeError, OSError):  # macOS has no clock for each thread
            self.clock = time.pthread_getcpuclockid(threading.get_ident())
        part = self.first or self.crew.queue.get()
        while part is not None and not self.crew.closed and self._do(part):
            part = self.crew.queue.get()

    def _do(self, part: Part) -> bool:
        """Do the rest of a part; False when it was given up, and with it this thread, or left to another one."""
        part.thread = self
        self.crew.busy.add(part)
        try:
            for place in range(len(part.outcome), len(part.items)):
                if self.crew.closed or self.relieved:
                    self.crew.busy.discard(part)
                    self.crew.queue.put(part)
                    return False
                part.since = time.monotonic(), self.used()
                pixels, outcome = self._one(part.items[place])
                if not part.settle(place, pixels, outcome):
                    return False
        except BaseException as error:  # not of an image: the one who waits for the part must see it
            if part.thread is not self:
                return False
            part.error = error
        self.crew.busy.discard(part)
        part.finished.set()
        return True

    def _one(self, item: int) -> tuple[np.ndarray | None, tuple[Status, str]]:
        try:
            pixels, note = self.crew.work(item)
            return pixels, (Status.OK, note)
        except ImageError as error:
            return None, (error.status, error.reason)
        except MemoryError:
            return None, (Status.UNREADABLE, "not enough memory to read it")

    def used(self) -> float:
        """CPU seconds of this thread so far; 0 where nobody counts them."""
        try:
            return time.clock_gettime(self.clock) if self.clock is not None else 0.0
        except OSError:  # it has ended
            return 0.0


class Crew:
    """`count` threads that call `work(item)` -> (pixels, note), or ImageError; `set_up` is called in each at its start.

    A context manager: at its end the threads go home, but nobody waits for one that is busy with an image for long.
    """

    def __init__(self, count: int, work: Work, set_up: Callable[[], None] = lambda: None) -> None:
        self.work, self.set_up, self.closed = work, set_up, False
        self.queue: SimpleQueue[Part | None] = SimpleQueue()
        self.busy: set[Part] = set()
        self.broken: BaseException | None = None
        self.lost: list[_Thread] = []
        self.relieved: list[_Thread] = []
        self.threads = [_Thread(self) for _ in range(count)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True
        for _ in self.threads + self.relieved:
            self.queue.put(None)
        until = time.monotonic() + 2 * _TICK
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))

    def start(self, items: Sequence[int], take: Take) -> Part:
        """Have the items done by the next thread that is free. `take(place, pixels)` is called there, with None for an
        image that cannot be used."""
        part = Part(items, take)
        self.queue.put(part)
        return part

    def relieve(self, set_up: Callable[[], None]) -> None:
        """Have new threads, with another set-up, go on after the image that each of these is at."""
        self.set_up = set_up
        for thread in self.threads:
            thread.relieved = True
        self.relieved += self.threads
        self.threads = [_Thread(self) for _ in self.threads]

    def results(self, part: Part) -> list[tuple[Status, str]]:
        """Status and note or reason of each item of a part, when all are done or given up."""
        while not part.finished.wait(_TICK):  # and not for ever: an interrupt is answered in between
            if self.broken is not None:
                raise self.broken
            for one in list(self.busy):
                self._judge(one)
        if part.error is not None:
            raise part.error
        return part.outcome

    def _judge(self, part: Part) -> None:
        """Give up the image that a part is at when it takes too long; another thread goes on after it."""
        with part.lock:
            if part.since is None or part.thread is None or part.finished.is_set():
                return
            wall, used = time.monotonic() - part.since[0], part.thread.used() - part.since[1]
            counted = part.thread.clock is not None
            if used > IMAGE_SECONDS or (not counted and wall > _SILENCE):
                outcome = Status.TOO_SLOW, f"not decoded within {IMAGE_SECONDS} seconds of CPU time"
            elif wall > _SILENCE and used < 1:
                outcome = Status.UNREADABLE, f"the file system gave no answer within {_SILENCE // 60} minutes"
            else:
                return
            part.take(len(part.outcome), None)
            part.outcome.append(outcome)
            part.since = None
            self.lost = [thread for thread in self.lost if thread.is_alive()] + [part.thread]
            if part.thread in self.threads:
                self.threads.remove(part.thread)
            part.thread = None
            self.busy.discard(part)
        if len(self.lost) > _MOST_LOST:
            raise ProtopruneError(
                f"{len(self.lost)} images were given up and are still being decoded; they are marked, and what is done "
                "is kept: run it again, which leaves them out"
            )
        if len(part.outcome) == len(part.items):
            part.finished.set()
            self.threads.append(_Thread(self))
        else:
            self.threads.append(_Thread(self, part))
