"""What `keep_only` makes of torch's data sets: a Subset with what is asked of an ImageFolder, and a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, Subset

_OF_ALL = ("classes", "class_to_idx", "root", "transform", "target_transform", "transforms")
_OF_EACH = ("samples", "imgs", "targets")  # a value an item


class KeptSubset(Subset[Any]):
    """A Subset that has the attributes of an ImageFolder, where its data set has them: those of all images (`classes`,
    `class_to_idx`, `transform`), and of the kept ones alone `samples`, `imgs` and `targets`.

    A transform that is set on it is set on the data set, whose items these are (timm's `create_loader` does so).
    """

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ALL:
            return getattr(_whole(self)[0], name)
        if name in _OF_EACH:
            whole, places = _whole(self)
            values = getattr(whole, name)
            self.__dict__[name] = [values[place] for place in places]  # made once: loops ask for targets[i]
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("transform", "target_transform", "transforms"):
            setattr(_whole(self)[0], name, value)
        else:
            super().__setattr__(name, value)


def _whole(subset: Subset[Any]) -> tuple[Any, Sequence[int]]:
    """(what it is a part of, perhaps as a part of a part, the places of its items there)."""
    dataset, places = subset.dataset, subset.indices
    while isinstance(dataset, Subset):
        places = [dataset.indices[place] for place in places]
        dataset = dataset.dataset
    return dataset, places


class KeptStream(IterableDataset[Any]):
    """Samples, pass after pass, for torch's loaders. Their source deals itself out to workers, as Hugging Face's do."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)
