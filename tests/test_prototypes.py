"""Clustering: against brute force, scikit-learn, and the torch backend; defined outcomes for degenerate input."""

import numpy as np
import pytest

from protoprune.clustering import prototypes, vectors
from protoprune.clustering.prototypes import auto_k, cluster, consensus
from protoprune.errors import ProtopruneError, UsageError

BACKENDS = ("faiss", "torch")


def blobs(n=2000, d=16, centres=20, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, d))
    return (means[rng.integers(0, centres, n)] + spread * rng.normal(size=(n, d))).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spherical", [True, False])
def test_assignment_and_distance_equal_brute_force(backend, spherical):
    x = blobs()
    result = cluster(x.astype(np.float16), 30, spherical=spherical, backend=backend)
    x = x.astype(np.float16).astype(np.float64)
    c = result.centroids.astype(np.float64)
    all_distances = 1 - unit(x) @ c.T if spherical else np.linalg.norm(x[:, None] - c[None], axis=2)
    np.testing.assert_allclose(result.distance, all_distances.min(1), atol=2e-5)
    own = all_distances[np.arange(len(x)), result.cluster]
    np.testing.assert_allclose(own, all_distances.min(1), atol=2e-5)
    expected = all_distances.min(1).sum() if spherical else (all_distances.min(1) ** 2).sum()
    assert result.objective == pytest.approx(expected, rel=1e-4)
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(c, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("spherical", [True, False])
def test_torch_and_faiss_agree(spherical):
    x = blobs(3000, 24, 40, 0.6)
    a, b = (cluster(x, 50, spherical=spherical, backend=backend) for backend in BACKENDS)
    assert a.objective == pytest.approx(b.objective, rel=1e-3)
    assert (a.cluster == b.cluster).mean() > 0.99
    assert np.quantile(np.abs(a.distance - b.distance), 0.99) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "spread"), [(10, 0.8), (100, 0.8), (60, 0.1)])
def test_objective_is_within_one_percent_of_scikit_learn_and_faiss(k, spread, backend):
    """With tight clusters, as many as centroids, a start at random points ends tens of per cent higher."""
    import faiss
    from sklearn.cluster import KMeans

    x = unit(blobs(4000, 32, 60, spread))
    own = cluster(x, k, backend=backend).objective
    theirs = unit(KMeans(k, n_init="auto", random_state=0).fit(x).cluster_centers_)
    default = faiss.Kmeans(32, k, spherical=True)
    default.train(x)
    best = min((1 - (x @ c.T).max(1)).sum() for c in (theirs, default.centroids))
    assert own <= 1.01 * best


def test_seeds_are_distinct_points_of_the_data():
    x = blobs(500, 8, 3, 0.01)
    seeds = prototypes._seeds(x, 40, np.random.default_rng(0))
    assert len(np.unique(seeds, axis=0)) == 40
    assert {tuple(one) for one in seeds} <= {tuple(one) for one in x}


