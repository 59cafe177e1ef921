"""Score tables: forgiving about form, strict about meaning."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import protoprune
from protoprune import paths
from protoprune.errors import ProtopruneError, UsageError
from protoprune.paths import held
from protoprune.scores import mean_overlap, overlap, read_scores, read_table, spearman, turned, write_scores
from protoprune.scores.table import RELEASED

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
    table = read_scores(tmp_path / "s.npy", PATHS, by_place=True)
    assert table.scores.tolist() == [1, 2, 3]
    assert table.scores.dtype == np.float64
    assert f"warning: matched by place: 0 is taken as {PATHS[0]}, 2 as {PATHS[2]}; if" in table.notes()[-1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected rows of path and score"),
        (b"path\ncat/1.png\n", "expected rows of path and score"),
        (b"path,score\n", "a header and no rows"),
        (b"path,score\ncat/1.png,1\ncat/2.png,high\n", r"row 3 has no number in column 2: cat/2.png, high"),
        (b"path,score\ncat/1.png,1\ncat/2.png\n", "row 3 has no number in column 2"),
        (b"path,score\ncat/1.png,1\n./cat/1.png,2\n", "'cat/1.png' occurs twice"),
        (b"path,score\nbird/1.png,1\n", "none of its 1 row names an image .*same root"),
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
        (np.zeros((3, 2)), r"shape \(3, 2\), expected \(n,\)"),
        (np.array(["a", "b", "c"]), "holds <U1, expected numbers"),
        (np.array([1, "a", None], object), "pickled Python objects, which are never read"),
        (np.zeros(3, [("a", float), ("b", float)]), "expected numbers"),
        (None, "not a .npy array of numbers"),
        ("npz", r"its array a has shape \(3, 2\), expected \(n,\)"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, array, message):
    (tmp_path / "s.npy").touch()
    if isinstance(array, str):
        with open(tmp_path / "s.npy", "wb") as file:
            np.savez(file, a=np.zeros((3, 2)))
    elif array is not None:
        np.save(tmp_path / "s.npy", array, allow_pickle=True)
    with pytest.raises(ProtopruneError, match=message):
        read_scores(tmp_path / "s.npy", PATHS)


def test_missing_table(tmp_path):
    with pytest.raises(UsageError, match=r"none\.csv: no such score table"):
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


# --- score tables: written and read back

NAMES = st.text(
    st.one_of(
        st.sampled_from(",;|\t\"'\n\r #\\é…\u2028\udce9\udcff"),
        st.characters(blacklist_categories=("Cs",), blacklist_characters="\0/"),
    ),
    min_size=1,
    max_size=12,
)


def file_name(name: str) -> bool:
    """Whether a folder could hold it; surrogates that together are UTF-8 come back as that character."""
    return os.fsdecode(os.fsencode(name)) == name


PATHS_OF_ANY_KIND = st.lists(NAMES.filter(file_name), min_size=1, max_size=12, unique=True)
FLOATS = {
    np.float32: st.floats(width=32, allow_nan=True, allow_infinity=False),
    np.float64: st.floats(allow_nan=True, allow_infinity=False),
}


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.tsv", "s.parquet", "s.parquet.gz"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, name):
    if "parquet" in name:
        pytest.importorskip("pyarrow")

    @settings(max_examples=40)
    @given(PATHS_OF_ANY_KIND, st.sampled_from(list(FLOATS)), st.data())
    def check(paths, kind, data):
        scores = np.array([data.draw(FLOATS[kind]) for _ in paths], kind)
        write_scores(tmp_path / name, paths, scores, metric="el2n", provenance={"epochs": 10})
        table = read_scores(tmp_path / name, paths)
        assert np.array_equal(table.scores, scores.astype(np.float64), equal_nan=True)
        assert (table.unmatched_rows, table.ambiguous, table.missing) == ([], [], int(np.isnan(scores).sum()))
        assert (table.metric, table.direction, table.provenance) == ("el2n", "header", {"epochs": 10})
        assert table.matched_by == "path"

    check()


def test_the_file_says_what_it_is(tmp_path):
    path = tmp_path / "s.csv"
    scores = np.array([0.1, np.nan, 2e-9, 3], np.float32)
    write_scores(path, ["a,b.png", "c.png", 'd"e.png', "f\ng.png"], scores, metric="aum", provenance={"n": np.int64(3)})
    first, rest = path.read_text().split("\n", 1)
    header = json.loads(first.removeprefix("# protoprune-scores: "))
    assert len(header.pop("digest")) == 16
    assert header == {
        "metric": "aum",
        "higher": "harder",
        "type": "float32",
        "protoprune": protoprune.__version__,
        "provenance": {"n": 3},
    }
    assert rest == 'path,score\n"a,b.png",0.1\n"c.png",\n"d""e.png",2e-09\n"f\ng.png",3.0\n'
    plain = path.read_bytes()
    write_scores(path, ["a,b.png", "c.png", 'd"e.png', "f\ng.png"], scores, metric="aum", provenance={"n": np.int64(3)})
    assert path.read_bytes() == plain


@pytest.mark.parametrize("name", ["s.csv", "s.tsv.gz"])
@pytest.mark.parametrize("odd", ["", '"', "\t"])
def test_a_table_is_written_in_pieces(tmp_path, monkeypatch, name, odd):
    """As one text it took 200 bytes an image. Whether names are quoted is decided for all of them."""
    n = 20_000
    ids = held(f"{row % 50:02d}.tar/{row:09d}{odd if row == n - 1 else ''}.jpg".encode() for row in range(n))
    scores = np.random.default_rng(0).random(n).astype(np.float32)
    write_scores(tmp_path / f"whole-{name}", ids, scores, metric="x")
    monkeypatch.setattr(paths, "BATCH", 500)
    tracemalloc.start()
    write_scores(tmp_path / name, ids, scores, metric="x")
    assert tracemalloc.get_traced_memory()[1] < 60 * n
    tracemalloc.stop()
    assert read_table(tmp_path / name).keys[n - 1] == ids[n - 1]
    unpacked = gzip.decompress if name.endswith(".gz") else bytes
    assert unpacked((tmp_path / name).read_bytes()) == unpacked((tmp_path / f"whole-{name}").read_bytes())


def test_gzip_has_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    import time

    for name, now in (("a.csv.gz", 1e9), ("b.csv.gz", 1.5e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_scores(tmp_path / name, ["a"], np.ones(1), metric="m")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()).endswith(b"path,score\na,1.0\n")


def test_parquet_is_text_for_others_unless_a_name_is_not_utf8(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    write_scores(tmp_path / "s.parquet", ["é.png", "b.png"], np.array([1, np.nan], np.float32), metric="m")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.to_pydict() == {"path": ["é.png", "b.png"], "score": [1.0, None]}
    assert str(table.schema.field("path").type) == "string"
    assert json.loads(table.schema.metadata[b"protoprune-scores"])["metric"] == "m"
    write_scores(tmp_path / "s.parquet", ["\udce9.png"], np.ones(1), metric="m")
    assert pq.read_table(tmp_path / "s.parquet").to_pydict()["path"] == [b"\xe9.png"]


def test_arrow_tables_and_arrays_of_one_column(tmp_path):
    feather = pytest.importorskip("pyarrow.feather")
    pyarrow = pytest.importorskip("pyarrow")
    feather.write_feather(pyarrow.table({"path": ["b", "a"], "score": [2.0, 1.0]}), str(tmp_path / "s.feather"))
    np.save(tmp_path / "s.npy", np.array([[1.0], [2.0]]))
    np.savez(tmp_path / "s.npz", loss=np.array([[1.0], [2.0]]))
    assert read_scores(tmp_path / "s.feather", ["a", "b"]).scores.tolist() == [1, 2]
    for name in ("s.npy", "s.npz"):
        assert read_scores(tmp_path / name, ["a", "b"], rows=["a", "b"]).scores.tolist() == [1, 2]


def test_without_pyarrow_one_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "s.parquet").write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (
        lambda: write_scores(tmp_path / "t.parquet", ["a"], np.ones(1), metric="m"),
        lambda: read_scores(tmp_path / "s.parquet", ["a"]),
    ):
        with pytest.raises(ProtopruneError, match=r"parquet: Parquet needs pyarrow.*protoprune\[tables\]") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "scores", "message"),
    [
        ("s.csv", np.zeros(3), r"shape \(3,\), expected 2 numbers"),
        ("s.csv", np.zeros((2, 1)), r"shape \(2, 1\)"),
        ("s.csv", np.array(["a", "b"]), "of <U1: expected numbers"),
        ("s.npy", np.zeros(2), r"written as \.csv, \.tsv or \.parquet"),
        ("none/s.csv", np.zeros(2), "cannot write"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, scores, message):
    with pytest.raises(ProtopruneError, match=message):
        write_scores(tmp_path / name, ["a", "b"], scores, metric="m")
    assert list(tmp_path.iterdir()) == []


# --- other people's files

IMAGES = ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]
VALUES = [0.5, -1000.0, 7.0, 2.0]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", " ", "    "])
@pytest.mark.parametrize("header", [None, "path{}score", "id{}el2n", "{}0"])
@pytest.mark.parametrize("keys", ["paths", "numbers"])
def test_every_layout(tmp_path, delimiter, header, keys):
    if header == "{}0" and not delimiter.strip(" "):  # a name that is empty needs a delimiter
        header = "name{}0"
    if header == "path{}score" and keys == "numbers":
        header = "index{}score"
    names = IMAGES if keys == "paths" else range(4)
    rows = [f"{name}{delimiter}{value:g}" for name, value in zip(names, VALUES, strict=True)]
    lines = ([header.format(delimiter)] if header else []) + rows[::-1]
    for comment, pack in itertools.product(("", "# made by me, 2023\n#\n"), (bytes, gzip.compress)):
        (tmp_path / "s.txt").write_bytes(pack((comment + "\n".join(lines) + "\n").encode()))
        table = read_scores(tmp_path / "s.txt", IMAGES)
        assert table.scores.tolist() == VALUES
        assert (table.missing, table.unmatched_rows, table.ambiguous) == (0, [], [])
        assert table.matched_by == ("path" if keys == "paths" else "row number")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one score a line", "0.5\n-1000\n7\n2\n"),
        ("under a name", "el2n\n0.5\n-1000\n7\n2\n"),
        ("pandas, with its counter", ",path,el2n\n0,cat/a.png,0.5\n1,cat/b.png,-1000\n2,dog/c.png,7\n3,dog/d.png,2\n"),
        ("counter, no header", "0,cat/a.png,0.5\n1,cat/b.png,-1000\n2,dog/c.png,7\n3,dog/d.png,2\n"),
        ("index after score", "el2n,index\n0.5,0\n-1000,1\n7,2\n2,3\n"),
        ("comments between", "# a\ncat/a.png,0.5\n# b, c\ncat/b.png,-1000\n#\ndog/c.png,7\ndog/d.png,2\n"),
        (
            "delimiters in comments",
            "# a;b;c\n# d\te\npath,score\ncat/a.png,0.5\ncat/b.png,-1e3\ndog/c.png,7\ndog/d.png,2",
        ),
        ("windows folders", "cat\\a.png,0.5\ncat\\b.png,-1000\ndog\\c.png,7\ndog\\d.png,2\n"),
    ],
)
def test_layouts_of_their_own(tmp_path, name, text):
    (tmp_path / "s.csv").write_text(text)
    assert read_scores(tmp_path / "s.csv", IMAGES, by_place="one" in name or "under" in name).scores.tolist() == VALUES


def test_blanks_in_names_that_blanks_separate(tmp_path):
    (tmp_path / "s.txt").write_text("my dog.png 0.5\nthe other  dog.png -2\ncat.png 7\n")
    assert read_scores(tmp_path / "s.txt", ["cat.png", "my dog.png", "the other  dog.png"]).scores.tolist() == [
        7,
        0.5,
        -2,
    ]


def test_names_that_begin_like_a_comment(tmp_path):
    (tmp_path / "s.csv").write_text("#1.png,0.5\n#2.png,3\n")
    assert read_scores(tmp_path / "s.csv", ["#1.png", "#2.png"]).scores.tolist() == [0.5, 3]
    write_scores(tmp_path / "t.csv", ["#1.png", "#2.png"], np.array([np.nan, 3]), metric="m")
    table = read_scores(tmp_path / "t.csv", ["#1.png", "#2.png"])
    assert (table.scores[1], table.missing, table.unmatched_rows) == (3, 1, [])


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz", "s.npz", "s.npy", "s.npy.gz", "s.parquet"])
def test_other_formats(tmp_path, name):
    data = io.BytesIO()
    if "jsonl" in name:
        lines = [
            json.dumps({"index": i, "score": v, "path": p}) for i, (p, v) in enumerate(zip(IMAGES, VALUES, strict=True))
        ]
        data.write("\n".join(lines).encode())
    elif "npz" in name:
        np.savez(data, paths=np.arange(2), filename=np.array(IMAGES), score=np.array(VALUES))
    elif "npy" in name:
        np.save(data, np.array(VALUES, np.float16))
    else:
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"el2n": VALUES, "image_path": IMAGES}), data)
    (tmp_path / name).write_bytes(gzip.compress(data.getvalue()) if name.endswith(".gz") else data.getvalue())
    table = read_scores(tmp_path / name, IMAGES, by_place="npy" in name)
    assert table.scores.tolist() == VALUES
    assert (table.unmatched_rows, table.missing) == ([], 0)


def test_what_protoprune_itself_lists_is_read(tmp_path):
    from helpers import format_list

    for kind in ("csv", "jsonl"):
        (tmp_path / f"s.{kind}").write_bytes(format_list(IMAGES, np.arange(4), np.array(VALUES), kind))
        assert read_scores(tmp_path / f"s.{kind}", IMAGES).scores.tolist() == VALUES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("s.csv", b"path,status,reason\n", "a header and no rows"),
        (
            "s.csv",
            b"path,label\na.png,cat\nb.png,dog\n",
            "no score table: none of its columns path, label holds numbers",
        ),
        ("s.csv", b"path,label,el2n\ncat/a.png,3,0.5\n", "which of its columns path, label, el2n is the score"),
        ("s.csv", b"cat/a.png, 3, 5\ncat/b.png, 9, 1\n", "which of its columns cat/a.png, 3, 5 is the score.*header"),
        ("s.csv", b"cat/a.png,cat,0.5\ncat/b.png,cat,0.1\n", "which of its columns .* is the path"),
        ("s.csv", b"0.1,0.5\n0.2,0.1\n", "which of its columns 0.1, 0.5 is the path"),
        ("s.csv", b"index,score\n0,1\n4,1\n", "row number 4, expected 0 to 3"),
        ("s.csv", b"index,score\n-1,1\n", "row number -1, expected 0 to 3"),
        ("s.csv", b"index,score\n1,1\n01,1\n", "a row number occurs twice"),
        ("s.csv", b"index,score\ncat/a.png,1\n", "its index column holds no row number"),
        ("s.csv", "²,1\n³,2\n".encode(), "none of its 2 rows names an image"),
        ("s.csv", b"1\n2\n", r"shape \(2,\), expected \(4,\)"),
        ("s.csv", b"# protoprune-scores: {\npath,score\na,1\n", "header protoprune-scores is not valid JSON"),
        ("s.csv", b'# protoprune-scores: {"higher": "up"}\npath,score\na,1\n', "says higher is 'up'"),
        ("s.csv", b"index,score,who\n0,0.5,me\n1,2,me\n", "'me' occurs twice"),
        ("s.csv.gz", b"\x1f\x8b\x08\x00broken", "a damaged gzip file"),
        ("s.jsonl", b'{"path": "a"\n', "not a table in the form .jsonl"),
        ("s.jsonl", b"[1, 2]\n", "expected one object"),
        ("s.jsonl", b"", "expected one object"),
        ("s.npz", b"PK", "not a table in the form .npz"),
        ("s.parquet", b"PAR1 and no more", "not a table in the form .parquet"),
        ("s.csv", b"path,score\ncat/a.png,1_0\n", "row 2 has no number in column 2"),
    ],
)
def test_what_is_unclear_is_one_line(tmp_path, name, data, message):
    if name == "s.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ProtopruneError, match=message) as caught:
        read_scores(tmp_path / name, IMAGES)
    assert str(caught.value).count(str(tmp_path / name)) == 1
    assert "\n" not in str(caught.value)


# --- which image a row means

TRAIN = ["n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10027.JPEG", "n01443537/n01443537_2.JPEG"]


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("{path}", "path"),
        ("train/{path}", "path, relative to another root"),
        ("/data/ImageNet/train/{path}", "path, relative to another root"),
        ("{base}", "the end of the path"),
        ("{stem}", "the end of the path without suffix"),
        ("{folder}/{stem}", "path without suffix"),
        ("train/{folder}/{stem}", "path without suffix, relative to another root"),
    ],
)
def test_paths_of_another_root(tmp_path, form, how):
    keys = []
    for path in TRAIN:
        folder, base = path.split("/")
        keys.append(form.format(path=path, folder=folder, base=base, stem=base.removesuffix(".JPEG")))
    (tmp_path / "s.csv").write_text("".join(f"{key},{row}\n" for row, key in reversed(list(enumerate(keys)))))
    table = read_scores(tmp_path / "s.csv", TRAIN)
    assert table.scores.tolist() == [0, 1, 2]
    assert table.matched_by == how
    assert [note for note in table.notes() if "matched" in note] == ([] if how == "path" else [f"matched by {how}"])


def test_images_below_the_root_of_the_table(tmp_path):
    (tmp_path / "s.csv").write_text("".join(f"{path},{row}\n" for row, path in enumerate(TRAIN)))
    assert read_scores(tmp_path / "s.csv", [f"ILSVRC/train/{path}" for path in TRAIN]).scores.tolist() == [0, 1, 2]


def test_what_could_be_several_images_is_left_out_and_counted(tmp_path):
    images = ["cat/1.png", "dog/1.png", "dog/2.png"]
    (tmp_path / "s.csv").write_text("1.png,5\n2.png,6\n")
    table = read_scores(tmp_path / "s.csv", images)
    assert table.ambiguous == ["1.png"]
    assert table.missing == 2
    assert table.scores[2] == 6
    assert "1 table row could mean several images, or share one, and are left out, first 1.png" in table.notes()
    (tmp_path / "s.csv").write_text("train/cat/1.png,5\nval/cat/1.png,6\ntrain/dog/1.png,7\nval/dog/2.png,7\n")
    table = read_scores(tmp_path / "s.csv", images)
    assert table.ambiguous == ["train/cat/1.png", "val/cat/1.png"]
    assert table.scores[1:].tolist() == [7, 7]
    (tmp_path / "s.csv").write_text("1.png,5\n")
    with pytest.raises(ProtopruneError, match="each of its 1 row could be several images"):
        read_scores(tmp_path / "s.csv", images)


def test_a_row_of_another_folder_is_not_taken_for_an_image(tmp_path):
    """old/cat/1.png ends in the path of an image that the table does not have."""
    (tmp_path / "s.csv").write_text("old/cat/1.png,9\ncat/2.png,1\ndog/3.png,2\n")
    table = read_scores(tmp_path / "s.csv", ["cat/1.png", "cat/2.png", "dog/3.png"])
    assert np.isnan(table.scores[0])
    assert table.unmatched_rows == ["old/cat/1.png"]
    (tmp_path / "s.csv").write_text("test/cat/1.png,9\n")  # another split: neither path is the end of the other
    with pytest.raises(ProtopruneError, match="none of its 1 row names an image"):
        read_scores(tmp_path / "s.csv", ["train/cat/1.png"])


def test_one_form_is_taken_for_the_whole_table(tmp_path):
    """The first that fits at least half of the rows; where none does, the first that fits any."""
    images = [f"cat/{letter}.png" for letter in "abcdef"]
    stray = "cat/a.png,9\n"
    (tmp_path / "s.csv").write_text(stray + "".join(f"train/{image},{row}\n" for row, image in enumerate(images[1:])))
    table = read_scores(tmp_path / "s.csv", images)
    assert table.scores.tolist() == [9, 0, 1, 2, 3, 4]
    assert table.matched_by == "path, relative to another root"
    rest = "".join(f"train/{letter}.png,1\n" for letter in "pqrst")
    (tmp_path / "s.csv").write_text(stray + rest + "train/cat/b.png,5\n")
    table = read_scores(tmp_path / "s.csv", images)
    assert table.missing == 5
    assert table.matched_by == "path"
    assert len(table.unmatched_rows) == 6


def test_numbers_that_may_be_names(tmp_path):
    images = [f"{number}.png" for number in range(12)]  # sorted by code point: 10.png is row 2
    (tmp_path / "s.csv").write_text("".join(f"{number},{number}\n" for number in range(12)))
    with pytest.raises(
        ProtopruneError, match=r"'2' may be a row number or the file 2\.png; name its column index or path"
    ):
        read_scores(tmp_path / "s.csv", sorted(images))
    for name in ("index", "path"):
        (tmp_path / "s.csv").write_text(f"{name},score\n" + "".join(f"{number},{number}\n" for number in range(12)))
        table = read_scores(tmp_path / "s.csv", sorted(images))
        expected = list(range(12)) if name == "index" else [int(path[:-4]) for path in sorted(images)]
        assert table.scores.tolist() == expected


# --- what a higher score means


def write_with(path, higher: str | None) -> None:
    head = f'# protoprune-scores: {{"higher": "{higher}"}}\n' if higher else ""
    path.write_text(f"{head}path,score\na,1\nb,2\n")


@pytest.mark.parametrize("word", ["keep", "harder", "prune", "easier"])
def test_direction_that_is_given(tmp_path, word):
    write_with(tmp_path / "s.csv", None)
    table = read_scores(tmp_path / "s.csv", ["a", "b"], higher_is=word)
    assert table.scores.tolist() == ([1, 2] if word in ("keep", "harder") else [-1, -2])
    assert table.direction == "given"
    write_with(tmp_path / "s.csv", word)
    table = read_scores(tmp_path / "s.csv", ["a", "b"])
    assert table.scores.tolist() == ([1, 2] if word in ("keep", "harder") else [-1, -2])
    assert table.direction == "header"


def test_direction_that_nobody_gives_is_said_to_be_assumed(tmp_path):
    write_with(tmp_path / "s.csv", None)
    table = read_scores(tmp_path / "s.csv", ["a", "b"])
    assert table.scores.tolist() == [1, 2]
    assert "does not say (--higher-is, or FILE:prune)" in table.notes()[0]


def test_directions_that_contradict_each_other(tmp_path):
    write_with(tmp_path / "s.csv", "harder")
    assert read_scores(tmp_path / "s.csv", ["a", "b"], higher_is="keep").direction == "header"
    with pytest.raises(UsageError, match=r"--higher-is prune: contradicts .*s\.csv: its own header says harder"):
        read_scores(tmp_path / "s.csv", ["a", "b"], higher_is="prune")
    with pytest.raises(UsageError, match="--higher-is up: expected one of easier, harder, keep, prune"):
        read_scores(tmp_path / "s.csv", ["a", "b"], higher_is="up")


def test_a_rank_says_from_which_end_it_counts(tmp_path):
    """That of a manifest is 0 for the image that is kept first."""
    (tmp_path / "all.csv").write_text("path,score,rank\na.png,0.1,1\nb.png,0.9,0\n")
    with pytest.raises(UsageError, match=r"all\.csv:rank: a rank may count from either end; .*all\.csv:rank:easier"):
        read_scores(f"{tmp_path}/all.csv:rank", ["a.png", "b.png"])
    assert read_scores(f"{tmp_path}/all.csv:rank:easier", ["a.png", "b.png"]).scores.tolist() == [-1, 0]
    assert read_scores(f"{tmp_path}/all.csv:rank", ["a.png", "b.png"], higher_is="harder").scores.tolist() == [1, 0]


@pytest.mark.parametrize("write", ["csv", "only.csv", "jsonl", "npz"])
def test_a_rank_that_is_the_only_score_says_from_which_end_too(tmp_path, write):
    """It was taken as 'higher is harder', which would keep the easiest of a manifest's order."""
    name = f"{tmp_path}/r.{write}"
    if write == "npz":
        np.savez(name, path=np.array(["a.png", "b.png"]), Rank=np.array([1, 0]))
    else:
        text = {"csv": "path,rank\na.png,1\nb.png,0\n", "only.csv": "rank\n1\n0\n",
                "jsonl": '{"path": "a.png", "rank": 1}\n{"path": "b.png", "rank": 0}\n'}[write]  # fmt: skip
        Path(name).write_text(text)
    by = {"by_place": True} if write == "only.csv" else {}
    with pytest.raises(UsageError, match=r": a rank may count from either end; .*:easier"):
        read_scores(name, ["a.png", "b.png"], **by)
    assert read_scores(f"{name}:easier", ["a.png", "b.png"], **by).scores.tolist() == [-1, 0]
    assert turned(read_table(name), "keep").scores.tolist() == [1, 0]  # as `compare --higher-is` reads it


