"""The training loop: two runs differ by their subset alone, and a run that goes on is a run that never stopped."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import cloned, pixels, same_state, vectors

from protoprune.errors import ProtopruneError, UsageError
from protoprune.training import loop, models
from protoprune.training.loop import Recipe, _Augmentation

HEAD = Recipe.for_model("head", epochs=2, batch_size=8, lr=0.5)
CNN = Recipe.for_model("cnn", epochs=3, batch_size=8, width=4, image_size=8, precision="fp32")


def finished(data, recipe, **how) -> dict[str, torch.Tensor]:
    return cloned(loop.fit(data, None, recipe, device="cpu", **how).model)


@pytest.fixture
def batches(monkeypatch):
    """What a run shows to its model: a list of (rows, inputs after augmentation)."""
    seen = []
    call = _Augmentation.__call__

    def spy(self, inputs, picked):
        out = call(self, inputs, picked)
        seen.append((picked.tolist(), out.clone()))
        return out

    monkeypatch.setattr(_Augmentation, "__call__", spy)
    return seen


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_a_run_is_sgd_with_nesterov_momentum_step_by_step(weighted):
    data = vectors(20)
    recipe = Recipe.for_model("head", epochs=3, batch_size=6, lr=0.3, weight_decay=0.01, label_smoothing=0.1, hidden=4)
    weights = np.random.default_rng(0).uniform(0, 3, 20) if weighted else None
    found = finished(data, recipe, seed=4, weights=weights)
    model = loop.make_model(data, recipe, 4)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    step, total = 0, 3 * 4
    for epoch in range(3):
        order = torch.from_numpy(np.random.default_rng([4, 1, epoch]).permutation(20))
        for picked in order.tensor_split(4):
            target = nn.functional.one_hot(torch.from_numpy(data.labels)[picked], 3) * 0.9 + 0.1 / 3
            losses = -(target * model(data.inputs[picked]).log_softmax(1)).sum(1)
            if weighted:
                losses = losses * torch.from_numpy(weights).float()[picked]
            gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
            rate = 0.3 * loop.rate(recipe, step, total)
            with torch.no_grad():
                for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                    g = g + (0.01 * p if p.ndim > 1 else 0)
                    velocity[name] = 0.9 * velocity[name] + g
                    p -= rate * (g + 0.9 * velocity[name])
            step += 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow), "timm:test_vit", "head"])
def test_every_model_learns_what_can_be_learned(name):
    data = vectors(60, apart=5) if name == "head" else pixels(60, size=8 if name == "resnet18" else 16)
    given = {} if name == "head" else {"image_size": 16, "width": 8, "lr": 0.05}
    recipe = Recipe.for_model(name, epochs=4, batch_size=10, **given)
    fit = loop.fit(data, data, recipe, device="cpu")
    assert (fit.predictions == data.labels).mean() > (0.6 if "vit" in name else 0.9)  # a third is chance
    assert fit.steps == 24
    assert fit.seconds > 0


@pytest.mark.parametrize(
    ("n", "size", "steps"),
    [(20, 5, 4), (21, 5, 5), (22, 5, 5), (3, 8, 1), (2, 2, 1), (3, 2, 1), (1, 8, 1), (3, 1, 3), (1250, 32, 40)],
)
def test_batches_are_of_even_size_and_leave_nothing_out(n, size, steps, batches):
    recipe = Recipe.for_model("head", epochs=1, batch_size=size)
    assert loop.steps_per_epoch(n, size) == steps
    assert loop.fit(vectors(n), None, recipe, device="cpu").steps == steps
    assert len(batches) == steps
    rows = [row for picked, _ in batches for row in picked]
    assert sorted(rows) == list(range(n))
    sizes = [len(picked) for picked, _ in batches]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or n == 1 or size == 1


@pytest.mark.parametrize("data", [pixels(2, classes=2), pixels(3, classes=3), pixels(5, classes=2)])
def test_tiny_sets_train(data):
    fit = loop.fit(data, data, Recipe.for_model("cnn", epochs=2, width=4, lr=0.01), device="cpu")
    assert fit.steps == 2
    assert len(fit.predictions) == len(data)


@pytest.mark.parametrize(("rows", "size"), [([3], 8), ([1, 2, 3], 1)])
def test_networks_refuse_batches_of_one(rows, size):
    with pytest.raises(UsageError, match="batches of 2 images and more"):
        loop.fit(pixels(), None, Recipe.for_model("cnn", batch_size=size, width=4), rows=np.array(rows), device="cpu")


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_budget_of_steps_is_kept_exactly(steps, batches):
    data, rows = vectors(30), np.arange(20)
    states = list(loop.epochs(data, HEAD, rows=rows, steps=steps, device="cpu"))
    assert states[-1].step == len(batches) == steps
    assert len(states) == math.ceil(steps / 3)
    assert states[-1].epoch == len(states)


def test_values_out_of_range_are_refused():
    data = vectors()
    with pytest.raises(UsageError, match="0 steps"):
        loop.fit(data, None, HEAD, steps=0, device="cpu")
    with pytest.raises(UsageError, match="keeps none of the training images"):
        loop.fit(data, None, HEAD, rows=np.array([], np.int64), device="cpu")
    for name, value in [
        ("epochs", 0), ("batch_size", 0), ("lr", 0), ("lr", math.nan), ("lr", -1), ("augment", "flip"),
        ("schedule", "step"), ("precision", "fp16"), ("weight_decay", -0.1), ("width", 0), ("hidden", -1),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}"):
            Recipe.for_model("cnn", **{name: value})
    with pytest.raises(UsageError, match="learning_rate: no setting"):
        Recipe.for_model("cnn", learning_rate=1)


@pytest.mark.parametrize("data", [vectors(), pixels()])
def test_a_loss_that_is_no_number_is_one_clear_error(data):
    recipe = Recipe.for_model("head" if data.vectors else "cnn", lr=1e30, batch_size=8, width=4)
    with pytest.raises(ProtopruneError, match=r"loss is (nan|inf) after \d+ steps; train with a smaller --lr"):
        loop.fit(data, None, recipe, device="cpu")


def test_an_index_of_the_device_is_the_same_device():
    """cuda:0 == cuda is False in torch, so data on a GPU once looked as if they were not; here cpu:0 stands in."""
    data = pixels()
    assert loop._Batches(data, torch.device("cpu:0")).resident
    assert same_state(finished(data, CNN), cloned(loop.fit(data, None, CNN, device="cpu:0").model))


def test_data_that_stay_on_the_host_are_the_same_data(monkeypatch):
    data = pixels()
    resident = finished(data, CNN)
    start = loop._Batches.__init__

    def elsewhere(self, *how):
        start(self, *how)
        self.resident = False

    monkeypatch.setattr(loop._Batches, "__init__", elsewhere)
    assert same_state(resident, finished(data, CNN))


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "timm:test_vit", "timm:test_efficientnet"])
def test_a_seed_decides_everything_and_global_generators_nothing(name):
    data = pixels(12, size=32)  # oneDNN's gradient of a kernel that is larger than its map is not even a number
    recipe = Recipe.for_model(name, epochs=1, batch_size=6, width=4)
    torch.manual_seed(1)
    np.random.seed(1)
    first = finished(data, recipe, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    second = finished(data, recipe, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert same_state(first, second)
    assert not same_state(first, finished(data, recipe, seed=4))


def test_dropout_is_of_the_seed(monkeypatch):
    def small(classes, width, images):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, classes))

    monkeypatch.setattr(models, "small_cnn", small)
    data = pixels()
    torch.manual_seed(0)
    first = finished(data, CNN)
    torch.manual_seed(1)
    assert same_state(first, finished(data, CNN))
    monkeypatch.setattr(models, "small_cnn", lambda *how: nn.Sequential(*[small(*how)[i] for i in (0, 2)]))
    assert not torch.equal(first["network.2.weight"], finished(data, CNN)["network.1.weight"])


def shown(batches) -> tuple[list[int], dict[int, list[torch.Tensor]]]:
    """Rows in the order of their appearance, and what each looked like each time."""
    rows, looks = [], {}
    for picked, inputs in batches:
        rows += picked
        for row, one in zip(picked, inputs, strict=True):
            looks.setdefault(row, []).append(one)
    batches.clear()
    return rows, looks


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_two_subsets_show_what_they_share_in_the_same_order_with_the_same_crops(batches, augment):
    data = pixels(30)
    recipe = Recipe.for_model("cnn", epochs=2, batch_size=3, width=4, augment=augment)
    a, b = np.arange(0, 18), np.arange(9, 30)
    runs = []
    for rows in (a, b):
        finished(data, recipe, rows=rows, seed=5)
        runs.append(shown(batches))
    shared = set(range(9, 18))
    (rows_a, looks_a), (rows_b, looks_b) = runs
    assert set(rows_a) == set(a)
    assert set(rows_b) == set(b)
    assert [row for row in rows_a if row in shared] == [row for row in rows_b if row in shared]
    for row in shared:
        assert len(looks_a[row]) == 2
        assert all(torch.equal(*pair) for pair in zip(looks_a[row], looks_b[row], strict=True))
        assert any(not torch.equal(one, looks_a[row][0]) for row in shared for one in looks_a[row][1:])
    finished(data, recipe, rows=a, seed=6)
    other, looks = shown(batches)
    assert other != rows_a
    assert any(not torch.equal(looks[row][0], looks_a[row][0]) for row in shared)


@pytest.mark.parametrize("data", [vectors(30), pixels(30)])
def test_examples_outside_a_subset_do_not_matter(data):
    recipe = Recipe.for_model("head" if data.vectors else "cnn", epochs=2, batch_size=4, width=4)
    rows = np.array([0, 1, 2, 4, 7, 8, 9, 13, 22, 29])
    before = finished(data, recipe, rows=rows)
    outside = np.setdiff1d(np.arange(30), rows)
    data.labels[outside] = (data.labels[outside] + 1) % 3
    assert same_state(before, finished(data, recipe, rows=rows))
    if not data.vectors:  # the same images elsewhere: normalisation and whitening are those of the whole set
        data.inputs[outside] = data.inputs[outside].roll(1, 0)
        after = finished(data, recipe, rows=rows)
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)
    data.labels[rows[0]] = (data.labels[rows[0]] + 1) % 3
    assert not same_state(before, finished(data, recipe, rows=rows))


def test_a_subset_is_a_set(batches):
    finished(vectors(10), HEAD, rows=np.array([7, 3, 3, 5]))
    assert sorted(batches[0][0]) == [3, 5, 7]


# --- weights and samplers ---------------------------------------------------------------------------------------------


def first_gradient(data, weights, monkeypatch) -> list[torch.Tensor]:
    """The gradient of the first step over all examples."""
    seen = []
    step = torch.optim.SGD.step
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.optim.SGD, "step",
            lambda self: seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]]) or step(self),
        )  # fmt: skip
        recipe = Recipe.for_model("head", epochs=1, batch_size=100)
        loop.fit(data, None, recipe, weights=weights, device="cpu")
    return seen[0]


def test_weights_reach_the_loss(monkeypatch):
    data = vectors(20)
    weights = np.ones(20)
    weights[:10] = 0
    left_out = first_gradient(data, weights, monkeypatch)
    data.labels[:10] = (data.labels[:10] + 1) % 3
    assert all(map(torch.equal, left_out, first_gradient(data, weights, monkeypatch)))  # as if it were not there
    for one, two in zip(left_out, first_gradient(data, 2 * weights, monkeypatch), strict=True):
        torch.testing.assert_close(two, 2 * one)
    assert not torch.equal(left_out[0], first_gradient(data, None, monkeypatch)[0])
    same = first_gradient(data, np.ones(20), monkeypatch)
    assert all(map(torch.equal, same, first_gradient(data, None, monkeypatch)))


class Sampler:
    """Even rows in even epochs, odd rows in odd ones."""

    def __init__(self, n: int):
        self.n, self.epoch, self.calls, self.updates = n, None, [], []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.calls.append(epoch)

    def __iter__(self):
        return iter(range(self.epoch % 2, self.n, 2))

    def update(self, rows, losses) -> None:
        assert not losses.requires_grad
        assert len(rows) == len(losses)
        self.updates.append((rows.tolist(), losses.tolist()))


def test_a_sampler_chooses_and_is_told_the_losses(batches):
    data, sampler = vectors(20), Sampler(20)
    list(loop.epochs(data, HEAD, sampler=sampler, steps=5, seed=1, device="cpu"))
    assert sampler.calls == [0, 1, 2]
    chosen = [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18], [1, 3, 5, 7, 9], [11, 13, 15, 17, 19], [0, 2, 4, 6, 8]]
    assert [picked for picked, _ in batches] == chosen == [rows for rows, _ in sampler.updates]
    model = loop.make_model(data, HEAD, 1)
    rows, losses = sampler.updates[0]
    expected = nn.functional.cross_entropy(
        model(data.inputs[rows]), torch.from_numpy(data.labels[rows]), reduction="none"
    )
    torch.testing.assert_close(torch.tensor(losses), expected)


def test_a_samplers_weights_reach_the_loss_and_not_its_update():
    class Weighted(Sampler):
        def weights(self, rows):
            return torch.full((len(rows),), 0.0)

    data, recipe = vectors(20), Recipe.for_model("head", batch_size=8, weight_decay=0.0)
    sampler = Weighted(20)
    model = loop.fit(data, None, recipe, sampler=sampler, steps=3, device="cpu").model
    assert same_state(cloned(model), cloned(loop.make_model(data, recipe, 0)))
    assert min(min(losses) for _, losses in sampler.updates) > 0


def test_a_sampler_needs_steps_and_examples():
    with pytest.raises(UsageError, match="needs the number of steps"):
        loop.fit(vectors(), None, HEAD, sampler=Sampler(60), device="cpu")
    with pytest.raises(ProtopruneError, match="chose no examples in epoch 0"):
        loop.fit(vectors(), None, HEAD, sampler=Sampler(0), steps=3, device="cpu")


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_learning_rates_by_hand():
    def rates(schedule, warmup, total):
        recipe = Recipe(schedule=schedule, warmup=warmup)
        return [loop.rate(recipe, step, total) for step in range(total)]

    assert rates("linear", 0.0, 4) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 0.5, 4) == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert rates("cosine", 0.0, 4) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates("steps", 0.0, 10) == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])
    assert rates("steps", 0.2, 10)[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    for schedule in loop.SCHEDULES:
        for warmup in (0, 0.15, 1):
            for total in (1, 2, 3, 50):
                assert all(0 < rate <= 1 for rate in rates(schedule, warmup, total))


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 9, 16, 32])
def test_an_image_is_turned_in_every_second_epoch(size):
    flips = [_Augmentation("crop-flip", (40, 3, size, size), 3, epoch).flip for epoch in range(4)]
    assert 5 < flips[0].sum() < 35
    assert (flips[1] == ~flips[0]).all()
    assert (flips[2] == flips[0]).all()
    assert (_Augmentation("crop-flip", (40, 3, size, size), 4, 0).flip != flips[0]).any()


@pytest.mark.parametrize("size", [8, 9, 16, 32])
def test_crop_flip_is_a_crop_of_the_reflected_image_then_a_mirror(size):
    """Literally: reflect-pad each image by an eighth, cut, turn."""
    n = 40
    inputs = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    augmentation = _Augmentation("crop-flip", inputs.shape, 3, 1)
    picked = torch.randperm(n)[:17]
    found = augmentation(inputs[picked], picked)
    pad = size // 8
    shifts = set()
    for row, one in zip(picked.tolist(), found, strict=True):
        down, right = augmentation.shift[:, row].tolist()
        shifts.add((down, right))
        padded = np.pad(inputs[row].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        crop = padded[:, down : down + size, right : right + size]
        crop = crop[:, :, ::-1] if augmentation.flip[row] else crop
        np.testing.assert_array_equal(one.numpy(), crop)
    assert found.dtype == torch.uint8
    assert len(shifts) > 3
    assert augmentation.shift.min() == 0
    assert augmentation.shift.max() == 2 * pad
    assert 0.2 < augmentation.flip.float().mean() < 0.8


def test_augmentation_goes_by_the_size_of_the_images_not_of_the_recipe():
    data = pixels(12)
    recipe = Recipe.for_model("cnn", epochs=1, width=4, image_size=224)  # once read beyond the edge
    assert finished(data, recipe)


def test_a_resized_crop_of_everything_is_the_image():
    inputs = torch.randint(0, 256, (6, 3, 9, 9), dtype=torch.uint8)
    augmentation = _Augmentation("resized-crop", inputs.shape, 0, 0)
    augmentation.size[:] = 1
    augmentation.flip[:] = torch.tensor([False, True] * 3)
    found = augmentation(inputs, torch.arange(6))
    torch.testing.assert_close(found[::2], inputs[::2].float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(found[1::2], inputs[1::2].flip(-1).float(), atol=1e-2, rtol=0)


def test_a_resized_crop_is_a_box_of_the_image():
    """An image whose value is its place: the crop's ends say where the box lies."""
    n, size = 500, 64
    ramp = torch.arange(size).float().expand(size, size)
    inputs = torch.stack([ramp, ramp.T, ramp]).expand(n, 3, size, size)
    augmentation = _Augmentation("resized-crop", inputs.shape, 1, 0)
    found = augmentation(inputs, torch.arange(n))
    width = (found[:, 0, 0, -1] - found[:, 0, 0, 0]).abs() / (size - 1)
    height = (found[:, 1, -1, 0] - found[:, 1, 0, 0]) / (size - 1)
    area = width * height
    assert 0.2 < area.min() < 0.35
    assert 0.9 < area.max() <= 1.01
    torch.testing.assert_close(height.double(), augmentation.size[0], atol=0.03, rtol=0)
    torch.testing.assert_close(width.double(), augmentation.size[1], atol=0.03, rtol=0)
    assert (width / height).log().abs().max() < 0.7
    assert found.min() >= 0
    assert found.max() <= size - 1
    top = found[:, 1, 0, 0] / (size - 1)
    assert top.min() < 0.05
    assert top.max() > 0.3


