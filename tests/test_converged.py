"""Converged heads against scikit-learn, and what they do where images are few, classes absent or weights uneven."""

import numpy as np
import pytest
import torch

from protoprune.errors import UsageError
from protoprune.training import converged
from protoprune.training.converged import STRENGTHS, UNCHECKED, Space, fit_head

linear_model = pytest.importorskip("sklearn.linear_model")


def blobs(n: int, classes: int, *, dim: int = 24, apart: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) float32 vectors of overlapping classes, on axes that are turned and of very different length."""
    world, rng = np.random.default_rng([classes, dim]), np.random.default_rng([seed, n])
    means = apart * world.normal(size=(classes, dim))
    turn, _ = np.linalg.qr(world.normal(size=(dim, dim)))
    labels = np.arange(n) % classes
    vectors = (means[labels] + rng.normal(size=(n, dim))) * np.geomspace(1, 0.02, dim)
    return (5 + vectors @ turn).astype(np.float32), labels


def standardised(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    return (vectors - like.mean(0)) / (like.std(0, ddof=1) * vectors.shape[1] ** 0.5)


def reference(vectors, labels, strength, *, tol=1e-7, **fit):
    """scikit-learn's solution, on vectors standardised here, with a stopping rule that is by far tighter than ours."""
    model = linear_model.LogisticRegression(C=strength, tol=tol, max_iter=20_000)
    return model.fit(standardised(vectors, vectors).astype(np.float64), labels, **fit)


@pytest.mark.parametrize("strength", [0.1, 10, 1000])
@pytest.mark.parametrize("classes", [2, 7])
def test_the_solution_is_scikit_learns(classes, strength):
    vectors, labels = blobs(400, classes)
    head = fit_head(vectors, labels, classes, strength=strength)
    model = reference(vectors, labels, 2 * strength if classes == 2 else strength)  # it has one weight for two classes
    ours = torch.from_numpy(head.logits(vectors)).softmax(1).numpy()
    assert np.abs(ours - model.predict_proba(standardised(vectors, vectors))).max() < 5e-3
    assert head.converged


CORNERS = [(2, 5), (2, 5000), (10, 5), (10, 50), (40, 10)]
# Not (1000, 20): scikit-learn with its own tolerance stops early there, at an objective of .569 against our .510.
LARGE = [(10, 5000), (100, 500), (1000, 5)]


@pytest.mark.parametrize(
    ("classes", "each"), [*CORNERS, *(pytest.param(*one, marks=pytest.mark.slow) for one in LARGE)]
)
def test_within_a_point_of_scikit_learn_with_the_same_strength(classes, each):
    dim = 24 if classes < 1000 else 32
    vectors, labels = blobs(classes * each, classes, dim=dim)
    new, truth = blobs(4000, classes, dim=dim, seed=1)
    head = fit_head(vectors, labels, classes)
    strength = 2 * head.strength if classes == 2 else head.strength
    tol = 1e-7 if classes * each <= 10_000 else 1e-4  # scikit-learn's own: the last digits took it an hour
    theirs = reference(vectors, labels, strength, tol=tol).score(standardised(new, vectors), truth)
    assert (head.predict(new) == truth).mean() == pytest.approx(theirs, abs=0.01)
    assert theirs > 1.5 / classes
    assert head.strength in STRENGTHS


@pytest.mark.parametrize(("classes", "each", "draws"), [(3, 20, 4), (10, 60, 1)])
def test_the_strength_is_as_good_as_that_of_scikit_learns_cross_validation(classes, each, draws):
    new, truth = blobs(4000, classes, seed=99)
    ours, theirs = [], []
    for seed in range(draws):
        vectors, labels = blobs(classes * each, classes, seed=seed)
        ours.append((fit_head(vectors, labels, classes).predict(new) == truth).mean())
        model = linear_model.LogisticRegressionCV(
            Cs=list(STRENGTHS), cv=5, scoring="neg_log_loss", use_legacy_attributes=False, l1_ratios=(0,)
        ).fit(standardised(vectors, vectors), labels)
        theirs.append(model.predict(standardised(new, vectors)) == truth)
    assert np.mean(ours) > np.mean(theirs) - 0.01


