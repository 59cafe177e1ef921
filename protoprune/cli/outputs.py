"""What every command asks before it works: can the result be written, and is it not over what it is made from?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from protoprune.errors import UsageError


def check_outputs(*outputs: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """Raise UsageError for a file that cannot be made, or that is one of the inputs; None is an option not given."""
    sources = [one for one in inputs if one is not None and one.exists()]
    for path in outputs:
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{path}: a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: its folder does not exist; make it first")
        if path.exists() and any(path.samefile(one) for one in sources):
            raise UsageError(f"{path}: is one of the inputs; choose another name")
