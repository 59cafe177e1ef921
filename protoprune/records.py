"""The training record: one HDF5 file that says how models in training saw every example, readable with plain h5py.

Layout (format version 1; m models, e recorded epochs, n training examples, t test examples):

    path, classes      uint8   names, each followed by a NUL byte     label   int32 (n,)
    epoch              int32   (e,) after how many epochs of training each recorded row was taken
    subset             uint8   (m, n) 1 where the model was trained on the example
    prediction         uint16  (m, e, n)
    true_probability, margin, error_norm, loss, entropy, change and, where asked for, gradient_norm  float16 (m, e, n)
    test_path, test_label, test_prediction uint16 (m, e, t), test_true_probability float16 (m, e, t)
    probability        float16 (m, n, c) of all c classes at the last recorded epoch, where asked for
    committed          int32   (m,) recorded epochs of each model that are finished
    digest             uint64  (s, m, e) xxh3-64 of each model's values at each recorded epoch, of the s datasets that
                       have such values, in the order of their names
    probability_digest uint64  (m,) xxh3-64 of each finished model's class probabilities, where there are any

What the statistics are is said in `training.per_example`; everything else about the run is in the attributes, and
digests of all else in the seal (see `seals`). While a run is under way the file is called `<name>.partial`; it gets its
name by a rename. What this module does not know: how models are trained, what metrics make of this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from protoprune import files
from protoprune.arguments import checked
from protoprune.bounds import is_whole, shown
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import hdf5
from protoprune.features.hdf5 import Column, partial_path

STORED = ("true_probability", "margin", "error_norm", "loss", "entropy", "change", "gradient_norm")
MOST_CLASSES = 1 << 16  # predictions are uint16
_PROBABILITY_ROWS = 65_536  # that are read at once
_OVERHEAD = 65_536  # bytes of HDF5's own
_EACH = ("m", "e", "n")
KIND = hdf5.Kind(
    "protoprune-record", 1, "training record", "protoprune record IMAGES",
    {
        "path": Column(("uint8",), ("*",)),
        "classes": Column(("uint8",), ("*",)),
        "label": Column(("int32",), ("n",)),
        "epoch": Column(("int32",), ("e",)),
        "subset": Column(("uint8",), ("m", "n")),
        "committed": Column(("int32",), ("m",)),
        "prediction": Column(("uint16",), _EACH),
        **{name: Column(("float16",), _EACH, optional=True) for name in STORED},
        "test_path": Column(("uint8",), ("*",), optional=True),
        "test_label": Column(("int32",), ("t",), optional=True),
        "test_prediction": Column(("uint16",), ("m", "e", "t"), optional=True),
        "test_true_probability": Column(("float16",), ("m", "e", "t"), optional=True),
        "probability": Column(("float16",), ("m", "n", "c"), optional=True),
        "digest": Column(("uint64",), ("s", "m", "e")),
        "probability_digest": Column(("uint64",), ("m",), optional=True),
    },
    ("uuid", "created", "protoprune"),
)  # fmt: skip


class Record:
    """A training record, opened for reading; a context manager. An unfinished one is refused unless it is asked for.

    Attributes: path, n, models, epochs (recorded ones), epoch_numbers (e,), statistics (names), provenance (dict).
    Arrays are read, and checked, when they are used. Raises ProtopruneError when the file is missing, not finished,
    damaged or something else.
    """

    @checked
    def __init__(self, path: str | os.PathLike[str], *, unfinished: bool = False) -> None:
        self.path = os.fspath(path)
        self._reader = hdf5.Reader(self.path if unfinished else hdf5.there(self.path), KIND)
        try:
            self.models, self.epochs, self.n = (self._reader.dims[name] for name in _EACH)
            if not unfinished:
                self._require_finished()
            self.epoch_numbers = self._reader.whole("epoch")
            self._check_counts()
        except BaseException:
            self._reader.close()
            raise
        self.statistics = ("prediction", *(name for name in (*STORED, "probability") if name in self._reader))
        self.provenance = self._reader.attributes
        self._digests = _Digests(self._reader)
        self._probability_checked = False

    def _check_counts(self) -> None:
        """Whether what the record says of itself agrees."""
        if not (self.epoch_numbers >= 0).all() or (np.diff(self.epoch_numbers) <= 0).any():
            raise self._reader.damaged("its epochs are not in order")
        if (classes := self._reader.dims.get("c")) not in (None, len(self.classes)):
            raise self._reader.damaged(f"its probability is of {classes:,} classes, and it has {len(self.classes):,}")
        if self._reader.dims["s"] != len(names_with_digests(self._reader.file)):
            raise self._reader.damaged("its digest is of other statistics than it has")

    def _require_finished(self) -> None:
        done, total = int(self.committed.sum()), self.models * self.epochs
        if done < total or self._reader.path != self.path:
            raise ProtopruneError(
                f"{self.path}: not finished, {done} of {total} epochs are recorded; "
                "run the same `protoprune record` again, it does the rest"
            )

    def __repr__(self) -> str:
        return f"Record({self.path!r}, models={self.models}, epochs={self.epochs}, n={self.n})"

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def paths(self) -> list[str]:
        """The n ids, in row order."""
        return list(self._reader.paths("path", self.n))

    @property
    def classes(self) -> list[str]:
        return self._reader.names("classes")

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64"""
        return self._reader.within("label", 0, len(self.classes)).astype(np.int64)

    @property
    def subset(self) -> np.ndarray:
        """(models, n) bool: which examples each model was trained on."""
        return self._reader.within("subset", 0, 2).view(bool)

    @property
    def committed(self) -> np.ndarray:
        """(models,) finished epochs; all of them unless this is a partial file."""
        return self._reader.within("committed", 0, self.epochs + 1)

    def read(self, name: str, model: int, rows: slice = slice(None), epochs: slice = slice(None)) -> np.ndarray:
        """(epochs, rows) of one statistic of one model: float32, int64 for prediction."""
        return self._read(self._own(name), self._index("model", model, self.models), epochs, rows)

    def last(self, name: str) -> np.ndarray:
        """(models, n): a statistic at each model's last recorded epoch."""
        return self.at(name, self.epochs - 1)

    def at(self, name: str, epoch: int) -> np.ndarray:
        """(models, n): a statistic at recorded epoch number `epoch` (an index, not a number of epochs)."""
        return self._read(self._own(name), slice(None), self._index("epoch", epoch, self.epochs), slice(None))

    def probabilities(self, model: int, rows: slice = slice(None)) -> np.ndarray:
        """(rows, classes) float32: the softmax of one model at its last recorded epoch."""
        self._own("probability")
        model = self._index("model", model, self.models)
        if not self._probability_checked:
            if self._reader.damaged_datasets(["probability"]):
                raise self._reader.damaged("its probability is not what was written")
            self._probability_checked = True
        with self._reader.trouble("its probability"):
            return self._reader.data["probability"][model, rows].astype(np.float32)

    def _index(self, what: str, number: int, count: int) -> int:
        """The number of a model or a recorded epoch; negative ones count from the end, as Python's do."""
        if not is_whole(number, -count, count - 1):
            raise UsageError(f"{what} {shown(number)}: expected 0 to {count - 1}, by which {self.path} counts them")
        return range(count)[number]

    def _own(self, name: str) -> str:
        if not isinstance(name, str) or name not in (*self.statistics, "probability") or name not in self._reader:
            name = name if isinstance(name, str) else shown(name)
            option = {"gradient_norm": "--gradients", "probability": "--probabilities"}.get(name)
            hint = f"; record it with {option}" if option else ""
            raise ProtopruneError(f"{self.path}: holds no {name.replace('_', ' ')}{hint}")
        return name

    def _read(self, name: str, models: int | slice, epochs: int | slice, rows: slice) -> np.ndarray:
        self._digests.check(name, models, epochs)
        with self._reader.trouble(f"its {name}"):
            values = self._reader.data[name][models, epochs, rows]
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)

    @property
    def test_paths(self) -> list[str]:
        """Ids of the test examples; empty without a test set."""
        return (
            list(self._reader.paths("test_path", self._reader.dims.get("t", 0))) if "test_path" in self._reader else []
        )

    @property
    def test_labels(self) -> np.ndarray | None:
        """(t,) int64, None without a test set."""
        if "test_label" not in self._reader:
            return None
        return self._reader.within("test_label", 0, len(self.classes)).astype(np.int64)

    @property
    def test_prediction(self) -> np.ndarray:
        """(models, t) int64 at the last recorded epoch."""
        return self.test_at("test_prediction", self.epochs - 1)

    @property
    def train_accuracy(self) -> np.ndarray:
        """(models,) share that each model gets right, at its last recorded epoch, of the examples it was trained on."""
        return self._accuracy(self.subset)

    @property
    def held_out_accuracy(self) -> np.ndarray:
        """(models,) the same of the examples that a model was not trained on; NaN where there are none."""
        return self._accuracy(~self.subset)

    @property
    def test_accuracy(self) -> np.ndarray | None:
        """(models,) the same of the test set; None without one."""
        return None if self.test_labels is None else (self.test_prediction == self.test_labels).mean(axis=1)

    def _accuracy(self, counts: np.ndarray) -> np.ndarray:
        last, labels = slice(self.epochs - 1, None), self.labels
        right = (self.read("prediction", model, epochs=last)[0] == labels for model in range(self.models))
        return np.array([one[mine].mean() if mine.any() else np.nan for one, mine in zip(right, counts, strict=True)])

    def test_at(self, name: str, epoch: int) -> np.ndarray:
        """(models, t): test_prediction or test_true_probability at recorded epoch number `epoch` (an index)."""
        if name not in self._reader:
            raise ProtopruneError(f"{self.path}: holds no predictions on a test set; record with --test")
        return self._read(name, slice(None), self._index("epoch", epoch, self.epochs), slice(None))

    def damaged(self, what: str) -> ProtopruneError:
        """The error that says what is damaged, and the way on."""
        return self._reader.damaged(what)

    def damage(self) -> list[str]:
        """What of the file is not what was written, a line each; all of it is read."""
        lines = [f"its {name}" for name in self._reader.damaged_datasets()]
        for what in ("paths", "labels", "subset", "committed", "test_paths", "test_labels"):
            try:
                getattr(self, what)
            except ProtopruneError as error:
                lines = lines or [str(error)]
        if lines:
            return lines
        for name, model, epoch in self._digests.differing(self.committed):
            lines.append(f"its {name} of model {model} at epoch {self.epoch_numbers[epoch]}")
        bad = _differing_probabilities(self._reader, self.committed)
        return lines + [f"its probability of model {model}" for model in bad]


