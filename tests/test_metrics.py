"""Every metric against known answers, planted data whose sign must not flip, and properties common to all."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from protoprune import pruning, records
from protoprune.clustering import vectors
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features.featurefile import FeatureFile
from protoprune.ids import hashes
from protoprune.metrics import catalogue, dynamics, ensembles, geometry
from protoprune.metrics.catalogue import METRICS, score

STATISTICS = (
    "prediction", "true_probability", "margin", "error_norm", "loss", "entropy", "change", "gradient_norm",
)  # fmt: skip
RECORD_METRICS = [
    name
    for name, metric in METRICS.items()
    if metric.needs == "record" and (name != "label_issues" or find_spec("cleanlab"))
]
FEATURE_METRICS = [name for name, metric in METRICS.items() if metric.needs == "features"]


class FakeRecord:
    """A training record in memory: tables (models, epochs, n) by name, with the attributes of `records.Record`."""

    def __init__(self, tables, labels, subset=None, epoch_numbers=None, test_labels=None, test_prediction=None):
        self.tables = {name: np.asarray(table) for name, table in tables.items()}
        self.models, self.epochs, self.n = next(iter(self.tables.values())).shape
        self.labels = np.asarray(labels, np.int64)
        self.classes = [f"class {i}" for i in range(int(self.labels.max()) + 1)]
        self.paths = [f"{i:04d}.png" for i in range(self.n)]
        self.subset = np.ones((self.models, self.n), bool) if subset is None else np.asarray(subset, bool)
        self.epoch_numbers = np.arange(1, self.epochs + 1) if epoch_numbers is None else np.asarray(epoch_numbers)
        self.statistics = tuple(self.tables)
        self.test_labels, self.test_prediction = test_labels, test_prediction
        self.path, self.provenance = "fake.h5", {"uuid": "0" * 8}
        self.class_probabilities = np.zeros((self.models, self.n, len(self.classes)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, name, model, rows=slice(None), epochs=slice(None)):
        return self.tables[name][model][epochs, rows]

    def probabilities(self, model, rows=slice(None)):
        return self.class_probabilities[model][rows]

    def take(self, rows) -> FakeRecord:
        """The record of some of the rows, in any order."""
        tables = {name: table[:, :, rows] for name, table in self.tables.items()}
        taken = FakeRecord(tables, self.labels[rows], self.subset[:, rows], self.epoch_numbers)
        taken.classes, taken.paths = self.classes, [self.paths[row] for row in rows]
        taken.class_probabilities = self.class_probabilities[:, rows]
        taken.statistics = self.statistics
        taken.test_labels, taken.test_prediction = self.test_labels, self.test_prediction
        return taken


class FakeFeatures:
    """The attributes of a feature file that metrics use."""

    def __init__(self, features, labels, paths=None, usable=None):
        self.features, self.labels = np.asarray(features, np.float32), np.asarray(labels)
        self.paths = paths or [f"{i:04d}.png" for i in range(len(self.labels))]
        self.classes = [f"class {i}" for i in range(int(self.labels.max()) + 1)]
        self.usable = np.ones(len(self.labels), bool) if usable is None else usable
        self.path = "fake.h5"


def softmax(logits):
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def train(n=200, d=100, models=120, epochs=20, rate=1.0, batch=20, seed=0):
    """(record, planted): linear softmax models by SGD, each on 70 % of two Gaussians; a tenth of the labels are wrong.

    There are enough dimensions for the models to learn the wrong labels by heart. The test images are near-duplicates
    of the training images with the same labels, wrong ones included.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, n)
    means = rng.normal(size=(2, d))
    x = 3 * (means / np.linalg.norm(means, axis=1, keepdims=True))[truth] + 0.6 * rng.normal(size=(n, d))
    planted = rng.permutation(n) < n // 10
    labels = np.where(planted, 1 - truth, truth)
    subset = np.array([rng.permutation(n) < 0.7 * n for _ in range(models)])
    one_hot = np.eye(2)[labels]
    inputs = np.c_[x, np.ones(n)]
    test_inputs = np.c_[x + 0.1 * rng.normal(size=x.shape), np.ones(n)]
    weights, before = np.zeros((models, d + 1, 2)), None
    rows, tables = np.arange(n), {name: [] for name in STATISTICS}
    for _ in range(epochs):
        for some in np.split(rng.permutation(n), n // batch):
            error = (softmax(inputs[some] @ weights) - one_hot[some]) * subset[:, some, None]
            weights -= rate * (inputs[some].T @ error) / batch
        logits = inputs @ weights  # (models, n, 2)
        p = np.clip(softmax(logits), 1e-30, 1)
        error = np.linalg.norm(p - one_hot, axis=-1)
        values = {
            "prediction": logits.argmax(-1),
            "true_probability": p[:, rows, labels],
            "margin": logits[:, rows, labels] - logits[:, rows, 1 - labels],
            "error_norm": error,
            "loss": -np.log(p[:, rows, labels]),
            "entropy": -(p * np.log(p)).sum(-1),
            "change": np.zeros_like(error) if before is None else (p * np.log(p / before)).sum(-1),
            "gradient_norm": error * np.linalg.norm(inputs, axis=1),
        }
        for name, value in values.items():
            tables[name].append(value)
        before = p
    tables = {name: np.stack(table, axis=1) for name, table in tables.items()}
    tables = {name: t if name == "prediction" else t.astype(np.float32) for name, t in tables.items()}
    prediction = (test_inputs @ weights).argmax(-1)
    record = FakeRecord(tables, labels, subset, None, labels, prediction)
    record.class_probabilities, record.statistics = p, (*tables, "probability")
    return record, planted


@pytest.fixture(scope="module")
def trained():
    return train()


def auc(scores, planted) -> float:
    """Probability that a planted example scores higher than another one."""
    ranks, count = rankdata(scores), planted.sum()
    return (ranks[planted].sum() - count * (count + 1) / 2) / (count * (~planted).sum())


# --- training dynamics -----------------------------------------------------------------------------------------------

FIVE_EPOCHS = np.array(
    [
        # always, twice forgotten, never, once forgotten, learned last
        [1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ],
    bool,
)


def test_forgetting_counts_a_five_epoch_table():
    np.testing.assert_array_equal(dynamics.forgetting(FIVE_EPOCHS), [0, 2, 5, 1, 0])


def test_forgetting_of_a_record_averages_over_the_models_that_trained_on_the_example():
    labels = [0, 1, 1, 0, 1]
    right = np.stack([FIVE_EPOCHS, np.ones_like(FIVE_EPOCHS)])
    prediction = np.where(right, labels, 1 - np.array(labels))
    subset = [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    record = FakeRecord({"prediction": prediction}, labels, subset)
    np.testing.assert_array_equal(score("forgetting", record).values, [0, 1, 2.5, 1, np.nan])
    np.testing.assert_array_equal(score("forgetting", record, models="all").values, [0, 1, 2.5, 0.5, 0])
    held_out = score("forgetting", record, models="held-out")
    np.testing.assert_array_equal(held_out.values, [0, np.nan, np.nan, 0, 0])
    assert held_out.used == {"models": 2, "epochs": "1-5", "averaged_over": "held-out"}
    np.testing.assert_array_equal(score("forgetting", record, epoch=3).values, [0, 0.5, 1.5, 1, np.nan])


def test_a_right_guess_before_training_is_not_forgotten():
    """Epoch 0 is the untrained network: learned by chance and lost would be an event."""
    prediction = np.array([[[0, 0], [1, 0], [0, 1], [0, 1]]])  # (1 model, 4 epochs, 2 examples), labels 0
    record = FakeRecord({"prediction": prediction}, [0, 0], epoch_numbers=[0, 1, 2, 3])
    record.classes = ["a", "b"]
    np.testing.assert_array_equal(score("forgetting", record).values, [0, 1])


def test_aum_and_margin_are_minus_the_margin():
    margin = np.array([[[1.0, -4.0, 0.5], [3.0, 2.0, 0.5]]])
    record = FakeRecord({"margin": margin}, [0, 0, 0])
    np.testing.assert_array_equal(score("aum", record).values, [-2, 1, -0.5])
    np.testing.assert_array_equal(score("margin", record).values, [-3, -2, -0.5])
    np.testing.assert_array_equal(score("margin", record, epoch=1).values, [-1, 4, -0.5])


def test_dyn_unc_by_hand():
    p = np.array([[0.0, 0.5, 0.0], [1.0, 0.5, 0.0], [0.0, 0.5, 0.0], [1.0, 0.5, 1.0]])
    half = 0.5**0.5  # sample deviation of 0 and 1
    np.testing.assert_allclose(dynamics.dyn_unc(p, 2), [half, 0, half / 3], rtol=1e-6)
    np.testing.assert_allclose(dynamics.dyn_unc(p, 10), [3**-0.5, 0, 0.5], rtol=1e-6)  # one window of all four
    np.testing.assert_array_equal(dynamics.dyn_unc(p[:1], 10), [0, 0, 0])
    with pytest.raises(UsageError, match="--window 1: expected at least 2"):
        dynamics.dyn_unc(p, 1)


@pytest.mark.parametrize(("epochs", "window"), [(12, 10), (6, 3), (4, 10), (3, 3)])
def test_tdds_is_the_papers_loop(epochs, window):
    change = np.random.default_rng(epochs).exponential(size=(epochs, 3))
    width = min(window, epochs)
    expected = np.zeros(3)
    for example in range(3):
        for k in range(epochs - width + 1):
            moves = [change[k + j + 1, example] for j in range(width - 1)]  # between the epochs of the window
            mean = sum(moves) / (width - 1)
            norm = sum((move - mean) ** 2 for move in moves) ** 0.5
            expected[example] += norm * 0.9 * (1 - 0.9) ** (epochs - width - k)
    np.testing.assert_allclose(dynamics.tdds(change, window), expected, rtol=1e-5)


def test_the_window_that_is_told_is_the_one_that_was_taken():
    short = small_record(epochs=4)
    for metric in ("dyn_unc", "tdds"):
        assert score(metric, short).used["window"] == 4
        assert score(metric, short, window=3).used["window"] == 3


def test_tdds_of_one_or_two_epochs_is_zero_and_its_decay_is_checked():
    np.testing.assert_array_equal(dynamics.tdds(np.ones((1, 4))), np.zeros(4))
    np.testing.assert_array_equal(dynamics.tdds(np.ones((2, 4))), np.zeros(4))
    with pytest.raises(UsageError, match="decay 0"):
        dynamics.tdds(np.ones((3, 4)), decay=0)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([1, 2, 5, 9, 12, 200], 9),
        ([8, 12, 90], 8),  # equally near: the earlier one
        (range(1, 8), 7),  # a short training is scored at its end
        (range(1, 21), 10),
        ([0, 20], 20),  # before training is never the default
        ([0], 0),
        ([1], 1),
    ],
)
@pytest.mark.parametrize("metric", ["el2n", "grand"])
def test_el2n_and_grand_take_an_early_epoch(metric, numbers, expected):
    statistic = METRICS[metric].statistics[0]
    table = np.array(list(numbers), float)[None, :, None] * [1, 10]
    record = FakeRecord({statistic: table}, [0, 1], epoch_numbers=list(numbers))
    result = score(metric, record)
    np.testing.assert_array_equal(result.values, [expected, 10 * expected])
    assert result.used["epochs"] == expected
    np.testing.assert_array_equal(score(metric, record, epoch=next(iter(numbers))).values, table[0, 0])


@pytest.mark.parametrize(("metric", "statistic"), [("el2n", "error_norm"), ("loss", "loss"), ("entropy", "entropy")])
def test_snapshots_average_over_the_models_that_trained_on_the_example(metric, statistic):
    table = np.array([[[1.0, 2.0, 3.0]], [[5.0, 6.0, 7.0]]])  # (2 models, 1 epoch, 3 examples)
    record = FakeRecord({statistic: table}, [0, 1, 0], subset=[[1, 1, 0], [1, 0, 0]])
    result = score(metric, record)
    np.testing.assert_array_equal(result.values, [3, 2, np.nan])
    assert result.used == {"models": 2, "epochs": 1, "averaged_over": "trained"}
    np.testing.assert_array_equal(score(metric, record, models="all").values, [3, 4, 5])


# --- ensembles -------------------------------------------------------------------------------------------------------


def test_memorization_of_two_models():
    subset = [[1, 1, 0, 0, 1], [0, 1, 1, 0, 0]]
    labels = [0, 0, 0, 0, 0]
    prediction = [[[0, 0, 0, 0, 0]], [[1, 1, 1, 1, 0]]]  # the first model is right everywhere
    record = FakeRecord({"prediction": prediction}, labels, subset)
    # right only when trained on; always in; right only when not trained on; never in; right either way
    expected = [1, np.nan, -1, np.nan, 0]
    np.testing.assert_array_equal(score("memorization", record).values, expected)


def test_memorization_says_how_much_the_models_fit():
    prediction = np.array([[[0, 1]], [[0, 0]], [[1, 1]]])
    record = FakeRecord({"prediction": prediction}, [0, 0], subset=[[1, 1], [1, 0], [0, 1]])
    used = score("memorization", record).used
    assert (used["right_with"], used["right_without"]) == (0.5, 0.5)  # models with: 1, 0 and 1, 0; without: 1 and 0


def brute_force_influence(subset, right) -> np.ndarray:
    matrix = np.full((subset.shape[1], right.shape[1]), np.nan)
    for i, j in itertools.product(*map(range, matrix.shape)):
        inside, outside = right[subset[:, i], j], right[~subset[:, i], j]
        if len(inside) and len(outside):
            matrix[i, j] = inside.mean() - outside.mean()
    return matrix


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 7), st.integers(1, 10), st.integers(0, 10))
def test_influence_is_the_brute_force_matrix_in_any_blocks(models, n, tests, rows, seed):
    rng = np.random.default_rng(seed)
    subset, right = rng.random((models, n)) < 0.6, rng.random((models, tests)) < 0.5
    matrix = brute_force_influence(subset, right)
    for reduce, expected in (("max", matrix.max(axis=1)), ("sum_abs", np.abs(matrix).sum(axis=1))):
        with mock.patch.object(ensembles, "BLOCK_BYTES", 4 * tests * rows):
            result = ensembles.influence(subset, right, reduce)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result, ensembles.influence(subset, right, reduce))


