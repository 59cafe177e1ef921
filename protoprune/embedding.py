"""Images x encoder -> feature file: decode in threads, normalise and run on the device, write behind.

Decoding threads fill a small ring of uint8 batches (pinned for a GPU) while the device works on an earlier one and a
writer thread commits the one before that. Batches have a fixed order and go through the model in a fixed shape, so a
run that was killed goes on where it stopped and ends in the same bytes. This module wires images, an encoder and the
feature file; it prints nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from protoprune import earlier, files
from protoprune.crew import Crew, Part
from protoprune.current import content_digest
from protoprune.decode import Status, crop, silence_libtiff
from protoprune.device import cores, native_bf16, resolve_device
from protoprune.encoders import Encoder
from protoprune.errors import ProtopruneError, UsageError
from protoprune.featurefile import FeatureFile, PartialFile
from protoprune.images import ImageList

if TYPE_CHECKING:
    import torch

_RING = 4  # batches in memory at once
_BATCH = {"cuda": 256, "mps": 64}
# On a CPU each core computes pieces of 8 images by itself. That is as fast as large batches on all cores when the
# machine is idle, several times faster when it is not (the threads of one operation wait for the slowest), and gives
# the same bits for any batch size and any number of cores.
_PIECE = 8
MOST = {"--batch-size": 65_536, "--workers": 1024}
_LARGEST_SIDE = 8192  # pixels of an encoder's input
# The nice value of decoding threads beside a forward pass on the CPU, as long as that feeds it. At 19 a thread of a
# busy machine does not even get to its own end: after Ctrl-C the process went on for 6 to 13 s.
_STEP_BACK = 10
_LOOK = 5.0  # seconds after which that is judged anew
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class EmbedReport:
    """What a run did; every image of the list is in exactly one of embedded, unchanged and failures."""

    out: str
    n: int
    embedded: int = 0  # images that went through the encoder or failed on the way, in this run
    unchanged: int = 0  # images whose features an earlier run had left
    dropped: int = 0  # images of the earlier file that are gone from the list
    failures: Counter = field(default_factory=Counter)  # status label -> images, of all n
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


def embed(
    images: ImageList,
    encoder: Encoder,
    out: str | os.PathLike = "features.h5",
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
    were copied or restored, its content is compared too, unless `moved`; `on_compare(images)` is called before that.

    Raises UsageError for options that do not fit, ProtopruneError when `out` holds features of another encoder or most
    of its images would be lost (unless `overwrite`), cannot be written, or a feature overflows `store`. A file that has
    features is never replaced by one that has none.
    """
    engine = Engine(encoder, device, precision, batch_size, workers, store, compile)
    return embed_with(
        engine, images, out, overwrite=overwrite, moved=moved, on_compare=on_compare, on_start=on_start,
        on_progress=on_progress,
    )  # fmt: skip


class Engine:
    """An encoder made ready on a device, for one feature file after the other; see `embed` for its options."""

    def __init__(
        self,
        encoder: Encoder,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        store: str = "float16",
        compile: bool = False,
    ):
        if store not in ("float16", "float32"):
            raise UsageError(f"--store {store}: expected float16 or float32")
        for option, number in (("--batch-size", batch_size), ("--workers", workers)):
            if number is not None and not 1 <= number <= MOST[option]:
                raise UsageError(f"{option} {number}: expected auto or a number from 1 to {MOST[option]}")
        if encoder.preprocess.size > _LARGEST_SIDE:
            raise UsageError(f"--image-size {encoder.preprocess.size}: expected at most {_LARGEST_SIDE}")
        self.encoder, self.batch_size, self.workers, self.compile = encoder, batch_size, workers or cores(), compile
        self._room: list[torch.Tensor] = []
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device, encoder)
        self.provenance = {
            "encoder": encoder.name,
            "weights_sha256": encoder.digest,
            "pool": encoder.pool,
            "preprocess": json.dumps(encoder.preprocess.describe(), sort_keys=True),
            "precision": self.precision,
            "store": store,
        }

    @functools.cached_property
    def forward(self):
        """(function, batch size), made when the first image needs it; see `_forward`."""
        return _forward(self.encoder, self.device, self.precision, self.compile, self.batch_size)

    @functools.cached_property
    def pieces(self) -> ThreadPoolExecutor:
        """Threads that compute pieces of a batch on the CPU; what torch keeps for each is made once."""
        return ThreadPoolExecutor(cores(), initializer=_alone)

    @contextlib.contextmanager
    def buffers(self) -> Iterator[SimpleQueue]:
        """Room for _RING batches, uint8 (b, s, s, 3), which the next file uses again. After an error it does not: a
        decoding thread may still be at work."""
        import torch

        side, ring = self.encoder.preprocess.size, SimpleQueue()
        if not self._room:
            shape, pinned = (self.forward[1], side, side, 3), self.device.type == "cuda"
            self._room = [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(_RING)]
        room, self._room = self._room, []
        for buffer in room:
            ring.put(buffer)
        yield ring
        self._room = room


