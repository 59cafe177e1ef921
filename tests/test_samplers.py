"""Dynamic samplers: who is selected, how often, with which weight, and the same after a resume or on two processes.

Statistical tests state their false-alarm rate: the probability, over seeds, that a correct sampler fails. The seeds are
fixed, so a test that passes once passes always.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from protoprune import samplers
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.evaluation.runs import DYNAMIC, make_sampler
from protoprune.samplers import (
    EpsilonGreedySampler,
    InfoBatchSampler,
    RandomDynamicSampler,
    RS2Sampler,
    UCBSampler,
    WithIndex,
)

SIZED = [RandomDynamicSampler, RS2Sampler, EpsilonGreedySampler, UCBSampler]  # round(keep * n) at each selection
WITH_LOSSES = [EpsilonGreedySampler, UCBSampler, InfoBatchSampler]
ALL = [*SIZED, InfoBatchSampler]
FALSE_ALARM = 1e-6  # of each side of each chi-square test


def make(kind, n=23, keep=0.4, **options):
    if kind is InfoBatchSampler:
        options.setdefault("final_full", 0)
    return kind(n, keep, **options)


def loss_of(index, epoch) -> np.ndarray:
    """A made-up loss of each example in each epoch: falling, different for all, noisy."""
    index = np.asarray(index)
    return np.abs(np.sin(index * 12.9898 + epoch * 78.233)) + (index % 7) / (1 + epoch)


def train(sampler, epochs, *, batch=4, explicit=True, first=0) -> list[list[int]]:
    """The indices of each epoch, with made-up losses told batch by batch."""
    passes = []
    for epoch in range(first, epochs):
        if explicit:
            sampler.set_epoch(epoch)
        order = []
        for index in batches(sampler, batch):
            sampler.update(list(index), loss_of(index, epoch))
            order += index
        passes.append(order)
    return passes


def batches(iterable, size):
    iterator = iter(iterable)
    while part := tuple(itertools.islice(iterator, size)):
        yield part


def check_uniform(counts, draws, share, evenly=False) -> None:
    """Chi-square test that each of the counts is that of a member of uniform subsets: `draws` draws, `share` of all."""
    counts = np.asarray(counts, float)
    m = len(counts)
    statistic = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (m - 1) / m
    assert statistic < stats.chi2.ppf(1 - FALSE_ALARM, m - 1)
    assert evenly or statistic > stats.chi2.ppf(FALSE_ALARM, m - 1)


# Who is selected.


@given(
    st.sampled_from(SIZED),
    st.integers(1, 40),
    st.floats(0.01, 1),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_exactly_the_rounded_fraction_is_selected_and_yielded_once(kind, n, keep, every, warm_up, seed):
    if round(keep * n) == 0:
        with pytest.raises(UsageError, match="keeps none"):
            kind(n, keep)
        return
    sampler = kind(n, keep, every=every, warm_up=warm_up, seed=seed)
    seen = np.zeros(n, int)
    for epoch in range(7):
        sampler.set_epoch(epoch)
        expected = n if epoch < warm_up else round(keep * n)
        assert len(sampler) == sampler.selected().sum() == expected
        (order,) = train(sampler, epoch + 1, first=epoch)
        assert sorted(order) == np.flatnonzero(sampler.selected()).tolist()
        seen += sampler.selected()
    assert sampler.counts.tolist() == seen.tolist()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("n", "keep"), [(1, 1.0), (2, 0.5), (3, 1.0), (5, 0.2), (7, 0.999)])
def test_tiny_data_and_all_of_it(kind, n, keep):
    sampler = make(kind, n, keep, every=1)
    for order in train(sampler, 6, batch=2):
        assert len(set(order)) == len(order) <= n
        if keep == 1:
            assert sorted(order) == list(range(n))
    assert torch.isfinite(sampler.weights(torch.arange(n))).all()


@pytest.mark.parametrize("kind", ALL)
def test_the_order_is_new_every_epoch_and_only_the_seed_decides(kind):
    first, again, other = (train(make(kind, 40, seed=seed, every=3), 7) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert all(a != b for a, b in itertools.pairwise(first))


@pytest.mark.parametrize("kind", ALL)
def test_no_global_generator_is_read_or_moved(kind):
    runs = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        runs.append(train(make(kind), 12))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert runs[0] == runs[1]


def test_two_samplers_of_one_seed_share_the_order_of_their_common_examples():
    """ "Permute all, then filter": subsets differ only by the subset."""
    small, large = (next(iter(train(RandomDynamicSampler(50, keep), 1))) for keep in (0.3, 0.9))
    common = set(small) & set(large)
    assert len(common) > 5
    assert [i for i in small if i in common] == [i for i in large if i in common]


@pytest.mark.parametrize("kind", SIZED)
def test_the_selection_holds_between_reselections_and_changes_at_them(kind):
    sampler = make(kind, 60, 0.5, every=4, warm_up=2)
    masks = []
    for epoch in range(14):
        train(sampler, epoch + 1, first=epoch)
        masks.append(sampler.selected())
    assert masks[0].all()
    assert masks[1].all()
    changes = [e for e in range(1, 14) if (masks[e] != masks[e - 1]).any()]
    assert changes == [2, 6, 10]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("final_full", "expected"), [(2, 2), (0.2, 2), (0.125, 2), (0.3, 3), (0, 0), (1.0, 10)])
def test_the_final_phase_has_all_the_data_with_weight_one(kind, final_full, expected):
    """0.125 of 10 epochs is rounded up; the length is right before the epoch is iterated over."""
    sampler = kind(30, 0.2, final_full=final_full, epochs=10, every=1)
    lengths = []
    for epoch in range(12):  # past the end it stays full, where there is such a phase
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
        train(sampler, epoch + 1, first=epoch)
    full = [epoch for epoch, length in enumerate(lengths) if length == 30]
    start = 0 if kind is not InfoBatchSampler else 1  # InfoBatch's first epoch has no losses yet
    assert [epoch for epoch in full if epoch >= start] == list(range(max(start, 10 - expected), 12 if expected else 0))
    if expected:
        assert sampler.weights(torch.arange(30)).tolist() == [1.0] * 30


# How often.


def test_random_dynamic_selects_each_example_equally_often():
    """False alarm 2e-6 (two sides): too uneven, and too even to be independent draws."""
    n, draws = 101, 400
    sampler = RandomDynamicSampler(n, 0.3, every=1, seed=3)
    for epoch in range(draws):
        sampler.set_epoch(epoch)
        list(sampler)
    assert sampler.counts.sum() == draws * round(0.3 * n)
    check_uniform(sampler.counts, draws, round(0.3 * n) / n)


@pytest.mark.parametrize(("n", "keep"), [(10, 0.3), (10, 0.7), (12, 0.25), (11, 1.0), (1, 1.0), (97, 0.31), (5, 0.9)])
def test_rs2_passes_over_everything_before_it_repeats(n, keep):
    sampler = RS2Sampler(n, keep, seed=1)
    for epoch in range(40):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == round(keep * n)
        assert np.ptp(sampler.counts) <= 1
    assert sampler.counts.sum() == 40 * round(keep * n)


def test_rs2_draws_new_subsets_uniformly_even_across_the_end_of_a_permutation():
    """False alarm 2e-6 an epoch; epoch 2 (rows 26..38 of 30) is filled from two permutations."""
    n, draws = 30, 600
    counts = np.zeros((4, n))
    together = np.zeros(n)
    for seed in range(draws):
        sampler = RS2Sampler(n, 13 / 30, seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            counts[epoch] += sampler.selected()
        together += sampler.selected() & (np.arange(n) != 0) if sampler.selected()[0] else 0
    for row in counts:
        check_uniform(row, draws, 13 / 30)
    check_uniform(together[1:], counts[3, 0], 12 / 29)  # nor does one example bring others along


def test_rs2_does_not_repeat_its_subsets():
    sampler = RS2Sampler(40, 0.5)
    masks = set()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        masks.add(sampler.selected().tobytes())
    assert len(masks) == 10


def test_a_jump_gives_the_selection_that_going_there_gives():
    """set_epoch depends on the epoch alone where no losses matter: forwards, backwards, at once."""
    for kind in (RandomDynamicSampler, RS2Sampler):
        slow = make(kind, 31, 0.3, every=2)
        passes = train(slow, 20)
        quick = make(kind, 31, 0.3, every=2)
        for epoch in (17, 3, 19, 0):
            quick.set_epoch(epoch)
            assert list(quick) == passes[epoch]


@pytest.mark.parametrize("kind", [EpsilonGreedySampler, UCBSampler])
def test_the_first_selection_and_ties_are_random(kind):
    """False alarm 2e-6: equal scores are drawn without regard to position, whatever the seed."""
    n, draws = 40, 400
    first, tied = np.zeros(n), np.zeros(n)
    for seed in range(draws):
        sampler = kind(n, 0.3, every=1, seed=seed)
        first += sampler.selected()
        sampler.update(np.arange(n), np.full(n, 0.7))
        sampler.set_epoch(1)
        tied += sampler.selected()
    check_uniform(first, draws, 0.3)
    check_uniform(tied, draws, 0.3)


def test_epsilon_greedy_explores_the_rest_uniformly():
    """False alarm 2e-6. 12 of 40: the 9 of the largest scores always, 3 of the other 31."""
    n, draws = 40, 500
    counts = np.zeros(n)
    losses = np.random.default_rng(0).permutation(n) / n
    for seed in range(draws):
        sampler = EpsilonGreedySampler(n, 0.3, every=1, epsilon=0.25, seed=seed)
        sampler.update(np.arange(n), losses)
        sampler.set_epoch(1)
        counts += sampler.selected()
    hardest = np.argsort(-losses)
    assert (counts[hardest[:9]] == draws).all()
    check_uniform(counts[hardest[9:]], draws, 3 / 31)


# By which score.


def reference(losses: list[dict[int, float]], decay: float) -> tuple[dict, dict]:
    """Means and variances by the formulas, an example at a time."""
    means: dict[int, float] = {}
    variances: dict[int, float] = {}
    for epoch in losses:
        spread = float(np.var(list(epoch.values())))
        for i, loss in epoch.items():
            if i not in means:
                means[i], variances[i] = loss, spread
            else:
                variances[i] = decay * variances[i] + (1 - decay) * (loss - means[i]) ** 2
                means[i] = decay * means[i] + (1 - decay) * loss
    return means, variances


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8])
def test_epsilon_greedy_keeps_the_largest_running_losses(decay):
    n, losses = 30, []
    sampler = EpsilonGreedySampler(n, 0.5, epsilon=0.2, decay=decay, every=1)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        if epoch:
            means, _ = reference(losses, decay)
            middle = np.mean(list(means.values()))
            scores = np.array([means.get(i, middle) for i in range(n)])
            greedy = np.argsort(-scores)[:12]  # 15 kept, 3 of them explored
            certain = greedy[scores[greedy] > np.sort(scores)[-13] + 1e-6]  # all but ties at the edge
            assert sampler.selected()[certain].all()
            assert len(certain) > 4
            assert len(certain) == 12 or not np.isin(np.arange(n), list(means)).all()
        order = train(sampler, epoch + 1, first=epoch)[0]
        losses.append(dict(zip(order, loss_of(order, epoch), strict=True)))


@pytest.mark.parametrize(("c", "decay"), [(0.0, 0.8), (1.0, 0.8), (3.0, 0.5)])
def test_ucb_keeps_the_largest_bounds(c, decay):
    n, losses = 30, []
    sampler = UCBSampler(n, 0.4, c=c, decay=decay, every=1)
    compared = 0
    for epoch in range(12):
        sampler.set_epoch(epoch)
        if epoch:
            means, variances = reference(losses, decay)
            bounds = np.array([means[i] + c * math.sqrt(variances[i]) if i in means else 1e9 for i in range(n)])
            edge = np.sort(bounds)[-12]
            assert sampler.selected()[bounds > edge + 1e-5].all()
            assert not sampler.selected()[bounds < edge - 1e-5].any()
            compared += ((np.abs(bounds - edge) > 1e-5) & (bounds < 1e9)).sum()
        order = train(sampler, epoch + 1, first=epoch)[0]
        losses.append(dict(zip(order, loss_of(order, epoch), strict=True)))
    assert compared > 200


def bandit(sampler, means, epochs) -> float:
    """The mean of the planted means that were sampled, noise of 0.3 around them."""
    noise = np.random.default_rng(9)
    gained = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        index = np.array(list(sampler))
        sampler.update(index, means[index] + noise.normal(0, 0.3, len(index)) ** 2)
        gained.append(means[index].mean())
    return float(np.mean(gained))


@pytest.mark.parametrize(("kind", "found"), [(UCBSampler, 0.9), (EpsilonGreedySampler, 0.85)])
def test_a_planted_bandit_problem_is_solved(kind, found):
    """The 10 % of largest mean loss of 500 are found, and more is gained than by random choice."""
    means = np.random.default_rng(4).permutation(500) / 100
    best = np.argsort(-means)[:50]
    sampler = kind(500, 0.1, every=1)
    gained = bandit(sampler, means, 150)
    assert sampler.selected()[best].mean() >= found
    assert sampler.counts[best].mean() > 10 * np.delete(sampler.counts, best).mean() * 0.8
    assert gained > bandit(RandomDynamicSampler(500, 0.1, every=1), means, 150) + 1


def test_ucb_returns_to_what_fluctuates():
    """Of equal means, those of larger deviation are kept."""
    n = 60
    sampler = UCBSampler(n, 0.25, every=30)
    for epoch in range(30):
        losses = np.ones(n)
        losses[:15] += 0.5 * (-1) ** epoch
        sampler.set_epoch(epoch)
        sampler.update(np.arange(n), losses)
    sampler.set_epoch(30)
    assert np.flatnonzero(sampler.selected()).tolist() == list(range(15))


def test_several_losses_of_an_epoch_count_as_their_mean():
    one, two = (EpsilonGreedySampler(6, 0.5, every=1) for _ in range(2))
    one.update([0, 1, 0], [1.0, 5.0, 3.0])
    one.update([0], [2.0])
    two.update([0, 1], [2.0, 5.0])
    one.set_epoch(1), two.set_epoch(1)
    for sampler in (one, two):
        assert sampler.state_dict()["mean"].nan_to_num(-1).tolist() == [2.0, 5.0, -1, -1, -1, -1]


# InfoBatch.


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 2), (0.3, 2), (0.75, 4), (0.01, 1), (1.0, 5)])
def test_infobatch_is_unbiased_over_all_possible_selections(keep, kept):
    """Brute force: the weighted sum, averaged over every subset that can be drawn, is the sum over all the data."""
    losses = np.array([0.1, 0.9, 0.3, 2.0, 0.2, 3.0, 0.15, 0.05])  # the mean is 0.8375: 5 below it
    sampler = InfoBatchSampler(8, keep, final_full=0)
    assert sampler.selected().all()
    sampler.update(torch.arange(8), torch.tensor(losses))
    sampler.set_epoch(1)
    weights = sampler.weights(torch.arange(8))
    assert weights.dtype == torch.float32
    below = np.flatnonzero(losses < losses.mean())
    assert len(below) == 5
    assert sampler.selected()[losses > losses.mean()].all()
    assert sampler.selected()[below].sum() == kept
    assert len(sampler) == 3 + kept
    above = losses[losses > losses.mean()].sum()
    totals = []
    for subset in itertools.combinations(below, kept):
        totals.append(above + (weights.numpy()[list(subset)] * losses[list(subset)]).sum())
    assert np.mean(totals) == pytest.approx(losses.sum(), rel=1e-6)
    assert weights[torch.tensor(losses > losses.mean())].tolist() == [1.0] * 3


def test_infobatch_draws_every_possible_selection_equally_often():
    """False alarm 1e-6, over the 10 pairs of the 5 below the mean."""
    losses = np.array([0.1, 0.9, 0.3, 2.0, 0.2, 3.0, 0.15, 0.05])
    drawn: dict[bytes, int] = {}
    for seed in range(1000):
        sampler = InfoBatchSampler(8, 0.4, final_full=0, seed=seed)
        sampler.update(np.arange(8), losses)
        sampler.set_epoch(1)
        drawn[sampler.selected().tobytes()] = drawn.get(sampler.selected().tobytes(), 0) + 1
    assert len(drawn) == 10
    assert stats.chisquare(list(drawn.values())).pvalue > FALSE_ALARM


def test_the_rescaled_loss_is_unbiased_in_a_training_loop():
    """Over 500 seeds the mean of an epoch's sum(weight * loss) / n meets the mean loss within 5 standard errors."""
    losses = torch.rand(20, generator=torch.Generator().manual_seed(1)) ** 2
    estimates = []
    for seed in range(500):
        sampler = InfoBatchSampler(20, 0.5, final_full=0, seed=seed)
        sampler.update(torch.arange(20), losses)
        sampler.set_epoch(1)
        index = torch.tensor(list(sampler))
        estimates.append(float((losses[index] * sampler.weights(index)).sum() / 20))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert 0 < error < 0.005
    assert abs(np.mean(estimates) - float(losses.mean())) < 5 * error


