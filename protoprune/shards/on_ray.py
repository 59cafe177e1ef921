"""Workers on a Ray cluster: actors of Ray core that ask for a shard, embed it, and ask for the next.

As many actors run as find room; a few more always wait for room, so that machines which join are used within moments
and an autoscaler sees that there is work. An actor that dies, with its machine (spot machines do) or without, gives
its shard back. Actors are not restarted by Ray: a new one is made where there is room. Ray Data is not used: it lost
whole jobs to one damaged file. The encoder travels once through Ray's object store and is unpacked inside each actor:
as an argument of its constructor it can block Ray (ray#53727).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic

from protoprune import __version__
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError, warn
from protoprune.shards.launch import Lost, Result, State, Task, Tasks, Work

if TYPE_CHECKING:
    import ray

_TRIES = 5  # for a task whose workers die: spot machines go through no fault of their own
_WAITING = 2  # actors that wait for room
_REACH_SECONDS = 5  # for the head of a cluster to answer
_TELL_SECONDS = 15  # without a single worker, until that is said
_PATIENCE_SECONDS = 600  # without a single worker: an autoscaler may need minutes for a machine
_LOCAL_STORE = 256 << 20  # bytes of Ray's object store on this machine; the encoder goes through it
_END_SECONDS = 5  # for workers without a task to tidy up
_GPU_CPUS = 16  # CPUs of a GPU worker, at most


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[bool]:
    """Ray, for as long as the block lasts; whether it runs on this machine alone, made for this.

    address: HOST:PORT of the cluster's head, 'auto' for the one that runs on this machine; None: $RAY_ADDRESS, else
    this machine alone. A Ray that the caller has connected to is used, and left as it is.
    """
    ray = _ray()
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    alone = address == "local"
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _LOCAL_STORE} if alone else {}
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except Exception as error:  # Ray raises plain ones too, where it is too slow to start
        text = " ".join(str(error).split())[:160]
        way_on = "try again when the machine is less busy" if alone else "start it with `ray start`"
        raise ProtopruneError(f"--engine ray: no connection to Ray at {address} ({text}); {way_on}") from None
    # Through `shutdown`: the one that Ray sets prints stacks, and aborts.
    _on_sigterm(lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield alone
    finally:
        ray.shutdown()
        _on_sigterm(ended)


def _on_sigterm(handler: Any) -> None:
    with contextlib.suppress(ValueError, TypeError):  # not in the main thread, or not one of Python's
        signal.signal(signal.SIGTERM, handler)


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")  # lines about waiting actors, which are meant to wait
    try:
        import ray
    except ImportError:
        raise ProtopruneError("--engine ray needs Ray, which is not installed; pip install 'protoprune[ray]'") from None
    return ray


def _check_address(address: str) -> None:
    """Ray itself tries for a minute."""
    if "://" in address:
        raise UsageError(
            f"--address {address}: expected HOST:PORT or auto; run it on the cluster, as with `ray job submit`"
        )
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--address {address}: expected HOST:PORT, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise ProtopruneError(
            f"--address {address}: cannot be reached ({error.strerror or error}); check that `ray start --head` runs "
            "there, and the port (6379)"
        ) from None


@dataclass(frozen=True)
class Need:
    """What one worker takes of its machine."""

    device: str  # cuda or cpu
    cpus: int

    @property
    def gpus(self) -> int:
        return int(self.device == "cuda")

    def __str__(self) -> str:
        return f"{'a GPU and ' if self.gpus else ''}{self.cpus:,} CPUs"


def need(device: str = "auto", workers: int | None = None, alone: bool = False) -> Need:
    """A GPU where the cluster has one, with its share of the CPUs; else one CPU. `workers` is the number of CPUs.

    Where no machine is large enough: ProtopruneError when none will join (`alone`), else a warning.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device {device}: Ray chooses the device; expected auto, cuda or cpu with --engine ray")
    nodes = _nodes()
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" or (device == "auto" and shares):
        one = Need("cuda", workers or max(1, min([_GPU_CPUS, *shares] if shares else [1])))
    else:
        one = Need("cpu", workers or 1)
    _check_room(one, nodes, alone)
    return one


