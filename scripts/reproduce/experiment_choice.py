"""Which list? Covers, extremes, strata and random draws at every fraction, by heads and by networks from pixels.

Not a paper's experiment but the one behind `protoprune tune` and the README's advice. Heads are trained to convergence
on the features that ranked the images; networks see pixels alone, for two lengths of training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping

import numpy as np
from claims import Claim, interval_text
from lab import Lab

import protoprune
from protoprune.evaluation import runs, statistics
from protoprune.files import write_file
from protoprune.training import converged
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
    for name, encoder, images in lab.settings["sets"]:
        rows += heads(lab, name, encoder, images)
        lab.save_table(rows)
    for one in lab.settings["networks"]:
        rows += networks(lab, **one)
        lab.save_table(rows)
    found = gathered(rows)
    lab.save_table(list(summary(found)), "summary")
    draw(lab, found)
    return judge(found, lab.settings["resolution"])


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(lab: Lab, name: str, encoder: str, images: int) -> list[dict]:
    """A row a seed, method and fraction: each seed draws `images` of the training images (0: four fifths)."""
    lab.settings["encoder"] = encoder
    train, test = lab.features(name)
    pool = Pool(train.paths, train.labels, train.classes, train.inputs.numpy())
    identity = f"{train.fingerprint()} {test.fingerprint()} {images} {converged.VERSION} {protoprune.__version__}"
    rows, space = [], None
    for seed in range(lab.seeds):
        wanted = [(keep, method) for keep in lab.settings["keeps"] for method in METHODS]
        wanted += [(keep, "tune") for keep in lab.settings["tune"] if seed < lab.settings["tune_seeds"]]
        kept = Kept(lab.folder / "heads" / f"{name}-{encoder}-{seed}.json", identity)
        part = None
        for keep, method in [*wanted, (1.0, "everything")]:
            if (keep, method) not in kept:
                part = part or Part(pool, initial(train.labels, images, seed), seed)
                space = space or converged.Space(train.inputs)
                began = time.process_time()
                winner = None
                if method == "everything":
                    own = part.rows
                elif method == "tune":
                    winner = tuned(pool, part, keep, seed)
                    own = part.select(winner, keep)
                else:
                    own = part.select(METHODS[method], keep)
                chosen = time.process_time() - began
                head = converged.fit_head(space, train.labels, len(train.classes), rows=own, seed=seed)
                accuracy = float((head.predict(test.inputs) == test.labels).mean())
                result = {"kept": len(own), "accuracy": accuracy, "selection_seconds": round(chosen, 3)}
                kept.add(keep, method, {**result, "winner": winner and winner.name})
            rows.append({"set": f"{name} {encoder}", "judge": "head", "keep": keep, "method": method, "seed": seed,
                         "winner": None, **kept[keep, method]})  # fmt: skip
        lab.say(f"{name} {encoder}, seed {seed}: done")
    return rows


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


def networks(lab: Lab, data: str, encoder: str, images: int, keeps, methods, epochs, seeds: int) -> list[dict]:
    """The same judged by a network from pixels, for each length of training; lists come from the features."""
    lab.settings["encoder"] = encoder
    features, _ = lab.features(data)
    train, test = lab.images(data)
    row_of = {path: row for row, path in enumerate(features.paths)}
    vectors = features.inputs.numpy()[[row_of[path] for path in train.paths]]
    pool = Pool(train.paths, train.labels, train.classes, vectors)
    keys, planned = [], []
    for seed in range(seeds):  # by seed, so that what is stopped early can still be compared
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


def gathered(rows: Iterable[dict]) -> dict[Key, np.ndarray]:
    """{(set, judge, keep, method): (seeds,) accuracies}."""
    found: dict[Key, list] = {}
    for row in rows:
        found.setdefault((row["set"], row["judge"], row["keep"], row["method"]), []).append(row["accuracy"])
    return {key: np.array(values) for key, values in found.items()}


def compared(found: Mapping[Key, np.ndarray], resolution: float) -> dict[Key, statistics.Difference]:
    """Every method less random, paired by seed; each seed has images of its own, so there is no luck in common.

    A method of fewer seeds (tune, which takes minutes) has the first ones.

    Verdicts are corrected over all of them together (Holm).
    """
    keys = [key for key in found if key[3] not in ("random", "everything")]
    raw = [statistics.compare(found[key], of_random(found, key), one_draw=False, resolution=resolution) for key in keys]
    return dict(zip(keys, statistics.judge(raw), strict=True))


def of_random(found: Mapping[Key, np.ndarray], key: Key) -> np.ndarray:
    """What random has at the seeds of this key."""
    return found[(*key[:3], "random")][: len(found[key])]


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


def judge(found: Mapping[Key, np.ndarray], resolution: float = 1e-4) -> list[Claim]:
    differences = compared(found, resolution)
    claims = []
    for method, keeps, text in (
        ("cover by class", lambda keep: keep <= 0.1, "Herding by class beats random at 10 % kept and less"),
        ("cover by class", lambda keep: keep == 0.3, "Herding by class beats random at 30 % kept"),
        ("cover by class", lambda keep: keep > 0.3, "Herding by class beats random at 50 % kept and more"),
        ("cover by cluster", lambda keep: keep <= 0.1, "Herding without labels beats random at 10 % kept and less"),
        ("facility by class", lambda keep: keep <= 0.1, "Facility location beats random at 10 % kept and less"),
        ("hard", lambda keep: keep <= 0.3, "The hardest lose to random at 30 % kept and less"),
        ("tune", lambda keep: True, "What tune chooses beats random"),
        ("random by class", lambda keep: keep <= 0.3, "Random with even classes beats random at 30 % kept and less"),
    ):
        picked = {key: one for key, one in differences.items() if key[3] == method and keeps(key[2])}
        if picked:
            claims.append(claim_of(text, picked, "worse" if "lose" in text else "better"))
    return claims


def claim_of(text: str, picked: Mapping[Key, statistics.Difference], wanted: str) -> Claim:
    """Holds where every comparison is as said, does not hold where one is the other way round."""
    verdicts = [one.verdict for one in picked.values()]
    other = {"better": "worse", "worse": "better"}[wanted]
    verdict = "does not hold" if other in verdicts else "undecided"
    if all(one == wanted for one in verdicts):
        verdict = "holds"
    listed = "; ".join(
        f"{key[0]}, {key[1]}, {key[2]:.0%} {interval_text(one.difference, one.low, one.high)} {one.verdict}"
        for key, one in picked.items()
    )
    return Claim(text, SOURCE, f"less random, points: {listed}", verdict)


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(lab: Lab, found: Mapping[Key, np.ndarray]) -> None:
    """Accuracy less random against the fraction kept, a panel a set and judge."""
    from matplotlib.figure import Figure

    panels = sorted({key[:2] for key in found})
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for number, method in enumerate(name for name in (*METHODS, "tune") if name != "random"):
            keeps = sorted({key[2] for key in found if key[:2] == panel and key[3] == method})
            if not keeps:
                continue
            spans = [
                statistics.mean_interval(100 * (found[one] - of_random(found, one)))
                for one in ((*panel, keep, method) for keep in keeps)
            ]
            half = [0 if one.low is None else one.mean - one.low for one in spans]
            axes.errorbar(
                [100 * keep for keep in keeps], [one.mean for one in spans], half, fmt="o-", capsize=2, ms=3,
                color=f"C{number}", label=method,
            )  # fmt: skip
        axes.axhline(0, color="black", lw=0.8)
        axes.set(xlabel="kept, %", xscale="log", title=f"{panel[0]}\n{panel[1]}", ylim=(-16, 16))
    figure.axes[0].set_ylabel("accuracy less random, points")
    figure.axes[0].legend(fontsize=7)
    lab.save_figure(figure)
