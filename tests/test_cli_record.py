"""`protoprune record` as a user meets it."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest
from training_helpers import write_folder
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.records import PartialRecord, Record
from protoprune.training import examples

QUICK = ["--model", "cnn", "--width", "4", "--image-size", "8", "--epochs", "2", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "images", {"cat": 4, "dog": 5, "eel": 3})


@pytest.fixture
def record(tmp_path, monkeypatch):
    """record("images", ...) -> (exit code, lines on stderr); stdout must be empty."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, list[str]]:
        result = CliRunner().invoke(app, ["record", *map(os.fspath, arguments)])
        assert result.stdout == ""
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr.splitlines()

    return call


def test_a_folder_is_recorded_and_only_once(images, record, tmp_path):
    write_folder(tmp_path / "test", {"dog": 2, "eel": 1})
    arguments = [images, "--test", tmp_path / "test", *QUICK, "--models", "2", "--subset", "0.7"]
    code, lines = record(*arguments)
    assert code == 0
    assert lines[:2] == [
        f"training: 12 examples in 3 classes, {images}", f"test: 3 examples in 3 classes, {tmp_path / 'test'}"
    ]  # fmt: skip
    assert lines[2] == f"warning: {tmp_path / 'test'} has no image of 1 of 3 classes, first cat"
    assert lines[3].startswith("warning: 3 of the 3 test images are training images too (first: dog/000.png); ")
    assert lines[4].startswith("record: 2 models x 2 recorded epochs x 12 examples, ")
    assert lines[4].endswith("kB in record.h5")
    assert lines[-1].startswith("record.h5: 2 x cnn, 2 epochs, in ")
    with Record(tmp_path / "record.h5") as found:
        assert (found.models, found.epochs, found.n) == (2, 2, 12)
        assert found.test_labels.tolist() == [1, 1, 2]
        right = found.last("prediction") == found.labels
        own, others = (
            [row[mine].mean() for row, mine in zip(right, counts, strict=True)]
            for counts in (found.subset, ~found.subset)
        )
        np.testing.assert_allclose(found.train_accuracy, own)
        np.testing.assert_allclose(found.held_out_accuracy, others)
        np.testing.assert_allclose(found.test_accuracy, (found.test_prediction == [1, 1, 2]).mean(axis=1))
        shown = [
            f"{100 * np.mean(one):.1f} % ({100 * np.min(one):.1f}-{100 * np.max(one):.1f})"
            for one in (own, others, found.test_accuracy)
        ]
    assert lines[-2 if "hardly" not in lines[-2] else -3] == (
        f"accuracy: {shown[0]} right on their training images, {shown[1]} on those left out of it, "
        f"{shown[2]} on the test set"
    )
    code, lines = record(*arguments)
    assert code == 0
    assert "4 of 4 epochs are recorded already, 0 to go" in lines
    code, lines = record(*arguments, "--lr", "0.07")
    assert code == 1
    assert lines[-1].startswith("error: record.h5 is of another run (lr 0.2, now 0.07); ")
    assert record(*arguments, "--lr", "0.07", "--overwrite")[0] == 0


def test_too_few_steps_are_said_before_the_training(images, feature_file, record, tmp_path):
    hint = "hint: 2 epochs of 8 images are 8 optimizer steps, and networks that take fewer than 500 have mostly not "
    arguments = ["--epochs", "2", "--batch-size", "2", "--subset", "0.7", "--plan"]
    lines = record(images, *arguments)[1]
    assert lines[-1] == hint + "learned; --epochs 125 makes 500"
    assert "hint" not in record(images, *arguments, "--epochs", "125")[1][-1]
    rng = np.random.default_rng(0)
    feature_file(tmp_path / "f.h5", rng.normal(size=(12, 3)), paths=[f"{'ab'[i % 2]}/{i}.png" for i in range(12)])
    assert not [line for line in record("f.h5", *arguments)[1] if "hint" in line]


