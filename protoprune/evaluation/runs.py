"""Training runs that differ by what they train on: planned, keyed, done once, and taken up again where they stopped.

A run is (rows or a sampler, weights, seed, steps). Networks train for so many steps; a linear head is trained until its
loss falls no further, so that its accuracy says nothing of the length of a training. The result of a run is one small
JSON file named by the sha256 of everything that determines it: both sets' contents, recipe, rows, weights, sampler,
seed, steps, versions and the kind of device. What this module does not know: which runs are worth comparing, and what
their accuracies mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import protoprune
from protoprune.arguments import checked, texts
from protoprune.bounds import check_number, check_whole, shown
from protoprune.device import resolve_device, warn_if_emulated
from protoprune.errors import ProtopruneError, UsageError
from protoprune.files import make_folder, write_file
from protoprune.paths import of_rows
from protoprune.stores import is_url
from protoprune.text import as_known, parse_json, with_slashes
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.samplers import PruningSampler
    from protoprune.training.examples import Examples
    from protoprune.training.loop import Recipe

FORMAT = 3  # one more whenever the training itself changes
MIN_STEPS = 500  # optimizer steps that every network takes at least: fewer would judge the length of training
BUDGETS = ("epochs", "steps")
CONVERGENCE = "convergence"  # what takes the place of a budget for linear heads
DYNAMIC = {
    "random": "RandomDynamicSampler",
    "egreedy": "EpsilonGreedySampler",
    "ucb": "UCBSampler",
    "infobatch": "InfoBatchSampler",
    "rs2": "RS2Sampler",
}
_BELOW_MEAN = 2 / 3  # share of the losses below their mean that InfoBatch's number of epochs is foreseen with
_FALL = 0.05  # share by which the training loss must fall over the last tenth of the steps to be called falling
_SUBSETS = 0x5AB5  # keeps the draws of subsets apart from the other things that a seed decides


@dataclass(frozen=True)
class Run:
    """One training run. `method` is what its results are filed under, and not part of its key."""

    method: str
    seed: int
    rows: np.ndarray | None = None  # (m,) int64 ascending; None: all
    weights: np.ndarray | None = None  # (n,) float32 loss weights
    steps: int | None = None  # None: the recipe's epochs
    sampler: dict[str, Any] | None = None  # in place of rows: {"name": one of DYNAMIC, "keep": fraction, its options}


@dataclass(frozen=True)
class Outcome:
    """What a run has left."""

    accuracy: float
    correct: list[int]  # a class
    total: list[int]  # test images of each class
    seconds: float  # of training alone
    steps: int
    curve: list[list[float]]  # [epoch, training seconds, accuracy] after each epoch, where asked for
    right: str  # hexadecimal: a bit for each test image, 1 where it is right
    fall: float = 0.0  # share by which the training loss still fell over the last tenth of the steps; 0 for none
    converged: bool = True  # of a head: whether its fit ended by the gradient
    strength: float | None = None  # of a head's regularisation, see training.converged
    cached: bool = False

    def correct_images(self) -> np.ndarray:
        """(n_test,) bool: which test images are right."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=sum(self.total)).astype(bool)

    def class_accuracy(self) -> list[float | None]:
        """(classes,) share of each class that is right; None for a class without test images."""
        return [right / of if of else None for right, of in zip(self.correct, self.total, strict=True)]


class Fitted(Protocol):
    """What is asked of a finished training: `training.loop.Fit` has it."""

    @property
    def predictions(self) -> np.ndarray: ...  # (n_test,) int64

    @property
    def seconds(self) -> float: ...

    @property
    def steps(self) -> int: ...

    @property
    def losses(self) -> Sequence[float] | np.ndarray: ...  # one a step


Fit = Callable[..., Fitted]  # (train, test, recipe, rows, weights, seed, steps, device, ...), as `training.loop.fit`


@dataclass(frozen=True)
class Step:
    """Where a series of runs stands, after one of them."""

    done: int
    total: int
    cached: int  # of those done, found in the folder
    run: Run
    outcome: Outcome
    seconds_left: float | None  # None until a run has been timed


def random_rows(n: int, size: int, seed: int) -> np.ndarray:
    """(size,) rows of n at random, ascending: the first of one permutation a seed, so smaller sets lie in larger."""
    return np.sort(np.random.default_rng([_SUBSETS, seed]).permutation(n)[:size])


