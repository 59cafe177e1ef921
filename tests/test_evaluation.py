"""Retraining: planted winners and losers, nulls, resuming, weights; heads trained for real, and a fake where many."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.evaluation import Kept, evaluate, report, runs, scaling
from protoprune.evaluation import runs as running
from protoprune.evaluation.curves import envelope
from protoprune.evaluation.runs import Run, list_rows, list_weights, random_rows, run_all
from protoprune.training.examples import Examples
from protoprune.training.loop import Recipe, steps_per_epoch

CLASSES = ("ape", "bee", "cat", "dog")
LINEAR = Recipe.for_model("head")  # trained to convergence
HEAD = Recipe.for_model("head", hidden=8, epochs=4, batch_size=32, lr=0.3, weight_decay=1e-3)  # for so many epochs


def blobs(n: int, *, wrong: int = 0, seed: int = 0) -> Examples:
    """Four Gaussian classes in 8 dimensions; the first `wrong` examples have random labels."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, len(CLASSES), n)
    features = 1.6 * np.eye(len(CLASSES), 8)[true] + rng.normal(size=(n, 8))
    labels = true.copy()
    labels[:wrong] = rng.integers(0, len(CLASSES), wrong)
    paths = [f"{i:05d}.png" for i in range(n)]
    return Examples("images", paths, labels, list(CLASSES), torch.tensor(features, dtype=torch.float32))


TRAIN, TEST = blobs(600, wrong=300), blobs(1000, seed=1)
WRONG, CLEAN = np.arange(300), np.arange(300, 600)


class FakeFit:
    """Accuracy = level + luck of these rows + noise of this run; counts its calls."""

    def __init__(
        self, luck: float = 0.02, noise: float = 0.01, level: float = 0.7, effect=lambda rows: 0.0, world=0, losses=()
    ):
        self.luck, self.noise, self.level, self.effect, self.world = luck, noise, level, effect, world
        self.losses, self.calls = losses, []

    def __call__(self, train, test, recipe, *, rows, weights, seed, steps, device, sampler=None, on_epoch=None):
        self.calls.append({"rows": rows, "weights": weights, "seed": seed, "steps": steps, "sampler": sampler})
        rows = np.arange(len(train.paths)) if rows is None else rows
        content = int.from_bytes(hashlib.blake2b(rows.tobytes(), digest_size=6).digest())
        luck = np.random.default_rng([self.world, content]).normal()
        noise = np.random.default_rng([self.world, content, seed]).normal()
        accuracy = self.level + self.effect(rows) + self.luck * luck + self.noise * noise
        right = np.arange(len(test.labels)) < round(np.clip(accuracy, 0, 1) * len(test.labels))
        predictions = np.where(right, test.labels, (test.labels + 1) % len(test.classes))
        steps = steps or recipe.epochs * steps_per_epoch(len(rows), recipe.batch_size)
        if on_epoch:
            for epoch in (1, 2, 3, 4):
                on_epoch(epoch, 0.001 * steps * epoch / 4, np.where(right & (epoch > 2), test.labels, 9))
        return SimpleNamespace(predictions=predictions, seconds=0.001 * steps, steps=steps, losses=self.losses)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_planted_winner_wins_and_a_planted_loser_loses():
    """Half the labels are random: the list without them must win, the list of them must lose."""
    result = evaluate(
        TRAIN, TEST, [Kept("clean", CLEAN), Kept("wrong", WRONG)], LINEAR, seeds=4, device="cpu", class_counts=False
    )
    clean, wrong = result.method("clean"), result.method("wrong")
    assert clean.to_random.verdict == "better"
    assert clean.verdict.startswith("better than random by")
    assert wrong.to_random.verdict == "worse"
    assert wrong.accuracy.mean < result.method("random 300").accuracy.mean < clean.accuracy.mean
    assert clean.to_everything.mean > 0  # half the images, and better than all of them
    assert clean.worst_class_accuracy == min(clean.class_accuracy.values())
    assert clean.class_accuracy[clean.worst_class] == clean.worst_class_accuracy
    assert clean.seconds_saved == pytest.approx(result.method("everything").seconds - clean.seconds)


