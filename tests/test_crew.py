"""Decoding threads: every item has its result, one that takes too long is given up, and nobody waits for it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from protoprune.errors import ProtopruneError
from protoprune.images import crew as module
from protoprune.images.crew import Crew
from protoprune.images.decode import ImageError, Status


def collect(work, items, count=2, parts=3) -> tuple[list, dict]:
    """(outcomes, what was taken for each item) of a crew that has the items in several parts."""
    taken = {}
    step = -(-len(items) // parts)
    with Crew(count, work) as crew:
        started = []
        for first in range(0, len(items), step):
            part = items[first : first + step]
            started.append(crew.start(part, lambda place, pixels, part=part: taken.update({part[place]: pixels})))
        return [one for part in started for one in crew.results(part)], taken


def twice(item: int):
    if item % 4 == 3:
        raise ImageError(Status.CORRUPT, f"no {item}")
    return np.array([2 * item]), "even" if item % 2 == 0 else ""


@pytest.mark.parametrize("count", [1, 3])
def test_every_item_has_its_result_in_order(count):
    outcome, taken = collect(twice, list(range(10)), count)
    assert outcome == [
        (Status.CORRUPT, f"no {item}") if item % 4 == 3 else (Status.OK, "even" if item % 2 == 0 else "")
        for item in range(10)
    ]
    assert {item: None if pixels is None else pixels[0] for item, pixels in taken.items()} == {
        item: None if item % 4 == 3 else 2 * item for item in range(10)
    }


def test_want_of_memory_is_the_items_trouble_and_any_other_error_ends_the_run():
    def work(item):
        raise MemoryError if item == 1 else KeyError("a mistake of ours")

    assert collect(work, [1], parts=1)[0] == [(Status.UNREADABLE, "not enough memory to read it")]
    with pytest.raises(KeyError, match="a mistake of ours"):
        collect(work, [1, 2])


def burn(event: threading.Event) -> None:
    """Use CPU time until the event."""
    until = time.monotonic() + 30
    while not event.is_set() and time.monotonic() < until:
        sum(range(2000))


def test_an_image_that_takes_too_much_cpu_time_is_given_up_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_SECONDS", 0.2)
    let_go, came_back = threading.Event(), threading.Event()

    def work(item):
        if item in (1, 5):
            burn(let_go)
            came_back.set()
        return np.array([item]), ""

    outcome, taken = collect(work, list(range(6)), count=1)
    assert [status for status, _ in outcome] == [Status.TOO_SLOW if i in (1, 5) else Status.OK for i in range(6)]
    assert outcome[1][1] == "not decoded within 0.2 seconds of CPU time"
    assert taken[1] is None
    assert taken[4] == [4]
    let_go.set()  # what it comes back with is thrown away
    assert came_back.wait(30)
    time.sleep(0.05)
    assert taken[1] is None
    assert taken[5] is None
    assert len(outcome) == 6


def test_an_image_that_waits_for_a_busy_machine_is_not_given_up_but_for_silence_it_is(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_SECONDS", 0.2)
    let_go = threading.Event()

    def work(seconds):
        let_go.wait(seconds)  # no CPU time
        return np.array([seconds]), ""

    assert collect(work, [1])[0] == [(Status.OK, "")]
    monkeypatch.setattr(module, "_SILENCE", 0.5)
    assert collect(work, [60])[0][0][0] == Status.UNREADABLE
    let_go.set()


def test_the_end_does_not_wait_for_an_image(monkeypatch):
    let_go = threading.Event()
    with Crew(2, lambda item: let_go.wait(30)) as crew:
        crew.start([1, 2], lambda *_: None)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    let_go.set()


def test_too_many_that_never_end_are_an_error_that_says_the_way_on(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_MOST_LOST", 2)
    let_go = threading.Event()
    with pytest.raises(ProtopruneError, match=r"3 images were given up .* run it again"):
        collect(lambda item: burn(let_go), list(range(6)), count=2)
    let_go.set()


@pytest.mark.parametrize("count", [1, 2])
def test_threads_can_be_relieved_by_others_with_another_set_up(count):
    """Each finishes the image that it is at; nothing is done twice, and all of it is done."""
    at, go_on, done, names = threading.Event(), threading.Event(), [], {}

    def work(item):
        done.append(item)
        names[item] = threading.current_thread()
        if item == 1:
            at.set()
            go_on.wait(30)
        return np.array([item]), ""

    set_ups = []
    with Crew(count, work, lambda: set_ups.append("first")) as crew:
        parts = [crew.start([first, first + 1, first + 2], lambda *_: None) for first in (0, 3, 6)]
        assert at.wait(30)
        while len(set_ups) < count:
            time.sleep(0.001)
        old = list(crew.threads)
        crew.relieve(lambda: set_ups.append("second"))
        go_on.set()
        outcome = [one for part in parts for one in crew.results(part)]
    for thread in old + crew.threads:  # one that had nothing to do waited until now
        thread.join(30)
    assert outcome == [(Status.OK, "")] * 9
    assert sorted(done) == list(range(9))
    assert set_ups == ["first"] * count + ["second"] * count
    assert names[1] in old
    assert names[2] not in old
    assert not any(thread.is_alive() for thread in old)


def test_a_set_up_that_fails_ends_the_run():
    def set_up():
        raise OSError("no such thing")

    with Crew(2, twice, set_up) as crew, pytest.raises(OSError, match="no such thing"):
        crew.results(crew.start([1], lambda *_: None))
