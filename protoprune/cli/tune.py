"""`protoprune tune`."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protoprune.bounds import check_number
from protoprune.cli.options import HigherIs, TrainingOptions, meant, refuse_idle, table_file
from protoprune.cli.outputs import check_folder, check_outputs, check_results
from protoprune.cli.progress import resumable, say
from protoprune.cli.tables import echo
from protoprune.cli.training import hint_steps, is_image_folder, kept_in, load_sets, read_table
from protoprune.device import resolve_device
from protoprune.errors import UsageError
from protoprune.files import write_file
from protoprune.units import duration, many, rounded

if TYPE_CHECKING:
    from protoprune.pruning.ranking import Source
    from protoprune.training.examples import Examples
    from protoprune.tuning.recipes import Pool
    from protoprune.tuning.running import Networks, Tuned
    from protoprune.tuning.unlabelled import Unlabelled

_TOLERANCE = 0.5  # points


def tune(
    *,
    keep: Annotated[
        str, typer.Option(help="Fraction of the images to KEEP, or auto: the least that costs less than --tolerance.")
    ],
    features: Annotated[
        Path, typer.Option(help="Feature file or feature set of the training images, by `protoprune embed`.")
    ] = Path("features.h5"),
    tolerance: Annotated[
        float, typer.Option(min=0, help="With --keep auto: points of accuracy that leaving images out may cost.")
    ] = _TOLERANCE,
    test: Annotated[
        Path | None,
        typer.Option(
            help="Feature file of a test set (with --model: its images). It judges the winner and chooses nothing "
            "[default: a fifth of the training images is put aside for that]."
        ),
    ] = None,
    scores: Annotated[list[Path], typer.Option(help="Also try this score table (larger = harder); repeatable.")] = [],
    higher_is: HigherIs = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Train this on the images for the finalists (not with --keep auto) and the verdict: cnn, resnet18, "
            "timm:NAME."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the training images, for --model; classes are those of --features.")
    ] = None,
    test_labels: Annotated[
        Path | None,
        typer.Option(help="File of the classes of --test with --model [default: first-level folders]."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Random lists in the verdict [default: 10; with --model 5].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2_000_000_000, help="Of the splits, clusterings and ties.")] = 0,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for list, table, figure and results; a second call resumes.")
    ] = Path("tune"),
    training: TrainingOptions,
) -> None:
    """Which list is best here? Try recipes, and prove the winner.

    Recipes of `select` are tried on parts of your images; the winner is judged on the rest.

    Recipes are compared by training linear heads on the features to convergence, on what each keeps of one part of the
    images, and testing on another; the better half goes on to more parts. The winner is judged once, on images that
    chose nothing, against random lists and random lists with even classes. Where it does not beat both, a random list
    is written. With --keep auto: the smallest list that costs less than --tolerance.
    """
    import time

    from protoprune.features.opening import open_features
    from protoprune.scores import check_reading
    from protoprune.tuning import report, running

    fraction = _fraction(keep)
    check_number("--tolerance", tolerance, 0, 100)
    if fraction is not None:
        refuse_idle("goes with --keep auto, which looks for what costs so little", "tolerance")
    check_reading(scores or None, higher_is, None, False)
    _check_model(model, images, test)
    _check_files(features, test if model is None else None)
    inputs = [features, test, images, test_labels, training.weights, *map(table_file, scores)]
    check_folder(out, "tune", inputs)
    check_outputs(*training.caches, inputs=inputs)
    resolve_device(training.device)  # now, and not when everything is done
    started = time.monotonic()
    source = open_features(features)  # once: the list that is written is of what was tuned on
    check_results(out, source.provenance["root"], source.paths)
    pool, examples = _pool(source, scores, higher_is)
    if len(pool.classes) < 2:
        names = ("scores", "test", "model", "images", "seeds")
        refuse_idle(f"needs classes, and {features} has none; leave it out", *names)
        _describe(pool, features, fraction, seed, out)
        return
    if model is not None and images is not None:
        networks, tested = _networks(pool, model, images, test, test_labels, training, fraction)
    else:
        networks, tested = None, _tested(test, examples)
    with resumable(kept_in(out / "runs.jsonl", "what was trained is")):
        result = running.tune(
            pool, fraction, test=tested, seeds=seeds or (5 if model else 10), seed=seed, tolerance=tolerance / 100,
            networks=networks, folder=out, on_progress=say,
        )  # fmt: skip
    kept = out / f"kept.{_list_format(source)}"
    command = _write_list(result, source, features, kept, seed, higher_is)
    config = {
        "features": os.fspath(features), "test": test and os.fspath(test), "keep": keep, "tolerance": tolerance,
        "scores": list(map(os.fspath, scores)), "model": result.judges, "seed": seed,
        "recipe": networks and vars(networks.recipe), "device": training.device,
    }  # fmt: skip
    written = report.save(out, result, command, config)
    _print(result, command)
    say(f"{len(result.candidates):,} recipes compared in {duration(time.monotonic() - started)}")
    say(f"wrote {', '.join([os.fspath(kept), *written])}")
    for other in filter(Path.exists, {out / "kept.txt", out / "kept.jsonl"} - {kept}):  # perhaps made by `select`
        say(f"warning: {other} was there before and is not this answer's list")


def _fraction(text: str) -> float | None:
    """'auto' -> None, a number -> itself, checked."""
    from protoprune.selection import check_keep

    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"--keep {text}: expected auto or the fraction to keep, such as 0.3{meant(text)}") from None
    check_keep(value)
    if value == 1:
        raise UsageError("--keep 1: keeps every image, whatever the recipe; give a smaller fraction, or auto")
    return value


def _check_model(model: str | None, images: Path | None, test: Path | None) -> None:
    """UsageError for a model that cannot be compared, and for options of networks without one."""
    if model == "head":
        raise UsageError("--model head: heads compare the recipes anyway; leave --model out")
    if model is not None and images is None:
        raise UsageError(f"--model {model} trains on images: give --images FOLDER")
    if images is not None and model is None:
        raise UsageError("--images goes with --model, which trains on them")
    if model is None:
        refuse_idle("goes with --model, whose training it is about", *(one.name for one in fields(TrainingOptions)))
    if model is None or test is None:
        refuse_idle("is of the images of --test, which --model takes", "test_labels")


def _check_files(features: Path, test: Path | None) -> None:
    """UsageError for what is no feature file or set, and should be."""
    from protoprune.features.opening import missing

    if test is not None and is_image_folder(test):
        raise UsageError(f"--test {test}: a folder of images, which only --model takes; embed it first")
    for path in filter(None, (features, test)):
        if not path.exists() or is_image_folder(path):
            raise missing(path, f"feature file or feature set; make one with `protoprune embed IMAGES -o {path}`")


def _pool(file: Source, scores: list[Path], higher_is: str | None) -> tuple[Pool, Examples | None]:
    """The labelled images of an open feature file or set; all images, without classes, where it has none."""
    import numpy as np

    from protoprune.training.examples import load_examples
    from protoprune.tuning.recipes import Pool

    if len(file.classes) < 2:
        rows, paths = np.flatnonzero(file.usable), file.paths
        return Pool([paths[row] for row in rows.tolist()], np.full(len(rows), -1), [], file.features[:][rows]), None
    examples = load_examples(file)
    pool = _pool_of(examples)
    tables = {}
    for table in scores:
        tables[os.fspath(table)] = read_table(table, examples, higher_is=higher_is)
    say(f"{file.path}: {len(examples):,} images of {len(examples.classes):,} classes")
    if examples.unlabelled:
        some = many(examples.unlabelled, "image has", "images have")
        say(f"warning: {some} no class: recipes are compared without them, and the list written is of all images")
    return replace(pool, tables=tables), examples


def _tested(test: Path | None, train: Examples | None) -> Pool | None:
    """The test set of a feature file, which must be of the same encoder; None without one."""
    from protoprune.training.examples import check_same_inputs, load_examples, warn_of_shared

    if test is None or train is None:
        return None
    examples = load_examples(test, classes=train.classes)
    for difference in check_same_inputs(train, examples):
        say(f"warning: {test} differs from the training features in {difference}: in the last digits")
    warn_of_shared(train, examples)
    return _pool_of(examples)


def _pool_of(examples: Examples) -> Pool:
    from protoprune.tuning.recipes import Pool

    return Pool(examples.paths, examples.labels, examples.classes, examples.inputs.flatten(1).numpy())


def _networks(
    pool: Pool,
    model: str,
    images: Path,
    test: Path | None,
    test_labels: Path | None,
    training: TrainingOptions,
    fraction: float | None,
) -> tuple[Networks, Pool | None]:
    """The images of the pool, with its classes, whatever their folders are called; and those of the test set.

    Says where a fraction of them is too few for the steps of the recipe.
    """
    from protoprune.evaluation.runs import list_rows
    from protoprune.training.examples import subset, warn_of_shared
    from protoprune.tuning.running import SCREENED, Networks

    recipe = training.recipe(model)
    classes = {path: pool.classes[label] for path, label in zip(pool.paths, pool.labels.tolist(), strict=True)}
    own = {"labels": classes, "classes": pool.classes}
    train, tested = load_sets(
        images, test, model, training, (own, {"labels": True if test_labels is None else test_labels})
    )
    if tested is not None:
        warn_of_shared(train, tested)
    rows = list_rows(pool.paths, train, "the feature file")
    networks = Networks(subset(train, rows), tested, recipe, training.device)
    choose = len(pool) if tested is not None else round(0.8 * len(pool))  # else a fifth judges
    hint_steps(recipe, max(1, round((fraction or SCREENED) * choose)), 0)
    return networks, None if tested is None else _pool_of(tested)


def _list_format(source: Source) -> str:
    """txt, but jsonl where a name holds a line break, which would be found out after hours of work."""
    import numpy as np

    from protoprune.lists import check_list

    try:
        check_list(source.paths, np.arange(source.n), "txt")
    except UsageError:
        return "jsonl"
    return "txt"


def _write_list(result: Tuned, source: Source, features: Path, out: Path, seed: int, higher_is: str | None) -> str:
    """Write the winner's list, by what its command does; returns the command."""
    import numpy as np

    from protoprune import lists, pruning

    one = result.winner
    chosen = pruning.select(
        source, one.rule(result.keep, seed), pruning.Clusters(k=one.k, seed=seed), scores=one.scores,
        higher_is=higher_is if one.scores else None,
    )  # fmt: skip
    rows = np.flatnonzero(chosen.keep)
    format = lists.list_format(out) or "txt"
    write_file(out, lists.list_chunks(chosen.ranking.paths, rows, chosen.ranking.scores, format))
    return one.command(features, result.keep, out, higher_is) + _seed_words(seed)


