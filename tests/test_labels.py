"""Labels from files: tables, ImageNet's ground truth, metadata of imagefolders; what does not fit is said."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.features.featurefile import FeatureFile
from protoprune.images.labels import LabelFile, read_labels
from protoprune.images.listing import list_folder
from protoprune.training.examples import load_examples

NAMES = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(1, 5)]


def labels(tmp_path, text, paths, name="labels.csv", **options):
    """(class name of each path, '' for none; the warnings)."""
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        label, classes, source = read_labels(LabelFile(file, **options), paths, str(tmp_path))
    assert label.dtype == np.int32
    assert source.startswith(f"{name}, sha256 ")
    assert all(issubclass(one.category, ProtopruneWarning) for one in said)
    return [classes[i] if i >= 0 else "" for i in label], [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path,label\na.png,cat\nsub/b.png,dog\n"),
        ("a.csv", "label;Image Path\ncat;a.png\ndog;sub/b.png\n"),
        ("a.tsv", "a.png\tcat\nsub/b.png\tdog\n"),
        ("a.txt", "a.png cat\nsub/b.png dog\n"),
        ("a.txt", "cat,a.png\ndog,sub/b.png\n"),
        ("a.csv", b"\xef\xbb\xbffile_name,label\r\na.png,cat\r\nsub/b.png,dog\r\n"),
        ("a.csv", "file_name,label\na.png,cat\nsub/b.png,dog\n".encode("utf-16")),  # PowerShell's >
        ("a.csv", "file_name,label\na.png,cat\nsub\\b.png,dog\n"),
        ("a.csv", "id,class\na,cat\nsub/b,dog\n"),
        ("a.jsonl", '{"file_name": "a.png", "label": "cat"}\n{"file_name": "sub/b.png", "label": "dog"}\n'),
        ("a.json", '{"a.png": "cat", "sub/b.png": "dog"}'),
        ("a.csv", "path,label\n/mnt/x/a.png,cat\n/mnt/x/sub/b.png,dog\n"),
    ],
)  # fmt: skip
def test_tables_of_many_kinds(name, text, tmp_path):
    assert labels(tmp_path, text, ["a.png", "sub/b.png"], name) == (["cat", "dog"], [])


def test_parquet_metadata(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"file_name": ["b.png", "a.png"], "label": [10, 9]})
    parquet.write_table(table, tmp_path / "m.parquet")
    pytest.importorskip("pyarrow.feather").write_feather(table, str(tmp_path / "m.feather"))
    arrow = read_labels(LabelFile(tmp_path / "m.feather"), ["a.png", "b.png"], str(tmp_path))
    label, classes, _ = read_labels(LabelFile(tmp_path / "m.parquet"), ["a.png", "b.png"], str(tmp_path))
    assert (arrow[0].tolist(), arrow[1]) == (label.tolist(), classes)
    assert (label.tolist(), classes) == ([0, 1], ["9", "10"])  # numbers in the order of numbers


def test_imagenet_ground_truth_is_one_number_a_line_in_the_order_of_names(tmp_path):
    names, said = labels(tmp_path, "490\n361\n171\n822\n", NAMES, "ILSVRC2012_validation_ground_truth.txt")
    assert names == ["490", "361", "171", "822"]
    assert len(said) == 1
    assert "in the order of their names: ILSVRC2012_val_00000001.JPEG is 490" in said[0]
    with pytest.raises(UsageError, match=r"3 lines of one class each, and 4 images"):
        labels(tmp_path, "490\n361\n171\n", NAMES)


@pytest.mark.parametrize(
    ("truth", "name", "mapping"),
    [
        ("1\n2\n2\n1\n", "map_clsloc.txt", "n02119789 1 kit_fox\nn02100735 2 English_setter\n"),
        ("1\n2\n2\n1\n", "meta.csv", "1,n02119789\n2,n02100735\n"),
        ("0\n1\n1\n0\n", "class_index.json", '{"0": ["n02119789", "kit_fox"], "1": ["n02100735", "setter"]}'),
        ("0\n1\n1\n0\n", "synsets.txt", "n02119789\nn02100735\n"),
        ("1\n2\n2\n1\n", "LOC_synset_mapping.txt", "n02119789 kit fox, Vulpes macrotis\nn02100735 English setter\n"),
    ],
)
def test_class_numbers_become_names(truth, name, mapping, tmp_path):
    (tmp_path / name).write_text(mapping)
    names, _ = labels(tmp_path, truth, NAMES, names=tmp_path / name)
    assert names == ["n02119789", "n02100735", "n02100735", "n02119789"]


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("names.txt", "1 golf ball\n2 golf cart\n"),
        ("names.txt", "1: golf ball\n2: golf cart\n"),
        ("names.tsv", "golf ball\t1\ngolf cart\t2\n"),
        ("names.csv", 'id,name\n1,"golf ball"\n2,golf cart\n'),
    ],
)
def test_names_of_classes_keep_all_their_words(name, mapping, tmp_path):
    """Their first word was taken, and the two classes became one."""
    (tmp_path / name).write_text(mapping)
    assert labels(tmp_path, "1\n2\n2\n1\n", NAMES, names=tmp_path / name)[0] == [
        "golf ball", "golf cart", "golf cart", "golf ball"
    ]  # fmt: skip


@pytest.mark.parametrize("mapping", ["zone 1\nzone 2\n", "3 series\n5 series\n", "2 doors\n2 seats\n"])
def test_numbers_that_belong_to_names_number_nothing(mapping, tmp_path):
    """All classes became one, 'zone', or had none."""
    (tmp_path / "names.txt").write_text(mapping)
    first, second = mapping.splitlines()
    found = labels(tmp_path, "0\n1\n1\n0\n", NAMES, names=tmp_path / "names.txt")[0]
    assert found == [first, second, second, first]


def test_a_header_above_names_counts_as_none_of_them(tmp_path):
    """Class 0 was called 'id,name', and class 1 '0,ant'."""
    (tmp_path / "names.csv").write_text("id,name\n0,ant\n1,bee\n")
    assert labels(tmp_path, "0\n1\n1\n0\n", NAMES, names=tmp_path / "names.csv")[0] == ["ant", "bee", "bee", "ant"]


def test_numbers_of_one_name_are_said_to_become_one_class(tmp_path):
    (tmp_path / "names.txt").write_text("crane\nbee\ncrane\n")
    names, said = labels(tmp_path, "0\n2\n1\n0\n", NAMES, names=tmp_path / "names.txt")
    assert names == ["crane", "crane", "bee", "crane"]
    assert "3 numbers have 2 names, each of which becomes a class (first: 0 and 2 are 'crane')" in said[0]


def test_numbers_that_could_count_from_0_or_from_1_are_not_guessed(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(UsageError, match="count from 0 or from 1"):
        labels(tmp_path, "1\n2\n1\n2\n", NAMES, names=tmp_path / "names.txt")
    with pytest.raises(UsageError, match=r"has no name for 1 class numbers \(first: 7\)"):
        labels(tmp_path, "0\n2\n7\n2\n", NAMES, names=tmp_path / "names.txt")


def test_kaggles_solution_file(tmp_path):
    text = "ImageId,PredictionString\n" + "".join(
        f"{name[:-5]},n0000000{i} 1 2 3 4 n0000000{i} 5 6 7 8\n" for i, name in enumerate(NAMES)
    )
    assert labels(tmp_path, text, NAMES)[0] == [f"n0000000{i}" for i in range(4)]


def test_what_does_not_fit_is_counted_and_said(tmp_path):
    text = "path,label\na.png,cat\na.png,cat\nb.png,dog\nb.png,cat\ngone.png,cat\nd.png,\n"
    names, said = labels(tmp_path, text, ["a.png", "b.png", "c.png", "d.png"])
    assert names == ["cat", "", "", ""]
    text = "\n".join(said)
    assert "2 rows name an image a second time" in text
    assert "1 of 4 rows name no image, or could name several (first: gone.png)" in text
    assert "1 image has several classes and gets none (first: b.png: cat, dog)" in text
    assert "3 of 4 images have no class (first: b.png)" in text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,label\nx.png,cat\n", {}, "none of its 1 row names an image"),
        ("path,a,b\na.png,1,2\n", {}, "which of its columns path, a, b is the class"),
        ("path,a,b\na.png,1,2\n", {"column": "c"}, "no column c, only path, a, b"),
        ("a.png,1,2\n", {}, "which of its 3 columns is the path"),
        ("", {}, "no rows"),
        ("path,label\na.png,\n", {}, "gives no image a class"),
        (b"PK\x03\x04" + bytes(100), {}, "a zip archive, not a table of classes"),
        ('[{"path": "a.png", "label": ["x", "y"]}]', {}, "expected one class an image"),
    ],
)
def test_bad_files_get_one_line(text, options, message, tmp_path):
    with pytest.raises(ProtopruneError, match=message):
        labels(tmp_path, text, ["a.png"], **options)


def test_the_column_can_be_named(tmp_path):
    text = "path,coarse,fine\na.png,pet,cat\nb.png,pet,dog\n"
    assert labels(tmp_path, text, ["a.png", "b.png"], column="fine")[0] == ["cat", "dog"]


def test_metadata_names_files_relative_to_its_own_folder(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / "set" / split / "1.png")
    (tmp_path / "set/train/metadata.csv").write_text("file_name,label\n1.png,cat\n")
    with pytest.warns(ProtopruneWarning, match="1 of 2 images has no class"):
        found = list_folder(tmp_path / "set", labels=tmp_path / "set/train/metadata.csv")
    assert dict(zip(found.paths, found.labels.tolist(), strict=True)) == {"test/1.png": -1, "train/1.png": 0}


# --- at the command line and in training


@pytest.fixture
def flat(tmp_path):
    """A flat folder of six images and a table of their classes, in which one image is missing."""
    for i in range(6):
        write_image(tmp_path / "flat" / f"{i}.png", seed=i)
    rows = [(f"{i}.png", "even" if i % 2 == 0 else "odd") for i in range(5)]
    (tmp_path / "y.csv").write_text("path,label\n" + "".join(f"{path},{name}\n" for path, name in rows))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_embed_takes_them_and_keeps_where_they_are_from(flat):
    arguments = ["embed", flat / "flat", "-o", flat / "f.h5", "--encoder", "mini", "--device", "cpu"]
    result = call(*arguments, "--labels", flat / "y.csv")
    assert result.exit_code == 0, result.stderr
    assert "6 images in 2 classes (y.csv, sha256 " in result.stderr
    assert "warning: " in result.stderr
    assert "1 of 6 images has no class (first: 5.png)" in result.stderr
    with FeatureFile(flat / "f.h5") as file:
        assert (file.classes, file.labels.tolist()) == (["even", "odd"], [0, 1, 0, 1, 0, -1])
        assert file.provenance["labels_from"].startswith("y.csv, sha256 ")
    assert "classes     2 (y.csv" in call("info", flat / "f.h5").stdout
    for wrong in (["--no-labels"], ["--class-level", "1"]):
        assert call(*arguments, "--labels", flat / "y.csv", *wrong).exit_code == 2
    assert call(*arguments, "--label-column", "x").exit_code == 2
    assert call(*arguments, "--labels", flat / "none.csv").exit_code == 2


def test_training_examples_take_them(flat):
    with pytest.warns(ProtopruneWarning):
        data = load_examples(flat / "flat", 16, labels=flat / "y.csv")
    assert (len(data), data.classes, data.labels.tolist(), data.unlabelled) == (5, ["even", "odd"], [0, 1, 0, 1, 0], 1)


def test_record_and_evaluate_take_them(flat):
    """--plan and a list that names no image end both before any training."""
    result = call("record", flat / "flat", "--labels", flat / "y.csv", "-o", flat / "r.h5", "--plan")
    assert result.exit_code == 0, result.stderr
    assert "training: 5 examples in 2 classes" in result.stderr
    assert call("record", flat / "flat", "-o", flat / "r.h5", "--plan").exit_code == 1  # a flat folder has no classes
    (flat / "kept.txt").write_text("nothing.png\n")
    arguments = ["evaluate", flat / "kept.txt", "--images", flat / "flat", "--test", flat / "flat"]
    result = call(*arguments, "--labels", flat / "y.csv", "--test-labels", flat / "y.csv")
    assert "test: 5 examples in 2 classes" in result.stderr
    assert "nothing.png" in result.stderr.splitlines()[-1]


def test_json_of_one_record_is_not_a_mapping(tmp_path):
    assert labels(tmp_path, json.dumps([{"path": "a.png", "label": 3}]), ["a.png"], "a.json")[0] == ["3"]


def test_a_column_is_asked_for_where_there_is_none(tmp_path):
    (tmp_path / "truth.txt").write_text("1\n2\n")
    with pytest.raises(UsageError, match=r"truth.txt: no column label: it has one class a line"):
        read_labels(LabelFile(tmp_path / "truth.txt", "label"), ["a.png", "b.png"], str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "level", "message"),
    [
        ("none.csv", None, "--labels none.csv: no such file"),
        (LabelFile("none.csv"), None, "--labels none.csv: no such file"),
        (False, 1, "--class-level 1: goes with classes from folders"),
        (True, 0, "--class-level 0: expected at least 1"),
    ],
)
def test_where_classes_come_from_is_checked_before_anything_is_listed_or_read(labels, level, message, monkeypatch):
    from protoprune.embedding import importing
    from protoprune.images import listing

    monkeypatch.setattr(listing, "_walk", lambda *_: pytest.fail("listed"))
    monkeypatch.setattr(listing, "_size_and_times", lambda *_: pytest.fail("listed"))
    monkeypatch.setattr(importing, "_read", lambda *_: pytest.fail("read"))
    for call in (
        lambda: listing.list_folder(".", labels=labels, class_level=level),
        lambda: listing.list_paths(["a.png"], labels=labels, class_level=level),
        lambda: importing.import_features("v.npy", "f.h5", labels=labels, class_level=level),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert message in str(error.value)


def test_classes_in_a_dict_are_read_as_those_in_a_file_are(image_tree):
    """Numbers as pandas has them, paths as objects or of another root, images that it leaves out, nothing for none."""
    root = image_tree({"cat": 2, "dog": 2})
    ids = ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"]
    for given, classes, labels in (
        (dict(zip(ids, [10, 9, 10, 9], strict=True)), ["9", "10"], [1, 0, 1, 0]),
        (dict(zip(ids, np.array([1.0, 0.0, np.nan, 1.0]), strict=True)), ["0", "1"], [1, 0, -1, 1]),
        ({Path(one): "ab"[place % 2] for place, one in enumerate(ids)}, ["a", "b"], [0, 1, 0, 1]),
        ({str(root / one): None if "1" in one else "x" for one in ids}, ["x"], [0, -1, 0, -1]),
    ):
        images = list_folder(root, labels=given)
        assert images.classes == classes
        assert images.labels.tolist() == labels
        assert images.labels_from == "as given"
    with pytest.warns(ProtopruneWarning, match=r"labels: 3 of 4 images have no class \(first: cat/000.png\)"):
        list_folder(root, labels={"dog/000.png": "dog"})
    with pytest.warns(ProtopruneWarning, match="labels: 1 of 5 rows name no image"):
        list_folder(root, labels={**dict.fromkeys(ids, "x"), "eel/9.png": "eel"})
    for wrong, said in (
        ({}, "an empty dict"), ({"cat/000.png": 0.5}, "expected text or a whole number"),
        ({"cat/000.png": ["x"]}, "expected text or a whole number"), ({3: "x"}, "labels: holds 3, expected paths"),
        ({"cat/000.png": True}, "expected text or a whole number"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            list_folder(root, labels=wrong)
