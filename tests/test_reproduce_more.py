"""The experiments transfer, calibration and dynamic: verdicts on planted numbers, and each end to end at a toy size."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_image

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "scripts" / "reproduce"))

import experiment_calibration as calibration  # noqa: E402
import experiment_dynamic as dynamic  # noqa: E402
import experiment_transfer as transfer  # noqa: E402
from claims import FAILS, HOLDS, OPEN, beyond, decide, gap, same, spanned  # noqa: E402
from lab import Lab, report  # noqa: E402

from protoprune import samplers  # noqa: E402
from protoprune.evaluation import statistics  # noqa: E402
from protoprune.evaluation.runs import Outcome  # noqa: E402
from protoprune.training import loop  # noqa: E402
from protoprune.training.examples import Examples  # noqa: E402
from protoprune.training.loop import Recipe  # noqa: E402

UP, DOWN, NOISE = [0.05, 0.06, 0.055], [-0.05, -0.06, -0.055], [0.05, -0.04, 0.01]
CNN = {"model": "cnn", "width": 4, "epochs": 1, "batch_size": 8, "image_size": 16, "lr": 0.05}


# --- verdicts --------------------------------------------------------------------------------------------------------


def verdict(*gaps, **how) -> str:
    return decide([gap(one) for one in gaps], **how)


@pytest.mark.parametrize(("gaps", "expected"), [(UP, HOLDS), (DOWN, FAILS), (NOISE, OPEN), ([0.3], OPEN)])
def test_a_difference_is_above_zero_below_or_undecided(gaps, expected):
    assert verdict(gaps) == expected
    turned = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[expected]
    assert verdict(gaps, want="worse") == verdict([-one for one in gaps]) == turned


def test_a_margin_moves_what_must_be_reached():
    assert verdict(UP, margin=0.1) == FAILS
    assert verdict([-0.004, -0.005, -0.006], margin=-0.01) == HOLDS
    assert verdict(DOWN, margin=-0.01) == FAILS
    assert verdict(NOISE, margin=-0.01) == OPEN


def test_a_margin_is_tested_as_a_shift_of_the_values():
    values, reference = np.array([0.51, 0.54, 0.5, 0.53]), np.array([0.5, 0.51, 0.5, 0.49])
    for one_draw in (False, True):
        moved = beyond(gap(values, reference, one_draw=one_draw), 0.03)
        direct = gap(values - 0.03, reference, one_draw=one_draw)
        assert (moved.difference, moved.p) == pytest.approx((direct.difference, direct.p))


def test_the_same_is_shown_by_a_short_interval_only():
    assert same([gap([0.001, -0.001, 0.0])], 0.01) == HOLDS
    assert same([gap(UP)], 0.01) == same([gap(DOWN)], 0.01) == FAILS
    assert same([gap(NOISE)], 0.01) == same([gap([0.0])], 0.01) == OPEN
    assert same([gap([0.001, -0.001, 0.0]), gap(UP)], 0.01) == FAILS


def test_an_interval_by_bootstrap_counts_like_one_over_seeds():
    one = gap([0.68, 0.7, 0.72, 0.71])
    known = spanned(one.difference, one.low, one.high, one.n)
    for margin in (0, 0.65, 0.7, 0.75):
        assert beyond(known, margin).p == pytest.approx(beyond(one, margin).p)
    assert decide([spanned(0.75, 0.74, 0.76, 1000)], margin=0.7) == HOLDS
    assert decide([spanned(0.72, 0.68, 0.76, 1000)], margin=0.7) == OPEN


def test_a_claim_about_several_needs_each_and_falls_with_one():
    assert verdict(UP, UP) == HOLDS
    assert verdict(UP, NOISE) == OPEN
    assert verdict(UP, NOISE, DOWN) == FAILS
    assert verdict() == OPEN


def test_a_claim_about_some_needs_one_and_falls_with_none():
    assert verdict(UP, NOISE, some=True) == HOLDS
    assert verdict(DOWN, NOISE, some=True) == FAILS
    assert verdict(UP, DOWN, some=True) == verdict(NOISE, some=True) == OPEN


def test_both_sides_are_corrected_for_the_number_of_differences():
    barely = [-0.010, -0.001, -0.0085, -0.012]  # below 0 at 95 %, not at 1 - 0.05 / 10
    above, others = [-one for one in barely], [UP] * 8 + [NOISE]
    assert verdict(barely) == FAILS
    assert verdict(barely, *others) == OPEN
    assert verdict(above, *[UP] * 9) == HOLDS  # Holm: the largest p needs no correction once all others are beyond
    assert statistics.judge([gap(one) for one in (above, *others)])[0].verdict == "undecided"


def test_the_rate_of_false_verdicts_is_at_most_the_stated_one():
    rng = np.random.default_rng(0)
    found = [verdict(*rng.normal(size=(4, 5)), some=True) for _ in range(400)]
    assert found.count(OPEN) >= 362  # 5 % on both sides together, 20 expected, sd 4
    for side in (HOLDS, FAILS):
        assert 1 < found.count(side) < 24  # 10 expected, sd 3


def planted(gaps: dict[str, list[float]], start: float = 0.5) -> dict[str, list[float]]:
    """Accuracies by method from differences to a common level."""
    return {name: [start + gap for gap in values] for name, values in gaps.items()}


def dynamic_accuracies(random, score, greedy):
    level = [0.0, 0.001, 0.002]
    gaps = {"static random 0.3": level, "static EL2N 0.3": score, "static prototypes 0.3": score}
    gaps |= {"dynamic random 0.3": random, "epsilon-greedy 0.3": greedy, "UCB 0.3": greedy, dynamic.FULL: level}
    return planted({**gaps, "InfoBatch 0.3": level, "RS2 0.3": level})


def test_dynamic_claims_hold_fail_and_stay_open():
    more = [0.15, 0.16, 0.155]
    order = [one.verdict for one in dynamic.claims(dynamic_accuracies(UP, DOWN, more), [0.7, 0.3])]
    assert order == [HOLDS, HOLDS, HOLDS]
    turned = [one.verdict for one in dynamic.claims(dynamic_accuracies(DOWN, UP, [-0.15, -0.16, -0.155]), [0.3])]
    assert turned == [FAILS, FAILS, FAILS]
    noisy = dynamic_accuracies(NOISE, [-gap for gap in NOISE], UP)
    assert [one.verdict for one in dynamic.claims(noisy, [0.3])] == [OPEN, OPEN, OPEN]


def test_dynamic_claims_are_about_30_percent_or_less():
    assert dynamic.claims(planted({dynamic.FULL: UP}), [0.7, 0.5]) == []


def calibration_accuracies(score, weighted, unweighted, zero):
    level = [0.0, 0.001, 0.002]
    gaps = {"random 0.3": level, "score only 0.3": score, "calibrated 0.5 0.3": weighted}
    return planted({**gaps, "unweighted 0.5 0.3": unweighted, "calibrated 0 0.3": zero, "everything": level})


def test_calibration_claims_hold_fail_and_stay_open():
    level, collapsed = [0.0, 0.001, 0.002], [-0.2, -0.21, -0.205]

    def verdicts(*values):
        return [one.verdict for one in calibration.claims(calibration_accuracies(*values), [0.5, 0.3], [0.25, 0.5])]

    assert verdicts(collapsed, level, DOWN, level) == [HOLDS] * 5
    assert verdicts(UP, DOWN, UP, DOWN) == [FAILS] * 5
    assert verdicts(DOWN, level, level, level) == [HOLDS, FAILS, HOLDS, OPEN, HOLDS]  # worse, but no collapse
    wide = [0.3, -0.4, 0.1]
    assert verdicts(wide, NOISE, [-gap for gap in NOISE], NOISE) == [OPEN] * 5


def test_toy_claims_hold_and_fail():
    level = [0.8, 0.801, 0.802]

    def found(hard, calibrated, unweighted):
        values = {"random": level, "EL2N-hard": hard, "calibrated": calibrated, "unweighted": unweighted}
        return {"everything": level} | {f"{m} {k:g}": v for k in calibration.TOY_KEEP for m, v in values.items()}

    low = [0.2, 0.21, 0.205]
    assert [one.verdict for one in calibration.toy_claims(found(low, level, low))] == [HOLDS] * 3
    assert [one.verdict for one in calibration.toy_claims(found(level, low, level))] == [FAILS] * 3


def transfer_accuracies(fine_tuned, scratch, half, scratch_whole=0.5):
    """Level 0.8 with pretraining; accuracies of 10 % kept, and of the pretraining on half by prototypes."""
    noise = np.array([0.0, 0.001, 0.002])
    found = {"pretrained: all 1": 0.8 + noise, "scratch: all 1": scratch_whole + noise, "random: all 1": 0.75 + noise}
    found["prototypes: all 1"] = 0.8 + np.array(half)
    for kind in ("random", "hard"):
        found[f"pretrained: {kind} 0.1"] = np.array(fine_tuned)
        found[f"scratch: {kind} 0.1"] = np.array(scratch)
    return {name: list(values) for name, values in found.items()}


def test_transfer_claims_hold_fail_and_stay_open():
    def verdicts(*values):
        return [one.verdict for one in transfer.claims(transfer_accuracies(*values), [0.5, 0.1])]

    level = [0.0, 0.001, 0.002]
    assert verdicts([0.7, 0.71, 0.705], [0.25, 0.26, 0.255], level) == [HOLDS] * 5
    assert verdicts([0.4, 0.41, 0.405], [0.6, 0.61, 0.605], [-0.1, -0.11, -0.105], 0.85) == [FAILS] * 5
    wide = [0.5, 0.3, 0.45]
    assert verdicts([0.6, 0.55, 0.65], wide, [0.05, -0.14, 0.0]) == [HOLDS, OPEN, OPEN, OPEN, OPEN]


def test_transfer_compares_losses_relative_to_everything():
    """0.8 -> 0.4 and 0.4 -> 0.2 both lose half, however different the points are."""
    found = {"pretrained: all 1": [0.8], "pretrained: hard 0.1": [0.4]}
    found |= {"scratch: all 1": [0.4], "scratch: hard 0.1": [0.2]}
    assert transfer.loss(found, "pretrained", "hard", 0.1) == transfer.loss(found, "scratch", "hard", 0.1) == [0.5]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_weights_of_logistic_regression_are_repetitions():
    x, y = calibration.toy_data(np.random.default_rng(0), 400)
    times = np.random.default_rng(1).integers(1, 4, 400)
    repeated = calibration.logistic(np.repeat(x, times, axis=0), np.repeat(y, times))
    assert np.allclose(calibration.logistic(x, y, times.astype(float)), repeated, atol=1e-8)
    assert not np.allclose(calibration.logistic(x, y), repeated, atol=1e-3)


def test_the_toy_shows_the_published_pattern():
    found = calibration.toy(8000, 0)
    assert 0.8 < found["everything"] < 0.86
    assert found["EL2N-hard 0.5"] > 0.8
    assert found["EL2N-hard 0.3"] < 0.25
    assert found["calibrated 0.3"] > found["random 0.3"] - 0.02
    assert found["calibrated 0.1"] > 0.75
    assert found["unweighted 0.3"] > 0.75
    assert found["unweighted 0.1"] < 0.6


def test_calibrated_rows_have_weights_of_mean_one():
    order, ids = np.random.default_rng(0).permutation(100), [str(number) for number in range(100)]
    rows, weights = calibration.calibrated(order, 100, 20, 0.5, ids, seed=1)
    assert set(order[:10]) < set(rows)
    assert len(rows) == 20
    assert np.isclose(weights[rows].mean(), 1)
    assert not weights[np.setdiff1d(np.arange(100), rows)].any()
    drawn = np.setdiff1d(rows, order[:10])
    assert np.allclose(weights[drawn] / weights[order[0]], (100 - 10) / 10)


def test_alpha_zero_is_random_with_equal_weights():
    order, ids = np.arange(50), [str(number) for number in range(50)]
    rows, weights = calibration.calibrated(order, 50, 10, 0.0, ids, seed=1)
    assert np.allclose(weights[rows], 1)
    assert list(rows) != list(range(10))
    assert list(rows) != list(calibration.calibrated(order, 50, 10, 0.0, ids, seed=2)[0])


@pytest.fixture
def vectors():
    """Three clusters in the plane, 90 examples; the label of row 0 is wrong."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    centres = np.array([[4, 0], [-4, 0], [0, 4]])
    inputs = torch.from_numpy((centres[labels] + rng.normal(size=(90, 2))).astype(np.float32))
    labels = labels.astype(np.int64)
    labels[0] = 1
    return Examples("", [f"{row:02d}.png" for row in range(90)], labels, ["a", "b", "c"], inputs)


