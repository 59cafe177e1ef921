"""`tune` as a user runs it: answer and command on stdout, the list that the command makes, resuming, refusals."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_features
from helpers import write_image
from shard_helpers import image_folder, members, write_tars
from typer.testing import CliRunner

import protoprune
from protoprune.cli import app
from protoprune.cli.options import TrainingOptions
from protoprune.cli.tune import _networks, _pool
from protoprune.errors import UsageError
from protoprune.features.opening import open_features
from protoprune.images.decode import Status
from protoprune.tuning import halving, running
from protoprune.tuning.recipes import Candidate

CLASSES = ("ape", "bee", "cat")
PATHS = sorted(f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(150))
FEW = [Candidate("cover", by="class"), Candidate("easy", k=6)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the feature files of `here`, and in a folder of its own those that do not go."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "odd").mkdir()
    rng = np.random.default_rng(0)
    labels = np.array([CLASSES.index(path[:3]) for path in PATHS])

    def write(name, features, **options):
        write_features(folder / name, features, root=folder / "images", **options)

    for name in ("features.h5", "test.h5"):
        write(name, 1.2 * np.eye(3, 6)[labels] + rng.normal(size=(150, 6)), paths=PATHS)
    write("odd/wide.h5", np.ones((150, 9)), paths=PATHS)
    write("odd/plain.h5", np.ones((80, 5)))
    write("odd/other.h5", np.ones((150, 6)), paths=PATHS, made_by={"encoder": "another"})
    write("odd/nan.h5", np.where(np.arange(150)[:, None] == 1, np.nan, 1), paths=PATHS)
    write("odd/plain-nan.h5", np.where(np.arange(80)[:, None] == 4, np.nan, np.ones(5)))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, inputs, quick_heads):
    """features.h5 of three overlapping classes, test.h5 of the same, and only two recipes on two splits to try."""
    monkeypatch.chdir(tmp_path)
    for name in ("features.h5", "test.h5"):
        shutil.copy(inputs / name, name)
    monkeypatch.setattr(running, "candidates", lambda images, classes, tables: [
        *FEW, *(Candidate("hard", scores=table) for table in tables)])  # fmt: skip
    tune = running.tune.__wrapped__  # by what checks its arguments
    monkeypatch.setattr(tune, "__kwdefaults__", {**tune.__kwdefaults__, "rounds": (1, 2)})
    monkeypatch.setattr(running, "AUTO_SPLITS", 3)
    monkeypatch.setattr(running, "FRACTIONS", (0.9, 0.5))
    return tmp_path


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_answer_the_command_and_the_list(here):
    result = run("tune", "--keep", 0.3, "--seeds", 3)
    answer, command = result.stdout.splitlines()
    assert answer.startswith("keep 30%: ")
    assert "features.h5: 150 images of 3 classes" in result.stderr
    assert "judged on 30 images that chose nothing, 3 random lists: " in result.stderr
    kept = (here / "tune" / "kept.txt").read_text()
    assert len(kept.splitlines()) == 45
    (here / "tune" / "kept.txt").unlink()
    run(*shlex.split(command)[1:])
    assert (here / "tune" / "kept.txt").read_text() == kept
    content = json.loads((here / "tune" / "results.json").read_text())
    assert (content["answer"], content["command"]) == (answer, command)
    trained = (here / "tune" / "runs.jsonl").read_bytes()
    again = run("tune", "--keep", 0.3, "--seeds", 3)
    assert again.stdout == result.stdout
    assert (here / "tune" / "runs.jsonl").read_bytes() == trained
    other = run("tune", "--keep", 0.3, "--seeds", 2, "--seed", 5, "-o", "other")
    assert " --seed 5" in other.stdout


def test_a_test_set_a_table_and_auto(here):
    (here / "t.csv").write_text("".join(f"{path},{i}\n" for i, path in enumerate(PATHS)))
    result = run("tune", "--keep", "auto", "--tolerance", 100, "--test", "test.h5", "--seeds", 2, "--scores", "t.csv",
                 "--higher-is", "harder")  # fmt: skip
    assert result.stdout.startswith("you can leave out ")
    assert "judging" in result.stderr
    assert "on 150 images that chose nothing" in result.stderr
    assert "hard, by t.csv" in (here / "tune" / "table.csv").read_text()
    curve = (here / "tune" / "curve.csv").read_text().splitlines()
    assert len(curve) == 5  # both fractions cost less than 100 points, by the best recipe and by random lists
    assert len((here / "tune" / "kept.txt").read_text().splitlines()) == 75


def test_a_feature_set_goes_where_a_feature_file_does(here):
    """Images in shards, embedded; one shard's classes lie in its member's names."""
    write_tars(here / "tars", members(image_folder(here / "images", {"ant": 22, "bee": 22})), 3)
    run("embed", "tars", "--encoder", "mini", "-o", "set", "--device", "cpu")
    result = run("tune", "--keep", 0.4, "--features", "set", "--seeds", 2)
    assert "set: 44 images of 2 classes" in result.stderr
    kept = (here / "tune" / "kept.txt").read_text()
    assert len(kept.splitlines()) == 18
    (here / "tune" / "kept.txt").unlink()
    run(*shlex.split(result.stdout.splitlines()[1])[1:])
    assert (here / "tune" / "kept.txt").read_text() == kept


def test_networks_judge_the_finalists(here):
    for number, path in enumerate(PATHS):
        write_image(here / "images" / path, seed=number)
    result = run("tune", "--keep", 0.3, "--seeds", 2, "--model", "cnn", "--images", "images", "--epochs", 1, "--width",
                 4, "--image-size", 16, "--device", "cpu")  # fmt: skip
    assert "% by networks" in result.stderr
    assert "hint: 1 epoch of 36 images is 1 optimizer step, and networks that take fewer than 500" in result.stderr
    (here / "w.pt").write_text("no weights")
    for options, message in (("--weights w.pt", "w.pt: "), ("--batch-size 1", "batches of 2 images and more")):
        refused = CliRunner().invoke(
            app, [*["tune", "--keep", "0.3", "--model", "cnn", "--images", "images", "-o", "new"], *options.split()]
        )
        assert message in refused.stderr.splitlines()[-1]
        assert not (here / "new").exists()  # nor any head trained before
    content = json.loads((here / "tune" / "results.json").read_text())
    assert set(content["networks"]) == {"cover by class", "easy, k 6"}
    assert content["settings"]["recipe"]["width"] == 4


def test_networks_learn_the_classes_of_the_feature_file(here):
    """And not those of folders that are called after something else."""
    names = [f"{'left' if i < 20 else 'right'}/{i:03d}.png" for i in range(40)]
    kinds = [CLASSES[i % 3] for i in range(40)]
    for number, name in enumerate(names):
        write_image(here / "images" / name, seed=number)
        write_image(here / "test" / f"{number}.png", seed=100 + number)
    (here / "labels.csv").write_text("path,label\n" + "".join(map("{},{}\n".format, names, kinds)))
    (here / "tested.csv").write_text("path,label\n" + "".join(f"{i}.png,{kinds[i]}\n" for i in range(40)))
    np.save("v.npy", np.random.default_rng(0).normal(size=(40, 5)))
    protoprune.import_features("v.npy", "f.h5", paths=names, labels="labels.csv")
    with open_features("f.h5") as file:
        pool, _ = _pool(file, [], None)
    options = TrainingOptions(image_size=16, epochs=1, width=4)
    networks, _ = _networks(pool, "cnn", Path("images"), Path("test"), Path("tested.csv"), options, 0.5)
    assert networks.examples.paths == pool.paths == names
    assert [networks.examples.classes[label] for label in networks.examples.labels.tolist()] == kinds
    assert (networks.examples.labels == pool.labels).all()
    by_number = dict(zip((f"{i}.png" for i in range(40)), kinds, strict=True))
    tested = [networks.test.classes[label] for label in networks.test.labels.tolist()]
    assert tested == [by_number[path] for path in networks.test.paths]
    with pytest.raises(UsageError, match=r"none of the 40 images below .*/test has a class .* is it the folder"):
        _networks(pool, "cnn", Path("test"), None, None, options, 0.5)
    run("tune", "--keep", 0.4, "--features", "f.h5", "--test-labels", "tested.csv", code=2)


def test_without_labels_it_says_what_cannot_be_judged(here, feature_file):
    feature_file("plain.h5", np.random.default_rng(0).normal(size=(80, 5)))
    result = run("tune", "--keep", 0.25, "--features", "plain.h5")
    assert "accuracy cannot" in result.stdout
    assert "protoprune select plain.h5 --keep 0.25 --order cover --by cluster" in result.stdout
    assert "cover by cluster: " in result.stderr
    assert not (here / "tune" / "kept.txt").exists()
    assert len((here / "tune" / "table.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep", "some"], 2, "--keep some: expected auto or the fraction to keep"),
        (["--keep", "30"], 2, "for 30 % give 0.3"),
        (["--keep", "0.3", "--features", "none.h5"], 2, "none.h5: no such feature file"),
        (["--keep", "0.3", "--features", "."], 2, ".: no such feature file"),
        (["--keep", "0.3", "--model", "cnn"], 2, "give --images FOLDER"),
        (["--keep", "0.3", "--model", "head"], 2, "leave --model out"),
        (["--keep", "0.3", "--images", "."], 2, "--images goes with --model"),
        (["--keep", "0.3", "--higher-is", "keep"], 2, "--higher-is keep: goes with --scores"),
        (["--keep", "0.3", "-o", "test.h5"], 2, "-o test.h5: a file; name a folder"),
        (["--keep", "0.02"], 2, "too few to compare anything"),
        (["--keep", "0.3", "--test", "wide.h5"], 2, "the inputs of the training set are 6 and those of the test set 9"),
        (["--keep", "0.3", "--test", "other.h5"], 2, "embed both with the same encoder"),
        (["--keep", "0.3", "--test", "none.h5"], 2, "none.h5: no such feature file"),
        (["--keep", "0.3", "--scores", "none.csv"], 2, "none.csv: no such score table"),
        (["--keep", "0.3", "--test", "."], 2, "--test .: a folder of images, which only --model takes"),
        (["--keep", "1"], 2, "--keep 1: keeps every image, whatever the recipe"),
        (
            ["--keep", "0.001", "--features", "plain.h5"],
            2,
            "--keep 0.001: 0 of 80 images, which leaves nothing to compare",
        ),
        (["--keep", "0.3", "--features", "nan.h5"], 1, "nan.h5: the vector of ape/003.png is NaN or infinite"),
        (["--keep", "0.3", "--test", "nan.h5"], 1, "nan.h5: the vector of ape/003.png is NaN or infinite"),
        (
            ["--keep", "0.3", "--features", "plain-nan.h5"],
            1,
            "the features: the vector of 00004.png is NaN or infinite",
        ),
        (["--keep", "auto", "--features", "plain.h5"], 2, "give a fraction"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(here, inputs, arguments, code, message):
    shutil.copytree(inputs / "odd", here, dirs_exist_ok=True)
    result = run("tune", *arguments, code=code)
    assert not (here / "tune").exists()
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_rounds_are_those_of_the_documentation():
    assert halving.ROUNDS == (1, 2, 4, 8)
    assert halving.FOLDS == 5


def test_a_test_set_that_is_the_training_set_and_a_table_of_nothing(here):
    result = run("tune", "--keep", 0.3, "--features", "features.h5", "--test", "features.h5", "--seeds", 2)
    assert "warning: 150 of the 150 test images are the training set itself" in result.stderr
    (here / "nan.csv").write_text("path,score\n" + "".join(f"{path},nan\n" for path in PATHS))
    result = run("tune", "--keep", 0.3, "--scores", "nan.csv", "-o", "new", code=2)
    assert result.stderr.splitlines()[-1] == "error: --scores nan.csv: gives none of the images a score; leave it out"
    assert not (here / "new").exists()


def test_a_table_of_row_numbers_is_that_of_the_file(here, feature_file):
    """What is compared, and what the command at the end does, are the same list: rows count the unreadable image."""
    feature_file("features.h5", np.ones((150, 6)), paths=PATHS, failed={4: Status.CORRUPT})
    values = np.random.default_rng(1).permutation(150)
    (here / "rows.csv").write_text("index,score\n" + "".join(f"{row},{one}\n" for row, one in enumerate(values)))
    with open_features("features.h5") as file:
        pool, _ = _pool(file, [here / "rows.csv"], "harder")
    assert pool.tables[str(here / "rows.csv")].tolist() == np.delete(values, 4).tolist()


def test_without_labels_the_command_has_the_seed(here, feature_file):
    feature_file("plain.h5", np.random.default_rng(0).normal(size=(80, 5)))
    result = run("tune", "--keep", 0.25, "--features", "plain.h5", "--seed", 3)
    assert result.stdout.splitlines()[-1].endswith("--order cover --by cluster -o tune/kept.txt --seed 3")
    assert run("tune", "--keep", 0.25, "--features", "plain.h5").exit_code == 0  # into the same folder again


def test_a_folder_holds_the_results_of_one_call(here, feature_file):
    (here / "tune").mkdir()
    (here / "tune" / "kept.txt").write_text("mine")
    error = run("tune", "--keep", 0.5, code=2).stderr
    assert "-o tune: holds a kept.txt that `protoprune tune` did not write; choose another folder" in error
    assert (here / "tune" / "kept.txt").read_text() == "mine"
    (here / "out").mkdir()  # as `--keep auto` left it
    (here / "out" / "results.json").write_text('{"answer": "you can leave out 10%", "environment": {}}')
    (here / "out" / "curve.csv").write_text("keep,recipe\n")
    (here / "out" / "kept.jsonl").write_text("mine")  # `select -o out/kept.jsonl`
    run("tune", "--keep", 0.5, "--seeds", 2, "-o", "out")
    assert not (here / "out" / "curve.csv").exists()
    assert (here / "out" / "kept.jsonl").read_text() == "mine"
    feature_file("plain.h5", np.random.default_rng(0).normal(size=(80, 5)))
    error = run("tune", "--keep", 0.5, "--features", "plain.h5", "-o", "out", code=2).stderr
    assert "-o out: holds what was found for images with classes; choose another folder" in error
