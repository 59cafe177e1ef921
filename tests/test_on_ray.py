"""Ray: every shard once, whoever dies, and what is wrong with a cluster in one line."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types

import h5py
import launch_helpers
import numpy as np
import pytest
import torch
from launch_helpers import start
from shard_helpers import image_folder, members, write_tars
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.encoders import load_encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.features.featureset import read_plan, shard_file
from protoprune.shards import launch, on_ray
from protoprune.shards.on_ray import Need
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards

ONE = Need("cpu", 1)
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # Ray stays on loopback


@pytest.fixture(scope="module")
def ray_here():
    """Ray on this machine, two CPUs, for all tests that need no more."""
    ray = pytest.importorskip("ray", reason="needs protoprune[ray]")
    environment = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        environment.setenv(name, value)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL",
             object_store_memory=100 << 20)  # fmt: skip
    by_value(ray)
    yield ray
    ray.shutdown()
    environment.undo()


def by_value(ray):
    """The workers cannot import these files."""
    for module in (sys.modules[__name__], launch_helpers):
        ray.cloudpickle.register_pickle_by_value(module)


def work(state, task, ahead):
    if task == "bug":
        raise ValueError("not expected")
    return launch_helpers.work(state, task, ahead)[0]


def refuse(device):
    raise ProtopruneError("/data is not there")


def same_bytes(one, other):
    """Two sets hold the same, but for who made them when, and how often they were interrupted."""
    parts, others = read_plan(one)[1], read_plan(other)[1]
    assert [part.name for part in parts] == [part.name for part in others]
    for part in parts:
        with h5py.File(shard_file(str(one), part.name)) as a, h5py.File(shard_file(str(other), part.name)) as b:
            for name in set(a) - {"borrowed", "committed"}:
                assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), (part.name, name)
    assert list(read_plan(one)[0]) == list(read_plan(other)[0])


def test_every_task_once_whoever_dies(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "_TRIES", 2)
    tasks = ["1", f"die:{tmp_path}/x", "2", "always", "3"]
    with pytest.warns(ProtopruneWarning, match=r"the Ray worker on .* died at die:.*; a new one goes on"):
        results = list(on_ray.run(work, start, tasks, ONE))
    lost = [one for one in results if isinstance(one, launch.Lost)]
    assert [one.task for one in lost] == ["always"]
    assert "died, for the second time (out of memory?)" in lost[0].reason
    assert sorted(one for one in results if one not in lost) == sorted(set(tasks) - {"always"})


@pytest.mark.parametrize(
    ("tasks", "begin", "message"),
    [
        (["error"], start, "a bad task"),
        (["bug"], start, "a Ray worker failed at bug: ValueError: not expected"),
        (["1"], refuse, "the machine .*: /data is not there"),
    ],
)
def test_errors_of_workers_are_the_drivers(tasks, begin, message, ray_here):
    with pytest.raises(ProtopruneError, match=message):
        list(on_ray.run(work, begin, tasks, ONE))


def test_sigterm_ends_the_program_in_order(monkeypatch):
    """Ray's own handler, of C++, prints a dozen lines of addresses, and aborts."""
    said = []
    ray = types.SimpleNamespace(
        is_initialized=lambda: False, shutdown=lambda: said.append("shutdown"),
        init=lambda *_, **__: signal.signal(signal.SIGTERM, lambda *_: None),
    )  # fmt: skip
    monkeypatch.setattr(on_ray, "_ray", lambda: ray)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with on_ray.connected("local") as alone:
            assert alone
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(SystemExit) as ended, on_ray.connected("local"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, said) == (143, ["shutdown"] * 2)


def test_what_a_worker_takes(ray_here):
    assert on_ray.need() == Need("cpu", 1)
    assert on_ray.need("cpu", 2) == Need("cpu", 2)
    with pytest.warns(ProtopruneWarning, match="has a GPU and 1 CPUs for a worker .* waiting up to 10 minutes"):
        assert on_ray.need("cuda") == Need("cuda", 1)
    with pytest.raises(UsageError, match="--device cuda:1: Ray chooses the device"):
        on_ray.need("cuda:1")


