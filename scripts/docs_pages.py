"""A hook of mkdocs: pages made from what is there anyway, so that they cannot fall behind.

index.md is the README, contributing.md and changelog.md are the files beside it, commands.md has every command with its
options as `--help` has them, api.md every public name with its docstring.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    """Add the pages that are not in docs/."""
    pages = {page: links((ROOT / name).read_text()) for name, page in BESIDE.items()}
    pages |= {"commands.md": commands(), "api.md": api()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, **_):
    """Links to the files beside docs/ lead to their pages."""
    return links(markdown)


def links(text: str) -> str:
    """Links as they are between the pages of the site, from links as they are in the repository."""
    text = text.replace("](docs/", "](")
    for name, page in BESIDE.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}", f"]({page}", text)
    return re.sub(r"\]\((\.\./)?LICENSE\)", "](https://www.apache.org/licenses/LICENSE-2.0)", text)


def commands() -> str:
    """Every command's help, from the program."""
    os.environ["COLUMNS"] = "110"
    os.environ["NO_COLOR"] = "1"
    import typer
    from typer.main import get_command

    from protoprune.cli import app

    parts = ["# Commands\n\nWhat `protoprune COMMAND --help` prints.\n"]

    def add(command, name: str, parent) -> None:
        context = typer.Context(command, info_name=name, parent=parent, terminal_width=110, max_content_width=110)
        title = "protoprune" if parent is None else context.command_path
        parts.append(f"## {title}\n\n```text\n{command.get_help(context)}\n```\n")
        for child_name in getattr(command, "commands", {}):
            add(command.commands[child_name], child_name, context)

    add(get_command(app), "protoprune", None)
    return "\n".join(parts)


def api() -> str:
    """Every public name, rendered by mkdocstrings."""
    import protoprune

    lines = ["# Python\n", "What `import protoprune` offers; everything is imported on first use.\n"]
    lines += [f"::: protoprune.{home}.{name}\n" for name, home in protoprune._HOME.items()]
    lines += ["::: protoprune.samplers\n    options:\n      show_root_heading: true\n"]
    return "\n".join(lines)
