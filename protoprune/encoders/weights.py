"""A file of weights -> tensors under timm's names, through whatever it was saved in, or a line that says why not."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

from protoprune.encoders.checkpoints import read_state
from protoprune.encoders.names import familiar
from protoprune.errors import ProtopruneError

if TYPE_CHECKING:
    import torch

_ANOTHER = "give the weights of this architecture, or another --encoder"
# What a checkpoint has beside the weights of a backbone: counters, masks, and the token of masked training.
_HARMLESS = ("num_batches_tracked", "bias_mask", "relative_position_index", "mask_token")


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Fill `model` from a weight file, through whatever wrapping it was saved in; returns a line saying what matched.

    Refuses, with ProtopruneError, a file that does not cover every tensor of the backbone.
    """
    state = familiar(read_state(path), model)
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    prefix = _prefix(state, wanted)
    inner = unprefixed(state, wanted)
    _same_patches(path, inner, wanted)
    before = inner
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and any(key not in inner or inner[key].shape != tensor.shape for key, tensor in wanted.items()):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # timm prints there, and stdout is for answers
                inner = convert(dict(before), model)  # renamed tensors, position embeddings of another size
        except Exception as error:
            raise ProtopruneError(f"{path}: does not fit {type(model).__name__} ({error})") from None
        _nothing_dropped(path, before, inner, model)
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
    filled = {inner[key].untyped_storage().data_ptr() for key in wanted}
    used = {prefix + k for k, v in before.items() if k in wanted or v.untyped_storage().data_ptr() in filled}
    others = sorted(key for key in state.keys() - used if not key.endswith("num_batches_tracked"))
    text = f"{len(wanted)} of {len(wanted)} tensors matched"
    if prefix:
        text += f" under {prefix!r}"
    if others:
        text += f", {len(others)} others ignored ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})"
    return text


def _same_patches(path: str, state: dict[str, Any], wanted: dict[str, Any]) -> None:
    """timm would resample the patches of another model to this one's size, which gives features, but not good ones."""
    for key in ("patch_embed.proj.weight",):
        if key in state and key in wanted and state[key].shape[2:] != wanted[key].shape[2:]:
            theirs, ours = ("x".join(map(str, one[key].shape[2:])) for one in (state, wanted))
            raise ProtopruneError(f"{path}: weights for patches of {theirs} pixels, the encoder has {ours}; {_ANOTHER}")


def _nothing_dropped(path: str, before: dict[str, Any], after: dict[str, Any], model: torch.nn.Module) -> None:
    """timm's conversion leaves out what the model has no place for. Inside the backbone that changes every feature."""
    places = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    gone = [k for k, v in before.items() if k not in after and v.untyped_storage().data_ptr() not in places]
    parts = {key.split(".")[0] for key in before.keys() - set(gone) if "." in key}
    lost = [key for key in gone if "." in key and key.split(".")[0] in parts and not key.endswith(_HARMLESS)]
    lost = [key for key in lost if before[key].nan_to_num().count_nonzero()]
    if not lost:
        return
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    way = _ANOTHER
    if all(key.endswith("qkv.bias") for key in lost):
        import timm

        biased = architecture.replace("dinov3", "dinov3_qkvb")
        if biased != architecture and timm.is_model(biased):
            way = f"the architecture with that bias is timm:{biased}"
    raise ProtopruneError(
        f"{path}: {len(lost)} tensors that carry values have no place in {architecture or 'the model'} "
        f"({', '.join(sorted(lost)[:3])}{', …' if len(lost) > 3 else ''}); {way}"
    )


def _nothing_left_over(path: str, state: dict[str, Any], wanted: dict[str, Any]) -> None:
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


def unprefixed(state: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the network that covers most of the names in `wanted`, without what stands before them."""
    prefix = _prefix(state, wanted)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefix(state: dict[str, Any], wanted: dict[str, Any]) -> str:
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