def test_influence_never_holds_the_whole_matrix(monkeypatch):
    """Blocks are as wide as BLOCK_BYTES holds, whatever the number of training images."""
    import tracemalloc

    monkeypatch.setattr(ensembles, "BLOCK_BYTES", 100_000)
    rng = np.random.default_rng(0)
    subset, right = rng.random((4, 20_000)) < 0.5, rng.random((4, 500)) < 0.5
    tracemalloc.start()
    ensembles.influence(subset, right)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the matrix would be 40 MB


def test_influence_of_a_record():
    subset = np.array([[1, 0], [0, 1], [1, 1]], bool)
    record = FakeRecord({"prediction": np.zeros((3, 1, 2), int)}, [0, 0], subset)
    record.test_labels = np.array([0, 1, 1])
    record.test_prediction = np.array([[0, 0, 1], [1, 1, 1], [0, 0, 0]])
    # example 0: right with it (1, 0, .5), without it (0, 1, 1); example 1: (.5, .5, .5) against (1, 0, 1)
    np.testing.assert_allclose(score("influence_max", record).values, [1, 0.5])
    result = score("influence_sum_abs", record)
    np.testing.assert_allclose(result.values, [2.5, 1.5])
    assert result.used == {"models": 3, "epochs": 1, "test_images": 3}
    record.test_labels = None
    with pytest.raises(UsageError, match="influence needs test images"):
        score("influence_max", record)


