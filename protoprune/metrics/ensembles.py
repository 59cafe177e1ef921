"""Correctness and votes of many models -> difficulty: one float32 an example, larger = harder.

What this module does not know: files, how the models were trained, and how good an estimate is: with few models on
either side of a difference it is mostly noise (Feldman & Zhang 2020 used 2,000 to 4,000 of them).
"""

from __future__ import annotations

import warnings

import numpy as np

from protoprune.errors import ProtopruneError, UsageError

REDUCTIONS = ("max", "sum_abs")
BLOCK_BYTES = 64 << 20  # of the influence matrix held at a time, twice


def difference(
    right_in: np.ndarray, models_in: np.ndarray, right_out: np.ndarray, models_out: np.ndarray
) -> np.ndarray:
    """(n,) float32 memorization (Feldman & Zhang 2020): P[right | trained on it] - P[right | not], NaN for 0 models."""
    with np.errstate(invalid="ignore"):
        return (right_in / models_in - right_out / models_out).astype(np.float32)


def influence(subset: np.ndarray, test_correct: np.ndarray, reduce: str = "max") -> np.ndarray:
    """Influence of each training example on the test set, reduced to one number (Feldman & Zhang 2020).

    subset: (models, n) bool; test_correct: (models, n_test) bool. infl(i, j) = P[test j right | trained on i] -
    P[test j right | not], reduced over j by its maximum ('max') or by the sum of its absolute values ('sum_abs').
    High influence is kept first, as in the scores that Sorscher et al. released. The (n, n_test) matrix is made
    of as many training examples at a time as BLOCK_BYTES hold. NaN where all models or none were trained on i.
    """
    if reduce not in REDUCTIONS:
        raise UsageError(f"influence reduced by {reduce!r}: expected one of {', '.join(REDUCTIONS)}")
    models, n = subset.shape
    right = test_correct.astype(np.float32)  # counts up to 2^24 are exact
    if right.shape[1] == 0:
        raise UsageError("influence on an empty test set: record the models with test images")
    total = right.sum(axis=0)  # (n_test,)
    rows = max(1, BLOCK_BYTES // (4 * right.shape[1]))
    result = np.empty(n, np.float32)
    for first in range(0, n, rows):
        inside = subset[:, first : first + rows].astype(np.float32)  # (models, b)
        count = inside.sum(axis=0)[:, None]  # (b, 1)
        matrix = inside.T @ right  # (b, n_test): models that have i and get j right
        without = total - matrix
        with np.errstate(invalid="ignore"):
            matrix /= count
            without /= models - count
        matrix -= without
        part = matrix.max(axis=1) if reduce == "max" else np.abs(matrix, out=matrix).sum(axis=1, dtype=np.float64)
        result[first : first + rows] = part
    return result


def ddd(correct: np.ndarray) -> np.ndarray:
    """Share of the models that misclassify each example: dichotomous data difficulty (Meding et al. 2022).

    correct: (models, n) bool. 0 is 'trivial', 1 'impossible'.
    """
    return (~correct).mean(axis=0, dtype=np.float32)


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    """Entropy in nats of an ensemble's votes, (n, classes) counts: 0 when all agree, up to log(classes).

    NaN where there is no vote.
    """
    votes = np.asarray(votes, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = votes / votes.sum(axis=1, keepdims=True)
        return -np.where(share == 0, 0.0, share * np.log(share)).sum(axis=1).astype(np.float32)


def label_issues(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cleanlab's label quality (n,), which is the probability of the label, and (n,) bool: is it a label issue?

    labels: (n,); probabilities: (n, classes), of models that were not trained on the example (Northcutt et al. 2021).
    Raises ProtopruneError where cleanlab is not installed or cannot work with the labels.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        raise ProtopruneError(
            "label_issues needs cleanlab, which is not installed; pip install 'protoprune[labels]'"
        ) from None
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)  # float16 ones do not sum to 1
    try:
        with warnings.catch_warnings():  # of classes with few images, a line each
            warnings.simplefilter("ignore")
            issues = find_label_issues(labels, probabilities, n_jobs=1)
        return get_label_quality_scores(labels, probabilities), issues
    except ValueError as error:
        raise ProtopruneError(f"label_issues: cleanlab cannot work with these labels ({error})") from None
