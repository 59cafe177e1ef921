"""Facts and pictures -> one HTML file that opens from a disk. No request leaves it, and no name in it is markup.

Numbers travel as deflated, base64-coded arrays in blocks of data, which a browser does not run; the page's one script
and one style are allowed by their digests, everything else is forbidden (Content-Security-Policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune import __version__, stores
from protoprune.arguments import checked
from protoprune.errors import UsageError
from protoprune.paths import encoded
from protoprune.pruning import Selected
from protoprune.report import maps, thumbnails
from protoprune.report.facts import Facts, Options, gather, shown
from protoprune.report.stops import NEVER
from protoprune.selection import check_duplicates
from protoprune.sources.reader import ImageReader
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.report.thumbnails import Sprites

SMALL = 10_000  # images up to which a page is held to the first limit
LIMITS = (5_000_000, 15_000_000)  # bytes
LIST_SHARE = 0.45  # of the limit, that the list of all images may take; without it the page cannot save lists
_TYPES = {"uint8": "u1", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4"}


@checked
def page(
    chosen: Selected,
    options: Options | None = None,
    *,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """The page of a selection, and what is worth telling: bytes, thumbnails, missing images, whether it saves lists,
    and how the tables compared with were read.

    Raises UsageError for options out of range; reads images only for thumbnails, under `options.root` or the root of
    the feature file.
    """
    options = options or Options()
    check_duplicates(options.duplicates, option="--duplicates")
    maps.check_method(options.map)
    if options.evaluation is not None and not os.path.isdir(options.evaluation):
        raise UsageError(f"--evaluation {options.evaluation}: no such folder; give the one of `evaluate -o`")
    facts = gather(chosen, options)
    limit = LIMITS[facts.n > SMALL]
    blocks = {name: _block(array) for name, array in facts.blocks.items()}
    blocks["names"] = _names(chosen.ranking.paths, facts.sample)
    whole = _whole_list(chosen, facts)
    why = _no_list(chosen, facts, sum(len(text) for _, text in whole.values()), LIST_SHARE * limit)
    saves = why is None
    blocks |= whole if saves else {}
    sprites = thumbnails.Sprites()
    if options.thumbnails:
        sprites = _pictures(chosen, facts, options, limit - sum(len(text) for _, text in blocks.values()), on_image)
    place = np.array([sprites.place.get(int(row), thumbnails.NONE) for row in facts.sample], np.int32)
    blocks["thumb"] = _block(place)
    kind = "jsonl" if _broken(chosen) else "csv" if facts.text["weighted"] else ""
    if facts.data["command"] and kind:  # lines cannot hold the names or the weights, and the command must make the list
        first, last = facts.data["command"]
        facts.data["command"] = [first, last.removesuffix(" > kept.txt") + f" -o kept.{kind}"]
    facts.data |= {"side": thumbnails.SIDE, "across": thumbnails.ACROSS, "saves": saves}
    facts.text |= {"no_list": why, "thumbnails": len(sprites.place) - sprites.missing, "missing": sprites.missing}
    html = _render(facts, blocks, sprites.images)
    told = {"bytes": len(html), "limit": limit, "thumbnails": facts.text["thumbnails"], "missing": sprites.missing}
    return html, told | {"saves": saves, "why": why, "notes": facts.text["notes"]}


def _no_list(chosen: Selected, facts: Facts, size: int, room: float) -> str | None:
    """Why the page cannot save lists; None where it can."""
    if broken := _broken(chosen):
        return f"{many(broken, 'file name holds', 'file names hold')} a line break, which a list of lines cannot hold"
    if size > room:
        return f"the names of {facts.n:,} images would not fit"
    return None


def _broken(chosen: Selected) -> int:
    """How many names a list of lines cannot hold."""
    return sum("\n" in path or path.endswith("\r") for path in chosen.ranking.paths)


def _whole_list(chosen: Selected, facts: Facts) -> dict[str, tuple[str, str]]:
    """What saving a list takes: the stop and the name of every image that can be kept."""
    can = np.flatnonzero(facts.first != NEVER)
    return {"list_first": _block(facts.first[can]), "list_names": _names(chosen.ranking.paths, can)}


def _pictures(
    chosen: Selected, facts: Facts, options: Options, room: int, on_image: Callable[[int, int], None] | None
) -> Sprites:
    """Sprites that fit into `room` bytes of the page, less what the page itself takes."""
    root = stores.given(options.root or chosen.ranking.root)
    paths = chosen.ranking.paths
    budget = int((room - 400_000) * 0.74)  # base64 makes 4 bytes of 3
    root = root if stores.is_url(root) else os.path.abspath(root)
    wanted = facts.thumbs[: max(0, budget // 900)]
    source = chosen.ranking.source
    was = source.content if source is not None else np.zeros(len(paths), np.uint64)
    content = {paths[row]: int(was[row]) for row in wanted if was[row]}
    with ImageReader(root, chosen.ranking.shard_options, content) as read:
        return thumbnails.make(wanted, lambda row: read(paths[row]), budget, on_image)


def _names(paths: Sequence[str], rows: np.ndarray) -> tuple[str, str]:
    """The bytes of the names, each followed by a NUL byte, as a `_block`."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(b"\0".join([*part, b""])) for part in encoded(paths, rows)]
    return "u1", base64.b64encode(b"".join([*parts, packer.flush()])).decode()


def _block(array: np.ndarray) -> tuple[str, str]:
    """(type, deflated and base64-coded bytes), little-endian."""
    kind = _TYPES[array.dtype.name]
    data = np.ascontiguousarray(array).astype(f"<{kind}").tobytes()
    return kind, base64.b64encode(zlib.compress(data, 9)).decode()


def _render(facts: Facts, blocks: dict[str, Any], sprites: list[bytes]) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("protoprune.report", "page"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: shown(value) if type(value) is str else value,
    )  # fmt: skip
    folder = resources.files("protoprune.report") / "page"
    style, script = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js"))
    html = environment.get_template("page.html").render(
        **facts.text, command=facts.data["command"], style=style, script=script, style_digest=_digest(style),
        script_digest=_digest(script), data=_json(facts.data), blocks=blocks,
        sprites=[base64.b64encode(one).decode() for one in sprites], version=__version__,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return html.encode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: dict[str, Any]) -> str:
    """JSON that stands in a script element: no sequence in it can end the element or open a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
