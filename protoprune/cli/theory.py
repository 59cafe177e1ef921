"""`protoprune theory ...` and `protoprune advise`: parse, call, print.

Nothing heavy is imported here: numpy, scipy, rich and matplotlib load when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.options import numbers, refuse_idle, spread
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import printable
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import echo, print_table
from protoprune.errors import UsageError
from protoprune.files import check_suffix, table_csv, write_file, write_stdout
from protoprune.units import many

if TYPE_CHECKING:
    import numpy as np

    from protoprune.theory.solver import Solution

theory_app = typer.Typer(
    help="Test error of pruned data in the teacher-student perceptron.\n\nThere it can be computed exactly.",
    no_args_is_help=True,
)


class Order(StrEnum):
    hard = "hard"
    easy = "easy"
    random = "random"


class Margin(StrEnum):
    absolute = "absolute"
    signed = "signed"


class Size(StrEnum):
    total = "alpha-tot"
    pruned = "alpha-prune"


# Options that take several numbers: repeated, or separated by commas.
Tots = Annotated[
    list[str] | None,
    typer.Option("--alpha-tot", metavar="NUMBERS", help="Examples a dimension before pruning: 2,5,10."),
]
Prunes = Annotated[list[str] | None, typer.Option("--alpha-prune", metavar="NUMBERS", help="Or: after pruning.")]
Keeps = Annotated[
    list[str], typer.Option("--keep", metavar="NUMBERS", help="Fractions kept, above 0 and at most 1: 1,0.5,0.2.")
]
Thetas = Annotated[
    list[str],
    typer.Option("--theta", metavar="NUMBERS", help="Probe angles in degrees: 0,10,20; 0 is a perfect probe."),
]
Theta = Annotated[float, typer.Option("--theta", min=0, max=89, help="Probe angle in degrees; 0 is a perfect probe.")]
OneOrder = Annotated[Order, typer.Option("--order", help="Which examples are kept.")]
OneMargin = Annotated[
    Margin, typer.Option("--margin", help="Rank by the probe's absolute margin, or by the signed one.")
]
Start = Annotated[float, typer.Option("--from", help="Smallest number of examples a dimension.")]
Stop = Annotated[float, typer.Option("--to", help="Largest number of examples a dimension.")]
MinKeep = Annotated[float, typer.Option("--min-keep", min=1e-4, max=0.99, help="Smallest fraction tried.")]
Points = Annotated[int, typer.Option("--points", min=2, max=500, help="Points on each line.")]
_MOST = 1e9  # examples a dimension, as `theory.solver.MAX_ALPHA`, whose numpy costs a tenth of a second


@dataclass(frozen=True)
class Simulation:
    """Whether the points are simulated too."""

    simulate: Annotated[
        int, typer.Option(min=0, help="Also simulate with this many seeds on all cores; 0 for none.")
    ] = 0
    dimension: Annotated[int, typer.Option(min=2, help="Dimension N of the simulation.")] = 200
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0

    def check(self) -> None:
        if not self.simulate:
            refuse_idle("goes with --simulate SEEDS, which it is about", "dimension", "seed")


@dataclass(frozen=True)
class Answer:
    """Where the rows go."""

    csv: Annotated[
        str | None, typer.Option(help="Write the rows to this file; '-' for stdout instead of the table.")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the rows to this .png or .svg file.")] = None

    def check(self) -> None:
        need_stdout(self.csv if self.csv != "-" else None, self.plot)
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise UsageError(f"--plot {self.plot}: expected a name that ends in .png or .svg")
        check_outputs(self.plot, stdout=self.csv)
        check_suffix(self.csv, (".csv",), "--csv")

    def give(self, rows: list[dict[str, Any]], *, x: str, y: str, by: tuple[str, ...], title: str) -> None:
        """The rows as a table, or as CSV on stdout; besides, to files."""
        from protoprune.lists import packed

        if self.plot is not None:
            write_file(self.plot, _draw(rows, self.plot.suffix[1:].lower(), x, y, by, title))
        if self.csv == "-":
            write_stdout(table_csv(rows))
            return
        if self.csv is not None:
            write_file(self.csv, packed(self.csv, [table_csv(rows)]))
        _print_rows(rows, title)


# --- commands --------------------------------------------------------------------------------------------------------


@theory_app.command()
@spread
def error(
    *,
    alpha_tot: Tots = None,
    alpha_prune: Prunes = None,
    keep: Keeps = ["1,0.5,0.2"],
    theta: Theta = 0.0,
    order: Annotated[Order | None, typer.Option(help="Which examples are kept; all three when left out.")] = None,
    margin: OneMargin = Margin.absolute,
    simulation: Simulation,
    answer: Answer,
) -> None:
    """Test error at given sizes and fractions kept."""
    (name, sizes), keeps = _sizes(alpha_tot, alpha_prune), _fractions(keep)
    answer.check()
    _check_probe(order)
    orders = [order] if order else list(Order)
    points = [
        (a if name == "alpha_tot" else a / f, f, theta, o.value, margin.value)
        for a in sizes
        for o in orders
        for f in keeps
    ]
    rows = _solve_rows(points, simulation)
    answer.give(rows, x="keep", y="error", by=(name, "order"), title="test error")


@theory_app.command()
@spread
def curve(
    *,
    keep: Keeps = ["1,0.5,0.2,0.1"],
    theta: Theta = 0.0,
    order: OneOrder = Order.hard,
    margin: OneMargin = Margin.absolute,
    start: Start = 0.5,
    stop: Stop = 20.0,
    points: Points = 20,
    against: Annotated[Size, typer.Option(help="What --from and --to count.")] = Size.pruned,
    simulation: Simulation,
    answer: Answer,
) -> None:
    """Test error by number of examples, a line a fraction kept."""
    _check_probe(order)
    keeps, grid = _fractions(keep), _grid(start, stop, points)
    answer.check()
    total = against is Size.total
    points_of = [(float(a if total else a / f), f, theta, order.value, margin.value) for f in keeps for a in grid]
    rows = _solve_rows(points_of, simulation)
    x = "alpha_tot" if total else "alpha_prune"
    answer.give(rows, x=x, y="error", by=("keep",), title=f"test error, {order.value} kept, theta {theta:g}")


@theory_app.command()
@spread
def pareto(
    *,
    theta: Thetas = ["0,10,20,40"],
    order: OneOrder = Order.hard,
    margin: OneMargin = Margin.absolute,
    start: Start = 0.5,
    stop: Stop = 16.0,
    points: Points = 10,
    min_keep: MinKeep = 0.01,
    answer: Answer,
) -> None:
    """Lowest test error at each pruned size."""
    thetas, grid = _angles(theta, order), _grid(start, stop, points)
    answer.check()
    from protoprune.theory.solver import pareto as envelope

    rows = [_row(s) for t in thetas for s in envelope(grid, t, order.value, margin.value, min_keep)]
    answer.give(rows, x="alpha_prune", y="error", by=("theta",), title=f"Pareto envelope, {order.value} kept")


@theory_app.command("best-keep")
@spread
def best_keep(
    *,
    alpha_tot: Tots = None,
    alpha_prune: Prunes = None,
    theta: Thetas = ["0,10,20,40"],
    order: OneOrder = Order.hard,
    margin: OneMargin = Margin.absolute,
    min_keep: MinKeep = 0.01,
    answer: Answer,
) -> None:
    """The fraction kept with the lowest test error.

    For a number of examples before or after pruning; of fractions that are as good the one that takes the fewest.
    """
    (name, sizes), thetas = _sizes(alpha_tot, alpha_prune), _angles(theta, order)
    answer.check()
    from protoprune.theory import solver as theory

    options: dict[str, Any] = {"order": order.value, "margin": margin.value, "min_keep": min_keep}
    rows = [_row(theory.best_keep(theta=t, **{**options, name: a})) for t in thetas for a in sizes]
    answer.give(rows, x=name, y="keep", by=("theta",), title=f"best fraction kept, {order.value}")


@theory_app.command()
@spread
def crossover(
    *,
    keep: Keeps = ["0.8,0.5,0.2"],
    theta: Thetas = ["0,10,20"],
    margin: OneMargin = Margin.absolute,
    answer: Answer,
) -> None:
    """The alpha_tot above which hard examples beat easy ones.

    And random ones; - says: not by 200.
    """
    keeps, thetas = _each(numbers(keep, "--keep", low=0, high=0.99)), _angles(theta)
    answer.check()
    from protoprune.theory.solver import crossover as cross

    rows: list[dict[str, Any]] = [
        {"keep": f, "theta": t, "margin": margin.value}
        | {f"alpha_tot_{rival}": cross(f, t, rival, margin.value) for rival in ("easy", "random")}
        for t in thetas
        for f in keeps
    ]
    answer.give(rows, x="keep", y="alpha_tot_easy", by=("theta",), title="hard wins above")


@theory_app.command()
@spread
def information(
    *,
    keep: Keeps = ["1,0.5,0.2,0.05"],
    start: Start = 0.1,
    stop: Stop = 20.0,
    points: Points = 12,
    answer: Answer,
) -> None:
    """Nats that one more kept example tells about the teacher.

    With hard examples kept, by a perfect probe.

    `gain` solves for both overlaps; `energetic` is the paper's form, which assumes that they are equal.
    """
    keeps, grid = _fractions(keep), _grid(start, stop, points)
    answer.check()
    from protoprune.theory.information import energetic_gain, information_gain

    solved = [information_gain(float(a), f) for f in keeps for a in grid]
    rows = [
        {"alpha_prune": s.alpha_prune, "keep": s.keep, "gain": s.gain, "energetic": energetic_gain(s.overlap, s.keep)}
        | {"overlap": s.overlap, "replica_overlap": s.replica_overlap}
        for s in solved
    ]
    answer.give(rows, x="alpha_prune", y="gain", by=("keep",), title="information an example (nats)")


def advise(
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of training images [default: as in --features].")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes [default: as in --features].")] = None,
    features: Annotated[Path | None, typer.Option(help="Feature file: images and classes are counted in it.")] = None,
    probe_quality: Annotated[
        float | None,
        typer.Option(min=0.5, max=1, help="Share of the labels that the model behind the score gets right."),
    ] = None,
) -> None:
    """What theory and measurements say about pruning data like this.

    For a data set of this size, and how sure they are.
    """
    from rich.console import Console

    from protoprune.theory.advice import advise as advice_for

    need_stdout()
    counts, quality, encoder = None, None, None
    if features is not None:
        found, counts, quality, encoder = _count(features)
        of_others = images not in (None, found) or classes not in (None, len(counts))
        images, classes = images or found, classes or len(counts) or None
        counts = None if of_others else counts
    if images is None or classes is None:
        missing = "--images" if images is None else "--classes"
        raise UsageError(
            f"{missing}: missing, and no feature file with labels says it; give the number, for example "
            f"{missing} {50000 if images is None else 10}"
        )
    if classes > images:
        raise UsageError(f"--classes {classes}: more than the {images} images; expected at least one image a class")
    console = Console(highlight=False, soft_wrap=False)
    with console.capture() as text:  # rich would end the process itself where nobody reads on
        size = f"{many(images, 'image')}, {many(classes, 'class', 'classes')}"
        console.print(f"{size}, {images / classes:,.0f} a class on average.\n")
        pieces = advice_for(images, classes, counts, probe_quality, knn=quality, encoder=encoder)
        for number, piece in enumerate(pieces, 1):
            console.print(printable(f"{number}. {piece.text}"), markup=False, style="bold")
            console.print(printable(f"   Because: {piece.support}."), markup=False)
            console.print(printable(f"   But: {piece.uncertainty}."), "\n", markup=False, sep="")
    typer.echo(text.get(), nl=False)


# --- options ---------------------------------------------------------------------------------------------------------


def _sizes(alpha_tot: list[str] | None, alpha_prune: list[str] | None) -> tuple[str, list[float]]:
    """Which of the two was given, and its numbers."""
    if (alpha_tot is None) == (alpha_prune is None):
        raise UsageError("--alpha-tot or --alpha-prune: give exactly one of the two, for example --alpha-tot 5")
    if alpha_prune is not None:
        return "alpha_prune", _each(numbers(alpha_prune, "--alpha-prune", low=0, high=_MOST))
    return "alpha_tot", _each(numbers(alpha_tot, "--alpha-tot", low=0, high=_MOST))


def _fractions(given: list[str]) -> list[float]:
    return _each(numbers(given, "--keep", low=0, high=1))


def _angles(given: list[str], order: Order = Order.hard) -> list[float]:
    """The probe's; one, of any, where examples are kept at random."""
    _check_probe(order)
    angles = _each(numbers(given, "--theta", low=0, high=89, closed=True))
    return angles[:1] if order is Order.random else angles


