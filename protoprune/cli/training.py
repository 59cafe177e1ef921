"""What `record`, `evaluate`, `scaling` and `tune` do alike: find and load the sets, show the runs and the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoprune.cli.options import TrainingOptions, refuse_idle
from protoprune.cli.outputs import check_results
from protoprune.cli.progress import Progress, say
from protoprune.errors import UsageError
from protoprune.units import duration, many

if TYPE_CHECKING:
    import numpy as np

    from protoprune.evaluation.runs import Step
    from protoprune.training.examples import Examples
    from protoprune.training.loop import Recipe


def is_image_folder(path: Path) -> bool:
    """A folder of images; a feature set is a folder too."""
    from protoprune.images.listing import is_feature_set

    return path.is_dir() and not is_feature_set(path)


def training_source(
    images: Path | None, features: Path | None, model: str | None, *, ranking: bool = False
) -> tuple[Path, str]:
    """What is trained on, and the model: heads on feature files, networks on folders, by default a cnn.

    With `ranking` a feature file beside a folder of images is no contradiction: it ranks them.
    """
    is_file = images is not None and images.exists() and not is_image_folder(images)
    source = features or images
    if source is None:
        raise UsageError("no training set: give --images FOLDER, or --features FILE for --model head")
    model = model or ("head" if features is not None or is_file else "cnn")
    if model == "head":
        if features is not None and images is not None:
            raise UsageError(f"--images {images}: heads train on --features; leave it out, or name a --model for it")
        return source, model
    if images is None or is_file:
        raise UsageError(f"--model {model} trains on images: give --images FOLDER")
    if features is not None and not ranking:
        raise UsageError(f"--features goes with --model head, not {model}")
    return images, model


def load_sets(
    source: Path,
    test: Path | None,
    model: str,
    training: TrainingOptions,
    labels: tuple[dict[str, Any], dict[str, Any]],
    *,
    decode: bool = True,
) -> tuple[Examples, Examples | None]:
    """(training examples, test examples or None), with a line about each; without their pixels where not `decode`.

    labels: where the classes of both come from, as arguments of `load_examples`.
    """
    from protoprune.training.examples import check_same_inputs

    _check_sets(source, test, model)
    own, others = labels
    size = {"image_size": training.image_size or 32, "decode": decode}
    train = _load(source, "training", training.pixels, **size, **own)
    if test is None:
        return train, None
    tested = _load(test, "test", training.pixels, classes=train.classes, **size, **others)
    for difference in check_same_inputs(train, tested):
        say(f"warning: the test features differ from the training features in {difference}: in the last digits")
    return train, tested


def load_both(
    source: Path,
    test: Path,
    model: str,
    training: TrainingOptions,
    labels: tuple[dict[str, Any], dict[str, Any]],
    out: Path | None,
) -> tuple[Examples, Examples]:
    """The same with a test set, for results in `out`, which must not be among the images."""
    train, tested = load_sets(source, test, model, training, labels)
    assert tested is not None  # it was named
    for one in (train, tested):
        check_results(out, one.root, one.paths)
    return train, tested


def _check_sets(source: Path, test: Path | None, model: str) -> None:
    from protoprune.features.opening import missing

    for path in (source, test):
        if path is not None and not path.exists():
            raise missing(path)
    if model != "head" and not is_image_folder(source):
        raise UsageError(f"--model {model} trains on images, and {source} is a file; give a folder, or --model head")
    if model == "head" and is_image_folder(source):
        raise UsageError(
            f"--model head trains on features; run `protoprune embed {source} -o features.h5`, then use it, or take "
            "--model cnn"
        )
    if test is not None and is_image_folder(test) != is_image_folder(source):
        raise UsageError(f"--test {test}: give the test set in the form of the training set, images or features")


def _load(path: Path, what: str, pixels: Path | None, **options: Any) -> Examples:
    from protoprune.training.examples import load_examples

    cache = None if pixels is None else Path(f"{pixels}.{what}")
    with Progress("decode") as progress:
        data = load_examples(path, cache=cache, on_progress=progress.show, **options)
    say(f"{what}: {len(data):,} examples in {len(data.classes):,} classes, {path}")
    without = [name for number, name in enumerate(data.classes) if number not in set(data.labels.tolist())]
    if without:
        say(f"warning: {path} has no image of {len(without):,} of {len(data.classes):,} classes, first {without[0]}")
    if data.unlabelled:
        left = many(data.unlabelled, f"image of {path} has no class and is", f"images of {path} have no class and are")
        say(f"warning: {left} left out")
    if data.unreadable:
        first, reason = data.unreadable[0]
        say(f"warning: {many(len(data.unreadable), 'image')} of {path} cannot be read, first {first} ({reason})")
    return data


def read_table(path: Path, examples: Examples, **reading: Any) -> np.ndarray:
    """(n,) scores of the examples from a table, with a line about how it was read.

    It is about the images of the whole source, as for `protoprune select`: row numbers and places count those too that
    cannot be read or have no class.
    """
    import numpy as np

    from protoprune.scores import read_scores

    everyone = examples.every_path or examples.paths
    table = read_scores(path, everyone, **reading)
    for note in table.notes():
        say(f"{path}: {note}")
    if len(everyone) == len(examples):
        return table.scores
    place = {name: row for row, name in enumerate(everyone)}
    return table.scores[np.array([place[name] for name in examples.paths])]


def refuse_length(recipe: Recipe) -> None:
    """UsageError for an option about the course of a training that was typed where a linear head is trained to
    convergence, be it with its default."""
    from protoprune.evaluation.runs import to_convergence

    if to_convergence(recipe):
        refuse_idle(
            "a linear head is trained to convergence, and this changes nothing; leave it out, or train a small network "
            "on the features with --hidden 256",
            "epochs", "batch_size", "lr", "weight_decay", "schedule", "precision", "budget", "min_steps",
        )  # fmt: skip


def hint_steps(recipe: Recipe, rows: int, least: int | None = None) -> None:
    """Say before the training, and not after it, that the optimizer steps of its epochs are too few to learn by.

    `least` are those that every run takes (None: MIN_STEPS); in `record` 0.
    """
    from protoprune.evaluation.runs import MIN_STEPS, to_convergence
    from protoprune.training.loop import steps_per_epoch

    each = steps_per_epoch(rows, recipe.batch_size)
    own, least = recipe.epochs * each, MIN_STEPS if least is None else least
    if own >= MIN_STEPS or to_convergence(recipe):
        return
    of = f"of {many(rows, 'image')}"
    own_words = f"hint: {many(recipe.epochs, f'epoch {of} is', f'epochs {of} are')} {many(own, 'optimizer step')}"
    if least >= MIN_STEPS:
        say(f"{own_words}; every run takes {least:,} at least (--min-steps)")
    elif recipe.model != "head":
        more = f" ({least:,} by --min-steps)" if least > own else ""
        say(
            f"{own_words}{more}, and networks that take fewer than {MIN_STEPS} have mostly not learned; "
            f"--epochs {-(-MIN_STEPS // each):,} makes {MIN_STEPS}"
        )


def kept_in(path: Path | None, what: str = "the runs done are") -> Callable[[], str] | None:
    """What Ctrl-C leaves of the work, for `resumable`."""
    return None if path is None else lambda: f"{what} kept in {path}" if path.exists() else "nothing was done yet"


def show_run(out: Path | None) -> Callable[[Step], None]:
    """A line on stderr after each run that was trained here, and one about those that were there before."""

    def show(step: Step) -> None:
        cached = step.outcome.cached
        if step.cached and out and (step.done == step.total if cached else step.done - step.cached == 1):
            say(f"{step.cached:,} of {step.total:,} runs were there already, in {out / 'runs'}")
        if cached:
            return
        left = f", {duration(step.seconds_left)} left" if step.seconds_left and step.done < step.total else ""
        say(
            f"run {step.done:,}/{step.total:,}: {step.run.method}, seed {step.run.seed}: "
            f"{100 * step.outcome.accuracy:.2f} % in {time_text(step.outcome.seconds)}{left}"
        )

    return show


def time_text(seconds: float | None) -> str:
    """'0.012 s', '3m12s', '-4.0 s', '' for None."""
    if seconds is None:
        return ""
    if abs(seconds) < 1:
        return f"{seconds:.3f} s"
    return f"-{duration(-seconds)}" if seconds < 0 else duration(seconds)