def test_regularisation_is_needed_and_found():
    """A third of the labels are wrong, and there are dimensions enough to learn them by heart."""
    vectors, labels = blobs(300, 4, dim=150, apart=0.25)
    new, truth = blobs(4000, 4, dim=150, apart=0.25, seed=1)
    labels = np.where(np.arange(300) % 9 < 3, (labels + 1) % 4, labels)
    chosen = fit_head(vectors, labels, 4)
    loose = fit_head(vectors, labels, 4, strength=max(STRENGTHS))
    assert chosen.strength < 100
    assert (chosen.predict(new) == truth).mean() > (loose.predict(new) == truth).mean() + 0.02


# --- subsets and weights ---------------------------------------------------------------------------------------------


def test_a_subset_is_trained_on_alone_and_a_space_serves_many():
    vectors, labels = blobs(300, 3)
    labels = np.array(labels)
    rows = np.arange(0, 300, 2)
    labels[1::2] = (labels[1::2] + 1) % 3  # would mislead
    space = Space(vectors)
    head = fit_head(space, labels, 3, rows=rows)
    same = fit_head(vectors, labels, 3, rows=rows[::-1])
    assert np.array_equal(head.weight, same.weight)
    new, truth = blobs(2000, 3, seed=1)
    assert (head.predict(new) == truth).mean() > 0.9 > 0.6 > (fit_head(space, labels, 3).predict(new) == truth).mean()


def objective(head, vectors, labels, rows) -> float:
    """What is minimised, for each image, in float64."""
    std = vectors.std(0, ddof=1).astype(np.float64) * vectors.shape[1] ** 0.5
    logits = vectors[rows].astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    own = logits[np.arange(len(rows)), labels[rows]]
    loss = (np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - own).mean()
    return loss + np.square(head.weight * std).sum() / (2 * head.strength * len(rows))


@pytest.mark.parametrize("near_rows", [np.arange(1500), np.arange(1000, 3000)])
def test_a_head_nearby_is_a_start_and_no_other_solution(near_rows):
    vectors, labels = blobs(3000, 5)
    rows, space = np.arange(500, 2900), Space(vectors)
    near = fit_head(space, labels, 5, rows=near_rows, strength=30)
    cold = fit_head(space, labels, 5, rows=rows, strength=30)
    warm = fit_head(space, labels, 5, rows=rows, strength=30, near=near)
    assert warm.evaluations < cold.evaluations
    assert objective(warm, vectors, labels, rows) == pytest.approx(objective(cold, vectors, labels, rows), abs=2e-6)
    same = fit_head(space, labels, 5, rows=rows, strength=30, near=cold)
    assert same.evaluations <= 3  # it is there, but for float32's digits
    other = fit_head(space, labels % 2, 5, rows=rows, strength=30, near=near)  # of other classes: no start
    assert other.evaluations == fit_head(space, labels % 2, 5, rows=rows, strength=30).evaluations


def test_weights_repeat_an_image_and_0_leaves_it_out():
    vectors, labels = blobs(90, 3)
    weights = np.r_[np.full(30, 2.0), np.full(30, 1.0), np.zeros(30)]
    space = Space(vectors)
    weighted = fit_head(space, labels, 3, weights=17 * weights, strength=30)
    repeated = fit_head(space, labels, 3, rows=np.r_[0:30, 0:30, 30:60], strength=20)  # 90 images share the penalty
    assert np.abs(weighted.logits(vectors) - repeated.logits(vectors)).max() < 0.01
    left_out = fit_head(space, labels, 3, rows=np.arange(60))
    assert np.array_equal(left_out.weight, fit_head(space, labels, 3, weights=weights > 0).weight)
    assert not np.allclose(left_out.weight, fit_head(space, labels, 3, weights=weights).weight, rtol=1e-2)


