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

import protoprune
from protoprune.cli import app
from protoprune.cli.options import (
    ClusterOptions,
    LabelOptions,
    RuleOptions,
    TableOptions,
    TrainingOptions,
    given_words,
    numbers,
    refuse_idle,
    several,
    spread,
    whole_numbers,
)
from protoprune.cli.theory import theory_app
from protoprune.comparison import join
from protoprune.embedding.importing import import_features
from protoprune.errors import UsageError
from protoprune.pruning import Clusters, Rule, stability
from protoprune.scores import read_table, write_scores
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


@pytest.mark.parametrize(
    "line", ["select f.h5 --keep 1 --order {}", "info {}", "select {} --keep 1", "advise --images {}"]
)
def test_what_was_typed_is_shown_shortened(line, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    feature_file("f.h5", np.eye(3))
    result = CliRunner().invoke(app, line.format("x" * 5000).split())
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 700


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense"])
def test_a_device_that_does_not_compute_is_refused_before_the_work(device, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    paths = [f"{name}/{i:02d}.png" for name in ("ape", "bee") for i in range(40)]
    feature_file("f.h5", np.random.default_rng(0).normal(size=(80, 4)), paths=paths)
    (tmp_path / "kept.txt").write_text("\n".join(paths[::2]))
    (tmp_path / "images").mkdir()
    for line in (
        "tune --features f.h5 --keep 0.5 --model cnn --images images", "record f.h5",
        "evaluate kept.txt --features f.h5 --test f.h5",
        "scaling --features f.h5 --test f.h5 --size 20,40 -o curves",
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*line.split(), "--device", device])
        assert result.exit_code == 2, (line, result.output, result.exception)
        assert f"--device {device}: " in result.stderr.splitlines()[-1]
        assert "expected auto, cuda" in result.stderr or "use auto, cuda, mps or cpu" in result.stderr
    assert {one.name for one in tmp_path.iterdir()} == {"f.h5", "images", "kept.txt"}


# --- options that would do nothing -----------------------------------------------------------------------------------

IDLE = {
    "select f.h5 --keep 0.5 -o new.csv --format npy": "--format npy: -o new.csv says csv",
    "select f.h5 --keep 0.5 -o new.txt --format npy": "--format npy: -o new.txt says txt",
    "record f.h5 -o new.h5 --precision bf16": "--precision bf16: heads are recorded in fp32",
    "tune --features f.h5 --keep 0.5 -o new.tune --tolerance 0.5": "--tolerance 0.5: goes with --keep auto",
    "tune --features f.h5 --keep 0.5 -o new.tune --device cpu": "--device cpu: goes with --model",
    "compare a.csv b.csv --count 8": "--count 8: goes with --sheet",
    "compare a.csv b.csv --bootstrap 0 --seed 0": "--seed 0: is of the resamples of --bootstrap",
    "compare a.csv b.csv --by-place": "--by-place: all of these tables name their images",
    "compare a.csv b.csv --rows kept.txt": "--rows kept.txt: none of these tables needs names",
    "compare s.csv s2.csv --higher-is keep": "--higher-is keep: all of these tables say what is higher",
    "evaluate --features f.h5 --test t.h5 --dynamic random --keep 0.5 --selection-seconds 3":
        "--selection-seconds 3: is about lists, and there is none",
    "evaluate --features f.h5 --test t.h5 --dynamic random --keep 0.5 --no-class-counts":
        "--no-class-counts: is about lists, and there is none",
    "evaluate kept.txt --features f.h5 --images images --test t.h5": "--images images: heads train on --features",
    "scaling --features f.h5 --test t.h5 --size 12 --order random --k 3": "--k 3: --order random ranks nothing",
    "scaling --features f.h5 --test t.h5 --size 12 --order random --scores a.csv":
        "--scores a.csv: ranks, and --order random asks for no ranking",
    "record f.h5 -o new.h5 --test-labels lab.csv": "--test-labels lab.csv: is of the test images, and there are none",
    "import v.npy -o new.h5 --vector-column features": "--vector-column features: v.npy has one array without a name",
    "import v.npy -o new.h5 --path-column paths": "--path-column paths: v.npy has no names in columns",
    "import v.npz -o new.h5 --paths all.txt --path-column paths": "--path-column paths: --paths gives the names",
    "reshard kept.txt new.tars --root images --image-column x": "--image-column x: is for Parquet and Arrow files",
    "embed shard.tar -o new.h5 --encoder mini --image-column y": "--image-column y: is for Parquet and Arrow files",
    "embed shard.tar -o new.set --encoder mini --label-column x --class-level 1":
        "--label-column and --class-level: give the one",
    "embed shard.tar -o new.set --encoder mini --device cpu --devices cpu,cpu": "--device cpu: --devices says where",
    "report f.h5 -o new.html --no-thumbnails --root images": "--root images: says where the images of the thumbnails",
    "select f.h5 --keep 0.5 --scores a.csv --no-cache": "--scores ranks without clustering: no --no-cache with it",
    "select f.h5 --keep 0.5 --order cover --k 5": "--order cover ranks nothing: no --k with it",
    "select f.h5 --keep 0.5 --order facility --restarts 2": "--order facility takes no ranking into account",
    "select f.h5 --keep 0.5 --order cover --train-points 9": "--order cover ranks nothing: no --train-points with it",
    "select f.h5 --keep 0.5 --order random --restarts 3": "--order random takes no ranking into account: no --restarts",
    "select f.h5 --keep 0.5 --order random --stability": "--stability compares rankings by prototypes",
    "select f.h5 --keep 0.5 --absolute -o new.npy": "--absolute: a list in the format npy holds no paths",
    "sheet f.h5 -o new.png --max-rows 20": "--max-rows 20: goes with --by or --duplicates",
    "tune --features u.h5 --keep 0.5 -o new.tune --seeds 10": "--seeds 10: needs classes, and u.h5 has none",
    "tune --features u.h5 --keep 0.5 -o new.tune --scores a.csv": "--scores a.csv: needs classes, and u.h5 has none",
}  # fmt: skip


@pytest.fixture
def here(command_folder):
    arrays = np.load("v.npz")
    np.save("v.npy", arrays["features"])
    Path("all.txt").write_text("".join(f"{path}\n" for path in arrays["paths"].tolist()))
    for name in ("s.csv", "s2.csv"):
        write_scores(name, arrays["paths"].tolist(), arrays["features"][:, 0], metric="el2n")
    return command_folder


@pytest.mark.parametrize("line", IDLE)
def test_an_option_that_does_nothing_is_refused(here, line):
    """With its default too, since whoever types it expects something of it; and before anything is written."""
    result = CliRunner().invoke(app, line.split())
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert f"error: {IDLE[line]}" in result.stderr.splitlines()[-1]
    assert not list(here.glob("new.*"))


def test_what_was_typed_is_forgotten_when_the_command_ends(here):
    assert CliRunner().invoke(app, ["info", "f.h5", "--errors"]).exit_code == 0
    refuse_idle("does nothing", "errors")  # no command runs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: protoprune.select("f.h5", 0.5, scores="a.csv", cache=False), "no --no-cache with it"),
        (lambda: protoprune.select("f.h5", 0.5, order="cover", k=5), "--order cover ranks nothing: no --k with it"),
        (lambda: protoprune.select("f.h5", 0.5, order="random", restarts=2), "no --restarts with it"),
        (lambda: protoprune.select("f.h5", 0.5, order="cover", restarts=2, dedup=0.1), "no --restarts with it"),
        (lambda: stability(protoprune.select("f.h5", 0.5, order="random")), "--order random is none"),
        (lambda: import_features("v.npy", "new.h5", vector_column="x"), "--vector-column x: v.npy has one array"),
        (lambda: join({"a": read_table("a.csv"), "b": read_table("b.csv")}, by_place=True), "--by-place: all of these"),
    ],
)
def test_python_refuses_the_same(here, call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_restarts_and_clusters_where_they_do_something(here):
    """The neighbours of what is refused above."""
    for options in (
        {"order": "random", "restarts": 2, "drop_hardest": 0.2},
        {"order": "cover", "restarts": 2, "drop_hardest": 0.2},
        {"order": "cover", "k": 5, "by": "cluster"},
        {"order": "cover", "k": 5, "quota": "dbp"},
    ):
        assert protoprune.select("f.h5", 0.5, **options).keep.any()


def test_each_list_is_in_the_format_of_its_name(here):
    """--format is of the list; what is removed goes by its own suffix."""
    line = "select f.h5 --keep 0.5 --format npy --removed new.gone.csv --no-cache"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0
    assert result.stdout_bytes.startswith(b"\x93NUMPY")
    assert (here / "new.gone.csv").read_text().startswith("path,index,score\n")
    for name, format in (("new.kept.npy", "datacomp"), ("new.txt", "csv"), ("new.list", "jsonl")):
        result = CliRunner().invoke(app, ["select", "f.h5", "--keep", "0.5", "-o", name, "--format", format])
        assert result.exit_code == (2 if format == "datacomp" else 0)  # these images are not called by uids
        assert "says" not in result.stderr


@pytest.mark.parametrize("option", ["--label-column x", "--class-level 3"])
@pytest.mark.parametrize("out", ["new.set", "new.h5"])
def test_classes_that_no_shard_has_are_said(here, option, out):
    """Only what lies in the shards can tell: the first one is looked at before hours are spent on them."""
    result = CliRunner().invoke(app, f"embed shard.tar -o {out} --encoder mini {option}".split())
    assert result.exit_code == 0
    assert f"warning: {option}: gives no image of shard.tar a class" in result.stderr
    assert result.stderr.index("warning") < result.stderr.index("img/s")
    plain = CliRunner().invoke(app, f"embed shard.tar -o new.{out} --encoder mini".split())
    assert "warning" not in plain.stderr


BARE = "No such option: --features; the feature file is given without an option here"
NAMED = "Got unexpected extra argument(s) (f.h5); the feature file goes after --features"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("select --features f.h5 --keep 0.5", BARE),
        ("sheet --features f.h5", BARE),
        ("tune f.h5 --keep 0.5", NAMED),
        ("scaling f.h5 --test t.h5 --size 10", NAMED),
    ],
)
def test_a_feature_file_named_as_another_command_takes_it(run, words, said):
    assert run(*words.split(), code=2).stderr == f"error: {said}; see `protoprune {words.split()[0]} --help`\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("select --keep 70%", "--keep 70%: expected a number; for 70 % give 0.7; see `protoprune select --help`"),
        ("select --keep=x", "--keep x: expected a number; see `protoprune select --help`"),
        ("select --keep 0,3", "--keep 0,3: expected a number; for 0,3 give 0.3; see `protoprune select --help`"),
        ("tune --keep 30%", "--keep 30%: expected auto or the fraction to keep, such as 0.3; for 30 % give 0.3"),
        (
            "compare a b --keep 30%",
            "--keep 30%: not a number; for 30 % give 0.3; separate several by commas",
        ),
        (
            "select --drop 0.3",
            "No such option: --drop; --keep is the fraction that stays: --keep 0.7 leaves out 30 %; "
            "see `protoprune select --help`",
        ),
        (
            "report --prune-ratio=0.3",
            "No such option: --prune-ratio; --keep is the fraction that stays: --keep 0.7 leaves out 30 %; "
            "see `protoprune report --help`",
        ),
        (
            "select",
            "Missing option '--keep', the fraction to keep, such as --keep 0.7; see `protoprune select --help`",
        ),
        ("sheet --seed 1.5", "--seed 1.5: expected a whole number; see `protoprune sheet --help`"),
        ("sheet --count 0", "--count 0: expected at least 1; see `protoprune sheet --help`"),
        ("select --keep", "Option '--keep' requires an argument; see `protoprune select --help`"),
        ("theory error --theta 90", "--theta 90: expected at most 89; see `protoprune theory error --help`"),
        (
            "theory error --order x",
            "--order x: expected one of 'hard', 'easy', 'random'; see `protoprune theory error --help`",
        ),
    ],
)
def test_a_value_that_typer_refuses_is_named(run, words, said):
    assert run(*words.split(), code=2).stderr == f"error: {said}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["select", "f.h5", "--keep", "0.5", "-o", ""], "-o: "),
        (["select", "f.h5", "--keep="], "--keep: "),
        (["evaluate", "kept.txt", "--features", "f.h5", "--test", "t.h5", "--out="], "--out: "),
        (["embed", ""], ""),
        (["theory", "error", ""], ""),
    ],
)
def test_an_empty_argument_is_refused(words, named, tmp_path, monkeypatch):
    """As a path it would be the current folder: `-o "$OUT"` with OUT not set."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {named}an empty argument; is a variable of the shell not set?\n"
    assert not list(tmp_path.iterdir())
