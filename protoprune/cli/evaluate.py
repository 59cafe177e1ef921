"""`protoprune evaluate` and `protoprune scaling`: parse, call, print.

Nothing heavy is imported here: torch, scipy and matplotlib load when a command runs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.cli.outputs import check_folder
from protoprune.cli.progress import duration, say
from protoprune.cli.record import (
    ClassLevel,
    ClassNames,
    LabelColumn,
    Labels,
    TestLabels,
    is_image_folder,
    label_options,
    load_sets,
)
from protoprune.cli.select import ByPlace, HigherIs, Rows, number_of_clusters, table_file
from protoprune.cli.tables import echo, print_table
from protoprune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from protoprune.evaluation.comparing import Evaluation, Method
    from protoprune.evaluation.curves import Scaling
    from protoprune.evaluation.runs import Step

Images = Annotated[
    Path | None, typer.Option(help="Training images: a folder with a folder a class (or a feature file, for heads).")
]
Features = Annotated[Path | None, typer.Option(help="Feature file of the training images, for --model head.")]
Test = Annotated[Path, typer.Option(help="Test set: a folder of images, or a feature file for --model head.")]
Model = Annotated[
    str | None,
    typer.Option(help="head, cnn, resnet18 or timm:NAME [default: head on a feature file, cnn on a folder]."),
]
Epochs = Annotated[int | None, typer.Option(help="Of a network: passes over the training set [default: by model].")]
Batch = Annotated[int | None, typer.Option(help="Batch size [default: by model].")]
Rate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate [default: by model].")]
Decay = Annotated[float | None, typer.Option(help="Weight decay [default: by model].")]
Augment = Annotated[str | None, typer.Option(help="none, crop-flip or resized-crop [default: by model].")]
ImageSize = Annotated[int, typer.Option(help="Side in pixels that images are resized to.")]
Width = Annotated[int | None, typer.Option(help="Channels of the first layer of cnn [default: 32].")]
Hidden = Annotated[
    int | None,
    typer.Option(help="Units of a head's hidden layer: a small network, trained for --epochs [default: 0, linear]."),
]
MinSteps = Annotated[
    int | None, typer.Option(min=1, help="Of networks: optimizer steps that every run takes at least [default: 500].")
]
Schedule = Annotated[str | None, typer.Option(help="linear, cosine or steps (Data Diet) [default: linear].")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the network: pays on a GPU.")]
Pixels = Annotated[Path | None, typer.Option(help="File for decoded pixels, for a data set larger than memory.")]
Weights = Annotated[Path | None, typer.Option(help="File of weights to start from: fine-tuning.")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Folder for tables, JSON, figure and the results of single runs; a second call resumes."
    ),
]
_BUDGET = (
    "Of networks (a linear head is trained to convergence). epochs: every run passes over its own images as often, so "
    "that fewer images mean fewer optimizer steps and less time (what you gain in practice). steps: every run takes as "
    "many optimizer steps as {}, so that only the choice of images differs, and not the length of training. "
    "[default: {}]"
)


def evaluate(
    lists: Annotated[
        list[Path] | None, typer.Argument(help="Kept lists (txt, csv, jsonl, npy), with or without weights.")
    ] = None,
    images: Images = None,
    test: Test = ...,
    features: Features = None,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Seeds: each trains once on everything compared.")] = 5,
    budget: Annotated[str | None, typer.Option(help=_BUDGET.format("everything", "epochs"))] = None,
    min_steps: MinSteps = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            help="Also train with this sampler at each --keep: random, egreedy, ucb, infobatch or rs2; repeatable. "
            "It takes as many optimizer steps as a random list of its size."
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction kept by --dynamic samplers (infobatch: of the losses below their mean); repeatable."
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
        list[float] | None,
        typer.Option(help="What choosing cost, in seconds: one number for all lists, or one for each in order."),
    ] = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    schedule: Schedule = None,
    augment: Augment = None,
    image_size: ImageSize = 32,
    width: Width = None,
    hidden: Hidden = None,
    weights: Weights = None,
    precision: Precision = None,
    device: Device = "auto",
    compile: Compile = False,
    pixels: Pixels = None,
    labels: Labels = None,
    test_labels: TestLabels = None,
    label_column: LabelColumn = None,
    class_names: ClassNames = None,
    class_level: ClassLevel = None,
    out: Out = None,
) -> None:
    """Does a list pay? Train on it, on random images and on everything, and compare.

    For each seed a fresh random subset of the list's size is drawn; the order of the images, their augmentation and
    the model's start are the same for all, so that only the subset differs. Differences are paired by seed. A list is
    called better or worse than random only where the interval supports it: it covers the seeds and the luck of one
    draw, since a random list is better or worse than the average one too.

    Heads on features are trained to convergence, with the regularisation that suits their images: what they reach says
    something of the images, and not of the length of a training.
    """
    from protoprune.evaluation.comparing import check_options
    from protoprune.evaluation.comparing import evaluate as compare
    from protoprune.lists import read_list

    lists, dynamic = lists or [], dynamic or []
    source, model = _source(images, features, model)
    samplers = _samplers(dynamic, keep or [], every)
    costs = _costs(selection_seconds or [], len(lists))
    recipe = _recipe(
        model, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, schedule=schedule,
        augment=augment, image_size=image_size, width=width, hidden=hidden, weights=weights, precision=precision,
        compile=compile or None,
    )  # fmt: skip
    check_options(lists, samplers, recipe, budget, min_steps, target_accuracy, device)
    check_folder(out, [*lists, source, test, weights, labels, test_labels, class_names])
    labelled = label_options(labels, test_labels, label_column, class_names, class_level)
    for path in lists:
        read_list(path)
    train, tested = load_sets(source, test, model, image_size, pixels, labelled=labelled)
    kept = [_kept(path, train, cost) for path, cost in zip(lists, costs, strict=True)]
    with _resumable(out):
        result = compare(
            train, tested, kept, recipe, seeds=seeds, budget=budget, min_steps=min_steps, dynamic=samplers,
            everything=everything, class_counts=class_counts, target_accuracy=target_accuracy,
            folder=out and out / "runs", device=device, on_run=_show_run(out),
        )  # fmt: skip
    _print_evaluation(result)
    if out is not None:
        from protoprune.evaluation import report
        from protoprune.evaluation.runs import settings_of

        config = {
            "command": "evaluate", "lists": [os.fspath(path) for path in lists], "train": os.fspath(source),
            "test": os.fspath(test), "dynamic": samplers, "recipe": settings_of(recipe), "min_steps": min_steps,
            "device": device,
        }  # fmt: skip
        _say_written(report.save_evaluation(out, result, config, train.classes))


def scaling(
    images: Images = None,
    test: Test = ...,
    features: Annotated[
        Path | None, typer.Option(help="Feature file of the training images: ranks them, and trains --model head.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Initial numbers of images, comma-separated: 1000,2000,5000.")] = ...,
    keeps: Annotated[str, typer.Option(help="Fractions KEPT of each, comma-separated.")] = "1,0.8,0.5,0.2",
    orders: Annotated[
        str, typer.Option(help="Which are kept first, comma-separated: hard, easy, middle, random.")
    ] = "hard,easy,random",
    scores: Annotated[
        Path | None,
        typer.Option(help="Rank by this score table (larger = harder) instead of by clustering each initial set."),
    ] = None,
    higher_is: HigherIs = None,
    rows: Rows = None,
    by_place: ByPlace = False,
    k: Annotated[str, typer.Option(help="Number of clusters of each initial set, or auto.")] = "auto",
    balance: Annotated[
        float, typer.Option(help="Share of what is kept that is split evenly over classes (paper: 0.5).")
    ] = 0.0,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Seeds, each with initial sets of its own.")] = 3,
    budget: Annotated[str | None, typer.Option(help=_BUDGET.format("the largest initial set", "steps"))] = None,
    min_steps: MinSteps = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Bootstrap samples for the intervals of the fits.")] = 200,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    schedule: Schedule = None,
    augment: Augment = None,
    image_size: ImageSize = 32,
    width: Width = None,
    hidden: Hidden = None,
    weights: Weights = None,
    precision: Precision = None,
    device: Device = "auto",
    compile: Compile = False,
    pixels: Pixels = None,
    labels: Labels = None,
    test_labels: TestLabels = None,
    label_column: LabelColumn = None,
    class_names: ClassNames = None,
    class_level: ClassLevel = None,
    out: Out = None,
) -> None:
    """How does the error fall with the number of images, pruned and not? Sweep, fit scaling laws, draw.

    Trains at every initial size, keep fraction and order; fits a power law, an exponential and a power law with an
    offset to each curve and to the Pareto envelope (the lowest error at each number of images kept), and says which
    law wins, or that it is undecided.
    """
    from protoprune.evaluation.curves import check_options
    from protoprune.evaluation.curves import scaling as sweep
    from protoprune.features import missing
    from protoprune.scores import check_reading

    source, model = _source(images, features, model, ranking=True)
    wanted = {"sizes": _numbers(sizes, "--sizes", whole=True), "keeps": _numbers(keeps, "--keeps")}
    names = [one.strip() for one in orders.split(",") if one.strip()]
    clusters = number_of_clusters(k)
    recipe = _recipe(
        model, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, schedule=schedule,
        augment=augment, image_size=image_size, width=width, hidden=hidden, weights=weights, precision=precision,
        compile=compile or None,
    )  # fmt: skip
    check_options(wanted["keeps"], names, clusters, balance, recipe, budget, min_steps, device)
    check_reading(scores, higher_is=higher_is, rows=rows, by_place=by_place)
    for path, what in ((table_file(scores), "score table"), (features, "feature file")):
        if path is not None and not path.exists():
            raise missing(path, what)
    check_folder(out, [table_file(scores), rows, features, source, test, weights, labels, test_labels, class_names])
    labelled = label_options(labels, test_labels, label_column, class_names, class_level)
    train, tested = load_sets(source, test, model, image_size, pixels, labelled=labelled)
    ranked = {
        "scores": _scores(scores, train, higher_is=higher_is, rows=rows, by_place=by_place),
        "features": _vectors(features, train) if scores is None else None,
    }
    with _resumable(out):
        result = sweep(
            train, tested, recipe, **wanted, **ranked, orders=names, seeds=seeds, k=clusters, balance=balance,
            budget=budget, min_steps=min_steps, bootstrap=bootstrap, folder=out and out / "runs", device=device,
            on_run=_show_run(out),
        )  # fmt: skip
    _print_scaling(result)
    if out is not None:
        from protoprune.evaluation import report
        from protoprune.evaluation.runs import settings_of

        config = {
            "command": "scaling", "train": os.fspath(source), "test": os.fspath(test), **wanted, "orders": names,
            "scores": scores and os.fspath(scores), "features": features and os.fspath(features), "k": k,
            "balance": balance, "bootstrap": bootstrap, "recipe": settings_of(recipe), "min_steps": min_steps,
            "device": device,
        }  # fmt: skip
        _say_written(report.save_scaling(out, result, config))


# --- options ---------------------------------------------------------------------------------------------------------


def _source(images: Path | None, features: Path | None, model: str | None, *, ranking=False) -> tuple[Path, str]:
    """What is trained on, and the model: heads on feature files, networks on folders."""
    if images is None and features is None:
        raise UsageError("no training set: give --images FOLDER, or --features FILE for --model head")
    is_file = images is not None and images.exists() and not is_image_folder(images)
    model = model or ("head" if features is not None or is_file else "cnn")
    if model == "head":
        source = features or images
        if is_image_folder(source):
            raise UsageError(
                f"--model head trains on features, and {source} is a folder; run `protoprune embed {source}` and give "
                "its file with --features, or take --model cnn"
            )
        return source, model
    if images is None or is_file:
        raise UsageError(f"--model {model} trains on images: give --images FOLDER")
    if features is not None and not ranking:
        raise UsageError(f"--features goes with --model head, not {model}")
    return images, model


def _recipe(model: str, *, weights: Path | None, **given):
    from protoprune.training.loop import Recipe

    return Recipe.for_model(model, weights=weights and os.fspath(weights), **given)


def _kept(path: Path, train, cost: float | None):
    from protoprune import lists
    from protoprune.evaluation.comparing import Kept
    from protoprune.evaluation.runs import list_rows

    rows = list_rows(lists.read_list(path), train, os.fspath(path))
    return Kept(os.fspath(path), rows, _weights(path, rows, train), cost)


def _weights(path: Path, rows: np.ndarray, train) -> np.ndarray | None:
    """(m,) loss weights where the list has a weight column."""
    from protoprune import lists
    from protoprune.evaluation.runs import list_weights

    try:
        weights = lists.read_weights(path)
    except UsageError:  # a format without weights, or a list without the column
        return None
    return list_weights(weights, rows, train, os.fspath(path))


def _samplers(dynamic: list[str], keep: list[float], every: int | None) -> list[dict]:
    if bool(dynamic) != bool(keep) or (every and not dynamic):
        raise UsageError(
            "--dynamic NAME and --keep FRACTION go together, and --every with them (a list has its own size)"
        )
    options = {"every": every} if every else {}
    return [{"name": name, "keep": fraction, **options} for name in dynamic for fraction in keep]


def _costs(seconds: list[float], lists: int) -> list[float | None]:
    if any(one < 0 for one in seconds):
        raise UsageError(f"--selection-seconds {min(seconds):g}: expected 0 or more")
    if len(seconds) not in (0, 1, lists):
        raise UsageError(f"--selection-seconds: {len(seconds)} numbers for {lists} lists; give one, or one for each")
    return seconds if len(seconds) == lists else [seconds[0] if seconds else None] * lists


def _numbers(text: str, option: str, *, whole: bool = False) -> list:
    try:
        return [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"{option} {text}: expected {kind} separated by commas") from None


def _scores(path: Path | None, train, **reading) -> np.ndarray | None:
    from protoprune.scores import read_scores

    if path is None:
        return None

    table = read_scores(path, train.paths, **reading)
    for note in table.notes():
        say(f"{path}: {note}")
    return table.scores


def _vectors(features: Path | None, train) -> np.ndarray | None:
    """(n, d) features of the training images, found by path."""
    if train.inputs.ndim == 2:
        return train.inputs.numpy()
    if features is None:
        return None
    import numpy as np

    from protoprune.evaluation.runs import list_rows
    from protoprune.training.examples import load_examples

    table = load_examples(features, classes=train.classes)
    rows = list_rows(train.paths, table, "the training set")
    return np.asarray(table.inputs)[rows]


@contextlib.contextmanager
def _resumable(out: Path | None) -> Iterator[None]:
    """Ctrl-C ends a series of runs in two lines that say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if out is None:
            say("interrupted: without -o nothing is kept")
        else:
            say(f"interrupted: the runs done are kept in {out / 'runs'}; to go on, run the same again:")
            say(f"  {shlex.join(['protoprune', *sys.argv[1:]])}")
        raise typer.Exit(130) from None