def test_el2n_is_kept_and_finds_a_wrong_label(vectors, tmp_path):
    lab = Lab("x", "small", {"probe": {"model": "head", "batch_size": 16}}, tmp_path, tmp_path, "cpu")

    def el2n(seed: int) -> np.ndarray:
        scores, accuracy = lab.el2n(vectors, vectors, epochs=5, models=2, seed=seed)
        assert 0.9 < accuracy < 1
        return scores

    scores = el2n(0)
    assert scores.argmax() == 0
    assert scores.min() >= 0
    assert scores.max() <= 2**0.5
    records = tmp_path / "el2n"
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.h5")}
    assert np.array_equal(el2n(0), scores)
    assert {path: path.stat().st_mtime_ns for path in records.glob("*.h5")} == before
    assert not np.array_equal(el2n(1), scores)
    assert len(list(records.glob("*.h5"))) == 2


def test_fit_and_count_is_fit_with_fewer_looks(vectors, tmp_path):
    recipe = Recipe.for_model("head", epochs=4, batch_size=10)
    looked = []

    def sampler():
        return samplers.RandomDynamicSampler(90, 1 / 3, every=1, seed=0)

    ours = dynamic.fit_and_count(
        vectors, vectors, recipe, looks=4, tally=tmp_path, sampler=sampler(), seed=0, steps=36, device="cpu",
        on_epoch=lambda step, seconds, predictions: looked.append(step),
    )  # fmt: skip
    theirs = loop.fit(vectors, vectors, recipe, sampler=sampler(), seed=0, steps=36, device="cpu")
    assert np.array_equal(ours.predictions, theirs.predictions)
    assert ours.steps == theirs.steps == 36
    assert np.array_equal(ours.losses, theirs.losses)
    assert looked == [9, 18, 27, 36]  # epochs of 3 steps, a look at every 9
    times, passes = dynamic.read_counts(tmp_path)["dynamic random", 1 / 3]
    assert passes == 12
    assert times.sum() == 12 * 30
    assert 0 < times.max() < 12


def test_counts_are_of_the_set_that_was_trained_on(vectors, tmp_path):
    """Kept runs are not trained again, and the counts of another set of as many images stood in for theirs."""
    lab = Lab("dynamic", "small", {"every": 1}, tmp_path, tmp_path, "cpu")
    recipe = Recipe.for_model("head", epochs=1)
    own, again = (dynamic.tally_of(lab, vectors, vectors, recipe) for _ in range(2))
    other = dataclasses.replace(vectors, labels=vectors.labels[::-1].copy())
    assert own == again != dynamic.tally_of(lab, other, vectors, recipe)


def test_a_curve_with_more_looks_is_thinned_to_what_fewer_would_have_seen():
    ends = range(8, 97, 8)  # of the epochs; 96 steps

    def seen(looks):
        curve, looked = [], 0
        for step in ends:
            if dynamic.due(step, looked, 96, looks):
                curve, looked = [*curve, [step, 0.0, 0.0]], step
        return curve

    assert [step for step, *_ in seen(3)] == [32, 64, 96]
    assert len(seen(6)) == 6
    assert dynamic.thinned(seen(6), 3) == seen(3) == dynamic.thinned(seen(3), 3)


def test_never_sometimes_and_always():
    rows = dynamic.tally_rows({("UCB", 0.3): (np.array([0, 4, 4, 2, 1]), 4)})
    assert rows[0]["never"] == pytest.approx(0.2)
    assert rows[0]["always"] == pytest.approx(0.4)
    assert rows[0]["sometimes"] == pytest.approx(0.4)
    assert rows[0]["median"] == 2


