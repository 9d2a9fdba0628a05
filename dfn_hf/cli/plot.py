"""`dfn-hf plot`."""

from pathlib import Path
from typing import Annotated

import typer

from ..training.settings import MAX_COUNT
from .errors import refuse
from .options import ModelSource
from .paths import check_data, check_models, check_picture


def plot(
    model: ModelSource,
    output: Annotated[Path, typer.Argument(help="New picture: .png, .svg or .pdf.")],
    text: Annotated[str | None, typer.Option(help="Text to process. Default: the beginning of a sonnet.")] = None,
    field: Annotated[Path | None, typer.Option(help="For a model of fields: an image, .npy or .wav file.")] = None,
    num_entities: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="With --field: number of entities. Default: one per 16 samples."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_COUNT, help="Layer of the positions, from 0. Default: the largest displacements."),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_COUNT, help="Head of the positions, from 0. Default: the largest displacements."),
    ] = None,
) -> None:
    """Plot the entities, positions and flows of a DFN for a text or a field.

    Example: `dfn-hf plot dfn-tiny picture.png --text "To be, or not to be, that is the question"`

    An image and its reconstruction: `dfn-hf plot my-field picture.png --field cat.png`
    """
    refuse(
        text is not None and field is not None,
        "--text and --field are for different models: give one",
    )
    refuse(num_entities is not None and field is None, "--num-entities needs --field: add it")
    check_picture(output)
    check_models(model)
    check_data(None if field is None else str(field))

    from .draw import draw_field, draw_text

    if field is None:
        draw_text(model, str(output), text, layer=layer, head=head)
    else:
        draw_field(model, str(output), field, num_entities=num_entities, layer=layer, head=head)
    typer.echo(f"saved in {output}")
