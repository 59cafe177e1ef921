"""Worker processes: every task once, whoever dies."""

import functools
import itertools
import multiprocessing.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launch_helpers import start, work, work_with
from shard_helpers import image_folder, members, write_tars

from protoprune.encoders import load_encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.features.opening import open_features
from protoprune.shards import launch
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards


def run(tasks, devices=("this", "that")):  # names that no worker asks torch for
    return sorted(task for task, _ in launch.run(work, start, tasks, devices))


def test_every_task_once():
    tasks = [str(i) for i in range(7)]
    assert run(tasks) == tasks
    assert run(tasks, ["this"]) == tasks
    assert run([]) == []
    assert run(["a"]) == ["a"]


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    tasks = ["1", f"die:{tmp_path}/x", "2", f"die:{tmp_path}/y", "3"]
    with pytest.warns(ProtopruneWarning, match="the worker on th.. was killed by signal 9 at die:"):
        assert run(tasks) == sorted(tasks)


def test_a_worker_that_is_killed_before_it_has_read_the_weights_is_replaced(monkeypatch):
    """The weights are more than a pipe holds: whoever writes them into the pipe of a dead process waits for ever."""
    real, started = multiprocessing.util.spawnv_passfds, []

    def spawn(path, command, handles):
        pid = real(path, command, handles)
        if any("spawn_main" in str(word) for word in command):
            started.append(pid)
            if len(started) == 1:
                os.kill(pid, signal.SIGKILL)
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn)
    large = functools.partial(work_with, b"w" * 5_000_000)
    with pytest.warns(ProtopruneWarning, match="was killed by signal 9"):
        assert sorted(launch.run(large, start, ["1", "2", "3"], ["this", "that"])) == [("1", 5), ("2", 5), ("3", 5)]
    assert len(started) == 3


def test_a_task_that_kills_every_worker_is_lost_and_the_others_are_done():
    with pytest.warns(ProtopruneWarning):
        results = list(launch.run(work, start, ["1", "always", "2"], ["this"], tries=2))
    lost = [one for one in results if isinstance(one, launch.Lost)]
    assert [(one.task, one.reason) for one in lost] == [
        ("always", "the worker on this was killed by signal 9, for the second time (out of memory?)")
    ]
    assert sorted(one for one, _ in (x for x in results if x not in lost)) == ["1", "2"]


def test_workers_that_all_die_end_the_run():
    with (
        pytest.warns(ProtopruneWarning),
        pytest.raises(ProtopruneError, match="was killed by signal 9 at always, for the second time"),
    ):
        list(launch.run(work, start, ["always"], ["this"], tries=2))


def test_tasks_are_set_aside_for_who_will_have_them_next_as_long_as_nobody_goes_without():
    tasks = launch.Tasks("abcdefg", 3)
    assert tasks.take(1) == ("a", None)  # others may come who have none
    assert tasks.take(2) == ("b", None)
    assert tasks.take(1) == ("c", "d")
    assert tasks.take(1) == ("d", "e")
    assert (tasks.unclaimed, len(tasks)) == (2, 3)
    assert tasks.take(2) == ("f", None)  # the last one is for whoever is free first
    assert tasks.take(2) == ("g", None)
    assert tasks.take(2) is None
    assert (tasks.unclaimed, len(tasks)) == (0, 1)
    with pytest.warns(ProtopruneWarning, match="it died at d; a new one goes on"):
        assert tasks.died(1, "d", "it died") is None
    assert tasks.take(2) == ("e", None)  # what was set aside for the dead one comes first
    assert tasks.take(2) == ("d", None)
    assert tasks.take(1) is None


