"""Recipes: what they are called, which command makes them, and that parts select as the command does."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from typer.testing import CliRunner

from protoprune import ids, pruning
from protoprune.cli import app
from protoprune.tuning.recipes import BALANCED, RANDOM, Candidate, Part, Pool, candidates

CLASSES = ["ape", "bee", "cat"]
PATHS = sorted(f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(150))
LABELS = np.array([CLASSES.index(path.split("/")[0]) for path in PATHS])


@pytest.fixture
def pool() -> Pool:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(150, 6)) + 2 * np.eye(3, 6)[LABELS]).astype(np.float32)
    vectors[7] = 0  # which only a score table can rank
    return Pool(PATHS, LABELS, CLASSES, vectors, {"t.csv": rng.normal(size=150)})


def test_names_tell_candidates_apart():
    found = [*candidates(10_000, 10, ["el2n.csv"]), RANDOM, BALANCED]
    assert len({one.name for one in found}) == len(found) > 30
    assert Candidate("cover", by="class").name == "cover by class"
    assert BALANCED.name == "random by class"
    assert Candidate(by="class", balance=0.5, k=40, scores="a/b.csv").name == "hard, balance 0.5, k 40, by a/b.csv"
    assert not any(one.k for one in candidates(300, 10))  # 10 images a cluster at least


@pytest.mark.parametrize(("keep", "text"), [(0.3, "0.3"), (1.0, "1"), (1, "1"), (0.123456789, "0.123456789")])
def test_the_command_has_every_digit_of_the_fraction(keep, text):
    words = RANDOM.command("features.h5", keep, "kept.txt").split()
    assert words[words.index("--keep") + 1] == text


@pytest.mark.parametrize("number", range(len(candidates(2000, 3, ["t.csv"])) + 2))
def test_parts_select_as_the_command_does(number, pool, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    one = [*candidates(2000, 3, ["t.csv"]), RANDOM, BALANCED][number]
    feature_file("features.h5", pool.vectors, paths=PATHS)
    with open("t.csv", "w") as file:
        file.writelines(f"{path},{score}\n" for path, score in zip(PATHS, pool.tables["t.csv"], strict=True))
    rows = Part(pool, np.arange(150)).select(one, 0.3)
    assert len(rows) == 45
    words = shlex.split(one.command("features.h5", 0.3, "kept.txt", "prune"))
    if one.scores:
        words[words.index("--higher-is") + 1] = "harder"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept.txt").read_text().splitlines() == [PATHS[row] for row in rows]
    assert pruning.select("features.h5", one.rule(0.3), k=one.k, scores=one.scores).kept_paths == [
        PATHS[row] for row in rows
    ]


def test_a_part_cuts_one_order_where_every_fraction_would_make_its_own(pool):
    rows = np.arange(0, 150, 2)
    part = Part(pool, rows, seed=3)
    for one in [*candidates(2000, 3, ["t.csv"]), RANDOM, BALANCED]:
        for keep, seed in ((0.05, None), (0.31, 7), (1.0, None)):
            fresh = pruning.prune(Part(pool, rows, seed=3)._ranking(one), one.rule(keep, 3 if seed is None else seed))
            np.testing.assert_array_equal(part.select(one, keep, seed), rows[fresh.keep], err_msg=f"{one} {keep}")


def test_a_part_knows_its_own_rows_alone(pool):
    """What is outside of a part has no influence on what is kept of it."""
    rows = np.arange(0, 150, 2)
    other = Pool(PATHS, LABELS, CLASSES, pool.vectors.copy(), pool.tables)
    other.vectors[1::2] = 1e3
    for one in (Candidate("cover", by="class"), Candidate(), Candidate("cover", by="cluster")):
        kept = Part(pool, rows).select(one, 0.3)
        assert np.isin(kept, rows).all()
        np.testing.assert_array_equal(kept, Part(other, rows).select(one, 0.3))


def test_a_part_hashes_its_names_once_a_seed(pool, monkeypatch):
    """They were hashed for every list, which took longer than to order it."""
    made = []

    def counted(names, seed, purpose=b""):
        made.append(seed)
        return np.arange(len(names), dtype=np.uint64)

    monkeypatch.setattr(ids, "hashes", counted)
    part = Part(pool, np.arange(100))
    for one in (RANDOM, BALANCED, Candidate("stratified"), Candidate("stratified", drop_hardest=0.1)):
        part.select(one, 0.3, seed=5)
    assert made == [5]
