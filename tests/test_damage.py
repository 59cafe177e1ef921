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

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from protoprune import records, scores
from protoprune.cli import app
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import hdf5, seals
from protoprune.features.featurefile import KIND, FeatureFile, PartialFile
from protoprune.features.opening import open_features
from protoprune.records import KIND as RECORD
from protoprune.records import PartialRecord, Record

MEMORY = 1 << 30  # bytes that reading a file of a few kB may ask for, on top of what the program has
SECONDS = 20  # of its own on a core: a busy machine is no endless loop; what sleeps is ended by the clock, later
N, D = 60, 8
TEST = ("test_prediction", "test_true_probability")
PATHS = [f"{'abc'[i % 3]}/{i:03d}.png" for i in range(N)]
FEW = 10
COUNTS = [FEW, pytest.param(200, marks=pytest.mark.slow)]


# --- originals -------------------------------------------------------------------------------------------------------


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


def _put(path: Path, data: bytes) -> None:
    """A file of its own, as a damaged copy is: where this process still has the old one open, HDF5 would answer from
    what it remembers of that one, in forked processes too."""
    path.unlink()
    path.write_bytes(data)


def _but_for_flags(damaged: bytes, data: bytes) -> bytes:
    """The bytes with the flags that say whether HDF5 has the file open, which no seal covers, as they were."""
    at, size = seals._OPEN_FLAGS
    return damaged[:at] + data[at : at + size] + damaged[at + size :] if len(damaged) >= at + size else damaged


def mutations(data: bytes, count: int, seed: int):
    """`count` damaged versions: bits flipped, a byte set, a stretch inverted, the end cut off."""
    rng = np.random.default_rng([seed, zlib.crc32(data)])
    for number in range(count):
        damaged, kind, start = bytearray(data), number % 5, int(rng.integers(len(data)))
        if kind == 0:
            damaged[start] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            damaged[start] = (damaged[start] + int(rng.integers(1, 256))) % 256
        elif kind == 2:
            for place in rng.integers(0, len(data), 8):
                damaged[place] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            wiped = damaged[start : start + int(rng.integers(1, 600))]
            damaged[start : start + len(wiped)] = bytes(byte ^ 0xFF for byte in wiped)
        else:
            damaged = damaged[:start]
        yield bytes(damaged)


# --- running ---------------------------------------------------------------------------------------------------------


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
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            signal.alarm(5 * SECONDS)
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
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
        return f"killed by signal {os.WTERMSIG(status)}{' (time is up)' if late else ''}"
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


def check(calls: dict, path: Path, count: int, *, recomputes=False, unsigned=False, verify=False) -> None:
    """Damage the file `count` times and make all calls.

    recomputes: what is damaged is made again, so that the answer is always the same. unsigned: the format has no
    digests, so that other numbers cannot be told. verify: `info --verify` finds all damage, wherever it is.
    """
    data, found = path.read_bytes(), 0
    if verify:
        calls = {**calls, "verify": command("info", path.name, "--verify")}
    expected = {name: call() for name, call in calls.items()}  # here, so that the forks need not import anything
    assert all(one[0] == 0 for one in expected.values()), expected
    for number, damaged in enumerate(mutations(data, count, len(path.name))):
        _put(path, damaged)
        outcomes = run_apart(lambda: {name: call() for name, call in calls.items()})
        _put(path, data)
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
                assert len(errors[0]) < 600, where
                found += 1
        assert not verify or _but_for_flags(damaged, data) == data or outcomes["verify"][0] == 1, f"mutation {number}"
    assert found or recomputes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# --- the formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_a_feature_file(here, feature_file, count):
    def load_examples(path):
        from protoprune.training.examples import load_examples

        return load_examples(path)

    failed = {4: 8, 17: 2}
    path = Path(feature_file(here / "f.h5", blobs(), paths=PATHS, failed=failed, store="float16"))
    scores.write_scores("a.csv", sorted(PATHS), np.arange(N, dtype=np.float32), metric="a")
    scores.write_scores("b.csv", sorted(PATHS), np.arange(N, dtype=np.float32) % 7, metric="b")
    calls = {
        "select": command("select", "f.h5", "--keep", "0.5", "--k", "3", "--dedup", "0.01", "--no-cache"),
        "info --errors": command("info", "f.h5", "--errors"),
        "python": python(lambda: np.asarray(open_features("f.h5").features).tobytes()),
    }
    every = {
        "select --scores": command("select", "f.h5", "--keep", "0.5", "--scores", "a.csv", "--balance", "0.5"),
        "info": command("info", "f.h5"),
        "score": command("score", "moderate", "--features", "f.h5"),
        "score k_center": command("score", "k_center", "--features", "f.h5"),
        "compare": command("compare", "a.csv", "b.csv", "--features", "f.h5", "--bootstrap", "0"),
        "advise": command("advise", "--features", "f.h5"),
        "training": python(lambda: load_examples("f.h5").fingerprint()),
    }
    check(calls | every if count > FEW else calls, path, count, verify=True)


