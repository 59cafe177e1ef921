"""Results -> files: CSV tables, one JSON with all that made them, and a figure.

results.csv has one row a run and holds nothing that a second run would change; what a clock measured is in summary.csv
and results.json. What this module does not know: how results come about, and the screen.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import protoprune
from protoprune.evaluation import fits
from protoprune.evaluation.comparing import EVERYTHING, Evaluation, Method
from protoprune.evaluation.curves import ALL, Curve, Point, Scaling
from protoprune.evaluation.runs import CONVERGENCE, device_kind
from protoprune.evaluation.statistics import Difference, Interval
from protoprune.files import make_folder, table_csv, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PACKAGES = ("numpy", "scipy", "torch", "timm", "faiss-cpu", "faiss-gpu")


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions and machine, for the record: plain values only."""
    return {
        "protoprune": protoprune.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": device_kind(device),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the checkout that this package runs from, with + where files were changed; None elsewhere."""
    home = Path(protoprune.__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    try:
        git = ["git", "-C", os.fspath(home)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout else "")


def save_evaluation(
    folder: str | os.PathLike[str], result: Evaluation, config: dict[str, Any], classes: list[str]
) -> list[str]:
    """Write results.csv, summary.csv, classes.csv, results.json and figure.png; returns their paths."""
    runs = [{key: row[key] for key in ("method", "kind", "kept", "seed", "steps", "accuracy")} for row in result.runs]
    for row, whole in zip(runs, result.runs, strict=True):
        row["worst_class_accuracy"] = whole["worst_class_accuracy"]
    by_class = [
        {"method": one.name, "class": name, "accuracy": accuracy}
        for one in result.methods
        for name, accuracy in one.class_accuracy.items()
    ]
    tables = {"results": runs, "summary": [summary_row(one) for one in result.methods], "classes": by_class}
    return _save(folder, tables, result, {**config, "classes": classes}, figure_evaluation(result))


def summary_row(one: Method) -> dict[str, Any]:
    """A method as one flat row; what was not compared is None."""
    random, matched, full = one.to_random, one.to_classes, one.to_everything
    return {
        "method": one.name,
        "kind": one.kind,
        "kept": one.kept,
        "fraction": one.fraction,
        "steps": one.steps,
        "seeds": len(one.accuracies),
        **_span("accuracy", one.accuracy),
        **_span("to_random", random),
        "to_random_seeds_low": random and random.seeds_low,
        "to_random_seeds_high": random and random.seeds_high,
        "p_adjusted": random and random.p_adjusted,
        "verdict": random and random.verdict,
        **_span("to_classes", matched),
        "to_classes_p_adjusted": matched and matched.p_adjusted,
        "to_classes_verdict": matched and matched.verdict,
        **_span("class_counts", one.class_counts),
        **_span("to_everything", full),
        "worst_class": one.worst_class,
        "worst_class_accuracy": one.worst_class_accuracy,
        "seconds": one.seconds,
        "seconds_saved": one.seconds_saved,
        "selection_seconds": one.selection_seconds,
        "net_saved": one.net_saved,
        "seconds_to_target": one.seconds_to_target,
        "reached_target": one.reached_target,
    }


def _span(name: str, one: Interval | Difference | None) -> dict[str, float | None]:
    """Three columns: a mean or a difference, and the ends of its interval."""
    if one is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    middle = one.difference if isinstance(one, Difference) else one.mean
    return {name: middle, f"{name}_low": one.low, f"{name}_high": one.high}


def save_scaling(folder: str | os.PathLike[str], result: Scaling, config: dict[str, Any]) -> list[str]:
    """Write results.csv, points.csv, fits.csv, results.json and figure.png; returns their paths."""
    columns = ("order", "keep", "size", "kept", "seed", "steps", "accuracy", "error")
    tables = {
        "results": [{key: row[key] for key in columns} for row in result.runs],
        "points": [_point_row(one) for one in result.points],
        "fits": fit_rows(result),
    }
    return _save(folder, tables, result, config, figure_scaling(result))


def _point_row(one: Point) -> dict[str, Any]:
    return {
        "order": one.order, "keep": one.keep, "size": one.size, "kept": one.kept, "seeds": one.error.n,
        "error": one.error.mean, "error_low": one.error.low, "error_high": one.error.high, "seconds": one.seconds,
    }  # fmt: skip


def fit_rows(result: Scaling) -> list[dict[str, Any]]:
    """One row a curve and law; a, b, c with their intervals, AICc less the lowest of the curve."""
    rows = []
    for curve in result.curves:
        laws = curve.fits.laws if curve.fits else []
        lowest = min((law.aicc for law in laws if law.aicc is not None), default=None)
        for law in laws:
            row: dict[str, Any] = {"curve": curve.name, "law": law.name}
            for key in ("a", "b", "c"):
                low, high = (law.intervals or {}).get(key, (None, None))
                row |= {key: law.parameters.get(key), f"{key}_low": low, f"{key}_high": high}
            row |= {"delta_aicc": None if law.aicc is None or lowest is None else law.aicc - lowest, "wins": law.wins}
            rows.append(row | {"rms_log": law.rms_log, "best": curve.fits is not None and law.name == curve.fits.best})
    return rows


def _save(
    folder: str | os.PathLike[str],
    tables: dict[str, list[dict[str, Any]]],
    result: Evaluation | Scaling,
    config: dict[str, Any],
    figure: bytes,
) -> list[str]:
    make_folder(folder)
    files = {f"{name}.csv": table_csv(rows) for name, rows in tables.items() if rows}
    whole = {"config": config, "environment": environment(config.get("device", "auto")), **dataclasses.asdict(result)}
    files["results.json"] = json.dumps(whole, indent=1, allow_nan=False, default=os.fspath).encode()
    files["figure.png"] = figure
    paths = [os.path.join(folder, name) for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        write_file(path, data)
    for name in tables:  # one that is empty this time would seem to be this result's
        if not tables[name]:
            Path(folder, f"{name}.csv").unlink(missing_ok=True)
    return paths


# --- figures ---------------------------------------------------------------------------------------------------------


def figure_evaluation(result: Evaluation) -> bytes:
    """PNG: accuracy of each method, every seed a dot, or against the number kept where lists have several sizes."""
    figure, axes = _figure(7, 1.4 + 0.4 * len(result.methods))
    sizes = {one.kept for one in result.methods if one.kind in ("list", "dynamic")}
    if sizes and max(sizes) > 1.1 * min(sizes):
        figure.set_size_inches(7, 5)
        _draw_by_size(axes, result)
    else:
        _draw_dots(axes, result)
    return _png(figure)


def _draw_dots(axes: Axes, result: Evaluation) -> None:
    for place, one in enumerate(result.methods):
        colour = {"random": "0.5", "classes": "0.5", EVERYTHING: "black"}.get(one.kind, f"C{place % 10}")
        axes.plot([100 * v for v in one.accuracies], [place] * len(one.accuracies), ".", color=colour, alpha=0.4)
        low, high = one.accuracy.low, one.accuracy.high
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [place, place], "-", color=colour, linewidth=2)
        axes.plot(100 * one.accuracy.mean, place, "o", color=colour)
    axes.set_yticks(range(len(result.methods)), [_shown(one.name) for one in result.methods])
    axes.invert_yaxis()
    over = f"{len(result.seeds)} seeds{' (of one run: over test images)' if result.budget == CONVERGENCE else ''}"
    axes.set_xlabel(f"test accuracy (%), mean and {100 * result.confidence:g} % interval over {over}")


def _draw_by_size(axes: Axes, result: Evaluation) -> None:
    random = [one for one in result.methods if one.kind == "random"]
    _bars(axes, random, "0.5", "random subsets", "-o")
    for place, one in enumerate(one for one in result.methods if one.kind in ("list", "dynamic")):
        _bars(axes, [one], f"C{place % 10}", _shown(one.name), "s")
    matched = [one for one in result.methods if one.kind == "classes"]
    if matched:
        _bars(axes, matched, "0.6", "random, same class counts", "_")
    for one in result.methods:
        if one.kind == EVERYTHING:
            axes.axhline(100 * one.accuracy.mean, color="black", linewidth=1, linestyle="--", label=EVERYTHING)
    axes.set(xlabel="training images kept", ylabel="test accuracy (%)")
    axes.legend(fontsize="small")


def _bars(axes: Axes, methods: list[Method], colour: str, label: str, style: str) -> None:
    middle = [100 * one.accuracy.mean for one in methods]
    half = 100 * _reach([one.accuracy for one in methods])
    axes.errorbar([one.kept for one in methods], middle, half, fmt=style, color=colour, label=label, capsize=2)


def figure_scaling(result: Scaling) -> bytes:
    """PNG: error against the number kept, a panel an order, with the Pareto envelope and the fits to all data."""
    orders = [one for one in dict.fromkeys(point.order for point in result.points) if one != ALL] or [ALL]
    figure, first = _figure(1.2 + 4 * len(orders), 4.2, panels=len(orders))
    panels = first if len(orders) > 1 else [first]
    wrong = {one.order for one in result.points if one.error.mean > 0}
    scale = "log" if all(wrong & {order, ALL} for order in orders) else "linear"  # which alone can show nothing but 0
    for axes, order in zip(panels, orders, strict=True):
        _draw_panel(axes, result, order)
        axes.set(xscale="log", yscale=scale, xlabel="training images kept", title=order)
        axes.set_xticks(_few(sorted({one.kept for one in result.points})), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel(f"test error, mean of {len(result.seeds)} seeds")
    if scale == "log":
        _even_ticks(panels[0])
    return _png(figure)


def _even_ticks(axes: Axes) -> None:
    """Labels at 1, 2 and 5 of each power of ten, from the lowest mean: error bars on a log axis may reach down to 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = [np.asarray(line.get_ydata(), np.float64) for line in axes.lines if line.get_marker() == "."]
    means = [float(value) for one in drawn for value in one if value > 0]
    if means:
        axes.set_ylim(max(axes.get_ylim()[0], 0.4 * min(means)), min(axes.get_ylim()[1], 1.1))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def _few(sizes: list[int]) -> list[int]:
    """Those that are at least 1.8 times the one before, from the largest down: labels that do not overlap."""
    chosen: list[int] = []
    for size in reversed(sizes):
        if not chosen or chosen[-1] >= 1.8 * size:
            chosen.append(size)
    return chosen


def _draw_panel(axes: Axes, result: Scaling, order: str) -> None:
    curves = [one for one in result.curves if one.order in (order, ALL) and one.keep is not None]
    for number, curve in enumerate(curves):
        _draw_curve(axes, result, curve, f"C{number}")
    for curve in result.curves:
        if curve.order == order and curve.keep is None:
            axes.plot(curve.kept, curve.errors, "--", color="0.4", linewidth=3, alpha=0.5, label="Pareto envelope")


def _draw_curve(axes: Axes, result: Scaling, curve: Curve, colour: str) -> None:
    """The points of a fraction, and of everything the fit too."""
    points = [one for one in result.points if (one.order, one.keep) == (curve.order, curve.keep)]
    everything = curve.order == ALL
    colour, label = ("black", "everything kept") if everything else (colour, f"keep {curve.keep:g}")
    kept, errors = [one.kept for one in points], [one.error.mean for one in points]
    axes.errorbar(kept, errors, _reach([one.error for one in points]), fmt=".-", color=colour, label=label, capsize=2)
    if everything and curve.fits and curve.fits.best:
        law = curve.fits.law(curve.fits.best)
        axes.plot(kept, fits.predict(law.name, law.parameters, kept), ":", color=colour, label=f"fit: {law.name}")


def _reach(intervals: list[Interval]) -> np.ndarray:
    """(2, m) how far each interval reaches below and above its mean, 0 without one."""
    ends = [one.ends for one in intervals]
    return np.array([(one.mean - low, high - one.mean) for one, (low, high) in zip(intervals, ends, strict=True)]).T


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """A figure without pyplot, whose global state is not ours to change."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=panels > 1)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _shown(name: str) -> str:
    """A name as a figure can hold it: `$` starts no formula, bytes that are not UTF-8 are escaped."""
    return name.encode(sys.getfilesystemencoding(), "backslashreplace").decode("utf-8", "replace").replace("$", r"\$")
