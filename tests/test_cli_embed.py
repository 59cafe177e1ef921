"""`protoprune embed` and `encoders` as a user meets them: exit codes, streams, lists on stdin, Ctrl-C."""

import csv
import gzip
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from helpers import encoded, many_scans
from PIL import Image
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.cli.progress import Progress
from protoprune.encoders import CATALOGUE
from protoprune.features.featurefile import FeatureFile
from protoprune.images.listing import list_folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / f"c{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return tmp_path / "images"


def call(*arguments, **options):
    """Run the command in this process; device and encoder are fixed so that machines agree."""
    return CliRunner().invoke(app, ["embed", *map(str, arguments), "--encoder", "mini", "--device", "cpu"], **options)


def test_a_folder_becomes_a_feature_file(images, tmp_path):
    (images / "notes.txt").write_text("x")
    result = call(images, "-o", tmp_path / "f.h5")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "12 images in 2 classes" in result.stderr
    assert "left out 1 file that is not an image by name: .txt 1" in result.stderr
    assert "12 embedded" in result.stderr
    assert call(images, "-o", tmp_path / "f.h5").stderr.splitlines()[-1].endswith("up to date, 12 images x 192 (mini)")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.classes == ["c0", "c1"]
        assert file.provenance["root"] == str(images)


def test_failures_are_counted_and_listed_and_strict_makes_them_an_error(images, tmp_path):
    (images / "c0" / "cut.png").write_bytes((images / "c0" / "00.png").read_bytes()[:300])
    (images / "c1" / "empty.jpg").touch()
    result = call(images, "-o", tmp_path / "f.h5", "--errors", tmp_path / "e.csv")
    assert result.exit_code == 0
    assert "2 images could not be used: empty 1, truncated 1" in result.stderr
    assert "14 images x 192" in result.stderr
    assert "; 12 embedded in " in result.stderr
    with open(tmp_path / "e.csv", newline="") as file:
        assert [(row["path"], row["status"]) for row in csv.DictReader(file)] == [
            ("c0/cut.png", "truncated"), ("c1/empty.jpg", "empty"),
        ]  # fmt: skip
    assert call(images, "-o", tmp_path / "f.h5", "--strict").exit_code == 1


def test_what_pillow_says_of_odd_files_is_in_their_reasons_and_nowhere_else(images, tmp_path):
    """Of a TIFF of seven channels in its log, of damaged EXIF as a warning."""
    odd = bytearray(encoded(Image.new("RGB", (4, 4)), "TIFF"))
    samples = odd.index(struct.pack("<HHI", 277, 3, 1))
    odd[samples + 8 : samples + 10] = struct.pack("<H", 7)
    (images / "c0" / "odd.tif").write_bytes(odd)
    exif = b"II*\0\x08\0\0\0\2\0\1\1"
    (images / "c1" / "exif.png").write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG", exif=exif))
    result = call(images, "-o", tmp_path / "f.h5", "--errors", tmp_path / "e.csv")
    assert result.exit_code == 0
    for word in ("More samples", "Warning", "warn", "EXIF"):
        assert word not in result.stderr
    assert (tmp_path / "e.csv").read_text().splitlines()[1:] == [
        "c0/odd.tif,corrupt,TIFF: Invalid value for samples per pixel"
    ]