@pytest.mark.parametrize("recipe", [LINEAR, HEAD], ids=["converged", "network"])
def test_a_random_list_is_no_better_than_random_at_the_stated_rate(recipe):
    """Many null commands of two random lists each; the luck of a list is twice the noise of training, and all that
    there is where heads are trained to convergence."""
    trials, false = 100, 0
    train, test = blobs(60), blobs(2000, seed=2)
    train.fingerprint = test.fingerprint = lambda: "same"
    for world in range(trials):
        rng = np.random.default_rng([9, world])
        lists = [Kept(name, rng.choice(60, 20, replace=False)) for name in "ab"]
        fit = FakeFit(world=world, noise=0.01 if recipe is HEAD else 0)
        result = evaluate(train, test, lists, recipe, seeds=4, everything=False, device="cpu", fit=fit)
        judged = [one for name in "ab" for one in (result.method(name).to_random, result.method(name).to_classes)]
        false += any(one.verdict != "undecided" for one in judged)
    assert false <= stats.binom.ppf(0.999, trials, 0.05)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.arange(60) < 20, "a mask, expected the rows of the list; give np.flatnonzero"),
        (np.array([0.5, 1]), "float64 of shape (2,), expected the rows"), (np.array([], np.int64), "of shape (0,)"),
        (np.array([3, 60]), "rows 3 to 60 of 60 images; expected 0 to 59"), (np.array([-1, 4]), "rows -1 to 4"),
        (np.array([4, 4]), "given twice"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_refused(rows, message):
    """A mask taken for rows would be the rows 0 and 1, many times, and its accuracy a number that is not true."""
    train = blobs(60)
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate(train, train, [Kept("a", rows)], LINEAR, seeds=2, device="cpu")


def test_test_images_that_are_training_images_are_counted():
    """Under whatever names; a test set that is a part of the training set gave an accuracy that is not true."""
    train, other = blobs(60), blobs(40, seed=5)
    own = [other.inputs[:30], train.inputs[[7, 9, 9, 50]], torch.zeros(6, 8)]
    mixed = dataclasses.replace(other, inputs=torch.cat(own))
    train.inputs[3] = 0  # zeros say nothing of what is the same
    lists = [Kept("a", np.arange(20))]
    with pytest.warns(ProtopruneWarning, match="4 of the 40 test images are training images too") as said:
        evaluate(train, mixed, lists, LINEAR, seeds=2, device="cpu", class_counts=False)
    assert f"first: {mixed.paths[30]}" in str(said[0].message)
    with pytest.warns(ProtopruneWarning, match="60 of the 60 test images are the training set itself"):
        evaluate(blobs(60), blobs(60), lists, LINEAR, seeds=2, device="cpu", class_counts=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(train, other, lists, LINEAR, seeds=2, device="cpu", class_counts=False)


def test_lists_are_compared_with_random_subsets_of_their_own_size():
    fit = FakeFit(effect=lambda rows: len(rows) / 2000, luck=0, noise=0)
    lists = [Kept("few", np.arange(50)), Kept("many", np.arange(400))]
    result = evaluate(TRAIN, TEST, lists, HEAD, seeds=3, device="cpu", fit=fit)
    assert [one.name for one in result.methods] == [
        "few", "many", "random 50", "random 400", "random, classes as few", "random, classes as many", "everything",
    ]  # fmt: skip
    assert result.method("few").to_random.difference == 0
    assert result.method("many").to_random.difference == 0
    assert result.method("many").accuracy.mean > result.method("few").accuracy.mean
    assert result.method("random 50").verdict is None


def test_subsets_are_drawn_anew_for_each_seed_and_paired_by_it():
    fit = FakeFit()
    evaluate(TRAIN, TEST, [Kept("a", CLEAN)], HEAD, seeds=[3, 8], device="cpu", fit=fit, class_counts=False)
    assert [call["seed"] for call in fit.calls] == [3, 3, 3, 8, 8, 8]
    first, second = fit.calls[1]["rows"], fit.calls[4]["rows"]
    assert len(first) == len(second) == 300
    assert len(np.intersect1d(first, second)) < 200
    assert fit.calls[2]["rows"] is None
    assert set(random_rows(600, 100, 3)) < set(first)  # nested over sizes


def test_budgets_differ_in_steps_alone():
    full, own = 4 * steps_per_epoch(600, 32), 4 * steps_per_epoch(150, 32)
    for budget, steps in (("epochs", None), ("steps", full)):
        fit = FakeFit()
        how = {"seeds": 1, "budget": budget, "min_steps": 1, "class_counts": False, "device": "cpu", "fit": fit}
        result = evaluate(TRAIN, TEST, [Kept("a", np.arange(150))], HEAD, **how)
        assert [call["steps"] for call in fit.calls] == [steps, steps, None]
        assert result.method("a").steps == (own if budget == "epochs" else full)
        assert result.method("everything").steps == full
    assert [row["steps"] for row in result.runs] == [full] * 3


def test_no_network_takes_fewer_steps_than_the_floor():
    for floor, steps in ((None, [running.MIN_STEPS] * 4), (50, [50, 50, 50, None])):
        fit = FakeFit()
        result = evaluate(TRAIN, TEST, [Kept("a", np.arange(150))], HEAD, seeds=1, min_steps=floor, fit=fit)
        assert [call["steps"] for call in fit.calls] == steps
        assert result.method("everything").steps == max(floor or running.MIN_STEPS, 4 * steps_per_epoch(600, 32))
        fit = FakeFit()
        scaling(TRAIN, TEST, HEAD, sizes=[50, 600], keeps=[1], orders=["random"], seeds=1, min_steps=floor, fit=fit)
        assert {call["steps"] for call in fit.calls} == {steps[0] if floor is None else 76}


def test_real_training_takes_the_steps_that_are_planned():
    for budget in ("epochs", "steps"):
        how = {"seeds": 1, "budget": budget, "min_steps": 1, "device": "cpu"}
        result = evaluate(TRAIN, TEST, [Kept("a", np.arange(129))], HEAD, **how)
        own, full = 4 * steps_per_epoch(129, 32), 4 * steps_per_epoch(600, 32)
        assert [row["steps"] for row in result.runs] == [own if budget == "epochs" else full] * 3 + [full]


def test_time_saved_is_counted_after_selection_and_target():
    fit = FakeFit(luck=0, noise=0)
    lists = [Kept("a", np.arange(300), selection_seconds=0.5), Kept("b", np.arange(300, 600))]
    how = {"seeds": 2, "min_steps": 1, "device": "cpu", "fit": fit}
    result = evaluate(TRAIN, TEST, lists, HEAD, target_accuracy=0.6, **how)
    a, everything = result.method("a"), result.method("everything")
    assert (a.seconds, everything.seconds) == (pytest.approx(0.040), pytest.approx(0.076))
    assert a.seconds_saved == pytest.approx(0.036)
    assert a.net_saved == pytest.approx(0.036 - 0.5)
    assert result.method("b").net_saved is None  # what it cost is not known
    assert a.seconds_to_target == pytest.approx(0.030)  # the third of four epochs
    assert evaluate(TRAIN, TEST, lists, HEAD, target_accuracy=0.9, **how).method("a").reached_target == 0


def test_a_head_is_as_good_as_its_images_whatever_their_number():
    """The accuracy of a list is scikit-learn's, with few images as with many, and one number for all seeds."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    lists = [Kept("few", CLEAN[:40]), Kept("many", CLEAN)]
    result = evaluate(TRAIN, TEST, lists, LINEAR, seeds=2, device="cpu", class_counts=False)
    assert result.budget == "convergence"
    mean, std = TRAIN.inputs.numpy().mean(0), TRAIN.inputs.numpy().std(0, ddof=1) * 8**0.5
    inputs, new = ((one.inputs.numpy() - mean) / std for one in (TRAIN, TEST))
    for one in lists:
        (row,) = [row for row in result.runs if row["method"] == one.name]
        model = linear_model.LogisticRegression(C=row["strength"], max_iter=5000)
        theirs = model.fit(inputs[one.rows], TRAIN.labels[one.rows]).score(new, TEST.labels)
        assert result.method(one.name).accuracies == [row["accuracy"]]
        assert row["accuracy"] == pytest.approx(theirs, abs=0.005)
    counts = Counter(row["method"] for row in result.runs)
    assert (counts["few"], counts["random 40"], counts["everything"]) == (1, 2, 1)


def test_intervals_of_one_number_are_over_test_images():
    result = evaluate(TRAIN, TEST, [Kept("a", WRONG)], LINEAR, seeds=2, device="cpu", class_counts=False)
    one, full = result.method("a"), result.method("everything")
    p = one.accuracy.mean
    assert one.accuracy.high - one.accuracy.low == pytest.approx(3.92 * np.sqrt(p * (1 - p) / 1000), rel=0.01)
    assert one.to_everything.mean == pytest.approx(p - full.accuracy.mean)
    assert 0 < one.to_everything.high - one.to_everything.low < 0.1
    assert one.to_everything.n == one.accuracy.n == 1000
    assert result.method("random 300").accuracy.n == 2


# --- class counts ----------------------------------------------------------------------------------------------------


def uneven(n: int, seed: int = 0) -> Examples:
    """As `blobs`, with classes of very different size: 8 to 4 to 2 to 1."""
    whole, rng = blobs(3 * n, seed=seed), np.random.default_rng(seed)
    share = 0.5**whole.labels
    keep = np.sort(rng.choice(3 * n, n, replace=False, p=share / share.sum()))
    return Examples("images", [whole.paths[row] for row in keep], whole.labels[keep], whole.classes, whole.inputs[keep])


def test_what_the_class_counts_make_is_told_apart():
    """An even list from an uneven set, otherwise at random: better by its class counts, and by nothing else."""
    train, test = uneven(1200), blobs(2000, seed=9)
    rng = np.random.default_rng(3)
    even = np.sort(np.concatenate([rng.permutation(np.flatnonzero(train.labels == c))[:15] for c in range(4)]))
    one = evaluate(train, test, [Kept("even", even)], LINEAR, seeds=8, device="cpu").method("even")
    assert one.to_random.difference > 0.01
    assert one.to_classes.verdict == "undecided"
    assert one.class_counts.low > 0
    assert one.class_counts.mean + one.to_classes.difference == pytest.approx(one.to_random.difference)
    assert one.class_verdict.startswith("no difference to random images of the same class counts shown")
    assert re.search(r"; the class counts alone make \+[\d.]+ points$", one.class_verdict)


def test_matched_subsets_have_the_class_counts_and_lie_in_one_order():
    labels = np.arange(100) % 3
    rows = running.matched_rows(labels, [5, 0, 20], seed=4)
    assert np.bincount(labels[rows]).tolist() == [5, 0, 20]
    assert (np.diff(rows) > 0).all()
    assert set(running.matched_rows(labels, [3, 0, 9], seed=4)) < set(rows)
    assert not np.array_equal(rows, running.matched_rows(labels, [5, 0, 20], seed=5))
    random = random_rows(100, 20, 4)
    assert np.array_equal(random, running.matched_rows(labels, np.bincount(labels[random]), 4))


def test_lists_with_the_same_class_counts_share_their_random_subsets():
    fit = FakeFit()
    lists = [Kept("a", np.arange(0, 100)), Kept("b", np.arange(0, 100)), Kept("c", np.arange(50))]
    result = evaluate(TRAIN, TEST, lists, HEAD, seeds=2, everything=False, device="cpu", fit=fit)
    assert [one.name for one in result.methods if one.kind == "classes"] == [
        "random, classes as a",
        "random, classes as c",
    ]
    assert result.method("a").to_classes.difference == result.method("b").to_classes.difference
    assert evaluate(TRAIN, TEST, lists, HEAD, seeds=2, class_counts=False, device="cpu", fit=fit).method(
        "a"
    ).to_classes is None  # fmt: skip


# --- warnings --------------------------------------------------------------------------------------------------------


def test_a_loss_that_falls_at_the_end_is_seen_and_noise_is_not():
    steps, rng = np.arange(500), np.random.default_rng(0)
    falling = 2.3 * np.exp(-steps / 300)
    assert running.loss_fall(falling) == pytest.approx(1 - np.exp(-50 / 300), abs=0.01)
    assert running.loss_fall(2.3 * np.exp(-steps / 20) + 0.5) == 0
    assert running.loss_fall(0.5 + rng.normal(size=500) * 0.3) == 0
    assert running.loss_fall(1e-3 * falling) == 0  # of next to nothing
    assert running.loss_fall([2.0, 1.0]) == 0


def test_runs_that_ended_too_early_are_named():
    short = FakeFit(losses=2.3 * np.exp(-np.arange(100) / 60))
    result = evaluate(TRAIN, TEST, [Kept("a", CLEAN)], HEAD, seeds=2, device="cpu", fit=short, class_counts=False)
    (warning,) = result.warnings
    assert (
        "still fell at the end of 6 of 6 runs (a: 2 of 2, random 300: 2 of 2, everything: 2 of 2), by up to 15 %"
        in warning
    )
    assert scaling(TRAIN, TEST, HEAD, orders=["random"], seeds=1, fit=short, **SWEEP).warnings
    assert evaluate(TRAIN, TEST, [Kept("a", CLEAN)], HEAD, seeds=1, device="cpu", fit=FakeFit()).warnings == []


def test_the_losses_of_a_real_training_are_seen():
    slow = dataclasses.replace(HEAD, lr=0.01, schedule="steps", warmup=0.0)
    clean = blobs(600)
    fell = evaluate(clean, TEST, [Kept("a", CLEAN)], slow, seeds=1, min_steps=60, device="cpu").runs
    assert all(row["fall"] >= 0 for row in fell)
    from protoprune.training import loop

    losses = loop.fit(clean, TEST, HEAD, steps=120, device="cpu").losses
    assert losses.shape == (120,)
    assert losses[:10].mean() > losses[-10:].mean()


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_of_zero_equal_leaving_out():
    """Mislabelled examples with weight 0 against a list without them; the same would fail were weights ignored."""
    train = blobs(600)
    train.labels[:300] = (train.labels[:300] + 1) % len(CLASSES)
    weights = np.concatenate([np.zeros(300), np.full(300, 17.0)])  # their scale is no learning rate
    lists = [Kept("weighted", np.arange(600), weights), Kept("left out", CLEAN), Kept("plain", np.arange(600))]
    result = evaluate(train, TEST, lists, LINEAR, seeds=3, device="cpu")
    weighted, left_out, plain = (result.method(one.name).accuracy.mean for one in lists)
    assert weighted == left_out
    assert plain < left_out - 0.15


def test_weights_reach_the_run_by_row():
    fit = FakeFit()
    evaluate(TRAIN, TEST, [Kept("a", np.array([7, 3]), np.array([0.5, 2.0]))], HEAD, seeds=1, device="cpu", fit=fit)
    assert fit.calls[0]["rows"].tolist() == [3, 7]
    assert fit.calls[0]["weights"][[3, 7]].tolist() == pytest.approx([1.6, 0.4])
    assert fit.calls[0]["weights"].sum() == pytest.approx(2)
    assert [call["weights"] for call in fit.calls[1:]] == [None] * 3


def test_weights_are_found_by_path():
    rows = np.array([2, 5])
    weights = {"00005.png": 0.5, "./00002.png": 3.0, "elsewhere.png": 1.0}
    assert list_weights(weights, rows, TRAIN, "w.csv").tolist() == [3.0, 0.5]
    with pytest.raises(ProtopruneError, match=r"w.csv: 1 of 3 images has no weight \(first: 00009.png\)"):
        list_weights(weights, np.array([2, 5, 9]), TRAIN, "w.csv")


# --- lists -> rows ---------------------------------------------------------------------------------------------------


def test_rows_of_a_list_in_any_form():
    train = blobs(10)
    train.root = "/data/images"
    listed = ["00007.png", "./00001.png", "/data/images/00004.png"]
    assert list_rows(listed, train, "a.txt").tolist() == [1, 4, 7]
    assert list_rows(np.array([7, 1]), train, "a.npy").tolist() == [1, 7]
    train.root = "s3://bucket/shards"
    listed = ["00007.png", "./00001.png", "s3://bucket/shards/00004.png"]
    assert list_rows(listed, train, "a.txt").tolist() == [1, 4, 7]
    train.every_path = ["-first.png", *train.paths]  # an image that cannot be used shifts the indices
    assert list_rows(np.array([8, 2]), train, "a.npy").tolist() == [1, 7]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["00001.png", "x.png", "y.png"], r"2 of its 3 images are not usable .*first: x.png is not there"),
        (["bad.png"], r"first: bad.png cannot be read: truncated"),
        ([], "lists no image"),
        (["00001.png", "./00001.png"], "1 image is listed more than once"),
        (np.array([3, 10]), r"1 of its row indices is not .* 10 images \(first: 10\)"),
        (np.array([0.5]), "expected one row index an image"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(listed, message):
    train = blobs(10)
    train.unreadable = [("bad.png", "truncated")]
    with pytest.raises(ProtopruneError, match=message):
        list_rows(listed, train, "a.txt")


# --- resuming --------------------------------------------------------------------------------------------------------


def save(folder: Path, result) -> bytes:
    report.save_evaluation(folder, result, {"device": "cpu"}, list(CLASSES))
    return (folder / "results.csv").read_bytes()


@pytest.mark.parametrize(("recipe", "runs_in_all"), [(LINEAR, 6), (HEAD, 8)], ids=["converged", "network"])
def test_resumed_and_fresh_agree_byte_for_byte(tmp_path, recipe, runs_in_all):
    class Killed(Exception):
        pass

    def stop(step):
        if step.done == 4:
            raise Killed

    lists = [Kept("clean", CLEAN), Kept("wrong", WRONG)]
    how = {"device": "cpu", "class_counts": False}
    how |= {"seeds": 3} if recipe is LINEAR else {"seeds": 2, "min_steps": 1}
    with pytest.raises(Killed):
        evaluate(TRAIN, TEST, lists, recipe, folder=tmp_path / "runs", on_run=stop, **how)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4
    seen = []
    resumed = evaluate(TRAIN, TEST, lists, recipe, folder=tmp_path / "runs", on_run=seen.append, **how)
    assert [step.outcome.cached for step in seen] == [True] * 4 + [False] * (runs_in_all - 4)
    assert seen[-1].cached == 4
    assert seen[3].seconds_left is None
    assert seen[4].seconds_left > seen[-1].seconds_left == 0
    fresh = evaluate(TRAIN, TEST, lists, recipe, **how)
    assert save(tmp_path / "resumed", resumed) == save(tmp_path / "fresh", fresh)
    assert len(save(tmp_path / "fresh", fresh).splitlines()) == 1 + runs_in_all


def test_everything_that_determines_a_run_is_in_its_key(tmp_path):
    base = {"run": Run("a", 0, CLEAN, None, 5), "train": TRAIN, "test": TEST, "recipe": HEAD}
    other = blobs(600, wrong=300)
    other.labels[0] = (other.labels[0] + 1) % 4
    wider = dataclasses.replace(HEAD, lr=0.31)
    changes = [
        {"run": Run("a", 1, CLEAN, None, 5)},
        {"run": Run("a", 0, CLEAN[1:], None, 5)},
        {"run": Run("a", 0, None, None, 5)},
        {"run": Run("a", 0, CLEAN, np.ones(600), 5)},
        {"run": Run("a", 0, CLEAN, None, 6)},
        {"train": other},
        {"test": blobs(1000, seed=3)},
        {"recipe": wider},
        {"recipe": LINEAR},
    ]
    fit = FakeFit()

    def call(run, train, test, recipe):
        return run_all([run], train, test, recipe, folder=tmp_path, fit=fit, device="cpu")[0]

    first = call(**base)
    assert not first.cached
    for number, change in enumerate(changes, 2):
        assert not call(**{**base, **change}).cached, change
        assert len(fit.calls) == number
    again = call(**{**base, "run": Run("another name", 0, CLEAN, None, 5)})  # a name decides nothing
    assert again.cached
    assert again.accuracy == first.accuracy
    assert len(fit.calls) == 1 + len(changes)


def test_the_digest_of_pretrained_weights_is_in_the_key(tmp_path):
    file, fit = tmp_path / "w.pt", FakeFit()
    recipe = Recipe.for_model("cnn", weights=str(file))
    for content, calls in ((b"one", 1), (b"two", 2), (b"two", 2)):
        file.write_bytes(content)
        run_all([Run("a", 0, CLEAN)], TRAIN, TEST, recipe, folder=tmp_path / "runs", fit=fit, device="cpu")
        assert len(fit.calls) == calls
    file.unlink()
    with pytest.raises(UsageError, match=r"w.pt: cannot be read"):
        run_all([Run("a", 0, CLEAN)], TRAIN, TEST, recipe, fit=fit, device="cpu")


def test_equal_runs_are_trained_once_and_a_damaged_result_again(tmp_path):
    fit = FakeFit()

    def call(**more):
        return run_all([Run("a", 0, CLEAN), Run("b", 0, CLEAN)], TRAIN, TEST, HEAD, folder=tmp_path, fit=fit,
                       device="cpu", **more)  # fmt: skip

    assert [one.cached for one in call()] == [False, True]
    (kept,) = tmp_path.glob("*.json")
    assert (
        kept.stem
        == hashlib.sha256(json.dumps(json.loads(kept.read_text())["key"], sort_keys=True).encode()).hexdigest()
    )
    call()
    assert len(fit.calls) == 1
    kept.write_text(kept.read_text()[:50])
    call()
    assert len(fit.calls) == 2
    assert call(curves=True)[0].curve  # kept without the accuracy after each epoch: once more
    assert len(fit.calls) == 3
    call(), call(curves=True)
    assert len(fit.calls) == 3


# --- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", runs.DYNAMIC)
def test_samplers_train_for_as_many_steps_as_a_random_list(name):
    pytest.importorskip("protoprune.samplers")
    sampler = {"name": name, "keep": 0.3}
    how = {"seeds": 2, "min_steps": 1, "device": "cpu"}
    result = evaluate(TRAIN, TEST, [], HEAD, dynamic=[sampler], target_accuracy=0.2, **how)
    one = result.method(f"dynamic {name} 0.3")
    assert {row["steps"] for row in result.runs if row["kind"] != "everything"} == {4 * steps_per_epoch(180, 32)}
    assert one.kept == 180
    assert one.seconds_to_target > 0
    assert one.to_random.n == 2


def test_samplers_have_no_luck_of_one_draw():
    """Drawn anew for each seed, they are judged by the plain paired test."""
    pytest.importorskip("protoprune.samplers")
    sampler = {"name": "random", "keep": 0.5, "every": 1}
    how = {"seeds": 3, "dynamic": [sampler], "min_steps": 1, "device": "cpu"}
    one = evaluate(TRAIN, TEST, [], HEAD, **how).method("dynamic random 0.5 every=1")
    assert (one.to_random.low, one.to_random.high) == (one.to_random.seeds_low, one.to_random.seeds_high)


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lists": []}, "nothing to compare"),
        ({"budget": "time"}, "--budget time: expected epochs"),
        ({"min_steps": 0}, "--min-steps 0"),
        ({"device": "abacus"}, "--device abacus"),
        ({"recipe": dataclasses.replace(HEAD, weights="none.pt")}, "--weights none.pt: no such file"),
        ({"recipe": LINEAR, "budget": "steps"}, "--budget steps: a linear head is trained to convergence"),
        ({"recipe": LINEAR, "min_steps": 9}, "--min-steps 9: a linear head"),
        ({"recipe": Recipe.for_model("head", epochs=3, lr=0.5)}, "--epochs 3, --lr 0.5: a linear head"),
        ({"recipe": LINEAR, "dynamic": [{"name": "rs2", "keep": 0.5}]}, "--dynamic is about the course of a training"),
        ({"recipe": LINEAR, "target_accuracy": 0.9}, "--target-accuracy is about the course of a training"),
        ({"seeds": 0}, "--seeds 0: expected at least 1"),
        ({"seeds": [1, 1]}, "each once"),
        ({"lists": [Kept("a", CLEAN), Kept("a", WRONG)]}, "a is given twice"),
        ({"lists": [Kept("everything", CLEAN)]}, "rename the list"),
        ({"dynamic": [{"name": "magic", "keep": 0.5}]}, "--dynamic magic: expected one of random"),
        ({"dynamic": [{"name": "random", "keep": 0}]}, "--keep 0"),
        ({"dynamic": [{"name": "random", "keep": 1e-6}]}, "keep=1e-06: keeps none of"),
        ({"dynamic": [{"name": "rs2", "keep": 0.5}] * 2}, "dynamic rs2 0.5 is given twice"),
        ({"target_accuracy": 90}, "--target-accuracy 90"),
        ({"confidence": 95}, "confidence 95: expected a number above 0 to 1, such as 0.95"),
        ({"lists": [Kept("a", CLEAN, np.zeros(300))]}, "a: expected a weight of 0 or more for each of its 300"),
        ({"lists": [Kept("a", CLEAN, np.ones(2))]}, "expected a weight"),
    ],
)
def test_mistakes_are_named_before_training(options, message):
    fit = FakeFit()
    options = {"lists": [Kept("a", CLEAN)], "recipe": HEAD, "seeds": 2, "device": "cpu", **options}
    with pytest.raises(UsageError, match=message):
        evaluate(TRAIN, TEST, fit=fit, **options)
    assert fit.calls == []


# --- scaling ---------------------------------------------------------------------------------------------------------


def power_fit(exponent: float = 0.5) -> FakeFit:
    return FakeFit(level=1.0, luck=0.0, noise=0.001, effect=lambda rows: -2 * len(rows) ** -exponent)


SWEEP = {"sizes": [50, 75, 110, 170, 250, 370, 600], "keeps": [1, 0.5], "device": "cpu", "bootstrap": 20}


def test_a_planted_exponent_comes_out_of_the_sweep():
    test = blobs(20_000, seed=4)
    result = scaling(TRAIN, test, HEAD, orders=["random"], seeds=3, fit=power_fit(), **SWEEP)
    curve = result.curve("all")
    assert curve.kept == SWEEP["sizes"]
    assert curve.fits.best == "power"
    assert curve.fits.law("power").parameters["b"] == pytest.approx(0.5, abs=0.05)
    assert curve.verdict.startswith("Power wins by")
    assert result.curve("random 0.5").kept == [25, 38, 55, 85, 125, 185, 300]


def test_initial_sets_are_nested_and_the_ranking_is_made_within_them():
    fit = FakeFit()
    hardness = np.arange(600.0)
    scaling(TRAIN, TEST, HEAD, sizes=[40, 100], keeps=[1, 0.25], orders=["hard", "easy"], seeds=1, scores=hardness,
            fit=fit, device="cpu")  # fmt: skip
    small, hard, easy, large, hard_of_large, _ = (call["rows"] for call in fit.calls)
    assert set(small) < set(large)
    assert set(hard) == set(np.sort(small)[-10:])
    assert set(easy) == set(np.sort(small)[:10])
    assert set(hard_of_large) == set(np.sort(large)[-25:])
    assert {call["steps"] for call in fit.calls} == {running.MIN_STEPS}


def test_prototypes_are_clustered_within_the_initial_set():
    """Planted outliers are the hard ones of every initial set that holds them."""
    fit, features = FakeFit(), np.random.default_rng(0).normal(size=(600, 8)) * 0.05 + np.eye(1, 8)
    outliers = np.arange(0, 600, 10)
    features[outliers, 1 + outliers % 7] += 1.0
    scaling(TRAIN, TEST, HEAD, sizes=[300], keeps=[0.1], orders=["hard"], seeds=1, features=features, k=1, fit=fit,
            device="cpu")  # fmt: skip
    here = set(random_rows(600, 300, 0)) & set(outliers)
    kept = set(fit.calls[0]["rows"])
    assert len(kept) == 30
    assert kept <= here or here <= kept


def test_more_clusters_than_an_initial_set_has_images_are_refused():
    """Each image would be its own prototype, and hard and easy nothing but the order of ties."""
    features = np.random.default_rng(0).normal(size=(600, 8))
    how = {"keeps": [0.5], "orders": ["hard"], "seeds": 1, "features": features, "device": "cpu", "fit": FakeFit()}
    with pytest.raises(UsageError, match=r"--k 50: more clusters than usable images \(30\)"):
        scaling(TRAIN, TEST, HEAD, sizes=[30, 300], k=50, **how)


def test_balance_keeps_some_of_each_class():
    fit, scores = FakeFit(), np.where(TRAIN.labels < 2, 1.0, 0.0)
    how = {"sizes": [200], "keeps": [0.2], "orders": ["hard"], "seeds": 1, "scores": scores, "device": "cpu"}
    scaling(TRAIN, TEST, HEAD, fit=fit, **how)
    scaling(TRAIN, TEST, HEAD, balance=0.5, fit=fit, **how)
    plain, balanced = (np.bincount(TRAIN.labels[call["rows"]], minlength=4) for call in fit.calls)
    assert plain[2:].sum() == 0
    assert balanced.min() == 5


def test_keeping_all_is_trained_once_whatever_the_order():
    fit = FakeFit()
    result = scaling(TRAIN, TEST, HEAD, sizes=[100], keeps=[1], orders=["hard", "easy"], seeds=2, fit=fit, device="cpu")
    assert len(fit.calls) == 2
    assert [point.order for point in result.points] == ["all"]
    assert "too few" in result.curve("all").verdict


def test_the_envelope_is_what_nothing_beats_with_as_few():
    def point(kept, error):
        return SimpleNamespace(kept=kept, error=SimpleNamespace(mean=error))

    points = [point(10, 0.5), point(10, 0.4), point(20, 0.45), point(30, 0.3), point(40, 0.3), point(50, 0.1)]
    assert [(one.kept, one.error.mean) for one in envelope(points)] == [(10, 0.4), (30, 0.3), (50, 0.1)]


def test_a_resumed_sweep_agrees_with_a_fresh_one(tmp_path):
    how = {"sizes": [60, 120, 240], "keeps": [1, 0.5], "orders": ["hard"], "seeds": 2, "device": "cpu"}
    how |= {"features": TRAIN.inputs.numpy(), "bootstrap": 5, "min_steps": 1}
    part = {**how, "sizes": [60, 240]}
    scaling(TRAIN, TEST, HEAD, folder=tmp_path / "runs", **part)
    seen = []
    resumed = scaling(TRAIN, TEST, HEAD, folder=tmp_path / "runs", on_run=seen.append, **how)
    assert seen[-1].cached == 2 * 2 * 2
    fresh = scaling(TRAIN, TEST, HEAD, **how)
    for name, result in (("resumed", resumed), ("fresh", fresh)):
        report.save_scaling(tmp_path / name, result, {"device": "cpu"})
    for name in ("results.csv", "fits.csv"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_errors_of_zero_are_left_out_of_the_fit():
    perfect = FakeFit(level=1.0, luck=0, noise=0, effect=lambda rows: -0.2 if len(rows) < 200 else 0)
    result = scaling(TRAIN, TEST, HEAD, orders=["random"], seeds=2, fit=perfect, **SWEEP)
    assert result.curve("all").fits.sizes == 4
    left = [one.kept for one in result.points if one.order == "all" and one.error.mean == 0]
    shown = ", ".join(f"{kept:,}" for kept in sorted(left))
    assert left
    assert result.curve("all").verdict.endswith(f"; fitted without {shown} kept, where no test image is wrong")
    flat = FakeFit(level=1.0, luck=0, noise=0)
    curve = scaling(TRAIN, TEST, HEAD, orders=["random"], seeds=2, fit=flat, **SWEEP).curve("all")
    assert curve.fits is None
    assert "with an error above 0" in curve.verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [10, 601]}, "--size 601: expected a whole number from 2 to 600"),
        ({"sizes": [10.5]}, "--size 10.5: expected a whole number from 2 to 600"),
        ({"keeps": [1.5]}, "--keep 1.5"),
        ({"keeps": []}, "--keep is empty"),
        ({"sizes": [4], "keeps": [0.1]}, "is none"),
        ({"orders": ["hardest"]}, "--order hardest"),
        ({"orders": []}, "--order is empty"),
        ({"orders": ["hard"]}, "need a ranking"),
        ({"scores": np.zeros(5)}, r"scores of shape \(5,\) for 600"),
        ({"features": np.zeros(600)}, r"features of shape \(600,\) for 600"),
        ({"scores": np.full(600, np.inf), "orders": ["hard"]}, "scores that are infinite"),
        ({"keeps": [1], "balance": 0.5}, "--balance 0.5: --keep 1 leaves nothing out"),
        ({"keeps": [1], "k": 5}, "--k 5: --keep 1 ranks nothing"),
        ({"budget": "time"}, "--budget time"),
        ({"k": 0}, "--k 0: expected at least 1; use --k auto"),
        ({"balance": 2}, "--balance 2"),
        ({"recipe": LINEAR, "budget": "epochs"}, "--budget epochs: a linear head"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        scaling(TRAIN, TEST, fit=FakeFit(), **{**SWEEP, "recipe": HEAD, "orders": ["random"], "seeds": 1, **options})


def test_images_without_a_score_are_named():
    scores = np.zeros(600)
    scores[17] = np.nan
    with pytest.raises(ProtopruneError, match=r"1 training image has no score \(first: 00017.png\)"):
        scaling(TRAIN, TEST, HEAD, scores=scores, fit=FakeFit(), seeds=1, **SWEEP)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_files_of_an_evaluation(tmp_path):
    lists = [Kept("a", np.arange(100), selection_seconds=1.0), Kept("b $x$ \udcff", np.arange(200))]
    result = evaluate(TRAIN, TEST, lists, HEAD, seeds=2, device="cpu", fit=FakeFit())
    report.save_evaluation(tmp_path, result, {"device": "cpu", "recipe": vars(HEAD)}, list(CLASSES))
    rows = list(csv.DictReader((tmp_path / "results.csv").open(errors="surrogateescape")))
    assert len(rows) == 2 * 7
    assert np.mean([float(row["accuracy"]) for row in rows if row["method"] == "a"]) == pytest.approx(
        result.method("a").accuracy.mean
    )
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["config"]["recipe"]["epochs"] == 4
    assert whole["seeds"] == [0, 1]
    versions = (torch.__version__, torch.__version__.partition("+")[0])
    assert whole["environment"]["packages"]["torch"] in versions
    assert whole["methods"][0]["to_random"]["p_adjusted"] == result.method("a").to_random.p_adjusted
    summary = list(csv.DictReader((tmp_path / "summary.csv").open(errors="surrogateescape")))
    assert summary[-1]["to_random"] == ""
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert float(summary[0]["class_counts"]) == result.method("a").class_counts.mean
    assert len((tmp_path / "classes.csv").read_bytes().splitlines()) == 1 + 7 * 4


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProtopruneError, match="cannot make this folder"):
        run_all([Run("a", 0)], TRAIN, TEST, HEAD, folder=tmp_path / "file" / "runs", fit=FakeFit(), device="cpu")
