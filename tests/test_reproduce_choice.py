"""The experiment choice: verdicts on planted numbers, and heads end to end at a toy size, taken up again."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "scripts" / "reproduce"))

import experiment_choice as choice  # noqa: E402
from lab import Lab, report  # noqa: E402

from protoprune.training import converged  # noqa: E402
from protoprune.training.examples import Examples  # noqa: E402
from protoprune.tuning.recipes import Candidate  # noqa: E402


def planted(gains: dict[tuple[float, str], float], seeds: int = 8) -> dict:
    """Accuracies of eight seeds, a little above and below those of random."""
    rng, found = np.random.default_rng(0), {}
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
        ({(0.05, "cover by class"): 0.05, (0.1, "cover by class"): 0.0}, "undecided"),
        ({(0.05, "cover by class"): 0.05, (0.1, "cover by class"): -0.03}, "does not hold"),
    ],
)
def test_a_claim_needs_every_fraction(gains, verdict):
    first = choice.judge(planted(gains))[0]
    assert first.claim == "Herding by class beats random at 10 % kept and less"
    assert first.verdict == verdict
    assert "x mini, head, 5% +4.8" in first.found


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
    quick = partial(converged.fit_head, strength=1.0)
    monkeypatch.setattr(converged, "fit_head", lambda *a, **k: fits.append(k["rows"]) or quick(*a, **k))
    monkeypatch.setattr(choice.running, "tune", lambda pool, keep, seed: type("T", (), {"winner": Candidate("easy")}))
    settings = {"sets": [["toy", "mini", 0]], "networks": [], "keeps": [0.1, 0.5], "seeds": 2, "resolution": 1e-3,
                "tune": [0.5], "tune_seeds": 1}  # fmt: skip
    lab = Lab("choice", "small", settings, tmp_path, tmp_path, "cpu")
    claims = choice.run(lab)
    report(lab, claims)
    assert len(fits) == 2 * (2 * len(choice.METHODS) + 1) + 1
    assert {len(rows) for rows in fits} == {14, 72, 144}
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == len(fits) + 1
    assert (tmp_path / "figure.png").stat().st_size > 5000
    choice.run(lab)
    assert len(fits) == len(table) - 1  # all of it was there
    assert (tmp_path / "summary.csv").read_text().count("\n") == 2 * len(choice.METHODS) + 1 + 1 + 1
