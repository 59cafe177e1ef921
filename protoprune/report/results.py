"""What `evaluate -o DIR` found, for the page: its table, its verdicts in words, its figure."""

from __future__ import annotations

import base64
import contextlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from protoprune.errors import ProtopruneError
from protoprune.evaluation.statistics import Difference, sentence, span
from protoprune.text import parse_json


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """{'header', 'rows', 'verdicts', 'figure'} of a folder of results; ProtopruneError where there are none."""
    path = os.path.join(folder, "results.json")
    try:
        found = parse_json(Path(path).read_bytes())
        if isinstance(found, dict) and "methods" not in found and "environment" in found:
            raise ProtopruneError(f"{folder}: results of another command; give the folder of `protoprune evaluate -o`")
        methods = found["methods"]
        rows = [_row(one) for one in methods]
        verdicts = [f"{one['name']}: {_verdicts(one)}" for one in methods if one.get("to_random")]
    except FileNotFoundError:
        raise ProtopruneError(f"{folder}: holds no results.json; give the folder of `protoprune evaluate -o`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtopruneError(f"{path}: not results of `evaluate` ({error}); run it again, it keeps its runs") from None
    figure = ""
    with contextlib.suppress(OSError):
        figure = base64.b64encode(Path(folder, "figure.png").read_bytes()).decode()
    header = ["List", "Kept", "Accuracy", "Against random", "Against everything", "Worst class"]
    return {"header": header, "rows": rows, "verdicts": verdicts, "figure": figure}


def _verdicts(one: dict[str, Any]) -> str:
    """Against random, and against random images of the same class counts where there were any."""
    found = [_verdict(one["to_random"], "random")]
    if one.get("to_classes"):
        found.append(_verdict(one["to_classes"], "random images of the same class counts"))
    return "; ".join(found)


def _verdict(comparison: dict[str, Any], against: str) -> str:
    names = {one.name for one in fields(Difference)}
    known = {name: value for name, value in comparison.items() if name in names}
    return sentence(Difference(**known), against=against)


def _row(one: dict[str, Any]) -> list[str]:
    random, full = one.get("to_random"), one.get("to_everything")
    return [
        str(one["name"]),
        f"{one['kept']:,} ({100 * one['fraction']:.3g} %)",
        _cell(one["accuracy"]),
        _cell(random, sign="+") if random else "",
        _cell(full, sign="+") if full else "",
        f"{100 * one['worst_class_accuracy']:.1f} ({one['worst_class']})",
    ]


def _cell(one: dict[str, Any], sign: str = "") -> str:
    """A mean or a difference with its interval."""
    return span(one["mean" if "mean" in one else "difference"], one.get("low"), one.get("high"), sign=sign)
