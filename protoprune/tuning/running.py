"""Choose a recipe on part of the images, judge it on the rest: `protoprune tune`.

The labelled images are divided once: a fifth, stratified by class, judges and chooses nothing (with a test set of the
user's, that judges, and all images choose). Recipes are compared on splits of the others, each applied to the training
part alone; then the best one is judged once, against random lists, random lists with even classes, and everything.
What this module does not know: files other than its log, tables, figures.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

import protoprune
from protoprune.arguments import checked
from protoprune.bounds import check_number, check_seed, check_whole
from protoprune.clustering.vectors import check_finite
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.evaluation.runs import shared_key
from protoprune.evaluation.statistics import Interval
from protoprune.selection import check_keep
from protoprune.stores import refuse_url
from protoprune.text import parse_json
from protoprune.tuning import halving, judging
from protoprune.tuning.halving import Standing
from protoprune.tuning.judging import Judgement
from protoprune.tuning.recipes import BALANCED, RANDOM, REFERENCES, Candidate, Part, Pool, Ranks, candidates
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.training.converged import Head, Space
    from protoprune.training.examples import Examples
    from protoprune.training.loop import Recipe

FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)  # that --keep auto tries, from the top
SCREENED = 0.3  # fraction at which --keep auto finds its finalists
FINALISTS = 3
NETWORK_SPLITS = 2  # that finalists are trained on as networks
AUTO_SPLITS = 8
STEP = 0.01  # to which --keep auto narrows the fraction down
LEAST = 10  # images kept a split, below which no comparison means anything
Say = Callable[[str], None]

_DRAWS = 1000  # seeds of random lists that judge start here: those that choose have the numbers of the splits


class Judge(Protocol):
    """Trains on rows of the pool and answers for others."""

    @property
    def name(self) -> str:
        """With all that its answers depend on."""

    def answers(self, rows: np.ndarray, held_out: np.ndarray | None, seed: int) -> np.ndarray:
        """(images,) bool, what it gets right of the held-out rows, or of the test set where that is None."""


class Heads:
    """Linear heads on the features, trained to convergence.

    All recipes on a split share one strength of the penalty: choosing it costs most of a fit, and the same for all is
    fair to all. It is the one that suits as many random images of the same training part. From some thousands on, where
    such parts agree, it is found once, on as many random ones of all images that choose (their number to two digits),
    and the fits of all lists start from that head. What judges has its own.
    """

    def __init__(self, pool: Pool, choosers: np.ndarray, test: Pool | None = None) -> None:
        from protoprune.training import converged

        self.pool, self.choosers, self.test = pool, choosers, test
        self.name = f"head {converged.VERSION}, shared strength and start"
        self._random: dict[tuple[int, int], Head] = {}  # of random images, by number and split

    @cached_property
    def space(self) -> Space:
        """Made when something has to be trained, of the images that may be trained on alone."""
        from protoprune.training import converged

        return converged.Space(self.pool.vectors[self.choosers])

    def answers(self, rows: np.ndarray, held_out: np.ndarray | None, seed: int) -> np.ndarray:
        if held_out is None:
            assert self.test is not None, "without a test set there are rows that are held out"
            return self._fit(rows, seed).predict(self.test.vectors) == self.test.labels
        near = None
        if np.isin(held_out[:1], self.choosers).any():  # a split of the images that choose
            near = self._near(len(rows), held_out, seed)
        return self._fit(rows, seed, near).predict(self.pool.vectors[held_out]) == self.pool.labels[held_out]

    def _fit(self, rows: np.ndarray, seed: int, near: Head | None = None) -> Head:
        from protoprune.training.converged import fit_head

        own = np.searchsorted(self.choosers, rows)
        labels, classes = self.pool.labels[self.choosers], len(self.pool.classes)
        return fit_head(
            self.space,
            labels,
            classes,
            rows=own,
            strength=None if near is None else near.strength,
            near=near,
            seed=seed,
        )

    def _near(self, count: int, held_out: np.ndarray, split: int) -> Head:
        """A head of about so many random images, whose strength and place the others share."""
        from protoprune.training.converged import ONE_FOLD

        part = self.choosers
        if count < ONE_FOLD:
            part = np.setdiff1d(part, held_out)
        else:
            count, split = int(float(f"{count:.2g}")), 0
        if (count, split) not in self._random:
            drawn = np.random.default_rng([split, 0x57E6]).permutation(part)[:count]
            self._random[count, split] = self._fit(np.sort(drawn), split)
        return self._random[count, split]


class Networks:
    """Networks from pixels; `examples` and `test` are `training.Examples`, row i of the former is row i of the pool."""

    def __init__(self, examples: Examples, test: Examples | None, recipe: Recipe, device: str = "auto") -> None:
        self.examples, self.test, self.recipe, self.device = examples, test, recipe, device

    @cached_property
    def name(self) -> str:
        """A digest of the pixels and all else that its answers depend on."""
        key = shared_key(self.examples, self.test, self.recipe, self.device)
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Take one step, now: what its weights, images or device do not allow would be said when all heads are
        trained."""
        from protoprune.training.loop import epochs

        next(epochs(self.examples, self.recipe, rows=np.arange(2), steps=1, device=self.device))

    def answers(self, rows: np.ndarray, held_out: np.ndarray | None, seed: int) -> np.ndarray:
        from protoprune.training.examples import subset
        from protoprune.training.loop import fit

        tested = self.test if held_out is None else subset(self.examples, held_out)
        assert tested is not None, "without a test set there are rows that are held out"
        result = fit(self.examples, tested, self.recipe, rows=rows, seed=seed, device=self.device)
        return np.asarray(result.predictions) == tested.labels


