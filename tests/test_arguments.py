"""Arguments of the wrong kind: one sentence says what was expected, whatever is given and to whatever is public."""

from __future__ import annotations

import decimal
import os
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import protoprune
from protoprune.arguments import check_kind, checked, plain, texts
from protoprune.errors import ProtopruneError, UsageError
from protoprune.samplers import InfoBatchSampler, UCBSampler
from protoprune.theory import advice, information, solver
from protoprune.training.converged import Space, fit_head

WRONG = [
    None, True, 3, -1, 0.5, float("nan"), b"x", "nowhere", np.float16(0.5), np.arange(3.0), np.array(1),
    np.zeros((2, 2)), np.array([True, False]), np.array(["a", "b"]), torch.tensor([0.5, 1.0]), [1, 2], ["a", "b"],
    {"a": 1}, {1}, object(), decimal.Decimal("0.5"), Path("nowhere"), 1j, 10**30, int, lambda: None,
]  # fmt: skip
# Some of these are right for some arguments: here only errors count.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that public functions take, small."""
    from helpers import write_image

    folder = tmp_path_factory.mktemp("world")
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        write_image(folder / "images" / f"{name}.png", seed=len(name))
    images, encoder = protoprune.list_folder(folder / "images"), protoprune.load_encoder("mini")
    protoprune.embed(images, encoder, folder / "f.h5", device="cpu")
    ids = list(images.paths)
    protoprune.write_scores(folder / "s.csv", ids, np.arange(4.0), metric="m")
    (folder / "kept.txt").write_text("\n".join(ids[:2]))
    before = os.getcwd()
    os.chdir(folder)
    yield {"folder": folder, "images": images, "encoder": encoder, "ids": ids}
    os.chdir(before)


