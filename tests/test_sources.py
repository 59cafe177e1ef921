"""Shards: what is found, what is in them, and what becomes of everything that is wrong with them."""

import functools
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import tracemalloc
import warnings
import zipfile

import pytest
from helpers import encoded, picture
from shard_helpers import COUNTS, image_folder, members, write_parquet, write_tar, write_tars, write_zip
from typer.testing import CliRunner

import protoprune
from protoprune import unpacking
from protoprune.cli import app
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.formats import archive_kind
from protoprune.images.decode import ImageError, Status
from protoprune.images.listing import list_folder
from protoprune.report.sheet import contact_sheet
from protoprune.sources import ShardError, ShardOptions, find_shards, list_shards, open_shard, shards_of, tables
from protoprune.sources.finding import Shard, expand, fixed_part, in_order, is_shard, split_id, splits_among
from protoprune.sources.reader import ImageReader

PNG = encoded(picture(), "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def opened(path, **options):
    return open_shard(Shard(os.path.basename(path), str(path), 1, 7), str(path), ShardOptions(**options), "/root")


def contents(path, **options) -> dict[str, bytes]:
    with opened(path, **options) as images:
        assert images.paths == sorted(images.paths)
        return {path: images.read(row) for row, path in enumerate(images.paths)}


def refused(path, **options) -> tuple[Status, str]:
    with pytest.raises(ShardError) as error:
        opened(path, **options)
    return error.value.status, error.value.reason


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


# --- finding


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("s/{0008..0010}.tar", ["s/0008.tar", "s/0009.tar", "s/0010.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a,b{0..1}}", ["a", "b0", "b1"]),
        ("{word}", ["{word}"]),
    ],
)
def test_braces_expand_as_in_bash(pattern, names):
    assert expand(pattern) == names


def test_braces_that_are_wrong():
    with pytest.raises(UsageError, match="a brace is not closed"):
        expand("a{0..9.tar")
    with pytest.raises(UsageError, match="at most 1,000,000 shards"):
        expand("{0..99999999}.tar")


@pytest.mark.parametrize(
    ("pattern", "root"),
    [("s/{0..1}.tar", "s"), ("/d/{a,b}/*.tar", "/d"), ("*.tar", "."), ("/*.tar", "/"), ("s/x{0..1}", "s")],
)
def test_the_root_of_a_pattern_does_not_depend_on_what_is_there(pattern, root):
    assert fixed_part(pattern) == root


def test_patterns_globs_folders_files_and_lists_find_the_same_shards(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "s", members(folder), 3)
    (tmp_path / "s/readme.txt").write_text("x")
    sources = [
        find_shards("s/{0000..0002}.tar"), find_shards("s/*.tar"), find_shards("s"), find_shards(str(tmp_path / "s")),
        list_shards(["s/0002.tar", "s/0000.tar", "s/0001.tar", "s/0000.tar"], "s/.."),
    ]  # fmt: skip
    for source in sources[:4]:
        assert source.root == str(tmp_path / "s")
        assert [shard.name for shard in source.shards] == ["0000.tar", "0001.tar", "0002.tar"]
        assert all(shard.size > 0 and shard.version > 0 for shard in source.shards)
    assert sources[2].skipped == {".txt": 1}
    assert [shard.name for shard in sources[4].shards] == ["s/0000.tar", "s/0001.tar", "s/0002.tar"]
    one = find_shards("s/0001.tar")
    assert (one.root, [shard.name for shard in one.shards]) == (str(tmp_path / "s"), ["0001.tar"])


def test_a_missing_shard_of_a_pattern_is_known_and_all_missing_is_an_error(folder, tmp_path):
    write_tars(tmp_path, members(folder), 2)
    source = find_shards(f"{tmp_path}/{{0000..0002}}.tar")
    assert [shard.size < 0 for shard in source.shards] == [False, False, True]
    with pytest.raises(ProtopruneError, match="none of the 3 shards is there"):
        find_shards(f"{tmp_path}/x{{0..2}}.tar")
    for name, way_on in (
        ("x*.tar", "look at the folder"),
        ("*.JPG", "patterns are for shards: give the folder of the"),
    ):
        with pytest.raises(UsageError, match=f"matches no file; {way_on}"):
            find_shards(f"{tmp_path}/{name}")


def test_folders_of_images_and_lists_are_no_shards(folder, tmp_path):
    assert shards_of(os.fspath(folder)) is None
    with pytest.raises(UsageError, match=rf"matches {len(members(folder))} images, and patterns are for shards"):
        find_shards(f"{folder}/**/*.*")
    write_tar(tmp_path / "mixed/a.tar", [("1.png", PNG)])
    (tmp_path / "mixed/2.png").write_bytes(PNG)
    assert shards_of(os.fspath(tmp_path / "mixed")) is None
    assert list_folder(tmp_path / "mixed").skipped == {".tar": 1}
    (tmp_path / "list.txt").write_text("a.png\n")
    assert shards_of(os.fspath(tmp_path / "list.txt")) is None
    (tmp_path / "list.gz").write_bytes(gzip.compress(b"a.png\n"))
    assert shards_of(os.fspath(tmp_path / "list.gz")) is None
    assert shards_of(os.fspath(tmp_path / "nowhere")) is None
    for place, what in ((folder, "no shards there"), (tmp_path / "nowhere", "no such file or folder")):
        with pytest.raises(UsageError, match=rf"{place}: {what}; give a tar, .* \(images that are .* list_folder"):
            find_shards(place)


