"""Linear heads trained to convergence: multinomial logistic regression, its regularisation chosen on held-out images.

A head costs next to nothing, so nothing but its images should decide how good it gets: not the length of a training,
a learning rate, or a regularisation that suits more images. The loss (cross entropy plus an L2 penalty of the weights,
biases free) is convex and is minimised until its gradient vanishes. The strength of the penalty is chosen by the loss
on images held out from the training images themselves, by one rule for every subset. Vectors are standardised as those
of all heads are, and turned to their principal axes, in which the curvature is nearly diagonal and L-BFGS needs tens
of steps rather than hundreds. What this module does not know: files, lists, test sets.

    space = Space(vectors)                                  # once for a set, whatever the number of fits
    head = fit_head(space, labels, classes, rows=kept)
    accuracy = (head.predict(test_vectors) == test_labels).mean()
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from protoprune.arguments import as_numbers, checked
from protoprune.bounds import check_number, check_seed, check_whole
from protoprune.device import resolve_device
from protoprune.errors import UsageError
from protoprune.training.models import head_scale

# Inverse strengths of the penalty: the loss summed over images plus |W|^2 / (2 C), for standardised vectors, whose
# length is about 1. C is thus the variance of a logit under the prior. From strong to weak.
STRENGTHS = tuple(10 ** (half / 2) for half in range(-2, 9))  # 0.1 to 10,000
UNCHECKED = 1000.0  # where no image can be held out: the fewer the images, the less C matters
VERSION = 2  # one more whenever the same images give another head
# A strong penalty shrinks the logits, which costs loss and no accuracy: what is held out is judged at the scale that
# suits it. On features of CIFAR-10 and on planted classes this found up to 2.9 points more than the plain loss, up to
# 1.5 more than the accuracy of the held-out images, within 0.3 points of the best C (50 to 3,000 images).
_SCALES = tuple(2 ** (half / 2) for half in range(-4, 11))
_FOLDS = 5
_HELD_OUT = 500  # images that the choice should rest on: with fewer in one fold more folds are tried
ONE_FOLD = _FOLDS * _HELD_OUT  # images from which on one fold is enough: another says next to the same
# Largest entry of the gradient at the end, in coordinates in which the curvature starts at about 1: measured on
# features of CIFAR-10 the loss is then within 1e-6 of its minimum (on the way along the strengths within 1e-4).
_GRADIENT, _ROUGH = 5e-5, 1e-3
_STEPS = 2000  # of L-BFGS, far more than are needed
_BLOCK = 2**22  # logits that are worked on at once
_THREADS_PAY = 100_000_000  # multiplications of an evaluation, from which on threads are worth their waiting


@dataclass(frozen=True)
class Head:
    """A fitted softmax layer on vectors as they come: logits = vectors @ weight.T + bias."""

    weight: np.ndarray  # (c, d) float32
    bias: np.ndarray  # (c,) float32; -inf for a class without training images, which is never predicted
    strength: float  # C, see STRENGTHS
    held_out: dict[float, float] = field(default_factory=dict)  # C -> loss on held-out images at its best scale, nats
    evaluations: int = 0  # of the loss, in all fits
    converged: bool = True  # whether the last fit ended by its gradient

    def logits(self, vectors: np.ndarray | torch.Tensor) -> np.ndarray:
        """(n, c) float32 for vectors (n, d)."""
        weight, bias = torch.from_numpy(self.weight), torch.from_numpy(self.bias)
        parts = _vectors(vectors, self.weight.shape[1]).split(max(1, _BLOCK // len(bias)))
        return np.concatenate([torch.addmm(bias, part.float(), weight.T).numpy() for part in parts])

    def predict(self, vectors: np.ndarray | torch.Tensor) -> np.ndarray:
        """(n,) int64: the most probable class of each."""
        return self.logits(vectors).argmax(1)


class Space:
    """Vectors (n, d), standardised and turned to their principal axes: what many fits on parts of a set share.

    The scale is that of all of them, whatever part is trained on, as it is for the heads of `training.loop`.
    """

    @checked
    def __init__(self, vectors: np.ndarray | torch.Tensor, *, device: str | torch.device = "cpu") -> None:
        vectors, device = _vectors(vectors), device if isinstance(device, torch.device) else resolve_device(device)
        if not len(vectors):
            raise UsageError("no vectors: expected some, (images, dimensions)")
        mean, std = head_scale(vectors.float())
        turned = ((vectors.float() - mean) / std).to(device)  # (n, d), a copy
        if not torch.isfinite(turned).all():
            raise UsageError("vectors with values that are not finite; leave those images out")
        values, axes = torch.linalg.eigh((turned.T @ turned).double() / len(turned))
        self.variance = values.clamp_min(0)  # (d,) float64, of each axis
        std = std.double().to(device)[:, None]
        self.axes = (axes / std).float()  # (d, d): a raw vector less the mean -> axes
        self.back = (axes * std).float()  # (d, d): weights of a raw vector -> of axes
        self.mean = mean.to(device)
        self.turned = turned
        axes = axes.float()
        for block in turned.split(65_536):
            block.copy_(block @ axes)

    def __len__(self) -> int:
        return len(self.turned)

    def raw(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(weight (c, d), bias (c,)) for vectors as they come, of those for turned ones."""
        weight = weight @ self.axes.T
        return weight.cpu().numpy(), (bias - weight @ self.mean).cpu().numpy()

    def parameters(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """(c, d + 1) float64, the other way round: of turned vectors, for weights of vectors as they come."""
        raw, offset = torch.from_numpy(weight).to(self.mean), torch.from_numpy(bias).to(self.mean)
        both = torch.cat([raw @ self.back, (offset + raw @ self.mean)[:, None]], dim=1)
        return both.cpu().double().numpy()


@checked
def fit_head(
    vectors: np.ndarray | torch.Tensor | Space,
    labels: np.ndarray,
    classes: int,
    *,
    rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    strength: float | None = None,
    near: Head | None = None,
    seed: int = 0,
) -> Head:
    """Logistic regression on the subset `rows` (m,), to convergence.

    vectors: (n, d), or their `Space` where several fits share them; labels: (n,) from 0 to classes - 1; weights: (n,)
    loss weights, whose scale does not matter, and 0 is the same as leaving out; strength: C, by default the one of
    STRENGTHS with the lowest loss on held-out images of the subset, the logits scaled to suit them; near: with a given
    strength, a head of similar images to start from, which changes the last digits of the result and, where both are
    thousands, halves the steps; seed: of which are held out.

    The choice: a fifth of the images, stratified by class (the first of each class is never held out), and as many such
    folds as it takes for 500 held-out images, at most 5. Fits go from strong to weak, each from the one before, until
    two strengths in a row have made it worse. The head is then fitted to the whole subset. Where most classes have one
    image, and nothing of them can be held out, C is UNCHECKED.

    The same input (`near` too) and seed give the same head. Raises UsageError for an empty subset or weights that are
    none.
    """
    if strength is not None:
        check_number("strength", strength, 0, 1e12, above=True)
    space = vectors if isinstance(vectors, Space) else Space(vectors)
    check_whole("classes", classes)
    check_seed(seed)
    labels = _numbers("labels", labels, len(space), "iu")
    rows = np.arange(len(space)) if rows is None else _rows(rows, len(space))
    if weights is not None:
        weights = _numbers("weights", weights, len(space), "fiub").astype(np.float64)[rows]
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise UsageError("loss weights: expected finite numbers of 0 or more")
        rows, weights = rows[weights > 0], weights[weights > 0]
    if not len(rows):
        raise UsageError("a head needs at least one training image with a weight above 0")
    present, labels = np.unique(labels[rows], return_inverse=True)
    if present[0] < 0 or present[-1] >= classes:
        raise UsageError(f"label {present[0] if present[0] < 0 else present[-1]}: expected 0 to {classes - 1}")
    problem = _Problem(space, rows, labels, len(present), weights)
    held_out: dict[float, float] = {}
    start = None
    with _threads(len(rows) * len(present) * space.turned.shape[1]):
        if strength is None:
            strength, start, held_out = _choose(problem, seed)
        elif near is not None and np.array_equal(np.isfinite(near.bias).nonzero()[0], present):
            start = space.parameters(near.weight[present], near.bias[present])
        solution = problem.solve(strength, start)
    weight, bias = space.raw(*problem.split(solution))
    whole = np.zeros((classes, weight.shape[1]), np.float32)
    offsets = np.full(classes, -np.inf, np.float32)
    whole[present], offsets[present] = weight, bias
    return Head(whole, offsets, strength, held_out, problem.evaluations, problem.converged)


def _vectors(values: object, dim: int | None = None) -> torch.Tensor:
    """(n, d) numbers, as a tensor; UsageError for anything else."""
    found = values if isinstance(values, torch.Tensor) else torch.from_numpy(_numbers("vectors", values))
    if found.ndim != 2 or dim not in (None, found.shape[1]):
        raise UsageError(f"vectors of shape {tuple(found.shape)}: expected (images, {dim or 'dimensions'})")
    return found


def _numbers(name: str, values: object, n: int | None = None, kinds: str = "fiu") -> np.ndarray:
    """An array of numbers, one for each of `n`; UsageError for anything else."""
    what = "numbers" if "f" in kinds else "whole numbers"
    found = as_numbers(name, values, what)
    if found.dtype.kind not in kinds or (n is not None and found.shape != (n,)):
        each = "" if n is None else f", one for each of {n:,} images"
        raise UsageError(f"{name} of type {found.dtype} and shape {found.shape}: expected {what}{each}")
    return np.array(found, order="C", copy=None if found.flags.writeable else True)  # torch warns of what is read-only


def _rows(rows: object, n: int) -> np.ndarray:
    """(m,) int64, ascending. A mask is refused: taken for rows it would be other images, silently."""
    found = np.asarray(rows)
    if found.dtype == bool:
        raise UsageError("rows: a mask, expected the rows of the subset; give np.flatnonzero of it")
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise UsageError(f"rows of type {found.dtype} and shape {found.shape}: expected the rows of the subset")
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < n:
        raise UsageError(f"rows {found.min()} to {found.max()} of {n:,} images; expected 0 to {n - 1:,}")
    return np.sort(found.astype(np.int64))


@contextlib.contextmanager
def _threads(work: int) -> Iterator[None]:
    """One thread for evaluations of few multiplications: more of them mostly wait for each other, hundreds of times a
    fit (144 images, 10 classes, 192 dimensions, two threads on a busy machine: 7 times the wall time)."""
    before = torch.get_num_threads()
    if work < _THREADS_PAY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Problem:
    """The loss of one subset, as a function of float64 parameters (c * (d + 1),) in well-conditioned coordinates."""

    def __init__(
        self, space: Space, rows: np.ndarray, labels: np.ndarray, classes: int, weights: np.ndarray | None
    ) -> None:
        self.space, self.classes = space, classes
        device = space.turned.device
        self.inputs = space.turned[torch.from_numpy(np.ascontiguousarray(rows)).to(device)]
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        share = np.full(len(rows), 1 / len(rows)) if weights is None else weights / weights.sum()
        self.share = torch.from_numpy(share.astype(np.float32)).to(device)  # (m,) of the loss, adds up to 1
        self.evaluations, self.converged = 0, True

    def part(self, keep: np.ndarray) -> _Problem:
        """The same loss on some of the images, with their weights."""
        rows = torch.from_numpy(keep).to(self.labels.device)
        same = object.__new__(_Problem)
        same.space, same.classes, same.evaluations, same.converged = self.space, self.classes, 0, True
        same.inputs, same.labels = self.inputs[rows], self.labels[rows]
        same.share = self.share[rows] / self.share[rows].sum()
        return same

    def solve(self, strength: float, start: np.ndarray | None = None, gradient: float = _GRADIENT) -> np.ndarray:
        """The parameters, (c, d + 1) in turned coordinates, that minimise the loss."""
        from scipy.optimize import minimize

        penalty = 1 / (strength * len(self.labels))
        curvature = max(self.classes - 1, 1) / self.classes**2  # of the cross entropy where all classes are as probable
        scale = 1 / torch.sqrt(curvature * self.space.variance.cpu() + penalty).numpy()  # (d,)
        scale = np.append(scale, curvature**-0.5)  # and of the bias
        shape = (self.classes, len(scale))
        first = np.zeros(shape) if start is None else start / scale

        def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = self.loss(free.reshape(shape) * scale, penalty)
            return value, (slope * scale).ravel()

        result = minimize(
            loss, first.ravel(), jac=True, method="L-BFGS-B",
            options={"gtol": gradient, "ftol": 1e-10, "maxiter": _STEPS, "maxfun": 2 * _STEPS},
        )  # fmt: skip
        self.converged = bool(np.abs(result.jac).max() < 10 * gradient)  # or it ended at float32's last digits
        return result.x.reshape(shape) * scale

    def loss(self, parameters: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        """(penalised mean loss, its gradient (c, d + 1))."""
        weight, bias = self.split(parameters)
        gradient, inner = torch.zeros_like(weight), torch.zeros_like(bias)
        value = 0.5 * penalty * float(weight.double().square().sum())
        self.evaluations += 1
        for inputs, labels, share, minus_one in self.blocks:
            logits = torch.addmm(bias, inputs, weight.T)
            log_sum = logits.logsumexp(1, keepdim=True)
            true = logits.gather(1, labels)
            value += float(((log_sum - true).double() * share).sum())
            error = logits.sub_(log_sum).exp_()  # softmax less one-hot
            error.scatter_add_(1, labels, minus_one)
            error *= share
            gradient.addmm_(error.T, inputs)
            inner += error.sum(0)
        gradient += penalty * weight
        return value, torch.cat([gradient, inner[:, None]], dim=1).cpu().double().numpy()

    def rank_loss(self, parameters: np.ndarray) -> float:
        """Mean loss in nats, without the penalty, at the best of _SCALES of the logits."""
        weight, bias = self.split(parameters)
        losses = np.zeros(len(_SCALES))
        for inputs, labels, share, _ in self.blocks:
            logits = torch.addmm(bias, inputs, weight.T)
            losses += [
                float(nn.functional.cross_entropy(scale * logits, labels[:, 0], reduction="none") @ share[:, 0])
                for scale in _SCALES
            ]
        return float(losses.min())

    def split(self, parameters: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.from_numpy(parameters).to(self.inputs.device, torch.float32)
        return both[:, :-1].contiguous(), both[:, -1].contiguous()

    @functools.cached_property
    def blocks(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(inputs (b, d); label, share of the loss and -1 of each, (b, 1)): made once for hundreds of steps."""
        columns = self.labels[:, None], self.share[:, None], torch.full_like(self.share, -1)[:, None]
        size = max(1, _BLOCK // self.classes)
        return list(zip(*(one.split(size) for one in (self.inputs, *columns)), strict=True))


def _choose(problem: _Problem, seed: int) -> tuple[float, np.ndarray | None, dict[float, float]]:
    """(strength, parameters to start from, {strength: loss on held-out images})."""
    folds = _folds(problem.labels.cpu().numpy(), seed)
    covered = len(np.unique(problem.labels.cpu().numpy()[np.any(folds, axis=0)])) if folds else 0
    if covered < max(2, problem.classes / 2):  # a few classes would speak for all: for predicting none but them
        return UNCHECKED, None, {}
    parts = [(problem.part(~held), problem.part(held)) for held in folds]
    starts: list[np.ndarray | None] = [None] * len(parts)
    found: dict[float, float] = {}
    best, worse = np.inf, 0
    kept: tuple[float, np.ndarray | None] = UNCHECKED, None
    for strength in STRENGTHS:
        solutions = [inside.solve(strength, start, _ROUGH) for (inside, _), start in zip(parts, starts, strict=True)]
        starts = [*solutions]
        losses = [outside.rank_loss(one) for (_, outside), one in zip(parts, solutions, strict=True)]
        found[strength] = float(np.mean(losses))
        if found[strength] < best:
            best, kept, worse = found[strength], (strength, solutions[0]), 0
        else:
            worse += 1
            if worse == 2:
                break
    problem.evaluations += sum(inside.evaluations for inside, _ in parts)
    return *kept, found


def _folds(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """(m,) bool masks of what is held out; none when every class has one image."""
    order = np.random.default_rng([seed, 0xF01D]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within it
    first = np.append(True, labels[order][1:] != labels[order][:-1])
    free = order[~first]
    count = min(_FOLDS, -(-_HELD_OUT * _FOLDS // max(len(free), 1)), len(free))
    masks = []
    for fold in range(count):
        mask = np.zeros(len(labels), bool)
        mask[free[fold::_FOLDS]] = True
        if mask.any():
            masks.append(mask)
    return masks
