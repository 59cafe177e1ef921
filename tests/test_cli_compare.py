"""`compare` as a user runs it: the matrix on stdout, the rest on stderr, one line for what is wrong."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from helpers import write_image
from PIL import Image
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.comparison import compare
from protoprune.images.decode import Status
from protoprune.scores import write_scores

N = 60
PATHS = sorted(f"{'xyz'[i % 3]}/{i:03d}.png" for i in range(N))


@pytest.fixture
def run():
    def run(*arguments, code: int = 0):
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder with three tables: b is nearly a, c is a turned round and lacks the first image."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    a = rng.normal(size=N)
    write_scores("a.csv", PATHS, a.astype(np.float32), metric="el2n")
    write_scores("b.csv.gz", [*PATHS, "new.png"], np.append(a + 0.1 * rng.normal(size=N), 0), metric="ddd")
    with open("c.txt", "w") as file:
        file.writelines(f"train/{path} {value}\n" for path, value in zip(PATHS[1:], -a[1:], strict=True))
    return tmp_path


def matrix(lines: list[str]) -> dict[tuple[str, str], float]:
    names = lines[0].split()
    rows = [line.split() for line in lines[1 : 1 + len(names)]]
    return {(row[0], name): float(cell) for row in rows for name, cell in zip(names, row[1:], strict=True)}


def test_the_matrix_is_on_stdout_and_what_did_not_match_on_stderr(here, run):
    result = run("a.csv", "b.csv.gz", "c.txt")
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    found = matrix(lines)
    assert found["a", "c"] == found["c", "a"] == -1
    assert found["a", "a"] == 1
    assert found["a", "b"] > 0.95
    assert "direction from the header: a\n" in result.stderr
    assert "b: metric ddd, direction from its header; 1 table row names no image, first new.png\n" in result.stderr
    assert (
        "c: a higher score is taken as harder, since the table does not say (--higher-is, or FILE:prune); matched by "
        "path, relative" in result.stderr
    )
    assert "c: has no score for 1 of 60 images\n" in result.stderr
    assert "compared: 59 of 60 images, those with a score in all 3 tables\n" in result.stderr
    assert "95 % intervals from 200 bootstrap resamples" in result.stderr


def test_the_direction_of_the_table_that_does_not_say(here, run):
    assert matrix(run("a.csv", "c.txt", "--higher-is", "prune").stdout.splitlines())["a", "c"] == 1
    assert matrix(run("a.csv", "c.txt", "--higher-is", "keep").stdout.splitlines())["a", "c"] == -1


def test_kept_sets_and_files(here, run):
    result = run(
        "a.csv", "b.csv.gz", "c.txt", "--keep", "0.25,0.5", "--keep", "0.5", "-o", "pairs.csv", "--figure", "heat.png",
        "--classes", "classes.csv", "--bootstrap", "20",
    )  # fmt: skip
    blocks = result.stdout.split("\n\n")
    assert len(blocks) == 3
    assert blocks[1].startswith("overlap of the kept sets at 0.25 (random: 0.25)\n")
    assert matrix(blocks[1].splitlines()[1:])["a", "c"] == 0
    assert matrix(blocks[2].splitlines()[1:])["a", "b"] > 0.85
    pairs = list(csv.DictReader((here / "pairs.csv").read_text().splitlines()))
    assert [(row["a"], row["b"]) for row in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(float(row["low"]) <= float(row["spearman"]) <= float(row["high"]) for row in pairs)
    assert (pairs[1]["spearman"], pairs[1]["images"], pairs[1]["overlap_0.25"]) == ("-1.0", "59", "0.0")
    assert (here / "heat.png").read_bytes().startswith(b"\x89PNG")
    classes = list(csv.DictReader((here / "classes.csv").read_text().splitlines()))
    assert len(classes) == 2 * 3 * 3
    assert sum(float(row["share"]) * int(row["images"]) for row in classes[:3]) == pytest.approx(round(0.25 * 59))
    assert "a at 0.25: keeps " in result.stderr
    assert not list(here.glob("*.tmp"))


def test_no_intervals(here, run):
    result = run("a.csv", "b.csv.gz", "--bootstrap", "0", "-o", "pairs.csv")
    assert "intervals" not in result.stderr
    assert "low" not in (here / "pairs.csv").read_text()


def test_ties_are_pointed_out(here, run):
    write_scores("d.csv", PATHS, np.arange(N) % 5 > 0, metric="active-learning")
    result = run("a.csv", "d.csv", "--keep", "0.5")
    assert "d: 30 of the 30 kept at 0.5 share their score with images left out" in result.stderr
    assert "a: 30" not in result.stderr


def test_with_a_feature_file(here, run, feature_file):
    feature_file("features.h5", np.ones((N, 3)), paths=PATHS, failed={5: Status.TRUNCATED})
    np.save("n.npy", np.arange(N))
    result = run("a.csv", "n.npy", "--features", "features.h5", "--keep", "0.5", "--by-place")
    assert "compared: 59 of 59 images" in result.stderr
    assert set(matrix(result.stdout.splitlines()[:3])) == {("a", "a"), ("a", "n"), ("n", "a"), ("n", "n")}
    error = run("a.csv", "n.npy", code=2).stderr
    assert error == (
        "error: n.npy: has row numbers and a.csv has paths; give --features FILE, which knows both, or --rows FILE "
        "with the names\n"
    )


def test_tables_that_need_telling(here, run):
    """An array in an order of its own, one column of several, and one table in which higher means easier."""
    order = np.random.default_rng(1).permutation(N)
    np.savez("n.npz", el2n=np.arange(N)[order], aum=-np.arange(N)[order])
    (here / "rows.txt").write_text("\n".join(PATHS[row] for row in order) + "\n")
    write_scores("up.csv", PATHS, np.arange(N), metric="up")
    (here / "down.csv").write_text("".join(f"{path},{-number}\n" for number, path in enumerate(PATHS)))
    result = run(
        "up.csv", "n.npz:el2n", "n.npz:aum:easier", "down.csv:easier", "--rows", "rows.txt", "--bootstrap", "0"
    )
    cells = [line.split()[-4:] for line in result.stdout.splitlines()[1:]]
    assert cells == [["1.000"] * 4] * 4
    assert "1.000" not in run("up.csv", "down.csv", "--bootstrap", "0").stdout.split()[4:5]
    error = run("up.csv", "n.npz:el2n", "--features", "none.h5", "-o", "n.npz", code=2).stderr
    assert "n.npz: is one of the inputs" in error


def test_a_sheet_of_disagreements(here, run):
    for number, path in enumerate(PATHS):
        write_image(here / "images" / path, seed=number)
    result = run("a.csv", "b.csv.gz", "c.txt", "--root", "images", "--sheet", "sheet.png", "--count", "4")
    assert "sheet.png: the 3 of 3 pairs that agree least" in result.stderr
    assert "could not be read" not in result.stderr
    with Image.open("sheet.png") as picture:
        three = picture.size
    run("a.csv", "c.txt", "--root", "images", "--sheet", "sheet.png", "--count", "4")
    with Image.open("sheet.png") as picture:
        one = picture.size
    assert one[0] == three[0]
    assert one[1] < three[1]
    assert "none of the 8 images of the sheet could be read" in run(
        "a.csv", "c.txt", "--root", "elsewhere", "--sheet", "sheet.png", "--count", "4", code=1
    ).stderr  # fmt: skip
    again = run("a.csv", "b.csv.gz", "--root", "images", "--sheet", "a.csv", code=2)
    assert "is one of the inputs" in again.stderr


def test_a_terminal_gets_a_table(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables = {"a": np.arange(4.0), "[b]": -np.arange(4.0)}  # a name that rich would take for a style
    result = compare(tables, list("pqrs"), keeps=(0.5,), resamples=0)
    sys.modules["protoprune.cli.compare"]._show(result)
    shown = capsys.readouterr().out
    assert shown.count("[b]") == 4
    assert shown.count("-1.000") == 2
    assert "overlap of the kept sets at 0.5 (random: 0.5)" in shown
    assert "│" in shown


def test_a_terminal_that_is_too_narrow_gets_whole_numbers(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables = {f"metric-{i}": np.arange(4.0) for i in range(8)}
    result = compare(tables, list("pqrs"), resamples=0)
    sys.modules["protoprune.cli.compare"]._show(result)
    shown = capsys.readouterr().out
    assert shown.count("1.000") == 64
    assert "│" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a.csv"], 2, "1 score table: expected two or more to compare"),
        (["a.csv", "none.csv"], 2, "none.csv: no such score table"),
        (["a.csv", "."], 2, ".: a folder; give a file that holds the scores"),
        (["a.csv", "/dev/null"], 2, "/dev/null: a pipe or a device, which can be read only once; give a file"),
        (["a.csv", "a.csv"], 2, "a.csv: is given twice"),
        (["a.csv", "c.txt", "--keep", "30"], 2, "--keep 30: expected the fraction to keep"),
        (["a.csv", "c.txt", "--higher-is", "up"], 2, "--higher-is up: expected one of"),
        (["a.csv", "c.txt", "--figure", "heat.gif"], 2, "--figure heat.gif: expected a name that ends in .png"),
        (["a.csv", "c.txt", "--figure", "no/heat.png"], 2, "its folder does not exist"),
        (["a.csv", "c.txt", "-o", "x.csv", "--classes", "x.csv", "--keep", "1"], 2, "is named for two outputs"),
        (["a.csv", "c.txt", "--classes", "x.csv"], 2, "--classes x.csv: goes with --keep"),
        (["a.csv", "c.txt", "--sheet", "x.png"], 2, "--sheet x.png: where are the images? give --features"),
        (["a.csv", "other.csv"], 1, "other.csv: none of its 1 row names an image"),
        (["a.csv", "c.txt", "--features", "none.h5"], 2, "none.h5: no such feature file"),
    ],
)
def test_errors_are_one_line(here, run, arguments, code, message):
    (here / "other.csv").write_text("path,score\nq.png,1\n")
    result = run(*arguments, code=code)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (here / "x.csv").exists()


def test_shares_of_classes_that_there_are_not(here, run):
    for name in ("flat", "flat2"):
        (here / f"{name}.csv").write_text("path,score\np.png,1\nq.png,2\n")
    result = run("flat.csv", "flat2.csv", "--keep", "1", "--classes", "x.csv", code=2)
    assert result.stderr == "error: --classes: the images compared have no classes (no first-level folders)\n"
    assert result.stdout == ""
    assert not (here / "x.csv").exists()


def test_the_widest_interval_is_of_two_tables(here, run):
    for name in ("flat", "flat2"):
        (here / f"{name}.csv").write_text("path,score\np.png,1\nq.png,1\n")
    assert "the widest is 1.000 to 1.000 (flat, flat2)" in run("flat.csv", "flat2.csv", "--bootstrap", "3").stderr


def test_a_table_that_ranks_nothing_is_said(here, run):
    """Its correlations are 0 by agreement, not by measurement."""
    (here / "same.csv").write_text((here / "a.csv").read_text().splitlines()[1] + "\n" + "".join(
        f"{line.partition(',')[0]},0.5\n" for line in (here / "a.csv").read_text().splitlines()[2:]))  # fmt: skip
    said = run("a.csv", "same.csv", "--bootstrap", "0").stderr
    assert "same: warning: all images have the same score, so that it ranks none of them before another\n" in said
    assert "a: warning" not in said
