"""Training runs -> training record: which models are trained on what, what is written when, and how a run goes on.

A network is recorded by itself, with a checkpoint beside the record after every recorded epoch; a head ensemble is
trained as a whole, and a group of it that was cut short is trained again (it takes seconds). What this module does not
know: metrics.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoprune import files, records
from protoprune.arguments import checked
from protoprune.bounds import check_number, check_seed, check_whole
from protoprune.device import resolve_device, warn_if_emulated
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.features import hdf5
from protoprune.text import parse_json
from protoprune.training import heads, loop, per_example
from protoprune.training.examples import Examples, check_same_inputs
from protoprune.training.loop import Recipe
from protoprune.training.models import file_digest
from protoprune.units import many

_NAMES = {
    "train": "other training examples",
    "test": "other test examples",
    "weights_sha256": "other --weights",
    "gradients": "with and without --gradients",
    "probabilities": "with and without --probabilities",
}
_LOGITS_ROWS = 8192  # examples whose logits are worked on at once
_GRADIENT_BYTES = 2**30  # of gradients of a network, one set an example, that are held at once


@dataclass
class Plan:
    """What a record will hold, and how large it will be."""

    models: int
    subset_fraction: float
    epoch_numbers: list[int]
    subset: np.ndarray  # (models, n) bool
    bytes: int


def plan(
    train: Examples,
    test: Examples | None,
    recipe: Recipe,
    *,
    models: int = 1,
    subset_fraction: float = 1.0,
    every: int = 1,
    initial: bool = False,
    gradients: bool = False,
    probabilities: bool = False,
    seed: int = 0,
) -> Plan:
    """Lay a record out. Each model is trained on a random subset of round(subset_fraction * n) examples.

    every: record every so many epochs, and the last; initial: also record the untrained models, as epoch 0.

    Raises UsageError for values out of range, and for test features that were not made as the training features were.
    """
    check(models, subset_fraction, every, seed)
    if test is not None:
        check_same_inputs(train, test)
    if recipe.model == "head" and recipe.precision == "bf16":
        raise UsageError("--precision bf16: heads are recorded in fp32, many at once; leave it out")
    records.check_classes(len(train.classes))
    n = len(train)
    numbers = sorted({*range(every, recipe.epochs + 1, every), recipe.epochs, *([0] if initial else [])})
    subset = np.ones((models, n), bool)
    if subset_fraction < 1:
        size = max(1, round(subset_fraction * n))
        for number in range(models):
            subset[number] = False
            subset[number, np.random.default_rng([seed, 4, number]).permutation(n)[:size]] = True
    size = records.size(
        models,
        len(numbers),
        n,
        len(test) if test else 0,
        gradients=gradients,
        classes=len(train.classes) * probabilities,
    )
    names = sum(len(path) + 1 for path in (*train.paths, *(test.paths if test else ())))
    return Plan(models, subset_fraction, numbers, subset, size + names)


def check(models: int, subset_fraction: float, every: int, seed: int = 0) -> None:
    """UsageError for values out of range."""
    check_whole("--models", models, 1, 1_000_000)
    check_whole("--every", every)
    check_number("--subset", subset_fraction, 0, 1, "; the usual is 0.7", above=True)
    check_seed(seed)


@checked
def record(
    train: Examples,
    test: Examples | None,
    recipe: Recipe,
    out: str | os.PathLike[str],
    laid_out: Plan,
    *,
    gradients: bool = False,
    probabilities: bool = False,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Train and write the record `out`; only what an earlier run has not done already.

    `on_start(epochs in all, epochs done before)` is called once, `on_progress(epochs done in this run)` after every
    epoch of every model.

    Raises ProtopruneError when `out` is a record of something else (unless `overwrite`) or cannot be written.
    """
    out, where = os.fspath(out), resolve_device(device)
    provenance = _provenance(train, test, recipe, laid_out, gradients, seed, where)
    if probabilities:  # a record that has them serves whoever does not ask for them
        provenance["probabilities"] = 1
    with files.lock(out):
        if not _prepare(out, provenance, train, test, laid_out, gradients, overwrite):
            if on_start:
                on_start(laid_out.models * recipe.epochs, laid_out.models * recipe.epochs)
            return
        warn_if_emulated(provenance["computes_in"], where)
        partial = records.PartialRecord(out)
        if partial.damaged:
            warn(f"{out}: what was recorded of {many(len(partial.damaged), 'model')} is damaged and trained again")
        failed_at_once = False
        try:
            job = _Job(train, test, recipe, laid_out, gradients, probabilities, seed, where, on_start, on_progress)
            (_record_heads if recipe.model == "head" else _record_networks)(job, partial)
            partial.finish()
        except ProtopruneError:  # weights that are none, a loss that is no number: nothing to go on from
            failed_at_once = not partial.committed.any()
            raise
        finally:
            partial.close()
            if failed_at_once:
                _forget_states(out)
                with contextlib.suppress(OSError):
                    os.unlink(hdf5.partial_path(out))
        _forget_states(out)


