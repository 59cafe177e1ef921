"""The theory against reference values, limits, the paper's equations and simulation; and the commands that ask it."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import ndtr
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import Status
from protoprune.theory import simulation
from protoprune.theory import solver as theory
from protoprune.theory.advice import advise as advice_for
from protoprune.theory.information import energetic_gain, information_gain
from protoprune.theory.simulation import max_margin, select, simulate, worker_pool
from protoprune.theory.solver import best_keep, crossover, kept_region, pareto, solve

# (alpha_tot, keep, theta, order, margin), test error: derived independently, from the paper's double integrals.
REFERENCE = [
    ((2, 1, 0, "random", "absolute"), 0.1885),
    ((5, 1, 0, "random", "absolute"), 0.0938),
    ((2, 0.5, 0, "hard", "absolute"), 0.3210),
    ((5, 0.5, 0, "hard", "absolute"), 0.0998),
    ((10, 0.2, 0, "hard", "absolute"), 0.0971),
    ((2, 0.5, 0, "easy", "absolute"), 0.1818),
    ((10, 0.2, 0, "easy", "absolute"), 0.0840),
    ((5, 0.5, 20, "hard", "absolute"), 0.1303),
    ((10, 0.2, 20, "hard", "absolute"), 0.3452),
    ((10, 0.2, 20, "hard", "signed"), 0.4001),
    ((20, 0.2, 10, "hard", "absolute"), 0.0393),
    ((20, 0.2, 40, "hard", "absolute"), 0.2124),
    ((20, 0.2, 40, "hard", "signed"), 0.4115),
]


def normal(x):
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


# --- solver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "expected"), REFERENCE)
def test_solver_gives_the_reference_errors(point, expected):
    assert solve(*point).error == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("point", "expected"), REFERENCE)
def test_simulation_agrees_within_three_standard_errors(point, expected):
    result = simulate(*point, dimension=200, seeds=10, seed=1)
    assert abs(result.mean - expected) < 3 * result.standard_error


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point, _ in REFERENCE])
def test_simulation_agrees_within_three_standard_errors_with_many_seeds(point):
    result = simulate(*point, dimension=200, seeds=48, seed=2)
    assert abs(result.mean - solve(*point).error) < 3 * result.standard_error


def test_every_corner_of_the_range_converges():
    rng = np.random.default_rng(0)
    for _ in range(150):
        alpha, keep = 10 ** rng.uniform(-1, np.log10(200)), 10 ** rng.uniform(-2, 0)
        theta = rng.choice([0.0, 0.01, rng.uniform(0, 5), rng.uniform(0, 80), 80.0])
        point = alpha, keep, theta, rng.choice(theory.ORDERS), rng.choice(theory.MARGINS)
        found = solve(*point)
        assert found.residual < theory.TOLERANCE, point
        assert 0 < found.error < 0.5, point
        assert found.kappa > 0, point


@pytest.mark.slow
def test_the_whole_range_converges():
    for alpha in np.geomspace(0.1, 200, 9):
        for keep in np.geomspace(0.01, 1, 7):
            for theta in (0, 1e-6, 0.1, 1, 5, 20, 45, 80):
                for order in ("hard", "easy"):
                    for margin in theory.MARGINS:
                        assert solve(alpha, keep, theta, order, margin).residual < theory.TOLERANCE


def test_error_times_alpha_tends_to_its_known_limit():
    assert 1000 * solve(1000).error == pytest.approx(0.5005, abs=1e-4)


def test_a_fixed_fraction_is_a_power_law_again():
    assert solve(200 / 0.2, 0.2).error / solve(100 / 0.2, 0.2).error == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("order", ["hard", "easy"])
@pytest.mark.parametrize("margin", ["absolute", "signed"])
def test_theta_zero_joins_small_theta(order, margin):
    at_zero = solve(8, 0.3, 0, order, margin).error
    assert solve(8, 0.3, 1e-8, order, margin).error == pytest.approx(at_zero, rel=1e-9)
    assert solve(8, 0.3, 0.01, order, margin).error == pytest.approx(at_zero, rel=1e-5)


@pytest.mark.parametrize("order", ["hard", "easy"])
def test_theta_zero_satisfies_the_papers_two_equations(order):
    found = solve(5, 0.5, 0, order)
    R, kappa, alpha, f = found.overlap, found.kappa, 2.5, 0.5
    s = np.sqrt(1 - R * R)
    g = kept_region(f, 0, order).intervals[-1][1 if order == "hard" else 0]

    def bracket(function, u):
        near, far = (-R * u / s if function is upper else R * u / s), (g - R * u) / s
        return function(near) - function(far) if order == "hard" else function(far)

    def upper(x):
        return ndtr(-x)

    first = quad(lambda u: normal(u) * (kappa - u) * bracket(normal, u), -12, kappa, epsabs=1e-12)[0]
    second = quad(lambda u: normal(u) * (kappa - u) ** 2 * bracket(upper, u), -12, kappa, epsabs=1e-12)[0]
    assert 2 * alpha / (f * s) * first == pytest.approx(R, abs=1e-8)
    assert 2 * alpha / f * second == pytest.approx(1 - R * R, abs=1e-8)


@pytest.mark.parametrize("margin", ["absolute", "signed"])
@pytest.mark.parametrize("theta", [10, 40])
def test_solution_satisfies_the_papers_three_equations(margin, theta):
    """Double integrals over u (student) and z (probe), which the solver never forms."""
    found = solve(20, 0.2, theta, "hard", margin)
    alpha, R, rho, kappa, t = 4.0, found.overlap, found.probe_overlap, found.kappa, np.radians(theta)
    low, high = kept_region(0.2, theta, "hard", margin).intervals[0]
    x, weight = np.polynomial.legendre.leggauss(400)
    low = max(low, -12.0)
    z, dz = (low + (high - low) * (1 + x) / 2)[:, None], (weight * (high - low) / 2)[:, None]
    u, du = (kappa - 6 * (1 + x))[None, :], (6 * weight)[None, :]
    cos, sin2 = np.cos(t), np.sin(t) ** 2
    L = np.sqrt(sin2 - R**2 - rho**2 + 2 * rho * R * cos)
    G = np.exp(-((u - rho * z) ** 2) / (2 * (1 - rho**2))) / np.sqrt(2 * np.pi * (1 - rho**2))
    wrong = ndtr(-(z * (rho * R - cos) - u * (R - rho * cos)) / (np.sqrt(1 - rho**2) * L))
    D = z**2 * (rho**2 + cos**2 - 2 * rho * R * cos) + 2 * u * z * (R * cos - rho) + u**2 * sin2
    near = np.exp(-D / (2 * L**2))

    def mean(values):
        return np.sum(values * dz * du * normal(z) / 0.2)

    one = alpha / (np.pi * L) * mean(near * (kappa - u))
    two = 2 * alpha * mean(G * wrong * (kappa - u) ** 2)
    inner = G * wrong * (z - rho * u) / (1 - rho**2) + near / (2 * np.pi * L) * (rho * R - cos) / (1 - rho**2)
    three = 2 * alpha * mean(inner * (kappa - u))
    assert one == pytest.approx((R - rho * cos) / sin2, abs=1e-6)
    assert two == pytest.approx(1 - (rho**2 + R**2 - 2 * rho * R * cos) / sin2, abs=1e-6)
    assert three == pytest.approx((rho - R * cos) / sin2, abs=1e-6)


def test_more_data_never_hurts_and_a_worse_probe_does():
    for order in theory.ORDERS:
        errors = [solve(a, 0.3, 15, order).error for a in np.geomspace(0.1, 200, 12)]
        assert np.all(np.diff(errors) < 0)
    assert np.all(np.diff([solve(20, 0.2, theta).error for theta in np.linspace(0, 35, 8)]) > 0)
    assert np.all(np.diff([best_keep(alpha_prune=4, theta=theta).error for theta in (0, 20, 80)]) > 0)


def test_the_worst_probe_is_a_mediocre_one():
    """A probe that knows nothing prunes at random, which hurts less than a confident and biased one."""
    mediocre, useless = solve(20, 0.2, 40).error, solve(20, 0.2, 88).error
    assert mediocre > useless > solve(20, 0.2, 0, "random").error


def test_keeping_everything_is_random_whatever_the_probe():
    for order in theory.ORDERS:
        assert solve(4, 1, 50, order, "signed").error == solve(4).error
    assert solve(8, 0.5, 30, "random").error == pytest.approx(solve(4).error, rel=1e-12)


def test_no_number_without_convergence():
    with pytest.raises(ProtopruneError, match=r"did not converge at alpha_tot 20, keep 0\.2, theta 20"):
        solve(20, 0.2, 20, iterations=1)


@pytest.mark.parametrize(
    ("point", "named"),
    [
        ((0, 0.5), "alpha_tot 0: expected a number above 0"),
        ((np.inf, 0.5), "alpha_tot inf: "),
        ((5, 0), "keep 0: "),
        ((5, 1.5), "keep 1.5: "),
        ((5, 0.5, 90), "theta 90: "),
        ((5, 0.5, 0, "hardest"), "order is 'hardest'"),
        ((5, 0.5, 0, "hard", "large"), "margin is 'large'"),
        ((5, 1e-300, 89, "hard", "signed"), "keep is too close to 0"),
    ],
)
def test_wrong_inputs_are_named(point, named):
    with pytest.raises(ProtopruneError, match=named):
        solve(*point)


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "alpha_prune", "keep", "error"),
    [
        (10, 2, 0.5, 0.147), (10, 4, 0.2, 0.039), (10, 8, 0.15, 0.0146),
        (20, 2, 0.65, 0.167), (20, 4, 0.4, 0.068), (20, 8, 0.3, 0.028), (20, 16, 0.2, 0.012),
        (40, 2, 0.8, 0.183), (40, 4, 0.65, 0.098), (40, 8, 0.5, 0.046), (40, 16, 0.4, 0.022),
    ],
)  # fmt: skip
def test_best_fraction_kept(theta, alpha_prune, keep, error):
    best = best_keep(alpha_prune=alpha_prune, theta=theta)
    assert best.keep == pytest.approx(keep, abs=0.05)  # the reference tried a coarse grid of fractions
    assert best.error == pytest.approx(error, abs=6e-4)
    assert best.error <= solve(alpha_prune / keep, keep, theta).error


@pytest.mark.parametrize(("keep", "error"), [(1, 0.1885), (0.5, 0.136), (0.2, 0.097), (0.05, 0.060)])
def test_hard_beats_random_at_equal_size_when_data_is_plentiful(keep, error):
    assert solve(2 / keep, keep).error == pytest.approx(error, abs=5e-4)


def test_the_envelope_is_below_every_fraction():
    for best in pareto([1.0, 4.0], theta=10):
        assert all(best.error <= solve(best.alpha_prune / f, f, 10).error + 1e-9 for f in (1, 0.5, 0.2, 0.05))
    assert solve(3 / 0.05, 0.05).error == pytest.approx(0.0088, abs=5e-4)


def test_crossover_is_where_the_two_orders_are_equal():
    alpha = crossover(0.5)
    assert solve(alpha, 0.5, 0, "hard").error == pytest.approx(solve(alpha, 0.5, 0, "easy").error, rel=1e-5)
    assert solve(2 * alpha, 0.5, 0, "hard").error < solve(2 * alpha, 0.5, 0, "easy").error
    assert 1.1 < 0.8 * crossover(0.8, rival="random") < 0.2 * crossover(0.2, rival="random") < 1.8
    assert crossover(0.5, span=(20, 200)) == 20


def test_of_fractions_that_are_as_good_the_best_takes_the_fewest_examples():
    """It was the lowest in the sixteenth digit: 0.383 of 40 examples a dimension, though 0.2 does as well."""
    best = best_keep(alpha_tot=40)
    assert 0.19 < best.keep < 0.25
    assert best.error == pytest.approx(solve(40, 1.0).error, rel=1e-8)
    for size in ({"alpha_prune": 4}, {"alpha_tot": 4}):
        assert best_keep(**size, order="random").keep == 1


def test_best_keep_wants_one_size():
    with pytest.raises(UsageError, match="exactly one"):
        best_keep(alpha_tot=2, alpha_prune=1)


# --- information -----------------------------------------------------------------------------------------------------


def test_information_limits():
    assert energetic_gain(1e-9, 1) == pytest.approx(np.log(2), abs=1e-6)
    assert energetic_gain(1 - 1e-5, 1e-6) == pytest.approx(1, abs=1e-3)
    assert information_gain(1e-4).gain == pytest.approx(np.log(2), abs=1e-4)
    assert 100 * information_gain(100).gain == pytest.approx(1, abs=0.01)


def test_random_data_keeps_the_two_overlaps_equal():
    found = information_gain(2)
    assert found.overlap == pytest.approx(found.replica_overlap, rel=1e-8)
    assert found.gain == pytest.approx(energetic_gain(found.overlap, 1), rel=1e-8)


@pytest.mark.parametrize("keep", [1, 0.3])
def test_information_is_the_slope_of_the_entropy(keep):
    def entropy(alpha):
        s = information_gain(alpha, keep)
        q, R = s.replica_overlap, s.overlap
        return np.log(1 - q) / 2 + (q - R * R) / (2 * (1 - q)) - alpha * s.gain

    slope = (entropy(1.501) - entropy(1.499)) / 0.002
    assert -slope == pytest.approx(information_gain(1.5, keep).gain, rel=1e-5)


def test_information_errors_name_the_value():
    for call, named in [((0, 1), "alpha_prune 0: "), ((1, 0), "keep 0: ")]:
        with pytest.raises(ProtopruneError, match=named):
            information_gain(*call)
    with pytest.raises(UsageError, match="overlap 1: "):
        energetic_gain(1, 0.5)


# --- simulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "dimension"), [(3, 6), (12, 6), (80, 10)])
def test_max_margin_is_the_solution_of_the_quadratic_programme(examples, dimension):
    signed = np.random.default_rng(examples).standard_normal((examples, dimension))
    signed[:, 0] = np.abs(signed[:, 0])
    direction = max_margin(signed)
    programme = minimize(
        lambda J: J @ J / 2,
        10 * np.eye(dimension)[0],
        jac=lambda J: J,
        constraints={"type": "ineq", "fun": lambda J: signed @ J - 1, "jac": lambda J: signed},
        method="SLSQP",
        options={"ftol": 1e-10, "maxiter": 1000},
    )
    assert programme.success
    assert direction == pytest.approx(programme.x / np.linalg.norm(programme.x), abs=1e-5)


def test_the_working_set_finds_the_optimum_of_all_examples():
    signed = np.abs(np.random.default_rng(0).standard_normal((2000, 20)) * np.eye(20)[0]) + 0
    signed[:, 1:] = np.random.default_rng(1).standard_normal((2000, 19))
    direction = max_margin(signed)
    fields = signed @ direction
    support = signed[fields < fields.min() + 1e-6]
    weights = np.linalg.lstsq(support.T, direction, rcond=None)[0]
    assert np.all(weights > -1e-9)  # optimal: a non-negative combination of the examples on the margin ...
    assert support.T @ weights == pytest.approx(direction, abs=1e-8)  # ... and of nothing else


def test_contradictory_labels_are_an_error():
    with pytest.raises(ProtopruneError, match="not linearly separable"):
        max_margin(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))


def test_selection_keeps_the_right_end():
    y, w = np.array([0.1, 3.0, 1.0, 0.5]), np.array([0.0, 0.0, 0.0, -9.0])
    rng = np.random.default_rng(0)
    assert sorted(select(y, w, 0.5, 0, "hard", "absolute", rng)) == [0, 3]
    assert sorted(select(y, w, 0.5, 0, "easy", "absolute", rng)) == [1, 2]
    assert sorted(select(y, w, 0.25, 45, "hard", "signed", rng)) == [3]  # the probe is surest of it, and wrong
    assert sorted(select(y, w, 0.25, 45, "easy", "absolute", rng)) == [3]
    assert len(select(y, w, 1, 0, "easy", "absolute", rng)) == 4


def test_the_pool_changes_no_number(monkeypatch):
    monkeypatch.setattr(simulation, "cores", lambda: 2)
    point = {"alpha_tot": 3, "keep": 0.5, "theta": 20, "dimension": 20, "seeds": 4, "seed": 5}
    with worker_pool() as pool:
        assert simulate(**point, pool=pool).errors.tolist() == simulate(**point).errors.tolist()
    assert simulate(**point | {"seed": 6}).errors.tolist() != simulate(**point).errors.tolist()


def test_an_interrupt_is_the_parents_business_and_ends_the_pool_at_once(monkeypatch):
    monkeypatch.setattr(simulation, "cores", lambda: 1)

    def asleep():
        with worker_pool() as pool:
            worker = pool.submit(os.getpid).result()
            os.kill(worker, signal.SIGINT)  # as a terminal sends it to all of them
            assert pool.submit(os.getpid).result() == worker
            pool.submit(time.sleep, 60)
            raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asleep()
    assert time.monotonic() - before < 30
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_simulation_errors_name_the_value():
    with pytest.raises(UsageError, match="--dimension 1: expected at least 2"):
        simulate(2, dimension=1)
    with pytest.raises(UsageError, match="order is 'hardest'"):
        simulate(2, 0.5, order="hardest")
    with pytest.raises(UsageError, match="no example at all"):
        simulate(0.01, dimension=20)
    with pytest.raises(UsageError, match=r"alpha_tot 2 in 20 dimensions, 0\.001 of it kept, is no example at all"):
        simulate(2, 0.001, dimension=20)  # one was kept, 25 times as many as asked for
    with pytest.raises(UsageError, match=r"in 100,000 dimensions takes 1[\d.,]+ TB a seed"):
        simulate(1000, dimension=100_000)  # the process would be killed


# --- commands --------------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120", "TERMINAL_WIDTH": "120"})


def run_line(line):
    return run(*line.split())


def rows_of(result):
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout)))


def test_error_command_writes_csv_to_stdout():
    rows = rows_of(run("theory", "error", "--alpha-tot", "2,5", "--keep", "0.5", "--order", "hard", "--csv", "-"))
    assert [round(float(row["error"]), 4) for row in rows] == [0.3210, 0.0998]


def test_several_numbers_are_repeated_or_separated_by_commas():
    once = rows_of(run_line("theory error --alpha-tot 2,5 --keep 0.5,0.2 --order hard --csv -"))
    assert (
        rows_of(run_line("theory error --alpha-tot 2 --alpha-tot 5 --keep 0.5 --keep 0.2 --order hard --csv -")) == once
    )
    assert rows_of(run_line("theory error --alpha-tot 2, --alpha-tot 5 --keep 0.5,,0.2 --order hard --csv -")) == once


def test_error_command_takes_the_size_after_pruning():
    rows = rows_of(run_line("theory error --alpha-prune 1,2.5 --keep 0.5 --order hard --csv -"))
    assert [round(float(row["error"]), 4) for row in rows] == [0.3210, 0.0998]


def test_tables_fit_and_say_shared_values_once():
    result = run("theory", "error", "--alpha-tot", "5")
    assert result.exit_code == 0
    assert "0.09983" in result.stdout
    assert "…" not in result.stdout
    assert result.stdout.count("alpha_tot 5") == 1
    assert "0.09983" in run_line("theory error --alpha-tot 5 --keep 0.5 --order hard").stdout


def test_it_simulates_and_no_number_is_cut_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("protoprune.theory.simulation.cores", lambda: 1)  # each process takes a second to start
    narrow = {"COLUMNS": "20", "TERMINAL_WIDTH": "20"}
    line = ["theory", "error", "--alpha-tot", "2.5", "--keep", "0.5,0.2", "--simulate", "2", "--dimension", "20"]
    result = CliRunner().invoke(app, [*line, "--csv", str(tmp_path / "rows.csv")], env=narrow)
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert all(abs(float(row["simulated"]) - float(row["error"])) < 0.15 for row in rows)
    assert all(float(row["standard_error"]) > 0 for row in rows)
    header, *lines = result.stdout.splitlines()[1:-1]
    names = re.split(r"  +", header.strip())
    assert [dict(zip(names, one.split(), strict=True)) for one in lines] == [
        {name: (row[key] if key == "order" else f"{float(row[key]):.4g}")
         for name in names for key in [name.replace(" ", "_")]}
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("theory nosuch -h", "No such command 'nosuch'; see `protoprune theory --help`"),
        ("theory nosuch", "No such command 'nosuch'"),
        ("nosuch", "No such command 'nosuch'; see `protoprune --help`"),
        ("theory error --alpha 5", "No such option: --alpha"),
        ("theory curve --points many", "--points"),
        ("theory curve --order best", "--order"),
        ("select --kep 0.5", "No such option: --kep"),
        ("select", "Missing option '--keep', the fraction to keep, such as --keep 0.7; see `protoprune select --help`"),
        ("--bogus", "No such option: --bogus; see `protoprune --help`"),
        ("select a b --keep 1", "b"),
    ],
)
def test_what_is_misspelt_is_said_in_one_line(line, said):
    result = run_line(line)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("line", ["", "theory"])
def test_no_words_at_all_ask_for_the_help(line):
    result = run_line(line)
    assert "Usage:" in result.output
    assert "error:" not in result.output


def test_curve_writes_plot_and_csv_files(tmp_path):
    for suffix in ("png", "svg"):
        table, plot = tmp_path / "rows.csv", tmp_path / f"plot.{suffix}"
        result = run("theory", "curve", "--points", 3, "--keep", "1,0.5", "--csv", table, "--plot", plot)
        assert result.exit_code == 0, result.output
        assert len(table.read_text().splitlines()) == 7
        assert plot.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "plot.svg", "rows.csv"]


def test_curve_against_the_whole_data():
    rows = rows_of(run_line("theory curve --against alpha-tot --from 2 --to 5 --points 2 --keep 0.5 --csv -"))
    assert [round(float(row["error"]), 4) for row in rows] == [0.3210, 0.0998]


def test_pareto_and_best_keep_commands_agree():
    (best,) = rows_of(run_line("theory best-keep --alpha-prune 4 --theta 20 --csv -"))
    line = rows_of(run_line("theory pareto --from 2 --to 4 --points 2 --theta 20 --csv -"))
    assert float(best["error"]) == pytest.approx(float(line[-1]["error"]))
    assert float(best["keep"]) == pytest.approx(0.4, abs=0.05)


def test_crossover_command_leaves_a_missing_crossing_empty(tmp_path):
    result = run("theory", "crossover", "--keep", "0.5,0.05", "--theta", "20", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert " - " in result.stdout
    assert "4.313" in result.stdout


def test_information_command():
    rows = rows_of(run_line("theory information --keep 1 --from 0.001 --to 1 --points 2 --csv -"))
    assert float(rows[0]["gain"]) == pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("theory error --alpha-tot 5 --keep 0", "--keep 0: not a number above 0 and at most 1"),
        ("theory error --alpha-tot 5 --keep a", "--keep a: not a number"),
        ("theory error --alpha-tot ,", "empty"),
        ("theory error --alpha-tot inf", "--alpha-tot inf: not a number"),
        ("theory error --alpha-tot 5 --plot a.jpg", "expected a name that ends in .png or .svg"),
        ("theory best-keep", "exactly one of the two"),
        ("theory error --alpha-tot 5 --alpha-prune 5", "exactly one of the two"),
        ("theory pareto --from 5 --to 2", "0 < from < to"),
        ("theory pareto --theta 95", "--theta 95: not a number from 0 and at most 89"),
        ("advise --images 100", "--classes"),
        ("advise --classes 10", "--images"),
        ("advise --images 5 --classes 10", "at least one image a class"),
        ("advise --images 5 --classes 1 --probe-quality 2", "probe-quality"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_value(words, named):
    result = run_line(words)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unwritable_file_is_one_clear_error(tmp_path):
    result = run("theory", "error", "--alpha-tot", "5", "--csv", tmp_path / "missing" / "rows.csv")
    assert result.exit_code == 2
    assert result.stderr.endswith("rows.csv: its folder does not exist; make it first\n")


@pytest.mark.timeout(60)
def test_csv_into_a_pipe_and_through_a_link(tmp_path):
    """A rename would put a file in the pipe's place, and another one in the place of the link."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert run("theory", "error", "--alpha-tot", "5", "--keep", "0.5", "--csv", pipe).exit_code == 0
    reader.join(20)
    assert len(got[0].splitlines()) == 4
    assert pipe.is_fifo()
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run("theory", "error", "--alpha-tot", "5", "--keep", "0.5", "--csv", tmp_path / "link.csv").exit_code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == got[0]