def test_what_lies_beside_shards_hides_them_not(folder, tmp_path):
    """Spark's _SUCCESS, a licence, links to other disks: a folder of shards all the same."""
    write_tars(tmp_path / "disk" / "train", members(folder), 2)
    place = tmp_path / "set"
    place.mkdir()
    (place / "train").symlink_to(tmp_path / "disk/train")
    (tmp_path / "disk/train/again").symlink_to(tmp_path / "disk")  # back to a folder that we are in
    for name, content in (
        ("_SUCCESS", b""),
        ("LICENSE", b"Permission is granted"),
        ("README.md", b"#"),
        (".crc", b"1"),
    ):
        (place / name).write_bytes(content)
    source = find_shards(place)
    assert [shard.name for shard in source.shards] == ["train/0000.tar", "train/0001.tar"]
    (place / "cover").write_bytes(PNG)  # an image, whatever it is called
    assert shards_of(os.fspath(place)) is None


def test_shards_beside_images_are_said(folder, tmp_path):
    write_tars(tmp_path / "set", members(folder), 2)
    (tmp_path / "set/preview.png").write_bytes(PNG)
    result = call("embed", tmp_path / "set", "-o", tmp_path / "f.h5", "--encoder", "mini", "--device", "cpu")
    assert "2 of them are shards (0000.tar), whose images are not embedded" in result.stderr
    assert f"such as '{tmp_path}/set/*.tar'" in result.stderr
    result = call("embed", tmp_path / "set/*.tar", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu")
    assert "15 images" in result.stderr


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], ["test", "train"]),
        (["imagenet-train-000000.tar", "imagenet-val-000000.tar", "x.tar"], ["train", "val"]),
        (["train2017.zip", "val2017.zip"], ["train", "val"]),
        (["Train/0.tar", "train/1.tar"], ["train"]),
        (["training-set/0.tar", "latest/1.tar", "devices/2.tar", "contest.tar", "00000.tar"], ["training"]),
    ],
)
def test_splits_by_the_names_of_shards(names, splits):
    assert splits_among(names) == splits


def test_shells_that_expand_a_pattern_and_archives_that_are_not_read(tmp_path):
    assert "several shards a pattern in quotes" in call("embed", "0.tar", "1.tar").stderr
    many = call("embed", *(f"{number}.png" for number in range(2000))).stderr
    assert many.startswith("error: Got unexpected extra argument(s) (1.png and 1,998 more); images are a folder, ")
    assert many.count("\n") == 1
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(256)))
    assert (
        "a Zstandard file, not a list of paths; unpack it first (zstd -d)"
        in call("embed", tmp_path / "x.tar.zst").stderr
    )
    (tmp_path / "list.txt").write_text("https://h.example/a.jpg\nb.jpg\n")
    assert "single images are not fetched by URL" in call("embed", tmp_path / "list.txt").stderr
    (tmp_path / "list.txt").write_text("a.tar\n")
    assert "give --root, the folder that its paths are relative to" in call("embed", tmp_path / "list.txt").stderr


def test_shards_are_in_the_order_of_ids():
    names = ["a.tar", "a.tar.gz", "a/b.tar", "a-b.tar", "B.tar"]
    ordered = in_order([Shard(name, name, 1, 1) for name in names])
    ids = [f"{shard.name}/x" for shard in ordered]
    assert ids == sorted(ids)


# --- the same images in every kind of shard


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz", "zip", "stored zip"])
def test_archives_give_the_images_of_the_folder(kind, folder, tmp_path):
    files = members(folder)
    if "zip" in kind:
        path = write_zip(tmp_path / "s.zip", files, zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED)
    else:
        path = write_tar(tmp_path / f"s.{kind}", files, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind])
    assert contents(path) == {f"{path.name}/{name}": data for name, data in files}
    with opened(path) as images:
        assert (images.root, images.classes) == ("/root", ["ant", "bee", "cat"])
        assert images.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 6
        assert images.size.tolist() == [len(data) for _, data in files]
        assert set(images.mtime_ns) == {7}


@pytest.mark.parametrize("layout", ["hf", "binary"])
def test_parquet_gives_the_images_of_the_folder(layout, folder, tmp_path):
    pytest.importorskip("pyarrow")
    files = members(folder)
    path = write_parquet(tmp_path / "part-0.parquet", files, layout)
    assert contents(path) == {f"part-0.parquet/{row:06d}": data for row, (_, data) in enumerate(files)}
    assert contents(path, id_column="name") == {f"part-0.parquet/{name}": data for name, data in files}
    with opened(path) as images:
        assert (images.classes, images.labels_from) == (["ant", "bee", "cat"], "column label")
        assert images.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 6
    with opened(path, labels=False) as images:
        assert images.classes == []
    for options, message in (
        ({"image_column": "x"}, "has no column x, only image, label, name"),
        ({"image_column": "name"}, "its column name holds string, no image bytes"),
        ({"id_column": "x"}, "has no column x"),
        ({"label_column": "x"}, "has no column x"),
        ({"id_column": "label"}, "two images have the id ant"),
    ):
        assert message in refused(path, **options)[1]


