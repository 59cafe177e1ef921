"""What was found, in one sentence, tables and a figure. What this module does not know: the screen."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune.evaluation.report import environment
from protoprune.evaluation.statistics import Difference, Interval
from protoprune.files import table_csv, write_file
from protoprune.tuning import judging
from protoprune.tuning.judging import Judgement
from protoprune.tuning.recipes import REFERENCES
from protoprune.tuning.running import Tuned
from protoprune.tuning.unlabelled import Unlabelled
from protoprune.units import rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sentence(result: Tuned) -> str:
    """The answer: never more than the interval supports."""
    one = result.judgement
    if one is None:
        first = min((curve[0] for curve in (result.curve, result.random_curve)), key=lambda one: one.cost.ends[1])
        return (
            f"keep everything: at {first.keep:.0%} kept already the cost may be {_points(first.cost.ends[1])} points "
            f"({first.candidate.name}: {_span(first.cost)}), above the tolerance of {_points(result.tolerance or 0.0)}"
        )
    if result.tolerance is not None:
        return _left_out(result, one)
    head = f"keep {100 * result.keep:.6g}%"  # of many images one may keep 0.4 %
    if one.better:
        return f"{head}: {result.best.name}; {_over_random(one)}, {_below(one.to_everything)}"
    why = "worse than" if one.worse else "not shown to be better than"
    best = f"the best recipe, {result.best.name}, is {why} it: {_over_random(one)}"
    if one.even_better:
        gain = f"{_signed(one.balanced_to_random)} points over random ({_span(one.balanced_to_random)})"
        below = _below(one.balanced_to_everything)
        return f"{head}: nothing beats random by class here, which is {gain}, {below}; such a list is written ({best})"
    below = _below(one.random_to_everything)
    return f"{head}: nothing beats random here, which is {below}; a random list is written ({best})"


def _left_out(result: Tuned, one: Judgement) -> str:
    """The answer of --keep auto: the cost, which the fraction was chosen by, and what a random list would do."""
    gap, tolerance = one.to_everything, result.tolerance or 0.0
    low, high = gap.ends
    cost = f"{_below(gap)} ({_points(-high)} to {_points(-low)} below)"
    if -gap.mean > tolerance:
        cost += f", more than the {_points(tolerance)} asked for: the images that judge find it harder"
    text = f"you can leave out {1 - result.keep:.0%}: {result.best.name}; {cost}"
    if result.best in REFERENCES:
        return f"{text}; no recipe tried allows a smaller list"
    text += f"; {_over_random(one)}"
    plain = next((point.keep for point in result.random_curve[::-1] if point.cost.ends[1] < tolerance), 1.0)
    return f"{text}; with random lists you could leave out {1 - plain:.0%}"


def _over_random(one: Judgement) -> str:
    return (
        f"{_signed(one.to_random)} points over random ({_span(one.to_random)}), {_signed(one.to_balanced)} over random "
        f"by class ({_span(one.to_balanced)})"
    )


def _below(gap: Interval) -> str:
    return f"{_points(abs(gap.mean))} {'below' if gap.mean <= 0 else 'above'} everything"


def rows(result: Tuned) -> list[dict[str, Any]]:
    """One row a candidate, the best first; differences are to random on the same splits."""
    reference = next(one for one in result.standings if one.number == 0)
    table = []
    for place, one in enumerate(result.standings, 1):
        gap = np.subtract(one.accuracies, reference.accuracies[: len(one.accuracies)])
        told = one.number and len(set(gap.tolist())) > 1  # two equal differences are no certainty
        interval = judging.resampled(gap) if told else Interval(float(gap.mean()), None, None, len(gap))
        candidate = result.candidates[one.number]
        table.append({
            "place": place, "recipe": candidate.name, "rounds": one.rounds, "splits": len(one.accuracies),
            "accuracy": one.mean, "to_random": interval.mean, "low": interval.low, "high": interval.high,
            "order": candidate.order, "by": candidate.by, "balance": candidate.balance,
            "drop_hardest": candidate.drop_hardest, "k": candidate.k, "scores": candidate.scores,
        })  # fmt: skip
    return table


def save(folder: str | os.PathLike[str], result: Tuned, command: str, config: dict[str, Any]) -> list[str]:
    """Write table.csv, results.json, figure.png and, for --keep auto, curve.csv; returns their paths."""
    folder = Path(folder)
    if not result.curve:  # one of an earlier --keep auto would seem to be this answer's
        (folder / "curve.csv").unlink(missing_ok=True)
    files = {"table.csv": table_csv(rows(result))}
    if result.curve:
        files["curve.csv"] = table_csv([
            {"keep": one.keep, "recipe": one.candidate.name, "accuracy": one.accuracy, "cost": one.cost.mean,
             "low": one.cost.low, "high": one.cost.high, "splits": one.cost.n}
            for one in [*result.curve, *result.random_curve]
        ])  # fmt: skip
    content = {
        "answer": sentence(result), "command": command, "keep": result.keep, "best": result.best.name,
        "winner": result.winner.name, "judgement": result.judgement and dataclasses.asdict(result.judgement),
        "networks": result.network_accuracy, "settings": config, "environment": environment(config["device"]),
    }  # fmt: skip
    files["results.json"] = (json.dumps(content, indent=1) + "\n").encode()
    buffer = io.BytesIO()
    figure(result).savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    files["figure.png"] = buffer.getvalue()
    for name, data in files.items():
        write_file(folder / name, data)
    return [os.fspath(folder / name) for name in files]


def save_unlabelled(folder: str | os.PathLike[str], result: Unlabelled) -> list[str]:
    """Write table.csv; returns its path."""
    path = os.path.join(folder, "table.csv")
    table = [{"recipe": one.name, "farness": one.farness, "farthest": one.farthest, "duplicates": one.duplicates,
              "stability": one.stability} for one in result.rows]  # fmt: skip
    write_file(path, table_csv(table))
    return [path]


def figure(result: Tuned) -> Figure:
    """Recipes less random on the splits; the judged one; and for --keep auto the cost against the fraction."""
    from matplotlib.figure import Figure

    table = [row for row in rows(result) if row["splits"] > 1 or row["place"] <= 10][:20][::-1]
    made = Figure(figsize=(11 if result.curve else 7, 1.2 + 0.28 * (len(table) + 2)), layout="constrained")
    panels = made.subplots(1, 2 if result.curve else 1, squeeze=False)[0]
    _draw_recipes(panels[0], table, result)
    if result.curve:
        _draw_curves(panels[1], result)
    return made


def _draw_recipes(axes: Axes, table: list[dict[str, Any]], result: Tuned) -> None:
    references = [one.name for one in REFERENCES]
    for y, row in enumerate(table):
        half = 0 if row["low"] is None else 100 * (row["to_random"] - row["low"])
        colour = "grey" if row["recipe"] in references else "C0"
        axes.errorbar(100 * row["to_random"], y, xerr=half, fmt="o", color=colour, capsize=2)
    labels = [f"{row['recipe']} ({row['splits']} splits)" for row in table]
    if result.judgement is not None:
        one = result.judgement.to_random
        half = 100 * (one.difference - one.ends[0])
        axes.errorbar(100 * one.difference, len(table), xerr=half, fmt="D", color="C3", capsize=3)
        labels.append(f"{result.best.name}: judged")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_xlabel("accuracy less random, points")


def _draw_curves(axes: Axes, result: Tuned) -> None:
    for name, curve in (("best recipe", result.curve), ("random", result.random_curve)):
        kept, costs = [100 * one.keep for one in curve], [100 * one.cost.mean for one in curve]
        half = [100 * (one.cost.mean - one.cost.ends[0]) for one in curve]
        axes.errorbar(kept, costs, half, fmt="o-", capsize=2, label=name)
    axes.axhline(100 * (result.tolerance or 0.0), color="C3", ls="--", label="tolerance")
    axes.set(xlabel="kept, %", ylabel="cost against everything, points")
    axes.legend()


def _points(value: float) -> str:
    return rounded(100 * value)


def _signed(one: Difference) -> str:
    return f"{'+' if one.difference >= 0 else ''}{_points(one.difference)}"


def _span(one: Difference | Interval) -> str:
    low, high = one.ends
    return f"{_points(low)} to {_points(high)}"