def matched_rows(labels: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """Rows at random, ascending, `counts` of each class: the first of it in the permutation of `random_rows`."""
    order = np.random.default_rng([_SUBSETS, seed]).permutation(len(labels))
    own = np.asarray(labels)[order]
    return np.sort(np.concatenate([order[own == label][:count] for label, count in enumerate(counts)]))


@checked
def list_rows(listed: Sequence[str] | np.ndarray, examples: Examples, name: str) -> np.ndarray:
    """The rows, (m,) int64 ascending, of a list's paths, or of row indices into the examples' `every_path`.

    Raises ProtopruneError when the list names what is not among the examples, names it twice, or names nothing.
    """
    check_examples("examples", examples)
    if isinstance(listed, np.ndarray) and listed.dtype.kind in "iufb":
        listed = of_rows(listed, getattr(examples, "every_path", None) or examples.paths, name, "training set")
    row_of = {path: row for row, path in enumerate(examples.paths)}
    listed = _relative(texts(name, listed), examples, row_of)
    missing = [path for path in listed if path not in row_of]
    if missing:
        of = f"of its {len(listed):,} images"
        why, advice = _why_not(missing[0], examples)
        some = many(len(missing), f"{of} is no usable training image", f"{of} are not usable training images")
        raise ProtopruneError(f"{name}: {some} of {examples.root} (first: {missing[0]} {why}); {advice}")
    if not listed:
        raise ProtopruneError(f"{name}: lists no image")
    rows = np.unique([row_of[path] for path in listed])
    if len(rows) < len(listed):
        raise ProtopruneError(
            f"{name}: {many(len(listed) - len(rows), 'image is', 'images are')} listed more than once; list each once"
        )
    return rows


def _why_not(path: str, examples: Examples) -> tuple[str, str]:
    """Why an image cannot be trained on, and what to do."""
    reasons = dict(getattr(examples, "unreadable", ()))
    if path in reasons:
        return f"cannot be read: {reasons[path]}", "leave out what cannot be trained on"
    if path in (getattr(examples, "every_path", None) or ()):
        return "has no class", "leave out what cannot be trained on, or give it a class"
    return "is not there", "lists hold paths relative to the training set's root"


def list_weights(weights: dict[str, float], rows: np.ndarray, examples: Examples, name: str) -> np.ndarray:
    """(m,) loss weights of the rows of a list, from a weight a path. Raises ProtopruneError where one is missing."""
    known = set(examples.paths)
    by_path = dict(zip(_relative(list(weights), examples, known), weights.values(), strict=True))
    missing = [examples.paths[row] for row in rows if examples.paths[row] not in by_path]
    if missing:
        of = f"of {len(rows):,} images"
        raise ProtopruneError(
            f"{name}: {many(len(missing), f'{of} has', f'{of} have')} no weight (first: {missing[0]}); give each one"
        )
    return np.array([by_path[examples.paths[row]] for row in rows], np.float32)


def _relative(listed: Sequence[str], examples: Examples, known: Collection[str]) -> list[str]:
    """Entries of a list as the examples' paths are, whether they are absolute, begin with ./ or have backslashes."""
    if is_url(examples.root):
        base = f"{examples.root.rstrip('/')}/"
        return [path.removeprefix(base).removeprefix("./") for path in with_slashes(listed, known.__contains__)]
    return as_known(listed, os.path.join(os.path.abspath(examples.root), ""), known)


def run_all(
    runs: Sequence[Run],
    train: Examples,
    test: Examples,
    recipe: Recipe,
    *,
    folder: str | os.PathLike[str] | None = None,
    fit: Fit | None = None,
    device: str = "auto",
    curves: bool = False,
    on_run: Callable[[Step], None] | None = None,
) -> list[Outcome]:
    """The outcome of each run, in order: from `folder` where it is there, else trained and, with a folder, kept.

    train, test: `training.Examples`; recipe: `training.loop.Recipe`; fit: takes the place of `training.loop.fit`
    (tests). Runs with the same key are done once. With `curves` the accuracy after each epoch is recorded too, and a
    kept result without it does not count. `on_run` is called after each run.
    """
    from protoprune.training import loop

    fit = fit or (_head_fit() if to_convergence(recipe) else loop.fit)
    shared = shared_key(train, test, recipe, device)
    keys = [{**shared, **_own_key(run)} for run in runs]
    names = [hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest() for key in keys]
    known = {name: _read(folder, name, key, curves) for name, key in zip(names, keys, strict=True)}
    if None in known.values():
        warn_if_emulated(shared["computes_in"], resolve_device(device))
    clock = _Clock({name: _planned_steps(run, len(train.paths), recipe) for name, run in zip(names, runs, strict=True)
                    if known[name] is None})  # fmt: skip
    outcomes, cached = [], 0
    with contextlib.nullcontext() if folder is None else _made(folder):
        for number, (run, name, key) in enumerate(zip(runs, names, keys, strict=True), 1):
            outcome = known[name]
            if outcome is not None:
                cached += 1
            else:
                began = time.perf_counter()
                outcome = _train(run, train, test, recipe, fit, device, curves)
                clock.measured(name, time.perf_counter() - began)
                _write(folder, name, key, outcome, run)
                known[name] = dataclasses.replace(outcome, cached=True)
            outcomes.append(outcome)
            if on_run:
                on_run(Step(number, len(runs), cached, run, outcome, clock.left()))
    return outcomes


def _train(run: Run, train: Examples, test: Examples, recipe: Recipe, fit: Fit, device: str, curves: bool) -> Outcome:
    labels, classes = np.asarray(test.labels), len(train.classes)
    curve: list[list[float]] = []

    def note(epoch: int, seconds: float, predictions: np.ndarray) -> None:
        curve.append([int(epoch), float(seconds), float(np.mean(np.asarray(predictions) == labels))])

    how: dict[str, Any] = {
        "rows": run.rows,
        "weights": run.weights,
        "seed": run.seed,
        "steps": run.steps,
        "device": device,
    }
    if run.sampler is not None:
        sizes: dict[str, Any] = {"n": len(train.paths), "steps": run.steps, "batch_size": recipe.batch_size}
        how["sampler"] = make_sampler(**run.sampler, **sizes, seed=run.seed)
    if curves:
        how["on_epoch"] = note
    result = fit(train, test, recipe, **how)
    right = np.asarray(result.predictions) == labels
    return Outcome(
        float(right.mean()),
        np.bincount(labels[right], minlength=classes).tolist(),
        np.bincount(labels, minlength=classes).tolist(),
        float(result.seconds),
        int(result.steps),
        curve,
        np.packbits(right).tobytes().hex(),
        loss_fall(result.losses),
        getattr(result, "converged", True),
        getattr(result, "strength", None),
    )


def loss_fall(losses: Sequence[float] | np.ndarray) -> float:
    """Share by which the training loss, one a step, was lower in the last tenth of the steps than in the tenth before.

    0 where that is less than a twentieth, within its noise (two standard errors), or of a loss that is next to nothing.
    """
    each = np.asarray(losses, np.float64)
    tenth = len(each) // 10
    if tenth < 2:
        return 0.0
    before, last = each[-2 * tenth : -tenth], each[-tenth:]
    gap, noise = before.mean() - last.mean(), np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / tenth)
    share = gap / max(before.mean(), 1e-9)
    return float(share) if share > _FALL and gap > 2 * noise and gap > 0.01 else 0.0


