"""Near-duplicates: against a plain loop, planted copies, and what stays of two."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from counted import Counted
from hypothesis import given, settings
from hypothesis import strategies as st

import protoprune
from protoprune.clustering import buckets, vectors
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.ids import hashes_of
from protoprune.selection import dedup


def ids_of(n: int) -> list[str]:
    return [f"{i:05d}.png" for i in range(n)]


def duplicates(*arguments, **options) -> np.ndarray:
    return dedup.near_duplicates(*arguments, **options)[0]


def likeness(x, cluster, usable=None, thresholds=dedup.THRESHOLDS) -> dedup.Likeness:
    options = {"ids": ids_of(len(x)), "usable": usable, "thresholds": thresholds}
    return dedup.near_duplicates(x, cluster, np.zeros(len(x)), 0.5, **options)[1]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def loop(x, cluster, distance, epsilon, keep) -> list[int]:
    """The definition, one image at a time in float64; distances must differ. Also how near a cosine is to the limit."""
    x = unit(x.astype(np.float64))
    found, margin = [-1] * len(x), 1.0
    order = sorted(range(len(x)), key=lambda i: -distance[i] if keep == "harder" else distance[i])
    kept: list[int] = []
    for i in order:
        near = [(float(x[i] @ x[j]), -order.index(j), j) for j in kept if cluster[j] == cluster[i]]
        margin = min([margin, *(abs(one[0] - (1 - epsilon)) for one in near)])
        if near and max(near)[0] > 1 - epsilon:
            found[i] = max(near)[2]
        else:
            kept.append(i)
    return found if margin > 1e-5 else []


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(dedup, "BLOCK", 7)


@settings(max_examples=80)
@given(
    st.integers(1, 70), st.integers(1, 4), st.sampled_from([0.01, 0.05, 0.3, 0.8]), st.integers(0, 10**6),
    st.sampled_from(["harder", "central"]),
)  # fmt: skip
def test_equals_the_plain_loop(small_blocks, n, clusters, epsilon, seed, prefer):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    x += 0.2 * rng.normal(size=x.shape) * (rng.random((n, 1)) < 0.7) + 3 * np.eye(4)[rng.integers(0, 4, n)]
    cluster, distance = rng.integers(0, clusters, n) * 3, rng.permutation(n) / n
    expected = loop(x, cluster, distance, epsilon, prefer)
    if not expected:
        return  # a cosine within rounding of the limit
    assert duplicates(x, cluster, distance, epsilon, ids=ids_of(n), prefer=prefer).tolist() == expected


@pytest.mark.parametrize("store", [np.float16, np.float32])
@pytest.mark.parametrize("block", [7, 64, 4096])
def test_planted_copies_are_all_found_and_nothing_else(monkeypatch, store, block):
    monkeypatch.setattr(dedup, "BLOCK", block)
    rng = np.random.default_rng(1)
    originals = rng.normal(size=(300, 32))  # cosines up to about 0.7
    exact, near = originals[:40], originals[40:80] * 3 + 0.1 * rng.normal(size=(40, 32))
    x = np.concatenate([originals, exact, near, near]).astype(store)
    source = np.concatenate([np.arange(300), np.arange(40), np.arange(40, 80), np.arange(40, 80)])
    cluster = (source % 3).astype(np.int32)
    distance = rng.random(len(x)).astype(np.float32)
    found = duplicates(x, cluster, distance, 0.05, ids=ids_of(len(x)))
    for one in range(300):
        family = np.flatnonzero(source == one)
        assert (found[family] < 0).sum() == 1
        stays = family[found[family] < 0][0]
        assert stays == family[distance[family].argmax()]
        assert (found[np.setdiff1d(family, stays)] == stays).all()


def test_harder_and_central_keep_opposite_ends():
    x, cluster, distance = np.ones((3, 4)), np.zeros(3, int), np.array([0.2, 0.1, 0.3])
    assert duplicates(x, cluster, distance, 0.01, ids=ids_of(3)).tolist() == [2, 2, -1]
    assert duplicates(x, cluster, distance, 0.01, ids=ids_of(3), prefer="central").tolist() == [1, -1, 1]


def test_a_removed_image_removes_nothing():
    """A chain: the middle one is like both ends, which are not alike; compared with all before it the last would go."""
    angles = np.radians([0, 15, 30])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = duplicates(x, np.zeros(3, int), np.array([0.3, 0.2, 0.1]), 0.05, ids=ids_of(3))  # cos 15° = .966
    assert found.tolist() == [-1, 0, -1]


def test_the_kept_one_named_is_the_most_similar():
    angles = np.radians([0, 25, 15])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert duplicates(x, np.zeros(3, int), np.array([3, 2, 1.0]), 0.05, ids=ids_of(3)).tolist() == [-1, -1, 1]


def test_clusters_and_unusable_rows_are_apart():
    x, distance = np.ones((6, 3)), np.arange(6.0)
    cluster = np.array([0, 0, 1, 1, -1, 1])
    usable = np.array([True, True, True, True, False, False])
    found = duplicates(x, cluster, distance, 0.1, ids=ids_of(6), usable=usable)
    assert found.tolist() == [1, -1, 3, -1, -1, -1]  # row 5 is the hardest, but cannot be kept
    assert duplicates(x, cluster, distance, 0.1, ids=ids_of(6), usable=np.zeros(6, bool)).tolist() == [-1] * 6


def test_equal_images_are_told_apart_by_a_hash_of_the_name():
    n = 60
    x, cluster, distance = np.tile(np.eye(6), (10, 1)), np.zeros(n, int), np.zeros(n)
    ids, shuffle = ids_of(n), np.random.default_rng(0).permutation(n)
    stays = [ids[row] for row in np.flatnonzero(duplicates(x, cluster, distance, 0.1, ids=ids) < 0)]
    mixed_ids = [ids[row] for row in shuffle]
    mixed = duplicates(x[shuffle], cluster, distance, 0.1, ids=mixed_ids)
    assert sorted(mixed_ids[row] for row in np.flatnonzero(mixed < 0)) == stays
    assert len(stays) == 6
    another = duplicates(x, cluster, distance, 0.1, ids=ids, seed=1)
    assert [ids[row] for row in np.flatnonzero(another < 0)] != stays


def test_zero_vectors_resemble_nothing():
    assert (duplicates(np.zeros((3, 4)), np.zeros(3, int), np.ones(3), 0.5, ids=ids_of(3)) == -1).all()


@pytest.mark.parametrize("epsilon", [0, -1, 1, 1e-9, float("nan")])
def test_thresholds_out_of_range(epsilon):
    with pytest.raises(UsageError, match=r"--dedup .*: expected 1 - cosine from 0.00001"):
        duplicates(np.ones((2, 2)), np.zeros(2, int), np.zeros(2), epsilon, ids=ids_of(2))


def test_sides_that_there_are_not():
    with pytest.raises(UsageError, match="--dedup-prefer best: expected one of harder, central"):
        duplicates(np.ones((2, 2)), np.zeros(2, int), np.zeros(2), 0.1, ids=ids_of(2), prefer="best")


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 10**6))
def test_likeness_equals_the_plain_count(small_blocks, n, clusters, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)) + 2 * np.eye(4)[rng.integers(0, 2, n)]
    x[: n // 4] = x[n // 2 : n // 2 + n // 4] * 3  # exact copies
    cluster, usable = rng.integers(-1, clusters, n), rng.random(n) < 0.8
    thresholds = (0.05, 0.1, 0.4)
    found = likeness(x, cluster, usable=usable, thresholds=thresholds)
    distance = 1 - unit(x) @ unit(x).T
    together = (cluster[:, None] == cluster) & usable & usable[:, None] & (cluster >= 0)
    np.fill_diagonal(together, False)
    if (np.abs(distance[together][:, None] - thresholds) < 1e-5).any():
        return  # within rounding of a threshold
    assert found.pairs.tolist() == [int((together & (distance < mark)).sum()) // 2 for mark in thresholds]
    nearest = np.where(together, distance, np.inf).min(axis=1, initial=np.inf)
    np.testing.assert_allclose(found.nearest, np.where(np.isinf(nearest), np.nan, nearest), atol=1e-5)
    assert found.images.tolist() == [int((nearest < mark).sum()) for mark in thresholds]


def test_the_suggested_threshold_parts_planted_copies_from_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 32))
    copies = x[:150] + 0.15 * rng.normal(size=(150, 32))
    both = np.concatenate([x, copies])
    found = likeness(both, np.zeros(750, int))
    duplicate_of = duplicates(both, np.zeros(750, int), rng.random(750), found.suggested, ids=ids_of(750))
    pairs = {frozenset(pair) for pair in enumerate(duplicate_of.tolist()) if pair[1] >= 0}
    assert pairs == {frozenset((i, 600 + i)) for i in range(150)}
    assert likeness(x[:1], np.zeros(1, int)).suggested is None
    assert likeness(np.ones((9, 3)), np.zeros(9, int)).suggested is None


# --- each row of the features is read once ---------------------------------------------------------------------------


def one_row_at_a_time(x, cluster, distance, epsilon, ids, seed, usable, block) -> np.ndarray:
    """What dedup did before it read features once: each block of a cluster gathered as it was needed."""

    def vectors_of(rows):
        return vectors.prepared(x[rows], rows, unit=True)

    found, threshold = np.full(len(cluster), -1, np.int64), np.float32(1 - epsilon)
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((hashes_of(rows, ids, seed), -distance[rows], cluster[rows]))]
    for members in np.split(rows, np.flatnonzero(np.diff(cluster[rows])) + 1):
        kept = members[:0]
        for first in range(0, len(members), block):
            own = members[first : first + block]
            best, whom = np.full(len(own), -2, np.float32), np.full(len(own), -1, np.int64)
            for start in range(0, len(kept), block):
                part = kept[start : start + block]
                cosine = vectors_of(own) @ vectors_of(part).T
                nearest = cosine.argmax(axis=1)
                value = cosine[np.arange(len(own)), nearest]
                better = value > best
                best[better], whom[better] = value[better], part[nearest[better]]
            dedup._within_block(vectors_of(own) @ vectors_of(own).T, own, threshold, best, whom)
            removed = best > threshold
            found[own[removed]] = whom[removed]
            kept = np.concatenate([kept, own[~removed]])
    return found


@pytest.fixture(params=[1, 3000, 1 << 28])
def small_buckets(request, monkeypatch):
    monkeypatch.setattr(buckets, "CHUNK", 31)
    monkeypatch.setattr(buckets, "MEMORY", request.param)


@settings(max_examples=30)
@given(
    st.integers(1, 300), st.integers(1, 9), st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_rows_read_once_through_buckets_give_the_same_bytes(small_blocks, small_buckets, tmp_path, n, k, store, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 5)) + 2 * np.eye(5)[rng.integers(0, 5, n)]).astype(store)
    x[: n // 5] = x[n // 2 : n // 2 + n // 5]  # exact copies
    cluster, distance = rng.integers(-1, k, n), rng.integers(0, 20, n) / 20  # ties, too
    usable, ids = rng.random(n) < 0.9, ids_of(n)
    read = Counted(x)
    found, counted = dedup.near_duplicates(
        read,
        cluster,
        distance,
        0.05,
        ids=ids,
        seed=3,
        usable=usable,
        thresholds=(0.01, 0.1),
        folder=tmp_path,
        workers=3,
    )
    assert np.array_equal(found, one_row_at_a_time(x, cluster, distance, 0.05, ids, 3, usable, 7))
    assert (read.reads[usable] == 1).all()
    assert read.reads.max() <= 1
    alone = likeness(x, cluster, usable=usable, thresholds=(0.01, 0.1))  # in one bucket, by one worker
    assert counted.pairs.tolist() == alone.pairs.tolist()
    assert np.array_equal(counted.nearest[cluster >= 0], alone.nearest[cluster >= 0], equal_nan=True)
    assert not list(tmp_path.iterdir())


def test_no_room_for_temporary_files_is_said_in_time(monkeypatch, tmp_path):
    x, groups = Counted(np.ones((100, 4), np.float32)), np.split(np.arange(100), 10)
    monkeypatch.setattr(buckets, "MEMORY", 200)
    with pytest.raises(ProtopruneError, match=r"cannot write temporary files \(No such file"):
        list(buckets.grouped(x, groups, tmp_path / "gone"))
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(ProtopruneError, match=r"0\.0 GB are free, .* set TMPDIR to another folder"):
        list(buckets.grouped(x, groups, tmp_path))


def test_a_cluster_that_takes_long_is_said_with_a_larger_k(monkeypatch, feature_file, tmp_path):
    rng = np.random.default_rng(0)
    path = feature_file(tmp_path / "f.h5", np.concatenate([rng.normal(size=(300, 3)) * 0.01 + 1, -np.ones((60, 3))]))
    monkeypatch.setattr("protoprune.pruning.duplicates.LARGE", 100)
    with pytest.warns(ProtopruneWarning, match=r"largest of 2 clusters has 300 images.* --k 30, --dedup takes less"):
        protoprune.select(path, 0.5, k=2, dedup=0.01)


@pytest.mark.parametrize("count", [1, 3])
def test_a_group_larger_than_a_bucket_stays_in_its_file(monkeypatch, tmp_path, count):
    """A third of all images in one class, or all in one cluster, were held in memory twice."""
    x = Counted(np.arange(60_000 * 16, dtype=np.float32).reshape(-1, 16))
    groups = [np.arange(first, 60_000, count) for first in range(count)]
    monkeypatch.setattr(buckets, "MEMORY", 100_000)
    monkeypatch.setattr(buckets, "CHUNK", 1000)
    tracemalloc.start()
    for some, fetch in buckets.grouped(x, groups, tmp_path):
        for own in some:
            found = fetch(own)
            assert np.array_equal(found[-50:], own[-50:, None] * 16 + np.arange(16))
    assert tracemalloc.get_traced_memory()[1] < 60_000 * 16 * 4 / count  # of which it reads each row once
    tracemalloc.stop()
    assert not list(tmp_path.iterdir())
