"""Feature sets: the same features as from a folder, resumable, honest about shards that fail."""

import csv
import errno
import functools
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings

import h5py
import numpy as np
import pytest
from protocols import OwnEncoder
from shard_helpers import image_folder, members, write_parquet, write_tar, write_tars, write_zip
from typer.testing import CliRunner

import protoprune
from protoprune.cli import app
from protoprune.embedding.engine import Engine
from protoprune.embedding.pipeline import embed
from protoprune.encoders import Encoder, load_encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.features import featureset
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import FeatureSet, read_plan, shard_file
from protoprune.features.opening import open_features
from protoprune.images.decode import ImageError, Preprocess, Status
from protoprune.images.listing import list_folder
from protoprune.shards import sharding
from protoprune.shards.on_ray import Need
from protoprune.shards.sharding import embed_shards
from protoprune.sources import ShardOptions, find_shards, open_shard
from protoprune.training.examples import load_examples

DUP = os.dup


@pytest.fixture(scope="module")
def mini():
    return load_encoder("mini")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("set") / "images", {"ant": 9, "bee": 7, "cat": 8})


@pytest.fixture(scope="module")
def reference(folder, mini, tmp_path_factory):
    """The feature file of the folder."""
    out = tmp_path_factory.mktemp("reference") / "f.h5"
    embed(list_folder(folder), mini, out, device="cpu")
    return out


@pytest.fixture
def tars(folder, tmp_path):
    return write_tars(tmp_path / "tars", members(folder), 4)


def run(spec, out, encoder, **options):
    return embed_shards(find_shards(spec), encoder, out, device="cpu", **options)


def arrays(path):
    with open_features(path) as file:
        return file.features[:], file.labels, file.classes, file.status, file.size


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "parquet", "saved to disk"])
def test_every_kind_of_shard_gives_the_folders_features_and_kept_set(kind, folder, reference, mini, tmp_path):
    files = members(folder)
    if kind.startswith("tar"):
        spec = write_tars(tmp_path / "s", files, 3, f".{kind}")
    elif kind == "zip":
        spec = write_zip(tmp_path / "s.zip", files)
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        (tmp_path / "s").mkdir()
        for number in range(3):
            write_parquet(tmp_path / f"s/part-{number}.parquet", files[8 * number : 8 * number + 8])
        spec = tmp_path / "s"
    else:
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": data, "path": None} for _, data in files],
                "label": [name.partition("/")[0] for name, _ in files]}  # fmt: skip
        spec = tmp_path / "s"
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(spec))
    report = run(spec, tmp_path / "features", mini)
    assert (report.n, report.embedded, report.finished, report.failed_shards) == (24, 24, True, [])
    for one, other in zip(arrays(tmp_path / "features"), arrays(reference), strict=True):
        assert np.array_equal(one, other)
    with FeatureSet(tmp_path / "features") as whole:
        assert whole.paths == sorted(whole.paths)
    for options in ({"keep": 0.5}, {"keep": 0.3, "balance": 0.5}, {"keep": 0.6, "dedup": 0.01}):
        one = protoprune.select(tmp_path / "features", **options)
        other = protoprune.select(reference, **options)
        assert one.keep.tolist() == other.keep.tolist()
        assert np.array_equal(one.ranking.scores, other.ranking.scores)


def test_a_second_run_embeds_nothing_and_opens_no_shard(tars, mini, tmp_path, monkeypatch):
    run(tars, tmp_path / "f", mini)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")}
    monkeypatch.setattr("protoprune.shards.sharding.open_shard", None)  # would be a TypeError
    report = run(tars, tmp_path / "f", mini)
    assert (report.embedded, report.states, report.n) == (0, {"unchanged": 4}, 24)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")} == before


