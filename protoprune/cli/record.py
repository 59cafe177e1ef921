"""`protoprune record`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.cli.options import Hidden, LabelOptions, Model, TrainingOptions, refuse_idle
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, resumable, say
from protoprune.cli.training import hint_steps, is_image_folder, load_sets
from protoprune.device import resolve_device
from protoprune.units import bytes_text, duration, many

if TYPE_CHECKING:
    import numpy as np

_LEARNED = 0.1  # of the way from the largest class's share to all right: a model below has learned next to nothing


def record(
    source: Annotated[Path, typer.Argument(help="Image folder with a folder a class, or a feature file (for heads).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Training record to write.")] = Path("record.h5"),
    test: Annotated[Path | None, typer.Option(help="Test images or features: influence needs them.")] = None,
    model: Model = None,
    models: Annotated[int, typer.Option(help="How many models to train.")] = 1,
    subset: Annotated[
        float, typer.Option(help="Share of the images each model is trained on; memorization needs less than 1 (0.7).")
    ] = 1.0,
    every: Annotated[int, typer.Option(help="Record every so many epochs, and the last.")] = 1,
    initial: Annotated[bool, typer.Option("--initial", help="Record the untrained models too.")] = False,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Record gradient norms (GraNd): slow for networks, cheap for heads.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Record all class probabilities at the end, for label_issues."),
    ] = False,
    hidden: Hidden = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of subsets, models, order and augmentation.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Say how large the record will be, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a record of another run.")] = False,
    *,
    training: TrainingOptions,
    labels: LabelOptions,
) -> None:
    """Train models and record what every example went through.

    The images need labels. What `protoprune score` makes of a record are EL2N, forgetting, memorization and more.
    """
    started = time.monotonic()
    check_outputs(*training.caches, hdf5=out, inputs=[source, test, training.weights, *labels.files])
    if test is None:
        refuse_idle("is of the test images, and there are none without --test", "test_labels")
    labels.arguments()  # what is wrong with them is said before torch loads
    from protoprune.training import recording
    from protoprune.training.examples import warn_of_shared

    resolve_device(training.device)
    recording.check(models, subset, every, seed)
    if model is None:
        model = "cnn" if is_image_folder(source) else "head"
    recipe = training.recipe(model, hidden)
    train, held_out = load_sets(source, test, model, training, labels.arguments(), decode=not plan)
    if held_out is not None:
        warn_of_shared(train, held_out)
    laid_out = recording.plan(
        train, held_out, recipe, models=models, subset_fraction=subset, every=every, initial=initial,
        gradients=gradients, probabilities=probabilities, seed=seed,
    )  # fmt: skip
    say(
        f"record: {many(models, 'model')} x {many(len(laid_out.epoch_numbers), 'recorded epoch')} x "
        f"{many(len(train), 'example')}, {bytes_text(laid_out.bytes)} in {out}"
        + (
            f", {bytes_text(2 * models * len(train) * len(train.classes))} of it class probabilities"
            if probabilities
            else ""
        )
    )
    hint_steps(recipe, max(1, round(subset * len(train))), 0)
    if plan:
        return
    with resumable("what is recorded is kept"), Progress("record", "epochs") as progress:

        def on_start(total: int, done: int) -> None:
            if done:
                say(f"{done:,} of {total:,} epochs are recorded already, {total - done:,} to go")
            progress.start(total - done)

        recording.record(
            train, held_out, recipe, out, laid_out, gradients=gradients, probabilities=probabilities, seed=seed,
            device=training.device, overwrite=overwrite, on_start=on_start, on_progress=progress.update,
        )  # fmt: skip
    _say_accuracy(out)
    say(f"{out}: {models:,} x {model}, {many(recipe.epochs, 'epoch')}, in {duration(time.monotonic() - started)}")


def _say_accuracy(out: Path) -> None:
    """How much the models have learned: what scores from this record are worth depends on it."""
    import numpy as np

    from protoprune.records import Record

    with Record(out) as record:
        own, others, tested = record.train_accuracy, record.held_out_accuracy, record.test_accuracy
        chance = np.bincount(record.labels).max() / record.n  # of always saying the largest class
    parts = [f"{_percent(own)} right on their training images"]
    if not np.isnan(others).all():
        parts.append(f"{_percent(others)} on those left out of it")
    if tested is not None:
        parts.append(f"{_percent(tested)} on the test set")
    say(f"accuracy: {', '.join(parts)}")
    poor = int((own < chance + _LEARNED * (1 - chance)).sum())
    if poor:
        say(
            f"warning: {poor:,} of {many(len(own), 'model has', 'models have')} hardly learned (the largest class is "
            f"{100 * chance:.1f} %), and scores from {'it' if poor == 1 else 'them'} are mostly noise; train longer "
            "(--epochs) or try another --lr"
        )


def _percent(accuracies: np.ndarray) -> str:
    """Mean over models, and their range where there are several."""
    import numpy as np

    low, high = 100 * np.nanmin(accuracies), 100 * np.nanmax(accuracies)
    spread = f" ({low:.1f}-{high:.1f})" if np.sum(~np.isnan(accuracies)) > 1 else ""
    return f"{100 * np.nanmean(accuracies):.1f} %{spread}"