def test_influence_refuses_what_it_cannot_reduce():
    with pytest.raises(UsageError, match="'mean': expected one of max, sum_abs"):
        ensembles.influence(np.ones((1, 1), bool), np.ones((1, 1), bool), "mean")
    with pytest.raises(UsageError, match="empty test set"):
        ensembles.influence(np.ones((1, 1), bool), np.ones((1, 0), bool))


@pytest.mark.parametrize("metric", ["memorization", "influence_max", "influence_sum_abs"])
def test_models_trained_on_everything_say_nothing_about_memorization(metric, trained):
    record = FakeRecord(trained[0].tables, trained[0].labels)
    record.test_labels, record.test_prediction = trained[0].test_labels, trained[0].test_prediction
    with pytest.raises(UsageError, match=r"every model of fake\.h5 was trained on all"):
        score(metric, record)


def test_ddd_is_the_share_of_models_that_are_wrong():
    right = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_array_equal(ensembles.ddd(right), [0, 0.5, 1])
    record = FakeRecord({"prediction": (~right).astype(int)[:, None]}, [0, 0, 0])
    record.classes = ["a", "b"]
    result = score("ddd", record, models="trained")
    np.testing.assert_array_equal(result.values, [0, 0.5, 1])
    assert result.used["averaged_over"] == "trained"
    record.subset = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    result = score("ddd", record)  # models that saw an example say little about its difficulty
    np.testing.assert_array_equal(result.values, [0, 0.5, 1])
    np.testing.assert_array_equal(score("ddd", record, models="trained").values, [0, 0.5, 1])
    record.subset = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    result = score("ddd", record)
    np.testing.assert_array_equal(result.values, [0, 1, 1])
    assert result.used["averaged_over"] == "held-out"


