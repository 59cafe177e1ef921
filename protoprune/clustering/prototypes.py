"""Features -> prototypes: k-means centroids, and each image's cluster and distance to its centroid.

Spherical k-means on L2-normalised features with difficulty = 1 - cosine by default (Sorscher et al. 2022 and its
released scores), Euclidean k-means on the raw features as the alternative. Lloyd's iterations run in faiss or, where a
GPU is at hand but faiss has none, in torch; both start from the same images, so they agree to within rounding. Features
are read in chunks: only the points that k-means trains on are held in memory. Vectors of zeros have no direction and
take no part in spherical clusterings. Knows nothing of files or selection.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from protoprune import files
from protoprune.bounds import check_whole
from protoprune.clustering import vectors
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.npy import load_npz
from protoprune.scores.ranks import spearman
from protoprune.text import parse_json

if TYPE_CHECKING:
    import torch

Engine = Callable[[np.ndarray, np.ndarray, int, bool, int], np.ndarray]  # points, start, iterations, spherical, seed
Assign = Callable[[np.ndarray, np.ndarray, bool], np.ndarray]  # points, centroids, spherical -> their clusters

# Training points are held as float32: at most this many bytes of them unless --train-points says otherwise.
TRAIN_BYTES = 4 << 30
BACKENDS = ("auto", "faiss", "torch")
_SHORTEST = 1e-15  # squares of shorter vectors vanish in float32
_ENTRY = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}\.npz(\.\d+)?")
_ARRAYS = ("centroids", "cluster", "distance")


@dataclass
class Clustering:
    """One k-means clustering of n images of which m have a place; the others have cluster -1 and distance NaN."""

    centroids: np.ndarray  # (k, d) float32, of length 1 when spherical
    cluster: np.ndarray  # (n,) int32
    distance: np.ndarray  # (n,) float32: 1 - cosine when spherical, else the Euclidean distance
    objective: float  # sum over images of the distance (spherical) or of its square
    seed: int
    spherical: bool
    iterations: int
    train_points: int  # how many points Lloyd's iterations saw
    backend: str
    length_spearman: float | None = None  # Euclidean: rank correlation of the distance with the vector's length

    @property
    def k(self) -> int:
        return len(self.centroids)

    def sizes(self) -> np.ndarray:
        """(k,) images a cluster; 0 for an empty one."""
        return np.bincount(self.cluster[self.cluster >= 0], minlength=self.k)


def auto_k(usable: int, classes: int = 0) -> int:
    """The number of classes when it is known, else round(sqrt(images)); never under 10 images a cluster on average.

    ImageNet's 1000 in the paper is its number of classes; the square root gives 1,132. Results hardly depend on k.
    """
    return max(1, min(classes if classes >= 2 else round(math.sqrt(usable)), usable // 10))


def check_settings(
    k: int | None = None, iterations: int = 25, train_points: int | None = None, backend: str = "auto"
) -> None:
    """Raise UsageError for a setting of `cluster` that no features would bear."""
    if k is not None:
        check_whole("--k", k, hint="; use --k auto")
    check_whole("--iterations", iterations, 1, 1_000_000)
    if train_points is not None:
        check_whole("--train-points", train_points, 1, 1 << 40)
    if train_points is not None and train_points < (k or 1):
        raise UsageError(f"--train-points {train_points}: fewer than the {k or 1} clusters; give at least {k or 1}")
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend}: expected one of {', '.join(BACKENDS)}")


def cluster(
    features: vectors.Rows,
    k: int,
    *,
    usable: np.ndarray | None = None,
    spherical: bool = True,
    seed: int = 0,
    iterations: int = 25,
    train_points: int | None = None,
    backend: str = "auto",
) -> Clustering:
    """Cluster the usable rows of `features`, (n, d) of any float type, an array or an HDF5 dataset.

    `train_points` bounds the points that Lloyd's iterations see (default: all, up to TRAIN_BYTES or 256 a cluster,
    whichever is more); every image gets a cluster in any case, but for vectors of zeros when spherical. Clusters can
    end up empty when images are identical; their centroids stay in the result.

    Raises UsageError for a k that does not fit and ProtopruneError for features that cannot be computed with: NaN,
    infinite, all zero, or of lengths that Euclidean distances do not bear.
    """
    n, d = features.shape
    usable = np.ones(n, bool) if usable is None else usable
    m = int(usable.sum())
    check_settings(k, iterations, train_points, backend)
    if k > m:
        raise UsageError(f"--k {k}: more clusters than usable images ({m:,}); use --k auto or at most {m}")
    limit = min(m, train_points or max(TRAIN_BYTES // (4 * d), 256 * k))
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(usable)
    if limit < m:
        rows = np.sort(rng.choice(rows, limit, replace=False))
    points = _gather(features, rows, spherical)
    _check_points(points, k, m, spherical)
    start = _seeds(points, k, rng)
    engine, assign = _engine(backend)
    trained = len(points)
    centroids = engine(points, start, iterations, spherical, seed)
    del points
    labels, distance = np.full(n, -1, np.int32), np.full(n, np.nan, np.float32)
    length, objective = np.full(0 if spherical else n, np.nan, np.float32), 0.0
    for here, x in vectors.slices(features, usable, unit=spherical):
        if spherical:
            directed = x.any(axis=1)
            here, x = here[directed], x[directed]
        if len(here):
            nearest = assign(x, centroids, spherical)
            labels[here], distance[here] = nearest, (found := _distance(x, centroids, nearest, spherical))
            objective += float((found if spherical else found.astype(np.float64) ** 2).sum(dtype=np.float64))
            if not spherical:
                length[here] = np.linalg.norm(x, axis=1)
    by_length = None if spherical else spearman(distance, length)
    name = engine.__name__[1:]
    return Clustering(centroids, labels, distance, objective, seed, spherical, iterations, trained, name, by_length)


def _check_points(points: np.ndarray, k: int, m: int, spherical: bool) -> None:
    """Refuse points that k clusters cannot be found in; points: (p, d), those of m images that k-means trains on."""
    if not len(points):
        raise ProtopruneError(f"the features of all {m:,} images are zeros; embed them again")
    if k > len(points):
        raise UsageError(
            f"--k {k}: more clusters than images whose features are not all zeros ({len(points):,}); use --k 1"
        )
    longest = max(float(points.max()), -float(points.min()))
    if not spherical and 0 < longest < _SHORTEST:
        raise ProtopruneError(f"no feature exceeds {longest:.3g}, too short for Euclidean distances; scale them")


def _seeds(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """(k, d) first centroids by greedy k-means++ (Arthur & Vassilvitskii 2007), on a sample of 10 points a centroid.

    Each is drawn with probability proportional to the squared distance to those before it, the best of 2 + log k draws.
    Where clusters are tight, a start at random points ends several per cent higher; the sample keeps the cost well
    below that of the iterations.
    """
    sample = points[np.sort(rng.choice(len(points), min(len(points), 10 * k), replace=False))]
    squares = np.einsum("nd,nd->n", sample, sample)  # (s,)
    chosen = [int(rng.integers(len(sample)))]
    nearest = np.maximum(squares + squares[chosen[0]] - 2 * (sample @ sample[chosen[0]]), 0)  # squared distances
    nearest[chosen[0]] = 0
    for _ in range(1, k):
        weight = np.cumsum(nearest, dtype=np.float64)
        if weight[-1] > 0:
            draws = np.searchsorted(weight, rng.random(2 + int(math.log(k))) * weight[-1])
            draws = np.minimum(draws, len(sample) - 1)
        else:  # no point is left that differs from those chosen
            draws = rng.choice(np.setdiff1d(np.arange(len(sample)), chosen), 1)
        distances = squares + squares[draws][:, None] - 2 * (sample[draws] @ sample.T)  # (draws, s)
        distances = np.minimum(np.maximum(distances, 0), nearest)
        best = int(distances.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(draws[best]))
        nearest = distances[best]
        nearest[chosen[-1]] = 0  # exactly: rounding must not let a point be drawn twice
    return sample[chosen].copy()


def _gather(features: vectors.Rows, rows: np.ndarray, spherical: bool) -> np.ndarray:
    """(p, d) float32: the given rows (ascending), checked and normalised, without zeros when spherical."""
    wanted = np.zeros(features.shape[0], bool)
    wanted[rows] = True
    points, filled = np.empty((len(rows), features.shape[1]), np.float32), 0
    for _, x in vectors.slices(features, wanted, unit=spherical):
        if spherical and not (directed := x.any(axis=1)).all():
            x = x[directed]
        points[filled : filled + len(x)] = x
        filled += len(x)
    return points[:filled]


def _distance(x: np.ndarray, centroids: np.ndarray, nearest: np.ndarray, spherical: bool) -> np.ndarray:
    """Distance of each row of x to its centroid, from the definition rather than from the search's expansion."""
    own = centroids[nearest]
    if spherical:
        return np.clip(1 - np.einsum("nd,nd->n", x, own), 0, 2)
    return np.linalg.norm(x - own, axis=1)


