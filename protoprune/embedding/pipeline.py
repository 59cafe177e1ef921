"""Images x encoder -> feature file: decode in threads, normalise and run on the device, write behind.

Decoding threads fill a small ring of uint8 batches (pinned for a GPU) while the device works on an earlier one and a
writer thread commits the one before that. Batches have a fixed order and go through the model in a fixed shape, so a
run that was killed goes on where it stopped and ends in the same bytes. This module wires images, an encoder and the
feature file; it prints nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from protoprune import files
from protoprune.arguments import checked
from protoprune.device import cores, full_fp32
from protoprune.embedding import earlier
from protoprune.embedding.ahead import Halves, whole
from protoprune.embedding.engine import PIECE, Encoder, Engine, alone, resolve_precision
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features.current import content_digest
from protoprune.features.featurefile import FeatureFile, PartialFile, vanished
from protoprune.images.crew import Crew, Part
from protoprune.images.decode import Status, crop, silence_libtiff
from protoprune.images.listing import ImageList
from protoprune.units import many

if TYPE_CHECKING:
    import torch

__all__ = ["EmbedReport", "Encoder", "Engine", "embed", "in_halves", "own_threads", "resolve_precision"]

_RING = 4  # batches in memory at once
# The nice value of decoding threads beside a forward pass on the CPU, as long as that feeds it. At 19 a thread of a
# busy machine does not even get to its own end: after Ctrl-C the process went on for 6 to 13 s. At 10 a run with the
# cores nearly to itself needs 2 to 7 % less CPU time (medians of 10 and 8 pairs, mini on two cores), the most that an
# idle machine can gain; 10 to 16 % more time as soon as others fill what a thread leaves, 40 % beside as many others
# as cores and more (docs/benchmarks.md).
_STEP_BACK = 10
_LOOK = 5.0  # seconds after which that is judged anew

Outcome = list[tuple[Status, str]]  # of a batch: status and note or reason of each image


@dataclass
class EmbedReport:
    """What a run did; every image of the list is either embedded or unchanged."""

    out: str
    n: int
    embedded: int = 0  # images that went through the encoder or failed on the way, in this run
    failed_now: int = 0  # those of them that failed
    unchanged: int = 0  # images whose features, or failure, an earlier run had left
    dropped: int = 0  # images of the earlier file that are gone from the list
    failures: Counter[str] = field(default_factory=Counter)  # status label -> images, of all n
    transparent: int = 0  # images with transparent parts, of all n
    moved_from: str = ""  # the root that the earlier file was for, where that was another one
    compared: int = 0  # images whose content was compared with what had been embedded
    other: int = 0  # those of them that had other content
    uuid: str = ""  # of the feature file
    device: str = ""
    precision: str = ""

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


@checked
def embed(
    images: ImageList,
    encoder: Encoder,
    out: str | os.PathLike[str] = "features.h5",
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    store: str = "float16",
    compile: bool = False,
    overwrite: bool = False,
    moved: bool = False,
    on_compare: Callable[[int], None] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """Embed `images` into the feature file `out`; only what an earlier run has not left there already.

    batch_size and workers (decoding threads) default to what suits the device. `on_start(total, left)` is called once,
    `on_progress(done, failed)` after every batch, with the numbers of this run.

    An image is the one that was embedded when name, size and times are the same. Below another root, and where files
    were copied, restored or touched, contents are compared, unless `moved`; `on_compare(images)` is called before that.

    Raises UsageError for options that do not fit, ProtopruneError when `out` holds features of another encoder or most
    of its images would be lost (unless `overwrite`), cannot be written, or a feature overflows `store`. A file that has
    features is never replaced by one that has none.
    """
    engine = Engine(encoder, device, precision, batch_size, workers, store, compile)
    with own_threads():
        return whole(
            in_halves(
                engine, images, out, overwrite=overwrite, moved=moved, on_compare=on_compare, on_start=on_start,
                on_progress=on_progress,
            )
        )  # fmt: skip


def in_halves(
    engine: Engine,
    images: ImageList,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    changed: bool = False,
    moved: bool = False,
    on_compare: Callable[[int], None] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Halves[EmbedReport]:
    """`embed` with an engine; yields as soon as it has all that it needs but the device: images are being decoded then.
    `changed`: see `earlier.prepare`.

    The first half may be done in another thread, beside the second one of other images (see `ahead`), within
    `own_threads`.
    """
    out = os.fspath(out)
    if os.path.isdir(out):
        raise UsageError(f"{out}: a folder; name a file for the features, such as {os.path.join(out, 'features.h5')}")
    report = EmbedReport(out, len(images), device=str(engine.device), precision=engine.precision)
    with files.lock(out):
        before = earlier.prepare(images, engine, out, overwrite, moved, on_compare, changed)
        report.compared, report.other = before.compared, before.other
        report.moved_from, report.dropped = before.moved_from, before.dropped
        if before.up_to_date:
            report.unchanged = report.n
        else:
            yield from _embed_rest(images, engine, report, on_start, on_progress)
        with FeatureFile(out) as done:
            report.failures, report.transparent = done.failure_counts(), int(done.transparent.sum())
            report.uuid = done.provenance["uuid"]
    return report


def _embed_rest(
    images: ImageList,
    engine: Engine,
    report: EmbedReport,
    on_start: Callable[[int, int], None] | None,
    on_progress: Callable[[int, int], None] | None,
) -> Halves[None]:
    """Do what the partial file leaves to do, and give it its name."""
    import torch

    partial = PartialFile(report.out)
    try:
        report.embedded, report.unchanged = len(partial.todo), partial.n - len(partial.todo)
        if on_start:
            on_start(partial.n, len(partial.todo))
        if len(partial.todo):
            report.failed_now = yield from _run(images, engine, partial, on_progress)
        earlier.check_result(report.out, partial)
        partial.finish()
    except torch.OutOfMemoryError as error:
        raise ProtopruneError(
            f"{engine.device} ran out of memory ({str(error).splitlines()[0][:100]}); what is done is kept: "
            "run it again with a smaller --batch-size"
        ) from None
    finally:
        partial.close()


def _run(
    images: ImageList, engine: Engine, partial: PartialFile, on_progress: Callable[[int, int], None] | None
) -> Halves[int]:
    """The pipeline. Batches are decoded ahead, computed in order and committed in order; returns how many failed."""
    import torch

    forward, batch_size = engine.forward
    content = np.zeros(len(images), np.uint64)
    silence_libtiff()
    batches = [partial.todo[i : i + batch_size] for i in range(0, len(partial.todo), batch_size)]
    done = failed = 0
    on_cpu = engine.device.type == "cpu"
    with (
        _ring(engine, batch_size) as ring,
        _decoders(images, engine.encoder, engine.workers, on_cpu, content) as decoders,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: deque[Future[None]] = deque()
        coming = _ahead(batches, ring, decoders, engine.workers)
        first = next(coming)  # begins the decoding
        yield
        hunger = _Hunger() if on_cpu else None
        for rows, buffer, parts in itertools.chain([first], coming):
            with hunger or contextlib.nullcontext():
                outcome = [one for part in parts for one in decoders.results(part)]
            if hunger and hunger.starved():
                decoders.relieve(alone)
                hunger = None
            if on_cpu and not engine.compile:
                features = torch.cat(list(engine.each(forward, _pieces(buffer, len(rows)))))
            else:
                features = forward(buffer)
            ready = _recorded(engine.device)
            writing.append(writer.submit(_write, partial, rows, features, ready, outcome, content, buffer, ring))
            done += len(rows)
            while len(writing) > (1 if done < len(partial.todo) else 0):
                writing.popleft().result()
            failed += sum(status != Status.OK for status, _ in outcome)
            if on_progress:
                on_progress(done, failed)
    return failed


@contextlib.contextmanager
def _ring(engine: Engine, batch_size: int) -> Iterator[SimpleQueue[torch.Tensor]]:
    """Batches of pixels that are used again and again, pinned for a GPU; also by the engine's files after it, but not
    after an error: a decoding thread may still be at work."""
    import torch

    side = engine.encoder.preprocess.size
    shape, pinned = (batch_size, side, side, 3), engine.device.type == "cuda"
    try:
        room = engine.rooms.pop()
    except IndexError:
        room = [torch.zeros(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(_RING)]
    ring: SimpleQueue[torch.Tensor] = SimpleQueue()
    for buffer in room:
        ring.put(buffer)
    yield ring
    engine.rooms.append(room)


def _ahead(
    batches: Iterable[np.ndarray], ring: SimpleQueue[torch.Tensor], decoders: Crew, workers: int
) -> Iterator[tuple[np.ndarray, torch.Tensor, list[Part]]]:
    """(rows, the batch that their pixels come into, the parts that are being decoded into it) of each batch, in order,
    while those after it are begun as far as the ring reaches: one batch is computed with, and one written."""
    ahead: deque[tuple[np.ndarray, torch.Tensor, list[Part]]] = deque()
    for rows in batches:
        buffer = ring.get()
        ahead.append((rows, buffer, _decode_batch(rows, buffer, decoders, workers)))
        if len(ahead) > _RING - 2:
            yield ahead.popleft()
    yield from ahead


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """On a GPU what says when all that was asked of it until now is done."""
    import torch

    if device.type != "cuda":
        return None
    ready = torch.cuda.Event(blocking=True)
    ready.record(torch.cuda.current_stream(device))
    return ready


@contextlib.contextmanager
def _decoders(images: ImageList, encoder: Encoder, count: int, step_back: bool, content: np.ndarray) -> Iterator[Crew]:
    """Threads that make the crop of a row, and note the digest of its image in `content`, (n,)."""

    def work(row: int) -> tuple[np.ndarray, str]:
        data = images.read(row)
        content[row] = content_digest(data)
        return crop(data, encoder.preprocess)

    with Crew(count, work, functools.partial(_alone, step_back)) as crew:
        yield crew


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """Leave torch with the number of threads that it had: what a decoding thread sets is set for the others too. What
    is computed within in fp32 is, whatever the program asked for."""
    import torch

    threads = torch.get_num_threads()
    try:
        with full_fp32():
            yield
    finally:
        torch.set_num_threads(threads)


class _Hunger:
    """Whether a run waits for its decoding threads while other programs have the cores.

    Threads that step back get next to nothing on a busy machine, and on an idle one they cost nothing: there all cores
    are at work, with images or with the model. No process may take back what it has stepped, so it needs new threads.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._began, self._waited = (time.monotonic(), time.process_time()), 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._waited += time.monotonic() - self._since

    def starved(self) -> bool:
        """Judged every few seconds: it waited most of them, and had less than half of the cores."""
        wall, used = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        if wall < _LOOK:
            return False
        starved = self._waited > wall / 2 and used < cores() * wall / 2
        self._start_over()
        return starved


