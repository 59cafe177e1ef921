"""Ranking -> kept set with every option together: exact, nested, whatever the row order; what does not go together."""

from __future__ import annotations

import inspect
import pickle
import re
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import protoprune
from protoprune import pruning
from protoprune.cli import app
from protoprune.clustering.prototypes import Clustering
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import Status
from protoprune.pruning import Clusters, Ranking, Rule, cover_places, prune


def made_up(scores, labels, cluster, distance, status=None) -> Ranking:
    """A ranking as `rank` makes it, of images in three classes and up to four clusters."""
    n = len(scores)
    centroids = np.eye(4, 6, dtype=np.float32)
    centroids[1] = (0.8, 0.6, 0, 0, 0, 0)
    clustering = Clustering(centroids, cluster, distance, 0.0, 0, True, 1, n, "made up")
    status = np.ones(n, np.uint8) if status is None else status
    paths = [f"{i:04d}.png" for i in range(n)]
    vectors = np.stack([distance, cluster, distance * cluster % 3], axis=1)  # exact in any order, with copies
    return Ranking("f.h5", "images", paths, labels, ["a", "b", "c"], status, scores, [clustering], vectors=vectors)


@st.composite
def rankings(draw):
    """Scores with ties and gaps; distances in eighths, whose sums are exact in any order."""
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = np.where(rng.random(n) < 0.15, np.nan, rng.integers(0, 9, n) / 3)
    distance = rng.integers(0, 8, n).astype(np.float32) / 8
    one = made_up(scores, rng.integers(0, 3, n), (rng.integers(0, 10, n) % 4).astype(np.int32), distance)
    if draw(st.booleans()):
        one.duplicate_of = np.where(rng.random(n) < 0.2, (np.arange(n) + 1) % n, -1)
    return one


@st.composite
def rules(draw):
    """Every combination of options that is not refused."""
    options = {
        "order": draw(st.sampled_from(["hard", "easy", "middle", "random", "stratified", "cover", "facility"])),
        "drop_hardest": draw(st.sampled_from([0.0, 0.0, 0.2, 0.7])),
        "quota": draw(st.sampled_from([None, "dbp"])),
        "balance": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "calibrate": draw(st.sampled_from([None, None, 0.0, 0.4, 1.0])),
        "seed": draw(st.integers(0, 3)),
    }
    options["by"] = draw(st.sampled_from([None, "class", "cluster"]))
    try:
        Rule(0.5, **options)
    except UsageError:
        assume(False)
    return options


@settings(max_examples=250, deadline=None)
@given(rankings(), rules())
def test_exact_and_nested_whatever_is_asked_for(ranking, options):
    usable = ranking.usable
    m, before = int(usable.sum()), np.zeros(len(usable), bool)
    for count in range(1, m + 1):
        chosen = prune(ranking, count / m, **options)
        assert chosen.keep.sum() == count
        assert not (chosen.keep & ~usable).any()
        assert not (before & ~chosen.keep).any()
        assert np.array_equal(np.sort(chosen.rank[usable]), np.arange(m))
        assert (chosen.rank[~usable] == -1).all()
        if not options["balance"] and options["calibrate"] is None:
            assert np.array_equal(chosen.keep, (chosen.rank >= 0) & (chosen.rank < count))
        if chosen.weights is not None:
            assert chosen.weights[chosen.keep].sum() == pytest.approx(m)
        before = chosen.keep


