"""The command line: parse, call, print. The only package that prints, and a thin skin over what Python users import.

stdout carries a command's answer and nothing else; progress, summaries and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from protoprune import __version__
from protoprune.cli import streams
from protoprune.cli.compare import compare
from protoprune.cli.embed import embed, encoders
from protoprune.cli.evaluate import evaluate
from protoprune.cli.imports import import_
from protoprune.cli.options import meant, spread
from protoprune.cli.progress import say
from protoprune.cli.record import record
from protoprune.cli.report import report
from protoprune.cli.reshard import reshard
from protoprune.cli.scaling import scaling
from protoprune.cli.score import metrics, score
from protoprune.cli.select import select
from protoprune.cli.shards import merge
from protoprune.cli.show import info, sheet
from protoprune.cli.theory import advise, theory_app
from protoprune.cli.tune import tune
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError, ignore_matplotlib, ignore_pillow
from protoprune.text import shortened

_Misspelt: type[Exception] = typer.BadParameter.__bases__[
    0
]  # Typer's own usage errors; it brings its click along, without a name
_UNEXPECTED = re.compile(r"(?<=^Got unexpected extra argument\(s\) \()(.*)(?=\)$)", re.DOTALL)
# As pydantic says it, without the value: 'Invalid value for '--keep': Input should be a valid number, unable to …'
_WRONG = re.compile(r"^Invalid value for .*'(--[\w-]+)'.*: (?:Input should be|Value error, .* is not) (.*)$", re.DOTALL)
_PLAINER = {
    ", unable to parse.*": "",
    "a valid ": "a ",
    "a integer": "a whole number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
_LEAVES_OUT = re.compile(
    r"^No such option: (--(?:drop|prune|remove|discard|delete|ratio|fraction|rate|percent)[\w-]*).*$", re.DOTALL
)
_WORDS = "protoprune.words"  # of the command line, in the context of what reads them
_LONG_WORD = re.compile(r"\S{600,}")
_ENCODERS = ("torch", "torchvision", "timm", "safetensors")  # of the extras cpu and gpu; `select` comes without
_NO_MEMORY = re.compile("can't allocate memory|out of memory|not enough memory", re.IGNORECASE)  # as torch says it


class _Group(TyperGroup):
    """Shows what the user can act on in one line, with the exit code that it carries."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_empty(args)
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line(ctx), warnings.catch_warnings():
            warnings.simplefilter("always", ProtopruneWarning)
            ignore_pillow()
            ignore_matplotlib()
            warnings.showwarning = _show_warning(warnings.showwarning)
            answer = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it can be said that it fails
            return answer


def _refuse_empty(words: list[str]) -> None:
    """UsageError for a word without a letter, which as a path would be the current folder."""
    for before, word in zip(["", *words], words, strict=False):
        option = word[:-1] if re.fullmatch(r"--[\w-]+=", word) else before if before.startswith("-") else ""
        if not word or word == f"{option}=":
            where = f"{option}: " if option else ""
            raise UsageError(f"{where}an empty argument; is a variable of the shell not set?")


@contextlib.contextmanager
def _in_one_line(context: Any = None) -> Iterator[None]:
    """What the user can act on ends the command in one line, with the exit code that it carries."""
    try:
        yield
    except ProtopruneError as error:
        _complain(str(error))
        raise typer.Exit(error.exit_code) from None
    except _Misspelt as error:
        _explain(error, context)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _ENCODERS:
            raise
        _complain(f"this needs {name}, which is not installed; run: pip install 'protoprune[cpu]' (or [gpu])")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError as error:  # `| head`
        streams.stdout_failed(error)
        raise typer.Exit(0) from None
    except OSError as error:
        _complain(_of_a_file(error))
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        said = " ".join(str(error).split())[:200]
        _complain(f"not enough memory{f' ({said})' if said else ''}; ask for less at once, or use a larger machine")
        raise typer.Exit(1) from None


def _of_a_file(error: OSError) -> str:
    """What went wrong with which file, or with stdout."""
    if streams.stdout_failed(error):
        return f"standard output: cannot write ({error.strerror}); the answer is cut short"
    where = f"{error.filename}: " if error.filename is not None else ""
    said = f"{error.strerror or error or type(error).__name__}"
    hint = "; make room, or name a folder in $TMPDIR" if said.startswith("No usable temporary directory") else ""
    return f"{where}{said}{hint}"


