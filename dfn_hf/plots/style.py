"""Colours, axes and labels that all plots share."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

INK, MUTED, FAINT = "#22272e", "#8a94a0", "#d5dae0"
SERIES = ("#d1495b", "#2a6f97", "#5b8c5a", "#8e6c8a", "#c08a2e")
DASHES = ("-", "--", ":")  # tell lines apart once the colours are used up
SMALL = 7  # font size of minor labels, in points
MAX_TOKEN_LABELS = 80  # an axis with more tokens has numbers instead of token labels


def check_index(name: str, index: int, available: int) -> None:
    """Raise ValueError unless `index` is that of one of the model's `available` layers or heads."""
    if not 0 <= index < available:
        raise ValueError(f"{name} is {index}: the model has {name}s 0 to {available - 1}")


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Convert a tensor to a float32 array."""
    return tensor.detach().float().cpu().numpy()


def line_style(index: int) -> tuple[str, str]:
    """Colour and dash pattern of the line with this index."""
    return SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]


def strip_axes(axes: Axes) -> None:
    """Hide the top and right spines, and draw the others and the ticks in muted colours."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=8)


def colour_bar(figure: FigureBase, image: ScalarMappable, beside: Sequence[Axes], name: str) -> None:
    """Add a colour bar for `image` next to the axes that share it."""
    bar = figure.colorbar(image, ax=list(beside), pad=0.01, fraction=0.04, shrink=0.7)
    bar.set_label(name, color=MUTED, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=MUTED, labelsize=SMALL, length=2)


def token_label(token: str) -> str:
    """Text of a token without surrounding spaces and with visible line breaks."""
    return token.replace("\n", "↵").strip() or "␣"


def set_token_ticks(axes: Axes, tokens: Sequence[str], name: str = "", *, vertical: bool = False) -> None:
    """Label an axis with tokens, or with the axis name only if there are more than `MAX_TOKEN_LABELS`."""
    axis = axes.yaxis if vertical else axes.xaxis
    if len(tokens) > MAX_TOKEN_LABELS:
        axis.set_label_text(f"{name} token".strip(), color=MUTED)
        return
    rotation = 0 if vertical else 90
    labels = [token_label(token) for token in tokens]
    axis.set_ticks(range(len(tokens)), labels, rotation=rotation, fontsize=SMALL, color=INK, parse_math=False)
    axis.set_tick_params(length=0)
    axis.set_label_text(name, color=MUTED)


def set_slot_ticks(axis: Axis, num_slots: int) -> None:
    """Number slots from 1 along an axis, with about eight ticks."""
    ticks = range(0, num_slots, max(1, num_slots // 8))
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])


def label_points(
    axes: Axes, positions: np.ndarray, words: Sequence[str], labels: Sequence[tuple[int, str, int]]
) -> None:
    """Label points in order of importance and skip labels that would overlap an earlier label.

    Args:
        positions: `[n, 2]`.
        words: label of each point.
        labels: (point, colour, font size), the most important first. No label covers a point whose label is larger
            than `SMALL`.
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


def save_figure(figure: Figure, path: str | None) -> Figure:
    """Save the figure to `path` unless it is None, and return the figure."""
    if path is not None:
        figure.savefig(path)
    return figure
