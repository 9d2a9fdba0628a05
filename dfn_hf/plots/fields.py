"""Plots fields: the input, the entities, and the reconstruction."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..data.fields import array_field, psnr, snr
from .entities import HEAT, draw_flows
from .style import FAINT, INK, MUTED, SERIES, check_index, colour_bar, save_figure, strip_axes, to_numpy

MAX_ARROWS = 300


@dataclass(frozen=True)
class FieldReading:
    """A field on a grid of one or two axes, its E entities, and its reconstruction by a DFN.

    Attributes:
        values, reconstruction: `[size, …, value_dim]`.
        density: `[size, …]`, entities per sample.
        entities: `[E, coordinate_dim]`, coordinates of the entities in grid steps.
        rest_positions, moved_positions: `[E, position_dim]`, in one head of one layer.
        decibels: PSNR of an image or SNR of a waveform, in dB.
        title: layer and head, in words.
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
        model: model with `coordinate_dim` 1 or 2.
        array: `[height, width]`, `[height, width, values]`, `[length]` or `[length, values]`; see `array_field`.
        layer, head: indices from 0 of the positions to return.

    Raises:
        ValueError: `coordinate_dim` is above 2, the array does not fit the model, or the model does not have the
            layer or head.
    """
    config = model.config
    axes = config.coordinate_dim
    if axes > 2:
        raise ValueError(
            f"coordinate_dim is {axes}, so fields have {axes} axes: give a model with coordinate_dim 1 or 2"
        )
    check_index("layer", layer, config.num_hidden_layers)
    check_index("head", head, config.num_attention_heads)
    array = np.asarray(array)
    field = array_field(array, axes)
    if field["values"].shape[1] != config.value_dim:
        raise ValueError(
            f"the field has {field['values'].shape[1]} values per sample but the model's value_dim is "
            f"{config.value_dim}: give a grey image for 1, or a colour image for 3"
        )
    shape = array.shape[:axes]
    batch = {name: tensor[None].to(model.device) for name, tensor in field.items()}
    outputs = model(**batch, output_entities=True)
    reconstruction, measure = outputs.reconstruction[0].float().cpu(), psnr if axes == 2 else snr
    steps = (max(*shape, 2) - 1) / 2
    centre = torch.tensor([(size - 1) / 2 for size in shape])
    entities = outputs.entities[layer]
    return FieldReading(
        values=to_numpy(field["values"]).reshape(*shape, -1),
        reconstruction=to_numpy(reconstruction).reshape(*shape, -1),
        density=to_numpy(outputs.density[0]).reshape(shape),
        entities=to_numpy(outputs.entity_coordinates[0].cpu() * steps + centre),
        rest_positions=to_numpy(entities.rest_positions[0, head]),
        moved_positions=to_numpy(entities.moved_positions[0, head]),
        decibels=measure(reconstruction, field["values"]),
        title=f"layer {layer + 1} of {config.num_hidden_layers}, head {head + 1} of {config.num_attention_heads}",
    )


def plot_field(reading: FieldReading, *, path: str | None = None) -> Figure:
    """Draw the field, its density and entities, the reconstruction, and the positions and flows."""
    return (_plot_image if reading.density.ndim == 2 else _plot_waveform)(reading, path)


def _plot_image(reading: FieldReading, path: str | None) -> Figure:
    height, width = reading.density.shape
    below_each_other = width > 2.5 * height
    top = min(12.0, 3 * (9.5 * height / width + 0.5) if below_each_other else 3.6 * height / width + 0.5)
    figure = Figure(figsize=(11, top + 4.5), layout="constrained", dpi=150)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=[top, 4.5]))
    panels = upper.subplots(3, 1) if below_each_other else upper.subplots(1, 3)
    show_image(panels[0], reading.values, f"{height} × {width} samples")
    image = panels[1].imshow(reading.density, cmap=HEAT, vmin=0, vmax=np.quantile(reading.density, 0.99))
    panels[1].scatter(*reading.entities.T[::-1], s=max(0.2, 600 / len(reading.entities)), color=INK, linewidths=0)
    panels[1].set_title(f"{len(reading.entities)} entities", color=INK, loc="left")
    panels[1].set_axis_off()
    colour_bar(upper, image, panels if below_each_other else [panels[1]], "entities per sample")
    show_image(panels[2], reading.reconstruction, f"reconstruction: {reading.decibels:.1f} dB PSNR")
    _draw_positions(lower.subplots(), reading)
    return save_figure(figure, path)


def _plot_waveform(reading: FieldReading, path: str | None) -> Figure:
    figure = Figure(figsize=(11, 10), layout="constrained", dpi=150)
    wave, density, flows = figure.subplots(3, 1, height_ratios=[2.5, 1.2, 4.5])
    wave.plot(reading.values[:, 0], color=MUTED, lw=0.8, label="input")
    wave.plot(
        reading.reconstruction[:, 0],
        color=SERIES[0],
        lw=0.8,
        label=f"reconstruction: {reading.decibels:.1f} dB SNR",
    )
    wave.set_title(f"{len(reading.values):,} samples, {len(reading.entities):,} entities", color=INK, loc="left")
    wave.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    density.fill_between(np.arange(len(reading.density)), reading.density, color=SERIES[4], alpha=0.5, lw=0)
    density.vlines(reading.entities[:, 0], 0, -0.08 * reading.density.max(), color=INK, lw=0.3)
    density.set_ylabel("density", color=MUTED)
    density.set_xlabel("sample; one tick per entity", color=MUTED)
    for axes in (wave, density):
        axes.set_xlim(0, len(reading.values) - 1)
        axes.grid(axis="y", color=FAINT, lw=0.4)
        strip_axes(axes)
    _draw_positions(flows, reading)
    return save_figure(figure, path)


def _draw_positions(axes: Axes, reading: FieldReading) -> None:
    """Draw the positions and flows of at most `MAX_ARROWS` entities, at equal intervals."""
    step = -(-len(reading.entities) // MAX_ARROWS)
    draw_flows(axes, reading.rest_positions[::step], reading.moved_positions[::step])
    which = "entities" if step == 1 else f"1 in {step} entities"
    axes.set_title(f"Rest positions of {which} and their flows: {reading.title}", color=INK, loc="left")


def show_image(axes: Axes, values: np.ndarray, title: str) -> None:
    """Draw a grey or colour image with values in [−1, 1]; values beyond ±1.5 are scaled from their own range."""
    low, high = (-1.0, 1.0) if np.abs(values).max() <= 1.5 else (values.min(), values.max())
    pixels = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    axes.imshow(pixels if values.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, color=INK, loc="left")
    axes.set_axis_off()
