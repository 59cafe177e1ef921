"""What every command asks before it works: can the results be written, and over nothing that is needed or better?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from protoprune.cli.progress import say
from protoprune.errors import UsageError
from protoprune.files import check_suffix, holds, same_file, target
from protoprune.stores import refuse_url
from protoprune.text import parse_json

SET_FILE = "set.json"  # as in `images`, whose numpy costs a tenth of a second
_RESULTS = (  # of evaluate, scaling and tune
    "results.csv", "summary.csv", "classes.csv", "points.csv", "fits.csv", "results.json", "figure.png", "kept.txt",
    "kept.jsonl", "table.csv", "curve.csv", "runs.jsonl",
)  # fmt: skip


def check_outputs(
    *outputs: str | Path | None,
    inputs: Iterable[str | Path | None] = (),
    hdf5: Path | None = None,
    links: Path | None = None,
    stdout: str | Path | None = None,
) -> None:
    """Raise UsageError for an output that cannot be made, is an input or another output, or holds something better.

    None is an option not given. `stdout` is an output for which - is stdout, which may be redirected to a file; `hdf5`
    one with a lock and a partial file beside it, whose maker knows what it replaces; `links` a folder of links that is
    made too.
    Files are compared as files: through links, by another name, and by names that differ in case only.
    """
    if any(str(one) == "-" for one in (*outputs, hdf5, links)):
        raise UsageError("-: this goes into a file, not to stdout; name one")
    given = [Path(one) for one in (hdf5, stdout, *outputs) if one is not None and str(one) != "-"]
    sources = [Path(one) for one in inputs if one is not None and os.path.exists(one)]
    written = [] if hdf5 is None else _beside_hdf5(hdf5, sources)
    for path in given:
        _check_place(path)
        if path.exists() and not path.is_file():
            continue  # a pipe or a device: nothing is replaced
        _check_replaced(path, sources, written, links)
        if path != hdf5:
            _check_kind(path)
        written.append(path)
    check_suffix(hdf5, (".h5", ".hdf5"))


def _check_replaced(path: Path, sources: list[Path], written: list[Path], links: Path | None) -> None:
    """UsageError where a file that is written would take the place of an input, or of another output."""
    if any(_lies_in_set(path, one) for one in sources):
        raise UsageError(f"{path}: lies in a feature set, which holds nothing else; choose another place")
    if any(same_file(path, one) for one in sources):
        raise UsageError(f"{path}: is one of the inputs; choose another name")
    if any(same_file(path, one) for one in filter(None, (*written, links))) or _is_stdout(path):
        raise UsageError(f"{path}: is named for two outputs; choose another name")
    if links is not None and path.resolve().is_relative_to(links.resolve()):
        raise UsageError(f"{path}: lies in the folder that --links makes; choose another place")


def _beside_hdf5(path: Path, sources: list[Path]) -> list[Path]:
    """What is written beside an HDF5 file until it is finished."""
    written = [Path(f"{target(os.fspath(path))}{suffix}") for suffix in (".partial", ".partial.new", ".lock")]
    if any(same_file(one, source) for one in written for source in sources):
        raise UsageError(f"{path}: its partial file or lock is one of the inputs; choose another name")
    return written


def _check_kind(path: Path) -> None:
    """UsageError where what is there took hours to make or cannot be made again; a picture may be drawn again."""
    what = holds(path)
    if what and not (what == "an image" and path.suffix.lower() == ".png"):
        raise UsageError(f"{path}: is {what}; choose another name, or delete it first")


def check_picture(path: Path | None, root: str | Path, paths: Sequence[str]) -> None:
    """Raise UsageError for a picture that would become one of the images; say when it lies somewhere below their root.

    `paths` are those of the images below `root`.
    """
    if path is None or not below(path, root):
        return
    if path.is_file() and os.path.relpath(os.path.realpath(path), os.path.realpath(root)) in set(paths):
        raise UsageError(f"{path}: is one of the images; choose another name")
    check_beside(path, root, paths)
    say(f"warning: {path} lies in the folder of the images, where `protoprune embed` will find it; write it elsewhere")


def check_beside(path: Path | None, root: str | Path, paths: Sequence[str], what: str = "") -> None:
    """Raise UsageError for an output in a folder that holds images, which `embed` and training find there."""
    if path is None or not below(path, root):
        return
    folder = os.path.dirname(os.path.relpath(os.path.realpath(path), os.path.realpath(root)))
    beside = next((one for one in paths if os.path.dirname(one) == folder), None)
    if beside is not None and os.path.isfile(os.path.join(root, beside)):
        raise UsageError(
            f"{what or path}: lies among the images (beside {os.path.basename(beside)}), where `protoprune embed` and "
            "training would find it; write it elsewhere"
        )


def below(path: Path, root: str | Path) -> bool:
    """Whether a path lies in a folder, through links; False where the folder is not known ('')."""
    return bool(root) and os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))


def check_results(out: Path | None, root: str, paths: Sequence[str]) -> None:
    """Raise UsageError for a folder of results that is the images' own, or holds some of them."""
    if out is None or not root:
        return
    if os.path.realpath(out) == os.path.realpath(root):
        raise UsageError(f"-o {out}: is the folder of the images, one of which its figure would become; choose another")
    check_beside(out / "figure.png", root, paths, f"-o {out}")