def _check_room(need: Need, nodes: list[dict[str, Any]], alone: bool) -> None:
    if any(node.get("CPU", 0) >= need.cpus and node.get("GPU", 0) >= need.gpus for node in nodes):
        return
    most = max(((node.get("GPU", 0), node.get("CPU", 0)) for node in nodes), default=(0, 0))
    what = f"no machine of the cluster has {need} for a worker (the largest: {most[0]:g} GPUs, {most[1]:g} CPUs)"
    if alone:
        raise ProtopruneError(f"--engine ray: {what}; give --device cpu, or fewer --workers")
    warn(f"{what}; waiting up to {_PATIENCE_SECONDS // 60} minutes for one to join")


def _nodes() -> list[dict[str, Any]]:
    """Resources of each machine."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpu_has_bf16() -> bool:
    """Whether the first GPU that the cluster gives computes in bf16."""
    import ray

    def ask() -> bool:
        import torch

        from protoprune.device import native_bf16

        return native_bf16(torch.device("cuda"))

    try:
        return ray.get(ray.remote(num_gpus=1, max_calls=1)(ask).remote(), timeout=_PATIENCE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise ProtopruneError(
            f"--engine ray: no GPU was free for {_PATIENCE_SECONDS // 60} minutes; look at `ray status`"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise ProtopruneError(
            f"--engine ray: a GPU of the cluster cannot be used ({' '.join(str(error.cause).split())[:160]}); mend "
            "CUDA or torch on that machine, or leave the GPUs alone with --device cpu"
        ) from None


class _Actor(Generic[State]):
    """A worker's life, on whatever machine."""

    state: State

    def here(self) -> tuple[str, object]:
        return "here", os.uname().nodename

    def begin(self, start: Callable[[str], State], device: str, version: str) -> tuple[str, object]:
        try:
            if version != __version__:
                raise ProtopruneError(f"has protoprune {__version__}, not {version}; install the same everywhere")
            self.state = start(device)
        except ProtopruneError as error:
            way_on = "; --device cpu leaves the GPUs alone" if "--device cuda" in str(error) else ""
            return "error", type(error)(f"the machine {os.uname().nodename}: {error}{way_on}")
        return "begun", None

    def end(self) -> None:
        if hasattr(self.state, "close"):
            self.state.close()

    def work(
        self, work: Work[State, Task, Result], task: Task, ahead: Task | None
    ) -> tuple[str, Result | ProtopruneError, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ProtopruneWarning)
            try:
                answer: tuple[str, Result | ProtopruneError] = "result", work(self.state, task, ahead)
            except ProtopruneError as error:
                answer = "error", error
        said = [str(one.message) for one in caught if issubclass(one.category, ProtopruneWarning)]
        return *answer, said


@dataclass
class _Worker(Generic[Task]):
    actor: Any  # a handle, whose methods Ray makes
    number: int
    task: Task | None = None
    node: str = ""  # '' until it has found room


@dataclass
class _Crew(Generic[State, Task, Result]):
    """The actors of one run."""

    work: Work[State, Task, Result]
    start: ray.ObjectRef[Any]  # in the object store
    need: Need
    workers: dict[ray.ObjectRef[Any], _Worker[Task]] = field(default_factory=dict)  # by what they will say next
    idle: list[_Worker[Task]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def hire(self) -> None:
        import ray

        actor: Any = (
            ray.remote(_Actor).options(num_cpus=self.need.cpus, num_gpus=self.need.gpus, max_restarts=0).remote()
        )
        self._ask(_Worker(actor, next(self.numbers)), actor.here.remote())

    def begin(self, worker: _Worker[Task]) -> None:
        self._ask(worker, worker.actor.begin.remote(self.start, self.need.device, __version__))

    def give(self, worker: _Worker[Task], task: Task, ahead: Task | None) -> None:
        worker.task = task
        self._ask(worker, worker.actor.work.remote(self.work, task, ahead))

    def _ask(self, worker: _Worker[Task], ref: ray.ObjectRef[Any]) -> None:
        self.workers[ref] = worker

    @property
    def waiting(self) -> int:
        """Those that have not found room."""
        return sum(not worker.node for worker in self.workers.values())

    @property
    def working(self) -> int:
        return sum(worker.task is not None for worker in self.workers.values())

    @property
    def free(self) -> int:
        """Those that found room and have no task, or soon will have none."""
        return len(self.idle) + len(self.workers) - self.waiting - self.working

    def dismiss(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ending = [worker.actor.end.remote() for worker in self.idle]
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=_END_SECONDS)
        for worker in [*self.workers.values(), *self.idle]:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor)


