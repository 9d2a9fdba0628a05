"""Output of the benchmark commands."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import typer


class Command(Protocol):
    """A command of typer or click, as far as it is called here."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True) -> Any: ...


def report_progress(line: str) -> None:
    """Print a line to stderr."""
    typer.echo(line, err=True)


def print_table(table: str, finished: Sequence[tuple[Any, Any]], path: Path) -> None:
    """Print a table, the machines of its results and the path of the CSV.

    Args:
        table: the Markdown table.
        finished: settings and results of the runs; each result has a `machine`.
        path: the CSV file.
    """
    typer.echo(f"\n{table}\n")
    for machine in sorted({result.machine for _, result in finished}):
        typer.echo(f"machine: {machine}")
    typer.echo(f"results: {path}")


def captured_output(group: Command, arguments: Sequence[str]) -> str:
    """Run a benchmark command in this process and return its standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        group.main(list(arguments), standalone_mode=False)
    return output.getvalue()