def _engine(backend: str) -> tuple[Engine, Assign]:
    """(Lloyd's iterations, assignment) of the backend; torch only where it has a GPU that faiss has not."""
    if backend == "torch":
        try:
            import torch
        except ImportError:
            raise ProtopruneError("torch is not installed; run: pip install torch, or use --backend faiss") from None
        return _torch, _assign_torch
    gpus = -1  # that faiss sees; -1 without faiss
    try:
        import faiss

        gpus = faiss.get_num_gpus()
    except ImportError:
        if backend == "faiss":
            raise ProtopruneError(
                "faiss is not installed; run: pip install faiss-cpu, or use --backend torch"
            ) from None
    gpu_node = os.path.exists("/dev/nvidiactl")  # looked at first: importing torch costs seconds
    if backend == "auto" and (gpus < 0 or (gpu_node and gpus == 0)):
        try:
            import torch

            if gpus < 0 or torch.cuda.is_available():
                return _torch, _assign_torch
        except ImportError:
            if gpus < 0:
                raise ProtopruneError("clustering needs faiss or torch; run: pip install faiss-cpu") from None
    return _faiss, _assign_faiss


def _faiss(points: np.ndarray, start: np.ndarray, iterations: int, spherical: bool, seed: int) -> np.ndarray:
    import faiss

    kmeans = faiss.Kmeans(
        points.shape[1],
        len(start),
        niter=iterations,
        seed=seed,
        spherical=spherical,
        gpu=faiss.get_num_gpus() > 0,
        max_points_per_centroid=len(points),  # faiss would silently train on 256 a centroid
        min_points_per_centroid=1,
    )
    kmeans.train(points, init_centroids=start)
    return np.asarray(kmeans.centroids)


