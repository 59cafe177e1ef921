"""Closed, full and broken standard streams, for every command: one line and exit code 1, or all the work done."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from every_command import LINES, main_with, text, walk

from protoprune import cli
from protoprune.cli import _pass_on
from protoprune.features.featurefile import FeatureFile

FULL = Path("/dev/full")
FILES = ("embed", "record", "sheet", "report", "merge", "reshard", "import", "tune")  # commands that write files
ANSWERS = [name for name in LINES if name not in FILES]


@pytest.fixture
def here(command_folder):
    return command_folder


def test_every_command_is_tried():
    assert set(LINES) == {name for name, _ in walk()}


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", [*ANSWERS, "tune"])
def test_a_full_stdout_is_one_line(here, name):
    """Every answer is found out not to have been written: by the exit code, and in one line."""
    said = io.StringIO()
    with text(FULL) as stdout:
        code = main_with(f"{name} {LINES[name]}", stdout, said)
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error:")]
    assert code == 1, said.getvalue()
    assert len(errors) == 1, said.getvalue()
    assert errors[0].startswith("error: standard output: cannot write (No space left on device)")
    assert said.getvalue().splitlines()[-1] == errors[0]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_closed_stdout_is_one_line_before_the_work(here, name):
    """`>&-`: Python then has no sys.stdout, and printing does nothing; a file in its place is enough."""
    said = io.StringIO()
    assert main_with(f"{name} {LINES[name]}", None, said) == 1
    assert said.getvalue().startswith("error: standard output is closed")
    assert said.getvalue().count("\n") == 1


@pytest.mark.parametrize(("name", "file"), [
    ("compare", "-o new.csv"), ("compare", "--figure new.png"), ("theory error", "--csv new.csv"),
])  # fmt: skip
def test_a_closed_stdout_is_no_error_where_a_file_has_the_answer(here, name, file):
    said = io.StringIO()
    assert main_with(f"{name} {LINES[name]} {file}", None, said) == 0, said.getvalue()
    assert (here / file.split()[1]).exists()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_stdout_costs_no_files(here):
    with text(FULL) as stdout:
        assert main_with(f"evaluate {LINES['evaluate']} -o new.out", stdout, io.StringIO()) == 1
    assert (here / "new.out" / "results.json").exists()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["--help", "--version", "select --help", "theory error --help"])
def test_help_into_a_full_stdout_is_one_line(line):
    said = io.StringIO()
    with text(FULL) as stdout:
        assert main_with(line, stdout, said) == 1
    assert said.getvalue().count("\n") == 1
    assert said.getvalue().startswith("error: standard output: cannot write")


@pytest.mark.parametrize("name", LINES)
def test_a_closed_stderr_changes_nothing(here, name):
    """`2>&-`: Python then has no sys.stderr at all."""
    answer = io.StringIO()
    answer.buffer = io.BytesIO()  # where lists go
    assert main_with(f"{name} {LINES[name]}", answer, None) == 0
    assert answer.getvalue() or answer.buffer.getvalue() or list(here.glob("new.*"))


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["embed", "select", "info", "score", "merge"])
def test_a_full_stderr_changes_nothing(here, name):
    stderr = text(FULL)
    with text() as stdout:
        assert main_with(f"{name} {LINES[name]}", stdout, stderr) == 0
    with contextlib.suppress(OSError):  # what was said is still in it
        stderr.close()


@pytest.mark.parametrize("name", ["select", "compare", "advise", "info", "encoders", "theory error"])
def test_a_reader_that_has_gone_is_no_error(here, name):
    """`| true`; Python ignores SIGPIPE, so that writing raises BrokenPipeError."""
    reading, writing = os.pipe()
    os.close(reading)
    said = io.StringIO()
    with open(writing, "w") as stdout:
        assert main_with(f"{name} {LINES[name]}", stdout, said) == 0
    assert "error" not in said.getvalue()


def program(line: str, folder: Path) -> subprocess.CompletedProcess:
    """The program under a shell, which alone can close streams before it starts."""
    root = Path(__file__).resolve().parents[1]
    command = f"{sys.executable} -m protoprune {line}"
    environment = {**os.environ, "PYTHONPATH": os.fspath(root)}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=120)


def test_no_file_takes_the_place_of_a_closed_stream(here):
    """What is opened first gets the lowest number: with 2>&- that was the feature file, and libraries write there."""
    assert program("import v.npz -o new.h5 0<&- 1>&- 2>&-", here).returncode == 0
    with FeatureFile(here / "new.h5") as file:
        assert file.usable.all()
        assert file.damage() == []
    seen = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in range(3)))"
    line = f"import sys, io; from protoprune.cli.streams import open_closed as o; sys.stderr = None; o(); {seen}"
    result = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{line}" 0<&- 2>&-'], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    first, _, last = result.stdout.split()
    assert (first, last) == (os.devnull, os.devnull)


def test_a_pipe_that_closes_under_a_long_answer(here):
    result = program("metrics | head -n 1; exit $?", here)
    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr


def test_without_memory_there_is_one_line(here, monkeypatch):
    """torch's errors are RuntimeErrors; other ones stay as they are, since they are faults of ours."""
    import protoprune.features.opening as features

    for error, told in (
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory (Unable to allocate 7 TiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\n you tried"), "not enough memory (DefaultCPU"),
    ):

        def fail(path, error=error):
            raise error

        monkeypatch.setattr(features, "open_features", fail)
        said = io.StringIO()
        assert main_with("advise --features f.h5", text(), said) == 1
        assert said.getvalue().startswith(f"error: {told}")
        assert said.getvalue().count("\n") == 1

    def fault(path):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(features, "open_features", fault)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main_with("advise --features f.h5", text(), io.StringIO())


def test_a_package_of_an_extra_that_is_missing_is_one_line(here, monkeypatch):
    """`pip install 'protoprune[select]'` comes without torch, and `tune`, `embed` and others need it."""
    import protoprune.features.opening as features

    said = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert main_with("tune --features f.h5 --keep 0.5 -o without", text(), said) == 1
    assert (
        said.getvalue()
        == "error: this needs torch, which is not installed; run: pip install 'protoprune[cpu]' (or [gpu])\n"
    )
    assert not (here / "without").exists()

    def fault(path):
        raise ModuleNotFoundError("No module named 'protoprune.nothing'", name="protoprune.nothing")

    monkeypatch.setattr(features, "open_features", fault)
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        main_with("advise --features f.h5", text(), io.StringIO())


def test_an_interrupt_that_python_cannot_raise_comes_a_moment_later(monkeypatch, capfd):
    """In a callback of a weak reference, of which h5py has one for each of its objects: it was printed, and no more."""

    class Thing:
        pass

    def interrupt(_):
        raise KeyboardInterrupt

    def go_on():
        things.clear()
        time.sleep(20)

    monkeypatch.setattr(sys, "unraisablehook", _pass_on)
    things = [Thing()]
    reference = weakref.ref(things[0], interrupt)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert reference() is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("when", "said"), [("at first", ""), ("at work", "interrupted\n")])
def test_an_interrupt_is_no_traceback(when, said, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if when == "at first":  # while Typer puts the command line together
        monkeypatch.setattr(cli, "app", interrupt)
    else:
        monkeypatch.setattr(cli._Group.__mro__[1], "invoke", interrupt)
    monkeypatch.setattr(sys, "argv", ["protoprune", "metrics"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, capsys.readouterr().err) == (130, said)
