"""`protoprune reshard`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from protoprune.cli.progress import Progress, resumable, say
from protoprune.errors import ProtopruneError
from protoprune.units import bytes_text, many

_FEW = 8  # tars, below which four workers on two GPUs have none for each


def reshard(
    kept: Annotated[
        Path, typer.Argument(metavar="LIST", help="Kept list that `protoprune select` wrote, - for stdin.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the tars; a second call resumes.")],
    root: Annotated[
        str | None, typer.Option(help="Folder (or URL) of the images or shards [default: that of --features].")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Feature file or set of the list, which knows where the images are.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images a tar.")] = 10_000,
    image_column: Annotated[str | None, typer.Option(help="Of Parquet and Arrow: column of the images.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the ids, in tars and zips key of the .json.")] = None,
) -> None:
    """Write new tars of the images that a list keeps.

    What lies beside an image in its tar (labels, captions) comes with it. Inputs are only read.
    """
    from protoprune.shards.resharding import reshard as write
    from protoprune.sources import ShardOptions

    options = ShardOptions(image_column, None, id_column) if image_column or id_column else None
    with resumable(f"the tars that are whole are kept in {out}"), Progress("reshard") as bar:

        def on_progress(done: int, total: int) -> None:
            if not bar.started:
                bar.start(total)
            bar.update(done)

        report = write(
            kept, out, root=root, features=features, shard_size=shard_size, options=options, on_progress=on_progress
        )
    there = f" ({report.there:,} were there already)" if report.there else ""
    say(f"{out}: {many(report.images, 'image')} in {many(report.shards, 'tar')}{there}, {bytes_text(report.bytes)}")
    if report.shards < _FEW <= report.images:
        size = math.ceil(report.images / _FEW)
        say(
            f"hint: a loader deals out whole tars: {many(report.shards, 'tar keeps', 'tars keep')} "
            f"{many(report.shards, 'worker')} busy, of all processes together; --shard-size {size} makes about "
            f"{_FEW} tars"
        )
    if report.others:
        say(f"{many(report.others, 'other file')} went with them (.txt, .json, …)")
    elif not report.there:
        say(
            "nothing else went with them, so a loader that asks for .cls or .txt has no sample; a class that is a "
            "folder stands in the key: sample['__key__'].split('/')[0]"
        )
    if len(report.fields) > 1:
        from protoprune.images.listing import describe_counts

        say(
            f"images are in the fields {describe_counts(report.fields, 10)} of their samples: name all of them in your "
            f"loader ('{';'.join(sorted(report.fields)[:4])}'), or it leaves some out"
        )
    _warn(kept, out, root)


def _warn(kept: Path, out: Path, root: str | None) -> None:
    from protoprune.lists import read_weights

    try:
        read_weights(kept)
        say(f"note: the weights of {kept} are not in the tars; protoprune.read_weights gives them by path")
    except ProtopruneError:
        pass
    if root and "://" not in root and os.path.realpath(out).startswith(os.path.join(os.path.realpath(root), "")):
        say(f"warning: {out} lies in the folder of the images, where `protoprune embed` will find them twice")
