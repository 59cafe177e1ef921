"""Listing folders and lists: what is found, in which order, and what becomes of everything that is not an image."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import os
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from helpers import encoded, picture, write_image
from hypothesis import given
from hypothesis import strategies as st

from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.images.listing import describe_counts, folder_labels, image_suffixes, list_folder, list_paths
from protoprune.lists import read_list, split_list

PNG = encoded(picture(), "PNG")


def put(root, *names: str, data: bytes = PNG) -> None:
    for name in names:
        path = os.path.join(os.fspath(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def reference(root) -> list[str]:
    """Every visible file with an image's suffix, by the standard library's walk."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes():
                found.append(os.path.relpath(os.path.join(folder, name), root))
    return sorted(found)


def test_folder_equals_a_plain_walk(tmp_path):
    put(tmp_path, "a/1.png", "a/2.JPG", "a/deep/er/3.webp", "b/4.tiff", "B/5.bmp", "b.c/6.gif", "a/notes.txt", "7.jpeg")
    put(tmp_path, "a/.hidden.png", ".git/8.png", "a/.cache/9.png", "é/10.png", "~/11.PnG", "a b/12 3.jpg")
    found = list_folder(tmp_path)
    assert found.paths == reference(tmp_path)
    assert len(found) == 10
    assert found.root == str(tmp_path)
    assert found.size.tolist() == [os.path.getsize(tmp_path / path) for path in found.paths]
    assert found.mtime_ns.tolist() == [os.stat(tmp_path / path).st_mtime_ns for path in found.paths]
    assert found.skipped == {".txt": 1}  # hidden files are not even counted


def test_paths_are_sorted_by_code_point_of_the_whole_path(tmp_path):
    names = ["a/1.png", "a-b/1.png", "a.b/1.png", "a/10.png", "a/2.png", "A/1.png", "z.png", "é.png", "e.png", "日.png"]
    put(tmp_path, *names)
    assert list_folder(tmp_path).paths == sorted(names)
    assert sorted(names)[:4] == ["A/1.png", "a-b/1.png", "a.b/1.png", "a/1.png"]  # not folder by folder


def test_names_that_are_not_utf8_or_hold_line_breaks(tmp_path):
    names = [
        b"caf\xe9.png",
        b"two\nlines.png",
        b"\xff\xfe/x.png",
        b"tab\there.png",
        b"quote'\".png",
        b"back\\slash.png",
    ]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(PNG)
    found = list_folder(tmp_path)
    assert {os.fsencode(path) for path in found.paths} == set(names)
    assert (found.size == len(PNG)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.mpo", True), ("x.h5", False), ("x.hdf5", False), ("x.mpg", False), ("x.avif", True), ("x.tif", True)],
)
def test_which_suffixes_are_images(name, expected):
    assert (os.path.splitext(name)[1] in image_suffixes()) is expected


def test_files_without_a_suffix_are_images_when_pillow_says_so(tmp_path):
    put(tmp_path, "0a1b2c", "folder/3d4e5f")
    put(tmp_path, "README", data=b"plain text")
    put(tmp_path, "EMPTY", data=b"")
    put(tmp_path, "photo.txt")  # an image by content only: its name says otherwise, and that is counted
    found = list_folder(tmp_path)
    assert found.paths == ["0a1b2c", "folder/3d4e5f"]
    assert found.skipped == {"(no suffix)": 2, ".txt": 1}


def test_no_images_is_an_error_that_counts_what_is_there(tmp_path):
    put(tmp_path, "a.txt", "b.txt", "c.json", data=b"x")
    with pytest.raises(ProtopruneError, match=r"no images found \(3 other files: \.txt 2, \.json 1\)") as caught:
        list_folder(tmp_path)
    assert caught.value.exit_code == 1


def test_missing_folder_and_file_as_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        list_folder(tmp_path / "nowhere")
    put(tmp_path, "a.png")
    with pytest.raises(UsageError, match="not a folder"):
        list_folder(tmp_path / "a.png")


# --- links


