"""Planted laws are recovered, preferred, and covered by their intervals; what cannot be decided is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune.errors import UsageError
from protoprune.evaluation.fits import LAWS, fit_laws, predict, verdict

SIZES = np.geomspace(500, 50_000, 8).round()
PLANTED = {
    "power": {"a": 3.0, "b": 0.35},
    "exponential": {"a": 0.4, "b": 5e-5},
    "power with offset": {"a": 5.0, "b": 0.6, "c": 0.05},
}


def noisy(law: str, seeds: int = 5, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    errors = predict(law, PLANTED[law], SIZES)
    return errors * (1 + noise * np.random.default_rng(seed).normal(size=(seeds, len(SIZES))))


def test_the_laws_by_hand():
    assert predict("power", {"a": 2, "b": 0.5}, [4]) == pytest.approx([1])
    assert predict("exponential", {"a": 2, "b": 0.5}, [4]) == pytest.approx([2 * np.exp(-2)])
    assert predict("power with offset", {"a": 2, "b": 0.5, "c": 0.25}, [4]) == pytest.approx([1.25])


@pytest.mark.parametrize("law", LAWS)
def test_exact_data_give_the_parameters_back(law):
    found = fit_laws(SIZES, predict(law, PLANTED[law], SIZES))
    assert found.best == law
    assert found.law(law).parameters == pytest.approx(PLANTED[law], rel=1e-4)
    assert found.law(law).intervals is None  # one seed
    assert found.law(law).rms_log < 1e-6


@pytest.mark.parametrize("law", LAWS)
def test_noisy_data_prefer_the_planted_law(law):
    found = fit_laws(SIZES, noisy(law), bootstrap=60)
    assert found.best == law
    assert found.decided
    assert found.delta > 6
    got = found.law(law)
    low, high = got.intervals["b"]
    assert low < PLANTED[law]["b"] < high
    assert high - low < PLANTED[law]["b"]
    assert got.wins > 0.9
    assert verdict(found).startswith(f"{law[0].upper()}{law[1:]} wins by")


@settings(max_examples=25)
@given(st.floats(0.05, 1.5), st.floats(0.05, 5), st.integers(0, 3))
def test_exponents_are_recovered_at_any_scale(b, a, power):
    sizes = SIZES * 10.0**power
    errors = predict("power", {"a": a * sizes[0] ** b * 0.1, "b": b}, sizes)
    got = fit_laws(sizes, errors).law("power").parameters
    assert got["b"] == pytest.approx(b, rel=1e-5)


def test_the_order_of_the_sizes_does_not_matter():
    errors, other = noisy("power"), np.random.default_rng(1).permutation(len(SIZES))
    assert fit_laws(SIZES, errors, bootstrap=5) == fit_laws(SIZES[other], errors[:, other], bootstrap=5)


def test_intervals_hold_what_they_say():
    """A 95 % interval of five seeds, with a part of the noise that all sizes of a seed share."""
    held = 0
    for trial in range(15):
        rng = np.random.default_rng(trial)
        errors = predict("power", PLANTED["power"], SIZES)
        errors = errors * (1 + 0.05 * rng.normal(size=(5, 8)) + 0.03 * rng.normal(size=(5, 1)))
        low, high = fit_laws(SIZES, errors, bootstrap=30).law("power").intervals["b"]
        held += low <= 0.35 <= high
    assert held >= 11  # P(fewer | 0.95) < 0.001


@pytest.mark.parametrize("law", ["power", "exponential"])
def test_an_interval_holds_its_estimate_and_an_offset_is_never_negative(law):
    found = fit_laws(SIZES, noisy(law, seeds=3), bootstrap=20)
    for one in found.laws:
        for key, value in one.parameters.items():
            low, high = one.intervals[key]
            assert low <= value <= high
            assert key != "c" or low >= 0


def test_a_narrow_range_of_sizes_decides_nothing():
    sizes = np.linspace(1000, 1300, 7)
    errors = predict("power", PLANTED["power"], sizes) * (1 + 0.02 * np.random.default_rng(3).normal(size=(4, 7)))
    found = fit_laws(sizes, errors, bootstrap=30)
    assert not found.decided
    assert found.rivals
    assert verdict(found).startswith("undecided between")


def test_too_few_sizes_for_three_parameters_leave_that_law_out():
    found = fit_laws(SIZES[:5], predict("power", PLANTED["power"], SIZES[:5]))
    assert found.law("power with offset").aicc is None
    assert found.best == "power"
    few = fit_laws(SIZES[:4], predict("power", PLANTED["power"], SIZES[:4]))
    assert few.best is None
    assert "too few to compare" in verdict(few)


def test_growing_errors_have_a_negative_exponent():
    assert fit_laws(SIZES, SIZES / 1e6).law("power").parameters["b"] == pytest.approx(-1)


def test_a_wild_seed_weighs_on_its_own_size_only():
    """One size with a huge spread between seeds: its mean is off, and the weights know."""
    errors = noisy("power", seeds=4, noise=0.005)
    errors[0, 3] *= 8
    b = fit_laws(SIZES, errors, bootstrap=0).law("power").parameters["b"]
    unweighted = -np.polyfit(np.log(SIZES), np.log(errors.mean(0)), 1)[0]
    assert abs(b - 0.35) < abs(unweighted - 0.35)


@pytest.mark.parametrize(
    ("sizes", "errors", "message"),
    [
        ([10, 20], [0.2, 0.1], "at least 3 sizes"),
        ([10, 20, 20], [0.3, 0.2, 0.1], "each once"),
        ([10, 20, 30], [0.3, 0.0, 0.1], "above 0"),
        ([10, 20, 30], [0.3, np.nan, 0.1], "above 0"),
        ([10, 20, 30], [0.3, 0.1], "expected \\(seeds, sizes\\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes, errors, message):
    with pytest.raises(UsageError, match=message):
        fit_laws(sizes, errors)


def test_where_laws_cannot_be_compared_none_is_best_in_a_share():
    found = fit_laws([10, 20, 40], np.array([[0.4, 0.3, 0.2], [0.41, 0.28, 0.21]]), bootstrap=5)
    assert [(law.aicc, law.wins) for law in found.laws] == [(None, None)] * 3


def test_noise_about_a_constant_is_fitted_too():
    """The exponent that suits it best is 0, whose logarithm ended a sweep after its training."""
    errors = [
        [0.0839, 0.1008, 0.1159, 0.0988], [0.0789, 0.0564, 0.0678, 0.0779],
        [0.0302, 0.0849, 0.0522, 0.06], [0.0837, 0.0823, 0.0936, 0.101],
    ]  # fmt: skip
    found = fit_laws([10, 11, 12, 13], errors, bootstrap=12)
    for law in found.laws:
        assert all(np.isfinite(ends).all() for ends in law.intervals.values())
        assert law.parameters["a"] > 0
