"""Generates `reference/cli.md` from the commands themselves."""

import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]


def on_files(files, config):
    """Add the generated page to the files of the site."""
    files.append(File.generated(config, "reference/cli.md", content=cli_reference()))
    return files


def cli_reference() -> str:
    """Return the Markdown that `typer utils docs` would print for `dfn-hf`."""
    sys.path.insert(0, str(ROOT))
    import typer
    from typer.cli import get_docs_for_click

    import dfn_hf_cli  # noqa: F401 - while it is loaded, dfn_hf does not import torch
    from dfn_hf.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("dfn-hf", [], resilient_parsing=True)
    for name in command.list_commands(context):
        command.resolve_command(context, [name])  # imports the groups that the command line imports on use
    show_whole_sentences(command)
    return get_docs_for_click(obj=command, ctx=context, name="dfn-hf", title="Command line")


def show_whole_sentences(command) -> None:
    """Set the short help of every command, which typer would cut after 45 characters, to its first sentence."""
    for child in getattr(command, "commands", {}).values():
        paragraph = " ".join((child.help or "").split("\n\n")[0].split())
        child.short_help = paragraph.split(". ")[0].removesuffix(".") + "."
        show_whole_sentences(child)
