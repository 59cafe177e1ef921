"""What users see when something is wrong: one exception, and one warning for what does not stop the work."""

import inspect
import logging
import warnings


class ProtopruneError(Exception):
    """Something the user can act on: shown in one line that says what, where and what to do next, without a traceback.

    The command line exits with `exit_code`: 1 for what went wrong at run time, 2 for wrong usage.
    """

    exit_code = 1


class UsageError(ProtopruneError):
    """The request itself cannot be met (a bad value, options that do not fit together)."""

    exit_code = 2


class ProtopruneWarning(UserWarning):
    """Something to know about a result that is made all the same; the command line shows it as one line."""


def warn(message: str) -> None:
    """Warn whoever called into this package, at the line that did; every occurrence is shown by the command line."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "protoprune":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ProtopruneWarning, stacklevel=level + 1)


def ignore_pillow() -> None:
    """Drop the warnings of Pillow and its plugins: damaged files make it warn by the hundred, and each has a status and
    a reason of its own. For programs, not for libraries, and before there are threads."""
    warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif|pillow_jxl)\b")


def ignore_matplotlib() -> None:
    """Drop what matplotlib says of its cache of fonts where the home is not writable, as in containers."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
