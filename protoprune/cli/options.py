"""What several commands ask for in the same words: single options, groups of options, and several numbers in one.

A group is a dataclass whose fields are options. A command takes it as one parameter, `spread` lays its fields out on
the command line, and its methods make of it what the functions behind the command take.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from protoprune.errors import UsageError

if TYPE_CHECKING:
    from protoprune.pruning import Clusters, Rule
    from protoprune.sources import ShardOptions
    from protoprune.training.loop import Recipe

Features = Annotated[Path, typer.Argument(help="Feature file or set that `protoprune embed` made.")]
Scores = Annotated[
    Path | None,
    typer.Option(help="Rank by this score table (path, score; larger = harder); FILE:COLUMN is one of several."),
]
HigherIs = Annotated[
    str | None,
    typer.Option(help="What a higher score means in a table that does not say: keep, prune, harder, easier."),
]
Root = Annotated[Path | None, typer.Option(help="Where the images are now [default: where they were].")]
Model = Annotated[
    str | None,
    typer.Option(help="head, cnn, resnet18 or timm:NAME [default: head on a feature file, cnn on a folder]."),
]
Hidden = Annotated[
    int | None,
    typer.Option(help="Units of a head's hidden layer: a small network, trained for --epochs [default: 0, linear]."),
]
TestSet = Annotated[Path, typer.Option(help="Test set: a folder of images, or a feature file for --model head.")]
TrainingImages = Annotated[
    Path | None, typer.Option(help="Training images: a folder with a folder a class (or a feature file, for heads).")
]
MinSteps = Annotated[
    int | None, typer.Option(min=1, help="Of networks: optimizer steps that every run takes at least [default: 500].")
]
Results = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Folder for tables, JSON, figure and the results of single runs; a second call resumes."
    ),
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the class, where a --labels file has several.")]
ClassNames = Annotated[Path | None, typer.Option(help="File that turns the class numbers of --labels into names.")]
ClassLevel = Annotated[int | None, typer.Option(min=1, help="Classes are the folders of this level (2: train/CLASS).")]

BUDGET = (
    "Of networks (a linear head is trained to convergence). epochs: every run passes over its own images as often, so "
    "that fewer images mean fewer optimizer steps and less time (what you gain in practice). steps: every run takes as "
    "many optimizer steps as {}, so that only the choice of images differs, and not the length of training. "
    "[default: {}]"
)


# --- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterOptions:
    """How the features are clustered; `seed` is that of ties too."""

    k: Annotated[
        str, typer.Option(help="Number of clusters, or auto: the number of classes, else about sqrt(images).")
    ] = "auto"
    euclidean: Annotated[bool, typer.Option("--euclidean", help="Euclidean k-means instead of spherical.")] = False
    iterations: Annotated[int, typer.Option(help="k-means iterations.")] = 25
    seed: Annotated[int, typer.Option(min=0, max=2_000_000_000, help="Seed of the clustering and of ties.")] = 0
    restarts: Annotated[int, typer.Option(help="Cluster from this many seeds and rank by the mean distance.")] = 1
    train_points: Annotated[
        int | None, typer.Option(help="Points k-means trains on [default: all, up to 4 GB of them].")
    ] = None
    backend: Annotated[str, typer.Option(help="auto, faiss or torch.")] = "auto"
    cache: Annotated[bool, typer.Option(help="Keep clusterings beside the feature file.")] = True

    def clusters(self) -> Clusters:
        from protoprune.pruning import Clusters

        return Clusters(**{**vars(self), "k": number_of_clusters(self.k)})


@dataclass(frozen=True)
class RuleOptions:
    """What to keep of a ranking, and which near-duplicates leave before."""

    order: Annotated[
        str,
        typer.Option(
            help="Which to keep first: hard, easy, middle, random; stratified: evenly over the scores; cover: those "
            "that stand for all of their class or cluster (kernel herding); facility: the same by facility location."
        ),
    ] = "hard"
    drop_hardest: Annotated[
        float, typer.Option(help="Fraction of the hardest (mislabelled?) images to keep only when all others are.")
    ] = 0.0
    quota: Annotated[
        str | None, typer.Option(help="dbp: each cluster gets a quota by its complexity, filled by --order.")
    ] = None
    balance: Annotated[float, typer.Option(help="Share of the list that is split evenly over groups (paper: 0.5).")] = (
        0.0
    )
    by: Annotated[
        str | None,
        typer.Option(help="Groups to balance or to cover: class or cluster [default: class, where there are classes]."),
    ] = None
    calibrate: Annotated[
        float | None,
        typer.Option(help="Share of the list that goes by --order; the rest is random, with weights."),
    ] = None
    dedup: Annotated[
        float | None, typer.Option(help="First remove near-duplicates: cosine to a kept one above 1 - this.")
    ] = None
    dedup_prefer: Annotated[
        str | None, typer.Option(help="Which of two duplicates stays: harder (default) or central.")
    ] = None

    def rule(self, keep: float, seed: int) -> Rule:
        from protoprune.pruning import Rule

        return Rule(
            keep, self.order, self.drop_hardest, self.quota, self.balance, self.by, self.calibrate, seed
        )  # fmt: skip


@dataclass(frozen=True)
class TableOptions:
    """How a score table is read that does not say all of it."""

    higher_is: HigherIs = None
    rows: Annotated[
        Path | None, typer.Option(help="Names of the images in the order of a score table that has none, a line each.")
    ] = None
    by_place: Annotated[
        bool, typer.Option("--by-place", help="A score table without names is in the order of the sorted paths.")
    ] = False


@dataclass(frozen=True)
class LabelOptions:
    """Where the classes of training and test images come from."""

    labels: Annotated[Path | None, typer.Option(help="File of the images' classes: a table of path and class.")] = None
    test_labels: Annotated[Path | None, typer.Option(help="The same for the test images.")] = None
    label_column: LabelColumn = None
    class_names: ClassNames = None
    class_level: ClassLevel = None

    @property
    def files(self) -> list[Path | None]:
        return [self.labels, self.test_labels, self.class_names]

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of `load_examples` for the training and the test images."""
        from protoprune.images.labels import label_file

        files = (self.labels, self.test_labels)
        if files == (None, None):
            check_label_file(None, self.label_column, self.class_names)
        train, test = (label_file(path, self.label_column, self.class_names, self.class_level) for path in files)
        level = {"class_level": self.class_level}
        return {"labels": train, **level}, {"labels": test, **level}