def _explain(error: Any, context: Any) -> None:
    """Say in one line what is wrong with the words of the command line, and exit with 2."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error  # the help itself
    said = _UNEXPECTED.sub(_first_of_many, error.format_message().rstrip("."))
    if wrong := _WRONG.match(said):
        said = _of_a_value(wrong[1], wrong[2], [] if error.ctx is None else error.ctx.meta.get(_WORDS, []))
    if error.ctx is not None and any(one.name == "keep" for one in error.ctx.command.params):
        said = _LEAVES_OUT.sub(
            r"No such option: \1; --keep is the fraction that stays: --keep 0.7 leaves out 30 %", said
        )
    said = said.replace("Missing option '--keep'", "Missing option '--keep', the fraction to keep, such as --keep 0.7")
    _complain(f"{said}{_where_features_go(error.ctx, said)}; see `{_command(error.ctx, context)} --help`")
    raise typer.Exit(error.exit_code) from None


def _of_a_value(option: str, expected: str, words: list[str]) -> str:
    """'--keep 70%: expected a number; for 70 % give 0.7': what was typed, and what should have been."""
    value = next((word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")), "")
    if option in words[:-1]:
        value = words[words.index(option) + 1]
    for their, ours in _PLAINER.items():
        expected = re.sub(their, ours, expected)
    return f"{option} {value}".rstrip() + f": expected {expected}{meant(value) if expected == 'a number' else ''}"


def _first_of_many(words: re.Match[str]) -> str:
    """The first of the words that a pattern became in the shell, and how many follow."""
    first, *others = words[0].split(" ")
    return f"{first} and {len(others):,} more" if len(others) > 3 else words[0]


def _where_features_go(context: Any, said: str) -> str:
    """For who named the feature file in the way of another command: lists are the arguments of some, it of others; and
    for whom the shell made several names of a pattern."""
    if context is not None and context.command.name == "embed" and said.startswith("Got unexpected extra argument"):
        return "; images are a folder, several shards a pattern in quotes ('shards/*.tar'), both also a list in a file"
    places = {} if context is None else {one.name: one.param_type_name for one in context.command.params}
    if places.get("features") == "option" and said.startswith("Got unexpected extra argument"):
        return "; the feature file goes after --features"
    if places.get("features") == "argument" and said.startswith("No such option: --features"):
        return "; the feature file is given without an option here"
    return ""


def _command(context: Any, group: Any) -> str:
    """The command that was misspelt, as a user calls it; by its group where its own words could not be read."""
    names = [group.invoked_subcommand] if context is None and group is not None else []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return " ".join(["protoprune", *filter(None, names)])


def _complain(text: str) -> None:
    """One line, whatever was typed, or read from a file, and of whatever length it is."""
    say(f"error: {_LONG_WORD.sub(lambda word: shortened(word[0]), text)}")


def _show_warning(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings as one line on stderr, those of others as Python shows them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ProtopruneWarning):
            say(f"warning: {message}")
        else:
            otherwise(message, category, filename, lineno, file, line)

    return show


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tells you which training images you can leave out.\n\n"
    "protoprune embed ./images, then: protoprune select --keep 0.7 > kept.txt",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"protoprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


for command in (
    embed, select, record, metrics, score, compare, evaluate, scaling, tune, info, sheet, report, encoders, merge,
    reshard, advise,
):  # fmt: skip
    app.command()(spread(command))
app.command("import")(spread(import_))
app.add_typer(theory_app, name="theory")


def _pass_on(lost: Any) -> None:
    """Ctrl-C at a moment when Python cannot raise it, in a callback of its own (HDF5's objects have many): it was
    printed, and the command went on. It is raised a moment later."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def main() -> None:
    """The `protoprune` program."""
    streams.open_closed()
    before, sys.unraisablehook = sys.unraisablehook, _pass_on
    try:
        app()
    except KeyboardInterrupt:  # while it is still put together
        sys.exit(130)
    finally:
        sys.unraisablehook = before
