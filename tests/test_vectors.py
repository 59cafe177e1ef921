"""Vectors of odd lengths: where they go in everything that is made from features."""

from __future__ import annotations

import csv
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

import protoprune
from protoprune import pruning
from protoprune.cli import app
from protoprune.clustering import vectors
from protoprune.clustering.prototypes import cluster
from protoprune.errors import ProtopruneError
from protoprune.features.featurefile import FeatureFile
from protoprune.metrics import geometry
from protoprune.metrics.catalogue import score


def directions(n: int = 60, d: int = 8, seed: int = 0) -> np.ndarray:
    """(n, d) float32 vectors in three bunches, of lengths around 1."""
    rng = np.random.default_rng(seed)
    return (np.eye(3, d)[np.arange(n) % 3] + 0.2 * rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("length", [1e-38, 1e-30, 1e-20, 1.0, 1e18, 1e30, 1e37])
def test_a_direction_does_not_depend_on_the_length(length):
    x = directions()
    expected = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    got = vectors.prepared(x * np.float32(length), np.arange(60), unit=True)
    np.testing.assert_allclose(got, expected, atol=2e-6 if length > 1e-37 else 0.02)  # subnormals have fewer digits


def test_zeros_stay_zeros_and_the_input_stays_as_it_is():
    x = directions(4)
    x[2] = 0
    before = x.copy()
    got = vectors.prepared(x, np.arange(4), unit=True)
    assert not got[2].any()
    np.testing.assert_allclose(np.linalg.norm(got[[0, 1, 3]], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_slices_give_the_marked_rows_and_name_them_in_errors(monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK", 7)
    x, wanted = directions(30), np.arange(30) % 4 != 1
    wanted[7:14] = False
    found = list(vectors.slices(x, wanted, unit=False))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), np.flatnonzero(wanted))
    np.testing.assert_array_equal(np.concatenate([part for _, part in found]), x[wanted])
    x[26] = 1e20
    with pytest.raises(ProtopruneError, match=r"1 image are longer than 1e\+15 \(first: row 26\)"):
        list(vectors.slices(x, wanted, unit=False))
    x[26, 3] = np.inf
    with pytest.raises(ProtopruneError, match=r"1 image are NaN or infinite \(first: row 26\)"):
        list(vectors.slices(x, wanted, unit=True))


def test_odd_lengths_change_no_spherical_cluster():
    x = directions()
    odd = x.copy()
    odd[5], odd[11], odd[40] = x[5] * 1e25, x[11] * 1e-25, x[40] * 1e-30
    plain, other = cluster(x, 3), cluster(odd, 3)
    np.testing.assert_array_equal(plain.cluster, other.cluster)
    np.testing.assert_allclose(plain.distance, other.distance, atol=1e-5)


def test_zeros_take_no_part_in_spherical_clusters():
    x = directions()
    zeros = np.insert(x, [0, 20], 0, axis=0)
    rows = np.flatnonzero(zeros.any(axis=1))
    plain, other = cluster(x, 3), cluster(zeros, 3)
    np.testing.assert_array_equal(other.cluster[rows], plain.cluster)
    np.testing.assert_array_equal(other.distance[rows], plain.distance)
    assert (other.cluster[[0, 21]] == -1).all()
    assert np.isnan(other.distance[[0, 21]]).all()
    assert other.objective == plain.objective
    euclidean = cluster(zeros, 3, spherical=False)  # where zero is a point like any other
    assert (euclidean.cluster >= 0).all()


@pytest.mark.parametrize(
    ("scale", "message"), [(1e16, r"longer than 1e\+15"), (1e-20, "too short for Euclidean distances")]
)
def test_lengths_that_euclidean_distances_do_not_bear(scale, message):
    with pytest.raises(ProtopruneError, match=message):
        cluster(directions() * np.float32(scale), 3, spherical=False)


def test_nothing_but_zeros_is_an_error():
    with pytest.raises(ProtopruneError, match="features of all 10 images are zeros"):
        cluster(np.zeros((10, 4)), 2)


def test_zeros_have_no_score_by_direction():
    x, ids = directions(), [f"{i:02d}" for i in range(60)]
    labels = np.arange(60) % 3
    with_zero = x.copy()
    with_zero[7] = 0
    others = np.arange(60) != 7
    for compute in (
        lambda x, usable: geometry.supervised_prototypes(x, labels, usable),
        lambda x, usable: geometry.k_center(x, ids, 0.2, 0, usable),
    ):
        values = compute(with_zero, None)
        np.testing.assert_array_equal(values, compute(x, others))
        assert np.isnan(values[7])
    assert np.isfinite(
        geometry.moderate(geometry.class_distance(with_zero, labels))
    ).all()  # Euclidean: zero is a point


@pytest.fixture
def zeros(tmp_path, feature_file):
    """60 images in three classes, two of which have features of zeros, and 10 copies of others."""
    x = directions(70)
    x[60:] = x[:10] * 3
    x[[14, 17]] = 0
    paths = [f"{'abc'[i % 3]}/{i:02d}.png" for i in range(70)]
    return feature_file(tmp_path / "features.h5", x, paths=paths)


ZEROS = {"c/14.png", "c/17.png"}


def test_images_without_a_direction_are_counted_and_not_kept(zeros, tmp_path):
    manifest, removed = tmp_path / "m.csv", tmp_path / "gone.txt"
    result = CliRunner().invoke(
        app, ["select", zeros, "--keep", "1", "--manifest", str(manifest), "--removed", str(removed), "--k", "3"]
    )
    assert result.exit_code == 0, result.output
    assert (
        "warning: 2 images have features that are all zeros, and are not ranked and not kept (first: c/14.png)"
        in result.stderr
    )
    assert "iterations on all 68 images" in result.stderr
    assert "kept 68 of 68" in result.stderr
    assert set(removed.read_text().split()) == ZEROS
    with open(manifest) as file:
        rows = [row for row in csv.DictReader(file) if row["path"] in ZEROS]
    assert [(row["status"], row["score"], row["rank"], row["keep"]) for row in rows] == [
        ("all zeros", "", "-1", "0")
    ] * 2
    euclidean = CliRunner().invoke(app, ["select", zeros, "--keep", "1", "--k", "3", "--euclidean"])
    assert len(euclidean.stdout.splitlines()) == 70


@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"quota": "dbp"}, {"dedup": 0.001}, {"balance": 0.5}])
def test_every_way_to_select_leaves_them_out(zeros, options):
    chosen = protoprune.select(zeros, 0.9, k=3, **options)
    assert not ZEROS & set(chosen.kept_paths)
    assert {chosen.ranking.paths[row] for row in np.flatnonzero(chosen.ranking.undirected)} == ZEROS
    usable = int(chosen.ranking.usable.sum())
    assert (usable, len(chosen.kept_paths)) == ((58, 52) if "dedup" in options else (68, 61))
    if options == {}:
        assert all(np.isfinite(row.spearman) for row in pruning.stability(chosen, seeds=1))