def test_names_do_not_hide_what_is_wrong(images, tmp_path, monkeypatch):
    """Without a suffix the content decides, from its first bytes; what is left out for its suffix can be listed."""
    png = (images / "c0" / "00.png").read_bytes()
    huge = png[:16] + struct.pack(">II", 20_000, 20_000) + png[24:29]
    (images / "c0" / "huge").write_bytes(huge + struct.pack(">I", zlib.crc32(huge[12:29])) + png[33:])
    (images / "c0" / "photo").write_bytes(png)
    (images / "c0" / "cut").write_bytes(png[:40])
    (images / "c1" / "README").write_text("P5 is how a PGM begins, and BM a BMP")
    (images / "c1" / "BMW").write_text("BMW 1, BMW 2 and some more of it, in words")
    (images / "c1" / "slide.svs").write_bytes(encoded(Image.new("RGB", (4, 4)), "TIFF"))
    (images / "c1" / "x.jpg_original").write_bytes(encoded(Image.new("RGB", (4, 4)), "JPEG"))
    (images / "c1" / "y\nz.txt").write_text("words")
    (images / "c1" / "denied").write_bytes(png)
    real = os.open

    def refuse(path, *rest, **more):
        if str(path).endswith("denied"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    result = call(images, "-o", tmp_path / "f.h5")
    assert "left out 5 files that are not images by name: (no suffix) 2, " in result.stderr
    assert "(list them with --errors FILE)" in result.stderr
    assert call(images, "-o", tmp_path / "f.h5", "--strict").exit_code == 1
    result = call(images, "-o", tmp_path / "f.h5", "--errors", tmp_path / "e.csv")
    with open(tmp_path / "e.csv", newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            ("c0/cut", "corrupt", "PNG: broken PNG file"),
            ("c0/huge", "too large", "more than 179 million pixels"),
            ("c1/denied", "unreadable", "Permission denied"),
            ("c1/BMW", "not an image by name", "it has no suffix and begins like no image"),
            ("c1/README", "not an image by name", "it has no suffix and begins like no image"),
            ("c1/slide.svs", "not an image by name", "no image has the suffix .svs, but it begins like a TIFF file: "
             "rename it, or name it in a list of paths"),
            ("c1/x.jpg_original", "not an image by name", "no image has the suffix .jpg_original, but it begins like a "
             "JPEG file: rename it, or name it in a list of paths"),
            ("c1/y\nz.txt", "not an image by name", "no image has the suffix .txt"),
        ]  # fmt: skip
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.usable[file.paths.index("c0/photo")]


def test_what_pillow_knows_without_a_suffix_is_what_is_found(tmp_path):
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "SGI", "PCX", "JPEG2000", "DDS", "QOI"):
        (tmp_path / format.lower()).write_bytes(encoded(Image.new("RGB", (40, 40), "red"), format))
    for number, text in enumerate(
        (b"", b"x", b"P6 notes", b"\x89HDF\r\n\x1a\n" + bytes(99), b"#!/bin/sh\n" * 9, bytes(500))
    ):
        (tmp_path / f"other{number}").write_bytes(text)
    os.symlink("nowhere", tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")
    found = list_folder(tmp_path)
    assert found.paths == sorted(
        ["bmp", "dds", "gif", "ico", "jpeg", "jpeg2000", "pcx", "png", "ppm", "qoi", "sgi", "tiff", "webp"]
    )
    assert [path for path in found.left_out if "other" not in path] == ["broken", "pipe"]
    assert len(found.left_out) == 8


def test_all_failed_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("no")
    result = call(tmp_path / "images", "-o", tmp_path / "f.h5")
    assert result.exit_code == 1
    assert "error: none of 1 image could be used" in result.stderr


def test_a_list_that_is_relative_to_another_folder_says_to_which(images, tmp_path, monkeypatch):
    """`find images | protoprune embed - --root images`, and a list that is taken elsewhere."""
    monkeypatch.chdir(tmp_path)
    names = [f"images/c{i % 2}/{i:02d}.png" for i in range(12)]
    listed = "\n".join(names)
    result = call("-", "--root", "images", "-o", "f.h5", input=listed)
    assert result.exit_code == 2
    assert "error: --root images: none of the 12 listed images is below it" in result.stderr
    assert "leave --root out" in result.stderr
    assert not Path("f.h5").exists()
    assert call("-", "-o", "f.h5", input=listed).exit_code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    result = call("-", "-o", "g.h5", input=listed)
    assert result.exit_code == 1
    assert f"there is no such file below {tmp_path}/elsewhere; give --root" in result.stderr
    assert call("-", "--root", "..", "-o", "g.h5", input=listed).exit_code == 0


def test_lists_from_a_file_and_from_stdin(images, tmp_path):
    names = ["c0/00.png", "c1/01.png", "c1/gone.png"]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    result = call(tmp_path / "list.txt", "--root", images, "-o", tmp_path / "a.h5")
    assert (result.exit_code, "missing 1" in result.stderr) == (0, True)
    piped = "\0".join(str(images / name) for name in names).encode()
    assert call("-", "-o", tmp_path / "b.h5", "--root", images, input=piped).exit_code == 0
    with FeatureFile(tmp_path / "a.h5") as a, FeatureFile(tmp_path / "b.h5") as b:
        assert a.paths == b.paths == names
        np.testing.assert_array_equal(a.features[:], b.features[:])
        assert a.failures() == b.failures()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: no such folder or list"),
        (["images/c0/00.png"], 2, "a single image"),
        (["images", "--root", "."], 2, "--root goes with a list"),
        (["images", "--batch-size", "0"], 2, "--batch-size 0"),
        (["images", "--workers", "many"], 2, "--workers many"),
        (["images", "--batch-size", "99999999999"], 2, "--batch-size 99999999999: expected auto or a number from 1 to"),
        (["images", "--workers", "1025"], 2, "--workers 1025: expected auto or a number from 1 to 1024"),
        (["images", "--batch-size", "9" * 5000], 2, "expected auto or a number from 1 to 65536"),
        (["images", "--image-size", "8193"], 2, "--image-size 8193: expected at most 8192; see"),
        (["images", "--class-level", "9" * 30], 2, "the first-level folders, and at most 2048"),
        (["/proc/self/mem"], 1, "/proc/self/mem: cannot read (Input/output error)"),
        (["images", "--image-size", "96"], 2, "takes 64 only"),
        (["images", "--precision", "fp8"], 2, "expected one of auto"),
        (["images", "--precision", "bf16"], 2, "the encoder mini loses too much"),
        (["images", "--store", "int8"], 2, "--store int8"),
        (["images", "-o", "no/such/f.h5"], 2, "its folder does not exist"),
        (["images", "--errors", "no/such/e.csv"], 2, "its folder does not exist"),
        (["images", "--errors", "features.h5"], 2, "features.h5: is written as .csv"),
        (["empty"], 1, "no images found"),
        (["images", "-o", "empty", "--overwrite"], 2, "empty: a folder; name a file"),
        (["images", "--errors", "empty"], 2, "empty: a folder; name a file"),
        (["list.txt", "--errors", "list.txt"], 2, "is one of the inputs"),
        (["list.txt", "-o", "list.txt"], 2, "is one of the inputs"),
        (["images.tar", "--root", "."], 2, "--root goes with a list of paths; a folder or a pattern has its own"),
        (["photo"], 2, "photo: a single image"),
        (["images", "--no-labels", "--class-level", "1"], 2, "--no-labels does not go with --class-level"),
        (["images", "--class-names", "list.txt"], 2, "--class-names goes with --labels"),
    ],
)
def test_mistakes_get_one_line(arguments, code, message, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("images/c0/00.png\n")
    (tmp_path / "photo").write_bytes((images / "c0" / "00.png").read_bytes())
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, "images")
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not os.path.exists("features.h5")


