"""Kept lists: any file name comes back from any format."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle

import numpy as np
import pytest
from helpers import format_list
from hypothesis import assume, example, given
from hypothesis import strategies as st

import protoprune
from protoprune.errors import ProtopruneError, UsageError
from protoprune.formats import archive_kind
from protoprune.lists import manifest_chunks, read_list, read_weights, split_list
from protoprune.text import with_slashes

# Any name that Linux allows: every byte except the slash and NUL.
names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda b: b.translate(None, b"/\0"))
    .filter(lambda b: b not in (b"", b".", b".."))
)
paths_of = st.lists(
    st.lists(names, min_size=1, max_size=3).map(lambda parts: os.fsdecode(b"/".join(parts))), unique=True, max_size=8
)
NASTY = [
    "a b.png",
    "new\nline.png",
    "ends\r",
    "\r",
    "caf\udce9.png",
    'quo"te,comma;.png',
    "=1+1",
    "#x",
    "\x01\x7f",
    "\ufeff",
]


def written(paths, format, folder, null=False) -> str:
    scores = np.arange(len(paths), dtype=np.float32) / 3
    data = format_list(paths, np.arange(len(paths)) * 2, scores, format, null=null)
    if format != "npy":
        assume(archive_kind(data[:512]) is None)  # names that nobody has: the marks of archives, and control characters
    path = os.path.join(folder, f"list.{format}")
    with open(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize(("format", "null"), [("txt", True), ("jsonl", False), ("csv", False)])
def test_any_name_comes_back(tmp_path, format, null):
    @example(NASTY)
    @example([])
    @given(paths_of)
    def check(paths):
        assert read_list(written(paths, format, tmp_path, null)) == paths

    check()


def test_lines_hold_every_name_but_those_with_a_line_break(tmp_path):
    @example(NASTY)
    @example(["one\r"])
    @example(["\ufeffmark.png"])
    @given(paths_of)
    def check(paths):
        if any("\n" in path or path.endswith("\r") for path in paths):
            with pytest.raises(UsageError, match=r"line break.*or use -0"):
                written(paths, "txt", tmp_path)
        elif paths and paths[0].startswith("\ufeff"):  # which is how Windows marks a text as UTF-8
            with pytest.raises(UsageError, match=r"byte order mark.*use -0"):
                written(paths, "txt", tmp_path)
        else:
            assert read_list(written(paths, "txt", tmp_path)) == paths

    check()


def test_arrays_hold_row_indices(tmp_path):
    assert read_list(written(["a", "b", "c"], "npy", tmp_path)).tolist() == [0, 2, 4]
    assert read_list(written([], "npy", tmp_path)).dtype == np.int64


def test_bytes_of_each_format():
    arguments = (["a/1.png", "b,2.png"], np.array([0, 7]), np.array([0.1, np.nan], np.float32))
    assert format_list(*arguments) == b"a/1.png\nb,2.png\n"
    assert format_list(*arguments, null=True) == b"a/1.png\0b,2.png\0"
    assert format_list(*arguments, "csv") == b'path,index,score\na/1.png,0,0.1\n"b,2.png",7,\n'
    first, second = format_list(*arguments, "jsonl").splitlines()
    assert json.loads(first) == {"path": "a/1.png", "index": 0, "score": 0.1}
    assert json.loads(second)["score"] in ("", None)


def test_bytes_of_names_are_written_as_the_file_system_has_them():
    assert format_list(["caf\udce9.png"], np.array([0]), np.array([0.0])) == b"caf\xe9.png\n"


@pytest.mark.parametrize(
    ("format", "null", "message"),
    [("xml", False, "--format xml: expected one of txt, csv, jsonl, npy"), ("csv", True, "-0 goes with --format txt")],
)
def test_formats_that_do_not_exist(format, null, message):
    with pytest.raises(UsageError, match=message):
        format_list([], np.empty(0), np.empty(0), format, null=null)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.csv", b"class,score\na.png,1\n", "no 'path' column, only class, score"),
        (
            "l.csv",
            b"# protoprune-scores: {}\npath,score\na.png,1\n",
            "a score table, which says nothing of what to k",
        ),
        (
            "l.txt",
            b"# protoprune-scores: {}\npath,score\na.png,1\n",
            "a score table, which says nothing of what to k",
        ),
        ("l.csv", b"path,keep\na.png,1\nb.png,perhaps\n", "its keep column has 'perhaps' in row 2, expected 1 or 0"),
        ("l.csv", b"path,keep\na.png,1\nb.png\n", "its keep column has None in row 2"),
        ("l.jsonl", b'{"path": 3}\n', "row 1 has no 'path'"),
        ("l.txt.gz", b"\x1f\x8b\x08\x00garbage of twenty bytes", "a damaged gzip file"),
        ("l.csv", b"index,path\n0\n", "no 'path'"),
        ("l.csv", b"path\n" + b"x" * 200_000 + b"\n", "field"),
        ("l.jsonl", b'{"path": "a.png"}\nnot json\n', "not a list that protoprune wrote"),
        ("l.jsonl", b'{"label": "a.png"}\n', "no 'path' column"),
        ("l.jsonl", b'["a.png", 3]\n', r"entry 1, \"a.png\", is no object with a path"),
        ("l.jsonl", b'{"path": "a.png"}\nnull\n', "entry 2, null, is no object with a path"),
        ("l.json", b'[{"path": "a.png"}, null]', "entry 2, null, is no object with a path"),
        ("l.json", b'[{"path": "a.png"}, {"path": null}]', "row 2 has no 'path'"),
        ("l.json", b"null", "its JSON is no array of paths"),
        ("l.json", b"[1, 2", "not a list that protoprune wrote"),
        ("l.jsonl", b'{"path":' * 99_999, "nested too deeply"),
        ("l.json", b"[" * 99_999, "nested too deeply"),
        ("l.npy", b"a.png\nb.png\n", "not a list that protoprune wrote"),
        ("l.npy", b"", "not a list that protoprune wrote"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ProtopruneError, match=message) as caught:
        read_list(tmp_path / name)
    assert name in str(caught.value)


def test_missing_list_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match=r"no such list; make one with `protoprune select"):
        read_list(tmp_path / "kept.txt")


def test_empty_files(tmp_path):
    for name in ("l.txt", "l.jsonl", "l.csv"):
        (tmp_path / name).touch()
        assert read_list(tmp_path / name) == []


# --- weights

WEIGHTS = np.array([1.0, 35 / 3])


def test_weights_are_a_column_of_their_own_and_only_where_there_are_some(tmp_path):
    arguments = (["a/1.png", "b,2.png"], np.array([0, 7]), np.array([0.5, 0.25]))
    assert format_list(*arguments, "csv", weights=WEIGHTS).startswith(b"path,index,score,weight\na/1.png,0,0.5,1.0\n")
    line = json.loads(format_list(*arguments, "jsonl", weights=WEIGHTS).splitlines()[1])
    assert line == {"path": "b,2.png", "index": 7, "score": 0.25, "weight": 35 / 3}
    assert format_list(*arguments, "txt", weights=WEIGHTS) == format_list(*arguments, "txt")
    for format in ("csv", "jsonl"):
        assert b"weight" not in format_list(*arguments, format)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_weights_come_back_for_any_name(tmp_path, format):
    @example(NASTY)
    @given(paths_of.filter(bool))
    def check(paths):
        weights = 1 / np.arange(1, len(paths) + 1)
        path = tmp_path / f"kept.{format}"
        path.write_bytes(format_list(paths, np.arange(len(paths)), weights, format, weights=weights))
        assert read_weights(path) == dict(zip(paths, weights.tolist(), strict=True))
        path.write_bytes(manifest({"path": [*paths, "gone"], "weight": np.array([*weights, np.nan])}, format))
        assert read_weights(path) == dict(zip(paths, weights.tolist(), strict=True))

    check()


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("l.txt", b"a.png\n", UsageError, "only csv and jsonl lists hold weights"),
        ("l.csv", b"path,index,score\na.png,0,1\n", UsageError, "has no weights; make it with `protoprune select"),
        ("l.jsonl", b'{"path": "a.png"}\n', UsageError, "has no weights"),
        ("l.csv", b"path,weight\na.png,heavy\n", ProtopruneError, "weight of a.png is 'heavy', which is not a number"),
        ("l.csv", b"path,weight\na.png,-1\n", ProtopruneError, r"the weight of a\.png is -1"),
        ("l.csv", b"path,weight\na.png,nan\n", ProtopruneError, r"the weight of a\.png is nan"),
        ("l.csv", b"path,weight\na.png,1\na.png,9\n", ProtopruneError, r"a\.png has two weights, 1 and 9; give each"),
    ],
)
def test_lists_without_weights(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value)


# --- the manifest

COLUMNS = {
    "path": ["a\n1.png", "caf\udce9.png"],
    "class": ["a", ""],
    "score": np.array([0.1, np.nan], np.float32),
    "keep": np.array([1, 0]),
}


def manifest(columns, format="csv") -> bytes:
    n = len(columns["path"])
    return b"".join(manifest_chunks(lambda rows: {name: one[rows] for name, one in columns.items()}, n, format))


def test_manifest_csv_reads_back(tmp_path):
    (tmp_path / "m.csv").write_bytes(manifest(COLUMNS))
    assert read_list(tmp_path / "m.csv") == COLUMNS["path"][:1]  # the one that it keeps
    assert read_list(tmp_path / "m.csv", every=True) == COLUMNS["path"]
    assert manifest(COLUMNS).startswith(b'path,class,score,keep\n"a\n1.png",a,0.1,1\n')
    assert manifest(COLUMNS).endswith(b"caf\xe9.png,,,0\n")


def test_manifest_jsonl_has_null_where_there_is_nothing():
    records = [json.loads(line) for line in manifest(COLUMNS, "jsonl").splitlines()]
    assert records == [
        {"path": "a\n1.png", "class": "a", "score": 0.1, "keep": 1},
        {"path": "caf\udce9.png", "class": None, "score": None, "keep": 0},
    ]


# --- manifests where a list is expected

MANIFEST = {
    "path": ["a/1.png", "a/2.png", "b,c/3.png"],
    "class": ["a", "a", "b,c"],
    "score": np.array([0.5, np.nan, 0.25]),
    "keep": np.array([1, 0, 1]),
    "status": ["ok", "corrupt", "ok"],
    "weight": np.array([1.0, np.nan, 3.5]),
}


@pytest.mark.parametrize("format", ["csv", "jsonl"])
@pytest.mark.parametrize("name", ["all.csv", "all.jsonl", "all.txt", "all", "all.csv.gz"])
def test_a_manifest_is_the_list_of_what_it_keeps(tmp_path, format, name):
    """Whatever its name says, where that is no other format: --manifest all.txt is csv."""
    if {"csv", "jsonl"} & set(name.split(".")) - {format}:
        pytest.skip("another format's name")
    data = manifest(MANIFEST, format)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_list(tmp_path / name) == ["a/1.png", "b,c/3.png"]
    assert read_list(tmp_path / name, every=True) == MANIFEST["path"]
    assert read_weights(tmp_path / name) == {"a/1.png": 1.0, "b,c/3.png": 3.5}


@pytest.mark.parametrize("kept", ["1", "1.0", "true", "TRUE", "yes", " 1"])
@pytest.mark.parametrize("removed", ["0", "0.0", "False", "no"])
def test_spellings_of_keep(tmp_path, kept, removed):
    (tmp_path / "m.csv").write_text(f"path,Keep\na.png,{removed}\nb.png,{kept}\n")
    assert read_list(tmp_path / "m.csv") == ["b.png"]
    (tmp_path / "m.jsonl").write_text('{"path": "a.png", "keep": true}\n{"path": "b.png", "keep": false}\n')
    assert read_list(tmp_path / "m.jsonl") == ["a.png"]


# --- lists that others write

PATHS = ["cat/1.png", "caf\u00e9/2.png", "dog/3.png"]


def encodings(text: str) -> dict[str, bytes]:
    windows = text.replace("\n", "\r\n")
    return {
        "UTF-8": text.encode(), "UTF-8 with a mark": b"\xef\xbb\xbf" + text.encode(), "CRLF": windows.encode(),
        "PowerShell 5": b"\xff\xfe" + windows.encode("utf-16-le"), "big endian": b"\xfe\xff" + text.encode("utf-16-be"),
        "mark and CRLF": b"\xef\xbb\xbf" + windows.encode(), "gzip": gzip.compress(text.encode()),
        "no last line end": windows.encode().removesuffix(b"\r\n"),
    }  # fmt: skip


@pytest.mark.parametrize("encoding", encodings(""))
@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.jsonl", "l"])
def test_encodings(tmp_path, name, encoding):
    text = {
        "l.txt": "\n".join([*PATHS, ""]),
        "l": "\n".join([*PATHS, ""]),
        "l.csv": "\n".join(["path,index", *(f"{path},{i}" for i, path in enumerate(PATHS)), ""]),
        "l.jsonl": "\n".join([*(json.dumps({"path": path}, ensure_ascii=False) for path in PATHS), ""]),
    }[name]
    (tmp_path / name).write_bytes(encodings(text)[encoding])
    assert read_list(tmp_path / name) == PATHS


@pytest.mark.parametrize("header", ["Path", "file", "FileName", "file_name", "Image Path", "filepath"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_headers_and_delimiters(tmp_path, header, delimiter):
    rows = [("label", header), ("x", "a/1.png"), ("y", "b/2.png")]
    (tmp_path / "l.csv").write_text("".join(delimiter.join(row) + "\n" for row in rows))
    assert read_list(tmp_path / "l.csv") == ["a/1.png", "b/2.png"]
    (tmp_path / "l.jsonl").write_text(json.dumps({header: "a/1.png"}) + "\n")
    assert read_list(tmp_path / "l.jsonl") == ["a/1.png"]


def test_export_csv_of_powershell_5(tmp_path):
    (tmp_path / "l.csv").write_bytes(b'#TYPE System.IO.FileInfo\r\n"Path","Length"\r\n"cat\\1.png","3"\r\n')
    assert read_list(tmp_path / "l.csv") == ["cat\\1.png"]


def test_arrays_under_any_name(tmp_path):
    np.save(tmp_path / "l.npy", np.array([3, 1]))
    os.rename(tmp_path / "l.npy", tmp_path / "rows")
    assert read_list(tmp_path / "rows").tolist() == [3, 1]


def test_text_that_only_looks_like_a_table(tmp_path):
    """File names may hold commas, and one may be called path: without a column of ours it is a list of lines."""
    for lines in (["path", "a.png"], ["path,two.png", "b.png"], ["{path}", "c.png"], ["a,score", "b,score"]):
        (tmp_path / "l.txt").write_text("\n".join([*lines, ""]))
        assert read_list(tmp_path / "l.txt") == lines


def test_slashes():
    assert with_slashes(["a\\1.png", "b\\2.png"], set().__contains__) == ["a/1.png", "b/2.png"]
    for entries, known in ((["a\\1.png", "b/2.png"], set()), (["a\\1.png", "c\\d.png"], {"c\\d.png"}), (["a"], set())):
        assert with_slashes(entries, known.__contains__) == entries


@pytest.mark.parametrize("form", ["parquet", "feather", "stream"])
def test_tables_of_data_frames(tmp_path, form):
    """What Polars, DuckDB and pandas write a filtered manifest to, whatever the file is called."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet, feather = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.feather")
    table = pyarrow.table(
        {
            "image_path": ["a/1.png", "b/2.png", "c/3.png"],
            "keep": [1, 0, 1],
            "weight": [1.5, None, 2.0],
            "image": [{"bytes": b"x"}] * 3,
        }
    )
    for name in ("kept", "kept.gz", f"kept.{form}"):
        path = tmp_path / name
        if form == "parquet":
            parquet.write_table(table, path)
        elif form == "feather":
            feather.write_feather(table, str(path))
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        if name == "kept.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        assert read_list(path) == ["a/1.png", "c/3.png"]
        assert read_weights(path) == {"a/1.png": 1.5, "c/3.png": 2.0}
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ProtopruneError, match=rf"kept\.{form}: not a list"):
        read_list(path)


