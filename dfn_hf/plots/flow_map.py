"""Pictures: how the loss fell, and where the entities of a text lie and flow to."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from transformers import PreTrainedModel, PreTrainedTokenizerBase

INK, MUTED, FAINT = "#22272e", "#8a94a0", "#d5dae0"
SERIES = ("#d1495b", "#2a6f97", "#5b8c5a", "#8e6c8a", "#c08a2e")
FAR, LOCAL = SERIES[0], SERIES[1]
SMALL = 7  # font size of words that matter little, in points


@dataclass(frozen=True)
class FlowMap:
    """Where the entities of one text are for one head of one layer, and what one of them reads.

    Attributes:
        words: the text of each entity, n of them.
        rest_positions: `[n, position_dim]`, where others find an entity.
        moved_positions: `[n, position_dim]`, where it reads from after its flow.
        reader: index of the entity whose neighbours are shown.
        weights: `[n]`, the reader's flow weights, summing to at most 1.
        far: indices of the reader's neighbours that the search found; the others it reads lie in its local window.
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
    """Run a DFN over `text` and take one head's positions and one word's neighbours.

    Args:
        model: a DFN causal language model.
        tokenizer: its tokenizer.
        text: longer than the model's `local_window`, else no far neighbour exists.
        word: the reader is the last token that reads so, white space aside; None takes the last token of four letters
            or more that stood in the text before, or else the last token.
        layer, head: which, from 0; None takes the one in which the reader gives its far neighbours the most weight.

    Raises:
        ValueError: an empty text, a word that is no token of the text, or a layer or head the model does not have.
    """
    config = model.config
    layers = chosen("layer", layer, config.num_hidden_layers)
    heads = chosen("head", head, config.num_attention_heads)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not token_ids:
        raise ValueError("text is empty: give a text to map")
    words = [str(tokenizer.decode([token_id])) for token_id in token_ids]
    reader = choose_reader(words, word)

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
        rest_positions=entities.rest_positions[0, head].float().cpu().numpy(),
        moved_positions=entities.moved_positions[0, head].float().cpu().numpy(),
        reader=reader,
        weights=outputs.attentions[layer][0, head, reader].float().cpu().numpy(),
        far=far[far >= 0].tolist(),
        title=f"layer {layer + 1} of {config.num_hidden_layers}, head {head + 1} of {config.num_attention_heads}",
    )


def chosen(name: str, number: int | None, available: int) -> range:
    """The numbers to choose among: `number` alone, or all there are."""
    if number is None:
        return range(available)
    if not 0 <= number < available:
        raise ValueError(f"{name} is {number}: the model has {name}s 0 to {available - 1}")
    return range(number, number + 1)


def choose_reader(words: Sequence[str], word: str | None) -> int:
    """Index of the entity to show: see `flow_map`."""
    stripped = [each.strip() for each in words]
    if word is not None:
        if word.strip() not in stripped:
            raise ValueError(f"word is {word!r}, which is no token of the text: choose one of its tokens")
        return len(stripped) - 1 - stripped[::-1].index(word.strip())
    for index in range(len(stripped) - 1, 0, -1):
        if len(stripped[index]) >= 4 and stripped[index].isalpha() and stripped[index] in stripped[:index]:
            return index
    return len(stripped) - 1


def plot_flow_map(
    flow: FlowMap, *, dimensions: tuple[int, int] | None = None, num_local: int = 8, path: str | None = None
) -> Figure:
    """Draw entities at rest (dots, darker the nearer in time), their flows (arrows), and what the reader reads.

    Args:
        flow: from `flow_map`.
        dimensions: the two dimensions of a position to draw; None takes the first two principal axes.
        num_local: how many neighbours in the local window to show, those of the greatest weight; far ones all are.
        path: file to write, by its ending (.png, .svg, .pdf).

    Raises:
        ValueError: `dimensions` that a position does not have.
    """
    rest, moved, axis_names = in_the_plane(flow.rest_positions, flow.moved_positions, dimensions)
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    reader, far = flow.reader, set(flow.far)
    strongest = [int(index) for index in np.argsort(-flow.weights, kind="stable") if flow.weights[index] > 0]
    local = [index for index in strongest if index not in far and index != reader][:num_local]
    linked = [index for index in strongest if index in far or index in local]

    axes.update_datalim(moved)
    axes.quiver(
        *rest.T, *(moved - rest).T, angles="xy", scale_units="xy", scale=1, color=FAINT, width=0.0012, zorder=1
    )
    past, future = rest[: reader + 1], rest[reader + 1 :]
    age = np.linspace(0, 1, len(past))
    axes.scatter(past[:, 0], past[:, 1], c=age, cmap="Greys", vmin=-0.6, vmax=1.4, s=14, linewidths=0, zorder=2)
    axes.scatter(future[:, 0], future[:, 1], facecolors="white", edgecolors=MUTED, s=12, linewidths=0.6, zorder=2)
    for index in linked:
        colour = FAR if index in far else LOCAL
        width = 0.6 + 4 * flow.weights[index] / flow.weights.max()
        axes.plot(*zip(moved[reader], rest[index], strict=True), color=colour, lw=width, alpha=0.45, zorder=3)
        axes.scatter(rest[index, 0], rest[index, 1], color=colour, s=26, linewidths=0, zorder=4)
    axes.annotate("", moved[reader], rest[reader], arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.6}, zorder=5)
    axes.scatter(rest[reader, 0], rest[reader, 1], color=INK, s=40, zorder=6)

    for name, colour in (("far, found by the search", FAR), ("in the local window", LOCAL)):
        axes.plot([], [], color=colour, lw=2.5, alpha=0.7, label=name)
    axes.plot([], [], color=INK, marker=">", label="the reader's flow, from rest to where it reads")
    axes.scatter([], [], facecolors="white", edgecolors=MUTED, s=12, linewidths=0.6, label="later in the text")
    axes.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=9)
    shown = flow.words[reader].strip()
    axes.set_title(f"What “{shown}” (token {reader + 1} of {len(rest)}) reads: {flow.title}", color=INK, loc="left")
    axes.set_xlabel(axis_names[0], color=MUTED)
    axes.set_ylabel(axis_names[1], color=MUTED)
    axes.margins(0.06)
    plain(axes)
    figure.draw_without_rendering()
    others = [index for index in range(len(rest) - 1, -1, -1) if index != reader and index not in linked]
    write_words(
        axes,
        rest,
        flow.words,
        [(reader, INK, 12), *((index, FAR if index in far else LOCAL, 10) for index in linked)]
        + [(index, MUTED, SMALL) for index in others],
    )
    if path is not None:
        figure.savefig(path)
    return figure


