"""Encoders by name: a frozen image model with its preprocessing and a digest of its weights.

The catalogue is plain data, so listing it imports nothing heavy. Loading gives one `Encoder`: a callable from a
normalised float batch to features. What this module does not know: files of images, batches, feature files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from protoprune.decode import Preprocess
from protoprune.errors import ProtopruneError, UsageError

if TYPE_CHECKING:
    import torch

_ANOTHER = "give the weights of this architecture, or another --encoder"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class EncoderInfo:
    """What `protoprune encoders` prints; `parameters` in millions, `input_size` in pixels."""

    name: str
    architecture: str  # timm's name, or the bundled one's
    dim: int
    parameters: float
    input_size: int
    source: str
    licence: str
    url: str | None = None  # the authors' file where timm has none
    preprocess: Preprocess | None = None  # the authors' evaluation transform, for those files


CATALOGUE = {
    info.name: info
    for info in (
        EncoderInfo(
            "dino_vits16", "vit_small_patch16_224.dino", 384, 21.7, 224, "timm, Caron et al. 2021", "Apache-2.0"
        ),
        EncoderInfo("dino_vits8", "vit_small_patch8_224.dino", 384, 21.7, 224, "timm, Caron et al. 2021", "Apache-2.0"),
        EncoderInfo(
            "dino_vitb16", "vit_base_patch16_224.dino", 768, 85.8, 224, "timm, Caron et al. 2021", "Apache-2.0"
        ),
        EncoderInfo(
            "dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", 384, 22.1, 518, "timm, Oquab et al. 2023", "Apache-2.0"
        ),
        EncoderInfo(
            "dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 768, 86.6, 518, "timm, Oquab et al. 2023", "Apache-2.0"
        ),
        EncoderInfo(
            "dinov3_vits16",
            "vit_small_patch16_dinov3.lvd1689m",
            384,
            21.6,
            256,
            "timm, Siméoni et al. 2025",
            "DINOv3 License",
        ),
        EncoderInfo(
            "dino_resnet50",
            "resnet50",
            2048,
            23.5,
            224,
            "authors' file, Caron et al. 2021",
            "Apache-2.0",
            "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
            Preprocess(224, 256, "bicubic", **_IMAGENET),
        ),
        EncoderInfo(
            "swav_resnet50",
            "resnet50",
            2048,
            23.5,
            224,
            "authors' file, Caron et al. 2020",
            "CC-BY-NC-4.0",
            "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
            Preprocess(224, 256, "bilinear", **_IMAGENET),
        ),
        EncoderInfo("mini", "patch dictionary", 192, 3.1, 64, "bundled, see docs/encoder-card.md", "Apache-2.0"),
    )
}


@dataclass
class Encoder:
    """A frozen model: normalised float images (b, 3, s, s) -> features (b, dim)."""

    name: str
    model: Callable[[torch.Tensor], torch.Tensor]
    dim: int
    preprocess: Preprocess
    digest: str  # sha256 of the weights
    loaded: str = ""  # how the weights were matched, for the user
    fp32_only: bool = False  # the model loses too much in half precision

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)


def load_encoder(name: str, *, weights: str | os.PathLike | None = None, image_size: int | None = None) -> Encoder:
    """The encoder called `name` (a key of CATALOGUE, or `timm:NAME`), ready for inference on the CPU.

    `weights` is a local .pth, .pt or .safetensors file for that architecture; without it the published weights are
    downloaded once and cached. `image_size` overrides the side of the input, in pixels.

    Raises UsageError for an unknown name and ProtopruneError when weights cannot be had or do not fit.
    """
    info = CATALOGUE.get(name)
    if info is None and not name.startswith("timm:"):
        raise UsageError(f"--encoder {name}: unknown; one of {', '.join(CATALOGUE)}, or timm:NAME for any timm model")
    if name == "mini":
        return _bundled(weights, image_size)
    architecture = info.architecture if info else name.removeprefix("timm:")
    loaded = ""
    published = weights is None and (info is None or info.url is None)
    # A look at the hub before torch is imported: without a network the answer comes within a second.
    overlay = _hub_overlay(name, f"timm/{architecture}") if published and info else None
    _require_torch()
    if published:
        model = _published_timm_model(name, architecture, image_size, overlay)
    else:
        path = os.fspath(weights) if weights is not None else _download(info)
        model = _timm_model(architecture, image_size)
        loaded = load_weights(model, path)
    model.eval().requires_grad_(False)
    preprocess = _preprocess(model, info, image_size)
    return Encoder(name, model, _output_dim(model, preprocess.size, name), preprocess, digest(model), loaded)


def _bundled(weights, image_size: int | None) -> Encoder:
    """The encoder that comes with the package. Its codes compare patches by small differences: fp32 only."""
    _require_torch(timm=False)
    from protoprune.mini import MINI_DIM, MINI_INPUT_SIZE, MINI_MEAN, MINI_STD, load_mini

    if weights is not None:
        raise UsageError("--weights does not go with --encoder mini, whose weights are bundled; name an architecture")
    if image_size not in (None, MINI_INPUT_SIZE):
        raise UsageError(f"--image-size {image_size}: the encoder mini takes {MINI_INPUT_SIZE} only")
    model, sha256 = load_mini()
    preprocess = Preprocess(MINI_INPUT_SIZE, MINI_INPUT_SIZE, mean=MINI_MEAN, std=MINI_STD)
    return Encoder("mini", model, MINI_DIM, preprocess, sha256, fp32_only=True)


def load_weights(model: torch.nn.Module, path: str) -> str:
    """Fill `model` from a weight file, through whatever wrapping it was saved in; returns a line saying what matched.

    Refuses, with ProtopruneError, a file that does not cover every tensor of the backbone.
    """
    state = _unwrap(_read_weights(path))
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


def _timm_model(architecture: str, image_size: int | None, **options) -> torch.nn.Module:
    """A timm model without its head. Fixed-size transformers must be told another size; others do not take one."""
    import timm

    if image_size is not None:
        try:
            return timm.create_model(architecture, num_classes=0, img_size=image_size, **options)
        except TypeError:
            pass
        except AssertionError as error:
            raise UsageError(f"--image-size {image_size}: {error}") from None
    try:
        return timm.create_model(architecture, num_classes=0, **options)
    except RuntimeError as error:
        raise UsageError(f"--encoder timm:{architecture}: {str(error).splitlines()[0]}") from None


def _published_timm_model(name: str, architecture: str, image_size: int | None, overlay) -> torch.nn.Module:
    import timm

    if not timm.is_model_pretrained(architecture):
        known = timm.is_model(architecture)
        why = "no published weights for it; give --weights FILE" if known else "no such model"
        raise UsageError(f"--encoder {name}: timm has {why}")
    hub_id = timm.get_pretrained_cfg(architecture).hf_hub_id
    if name not in CATALOGUE and hub_id:
        overlay = _hub_overlay(name, hub_id)
    try:
        return _timm_model(architecture, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except UsageError:
        raise
    except Exception as error:
        raise ProtopruneError(_cannot_download(name, "its weights", hub_id or "timm's site", error)) from None


def _hub_overlay(name: str, hub_id: str) -> dict | None:
    """How timm shall find its weights: None for its own download, a cached file when the hub is out of reach.

    The hub's client retries for most of a minute without a network; one quick look first keeps the answer short.
    """
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:  # it comes with timm, whose absence is reported on its own
        return None
    error = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if error is None:
        return None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            return {"file": cached}
    raise ProtopruneError(_cannot_download(name, "model.safetensors", f"{constants.ENDPOINT}/{hub_id}", error))


def _unreachable(url: str, timeout: float = 4.0) -> str | None:
    """Why `url` cannot be reached, None when something answers."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def _download(info: EncoderInfo) -> str:
    """The authors' weight file in torch.hub's cache.

    We know of no published checksums, so the digest of the first complete download is kept beside the file and every
    later use is checked against it.
    """
    import torch

    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(info.url))
    record = path + ".sha256"
    if not os.path.exists(path):
        error = _unreachable(info.url)
        if error is None:
            try:
                os.makedirs(folder, exist_ok=True)
                torch.hub.download_url_to_file(info.url, path, progress=sys.stderr.isatty())
            except OSError as failure:
                error = str(failure)
        if error is not None:
            raise ProtopruneError(_cannot_download(info.name, os.path.basename(path), info.url, error))
    actual = _file_digest(path)
    try:
        with open(record) as file:
            expected = file.read().strip()
    except FileNotFoundError:
        expected = actual
        with contextlib.suppress(OSError), open(record, "w") as file:  # a shared cache may be read-only
            file.write(actual)
    if actual != expected:
        raise ProtopruneError(f"{path}: damaged (sha256 {actual[:12]}…, not {expected[:12]}…); delete it and run again")
    return path


def _cannot_download(name: str, file: str, source: str, error: object) -> str:
    return (
        f"{name}: cannot download {file} from {source} ({error}); give a local copy with --weights FILE, "
        "or use the bundled encoder with --encoder mini"
    )


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _preprocess(model: torch.nn.Module, info: EncoderInfo | None, image_size: int | None) -> Preprocess:
    import timm.data

    if info and info.preprocess:
        own = info.preprocess
        size = image_size or own.size
        return Preprocess(size, size * own.resize // own.size, own.interpolation, own.crop_mode, own.mean, own.std)
    return Preprocess.from_timm(timm.data.resolve_model_data_config(model), image_size)


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
