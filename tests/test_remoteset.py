"""Feature sets on a store: the same bytes as in a folder, one put a shard, resumed, and read from there."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from shard_helpers import image_folder, members, write_tar, write_tars
from typer.testing import CliRunner

import protoprune
from protoprune import stores
from protoprune.cli import app
from protoprune.encoders import load_encoder
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import remoteset
from protoprune.features.featurefile import FeatureFile
from protoprune.features.featureset import read_plan, shard_file
from protoprune.features.opening import open_features
from protoprune.shards import setstate
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards

fsspec = pytest.importorskip("fsspec", reason="needs protoprune[remote]")
NAMES = ["0000.tar", "0001.tar", "0002.tar", "0003.tar"]


@pytest.fixture(scope="module")
def mini():
    return load_encoder("mini")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), {"ant": 6, "bee": 6})


@pytest.fixture
def tars(folder, tmp_path):
    return write_tars(tmp_path / "tars", members(folder), 4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def run(spec, out, encoder, **options):
    return embed_shards(find_shards(spec), encoder, out, device="cpu", **options)


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_where_copies_are_kept(tmp_path, monkeypatch):
    assert remoteset.cache_folder() == str(tmp_path / "cache")
    monkeypatch.delenv("PROTOPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert remoteset.cache_folder() == str(tmp_path / "xdg/protoprune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert remoteset.cache_folder() == str(tmp_path / "home/.cache/protoprune")


def same_bytes(local, url, tmp_path):
    """The files of two sets hold the same, but for who made them and when; mtime_ns is of the shard or its etag."""
    parts = read_plan(local)[1]
    assert [(part.name, part.rows) for part in parts] == [(part.name, part.rows) for part in read_plan(url)[1]]
    for part in parts:
        stores.get(shard_file(url, part.name), str(tmp_path / "part.h5"))
        with h5py.File(shard_file(str(local), part.name)) as a, h5py.File(tmp_path / "part.h5") as b:
            for name in set(a) - {"borrowed", "committed", "mtime_ns", "ctime_ns"}:
                assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), (part.name, name)


def test_a_set_on_a_store_is_the_set_in_a_folder(memory, tars, mini, tmp_path, cache):
    run(tars, tmp_path / "f", mini)
    report = run(tars, "memory://set/f", mini)
    assert (report.states, report.n, report.finished) == ({"embedded": 4}, 12, True)
    assert sorted(stores.listed("memory://set/f")) == sorted(
        ["set.json", *(f"{name}.h5" for name in NAMES), *(f"{name}.note.json" for name in NAMES)]
    )
    same_bytes(tmp_path / "f", "memory://set/f", tmp_path)
    here, there = (protoprune.select(path, 0.5) for path in (tmp_path / "f", "memory://set/f"))
    assert here.kept_paths == there.kept_paths
    assert np.array_equal(here.ranking.scores, there.ranking.scores)
    protoprune.merge("memory://set/f", tmp_path / "merged.h5")
    with FeatureFile(tmp_path / "merged.h5") as one, open_features(tmp_path / "f") as other:
        assert np.array_equal(one.features[:], other.features[:])


def test_a_second_run_fetches_and_embeds_nothing(memory, tars, mini, monkeypatch):
    run(tars, "memory://set/f", mini)
    before = {name: memory.info(f"/set/f/{name}") for name in stores.listed("memory://set/f")}
    monkeypatch.setattr("protoprune.shards.sharding.open_shard", None)  # would be a TypeError
    monkeypatch.setattr(stores, "get", None)
    report = run(tars, "memory://set/f", mini)
    assert (report.embedded, report.states, report.n) == (0, {"unchanged": 4}, 12)
    assert {name: memory.info(f"/set/f/{name}") for name in stores.listed("memory://set/f")} == before


def test_only_what_is_missing_changed_or_damaged_is_embedded(memory, tars, folder, mini, tmp_path):
    run(tars, "memory://set/f", mini)
    write_tar(tars / "0000.tar", members(folder)[:2])
    memory.rm_file("/set/f/0001.tar.h5")
    memory.pipe("/set/f/0002.tar.h5", memory.cat("/set/f/0002.tar.h5")[:-100])
    report = run(tars, "memory://set/f", mini)
    assert (report.states, report.embedded, report.finished) == ({"unchanged": 1, "embedded": 3}, 8, True)
    run(tars, tmp_path / "f", mini)
    same_bytes(tmp_path / "f", "memory://set/f", tmp_path)


def test_a_file_whose_writer_was_killed_before_its_note_counts(memory, tars, mini, monkeypatch):
    run(tars, "memory://set/f", mini)
    memory.rm_file("/set/f/0001.tar.note.json")
    monkeypatch.setattr("protoprune.shards.sharding.open_shard", None)
    report = run(tars, "memory://set/f", mini)
    assert (report.embedded, report.states, report.finished) == (0, {"unchanged": 4}, True)
    assert memory.exists("/set/f/0001.tar.note.json")


def test_a_note_whose_numbers_were_damaged_is_made_again(memory, tars, mini, monkeypatch):
    """Its rows would be those of set.json, which then names a file that is not there."""
    run(tars, "memory://set/f", mini)
    whole = memory.cat("/set/f/0001.tar.note.json")
    memory.pipe("/set/f/0001.tar.note.json", whole.replace(b'"rows": 3', b'"rows": 2'))
    monkeypatch.setattr("protoprune.shards.sharding.open_shard", None)  # nothing is embedded for that
    report = run(tars, "memory://set/f", mini)
    assert (report.embedded, report.n) == (0, 12)
    assert memory.cat("/set/f/0001.tar.note.json") == whole
    assert [part.rows for part in read_plan("memory://set/f")[1]] == [3, 3, 3, 3]


def test_failed_shards_are_noted_and_tried_again(memory, tars, mini):
    data = (tars / "0001.tar").read_bytes()
    (tars / "0001.tar").write_bytes(b"<html>no</html>")
    report = run(tars, "memory://set/f", mini)
    assert (report.states, report.failed_shards[0][:2]) == ({"embedded": 3, "failed": 1}, ("0001.tar", "corrupt"))
    said = call("info", "memory://set/f").stdout
    assert "memory://set/f: feature set of 4 shards: 3 done (9 images), 1 failed, 0 not yet embedded" in said
    assert "1 corrupt (first: 0001.tar: " in said
    assert f"made by     process {os.getpid()} on {os.uname().nodename}: 3 shards" in said
    (tars / "0001.tar").write_bytes(data)
    assert run(tars, "memory://set/f", mini).states == {"unchanged": 3, "embedded": 1}
    assert read_plan("memory://set/f")[0]["state"] == "finished"


def test_several_processes_share_a_set_and_the_last_one_finishes_it(memory, tars, mini):
    assert not run(tars, "memory://set/f", mini, rank=1, world_size=2).finished
    with pytest.raises(ProtopruneError, match="memory://set/f: not finished, 2 of 4 shards are done"):
        protoprune.select("memory://set/f", 0.5)
    assert "2 not yet embedded" in call("info", "memory://set/f").stdout
    assert run(tars, "memory://set/f", mini, rank=0, world_size=2).finished


def test_what_is_done_while_the_plan_is_written_is_not_forgotten(memory, tars, mini, monkeypatch):
    """Rank 0 ends, and writes set.json with what it saw before rank 1 ended: it looks again."""
    from protoprune.shards import setstate

    real = setstate.write_plan
    calls = []

    def slow(out, plan, parts, **options):
        calls.append(sum(part.done for part in parts))
        if len(calls) == 2:  # the first is the plan itself
            monkeypatch.setattr(setstate, "write_plan", real)
            run(tars, "memory://set/f", mini, rank=1, world_size=2)
            monkeypatch.setattr(setstate, "write_plan", slow)
        real(out, plan, parts, **options)

    monkeypatch.setattr(setstate, "write_plan", slow)
    assert run(tars, "memory://set/f", mini, rank=0, world_size=2).finished
    assert calls == [0, 2, 4]
    assert read_plan("memory://set/f")[0]["state"] == "finished"


def test_another_encoder_and_foreign_folders_are_refused(memory, tars, mini):
    run(tars, "memory://set/f", mini)
    with pytest.raises(ProtopruneError, match=r"holds other features \(store: float16, not float32\)"):
        run(tars, "memory://set/f", mini, store="float32")
    memory.pipe("/other/x.txt", b"x")
    with pytest.raises(UsageError, match="a folder that holds other things"):
        run(tars, "memory://other", mini)
    with pytest.raises(ProtopruneError, match=r"memory://nothing: a folder without set\.json"):
        protoprune.select("memory://nothing", 0.5)


def test_the_copy_here_follows_the_set_there(memory, tars, folder, mini, cache, monkeypatch):
    run(tars, "memory://set/f", mini)
    first = protoprune.select("memory://set/f", 0.5).kept_paths
    fetched = []
    real = stores.get
    monkeypatch.setattr(stores, "get", lambda url, local: (fetched.append(url), real(url, local))[1])
    assert protoprune.select("memory://set/f", 0.5).kept_paths == first
    assert fetched == []
    write_tar(tars / "0001.tar", members(folder)[:2])
    run(tars, "memory://set/f", mini)
    fetched.clear()
    assert len(protoprune.select("memory://set/f", 1.0).kept_paths) == 11
    assert fetched == ["memory://set/f/0001.tar.h5"]
    memory.pipe("/set/f/0001.tar.h5", memory.cat("/set/f/0002.tar.h5"))  # not the one that set.json names
    for path in cache.rglob("0001.tar.h5"):
        path.unlink()
    with pytest.raises(ProtopruneError, match=r"memory://set/f/0001\.tar\.h5: not the file that its set\.json names"):
        protoprune.select("memory://set/f", 0.5)


def test_at_the_command_line(memory, tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed = ["embed", tars, "-o", "memory://set/f", "--encoder", "mini", "--device", "cpu"]
    result = call(*embed)
    assert result.exit_code == 0, result.stderr
    assert "memory://set/f: 4 shards (4 embedded), 12 images x" in result.stderr
    assert "0 embedded" in call(*embed).stderr
    result = call("select", "memory://set/f", "--keep", "0.5")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 6), result.stderr
    assert "memory://set/f: fetching 4 feature files into" in result.stderr
    assert call("merge", "memory://set/f", "-o", "m.h5").exit_code == 0
    assert "whole: all of its" in call("info", "memory://set/f", "--verify").stdout
    assert call("sheet", "memory://set/f", "-o", "s.png").exit_code == 0
    assert call("report", "memory://set/f", "-o", "r.html").exit_code == 0
    for wrong in (["embed", tmp_path / "images"], ["embed", tars / "0000.tar"]):
        image_folder(tmp_path / "images", {"ant": 2})
        result = call(*wrong, "-o", "memory://set/x.h5", "--encoder", "mini")
        assert (result.exit_code, "written to a URL" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "memory:").exists()


def test_the_second_writer_of_a_shard_is_refused_by_the_store(bucket, tars, mini, tmp_path):
    """Both embed the same shard; the put of the slower one fails, and it takes the other's."""
    url = "s3://images-bucket/second"
    stores.write(f"{url}/x", b"1", new=True)
    with pytest.raises(FileExistsError):
        stores.write(f"{url}/x", b"2", new=True)
    (tmp_path / "y").write_bytes(b"3")
    with pytest.raises(FileExistsError):
        stores.put(str(tmp_path / "y"), f"{url}/x", new=True)
    assert stores.read(f"{url}/x") == b"1"
    stores.put(str(tmp_path / "y"), f"{url}/x")
    assert stores.read(f"{url}/x") == b"3"


