"""The `protoprune` program, and `python -m protoprune`."""

import sys


def main() -> None:
    """Run it. Ctrl-C ends it in a word, also in the third of a second that its commands take to be imported."""
    try:
        from protoprune.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
