"""No command writes over its inputs, over its other outputs, or over something better; pipes and links stay."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from helpers import encoded, picture
from typer.testing import CliRunner

from protoprune import files
from protoprune.cli import app
from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import same_file, write_file
from protoprune.lists import read_list
from protoprune.scores import write_scores

PATHS = [f"{name}/{i}.png" for name in ("ape", "bee") for i in range(6)]
THEORY = ["theory", "error", "--alpha-tot", "3", "--keep", "0.5", "--order", "hard"]


@pytest.fixture
def here(tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    feature_file("f.h5", np.random.default_rng(0).normal(size=(12, 4)), paths=PATHS)
    feature_file("other.h5", np.random.default_rng(1).normal(size=(12, 4)), paths=PATHS)
    for name in ("s", "t"):
        write_scores(f"{name}.csv", PATHS, np.arange(12.0), metric="el2n")
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(), "JPEG"))
    (tmp_path / "list.txt").write_text("ape/0.png\n")
    (tmp_path / "hard.csv").hardlink_to("s.csv")
    (tmp_path / "soft.csv").symlink_to("s.csv")
    return tmp_path


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("select f.h5 --keep 0.5 -o a.csv --manifest a.csv", "a.csv: is named for two outputs"),
        ("select f.h5 --keep 0.5 -o a.csv --manifest ./a.csv", "is named for two outputs"),
        ("select f.h5 --keep 0.5 -o a.csv --removed A.CSV", "is named for two outputs"),
        ("select f.h5 --keep 0.5 -o f.h5", "f.h5: is one of the inputs"),
        ("select f.h5 --keep 0.5 --scores s.csv -o hard.csv", "hard.csv: is one of the inputs"),
        ("select f.h5 --keep 0.5 --scores s.csv --removed soft.csv", "soft.csv: is one of the inputs"),
        ("select f.h5 --keep 0.5 -o other.h5", "other.h5: is a feature file"),
        ("select f.h5 --keep 0.5 -o photo.jpg", "photo.jpg: is an image"),
        ("select f.h5 --keep 0.5 --links kept -o kept", "kept: is named for two outputs"),
        ("select f.h5 --keep 0.5 --links empty -o empty/list.txt", "lies in the folder that --links makes"),
        ("score self_supervised_prototypes --features f.h5 -o f.h5", "written as .csv"),
        ("score self_supervised_prototypes --features f.h5 -o photo.jpg", "photo.jpg: is an image"),
        ("sheet f.h5 -o f.h5", "f.h5: is one of the inputs"),
        ("sheet f.h5 -o other.h5", "other.h5: is a feature file"),
        ("sheet f.h5 --scores s.csv -o soft.csv", "soft.csv: is one of the inputs"),
        ("compare s.csv t.csv -o hard.csv", "hard.csv: is one of the inputs"),
        ("compare s.csv t.csv -o a.csv --figure b.png --sheet b.png --root .", "b.png: is named for two outputs"),
        ("compare s.csv t.csv -o other.h5", "other.h5: is a feature file"),
        ("embed list.txt -o new.h5 --errors list.txt", "list.txt: is one of the inputs"),
        ("embed list.txt -o list.txt", "list.txt: is one of the inputs"),
        ("embed list.txt -o new.h5 --errors new.h5.partial", "is named for two outputs"),
        ("embed list.txt -o new.h5 --errors other.h5", "other.h5: is a feature file"),
        ("record f.h5 -o f.h5", "f.h5: is one of the inputs"),
        ("record f.h5 --pixels p -o p.training", "is named for two outputs"),
        ("evaluate list.txt --features f.h5 --test other.h5 -o list.txt", "-o list.txt: a file; name a folder"),
        ("evaluate pays/results.csv --features f.h5 --test other.h5 -o pays", "results.csv: is one of the inputs"),
        ("scaling --features f.h5 --test other.h5 --size 4 --scores pays/points.csv -o pays", "is one of the inputs"),
        ("evaluate list.txt --images images --test images --pixels p", "p.training: is a feature file"),
        ("scaling --images images --test images --order random --size 4 --pixels p", "p.training: is a feature file"),
        ("tune --features f.h5 --keep 0.5 --model cnn --images images --pixels p", "p.training: is a feature file"),
        (" ".join([*THEORY, "--csv", "rows.csv", "--plot", "other.png"]), "other.png: is a feature file"),
        (" ".join([*THEORY, "--csv", "photo.jpg"]), "photo.jpg: is an image"),
    ],
)  # fmt: skip
def test_nothing_is_written_over(here, line, message):
    (here / "empty").mkdir()
    (here / "pays").mkdir()
    for name in ("results", "points"):
        (here / "pays" / f"{name}.csv").write_text("path,score\n" + "".join(f"{path},1\n" for path in PATHS))
    os.link("other.h5", "other.png")
    if line.endswith("--pixels p"):
        os.link("other.h5", "p.training")
    before = contents(here)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents(here) == before


@pytest.mark.parametrize("line", [
    "select f.h5 --keep 0.5 --manifest -", "select f.h5 --keep 0.5 --removed -", "select f.h5 --keep 0.5 --links -",
    "compare s.csv t.csv -o -", "compare s.csv t.csv --features f.h5 --keep 0.5 --classes -", "sheet f.h5 -o -",
    "embed list.txt -o -", "embed list.txt -o new.h5 --errors -", "record f.h5 -o -", "import v.npy -o -",
])  # fmt: skip
def test_no_file_is_called_as_stdout_is(here, line):
    np.save("v.npy", np.ones((3, 2)))
    before = contents(here)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2
    assert "error: -: this goes into a file, not to stdout; name one" in result.stderr
    assert contents(here) == before


@pytest.mark.parametrize("line", [
    "select f.h5 --keep 0.5 -o new.txt.gz", "select f.h5 --keep 0.5 -o a --manifest new.csv.gz",
    "select f.h5 --keep 0.5 -o a --removed new.jsonl.gz", "score random --features f.h5 -o new.csv.gz",
    "compare s.csv t.csv --bootstrap 0 -o new.csv.gz",
    "compare s.csv t.csv --bootstrap 0 --features f.h5 --keep 0.5 --classes new.csv.gz",
    "embed images --encoder mini --device cpu -o new.h5 --errors new.csv.gz",
    "embed shards.tar --encoder mini --device cpu -o newset --errors new.csv.gz",
    " ".join([*THEORY, "--csv", "new.csv.gz"]),
])  # fmt: skip
def test_tables_whose_names_end_so_go_through_gzip(here, line):
    (here / "images").mkdir()
    (here / "images" / "a.jpg").write_bytes((here / "photo.jpg").read_bytes())
    with tarfile.open("shards.tar", "w") as tar:
        tar.add("photo.jpg")
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    name = next(here.glob("new*.gz"))
    packed = gzip.decompress(name.read_bytes())
    plain = CliRunner().invoke(app, line.replace(".gz", "").replace("newset", "otherset").split())
    assert plain.exit_code == 0, plain.output
    assert packed == (here / name.stem).read_bytes()


@pytest.mark.parametrize("line", [
    "sheet f.h5 -o new.png.gz", "report f.h5 -o new.html.gz", "embed images -o new.h5 --errors new.json",
    "embed images -o new.csv", "record f.h5 -o new.csv", "import v.npy -o new.npz", "embed images -o new.h5.gz",
    "score random --features f.h5 -o new.csv.bz2", "select f.h5 --keep 0.5 -o new.txt.xz",
    "compare s.csv t.csv -o new.feather",
])  # fmt: skip
def test_what_is_no_table_does_not(here, line):
    (here / "images").mkdir()
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2
    assert "give it a name that ends so" in result.stderr


def test_results_in_the_folder_of_images_are_refused(here, image_tree):
    image_tree()
    for out in ("images", "images/pays"):
        line = f"evaluate list.txt --images images --test images --model cnn -o {out}"
        result = CliRunner().invoke(app, line.split())
        assert "a folder of images, whose figure it would become one of" in result.stderr
    assert not (here / "images/pays").exists()


@pytest.mark.parametrize(
    "line",
    [
        "evaluate list.txt --features g.h5 --test g.h5 -o images",
        "evaluate list.txt --features g.h5 --test g.h5 -o images/ape",
        "scaling --features g.h5 --test g.h5 --size 4 -o images/bee", "tune --features g.h5 --keep 0.5 -o images/ape",
        "tune --features g.h5 --keep 0.5 -o images", "sheet g.h5 --k 1 -o images/ape/sheet.png",
        "select g.h5 --keep 0.5 --k 1 --links images/ape/kept",
        "select g.h5 --keep 0.5 --scores s.csv --links images/ape/kept",
        "compare s.csv t.csv --features g.h5 --bootstrap 0 --figure images/bee/matrix.png",
        "compare s.csv t.csv --features g.h5 --bootstrap 0 --sheet images/bee/sheet.png",
    ],
)  # fmt: skip
def test_nothing_is_written_among_the_images_of_a_feature_file(here, line, image_tree, feature_file):
    """What `embed` and training would find there the next time."""
    image_tree({"ape": 6, "bee": 6})
    paths = [f"{name}/{i:03d}.png" for name in ("ape", "bee") for i in range(6)]
    feature_file("g.h5", np.random.default_rng(0).normal(size=(12, 4)), paths=paths, root=here / "images")
    for name in ("s", "t"):
        write_scores(f"{name}.csv", paths, np.arange(12.0), metric="el2n")
    (here / "list.txt").write_text("ape/000.png\nbee/000.png\n")
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2, result.output
    (error,) = (one for one in result.stderr.splitlines() if one.startswith("error:"))
    assert "among the images" in error or "is the folder of the images" in error
    assert sorted(path.relative_to(here / "images").as_posix() for path in (here / "images").rglob("*.*")) == paths


def test_results_beside_the_folder_of_the_images_are_fine(here, image_tree, feature_file):
    """And below it too, where no image lies: a list's root is often the folder that one works in."""
    image_tree({"ape": 6, "bee": 6})
    paths = [f"images/{name}/{i:03d}.png" for name in ("ape", "bee") for i in range(6)]
    feature_file("g.h5", np.random.default_rng(0).normal(size=(12, 4)), paths=paths, root=here)
    for line in ("sheet g.h5 --k 1", "select g.h5 --keep 0.5 --k 1 --links kept -o kept.txt"):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
    assert len(list((here / "kept").rglob("*.png"))) == 6


