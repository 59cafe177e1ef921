"""`protoprune record`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, bytes_text, duration, say
from protoprune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

_LEARNED = 0.1  # of the way from the largest class's share to all right: a model below has learned next to nothing

Labels = Annotated[Path | None, typer.Option(help="File of the images' classes: a table of path and class.")]
TestLabels = Annotated[Path | None, typer.Option(help="The same for the test images.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the class, where a --labels file has several.")]
ClassNames = Annotated[Path | None, typer.Option(help="File that turns the class numbers of --labels into names.")]
ClassLevel = Annotated[int | None, typer.Option(min=1, help="Classes are the folders of this level (2: train/CLASS).")]


def record(
    source: Annotated[Path, typer.Argument(help="Image folder with a folder a class, or a feature file (for heads).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Training record to write.")] = Path("record.h5"),
    test: Annotated[Path | None, typer.Option(help="Test images or features: influence needs them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="head, cnn, resnet18 or timm:NAME [default: head for features, else cnn].")
    ] = None,
    models: Annotated[int, typer.Option(help="How many models to train.")] = 1,
    subset: Annotated[
        float, typer.Option(help="Share of the images each model is trained on; memorization needs less than 1 (0.7).")
    ] = 1.0,
    epochs: Annotated[int | None, typer.Option(help="Epochs [default: 20 for a head and ResNet-18, else 10].")] = None,
    every: Annotated[int, typer.Option(help="Record every so many epochs, and the last.")] = 1,
    initial: Annotated[bool, typer.Option("--initial", help="Record the untrained models too.")] = False,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Record gradient norms (GraNd): slow for networks, cheap for heads.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Record all class probabilities at the end, for label_issues."),
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step [default: 256 for a head, else 128].")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [default: what suits the model].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay [default: what suits the model].")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or steps (Data Diet) [default: linear].")] = None,
    augment: Annotated[
        str | None, typer.Option(help="none, crop-flip or resized-crop [default: crop-flip for images].")
    ] = None,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the square images in pixels.")] = 32,
    width: Annotated[int | None, typer.Option(help="Channels of the first layer of cnn [default: 32].")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Units of a head's hidden layer [default: 0, a linear head].")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from (fine-tuning).")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network: pays on a GPU.")] = False,
    pixels: Annotated[
        Path | None, typer.Option(help="File for decoded pixels, for a data set larger than memory.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of subsets, models, order and augmentation.")] = 0,
    labels: Labels = None,
    test_labels: TestLabels = None,
    label_column: LabelColumn = None,
    class_names: ClassNames = None,
    class_level: ClassLevel = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say how large the record will be, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a record of another run.")] = False,
) -> None:
    """Train models on labelled images and record what every example went through, for `protoprune score`."""
    started = time.monotonic()
    caches = [] if pixels is None else [f"{pixels}.{part}" for part in ("training", "test")]
    check_outputs(*caches, hdf5=out, inputs=[source, test, weights, labels, test_labels, class_names])
    labelled = label_options(labels, test_labels, label_column, class_names, class_level)
    from protoprune.device import resolve_device
    from protoprune.training import recording
    from protoprune.training.loop import Recipe

    resolve_device(device)
    if weights is not None and not weights.is_file():
        raise UsageError(f"--weights {weights}: no such file")
    recording.check(models, subset, every)
    if model is None:
        model = "cnn" if is_image_folder(source) else "head"
    recipe = Recipe.for_model(
        model, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, schedule=schedule,
        augment=augment, image_size=image_size, width=width, hidden=hidden, precision=precision,
        weights=str(weights) if weights else None, compile=compile or None,
    )  # fmt: skip
    train, held_out = load_sets(source, test, model, image_size, pixels, decode=not plan, labelled=labelled)
    laid_out = recording.plan(
        train, held_out, recipe, models=models, subset_fraction=subset, every=every, initial=initial,
        gradients=gradients, probabilities=probabilities, seed=seed,
    )  # fmt: skip
    say(
        f"record: {models:,} {'model' if models == 1 else 'models'} x {len(laid_out.epoch_numbers)} recorded epochs x "
        f"{len(train):,} examples, {bytes_text(laid_out.bytes)} in {out}"
        + (
            f", {bytes_text(2 * models * len(train) * len(train.classes))} of it class probabilities"
            if probabilities
            else ""
        )
    )
    if plan:
        return
    with Progress("record", "epochs") as progress:

        def on_start(total: int, done: int) -> None:
            if done:
                say(f"{done:,} of {total:,} epochs are recorded already, {total - done:,} to go")
            progress.start(total - done)

        try:
            recording.record(
                train, held_out, recipe, out, laid_out, gradients=gradients, probabilities=probabilities, seed=seed,
                device=device, overwrite=overwrite, on_start=on_start, on_progress=progress.update,
            )  # fmt: skip
        except KeyboardInterrupt:
            progress.__exit__()
            again = [one for one in sys.argv[1:] if one != "--overwrite"]
            say("interrupted: what is recorded is kept; to go on, run the same again:")
            say(f"  {shlex.join(['protoprune', *again])}")
            raise typer.Exit(130) from None
    _say_accuracy(out)
    say(f"{out}: {models:,} x {model}, {recipe.epochs} epochs, in {duration(time.monotonic() - started)}")


def is_image_folder(path: Path) -> bool:
    """A folder of images; a feature set is a folder too."""
    from protoprune.images import is_feature_set

    return path.is_dir() and not is_feature_set(path)


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
            f"warning: {poor:,} of {len(own):,} models have hardly learned (the largest class alone is "
            f"{100 * chance:.1f} %), and scores from them are mostly noise; train longer (--epochs) or try another --lr"
        )


def _percent(accuracies: np.ndarray) -> str:
    """Mean over models, and their range where there are several."""
    import numpy as np

    low, high = 100 * np.nanmin(accuracies), 100 * np.nanmax(accuracies)
    spread = f" ({low:.1f}-{high:.1f})" if np.sum(~np.isnan(accuracies)) > 1 else ""
    return f"{100 * np.nanmean(accuracies):.1f} %{spread}"


def label_options(labels, test_labels, column, names, level: int | None) -> tuple[dict, dict]:
    """Where the classes of training and test images come from: arguments of `load_examples` for each."""
    from protoprune.labels import label_file

    train, test = ({"labels": label_file(path, column, names, level)} for path in (labels, test_labels))
    if labels is None and test_labels is None and (column or names):
        raise UsageError(f"{'--label-column' if column else '--class-names'} goes with --labels FILE")
    return ({**train, "class_level": level}, {**test, "class_level": level})


def load_sets(
    source: Path,
    test: Path | None,
    model: str,
    image_size: int,
    pixels: Path | None,
    *,
    decode: bool = True,
    labelled: tuple[dict, dict] = ({}, {}),
):
    """(training examples, test examples or None), with a line about each; without their pixels where not `decode`.

    `labelled` is what `label_options` gives.
    """
    from protoprune.features import missing
    from protoprune.training.examples import check_same_inputs, load_examples

    for path in (source, test):
        if path is not None and not path.exists():
            raise missing(path)
    if model != "head" and not is_image_folder(source):
        raise UsageError(f"--model {model} trains on images, and {source} is a file; give a folder, or --model head")
    if model == "head" and is_image_folder(source):
        raise UsageError(
            f"--model head trains on features; run `protoprune embed {source} -o features.h5`, then use it"
        )
    if test is not None and is_image_folder(test) != is_image_folder(source):
        raise UsageError(f"--test {test}: give the test set in the form of the training set, images or features")
    if test is not None and test.samefile(source):
        say(f"warning: --test {test} is the training set itself; what is right on it says nothing about new images")
    loaded, classes = [], None
    for path, what, options in ((source, "training", labelled[0]), (test, "test", labelled[1])):
        if path is None:
            loaded.append(None)
            continue
        cache = None if pixels is None else Path(f"{pixels}.{what}")
        with Progress("decode") as progress:

            def show(done: int, total: int, progress: Progress = progress) -> None:
                if not progress.started:
                    progress.start(total)
                progress.update(done)

            data = load_examples(
                path, image_size, classes=classes, cache=cache, decode=decode, on_progress=show, **options
            )
        classes = data.classes
        say(f"{what}: {len(data):,} examples in {len(classes):,} classes, {path}")
        if data.unlabelled:
            say(f"warning: {data.unlabelled:,} images of {path} have no class and are left out")
        if data.unreadable:
            first, reason = data.unreadable[0]
            say(f"warning: {len(data.unreadable):,} images of {path} cannot be read, first {first} ({reason})")
        loaded.append(data)
    if test is not None:
        for difference in check_same_inputs(*loaded):
            say(f"warning: the test features differ from the training features in {difference}: in the last digits")
    return loaded