def warnings_of(outcomes: Sequence[tuple[str, Outcome]]) -> list[str]:
    """What a reader of (method, outcome) must know: which runs ended while their training loss still fell."""
    falling = [(method, one) for method, one in outcomes if one.fall > 0]
    unfinished = [(method, one) for method, one in outcomes if not one.converged]
    notes = []
    if falling:
        largest = 100 * max(one.fall for _, one in falling)
        notes.append(
            f"the training loss still fell at the end of {_which(falling, outcomes)}, by up to {largest:.0f} % over "
            "the last tenth of their steps: they are judged by the length of training too; train longer, with --epochs "
            "or --min-steps"
        )
    if unfinished:
        notes.append(f"the fit did not converge in {_which(unfinished, outcomes)}; do not rely on their accuracies")
    return notes


def _which(some: Sequence[tuple[str, Outcome]], outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """'5 of 20 runs (a.txt: 2 of 4, random 300: 3 of 4)'."""
    counts, of = (Counter(method for method, _ in those) for those in (some, outcomes))
    shown = [f"{method}: {count} of {of[method]}" for method, count in counts.items()]
    more = f" and {len(shown) - 8:,} more" if len(shown) > 8 else ""
    return f"{len(some):,} of {len(outcomes):,} runs ({', '.join(shown[:8])}{more})"


def make_sampler(
    name: str, keep: float, *, n: int, seed: int, steps: int, batch_size: int, **options: Any
) -> PruningSampler:
    """A sampler of `protoprune.samplers` over n rows; `options` are those of its class.

    InfoBatch ends with full data and so has to know its number of epochs, which depends on the losses: it is foreseen
    from the steps, with two thirds of the losses below their mean.
    """
    check_dynamic({"name": name, "keep": keep})
    from protoprune import samplers

    if name == "infobatch" and "epochs" not in options:
        from protoprune.training.loop import steps_per_epoch

        epoch = steps_per_epoch(round(n * (1 - _BELOW_MEAN * (1 - keep))), batch_size)
        options = {"epochs": max(1, round(steps / epoch)), **options}
    return getattr(samplers, DYNAMIC[name])(n, keep, seed=seed, **options)


def check_dynamic(sampler: dict[str, Any]) -> None:
    """Raise UsageError for a dynamic method that is not known, or a fraction out of range."""
    if not isinstance(sampler, Mapping):
        raise UsageError(f"dynamic: holds {shown(sampler)}, expected dicts of name, keep and options")
    if not isinstance(sampler.get("name"), str) or sampler["name"] not in DYNAMIC:
        raise UsageError(f"--dynamic {sampler.get('name')}: expected one of {', '.join(DYNAMIC)}")
    check_number("--keep", sampler.get("keep", 0), 0, 1, ", the fraction to keep", above=True)
    if "every" in sampler:
        check_whole("--every", sampler["every"])


def kept_count(keep: float, n: int) -> int:
    """round(keep * n) and at least 1, as lists are cut."""
    return max(1, round(keep * n))


def to_convergence(recipe: Recipe) -> bool:
    """Whether a recipe's model is a linear head, which is trained until its loss falls no further."""
    return recipe.model == "head" and not recipe.hidden


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe that changes a run, as plain values."""
    if to_convergence(recipe):
        from protoprune.training import converged

        return {"model": recipe.model, "fit": converged.VERSION, "strengths": list(converged.STRENGTHS)}
    from protoprune.training.models import file_digest

    settings = dataclasses.asdict(recipe)
    return {**settings, "weights": file_digest(settings["weights"])} if settings.get("weights") else settings


def check_recipe(recipe: Recipe, budget: str | None, min_steps: int | None, device: str = "auto") -> None:
    """UsageError for a budget, device or file of weights that there is not, and for settings of a training's length
    where it has none."""
    from protoprune.training.loop import Recipe

    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe {shown(recipe)}: expected a Recipe, such as Recipe.for_model('head')")
    resolve_device(device)
    if recipe.weights is not None and not os.path.isfile(recipe.weights):
        raise UsageError(f"--weights {recipe.weights}: no such file")
    if budget is not None and budget not in BUDGETS:
        raise UsageError(f"--budget {budget}: expected epochs (passes over the subset) or steps (of the optimizer)")
    if min_steps is not None:
        check_whole("--min-steps", min_steps)
    if not to_convergence(recipe):
        return
    own, usual = vars(recipe), vars(Recipe.for_model("head"))
    given = {name: own[name] for name in own if own[name] != usual[name]} | {"budget": budget, "min_steps": min_steps}
    idle = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None]
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: a linear head is trained to convergence, and this changes nothing; leave it out, or "
            "train a small network on the features with --hidden 256"
        )


def check_examples(name: str, examples: object) -> None:
    """UsageError for what is no set of examples."""
    if not all(hasattr(examples, what) for what in ("paths", "labels", "classes")):
        raise UsageError(f"{name} {shown(examples)}: expected what load_examples(…) gives")


def check_sets(train: Examples, test: Examples) -> None:
    """UsageError unless a model trained on the one set can be tested on the other."""
    from protoprune.clustering.vectors import check_finite
    from protoprune.training.examples import check_same_inputs, warn_of_shared

    for name, one in (("train", train), ("test", test)):
        check_examples(name, one)
    if list(train.classes) != list(test.classes):
        raise UsageError("the test set has other classes than the training set; load it with the same ones")
    if not len(test.labels):
        raise UsageError("the test set is empty; give one with labelled images")
    check_same_inputs(train, test)
    for name, one in (("the training set", train), ("the test set", test)):
        if one.vectors:
            check_finite(name, one.inputs.numpy(), one.paths)
    warn_of_shared(train, test)


def steps_for(rows: int, recipe: Recipe, min_steps: int | None = 1) -> int | None:
    """Optimizer steps of the recipe's epochs over so many rows, at least `min_steps` (None: MIN_STEPS); None for a
    linear head, whose training has no length."""
    from protoprune.training.loop import steps_per_epoch

    if to_convergence(recipe):
        return None
    own = recipe.epochs * steps_per_epoch(rows, recipe.batch_size)
    return max(own, MIN_STEPS if min_steps is None else min_steps)


def _planned_steps(run: Run, n: int, recipe: Recipe) -> int:
    rows = n if run.rows is None else len(run.rows)
    return run.steps or steps_for(rows, recipe) or rows


class _Clock:
    """Time left, from the seconds a step of the runs done here."""

    def __init__(self, steps: dict[str, int]) -> None:
        self.waiting = dict(steps)  # name of a run to do -> its steps
        self.seconds = self.stepped = 0.0

    def measured(self, name: str, seconds: float) -> None:
        self.seconds += seconds
        self.stepped += self.waiting.pop(name)

    def left(self) -> float | None:
        return self.seconds / self.stepped * sum(self.waiting.values()) if self.stepped else None


@dataclass(frozen=True)
class _HeadFit:
    """What `training.loop.Fit` is for a network."""

    predictions: np.ndarray
    seconds: float
    steps: int  # evaluations of the loss
    converged: bool
    strength: float
    losses: Sequence[float] = ()


def _head_fit() -> Fit:
    """A function like `training.loop.fit`, which prepares the training vectors once, at its first call."""
    from protoprune.training import converged

    space = None

    def fit(
        train: Examples,
        test: Examples,
        recipe: Recipe,
        *,
        rows: np.ndarray | None,
        weights: np.ndarray | None,
        seed: int,
        steps: int | None,
        device: str,
    ) -> _HeadFit:
        nonlocal space
        if space is None:
            where = resolve_device(device)
            space = converged.Space(train.inputs, device=where if where.type == "cuda" else "cpu")  # mps has no float64
        began = time.perf_counter()
        head = converged.fit_head(space, train.labels, len(train.classes), rows=rows, weights=weights, seed=seed)
        seconds = time.perf_counter() - began
        return _HeadFit(head.predict(test.inputs), seconds, head.evaluations, head.converged, head.strength)

    return fit


# --- keys and kept results -------------------------------------------------------------------------------------------


def shared_key(train: Examples, test: Examples | None, recipe: Recipe, device: str) -> dict[str, Any]:
    """All that decides what a training comes to, but its rows, weights, sampler, seed and steps; plain values."""
    import torch

    from protoprune.training.loop import computes_in

    return {
        "format": FORMAT,
        "train": train.fingerprint(),
        "test": test and test.fingerprint(),
        "recipe": settings_of(recipe),
        "device": device_kind(device),
        "computes_in": computes_in(recipe.precision, resolve_device(device), recipe.model),
        "torch": torch.__version__,
        "protoprune": protoprune.__version__,
    }


def _own_key(run: Run) -> dict[str, Any]:
    return {
        "rows": _digest(run.rows, np.int64),
        "weights": _digest(run.weights, np.float64),
        "sampler": run.sampler,
        "seed": run.seed,
        "steps": run.steps,
    }


def _digest(array: np.ndarray | None, kind: type[np.generic]) -> str | None:
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array, kind).tobytes()).hexdigest()


def device_kind(device: str) -> str:
    """'cpu', or the name of the GPU that `device` stands for."""
    import torch

    found = resolve_device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


@contextlib.contextmanager
def _made(folder: str | os.PathLike[str]) -> Iterator[None]:
    """The folder, made where it was not there; it goes again where the first run fails already."""
    new = [one for one in (folder, os.path.dirname(folder)) if one and not os.path.isdir(one)]
    make_folder(folder)
    try:
        yield
    except BaseException:
        for one in new:
            with contextlib.suppress(OSError):  # it holds results
                os.rmdir(one)
        raise


def _read(folder: str | os.PathLike[str] | None, name: str, key: dict[str, Any], curves: bool) -> Outcome | None:
    """The kept result; none, a damaged one or one without the curve asked for costs a run, never the answer."""
    if folder is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = parse_json(Path(folder, f"{name}.json").read_text())
        if kept["key"] == key and kept["digest"] == _result_digest(key, kept["outcome"]):
            outcome = Outcome(**kept["outcome"], cached=True)
            return outcome if outcome.curve or not curves else None
    return None


def _write(folder: str | os.PathLike[str] | None, name: str, key: dict[str, Any], outcome: Outcome, run: Run) -> None:
    if folder is None:
        return
    result = {k: v for k, v in dataclasses.asdict(outcome).items() if k != "cached"}
    kept = {"method": run.method, "key": key, "outcome": result, "digest": _result_digest(key, result)}
    text = json.dumps(kept, indent=1)
    write_file(os.path.join(folder, f"{name}.json"), text.encode())


def _result_digest(key: dict[str, Any], outcome: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, outcome], sort_keys=True).encode()).hexdigest()
