"""Ensembles of heads, trained all at once: one matrix product takes the place of a loop over models.

A head is a linear or one-hidden-layer softmax classifier on fixed vectors. The models of an ensemble see the same
batches, and each ignores the examples that are not in its subset, so that the first layer of all of them is one large
product. They differ by subset and initialisation; a batch holds so many examples that each model sees the recipe's
batch size on average. What this module does not know: files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from protoprune.errors import ProtopruneError
from protoprune.training import loop, models, per_example
from protoprune.training.examples import Examples
from protoprune.training.loop import Recipe
from protoprune.units import many

_STEP_BYTES = 256 * 2**20  # of one step's activations; more models than that are trained one group after another


class Ensemble:
    """M heads: the weights and biases of each layer, stacked."""

    def __init__(self, data: Examples, recipe: Recipe, seeds: Sequence[int], device: torch.device):
        made = [loop.make_model(data, recipe, seed) for seed in seeds]
        self.mean, self.scale = made[0].mean.to(device), made[0].scale.to(device)
        layers = [[one for one in model.network.modules() if isinstance(one, nn.Linear)] for model in made]
        # The first layer is (d, M, outside): for all models it is one product. Further ones are (M, inside, outside).
        self.weights = [
            torch.stack([layer.weight.detach().T for layer in same], dim=0 if depth else 1)
            .contiguous()
            .to(device)
            .requires_grad_()
            for depth, same in enumerate(zip(*layers, strict=True))
        ]
        self.biases = [  # (M, 1, outside)
            torch.stack([layer.bias.detach()[None] for layer in same]).to(device).requires_grad_()
            for same in zip(*layers, strict=True)
        ]

    def __len__(self) -> int:
        return self.weights[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors.to(self.device).float() - self.mean) * self.scale

    def layers(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """What each layer puts out, (M, b, outside), for normalised inputs (b, d): the last are the logits."""
        first = (inputs @ self.weights[0].flatten(1)).view(len(inputs), len(self), -1)
        outputs = [first.transpose(0, 1) + self.biases[0]]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            outputs.append(torch.baddbmm(bias, outputs[-1].relu(), weight))
        return outputs

    def gradient_norm(self, inputs: torch.Tensor, outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """(M, b) GraNd of normalised inputs (b, d), in closed form: a layer's gradient is an outer product."""
        delta = outputs[-1].softmax(-1) - nn.functional.one_hot(labels, outputs[-1].shape[-1])
        squares = torch.zeros(delta.shape[:-1], device=delta.device)
        for depth in reversed(range(1, len(outputs))):
            squares += delta.square().sum(-1) * (outputs[depth - 1].relu().square().sum(-1) + 1)
            delta = torch.bmm(delta, self.weights[depth].transpose(1, 2)) * (outputs[depth - 1] > 0)
        return (squares + delta.square().sum(-1) * (inputs.square().sum(-1) + 1)).sqrt()

    def copy(self) -> Ensemble:
        """The ensemble as it is now."""
        same = copy.copy(self)
        same.weights = [one.detach().clone() for one in self.weights]
        same.biases = [one.detach().clone() for one in self.biases]
        return same

    def model(self, number: int) -> nn.Module:
        """One head as a module of its own."""
        linear = []
        for depth, (weights, biases) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight = (weights[number] if depth else weights[:, number]).detach().T.cpu()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = weight.contiguous(), biases[number, 0].detach().cpu()
            linear += [layer, nn.ReLU()]
        network = linear[0] if len(linear) == 2 else nn.Sequential(*linear[:-1])
        return models.Normalised(network, self.mean.cpu(), 1 / self.scale.cpu())


