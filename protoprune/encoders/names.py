"""Tensor names of other libraries -> those of the authors or of timm, from which timm's own conversion goes on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from protoprune.encoders.checkpoints import State


def familiar(state: State, model: torch.nn.Module) -> State:
    """`state` under names that timm knows, as far as its library is one of those below; else as it is."""
    if "_conv_stem.weight" in state and hasattr(model, "blocks"):
        return _efficientnet(state, model)
    if any(_PATCHES.fullmatch(key) for key in state):
        return _hugging_face(state)
    if any(_CHUNK.search(key) for key in state) and not any(_BLOCK.search(key) for key in state):
        return {_CHUNK.sub(r"\1.\2.", key): value for key, value in state.items()}
    return state


# DINOv2 and DINOv3 train with their blocks in chunks: blocks.0.5.norm1 is block 5.
_CHUNK = re.compile(r"(\bblocks)\.\d+\.(\d+)\.(?=(?:norm|attn|mlp|ls))")
_BLOCK = re.compile(r"\bblocks\.\d+\.(?:norm|attn|mlp|ls)")

_PARTS = {  # of a block: lukemelas's EfficientNet -> timm's, after an expansion and without one
    True: {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
           "_project_conv": "conv_pwl", "_bn2": "bn3"},
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
}  # fmt: skip
_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _efficientnet(state: State, model: torch.nn.Module) -> State:
    """An EfficientNet of lukemelas's port (and what was made from it, Lite included).

    There the blocks are numbered through; in timm by stage, which the model knows.
    """
    stages = model.get_submodule("blocks").children()
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j, _ in enumerate(stage.children())]
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


_PATCHES = re.compile(r"(|.*\.)embeddings\.patch_embeddings\.(projection\.)?weight")
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_INNER = {
    "layernorm_before": "norm1", "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.w12", "mlp.weights_out": "mlp.w3",
    "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
    "layer_scale1": "ls1", "layer_scale2": "ls2",
}  # fmt: skip
_QKV = re.compile(r"attention\.(?:attention\.)?(?:(query|key|value)|([qkv])_(?:proj))")


def _at_the_top(name: str, tensor: str) -> str:
    """The authors' name of a tensor that lies in no layer."""
    return _TOP.get(f"{name}.{tensor}") or f"{_TOP.get(name, name)}.{tensor}"


def _hugging_face(state: State) -> State:
    """ViT, DINOv2, DINOv3 of `transformers` (4 and 5) -> the authors' names; queries, keys and values in one tensor."""
    import torch

    prefix, old = next((m.group(1), bool(m.group(2))) for m in map(_PATCHES.fullmatch, state) if m)
    registers = "register_tokens" if old else "storage_tokens"  # DINOv2's and DINOv3's name
    new: State = {}
    attention: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, tensor = key.removeprefix(prefix).rpartition(".")
        layer = re.fullmatch(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)", name)
        if not key.startswith(prefix) or not name:
            new[key] = value
        elif layer and (projection := _QKV.fullmatch(layer[2])):
            which = (projection[1] or projection[2])[0]
            attention.setdefault((layer[1], tensor), {})[which] = value
        elif layer:
            part = _INNER.get(layer[2], layer[2])
            new[f"blocks.{layer[1]}.{part}.{'gamma' if tensor == 'lambda1' else tensor}"] = value
        else:
            new[registers if tensor == "register_tokens" else _at_the_top(name, tensor)] = value
    for (number, tensor), parts in attention.items():
        some = next(iter(parts.values()))  # DINOv3's keys have no bias
        new[f"blocks.{number}.attn.qkv.{tensor}"] = torch.cat([parts.get(w, torch.zeros_like(some)) for w in "qkv"])
    return new
