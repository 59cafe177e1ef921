"""What several commands ask for in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protoprune.errors import UsageError


def several(given: str | Sequence[str] | None) -> list[str]:
    """The values of an option that is repeated or takes several at once: --keep 1,0.5 --keep 0.2."""
    given = [given] if isinstance(given, str) else given or []
    return [one.strip() for text in given for one in text.split(",") if one.strip()]


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
            raise UsageError(f"{option} {word}: not a number{_range(low, high, closed)}; separate several by commas")
        values.append(value)
    return values


def _range(low: float, high: float, closed: bool) -> str:
    least = "" if low == -math.inf else f" from {low:g}" if closed else f" above {low:g}"
    most = "" if high == math.inf else f" and at most {high:g}" if least else f" of at most {high:g}"
    return least + most