def test_infobatch_keeps_what_has_no_loss_and_uses_the_last_one():
    sampler = InfoBatchSampler(10, 0.1, final_full=0)
    sampler.update([0, 1, 2, 3], [1.0, 1.0, 1.0, 9.0])
    sampler.set_epoch(1)
    assert sampler.selected()[3:].all()
    assert sampler.selected()[:3].sum() == 1
    sampler.update([3], [0.5])
    sampler.set_epoch(2)  # the mean is 0.875 now, and only 3 is below it: it stays, being the only one
    assert sampler.selected().all()
    assert sampler.weights([0, 3]).tolist() == [1.0, 1.0]


def test_other_samplers_weigh_nothing():
    for kind in SIZED:
        weights = make(kind).weights(torch.tensor([3, 1]))
        assert weights.tolist() == [1.0, 1.0]
        assert weights.dtype == torch.float32


# Epochs.


@pytest.mark.parametrize("kind", ALL)
def test_a_forgotten_set_epoch_makes_no_difference(kind):
    assert train(make(kind, every=2), 9) == train(make(kind, every=2), 9, explicit=False)


def test_a_pass_that_is_only_looked_at_counts_as_nothing():
    expected = train(make(UCBSampler, every=1), 3)
    sampler = make(UCBSampler, every=1)
    next(iter(sampler))
    next(iter(sampler))
    assert train(sampler, 3, explicit=False) == expected
    assert sampler.counts.max() <= 3