def _alone(step_back: bool = False) -> None:
    """Set up a decoding thread, which works by itself.

    Decoding threads beside a forward pass on the CPU step back, so that they run when a core is free (Linux gives each
    thread a priority of its own). Those of `nice -n 19` stay there: stepping forward is for administrators only.
    """
    alone()
    if step_back and sys.platform == "linux":
        own = threading.get_native_id()
        with contextlib.suppress(OSError):  # where containers forbid the call, all goes on as it is
            os.setpriority(os.PRIO_PROCESS, own, max(_STEP_BACK, os.getpriority(os.PRIO_PROCESS, own)))


def _pieces(buffer: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The first `count` images of a batch in pieces of PIECE. The last one is filled up with blank images: a product
    of fewer rows is summed in another order."""
    import torch

    pieces = list(buffer[:count].split(PIECE))
    if len(pieces[-1]) < PIECE:
        full = torch.zeros(PIECE, *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device)
        full[: len(pieces[-1])] = pieces[-1]
        pieces[-1] = full
    return pieces


def _decode_batch(rows: np.ndarray, buffer: torch.Tensor, decoders: Crew, workers: int) -> list[Part]:
    """Start decoding `rows` into the first slots of `buffer`, in a few parts a thread."""
    slots = buffer.numpy()
    step = max(1, min(16, -(-len(rows) // (2 * workers))))

    def take(first: int, place: int, pixels: np.ndarray | None) -> None:
        slots[first + place] = 0 if pixels is None else pixels

    slots[len(rows) :] = 0  # on a GPU the last batch keeps the shape of the others
    return [
        decoders.start(rows[first : first + step].tolist(), functools.partial(take, first))
        for first in range(0, len(rows), step)
    ]


def _write(
    partial: PartialFile,
    rows: np.ndarray,
    features: torch.Tensor,
    ready: torch.cuda.Event | None,
    outcome: Outcome,
    content: np.ndarray,
    buffer: torch.Tensor,
    ring: SimpleQueue[torch.Tensor],
) -> None:
    """Commit one batch; runs in the writer thread, in order."""
    if ready is not None:
        ready.synchronize()
    ring.put(buffer)
    status = np.array([status for status, _ in outcome], np.uint8)
    values = features[: len(rows)].numpy()
    dtype = partial.dtype
    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(dtype)
    stored[status != Status.OK] = 0
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1) | ((status == Status.OK) & vanished(values, dtype)))
    if len(bad):
        _refuse(int(rows[bad[0]]), values[bad[0]], dtype, len(bad))
    partial.commit(rows, stored, status, [reason for _, reason in outcome], content[rows])


def _refuse(row: int, values: np.ndarray, dtype: np.dtype, count: int) -> None:
    if np.isfinite(values).all():
        how = "overflow" if np.abs(values).max() > 1 else "underflow"
        raise ProtopruneError(
            f"features of {many(count, 'image')} of a batch (first: row {row}) {how} {dtype} "
            f"(largest {np.abs(values).max():.3g}); run again with --store float32 --overwrite"
        )
    raise ProtopruneError(
        f"the encoder gave NaN or infinity for {many(count, 'image')} of a batch (first: row {row}); "
        "run again with --precision fp32 --overwrite"
    )