def test_ddd_of_models_that_saw_every_image_is_refused_unless_asked_for():
    """They are right about nearly all of it: quartiles 0, 0, 0 looked like a result."""
    record = small_record()
    record.subset[:] = True
    with pytest.raises(UsageError, match=r"ddd asks models that did not see an image, .*fake\.h5 .*--models trained"):
        score("ddd", record)
    assert score("ddd", record, models="trained").used["averaged_over"] == "trained"


def test_label_issues_are_cleanlabs():
    """Planted wrong labels, of which models that saw them are sure and the others are not."""
    filters, ranks = pytest.importorskip("cleanlab.filter"), pytest.importorskip("cleanlab.rank")
    rng, n, classes, models = np.random.default_rng(0), 300, 3, 8
    truth = np.arange(n) % classes
    labels = truth.copy()
    planted = rng.choice(n, 30, replace=False)
    labels[planted] = (truth[planted] + 1) % classes
    subset = rng.random((models, n)) < 0.7
    subset[0], subset[1] = True, False  # everyone has a model with it and one without
    subset[:, 5] = True
    held = 0.8 * np.eye(classes)[truth] + 0.2 * rng.dirichlet(np.ones(classes), (models, n))
    probabilities = np.where(subset[..., None], np.eye(classes)[labels], held).astype(np.float16)
    record = FakeRecord({"prediction": np.zeros((models, 1, n), int)}, labels, subset)
    record.class_probabilities, record.statistics = probabilities, ("prediction", "probability")
    result = score("label_issues", record)
    known = ~subset.all(axis=0)
    mean = (probabilities.astype(np.float64) * ~subset[..., None]).sum(0)[known] / (~subset).sum(0)[known, None]
    mean /= mean.sum(axis=1, keepdims=True)
    issues = filters.find_label_issues(labels[known], mean, n_jobs=1)
    expected = 1 - ranks.get_label_quality_scores(labels[known], mean) + issues
    np.testing.assert_allclose(result.values[known], expected, atol=1e-5)
    assert np.isnan(result.values[~known]).all()
    assert set(np.flatnonzero(result.values > 1)) == set(planted) - {5}
    assert result.used == {"models": 7, "epochs": 1, "averaged_over": "held-out", "issues": int(issues.sum())}
    seen = score("label_issues", record, models="trained")  # models that saw a label believe it
    assert seen.used["issues"] == 0


def test_label_issues_need_probabilities_models_that_did_not_see_the_image_and_cleanlab(monkeypatch):
    record = small_record()
    record.subset[:] = True
    with pytest.raises(UsageError, match=r"label_issues asks models that did not see an image, .* --models trained"):
        score("label_issues", record)
    with pytest.raises(ProtopruneError, match="gives no image a score; too few models, or --models asks for those"):
        score("label_issues", record, models="held-out")
    record.statistics = ("prediction",)
    with pytest.raises(UsageError, match=r"needs probability, which fake\.h5 does not hold; .* --probabilities"):
        score("label_issues", record)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(ProtopruneError, match=r"cleanlab, which is not installed; pip install 'protoprune\[labels\]'"):
        score("label_issues", small_record())


def test_vote_entropy_by_hand():
    votes = [[4, 0, 0], [2, 2, 0], [3, 1, 0], [1, 1, 1]]
    expected = [0, np.log(2), -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), np.log(3)]
    np.testing.assert_allclose(ensembles.vote_entropy(votes), expected, rtol=1e-6)
    assert np.isnan(ensembles.vote_entropy([[0, 0]])).all()


def test_ensemble_active_learning_counts_the_votes_of_models_and_epochs():
    prediction = [[[0, 0, 2], [0, 1, 2]], [[0, 1, 1], [0, 1, 0]]]  # (2 models, 2 epochs, 3 examples)
    record = FakeRecord({"prediction": prediction}, [0, 1, 2], subset=[[1, 1, 0], [0, 1, 0]])
    quarter = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    result = score("ensemble_active_learning", record)
    np.testing.assert_allclose(result.values, [0, quarter, 1.5 * np.log(2)], rtol=1e-6)
    assert not np.signbit(result.values).any()  # -0 in a table looks like something else than 0
    assert result.used == {"models": 2, "epochs": "1-2", "averaged_over": "all"}
    trained_on = score("ensemble_active_learning", record, models="trained").values
    np.testing.assert_allclose(trained_on, [0, quarter, np.nan], rtol=1e-6)


