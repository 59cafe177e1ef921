"""Worker processes on this machine, one a device: each asks for a shard, embeds it, and asks for the next.

A worker that dies (out of memory, `kill -9`) is started again and its shard given to somebody, a few times; what it had
committed is in the partial file. Workers that lose the parent end at once, so that the same command, given again, finds
no shard in other hands. What is handed out to whom (`Tasks`) is the same on a cluster, see `cluster`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError, ignore_pillow, warn

_END_SECONDS = 5  # for a worker without a task to end by itself

State = TypeVar("State")  # what a worker has ready for every task
Task = TypeVar("Task", bound=Hashable)
Result = TypeVar("Result")
Work = Callable[[State, Task, Task | None], Result]  # (state, task, the one that will be next or None)


def parse_devices(text: str) -> list[str]:
    """'all' (every GPU, or the CPU), '0,1' (these GPUs), 'cpu,cpu' (two processes that share the cores)."""
    import torch

    if text == "all":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    names = [f"cuda:{one}" if one.isdecimal() else one for one in (part.strip() for part in text.split(","))]
    if not all(names) or len({name.partition(":")[0] for name in names}) != 1:
        raise UsageError(f"--devices {text}: expected all, or devices of one kind such as 0,1 or cpu,cpu")
    count = torch.cuda.device_count()
    if not count and any(name.startswith("cuda") for name in names):
        raise UsageError(
            f"--devices {text}: torch finds no NVIDIA GPU on this machine; leave --devices out, or give cpu,cpu"
        )
    if not set(names) <= {"cpu", "cuda", "mps", *(f"cuda:{number}" for number in range(count))}:
        raise UsageError(f"--devices {text}: this machine has {count:,} GPUs, numbered from 0")
    return names


@dataclass
class Lost(Generic[Task]):
    """A task whose workers died, one after the other."""

    task: Task
    reason: str


class Tasks(Generic[Task]):
    """Tasks, handed out to workers: one in hand, and one set aside for it, which it begins early.

    Nothing is set aside while there may be no task left for another worker.
    """

    def __init__(self, tasks: Sequence[Task], tries: int) -> None:
        self._left = deque(tasks)
        self._aside: dict[int, Task] = {}  # number of a worker -> task
        self._working: set[int] = set()  # numbers of the workers that have had a task
        self._tries = tries
        self._deaths: Counter[Task | None] = Counter()
        self._worked = False  # whether any task was done

    def __len__(self) -> int:
        """How many nobody has in hand."""
        return len(self._left) + len(self._aside)

    @property
    def unclaimed(self) -> int:
        """How many anybody may take."""
        return len(self._left)

    def take(self, worker: int) -> tuple[Task, Task | None] | None:
        """(a task, the one that is set aside for this worker); None when there is none for it."""
        if worker not in self._aside and not self._left:
            return None
        task = self._aside.pop(worker) if worker in self._aside else self._left.popleft()
        if worker in self._working and len(self._left) >= len(self._working):
            self._aside[worker] = self._left.popleft()
        self._working.add(worker)
        return task, self._aside.get(worker)

    def done(self) -> None:
        """A worker did its task: not all of them die."""
        self._worked = True
        self._deaths.pop(None, None)

    def died(self, worker: int, task: Task | None, how: str) -> Lost[Task] | None:
        """A worker is dead; the task that it had goes to the end of the queue, or is lost after so many tries.

        Raises ProtopruneError when every worker dies, so that none of them will do any better.
        """
        if worker in self._aside:
            self._left.appendleft(self._aside.pop(worker))
        self._deaths[task] += 1
        where = f" at {_name(task)}" if task is not None else ""
        if self._deaths[task] < self._tries:
            warn(f"{how}{where}; a new one goes on")
            if task is not None:
                self._left.append(task)
            return None
        if task is None or not self._worked:
            raise ProtopruneError(
                f"{how}{where}, for the {_nth(self._tries)} time (out of memory?); what is done is kept: try fewer "
                "workers or a smaller --batch-size"
            )
        return Lost(task, f"{how}, for the {_nth(self._tries)} time (out of memory?)")


def _name(task: object) -> str:
    return str(getattr(task, "name", task))


def _nth(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


@dataclass
class _Worker(Generic[Task]):
    device: str
    process: SpawnProcess
    connection: Connection
    task: Task | None = None  # what it is working on


def run(
    work: Work[State, Task, Result],
    start: Callable[[str], State],
    tasks: Sequence[Task],
    devices: Sequence[str],
    tries: int = 3,
) -> Iterator[Result | Lost[Task]]:
    """The results of `work(state, task, next task or None)` for every task, as they come, from a process a device.

    `start(device)` makes a worker's state, in the worker; its `close()` is called at the end. Both must be picklable. A
    task whose worker dies `tries` times gives a `Lost`. A ProtopruneError of `work` or `start` ends the run, and so do
    workers that all die.
    """
    # As bytes: multiprocessing would share the weights through /dev/shm, of which containers have 64 MB or none. Not as
    # an argument of the process: its parent waits for ever where one dies before it has read so much.
    code = pickle.dumps((work, start))
    todo = Tasks(tasks, tries)
    workers: list[_Worker[Task]] = []
    said: set[str] = set()
    try:
        for number, device in enumerate(devices[: len(todo)]):
            workers.append(_launch(device, number, len(devices)))
        while len(todo) or any(worker.task is not None for worker in workers):
            for number, worker in enumerate(workers):
                if worker.task is None and (given := todo.take(number)) is not None:
                    _give(worker, *given)
            for number in _ready(workers):
                worker = workers[number]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    lost = todo.died(number, worker.task, _death(worker))
                    workers[number] = _launch(worker.device, number, len(devices))
                    if lost is not None:
                        yield lost
                    continue
                if kind == "result":
                    worker.task = None
                    todo.done()
                    yield value
                else:
                    _answer(worker, kind, value, code, said)
    finally:
        _dismiss(workers)


def _answer(worker: _Worker[Task], kind: str, value: Any, code: bytes, said: set[str]) -> None:
    """Do what a worker's message that is no result asks for; an error of its ends the run."""
    if kind == "error":
        raise value
    if kind == "warning" and value not in said:  # of several workers once
        said.add(value)
        warn(value)
    if kind == "code":
        with contextlib.suppress(OSError):  # it died meanwhile, and the next `recv` says so
            worker.connection.send_bytes(code)


