"""Options that several benchmark commands share."""

from pathlib import Path
from typing import Annotated

import typer

Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        help="CSV of finished runs; it is created if missing. Default: a file named after the command in "
        "benchmarks/results if this folder exists, else in benchmarks-results.",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, 2, …")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Models = Annotated[list[str], typer.Option("--model", help="Name of a model, such as dfn or llama; repeatable.")]
LearningRates = Annotated[list[float], typer.Option("--learning-rate", help="Learning rate to try; repeatable.")]
MaxSteps = Annotated[int, typer.Option("--max-steps", min=1, help="Training steps.")]
SearchSteps = Annotated[int, typer.Option(min=1, help="Training steps of the short runs of the learning-rate search.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per training step.")]
EvaluationWindows = Annotated[int, typer.Option(min=1, help="Maximum number of held-out windows.")]

HiddenSize = Annotated[int, typer.Option(min=1)]
NumHiddenLayers = Annotated[int, typer.Option(min=1)]
NumAttentionHeads = Annotated[int, typer.Option(min=1)]
IntermediateSize = Annotated[
    int, typer.Option(min=1, help="Of the DFN; the other models match its number of parameters.")
]

Lengths = Annotated[list[int], typer.Option("--length", min=1, help="Tokens; repeatable.")]
Workloads = Annotated[list[str] | None, typer.Option("--workload", help="Workload; repeatable. Default: all.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls after a warm-up; the result is their median.")]
TimeLimit = Annotated[float, typer.Option(min=0, help="Seconds; runs with a longer expected call are skipped.")]
Plot = Annotated[Path | None, typer.Option(help="PNG file of the figure. Default: beside the CSV.")]


def results_path(results: Path | None, name: str) -> Path:
    """Return `results`, or the default CSV `name` in benchmarks/results or benchmarks-results."""
    if results is not None:
        return results
    folder = Path("benchmarks", "results")
    return (folder if folder.is_dir() else Path("benchmarks-results")) / name
