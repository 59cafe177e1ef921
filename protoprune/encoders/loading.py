"""An encoder's name (and perhaps a file of weights) -> a frozen model, its preprocessing and its digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from protoprune.arguments import checked
from protoprune.bounds import check_whole
from protoprune.encoders import sources
from protoprune.encoders.catalogue import CATALOGUE, EncoderInfo
from protoprune.encoders.weights import load_weights
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import DECODERS, LARGEST_SIDE, Preprocess

if TYPE_CHECKING:
    import torch


POOLS = ("token", "avg")


@dataclass
class Encoder:
    """A frozen model: normalised float images (b, 3, s, s) -> features (b, dim)."""

    name: str
    model: Callable[[torch.Tensor], torch.Tensor]
    dim: int
    preprocess: Preprocess
    digest: str  # sha256 of the weights
    loaded: str = ""  # how the weights were matched, for the user
    pool: str = ""  # what becomes of the tokens or of the map: token, avg, or the model's own word
    fp32_only: bool = False  # the model loses too much in half precision

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, dim={self.dim}, image_size={self.preprocess.size}, pool={self.pool!r})"

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)


@checked
def load_encoder(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    pool: str | None = None,
    decode: str = "exact",
) -> Encoder:
    """The encoder called `name` (a key of CATALOGUE, or `timm:NAME`), ready for inference on the CPU.

    `weights` is a local .pth, .pt or .safetensors file for that architecture; without it the published weights are
    downloaded once and cached, or taken from the package that holds them. `image_size` overrides the side of the input,
    in pixels. `pool` is `token` (a transformer's class token) or `avg` (the mean of its patch tokens, or of a
    network's map), after the last normalisation; by default what the authors evaluate, in the catalogue, else timm's.

    `decode` is `exact` or `fast` (large JPEGs are decoded at half their size or less: see `decode.FAST_MARGIN`).

    Raises UsageError for an unknown name and ProtopruneError when weights cannot be had or do not fit.
    """
    check_encoder(name, weights, image_size, pool, decode)
    encoder = _bundled() if name == "mini" else _timm_encoder(name, weights, image_size, pool)
    encoder.preprocess = replace(encoder.preprocess, decode=decode)
    return encoder


def check_encoder(
    name: str, weights: str | os.PathLike[str] | None, image_size: int | None, pool: str | None, decode: str
) -> None:
    """Raise UsageError for arguments of `load_encoder` that it will refuse, as far as that can be told at once."""
    if name not in CATALOGUE and not name.startswith("timm:"):
        raise UsageError(f"--encoder {name}: unknown; one of {', '.join(CATALOGUE)}, or timm:NAME for any timm model")
    if image_size is not None:
        check_whole("--image-size", image_size, 8, LARGEST_SIDE)
    if decode not in DECODERS:
        raise UsageError(f"--decode {decode}: expected {' or '.join(DECODERS)}")
    if pool not in (None, *POOLS):
        raise UsageError(f"--pool {pool}: expected one of {', '.join(POOLS)}")
    if weights is not None and not os.path.isfile(weights):
        raise UsageError(f"--weights {weights}: no such file")
    if name == "mini":
        if weights is not None:
            raise UsageError(
                "--weights does not go with --encoder mini, whose weights are bundled; name an architecture"
            )
        if image_size not in (None, side := CATALOGUE[name].input_size):
            raise UsageError(f"--image-size {image_size}: the encoder mini takes {side} only")
        if pool not in (None, "avg"):
            raise UsageError(f"--pool {pool}: the encoder mini averages its codes; leave --pool out")


def _timm_encoder(
    name: str, weights: str | os.PathLike[str] | None, image_size: int | None, pool: str | None
) -> Encoder:
    info = CATALOGUE.get(name)
    architecture = info.architecture if info else name.removeprefix("timm:")
    size = image_size or _authors_size(info)
    loaded = ""
    published = weights is None and (info is None or not (info.url or info.package))
    # A look at the hub before torch is imported: without a network the answer comes within a second.
    overlay = sources.hub_overlay(name, f"timm/{architecture}") if published and info else None
    _require_torch()
    if published:
        model = _published_timm_model(name, architecture, size, overlay)
    else:
        path = _published_file(info) if weights is None and info is not None else os.fspath(weights or "")
        model = _timm_model(architecture, size)
        loaded = load_weights(model, path)
    model.eval().requires_grad_(False)
    preprocess = _preprocess(model, info, image_size)
    pool = _set_pool(model, pool or (info.pool if info else None), name)
    dim = _output_dim(model, preprocess.size, name)
    return Encoder(name, model, dim, preprocess, digest(model), loaded, pool)


def _authors_size(info: EncoderInfo | None) -> int | None:
    """The input side that timm must be told, where the authors evaluate at another one than timm does."""
    return info.preprocess.size if info and info.preprocess and info.pool == "token" else None


def _set_pool(model: torch.nn.Module, pool: str | None, name: str) -> str:
    """Pool as asked (None: as the model does) and say how; UsageError where the model cannot."""
    own = getattr(model, "global_pool", None)
    if not isinstance(own, str):  # a network with a map: a module, here or in its head, that averages
        head = own if own is not None else getattr(getattr(model, "head", None), "global_pool", None)
        own = str(getattr(head, "pool_type", "") or "")
    if pool in (None, own):
        return own
    tokens = isinstance(getattr(model, "global_pool", None), str) and own in POOLS
    if not tokens or (pool == "token" and not getattr(model, "num_prefix_tokens", 0)):
        raise UsageError(f"--pool {pool}: the encoder {name} pools its own way ({own or 'unnamed'}); leave --pool out")
    model.global_pool = pool  # type: ignore[assignment]  # a word in timm, and torch expects tensors or modules
    return str(pool)


def _bundled() -> Encoder:
    """The encoder that comes with the package. Its codes compare patches by small differences: fp32 only."""
    _require_torch(timm=False)
    from protoprune.encoders.mini import MINI_DIM, MINI_INPUT_SIZE, MINI_MEAN, MINI_STD, load_mini

    model, sha256 = load_mini()
    preprocess = Preprocess(MINI_INPUT_SIZE, MINI_INPUT_SIZE, mean=MINI_MEAN, std=MINI_STD)
    return Encoder("mini", model, MINI_DIM, preprocess, sha256, pool="avg", fp32_only=True)


def digest(model: torch.nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all tensors of a model."""
    import torch

    sha = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _require_torch(*, timm: bool = True) -> None:
    try:
        import_module("torch")
        if timm:  # seconds to import, and the bundled encoder does without
            import_module("timm")
    except ImportError as error:
        raise ProtopruneError(
            f"embedding needs {error.name}, which is not installed; run: pip install 'protoprune[cpu]' (or [gpu])"
        ) from None


def check_patches(model: torch.nn.Module, image_size: int) -> None:
    """UsageError where patches do not fill the image: the last rows and columns would be left out."""
    from timm.layers.patch_embed import PatchEmbed

    patches = getattr(model, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad:
        return
    side = max(patches.patch_size)
    if left := image_size % side:
        near = " or ".join(str(one) for one in (image_size - left, image_size - left + side) if one)
        raise UsageError(f"--image-size {image_size}: patches of {side} pixels leave out the last {left}; give {near}")


def _timm_model(architecture: str, image_size: int | None, **options: Any) -> torch.nn.Module:
    """A timm model without its head. Fixed-size transformers must be told another size; others do not take one."""
    import timm

    if image_size is not None:
        try:
            model = timm.create_model(architecture, num_classes=0, img_size=image_size, **options)
            check_patches(model, image_size)
            return model
        except TypeError:
            pass
        except AssertionError as error:
            raise UsageError(f"--image-size {image_size}: {error}") from None
    try:
        return timm.create_model(architecture, num_classes=0, **options)
    except RuntimeError as error:
        raise UsageError(f"--encoder timm:{architecture}: {str(error).splitlines()[0]}") from None


def _published_timm_model(
    name: str, architecture: str, image_size: int | None, overlay: dict[str, Any] | None
) -> torch.nn.Module:
    import timm

    if not timm.is_model_pretrained(architecture):
        known = timm.is_model(architecture)
        why = "no published weights for it; give --weights FILE" if known else "no such model; see timm.list_models()"
        raise UsageError(f"--encoder {name}: timm has {why}")
    published = timm.get_pretrained_cfg(architecture)
    hub_id = published.hf_hub_id if published else None
    if name not in CATALOGUE and hub_id:
        overlay = sources.hub_overlay(name, hub_id)
    try:
        return _timm_model(architecture, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except UsageError:
        raise
    except Exception as error:
        raise ProtopruneError(sources.cannot_download(name, "its weights", hub_id or "timm's site", error)) from None


def _published_file(info: EncoderInfo) -> str:
    return sources.packaged(info) if info.package else sources.download(info)


def _preprocess(model: torch.nn.Module, info: EncoderInfo | None, image_size: int | None) -> Preprocess:
    from timm.data.config import resolve_model_data_config

    if info and info.preprocess:
        own = info.preprocess
        size = image_size or own.size
        return Preprocess(size, size * own.resize // own.size, own.interpolation, own.crop_mode, own.mean, own.std)
    return Preprocess.from_timm(resolve_model_data_config(model), image_size)


def _output_dim(model: torch.nn.Module, size: int, name: str) -> int:
    import torch

    with torch.inference_mode():
        try:
            shape = model(torch.zeros(1, 3, size, size)).shape
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--encoder {name} does not take images of {size} px ({reason}); give --image-size"
            ) from None
    if len(shape) != 2:
        raise UsageError(f"--encoder {name} gives features of shape {tuple(shape[1:])}, not one vector an image")
    return shape[1]