def test_a_pass_that_is_broken_off_after_training_is_over():
    sampler = make(EpsilonGreedySampler, every=1)
    for epoch in range(3):
        iterator = iter(sampler)
        assert sampler.epoch == epoch
        sampler.update([next(iterator)], [1.0])


def test_the_epoch_is_over_when_its_last_index_was_taken():
    """A loop over range(len(loader)) never sees the iterator end."""
    sampler = make(RandomDynamicSampler)
    for epoch in range(3):
        iterator = iter(sampler)
        assert sampler.epoch == epoch
        for _ in range(len(sampler)):
            next(iterator)


def test_an_epoch_that_is_asked_for_again_is_gone_through_again():
    sampler = make(RandomDynamicSampler)
    first = list(sampler)
    sampler.update(first, np.ones(len(first)))
    sampler.set_epoch(0)
    assert (list(sampler), sampler.epoch) == (first, 0)


def test_a_pass_left_over_from_another_epoch_ends_nothing():
    sampler = make(RandomDynamicSampler)
    left_over = iter(sampler)
    next(left_over)
    sampler.set_epoch(1)
    list(left_over)
    iter(sampler)
    assert sampler.epoch == 1


def test_random_samplers_without_updates_resume_at_the_epoch():
    expected = [list(one) for one in [RS2Sampler(23, 0.4)] * 3]
    sampler = RS2Sampler(23, 0.4)
    assert list(sampler) == expected[0]
    after = RS2Sampler(23, 0.4)
    after.load_state_dict(saved(sampler))
    assert list(after) == expected[1]
    next(iter(after))  # within epoch 2
    again = RS2Sampler(23, 0.4)
    again.load_state_dict(saved(after))
    assert list(again) == expected[2]