def plot_loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, path: str | None = None) -> Figure:
    """Draw training loss (thin) and validation loss (thick, marked) over steps, one colour per run.

    Args:
        histories: a run's name to its log, as `TrainingResult.history` and `training_log.json` hold it.
        path: file to write, by its ending (.png, .svg, .pdf).

    Raises:
        ValueError: no run, or one without a loss.
    """
    if not histories:
        raise ValueError("histories is empty: give at least one run")
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for number, (name, history) in enumerate(histories.items()):
        colour = SERIES[number % len(SERIES)]
        training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        if not training and not validation:
            raise ValueError(f"the history of {name!r} holds no loss")
        if training:
            axes.plot(*zip(*training, strict=True), color=colour, lw=1, alpha=0.4)
        if validation:
            steps, losses = zip(*validation, strict=True)
            label = f"{name}: {losses[-1]:.3f}"
            axes.plot(steps, losses, color=colour, lw=2, marker="o", ms=4, label=label)
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("loss, nats per token", color=MUTED)
    axes.set_title("Validation loss (marked) and training loss (thin)", color=INK, loc="left")
    axes.legend(frameon=False, labelcolor=INK)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    plain(axes)
    if path is not None:
        figure.savefig(path)
    return figure


def in_the_plane(
    rest: np.ndarray, moved: np.ndarray, dimensions: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """Two coordinates of each position, `[n, 2]` each, and the names of the axes."""
    if dimensions is not None:
        if not all(0 <= dimension < rest.shape[1] for dimension in dimensions):
            raise ValueError(f"dimensions is {dimensions}: a position has dimensions 0 to {rest.shape[1] - 1}")
        names = (f"dimension {dimensions[0]}", f"dimension {dimensions[1]}")
        return rest[:, dimensions], moved[:, dimensions], names
    centre = rest.mean(axis=0)
    rows = max(0, 2 - len(rest))  # of zeros: one position alone has no axes
    _, spread, axes = np.linalg.svd(np.pad(rest - centre, ((0, rows), (0, 0))), full_matrices=False)
    share = spread[:2] ** 2 / max((spread**2).sum(), np.finfo(spread.dtype).tiny)
    first, second = (f"principal axis {axis + 1} ({share[axis]:.0%} of the spread)" for axis in range(2))
    return (rest - centre) @ axes[:2].T, (moved - centre) @ axes[:2].T, (first, second)


def write_words(
    axes: Axes, positions: np.ndarray, words: Sequence[str], labels: Sequence[tuple[int, str, int]]
) -> None:
    """Write words beside their entities in order of importance, leaving out those that would cover an earlier one.

    Args:
        positions: `[n, 2]`.
        labels: (entity, colour, font size), the most important first; no word covers the dot of one above `SMALL`.
    """
    marked = [index for index, _, size in labels if size > SMALL]
    dots = axes.transData.transform(positions[marked])
    taken = [Bbox.from_extents(*(dot - 5), *(dot + 5)) for dot in dots]
    for index, colour, size in labels:
        word = words[index].strip() or "↵"
        for offset, alignment in (((4, 3), "left"), ((-4, 3), "right"), ((4, -9), "left"), ((-4, -9), "right")):
            text = axes.annotate(
                word,
                positions[index],
                offset,
                textcoords="offset points",
                ha=alignment,
                color=colour,
                fontsize=size,
                zorder=7,
                parse_math=False,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def plain(axes: Axes) -> None:
    """Leave only the left and bottom lines, in a quiet colour."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=8)
