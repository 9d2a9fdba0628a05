"""Plots training and validation losses over steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .style import FAINT, INK, MUTED, SERIES, save_figure, strip_axes


def plot_loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, path: str | None = None) -> Figure:
    """Draw training loss (thin) and validation loss (thick, with markers) over steps, one colour per run.

    Args:
        histories: log of each run by its name: `TrainingResult.history`, or the content of `training_log.json`.
        path: file to save, with the suffix .png, .svg or .pdf.

    Raises:
        ValueError: there is no run, or a run has no loss.
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
            raise ValueError(f"the history of {name!r} holds no loss: give the log of a training run")
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
    strip_axes(axes)
    return save_figure(figure, path)