def test_lightnings_order_of_calls_with_prefetching_workers():
    """Length and an iterator that is primed and thrown away before set_epoch; then again for the epoch itself."""
    expected = train(make(InfoBatchSampler, every=1), 4)
    sampler = make(InfoBatchSampler, every=1)
    for epoch in range(4):
        sampler.set_epoch(epoch)  # in train_dataloader()
        assert len(sampler) == len(expected[epoch])
        list(sampler)  # workers have drawn it all
        sampler.set_epoch(epoch)
        assert train(sampler, epoch + 1, first=epoch) == [expected[epoch]]


def test_the_length_stays_the_epochs_until_the_next_begins():
    sampler = InfoBatchSampler(40, 0.1, final_full=0)
    train(sampler, 1)
    assert len(sampler) == 40  # for a mean over the epoch that has just ended
    sampler.set_epoch(1)
    assert len(sampler) < 40


def test_a_pass_holds_no_python_number_for_each_index(monkeypatch):
    """Of 100 million examples a list of them takes 4 GB."""
    whole = list(RandomDynamicSampler(1000, 0.5))
    monkeypatch.setattr(samplers, "_AT_ONCE", 7)
    assert list(RandomDynamicSampler(1000, 0.5)) == whole
    assert all(type(index) is int for index in whole)
    monkeypatch.undo()
    n = 400_000
    sampler = RandomDynamicSampler(n, 1.0)
    tracemalloc.start()
    indices = iter(sampler)
    next(indices)
    assert tracemalloc.get_traced_memory()[0] < 20 * n
    tracemalloc.stop()
    assert sum(1 for _ in indices) == n - 1