def test_steps_to_the_target_need_every_seed():
    def outcome(curve):
        return Outcome(curve[-1][2], [1], [2], 1.0, 20, curve, right="80")

    fast, slow = [[10, 1.0, 0.6], [20, 2.0, 0.7]], [[10, 1.0, 0.4], [20, 2.0, 0.55]]
    rows = dynamic.table({"a": [outcome(fast), outcome(slow)]}, 0.5, 2)
    assert (rows[0]["steps_to_target"], rows[0]["seconds_to_target"], rows[0]["reached_target"]) == (15, 1.5, 2)
    rows = dynamic.table({"a": [outcome(fast), outcome(slow)]}, 0.6, 2)
    assert (rows[0]["steps_to_target"], rows[0]["reached_target"]) == (None, 1)


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, part, count in (("tiny", "train", 12), ("target", "train", 20), ("target", "test", 6)):
        for label in range(2):
            for number in range(count):
                seed = number + 100 * label + 1000 * (part == "test") + 5000 * (name == "tiny")
                write_image(root / name / part / f"class{label}" / f"{number:02d}.png", seed=seed, width=16, height=16)
    return root


def a_lab(name: str, data: Path, folder: Path, settings: dict) -> Lab:
    (folder / name).mkdir(parents=True, exist_ok=True)
    return Lab(name, "small", {"data": "target", "encoder": "mini", "seeds": 2, **settings}, data, folder / name, "cpu")