def test_no_room(ray_here, monkeypatch):
    with pytest.raises(ProtopruneError, match="no machine of the cluster has a GPU and 1 CPUs"):
        on_ray.need("cuda", alone=True)
    monkeypatch.setattr(on_ray, "_PATIENCE_SECONDS", 2)
    monkeypatch.setattr(on_ray, "_TELL_SECONDS", 0.5)
    with (
        pytest.warns(ProtopruneWarning, match="waiting for room on the cluster: a worker takes 99 CPUs"),
        pytest.raises(ProtopruneError, match=r"no worker found room .* look at `ray status`"),
    ):
        list(on_ray.run(work, start, ["1"], Need("cpu", 99)))


def test_ray_makes_the_set_that_one_process_makes(ray_here, tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", {"ant": 6, "bee": 6})
    tars, mini = write_tars(tmp_path / "tars", members(folder), 3), load_encoder("mini")
    away = [path.rename(tmp_path / path.name) for path in sorted(tars.iterdir())[1:]]
    embed_shards(find_shards(tars), mini, tmp_path / "two", device="cpu")
    for path in away:
        path.rename(tars / path.name)
    (tars / "0003.tar").write_bytes(b"<html>no</html>")
    source = find_shards(tars)
    embed_shards(source, mini, tmp_path / "one", device="cpu")
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    seen = []
    report = embed_shards(source, mini, "two", ray=True, workers=2, on_shard=lambda one: seen.append(one.name))
    assert (report.states, report.embedded) == ({"unchanged": 1, "embedded": 2, "failed": 1}, 8)
    assert report.finished
    assert sorted(seen) == ["0000.tar", "0001.tar", "0002.tar", "0003.tar"]
    assert report.failed_shards[0][:2] == ("0003.tar", "corrupt")
    (tars / "0003.tar").unlink()
    (tmp_path / "one/0003.tar.failed.json").unlink()
    for name in ("one", "two"):
        embed_shards(find_shards(tars), mini, tmp_path / name, device="cpu")
    same_bytes(tmp_path / "one", tmp_path / "two")


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ProtopruneError, match=r"Ray, which is not installed; pip install 'protoprune\[ray\]'"),
        on_ray.connected(),
    ):
        pass


def test_addresses_that_lead_nowhere(monkeypatch):
    pytest.importorskip("ray", reason="needs protoprune[ray]")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    for address, message in (
        (f"127.0.0.1:{port}", r"cannot be reached \(Connection refused\); check that `ray start --head` runs"),
        ("no-such-host.invalid:6379", "no-such-host.invalid:6379: cannot be reached"),
        ("somewhere", "expected HOST:PORT"),
        ("ray://head:10001", "run it on the cluster"),
    ):
        with pytest.raises(ProtopruneError, match=message), on_ray.connected(address):
            pass
    assert time.monotonic() - started < 30
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ProtopruneError, match="cannot be reached"), on_ray.connected():
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "spark"], "--engine spark: expected local or ray"),
        (["--address", "auto"], "--address goes with --engine ray"),
        (["--engine", "ray", "--devices", "cpu"], "--engine ray spreads the shards itself: no --devices"),
        (["--engine", "ray", "--rank", "0", "--world-size", "2"], "--engine ray spreads the shards itself"),
        (["--engine", "ray", "-o", "x.h5"], "--engine goes with shards"),
        (["--engine", "ray", "--device", "cuda:3"], "--device cuda:3: Ray chooses the device"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "tars", members(image_folder(tmp_path / "images", {"ant": 2})), 1)
    monkeypatch.setattr(on_ray, "connected", None)  # would be a TypeError
    result = CliRunner().invoke(app, ["embed", "tars", "--encoder", "mini", *options])
    assert result.exit_code == 2, result.output
    assert message in result.stderr


# --- GPUs: Ray hands out what a machine declares, whether or not there is any


