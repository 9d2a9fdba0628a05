"""Draws how a saved DFN processes a text or a field."""

import math
from pathlib import Path

from ..loading.model_path import resolve_source
from ..loading.models import load_causal_lm, load_config, load_weights
from ..modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction
from ..plots.entities import plot_entities, read_entities
from ..plots.fields import plot_field, read_field
from ..plots.flow_map import flow_map, plot_flow_map
from ..training.field import SAMPLES_PER_ENTITY, load_arrays

TEXT = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n"
)


def draw_text(
    source: str, path: str, text: str | None = None, *, layer: int | None = None, head: int | None = None
) -> None:
    """Draw the entities that a DFN samples from a text or, if every token is an entity, the neighbours of one token.

    Args:
        source: a folder, the name of a bundled checkpoint or a Hub id.
        path: picture to write.
        text: None is the beginning of a sonnet.
        layer: layer of the positions, from 0; None selects the layer with the largest displacements.
        head: head of the positions, from 0; None selects it in the same way.

    Raises:
        ValueError: the model is not a DFN, or the plot rejects its input.
    """
    config = load_config(source)
    if config.model_type != "dfn":
        raise ValueError(f"{source} is a {config.model_type}: only a DFN can be plotted")
    model, tokenizer = load_causal_lm(source)
    model.eval()
    text = TEXT if text is None else text
    if config.entity_sampling == "token":
        plot_flow_map(flow_map(model, tokenizer, text, layer=layer, head=head), path=path)
    else:
        plot_entities(read_entities(model, tokenizer, text, layer=layer or 0, head=head or 0), path=path)


def draw_field(
    source: str,
    path: str,
    file: str | Path,
    *,
    num_entities: int | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """Draw an image or a waveform, the entities that a model samples from it, and its reconstruction.

    Args:
        source: folder of a `DFNForFieldReconstruction`.
        path: picture to write.
        file: an image, `.npy` or `.wav`.
        num_entities: number of entities; None is one per 16 samples.
        layer, head: layer and head of the positions, from 0; None is 0.

    Raises:
        ValueError: the model has another head, or the field does not have the model's axes.
    """
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder: give one of its files")
    config = load_config(source)
    if "DFNForFieldReconstruction" not in (config.architectures or ()):
        raise ValueError(f"{source} is not a model of fields: train one with dfn-hf train field")
    model = load_weights(resolve_source(source), DFNForFieldReconstruction)
    array = load_arrays(file)[0]
    if array.ndim - 1 != config.coordinate_dim:
        raise ValueError(f"{file} has {array.ndim - 1} axes, and the model's fields have {config.coordinate_dim}")
    samples = math.prod(array.shape[:-1])
    if num_entities is not None and num_entities > samples:
        raise ValueError(f"--num-entities is {num_entities}, but {file} has {samples} samples: lower it")
    model.config.num_entities = num_entities or max(1, samples // SAMPLES_PER_ENTITY)
    plot_field(read_field(model, array, layer=layer or 0, head=head or 0), path=path)