def test_a_worker_ends_with_its_parent(tmp_path):
    """In the middle of a task: it went on for minutes, held its shard and a GPU, and the next run found it busy."""
    program = (
        "from protoprune.shards import launch; from launch_helpers import nap, start\n"
        f"if __name__ == '__main__': list(launch.run(nap, start, [{str(tmp_path / 'pid')!r}], ['this']))"
    )
    (tmp_path / "main.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], env=environment)
    try:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
    until, pid = time.monotonic() + 20, int((tmp_path / "pid").read_text())
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it outlived its parent")


def test_what_workers_warn_of_is_the_parents_to_say_and_once(capfd):
    """It came on stderr as Python writes warnings, a line of code with it, from each worker."""
    with pytest.warns(ProtopruneWarning, match="^what is odd$") as caught:
        assert run(["warn:1", "warn:2"]) == ["warn:1", "warn:2"]
    assert (len(caught), capfd.readouterr().err) == (1, "")


def test_an_error_in_a_worker_is_the_parents():
    with pytest.raises(UsageError, match="a bad task"):
        run(["1", "error"])


@pytest.mark.parametrize(("text", "devices"), [("0,1", ["cuda:0", "cuda:1"]), ("cpu, cpu", ["cpu", "cpu"])])
def test_devices_are_parsed(text, devices, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.parse_devices(text) == devices
    for wrong in ("", "0,,1", "cpu,0"):
        with pytest.raises(UsageError, match="--devices"):
            launch.parse_devices(wrong)


def test_devices_of_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launch.parse_devices("all") == ["cpu"]
    for text in ("0", "cuda:0,cuda:1"):
        with pytest.raises(UsageError, match=f"^--devices {text}: torch finds no NVIDIA GPU on this machine; leave"):
            launch.parse_devices(text)


def test_devices_of_a_machine_with_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert launch.parse_devices("all") == ["cuda:0", "cuda:1", "cuda:2"]
    assert launch.parse_devices("2,0") == ["cuda:2", "cuda:0"]
    assert launch.parse_devices("cpu,cpu") == ["cpu", "cpu"]
    with pytest.raises(UsageError, match="--devices 0,3: this machine has 3 GPUs, numbered from 0"):
        launch.parse_devices("0,3")


def took_a_moment(device, task, ahead):
    """(device, process, from, to); 'die:FILE' kills its process the first time."""
    began = time.monotonic()
    work(device, task, ahead)
    time.sleep(0.05)
    return device, os.getpid(), began, time.monotonic()


@pytest.mark.slow
def test_each_device_has_one_process_at_a_time_also_after_a_death(tmp_path):
    tasks = [f"die:{tmp_path}/x", *map(str, range(12)), f"die:{tmp_path}/y"]
    with pytest.warns(ProtopruneWarning, match="the worker on cuda:. was killed by signal 9"):
        found = list(launch.run(took_a_moment, start, tasks, ["cuda:0", "cuda:1"]))
    assert len(found) == len(tasks)
    assert {device for device, *_ in found} == {"cuda:0", "cuda:1"}
    assert all(len({device for device, pid, *_ in found if pid == one}) == 1 for _, one, *_ in found)
    for device in ("cuda:0", "cuda:1"):
        times = sorted((began, ended) for on, _, began, ended in found if on == device)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


def test_workers_make_the_set_that_one_process_makes(tmp_path, monkeypatch):
    def no_room(*_):
        raise RuntimeError("unable to open shared memory object: No space left on device")

    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", no_room)  # a container's /dev/shm
    monkeypatch.setattr("torch.UntypedStorage._share_filename_cpu_", no_room)
    folder = image_folder(tmp_path / "images", {"ant": 6, "bee": 6})
    tars = write_tars(tmp_path / "tars", members(folder), 4)
    mini = load_encoder("mini")
    embed_shards(find_shards(tars), mini, tmp_path / "one", device="cpu")
    away = [path.rename(tmp_path / path.name) for path in sorted(tars.iterdir())[2:]]
    embed_shards(find_shards(tars), mini, tmp_path / "two", device="cpu")
    for path in away:
        path.rename(tars / path.name)
    report = embed_shards(find_shards(tars), mini, tmp_path / "two", devices=["cpu", "cpu"])
    assert (report.states, report.embedded, report.finished) == ({"unchanged": 2, "embedded": 2}, 6, True)
    with open_features(tmp_path / "one") as one, open_features(tmp_path / "two") as two:
        assert np.array_equal(one.features[:], two.features[:])
        assert one.paths == two.paths


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_workers_and_drivers_end_in_the_same_features(tmp_path):
    """kill -9 of a worker, then of the driver; the same command finishes the set."""
    folder = image_folder(tmp_path / "images", {"ant": 40, "bee": 40})
    tars = write_tars(tmp_path / "tars", members(folder), 10)
    embed_shards(find_shards(tars), load_encoder("mini"), tmp_path / "whole", device="cpu")
    command = [sys.executable, "-m", "protoprune", "embed", str(tars), "-o", str(tmp_path / "f"), "--encoder", "mini",
               "--batch-size", "2", "--devices", "cpu,cpu"]  # fmt: skip

    def children(pid):
        listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]

    killed = 0
    for victim in ("driver", "worker", "nobody"):
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200  # of a busy machine
        while victim != "nobody" and time.monotonic() < deadline and driver.poll() is None:
            done = len(list((tmp_path / "f").rglob("*.h5*"))) if (tmp_path / "f").exists() else 0
            found = children(driver.pid)
            if found and done:
                os.kill(found[0] if victim == "worker" else driver.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.05)
        said = driver.communicate(timeout=200)[1]
        time.sleep(3 if victim == "driver" else 0)  # its workers end by themselves
    assert killed == 2
    assert driver.returncode == 0, said
    with open_features(tmp_path / "f") as one, open_features(tmp_path / "whole") as two:
        assert np.array_equal(one.features[:], two.features[:])
        assert one.paths == two.paths
