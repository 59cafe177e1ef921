"""Dynamic pruning: samplers that choose anew, while a model trains, which examples it sees.

Ordinary `torch.utils.data.Sampler`s over the indices 0..n-1 of any map-style data set. They know indices and the losses
that `update` brings, nothing of images, models or files, and they draw only from generators derived from (seed, epoch):
no global seed is read or set.

    sampler = UCBSampler(len(dataset), keep=0.3)
    loader = DataLoader(WithIndex(dataset), batch_size=128, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels, index in loader:
            losses = cross_entropy(model(images), labels, reduction="none")
            sampler.update(index, losses)
            (losses * sampler.weights(index)).mean().backward()

RandomDynamicSampler, EpsilonGreedySampler and UCBSampler follow Raju, Daruwalla and Lipasti 2021 (arXiv 2111.12621),
InfoBatchSampler Qin et al. 2024 (arXiv 2303.04947), RS2Sampler Okanovic et al. 2024 (repeated sampling of random
subsets). The defaults (a new selection every 10 epochs, epsilon 0.1, c 1, decay 0.8) are ours, not the papers'.

Epochs. `set_epoch(e)`, as with DistributedSampler, says that the next pass is epoch e. When it is forgotten, a pass
that starts after one that was finished or trained on (by `update`) is the next epoch; a look at the first batch counts
as nothing. `len(sampler)` is the length of the current epoch's pass: where it changes (a full-data phase, InfoBatch),
call `set_epoch` before you ask.

Several processes. With torch.distributed every process holds the same selection and trains on its own share, padded to
equal length with the first indices of the epoch's order as DistributedSampler does (so up to num_replicas - 1 examples
come twice). The losses are exchanged when an epoch ends, in `set_epoch` or at the start of the next pass, never per
batch: call these on every process. rank and num_replicas are taken from the process group unless given; give rank=0,
num_replicas=1 where another library deals out the batches (Hugging Face accelerate), the losses are exchanged all the
same.

Resuming. `state_dict` holds plain tensors and numbers (torch.load reads them with weights_only=True) and continues
exactly, within an epoch too: the position is counted by `update`, so batches that workers have fetched and the model
has not seen come again. The pass that continues an epoch yields its rest only, while `len` stays the epoch's. Without
`update` calls it restarts the epoch. Of an epoch that was over when it was saved nothing is left: its pass is empty
where `set_epoch` asks for it again. A loader with drop_last never trains on the tail: call `set_epoch` for the next
epoch there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed
from torch.utils.data import Dataset, Sampler

from protoprune.arguments import plain
from protoprune.bounds import SEEDS, check_whole
from protoprune.errors import ProtopruneError, UsageError, warn

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ORDER, _SELECT, _CYCLE = range(3)  # what a generator is for: the third number beside seed and epoch
_AT_ONCE = 65_536  # indices that are made Python's, 40 bytes each
_BATCHES_ON_DEVICE = 64  # losses on a GPU are fetched together, so that no batch waits for one


class Indexed(Protocol):
    """A map-style data set: a length, and samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class WithIndex(Dataset[Any]):
    """The data set with each sample's index added: (image, label) -> (image, label, index).

    A dict gets the key "index", any other sample becomes (sample, index).
    """

    def __init__(self, dataset: Indexed) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _with_index(self.dataset[index], int(index))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A batch at once, the way torch's loader asks for it; uses the data set's own where it has one."""
        many = getattr(self.dataset, "__getitems__", None)
        samples = many(indices) if many else [self.dataset[index] for index in indices]
        return [_with_index(sample, int(index)) for sample, index in zip(samples, indices, strict=True)]


def _with_index(sample: Any, index: int) -> Any:
    if isinstance(sample, dict):
        return {**sample, "index": index}
    return (*sample, index) if isinstance(sample, (tuple, list)) else (sample, index)


class PruningSampler(Sampler[int]):
    """What all five share: phases, epochs, shares, losses and state. Use one of the subclasses.

    n: number of examples; keep: fraction of them KEPT at each selection, exactly round(keep * n).
    every: epochs between two selections. warm_up: epochs on all the data before the first.
    final_full: the last epochs on all the data, as a number of epochs (int) or a fraction of `epochs` (float, rounded
    up); needs epochs, the total. rank, num_replicas: see the module. Raises UsageError for values that cannot be.
    """

    needs_losses = False
    _exact = True  # round(keep * n) are kept at every selection
    _learned: tuple[str, ...] = ()  # names of the (n,) arrays that losses change, part of the state
    _mask: np.ndarray  # (n,) bool: the kept set of the epoch, of _size rows
    _size: int
    _block: int | None
    _trained: int  # of the epoch under way: how many indices the model was trained on
    _exhausted: bool  # its last index was handed out
    _resumed: bool  # it was begun before a restart
    _over: bool  # and ended before it: all of it was trained on
    _counted: bool  # its kept set is in the counts

    def __init__(
        self,
        n: int,
        keep: float,
        *,
        every: int = 10,
        warm_up: int = 0,
        final_full: int | float = 0,
        epochs: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        self.n, self.every = _whole("n", n, 1, "the number of examples, len(dataset)"), _whole("every", every, 1)
        self.warm_up, self.seed = _whole("warm_up", warm_up, 0), _whole("seed", seed, 0)
        self.keep = _fraction("keep", keep, "the fraction to keep, above 0 and at most 1", above=True)
        if self._exact and round(self.keep * n) == 0:
            raise UsageError(f"keep={keep:g}: keeps none of {n} examples; expected at least {1 / n:.2g}")
        self._final = _first_final_epoch(final_full, epochs)
        self._share_of = _check_rank(rank, num_replicas)
        self._settings = {name: getattr(self, name) for name in ("n", "keep", "every", "warm_up", "seed")}
        self.epoch, self._warned, self._short = 0, False, False
        self._batch = 0  # the largest so far
        self._counts = np.zeros(n, np.int32)
        self._new_epoch()
        if self.needs_losses:  # of the epoch under way: this process's, and those that all have exchanged
            self._own, self._shared = _Losses(n), _Losses(n)
            self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in self._learned:
            setattr(self, name, np.full(n, np.nan, np.float32))
        self._select(first=True)

    # What the training loop calls.

    def set_epoch(self, epoch: int) -> None:
        """Say that the next pass is epoch `epoch` (0, 1, ...): makes the selection if one is due.

        Calling it again with the same epoch changes nothing. With several processes call it on each.
        """
        if _whole("epoch", epoch, 0) != self.epoch:
            self._enter(int(epoch))
        self._exhausted = False
        self._resumed |= self._over  # the rest of an epoch that was over when it was saved is nothing
        if not self._resumed:
            self._trained = 0

    def __len__(self) -> int:
        """Indices that this process gets in the current epoch."""
        return math.ceil(self._size / self._world()[1])

    def __iter__(self) -> Iterator[int]:
        if self._exhausted or (self._trained and not self._resumed):
            self._enter(self.epoch + 1)
        if not self._counted:
            self._counts += self._mask
            self._counted = True
        return self._pass(self._share()[self._trained :])

    def update(self, indices: ArrayLike | torch.Tensor, losses: ArrayLike | torch.Tensor) -> None:
        """Tell the losses of a batch, one each (reduction="none"), once per batch and before or after the step.

        indices, losses: (b,) tensors on any device, arrays or lists. Values on a GPU are fetched every 64 batches
        without holding up this one. Several losses of one example within an epoch count as their mean.
        Raises UsageError for shapes that do not match, ProtopruneError for an index out of range or a loss that is
        not finite (naming the example; for values on a GPU up to 64 batches later). The random samplers look only at
        the number: it is the position in the epoch that a resumed training continues from.
        """
        index, loss = _tensor("update: indices", indices).detach(), _tensor("update: losses", losses).detach()
        if index.dim() != 1 or index.shape != loss.shape:
            shapes = f"indices {tuple(index.shape)} and losses {tuple(loss.shape)}"
            raise UsageError(f'update: {shapes} differ; expected one loss an index, as reduction="none" gives them')
        if index.numel():
            _check_integers("update", index)
        if self.needs_losses and index.device.type == loss.device.type == "cpu":
            self._record(index.long(), loss)
        elif self.needs_losses:
            self._waiting.append((index.clone(), loss.clone()))
            if len(self._waiting) >= _BATCHES_ON_DEVICE:
                self._fetch()
        processes = torch.distributed.get_world_size() if _distributed() else 1
        batch = len(index) * max(1, processes // self._world()[1])  # more where another library deals out
        self._trained, self._batch = self._trained + batch, max(self._batch, batch)
        self._resumed = False

    def weights(self, indices: ArrayLike | torch.Tensor) -> torch.Tensor:
        """What to multiply each loss by before the mean, (b,) float32 on the indices' device: ones but in InfoBatch."""
        index = _tensor("weights: indices", indices)
        return torch.ones(index.shape, dtype=torch.float32, device=index.device)

    def selected(self) -> np.ndarray:
        """The kept set of the current epoch, (n,) bool."""
        return self._mask.copy()

    @property
    def counts(self) -> np.ndarray:
        """In how many epochs so far each example was selected, (n,) int32; full-data epochs count."""
        return self._counts.copy()

    def synchronize(self) -> None:
        """Exchange the losses of the epoch under way between all processes; call it on every one, before `state_dict`.

        In a single process, and for the samplers that need no losses, there is nothing to do.
        """
        if not self.needs_losses:
            return
        self._fetch()
        own = self._own.take()
        parts = [own]
        if _distributed():
            parts = [own] * torch.distributed.get_world_size()  # each process's takes its place
            torch.distributed.all_gather_object(parts, own)
        for index, total, seen in parts:  # in the order of the ranks, so that the sums are the same to the last bit
            self._shared.sum[index] += total
            self._shared.seen[index] += seen

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, O(n). With several processes first `synchronize` on every one."""
        if not _distributed():
            self.synchronize()
        elif self.needs_losses and (self._waiting or self._own.seen.any()):
            raise ProtopruneError(
                "state_dict: losses not exchanged yet; call sampler.synchronize() on every process first"
            )
        arrays = {name: getattr(self, name) for name in ("_mask", "_counts", *self._learned)}
        if self.needs_losses:
            arrays |= {"_sum": self._shared.sum, "_seen": self._shared.seen}
        state = {name.lstrip("_"): torch.from_numpy(array.copy()) for name, array in arrays.items()}
        place = {"epoch": self.epoch, "trained": self._trained, "exhausted": self._exhausted, "counted": self._counted}
        share = {"length": len(self), "num_replicas": self._world()[1]}
        return {"sampler": type(self).__name__, "settings": dict(self._settings), **place, **share, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a sampler made with the same arguments (`epochs` and the final
        phase may differ, and at the end of an epoch the number of processes).

        Raises UsageError when the state belongs to another sampler, naming what differs.
        """
        lacking = {"settings", "epoch", "trained", "length", "counted", "exhausted"} - set(
            state if isinstance(state, Mapping) else ()
        )
        if lacking:
            raise UsageError(f"load_state_dict: no {min(lacking)} in it; expected what state_dict() of a sampler gave")
        given = {"sampler": state.get("sampler"), **state.get("settings", {})}
        expected = {"sampler": type(self).__name__, **self._settings}
        for name in expected:
            if given.get(name) != expected[name]:
                raise UsageError(f"load_state_dict: saved with {name}={given.get(name)}, but this has {expected[name]}")
        trained, replicas = state["trained"], self._world()[1]
        self._resumed, self._over = 0 < trained < state["length"], 0 < state["length"] <= trained
        if self._resumed and replicas != state["num_replicas"]:
            saved = f"load_state_dict: saved within an epoch by {state['num_replicas']} processes"
            raise UsageError(f"{saved}; expected as many, not {replicas}, or a state saved at the end of an epoch")
        self.epoch, self._trained, self._counted = state["epoch"], trained, state["counted"]
        # Workers may have drawn all of the epoch before the model saw it: with losses, what was trained on counts.
        self._exhausted = state["exhausted"] and not trained and not self.needs_losses
        for name in ("_mask", "_counts", *self._learned):
            getattr(self, name)[:] = state[name.lstrip("_")].cpu().numpy()
        if self.needs_losses:
            self._own, self._shared, self._waiting = _Losses(self.n), _Losses(self.n), []
            self._shared.sum[:], self._shared.seen[:] = state["sum"].cpu().numpy(), state["seen"].cpu().numpy()
        self._block, self._size = self._block_of(self.epoch), int(self._mask.sum())
        self._selection_changed()

    # What a method defines.

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        """The kept set of the block-th selection, (n,) bool; `rng` depends on seed and block only."""
        raise NotImplementedError

    def _learn(self, index: np.ndarray, loss: np.ndarray) -> None:
        """Take the losses of an epoch: index (m,) int64 without repeats, loss (m,) float32."""

    def _selection_changed(self) -> None:
        """Called when the mask was made or loaded."""

    # The rest.

    def _block_of(self, epoch: int) -> int | None:
        """The number of the selection that holds in an epoch; None where all the data is used."""
        if epoch < self.warm_up or epoch >= self._final:
            return None
        return (epoch - self.warm_up) // self.every

    def _new_epoch(self) -> None:
        self._trained, self._exhausted, self._resumed, self._counted, self._over = 0, False, False, False, False

    def _enter(self, epoch: int) -> None:
        self._check_trained()
        self._take_losses()
        self.epoch = epoch
        self._new_epoch()
        self._select()

    def _check_trained(self) -> None:
        """Warn, once, of an epoch of which the model saw far less than its indices."""
        length, trained = len(self), self._trained
        if self._short or not 0 < trained <= 0.75 * length or length - trained <= self._batch:  # as drop_last may leave
            return
        self._short = True
        advice = "did the loop end early, or take the length of another epoch?"
        if _distributed():
            advice = (
                "another library seems to deal them out again: in Lightning say use_distributed_sampler=False, with "
                "accelerate make the sampler with rank=0, num_replicas=1"
            )
        warn(
            f"{type(self).__name__}: of the {length:,} indices of epoch {self.epoch} the model was trained on "
            f"{trained:,}; {advice}"
        )

    def _select(self, first: bool = False) -> None:
        block = self._block_of(self.epoch)
        if not first and block == self._block:
            return
        self._block = block
        if block is None:
            self._mask = np.ones(self.n, bool)
        else:
            self._mask = self._choose(block, self._generator(_SELECT, block))
        self._size = int(self._mask.sum())
        self._selection_changed()

    def _take_losses(self) -> None:
        """Exchange the losses of the epoch that ends, and learn from them."""
        if not self.needs_losses:
            return
        self.synchronize()
        index, total, seen = self._shared.take()
        if len(index):
            self._learn(index, (total / seen).astype(np.float32))
        elif self._exhausted and np.isnan(getattr(self, self._learned[0])).all():
            hint = "call sampler.update(indices, losses) after each batch"
            raise ProtopruneError(f"{type(self).__name__}: epoch {self.epoch} ended without a single loss; {hint}")

    def _record(self, index: torch.Tensor, loss: torch.Tensor) -> None:
        rows, values = index.numpy(), loss.double().numpy()
        outside = (rows < 0) | (rows >= self.n)
        if outside.any():
            raise ProtopruneError(f"update: index {rows[outside][0]} is out of range; expected 0 to {self.n - 1}")
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values))[0]
            hint = "skip such batches, or lower the learning rate if they are many"
            raise ProtopruneError(
                f"update: the loss of example {rows[bad]} is {values[bad]}, not a finite number; {hint}"
            )
        others = rows[~self._mask[rows]]
        if len(others) and not self._warned:
            self._warned = True
            warn(
                f"update: example {others[0]} is not in the selection of epoch {self.epoch}; the loader's own data set "
                "must be WithIndex(…), since within a Subset its indices are those of another set"
            )
        np.add.at(self._own.sum, rows, values)
        np.add.at(self._own.seen, rows, 1)

    def _fetch(self) -> None:
        """Bring the losses that wait on a device."""
        if self._waiting:
            indices, losses = zip(*self._waiting, strict=True)
            self._waiting = []
            self._record(_on_the_host(indices), _on_the_host(losses))

    def _share(self) -> np.ndarray:
        """This process's indices of the current epoch, in order.

        All n are permuted and then filtered: samplers of one seed see their common examples in the same order.
        """
        rank, replicas = self._world()
        order = self._generator(_ORDER, self.epoch).permutation(self.n)
        order = order[self._mask[order]]
        if replicas > 1:
            order = np.resize(order, len(self) * replicas)[rank::replicas]  # np.resize repeats from the start
        return order

    def _pass(self, order: np.ndarray) -> Iterator[int]:
        epoch = self.epoch
        for first in range(0, len(order) - 1, _AT_ONCE):
            yield from order[first : min(first + _AT_ONCE, len(order) - 1)].tolist()
        if epoch == self.epoch:  # before the last index: a loop over range(len(loader)) asks for none after it
            self._exhausted = True
        yield from order[-1:].tolist()

    def _world(self) -> tuple[int, int]:
        """(rank, num_replicas), asked when needed: process groups are often made after the sampler."""
        if self._share_of is not None:
            return self._share_of
        if _distributed():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _generator(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, number])