def _assign_faiss(x: np.ndarray, centroids: np.ndarray, spherical: bool) -> np.ndarray:
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
    if faiss.get_num_gpus() > 0:
        nearest = faiss.knn_gpu(faiss.StandardGpuResources(), x, centroids, 1, metric=metric)[1]
    else:
        nearest = faiss.knn(x, centroids, 1, metric=metric)[1]
    return nearest[:, 0].astype(np.int32)


def _torch(points: np.ndarray, start: np.ndarray, iterations: int, spherical: bool, seed: int) -> np.ndarray:
    """Lloyd's iterations with the points on the device; an emptied cluster is given half of the largest one's place."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(points).to(device)
    centroids = torch.from_numpy(start).to(device)
    for _ in range(iterations):
        nearest = _nearest_torch(x, centroids, spherical)
        sums = _sums_torch(x, nearest, len(centroids))
        counts = torch.bincount(nearest, minlength=len(centroids)).float()
        centroids = sums / counts.clamp(min=1)[:, None]
        _split_largest(centroids, counts)
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return centroids.cpu().numpy()


def _sums_torch(x: torch.Tensor, nearest: torch.Tensor, k: int) -> torch.Tensor:
    """(k, d) sum of each cluster's points. On a GPU index_add_ adds in any order, but a seed must mean one list."""
    import torch

    if not x.is_cuda:
        return torch.zeros(k, x.shape[1]).index_add_(0, nearest, x)
    sums = torch.zeros(k, x.shape[1], device=x.device)
    rows = max(1, (1 << 28) // (4 * k))
    for part, which in zip(torch.split(x, rows), torch.split(nearest, rows), strict=True):
        sums += torch.nn.functional.one_hot(which, k).to(x.dtype).T @ part
    return sums


def _split_largest(centroids: torch.Tensor, counts: torch.Tensor) -> None:
    """Refill empty clusters as faiss does: a copy of the largest cluster's centroid, both nudged apart."""
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        largest = int(counts.argmax())
        centroids[empty] = centroids[largest]
        centroids[empty, ::2] *= 1 + 1 / 1024
        centroids[empty, 1::2] *= 1 - 1 / 1024
        centroids[largest, ::2] *= 1 - 1 / 1024
        centroids[largest, 1::2] *= 1 + 1 / 1024
        counts[empty] = counts[largest] / 2
        counts[largest] /= 2


def _nearest_torch(x: torch.Tensor, centroids: torch.Tensor, spherical: bool) -> torch.Tensor:
    import torch

    offset = torch.zeros(len(centroids), device=x.device) if spherical else -0.5 * (centroids**2).sum(1)
    rows = max(1, (1 << 28) // (4 * len(centroids)))  # a quarter of a gigabyte of similarities at a time
    parts = [torch.addmm(offset, part, centroids.T).argmax(1) for part in torch.split(x, rows)]
    return torch.cat(parts)


def _assign_torch(x: np.ndarray, centroids: np.ndarray, spherical: bool) -> np.ndarray:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    nearest = _nearest_torch(torch.from_numpy(x).to(device), torch.from_numpy(centroids).to(device), spherical)
    return nearest.cpu().numpy().astype(np.int32)


def cached(
    folder: str, content: str, compute: Callable[..., Clustering], **settings: int | bool | str | None
) -> tuple[Clustering, bool]:
    """The clustering of `content` (an id of the features) under these settings, from `folder` when it is there.

    `compute(**settings)` is called otherwise and its result kept. Returns the clustering and whether it was found.
    A folder that cannot be written or an entry that cannot be read costs time, never the answer. Entries of other
    content are removed when one is added: the folder belongs to one feature file.
    """
    key = json.dumps({"version": 3, "content": content, **settings}, sort_keys=True)
    name = f"{hashlib.sha256(content.encode()).hexdigest()[:12]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    path = os.path.join(folder, name)
    found = _kept(path, key)
    if found is not None:
        return found, True
    if os.path.lexists(path):
        warn(f"{path}: a damaged clustering, or one that cannot be read; it is made anew")
    result = compute(**settings)
    plain = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in _ARRAYS}
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=key, plain=json.dumps(plain), **{name: getattr(result, name) for name in _ARRAYS})
        for other in os.listdir(folder):  # clusterings of features that are no more
            if _ENTRY.fullmatch(other) and other[:12] != name[:12]:
                os.unlink(os.path.join(folder, other))
    return result, False


def _kept(path: str, key: str) -> Clustering | None:
    """The clustering in a cache entry; None where there is none, it is another's, or damaged: it is computed again."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        entry = load_npz(path)
        if entry["key"].item() == key:
            stored = parse_json(entry["plain"].item())
            stored.update({name: entry[name] for name in _ARRAYS})
            return Clustering(**stored)
    return None


def consensus(clusterings: list[Clustering]) -> np.ndarray:
    """(n,) float32: the mean distance over restarts from different seeds, which is what moves a kept set most."""
    if len(clusterings) == 1:
        return clusterings[0].distance.copy()
    total = np.zeros(len(clusterings[0].distance))
    for one in clusterings:
        total += one.distance
    return (total / len(clusterings)).astype(np.float32)
