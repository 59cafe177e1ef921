"""`protoprune embed` and `protoprune encoders`."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protoprune.cli.options import ClassOptions
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import Progress, resumable, say
from protoprune.cli.shards import (
    IdColumn,
    ImageColumn,
    WorkerOptions,
    check_strict,
    embed_source,
    nothing_usable,
    say_compared,
    say_left_out,
)
from protoprune.cli.streams import need_stdout
from protoprune.cli.tables import print_table
from protoprune.device import resolve_device
from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import check_suffix, write_file
from protoprune.stores import given, is_url, public, refuse_url
from protoprune.units import duration, many

if TYPE_CHECKING:
    from protoprune.embedding.pipeline import EmbedReport
    from protoprune.encoders import Encoder
    from protoprune.images.listing import ImageList
    from protoprune.sources import ShardOptions
    from protoprune.sources.finding import Source


def embed(
    images: Annotated[
        str,
        typer.Argument(
            help="Image folder, a text file of paths, - for paths on stdin; or shards: a tar, zip, Parquet or Arrow "
            "file, a pattern in quotes ('shards/{0000..0099}.tar'), a folder of them."
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Feature file to write [default: features.h5; for shards a folder, features]."
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder, see `protoprune encoders`; timm:NAME for others.")
    ] = "dino_vits16",
    weights: Annotated[Path | None, typer.Option(help="Local .pth, .pt or .safetensors for the encoder.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that listed paths are relative to.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, max=8192, help="Input side in pixels [default: the encoder's].")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="token (class token) or avg (mean of the patches) [default: the authors'].")
    ] = None,
    decode: Annotated[
        str, typer.Option(help="exact, or fast: large JPEGs are decoded at half their size or less.")
    ] = "exact",
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Images a batch, or auto.")] = "auto",
    workers: Annotated[str, typer.Option(help="Decoding threads, or auto (one a core).")] = "auto",
    store: Annotated[str, typer.Option(help="Type of the stored features: float16 or float32.")] = "float16",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the encoder: pays on a GPU.")] = False,
    classes: ClassOptions,
    image_column: ImageColumn = None,
    id_column: IdColumn = None,
    processes: WorkerOptions,
    errors: Annotated[
        Path | None, typer.Option(help="Write the images that failed, and what was left out, to this CSV file.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when anything could not be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of other features.")] = False,
    moved: Annotated[
        bool,
        typer.Option("--moved", help="The images were only moved or copied: do not compare their content."),
    ] = False,
) -> None:
    """Turn images into a feature file; run it again for what is new."""

    inputs = [images, weights, classes.labels, classes.class_names]
    check_outputs(errors, inputs=inputs)
    check_suffix(errors, (".csv",), "--errors")
    target = given(out or "features")
    settings: dict[str, Any] = {
        "device": device, "precision": precision, "batch_size": _number("--batch-size", batch_size),
        "workers": _number("--workers", workers), "store": store, "compile": compile, "overwrite": overwrite,
        "moved": moved,
    }  # fmt: skip
    _check(encoder, weights, image_size, pool, decode, settings)
    if processes.engine == "local":
        _check_device(device, images)
    source, entries = _find(images, root)
    single = _is_single(source, out)
    if source is None or single:
        from protoprune.images.listing import is_feature_set

        refuse_url(target, "-o ")
        file = out or Path("features.h5")
        if is_feature_set(file):
            raise UsageError(f"-o {file}: a feature set, which is made of shards, and {images} holds none")
        check_outputs(errors, hdf5=file, inputs=inputs)
        _refuse_shard_options(**vars(processes) | {"engine": None if processes.engine == "local" else processes.engine})
    if source is None:
        _refuse_shard_options(image_column=image_column, id_column=id_column)
        listed = functools.partial(_listed, images, entries, root, classes.arguments())
    else:
        options = classes.of_shards(image_column, id_column)
        options.check(shard.name for shard in source.shards)  # before the encoder is loaded
        listed = functools.partial(_opened, source, options)
        if not single:
            from protoprune.features.featureset import check_folder

            check_folder(target)
            settings |= processes.arguments(device)
    from protoprune.encoders import load_encoder

    model = load_encoder(encoder, weights=weights, image_size=image_size, pool=pool, decode=decode)
    if model.loaded:
        say(f"weights: {model.loaded}")
    if source is None or single:
        with listed() as found:
            _say_found(found, errors)
            _embed_images(found, model, file, errors, strict, settings)
    else:
        with resumable("what is embedded is kept"):
            embed_source(source, model, target, errors, strict, options, settings)


def _is_single(source: Source | None, out: Path | None) -> bool:
    """Whether the only shard becomes a feature file, and not a set."""
    return source is not None and len(source) == 1 and out is not None and out.suffix in (".h5", ".hdf5")


def _embed_images(
    found: ImageList, model: Encoder, out: Path, errors: Path | None, strict: bool, settings: dict[str, Any]
) -> None:
    """Embed a list of images into one file, with progress, and say what became of it."""
    from protoprune.embedding.pipeline import embed as run

    started = time.monotonic()
    state = {"done": 0, "left": 0, "total": 0}

    def so_far() -> str:
        if not state["total"]:
            return "nothing is embedded yet"
        done = state["total"] - state["left"] + state["done"]
        return f"{done:,} of {state['total']:,} images are embedded"

    with resumable(so_far), Progress("embed") as progress:

        def on_start(total: int, left: int) -> None:
            state.update(total=total, left=left)
            if left < total:
                say(f"{total - left:,} of {total:,} images are done already, {left:,} to go")
            progress.start(left)

        def on_compare(count: int) -> None:
            say(
                f"comparing {many(count, 'image')} with what was embedded: they lie below another root, or were "
                "copied, restored or touched (--moved goes by name, size and time alone)"
            )

        def on_progress(done: int, failed: int) -> None:
            state["done"] = done
            progress.update(done, failed)

        report = run(found, model, out, on_compare=on_compare, on_start=on_start, on_progress=on_progress, **settings)
    _say_report(report, model, time.monotonic() - started)
    _finish(report, found, errors, strict)


def _check(
    encoder: str, weights: Path | None, image_size: int | None, pool: str | None, decode: str, settings: dict[str, Any]
) -> None:
    """UsageError for options that nothing will take, before anything is listed: a bucket or a large tree takes long."""
    from protoprune.embedding.engine import check_options
    from protoprune.encoders.loading import check_encoder

    check_options(*(settings[name] for name in ("precision", "batch_size", "workers", "store")))
    check_encoder(encoder, weights, image_size, pool, decode)


def _check_device(device: str, images: str) -> None:
    """UsageError for a device that is not there, where there are images that it would be asked for."""
    if device not in ("auto", "cpu") and (os.path.exists(images) or is_url(images)):
        resolve_device(device)


def _number(option: str, text: str) -> int | None:
    from protoprune.embedding.engine import MOST

    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 18 or not 1 <= int(text) <= MOST[option]:
        raise UsageError(f"{option} {text}: expected auto or a number from 1 to {MOST[option]}")
    return int(text)


def _refuse_shard_options(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} goes with shards (tar, zip, Parquet or Arrow files) that become a feature set")


def _find(images: str, root: Path | None) -> tuple[Source | None, list[str] | None]:
    """(source of shards or None, entries of a list or None)."""
    from protoprune.formats import archive_kind
    from protoprune.images.listing import image_suffixes
    from protoprune.lists import read_paths
    from protoprune.sources import list_shards, shards_of
    from protoprune.sources.finding import looks_like_shards

    if images != "-":
        source = shards_of(images)
        if source is not None or os.path.isdir(images):
            if root is not None:
                raise UsageError("--root goes with a list of paths; a folder or a pattern has its own")
            return source, None
        if not os.path.exists(images):
            raise UsageError(f"{images}: no such folder or list; give an image folder, a text file of paths, or -")
        named = os.path.splitext(images)[1].lower() in image_suffixes()
        if named or (os.path.isfile(images) and _begins_like(images, archive_kind) == "an image"):
            raise UsageError(f"{images}: a single image; give its folder, or a text file of paths")
    entries = read_paths(images)
    if looks_like_shards(entries):
        return list_shards(entries, root), None
    if (url := next((one for one in entries if is_url(one)), None)) is not None:
        raise UsageError(
            f"{images}: lists {public(url)}, and single images are not fetched by URL; download them (img2dataset), or "
            "list URLs of shards only"
        )
    return None, entries


def _listed(
    images: str, entries: list[str] | None, root: Path | None, classes: dict[str, Any]
) -> contextlib.AbstractContextManager[ImageList]:
    from protoprune.images.listing import list_folder, list_paths

    if entries is not None:
        return contextlib.nullcontext(list_paths(entries, root, **classes))
    on_progress = _say_listing if sys.stderr and sys.stderr.isatty() else None
    return contextlib.nullcontext(list_folder(images, **classes, on_progress=on_progress))


def _opened(source: Source, options: ShardOptions) -> contextlib.AbstractContextManager[ImageList]:
    """The images of the only shard, which become one file."""
    from protoprune.shards.sharding import opened

    return opened(source.shards[0], source.root, options)


def _begins_like(path: str, kind: Callable[[bytes], str | None]) -> str | None:
    try:
        with open(path, "rb") as file:
            return kind(file.read(512))
    except OSError as error:
        raise ProtopruneError(f"{path}: cannot read ({error.strerror})") from None


def _say_listing(count: int) -> None:
    print(f"listing: {count:,} images", end="\r", file=sys.stderr, flush=True)


def _say_found(found: ImageList, errors: Path | None) -> None:
    from protoprune import formats
    from protoprune.sources.finding import SUFFIXES

    classes = f" in {many(len(found.classes), 'class', 'classes')} ({found.labels_from})" if found.classes else ""
    say(f"{many(len(found), 'image')}{classes} under {found.root}")
    if found.skipped:
        some = f"; {len(found.left_out):,} of them belong to no image" if found.why else ""
        listed = some + ("" if errors or not found.left_out else " (list them with --errors FILE)")
        say_left_out(found.skipped, listed)
        shards = [path for path in found.left_out if path.lower().endswith(SUFFIXES)] if found.why is None else []
        if shards:
            some = many(len(shards), "of them is a shard", "of them are shards")
            pattern = f"{found.root}/*{os.path.splitext(shards[0])[1]}"
            say(
                f"warning: {some} ({shards[0]}), whose images are not embedded: a folder with images in it is one of "
                f"images. Shards are given by a pattern in quotes, such as '{pattern}'"
            )
        if formats.advice(found.skipped):
            say(formats.advice(found.skipped))
    if found.duplicates:
        say(f"{many(found.duplicates, 'entry', 'entries')} of the list named an image a second time")
    for folder, reason in found.unreadable_folders[:5]:
        say(f"warning: folder {folder}: {reason}; the images in it are missing")
    if len(found.unreadable_folders) > 5:
        say(f"warning: {len(found.unreadable_folders) - 5:,} more folders could not be read")


def _say_report(report: EmbedReport, model: Encoder, seconds: float) -> None:
    if report.moved_from:
        say(f"the images were below {report.moved_from} when they were embedded")
    say_compared(report)
    if report.transparent:
        some = many(report.transparent, "image has transparent parts; it is", "images have transparent parts; they are")
        say(f"{some} shown on white")
    if report.dropped:
        gone = many(
            report.dropped, "image of the earlier file is gone and was", "images of the earlier file are gone and were"
        )
        say(f"{gone} dropped")
    if not report.embedded:
        say(f"{report.out}: up to date, {many(report.n, 'image')} x {model.dim} ({model.name})")
        return
    embedded = report.embedded - report.failed_now
    rate = embedded / max(seconds, 1e-9)
    say(
        f"{report.out}: {many(report.n, 'image')} x {model.dim} ({model.name}, {report.precision}, {report.device}); "
        f"{embedded:,} embedded in {duration(seconds)} ({rate:,.0f} img/s), {report.unchanged:,} unchanged"
    )


def _finish(report: EmbedReport, found: ImageList, errors: Path | None, strict: bool) -> None:
    """Say what failed, write the list of it, and decide the exit code."""
    from protoprune.features.featurefile import NO_IMAGE, FeatureFile
    from protoprune.images.decode import Status
    from protoprune.images.listing import describe_counts, why_left_out
    from protoprune.lists import packed, table_chunks

    if report.failed:
        where = f"listed in {errors}" if errors else "list them with --errors FILE"
        say(f"{many(report.failed, 'image')} could not be used: {describe_counts(report.failures, 10)} ({where})")
    if errors:
        with FeatureFile(report.out) as file:
            rows = [(path, status.label, reason) for path, status, reason in file.failures()]
        rows += [(folder + "/", "unreadable folder", reason) for folder, reason in found.unreadable_folders]
        rows += [(path, NO_IMAGE, reason) for path, reason in why_left_out(found)]
        write_file(errors, packed(errors, table_chunks(["path", "status", "reason"], rows)))
    if report.failed == report.n:
        why = ""
        if set(report.failures) == {Status.MISSING.label}:
            why = f"there is no such file below {found.root}; give --root, the folder that the paths are relative to"
        raise nothing_usable(report.n, errors, why)
    check_strict(strict, bool(report.failed or found.unreadable_folders))


def encoders() -> None:
    """List the encoders that have short names."""
    from protoprune.encoders import CATALOGUE

    need_stdout()
    rows = []
    for info in CATALOGUE.values():
        size, count = f"{info.input_size} px", f"{info.parameters:g} M"
        rows.append((info.name, str(info.dim), count, size, info.pool, info.training, info.licence, info.source))
    heads = ("name", "dim", "parameters", "input", "pool", "training", "licence", "source")
    print_table(heads, rows, fold=True)
    say("timm:NAME loads any other timm model with its published weights.")