def test_the_same_input_and_seed_give_the_same_head():
    vectors, labels = blobs(120, 4)
    one, two, other = (fit_head(vectors, labels, 4, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.weight, two.weight)
    assert one.held_out == two.held_out
    assert one.held_out != other.held_out


# --- where images are few --------------------------------------------------------------------------------------------


def test_one_image_a_class_has_nothing_to_hold_out():
    vectors, labels = blobs(6, 6, apart=3)
    head = fit_head(vectors, labels, 6)
    assert (head.strength, head.held_out) == (UNCHECKED, {})
    assert head.predict(vectors).tolist() == labels.tolist()
    new, truth = blobs(3000, 6, apart=3, seed=1)
    assert (head.predict(new) == truth).mean() > 0.8


def test_a_class_of_one_image_is_trained_on_in_every_fold():
    vectors, labels = blobs(61, 2)
    labels = np.where(np.arange(61) == 60, 2, labels)
    head = fit_head(vectors, labels, 3)
    assert np.isfinite(list(head.held_out.values())).all()
    assert max(head.held_out.values()) < 5


def test_absent_classes_are_never_predicted():
    vectors, labels = blobs(40, 2)
    head = fit_head(vectors, np.array([4, 1])[labels], 6)
    assert set(head.predict(blobs(500, 2, seed=1)[0])) == {1, 4}
    assert head.bias[[0, 2, 3, 5]].tolist() == [-np.inf] * 4
    probabilities = torch.from_numpy(head.logits(vectors)).softmax(1).numpy()
    assert np.isfinite(probabilities).all()
    assert probabilities[:, [1, 4]].sum(1) == pytest.approx(1)


def test_one_class_alone_and_fewer_images_than_classes():
    vectors, _ = blobs(5, 5)
    assert set(fit_head(vectors, np.full(5, 2), 4).predict(vectors)) == {2}
    assert set(fit_head(vectors[:1], np.array([3]), 4).predict(vectors)) == {3}
    few = fit_head(vectors, np.array([7, 2, 9, 2, 2]), 100)
    assert set(few.predict(vectors)) == {2, 7, 9}


def test_a_dimension_without_variance_is_no_trouble():
    vectors, labels = blobs(100, 2)
    vectors = np.c_[vectors, np.full(100, 0.1, np.float32), np.zeros(100, np.float32)]
    head = fit_head(vectors, labels, 2)
    assert head.converged
    assert (head.predict(vectors) == labels).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.array([], int)}, "at least one training image"),
        ({"rows": np.arange(20) < 9}, r"rows: a mask, expected the rows of the subset"),
        ({"rows": np.array([0.0, 2.7])}, r"rows of type float64 and shape \(2,\)"),
        ({"rows": np.array([[0, 2]])}, r"rows of type int64 and shape \(1, 2\)"),
        ({"rows": np.array([0, 20])}, "rows 0 to 20 of 20 images; expected 0 to 19"),
        ({"rows": np.array([-1, 3])}, "rows -1 to 3 of 20 images"),
        ({"weights": np.zeros(20)}, "at least one training image"),
        ({"weights": np.full(20, -1.0)}, "numbers of 0 or more"),
        ({"weights": np.full(20, np.nan)}, "numbers of 0 or more"),
        ({"classes": 1}, "label 1: expected 0 to 0"),
        ({"labels": np.arange(20) - 1}, "label -1: expected 0 to 1"),
        ({"vectors": np.full((20, 3), np.nan, np.float32)}, "not finite"),
        ({"vectors": np.zeros(20, np.float32)}, r"shape \(20,\)"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, message):
    vectors, labels = blobs(20, 2)
    given = {"vectors": vectors, "labels": labels, "classes": 2, **change}
    with pytest.raises(UsageError, match=message):
        fit_head(**given)


def test_a_fit_takes_some_hundred_evaluations():
    """Hundreds of fits are to take minutes: of 5,000 images half a second each, with 100 evaluations."""
    vectors, labels = blobs(20_000, 10, dim=192, apart=0.2)
    rows = np.random.default_rng(0).choice(20_000, 3000, replace=False)  # one fold
    head = fit_head(Space(vectors), labels, 10, rows=rows)
    assert head.converged
    assert head.evaluations < 300


def test_few_images_are_fitted_by_one_thread_and_the_number_is_given_back(monkeypatch):
    seen, solve = [], converged._Problem.solve
    monkeypatch.setattr(
        converged._Problem,
        "solve",
        lambda *given, **more: seen.append(torch.get_num_threads()) or solve(*given, **more),
    )
    vectors, labels = (
        torch.from_numpy(np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)),
        np.arange(60) % 3,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit_head(vectors, labels, 3)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(converged, "_THREADS_PAY", 0)
        seen.clear()
        fit_head(vectors, labels, 3, strength=1.0)  # threads wait for each other: one solution is enough
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(before)
