"""`protoprune embed` of shards, `protoprune merge`, and what `protoprune info` says of a feature set."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune import stores
from protoprune.cli.options import several
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, say
from protoprune.cli.tables import echo, echo_fields
from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import write_file
from protoprune.stores import is_url, public
from protoprune.units import bytes_text, duration, many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from protoprune.embedding.pipeline import EmbedReport
    from protoprune.encoders import Encoder
    from protoprune.features.featureset import Part
    from protoprune.shards.sharding import SetReport, ShardReport
    from protoprune.sources import ShardOptions
    from protoprune.sources.finding import Source

ImageColumn = Annotated[str | None, typer.Option(help="Column of the images in Parquet and Arrow shards.")]
IdColumn = Annotated[
    str | None, typer.Option(help="Column of the images' names; in tars and zips, key of the .json beside.")
]


@dataclass(frozen=True)
class WorkerOptions:
    """Which processes embed shards."""

    devices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICES", help="A process on each: all, 0,1,… (GPUs) or cpu,cpu (processes that share the cores)."
        ),
    ] = None
    rank: Annotated[
        int | None, typer.Option(min=0, help="Number of this process [default: SLURM_PROCID, RANK, else 0].")
    ] = None
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share the shards [default: SLURM_NTASKS, WORLD_SIZE, else 1]."),
    ] = None
    engine: Annotated[str, typer.Option(help="local, or ray: workers on the machines of a Ray cluster.")] = "local"
    address: Annotated[
        str | None,
        typer.Option(help="Head of the Ray cluster, HOST:PORT or auto [default: RAY_ADDRESS, else this machine]."),
    ] = None

    def arguments(self, device: str) -> dict[str, Any]:
        """Arguments of `embed_shards`, checked together."""
        if self.engine not in ("local", "ray"):
            raise UsageError(f"--engine {self.engine}: expected local or ray")
        if self.engine == "local":
            if self.address is not None:
                raise UsageError("--address goes with --engine ray")
            from protoprune.shards.launch import parse_devices

            rank, world_size = ranks(self.rank, self.world_size)
            devices = parse_devices(",".join(several(self.devices))) if self.devices else None
            return {"devices": devices, "rank": rank, "world_size": world_size}
        if self.devices is not None or self.rank is not None or self.world_size is not None:
            raise UsageError("--engine ray spreads the shards itself: no --devices, --rank or --world-size with it")
        if device not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {device}: Ray chooses the device; expected auto, cuda or cpu with --engine ray")
        return {"ray": True, "address": self.address}


def embed_source(
    source: Source,
    model: Encoder,
    out: str,
    errors: Path | None,
    strict: bool,
    options: ShardOptions,
    settings: dict[str, Any],
) -> None:
    """Embed a source of shards, say what became of it, and decide the exit code."""
    from protoprune.shards.sharding import embed_shards
    from protoprune.sources.finding import describe_source

    started = time.monotonic()
    rank, world = settings.get("rank", 0), settings.get("world_size", 1)
    mine = len(source.shards[rank::world])
    ours = f"; {mine:,} of them are for rank {rank} of {world}" if world > 1 else ""
    say(f"{describe_source(source)}{ours}")
    with Progress("embed", "shards") as progress:
        on_start, on_shard = _followers(progress, source)
        report = embed_shards(source, model, out, options=options, on_start=on_start, on_shard=on_shard, **settings)
    _say_set(report, model, time.monotonic() - started)
    if errors is not None:
        _write_errors(errors, report)
    if report.finished and not report.n:
        raise ProtopruneError(f"none of {many(report.shards, 'shard')} could be used; see {errors or '--errors FILE'}")
    if report.finished and report.failed == report.n:
        raise nothing_usable(report.n, errors)
    check_strict(strict, bool(report.failed_shards or report.failed))


def nothing_usable(images: int, errors: Path | None, why: str = "") -> ProtopruneError:
    """The error for images none of which could be used."""
    why = why or f"see {errors or '--errors FILE'} for why"
    return ProtopruneError(f"none of {many(images, 'image')} could be used; {why}")


def check_strict(strict: bool, losses: bool) -> None:
    if strict and losses:
        raise ProtopruneError("--strict: not everything could be read")


def _followers(progress: Progress, source: Source) -> tuple[Callable[[int, int], None], Callable[[ShardReport], None]]:
    """What shows how many shards are left, and what became of one."""
    sizes = {shard.name: max(shard.size, 0) for shard in source.shards}
    done: dict[str, float] = dict.fromkeys(("start", "shards", "images", "failed", "bytes"), 0)

    def on_start(total: int, left: int) -> None:
        if 0 < left < total:
            say(f"{total - left:,} of {total:,} shards are done already, {left:,} to go")
        progress.start(left)
        done["start"] = time.monotonic()

    def on_shard(one: ShardReport) -> None:
        if not progress.started:  # it was done before
            return
        new = {"shards": 1, "images": one.embedded, "failed": one.state == "failed", "bytes": sizes[one.name]}
        for name, count in new.items():
            done[name] += count
        if one.state == "failed":
            say(f"warning: {one.name}: {one.status}: {one.reason}")
        seconds = max(time.monotonic() - done["start"], 1e-9)
        speed = f"{done['images'] / seconds:,.0f} img/s, {bytes_text(done['bytes'] / seconds)}/s"
        progress.update(int(done["shards"]), int(done["failed"]), f"{done['images']:,.0f} images, {speed}")

    return on_start, on_shard


def _say_set(report: SetReport, model: Encoder, seconds: float) -> None:
    from protoprune.images.listing import describe_counts

    _say_skipped(report)
    say_compared(report)
    if report.failed:
        say(f"{many(report.failed, 'image')} could not be used: {describe_counts(report.failures, 10)}")
    if report.transparent:
        say(f"{report.transparent:,} of the images embedded now have transparent parts; they are shown on white")
    if report.classes_from:
        say(f"classes are from {' and '.join(sorted(report.classes_from))}")
    states = ", ".join(f"{count:,} {state}" for state, count in report.states.most_common())
    embedded = report.embedded - report.failed_now
    rate = f" in {duration(seconds)} ({embedded / max(seconds, 1e-9):,.0f} img/s)" if embedded else ""
    say(
        f"{report.out}: {many(report.shards, 'shard')} ({states}), {many(report.n, 'image')} x {model.dim} "
        f"({model.name}, {report.precision}, {report.device}); {embedded:,} embedded{rate}"
    )
    if report.failed_shards:
        first, status, reason = report.failed_shards[0]
        say(f"{many(len(report.failed_shards), 'shard')} could not be used, first {first}: {status}: {reason}")
    if not report.finished:
        say(f"{report.out} is not finished: other processes have shards left, or were stopped; run the same again")


def say_compared(report: EmbedReport | SetReport) -> None:
    """What became of images whose content was compared with what had been embedded."""
    if report.compared:
        same = report.compared - report.other
        again = many(report.other, "has other content and is", "have other content and are")
        other = f", {again} embedded again" if report.other else ""
        say(f"of {many(report.compared, 'image')} compared {many(same, 'is', 'are')} the same{other}")


def say_left_out(skipped: Counter[str], listed: str) -> None:
    """How many files are no images by their names, and where they are `listed`."""
    from protoprune.images.listing import describe_counts

    files = many(sum(skipped.values()), "file that is not an image", "files that are not images")
    say(f"left out {files} by name: {describe_counts(skipped)}{listed}")


def _say_skipped(report: SetReport) -> None:
    if report.skipped:
        some = f"; {report.left_out:,} of them belong to no image (--errors FILE lists them)" if report.left_out else ""
        say_left_out(report.skipped, some)
    if report.links:
        say(
            f"{many(report.links, 'image is a link in its tar', 'images are links in their tars')}: WebDataset passes "
            "over links, so train on what `protoprune reshard` writes, or pack with `tar --hard-dereference -h`"
        )
    if report.duplicates:
        twice = many(report.duplicates, "image")
        say(f"{twice} came twice under one name in a shard; the last one counts, as in unpacking")


def _write_errors(errors: Path, report: SetReport) -> None:
    """Shards that failed, images that did, and what was left out of shards, as one list."""
    from protoprune.features.featureset import FeatureSet
    from protoprune.features.opening import local_path
    from protoprune.lists import packed, table_chunks

    def rows() -> Iterator[tuple[str, str, str]]:
        yield from report.failed_shards
        if report.finished and report.n and (report.failed or report.left_out or not is_url(report.out)):
            with FeatureSet(local_path(report.out)) as whole:
                yield from whole.problems()

    write_file(errors, packed(errors, table_chunks(["path", "status", "reason"], rows())))


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
    from protoprune.features.opening import merge as run
    from protoprune.images.listing import is_feature_set

    if not is_feature_set(features):
        raise UsageError(f"{features}: no feature set; give the folder that `protoprune embed SHARDS` made")
    check_outputs(hdf5=out, inputs=[features])
    say(f"{out}: {run(features, out, overwrite=overwrite):,} images")


def show_set(folder: str, errors: bool) -> bool:
    """Print what the shards of a set are at; whether it can be opened as a whole."""
    from protoprune.features.featureset import read_plan

    _, parts = read_plan(folder)
    failed = [(part.name, *part.failed) for part in parts if part.failed]  # (name, status, reason)
    whole = any(part.done for part in parts) and not any(part.pending for part in parts)
    if errors:
        for one in (*failed, *(() if whole else _problems_so_far(folder, parts))):
            echo_fields(*one)
    else:
        _print_states(folder, parts, failed)
    return whole


def _problems_so_far(folder: str, parts: list[Part]) -> Iterator[tuple[str, str, str]]:
    """What the feature files that are there say of images without features, as the set does when it is finished."""
    from protoprune.features.featurefile import FeatureFile
    from protoprune.features.featureset import shard_file

    if is_url(folder):
        say(f"warning: {public(folder)} is not finished, and only shards that failed are listed until it is")
        return
    for path in (shard_file(folder, part.name) for part in parts):
        if os.path.exists(path):
            with FeatureFile(path) as file:
                yield from file.problems()


def _print_states(folder: str, parts: list[Part], failed: list[tuple[str, str, str]]) -> None:
    done, pending = sum(part.done for part in parts), sum(part.pending for part in parts)
    rows = sum(part.rows for part in parts if part.done)
    states = f"{done:,} done ({many(rows, 'image')}), {len(failed):,} failed, {pending:,} not yet embedded"
    echo(f"{public(folder)}: feature set of {many(len(parts), 'shard')}: {states}")
    for status, count in Counter(status for _, status, _ in failed).most_common():
        name, reason = next((name, reason) for name, of, reason in failed if of == status)
        echo(f"failed      {count:,} {status} (first: {name}: {reason})")
    for who, count in _makers(folder, parts).most_common(8):
        echo(f"made by     {who}: {many(count, 'shard')}")


def _makers(folder: str, parts: list[Part]) -> Counter[str]:
    """Which processes embedded the shards; of the first thousand, since each is a file to open."""
    from protoprune.features import remoteset
    from protoprune.features.featurefile import FeatureFile
    from protoprune.features.featureset import shard_file

    if stores.is_url(folder):
        return Counter(one["embedded_by"] for one in remoteset.notes(folder).values() if "embedded_by" in one)
    makers: Counter[str] = Counter()
    for part in parts[:1000]:
        path = shard_file(folder, part.name)
        if os.path.exists(path):
            try:
                with FeatureFile(path) as file:
                    makers[file.provenance.get("embedded_by", "unknown")] += 1
            except ProtopruneError as error:
                echo(f"damaged     {error}")
    return makers
