"""The one exception that users see."""


class ProtopruneError(Exception):
    """Something the user can act on: shown in one line, without a traceback."""