def test_a_data_set_saved_by_hugging_face(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = members(folder)
    names = ["cat", "ant", "bee"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"img": [{"bytes": data, "path": None} for _, data in files],
            "label": [names.index(name.partition("/")[0]) for name, _ in files]}  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    made.to_parquet(str(tmp_path / "one.parquet"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "both"))
    with opened(tmp_path / "one.parquet") as images:
        assert [images.classes[label] for label in images.labels] == [name.partition("/")[0] for name, _ in files]
    source = find_shards(tmp_path / "saved")
    assert [shard.name for shard in source.shards] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    found = [data for shard in source.shards for data in contents(shard.url).values()]
    assert found == [data for _, data in files]
    with pytest.raises(UsageError, match="several splits; give one of them: train"):
        find_shards(tmp_path / "both")


# --- names, labels and what is no image


def test_members_that_are_no_images_are_counted_and_hidden_ones_left_out(tmp_path):
    files = [("./a/1.png", PNG), ("a/1.txt", b"text"), ("a/2", PNG), ("a/3", b"no image"), ("a/._1.png", b"mac"),
             (".git/4.png", PNG), ("/abs/5.PNG", PNG)]  # fmt: skip
    for path in (write_tar(tmp_path / "s.tar", files), write_zip(tmp_path / "s.zip", files)):
        with opened(path) as images:
            assert images.paths == [f"{path.name}/{name}" for name in ("a/1.png", "a/2", "abs/5.PNG")]
            assert images.skipped == {".txt": 1, "(no suffix)": 1, ".png": 2}
            why = dict(zip(images.left_out, images.why, strict=True))
            assert why[f"{path.name}/.git/4.png"].startswith("hidden: its name, or that of a folder above it")


def test_an_image_name_with_other_content_is_an_image_that_fails(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"no image"), ("b.png", PNG), ("c.jpg", b"")])
    assert list(contents(path)) == ["s.tar/a.png", "s.tar/b.png", "s.tar/c.jpg"]


def test_the_last_of_two_members_of_one_name_counts_as_in_unpacking(tmp_path):
    other = encoded(picture(seed=9), "PNG")
    files = [("a.png", PNG), ("b.png", PNG), ("./a.png", other)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, while writing
        paths = [write_tar(tmp_path / "s.tar", files), write_zip(tmp_path / "s.zip", files)]
    for path in paths:
        assert contents(path)[f"{path.name}/a.png"] == other
        with opened(path) as images:
            assert (len(images), images.duplicates) == (2, 1)


def test_several_images_of_one_key_are_images_with_one_label(tmp_path):
    files = [
        ("a.left.png", PNG),
        ("a.right.png", PNG),
        ("a.cls", b"7"),
        ("b.png", PNG),
        ("b.cls", b" 12\n"),
        ("c.png", PNG),
    ]
    with opened(write_tar(tmp_path / "s.tar", files)) as images:
        assert images.paths == ["s.tar/a.left.png", "s.tar/a.right.png", "s.tar/b.png", "s.tar/c.png"]
        named = [images.classes[label] if label >= 0 else "" for label in images.labels]
        assert (named, images.labels_from) == (["7", "7", "12", ""], ".cls in the shards")


@pytest.mark.parametrize("pack", [write_tar, write_zip])
def test_a_class_belongs_to_the_image_whose_name_it_has(pack, tmp_path):
    """All of a.1, a.2, a.3 have the key `a`, and each its own class."""
    files = [("a.1.png", PNG), ("a.1.cls", b"ant"), ("a.2.png", PNG), ("a.2.json", b'{"label": "bee"}'),
             ("a.3.png", PNG), ("a.3.cls", b"cat"), ("a.3.json", b'{"label": "no"}'), ("a.4.png", PNG),
             ("b.x.png", PNG), ("b.y.png", PNG), ("b.cls", b"of the key"), ("b.y.cls", b"own"),
             ("c.png", PNG), ("c.mask.png", PNG), ("c.cls", b"c"),
             ("d.png", PNG), ("d.label.cls", b"d"), ("e.png", PNG), ("e.json", b'\xef\xbb\xbf{"label": "mark"}'),
             ("f.png", PNG), ("f.cls", b"\xef\xbb\xbfmark\r\n")]  # fmt: skip
    with opened(pack(tmp_path / "s", files)) as images:
        named = {
            path[2:-4]: images.classes[label] if label >= 0 else ""
            for path, label in zip(images.paths, images.labels, strict=True)
        }
    assert named == {
        "a.1": "ant", "a.2": "bee", "a.3": "cat", "a.4": "", "b.x": "of the key", "b.y": "own", "c": "c", "c.mask": "c",
        "d": "d", "e": "mark", "f": "mark",
    }  # fmt: skip


def test_classes_deeper_in_json_and_tables(tmp_path):
    files = [
        ("a.png", PNG),
        ("a.json", b'{"meta": {"label": "ant", "a": {"c": 4}}}'),
        ("b.png", PNG),
        ("b.json", b'{"meta": 3}'),
    ]
    write_tar(tmp_path / "s.tar", files)
    for column, named in (
        ("meta.label", ["ant", ""]),
        ("meta.a.c", ["4", ""]),
        ("meta", ["", "3"]),
        ("meta.none", ["", ""]),
    ):
        with opened(tmp_path / "s.tar", label_column=column) as images:
            assert [images.classes[x] if x >= 0 else "" for x in images.labels] == named
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [PNG] * 3, "meta": [{"label": "ant", "n": 1}, {"label": "bee", "n": 2}, None]})
    parquet.write_table(table, tmp_path / "p.parquet")
    for column, named in (("meta.label", ["ant", "bee", ""]), ("meta.n", ["1", "2", ""]), ("meta.none", ["", "", ""])):
        with opened(tmp_path / "p.parquet", label_column=column) as images:
            assert [images.classes[x] if x >= 0 else "" for x in images.labels] == named
    assert refused(tmp_path / "p.parquet", label_column="metal.label")[0] == Status.CORRUPT


