"""The training record as a file: what was written is what is read, and what is not one is said to be none."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune import records
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import hdf5
from protoprune.records import PartialRecord, Record, partial_path


def created(out, *, models=2, epochs=3, n=4, test=0, gradients=False, paths=None, provenance=None) -> str:
    out = str(out)
    records.create(
        out, provenance or {"recipe": "{}", "seed": 0}, paths=paths or [f"a/{i}.png" for i in range(n)],
        labels=np.arange(n) % 2, classes=["a", "b"], subset=np.tri(models, n, dtype=bool),
        epoch_numbers=range(1, epochs + 1), gradients=gradients, test_paths=[f"t/{i}.png" for i in range(test)],
        test_labels=np.arange(test) % 2 if test else None,
    )  # fmt: skip
    return out


def values(models, n, seed=0, names=records.STORED[:-1]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    floats = {name: rng.normal(size=(models, n)).astype(np.float16).astype(np.float32) for name in names}
    return {"prediction": rng.integers(0, 65_536, (models, n)), **floats}


def finished(out, **options) -> str:
    """A whole record of 2 models x 3 epochs x n examples of any values."""
    out, n = created(out, **options), options.get("n", 4)
    partial = PartialRecord(out)
    for epoch in range(3):
        partial.write(slice(0, 2), epoch, values(2, n, epoch))
    partial.commit(slice(0, 2), 3)
    partial.finish()
    return out


@given(
    models=st.integers(1, 3), epochs=st.integers(1, 3), n=st.integers(1, 9), test=st.integers(0, 3),
    gradients=st.booleans(), one_by_one=st.booleans(),
)  # fmt: skip
@settings(max_examples=25)  # each writes a file, part by part
def test_what_is_written_is_what_is_read(tmp_path_factory, models, epochs, n, test, gradients, one_by_one):
    out = created(
        tmp_path_factory.mktemp("r") / "r.h5", models=models, epochs=epochs, n=n, test=test, gradients=gradients
    )
    names = records.STORED if gradients else records.STORED[:-1]
    written = [values(models, n, epoch, names) for epoch in range(epochs)]
    seen = [np.random.default_rng(9).integers(0, 2, (models, test)) + epoch for epoch in range(epochs)]
    partial = PartialRecord(out)
    groups = [slice(m, m + 1) for m in range(models)] if one_by_one else [slice(0, models)]
    for group in groups:
        for epoch in range(epochs):
            extra = {"test_prediction": seen[epoch][group], "test_true_probability": seen[epoch][group] / 8}
            partial.write(group, epoch, {k: v[group] for k, v in written[epoch].items()} | (extra if test else {}))
            partial.commit(group, epoch + 1)
    assert partial.committed.tolist() == [epochs] * models
    partial.finish()
    with Record(out) as record:
        assert (record.models, record.epochs, record.n) == (models, epochs, n)
        assert record.epoch_numbers.tolist() == list(range(1, epochs + 1))
        assert record.statistics == ("prediction", *names)
        assert record.paths == [f"a/{i}.png" for i in range(n)]
        assert record.classes == ["a", "b"]
        assert (record.subset == np.tri(models, n, dtype=bool)).all()
        assert record.provenance["seed"] == 0
        for name in record.statistics:
            whole = np.stack([one[name] for one in written], axis=1)  # (models, epochs, n)
            for m in range(models):
                np.testing.assert_array_equal(record.read(name, m), whole[m])
                np.testing.assert_array_equal(record.read(name, m, slice(1, 3)), whole[m][:, 1:3])
            for epoch in range(epochs):
                np.testing.assert_array_equal(record.at(name, epoch), whole[:, epoch])
            np.testing.assert_array_equal(record.last(name), whole[:, -1])
            assert record.last(name).dtype == (np.int64 if name == "prediction" else np.float32)
        if test:
            np.testing.assert_array_equal(record.test_prediction, seen[-1])
            np.testing.assert_array_equal(record.test_at("test_true_probability", -1), seen[-1] / 8)
            assert record.test_paths == [f"t/{i}.png" for i in range(test)]
            assert record.test_labels.tolist() == [i % 2 for i in range(test)]
        else:
            assert (record.test_paths, record.test_labels) == ([], None)


def test_plain_h5py_reads_it(tmp_path):
    out = finished(tmp_path / "r.h5")
    with h5py.File(out) as file:
        assert file["prediction"].shape == file["margin"].shape == (2, 3, 4)
        assert file["margin"].dtype == np.float16
        assert file["prediction"].dtype == np.uint16
        assert all(file[name].chunks is None for name in file)
        assert bytes(file["path"][:]).split(b"\0")[:-1] == [b"a/%d.png" % i for i in range(4)]


def test_names_that_are_not_utf8_survive(tmp_path):
    out = finished(tmp_path / "r.h5", n=2, paths=["a/\udcff.png", "b/\u00e9.png"], provenance={"root": "/im\udcff"})
    with Record(out) as record:
        assert record.paths == ["a/\udcff.png", "b/\u00e9.png"]
        assert record.provenance["root"] == "/im\udcff"


def test_an_unfinished_record_is_not_opened(tmp_path):
    out = created(tmp_path / "r.h5")
    partial = PartialRecord(out)
    partial.write(slice(0, 1), 0, values(1, 4))
    partial.commit(slice(0, 1), 1)
    partial.close()
    with pytest.raises(ProtopruneError, match=r"r.h5: not finished, 1 of 6 epochs are recorded; run the same"):
        Record(out)


def test_what_is_no_record_is_said_to_be_none(tmp_path):
    with pytest.raises(ProtopruneError, match=r"no such training record; make one with `protoprune record IMAGES -o"):
        Record(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(ProtopruneError, match=r"not a readable HDF5 file; give a file that `protoprune record` wrote"):
        Record(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ProtopruneError, match="an HDF5 file, but not a training record"):
        Record(tmp_path / "other.h5")
    out = created(tmp_path / "new.h5")
    with h5py.File(partial_path(out), "r+") as file:
        file.attrs["format_version"] = 99
    hdf5.seal(partial_path(out), records.KIND, {"committed"})
    with pytest.raises(ProtopruneError, match="training record version 99, this program reads 1; upgrade"):
        Record(partial_path(out))


def test_a_feature_file_is_no_record(feature_file, tmp_path):
    with pytest.raises(ProtopruneError, match="not a training record"):
        Record(feature_file(tmp_path / "f.h5", np.ones((2, 2))))


def test_what_was_not_recorded_says_how_to_record_it(tmp_path):
    out = finished(tmp_path / "r.h5")
    with Record(out) as record:
        with pytest.raises(ProtopruneError, match="holds no gradient norm; record it with --gradients"):
            record.last("gradient_norm")
        with pytest.raises(ProtopruneError, match=r"holds no predictions on a test set; record with --test"):
            _ = record.test_prediction
        with pytest.raises(ProtopruneError, match=r"holds no colour$"):
            record.read("colour", 0)


@pytest.mark.parametrize(("shape", "gradients"), [((1, 1, 1, 0), False), ((2, 3, 1000, 50), True)])
def test_size_is_an_upper_bound_that_is_close(tmp_path, shape, gradients):
    models, epochs, n, test = shape
    out = created(tmp_path / "r.h5", models=models, epochs=epochs, n=n, test=test, gradients=gradients)
    with open(partial_path(out), "rb") as file:
        real = file.seek(0, 2)
    announced = records.size(models, epochs, n, test, gradients=gradients) + 10 * (n + test)
    assert announced - records._OVERHEAD <= real <= announced


def test_models_and_epochs_that_there_are_not_are_refused(tmp_path):
    with Record(finished(tmp_path / "r.h5", models=2, epochs=3)) as record:
        assert np.array_equal(record.at("loss", -1), record.last("loss"))
        assert np.array_equal(record.read("loss", np.int64(-1)), record.read("loss", 1))
        for call in (
            lambda: record.at("loss", 3), lambda: record.at("loss", -4), lambda: record.at("loss", 1.0),
            lambda: record.read("loss", 2), lambda: record.read("loss", None),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=r"(model|epoch) .*: expected 0 to [12], by which"):
                call()
        for name in (None, "path", "label", "subset", 3):
            with pytest.raises(ProtopruneError, match="holds no "):
                record.at(name, 0)
