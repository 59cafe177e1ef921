"""The feature file: its layout with plain h5py, names of any kind, and errors for what is no feature file."""

import os

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY
from xxhash import xxh3_64_intdigest

from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import featurefile as feature_file
from protoprune.features.featurefile import FeatureFile, PartialFile, create_partial, key_differences
from protoprune.features.opening import open_features
from protoprune.images.decode import Status
from protoprune.images.listing import ImageList, folder_labels
from protoprune.records import Record

PROVENANCE = {"encoder": "e", "weights_sha256": "0", "preprocess": "{}", "precision": "fp32", "store": "float16"}


def images_of(paths, root="/data"):
    paths = sorted(paths)
    labels, classes = folder_labels(paths)
    n = len(paths)
    return ImageList(root, paths, np.arange(n, dtype=np.int64), np.arange(n, dtype=np.int64) + 5, labels, classes)


def written(out, paths, features, status=None, reasons=None):
    images = images_of(paths)
    create_partial(str(out), images, features.shape[1], PROVENANCE)
    partial = PartialFile(str(out))
    status = np.full(len(paths), Status.OK, np.uint8) if status is None else status
    partial.commit(partial.todo, features.astype(partial.dtype), status, reasons or [""] * len(paths))
    partial.finish()
    return images


def test_layout_is_what_the_docstring_says_and_plain_h5py_reads_it(tmp_path):
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    written(tmp_path / "f.h5", ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/é.jpg"], features)
    with h5py.File(tmp_path / "f.h5") as file:
        assert set(file) == {
            "path", "size", "mtime_ns", "label", "classes", "features", "status", "reason", "reasons", "borrowed",
            "committed", "digest", "ctime_ns", "content",
        }  # fmt: skip
        assert bytes(file["path"][:]).decode().split("\0")[:-1] == ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/é.jpg"]
        assert (file["features"].dtype, file["features"].chunks) == (np.float16, None)
        np.testing.assert_array_equal(file["features"][:], features)
        np.testing.assert_array_equal(file["label"][:], [0, 0, 1, 1])
        assert file.attrs["encoder"] == "e"
        assert file.attrs["root"] == "/data"
    numbers = ", ".join(f"{int(status)} {status.label}" for status in Status if status)
    assert f"| {numbers} (see" in (REPOSITORY / "docs/files.md").read_text()  # what stands in files stays what it is


def test_names_that_are_not_utf8_or_hold_line_breaks_survive(tmp_path):
    names = [b"\xff\xfe.jpg".decode(errors="surrogateescape"), "line\nbreak.jpg", "plain.jpg", "\U0001f600.jpg"]
    images = written(tmp_path / "f.h5", names, np.zeros((4, 2)))
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == images.paths == sorted(names)
        assert b"\xff\xfe.jpg" in map(os.fsencode, file.paths)


def test_a_root_that_is_not_utf8_survives(tmp_path):
    images = images_of(["x.jpg"], root=b"/d\xff".decode(errors="surrogateescape"))
    create_partial(str(tmp_path / "f.h5"), images, 2, PROVENANCE)
    with FeatureFile(feature_file.partial_path(str(tmp_path / "f.h5"))) as file:
        assert file.provenance["root"] == images.root


def test_reasons_are_stored_once_each_and_the_table_may_fill_up(tmp_path):
    n = 1500
    paths = [f"{i:05d}.jpg" for i in range(n)]
    reasons = [f"reason {i % 1200:04d}" for i in range(n)]
    written(tmp_path / "f.h5", paths, np.zeros((n, 1)), np.full(n, Status.CORRUPT, np.uint8), reasons)
    with FeatureFile(tmp_path / "f.h5") as file:
        failures = file.failures()
    assert len(failures) == n
    assert all(status == Status.CORRUPT for _, status, _ in failures)
    assert [reason for _, _, reason in failures[:1023]] == reasons[:1023]
    assert failures[1100][2] == ""  # beyond the table; the status still tells
    assert failures[1200][2] == "reason 0000"


def test_reasons_of_two_earlier_files_stay_their_own(tmp_path):
    names, reasons = ["a.jpg", "b.jpg"], ["cut off", "a bad checksum"]
    images = images_of(names)
    for name, reason in zip(names, reasons, strict=True):
        written(tmp_path / name, [name], np.zeros((1, 2)), np.array([Status.CORRUPT], np.uint8), [reason])
    with FeatureFile(tmp_path / "a.jpg") as one, FeatureFile(tmp_path / "b.jpg") as other:
        known = [np.array([0, -1]), np.array([-1, 0])]
        create_partial(str(tmp_path / "f.h5"), images, 2, PROVENANCE, [one, other], known)
    PartialFile(str(tmp_path / "f.h5")).finish()
    with FeatureFile(tmp_path / "f.h5") as file:
        assert [reason for _, _, reason in file.failures()] == reasons


@pytest.mark.parametrize("status", [[1, 1], [1, 8]])
def test_digests_of_rows_are_those_documented(tmp_path, status):
    features, reasons = np.arange(4, dtype=np.float16).reshape(2, 2), ["" if one == 1 else "why" for one in status]
    written(tmp_path / "f.h5", ["a.jpg", "b.jpg"], features, np.array(status, np.uint8), reasons)
    seeds = [xxh3_64_intdigest(bytes([one]) + reason.encode()) for one, reason in zip(status, reasons, strict=True)]
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["digest"][:].tolist() == [*map(xxh3_64_intdigest, map(bytes, features), seeds)]


def test_rows_in_pieces_are_written_where_they_belong(tmp_path):
    images = images_of([f"{i}.jpg" for i in range(9)])
    earlier = images_of(["1.jpg", "4.jpg"])
    earlier.size[:], earlier.mtime_ns[:] = [1, 4], [6, 9]  # as in `images`
    create_partial(str(tmp_path / "old.h5"), earlier, 2, PROVENANCE)
    old = PartialFile(str(tmp_path / "old.h5"))
    old.commit(old.todo, np.array([[1, 1], [4, 4]], np.float16), np.array([1, 1], np.uint8), ["", ""])
    old.finish()
    known = np.array([-1, 0, -1, -1, 1, -1, -1, -1, -1])
    with FeatureFile(tmp_path / "old.h5") as source:
        create_partial(str(tmp_path / "f.h5"), images, 2, PROVENANCE, [source], [known])
    partial = PartialFile(str(tmp_path / "f.h5"))
    assert partial.todo.tolist() == [0, 2, 3, 5, 6, 7, 8]
    rows = np.repeat(partial.todo[:, None], 2, 1).astype(np.float16)
    partial.commit(partial.todo, rows, np.ones(7, np.uint8), [""] * 7)
    partial.finish()
    with FeatureFile(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(file.features[:, 0], np.arange(9))
        assert file.usable.all()


def test_features_are_indexed_as_an_array_is(feature_file, tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    path = feature_file(tmp_path / "f.h5", x)
    odd = np.arange(8) % 2 == 1
    rows = [3, -1, np.int32(2), slice(2, 5), slice(None, None, -2), slice(6, 99), [], [1, 1, -8], odd]
    for index in (*rows, np.array([7, 0], np.int32), (slice(1, 4), 2), ([0, 5], slice(1, 3))):
        with FeatureFile(path) as file:
            np.testing.assert_array_equal(file.features[index], x[index])
    with FeatureFile(path) as file:
        for index in (8, -9, [0, 8], np.array([-9]), odd[:5]):
            with pytest.raises(IndexError):
                file.features[index]


@pytest.mark.parametrize("content", [None, b"", b"not hdf5", "other hdf5", "other version"])
def test_what_is_no_feature_file_is_one_clear_line(content, tmp_path):
    path = tmp_path / "f.h5"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        with h5py.File(path, "w") as file:
            later = {"format": feature_file.KIND.format, "format_version": 99}
            file.attrs.update(later if "version" in content else {})
    with pytest.raises(ProtopruneError) as caught:
        FeatureFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_no_file_can_have_is_that_of_none():
    for opened in (FeatureFile, open_features, Record):
        with pytest.raises(UsageError, match="no such"):
            opened("a\0b")


def test_finishing_early_is_a_mistake_of_ours(tmp_path):
    create_partial(str(tmp_path / "f.h5"), images_of(["x.jpg"]), 2, PROVENANCE)
    with pytest.raises(AssertionError):
        PartialFile(str(tmp_path / "f.h5")).finish()
    assert not (tmp_path / "f.h5").exists()


def test_what_differs_between_features_is_said_in_short():
    """Of another encoder only that, of another preprocessing the settings that are not the same."""
    mini = {"encoder": "mini", "weights_sha256": "1" * 64, "pool": "avg", "preprocess": '{"mean": [0.5], "size": 64}'}
    mini |= {"precision": "fp32", "store": "float16"}
    assert key_differences(mini, mini) == []
    assert key_differences(mini | {"encoder": "lite0", "weights_sha256": "2" * 64}, mini) == [
        "encoder: lite0, not mini"
    ]
    other = mini | {"preprocess": '{"mean": [0.5], "resize": 80, "size": 72}', "weights_sha256": "2" * 64}
    assert key_differences(other, mini) == [
        "weights sha256: 222222222222…, not 111111111111…",
        "preprocess: resize 80, size 72, not resize None, size 64",
    ]
    assert key_differences(mini | {"preprocess": "224 pixels"}, mini)[0].startswith("preprocess: 224 pixels, not {")
    assert key_differences(mini | {"weights_sha256": "v2"}, mini) == ["weights sha256: v2, not 111111111111…"]