def test_numbers_of_numpy_are_those_that_they_say():
    """The float32 of 0.3 is a little more, which is one image of 100 million."""
    ours = UCBSampler(np.int64(50), np.float32(0.3), c=np.float32(2), decay=np.float64(0.5), epochs=np.int64(9))
    assert (ours.keep, ours.c, ours.decay) == (0.3, 2.0, 0.5)
    for final_full in (np.int64(2), np.float32(0.25)):
        assert len(InfoBatchSampler(8, np.float16(0.5), final_full=final_full, epochs=8)) == 8


# Resuming.


def saved(sampler) -> dict:
    """Through a file, as a checkpoint goes; weights_only refuses anything but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(sampler.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_a_training_resumed_after_any_epoch_goes_on_exactly(kind, explicit):
    options = {"every": 2, "warm_up": 1, "final_full": 2, "epochs": 9}
    whole = make(kind, **options)
    expected = train(whole, 9)
    for stop in range(9):
        before = make(kind, **options)
        train(before, stop)
        after = make(kind, **options)
        after.load_state_dict(saved(before))
        assert train(after, 9, first=stop, explicit=explicit) == expected[stop:]
        assert after.counts.tolist() == whole.counts.tolist()
        assert torch.equal(after.weights(torch.arange(23)), whole.weights(torch.arange(23)))


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in ALL), (UCBSampler, 2)])
def test_a_training_resumed_within_an_epoch_goes_on_exactly(kind, workers):
    """Workers have drawn indices that the model has not seen: these come again, the trained ones do not."""

    def run(sampler, stop=None, first=0):
        order, data = [], TensorDataset(torch.arange(23))
        loader = DataLoader(
            WithIndex(data), 3, sampler=sampler, num_workers=workers, prefetch_factor=4 if workers else None
        )
        for epoch in range(first, 4):
            sampler.set_epoch(epoch)
            for step, (_, index) in enumerate(loader):
                if stop == (epoch, step):
                    return order, saved(sampler)
                sampler.update(index, loss_of(index, epoch))
                order += index.tolist()
        return order, None

    expected, _ = run(make(kind, every=1))
    for stop in [(2, 1)] if workers else [(0, 0), (0, 1), (1, 2), (3, 2)]:
        before, state = run(make(kind, every=1), stop)
        sampler = make(kind, every=1)
        sampler.load_state_dict(state)
        after, _ = run(sampler, first=stop[0])
        assert before + after == expected


@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_that_was_over_when_it_was_saved_is_not_trained_on_again(kind):
    """Who saves every so many steps may save at an epoch's last one, and begins with that epoch again."""
    whole = make(kind, every=1)
    expected = train(whole, 5)
    for stop in range(1, 4):
        before = make(kind, every=1)
        train(before, stop)
        after = make(kind, every=1)
        after.load_state_dict(saved(before))
        for _ in range(2):  # a look at it changes nothing
            after.set_epoch(stop - 1)
            assert list(after) == []
        after.set_epoch(stop)
        assert train(after, 5, first=stop, explicit=False) == expected[stop:]
        assert after.counts.tolist() == whole.counts.tolist()


def test_an_abandoned_look_does_not_lose_the_position():
    sampler = make(UCBSampler)
    order = list(sampler)
    sampler.update(order[:4], [1.0] * 4)
    after = make(UCBSampler)
    after.load_state_dict(sampler.state_dict())
    assert len(after) == len(order)
    assert list(iter(after))[:1] == order[4:5]
    after.set_epoch(0)
    assert list(after) == order[4:]