@settings(max_examples=100)
@given(rankings(), rules(), st.floats(0.05, 1), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(ranking, options, keep, random):
    shuffle = list(range(len(ranking.paths)))
    random.shuffle(shuffle)
    clustering = ranking.clusterings[0]
    mixed = made_up(
        ranking.scores[shuffle],
        ranking.labels[shuffle],
        clustering.cluster[shuffle],
        clustering.distance[shuffle],
        ranking.status[shuffle],
    )
    mixed.paths = [ranking.paths[row] for row in shuffle]
    if ranking.duplicate_of is not None:
        mixed.duplicate_of = ranking.duplicate_of[shuffle]  # only its sign matters here
    assume(round(keep * int(ranking.usable.sum())))
    straight, other = prune(ranking, keep, **options), prune(mixed, keep, **options)
    assert straight.kept_paths == sorted(other.kept_paths)
    if straight.weights is not None:
        assert straight.weights[shuffle] == pytest.approx(other.weights, nan_ok=True)


def test_cover_takes_classes_in_proportion_and_leaves_out_the_dropped():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    ranking = made_up(np.arange(100.0), labels, np.zeros(100, np.int32), np.zeros(100, np.float32))
    ranking.vectors = rng.normal(size=(100, 5)) + labels[:, None]
    chosen = prune(ranking, 0.3, order="cover")
    assert np.bincount(labels[chosen.keep]).tolist() == [18, 9, 3]
    places = cover_places(ranking, "cover", np.arange(100), "class")
    assert places[chosen.keep].max() < places[~chosen.keep].min()
    dropped = prune(ranking, 0.3, order="cover", drop_hardest=0.5)
    assert not dropped.keep[50:].any()
    rest = made_up(np.arange(50.0), labels[:50], np.zeros(50, np.int32), np.zeros(50, np.float32))
    rest.vectors = ranking.vectors[:50]  # the dropped have no part in what is covered
    assert np.array_equal(dropped.keep[:50], prune(rest, 0.6, order="cover").keep)
    even = prune(ranking, 0.3, order="cover", balance=1.0)
    assert np.bincount(labels[even.keep]).tolist() == [10, 10, 10]
    floor = prune(ranking, 0.3, order="cover", balance=0.5, by="class", drop_hardest=0.05)
    assert np.bincount(labels[floor.keep])[2] == 5


def test_the_dropped_are_marked_and_come_back_last():
    ranking = made_up(np.arange(10.0), np.zeros(10, int), np.zeros(10, np.int32), np.zeros(10, np.float32))
    chosen = prune(ranking, 0.5, drop_hardest=0.2, order="hard")
    assert np.flatnonzero(chosen.keep).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(chosen.dropped).tolist() == [8, 9]
    assert np.flatnonzero(~prune(ranking, 0.9, drop_hardest=0.2, order="easy").keep).tolist() == [9]


def test_quotas_leave_the_dropped_for_last():
    """The far cluster is the hardest and gets the larger quota: dropping must not hand its dropped images out first."""
    cluster = np.repeat([0, 2], 10).astype(np.int32)
    distance = np.repeat([0.1, 0.9], 10).astype(np.float32)
    ranking = made_up(np.arange(20.0), np.zeros(20, int), cluster, distance)
    chosen = prune(ranking, 0.5, quota="dbp", drop_hardest=0.4)
    assert np.flatnonzero(chosen.keep).tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    plain = prune(ranking, 0.5, quota="dbp", order="easy")
    assert plain.keep[10:].all()  # softmax(0.9 / 0.1) leaves next to nothing for the dense one


def test_quota_counts_only_what_may_be_kept():
    """Two clusters as dense as each other once the duplicates, which sit at the centroid, are gone."""
    cluster = np.repeat([0, 2], 12).astype(np.int32)
    distance = np.tile([0.0] * 4 + [0.5] * 8, 2).astype(np.float32)
    ranking = made_up(np.arange(24.0), np.zeros(24, int), cluster, distance)
    shares = [int(prune(ranking, 0.5, quota="dbp").keep[:12].sum())]
    ranking.duplicate_of = np.where((cluster == 0) & (distance == 0), 4, -1)
    kept = prune(ranking, 0.5, quota="dbp").keep
    assert (shares[0], kept.sum()) == (6, 10)
    assert kept[:12].sum() > 6  # its mean distance has risen


def test_balance_holds_for_the_part_by_order_when_calibrated():
    labels = np.repeat([0, 1], [90, 10])
    scores = np.where(labels == 0, 10.0, 0.0) + np.arange(100) / 100
    ranking = made_up(scores, labels, np.zeros(100, np.int32), np.zeros(100, np.float32))
    chosen = prune(ranking, 0.4, calibrate=0.5, balance=1.0, by="class")
    by_order = chosen.weights == 1
    assert by_order.sum() == 20
    assert by_order[labels == 1].sum() == 10
    assert np.nanmax(chosen.weights) == pytest.approx(80 / 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 70}, "for 70 % give 0.7"),
        ({"order": "best"}, "--order best"),
        ({"drop_hardest": 1.0}, "--drop-hardest 1"),
        ({"quota": "even"}, "--quota even: expected dbp"),
        ({"quota": "dbp", "order": "stratified"}, "--quota does not go with --order stratified"),
        ({"balance": 2}, "--balance 2"),
        ({"by": "class"}, "--by goes with --balance"),
        ({"by": "colour", "order": "cover"}, "--by colour: expected class or cluster"),
        ({"calibrate": 0.5, "order": "cover"}, "--calibrate does not go with --order cover"),
        ({"by": "colour", "balance": 0.5}, "--by colour: expected class or cluster"),
        ({"calibrate": 1.5}, "--calibrate 1.5"),
        ({"calibrate": 0.5, "order": "random"}, "--calibrate does not go with --order random"),
        ({"calibrate": 0.5, "drop_hardest": 0.1}, "--calibrate does not go with --drop-hardest"),
    ],
)
def test_rules_that_cannot_be_met(options, message):
    with pytest.raises(UsageError, match=message):
        Rule(**{"keep": 0.5, **options})