def test_a_score_table_may_rank_them_but_duplicates_and_quotas_do_not_know_them(zeros, tmp_path):
    np.save(tmp_path / "s.npy", np.arange(70.0))
    for options in ({"dedup": 0.001}, {"quota": "dbp"}):
        chosen = protoprune.select(zeros, 1, scores=tmp_path / "s.npy", by_place=True, k=3, **options)
        assert set(chosen.kept_paths) >= ZEROS
        assert "2 images have features that are all zeros, and are in no cluster" in chosen.ranking.notes()[0]
        if "quota" in options:
            last = [chosen.ranking.paths[row] for row in np.argsort(chosen.rank)[-2:]]
            assert set(last) == ZEROS
        else:
            assert (chosen.ranking.duplicate_of >= 0).sum() == 10
            assert (chosen.ranking.duplicate_of[chosen.ranking.undirected] == -1).all()


def test_metrics_of_a_feature_file_have_no_score_for_them(zeros):
    with FeatureFile(zeros) as file:
        for name in ("supervised_prototypes", "self_supervised_prototypes", "k_center"):
            values = score(name, file).values
            assert {file.paths[row] for row in np.flatnonzero(np.isnan(values))} == ZEROS


# --- lengths that make a Euclidean ranking


def test_a_ranking_by_length_is_said(tmp_path, feature_file):
    rng = np.random.default_rng(0)
    x = vectors.prepared(rng.normal(size=(300, 16)), np.arange(300), unit=True)
    lengths = rng.uniform(5, 15, 300)[:, None]
    warned = {}
    for name, features in (("even", x), ("uneven", x * lengths)):
        path = feature_file(tmp_path / f"{name}.h5", features)
        for euclidean in (True, False):
            ranking = protoprune.rank(path, k=5, euclidean=euclidean)
            warned[name, euclidean] = any("lengths of the feature vectors" in note for note in ranking.notes())
    assert warned == {
        ("even", True): False, ("even", False): False, ("uneven", True): True, ("uneven", False): False
    }  # fmt: skip
    command = ["select", str(tmp_path / "uneven.h5"), "--keep", "0.5", "--k", "5", "--euclidean"]
    result = CliRunner().invoke(app, command)
    assert "warning: this ranking is mostly that of the lengths of the feature vectors (Spearman 0." in result.stderr
    again = CliRunner().invoke(app, command)
    assert "(from the cache)" in again.stderr
    assert "leave out --euclidean" in again.stderr


def test_unit_rows_have_length_1_but_for_zeros():
    x = vectors.unit(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert x.dtype == np.float32
    assert x.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


@pytest.mark.parametrize("length", [1e-37, 1e30])
def test_vectors_whose_squares_float32_does_not_hold_get_length_1(length):
    """They became zeros, or stayed as short as they were, in maps and in what `tune` asks of neighbours."""
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    long = x.copy()
    long[2] *= np.float32(length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(vectors.unit(long), vectors.unit(x), atol=1e-6)
