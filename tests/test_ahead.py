"""The first half of what comes next runs beside the second half of what is at hand."""

from __future__ import annotations

import gc
import os
import tempfile
import threading

import pytest
from shard_helpers import image_folder, members, write_tars

from protoprune.embedding.ahead import Begun, Halves, whole
from protoprune.embedding.engine import Engine
from protoprune.errors import ProtopruneError
from protoprune.images.decode import Preprocess
from protoprune.shards import setstate, sharding
from protoprune.sources import ShardOptions, find_shards


def halves(log: list[str], first: threading.Event | None = None) -> Halves[str]:
    try:
        if first:
            first.wait(10)
        log.append(f"first in {threading.current_thread().name}")
        yield
        log.append(f"second in {threading.current_thread().name}")
        return "done"
    finally:
        log.append("let go")


def test_the_first_half_is_done_in_a_thread_and_the_second_by_who_asks():
    log: list[str] = []
    begun = Begun(halves(log))
    begun.wait()
    assert log == ["first in ahead"]
    assert begun.result() == "done"
    assert log == ["first in ahead", "second in MainThread", "let go"]
    assert whole(halves(log)) == "done"


def test_work_that_ends_in_its_first_half_has_a_result_or_an_error():
    def early(error: Exception | None) -> Halves[int]:
        if error:
            raise error
        return 7
        yield

    assert Begun(early(None)).result() == 7
    with pytest.raises(KeyError, match="lost"):
        Begun(early(KeyError("lost"))).result()


@pytest.mark.parametrize("under_way", [True, False])
def test_what_is_given_up_lets_go_of_what_it_holds(under_way):
    log: list[str] = []
    first = threading.Event()
    begun = Begun(halves(log, first))
    if under_way:
        threading.Timer(0.05, first.set).start()
    else:
        first.set()
        begun.wait()
    begun.drop()
    assert log == ["first in ahead", "let go"]


class Waiting:
    """An encoder whose first image waits for an event, as if a device were long at work."""

    name, pool, fp32_only, dim, digest, preprocess = "waiting", "", False, 3, "0" * 64, Preprocess(16, 16)

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def model(self, pixels):
        assert self.event.wait(30), "the next shard was not begun"
        return pixels.mean((2, 3))


def test_the_next_shard_is_being_decoded_while_the_device_is_at_one_and_let_go_after_an_error(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", {"ant": 4, "bee": 3, "cat": 3})
    source = find_shards(write_tars(tmp_path / "tars", members(folder), 3))
    decoded, real = threading.Event(), sharding.open_shard

    def opened(shard, *arguments):
        images = real(shard, *arguments)
        if shard.name == "0001.tar":
            read = images.reader
            images.reader = lambda row: (decoded.set(), read(row))[1]
        return images

    monkeypatch.setattr(sharding, "open_shard", opened)
    states = []

    def stop(one):
        states.append((one.name, one.state))
        if one.name == "0001.tar":
            raise ProtopruneError("enough")

    with pytest.raises(ProtopruneError, match="enough"):
        sharding.embed_shards(source, Waiting(decoded), tmp_path / "set", device="cpu", on_shard=stop)
    assert decoded.is_set()
    gc.collect()  # the run, which the error's traceback held
    report = sharding.embed_shards(source, Waiting(decoded), tmp_path / "set", device="cpu")
    assert report.states == {"unchanged": 2, "embedded": 1}
    assert (report.n, report.finished) == (10, True)
    assert states == [("0000.tar", "embedded"), ("0001.tar", "embedded")]


def test_a_store_is_asked_for_the_next_shard_early_and_a_copy_that_nobody_wants_goes_again(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    folder = write_tars(tmp_path / "tars", members(image_folder(tmp_path / "images")), 3)
    for path in folder.iterdir():
        memory.pipe(f"/ahead/{path.name}", path.read_bytes())
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    source = find_shards("memory://ahead")
    memory.rm_file("/ahead/0001.tar")  # after it was listed: it fails when its turn comes
    arrived = threading.Event()
    arrived.set()
    report = sharding.embed_shards(source, Waiting(arrived), tmp_path / "set", device="cpu")
    assert report.states == {"embedded": 2, "failed": 1}
    assert report.failed_shards == [("0001.tar", "missing", "no such file on the store")]
    worker = sharding._Worker(
        Engine(Waiting(arrived), "cpu"), source.root, ShardOptions(), str(tmp_path / "other"), False
    )
    setstate.prepare(source, worker.engine.provenance, ShardOptions(), worker.out, False)
    worker.embed(source.shards[0], source.shards[2])
    worker._ahead[1].wait()
    assert len(os.listdir(tmp_path / "copies")) == 1
    assert worker.embed(source.shards[1], None).state == "failed"  # another worker took the third
    assert os.listdir(tmp_path / "copies") == []