class _Digests:
    """The digests of what models were like at recorded epochs, compared when one is first read."""

    def __init__(self, reader: hdf5.Reader) -> None:
        self._reader = reader
        self._good: set[tuple[str, int, int]] = set()
        self.names = names_with_digests(reader.file)
        self._table: np.ndarray | None = None

    def check(self, name: str, models: int | slice, epochs: int | slice) -> None:
        """ProtopruneError where the values of these models at these recorded epochs are not what was written."""
        _, every, numbers = self._reader.data["digest"].shape
        for model in np.atleast_1d(np.arange(every)[models]).tolist():
            for epoch in np.atleast_1d(np.arange(numbers)[epochs]).tolist():
                if (name, model, epoch) not in self._good and self.differs(name, model, epoch):
                    number = int(self._reader.whole("epoch")[epoch])
                    raise self._reader.damaged(f"its {name} of model {model} at epoch {number} is not what was written")
                self._good.add((name, model, epoch))

    def differs(self, name: str, model: int, epoch: int) -> bool:
        if self._table is None:
            self._table = self._reader.whole("digest")
        with self._reader.trouble(f"its {name}"):
            values = self._reader.data[name][model, epoch]
        return digest(values) != int(self._table[self.names.index(name), model, epoch])

    def differing(self, committed: np.ndarray) -> list[tuple[str, int, int]]:
        """(name, model, epoch) of all that is finished and not what was written."""
        done = [(model, epoch) for model, count in enumerate(committed.tolist()) for epoch in range(count)]
        return [(name, *one) for name in self.names for one in done if self.differs(name, *one)]


