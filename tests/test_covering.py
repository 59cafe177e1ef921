"""Herding and facility location: against brute force and known rates, and the contracts of every order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from counted import Counted
from hypothesis import given, settings
from hypothesis import strategies as st

import protoprune
from protoprune.clustering import buckets, partition, prototypes
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import featureset
from protoprune.features.featurefile import FeatureFile
from protoprune.ids import hashes_of, shuffled
from protoprune.images.decode import Status
from protoprune.selection import by_key, cover, covering


def ids_of(n: int) -> list[str]:
    return [f"class/{i:05d}.png" for i in range(n)]


def cloud(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    """(n, d) float32 from a few uneven clumps."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((5, d))
    return (centres[rng.integers(0, 5, n) ** 2 % 5] + rng.standard_normal((n, d))).astype(np.float32)


def mmd(kernel: np.ndarray, taken: np.ndarray) -> float:
    """Maximum mean discrepancy between the taken rows and all rows, for a kernel (m, m) over all of them."""
    inside = kernel[np.ix_(taken, taken)].mean() - 2 * kernel[taken].mean() + kernel.mean()
    return float(np.sqrt(max(inside, 0)))


def reference_kernel(features: np.ndarray) -> np.ndarray:
    """The recipe in float64, one pair after another; all rows distinct."""
    x = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.array([((x - one) ** 2).sum(axis=1) for one in x])
    pairs = distance[np.triu_indices(len(x), 1)]
    return np.exp(-distance / np.sort(pairs)[len(pairs) // 2])


def plain_herding(kernel: np.ndarray) -> list[int]:
    """The greedy rule as it is written: the largest mu_j - acc_j / (t + 1) of those not taken."""
    mu, acc, taken = kernel.mean(axis=1), np.zeros(len(kernel)), []
    for t in range(len(kernel)):
        gain = mu - acc / (t + 1)
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        acc += kernel[taken[-1]]
    return taken


def plain_facility(kernel: np.ndarray) -> list[int]:
    covered, taken = np.zeros(len(kernel)), []
    for _ in range(len(kernel)):
        gain = np.maximum(kernel - covered, 0).sum(axis=1)
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        covered = np.maximum(covered, kernel[taken[-1]])
    return taken


def order(features, groups=None, **options) -> list[int]:
    groups = np.zeros(len(features), int) if groups is None else groups
    places = cover(features, groups, ids=ids_of(len(features)), **options)
    return by_key(places, np.flatnonzero(~np.isnan(places)), ids_of(len(features)), 0).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_orders_are_those_of_the_recipe_written_plainly(seed):
    features = cloud(60, seed=seed)
    kernel = reference_kernel(features)
    assert order(features) == plain_herding(kernel)
    # Of a pair that resembles each other alone both have the same gain but for rounding: the values are compared.
    ours, plain = order(features, method="facility"), plain_facility(kernel)
    values = [[kernel[one[:t]].max(axis=0).sum() for t in range(1, 60)] for one in (ours, plain)]
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_set_is_near_the_best_of_all_sets(seed):
    """Facility location far within the 1 - 1/e of Nemhauser et al. 1978; herding's MMD below almost all sets'."""
    features = cloud(13, 4, seed)
    kernel = reference_kernel(features)
    sets = [list(one) for one in itertools.combinations(range(13), 4)]
    best = max(kernel[one].max(axis=0).sum() for one in sets)
    assert kernel[order(features, method="facility")[:4]].max(axis=0).sum() >= 0.97 * best
    discrepancies = np.array([mmd(kernel, np.array(one)) for one in sets])
    assert (discrepancies < mmd(kernel, np.array(order(features)[:4])) - 1e-6).mean() < 0.05


def test_herding_follows_chens_rate_and_random_the_square_root():
    features = cloud(1000, 6)
    kernel = reference_kernel(features)
    sizes, herded, rng = [10, 20, 40, 80, 160], order(features), np.random.default_rng(0)
    ours = [mmd(kernel, np.array(herded[:t])) for t in sizes]
    draws = [np.mean([mmd(kernel, rng.choice(1000, t, replace=False)) for _ in range(20)]) for t in sizes]
    assert np.polyfit(np.log(sizes), np.log(ours), 1)[0] < -0.8  # Chen et al.: 1 / t
    assert -0.7 < np.polyfit(np.log(sizes), np.log(draws), 1)[0] < -0.4  # 1 / sqrt(t)
    assert all(a < b / 2 for a, b in zip(ours, draws, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 5), min_size=30, max_size=30),
    st.sampled_from(sorted(covering.METHODS)),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_every_image_once_whatever_the_order_of_rows_and_the_workers(groups, values, method, seed, random):
    """Few distinct vectors, zero ones among them, so that copies and ties are everywhere."""
    n, groups = len(groups), np.array(groups)
    table = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [-1, 2], [0.5, 0.5]], np.float16)
    features, ids = table[values[:n]], ids_of(n)
    places = cover(features, groups, ids=ids, method=method, seed=seed)
    for name in np.unique(groups):
        own = np.sort(places[groups == name])
        np.testing.assert_allclose(own, (np.arange(len(own)) + 0.5) / len(own))
    mixed = np.array(random.sample(range(n), n))
    again = cover(features[mixed], groups[mixed], ids=[ids[i] for i in mixed], method=method, seed=seed, workers=3)
    np.testing.assert_array_equal(again, places[mixed])


