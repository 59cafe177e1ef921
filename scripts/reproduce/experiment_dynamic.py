"""Dynamic pruning (Raju et al. 2021): static lists against sets that are chosen anew during training, at equal steps.

Every run takes the optimizer steps that the whole set takes in the recipe's epochs, so that only the choice of images
differs. A static list and the probes behind its scores are made anew for each seed: differences are paired by seed,
and no method lives by the luck of one draw.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from claims import Claim, bars, claim, fractions_axis, gap
from lab import Lab, accuracies, drawn, table_of

from protoprune import selection
from protoprune.clustering import prototypes
from protoprune.evaluation.comparing import time_to
from protoprune.evaluation.runs import Run, shared_key, steps_for
from protoprune.training import loop

FULL = "everything"
STATIC = ("static random", "static EL2N", "static prototypes")
DYNAMIC = {
    "random": "dynamic random",
    "egreedy": "epsilon-greedy",
    "ucb": "UCB",
    "infobatch": "InfoBatch",
    "rs2": "RS2",
}
SOURCE = "Raju et al. 2021"
CLAIMED = 0.3  # claims are about this fraction kept or less


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    train, test = lab.some()
    runs = plan(lab, train, test, recipe)
    tally = tally_of(lab, train, test, recipe)

    def fit(*data, **how):
        return fit_and_count(*data, looks=settings["looks"], tally=tally, **how)

    found = lab.outcomes(runs, train, test, recipe, curves=True, fit=fit)
    counts = {key: values for key, values in read_counts(tally).items() if key[1] in settings["keep"]}
    lab.save_table(table(found, settings["target_accuracy"], settings["looks"]))
    lab.save_table(tally_rows(counts), "sometimes")
    draw(lab, accuracies(found))
    draw_counts(lab, counts)
    return claims(accuracies(found), settings["keep"])


def tally_of(lab: Lab, train, test, recipe) -> Path:
    """Where the counts of these very runs lie: those of another set are not theirs, though of as many images."""
    key = json.dumps([shared_key(train, test, recipe, lab.device), lab.settings["every"]], sort_keys=True)
    tally = lab.shared / "counts" / hashlib.sha256(key.encode()).hexdigest()[:16]
    tally.mkdir(parents=True, exist_ok=True)
    return tally


def plan(lab: Lab, train, test, recipe) -> list[Run]:
    """All runs: first the fractions that claims are about, seed by seed, as a run that is stopped early keeps these."""
    settings = lab.settings
    claimed = [keep for keep in sorted(settings["keep"]) if keep <= CLAIMED]
    others = [keep for keep in sorted(settings["keep"]) if keep > CLAIMED]
    vectors = lab.vectors(train)
    scores = [static_scores(lab, train, test, vectors, seed) for seed in range(lab.seeds)]
    steps = steps_for(len(train), recipe)
    runs = [Run(FULL, seed, None, None, steps) for seed in range(lab.seeds)]
    for keeps in (claimed, others):
        for seed in range(lab.seeds):
            for keep in keeps:
                runs += runs_at(lab, train, scores[seed], keep, seed, steps)
    return runs


def static_scores(lab: Lab, train, test, vectors: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """(n,) scores by static method, larger = harder."""
    how = {"epochs": lab.settings["probe_epochs"], "models": lab.settings["probes"]}
    return {
        "static EL2N": lab.el2n(train, test, seed=seed, **how)[0],
        "static prototypes": prototypes.cluster(vectors, len(train.classes), seed=seed).distance,
    }


def runs_at(lab: Lab, train, scores: dict[str, np.ndarray], keep: float, seed: int, steps: int) -> list[Run]:
    """Every method at one fraction."""
    lists = {"static random": drawn(len(train), keep, seed)}
    for name, values in scores.items():
        lists[name] = np.flatnonzero(selection.kept_mask(values, keep, ids=train.paths))
    static = [Run(f"{name} {keep:g}", seed, rows, None, steps) for name, rows in lists.items()]
    how = {"keep": keep, "every": lab.settings["every"]}
    return static + [
        Run(f"{name} {keep:g}", seed, None, None, steps, {"name": kind, **how}) for kind, name in DYNAMIC.items()
    ]


def fit_and_count(train, test, recipe, *, looks: int, tally: Path, on_epoch, sampler=None, **how) -> loop.Fit:
    """`loop.fit` with about `looks` evaluations, however long an epoch is; curves hold [step, seconds, accuracy].

    How often a sampler chose each example is left in `tally`, for the first seed.
    """
    looked, losses = 0, []
    for state in loop.epochs(train, recipe, sampler=sampler, **how):
        losses.append(state.losses)
        if due(state.step, looked, how["steps"], looks):
            looked = state.step
            predictions = loop.predict(state.model, test, recipe.precision)
            on_epoch(state.step, state.seconds, predictions)
    if sampler is not None and how["seed"] == 0:
        save_counts(tally, sampler)
    return loop.Fit(predictions, state.seconds, state.step, state.model, np.concatenate(losses))


def due(step: int, looked: int, steps: int, looks: int) -> bool:
    """Whether an evaluation is due after `step`, when the last one was after `looked`."""
    every = max(1, steps // looks)
    return step // every > looked // every or step == steps


def thinned(curve: list[list[float]], looks: int) -> list[list[float]]:
    """The curve with `looks` looks, of one that may have been recorded with a multiple of them."""
    kept, looked = [], 0
    for one in curve:
        if due(one[0], looked, curve[-1][0], looks):
            kept, looked = [*kept, one], one[0]
    return kept


def save_counts(tally: Path, sampler) -> None:
    about = {"kind": type(sampler).__name__, "keep": sampler.keep}
    name = f"{about['kind']}-{sampler.keep:g}.npz"
    np.savez(tally / name, counts=sampler.counts, passes=sampler.epoch + 1, **about)


def read_counts(tally: Path) -> dict[tuple[str, float], tuple[np.ndarray, int]]:
    """{(method, keep): (times that each example was selected, passes)}, of the first seed."""
    from protoprune.evaluation import runs

    shown = {runs.DYNAMIC[kind]: name for kind, name in DYNAMIC.items()}
    found = {}
    for path in sorted(tally.glob("*.npz")):
        with np.load(path) as file:
            found[shown[str(file["kind"])], float(file["keep"])] = file["counts"], int(file["passes"])
    return found


def tally_rows(counts) -> list[dict]:
    """Shares of the examples that were never, sometimes and always selected."""
    rows = []
    for (method, keep), (times, passes) in sorted(counts.items()):
        never, always = float((times == 0).mean()), float((times == passes).mean())
        row = {"method": method, "keep": keep, "passes": passes, "never": never, "always": always}
        rows.append({**row, "sometimes": 1 - never - always, "median": float(np.median(times))})
    return rows


def table(found, target: float, looks: int) -> list[dict]:
    """One row a method; the target counts as reached at the first look that sees it."""
    rows = table_of(found)
    for row in rows:
        outcomes = [dataclasses.replace(one, curve=thinned(one.curve, looks)) for one in found[row["method"]]]
        steps = [next((step for step, _, accuracy in one.curve if accuracy >= target), None) for one in outcomes]
        seconds = [time_to(one, target) for one in outcomes]
        reached = None not in steps
        row["reached_target"] = sum(step is not None for step in steps)
        row["steps_to_target"] = float(np.median(steps)) if reached else None
        row["seconds_to_target"] = float(np.median(seconds)) if reached else None
    return rows


def claims(found: dict[str, list[float]], keeps: list[float]) -> list[Claim]:
    """Verdicts from accuracies by method, one a seed."""
    made = []
    for keep in sorted(keep for keep in keeps if keep <= CLAIMED):

        def gaps(keep: float = keep, **pairs: tuple[str, str]) -> dict:
            return {name: gap(found[f"{a} {keep:g}"], found[f"{b} {keep:g}"]) for name, (a, b) in pairs.items()}

        kept, source = f"at {100 * keep:g} % kept, equal steps", f"{SOURCE}, section 4"
        random, chosen = "static random", "dynamic random"
        made += [
            claim(f"Random dynamic beats static random {kept}", source, gaps(random=(chosen, random))),
            claim(f"Static random beats static scores {kept}", source,
                  gaps(EL2N=(random, "static EL2N"), prototypes=(random, "static prototypes"))),
            claim(f"Epsilon-greedy and UCB do better than random dynamic {kept}", source,
                  gaps(greedy=("epsilon-greedy", chosen), UCB=("UCB", chosen))),
        ]  # fmt: skip
    return made


def draw(lab: Lab, found: dict[str, list[float]]) -> None:
    with lab.panels(7, 4.5) as (axes,):
        keeps = sorted(lab.settings["keep"])
        names = (*STATIC, *DYNAMIC.values())
        for number, name in enumerate(names):
            shift = 1 + 0.015 * (number - len(names) / 2)
            places = [100 * keep * shift for keep in keeps]
            style = "--s" if name in STATIC else "-o"
            bars(axes, places, [found[f"{name} {keep:g}"] for keep in keeps], style, label=name)
        axes.axhline(100 * np.mean(found[FULL]), color="black", lw=1, ls=":", label=FULL)
        fractions_axis(axes, keeps, ylabel=f"test accuracy, % (95 % interval, {lab.seeds} seeds)")
        axes.legend(fontsize="x-small", ncols=2)


def draw_counts(lab: Lab, counts) -> None:
    """How often each example was selected, sorted, as a share of the passes: a panel a fraction."""
    keeps = sorted(lab.settings["keep"])
    with lab.panels(3 * len(keeps), 3, len(keeps), name="sometimes", sharey=True) as panels:
        for axes, keep in zip(panels, keeps, strict=True):
            for number, name in enumerate(DYNAMIC.values()):
                if (name, keep) in counts:
                    times, passes = counts[name, keep]
                    share = np.linspace(0, 100, len(times))
                    axes.plot(share, np.sort(times)[::-1] / passes, color=f"C{number}", lw=1.2, label=name)
            axes.set(title=f"{100 * keep:g} % kept", xlabel="examples, %")
        panels[0].set_ylabel("share of passes that select it")
        panels[0].legend(fontsize="x-small")