def names_with_digests(file: h5py.File) -> list[str]:
    """The datasets that hold values of each model at each recorded epoch, in the order of `digest`."""
    there = file["prediction"].shape[:2]
    others = ("digest", "probability")
    return [
        name for name in sorted(file) if name not in others and file[name].ndim > 2 and file[name].shape[:2] == there
    ]


def digest(values: np.ndarray) -> int:
    return xxh3_64_intdigest(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _differing_probabilities(reader: hdf5.Reader, committed: np.ndarray) -> list[int]:
    """The finished models whose class probabilities are not what was written."""
    if "probability" not in reader:
        return []
    was, done = reader.whole("probability_digest"), np.flatnonzero(committed == reader.dims["e"]).tolist()
    with reader.trouble("its probability"):
        return [model for model in done if _probability_digest(reader.file, model) != int(was[model])]


def _probability_digest(file: h5py.File, model: int) -> int:
    state, table = xxh3_64(), file["probability"]
    for start in range(0, table.shape[1], _PROBABILITY_ROWS):
        state.update(
            np.ascontiguousarray(table[model, start : start + _PROBABILITY_ROWS]).reshape(-1).view(np.uint8).data
        )
    return state.intdigest()


class PartialRecord:
    """The record of a run under way."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._reader = hdf5.Reader(partial_path(out), KIND, "r+")
        self._reader.check_sealed()
        self._file, self.provenance = self._reader.file, self._reader.attributes
        self._digests = _Digests(self._reader)
        damaged = {model for _, model, _ in self._digests.differing(self.committed)}
        self.damaged = sorted(damaged | set(_differing_probabilities(self._reader, self.committed)))
        for model in self.damaged:
            self.commit(slice(model, model + 1), 0)  # nothing is built upon damage

    @property
    def committed(self) -> np.ndarray:
        """(models,) how many recorded epochs are finished."""
        return self._reader.within("committed", 0, self._reader.dims["e"] + 1)

    def write(self, models: slice, epoch: int, values: dict[str, np.ndarray]) -> None:
        """Write (models, n) or (models, t) arrays by dataset name for one recorded epoch. They survive a kill."""
        with files.told(partial_path(self.out)):
            for name, value in values.items():
                with np.errstate(over="ignore"):
                    stored = np.asarray(value).astype(self._file[name].dtype)
                self._file[name][models, epoch, :] = stored
                digests = [digest(one) for one in stored]
                self._file["digest"][self._digests.names.index(name), models, epoch] = digests
            self._file.flush()

    def write_probabilities(self, models: slice, rows: slice, values: np.ndarray) -> None:
        """Write (models, rows, classes) class probabilities at the last recorded epoch."""
        with files.told(partial_path(self.out)):
            self._file["probability"][models, rows] = values

    def sync(self) -> None:
        """Wait until what was written is on the disk: it survives a power cut."""
        with files.told(partial_path(self.out)):
            files.sync(partial_path(self.out))

    def commit(self, models: slice, epochs: int) -> None:
        """Note that the first `epochs` recorded epochs of these models are finished."""
        if epochs == self._reader.dims["e"] and "probability" in self._reader:
            for model in range(*models.indices(self._reader.dims["m"])):
                self._file["probability_digest"][model] = _probability_digest(self._file, model)
            self._file.flush()
        self._file["committed"][models] = epochs
        self._file.flush()

    def finish(self) -> None:
        """Give the finished record its name."""
        names = self._digests.names
        self.close()
        hdf5.finish(self.out, names)

    def close(self) -> None:
        self._reader.close()


def check_classes(count: int) -> None:
    """Raise UsageError for more classes than a prediction has numbers for."""
    if count > MOST_CLASSES:
        raise UsageError(f"{count:,} classes: a record holds at most {MOST_CLASSES:,}")


def size(models: int, epochs: int, n: int, test: int = 0, *, gradients: bool = False, classes: int = 0) -> int:
    """Bytes of a record, names not counted; `classes` is their number where class probabilities are recorded."""
    a_row = 2 + 2 * (len(STORED) - (not gradients))
    digests = 8 * (1 + len(STORED) - (not gradients) + 2 * bool(test))
    of_each = epochs * (n * a_row + test * 4 + digests) + n + (2 * n * classes + 8 if classes else 0)
    return models * of_each + n * 4 + test * 4 + _OVERHEAD


def create(
    out: str,
    provenance: dict[str, Any],
    *,
    paths: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    subset: np.ndarray,
    epoch_numbers: Sequence[int],
    gradients: bool = False,
    probabilities: bool = False,
    test_paths: Sequence[str] = (),
    test_labels: np.ndarray | None = None,
) -> None:
    """Create `<out>.partial` with its space reserved, so a disk that is too small is found out before the training."""
    n, test = len(paths), len(test_paths)
    (models, _), epochs = subset.shape, len(epoch_numbers)
    letters = sum(len(one) + 1 for one in (*paths, *test_paths, *classes))
    with files.creating(partial_path(out)) as path:
        known = size(models, epochs, n, test, gradients=gradients, classes=probabilities * len(classes))
        files.reserve(path, "wb", known + letters)
        with hdf5.create(path, KIND) as file:
            for name, value in provenance.items():
                file.attrs[name] = hdf5.text(value) if isinstance(value, str) else value
            hdf5.dataset(file, "path", hdf5.block(paths))
            hdf5.dataset(file, "classes", hdf5.block(classes))
            hdf5.dataset(file, "label", labels.astype(np.int32))
            hdf5.dataset(file, "epoch", np.asarray(epoch_numbers, np.int32))
            hdf5.dataset(file, "subset", subset.astype(np.uint8))
            hdf5.dataset(file, "committed", np.zeros(models, np.int32))
            hdf5.dataset(file, "prediction", shape=(models, epochs, n), dtype=np.dtype(np.uint16))
            for name in STORED:
                if name != "gradient_norm" or gradients:
                    hdf5.dataset(file, name, shape=(models, epochs, n), dtype=np.dtype(np.float16))
            if probabilities:
                hdf5.dataset(file, "probability", shape=(models, n, len(classes)), dtype=np.dtype(np.float16))
                hdf5.dataset(file, "probability_digest", np.zeros(models, np.uint64))
            if test_labels is not None and test:
                hdf5.dataset(file, "test_path", hdf5.block(test_paths))
                hdf5.dataset(file, "test_label", test_labels.astype(np.int32))
                hdf5.dataset(file, "test_prediction", shape=(models, epochs, test), dtype=np.dtype(np.uint16))
                hdf5.dataset(file, "test_true_probability", shape=(models, epochs, test), dtype=np.dtype(np.float16))
            names = names_with_digests(file)
            hdf5.dataset(file, "digest", np.zeros((len(names), models, epochs), np.uint64))
        hdf5.seal(path, KIND, {*names, "digest", "committed", "probability", "probability_digest"})
        files.reserve(path, "r+b", os.path.getsize(path))