@dataclass(frozen=True)
class ClassOptions:
    """Where the classes of images or vectors come from."""

    labels: Annotated[
        Path | None,
        typer.Option(help="File of classes: a table of path and class [default: classes are the first-level folders]."),
    ] = None
    label_column: LabelColumn = None
    class_names: ClassNames = None
    class_level: ClassLevel = None
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Take no classes.")] = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of `list_folder` and its like."""
        from protoprune.images.labels import label_file

        check_label_file(self.labels, self.label_column, self.class_names)
        if self.no_labels and (self.labels is not None or self.class_level is not None):
            raise UsageError(
                f"--no-labels does not go with {'--labels' if self.labels is not None else '--class-level'}"
            )
        labels = not self.no_labels and label_file(self.labels, self.label_column, self.class_names, self.class_level)
        return {"labels": labels, "class_level": self.class_level}

    def of_shards(self, image_column: str | None, id_column: str | None) -> ShardOptions:
        """The same of shards, and the columns of their images and ids."""
        from protoprune.sources import ShardOptions

        if self.labels is not None or self.class_names is not None:
            option = "--labels" if self.labels is not None else "--class-names"
            raise UsageError(
                f"{option} FILE goes with images; shards have their classes in .cls, .json, a column or folders"
            )
        return ShardOptions(image_column, self.label_column, id_column, not self.no_labels, self.class_level)


@dataclass(frozen=True)
class TrainingOptions:
    """How models are trained, whatever they are trained for; what is None is chosen by the model."""

    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training set [default: 20 for head and resnet18, else 10].")
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Examples a step [default: 256 for head, else 128].")] = None
    lr: Annotated[float | None, typer.Option(help="Highest learning rate [default: by model].")] = None
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay [default: by model].")] = None
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or steps (Data Diet) [default: linear].")] = None
    augment: Annotated[
        str | None, typer.Option(help="none, crop-flip or resized-crop [default: crop-flip for images].")
    ] = None
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Side in pixels that images are resized to [default: 32].")
    ] = None
    width: Annotated[int | None, typer.Option(help="Channels of the first layer of cnn [default: 32].")] = None
    weights: Annotated[Path | None, typer.Option(help="File of weights to start from: fine-tuning.")] = None
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.")] = "auto"
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network: pays on a GPU.")] = False
    pixels: Annotated[Path | None, typer.Option(help="File for decoded pixels, for a data set larger than memory.")] = (
        None
    )

    def recipe(self, model: str, hidden: int | None = None) -> Recipe:
        from protoprune.training.loop import Recipe

        if self.weights is not None and not self.weights.is_file():
            raise UsageError(f"--weights {self.weights}: no such file")
        self._refuse_idle(model, hidden)
        given = {name: value for name, value in vars(self).items() if name not in ("device", "pixels")}
        given |= {"weights": self.weights and os.fspath(self.weights), "compile": self.compile or None}
        return Recipe.for_model(model, hidden=hidden, **given)

    @property
    def caches(self) -> list[str]:
        """The files of --pixels."""
        return [] if self.pixels is None else [f"{self.pixels}.{part}" for part in ("training", "test")]

    def given(self) -> dict[str, Any]:
        """The options that were given, as far as that can be told from their values."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)
                if getattr(self, one.name) != one.default}  # fmt: skip

    def _refuse_idle(self, model: str, hidden: int | None) -> None:
        """UsageError for an option that changes nothing about this model."""
        given = self.given() | ({} if hidden is None else {"hidden": hidden})
        for names, models, whose in (
            (("width",), ("cnn",), "the network cnn"), (("hidden",), ("head",), "heads"),
            (("augment", "image_size", "weights", "compile", "pixels"), None, "networks, which train on images"),
        ):  # fmt: skip
            idle = model == "head" if models is None else model not in models
            for name in names:
                if idle and name in given:
                    option = f"--{name.replace('_', '-')}" + ("" if given[name] is True else f" {given[name]}")
                    raise UsageError(f"{option}: is for {whose}, and does nothing with --model {model}; leave it out")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer is to see it: with the fields of its groups as options of their own, where the group was."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }

    @functools.wraps(command)
    def called(context: typer.Context, **given: Any) -> None:
        sources = {name: context.get_parameter_source(name) for name in given}
        typed = {name: given[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        before = _typed.set(typed)
        try:
            command(**given)
        finally:
            _typed.reset(before)

    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, one in inspect.signature(command).parameters.items():
        own = inspect.signature(groups[name]).parameters.values() if name in groups else [one]
        named = get_type_hints(groups[name], include_extras=True) if name in groups else hints
        parameters += [each.replace(annotation=named[each.name], kind=each.KEYWORD_ONLY) for each in own]
    for one in parameters:
        for told in getattr(one.annotation, "__metadata__", ()):
            if isinstance(told, typer.models.ArgumentInfo):  # in capitals, as everywhere but in Typer's newer versions
                told.metavar = told.metavar or one.name.strip("_").upper()
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


_typed: ContextVar[dict[str, Any]] = ContextVar("typed")  # what stands on the command line, while its command runs


def refuse_idle(why: str, *names: str) -> None:
    """UsageError for the first of these options that stands on the command line, where it would do nothing.

    For what only the command line knows of: whether an option was typed, be it with its default. What Python users can
    give too is refused where it is used, for both.
    """
    typed = _typed.get({})
    for name in names:
        if name in typed:
            raise UsageError(f"{_words(name, typed[name])}: {why}")


def _words(name: str, value: Any) -> str:
    """An option and its value, as one would type them."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    value = f"{value:g}" if isinstance(value, float) else value
    return f"--{option} {shlex.quote(','.join(map(str, value)) if isinstance(value, list) else str(value))}"