# --- answers ---------------------------------------------------------------------------------------------------------


def _show_run(out: Path | None):
    """A line on stderr after each run that was trained here."""

    def show(step: Step) -> None:
        if step.outcome.cached:
            if step.done == step.total:
                say(
                    f"{step.cached:,} of {step.total:,} runs were there already"
                    + (f", in {out / 'runs'}" if out else "")
                )
            return
        left = f", {duration(step.seconds_left)} left" if step.seconds_left and step.done < step.total else ""
        say(
            f"run {step.done:,}/{step.total:,}: {step.run.method}, seed {step.run.seed}: "
            f"{100 * step.outcome.accuracy:.2f} % in {_time(step.outcome.seconds)}{left}"
        )

    return show


def _say_written(paths: list[str]) -> None:
    say(f"wrote {', '.join(paths)}")


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
    yield (
        f"Percentages and points with their {100 * result.confidence:g} % intervals; differences are paired by seed. "
        "Against random they cover the seeds and, for a list, the luck of one draw."
    )
    if result.budget == "convergence":
        yield (
            "Heads are trained to convergence, so that a list gives one number: its own interval, and that of its "
            "difference to everything, are over test images."
        )
    if any(one.to_classes for one in result.methods):
        yield "Same classes: random images with as many of each class as the list has."
    if comparisons > 1:
        yield f"Each interval is for its own line alone; the verdicts allow for all {comparisons} comparisons (Holm)."


