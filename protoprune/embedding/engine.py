"""An encoder made ready on a device: where it runs, in which precision, and the function from pixels to features.

Knows nothing of images, feature files or what is done with the features.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, cast

from protoprune.bounds import is_whole, shown
from protoprune.device import compiled, cores, native_bf16, resolve_device, warn_if_emulated
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import Preprocess
from protoprune.text import shortened

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
    model       normalised float images (b, 3, s, s) -> features (b, dim). Of a torch.nn.Module (or that whose method it
                is) a copy is moved to the device, in its precision; another function is called as it is, by one thread
                at a time, with what lies there
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
    def each(self) -> Callable[[Forward, list[torch.Tensor]], Iterable[torch.Tensor]]:
        """`map` for pieces of a batch on a CPU: in as many threads as there are cores, each by itself, what torch makes
        for each made once; in this one where the model may keep what it sees in a place of its own."""
        return map if _keeps_something(self.encoder.model) else ThreadPoolExecutor(cores(), initializer=alone).map


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
        raise UsageError(
            f"the encoder {encoder.name} gave a {type(features).__name__}, expected a tensor (b, dim); let a function "
            "take the vectors out of it, as in lambda batch: network(batch).pooler_output"
        )
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


def _network(model: Forward) -> torch.nn.Module | None:
    """The network that a model is, or is a method of; None for other functions."""
    import torch

    whose = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    return whose if isinstance(whose, torch.nn.Module) else None


def _hooks(network: torch.nn.Module) -> list[Callable[..., object]]:
    """The functions that are called beside its forward passes, without methods of objects, which are copied with it."""
    every = [hook for part in network.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)
             for hook in hooks.values()]  # fmt: skip
    return [hook for hook in every if isinstance(hook, (types.FunctionType, functools.partial))]


def _keeps_something(model: Forward) -> bool:
    """Whether threads may find there what another one left: in a function, or in one that is hooked into a network. One
    of torch.compile would be compiled for each of them."""
    network = _network(model)
    return network is None or hasattr(network, "_orig_mod") or bool(_hooks(network))


def _own_copy(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> Forward:
    """The network, ready to be used: neither place nor type of the caller's must change. Raises UsageError where a hook
    would go on with the caller's."""
    import torch

    for hook in _hooks(cast(torch.nn.Module, _network(encoder.model))):
        for cell in getattr(hook, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty one
                if isinstance(cell.cell_contents, torch.nn.Module):
                    raise UsageError(
                        f"the encoder {encoder.name}: a function hooked into its model writes into this "
                        f"{type(cell.cell_contents).__name__}, and embedding uses a copy of it; hook in a method of it"
                    )
    try:
        model = copy.deepcopy(encoder.model)
    except (TypeError, RuntimeError) as error:
        said = shortened(" ".join(str(error).split()))
        raise UsageError(
            f"the encoder {encoder.name}: its model cannot be copied ({said}); give a function that calls it"
        ) from None
    network = cast(torch.nn.Module, _network(model)).to(device=device, dtype=dtype)
    network.to(memory_format=torch.channels_last).eval()  # with dropout and batch norm features would never be the same
    return model


def _one_a_thread(model: Forward) -> Forward:
    """The model, of which each thread that calls it has a copy with the same weights: a network may keep what it sees
    in its own attributes."""
    own, weights = threading.local(), {id(one): one for one in cast("torch.nn.Module", _network(model)).parameters()}

    def forward(batch: torch.Tensor) -> torch.Tensor:
        if not hasattr(own, "model"):
            own.model = copy.deepcopy(model, dict(weights))
        return own.model(batch)

    return forward


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
    if _network(model) is not None:
        model = _own_copy(encoder, device, dtype)
    if compile:
        model = compiled(model)
    elif device.type == "cpu" and not _keeps_something(model):
        model = _one_a_thread(model)
    mean = torch.tensor(encoder.preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(encoder.preprocess.std, device=device).view(1, 3, 1, 1) * 255)

    cuda = device.type == "cuda"

    def exact() -> contextlib.AbstractContextManager[None]:
        """cuDNN's own default for fp32 convolutions is TF32, with a mantissa of fp16."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if cuda else contextlib.nullcontext()

    def as_asked() -> contextlib.AbstractContextManager[None]:
        """Not as an autocast around the caller has it."""
        known = device.type in ("cpu", "cuda")
        return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            pixels = batch.to(device, non_blocking=cuda).permute(0, 3, 1, 2)  # (b, 3, s, s), channels last in memory
            with exact(), as_asked():
                features = model(((pixels.float() - mean) * scale).to(dtype))
            _check_features(features, encoder, len(batch))
            return features.to("cpu", torch.float32, non_blocking=cuda, copy=True)  # the model may use its memory again

    side = encoder.preprocess.size
    while device.type == "cuda":
        try:
            forward(torch.zeros(size, side, side, 3, dtype=torch.uint8, device="cpu"))
            torch.cuda.synchronize(device)
            break
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise ProtopruneError(
                    f"not even one image fits on {device}; see what else runs there, or take another --device"
                ) from None
            if batch_size is not None:
                raise ProtopruneError(
                    f"a batch of {size} images does not fit on {device}; use --batch-size {size // 2}"
                ) from None
            size //= 2
            torch.cuda.empty_cache()
    return forward, size