def test_one_file_for_two_outputs(tmp_path):
    (tmp_path / "rows.csv").symlink_to("plot.png")
    line = ("theory", "error", "--alpha-tot", "5", "--csv", tmp_path / "rows.csv", "--plot", tmp_path / "plot.png")
    assert "is named for two outputs" in run(*line).stderr
    assert not (tmp_path / "plot.png").exists()


def test_importing_the_commands_loads_nothing_heavy():
    heavy = "{'numpy', 'scipy', 'matplotlib', 'h5py', 'torch'}"
    code = f"import sys, protoprune.cli.theory; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "first"), [(1_281_167, "HARD"), (700_000, "RANDOM"), (100_000, "COVER")])
def test_advice_depends_on_the_images_a_class(images, first):
    assert first in advice_for(images, 1000)[0].text


def test_hard_is_no_promise_where_it_was_measured_not_to_win():
    """CIFAR-10, 5,000 images a class: at 80 and 60 % kept hard was no better than random, at 40 % worse."""
    first = advice_for(50_000, 10)[0]
    assert first.text.startswith("At 70 to 80 % kept compare HARD with RANDOM: 5,000 images a class")
    assert "CIFAR-10" in first.text
    assert "lost 3" in first.support


def test_a_safe_fraction_is_named_only_where_it_was_measured():
    assert any("80 %" in piece.text for piece in advice_for(1_281_167, 1000))
    assert not any("80 %" in piece.text for piece in advice_for(100_000, 1000))


