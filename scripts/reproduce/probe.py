"""EL2N of a probe: models trained briefly, whose mistakes rank the images. Recorded once, then read."""

from __future__ import annotations

import hashlib

import numpy as np
from lab import Lab

from protoprune.metrics.catalogue import score
from protoprune.records import Record
from protoprune.training import recording
from protoprune.training.examples import Examples


def el2n(
    lab: Lab, train: Examples, test: Examples, *, epochs: int, models: int, share: float = 1.0
) -> tuple[np.ndarray, float]:
    """((n,) scores of the training images, larger = harder; mean test accuracy of the probe's models).

    share: of the training images that each model sees; all of them are scored, by all models.
    """
    recipe = lab.recipe("probe", epochs=epochs)
    plan = recording.plan(train, test, recipe, models=models, subset_fraction=share, every=epochs)
    made_by = repr((recipe, models, share, train.fingerprint(), test.fingerprint()))
    out = lab.folder / f"probe-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}.h5"
    if not out.exists():
        lab.say(f"probe: {models} models, {epochs} epochs, on {share:.0%} of {len(train):,} images each")
    recording.record(train, test, recipe, out, plan, device=lab.device)
    with Record(out) as record:
        accuracy = float(np.mean(record.test_prediction == record.test_labels))
        return score("el2n", record, epoch=epochs, models="all").values, accuracy