class RandomDynamicSampler(PruningSampler):
    """A uniformly random subset, drawn anew every `every` epochs; needs no losses (the baseline of Raju et al.)."""

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        return _mask_of(rng.permutation(self.n)[: round(self.keep * self.n)], self.n)


class RS2Sampler(PruningSampler):
    """A fresh random subset every epoch, without replacement over epochs (RS2, Okanovic et al. 2024); needs no losses.

    Selections take the next round(keep * n) of a random permutation; where it ends, the selection is filled from a new
    one, avoiding what it has already. After any number of selections no example was in more than one more of them than
    another.
    """

    def __init__(self, n: int, keep: float, *, every: int = 1, **options: Any) -> None:
        self._cycle, self._permutation = -1, np.empty(0, np.int64)
        super().__init__(n, keep, every=every, **options)

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        count = round(self.keep * self.n)
        cycle, start = divmod(block * count, self.n)
        rows = self._permutation_of(cycle)[start : start + count]
        if len(rows) < count:
            rows = np.concatenate([rows, self._permutation_of(cycle + 1)[: count - len(rows)]])
        return _mask_of(rows, self.n)

    def _permutation_of(self, cycle: int) -> np.ndarray:
        """The cycle-th permutation. Each depends on the one before, so that a jump works through those between."""
        if self._cycle > cycle:
            self._cycle = -1
        while self._cycle < cycle:
            self._cycle += 1
            rows = self._generator(_CYCLE, self._cycle).permutation(self.n)
            count = round(self.keep * self.n)
            left = -self._cycle * self.n % count  # what the epoch that begins in the cycle before takes from this one
            if left:
                taken = _mask_of(self._permutation[self.n - (count - left) :], self.n)
                fresh = np.flatnonzero(~taken[rows])[:left]
                rows = np.concatenate([rows[fresh], np.delete(rows, fresh)])
            self._permutation = rows
        return self._permutation