def calls(world):
    """(function, its arguments by name) of all that is public and can be called with little."""
    folder, ids, images = world["folder"], world["ids"], world["images"]
    file, two = folder / "f.h5", {"a": np.arange(4.0), "b": np.arange(4.0)}
    vectors, labels = np.random.default_rng(0).normal(size=(12, 3)), np.repeat([0, 1], 6)
    data = protoprune.load_examples(file)
    ranking = protoprune.rank(file, cache=False)
    no = {"features": file, "cache": False, "keep": 0.5, "clusters": None, "scores": None, "higher_is": None,
          "rows": None, "by_place": False, "dedup": None, "dedup_prefer": None, "count": False, "k": None,
          "euclidean": False, "iterations": 2, "restarts": 1, "train_points": None, "backend": "auto", "order": "hard",
          "drop_hardest": 0.0, "quota": None, "balance": 0.0, "by": None, "calibrate": None, "seed": 0}  # fmt: skip
    yield protoprune.select, no
    yield protoprune.rank, {"features": file, "clusters": None}
    yield protoprune.prune, {"ranking": ranking, "keep": 0.5}
    yield protoprune.list_folder, {"root": images.root, "labels": True, "class_level": None, "on_progress": None}
    yield protoprune.list_paths, {"entries": ids, "root": images.root, "labels": True, "class_level": None}
    yield protoprune.LabelFile, {"path": "x", "column": None, "names": None}
    yield (
        protoprune.load_encoder,
        {"name": "mini", "weights": None, "image_size": None, "pool": None, "decode": "exact"},
    )
    yield protoprune.Preprocess, {"size": 8, "resize": 8, "interpolation": "bicubic", "crop_mode": "center",
                                  "mean": (0, 0, 0), "std": (1, 1, 1), "decode": "exact"}  # fmt: skip
    yield protoprune.Preprocess(8, 8).apply, {"pixels": np.zeros((9, 9, 3), np.uint8)}
    yield protoprune.embed, {"images": images, "encoder": world["encoder"], "out": file, "device": "cpu",
                             "precision": "auto", "batch_size": None, "workers": None, "store": "float16",
                             "overwrite": False, "moved": False, "on_compare": None}  # fmt: skip
    yield protoprune.embed_shards, {"source": None, "encoder": None}
    yield protoprune.find_shards, {"spec": "x"}
    yield protoprune.import_features, {"vectors": "x.npy", "out": "y.h5", "paths": ids, "root": None, "encoder": "",
                                       "vector_column": None, "path_column": None, "store": "auto", "labels": True,
                                       "class_level": None, "overwrite": False}  # fmt: skip
    yield protoprune.merge, {"folder": "x", "out": "y", "overwrite": False}
    yield protoprune.FeatureSet, {"folder": "x"}
    yield protoprune.FeatureFile, {"path": "x"}
    yield protoprune.Record, {"path": "x", "unfinished": False}
    yield protoprune.read_list, {"source": "x", "every": False}
    yield protoprune.read_weights, {"source": "x"}
    yield protoprune.table_rows, {"kept": ids, "files": ["x.parquet"], "root": None, "id_column": None}
    yield protoprune.weights_of, {"dataset": [1], "kept": {"a": 1.0}, "root": None}
    yield protoprune.keep_only, {"dataset": 3, "kept": ids, "root": None}
    yield protoprune.reshard, {"kept": ids, "out": "r", "root": "nowhere", "features": None, "shard_size": 5,
                               "options": None, "on_progress": None}  # fmt: skip
    yield protoprune.score, {"name": "random", "source": file, "seed": 0}
    yield protoprune.compare, {"tables": two, "paths": ids, "keeps": (), "labels": None, "classes": None,
                               "by_class": False, "resamples": 2, "level": 0.95, "seed": 0}  # fmt: skip
    yield protoprune.read_scores, {"source": folder / "s.csv", "paths": ids, "higher_is": None, "rows": None,
                                   "by_place": False}  # fmt: skip
    yield protoprune.write_scores, {"path": folder / "o.csv", "paths": ids, "scores": np.arange(4.0), "metric": "m",
                                    "provenance": None}  # fmt: skip
    yield protoprune.load_examples, {"source": file, "classes": None, "labels": True, "class_level": None}
    yield protoprune.list_rows, {"listed": ids, "examples": data, "name": "x"}
    yield protoprune.Kept, {"name": "x", "rows": np.arange(2), "weights": None, "selection_seconds": None}
    yield protoprune.Recipe, {"model": "cnn", "schedule": "linear", "augment": "none", "weights": None,
                              "precision": "auto", "compile": False}  # fmt: skip
    yield protoprune.evaluate, {"train": data, "test": data, "lists": [], "recipe": None, "seeds": 1, "dynamic": (),
                                "budget": None, "folder": None, "device": "cpu", "fit": None}  # fmt: skip
    yield protoprune.scaling, {"train": data, "test": data, "recipe": None, "sizes": [2], "keeps": [1.0],
                               "orders": ["random"], "seeds": 1, "folder": None, "k": None}  # fmt: skip
    yield Space, {"vectors": vectors, "device": "cpu"}
    yield fit_head, {"vectors": vectors, "labels": labels, "classes": 2, "rows": None, "weights": None,
                     "strength": 1.0, "near": None, "seed": 0}  # fmt: skip
    yield solver.solve, {"alpha_tot": 5.0, "keep": 0.5, "theta": 0.0, "order": "hard", "margin": "absolute"}
    yield solver.crossover, {"keep": 1.0, "rival": "easy", "span": (0.0, 1.0)}
    yield information.energetic_gain, {"overlap": 0.5, "keep": 0.5}
    yield information.information_gain, {"alpha_prune": 0.01, "keep": 0.5}
    yield advice.advise, {"images": 100, "classes": 10, "counts": None, "probe_quality": None, "knn": None,
                          "encoder": None}  # fmt: skip
    yield UCBSampler, {"n": 9, "keep": 0.5, "every": 1, "warm_up": 0, "final_full": 0, "epochs": None, "seed": 0,
                       "rank": None, "num_replicas": None, "c": 1.0, "decay": 0.8}  # fmt: skip
    sampler = InfoBatchSampler(9, 0.5, epochs=8)
    yield sampler.update, {"indices": [0, 1], "losses": [1.0, 2.0]}
    yield sampler.weights, {"indices": [0, 1]}
    yield sampler.set_epoch, {"epoch": 0}
    yield sampler.load_state_dict, {"state": sampler.state_dict()}


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_is_given_to_whatever_is_public_only_our_own_errors_come_out(world, every):
    failed, tried = [], 0
    for function, usual in calls(world):
        for place, name in enumerate(usual):
            for value in WRONG[place % every :: every]:
                tried += 1
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        function(**{**usual, name: value})
                except ProtopruneError:
                    pass
                except Exception as error:
                    what = getattr(function, "__qualname__", function)
                    failed.append(f"{what}({name}={value!r}): {type(error).__name__}: {error}"[:200])
    assert tried > 3500 // every
    assert not failed, "\n".join(failed)


