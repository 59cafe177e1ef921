"""The one exception that users see."""


class ProtopruneError(Exception):
    """Something the user can act on: shown in one line that says what, where and what to do next, without a traceback.

    The command line exits with `exit_code`: 1 for what went wrong at run time, 2 for wrong usage.
    """

    exit_code = 1


class UsageError(ProtopruneError):
    """The request itself cannot be met (a bad value, options that do not fit together)."""

    exit_code = 2
