"""A file that training left -> its state dict. Tensors and plain values are read; no code of the file is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import pickletools
import re
import types
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import holds
from protoprune.formats import archive_kind

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]  # by name

# Where the tensors are in what is saved; of DINO's two networks its authors evaluate the teacher.
_WRAPPERS = ("teacher", "student", "state_dict", "model", "model_state_dict", "target_encoder", "encoder")

_PICKLE = 1 << 20  # bytes of a pickle that are looked at for what it would call


def read_state(path: str | os.PathLike[str]) -> State:
    """The state dict of a .pth, .pt or .safetensors file, taken out of the training checkpoint around it.

    Raises UsageError when there is no such file, ProtopruneError when it is not of that kind, or holds objects whose
    reading would run code.
    """
    import torch

    path = os.fspath(path)
    state = _load(path)
    while isinstance(state, dict):
        for key in _WRAPPERS:
            if isinstance(state.get(key), dict):
                state = state[key]
                break
        else:
            break
    if not isinstance(state, dict):
        raise ProtopruneError(
            f"--weights {path}: a {type(state).__name__} instead of a state dict; save model.state_dict()"
        )
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if (odd := next((key for key in tensors if not isinstance(key, str)), None)) is not None:
        raise ProtopruneError(
            f"--weights {path}: a tensor has the key {odd!r} where a name is expected; save model.state_dict()"
        )
    if not tensors:
        keys = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise ProtopruneError(f"--weights {path}: no tensors in it (it holds {keys}); save model.state_dict()")
    return tensors


def _load(path: str) -> Any:
    if not os.path.isfile(path):
        raise UsageError(f"--weights {path}: no such file")
    import torch

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is not torch's, before the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ProtopruneError(f"--weights {path}: {_why(path, str(error) or type(error).__name__)}") from None


def _harmless() -> list[Any]:
    """What ordinary training scripts save beside the tensors: options, numbers of numpy, paths, dates.

    Building one of these sets attributes or values and calls nothing that the file could choose. Names are given where
    older numpy or newer Python pickle them under another one.
    """
    from numpy._core import multiarray

    return [
        argparse.Namespace,
        types.SimpleNamespace,
        collections.defaultdict,
        *(int, float, bool, str, list, tuple, dict, set),
        *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
        *((pathlib.PurePosixPath, f"pathlib{module}.PosixPath") for module in ("", "._local")),
        *((pathlib.PureWindowsPath, f"pathlib{module}.WindowsPath") for module in ("", "._local")),
        np.dtype,
        np.ndarray,
        *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name.endswith("DType")),
        *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    ]


def _why(path: str, said: str) -> str:
    """torch's advice of many lines, or the names of what the file wants to run, as one line."""
    import torch

    wanted = set(re.findall(r"GLOBAL ([A-Za-z_][\w.]*\w)", said))
    if wanted:
        try:
            with torch.serialization.safe_globals(_harmless()):
                wanted |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # the older format: the first one is known at least
            pass
        return _runs_code(wanted)
    kind = _other_kind(path)
    if kind in ("", "a pickle") and (wanted := _pickled_globals(path)):
        return _runs_code(wanted)
    if kind:
        return f"{kind}; give a .pth, .pt or .safetensors state dict"
    reason = re.search(r"WeightsUnpickler error: (.*)", said) or re.search(r"trusted source\.\s+(.*)", said)
    line = (reason.group(1) if reason else said.splitlines()[0]).strip()[:120]
    known = f" ({line})" if line and not line.isdigit() else ""
    return f"not readable{known}; give a .pth, .pt or .safetensors state dict"


def _runs_code(wanted: set[str]) -> str:
    first, more = sorted(wanted)[:3], len(wanted) - 3
    return (
        f"holds {', '.join(first)}{f' and {more} more' if more > 0 else ''}, and reading such an object would run code "
        "from the file; where you trust it, save its tensors alone: found = torch.load(FILE, weights_only=False), then "
        "torch.save(found.state_dict(), NEW) of a whole model, torch.save(found['state_dict'], NEW) of a checkpoint"
    )


def _other_kind(path: str) -> str:
    """What a file is that torch cannot read, where its content says it; '' else."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                whole = any(name.endswith("/data.pkl") for name in archive.namelist())
        except Exception:
            return "a damaged zip archive: perhaps a checkpoint that is cut short"
        return "" if whole else "a zip archive that torch.save did not write"
    if head.startswith(b"\x93NUMPY"):
        return "an array of numpy"
    return holds(path) or archive_kind(head) or ""


def _pickled_globals(path: str) -> set[str]:
    """What a pickle would call that is neither torch's nor harmless, found without reading it as one."""
    found: set[str] = set()
    strings: list[str] = []
    try:
        with open(path, "rb") as file:
            for operation, value, _ in pickletools.genops(file.read(_PICKLE)):
                if operation.name in ("GLOBAL", "INST"):
                    found.add(str(value).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except Exception:  # no pickle, or cut off at _PICKLE: what was found until then counts
        pass
    return {name for name in found if name.partition(".")[0] not in ("torch", "collections", "numpy")}