def test_a_stream_of_arrow_without_its_end_is_no_shorter_list(tmp_path):
    """Its writer was killed between two batches; pyarrow reads what is there and says nothing."""
    pyarrow = pytest.importorskip("pyarrow")
    table, ends = pyarrow.table({"path": ["a/1.png", "b/2.png", "c/3.png"]}), []
    path = str(tmp_path / "kept.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(1):
            writer.write_batch(batch)
            ends.append(file.tell())
    assert len(read_list(tmp_path / "kept.arrow")) == 3
    data = (tmp_path / "kept.arrow").read_bytes()
    for end in ends:
        (tmp_path / "kept.arrow").write_bytes(data[:end])
        with pytest.raises(ProtopruneError, match=r"kept\.arrow: .*cut off: it has no end marker"):
            read_list(tmp_path / "kept.arrow")


def test_an_arrow_file_whose_offsets_are_damaged(tmp_path):
    """pyarrow reads beyond its memory, which ended the process, unless it is told to check them; in shards too."""
    pyarrow = pytest.importorskip("pyarrow")
    from protoprune.sources.shard import ShardError
    from protoprune.sources.tables import table_ids

    table = pyarrow.table({"path": ["a/1.png", "b/2.png", "c/3.png", "d/4.png"], "image": [b"x"] * 4})
    offsets = np.arange(0, 35, 7, dtype="<i4")
    for name, new in (("kept.arrow", pyarrow.ipc.new_file), ("kept.stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        data = (tmp_path / name).read_bytes()
        assert data.count(offsets.tobytes()) == 1
        wrong = offsets.copy()
        wrong[2] = 2**30
        (tmp_path / name).write_bytes(data.replace(offsets.tobytes(), wrong.tobytes()))
        with pytest.raises(ProtopruneError, match=rf"{name}: not a list that protoprune wrote"):
            read_list(tmp_path / name)
        with pytest.raises(ShardError):
            table_ids(str(tmp_path / name), "path")


def test_names_that_are_not_utf8_in_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"path": [b"b/\xe9.png"]}), tmp_path / "kept.parquet")
    assert read_list(tmp_path / "kept.parquet") == ["b/\udce9.png"]