@pytest.mark.parametrize("count", COUNTS)
def test_a_training_record(here, count):
    path = Path(write_record("r.h5"))
    names = ["el2n", "memorization", "influence_max"]
    if count > FEW:
        names += ["grand", "forgetting", "ddd", "ensemble_active_learning", "aum", "tdds", "dyn_unc", "margin", "loss"]
    calls = {name: command("score", name, "--record", "r.h5") for name in names}
    check({**calls, "info": command("info", "r.h5")}, path, count, verify=True)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["s.csv", "s.tsv.gz", "s.parquet", "s.npz", "s.npy"])
def test_a_score_table(here, feature_file, name, count):
    feature_file("f.h5", blobs(), paths=PATHS)
    values = np.random.default_rng(2).random(N).astype(np.float32)
    if name.startswith("s.np"):
        np.save(name, values) if name == "s.npy" else np.savez(name, scores=values)
    else:
        scores.write_scores(name, sorted(PATHS), values, metric="m")
    scores.write_scores("other.csv", sorted(PATHS), values[::-1].copy(), metric="m")
    by_place = ["--by-place"] if name.startswith("s.np") else []
    calls = {
        "select": command("select", "f.h5", "--scores", name, "--keep", "0.5", "--format", "csv", *by_place),
        "compare": command("compare", name, "other.csv", "--features", "f.h5", "--bootstrap", "0", *by_place),
        "python": python(lambda: scores.read_table(name).scores.tobytes()),
    }
    check(calls, here / name, count, unsigned=name == "s.npy")


@pytest.mark.parametrize("count", COUNTS)
def test_a_clustering_cache(here, feature_file, count):
    feature_file("f.h5", blobs(), paths=PATHS)
    select = command("select", "f.h5", "--keep", "0.5", "--k", "3", "--format", "csv")
    assert select()[0] == 0
    (entry,) = (here / "f.h5.clusters").iterdir()
    check({"select": select}, entry, count, recomputes=True)


@pytest.mark.parametrize("count", COUNTS)
def test_a_result_of_evaluate(here, count):
    from types import SimpleNamespace

    from protoprune.evaluation import runs

    examples = SimpleNamespace(
        paths=PATHS, labels=np.arange(N) % 3, classes=list("abc"), fingerprint=lambda: "same", inputs=np.zeros((N, D))
    )
    recipe = runs_recipe()
    run = runs.Run("list", 0, np.arange(0, N, 2))
    trained = []

    def fit(train, test, recipe, **how):
        trained.append(1)
        return SimpleNamespace(predictions=np.arange(N) % 4 % 3, seconds=1.5, steps=7, losses=[])

    def outcome():
        (one,) = runs.run_all([run], examples, examples, recipe, folder="runs", fit=fit, device="cpu")
        return one.accuracy, one.correct, one.total, one.seconds, one.steps, one.curve

    outcome()
    (kept,) = (here / "runs").iterdir()
    check({"evaluate": python(outcome)}, kept, count, recomputes=True)
    assert len(trained) == 1  # in this process; a damaged result is made again in the others