def test_indices_of_another_set_are_noticed():
    """Subset(WithIndex(all), part) gives the places in `all`, and the sampler counts those in the part."""
    everything = TensorDataset(torch.arange(40))
    part = Subset(WithIndex(everything), list(range(18, -1, -1)))
    sampler = UCBSampler(len(part), 0.5, every=1)
    (batch,) = DataLoader(part, 19, sampler=sampler)
    with pytest.warns(ProtopruneWarning, match=r"example \d+ is not in the selection of epoch 0; .* must be WithIndex"):
        sampler.update(batch[1], torch.ones(len(batch[1])))
    right = UCBSampler(len(part), 0.5, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for *_, index in DataLoader(WithIndex(part), 4, sampler=right):
                right.update(index, torch.ones(len(index)))


def test_an_epoch_that_was_seen_in_part_is_noticed(monkeypatch):
    """A library that deals out what this process was given already: Lightning does so by default (2.6), accelerate
    where the sampler has a share of its own (1.15)."""

    def train_on(part, batch=2):
        sampler = RandomDynamicSampler(40, 0.5, rank=0, num_replicas=2)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for index in list(batches(sampler, batch))[part]:
                sampler.update(index, np.ones(len(index)))
        return sampler

    with pytest.warns(
        ProtopruneWarning, match=r"of the 10 indices of epoch 0 the model was trained on 6; did"
    ) as found:
        train_on(slice(None, None, 2))
    assert len(found) == 1
    monkeypatch.setattr(samplers, "_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(ProtopruneWarning, match=r"use_distributed_sampler=False, .* with rank=0, num_replicas=1"):
        train_on(slice(None, None, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on(slice(None))
        train_on(slice(-1), 6)  # as with drop_last


def test_a_state_is_independent_of_what_follows():
    sampler = make(UCBSampler)
    train(sampler, 1)
    state, copy = sampler.state_dict(), saved(sampler)
    train(sampler, 12)
    tensors = [key for key in state if isinstance(state[key], torch.Tensor)]
    assert all(torch.equal(state[key].nan_to_num(-1), copy[key].nan_to_num(-1)) for key in tensors)
    assert not torch.equal(sampler.state_dict()["counts"], copy["counts"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: RandomDynamicSampler(23, 0.4), "sampler=UCBSampler, but this has RandomDynamicSampler"),
        (lambda: UCBSampler(24, 0.4), "n=23, but this has 24"),
        (lambda: UCBSampler(23, 0.5), "keep=0.4, but this has 0.5"),
        (lambda: UCBSampler(23, 0.4, c=2.0), "c=1.0, but this has 2.0"),
        (lambda: UCBSampler(23, 0.4, seed=1), "seed=0, but this has 1"),
        (lambda: UCBSampler(23, 0.4, rank=0, num_replicas=2), "by 1 processes; expected as many, not 2"),
    ],
)
def test_a_state_of_another_sampler_is_refused(other, message):
    sampler = make(UCBSampler)
    sampler.update([0], [1.0])
    with pytest.raises(UsageError, match=message):
        other().load_state_dict(sampler.state_dict())


def test_a_training_may_be_made_longer():
    sampler = InfoBatchSampler(23, 0.5, epochs=8)
    train(sampler, 4)
    longer = InfoBatchSampler(23, 0.5, epochs=16)
    longer.load_state_dict(sampler.state_dict())
    longer.set_epoch(7)  # was the final phase
    assert len(longer) < 23


# Loaders.


class Described(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 5

    def __getitem__(self, index):
        image, label = torch.tensor([float(index)]), index % 2
        return {"tuple": (image, label), "list": [image, label], "dict": {"x": image, "label": label}, "bare": image}[
            self.form
        ]


class Fast(Described):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize("kind", [Described, Fast])
def test_with_index_adds_the_index_to_any_sample(kind):
    for form in ("tuple", "list", "bare", "dict"):
        dataset = WithIndex(kind(form))
        assert len(dataset) == 5
        batch = next(iter(DataLoader(dataset, 3, sampler=[4, 0, 2])))
        index = batch["index"] if form == "dict" else batch[-1]
        assert index.tolist() == [4, 0, 2]
        assert (batch["x"] if form == "dict" else batch[0]).flatten().tolist() == [4.0, 0.0, 2.0]
        assert len(batch) == {"tuple": 3, "list": 3, "bare": 2, "dict": 3}[form]
        assert dataset[3]["index" if form == "dict" else -1] == 3


@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_the_number_of_workers_makes_no_difference(kind):
    runs = []
    for options in ({}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}):
        sampler = make(kind, every=1)
        loader = DataLoader(WithIndex(TensorDataset(torch.arange(23))), 5, sampler=sampler, **options)
        seen = []
        for epoch in range(3):
            assert len(loader) == math.ceil(len(sampler) / 5)
            for value, index in loader:
                assert torch.equal(value, index)
                sampler.update(index, torch.from_numpy(loss_of(index, epoch)))
                seen.append(index.tolist())
        runs.append((seen, sampler.counts.tolist()))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_losses_on_a_gpu_count_as_those_on_the_cpu(kind, cuda):
    n = 5000
    here, there = (make(kind, n, every=1) for _ in range(2))
    for epoch in range(3):
        here.set_epoch(epoch), there.set_epoch(epoch)
        assert list(here) == list(there)
        for start in range(0, n, 20):  # 250 batches: several fetches
            index = torch.arange(start, start + 20)
            loss = torch.from_numpy(loss_of(index, epoch)).float()
            here.update(index, loss)
            on_device = loss.cuda()
            there.update(index.cuda() if start % 40 else index, on_device)
            on_device.zero_()  # a copy was taken
            assert torch.equal(there.weights(index.cuda()).cpu(), here.weights(index))
    there.update(torch.tensor([7]), torch.tensor([math.nan]).cuda())
    with pytest.raises(ProtopruneError, match="example 7 is nan"):
        there.set_epoch(3)


# Several processes.


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("n", "replicas"), [(23, 2), (23, 4), (24, 3), (5, 4), (3, 8)])
def test_shares_are_dealt_out_as_distributed_sampler_does(kind, n, replicas):
    whole = list(make(kind, n, 0.4))
    shares = [make(kind, n, 0.4, rank=rank, num_replicas=replicas) for rank in range(replicas)]
    dealt = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(one) for one in dealt]
    theirs = [DistributedSampler(whole, replicas, rank, shuffle=False) for rank in range(replicas)]
    assert dealt == [[whole[place] for place in share] for share in theirs]


KINDS_IN_PROCESSES = [(kind, n) for kind in ALL for n in (23, 24)]


def in_process(rank: int, world: int, folder: str) -> None:
    """What each of the gloo processes does: trains on its share and writes what it saw."""
    torch.set_num_threads(1)
    early = [make(kind, n, every=1) for kind, n in KINDS_IN_PROCESSES]  # made before the process group
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = []
    for sampler in early:
        masks, orders = [], []
        for epoch in range(5):
            if epoch != 3:  # forgotten once
                sampler.set_epoch(epoch)
            if rank == 0:
                len(sampler)  # a progress bar on one process must not wait for the others
            order = list(sampler)
            for index in batches(order, 3):
                sampler.update(list(index), loss_of(index, epoch))
            masks.append(sampler.selected())
            orders.append(order)
        result.append((masks, orders))
    result.append(exchanged_before_saving(rank))
    result.append(dealt_out_by_another_library(rank, world))
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def exchanged_before_saving(rank: int) -> list:
    """A state taken within an epoch, after `synchronize`, holds the losses of all; without, it is refused."""
    sampler = make(EpsilonGreedySampler, 23, every=1)
    order = list(sampler)
    sampler.update(order[:2], loss_of(order[:2], 0))
    try:
        sampler.state_dict()
        refused = ""
    except ProtopruneError as error:
        refused = str(error)
    sampler.synchronize()
    state = sampler.state_dict()
    after = make(EpsilonGreedySampler, 23, every=1)
    after.load_state_dict(state)
    rest = list(after)
    after.update(rest, loss_of(rest, 0))
    after.set_epoch(1)
    return [refused, state["seen"], order, rest, after.selected()]


def dealt_out_by_another_library(rank: int, world: int) -> list:
    """accelerate gives every process the whole order and takes each world-th batch."""
    sampler = make(UCBSampler, 24, 0.5, every=1, rank=0, num_replicas=1)
    masks = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for index in list(batches(sampler, 3))[rank::world]:
            sampler.update(list(index), loss_of(index, epoch))
        masks.append(sampler.selected())
    sampler.synchronize()
    assert sampler.state_dict()["trained"] == len(sampler) == 12  # the position in the order that all go through
    return masks


def test_two_processes_select_what_one_would(tmp_path):
    torch.multiprocessing.start_processes(in_process, (2, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for place, (kind, n) in enumerate(KINDS_IN_PROCESSES):
        alone = make(kind, n, every=1)
        for epoch in range(5):
            (order,) = train(alone, epoch + 1, first=epoch)
            for masks, _ in (rank[place] for rank in ranks):
                assert masks[epoch].tolist() == alone.selected().tolist(), (kind, epoch)
            shares = [rank[place][1][epoch] for rank in ranks]
            dealt = list(itertools.chain(*zip(*shares, strict=True)))
            assert dealt[: len(order)] == order
            assert dealt[len(order) :] == order[: len(order) % 2]
    refused, seen, _, _, _ = ranks[0][-2]
    assert "synchronize()" in refused
    orders = [rank[-2][2] for rank in ranks]
    assert torch.equal(seen, ranks[1][-2][1])
    assert seen.sum() == 4
    assert seen[[*orders[0][:2], *orders[1][:2]]].tolist() == [1] * 4
    assert [rank[-2][3] for rank in ranks] == [order[2:] for order in orders]
    alone = make(EpsilonGreedySampler, 23, every=1)
    train(alone, 1)
    alone.set_epoch(1)
    assert all(rank[-2][4].tolist() == alone.selected().tolist() for rank in ranks)
    alone = make(UCBSampler, 24, 0.5, every=1)
    for epoch in range(4):
        train(alone, epoch + 1, first=epoch, batch=3)
        assert all(rank[-1][epoch].tolist() == alone.selected().tolist() for rank in ranks)


# What is refused.


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: RandomDynamicSampler(0, 0.5), "n=0: expected the number of examples, len(dataset), 1 or more"),
        (lambda: RandomDynamicSampler([1, 2], 0.5), "n=list: expected the number of examples"),
        (lambda: RandomDynamicSampler(10, 0), "keep=0: expected the fraction to keep, above 0 and at most 1"),
        (lambda: RandomDynamicSampler(10, 30), "keep=30: expected the fraction to keep"),
        (lambda: RandomDynamicSampler(10, math.nan), "keep=nan: expected the fraction to keep"),
        (lambda: RandomDynamicSampler(10, "0.5"), "keep=0.5: expected the fraction to keep"),
        (lambda: RandomDynamicSampler(20, 0.01), "keep=0.01: keeps none of 20 examples; expected at least 0.05"),
        (lambda: RandomDynamicSampler(10, 0.5, every=0), "every=0: expected a whole number, 1 or more"),
        (lambda: RandomDynamicSampler(10, 0.5, warm_up=1.5), "warm_up=1.5: expected a whole number, 0 or more"),
        (lambda: RandomDynamicSampler(10, 0.5, seed=-1), "seed=-1: expected a whole number, 0 or more"),
        (lambda: RandomDynamicSampler(10, 0.5, final_full=0.1), "final_full=0.1 needs epochs=TOTAL"),
        (lambda: InfoBatchSampler(10), "final_full=0.125 needs epochs=TOTAL"),
        (lambda: RandomDynamicSampler(10, 0.5, final_full=5, epochs=4), "final_full=5: expected at most epochs=4"),
        (lambda: RandomDynamicSampler(10, 0.5, final_full=1.5, epochs=4), "final_full=1.5: expected a fraction"),
        (lambda: RandomDynamicSampler(10, 0.5, final_full=-1, epochs=4), "final_full=-1: expected a number of epochs"),
        (lambda: RandomDynamicSampler(10, 0.5, epochs=0), "epochs=0: expected a whole number, 1 or more"),
        (lambda: RandomDynamicSampler(10, 0.5, rank=1), "rank=1, num_replicas=None: expected both or neither"),
        (lambda: RandomDynamicSampler(10, 0.5, rank=2, num_replicas=2), "rank=2: expected less than num_replicas=2"),
        (lambda: EpsilonGreedySampler(10, 0.5, epsilon=1.1), "epsilon=1.1: expected a number from 0 to 1"),
        (lambda: EpsilonGreedySampler(10, 0.5, decay=1), "decay=1: expected a number from 0 to below 1"),
        (lambda: UCBSampler(10, 0.5, c=-1), "c=-1: expected a number of deviations, 0 or more"),
        (lambda: RS2Sampler(10, 0.5).set_epoch(-1), "epoch=-1: expected a whole number, 0 or more"),
    ],
)
def test_bad_arguments_are_named_in_one_line(make_it, message):
    with pytest.raises(UsageError) as caught:
        make_it()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("indices", "losses", "message"),
    [
        ([0, 1], [1.0], r"indices (2,) and losses (1,) differ; expected one loss an index, as reduction=\"none\""),
        ([0, 1], 1.0, "indices (2,) and losses () differ"),
        ([[0], [1]], [[1.0], [1.0]], "indices (2, 1) and losses (2, 1) differ"),
        ([0.0, 1.0], [1.0, 1.0], "indices of type torch.float32; expected integers"),
    ],
)
def test_an_update_that_does_not_match_is_refused_and_changes_nothing(kind, indices, losses, message):
    sampler = make(kind)
    with pytest.raises(UsageError) as caught:
        sampler.update(indices, losses)
    assert message.replace("\\", "") in str(caught.value)
    assert sampler.state_dict()["trained"] == 0