def test_features_make_heads(feature_file, record, tmp_path):
    features = np.random.default_rng(0).normal(size=(12, 4))
    file = feature_file(tmp_path / "f.h5", features, paths=[f"c{i % 3}/{i}.png" for i in range(12)])
    code, lines = record(file, "--models", "3", "--gradients", "--initial", "--every", "10", "--seed", "3")
    assert code == 0
    assert "record: 3 models x 3 recorded epochs x 12 examples" in lines[1]
    with Record(tmp_path / "record.h5") as found:
        assert found.epoch_numbers.tolist() == [0, 10, 20]
        assert "gradient_norm" in found.statistics


def test_models_that_have_not_learned_are_warned_about(feature_file, record, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 0, 1, 2], 100)  # always saying the largest class is right for half of them
    paths = [f"c{label}/{i:03d}.png" for i, label in enumerate(labels)]
    apart = rng.normal(size=(400, 8)) + 4 * np.eye(3, 8)[labels]
    for features, poor in ((rng.normal(size=(400, 8)), True), (apart, False)):
        file = feature_file(tmp_path / "f.h5", features, paths=paths)
        _, lines = record(file, "--models", "3", "--epochs", "2", "--overwrite")
        warned = [line for line in lines if "have hardly learned" in line]
        assert bool(warned) == poor
        assert lines[-2 - poor].startswith("accuracy: ")
    with Record(tmp_path / "record.h5") as found:
        assert found.train_accuracy.min() > 0.7
        assert np.isnan(found.held_out_accuracy).all()
        assert found.test_accuracy is None


def test_networks_are_small_ones_unless_asked_for(images, record):
    code, lines = record(images, "--image-size", "8", "--epochs", "1", "--batch-size", "4", "--device", "cpu")
    assert code == 0
    assert lines[-1].startswith("record.h5: 1 x cnn, 1 epoch, in ")


def test_class_probabilities_are_sized_and_recorded(images, record, tmp_path):
    _, lines = record(images, *QUICK, "--models", "2", "--probabilities", "--plan")
    assert lines[-2].endswith("kB in record.h5, 144 bytes of it class probabilities")  # 2 x 12 x 3 float16
    assert record(images, *QUICK, "--models", "2", "--probabilities")[0] == 0
    with Record(tmp_path / "record.h5") as found:
        assert found.probabilities(1).shape == (12, 3)


def test_a_plan_decodes_and_writes_nothing(images, record, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "load", None)
    code, lines = record(images, "--plan", "--epochs", "90", "--models", "20")
    assert code == 0
    assert lines[-2].startswith("record: 20 models x 90 recorded epochs x 12 examples, ")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_what_is_left_out_is_said(images, record):
    (images / "cat" / "000.png").write_bytes(b"")
    _, lines = record(images, *QUICK)
    assert "warning: 1 image of " in lines[1]
    assert "cannot be read, first cat/000.png (empty: the file has zero bytes)" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none"], 2, "none: no such image folder or feature file"),
        (["images", "--model", "head"], 2, "trains on features; run `protoprune embed images"),
        (["images", "--model", "lenet"], 2, "--model lenet: expected one of head, cnn, resnet18 or timm:NAME"),
        (["images", "--test", "f.h5"], 2, "give the test set in the form of the training set"),
        (["images", "--models", "0"], 2, "--models 0: expected at least 1"),
        (["images", "--subset", "1.2"], 2, "--subset 1.2: expected a number above 0 to 1"),
        (["images", "--lr", "0"], 2, "--lr 0: expected a number above 0"),
        (["images", "--schedule", "x"], 2, "--schedule x: expected one of linear, cosine, steps"),
        (["images", "--device", "tpu"], 2, "--device tpu: "),
        (["images", "-o", "no/r.h5"], 2, "no/r.h5: its folder does not exist"),
        (["images", "-o", "images"], 2, "images: a folder; name a file"),
        (["images", "--weights", "w.pt"], 2, "--weights w.pt: "),
        (["images", *QUICK, "--lr", "1e30"], 1, "train with a smaller --lr"),
        (["images", *QUICK, "-o", "text.h5"], 1, "text.h5: not a readable HDF5 file"),
        (["images/cat"], 1, "no two classes were found"),
    ],
)
def test_errors_are_one_line(images, record, tmp_path, arguments, code, words):
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "f.h5").touch()
    found, lines = record(*arguments)
    assert found == code
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert lines[-1] == errors[0]


