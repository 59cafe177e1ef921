"""`protoprune embed` of shards, `protoprune merge`, and what `protoprune info` says of a feature set."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, say
from protoprune.cli.tables import echo
from protoprune.errors import ProtopruneError, UsageError
from protoprune.units import duration

if TYPE_CHECKING:
    from protoprune.encoders import Encoder
    from protoprune.featureset import Part
    from protoprune.sharding import SetReport, ShardReport
    from protoprune.sources import ShardOptions
    from protoprune.sources.finding import Source

ImageColumn = Annotated[str | None, typer.Option(help="Column of the images in Parquet and Arrow shards.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of their names [default: row numbers].")]
Rank = Annotated[int | None, typer.Option(min=0, help="Number of this process [default: SLURM_PROCID, RANK, else 0].")]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICES", help="A process on each: all, 0,1,… (GPUs) or cpu,cpu (processes that share the cores)."
    ),
]
WorldSize = Annotated[
    int | None, typer.Option(min=1, help="Processes that share the shards [default: SLURM_NTASKS, WORLD_SIZE, else 1].")
]


def embed_source(
    source: Source,
    model: Encoder,
    out: Path,
    errors: Path | None,
    strict: bool,
    options: ShardOptions,
    share: tuple[int, int],
    settings: dict[str, Any],
) -> None:
    """Embed a source of shards, say what became of it, and decide the exit code."""
    from protoprune.sharding import embed_shards
    from protoprune.sources.finding import describe_source

    started = time.monotonic()
    rank, world = share
    mine = len(source.shards[rank::world])
    ours = f"; {mine:,} of them are for rank {rank} of {world}" if world > 1 else ""
    say(f"{describe_source(source)}{ours}")
    with Progress("embed", "shards") as progress:
        progress.start(mine)
        done: Counter[str] = Counter()

        def on_shard(one: ShardReport) -> None:
            done.update(shards=1, images=one.embedded, failed=one.state == "failed")
            if one.state == "failed":
                say(f"warning: {one.name}: {one.status}: {one.reason}")
            rate = done["images"] / max(time.monotonic() - started, 1e-9)
            progress.update(done["shards"], done["failed"], f"{done['images']:,} images, {rate:,.0f} img/s")

        report = embed_shards(
            source, model, out, options=options, rank=rank, world_size=world, on_shard=on_shard, **settings
        )
    _say_set(report, model, time.monotonic() - started)
    if errors is not None:
        _write_errors(errors, report)
    if report.finished and not report.n:
        raise ProtopruneError(f"none of the {report.shards:,} shards could be used; see {errors or '--errors FILE'}")
    if strict and (report.failed_shards or report.failed):
        raise ProtopruneError("--strict: not everything could be read")


def _say_set(report: SetReport, model: Encoder, seconds: float) -> None:
    from protoprune.images import describe_counts

    _say_left_out(report.skipped, report.duplicates)
    if report.failed:
        say(f"{report.failed:,} images could not be used: {describe_counts(report.failures, 10)}")
    if report.transparent:
        say(f"{report.transparent:,} of the images embedded now have transparent parts; they are shown on white")
    states = ", ".join(f"{count:,} {state}" for state, count in report.states.most_common())
    rate = f" in {duration(seconds)} ({report.embedded / max(seconds, 1e-9):,.0f} img/s)" if report.embedded else ""
    say(
        f"{report.out}: {report.shards:,} shards ({states}), {report.n:,} images x {model.dim} ({model.name}, "
        f"{report.precision}, {report.device}); {report.embedded:,} embedded{rate}"
    )
    if report.failed_shards:
        first, status, reason = report.failed_shards[0]
        say(f"{len(report.failed_shards):,} shards could not be used, first {first}: {status}: {reason}")
    if not report.finished:
        say(f"{report.out} is not finished: other processes have shards left, or were stopped; run the same again")


def _say_left_out(skipped: Counter[str], duplicates: int) -> None:
    from protoprune.images import describe_counts

    if skipped:
        say(f"left out {sum(skipped.values()):,} files that are not images by name: {describe_counts(skipped)}")
    if duplicates:
        say(f"{duplicates:,} images came twice under one name in a shard; the last one counts, as in unpacking")


def _write_errors(errors: Path, report: SetReport) -> None:
    """Shards that failed, and images, as one list."""
    from protoprune.featureset import FeatureSet
    from protoprune.files import write_file
    from protoprune.lists import manifest

    rows = list(report.failed_shards)
    if report.finished and report.n:
        with FeatureSet(report.out) as whole:
            rows += [(path, status.label, reason) for path, status, reason in whole.failures()]
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    write_file(errors, manifest(dict(zip(("path", "status", "reason"), columns, strict=True))))


def ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size) as given, else from the environment of SLURM or torchrun, else alone."""
    if (rank is None) != (world_size is None):
        raise UsageError("--rank and --world-size go together")
    if rank is None or world_size is None:
        for one, all_of_them in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
            if one in os.environ and all_of_them in os.environ:
                try:
                    rank, world_size = int(os.environ[one]), int(os.environ[all_of_them])
                except ValueError:
                    raise UsageError(f"{one}={os.environ[one]}: not a number; give --rank and --world-size") from None
                break
        else:
            return 0, 1
    if not 0 <= rank < world_size:
        raise UsageError(f"--rank {rank}: expected 0 to {world_size - 1}, below --world-size {world_size}")
    return rank, world_size


def merge(
    features: Annotated[Path, typer.Argument(help="Feature set: the folder that `embed` made of shards.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Feature file to write.")] = Path("features.h5"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a feature file.")] = False,
) -> None:
    """Make one feature file of a feature set."""
    from protoprune.featureset import merge as run
    from protoprune.images import is_feature_set

    if not is_feature_set(features):
        raise UsageError(f"{features}: no feature set; give the folder that `protoprune embed SHARDS` made")
    check_outputs(hdf5=out, inputs=[features])
    say(f"{out}: {run(features, out, overwrite=overwrite):,} images")


def show_set(folder: Path, errors: bool) -> bool:
    """Print what the shards of a set are at; whether it can be opened as a whole."""
    from protoprune.featureset import read_plan

    _, parts = read_plan(folder)
    failed = [(part.name, *part.failed) for part in parts if part.failed]  # (name, status, reason)
    done = sum(part.done for part in parts)
    pending = sum(part.pending for part in parts)
    if errors:
        for one in failed:
            echo("\t".join(one))
        return bool(done) and not pending
    rows = sum(part.rows for part in parts if part.done)
    echo(f"{folder}: feature set of {len(parts):,} shards: {done:,} done ({rows:,} images), {len(failed):,} failed, "
           f"{pending:,} not yet embedded")  # fmt: skip
    for status, count in Counter(status for _, status, _ in failed).most_common():
        name, reason = next((name, reason) for name, of, reason in failed if of == status)
        echo(f"failed      {count:,} {status} (first: {name}: {reason})")
    for who, count in _makers(folder, parts).most_common(8):
        echo(f"made by     {who}: {count:,} shards")
    return bool(done) and not pending


def _makers(folder: Path, parts: list[Part]) -> Counter[str]:
    """Which processes embedded the shards; of the first thousand, since each is a file to open."""
    from protoprune.features import FeatureFile
    from protoprune.featureset import shard_file

    makers: Counter[str] = Counter()
    for part in parts[:1000]:
        path = shard_file(os.fspath(folder), part.name)
        if os.path.exists(path):
            try:
                with FeatureFile(path) as file:
                    makers[file.provenance.get("embedded_by", "unknown")] += 1
            except ProtopruneError as error:
                echo(f"damaged     {error}")
    return makers
