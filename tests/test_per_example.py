"""What is kept of an example, against the formulas in float64 numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from protoprune.records import STORED
from protoprune.training import per_example


def literal(logits: np.ndarray, labels: np.ndarray, previous: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """One example at a time, in float64."""
    out = {name: [] for name in ("prediction", *STORED) if name != "gradient_norm"}
    for i, (z, y) in enumerate(zip(logits.astype(np.float64), labels, strict=True)):
        p, q = softmax(z), None if previous is None else softmax(previous[i].astype(np.float64))
        out["prediction"].append(int(np.argmax(z)))
        out["true_probability"].append(p[y])
        out["margin"].append(z[y] - max(z[c] for c in range(len(z)) if c != y))
        out["error_norm"].append(np.linalg.norm(p - np.eye(len(z))[y]))
        out["loss"].append(-log_softmax(z)[y])
        out["entropy"].append(entropy(p))
        out["change"].append(0.0 if q is None else entropy(p, q))
    return {name: np.array(values) for name, values in out.items()}


@pytest.mark.parametrize(("n", "classes", "scale"), [(7, 2, 1), (1, 3, 1), (50, 10, 5), (20, 1000, 3), (9, 4, 30)])
def test_every_statistic_is_its_formula(n, classes, scale):
    rng = np.random.default_rng(n)
    logits, previous = (scale * rng.normal(size=(n, classes)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, classes, n)
    found = per_example.from_logits(torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(previous))
    expected = literal(logits, labels, previous)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_without_a_previous_epoch_there_is_no_change():
    found = per_example.from_logits(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
    assert found["change"].tolist() == [0.0] * 5


def test_models_come_first():
    logits = torch.randn(4, 6, 3)
    labels = torch.arange(6) % 3
    together = per_example.from_logits(logits, labels, logits.flip(0))
    for m in range(4):
        alone = per_example.from_logits(logits[m], labels, logits.flip(0)[m])
        for name, value in alone.items():
            assert torch.equal(together[name][m], value), name


@pytest.mark.parametrize("size", [1e4, 6e4, 1e30])
@pytest.mark.parametrize("classes", [2, 5])
def test_extreme_logits_stay_finite_also_in_float16(size, classes):
    logits = size * (2 * torch.eye(classes) - 1)
    labels = torch.zeros(classes, dtype=torch.int64)
    found = per_example.from_logits(logits, labels, -logits)
    for name, value in found.items():
        stored = value.numpy().astype(np.uint16 if name == "prediction" else np.float16)
        assert np.isfinite(stored).all(), name
    right, wrong = 0, 1
    assert found["true_probability"][[right, wrong]].tolist() == [1, 0]
    assert found["error_norm"][right] == 0
    assert found["error_norm"][wrong].item() == pytest.approx(2**0.5)
    assert found["loss"][right] == 0
    assert found["loss"][wrong] == min(2 * size, per_example.LARGEST)
    assert found["margin"][right] == min(2 * size, per_example.LARGEST) == -found["margin"][wrong]
    assert found["entropy"][right] == 0


def test_a_nearly_certain_example_keeps_its_error():
    """1 - p is 1e-4 here: 1 - 2p + sum p^2 would lose half of its digits."""
    gap = np.log(1e4 - 1)
    found = per_example.from_logits(torch.tensor([[gap, 0.0]]), torch.tensor([0]))
    assert found["error_norm"].item() == pytest.approx(2**0.5 * 1e-4, rel=1e-3)


def test_the_order_of_examples_and_a_common_offset_do_not_matter():
    logits, labels, order = torch.randn(20, 4), torch.arange(20) % 4, torch.randperm(20)
    before, moved = per_example.from_logits(logits, labels), per_example.from_logits(logits + 7, labels)
    shuffled = per_example.from_logits(logits[order], labels[order])
    for name, value in before.items():
        torch.testing.assert_close(moved[name], value, atol=2e-6, rtol=1e-4)
        assert torch.equal(shuffled[name], value[order]), name
