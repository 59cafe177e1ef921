"""A feature file that another one takes the place of while a command reads it: the answer is of the file that was
opened, or a refusal, never a mixture."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import REPOSITORY
from shard_helpers import image_folder, members, write_tars
from typer.testing import CliRunner

import protoprune
from protoprune import lists, pruning, selection
from protoprune.cli import app
from protoprune.clustering import prototypes
from protoprune.errors import ProtopruneError
from protoprune.features import hdf5
from protoprune.features.featurefile import FeatureFile
from protoprune.features.opening import open_features
from protoprune.pruning import ranking

N = 400


@pytest.fixture
def two_files(feature_file, tmp_path):
    """A feature file, and another with fewer rows, other names and other features, to take its place."""
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(N, 6))
    ours[1::20] = ours[0::20] + 1e-4  # near-duplicates
    paths = [f"{'ab'[i % 2]}/{i:04d}.png" for i in range(N)]
    feature_file(tmp_path / "f.h5", ours, paths=paths)
    feature_file(tmp_path / "kept_aside.h5", ours, paths=paths)
    feature_file(tmp_path / "other.h5", rng.normal(size=(N // 4, 5)), paths=[f"b/other{i}.png" for i in range(N // 4)])
    shutil.rmtree(tmp_path / "f.h5.clusters", ignore_errors=True)
    return tmp_path / "f.h5", tmp_path / "other.h5"


def replaced_at_each_call(monkeypatch, file, other, where):
    """Wrap a function so that, each time it is called, another file takes the place of the feature file first."""
    module, name = where
    real = getattr(module, name)

    def wrapped(*arguments, **options):
        shutil.copy(other, f"{file}.new")
        os.replace(f"{file}.new", file)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, wrapped)


OPTIONS = ["--restarts", "2", "--dedup", "0.01", "--stability", "--balance", "0.5", "--quota", "dbp"]
HOOKS = [
    (prototypes, "cluster"), (prototypes, "consensus"), (ranking, "add_clusters"), (selection, "near_duplicates"),
    (selection, "ranking"), (pruning, "stability"), (pruning, "restart_overlap"), (lists, "list_chunks"),
    (lists, "manifest_chunks"),
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook[1])
def test_select_is_of_the_file_that_was_opened(two_files, tmp_path, monkeypatch, hook):
    file, other = two_files
    command = ["--keep", "0.4", *OPTIONS, "--manifest"]
    whole = CliRunner().invoke(app, ["select", str(tmp_path / "kept_aside.h5"), *command, str(tmp_path / "a.csv")])
    assert whole.exit_code == 0, whole.stderr
    replaced_at_each_call(monkeypatch, file, other, hook)
    result = CliRunner().invoke(app, ["select", str(file), *command, str(tmp_path / "b.csv")])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == whole.stdout
    assert result.stderr.replace(f"{file}:", "").replace("f.h5", "") == whole.stderr.replace(
        f"{tmp_path / 'kept_aside.h5'}:", ""
    ).replace("kept_aside.h5", "")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert open_features(file).n == N // 4  # it did take the other's place


@pytest.mark.parametrize("order", ["cover", "facility"])
def test_covering_is_of_the_file_that_was_opened(two_files, monkeypatch, order):
    file, other = two_files
    whole = protoprune.select(file, 0.3, order=order).kept_paths
    replaced_at_each_call(monkeypatch, file, other, (selection, "ranking"))
    assert protoprune.select(file, 0.3, order=order).kept_paths == whole


def test_a_metric_is_of_the_file_that_was_opened(two_files, tmp_path, monkeypatch):
    file, other = two_files
    command = ["score", "self_supervised_prototypes", "--k", "7", "-o"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "a.csv"), "--features", str(file)]).exit_code == 0
    replaced_at_each_call(monkeypatch, file, other, (prototypes, "cached"))
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b.csv"), "--features", str(file)])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize("command", ["report", "sheet", pytest.param("tune", marks=pytest.mark.slow)])
def test_pages_sheets_and_tuning_are_of_the_file_that_was_opened(two_files, tmp_path, monkeypatch, command):
    file, other = two_files
    options = {
        "report": ["report", str(file), "--keep", "0.4", "--no-thumbnails", "-o", str(tmp_path / "page.html")],
        "sheet": ["sheet", str(file), "--duplicates", "0.05", "-o", str(tmp_path / "sheet.png"), "--max-rows", "3"],
        "tune": ["tune", "--features", str(file), "--keep", "0.5", "--seeds", "2", "-o", str(tmp_path / "tune")],
    }[command]
    hook = (pruning, "select") if command == "tune" else (selection, "near_duplicates")
    replaced_at_each_call(monkeypatch, file, other, hook)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == (command == "sheet"), result.stderr  # whose images are not there
    if command == "sheet":
        assert "duplicates: 50 images would be removed" in result.stderr
    if command == "tune":
        kept = (tmp_path / "tune" / "kept.txt").read_text().splitlines()
        assert len(kept) == N // 2
        assert not any("other" in path for path in kept)
    if command == "report":
        assert b"other1" not in (tmp_path / "page.html").read_bytes()


def test_a_part_of_a_set_that_is_embedded_again_is_refused(tmp_path, monkeypatch):
    images = image_folder(tmp_path / "images")
    write_tars(tmp_path / "shards", members(images), 3)
    run = CliRunner()
    embed = ["embed", str(tmp_path / "shards"), "--encoder", "mini", "-o"]
    assert run.invoke(app, [*embed, str(tmp_path / "set")]).exit_code == 0
    for name in os.listdir(tmp_path / "shards"):  # other images under the same names
        os.unlink(tmp_path / "shards" / name)
    other = [(f"x/{number}.png", data) for number, (_, data) in enumerate(reversed(members(images)))]
    write_tars(tmp_path / "shards", other, 3)
    assert run.invoke(app, [*embed, str(tmp_path / "other")]).exit_code == 0
    monkeypatch.setattr("protoprune.features.featureset._OPEN_FILES", 1)  # so that parts are opened again and again
    want = run.invoke(app, ["select", str(tmp_path / "set"), "--keep", "0.5", "--k", "2"])
    assert want.exit_code == 0, want.stderr
    real = selection.ranking

    def replaced(*arguments, **options):
        for path in (tmp_path / "other").iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path / "new")
                os.replace(tmp_path / "new", tmp_path / "set" / path.name)
        return real(*arguments, **options)

    monkeypatch.setattr(selection, "ranking", replaced)
    dedup = run.invoke(app, ["select", str(tmp_path / "set"), "--keep", "0.5", "--k", "2", "--stability"])
    assert dedup.exit_code == 1
    assert "names; if it was embedded again since this began, run this again" in dedup.stderr
    assert "Traceback" not in dedup.stderr


@pytest.mark.parametrize("n", [N // 4, N, 2 * N])
def test_what_is_written_over_an_open_file_is_refused(two_files, feature_file, tmp_path, n):
    """As `cp other.h5 f.h5` does in a notebook: HDF5 goes on showing what it has read of a file that is open."""
    file, other = two_files
    feature_file(other, np.random.default_rng(1).normal(size=(n, 6)), paths=[f"b/other{i:03d}.png" for i in range(n)])
    check_written_over(file, other)
    gc.collect()  # the ranking has the file open
    assert protoprune.select(file, 0.4).kept_paths == protoprune.select(other, 0.4).kept_paths


def check_written_over(file, other):
    ranking = protoprune.rank(file, k=5)
    with FeatureFile(file) as features, open_features(file) as whole:
        assert whole.paths[0] == "a/0000.png"
        assert len(features.features[[1, 7]])
        shutil.copyfile(other, file)
        for read in (
            lambda: list(protoprune.prune(ranking, 0.4).kept_paths),
            lambda: list(whole.paths),
            lambda: list(features.paths),
            lambda: features.features[[3, 8]],
        ):
            with pytest.raises(ProtopruneError, match=r"f\.h5: was written over since it was opened; open it again$"):
                read()
        with pytest.raises(ProtopruneError, match=r"f\.h5: was written over while this program has it open; close it"):
            protoprune.select(file, 0.4)


def test_opening_while_another_takes_the_name_never_mixes_two_files(two_files, tmp_path):
    """The seal, the structure and the rows are of one file, at whatever moment the other one comes."""
    file, other = two_files
    copies = [tmp_path / "1", tmp_path / "2"]
    shutil.copy(file, copies[0])
    shutil.copy(other, copies[1])
    stop = threading.Event()

    def swap():
        turn = 0
        while not stop.is_set():
            os.link(copies[turn % 2], tmp_path / "new")
            os.replace(tmp_path / "new", file)
            turn += 1
            stop.wait(0.001 * (turn % 3))

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(60):
            try:
                with FeatureFile(file) as one:
                    assert (one.n, one.dim) in ((N, 6), (N // 4, 5))
                    assert len(one.paths) == len(one.labels) == len(one.status) == one.n
                    assert one.features[np.arange(one.n)].shape == (one.n, one.dim)
                    seen.add(one.n)
            except ProtopruneError as error:
                assert "again and again" in str(error)  # noqa: PT017 - the other outcome is as good
    finally:
        stop.set()
        thread.join()
    assert len(seen) == 2


def test_a_real_race_gives_one_of_the_two_lists(two_files, tmp_path):
    file, other = two_files
    lists = []
    for one in (tmp_path / "kept_aside.h5", other):
        result = CliRunner().invoke(app, ["select", str(one), "--keep", "0.4", "--k", "9", "--dedup", "0.01"])
        lists.append(result.stdout.encode())
    script = (
        "import sys; from protoprune.cli import main; "
        "sys.argv = ['protoprune', 'select', sys.argv[1], '--keep', '0.4', '--k', '9', '--dedup', '0.01', "
        "'--no-cache']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    shutil.copy(file, tmp_path / "1")
    turn = 0
    while process.poll() is None:
        os.link((other, tmp_path / "1")[turn % 2], tmp_path / "new")
        os.replace(tmp_path / "new", file)
        turn += 1
    out, err = process.communicate()
    assert b"Traceback" not in err
    assert process.returncode == 0 or b"again and again" in err
    assert out in (lists if process.returncode == 0 else [b""])


def test_a_closed_ranking_says_so(two_files):
    file, _ = two_files
    with protoprune.rank(file, k=5) as ranking:
        assert protoprune.prune(ranking, 0.5).keep.sum() == N // 2
    with pytest.raises(ProtopruneError, match="was closed"):
        pruning.deduplicate(ranking, 0.01)
    assert protoprune.prune(ranking, 0.5).keep.sum() == N // 2  # needs no features


def test_a_file_given_open_is_not_closed(two_files):
    file, _ = two_files
    with open_features(file) as one:
        a = protoprune.select(one, 0.5, k=5)
        b = protoprune.select(one, 0.5, k=5, dedup=0.01)
        assert a.ranking.source is b.ranking.source is one
        assert len(one.paths) == N


def test_a_forgotten_ranking_closes_its_file(two_files):
    import gc

    file, _ = two_files
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc here")
    for _ in range(5):
        protoprune.rank(file, k=5)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert hdf5._TRIES >= 3
