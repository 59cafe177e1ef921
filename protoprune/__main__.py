"""`python -m protoprune`."""

from protoprune.cli import main

main()
