"""Tables on stdout: drawn on a terminal that is wide enough, aligned text elsewhere, and every cell whole."""

from __future__ import annotations

import re
import sys

import pytest

from protoprune.cli.tables import print_table

ROWS = [["[b]", "1.5"], ["caf\udce9", "12"]]


def shown(capsys, *arguments, **options) -> list[str]:
    print_table(*arguments, **options)
    return capsys.readouterr().out.splitlines()


def test_text_that_is_aligned(capsys):
    assert shown(capsys, ["name", "n"], ROWS, right=[1]) == ["name         n", "[b]        1.5", "caf\\udce9   12"]
    assert shown(capsys, None, ROWS, title="title") == ["title", "[b]        1.5", "caf\\udce9  12"]


def test_text_is_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert shown(capsys, ["a", "b"], [["x" * 50, "1"]])[1] == "x" * 50 + "  1"


@pytest.mark.parametrize(("columns", "drawn"), [("80", True), ("15", False)])
def test_a_terminal(capsys, monkeypatch, columns, drawn):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = shown(capsys, ["name", "n"], ROWS, right=[1], title="title")
    assert lines[0] == "title"
    assert ("│" in "".join(lines)) is drawn
    assert any("[b]" in line and "1.5" in line for line in lines)
    assert any("caf\\udce9" in line for line in lines)


def test_prose_may_fold_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = shown(capsys, ["a"], [["many words " * 9]], fold=True)
    assert all(len(re.sub(r"\x1b\[\d*m", "", line)) <= 30 for line in lines)
    assert "".join(lines).count("words") == 9
