"""Feature files in which some images have no class, as `--labels` with rows missing makes them: every command."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import write_image
from typer.testing import CliRunner

from protoprune import select
from protoprune.cli import app
from protoprune.cli.tune import _pool
from protoprune.features.opening import open_features

PATHS = [f"{i:02d}.png" for i in range(40)]
LABELLED = [f"{path},{'ape' if i % 2 else 'bee'}" for i, path in enumerate(PATHS[:24])]  # 12 of each; 16 have none


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)) + 3 * np.eye(5)[[1 + i % 2 for i in range(40)]]
    np.savez("v.npz", features=vectors, paths=np.array(PATHS))
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *LABELLED]) + "\n")
    (tmp_path / "scores.csv").write_text("path,score\n" + "".join(f"{path},{i}\n" for i, path in enumerate(PATHS)))
    (tmp_path / "other.csv").write_text("path,score\n" + "".join(f"{path},{-i}\n" for i, path in enumerate(PATHS)))
    (tmp_path / "kept.txt").write_text("".join(f"{path}\n" for path in PATHS[:12]))
    run("import v.npz -o f.h5 --labels labels.csv")
    return tmp_path


def run(line: str, code: int = 0):
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == code, (line, result.output, result.exception)
    return result


def test_select_counts_classes_of_those_that_have_one(here):
    with open_features("f.h5") as file:
        assert np.bincount(file.labels + 1).tolist() == [16, 12, 12]
    # The hardest ten are all without a class; of all 40 by balance 1 each class, and what has none, gets its third.
    result = run("select f.h5 --scores scores.csv --keep 0.25")
    assert result.stdout.splitlines() == PATHS[30:]
    assert "warning: 2 of 2 classes lost every image; --balance 0.5 --by class keeps some of each" in result.stderr
    assert "classes: 0.0 % of each is kept" in result.stderr
    even = run("select f.h5 --scores scores.csv --keep 0.3 --balance 1").stdout.splitlines()
    assert even == [*PATHS[16:24], *PATHS[36:]]
    assert "classes: 33.3 % of each is kept" in run("select f.h5 --scores scores.csv --keep 0.3 --balance 1").stderr
    few = run("select f.h5 --scores scores.csv --keep 0.05").stderr
    assert "keep at least 3 images for one of each" in few  # the third is for those without a class


def test_a_table_that_scores_none_of_the_classes(here):
    (here / "rest.csv").write_text("path,score\n" + "".join(f"{path},1\n" for path in PATHS[24:]))
    result = run("select f.h5 --scores rest.csv --keep 0.5")
    assert len(result.stdout.splitlines()) == 8
    assert "classes:" not in result.stderr


@pytest.mark.parametrize("order", ["hard", "cover", "stratified"])
def test_the_command_line_and_python_choose_the_same(here, order):
    for options in ({}, {"balance": 0.5}, {"balance": 1.0, "by": "class"}):
        words = " ".join(f"--{name} {value}" for name, value in options.items())
        listed = run(f"select f.h5 --keep 0.4 --order {order} {words}").stdout.splitlines()
        assert listed == select("f.h5", 0.4, order=order, **options).kept_paths
        assert len(listed) == 16


def test_every_other_command(here):
    for path in PATHS:
        write_image(here / path)
    (here / "out").mkdir()
    run("record f.h5 -o r.h5 --epochs 1")
    for line in (
        "info f.h5", "advise --features f.h5", "sheet f.h5 --by class -o out/s.png",
        "score el2n --record r.h5 -o e.csv",
        "report f.h5 --no-thumbnails -o r.html --by class --balance 0.5", "score supervised_prototypes --features f.h5",
        "score moderate --features f.h5", "score cover --features f.h5",
        "compare scores.csv other.csv --features f.h5 --keep 0.5 --classes shares.csv --bootstrap 0",
        "evaluate kept.txt --features f.h5 --test f.h5 --seeds 2 --no-class-counts",
        "scaling --features f.h5 --test f.h5 --size 12,24 --keep 1,0.5 --order hard --seeds 1 --bootstrap 0",
    ):  # fmt: skip
        run(line)
    assert len((here / "e.csv").read_text().splitlines()) == 2 + 24  # those without a class were not trained on


def test_a_list_with_images_that_have_no_class_is_not_said_to_lack_them(here):
    (here / "more.txt").write_text("".join(f"{path}\n" for path in PATHS[20:30]))
    error = run("evaluate more.txt --features f.h5 --test f.h5", code=1).stderr.splitlines()[-1]
    assert "more.txt: 6 of its 10 images are not usable training images of " in error
    assert "(first: 24.png has no class); leave out what cannot be trained on, or give it a class" in error


def test_tune_says_that_its_list_is_of_all_images(here, capsys):
    with open_features("f.h5") as file:
        pool, _ = _pool(file, [], None)
    assert len(pool) == 24
    said = capsys.readouterr().err
    assert (
        "warning: 16 images have no class: recipes are compared without them, and the list written is of all images"
        in said
    )


def test_images_without_a_class_are_of_none_of_them(here):
    """On the sheet they stood as the last class; a near-duplicate of a labelled one was called a likely label error."""
    from protoprune import pruning
    from protoprune.cli.show import _rows
    from protoprune.report import facts

    titles = [title for title, *_ in _rows(pruning.rank("f.h5"), "class", 2, 0)]
    assert titles == ["no class (16)", "ape (12)", "bee (12)"]
    found = facts.gather(select("f.h5", 0.5), facts.Options(duplicates=0.9))
    labels = found.blocks["label"]
    mixed = [{int(labels[at]) for at in one["rows"]} - {-1} for one in found.data["duplicates"] if one["mixed"]]
    assert all(len(one) > 1 for one in mixed)
    assert any({-1, 0} == {int(labels[at]) for at in one["rows"]} for one in found.data["duplicates"])


def test_advice_is_about_images_that_have_a_class(here):
    assert run("advise --features f.h5").stdout.startswith("24 images, 2 classes, 12 a class on average.")


def test_scores_of_no_image_that_has_a_class(here):
    """Shares of no class ended in a traceback."""
    for name in "ab":
        (here / f"{name}.csv").write_text(
            "path,score\n" + "".join(f"{path},{i}\n" for i, path in enumerate(PATHS[24:]))
        )
    assert "keeps" not in run("compare a.csv b.csv --features f.h5 --keep 0.5 --bootstrap 0").stderr
