"""Every metric on the same images: how far they agree, and accuracy against the fraction kept by each."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
from claims import FAILS, HOLDS, Claim, decide, interval_text, sides, spanned
from lab import Lab

from protoprune import comparison, selection
from protoprune.evaluation import Kept, evaluate, report
from protoprune.features.featurefile import FeatureFile
from protoprune.files import write_file
from protoprune.metrics.catalogue import METRICS, score
from protoprune.records import Record
from protoprune.scores import write_scores
from protoprune.training import recording
from protoprune.training.loop import Recipe

SUBSETS = ("memorization", "influence_max", "influence_sum_abs", "ddd")  # need models with and without each image
AGREE = ("el2n", "ddd", "memorization")  # above 0.7 with each other (Sorscher et al.)
MARGIN = 0.01  # of accuracy: what counts as no difference
COVERS = ("cover", "facility")  # orders that cover the set, and say nothing of how hard an image is
PAPER = (  # the ten that Sorscher et al. compare
    "influence_max", "influence_sum_abs", "ddd", "memorization", "el2n", "forgetting", "ensemble_active_learning",
    "supervised_prototypes", "self_supervised_prototypes",
)  # fmt: skip


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    train, test = lab.sets()
    records = {kind: make_record(lab, kind, train, test) for kind in ("dynamics", "subsets")}
    scores, rows = all_scores(lab, records, train)
    lab.save_table(rows, "cost")
    compared = comparison.compare(scores, train.paths, keeps=settings["keep"])
    lab.save_table(comparison.pair_rows(compared), "spearman")
    write_file(lab.folder / "spearman.png", comparison.draw(compared))
    lists = [kept(name, values, keep, train.paths) for name, values in scores.items() for keep in settings["keep"]]
    result = evaluate(
        train, test, [one for one in lists if not one.name.startswith("random ")], recipe, seeds=lab.seeds,
        class_counts=False, folder=lab.runs, device=lab.device, on_run=lab.progress,
    )  # fmt: skip
    lab.save_table([report.summary_row(one) for one in result.methods])
    draw(lab, result)
    return [agreement(compared), difference(compared), *pays(result, settings["keep"])]


def make_record(lab: Lab, kind: str, train, test) -> str:
    """results/metrics/<kind>.h5, made or gone on with where it is not finished."""
    given = dict(lab.settings[kind])
    models, fraction = given.pop("models"), given.pop("subset", 1.0)
    recipe = Recipe.for_model(given.pop("model"), **given)
    whole, gradients = fraction == 1, recipe.model == "head" and fraction == 1
    plan = recording.plan(
        train, test, recipe, models=models, subset_fraction=fraction, every=1 if whole else recipe.epochs,
        initial=gradients, gradients=gradients,
    )  # fmt: skip
    out = lab.folder / f"{kind}.h5"
    lab.say(f"{kind}: {models} x {recipe.model}, {recipe.epochs} epochs, {plan.bytes / 2**20:,.0f} MiB")

    progress = lab.now_and_then(lambda done: f"{kind}: {done} of {models * recipe.epochs} epochs")
    recording.record(train, test, recipe, out, plan, gradients=gradients, device=lab.device, on_progress=progress)
    return str(out)


def all_scores(lab: Lab, records: dict[str, str], train) -> tuple[dict[str, np.ndarray], list[dict]]:
    """({metric: (n,) in the order of the training images}, what each cost); score tables go to results/metrics/."""
    found, rows = {}, []
    features = lab.feature_file(lab.settings["data"], "train")
    with Record(records["dynamics"]) as dynamics, Record(records["subsets"]) as subsets, FeatureFile(features) as file:
        at = {path: row for row, path in enumerate(file.paths)}
        order = np.array([at[path] for path in train.paths])
        for name, metric in METRICS.items():
            source = file if metric.needs != "record" else subsets if name in SUBSETS else dynamics
            if any(one not in source.statistics for one in metric.statistics):
                continue  # GraNd of networks is not recorded
            began = time.perf_counter()
            values = score(name, source).values
            seconds = time.perf_counter() - began
            values = values[order] if source is file else values
            found[name] = values.astype(np.float64)
            rows.append({"metric": name, "seconds": round(seconds, 2), "images": len(values)})
            write_scores(lab.folder / f"{name}.csv", train.paths, values.astype(np.float32), metric=name)
    return found, rows


def kept(name: str, values: np.ndarray, keep: float, paths: list[str]) -> Kept:
    """The hardest images by a metric."""
    mask = selection.kept_mask(values, keep, ids=paths, usable=~np.isnan(values))
    return Kept(f"{name} {keep:g}", np.flatnonzero(mask))


def agreement(compared) -> Claim:
    at = {name: number for number, name in enumerate(compared.names)}
    pairs = [(a, b, at[a], at[b]) for a, b in combinations(AGREE, 2)]
    found = "; ".join(
        f"{a} and {b} {compared.spearman[i, j]:.2f} ({compared.low[i, j]:.2f} to {compared.high[i, j]:.2f})"
        for a, b, i, j in pairs
    )
    n = len(compared.paths)
    gaps = [spanned(compared.spearman[i, j], compared.low[i, j], compared.high[i, j], n) for _, _, i, j in pairs]
    return Claim(
        "EL2N, DDD and memorization agree above 0.7 with each other", "Sorscher et al. 2022, section 5",
        f"{found}, n = {n:,}", decide(gaps, margin=0.7),
    )  # fmt: skip


def difference(compared) -> Claim:
    at = {name: number for number, name in enumerate(compared.names)}
    others = [
        (compared.spearman[at[a], at[b]], compared.high[at[a], at[b]], a, b)
        for a, b in combinations([one for one in PAPER if one in at], 2)
        if not (a in AGREE and b in AGREE)
    ]
    low = sum(high < 0.7 for _, high, _, _ in others)
    close = sorted((one for one in others if one[1] >= 0.7), reverse=True)
    shown = ", ".join(f"{a} and {b} {value:.2f}" for value, _, a, b in close[:6]) or "none"
    return Claim(
        "The other metrics differ widely from each other", "Sorscher et al. 2022, section 5",
        f"{low} of {len(others)} other pairs are below 0.7; at or above it: {shown}",
        HOLDS if low > 0.75 * len(others) else FAILS,
    )  # fmt: skip


def pays(result, keeps: list[float]) -> list[Claim]:
    """Which metrics are better or worse than random, at the largest and the smallest fraction."""
    made = []
    for keep, want, margin, text, source in (
        (max(keeps), "better", -MARGIN, "No metric is worse than random when much is kept (margin 1 point)",
         "Sorscher et al. 2022, figure 5"),
        (min(keeps), "worse", 0.0, "Score-based pruning loses to random when little is kept", "Ayed & Hayou 2023"),
    ):  # fmt: skip
        found = {
            one.name.rpartition(" ")[0]: one.to_random
            for one in result.methods if one.kind == "list" and one.name.endswith(f" {keep:g}")
        }  # fmt: skip
        if want == "worse":
            found = {name: one for name, one in found.items() if name not in COVERS}
        by = dict.fromkeys(("better", "worse", "undecided"), "")
        for name, side in zip(found, sides(found.values()), strict=True):
            one = found[name]
            by[side] += f"{', ' if by[side] else ''}{name} {interval_text(one.difference, one.low, one.high)}"
        listed = "; ".join(f"{side}: {names or 'none'}" for side, names in by.items())
        verdict = decide(found.values(), want=want, margin=margin)
        made.append(Claim(f"{text} ({100 * keep:g} %)", source, f"{listed}; {len(result.seeds)} seeds", verdict))
    return made


def draw(lab: Lab, result) -> None:
    with lab.panels(8, 5.5) as (axes,):
        lines: dict[str, list] = {}
        for one in result.methods:
            if one.kind in ("list", "random"):
                name = "random" if one.kind == "random" else one.name.rpartition(" ")[0]
                lines.setdefault(name, []).append((one.fraction, one.accuracy))
        full = result.method("everything").accuracy.mean
        colours = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
        for number, (name, points) in enumerate(sorted(lines.items())):
            points.sort(key=lambda point: point[0])
            x, y = [100 * fraction for fraction, _ in points], [100 * accuracy.mean for _, accuracy in points]
            style = {"color": "black", "linewidth": 2.5} if name == "random" else {
                "color": colours[number % 9], "linestyle": ("-", "--", ":")[number // 9]}  # fmt: skip
            axes.plot([*x, 100], [*y, 100 * full], marker=".", label=name.replace("_", " "), **style)
        axes.set(xlabel="kept, % (hardest first)", ylabel="test accuracy, %")
        axes.legend(fontsize=8, ncols=2)
