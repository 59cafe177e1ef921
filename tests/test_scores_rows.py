"""Score tables that do not name their images, that hold several scores, or that are damaged."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
import torch

from protoprune.errors import ProtopruneError, UsageError
from protoprune.scores import read_scores, write_scores

IMAGES = ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]
VALUES = [0.5, -1000.0, 7.0, 2.0]


@pytest.mark.parametrize("name", ["s.npy", "s.npz", "s.csv", "s.txt.gz"])
def test_a_table_without_names_needs_their_order(tmp_path, name):
    """Matched to sorted paths in silence, an array in the data set's own order pruned at random."""
    shuffled, data = [IMAGES[2], IMAGES[0], IMAGES[3], IMAGES[1]], io.BytesIO()
    if name == "s.npy":
        np.save(data, np.array(VALUES))
    elif name == "s.npz":
        np.savez(data, el2n=np.array(VALUES))
    else:
        data.write("".join(f"{value}\n" for value in VALUES).encode())
    (tmp_path / name).write_bytes(gzip.compress(data.getvalue()) if name.endswith(".gz") else data.getvalue())
    with pytest.raises(UsageError, match=r"give --rows FILE .*, or --by-place if .* from cat/a\.png to dog/d\.png"):
        read_scores(tmp_path / name, IMAGES)
    assert read_scores(tmp_path / name, IMAGES, by_place=True).scores.tolist() == VALUES
    (tmp_path / "rows.txt").write_text("\n".join(shuffled) + "\n")
    for rows in (shuffled, tmp_path / "rows.txt", str(tmp_path / "rows.txt")):
        table = read_scores(tmp_path / name, IMAGES, rows=rows)
        assert dict(zip(IMAGES, table.scores, strict=True)) == dict(zip(shuffled, VALUES, strict=True))
        assert (table.matched_by, table.missing) == ("path", 0)
    with pytest.raises(UsageError, match="--rows and --by-place: give the one"):
        read_scores(tmp_path / name, IMAGES, rows=shuffled, by_place=True)


def test_names_for_row_numbers(tmp_path):
    """A pandas Series: rows are numbered in the order of the data set that it was computed on."""
    (tmp_path / "s.csv").write_text(",0\n3,1\n0,2\n1,3\n2,4\n")
    table = read_scores(tmp_path / "s.csv", IMAGES)
    assert table.scores.tolist() == [2, 3, 4, 1]
    assert "warning: matched by row number: 0 is taken as cat/a.png, 3 as dog/d.png" in table.notes()[-1]
    table = read_scores(tmp_path / "s.csv", IMAGES, rows=["./" + path for path in IMAGES[::-1]])
    assert table.scores.tolist() == [1, 4, 3, 2]
    assert "warning" not in "".join(table.notes())


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("1\n2\n3\n4\n", IMAGES[:3], r"3 names for the 4 scores of .*s\.csv"),
        ("1\n2\n3\n4\n", [*IMAGES[:3], IMAGES[0]], "'cat/a.png' occurs twice"),
        ("index,score\n0,1\n4,2\n", IMAGES, "'4' is no row of --rows rows, which has 4 names"),
        ("index,score\n0,1\n-1,2\n", IMAGES, "'-1' is no row of --rows"),
        ("path,score\ncat/a.png,1\n", IMAGES, "names its images itself; --rows goes with a table that does not"),
    ],
)
def test_names_that_do_not_fit(tmp_path, text, rows, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ProtopruneError, match=message):
        read_scores(tmp_path / "s.csv", IMAGES, rows=rows)


def test_by_place_does_not_hide_names(tmp_path):
    (tmp_path / "s.csv").write_text("path,score\ncat/b.png,1\n")
    with pytest.raises(UsageError, match="names its images, and --by-place would not look at them"):
        read_scores(tmp_path / "s.csv", IMAGES, by_place=True)


def test_direction_and_column_after_the_name(tmp_path):
    (tmp_path / "s.csv").write_text("path,el2n,aum\n" + "".join(f"{p},{i},{-i}\n" for i, p in enumerate(IMAGES)))
    with pytest.raises(
        ProtopruneError, match=r"which of its columns path, el2n, aum is the score\? give it as FILE:el2n"
    ):
        read_scores(tmp_path / "s.csv", IMAGES)
    for suffix, scores, direction in (
        (":el2n", [0, 1, 2, 3], "assumed"), (":aum:easier", [0, 1, 2, 3], "given"),
        (":el2n:keep", [0, 1, 2, 3], "given"), (":el2n:prune", [0, -1, -2, -3], "given"),
    ):  # fmt: skip
        table = read_scores(f"{tmp_path}/s.csv{suffix}", IMAGES)
        assert (table.scores.tolist(), table.direction, table.metric) == (scores, direction, suffix.split(":")[1])
    with pytest.raises(ProtopruneError, match=r"has no column 'loss'; its first row is path, el2n, aum"):
        read_scores(f"{tmp_path}/s.csv:loss", IMAGES)
    with pytest.raises(ProtopruneError, match="its column path holds something else than numbers"):
        read_scores(f"{tmp_path}/s.csv:path", IMAGES)
    with pytest.raises(UsageError, match="contradicts --higher-is harder; leave one of them out"):
        read_scores(f"{tmp_path}/s.csv:aum:easier", IMAGES, higher_is="harder")
    with pytest.raises(UsageError, match=r"none\.csv: no such score table"):
        read_scores(f"{tmp_path}/none.csv:easier", IMAGES)
    (tmp_path / "s.csv:easier").write_text("path,score\ncat/a.png,5\n")  # a file of that very name
    assert read_scores(f"{tmp_path}/s.csv:easier", IMAGES).scores[0] == 5


