"""Names that hold whatever a file name can: no command breaks a line by them, and every list gives them back."""

from __future__ import annotations

import csv
import os
import re

import numpy as np
import pytest
from helpers import write_image
from typer.testing import CliRunner

from protoprune import lists
from protoprune.cli import app
from protoprune.cli.progress import printable
from protoprune.files import write_links
from protoprune.images.decode import Status
from protoprune.lists import read_list
from protoprune.scores import read_scores

CLASSES = ("cl\nass", "tab\t,\udcff")
ODD = (
    "a\nb", "tab\there", "\x1b[31mred", "caf\udce9", "é", 'quo"te', "com,ma", "back\\slash", "<b>&amp;", " blank ",
    "cr\rx", "end\r", "\u2028", "\x85", "\x07", "\u202eabc", "-0", "#c", "[b]x[/b]", ";", "=1+1", "{}%s", "$(x)`y`",
)  # fmt: skip
PATHS = sorted((f"{name}/{odd}.png" for name in CLASSES for odd in ODD), key=os.fsencode)
BROKEN = [2, 3, 30]  # rows
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\udc80-\udcff]")


@pytest.fixture
def here(tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(len(PATHS), 4))
    for name in ("f.h5", "t.h5"):
        feature_file(name, vectors, paths=PATHS, failed=dict.fromkeys(BROKEN, Status.CORRUPT))
    return tmp_path


def run(line: str, code: int = 0):
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == code, result.output
    assert not CONTROL.search(result.stderr)
    return result


def test_what_is_shown_does_nothing_to_a_terminal():
    assert printable("a\nb\t\x1b[31m\x85\u2028\u202e\udce9é\\") == "a\\nb\\t\\x1b[31m\\x85\\u2028\\u202e\\udce9é\\"


def test_errors_are_fields_that_a_program_can_take_apart(here):
    rows = [line.split("\t") for line in run("info f.h5 --errors").stdout.splitlines()]
    given = [cell.encode("latin-1", "backslashreplace").decode("unicode_escape") for cell, _, _ in rows]
    assert given == [PATHS[row] for row in BROKEN]
    assert {(status, reason) for _, status, reason in rows} == {("corrupt", "made up corrupt")}


@pytest.mark.parametrize("name", ["k.csv", "k.jsonl", "k.csv.gz"])
def test_lists_give_names_back(here, name):
    run(f"select f.h5 --keep 1 -o {name} --removed gone.jsonl --manifest all.csv")
    usable = [path for row, path in enumerate(PATHS) if row not in BROKEN]
    assert read_list(name) == usable
    rows = list(csv.DictReader((here / "all.csv").open(newline="", errors="surrogateescape")))
    assert [row["path"] for row in rows] == PATHS
    assert {row["class"] for row in rows} == set(CLASSES)
    assert read_list("all.csv") == usable


def test_lines_that_names_would_break_are_refused(here):
    result = run("select f.h5 --keep 1 -o k.txt", 2)
    assert re.search(
        r"error: \d+ file names hold a line break .*; name the file .jsonl, or use -0 or --format jsonl", result.stderr
    )
    assert not (here / "k.txt").exists()
    result = CliRunner().invoke(app, ["select", "f.h5", "--keep", "1", "-0"])
    assert result.stdout_bytes.split(b"\0")[:-1] == [os.fsencode(p) for r, p in enumerate(PATHS) if r not in BROKEN]


@pytest.mark.parametrize(
    "line",
    [
        "info f.h5",
        "sheet f.h5 -o s.png --by class",
        "report f.h5 -o r.html",
        "score random --features f.h5 -o s.csv",
        "record f.h5 -o r.h5 --epochs 1",
        "merge f.h5 -o m.h5",
        "reshard gone.txt tars --features f.h5",
    ],
)
def test_no_command_breaks_a_line(here, line):
    (here / "gone.txt").write_bytes(os.fsencode(PATHS[0]) + b"\0")
    for path in PATHS[:4]:
        write_image(here / "images" / path, seed=1)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == (2 if line.startswith("merge") else 0), result.output
    assert not CONTROL.search(result.stdout + result.stderr)
    if line.startswith("report"):  # the command on the page makes a list that can be made
        assert " -o kept.jsonl" in (here / "r.html").read_text()
        assert 'kept.txt"]' not in (here / "r.html").read_text()
    if line.startswith("score"):
        assert np.flatnonzero(np.isnan(read_scores("s.csv", PATHS).scores)).tolist() == BROKEN


def test_evaluate_and_compare(here):
    run("score random --features f.h5 --seed 0 -o a.csv")
    run("score random --features f.h5 --seed 1 -o b.csv")
    result = run("compare a.csv b.csv --features f.h5 --keep 0.5 --classes c.csv --bootstrap 0")
    assert not CONTROL.search(result.stdout)
    assert "keeps" in result.stderr
    rows = list(csv.DictReader((here / "c.csv").open(newline="", errors="surrogateescape")))
    assert {row["class"] for row in rows} == set(CLASSES)
    run("select f.h5 --keep 0.5 -o kept.csv")
    result = run("evaluate kept.csv --features f.h5 --test t.h5 --seeds 2 --no-class-counts -o results")
    assert not CONTROL.search(result.stdout)
    rows = list(csv.DictReader((here / "results/classes.csv").open(newline="", errors="surrogateescape")))
    assert {row["class"] for row in rows} == set(CLASSES)


def test_a_folder_of_links_has_no_list_of_classes_that_lines_cannot_hold(tmp_path):
    write_image(tmp_path / "images" / PATHS[0], seed=1)
    with pytest.warns(UserWarning, match=r"no classes.txt, since 1 class name holds a line break"):
        write_links(tmp_path / "kept", str(tmp_path / "images"), [PATHS[0]], folders=CLASSES, classes=CLASSES)
    assert (tmp_path / "kept" / PATHS[0]).is_symlink()
    assert not (tmp_path / "kept" / "classes.txt").exists()


def test_tune_writes_what_can_hold_the_names():
    from protoprune.cli.tune import _list_format

    class Source:
        paths, n = PATHS, len(PATHS)

    assert _list_format(Source) == "jsonl"
    Source.paths, Source.n = ["a/1.png"], 1
    assert _list_format(Source) == "txt"
    assert lists.list_format("tune/kept.jsonl") == "jsonl"
