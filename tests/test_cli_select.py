"""`select`, `info` and `sheet` as a user runs them: what is on stdout, what on stderr, and with which exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys

import h5py
import numpy as np
import pytest
from conftest import write_features
from helpers import write_image

import protoprune
from protoprune import Rule, prune, rank
from protoprune.errors import ProtopruneError
from protoprune.images.decode import Status
from protoprune.lists import read_list, read_weights
from protoprune.scores import write_scores

N, CLASSES = 60, ("ape", "bee", "cat")
PATHS = [f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(N)]
OUTLIERS = {PATHS[i] for i in (4, 17, 33, 41, 48, 58)}


def blobs(n: int = N) -> np.ndarray:
    """(n, 8) features: a tight bunch, and two images of each class that lie far off it."""
    rng = np.random.default_rng(0)
    features = np.eye(1, 8) + 0.05 * rng.normal(size=(n, 8))
    for row, path in enumerate(PATHS[:n]):
        if path in OUTLIERS:
            features[row, 3 + row % 5] += 0.9
    return features


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the features.h5 of `here`, and in a folder of its own what no list can be made of."""
    folder = tmp_path_factory.mktemp("inputs")
    root, bad = folder / "images", folder / "bad"
    write_features(folder / "features.h5", blobs(), root=root, paths=PATHS, failed={0: Status.TRUNCATED})
    bad.mkdir()
    write_features(bad / "half.h5", blobs(), root=root, paths=PATHS, finish=False)
    write_features(bad / "nan.h5", np.where(np.arange(N)[:, None] == 2, np.nan, blobs()), root=root)
    write_features(bad / "lost.h5", blobs(), root=root, failed=dict.fromkeys(range(N), Status.MISSING))
    (bad / "garbage.h5").write_bytes(bytes(range(256)) * 100)
    (bad / "empty.h5").touch()
    (bad / "folder").mkdir()
    (bad / "blank.csv").write_text("path,score\n" + "".join(f"{path},\n" for path in PATHS))
    (bad / "s.csv").write_text("".join(f"{path},1\n" for path in PATHS))
    with h5py.File(bad / "foreign.h5", "w") as file:
        file["features"] = np.zeros((3, 3))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, inputs):
    """The current folder, with a features.h5 of 60 images in three classes, one of which could not be read."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "features.h5", tmp_path)
    return tmp_path


def select(run, *arguments, **options):
    return run("select", "--k", "3", *arguments, **options)


def test_the_command_as_the_readme_has_it(here, run_program):
    result = run_program("select", "--keep", "0.7")
    assert result.returncode == 0, result.stderr
    kept = result.stdout.decode().splitlines()
    assert len(kept) == round(0.7 * 59)
    assert kept == sorted(kept)
    assert set(kept) <= set(PATHS) - {PATHS[0]}
    summary = result.stderr.decode()
    assert "features.h5: 60 images" in summary
    assert "excluded: 1 that could not be read (truncated 1)" in summary
    assert "k = 3 (the number of classes), spherical, 25 iterations on all 59 images, seed 0, faiss" in summary
    assert "kept 41 of 59 (69.5 %, hard first), removed 18" in summary
    assert re.search(r"classes: smallest kept share [\d.]+ % \(\w+\), largest [\d.]+ % \(\w+\)", summary)
    assert re.search(r"clusters: \d+ to \d+ images", summary)
    assert "distance: " in summary


def test_planted_outliers_are_the_hard_ones(here, run):
    share = 6 / 59

    def kept(keep, *options) -> set[str]:
        return set(run("select", "--k", "1", "--keep", keep, *options).stdout.splitlines())

    assert kept(share) == OUTLIERS
    assert kept(share, "--euclidean") == OUTLIERS
    assert kept(share, "--restarts", "3") == OUTLIERS
    assert not kept(0.8, "--order", "easy") & OUTLIERS
    assert not kept(0.5, "--order", "middle") & OUTLIERS


def test_formats_hold_the_same_list(here, run):
    lines = select(run, "--keep", "0.5").stdout.splitlines()
    for name, *options in (
        ("kept.txt",),
        ("kept.null", "-0"),
        ("kept.csv", "--format", "csv"),
        ("kept.jsonl", "--format", "jsonl"),
    ):
        result = select(run, "--keep", "0.5", "-o", name, *options)
        assert result.stdout == ""
        assert read_list(name) == lines
    select(run, "--keep", "0.5", "-o", "kept.npy", "--format", "npy")
    assert [sorted(PATHS)[row] for row in read_list("kept.npy")] == lines
    assert sorted(here.glob("*.tmp")) == []


def test_null_and_npy_on_stdout_are_nothing_but_the_list(here, run):
    null = select(run, "--keep", "0.5", "-0").stdout_bytes
    assert null.endswith(b"\0")
    assert b"\n" not in null
    array = np.load(io.BytesIO(select(run, "--keep", "0.5", "--format", "npy").stdout_bytes))
    assert [sorted(PATHS)[row] for row in array] == os.fsdecode(null).split("\0")[:-1]


def shell(run_program, line: str):
    """A line of bash in which `$select` is the command."""
    program = "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"
    select = f"{sys.executable} -m protoprune select --k 3 --keep 0.5"
    return run_program(line.replace("$select", select), python=("-c", program))


def test_standard_output_by_its_name_and_without_the_summary(here, run, run_program):
    """`2>&-`: the summary must not turn up among the paths."""
    plain = select(run, "--keep", "0.5").stdout_bytes
    assert len(plain.splitlines()) == 30
    line = "$select -o /dev/stdout --removed /dev/null 2>&- | cat; test -c /dev/null || echo replaced"
    assert shell(run_program, line).stdout == plain


def test_a_process_as_a_file(here, run):
    """`-o >(sort)` is a pipe by its number."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        select(run, "--keep", "0.5", "-o", f"/dev/fd/{writing}")
        os.close(writing)
        assert pipe.read() == select(run, "--keep", "0.5").stdout_bytes


