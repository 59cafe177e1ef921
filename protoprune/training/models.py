"""Models to train: a head on vectors, a small CNN, ResNet-18 in its CIFAR form, and any timm model.

Every model takes raw inputs (uint8 pixels or vectors) and normalises them itself, so that a model is one object. What
this module does not know: data sets, losses, seeds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import sha256_of

MODELS = ("head", "cnn", "resnet18")  # and timm:NAME
_PATCH_PIXELS = 2**19  # of the images that whitening is measured on: 512 of 32 x 32
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalised(nn.Module):
    """(x - mean) / std, then the network. Pixels in, logits out."""

    network: nn.Module
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: nn.Module, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network((inputs.float() - self.mean) * self.scale)


def check_name(name: str) -> None:
    """UsageError unless there is a model of this name."""
    if name in MODELS:
        return
    if not name.startswith("timm:"):
        raise UsageError(f"--model {name}: expected one of {', '.join(MODELS)} or timm:NAME")
    import timm

    if not timm.is_model(name.removeprefix("timm:")):
        raise UsageError(f"--model {name}: timm has no such model; see timm.list_models()")


def build(
    name: str, classes: int, sample: torch.Tensor, *, width: int = 32, hidden: int = 0, weights: str | None = None
) -> Normalised:
    """An untrained model for inputs like `sample`, whose mean and deviation it normalises by.

    name: head, cnn, resnet18 or timm:NAME; width: channels of the first layer (cnn) ; hidden: units of a head's hidden
    layer, 0 for a linear head; weights: a file to start from (classifier left out).

    The caller seeds torch around this call, as `loop.make_model` does.
    """
    check_name(name)
    if (name == "head") != (sample.ndim == 2):
        kind = "vectors (a feature file)" if name == "head" else "images (a folder)"
        raise UsageError(f"--model {name} trains on {kind}; got {'vectors' if sample.ndim == 2 else 'images'}")
    if name == "head":
        model = Normalised(head(sample.shape[1], classes, hidden), *head_scale(sample))
        if weights is not None:
            start_from(model, _state(weights, model), weights)
        return model
    mean = sample.float().mean((0, 2, 3)).view(1, 3, 1, 1)
    std = sample.float().std((0, 2, 3)).clamp_min(1).view(1, 3, 1, 1)
    if name == "cnn":
        step = math.ceil(sample[:, 0].numel() / _PATCH_PIXELS)
        network = small_cnn(classes, width, (sample[::step].float() - mean) / std)
    elif name == "resnet18":
        network = _resnet18(classes, sample.shape[-1])
    else:
        network = _timm(name.removeprefix("timm:"), classes, sample.shape[-1], weights)
        config = getattr(network, "pretrained_cfg", {}) or {}
        mean = 255 * torch.tensor(config.get("mean", _IMAGENET_MEAN)).view(1, 3, 1, 1)
        std = 255 * torch.tensor(config.get("std", _IMAGENET_STD)).view(1, 3, 1, 1)
    model = Normalised(network, mean, std)
    if weights is not None and not name.startswith("timm:"):
        start_from(model, _state(weights, model), weights)
    return model.to(memory_format=torch.channels_last)


def head_scale(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std * sqrt(d)), each (d,): normalised vectors have a length of about 1, so one learning rate suits all."""
    std = vectors.std(0).clamp_min(1e-6) if len(vectors) > 1 else torch.ones(vectors.shape[1])
    return vectors.mean(0), std * vectors.shape[1] ** 0.5


def head(dim: int, classes: int, hidden: int = 0) -> nn.Module:
    """A linear softmax layer, or a perceptron with one hidden ReLU layer."""
    if not hidden:
        return nn.Linear(dim, classes)
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def small_cnn(classes: int, width: int, images: torch.Tensor) -> nn.Module:
    """airbench's network (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds"), with w, 2w and 4w channels in place of 64,
    256 and 256, for images of 8 pixels and more.

    A 2x2 convolution that whitens the normalised `images` and stays as it is, then three groups of two 3x3
    convolutions that start as the identity; batch norm has biases and no weights, and the logits are scaled by 1/9.
    """

    def norm(channels: int) -> nn.Module:
        made = nn.BatchNorm2d(channels, momentum=0.4)
        made.weight.requires_grad_(False)
        return made

    def group(inside: int, outside: int, ceil: bool = False) -> nn.Sequential:
        first, second = (nn.Conv2d(n, outside, 3, padding=1, bias=False) for n in (inside, outside))
        for one in (first, second):
            nn.init.dirac_(one.weight[: one.in_channels].detach())
        return nn.Sequential(
            first, nn.MaxPool2d(2, ceil_mode=ceil), norm(outside), nn.GELU(), second, norm(outside), nn.GELU()
        )

    whitening = nn.Conv2d(3, 24, 2)
    whitening.weight.requires_grad_(False)
    whiten(whitening, images)
    last = nn.Linear(4 * width, classes, bias=False)
    return nn.Sequential(
        whitening, nn.GELU(), group(24, width), group(width, 2 * width),
        group(2 * width, 4 * width, ceil=True),  # images of 8 pixels are 1 wide by now
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), last, Scaled(1 / 9),
    )  # fmt: skip


class Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


def whiten(first: nn.Conv2d, images: torch.Tensor) -> None:
    """Set a convolution of 24 filters of 2x2 to the principal directions of the images' patches, scaled to unit
    variance, and their negatives; `images` are normalised (n, 3, h, w)."""
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.cat([filters, -filters]))


def _resnet18(classes: int, size: int) -> nn.Module:
    """ResNet-18; for images of at most 64 pixels with a 3x3 first convolution and no first pooling (Data Diet)."""
    import timm

    network = timm.create_model("resnet18", pretrained=False, num_classes=classes)
    if size <= 64:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _timm(name: str, classes: int, size: int, weights: str | None) -> nn.Module:
    from protoprune.encoders import load_weights

    network = _timm_for_size(name, size)
    if weights is not None:
        load_weights(network, weights)
    network.reset_classifier(classes)
    return network


def _timm_for_size(name: str, size: int) -> Any:
    """A timm model that takes images of this size. Some must be told it, some know no such option, and some of those
    that can be told it run at their own size only; so it is tried."""
    import timm

    from protoprune.encoders.loading import check_patches

    trouble: Exception | None = None
    tried: list[dict[str, Any]] = [{"img_size": size}, {}]
    for options in tried:
        try:
            network = timm.create_model(name, pretrained=False, num_classes=0, **options)
            with torch.no_grad():
                network.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:  # whatever a model raises at a size that it was not made for
            trouble = trouble if isinstance(error, TypeError) and trouble else error
        else:
            check_patches(network, size)
            return network.train()
    said = (str(trouble).splitlines() or [type(trouble).__name__])[0][:150]
    raise UsageError(
        f"--model timm:{name}: takes no images of {size} x {size} pixels ({said}); give another --image-size"
    )


def _state(path: str | os.PathLike[str], model: Normalised) -> dict[str, torch.Tensor]:
    """The network's tensors in a file, under our names: out of a training checkpoint, whatever stands before them."""
    from protoprune.encoders import read_state, unprefixed

    wanted = {key.removeprefix("network."): value for key, value in model.state_dict().items() if "network." in key}
    return {f"network.{key}": value for key, value in unprefixed(read_state(path), wanted).items()}


def start_from(model: Normalised, state: dict[str, torch.Tensor], what: str = "weights") -> None:
    """Copy all weights but the classifier's (and the normalisation of the inputs, which stays that of the new data).

    Raises ProtopruneError when anything else does not fit.
    """
    own = model.state_dict()
    last = _classifier(model)
    wanted = [name for name in own if name not in ("mean", "scale") and not name.startswith(last)]
    if not wanted:
        raise UsageError(f"{what}: a linear head is all classifier, nothing of it can be started from; give --hidden")
    wrong = [name for name in wanted if getattr(state.get(name), "shape", None) != own[name].shape]
    if wrong:
        raise ProtopruneError(
            f"{what}: {len(wanted) - len(wrong)} of {len(wanted)} tensors fit the model (first that does not: "
            f"{wrong[0]}); give weights of the same model and width"
        )
    model.load_state_dict({**own, **{name: state[name] for name in wanted}})


def _classifier(model: Normalised) -> tuple[str, ...]:
    """Prefixes of the tensors that depend on the classes: of timm's classifier, else of the last linear layer."""
    get_classifier = getattr(model.network, "get_classifier", None)
    if get_classifier is not None:
        found = get_classifier()
        own = {id(one) for one in (found if isinstance(found, tuple) else (found,))}
        return tuple(name + "." for name, module in model.named_modules() if id(module) in own)
    return ([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1] + ".",)


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file of weights, for keys."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UsageError(f"--weights {path}: cannot be read ({error.strerror}); give a file of weights") from None


def parameter_groups(model: nn.Module, decay: float, bias_lr: float = 1.0) -> Sequence[dict[str, Any]]:
    """Optimizer groups of what is trained: matrices and kernels with weight decay; biases and batch norm without it,
    and with `bias_lr` times the learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay, "times": 1.0},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "times": bias_lr},
    ]
