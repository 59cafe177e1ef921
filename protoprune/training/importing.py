"""A training record of a training of your own: what its models said of every image, epoch by epoch.

What this module does not know: how models are trained, what metrics make of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from protoprune import files, records
from protoprune.arguments import as_numbers, checked, texts
from protoprune.bounds import shown
from protoprune.errors import UsageError
from protoprune.features import hdf5
from protoprune.images.listing import relative_id

if TYPE_CHECKING:
    import torch

_ROWS = 16_384  # whose statistics are computed at once
_LARGEST = 1e30  # of a logit: the squares and differences of larger ones are no numbers
_OF_PROBABILITIES = "np.log(np.clip(p, 1e-7, 1))"  # the logarithm of 0 is none; float16 holds 1e-7


@checked
def write_record(
    out: str | os.PathLike[str],
    paths: Sequence[str],
    labels: np.ndarray,
    logits: Any,
    *,
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    epochs: Sequence[int] | None = None,
    subset: np.ndarray | None = None,
    gradient_norms: np.ndarray | None = None,
    test: tuple[Sequence[str], np.ndarray, Any] | None = None,
    probabilities: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a training record of logits, from which every metric of a record (`score`, `protoprune score`) is read.

    logits: (e, n, c) of n images and c classes at e moments of one training, or (m, e, n, c) of m models: an array, a
    memory map, a tensor, or a list of such parts, of which one epoch of one model is read at a time. Log-probabilities
    do as well, probabilities are refused. Row i is image `paths[i]`, with the class number `labels[i]`, in any order.
    root: the folder that the paths are relative to, or below if they are absolute, as the feature file has it;
    classes: names of the c classes [their numbers]; epochs: (e,) after how many epochs of training each moment was
    [1 to e; 0 is the untrained model]; subset: (m, n) which images each model was trained on [all]; probabilities:
    keep those of the last moment too, for `label_issues`.

    Raises UsageError for what does not fit together or is no number, and where `out` is there, unless `overwrite`.
    """
    out, own = os.fspath(out), _images("", paths, labels, logits, root)
    _check_new(out, overwrite)
    n, width = len(own.names), own.width
    records.check_classes(width)
    numbers = _epochs(range(1, own.moments + 1) if epochs is None else epochs, own.moments)
    kinds = [str(number) for number in range(width)] if classes is None else texts("classes", classes, "names")
    if len(kinds) != width:
        raise UsageError(f"classes: {len(kinds):,} names for logits of {width:,} classes")
    trained = _subset(subset, len(own.models), n)
    norms = None if gradient_norms is None else _norms(gradient_norms, (len(own.models), own.moments, n))
    others = None if test is None else _test_images(test, own)
    with files.lock(out):
        records.create(
            out, _provenance(root, len(own.models), trained, numbers), paths=own.names, labels=own.labels,
            classes=kinds, subset=trained[:, own.order], epoch_numbers=numbers, gradients=norms is not None,
            probabilities=probabilities, test_paths=() if others is None else others.names,
            test_labels=None if others is None else others.labels,
        )  # fmt: skip
        partial = records.PartialRecord(out)
        try:
            for number in range(len(own.models)):
                _write_model(partial, number, own, others, norms, probabilities)
            partial.finish()
        except BaseException:
            partial.close()
            with contextlib.suppress(OSError):
                os.unlink(hdf5.partial_path(out))
            raise


@dataclass
class _Images:
    """Images in the order of a record, and what the models said of them, in the order given."""

    what: str  # '' or 'test ', for messages
    names: list[str]
    labels: np.ndarray  # (n,) int64
    models: Any  # m times e times (n, c) logits
    order: np.ndarray  # (n,) int64: where each image is in the logits

    @property
    def moments(self) -> int:
        return len(self.models[0])

    @property
    def width(self) -> int:
        return int(np.shape(self.models[0][0])[-1])

    def logits(self, number: int, moment: int) -> np.ndarray:
        """(n, c), in the order given."""
        found = as_numbers(self.at(number, moment), self.models[number][moment])
        if found.shape != (expected := (len(self.names), self.width)):
            raise UsageError(f"{self.at(number, moment)}: of shape {found.shape}, expected {expected}, a row an image")
        if found.size and 0 <= found.min() <= found.max() <= 1 and (abs(found.sum(1, np.float64) - 1) < 0.01).all():
            probabilities = f"{self.at(number, moment)}: probabilities, each row adds up to 1"
            raise UsageError(f"{probabilities}; give their logarithms, {_OF_PROBABILITIES}")
        return found

    def at(self, number: int, moment: int) -> str:
        return f"{self.what}logits of model {number}, moment {moment}"