def runs_recipe():
    from protoprune.training.loop import Recipe

    return Recipe.for_model("head", epochs=1)


@pytest.mark.parametrize("count", COUNTS)
def test_an_unfinished_feature_file(here, feature_file, count):
    """What goes on from a damaged unfinished run ends in the same features, or says that it cannot."""
    features = blobs().astype(np.float32)
    path = Path(feature_file("f.h5", features, paths=PATHS, finish=False) + ".partial")
    order = sorted(range(N), key=PATHS.__getitem__)

    def finish():
        shutil.copy(path, "g.h5.partial")
        partial = PartialFile("g.h5")
        rows = partial.todo
        partial.commit(rows, features[order][rows], np.ones(len(rows), np.uint8), [""] * len(rows))
        partial.finish()
        with open_features("g.h5") as file:
            return file.features[:].tobytes(), file.status.tobytes(), file.paths, file.labels.tobytes()

    check({"embed": python(renamed(finish)), "again": python(renamed(finish))}, path, count)


def renamed(function):
    """The errors of a copy, as those of the original."""

    def call():
        try:
            return function()
        except ProtopruneError as error:
            raise ProtopruneError(str(error).replace("g.h5", "f.h5").replace("q.h5", "r.h5")) from None

    return call


@pytest.mark.parametrize("count", COUNTS)
def test_an_unfinished_record(here, count):
    """What is damaged of it is recorded again, by the models that it belongs to."""
    path = Path(write_record("r.h5", upto=2) + ".partial")
    whole = write_record("whole.h5")
    with Record(whole) as record:
        names = [*record.statistics]
        values = {name: np.stack([record.at(name, epoch) for epoch in range(4)], 1) for name in names}
        values |= {name: np.stack([record.test_at(name, epoch) for epoch in range(4)], 1) for name in TEST}

    def finish():
        shutil.copy(path, "q.h5.partial")
        partial = PartialRecord("q.h5")
        for model, done in enumerate(partial.committed.tolist()):
            one = slice(model, model + 1)
            for epoch in range(done, 4):
                partial.write(one, epoch, {name: table[one, epoch] for name, table in values.items()})
            partial.commit(one, 4)
        partial.finish()
        with Record("q.h5") as record:
            found = [record.last(name).tobytes() for name in names] + [record.at(name, 0).tobytes() for name in names]
            return found, record.subset.tobytes(), record.paths, record.test_prediction.tobytes()

    check({"record": python(renamed(finish))}, path, count)


# --- unfinished files -------------------------------------------------------------------------------------------------

OF_FEATURES = [
    "select f.h5 --keep 0.5", "select f.h5.partial --keep 0.5", "score moderate --features f.h5", "sheet f.h5",
    "compare a.csv b.csv --features f.h5", "advise --features f.h5", "record f.h5 -o r.h5",
    "record whole.h5 --test f.h5 -o r.h5", "evaluate list.txt --features f.h5 --test whole.h5",
    "evaluate list.txt --features whole.h5 --test f.h5", "scaling --features f.h5 --test whole.h5 --size 30",
    "tune --features f.h5 --keep 0.5", "report f.h5",
]  # fmt: skip


@pytest.mark.parametrize("line", OF_FEATURES)
def test_every_command_says_how_to_finish_a_feature_file(here, feature_file, line):
    feature_file("f.h5", blobs(), paths=PATHS, finish=False)
    feature_file("whole.h5", blobs(), paths=PATHS)
    for name in "ab":
        scores.write_scores(f"{name}.csv", sorted(PATHS), np.arange(N, dtype=np.float32), metric=name)
    (here / "list.txt").write_text("\n".join(PATHS[:9]))
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 1, result.output
    assert "not finished, 30 of 60 images are embedded; run the same `protoprune embed` again" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["r.h5", "r.h5.partial"])
