"""Plots the entities that a byte-level DFN forms in a text, and their flows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .flow_map import project_to_plane
from .style import (
    FAINT,
    INK,
    MUTED,
    SERIES,
    SMALL,
    check_index,
    colour_bar,
    label_points,
    save_figure,
    strip_axes,
    to_numpy,
    token_label,
)

HEAT = LinearSegmentedColormap.from_list("boundary_probs", ["#ffffff", "#f3c98b", SERIES[0]])
LINE_LENGTH = 72  # bytes per line of the plot


@dataclass(frozen=True)
class EntityReading:
    """The m entities that a DFN forms in a text of n bytes.

    Attributes:
        symbols: label of each byte; of a multi-byte character, the first byte has the label.
        boundary_probs: `[n]`, boundary probability of each byte.
        boundary_mask: bool `[n]`, True for bytes that complete an entity.
        spans: text of each entity.
        rest_positions, moved_positions: `[m, position_dim]`, in one head of one layer.
        title: layer and head, in words.
    """

    symbols: Sequence[str]
    boundary_probs: np.ndarray
    boundary_mask: np.ndarray
    spans: Sequence[str]
    rest_positions: np.ndarray
    moved_positions: np.ndarray
    title: str

    @property
    def rate(self) -> float:
        """Entities per byte."""
        return float(self.boundary_mask.mean())


@torch.no_grad()
def read_entities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, layer: int = 0, head: int = 0
) -> EntityReading:
    """Run a DFN over `text` and return its entities.

    Args:
        model: a DFN whose `entity_sampling` is not "token".
        tokenizer: a tokenizer whose tokens are bytes.
        text: text to read.
        layer, head: indices from 0 of the positions to return.

    Raises:
        ValueError: the text is empty, `entity_sampling` is "token", tokens are not bytes, or the model does not have
            the layer or head.
    """
    config = model.config
    if getattr(config, "entity_sampling", "token") == "token":
        raise ValueError('entity_sampling is "token": give a model with entity_sampling "adaptive" or "uniform"')
    for name, number, available in (
        ("layer", layer, config.num_hidden_layers),
        ("head", head, config.num_attention_heads),
    ):
        check_index(name, number, available)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("text is empty: give a text with at least one byte")
    data = text.encode()
    if len(ids) != len(data):
        raise ValueError(
            f"the text has {len(data)} bytes but {len(ids)} tokens: give a tokenizer whose tokens are bytes"
        )
    outputs = model(torch.tensor([ids], device=model.device), output_entities=True, use_cache=False)
    boundary_mask = outputs.boundary_mask[0].bool().cpu().numpy()
    starts = [0, *(np.flatnonzero(boundary_mask) + 1)]
    entities = outputs.entities[layer]
    return EntityReading(
        symbols=byte_symbols(text),
        boundary_probs=to_numpy(outputs.boundary_probs[0]),
        boundary_mask=boundary_mask,
        spans=[data[start:stop].decode(errors="replace") for start, stop in zip(starts, starts[1:], strict=False)],
        rest_positions=to_numpy(entities.rest_positions[0, head]),
        moved_positions=to_numpy(entities.moved_positions[0, head]),
        title=f"layer {layer + 1} of {config.num_hidden_layers}, head {head + 1} of {config.num_attention_heads}",
    )


def byte_symbols(text: str) -> list[str]:
    """Label every byte of `text` with its character, or with "" after the first byte of a character."""
    symbols = []
    for character in text:
        shown = {"\n": "↵", "\t": "→"}.get(character, character)
        symbols += [shown, *[""] * (len(character.encode()) - 1)]
    return symbols


def plot_entities(reading: EntityReading, *, path: str | None = None) -> Figure:
    """Draw the bytes, coloured by boundary probability, and the positions and flows of their entities."""
    lines = -(-len(reading.symbols) // LINE_LENGTH)
    text_height = 0.35 * lines + 0.6
    figure = Figure(figsize=(11, text_height + 6), layout="constrained", dpi=150)
    above, below = figure.subplots(2, 1, height_ratios=[text_height, 6])
    draw_bytes(above, reading)
    above.set_title(
        f"{len(reading.spans)} entities of {len(reading.symbols)} bytes ({reading.rate:.2f} per byte)",
        color=INK,
        loc="left",
    )
    colour_bar(figure, ScalarMappable(Normalize(0, 1), HEAT), [above], "boundary probability")
    draw_flows(below, reading.rest_positions, reading.moved_positions, [token_label(span) for span in reading.spans])
    below.set_title(f"Rest positions of entities and their flows: {reading.title}", color=INK, loc="left")
    return save_figure(figure, path)


def draw_bytes(axes: Axes, reading: EntityReading) -> None:
    """Draw one cell per byte, in lines of `LINE_LENGTH` bytes."""
    for place, (symbol, probability, boundary) in enumerate(
        zip(reading.symbols, reading.boundary_probs, reading.boundary_mask, strict=True)
    ):
        line, column = divmod(place, LINE_LENGTH)
        axes.add_patch(Rectangle((column, line), 1, 1, color=HEAT(float(probability)), lw=0))
        axes.text(
            column + 0.5, line + 0.55, symbol, ha="center", va="center", fontsize=8, color=INK, family="monospace",
            parse_math=False,
        )  # fmt: skip
        if boundary:
            axes.plot([column + 1, column + 1], [line + 0.05, line + 0.95], color=INK, lw=1.1)
    axes.set_xlim(0, LINE_LENGTH)
    axes.set_ylim(-(-len(reading.symbols) // LINE_LENGTH), 0)
    axes.set_axis_off()


def draw_flows(axes: Axes, rest: np.ndarray, moved: np.ndarray, labels: Sequence[str] = ()) -> None:
    """Draw rest positions as dots (darker if later) and flows as arrows to the moved positions."""
    rest, moved, names = project_to_plane(rest, moved, None)
    axes.update_datalim(moved)
    arrows: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.0015}
    axes.quiver(*rest.T, *(moved - rest).T, color=SERIES[1], alpha=0.45, zorder=1, **arrows)
    age = np.linspace(0, 1, len(rest))
    axes.scatter(rest[:, 0], rest[:, 1], c=age, cmap="Greys", vmin=-0.6, vmax=1.4, s=16, lw=0, zorder=2)
    axes.set_xlabel(names[0], color=MUTED)
    axes.set_ylabel(names[1], color=MUTED)
    axes.grid(color=FAINT, lw=0.4)
    axes.margins(0.05)
    strip_axes(axes)
    if labels:
        cast(Figure, axes.get_figure(root=True)).draw_without_rendering()
    label_points(axes, rest, labels, [(index, MUTED, SMALL) for index in range(len(labels) - 1, -1, -1)])
