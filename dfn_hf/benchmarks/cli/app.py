"""`dfn-hf bench`: benchmarks whose runs are stored in CSV files, from which their tables are printed."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import field_quality, language_models, model_quality, peer_speed, recall, speed

COMMANDS: dict[str, Callable[..., None]] = {
    "recall": recall.associative_recall,
    "retrieval": recall.retrieval,
    "memory": recall.memory,
    "lm": language_models.lm,
    "long-lm": language_models.long_lm,
    "byte-chunking": language_models.byte_chunking,
    "fields": field_quality.fields,
    "contrastive": field_quality.contrastive,
    "ablations": model_quality.ablations,
    "neighbor-ranking": model_quality.neighbor_ranking,
    "search-settings": model_quality.search_settings,
    "isolation": model_quality.isolation,
    "translation": model_quality.translation,
    "reversal": model_quality.reversal,
    "quantization": model_quality.quantization,
    "scaling": speed.scaling,
    "paper-lengths": speed.paper_lengths,
    "million-tokens": speed.million_tokens,
    "field-speed": speed.field_speed,
    "speed": speed.throughput,
    "seq2seq-speed": speed.seq2seq_speed,
    "peers": peer_speed.peers,
    "single-head": peer_speed.single_head,
    "search": speed.search,
}

app = typer.Typer(
    no_args_is_help=True,
    invoke_without_command=True,
    help="Run benchmarks. Each finished run is appended to a CSV file and is not repeated.",
)


@app.callback()
def options(
    context: typer.Context,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run all benchmarks with minimal sizes; exit code 1 if a row is missing.")
    ] = False,
) -> None:
    if not smoke:
        return
    from .smoke import run_smoke

    missing = run_smoke(context.command, report=typer.echo)
    for line in missing:
        typer.echo(line, err=True)
    raise typer.Exit(1 if missing else 0)


for name, function in COMMANDS.items():
    app.command(name)(function)


@app.command()
def docs(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Folder of the Markdown pages.")] = Path("docs", "benchmarks"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a table differs from its command's output.")
    ] = False,
) -> None:
    """Replace every table in docs/benchmarks by the output of the command above it.

    Runs that are missing in a CSV file are measured first. Example: dfn-hf bench docs --check
    """
    from .docs_tables import update_tables

    assert context.parent is not None  # the bench group
    changed = update_tables(folder, context.parent.command, write=not check)
    for path in changed:
        typer.echo(f"{path}: {'outdated' if check else 'updated'}")
    raise typer.Exit(1 if check and changed else 0)