def epochs(
    data: Examples, recipe: Recipe, subset: np.ndarray, seeds: Sequence[int], order_seed: int, device: torch.device
) -> Iterator[tuple[int, Ensemble]]:
    """Train one head a row of `subset` (M, n) bool, and hand out (epochs done, ensemble) after each epoch.

    With one model on all examples and order_seed its seed this is what `loop.epochs` trains, up to rounding.
    """
    n = len(data)
    ensemble = Ensemble(data, recipe, seeds, device)
    inputs, labels = ensemble.normalise(data.inputs), torch.from_numpy(data.labels).to(device)
    member = torch.from_numpy(np.ascontiguousarray(subset.T)).to(device)  # (n, M)
    optimizer = torch.optim.SGD(
        [
            {"params": ensemble.weights, "weight_decay": recipe.weight_decay},
            {"params": ensemble.biases, "weight_decay": 0.0},
        ],
        lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
    )  # fmt: skip
    batch_size = _batch_size(recipe, subset)
    per_epoch = loop.steps_per_epoch(n, batch_size)
    step, total = 0, recipe.epochs * per_epoch
    for epoch in range(recipe.epochs):
        order = torch.from_numpy(np.random.default_rng([order_seed, 1, epoch]).permutation(n)).to(device)
        for picked in loop.split(order, batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * loop.rate(recipe, step, total)
            logits = ensemble.layers(inputs[picked])[-1]  # (M, b, c)
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[picked].repeat(len(ensemble)), reduction="none",
                label_smoothing=recipe.label_smoothing,
            ).view(len(ensemble), -1)  # fmt: skip
            mine = member[picked].T
            # A sum over models of means over their own examples: each gets the gradient that it would get alone.
            loss = ((losses * mine).sum(1) / mine.sum(1).clamp_min(1)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        if not torch.isfinite(loss):
            raise ProtopruneError(f"the loss is {loss.item()} after {many(step, 'step')}; train with a smaller --lr")
        yield epoch + 1, ensemble


def group_size(recipe: Recipe, classes: int, subset: np.ndarray) -> int:
    """How many of the models of `subset` (M, n) are trained at once: a step's activations, and the statistics of one
    epoch (about 40 bytes an example), are what takes memory."""
    count, n = subset.shape
    step = 16 * _batch_size(recipe, subset) * (classes + 2 * recipe.hidden)
    return max(1, min(count, _STEP_BYTES // step, 8 * _STEP_BYTES // (40 * n)))


def _batch_size(recipe: Recipe, subset: np.ndarray) -> int:
    """Of all examples, so many that each model has the recipe's batch size of its own on average."""
    n = subset.shape[1]
    return max(1, min(n, round(recipe.batch_size * n / subset.sum(1).mean())))


@torch.no_grad()
def measure(
    ensemble: Ensemble, data: Examples, *, gradients: bool, previous: Ensemble | None = None
) -> dict[str, np.ndarray]:
    """Every statistic of every model, each (M, n). `previous` is an earlier `copy()`, for `change`."""
    step = _rows_at_once(ensemble)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(data), step):
        inputs = ensemble.normalise(data.inputs[start : start + step])
        labels = torch.from_numpy(data.labels[start : start + step]).to(ensemble.device)
        outputs = ensemble.layers(inputs)
        before = previous.layers(inputs)[-1] if previous else None
        values = per_example.from_logits(outputs[-1], labels, before)
        if gradients:
            values["gradient_norm"] = ensemble.gradient_norm(inputs, outputs, labels).clamp_max(per_example.LARGEST)
        for name, value in values.items():
            parts.setdefault(name, []).append(value.cpu().numpy())
    return {name: np.concatenate(some, axis=1) for name, some in parts.items()}


@torch.no_grad()
def probabilities(ensemble: Ensemble, data: Examples) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, softmax (M, b, c) float32) of every model, a block of rows at a time."""
    step = _rows_at_once(ensemble)
    for start in range(0, len(data), step):
        rows = slice(start, min(start + step, len(data)))
        yield rows, ensemble.layers(ensemble.normalise(data.inputs[rows]))[-1].softmax(-1).cpu().numpy()


def _rows_at_once(ensemble: Ensemble) -> int:
    width = sum(bias.shape[-1] for bias in ensemble.biases)
    return max(1, _STEP_BYTES // (4 * 8 * width * len(ensemble)))
