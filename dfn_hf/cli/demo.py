"""`dfn-hf demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..training.settings import MAX_COUNT


def demo(
    output: Annotated[
        Path, typer.Argument(help="Folder for models and pictures; those of an earlier demo are replaced.")
    ] = Path("demo"),
    model: Annotated[Literal["dfn", "flownetwork"], typer.Option(help="Architecture to compare with Llama.")] = "dfn",
    max_steps: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Optimizer steps of each model.")] = 500,
) -> None:
    """Train a small model and a Llama of equal size on the same batches, compare them, generate and plot.

    Takes less than ten minutes on two cores. Example: `dfn-hf demo --max-steps 20`
    """
    from .demonstration import run_demo

    run_demo(output, model, steps=max_steps)
