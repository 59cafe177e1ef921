"""Worker processes on this machine, one a device: each asks for a shard, embeds it, and asks for the next.

A worker that dies (out of memory, `kill -9`) is started again and its shard given to somebody, a few times; what it had
committed is in the partial file. Workers that lose the parent end by themselves after the shard in hand.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

from protoprune.errors import ProtopruneError, UsageError, ignore_pillow, warn

_TRIES = 3  # for a shard whose worker died, and for a worker that dies without one


def parse_devices(text: str) -> list[str]:
    """'all' (every GPU, or the CPU), '0,1' (these GPUs), 'cpu,cpu' (two processes that share the cores)."""
    import torch

    if text == "all":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    names = [f"cuda:{one}" if one.isdecimal() else one for one in (part.strip() for part in text.split(","))]
    if not all(names) or len({name.partition(":")[0] for name in names}) != 1:
        raise UsageError(f"--devices {text}: expected all, or devices of one kind such as 0,1 or cpu,cpu")
    return names


@dataclass
class _Worker:
    device: str
    process: multiprocessing.Process
    connection: object
    task: object = None  # what it is working on


def run(work: Callable, start: Callable, tasks: Sequence, devices: Sequence[str]) -> Iterator:
    """The results of `work(state, task)` for every task, as they come, from one process a device.

    `start(device)` makes a worker's state, in the worker. Both must be picklable. A ProtopruneError of either ends the
    run; a task whose worker dies _TRIES times too.
    """
    context = multiprocessing.get_context("spawn")
    left = deque(tasks)
    tries: dict = {}
    workers: list[_Worker] = []
    deaths = 0
    try:
        for number, device in enumerate(devices[: len(left)]):
            workers.append(_launch(context, work, start, device, number, len(devices)))
        while left or any(worker.task is not None for worker in workers):
            for worker in workers:
                if worker.task is None:
                    _give(worker, left)
            busy = [worker for worker in workers if worker.task is not None]
            ready = wait([worker.connection for worker in busy])
            for number, worker in enumerate(workers):
                if worker.task is None or worker.connection not in ready:
                    continue
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    task, worker.task = worker.task, None
                    tries[task] = tries.get(task, 0) + 1
                    deaths += 1
                    _bury(worker, task, tries[task])
                    left.appendleft(task)
                    workers[number] = _launch(context, work, start, worker.device, number, len(devices))
                    continue
                if kind == "error":
                    raise value
                worker.task = None
                yield value
    finally:
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _launch(context, work, start, device: str, number: int, of: int) -> _Worker:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work, start, device, number, of), daemon=True)
    process.start()
    there.close()
    return _Worker(device, process, here)


def _give(worker: _Worker, left: deque) -> None:
    if left:
        worker.task = left.popleft()
        with contextlib.suppress(OSError):  # it died meanwhile: its end of the pipe says so
            worker.connection.send(worker.task)


def _bury(worker: _Worker, task, tries: int) -> None:
    worker.process.join()
    how = f"was killed by signal {-worker.process.exitcode}" if worker.process.exitcode < 0 else "died"
    name = getattr(task, "name", task)
    if tries >= _TRIES:
        raise ProtopruneError(
            f"the worker on {worker.device} {how} {tries} times at {name} (out of memory?); what is done is kept: try "
            "fewer --devices or a smaller --batch-size"
        )
    warn(f"the worker on {worker.device} {how} at {name}; a new one goes on")


def _serve(connection, work, start, device: str, number: int, of: int) -> None:
    """A worker's life. Interrupts are the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_pillow()
    if device == "cpu" and of > 1:
        _share_cores(number, of)
    try:
        state = start(device)
        while True:
            connection.send(("result", work(state, connection.recv())))
    except ProtopruneError as error:
        connection.send(("error", error))
    except (EOFError, OSError):  # the parent is gone
        pass


def _share_cores(number: int, of: int) -> None:
    """This process's share of the cores, so that the workers do not crowd each other."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        every = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(every[number::of]) or {every[number % len(every)]})
        torch.set_num_threads(max(1, len(every) // of))