def _cells(one: Method, result: Evaluation) -> list[str]:
    random, matched, full = one.to_random, one.to_classes, one.to_everything
    cells = [
        one.name,
        f"{one.kept:,} ({100 * one.fraction:.3g} %)",
        _span(one.accuracy.mean, one.accuracy.low, one.accuracy.high, digits=2),
        _span(random.difference, random.low, random.high, sign="+") if random else "",
        _span(matched.difference, matched.low, matched.high, sign="+") if matched else "",
        _span(full.mean, full.low, full.high, sign="+") if full else "",
        f"{100 * one.worst_class_accuracy:.1f} ({one.worst_class})",
        _time(one.seconds),
        *(_time(value) for value in (one.seconds_saved, one.selection_seconds, one.net_saved)),
    ]
    if result.target_accuracy is not None:
        reached = f"{one.reached_target} of {len(one.accuracies)} seeds"
        cells.append(_time(one.seconds_to_target) if one.seconds_to_target is not None else reached)
    return cells


def _span(value: float, low: float | None, high: float | None, *, sign: str = "", digits: int = 1) -> str:
    """'92.31 (92.02 to 92.60)' of fractions."""
    text = f"{100 * value:{sign}.{digits}f}"
    return text if low is None else f"{text} ({100 * low:{sign}.{digits}f} to {100 * high:{sign}.{digits}f})"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if abs(seconds) < 1:
        return f"{seconds:.3f} s"
    return f"-{duration(-seconds)}" if seconds < 0 else duration(seconds)