def _check_probe(order: Order | None) -> None:
    if order is Order.random:
        refuse_idle("is of the probe, and --order random asks no probe; leave it out", "theta", "margin")


def _each(values: list[float]) -> list[float]:
    """Without those that are given a second time."""
    return list(dict.fromkeys(values))


def _grid(start: float, stop: float, points: int) -> np.ndarray:
    """Sizes from start to stop, evenly spaced in the logarithm."""
    if not 0 < start < stop <= _MOST:
        raise UsageError(f"--from {start:g} --to {stop:g}: expected 0 < from < to, and at most {_MOST:g}")
    import numpy as np

    return np.geomspace(start, stop, points)


def _count(path: Path) -> tuple[int, list[int], float | None, str]:
    """Readable images of a feature file that have a class (all, where none has), those of each class that has any,
    k-NN's share of right labels, encoder."""
    import numpy as np

    from protoprune.features.opening import open_features
    from protoprune.tuning.knn import knn_accuracy

    with open_features(path) as file:
        labels = file.labels[file.usable]
        if (labels >= 0).any():  # images without one are in no class, of whose size the advice is about
            labels = labels[labels >= 0]
        counts = np.bincount(labels[labels >= 0])
        quality = knn_accuracy(file.features, np.where(file.usable, file.labels, -1))
        return labels.size, [int(c) for c in counts if c], quality, file.provenance["encoder"]


