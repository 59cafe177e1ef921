"""Kept lists: any file name comes back, files appear whole or not at all, links and loaders hold exactly the list."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from helpers import encoded, picture
from hypothesis import example, given
from hypothesis import strategies as st

from protoprune import lists
from protoprune.errors import ProtopruneError, UsageError
from protoprune.lists import (
    format_list,
    keep_only,
    manifest,
    read_list,
    read_weights,
    weights_of,
    write_file,
    write_links,
)

# Any name that Linux allows: every byte except the slash and NUL.
names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda b: b.translate(None, b"/\0"))
    .filter(lambda b: b not in (b"", b".", b".."))
)
paths_of = st.lists(
    st.lists(names, min_size=1, max_size=3).map(lambda parts: os.fsdecode(b"/".join(parts))), unique=True, max_size=8
)
NASTY = [
    "a b.png",
    "new\nline.png",
    "ends\r",
    "\r",
    "caf\udce9.png",
    'quo"te,comma;.png',
    "=1+1",
    "#x",
    "\x01\x7f",
    "\ufeff",
]


def written(paths, format, folder, null=False) -> str:
    scores = np.arange(len(paths), dtype=np.float32) / 3
    data = format_list(paths, np.arange(len(paths)) * 2, scores, format, null=null)
    path = os.path.join(folder, f"list.{format}")
    with open(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize(("format", "null"), [("txt", True), ("jsonl", False), ("csv", False)])
def test_any_name_comes_back(tmp_path, format, null):
    @example(NASTY)
    @example([])
    @given(paths_of)
    def check(paths):
        assert read_list(written(paths, format, tmp_path, null)) == paths

    check()


def test_lines_hold_every_name_but_those_with_a_line_break(tmp_path):
    @example(NASTY)
    @example(["one\r"])
    @example(["\ufeffmark.png"])
    @given(paths_of)
    def check(paths):
        if any("\n" in path or path.endswith("\r") for path in paths):
            with pytest.raises(UsageError, match=r"line break.*use -0"):
                written(paths, "txt", tmp_path)
        else:
            assert read_list(written(paths, "txt", tmp_path)) == paths

    check()


def test_arrays_hold_row_indices(tmp_path):
    assert read_list(written(["a", "b", "c"], "npy", tmp_path)).tolist() == [0, 2, 4]
    assert read_list(written([], "npy", tmp_path)).dtype == np.int64


def test_bytes_of_each_format():
    arguments = (["a/1.png", "b,2.png"], np.array([0, 7]), np.array([0.1, np.nan], np.float32))
    assert format_list(*arguments) == b"a/1.png\nb,2.png\n"
    assert format_list(*arguments, null=True) == b"a/1.png\0b,2.png\0"
    assert format_list(*arguments, "csv") == b'path,index,score\na/1.png,0,0.1\n"b,2.png",7,\n'
    first, second = format_list(*arguments, "jsonl").splitlines()
    assert json.loads(first) == {"path": "a/1.png", "index": 0, "score": 0.1}
    assert json.loads(second)["score"] in ("", None)


def test_bytes_of_names_are_written_as_the_file_system_has_them():
    assert format_list(["caf\udce9.png"], np.array([0]), np.array([0.0])) == b"caf\xe9.png\n"


@pytest.mark.parametrize(
    ("format", "null", "message"),
    [("xml", False, "--format xml: expected one of txt, csv, jsonl, npy"), ("csv", True, "-0 goes with --format txt")],
)
def test_formats_that_do_not_exist(format, null, message):
    with pytest.raises(UsageError, match=message):
        format_list([], np.empty(0), np.empty(0), format, null=null)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.csv", b"file,score\na.png,1\n", "no 'path' column"),
        ("l.csv", b"index,path\n0\n", "no 'path'"),
        ("l.csv", b"path\n" + b"x" * 200_000 + b"\n", "field"),
        ("l.jsonl", b'{"path": "a.png"}\nnot json\n', "not a list that protoprune wrote"),
        ("l.jsonl", b'{"file": "a.png"}\n', "no 'path' column"),
        ("l.jsonl", b'["a.png"]\n', "not a list that protoprune wrote"),
        ("l.npy", b"a.png\nb.png\n", "not a list that protoprune wrote"),
        ("l.npy", b"", "not a list that protoprune wrote"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ProtopruneError, match=message) as caught:
        read_list(tmp_path / name)
    assert name in str(caught.value)


def test_missing_list_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match=r"no such list; make one with `protoprune select"):
        read_list(tmp_path / "kept.txt")


def test_empty_files(tmp_path):
    for name in ("l.txt", "l.jsonl", "l.csv"):
        (tmp_path / name).touch()
        assert read_list(tmp_path / name) == []


# --- weights

WEIGHTS = np.array([1.0, 35 / 3])


def test_weights_are_a_column_of_their_own_and_only_where_there_are_some(tmp_path):
    arguments = (["a/1.png", "b,2.png"], np.array([0, 7]), np.array([0.5, 0.25]))
    assert format_list(*arguments, "csv", weights=WEIGHTS).startswith(b"path,index,score,weight\na/1.png,0,0.5,1.0\n")
    line = json.loads(format_list(*arguments, "jsonl", weights=WEIGHTS).splitlines()[1])
    assert line == {"path": "b,2.png", "index": 7, "score": 0.25, "weight": 35 / 3}
    assert format_list(*arguments, "txt", weights=WEIGHTS) == format_list(*arguments, "txt")
    for format in ("csv", "jsonl"):
        assert b"weight" not in format_list(*arguments, format)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_weights_come_back_for_any_name(tmp_path, format):
    @example(NASTY)
    @given(paths_of.filter(bool))
    def check(paths):
        weights = 1 / np.arange(1, len(paths) + 1)
        path = tmp_path / f"kept.{format}"
        path.write_bytes(format_list(paths, np.arange(len(paths)), weights, format, weights=weights))
        assert read_weights(path) == dict(zip(paths, weights.tolist(), strict=True))
        path.write_bytes(manifest({"path": [*paths, "gone"], "weight": np.array([*weights, np.nan])}, format))
        assert read_weights(path) == dict(zip(paths, weights.tolist(), strict=True))

    check()


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("l.txt", b"a.png\n", UsageError, "only csv and jsonl lists hold weights"),
        ("l.csv", b"path,index,score\na.png,0,1\n", UsageError, "has no weights; make it with `protoprune select"),
        ("l.jsonl", b'{"path": "a.png"}\n', UsageError, "has no weights"),
        ("l.csv", b"path,weight\na.png,heavy\n", ProtopruneError, "a weight is not a number"),
        ("l.csv", b"path,weight\na.png,-1\n", ProtopruneError, r"the weight of a\.png is -1"),
        ("l.csv", b"path,weight\na.png,nan\n", ProtopruneError, r"the weight of a\.png is nan"),
    ],
)
def test_lists_without_weights(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        read_weights(tmp_path / name)
    assert name in str(caught.value)


# --- the manifest

COLUMNS = {
    "path": ["a\n1.png", "caf\udce9.png"],
    "class": ["a", ""],
    "score": np.array([0.1, np.nan], np.float32),
    "keep": np.array([1, 0]),
}


def test_manifest_csv_reads_back(tmp_path):
    (tmp_path / "m.csv").write_bytes(manifest(COLUMNS))
    assert read_list(tmp_path / "m.csv") == COLUMNS["path"]
    assert manifest(COLUMNS).startswith(b'path,class,score,keep\n"a\n1.png",a,0.1,1\n')
    assert manifest(COLUMNS).endswith(b"caf\xe9.png,,,0\n")


def test_manifest_jsonl_has_null_where_there_is_nothing():
    records = [json.loads(line) for line in manifest(COLUMNS, "jsonl").splitlines()]
    assert records == [
        {"path": "a\n1.png", "class": "a", "score": 0.1, "keep": 1},
        {"path": "caf\udce9.png", "class": None, "score": None, "keep": 0},
    ]


# --- files appear whole or not at all


def test_write_replaces(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("a much longer old content")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["kept.txt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(ProtopruneError, match=r"kept\.txt: cannot write \(No space left on device\)"):
        write_file(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_write_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ProtopruneError, match="cannot write"):
        write_file(tmp_path / "nowhere" / "kept.txt", b"x")
    with pytest.raises(ProtopruneError, match="cannot write"):
        write_file(tmp_path, b"x")
    assert os.listdir(tmp_path) == []


def test_write_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    os.symlink("real.txt", tmp_path / "kept.txt")
    write_file(tmp_path / "kept.txt", b"new")
    assert (tmp_path / "real.txt").read_bytes() == b"new"
    assert (tmp_path / "kept.txt").is_symlink()


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_written_to_and_never_replaced(tmp_path):
    """`-o >(gzip)`, `-o /dev/stdout`, `--removed /dev/null`: a rename would put a file in the device's place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_file(pipe, b"through the pipe")
    reader.join(10)
    assert got == [b"through the pipe"]
    assert os.listdir(tmp_path) == ["pipe"]