def _seed_words(seed: int) -> str:
    return f" --seed {seed}" if seed else ""


def _print(result: Tuned, command: str) -> None:
    from protoprune.tuning import report

    for row in report.rows(result)[:8]:
        span = "" if row["low"] is None else f" ({_signed(row['low'])} to {_signed(row['high'])})"
        say(
            f"  {row['recipe']}: {100 * row['accuracy']:.2f} %, {_signed(row['to_random'])} points over random{span}, "
            f"{many(row['splits'], 'split')}"
        )
    one = result.judgement
    if one is not None:
        say(
            f"judged on {one.images:,} images that chose nothing, {one.seeds} random lists: {result.best.name} "
            f"{100 * one.accuracy:.2f} %, random {100 * one.random:.2f} %, random by class {100 * one.balanced:.2f} %, "
            f"everything {100 * one.everything:.2f} %"
        )
    echo(report.sentence(result))
    echo(command)


def _signed(share: float) -> str:
    return rounded(100 * share, sign="+")


def _describe(pool: Pool, features: Path, keep: float | None, seed: int, out: Path) -> None:
    """Without labels: what can be said, and that accuracy cannot."""
    from protoprune.tuning import report, unlabelled

    if keep is None:
        raise UsageError(
            f"--keep auto: {features} has no classes (first-level folders), without which what leaving images out "
            "costs cannot be judged; give a fraction"
        )
    if (out / "results.json").exists():
        raise UsageError(f"-o {out}: holds what was found for images with classes; choose another folder")
    say(f"{features}: {len(pool):,} images without classes")
    result = unlabelled.describe(pool, keep, seed)
    out.mkdir(parents=True, exist_ok=True)
    written = report.save_unlabelled(out, result)
    _print_unlabelled(result, keep, features, out, seed)
    say(f"wrote {', '.join(written)}; no list, since nothing here says which is best")


def _print_unlabelled(result: Unlabelled, keep: float, features: Path, out: Path, seed: int) -> None:
    say(f"features: {100 * result.consistency:.1f} % of an image's 10 nearest lie in its cluster (by chance "
        f"{100 * result.chance:.1f} %); {100 * result.duplicates:.1f} % have a near-duplicate "
        f"({result.sampled:,} images looked at)")  # fmt: skip
    say("recipe: mean distance of an image to the nearest kept one, and the one that the farthest 1 % exceed; "
        "near-duplicates among the kept; overlap of the lists of two seeds")  # fmt: skip
    for one in result.rows:
        say(f"  {one.name}: {one.farness:.3f}, {one.farthest:.3f}; {100 * one.duplicates:.1f} %; "
            f"{100 * one.stability:.1f} %")  # fmt: skip
    best = next(one.candidate for one in result.rows if one.candidate.order == "cover")
    typer.echo(
        "without labels coverage, near-duplicates and stability can be judged, accuracy cannot; where it was measured, "
        "cover beat random at 10 % kept and less:"
    )
    echo(best.command(features, keep, out / "kept.txt") + _seed_words(seed))
