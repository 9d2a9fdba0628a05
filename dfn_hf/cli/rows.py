"""Aligned output of named values."""

import typer


def echo_rows(rows: dict[str, str]) -> None:
    """Print one line per entry: the name, padded to the longest, and the value."""
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")