def test_a_folder_that_has_lost_its_shards_is_said_to_hold_none(images, tmp_path):
    """'fs: a folder; name a file' sent the user elsewhere."""
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs" / "set.json").write_text("{}")
    result = CliRunner().invoke(app, ["embed", str(images), "-o", str(tmp_path / "fs"), "--encoder", "mini"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"fs: a feature set, which is made of shards, and {images} holds none" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--store int8", "--store int8: expected float16 or float32"),
        ("--precision fp8", "--precision fp8: expected one of auto, fp32, bf16, fp16"),
        ("--decode slow", "--decode slow: expected exact or fast"),
        ("--batch-size 0", "--batch-size 0: expected auto or a number from 1"),
        ("--workers many", "--workers many: expected auto or a number from 1"),
        ("--encoder resnet", "--encoder resnet: unknown; one of"),
        ("--encoder dino_vits16 --weights no.pth", "--weights no.pth: no such file"),
        ("--encoder dino_vits16 --pool max", "--pool max: expected one of token, avg"),
        ("--image-size 224", "--image-size 224: the encoder mini takes 64 only"),
        ("--device cuda:99", "--device cuda:99: "),
        ("--errors e.h5", "--errors e.h5: is written as .csv"),
    ],
)
def test_options_are_checked_before_a_bucket_or_a_large_tree_is_listed(options, message, monkeypatch):
    from protoprune import sources

    monkeypatch.setattr(sources, "find_shards", lambda *_: pytest.fail("listed"))
    result = CliRunner().invoke(app, ["embed", "memory://bucket", "--encoder", "mini", *options.split()])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_a_list_on_closed_standard_input_is_a_mistake(tmp_path):
    command = f"{sys.executable} -m protoprune embed - <&-"
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: -: standard input is closed")
    assert done.stderr.count(b"\n") == 1


