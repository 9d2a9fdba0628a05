"""Plots the entities of a text in position space, and the neighbours that one of them attends to."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .style import FAINT, INK, MUTED, SERIES, SMALL, check_index, label_points, save_figure, strip_axes, to_numpy

FAR, LOCAL = SERIES[0], SERIES[1]


@dataclass(frozen=True)
class FlowMap:
    """Positions of the n entities of one text in one head of one layer, and the neighbours of one entity.

    Attributes:
        words: text of each entity.
        rest_positions: `[n, position_dim]`, position at which other entities find an entity.
        moved_positions: `[n, position_dim]`, position after the entity's flow, from which it searches neighbours.
        reader: index of the entity whose neighbours are shown.
        weights: `[n]`, flow weights of the reader; their sum is at most 1.
        far: indices of the neighbours from the neighbour search; the other neighbours are in the local window.
        title: layer and head, in words.
    """

    words: Sequence[str]
    rest_positions: np.ndarray
    moved_positions: np.ndarray
    reader: int
    weights: np.ndarray
    far: Sequence[int]
    title: str


@torch.no_grad()
def flow_map(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    word: str | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> FlowMap:
    """Run a DFN over `text` and return one head's positions and one entity's neighbours.

    Args:
        model: a DFN causal language model.
        tokenizer: the model's tokenizer.
        text: text of more tokens than the model's `local_window`, so that there are distant neighbours.
        word: the reader is the last token with this text, apart from white space. None means the last token of four or
            more letters that also occurs earlier, or else the last token.
        layer, head: indices from 0; None means those in which distant neighbours have the largest total weight.

    Raises:
        ValueError: the text is empty, `word` is not a token of it, or the model does not have the layer or head.
    """
    config = model.config
    layers, heads = range(config.num_hidden_layers), range(config.num_attention_heads)
    if layer is not None:
        check_index("layer", layer, len(layers))
        layers = range(layer, layer + 1)
    if head is not None:
        check_index("head", head, len(heads))
        heads = range(head, head + 1)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError("text is empty: give a text with at least one token")
    words = [str(tokenizer.decode([token_id])) for token_id in token_ids]
    reader = find_reader(words, word)

    input_ids = torch.tensor([token_ids], device=model.device)
    outputs = model(input_ids, output_entities=True, output_attentions=True, use_cache=False)
    window_start = reader - config.local_window + 1

    def far_weight(place: tuple[int, int]) -> float:
        layer, head = place
        return float(outputs.attentions[layer][0, head, reader, : max(0, window_start)].sum())

    layer, head = max(itertools.product(layers, heads), key=far_weight)
    entities = outputs.entities[layer]
    far = entities.neighbors[0, head, reader]
    return FlowMap(
        words=words,
        rest_positions=to_numpy(entities.rest_positions[0, head]),
        moved_positions=to_numpy(entities.moved_positions[0, head]),
        reader=reader,
        weights=to_numpy(outputs.attentions[layer][0, head, reader]),
        far=far[far >= 0].tolist(),
        title=f"layer {layer + 1} of {config.num_hidden_layers}, head {head + 1} of {config.num_attention_heads}",
    )


def find_reader(words: Sequence[str], word: str | None) -> int:
    """Return the index of the reader; see `flow_map`."""
    stripped = [each.strip() for each in words]
    if word is not None:
        if word.strip() not in stripped:
            raise ValueError(f"word is {word!r}, which is no token of the text: give one of its tokens")
        return len(stripped) - 1 - stripped[::-1].index(word.strip())
    for index in range(len(stripped) - 1, 0, -1):
        if len(stripped[index]) >= 4 and stripped[index].isalpha() and stripped[index] in stripped[:index]:
            return index
    return len(stripped) - 1


def plot_flow_map(
    flow: FlowMap, *, dimensions: tuple[int, int] | None = None, num_local: int = 8, path: str | None = None
) -> Figure:
    """Draw entities as dots (darker if more recent), flows as arrows, and lines to the reader's neighbours.

    Args:
        flow: result of `flow_map`.
        dimensions: the two position dimensions to draw; None means the first two principal axes.
        num_local: maximum number of neighbours in the local window to draw, in order of weight.
        path: file to save, with the suffix .png, .svg or .pdf.

    Raises:
        ValueError: positions do not have the `dimensions`.
    """
    rest, moved, axis_names = project_to_plane(flow.rest_positions, flow.moved_positions, dimensions)
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    reader, far = flow.reader, set(flow.far)
    strongest = [int(index) for index in np.argsort(-flow.weights, kind="stable") if flow.weights[index] > 0]
    local = [index for index in strongest if index not in far and index != reader][:num_local]
    linked = [index for index in strongest if index in far or index in local]

    _draw_entities(axes, rest, moved, reader)
    _draw_links(axes, flow, rest, moved[reader], linked)
    _draw_legend(axes)
    word = flow.words[reader].strip()
    title = f"Neighbours of “{word}” (token {reader + 1} of {len(rest)}): {flow.title}"
    axes.set_title(title, color=INK, loc="left")
    axes.set_xlabel(axis_names[0], color=MUTED)
    axes.set_ylabel(axis_names[1], color=MUTED)
    axes.margins(0.06)
    strip_axes(axes)
    figure.draw_without_rendering()
    others = [index for index in range(len(rest) - 1, -1, -1) if index != reader and index not in linked]
    label_points(
        axes,
        rest,
        flow.words,
        [(reader, INK, 12), *((index, FAR if index in far else LOCAL, 10) for index in linked)]
        + [(index, MUTED, SMALL) for index in others],
    )
    return save_figure(figure, path)


def _draw_entities(axes: Axes, rest: np.ndarray, moved: np.ndarray, reader: int) -> None:
    """Draw all entities and their flows; entities after the reader are hollow."""
    axes.update_datalim(moved)
    axes.quiver(
        *rest.T, *(moved - rest).T, angles="xy", scale_units="xy", scale=1, color=FAINT, width=0.0012, zorder=1
    )
    past, future = rest[: reader + 1], rest[reader + 1 :]
    age = np.linspace(0, 1, len(past))
    axes.scatter(past[:, 0], past[:, 1], c=age, cmap="Greys", vmin=-0.6, vmax=1.4, s=14, linewidths=0, zorder=2)
    axes.scatter(future[:, 0], future[:, 1], facecolors="white", edgecolors=MUTED, s=12, linewidths=0.6, zorder=2)
    axes.annotate("", moved[reader], rest[reader], arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.6}, zorder=5)
    axes.scatter(rest[reader, 0], rest[reader, 1], color=INK, s=40, zorder=6)


def _draw_links(axes: Axes, flow: FlowMap, rest: np.ndarray, start: np.ndarray, linked: Sequence[int]) -> None:
    """Draw lines from `start` to the linked entities, wider for larger weights."""
    for index in linked:
        colour = FAR if index in flow.far else LOCAL
        width = 0.6 + 4 * flow.weights[index] / flow.weights.max()
        axes.plot(*zip(start, rest[index], strict=True), color=colour, lw=width, alpha=0.45, zorder=3)
        axes.scatter(rest[index, 0], rest[index, 1], color=colour, s=26, linewidths=0, zorder=4)


def _draw_legend(axes: Axes) -> None:
    for name, colour in (("far, from the neighbour search", FAR), ("in the local window", LOCAL)):
        axes.plot([], [], color=colour, lw=2.5, alpha=0.7, label=name)
    axes.plot([], [], color=INK, marker=">", label="the reader's flow, from rest to moved position")
    axes.scatter([], [], facecolors="white", edgecolors=MUTED, s=12, linewidths=0.6, label="later in the text")
    axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=9)


def project_to_plane(
    rest: np.ndarray, moved: np.ndarray, dimensions: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """Project positions to two dimensions, or to their first two principal axes if `dimensions` is None.

    Returns:
        Rest and moved positions, `[n, 2]` each, and the names of both axes.
    """
    if dimensions is not None:
        if not all(0 <= dimension < rest.shape[1] for dimension in dimensions):
            raise ValueError(f"dimensions is {dimensions}: a position has dimensions 0 to {rest.shape[1] - 1}")
        names = (f"dimension {dimensions[0]}", f"dimension {dimensions[1]}")
        return rest[:, dimensions], moved[:, dimensions], names
    centre = rest.mean(axis=0)
    padding = max(0, 2 - len(rest))  # an SVD of a single position has only one axis
    _, scales, axes = np.linalg.svd(np.pad(rest - centre, ((0, padding), (0, 0))), full_matrices=False)
    variance = scales[:2] ** 2 / max((scales**2).sum(), np.finfo(scales.dtype).tiny)
    first, second = (f"principal axis {axis + 1} ({variance[axis]:.0%} of the variance)" for axis in range(2))
    return (rest - centre) @ axes[:2].T, (moved - centre) @ axes[:2].T, (first, second)