def test_stdout_that_is_redirected_to_an_output(here):
    command = [
        sys.executable,
        "-m",
        "protoprune",
        "select",
        "f.h5",
        "--keep",
        "0.5",
        "--k",
        "1",
        "--manifest",
        "kept.csv",
    ]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(files.__file__))}
    with open("kept.csv", "wb") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert result.returncode == 2
    assert b"kept.csv: is named for two outputs" in result.stderr


def test_lists_go_into_devices_twice(here):
    """/dev/null can take two outputs: nothing is replaced there."""
    line = "select f.h5 --keep 0.5 --k 1 -o /dev/null --removed /dev/null --manifest /dev/null"
    assert CliRunner().invoke(app, line.split()).exit_code == 0


def test_a_second_comparison_of_all_tables_finds_its_own_result(here):
    line = [
        "compare",
        *sorted(map(str, here.glob("?.csv"))),
        "-o",
        "pairs.csv",
        "--keep",
        "0.5",
        "--classes",
        "shares.csv",
    ]
    first = CliRunner().invoke(app, line)
    assert first.exit_code == 0, first.output
    pairs = (here / "pairs.csv").read_bytes()
    again = CliRunner().invoke(app, [*line, "pairs.csv", "shares.csv"])
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "pairs.csv: left out, it is what `protoprune compare` wrote and no score table" in again.stderr
    assert "shares.csv: left out" in again.stderr
    assert (here / "pairs.csv").read_bytes() == pairs


