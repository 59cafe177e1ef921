"""The experiment choice: verdicts on planted numbers, and heads end to end at a toy size, taken up again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "scripts" / "reproduce"))

import experiment_choice as choice  # noqa: E402
from lab import Lab, report  # noqa: E402

from protoprune.errors import UsageError  # noqa: E402
from protoprune.training import converged  # noqa: E402
from protoprune.training.examples import Examples  # noqa: E402
from protoprune.tuning.recipes import Candidate  # noqa: E402


def planted(gains: dict[tuple[float, str], float], seeds: int = 8) -> dict:
    """Accuracies of eight seeds, a little above and below those of random."""
    rng, found = np.random.default_rng(1), {}
    for keep in sorted({keep for keep, _ in gains}):
        base = 0.6 + 0.01 * rng.standard_normal(seeds)
        found["x mini", "head", keep, "random"] = base
        for (at, method), gain in gains.items():
            if at == keep:
                found["x mini", "head", keep, method] = base + gain + 0.002 * rng.standard_normal(seeds)
    return found


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({(0.05, "cover by class"): 0.05, (0.1, "cover by class"): 0.03}, "holds"),
        ({(0.05, "cover by class"): 0.002, (0.1, "cover by class"): -0.002}, "undecided"),
        ({(0.05, "cover by class"): -0.05, (0.1, "cover by class"): -0.03}, "does not hold"),
    ],
)
def test_a_claim_is_one_test_of_the_mean_over_its_fractions(gains, verdict):
    first = choice.judge(planted(gains))[0]
    assert first.claim == "Herding by class beats random at 10 % kept and less"
    assert first.verdict == verdict
    mean = 100 * np.mean(list(gains.values()))
    assert abs(float(first.found.split("points: ")[1].split()[0]) - mean) < 0.3
    assert "8 seeds" in first.found


def test_one_data_set_that_speaks_against_a_claim_refutes_it():
    """The mean over both sets is well above 0."""
    found = planted({(0.1, "cover by class"): 0.10})
    other = planted({(0.1, "cover by class"): -0.03})
    claims = choice.judge(found | {("y mini", *key[1:]): values for key, values in other.items()})
    assert claims[0].verdict == "does not hold"
    assert "y mini -2.99" in claims[0].found


def test_a_claim_has_the_seeds_that_all_its_cells_have():
    found = planted({(0.05, "cover by class"): 0.05, (0.1, "cover by class"): 0.05})
    found["x mini", "head", 0.1, "cover by class"] = found["x mini", "head", 0.1, "cover by class"][:5]
    assert "5 seeds" in choice.judge(found)[0].found


def test_what_is_no_better_than_random_is_not_called_so():
    """Random lists, 150 times: 5 % may have a claim decided by its mean, and 5 % one by a data set."""
    wrong = 0
    for trial in range(150):
        rng = np.random.default_rng([trial, 4])
        found = {}
        for keep in (0.01, 0.05, 0.1, 0.3):
            for method in choice.METHODS:
                found["x mini", "head", keep, method] = 0.6 + 0.01 * rng.standard_normal(8)
        wrong += any(one.verdict != "undecided" for one in choice.judge(found))
    assert wrong <= 16  # with one data set both are nearly the same: 7.5 to 15


def test_the_mean_over_data_sets_is_tested_as_welch_does():
    """Of two sets the sum of the means is the difference to the other one's negative."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    one, other = 0.02 + 0.05 * rng.standard_normal(10), 0.01 + 0.02 * rng.standard_normal(5)
    found, expected = choice.together([one, other], 1e-6), stats.ttest_ind(one, -other, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference == pytest.approx((one.mean() + other.mean()) / 2)
    assert 2 * found.low == pytest.approx(expected.confidence_interval().low)
    assert choice.together([one], 1e-6).p == pytest.approx(stats.ttest_1samp(one, 0).pvalue)


def test_claims_differ_in_what_judged():
    found = planted({(0.05, "cover by class"): 0.05})
    pixels = {(key[0], f"cnn, {n} epochs", *key[2:]): values for key, values in found.items() for n in (20, 60)}
    claims = choice.judge(found | pixels)
    assert [one.claim for one in claims] == [
        "Herding by class beats random at 10 % kept and less",
        "From pixels, herding by class beats random at 5 and 10 % kept",
    ]


def test_hard_loses_where_it_is_worse():
    claims = choice.judge(planted({(0.1, "hard"): -0.1, (0.3, "hard"): -0.02}))
    assert [(one.claim, one.verdict) for one in claims] == [
        ("The hardest lose to random at 30 % kept and less", "holds")
    ]


def test_heads_at_a_toy_size_and_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 60)
    vectors = torch.from_numpy((rng.normal(size=(180, 6)) + 1.5 * np.eye(3, 6)[labels]).astype(np.float32))
    sets = [Examples("root", [f"{i:03d}" for i in range(180)], labels, ["a", "b", "c"], vectors)] * 2
    monkeypatch.setattr(Lab, "features", lambda self, name: sets)
    fits = []
    real, strengths = converged.fit_head, []

    def fit_head(*given, strength=None, **how):
        fits.append(how["rows"])
        strengths.append(strength)
        return real(*given, strength=1.0, **how)

    monkeypatch.setattr(converged, "fit_head", fit_head)
    monkeypatch.setattr(choice.running, "tune", lambda pool, keep, seed: type("T", (), {"winner": Candidate("easy")}))
    settings = {"networks": [], "keeps": [0.1, 0.5], "resolution": 1e-3, "tune": [0.5], "sets": [
        {"data": "toy", "encoder": "mini", "images": 0, "first_seed": 100, "seeds": 2, "tune_seeds": 1}]}  # fmt: skip
    lab = Lab("choice", "small", settings, tmp_path, tmp_path, "cpu")
    claims = choice.run(lab)
    report(lab, claims)
    assert len(fits) == 2 * (2 * len(choice.METHODS) + 1) + 1 + 3  # and three that choose the regularisation
    assert {len(rows) for rows in fits} == {14, 72, 144}
    assert set(strengths) == {None, 1.0}
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == len(fits) - 3 + 1
    assert (tmp_path / "figure.png").stat().st_size > 5000
    choice.run(lab)
    assert len(fits) == len(table) - 1 + 3  # all of it was there
    assert (tmp_path / "summary.csv").read_text().count("\n") == 2 * len(choice.METHODS) + 1 + 1 + 1
    assert (tmp_path / "seconds.csv").read_text().count("\n") == 1 + len(choice.METHODS) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tune": [0.1]}, "0.1 is not among keeps"), ({"networks": [{"methods": ["hard"]}]}, "expected random among")],
)
def test_what_would_have_nothing_to_be_compared_with_is_said_before_the_training(changes, message, tmp_path):
    settings = {"networks": [], "keeps": [0.3], "resolution": 1e-3, "tune": [0.3], "sets": []} | changes
    with pytest.raises(UsageError, match=message):
        choice.run(Lab("choice", "small", settings, tmp_path, tmp_path, "cpu"))


def test_some_classes_are_numbered_anew():
    labels = np.repeat([0, 1, 2, 3, 4], 4)
    whole = Examples("root", [str(i) for i in range(20)], labels, list("abcde"), torch.arange(20.0)[:, None])
    own = choice.some_classes(whole, 2)
    assert own.classes == ["a", "c", "e"]
    assert own.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert own.inputs[:, 0].tolist() == [*range(4), *range(8, 12), *range(16, 20)]
