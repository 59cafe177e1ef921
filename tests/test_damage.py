"""Damaged files: whatever bytes are flipped, wiped or cut off, a command gives the same answer or one clear line.

Each mutation of a real file is read by every command that reads such files, in a forked process with little memory and
a time limit. Nothing else may come out: no traceback, no other numbers, no process that never ends.
"""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from protoprune import features as feature_files
from protoprune import hdf5, records, scores, seals
from protoprune.cli import app
from protoprune.errors import ProtopruneError
from protoprune.evaluation import runs
from protoprune.features import FeatureFile, PartialFile, open_features
from protoprune.npy import load_npy, load_npz
from protoprune.records import PartialRecord, Record

MEMORY = 1 << 30  # bytes that reading a file of a few kB may ask for, on top of what the program has
SECONDS = 20
N, D = 60, 8
PATHS = [f"{'abc'[i % 3]}/{i:03d}.png" for i in range(N)]
COUNTS = [20, pytest.param(200, marks=pytest.mark.slow)]


# --- originals ---------------------------------------------------------------------------------------------------------


def blobs() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, D))[np.arange(N) % 3] + 0.3 * rng.normal(size=(N, D))


def write_record(out: str, *, models: int = 4, epochs: int = 4, upto: int | None = None) -> str:
    rng = np.random.default_rng(1)
    subset = rng.random((models, N)) < 0.7
    labels = np.arange(N) % 3
    records.create(
        out, {"recipe": "{}", "seed": 0, "root": "/images"}, paths=sorted(PATHS), labels=labels, classes=list("abc"),
        subset=subset, epoch_numbers=range(1, epochs + 1), gradients=True, test_paths=["t/1.png", "t/2.png"],
        test_labels=np.array([0, 1]),
    )  # fmt: skip
    partial = PartialRecord(out)
    for epoch in range(epochs if upto is None else upto):
        values = {name: rng.random((models, N)) for name in records.STORED}
        values["prediction"] = np.where(rng.random((models, N)) < 0.6, labels, rng.integers(0, 3, (models, N)))
        values["test_prediction"] = rng.integers(0, 3, (models, 2))
        values["test_true_probability"] = rng.random((models, 2))
        partial.write(slice(0, models), epoch, values)
        partial.commit(slice(0, models), epoch + 1)
    if upto is None:
        partial.finish()
    partial.close()
    return out


def mutations(data: bytes, count: int, seed: int):
    """`count` damaged versions: some bytes flipped or set, a stretch wiped or repeated, the end cut off."""
    rng = np.random.default_rng([seed, zlib.crc32(data)])
    for number in range(count):
        damaged = bytearray(data)
        kind = number % 5
        if kind < 3:
            for place in rng.integers(0, len(data), (1, 1, 8)[kind]):
                damaged[place] = damaged[place] ^ (1 << int(rng.integers(8))) if kind != 1 else int(rng.integers(256))
        elif kind == 3:
            start, length = int(rng.integers(len(data))), int(rng.integers(1, 600))
            piece = bytes(len(damaged[start : start + length])) if rng.random() < 0.5 else os.urandom(0)
            damaged[start : start + len(piece)] = piece
            if not piece:
                damaged[start] ^= 0xFF
        else:
            damaged = damaged[: int(rng.integers(len(data)))]
        yield bytes(damaged)


# --- running -----------------------------------------------------------------------------------------------------------


def run_apart(function):
    """What `function()` returns, from a forked process with limits; an exception there is returned as text."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            try:
                result = function()
            except BaseException as error:
                result = f"raised {type(error).__name__}: {error}"
            with open(writing, "wb") as file:
                file.write(pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}" + (" (time is up)" if os.WTERMSIG(status) == 14 else "")
    return pickle.loads(data)


def command(*arguments: str):
    """(exit code, stdout, what stderr says of an error) of a command, as a function."""

    def call():
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return f"traceback: {type(result.exception).__name__}: {result.exception}"
        return result.exit_code, result.stdout, [one for one in result.stderr.splitlines() if "error:" in one]

    return call


def python(function):
    """The same of a Python function that gives a value, or raises ProtopruneError."""

    def call():
        try:
            return 0, function(), []
        except ProtopruneError as error:
            return error.exit_code, "", [f"error: {error}"]

    return call


def check(calls: dict, path: Path, count: int, *, recomputes: bool = False, unsigned: bool = False) -> int:
    """Damage the file `count` times and make all calls; gives how often damage was found.

    recomputes: what is damaged is made again, so that the answer is always the same. unsigned: the format has no
    digests, so that other numbers cannot be told.
    """
    data, found = path.read_bytes(), 0
    expected = run_apart(lambda: {name: call() for name, call in calls.items()})
    assert isinstance(expected, dict), expected
    assert all(one[0] == 0 for one in expected.values()), expected
    for number, damaged in enumerate(mutations(data, count, len(path.name))):
        path.write_bytes(damaged)
        outcomes = run_apart(lambda: {name: call() for name, call in calls.items()})
        path.write_bytes(data)
        assert isinstance(outcomes, dict), f"mutation {number}: {outcomes}"
        for name, outcome in outcomes.items():
            where = f"mutation {number}, {name}: {outcome}"
            assert not isinstance(outcome, str), where
            code, answer, errors = outcome
            if code == 0:
                assert unsigned or answer == expected[name][1], where
            else:
                assert not recomputes, where
                assert code in (1, 2), where
                assert len(errors) == 1, where
                assert path.name in errors[0], where
                assert len(errors[0]) < 400, where
                found += 1
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# --- the formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_a_feature_file(here, feature_file, count):
    from protoprune.training.examples import load_examples

    failed = {4: 8, 17: 2}
    path = Path(feature_file(here / "f.h5", blobs(), paths=PATHS, failed=failed, store="float16"))
    scores.write_scores("a.csv", sorted(PATHS), np.arange(N, dtype=np.float32), metric="a")
    scores.write_scores("b.csv", sorted(PATHS), np.arange(N, dtype=np.float32) % 7, metric="b")
    calls = {
        "select": command("select", "f.h5", "--keep", "0.5", "--k", "3", "--dedup", "0.01", "--no-cache"),
        "select --scores": command("select", "f.h5", "--keep", "0.5", "--scores", "a.csv", "--balance", "0.5"),
        "info": command("info", "f.h5"),
        "info --errors": command("info", "f.h5", "--errors"),
        "score": command("score", "moderate", "--features", "f.h5"),
        "score k_center": command("score", "k_center", "--features", "f.h5"),
        "compare": command("compare", "a.csv", "b.csv", "--features", "f.h5", "--bootstrap", "0"),
        "advise": command("advise", "--features", "f.h5"),
        "training": python(lambda: load_examples("f.h5").fingerprint()),
        "python": python(lambda: np.asarray(open_features("f.h5").features).tobytes()),
    }
    assert check(calls, path, count) > 5 * count
    whole = command("info", "f.h5", "--verify")
    assert whole()[0] == 0
    for damaged in mutations(path.read_bytes(), count, 5):
        path.write_bytes(damaged)
        code, _, errors = run_apart(whole)
        assert code == 1
        assert len(errors) == 1
        assert "f.h5" in errors[0]
        path.write_bytes(path.read_bytes())