def test_planted_outliers_are_the_hardest():
    """Direction: a flipped sign would rank the outliers easiest."""
    x = blobs(500, 16, 1, 0.2)
    outliers = [3, 77, 401]
    x[outliers] = np.random.default_rng(1).normal(size=(3, 16)) * 2
    assert set(np.argsort(cluster(x, 1).distance)[-3:]) == set(outliers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_answer_and_other_seed_another(backend):
    x = blobs()
    a, b, c = (cluster(x, 25, seed=seed, backend=backend) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.distance, b.distance)
    assert not np.array_equal(a.distance, c.distance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spherical", [True, False])
def test_identical_images_leave_empty_clusters_and_distance_zero(backend, spherical):
    result = cluster(np.ones((60, 8), np.float16), 7, backend=backend, spherical=spherical)
    assert result.sizes().sum() == 60
    assert (result.sizes() == 0).sum() >= 1
    np.testing.assert_allclose(result.distance, 0, atol=5e-3)  # the copies of a centroid are nudged apart


def test_rows_that_are_not_usable_do_not_matter():
    x = blobs(300)
    usable = np.ones(300, bool)
    usable[::7] = False
    dirty = x.copy()
    dirty[~usable] = np.nan
    a = cluster(dirty, 9, usable=usable)
    b = cluster(x[usable], 9)
    np.testing.assert_array_equal(a.distance[usable], b.distance)
    assert np.isnan(a.distance[~usable]).all()
    assert (a.cluster[~usable] == -1).all()


def test_a_sample_of_training_points_is_bounded_and_every_image_gets_a_cluster():
    x = blobs(5000)
    result = cluster(x, 20, train_points=600)
    assert result.train_points == 600
    assert (result.cluster >= 0).all()
    assert result.objective <= 1.1 * cluster(x, 20).objective


def test_default_bound_on_training_points(monkeypatch):
    monkeypatch.setattr(prototypes, "TRAIN_BYTES", 4 * 16 * 700)
    assert cluster(blobs(2000), 2).train_points == 700
    assert cluster(blobs(2000), 5).train_points == 256 * 5  # never fewer than faiss's own default


def test_chunks_do_not_change_the_answer(monkeypatch):
    x = blobs(1000)
    whole = cluster(x, 12, train_points=500)
    monkeypatch.setattr(vectors, "CHUNK", 77)
    pieces = cluster(x, 12, train_points=500)
    np.testing.assert_allclose(whole.distance, pieces.distance, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "--k 0"), ({"k": -3}, "--k -3"), ({"k": 101}, "more clusters than usable images"),
     ({"k": 5, "iterations": 0}, "--iterations 0"), ({"k": 5, "train_points": 4}, "--train-points 4"),
     ({"k": 5, "backend": "abacus"}, "--backend abacus")],
)  # fmt: skip
def test_bad_settings_are_usage_errors(options, message):
    with pytest.raises(UsageError, match=message):
        cluster(blobs(100), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_features_name_the_first_row(value):
    x = blobs(100)
    x[42, 3] = value
    with pytest.raises(ProtopruneError, match=r"1 image are NaN or infinite \(first: row 42\)"):
        cluster(x, 5)


def test_as_many_clusters_as_images():
    result = cluster(blobs(50), 50)
    np.testing.assert_allclose(result.distance, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("usable", "classes", "k"),
    [(1_281_167, 1000, 1000), (1_281_167, 0, 1132), (50_000, 10, 10), (200, 0, 14), (44, 0, 4), (7, 0, 1), (30, 9, 3)],
)
def test_auto_k(usable, classes, k):
    assert auto_k(usable, classes) == k


def test_consensus_is_the_mean_distance():
    results = [cluster(blobs(200), 6, seed=seed) for seed in range(3)]
    np.testing.assert_allclose(consensus(results), np.mean([r.distance for r in results], 0), rtol=1e-6)


def test_cache_answers_the_same_and_survives_damage(tmp_path):
    x = blobs(300)
    calls = []

    def compute(k, **settings):
        calls.append(k)
        return cluster(x, k, **settings)

    def ask(content="id", **settings):
        return prototypes.cached(str(tmp_path / "c"), content, compute, k=4, **settings)

    first, found = ask(seed=0)
    second, found_again = ask(seed=0)
    assert (found, found_again, len(calls)) == (False, True, 1)
    for name in ("cluster", "distance", "centroids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert (first.objective, first.seed, first.spherical) == (second.objective, second.seed, second.spherical)
    for change in ({"seed": 1}, {"seed": 0, "iterations": 3}, {"seed": 0, "spherical": False}):
        assert not ask(**change)[1]
    assert not ask(content="other", seed=0)[1]
    for entry in (tmp_path / "c").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert not ask(seed=0)[1]


def test_cache_forgets_features_that_are_no_more(tmp_path):
    def ask(content, k):
        return prototypes.cached(str(tmp_path / "c"), content, lambda k: cluster(blobs(60), k), k=k)

    ask("old", 2), ask("old", 3)
    (tmp_path / "c" / "notes.txt").write_text("not ours")
    assert len(list((tmp_path / "c").glob("*.npz"))) == 2
    ask("new", 2)
    assert len(list((tmp_path / "c").glob("*.npz"))) == 1
    assert (tmp_path / "c" / "notes.txt").exists()
    assert ask("new", 2)[1]


def test_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "c").write_text("a file is in the way")
    result, found = prototypes.cached(str(tmp_path / "c"), "id", lambda k: cluster(blobs(50), k), k=3)
    assert (found, result.k) == (False, 3)