# --- geometry --------------------------------------------------------------------------------------------------------


def test_supervised_prototypes_by_hand():
    features = np.array([[2, 0], [0, 1], [1, 1], [3, 0], [0, 0], [5, 5]], np.float16)
    labels = np.array([0, 0, 0, 1, 1, -1])
    usable = np.array([1, 1, 1, 1, 1, 1], bool)
    half = 0.5**0.5
    # the mean of (1, 0), (0, 1) and (.7, .7) points to (1, 1); a vector of zeros has no direction
    expected = [1 - half, 1 - half, 0, 0, np.nan, np.nan]
    scores = geometry.supervised_prototypes(features, labels, usable)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    usable[1] = False  # now class 0 points between (1, 0) and (.7, .7)
    scores = geometry.supervised_prototypes(features, labels, usable)
    np.testing.assert_allclose(scores[:3], [1 - np.cos(np.pi / 8), np.nan, 1 - np.cos(np.pi / 8)], atol=1e-6)


def moderate(features: np.ndarray, labels: np.ndarray, usable: np.ndarray | None = None) -> np.ndarray:
    return geometry.moderate(geometry.class_distance(features, labels, usable))


def test_moderate_keeps_the_median_distance_first():
    features = np.array([[0.0], [1], [2], [7], [10], [10], [10]])
    labels = np.array([0, 0, 0, 0, 1, 1, -1])
    # class 0 has mean 2.5, class 1 mean 10: distances 2.5 1.5 .5 4.5 0 0, median 1
    expected = [-1.5, -0.5, -0.5, -3.5, -1, -1, np.nan]
    np.testing.assert_allclose(moderate(features, labels), expected, atol=1e-6)