def _images(
    what: str, paths: Sequence[str], labels: np.ndarray, logits: Any, root: str | os.PathLike[str] | None
) -> _Images:
    names, models = _names(paths, root), _models(logits)
    moments = len(models[0])
    for number, model in enumerate(models):
        if len(model) != moments:
            raise UsageError(
                f"{what}logits of model {number}: of {len(model):,} moments, expected {moments:,}, as of model 0"
            )
    own = _labels(labels, len(names), np.shape(models[0][0])[-1])
    order = np.array(sorted(range(len(names)), key=lambda row: os.fsencode(names[row])), np.int64)
    return _Images(what, [names[row] for row in order], own[order], models, order)


def _test_images(test: tuple[Sequence[str], np.ndarray, Any], own: _Images) -> _Images:
    if not isinstance(test, tuple) or len(test) != 3:
        raise UsageError(f"test {shown(test)}: expected (paths, labels, logits) of the test images")
    if not (names := texts("paths of test images", test[0])):
        raise UsageError("test: holds no image; leave it out")
    absolute = all(map(os.path.isabs, names))
    found = _images("test ", names, *test[1:], os.path.commonpath(map(os.path.dirname, names)) if absolute else None)
    shape, expected = ((len(one.models), one.moments, one.width) for one in (found, own))
    if shape != expected:
        raise UsageError(f"test logits: (models, moments, classes) are {shape}, expected {expected}, as of the others")
    return found