def test_arrays_of_one_column_and_pickles(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([[3], [1]]))
    np.save(tmp_path / "names.npy", np.array([["a.png"], ["b.png"]]))
    assert read_list(tmp_path / "rows.npy").tolist() == [3, 1]
    assert read_list(tmp_path / "names.npy").tolist() == ["a.png", "b.png"]
    for protocol in (4, 5):
        (tmp_path / "kept.pkl").write_bytes(pickle.dumps(["a longer name.png", "b.png"], protocol))
        with pytest.raises(UsageError, match=r"kept\.pkl: a pickle, not a list of paths"):
            read_list(tmp_path / "kept.pkl")


def test_a_feature_file_is_no_list(tmp_path, feature_file):
    """Its first bytes are text, so that nothing else would tell."""
    feature_file(tmp_path / "f.h5", np.eye(3))
    data = (tmp_path / "f.h5").read_bytes()
    for call in (lambda: read_list(tmp_path / "f.h5"), lambda: split_list(data, "f.h5")):
        with pytest.raises(UsageError, match=r"f\.h5: a feature file or a training record, not a list of paths"):
            call()


def test_a_header_of_any_length_is_shown_shortened(tmp_path):
    (tmp_path / "long.csv").write_text(",".join(["column" * 50] * 50) + "\n")
    with pytest.raises(ProtopruneError, match="no 'path' column, only columncolumn") as error:
        read_list(tmp_path / "long.csv")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_what_would_not_fit_into_memory_is_not_unpacked(tmp_path, monkeypatch):
    """A thousand times its size may come out of a file: lists and score tables stop at a quarter of free memory."""
    from protoprune import unpacking
    from protoprune.scores import read_table

    whole = b"a/1.png\n" * 50_000
    parts = [gzip.compress(part) for part in (whole, whole[:200_000], whole[200_000:])]
    files = {"one.txt.gz": parts[0], "members.txt.gz": parts[1] + parts[2], "padded.txt.gz": parts[0] + b"\0" * 512}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(unpacking, "free_memory", lambda: 4 * len(whole))
        assert len(read_list(tmp_path / name)) == 50_000
        monkeypatch.setattr(unpacking, "_LEAST_MEMORY", 1)
        for free in (4 * (len(whole) - 1), 1000):
            monkeypatch.setattr(unpacking, "free_memory", lambda free=free: free)
            for read in (read_list, read_table):
                with pytest.raises(ProtopruneError, match=r"unpacks to more than .*, a quarter of the free memory"):
                    read(tmp_path / name)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(whole)[:-9])
    monkeypatch.setattr(unpacking, "free_memory", lambda: None)
    with pytest.raises(ProtopruneError, match=r"a damaged gzip file \(Compressed file ended"):
        read_list(tmp_path / "cut.txt.gz")


