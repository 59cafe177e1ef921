"""Embedding, training, recording and clustering on a CUDA device against the CPU; without one, on a simulated one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import pixels, vectors

import protoprune
from protoprune import records
from protoprune.clustering import prototypes
from protoprune.features.opening import open_features
from protoprune.samplers import InfoBatchSampler, UCBSampler
from protoprune.scores import spearman
from protoprune.training import converged, heads, loop, recording
from protoprune.training.loop import Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
SLOW = {"marks": pytest.mark.slow}


def test_a_head_trains_to_the_same_weights():
    data, recipe = vectors(200), Recipe.for_model("head", epochs=3, batch_size=32, hidden=8, precision="fp32")
    here, there = (loop.fit(data, data, recipe, seed=1, device=name).model.state_dict() for name in ("cpu", "cuda"))
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cnn", "fp32"),
        ("cnn", "auto"),
        ("timm:test_vit", "auto"),
        pytest.param("timm:test_vit", "fp32", **SLOW),
        pytest.param("resnet18", "fp32", **SLOW),
        pytest.param("resnet18", "auto", **SLOW),
    ],
)
def test_a_network_learns(name, precision):
    data = pixels(120, size=32)
    recipe = Recipe.for_model(name, epochs=6, batch_size=20, width=8, lr=0.05, precision=precision)
    fit = loop.fit(data, data, recipe, device="cuda")
    assert (fit.predictions == data.labels).mean() > 0.6  # a third is chance


def test_data_that_stays_on_the_host_gives_the_same_batches(monkeypatch):
    data, recipe = pixels(60, size=32), Recipe.for_model("cnn", epochs=2, batch_size=10, width=4, precision="fp32")
    resident = loop.fit(data, data, recipe, device="cuda").model.state_dict()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    streamed = loop.fit(data, data, recipe, device="cuda").model.state_dict()
    for name, value in resident.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-3, atol=1e-3)


def test_a_sampler_takes_losses_from_the_device():
    data, sampler = pixels(60, size=32), UCBSampler(60, 0.5, every=1)
    loop.fit(data, data, Recipe.for_model("cnn", batch_size=10, width=4), sampler=sampler, steps=12, device="cuda")
    assert sampler.counts.sum() >= 60


def test_a_sampler_resumes_from_a_checkpoint_loaded_onto_the_device():
    """As `torch.load(path, map_location="cuda")` gives it."""
    sampler, after = InfoBatchSampler(8, final_full=0), InfoBatchSampler(8, final_full=0)
    sampler.update(range(8), torch.arange(8.0))
    state = {name: one.to("cuda") if torch.is_tensor(one) else one for name, one in sampler.state_dict().items()}
    after.load_state_dict(state)
    assert list(after) == list(sampler)
    assert after.selected().tolist() == sampler.selected().tolist() != [True] * 8


def test_an_ensemble_measures_what_the_cpu_measures():
    data, recipe = vectors(150), Recipe.for_model("head", epochs=2, batch_size=32)
    subset = np.random.default_rng(0).random((4, 150)) < 0.7
    found = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        *_, (_, ensemble) = heads.epochs(data, recipe, subset, range(4), 0, device)
        found.append(heads.measure(ensemble, data, gradients=True))
    for name, value in found[0].items():
        if name != "prediction":
            np.testing.assert_allclose(found[1][name], value, rtol=1e-2, atol=1e-3)


def test_a_network_is_recorded_with_gradients(tmp_path):
    data, recipe = pixels(40, size=32), Recipe.for_model("cnn", epochs=2, width=4)
    plan = recording.plan(data, data, recipe, models=2, subset_fraction=0.7, gradients=True)
    recording.record(data, data, recipe, tmp_path / "r.h5", plan, gradients=True, device="cuda")
    with records.Record(tmp_path / "r.h5") as record:
        assert np.isfinite(record.last("gradient_norm")).all()
        assert record.committed.tolist() == [2, 2]


def test_a_converged_head_is_that_of_the_cpu():
    data = vectors(150)
    here, there = (converged.Space(data.inputs, device=name) for name in ("cpu", "cuda"))
    heads_of = [converged.fit_head(space, data.labels, len(data.classes), seed=1) for space in (here, there)]
    assert heads_of[0].strength == heads_of[1].strength
    np.testing.assert_allclose(heads_of[0].logits(data.inputs), heads_of[1].logits(data.inputs), atol=1e-2)


def test_the_bundled_encoder_embeds_as_on_the_cpu(image_tree, tmp_path):
    images, found = protoprune.list_folder(image_tree()), []
    for device in ("cpu", "cuda"):
        encoder = protoprune.load_encoder("mini")
        protoprune.embed(images, encoder, tmp_path / f"{device}.h5", device=device, batch_size=8)
        with open_features(tmp_path / f"{device}.h5") as file:
            found.append(file.features[:].astype(np.float32))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_torch_k_means_ranks_as_on_the_cpu():
    features = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    features[:1000] += 3
    here = prototypes.cluster(features, 2, backend="torch")
    assert spearman(here.distance, prototypes.cluster(features, 2, backend="auto").distance) > 0.99