def _print_scaling(result: Scaling) -> None:
    from protoprune.evaluation.report import fit_rows

    sizes = list(dict.fromkeys(point.size for point in result.points))
    found = {(point.order, point.keep, point.size): point for point in result.points}
    rows = []
    for order, keep in dict.fromkeys((point.order, point.keep) for point in result.points):
        errors = [found[order, keep, size].error.mean for size in sizes]
        rows.append([order, f"{keep:g}", *(f"{100 * error:.2f}" for error in errors)])
    print_table(["error (%) of", "keep", *(f"{size:,}" for size in sizes)], rows)
    # Three parameters through three or four points say nothing; fits.csv has them all the same.
    laws = [row for row in fit_rows(result) if row["c"] is None or row["delta_aicc"] is not None]
    if laws:
        echo("")
        body = [[row["curve"], row["law"], *(_parameter(row, key) for key in "abc"), *_quality(row)] for row in laws]
        print_table(["curve", "law", "a", "b", "c", "AICc above the best", "best in"], body)
    for curve in result.curves:
        echo(f"{curve.name}: {curve.verdict}")
    for warning in result.warnings:
        say(f"warning: {warning}")
    if laws:
        echo("Intervals (95 %) cover the seeds, not the choice of the law; a law wins with AICc 6 (20 to 1) ahead.")


def _parameter(row: dict, key: str) -> str:
    if row[key] is None:
        return ""
    interval = "" if row[f"{key}_low"] is None else f" ({row[f'{key}_low']:.3g} to {row[f'{key}_high']:.3g})"
    return f"{row[key]:.3g}{interval}"


def _quality(row: dict) -> list[str]:
    delta = "" if row["delta_aicc"] is None else f"{row['delta_aicc']:.1f}"
    return [delta, "" if row["wins"] is None else f"{100 * row['wins']:.0f} %"]