def again(lab: Lab, module, monkeypatch) -> list:
    """A second run of the experiment, in which nothing may be trained, and no figure, which takes long, is drawn."""

    def forbidden(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "epochs", forbidden)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(b"\x89PNG"))
    return module.run(lab)


def test_dynamic_from_images_to_claims(data, tmp_path, monkeypatch, capsys):
    settings = {
        "images": 32, "test_images": 8, "keep": [0.3], "every": 1, "looks": 2, "target_accuracy": 0.3,
        "probes": 1, "probe_epochs": 1, "recipe": CNN,
    }  # fmt: skip
    lab = a_lab("dynamic", data, tmp_path, settings)
    claims = dynamic.run(lab)
    assert len(claims) == 3
    assert "2 seeds" in claims[0].found
    with open(lab.folder / "table.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 1 + 8
    assert {row["steps"] for row in rows.values()} == {"4"}
    with open(lab.folder / "sometimes.csv") as file:
        assert len(list(csv.DictReader(file))) == 5
    assert (lab.folder / "figure.png").stat().st_size
    assert (lab.folder / "sometimes.png").stat().st_size
    assert again(lab, dynamic, monkeypatch) == claims
    report(lab, claims)
    assert "Random dynamic beats static random" in capsys.readouterr().out
    assert json.loads((lab.folder / "results.json").read_text())["settings"]["keep"] == [0.3]


def test_calibration_from_features_to_claims(data, tmp_path, monkeypatch):
    settings = {
        "keep": [0.3, 0.2], "calibrate": [0.5], "probes": 1, "probe_epochs": 1, "toy_images": 400, "toy_seeds": 2,
        "probe": {"model": "head", "hidden": 4, "batch_size": 8}, "recipe": {"model": "head"},
    }  # fmt: skip
    lab = a_lab("calibration", data, tmp_path, settings)
    claims = calibration.run(lab)
    assert len(claims) == 3 + 5
    with open(lab.folder / "table.csv") as file:
        assert len(list(csv.DictReader(file))) == 1 + 2 * 5
    with open(lab.folder / "toy.csv") as file:
        assert [row["kept"] for row in csv.DictReader(file)] == ["1.0", "0.5", "0.3", "0.1", "0.05"]
    assert (lab.folder / "figure.png").stat().st_size
    assert again(lab, calibration, monkeypatch) == claims


def test_transfer_from_images_to_claims(data, tmp_path, monkeypatch):
    settings = {
        "pretrain_data": "tiny", "pretrain_images": 20, "pretrain_keep": 0.5, "pretrain_recipe": CNN, "images": 32,
        "test_images": 8, "keep": [0.5, 0.1], "recipe": CNN,
        "fine_tune": {"lr": 0.02},
    }  # fmt: skip
    lab = a_lab("transfer", data, tmp_path, settings)
    claims = transfer.run(lab)
    assert len(claims) == 5
    with open(lab.folder / "table.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 4 + 2 * 2 * 2
    assert {row["seeds"] for row in rows.values()} == {"2"}
    assert len(list((lab.folder / "weights").glob("*.pt"))) == 3 * 2
    assert (lab.folder / "figure.png").stat().st_size
    kept = [json.loads(path.read_text())["key"]["recipe"] for path in lab.runs.glob("*.json")]
    assert {(one["weights"] is None, one["lr"]) for one in kept} == {(True, 0.05), (False, 0.02)}
    assert again(lab, transfer, monkeypatch) == claims


def test_pretraining_reaches_the_fine_tuning(data, tmp_path):
    """With one step at a rate of nearly nothing, the model is where its pretraining left it, but for the classifier."""
    settings = {"pretrain_data": "tiny", "pretrain_images": 20, "pretrain_keep": 0.5, "pretrain_recipe": CNN}
    files = transfer.pretrained(a_lab("transfer", data, tmp_path, settings), 0)
    state = torch.load(files["prototypes"], weights_only=True)
    source, _ = transfer.source_set(a_lab("transfer", data, tmp_path, settings))
    recipe = Recipe.for_model(**{**CNN, "lr": 1e-12}, weights=str(files["prototypes"]))
    model = loop.fit(source, None, recipe, steps=1, seed=5, device="cpu").model.state_dict()
    kernels = [name for name, value in state.items() if value.ndim == 4 and name.startswith("network")]
    assert len(kernels) == 7
    assert all(torch.allclose(model[name].cpu(), state[name], atol=1e-6) for name in kernels)
    others = torch.load(files["random"], weights_only=True)
    assert not torch.allclose(others[kernels[1]], state[kernels[1]])  # the first whitens, and is of the whole set


@pytest.mark.parametrize("name", ["transfer", "calibration", "dynamic"])
@pytest.mark.parametrize("size", ["small", "full"])
def test_configurations_can_be_read(name, size, tmp_path):
    for lab in Lab.open(name, size, tmp_path, tmp_path, HOME / "configs", "cpu"):
        assert lab.recipe().epochs >= 1
        assert lab.seeds >= 3
        assert 0.1 in lab.settings["keep"]
        lab.recipe(**lab.settings.get("fine_tune", {}))
        Recipe.for_model(**lab.settings.get("pretrain_recipe", {"model": "cnn"}))