def test_of_each_kind_one_sentence():
    @checked
    def example(
        out: str | os.PathLike[str], flag: bool = False, many: list[str] | None = None, call: callable = print
    ) -> None: ...

    for given, said in (
        ({"out": None}, "out None: expected a path"),
        ({"out": b"x"}, "out b'x': expected a path"),
        ({"out": "x", "flag": "yes"}, "flag 'yes': expected True or False"),
        ({"out": "x", "flag": 2}, "flag 2: expected True or False"),
    ):
        with pytest.raises(UsageError) as caught:
            example(**given)
        assert str(caught.value) == said
    for given in ({"out": Path("x")}, {"out": "x", "flag": np.bool_(True)}, {"out": "x", "flag": 1}):
        example(**given)
    with pytest.raises(TypeError, match="example"):
        example("x", nothing=1)


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "said"),
    [
        ("Callable[[int, int], None] | None", [None, print], ["x", 3], "expected a function"),
        ("str | os.PathLike[str] | Sequence[str]", ["x", Path("x"), ["x"]], [3, None], "a path or a list"),
        ("dict[str, Any]", [{}], [[], "x"], "expected a dict"),
        ("str", ["x", np.str_("x")], [b"x", 3, None], "expected text"),
        ("UsageError | None", [None, UsageError()], [3], "expected a UsageError"),
        ("np.ndarray | None", [3, "x", None], [], ""),
        ("float", ["x", None], [], ""),
        ("Any", ["x", None], [], ""),
        ("SomethingElse | None", [3], [], ""),
    ],
)  # fmt: skip
def test_annotations(annotation, right, wrong, said):
    for value in right:
        check_kind("x", value, annotation, globals())
    for value in wrong:
        with pytest.raises(UsageError, match=said):
            check_kind("x", value, annotation, globals())


def test_numbers_of_numpy_are_the_numbers_that_they_say():
    assert [plain(np.float32(0.7)), plain(np.float16(0.1)), plain(np.int8(3)), plain(np.bool_(True))] == [
        0.7,
        0.1,
        3,
        True,
    ]
    assert [type(plain(one)) for one in (np.float64(0.5), np.int64(2), np.str_("x"))] == [float, int, str]


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, lambda ids: map(Path, ids)])
def test_names_come_as_they_are_in_any_sequence(make):
    assert texts("paths", make(["a/1.png", "b.png"])) == ["a/1.png", "b.png"]


@pytest.mark.parametrize("given", ["a/1.png", {"a/1.png": 1}, Path("a"), b"a", None, np.array("a"), [["a"]], [b"a"]])
def test_what_is_no_list_of_names(given):
    with pytest.raises(UsageError, match=r"expected (a list of )?paths"):
        texts("paths", given)


def test_the_name_of_a_list_is_not_its_letters(world):
    for call in (
        lambda: protoprune.list_paths("kept.txt", world["images"].root),
        lambda: protoprune.list_rows("kept.txt", protoprune.load_examples("f.h5"), "mine"),
        lambda: protoprune.write_scores("t.csv", "abcd", np.arange(4.0), metric="m"),
        lambda: protoprune.compare({"a": np.arange(4.0), "b": np.arange(4.0)}, "abcd"),
        lambda: protoprune.import_features("x.npy", paths=3),
    ):
        with pytest.raises(UsageError, match=r"expected a (list|path)"):
            call()


def test_paths_as_objects_columns_and_arrays(world):
    pandas = pytest.importorskip("pandas")
    ids, root = world["ids"], world["images"].root
    for given in (map(Path, ids), np.array(ids), pandas.Series(ids), (Path(root, one) for one in ids)):
        assert protoprune.list_paths(given, root).paths == ids
    protoprune.write_scores("p.csv", pandas.Series(ids), pandas.Series(np.arange(4.0)), metric="m")
    for given in (map(Path, ids), pandas.Series(ids)):
        assert protoprune.read_scores("p.csv", given).scores.tolist() == [0, 1, 2, 3]
    rows = protoprune.list_rows(pandas.Series(ids[1:3]), protoprune.load_examples("f.h5"), "mine")
    assert rows.tolist() == [1, 2]


def test_numbers_of_numpy_give_the_list_of_pythons(world):
    plain_list = protoprune.select("f.h5", 0.5, seed=3, k=2, iterations=4, restarts=2)
    of_numpy = protoprune.select(
        "f.h5", np.float32(0.5), seed=np.int64(3), k=np.uint8(2), iterations=np.int32(4), restarts=np.int16(2)
    )
    assert of_numpy.kept_paths == plain_list.kept_paths
    assert (
        of_numpy.rule
        == plain_list.rule
        == protoprune.select("f.h5", Fraction(1, 2), seed=3, k=2, iterations=4, restarts=2).rule
    )
    again = protoprune.score("random", "f.h5", seed=np.int64(1))
    assert again.values.tolist() == protoprune.score("random", "f.h5", seed=1).values.tolist()


