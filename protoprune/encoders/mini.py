"""The encoder that ships inside the package: `mini`, trained by this project without labels.

A dictionary of image patches (Coates & Ng 2011) at several scales, pooled over the four quadrants, followed by one
linear map that keeps what stays the same between augmented views of an image. No layer was trained by gradient descent:
every weight is the result of k-means or of an eigenvalue problem (scripts/train_encoder.py, docs/encoder-card.md).

It knows local colour and texture and roughly where they are; it knows nothing of objects. It is for runs without a
network, for first tries and for tests, not a replacement for DINO.
"""

import hashlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from protoprune.errors import ProtopruneError

MINI_INPUT_SIZE = 64
MINI_DIM = 192
MINI_MEAN = (0.5, 0.5, 0.5)
MINI_STD = (0.5, 0.5, 0.5)
MINI_SHA256 = "3eeea3f7c3fdb51a7f8f2eb1404f4385195deddeef9c5ff5fa72d0ffc4c2cde4"

PATCH = 6  # pixels, the patch size of Coates & Ng for 32x32 images
RANK = 96  # whitened patch dimensions kept of 108: the last ones are the finest chequerboards, mostly JPEG noise
CHUNK = 8  # images coded at a time on a CPU, so that their codes stay in the cache


class Scale(NamedTuple):
    """One dictionary: the image is averaged over shrink x shrink pixels and cut into patches every `stride` pixels."""

    shrink: int
    stride: int
    atoms: int


SCALES = (Scale(2, 2, 2048), Scale(4, 1, 1024), Scale(1, 3, 512))


class PatchDictionary(nn.Module):
    """(B, 3, S, S) -> (B, 4 * atoms): how much each quadrant of the image looks like each atom of the dictionary.

    Patches are contrast-normalised, whitened and compared with the atoms by cosine; a threshold is taken off and the
    negative rest set to zero, so that a patch speaks for the few atoms it resembles. The square root keeps a large
    uniform area from drowning the rest.
    """

    quadrants: Tensor
    offset: Tensor

    def __init__(self, scale: Scale):
        super().__init__()
        self.shrink = scale.shrink
        self.whiten = nn.Conv2d(3, RANK, PATCH, stride=scale.stride, bias=False)
        self.offset = nn.Parameter(torch.zeros(RANK))
        self.atoms = nn.Linear(RANK, scale.atoms)  # its bias is minus the threshold
        self.precision = torch.float32  # bfloat16 during training, where the CPU has it: 2.5x faster
        side = (MINI_INPUT_SIZE // scale.shrink - PATCH) // scale.stride + 1
        self.register_buffer("quadrants", quadrant_means(side), persistent=False)

    def patches(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, positions, RANK) whitened patches of length 1."""
        images = functional.avg_pool2d(images, self.shrink) if self.shrink > 1 else images
        contrast = patch_deviation(images, self.whiten.stride)
        whitened = (self.whiten(images) / contrast).flatten(2).transpose(1, 2) - self.offset
        return functional.normalize(whitened, dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        patches, dtype = self.patches(images), self.precision
        codes = functional.linear(patches.to(dtype), self.atoms.weight.to(dtype), self.atoms.bias.to(dtype)).relu_()
        return torch.matmul(self.quadrants.to(dtype), codes).float().sqrt_().flatten(1)


class MiniEncoder(nn.Module):
    """(B, 3, 64, 64) normalised images -> (B, MINI_DIM) float32 features, centred."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDictionary(scale) for scale in SCALES)
        self.project = nn.Linear(4 * sum(scale.atoms for scale in SCALES), MINI_DIM)

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) -> (B, 4 * all atoms): what the projection sees."""
        return torch.cat([scale(images) for scale in self.scales], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "cpu":
            return self.project(self.pooled(images))
        return torch.cat([self._chunk(part) for part in images.split(CHUNK)])

    def _chunk(self, images: Tensor) -> Tensor:
        """Always CHUNK images, filled up with grey ones: sums of another shape differ in their last bits."""
        full = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(images)))
        return self.project(self.pooled(full))[: len(images)]


def patch_deviation(images: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(B, 3, h, w) -> (B, 1, h', w'): standard deviation of each patch over its pixels and colours.

    The variance has 10 (of 255 squared) added, as Coates & Ng do, so that noise in a flat area stays small.
    """
    mean = functional.avg_pool2d(images.mean(1, keepdim=True), PATCH, stride)
    square = functional.avg_pool2d(images.square().mean(1, keepdim=True), PATCH, stride)
    count = 3 * PATCH * PATCH
    variance = (square - mean.square()).clamp_(min=0) * count / (count - 1)
    return (variance + 10 / (255 * MINI_STD[0]) ** 2).sqrt()


def quadrant_means(side: int) -> Tensor:
    """(4, side * side): averages over the quadrants of a grid; the middle of an odd side belongs to both halves."""
    halves = torch.zeros(2, side)
    halves[0, : -(-side // 2)] = halves[1, side // 2 :] = 1 / -(-side // 2)
    return torch.einsum("ay,bx->abyx", halves, halves).reshape(4, side * side)


def load_mini(path: str | Path | None = None) -> tuple[MiniEncoder, str]:
    """The trained encoder, in evaluation mode, and the sha256 of its weights file (of a copy of it at `path`)."""
    from safetensors.torch import load

    file = Path(path) if path else resources.files("protoprune.encoders") / "mini.safetensors"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ProtopruneError(f"cannot read the weights of the encoder mini: {error}; reinstall protoprune") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != MINI_SHA256:
        raise ProtopruneError(
            f"{file}: sha256 {digest[:12]}..., expected {MINI_SHA256[:12]}...: "
            "the weights of the encoder mini are damaged or of another version; reinstall protoprune"
        )
    return from_weights(load(data)), digest


def from_weights(weights: dict[str, Tensor]) -> MiniEncoder:
    """The encoder with these weights (float16 in the file, float32 in use)."""
    encoder = MiniEncoder()
    encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return encoder.eval().requires_grad_(False)
