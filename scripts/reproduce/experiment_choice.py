"""Which list? Covers, extremes, strata and random draws at every fraction, by heads and by networks from pixels.

Not a paper's experiment but the one behind `protoprune tune` and the README's advice. Heads are trained to convergence
on the features that ranked the images; networks see pixels alone, for two lengths of training.

How it is judged, written down before the run (25 November 2026). A seed draws its own images before pruning, and
every data set with its encoder has seeds of its own, so no luck is common to any two draws. A claim is one question,
so it is one test: in each data set a seed's value is the mean of its paired differences to random over the fractions
kept and the lengths of training that the claim is about; the mean over the data sets, each with the same weight, is
tested with the t of Welch and Satterthwaite (the data sets may spread differently and have different numbers of
seeds). The claims are corrected together (Holm). A claim holds where its mean is beyond chance on the side that it
says, unless one data set by itself is beyond chance on the other side (Holm over the data sets of all claims); it
does not hold where the mean, or one data set, is on the other side; else it is undecided. So at most one run in
twenty has a mean, and one in twenty a data set, that is wrongly beyond chance. The intervals speak for draws from
these data sets, not for others. Seeds start at 100: those below made the hypotheses. Where time ends a run early,
whole seeds are left out, whatever they would have shown. The single cells of a table are corrected (Holm) over all
cells of the same data set and judge.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from claims import Claim, bars, gathered, interval_text
from lab import Lab, vectors_of

import protoprune
from protoprune.errors import UsageError
from protoprune.evaluation import runs, statistics
from protoprune.files import write_file
from protoprune.training import converged
from protoprune.training.examples import Examples, subset
from protoprune.tuning import running
from protoprune.tuning.recipes import BALANCED, RANDOM, Candidate, Part, Pool

SOURCE = "our own screening (docs/log.md); Chen, Welling & Smola 2010"
METHODS = {
    "cover by class": Candidate("cover", by="class"),
    "cover by cluster": Candidate("cover", by="cluster"),
    "facility by class": Candidate("facility", by="class"),
    "hard": Candidate("hard"),
    "easy": Candidate("easy"),
    "middle": Candidate("middle"),
    "CCS": Candidate("stratified", drop_hardest=0.1),
    "random by class": BALANCED,
    "random": RANDOM,
}
Key = tuple[str, str, float, str]  # (data set with encoder, judge, keep, method)


def run(lab: Lab) -> list[Claim]:
    rows: list[dict] = []
    check(lab.settings)
    for one in lab.settings["sets"]:
        rows += heads(lab, **one)
        lab.save_table(rows)
    for one in lab.settings["networks"]:
        rows += networks(lab, **one)
        lab.save_table(rows)
    found = gathered(rows, ("set", "judge", "keep", "method"), "accuracy")
    lab.save_table(list(summary(found, lab.settings["resolution"])), "summary")
    lab.save_table(list(times(rows)), "seconds")
    draw(lab, found)
    return judge(found, lab.settings["resolution"])


def check(settings: Mapping) -> None:
    """UsageError where there would be nothing to compare with, which came out when all had been trained."""
    if other := set(settings["tune"]) - set(settings["keeps"]):
        raise UsageError(f"tune = {settings['tune']}: {min(other):g} is not among keeps, whose random lists it needs")
    for one in settings["networks"]:
        if "random" not in one["methods"]:
            raise UsageError(f"methods = {one['methods']}: expected random among them, which all are compared with")


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(
    lab: Lab, data: str, encoder: str, images: int, first_seed: int, seeds: int, tune_seeds: int, every: int = 1
) -> list[dict]:
    """A row a seed, method and fraction: each seed draws `images` of the training images (0: four fifths).

    tune_seeds: the first of the seeds, for which tune chooses too; every: of how many classes one takes part, the first
    of each so many in order of name. All heads of a fraction have one regularisation, the one that suits a random list
    of a seed that is not used otherwise.
    """
    lab.settings["encoder"] = encoder
    train, test = (some_classes(one, every) for one in lab.features(data))
    pool = Pool(train.paths, train.labels, train.classes, train.inputs.numpy())
    # 2: the protocol, one more whenever the same heads are fitted in another way
    identity = f"{train.fingerprint()} {test.fingerprint()} {images} {converged.VERSION} {protoprune.__version__} 2"
    rows, space = [], converged.Space(train.inputs)

    def strength(keep: float) -> float:
        """Chosen once; kept as one more seed."""
        chosen = Kept(lab.folder / "heads" / f"{data}-{encoder}-strength.json", identity)
        if (keep, "random") not in chosen:
            own = Part(pool, initial(train.labels, images, first_seed - 1), first_seed - 1).select(RANDOM, keep)
            found = converged.fit_head(space, train.labels, len(train.classes), rows=own, seed=first_seed - 1).strength
            chosen.add(keep, "random", {"strength": found})
        return chosen[keep, "random"]["strength"]

    for seed in range(first_seed, first_seed + seeds):
        wanted = [(keep, method) for method in METHODS for keep in lab.settings["keeps"]]
        wanted += [(keep, "tune") for keep in lab.settings["tune"] if seed < first_seed + tune_seeds]
        kept = Kept(lab.folder / "heads" / f"{data}-{encoder}-{seed}.json", identity)
        parts: dict[str, Part] = {}  # one a method, so that each pays for what it needs
        for keep, method in [*wanted, (1.0, "everything")]:
            if (keep, method) not in kept:
                began = time.process_time()
                part = parts[method] = parts.get(method) or Part(pool, initial(train.labels, images, seed), seed)
                winner = None
                if method == "everything":
                    own = part.rows
                elif method == "tune":
                    winner = tuned(pool, part, keep, seed)
                    own = part.select(winner, keep)
                else:
                    own = part.select(METHODS[method], keep)
                chosen = time.process_time() - began
                head = converged.fit_head(
                    space, train.labels, len(train.classes), rows=own, strength=strength(keep), seed=seed
                )
                accuracy = float((head.predict(test.inputs) == test.labels).mean())
                result = {"kept": len(own), "accuracy": accuracy, "selection_seconds": round(chosen, 3)}
                kept.add(keep, method, {**result, "winner": winner and winner.name})
            rows.append({"set": f"{data} {encoder}", "judge": "head", "keep": keep, "method": method, "seed": seed,
                         "winner": None, **kept[keep, method]})  # fmt: skip
        lab.say(f"{data} {encoder}, seed {seed}: done")
    return rows


def some_classes(whole: Examples, every: int) -> Examples:
    """The images of one class in `every`, numbered anew."""
    own = subset(whole, np.flatnonzero(whole.labels % every == 0))
    return replace(own, labels=own.labels // every, classes=own.classes[::every])


def tuned(pool: Pool, part: Part, keep: float, seed: int) -> Candidate:
    """What `protoprune tune` would choose on these images alone."""
    own = Pool([pool.paths[row] for row in part.rows], pool.labels[part.rows], pool.classes, pool.vectors[part.rows])
    return running.tune(own, keep, seed=seed).winner


def initial(labels: np.ndarray, images: int, seed: int) -> np.ndarray:
    """The images before pruning, drawn for each seed."""
    count = images or round(0.8 * len(labels))
    return np.sort(np.random.default_rng([seed, 1313]).permutation(len(labels))[:count])


class Kept:
    """Results of one seed in a JSON file, so that a run goes on where it stopped."""

    def __init__(self, path, identity: str):
        self.path, self.key = path, hashlib.sha256(identity.encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found = {}
        if path.exists() and (content := json.loads(path.read_text()))["key"] == self.key:
            self.found = content["found"]

    def __contains__(self, key) -> bool:
        return "{:g} {}".format(*key) in self.found

    def __getitem__(self, key) -> dict:
        return self.found["{:g} {}".format(*key)]

    def add(self, keep: float, method: str, result: dict) -> None:
        self.found[f"{keep:g} {method}"] = result
        write_file(self.path, json.dumps({"key": self.key, "found": self.found}, indent=0).encode())


# --- networks --------------------------------------------------------------------------------------------------------


def networks(
    lab: Lab, data: str, encoder: str, images: int, first_seed: int, seeds: int, keeps, methods, epochs, image_size: int
) -> list[dict]:
    """The same judged by a network from pixels, for each length of training; lists come from the features."""
    lab.settings["encoder"] = encoder
    features, _ = lab.features(data)
    train, test = lab.images(data, image_size=image_size)
    pool = Pool(train.paths, train.labels, train.classes, vectors_of(features, train.paths))
    keys, planned = [], []
    for seed in range(first_seed, first_seed + seeds):
        part = Part(pool, initial(train.labels, images, seed), seed)
        for keep in keeps:
            for method in methods:
                keys.append((keep, method, seed))
                planned.append(part.select(METHODS[method], keep))
    rows = []
    for length in epochs:
        recipe = lab.recipe(epochs=length)
        todo = [
            runs.Run(f"{length} epochs, {keep:.0%} kept, {method}", seed, own)
            for (keep, method, seed), own in zip(keys, planned, strict=True)
        ]
        outcomes = runs.run_all(todo, train, test, recipe, folder=lab.runs, device=lab.device, on_run=lab.progress)
        for (keep, method, seed), own, outcome in zip(keys, planned, outcomes, strict=True):
            rows.append({
                "set": f"{data} {encoder}", "judge": f"cnn, {length} epochs", "keep": keep, "method": method,
                "seed": seed, "kept": len(own), "accuracy": outcome.accuracy, "selection_seconds": None,
                "winner": None,
            })  # fmt: skip
    return rows


# --- claims ----------------------------------------------------------------------------------------------------------

LITTLE = (0.01, 0.05, 0.1)
QUESTIONS = (  # method, fractions kept, judge, better or worse, in words
    ("cover by class", LITTLE, "head", "better", "Herding by class beats random at 10 % kept and less"),
    ("cover by class", (0.3,), "head", "better", "Herding by class beats random at 30 % kept"),
    ("cover by class", (0.5, 0.7), "head", "better", "Herding by class beats random at 50 and 70 % kept"),
    ("cover by cluster", LITTLE, "head", "better", "Herding without labels beats random at 10 % kept and less"),
    ("facility by class", LITTLE, "head", "better", "Facility location beats random at 10 % kept and less"),
    ("facility by class", (0.3,), "head", "better", "Facility location beats random at 30 % kept"),
    ("hard", (*LITTLE, 0.3), "head", "worse", "The hardest lose to random at 30 % kept and less"),
    ("easy", (*LITTLE, 0.3), "head", "worse", "The easiest lose to random at 30 % kept and less"),
    ("CCS", (*LITTLE, 0.3), "head", "better", "CCS beats random at 30 % kept and less"),
    ("random by class", LITTLE, "head", "better", "Random with even classes beats random at 10 % kept and less"),
    ("tune", None, "head", "better", "What tune chooses beats random"),
    ("cover by class", (0.05, 0.1), "cnn", "better", "From pixels, herding by class beats random at 5 and 10 % kept"),
    ("cover by cluster", (0.05, 0.1), "cnn", "better", "From pixels, herding without labels does"),
    ("facility by class", (0.05, 0.1), "cnn", "better", "From pixels, facility location does"),
)


def gaps(found: Mapping[Key, np.ndarray], method: str) -> dict[Key, np.ndarray]:
    """{key: (seeds,) accuracies less those of random at the same seeds} of one method; it may have fewer seeds."""
    own = {key: values for key, values in found.items() if key[3] == method}
    return {key: values - found[(*key[:3], "random")][: len(values)] for key, values in own.items()}


def mean_over(rows: Iterable[np.ndarray]) -> np.ndarray:
    """(seeds,) mean of rows of seeds, of those that all of them have."""
    rows = list(rows)
    return np.mean([row[: min(map(len, rows))] for row in rows], axis=0)


def tested(gap: np.ndarray, resolution: float) -> statistics.Difference:
    """Each seed has images of its own: there is no luck in common."""
    return statistics.compare(gap, np.zeros(len(gap)), one_draw=False, resolution=resolution)


def together(by_set: Sequence[np.ndarray], resolution: float) -> statistics.Difference:
    """The mean over data sets of the means over their seeds, rows of (seeds,) differences: t of Welch-Satterthwaite."""
    from scipy.stats import t

    by_set = [gap for gap in by_set if len(gap) > 1] or by_set  # one seed says nothing of its spread
    if len(by_set) == 1:
        return tested(by_set[0], resolution)
    mean = float(np.mean([gap.mean() for gap in by_set]))
    squares = np.array([max(gap.var(ddof=1), resolution**2) / len(gap) for gap in by_set])
    error = float(np.sqrt(squares.sum())) / len(by_set)
    freedom = squares.sum() ** 2 / (squares**2 / [len(gap) - 1 for gap in by_set]).sum()
    half, p = float(t.ppf(0.975, freedom)) * error, float(2 * t.sf(abs(mean) / error, freedom))
    low, high = mean - half, mean + half
    return statistics.Difference(mean, low, high, low, high, p, sum(map(len, by_set)))


def judge(found: Mapping[Key, np.ndarray], resolution: float = 1e-4) -> list[Claim]:
    asked = []
    for method, keeps, judged_by, wanted, text in QUESTIONS:
        picked: dict[str, list] = {}
        for key, gap in gaps(found, method).items():
            if key[1].startswith(judged_by) and (keeps is None or key[2] in keeps):
                picked.setdefault(key[0], []).append(gap)
        if picked:
            asked.append((text, wanted, {name: mean_over(rows) for name, rows in picked.items()}))
    means = statistics.judge([together(list(by_set.values()), resolution) for _, _, by_set in asked])
    each = iter(statistics.judge([tested(gap, resolution) for *_, by_set in asked for gap in by_set.values()]))
    return [
        claim_of(text, wanted, mean, {name: next(each) for name in by_set})
        for (text, wanted, by_set), mean in zip(asked, means, strict=True)
    ]


def claim_of(text: str, wanted: str, mean: statistics.Difference, by_set: Mapping[str, statistics.Difference]) -> Claim:
    """The rule of the head of this module."""
    other = {"better": "worse", "worse": "better"}[wanted]
    verdict = "holds" if mean.verdict == wanted else "undecided"
    if other in [mean.verdict, *(one.verdict for one in by_set.values())]:
        verdict = "does not hold"
    p = "" if mean.p_adjusted is None else f", p = {mean.p_adjusted:.1g} corrected"
    listed = "; ".join(
        f"{name} {interval_text(one.difference, one.low, one.high)}, {one.n} seeds" for name, one in by_set.items()
    )
    found = f"less random, points: {interval_text(mean.difference, mean.low, mean.high)}{p} ({listed})"
    return Claim(text, SOURCE, found, verdict)


def compared(found: Mapping[Key, np.ndarray], resolution: float) -> dict[Key, statistics.Difference]:
    """Every method less random in every cell; corrected over the cells of a data set and judge."""
    answers = {}
    for panel in sorted({key[:2] for key in found}):
        raw = {
            key: tested(gap, resolution) for method in (*METHODS, "tune") if method != "random"
            for key, gap in gaps(found, method).items() if key[:2] == panel
        }  # fmt: skip
        answers |= dict(zip(raw, statistics.judge(list(raw.values())), strict=True))
    return answers


def summary(found: Mapping[Key, np.ndarray], resolution: float = 1e-4):
    """One row a set, judge, fraction and method."""
    differences = compared(found, resolution)
    for key, values in found.items():
        one = differences.get(key)
        yield {
            **dict(zip(("set", "judge", "keep", "method"), key, strict=True)), "seeds": len(values),
            "accuracy": values.mean(), "sd": values.std(ddof=1) if len(values) > 1 else None,
            "to_random": one and one.difference, "low": one and one.low, "high": one and one.high,
            "verdict": one and one.verdict,
        }  # fmt: skip


def times(rows: Iterable[dict]):
    """CPU seconds that choosing took, a row a set and method: the first fraction of a seed pays for the others."""
    first: dict[tuple, float] = {}
    for row in rows:
        key = row["set"], row["method"], row["seed"]
        if row["selection_seconds"] is not None and row["method"] != "everything":
            first[key] = max(first.get(key, 0.0), row["selection_seconds"])
    for name, method in dict.fromkeys(key[:2] for key in first):
        spent = [value for key, value in first.items() if key[:2] == (name, method)]
        yield {"set": name, "method": method, "seconds": float(np.median(spent)), "seeds": len(spent)}


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(lab: Lab, found: Mapping[Key, np.ndarray]) -> None:
    """Accuracy less random against the fraction kept, a panel a set and judge that has three fractions and more."""
    fractions = {cell: {key[2] for key in found if key[:2] == cell} for cell in sorted({key[:2] for key in found})}
    cells = [cell for cell, own in fractions.items() if len(own) > 2] or list(fractions)
    with lab.panels(4.5 * min(3, len(cells)), 4 * -(-len(cells) // 3), len(cells), across=3) as panels:
        for axes, cell in zip(panels, cells, strict=True):
            for number, method in enumerate(name for name in (*METHODS, "tune") if name != "random"):
                own = {key[2]: values for key, values in gaps(found, method).items() if key[:2] == cell}
                keeps = sorted(own)
                if keeps:
                    places = [100 * keep for keep in keeps]
                    bars(axes, places, [own[keep] for keep in keeps], color=f"C{number}", label=method, ms=3)
            axes.axhline(0, color="black", lw=0.8)
            axes.set(xlabel="kept, %", xscale="log", title=", ".join(cell), ylim=(-25, 32))
        panels[0].set_ylabel("accuracy less random, points")
        panels[0].legend(fontsize=7)
