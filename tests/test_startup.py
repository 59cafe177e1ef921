"""Help answers before anything heavy is imported, selecting works without torch, and every option is explained."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import protoprune
from protoprune.__main__ import main as program
from protoprune.cli import app

HEAVY = {"torch", "torchvision", "timm", "scipy", "faiss", "h5py", "PIL", "datasets", "simplejpeg"}

MODULES = """
import sys
from protoprune.cli import main
sys.argv = ["protoprune", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(result) -> tuple[str, set[str]]:
    code, *modules = result.stderr.decode().splitlines()[-1].split()
    return code, set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([one, "--help"] for one in ("select", "embed"))])
def test_help_imports_nothing_heavy(run_program, arguments):
    result = run_program(*arguments, python=("-c", MODULES))
    code, modules = imported(result)
    assert code == "0"
    assert not modules & HEAVY
    assert "typer" in modules  # the list of modules is a real one
    assert b"protoprune" in result.stdout


def test_importing_the_package_imports_nothing(run_program):
    result = run_program(python=("-c", "import sys, protoprune; print(*sys.modules)"))
    assert not {name.partition(".")[0] for name in result.stdout.decode().split()} & {*HEAVY, "numpy", "typer"}


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "simplejpeg"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from protoprune.cli import main
sys.argv = ["protoprune", *sys.argv[1:]]
main()
"""


def test_selecting_works_without_torch(run_program, run, feature_file, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    features = np.random.default_rng(0).normal(size=(40, 6))
    path = feature_file(tmp_path / "features.h5", features, paths=[f"{'ab'[i % 2]}/{i:02d}.png" for i in range(40)])
    options = ["--keep", "0.5", "--balance", "0.5", "--restarts", "2", "--stability", "--manifest", "m.csv"]
    result = run_program("select", path, *options, python=("-c", WITHOUT_TORCH))
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 20
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 41
    monkeypatch.setitem(sys.modules, "torch", None)
    missing = run("select", path, "--keep", "0.5", "--backend", "torch", code=1)
    assert "error: torch is not installed; run: pip install torch" in missing.stderr


def test_a_sheet_needs_neither_torch_nor_simplejpeg(run_program, feature_file, tmp_path):
    pytest.importorskip("faiss")
    from PIL import Image

    paths = [f"{i:02d}.jpg" for i in range(12)]
    (tmp_path / "images").mkdir()
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 16), (number * 20, 0, 0)).save(tmp_path / "images" / path)
    features = feature_file(tmp_path / "features.h5", np.random.default_rng(0).normal(size=(12, 4)), paths=paths)
    result = run_program("sheet", features, "--root", tmp_path / "images", python=("-c", WITHOUT_TORCH))
    assert result.returncode == 0, result.stderr
    assert b"could not be read" not in result.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def commands() -> dict:
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_option_has_help(name):
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help text"


@pytest.mark.parametrize("group", [[], ["theory"]])
def test_no_line_of_the_overview_is_cut(group):
    listing = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    lines = listing.partition("Commands:")[2].splitlines()
    assert len(lines) > 5
    assert [line for line in lines if line.endswith("...") or len(line) > 80] == []


def test_public_names_exist():
    for name in protoprune.__all__:
        assert getattr(protoprune, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = protoprune.nothing


def test_the_shell_completes_commands_and_options():
    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_PROTOPRUNE_COMPLETE": "complete_bash"}
        return CliRunner().invoke(app, [], env=words, prog_name="protoprune").stdout.split()

    assert completed("protoprune sc") == ["score", "scaling"]
    assert completed("protoprune select --dedup") == ["--dedup", "--dedup-prefer"]


def test_ctrl_c_while_the_program_is_imported(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, *_):
            if name == "protoprune.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "protoprune.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        program()
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
