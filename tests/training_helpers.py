"""Small labelled examples for the tests of training."""

from __future__ import annotations

import numpy as np
import torch
from helpers import write_image

from protoprune.training.examples import Examples


def make_examples(inputs: torch.Tensor, labels: np.ndarray, classes: int) -> Examples:
    paths = [f"c{label}/{i:05d}.png" for i, label in enumerate(labels)]
    return Examples("/images", paths, labels.astype(np.int64), [f"c{c}" for c in range(classes)], inputs)


def vectors(n: int = 60, dim: int = 5, classes: int = 3, seed: int = 0, apart: float = 1.0) -> Examples:
    """Gaussian classes; `apart` is the distance of their means in deviations, roughly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = apart * rng.normal(size=(classes, dim))
    inputs = torch.from_numpy((means[labels] + rng.normal(size=(n, dim))).astype(np.float32))
    return make_examples(inputs, labels, classes)


def pixels(n: int = 24, size: int = 8, classes: int = 3, seed: int = 0) -> Examples:
    """Noise whose brightness and colour depend on the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    base = rng.integers(40, 200, (classes, 3, 1, 1))
    inputs = np.clip(base[labels] + rng.integers(-40, 40, (n, 3, size, size)), 0, 255).astype(np.uint8)
    return make_examples(torch.from_numpy(inputs), labels, classes)


def write_folder(folder, counts: dict[str, int], size: int = 8, seed: int = 0):
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(folder / name / f"{i:03d}.png", seed=seed + 100 * number + i, width=size, height=size)
    return folder


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cloned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