def test_ties_go_by_a_seeded_hash():
    """Two images of a group are each other's equals; so are copies of one image."""
    pair = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    for features in (pair, np.ones((2, 3), np.float32)):
        first = [order(features, seed=seed)[0] for seed in range(20)]
        assert set(first) == {0, 1}
        for seed in range(20):  # the id decides, not the row
            places = cover(features[::-1], np.zeros(2, int), ids=ids_of(2)[::-1], seed=seed)
            assert (places[1] < places[0]) == (first[seed] == 0)


def test_copies_weigh_in_herding_and_come_last_in_facility_location():
    rng = np.random.default_rng(3)
    single = cloud(20, 5)
    features = np.concatenate([single, np.repeat(single[:1], 20, axis=0)])  # half of all are image 0
    copy = np.arange(40) >= 20
    copy[0] = True
    taken = np.array(order(features, seed=int(rng.integers(9))))
    for count in (10, 20, 30):  # in proportion, within one
        assert abs(copy[taken[:count]].sum() - count * copy.mean()) <= 2
    covered = np.array(order(features, method="facility"))
    assert copy[covered[:20]].sum() == 1
    assert copy[covered[20:]].all()


def test_an_image_at_the_mean_has_no_direction_and_resembles_its_copies_alone():
    x = np.array([[0, 0], [0, 0], [1, 0]], np.float32)
    kernel = covering.kernel(x[1:])
    assert kernel[0, 1] == pytest.approx(np.exp(-1))  # D = 2 is the median of one pair
    features = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1], [0, 0], [0, 0]], np.float32)
    assert sorted(order(features)) == list(range(6))


def test_groups_are_interleaved_in_proportion_and_lists_nested():
    groups = np.repeat([3, 7, 9], [60, 30, 6])
    taken = order(cloud(96), groups)
    for count in range(1, 97):
        kept = np.bincount(groups[taken[:count]], minlength=10)[[3, 7, 9]]
        assert (np.abs(kept - count * np.array([60, 30, 6]) / 96) <= 1).all()


def test_only_usable_images_count():
    features, usable = cloud(40), np.arange(40) % 3 > 0
    features[~usable] = np.nan
    places = cover(features, np.zeros(40, int), ids=ids_of(40), usable=usable)
    assert np.isnan(places[~usable]).all()
    alone = cover(features[usable], np.zeros(usable.sum(), int), ids=[ids_of(40)[i] for i in np.flatnonzero(usable)])
    np.testing.assert_array_equal(places[usable], alone)
    assert np.isnan(cover(features, np.zeros(40, int), ids=ids_of(40), usable=np.zeros(40, bool))).all()


def test_what_cannot_be_covered_is_said():
    features = cloud(10)
    with pytest.raises(UsageError, match="--order nearest: expected one of cover, facility"):
        cover(features, np.zeros(10, int), ids=ids_of(10), method="nearest")
    features[4, 2] = np.inf
    with pytest.raises(ProtopruneError, match=r"features of 1 image are NaN or infinite \(first: row 4\)"):
        cover(features, np.zeros(10, int), ids=ids_of(10))
    with pytest.raises(UsageError, match="a group of 9,000 images is too large to cover, at most 8,192"):
        cover(np.zeros((9000, 1), np.float32), np.zeros(9000, int), ids=ids_of(9000))


def test_large_numbers_do_not_overflow():
    features = cloud(30) * np.float32(1e30)
    assert order(features) == order(cloud(30))


