"""The one exception of this package that users are meant to see."""


class ProtopruneError(Exception):
    """Something the user can understand and act on: shown in one line, without a traceback."""
