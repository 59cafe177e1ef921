"""What kinds of things arguments may be, as the annotations say it: asked where a public function is entered.

Whoever gives the wrong kind of thing (the name of a list for its paths, None for a file, an array for a choice) reads
what was expected, and not what Python stumbles over somewhere inside. Numbers are left to `bounds`, which knows their
range, and arrays to whoever looks at their shape. A library that checks annotations (beartype, typeguard) would need
all of them when the program runs, torch's among them, and knows neither numpy's numbers nor one short sentence.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from fractions import Fraction
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from protoprune.bounds import shown
from protoprune.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

_INNERMOST = re.compile(r"\[[^\[\]]*\]")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises UsageError for an argument that its annotation has no place for, and takes numbers of
    numpy as what they say (see `plain`)."""
    signature = inspect.signature(function)
    annotations = {name: str(one.annotation) for name, one in signature.parameters.items()}
    others = {name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD}

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:  # too many or too few: Python's own sentence says of which function
            return function(*args, **options)
        for name, value in bound.arguments.items():
            if name in others:
                bound.arguments[name] = {one: plain(other) for one, other in value.items()}
            else:
                check_kind(name, value, annotations[name], function.__globals__)
                bound.arguments[name] = plain(value)
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(one: Any, known: Mapping[str, Any]) -> None:
    """The same for the fields of a dataclass; `known` are the globals of its module."""
    for field in fields(one):
        value = getattr(one, field.name)
        check_kind(field.name, value, str(field.type), known)
        object.__setattr__(one, field.name, plain(value))  # it may be frozen


def plain(value: Any) -> Any:
    """A number of numpy as Python's, which libraries in C and JSON take too: the one that its digits say. The float32
    of 0.7 is a little less, and a share of millions of images would be another number of them. Fractions become floats.
    """
    if isinstance(value, Fraction):
        return float(value)
    if not isinstance(value, np.generic):
        return value
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def check_kind(name: str, value: Any, annotation: str, known: Mapping[str, Any]) -> None:
    """Raise UsageError unless `value` is one of what an annotation names: paths, texts, flags, functions, lists and
    dicts, and the classes that are `known`. One that names anything else is believed."""
    kinds = [_kind(part, known) for part in _parts(annotation)]
    nowhere = isinstance(value, str) and not value and "os.PathLike" in _parts(annotation)
    if not nowhere and any(kind is None or kind[0](value) for kind in kinds):
        return
    what = list(dict.fromkeys(kind[1] for kind in kinds if kind is not None and kind[1]))
    expected = " or ".join(one for one in what if one != "text" or "a path" not in what)
    raise UsageError(f"{name} {shown(value)}: expected {expected}")


def texts(name: str, values: Iterable[Any], what: str = "paths") -> list[str]:
    """Paths or other names, each as text: of a list, an array or a column of them, of text or of `Path`s, and of rows
    of one value, as databases give them.

    Raises UsageError for a single text, which would be taken letter by letter, and for what holds anything else.
    """
    values = one_column(values)
    if hasattr(values, "columns"):
        raise UsageError(f"{name} {shown(values)}: expected a list of {what}; give one of its columns")
    if hasattr(values, "readline"):  # whose lines end in line breaks
        raise UsageError(f"{name}: an open file, expected a list of {what}; protoprune.read_list takes its path, or -")
    if not _is_many(values) or isinstance(values, (os.PathLike, Mapping)) or getattr(values, "ndim", 1) != 1:
        raise UsageError(f"{name} {shown(values)}: expected a list of {what}")
    found = [one[0] if isinstance(one, tuple) and len(one) == 1 else one for one in values]
    found = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in found]
    odd = [one for one in found if not isinstance(one, str)]
    if odd:
        raise UsageError(f"{name}: holds {shown(odd[0])}, expected {what}")
    return found


def one_column(values: Any) -> Any:
    """An array of shape (n, 1), as tables of one column become, as (n,), and a column of pyarrow as a list; anything
    else as it is."""
    if hasattr(values, "to_pylist"):
        return values.to_pylist()
    single = getattr(values, "ndim", 0) == 2 and hasattr(values, "reshape") and values.shape[1] == 1
    return values.reshape(-1) if single else values


def as_numbers(name: str, values: Any, what: str = "numbers") -> np.ndarray:
    """An array of numbers, of what is an array or a list of them: tensors of any type, device and history too.

    Raises UsageError for what holds anything else."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values  # which numpy has not
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        found = np.asarray(None)
    if found.dtype.kind not in "fiub":
        raise UsageError(f"{name} {shown(values)}{f' of {found.dtype}' if found.ndim else ''}: expected {what}")
    return found


@cache
def _parts(annotation: str) -> list[str]:
    """What stands between the bars, without what is in brackets."""
    while (shorter := _INNERMOST.sub("", annotation)) != annotation:
        annotation = shorter
    return annotation.split(" | ")


_Kind = tuple[Callable[[Any], bool], str]  # whether a value is one, and what it is called


def _kind(part: str, known: Mapping[str, Any]) -> _Kind | None:
    """None for what is not known here: numbers, arrays, aliases, protocols."""
    if part in _KINDS:
        return _KINDS[part]
    one = known.get(part)
    if isinstance(one, type) and one is not Any and not getattr(one, "_is_protocol", False):
        return lambda value: isinstance(value, one), _MAKERS.get(part, f"a {part}")
    return None


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)


def _is_many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


_MAKERS = {
    "ImageList": "what list_folder(…) or list_paths(…) gives",
    "Examples": "what load_examples(…) gives",
    "Ranking": "what rank(…) gives",
    "Source": "what find_shards(…) gives",
}
_KINDS: dict[str, _Kind] = {
    "None": (lambda value: value is None, ""),
    "str": (lambda value: isinstance(value, str), "text"),
    "os.PathLike": (_is_path, "a path"),
    "bool": (_is_flag, "True or False"),
    "Callable": (callable, "a function"),
    "Sequence": (_is_many, "a list"),
    "Iterable": (_is_many, "a list"),
    "Mapping": (_is_dict, "a dict"),
    "dict": (_is_dict, "a dict"),
}