@dataclass(frozen=True)
class Point:
    """One fraction that --keep auto tried."""

    keep: float
    candidate: Candidate  # the best there
    accuracy: float
    cost: Interval  # of accuracy against everything, over splits


@dataclass
class Tuned:
    """What was found. `winner` is what the list is made by."""

    keep: float
    candidates: list[Candidate]  # numbered as in the standings; the first two are the references
    standings: list[Standing]
    best: Candidate  # of the recipes, by the splits; with --keep auto random too
    judgement: Judgement | None  # None where everything is kept
    images: int
    judges: str  # what trained
    tolerance: float | None = None  # of --keep auto
    curve: list[Point] = field(default_factory=list)  # of --keep auto, of the best recipes
    random_curve: list[Point] = field(default_factory=list)  # and of random lists
    network_accuracy: dict[str, float] = field(default_factory=dict)  # finalists by name, over NETWORK_SPLITS

    @property
    def winner(self) -> Candidate:
        """The best recipe where it beats random lists, else random, with even classes where that beats it without.

        With --keep auto what allows the smallest fraction at the tolerance, which needs no such proof.
        """
        if self.judgement is None:
            return RANDOM
        if self.tolerance is not None or self.judgement.better:
            return self.best
        return BALANCED if self.judgement.even_better else RANDOM


