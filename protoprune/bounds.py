"""What numbers may be, asked where a function takes them, so that the command line and Python refuse the same.

The upper bounds are far beyond what anybody computes with and far below where a library takes another turn: an int that
does not fit, a float that becomes infinity, an array of terabytes.
"""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

from protoprune.errors import UsageError

MANY = 1_000_000_000  # epochs, iterations, images: nothing is done so often
SEEDS = 2_000_000_000  # the largest one: faiss and others take an int of 32 bits, and restarts count on from a seed


def check_whole(name: str, value: Any, low: int = 1, high: int = MANY, hint: str = "") -> int:
    """The value of an option or argument of this name, an int. Raises UsageError unless it is a whole number
    from low to high."""
    if not is_whole(value, low, high):
        least = f"at least {low:,}" if is_whole(value) and value < low else f"a whole number from {low:,} to {high:,}"
        raise UsageError(f"{name} {shown(value)}: expected {least}{hint}")
    return int(value)


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a whole number, of Python or numpy, from low to high."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def check_number(name: str, value: Any, low: float, high: float, hint: str = "", *, above: bool = False) -> float:
    """The same for any number from low to high, as a float; `above` leaves out low itself."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and (low < value if above else low <= value) and value <= high):
        least = f"above {low:g}" if above else f"from {low:g}"
        raise UsageError(f"{name} {shown(value)}: expected a number {least} to {high:g}{hint}")
    return float(value)


def check_confidence(confidence: Any) -> None:
    """Raise UsageError for what no interval can have."""
    check_number("confidence", confidence, 0, 1 - 1e-9, ", such as 0.95", above=True)


def check_seed(seed: Any) -> int:
    """The seed as an int of Python; UsageError for one that not every generator takes."""
    return check_whole("--seed", seed, 0, SEEDS)


def shown(value: Any) -> str:
    """A value for a message: short, and of what says nothing about itself the type."""
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**40:
        return "with dozens of digits"  # str() refuses thousands of them
    if isinstance(value, float):
        return f"{value:g}"
    if not (value is None or isinstance(value, (numbers.Number, str, bytes, os.PathLike, list, tuple, dict, set))):
        return f"of type {type(value).__name__}"
    text = str(value) if isinstance(value, (numbers.Number, os.PathLike)) else repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
