"""A file of weights -> tensors under timm's names, through whatever it was saved in, or a line that says why not."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from protoprune.errors import ProtopruneError, UsageError

if TYPE_CHECKING:
    import torch

_ANOTHER = "give the weights of this architecture, or another --encoder"


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Fill `model` from a weight file, through whatever wrapping it was saved in; returns a line saying what matched.

    Refuses, with ProtopruneError, a file that does not cover every tensor of the backbone.
    """
    state = _timm_names(_unwrap(_read_weights(path)), model)
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    prefix = _prefix(state, wanted)
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _same_patches(path, inner, wanted)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and any(key not in inner or inner[key].shape != tensor.shape for key, tensor in wanted.items()):
        try:
            inner = convert(dict(inner), model)  # timm's: renamed tensors, position embeddings of another size
        except Exception as error:
            raise ProtopruneError(f"{path}: does not fit {type(model).__name__} ({error})") from None
    _nothing_left_over(path, inner, wanted)
    missing = [key for key in wanted if key not in inner]
    misshapen = [key for key, tensor in wanted.items() if key in inner and inner[key].shape != tensor.shape]
    if missing or misshapen:
        matched = len(wanted) - len(missing) - len(misshapen)
        trouble = [f"{key} is missing" for key in missing]
        trouble += [f"{key} is {tuple(inner[key].shape)}, not {tuple(wanted[key].shape)}" for key in misshapen]
        raise ProtopruneError(
            f"{path}: only {matched} of the encoder's {len(wanted)} tensors matched ({'; '.join(trouble[:3])}"
            f"{'; …' if len(trouble) > 3 else ''}); {_ANOTHER}"
        )
    model.load_state_dict({key: inner[key] for key in wanted}, strict=False)
    others = sorted(set(state) - {prefix + key for key in wanted} - {k for k in state if k.endswith("_tracked")})
    text = f"{len(wanted)} of {len(wanted)} tensors matched"
    if prefix:
        text += f" under {prefix!r}"
    if others:
        text += f", {len(others)} others ignored ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})"
    return text


def _same_patches(path: str, state: dict, wanted: dict) -> None:
    """timm would resample the patches of another model to this one's size, which gives features, but not good ones."""
    for key in ("patch_embed.proj.weight",):
        if key in state and key in wanted and state[key].shape[2:] != wanted[key].shape[2:]:
            theirs, ours = ("x".join(map(str, one[key].shape[2:])) for one in (state, wanted))
            raise ProtopruneError(f"{path}: weights for patches of {theirs} pixels, the encoder has {ours}; {_ANOTHER}")


def _nothing_left_over(path: str, state: dict, wanted: dict) -> None:
    """A larger backbone of the same family covers a smaller one's names: what it has besides gives it away."""
    parts = {key.split(".")[0] for key in wanted if "." in key} - {"head", "fc", "classifier"}
    harmless = ("num_batches_tracked", "bias_mask", "relative_position_index")
    more = [key for key in state if key not in wanted and key.split(".")[0] in parts and not key.endswith(harmless)]
    if more:
        raise ProtopruneError(
            f"{path}: {len(more)} tensors inside the backbone are not the encoder's ({', '.join(sorted(more)[:3])}); "
            + _ANOTHER
        )


def _read_weights(path: str) -> dict:
    if not os.path.isfile(path):
        raise UsageError(f"--weights {path}: no such file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProtopruneError(
            f"--weights {path}: not readable ({reason[:120]}); give a .pth, .pt or .safetensors state dict"
        ) from None


def _unwrap(state: dict) -> dict:
    """The dictionary of tensors inside a training checkpoint; of DINO's two networks the teacher, as its authors do."""
    import torch

    while isinstance(state, dict):
        for key in ("teacher", "student", "state_dict", "model", "model_state_dict", "target_encoder", "encoder"):
            if isinstance(state.get(key), dict):
                state = state[key]
                break
        else:
            break
    if not isinstance(state, dict):
        raise ProtopruneError(f"--weights: a {type(state).__name__} instead of a state dict; save model.state_dict()")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _prefix(state: dict, wanted: dict) -> str:
    """What stands before the backbone's names (`module.`, `backbone.`, `encoder_q.`, …): what matches most tensors.

    Two equally good prefixes are two networks; the trained or averaged one is preferred to MoCo's key encoder.
    """
    anchors = list(wanted)[:1] + [key for key in wanted if key.endswith("conv1.weight")][:1]
    candidates = {key.removesuffix(anchor) for anchor in anchors for key in state if key.endswith(anchor)} | {""}
    usable = [prefix for prefix in candidates if prefix == "" or prefix.endswith(".")]

    def merit(prefix: str) -> tuple:
        matched = sum(prefix + key in state for key in wanted)
        return matched, "teacher" in prefix, "encoder_q" in prefix, "encoder_k" not in prefix, -len(prefix), prefix

    return max(usable, key=merit)


_PARTS = {  # of a block: lukemelas's EfficientNet -> timm's, after an expansion and without one
    True: {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"},
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
}  # fmt: skip
_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _timm_names(state: dict, model: torch.nn.Module) -> dict:
    """An EfficientNet of lukemelas's port (and what was made from it, Lite included) under timm's names.

    There the blocks are numbered through; in timm by stage, which the model knows.
    """
    if "_conv_stem.weight" not in state or not hasattr(model, "blocks"):
        return state
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    inner = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}

    def renamed(key: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if not block:
            part, _, tensor = key.partition(".")
            return f"{_ENDS.get(part, part)}.{tensor}"
        number, part, tensor = block.groups()
        names = _PARTS[f"_blocks.{number}._expand_conv.weight" in state] | inner
        if int(number) >= len(places) or part not in names:
            return key
        return f"{places[int(number)]}.{names[part]}.{tensor}"

    return {renamed(key): value for key, value in state.items()}
