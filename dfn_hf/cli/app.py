"""The `dfn-hf` command: its sub-commands, its error messages and its global options.

The modules of the commands import the standard library and typer only. A command imports torch after it has checked
its arguments, so help and mistakes are quick.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..messages import message_of
from . import hub, text, train
from .convert import convert
from .demo import demo
from .distill import distill
from .errors import is_user_error
from .plot import plot
from .quiet import silence_libraries

MODELS, USE, SHARE, MEASURE = "Make models", "Use models", "Share models", "Measure"
# Groups whose modules are imported when they are used; the help shows their one-line description only.
LAZY_GROUPS = {"bench": "dfn_hf.benchmarks.cli.app"}


class MainGroup(TyperGroup):
    """Prints errors that the user can correct on one line and exits with code 1; imports lazy groups on use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "train")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name in LAZY_GROUPS:
            group: Any = typer.main.get_command(import_module(LAZY_GROUPS[name]).app)
            group.name = name
            self.commands[name] = group
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("traceback") or not is_user_error(error):
                raise
            typer.echo(f"Error: {message_of(error)}", err=True)
            raise typer.Exit(1) from None


def print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"dfn-hf {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=MainGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train, convert, run, evaluate and share DFN, FlowNetwork and Liquid models. Only Hub ids need a network.",
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print the traceback of an error.")] = False,
) -> None:
    silence_libraries()


app.add_typer(
    train.app,
    name="train",
    help="Train a model: a language model, an encoder-decoder, a model of fields or an embedding model.",
    rich_help_panel=MODELS,
)
app.command(rich_help_panel=MODELS)(convert)
app.command(rich_help_panel=MODELS)(distill)
app.command(rich_help_panel=USE)(text.generate)
app.command(rich_help_panel=USE)(text.evaluate)
app.command(rich_help_panel=USE)(text.translate)
app.command(rich_help_panel=USE)(plot)
app.command(rich_help_panel=USE)(hub.info)
app.command(rich_help_panel=SHARE)(hub.push)
app.command(rich_help_panel=SHARE, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    hub.serve
)
app.command(rich_help_panel=MEASURE)(demo)
bench = typer.Typer(no_args_is_help=True)
bench.callback()(lambda: None)
app.add_typer(
    bench,
    name="bench",
    help="Run the benchmarks. Finished runs are stored in a CSV file and are not repeated.",
    rich_help_panel=MEASURE,
)