def test_vectors_are_never_augmented():
    inputs = torch.randn(4, 5)
    assert _Augmentation("crop-flip", inputs.shape, 0, 0)(inputs, torch.arange(4)) is inputs
    assert Recipe.for_model("head", augment="crop-flip").augment == "none"


def test_evaluation_is_without_augmentation_and_leaves_the_mode():
    data = pixels(12)
    model = loop.make_model(data, CNN, 0)
    whole = loop.logits(model, data.inputs, precision="fp32")
    assert model.training
    assert whole.shape == (12, 3)
    pieces = loop.logits(model, data.inputs, precision="fp32", batch_size=5)
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, model.eval()(data.inputs), rtol=1e-4, atol=1e-5)
    assert (loop.predict(model, data, "fp32") == whole.argmax(1).numpy()).all()


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("name", ["cnn", "head", "timm:test_efficientnet"])
def test_a_run_that_goes_on_is_a_run_that_never_stopped(name, stop):
    data = vectors(30) if name == "head" else pixels(20, size=32 if "timm" in name else 8)
    recipe = Recipe.for_model(name, epochs=3, batch_size=8, width=4)
    rows = np.arange(3, 20)
    whole = [(state.step, cloned(state.model)) for state in loop.epochs(data, recipe, rows=rows, seed=2, device="cpu")]
    runs = loop.epochs(data, recipe, rows=rows, seed=2, device="cpu")
    for _ in range(stop):
        state = next(runs)
    buffer = io.BytesIO()
    torch.save(state.checkpoint(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    rest = [
        (state.epoch, state.step, cloned(state.model), state.seconds)
        for state in loop.epochs(data, recipe, rows=rows, seed=2, device="cpu", resume=saved)
    ]
    assert [epoch for epoch, *_ in rest] == list(range(stop + 1, 4))
    for (step, expected), (_, found_step, found, seconds) in zip(whole[stop:], rest, strict=True):
        assert step == found_step
        assert same_state(expected, found)
        assert seconds > saved["seconds"]
    if name != "timm:test_efficientnet":
        return
    forgotten = copy.deepcopy(saved)
    forgotten["optimizer"]["state"] = {}  # momentum matters
    *_, state = loop.epochs(data, recipe, rows=rows, seed=2, device="cpu", resume=forgotten)
    assert not same_state(cloned(state.model), whole[-1][1])
