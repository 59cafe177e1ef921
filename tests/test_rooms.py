"""No room of the package imports, by way of others, itself: imports for types and inside functions count."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import protoprune

PACKAGE = Path(protoprune.__file__).parent
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__", "__pycache__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "protoprune":
            below = (node.module or "").split(".")[1:2]
            found |= set(below or [one.name for one in node.names])
    return found & ROOMS


def test_rooms_import_each_other_in_one_direction():
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        rooms.setdefault(room_of(path), set()).update(imported(path) - {room_of(path)})
    order = list(TopologicalSorter(rooms).static_order())  # CycleError names the rooms
    assert order.index("errors") < order.index("features") < order.index("pruning") < order.index("cli")
