"""Plots the norms that `ModuleNormsCallback` logs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ..training.callbacks.module_norms import ACTIVATION
from .style import INK, MUTED, SERIES, save_figure, strip_axes

MAX_LINES = 12


def plot_module_norms(
    history: Sequence[Mapping[str, float]], kind: str = ACTIVATION, *, path: str | None = None
) -> Figure:
    """Draw norms over steps, one line per module; the legend names the 12 modules whose norm changes most.

    Args:
        history: `trainer.state.log_history` of a run with `ModuleNormsCallback`.
        kind: "activation_norm" or "gradient_norm".
        path: file to save, with the suffix .png, .svg or .pdf.

    Raises:
        ValueError: the history holds no norms of this kind.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for field, value in entry.items():
            if field.startswith(f"{kind}/"):
                lines.setdefault(field.partition("/")[2], []).append((entry["step"], value))
    if not lines:
        raise ValueError(f"the history holds no {kind!r}: train with ModuleNormsCallback, or give another kind")
    ranked = sorted(lines, key=lambda name: -largest_ratio([value for _, value in lines[name]]))
    named = set(ranked[:MAX_LINES])
    figure = Figure(figsize=(10, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for number, name in enumerate(ranked):
        steps, values = zip(*lines[name], strict=True)
        if name in named:
            dash = ("-", "--", ":")[number // len(SERIES) % 3]
            axes.plot(steps, values, color=SERIES[number % len(SERIES)], ls=dash, lw=1.4, marker=".", label=name)
        else:
            axes.plot(steps, values, color=MUTED, lw=0.6, alpha=0.5)
    axes.set_yscale("log")
    axes.set_xlabel("step", color=MUTED)
    axes.set_title(kind.replace("_", " "), color=INK, loc="left")
    axes.legend(frameon=False, labelcolor=INK, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    strip_axes(axes)
    return save_figure(figure, path)


def largest_ratio(values: Sequence[float]) -> float:
    """The largest value divided by the smallest."""
    return max(values) / max(min(values), 1e-30)
