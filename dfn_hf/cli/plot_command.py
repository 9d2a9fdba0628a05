"""Pictures of what a saved model makes of an input, whatever its kind."""

import math
from pathlib import Path

from ..hub.loading import load_causal_lm, load_config, resolve_source
from ..modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
from ..plots.entities import plot_entities, read_entities
from ..plots.fields import plot_field, read_field
from ..plots.flow_map import flow_map, plot_flow_map
from ..training.field import SAMPLES_PER_ENTITY, load_arrays

PICTURES = (".png", ".svg", ".pdf")
TEXT = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n"
)


def show_text(
    source: str, path: str, text: str | None = None, *, layer: int | None = None, head: int | None = None
) -> None:
    """Draw what a DFN makes of `text`: the entities it samples, or what a token reads where every token is an entity.

    Args:
        source: a folder, an embedded checkpoint's name or a Hub id.
        path: picture to write.
        text: of a sonnet if None.
        layer, head: of the positions, from 0; None where it shows most.

    Raises:
        ValueError: a model that is no DFN, a picture of an unknown kind, or what the pictures refuse.
    """
    check_picture(path)
    config = load_config(source)
    if config.model_type != "dfn":
        raise ValueError(f"{source} is a {config.model_type}: only a DFN can be shown")
    model, tokenizer = load_causal_lm(source)
    model.eval()
    text = TEXT if text is None else text
    if config.entity_sampling == "token":
        plot_flow_map(flow_map(model, tokenizer, text, layer=layer, head=head), path=path)
    else:
        plot_entities(read_entities(model, tokenizer, text, layer=layer or 0, head=head or 0), path=path)


def show_field(
    source: str,
    path: str,
    file: str | Path,
    *,
    num_entities: int | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """Draw an image or a waveform, where a model of fields places entities in it, and what it gives back.

    Args:
        source: a folder of a `DFNForFieldReconstruction`.
        path: picture to write.
        file: an image, `.npy` or `.wav`.
        num_entities: how many to sample it into; a sixteenth of its samples if None.
        layer, head: of the positions, from 0.

    Raises:
        ValueError: a model of something else, a picture of an unknown kind, or a field that is not the model's.
    """
    check_picture(path)
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder: give one file of it")
    config = load_config(source)
    if "DFNForFieldReconstruction" not in (config.architectures or ()):
        raise ValueError(f"{source} is no model of fields: train one with --objective field")
    model = DFNForFieldReconstruction.from_pretrained(resolve_source(source)).eval()
    array = load_arrays(file)[0]
    if array.ndim - 1 != config.coordinate_dim:
        raise ValueError(f"{file} has {array.ndim - 1} axes, and the model's fields {config.coordinate_dim}")
    samples = math.prod(array.shape[:-1])
    if num_entities is not None and num_entities > samples:
        raise ValueError(
            f"num_entities is {num_entities}, and {file} has {samples} samples: ask for no more than those"
        )
    model.config.num_entities = num_entities or max(1, samples // SAMPLES_PER_ENTITY)
    plot_field(read_field(model, array, layer=layer or 0, head=head or 0), path=path)


def check_picture(path: str) -> None:
    """Raise ValueError unless the ending is of a kind of picture."""
    if Path(path).suffix not in PICTURES:
        raise ValueError(f"{path} has none of the endings {', '.join(PICTURES)} of a picture")
