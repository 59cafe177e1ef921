"""A file of weights -> tensors under timm's names, through whatever it was saved in, or a line that says why not."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING

from protoprune.encoders.checkpoints import read_state
from protoprune.encoders.names import familiar
from protoprune.errors import ProtopruneError

if TYPE_CHECKING:
    import torch

    from protoprune.encoders.checkpoints import State

_ANOTHER = "give the weights of this architecture, or another --encoder"
# What a checkpoint has beside the weights of a backbone: counters, masks, and the token of masked training.
_HARMLESS = ("num_batches_tracked", "bias_mask", "relative_position_index", "mask_token")


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Fill `model` from a weight file, through whatever wrapping it was saved in; returns a line saying what matched.

    Refuses, with ProtopruneError, a file that does not cover every tensor of the backbone.
    """
    state = familiar(read_state(path), model)
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    own = unprefixed(state, wanted)
    _same_patches(path, own, wanted)
    inner = _converted(path, own, wanted, model)
    _nothing_left_over(path, inner, wanted)
    _all_covered(path, inner, wanted)
    model.load_state_dict({key: inner[key] for key in wanted}, strict=False)
    filled = {inner[key].untyped_storage().data_ptr() for key in wanted}
    used = {key for key, tensor in own.items() if key in wanted or tensor.untyped_storage().data_ptr() in filled}
    return _said(state, used, wanted)


def _converted(path: str, own: State, wanted: State, model: torch.nn.Module) -> State:
    """The tensors as timm's own conversion has them, where they are not what is wanted: names of the authors, position
    embeddings of another size."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not convert or all(key in own and own[key].shape == tensor.shape for key, tensor in wanted.items()):
        return own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints there, and stdout is for answers
            inner: State = convert(dict(own), model)
    except Exception as error:
        raise ProtopruneError(f"{path}: does not fit {type(model).__name__} ({error})") from None
    _nothing_dropped(path, own, inner, model)
    return inner


def _all_covered(path: str, inner: State, wanted: State) -> None:
    missing = [f"{key} is missing" for key in wanted if key not in inner]
    misshapen = [
        f"{key} is {tuple(inner[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in inner and inner[key].shape != tensor.shape
    ]
    if trouble := missing + misshapen:
        raise ProtopruneError(
            f"{path}: only {len(wanted) - len(trouble)} of the encoder's {len(wanted)} tensors matched "
            f"({'; '.join(trouble[:3])}{'; …' if len(trouble) > 3 else ''}); {_ANOTHER}"
        )


def _said(state: State, used: set[str], wanted: State) -> str:
    """What of the file was used, under which prefix, and what was not."""
    prefix = _prefix(state, wanted)
    unused = state.keys() - {prefix + key for key in used}
    others = sorted(key for key in unused if not key.endswith("num_batches_tracked"))
    text = f"{len(wanted)} of {len(wanted)} tensors matched"
    if prefix:
        text += f" under {prefix!r}"
    if others:
        text += f", {len(others)} others ignored ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})"
    return text


def _same_patches(path: str, state: State, wanted: State) -> None:
    """timm would resample the patches of another model to this one's size, which gives features, but not good ones."""
    key = "patch_embed.proj.weight"
    if key in state and key in wanted and state[key].shape[2:] != wanted[key].shape[2:]:
        theirs, ours = ("x".join(map(str, one[key].shape[2:])) for one in (state, wanted))
        raise ProtopruneError(f"{path}: weights for patches of {theirs} pixels, the encoder has {ours}; {_ANOTHER}")


def _nothing_dropped(path: str, before: State, after: State, model: torch.nn.Module) -> None:
    """timm's conversion leaves out what the model has no place for. Inside the backbone that changes every feature."""
    places = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    gone = [k for k, v in before.items() if k not in after and v.untyped_storage().data_ptr() not in places]
    parts = {key.split(".")[0] for key in before.keys() - set(gone) if "." in key}
    inside = [key for key in gone if "." in key and key.split(".")[0] in parts and not key.endswith(_HARMLESS)]
    lost = [key for key in inside if before[key].nan_to_num().count_nonzero()]
    if lost:
        raise ProtopruneError(f"{path}: {_how_lost(lost, model)}")


def _how_lost(lost: list[str], model: torch.nn.Module) -> str:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    biased = _with_bias(architecture) if all(key.endswith("qkv.bias") for key in lost) else ""
    return (
        f"{len(lost)} tensors that carry values have no place in {architecture or 'the model'} "
        f"({', '.join(sorted(lost)[:3])}{', …' if len(lost) > 3 else ''}); "
        + (f"the architecture with that bias is timm:{biased}" if biased else _ANOTHER)
    )


def _with_bias(architecture: str) -> str:
    """timm's architecture that has a bias on queries and values too, '' where there is none."""
    import timm

    biased = architecture.replace("dinov3", "dinov3_qkvb")
    return biased if biased != architecture and timm.is_model(biased) else ""


def _nothing_left_over(path: str, state: State, wanted: State) -> None:
    """A larger backbone of the same family covers a smaller one's names: what it has besides gives it away."""
    parts = {key.split(".")[0] for key in wanted if "." in key} - {"head", "fc", "classifier"}
    more = [key for key in state if key not in wanted and key.split(".")[0] in parts]
    more += [key for key in state if key not in wanted and key.endswith(("token", "tokens", "pos_embed"))]
    more = [key for key in more if not key.endswith(_HARMLESS)]
    if more:
        raise ProtopruneError(
            f"{path}: {len(more)} tensors inside the backbone are not the encoder's ({', '.join(sorted(more)[:3])}); "
            + _ANOTHER
        )


def unprefixed(state: State, wanted: State) -> State:
    """The tensors of the network that covers most of the names in `wanted`, without what stands before them."""
    prefix = _prefix(state, wanted)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefix(state: State, wanted: State) -> str:
    """What stands before the backbone's names (`module.`, `backbone.`, `encoder_q.`, …): what matches most tensors.

    Two equally good prefixes are two networks; the trained or averaged one is preferred to MoCo's key encoder.
    """
    anchors = list(wanted)[:1] + [key for key in wanted if key.endswith("conv1.weight")][:1]
    candidates = {key.removesuffix(anchor) for anchor in anchors for key in state if key.endswith(anchor)} | {""}
    usable = [prefix for prefix in candidates if prefix == "" or prefix.endswith(".")]

    def merit(prefix: str) -> tuple[int, bool, bool, bool, int, str]:
        matched = sum(prefix + key in state for key in wanted)
        return matched, "teacher" in prefix, "encoder_q" in prefix, "encoder_k" not in prefix, -len(prefix), prefix

    return max(usable, key=merit)
