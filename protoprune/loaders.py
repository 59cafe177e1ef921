"""Kept lists in data loaders: torchvision, timm, Hugging Face `datasets`, WebDataset, lists of paths. Knows nothing of
the lists' formats."""

from __future__ import annotations

import copy
import itertools
import os
import posixpath
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from protoprune import stores
from protoprune.arguments import checked, one_column, texts
from protoprune.bounds import check_number
from protoprune.errors import ProtopruneError, UsageError, warn
from protoprune.images.listing import describe_counts, image_suffixes
from protoprune.lists import read_list, read_weights
from protoprune.sources.finding import SUFFIXES, split_id
from protoprune.sources.keys import key_of
from protoprune.text import as_known
from protoprune.units import many

if TYPE_CHECKING:
    import datasets

_PATH = (str, os.PathLike)
_WORD = re.compile(r"[A-Za-z_]+")
_LONG = 10_000  # samples of a stream after which one should have been listed
_BY_ROWS = "of one that was loaded from Parquet or Arrow files, protoprune.table_rows gives the rows"
_PART = "or part=True, where this is a part of what it was made for (a split, some of the files)"
_SPLITS = (
    "load_dataset makes splits of files and folders that are called so (test, val_1.jpg): data_files={'train': "
    "'FOLDER/**'} takes all of them; else "
)
_OTHER_LIST = "was the list made for these shards? A pass over all of them in one process names what is missing"

Sample = dict[str, Any]  # of a WebDataset: field -> value


@checked
def keep_only(
    dataset: Any,
    kept: Iterable[str] | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    paths: Sequence[str | os.PathLike[str]] | None = None,
    part: bool = False,
) -> Any:
    """`dataset` without the images that are not in `kept` (a list file, or paths as `read_list` gives them).

    - torchvision `ImageFolder`, other sets with `.samples` of paths, a `random_split` or other `Subset` of them, a
      `ConcatDataset` of such: a `torch.utils.data.Subset` (classes keep their numbers) that has the set's `classes`,
      `class_to_idx` and `transform`, and the `samples`, `imgs` and `targets` of what is kept;
    - what timm's `create_dataset` makes of a folder or of `hfds/`: a copy that reads only the kept images;
    - a list of paths, or of tuples that begin with one (`samples`): those that are kept, in their order;
    - Hugging Face `datasets.Dataset` with an image column, or of `load_dataset("webdataset", …)`:
      `dataset.select(...)`;
    - WebDataset pipelines and other iterables of dicts with `__key__`: the kept samples. Keys end at the first dot of a
      file's name; where that makes one key of several images, of which some are to go, the sample is refused. A list
      that was made from shards is matched by shard and key;
    - any other that has a length, with `paths`: the image's path of each of its items, in their order, one or several
      times. Of COCO `[dataset.coco.imgs[one]["file_name"] for one in dataset.ids]`, of a table its column of paths.

    `root` is the folder that the listed paths are relative to, by default the data set's own; `paths` are below it, or
    relative to it. `part` says that the data set is a part of what the list was made for, as `train_test_split` and
    `select` of Hugging Face make them: then one listed image is enough. Raises UsageError for an empty list and
    ProtopruneError when a listed image is not in the data set (for a Subset: in the whole of it, and when none is in
    the part), so that a wrong root can never train on less than was asked for; for an iterable this is known, and
    raised, at its end. (Several loader workers or processes see a part each: they warn when none of theirs is listed.
    Go through the data set once in one process to check all of it.)
    """
    listed = _listed(kept, "keep_only")
    if isinstance(dataset, Mapping):
        some = next(iter(dataset), "train")
        raise UsageError(f"a {type(dataset).__name__} of splits {', '.join(map(str, dataset))}; give one: [{some!r}]")
    dataset = _listlike(dataset)
    whole, _ = _whole(dataset)
    own = _own_paths(dataset) if paths is None else None
    if own is not None:
        ids, entries = _matched(dataset, listed, root, own, part)
        return list(itertools.compress(dataset, map(set(entries).__contains__, ids)))
    tars = _is_hugging_face(dataset) and "__key__" in dataset.features  # of load_dataset("webdataset", …)
    if tars and paths is None:
        return dataset.select([row["__row__"] for row in _KeptSamples(_rows(dataset), listed, whole=True, part=part)])
    if paths is not None or _in_files(whole) or _is_hugging_face(whole):
        ids, entries = _matched(dataset, listed, root, paths, part)
        wanted = set(entries)
        return _only(dataset, [row for row, one in enumerate(ids) if one in wanted])
    _check_samples(whole)
    samples = _KeptSamples(dataset, listed, part=part)
    if not hasattr(dataset, "compose"):
        return _streamed(dataset, samples)
    _check_lengths(dataset, samples.count)
    return dataset.compose(samples.stage)