def greedy(points, start, k) -> tuple[list[int], np.ndarray]:
    """(rows in the order of choosing, distance of every row to the chosen set) by the definition."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    distance = 1 - points @ points.T
    chosen = [start]
    while len(chosen) < k:
        rest = [row for row in range(len(points)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: distance[row, chosen].min()))
    return chosen, distance[:, chosen].min(axis=1)


@pytest.mark.parametrize(("n", "budget"), [(40, 0.25), (40, 1.0), (7, 0.5), (2, 0.5), (1, 1.0), (40, None)])
def test_k_center_is_the_brute_force_greedy(n, budget):
    features = np.random.default_rng(n).normal(size=(n, 5))
    ids = [f"{i}.png" for i in range(n)]
    scores = geometry.k_center(features, ids, budget, seed=3)
    k = max(1, round((budget or 0.1) * n))
    chosen, distance = greedy(features, int(np.argmin(hashes(ids, 3, b"metrics"))), k)
    order = np.argsort(-scores, kind="stable")
    np.testing.assert_array_equal(order[:k], chosen)
    rest = np.setdiff1d(np.arange(n), chosen)
    np.testing.assert_allclose(scores[rest], distance[rest], atol=1e-5)
    assert scores[chosen[0]] == 2


def test_k_center_covers_every_cluster_before_it_repeats_one():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(6), 20)
    features = np.eye(6)[cluster] + 0.02 * rng.normal(size=(120, 6))
    for seed in range(5):
        scores = geometry.k_center(features, [f"{i}" for i in range(120)], 0.1, seed)
        assert set(cluster[np.argsort(-scores)[:6]]) == set(range(6))


def test_k_center_starts_anywhere_and_skips_what_is_not_usable():
    features, ids = np.random.default_rng(0).normal(size=(30, 4)), [f"{i}" for i in range(30)]
    starts = {int(np.argmax(geometry.k_center(features, ids, 0.1, seed))) for seed in range(12)}
    assert len(starts) > 6
    usable = np.arange(30) % 3 > 0
    scores = geometry.k_center(features, ids, 0.1, usable=usable)
    np.testing.assert_array_equal(np.isnan(scores), ~usable)
    none = geometry.k_center(features, ids, 0.1, usable=np.zeros(30, bool))
    assert np.isnan(none).all()


def test_k_center_of_identical_images_ends():
    scores = geometry.k_center(np.ones((5, 3)), list("abcde"), 1.0)
    np.testing.assert_allclose(np.sort(scores), [0, 0, 0, 0, 2], atol=1e-6)


@pytest.mark.parametrize("budget", [0, -0.1, 1.5])
def test_k_center_refuses_a_budget_out_of_range(budget):
    with pytest.raises(UsageError, match="--budget"):
        geometry.k_center(np.ones((3, 2)), list("abc"), budget)


def test_the_default_budget_is_capped(monkeypatch):
    monkeypatch.setattr(geometry, "K_CENTER_MOST", 2)
    features, ids = np.random.default_rng(0).normal(size=(50, 4)), [f"{i}" for i in range(50)]
    np.testing.assert_array_equal(geometry.k_center(features, ids), geometry.k_center(features, ids, 2 / 50))


def test_features_that_are_not_finite_are_an_error():
    features = np.ones((4, 2))
    features[2, 1] = np.nan
    for compute in (geometry.supervised_prototypes, moderate):
        with pytest.raises(ProtopruneError, match="row 2"):
            compute(features, np.zeros(4, int))
        assert np.isfinite(compute(features, np.zeros(4, int), np.arange(4) != 2)[[0, 1, 3]]).all()


def test_random_is_uniform_and_belongs_to_the_image():
    ids = [f"{i}.png" for i in range(4000)]
    scores = geometry.random(ids, 1)
    assert scores.min() >= 0
    assert scores.max() < 1
    np.testing.assert_allclose(np.quantile(scores, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.03)
    np.testing.assert_array_equal(geometry.random(ids[::-1], 1), scores[::-1])
    assert abs(np.corrcoef(scores, geometry.random(ids, 2))[0, 1]) < 0.06


def test_random_leaves_out_images_that_could_not_be_read():
    file = FakeFeatures(np.ones((3, 2)), [0, 0, 0], usable=np.array([True, False, True]))
    np.testing.assert_array_equal(np.isnan(score("random", file).values), [False, True, False])


# --- planted examples: a flipped sign fails here ---------------------------------------------------------------------


@pytest.mark.parametrize("metric", RECORD_METRICS)
def test_planted_mislabels_are_harder(metric, trained):
    record, planted = trained
    assert auc(score(metric, record).values, planted) > 0.8


def planted_features(n=120):
    """Two tight classes and a tenth of images far off, in all directions."""
    rng = np.random.default_rng(0)
    labels, planted = np.arange(n) % 2, np.arange(n) % 10 == 3
    features = 3 * np.eye(8)[labels] + 0.1 * rng.normal(size=(n, 8))
    features[planted] += 3 * rng.normal(size=(planted.sum(), 8))
    return features, labels, planted


@pytest.mark.parametrize("metric", ["supervised_prototypes", "self_supervised_prototypes", "k_center"])
def test_planted_outliers_are_harder(metric, feature_file, tmp_path):
    features, labels, planted = planted_features()
    paths = [f"{'ab'[label]}/{i:04d}.png" for i, label in enumerate(labels)]
    with FeatureFile(feature_file(tmp_path / "features.h5", features, paths=paths)) as file:
        order = [paths.index(path) for path in file.paths]
        result = score(metric, file, **({"k": 2} if metric == "self_supervised_prototypes" else {}))
        if metric == "self_supervised_prototypes":
            np.testing.assert_array_equal(result.values, pruning.rank(file.path, k=2).scores)
            assert result.used == {"k": 2, "seed": 0}
            reseeded = score(metric, file, k=5, seed=3)
            np.testing.assert_array_equal(reseeded.values, pruning.rank(file.path, k=5, seed=3).scores)
            assert not np.array_equal(reseeded.values, score(metric, file, k=5).values)
    assert auc(result.values, planted[order]) > 0.9


def test_planted_extremes_are_not_moderate():
    """Moderate keeps neither the copies of the class mean nor the outliers first."""
    rng = np.random.default_rng(0)
    radius = np.r_[np.zeros(20), np.full(60, 1.0), np.full(20, 4.0)] + rng.uniform(0, 0.3, 100)
    direction = rng.normal(size=(100, 6))
    features = radius[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    scores = moderate(features + 7, np.zeros(100, int))
    assert auc(scores, np.abs(np.arange(100) - 49.5) < 30) > 0.95


# --- what holds for all ----------------------------------------------------------------------------------------------


def small_record(n=7, models=6, epochs=12, classes=3, seed=0) -> FakeRecord:
    rng = np.random.default_rng(seed)
    shape = (models, epochs, n)
    tables = {name: rng.random(shape, np.float32) for name in STATISTICS}
    tables["prediction"] = rng.integers(0, classes, shape)
    test = rng.integers(0, classes, 5)
    subset = rng.random((models, n)) < 0.5
    subset[1:2] = ~subset[:1]  # every example has a model with it and one without
    record = FakeRecord(tables, np.arange(n) % classes, subset)
    record.classes = ["a", "b", "c"][:classes]
    record.class_probabilities = rng.dirichlet(np.ones(classes), (models, n)).astype(np.float16)
    record.statistics = (*record.tables, "probability")
    record.test_labels, record.test_prediction = test, rng.integers(0, classes, (models, 5))
    return record


@pytest.mark.parametrize("metric", RECORD_METRICS)
def test_rows_of_a_record_in_any_order_and_any_blocks(metric, monkeypatch):
    record = small_record(n=29)
    reference = score(metric, record).values
    assert np.ptp(reference) > 0
    order = np.random.default_rng(1).permutation(29)
    np.testing.assert_allclose(score(metric, record.take(order)).values, reference[order], rtol=1e-6)
    monkeypatch.setattr(catalogue, "BLOCK_BYTES", 300)
    monkeypatch.setattr(ensembles, "BLOCK_BYTES", 100)
    np.testing.assert_array_equal(score(metric, record).values, reference)


@pytest.mark.parametrize("metric", ["supervised_prototypes", "moderate", "k_center", "random"])
def test_rows_of_features_in_any_order_and_any_chunks(metric, monkeypatch):
    features, labels, _ = planted_features(60)
    file = FakeFeatures(features, labels)
    reference = score(metric, file).values
    order = np.random.default_rng(1).permutation(60)
    moved = FakeFeatures(features[order], labels[order], [file.paths[row] for row in order])
    np.testing.assert_allclose(score(metric, moved).values, reference[order], atol=1e-5)
    monkeypatch.setattr(vectors, "CHUNK", 7)
    np.testing.assert_allclose(score(metric, file).values, reference, atol=1e-5)


@pytest.mark.parametrize("metric", RECORD_METRICS)
@pytest.mark.parametrize(("n", "models", "epochs"), [(1, 2, 3), (2, 2, 1), (7, 1, 4), (7, 1, 1), (1, 1, 1), (2, 5, 13)])
def test_odd_sizes_of_a_record(metric, n, models, epochs):
    record = small_record(n, models, epochs)
    if models == 1 and metric not in ("memorization", "influence_max", "influence_sum_abs"):
        record.subset[:] = metric not in ("ddd", "label_issues")  # which ask the models that did not see the image
    if models == 1 and metric in ("memorization", "influence_max", "influence_sum_abs"):
        with pytest.raises(ProtopruneError, match=r"fake\.h5"):  # one model cannot be compared with another
            score(metric, record)
        return
    if metric == "label_issues" and n < 3:
        with contextlib.suppress(ProtopruneError):  # one class alone is too few for cleanlab
            score(metric, record)
        return
    values = score(metric, record).values
    assert values.shape == (n,)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


@pytest.mark.parametrize("metric", ["supervised_prototypes", "moderate", "k_center", "random"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_odd_sizes_of_features(metric, n):
    features, labels, _ = planted_features(n)
    values = score(metric, FakeFeatures(features, labels)).values
    assert values.shape == (n,)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("metric", "statistic", "shifted"),
    [
        ("margin", "margin", -2),
        ("aum", "margin", -2),
        ("loss", "loss", 2),
        ("el2n", "error_norm", 2),
        ("dyn_unc", "true_probability", 0),
        ("tdds", "change", 0),
    ],
)
def test_a_constant_added_to_a_statistic(metric, statistic, shifted):
    """Deviations do not see a constant; the others move by it, in the direction of the metric."""
    record = small_record()
    before = score(metric, record).values
    record.tables[statistic] = record.tables[statistic] + 2
    np.testing.assert_allclose(score(metric, record).values, before + shifted, atol=1e-5)


def test_moderate_does_not_see_where_the_embedding_lies_nor_prototypes_its_scale():
    features, labels, _ = planted_features(60)
    moved = moderate(features + 5, labels)
    np.testing.assert_allclose(moved, moderate(features, labels), atol=1e-5)
    scaled = features * np.random.default_rng(0).uniform(0.5, 2, (60, 1))
    for compute in (geometry.supervised_prototypes, lambda x, _: geometry.k_center(x, [f"{i}" for i in range(60)])):
        np.testing.assert_allclose(compute(scaled, labels), compute(features, labels), atol=1e-5)


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_the_catalogue_has_what_the_papers_compare():
    paper = {
        "influence_max", "influence_sum_abs", "ddd", "memorization", "el2n", "forgetting", "ensemble_active_learning",
        "supervised_prototypes", "self_supervised_prototypes",
    }  # fmt: skip
    others = {"grand", "k_center", "aum", "margin", "entropy", "dyn_unc", "tdds", "moderate", "random"}
    others |= {"cover", "facility"}
    assert paper | others <= set(METRICS)
    for name, metric in METRICS.items():
        assert metric.needs in ("record", "features", "nothing"), name
        assert metric.training == (metric.needs == "record"), name
        assert metric.source, name
        assert metric.summary, name
        assert metric.cost, name
        assert set(metric.statistics) <= {*STATISTICS, "probability"}, name


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("eln2", {}, "no metric is called 'eln2'; did you mean el2n"),
        ("zzzzzz", {}, "`protoprune metrics` lists them"),
        ("el2n", {"k": 3}, "--k does not go with el2n; it goes with self_supervised_prototypes"),
        ("el2n", {"epoch": 77}, "--epoch 77: not in fake.h5, which has epochs 1, 2, 3"),
        ("aum", {"epoch": 77}, "--epoch 77"),
        ("el2n", {"models": "some"}, "--models some: expected one of trained, held-out, all"),
        ("influence_max", {"epoch": 1}, "--epoch does not go with influence_max"),
    ],
)
def test_requests_that_cannot_be_met(metric, options, message):
    with pytest.raises(UsageError, match=message):
        score(metric, small_record(), **options)


@pytest.mark.parametrize(
    ("metric", "source", "message"),
    [
        *((name, "features", "needs a training record, and fake.h5 is a feature file") for name in RECORD_METRICS),
        *((name, "record", "needs a feature file, and fake.h5 is a training record") for name in FEATURE_METRICS),
        ("el2n", "array", "el2n needs a training record, and got a ndarray"),
        ("k_center", None, "k_center needs a feature file, and got a NoneType"),
        ("random", "array", "random needs a training record or a feature file, and got a ndarray"),
    ],
)  # fmt: skip
def test_a_source_of_the_wrong_kind_is_named(metric, source, message):
    given = {
        "features": FakeFeatures(np.ones((4, 2)), [0, 1, 0, 1]), "record": small_record(), "array": np.ones(3),
    }.get(source)  # fmt: skip
    with pytest.raises(UsageError, match=message) as error:
        score(metric, given)
    assert str(error.value).startswith(metric)


def test_a_path_is_opened_as_what_the_metric_reads(tmp_path, feature_file):
    record = small_record()
    path = write_record(tmp_path / "record.h5", record)
    feature_file(tmp_path / "features.h5", planted_features(12)[0])
    np.testing.assert_allclose(score("el2n", path).values, score("el2n", record).values, atol=2e-3)
    assert len(score("k_center", tmp_path / "features.h5").values) == 12
    assert [len(score("random", tmp_path / name).values) for name in ("record.h5", "features.h5")] == [7, 12]
    with pytest.raises(ProtopruneError, match=r"features\.h5: an HDF5 file, but not a training record"):
        score("el2n", tmp_path / "features.h5")
    with pytest.raises(ProtopruneError, match=r"record\.h5: an HDF5 file, but not a feature file"):
        score("k_center", path)
    with pytest.raises(ProtopruneError, match=r"none\.h5: no such feature file"):
        score("random", tmp_path / "none.h5")


def test_a_statistic_that_was_not_recorded_is_named():
    record = small_record()
    del record.tables["gradient_norm"]
    record.statistics = tuple(record.tables)
    with pytest.raises(UsageError, match=r"grand needs gradient_norm, which fake\.h5 does not hold; .* --gradients"):
        score("grand", record)


def test_no_scores_at_all_are_an_error():
    record = small_record()
    record.subset[:] = True
    with pytest.raises(ProtopruneError, match="gives no image a score; too few models"):
        score("el2n", record, models="held-out")
    file = FakeFeatures(np.ones((2, 2)), [0, 0], usable=np.zeros(2, bool))
    with pytest.raises(ProtopruneError, match="none of its images is usable"):
        score("k_center", file)


def test_following_training_needs_an_epoch_of_it():
    record = FakeRecord({"margin": np.ones((1, 1, 2))}, [0, 0], epoch_numbers=[0])
    with pytest.raises(UsageError, match="no epoch of training"):
        score("aum", record)


def test_metrics_of_classes_need_classes():
    file = FakeFeatures(np.ones((2, 2)), [0, 0])
    file.classes = []
    for metric in ("supervised_prototypes", "moderate"):
        with pytest.raises(UsageError, match="its images have no classes"):
            score(metric, file)


def test_a_record_is_read_a_block_of_one_model_at_a_time(monkeypatch):
    """The record of 1.28 million images does not fit into memory."""
    record, reads = small_record(n=29), []
    read = record.read

    def watched(name, model, rows, epochs):
        reads.append((name, model, rows.start))
        assert rows.stop - rows.start <= 3
        return read(name, model, rows, epochs)

    def watched_probabilities(model, rows):
        reads.append(("probability", model, rows.start))
        assert 8 * len(record.classes) * (rows.stop - rows.start) <= catalogue.BLOCK_BYTES
        return record.class_probabilities[model][rows]

    record.read, record.probabilities = watched, watched_probabilities
    monkeypatch.setattr(catalogue, "BLOCK_BYTES", 8 * record.epochs * 3)
    for metric in RECORD_METRICS:
        reads.clear()
        score(metric, record)
        assert len(set(reads)) == len(reads)  # nothing twice
        assert {(name, model) for name, model, _ in reads} == {
            (name, model) for name in METRICS[metric].statistics for model in range(record.models)
        }


def write_record(path, record: FakeRecord) -> str:
    """The same record as a real file."""
    records.create(
        str(path), {"uuid": "0" * 8}, paths=record.paths, labels=record.labels, classes=record.classes,
        subset=record.subset, epoch_numbers=record.epoch_numbers, gradients=True,
        probabilities=True,
        test_paths=[f"test/{i}.png" for i in range(len(record.test_labels))], test_labels=record.test_labels,
    )  # fmt: skip
    partial = records.PartialRecord(str(path))
    for epoch in range(record.epochs):
        values = {name: table[:, epoch] for name, table in record.tables.items()}
        values["test_prediction"] = record.test_prediction
        values["test_true_probability"] = np.zeros(record.test_prediction.shape)
        partial.write(slice(None), epoch, values)
    partial.write_probabilities(slice(None), slice(None), record.class_probabilities)
    partial.commit(slice(None), record.epochs)
    partial.finish()
    return str(path)


@pytest.mark.parametrize("metric", RECORD_METRICS)
def test_a_real_record_gives_the_same_scores(metric, tmp_path):
    """float16 keeps three digits, and everything else is the same."""

    record = small_record(n=29)
    with records.Record(write_record(tmp_path / "record.h5", record)) as real:
        result, expected = score(metric, real), score(metric, record)
    np.testing.assert_allclose(result.values, expected.values, rtol=2e-3, atol=2e-3)
    assert result.used == expected.used


def test_distances_that_are_lengths_are_warned_about(feature_file, tmp_path):
    """As a Euclidean ranking by prototypes is: `moderate` measures the same distances."""
    rng = np.random.default_rng(0)
    paths = [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(80)]
    directions = rng.normal(size=(80, 6))
    varying = feature_file(tmp_path / "v.h5", directions * rng.lognormal(0, 1.5, size=(80, 1)), paths=paths)
    with pytest.warns(UserWarning, match=r"mostly the lengths of the feature vectors \(Spearman 0.9"):
        found = catalogue.score("moderate", varying)
    with FeatureFile(varying) as file:
        np.testing.assert_array_equal(found.values, moderate(file.features, file.labels))
    even = feature_file(tmp_path / "e.h5", directions / np.linalg.norm(directions, axis=1, keepdims=True), paths=paths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catalogue.score("moderate", even)
