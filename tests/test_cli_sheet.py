"""`sheet` as a user runs it: which image is where on it, and what is said of the ranking behind it."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
from PIL import Image

from protoprune.images.decode import Status

N, CLASSES = 60, ("ape", "bee", "cat")
PATHS = [f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(N)]
OUTLIERS = {PATHS[i] for i in (4, 17, 33, 41, 48, 58)}


@pytest.fixture
def here(tmp_path, monkeypatch, feature_file):
    """The current folder, with a features.h5 of a tight bunch, two outliers a class, and one that could not be read."""
    monkeypatch.chdir(tmp_path)
    features = np.eye(1, 8) + 0.05 * np.random.default_rng(0).normal(size=(N, 8))
    for row, path in enumerate(PATHS):
        if path in OUTLIERS:
            features[row, 3 + row % 5] += 0.9
    feature_file("features.h5", features, paths=PATHS, failed={0: Status.TRUNCATED})
    return tmp_path


@pytest.fixture
def coloured(here):
    """Every image in one colour that no other has, so that the sheet shows which image is where."""
    for i, path in enumerate(PATHS):
        (here / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (4 * i, 100, 255 - 4 * i)).save(here / "images" / path)
    return here


def cells(file, count: int, rows: int, thumb: int = 96) -> list[list[int]]:
    """The image numbers in each row of a sheet, by the colours in the middle of the cells."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    found = []
    for row in range(rows):
        y = 14 + row * (thumb + 4 + 14) + 14 + thumb // 2
        lefts = [4 + i * (thumb + 4) for i in range(count)]
        lefts += [count * (thumb + 4) + 12 + i * (thumb + 4) for i in range(count)]
        found.append([pixels[y, left + thumb // 2, 0] // 4 for left in lefts])
    return found


def test_sheet_shows_the_easiest_and_the_hardest(coloured, run):
    (coloured / "s.csv").write_text("".join(f"{path},{i}\n" for i, path in enumerate(PATHS)))
    result = run("sheet", "--scores", "s.csv", "--count", "4")
    assert result.stdout == ""
    assert "sheet.png: 1 row of the 4 easiest and the 4 hardest images" in result.stderr
    assert cells("sheet.png", 4, 1) == [[1, 2, 3, 4, 59, 58, 57, 56]]


def test_classes_that_are_not_there_are_said_before_the_clustering(here, run, feature_file):
    feature_file("flat.h5", np.random.default_rng(0).normal(size=(20, 4)))
    said = run("sheet", "flat.h5", "--by", "class", code=2).stderr
    assert said == "error: --by class: the images have no classes (no first-level folders); use --by cluster\n"
    assert not (here / "flat.h5.clusters").exists()


def test_sheet_has_a_row_for_each_class(coloured, run):
    run("sheet", "--k", "1", "--by", "class", "--count", "3", "-o", "s.png")
    shown = cells("s.png", 3, 3)
    assert [{number % 3 for number in row} for row in shown] == [{0}, {1}, {2}]
    outliers = {PATHS.index(path) for path in OUTLIERS}
    assert all(set(row[3:5]) <= outliers for row in shown)
    assert "showing 2 of 3 rows" in run("sheet", "--k", "1", "--by", "class", "--max-rows", "2").stderr


def test_sheet_has_a_row_for_each_cluster(coloured, run):
    run("select", "--k", "3", "--keep", "1", "--manifest", "m.csv")
    with open("m.csv") as file:
        rows = {PATHS.index(row["path"]): row for row in csv.DictReader(file)}
    sizes = np.bincount([int(row["cluster"]) for row in rows.values() if row["status"] == "ok"])
    count = 3
    run("sheet", "--k", "3", "--by", "cluster", "--count", count, "-o", "s.png")
    assert max(sizes) >= 2 * count
    for cluster, shown in enumerate(cells("s.png", count, 3)):
        if sizes[cluster] < 2 * count:
            continue  # then the row is shorter
        assert {int(rows[number]["cluster"]) for number in shown} == {cluster}
        distance = [float(rows[number]["distance"]) for number in shown]
        assert distance[:count] == sorted(distance[:count])
        assert distance[count:] == sorted(distance[count:], reverse=True)
        assert distance[count - 1] <= distance[-1]


def test_sheet_warns_of_images_that_are_gone(coloured, run):
    assert "any more" not in run("sheet", "--k", "3", "--count", "2").stderr
    before = (coloured / "sheet.png").read_bytes()
    os.rename(coloured / "images", coloured / "moved")
    where = f"--root says where they are now, if not below {coloured / 'images'}\n"
    result = run("sheet", "--k", "3", "--count", "2", code=1)  # and nothing takes the place of a good sheet
    assert "error: none of the 4 images of the sheet could be read any more, or they changed" in result.stderr
    assert result.stderr.endswith(where)
    assert (coloured / "sheet.png").read_bytes() == before
    easiest = PATHS[cells("sheet.png", 2, 1)[0][0]]
    (coloured / "images" / easiest).parent.mkdir(parents=True)
    os.rename(coloured / "moved" / easiest, coloured / "images" / easiest)
    assert (
        f"warning: 3 images could not be read any more, or changed since; {where}"
        in run("sheet", "--k", "3", "--count", "2").stderr
    )
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (2 * 100 + 12 + 2 * 100 + 4, 14 + 114 + 4)


def test_sheet_errors(here, run):
    assert "--by colour: expected none, class or cluster" in run("sheet", "--by", "colour", code=2).stderr
    assert "no such feature file" in run("sheet", "nowhere.h5", code=2).stderr
    assert "its folder does not exist" in run("sheet", "--k", "3", "-o", "nowhere/s.png", code=2).stderr


def test_sheet_says_how_it_read_the_table(coloured, run):
    lines = [f"{path},{-i}\n" for i, path in enumerate(PATHS)]
    (coloured / "s.csv").write_text("".join(lines[:-2]) + "x.png,1\n")
    said = run("sheet", "--scores", "s.csv", "--count", "2").stderr
    assert "a higher score is taken as harder, since the table does not say (--higher-is, or FILE:prune)" in said
    assert "57 images have one; 2 have none and are not kept" in said
    assert "1 table row names no image, first x.png" in said
    assert "direction as given" in run("sheet", "--scores", "s.csv", "--higher-is", "easier").stderr
    assert cells("sheet.png", 8, 1)[0][:2] == [1, 2]
    assert "direction as given" in run("sheet", "--scores", "s.csv:easier").stderr
    assert cells("sheet.png", 8, 1)[0][:2] == [1, 2]
    assert "--higher-is easier: goes with --scores" in run("sheet", "--higher-is", "easier", code=2).stderr
    assert "is one of the inputs" in run("sheet", "--scores", "s.csv:easier", "-o", "s.csv", code=2).stderr


def test_sheet_of_duplicates_shows_what_dedup_removes(tmp_path, monkeypatch, feature_file, run):
    """Directions 8 degrees apart, with two planted groups: 1 - cos of half a degree is 4e-5, of one degree 1.5e-4."""
    monkeypatch.chdir(tmp_path)
    angle = np.deg2rad(8 * np.arange(10.0))
    angle[3], angle[4] = angle[2] + np.deg2rad(0.5), angle[2] + np.deg2rad(1)
    angle[8] = angle[7] + np.deg2rad(1)
    feature_file("features.h5", np.stack([np.cos(angle), np.sin(angle)], axis=1), paths=[f"{i}.png" for i in range(10)])
    for i in range(10):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (4 * i, 100, 255)).save(tmp_path / "images" / f"{i}.png")
    result = run("sheet", "--k", "1", "--duplicates", "0.001", "--count", "3")
    assert "duplicates: 3 images would be removed by `select --dedup 0.001`" in result.stderr
    said = run("select", "--k", "1", "--keep", "1", "--dedup", "0.001", "--manifest", "m.csv").stderr
    assert "3 of 10 images removed" in said
    with open("m.csv") as file:
        gone = {(row["duplicate_of"], row["path"]) for row in csv.DictReader(file) if row["duplicate_of"]}
    pixels = np.asarray(Image.open("sheet.png").convert("RGB")).astype(int)
    shown = set()
    for top in (28, 28 + 114):
        stays = pixels[top + 48, 52, 0] // 4
        for column in range(2):
            left = 4 + 112 + 100 * column - 4
            if pixels[top + 48, left + 48].tolist() != [255, 255, 255]:
                shown.add((f"{stays}.png", f"{pixels[top + 48, left + 48, 0] // 4}.png"))
    assert shown == gone
    assert "not written, no two images are that alike" in run("sheet", "--k", "1", "--duplicates", "0.00001").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--duplicates", "2"], "--duplicates 2: expected 1 - cosine"),
        (["--duplicates", "0.1", "--by", "class"], "--duplicates 0.1: groups images by likeness"),
        (["--duplicates", "0.1", "--scores", "s.csv"], "--duplicates 0.1: groups images by likeness"),
        (["--duplicates", "0.1", "--restarts", "3"], "--restarts 3: ranks by several clusterings, and near-"),
    ],
)
def test_sheet_of_duplicates_refuses(here, run, options, message):
    assert message in run("sheet", *options, code=2).stderr
    assert not (here / "sheet.png").exists()


def test_a_sheet_is_never_written_over_an_image(coloured, run):
    before = (coloured / "images" / PATHS[5]).read_bytes()
    os.symlink(coloured / "images" / PATHS[5], coloured / "link.png")
    for name in (f"images/{PATHS[5]}", "link.png"):
        assert "is one of the images" in run("sheet", "--k", "3", "-o", name, code=2).stderr
    assert (coloured / "images" / PATHS[5]).read_bytes() == before
    assert "lies in the folder of the images" in run("sheet", "--k", "3", "-o", "images/sheet.png").stderr
