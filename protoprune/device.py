"""Which device computes, and in which numbers it is fast. What this module does not know: models, batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from protoprune.bounds import shown
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.memory import control_groups, words_of
from protoprune.text import shortened

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """'auto' is the first of cuda, mps and cpu that works; anything else is taken at its word."""
    import torch

    expected = "expected auto, cuda, cuda:N, mps or cpu"
    if not isinstance(name, str):
        raise UsageError(f"--device {shown(name)}: {expected}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise UsageError(f"--device {name}: {said}; use auto, cuda, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):  # meta computes nothing, and says so only when results are read
        raise UsageError(f"--device {name}: {expected}")
    return device


def compiled(model: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile of a model. What it cannot do (there is no C++ compiler) it says at the first batch, at length."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    def failed(error: Exception) -> ProtopruneError:
        said = shortened(" ".join(str(error).split("\n\n")[0].split()) or type(error).__name__)
        return ProtopruneError(f"--compile: torch cannot compile this model here ({said}); leave --compile out")

    try:
        run = torch.compile(model)
    except RuntimeError as error:  # not on this version of Python
        raise failed(error) from None

    def forward(*arguments: torch.Tensor) -> torch.Tensor:
        try:
            return run(*arguments)
        except TorchDynamoException as error:
            raise failed(error) from None

    return forward


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16: emulated, it is many times slower than fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Products of fp32 within are of all its digits: after torch.set_float32_matmul_precision they are of TF32 or bf16,
    under the same name."""
    import torch

    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):  # of torch 2.8 and before
        asked = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(asked)
        return
    places = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Warn where this device would imitate a precision that it has no arithmetic for; nothing fails, it takes long."""
    import torch

    half = getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    native = {"bf16": native_bf16(device), "fp16": device.type != "cpu" or half()}
    if device.type in ("cpu", "cuda") and not native.get(precision, True):
        warn(
            f"--precision {precision}: this {device.type} has no {precision} arithmetic and imitates it, many times "
            "slower than fp32; auto takes the fastest that it has"
        )


def cores() -> int:
    """Cores that this process may use; of a container no more than it gets the time of."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups("cpu"):
        quota = words_of(folder, "cpu.max") or words_of(folder, "cpu.cfs_quota_us") + words_of(
            folder, "cpu.cfs_period_us"
        )
        if len(quota) == 2 and all(word.isdecimal() for word in quota) and int(quota[1]):
            count = min(count, max(1, -(-int(quota[0]) // int(quota[1]))))
    return count