@pytest.fixture
def two_gpus(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs protoprune[ray]")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    ray.shutdown()
    ray.init("local", num_cpus=5, num_gpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="CRITICAL", object_store_memory=100 << 20)  # fmt: skip
    by_value(ray)
    yield ray
    ray.shutdown()


def seen_gpus(device):
    return device, os.environ.get("CUDA_VISIBLE_DEVICES")


def took_a_moment(state, task, ahead):
    """(device and GPUs, process, from, to)"""
    began = time.monotonic()
    work(state, task, ahead)
    time.sleep(0.2)
    return state, os.getpid(), began, time.monotonic()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_gpu_has_one_worker_at_a_time_also_after_a_death(two_gpus, tmp_path, monkeypatch):
    need = on_ray.need()
    assert need == Need("cuda", 2)  # its share of five CPUs
    assert on_ray.need("cuda", 4) == Need("cuda", 4)
    assert on_ray.need("cpu") == Need("cpu", 1)
    tasks = [*map(str, range(6)), f"die:{tmp_path}/x", *map(str, range(6, 12))]
    with pytest.warns(ProtopruneWarning, match="the Ray worker on .* died at die:"):
        found = list(on_ray.run(took_a_moment, seen_gpus, tasks, need))
    assert len(found) == len(tasks)
    assert {state for state, *_ in found} == {("cuda", "0"), ("cuda", "1")}
    for gpu in "01":
        times = sorted((began, ended) for (_, on), _, began, ended in found if on == gpu)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))
    on_cpu = list(on_ray.run(took_a_moment, seen_gpus, ["a", "b"], Need("cpu", 1)))
    assert {gpus for (_, gpus), *_ in on_cpu} <= {None, "", "-1"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about GPUs that do not work")
def test_gpus_that_do_not_work_are_said_in_a_line(two_gpus, tmp_path, monkeypatch):
    """A machine that declares GPUs, with a torch or a driver that cannot use them."""
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "tars", members(image_folder(tmp_path / "images", {"ant": 2})), 1)
    for precision in ("auto", "fp32"):
        result = CliRunner().invoke(
            app, ["embed", "tars", "--encoder", "lite0", "--engine", "ray", "--precision", precision]
        )
        assert result.exit_code in (1, 2), result.output
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: "), result.stderr
        assert "NVIDIA" in last or "CUDA" in last
        assert "--device cpu" in last


# --- kills


@pytest.fixture
def many_tars(tmp_path):
    return write_tars(tmp_path / "tars", members(image_folder(tmp_path / "images", {"ant": 60, "bee": 60})), 12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_that_dies_in_the_middle(many_tars, tmp_path, monkeypatch):
    """Two machines; one is gone after some shards, another one joins; the set is that of one process."""
    ray = pytest.importorskip("ray", reason="needs protoprune[ray]")
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    source, mini = find_shards(many_tars), load_encoder("mini")
    embed_shards(source, mini, tmp_path / "one", device="cpu")
    ray.shutdown()
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        doomed = machines.add_node(num_cpus=1)
        machines.add_node(num_cpus=1)
        done = []

        def on_shard(one):
            done.append(one.state)
            if len(done) == 4:
                machines.remove_node(doomed, allow_graceful=False)
                machines.add_node(num_cpus=1)

        report = embed_shards(source, mini, tmp_path / "two", ray=True, address=machines.address, batch_size=2,
                              on_shard=on_shard)  # fmt: skip
    finally:
        ray.shutdown()
        machines.shutdown()
    assert (report.states, report.finished) == ({"embedded": 12}, True)
    same_bytes(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_that_is_killed_goes_on(many_tars, tmp_path):
    """kill -9 of the driver at random moments; the same command finishes the set."""
    pytest.importorskip("ray", reason="needs protoprune[ray]")
    embed_shards(find_shards(many_tars), load_encoder("mini"), tmp_path / "one", device="cpu")
    command = [sys.executable, "-m", "protoprune", "embed", str(many_tars), "-o", str(tmp_path / "two"), "--encoder",
               "mini", "--batch-size", "2", "--engine", "ray", "--address", "local"]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT}
    moments = random.Random(0)
    for goal in (1, moments.randint(2, 5), moments.randint(6, 9)):
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
        until = time.monotonic() + 200
        while time.monotonic() < until and len(list(tmp_path.glob("two/*.h5"))) < goal:
            time.sleep(0.05)
        time.sleep(moments.random() / 2)
        driver.send_signal(signal.SIGKILL)
        driver.communicate(timeout=60)
    last = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert last.returncode == 0, last.stderr
    assert "Traceback" not in last.stderr
    same_bytes(tmp_path / "one", tmp_path / "two")
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert "12 shards (12 unchanged)" in again.stderr
    assert "0 embedded" in again.stderr
