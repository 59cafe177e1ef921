"""A training record of somebody's own training: its scores are those of the logits; what does not fit is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import protoprune
from protoprune.errors import UsageError
from protoprune.records import Record, partial_path
from protoprune.training import importing

N, C, E, M = 11, 4, 3, 2
PATHS = [f"{'ab'[i % 2]}-{i}/{i}.png" if i % 3 else f"a/{i}.png" for i in range(N)]
LABELS = np.arange(N) % C
LOGITS = np.random.default_rng(0).normal(size=(M, E, N, C)) * 3
SUBSET = np.array([[i != 0 for i in range(N)], [i != 1 for i in range(N)]])


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def scores(metric: str, out, **options) -> np.ndarray:
    """In the order of PATHS."""
    with Record(out) as record:
        found = dict(zip(record.paths, protoprune.score(metric, record, **options).values, strict=True))
    return np.array([found[path] for path in PATHS])


@pytest.mark.parametrize("rows", [4, 100])
def test_scores_are_those_of_the_logits(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(importing, "_ROWS", rows)
    out = tmp_path / "own.h5"
    protoprune.write_record(out, PATHS, LABELS, LOGITS, classes=list("wxyz"), epochs=[0, 5, 10], probabilities=True)
    with Record(out) as record:
        assert record.paths == sorted(PATHS)
        assert (record.models, record.epochs, record.n, record.classes) == (M, E, N, list("wxyz"))
        assert record.epoch_numbers.tolist() == [0, 5, 10]
        assert not record.damage()
        order = [PATHS.index(path) for path in record.paths]
        assert np.allclose(record.probabilities(1), softmax(LOGITS[1, -1])[order], atol=1e-3)
    p = softmax(LOGITS)
    errors = np.linalg.norm(p - np.eye(C)[LABELS], axis=-1)
    assert np.allclose(scores("el2n", out), errors[:, 2].mean(0), atol=2e-3)
    assert np.allclose(scores("el2n", out, epoch=5), errors[:, 1].mean(0), atol=2e-3)
    losses = -np.log(np.take_along_axis(p, LABELS[None, None, :, None], -1))[..., 0]
    assert np.allclose(scores("loss", out), losses[:, -1].mean(0), rtol=2e-3, atol=2e-3)
    with Record(out) as record:  # nats from one moment to the next
        change = (p[0, 2] * (np.log(p[0, 2]) - np.log(p[0, 1]))).sum(-1)
        assert np.allclose(record.read("change", 0)[2], change[order], rtol=3e-3, atol=3e-3)


def test_one_model_lists_tensors_and_subsets(tmp_path):
    protoprune.write_record(tmp_path / "a.h5", PATHS, LABELS, LOGITS[0])
    protoprune.write_record(
        tmp_path / "b.h5", PATHS, torch.from_numpy(LABELS), [torch.tensor(one, requires_grad=True) for one in LOGITS[0]]
    )
    assert (scores("forgetting", tmp_path / "a.h5") == scores("forgetting", tmp_path / "b.h5")).all()
    protoprune.write_record(tmp_path / "c.h5", PATHS, LABELS, [list(one) for one in LOGITS], subset=SUBSET)
    with Record(tmp_path / "c.h5") as record:
        assert (record.subset == SUBSET[:, [PATHS.index(path) for path in record.paths]]).all()
    wrong = softmax(LOGITS)[:, -1].argmax(-1) != LABELS
    assert scores("ddd", tmp_path / "c.h5")[:2].tolist() == [wrong[0, 0], wrong[1, 1]]


TESTED = ["z/1.png", "y/0.png", "y/2.png"]  # not in their order
TEST_LABELS = np.array([3, 1, 0])
TEST_LOGITS = np.random.default_rng(1).normal(size=(M, E, 3, C))


def test_influence_and_grand_of_somebodys_own_training(tmp_path):
    norms = np.random.default_rng(2).random((M, E, N)) * 9
    norms[1, 0, 3] = 1e6  # more than float16 holds
    test, out = (TESTED, TEST_LABELS, list(TEST_LOGITS)), tmp_path / "own.h5"
    protoprune.write_record(out, PATHS, LABELS, LOGITS, subset=SUBSET, gradient_norms=norms, test=test)
    with Record(out) as record:
        assert record.test_paths == sorted(TESTED)
        order = [TESTED.index(path) for path in record.test_paths]
        assert record.test_labels.tolist() == TEST_LABELS[order].tolist()
        assert (record.test_prediction == TEST_LOGITS[:, -1].argmax(-1)[:, order]).all()
        assert record.read("gradient_norm", 1)[0].max() == pytest.approx(60_000, rel=1e-3)
        assert not record.damage()
    assert np.allclose(scores("grand", out)[2:], norms[:, -1, 2:].mean(0), rtol=2e-3)  # the first have a model each
    right = TEST_LOGITS[:, -1].argmax(-1) == TEST_LABELS
    gained = right[1].astype(int) - right[0]  # image 0 is in model 1 and not in model 0
    assert scores("influence_max", out)[0] == gained.max()
    assert scores("influence_sum_abs", out)[0] == np.abs(gained).sum()
    absolute = ([f"/data/test/{path}" for path in TESTED], TEST_LABELS, TEST_LOGITS[0])
    protoprune.write_record(out, PATHS, LABELS, LOGITS[0], gradient_norms=norms[0], test=absolute, overwrite=True)
    with Record(out) as record:
        assert record.test_paths == sorted(TESTED)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": (TESTED, TEST_LABELS)}, r"test \(.*: expected \(paths, labels, logits\) of the test images"),
        ({"test": ([], TEST_LABELS[:0], TEST_LOGITS[:, :, :0])}, "test: holds no image; leave it out"),
        ({"test": (TESTED[:2], TEST_LABELS, TEST_LOGITS)}, r"labels of shape \(3,\)"),
        (
            {"test": (TESTED, TEST_LABELS, TEST_LOGITS[:, :2])},
            r"are \(2, 2, 4\), expected \(2, 3, 4\), as of the others",
        ),
        ({"test": (TESTED, TEST_LABELS, TEST_LOGITS[:, :, :2])}, "test logits of model 0, moment 0: of shape"),
        ({"test": (TESTED, TEST_LABELS, TEST_LOGITS * np.inf)}, "test logits of model 0, moment 0: NaN"),
        ({"gradient_norms": np.ones((E, N))}, r"gradient_norms of shape \(1, 3, 11\): expected \(2, 3, 11\)"),
        ({"gradient_norms": -np.ones((M, E, N))}, "below 0; give lengths"),
        (
            {"logits": np.broadcast_to(np.float32(0), (E, N, 1 << 17)), "labels": LABELS},
            "131,072 classes: a record holds at most 65,536",
        ),
        ({"paths": [*PATHS[:-1], PATHS[0]]}, "paths: 1 occur twice"),
        ({"labels": LABELS[:-1]}, r"labels of shape \(10,\)"),
        ({"labels": LABELS + 1}, "labels from 1 to 4: expected 0 to 3"),
        ({"labels": LABELS / 1.0}, "expected 11 numbers of classes"),
        ({"logits": LOGITS[:, :, :-1]}, r"logits of model 0, moment 0: of shape \(10, 4\), expected \(11, 4\)"),
        ({"logits": [LOGITS[0], LOGITS[1, :2]]}, "logits of model 1: of 2 moments, expected 3"),
        ({"logits": np.where(LOGITS[1, 2, 3, 0] == LOGITS, np.nan, LOGITS)}, "model 1, moment 2: NaN, infinite"),
        ({"logits": LOGITS[0, 0]}, r"logits: expected .* of one moment give \[logits\]"),
        ({"logits": softmax(LOGITS)}, "logits of model 0, moment 0: probabilities, .* give their logarithms"),
        ({"logits": softmax(LOGITS).astype(np.float16)}, r"probabilities, .*, np.log\(np.clip\(p, 1e-7, 1\)\)"),
        ({"logits": np.where(LOGITS < -4, -np.inf, LOGITS)}, r"infinite .*, or np.log\(np.clip\(p, 1e-7, 1\)\) of"),
        ({"logits": LOGITS * 1e300}, "model 0, moment 0: NaN, infinite or larger than"),
        ({"logits": []}, "logits: expected"),
        ({"classes": ["a"]}, "classes: 1 names for logits of 4 classes"),
        ({"epochs": [1, 1, 2]}, "expected 3 growing whole numbers"),
        ({"epochs": [1.5, 2, 3]}, "expected 3 growing whole numbers"),
        ({"paths": [f"/data/{path}" for path in PATHS]}, "paths: '/data/.*' is not below a folder; give root="),
        ({"paths": ["", *PATHS[1:]]}, "paths: '' is not below a folder"),
        ({"paths": ["../up.png", *PATHS[1:]], "root": "/data"}, "outside the root /data"),
        ({"subset": SUBSET[:1]}, r"subset of shape \(1, 11\): expected \(2, 11\)"),
        ({"subset": np.full((2, 11), 0.7)}, "subset: holds other values than True and False"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, changed, message):
    given = {"paths": PATHS, "labels": LABELS, "logits": LOGITS, **changed}
    with pytest.raises(UsageError, match=message):
        protoprune.write_record(tmp_path / "own.h5", **given)
    assert not os.listdir(tmp_path)


def test_absolute_paths_are_below_the_root(tmp_path):
    """As the samples of a data set with an absolute root have them; a record of them as they are could not be read."""
    absolute = [f"/data/train/{path}" for path in PATHS]
    protoprune.write_record(tmp_path / "own.h5", absolute, LABELS, LOGITS, root="/data/train/")
    with Record(tmp_path / "own.h5") as record:
        assert sorted(record.paths) == sorted(PATHS)
        assert record.provenance["root"] == "/data/train"


def test_nothing_is_replaced_unasked(tmp_path):
    out = tmp_path / "own.h5"
    (tmp_path / "own.h5.partial").write_bytes(b"a run under way")
    with pytest.raises(UsageError, match=r"own.h5.partial: exists"):
        protoprune.write_record(out, PATHS, LABELS, LOGITS)
    os.unlink(partial_path(str(out)))
    protoprune.write_record(out, PATHS, LABELS, LOGITS)
    with pytest.raises(UsageError, match=r"own.h5: exists; choose another name, or replace it with overwrite=True"):
        protoprune.write_record(out, PATHS, LABELS, LOGITS)
    protoprune.write_record(out, PATHS, LABELS, LOGITS[:1], overwrite=True)
    with Record(out) as record:
        assert record.models == 1
