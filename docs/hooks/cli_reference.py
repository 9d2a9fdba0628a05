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
    return get_docs_for_click(obj=command, ctx=context, name="dfn-hf", title="Command line")