def test_labels_from_json_beside_the_images(tmp_path):
    meta = [{"label": "ant", "kind": "x"}, {"label": 3.0, "kind": "y"}, ["no"], {"kind": "z"}]
    files = [one for i, value in enumerate(meta) for one in
             ((f"d/{i}.png", PNG), (f"d/{i}.json", json.dumps(value).encode()))]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", [*files, ("d/9.json", b"{broken")])
    with opened(path) as images:
        assert [images.classes[x] if x >= 0 else "" for x in images.labels] == ["ant", "3", "", ""]
    with opened(path, label_column="kind") as images:
        assert [images.classes[x] if x >= 0 else "" for x in images.labels] == ["x", "y", "", "z"]
    with opened(path, class_level=1) as images:
        assert images.classes == ["d"]


def test_a_zip_with_backslashes_has_folders(tmp_path):
    """As old .NET writes them. On Linux a name may hold one."""
    for system, names in ((0, ["s.zip/ant/1.png", "s.zip/bee/2.png"]), (3, ["s.zip/ant\\1.png", "s.zip/bee\\2.png"])):
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            for name, data in (("ant\\", b""), ("ant\\1.png", PNG), ("bee\\2.png", PNG)):
                info = zipfile.ZipInfo("x")
                info.filename, info.create_system = name, system
                archive.writestr(info, data)
        with opened(tmp_path / "s.zip") as images:
            assert images.paths == names
            assert images.classes == (["ant", "bee"] if system == 0 else [])
            assert all(images.read(row) == PNG for row in range(2))


def test_a_sparse_member_does_not_make_a_tar_truncated(tmp_path):
    """`tar -S`: a log file with a hole of a gigabyte has few bytes in the tar."""

    def sparse(name: str, data: bytes, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(data), b"S"
        head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        head[386:410] = b"%011o\0%011o\0" % (size - len(data), len(data))  # where the data lie
        head[483:495] = b"%011o\0" % size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head) + data + bytes(-len(data) % 512)

    plain = write_tar(tmp_path / "plain.tar", [("a.png", PNG)]).read_bytes()
    whole = sparse("x.log", b"end", 1 << 30) + sparse("b.png", PNG, 1 << 20) + plain
    (tmp_path / "s.tar").write_bytes(whole)
    with opened(tmp_path / "s.tar") as images:
        assert images.paths == ["s.tar/a.png", "s.tar/b.png"]
        assert images.read(0) == PNG
        assert images.read(1) == bytes((1 << 20) - len(PNG)) + PNG
    (tmp_path / "s.tar").write_bytes(whole[:514])
    assert refused(tmp_path / "s.tar")[0] == Status.TRUNCATED


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar here")
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_files_with_holes_are_read_as_they_were(format, tmp_path):
    """An image with a hole after it and one in it, its class, and an image without a suffix."""
    holes = {"a.png": (PNG, 1 << 20, b""), "b.bmp": (PNG[:99], 1 << 20, PNG[99:]), "a.cls": (b"ant", 1 << 17, b""),
             "c": (PNG, 1 << 20, b"")}  # fmt: skip
    for name, (head, hole, tail) in holes.items():
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(len(head) + hole)
            file.seek(0, os.SEEK_END)
            file.write(tail)
    subprocess.run(["tar", "-S", f"--format={format}", "-cf", "s.tar", *holes], cwd=tmp_path, check=True)
    assert os.path.getsize(tmp_path / "s.tar") < 1 << 18
    with opened(tmp_path / "s.tar") as images:
        assert {path: images.read(row) for row, path in enumerate(images.paths)} == {
            f"s.tar/{name}": (tmp_path / name).read_bytes() for name in ("a.png", "b.bmp", "c")
        }
        assert dict(images.beside("a.png"))["a.cls"] == (tmp_path / "a.cls").read_bytes()


def test_links_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        links = [("a/2.png", tarfile.LNKTYPE, "a/1.png"), ("a/3.png", tarfile.SYMTYPE, "1.png"),
                 ("a/4.png", tarfile.SYMTYPE, "gone.png")]  # fmt: skip
        for name, kind, link in [("a/1.png", None, ""), *links]:
            info = tarfile.TarInfo(name)
            if kind is None:
                info.size = len(PNG)
                tar.addfile(info, io.BytesIO(PNG))
            else:
                info.type, info.linkname = kind, link
                tar.addfile(info)
    with opened(tmp_path / "s.tar") as images:
        assert [images.read(row) for row in range(3)] == [PNG] * 3
        with pytest.raises(ImageError) as error:
            images.read(3)
        assert (error.value.status, error.value.reason) == (Status.MISSING, "a link to what is not in the shard")


def test_a_hard_link_is_to_what_had_the_name_before_it(tmp_path):
    """`tar -r` puts another a.png behind, and the link is none to that. A file that is given twice, and has two names,
    becomes a link to itself, which unpacking passes over."""
    other = encoded(picture(seed=9), "PNG")
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    tar = ["tar", "--format=gnu", "-C", tmp_path, "-f", tmp_path / "s.tar"]
    subprocess.run([*tar, "-c", "a.png", "a.png", "b.png"], check=True)
    assert contents(tmp_path / "s.tar") == {"s.tar/a.png": PNG, "s.tar/b.png": PNG}
    with opened(tmp_path / "s.tar") as images:
        assert (images.duplicates, images.links) == (0, 1)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").write_bytes(other)
    subprocess.run([*tar, "-r", "a.png"], check=True)
    assert contents(tmp_path / "s.tar") == {"s.tar/a.png": other, "s.tar/b.png": PNG}
    with opened(tmp_path / "s.tar") as images:
        assert (images.duplicates, images.links) == (1, 1)


def test_rows_without_bytes_fail_one_by_one(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": PNG, "path": None}, {"bytes": None, "path": "/x.png"}, None, {"bytes": b"", "path": "/x.png"}]
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "a.parquet")
    with opened(tmp_path / "a.parquet") as images:
        assert images.read(0) == PNG
        said = []
        for row in (1, 2, 3):
            with pytest.raises(ImageError) as error:
                images.read(row)
            said.append((error.value.status, error.value.reason))
    assert said == [(Status.MISSING, tables._ONLY_A_PATH), (Status.MISSING, "no bytes in its row"),
                    (Status.EMPTY, "no bytes in its row")]  # fmt: skip


# --- shards that cannot be used


def test_a_tar_cut_anywhere_is_truncated_or_the_same(tmp_path):
    """Python's tarfile takes most cuts for the end of the archive."""
    path = write_tar(tmp_path / "s.tar", [(f"{i}.png", PNG) for i in range(4)])
    whole, data = contents(path), path.read_bytes()
    end = 4 * (512 + -(-len(PNG) // 512) * 512)
    for cut in [*range(0, len(data), 97), end, end + 511, end + 512, end + 1024]:
        path.write_bytes(data[:cut])
        if cut >= end + 512:
            assert contents(path) == whole
        else:
            assert refused(path)[0] in (Status.TRUNCATED, Status.EMPTY, Status.CORRUPT), cut


def test_damaged_headers_and_joined_tars_are_not_the_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{i}.png", PNG) for i in range(4)])
    data = path.read_bytes()
    step = 512 + -(-len(PNG) // 512) * 512
    path.write_bytes(data[: 2 * step] + b"\xff" * 100 + data[2 * step + 100 :])
    assert refused(path) == (Status.CORRUPT, f"a damaged header at byte {2 * step:,}")
    path.write_bytes(data + data)
    status, reason = refused(path)
    assert (status, "put together by cat" in reason) == (Status.CORRUPT, True)


def test_gzip_parquet_zip_that_are_cut_or_damaged(folder, tmp_path):
    files = members(folder)
    for path, cut_status in (
        (write_tar(tmp_path / "s.tar.gz", files, "w:gz"), Status.TRUNCATED),
        (write_zip(tmp_path / "s.zip", files), Status.CORRUPT),
    ):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert refused(path)[0] == cut_status
    packed = gzip.compress(b"x" * 5000)
    (tmp_path / "bad.tar.gz").write_bytes(packed[:30] + b"\0\0\0" + packed[33:])
    assert refused(tmp_path / "bad.tar.gz")[0] in (Status.CORRUPT, Status.TRUNCATED)


def test_a_parquet_file_that_is_cut(folder, tmp_path):
    pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "s.parquet", members(folder))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert refused(path)[0] == Status.TRUNCATED


def test_a_damaged_member_of_a_zip_fails_alone(tmp_path):
    path = write_zip(tmp_path / "s.zip", [("a.png", PNG), ("b.png", PNG)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(PNG) + 100] ^= 255
    path.write_bytes(data)
    with opened(path) as images:
        assert images.read(1) == PNG
        with pytest.raises(ImageError) as error:
            images.read(0)
        assert error.value.status == Status.CORRUPT


@pytest.mark.parametrize(
    ("compression", "old", "new", "status", "reason"),
    [
        (zipfile.ZIP_STORED, "é".encode(), b"\xff\xa9", Status.CORRUPT, "codec can't decode"),  # in front of the member
        (zipfile.ZIP_DEFLATED, b"\x08\0", b"\x09\0", Status.UNSUPPORTED, "compression method is not supported"),
        (zipfile.ZIP_BZIP2, b"BZh9", b"BZh!", Status.CORRUPT, "Invalid data stream"),
    ],
)
def test_a_member_of_a_zip_that_cannot_be_read_says_why(compression, old, new, status, reason, tmp_path):
    path = write_zip(tmp_path / "s.zip", [("é.png", PNG), ("z.png", PNG)], compression)
    head, mark, rest = path.read_bytes().rpartition(b"PK\x01\x02")  # of the second member, in the directory
    head, first, directory = head.rpartition(b"PK\x01\x02")
    if status == Status.UNSUPPORTED:
        directory = directory.replace(old, new, 1)
    path.write_bytes(head.replace(old, new, 1) + first + directory + mark + rest)
    with opened(path) as images:
        with pytest.raises(ImageError) as error:
            images.read(images.paths.index("s.zip/é.png"))
        assert images.read(images.paths.index("s.zip/z.png")) == PNG
    assert (error.value.status, reason in error.value.reason) == (status, True), error.value.reason


def _directory(old: bytes, new: bytes) -> bytes:
    """A zip whose directory says something else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("é.png", PNG)
    head, mark, directory = buffer.getvalue().rpartition(b"PK\x01\x02")
    return head + mark + directory.replace(old, new, 1)


def _back_again() -> bytes:
    """A tar whose second member ends where it begins."""
    info = tarfile.TarInfo("a.png")
    info.size = len(PNG)
    one = info.tobuf(tarfile.USTAR_FORMAT) + PNG + bytes(-len(PNG) % 512)
    head = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[148:156] = (256**12 - 512).to_bytes(12, "big"), b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return one + bytes(head) + bytes(1024)


def _odd_holes() -> bytes:
    info = tarfile.TarInfo("a.png")
    info.size = len(PNG)
    info.pax_headers = {"GNU.sparse.map": "0,$96", "GNU.sparse.size": "4096"}
    return info.tobuf(tarfile.PAX_FORMAT) + PNG + bytes(-len(PNG) % 512 + 1024)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("make", "status", "reason"),
    [
        (lambda: _directory("é".encode(), b"\xff\xa9"), Status.CORRUPT, "codec can't decode"),
        (lambda: _directory(b"\x14\x03\x14\0", b"\x14\x03\x63\0"), Status.UNSUPPORTED, "zip file version 9.9"),
        (_back_again, Status.CORRUPT, ""),
        (_odd_holes, Status.CORRUPT, "invalid"),
    ],
)
def test_damage_of_every_kind_is_the_shards_trouble(make, status, reason, tmp_path):
    """Libraries stumble over it in errors of their own, which ended the whole run, or never come to an end."""
    (tmp_path / "s").write_bytes(make())
    found, why = refused(tmp_path / "s")
    assert (found, reason in why) == (status, True), why


@pytest.mark.parametrize(
    ("name", "data", "status", "reason"),
    [
        ("s.tar", b"", Status.EMPTY, "zero bytes"),
        ("s.tar", b"<html>404 not found</html>", Status.CORRUPT, "begins with b'<html>404 no'"),
        ("s.parquet", PNG, Status.CORRUPT, "an image: not a tar, zip, Parquet or Arrow file"),
        ("s.tar", bytes(10240), Status.EMPTY, "a tar without members"),
        ("s.tar", bytes(1024), Status.EMPTY, "a tar without members"),
        ("s.tar", bytes(20480), Status.CORRUPT, "begins with zeros: not a tar"),
        ("s.zip", bytes(10240), Status.CORRUPT, "begins with zeros: not a tar"),
    ],
)
def test_what_is_not_what_its_name_says(name, data, status, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    found = refused(tmp_path / name)
    assert found[0] == status
    assert reason in found[1]


def test_content_decides_not_the_name(tmp_path):
    path = write_zip(tmp_path / "really-a-zip.tar", [("a.png", PNG)])
    assert list(contents(path)) == ["really-a-zip.tar/a.png"]
    gz = write_tar(tmp_path / "really-packed.tar", [("a.png", PNG)], "w:gz")
    assert list(contents(gz)) == ["really-packed.tar/a.png"]


def test_a_shard_without_images(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    assert refused(path) == (Status.EMPTY, "holds no images (but .txt 2)")
    assert refused(tmp_path / "gone.tar") == (Status.MISSING, "no such file")


def test_single_images_are_read_by_their_ids(folder, tmp_path):
    files = members(folder)
    write_tars(tmp_path / "set/deep", files, 2)
    write_zip(tmp_path / "set/z.zip", files)
    (tmp_path / "set/plain.png").write_bytes(PNG)
    with ImageReader(tmp_path / "set") as read:
        for name, data in files:
            assert read(f"z.zip/{name}") == data
        assert read(f"deep/0000.tar/{files[0][0]}") == files[0][1]
        assert read(f"deep/0001.tar/{files[-1][0]}") == files[-1][1]
        assert read("plain.png") == PNG
        elsewhere = f"deep/0000.tar/{files[-1][0]}"
        for path in ("gone.png", "gone.tar/x.png", "z.zip/gone.png", "plain.png/x.png", elsewhere):
            with pytest.raises(ImageError):
                read(path)


def test_a_sheet_of_images_in_shards(folder, tmp_path):
    write_tars(tmp_path / "set", members(folder), 2)
    names = [path for shard in ("0000.tar", "0001.tar") for path in contents(tmp_path / "set" / shard)]
    _, unreadable = contact_sheet([("all", names[:3], names[-3:])], str(tmp_path / "set"))
    assert unreadable == 0


@pytest.mark.parametrize("merged", [False, True])
def test_images_named_by_an_id_column_are_shown(merged, folder, tmp_path):
    """How the shards were read is in the feature files: `sheet`, `report` and `compare` find the images again."""
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "part-0.parquet", members(folder))
    embed = ["embed", tmp_path / "part-0.parquet", "--id-column", "name", "--encoder", "mini", "--device", "cpu"]
    features = tmp_path / ("f.h5" if merged else "f")
    if merged:
        assert call(*embed, "-o", tmp_path / "set").exit_code == 0
        assert call("merge", tmp_path / "set", "-o", features).exit_code == 0
    else:
        assert call(*embed, "-o", features).exit_code == 0
    assert protoprune.select(features, 1.0, k=2).kept_paths[0] == f"part-0.parquet/{members(folder)[0][0]}"
    result = call("sheet", features, "-o", tmp_path / "s.png")
    assert "could not be read" not in result.stderr, result.stderr
    result = call("report", features, "-o", tmp_path / "r.html")
    assert f"{sum(COUNTS.values())} thumbnails" in result.stderr, result.stderr


def test_a_single_shard_in_a_file_of_its_own_is_shown(folder, tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "p.parquet", members(folder), "binary")
    result = call("embed", tmp_path / "p.parquet", "--id-column", "name", "--image-column", "image", "-o",
                  tmp_path / "f.h5", "--encoder", "mini", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "could not be read" not in call("sheet", tmp_path / "f.h5", "-o", tmp_path / "s.png").stderr


def test_images_in_shards_on_a_store_are_shown_up_to_a_number_of_bytes(folder, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="needs protoprune[remote]")
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in write_tars(tmp_path / "tars", members(folder), 3).iterdir():
        store.pipe(f"/shown/{path.name}", path.read_bytes())
    fetched, real = [], type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, *a, **o: (fetched.append(a[0]), real(self, *a, **o))[1])
    names = [path for shard in sorted((tmp_path / "tars").iterdir()) for path in contents(shard)]
    with ImageReader("memory://shown") as read:
        for name, (_, data) in zip(names, members(folder), strict=True):
            assert read(name) == data
        assert read(names[0]) == members(folder)[0][1]
        assert len(fetched) == 3  # each of them once
        for wrong in ("0000.tar/gone.png", "gone.tar/x.png", "x.png"):
            with pytest.raises(ImageError):
                read(wrong)
        copies = list(read._copies.values())
        assert all(os.path.exists(path) for path in copies)
    assert not any(os.path.exists(path) for path in copies)
    monkeypatch.setattr("protoprune.sources.reader._FETCHED", (tmp_path / "tars/0000.tar").stat().st_size + 1)
    with pytest.warns(ProtopruneWarning, match=r"memory://shown/000.\.tar and further shards are not fetched") as said:
        _, unreadable = contact_sheet([("all", names[:5], names[5:])], "memory://shown")
    assert (unreadable, len(said)) == (10, 1)
    store.store.clear()


# --- bounds


def test_an_image_in_a_shard_is_not_read_beyond_the_bound_either(tmp_path, monkeypatch):
    monkeypatch.setattr("protoprune.images.decode.MAX_BYTES", len(PNG))
    files = [("c/1.png", PNG), ("c/2.png", PNG + b"x")]
    shards = [write_tar(tmp_path / "a.tar", files), write_zip(tmp_path / "a.zip", files)]
    if importlib.util.find_spec("pyarrow"):
        shards.append(write_parquet(tmp_path / "a.parquet", files))
    for shard in shards:
        with opened(shard) as images:
            assert images.read(0) == PNG
            with pytest.raises(ImageError, match="which is as much as is read") as caught:
                images.read(1)
        assert caught.value.status == Status.TOO_LARGE


@pytest.mark.parametrize(
    "compression",
    [
        zipfile.ZIP_DEFLATED,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    ],
)
def test_a_zip_that_unpacks_to_more_than_it_says_costs_no_memory(compression, tmp_path):
    path = write_zip(tmp_path / "a.zip", [("1.png", bytes(200_000_000)), ("2.png", PNG)], compression)
    size = struct.pack("<I", 200_000_000)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 5000)))
    tracemalloc.start()
    with opened(path) as images:
        with pytest.raises(ImageError) as caught:
            images.read(0)
        assert images.read(1) == PNG
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status == Status.CORRUPT  # its checksum is that of the whole
    assert peak < (150e6 if compression == zipfile.ZIP_BZIP2 else 80e6)


@pytest.mark.timeout(60)
def test_a_tar_that_claims_gigabytes_is_no_end_of_the_run(tmp_path):
    """A sparse file: an image of 99 GB, or a header with as long a comment."""
    info = tarfile.TarInfo("1.png")
    info.size = 99_000_000_000
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(99_000_010_240)
    with opened(tmp_path / "a.tar") as images, pytest.raises(ImageError, match="more than 1 GB") as caught:
        images.read(0)
    assert caught.value.status == Status.TOO_LARGE


def test_want_of_memory_for_a_shard_is_the_shards_trouble(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("1.png", PNG)])

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(tarfile, "open", full)
    assert refused(path) == (Status.UNREADABLE, "not enough memory to read what it says of itself")


def test_half_characters_in_json_do_not_end_a_run(tmp_path):
    """A file cannot be called so, and a class can hardly, but a .json may say it."""
    files = [("1.png", PNG), ("1.json", b'{"label": "\\ud800"}'), ("2.png", PNG), ("2.json", '{"label": "é"}'.encode())]
    with opened(write_tar(tmp_path / "a.tar", files)) as images:
        assert images.classes == ["é", os.fsdecode(b"\xed\xa0\x80")]
        assert [os.fsencode(name) for name in images.classes] == ["é".encode(), b"\xed\xa0\x80"]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("0.tar/a/1.jpg", ("0.tar", "a/1.jpg")),
        ("x.y/d.PARQUET/https://h/b.zip/1", ("x.y/d.PARQUET", "https://h/b.zip/1")),
        ("s.tar.gz/1", ("s.tar.gz", "1")),
        ("a/1.jpg", ("", "a/1.jpg")),
        ("1.tar", ("", "1.tar")),
    ],
)
def test_ids_of_images_in_shards(path, parts):
    assert split_id(path) == parts


def test_no_links_into_shards(folder, tmp_path):
    write_tars(tmp_path / "set", members(folder), 2)
    features = tmp_path / "f"
    assert call("embed", tmp_path / "set", "-o", features, "--encoder", "mini", "--device", "cpu").exit_code == 0
    result = call("select", features, "--keep", "0.5", "--links", tmp_path / "links")
    assert result.exit_code == 2
    assert "lies in a shard, to which no link can lead; `protoprune reshard LIST OUT` writes" in result.stderr
    assert not (tmp_path / "links").exists()


def test_folders_that_are_called_like_patterns(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "[2024] {a}/deep", members(folder), 2)
    for spec in (
        "[2024] {a}/deep/*.tar",
        "[2024] {a}/deep/{0000..0001}.tar",
        str(tmp_path / "[2024] {a}/deep/000?.tar"),
    ):
        source = find_shards(spec)
        assert [shard.name for shard in source.shards] == ["0000.tar", "0001.tar"]
        assert source.root == str(tmp_path / "[2024] {a}/deep")
    assert [shard.name for shard in find_shards("[2024] {a}/**/*.tar").shards] == ["deep/0000.tar", "deep/0001.tar"]
    with pytest.raises(ProtopruneError, match="none of the 1 shards is there"):
        find_shards("[2024] {a}/gone.tar")


def test_tables_that_hold_paths_or_lists_say_what_to_do(tmp_path):
    """`to_parquet` of datasets writes the paths of an image folder, and embed of it must not look like a success."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": None, "path": f"/data/{i}.png"} for i in range(3)]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    parquet.write_table(pyarrow.table({"image": pyarrow.array(rows, kind)}), tmp_path / "p.parquet")
    embed = ["--encoder", "mini", "--device", "cpu", "-o", tmp_path / "f"]
    result = call("embed", tmp_path / "p.parquet", *embed, "--errors", tmp_path / "e.csv")
    assert result.exit_code == 1
    assert "none of 3 images could be used; see" in result.stderr.splitlines()[-1]
    assert (tmp_path / "e.csv").read_text().count("only a path: to_parquet of datasets leaves images out") == 3
    lists = pyarrow.array([[{"bytes": PNG, "path": None}] * 2], pyarrow.list_(kind))
    parquet.write_table(pyarrow.table({"pages": lists}), tmp_path / "l.parquet")
    for options in ({}, {"image_column": "pages"}):
        assert "its column pages holds lists of images" in refused(tmp_path / "l.parquet", **options)[1]


def test_nan_is_no_class(tmp_path):
    """What a column of numbers has for nothing, and Python's json writes; null is none in either."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [PNG] * 3, "label": [1.0, float("nan"), None]})
    parquet.write_table(table, tmp_path / "s.parquet")
    write_tar(tmp_path / "s.tar", [("a.png", PNG), ("a.json", b'{"label": 1}'), ("b.png", PNG),
                                   ("b.json", b'{"label": NaN}'), ("c.png", PNG)])  # fmt: skip
    for name in ("s.parquet", "s.tar"):
        with opened(tmp_path / name) as images:
            assert (images.classes, images.labels.tolist()) == (["1"], [0, -1, -1]), name


def test_where_classes_are_from_is_said(tmp_path):
    files = [("a.png", PNG), ("a.json", b'{"label": "x"}'), ("b.png", PNG), ("b.cls", b"y")]
    write_tar(tmp_path / "s.tar", files)
    result = call("embed", tmp_path / "s.tar", "--encoder", "mini", "--device", "cpu", "-o", tmp_path / "f")
    assert "classes are from .cls and .json in the shards" in result.stderr


def test_what_lies_beside_an_image_may_be_a_link(tmp_path):
    """`tar` of a tree whose copies were made hard links: the second class file is a link to the first."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data, to in (("a.png", PNG, ""), ("a.cls", b"x", ""), ("b.png", PNG, ""), ("b.cls", b"", "a.cls"),
                               ("c.png", b"", "a.png"), ("c.json", b"", "gone.json")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size, info.linkname, info.type = len(data), to, tarfile.LNKTYPE if to else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    with opened(tmp_path / "s.tar") as images:
        assert [images.classes[x] if x >= 0 else "" for x in images.labels] == ["x", "x", ""]
        assert images.beside("b.png") == [("b.cls", b"x")]
        assert (images.links, images.read(2)) == (1, PNG)
    result = call("embed", tmp_path / "s.tar", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu")
    assert "1 image is a link in its tar: WebDataset passes over links" in result.stderr


def test_a_stream_of_arrow_is_known_by_its_content(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [PNG] * 2})
    with pyarrow.ipc.new_stream(tmp_path / "stream", table.schema) as stream:
        stream.write_table(table)
    assert archive_kind((tmp_path / "stream").read_bytes()[:512]) == "an Arrow file"
    assert is_shard(str(tmp_path / "stream"))


def test_a_stream_of_arrow_that_ends_between_two_batches_is_cut_off(tmp_path):
    """Whoever wrote it was killed: the images that it lacks are not left out in silence."""
    pyarrow = pytest.importorskip("pyarrow")
    table, ends = pyarrow.table({"image": [PNG] * 4}), []
    with pyarrow.OSFile(str(tmp_path / "s.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        for batch in table.to_batches(2):
            stream.write_batch(batch)
            ends.append(file.tell())
    data = (tmp_path / "s.arrow").read_bytes()
    assert len(contents(tmp_path / "s.arrow")) == 4
    for end in ends:
        (tmp_path / "cut.arrow").write_bytes(data[:end])
        assert refused(tmp_path / "cut.arrow") == (Status.TRUNCATED, "cut off: it has no end marker")
    (tmp_path / "more.arrow").write_bytes(data + b"0123456789")
    assert len(contents(tmp_path / "more.arrow")) == 4


def test_columns_of_views_hold_images_too(tmp_path):
    """Polars writes them into Arrow files."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": pyarrow.array([PNG] * 2, pyarrow.binary_view()), "caption": ["x", "y"]})
    with pyarrow.ipc.new_file(tmp_path / "s.arrow", table.schema) as file:
        file.write_table(table)
    assert list(contents(tmp_path / "s.arrow").values()) == [PNG] * 2


# --- what comes out of packed files


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz", "parquet", "columns"])
def test_what_unpacks_to_more_than_can_be_meant_or_than_there_is_room_for(kind, tmp_path, monkeypatch):
    bitmap = b"BM" + bytes(400_000)
    files = [(f"{i}.bmp", bitmap) for i in range(3)]
    if kind in ("parquet", "columns"):
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        image = [PNG] * 3 if kind == "columns" else [bitmap] * 3
        path = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": image, "mask": [bitmap] * 3}), path, compression="zstd")
    else:
        path = write_tar(tmp_path / f"x.{kind}", files, f"w:{kind[4:]}")

    def read():
        with opened(path) as images:
            return images.beside("000000") if kind == "columns" else images.paths

    assert read()
    monkeypatch.setattr(unpacking, "_LEAST_DISK", 1000)
    monkeypatch.setattr(unpacking, "_TIMES", 10)
    said = {}
    with pytest.raises((ShardError, unpacking.TooMuchError)) as error:
        read()
    said["times"] = str(error.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises((ShardError, unpacking.TooMuchError)) as error:
        read()
    said["free"] = str(error.value)
    monkeypatch.undo()
    full = functools.partial(open, "/dev/full", "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises((ShardError, unpacking.TooMuchError)) as error:
        read()
    said["full"] = str(error.value)
    folder = tempfile.gettempdir()
    assert re.fullmatch(r"unpacks to more than [\d.,]+ (bytes|kB), 10 times its size", said["times"])
    assert said["free"] == f"unpacks to more than 900 bytes, nine tenths of what is free in {folder}"
    assert said["full"] == f"no room for it in {folder} (No space left on device); TMPDIR names another place"


def test_options_of_a_later_version_are_refused_in_a_line():
    assert ShardOptions.of({"shard_options": ShardOptions(class_level=2).as_text()}) == ShardOptions(class_level=2)
    later = {"shard_options": json.dumps({"labels": True, "crop": 3, "audio": None}), "protoprune": "7.1"}
    with pytest.raises(ProtopruneError, match=r"of protoprune 7\.1, .* does not know \(audio, crop\); upgrade it"):
        ShardOptions.of(later)