def test_a_second_run_under_another_locale_goes_on(images, run_program, tmp_path, monkeypatch):
    """Names are sorted as bytes: as text, U+E000 comes before the odd bytes that another locale reads in its place."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    other = (images / "c0" / "00.png").read_bytes()
    for name in ("é.png", "\ue000.png", "\U0001f600.png", os.fsdecode(b"\xe9.png"), os.fsdecode(b"\xff.png")):
        (images / "c1" / name).write_bytes(other)
    root = tmp_path / "bäume"
    images.rename(root)
    monkeypatch.chdir(tmp_path)
    assert call(root).exit_code == 0
    (root / "c0" / "ö.png").write_bytes(other)
    (root / "c1" / "é.png").unlink()
    result = run_program("embed", root, "--encoder", "mini", "--device", "cpu", env=plain)
    assert result.returncode == 0, result.stderr
    assert b"16 of 17 images are done already, 1 to go" in result.stderr
    assert "up to date" in call(root).stderr
    with FeatureFile(tmp_path / "features.h5") as file:
        assert file.paths == sorted(file.paths, key=os.fsencode)
        assert len({row.tobytes() for row in file.features[:][file.labels == 1][6:]}) == 1


INTERRUPTED = """
import os, signal, sys, time
from protoprune.__main__ import main
from protoprune.features.featurefile import PartialFile
from protoprune.images.crew import _Thread
commit, one = PartialFile.commit, _Thread._one
def once(*given):
    PartialFile.commit = commit
    commit(*given)
    time.sleep(0.1)  # the decoding threads are at images that take long by now
    os.kill(os.getpid(), signal.SIGINT)
def seen(thread, item):
    with open(f"begun{item}", "w"):
        result = one(thread, item)
    os.rename(f"begun{item}", f"done{item}")
    return result
