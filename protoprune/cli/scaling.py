"""`protoprune scaling`: parse, call, print.

Nothing heavy is imported here: torch, scipy and matplotlib load when the command runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.options import (
    BUDGET,
    Hidden,
    LabelOptions,
    MinSteps,
    Model,
    Results,
    TableOptions,
    TestSet,
    TrainingImages,
    TrainingOptions,
    number_of_clusters,
    numbers,
    refuse_idle,
    several,
    table_file,
    whole_numbers,
)
from protoprune.cli.outputs import check_folder, check_outputs
from protoprune.cli.progress import resumable, say
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import echo, print_table
from protoprune.cli.training import (
    hint_steps,
    kept_in,
    load_both,
    read_table,
    refuse_length,
    show_run,
    training_source,
)
from protoprune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from protoprune.evaluation.curves import Scaling
    from protoprune.training.examples import Examples


def scaling(
    *,
    test: TestSet,
    images: TrainingImages = None,
    features: Annotated[
        Path | None, typer.Option(help="Feature file of the training images: ranks them, and trains --model head.")
    ] = None,
    size: Annotated[list[str], typer.Option(metavar="NUMBERS", help="Initial numbers of images: 1000,2000,5000.")],
    keep: Annotated[list[str], typer.Option(metavar="NUMBERS", help="Fractions KEPT of each.")] = ["1,0.8,0.5,0.2"],
    order: Annotated[
        list[str], typer.Option(metavar="NAMES", help="Which are kept first: hard, easy, middle, random.")
    ] = ["hard,easy,random"],
    scores: Annotated[
        Path | None,
        typer.Option(help="Rank by this score table (larger = harder) instead of by clustering each initial set."),
    ] = None,
    k: Annotated[str, typer.Option(help="Number of clusters of each initial set, or auto.")] = "auto",
    balance: Annotated[
        float, typer.Option(help="Share of what is kept that is split evenly over classes (paper: 0.5).")
    ] = 0.0,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Seeds, each with initial sets of its own.")] = 3,
    budget: Annotated[str | None, typer.Option(help=BUDGET.format("the largest initial set", "steps"))] = None,
    min_steps: MinSteps = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Bootstrap samples for the intervals of the fits.")] = 200,
    model: Model = None,
    hidden: Hidden = None,
    out: Results = None,
    reading: TableOptions,
    training: TrainingOptions,
    labels: LabelOptions,
) -> None:
    """How does the error fall with more images, pruned and not?

    Sweep, fit scaling laws, draw.

    Trains at every initial size, keep fraction and order; fits a power law, an exponential and a power law with an
    offset to each curve and to the Pareto envelope (the lowest error at each number of images kept), and says which
    law wins, or that it is undecided.
    """
    from protoprune.evaluation.curves import check_options
    from protoprune.evaluation.curves import scaling as sweep
    from protoprune.scores import check_reading

    need_stdout(out)
    source, model = training_source(images, features, model, ranking=True)
    sizes, keeps = whole_numbers(size, "--size", example="1000,2000"), numbers(keep, "--keep")
    orders, clusters = several(order), number_of_clusters(k)
    recipe = training.recipe(model, hidden)
    refuse_length(recipe)
    check_options(keeps, orders, clusters, balance, recipe, budget, min_steps, training.device)
    check_reading(scores, **vars(reading))
    if min(keeps) == 1:
        refuse_idle("--keep 1 leaves nothing out, whatever the order; leave it out", "order")
    if seeds == 1 and bootstrap:
        refuse_idle("draws from several seeds; leave it out, or raise --seeds", "bootstrap")
    if scores is not None and clusters is not None:
        raise UsageError(f"--k {k}: --scores ranks without clustering; leave one of them out")
    _check_ranking(orders, scores, features, model)
    inputs = [table_file(scores), reading.rows, features, source, test, training.weights, *labels.files]
    check_folder(out, "scaling", inputs)
    check_outputs(*training.caches, inputs=inputs)
    train, tested = load_both(source, test, model, training, labels.arguments(), out)
    known, vectors = None, None
    if scores is not None:
        known = read_table(scores, train, **vars(reading))
    else:
        vectors = _vectors(features, train)
    hint_steps(recipe, max(1, round(min(sizes) * min(keeps))) if budget == "epochs" else max(sizes), min_steps)
    with resumable(kept_in(out and out / "runs")):
        result = sweep(
            train, tested, recipe, sizes=sizes, keeps=keeps, orders=orders, scores=known, features=vectors, seeds=seeds,
            k=clusters, balance=balance,
            budget=budget, min_steps=min_steps, bootstrap=bootstrap, folder=out and out / "runs",
            device=training.device, on_run=show_run(out),
        )  # fmt: skip
    if out is not None:  # before it is printed, which may fail
        from protoprune.evaluation import report
        from protoprune.evaluation.runs import settings_of

        config = {
            "command": "scaling", "train": os.fspath(source), "test": os.fspath(test), "sizes": sizes, "keeps": keeps,
            "orders": orders,
            "scores": scores and os.fspath(scores), "features": features and os.fspath(features), "k": k,
            "balance": balance, "bootstrap": bootstrap, "recipe": settings_of(recipe), "min_steps": min_steps,
            "device": training.device,
        }  # fmt: skip
        say(f"wrote {', '.join(report.save_scaling(out, result, config))}")
    _print_scaling(result)


def _check_ranking(orders: list[str], scores: Path | None, features: Path | None, model: str) -> None:
    """UsageError for files that rank which are not there, or which nothing ranks by; heads train on the features."""
    from protoprune.features.opening import missing

    if set(orders) == {"random"}:
        ranks = ["scores"] if model == "head" else ["scores", "features"]
        refuse_idle("ranks, and --order random asks for no ranking", *ranks)
    if scores is not None and features is not None and model != "head":
        raise UsageError(f"--features {features}: --scores ranks the images; leave one of them out")
    for path, what in ((table_file(scores), "score table"), (features, "feature file")):
        if path is not None and not path.exists():
            raise missing(path, what)


def _vectors(features: Path | None, train: Examples) -> np.ndarray | None:
    """(n, d) features of the training images, found by path; they rank, whatever their classes are."""
    if train.vectors:
        return train.inputs.numpy()
    if features is None:
        return None
    import numpy as np
    import torch

    from protoprune.clustering.vectors import check_finite
    from protoprune.evaluation.runs import list_rows
    from protoprune.features.opening import open_features
    from protoprune.paths import picked
    from protoprune.training.examples import Examples

    with open_features(features) as file:
        usable = np.flatnonzero(file.usable)
        table = Examples(
            file.provenance["root"], picked(file.paths, usable), np.zeros(len(usable), np.int64), [], torch.empty(0),
            [(path, reason) for path, _, reason in file.failures()], every_path=file.paths,
        )  # fmt: skip
        rows = usable[list_rows(train.paths, table, "the training set")]
        vectors = np.asarray(file.features[:][rows], np.float32)
    check_finite(os.fspath(features), vectors, train.paths)
    return vectors


def _print_scaling(result: Scaling) -> None:
    sizes = list(dict.fromkeys(point.size for point in result.points))
    found = {(point.order, point.keep, point.size): point for point in result.points}
    rows = []
    for order, keep in dict.fromkeys((point.order, point.keep) for point in result.points):
        errors = [found[order, keep, size].error.mean for size in sizes]
        rows.append([order, f"{keep:g}", *(f"{100 * error:.2f}" for error in errors)])
    print_table(["error (%) of", "keep", *(f"{size:,}" for size in sizes)], rows)
    laws = _print_laws(result)
    for curve in result.curves:
        echo(f"{curve.name}: {curve.verdict}")
    for warning in result.warnings:
        say(f"warning: {warning}")
    if laws:
        ahead = "a law wins with AICc 6 (20 to 1) ahead"
        if any(law.intervals for curve in result.curves if curve.fits for law in curve.fits.laws):
            echo(f"Intervals (95 %) cover the seeds, not the choice of the law; {ahead} in nine of ten samples too.")
        else:
            echo(f"{ahead[0].upper()}{ahead[1:]}.")


def _print_laws(result: Scaling) -> bool:
    """The fits, and whether there are any. Three parameters through three or four points say nothing; fits.csv has them
    all the same."""
    from protoprune.evaluation.report import fit_rows

    laws = [row for row in fit_rows(result) if row["c"] is None or row["delta_aicc"] is not None]
    if laws:
        echo("")
        body = [[row["curve"], row["law"], *(_parameter(row, key) for key in "abc"), *_quality(row)] for row in laws]
        print_table(["curve", "law", "a", "b", "c", "AICc above the best", "best in"], body)
    return bool(laws)


def _parameter(row: dict[str, Any], key: str) -> str:
    if row[key] is None:
        return ""
    interval = "" if row[f"{key}_low"] is None else f" ({row[f'{key}_low']:.3g} to {row[f'{key}_high']:.3g})"
    return f"{row[key]:.3g}{interval}"


def _quality(row: dict[str, Any]) -> list[str]:
    delta = "" if row["delta_aicc"] is None else f"{row['delta_aicc']:.1f}"
    return [delta, "" if row["wins"] is None else f"{100 * row['wins']:.0f} %"]