def check_folder(out: Path | None, command: str, inputs: Iterable[Path | None]) -> None:
    """As `check_outputs`, for the folder of results of `evaluate`, `scaling` or `tune`, which need not exist.

    Results that are there are replaced if they are those of the same command, and of nobody else.
    """
    if out is None:
        return
    refuse_url(out, "-o ")
    sources = [one for one in inputs if one is not None and one.exists()]
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out}: a file; name a folder, for the tables and the results of single runs")
    for one in filter(Path.is_dir, sources):
        if out.resolve().is_relative_to(one.resolve()):
            raise UsageError(f"-o {out}: lies in {one}, a folder of images, whose figure it would become one of")
    if out.is_dir():
        check_outputs(*(out / name for name in _RESULTS), inputs=sources)
        _check_maker(out, command)
    else:
        above = next(one for one in out.absolute().parents if one.exists())  # now, and not when images are loaded
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UsageError(
                f"-o {out}: cannot be made, {above} is no folder that can be written; choose another place"
            )


def _check_maker(out: Path, command: str) -> None:
    """UsageError for results that are there and of another command, or of nobody that is known."""
    there = next((name for name in _RESULTS if (out / name).exists()), None)
    if there is not None and (whose := _maker(out, command)) != command:
        of = f"what `protoprune {whose}` found" if whose else f"a {there} that `protoprune {command}` did not write"
        raise UsageError(f"-o {out}: holds {of}; choose another folder")


def _maker(out: Path, command: str) -> str | None:
    """The command whose results a folder holds, None where nothing says so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = parse_json((out / "results.json").read_bytes())
        if isinstance(found, dict) and "environment" in found:
            return "tune" if "answer" in found else found.get("config", {}).get("command")
        return None
    if (out / "runs").is_dir():  # stopped before its results were written
        return command if command != "tune" else "evaluate"
    with contextlib.suppress(OSError):
        if (out / "runs.jsonl").exists() or (out / "table.csv").read_bytes().startswith(b"recipe,farness,"):
            return "tune"
    return None


def _lies_in_set(path: Path, source: str | Path) -> bool:
    return os.path.isfile(os.path.join(source, SET_FILE)) and path.resolve().is_relative_to(Path(source).resolve())


def _check_place(path: Path) -> None:
    refuse_url(path)
    if path.is_dir():
        raise UsageError(f"{path}: a folder; name a file")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise UsageError(f"{path}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK) and not (path.exists() and not path.is_file()):
        raise UsageError(f"{path}: its folder cannot be written; choose another place")


def _is_stdout(path: Path) -> bool:
    """Whether stdout is redirected to this file, which would end up with one of the two."""
    try:
        return path.exists() and os.path.samestat(os.fstat(1), os.stat(path))
    except OSError:
        return False