def test_a_fraction_of_numpy_keeps_as_many_as_its_digits_say():
    """float16 of 0.5 times 70,000 is infinite, and float32 of 0.7 is less than 0.7."""
    from protoprune.pruning.ranking import Ranking

    n = 70_000
    ranking = Ranking(
        "", "", [f"{row:06d}" for row in range(n)], np.full(n, -1), [], np.zeros(n, np.uint8), np.arange(n)
    )
    for keep, count in ((np.float16(0.5), 35_000), (np.float32(0.7), 49_000), (np.float16(0.7), 49_000)):
        assert int(protoprune.prune(ranking, keep).keep.sum()) == count


def test_a_head_is_fitted_to_the_rows_that_are_given_or_to_none():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 3)).astype(np.float32)
    labels = (vectors[:, 0] > 0).astype(int)
    rows = np.array([0, 2, 3, 5, 8, 13, 21, 34])
    mask = np.isin(np.arange(40), rows)
    fitted = fit_head(vectors, labels, 2, rows=rows, strength=1.0)
    alone = fit_head(Space(vectors), labels, 2, rows=rows[::-1].tolist(), strength=1.0)
    assert np.array_equal(fitted.weight, alone.weight)
    for wrong, said in (
        ({"rows": mask}, "a mask, expected the rows"), ({"rows": [-1, 2]}, "expected 0 to 39"),
        ({"rows": [40]}, "expected 0 to 39"), ({"labels": labels[:-1]}, "one for each of 40 images"),
        ({"labels": np.append(labels, 1)}, "one for each of 40 images"),
        ({"labels": labels.astype(str)}, "whole numbers"), ({"labels": labels + 0.5}, "whole numbers"),
        ({"weights": np.ones(8)}, "one for each of 40 images"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            fit_head(**{"vectors": vectors, "labels": labels, "classes": 2, "rows": rows, "strength": 1.0, **wrong})


@pytest.mark.parametrize("form", [lambda x: x.astype(np.float64), np.asfortranarray, torch.tensor, "read-only",
                                  lambda x: x[:, ::-1][:, ::-1], lambda x: torch.tensor(x).double()])  # fmt: skip
def test_a_head_takes_vectors_in_any_layout(form):
    vectors = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    labels = np.arange(30) % 3
    given = vectors.copy() if form == "read-only" else form(vectors)
    if form == "read-only":
        given.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head, same = (fit_head(one, labels, 3, strength=1.0) for one in (given, vectors))
        assert np.allclose(head.weight, same.weight, atol=1e-5)
        assert head.predict(given).tolist() == same.predict(vectors).tolist()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 70, "resize": 32}, "resize 32: expected at least 70"),
        ({"crop_mode": "centre"}, "crop_mode centre: expected one of center, squash"),
        ({"interpolation": "cubic"}, "interpolation cubic: expected one of bicubic"),
        ({"decode": "quick"}, "decode quick: expected one of exact, fast"),
        ({"mean": (0.5,)}, "mean .*: expected three numbers"),
        ({"mean": 0.5}, "mean 0.5: expected three numbers"),
        ({"std": (0.0, 1, 1)}, "std .*: expected numbers above 0"),
        ({"std": (float("nan"), 1, 1)}, "std .*: expected three numbers"),
    ],
)
def test_a_preprocessing_that_would_make_other_images_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        protoprune.Preprocess(**{"size": 32, "resize": 36, **given})


def test_a_preprocessing_with_arrays_is_that_with_tuples():
    one = protoprune.Preprocess(np.int64(32), 36, mean=np.array([0.5, 0.25, 0.0]), std=[1, 1, 2])
    assert one == protoprune.Preprocess(32, 36, mean=(0.5, 0.25, 0.0), std=(1.0, 1.0, 2.0))
    assert one.describe()["mean"] == [0.5, 0.25, 0.0]


def test_weights_of_a_mask_are_refused():
    """True and False are the examples 1 and 0, and not what a mask means."""
    sampler = InfoBatchSampler(4, 0.5, epochs=8)
    for wrong in ([True, False, True, False], [0.0, 1.0]):
        with pytest.raises(UsageError, match=r"weights: indices of type .*; expected integers"):
            sampler.weights(wrong)
    assert sampler.weights(np.array([3, 0])).tolist() == [1, 1]
    assert sampler.weights([]).tolist() == []