def test_a_header_of_its_own_is_not_contradicted(tmp_path):
    write_scores(tmp_path / "s.csv", IMAGES, np.array(VALUES), metric="el2n")
    assert read_scores(f"{tmp_path}/s.csv:harder", IMAGES).direction == "header"
    with pytest.raises(UsageError, match="its own header says harder"):
        read_scores(f"{tmp_path}/s.csv:easier", IMAGES)


def test_an_array_of_several(tmp_path):
    order = np.argsort(VALUES)
    np.savez(tmp_path / "s.npz", el2n=np.array(VALUES), aum=-np.array(VALUES), label=np.arange(4), logits=np.eye(4))
    np.savez(tmp_path / "named.npz", el2n=np.array(VALUES)[order], aum=np.zeros(4), names=np.array(IMAGES)[order])
    shown = r"el2n \(4,\), aum \(4,\), label \(4,\), logits \(4, 4\); which is the score\? name it: FILE\.npz:el2n"
    with pytest.raises(ProtopruneError, match=shown):
        read_scores(tmp_path / "s.npz", IMAGES, by_place=True)
    assert read_scores(f"{tmp_path}/s.npz:el2n", IMAGES, by_place=True).scores.tolist() == VALUES
    assert read_scores(f"{tmp_path}/s.npz:aum:easier", IMAGES, by_place=True).scores.tolist() == VALUES
    assert read_scores(f"{tmp_path}/named.npz:el2n", IMAGES).scores.tolist() == VALUES
    for array, message in (
        ("loss", "has no array 'loss'; it holds el2n"), ("logits", r"its array logits has shape \(4, 4\), expected"),
    ):  # fmt: skip
        with pytest.raises(ProtopruneError, match=message):
            read_scores(f"{tmp_path}/s.npz:{array}", IMAGES, by_place=True)
    np.savez(tmp_path / "none.npz", names=np.array(IMAGES))
    with pytest.raises(ProtopruneError, match=r"holds no array of scores, only names \(4,\)"):
        read_scores(tmp_path / "none.npz", IMAGES)
    torch.save(torch.tensor(VALUES), tmp_path / "s.pt")  # a zip archive, as workbooks are
    with pytest.raises(
        ProtopruneError, match=r"s.pt: a zip archive without arrays, as Excel and torch.save write them"
    ):
        read_scores(tmp_path / "s.pt", IMAGES)
    np.save(tmp_path / "s.npy", VALUES)
    with pytest.raises(ProtopruneError, match=r"has no array 'el2n': a \.npy file is one array"):
        read_scores(f"{tmp_path}/s.npy:el2n", IMAGES)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_other_formats(tmp_path, kind):
    columns = {"path": IMAGES, "el2n": VALUES, "aum": [-value for value in VALUES]}
    if kind == "jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "s.parquet")
    assert read_scores(f"{tmp_path}/s.{kind}:aum:easier", IMAGES).scores.tolist() == VALUES
    with pytest.raises(ProtopruneError, match="has no column 'loss'"):
        read_scores(f"{tmp_path}/s.{kind}:loss", IMAGES)


@pytest.mark.parametrize("make", ["record", "features"])
def test_our_own_hdf5_files_are_no_tables(tmp_path, make):
    import h5py

    with h5py.File(tmp_path / f"{make}.h5", "w") as file:
        file.attrs["format"] = f"protoprune-{make}"
    with pytest.raises(ProtopruneError, match=rf"{make}\.h5: an HDF5 file, not a score table; `protoprune score"):
        read_scores(tmp_path / f"{make}.h5", IMAGES)


@pytest.mark.parametrize("format", ["npz", "npy", "csv.gz", "jsonl", "parquet"])
def test_a_damaged_table_is_one_line(tmp_path, format):
    """Or is read: a digit changed is a digit. Never a traceback."""
    columns = {"path": np.array(IMAGES), "score": np.array(VALUES)}
    data = io.BytesIO()
    if format == "npz":
        np.savez(data, **columns)
    elif format == "npy":
        np.save(data, columns["score"])
    elif format == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), data)
    else:
        text = "path,score\n" + "".join(f"{p},{v}\n" for p, v in zip(IMAGES, VALUES, strict=True))
        lines = [json.dumps({"path": p, "score": v}) for p, v in zip(IMAGES, VALUES, strict=True)]
        data.write(gzip.compress(text.encode()) if "gz" in format else "\n".join(lines).encode())
    rng, whole, refused = np.random.default_rng(0), data.getvalue(), []
    for _ in range(40):
        bytes_ = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            bytes_[place] = rng.integers(256)
        (tmp_path / f"s.{format}").write_bytes(bytes_[: rng.integers(1, 2 * len(whole))])
        try:
            table = read_scores(tmp_path / f"s.{format}", IMAGES, by_place=format == "npy")
        except ProtopruneError as error:
            refused.append(str(error))
        else:
            assert table.scores.shape == (len(IMAGES),)
            assert not np.isinf(table.scores).any()
    assert len(refused) >= 15
    assert all(f"s.{format}" in said and "\n" not in said for said in refused)