def _norms(values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    found = as_numbers("gradient_norms", values)
    found = found[None] if found.ndim == 2 else found
    if found.shape != shape:
        raise UsageError(f"gradient_norms of shape {found.shape}: expected {shape}: models, moments, images")
    if not (np.isfinite(found) & (found >= 0)).all():
        raise UsageError("gradient_norms: NaN, infinite or below 0; give lengths")
    return found


def _names(paths: Sequence[str], root: str | os.PathLike[str] | None) -> list[str]:
    """The paths as records have them, below a folder."""
    names = texts("paths", paths)
    if root is not None:
        names = [relative_id(name, os.fspath(root)) for name in names]
    if (odd := next(filter(files.leads_out, names), None)) is not None:
        raise UsageError(f"paths: {odd!r} is not below a folder; give root=, the folder that the images are in")
    if len(set(names)) < len(names):
        raise UsageError(f"paths: {len(names) - len(set(names)):,} occur twice; give each image once")
    return names


def _epochs(epochs: Sequence[int], count: int) -> list[int]:
    found = as_numbers("epochs", epochs)
    if found.shape != (count,) or found.dtype.kind not in "iu" or (np.diff(found, prepend=-1) <= 0).any():
        raise UsageError(f"epochs {shown(epochs)}: expected {count:,} growing whole numbers, one for each moment")
    return found.tolist()


def _models(logits: Any) -> Any:
    """Logits as m parts, one a model, of e parts each, one a moment."""
    try:
        dims = np.ndim(logits[0][0])  # a tensor's, a list's: nothing is copied
        if dims == 1:
            return [logits]
        if dims == 2 and len(logits[0]) and np.ndim(logits[0][0][0]) == 1:
            return logits
    except (TypeError, IndexError, KeyError):
        pass
    raise UsageError(
        "logits: expected (moments, images, classes), or (models, moments, images, classes); of one moment give "
        "[logits]"
    )


def _check_new(out: str, overwrite: bool) -> None:
    there = next((one for one in (out, hdf5.partial_path(out)) if os.path.lexists(one)), None)
    if there is not None and not overwrite:
        raise UsageError(f"{there}: exists; choose another name, or replace it with overwrite=True")
    if os.path.lexists(out):
        hdf5.check_replaceable(out, records.KIND)


def _labels(labels: np.ndarray, n: int, width: int) -> np.ndarray:
    found = as_numbers("labels", labels, "numbers of classes")
    if found.shape != (n,) or found.dtype.kind not in "iu":
        raise UsageError(f"labels of shape {found.shape} and type {found.dtype}: expected {n:,} numbers of classes")
    if n and not 0 <= found.min() <= found.max() < width:
        raise UsageError(
            f"labels from {found.min()} to {found.max()}: expected 0 to {width - 1}, as logits has classes"
        )
    return found.astype(np.int64)


def _subset(subset: np.ndarray | None, models: int, n: int) -> np.ndarray:
    if subset is None:
        return np.ones((models, n), bool)
    found = as_numbers("subset", subset, "True or False of each model and image")
    if found.shape != (models, n):
        raise UsageError(f"subset of shape {found.shape}: expected ({models}, {n}), one of each model and image")
    if not np.isin(found, (0, 1)).all():  # shares, weights, numbers of rows
        raise UsageError("subset: holds other values than True and False, or 1 and 0; say which images were trained on")
    return found.astype(bool)


def _provenance(
    root: str | os.PathLike[str] | None, models: int, subset: np.ndarray, epochs: Sequence[int]
) -> dict[str, Any]:
    folder = "unknown" if root is None else os.path.abspath(root)
    return {
        "recipe": json.dumps({"model": "a training of your own"}), "root": folder, "models": models,
        "subset_fraction": float(subset.mean()) if subset.size else 1.0, "epochs_recorded": json.dumps(list(epochs)),
    }  # fmt: skip


def _write_model(
    partial: records.PartialRecord,
    number: int,
    own: _Images,
    test: _Images | None,
    norms: np.ndarray | None,
    probabilities: bool,
) -> None:
    """The statistics of one model at every moment."""
    from protoprune.training.per_example import LARGEST

    one, previous = slice(number, number + 1), None
    for moment in range(own.moments):
        now = own.logits(number, moment)
        values = _statistics(own, now, previous, own.at(number, moment))
        if norms is not None:
            values["gradient_norm"] = norms[number, moment, own.order].clip(max=LARGEST)
        if test is not None:
            seen = _statistics(test, test.logits(number, moment), None, test.at(number, moment))
            values |= {f"test_{name}": seen[name] for name in ("prediction", "true_probability")}
        partial.write(one, moment, {name: array[None] for name, array in values.items()})
        previous = now
    if probabilities:
        for start in range(0, len(own.order), _ROWS):
            rows = own.order[start : start + _ROWS]
            shares = _tensor(now, rows).softmax(-1)[None].numpy()
            partial.write_probabilities(one, slice(start, start + len(rows)), shares)
    partial.commit(one, own.moments)


def _statistics(images: _Images, now: np.ndarray, previous: np.ndarray | None, at: str) -> dict[str, np.ndarray]:
    """Each (n,), in the order of the record."""
    import torch

    from protoprune.training.per_example import from_logits

    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images.order), _ROWS):
        rows = images.order[start : start + _ROWS]
        here, before = _tensor(now, rows), None if previous is None else _tensor(previous, rows)
        if not bool((here.abs() < _LARGEST).all()):
            odd = f"{at}: NaN, infinite or larger than {_LARGEST:g}"
            raise UsageError(f"{odd}; give what the model said, or {_OF_PROBABILITIES} of probabilities")
        labels = torch.from_numpy(images.labels[start : start + _ROWS])
        for name, values in from_logits(here, labels, before).items():
            parts.setdefault(name, []).append(values.numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _tensor(table: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    import torch

    with np.errstate(over="ignore"):  # what is too large is refused by `_statistics`
        return torch.from_numpy(table[rows].astype(np.float32))