def _launch(device: str, number: int, of: int) -> _Worker[Task]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, device, number, of), daemon=True)
    process.start()
    there.close()
    return _Worker(device, process, here)


def _ready(workers: Sequence[_Worker[Task]]) -> list[int]:
    """Numbers of the workers that have something to say, or died; waits for the first."""
    busy = {worker.connection: number for number, worker in enumerate(workers) if worker.task is not None}
    ready = wait(list(busy))
    return [number for connection, number in busy.items() if connection in ready]


def _dismiss(workers: Sequence[_Worker[Task]]) -> None:
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.connection.close()
    for worker in workers:
        worker.process.join(_END_SECONDS if worker.task is None else 0)
        worker.process.terminate()
    for worker in workers:
        worker.process.join()


def _give(worker: _Worker[Task], task: Task, ahead: Task | None) -> None:
    worker.task = task
    with contextlib.suppress(OSError):  # it died meanwhile: its end of the pipe says so
        worker.connection.send((task, ahead))


def _death(worker: _Worker[Task]) -> str:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else "died"
    return f"the worker on {worker.device} {how}"


def _serve(connection: Connection, device: str, number: int, of: int) -> None:
    """A worker's life: with its first task it asks for `work` and `start`. Interrupts are the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    state: Any = None
    one_by_one = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with one_by_one:
            connection.send((kind, value))

    ignore_pillow()
    _tell_warnings(send)
    if device == "cpu" and of > 1:
        _share_cores(number, of)
    try:
        task, ahead = connection.recv()
        send("code", None)
        work, start = pickle.loads(connection.recv_bytes())
        state = start(device)
        while True:
            send("result", work(state, task, ahead))
            task, ahead = connection.recv()
    except ProtopruneError as error:
        send("error", error)
    except (EOFError, OSError):  # the parent is gone, or has no more tasks
        pass
    finally:
        if state is not None and hasattr(state, "close"):
            state.close()


def _tell_warnings(send: Callable[[str, Any], None]) -> None:
    """Have the parent show what this process warns of, in its own way."""
    otherwise = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ProtopruneWarning):
            with contextlib.suppress(OSError):
                send("warning", str(message))
        else:
            otherwise(message, category, *where, **more)

    warnings.simplefilter("always", ProtopruneWarning)
    warnings.showwarning = show


def _end_with_parent() -> None:
    """A parent that is killed closes nothing in order, and an orphan would hold its shard, and a GPU, for minutes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _share_cores(number: int, of: int) -> None:
    """This process's share of the cores, so that the workers do not crowd each other."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        every = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(every[number::of]) or {every[number % len(every)]})
        torch.set_num_threads(max(1, len(every) // of))
