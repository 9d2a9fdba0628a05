"""`dfn-hf convert`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import refuse
from .options import Output, parse_assignments


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Checkpoint file of an original; with --from llama a folder or a Hub id."),
    ],
    output: Output,
    start: Annotated[
        Literal["llama"] | None, typer.Option("--from", help="llama: convert a Llama, Mistral or Qwen3 to a DFN.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Write a model that computes the original function, not a causal one.")
    ] = False,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    window_size: Annotated[int | None, typer.Option(help="Window of local attention.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token.")] = None,
    dynamic_k: Annotated[
        bool | None, typer.Option("--dynamic-k/--fixed-k", help="Whether the gate's entropy adds experts.")
    ] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="Compression ratio of the encoder spectrum.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout rate in training.")] = None,
    config_override: Annotated[
        list[str] | None,
        typer.Option(
            "--config-override",
            help="Another argument of the original constructor, NAME=VALUE, such as k=8. With --from llama a field of "
            "the DFN: position_dim, num_neighbors, local_window. Repeatable.",
        ),
    ] = None,
) -> None:
    """Convert an original checkpoint, or a Llama, to a transformers folder.

    An original checkpoint, whose layout is detected: `dfn-hf convert dfn_pure_epoch_010.pt my-dfn`

    With the original function: `dfn-hf convert best_model.pth my-liquid --native --num-heads 8 --window-size 512`

    A DFN from a Llama, to be distilled: `dfn-hf convert --from llama my-llama my-dfn`
    """
    refuse(start is not None and native, "--native is for original checkpoints: leave it out with --from llama")
    named = {
        "num_heads": num_heads,
        "window_size": window_size,
        "top_k": top_k,
        "dynamic_k": dynamic_k,
        "compression_ratio": compression_ratio,
        "dropout": dropout,
    }
    settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    settings |= parse_assignments("--config-override", config_override)
    check_source(source, start)

    from ..storage.output_folder import prepare_new_folder

    prepare_new_folder(output)

    from ..hub.convert import convert as convert_original
    from ..hub.convert import convert_llama

    if start is None:
        report = convert_original(source, output, native=native, settings=settings)
    else:
        report = convert_llama(source, output, settings=settings)
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"saved in {output}")


def check_source(source: str, start: str | None) -> None:
    """Raise ValueError unless `source` is a file or, with --from llama, a model."""
    if start is None:
        refuse(not Path(source).exists(), f"there is no file {source}: check the path")
    else:
        from ..loading.model_path import resolve_source

        resolve_source(source)
