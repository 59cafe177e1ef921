"""`python -m protoprune`: the `protoprune` program without its installed script."""

from protoprune.cli import main

main()