def test_what_a_manifest_gives_no_rank_has_no_score(tmp_path):
    """-1 is of what --dedup left out: turned, it came before all others."""
    (tmp_path / "all.csv").write_text("path,score,rank\na.png,0.1,1\nb.png,0.9,0\ntwin.png,0.9,-1\n")
    for way, first in (("easier", -1), ("harder", 1)):
        found = read_scores(f"{tmp_path}/all.csv:rank:{way}", ["a.png", "b.png", "twin.png"]).scores
        assert (found[0], found[1]) == (first, 0)
        assert np.isnan(found[2])


def test_turned_leaves_tables_with_a_direction_alone(tmp_path):
    write_with(tmp_path / "s.csv", None)
    assert turned(read_table(tmp_path / "s.csv"), "prune").scores.tolist() == [-1, -2]
    assert turned(read_table(tmp_path / "s.csv"), "keep").scores.tolist() == [1, 2]
    write_with(tmp_path / "s.csv", "harder")
    assert turned(read_table(tmp_path / "s.csv"), "prune").scores.tolist() == [1, 2]


def test_the_released_files_are_known_by_name(tmp_path):
    assert len(RELEASED) == len(set(RELEASED)) == 15
    for metric in RELEASED:
        path = tmp_path / f"ImageNet-1K_{metric}.csv"
        path.write_text("".join(f"{one},{row % 2}\n" for row, one in enumerate(TRAIN)))
        table = read_scores(path, TRAIN)
        assert (table.metric, table.direction) == (metric, "released")
        assert table.scores.tolist() == [0, 1, 0]  # higher = keep, and hard is kept first
        assert "higher means keep" in table.notes()[0]
        with pytest.raises(UsageError, match="name of a released file, in which higher means harder"):
            read_scores(path, TRAIN, higher_is="prune")
    (tmp_path / "ImageNet-1K_mine.csv").write_text("a,1\n")
    assert read_table(tmp_path / "ImageNet-1K_mine.csv").direction == "assumed"


