"""Features -> two dimensions, for looking at. Distances in any such map mislead, and the page says so."""

from __future__ import annotations

import numpy as np

from protoprune.clustering.vectors import unit
from protoprune.errors import ProtopruneError, UsageError

METHODS = ("pca", "umap", "tsne")


def check_method(name: str) -> None:
    """Raise UsageError for a map that there is not."""
    if name not in METHODS:
        raise UsageError(f"--map {name}: expected one of {', '.join(METHODS)}")


def project(features: np.ndarray, method: str = "pca", seed: int = 0) -> tuple[np.ndarray, str]:
    """(n, d) features -> (n, 2) float32 in 0 to 1, and a sentence on how. Vectors are scaled to length 1 first."""
    check_method(method)
    x = unit(np.asarray(features, np.float32))
    x = x - x.mean(axis=0)
    if len(x) < 3:
        return _to_unit(np.column_stack([np.arange(len(x)), np.zeros(len(x))])), "Too few images for a map."
    if method == "pca":
        found, share = _pca(x)
        how = f"PCA: the two directions of largest variance hold {100 * share:.0f} % of it; the rest is not shown."
    else:
        found = (_umap if method == "umap" else _tsne)(x, seed)
        how = f"{'UMAP' if method == 'umap' else 't-SNE'}: neighbours are kept together; sizes of groups and gaps "
        how += "between them mean little."
    return _to_unit(found), how


def _pca(x: np.ndarray) -> tuple[np.ndarray, float]:
    values, vectors = np.linalg.eigh(x.T @ x)
    axes = vectors[:, -2:][:, ::-1] if x.shape[1] > 1 else np.column_stack([vectors[:, 0], np.zeros(len(vectors))])
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(2)] + 1e-30)  # the sign of an axis is arbitrary
    return x @ axes, float(values[-2:].sum() / max(values.sum(), 1e-30))


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError:
        raise _missing("umap", "umap-learn") from None
    return UMAP(random_state=seed, n_neighbors=min(15, len(x) - 1), metric="cosine").fit_transform(x)


def _tsne(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        from openTSNE import TSNE
    except ImportError:
        raise _missing("tsne", "openTSNE") from None
    return np.asarray(TSNE(random_state=seed, perplexity=min(30, (len(x) - 1) / 3), metric="cosine").fit(x))


def _missing(name: str, package: str) -> ProtopruneError:
    return ProtopruneError(f"--map {name} needs {package}; pip install 'protoprune[map]', or take --map pca")


def _to_unit(found: np.ndarray) -> np.ndarray:
    low, high = found.min(axis=0), found.max(axis=0)
    return ((found - low) / np.where(high > low, high - low, 1)).astype(np.float32)