# --- rows and answers ------------------------------------------------------------------------------------------------


def _solve_rows(points: list[tuple[float, float, float, str, str]], simulation: Simulation) -> list[dict[str, Any]]:
    """A row a point, with the simulation's mean and standard error when asked for."""
    from protoprune.theory.solver import solve

    simulation.check()
    rows = [_row(solve(*point)) for point in points]
    if simulation.simulate:
        from protoprune.theory.simulation import simulate, worker_pool

        with worker_pool() as pool:
            for row, point in zip(rows, points, strict=True):
                result = simulate(
                    *point, dimension=simulation.dimension, seeds=simulation.simulate, seed=simulation.seed, pool=pool
                )
                row |= {"simulated": result.mean, "standard_error": result.standard_error}
    return rows


def _row(solution: Solution) -> dict[str, Any]:
    names = ("alpha_tot", "keep", "alpha_prune", "theta", "order", "margin", "error", "overlap", "kappa")
    return {name: getattr(solution, name) for name in names}


def _print_rows(rows: list[dict[str, Any]], title: str) -> None:
    if len(rows) == 1:
        print_table(None, [[name, _cell(value)] for name, value in rows[0].items()], title=title)
        return
    shared = [name for name in rows[0] if len({_cell(row[name]) for row in rows}) == 1]
    varying = [name for name in rows[0] if name not in shared]
    cells = [[_cell(row[name]) for name in varying] for row in rows]
    print_table([name.replace("_", " ") for name in varying], cells, title=title, right=range(len(varying)))
    if shared:  # said once: the columns must fit
        echo(", ".join(f"{name} {_cell(rows[0][name])}" for name in shared))


def _cell(value: float | str | None) -> str:
    if value is None or value != value:  # the standard error of one simulation
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def _label(row: dict[str, Any], by: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {_cell(row[name])}" for name in by)


def _draw(rows: list[dict[str, Any]], format: str, x: str, y: str, by: tuple[str, ...], title: str) -> bytes:
    """One line for each combination of the columns `by`; simulated values as points with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label in dict.fromkeys(_label(row, by) for row in rows):
        group = [row for row in rows if _label(row, by) == label and row[y] is not None]
        (line,) = axes.plot(
            [r[x] for r in group], [r[y] for r in group], marker="." if len(group) < 3 else None, label=label
        )
        if group and "simulated" in group[0]:
            spread = [r["standard_error"] for r in group]
            axes.errorbar(
                [r[x] for r in group], [r["simulated"] for r in group], spread, fmt="o", ms=3, color=line.get_color()
            )
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log", yscale="log")
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=120)
    plt.close(figure)
    return buffer.getvalue()