def test_a_warning_stands_at_the_line_of_the_user_however_deep_it_was_found(world, tmp_path):
    (tmp_path / "scores.csv").write_text("path,score\ncat/0.png,1\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protoprune.read_list(tmp_path / "scores.csv")
        with pytest.raises(ProtopruneError):
            protoprune.table_rows(tmp_path / "scores.csv", ["nowhere.parquet"])
    assert [one.filename for one in caught] == [__file__] * 2


def test_an_empty_name_is_no_path(world):
    """As of a variable that is not set: a file `.partial` was left, and all was computed for nothing."""
    for call in (
        lambda: protoprune.embed(world["images"], world["encoder"], ""), lambda: protoprune.select(""),
        lambda: protoprune.read_list(""), lambda: protoprune.list_folder(""), lambda: protoprune.merge("x", ""),
        lambda: protoprune.load_examples(""),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="'': expected a path"):
            call()
    assert not os.path.exists(".partial")


def test_scores_of_tensors_are_written_as_the_numbers_that_they_are(world):
    ids, written = world["ids"], [0.5, -1.0, 2.0, 0.25]
    for scores in (
        torch.tensor(written, dtype=torch.bfloat16), torch.tensor(written, requires_grad=True), np.array(written)[::1],
        torch.tensor(written).half(), np.asfortranarray(np.array([written] * 2))[1], tuple(written),
    ):  # fmt: skip
        protoprune.write_scores("t.csv", ids, scores, metric="m")
        assert protoprune.read_scores("t.csv", ids).scores.tolist() == written
    both = {"a": torch.tensor(written, requires_grad=True), "b": torch.tensor(written).bfloat16()}
    assert protoprune.compare(both, ids, resamples=0).spearman[0, 1] == pytest.approx(1)
    for wrong, said in (
        ({"scores": [None] * 4}, "expected numbers"), ({"scores": ["1"] * 4}, "expected numbers"),
        ({"scores": [[1], [1, 2]]}, "expected numbers"), ({"scores": np.ones((4, 1))}, r"shape \(4, 1\)"),
        ({"paths": ["a", "b", "a", "c"]}, "'a' occurs twice"), ({"provenance": {b"x": 1}}, "provenance: "),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            protoprune.write_scores("u.csv", **{"paths": ids, "scores": written, "metric": "m", **wrong})
    assert not os.path.exists("u.csv")


def test_a_pool_is_one_of_each_an_image():
    from protoprune.report import page
    from protoprune.tuning import recipes, running

    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    usual = {"paths": [f"{row:02d}" for row in range(80)], "labels": labels, "classes": ["a", "b"],
             "vectors": rng.normal(size=(80, 3)).astype(np.float32)}  # fmt: skip
    pool = recipes.Pool(**{**usual, "labels": labels.tolist(), "vectors": torch.tensor(usual["vectors"])})
    assert np.array_equal(pool.vectors, usual["vectors"])
    assert np.array_equal(pool.labels, labels)
    for wrong, said in (
        ({"labels": labels + 0.0}, "labels of type float64"), ({"labels": labels.astype(str)}, "labels .* numbers"),
        ({"labels": labels[1:]}, r"expected \(n,\)"), ({"paths": "x" * 80}, "expected a list of paths"),
        ({"tables": {"mine": [1.0, 2.0]}}, r"mine: scores of shape \(2,\)"),
        ({"tables": {"mine": ["x"] * 80}}, "mine .* expected numbers"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            recipes.Pool(**{**usual, **wrong})
    some = recipes.Pool(**{**usual, "labels": np.where(labels == 0, -1, labels)})
    with pytest.raises(UsageError, match="40 images have no class"):
        running.tune(some, 0.5)
    with pytest.raises(UsageError, match="chosen None: expected a Selected"):
        page(None)


def test_weights_of_a_list_in_any_form(world):
    """In one form or the other they weigh the images of their own rows."""
    from protoprune.evaluation.comparing import Kept, _spread

    rows, weights = np.array([4, 0, 2]), [1.0, 2.0, 3.0]
    tensor = torch.tensor(weights)
    for given in (weights, tensor.clone().requires_grad_(), tensor.bfloat16(), np.float16(weights)):
        assert _spread(Kept("mine", rows, given), 5).tolist() == [1, 0, 1.5, 0, 0.5]
    for wrong in (["1", "2", "3"], {4: 1.0}, [None] * 3):
        with pytest.raises(UsageError, match=r"mine: weights .*: expected numbers"):
            _spread(Kept("mine", rows, wrong), 5)
