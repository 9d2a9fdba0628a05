"""Pictures of a field: what was given, where entities lie, and what they give back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..data.fields import array_field, psnr, snr
from .entities import DENSITY, draw_flows
from .flow_map import FAINT, INK, MUTED, SERIES, chosen, plain
from .flows import colour_bar, finished, to_numpy

MAX_ARROWS = 300


@dataclass(frozen=True)
class FieldReading:
    """What a DFN made of a field on a grid of one or two axes.

    Attributes:
        values, reconstruction: `[size, …, value_dim]`, of the grid.
        density: `[size, …]`, entities per sample.
        entities: `[E, coordinate_dim]`, where they lie, counted in steps of the grid.
        rest_positions, moved_positions: `[E, position_dim]`, of one head of one layer.
        decibels: PSNR of an image, SNR of a waveform.
        title: which layer and head, in words.
    """

    values: np.ndarray
    reconstruction: np.ndarray
    density: np.ndarray
    entities: np.ndarray
    rest_positions: np.ndarray
    moved_positions: np.ndarray
    decibels: float
    title: str


@torch.no_grad()
def read_field(model: PreTrainedModel, array: Any, *, layer: int = 0, head: int = 0) -> FieldReading:
    """Run a `DFNForFieldReconstruction` over an image or a waveform.

    Args:
        array: `[height, width]` or `[height, width, values]`, or `[length]`; see `fields.array_field`.
        layer, head: of the positions, from 0.

    Raises:
        ValueError: a model of other fields than these, an array that is none of its fields, or a layer or head that
            the model does not have.
    """
    config = model.config
    axes = config.coordinate_dim
    if axes > 2:
        raise ValueError(f"the model's fields have {axes} axes (`coordinate_dim`): only those of one or two are drawn")
    chosen("layer", layer, config.num_hidden_layers)
    chosen("head", head, config.num_attention_heads)
    array = np.asarray(array)
    field = array_field(array, axes)
    if field["values"].shape[1] != config.value_dim:
        raise ValueError(
            f"the field has {field['values'].shape[1]} values a sample and the model's have {config.value_dim} "
            "(`value_dim`): 1 is grey, 3 are colours"
        )
    shape = array.shape[:axes]
    batch = {name: tensor[None].to(model.device) for name, tensor in field.items()}
    outputs = model(**batch, output_entities=True)
    found, measure = outputs.reconstruction[0].float().cpu(), psnr if axes == 2 else snr
    steps = (max(*shape, 2) - 1) / 2
    centre = torch.tensor([(size - 1) / 2 for size in shape])
    entities = outputs.entities[layer]
    return FieldReading(
        values=to_numpy(field["values"]).reshape(*shape, -1),
        reconstruction=to_numpy(found).reshape(*shape, -1),
        density=to_numpy(outputs.density[0]).reshape(shape),
        entities=to_numpy(outputs.entity_coordinates[0].cpu() * steps + centre),
        rest_positions=to_numpy(entities.rest_positions[0, head]),
        moved_positions=to_numpy(entities.moved_positions[0, head]),
        decibels=measure(found, field["values"]),
        title=f"layer {layer + 1} of {config.num_hidden_layers}, head {head + 1} of {config.num_attention_heads}",
    )


def plot_field(reading: FieldReading, *, path: str | None = None) -> Figure:
    """Draw the field, its density with the entities, what they give back, and below where they rest and flow."""
    return (_plot_image if reading.density.ndim == 2 else _plot_waveform)(reading, path)


def _plot_image(reading: FieldReading, path: str | None) -> Figure:
    height, width = reading.density.shape
    below_each_other = width > 2.5 * height
    top = min(12.0, 3 * (9.5 * height / width + 0.5) if below_each_other else 3.6 * height / width + 0.5)
    figure = Figure(figsize=(11, top + 4.5), layout="constrained", dpi=150)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[top, 4.5]))
    panels = upper.subplots(3, 1) if below_each_other else upper.subplots(1, 3)
    show_image(panels[0], reading.values, f"{height} × {width} samples")
    shown = panels[1].imshow(reading.density, cmap=DENSITY, vmin=0, vmax=np.quantile(reading.density, 0.99))
    panels[1].scatter(*reading.entities.T[::-1], s=max(0.2, 600 / len(reading.entities)), color=INK, linewidths=0)
    panels[1].set_title(f"{len(reading.entities)} entities", color=INK, loc="left")
    panels[1].set_axis_off()
    colour_bar(upper, shown, panels if below_each_other else [panels[1]], "entities per sample")
    show_image(panels[2], reading.reconstruction, f"from the entities: {reading.decibels:.1f} dB PSNR")
    _draw_positions(lower.subplots(), reading)
    return finished(figure, path)


def _plot_waveform(reading: FieldReading, path: str | None) -> Figure:
    figure = Figure(figsize=(11, 10), layout="constrained", dpi=150)
    wave, density, flows = figure.subplots(3, 1, height_ratios=[2.5, 1.2, 4.5])
    wave.plot(reading.values[:, 0], color=MUTED, lw=0.8, label="given")
    wave.plot(
        reading.reconstruction[:, 0],
        color=SERIES[0],
        lw=0.8,
        label=f"from the entities: {reading.decibels:.1f} dB SNR",
    )
    wave.set_title(f"{len(reading.values):,} samples, {len(reading.entities):,} entities", color=INK, loc="left")
    wave.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    density.fill_between(np.arange(len(reading.density)), reading.density, color=SERIES[4], alpha=0.5, lw=0)
    density.vlines(reading.entities[:, 0], 0, -0.08 * reading.density.max(), color=INK, lw=0.3)
    density.set_ylabel("density", color=MUTED)
    density.set_xlabel("sample; a stroke per entity", color=MUTED)
    for axes in (wave, density):
        axes.set_xlim(0, len(reading.values) - 1)
        axes.grid(axis="y", color=FAINT, lw=0.4)
        plain(axes)
    _draw_positions(flows, reading)
    return finished(figure, path)


def _draw_positions(axes: Axes, reading: FieldReading) -> None:
    """Every entity, or every n-th where there are many."""
    step = -(-len(reading.entities) // MAX_ARROWS)
    draw_flows(axes, reading.rest_positions[::step], reading.moved_positions[::step])
    which = "entities" if step == 1 else f"1 in {step} entities"
    axes.set_title(f"Where {which} rest and where they flow to read: {reading.title}", color=INK, loc="left")


def show_image(axes: Axes, values: np.ndarray, title: str) -> None:
    """An image of values in [−1, 1], or scaled to its own range if they go beyond; grey or of three colours."""
    low, high = (-1.0, 1.0) if np.abs(values).max() <= 1.5 else (values.min(), values.max())
    shares = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    axes.imshow(shares if values.shape[-1] == 3 else shares[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, color=INK, loc="left")
    axes.set_axis_off()