def test_streams_that_are_closed_or_full(here, run, run_program):
    for line, code, message in (
        (">&-", 1, b"error: standard output is closed, and the answer would be lost"),
        (">/dev/full", 1, b"error: standard output: cannot write (No space left on device)"),
    ):
        result = shell(run_program, f"$select {line}")
        assert result.returncode == code, result.stderr
        assert message in result.stderr
        assert b"Traceback" not in result.stderr
        assert b"Exception ignored" not in result.stderr
    full = select(run, "--keep", "0.5", "-o", "/dev/full", code=1)
    assert "error: /dev/full: cannot write (No space left on device)" in full.stderr


def test_absolute_and_root(here, run, feature_file):
    feature_file("features.h5", blobs(), paths=PATHS, failed={0: Status.TRUNCATED})
    first = select(run, "--keep", "0.5", "--absolute").stdout.splitlines()[0]
    assert first.startswith(str(here / "images") + "/")
    assert select(run, "--keep", "0.5", "--absolute", "--root", "/data").stdout.startswith("/data/ape/")
    relative = select(run, "--keep", "0.5", "--absolute", "--root", "moved")
    assert relative.stdout.startswith(str(here / "moved/ape/"))
    assert "warning: --absolute: moved is no folder on this machine; --root says where" in relative.stderr
    (here / "moved").mkdir()
    assert "--absolute" not in select(run, "--keep", "0.5", "--absolute", "--root", "moved").stderr


def test_absolute_paths_below_a_url(here, run, feature_file):
    feature_file("url.h5", np.random.default_rng(0).normal(size=(4, 3)), paths=[f"0.tar/{i}.png" for i in range(4)],
                 root="s3://bucket/shards")  # fmt: skip
    result = run("select", "url.h5", "--keep", "1", "--absolute")
    assert result.stdout.splitlines() == [f"s3://bucket/shards/0.tar/{i}.png" for i in range(4)]
    assert "warning: --absolute" not in result.stderr


def test_kept_and_removed_are_all_that_could_be_read(here, run):
    kept = select(run, "--keep", "0.3", "--removed", "gone.txt").stdout.splitlines()
    assert sorted(kept + read_list("gone.txt")) == sorted(set(PATHS) - {PATHS[0]})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifest_accounts_for_every_image(here, run, kind):
    kept = select(run, "--keep", "0.3", "--manifest", f"m.{kind}").stdout.splitlines()
    with open(f"m.{kind}", newline="") as file:
        rows = list(csv.DictReader(file)) if kind == "csv" else [json.loads(line) for line in file]
    assert [row["path"] for row in rows] == sorted(PATHS)
    assert [row["path"] for row in rows if int(row["keep"])] == kept
    assert {row["class"] for row in rows} == set(CLASSES)
    excluded = [row for row in rows if row["status"] != "ok"]
    assert [(row["path"], row["status"], int(row["rank"])) for row in excluded] == [(PATHS[0], "truncated", -1)]
    assert excluded[0]["score"] in ("", None)
    usable = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: int(row["rank"]))
    assert [int(row["rank"]) for row in usable] == list(range(59))
    assert [row["path"] for row in usable[: len(kept)]] == sorted(kept, key=[row["path"] for row in usable].index)
    scores = [float(row["score"]) for row in usable]
    assert scores == sorted(scores, reverse=True)
    assert {int(row["cluster"]) for row in usable} == {0, 1, 2}


def test_links_name_the_classes_that_have_lost_all_their_images(here, run, image_tree, feature_file):
    feature_file("features.h5", blobs(), paths=PATHS, failed={0: Status.TRUNCATED})
    image_tree({"ape": 20, "bee": 20, "cat": 20})
    for path in PATHS:
        (here / "images" / path).write_bytes((here / "images/ape/000.png").read_bytes())
    (here / "s.csv").write_text("".join(f"{path},{path >= 'b'}\n" for path in PATHS))
    result = run("select", "--scores", "s.csv", "--keep", "0.5", "--links", "linked")
    assert "warning: linked has no image of 1 of 3 classes (ape); their folders are empty, which keeps" in result.stderr
    assert (here / "linked/classes.txt").read_text() == "ape\nbee\ncat\n"
    assert "ImageFolder" not in run("select", "--scores", "s.csv", "--keep", "0.9", "--links", "all").stderr
    inside = run("select", "--scores", "s.csv", "--keep", "0.9", "--links", "images/kept").stderr
    assert "lies in the folder of the images, where `protoprune embed` will find them twice" in inside


def test_links_of_classes_on_another_level(here, run):
    """train/ape loses all its images, val/ape does not: ape keeps its number, and its folder in both."""
    paths = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("ape", "bee") for i in range(15)]
    for path in paths:
        (here / "splits" / path).parent.mkdir(parents=True, exist_ok=True)
        (here / "splits" / path).touch()
    np.save("v.npy", blobs())
    (here / "names.txt").write_text("\n".join(paths))
    run("import", "v.npy", "--paths", "names.txt", "--root", "splits", "--class-level", 2, "-o", "f.h5")
    (here / "s.csv").write_text("".join(f"{path},{path >= 'train/b'}\n" for path in paths))
    for again in ([], ["--overwrite"]):
        result = run("select", "f.h5", "--scores", "s.csv", "--keep", 0.75, "--links", "linked", *again)
        assert "warning: linked has no image of 1 of 4 classes (train/ape); their folders are empty" in result.stderr
        assert (here / "linked/classes.txt").read_text() == "ape\nbee\n"
        assert sorted(path.name for path in (here / "linked").glob("*/*")) == ["ape", "ape", "bee", "bee"]


