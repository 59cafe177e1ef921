"""Clustering against faiss's own defaults and scikit-learn: seconds and objective on the same features.

    python benchmarks/cluster_speed.py [--features features.h5] [--k 100,1000] [--count 50000] [--dim 384]

Objective: sum over all images of 1 - cosine to the nearest centroid; scikit-learn's centroids are normalised first.
Without --features, a mixture of Gaussians with power-law cluster sizes is generated. Prints a markdown table.
"""

import argparse
import time

import faiss
import numpy as np
from sklearn.cluster import KMeans

from protoprune.cli.options import whole_numbers
from protoprune.clustering import prototypes
from protoprune.features.featurefile import FeatureFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features")
    parser.add_argument("--k", action="append", help="numbers of clusters: 100,1000; repeatable")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    if options.features:
        with FeatureFile(options.features) as file:
            x = file.features[:][file.usable][: options.count].astype(np.float32)
    else:
        x = mixture(options.count, options.dim)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    print(f"{len(x):,} x {x.shape[1]}, {faiss.omp_get_max_threads()} threads\n")
    print("| k | method | seconds | / protoprune | objective | / best |\n|---|---|---|---|---|---|")
    for k in whole_numbers(options.k or "100,1000", "--k", example="100,1000"):
        methods = {
            "protoprune (faiss, all points, 25 iterations)": lambda k=k: (
                prototypes.cluster(x, k, backend="faiss").centroids
            ),
            "protoprune (torch, all points, 25 iterations)": lambda k=k: (
                prototypes.cluster(x, k, backend="torch").centroids
            ),
            "faiss default (256 points a centroid)": lambda k=k: faiss_default(x, k),
            "scikit-learn KMeans (k-means++)": lambda k=k: (
                KMeans(k, n_init="auto", random_state=0).fit(x).cluster_centers_
            ),
        }
        measured = {name: timed(method) for name, method in methods.items()}
        own = next(iter(measured.values()))[0]
        objective = {name: cost(x, centroids) for name, (_, centroids) in measured.items()}
        best = min(objective.values())
        for name, (seconds, _) in measured.items():
            print(
                f"| {k} | {name} | {seconds:.1f} | {seconds / own:.2f} | {objective[name]:.1f} "
                f"| {objective[name] / best:.4f} |"
            )


def timed(method) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    centroids = method()
    return time.perf_counter() - started, centroids


def cost(x: np.ndarray, centroids: np.ndarray) -> float:
    centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return float(sum((1 - (part @ centroids.T).max(1)).sum(dtype=np.float64) for part in np.array_split(x, 20)))


def faiss_default(x: np.ndarray, k: int) -> np.ndarray:
    kmeans = faiss.Kmeans(x.shape[1], k, spherical=True)
    kmeans.train(x)
    return kmeans.centroids


def mixture(n: int, d: int, centres: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, centres + 1) ** 0.5
    means = rng.normal(size=(centres, d)) / np.sqrt(np.arange(1, d + 1))  # a decaying spectrum, as encoders have
    which = rng.choice(centres, n, p=weight / weight.sum())
    return (means[which] + 0.6 * rng.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1))).astype(np.float32)


if __name__ == "__main__":
    main()
