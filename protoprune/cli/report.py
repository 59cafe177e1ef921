"""`protoprune report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from protoprune.cli.options import (
    ClusterOptions,
    Features,
    Root,
    RuleOptions,
    Scores,
    TableOptions,
    given_words,
    refuse_idle,
    table_file,
)
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, say
from protoprune.cli.select import say_notes, say_table
from protoprune.errors import UsageError
from protoprune.files import check_suffix, write_file
from protoprune.stores import public
from protoprune.units import bytes_text, many


def report(
    features: Features = Path("features.h5"),
    keep: Annotated[float, typer.Option(help="Fraction KEPT that the page opens with.")] = 0.7,
    *,
    how: RuleOptions,
    scores: Scores = None,
    reading: TableOptions,
    clustering: ClusterOptions,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    root: Root = None,
    thumbnails: Annotated[bool, typer.Option(help="Put small copies of images into the page.")] = True,
    map: Annotated[str, typer.Option(help="How the map is made: pca, umap or tsne.")] = "pca",
    duplicates: Annotated[
        float | None,
        typer.Option(help="1 - cosine of the near-duplicates to show, where --dedup removes none [default: 0.05]."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="Score table to compare the ranking with, FILE:prune where higher is easier; repeatable."),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder that `protoprune evaluate -o` wrote, to show its verdicts.")
    ] = None,
) -> None:
    """Write one page that shows what a list keeps at every fraction.

    It holds all that it shows: no server, no network.
    """
    from protoprune import pruning
    from protoprune.report import Options, page

    _check_duplicates(duplicates, scores, how)
    if out == Path("-"):
        raise UsageError("-o -: a page is for a browser; name a file, such as report.html")
    if not thumbnails:
        refuse_idle("says where the images of the thumbnails are, and --no-thumbnails shows none", "root")
    check_outputs(out, inputs=[features, table_file(scores), reading.rows, *(table_file(one) for one in compare or [])])
    check_suffix(out, (".html", ".htm"))
    options = Options(
        root=None if root is None else str(root),
        duplicates=Options.duplicates if duplicates is None else duplicates,
        map=map,
        thumbnails=thumbnails,
        tables=[str(path) for path in compare or []],
        evaluation=None if evaluation is None else str(evaluation),
        command=_command(features, scores, how, reading, clustering),
        seed=clustering.seed,
    )
    chosen = pruning.select(
        features, how.rule(keep, clustering.seed), clustering.clusters(), scores=scores, **vars(reading),
        dedup=how.dedup, dedup_prefer=how.dedup_prefer,
    )  # fmt: skip
    if chosen.ranking.table is not None:
        say_table(chosen.ranking, chosen.ranking.table)
    say_notes(chosen.ranking.notes() + chosen.notes())
    with Progress("thumbnails") as bar:
        html, told = page(chosen, options, on_image=bar.show)
    write_file(out, html)
    _say_told(out, told, str(root or chosen.ranking.root))


def _check_duplicates(duplicates: float | None, scores: Path | None, how: RuleOptions) -> None:
    if duplicates is not None and how.dedup is not None:
        raise UsageError(f"--duplicates {duplicates:g}: is for lists without --dedup, whose duplicates are shown")
    if scores is not None and how.quota is None:
        refuse_idle("near-duplicates are looked for in clusters, and --scores makes none; leave it out", "duplicates")


def _command(
    features: Path, scores: Path | None, *groups: RuleOptions | TableOptions | ClusterOptions
) -> tuple[str, str]:
    """The two halves of the `select` that makes the list, around the fraction."""
    table = [] if scores is None else [f"--scores {shlex.quote(str(scores))}"]
    rest = " ".join(["", *table, *filter(None, [given_words(*groups)])])
    return f"protoprune select {shlex.quote(str(features))} --keep ", f"{rest} > kept.txt"


def _say_told(out: Path, told: dict[str, Any], root: str) -> None:
    say(f"{out}: {bytes_text(told['bytes'])}, {many(told['thumbnails'], 'thumbnail')}; open it in any browser")
    if told["thumbnails"]:
        say("the page holds copies of images: share it as you would share them, or use --no-thumbnails")
    if told["missing"]:
        some = f"{many(told['missing'], 'image')} could not be read any more, or changed since"
        say(f"warning: {some}; --root says where they are now, if not below {public(root)}")
    for note in told["notes"]:
        say(note)
    if not told["saves"]:
        say(f"note: {told['why']}; the page shows the command instead")
