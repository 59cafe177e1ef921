"""What numbers may be, asked where a function takes them, so that the command line and Python refuse the same.

The upper bounds are far beyond what anybody computes with and far below where a library takes another turn: an int that
does not fit, a float that becomes infinity, an array of terabytes.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from protoprune.errors import UsageError

MANY = 1_000_000_000  # epochs, iterations, images: nothing is done so often
SEEDS = 2_000_000_000  # the largest one: faiss and others take an int of 32 bits, and restarts count on from a seed


def check_whole(name: str, value: Any, low: int = 1, high: int = MANY, hint: str = "") -> None:
    """Raise UsageError unless `value`, of an option or argument of this name, is a whole number from low to high."""
    if not is_whole(value, low, high):
        shown = _shown(value)
        least = f"at least {low:,}" if is_whole(value) and value < low else f"a whole number from {low:,} to {high:,}"
        raise UsageError(f"{name} {shown}: expected {least}{hint}")


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a whole number, of Python or numpy, from low to high."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high


def check_number(name: str, value: Any, low: float, high: float, hint: str = "", *, above: bool = False) -> None:
    """The same for any number from low to high; `above` leaves out low itself."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and (low < value if above else low <= value) and value <= high):
        least = f"above {low:g}" if above else f"from {low:g}"
        raise UsageError(f"{name} {_shown(value)}: expected a number {least} to {high:g}{hint}")


def check_confidence(confidence: Any) -> None:
    """Raise UsageError for what no interval can have."""
    check_number("confidence", confidence, 0, 1 - 1e-9, ", such as 0.95", above=True)


def check_seed(seed: Any) -> None:
    """Raise UsageError for a seed that not every generator takes."""
    check_whole("--seed", seed, 0, SEEDS)


def _shown(value: Any) -> str:
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**40:
        return "with dozens of digits"  # str() refuses thousands of them
    text = f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, numbers.Real) else repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
