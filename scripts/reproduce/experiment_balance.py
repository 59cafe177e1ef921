"""What pruning does to the class counts, and what a floor for every class does to the accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from claims import OPEN, Claim, bars, claim, decide, gap, gathered
from lab import Lab

from protoprune import selection
from protoprune.clustering import prototypes
from protoprune.errors import UsageError
from protoprune.evaluation import runs

SOURCE = "Sorscher et al. 2022, class balance"
FLOOR = 0.5  # the paper's share of the kept set that is split evenly
Key = tuple[float, float, object]  # (ratio of the situation, keep, balance or 'random')


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    train, test = lab.sets()
    vectors = lab.vectors(train)
    if not {0, FLOOR} <= set(settings["balances"]):
        raise UsageError(f"balances = {settings['balances']}: expected 0, {FLOOR} and possibly others")
    keys, planned, before = [], [], {}
    steps = runs.steps_for(settings["images"], recipe)
    for seed in range(lab.seeds):
        for ratio in settings["ratios"]:
            initial = uneven_rows(train.labels, settings["images"], ratio, seed)
            before[ratio, seed] = np.bincount(train.labels[initial], minlength=len(train.classes))
            for keep, method, rows in subsets(settings, train, vectors, initial, seed):
                keys.append((ratio, keep, method, seed))
                planned.append(runs.Run(f"ratio {ratio}, {keep:.0%} kept, {method}", seed, rows, None, steps))
    outcomes = runs.run_all(planned, train, test, recipe, folder=lab.runs, device=lab.device, on_run=lab.progress)
    rows = [row_of(key, run_.rows, train, outcome) for key, run_, outcome in zip(keys, planned, outcomes, strict=True)]
    lab.save_table([{**row, "counts": " ".join(map(str, row["counts"]))} for row in rows])
    columns = ("counts", "accuracy", "worst_class_accuracy")
    found = {name: gathered(rows, ("ratio", "keep", "method"), name) for name in columns}
    initial = {ratio: np.array([before[ratio, seed] for seed in range(lab.seeds)]) for ratio in settings["ratios"]}
    draw(lab, initial, found["counts"], found["accuracy"])
    return judge(initial, **found)


def uneven_rows(labels: np.ndarray, images: int, ratio: float, seed: int) -> np.ndarray:
    """Rows, ascending, of about `images` images whose largest class has `ratio` times those of the smallest.

    Class sizes fall evenly in the logarithm; which class has which size, and which images, is drawn for the seed.
    Raises UsageError when a class is too small.
    """
    generator = np.random.default_rng([seed, 91])
    names = generator.permutation(np.unique(labels))
    share = ratio ** -np.linspace(0, 1, len(names))
    counts = np.round(images * share / share.sum()).astype(int)
    rows = []
    for name, count in zip(names, counts, strict=True):
        own = np.flatnonzero(labels == name)
        if not 0 < count <= len(own):
            raise UsageError(
                f"images = {images}, ratio {ratio}: a class would have {count}, and there are {len(own)} of it"
            )
        rows.append(generator.permutation(own)[:count])
    return np.sort(np.concatenate(rows))


def subsets(settings: dict, train, vectors: np.ndarray, initial: np.ndarray, seed: int):
    """(keep, balance or 'random', rows) of every subset of one initial set, ranked by prototypes of its own."""
    k = prototypes.auto_k(len(initial), len(train.classes))
    hardness = prototypes.cluster(vectors[initial], k, seed=seed).distance
    ids, labels = [train.paths[row] for row in initial], train.labels[initial]
    for keep in settings["keeps"]:
        for balance in settings["balances"]:
            mask = selection.kept_mask(
                hardness, keep, ids=ids, order=settings["order"], seed=seed, groups=labels, balance=balance
            )
            yield keep, balance, initial[mask]
        mask = selection.kept_mask(hardness, keep, ids=ids, order="random", seed=seed)
        yield keep, "random", initial[mask]


def row_of(key: tuple, rows: np.ndarray, train, outcome) -> dict:
    ratio, keep, method, seed = key
    by_class = [one for one in outcome.class_accuracy() if one is not None]
    return {
        "ratio": ratio, "keep": keep, "method": method, "seed": seed, "accuracy": outcome.accuracy,
        "worst_class_accuracy": min(by_class),
        "counts": np.bincount(train.labels[rows], minlength=len(train.classes)).tolist(),
    }  # fmt: skip


# --- claims ----------------------------------------------------------------------------------------------------------


def unevenness(counts: np.ndarray) -> np.ndarray:
    """(seeds,) log of the largest of (seeds, classes) counts over the smallest; an empty class counts as half."""
    counts = np.maximum(counts, 0.5)
    return np.log(counts.max(axis=1) / counts.min(axis=1))


def judge(
    initial: Mapping[float, np.ndarray],
    counts: Mapping[Key, np.ndarray],
    accuracy: Mapping[Key, np.ndarray],
    worst_class_accuracy: Mapping[Key, np.ndarray],
) -> list[Claim]:
    """initial: {ratio: (seeds, classes) counts before pruning}; the others {(ratio, keep, method): (seeds, …)}."""
    places = sorted({(ratio, keep) for ratio, keep, _ in counts}, key=lambda one: (one[0], -one[1]))
    even, uneven = min(initial), max(initial)
    claims = [
        uneven_claim(
            f"Pruning makes even classes uneven (before: {even:g} to 1)",
            {keep: (counts[even, keep, 0], counts[even, keep, "random"]) for r, keep in places if r == even}, "random",
        )
    ]  # fmt: skip
    if uneven > even:
        claims.append(
            uneven_claim(
                f"Pruning makes uneven classes more uneven (before: {uneven:g} to 1)",
                {keep: (counts[uneven, keep, 0], initial[uneven]) for r, keep in places if r == uneven}, "before",
            )
        )  # fmt: skip
    # Where no class falls below the floor it changes nothing, and there is nothing to compare.
    bound = [place for place in places if not np.array_equal(counts[(*place, FLOOR)], counts[(*place, 0)])]
    for name, values in (("accuracy", accuracy), ("accuracy of the worst class", worst_class_accuracy)):
        text = f"A floor of {FLOOR:g} for every class restores the {name}"
        gaps = {
            f"{ratio:g} to 1, {keep:.0%} kept": gap(values[ratio, keep, FLOOR], values[ratio, keep, 0])
            for ratio, keep in bound
        }
        nowhere = Claim(text, SOURCE, "in no situation did a class fall below the floor", OPEN)
        claims.append(claim(text, SOURCE, gaps, "floor less none: ", some=True) if gaps else nowhere)
    return claims


def uneven_claim(text: str, pairs: Mapping[float, tuple[np.ndarray, np.ndarray]], reference: str) -> Claim:
    """pairs: {keep: (counts of the kept, counts to compare with)}, each (seeds, classes)."""
    gaps = [gap(unevenness(kept), unevenness(other)) for kept, other in pairs.values()]
    found = "; ".join(
        f"{keep:.0%} kept {np.exp(unevenness(kept).mean()):.2f}, {reference} {np.exp(unevenness(other).mean()):.2f}, "
        f"times {np.exp(one.difference):.2f} ({np.exp(one.low):.2f} to {np.exp(one.high):.2f})"
        for (keep, (kept, other)), one in zip(pairs.items(), gaps, strict=True)
    )
    return Claim(text, SOURCE, f"largest class over smallest: {found}; {gaps[0].n} seeds", decide(gaps, some=True))


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(lab: Lab, initial, counts, accuracy) -> None:
    """Left: classes of the first seed in the most uneven situation. Then accuracy less random, a panel a situation."""
    ratios, keeps = sorted(initial), sorted({keep for _, keep, _ in counts})
    with lab.panels(4 + 4 * len(ratios), 4, 1 + len(ratios)) as panels:
        left, ratio, keep = panels[0], ratios[-1], keeps[0]
        order = np.argsort(-initial[ratio][0], kind="stable")
        left.plot(keep * initial[ratio][0][order], "k--", label="in proportion")
        for number, balance in enumerate(lab.settings["balances"]):
            left.plot(counts[ratio, keep, balance][0][order], "o-", color=f"C{number}", label=f"balance {balance:g}")
        left.set(xlabel="class, largest first", ylabel=f"images, {keep:.0%} kept", title=f"{ratio:g} to 1, seed 0")
        left.legend(fontsize="small")
        for axes, ratio in zip(panels[1:], ratios, strict=True):
            for number, balance in enumerate(lab.settings["balances"]):
                rows = [accuracy[ratio, keep, balance] - accuracy[ratio, keep, "random"] for keep in keeps]
                bars(axes, keeps, rows, color=f"C{number}")
            axes.axhline(0, color="grey", lw=0.8)
            axes.set(xlabel="fraction kept", title=f"accuracy less random, points; {ratio:g} to 1")