# --- groups of a bounded size ----------------------------------------------------------------------------------------


def test_groups_above_the_size_are_split_and_the_others_are_left():
    features, groups = cloud(900), np.repeat([-1, 4, 5], [100, 600, 200])
    usable = np.arange(900) % 10 > 0
    found = partition.split(features, groups, 200, ids=ids_of(900), usable=usable)
    assert (found[~usable] == -1).all()
    assert (np.bincount(found[usable]) <= 400).all()
    pairs = set(zip(found[usable].tolist(), groups[usable].tolist(), strict=True))
    assert len(pairs) == len(np.unique(found[usable]))  # a part lies within a group
    assert sorted(np.bincount([group + 1 for _, group in pairs])[[0, 5, 6]] > 1) == [False, False, True]
    np.testing.assert_array_equal(found, partition.split(features, groups, 200, ids=ids_of(900), usable=usable))


def test_many_parts_are_made_in_steps_and_alike_images_are_divided(monkeypatch):
    monkeypatch.setattr(partition, "FAN", 4)
    features = cloud(2000)
    sizes = np.bincount(partition.split(features, np.zeros(2000, int), 50, ids=ids_of(2000)))
    assert sizes.sum() == 2000
    assert sizes.max() <= 100
    assert len(sizes) > 30
    alike = np.bincount(partition.split(np.ones((1000, 3)), np.zeros(1000, int), 100, ids=ids_of(1000)))
    assert alike.max() <= 200
    features[::3] = 0  # k-means has no place for these, and they stay together
    found = partition.split(features, np.zeros(2000, int), 400, ids=ids_of(2000))
    assert found.min() == 0
    assert np.bincount(found).max() <= 800
    assert partition.split(features[:0], np.zeros(0, int), 50, ids=[]).shape == (0,)


@pytest.mark.parametrize("directed", [0, 1, 5, 200])
def test_groups_of_zeros_are_divided_too(directed):
    """A score table may score them, so that they are there to be covered; k-means alone refuses so few directions."""
    features = np.zeros((1000, 8), np.float32)
    features[:directed] = cloud(directed) if directed else 0
    groups = np.repeat([0, 1], 500)
    found = partition.split(features, groups, 60, ids=ids_of(1000))
    assert found.min() == 0
    assert np.bincount(found).max() <= 120
    pairs = set(zip(found.tolist(), groups.tolist(), strict=True))
    assert len(pairs) == len(np.unique(found))  # a part lies within a group
    np.testing.assert_array_equal(found, partition.split(features, groups, 60, ids=ids_of(1000)))


@pytest.mark.parametrize("by", ["class", "cluster"])
@pytest.mark.parametrize("order", sorted(covering.METHODS))
def test_a_table_of_places_gives_the_lists_of_the_order(order, by, feature_file, tmp_path):
    """Without the images that neither can have a place for: vectors of zeros would move the mean of all."""
    x, names = cloud(60, 4), [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(60)]
    x[[4, 8, 21, 40, 52]] = 0
    path = feature_file(tmp_path / "f.h5", x, paths=names, failed={10: Status.CORRUPT})
    scored = protoprune.score(order, path, by=by)
    with FeatureFile(path) as file:
        protoprune.write_scores(tmp_path / "t.csv", file.paths, scored.values, metric=order)
    assert np.isnan(scored.values).sum() == 6
    for keep in (0.37, 0.8):
        by_table = protoprune.select(path, keep, scores=tmp_path / "t.csv")
        np.testing.assert_array_equal(by_table.keep, protoprune.select(path, keep, order=order, by=by).keep)


# --- features on the disk --------------------------------------------------------------------------------------------


