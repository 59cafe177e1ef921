"""What dynamic pruning costs: milliseconds of a selection, of an epoch's order, microseconds of an update.

    python benchmarks/sampler_speed.py [--count 1280000] [--keep 0.3] [--batch 256] [--rounds 5]

Every round trains one epoch of random losses into a fresh sampler and then asks for the epoch of the next selection,
which includes taking in the losses. Prints a markdown table of medians; memory is what the sampler's arrays hold, and
the peak of what a selection adds. Everything runs on one thread, so seconds are CPU time, which other programs on the
machine disturb less.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np
import torch

from protoprune.samplers import (
    EpsilonGreedySampler,
    InfoBatchSampler,
    RandomDynamicSampler,
    RS2Sampler,
    UCBSampler,
)

SAMPLERS = (RandomDynamicSampler, RS2Sampler, EpsilonGreedySampler, UCBSampler, InfoBatchSampler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_280_000)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    header = ("sampler", "selection, ms", "min-max", "order, ms", "update, µs a batch", "held, MB", "peak more, MB")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for kind in SAMPLERS:
        runs = [run(kind, options, seed) for seed in range(options.rounds)]
        selection, order, update = ([one[column] for one in runs] for column in range(3))
        held, peak = memory(kind, options)
        print(
            f"| {kind.__name__} | {statistics.median(selection) * 1e3:.0f} "
            f"| {min(selection) * 1e3:.0f}-{max(selection) * 1e3:.0f} | {statistics.median(order) * 1e3:.0f} "
            f"| {statistics.median(update) * 1e6:.0f} | {held / 1e6:.0f} | {peak / 1e6:.0f} |"
        )


def make(kind, options: argparse.Namespace, seed: int):
    final = {"final_full": 0} if kind is InfoBatchSampler else {}
    return kind(options.count, options.keep, seed=seed, **final)


def train(sampler, batch: int) -> tuple[float, float]:
    """(seconds to draw the epoch's order, seconds an update) of one epoch with random losses."""
    started = time.process_time()
    indices = list(sampler)
    order = time.process_time() - started
    indices = torch.tensor(indices)
    losses = torch.from_numpy(np.random.default_rng(sampler.seed).exponential(size=len(indices)).astype(np.float32))
    started = time.process_time()
    for start in range(0, len(indices), batch):
        sampler.update(indices[start : start + batch], losses[start : start + batch])
    return order, (time.process_time() - started) / -(-len(indices) // batch)


def run(kind, options: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """(selection, order, update) in seconds."""
    sampler = make(kind, options, seed)
    order, update = train(sampler, options.batch)
    started = time.process_time()
    sampler.set_epoch(sampler.every)
    return time.process_time() - started, order, update


def memory(kind, options: argparse.Namespace) -> tuple[int, int]:
    """(bytes held between selections, bytes more at the peak of one)."""
    tracemalloc.start()
    sampler = make(kind, options, 0)
    sampler.update(torch.arange(options.count), torch.rand(options.count, generator=torch.Generator().manual_seed(0)))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    sampler.set_epoch(sampler.every)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held, peak - held


if __name__ == "__main__":
    main()
