"""The `protoprune` program, and `python -m protoprune`."""

import sys


def main() -> None:
    """Run it. Ctrl-C ends it in a word, also in the third of a second that its commands take to be imported."""
    try:
        from protoprune.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # without what prints elsewhere, which may be what was imported
        sys.exit(130)


if __name__ == "__main__":
    main()
