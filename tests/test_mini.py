"""The bundled encoder: its file, its digest, and features that stay the same on every machine."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from protoprune.encoders.mini import (
    MINI_DIM,
    MINI_INPUT_SIZE,
    MINI_MEAN,
    MINI_SHA256,
    MINI_STD,
    load_mini,
    quadrant_means,
)
from protoprune.errors import ProtopruneError

REFERENCE = Path(__file__).parent / "data" / "mini_reference.npy"


@pytest.fixture(scope="module")
def encoder():
    return load_mini()[0]


def generated_images() -> torch.Tensor:
    """Three normalised images: a colour gradient, stripes, noise; of whole numbers, the same on every machine."""
    y, x = np.mgrid[:MINI_INPUT_SIZE, :MINI_INPUT_SIZE]
    gradient = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1) % 256
    stripes = np.repeat(((x // 5 + y // 9) % 2 * 180 + 30)[..., None], 3, axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (MINI_INPUT_SIZE, MINI_INPUT_SIZE, 3))
    pixels = torch.from_numpy(np.stack([gradient, stripes, noise])).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MINI_MEAN, MINI_STD))
    return (pixels / 255 - mean) / std


def test_weights_are_in_the_package_and_small():
    file = resources.files("protoprune.encoders") / "mini.safetensors"
    assert file.is_file()
    assert len(file.read_bytes()) <= 8 * 2**20


def test_digest_is_returned():
    assert load_mini()[1] == MINI_SHA256


def test_changed_weights_are_refused(tmp_path):
    data = bytearray((resources.files("protoprune.encoders") / "mini.safetensors").read_bytes())
    data[-1] ^= 1
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(data)
    with pytest.raises(ProtopruneError, match=rf"copy\.safetensors: sha256 .* expected {MINI_SHA256[:12]}") as error:
        load_mini(copy)
    assert "\n" not in str(error.value)


def test_missing_weights_are_one_clear_line(tmp_path):
    with pytest.raises(ProtopruneError, match="cannot read the weights of the encoder mini"):
        load_mini(tmp_path / "nothing.safetensors")


def test_matches_the_stored_features(encoder):
    """Other processors round differently; 1e-3 of the features' size is far above that and far below a wrong weight."""
    expected = np.load(REFERENCE)
    features = encoder(generated_images()).numpy()
    assert features.shape == expected.shape == (3, MINI_DIM)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-3 * np.abs(expected).max())


def test_same_input_same_features(encoder):
    images = generated_images()
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size_does_not_matter(encoder, size):
    images = generated_images().repeat(4, 1, 1, 1)
    parts = torch.cat([encoder(part) for part in images.split(size)])
    assert torch.equal(parts, encoder(images))


def test_features_fit_float16_also_for_flat_images(encoder):
    flat = torch.stack([torch.full((3, MINI_INPUT_SIZE, MINI_INPUT_SIZE), value) for value in (-1.0, 0.0, 1.0)])
    features = encoder(torch.cat([flat, generated_images()]))
    assert torch.isfinite(features).all()
    assert features.abs().max() < 1000


def test_an_empty_batch_has_no_features(encoder):
    assert encoder(torch.zeros(0, 3, MINI_INPUT_SIZE, MINI_INPUT_SIZE)).shape == (0, MINI_DIM)


def test_quadrants_share_the_middle_of_an_odd_grid():
    top_left = quadrant_means(3)[0].reshape(3, 3)
    assert top_left.tolist() == [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(quadrant_means(27).sum(1), torch.ones(4))


def test_loads_from_an_installed_wheel(tmp_path):
    """Not from the source tree: the weights must be in the package that users get."""
    import subprocess
    import sys
    import zipfile

    root = Path(__file__).parent.parent
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=root, capture_output=True
    )
    assert built.returncode == 0, built.stderr.decode()
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import protoprune; "
        "from protoprune.encoders.mini import load_mini; "
        "assert protoprune.__file__.startswith(sys.argv[1]); print(load_mini()[1])"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "site"], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == MINI_SHA256, out.stderr