def test_quota_needs_clusters_of_cosines():
    ranking = made_up(np.arange(4.0), np.zeros(4, int), np.zeros(4, np.int32), np.zeros(4, np.float32))
    ranking.clusterings[0].spherical = False
    with pytest.raises(UsageError, match="--quota dbp does not go with --euclidean"):
        prune(ranking, 0.5, quota="dbp")
    ranking.clusterings.clear()
    for call in (lambda: prune(ranking, 0.5, quota="dbp"), lambda: pruning.deduplicate(ranking, 0.1)):
        with pytest.raises(UsageError, match="needs clusters; call add_clusters"):
            call()


# --- from a feature file


def test_a_ranking_knows_how_it_was_clustered(tmp_path, feature_file):
    """Else what is clustered again beside it, for `--stability` or a report, is clustered in another way."""
    path = feature_file(tmp_path / "f.h5", np.random.default_rng(0).normal(size=(12, 4)))
    asked = pruning.Clusters(k=3, seed=7, restarts=2, cache=False)
    assert pruning.rank(path, asked).clusters == asked


@pytest.fixture
def copies(tmp_path, feature_file):
    """40 images far apart and 10 near copies of the first ten, which are a little farther from everything."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 24))
    x = np.concatenate([x, x[:10] + 0.02 * rng.normal(size=(10, 24))])
    return feature_file(tmp_path / "features.h5", x, paths=[f"{'ab'[i % 2]}/{i:02d}.png" for i in range(50)])


def test_select_takes_every_option_by_name(copies):
    plain = protoprune.select(copies, 0.5, k=1)
    assert plain.keep.sum() == 25
    assert plain.weights is None
    assert protoprune.select(copies, k=1).rule == Rule(0.7)
    chosen = protoprune.select(
        copies, 0.5, dedup=0.01, order="easy", calibrate=0.5, quota="dbp", balance=0.5, k=1, seed=3
    )
    assert chosen.keep.sum() == 20  # of the 40 that are left
    assert (chosen.ranking.duplicate_of >= 0).sum() == 10
    assert chosen.weights[chosen.keep].sum() == pytest.approx(40)
    assert chosen.rule == Rule(0.5, "easy", quota="dbp", balance=0.5, calibrate=0.5, seed=3)
    for copy, kept in enumerate(chosen.ranking.duplicate_of):
        if kept >= 0:
            pair = sorted(int(chosen.ranking.paths[row][2:4]) for row in (copy, kept))
            assert pair[1] == pair[0] + 40


def test_which_of_two_copies_stays(copies):
    harder = protoprune.select(copies, 1, dedup=0.01, k=1)
    central = protoprune.select(copies, 1, dedup=0.01, dedup_prefer="central", k=1)
    distance = harder.ranking.clusterings[0].distance
    for one, sign in ((harder, 1), (central, -1)):
        copy = np.flatnonzero(one.ranking.duplicate_of >= 0)
        assert len(copy) == 10
        assert (sign * (distance[one.ranking.duplicate_of[copy]] - distance[copy]) > 0).all()
    assert not (harder.keep & central.keep).all()


def test_a_score_table_is_clustered_only_where_that_is_needed(copies, tmp_path):
    scores = tmp_path / "s.npy"
    values = np.arange(50.0)
    values[:5] = np.nan  # a/00.png … have no score: they neither stay nor remove anything
    np.save(scores, values)
    plain = protoprune.select(copies, 0.4, scores=scores, by_place=True)
    assert not plain.ranking.clusterings
    paths = plain.ranking.paths[:]
    assert plain.kept_paths == paths[-18:]
    backwards = protoprune.select(copies, 0.4, scores=scores, rows=paths[::-1], higher_is="easier")
    assert backwards.kept_paths == paths[27:45]  # the least that there is, of which the first five rows have none
    chosen = protoprune.select(copies, 0.5, scores=scores, by_place=True, dedup=0.01, k=1)
    assert len(chosen.ranking.clusterings) == 1
    for one in (backwards, chosen):
        with pytest.raises(UsageError, match="scores ranks without clustering: no --stability with it"):
            pruning.stability(one)
    unscored = np.flatnonzero(np.isnan(values))
    assert not np.isin(chosen.ranking.duplicate_of, unscored).any()
    assert (chosen.ranking.duplicate_of[unscored] == -1).all()
    assert chosen.keep.sum() == round(0.5 * chosen.ranking.usable.sum())
    usable = np.flatnonzero(chosen.ranking.usable)
    assert np.flatnonzero(chosen.keep).tolist() == usable[-chosen.keep.sum() :].tolist()  # still by the table
    with pytest.raises(UsageError, match="scores ranks without clustering: no --k with it"):
        protoprune.select(copies, 0.5, scores=scores, k=3)


def test_stability_compares_the_same_images(copies):
    chosen = protoprune.select(copies, 0.5, dedup=0.01, k=2, drop_hardest=0.1)
    rows = pruning.stability(chosen, seeds=1)
    assert [row.k for row in rows] == [2, 1, 4]
    assert all(0 < row.overlap <= 1 for row in rows)
    alone = pruning.stability(protoprune.select(copies, 0.5, dedup=0.01, k=1, order="easy"), seeds=1)
    assert (alone[0].k, alone[0].overlap) == (1, 1.0)  # one cluster: no seed can differ, and no duplicate comes back
    with pytest.raises(UsageError, match="--order random is none"):
        pruning.stability(protoprune.select(copies, 0.5, k=1, order="random"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dedup": 2}, "--dedup 2"),
        ({"calibrate": 2}, "--calibrate 2"),
        ({"dedup": 0.1, "dedup_prefer": "sideways"}, "--dedup-prefer sideways: expected one of"),
        ({"dedup_prefer": "sideways"}, "--dedup-prefer sideways: goes with --dedup"),
        ({"higher_is": "banana"}, "--higher-is banana: expected one of"),
        ({"higher_is": "keep"}, "--higher-is keep: goes with --scores"),
        ({"by_place": True}, "--by-place: goes with --scores"),
        ({"rows": ["a.png"]}, "--rows: goes with --scores"),
        ({"scores": "s.npy", "rows": ["a.png"], "by_place": True}, "--rows and --by-place: give the one"),
        ({"scores": "s.npy", "iterations": -7}, "--iterations -7"),
        ({"scores": "s.npy", "backend": "nonsense"}, "--backend nonsense"),
        ({"scores": "s.npy", "iterations": 7, "euclidean": True}, "no --euclidean, --iterations with it"),
        ({"scores": "s.npy", "dedup": 0.1, "restarts": 3}, "no --restarts with it"),
        ({"quota": "dbp", "euclidean": True}, "--quota dbp does not go with --euclidean"),
        ({"seed": -1}, "--seed -1"),
        ({"k": 0}, "--k 0"),
        ({"restarts": 0}, "--restarts 0"),
        ({"train_points": 0}, "--train-points 0"),
        ({"k": 3, "train_points": 2}, "--train-points 2: fewer than the 3 clusters"),
    ],
)
def test_python_and_the_command_line_refuse_the_same_before_the_work(tmp_path, options, message):
    nowhere = tmp_path / "nowhere.h5"
    with pytest.raises(UsageError, match=message):
        protoprune.select(nowhere, 0.5, **options)
    arguments = ["select", str(nowhere), "--keep", "0.5"]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr) or "--seed" in result.stderr  # Typer's own words for that one


def test_a_rule_and_clusters_say_the_same_as_their_fields(copies):
    rule, clusters = Rule(0.4, "easy", balance=0.5, seed=2), Clusters(k=3, restarts=2, seed=2)
    whole = protoprune.select(copies, rule, clusters, dedup=0.01)
    named = protoprune.select(copies, 0.4, order="easy", balance=0.5, k=3, restarts=2, seed=2, dedup=0.01)
    assert np.array_equal(whole.keep, named.keep)
    assert (whole.rule, whole.ranking.clusters) == (named.rule, named.ranking.clusters) == (rule, clusters)
    assert np.array_equal(whole.keep, prune(whole.ranking, rule).keep)
    with pytest.raises(TypeError, match="colour"):
        protoprune.select(copies, 0.5, colour="red")
    for call in (protoprune.select, protoprune.rank, lambda file, **options: prune(whole.ranking, 0.5, **options)):
        name = "sead" if call is protoprune.rank else "balanced"
        meant = {"sead": "seed", "balanced": "balance"}[name]
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; did you mean {meant}[?]"):
            call(copies, **{name: 1})


def test_nothing_to_keep_is_an_error(copies, tmp_path):
    with pytest.raises(UsageError, match=r"--keep 0\.001 of 50 images is none"):
        protoprune.select(copies, 0.001, k=1)
    np.save(tmp_path / "none.npy", np.full(50, np.nan))
    with pytest.raises(ProtopruneError, match=r"none\.npy: gives none of the images a score"):
        protoprune.select(copies, 0.5, scores=tmp_path / "none.npy", by_place=True)


@pytest.mark.parametrize("one", [Rule, Clusters])
def test_what_decides_a_list_explains_each_of_its_fields(one):
    for name in inspect.signature(one).parameters:
        assert name in one.__doc__


# --- covering clusters only what it needs ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("euclidean", [False, True])
def test_covering_gives_the_list_that_clustering_first_gave_and_clusters_nothing(
    feature_file, tmp_path, monkeypatch, classes, euclidean
):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 5))
    x[[4, 50]] = 0  # in no spherical cluster, so never kept
    paths = [f"{'abc'[i % 3]}/{i:03d}.png" if classes else f"{i:03d}.png" for i in range(90)]
    path = feature_file(tmp_path / "f.h5", x, paths=paths, failed={7: Status.TRUNCATED})
    want = [prune(pruning.rank(path, euclidean=euclidean), keep, order="cover") for keep in (0.2, 0.8, 1.0)]

    def none(*arguments, **options):
        raise AssertionError("clustered")

    with monkeypatch.context() as patch:
        if classes:
            patch.setattr("protoprune.clustering.prototypes.cluster", none)
        patch.setattr("protoprune.pruning.ranking.add_clusters", none)
        patch.setattr("protoprune.pruning.choosing.add_clusters", none)
        found = [protoprune.select(path, keep, order="cover", euclidean=euclidean) for keep in (0.2, 0.8, 1.0)]
    for one, other in zip(found, want, strict=True):
        assert one.kept_paths == other.kept_paths
        assert np.array_equal(one.rank, other.rank)
        assert not one.ranking.clusterings
    assert int(found[2].keep.sum()) == (89 if euclidean else 87)
    assert len(found[2].ranking.notes()) == (0 if euclidean else 1)


def test_covering_clusters_where_it_is_asked_to(feature_file, tmp_path):
    rng = np.random.default_rng(0)
    path = feature_file(
        tmp_path / "f.h5", rng.normal(size=(60, 4)), paths=[f"{'ab'[i % 2]}/{i}.png" for i in range(60)]
    )
    for options in (
        {"dedup": 0.01},
        {"drop_hardest": 0.1},
        {"quota": "dbp"},
        {"by": "cluster", "k": 3},
        {"by": "cluster", "balance": 0.5},
    ):
        assert protoprune.select(path, 0.5, order="cover", **options).ranking.clusterings, options
    for options in ({}, {"balance": 0.5}, {"by": "cluster"}):
        assert not protoprune.select(path, 0.5, order="cover", **options).ranking.clusterings, options


def test_a_covering_list_has_no_score_and_its_page_has(feature_file, tmp_path):
    rng = np.random.default_rng(0)
    path = feature_file(
        tmp_path / "f.h5", rng.normal(size=(60, 4)), paths=[f"{'ab'[i % 2]}/{i:02d}.png" for i in range(60)]
    )
    run = CliRunner()
    manifest = tmp_path / "all.csv"
    result = run.invoke(
        app, ["select", path, "--keep", "0.5", "--order", "cover", "--format", "csv", "--manifest", str(manifest)]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1].endswith(",")
    assert "k-means" not in result.stderr
    head, first = manifest.read_text().splitlines()[:2]
    row = dict(zip(head.split(","), first.split(","), strict=True))
    assert (row["cluster"], row["distance"], row["score"], row["status"]) == ("-1", "", "", "ok")
    page = ["report", path, "--keep", "0.5", "--order", "cover", "--no-thumbnails", "-o", str(tmp_path / "page.html")]
    result = run.invoke(app, page)
    assert result.exit_code == 0, result.stderr


def test_results_go_to_other_processes_and_into_caches(feature_file, tmp_path):
    """By pickle, without the open file: what was chosen stays, and what needs the features says so."""
    file = feature_file(tmp_path / "f.h5", np.random.default_rng(0).normal(size=(30, 4)))
    result = protoprune.select(file, 0.4, cache=False)
    for again in (pickle.loads(pickle.dumps(result)), deepcopy(result)):
        assert again.kept_paths == result.kept_paths
        assert again.rule == result.rule
        assert again.ranking.scores.tolist() == result.ranking.scores.tolist()
        assert prune(again.ranking, 0.7).kept_paths == prune(result.ranking, 0.7).kept_paths
        with pytest.raises(UsageError, match="has neither its feature file nor vectors; make it with `rank`"):
            prune(again.ranking, 0.4, order="cover")
    assert len(prune(result.ranking, 0.4, order="cover").kept_paths) == 12  # its own file is still open


def test_images_that_are_alone_with_their_prototype_are_said(feature_file, tmp_path):
    angles = np.array([0.0, 0.1, 0.2, 0.3, 3.0])  # one far from the others
    path = feature_file(tmp_path / "f.h5", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert pruning.rank(path, k=1).notes() == []
    note = "1 image is alone in a cluster and so ranks easiest; try --restarts 5 or another --k"
    assert pruning.rank(path, k=2).notes() == [note]
    note = "every image is its own prototype, so that this ranking says nothing; give a smaller --k"
    assert pruning.rank(path, k=5).notes() == [note]
    one = feature_file(tmp_path / "one.h5", np.ones((1, 2)))
    assert pruning.rank(one, k=1).notes() == []
