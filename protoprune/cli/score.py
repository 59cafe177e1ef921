"""`protoprune metrics` and `protoprune score`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import say
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import print_table
from protoprune.errors import UsageError
from protoprune.files import check_suffix, write_stdout
from protoprune.units import duration, many

_FITS = 0.95  # training accuracy below which memorization says more about the models than about the images

if TYPE_CHECKING:
    from protoprune.metrics.catalogue import Metric, Scored


def metrics() -> None:
    """List the metrics: what each needs, costs and says.

    And where each comes from: the paper, and the code where there is some.
    """
    from protoprune.metrics.catalogue import METRICS

    need_stdout()
    rows = []
    for name, one in METRICS.items():
        labels, training = ("yes" if needed else "no" for needed in (one.labels, one.training))
        rows.append((name, one.needs, labels, training, one.cost, one.source, one.summary))
    heads = ("metric", "needs", "labels", "training", "cost", "source", "larger = harder")
    print_table(heads, rows, fold=True)
    say("protoprune score METRIC --record FILE or --features FILE computes one.")


def score(
    metric: Annotated[str, typer.Argument(help="Name of the metric, see `protoprune metrics`.")],
    record: Annotated[
        Path | None, typer.Option(help="Training record that `protoprune record` wrote [default: record.h5].")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Feature file or set [default: features.h5].")] = None,
    epoch: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Recorded epoch to take the score at, or to follow training up to [default: the one nearest to 10 for "
            "el2n and grand, else the last].",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Average over the models that were trained on an image, held out of it, or all: "
            "trained, held-out, all [default: trained; ddd and label_issues: held-out; ensemble_active_learning: all]."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Epochs a window of dyn_unc and tdds [default: 10].")] = None,
    k: Annotated[
        int | None, typer.Option(help="Clusters of self_supervised_prototypes [default: as `select` has].")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the images that k_center chooses one by one [default: 0.1, at most 10,000 images]."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Groups that cover and facility cover: class or cluster [default: class, where there are classes]."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2_000_000_000,
            help="Seed of self_supervised_prototypes, k_center, cover, facility, random [default: 0].",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the score table here; - is stdout [default: stdout].")
    ] = None,
) -> None:
    """Score every image by a metric, as a table for `select --scores`.

    A larger score is a harder image, whatever the metric.
    """
    import time

    from protoprune.metrics import catalogue

    started = time.monotonic()
    name, out = metric.replace("-", "_").lower(), None if out == Path("-") else out
    need_stdout(out)
    chosen = catalogue.lookup(name)
    source, is_record = _source(name, chosen, record, features)
    if out is not None:
        _check_out(out, source)
    with catalogue.open_source(chosen, source, is_record) as file:
        options = {"epoch": epoch, "models": models, "window": window, "k": k, "budget": budget, "by": by, "seed": seed}
        result = catalogue.score(name, file, **options)
        made_of = {"from": os.fspath(source), "uuid": file.provenance.get("uuid"), **result.used}
        _write(out, file.paths, result, name, made_of)
    _say_summary(name, chosen, source, result, time.monotonic() - started)


def _source(name: str, metric: Metric, record: Path | None, features: Path | None) -> tuple[Path, bool]:
    """The one file that the metric reads, and whether it is a training record."""
    if record is not None and features is not None:
        raise UsageError("--record and --features: give the one that the metric needs, see `protoprune metrics`")
    if metric.needs == "record" and features is not None:
        raise UsageError(f"{name} needs --record FILE, a training record that `protoprune record` wrote")
    if metric.needs == "features" and record is not None:
        raise UsageError(f"{name} needs --features FILE, a feature file that `protoprune embed` wrote, not a record")
    if metric.needs == "record" or record is not None:
        return record or Path("record.h5"), True
    return features or Path("features.h5"), False


def _check_out(out: Path, source: Path) -> None:
    """Find out what cannot be written before the work is done."""
    from protoprune.scores.table import check_name

    check_name(out)
    check_outputs(stdout=out, inputs=[source])
    check_suffix(out, (".csv", ".tsv", ".parquet", ".pq"))


def _write(out: Path | None, paths: Sequence[str], result: Scored, name: str, provenance: dict[str, Any]) -> None:
    from protoprune.scores.table import table_chunks, write_scores

    provenance = {key: value for key, value in provenance.items() if value is not None}
    if out is not None:
        write_scores(out, paths, result.values, metric=name, provenance=provenance)
        return
    write_stdout(table_chunks("scores.csv", paths, result.values, metric=name, provenance=provenance))


def _why_without(metric: Metric, used: dict[str, Any]) -> str:
    """Why some images have no score: those of a record were all read, and have classes."""
    if metric.needs != "record":
        return f"unreadable, {'without a class, ' * metric.labels}or with features that are all zeros"
    reasons = {"trained": "no model was trained on them", "held-out": "every model was trained on them"}
    return reasons.get(used.get("averaged_over", ""), "all models were trained on them, or none")


def _say_summary(name: str, metric: Metric, source: Path, result: Scored, seconds: float) -> None:
    import numpy as np

    values = result.values[~np.isnan(result.values)]
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.used.items())
    say(
        f"{name} of {len(result.values):,} images from {source} in {duration(seconds)}"
        + (f" ({facts})" if facts else "")
    )
    low, quarter, median, upper, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    say(f"scores: {low:.4g} to {high:.4g}, quartiles {quarter:.4g}, {median:.4g}, {upper:.4g}; larger = harder")
    missing = len(result.values) - len(values)
    if missing:
        say(
            f"without a score: {many(missing, 'image')} ({_why_without(metric, result.used)}), which "
            "`protoprune select --scores` does not keep"
        )
    if result.used.get("right_with", 1) < _FITS:
        say(
            f"warning: the models are right about {100 * result.used['right_with']:.1f} % of their training images; "
            "what a model cannot fit it cannot memorize: mislabelled images then have low scores. Record models that "
            "fit; for heads --hidden 128 --epochs 60 --weight-decay 0"
        )
    if name == "random":  # one hash would make such a list agree with how the ties of all other scores are broken
        say("hint: another draw than `select --order random` makes with the same seed, though as good a one")
    if len(values) < 2:
        return
    if low == high:
        say("warning: all scores are equal, so keeping by them is keeping at random")
        return
    distinct, counts = np.unique(values, return_counts=True)
    most = int(counts.max())
    if most > 0.5 * len(values):
        say(
            f"warning: {100 * most / len(values):.0f} % of the images share the score {distinct[counts.argmax()]:.4g}; "
            "which of them are kept is chosen at random"
        )