# --- the writers of the Python API


@pytest.mark.parametrize("name", ["f.h5", "photo.jpg"])
def test_writers_never_put_a_table_over_something_better(here, name):
    before = (here / name).read_bytes()
    (here / "linked").symlink_to(name)
    with pytest.raises(ProtopruneError, match="not written over; choose another name, or delete it first"):
        write_file(name, b"path,score\n")
    with pytest.raises(ProtopruneError, match="not written over"):
        write_scores("linked", PATHS, np.zeros(12), metric="x")
    assert (here / name).read_bytes() == before


def test_pictures_replace_pictures_and_lists_lists(here):
    for data in (encoded(picture(), "PNG"), encoded(picture(seed=1), "PNG")):
        write_file("p.png", data)
        assert (here / "p.png").read_bytes() == data
    for data in (b"BMW/1.jpg\n", b"BMW/2.jpg\n"):  # which is how a BMP begins
        write_file("cars.txt", data)
    assert read_list("cars.txt") == ["BMW/2.jpg"]


def test_one_file_by_two_names(here):
    (here / "dangling.csv").symlink_to("later.csv")
    (here / "here").symlink_to(".")
    for a, b in [("s.csv", "hard.csv"), ("s.csv", "soft.csv"), ("new.csv", "./new.csv"), ("new.csv", "NEW.csv"),
                 ("dangling.csv", "later.csv"), ("new.csv", "here/new.csv"), ("caf\u00e9", "cafe\u0301")]:  # fmt: skip
        assert same_file(a, b), (a, b)
        assert same_file(b, a)
    for a, b in [("s.csv", "t.csv"), ("s.csv", "S.csv"), ("new.csv", "nowhere/new.csv"), ("a/new.csv", "b/new.csv")]:
        assert not same_file(a, b), (a, b)


