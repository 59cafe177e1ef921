"""How files are written: whole or not at all, never in the place of a pipe, and links that hold exactly the list."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest

from protoprune import files
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.files import write_file, write_links


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


# --- long writes


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_there_is_a_warning_and_the_work_goes_on(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = False
    with (
        pytest.warns(ProtopruneWarning, match=r"f\.h5\.lock: the file system has no locks"),
        files.lock(str(tmp_path / "f.h5")),
    ):
        done = True
    assert done
    assert os.listdir(tmp_path) == []


def test_other_trouble_with_the_lock_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ProtopruneError, match="Input/output error"), files.lock(str(tmp_path / "f.h5")):
        pass


def test_a_finished_file_and_then_its_name_are_on_the_disk(tmp_path, monkeypatch):
    """After a loss of power the file is there with all its bytes, or the old one is."""
    (tmp_path / "f.partial").write_text("x")
    waited = []
    monkeypatch.setattr(files, "sync", lambda path: waited.append((path, os.path.exists(tmp_path / "f"))))
    files.publish(str(tmp_path / "f.partial"), str(tmp_path / "f"))
    assert waited == [(str(tmp_path / "f.partial"), False), (str(tmp_path), True)]


def test_a_folder_that_vanishes_is_one_clear_line(tmp_path):
    folder = tmp_path / "away"
    folder.mkdir()
    (folder / "f.partial").write_text("x")
    shutil.rmtree(folder)
    with pytest.raises(ProtopruneError, match="its folder vanished while it was being written"):
        files.publish(str(folder / "f.partial"), str(folder / "f"))
    with pytest.raises(ProtopruneError, match=r"f\.partial: vanished while it was being written; run it again"):
        files.publish(str(tmp_path / "f.partial"), str(tmp_path / "f"))


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


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm's reader leaves its images open
def test_who_makes_the_links_second_reads_that_they_are_there(tmp_path, image_tree, monkeypatch):
    """Two processes make one folder of links: what the first has made stands."""
    root = image_tree()
    write_classes = files._write_classes

    def meanwhile(*arguments):
        (tmp_path / "kept/cat").mkdir(parents=True)  # as the first has it
        (tmp_path / "kept/cat/000.png").symlink_to(root / "cat/000.png")
        write_classes(*arguments)

    monkeypatch.setattr(files, "_write_classes", meanwhile)
    with pytest.raises(UsageError, match="exists and is not empty; choose another folder, or replace"):
        write_links(tmp_path / "kept", root, ["cat/001.png"])
    assert sorted(os.listdir(tmp_path / "kept/cat")) == ["000.png"]


def test_classes_of_links_keep_their_numbers(tmp_path, image_tree):
    """A class that has lost all its images has an empty folder for loaders that count folders, and a line for those
    that count the folders of files; torchvision refuses it instead of numbering the others anew."""
    timm, datasets = pytest.importorskip("timm.data"), pytest.importorskip("torchvision.datasets")
    root = image_tree({"ape": 2, "bee": 2, "cow": 2})
    every = {"folders": ["ape", "bee", "cow"], "classes": ["ape", "bee", "cow"]}
    write_links(tmp_path / "kept", root, ["bee/000.png", "cow/001.png"], **every)
    assert (tmp_path / "kept/classes.txt").read_text() == "ape\nbee\ncow\n"
    shifted = timm.create_dataset("", root=tmp_path / "kept")
    assert [label for _, label in shifted] == [0, 1]
    mapped = timm.create_dataset("", root=tmp_path / "kept", class_map="classes.txt")
    assert [label for _, label in mapped] == [1, 2]
    with pytest.raises(FileNotFoundError, match="no valid file for the classes ape"):
        datasets.ImageFolder(tmp_path / "kept")
    assert datasets.ImageFolder(tmp_path / "kept", allow_empty=True).targets == [1, 2]
    write_links(tmp_path / "kept", root, ["ape/000.png"], **every, overwrite=True)
    assert datasets.ImageFolder(tmp_path / "kept", allow_empty=True).targets == [0]
    (tmp_path / "kept/classes.txt").write_text("ape\nbee\n")
    with pytest.raises(UsageError, match=r"nothing else, and classes\.txt is none"):
        write_links(tmp_path / "kept", root, ["ape/000.png"], **every, overwrite=True)
    write_links(tmp_path / "other", root, ["bee/000.png"])
    assert os.listdir(tmp_path / "other") == ["bee"]


def test_a_class_with_the_name_of_the_list_of_classes(tmp_path, image_tree):
    root = image_tree({"ape": 1, "classes.txt": 1})
    write_links(tmp_path / "kept", root, ["classes.txt/000.png"], classes=["ape", "classes.txt"])
    assert [p.name for p in (tmp_path / "kept").rglob("*.png")] == ["000.png"]


@pytest.mark.parametrize("hard", [False, True])
def test_links_replace_those_of_an_earlier_run_where_that_is_meant(tmp_path, image_tree, hard, monkeypatch):
    root = image_tree({"cat": 2, "dog": 2})
    classes = {"folders": ["cat", "dog"], "classes": ["cat", "dog"], "hard": hard, "overwrite": True}
    for path in ("cat/001.png", "dog/000.png", "dog/001.png"):
        write_links(tmp_path / "kept", root, [path], **classes)
        there = sorted(str(p.relative_to(tmp_path / "kept")) for p in (tmp_path / "kept").rglob("*.*"))
        assert there == sorted(["classes.txt", path])
    os.unlink(root / "dog/000.png")
    before = snapshot(tmp_path / "kept")
    monkeypatch.setattr(os, "replace", lambda *_: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(ProtopruneError, match="No space left"):
        write_links(tmp_path / "kept", root, ["cat/001.png"], **classes)
    assert snapshot(tmp_path / "kept") == before
    assert sorted(os.listdir(tmp_path)) == ["images", "kept"]


def _of_their_own(folder, root):
    """Ways to lose something with a folder of links, by what is in it."""
    (folder / "notes.txt").write_text("mine")
    yield "notes.txt"
    os.rename(folder / "notes.txt", folder / "classes.txt")
    yield "classes.txt"
    os.rename(folder / "classes.txt", folder / "cat/001.png")  # beside an image of this name
    yield "cat/001.png"
    os.unlink(folder / "cat/001.png")
    os.symlink(root / "dog/000.png", folder / "cat/001.png")  # a link, but not to the image of its name
    yield "cat/001.png"
    os.unlink(folder / "cat/001.png")
    os.link(root / "cat/001.png", folder / "cat/001.png")
    os.unlink(root / "cat/001.png")  # the link holds the last of it
    yield "cat/001.png"


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path, image_tree):
    root, kept = image_tree({"cat": 2, "dog": 2}), tmp_path / "kept"
    write_links(kept, root, ["cat/000.png"])
    for name in _of_their_own(kept, root):
        before = snapshot(kept)
        with pytest.raises(UsageError, match=f"replaces links to the images .* nothing else, and {name} is none"):
            write_links(kept, root, ["dog/000.png"], overwrite=True)
        assert snapshot(kept) == before
    os.symlink(kept, tmp_path / "link")
    with pytest.raises(UsageError, match="this is no folder of them"):
        write_links(tmp_path / "link", root, ["dog/000.png"], overwrite=True)


def test_what_comes_while_links_are_replaced_is_not_lost(tmp_path, image_tree, monkeypatch):
    root, kept = image_tree({"cat": 2}), tmp_path / "kept"
    write_links(kept, root, ["cat/000.png"])
    (tmp_path / "kept.before").mkdir()
    (tmp_path / "kept.before/other.txt").write_text("another, of an earlier time")
    looked = files.check_free

    def late(*arguments):
        looked(*arguments)
        (kept / "cat/notes.txt").write_text("mine")

    monkeypatch.setattr(files, "check_free", late)
    with pytest.raises(
        ProtopruneError, match=r"cat/notes\.txt was put among the earlier links .* they are in .*before-.* now"
    ):
        write_links(kept, root, ["cat/001.png"], overwrite=True)
    (aside,) = tmp_path.glob("kept.before-*")
    assert (aside / "cat/notes.txt").read_text() == "mine"
    assert not (tmp_path / "kept.before/cat").exists()
    assert [path.name for path in kept.rglob("*.png")] == ["001.png"]


def test_the_images_themselves_are_not_replaced_by_links(tmp_path, image_tree):
    """By whatever name their folder is given, and where the images that are listed are links to them."""
    root = image_tree({"cat": 1})
    os.rename(root, tmp_path / "store")
    os.symlink("store", root)
    farm = tmp_path / "farm/cat"
    farm.mkdir(parents=True)
    os.symlink(tmp_path / "store/cat/000.png", farm / "000.png")
    os.link(tmp_path / "store/cat/000.png", tmp_path / "another name.png")
    before = snapshot(tmp_path)
    for folder, of in (
        ("store", "store"),
        ("store", "images"),
        ("store", "farm"),
        ("farm", "farm"),
        ("images", "farm"),
    ):
        with pytest.raises(UsageError, match=r"is none; look at it|this is no folder of them"):
            write_links(tmp_path / folder, tmp_path / of, ["cat/000.png"], overwrite=True)
    assert snapshot(tmp_path) == before


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


@pytest.mark.timeout(60)
def test_reader_that_stops_early_is_not_an_error(tmp_path, feature_file):
    """A real shell and a list longer than a pipe holds, so that the write does fail."""
    rng = np.random.default_rng(0)
    paths = [f"{'long' * 40}/{i:06d}.png" for i in range(3000)]
    feature_file(tmp_path / "features.h5", rng.normal(size=(3000, 4)), paths=paths)
    command = (
        f"{sys.executable} -m protoprune select --k 2 --iterations 1 --keep 0.9 | head -1; echo ${{PIPESTATUS[*]}}"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(files.__file__))}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, env=environment, timeout=50)
    lines = result.stdout.decode().splitlines()
    assert lines[0].startswith("longlong")
    assert lines[1:] == ["0 0"]
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr
    assert b"kept 2,700 of 3,000" in result.stderr


# --- what dead processes left


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_nothing_else(tmp_path, monkeypatch):
    program = (
        "import os, sys; from protoprune import files\n"
        "with files.replacing(sys.argv[1]) as temporary:\n"
        "    open(temporary, 'w').write('half'); print(temporary, flush=True)\n"
        "    sys.stdin.read() if len(sys.argv) > 2 else os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "kept.txt")]
    alive = subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        busy = alive.stdout.readline().strip()
        left = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
        machine, _, dead = os.path.basename(left).removeprefix("kept.txt.").removesuffix(".tmp").partition("-")
        folder = tmp_path / f"links.{machine}-{dead}.tmp"
        (folder / "cat").mkdir(parents=True)
        (tmp_path / "photo.jpg").write_text("mine")
        (folder / "cat" / "photo.jpg").symlink_to(tmp_path / "photo.jpg")
        mine = [f"notes.{dead}.tmp", f"x.{'0' * 8}-{dead}.tmp", f"{machine}-{dead}.tmp", f"x.{machine}-{dead}.tmp.txt"]
        mine += [f"x.{machine}-.tmp", "x.tmp", "photo.jpg"]
        for name in mine:
            (tmp_path / name).write_text("mine")
        assert os.path.exists(left)
        monkeypatch.setattr(files, "_tidied", set())
        write_file(tmp_path / "other.txt", b"x")
        assert sorted(os.listdir(tmp_path)) == sorted([*mine, "other.txt", os.path.basename(busy)])
        alive.communicate("")
        assert (tmp_path / "kept.txt").read_text() == "half"
    finally:
        alive.kill()
        alive.wait()


def test_copies_of_shards_that_a_killed_process_left_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "_tidied", set())
    own = f".{files._machine()}-{os.getpid()}.tmp"
    for name in ("protoprune-dead" + own.replace(f"-{os.getpid()}.", "-99999999."), "protoprune-busy" + own, "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.tar").touch()
    with files.temporary_folder() as folder, files.temporary_folder() as another:
        assert os.path.basename(folder).endswith(own)
        left = {os.path.basename(folder), os.path.basename(another), "protoprune-busy" + own, "other"}
        assert set(os.listdir(tmp_path)) == left
    assert set(os.listdir(tmp_path)) == {"protoprune-busy" + own, "other"}


def test_the_names_say_the_machine():
    name = files.temporary_name("/x/kept.txt")
    assert re.fullmatch(rf"/x/kept\.txt\.[0-9a-f]{{8}}-{os.getpid()}\.tmp", name)


def test_a_lock_on_a_full_disk_is_held_and_leaves_nothing(tmp_path, monkeypatch):
    real = os.write

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with files.lock(str(tmp_path / "f.h5")):
        assert os.listdir(tmp_path) == ["f.h5.lock"]
        with (
            pytest.raises(ProtopruneError, match="another protoprune is writing it"),
            files.lock(str(tmp_path / "f.h5")),
        ):
            pass
    monkeypatch.setattr(os, "write", real)
    assert os.listdir(tmp_path) == []


def test_a_lock_is_given_back_though_its_end_is_interrupted(tmp_path, monkeypatch):
    """Ctrl-C in a notebook, whose traceback keeps what was open: the next call must not find itself in its own way."""

    def interrupted(path):
        raise KeyboardInterrupt

    out = str(tmp_path / "f.h5")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as kept, files.lock(out):
        patched.setattr(os, "unlink", interrupted)
    with files.lock(out):
        assert kept.traceback
    assert os.listdir(tmp_path) == []
