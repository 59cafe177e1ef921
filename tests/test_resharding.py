"""New tars of what a list keeps: the right images with what lies beside them, whole or not there, from every source."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from helpers import encoded, picture
from shard_helpers import image_folder, members, write_parquet, write_tar, write_tars, write_zip
from typer.testing import CliRunner

import protoprune
from protoprune import lists
from protoprune.cli import app
from protoprune.errors import ProtopruneError, UsageError
from protoprune.report import page
from protoprune.shards.resharding import PLAN, reshard
from protoprune.sources import ShardError, open_shard
from protoprune.sources.finding import Shard

PLACES = ("shards", "f", "kept.txt", "out")


def tars(folder) -> list[Path]:
    return sorted(Path(folder).glob("*.tar"))


def content(folder) -> dict[str, bytes]:
    """name -> bytes of all members of all tars."""
    found = {}
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file: what must not be touched."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", {"ant": 4, "bee": 3}, side=12)


def test_from_a_folder_with_what_lies_beside(folder, tmp_path):
    (folder / "ant/001.txt").write_text("an ant")
    (folder / "ant/002.json").write_text("{}")
    (folder / "ant/001.npy").write_bytes(b"not ours")
    (folder / "ant/003.cls").write_text("7")  # of an image that is not kept
    before = snapshot(folder)
    kept = ["ant/001.png", "ant/002.png", "bee/000.png"]
    (tmp_path / "kept.txt").write_text("".join(f"{path}\n" for path in kept))
    report = reshard(tmp_path / "kept.txt", tmp_path / "out", root=folder, shard_size=2)
    assert (report.images, report.shards, report.there, report.others) == (3, 2, 0, 2)
    assert [path.name for path in tars(tmp_path / "out")] == ["00000.tar", "00001.tar"]
    assert content(tmp_path / "out") == {
        **{path: (folder / path).read_bytes() for path in kept}, "ant/001.txt": b"an ant", "ant/002.json": b"{}",
    }  # fmt: skip
    assert snapshot(folder) == before


def test_from_tars_whose_keys_repeat(tmp_path):
    """Each shard has 000000.jpg with a caption, as img2dataset writes them; and one image has a mask."""
    for number in range(3):
        files = []
        for i in range(4):
            color = encoded(picture(8, 8, 10 * number + i), "PNG")
            files += [(f"{i:06d}.png", color), (f"{i:06d}.txt", f"{number} {i}".encode())]
            files += [(f"{i:06d}.json", json.dumps({"label": f"l{number}", "uid": i}).encode())]
        files += [("000001.mask.png", b"mask"), ("000003.left.png", b"left"), ("000003.right.png", b"right")]
        write_tar(tmp_path / "in" / f"{number:05d}.tar", files)
    before = snapshot(tmp_path / "in")
    kept = ["00000.tar/000001.png", "00001.tar/000001.png", "00001.tar/000003.left.png", "00002.tar/000000.png"]
    reshard(kept, tmp_path / "out", root=tmp_path / "in")
    found = content(tmp_path / "out")
    assert set(found) == {
        "00000_000001.png", "00000_000001.mask.png", "00000_000001.txt", "00000_000001.json",
        "00001_000001.png", "00001_000001.mask.png", "00001_000001.txt", "00001_000001.json",
        "00001_000003.left.png", "00001_000003.txt", "00001_000003.json",
        "00002_000000.png", "00002_000000.txt", "00002_000000.json",
    }  # fmt: skip
    assert found["00001_000001.txt"] == b"1 1"
    assert found["00001_000001.png"] == encoded(picture(8, 8, 11), "PNG")
    assert snapshot(tmp_path / "in") == before


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "hf parquet"])
def test_every_kind_of_shard_gives_the_same_images_and_classes(folder, tmp_path, kind):
    files = members(folder)
    source = tmp_path / "in"
    source.mkdir()
    if kind in ("tar", "tar.gz"):
        write_tars(source, files, 2, f".{kind}")
        spec = source
    elif kind == "zip":
        spec = write_zip(source / "all.zip", files)
    else:
        pytest.importorskip("pyarrow")
        spec = write_parquet(source / "part-0.parquet", files, "hf" if kind == "hf parquet" else "binary")
    run = CliRunner()
    assert run.invoke(app, ["embed", str(spec), "--encoder", "mini", "-o", str(tmp_path / "set")]).exit_code == 0
    command = ["select", str(tmp_path / "set"), "--keep", "0.5", "--k", "2", "-o", str(tmp_path / "kept.txt")]
    result = run.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    command = [
        "reshard",
        str(tmp_path / "kept.txt"),
        str(out),
        "--features",
        str(tmp_path / "set"),
        "--shard-size",
        "3",
    ]
    result = run.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    kept = protoprune.read_list(tmp_path / "kept.txt")
    assert f"{out}: {len(kept)} images in 2 tars" in result.stderr
    by_name = dict(files)
    if "parquet" in kind:
        want = [files[int(path.rpartition("/")[2])][1] for path in kept]
    else:
        want = [by_name[path.partition("/")[2]] for path in kept]
    found = content(out)
    assert sorted(data for name, data in found.items() if name.endswith(".png")) == sorted(want)
    assert run.invoke(app, ["embed", str(out), "--encoder", "mini", "-o", str(tmp_path / "again")]).exit_code == 0
    with protoprune.FeatureSet(tmp_path / "again") as again, protoprune.FeatureSet(tmp_path / "set") as before:
        rows = [list(before.paths).index(path) for path in kept]
        assert again.classes == before.classes == ["ant", "bee"]
        assert sorted(map(tuple, again.features[:].tolist())) == sorted(map(tuple, before.features[:][rows].tolist()))
        labels = {tuple(x): label for x, label in zip(before.features[:].tolist(), before.labels.tolist(), strict=True)}
        for x, label in zip(again.features[:].tolist(), again.labels.tolist(), strict=True):
            assert labels[tuple(x)] == label


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to garbage collection
def test_the_loaders_of_others_read_them(folder, tmp_path):
    wds = pytest.importorskip("webdataset")
    classes = [(f"{name[:-4]}.cls", str(int(name.startswith("bee"))).encode()) for name, _ in members(folder)]
    write_tars(tmp_path / "in", [*members(folder), *classes], 1)
    kept = ["0000.tar/ant/001.png", "0000.tar/ant/003.png", "0000.tar/bee/001.png"]
    reshard(kept, tmp_path / "out", root=tmp_path / "in", shard_size=2)
    pattern = str(tmp_path / "out" / "{00000..00001}.tar")
    samples = list(wds.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    assert [one["__key__"] for one in samples] == ["ant/0000_001", "ant/0000_003", "bee/0000_001"]
    assert [one.get("cls") for one in samples] == [0, 0, 1]
    assert samples[0]["png"].shape == (8, 12, 3)
    datasets = pytest.importorskip("datasets")
    read = datasets.load_dataset(
        "webdataset", data_files=[str(tmp_path / "out/00000.tar")], split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [one["__key__"] for one in read] == ["ant/0000_001", "ant/0000_003"]


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to garbage collection
def test_a_set_as_datacomp_has_it(tmp_path):
    """Tars of image, caption and metadata, and beside each a Parquet file of all uids, also of images that are gone."""
    wds, pyarrow = pytest.importorskip("webdataset"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    uid_of = {f"{shard:05d}{number:04d}": f"{shard:016x}{number:016x}" for shard in range(2) for number in range(6)}
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        rows = [(key, uid) for key, uid in uid_of.items() if int(key[:5]) == shard]
        files = []
        for key, uid in rows[:5]:  # the last one could not be downloaded
            meta = json.dumps({"uid": uid, "key": key, "caption": f"number {key}"}).encode()
            image = encoded(picture(seed=int(key), width=16, height=12), "JPEG")
            files += [(f"{key}.jpg", image), (f"{key}.json", meta), (f"{key}.txt", f"number {key}".encode())]
        write_tar(tmp_path / f"shards/{shard:05d}.tar", files)
        table = pyarrow.table({"uid": [uid for _, uid in rows], "key": [key for key, _ in rows]})
        parquet.write_table(table, tmp_path / f"shards/{shard:05d}.parquet")
        (tmp_path / f"shards/{shard:05d}_stats.json").write_text("{}")
    before = snapshot(tmp_path / "shards")
    for arguments in (
        ["embed", "shards", "-o", "f", "--encoder", "mini", "--device", "cpu"],
        ["select", "f", "--keep", "0.5", "-o", "kept.txt"],
        ["reshard", "kept.txt", "out", "--features", "f", "--shard-size", "3"],
    ):
        result = CliRunner().invoke(app, [str(tmp_path / one) if one in PLACES else one for one in arguments])
        assert result.exit_code == 0, result.stderr
    kept = (tmp_path / "kept.txt").read_text().split()
    assert len(kept) == 5
    pattern = str(tmp_path / "out" / "{00000..00001}.tar")
    samples = list(wds.WebDataset(pattern, shardshuffle=False))
    assert [json.loads(one["json"])["uid"] for one in samples] == [uid_of[name[-13:-4]] for name in kept]
    assert [one["txt"].decode() for one in samples] == [f"number {name[-13:-4]}" for name in kept]
    for one, name in zip(samples, kept, strict=True):
        with tarfile.open(tmp_path / "shards" / name.split("/")[0]) as tar:
            assert one["jpg"] == tar.extractfile(name.split("/")[1]).read()
    assert snapshot(tmp_path / "shards") == before


def test_a_second_run_does_only_the_rest_and_gives_the_same_bytes(folder, tmp_path):
    kept = [f"{name}/{i:03d}.png" for name, count in (("ant", 4), ("bee", 3)) for i in range(count)]
    reshard(kept, tmp_path / "whole", root=folder, shard_size=2)
    reshard(kept, tmp_path / "out", root=folder, shard_size=2)
    (tmp_path / "out/00001.tar").unlink()
    (tmp_path / "out/00003.tar").unlink()
    (tmp_path / "out/00001.tar.partial").write_bytes(b"left by a killed run")
    report = reshard(kept[::-1], tmp_path / "out", root=folder, shard_size=2)
    assert (report.shards, report.there) == (4, 2)
    for one in tars(tmp_path / "whole"):
        assert one.read_bytes() == (tmp_path / "out" / one.name).read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*(one.name for one in tars(tmp_path / "whole")), PLAN])


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    folder = image_folder(tmp_path / "images", {"ant": 60, "bee": 60}, side=40)
    kept = [name for name, _ in members(folder)]
    (tmp_path / "kept.txt").write_text("".join(f"{path}\n" for path in kept))
    command = [
        sys.executable,
        "-m",
        "protoprune",
        "reshard",
        "kept.txt",
        "out",
        "--root",
        "images",
        "--shard-size",
        "4",
    ]
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    reshard(kept, tmp_path / "whole", root=folder, shard_size=4)
    rng, kills = np.random.default_rng(0), 0
    for _ in range(60):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        started = time.monotonic()
        while (
            process.poll() is None
            and not list((tmp_path / "out").glob("*.partial"))
            and time.monotonic() < started + 60
        ):
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.02)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
        for one in tars(tmp_path / "out"):
            assert one.read_bytes() == (tmp_path / "whole" / one.name).read_bytes()
    assert kills
    assert subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE).returncode == 0
    for one in tars(tmp_path / "whole"):
        assert one.read_bytes() == (tmp_path / "out" / one.name).read_bytes()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_keys_are_not_parted_and_names_without_a_suffix_get_one(tmp_path):
    png, jpeg = encoded(picture(8, 8, 1), "PNG"), encoded(picture(8, 8, 2), "JPEG")
    files = [("a.1.png", png), ("a.2.png", png), ("a.3.png", png), ("b", jpeg), ("ünï.png", png)]
    odd = os.fsdecode(b"caf\xe9.png")
    write_tar(tmp_path / "in/x.y.tar", files)
    kept = [f"x.y.tar/{name}" for name, _ in files]
    reshard(kept, tmp_path / "out", root=tmp_path / "in", shard_size=2)
    names = [list(content_of(path)) for path in tars(tmp_path / "out")]
    assert names == [["x-y_a.1.png", "x-y_a.2.png", "x-y_a.3.png"], ["x-y_b.jpg", "x-y_ünï.png"]]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / odd).write_bytes(png)
    reshard([odd], tmp_path / "odd", root=tmp_path / "plain")
    with tarfile.open(tmp_path / "odd/00000.tar", encoding="utf-8", errors="surrogateescape") as tar:
        assert tar.getnames() == [odd]


def content_of(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_images_of_tars_are_called_by_what_their_json_says(tmp_path, kind):
    """DataComp's tars: the uid is in the .json beside each image, and what is kept is named by uids."""
    pictures = {f"0000{i}": encoded(picture(8, 8, i), "JPEG") for i in range(3)}
    uids = {key: f"{255 - i:032x}" for i, key in enumerate(pictures)}
    files = []
    for key, data in pictures.items():
        about = {"uid": uids[key], "label": "ant", "meta": {"sku": key[-1]}}
        files += [(f"{key}.jpg", data), (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", key.encode())]
    path = (write_tar if kind == "tar" else write_zip)(tmp_path / f"in.{kind}", files)
    options = protoprune.sources.ShardOptions(id_column="uid")
    with open_shard(Shard(path.name, str(path), 0, 0), str(path), options, str(tmp_path)) as images:
        assert images.paths == [f"in.{kind}/{uids[key]}.jpg" for key in reversed(pictures)]
        assert [images.read(row) for row in range(3)] == list(pictures.values())[::-1]
        assert dict(images.beside(f"{uids['00001']}.jpg"))[f"{uids['00001']}.txt"] == b"00001"
        assert images.classes == ["ant"]
        kept = images.paths[1:]
    lists.check_list(kept, np.arange(2), "datacomp")  # as `select --format datacomp` does
    reshard(kept, tmp_path / "out", root=tmp_path, options=options)
    found = content(tmp_path / "out")
    assert {name.partition("_")[2]: data for name, data in found.items() if not name.endswith(".json")} == {
        f"{uids[key]}.{suffix}": data
        for key in ("00000", "00001") for suffix, data in (("jpg", pictures[key]), ("txt", key.encode()))
    }  # fmt: skip
    for column, said in {"sku": "is in no .json beside it", "label": "two images have one label"}.items():
        with pytest.raises(ShardError, match=said):
            open_shard(Shard("x", str(path), 0, 0), str(path), protoprune.sources.ShardOptions(id_column=column), "/")
    options = protoprune.sources.ShardOptions(id_column="meta.sku")
    with open_shard(Shard("x", str(path), 0, 0), str(path), options, "/") as images:
        assert images.paths == ["x/0.jpg", "x/1.jpg", "x/2.jpg"]


def test_rows_whose_ids_have_dots_are_samples_of_their_own(tmp_path):
    """The ids `u.0.v2`, `u.1.v2`, … have one WebDataset key, URLs two slashes; every row keeps its columns, a second
    column of images too."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    jpeg = [encoded(picture(8, 8, seed), "JPEG") for seed in range(6)]
    png = [encoded(picture(8, 8, seed), "PNG") for seed in range(6)]
    ids = ["u.0.v2", "u.1.v2", "u.left", "u", "https://h.example/a.b/x.jpg?w=1.5", "u.jpg"]
    masks = [{"bytes": data, "path": None} for data in png[:5]] + [None]
    table = pyarrow.table({"image": jpeg, "id": ids, "mask": masks, "score": [0.5, float("nan"), None, 1.0, 2.0, 3.0]})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in/p.parquet")
    options = protoprune.sources.ShardOptions(id_column="id")
    kept = [f"p.parquet/{one}" for one in ids]
    report = reshard(kept, tmp_path / "out", root=tmp_path / "in", options=options, shard_size=3)
    assert (report.images, report.shards, report.others, report.fields) == (6, 2, 11, {"jpg": 6})
    found = content(tmp_path / "out")
    keys = ["p_u_0_v2", "p_u_1_v2", "p_u_left", "p_u", "https:/h.example/a.b/p_x_jpg?w=1_5", "p_u_jpg"]
    for place, key in enumerate(keys):
        assert found[f"{key}.jpg"] == jpeg[place]
        assert found.get(f"{key}.mask.png") == (png[place] if place < 5 else None)
        columns = json.loads(found[f"{key}.json"].decode(), parse_constant=pytest.fail)  # NaN is no JSON
        assert columns == {"id": ids[place], "score": [0.5, None, None, 1.0, 2.0, 3.0][place]}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_names_with_dots_that_were_not_made_for_webdataset(tmp_path, kind):
    """Photographs and scans: one key for many, of which a loader would take one, with the captions of others."""
    images = {
        name: encoded(picture(8, 8, seed), name.rpartition(".")[2].upper().replace("JPG", "JPEG"))
        for seed, name in enumerate(
            ["d/s.1.jpg", "d/s.2.jpg", "d/s.2.png", "d/v.left.png", "d/v.right.png", "d/w.jpg", "d/x.9.JPG"]
        )
    }
    others = {
        "d/s.1.txt": b"one",
        "d/s.2.txt": b"two",
        "d/s.cls": b"3",
        "d/s.2.cls": b"4",
        "d/v.json": b"{}",
        "d/w.txt": b"w",
        "d/w.1.txt": b"of w too",
    }
    if kind == "zip":
        (tmp_path / "in").mkdir()
        write_zip(tmp_path / "in/z.zip", [*images.items(), *others.items()])
    for name, data in {**images, **others}.items() if kind == "folder" else ():
        (tmp_path / "in/d").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    kept = [name for name in images if name != "d/w.jpg"]
    report = reshard(
        [f"z.zip/{name}" for name in kept] if kind == "zip" else kept, tmp_path / "out", root=tmp_path / "in"
    )
    z = "z_" if kind == "zip" else ""
    assert content(tmp_path / "out") == {
        f"d/{z}s_1.jpg": images["d/s.1.jpg"], f"d/{z}s_1.txt": b"one", f"d/{z}s_1.cls": b"3",
        f"d/{z}s_2.jpg": images["d/s.2.jpg"], f"d/{z}s_2.txt": b"two", f"d/{z}s_2.cls": b"4",
        f"d/{z}s_2_png.png": images["d/s.2.png"], f"d/{z}s_2_png.txt": b"two", f"d/{z}s_2_png.cls": b"4",
        f"d/{z}v.left.png": images["d/v.left.png"], f"d/{z}v.right.png": images["d/v.right.png"], f"d/{z}v.json": b"{}",
        f"d/{z}x_9.JPG": images["d/x.9.JPG"],
    }  # fmt: skip
    assert report.fields == {"jpg": 3, "png": 1, "left.png": 1, "right.png": 1}
    with tarfile.open(tmp_path / "out/00000.tar") as tar:  # the files of a sample stand together
        keys = [re.match(r"[^.]*", name)[0] for name in tar.getnames()]
    assert len(list(itertools.groupby(keys))) == len(set(keys)) == 5


def test_from_an_object_store(folder, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    write_tars(tmp_path / "in", members(folder), 2)
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "in").iterdir():
        store.pipe_file(f"/reshard/in/{path.name}", path.read_bytes())
    kept = ["0000.tar/ant/001.png", "memory://reshard/in/0001.tar/bee/002.png"]
    reshard(kept, tmp_path / "out", root="memory://reshard/in")
    want = {"ant/0000_001.png": folder / "ant/001.png", "bee/0001_002.png": folder / "bee/002.png"}
    assert content(tmp_path / "out") == {name: path.read_bytes() for name, path in want.items()}
    with pytest.raises(ProtopruneError, match=r"0007\.tar: missing: no such shard on the store"):
        reshard(["0007.tar/a.png"], tmp_path / "gone", root="memory://reshard/in")


def test_two_shards_whose_names_are_alike_stay_apart(tmp_path):
    png = [encoded(picture(8, 8, seed), "PNG") for seed in range(3)]
    for number, name in enumerate(("a/b.tar", "a-b.tar", "a.b.zip")):
        (write_zip if name.endswith("zip") else write_tar)(tmp_path / "in" / name, [("0.png", png[number])])
    reshard(["a/b.tar/0.png", "a-b.tar/0.png", "a.b.zip/0.png"], tmp_path / "out", root=tmp_path / "in")
    assert content(tmp_path / "out") == {"a-b_0.png": png[1], "a-b-2_0.png": png[2], "a-b-3_0.png": png[0]}


def test_lists_in_other_forms(folder, feature_file, tmp_path):
    paths = ["ant/000.png", "ant/001.png", "bee/002.png"]
    feature_file(tmp_path / "f.h5", np.eye(3), paths=paths, root=folder)
    np.save(tmp_path / "kept.npy", np.array([2, 0]))
    reshard(tmp_path / "kept.npy", tmp_path / "a", features=tmp_path / "f.h5")
    assert list(content(tmp_path / "a")) == ["ant/000.png", "bee/002.png"]
    reshard([str(folder / path) for path in paths[:2]], tmp_path / "b")  # absolute: below their common folder
    assert list(content(tmp_path / "b")) == ["000.png", "001.png"]
    reshard(["./ant//000.png", str(folder / paths[2])], tmp_path / "c", root=folder)
    assert list(content(tmp_path / "c")) == ["ant/000.png", "bee/002.png"]
    (tmp_path / "all.csv").write_text("path,keep\nant/000.png,1\nant/001.png,0\nbee/002.png,1\n")
    reshard(tmp_path / "all.csv", tmp_path / "d", root=folder)
    assert list(content(tmp_path / "d")) == ["ant/000.png", "bee/002.png"]


def test_what_is_refused(folder, tmp_path):
    kept, out = ["ant/000.png"], tmp_path / "out"
    for error, message, arguments in (
        (UsageError, "give --root, the folder", {"kept": kept}),
        (UsageError, "lists no image", {"kept": [], "root": folder}),
        (UsageError, "ant/000.png is listed more than once", {"kept": [*kept, "./ant/000.png"], "root": folder}),
        (UsageError, r"\.\./x\.png is not below", {"kept": ["../x.png"], "root": folder}),
        (UsageError, "/etc/passwd is not below", {"kept": ["/etc/passwd"], "root": folder}),
        (UsageError, "--shard-size 0: expected at least 1", {"kept": kept, "root": folder, "shard_size": 0}),
        (
            UsageError,
            "--id-column x: is for shards",
            {"kept": kept, "root": folder, "options": protoprune.sources.ShardOptions(id_column="x")},
        ),
        (ProtopruneError, "gone.png: No such file", {"kept": ["ant/gone.png"], "root": folder}),
    ):
        with pytest.raises(error, match=message):
            reshard(out=out, **arguments)
    assert not tars(out)
    np.save(tmp_path / "kept.npy", np.array([0]))
    with pytest.raises(UsageError, match="give --features, whose rows they count"):
        reshard(tmp_path / "kept.npy", tmp_path / "n", root=folder)
    reshard(kept, tmp_path / "one", root=folder)
    with pytest.raises(UsageError, match="holds shards of another list; name a new folder"):
        reshard(["ant/001.png"], tmp_path / "one", root=folder)
    with pytest.raises(UsageError, match="holds shards of another size; name"):
        reshard(kept, tmp_path / "one", root=folder, shard_size=3)
    with pytest.raises(UsageError, match=r"holds other things \(ant\)"):
        reshard(kept, folder, root=folder)
    write_tar(folder / "ant.tar", members(folder))
    shutil.copy(folder / "bee/000.png", folder / "ant/ant_000.png")  # which is what ant/000.png of ant.tar becomes
    with pytest.raises(ProtopruneError, match=r"ant/ant_000\.png: two files of the list would have this name"):
        reshard(["ant.tar/ant/000.png", "ant/ant_000.png"], tmp_path / "twice", root=folder)
    assert not tars(tmp_path / "twice")


def test_a_wrong_root_can_be_put_right(folder, tmp_path):
    """What was refused has not made the folder another list's; where a tar is, it is."""
    for wrong in ({"kept": ["ant/gone.png"], "root": folder}, {"kept": ["ant/001.png"], "root": tmp_path}):
        with pytest.raises(ProtopruneError, match="No such file"):
            reshard(out=tmp_path / "new", **wrong)
    assert reshard(["ant/001.png"], tmp_path / "new", root=folder, shard_size=np.int64(7)).images == 1
    assert list(content(tmp_path / "new")) == ["ant/001.png"]
    assert json.loads((tmp_path / "new" / PLAN).read_text())["root"] == str(folder)
    with pytest.raises(UsageError, match="holds shards of another list"):
        reshard(["ant/002.png"], tmp_path / "new", root=folder, shard_size=7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other things"):
        reshard(["ant/001.png"], tmp_path / "mine", root=folder)
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_shard_that_changed_is_said_and_leaves_no_half_tar(folder, tmp_path):
    write_tars(tmp_path / "in", members(folder), 1)
    with pytest.raises(ProtopruneError, match=r"0000.tar/ant/9.png: not in its shard any more"):
        reshard(["0000.tar/ant/000.png", "0000.tar/ant/9.png"], tmp_path / "out", root=tmp_path / "in")
    assert not (tmp_path / "out").exists()  # it was new, and nothing came of it
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProtopruneError, match=r"9.png: not in its shard any more"):
        reshard(["0000.tar/ant/000.png", "0000.tar/ant/9.png"], tmp_path / "empty", root=tmp_path / "in", shard_size=1)
    assert sorted(os.listdir(tmp_path / "empty")) == ["00000.tar", PLAN]  # the whole tar is kept, to go on from
    data = (tmp_path / "in/0000.tar").read_bytes()
    (tmp_path / "in/0000.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ProtopruneError, match=r"0000.tar: truncated: cut off"):
        reshard(["0000.tar/ant/000.png"], tmp_path / "other", root=tmp_path / "in")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "parquet"])
def test_another_image_of_the_same_name_is_not_taken_for_it(folder, tmp_path, kind):
    """A table that was written anew in another order has the same row numbers, and a file that was replaced its name:
    with the features, the content decides. The pictures of `sheet` and `report` go by it too."""
    files, place = members(folder), tmp_path / "in"

    def pack(files):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if kind == "parquet":
            pytest.importorskip("pyarrow")
            write_parquet(place / "p.parquet", files)
        elif kind == "tar":
            write_tar(place / "t.tar", files)
        elif kind == "zip":
            write_zip(place / "z.zip", files)
        for name, data in files if kind == "folder" else ():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)

    pack(files)
    out = tmp_path / ("f.h5" if kind == "folder" else "f")
    result = CliRunner().invoke(app, ["embed", str(place), "-o", str(out), "--encoder", "mini", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    paths = list(protoprune.select(out, 1.0, k=2).ranking.paths)
    pack([files[0], *([(name, data) for (name, _), (_, data) in zip(files[1:], files[:0:-1], strict=True)])])
    assert reshard(paths[:1], tmp_path / "one", features=out).images == 1  # this one is as it was
    with pytest.raises(ProtopruneError, match=f"{paths[1]}: is another image than the one that was embedded"):
        reshard(paths[:2], tmp_path / "out", features=out)
    with pytest.raises(ProtopruneError, match="is another image"):
        reshard(paths[1:2], tmp_path / "out", features=out, root=place)
    assert not tars(tmp_path / "out")
    reshard(paths[:2], tmp_path / "out", root=place)  # without features nothing says what it was
    result = CliRunner().invoke(app, ["sheet", str(out), "--k", "2", "--count", "3", "-o", str(tmp_path / "s.png")])
    assert "could not be read any more, or changed since" in result.stderr
    _, told = page(protoprune.select(out, 0.5, k=2))
    assert told["missing"] == len(paths) - 1


def test_weights_that_stay_behind_are_said(folder, tmp_path):
    (tmp_path / "kept.csv").write_text("path,weight\nant/000.png,1.5\n")
    result = CliRunner().invoke(
        app, ["reshard", str(tmp_path / "kept.csv"), str(tmp_path / "out"), "--root", str(folder)]
    )
    assert result.exit_code == 0, result.stderr
    assert "the weights of" in result.stderr
    inside = ["reshard", str(tmp_path / "kept.csv"), str(folder / "new"), "--root", str(folder)]
    assert "lies in the folder of the images" in CliRunner().invoke(app, inside).stderr


def test_columns_of_a_table_go_along_as_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    png = [encoded(picture(8, 8, seed), "PNG") for seed in range(3)]
    table = pyarrow.table({
        "jpg": png, "text": ["a", "b", None], "score": [0.5, 1.5, 2.5], "thumb": [b"x"] * 3, "tags": [["q"], [], None],
        "id": ["one", "two", "three"],
    })  # fmt: skip
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in/p.parquet", row_group_size=2)
    reshard(["p.parquet/000002", "p.parquet/000000"], tmp_path / "out", root=tmp_path / "in")
    found = content(tmp_path / "out")
    assert found["p_000000.png"] == png[0]
    assert found["p_000000.thumb.bin"] == b"x"
    assert json.loads(found["p_000002.json"]) == {"text": None, "score": 2.5, "tags": None, "id": "three"}
    options = protoprune.sources.ShardOptions(id_column="id")
    reshard(["p.parquet/two"], tmp_path / "ids", root=tmp_path / "in", options=options)
    found = content(tmp_path / "ids")
    assert found["p_two.png"] == png[1]
    assert json.loads(found["p_two.json"])["text"] == "b"
    assert io.BytesIO(found["p_two.png"]).read(4) == b"\x89PNG"


def test_few_tars_are_few_workers(image_tree, tmp_path):
    """timm's reader leaves out the share of a worker that has no tar (1.0.31), and WebDataset wants one for each."""
    root = image_tree({"cat": 5, "dog": 6})
    kept = tmp_path / "kept.txt"
    kept.write_text("".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*.png"))))
    command = ["reshard", str(kept), str(tmp_path / "one"), "--root", str(root)]
    result = CliRunner().invoke(app, command)
    assert "hint: a loader deals out whole tars: 1 tar keeps 1 worker busy, of all" in result.stderr
    assert "--shard-size 2 makes about 8 tars" in result.stderr
    several = CliRunner().invoke(app, [*command[:2], str(tmp_path / "several"), *command[3:], "--shard-size", "1"])
    assert "11 images in 11 tars" in several.stderr
    assert "hint" not in several.stderr


def test_classes_that_are_folders_alone_stay_in_the_keys(image_tree, tmp_path):
    """timm's reader asks for .cls, passes over samples without it, and trains on nothing."""
    root = image_tree({"cat": 2, "dog": 2})
    (tmp_path / "kept.txt").write_text("cat/000.png\ndog/001.png\n")
    command = ["reshard", str(tmp_path / "kept.txt"), str(tmp_path / "out"), "--root", str(root)]
    said = "a class that is a folder stands in the key: sample['__key__'].split('/')[0]"
    assert said in CliRunner().invoke(app, command).stderr
    assert [name.split("/")[0] for name in content(tmp_path / "out")] == ["cat", "dog"]
    assert said not in CliRunner().invoke(app, command).stderr  # was there already
    for number, path in enumerate(("cat/000.cls", "dog/001.cls")):
        (root / path).write_text(str(number))
    again = CliRunner().invoke(app, [*command[:2], str(tmp_path / "labelled"), *command[3:]])
    assert "2 other files went with them" in again.stderr
    assert said not in again.stderr