def test_an_unfinished_record_is_never_scored(here, name):
    write_record("r.h5", upto=2)
    result = CliRunner().invoke(app, ["score", "ddd", "--record", name])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {name}: not finished, 8 of 16 epochs are recorded; "
        "run the same `protoprune record` again, it does the rest\n"
    )
    with pytest.raises(ProtopruneError, match="not finished"):
        Record(name)
    with Record("r.h5.partial", unfinished=True) as record:
        assert record.committed.tolist() == [2] * 4


def test_info_describes_unfinished_files_too(here, feature_file):
    feature_file("f.h5", blobs(), paths=PATHS, finish=False)
    write_record("r.h5", upto=2)
    said = CliRunner().invoke(app, ["info", "f.h5"]).stdout
    assert "unfinished  30 of 60 images are embedded; the same `protoprune embed` does the rest" in said
    said = CliRunner().invoke(app, ["info", "r.h5"]).stdout
    assert "unfinished  8 of 16 epochs are recorded; the same `protoprune record` does the rest" in said


def test_info_of_a_record(here):
    write_record("r.h5")
    said = CliRunner().invoke(app, ["info", "r.h5"]).stdout
    with Record("r.h5") as record:
        right = record.last("prediction") == record.labels
        inside = [one[rows].mean() for one, rows in zip(right, record.subset, strict=True)]
        outside = [one[~rows].mean() for one, rows in zip(right, record.subset, strict=True)]
        tested = (record.test_prediction == record.test_labels).mean(axis=1)
        shares = 100 * record.subset.mean(axis=1)
    assert "r.h5: 4 models x 4 recorded epochs x 60 images" in said
    assert "epochs      1 to 4\n" in said
    assert f"trained on {shares.min():.3g} to {shares.max():.3g} % of the images" in said
    for values, what in ((inside, "the images trained on"), (outside, "the others"), (tested, "the test images")):
        mean, low, high = (100 * value for value in (np.mean(values), min(values), max(values)))
        assert f"{mean:.1f} % ({low:.1f} to {high:.1f}) on {what}\n" in said


# --- files without a seal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.h5", "r.h5", "f.h5.partial", "r.h5.partial"])
def test_a_file_without_a_seal_is_not_looked_into(here, feature_file, name):
    """Whoever wrote it: HDF5 is not asked, which a damaged one may never answer."""
    out, is_record = name.removesuffix(".partial"), name.startswith("r")
    write_record(out) if is_record else feature_file(out, blobs(), paths=PATHS)
    with h5py.File(out) as new, h5py.File("old.h5", "w") as old:
        old.attrs.update(new.attrs)
        for column in new:
            hdf5.dataset(old, column, new[column][()])
    os.unlink(out)
    os.replace("old.h5", name)
    score = f"score el2n --record {out}" if is_record else f"score moderate --features {out}"
    for line, command in ((f"info {out}", "embed"), (score, "record" if is_record else "embed")):
        result = CliRunner().invoke(app, line.split())
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
        of_the_kind = is_record == (command == "record")
        if name.endswith(".partial"):
            what = "an unfinished run of another version of protoprune" if of_the_kind else "a damaged unfinished run"
            assert f"{what} (it has no seal)" in result.stderr
            assert "delete it" in result.stderr
        elif of_the_kind:
            what = "training record" if is_record else "feature file"
            assert f"a {what} of another version of protoprune (it has no seal), which is not read" in result.stderr
        else:
            assert f"as `protoprune {command}` writes it (it has no seal); run that with another -o" in result.stderr
    kinds = (RECORD, KIND) if is_record else (KIND, RECORD)
    hdf5.check_replaceable(name, kinds[0])
    with pytest.raises(UsageError, match="and --overwrite replaces nothing else"):
        hdf5.check_replaceable(name, kinds[1])


