"""A CUDA device on a machine without one: tensors of the host that say they are on `cuda:0`, and refuse to mix.

What it shows: tensors of two places in one operation, results read without `.cpu()`, events waited for that were not
recorded. What it cannot show: speed, memory, the order of streams, kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_MAKERS = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_ACROSS = {
    "copy_",
    "__getitem__",
    "__get__",
    "__set__",
    "set_",
    "type_as",
    "_has_compatible_shallow_copy_type",
}  # may take what is on the host
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap or grad: what it holds cannot be asked
_real_to = torch.Tensor.to


class OnDevice(torch.Tensor):
    """A tensor of the host that stands for one on the device."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        mixed = [one for one in given if not isinstance(one, OnDevice) and one.dim() and not _wrapped(one)]
        first_on_host = bool(given) and not isinstance(given[0], OnDevice)
        if mixed and (name not in _ACROSS or (name == "__getitem__" and first_on_host)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {name}")
        if name == "__setitem__" and first_on_host:
            raise RuntimeError("a tensor of the host is given values from the device")
        if name == "copy_" and first_on_host:
            return func(given[0], given[1].as_subclass(torch.Tensor), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @property
    def grad(self):
        with torch._C.DisableTorchFunctionSubclass():
            found = torch.Tensor.grad.__get__(self)
        return found if found is None else found.as_subclass(OnDevice)

    @grad.setter
    def grad(self, value):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.grad.__set__(self, value)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")

    def __array__(self, *_, **__):
        self.numpy()

    def __reduce_ex__(self, protocol):
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def _on_device(where) -> bool:
    return where is not None and torch.device(where).type == "cuda"


def _to(self, *args, **kwargs):
    kwargs.pop("copy", None)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    same = self.as_subclass(torch.Tensor) if isinstance(self, OnDevice) else self
    target = isinstance(self, OnDevice) if device is None else device.type == "cuda"
    moved = _real_to(same, dtype or same.dtype, memory_format=layout or torch.preserve_format)
    if target != isinstance(self, OnDevice) and moved is same:
        moved = same.clone() if layout is None else same.clone(memory_format=layout)
    return moved.as_subclass(OnDevice) if target else moved


def _maker(real):
    def make(*args, device=None, pin_memory=False, **kwargs):
        like = args and isinstance(args[0], OnDevice) and device is None
        if args and isinstance(args[0], OnDevice):
            args = (args[0].as_subclass(torch.Tensor), *args[1:])
        if not _on_device(device) and not like:
            return real(*args, **kwargs, **({"device": device} if device is not None else {}))
        asked = kwargs.pop("requires_grad", False)
        made = real(*args, **kwargs).as_subclass(OnDevice)
        return made.requires_grad_() if asked else made

    return make


class _Event:
    def __init__(self, **_):
        self.recorded = False

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def query(self):
        return self.recorded

    def wait(self, stream=None):
        assert self.recorded


def install(monkeypatch, free: int = 1 << 30) -> None:
    """Let there be one CUDA device, with `free` bytes of memory, until the test ends."""
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda _: None, wait_event=lambda _: None)
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "is_initialized": lambda: False,
        "current_device": lambda: 0, "mem_get_info": lambda device=None: (free, free), "empty_cache": lambda: None,
        "synchronize": lambda device=None: None, "get_device_name": lambda device=None: "simulated",
        "get_device_capability": lambda device=None: (8, 0), "current_stream": lambda device=None: stream,
        "Event": _Event, "is_bf16_supported": lambda *_, **__: True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in _MAKERS:
        monkeypatch.setattr(torch, name, _maker(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", _to)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: _to(self, DEVICE))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *_, **__: _to(self, "cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
