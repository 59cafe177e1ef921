"""Every metric by name, and `score`: training record or feature file -> one float32 a row, larger = harder.

A record is read one model at a time, and each model in blocks of rows: at 1.28 million examples x 90 epochs a few
numbers an example and BLOCK_BYTES of the record are in memory, and the subset masks (a byte an example and model). What
this module does not know: how a record or a feature file is made, and who is kept.

Models that were trained on subsets: metrics of training dynamics average over the models that were trained on an
example (`models="trained"`), since a model that never sees an example cannot forget or learn it. Memorization and
influence compare both sides. DDD asks the models that did not see the example, as its authors did with validation
images, and refuses a record whose models all saw everything. Ensemble active learning lets all models vote. An example
that no such model counts for is NaN.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from protoprune.arguments import checked
from protoprune.bounds import check_seed, check_whole
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.metrics import dynamics, ensembles, geometry

if TYPE_CHECKING:
    from protoprune.pruning.ranking import Source
    from protoprune.records import Record

# EL2N and GraNd are early scores: Data Diet (Paul et al. 2021) takes them from epoch 10 to 20 of 200. A shorter
# training is scored at its end: networks of 10 epochs find planted label noise better there than in their middle, by 3
# to 6 points of AUC on three data sets, and heads find it no better after epoch 10 (docs/metrics.md).
EARLY_EPOCH = 10
Reduce = Callable[[np.ndarray, np.ndarray], np.ndarray]  # values (epochs, b), labels (b,) -> (b,)
MODELS = ("trained", "held-out", "all")
BLOCK_BYTES = 64 << 20  # of a record, or of vote counts, held at a time


class Scored(NamedTuple):
    """Scores and what they were computed from."""

    values: np.ndarray  # (n,) float32, larger = harder, NaN where there is none
    used: dict[str, Any]  # plain values: models, epochs, options; goes into the score table's header


@dataclass(frozen=True)
class Metric:
    """One line of `protoprune metrics`."""

    function: Callable[..., Scored]
    needs: str  # 'record', 'features' or 'nothing' (any list of images)
    labels: bool  # whether class labels are needed
    training: bool  # whether models have to be trained on the images
    cost: str
    source: str  # the paper
    summary: str
    statistics: tuple[str, ...] = field(default=())  # what the record must hold

    @property
    def options(self) -> dict[str, object]:
        """The function's options and their defaults."""
        found = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in found if one.kind is one.KEYWORD_ONLY}


@checked
def score(name: str, source: str | os.PathLike[str] | Record | Source, **options: Any) -> Scored:
    """Scores of metric `name` from an open Record or FeatureFile, whichever it needs, or the path of one; None options
    mean the default.

    Raises UsageError for an unknown metric, an option that it does not have, a file of the wrong kind, or a record
    without what it needs, and ProtopruneError when no row gets a score.
    """
    metric = lookup(name)
    if isinstance(source, str | os.PathLike):
        with open_source(metric, source) as file:
            return score(name, file, **options)
    _check_kind(name, metric, source)
    given = {key: value for key, value in options.items() if value is not None}
    _check_options(name, metric, given)
    missing = [one for one in metric.statistics if one not in getattr(source, "statistics", ())]
    if missing:
        raise UsageError(
            f"{name} needs {', '.join(missing)}, which {source.path} does not hold; record again"
            + (" with --gradients" if "gradient_norm" in missing else "")
            + (" with --probabilities" if "probability" in missing else "")
        )
    scored = metric.function(source, **given)
    scored = scored._replace(values=scored.values + np.float32(0))  # -0 is 0
    if len(scored.values) and np.isnan(scored.values).all():
        raise ProtopruneError(f"{name}: {source.path} gives no image a score; {_why_none(metric)}")
    return scored


def _check_options(name: str, metric: Metric, given: dict[str, Any]) -> None:
    for key in given:
        if key not in metric.options:
            able = ", ".join(sorted(other for other in METRICS if key in METRICS[other].options))
            raise UsageError(f"--{key} does not go with {name}; it goes with {able or 'no metric'}")
    if "seed" in given:
        check_seed(given["seed"])
    for key in ("k", "window"):
        check_whole(f"--{key}", given.get(key, 1))
    check_whole("--epoch", given.get("epoch", 0), 0)


