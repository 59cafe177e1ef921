"""On real photographs (development data, skipped where missing): features and ranking against a plain reference."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoprune.embedding import embed
from protoprune.encoders import load_encoder
from protoprune.features import FeatureFile
from protoprune.images import list_folder
from protoprune.prototypes import cluster
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


@pytest.fixture(scope="module", params=["resnet50", "vit_tiny_patch16_224"])
def reference(request, photos, tmp_path_factory):
    """(architecture, weights, features by path): random weights, timm's own transform + eager fp32 forward, one photo
    at a time."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=0).eval()
    weights = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(model.state_dict(), weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    rows = {}
    with torch.inference_mode():
        for path in sorted(os.listdir(photos)):
            with Image.open(photos / path) as image:
                rows[path] = model(transform(image.convert("RGB"))[None])[0].numpy()
    return request.param, weights, rows


def difficulty(features, prototypes):
    return 1 - (features / np.linalg.norm(features, axis=1, keepdims=True) @ prototypes.T).max(1)


@pytest.mark.parametrize(("precision", "store", "least"), [("fp32", "float32", 0.9999), ("bf16", "float16", 0.995)])
def test_features_and_ranking_of_photos_equal_the_plain_reference(precision, store, least, photos, reference, tmp_path):
    architecture, weights, rows = reference
    encoder = load_encoder(f"timm:{architecture}", weights=weights)
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
        f"\n{architecture} {precision}: cosine least {cosine.min():.6f} mean {cosine.mean():.6f}, Spearman {ranks:.4f}"
    )
    assert cosine.min() >= least
    assert ranks >= 0.99