class EpsilonGreedySampler(PruningSampler):
    """The hardest (1 - epsilon) of the subset by a running score of the loss, the rest uniform (Raju et al. 2021).

    After each epoch the score of the examples seen moves to s <- decay * s + (1 - decay) * loss; a first loss becomes
    the score. Every `every` epochs the round(epsilon * k) explored ones are drawn from all that are not among the
    greedy k - round(epsilon * k). An example without a loss counts as the mean of those that have one: the first
    selection is random, and until most have been seen, unseen ones come before those with less than the mean loss.
    """

    needs_losses = True
    _learned = ("_mean",)
    _mean: np.ndarray  # (n,) float32

    def __init__(self, n: int, keep: float, *, epsilon: float = 0.1, decay: float = 0.8, **options: Any) -> None:
        self.epsilon, self.decay = _fraction("epsilon", epsilon), _decay(decay)
        super().__init__(n, keep, **options)
        self._settings |= {"epsilon": self.epsilon, "decay": self.decay}

    def _learn(self, index: np.ndarray, loss: np.ndarray) -> None:
        self._mean[index] = _moved(self._mean[index], loss, self.decay)

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        count = round(self.keep * self.n)
        explored = round(self.epsilon * count)
        mask = _largest(_filled(self._mean, _mean_of(self._mean)), count - explored, rng)
        mask[rng.choice(np.flatnonzero(~mask), explored, replace=False, shuffle=False)] = True
        return mask