@pytest.mark.parametrize("kind", WITH_LOSSES)
@pytest.mark.parametrize(
    ("indices", "losses", "message"),
    [
        ([0, 23], [1.0, 1.0], "index 23 is out of range; expected 0 to 22"),
        ([-1, 2], [1.0, 1.0], "index -1 is out of range"),
        ([4, 17], [1.0, math.nan], "the loss of example 17 is nan, not a finite number"),
        ([4, 17], [math.inf, 1.0], "the loss of example 4 is inf, not a finite number"),
    ],
)
def test_losses_that_would_spoil_the_scores_are_refused_by_name(kind, indices, losses, message):
    sampler = make(kind)
    with pytest.raises(ProtopruneError, match=message):
        sampler.update(indices, losses)
    assert sampler.state_dict()["trained"] == 0
    assert sampler.state_dict()["sum"].sum() == 0


@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_a_training_that_never_tells_its_losses_fails_at_the_end_of_the_first_epoch(kind):
    sampler = make(kind, every=1)
    list(sampler)
    with pytest.raises(ProtopruneError, match="epoch 0 ended without a single loss; call sampler"):
        sampler.set_epoch(1)
    fresh = make(kind, every=1)
    fresh.set_epoch(5)  # a training that goes on without its state is none
    assert len(list(fresh)) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_of_any_precision_with_a_gradient(dtype):
    sampler = make(InfoBatchSampler, 4)
    losses = torch.tensor([0.5, 4.0, 0.25, 2.0], dtype=dtype, requires_grad=True)
    sampler.update(torch.arange(4, dtype=torch.int32), losses * 1)
    sampler.set_epoch(1)
    assert sampler.state_dict()["last"].tolist() == [0.5, 4.0, 0.25, 2.0]


def test_an_empty_batch_is_nothing():
    sampler = make(UCBSampler)
    sampler.update([], [])
    assert sampler.state_dict()["trained"] == 0


@pytest.mark.parametrize("name", list(DYNAMIC))
def test_the_command_line_makes_the_same_samplers(name):
    """`evaluate --dynamic` has no defaults of its own, and refuses what the classes refuse."""
    kind, sizes = getattr(samplers, DYNAMIC[name]), {"n": 60, "seed": 3, "steps": 90, "batch_size": 10}
    own = make_sampler(name, 0.5, **sizes)
    python = kind(60, 0.5, seed=3, **({"epochs": 22} if kind is InfoBatchSampler else {}))
    assert own._settings == python._settings
    assert train(own, 12) == train(python, 12)
    for wrong in (
        {"keep": 0},
        {"keep": 1.5},
        {"keep": math.nan},
        {"keep": 0.5, "every": 0},
        {"keep": 0.5, "every": 10**20},
    ):
        with pytest.raises(UsageError):
            make_sampler(name, **wrong, **sizes)
        with pytest.raises(UsageError):
            kind(60, **wrong, epochs=10)
