"""`protoprune select` from a cached clustering: seconds and peak memory of the whole process.

    python benchmarks/select_speed.py [--count 1280000] [--dim 384] [--rounds 5] [--folder DIR]

Writes a feature file of that size with random features (1 GB at the default) into a temporary folder under DIR, puts a
clustering into its cache, and runs the command line as a user would. Prints a markdown table.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from protoprune.clustering import prototypes
from protoprune.features.featurefile import FeatureFile, PartialFile, create_partial
from protoprune.images.listing import ImageList


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_280_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        path = os.path.join(scratch, "features.h5")
        write_features(path, options.count, options.dim)
        write_clustering(path, options.count, options.dim)
        print("| select | seconds (median) | min-max | peak memory |\n|---|---|---|---|")
        for arguments in (
            ["--keep", "0.7"],
            ["--keep", "0.7", "--balance", "0.5"],
            ["--keep", "0.7", "--order", "random"],
        ):
            runs = [run(path, arguments) for _ in range(options.rounds)]
            seconds = [one[0] for one in runs]
            memory = max(one[1] for one in runs)
            print(
                f"| {' '.join(arguments)} | {statistics.median(seconds):.2f} "
                f"| {min(seconds):.2f}-{max(seconds):.2f} | {memory / 1e9:.2f} GB |"
            )


def run(path: str, arguments: list[str]) -> tuple[float, float]:
    """(seconds, peak bytes) of one run with its list written to a file."""
    started = time.perf_counter()
    with open(path + ".kept", "wb") as kept:
        process = subprocess.Popen(
            [sys.executable, "-m", "protoprune", "select", path, *arguments], stdout=kept, stderr=subprocess.PIPE
        )
        said = process.stderr.read().decode()
        _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, said
    assert "from the cache" in said, said
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def write_features(path: str, n: int, d: int) -> None:
    paths = sorted(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n))
    labels = np.array([int(one[1:9]) for one in paths], np.int32)
    images = ImageList(
        "/data/imagenet", paths, np.ones(n, np.int64), np.ones(n, np.int64), labels, [f"n{i:08d}" for i in range(1000)]
    )
    provenance = {
        "encoder": "random",
        "weights_sha256": "0",
        "preprocess": "{}",
        "precision": "fp32",
        "store": "float16",
    }
    create_partial(path, images, d, provenance, [])
    partial = PartialFile(path)
    rng = np.random.default_rng(0)
    block = rng.normal(size=(10_000, d)).astype(np.float16)
    for start in range(0, n, len(block)):
        rows = np.arange(start, min(start + len(block), n))
        partial.commit(rows, block[: len(rows)], np.ones(len(rows), np.uint8), [""] * len(rows))
    partial.finish()


def write_clustering(path: str, n: int, d: int, k: int = 1000) -> None:
    """A cache entry under the key that `select` with default options asks for."""
    rng = np.random.default_rng(1)

    def compute(**settings) -> prototypes.Clustering:
        cluster, distance = rng.integers(0, k, n).astype(np.int32), rng.random(n).astype(np.float32)
        return prototypes.Clustering(np.zeros((k, d), np.float32), cluster, distance, 0.0, 0, True, 25, n, "faiss")

    with FeatureFile(path) as file:
        prototypes.cached(
            path + ".clusters", file.provenance["uuid"], compute,
            k=k, spherical=True, seed=0, iterations=25, train_points=None, backend="auto",
        )  # fmt: skip


if __name__ == "__main__":
    main()