def test_two_that_embed_the_same_shard_end_with_one_file(bucket, tars, mini, monkeypatch):
    url, real = "s3://images-bucket/race", remoteset.deliver

    def late(*arguments, **options):
        monkeypatch.setattr(remoteset, "deliver", real)
        run(tars, url, mini)  # another process does all of it meanwhile
        real(*arguments, **options)

    monkeypatch.setattr(remoteset, "deliver", late)
    report = run(tars, url, mini)
    assert (report.states, report.finished) == ({"unchanged": 4}, True)
    assert len(protoprune.select(url, 0.5).kept_paths) == 6


@pytest.mark.parametrize("late", ["put", "note"])
def test_a_note_never_speaks_for_the_file_of_another_writer(late, bucket, memory, tars, mini, tmp_path, monkeypatch):
    """Two replace the same features with others; the slower one's note, or its file, arrives after all of the other."""
    url = f"s3://images-bucket/late-{late}"
    run(tars, "memory://other/f", mini, store="float32")
    theirs, path = str(tmp_path / "theirs.h5"), shard_file(url, "0000.tar")
    stores.get(shard_file("memory://other/f", "0000.tar"), theirs)
    run(tars, url, mini)
    where, name = {"put": (stores, "put"), "note": (remoteset, "write_note")}[late]
    real = getattr(where, name)

    def slow(*arguments, **options):
        monkeypatch.setattr(where, name, real)
        remoteset.deliver(theirs, path, setstate.facts_of(theirs), new=False)
        real(*arguments, **options)

    monkeypatch.setattr(where, name, slow)
    run(tars, url, mini, store="float32", overwrite=True)
    report = run(tars, url, mini, store="float32")
    assert (report.finished, report.states) == (True, {"unchanged": 4})
    assert len(protoprune.select(url, 0.5).kept_paths) == 6
    for part in read_plan(url)[1]:
        assert remoteset.note(shard_file(url, part.name))["uuid"] == part.uuid


