"""Ensembles of heads: each model is what it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import cloned, vectors

from protoprune.errors import ProtopruneError
from protoprune.training import heads, loop
from protoprune.training.heads import Ensemble
from protoprune.training.loop import Recipe

CPU = torch.device("cpu")


def recipe(**how) -> Recipe:
    return Recipe.for_model("head", **{"epochs": 3, "batch_size": 8, "lr": 0.5, **how})


def train(data, chosen, subset, seeds, order_seed=0) -> Ensemble:
    *_, (_, ensemble) = heads.epochs(data, chosen, subset, seeds, order_seed, CPU)
    return ensemble


def everyone(models: int, n: int) -> np.ndarray:
    return np.ones((models, n), bool)


def random_subsets(models: int, n: int, share: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    subset = np.zeros((models, n), bool)
    for row in subset:
        row[rng.permutation(n)[: round(share * n)]] = True
    return subset


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("n", [60, 57, 5])  # 57 makes batches of two sizes, 5 is less than one
@pytest.mark.parametrize("schedule", ["linear", "steps"])
def test_one_model_on_all_examples_is_what_the_loop_trains(hidden, n, schedule):
    data, chosen = vectors(n), recipe(hidden=hidden, schedule=schedule, label_smoothing=0.1, weight_decay=0.01)
    for (done, ensemble), state in zip(
        heads.epochs(data, chosen, everyone(1, n), [5], 5, CPU), loop.epochs(data, chosen, seed=5, device="cpu"),
        strict=True,
    ):  # fmt: skip
        assert done == state.epoch
        one = ensemble.model(0)
        assert one.state_dict().keys() == state.model.state_dict().keys()
        for name, value in state.model.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("hidden", [0, 6])
def test_a_model_does_not_depend_on_the_others(hidden):
    data, chosen = vectors(), recipe(hidden=hidden)
    subset = random_subsets(5, 60, 0.7)
    together = train(data, chosen, subset, range(5))
    for m in range(5):
        alone = train(data, chosen, subset[m : m + 1], [m])
        for name, value in alone.model(0).state_dict().items():
            torch.testing.assert_close(together.model(m).state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        together.model(0).network.state_dict()[next(iter(alone.model(0).network.state_dict()))],
        together.model(1).network.state_dict()[next(iter(alone.model(0).network.state_dict()))],
    )


def test_examples_outside_a_subset_do_not_matter():
    data, chosen = vectors(), recipe(hidden=4)
    subset = random_subsets(2, 60, 0.5)
    before = [cloned(train(data, chosen, subset, [1, 2]).model(m)) for m in range(2)]
    outside = ~subset[0]
    data.labels[outside] = (data.labels[outside] + 1) % 3
    after = train(data, chosen, subset, [1, 2])
    for name, value in before[0].items():
        assert torch.equal(after.model(0).state_dict()[name], value)
    assert any(not torch.equal(after.model(1).state_dict()[name], value) for name, value in before[1].items())


def test_a_model_learns_from_its_subset_as_if_nothing_else_were_there():
    """By hand: gradient steps of the mean over its own examples of each batch."""
    data, chosen = vectors(20, dim=3), recipe(epochs=2, batch_size=5, weight_decay=0.0, momentum=0.0)
    subset = random_subsets(1, 20, 0.5)
    found = train(data, chosen, subset, [3], order_seed=9).model(0)
    model = loop.make_model(data, chosen, 3)
    step, total = 0, 2 * 2  # batches of 10 hold 5 of its own on average
    for epoch in range(2):
        order = np.random.default_rng([9, 1, epoch]).permutation(20)
        for batch in (order[:10], order[10:]):
            own = torch.from_numpy(batch[subset[0, batch]])
            loss = torch.nn.functional.cross_entropy(model(data.inputs[own]), torch.from_numpy(data.labels)[own])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= chosen.lr * loop.rate(chosen, step, total) * gradient
            step += 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("classes", [2, 4])
def test_gradient_norms_are_those_of_autograd(hidden, classes):
    data = vectors(12, dim=6, classes=classes)
    ensemble = train(data, recipe(hidden=hidden, epochs=1), everyone(3, 12), range(3))
    found = heads.measure(ensemble, data, gradients=True)["gradient_norm"]
    assert found.shape == (3, 12)
    for m in range(3):
        model = ensemble.model(m)
        for i in range(12):
            loss = torch.nn.functional.cross_entropy(model(data.inputs[i : i + 1]), torch.tensor([data.labels[i]]))
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            expected = torch.cat([g.flatten() for g in gradients]).norm().item()
            assert found[m, i] == pytest.approx(expected, rel=1e-4)


def test_measuring_in_pieces_changes_nothing(monkeypatch):
    data = vectors(50, classes=4)
    chosen = recipe(hidden=5)
    ensemble, before = Ensemble(data, chosen, range(3), CPU), Ensemble(data, chosen, range(5, 8), CPU)
    whole = heads.measure(ensemble, data, gradients=True, previous=before)
    monkeypatch.setattr(heads, "_STEP_BYTES", 4 * 8 * 9 * 3 * 7)  # 7 rows at once
    pieces = heads.measure(ensemble, data, gradients=True, previous=before)
    assert whole.keys() == pieces.keys()
    assert len(whole) == 8
    for name, value in whole.items():
        assert value.shape == (3, 50)
        np.testing.assert_allclose(pieces[name], value, rtol=1e-4, atol=1e-6)
    assert whole["change"].min() > 0


def test_huge_gradients_fit_into_the_record():
    data = vectors(6, dim=4)
    data.inputs[0] = 1e12
    ensemble = Ensemble(data, recipe(), [0], CPU)
    ensemble.scale = torch.ones_like(ensemble.scale)
    assert np.isfinite(heads.measure(ensemble, data, gradients=True)["gradient_norm"].astype(np.float16)).all()


def test_a_copy_is_left_behind():
    data = vectors()
    runs = heads.epochs(data, recipe(), everyone(2, 60), [0, 1], 0, CPU)
    _, ensemble = next(runs)
    kept, weights = ensemble.copy(), ensemble.weights[0].detach().clone()
    next(runs)
    assert torch.equal(kept.weights[0], weights)
    assert not torch.equal(ensemble.weights[0], weights)


def test_groups_bound_memory():
    small, large = recipe(), recipe(hidden=512, batch_size=4096)
    assert heads.group_size(small, 10, everyone(20, 100)) == 20
    assert heads.group_size(large, 1000, everyone(20, 10**5)) == 2
    # A subset of 1 % is met in batches 100 times as large.
    assert heads.group_size(recipe(batch_size=256), 100, random_subsets(10, 50_000, 0.01)) == 6
    assert heads.group_size(recipe(batch_size=10**6), 10**5, everyone(3, 10**6)) == 1


def test_a_loss_that_is_no_number_is_one_clear_error():
    data = vectors()
    with pytest.raises(ProtopruneError, match=r"loss is (nan|inf) after \d+ steps; train with a smaller --lr"):
        train(data, recipe(lr=1e30, epochs=5), everyone(2, 60), [0, 1])