def test_links_beside_a_folder_that_is_no_class(here, run):
    """classes.txt lacked that folder, so that timm knew no number for it, and --overwrite refused links of our own."""
    paths = [f"{name}/{i:02d}.png" for name in ("ape", "bee", "new") for i in range(20)]
    for path in paths:
        (here / "some" / path).parent.mkdir(parents=True, exist_ok=True)
        (here / "some" / path).touch()
    np.save("v.npy", blobs())
    (here / "names.txt").write_text("\n".join(paths))
    (here / "y.csv").write_text("path,label\n" + "".join(f"{path},{path[:3]}\n" for path in paths[:40]))
    run("import", "v.npy", "--paths", "names.txt", "--root", "some", "--labels", "y.csv", "-o", "f.h5")
    for again in ([], ["--overwrite"]):
        run("select", "f.h5", "--keep", 0.5, "--links", "linked", *again)
        assert (here / "linked/classes.txt").read_text() == "ape\nbee\nnew\n"


@pytest.mark.parametrize("hard", [[], ["--hard-links"]])
def test_links_are_an_image_folder_of_the_kept(here, run, hard, feature_file):
    feature_file("features.h5", blobs(), paths=PATHS, failed={0: Status.TRUNCATED})
    for i, path in enumerate(PATHS):
        write_image(here / "images" / path, seed=i)
    kept = select(run, "--keep", "0.5", "--links", "linked", *hard).stdout.splitlines()
    found = sorted(str(path.relative_to("linked")) for path in (here / "linked").relative_to(here).rglob("*.png"))
    assert found == kept
    assert os.path.samefile(here / "linked" / kept[0], here / "images" / kept[0])
    again = select(run, "--keep", "0.5", "--links", "linked", code=2)
    assert "exists and is not empty" in again.stderr
    fewer = select(run, "--keep", "0.2", "--links", "linked", "--overwrite", *hard).stdout.splitlines()
    assert sorted(str(path.relative_to(here / "linked")) for path in (here / "linked").rglob("*.png")) == fewer
    os.rename(here / "linked" / fewer[0], here / "linked/own.png")
    os.unlink(here / "images" / fewer[0])
    refused = select(run, "--keep", "0.5", "--links", "linked", "--overwrite", "--removed", "new.txt", code=2)
    assert "and own.png is none; look at it" in refused.stderr
    assert not os.path.exists("new.txt")  # found out before anything is written


def test_scores_from_a_table(here, run):
    with open("scores.csv", "w") as file:
        for i in np.random.default_rng(3).permutation(N):  # the order of the rows does not matter
            file.write(f"{PATHS[i]},{i}\n")
        file.write("other.png,5\n")
    result = run("select", "--scores", "scores.csv", "--keep", 10 / 59)
    assert result.stdout.splitlines() == sorted(PATHS[50:])
    assert "1 table row names no image, first other.png" in result.stderr
    assert "k-means" not in result.stderr
    easy = run("select", "--scores", "scores.csv", "--keep", 10 / 59, "--order", "easy").stdout.splitlines()
    assert easy == sorted(PATHS[1:11])  # not the first image, which has a score but could not be read


def test_scores_of_a_table_in_which_higher_means_prune(here, run):
    with open("scores.csv", "w") as file:
        file.writelines(f"{path},{row}\n" for row, path in enumerate(PATHS[1:]))
    keep = run("select", "--scores", "scores.csv", "--keep", 10 / 59, "--higher-is", "keep")
    prune = run("select", "--scores", "scores.csv", "--keep", 10 / 59, "--higher-is", "prune")
    assert keep.stdout.splitlines() == sorted(PATHS[-10:])
    assert prune.stdout.splitlines() == sorted(PATHS[1:11])
    assert "scores: direction as given" in prune.stderr
    alone = run("select", "--keep", "0.5", "--higher-is", "prune", code=2)
    assert alone.stderr == "error: --higher-is prune: goes with --scores, whose direction it gives\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "0.1", "--k", "3"], "in nearly all of our experiments the hardest 10 % trained worse"),
        (["--keep", "0.5", "--order", "easy"], "in most of our experiments the easiest"),
        (["--keep", "0.6"], None),
        (["--keep", "0.1", "--order", "cover"], None),
        (["--keep", "0.1", "--order", "random"], None),
        (["--keep", "0.1", "--calibrate", "0.5"], None),
    ],
)
def test_a_list_that_loses_to_random_in_measurements_is_said_to(here, run, options, said):
    warned = [line for line in run("select", *options).stderr.splitlines() if "experiments" in line]
    assert len(warned) == (said is not None)
    assert said is None or f"warning: {said}" in warned[0]
    assert said is None or f"`protoprune tune --keep {options[1]}` compares them" in warned[0]


def test_the_command_that_compares_lists_names_the_features(here, run):
    os.rename("features.h5", "my features.h5")
    said = run("select", "my features.h5", "--keep", "0.1", "--k", "3").stderr
    assert "`protoprune tune --features 'my features.h5' --keep 0.1` compares them on your images" in said