def embed_with(
    engine: Engine,
    images: ImageList,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    moved: bool = False,
    on_compare: Callable[[int], None] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """`embed` with an encoder that is ready already."""
    out = os.fspath(out)
    if os.path.isdir(out):
        raise UsageError(f"{out}: a folder; name a file for the features, such as {os.path.join(out, 'features.h5')}")
    report = EmbedReport(out, len(images), device=str(engine.device), precision=engine.precision)
    with files.lock(out):
        if not earlier.prepare(images, engine, out, overwrite, moved, report, on_compare):
            with FeatureFile(out) as done:
                report.uuid = done.provenance["uuid"]
            return report
        partial = PartialFile(out)
        try:
            report.embedded, report.unchanged = len(partial.todo), partial.n - len(partial.todo)
            if on_start:
                on_start(partial.n, len(partial.todo))
            if len(partial.todo):
                _run(images, engine, partial, on_progress)
            earlier.check_result(out, partial)
            partial.finish()
        except _out_of_memory() as error:
            raise ProtopruneError(
                f"{engine.device} ran out of memory ({str(error).splitlines()[0][:100]}); what is done is kept: "
                "run it again with a smaller --batch-size"
            ) from None
        finally:
            partial.close()
        with FeatureFile(out) as done:
            report.failures, report.transparent = done.failure_counts(), int(done.transparent.sum())
            report.uuid = done.provenance["uuid"]
    return report


def resolve_precision(name: str, device: torch.device, encoder: Encoder) -> str:
    """'auto' is bf16 where the hardware computes in it, else fp32: emulated bf16 is many times slower than fp32."""
    if name not in PRECISIONS:
        raise UsageError(f"--precision {name}: expected one of {', '.join(PRECISIONS)}")
    if encoder.fp32_only and name not in ("auto", "fp32"):
        raise UsageError(f"--precision {name}: the encoder {encoder.name} loses too much in it; use fp32")
    if name != "auto":
        return name
    if encoder.fp32_only or device.type == "mps":
        return "fp32"
    if device.type == "cuda" and not native_bf16(device):
        return "fp16"
    return "bf16" if native_bf16(device) else "fp32"


def _forward(encoder: Encoder, device, precision: str, compile: bool, batch_size: int | None):
    """(function, batch size); the function takes a uint8 batch (b, s, s, 3) to float32 features, both on the host.

    A GPU that cannot hold the default batch gets half of it, and so on; a batch size that was asked for is an error.
    """
    import torch

    size = batch_size or _BATCH.get(device.type, 4 * _PIECE * cores())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = encoder.model
    if isinstance(model, torch.nn.Module):  # a copy: neither place nor type of the caller's encoder must change
        model = copy.deepcopy(model).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    if compile:
        model = torch.compile(model)
    mean = torch.tensor(encoder.preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(encoder.preprocess.std, device=device).view(1, 3, 1, 1) * 255)

    cuda = device.type == "cuda"

    def exact():
        """cuDNN's own default for fp32 convolutions is TF32, with a mantissa of fp16."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if cuda else contextlib.nullcontext()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            pixels = batch.to(device, non_blocking=cuda).permute(0, 3, 1, 2)  # (b, 3, s, s), channels last in memory
            with exact():
                features = model(((pixels.float() - mean) * scale).to(dtype)).float()
            return features.to("cpu", non_blocking=cuda)

    side = encoder.preprocess.size
    while device.type == "cuda":
        try:
            forward(torch.zeros(size, side, side, 3, dtype=torch.uint8))
            torch.cuda.synchronize(device)
            break
        except torch.cuda.OutOfMemoryError:
            if batch_size is not None or size == 1:
                raise ProtopruneError(
                    f"a batch of {size} images does not fit on {device}; use --batch-size {max(1, size // 2)}"
                ) from None
            size //= 2
            torch.cuda.empty_cache()
    return forward, size


def _run(images: ImageList, engine: Engine, partial: PartialFile, on_progress) -> None:
    """The pipeline. Batches are decoded ahead, computed in order and committed in order."""
    import torch

    forward, batch_size = engine.forward
    content = np.zeros(len(images), np.uint64)
    encoder, device, compiled, workers = engine.encoder, engine.device, engine.compile, engine.workers
    silence_libtiff()
    batches = [partial.todo[i : i + batch_size] for i in range(0, len(partial.todo), batch_size)]
    done = failed = 0
    on_cpu = device.type == "cpu"
    hunger = _Hunger() if on_cpu else None
    with (
        engine.buffers() as ring,
        _decoders(images, encoder, workers, on_cpu, content) as decoders,
        ThreadPoolExecutor(1) as writer,
    ):
        ahead: deque = deque()
        writing: deque[Future] = deque()
        upcoming = iter(batches)

        def decode_next() -> None:
            rows = next(upcoming, None)
            if rows is not None:
                buffer = ring.get()
                ahead.append((rows, buffer, _decode_batch(rows, buffer, decoders, workers)))

        for _ in range(_RING - 2):
            decode_next()
        while ahead:
            decode_next()
            rows, buffer, parts = ahead.popleft()
            with hunger or contextlib.nullcontext():
                outcome = [one for part in parts for one in decoders.results(part)]
            if hunger and hunger.starved():
                decoders.relieve(_alone)
                hunger = None
            if on_cpu and not compiled:
                features = torch.cat(list(engine.pieces.map(forward, _pieces(buffer, len(rows)))))
            else:
                features = forward(buffer)
            ready = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
            if ready:
                ready.record(torch.cuda.current_stream(device))
            writing.append(writer.submit(_write, partial, rows, features, ready, outcome, content, buffer, ring))
            while len(writing) > 1 or (writing and not ahead):
                writing.popleft().result()
            done += len(rows)
            failed += sum(status != Status.OK for status, _ in outcome)
            if on_progress:
                on_progress(done, failed)


@contextlib.contextmanager
def _decoders(images: ImageList, encoder: Encoder, count: int, step_back: bool, content: np.ndarray) -> Iterator[Crew]:
    """Threads that make the crop of a row, and note the digest of its image in `content`, (n,)."""
    import torch

    def work(row: int) -> tuple[np.ndarray, str]:
        data = images.read(row)
        content[row] = content_digest(data)
        return crop(data, encoder.preprocess)

    threads = torch.get_num_threads()
    try:
        with Crew(count, work, functools.partial(_alone, step_back)) as crew:
            yield crew
    finally:
        torch.set_num_threads(threads)  # what a thread sets is set for the others too


class _Hunger:
    """Whether a run waits for its decoding threads while other programs have the cores.

    Threads that step back get next to nothing on a busy machine, and on an idle one they cost nothing: there all cores
    are at work, with images or with the model. No process may take back what it has stepped, so it needs new threads.
    """

    def __init__(self):
        self._start_over()

    def _start_over(self) -> None:
        self._began, self._waited = (time.monotonic(), time.process_time()), 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_) -> None:
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
    """Set up a thread that works by itself: torch must not start more threads for it.

    Decoding threads beside a forward pass on the CPU step back, so that they run when a core is free (Linux gives each
    thread a priority of its own).
    """
    import torch

    torch.set_num_threads(1)
    if step_back and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STEP_BACK)


def _pieces(buffer: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The first `count` images of a batch in pieces of _PIECE. The last one is filled up with blank images: a product
    of fewer rows is summed in another order."""
    import torch

    pieces = list(buffer[:count].split(_PIECE))
    if len(pieces[-1]) < _PIECE:
        full = torch.zeros(_PIECE, *buffer.shape[1:], dtype=buffer.dtype)
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


def _write(partial: PartialFile, rows, features, ready, outcome, content, buffer, ring) -> None:
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
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1) | ((status == Status.OK) & _vanished(values, dtype)))
    if len(bad):
        _refuse(int(rows[bad[0]]), values[bad[0]], dtype, len(bad))
    partial.commit(rows, stored, status, [reason for _, reason in outcome], content[rows])


def _vanished(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(b,) bool: rows that are not all zeros, but so small that `dtype` has few digits for them or none."""
    largest = np.abs(values).max(axis=1)
    return (largest > 0) & (largest < np.finfo(dtype).tiny)


def _refuse(row: int, values: np.ndarray, dtype: np.dtype, count: int) -> None:
    if np.isfinite(values).all():
        how = "overflow" if np.abs(values).max() > 1 else "underflow"
        raise ProtopruneError(
            f"features of {count} images of a batch (first: row {row}) {how} {dtype} "
            f"(largest {np.abs(values).max():.3g}); run again with --store float32 --overwrite"
        )
    raise ProtopruneError(
        f"the encoder gave NaN or infinity for {count} images of a batch (first: row {row}); "
        "run again with --precision fp32 --overwrite"
    )


def _out_of_memory() -> type[Exception]:
    import torch

    return torch.OutOfMemoryError
