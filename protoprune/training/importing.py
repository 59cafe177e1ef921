"""A training record of a training of your own: what its models said of every image, epoch by epoch.

What this module does not know: how models are trained, what metrics make of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from protoprune import files, records
from protoprune.arguments import as_numbers, checked, texts
from protoprune.bounds import shown
from protoprune.errors import UsageError
from protoprune.features import hdf5
from protoprune.images.listing import relative_id

_ROWS = 16_384  # whose statistics are computed at once
_LARGEST = 1e30  # of a logit: the squares and differences of larger ones are no numbers


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
    probabilities: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a training record of logits, from which every metric of a record (`score`, `protoprune score`) is read.

    logits: (e, n, c) of n images and c classes at e moments of one training, or (m, e, n, c) of m models: an array, a
    memory map, a tensor, or a list of such parts, of which one epoch of one model is read at a time. Log-probabilities
    do as well. Row i is image `paths[i]`, with the class number `labels[i]`; the order is any.
    root: the folder that the paths are relative to, or below if they are absolute, as the feature file has it;
    classes: names of the c classes [their numbers]; epochs: (e,) after how many epochs of training each moment was
    [1 to e; 0 is the untrained model]; subset: (m, n) which images each model was trained on [all]; probabilities:
    keep those of the last moment too, for `label_issues`.

    Raises UsageError for what does not fit together or is no number, and where `out` is there, unless `overwrite`.
    """
    out, names = os.fspath(out), _names(paths, root)
    _check_new(out, overwrite)
    models = _models(logits)
    n, count, width = len(names), len(models[0]), np.shape(models[0][0])[-1]
    numbers = _epochs(range(1, count + 1) if epochs is None else epochs, count)
    kinds = [str(number) for number in range(width)] if classes is None else texts("classes", classes, "names")
    own = _labels(labels, n, width)
    if len(kinds) != width:
        raise UsageError(f"classes: {len(kinds):,} names for logits of {width:,} classes")
    trained = _subset(subset, len(models), n)
    order = np.array(sorted(range(n), key=lambda row: os.fsencode(names[row])), np.int64)
    with files.lock(out):
        records.create(
            out, _provenance(root, len(models), trained, numbers), paths=[names[row] for row in order],
            labels=own[order], classes=kinds, subset=trained[:, order], epoch_numbers=numbers,
            probabilities=probabilities,
        )  # fmt: skip
        partial = records.PartialRecord(out)
        try:
            for number, model in enumerate(models):
                _write_model(partial, number, model, own[order], order, (count, n, width), probabilities)
            partial.finish()
        except BaseException:
            partial.close()
            with contextlib.suppress(OSError):
                os.unlink(hdf5.partial_path(out))
            raise


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
    raise UsageError("logits: expected (moments, images, classes), or (models, moments, images, classes)")


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
    model: Any,
    labels: np.ndarray,
    order: np.ndarray,
    shape: tuple[int, int, int],
    probabilities: bool,
) -> None:
    """The statistics of one model at every moment."""
    import torch

    from protoprune.training.per_example import from_logits

    if len(model) != shape[0]:
        raise UsageError(f"logits of model {number}: of {len(model):,} moments, expected {shape[0]:,}, as of model 0")
    one, previous = slice(number, number + 1), None
    for epoch in range(shape[0]):
        at = f"logits of model {number}, moment {epoch}"
        now = as_numbers(at, model[epoch])
        if now.shape != shape[1:]:
            raise UsageError(f"{at}: of shape {now.shape}, expected {shape[1:]}, a row an image")
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, shape[1], _ROWS):
            rows = order[start : start + _ROWS]
            here = torch.from_numpy(now[rows].astype(np.float32))
            if not bool((here.abs() < _LARGEST).all()):
                raise UsageError(f"{at}: NaN, infinite or larger than {_LARGEST:g}; give what the model said")
            before = None if previous is None else torch.from_numpy(previous[rows].astype(np.float32))
            own = torch.from_numpy(labels[start : start + _ROWS])
            for name, values in from_logits(here, own, before).items():
                parts.setdefault(name, []).append(values.numpy())
            if probabilities and epoch == shape[0] - 1:
                partial.write_probabilities(one, slice(start, start + len(rows)), here.softmax(-1)[None].numpy())
        partial.write(one, epoch, {name: np.concatenate(values)[None] for name, values in parts.items()})
        previous = now
    partial.commit(one, shape[0])