@pytest.mark.parametrize(
    ("metric", "warned"),
    [
        *[("el2n", True), ("EL2N-20-models", True), ("DDD", True), ("self-supervised-prototypes", True)],
        *[("random", False), ("mine", False), ("lossless", False), ("k_center", False)],
    ],
)
def test_what_is_said_of_a_table_is_what_was_measured_of_its_metric(here, run, metric, warned):
    write_scores("scores.csv", PATHS, np.arange(60.0), metric=metric)
    said = run("select", "--scores", "scores.csv", "--keep", "0.2").stderr
    assert ("in nearly all of our experiments" in said) is warned


def test_scores_that_not_every_image_has(here, run):
    with open("scores.csv", "w") as file:
        file.writelines(f"{path},{i}\n" for i, path in enumerate(PATHS[:21]))
    result = run("select", "--scores", "scores.csv", "--keep", "0.5")
    assert result.stdout.splitlines() == sorted(PATHS[11:21])
    assert "scores: 20 images have one; 39 have none and are not kept" in result.stderr


def test_balance_gives_every_class_its_share(here, run):
    with open("scores.csv", "w") as file:  # all apes are easy
        file.writelines(f"{path},{0 if path.startswith('ape') else i + 1}\n" for i, path in enumerate(PATHS))
    plain = run("select", "--scores", "scores.csv", "--keep", 30 / 59)
    assert "warning: 1 of 3 classes lost every image" in plain.stderr
    assert not [path for path in plain.stdout.splitlines() if path.startswith("ape")]
    balanced = run("select", "--scores", "scores.csv", "--keep", 30 / 59, "--balance", "0.5")
    assert "kept 30 of 59 (50.8 %, hard first, balance 0.5 by class), removed 29" in balanced.stderr
    even = balanced.stdout.splitlines()
    assert len(even) == 30
    assert sum(path.startswith("ape") for path in even) == 5  # floor(0.5 * 30 / 3)
    assert len(select(run, "--keep", "0.5", "--balance", "0.5", "--by", "cluster").stdout.splitlines()) == 30


@pytest.mark.parametrize("order", ["cover", "facility"])
def test_cover_stands_for_every_class_and_its_table_gives_the_same_list(here, run, order):
    result = run("select", "--keep", 0.3, "--order", order)
    kept = result.stdout.splitlines()
    assert "in each class), removed 41" in result.stderr
    assert [sum(path.startswith(name) for path in kept) for name in CLASSES] == [6, 6, 6]
    run("score", order, "-o", "table.csv")
    assert run("select", "--keep", 0.3, "--scores", "table.csv").stdout == result.stdout
    half = run("select", "--keep", 0.5, "--order", order).stdout.splitlines()
    assert set(kept) < set(half)
    clusters = run("select", "--keep", 0.3, "--order", order, "--by", "cluster")
    assert "in each cluster), removed 41" in clusters.stderr
    run("score", order, "--by", "cluster", "-o", "table.csv")
    assert run("select", "--keep", 0.3, "--scores", "table.csv").stdout == clusters.stdout
    assert clusters.stdout != result.stdout


def test_cover_without_classes_goes_by_clusters(tmp_path, feature_file, run):
    flat = feature_file(tmp_path / "flat.h5", np.random.default_rng(0).normal(size=(40, 4)))
    lists = [run("select", flat, "--keep", "0.3", "--order", "cover", *by).stdout for by in ([], ["--by", "cluster"])]
    assert lists[0] == lists[1] != ""
    error = run("select", flat, "--keep", "0.3", "--order", "cover", "--by", "class", code=2).stderr
    assert error.endswith("the images have no classes (no first-level folders); use --by cluster\n")


def test_cover_composes(here, run):
    """By a table the hardest go, near-duplicates before them, and classes have their floor."""
    with open("scores.csv", "w") as file:
        file.writelines(f"{path},{i}\n" for i, path in enumerate(PATHS))
    by_table = ["select", "--scores", "scores.csv", "--keep", 0.3, "--order", "cover"]
    kept = run(*by_table, "--drop-hardest", 30 / 59, "--balance", "1", "--by", "class").stdout.splitlines()
    assert len(kept) == 18
    assert max(map(PATHS.index, kept)) < 30
    assert [sum(path.startswith(name) for path in kept) for name in CLASSES] == [6, 6, 6]
    few = select(run, "--keep", "1", "--order", "cover", "--dedup", "0.02")
    assert "duplicates: " in few.stderr
    assert len(few.stdout.splitlines()) < 59
    own = select(run, "--keep", "0.3", "--order", "cover", "--by", "cluster", "--quota", "dbp")
    assert len(own.stdout.splitlines()) == 18


@pytest.mark.parametrize(
    ("count", "options", "advice"),
    [
        (20, [], "--balance 0.5 --by class keeps some of each"),
        (4, [], "--balance 0.75 --by class keeps some of each"),
        (4, ["--balance", "0.5"], "--balance 0.75 --by class keeps some of each"),
        (2, ["--balance", "1"], "keep at least 3 images for one of each"),
        (3, ["--balance", "0.5", "--calibrate", "0.7"], "take by order at least 3 images for one of each"),
    ],
)
def test_what_would_keep_some_of_each_class_is_what_was_not_done(here, run, count, options, advice):
    with open("scores.csv", "w") as file:  # all apes are easy
        file.writelines(f"{path},{0 if path.startswith('ape') else i + 1}\n" for i, path in enumerate(PATHS))
    arguments = ["select", "--scores", "scores.csv", "--keep", (count + 0.1) / 59]
    result = run(*arguments, *options)
    assert f"classes lost every image; {advice}" in result.stderr
    if "--balance" in advice:
        again = run(*arguments, *advice.partition(" keeps")[0].split())
        assert "lost every image" not in again.stderr