@pytest.mark.parametrize("images", [500, 6_000, 50_000])
@pytest.mark.parametrize("quality", [None, 0.5, 0.6, 0.9, 1.0])
def test_every_advice_says_what_it_rests_on_and_how_unsure_it_is(images, quality):
    pieces = advice_for(images, 10, [images // 10] * 10, quality)
    for piece in pieces:
        assert piece.text.endswith(".")
        assert piece.support.startswith(("measured", "theory", "no measurement"))
        assert piece.uncertainty
        assert not piece.support.endswith(".")
        assert not piece.uncertainty.endswith(".")


def test_hard_at_30_percent_is_advised_only_where_it_was_measured():
    """Imagenette with features of high quality; poorer ones, and classes of few images, get cover."""
    for knn, images, words in (
        (0.98, 9_469, "try HARD"),
        (0.72, 9_469, "COVER each class"),
        (0.98, 600, "COVER each"),
        (0.98, 7_575, "try HARD"),
        (0.94, 7_575, "COVER each class"),
        (0.98, 7_000, "COVER each"),
    ):
        pieces = advice_for(images, 10, knn=knn, encoder="lite0")
        assert words in pieces[2].text
        assert f"right on {knn:.0%} of the labels" in pieces[3].text
        assert "features of lite0" in pieces[3].text
        assert "`protoprune tune --keep F`" in pieces[3].text


def test_the_numbers_that_the_advice_quotes():
    assert crossover(0.5) == pytest.approx(5.0, abs=0.1)
    assert 0.5 * crossover(0.5, rival="random") == pytest.approx(1.5, abs=0.05)
    assert [round(best_keep(alpha_prune=8, theta=t).keep, 2) for t in (10, 20, 40)] == [0.15, 0.28, 0.5]
    for alpha in (5, 20, 200):
        assert solve(alpha, 0.8, 20).error < 1.01 * solve(alpha).error


def test_a_guessing_probe_gets_no_ranking_advice():
    pieces = advice_for(50_000, 10, probe_quality=0.52)
    assert "Do not rank" in pieces[0].text
    assert not any("HARD" in piece.text for piece in pieces)


def test_a_worse_probe_is_told_to_keep_more():
    good, bad = (advice_for(50_000, 10, probe_quality=q)[-1].text for q in (0.95, 0.8))
    percent = [int(text.split("best fraction kept is ")[1].split("%")[0]) for text in (good, bad)]
    assert percent[0] < percent[1]


def test_advise_command_counts_a_feature_file(feature_file, tmp_path):
    paths = [f"a/{i}.png" for i in range(7)] + [f"b/{i}.png" for i in range(3)]
    paths += [f"d/{i}.png" for i in range(5)]  # these could not be read
    failed = dict.fromkeys(range(10, 15), Status.CORRUPT)
    out = feature_file(tmp_path / "some.h5", np.ones((15, 2)), paths=paths, failed=failed)
    result = run("advise", "--features", out)
    assert result.exit_code == 0, result.output
    assert "10 images, 2 classes" in result.stdout
    assert "3 to 7 images" in " ".join(result.stdout.split())
    assert "Split half of what is kept evenly over the 2 classes (`--balance 0.5`)." in " ".join(result.stdout.split())
    assert "protoprune tune" in result.stdout
    assert "Nearest neighbours in your features are right on " in " ".join(result.stdout.split())
    others = run("advise", "--features", out, "--images", 4000).stdout
    assert others.startswith("4,000 images, 2 classes")
    assert "Your classes hold" not in others  # they are of other images


@pytest.mark.parametrize(
    "command", ["error --alpha-tot 5", "curve --points 2", "pareto --points 2", "best-keep --alpha-tot 5"]
)
def test_random_examples_have_no_probe(command):
    """Its angle and its margin change nothing about them: typed they are refused, and their defaults give no rows."""
    for option in ("--theta 20", "--margin absolute"):
        result = run_line(f"theory {command} --order random {option}")
        assert result.exit_code == 2
        assert f"{option}: is of the probe, and --order random asks no probe; leave it out" in result.stderr
    rows = rows_of(run_line(f"theory {command} --order random --csv -"))
    assert {row["theta"] for row in rows} == {"0.0"}
    assert run_line("theory error --alpha-tot 5 --theta 20 --keep 1").exit_code == 0  # of all three orders


def test_numbers_that_are_given_twice_count_once():
    assert len(rows_of(run_line("theory error --alpha-tot 5,5 --keep 0.5,0.5,1 --order hard --csv -"))) == 2
