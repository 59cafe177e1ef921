"""One training loop for heads and networks, in which two runs differ by their subset alone.

"Permute all, then filter": the order of an epoch is a permutation of all n examples, of which a subset takes its own
in turn, and the augmentation of an example depends on (seed, epoch, example) only. So with the same seed two subsets
show the images that they share in the same order with the same crops. Model, order and augmentation have seeds of
their own, all derived from one number; torch's global generator is left as it was found.

Data that fit on the device live there as uint8. Mixed precision where the hardware computes in bf16, channels_last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from protoprune.arguments import check_fields
from protoprune.bounds import check_number, check_whole
from protoprune.device import compiled, native_bf16, resolve_device
from protoprune.errors import ProtopruneError, UsageError
from protoprune.training import models
from protoprune.training.examples import Examples
from protoprune.units import many

if TYPE_CHECKING:
    from protoprune.samplers import PruningSampler

AUGMENT = ("none", "crop-flip", "resized-crop")
SCHEDULES = ("linear", "cosine", "steps")
_SAMPLE = 8192  # examples that the normalisation of the inputs is measured on
_EVALUATED_PIXELS = 2**22  # of one evaluation batch: 83 images of 224 x 224, 4,096 of 32 x 32


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. `Recipe.for_model` fills in what suits a model."""

    model: str = "cnn"  # head, cnn, resnet18, timm:NAME
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1  # at its highest
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 5e-4
    bias_lr: float = 1.0  # learning rate of biases and batch norm, as a multiple
    schedule: str = "linear"  # to 0; or cosine, or steps: x 0.2 at 30, 60 and 80 % (Data Diet)
    warmup: float = 0.15  # of all steps
    augment: str = "crop-flip"
    label_smoothing: float = 0.0
    image_size: int = 32
    width: int = 32  # of cnn
    hidden: int = 0  # of head
    weights: str | os.PathLike[str] | None = None  # file to start from
    precision: str = "auto"  # fp32 or bf16
    compile: bool = False

    def __post_init__(self) -> None:
        check_fields(self, globals())

    @classmethod
    def for_model(cls, model: str, **given: Any) -> Recipe:
        """The defaults of a model with the given values in their place; None counts as not given."""
        usual: dict[str, Any] = {"lr": 0.02, "weight_decay": 5e-4} if model.startswith("timm:") else {}
        known: dict[str, dict[str, Any]] = {
            "head": {"epochs": 20, "batch_size": 256, "lr": 1.0, "weight_decay": 1e-5, "augment": "none"},
            "resnet18": {"epochs": 20},
            "cnn": {"lr": 0.2, "momentum": 0.85, "weight_decay": 1.3e-3, "bias_lr": 64.0},
        }
        chosen = {**known.get(model, usual), **{name: value for name, value in given.items() if value is not None}}
        unknown = set(chosen) - set(cls.__dataclass_fields__)
        if unknown:
            raise UsageError(f"{', '.join(sorted(unknown))}: no setting of a training recipe")
        return cls(model=model, **chosen).checked()

    def checked(self) -> Recipe:
        """Itself, or UsageError for a value out of range."""
        models.check_name(self.model)
        check_whole("--epochs", self.epochs, 1, 1_000_000)
        check_whole("--batch-size", self.batch_size, 1, 100_000_000)
        check_number("--lr", self.lr, 0, 1e38, above=True)  # of float32
        check_number("--weight-decay", self.weight_decay, 0, 1e38)
        check_whole("--width", self.width, 1, 8192)
        check_whole("--hidden", self.hidden, 0, 1_000_000)
        check_whole("--image-size", self.image_size, 8, 16_384)
        check_number("momentum", self.momentum, 0, 1)
        check_number("bias_lr", self.bias_lr, 0, 1e6)
        check_number("warmup", self.warmup, 0, 1)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        if self.augment not in AUGMENT:
            raise UsageError(f"--augment {self.augment}: expected one of {', '.join(AUGMENT)}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"--schedule {self.schedule}: expected one of {', '.join(SCHEDULES)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"--precision {self.precision}: expected auto, fp32 or bf16")
        return replace(self, augment="none") if self.model == "head" else self


@dataclass
class State:
    """A run after one of its epochs; `model` is the live one, and goes on changing."""

    epoch: int  # epochs done
    step: int  # optimizer steps done
    seconds: float  # of training alone
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: np.ndarray  # (steps of this epoch,) float32 training loss of each step

    def checkpoint(self) -> dict[str, Any]:
        """Everything that a later `epochs(..., resume=)` needs, for torch.save."""
        return {
            "epoch": self.epoch, "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip


def epochs(
    data: Examples,
    recipe: Recipe,
    *,
    rows: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    seed: int = 0,
    steps: int | None = None,
    sampler: PruningSampler | None = None,
    device: str | torch.device = "auto",
    start: dict[str, torch.Tensor] | None = None,
    resume: dict[str, Any] | None = None,
) -> Iterator[State]:
    """Train, and hand out the state after each epoch.

    rows: (m,) indices of the subset, default all; weights: (n,) loss weights; steps: optimizer steps in all, instead
    of recipe.epochs passes over the subset; sampler: chooses the rows of each epoch in place of `rows` (see
    `protoprune.samplers`); start: a state dict to start from, classifier left out; resume: a `State.checkpoint()`.

    Raises UsageError when the subset is empty, ProtopruneError when the loss is no longer a number.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    n = len(data)
    mask = np.ones(n, bool) if rows is None else _mask(rows, n)
    if sampler is None and not data.vectors and min(mask.sum(), recipe.batch_size) < 2:
        raise UsageError("a network is trained on batches of 2 images and more; keep more, or raise --batch-size")
    model = make_model(data, recipe, seed, start).to(device)
    optimizer = torch.optim.SGD(
        models.parameter_groups(model, recipe.weight_decay, recipe.bias_lr), lr=recipe.lr, momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )  # fmt: skip
    epoch = step = 0
    seconds = 0.0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        epoch, step, seconds = resume["epoch"], resume["step"], resume["seconds"]
    total = _total_steps(mask, recipe, steps, sampler)
    source = _Batches(data, device)
    labels = torch.from_numpy(data.labels).to(device)
    weight = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device)
    forward = compiled(model) if recipe.compile else model
    cast = autocast(recipe.precision, device, recipe.model)
    while step < total:
        began = time.perf_counter()
        chosen = _chosen(mask, sampler, seed, epoch)
        augmentation = _Augmentation(recipe.augment, data.inputs.shape, seed, epoch)
        model.train()
        losses_seen = []
        batches = split(torch.from_numpy(chosen), recipe.batch_size)[: total - step]
        with _seeded([seed, 2, epoch]), source.stream(batches) as stream:  # dropout and its like
            for picked, inputs in stream:
                for group in optimizer.param_groups:
                    group["lr"] = group["times"] * recipe.lr * rate(recipe, step, total)
                target = labels[picked.to(device)]
                with cast():
                    logits = forward(augmentation(inputs, picked))
                losses = nn.functional.cross_entropy(
                    logits.float(), target, reduction="none", label_smoothing=recipe.label_smoothing
                )
                loss = _weighted(losses, picked, weight, sampler)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses_seen.append(loss.detach())
                step += 1
                if sampler is not None:
                    sampler.update(picked, losses.detach())
        if not torch.isfinite(loss):
            raise ProtopruneError(f"the loss is {loss.item()} after {many(step, 'step')}; train with a smaller --lr")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        epoch += 1
        seconds += time.perf_counter() - began
        yield State(epoch, step, seconds, model, optimizer, torch.stack(losses_seen).cpu().numpy())


def make_model(data: Examples, recipe: Recipe, seed: int, start: dict[str, Any] | None = None) -> models.Normalised:
    """The untrained model of a run; its normalisation is that of the whole set, whatever the subset."""
    spread = np.linspace(0, len(data) - 1, min(len(data), _SAMPLE)).astype(np.int64)
    with _seeded([seed, 0]):
        model = models.build(
            recipe.model, len(data.classes), data.inputs[torch.from_numpy(spread)], width=recipe.width,
            hidden=recipe.hidden, weights=None if recipe.weights is None else os.fspath(recipe.weights),
        )  # fmt: skip
    if start is not None:
        models.start_from(model, start)
    return model


@dataclass
class Fit:
    """A finished run."""

    predictions: np.ndarray  # (n_test,) int64, empty without a test set
    seconds: float  # of training alone, evaluation not counted
    steps: int
    model: nn.Module
    losses: np.ndarray  # (steps,) float32 training loss of each step


def fit(
    train: Examples,
    test: Examples | None,
    recipe: Recipe,
    *,
    on_epoch: Callable[[int, float, np.ndarray], None] | None = None,
    **how: Any,
) -> Fit:
    """Train to the end (`how` as for `epochs`) and predict the test set.

    `on_epoch(epoch, training seconds so far, predictions on the test set)` costs an evaluation an epoch.
    """
    losses = []
    for state in epochs(train, recipe, **how):
        losses.append(state.losses)
        if on_epoch and test is not None:
            on_epoch(state.epoch, state.seconds, predict(state.model, test, recipe.precision))
    predictions = np.empty(0, np.int64) if test is None else predict(state.model, test, recipe.precision)
    return Fit(predictions, state.seconds, state.step, state.model, np.concatenate(losses))


def predict(model: nn.Module, data: Examples, precision: str = "auto") -> np.ndarray:
    """(n,) int64: the most probable class of each example."""
    return logits(model, data.inputs, precision=precision).argmax(1).numpy()


@torch.no_grad()
def logits(model: nn.Module, inputs: torch.Tensor, *, precision: str = "auto", batch_size: int = 1024) -> torch.Tensor:
    """float32 (n, c) logits on the host, in evaluation mode and without augmentation."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    cast = autocast(precision, device, "head" if inputs.ndim == 2 else "network")
    if inputs.ndim == 4:  # 1,024 photographs' activations take many gigabytes
        batch_size = max(16, min(batch_size, _EVALUATED_PIXELS // inputs.shape[-1] ** 2))
    parts = []
    for part in inputs.split(batch_size):
        with cast():
            parts.append(model(part.to(device, non_blocking=True)).float().cpu())
    model.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, 0)


def rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of a step, as a share of its highest."""
    warm = recipe.warmup * total
    if step < warm:
        return (step + 1) / (warm + 1)
    if recipe.schedule == "steps":
        return 0.2 ** sum(step >= share * total for share in (0.3, 0.6, 0.8))
    left = (total - step) / max(total - warm, 1)
    return left if recipe.schedule == "linear" else 0.5 - 0.5 * float(np.cos(np.pi * left))


def autocast(
    precision: str, device: torch.device, model: str
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A maker of autocast contexts: bf16 for networks where the hardware computes in it, else nothing."""
    if computes_in(precision, device, model) == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def computes_in(precision: str, device: torch.device, model: str) -> str:
    """What a precision, auto among them, comes to: fp32 or bf16."""
    if precision == "auto":
        return "bf16" if model != "head" and native_bf16(device) else "fp32"
    return precision


def _mask(rows: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[rows] = True
    if not mask.any():
        raise UsageError("the list keeps none of the training images; keep more")
    return mask


def _total_steps(mask: np.ndarray, recipe: Recipe, steps: int | None, sampler: PruningSampler | None) -> int:
    if steps is None and sampler is not None:
        raise UsageError("a run with a sampler needs the number of steps: its epochs differ in length")
    if steps is not None and steps < 1:
        raise UsageError(f"{steps} steps: expected at least 1")
    return steps or recipe.epochs * steps_per_epoch(int(mask.sum()), recipe.batch_size)


def _chosen(mask: np.ndarray, sampler: PruningSampler | None, seed: int, epoch: int) -> np.ndarray:
    """(m,) int64: the rows of an epoch in the order they are shown: all are permuted, then filtered."""
    if sampler is None:
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(mask))
        return order[mask[order]]
    sampler.set_epoch(epoch)
    chosen = np.fromiter(sampler, np.int64)
    if not len(chosen):
        raise ProtopruneError(f"the sampler chose no examples in epoch {epoch}; keep more")
    return chosen


def steps_per_epoch(m: int, batch_size: int) -> int:
    """Batches of one pass over m examples, see `split`. None is of one example unless all are: batch norm needs two."""
    return max(1, min(-(-m // batch_size), m // 2 if batch_size > 1 else m))


def split(order: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Batches that differ by one example at most. A short last one would cost accuracy: two images left over took 3 to
    7 points from a small CNN (1,250 against 1,248 images, batch 32), since batch norm makes noise of them."""
    return list(order.tensor_split(steps_per_epoch(len(order), batch_size)))


def _weighted(
    losses: torch.Tensor, picked: torch.Tensor, weight: torch.Tensor | None, sampler: PruningSampler | None
) -> torch.Tensor:
    if weight is not None:
        losses = losses * weight[picked.to(losses.device)]
    if sampler is not None and hasattr(sampler, "weights"):
        losses = losses * sampler.weights(picked).to(losses.device)
    return losses.mean()


@contextlib.contextmanager
def _seeded(entropy: Sequence[int]) -> Iterator[None]:
    """torch's global generators with a seed of our own, and as they were afterwards."""
    number = int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0] >> 1)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(number)
        yield


class _Batches:
    """Inputs by rows: from the device where all of them fit there, else from the host one batch ahead."""

    def __init__(self, data: Examples, device: torch.device) -> None:
        self.inputs, self.device = data.inputs, device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.inputs.numel() * self.inputs.element_size() < free / 2:
                self.inputs = self.inputs.to(device)
        self.resident = self.inputs.device.type == device.type  # "cuda" and "cuda:0" are one, and not equal

    @contextlib.contextmanager
    def stream(self, batches: list[torch.Tensor]) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        """(rows, inputs) of each batch in turn."""
        if self.resident:
            yield ((rows, self.inputs[rows.to(self.device)]) for rows in batches)
            return
        with ThreadPoolExecutor(1) as pool:
            yield self._ahead(batches, pool)

    def _ahead(
        self, batches: list[torch.Tensor], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        def fetch(rows: torch.Tensor) -> torch.Tensor:
            inputs = self.inputs[rows]
            if self.device.type != "cuda":  # pinned memory is CUDA's
                return inputs.to(self.device)
            return inputs.pin_memory().to(self.device, non_blocking=True)

        waiting = deque(pool.submit(fetch, rows) for rows in batches[:1])
        for number, rows in enumerate(batches):
            inputs = waiting.popleft().result()
            waiting.extend(pool.submit(fetch, later) for later in batches[number + 1 : number + 2])
            yield rows, inputs


class _Augmentation:
    """The crops and flips of one epoch, drawn for every example, so that they do not depend on the subset."""

    def __init__(self, kind: str, shape: Sequence[int], seed: int, epoch: int) -> None:
        self.kind, n = (kind, shape[0]) if len(shape) == 4 else ("none", 0)  # vectors stay as they are
        self.pad = max(1, shape[-1] // 8)
        generator = np.random.default_rng([seed, 3, epoch])
        if self.kind != "none":
            # Jordan 2024: seen in one way in one epoch and in the other in the next, never twice the same
            first = np.random.default_rng([seed, 3]).random(n) < 0.5
            self.flip = torch.from_numpy(first ^ bool(epoch % 2))
        if self.kind == "crop-flip":
            self.shift = torch.from_numpy(generator.integers(0, 2 * self.pad + 1, (2, n)))
        elif self.kind == "resized-crop":  # area 25-100 %, aspect 3/4 to 4/3, anywhere inside
            area, aspect = generator.uniform(0.25, 1, n), np.exp(generator.uniform(-0.288, 0.288, n))
            self.size = torch.from_numpy(np.clip(np.sqrt([area / aspect, area * aspect]), 0, 1))
            self.place = torch.from_numpy(generator.uniform(-1, 1, (2, n)))

    def __call__(self, inputs: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """uint8 (b, 3, s, s) -> the same, moved and mirrored."""
        if self.kind == "none":
            return inputs
        return self._shifted(inputs, picked) if self.kind == "crop-flip" else self._resized(inputs, picked)

    def _shifted(self, inputs: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        b, channels, height, width = inputs.shape
        device = inputs.device
        flip = self.flip[picked].to(device)[:, None]
        down, right = (one.to(device)[:, None] - self.pad for one in self.shift[:, picked])
        y = _reflect(torch.arange(height, device=device) + down, height)  # (b, h)
        x = torch.arange(width, device=device).expand(b, width)
        x = _reflect(torch.where(flip, width - 1 - x, x) + right, width)  # (b, w)
        y = y[:, None, :, None].expand(b, channels, height, width)
        return inputs.gather(2, y).gather(3, x[:, None, None, :].expand(b, channels, height, width))

    def _resized(self, inputs: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        device = inputs.device
        (height, width), (y, x) = self.size[:, picked].to(device).float(), self.place[:, picked].to(device).float()
        mirror = torch.where(self.flip[picked].to(device), -1.0, 1.0)
        zero = torch.zeros_like(width)
        matrix = torch.stack(  # output corners [-1, 1] -> a box of the input
            [torch.stack([width * mirror, zero, x * (1 - width)], 1), torch.stack([zero, height, y * (1 - height)], 1)],
            1,
        )
        grid = nn.functional.affine_grid(matrix, list(inputs.shape), align_corners=False)
        return nn.functional.grid_sample(inputs.float(), grid, padding_mode="reflection", align_corners=False)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices beyond an edge, mirrored back without repeating the edge."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