def test_strata_and_the_hardest_dropped(here, run):
    with open("scores.csv", "w") as file:
        file.writelines(f"{path},{i}\n" for i, path in enumerate(PATHS))
    plain = run("select", "--scores", "scores.csv", "--keep", 10 / 59, "--order", "stratified")
    assert "evenly over 50 strata of the scores), removed 49" in plain.stderr
    kept = [PATHS.index(path) for path in plain.stdout.splitlines()]
    assert len(kept) == 10
    dropped = run("select", "--scores", "scores.csv", "--keep", 10 / 59, "--drop-hardest", 20 / 59)
    assert dropped.stdout.splitlines() == sorted(PATHS[30:40])
    assert "dropped the 20 hardest" in dropped.stderr
    assert "all the same" not in dropped.stderr
    short = run("select", "--scores", "scores.csv", "--keep", 42 / 59, "--drop-hardest", 20 / 59, "--order", "easy")
    assert short.stdout.splitlines() == sorted(PATHS[1:43])
    assert "dropped the 20 hardest; 3 of them are kept all the same, easiest first" in short.stderr


def test_quotas_need_no_scores_of_their_own(here, run):
    with open("scores.csv", "w") as file:
        file.writelines(f"{path},{i}\n" for i, path in enumerate(PATHS))
    result = select(run, "--keep", "0.5", "--quota", "dbp", "--manifest", "m.csv")
    assert "kept 30 of 59 (50.8 %, hard first, cluster quotas)" in result.stderr
    table = select(run, "--keep", "0.5", "--quota", "dbp", "--scores", "scores.csv", "--manifest", "t.csv")
    counts = []
    for name, stdout in (("m.csv", result.stdout), ("t.csv", table.stdout)):
        with open(name) as file:
            rows = [row for row in csv.DictReader(file) if int(row["keep"])]
        assert [row["path"] for row in rows] == stdout.splitlines()
        counts.append(sorted(np.bincount([int(row["cluster"]) for row in rows]).tolist()))
    assert counts[0] == counts[1]  # the same quotas, filled by other scores
    assert result.stdout != table.stdout