class UCBSampler(PruningSampler):
    """The largest upper confidence bounds of the loss: running mean + c * running deviation (Raju et al. 2021).

    After each epoch the examples seen move to v <- decay * v + (1 - decay) * (loss - m)^2, m <- decay * m + (1 -
    decay) * loss. What is not trained on keeps its m and v. A first loss becomes m, and v starts as the variance of
    that epoch's losses, so that the deviation shrinks only with further looks. An example without a loss has no bound
    yet and comes first, as in any UCB rule: the first selection is random, and the first 1 / keep of them pass over
    all the data once. warm_up=1 does that in one epoch.
    """

    needs_losses = True
    _learned = ("_mean", "_variance")
    _mean: np.ndarray  # (n,) float32, and
    _variance: np.ndarray

    def __init__(self, n: int, keep: float, *, c: float = 1.0, decay: float = 0.8, **options: Any) -> None:
        c = plain(c)
        if isinstance(c, bool) or not isinstance(c, (int, float)) or not 0 <= c < math.inf:
            raise UsageError(f"c={c}: expected a number of deviations, 0 or more")
        self.c, self.decay = float(c), _decay(decay)
        super().__init__(n, keep, **options)
        self._settings |= {"c": self.c, "decay": self.decay}

    def _learn(self, index: np.ndarray, loss: np.ndarray) -> None:
        mean, variance = self._mean[index], self._variance[index]
        spread = np.float32(loss.var(dtype=np.float64))
        self._variance[index] = np.where(np.isnan(mean), spread, _moved(variance, (loss - mean) ** 2, self.decay))
        self._mean[index] = _moved(mean, loss, self.decay)

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        bound = self._mean + np.float32(self.c) * np.sqrt(self._variance)
        return _largest(_filled(bound, math.inf), round(self.keep * self.n), rng)