@pytest.mark.parametrize(
    ("name", "data", "column"),
    [
        ("s.csv", "path,score\na.png,0.5\nb.png,\n", "score"),
        ("s.jsonl", '{"path": "a.png", "el2n": 0.5}\n{"path": "b.png", "el2n": null}\n', "el2n"),
        ("s.json", '[{"path": "a.png", "el2n": 0.5}, {"path": "b.png", "el2n": 1}]', "el2n"),
        ("kept.csv", "path,index,score\na.png,0,0.5\nb.png,1,0.5\n", ""),
        ("labels.csv", "path,label\na.png,0\nb.png,1\n", ""),
        ("all.csv", "path,score,keep\na.png,0.5,1\nb.png,0.1,1\n", ""),
        ("words.csv", "path,note\na.png,good\nb.png,7\n", ""),
        ("bare.csv", "path,score\na.png,\nb.png,\n", ""),
    ],
)
def test_a_score_table_that_is_given_as_a_list_is_said(tmp_path, recwarn, name, data, column):
    (tmp_path / name).write_text(data)
    assert read_list(tmp_path / name) == ["a.png", "b.png"]
    said = f"has a column {column} and none of a list (keep, index, weight), so that all its 2 rows are taken"
    assert [said in str(one.message) for one in recwarn] == ([True] if column else [])
    recwarn.clear()
    read_list(tmp_path / name, every=True)
    assert not len(recwarn)


