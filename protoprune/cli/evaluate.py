"""`protoprune evaluate`: parse, call, print.

Nothing heavy is imported here: torch, scipy and matplotlib load when the command runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
    TestSet,
    TrainingImages,
    TrainingOptions,
    numbers,
    refuse_idle,
    several,
)
from protoprune.cli.outputs import check_folder, check_outputs
from protoprune.cli.progress import resumable, say
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import echo, print_table
from protoprune.cli.training import (
    hint_steps,
    kept_in,
    load_both,
    refuse_length,
    show_run,
    time_text,
    training_source,
)
from protoprune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from protoprune.evaluation.comparing import Evaluation, Kept, Method
    from protoprune.training.examples import Examples

TrainingFeatures = Annotated[Path | None, typer.Option(help="Feature file of the training images, for --model head.")]


def evaluate(
    lists: Annotated[
        list[Path] | None, typer.Argument(help="Kept lists (txt, csv, jsonl, npy), with or without weights.")
    ] = None,
    *,
    test: TestSet,
    images: TrainingImages = None,
    features: TrainingFeatures = None,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Seeds: each trains once on everything compared.")] = 5,
    budget: Annotated[str | None, typer.Option(help=BUDGET.format("everything", "epochs"))] = None,
    min_steps: MinSteps = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Also train with these samplers at each --keep: random, egreedy, ucb, infobatch, rs2. "
            "Each takes as many optimizer steps as a random list of its size.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Fractions kept by --dynamic samplers (infobatch: of the losses below their mean).",
        ),
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Epochs between two selections of --dynamic [default: by sampler].")
    ] = None,
    target_accuracy: Annotated[
        float | None,
        typer.Option(help="Also report training time until this test accuracy, as a fraction (0.9)."),
    ] = None,
    everything: Annotated[bool, typer.Option(help="Train on everything too, to know what is lost and saved.")] = True,
    class_counts: Annotated[
        bool,
        typer.Option(
            help="Compare each list also with random images of its own class counts, to see which part of a difference "
            "those make."
        ),
    ] = True,
    selection_seconds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="What choosing cost, in seconds: one number for all lists, or one for each in order.",
        ),
    ] = None,
    model: Model = None,
    hidden: Hidden = None,
    out: Results = None,
    training: TrainingOptions,
    labels: LabelOptions,
) -> None:
    """Does a list pay? Train on it, on random images, on everything.

    For each seed a fresh random subset of the list's size is drawn; the order of the images, their augmentation and
    the model's start are the same for all, so that only the subset differs. Differences are paired by seed. A list is
    called better or worse than random only where the interval supports it: it covers the seeds and the luck of one
    draw, since a random list is better or worse than the average one too.

    Heads on features are trained to convergence, with the regularisation that suits their images: what they reach says
    something of the images, and not of the length of a training.
    """
    from protoprune.evaluation.comparing import check_options
    from protoprune.evaluation.comparing import evaluate as compare
    from protoprune.lists import check_again, read_list

    need_stdout(out)
    lists = lists or []
    if not lists:
        refuse_idle("is about lists, and there is none", "selection_seconds", "class_counts")
    source, model = training_source(images, features, model)
    samplers = _samplers(several(dynamic), numbers(keep, "--keep"), every)
    costs = _costs(
        numbers(selection_seconds, "--selection-seconds", low=0, high=1e9, closed=True, example="12"), len(lists)
    )
    recipe = training.recipe(model, hidden)
    refuse_length(recipe)
    check_options(lists, samplers, recipe, budget, min_steps, target_accuracy, training.device)
    inputs = [*lists, source, test, training.weights, *labels.files]
    check_folder(out, "evaluate", inputs)
    check_outputs(*training.caches, inputs=inputs)
    labels.arguments()
    for path in lists:
        check_again(os.fspath(path))  # for its weights
    listed = [read_list(path) for path in lists]
    train, tested = load_both(source, test, model, training, labels.arguments(), out)
    kept = [_kept(*one, train) for one in zip(lists, listed, costs, strict=True)]
    few = len(train) if budget == "steps" else min((len(one.rows) for one in kept), default=len(train))
    hint_steps(recipe, few, min_steps)
    with resumable(kept_in(out and out / "runs")):
        result = compare(
            train, tested, kept, recipe, seeds=seeds, budget=budget, min_steps=min_steps, dynamic=samplers,
            everything=everything, class_counts=class_counts, target_accuracy=target_accuracy,
            folder=out and out / "runs", device=training.device, on_run=show_run(out),
        )  # fmt: skip
    if out is not None:  # before it is printed, which may fail
        from protoprune.evaluation import report
        from protoprune.evaluation.runs import settings_of

        config = {
            "command": "evaluate", "lists": [os.fspath(path) for path in lists], "train": os.fspath(source),
            "test": os.fspath(test), "dynamic": samplers, "recipe": settings_of(recipe), "min_steps": min_steps,
            "device": training.device,
        }  # fmt: skip
        say(f"wrote {', '.join(report.save_evaluation(out, result, config, train.classes))}")
    _print_evaluation(result)


def _kept(path: Path, listed: list[str] | np.ndarray, cost: float | None, train: Examples) -> Kept:
    from protoprune.evaluation.comparing import Kept
    from protoprune.evaluation.runs import list_rows

    rows = list_rows(listed, train, os.fspath(path))
    return Kept(os.fspath(path), rows, _weights(path, rows, train), cost)


def _weights(path: Path, rows: np.ndarray, train: Examples) -> np.ndarray | None:
    """(m,) loss weights where the list has a weight column."""
    from protoprune import lists
    from protoprune.evaluation.runs import list_weights

    try:
        weights = lists.read_weights(path)
    except UsageError:  # a format without weights, or a list without the column
        return None
    return list_weights(weights, rows, train, os.fspath(path))


def _samplers(dynamic: list[str], keep: list[float], every: int | None) -> list[dict[str, Any]]:
    if bool(dynamic) != bool(keep) or (every and not dynamic):
        raise UsageError(
            "--dynamic NAME and --keep FRACTION go together, and --every with them (a list has its own size)"
        )
    options = {"every": every} if every else {}
    return [{"name": name, "keep": fraction, **options} for name in dynamic for fraction in keep]


def _costs(seconds: list[float], lists: int) -> list[float | None]:
    if len(seconds) not in (0, 1, lists):
        raise UsageError(f"--selection-seconds: {len(seconds)} numbers for {lists} lists; give one, or one for each")
    return [*seconds] if len(seconds) == lists else [seconds[0] if seconds else None] * lists


def _print_evaluation(result: Evaluation) -> None:
    header = ["", "kept", "accuracy", "against random", "against same classes", "against everything", "worst class"]
    header += ["training", "saved", "selection", "net saved"]
    if result.target_accuracy is not None:
        header.append(f"to {100 * result.target_accuracy:g} %")
    print_table(header, [_cells(one, result) for one in result.methods])
    judged = [one for one in result.methods if one.verdict]
    for one in judged:
        echo("; ".join([f"{one.name}: {one.verdict}", *filter(None, [one.class_verdict])]))
    for note in _notes(result, len(judged) + sum(one.to_classes is not None for one in judged)):
        echo(note)
    for warning in result.warnings:
        say(f"warning: {warning}")


def _notes(result: Evaluation, comparisons: int) -> Iterator[str]:
    """What the table's numbers are, a sentence or two a line."""
    if len(result.seeds) > 1:  # else only converged heads have any
        yield (
            f"Percentages and points with their {100 * result.confidence:g} % intervals; differences are paired by "
            "seed. Against random they cover the seeds and, for a list, the luck of one draw."
        )
    if result.budget == "convergence":
        yield (
            "Heads are trained to convergence, so that a list gives one number: its own interval, and that of its "
            f"difference to everything, are over test images ({100 * result.confidence:g} %)."
        )
    if any(one.to_classes for one in result.methods):
        yield "Same classes: random images with as many of each class as the list has."
    if comparisons > 1 and len(result.seeds) > 1:
        yield f"Each interval is for its own line alone; the verdicts allow for all {comparisons} comparisons (Holm)."


def _cells(one: Method, result: Evaluation) -> list[str]:
    from protoprune.evaluation.statistics import span

    random, matched, full = one.to_random, one.to_classes, one.to_everything
    cells = [
        one.name,
        f"{one.kept:,} ({100 * one.fraction:.3g} %)",
        span(one.accuracy.mean, one.accuracy.low, one.accuracy.high, digits=2),
        span(random.difference, random.low, random.high, sign="+") if random else "",
        span(matched.difference, matched.low, matched.high, sign="+") if matched else "",
        span(full.mean, full.low, full.high, sign="+") if full else "",
        f"{100 * one.worst_class_accuracy:.1f} ({one.worst_class})",
        time_text(one.seconds),
        *(time_text(value) for value in (one.seconds_saved, one.selection_seconds, one.net_saved)),
    ]
    if result.target_accuracy is not None:
        reached = f"{one.reached_target} of {len(one.accuracies)} seeds"
        cells.append(time_text(one.seconds_to_target) if one.seconds_to_target is not None else reached)
    return cells