class InfoBatchSampler(PruningSampler):
    """Drops a random part of the examples with less than the mean loss and weights up the rest of them (InfoBatch).

    keep: the fraction kept OF THOSE BELOW THE MEAN of the last losses (the paper's 1 - r); the others, and examples
    without a loss, all stay, so more than keep * n are kept and the number changes. The first epoch has no losses and
    is full. Of m below the mean exactly k = round(keep * m), at least one, stay, with weight m / k, which is 1 / keep
    up to that rounding: the expected sum of weight * loss over the kept set is the sum over all data. The last
    final_full of the epochs (12.5 %) use all the data with weight 1: give epochs, the total, or final_full=0.
    """

    needs_losses = True
    _exact = False
    _learned = ("_last", "_weight")
    _last: np.ndarray  # (n,) float32, and
    _weight: np.ndarray

    def __init__(
        self, n: int, keep: float = 0.5, *, every: int = 1, final_full: int | float = 0.125, **options: Any
    ) -> None:
        super().__init__(n, keep, every=every, final_full=final_full, **options)

    def weights(self, indices: ArrayLike | torch.Tensor) -> torch.Tensor:
        index = _tensor("weights: indices", indices)
        if index.numel():
            _check_integers("weights", index)
        if index.device not in self._tables:  # one copy a device and selection, so that no batch waits for its weights
            self._tables[index.device] = torch.from_numpy(self._weight.copy()).to(index.device)
        return self._tables[index.device][index.long()]

    def _learn(self, index: np.ndarray, loss: np.ndarray) -> None:
        self._last[index] = loss

    def _choose(self, block: int, rng: np.random.Generator) -> np.ndarray:
        below = np.flatnonzero(self._last < _mean_of(self._last))  # NaN, not seen, is never below
        dropped = min(len(below) - round(self.keep * len(below)), max(len(below) - 1, 0))
        mask = np.ones(self.n, bool)
        mask[rng.choice(below, dropped, replace=False, shuffle=False)] = False
        self._weight[:] = 1
        self._weight[below] = len(below) / max(len(below) - dropped, 1)
        return mask

    def _selection_changed(self) -> None:
        if self._block is None:
            self._weight[:] = 1
        self._tables: dict[torch.device, torch.Tensor] = {}