@pytest.mark.parametrize("lacking", ["content", "weights_sha256"])
@pytest.mark.parametrize("ending", ["", ".partial"])
def test_a_file_that_is_whole_and_lacks_something_is_of_another_version(here, feature_file, lacking, ending):
    """It was called damaged, and who has it looked for what had broken it."""
    feature_file("f.h5", blobs(), paths=PATHS, finish=not ending)
    with h5py.File(f"f.h5{ending}", "r+") as file:
        columns = file.attrs if lacking in file.attrs else file
        del columns[lacking]
    hdf5.seal(f"f.h5{ending}", KIND, set(KIND.layout) if ending else {"features"})
    way_on = "delete it and run `protoprune embed` again" if ending else "run `protoprune embed` again with --overwrite"
    said = rf"of another version of protoprune \(\d.*: it has no (attribute )?{lacking}\).*{way_on}"
    with pytest.raises(ProtopruneError, match=said):
        FeatureFile(f"f.h5{ending}")


def test_a_damaged_seal_is_not_looked_behind(here, feature_file):
    feature_file("f.h5", blobs(), paths=PATHS)
    data = bytearray((here / "f.h5").read_bytes())
    data[20] ^= 1
    (here / "f.h5").write_bytes(data)
    assert seals.format_of("f.h5") == ""
    hdf5.check_replaceable("f.h5", KIND)  # a damaged file of ours


# --- counts that disagree --------------------------------------------------------------------------------------------


def changed(path: Path, kind: hdf5.Kind, name: str, value) -> None:
    """Another dataset in the place of one, under a seal that is right."""
    with h5py.File(path, "r+") as file:
        del file[name]
        hdf5.dataset(file, name, np.asarray(value))
    hdf5.seal(path, kind, {"features"})


DISAGREEING = {
    "size": (np.zeros(N - 1, np.int64), "its s"), "label": (np.zeros(N + 1, np.int32), "its "),
    "path": (np.frombuffer(b"a/1.png\0" * (N - 1), np.uint8), "its path is no list of 60 names"),
    "classes": (np.frombuffer(b"a\0b\0", np.uint8), "its label holds 0 to 2, expected -1 to 1"),
    "status": (np.where(np.arange(N) == 7, 0, 1).astype(np.uint8), "its status says that 1 finished rows are pending"),
    "committed": (np.array([N + 1]), "its committed says that 61 of 60 rows are finished"),
    "borrowed": (np.full(N, 3, np.uint8), "its borrowed holds 3 to 3, expected 0 to 1"),
    "reason": (np.full(N, 5000, np.uint16), "its reason holds 5000 to 5000"),
    "features": (np.zeros((N - 1, D), np.float32), "its "), "ctime_ns": (np.zeros(N + 1, np.int64), "its "),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEING)
def test_counts_of_a_feature_file_that_disagree(here, feature_file, name):
    value, said = DISAGREEING[name]
    changed(Path(feature_file("f.h5", blobs(), paths=PATHS)), KIND, name, value)
    result = CliRunner().invoke(app, ["select", "f.h5", "--keep", "0.5", "--k", "3", "--no-cache"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert "f.h5: damaged" in result.stderr
    assert said in result.stderr


@pytest.mark.parametrize(
    ("name", "row", "value", "said"),
    [
        *(("committed", 0, n, f"says that {n:,} of 60 rows are finished") for n in (-1, N + 1, 10**15)),
        ("borrowed", 5, 3, "holds 0 to 3"), ("status", 7, 0, "says that 1 finished rows are pending"),
        ("reason", 9, 5000, "holds 0 to 5000"),
    ],
)  # fmt: skip
def test_counts_of_an_unfinished_run_that_disagree(here, feature_file, name, row, value, said):
    """What changes in a run is under no seal."""
    path = feature_file("f.h5", blobs(), paths=PATHS, finish=False) + ".partial"
    with h5py.File(path, "r+") as file:
        file[name][row] = value
    result = CliRunner().invoke(app, ["info", "f.h5"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert f"f.h5.partial: a damaged unfinished run (its {name} {said}" in result.stderr


def test_an_unfinished_run_whose_counts_disagree_does_not_go_on(here, feature_file):
    path = feature_file("f.h5", blobs(), paths=PATHS, finish=False) + ".partial"
    with h5py.File(path, "r+") as file:
        file["committed"][0] = N + 1
    with pytest.raises(ProtopruneError, match=r"f\.h5\.partial: a damaged unfinished run"):
        PartialFile("f.h5")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("path", np.frombuffer(b"a\0" * (N + 1), np.uint8), "its path is no list of 60 names"),
        ("label", np.full(N, 3, np.int32), "its label holds 3 to 3"),
        ("subset", np.full((4, N), 2, np.uint8), "its subset holds 2 to 2"),
        ("committed", np.full(4, 5, np.int32), "its committed holds 5 to 5"),
        ("epoch", np.array([1, 3, 2, 4], np.int32), "its epochs are not in order"),
        ("test_label", np.zeros(3, np.int32), "its "),
        ("prediction", np.zeros((4, 4, N - 1), np.uint16), "its "),
    ],
)
def test_counts_of_a_record_that_disagree(here, name, value, said):
    changed(Path(write_record("r.h5")), RECORD, name, value)
    result = CliRunner().invoke(app, ["score", "el2n", "--record", "r.h5"])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert "r.h5: damaged" in result.stderr
    assert said in result.stderr


def test_a_damaged_clustering_is_made_anew_and_said(here, feature_file):
    feature_file("f.h5", blobs(), paths=PATHS)
    line = ["select", "f.h5", "--keep", "0.5", "--k", "3"]
    first = CliRunner().invoke(app, line)
    assert "damaged clustering" not in first.stderr
    (entry,) = (here / "f.h5.clusters").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-50])
    again = CliRunner().invoke(app, line)
    assert again.stdout == first.stdout
    said = f"warning: f.h5.clusters/{entry.name}: a damaged clustering, or one that cannot be read; it is made anew\n"
    assert again.stderr.count(said) == 1
    assert "damaged clustering" not in CliRunner().invoke(app, line).stderr
    assert entry.stat().st_size == len(whole)


def test_probabilities_of_an_unfinished_record(here):
    """Those of a model that is done are known to be what was written, or the model is trained again."""
    records.create(
        "r.h5", {"recipe": "{}"}, paths=sorted(PATHS), labels=np.arange(N) % 3, classes=list("abc"),
        subset=np.ones((3, N), bool), epoch_numbers=[1], probabilities=True,
    )  # fmt: skip
    partial = PartialRecord("r.h5")
    shares = np.random.default_rng(0).dirichlet(np.ones(3), (3, N))
    for model in range(2):  # the third is not done, and nothing is known of it
        one = slice(model, model + 1)
        partial.write(one, 0, {name: np.zeros((1, N)) for name in (*records.STORED[:-1], "prediction")})
        partial.write_probabilities(one, slice(0, N), shares[one])
        partial.commit(one, 1)
    partial.close()
    assert "r.h5.partial: whole" in CliRunner().invoke(app, ["info", "--verify", "r.h5.partial"]).stdout
    with h5py.File("r.h5.partial", "r+") as file:
        file["probability"][1, 7, 0] = 2.0
        file["probability"][2, 7, 0] = 2.0
    result = CliRunner().invoke(app, ["info", "--verify", "r.h5.partial"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "its probability of model 1 is not what was written" in result.stderr
    partial = PartialRecord("r.h5")
    assert partial.committed.tolist() == [1, 0, 0]
    partial.close()


def test_who_verifies_is_told_the_shortest_way_on(here, feature_file):
    """Damaged rows alone need no --overwrite, which embeds everything."""
    feature_file("f.h5", blobs(), paths=PATHS)
    with h5py.File("f.h5") as file:
        place = file["features"].id.get_offset()
    whole = (here / "f.h5").read_bytes()
    (here / "f.h5").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    result = CliRunner().invoke(app, ["info", "--verify", "f.h5"])
    assert (result.exit_code, "the same `protoprune embed` embeds what is damaged again" in result.stderr) == (1, True)
    assert "--overwrite" not in result.stderr
