"""On real photographs (development data, skipped where missing): features and ranking against a plain reference."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoprune.clustering.prototypes import cluster
from protoprune.embedding.pipeline import embed
from protoprune.encoders import load_encoder
from protoprune.features.featurefile import FeatureFile
from protoprune.images.listing import list_folder
from protoprune.scores import spearman

ARCHIVE = Path(__file__).parent.parent.parent / "shared" / "data" / "photos.tgz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE.exists(), reason="needs the development data (photos.tgz), which is not published"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    import tarfile

    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder / "photos"


@pytest.fixture(scope="module", params=["lite0", "timm:resnet50", "timm:vit_tiny_patch16_224"])
def reference(request, photos, tmp_path_factory):
    """(encoder, features by path): a plain transform + eager fp32 forward, one photo at a time. lite0 is a real
    pretrained network; the others have random weights and timm's own transform."""
    import timm

    if request.param == "lite0":
        encoder = load_encoder("lite0")
        transform = lite_transform()
    else:
        torch.manual_seed(0)
        model = timm.create_model(request.param.removeprefix("timm:"), num_classes=0).eval()
        weights = tmp_path_factory.mktemp("weights") / "w.pth"
        torch.save(model.state_dict(), weights)
        encoder = load_encoder(request.param, weights=weights)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    rows = {}
    with torch.inference_mode():
        for path in sorted(os.listdir(photos)):
            with Image.open(photos / path) as image:
                rows[path] = encoder.model(transform(image.convert("RGB"))[None])[0].numpy()
    return encoder, rows


def lite_transform():
    """EfficientNet-Lite's evaluation, written out: the middle 224 of 256 pixels, (x - 127) / 128."""
    from torchvision import transforms

    return transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.PILToTensor(),
        lambda x: (x.float() - 127) / 128,
    ])  # fmt: skip


def difficulty(features, prototypes):
    return 1 - (features / np.linalg.norm(features, axis=1, keepdims=True) @ prototypes.T).max(1)


@pytest.mark.timeout(600)  # bf16 where the processor imitates it
@pytest.mark.parametrize(("precision", "store", "least"), [("fp32", "float32", 0.9999), ("bf16", "float16", 0.995)])
def test_features_and_ranking_of_photos_equal_the_plain_reference(precision, store, least, photos, reference, tmp_path):
    encoder, rows = reference
    embed(list_folder(photos), encoder, tmp_path / "f.h5", precision=precision, store=store)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == sorted(rows)
        features = file.features[:].astype(np.float32)
    expected = np.stack([rows[path] for path in sorted(rows)])
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = (features * expected).sum(1) / norms
    # Against the same prototypes: with 200 photos k-means itself lands elsewhere after a change in the last bits.
    prototypes = cluster(expected, 10).centroids
    ranks = spearman(difficulty(features, prototypes), difficulty(expected, prototypes))
    print(
        f"\n{encoder.name} {precision}: cosine least {cosine.min():.6f} mean {cosine.mean():.6f}, Spearman {ranks:.4f}"
    )
    # A trained network amplifies what it was trained to see: one photo in 200 turns a step or two of 255 in 1 % of its
    # pixels (torch's resize against Pillow's) into 0.9999 - 4e-6.
    assert cosine.min() >= (min(least, 0.9998) if encoder.name == "lite0" else least)
    assert cosine.mean() >= least
    assert ranks >= 0.99


def test_fast_decoding_holds_its_bounds_on_photos(photos, tmp_path):
    """Opt-in, since it misses .9999: at least .995 a photo, and the ranking by .99. With mini, at whose 64 pixels
    photos of 500 x 375 are large enough to be decoded at a half; at 224 pixels they are not."""
    features = {}
    for how in ("exact", "fast"):
        embed(list_folder(photos), load_encoder("mini", decode=how), tmp_path / f"{how}.h5", store="float32")
        with FeatureFile(tmp_path / f"{how}.h5") as file:
            features[how] = file.features[:]
    exact, fast = features["exact"], features["fast"]
    cosine = (exact * fast).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(fast, axis=1))
    prototypes = cluster(exact, 10).centroids
    ranks = spearman(difficulty(exact, prototypes), difficulty(fast, prototypes))
    print(f"\nmini fast: cosine least {cosine.min():.6f} mean {cosine.mean():.6f}, Spearman {ranks:.4f}")
    assert 0.995 <= cosine.min() < 0.9999
    assert ranks >= 0.99