def test_link_to_itself(tmp_path):
    put(tmp_path, "a.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("loop", tmp_path / "loop")
    found = list_folder(tmp_path)
    assert found.paths == ["a.png", "loop.png"]
    assert found.size.tolist() == [len(PNG), -1]


def test_link_to_the_folder_it_is_in_and_to_a_parent(tmp_path):
    put(tmp_path, "a/b/x.png")
    os.symlink(".", tmp_path / "a/here")
    os.symlink("../..", tmp_path / "a/b/up")
    assert list_folder(tmp_path).paths == ["a/b/x.png"]


def test_links_between_two_folders_end(tmp_path):
    put(tmp_path, "a/x.png", "b/y.png")
    os.symlink("../b", tmp_path / "a/to_b")
    os.symlink("../a", tmp_path / "b/to_a")
    assert list_folder(tmp_path).paths == ["a/to_b/y.png", "a/x.png", "b/to_a/x.png", "b/y.png"]


def test_linked_folders_and_files_outside_are_followed(tmp_path):
    put(tmp_path / "elsewhere", "cat/1.png")
    os.makedirs(tmp_path / "images/dog")
    os.symlink(tmp_path / "elsewhere/cat", tmp_path / "images/cat")
    os.symlink(tmp_path / "elsewhere/cat/1.png", tmp_path / "images/dog/2.png")
    found = list_folder(tmp_path / "images")
    assert found.paths == ["cat/1.png", "dog/2.png"]
    assert found.size.tolist() == [len(PNG), len(PNG)]
    assert found.classes == ["cat", "dog"]


def test_broken_link_is_listed_so_that_it_gets_a_status(tmp_path):
    put(tmp_path, "a.png")
    os.symlink("gone.png", tmp_path / "b.png")
    found = list_folder(tmp_path)
    assert found.paths == ["a.png", "b.png"]
    assert (found.size[1], found.mtime_ns[1]) == (-1, -1)


@pytest.mark.timeout(10)
def test_named_pipes_do_not_hang(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    found = list_folder(tmp_path)
    assert found.paths == ["a.png", "pipe.png"]
    assert found.size.tolist() == [len(PNG), -1]
    assert found.skipped == {"(no suffix)": 1}


# --- folders that cannot be read


def test_unreadable_folder_is_reported_and_the_rest_is_listed(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "secret/2.png", "z/3.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list_folder(tmp_path)
    assert found.paths == ["a/1.png", "z/3.png"]
    assert found.unreadable_folders == [("secret", "Permission denied")]


LIST_AS_NOBODY = """
import os, sys
from protoprune.errors import ProtopruneError
from protoprune.images.listing import image_suffixes, list_folder
image_suffixes()  # imports what it needs while that is allowed
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    found = list_folder(sys.argv[1])
    print(found.paths, found.unreadable_folders)
except ProtopruneError as error:
    print("error:", error)
"""


def test_a_real_folder_without_permission(tmp_path, run_program):
    root = tmp_path / "images"
    put(root, "a/1.png", "secret/2.png")
    os.chmod(root, 0o755)
    os.chmod(root / "secret", 0)
    try:
        result = run_program(".", cwd=root, python=("-c", LIST_AS_NOBODY))
        alone = run_program("secret", cwd=root, python=("-c", LIST_AS_NOBODY))
    finally:
        os.chmod(root / "secret", 0o755)
    assert result.stdout.decode().strip() == "['a/1.png'] [('secret', 'Permission denied')]", result.stderr
    assert b"no images found (1 unreadable folders, first: .: Permission denied)" in alone.stdout, alone.stderr


def test_folder_that_vanishes_while_it_is_walked(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            os.unlink(f"{path}/2.png")
            os.rmdir(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = list_folder(tmp_path)
    assert found.paths == ["a/1.png"]
    assert found.unreadable_folders == [("b", "No such file or directory")]


# --- labels


@pytest.mark.parametrize(
    ("paths", "labels", "classes"),
    [
        (["cat/1.png", "dog/1.png", "dog/sub/2.png"], [0, 1, 1], ["cat", "dog"]),
        (["a-b/1.png", "a/1.png"], [1, 0], ["a", "a-b"]),  # classes sort by name, not as the paths do
        (["1.png", "2.png"], [-1, -1], []),  # flat
        (["cat/1.png", "cat/2.png"], [-1, -1], []),  # one folder is no class
        (["cat/1.png", "dog/1.png", "x.png"], [-1, -1, -1], []),  # an image outside every folder
        ([], [], []),
    ],
)
def test_folder_labels(paths, labels, classes):
    label, names = folder_labels(paths)
    assert (label.tolist(), names) == (labels, classes)
    assert label.dtype == np.int32


def test_labels_agree_with_torchvision(image_tree):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder
    root = image_tree({"b": 2, "B": 1, "a-1": 2, "a": 3})
    found, theirs = list_folder(root), folder(root)
    assert found.classes == theirs.classes
    assert dict(zip(found.paths, found.labels.tolist(), strict=True)) == {
        os.path.relpath(path, root): label for path, label in theirs.samples
    }


def test_labels_can_be_switched_off(image_tree):
    found = list_folder(image_tree(), labels=False)
    assert found.classes == []
    assert set(found.labels) == {-1}


# --- lists of paths


def test_list_is_sorted_normalised_and_deduplicated(image_tree):
    root = image_tree()
    entries = ["dog/001.png", "./cat/000.png", f"{root}/dog/001.png", "cat//000.png", "dog/../cat/002.png"]
    found = list_paths(entries, root)
    assert found.paths == ["cat/000.png", "cat/002.png", "dog/001.png"]
    assert found.duplicates == 2
    assert found.classes == ["cat", "dog"]
    assert (found.size > 0).all()


def test_order_of_the_list_does_not_matter(image_tree):
    root = image_tree()
    listed = list_folder(root)

    @given(entries=st.permutations(listed.paths))
    def check(entries):
        shuffled = list_paths(entries, root)
        assert shuffled.paths == listed.paths
        assert np.array_equal(shuffled.labels, listed.labels)

    check()


def test_list_without_root_is_relative_to_the_current_folder(image_tree, monkeypatch):
    root = image_tree()
    monkeypatch.chdir(root)
    found = list_paths(["cat/001.png", "dog/002.png"])
    assert (found.root, found.paths) == (str(root), ["cat/001.png", "dog/002.png"])


def test_absolute_entries_without_root_get_their_deepest_common_folder(image_tree):
    root = image_tree()
    both = list_paths([f"{root}/cat/001.png", f"{root}/dog/002.png"])
    assert (both.root, both.paths, both.classes) == (str(root), ["cat/001.png", "dog/002.png"], ["cat", "dog"])
    one = list_paths([f"{root}/cat/001.png"])
    assert (one.root, one.paths) == (f"{root}/cat", ["001.png"])


def test_listed_files_need_no_suffix_and_need_not_exist(image_tree):
    root = image_tree()
    put(root, "cat/blob")
    found = list_paths(["cat/blob", "cat/gone.png"], root)
    assert found.paths == ["cat/blob", "cat/gone.png"]
    assert found.size.tolist() == [len(PNG), -1]


@pytest.mark.parametrize("entry", ["../x.png", "/etc/hostname", "cat/../../x.png", ".."])
def test_entries_outside_the_root_are_refused(image_tree, entry):
    with pytest.raises(UsageError, match="outside the root") as caught:
        list_paths(["cat/000.png", entry], image_tree())
    assert entry in str(caught.value)


def test_a_name_that_only_begins_with_dots_is_inside(image_tree):
    assert list_paths(["..x/y.png"], image_tree()).paths == ["..x/y.png"]


@pytest.mark.parametrize("entry", ["a\0b.png", "a\ud800.png"])
def test_names_that_no_file_can_have_are_refused(image_tree, entry):
    with pytest.raises(UsageError, match="no file"):
        list_paths([entry], image_tree())


@pytest.mark.parametrize("entries", [[], [""], ["", ""]])
def test_empty_list(entries):
    with pytest.raises(ProtopruneError, match="empty"):
        list_paths(entries)


def test_root_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match=r"--root .*nowhere: no such folder"):
        list_paths(["a.png"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("data", "entries"),
    [
        (b"a.png\nb.png\n", ["a.png", "b.png"]),
        (b"a.png\nb.png", ["a.png", "b.png"]),
        (b"a.png\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"a.png\r\nb.png", ["a.png", "b.png"]),
        (b"a.png\r\nb.png\n", ["a.png", "b.png"]),  # two lists put together
        (b"a.png\nb.png\r\n\r\nc.png\r", ["a.png", "b.png", "c.png"]),
        (b"a.png\r\0b.png\0", ["a.png\r", "b.png"]),
        (b"a.png\n\n\nb.png\n", ["a.png", "b.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"a.png\r\n\0b.png\0", ["a.png\r\n", "b.png"]),
        (b"caf\xe9.png\n", ["caf\udce9.png"]),
        (b" spaced .png\n", [" spaced .png"]),
        (b"", []),
        (b"\n\n", []),
        (b"\0\0", []),
    ],
)
def test_split_list(data, entries):
    assert split_list(data) == entries


def test_describe_counts_names_the_largest_first():
    assert describe_counts({".a": 1, ".c": 2000, ".b": 1}) == ".c 2,000, .a 1, .b 1"
    assert describe_counts({str(i): 9 - i for i in range(7)}, most=2) == "0 9, 1 8 and 5 more kinds"


def test_progress_is_called_while_listing(tmp_path, monkeypatch):
    monkeypatch.setattr("protoprune.images.listing._walk", lambda *_: ((f"{i}.png", 1, 1, 1) for i in range(25_000)))
    seen = []
    assert len(list_folder(tmp_path, on_progress=seen.append)) == 25_000
    assert seen == [10_000, 20_000]


def test_a_single_image_is_enough(tmp_path):
    write_image(tmp_path / "one.png")
    assert list_folder(os.path.relpath(tmp_path)).paths == ["one.png"]


# --- classes from folders of another level, splits and disks


def test_class_level_takes_the_folders_below_the_splits(tmp_path):
    for path in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/dog/more/4.png", "train/5.png"):
        put(tmp_path, path)
    with pytest.warns(ProtopruneWarning, match=r"1 image lies in no folder of level 2 .*train/5\.png"):
        found = list_folder(tmp_path, class_level=2)
    assert (found.classes, found.labels_from) == (["cat", "dog"], "folders of level 2")
    named = {
        path: found.classes[label] if label >= 0 else "" for path, label in zip(found.paths, found.labels, strict=True)
    }
    assert named == {
        "train/cat/1.png": "cat", "train/dog/2.png": "dog", "val/dog/3.png": "dog", "val/dog/more/4.png": "dog",
        "train/5.png": "",
    }  # fmt: skip
    listed = list_paths(["train/cat/1.png", "val/dog/3.png"], tmp_path, class_level=2)
    assert listed.classes == ["cat", "dog"]
    for level, message in ((9, "no image of .* lies that deep"), (0, "expected at least 1")):
        with pytest.raises(UsageError, match=message):
            list_folder(tmp_path, class_level=level)
    with pytest.raises(UsageError, match="goes with classes from folders"):
        list_folder(tmp_path, class_level=2, labels=False)


@pytest.mark.parametrize(
    ("paths", "warned"),
    [
        (("cat/1.png", "dog/2.png", "dog/3.png", "stray.png"), True),
        (("cat/1.png", "dog/2.png", "dog/3.png"), False),  # classes
        (("cat/1.png", "stray.png", "other.png", "dog/2.png", "third.png"), False),  # hardly a folder a class
        (("cat/1.png", "cat/2.png", "stray.png"), False),  # one folder is no class anyway
    ],
)
def test_stray_images_that_cost_the_classes_are_named(tmp_path, paths, warned):
    for path in paths:
        put(tmp_path, path)
    for listing in (list_folder, functools.partial(list_paths, paths)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert bool(listing(tmp_path).classes) == ("stray.png" not in paths)
            assert listing(tmp_path, labels=False).classes == []
        assert len(told) == warned
        assert not warned or f"1 of {len(paths)} images lies in no folder (first: stray.png)" in str(told[0].message)


@pytest.mark.parametrize(
    ("folders", "warned"),
    [
        (("train", "val", "test"), True),
        (("Training", "Validation"), True),
        (("train2017", "val2017", "extra"), True),
        (("train", "car", "bus"), False),  # COCO's train is a class
        (("test", "dev", "a", "b", "c", "d"), False),
        (("cat", "dog"), False),
    ],
)
def test_split_folders_are_doubted(folders, warned, tmp_path):
    for name in folders:
        put(tmp_path, f"{name}/x/1.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = list_folder(tmp_path)
        list_folder(tmp_path, class_level=1)  # asked for: no doubt
        list_folder(tmp_path, labels=False)
    assert found.classes == sorted(folders)
    assert len(said) == warned
    if warned:
        assert "look like splits" in str(said[0].message)
        assert "--class-level 2" in str(said[0].message)


def test_what_img2dataset_numbered_is_doubted(tmp_path):
    for path in ("00000/000000000.png", "00001/000010000.png"):
        put(tmp_path, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_folder(tmp_path)  # as traffic signs are: classes
        (tmp_path / "00000_stats.json").write_text("{}")
        assert not list_folder(tmp_path, labels=False).classes
    with pytest.warns(
        ProtopruneWarning, match=r"first-level folders 00000, 00001, which are parts .* give --no-labels"
    ):
        assert list_folder(tmp_path).classes == ["00000", "00001"]


def test_lists_over_several_disks_are_doubted(tmp_path):
    for path in ("disk1/set/cat/1.png", "disk2/set/dog/2.png"):
        put(tmp_path, path)
    entries = [f"{tmp_path}/disk1/set/cat/1.png", f"{tmp_path}/disk2/set/dog/2.png"]
    with pytest.warns(ProtopruneWarning, match=r"classes are the folders disk1, disk2 below .*--class-level N"):
        list_paths(entries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_paths(entries, class_level=3).classes == ["cat", "dog"]
        assert list_paths(entries, tmp_path).classes == ["disk1", "disk2"]  # a root that was given is meant
        assert list_paths([f"{tmp_path}/disk1/set/cat/1.png", f"{tmp_path}/disk1/set/dog/2.png"]).classes == [
            "cat", "dog",
        ]  # fmt: skip


def test_absolute_and_relative_entries_in_any_order(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png")
    monkeypatch.chdir(tmp_path)
    both = [f"{tmp_path}/a/1.png", "b/2.png"]
    one, other = list_paths(both), list_paths(both[::-1])
    assert (one.root, one.paths) == (other.root, other.paths) == (str(tmp_path), ["a/1.png", "b/2.png"])
    monkeypatch.chdir(tmp_path / "b")
    for order in (both, both[::-1]):
        with pytest.raises(UsageError, match="outside the root"):
            list_paths(order)


# --- what is no list


def archives() -> dict[str, bytes]:
    buffers = {name: io.BytesIO() for name in ("tar", "zip")}
    with tarfile.open(fileobj=buffers["tar"], mode="w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    with zipfile.ZipFile(buffers["zip"], "w") as archive:
        archive.writestr("a.png", PNG)
    kinds = {name: buffer.getvalue() for name, buffer in buffers.items()}
    kinds["tar.gz"] = gzip.compress(kinds["tar"])
    kinds["image"] = PNG + bytes(20)
    return kinds


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz", "image"])
def test_archives_are_no_lists_whatever_they_are_called(kind, tmp_path):
    data, kind = archives()[kind], kind.removesuffix(".gz")
    with pytest.raises(UsageError, match=rf"the list: an? {kind}"):
        split_list(data)
    for name in ("list.txt", "list.csv", "list.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=rf"{name}: an? {kind}"):
            read_list(tmp_path / name)


def test_lists_through_gzip_and_from_windows(tmp_path):
    data = "a\\1.png\r\nb\\caf\u00e9.png\r\n".encode("utf-16")
    for one in (data, gzip.compress(data)):
        assert split_list(one) == ["a\\1.png", "b\\caf\u00e9.png"]
    with pytest.raises(ProtopruneError, match="the list: a damaged gzip file"):
        split_list(gzip.compress(data)[:-9])
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(PNG)
    assert list_paths(["a\\1.png", "b\\2.png"], tmp_path).paths == ["a/1.png", "b/2.png"]
    (tmp_path / "a\\1.png").write_bytes(PNG)  # where a name holds a backslash, it is a part of the name
    assert list_paths(["a\\1.png", "b\\2.png"], tmp_path).paths == ["a\\1.png", "b\\2.png"]


def test_parquet_is_no_list_of_lines(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"path": ["a.png"]}), tmp_path / "a.txt")
    with pytest.raises(UsageError, match="a Parquet file"):
        split_list((tmp_path / "a.txt").read_bytes())


def test_names_that_begin_like_an_archive_are_names():
    assert split_list(b"PAR1\nGIF8\nBZh.png\nRar!.png, a name of more than twenty bytes\n")[:2] == ["PAR1", "GIF8"]


def test_a_list_that_was_cut_in_part_is_refused(tmp_path):
    put(tmp_path, "a.png", "b.png")
    images = list_folder(tmp_path)
    with pytest.raises(UsageError, match="1 paths, but 2 values of mtime_ns"):
        dataclasses.replace(images, paths=images.paths[:1], size=images.size[:1])