def _streamed(dataset: Any, samples: _KeptSamples) -> Any:
    """The samples, as a torch IterableDataset where the data set is one, so that loaders take them."""
    if "torch" in sys.modules:
        from torch.utils.data import IterableDataset

        if isinstance(dataset, IterableDataset):
            from protoprune.subset import KeptStream

            return KeptStream(samples)
    return samples


def _only(dataset: Any, rows: list[int]) -> Any:
    """The same kind of data set with these of its items."""
    if _is_hugging_face(dataset):
        return dataset.select(rows)
    reader = _reader(dataset)
    if reader is None:
        from protoprune.subset import KeptSubset

        return KeptSubset(dataset, rows)
    less, kept = copy.copy(reader), copy.copy(dataset)  # of timm, whose loaders set a transform on the data set
    if hasattr(reader, "samples"):
        less.samples = [reader.samples[row] for row in rows]
    else:
        less.dataset, less.num_samples = reader.dataset.select(rows), len(rows)
    kept.reader = less
    return kept


def _check_samples(dataset: Any) -> None:
    """Raise UsageError for what cannot be gone through as samples with `__key__`."""
    name = type(dataset).__name__
    if isinstance(dataset, _PATH):
        raise UsageError(f"{dataset}: a path; give the data set that reads it, or the list of its files")
    if hasattr(dataset, "columns"):
        raise UsageError(f"a {name}: give its column of paths, or paths= with the data set that reads it")
    if hasattr(dataset, "batch_sampler"):
        raise UsageError(f"a {name}: give its data set, and make the loader of what keep_only returns")
    timm = hasattr(dataset, "reader")  # whose streams are of images and classes, without keys
    if _has_samples(dataset) and not timm:
        return
    if type(dataset).__module__.partition(".")[0] == "datasets":
        raise UsageError(
            f"{name}: a streamed Hugging Face data set without __key__; load it without streaming=True (of files it "
            "holds no more than their paths), and stream what is kept: keep_only(…).to_iterable_dataset()"
        )
    instead = "; for timm's readers of tars write what is kept with `protoprune reshard`" if timm else ""
    raise UsageError(
        f"{name}: expected .samples, a list of paths, a Hugging Face data set or samples with __key__; of another, "
        f"give paths=, the path of each of its items{instead}"
    )


def _check_lengths(dataset: Any, count: int) -> None:
    """Warn of what was said of the length of a WebDataset before it was filtered."""
    for call, said in (("with_epoch", getattr(dataset, "nsamples", 0)), ("with_length", getattr(dataset, "size", 0))):
        if isinstance(said, int) and said > count:
            warn(
                f"{call}({said:,}) was called before keep_only, which keeps {count:,} images; call it on what "
                "keep_only returns, with their number"
            )


def _listed(kept: Iterable[str] | str | os.PathLike[str], who: str) -> list[str]:
    """The paths of a list, or those that are given to `who`. Raises UsageError where there are none."""
    name = f"{os.fspath(kept)}: " if isinstance(kept, (str, os.PathLike)) else ""
    found = one_column(read_list(kept) if isinstance(kept, (str, os.PathLike)) else kept)
    numbers = isinstance(found, np.ndarray) and found.dtype.kind in "iufb"
    several = getattr(found, "ndim", 1) == 1 and not hasattr(found, "columns") and not hasattr(found, "readline")
    paths = list(found) if several and not numbers else []
    if numbers or any(hasattr(path, "__index__") for path in paths):
        raise UsageError(
            f"{name}{who} takes paths; row indices count protoprune's own order of images, not the data set's"
        )
    paths = texts("kept", paths or found)
    if not paths:
        raise UsageError(f"{name}lists no image, so that nothing would be left to train on")
    return paths