CELLS = st.sampled_from(
    ["a.png", "b c.png", "0", "1", "0.5", "", " ", "#", "# x", "path", "score", "index", '"', "1_0", "é"]
)


@given(
    st.lists(st.lists(CELLS, max_size=4), max_size=6), st.sampled_from(",;\t| "), st.sampled_from(["\n", "\r\n", "\r"])
)
def test_whatever_a_text_holds_it_is_read_or_refused_in_one_line(tmp_path, rows, delimiter, end):
    (tmp_path / "s.txt").write_bytes(end.join(delimiter.join(row) for row in rows).encode())
    message = ""
    try:
        table = read_scores(tmp_path / "s.txt", ["a.png", "b c.png", "0.png"])
    except ProtopruneError as error:
        message = str(error)
    assert message.startswith(str(tmp_path / "s.txt")) if message else table.scores.shape == (3,)
    assert "\n" not in message


def test_a_lone_column_without_numbers_is_refused(tmp_path):
    (tmp_path / "s.txt").write_text("score\nabc\n")
    with pytest.raises(ProtopruneError, match="expected rows of path and score"):
        read_scores(tmp_path / "s.txt", ["abc"])


def test_comments_alone_are_no_table(tmp_path):
    (tmp_path / "s.txt").write_text("# x,score,path\n#,b.png,3\n")
    with pytest.raises(ProtopruneError, match="nothing but comments"):
        read_scores(tmp_path / "s.txt", ["b.png"])


