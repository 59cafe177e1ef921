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

What the statistics are is said in `training.statistics`; everything else about the run is in the attributes. While a
run is under way the file is called `<name>.partial`; it gets its name by a rename. What this module does not know:
how models are trained, what metrics make of this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np

from protoprune import files, hdf5
from protoprune.errors import ProtopruneError

KIND = hdf5.Kind("protoprune-record", 1, "training record", "protoprune record IMAGES")
STORED = ("true_probability", "margin", "error_norm", "loss", "entropy", "change", "gradient_norm")
_OVERHEAD = 65_536  # bytes of HDF5's own


class Record:
    """A finished training record, opened for reading; a context manager.

    Attributes: path, n, models, epochs (recorded ones), epoch_numbers (e,), statistics (names), provenance (dict).
    Raises ProtopruneError when the file is missing, damaged or something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.exists(self.path) and os.path.exists(partial_path(self.path)):
            with Record(partial_path(self.path)) as partial:
                done, total = int(partial.committed.sum()), partial.models * partial.epochs
            raise ProtopruneError(
                f"{self.path}: not finished, {done} of {total} epochs are recorded; "
                "run the same `protoprune record` again, it does the rest"
            )
        self._file = hdf5.open_file(self.path, "r", KIND)
        self.models, self.epochs, self.n = self._file["prediction"].shape
        self.epoch_numbers = self._file["epoch"][:]
        self.statistics = ("prediction", *(name for name in (*STORED, "probability") if name in self._file))
        self.provenance = {name: hdf5.plain(value) for name, value in self._file.attrs.items()}

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @property
    def paths(self) -> list[str]:
        """The n ids, in row order."""
        return hdf5.split(self._file["path"])

    @property
    def classes(self) -> list[str]:
        return hdf5.split(self._file["classes"])

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64"""
        return self._file["label"][:].astype(np.int64)

    @property
    def subset(self) -> np.ndarray:
        """(models, n) bool: which examples each model was trained on."""
        return self._file["subset"][:].astype(bool)

    @property
    def committed(self) -> np.ndarray:
        """(models,) finished epochs; all of them unless this is a partial file."""
        return self._file["committed"][:]

    def read(self, name: str, model: int, rows: slice = slice(None), epochs: slice = slice(None)) -> np.ndarray:
        """(epochs, rows) of one statistic of one model: float32, int64 for prediction."""
        return _wide(self._read(name)[model, epochs, rows])

    def last(self, name: str) -> np.ndarray:
        """(models, n): a statistic at each model's last recorded epoch."""
        return self.at(name, self.epochs - 1)

    def at(self, name: str, epoch: int) -> np.ndarray:
        """(models, n): a statistic at recorded epoch number `epoch` (an index, not a number of epochs)."""
        return _wide(self._read(name)[:, epoch, :])

    def probabilities(self, model: int, rows: slice = slice(None)) -> np.ndarray:
        """(rows, classes) float32: the softmax of one model at its last recorded epoch."""
        return _wide(self._read("probability")[model, rows])

    def _read(self, name: str):
        if name not in self._file:
            option = {"gradient_norm": "--gradients", "probability": "--probabilities"}.get(name)
            hint = f"; record it with {option}" if option else ""
            raise ProtopruneError(f"{self.path}: holds no {name.replace('_', ' ')}{hint}")
        return self._file[name]

    @property
    def test_paths(self) -> list[str]:
        """Ids of the test examples; empty without a test set."""
        return hdf5.split(self._file["test_path"]) if "test_path" in self._file else []

    @property
    def test_labels(self) -> np.ndarray | None:
        """(t,) int64, None without a test set."""
        return self._file["test_label"][:].astype(np.int64) if "test_label" in self._file else None

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

    @property
    def test_true_probability(self) -> np.ndarray:
        """(models, t) float32 at the last recorded epoch."""
        return self.test_at("test_true_probability", self.epochs - 1)

    def test_at(self, name: str, epoch: int) -> np.ndarray:
        """(models, t): test_prediction or test_true_probability at recorded epoch number `epoch` (an index)."""
        if name not in self._file:
            raise ProtopruneError(f"{self.path}: holds no predictions on a test set; record with --test")
        return _wide(self._file[name][:, epoch, :])


class PartialRecord:
    """The record of a run under way."""

    def __init__(self, out: str):
        self.out = out
        self._file = hdf5.open_file(partial_path(out), "r+", KIND)
        self.provenance = {name: hdf5.plain(value) for name, value in self._file.attrs.items()}

    @property
    def committed(self) -> np.ndarray:
        """(models,) how many recorded epochs are finished."""
        return self._file["committed"][:]

    def write(self, models: slice, epoch: int, values: dict[str, np.ndarray]) -> None:
        """Write (models, n) or (models, t) arrays by dataset name for one recorded epoch. They survive a kill."""
        try:
            for name, value in values.items():
                self._file[name][models, epoch, :] = value
            self._file.flush()
        except OSError as error:
            raise ProtopruneError(files.disk_trouble(partial_path(self.out), error)) from None

    def write_probabilities(self, models: slice, rows: slice, values: np.ndarray) -> None:
        """Write (models, rows, classes) class probabilities at the last recorded epoch."""
        try:
            self._file["probability"][models, rows] = values
        except OSError as error:
            raise ProtopruneError(files.disk_trouble(partial_path(self.out), error)) from None

    def sync(self) -> None:
        """Wait until what was written is on the disk: it survives a power cut."""
        with files.told(partial_path(self.out)):
            files.sync(partial_path(self.out))

    def commit(self, models: slice, epochs: int) -> None:
        """Note that the first `epochs` recorded epochs of these models are finished."""
        self._file["committed"][models] = epochs
        self._file.flush()

    def finish(self) -> None:
        """Give the finished record its name."""
        self.close()
        files.publish(partial_path(self.out), self.out)

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()


def partial_path(out: str) -> str:
    return out + ".partial"


def size(models: int, epochs: int, n: int, test: int = 0, *, gradients: bool = False, classes: int = 0) -> int:
    """Bytes of a record, names not counted; `classes` is their number where class probabilities are recorded."""
    a_row = 2 + 2 * (len(STORED) - (not gradients))
    return models * (epochs * (n * a_row + test * 4) + n + 2 * n * classes) + n * 4 + test * 4 + _OVERHEAD


def create(
    out: str,
    provenance: dict,
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
    names = sum(len(one) + 1 for one in (*paths, *test_paths, *classes))
    with files.creating(partial_path(out)) as path:
        files.reserve(
            path, "wb", size(models, epochs, n, test, gradients=gradients, classes=probabilities * len(classes)) + names
        )
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
            if test:
                hdf5.dataset(file, "test_path", hdf5.block(test_paths))
                hdf5.dataset(file, "test_label", test_labels.astype(np.int32))
                hdf5.dataset(file, "test_prediction", shape=(models, epochs, test), dtype=np.dtype(np.uint16))
                hdf5.dataset(file, "test_true_probability", shape=(models, epochs, test), dtype=np.dtype(np.float16))
        files.reserve(path, "r+b", os.path.getsize(path))


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