def test_lists_come_through_pipes(tmp_path, monkeypatch):
    """`protoprune select | python train.py`, with keep_only(…, "-"), and `train.py --list <(protoprune select …)`."""
    for data in (b"a.png\nb.png\n", b"path,index\na.png,0\nb.png,1\n", gzip.compress(b"a.png\0b.png\0")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read_list("-") == ["a.png", "b.png"]
        end, start = os.pipe()
        os.write(start, data)
        os.close(start)
        assert protoprune.keep_only(["a.png", "b.png", "c.png"], f"/dev/fd/{end}", root=tmp_path) == ["a.png", "b.png"]
        with pytest.raises(UsageError, match=r"a pipe or a device, which can be read only once"):
            read_weights(f"/dev/fd/{end}")
        os.close(end)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="-: standard input is closed; pipe a list into it"):
        read_list("-")


def test_an_open_file_is_no_list_of_paths(tmp_path):
    (tmp_path / "kept.txt").write_text("a.png\n")
    with open(tmp_path / "kept.txt") as file:
        for call in (
            lambda: protoprune.keep_only(["a.png"], file, root=tmp_path),
            lambda: protoprune.list_paths(file, root=tmp_path),
            lambda: protoprune.reshard(file, tmp_path / "out", root=tmp_path),
        ):
            with pytest.raises(UsageError, match=r"an open file, expected a list of paths; .* takes its path"):
                call()