def open_source(metric: Metric, path: str | os.PathLike[str], is_record: bool | None = None) -> Record | Source:
    """The file that a metric reads, opened: a training record or a feature file; for a metric that takes either
    `is_record` says which, and without it the file itself."""
    from protoprune.features import seals
    from protoprune.features.opening import open_features
    from protoprune.records import KIND, Record

    if metric.needs != "nothing":
        is_record = metric.needs == "record"
    if is_record is None:
        name = os.fspath(path)
        is_record = KIND.format in (seals.format_of(name), seals.format_of(f"{name}.partial"))
    return Record(path) if is_record else open_features(path)


def _check_kind(name: str, metric: Metric, source: object) -> None:
    """UsageError for what the metric cannot read, told by what it offers: anything that reads like a record will do."""
    kinds = {"record": ("a training record", "epoch_numbers"), "features": ("a feature file", "usable")}
    is_a = next((what for what, sign in kinds.values() if hasattr(source, sign)), None)
    if is_a is None or (metric.needs in kinds and is_a != kinds[metric.needs][0]):
        wanted = kinds[metric.needs][0] if metric.needs in kinds else "a training record or a feature file"
        got = f"{getattr(source, 'path', 'it')} is {is_a}" if is_a else f"got a {type(source).__name__}"
        maker = "record" if metric.needs == "record" else "embed"
        raise UsageError(f"{name} needs {wanted}, and {got}; give the file that `protoprune {maker}` wrote")


