"""A file that training left -> its state dict. Tensors and plain values are read; no code of the file is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import re
import types
from typing import Any

import numpy as np

from protoprune.errors import ProtopruneError, UsageError

# Where the tensors are in what is saved; of DINO's two networks its authors evaluate the teacher.
_WRAPPERS = ("teacher", "student", "state_dict", "model", "model_state_dict", "target_encoder", "encoder")


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
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
    if not tensors:
        keys = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise ProtopruneError(f"--weights {path}: no tensors in it (it holds {keys}); save model.state_dict()")
    return tensors


def _load(path: str):
    if not os.path.isfile(path):
        raise UsageError(f"--weights {path}: no such file")
    import torch

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ProtopruneError(f"--weights {path}: {_why(path, str(error) or type(error).__name__)}") from None


def _harmless() -> list:
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
        return (
            f"holds {', '.join(sorted(wanted))}, and reading such an object would run code from the file; where you "
            "trust it, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        )
    reason = re.search(r"WeightsUnpickler error: (.*)", said) or re.search(r"trusted source\.\s+(.*)", said)
    line = reason.group(1) if reason else said.splitlines()[0]
    return f"not readable ({line.strip()}); give a .pth, .pt or .safetensors state dict"