def test_a_table_in_any_order_is_matched_as_by_an_index_of_all_names(tmp_path):
    """Brute force: a dict of the paths; some keys are no image, some images have no score, some stand there twice."""
    rng = np.random.default_rng(0)
    names = [f"{i // 100:02d}.tar/{i:05d}.jpg" for i in range(3000)]
    keys = [names[i] for i in rng.permutation(3000)[:2500]] + [f"other/{i}" for i in range(40)]
    values = rng.random(len(keys))
    lines = [f"{key},{value!r}\n" for key, value in zip(keys, values.tolist(), strict=True)]
    (tmp_path / "s.csv").write_text("path,score\n" + "".join(lines))
    table = read_scores(tmp_path / "s.csv", names)
    expected = dict(zip(keys, values.tolist(), strict=True))
    assert np.array_equal(table.scores, [expected.get(name, np.nan) for name in names], equal_nan=True)
    assert (table.unmatched_rows, table.missing, table.matched_by) == (keys[2500:], 500, "path")
    (tmp_path / "s.csv").write_text("path,score\n" + "".join(lines) + lines[7])
    with pytest.raises(ProtopruneError, match="occurs twice"):
        read_scores(tmp_path / "s.csv", names)


@pytest.mark.parametrize("nothing", ["", "NA", "n/a", "null", "NULL", "nan"])
def test_what_r_and_sql_write_for_nothing_is_no_score(tmp_path, nothing):
    (tmp_path / "s.csv").write_text(f"path,note,score\na.png,x,0.5\nb.png,NA,{nothing}\nc.png,NA,2\n")
    found = read_scores(tmp_path / "s.csv", ["a.png", "b.png", "c.png"]).scores
    assert found.tolist()[::2] == [0.5, 2]
    assert np.isnan(found[1])
    (tmp_path / "beside.csv").write_text("path,note,x\na.png,NA,0.5\nb.png,,2\n")
    assert read_scores(tmp_path / "beside.csv", ["a.png", "b.png"]).scores.tolist() == [0.5, 2]  # nor is a column of it
    (tmp_path / "none.csv").write_text(f"path,score\na.png,{nothing}\nb.png,unknown\n")
    with pytest.raises(ProtopruneError):
        read_scores(tmp_path / "none.csv", ["a.png", "b.png"])
