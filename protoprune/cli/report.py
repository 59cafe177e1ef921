"""`protoprune report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, say
from protoprune.cli.select import (
    Backend,
    Balance,
    By,
    Cache,
    Calibrate,
    Dedup,
    DedupPrefer,
    DropHardest,
    Euclidean,
    Features,
    HigherIs,
    Iterations,
    K,
    Order,
    Quota,
    Restarts,
    Scores,
    Seed,
    TrainPoints,
    number_of_clusters,
    say_notes,
)
from protoprune.errors import UsageError

# The options that decide a list, with their defaults: what of them was given stands in the command on the page.
_DEFAULTS = {
    "order": "hard", "drop_hardest": 0.0, "quota": None, "balance": 0.0, "by": None, "calibrate": None, "dedup": None,
    "dedup_prefer": None, "scores": None, "higher_is": None, "k": "auto", "euclidean": False, "iterations": 25,
    "seed": 0, "restarts": 1, "train_points": None, "backend": "auto",
}  # fmt: skip


def report(
    features: Features = Path("features.h5"),
    keep: Annotated[float, typer.Option(help="Fraction KEPT that the page opens with.")] = 0.7,
    order: Order = "hard",
    drop_hardest: DropHardest = 0.0,
    quota: Quota = None,
    balance: Balance = 0.0,
    by: By = None,
    calibrate: Calibrate = None,
    dedup: Dedup = None,
    dedup_prefer: DedupPrefer = None,
    scores: Scores = None,
    higher_is: HigherIs = None,
    k: K = "auto",
    euclidean: Euclidean = False,
    iterations: Iterations = 25,
    seed: Seed = 0,
    restarts: Restarts = 1,
    train_points: TrainPoints = None,
    backend: Backend = "auto",
    cache: Cache = True,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    root: Annotated[Path | None, typer.Option(help="Where the images are now [default: where they were].")] = None,
    thumbnails: Annotated[bool, typer.Option(help="Put small copies of images into the page.")] = True,
    map: Annotated[str, typer.Option(help="How the map is made: pca, umap or tsne.")] = "pca",
    duplicates: Annotated[
        float, typer.Option(help="1 - cosine of the near-duplicates to show, where --dedup removes none.")
    ] = 0.05,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Score table to compare the ranking with; repeat for several.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder that `protoprune evaluate -o` wrote, to show its verdicts.")
    ] = None,
) -> None:
    """Write one self-contained page that shows what a list keeps, at every fraction."""
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    from protoprune import pruning
    from protoprune.files import write_file
    from protoprune.report import Options, page

    if out == Path("-"):
        raise UsageError("-o -: a page is for a browser; name a file, such as report.html")
    check_outputs(out, inputs=[features, scores, *(compare or [])])
    rule = pruning.Rule(keep, order, drop_hardest, quota, balance, by, calibrate, seed)
    clusters = pruning.Clusters(
        number_of_clusters(k), euclidean, iterations, seed, restarts, train_points, backend, cache
    )
    options = Options(
        root=root and str(root),
        duplicates=duplicates,
        map=map,
        thumbnails=thumbnails,
        tables=[str(path) for path in compare or []],
        evaluation=evaluation and str(evaluation),
        command=_command(features, given),
        seed=seed,
    )
    chosen = pruning.select(
        features, rule, clusters, scores=scores, higher_is=higher_is, dedup=dedup, dedup_prefer=dedup_prefer
    )
    say_notes(chosen.ranking)
    with Progress("thumbnails", "img") as bar:

        def on_image(done: int, total: int) -> None:
            if not bar.started:
                bar.start(total)
            bar.update(done)

        html, told = page(chosen, options, on_image=on_image)
    write_file(out, html)
    _say_told(out, told)


def _command(features: Path, given: dict) -> tuple[str, str]:
    """The two halves of the `select` that makes the list, around the fraction."""
    parts = []
    for name, value in given.items():
        if value == _DEFAULTS[name]:
            continue
        option = "--" + name.replace("_", "-")
        parts.append(option if value is True else f"{option} {shlex.quote(str(value))}")
    rest = "".join(f" {part}" for part in parts)
    return f"protoprune select {shlex.quote(str(features))} --keep ", f"{rest} > kept.txt"


def _say_told(out: Path, told: dict) -> None:
    say(f"{out}: {told['bytes'] / 1e6:.1f} MB, {told['thumbnails']:,} thumbnails; open it in any browser")
    if told["thumbnails"]:
        say("the page holds copies of images: share it as you would share them, or use --no-thumbnails")
    if told["missing"]:
        say(f"warning: {told['missing']:,} images could not be read any more; --root says where they are now")
    if not told["saves"]:
        say(f"note: {told['why']}; the page shows the command instead")
