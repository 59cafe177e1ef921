"""Every number of every command: too large, negative or none, it is refused in one line, and in Python too."""

from __future__ import annotations

import re

import numpy as np
import pytest
from every_command import LINES, walk
from typer.testing import CliRunner

from protoprune import bounds
from protoprune.cli import app
from protoprune.errors import UsageError


def numeric():
    """(command, option, type's name) of every option that takes a number, also of those that take several or 'auto'."""
    words = {"k", "alpha_tot", "alpha_prune", "theta", "keep", "size", "selection_seconds"}
    for name, command in walk():
        for one in command.params:
            kind = str(vars(one).get("type_descriptor") or one.type).lower()  # typer's, and click's before typer 0.29
            if one.opts[0].startswith("-") and (re.search(r"\b(int|float)(range)?\b", kind) or one.name in words):
                yield name, one.opts[0], "int" if "int" in kind or one.name in ("k", "size") else "float"


NUMERIC = sorted(set(numeric()))


@pytest.fixture
def here(command_folder):
    return command_folder


# What an option needs beside it to be looked at at all.
BESIDE = {
    ("select", "--train-points"): "", ("evaluate", "--every"): "--dynamic ucb --keep 0.5", ("sheet", "--count"): "",
    ("score", "--window"): "score dyn_unc --record r.h5",
    ("score", "--k"): "score self_supervised_prototypes --features f.h5",
    ("score", "--budget"): "score k_center --features f.h5", ("score", "--seed"): "score random --features f.h5",
    ("compare", "--count"): "--sheet new.png --root images",
}  # fmt: skip


def line_of(name: str, option: str) -> list[str]:
    beside = BESIDE.get((name, option), "")
    words = beside.split() if beside.startswith(name) else f"{name} {LINES[name]} {beside}".split()
    while option in words:
        place = words.index(option)
        del words[place : place + 2]
    return words


def test_there_are_many_numbers():
    assert len(NUMERIC) > 100
    assert {"select", "record", "evaluate", "scaling", "tune", "score", "theory error", "embed"} <= {
        one[0] for one in NUMERIC
    }


@pytest.mark.parametrize("command", sorted({one[0] for one in NUMERIC}))
def test_a_number_out_of_bounds_is_one_line(here, command):
    for name, option, kind in NUMERIC:
        if name == command:
            refused(here, name, option, kind)


def refused(here, name: str, option: str, kind: str) -> None:
    before = {path.name for path in here.iterdir()}
    wrong = ("nan", "inf", "1e300") if kind == "float" else ("nan", "1e23", "99999999999999999999999")
    for value in ("-7", *wrong):
        result = CliRunner().invoke(app, [*line_of(name, option), option, value])
        where = f"{option} {value}: {result.output}"
        assert result.exception is None or isinstance(result.exception, SystemExit), where
        assert result.exit_code == 2, where
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, where
        assert option.lstrip("-") in errors[0], where
        assert len(errors[0]) < 300, where
    assert {path.name for path in here.iterdir()} - {"f.h5.clusters"} == before - {"f.h5.clusters"}


def repr_(value) -> str:
    return type(value).__name__ if isinstance(value, int) else repr(value)


@pytest.mark.parametrize(
    "value", [0, -1, 10**12, 10**5000, 2.0, 2.5, "3", None, True, np.float32(2), float("nan")], ids=repr_
)
def test_whole_numbers(value):
    with pytest.raises(UsageError, match=r"^--k .*: expected (at least 1|a whole number from 1 to 1,000,000,000)$"):
        bounds.check_whole("--k", value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    for value in (1, 10**9, np.int8(3), np.uint64(7)):
        bounds.check_whole("--k", value)


@pytest.mark.parametrize("value", [-1, 2, float("nan"), float("inf"), "0.5", None, False, 1j])
def test_numbers(value):
    with pytest.raises(UsageError, match=r"^--x .*: expected a number from 0 to 1$"):
        bounds.check_number("--x", value, 0, 1)


def test_numbers_at_their_bounds():
    for value in (0, 1, np.float32(0.5), 0.25):
        bounds.check_number("--x", value, 0, 1)
    with pytest.raises(UsageError, match="--x 0: expected a number above 0 to 1"):
        bounds.check_number("--x", 0, 0, 1, above=True)


@pytest.mark.parametrize("value", ["auto", "2", 1.5, True, -1, float("nan"), [], 10**30])
def test_python_refuses_what_is_no_number(value, image_tree, tmp_path):
    """By the sentence of the command line, and not by whatever Python stumbles over first."""
    import protoprune
    from protoprune.evaluation.comparing import _seeds

    encoder, root = protoprune.load_encoder("mini"), image_tree({"a": 1, "b": 1})
    images = protoprune.list_folder(root)
    for option, call in {
        "--batch-size": lambda: protoprune.embed(images, encoder, tmp_path / "f.h5", batch_size=value),
        "--workers": lambda: protoprune.embed(images, encoder, tmp_path / "f.h5", workers=value),
        "--class-level": lambda: protoprune.list_folder(root, class_level=value),
        "--image-size": lambda: protoprune.load_encoder("mini", image_size=value),
        "--seeds": lambda: _seeds(value),
    }.items():
        with pytest.raises(UsageError, match=f"^{option} "):
            call()


def test_seeds_may_be_numbers_of_numpy():
    from protoprune.evaluation.comparing import _seeds

    assert _seeds(np.int64(3)) == _seeds(3) == _seeds(range(3)) == _seeds(np.arange(3)) == [0, 1, 2]