def test_only_new_and_changed_shards_are_embedded(tars, folder, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    files = members(folder)
    write_tar(tars / "0001.tar", files[:3])
    write_tar(tars / "0009.tar", files[3:5])
    report = run(tars, tmp_path / "f", mini)
    assert (report.embedded, report.states, report.n) == (5, {"unchanged": 3, "embedded": 2}, 23)


def test_corrupt_truncated_and_missing_shards_are_listed_and_the_others_finish(tars, mini, tmp_path):
    data = (tars / "0001.tar").read_bytes()
    (tars / "0001.tar").write_bytes(data[: len(data) // 2])
    (tars / "0002.tar").write_bytes(b"<html>no</html>" * 100)
    arguments = ["embed", f"{tars}/{{0000..0004}}.tar", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu"]
    result = call(*arguments, "--errors", tmp_path / "e.csv")
    assert result.exit_code == 0, result.stderr
    with open(tmp_path / "e.csv", newline="") as file:
        rows = [(row["path"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("0001.tar", "truncated"), ("0002.tar", "corrupt"), ("0004.tar", "missing")]
    assert "3 shards could not be used, first 0001.tar: truncated" in result.stderr
    assert call(*arguments, "--strict").exit_code == 1
    said = call("info", tmp_path / "f").stdout
    assert "feature set of 5 shards: 2 done (12 images), 3 failed, 0 not yet embedded" in said
    assert "truncated (first: 0001.tar: cut off inside" in said
    assert call("info", tmp_path / "f", "--errors").stdout.splitlines()[0].startswith("0001.tar\ttruncated\t")
    with pytest.warns(ProtopruneWarning, match="3 of 5 shards could not be used and are not in it"):
        assert len(protoprune.select(tmp_path / "f", 0.5).kept_paths) == 6
    with pytest.warns(ProtopruneWarning, match="3 of 5 shards could not be used and are not in it"):
        assert protoprune.merge(tmp_path / "f", tmp_path / "merged.h5") == 12  # nothing in the file says so later
    (tars / "0001.tar").write_bytes(data)  # repaired
    report = run(f"{tars}/{{0000..0004}}.tar", tmp_path / "f", mini)
    assert (report.states, report.n) == ({"unchanged": 2, "embedded": 1, "failed": 2}, 18)
    assert not (tmp_path / "f/0001.tar.failed.json").exists()


def test_nothing_usable_is_an_error(tmp_path, mini):
    (tmp_path / "s.tar").write_bytes(b"nothing")
    result = call("embed", tmp_path / "s.tar", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu")
    assert result.exit_code == 1
    assert "none of 1 shard could be used" in result.stderr.splitlines()[-1]
    with pytest.raises(ProtopruneError, match=r"no shard could be used \(first: s\.tar: corrupt"):
        FeatureSet(tmp_path / "f")


def test_shards_that_are_no_longer_named_are_said(tars, mini, tmp_path):
    """A glob finds what is there: a shard that is missing takes its images out of the set, and of every list."""
    embed_shards(find_shards(tars), mini, tmp_path / "f", device="cpu")
    (tars / "0002.tar").rename(tmp_path / "elsewhere.tar")
    with pytest.warns(
        ProtopruneWarning, match=r"1 shard of .*f is not among those given now: 6 images fewer in it \(fir"
    ):
        report = embed_shards(find_shards(f"{tars}/*.tar"), mini, tmp_path / "f", device="cpu")
    assert report.n == 18
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_shards(find_shards(f"{tars}/*.tar"), mini, tmp_path / "f", device="cpu")  # it is known by now


def test_a_set_of_failures_holds_nothing_to_lose(folder, mini, tmp_path):
    """The wrong column made no features: the right one needs no --overwrite."""
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "train-0.parquet", members(folder))
    write_parquet(tmp_path / "test-0.parquet", members(folder))
    source = find_shards(tmp_path)
    with pytest.warns(ProtopruneWarning, match=r"splits \(test, train\), and one set is made of all of them"):
        report = embed_shards(source, mini, tmp_path / "f", options=ShardOptions(image_column="name"), device="cpu")
    assert len(report.failed_shards) == 2
    assert embed_shards(source, mini, tmp_path / "f", options=ShardOptions(id_column="name"), device="cpu").n == 48
    with pytest.raises(ProtopruneError, match="other features"):
        embed_shards(source, mini, tmp_path / "f", device="cpu")


def test_a_shard_that_is_gone_keeps_its_features(tars, mini, tmp_path):
    run(f"{tars}/{{0000..0003}}.tar", tmp_path / "f", mini)
    before = arrays(tmp_path / "f")
    (tars / "0002.tar").unlink()
    with pytest.warns(ProtopruneWarning, match=r"0002\.tar: the shard is gone; its 6 features are kept"):
        report = run(f"{tars}/{{0000..0003}}.tar", tmp_path / "f", mini)
    assert report.states == {"unchanged": 3, "kept": 1}
    assert all(np.array_equal(one, other) for one, other in zip(arrays(tmp_path / "f"), before, strict=True))


def test_another_encoder_source_or_folder_is_refused(tars, folder, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    before = {path: path.read_bytes() for path in (tmp_path / "f").rglob("*") if path.is_file()}
    other = write_tars(tmp_path / "other", members(folder)[:9], 3)
    for spec, options, message in (
        (tars, {"store": "float32"}, r"holds other features \(store: float16, not float32\)"),
        (other, {}, r"is for shards below .*/tars, not .*/other, and 0000.tar holds other images"),
        (tars / "0000.tar", {}, r"is for other shards: 18 of its 24 features would be lost"),
    ):
        with pytest.raises(ProtopruneError, match=message):
            run(spec, tmp_path / "f", mini, **options)
    assert {path: path.read_bytes() for path in (tmp_path / "f").rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match="a folder that holds other things"):
        run(tars, folder, mini)
    with pytest.raises(UsageError, match=r"f\.h5: shards become a feature set, which is a folder"):
        run(tars, tmp_path / "f.h5", mini)
    result = call("embed", tars, "-o", tmp_path / "f.h5", "--encoder", "mini")
    assert (result.exit_code, "leave the suffix out" in result.stderr) == (2, True)
    assert not (tmp_path / "f.h5").exists()
    with pytest.raises(UsageError, match="a file; shards go to a folder"):
        run(tars, folder / "ant/000.png", mini)
    report = run(tars, tmp_path / "f", mini, store="float32", overwrite=True)
    assert (report.embedded, report.finished) == (24, True)
    assert arrays(tmp_path / "f")[0].dtype == np.float32


def test_an_unfinished_set_says_how_to_finish_it(tars, mini, tmp_path):
    report = run(tars, tmp_path / "f", mini, rank=1, world_size=2)
    assert (report.embedded, report.finished) == (12, False)
    with pytest.raises(ProtopruneError, match=r"not finished, 2 of 4 shards are done; run the same"):
        protoprune.select(tmp_path / "f", 0.5)
    assert "2 done (12 images), 0 failed, 2 not yet embedded" in call("info", tmp_path / "f").stdout
    assert run(tars, tmp_path / "f", mini, rank=0, world_size=2).finished


def test_missing_and_foreign_parts_are_errors_that_name_them(tars, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    path = shard_file(str(tmp_path / "f"), "0002.tar")
    shutil.move(path, tmp_path / "away.h5")
    with pytest.raises(ProtopruneError, match=r"0002\.tar\.h5: missing, a part of the feature set"):
        protoprune.select(tmp_path / "f", 0.5)
    shutil.copy(shard_file(str(tmp_path / "f"), "0001.tar"), path)
    with pytest.raises(ProtopruneError, match=r"0002\.tar\.h5: not the file that .*set\.json names"):
        protoprune.select(tmp_path / "f", 0.5)
    os.unlink(path)
    assert run(tars, tmp_path / "f", mini).finished
    for text, message in (("{", "damaged"), ('{"format": "x"}', "damaged"), ("[]", "damaged")):
        (tmp_path / "f/set.json").write_text(text)
        with pytest.raises(ProtopruneError, match=message):
            open_features(tmp_path / "f")
    with pytest.raises(ProtopruneError, match=r"a folder without set\.json"):
        open_features(tars)
    for other in (tars / "0000.tar", tmp_path / "nothing"):
        with pytest.raises(ProtopruneError, match=r"no folder with a set\.json"):
            protoprune.merge(other, tmp_path / "m.h5")


def test_merge_is_the_set_in_one_file(tars, mini, tmp_path):
    (tars / "0001.tar").write_bytes((tars / "0001.tar").read_bytes()[:-10240] + b"")
    write_tar(tars / "0004.tar", [("dog/1.png", b"broken"), ("dog/2.png", b"")])
    run(tars, tmp_path / "f", mini)
    result = call("merge", tmp_path / "f", "-o", tmp_path / "m.h5")
    assert result.exit_code == 0, result.stderr
    with FeatureSet(tmp_path / "f") as whole, FeatureFile(tmp_path / "m.h5") as file:
        for name in ("paths", "classes", "n", "dim"):
            assert getattr(whole, name) == getattr(file, name)
        for name in ("labels", "status", "size", "mtime_ns", "usable"):
            assert np.array_equal(getattr(whole, name), getattr(file, name))
        assert np.array_equal(whole.features[:], file.features[:])
        assert whole.failures() == file.failures()
        assert whole.failure_counts() == file.failure_counts()
        assert whole.provenance["root"] == file.provenance["root"]
        assert file.provenance["merged_from"] == whole.provenance["uuid"]
    for number, options in enumerate((["--keep", "0.5"], ["--keep", "0.4", "--balance", "0.5", "--dedup", "0.1"])):
        lists = []
        for source in ("f", "m.h5"):
            out = tmp_path / f"{number}-{source}.csv"
            assert call("select", tmp_path / source, *options, "-o", out, "--manifest", f"{out}.all").exit_code == 0
            lists.append((out.read_bytes(), (tmp_path / f"{out}.all").read_bytes()))
        assert lists[0] == lists[1]
    assert call("merge", tmp_path / "f", "-o", tmp_path / "m.h5").exit_code == 2
    assert call("merge", tmp_path / "f", "-o", tmp_path / "m.h5", "--overwrite").exit_code == 0
    assert call("merge", tmp_path / "m.h5", "-o", tmp_path / "n.h5").exit_code == 2
    (tmp_path / "n.h5.partial").write_bytes(b"hours of a GPU")
    result = call("merge", tmp_path / "f", "-o", tmp_path / "n.h5")
    assert (result.exit_code, "n.h5.partial: an unfinished run of `protoprune embed`" in result.stderr) == (2, True)
    assert (tmp_path / "n.h5.partial").read_bytes() == b"hours of a GPU"


def test_one_shard_into_one_file(tars, folder, reference, tmp_path):
    zipped = write_zip(tmp_path / "all.zip", members(folder))
    result = call("embed", zipped, "-o", tmp_path / "one.h5", "--encoder", "mini", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert all(np.array_equal(a, b) for a, b in zip(arrays(tmp_path / "one.h5"), arrays(reference), strict=True))
    (tmp_path / "cut.tar").write_bytes((tars / "0000.tar").read_bytes()[:3000])
    result = call("embed", tmp_path / "cut.tar", "-o", tmp_path / "c.h5", "--encoder", "mini", "--device", "cpu")
    assert (result.exit_code, "cut.tar: truncated" in result.stderr) == (1, True)


def test_shards_of_encoders_with_one_digest_and_other_dimensions_are_no_set(tars, tmp_path):
    def encoder(dim):
        return Encoder("own", lambda x: x.flatten(1)[:, :dim].float(), dim, Preprocess(8, 8), "0" * 64)

    (tars / "0003.tar").rename(tmp_path / "later.tar")
    run(tars, tmp_path / "f", encoder(12))
    (tmp_path / "later.tar").rename(tars / "0003.tar")
    run(tars, tmp_path / "f", encoder(24))
    with pytest.raises(ProtopruneError, match=r"24 dimensions, the set has 12: .*; embed into a new folder with -o"):
        FeatureSet(tmp_path / "f")


def test_a_set_that_is_left_holds_no_file_open(tars, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    with FeatureSet(tmp_path / "f") as whole:
        assert len(whole.features[:]) == 24
        files = list(whole._open.values())
        assert files
    assert not whole._open
    assert all(file._reader.raw.closed for file in files)


def test_a_gpu_of_ray_is_asked_for_bf16_only_where_it_matters(monkeypatch):
    monkeypatch.setattr(sharding.on_ray, "need", lambda device, workers, alone: Need(device, workers or 3))
    for device, asked, fp32_only, bf16, want in (
        ("cuda", "auto", False, True, "bf16"), ("cuda", "auto", False, False, "fp16"),
        ("cuda", "fp32", False, None, "fp32"), ("cuda", "auto", True, None, "auto"),
        ("cpu", "auto", False, None, "auto"),
    ):  # fmt: skip
        monkeypatch.setattr(sharding.on_ray, "gpu_has_bf16", lambda bf16=bf16: bf16 if bf16 is not None else 1 / 0)
        settings = {"workers": None, "precision": asked}
        encoder = types.SimpleNamespace(fp32_only=fp32_only)
        assert sharding._need_of_ray(encoder, device, settings, False) == Need(device, 3)
        assert settings == {"workers": 3, "precision": want}


def test_rows_read_like_an_array(tars, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(featureset, "_OPEN_FILES", 1)
    run(tars, tmp_path / "f", mini)
    with FeatureSet(tmp_path / "f") as whole:
        every = np.concatenate([file.features[:] for file in whole._files()])
        rows = whole.features
        assert (rows.shape, rows.dtype, len(rows), rows.ndim) == (every.shape, every.dtype, 24, 2)
        rng = np.random.default_rng(0)
        for _ in range(40):
            low, high = sorted(rng.integers(-3, 30, 2))
            assert np.array_equal(rows[low:high], every[low:high])
            some = rng.integers(-24, 24, rng.integers(0, 30))
            assert np.array_equal(rows[some], every[some])
        mask = rng.random(24) < 0.4
        assert np.array_equal(rows[mask], every[mask])
        assert np.array_equal(rows[::5], every[::5])
        assert np.array_equal(rows[7], every[7])
        assert np.array_equal(np.asarray(rows), every)
        with pytest.raises(IndexError):
            rows[[24]]


def test_labels_of_shards_become_one_numbering(folder, mini, tmp_path):
    image = members(folder)[0][1]
    write_tar(tmp_path / "s/0.tar", [("a.png", image), ("a.cls", b"10"), ("b.png", image), ("b.cls", b"9")])
    write_tar(tmp_path / "s/1.tar", [("a.png", image), ("a.cls", b"2"), ("b.png", image), ("b.cls", b"10")])
    write_tar(tmp_path / "s/2.tar", [("x/a.png", image)])  # its folder is no class beside .cls
    run(tmp_path / "s", tmp_path / "f", mini)
    with pytest.warns(ProtopruneWarning, match=r"1 image has no class: .* from \.cls"):
        whole = FeatureSet(tmp_path / "f")
    with whole:
        assert whole.classes == ["2", "9", "10"]
        assert whole.labels.tolist() == [2, 1, 0, 2, -1]
        assert whole.paths[0] == "0.tar/a.png"
        assert whole.paths[2] == "1.tar/a.png"  # keys that two tars share stay apart
    run(tmp_path / "s", tmp_path / "f", mini, options=ShardOptions(class_level=1))
    with FeatureSet(tmp_path / "f") as whole:
        assert (whole.classes, whole.labels.tolist()) == (["x"], [-1, -1, -1, -1, 0])
    report = run(tmp_path / "s", tmp_path / "f", mini, options=ShardOptions(labels=False))
    with FeatureSet(tmp_path / "f") as whole:
        assert whole.classes == []
    assert report.embedded == 0  # other labels are no reason to compute anything


@pytest.mark.parametrize(("stray", "warned"), [(1, True), (0, False), (4, False)])
def test_images_in_no_folder_of_their_shard_cost_the_classes(folder, mini, tmp_path, stray, warned):
    image = members(folder)[0][1]
    write_tar(tmp_path / "s/0.tar", [("x/a.png", image), ("y/b.png", image)])
    write_tar(tmp_path / "s/1.tar", [("x/c.png", image), *((f"{number}.png", image) for number in range(stray))])
    run(tmp_path / "s", tmp_path / "f", mini)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with FeatureSet(tmp_path / "f") as whole:
            assert whole.classes == ([] if stray else ["x", "y"])
    assert [str(one.message)[:60] for one in told] == [
        "no classes, since 1 of 4 images lies in no folder of their s"
    ] * warned


def test_training_takes_a_set(tars, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    data = load_examples(tmp_path / "f")
    assert (len(data), data.classes, data.vectors) == (24, ["ant", "bee", "cat"], True)
    result = call("record", tmp_path / "f", "-o", tmp_path / "r.h5", "--plan")
    assert result.exit_code == 0, result.stderr
    result = call("score", "supervised-prototypes", "--features", tmp_path / "f", "-o", tmp_path / "s.csv")
    assert result.exit_code == 0, result.stderr
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 2 + 24


def test_ranks_come_from_the_environment(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    arguments = ["embed", tars, "-o", "f", "--encoder", "mini", "--device", "cpu"]
    result = call(*arguments)
    assert "2 of them are for rank 1 of 2" in result.stderr
    assert "f is not finished" in result.stderr
    assert call(*arguments, "--rank", "0", "--world-size", "2").exit_code == 0
    with FeatureSet("f") as whole:
        assert whole.n == 24
    assert call(*arguments, "--rank", "2", "--world-size", "2").exit_code == 2
    assert call(*arguments, "--rank", "0").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone{0..2}.tar"], 1, "none of the 3 shards is there"),
        (["*.gone"], 2, "matches no file"),
        (["tars", "--labels", "y.csv"], 2, "--labels FILE goes with images"),
        (["tars", "-o", "y.csv"], 2, "a file; shards go to a folder"),
        (["tars", "--root", "."], 2, "--root goes with a list"),
        (["images", "--image-column", "x"], 2, "--image-column goes with shards"),
        (["images", "--rank", "0", "--world-size", "2"], 2, "--rank goes with shards"),
    ],
)
def test_mistakes_get_one_line(arguments, code, message, tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", {"a": 1, "b": 1})
    (tmp_path / "y.csv").write_text("path,label\n")
    result = call("embed", *arguments, "--encoder", "mini", "--device", "cpu")
    assert result.exit_code == code, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not os.path.exists("features")


def test_a_list_of_shards(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("tars/0000.tar\ntars/0001.tar\n")
    result = call("embed", "list.txt", "--encoder", "mini", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert [part.name for part in read_plan("features")[1]] == ["tars/0000.tar", "tars/0001.tar"]
    result = call("select", "--keep", "0.5")
    assert (result.exit_code, "the feature set is features: give that" in result.stderr) == (2, True)


def test_an_interrupted_shard_goes_on_where_it_stopped(tars, mini, tmp_path, monkeypatch):
    from protoprune.shards import sharding

    real = sharding.in_halves

    def stopping(engine, images, out, **options):
        if "0001" in str(out):
            raise KeyboardInterrupt
        return real(engine, images, out, **options)

    monkeypatch.setattr(sharding, "in_halves", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tars, tmp_path / "f", mini)
    monkeypatch.undo()
    report = run(tars, tmp_path / "f", mini)
    assert (report.states, report.embedded) == ({"unchanged": 1, "embedded": 3}, 18)


def test_an_unfinished_shard_that_is_damaged_or_of_other_features_is_begun_anew(tars, tmp_path):
    """As the finished ones of a set are, when it is what is wanted: nobody should look for such files by hand."""
    from protoprune.shards import sharding

    out = tmp_path / "f"
    run(tars, out, OwnEncoder())
    engine = Engine(OwnEncoder(), "cpu")
    for name in ("0001.tar", "0002.tar"):
        (out / f"{name}.h5").unlink()
        shard = find_shards(tars / name).shards[0]
        begun = sharding._embedded(shard, sharding._Worker(engine, str(tars), ShardOptions(), str(out), False))
        next(begun)  # killed there
        begun.close()
    partial = out / "0002.tar.h5.partial"
    partial.write_bytes(partial.read_bytes()[:3000])
    report = run(tars, out, OwnEncoder(), store="float32", overwrite=True)
    assert report.states == {"embedded": 4}
    (out / "0003.tar.h5").rename(partial)
    partial.write_bytes(partial.read_bytes()[:3000])
    (out / "0002.tar.h5").unlink()
    assert run(tars, out, OwnEncoder(), store="float32").states == {"unchanged": 2, "embedded": 2}
    assert not partial.exists()
    with FeatureSet(out) as whole:
        assert (whole.n, whole.features.dtype) == (24, np.float32)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_ends_in_the_same_features(folder, mini, tmp_path):
    """kill -9 of two ranks at random moments; the set in the end is the one that a single process makes."""
    files = [(f"{i}/{name}", data) for i in range(6) for name, data in members(folder)]
    tars = write_tars(tmp_path / "tars", sorted(files), 12)
    run(tars, tmp_path / "whole", mini)
    rng = random.Random(0)
    command = [sys.executable, "-m", "protoprune", "embed", str(tars), "-o", str(tmp_path / "f"), "--encoder", "mini",
               "--device", "cpu", "--batch-size", "4", "--world-size", "2", "--rank"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    kills, wait = 0, 2.0
    for _ in range(40):
        ranks = [subprocess.Popen([*command, str(n)], stderr=subprocess.DEVNULL, env=environment) for n in (0, 1)]
        time.sleep(rng.uniform(1.0, wait))
        for process in ranks:
            if process.poll() is None and kills < 12:
                process.send_signal(signal.SIGKILL)
                kills += 1
        codes = [process.wait(120) for process in ranks]
        if codes == [0, 0]:
            break
        wait += 0.5
    assert kills >= 4
    assert codes == [0, 0]
    for one, other in zip(arrays(tmp_path / "f"), arrays(tmp_path / "whole"), strict=True):
        assert np.array_equal(one, other)
    left = [path.name for path in (tmp_path / "f").rglob("*") if path.suffix != ".h5"]
    assert left == ["set.json"]
    assert json.loads((tmp_path / "f/set.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_belong_to_no_image_are_listed_by_name(kind, folder, mini, tmp_path):
    png = members(folder)[0][1]
    files = [("a/1.png", png), ("a/1.json", b"{}"), ("a/1.txt", b"an ant"), ("b/2.heif_", png), ("b/2.json", b"{}"),
             ("README", b"about\tthis"), ("b/3.png", b"no image")]  # fmt: skip
    (tmp_path / "s").mkdir()
    write = write_tar if kind == "tar" else write_zip
    write(tmp_path / f"s/0.{kind}", files)
    write(tmp_path / f"s/1.{kind}", [("4.png", png), ("4.json", b"{}")])
    errors = tmp_path / "e.csv"
    embed = ["embed", tmp_path / "s", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu", "--errors", errors]
    expected = [
        (f"0.{kind}/b/3.png", "not an image", "b'no image' begins no image format"),
        (f"0.{kind}/README", "not an image by name", "it has no suffix and begins like no image"),
        (f"0.{kind}/b/2.heif_", "not an image by name",
         "no image has the suffix .heif_, but it begins like a PNG file: rename it"),
        (f"0.{kind}/b/2.json", "not an image by name", "no image has the suffix .json"),
    ]  # fmt: skip
    for again in (False, True):
        result = call(*embed)
        assert result.exit_code == 0, result.stderr
        said = (
            "left out 6 files that are not images by name: .json 3, (no suffix) 1, .heif_ 1, .txt 1; 3 of them belong"
        )
        assert (said in result.stderr) is not again, result.stderr
        with open(errors, newline="") as file:
            rows = [(row["path"], row["status"], row["reason"]) for row in csv.DictReader(file)]
        assert [row[:2] for row in rows] == [row[:2] for row in expected]
        assert [row[2] for row in rows[1:]] == [row[2] for row in expected[1:]]
    assert call("merge", tmp_path / "f", "-o", tmp_path / "m.h5").exit_code == 0
    assert call("embed", tmp_path / f"s/0.{kind}", "-o", tmp_path / "0.h5", "--encoder", "mini").exit_code == 0
    for name in ("f", "m.h5", "0.h5"):
        lines = call("info", tmp_path / name, "--errors").stdout.splitlines()
        assert [line.split("\t")[0] for line in lines] == [path for path, *_ in expected]
        assert "left out    3 members of shards" in call("info", tmp_path / name).stdout
    assert call("info", tmp_path / "m.h5", "--verify").exit_code == 0


def test_info_of_an_unfinished_set_vouches_for_nothing_and_lists_what_is_known(tars, mini, tmp_path):
    write_tar(tars / "0001.tar", [("ant/1.png", b"broken")])
    run(tars, tmp_path / "f", mini)
    listed = call("info", tmp_path / "f", "--errors").stdout
    assert listed.startswith("0001.tar/ant/1.png\tnot an image\t")
    plan = json.loads((tmp_path / "f/set.json").read_text())
    plan["shards"][2] = {name: plan["shards"][2][name] for name in ("name", "size", "version")}  # not noted as done
    (tmp_path / "f/set.json").write_text(json.dumps(plan))
    assert call("info", tmp_path / "f", "--errors").stdout == listed
    result = call("info", tmp_path / "f", "--verify")
    assert (result.exit_code, "f: not finished, 3 of 4 shards are done" in result.stderr) == (1, True)
    assert call("info", tmp_path / "f").exit_code == 0


def test_damage_is_found_and_mended(tars, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    before = arrays(tmp_path / "f")
    path = shard_file(str(tmp_path / "f"), "0001.tar")
    with FeatureFile(path) as file:
        offset = file._reader.file["features"].id.get_offset()
    with open(path, "r+b") as file:
        file.seek(offset + 40)
        file.write(b"\xff\xff\xff")
    with (
        FeatureSet(tmp_path / "f") as whole,
        pytest.raises(ProtopruneError, match=r"0001\.tar\.h5.*not what was written"),
    ):
        whole.features[:]
    assert call("info", tmp_path / "f", "--verify").exit_code == 1
    report = run(tars, tmp_path / "f", mini)
    assert (report.states, report.embedded) == ({"unchanged": 3, "embedded": 1}, 1)
    assert all(np.array_equal(one, other) for one, other in zip(arrays(tmp_path / "f"), before, strict=True))
    result = call("info", tmp_path / "f", "--verify")
    assert (result.exit_code, "whole" in result.stdout) == (0, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": None}, "what it says of 00.tar"), ({"rows": "6"}, "what it says of 00.tar"),
        ({"rows": 1.5}, "what it says of 00.tar"), ({"rows": 2**70}, "what it says of 00.tar"),
        ({"size": []}, "what it says of 00.tar"), ({"uuid": "ä\udc84"}, "what it says of 00.tar"),
        ({"failed": ["corrupt", "cut short"]}, "what it says of 00.tar"), ({"failed": ["x"]}, "what it says of 00.tar"),
        ({"name": "01.tar"}, "a shard is named twice"), ({"name": 7}, ""), ({"junk": 1}, "junk"), (None, "no shards"),
        ("root", "no root"), ("options", "no options"), ("key", "no key"),
    ],
)  # fmt: skip
def test_a_set_that_contradicts_itself_is_one_line(change, said, damaged_set):
    """And its shards are kept where they are whole."""
    path, whole = damaged_set / "f/set.json", (damaged_set / "f/set.json").read_bytes()
    plan = json.loads(whole)
    names = [one["name"] for one in plan["shards"]]
    if change is None:
        plan["shards"] = []
    elif isinstance(change, str):
        plan[change] = 3
    else:
        plan["shards"][0] |= change if change != {"name": "01.tar"} else {"name": names[1]}
    path.write_text(json.dumps(plan))
    try:
        for line in ("info", "select"):
            result = call(line, damaged_set / "f", *(["--keep", 0.5] if line == "select" else []))
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.count("\n") == 1
            assert (
                f"set.json: damaged ({said.replace('00.tar', names[0])}" in result.stderr or not said or said == "junk"
            )
            assert "run the same `protoprune embed` again with --overwrite" in result.stderr
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def damaged_set(folder, mini, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("damaged")
    run(str(write_tars(tmp / "tars", members(folder), 2)), tmp / "f", mini)
    return tmp


def test_the_way_on_from_a_damaged_set(folder, mini, tmp_path):
    tars = write_tars(tmp_path / "tars", members(folder), 2)
    run(str(tars), tmp_path / "f", mini)
    whole = (tmp_path / "f/set.json").read_bytes()
    (tmp_path / "f/set.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProtopruneError, match="again with --overwrite"):
        run(str(tars), tmp_path / "f", mini)
    report = run(str(tars), tmp_path / "f", mini, overwrite=True)
    assert dict(report.states) == {"unchanged": 2}
    assert (tmp_path / "f/set.json").read_bytes() == whole
    for name, rows in (("label", 12), ("features", 1)):  # what is not of single rows takes the shard's others with it
        part = sorted((tmp_path / "f").glob("*.h5"))[0]
        with h5py.File(part) as file:
            place = file[name].id.get_offset()
        data = bytearray(part.read_bytes())
        data[place] ^= 1
        part.write_bytes(data)
        assert call("info", "--verify", tmp_path / "f").exit_code == 1
        report = run(str(tars), tmp_path / "f", mini)
        assert (dict(report.states), report.embedded) == ({"unchanged": 1, "embedded": 1}, rows)
        assert call("info", "--verify", tmp_path / "f").exit_code == 0


@pytest.mark.parametrize("said", ["{", "[]", '{"size": 1, "version": 2, "status": 3, "reason": "x"}', '{"size": "1"}'])
def test_a_damaged_note_of_a_failure_is_no_failure(said, folder, mini, tmp_path):
    tars = write_tars(tmp_path / "tars", members(folder), 2)
    (tars / "0001.tar").write_bytes(b"")
    run(str(tars), tmp_path / "f", mini)
    note = tmp_path / "f/0001.tar.failed.json"
    assert json.loads(note.read_text())["status"] == "empty"
    note.write_text(said)
    report = run(str(tars), tmp_path / "f", mini)
    assert [one[:2] for one in report.failed_shards] == [("0001.tar", "empty")]
    assert json.loads(note.read_text())["status"] == "empty"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.EIO])
def test_trouble_of_the_machine_is_no_damage(number, tars, mini, tmp_path, monkeypatch):
    """Too many open files, a file server that is away: a file must not be called damaged, and made anew, for that."""
    run(tars, tmp_path / "f", mini)
    real, why = h5py.File, os.strerror(number)
    for raised in (OSError(number, why), OSError(f"unable to open file (errno = {number}, error message = 'x')")):

        def broken(*arguments, raised=raised, **options):
            raise raised

        monkeypatch.setattr(h5py, "File", broken)
        with pytest.raises(ProtopruneError) as error:
            FeatureFile(tmp_path / "f" / "0000.tar.h5")
        assert f"0000.tar.h5: cannot be read now ({why}); " in str(error.value)
        assert ("ulimit -n" in str(error.value)) == (number == errno.EMFILE)
        monkeypatch.setattr(h5py, "File", real)
    with open_shard(find_shards(tars).shards[0], str(tars / "0000.tar"), ShardOptions(), str(tars)) as images:
        asked = os.fstat
        monkeypatch.setattr(os, "fstat", lambda handle: (_ for _ in ()).throw(OSError(number, why)))
        with pytest.raises(ProtopruneError, match="cannot be read now"):
            FeatureFile(tmp_path / "f" / "0000.tar.h5")
        with pytest.raises(ImageError, match=why) as image:
            images.read(0)
        assert image.value.status == Status.UNREADABLE
        monkeypatch.setattr(os, "fstat", asked)
    run(tars, tmp_path / "f", mini)  # nothing of it stayed open
    with FeatureSet(tmp_path / "f") as whole:
        monkeypatch.setattr(os, "dup", lambda handle: (_ for _ in ()).throw(OSError(number, why)))
        with pytest.raises(ProtopruneError, match=r"cannot be read now"):
            list(whole.paths)
    monkeypatch.setattr(featureset, "_OPEN_FILES", 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "wb"))
    monkeypatch.setattr(os, "dup", DUP)
    with FeatureSet(tmp_path / "f") as whole, pytest.raises(ProtopruneError, match=r"cannot write the names .* TMPDIR"):
        list(whole.paths)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of descriptors here")
def test_parts_that_are_closed_hold_no_descriptors(folder, tmp_path, monkeypatch):
    """Not even until the next look for circles: a set of thousands of shards would run out of them."""
    tars = write_tars(tmp_path / "tars", members(folder), 6)
    run(tars, tmp_path / "f", OwnEncoder())
    monkeypatch.setattr(featureset, "_OPEN_FILES", 1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        whole = FeatureSet(tmp_path / "f")
        rows = np.arange(24)[::-1]
        assert np.array_equal(whole.features[rows], whole.features[:][rows])
        assert len(list(whole.paths)) == 24
        assert whole.usable.all()
        assert len(os.listdir("/proc/self/fd")) <= before + 5  # of one part, and of the names of all
        whole.close()
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    finally:
        gc.enable()


def test_times_before_1970_and_after_2262_are_times_as_others_are(tmp_path):
    """Of files from broken clocks and archives: they do not fit into 64 bits of nanoseconds, or are negative."""
    folder = image_folder(tmp_path / "images", {"ant": 1, "bee": 1})
    tar = write_tar(tmp_path / "s.tar", members(folder))
    for when in (-315_619_200, 10_413_792_000):
        for path in (*folder.rglob("*.png"), tar):
            os.utime(path, (when, when))
        report = embed(list_folder(folder), OwnEncoder(), tmp_path / "f.h5", device="cpu")
        assert (report.n, report.failed, report.unchanged) == (2, 0, 0 if when < 0 else 2)
        assert run(tar, tmp_path / "f", OwnEncoder()).states == {"embedded": 1}
        assert run(tar, tmp_path / "f", OwnEncoder()).states == {"unchanged": 1}


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet"])
def test_a_shard_that_is_written_while_it_is_read(kind, folder, tmp_path):
    """In its place, and of the same size: what is read afterwards is of another one."""
    write = {"tar": write_tar, "zip": write_zip, "parquet": write_parquet}[kind]
    path = write(tmp_path / f"s.{kind}", members(folder))
    before = path.read_bytes()
    with open_shard(find_shards(path).shards[0], str(path), ShardOptions(), str(tmp_path)) as images:
        assert images.read(0)
        with open(path, "r+b") as file:
            file.write(before)
        os.utime(path, (1, 1))
        with pytest.raises(ImageError, match="the shard changed while it was read") as error:
            images.read(1)
    assert error.value.status == Status.CHANGED


def test_rows_that_set_json_has_wrong_are_put_right(tars, mini, tmp_path):
    """By the same `embed`, as the message says: the files know how many they have."""
    run(tars, tmp_path / "f", mini)
    path = tmp_path / "f" / "set.json"
    whole = path.read_text()
    path.write_text(re.sub(r'"rows": (\d+)', r'"rows": 1\1', whole, count=1))
    with pytest.raises(
        ProtopruneError, match=r"not the file that .*set.json names; .* else the same `protoprune embed`"
    ):
        FeatureSet(tmp_path / "f")
    assert run(tars, tmp_path / "f", mini).embedded == 0
    assert path.read_text() == whole


def test_classes_that_a_later_run_takes_from_elsewhere_are_told_once(tars, tmp_path):
    """They were told for each shard, with advice that is for images, and not at all of a key of .json."""
    run(tars, tmp_path / "f", OwnEncoder(), options=ShardOptions(class_level=1))
    with pytest.warns(ProtopruneWarning, match="had the classes of --class-level 1, and is given those of the") as told:
        assert run(tars, tmp_path / "f", OwnEncoder()).embedded == 0
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tars, tmp_path / "f", OwnEncoder())