PartialFile.commit, _Thread._one = once, seen
sys.argv[0] = "protoprune"
main()
"""


def test_ctrl_c_waits_for_no_image_says_how_to_go_on_and_the_next_run_does_the_rest(run_program, tmp_path, monkeypatch):
    """Images of 8000 x 8000 pixels in 99 scans: 5 to 12 s of CPU time each, and all of it in C."""
    slow, small = many_scans(8000, 99), encoded(Image.new("RGB", (64, 64), "red"), "JPEG")
    (tmp_path / "images").mkdir()
    for i in range(11):
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(slow if i >= 8 else small)
    command = ["embed", "images", "--encoder", "mini", "--device", "cpu", "--batch-size", "4", "--workers", "2"]
    result = run_program(*command, "--overwrite", python=("-c", INTERRUPTED))
    said = result.stderr.decode()
    assert result.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted: 4 of 11 images are embedded" in said or "interrupted: 8 of 11" in said
    assert said.splitlines()[-1] == f"  protoprune {' '.join(command)}"  # --overwrite would throw away what is done
    assert list(tmp_path.glob("begun*"))
    assert not [i for i in range(8, 11) if (tmp_path / f"done{i}").exists()]
    for i in range(8, 11):
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(small)
    monkeypatch.chdir(tmp_path)
    again = call("images", "--batch-size", "4")
    assert again.exit_code == 0
    assert re.search("[48] of 11 images are done already, [37] to go", again.stderr)
    with FeatureFile("features.h5") as file:
        assert file.usable.sum() == 11


def test_the_default_name_keeps_the_first_sets_features(images, tmp_path, monkeypatch):
    """`embed a/` then `embed b/`, both into features.h5; a list with the disk away; archives on stdin."""
    monkeypatch.chdir(tmp_path)
    assert call("images").exit_code == 0
    before = (tmp_path / "features.h5").read_bytes()
    other = tmp_path / "other" / "x" / "1.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(other)
    (tmp_path / "list.txt").write_text("gone/1.png\ngone/2.png\n")
    for arguments, said, options in (
        (["other"], "is for images below", {}),
        (["list.txt"], "stays as it is", {}),
        (["list.txt", "--root", "other", "--overwrite"], "stays as it is", {}),
        (["-"], "the list on stdin: a damaged gzip file", {"input": gzip.compress(b"x/1.png\n" * 9)[:-9]}),
    ):
        result = call(*arguments, **options)
        assert result.exit_code in (1, 2), result.stderr
        assert said in result.stderr.splitlines()[-1]
        assert (tmp_path / "features.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["features.h5", "list.txt"]


def test_class_level_is_kept_in_the_provenance(tmp_path):
    for path in ("train/cat/1.png", "val/dog/2.png"):
        (tmp_path / "set" / path).parent.mkdir(parents=True)
        Image.new("RGB", (9, 9), "red" if "cat" in path else "blue").save(tmp_path / "set" / path)
    result = call(tmp_path / "set", "-o", tmp_path / "f.h5")
    assert "warning: the classes are the first-level folders train, val, which look like splits" in result.stderr
    result = call(tmp_path / "set", "-o", tmp_path / "f.h5", "--class-level", "2")
    assert "2 classes (folders of level 2)" in result.stderr
    assert "warning" not in result.stderr
    with FeatureFile(tmp_path / "f.h5") as file:
        assert (file.classes, file.provenance["labels_from"]) == (["cat", "dog"], "folders of level 2")


def test_classes_that_a_later_run_loses_are_told(images, tmp_path):
    """The run that adds an image, without the options of the first one."""
    table, out = tmp_path / "labels.csv", tmp_path / "f.h5"
    table.write_text("path,label\n" + "".join(f"c{i % 2}/{i:02d}.png,k{i % 3}\n" for i in range(12)))

    def told(*options):
        return [line for line in call(images, "-o", out, *options).stderr.splitlines() if "had" in line]

    assert told("--labels", table) == []
    first = told()[0]
    assert "had 3 classes (labels.csv, sha256" in first
    assert "and has 2 classes (first-level folders) now" in first
    assert told() == []  # they are what this file has by now
    assert told("--labels", table) == told("--class-level", "1") == told("--no-labels") == []  # asked for
    assert told() == []  # nothing is lost
    (images / "stray.png").write_bytes((images / "c0" / "00.png").read_bytes())
    said = call(images, "-o", out).stderr
    assert "warning: no classes, since 1 of 13 images lies in no folder (first: stray.png)" in said
    assert "had 2 classes (first-level folders), and has none now" in said
    with FeatureFile(out) as file:
        assert (file.n, file.classes) == (13, [])


def test_transparent_images_are_counted_and_decoding_and_pooling_are_shown(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        image = Image.new("RGBA", (40, 40), (10 * i, 0, 0, 255 if i == 2 else 0))
        image.save(tmp_path / "images" / f"{i}.png")
    out = str(tmp_path / "f.h5")
    command = ["embed", str(tmp_path / "images"), "--encoder", "mini", "-o", out, "--device", "cpu", "--decode"]
    said = CliRunner().invoke(app, [*command, "fast"])
    assert said.exit_code == 0, said.output
    assert "2 images have transparent parts; they are shown on white" in said.stderr
    shown = CliRunner().invoke(app, ["info", out]).stdout
    assert "transparent 2 images, shown on white" in shown
    assert '"decode": "fast"' in shown
    assert "pooling     avg" in shown
    refused = CliRunner().invoke(app, [*command, "exact"])
    assert refused.exit_code == 1
    assert "preprocess" in refused.stderr
    assert CliRunner().invoke(app, [*command, "sloppy"]).exit_code == 2


def test_encoders_lists_every_name_with_its_licence():
    result = CliRunner().invoke(app, ["encoders"], env={"COLUMNS": "200"})
    for info in CATALOGUE.values():
        line = next(line for line in result.stdout.splitlines() if line.startswith(info.name + " "))
        assert info.licence in line
        assert str(info.dim) in line


def test_plain_progress_lines_have_rate_and_time_left(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("embed") as progress:
        progress.start(1000)
        for done in range(100, 1001, 100):
            clock[0] += 5
            progress.update(done, failed=done // 500)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "embed 200/1,000 (20 %), 20 img/s, 40.0 s left, 0 failed"
    assert lines[-1] == "embed 1,000/1,000 (100 %), 20 img/s, 0.0 s left, 2 failed"
    assert len(lines) == 5