def test_a_writer_that_is_killed_before_its_note_leaves_none_that_fits(memory, tars, mini, monkeypatch):
    """The note of what was there before has the right number of bytes, and is about another encoder's file."""
    url = "memory://killed/f"
    run(tars, url, mini)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(remoteset, "write_note", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tars, url, load_encoder("mini", decode="fast"), overwrite=True)
    monkeypatch.undo()
    report = run(tars, url, mini, overwrite=True)
    assert report.states == {"unchanged": 3, "embedded": 1}
    assert len(protoprune.select(url, 0.5).kept_paths) == 6


def test_s3_and_back(bucket, tars, mini, tmp_path):
    run(tars, tmp_path / "f", mini)
    for path in tars.iterdir():
        bucket.put_file(str(path), f"images-bucket/in/{path.name}")
    report = run("s3://images-bucket/in", "s3://images-bucket/out/f", mini)
    assert (report.states, report.finished) == ({"embedded": 4}, True)
    same_bytes(tmp_path / "f", "s3://images-bucket/out/f", tmp_path)
    assert run("s3://images-bucket/in", "s3://images-bucket/out/f", mini).embedded == 0
    assert (
        protoprune.select("s3://images-bucket/out/f", 0.5).kept_paths
        == protoprune.select(tmp_path / "f", 0.5).kept_paths
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_drivers_end_in_the_same_bytes(bucket, folder, mini, tmp_path):
    """kill -9 at random moments of a run from S3 to S3; the same command finishes it."""
    tars = write_tars(tmp_path / "many", members(image_folder(tmp_path / "more", {"ant": 40, "bee": 40})), 10)
    for path in tars.iterdir():
        bucket.put_file(str(path), f"images-bucket/kill/{path.name}")
    run(tars, tmp_path / "f", mini)
    url = "s3://images-bucket/killed"
    command = [sys.executable, "-m", "protoprune", "embed", "s3://images-bucket/kill", "-o", url, "--encoder", "mini",
               "--batch-size", "2"]  # fmt: skip
    moments = random.Random(0)
    for goal in (1, moments.randint(2, 4), moments.randint(5, 8)):
        driver = subprocess.Popen(command, stderr=subprocess.PIPE)
        until = time.monotonic() + 100
        while time.monotonic() < until and sum(name.endswith(".h5") for name in stores.listed(url)) < goal:
            time.sleep(0.02)
        time.sleep(moments.random() / 4)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    last = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    same_bytes(tmp_path / "f", url, tmp_path)
    assert json.loads(stores.read(f"{url}/set.json"))["state"] == "finished"