# --- links


@pytest.mark.parametrize("hard", [False, True])
def test_links_are_the_kept_images(tmp_path, image_tree, hard):
    root = image_tree({"cat": 2, "dog": 2})
    write_links(tmp_path / "kept", root, ["cat/001.png", "dog/000.png"], hard=hard)
    made = sorted(str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*.png"))
    assert made == ["cat/001.png", "dog/000.png"]
    link = tmp_path / "kept/cat/001.png"
    assert link.read_bytes() == (root / "cat/001.png").read_bytes()
    assert link.is_symlink() is not hard
    assert os.path.samefile(link, root / "cat/001.png")


def test_links_from_a_relative_root_work(tmp_path, image_tree, monkeypatch):
    image_tree()
    monkeypatch.chdir(tmp_path)
    write_links("kept", "images", ["cat/000.png"])
    assert (tmp_path / "kept/cat/000.png").read_bytes() == (tmp_path / "images/cat/000.png").read_bytes()


def test_hard_links_of_linked_images_are_the_images(tmp_path, image_tree):
    root = image_tree()
    os.symlink("../cat/000.png", root / "dog/linked.png")
    write_links(tmp_path / "elsewhere/kept", root, ["dog/linked.png"], hard=True)
    made = tmp_path / "elsewhere/kept/dog/linked.png"
    assert not made.is_symlink()
    assert os.path.samefile(made, root / "cat/000.png")


def test_links_into_an_empty_folder_but_never_into_a_full_one(tmp_path, image_tree):
    root = image_tree()
    (tmp_path / "kept").mkdir()
    write_links(tmp_path / "kept", root, ["cat/000.png"])
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_links(tmp_path / "kept", root, ["cat/001.png"])
    assert [p.name for p in (tmp_path / "kept").rglob("*.png")] == ["000.png"]
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_links(root / "cat/000.png", root, ["cat/001.png"])


def snapshot(folder):
    return {path: (path.stat().st_ino, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("hard", [False, True])
def test_failing_links_leave_nothing_behind_and_touch_no_image(tmp_path, image_tree, hard):
    root = image_tree()
    before = snapshot(root)
    with pytest.raises(ProtopruneError, match=r"cat/gone\.png does not exist"):
        write_links(tmp_path / "kept", root, ["cat/000.png", "cat/gone.png"], hard=hard)
    assert os.listdir(tmp_path) == ["images"]
    assert snapshot(root) == before


def test_file_system_that_refuses_links(tmp_path, image_tree, monkeypatch):
    root = image_tree()

    def refuse(source, target, **_):
        raise OSError(18, "Invalid cross-device link", source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ProtopruneError, match=r"cross-device link .*hard links cannot cross file systems"):
        write_links(tmp_path / "kept", root, ["cat/000.png"], hard=True)
    assert os.listdir(tmp_path) == ["images"]


def test_links_of_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path / "images")
    os.makedirs(root)
    with open(os.path.join(root, b"caf\xe9\n.png"), "wb") as file:
        file.write(b"pixels")
    write_links(tmp_path / "kept", os.fsdecode(root), ["caf\udce9\n.png"])
    assert os.listdir(os.fsencode(tmp_path / "kept")) == [b"caf\xe9\n.png"]


# --- loaders

KEPT = ["cat/001.png", "dog/000.png", "dog/003.png"]


@pytest.fixture
def image_folder(image_tree):
    return pytest.importorskip("torchvision.datasets").ImageFolder(image_tree())


def sample_ids(subset) -> list[str]:
    return [os.path.relpath(subset.dataset.samples[i][0], subset.dataset.root) for i in subset.indices]


@pytest.mark.parametrize("form", [list, tuple, set, iter, "file"])
def test_image_folder(image_folder, tmp_path, form):
    if form == "file":
        kept = tmp_path / "kept.txt"
        kept.write_text("\n".join(KEPT))
    else:
        kept = form(KEPT)
    subset = keep_only(image_folder, kept)
    assert sample_ids(subset) == KEPT
    assert [label for _, label in subset] == [0, 1, 1]  # eel has lost all, and cat and dog keep their numbers


def test_image_folder_takes_absolute_lists(image_folder):
    assert sample_ids(keep_only(image_folder, [os.path.join(image_folder.root, one) for one in KEPT])) == KEPT


def test_image_folder_with_another_root(image_folder):
    above = os.path.dirname(image_folder.root)
    assert sample_ids(keep_only(image_folder, [f"images/{one}" for one in KEPT], root=above)) == KEPT


def test_image_folder_that_lacks_listed_images(image_folder):
    with pytest.raises(ProtopruneError, match=r"2 of 4 listed images are not in the data set .*first: ape/1\.png"):
        keep_only(image_folder, [*KEPT[:2], "cat/9.png", "ape/1.png"])
    with pytest.raises(ProtopruneError, match="3 of 3"):
        keep_only(image_folder, KEPT, root="/elsewhere")


def test_row_indices_are_refused(image_folder, tmp_path):
    np.save(tmp_path / "kept.npy", np.array([0, 1]))
    for kept in (np.array([0, 1]), [0, 1], tmp_path / "kept.npy"):
        with pytest.raises(UsageError, match="keep_only takes paths"):
            keep_only(image_folder, kept)


BY_PATH = {"dog/003.png": 2.5, "cat/001.png": 1.0, "dog/000.png": 4.0}


def test_weights_in_the_order_of_the_data_set(image_folder):
    kept = keep_only(image_folder, KEPT)
    assert weights_of(kept, BY_PATH).tolist() == [1, 4, 2.5]
    assert weights_of(kept, BY_PATH).dtype == np.float32
    whole = weights_of(image_folder, BY_PATH)
    assert len(whole) == len(image_folder)
    assert [whole[index] for index in kept.indices] == [1, 4, 2.5]
    assert whole.sum() == 7.5  # 0 for what is not listed
    absolute = {os.path.join(image_folder.root, path): weight for path, weight in BY_PATH.items()}
    assert weights_of(kept, absolute).tolist() == [1, 4, 2.5]


def test_weights_of_a_part_of_a_part(image_folder):
    from torch.utils.data import Subset

    backwards = Subset(keep_only(image_folder, KEPT), [2, 0, 1])
    assert weights_of(backwards, BY_PATH).tolist() == [2.5, 1, 4]
    with pytest.raises(ProtopruneError, match="1 of 3 listed images are not in the data set"):
        weights_of(Subset(backwards, [0, 1]), BY_PATH)


def test_weights_of_what_has_no_paths(image_folder):
    with pytest.raises(UsageError, match=r"list: expected \.samples"):
        weights_of([1, 2], BY_PATH)
    with pytest.raises(UsageError, match="only csv and jsonl"):
        weights_of(image_folder, __file__)


def test_data_sets_of_another_kind_are_refused():
    with pytest.raises(UsageError, match="int: expected"):
        keep_only(3, KEPT)


def test_hugging_face(image_tree):
    datasets = pytest.importorskip("datasets")
    root = image_tree()
    full = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache"))
    kept = keep_only(full, KEPT, root=root)
    assert len(kept) == 3
    assert [kept.features["label"].int2str(label) for label in kept["label"]] == ["cat", "dog", "dog"]
    assert keep_only(full, KEPT)["label"] == kept["label"]  # the root is the images' common folder
    with pytest.raises(ProtopruneError, match="1 of 4 listed images are not in the data set"):
        keep_only(full, [*KEPT, "cat/999.png"], root=root)
    assert weights_of(kept, BY_PATH, root=root).tolist() == [1, 4, 2.5]
    with pytest.raises(UsageError, match="weights_of needs root="):
        weights_of(kept, BY_PATH)


def test_hugging_face_without_images_or_paths():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UsageError, match="no image column, only text"):
        keep_only(datasets.Dataset.from_dict({"text": ["a"]}), KEPT)
    unnamed = datasets.Dataset.from_dict({"image": [{"bytes": encoded(picture(), "PNG"), "path": None}]})
    with pytest.raises(UsageError, match="does not know its files' paths"):
        keep_only(unnamed.cast_column("image", datasets.Image()), KEPT)


def shards(root, folder) -> str:
    """Two tar shards of the images below root, with a .cls beside each image."""
    files = sorted(root.rglob("*.png"))
    for number in range(2):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for file in files[number::2]:
                tar.add(file, str(file.relative_to(root)))
                info = tarfile.TarInfo(str(file.relative_to(root).with_suffix(".cls")))
                info.size = 1
                tar.addfile(info, io.BytesIO(b"0"))
    return str(folder / "shard-{0..1}.tar")


@pytest.mark.filterwarnings("ignore")
def test_webdataset(image_tree, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    urls = shards(image_tree(), tmp_path)
    kept = keep_only(webdataset.WebDataset(urls, shardshuffle=False), KEPT)
    for _ in range(2):  # every epoch
        samples = list(kept)
        assert sorted(sample["__key__"] for sample in samples) == ["cat/001", "dog/000", "dog/003"]
        assert all({"png", "cls"} <= set(sample) for sample in samples)
    with pytest.raises(ProtopruneError, match=r"1 of 4 listed images .*first: cat/999\.png"):
        list(keep_only(webdataset.WebDataset(urls, shardshuffle=False), [*KEPT, "cat/999.png"]))


def test_webdataset_keeps_its_pipeline_and_loads_with_workers(image_tree, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    from torch.utils.data import DataLoader

    urls = shards(image_tree(), tmp_path)
    kept = keep_only(webdataset.WebDataset(urls, shardshuffle=False), KEPT).to_tuple("__key__")
    keys = [one[0] for one in DataLoader(kept, batch_size=None, num_workers=2)]
    assert sorted(keys) == ["cat/001", "dog/000", "dog/003"]


def test_samples_of_any_iterable_pass_after_pass():
    samples = [{"__key__": name, "n": i} for i, name in enumerate(("a", "b", "c"))]
    kept = keep_only(samples, ["c.png", "a.png"])
    assert [s["n"] for s in kept] == [s["n"] for s in kept] == [0, 2]
    with pytest.raises(UsageError, match="no __key__, only x"):
        list(keep_only([{"x": 1}], ["c.png"]))


def test_keys_are_paths_up_to_the_first_dot_of_the_name():
    samples = [{"__key__": "v1.0/a"}, {"__key__": "b"}, {"__key__": "c"}]
    assert list(keep_only(samples, ["v1.0/a.tar.png", "b.png"])) == samples[:2]


# --- standard output


@pytest.mark.timeout(60)
def test_reader_that_stops_early_is_not_an_error(tmp_path, feature_file):
    """A real shell and a list longer than a pipe holds, so that the write does fail."""
    rng = np.random.default_rng(0)
    paths = [f"{'long' * 40}/{i:06d}.png" for i in range(3000)]
    feature_file(tmp_path / "features.h5", rng.normal(size=(3000, 4)), paths=paths)
    command = (
        f"{sys.executable} -m protoprune select --k 2 --iterations 1 --keep 0.9 | head -1; echo ${{PIPESTATUS[*]}}"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(lists.__file__))}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, env=environment, timeout=50)
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("longlong")
    assert lines[1:] == ["0 0"]
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr
    assert b"kept 2,700 of 3,000" in result.stderr
