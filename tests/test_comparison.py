"""Comparing rankings: against scipy, against what was planted, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoprune import comparison
from protoprune.comparison import compare, disagreements, draw, join, pair_rows, short_names, similar_order
from protoprune.errors import ProtopruneError, UsageError
from protoprune.scores import overlap, read_table, spearman, write_scores
from protoprune.selection import kept_mask


def paths_of(n: int) -> list[str]:
    return [f"{'abc'[i % 3]}/{i:04d}.png" for i in range(n)]


# --- the matrix

values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, np.nan]), st.floats(-1e6, 1e6))


@given(st.lists(st.tuples(values, values, values), min_size=4, max_size=30))
def test_the_matrix_is_scipys_over_the_rows_that_all_score(rows):
    from scipy.stats import spearmanr

    scores = np.array(rows).T
    common = scores[:, ~np.isnan(scores).any(axis=0)]
    if common.shape[1] < 2 or any(len(np.unique(row)) < 2 for row in common):
        return  # scipy has no answer for a constant
    result = compare(dict(zip("abc", scores, strict=True)), paths_of(len(rows)), resamples=0)
    rises = np.sign(np.diff(common))  # of two images; the sign first, since a product of small numbers is 0
    expected = spearmanr(common, axis=1).statistic if common.shape[1] > 2 else rises @ rises.T
    assert result.spearman == pytest.approx(expected, abs=1e-9)
    assert len(result.paths) == common.shape[1]
    assert (result.low, result.high) == (None, None)


def test_constants_agree_with_constants_only():
    tables = {"a": np.ones(5), "b": np.zeros(5), "c": np.arange(5.0)}
    matrix = compare(tables, paths_of(5), resamples=3).spearman
    assert matrix.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert [spearman(tables[x], tables[y]) for x, y in ("ab", "ac", "cc")] == [1, 0, pytest.approx(1)]


def test_the_order_puts_similar_metrics_side_by_side():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 300))
    tables = {
        f"{name}{i}": base + 0.3 * rng.normal(size=300) for i in range(3) for name, base in (("x", one), ("y", two))
    }
    order = compare(tables, paths_of(300), resamples=0).order
    kinds = "".join(list(tables)[row][0] for row in order)
    assert kinds in ("xxxyyy", "yyyxxx")
    assert sorted(order.tolist()) == list(range(6))
    assert similar_order(np.eye(2)).tolist() == [0, 1]


# --- intervals


def planted(rng, rho: float, n: int) -> np.ndarray:
    """(2, n) normals of correlation rho: their Spearman correlation is 6/pi arcsin(rho/2)."""
    x, noise = rng.normal(size=(2, n))
    return np.stack([x, rho * x + math.sqrt(1 - rho**2) * noise])


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_intervals_cover_a_known_correlation_as_often_as_they_say(rho):
    rng = np.random.default_rng(1)
    truth, trials, covered = 6 / math.pi * math.asin(rho / 2), 100, 0
    for trial in range(trials):
        data = planted(rng, rho, 120)
        estimate = comparison.correlations(comparison._ranks(data))
        low, high = comparison.bootstrap(data, estimate, resamples=60, level=0.8, seed=trial)
        covered += low[0, 1] <= truth <= high[0, 1]
    assert 0.68 < covered / trials < 0.88


def test_smaller_resamples_give_the_same_interval(monkeypatch):
    data = planted(np.random.default_rng(2), 0.5, 2000)
    estimate = comparison.correlations(comparison._ranks(data))
    full = np.diff(comparison.bootstrap(data, estimate, resamples=300), axis=0)[0, 0, 1]
    monkeypatch.setattr(comparison, "_RESAMPLE", 200)
    low, high = comparison.bootstrap(data, estimate, resamples=300)
    assert (high - low)[0, 1] == pytest.approx(full, rel=0.25)
    assert low[0, 1] < estimate[0, 1] < high[0, 1]


def test_intervals_depend_on_the_seed_alone():
    data = dict(zip("ab", planted(np.random.default_rng(3), 0.5, 60), strict=True))
    one, same, other = (compare(data, paths_of(60), resamples=20, seed=seed) for seed in (0, 0, 1))
    assert (one.low == same.low).all()
    assert (one.low != other.low).any()
    assert np.diag(one.low).tolist() == np.diag(one.high).tolist() == [1, 1]


# --- kept sets


def test_overlap_by_hand():
    tables = {"a": np.array([9, 8, 7, 6, 5, 4.0]), "b": np.array([9, 4, 8, 5, 7, 6.0])}  # b keeps rows 0 2 4 5 1 3
    result = compare(tables, paths_of(6), keeps=(0.5, 1.0), resamples=0)
    assert result.overlap[0.5] == pytest.approx(np.array([[1, 2 / 3], [2 / 3, 1]]))
    assert result.overlap[1.0].tolist() == [[1, 1], [1, 1]]


def test_overlap_is_that_of_the_lists_that_select_gives():
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 4, (3, 90)).astype(float)
    scores[1, :7] = np.nan
    result = compare(dict(zip("abc", scores, strict=True)), paths_of(90), keeps=(0.3, 0.7), resamples=0, seed=5)
    for keep, matrix in result.overlap.items():
        masks = [kept_mask(row[7:], keep, ids=paths_of(90)[7:], seed=5) for row in scores]
        expected = [[overlap(a, b) for b in masks] for a in masks]
        assert matrix == pytest.approx(np.array(expected))


def test_two_random_metrics_overlap_by_the_fraction_kept():
    scores = np.random.default_rng(6).normal(size=(2, 20_000))
    result = compare(dict(zip("ab", scores, strict=True)), paths_of(20_000), keeps=(0.3, 0.7), resamples=0)
    for keep in (0.3, 0.7):
        assert result.overlap[keep][0, 1] == pytest.approx(keep, abs=0.015)


def test_ties_at_the_border_are_counted():
    tables = {
        "a": np.array([1, 1, 1, 0, 0, 0.0]),
        "b": np.array([6, 5, 4, 3, 2, 1.0]),
        "c": np.array([2, 1, 1, 1, 1, 0.0]),
    }
    result = compare(tables, paths_of(6), keeps=(1 / 3, 0.5, 1.0), resamples=0)
    assert result.tied[1 / 3].tolist() == [2, 0, 1]
    assert result.tied[0.5].tolist() == [0, 0, 2]
    assert result.tied[1.0].tolist() == [0, 0, 0]


def test_class_shares_by_hand():
    paths = ["a/0", "a/1", "a/2", "a/3", "b/4", "b/5"]
    tables = {"first": np.array([6, 5, 4, 3, 2, 1.0]), "last": np.array([1, 2, 3, 4, 5, 6.0])}
    result = compare(tables, paths, keeps=(0.5,), resamples=0)
    assert result.classes == ["a", "b"]
    assert result.class_sizes.tolist() == [4, 2]
    assert result.class_shares[0.5].tolist() == [[0.75, 0], [0.25, 1]]
    assert comparison.class_rows(result)[2] == {"keep": 0.5, "table": "last", "class": "a", "images": 4, "share": 0.25}
    given_labels = compare(tables, paths, keeps=(0.5,), resamples=0, labels=np.array([0, 1] * 3), classes=["x", "y"])
    assert given_labels.class_shares[0.5] == pytest.approx(np.array([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))
    assert compare(tables, list("uvwxyz"), keeps=(0.5,), resamples=0).class_shares == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros(5, int), "classes": ["x"]}, r"labels: shape \(5,\), expected one number for each of 6"),
        ({"labels": np.arange(6), "classes": ["x"]}, "label 5: expected a class's number, 0 to 0"),
        ({"labels": np.arange(6) - 2, "classes": list("vwxyz")}, "label -2: .* 0 to 4, or -1 for none"),
        ({"paths": list("uvwxy")}, r"a: shape \(6,\), expected one number for each of 5 paths"),
        ({"tables": {"a": np.arange(6.0), "b": np.arange(7.0)}}, r"b: shape \(7,\)"),
        ({"level": 95}, "confidence 95"),
    ],
)
def test_arrays_of_other_shapes_are_refused(options, message):
    tables = {"a": np.arange(6.0), "b": np.arange(6.0)}
    with pytest.raises(UsageError, match=message):
        compare(**{"tables": tables, "paths": paths_of(6), "resamples": 0, **options})


def test_classes_that_no_compared_image_has_are_left_out(monkeypatch):
    tables = {"first": np.array([6, 5, 4, 3, 2, np.nan]), "last": np.arange(6.0)}
    given = {"keeps": (0.4,), "classes": ["x", "y", "z"]}
    labels = np.array([2, 0, 0, 2, -1, 1])  # y has none but the image without a score
    result = compare(tables, paths_of(6), resamples=0, labels=labels, **given)
    assert (result.classes, result.class_sizes.tolist()) == (["x", "z"], [2, 2])
    assert result.class_shares[0.4].tolist() == [[0.5, 0.5], [0, 0.5]]  # of the rows 0, 1 and of 3, 4
    none = compare(tables, paths_of(6), resamples=0, labels=np.full(6, -1), **given)
    assert (none.classes, none.class_shares) == ([], {})
    monkeypatch.setattr(comparison, "bootstrap", lambda *_, **__: pytest.fail("the classes were looked for too late"))
    with pytest.raises(UsageError, match="--classes: the images compared have no classes"):
        compare(tables, paths_of(6), by_class=True, labels=np.full(6, -1), **given)


# --- where two metrics differ


def test_planted_disagreements_are_found():
    rng = np.random.default_rng(7)
    n, paths = 200, paths_of(200)
    base = rng.permutation(n).astype(float)
    a, b = base + 0.1, base * 3  # the same ranking in other units
    hard_for_a, hard_for_b = [3, 50], [120, 7]
    a[hard_for_a], b[hard_for_a] = [900, 800], [-9, -8]
    a[hard_for_b], b[hard_for_b] = [-7, -6], [9000, 8000]
    result = compare({"a": a, "b": b}, paths, resamples=0)
    left, right = disagreements(result, 0, 1, count=2)
    assert set(left) == {paths[row] for row in hard_for_a}
    assert set(right) == {paths[row] for row in hard_for_b}
    assert disagreements(result, 1, 0, count=2) == (right, left)
    assert disagreements(compare({"a": a, "b": a * 2}, paths, resamples=0), 0, 1) == ([], [])


def test_pairs_come_with_those_that_agree_least_first():
    rng = np.random.default_rng(8)
    base = rng.normal(size=100)
    tables = {"a": base, "b": base + 0.1 * rng.normal(size=100), "c": -base}
    result = compare(tables, paths_of(100), keeps=(0.5,), resamples=10)
    assert comparison.pairs(result)[-1] == (0, 1)
    rows = pair_rows(result)
    assert [(row["a"], row["b"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(rows[0]) == ["a", "b", "spearman", "low", "high", "images", "overlap_0.5"]
    assert rows[1]["spearman"] == pytest.approx(-1)
    assert rows[1]["overlap_0.5"] == 0
    assert rows[0]["images"] == 100


def test_rows_may_come_in_any_order():
    rng = np.random.default_rng(9)
    scores, paths = rng.integers(0, 9, (3, 80)).astype(float), paths_of(80)
    turn = rng.permutation(80)
    one = compare(dict(zip("abc", scores, strict=True)), paths, keeps=(0.4,), resamples=0)
    other = compare(dict(zip("abc", scores[:, turn], strict=True)), [paths[i] for i in turn], keeps=(0.4,), resamples=0)
    assert other.spearman == pytest.approx(one.spearman, abs=1e-12)
    assert (other.overlap[0.4] == one.overlap[0.4]).all()
    assert (other.class_shares[0.4] == one.class_shares[0.4]).all()


@pytest.mark.parametrize(
    ("tables", "options", "error", "message"),
    [
        ({"a": np.ones(3)}, {}, UsageError, "1 score table: expected two or more"),
        ({"a": np.ones(3), "b": np.ones(3)}, {"keeps": [1.5]}, UsageError, "--keep 1.5"),
        ({"a": np.ones(3), "b": np.ones(3)}, {"keeps": [0.9, 0.1]}, UsageError, "--keep 0.1 of 3 images is none"),
        (
            {"a": np.array([1, np.nan, 2]), "b": np.array([np.nan, 1, 2])},
            {},
            ProtopruneError,
            "1 image has a score in every table",
        ),
    ],
)
def test_what_cannot_be_compared(tables, options, error, message):
    with pytest.raises(error, match=message):
        compare(tables, paths_of(3), **options)


# --- the figure


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_figure_has_the_same_bytes_each_time(format, start):
    tables = {"el2n": np.arange(9.0), "a$b_{": np.arange(9.0)[::-1], "caf\udce9": np.arange(9.0) % 4}
    result = compare(tables, paths_of(9), resamples=0)
    data = draw(result, format)
    assert data.startswith(start)
    assert draw(result, format) == data
    if format == "svg":
        assert b"Spearman correlation over 9 images" in data


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(compare({"a": np.arange(4.0), "b": np.arange(4.0)}, paths_of(4), resamples=0))
    assert dict(matplotlib.rcParams) == before


# --- tables -> the same images


def tables_of(tmp_path, **contents):
    tables = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.csv").write_text(content)
        tables[name] = read_table(tmp_path / f"{name}.csv")
    return tables


def test_tables_are_joined_by_path(tmp_path):
    tables = tables_of(
        tmp_path,
        one="path,score\nb/2.png,2\na/1.png,1\nc/3.png,3\n",
        two="path,score\ntrain/c/3.png,30\ntrain/d/4.png,40\ntrain/b/2.png,20\n",
    )
    paths, matched = join(tables)
    assert paths == ["a/1.png", "b/2.png", "c/3.png"]
    assert matched["one"].scores.tolist() == [1, 2, 3]
    assert matched["two"].scores[1:].tolist() == [20, 30]
    assert matched["two"].unmatched_rows == ["train/d/4.png"]
    assert matched["two"].missing == 1


def test_tables_are_joined_to_the_images_of_a_feature_file(tmp_path):
    tables = tables_of(tmp_path, one="a.png,1\nb.png,2\n", two="index,score\n1,20\n0,10\n")
    np.save(tmp_path / "three.npy", np.array([100, 200, 300]))
    tables["three"] = read_table(tmp_path / "three.npy")
    paths, matched = join(tables, ["a.png", "b.png", "c.png"], by_place=True)
    assert paths == ["a.png", "b.png", "c.png"]
    assert [table.scores[:2].tolist() for table in matched.values()] == [[1, 2], [10, 20], [100, 200]]


def test_row_numbers_alone_are_joined_by_number(tmp_path):
    tables = tables_of(tmp_path, one="5\n6\n7\n", two="index,score\n2,3\n0,1\n")
    paths, matched = join(tables)
    assert paths == ["0", "1", "2"]
    assert matched["one"].scores.tolist() == [5, 6, 7]
    assert matched["two"].scores[[0, 2]].tolist() == [1, 3]
    tables |= tables_of(tmp_path, paths="a.png,1\nb.png,2\nc.png,2\n")
    with pytest.raises(UsageError, match=r"one\.csv: has row numbers and .*paths\.csv has paths; give --features"):
        join(tables)


def test_a_metric_and_its_negative_disagree_whatever_the_file_format(tmp_path):
    scores = np.random.default_rng(0).normal(size=50).astype(np.float32)
    write_scores(tmp_path / "a.csv", paths_of(50), scores, metric="m")
    (tmp_path / "b.csv").write_text(
        "".join(f"{path} {-score}\n" for path, score in zip(paths_of(50), scores, strict=True))
    )
    for higher, expected in (("prune", 1), ("keep", -1)):
        tables = {"a": read_table(tmp_path / "a.csv"), "b": read_table(tmp_path / "b.csv", higher_is=higher)}
        paths, matched = join(tables)
        result = compare({name: table.scores for name, table in matched.items()}, paths, resamples=0)
        assert result.spearman[0, 1] == pytest.approx(expected)


def test_names_of_files():
    assert short_names(["x/el2n.csv", "ImageNet-1K_DDD.csv.gz", "aum.parquet"]) == ["el2n", "DDD", "aum"]
    assert short_names(["x/el2n.csv", "y/el2n.csv", "aum.csv"]) == ["x/el2n.csv", "y/el2n.csv", "aum"]