def split_one_by_one(x, groups, size, ids, usable, fan) -> np.ndarray:
    """Parts as they were made when each group's features were gathered from all over the file."""
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    given = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1)
    numbers, count = np.full(len(groups), -1), 0

    def divide(own, most):
        nonlocal count
        if len(own) <= most:
            numbers[own], count = count, count + 1
            return
        k = min(-(-len(own) // size), fan)
        part = np.full(len(own), k)
        if x[own].any(axis=1).sum() >= k:
            found = prototypes.cluster(x[own], k, train_points=min(len(own), max(fan * k, partition._TRAIN))).cluster
            part = np.where(found < 0, k, found)
        if np.bincount(part).max() > 0.9 * len(own):
            part = np.argsort(np.argsort(hashes_of(own, ids, 0, b"split"))) * k // len(own)
        for one in range(k + 1):
            if (part == one).any():
                divide(own[part == one], 2 * size)

    for own in given:
        divide(own, size)
    return numbers


def covered_one_by_one(x, groups, ids, usable, method) -> np.ndarray:
    mean = x[usable].astype(np.float64).mean(axis=0).astype(np.float32)
    places = np.full(len(x), np.nan)
    for group in np.unique(groups[usable]):
        own = shuffled(np.flatnonzero(usable & (groups == group)), ids, 0, b"cover")
        taken = covering.order_of(covering._directions(x[own], mean), covering.METHODS[method])
        places[own[taken]] = (np.arange(len(own)) + 0.5) / len(own)
    return places


@pytest.mark.parametrize("method", sorted(covering.METHODS))
@pytest.mark.parametrize("most_in_one", [False, True])
@pytest.mark.parametrize("memory", [1, 3000, 1 << 28])
def test_features_are_read_in_slices_and_ranks_do_not_change(monkeypatch, tmp_path, method, most_in_one, memory):
    monkeypatch.setattr(partition, "FAN", 4)
    monkeypatch.setattr(buckets, "CHUNK", 31)
    monkeypatch.setattr(buckets, "MEMORY", memory)
    rng = np.random.default_rng(1)
    x, ids = cloud(600).astype(np.float16), ids_of(600)
    x[rng.choice(600, 60, replace=False)] = x[rng.choice(600, 60, replace=False)]
    x[rng.choice(600, 5, replace=False)] = 0
    groups = np.where(rng.random(600) < (0.8 if most_in_one else 0.3), 2, rng.integers(-1, 4, 600)).astype(np.int32)
    usable = rng.random(600) < 0.95
    read = Counted(x)
    parts = partition.split(read, groups, 40, ids=ids, usable=usable, folder=tmp_path)
    np.testing.assert_array_equal(parts, split_one_by_one(x, groups, 40, ids, usable, 4))
    read = Counted(x)
    places = cover(read, parts, ids=ids, usable=usable, method=method, folder=tmp_path, workers=2)
    np.testing.assert_array_equal(places, covered_one_by_one(x, parts, ids, usable, method))
    assert read.reads.max() <= 2  # once for the mean, once for the groups
    assert not list(tmp_path.iterdir())


def test_a_set_of_many_parts_is_covered_as_one_file_and_opens_each_a_few_times(feature_file, tmp_path, monkeypatch):
    """Groups lie across all parts: to gather each from them would open every part once a group."""
    x, parts, names = cloud(240, 4), [], [f"{i // 40:02d}.tar/{'ab'[i % 2]}/{i:04d}.png" for i in range(240)]
    labels = np.arange(240) % 2
    monkeypatch.setattr(FeatureFile, "labels", property(lambda file: labels[: file.n].astype(np.int32)))
    monkeypatch.setattr(FeatureFile, "classes", property(lambda file: ["a", "b"]))
    (tmp_path / "set").mkdir()
    for number in range(6):
        rows, name = slice(40 * number, 40 * number + 40), f"{number:02d}.tar"
        path = feature_file(tmp_path / "set" / f"{name}.h5", x[rows], paths=names[rows])
        with FeatureFile(path) as file:
            parts.append(featureset.Part(name, 1, 1, 40, file.provenance["uuid"]))
    featureset.write_plan(str(tmp_path / "set"), {"root": "/data", "key": {}, "options": {}}, parts)
    whole = feature_file(tmp_path / "f.h5", x, paths=names)
    monkeypatch.setattr(partition, "CLUSTER_SIZE", 20)
    monkeypatch.setattr(partition, "CLASS_SIZE", 20)
    want = {by: protoprune.select(whole, 0.3, order="cover", by=by) for by in ("class", "cluster")}
    monkeypatch.setattr(featureset, "_OPEN_FILES", 1)
    opened, make = [], FeatureFile.__init__

    def counting(self, path):
        opened.append(path)
        make(self, path)

    monkeypatch.setattr(FeatureFile, "__init__", counting)
    for by, one in want.items():
        opened.clear()
        np.testing.assert_array_equal(protoprune.select(tmp_path / "set", 0.3, order="cover", by=by).rank, one.rank)
        assert len(opened) <= 12 * 6  # passes over them, 7 to 9, however many groups there are
