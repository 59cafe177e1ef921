"""Checked by mypy in `make lint`, never run: what parameters ask for is had by what the program, tests and users give.

Tests' encoders are `encoders.Encoder` with a model of a few lines; a user's own need not be.
"""

from __future__ import annotations

from dataclasses import dataclass

import h5py
import numpy as np
import torch

import protoprune
from protoprune import encoders
from protoprune.clustering import vectors
from protoprune.embedding import engine
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import FeatureSet
from protoprune.images.decode import Preprocess

SMALL = Preprocess(size=32, resize=36)


@dataclass(frozen=True)
class OwnEncoder:
    """Of a user's, as docs/encoders.md has it: no class of ours."""

    name: str = "colours"
    dim: int = 12
    preprocess: Preprocess = SMALL
    digest: str = "1"
    pool: str = ""
    fp32_only: bool = False

    def model(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(batch, 16).flatten(1)


def an_encoder(loaded: encoders.Encoder, own: OwnEncoder) -> list[engine.Encoder]:
    return [loaded, own]


def rows(array: np.ndarray, dataset: h5py.Dataset, file: FeatureFile, whole: FeatureSet) -> list[vectors.Rows]:
    return [array, dataset, file.features, whole.features]


def what_the_package_shows() -> None:
    """Names of the top level have their types: were they Any, nothing would be there to ignore."""
    protoprune.select("f.h5", kep=0.5)  # type: ignore[call-arg]
    protoprune.nothing  # type: ignore[attr-defined] # noqa: B018
