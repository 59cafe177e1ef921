"""Options that several commands share: groups laid out on the command line, and several numbers in one option."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, get_args, get_origin

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.cli.options import (
    ClusterOptions,
    LabelOptions,
    RuleOptions,
    TableOptions,
    TrainingOptions,
    given_words,
    numbers,
    several,
    spread,
    whole_numbers,
)
from protoprune.cli.theory import theory_app
from protoprune.errors import UsageError
from protoprune.pruning import Clusters, Rule
from protoprune.training.loop import Recipe

GROUPS = (ClusterOptions, RuleOptions, TableOptions, LabelOptions, TrainingOptions)


@dataclasses.dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option(help="Of the wall.")] = "white"
    coats: Annotated[int, typer.Option("-n", "--coats", min=1)] = 2


def called(*words: str) -> tuple:
    seen = []

    def wall(
        name: Annotated[str, typer.Argument()] = "north",
        *,
        height: Annotated[float, typer.Option()],
        paint: Paint,
        door: Annotated[bool, typer.Option("--door")] = False,
    ) -> None:
        seen.extend([name, height, paint, door])

    one = typer.Typer()
    one.command()(spread(wall))
    result = CliRunner().invoke(one, list(words))
    return (result.exit_code, *seen)


def test_a_group_is_options_on_the_command_line_and_one_parameter_behind_it():
    assert called("--height", "2.5") == (0, "north", 2.5, Paint("white", 2), False)
    assert called("south", "--colour", "red", "--door", "-n", "3", "--height", "1") == (
        0, "south", 1.0, Paint("red", 3), True,
    )  # fmt: skip
    assert called("--height", "2", "--coats", "0") == (2,)  # the field's own limits hold
    assert called() == (2,)  # and what has no default is asked for


def command_line(command: str) -> dict[str, tuple]:
    """{option: (help, default)} of a command."""
    found = typer.main.get_command(app).commands[command]
    return {one.name: (one.help, one.default) for one in found.params}


@pytest.mark.parametrize("group", GROUPS)
def test_commands_that_share_an_option_say_the_same_of_it(group):
    names = {field.name for field in dataclasses.fields(group)}
    commands = [
        command_line(name) for name in ("select", "report", "sheet", "compare", "record", "evaluate", "scaling", "tune")
    ]
    whole = [command for command in commands if names <= set(command)]
    assert len(whole) >= 2
    for name in names:
        assert len({command[name] for command in whole}) == 1
        assert whole[0][name][0]


def test_groups_make_what_the_functions_take():
    """The defaults of the command line are those of Python."""
    assert ClusterOptions().clusters() == Clusters()
    assert ClusterOptions(k="7", seed=3, restarts=2).clusters() == Clusters(k=7, seed=3, restarts=2)
    assert RuleOptions().rule(0.3, 0) == Rule(0.3)
    given = {"order": "easy", "balance": 0.5, "by": "class", "drop_hardest": 0.1}
    assert RuleOptions(**given).rule(0.3, 5) == Rule(0.3, seed=5, **given)
    for model in ("head", "cnn", "resnet18"):
        assert TrainingOptions().recipe(model) == Recipe.for_model(model)
    given = {"epochs": 3, "lr": 0.3, "weight_decay": 0.0, "width": 8, "compile": True}
    assert TrainingOptions(**given).recipe("cnn") == Recipe.for_model("cnn", **given)
    with pytest.raises(UsageError, match="--weights nowhere: no such file"):
        TrainingOptions(weights=Path("nowhere")).recipe("cnn")
    with pytest.raises(UsageError, match="--class-names goes with --labels FILE"):
        LabelOptions(class_names=Path("names.txt")).arguments()


def test_what_was_given_is_written_as_it_would_be_typed():
    assert given_words(RuleOptions(), ClusterOptions(), TableOptions()) == ""
    words = given_words(
        RuleOptions(order="easy", drop_hardest=0.1),
        TableOptions(rows=Path("the names.txt"), by_place=True),
        ClusterOptions(k="20", cache=False),
    )
    assert words == "--order easy --drop-hardest 0.1 --rows 'the names.txt' --by-place --k 20 --no-cache"


def test_several_values_are_repeated_or_separated_by_commas():
    assert several(None) == several([]) == several(["", " , "]) == []
    assert several(["1, 0.5", "0.2"]) == several("1,0.5,0.2") == ["1", "0.5", "0.2"]
    assert numbers(["1,0.5", "2e-1"], "--keep", low=0, high=1) == [1, 0.5, 0.2]
    assert numbers(None, "--keep") == []
    assert whole_numbers(["1000,2000", "5000"], "--size", example="1000") == [1000, 2000, 5000]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numbers(["0.5,half"], "--keep"), "--keep half: not a number"),
        (lambda: numbers(["0.5", "nan"], "--keep"), "--keep nan: not a number"),
        (lambda: numbers(["0"], "--keep", low=0, high=1), "--keep 0: not a number above 0 and at most 1"),
        (lambda: numbers([","], "--theta", example="0,10"), "--theta: empty; .* such as --theta 0,10"),
        (lambda: whole_numbers(["10,1e3"], "--size", example="10"), "--size 1e3: expected whole numbers from 1"),
        (lambda: whole_numbers(["0"], "--size", example="10"), "--size 0: expected whole numbers from 1"),
        (lambda: whole_numbers([""], "--size", example="10"), "--size: empty; .* such as --size 10"),
    ],
)
def test_what_is_no_number_is_named(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_every_option_for_several_values_takes_text_that_is_split():
    """A list of numbers would refuse 0.5,0.2; paths may hold commas, and are repeated."""
    commands = [*app.registered_commands, *theory_app.registered_commands]
    kinds = {}
    for command in commands:
        for name, one in inspect.signature(command.callback, eval_str=True).parameters.items():
            kind, *more = get_args(one.annotation) or (one.annotation, None)
            inner = {of for each in (kind, *get_args(kind)) if get_origin(each) is list for of in get_args(each)}
            kinds.setdefault(tuple(inner), set()).add(name)
            if str in inner:
                assert more[0].metavar, f"--{name} of {command.callback.__name__} does not say what it splits"
    assert set(kinds) == {(), (str,), (Path,)}
    assert {"keep", "size", "order", "dynamic", "theta", "devices", "selection_seconds"} <= kinds[str,]


@pytest.mark.parametrize("line", ["select f.h5 --keep 1 --order {}", "info {}", "select {} --keep 1", "advise --images {}"])
def test_what_was_typed_is_shown_shortened(line, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    feature_file("f.h5", np.eye(3))
    result = CliRunner().invoke(app, line.format("x" * 5000).split())
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 700


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense", ""])
def test_a_device_that_does_not_compute_is_refused_before_the_work(device, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    paths = [f"{name}/{i:02d}.png" for name in ("ape", "bee") for i in range(40)]
    feature_file("f.h5", np.random.default_rng(0).normal(size=(80, 4)), paths=paths)
    (tmp_path / "kept.txt").write_text("\n".join(paths[::2]))
    for line in (
        "tune --features f.h5 --keep 0.5", "record f.h5", "evaluate kept.txt --features f.h5 --test f.h5",
        "scaling --features f.h5 --test f.h5 --size 20,40 -o curves",
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*line.split(), "--device", device])
        assert result.exit_code == 2, (line, result.output, result.exception)
        assert f"--device {device}: " in result.stderr.splitlines()[-1]
        assert "expected auto, cuda" in result.stderr or "use auto, cuda, mps or cpu" in result.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"f.h5", "kept.txt"}