@checked
def table_rows(
    kept: Iterable[str] | str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    part: bool = False,
) -> np.ndarray:
    """(m,) int64, ascending: the rows that a list keeps of Parquet or Arrow files, counted through all of `files`.

    For what was loaded from these files in this order: `load_dataset("parquet", data_files=files, split="train")
    .select(rows)` of Hugging Face, `pyarrow.dataset.dataset(files).take(rows)`. The list names shards and rows, as
    lists of shards do (`part-0.parquet/000123`); `root` is the folder that it is relative to (default: the common
    folder of the files), and `id_column` the one that the shards were embedded with. Raises ProtopruneError where an
    entry is in no file; with `part`, where all of them are.
    """
    from protoprune.sources.shard import ShardError
    from protoprune.sources.tables import table_ids

    listed = _listed(kept, "table_rows")
    places = _places(files)
    base = os.path.abspath(root) if root is not None else os.path.commonpath([os.path.dirname(one) for one in places])
    above = os.path.join(base, "")
    left = {one.removeprefix(above).removeprefix("./") for one in listed}
    rows, start = [], 0
    for place in places:
        name = os.path.relpath(place, base)
        try:
            ids = table_ids(place, id_column)
        except ShardError as error:
            raise ProtopruneError(f"{place}: {error.status.label}: {error.reason}") from None
        here = np.array([row for row, one in enumerate(ids) if f"{name}/{one}" in left], np.int64)
        rows.append(start + here)
        left.difference_update(f"{name}/{ids[row]}" for row in here.tolist())
        start += len(ids)
    if left and not (part and any(map(np.size, rows))):
        of = f"of {len(set(listed)):,} listed images"
        raise ProtopruneError(
            f"{many(len(left), f'{of} is', f'{of} are')} in none of the files (first: {min(left)}); give the files, "
            f"and the root, that the list was made for{'' if part else f', {_PART}'}"
        )
    return np.concatenate(rows)


