"""What all tests share: generated images, feature files written by the real code, the program in a subprocess."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two threads on a busy machine are slower than one
os.environ["COLUMNS"] = "200"  # help texts and tables must not wrap
os.environ["NO_COLOR"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job: programs that tests start would
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignore Ctrl-C too

import numpy as np
import pytest
import typer.testing
from helpers import write_image
from hypothesis import HealthCheck, settings

import protoprune
from protoprune.features.featurefile import PartialFile, create_partial
from protoprune.images.decode import Status
from protoprune.images.listing import ImageList, folder_labels

settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("tests"), max_examples=300)  # of `make test-all`
settings.load_profile("tests")

# The program builds its commands once, and a test's runner for every call: a quarter of the time of tests of commands.
typer.testing._get_command = functools.cache(typer.testing._get_command)

REPOSITORY = Path(protoprune.__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """What is killed here loses no power: the programs that tests start still wait for it."""
    os.fsync = lambda _: None


@pytest.fixture(autouse=True, scope="session")
def _nothing_left_behind():
    """A file in the folder that the tests are started from would meet the next test, and the next commit."""
    before = set(os.listdir())
    yield
    left = {name for name in os.listdir() if not name.startswith(".")} - before
    assert not left, f"tests wrote into {os.getcwd()}: {sorted(left)}"


@pytest.fixture(autouse=True)
def _one_torch_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def cuda(monkeypatch) -> str:
    """The name of a CUDA device: a real one, or where there is none a simulated one."""
    import torch

    if not torch.cuda.is_available():
        import simulated_cuda

        simulated_cuda.install(monkeypatch)
    return "cuda"


@pytest.fixture
def image_tree(tmp_path):
    """image_tree({"cat": 3, "dog": 4}) -> a folder with class folders of that many small PNG images."""

    def make(counts: dict[str, int] | None = None, folder: Path | None = None, suffix: str = ".png") -> Path:
        folder = folder or tmp_path / "images"
        for number, (name, count) in enumerate((counts or {"cat": 3, "dog": 4, "eel": 5}).items()):
            for i in range(count):
                write_image(folder / name / f"{i:03d}{suffix}", seed=100 * number + i)
        return folder

    return make


def write_features(
    path,
    features,
    *,
    root: Path | str,
    paths: list[str] | None = None,
    failed: dict[int, Status] | None = None,
    store: str = "float32",
    finish: bool = True,
    made_by: dict | None = None,
) -> str:
    """A feature file, finished unless told otherwise, by the real code.

    Rows are sorted by path as every feature file is; classes come from the first-level folders. `made_by` changes the
    provenance.
    """
    features = np.asarray(features, np.float32)
    n = len(features)
    paths = paths if paths is not None else [f"{i:05d}.png" for i in range(n)]
    order = sorted(range(n), key=paths.__getitem__)
    status = np.full(n, Status.OK, np.uint8)
    for row, value in (failed or {}).items():
        status[row] = value
    features = np.where((status == Status.OK)[:, None], features, 0)[order].astype(store)
    status, paths = status[order], [paths[row] for row in order]
    labels, classes = folder_labels(paths)
    images = ImageList(os.fspath(root), paths, np.full(n, 10, np.int64), np.arange(1, n + 1), labels, classes)
    provenance = {
        "encoder": "made-up",
        "weights_sha256": "0" * 64,
        "preprocess": "{}",
        "precision": "fp32",
        "store": store,
    }
    provenance |= made_by or {}
    path = os.fspath(path)
    create_partial(path, images, features.shape[1], provenance)
    partial = PartialFile(path)
    reasons = ["" if value == Status.OK else f"made up {Status(value).label}" for value in status]
    if not finish:
        half = n // 2
        partial.commit(np.arange(half), features[:half], status[:half], reasons[:half])
        partial.close()
        return path
    partial.commit(np.arange(n), features, status, reasons)
    partial.finish()
    return path


@pytest.fixture
def quick_heads(monkeypatch):
    """Heads of one strength: choosing it, which tests/test_converged.py looks at, takes most of the time of so small a
    fit."""
    from protoprune.training import converged

    monkeypatch.setattr(converged, "fit_head", functools.partial(converged.fit_head, strength=1.0))


@pytest.fixture
def feature_file(tmp_path):
    """`write_features` with a folder of images of the test's own as `root`, where none is given."""

    def write(path, features, *, root: Path | str | None = None, **options) -> str:
        return write_features(path, features, root=root or tmp_path / "images", **options)

    return write


@pytest.fixture(scope="session")
def _commands(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture
def command_folder(_commands, monkeypatch, feature_file):
    """The working folder of `every_command.LINES`, filled once a session; what a test writes as new.* goes after it."""
    from every_command import make

    if not (_commands / "f.h5").exists():
        make(_commands, feature_file)
    monkeypatch.chdir(_commands)
    yield _commands
    for path in _commands.glob("new.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def run():
    """run("select", "--keep", 0.5, code=0) -> what the command did, in this process; it must end with that code."""
    from typer.testing import CliRunner

    from protoprune.cli import app

    def run(*arguments, code: int = 0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def run_program(tmp_path):
    """run_program("select", "--keep", "0.5", cwd=…) -> the finished process, with bytes in stdout and stderr."""

    def run(*arguments, cwd: Path | None = None, python: tuple[str, ...] = ("-m", "protoprune"), **options):
        environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), **options.pop("env", {})}
        command = [sys.executable, *python, *map(os.fspath, arguments)]
        return subprocess.run(
            command, cwd=cwd or tmp_path, capture_output=True, env=environment, timeout=300, **options
        )

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the repository (or in $PROTOPRUNE_SHARED_DATA); the test skips without it."""
    folder = Path(os.environ.get("PROTOPRUNE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data here; set PROTOPRUNE_SHARED_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="module")
def bucket():
    """The store of an S3 server (moto's) on 127.0.0.1 with an empty `images-bucket`, and the environment for it."""
    fsspec = pytest.importorskip("fsspec", reason="needs protoprune[remote]")
    pytest.importorskip("s3fs", reason="needs s3fs, from protoprune[remote]")
    server_module = pytest.importorskip("moto.server", reason="needs moto with flask")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "AKIATESTKEY",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_SECRET_ACCESS_KEY": "very-secret-value", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        environment.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store = fsspec.filesystem("s3")
    # Its stores are the process's, so that another module's bucket may be there.
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    store.mkdir("images-bucket")
    yield store
    environment.undo()
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
