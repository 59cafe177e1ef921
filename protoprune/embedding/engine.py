"""An encoder made ready on a device: where it runs, in which precision, and the function from pixels to features.

Knows nothing of images, feature files or what is done with the features.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from protoprune.bounds import is_whole, shown
from protoprune.device import compiled, cores, native_bf16, resolve_device, warn_if_emulated
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import LARGEST_SIDE, Preprocess

if TYPE_CHECKING:
    import torch

    Forward = Callable[[torch.Tensor], torch.Tensor]

_BATCH = {"cuda": 256, "mps": 64}
# On a CPU each core computes pieces of 8 images by itself. That is as fast as large batches on all cores when the
# machine is idle, several times faster when it is not (the threads of one operation wait for the slowest), and gives
# the same bits for any batch size and any number of cores.
PIECE = 8
MOST = {"--batch-size": 65_536, "--workers": 1024}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Encoder(Protocol):
    """What is asked of an encoder. `encoders.load_encoder` gives one (an `encoders.Encoder`), and so may you.

    name        in the feature file
    model       normalised float images (b, 3, s, s) -> features (b, dim). Of a torch.nn.Module a copy is moved to the
                device, in its precision; another function is called as it is, with what lies there
    dim         numbers in a vector
    preprocess  image file -> the pixels that are normalised, (s, s, 3)
    digest      of the weights, or what else says when features are no longer comparable
    pool        how one vector is made of many, in a word; '' where there is nothing to say
    fp32_only   whether half precision loses too much

    name, digest, pool and `preprocess.describe()` are part of the cache key: features that were made with others are
    never mixed with these.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> Forward: ...

    @property
    def dim(self) -> int: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def digest(self) -> str: ...

    @property
    def pool(self) -> str: ...

    @property
    def fp32_only(self) -> bool: ...


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
    ) -> None:
        check_options(precision, batch_size, workers, store)
        check_encoder(encoder)
        if encoder.preprocess.size > LARGEST_SIDE:
            raise UsageError(f"--image-size {encoder.preprocess.size}: expected at most {LARGEST_SIDE}")
        self.encoder, self.batch_size, self.workers, self.compile = encoder, batch_size, workers or cores(), compile
        self.rooms: list[list[torch.Tensor]] = []  # for batches of pixels, which file after file uses, see `embedding`
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
    def forward(self) -> tuple[Forward, int]:
        """(function, batch size), made when the first image needs it; see `_forward`."""
        warn_if_emulated(self.precision, self.device)
        return _forward(self.encoder, self.device, self.precision, self.compile, self.batch_size)

    @functools.cached_property
    def pieces(self) -> ThreadPoolExecutor:
        """Threads that compute pieces of a batch on a CPU, each by itself; what torch makes for each is made once."""
        return ThreadPoolExecutor(cores(), initializer=alone)


def check_options(precision: str, batch_size: int | None, workers: int | None, store: str) -> None:
    """Raise UsageError for arguments of an `Engine` that no encoder and no device takes."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    if store not in ("float16", "float32"):
        raise UsageError(f"--store {store}: expected float16 or float32")
    for option, number in (("--batch-size", batch_size), ("--workers", workers)):
        if number is not None and not is_whole(number, 1, MOST[option]):
            raise UsageError(f"{option} {number}: expected auto or a number from 1 to {MOST[option]}")


_ASKED = {"name": "text", "digest": "text", "pool": "text", "dim": "a number of 1 or more", "model": "a function",
          "preprocess": "a Preprocess", "fp32_only": "True or False"}  # fmt: skip


def check_encoder(encoder: Encoder) -> None:
    """Raise UsageError for what has not all that is asked of an `Encoder`, naming what is missing."""
    for name, expected in _ASKED.items():
        if not hasattr(encoder, name):
            raise UsageError(
                f"encoder {shown(encoder)}: has no {name}; expected what load_encoder(…) gives, or your own `Encoder`"
            )
        value = getattr(encoder, name)
        right = {
            "a function": callable(value),
            "a number of 1 or more": is_whole(value, 1),
            "text": isinstance(value, str),
        }
        if not right.get(expected, value is not None) or (name == "preprocess" and not hasattr(value, "size")):
            raise UsageError(f"encoder {shown(encoder)}: its {name} is {shown(value)}, expected {expected}")


def _check_features(features: object, encoder: Encoder, count: int) -> None:
    """Raise UsageError for what is not one vector an image, so that none gets another one's, or a part of it."""
    import torch

    if not isinstance(features, torch.Tensor):
        raise UsageError(f"the encoder {encoder.name} gave a {type(features).__name__}, expected a tensor (b, dim)")
    if tuple(features.shape) != (count, encoder.dim) or features.is_complex():
        raise UsageError(
            f"the encoder {encoder.name} gave {features.dtype} of shape {tuple(features.shape)} for a batch of "
            f"{count}, expected numbers of shape ({count}, {encoder.dim}): a vector of `dim` numbers each"
        )


def alone() -> None:
    """Set up a thread that works by itself: torch must not start more threads for it."""
    import torch

    torch.set_num_threads(1)


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


def _forward(
    encoder: Encoder, device: torch.device, precision: str, compile: bool, batch_size: int | None
) -> tuple[Forward, int]:
    """(function, batch size); the function takes a uint8 batch (b, s, s, 3) to float32 features, both on the host.

    A GPU that cannot hold the default batch gets half of it, and so on; a batch size that was asked for is an error.
    """
    import torch

    size = batch_size or _BATCH.get(device.type, 4 * PIECE * cores())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = encoder.model
    if isinstance(model, torch.nn.Module):  # a copy: neither place nor type of the caller's encoder must change
        model = copy.deepcopy(model).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
        model.eval()  # as it comes from a constructor, dropout and batch norm would make other features each time
    if compile:
        model = compiled(model)
    mean = torch.tensor(encoder.preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(encoder.preprocess.std, device=device).view(1, 3, 1, 1) * 255)

    cuda = device.type == "cuda"

    def exact() -> contextlib.AbstractContextManager[None]:
        """cuDNN's own default for fp32 convolutions is TF32, with a mantissa of fp16."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if cuda else contextlib.nullcontext()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            pixels = batch.to(device, non_blocking=cuda).permute(0, 3, 1, 2)  # (b, 3, s, s), channels last in memory
            with exact():
                features = model(((pixels.float() - mean) * scale).to(dtype))
            _check_features(features, encoder, len(batch))
            return features.float().to("cpu", non_blocking=cuda)

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