def _places(files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Absolute, each once."""
    places = [os.path.abspath(file) for file in texts("files", files)]
    if not places:
        raise UsageError(
            "no files: give the Parquet or Arrow files that were embedded, in the order they are loaded in"
        )
    if len(set(places)) < len(places):
        raise UsageError(f"{max(places, key=places.count)} is given twice; a list keeps an image once")
    return places


@checked
def weights_of(
    dataset: object,
    kept: Mapping[str, float] | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    paths: Sequence[str | os.PathLike[str]] | None = None,
    part: bool = False,
) -> np.ndarray:
    """(len(dataset),) float32: the weight of each image of `dataset`, in its order; 0 for one that is not listed.

    dataset: what `keep_only` returned or took, except iterables (`read_weights` gives those their weights by path);
    kept: a calibrated list, or what `read_weights` gives. For a loss (weight each image's), or for
    `torch.utils.data.WeightedRandomSampler` (draw by weight). `root`, `paths` and `part` as for `keep_only`; without
    `paths` the root must be given for a Hugging Face data set. Raises UsageError for an empty list and ProtopruneError
    when a listed image is not in the data set (for a Subset: in the whole of it).
    """
    weights = kept if isinstance(kept, Mapping) else read_weights(kept)
    if not weights:
        raise UsageError("the list holds no image with a weight")
    for path, weight in weights.items() if weights is kept else ():  # somebody's own; those that are read are checked
        check_number(f"the weight of {path}", weight, 0, 1e30, above=True)
    dataset = _listlike(dataset)
    whole, places = _whole(dataset)
    paths = _own_paths(dataset) if paths is None else paths
    if paths is None and not _in_files(whole):
        if not _is_hugging_face(whole):
            raise UsageError(
                f"{type(whole).__name__}: expected .samples or a Hugging Face data set; of another, give paths=, the "
                "path of each of its items, or see read_weights"
            )
        if root is None:
            raise UsageError(
                "weights_of needs root= for a Hugging Face data set: the folder that the paths are relative to"
            )
    ids, entries = _matched(dataset, list(weights), root, paths, part)
    listed = dict(zip(entries, weights.values(), strict=True))
    lacking = sum(one not in listed for one in ids)
    if lacking and (part or places is not None):
        of = f"of the {len(ids):,} images of this part of the data set"
        warn(
            f"{many(lacking, f'{of} has', f'{of} have')} no weight in the list, and a weight of 0; take the part that "
            "`keep_only` makes with this list"
        )
    return np.array([listed.get(one, 0) for one in ids], np.float32)


def _matched(
    dataset: object,
    listed: list[str],
    root: str | os.PathLike[str] | None,
    paths: Sequence[str | os.PathLike[str]] | None,
    part: bool,
) -> tuple[list[str], list[str]]:
    """(the path of each item, the listed paths), as `_identified` has them. Raises ProtopruneError for a list that
    names what the data set lacks, unless it is a `part`, and for a part (a split) of which nothing would be left."""
    whole, places = _whole(dataset)
    ids, base, where = _identified(whole, root) if paths is None else _named(whole, root, paths)
    entries = as_known(listed, base, set(ids))
    wanted = set(entries)
    if not part:
        missing = wanted - set(ids)
        sorted_out = _is_hugging_face(whole) and missing and os.path.isfile(os.path.join(base, min(missing)))
        _all_present(missing, len(wanted), where, base, ids, _SPLITS if sorted_out else "")
    mine = ids if places is None else [ids[place] for place in places]
    if wanted.isdisjoint(mine):
        raise ProtopruneError(
            f"none of the {len(mine):,} images of this part of the data set is in the list, so that nothing would be "
            "left to train on; filter the whole data set, and split what is kept"
        )
    return mine, entries


def _whole(dataset: object) -> tuple[object, np.ndarray | None]:
    """What a torch Subset, perhaps of a Subset, is a part of (of timm's data sets the reader, or what that reads), and
    the places of its items there; None: all."""
    places = None
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        own = np.asarray(dataset.indices, np.int64)
        places = own if places is None else own[places]
        dataset = dataset.dataset
    reader = _reader(dataset)
    if reader is not None:
        dataset = reader if hasattr(reader, "samples") else reader.dataset
    return dataset, places


def _reader(dataset: object) -> Any:
    """The reader of one of timm's data sets, of files or of a Hugging Face data set; None for anything else."""
    reader = getattr(dataset, "reader", None)
    files = isinstance(getattr(reader, "samples", None), list)  # an array of a tar's members is no list
    return reader if files or _is_hugging_face(getattr(reader, "dataset", None)) else None


def _is_hugging_face(dataset: object) -> bool:
    return hasattr(dataset, "select") and hasattr(dataset, "features")


def _has_samples(dataset: object) -> bool:
    """Whether it may be gone through as samples with `__key__`: a streamed Hugging Face data set knows of its own."""
    fields = getattr(dataset, "features", ["__key__"])
    scalar = getattr(dataset, "ndim", 1) == 0  # numpy gives it __iter__ all the same
    return hasattr(dataset, "__iter__") and not scalar and "__key__" in (fields or ())


def _in_files(dataset: object) -> bool:
    """Whether it has the paths of files: of its own, or in the parts that it joins (torch's ConcatDataset)."""
    parts = getattr(dataset, "datasets", None)
    if hasattr(dataset, "cumulative_sizes") and isinstance(parts, list):
        return all(_in_files(_whole(part)[0]) for part in parts)
    return hasattr(dataset, "samples")


def _first(sample: Any) -> Any:
    """The path of a sample, which may have a class after it."""
    return sample[0] if isinstance(sample, (tuple, list)) and sample else sample


def _listlike(dataset: Any) -> Any:
    """A column of a table (pandas, Polars, pyarrow) as a list or an array; anything else as it is."""
    if hasattr(dataset, "columns"):  # a whole table
        return dataset
    dataset = one_column(dataset)
    return dataset.to_numpy() if hasattr(dataset, "to_numpy") else dataset


def _own_paths(dataset: object) -> list[Any] | None:
    """The paths of a list of them, or of tuples that begin with one; None of anything else."""
    if not isinstance(dataset, (Sequence, np.ndarray)) or isinstance(dataset, (str, bytes)):
        return None
    if getattr(dataset, "ndim", 1) == 0 or not len(dataset):
        return None
    return [_first(sample) for sample in dataset] if isinstance(_first(dataset[0]), _PATH) else None


def _files_of(dataset: Any) -> tuple[list[str], set[str]]:
    """(the path of each item, the roots that are known)."""
    if not hasattr(dataset, "samples"):
        paths: list[str] = []
        roots: set[str] = set()
        for part in dataset.datasets:
            whole, places = _whole(part)
            own, its = _files_of(whole)
            paths += own if places is None else [own[place] for place in places]
            roots |= its
        return paths, roots
    paths = [_first(sample) for sample in dataset.samples]
    if not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise UsageError(f"{type(dataset).__name__}: its samples do not begin with the path of a file")
    if hasattr(dataset, "__len__") and len(dataset) != len(paths):  # whose numbers are not those of its items
        raise UsageError(
            f"{type(dataset).__name__}: has {len(paths):,} samples and {len(dataset):,} items, so that nothing "
            "says which item is which image; filter what it is made of"
        )
    return paths, {os.fspath(dataset.root)} if hasattr(dataset, "root") else set()


def _identified(dataset: object, root: str | os.PathLike[str] | None) -> tuple[list[str], str, str]:
    """(each image's path as lists have it, the folder with a slash that was taken off, 'under …' for messages)."""
    if _in_files(dataset):
        paths, roots = _files_of(dataset)
        if root is None and len(roots) != 1:
            has = f"has several roots ({', '.join(sorted(roots)[:3])})" if roots else "has no root"
            raise UsageError(f"{type(dataset).__name__} {has}; give root=, which the paths are relative to")
        root = os.fspath(root) if root is not None else min(roots)
    else:
        paths = _hugging_face_paths(dataset)
        root = os.fspath(root) if root is not None else os.path.commonpath([os.path.dirname(p) for p in paths if p])
    base = os.path.join(os.path.abspath(root), "")
    given = os.path.join(root, "") if root else base
    return [path and _below(path, base, given) for path in paths], base, f"under {root}"


def _below(path: str, base: str, given: str) -> str:
    """The path relative to a folder, which is `base` by its full name and `given` by that in use; else absolute."""
    for folder in (given, base):  # asked of millions of paths; what is below takes several times as long
        rest = path.removeprefix(folder)
        if len(rest) < len(path) and not rest.startswith(("/", ".")) and "/." not in rest and "//" not in rest:
            return rest
    return os.path.abspath(path).removeprefix(base)


def _named(
    dataset: object, root: str | os.PathLike[str] | None, paths: Sequence[str | os.PathLike[str]]
) -> tuple[list[str], str, str]:
    """The same of a data set whose items somebody else names."""
    names = texts("paths", paths)
    items = len(dataset) if isinstance(dataset, Sized) else None
    if items != len(names):
        has = f"{items:,} items" if items is not None else "no length"
        raise UsageError(
            f"{type(dataset).__name__}: has {has}, and paths= names {len(names):,}; give the path of each item"
        )
    root = os.fspath(root if root is not None else getattr(dataset, "root", ""))
    base = os.path.join(os.path.abspath(root), "")
    places = [os.path.abspath(name) for name in names]
    if not all(place.startswith(base) for place in places):  # then they are relative to the root, not to where we are
        places = [os.path.normpath(os.path.join(base, name)) for name in names]
    return [place.removeprefix(base) for place in places], base, f"under {base}"


def _rows(dataset: datasets.Dataset) -> Iterator[Sample]:
    """Key, URL and number of each row, and the fields of images that it has, which are not decoded."""
    fields = _image_fields(dataset.features)
    names = ["__key__", *(["__url__"] if "__url__" in dataset.features else [])]
    number = 0
    for batch in dataset.select_columns([*names, *fields]).with_format("arrow").iter(batch_size=1000):
        there = {field: batch.column(field).is_valid().to_pylist() for field in fields}
        for place, one in enumerate(batch.select(names).to_pylist()):
            yield one | {field: True for field in fields if there[field][place]} | {"__row__": number}
            number += 1


def _hugging_face_paths(dataset: datasets.Dataset) -> list[str]:
    import datasets
    import pyarrow.compute

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UsageError(f"the data set has no image column, only {', '.join(dataset.features)}; {_BY_ROWS}")
    column = "image" if "image" in columns else columns[0]  # beside masks and the like, which may come first
    plain = dataset.with_format(None)  # without a transform, which would be made of every image, and hidden columns
    undecoded = plain.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    paths: list[str] = []
    known, named = 0, 0  # rows with an image, and those that say where it is
    for batch in undecoded.with_format("arrow").iter(batch_size=10_000):  # a row by itself takes seventy times as long
        images = batch.column(column)
        known += len(images) - images.null_count
        own = [path or "" for path in pyarrow.compute.struct_field(images, "path").to_pylist()]
        named += sum(map(os.path.isabs, own))
        paths += own
    if not known or named < known:
        raise UsageError(
            "the data set does not know its files' paths; load it with load_dataset('imagefolder', …), and filter it "
            f"before save_to_disk; {_BY_ROWS}"
        )
    return paths


def _all_present(
    missing: set[str], listed: int, where: str, base: str = "", ids: Iterable[str] = (), hint: str = ""
) -> None:
    """Raise ProtopruneError for listed images that the data set lacks, with what may be the reason."""
    if not missing:
        return
    known = {_suffix(one) for one in ids}
    odd = Counter(_suffix(one) for one in missing)
    advice = "give the root that the list was made for" if base else "are these the shards that the list was made for?"
    if known and not known & odd.keys() and os.path.isfile(os.path.join(base, min(missing))):
        advice = (
            f"they are there, but it leaves out {describe_counts(odd)}: ImageFolder takes them with "
            "is_valid_file=lambda path: True"
        )
    elif base and split_id(min(missing))[0]:
        advice = "the list names images in shards; filter what reads those, or embed the folder"
    elif len(missing) < listed:
        advice = f"{advice}, {_PART}" if base else f"{advice} Give them, {_PART}"
    some = many(len(missing), f"of {listed:,} listed images is", f"of {listed:,} listed images are")
    raise ProtopruneError(f"{some} not in the data set {where} (first: {min(missing)}); {hint}{advice}")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


class _KeptSamples:
    """The samples whose images are in the list, pass after pass; each whole pass checks that all of them were seen."""

    def __init__(self, dataset: Iterable[Sample], kept: Iterable[str], whole: bool = False, part: bool = False) -> None:
        self.dataset = dataset
        self.whole = whole  # whether every process goes through all samples
        self.part = part  # whether listed images may be missing
        self.listed: dict[str, dict[str, str]] = {}  # key -> what follows it in the file's name -> the listed path
        for path in kept:
            for spelt in {path, path.replace("\\", "/")} if "/" not in path else {path}:
                name = os.path.normpath(spelt).lstrip("/")
                key = key_of(name)
                extension = name[len(key) + 1 :].lower()
                if self.listed.setdefault(key, {}).setdefault(extension, path) != path:
                    raise ProtopruneError(f"{path} and {self.listed[key][extension]}: one key and suffix; rename one")
        self.count = len(set(kept))

    def __iter__(self) -> Iterator[Sample]:
        return self.stage(self.dataset)

    def stage(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        unseen = {path for names in self.listed.values() for path in names.values()}
        shards: dict[str, str | None] = {}  # key -> the shard that it was found in
        number, any_kept, first = 0, False, ""
        for number, sample in enumerate(samples, 1):
            if number == _LONG and not any_kept:  # a stream that begins again and again has no end that could tell
                warn(f"none of the first {number:,} samples is in the list; {_OTHER_LIST}")
            key = _key_of(sample)
            first = first or f"{key} in {_shown(sample.get('__url__'))}"
            if found := self._found(sample, key, shards):
                unseen -= found
                any_kept = True
                yield sample
        if not self.part and (self.whole or not _sees_a_part()):
            _all_present(unseen, self.count, f"(by key; its first sample is {first or 'none'})")
        elif number and not any_kept:
            warn(f"none of the {number:,} samples that this process saw is in the list; {_OTHER_LIST}")

    def _found(self, sample: Sample, key: str, shards: dict[str, str | None]) -> set[str]:
        """The listed paths that a sample is; `shards` gets to know where those that are listed by shard are."""
        one = next((one for one in _keys(sample, key) if one in self.listed), None)
        if one is None:
            return set()
        if one != key and shards.setdefault(one, sample["__url__"]) != sample["__url__"]:
            both = f"{_shown(shards[one])} and in {_shown(sample['__url__'])}"
            raise ProtopruneError(
                f"{one} is in {both}: two shards of one name; list them by their paths below a common root"
            )
        return _named_in(sample, self.listed[one])


def _key_of(sample: Any) -> str:
    """WebDataset's key of a sample. Raises UsageError where it has none."""
    if not isinstance(sample, dict) or "__key__" not in sample:
        has = ", ".join(map(str, sample)) if isinstance(sample, dict) else f"a {type(sample).__name__}"
        raise UsageError(
            f"the samples have no __key__, only {has}; call keep_only before to_tuple, or give paths=, the path of "
            "each item, where they are no tar's (MDS and litdata are written from the kept files)"
        )
    if not isinstance(sample["__key__"], str):
        raise UsageError("the samples are batches; call keep_only before batched")
    return posixpath.normpath(f"/{sample['__key__']}").lstrip("/")


def _keys(sample: Sample, key: str) -> Iterator[str]:
    """What the sample may be called in a list, the longest first: its shard's path and key where the list was made from
    shards (`0000.tar/cat/1`, below whichever root), else its key."""
    yield from (f"{shard}/{key}" for shard in _shard_names(str(sample.get("__url__") or "")))
    yield key


def _shown(url: object) -> str:
    """A shard's URL for a message, without what is secret in it: of a command only its first word, and the shard."""
    if not isinstance(url, str) or not url:
        return "no shard"
    if not url.startswith("pipe:"):
        return stores.public(url)
    words = [stores.public(word.strip("'\"")) for word in url.split()]
    return " … ".join([words[0], *(word for word in words[1:] if word.lower().endswith(SUFFIXES))])


@lru_cache(maxsize=64)
def _shard_names(url: str) -> tuple[str, ...]:
    """What a shard may be called in a list: its path below whichever root, the longest first. Of a command
    (`pipe:curl -s -L 'https://…/0000.tar?…'`) any of its words may be the shard."""
    words = [url.removeprefix("file:").removesuffix(" -")]
    if url.startswith("pipe:"):
        try:
            words = shlex.split(url.removeprefix("pipe:"))
        except ValueError:  # a quotation mark that is not closed
            words = url.removeprefix("pipe:").split()
    names: list[str] = []
    for word in words:
        paths = [os.path.abspath(word), word]
        if "://" in word:
            bare = re.split("[?#]", word)[0] if word.startswith(("http://", "https://")) else word
            paths = [bare, unquote(bare), word]
        for path in dict.fromkeys(paths):
            parts = [part for part in path.split("/") if part not in ("", ".")]
            names += ["/".join(parts[start:]) for start in range(len(parts))]
    return tuple(dict.fromkeys(names))


def _named_in(sample: Sample, names: dict[str, str]) -> set[str]:
    """The listed paths that the sample is; none when it is another one of the same key.

    `names`: what follows the key in the listed files' names -> their paths. An image may have been stored with another
    suffix than the listed file has, or under another field, as long as it is clear which it is; beside `a.jpg`, fields
    with a word (`a.mask.png`) belong to it. Raises ProtopruneError for a sample of which only a part is listed.
    """
    held = {field for field in _image_fields(sample) if sample[field] is not None}
    exact, others = held & names.keys(), held - names.keys()
    if not any(map(_middle, names)):
        others = {field for field in others if not _WORD.fullmatch(_middle(field))}
    if exact and not others:
        return {names[one] for one in exact}
    if not exact:
        alike = _stored_otherwise(held, others, names)
        if held and not alike:
            return set()
        if len(alike) == len(names) == 1 and len(others) <= 1:
            return {names[alike[0]]}
    raise ProtopruneError(
        f"the key {sample['__key__']} is that of {', '.join(sorted(held)) or 'no image'} in the data set and of "
        f"{', '.join(sorted(names.values()))} in the list: keys end at a name's first dot; pack the images under names "
        "without other dots"
    )


def _image_fields(fields: Iterable[str]) -> list[str]:
    """Those fields of samples that hold images, by their names: what follows the key in those of files."""
    return [one for one in fields if not one.startswith("__") and _suffix(f"x.{one}") in image_suffixes()]


def _stored_otherwise(held: set[str], others: set[str], names: dict[str, str]) -> list[str]:
    """Which of the names may be images that were stored with another suffix, or under a field that says no suffix."""
    if not held:
        return [one for one in names if _WORD.fullmatch(_middle(one) or "a")]
    middles = set(map(_middle, others))
    return [one for one in names if _middle(one) in middles]


def _middle(extension: str) -> str:
    """'0' of '0.jpg', '' of 'jpg'."""
    return extension.rpartition(".")[0]


def _sees_a_part() -> bool:
    """Whether this process sees one share of the shards only: of several loader workers, or of several processes
    (torchrun's, which webdataset splits the shards among)."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        return True
    if "torch" not in sys.modules:
        return False
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return worker is not None and worker.num_workers > 1
