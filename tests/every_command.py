"""All commands of the program, each with arguments that work on one small data set: for tests about any command.

`LINES` must name every command, which `tests/test_streams.py` checks by walking the Typer app.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import typer
from helpers import write_image
from typer.testing import CliRunner

from protoprune.cli import app

CLASSES, EACH, D = ("ant", "bee", "cow"), 8, 6

# Inputs lie in the folder that `make` filled; outputs go into it too.
LINES = {
    "embed": "images -o new.h5 --encoder mini",
    "select": "f.h5 --keep 0.5 --k 3",
    "record": "f.h5 -o new.h5 --epochs 1",
    "metrics": "",
    "score": "el2n --record r.h5",
    "compare": "a.csv b.csv --bootstrap 0",
    "evaluate": "kept.txt --features f.h5 --test t.h5 --seeds 2 --no-class-counts",
    "scaling": "--features f.h5 --test t.h5 --size 12,24 --keep 1,0.5 --order hard --seeds 1 --bootstrap 0",
    "tune": "--features u.h5 --keep 0.5 -o tuned",
    "info": "f.h5",
    "sheet": "f.h5 -o new.png",
    "report": "f.h5 -o new.html --no-thumbnails",
    "encoders": "",
    "merge": "set -o new.h5",
    "reshard": "kept.txt new.tars --root images",
    "advise": "--images 1000 --classes 10",
    "import": "v.npz -o new.h5",
    "theory error": "--alpha-tot 3 --keep 0.5 --order random",
    "theory curve": "--keep 0.5 --order random --points 2",
    "theory pareto": "--order random --points 2 --min-keep 0.5",
    "theory best-keep": "--alpha-tot 3 --order random --min-keep 0.5",
    "theory crossover": "--keep 0.5 --theta 0",
    "theory information": "--keep 0.5 --points 2",
}


def walk(command=None, name: str = ""):
    """(name, command) of every command of the app, those of groups included."""
    command = command or typer.main.get_command(app)
    if hasattr(command, "commands"):
        for own, inner in command.commands.items():
            yield from walk(inner, f"{name} {own}".strip())
    else:
        yield name, command


def features(seed: int) -> tuple[list[str], np.ndarray]:
    paths = [f"{name}/{i:02d}.png" for name in CLASSES for i in range(EACH)]
    rng = np.random.default_rng(seed)
    means = np.repeat(np.random.default_rng(9).normal(size=(len(CLASSES), D)), EACH, axis=0)
    return paths, means + 0.5 * rng.normal(size=(len(paths), D))


def make(folder: Path, feature_file) -> None:
    """Fill a folder with what LINES reads; `feature_file` is the fixture."""
    paths, own = features(0)
    for seed, path in enumerate(paths):
        write_image(folder / "images" / path, seed=seed, width=16, height=16)
    root = folder / "images"
    feature_file(folder / "f.h5", own, paths=paths, root=root)
    feature_file(folder / "u.h5", own, root=root)  # without classes
    feature_file(folder / "t.h5", features(1)[1], paths=paths, root=root)
    np.savez(folder / "v.npz", features=own, paths=np.array(paths))
    (folder / "kept.txt").write_text("".join(f"{path}\n" for path in paths[::2]))
    for name, column in (("a", 0), ("b", 1)):
        lines = (f"{path},{value}\n" for path, value in zip(paths, own[:, column].tolist(), strict=True))
        (folder / f"{name}.csv").write_text("path,score\n" + "".join(lines))
    with contextlib.chdir(folder):
        run("record f.h5 -o r.h5 --epochs 1")
        import tarfile

        with tarfile.open("shard.tar", "w") as tar:
            for path in paths[:3]:
                tar.addfile(_named(path.replace("/", "_"), (root / path).stat().st_size), open(root / path, "rb"))  # noqa: SIM115
        run("embed shard.tar -o set --encoder mini")


def _named(name: str, size: int):
    import tarfile

    info = tarfile.TarInfo(name)
    info.size = size
    return info


def run(line: str):
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    return result


def main_with(line: str, stdout=None, stderr=None) -> int:
    """The exit code of the program itself, in this process, with these streams of its own."""
    import sys

    from protoprune.cli import main

    before = sys.argv, sys.stdout, sys.stderr
    sys.argv = ["protoprune", *line.split()]
    sys.stdout, sys.stderr = stdout, stderr
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    return 0


def text(path: str | os.PathLike = os.devnull) -> io.TextIOWrapper:
    return open(path, "w", encoding="utf-8", errors="surrogateescape")