class _Losses:
    """The losses of one epoch: their sum (n,) float64 and number (n,) int32, by example."""

    def __init__(self, n: int) -> None:
        self.sum, self.seen = np.zeros(n), np.zeros(n, np.int32)

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index, sum, number) of the examples that have a loss; none are left."""
        index = np.flatnonzero(self.seen)
        taken = index, self.sum[index], self.seen[index]
        self.sum[index], self.seen[index] = 0, 0
        return taken


def _largest(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The `count` largest as a mask; which of equal ones is drawn at random, never by position."""
    if count == 0:
        return np.zeros(len(values), bool)
    least = np.partition(values, len(values) - count)[len(values) - count]
    mask = values > least
    mask[rng.permutation(np.flatnonzero(values == least))[: count - int(mask.sum())]] = True
    return mask


def _mask_of(rows: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[rows] = True
    return mask


def _moved(old: np.ndarray, new: np.ndarray, decay: float) -> np.ndarray:
    """The moving average after one more value, which is the average itself where there was none (NaN)."""
    return np.where(np.isnan(old), new, decay * old + (1 - decay) * new)


def _filled(values: np.ndarray, value: float) -> np.ndarray:
    return np.where(np.isnan(values), np.float32(value), values)


def _mean_of(values: np.ndarray) -> float:
    """The mean of those that are not NaN, 0 of none."""
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else 0.0


def _on_the_host(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them in one tensor, by one transfer where they are on one device."""
    return torch.cat([part.to(parts[0].device) for part in parts]).cpu()


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _whole(name: str, value: int, least: int, what: str = "a whole number") -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        shown = value if isinstance(value, (int, float, str)) else type(value).__name__
        raise UsageError(f"{name}={shown}: expected {what}, {least} or more")
    return check_whole(name, number, least, SEEDS)  # as large as `evaluate --every` and its seeds may be, not larger


def _tensor(name: str, values: ArrayLike | torch.Tensor) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{name}: {type(values).__name__}, expected a tensor, an array or a list of numbers") from None


def _check_integers(name: str, index: torch.Tensor) -> None:
    """UsageError for a mask, which would be the examples 0 and 1, and for what was rounded."""
    if index.is_floating_point() or index.dtype == torch.bool:
        raise UsageError(f"{name}: indices of type {index.dtype}; expected integers, see protoprune.samplers.WithIndex")


def _fraction(name: str, value: float, what: str = "a number from 0 to 1", above: bool = False) -> float:
    value = plain(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (above and value == 0):
        raise UsageError(f"{name}={value}: expected {what}")
    return float(value)


def _decay(value: float) -> float:
    decay = _fraction("decay", value)
    if decay == 1:
        raise UsageError("decay=1: expected a number from 0 to below 1; at 1 nothing would be learned")
    return decay


def _first_final_epoch(final_full: int | float, epochs: int | None) -> float:
    """The epoch from which all the data is used; infinity for never."""
    final_full = plain(final_full)
    if isinstance(final_full, bool) or not isinstance(final_full, (int, float)) or not 0 <= final_full < math.inf:
        raise UsageError(f"final_full={final_full}: expected a number of epochs (int) or a fraction of them (float)")
    if isinstance(final_full, float) and final_full > 1:
        raise UsageError(f"final_full={final_full}: expected a fraction of the epochs, or a whole number of them")
    if epochs is not None:
        epochs = _whole("epochs", epochs, 1)
    if final_full == 0:
        return math.inf
    if epochs is None:
        raise UsageError(f"final_full={final_full} needs epochs=TOTAL, the number of epochs; or give final_full=0")
    last = final_full if isinstance(final_full, int) else math.ceil(Fraction(str(final_full)) * epochs)
    if last > epochs:
        raise UsageError(f"final_full={final_full}: expected at most epochs={epochs}")
    return epochs - last


def _check_rank(rank: int | None, num_replicas: int | None) -> tuple[int, int] | None:
    if rank is None and num_replicas is None:
        return None
    if rank is None or num_replicas is None:
        raise UsageError(f"rank={rank}, num_replicas={num_replicas}: expected both or neither")
    if _whole("rank", rank, 0) >= _whole("num_replicas", num_replicas, 1):
        raise UsageError(f"rank={rank}: expected less than num_replicas={num_replicas}")
    return rank, num_replicas