@checked
def tune(
    pool: Pool,
    keep: float | None,
    *,
    test: Pool | None = None,
    recipes: Sequence[Candidate] | None = None,
    rounds: Sequence[int] = halving.ROUNDS,
    seeds: int = 10,
    seed: int = 0,
    tolerance: float = 0.005,
    networks: Networks | None = None,
    heads: Judge | None = None,
    folder: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Tuned:
    """The best recipe for the fraction `keep` (None: the smallest that costs less than `tolerance`), and its judgement.

    Recipes are compared on the images that have a score in every table, so that all their lists are of one size.
    recipes: default `recipes.candidates`; rounds: see `halving.halve`; seeds: random lists that judge, and models of
    the winner; networks: judge the finalists and the winner in place of heads. With a folder every training is kept
    there and not done again. Raises UsageError where too few images would be kept to compare anything.
    """
    say = on_progress or (lambda text: None)
    check_whole("--seeds", seeds, 2, 1000, ", for an interval")
    check_number("--tolerance", tolerance, 0, 1)
    check_seed(seed)
    if keep is not None:
        check_keep(keep)
    _check_vectors(pool, test, alike=networks is None)
    rows = _scored(pool)
    if recipes is None:
        recipes = candidates(len(rows), len(pool.classes), list(pool.tables))
    everyone = [*REFERENCES, *recipes]
    choosers, judges = _divided(pool.labels, rows, test, seed)
    lab = _Lab(pool, choosers, heads or Heads(pool, choosers, test), Log(folder, pool, test), seed)
    _check(pool, rows, len(choosers), SCREENED if keep is None else keep)
    if networks is not None:
        networks.check()

    standings = _standings(lab, everyone, SCREENED if keep is None else keep, rounds, say)
    ranked = [everyone[one.number] for one in standings if one.number >= len(REFERENCES)]
    result = Tuned(
        keep or 1.0, everyone, standings, ranked[0], None, len(rows),
        networks.recipe.model if networks else "linear heads", tolerance if keep is None else None,
    )  # fmt: skip

    def judged(one: Candidate, fraction: float) -> Judgement:
        count = len(test or ()) if judges is None else len(judges)
        say(f"judging {one.name} on {count:,} images that chose nothing")
        return lab.judge(networks or lab.heads, one, fraction, judges, seeds)

    if keep is None:
        _settle(lab, ranked[:FINALISTS], tolerance, result, judged, say)
        return result
    if networks is not None:
        result.best = _by_networks(lab, networks, ranked[:FINALISTS], keep, result.network_accuracy, say)
    result.judgement = judged(result.best, keep)
    return result


def _scored(pool: Pool) -> np.ndarray:
    """Rows of the images that all tables score: a recipe never keeps others, and its lists would be smaller than the
    random ones, and lose to them by that alone."""
    has = np.ones(len(pool), bool)
    for name, scores in pool.tables.items():
        mine = ~np.isnan(np.asarray(scores, float))
        if not mine.any():
            raise UsageError(f"--scores {name}: gives none of the images a score; leave it out")
        if missing := int((~mine).sum()):
            warn(f"{name} lacks {missing:,} of {len(pool):,} images: recipes are compared on those that it scores")
        has &= mine
    return np.flatnonzero(has)


def _divided(
    labels: np.ndarray, rows: np.ndarray, test: Pool | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows that choose, rows that judge); None: the test set judges."""
    if test is not None:
        return rows, None
    held = halving.fold_of(labels[rows], 0, seed + 977)
    return rows[~held], rows[held]


def _standings(
    lab: _Lab, everyone: Sequence[Candidate], keep: float, rounds: Sequence[int], say: Say
) -> list[Standing]:
    """All of them, compared by heads on splits."""

    def told(number: int, alive: list[Standing]) -> None:
        lead = ", ".join(f"{everyone[one.number].name} {100 * one.mean:.2f}" for one in alive[:3])
        say(f"round {number} of {len(rounds)}: {len(alive)} compared on {many(rounds[number - 1], 'split')}; {lead}")

    def measure(number: int, split: int) -> float:
        return lab.on_split(lab.heads, everyone[number], keep, split)

    return halving.halve(len(everyone), measure, references=range(len(REFERENCES)), rounds=rounds, on_round=told)


def _settle(
    lab: _Lab,
    finalists: list[Candidate],
    tolerance: float,
    result: Tuned,
    judged: Callable[[Candidate, float], Judgement],
    say: Say,
) -> None:
    """Note in the result the smallest fraction within the tolerance, by a recipe where that beats random lists, and
    what the images that judge say; where they find a recipe's list worse than random ones, random lists count."""
    lab.remember(AUTO_SPLITS)
    found = _smallest(lab, finalists, tolerance, result.curve, say)
    plain = _smallest(lab, list(REFERENCES), tolerance, result.random_curve, say)
    for one in (found, plain) if found and (plain is None or found.keep < plain.keep) else (plain,):
        if one is None:
            result.keep, result.judgement = 1.0, None
            return
        result.keep, result.best = one.keep, one.candidate
        result.judgement = judged(one.candidate, one.keep)
        if not result.judgement.worse:
            return


def _check_vectors(pool: Pool, test: Pool | None, alike: bool) -> None:
    """Refuse vectors that are no numbers, and a test set of others than the pool's where heads are tested on it."""
    if alike and test is not None and test.vectors.shape[1:] != pool.vectors.shape[1:]:
        raise UsageError(f"vectors of {pool.vectors.shape[1]} numbers, and {test.vectors.shape[1]} of the test set")
    for name, one in (("the training set", pool), ("the test set", test)):
        if one is not None:
            check_finite(name, one.vectors, one.paths)


def _check(pool: Pool, rows: np.ndarray, choosers: int, keep: float) -> None:
    kept, least = _kept(choosers, keep), _least(pool)
    if keep == 1:
        raise UsageError("--keep 1: keeps every image, whatever the recipe; give a smaller fraction")
    if kept < least:
        raise UsageError(
            f"--keep {keep:g}: a split of {len(rows):,} images would keep {kept}, too few to compare anything; keep "
            f"{least} at least, or take random images"
        )
    if without := int((pool.labels < 0).sum()):
        raise UsageError(f"{many(without, 'image has', 'images have')} no class (label -1); leave such images out")
    sizes = np.bincount(pool.labels[rows], minlength=len(pool.classes))
    if len(pool.classes) < 2 or np.sort(sizes)[-2] < 2:
        raise ProtopruneError("comparing recipes needs two classes with two images or more")


def _kept(choosers: int, keep: float) -> int:
    """How many images a recipe keeps of a split."""
    return round(keep * round(choosers * (1 - 1 / halving.FOLDS)))


def _least(pool: Pool) -> int:
    return max(LEAST, len(pool.classes))


def _by_networks(
    lab: _Lab, networks: Judge, finalists: list[Candidate], keep: float, found: dict[str, float], say: Say
) -> Candidate:
    """The best of the finalists by networks, on further splits of the images that choose."""
    for one in finalists:
        found[one.name] = float(np.mean([lab.on_split(networks, one, keep, split) for split in range(NETWORK_SPLITS)]))
        say(f"{one.name}: {100 * found[one.name]:.2f} % by networks")
    return max(finalists, key=lambda one: found[one.name])


def _smallest(lab: _Lab, tried: list[Candidate], tolerance: float, curve: list[Point], say: Say) -> Point | None:
    """The smallest fraction whose cost is below the tolerance with its whole interval, as all larger ones' are.

    At each the cost is that of the best of `tried` there.
    """
    everything = np.array([lab.everything(split) for split in range(AUTO_SPLITS)])

    def point(keep: float) -> Point:
        rows = np.empty((len(tried), AUTO_SPLITS))
        for split in range(AUTO_SPLITS):  # the part of a split is made once for all of them
            rows[:, split] = [lab.on_split(lab.heads, one, keep, split) for one in tried]
        best = int(np.argmax(np.mean(rows, axis=1)))
        found = Point(keep, tried[best], float(np.mean(rows[best])), judging.resampled(everything - rows[best]))
        curve.append(found)
        curve.sort(key=lambda one: -one.keep)
        low, high = found.cost.ends
        say(
            f"{keep:.0%} kept: {100 * found.accuracy:.2f} %, costs {100 * found.cost.mean:.2f} points "
            f"({100 * low:.2f} to {100 * high:.2f}) by {found.candidate.name}"
        )
        return found

    good: Point | None = None
    bad: float | None = None
    for keep in FRACTIONS:
        if _kept(len(lab.choosers), keep) < _least(lab.pool):
            break
        found = point(keep)
        if found.cost.ends[1] >= tolerance:
            bad = keep
            break
        good = found
    while good is not None and bad is not None and good.keep - bad > 1.5 * STEP:
        middle = point(round((good.keep + bad) / 2, 2))
        good, bad = (middle, bad) if middle.cost.ends[1] < tolerance else (good, middle.keep)
    return good


class _Lab:
    """Applies recipes to parts of the images that choose, and asks judges."""

    def __init__(self, pool: Pool, choosers: np.ndarray, heads: Judge, log: Log, seed: int) -> None:
        self.pool, self.choosers, self.heads, self.log, self.seed = pool, choosers, heads, log, seed
        self._split = lru_cache(1)(self._make_split)
        self._ranks: dict[int, Ranks] = {}  # by split, of those that are visited again

    def remember(self, splits: int) -> None:
        """Keep the orders of these splits from now on, for other fractions of them."""
        self._split.cache_clear()
        self._ranks = {split: {} for split in range(splits)}

    def _make_split(self, split: int) -> tuple[Part, np.ndarray]:
        held = halving.fold_of(self.pool.labels[self.choosers], split, self.seed)
        part = Part(self.pool, self.choosers[~held], self.seed + split, self._ranks.get(split))
        return part, self.choosers[held]

    def on_split(self, judge: Judge, one: Candidate, keep: float, split: int) -> float:
        """Accuracy on the held-out fold of a split, trained on what the recipe keeps of the rest."""
        key = f"{self.seed} {judge.name} {one} {float(keep)} {split}"

        def compute() -> np.ndarray:
            part, held = self._split(split)
            return judge.answers(part.select(one, keep), held, split)

        return float(self.log.answers(key, compute).mean())

    def everything(self, split: int) -> float:
        def compute() -> np.ndarray:
            part, held = self._split(split)
            return self.heads.answers(part.rows, held, split)

        return float(self.log.answers(f"{self.seed} {self.heads.name} everything {split}", compute).mean())

    def judge(self, judge: Judge, one: Candidate, keep: float, judges: np.ndarray | None, seeds: int) -> Judgement:
        """The recipe's list of the images that choose, and as many random ones, by the images that do not."""
        part = Part(self.pool, self.choosers, seed=self.seed)

        def asked(name: str, number: int, rows: Callable[[], np.ndarray]) -> np.ndarray:
            key = f"{self.seed} {judge.name} {name} {float(keep)} judged {number}"
            return self.log.answers(key, lambda: judge.answers(rows(), judges, number))

        right: dict[str, list[np.ndarray]] = {"list": [], "random": [], "balanced": [], "everything": []}
        for number in range(seeds):
            right["list"].append(asked(str(one), number, lambda: part.select(one, keep)))
            for name, other in (("random", RANDOM), ("balanced", BALANCED)):
                drawn = self.seed + _DRAWS + number
                right[name].append(asked(str(other), number, partial(part.select, other, keep, drawn)))
        for number in range(min(seeds, 2)):
            right["everything"].append(asked("everything", number, lambda: part.rows))
        return judging.judge({name: np.stack(rows) for name, rows in right.items()})


def _line_digest(key: str, right: str) -> str:
    return hashlib.sha256(f"{key} {right}".encode()).hexdigest()[:16]


class Log:
    """Answers that were given before, a JSON line each; a line that a killed run left half-written is none."""

    def __init__(self, folder: str | os.PathLike[str] | None, pool: Pool, test: Pool | None = None) -> None:
        if folder is not None:
            refuse_url(folder)
        self.path = None if folder is None else Path(folder, "runs.jsonl")
        self._found: dict[str, str] = {}
        if self.path is None:
            return
        self._identity = f"{_fingerprint(pool)} {test and _fingerprint(test)} {protoprune.__version__} "
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    one = parse_json(line)
                    if one["digest"] == _line_digest(one["key"], one["right"]):  # damage costs a training only
                        self._found[one["key"]] = one["right"]
                except (ValueError, KeyError, TypeError):
                    continue

    def answers(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """(images,) bool: those kept under this key, else computed and kept."""
        if self.path is None:
            return compute()
        name = hashlib.sha256((self._identity + key).encode()).hexdigest()[:24]
        if name in self._found:
            count, _, packed = self._found[name].partition(" ")
            return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=int(count)).astype(bool)
        right = np.asarray(compute(), bool)
        self._found[name] = f"{len(right)} {base64.b64encode(np.packbits(right).tobytes()).decode()}"
        one = {"key": name, "right": self._found[name], "digest": _line_digest(name, self._found[name])}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # now, and not for a run that is refused
            with open(self.path, "a") as file:
                fresh = file.tell() == 0 or self._ended(self.path)
                file.write(("" if fresh else "\n") + json.dumps(one) + "\n")
        except OSError as error:
            raise ProtopruneError(f"{self.path}: cannot write ({error.strerror}); choose another -o") from None
        return right

    @staticmethod
    def _ended(path: Path) -> bool:
        """Whether the last line is whole."""
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _fingerprint(pool: Pool) -> str:
    digest = hashlib.sha256("\0".join([*pool.classes, "", *pool.paths]).encode("utf-8", "surrogateescape"))
    for array in (pool.labels, pool.vectors, *(pool.tables[name] for name in sorted(pool.tables))):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