def given_words(*groups: Any) -> str:
    """The options of these groups that are not at their defaults, as one would type them."""
    words = []
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default:
                words.append(_words(field.name, value))
    return " ".join(words)


# --- values ----------------------------------------------------------------------------------------------------------


def several(given: str | Sequence[str] | None) -> list[str]:
    """The values of an option that is repeated or takes several at once: --keep 1,0.5 --keep 0.2."""
    given = [given] if isinstance(given, str) else given or []
    return [one.strip() for text in given for one in text.split(",") if one.strip()]


def meant(value: str) -> str:
    """What to type in the place of a share that is no number: '; for 70 % give 0.7', '; for 0,7 give 0.7'; else ''."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
        return f"; for {share[1]} % give {float(share[1]) / 100:g}"
    comma = re.fullmatch(r"(\d*),(\d+)", value)
    return f"; for {value} give {float(f'{comma[1]}.{comma[2]}'):g}" if comma else ""


def numbers(
    given: str | Sequence[str] | None,
    option: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    closed: bool = False,
    example: str = "1,0.5",
) -> list[float]:
    """`several` numbers above `low` (or from it, if closed) up to `high`; UsageError names the one that is not.

    Without any value given (None) there are none; values that hold no number are an error, with `example` in it.
    """
    words, values = several(given), []
    if given is not None and not words:
        raise UsageError(f"{option}: empty; expected one or more numbers, such as {option} {example}")
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not ((low <= value if closed else low < value) and value <= high and value != math.inf):
            raise UsageError(
                f"{option} {word}: not a number{_range(low, high, closed)}{meant(word)}; separate several by commas"
            )
        values.append(value)
    return values


def whole_numbers(given: str | Sequence[str] | None, option: str, *, example: str) -> list[int]:
    """`several` whole numbers from 1; UsageError names the one that is not."""
    words = several(given)
    if given is not None and not words:
        raise UsageError(f"{option}: empty; expected one or more whole numbers, such as {option} {example}")
    for word in words:
        if not word.isdecimal() or not int(word):
            raise UsageError(f"{option} {word}: expected whole numbers from 1, several separated by commas")
    return [int(word) for word in words]


def _range(low: float, high: float, closed: bool) -> str:
    least = "" if low == -math.inf else f" from {low:g}" if closed else f" above {low:g}"
    most = "" if high == math.inf else f" and at most {high:g}" if least else f" of at most {high:g}"
    return least + most


def number_of_clusters(text: str) -> int | None:
    """'auto' -> None, a number -> itself."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--k {text}: expected auto or a whole number") from None


def table_file(source: Path | None) -> Path | None:
    """The file of a score table that is given as FILE[:COLUMN][:DIRECTION]."""
    from protoprune.scores import split_source

    return None if source is None else Path(split_source(source)[0])


def check_label_file(labels: Path | None, column: str | None, names: Path | None) -> None:
    """UsageError for options of a file of classes without the file."""
    if labels is None and (column or names):
        raise UsageError(f"{'--label-column' if column else '--class-names'} goes with --labels FILE")