@pytest.mark.parametrize(
    "command",
    [
        "select f.h5 --keep 0.5 -o {}",
        "select f.h5 --keep 0.5 --links {}",
        "select f.h5 --keep 0.5 --manifest {}",
        "sheet f.h5 -o {}.png",
        "report f.h5 -o {}.html",
        "score random --features f.h5 -o {}.csv",
        "compare s.csv t.csv -o {}.csv",
        "record f.h5 -o {}.h5",
        "import v.npy --paths list.txt -o {}.h5",
        "tune --features f.h5 --keep 0.5 -o {}",
        "evaluate list.txt --features f.h5 --test other.h5 -o {}",
        "scaling --features f.h5 --test other.h5 --size 5 -o {}",
        "reshard list.txt {} --root .",
        "theory error --alpha-tot 3 --keep 0.5 --order hard --csv {}.csv",
    ],
)
def test_a_url_is_no_folder_of_this_machine(here, command):
    """`pathlib` makes s3:/bucket/x of it, and a folder called `s3:` may be there from before."""
    np.save(here / "v.npy", np.ones((1, 4)))
    (here / "s3:").mkdir()
    before = sorted(here.rglob("*"))
    result = CliRunner().invoke(app, command.format("s3://user:secret@bucket/x").split())
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert "s3://bucket/x" in last
    assert "only feature sets of shards are written to a URL; write to this machine, and copy it" in last
    assert sorted(here.rglob("*")) == before


def test_a_url_is_no_folder_in_python_either(here):
    from protoprune.shards.resharding import reshard

    url, said = "s3://bucket/x", "only feature sets of shards are written to a URL"
    calls = [
        lambda: write_scores(f"{url}.csv", PATHS, np.arange(12.0), metric="el2n"),
        lambda: files.write_links(url, str(here), PATHS),
        lambda: reshard("list.txt", url, root=here),
        lambda: files.make_folder(url),
        lambda: files.lock(url).__enter__(),
    ]
    with pytest.raises(UsageError, match="file:///tmp/x: give the path itself, /tmp/x"):
        reshard("list.txt", "file:///tmp/x", root=here)
    for call in calls:
        with pytest.raises(UsageError, match=said):
            call()
    assert not (here / "s3:").exists()