def run(
    work: Work[State, Task, Result], start: Callable[[str], State], tasks: Sequence[Task], need: Need
) -> Iterator[Result | Lost[Task]]:
    """As `launch.run`, on the cluster that is connected."""
    import ray

    todo = Tasks(tasks, _TRIES)
    crew = _Crew(work, ray.put(start), need)
    patience = _Patience(need)
    try:
        while len(todo) or crew.working:
            while crew.waiting < min(_WAITING, todo.unclaimed - crew.free):
                crew.hire()
            for worker in list(crew.idle):
                if (given := todo.take(worker.number)) is not None:
                    crew.idle.remove(worker)
                    crew.give(worker, *given)
            ready, _ = ray.wait(list(crew.workers), num_returns=1, timeout=1.0)
            patience.look(bool(crew.working or crew.free or ready))
            for ref in ready:
                worker = crew.workers.pop(ref)
                yield from _news(ref, worker, crew, todo)
    finally:
        crew.dismiss()


def _news(
    ref: ray.ObjectRef[Any], worker: _Worker[Task], crew: _Crew[State, Task, Result], todo: Tasks[Task]
) -> Iterator[Result | Lost[Task]]:
    """What an actor has to say: that it has begun, the result of a task, or that it is dead."""
    import ray

    try:
        kind, value, *said = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = " ".join(str(error.cause).split())
        what = "cannot begin" if worker.task is None else f"failed at {getattr(worker.task, 'name', worker.task)}"
        raise ProtopruneError(f"a Ray worker {what}: {type(error.cause).__name__}: {cause[:200]}") from None
    except ray.exceptions.RayError as error:
        with contextlib.suppress(Exception):
            ray.kill(worker.actor)
        where = f"the Ray worker on {worker.node}" if worker.node else "a Ray worker"
        lost = todo.died(worker.number, worker.task, f"{where} died{_why(error)}")
        if lost is not None:
            yield lost
        return
    for text in said[0] if said else ():
        warn(text)
    if kind == "error":
        raise value
    if kind == "here":
        worker.node = value
        crew.begin(worker)
        return
    if kind == "result":
        worker.task = None
        todo.done()
        yield value
    crew.idle.append(worker)


def _why(error: Exception) -> str:
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return " (out of memory)"
    text = str(error).lower()
    if getattr(error, "preempted", False) or "node died" in text or "node was terminated" in text:
        return " with its machine"
    if "creation task" in text or "modulenotfound" in text:
        return f" ({' '.join(str(error).split())[-160:]})"
    return ""


class _Patience:
    """How long nobody has worked."""

    def __init__(self, need: Need) -> None:
        self._need, self._since, self._told = need, time.monotonic(), False

    def look(self, anybody: bool) -> None:
        now = time.monotonic()
        if anybody:
            self._since, self._told = now, False
            return
        if now - self._since > _PATIENCE_SECONDS:
            raise ProtopruneError(
                f"--engine ray: no worker found room for {_PATIENCE_SECONDS // 60} minutes (each takes {self._need}); "
                "look at `ray status`; what is done is kept"
            )
        if now - self._since > _TELL_SECONDS and not self._told:
            self._told = True
            warn(f"waiting for room on the cluster: a worker takes {self._need}; see `ray status`")