def _provenance(
    train: Examples,
    test: Examples | None,
    recipe: Recipe,
    laid_out: Plan,
    gradients: bool,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """What determines the record: the cache key."""
    return {
        "recipe": json.dumps(asdict(recipe), sort_keys=True),
        "weights_sha256": file_digest(recipe.weights) if recipe.weights else "",
        "train": train.fingerprint(),
        "test": test.fingerprint() if test else "",
        "root": train.root,
        "models": laid_out.models,
        "subset_fraction": laid_out.subset_fraction,
        "epochs_recorded": json.dumps(laid_out.epoch_numbers),
        "gradients": int(gradients),
        "seed": seed,
        "computes_in": loop.computes_in(recipe.precision, device, recipe.model),
    }


def _prepare(
    out: str,
    provenance: dict[str, Any],
    train: Examples,
    test: Examples | None,
    laid_out: Plan,
    gradients: bool,
    overwrite: bool,
) -> bool:
    """Leave a partial record of exactly this run; False when the finished one is it already.

    An unfinished run that was started by --overwrite stands in for the finished record, which it will replace.
    """
    started = hdf5.partial_path(out)
    if overwrite and os.path.exists(out):
        hdf5.check_replaceable(out, records.KIND)
    if os.path.exists(started):
        found, other = _compare(started, provenance, overwrite)
        if not other and (found.get("overwrite") or not (overwrite or os.path.exists(out))):
            return True
        if not overwrite and found["committed"]:  # else there is nothing to lose: the run failed in its first epoch
            _refuse(started, other)
    if os.path.exists(out) and not overwrite:
        _refuse(out, _compare(out, provenance, overwrite)[1])
        with records.Record(out) as record:
            if damage := record.damage():
                raise record.damaged(f"{damage[0]} is not what was written")
        return False
    _forget_states(out)  # of a run that was given up
    records.create(
        out, {**provenance, "overwrite": int(overwrite)}, paths=train.paths, labels=train.labels,
        classes=train.classes, subset=laid_out.subset, epoch_numbers=laid_out.epoch_numbers, gradients=gradients,
        probabilities="probabilities" in provenance, test_paths=test.paths if test else (),
        test_labels=test.labels if test else None,
    )  # fmt: skip
    return True


def _compare(path: str, provenance: dict[str, Any], overwrite: bool) -> tuple[dict[str, Any], list[str]]:
    """What a record says of its run, and in what it differs from this one; with --overwrite a damaged one counts as
    another run's."""
    try:
        with records.Record(path, unfinished=True) as record:
            found = {**record.provenance, "committed": int(record.committed.sum())}
    except ProtopruneError:
        if not overwrite:
            raise
        return {}, ["damaged"]
    differences = []
    for name, value in provenance.items():
        then = found.get(name)
        if then == value or name == "root":  # the folder may have been moved; the examples are the same
            continue
        if name == "recipe":
            before, now = parse_json(then or "{}"), parse_json(value)
            fields = [key for key in now if before.get(key) != now[key] and key != "weights"]
            differences += [f"{key.replace('_', ' ')} {before.get(key)}, now {now[key]}" for key in fields]
        elif name == "epochs_recorded":  # lists of numbers, as long as the training
            differences.append("other recorded epochs")
        elif name in ("models", "subset_fraction", "seed", "computes_in"):
            differences.append(f"{name.replace('_', ' ')} {then}, now {value}")
        else:
            differences.append(_NAMES[name])
    return found, differences


def _refuse(path: str, differences: list[str]) -> None:
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ProtopruneError(
            f"{path} is of another run ({'; '.join(differences[:4])}{more}); write to another file with -o, or replace "
            "it with --overwrite"
        )


@dataclass
class _Job:
    """What is recorded, and how."""

    train: Examples
    test: Examples | None
    recipe: Recipe
    laid_out: Plan
    gradients: bool
    probabilities: bool
    seed: int
    device: torch.device
    on_start: Callable[[int, int], None] | None
    on_progress: Callable[[int], None] | None


def _record_heads(job: _Job, partial: records.PartialRecord) -> None:
    train, recipe, laid_out = job.train, job.recipe, job.laid_out
    numbers, size = laid_out.epoch_numbers, heads.group_size(recipe, len(train.classes), laid_out.subset)
    groups = [range(first, min(first + size, laid_out.models)) for first in range(0, laid_out.models, size)]
    todo = [group for group in groups if partial.committed[list(group)].min() < len(numbers)]
    if job.on_start:
        job.on_start(laid_out.models * recipe.epochs, (laid_out.models - sum(map(len, todo))) * recipe.epochs)
    done = 0
    for group in todo:
        models = slice(group[0], group[-1] + 1)
        seeds = [model_seed(job.seed, number) for number in group]
        previous: heads.Ensemble | None = None

        def write(epoch: int, ensemble: heads.Ensemble, models: slice = models) -> None:
            nonlocal previous
            if epoch not in numbers:
                return
            at = numbers.index(epoch)
            values = heads.measure(ensemble, train, gradients=job.gradients, previous=previous)
            if job.test is not None:
                seen = heads.measure(ensemble, job.test, gradients=False)
                values |= {f"test_{name}": seen[name] for name in ("prediction", "true_probability")}
            partial.write(models, at, values)
            if job.probabilities and epoch == numbers[-1]:
                for rows, shares in heads.probabilities(ensemble, train):
                    partial.write_probabilities(models, rows, shares)
            previous = ensemble.copy()

        if 0 in numbers:
            write(0, heads.Ensemble(train, recipe, seeds, job.device))
        for epoch, ensemble in heads.epochs(train, recipe, laid_out.subset[models], seeds, job.seed, job.device):
            write(epoch, ensemble)
            done += len(group)
            if job.on_progress:
                job.on_progress(done)
        partial.commit(models, len(numbers))


def _record_networks(job: _Job, partial: records.PartialRecord) -> None:
    recipe, laid_out = job.recipe, job.laid_out
    numbers, folder = laid_out.epoch_numbers, _state_folder(partial.out)
    files.make_folder(folder, "checkpoints go there, move what is in the way")
    for number in partial.damaged:  # its checkpoint comes after rows that are not what was written
        with contextlib.suppress(OSError):
            os.unlink(_state_path(folder, number))
    committed = partial.committed.tolist()
    states = {
        number: _after(_load_state(folder, number), committed[number], numbers) for number in range(laid_out.models)
    }
    before = sum(
        recipe.epochs if partial.committed[number] == len(numbers) else state["epoch"] if state else 0
        for number, state in states.items()
    )
    if job.on_start:
        job.on_start(laid_out.models * recipe.epochs, before)
    done = itertools.count(1)
    for number in range(laid_out.models):
        if partial.committed[number] < len(numbers):
            for _ in _record_network(job, partial, folder, number, states.pop(number)):
                if job.on_progress:
                    job.on_progress(next(done))


def _record_network(
    job: _Job, partial: records.PartialRecord, folder: str, number: int, state: dict[str, Any] | None
) -> Iterator[None]:
    """Train one network, from the checkpoint `state` on where there is one; yields after each epoch."""
    train, recipe, numbers = job.train, job.recipe, job.laid_out.epoch_numbers
    one, own = slice(number, number + 1), model_seed(job.seed, number)
    previous: torch.Tensor | None = None

    def write(epoch: int, model: torch.nn.Module) -> None:
        nonlocal previous
        values, previous = _measure(model, train, recipe, job.gradients, previous)
        if job.test is not None:
            seen, _ = _measure(model, job.test, recipe, False, None)
            values |= {f"test_{name}": seen[name] for name in ("prediction", "true_probability")}
        partial.write(one, numbers.index(epoch), {name: value[None] for name, value in values.items()})
        if job.probabilities and epoch == numbers[-1]:
            _write_probabilities(partial, one, previous)

    if state is not None:  # the logits of the last recorded epoch, for `change`
        model = loop.make_model(train, recipe, own).to(job.device)
        model.load_state_dict(state["model"])
        _, previous = _measure(model, train, recipe, False, None)
    elif 0 in numbers:
        write(0, loop.make_model(train, recipe, own).to(job.device))
        partial.sync()
        partial.commit(one, 1)
    rows = np.flatnonzero(job.laid_out.subset[number])
    if state is None or state["epoch"] < recipe.epochs:
        for at in loop.epochs(train, recipe, rows=rows, seed=own, device=job.device, resume=state):
            if at.epoch in numbers:
                write(at.epoch, at.model)
                # The rows are on the disk before the checkpoint that lets a later run go on after them.
                partial.sync()
                _save_state(folder, number, at.checkpoint())
                partial.commit(one, numbers.index(at.epoch) + 1)
            yield
    partial.commit(one, len(numbers))
    with contextlib.suppress(OSError):
        os.unlink(_state_path(folder, number))


def _after(state: dict[str, Any] | None, committed: int, numbers: list[int]) -> dict[str, Any] | None:
    """A checkpoint, unless recorded epochs before it are not there any more: then the model is trained from its start.

    A killed run may have left the rows of the last one without having noted that they are finished.
    """
    if state is None or committed < sum(number <= state["epoch"] for number in numbers) - 1:
        return None
    return state


def _write_probabilities(partial: records.PartialRecord, one: slice, log_probabilities: torch.Tensor) -> None:
    for start in range(0, len(log_probabilities), _LOGITS_ROWS):
        rows = slice(start, min(start + _LOGITS_ROWS, len(log_probabilities)))
        partial.write_probabilities(one, rows, log_probabilities[rows].float().exp()[None].numpy())


def model_seed(seed: int, number: int) -> int:
    """The seed of a model of an ensemble."""
    return int(np.random.SeedSequence([seed, 5, number]).generate_state(1)[0])


def _measure(
    model: torch.nn.Module, data: Examples, recipe: Recipe, gradients: bool, previous: torch.Tensor | None
) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """({statistic: (n,)}, log softmax (n, c) in float16, which is what the next call wants as `previous`)."""
    labels = torch.from_numpy(data.labels)
    parts: dict[str, list[torch.Tensor]] = {}
    seen = torch.empty(len(data), len(data.classes), dtype=torch.float16)
    for start in range(0, len(data), _LOGITS_ROWS):
        rows = slice(start, start + _LOGITS_ROWS)
        logits = loop.logits(model, data.inputs[rows], precision=recipe.precision)
        before = None if previous is None else previous[rows]
        for name, value in per_example.from_logits(logits, labels[rows], before).items():
            parts.setdefault(name, []).append(value)
        # What they have in common changes nothing, and float16 is finest near 0.
        seen[rows] = logits.log_softmax(-1).clamp_min(-per_example.LARGEST)
    values = {name: torch.cat(some).numpy() for name, some in parts.items()}
    if gradients:
        values["gradient_norm"] = gradient_norms(model, data.inputs, labels).numpy()
    return values, seen


def gradient_norms(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """GraNd: (n,) L2 norms of the loss gradient of each example with respect to all parameters.

    True per-example gradients in fp32, in evaluation mode: in training mode batch norm mixes the examples of a batch.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    parameters = {name: value.detach() for name, value in model.named_parameters() if name in trained}
    buffers = {name: value for name, value in model.state_dict().items() if name not in trained}

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (one[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    def norm(one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        gradients = torch.func.grad(loss)(parameters, one, label)
        return sum(g.square().sum() for g in gradients.values()).sqrt()

    chunk = _GRADIENT_BYTES // (4 * sum(value.numel() for value in parameters.values()))
    norms = torch.func.vmap(norm, in_dims=(0, 0), chunk_size=max(1, min(32, chunk)))
    with warnings.catch_warnings():  # torch says which operations vmap takes one example at a time
        warnings.filterwarnings("ignore", message="There is a performance drop")
        parts = [
            norms(some.to(device).float(), wanted.to(device)).cpu()
            for some, wanted in zip(inputs.split(1024), labels.split(1024), strict=True)
        ]
    model.train(was_training)
    return torch.cat(parts).clamp_max(per_example.LARGEST)


def _state_folder(out: str) -> str:
    return out + ".state"


def _state_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"model-{number:04d}.pt")


def _forget_states(out: str) -> None:
    """Remove checkpoints, and their folder where it holds nothing else."""
    with contextlib.suppress(OSError):
        for path in Path(_state_folder(out)).glob("model-[0-9]*.pt*"):
            path.unlink()
        os.rmdir(_state_folder(out))


def _save_state(folder: str, number: int, state: dict[str, Any]) -> None:
    path = _state_path(folder, number)
    try:
        with files.replacing(path, path + ".tmp") as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise ProtopruneError(f"{path}: cannot write ({str(error).splitlines()[0]}); make room and run again") from None


def _load_state(folder: str, number: int) -> dict[str, Any] | None:
    """The checkpoint of a model; None where there is none or it is damaged, and the model is trained again."""
    path = _state_path(folder, number)
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch does not look at the digests that it has written
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # both raise whatever they stumble over
        return None