@checked
def lookup(name: str) -> Metric:
    """The metric of that name; a close one is suggested otherwise."""
    if name not in METRICS:
        import difflib

        near = difflib.get_close_matches(name, METRICS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no metric is called {name!r}; {hint}`protoprune metrics` lists them")
    return METRICS[name]


def _why_none(metric: Metric) -> str:
    if metric.needs != "record":
        return "none of its images is usable" + (" and has a class" if metric.labels else "")
    return "too few models, or --models asks for those that are not there"


# --- reading a record ------------------------------------------------------------------------------------------------


def _blocks(n: int, row_bytes: int) -> Iterator[slice]:
    """Slices of the rows, each of BLOCK_BYTES or one row."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, n, rows):
        yield slice(first, min(n, first + rows))


def _read(record: Record, statistic: str, model: int, epochs: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, values (epochs, b)) of one model, in blocks of rows."""
    for rows in _blocks(record.n, 8 * record.epochs):
        yield rows, record.read(statistic, model, rows, epochs)


def _members(record: Record, models: str) -> Iterator[tuple[int, np.ndarray]]:
    """(model, (n,) bool: the examples it counts for), without models that count for none."""
    if models not in MODELS:
        raise UsageError(f"--models {models}: expected one of {', '.join(MODELS)}")
    for model, trained in enumerate(record.subset):
        counts = trained if models == "trained" else ~trained if models == "held-out" else np.ones(record.n, bool)
        if counts.any():
            yield model, counts


def _at(record: Record, epoch: int | None, default: int) -> slice:
    """The recorded epoch as a slice of one row: `epoch`, which must be there, or the one nearest to `default`."""
    numbers = np.asarray(record.epoch_numbers)
    if epoch is None:
        after = np.flatnonzero(numbers > 0) if (numbers > 0).any() else np.arange(len(numbers))
        row = int(after[np.abs(numbers[after] - default).argmin()])  # of two equally near the earlier one
    else:
        row = _row_of(record, epoch)
    return slice(row, row + 1)


def _until(record: Record, epoch: int | None) -> slice:
    """The trajectory: recorded epochs after the start of training, up to `epoch` where it is given."""
    numbers = np.asarray(record.epoch_numbers)
    first = int((numbers < 1).sum())  # what an untrained network gets right is chance
    last = len(numbers) if epoch is None else _row_of(record, epoch) + 1
    if first >= last:
        raise UsageError(f"{record.path}: no epoch of training up to epoch {epoch or 0}; this metric follows training")
    return slice(first, last)


def _row_of(record: Record, epoch: int) -> int:
    numbers = [int(one) for one in record.epoch_numbers]
    if epoch not in numbers:
        shown = ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")
        raise UsageError(f"--epoch {epoch}: not in {record.path}, which has epochs {shown}")
    return numbers.index(epoch)


def _early(record: Record) -> int:
    return min(EARLY_EPOCH, _last(record))


def _last(record: Record) -> int:
    return int(record.epoch_numbers[-1])


def _used(record: Record, epochs: slice, models: int, **others: Any) -> dict[str, Any]:
    numbers = [int(one) for one in record.epoch_numbers[epochs]]
    return {"models": models, "epochs": numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", **others}


def _mean_over_models(
    record: Record, statistic: str, epochs: slice, models: str, reduce: Reduce, **others: Any
) -> Scored:
    """Mean over models of reduce(values (epochs, b), labels (b,)) -> (b,)."""
    number, labels = 0, record.labels

    def each() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal number
        for model, counts in _members(record, models):
            number += 1
            values = np.empty(record.n, np.float32)
            for rows, table in _read(record, statistic, model, epochs):
                values[rows] = reduce(table, labels[rows])
            yield values, counts

    values = dynamics.average(each(), record.n)
    return Scored(values, _used(record, epochs, number, averaged_over=models, **others))


# --- metrics of a record ---------------------------------------------------------------------------------------------


def _at_one_epoch(
    statistic: str, default: Callable[[Record], int], reduce: Reduce = lambda x, _: x[0]
) -> Callable[..., Scored]:
    """The metric that is a statistic at one epoch, mean over models."""

    def scored(record: Record, *, epoch: int | None = None, models: str = "trained") -> Scored:
        return _mean_over_models(record, statistic, _at(record, epoch, default(record)), models, reduce)

    return scored


def _over_training(statistic: str, reduce: Reduce) -> Callable[..., Scored]:
    """The metric that follows a statistic through the training, mean over models."""

    def scored(record: Record, *, epoch: int | None = None, models: str = "trained") -> Scored:
        return _mean_over_models(record, statistic, _until(record, epoch), models, reduce)

    return scored


def _in_windows(statistic: str, reduce: Callable[[np.ndarray, int], np.ndarray]) -> Callable[..., Scored]:
    """The same in windows of so many epochs."""

    def scored(
        record: Record, *, epoch: int | None = None, models: str = "trained", window: int = dynamics.WINDOW
    ) -> Scored:
        epochs = _until(record, epoch)
        used = min(window, epochs.stop - epochs.start)  # fewer epochs make one window
        return _mean_over_models(record, statistic, epochs, models, lambda x, _: reduce(x, window), window=used)

    return scored


def _memorization(record: Record, *, epoch: int | None = None) -> Scored:
    subset, labels = _subsets(record, "memorization"), record.labels
    epochs = _at(record, epoch, _last(record))
    right_in, models_in, right_out, models_out = np.zeros((4, record.n), np.int32)
    for model, trained in enumerate(subset):
        models_in += trained
        models_out += ~trained
        for rows, prediction in _read(record, "prediction", model, epochs):
            right = prediction[0] == labels[rows]
            right_in[rows] += right & trained[rows]
            right_out[rows] += right & ~trained[rows]
    values = ensembles.difference(right_in, models_in, right_out, models_out)
    right = {"right_with": (right_in, models_in), "right_without": (right_out, models_out)}
    shares = {name: float(one.sum() / max(1, of.sum())) for name, (one, of) in right.items()}
    return Scored(
        values,
        _used(record, epochs, record.models, **{name: round(share, 4) for name, share in shares.items()}),
    )


def _influence(reduce: str) -> Callable[..., Scored]:
    def scored(record: Record) -> Scored:
        if record.test_labels is None or not len(record.test_labels):
            raise UsageError(f"{record.path}: influence needs test images, and it has none; record with --test IMAGES")
        subset = _subsets(record, "influence")
        right = record.test_prediction == np.asarray(record.test_labels)
        epochs = slice(len(record.epoch_numbers) - 1, None)
        values = ensembles.influence(subset, right, reduce)
        return Scored(values, _used(record, epochs, record.models, test_images=len(record.test_labels)))

    return scored


def _subsets(record: Record, what: str, otherwise: str = "") -> np.ndarray:
    """(models, n) bool, of models that were not all trained on everything."""
    subset = record.subset
    if subset.all():
        raise UsageError(
            f"{what} asks models that did not see an image, and every model of {record.path} was trained on all; "
            f"record many models with --subset 0.7{otherwise}"
        )
    return subset


def _others(record: Record, models: str | None, what: str) -> str:
    """Which models are asked: those that did not see an image, unless others are asked for."""
    if models is None:
        _subsets(record, what, "; or ask models about their own training images with --models trained")
    return models or "held-out"


def _ddd(record: Record, *, epoch: int | None = None, models: str | None = None) -> Scored:
    models, epochs = _others(record, models, "ddd"), _at(record, epoch, _last(record))
    return _mean_over_models(record, "prediction", epochs, models, lambda x, labels: ensembles.ddd(x == labels))


def _ensemble_active_learning(record: Record, *, epoch: int | None = None, models: str = "all") -> Scored:
    epochs, classes, members = _until(record, epoch), len(record.classes), list(_members(record, models))
    values = np.empty(record.n, np.float32)
    for rows in _blocks(record.n, 8 * (classes + record.epochs)):
        votes = np.zeros((rows.stop - rows.start, classes), np.int32)
        every = np.arange(len(votes))
        for model, counts in members:
            for prediction in record.read("prediction", model, rows, epochs):
                votes[every, prediction] += counts[rows]
        values[rows] = ensembles.vote_entropy(votes)
    return Scored(values, _used(record, epochs, len(members), averaged_over=models))


def _label_issues(record: Record, *, models: str | None = None) -> Scored:
    models = _others(record, models, "label_issues")
    total = np.zeros((record.n, len(record.classes)), np.float32)
    count, members = np.zeros(record.n, np.int64), list(_members(record, models))
    for model, counts in members:
        count += counts
        for rows in _blocks(record.n, 8 * len(record.classes)):
            total[rows] += record.probabilities(model, rows) * counts[rows, None]
    values, last = np.full(record.n, np.nan, np.float32), slice(len(record.epoch_numbers) - 1, None)
    if not members:
        return Scored(values, _used(record, last, 0, averaged_over=models))
    known = count > 0
    total = total[known]
    total /= count[known, None]
    quality, issues = ensembles.label_issues(record.labels[known], total)
    values[known] = 1 - quality + issues
    return Scored(values, _used(record, last, len(members), averaged_over=models, issues=int(issues.sum())))


# --- metrics of a feature file ---------------------------------------------------------------------------------------


def _self_supervised_prototypes(file: Source, *, k: int | None = None, seed: int = 0) -> Scored:
    from protoprune import pruning

    ranking = pruning.rank(file, k=k, seed=seed)
    return Scored(ranking.scores.astype(np.float32), {"k": ranking.clusterings[0].k, "seed": seed})


def _supervised_prototypes(file: Source) -> Scored:
    labels = _labels_of(file)
    return Scored(geometry.supervised_prototypes(file.features, labels, file.usable), {"classes": len(file.classes)})


def _moderate(file: Source) -> Scored:
    labels = _labels_of(file)
    distance = geometry.class_distance(file.features, labels, file.usable)
    _warn_of_lengths(distance, file)
    return Scored(geometry.moderate(distance), {"classes": len(file.classes)})


def _warn_of_lengths(distance: np.ndarray, file: Source) -> None:
    """As a Euclidean ranking by prototypes does: distances that lengths explain say little about images."""
    from protoprune.pruning.ranking import BY_LENGTH
    from protoprune.scores import spearman

    known = ~np.isnan(distance)
    share = spearman(distance[known], geometry.lengths(file.features, known)[known]) if known.sum() > 2 else 0.0
    if abs(share) >= BY_LENGTH:
        warn(
            "these distances are mostly the lengths of the feature vectors (Spearman "
            f"{share:.2f}), and say little about what is in the images; supervised_prototypes compares directions"
        )


def _labels_of(file: Source) -> np.ndarray:
    if not file.classes:
        raise UsageError(
            f"{file.path}: its images have no classes (no first-level folders), and this metric needs them; "
            "self_supervised_prototypes and k_center do not"
        )
    return file.labels


def _k_center(file: Source, *, budget: float | None = None, seed: int = 0) -> Scored:
    values = geometry.k_center(file.features, file.paths, budget, seed, file.usable)
    return Scored(values, {"budget": "default" if budget is None else budget, "seed": seed})


def _covering(order: str) -> Callable[..., Scored]:
    """1 - the place in the order, so that keeping the largest first is keeping in this order."""

    def scored(file: Source, *, by: str | None = None, seed: int = 0) -> Scored:
        from protoprune import pruning

        by = by or ("class" if file.classes else "cluster")
        ranking = pruning.unscored(file)  # whose usable rows are those that `select --order` has a place for
        places = pruning.cover_places(ranking, order, np.flatnonzero(ranking.usable), by, seed)
        return Scored((1 - places).astype(np.float32), {"by": by, "seed": seed})

    return scored


def _random(source: Record | Source, *, seed: int = 0) -> Scored:
    values = geometry.random(source.paths, seed)
    if hasattr(source, "usable"):  # a feature file; a record holds readable images only
        values[~source.usable] = np.nan
    return Scored(values, {"seed": seed})


# --- the catalogue ---------------------------------------------------------------------------------------------------


def _record_metric(function: Callable[..., Scored], cost: str, source: str, summary: str, *statistics: str) -> Metric:
    return Metric(function, "record", True, True, cost, source, summary, statistics)


METRICS: dict[str, Metric] = {
    "el2n": _record_metric(
        _at_one_epoch("error_norm", _early), "a few epochs of 1-20 models", "Paul et al. 2021",
        "norm of softmax minus label, early in training, mean over models", "error_norm",
    ),
    "grand": _record_metric(
        _at_one_epoch("gradient_norm", _early), "as EL2N, and a gradient an image", "Paul et al. 2021",
        "norm of the loss gradient, early in training; at epoch 0 no better than random", "gradient_norm",
    ),
    "forgetting": _record_metric(
        _over_training("prediction", lambda x, labels: dynamics.forgetting(x == labels)),
        "a whole training, 1 model or more", "Toneva et al. 2019",
        "times that a right answer becomes wrong; never learned ranks hardest", "prediction",
    ),
    "memorization": _record_metric(
        _memorization, "very high: 100 to 4,000 models", "Feldman & Zhang 2020",
        "share right with the image in training minus without", "prediction",
    ),
    "influence_max": _record_metric(
        _influence("max"), "very high: 100 to 4,000 models", "Feldman & Zhang 2020",
        "largest gain on a test image from training on this one",
    ),
    "influence_sum_abs": _record_metric(
        _influence("sum_abs"), "very high: 100 to 4,000 models", "Feldman & Zhang 2020",
        "summed absolute effects on all test images of training on this one",
    ),
    "ddd": _record_metric(
        _ddd, "a whole training of 10 models or more", "Meding et al. 2022",
        "share of a pool of models that misclassify the image", "prediction",
    ),
    "ensemble_active_learning": _record_metric(
        _ensemble_active_learning, "a whole training, 1 model or more", "Chitta et al. 2020",
        "vote entropy of all models at all recorded epochs; does not look at the label", "prediction",
    ),
    "supervised_prototypes": Metric(
        _supervised_prototypes, "features", True, False, "two passes over the features", "Sorscher et al. 2022",
        "1 - cosine to the mean embedding of the class",
    ),
    "self_supervised_prototypes": Metric(
        _self_supervised_prototypes, "features", False, False, "k-means", "Sorscher et al. 2022",
        "1 - cosine to the nearest k-means centroid; what `protoprune select` uses",
    ),
    "k_center": Metric(
        _k_center, "features", False, False, "minutes at 50,000 images, an hour at a million", "Sener & Savarese 2018",
        "greedy core-set: first the images farthest from those chosen before",
    ),
    "cover": Metric(
        _covering("cover"), "features", False, False, "half a minute a million images", "Chen et al. 2010",
        "kernel herding in each class or cluster: first the images that stand for all",
    ),
    "facility": Metric(
        _covering("facility"), "features", False, False, "minutes a million images", "Mirchandani & Francis 1990",
        "facility location in each class or cluster: first the images that all others are near to",
    ),
    "label_issues": _record_metric(
        _label_issues, "a whole training of 10 models or more", "Northcutt et al. 2021",
        "1 - probability of its label by models that did not see it; above 1: cleanlab calls it a label issue",
        "probability",
    ),
    "aum": _record_metric(
        _over_training("margin", lambda x, _: dynamics.aum(x)),
        "a whole training, 1 model or more", "Pleiss et al. 2020",
        "minus the mean margin over training; finds mislabelled images", "margin",
    ),
    "margin": _record_metric(
        _at_one_epoch("margin", _last, lambda x, _: -x[0]), "a whole training, 1 model or more", "Coleman et al. 2020",
        "minus the margin at the last epoch", "margin",
    ),
    "entropy": _record_metric(
        _at_one_epoch("entropy", _last), "a whole training, 1 model or more", "Coleman et al. 2020",
        "entropy of the softmax at the last epoch; does not look at the label", "entropy",
    ),
    "loss": _record_metric(
        _at_one_epoch("loss", _last), "a whole training, 1 model or more", "cross entropy", "loss at the last epoch",
        "loss",
    ),
    "dyn_unc": _record_metric(
        _in_windows("true_probability", dynamics.dyn_unc), "a whole training, 1 model or more", "He et al. 2023",
        "deviation of the label's probability within 10 epochs, mean over training", "true_probability",
    ),
    "tdds": _record_metric(
        _in_windows("change", dynamics.tdds), "a whole training, 1 model or more", "Zhang et al. 2024",
        "variation of the change of the prediction from epoch to epoch", "change",
    ),
    "moderate": Metric(
        _moderate, "features", True, False, "two passes over the features", "Xia et al. 2023",
        "nearness to the median distance to the class mean; larger = kept first",
    ),
    "random": Metric(
        _random, "nothing", False, False, "none", "baseline", "a seeded hash of the path",
    ),
}  # fmt: skip
