"""Score tables: forgiving about form, strict about meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoprune.errors import ProtopruneError, UsageError
from protoprune.scores import mean_overlap, overlap, read_scores, spearman

PATHS = ["cat/1.png", "cat/2.png", "dog/3, 4.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("named columns", 'path,score\ncat/1.png,0.5\ncat/2.png,-1e3\n"dog/3, 4.png",7\n'),
        ("no header", 'cat/1.png,0.5\ncat/2.png,-1000\n"dog/3, 4.png",7\n'),
        ("other order", 'index,score,class,path\n0,0.5,c,cat/1.png\n1,-1000,c,cat/2.png\n2,7,d,"dog/3, 4.png"\n'),
        ("other names", "Difficulty\tFilename\n0.5\tcat/1.png\n-1000\tcat/2.png\n7\tdog/3, 4.png\n"),
        ("unknown names", "bild;punkte\ncat/1.png;0.5\ncat/2.png;-1000\ndog/3, 4.png;7\n"),
        ("tabs", "cat/1.png\t0.5\ncat/2.png\t-1000\ndog/3, 4.png\t7\n"),
        ("windows", '\ufeffpath,score\r\ncat/1.png,0.5\r\ncat/2.png,-1000\r\n"dog/3, 4.png",7\r\n'),
        ("blank lines and spaces", 'path, score\n\ncat/1.png, 0.5\n\ncat/2.png,-1000\n"dog/3, 4.png", 7 \n\n'),
        ("dot slash, any order", '"./dog/3, 4.png",7\n./cat/2.png,-1000\n./cat/1.png,0.5\n'),
        ("no final newline", 'cat/1.png,0.5\ncat/2.png,-1000\n"dog/3, 4.png",7'),
    ],
)
def test_forms_that_are_read(tmp_path, name, text):
    (tmp_path / "scores.csv").write_text(text, newline="")
    table = read_scores(tmp_path / "scores.csv", PATHS)
    assert table.scores.tolist() == [0.5, -1000, 7]
    assert (table.missing, table.unmatched_rows) == (0, [])


def test_what_does_not_match_is_counted_on_both_sides(tmp_path):
    (tmp_path / "s.csv").write_text("path,score\ncat/1.png,1\ngone.png,2\ncat/2.png,\n")
    table = read_scores(tmp_path / "s.csv", PATHS)
    assert table.scores[0] == 1
    assert np.isnan(table.scores[1:]).all()
    assert (table.missing, table.unmatched_rows) == (2, ["gone.png"])


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"path,score\ncaf\xe9.png,3\n")
    assert read_scores(tmp_path / "s.csv", ["caf\udce9.png"]).scores.tolist() == [3]


def test_arrays_hold_one_score_a_row(tmp_path):
    np.save(tmp_path / "s.npy", np.array([1, 2, 3], np.float16))
    table = read_scores(tmp_path / "s.npy", PATHS)
    assert table.scores.tolist() == [1, 2, 3]
    assert table.scores.dtype == np.float64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected rows of path and score"),
        (b"path\ncat/1.png\n", "expected rows of path and score"),
        (b"path,score\n", "a header and no rows"),
        (b"path,score\ncat/1.png,1\ncat/2.png,high\n", r"row 3 has no number in column 2: \['cat/2.png', 'high'\]"),
        (b"path,score\ncat/1.png,1\ncat/2.png\n", "row 3 has no number in column 2"),
        (b"path,score\ncat/1.png,1\n./cat/1.png,2\n", "'cat/1.png' occurs twice"),
        (b"path,score\nbird/1.png,1\n", "none of its 1 rows names an image .*same root"),
        (b"path,score\n" + b"x" * 200_000 + b",1\n", "cannot be read as a table"),
        (bytes(range(256)) * 2000, None),
    ],
)
def test_what_cannot_be_read(tmp_path, data, message):
    (tmp_path / "s.csv").write_bytes(data)
    with pytest.raises(ProtopruneError, match=message) as caught:
        read_scores(tmp_path / "s.csv", PATHS)
    assert str(tmp_path / "s.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(2), r"shape \(2,\), expected \(3,\)"),
        (np.zeros((3, 1)), r"shape \(3, 1\), expected \(n,\)"),
        (np.array(["a", "b", "c"]), "not a .npy array of numbers"),
        (np.array([1, "a", None], object), "not a .npy array of numbers"),
        (np.zeros(3, [("a", float), ("b", float)]), "not a .npy array of numbers"),
        (None, "not a .npy array of numbers"),
        ("npz", "not a .npy array of numbers"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, array, message):
    (tmp_path / "s.npy").touch()
    if isinstance(array, str):
        with open(tmp_path / "s.npy", "wb") as file:
            np.savez(file, a=np.zeros(3))
    elif array is not None:
        np.save(tmp_path / "s.npy", array, allow_pickle=True)
    with pytest.raises(ProtopruneError, match=message):
        read_scores(tmp_path / "s.npy", PATHS)


def test_missing_table(tmp_path):
    with pytest.raises(UsageError, match=r"--scores .*none\.csv: no such file"):
        read_scores(tmp_path / "none.csv", PATHS)


# --- comparing rankings

values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, np.nan]), st.floats(-1e6, 1e6))


@given(st.lists(st.tuples(values, values), min_size=3, max_size=40))
def test_spearman_equals_scipy(pairs):
    from scipy.stats import spearmanr

    a, b = np.array(pairs).T
    both = ~(np.isnan(a) | np.isnan(b))
    if len(np.unique(a[both])) < 2 or len(np.unique(b[both])) < 2:
        return  # scipy has no answer for a constant
    assert spearman(a, b) == pytest.approx(spearmanr(a[both], b[both]).statistic, abs=1e-12)


def test_spearman_at_the_ends():
    a = np.array([1.0, 5, 3, 9])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(np.ones(4), np.ones(4)) == 1
    assert spearman(np.ones(4), a) == 0


def test_overlap():
    a, b = np.array([1, 1, 1, 0, 0], bool), np.array([0, 1, 1, 1, 0], bool)
    assert overlap(a, b) == pytest.approx(2 / 3)
    assert overlap(a, a) == 1
    assert overlap(a, ~a) == 0
    assert overlap(np.zeros(3, bool), np.zeros(3, bool)) == 0
    assert mean_overlap([a]) == 1
    assert mean_overlap([a, b, a]) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_a_header_that_does_not_say_which_column_is_the_score_is_refused(tmp_path):
    """Taking the second one would rank the images by their label."""
    (tmp_path / "s.csv").write_text("path,label,el2n\na.png,3,0.5\n")
    with pytest.raises(ProtopruneError, match="which of its columns path, label, el2n is the score"):
        read_scores(tmp_path / "s.csv", ["a.png"])
    (tmp_path / "s.csv").write_text("el2n,path\n0.5,a.png\n")
    assert read_scores(tmp_path / "s.csv", ["a.png"]).scores.tolist() == [0.5]
