"""`evaluate` and `scaling` as a user runs them, on heads and once on images."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_features
from training_helpers import pixels

from protoprune.cli.scaling import _vectors
from protoprune.cli.training import hint_steps
from protoprune.errors import ProtopruneError
from protoprune.images.decode import Status
from protoprune.training.loop import Recipe
from protoprune.units import rounded

CLASSES = ("ape", "bee", "cat")
N = 240
PATHS = sorted(f"{CLASSES[i % 3]}/{i:03d}.png" for i in range(N))


def blobs(paths: list[str], seed: int) -> np.ndarray:
    """(n, 6) features: a Gaussian for each class; of the training images the odd ones are another class's."""
    rng = np.random.default_rng(seed)
    label = np.array([CLASSES.index(path.partition("/")[0]) for path in paths])
    if seed == 0:
        label = np.where(np.array([wrong(path) for path in paths]), (label + 1) % 3, label)
    return 2.5 * np.eye(3, 6)[label] + rng.normal(size=(len(paths), 6))


def table(path: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def wrong(path: str) -> bool:
    return int(Path(path).stem) // 3 % 2 == 1


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_features(folder / "train.h5", blobs(PATHS, 0), root="images", paths=PATHS, failed={0: Status.TRUNCATED})
    write_features(folder / "test.h5", blobs(PATHS, 1), root="test-images", paths=PATHS)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, features, quick_heads):
    """train.h5 of 240 images, half of them in the wrong class and one unreadable, test.h5, and lists of both halves."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(features, tmp_path, dirs_exist_ok=True)
    good = [path for path in PATHS[1:] if not wrong(path)]
    Path("good.txt").write_text("".join(f"{path}\n" for path in good))
    Path("bad.txt").write_text("".join(f"{path}\n" for path in PATHS[1:] if wrong(path)))
    np.save("good.npy", [PATHS.index(path) for path in good])
    return tmp_path


QUICK = ["--features", "train.h5", "--test", "test.h5", "--device", "cpu"]  # a head, trained to convergence
NETWORK = [*QUICK, "--hidden", "8", "--epochs", "3", "--lr", "0.3", "--batch-size", "32", "--min-steps", "1"]


def test_two_lists_their_verdicts_and_files(here, run):
    options = ["--seeds", "4", "--selection-seconds", "12", "-o", "out"]
    result = run("evaluate", "good.txt", "bad.txt", *QUICK, *options)
    answer = result.stdout
    span = r"by [\d.]+ points \([\d.]+ to [\d.]+, 4 seeds\)"
    counts = r"the class counts alone make [+-][\d.]+ points$"
    for name, word in (("good.txt", "better"), ("bad.txt", "worse")):
        same = f"{word} than random images of the same class counts {span}"
        assert re.search(f"^{name}: {word} than random {span}; {same}; {counts}", answer, re.M)
    assert "allow for all 4 comparisons (Holm)" in answer
    assert "Heads are trained to convergence" in answer
    lines = answer.splitlines()[:8]
    assert re.split(" {2,}", lines[0].strip()) == [
        *("kept", "accuracy", "against random", "against same classes", "against everything", "worst class"),
        *("training", "saved", "selection", "net saved"),
    ]
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        *("good.txt", "bad.txt", "random 119", "random 120", "random, classes as good.txt"),
        *("random, classes as bad.txt", "everything"),
    ]
    assert "12.0 s" in lines[1]
    assert re.search(r"-1\d\.\d s$", lines[1])  # the selection cost more than one training of it saves
    assert "warning: 1 image of train.h5 cannot be read" in result.stderr
    assert re.search(r"^run 3/19: random 119, seed 0: [\d.]+ % in [\d.]+ s, [\d.]+ s left$", result.stderr, re.M)
    rows = table("out/results.csv")
    assert len(rows) == 3 + 4 * 4  # lists and everything give one number
    assert {"good.txt", "bad.txt", "everything"} < {row["method"] for row in rows}
    whole = json.loads(Path("out/results.json").read_text())
    assert whole["config"]["recipe"]["model"] == "head"
    assert whole["budget"] == "convergence"
    (summary,) = [row for row in table("out/summary.csv") if row["method"] == "good.txt"]
    assert summary["to_classes_verdict"] == summary["verdict"] == "better"
    parts = float(summary["to_classes"]) + float(summary["class_counts"])
    assert parts == pytest.approx(float(summary["to_random"]))
    assert whole["config"]["lists"] == ["good.txt", "bad.txt"]
    assert Path("out/figure.png").stat().st_size > 5_000


def test_a_second_call_does_only_the_rest(here, run):
    first = run("evaluate", "good.txt", *QUICK, "--seeds", "2", "-o", "out")
    before = Path("out/results.csv").read_bytes()
    again = run("evaluate", "good.txt", *QUICK, "--seeds", "2", "-o", "out")
    assert again.stdout == first.stdout  # times are those of the runs, not of this call
    assert "6 of 6 runs were there already, in out/runs" in again.stderr  # one, 2 x random, 2 x its classes, everything
    assert Path("out/results.csv").read_bytes() == before
    more = run("evaluate", "good.txt", "bad.txt", *QUICK, "--seeds", "2", "-o", "out").stderr
    assert len(re.findall("^run ", more, re.M)) == 5  # the other list, and random subsets of its size and classes
    seeds = run("evaluate", "good.txt", *QUICK, "--seeds", "3", "-o", "out").stderr
    assert "6 of 8 runs were there already, in out/runs" in seeds
    assert re.findall("already|^run ./8", seeds, re.M) == ["already", "run 7/8", "run 8/8"]


def test_row_indices_count_unreadable_images_too(here, run):
    more = ["--seeds", "1", "--no-everything", "--no-class-counts", "-o", "out"]
    run("evaluate", "good.txt", "good.npy", *QUICK, *more)
    rows = {row["method"]: row for row in table("out/results.csv")}
    assert rows["good.txt"]["accuracy"] == rows["good.npy"]["accuracy"]
    assert list(rows) == ["good.txt", "good.npy", "random 119"]


def test_one_seed_gives_numbers_and_no_verdict(here, run):
    answer = run("evaluate", "good.txt", *QUICK, "--seeds", "1").stdout
    assert "one seed gives no interval and so no verdict" in answer
    assert "better" not in answer
    assert "one seed gives no interval" in answer.splitlines()[5].partition("; ")[2]  # against its class counts too
    assert "are over test images (95 %)" in answer
    assert "cover the seeds" not in answer  # what is not there is not explained
    assert "Holm" not in answer


def test_weights_of_a_list_are_used(here, run):
    record = "".join(f"{path},{0.001 if wrong(path) else 1.999}\n" for path in PATHS[1:])
    Path("weighted.csv").write_text("path,weight\n" + record)
    Path("all.txt").write_text("".join(f"{path}\n" for path in PATHS[1:]))
    run("evaluate", "weighted.csv", "all.txt", *QUICK, "--seeds", "2", "--no-everything", "-o", "out")
    found = {row["method"]: float(row["accuracy"]) for row in table("out/summary.csv")}
    assert found["weighted.csv"] > found["all.txt"] + 0.1


def test_dynamic_methods_and_time_to_an_accuracy(here, run):
    pytest.importorskip("protoprune.samplers")
    options = ["--dynamic", "random", "--dynamic", "ucb", "--keep", "0.3", "--every", "1", "--target-accuracy", "0.34"]
    answer = run("evaluate", *NETWORK, *options, "--seeds", "2").stdout
    assert re.search(r"^dynamic random 0.3 every=1 .* (\d\.\d+ s|\d of 2 seeds)$", answer, re.M)
    assert "dynamic ucb 0.3 every=1: " in answer
    assert "to 34 %" in answer.splitlines()[0]
    assert "random 72" in answer


def test_a_network_on_images(here, run, image_tree):
    train = image_tree({"ape": 6, "bee": 6})
    test = image_tree({"ape": 3, "bee": 3}, folder=here / "held-out")
    Path("few.txt").write_text("ape/000.png\nape/001.png\nbee/000.png\nbee/003.png\n")
    options = ["--image-size", "16", "--epochs", "1", "--batch-size", "4", "--seeds", "1", "--device", "cpu"]
    options += ["--min-steps", "1"]
    answer = run("evaluate", "few.txt", "--images", train, "--test", test, *options).stdout
    assert re.search(r"^few.txt +4 \(33.3 %\) ", answer, re.M)
    assert re.search(r"^everything +12 \(100 %\) ", answer, re.M)


def test_scaling_sweeps_fits_and_draws(here, run):
    sizes = ["--size", "30,60,120,239", "--keep", "1,0.5", "--order", "hard,random", "--k", "3"]
    result = run("scaling", *QUICK, *sizes, "--seeds", "2", "--bootstrap", "3", "-o", "out")
    assert result.stdout.splitlines()[0].split() == [
        "error",
        "(%)",
        "of",
        "keep",
        "30",
        "60",
        "120",
        "239",
    ]
    for curve in ("all", "hard 0.5", "random 0.5", "Pareto envelope, hard"):
        assert re.search(f"^{curve}: ", result.stdout, re.M)
    assert len(table("out/results.csv")) == 2 * 4 * 3
    assert {row["law"] for row in table("out/fits.csv")} == {*("power", "exponential", "power with offset")}
    assert Path("out/figure.png").stat().st_size > 5_000
    assert json.loads(Path("out/results.json").read_text())["config"]["sizes"] == [30, 60, 120, 239]
    again = run("scaling", *QUICK, *sizes, "--seeds", "2", "--bootstrap", "3", "-o", "out")
    assert without_intervals(again.stdout) == without_intervals(result.stdout)
    assert "24 of 24 runs were there already" in again.stderr
    assert "Intervals (95 %) cover the seeds, not the choice of the law; a law wins with AICc 6" in result.stdout
    assert "in nine of ten samples too" in result.stdout  # a law 6.8 ahead was undecided, and nothing said why
    one = run("scaling", *QUICK, *sizes, "--seeds", "1", "--bootstrap", "0", "-o", "out").stdout
    assert "A law wins with AICc 6 (20 to 1) ahead." in one
    assert "Intervals" not in one
    run("scaling", *QUICK, "--size", "30", "--keep", "1", "--seeds", "1", "-o", "out")
    assert not Path("out/fits.csv").exists()  # of the sizes before: one size has no law


def without_intervals(text: str) -> list[str]:
    """Words of the tables: a law that fits exactly has a bootstrap that hangs on the last bit of a sum."""
    return re.sub(r"\([^)]*\)", "", text).split()


def test_scaling_by_a_score_table(here, run):
    Path("s.csv").write_text("path,score\n" + "".join(f"{path},{int(wrong(path))}\n" for path in PATHS))
    sizes = ["--size", "60,239", "--keep", "0.3", "--order", "hard,easy", "--scores", "s.csv", "--seeds", "2"]
    run("scaling", *QUICK, *sizes, "-o", "out")
    rows = table("out/points.csv")
    error = {(row["order"], row["size"]): float(row["error"]) for row in rows}
    assert error["hard", "239"] > error["easy", "239"] + 0.2  # the hard ones are those in the wrong class
    run("scaling", *QUICK, *sizes, "--higher-is", "easier", "-o", "turned")
    turned = {(row["order"], row["size"]): float(row["error"]) for row in table("turned/points.csv")}
    assert turned["easy", "239"] == error["hard", "239"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--test", "test.h5"], 2, "no training set"),
        (["--images", ".", "--model", "head", "--test", "test.h5"], 2, "protoprune embed ."),
        (["--images", ".", "--test", "test.h5"], 2, "the form of the training set"),
        (["--features", "train.h5", "--test", "."], 2, "the form of the training set"),
        (["--features", "train.h5", "--model", "cnn", "--test", "test.h5"], 2, "give --images FOLDER"),
        (["--images", ".", "--features", "train.h5", "--model", "cnn", "--test", "."], 2, "goes with --model head"),
        ([*QUICK, "--dynamic", "random"], 2, "--keep FRACTION go together"),
        ([*QUICK, "--selection-seconds", "-1"], 2, "--selection-seconds -1: not a number from 0"),
        ([*QUICK, "--selection-seconds", "1", "--selection-seconds", "2"], 2, "2 numbers for 1 lists"),
        ([*QUICK, "--budget", "time"], 2, "--budget time"),
        ([*QUICK, "--hidden", "4", "--lr", "-1"], 2, "--lr -1"),
        ([*QUICK, "--lr", "0.3"], 2, "--lr 0.3: a linear head is trained to convergence"),
        ([*QUICK, "--budget", "steps"], 2, "--budget steps: a linear head"),
        ([*QUICK, "--dynamic", "rs2", "--keep", "0.5"], 2, "train a network, if only a small one"),
        (["--features", "none.h5", "--test", "test.h5"], 2, "none.h5"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(here, run, arguments, code, message):
    result = run("evaluate", "good.txt", *arguments, code=code)
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert result.stdout == ""


def test_a_list_of_other_images_is_refused_with_a_count(here, run):
    Path("other.txt").write_text(f"{PATHS[1]}\nzebra/1.png\nzebra/2.png\n")
    error = run("evaluate", "other.txt", *QUICK, code=1).stderr
    assert "other.txt: 2 of its 3 images are not usable training images of images (first: zebra/1.png" in error
    Path("unreadable.txt").write_text(f"{PATHS[0]}\n")
    assert "cannot be read: made up truncated" in run("evaluate", "unreadable.txt", *QUICK, code=1).stderr


def test_a_manifest_is_the_list_of_what_it_keeps(here, run):
    Path("all.csv").write_text("path,keep\n" + "".join(f"{path},{i % 3}\n".replace(",2", ",1")
                                                      for i, path in enumerate(PATHS[1:])))  # fmt: skip
    kept = [path for i, path in enumerate(PATHS[1:]) if i % 3]
    Path("kept.txt").write_text("".join(f"./{path}\r\n" for path in kept))
    results = []
    for name in ("all.csv", "kept.txt"):
        run("evaluate", name, *QUICK, "-o", f"of-{name}")
        results.append(Path(f"of-{name}", "results.csv").read_text().replace(name, "the list"))
    assert results[0] == results[1]
    assert f"the list,list,{len(kept)}," in results[0]


def test_ctrl_c_says_how_to_go_on(here, run, monkeypatch):
    from protoprune.training import converged

    fit, calls = converged.fit_head, []

    def interrupted(*arguments, **options):
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(converged, "fit_head", interrupted)
    error = run("evaluate", "good.txt", *QUICK, "--seeds", "2", "-o", "out", code=130).stderr
    assert "interrupted: the runs done are kept in out/runs" in error
    calls[:] = [0, 0]
    error = run("evaluate", "good.txt", *QUICK, "--seeds", "2", "-o", "new", code=130).stderr
    assert "interrupted: nothing was done yet; to go on, run the same again:" in error  # and there is no such folder
    assert not Path("new").exists()
    run("evaluate", "good.txt", *QUICK, "--seeds", "2", "-o", "out")
    assert len(calls) == 3 + 4


def test_scaling_says_what_it_lacks(here, run, image_tree):
    train = image_tree({"ape": 6, "bee": 6})
    error = run("scaling", "--images", train, "--test", train, "--size", "6,12", "--image-size", "16", code=2).stderr
    assert "give --features or --scores" in error
    assert "expected whole numbers" in run("scaling", *QUICK, "--size", "1e3", code=2).stderr


def test_features_that_rank_need_no_classes(tmp_path, feature_file):
    """Images whose classes are in a file, with features that were embedded without it."""
    train, names = pixels(4), [f"{i}.png" for i in range(6)]
    train.paths = [names[row] for row in (0, 2, 3, 5)]
    own = np.arange(12.0).reshape(6, 2)
    out = feature_file(tmp_path / "f.h5", own, paths=names, failed={1: Status.CORRUPT})
    assert _vectors(Path(out), train).tolist() == own[[0, 2, 3, 5]].tolist()
    train.paths[1] = names[1]
    with pytest.raises(ProtopruneError, match=r"first: 1.png cannot be read"):
        _vectors(Path(out), train)


def test_a_bad_option_is_said_before_anything_is_loaded(here, run, monkeypatch):
    from protoprune.training import examples

    monkeypatch.setattr(examples, "load_examples", None)
    Path("file").touch()
    sets = ["--features", "train.h5", "--test", "test.h5"]
    for arguments in (
        ["evaluate", "good.txt", *sets, "--budget", "days"],
        ["evaluate", "good.txt", *sets, "--target-accuracy", "90"],
        ["evaluate", "none.txt", *sets],
        ["evaluate", "good.txt", *sets, "-o", "file"],
        ["evaluate", "good.txt", *sets, "-o", "file/new"],
        ["evaluate", *sets, "--dynamic", "best", "--keep", "0.5"],
        ["evaluate", "good.txt", *sets, "--device", "abacus"],
        ["evaluate", "good.txt", "--images", ".", "--test", ".", "--model", "cnn", "--weights", "none.pt"],
        ["scaling", *sets, "--size", "50", "--device", "abacus"],
        ["scaling", "--images", ".", "--test", ".", "--size", "50", "--weights", "none.pt", "--order", "random"],
        ["scaling", "--images", ".", "--test", ".", "--size", "50", "--features", "none.h5"],
        ["scaling", *sets, "--size", "50", "--scores", "none.csv"],
        ["scaling", *sets, "--size", "50", "--k", "0"],
        ["scaling", *sets, "--size", "50", "--balance", "7"],
        ["scaling", *sets, "--size", "50", "--higher-is", "harder"],
        ["scaling", *sets, "--size", "50", "--order", "worst"],
        ["scaling", *sets, "--size", "50", "--keep", "50"],
        ["scaling", *sets, "--size", "50", "-o", "file"],
    ):
        result = run(*arguments, code=2)
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


@pytest.mark.parametrize("command", ["evaluate", "scaling", "record"])
def test_features_of_another_encoder_are_refused(here, run, command, feature_file):
    arguments = {
        "evaluate": ["evaluate", "good.txt", "--features", "train.h5"],
        "scaling": ["scaling", "--features", "train.h5", "--size", "50,100", "--order", "random"],
        "record": ["record", "train.h5"],
    }[command]
    for name, value in (("encoder", "another"), ("weights_sha256", "1" * 64), ("preprocess", "224 pixels")):
        feature_file("other.h5", blobs(PATHS, 1), paths=PATHS, root="test-images", made_by={name: value})
        error = run(*arguments, "--test", "other.h5", code=2).stderr
        assert "the test features were not made as the training features were" in error
        assert f"{name.replace('_', ' ')}: " in error
    feature_file(
        "other.h5",
        blobs(PATHS, 1)[:, :2],
        paths=PATHS,
        root="test-images",
        made_by={"encoder": "another", "preprocess": "x"},
    )
    error = run(*arguments, "--test", "other.h5", code=2).stderr
    assert "were (encoder: another, not " in error
    assert "preprocess" not in error
    feature_file("test.h5", blobs(PATHS, 1), paths=PATHS, root="test-images", made_by={"precision": "bf16"})
    more = [] if command == "record" else ["--device", "cpu", "--seeds", "1"]
    more += ["--epochs", "1"] if command == "record" else []
    warned = run(*arguments, "--test", "test.h5", *more).stderr
    assert "differ from the training features in precision: bf16, not fp32: in the last digits" in warned


def test_imported_vectors_go_together_where_their_encoder_is_called_the_same(here, run):
    """The digest that stands for weights is that of the vectors, and so never that of the test set."""
    for seed, name in enumerate(("v", "w")):
        np.savez(f"{name}.npz", features=blobs(PATHS, seed), paths=np.array(PATHS))
        run("import", f"{name}.npz", "-o", f"{name}.h5", "--encoder", "clip")
        run("import", f"{name}.npz", "-o", f"{name}-unnamed.h5")
    rest = ["--seeds", "1", "--no-class-counts", "--no-everything"]
    result = run("evaluate", "good.txt", "--features", "v.h5", "--test", "w.h5", *rest)
    assert "warning" not in result.stderr
    error = run("evaluate", "good.txt", "--features", "v-unnamed.h5", "--test", "w-unnamed.h5", *rest, code=2).stderr
    assert (
        "(encoder: imported: w.npz, not imported: v.npz); if one encoder made both, import both with its name" in error
    )


def test_the_python_api_refuses_them_too(here, feature_file):
    from protoprune.errors import UsageError
    from protoprune.evaluation import Kept, evaluate, scaling
    from protoprune.training import recording
    from protoprune.training.examples import load_examples
    from protoprune.training.loop import Recipe

    feature_file("test.h5", blobs(PATHS, 1), paths=PATHS, root="test-images", made_by={"encoder": "another"})
    train = load_examples("train.h5")
    test, recipe = load_examples("test.h5", classes=train.classes), Recipe.for_model("head")
    for call in (
        lambda: evaluate(train, test, [Kept("a", np.arange(50))], recipe),
        lambda: scaling(train, test, recipe, sizes=[50], orders=["random"]),
        lambda: recording.plan(train, test, recipe),
    ):
        with pytest.raises(UsageError, match="encoder: another, not made-up"):
            call()


def test_scarce_images_and_uneven_classes_give_no_false_winner(tmp_path, monkeypatch, feature_file, run):
    """A hard list of scarce, uneven images, worse than random, which a training of fixed length finds better.

    Thirty classes in proportion 1 to 30; a floor for each class evens them out, and twenty epochs of few images are
    too short to learn more than which classes are large. One image in 25 is in the wrong class, and most of those are
    among the hard ones. scikit-learn, on the same lists, is the judge.
    """
    linear_model = pytest.importorskip("sklearn.linear_model")
    from protoprune.evaluation.runs import random_rows
    from protoprune.training import loop
    from protoprune.training.examples import load_examples

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    means = 0.8 * rng.normal(size=(30, 32))

    def draw(each: int, name: str, wrong: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(30), each * np.arange(1, 31))
        shown = (labels + wrong * (np.arange(len(labels)) % 25 == 0)) % 30
        features = (means[shown] + rng.normal(size=(len(labels), 32))).astype(np.float32)
        paths = [f"{label:02d}/{i:04d}.png" for i, label in enumerate(labels)]
        feature_file(name, features, paths=paths, root=name)
        return paths, labels, features

    paths, labels, features = draw(4, "train.h5", wrong=7)
    _, truth, new = draw(3, "test.h5")
    distance = np.linalg.norm(features - means[labels], axis=1)
    own = [np.flatnonzero(labels == label) for label in range(30)]
    hard = np.sort(np.concatenate([rows[np.argsort(-distance[rows])[: 8 + len(rows) // 8]] for rows in own]))
    Path("hard.txt").write_text("".join(f"{paths[row]}\n" for row in hard))
    sets = ["--features", "train.h5", "--test", "test.h5", "--device", "cpu", "--no-everything"]
    run("evaluate", "hard.txt", *sets, "--seeds", "4", "-o", "out")
    (found,) = [row for row in table("out/summary.csv") if row["method"] == "hard.txt"]

    draws = [random_rows(len(paths), len(hard), seed) for seed in range(4)]
    train, test = load_examples("train.h5"), load_examples("test.h5")
    short = [np.mean(loop.fit(train, test, loop.Recipe.for_model("head"), rows=rows, device="cpu").predictions == truth)
             for rows in (hard, draws[0])]  # fmt: skip
    assert short[0] > short[1] + 0.03  # what a training of fixed length says

    scale = features.std(0, ddof=1) * 32**0.5
    runs = json.loads(Path("out/results.json").read_text())["runs"]
    strengths = {(row["method"], row["seed"]): row["strength"] for row in runs}

    def judge(rows: np.ndarray, method: str, seed: int) -> float:
        model = linear_model.LogisticRegression(C=strengths[method, seed], max_iter=2000)
        return model.fit(features[rows] / scale, labels[rows]).score(new / scale, truth)

    randoms = [judge(rows, f"random {len(hard)}", seed) for seed, rows in enumerate(draws)]
    theirs = judge(hard, "hard.txt", 0) - np.mean(randoms)
    assert float(found["to_random"]) == pytest.approx(theirs, abs=0.005)
    assert theirs < 0
    assert found["verdict"] != "better"
    assert found["to_classes_verdict"] == "worse"
    assert float(found["class_counts_low"]) > 0  # even classes hide what hard images cost


def test_few_steps_are_said_before_the_training(capsys):
    """24 images in batches of 8 are 3 steps an epoch; every run takes 500 unless --min-steps says otherwise."""
    cnn, head = (Recipe.for_model(model, epochs=2, batch_size=8) for model in ("cnn", "head"))
    own = "hint: 2 epochs of 24 images are 6 optimizer steps"
    for recipe, least, said in (
        (cnn, None, f"{own}; every run takes 500 at least (--min-steps)\n"),
        (cnn, 4, f"{own}, and networks that take fewer than 500 have mostly not learned; --epochs 167 makes 500\n"),
        (cnn, 9, f"{own} (9 by --min-steps), and networks that take fewer than 500 have mostly not learned; "
                 "--epochs 167 makes 500\n"),
        (replace(cnn, epochs=167), None, ""), (head, None, ""),
        (replace(head, hidden=4), None, f"{own}; every run takes 500 at least (--min-steps)\n"),
    ):  # fmt: skip
        hint_steps(recipe, 24, least)
        assert capsys.readouterr().err == said


def test_features_that_are_no_numbers_are_refused(here, run, feature_file):
    """A model answers for NaN too, always with some class."""
    vectors = blobs(PATHS, 1)
    vectors[7, 2], vectors[9, 0] = np.nan, np.inf
    feature_file("odd.h5", vectors, paths=PATHS, root="test-images")
    said = f"odd.h5: the vector of {PATHS[7]} is NaN or infinite"
    for command in (
        ["evaluate", "good.txt", *QUICK[:2], "--test", "odd.h5"],
        ["evaluate", "good.txt", "--features", "odd.h5", *QUICK[2:]],
        ["scaling", *QUICK[:2], "--test", "odd.h5", "--size", "50", "--order", "random"],
        ["record", "odd.h5", "-o", "r.h5"], ["record", "train.h5", "--test", "odd.h5", "-o", "r.h5"],
    ):  # fmt: skip
        assert said in run(*command, code=1).stderr
    assert not list(here.glob("r.h5*"))
    from protoprune import Kept, Recipe, evaluate, load_examples

    train, test = load_examples("train.h5"), load_examples("test.h5")
    test.inputs[3] = np.nan
    with pytest.raises(ProtopruneError, match=r"the test set: the vector of ape/009.png is NaN"):
        evaluate(train, test, [Kept("a", np.arange(50))], Recipe.for_model("head"))


def test_test_images_of_the_training_set_are_said_once(here, run):
    result = run("evaluate", "good.txt", *QUICK[:2], "--test", "train.h5", "--seeds", "1", "--no-class-counts")
    assert result.stderr.count("says nothing about new images") == 1
    assert "239 of the 239 test images are the training set itself" in result.stderr


def test_a_set_without_classes_is_called_what_it_is(here, run, feature_file):
    feature_file("apes.h5", blobs(PATHS[:20], 1), paths=PATHS[:20], root="test-images")
    error = run("evaluate", "good.txt", *QUICK[:2], "--test", "apes.h5", code=1).stderr
    assert "apes.h5: a test set needs labels, and no two classes were found; " in error
    assert error.endswith("or give --labels FILE to `protoprune embed`\n")
    feature_file("none.h5", blobs(PATHS, 1), paths=PATHS, failed=dict.fromkeys(range(N), Status.CORRUPT))
    for option in ("--test", "--features"):
        error = run("evaluate", "good.txt", *QUICK, option, "none.h5", code=1).stderr
        assert "none.h5: none of its 240 images could be read" in error


def test_a_table_counts_the_images_that_cannot_be_read_too(here, run):
    """As for `select`: its row numbers, and its places, are those of the feature file."""
    scores = [int(wrong(path)) for path in PATHS]
    Path("names.csv").write_text(
        "path,score\n" + "".join(f"{path},{one}\n" for path, one in zip(PATHS, scores, strict=True))
    )
    Path("rows.csv").write_text("index,score\n" + "".join(f"{row},{one}\n" for row, one in enumerate(scores)))
    np.save("places.npy", np.array(scores, float))
    sizes = ["--size", "60,239", "--keep", "0.3", "--order", "hard", "--seeds", "1"]
    points = []
    for name, more in (("names.csv", []), ("rows.csv", []), ("places.npy", ["--by-place"])):
        run("scaling", *QUICK, *sizes, "--scores", name, *more, "-o", f"of-{name}")
        points.append([row["error"] for row in table(f"of-{name}/points.csv")])
    assert points[0] == points[1] == points[2]
    np.save("few.npy", np.array(scores[1:], float))  # those that can be read: whose is the first?
    error = run("scaling", *QUICK, *sizes, "--scores", "few.npy", "--by-place", code=1).stderr
    assert "few.npy: shape (239,), expected (240,)" in error


def test_what_is_no_list_is_said(here, run):
    assert run("evaluate", ".", *QUICK, code=2).stderr.endswith(".: a folder; give a file that lists the images\n")
    os.mkfifo("pipe")
    assert "pipe: a pipe or a device, which can be read only once" in run("evaluate", "pipe", *QUICK, code=2).stderr
    Path("s.csv").write_text("path,el2n\n" + "".join(f"{path},0.5\n" for path in PATHS[1:]))
    said = run("evaluate", "s.csv", *QUICK, "--seeds", "1", "--no-class-counts").stderr
    assert (
        said.count("s.csv: has a column el2n and none of a list (keep, index, weight), so that all its 239 rows") == 1
    )


@pytest.mark.parametrize("option", [["--epochs", "20"], ["--batch-size", "256"], ["--schedule", "linear"],
                                    ["--precision", "auto"], ["--lr", "0.1"], ["--min-steps", "500"]])  # fmt: skip
def test_what_a_head_has_no_use_for_is_refused_with_its_default_too(here, run, option):
    for command in (["evaluate", "good.txt"], ["scaling", "--size", "50"]):
        error = run(*command, *QUICK, *option, code=2).stderr
        assert f"{' '.join(option)}: a linear head is trained to convergence, and this changes nothing" in error


def test_results_of_others_are_not_written_over(here, run):
    Path("mine").mkdir()
    Path("mine/results.csv").write_text("mine")
    error = run("evaluate", "good.txt", *QUICK, "-o", "mine", code=2).stderr
    assert "-o mine: holds a results.csv that `protoprune evaluate` did not write; choose another folder" in error
    assert Path("mine/results.csv").read_text() == "mine"
    assert list(Path("mine").iterdir()) == [Path("mine/results.csv")]
    Path("mine/results.json").write_text("[" * 100_000)
    assert "-o mine: holds a results.csv" in run("evaluate", "good.txt", *QUICK, "-o", "mine", code=2).stderr
    quick = [*QUICK, "--seeds", "1"]
    run("evaluate", "good.txt", *quick, "--no-class-counts", "-o", "out")
    for command in (["scaling", *quick, "--size", "50"], ["tune", "--features", "train.h5", "--keep", "0.5"]):
        error = run(*command, "-o", "out", code=2).stderr
        assert "-o out: holds what `protoprune evaluate` found; choose another folder" in error
    Path("out/results.json").unlink()  # as when it was stopped
    run("evaluate", "bad.txt", *quick, "--no-class-counts", "-o", "out")
    assert {row["method"] for row in table("out/summary.csv")} == {"bad.txt", "random 120", "everything"}


def test_no_zero_has_a_minus():
    assert [rounded(-0.04, sign="+"), rounded(0.04, sign="+"), rounded(-0.004, 2), rounded(-0.06, sign="+")] == [
        "+0.0", "+0.0", "0.00", "-0.1"
    ]  # fmt: skip


def test_a_first_run_that_fails_leaves_no_folder(here, run):
    network = [*QUICK, "--hidden", "4", "--epochs", "1", "--min-steps", "5", "--seeds", "1"]
    for command in (["evaluate", "good.txt"], ["scaling", "--size", "50", "--order", "random"]):
        assert "the loss is " in run(*command, *network, "--lr", "1e30", "-o", "new/out", code=1).stderr
        assert not (here / "new" / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--keep 1 --order easy", "--order easy: --keep 1 leaves nothing out"),
        ("--keep 1 --k 3", "--k 3: --keep 1 ranks nothing"),
        ("--keep 1 --balance 0.5", "--balance 0.5: --keep 1 leaves nothing out"),
        ("--seeds 1 --bootstrap 9", "--bootstrap 9: draws from several seeds"),
    ],
)
def test_what_a_sweep_has_no_use_for_is_refused(here, run, option, message):
    assert f"error: {message}" in run("scaling", *QUICK, "--size", "30,60", *option.split(), code=2).stderr