@pytest.fixture
def doubled(here, feature_file):
    """twice.h5: 40 images far apart and copies of ten, of which five are exact."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 24))
    copies = x[:10] + np.where(np.arange(10)[:, None] < 5, 0, 0.03 * rng.normal(size=(10, 24)))
    feature_file("twice.h5", np.concatenate([x, copies]), paths=[f"{i:02d}.png" for i in range(50)])
    return here


def test_near_duplicates_go_first_and_are_accounted_for(doubled, run):
    options = ["twice.h5", "--dedup", "0.02", "--k", "1", "--manifest", "m.csv", "--removed", "gone.txt"]
    result = run("select", "--keep", "0.5", *options)
    assert "duplicates: 10 of 50 images removed (cosine to a kept one above 0.98); 40 remain" in result.stderr
    assert "for a cosine" not in result.stderr
    said = "warning: 0.98 is 1 - cosine: whatever has a cosine above 0.02 to a kept image counts as its duplicate; "
    assert (
        f"{said}for a cosine above 0.98 give 0.02\n"
        in run("select", "twice.h5", "--keep", "1", "--dedup", "0.98").stderr
    )
    assert "kept 20 of 40 (50.0 %, hard first), removed 20" in result.stderr
    kept = result.stdout.splitlines()
    assert sorted(kept + read_list("gone.txt")) == [f"{i:02d}.png" for i in range(50)]
    with open("m.csv") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    pairs = {frozenset((path, row["duplicate_of"])) for path, row in rows.items() if row["duplicate_of"]}
    assert pairs == {frozenset((f"{i:02d}.png", f"{i + 40:02d}.png")) for i in range(10)}
    for row in rows.values():
        if row["duplicate_of"]:
            assert (row["rank"], row["keep"]) == ("-1", "0")
            assert float(row["distance"]) <= float(rows[row["duplicate_of"]]["distance"])
            assert rows[row["duplicate_of"]]["duplicate_of"] == ""
    told = re.findall(r"E (\S+) +(\d+) pairs, among (\d+) images( \(this run\))?", result.stderr)
    assert [one[0] for one in told] == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]
    assert told[4] == ("0.02", "10", "20", " (this run)")
    assert 5 <= int(told[0][1]) <= 10  # five copies are exact
    assert re.search(r"a quarter of that, --dedup 0\.\d+", result.stderr)
    central = run("select", "--keep", "0.5", *options, "--dedup-prefer", "central", "--manifest", "c.jsonl")
    assert "40 remain" in central.stderr
    for record in map(json.loads, (doubled / "c.jsonl").read_text().splitlines()):
        if record["duplicate_of"]:
            assert record["distance"] <= float(rows[record["path"]]["distance"]) + 1e-6
            assert float(rows[record["duplicate_of"]]["distance"]) <= record["distance"]


def test_a_table_without_names(here, run):
    """As select, sheet and scaling take it: the order is asked for, and what is made of it is said."""
    shuffled = [PATHS[row] for row in np.random.default_rng(0).permutation(len(PATHS))]
    np.savez("s.npz", el2n=np.arange(60.0), aum=np.zeros(60))
    (here / "rows.txt").write_text("\n".join(shuffled) + "\n")
    for command in (["select", "--keep", "0.2"], ["sheet"]):
        error = run(*command, "--scores", "s.npz", code=1).stderr
        assert "s.npz: holds the arrays el2n (60,), aum (60,); which is the score? name it: FILE.npz:el2n" in error
        error = run(*command, "--scores", "s.npz:el2n", code=2).stderr
        assert "s.npz:el2n: does not say which score is of which image; give --rows FILE" in error
        assert "--rows: goes with --scores" in run(*command, "--rows", "rows.txt", code=2).stderr
        assert "--by-place: goes with --scores" in run(*command, "--by-place", code=2).stderr
    kept = run("select", "--keep", "0.2", "--scores", "s.npz:el2n", "--rows", "rows.txt")
    assert kept.stdout.splitlines() == sorted(shuffled[48:])
    assert "warning: matched" not in kept.stderr
    placed = run("select", "--keep", "0.2", "--scores", "s.npz:el2n", "--by-place")
    assert placed.stdout.splitlines() == sorted(PATHS)[48:]
    assert f"scores: warning: matched by place: 0 is taken as {sorted(PATHS)[0]}, 59 as" in placed.stderr
    easy = run("select", "--keep", "0.2", "--scores", "s.npz:el2n:easier", "--rows", "rows.txt")
    assert easy.stdout.splitlines() == sorted([path for path in shuffled if path != PATHS[0]][:12])
    for output in ("s.npz", "rows.txt"):
        error = run(
            "select", "--keep", "0.2", "--scores", "s.npz:el2n", "--rows", "rows.txt", "-o", output, code=2
        ).stderr
        assert "is one of the inputs" in error


def test_near_duplicates_with_a_score_table(doubled, run):
    np.save("s.npy", np.arange(50.0))
    result = run(
        "select", "twice.h5", "--keep", "0.5", "--dedup", "0.02", "--k", "1", "--scores", "s.npy", "--by-place"
    )
    assert "k-means: k = 1 (as given), spherical, 25 iterations on all 50 images" in result.stderr
    assert "score: 0 to 49" in result.stderr
    assert "kept 20 of 40" in result.stderr
    again = run("select", "twice.h5", "--keep", "0.5", "--dedup", "0.02", "--k", "1", "--scores", "s.npy", "--by-place")
    assert "(from the cache)" in again.stderr
    assert again.stdout == result.stdout


def test_calibrated_lists_hold_weights(here, run):
    options = ["--keep", 20 / 59, "--calibrate", "0.6"]
    result = select(run, *options, "-o", "kept.csv", "--manifest", "m.csv", "--removed", "gone.csv")
    assert "calibrated: 12 by order with weight 1, 8 at random with weight 5.875" in result.stderr  # 47 / 8
    assert "hint" not in result.stderr
    weights = read_weights("kept.csv")
    assert sum(weights.values()) == pytest.approx(59)
    assert sorted(weights) == read_list("kept.csv")
    assert {path for path, weight in weights.items() if weight == 1} == set(
        select(run, "--keep", 12 / 59).stdout.splitlines()
    )
    assert read_weights("m.csv") == weights
    assert "weight" not in (here / "gone.csv").read_text()
    plain = select(run, *options)
    assert plain.stdout.splitlines() == sorted(weights)
    assert "hint: this list holds no weights; write it with -o kept.csv" in plain.stderr
    other = select(run, *options, "--seed", "1", "--format", "jsonl")
    assert sum(json.loads(line)["weight"] for line in other.stdout.splitlines()) == pytest.approx(59)


def test_calibration_with_everything_by_order_is_no_calibration(here, run):
    result = select(run, "--keep", "0.5", "--calibrate", "1", "--format", "csv", "--manifest", "m.csv")
    assert result.stdout == select(run, "--keep", "0.5", "--format", "csv").stdout
    header = (here / "m.csv").read_text().partition("\n")[0].split(",")
    assert header == ["path", "class", "cluster", "distance", "score", "rank", "keep", "status"]


def test_cache_answers_the_second_time_with_the_same_list(here, run):
    first = select(run, "--keep", "0.5")
    second = select(run, "--keep", "0.5")
    assert "(from the cache)" not in first.stderr
    assert "(from the cache)" in second.stderr
    assert first.stdout == second.stdout
    assert "(from the cache)" in select(run, "--keep", "0.2").stderr  # another fraction needs no clustering
    for other in (["--seed", "1"], ["--euclidean"], ["--iterations", "3"], ["--train-points", "30"]):
        assert "(from the cache)" not in select(run, "--keep", "0.5", *other).stderr
    for entry in (here / "features.h5.clusters").iterdir():
        entry.write_bytes(b"damaged")
    assert select(run, "--keep", "0.5").stdout == first.stdout


def test_no_cache_writes_nothing(here, run):
    assert "(from the cache)" not in select(run, "--keep", "0.5", "--no-cache").stderr
    assert sorted(os.listdir()) == ["features.h5"]


def test_a_cache_that_cannot_be_written_is_said(here, run):
    """k-means of a large set would be done at each call, in silence."""
    (here / "features.h5.clusters").write_text("in the way")
    said = "warning: features.h5.clusters cannot be written, so the clustering is made anew each time"
    for more in ([], ["--restarts", "3"]):
        assert select(run, "--keep", "0.5", *more).stderr.count(said) == 1
    assert said not in select(run, "--keep", "0.5", "--no-cache").stderr


def test_restarts_and_stability_report_how_far_to_trust_the_list(here, run):
    restarts = select(run, "--keep", "0.5", "--restarts", "3")
    assert re.search(r"restarts: 3 seeds; .* overlap by [\d.]+ % on average", restarts.stderr)
    stability = select(run, "--keep", "0.5", "--stability")
    rows = re.findall(r"k (\d+), seed (\d+): Spearman (-?[\d.]+), kept sets overlap ([\d.]+) %", stability.stderr)
    assert [(int(k), int(seed)) for k, seed, _, _ in rows] == [(3, 1), (3, 2), (3, 3), (1, 0), (6, 0)]
    assert all(-1 <= float(spearman) <= 1 and 0 <= float(share) <= 100 for _, _, spearman, share in rows)
    assert stability.stdout == select(run, "--keep", "0.5").stdout


def test_restarts_and_stability_of_a_cover_without_the_hardest(here, run):
    """Single seeds drop other images, and so cover others: the overlap is that of the lists that they would give."""
    options = ["--keep", "0.5", "--order", "cover", "--drop-hardest", "0.3", "--by", "cluster", "--k", "4"]
    result = select(run, *options, "--restarts", "2", "--stability")
    rule = Rule(0.5, "cover", drop_hardest=0.3, by="cluster")
    single = [prune(rank("features.h5", k=4, seed=seed), rule).keep for seed in (0, 1)]
    share = (single[0] & single[1]).sum() / single[0].sum()
    assert share < 1
    assert f"the sets that single seeds keep overlap by {100 * share:.1f} %" in result.stderr
    assert "kept sets overlap" in result.stderr


def test_seed_changes_a_random_list_and_nothing_else_does(here, run):
    lists = [select(run, "--keep", "0.5", "--order", "random", *more).stdout for more in ([], ["--euclidean"])]
    assert lists[0] == lists[1]
    assert select(run, "--keep", "0.5", "--order", "random", "--seed", "1").stdout != lists[0]


def test_sampling_is_said(here, run):
    assert "iterations on a sample of 20 of 59 images" in select(run, "--keep", "0.5", "--train-points", "20").stderr


def test_flat_folders_get_the_square_root(here, run, feature_file):
    feature_file("flat.h5", np.random.default_rng(0).normal(size=(400, 4)))
    result = run("select", "flat.h5", "--keep", "0.5")
    assert "k = 20 (the square root of the number of images)" in result.stderr
    assert "classes:" not in result.stderr
    assert "no classes" in run("select", "flat.h5", "--keep", "0.5", "--balance", "0.5", "--by", "class", code=2).stderr


def test_names_that_are_not_utf8(here, run, feature_file):
    feature_file("odd.h5", blobs(3), paths=["a/caf\udce9.png", "a/two\nlines.png", "b/c.png"])
    assert "line break" in run("select", "odd.h5", "--keep", "1", code=2).stderr
    result = run("select", "odd.h5", "--keep", "1", "-0", "--manifest", "m.csv")
    assert result.stdout_bytes == b"a/caf\xe9.png\0a/two\nlines.png\0b/c.png\0"
    assert b"caf\xe9" in (here / "m.csv").read_bytes()


# --- errors: one line, the right exit code, no traceback


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.h5"], 2, "nowhere.h5: no such feature file; make one with `protoprune embed"),
        (["half.h5"], 1, "not finished, 30 of 60 images are embedded; run the same `protoprune embed` again"),
        (["garbage.h5"], 1, "garbage.h5: not a readable HDF5 file"),
        (["empty.h5"], 1, "empty.h5: not a readable HDF5 file"),
        (["foreign.h5"], 1, "an HDF5 file, but not a feature file"),
        (["."], 1, ".: a folder without set.json"),
        (["nan.h5"], 1, "features of 1 image are NaN or infinite (first: row 2)"),
        (["lost.h5"], 1, "none of its 60 images could be read"),
        (["--k", "many"], 2, "--k many: expected auto or a whole number"),
        (["--k", "0"], 2, "--k 0: expected at least 1"),
        (["--k", "60"], 2, "--k 60: more clusters than usable images (59)"),
        (["--keep", "0"], 2, "--keep 0: expected the fraction to keep"),
        (["--keep", "70"], 2, "for 70 % give 0.7"),
        (["--keep", "1.0000001"], 2, "--keep 1.0000001: expected"),
        (["--keep", "0.001"], 2, "--keep 0.001 of 59 images is none"),
        (["--keep", "half"], 2, "--keep"),
        (["--order", "best"], 2, "--order best: expected one of"),
        (["--by", "colour", "--balance", "0.5"], 2, "--by colour: expected class or cluster"),
        (["--by", "class"], 2, "--by goes with --balance"),
        (["--order", "cover", "--calibrate", "0.5"], 2, "--calibrate does not go with --order cover"),
        (["--order", "cover", "--stability"], 2, "--stability compares rankings by prototypes; --order cover is none"),
        (["--hard-links"], 2, "--hard-links goes with --links"),
        (["--overwrite"], 2, "--overwrite goes with --links"),
        (["--balance", "2"], 2, "--balance 2"),
        (["--drop-hardest", "1"], 2, "--drop-hardest 1: expected a fraction from 0 to below 1"),
        (["--quota", "even"], 2, "--quota even: expected dbp"),
        (["--quota", "dbp", "--order", "stratified"], 2, "--quota does not go with --order stratified"),
        (["--quota", "dbp", "--euclidean"], 2, "--quota dbp does not go with --euclidean"),
        (["--calibrate", "2"], 2, "--calibrate 2: expected a number from 0 to 1, the share"),
        (["--calibrate", "0.5", "--order", "random"], 2, "--calibrate does not go with --order random"),
        (["--calibrate", "0.5", "--drop-hardest", "0.1"], 2, "--calibrate does not go with --drop-hardest"),
        (["--dedup", "0"], 2, "--dedup 0: expected 1 - cosine from 0.00001 to below 1"),
        (["--dedup", "0.1", "--dedup-prefer", "best"], 2, "--dedup-prefer best: expected one of harder, central"),
        (["--dedup-prefer", "central"], 2, "--dedup-prefer central: goes with --dedup"),
        (["--scores", "s.csv", "--dedup", "0.1", "--restarts", "2"], 2, "--scores ranks without clustering"),
        (["--format", "xml"], 2, "--format xml: expected one of"),
        (["--format", "csv", "-0"], 2, "-0 goes with --format txt"),
        (["--backend", "sklearn"], 2, "--backend sklearn: expected one of"),
        (["--iterations", "0"], 2, "--iterations"),
        (["--restarts", "0"], 2, "--restarts"),
        (["--train-points", "2"], 2, "--train-points 2: fewer than the 3 clusters"),
        (["--seed", "-1"], 2, "--seed"),
        (["--seed", "99999999999999999999"], 2, "--seed"),
        (["--scores", "none.csv"], 2, "none.csv: no such score table"),
        (["--scores", "garbage.h5"], 1, "garbage.h5"),
        (["--scores", "s.csv", "--stability"], 2, "--scores ranks without clustering"),
        (["--scores", "s.csv", "--k", "3"], 2, "--scores ranks without clustering"),
        (["-o", "features.h5"], 2, "is one of the inputs"),
        (["--manifest", "features.h5"], 2, "is one of the inputs"),
        (["--scores", "s.csv", "-o", "s.csv"], 2, "s.csv: is one of the inputs"),
        (["--removed", "folder"], 2, "folder: a folder; name a file"),
        (["--scores", "blank.csv"], 1, "blank.csv: gives none of the images a score"),
        (["--scores", "s.csv", "--balance", "0.5", "--by", "cluster"], 2, "--by cluster does not go with --scores"),
        (["-o", "nowhere/kept.txt"], 2, "its folder does not exist"),
        (["--removed", "nowhere/gone.txt"], 2, "its folder does not exist"),
        (["--manifest", "nowhere/m.csv"], 2, "its folder does not exist"),
        (["--links", "linked"], 1, "does not exist; embed again, or give --root"),
    ],
)
def test_errors(here, run, inputs, arguments, code, message):
    shutil.copytree(inputs / "bad", here, dirs_exist_ok=True)
    given = arguments if "--keep" in arguments else [*arguments, "--keep", "0.5"]
    given = given if "--k" in arguments or "--scores" in arguments else [*given, "--k", "3"]
    result = run("select", *given, code=code)
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if "Usage:" not in result.stderr:  # Typer's own usage errors take two lines
        assert len(result.stderr.strip().splitlines()) == 1 or arguments == ["--links", "linked"]


def test_keep_must_be_given(here, run):
    assert "--keep" in run("select", code=2).stderr


def test_error_in_a_process_of_its_own(here, run_program):
    result = run_program("select", "nowhere.h5", "--keep", "0.5")
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: nowhere.h5: no such feature file")
    assert result.stderr.count(b"\n") == 1


# --- info


def test_info(here, run, inputs):
    text = run("info").stdout
    assert "features.h5: 60 images x 8 float32" in text
    assert "usable      59, the others: truncated 1" in text
    assert "classes     3" in text
    assert f"root        {inputs / 'images'}" in text
    assert "encoder     made-up" in text
    assert "clusterings" not in text
    select(run, "--keep", "0.5")
    assert re.search(r"clusterings 1 in features\.h5\.clusters, [\d.]+ kB", run("info").stdout)


def test_info_lists_what_could_not_be_read(here, run):
    assert run("info", "--errors").stdout == "ape/000.png\ttruncated\tmade up truncated\n"
    assert run("info", "nowhere.h5", code=2).stderr.startswith("error: nowhere.h5")


@pytest.mark.parametrize("name", ["kept.txt", "kept", "kept.csv", "kept.jsonl.gz", "kept.npy"])
def test_python_writes_what_the_command_writes(feature_file, run, tmp_path, name):
    file = feature_file(tmp_path / "f.h5", np.random.default_rng(0).normal(size=(40, 5)), failed={3: Status.CORRUPT})
    chosen = protoprune.select(file, keep=0.4, calibrate=0.5)
    for removed in (False, True):
        out, mine = tmp_path / f"command-{name}", tmp_path / name
        options = ["--removed", str(out), "-o", str(tmp_path / "other")] if removed else ["-o", str(out)]
        run("select", file, "--keep", "0.4", "--calibrate", "0.5", *options)
        chosen.write(mine, removed=removed)
        assert mine.read_bytes() == out.read_bytes() != b""


def test_python_writes_over_nothing_that_is_better(feature_file, tmp_path):
    file = feature_file(
        tmp_path / "f.h5", np.random.default_rng(0).normal(size=(40, 5)), paths=["a\nb.png", *PATHS[:39]]
    )
    chosen = protoprune.select(file, keep=1.0)
    os.link(file, tmp_path / "kept.jsonl")
    for name, message in (
        ("kept.jsonl", "kept.jsonl: is a feature file or a training record, and not written over"),
        ("kept.parquet", "kept.parquet: is written as .csv or .jsonl or .npy"),
        ("s3://bucket/kept.jsonl", "s3://bucket/kept.jsonl: "),
        ("new.txt", "1 file name holds a line break"),
        ("", "path"),
    ):
        with pytest.raises(ProtopruneError, match=message):
            chosen.write(tmp_path / name if name and "//" not in name else name)
    assert not (tmp_path / "new.txt").exists()
    assert (tmp_path / "kept.jsonl").samefile(file)
