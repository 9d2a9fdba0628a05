"""Entry point of the `dfn-hf` command.

It lies outside the package, so that `dfn_hf` can tell the command line, which parses its arguments before it imports
torch, from a program that imports the package for its models.
"""


def main() -> None:
    from dfn_hf.cli import app

    app()
