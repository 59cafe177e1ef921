"""Kept lists in data loaders: torchvision, Hugging Face `datasets`, WebDataset. Knows nothing of the lists' formats."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from protoprune.errors import ProtopruneError, UsageError
from protoprune.lists import read_list, read_weights


def keep_only(dataset, kept: Iterable[str] | str | os.PathLike, *, root: str | os.PathLike | None = None):
    """`dataset` without the images that are not in `kept` (a list file, or paths as `read_list` gives them).

    - torchvision `ImageFolder`, other sets with `.samples`: a `torch.utils.data.Subset` (classes keep their numbers);
    - Hugging Face `datasets.Dataset` with an image column: `dataset.select(...)`;
    - WebDataset pipelines and other iterables of dicts with `__key__`: the kept samples, by path without suffix.

    `root` is the folder that the listed paths are relative to, by default the data set's own. Raises ProtopruneError
    when a listed image is not in the data set, so that a wrong root can never train on less than was asked for; for
    an iterable this is known, and raised, at its end. (Loader workers see a part each and do not check: go through the
    data set once without workers.)
    """
    if isinstance(kept, (str, os.PathLike)):
        kept = read_list(kept)
    kept = kept if isinstance(kept, np.ndarray) else list(kept)  # an iterator can be gone through only once
    if isinstance(kept, np.ndarray) or any(not isinstance(path, str) for path in kept):
        raise UsageError("keep_only takes paths; row indices are for arrays in protoprune's own order of images")
    if hasattr(dataset, "samples"):
        from torch.utils.data import Subset

        return Subset(dataset, _indices(*_identified(dataset, root), kept))
    if _is_hugging_face(dataset):
        return dataset.select(_indices(*_identified(dataset, root), kept))
    if not hasattr(dataset, "__iter__"):
        raise UsageError(
            f"{type(dataset).__name__}: expected .samples, a Hugging Face data set, or samples with __key__"
        )
    samples = _KeptSamples(dataset, kept)
    return dataset.compose(samples.stage) if hasattr(dataset, "compose") else samples


def weights_of(
    dataset, kept: Mapping[str, float] | str | os.PathLike, *, root: str | os.PathLike | None = None
) -> np.ndarray:
    """(len(dataset),) float32: the weight of each image of `dataset`, in its order; 0 for one that is not listed.

    dataset: what `keep_only` returned or took, except iterables (`read_weights` gives those their weights by path);
    kept: a calibrated list, or what `read_weights` gives. For a loss (weight each image's), or for
    `torch.utils.data.WeightedRandomSampler` (draw by weight). `root` as for `keep_only`, which must be given for a
    Hugging Face data set. Raises ProtopruneError when a listed image is not in the data set.
    """
    weights = kept if isinstance(kept, Mapping) else read_weights(kept)
    indices = None
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # a torch Subset, perhaps of a Subset
        own = np.asarray(dataset.indices)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    if not hasattr(dataset, "samples") and not _is_hugging_face(dataset):
        raise UsageError(f"{type(dataset).__name__}: expected .samples or a Hugging Face data set; see read_weights")
    if root is None and not hasattr(dataset, "samples"):
        raise UsageError(
            "weights_of needs root= for a Hugging Face data set: the folder that the paths are relative to"
        )
    ids, base, where = _identified(dataset, root)
    ids = ids if indices is None else [ids[index] for index in indices]
    listed = {path.removeprefix(base): weight for path, weight in weights.items()}
    _all_present(listed.keys() - set(ids), len(listed), where)
    return np.array([listed.get(one, 0) for one in ids], np.float32)


def _is_hugging_face(dataset) -> bool:
    return hasattr(dataset, "select") and hasattr(dataset, "features")


def _identified(dataset, root: str | os.PathLike | None) -> tuple[list[str], str, str]:
    """(each image's path as lists have it, the folder with a slash that was taken off, 'under …' for messages)."""
    if hasattr(dataset, "samples"):
        paths = [sample[0] for sample in dataset.samples]
        root = os.fspath(root if root is not None else dataset.root)
    else:
        paths = _hugging_face_paths(dataset)
        root = os.fspath(root) if root is not None else os.path.commonpath([os.path.dirname(p) for p in paths])
    base = os.path.join(os.path.abspath(root), "")
    return [os.path.abspath(path).removeprefix(base) for path in paths], base, f"under {root}"


def _indices(ids: list[str], base: str, where: str, kept: Iterable[str]) -> list[int]:
    wanted = {path.removeprefix(base) for path in kept}
    _all_present(wanted - set(ids), len(wanted), where)
    return [index for index, one in enumerate(ids) if one in wanted]


def _hugging_face_paths(dataset) -> list[str]:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UsageError(f"the data set has no image column, only {', '.join(dataset.features)}")
    undecoded = dataset.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))
    paths = [record["path"] for record in undecoded[columns[0]]]
    if not all(path and os.path.isabs(path) for path in paths):
        raise UsageError("the data set does not know its files' paths; load it with load_dataset('imagefolder', …)")
    return paths


def _all_present(missing: set[str], listed: int, where: str) -> None:
    if missing:
        raise ProtopruneError(
            f"{len(missing)} of {listed} listed images are not in the data set {where} "
            f"(first: {min(missing)}); give the root that the list was made for"
        )


class _KeptSamples:
    """The samples whose key is in the list, pass after pass; each whole pass checks that all of them were seen."""

    def __init__(self, dataset: Iterable[dict], kept: Iterable[str]):
        self.dataset = dataset
        self.keys = {_key(path): path for path in kept}

    def __iter__(self) -> Iterator[dict]:
        return self.stage(self.dataset)

    def stage(self, samples: Iterable[dict]) -> Iterator[dict]:
        unseen = set(self.keys)
        for sample in samples:
            if "__key__" not in sample:
                raise UsageError(
                    f"the samples have no __key__, only {', '.join(map(str, sample))}; keep_only needs one"
                )
            if sample["__key__"] in self.keys:
                unseen.discard(sample["__key__"])
                yield sample
        if not _is_loader_worker():
            _all_present({self.keys[key] for key in unseen}, len(self.keys), "(by key)")


def _is_loader_worker() -> bool:
    """Whether this process sees one worker's share of the shards only."""
    if "torch" not in sys.modules:
        return False
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None


def _key(path: str) -> str:
    """WebDataset's key of a file: its path up to the first dot of the file name."""
    folder, _, name = path.rpartition("/")
    stem = name.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem
