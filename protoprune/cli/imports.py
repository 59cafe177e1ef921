"""`protoprune import`: vectors that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protoprune.cli.options import ClassOptions
from protoprune.cli.outputs import check_outputs
from protoprune.cli.progress import say
from protoprune.units import many


def import_(
    vectors: Annotated[Path, typer.Argument(help="Vectors: .npy, .npz, .parquet, samples.json, or a folder of them.")],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Feature file to write.")] = Path("features.h5"),
    paths: Annotated[
        Path | None, typer.Option(help="List of the images in the order of the vectors, where these have no names.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the images, where the names are files in it.")] = None,
    encoder: Annotated[
        str, typer.Option(help="What made the vectors; the same for a training set and its test set.")
    ] = "",
    vector_column: Annotated[
        str | None, typer.Option(help="Column or array of the vectors, if there are several.")
    ] = None,
    path_column: Annotated[str | None, typer.Option(help="Column or array of the names, if there are several.")] = None,
    store: Annotated[str, typer.Option(help="float16, float32, or auto: as the vectors are.")] = "auto",
    classes: ClassOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a feature file.")] = False,
) -> None:
    """Make a feature file of vectors that you have already."""
    from protoprune.embedding.importing import import_features

    check_outputs(hdf5=out, inputs=[vectors, paths, classes.labels, classes.class_names])
    report = import_features(
        vectors, out, paths=paths, root=root, encoder=encoder, vector_column=vector_column, path_column=path_column,
        store=store, **classes.arguments(), overwrite=overwrite,
    )  # fmt: skip
    read = f" from {len(report.files):,} files" if len(report.files) > 1 else ""
    of_classes = f", {many(report.classes, 'class', 'classes')}: {report.classes_from}" if report.classes else ""
    say(f"{out}: {many(report.n, 'vector')} x {report.dim} ({report.store}){read}, names: {report.names}{of_classes}")
    if report.unusable:
        some = many(report.unusable, "vector holds", "vectors hold")
        say(f"{some} NaN or infinity and cannot be used (see `protoprune info {out} --errors`)")