def test_a_bad_option_is_said_before_anything_is_decoded(images, record, monkeypatch):
    monkeypatch.setattr(examples, "load", None)
    for bad in (
        ["--models", "0"],
        ["--subset", "0"],
        ["--device", "tpu"],
        ["--lr", "-1"],
        ["--model", "lenet"],
        ["--weights", "w"],
    ):
        code, lines = record(images, *bad)
        assert code == 2
        assert len(lines) == 1


def test_the_program_goes_on_after_an_interrupt(images, record, tmp_path, monkeypatch):
    write = PartialRecord.write

    def once(self, models, *how):
        if models.start == 1:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, models, *how)

    arguments = ["images", *QUICK, "--models", "2"]
    monkeypatch.setattr(sys, "argv", ["protoprune", "record", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(PartialRecord, "write", once)
        code, lines = record(*arguments)
    assert code == 130
    assert lines[-2] == "interrupted: what is recorded is kept; to go on, run the same again:"
    assert lines[-1] == f"  {' '.join(sys.argv)}"
    code, lines = record(*arguments)
    assert code == 0
    assert "2 of 4 epochs are recorded already, 2 to go" in "\n".join(lines)
    assert Record(tmp_path / "record.h5").committed.tolist() == [2, 2]


def test_overwrite_replaces_records_only(images, record, tmp_path, feature_file):
    (tmp_path / "text.h5").write_text("my notes")
    feature_file("f.h5", np.eye(4), paths=["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"])
    before = (tmp_path / "f.h5").read_bytes()
    for target in ("text.h5", "f.h5"):
        code, lines = record(images, *QUICK, "--overwrite", "-o", target)
        assert code == 2
        assert f"{target}: not a training record, and --overwrite replaces nothing else" in lines[-1]
    code, lines = record("f.h5", "--overwrite", "-o", "f.h5")
    assert code == 2
    assert "f.h5: is one of the inputs" in lines[-1]
    assert (tmp_path / "f.h5").read_bytes() == before
    assert (tmp_path / "text.h5").read_text() == "my notes"


def test_a_run_that_failed_at_once_does_not_block_the_next(images, record):
    assert record(images, *QUICK, "--lr", "1e30")[0] == 1
    assert record(images, *QUICK)[0] == 0


def test_a_network_needs_images_and_a_test_set_of_its_own(images, record, feature_file):
    feature_file("f.h5", np.eye(4), paths=["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"])
    code, lines = record("f.h5", "--model", "cnn")
    assert (code, len(lines)) == (2, 1)
    assert "--model cnn trains on images, and f.h5 is a file" in lines[0]
    code, lines = record("nowhere", "--test", images)
    assert (code, lines) == (2, ["error: nowhere: no such image folder or feature file"])
    code, lines = record(images, *QUICK, "--test", images, "--plan")
    assert code == 0
    assert sum("are the training set itself" in line for line in lines) == 1


def test_what_fails_before_an_epoch_is_recorded_leaves_nothing(images, record, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"no weights")
    for fault, said in ((["--weights", tmp_path / "w.pth"], "--weights "), (["--lr", "1e30"], "the loss is ")):
        code, lines = record(images, *QUICK, *fault)
        assert code == 1
        assert lines[-1].startswith(f"error: {said}")
        assert not list(tmp_path.glob("record.h5*"))


def test_a_file_of_classes_that_is_none_is_called_so(images, record, tmp_path):
    (tmp_path / "f.gz").write_bytes(b"\x1f\x8b\x08" + bytes(40))
    assert record(images, "--labels", tmp_path / "f.gz")[1][-1].endswith(
        "a gzip file, not a table of classes; unpack it first (gzip -d)"
    )
